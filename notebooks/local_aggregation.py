# %% [markdown]
# # Local Aggregation: draw an image to its close neighbors
#
# Zhuang, Zhai & Yamins, *Local Aggregation for Unsupervised Learning of Visual Embeddings*, ICCV 2019.
# Everything is computed by the functions of [local_aggregation.py](../local_aggregation.py); a CPU is enough.

# %%
import inspect
import os
import subprocess
import sys

if "google.colab" in sys.modules:
    REPOSITORY = "https://github.com/OWNER/deep-clustering"  # fill in the address: it is not known yet
    subprocess.run(["git", "clone", "-q", REPOSITORY, "deep-clustering"], check=True)
    subprocess.run([sys.executable, "-m", "pip", "install", "-q", "faiss-cpu"], check=True)
    os.chdir("deep-clustering")
sys.path.insert(0, os.path.abspath("." if os.path.exists("common.py") else ".."))

import local_aggregation as la
from common import Loader, View, extract, generator, kmeans, knn_accuracy, load_data, pixel_net, setup

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

plt.rcParams.update({"figure.dpi": 70, "figure.autolayout": True})
SEED = 0

# %% [markdown]
# ## 1. The problem
#
# Here are images, without labels. We want an *embedding*: a point on a sphere for each image, so that images of one
# kind lie close together, and one can look up what a new image is by its nearest neighbors. To begin with, one can
# push all images apart (*instance recognition*: each image is a class of its own). But images of one kind should not
# be apart. **Local Aggregation** pulls an image towards the neighbors that k-means puts into the same cluster, and
# away from its other neighbors. Images that are far away anyway do not matter: that is the "local" of the name.

# %%
device = setup("cpu")
data, test = load_data("digits")
print(f"{len(data)} images of 32 x 32 pixels to learn from, {len(test)} to test")
plt.figure(figsize=(7, 1.6))
plt.imshow(make_grid(data.pixels[:20], 10, pad_value=255)[0], cmap="gray")
plt.axis("off")
plt.show()

# %% [markdown]
# ## 2. The formula
#
# $$L_i = -\log \frac{\sum_{j \in C_i \cap B_i} \exp(\bar v_j^\top v_i / \tau)}
# {\sum_{j \in B_i} \exp(\bar v_j^\top v_i / \tau)}$$
#
# - $v_i$: the embedding of image $i$, of unit length; $\bar v_j$: row $j$ of the *memory bank*, a running mean of the
#   embeddings that image $j$ had
# - $B_i$: the *background neighbors*, the $k$ rows of the bank nearest to $v_i$
# - $C_i$: the *close neighbors*, all that share a cluster with $i$ in at least one of $H$ runs of k-means
# - $\tau = 0.07$: the temperature; small, so that only the nearest count

# %%
print(inspect.getsource(la.background_neighbors))
print(inspect.getsource(la.close_neighbors))
print(inspect.getsource(la.aggregation_loss))

# %% [markdown]
# Eight images on a circle, in two clusters (filled and hollow). The star is image 0, with $k = 4$ background
# neighbors. Arrows: where a small step against the gradient of its loss takes it, for two clusterings.

# %%
angles = torch.tensor([40.0, 10, 25, 58, 75, 150, 200, 270]).deg2rad()
bank = torch.stack([angles.cos(), angles.sin()], 1)  # (8, 2)
_, axes = plt.subplots(1, 2, figsize=(6, 3))
for axis, clusters in zip(axes, ([0, 0, 0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 1]), strict=True):
    clusters, index = torch.tensor(clusters), torch.tensor([0])
    v = bank[:1].clone().requires_grad_()
    similarity, ids, _ = la.background_neighbors(v, bank, index, k=4)  # (1, 4) each
    close = la.close_neighbors(clusters[None], index, ids)  # (1, 4)
    loss = la.aggregation_loss(similarity, close, tau=0.07)
    loss.sum().backward()
    filled = torch.where(clusters == 0, 1.0, 0.1)
    axis.scatter(*bank.T, s=60, alpha=filled)
    axis.scatter(*bank[ids[0]].T, s=160, facecolors="none", edgecolors="C1")
    axis.scatter(*bank[0], marker="*", s=150, color="C3", zorder=3)
    axis.arrow(*bank[0], *(-0.4 * F.normalize(v.grad)[0]), width=0.02, color="C3")
    axis.set(title=f"loss {loss.item():.2f}", aspect="equal", xlim=(-1.3, 1.3), ylim=(-1.3, 1.3))
    axis.set(xticks=[], yticks=[])
plt.show()

# %% [markdown]
# Orange rings: the background neighbors, one of them the image itself. The arrow points to those of its own cluster.
# The points on the left are not among the four: they do nothing, whatever their cluster.
#
# ## 3. One epoch, step by step
#
# The network is LeNet-5 and a linear layer to 128 numbers. The bank starts with random directions.

# %%
args = la.options(["--data", "digits"])
K, H, NEIGHBORS, TAU = (
    30,
    3,
    400,
    0.07,
)  # clusters in each of H clusterings; background neighbors; temperature
loader = Loader(data, 128, 32, 1.0, device, workers=0)  # batches of 128 images, 32 x 32 pixels
test_loader = Loader(test, 128, 32, 1.0, device, workers=0, training=False)
view = View(32, area=(0.5, 1.0), flip=0.0)  # crops of at least half of the image, never mirrored
torch.manual_seed(SEED)
net = la.Network(args, channels=1)
for _, (images,) in loader.train(torch.randperm(len(data)), [view]):
    net(images)  # batch norm sees its first statistics
bank = F.normalize(torch.randn(len(data), 128), dim=1)


def knn(network):
    """Share of the test images whose nearest training image is of the same kind, by center crops."""
    x, y = (
        extract(network, part, torch.arange(len(part.data)), F.normalize) for part in (loader, test_loader)
    )
    return knn_accuracy(y, test.labels, [(x, data.labels)])[1]


random, pixels = knn(net), knn(pixel_net(32))
optimizer = torch.optim.SGD(la.parameter_groups(net, 1e-4), 0.03, momentum=0.9)

# %% [markdown]
# **Warm-up.** Ten epochs of instance recognition fill the bank: which of all $N$ images is this crop of? After every
# step the rows of the batch move half of the way to the new embeddings.

# %%
print(inspect.getsource(la.instance_softmax))
print(inspect.getsource(la.update_bank))


# %%
def step(loss, index, v):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    la.update_bank(bank, index, v)


curve = []
for _ in range(10):
    for index, (images,) in loader.train(torch.randperm(len(data)), [view]):
        v = net(images)  # (B, 128), of unit length
        step(la.instance_softmax(v, bank, index, TAU).mean(), index, v)
    curve.append(knn(net))

# %% [markdown]
# **One image**, its nearest neighbors in the bank, and which of them are close in one, two and three clusterings. (It
# is its own nearest neighbor.) The union of several clusterings finds neighbors that one of them cuts off.


# %%
def cluster(epoch):
    """H clusterings of the bank (H, N), each from another start."""
    return torch.stack([kmeans(bank, K, generator(SEED, epoch, h))[0] for h in range(H)])


def show_neighbors(images, clusterings):
    _, axes = plt.subplots(len(images), 12, figsize=(7, 0.75 * len(images)))
    for row, i in zip(axes, images, strict=True):
        ids = (bank @ bank[i]).topk(12).indices
        close = la.close_neighbors(clusterings, torch.tensor([i]), ids[None])[0]
        for axis, j, near in zip(row, ids, close, strict=True):
            axis.imshow(data.pixels[j, 0], cmap="gray")
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set(color="C2" if near else "C3", linewidth=3)
    plt.show()


clusterings = cluster(0)
_, ids, _ = la.background_neighbors(v, bank, index, NEIGHBORS)
for h in range(1, H + 1):
    close = la.close_neighbors(clusterings[:h], index, ids)
    print(f"{h} clusterings: {close.sum(1).float().mean():.0f} of {NEIGHBORS} background neighbors are close")
examples = [3, 4, 5]
show_neighbors(examples, clusterings)

# %% [markdown]
# Green: close, pulled. Red: background, pushed away.
#
# ## 4. The algorithm
#
# All of it; compare with the formula. The curve is *nearest-neighbor accuracy* on test images, the paper's measure
# while training: labels are used for nothing else.

# %%
for epoch in range(1, 26):
    clusterings = cluster(epoch)
    for index, (images,) in loader.train(torch.randperm(len(data)), [view]):
        v = net(images)
        similarity, ids, _ = la.background_neighbors(v, bank, index, NEIGHBORS)
        close = la.close_neighbors(clusterings, index, ids)
        step(la.aggregation_loss(similarity, close, TAU).mean(), index, v)
    curve.append(knn(net))

plt.figure(figsize=(5, 2.6))
plt.plot(range(1, 11), curve[:10], "o-", ms=3, label="instance recognition")
plt.plot(range(10, 36), curve[9:], "o-", ms=3, label="Local Aggregation")
plt.axhline(pixels, color="gray", ls="--", label="pixels")
plt.axhline(random, color="gray", ls=":", label="random network")
plt.title("nearest-neighbor accuracy, test images")
plt.xlabel("epoch")
plt.legend(fontsize=8)
plt.show()

# %% [markdown]
# Instance recognition pushes all images apart, and on few images this hurts; drawing neighbors together repairs it.
# (On images this simple the pixels themselves are hard to beat.) The same three images and their neighbors now, and
# the bank in two dimensions, by PCA, with a color for each digit:

# %%
show_neighbors(examples, clusterings)
two = torch.pca_lowrank(bank, 2)[2]
plt.figure(figsize=(4, 3))
plt.scatter(*(bank @ two).T, c=data.labels, cmap="tab10", s=4)
plt.axis("off")
plt.show()
print(
    f"nearest neighbor: Local Aggregation {curve[-1]:.3f}, random network {random:.3f}, pixels {pixels:.3f}"
)

# %% [markdown]
# ## 5. Exercises, and the paper
#
# 1. `H = 1`: one clustering alone. How many close neighbors are left, and what happens to the curve?
# 2. `NEIGHBORS = len(data)`: all images are background. What does the loss push away now that it left alone before?
# 3. Go on with instance recognition instead, for all 35 epochs. Does the curve recover?
#
# The paper's numbers: nearest-neighbor accuracy of a ResNet-18 on ImageNet is 35.7 % with one clustering of 10,000
# clusters, and 37.9 % with ten of 30,000 (supplementary, tables 4 and 1). The number $k$ of background neighbors hardly
# matters there: 35.4, 35.7 and 35.8 % with 2048, 4096 and 8192.
