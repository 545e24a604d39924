# %% [markdown]
# # DeepCluster: cluster the features, predict the clusters, repeat
#
# Caron, Bojanowski, Joulin & Douze, *Deep Clustering for Unsupervised Learning of Visual Features*, ECCV 2018.
# Everything is computed by the functions of [deepcluster.py](../deepcluster.py); a CPU is enough.

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

import deepcluster
from common import Loader, View, baselines, extract, generator, kmeans, load_data, nmi, setup

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

plt.rcParams.update({"figure.dpi": 70, "figure.autolayout": True})
SEED = 0

# %% [markdown]
# ## 1. The problem
#
# Here are images, without labels. A network learns good features when it has classes to predict, but nobody has
# sorted these images. **DeepCluster** sorts them by k-means on the network's own features, and takes the clusters as
# classes: *pseudo-labels*. How can that work, when the features come from a random network? Because a random
# convolutional network is not as bad as it sounds: similar images have similar features. Its clusters are far from
# chance, training on them makes features a little better, and so on.

# %%
device = setup("cpu")
data, _ = load_data("digits")
print(f"{len(data)} images of 32 x 32 pixels")
plt.figure(figsize=(7, 1.6))
plt.imshow(make_grid(data.pixels[:20], 10, pad_value=255)[0], cmap="gray")
plt.axis("off")
plt.show()

# %% [markdown]
# ## 2. The formulas
#
# $$\min_{C,\;y_1..y_N} \; \frac1N \sum_{i=1}^N \big\| z_i - C_{y_i} \big\|^2
# \qquad\text{then}\qquad
# \min_{\theta,\,W} \; \frac1N \sum_{i=1}^N \ell\big(g_W(f_\theta(x_i)),\; y_i\big)$$
#
# - $x_i$: image $i$ of $N$; $f_\theta$: the network; $z_i$: its features, whitened and of unit length (see below)
# - $C$: the $K$ centroids; $y_i$: the cluster of image $i$, its pseudo-label
# - $g_W$: a linear layer that predicts the cluster; $\ell$: cross-entropy
#
# **Whitening.** k-means measures distances, in which a few directions of large variance would count alone. PCA keeps
# the first directions, and each is divided by its standard deviation.

# %%
print(inspect.getsource(deepcluster.whiten))

# %% [markdown]
# 200 points in the plane, stretched a hundredfold in one direction; the color tells to which of two groups they
# belong. Before, k-means cuts along the wrong axis; after, the two groups are far apart.

# %%
torch.manual_seed(SEED)
group = torch.arange(200) % 2
points = torch.stack([100 * torch.randn(200), 2.0 * group + 0.3 * torch.randn(200)], 1)  # (200, 2)
mean, axes_ = deepcluster.pca(points, 2, None)
white = (points - mean) @ axes_
_, axes = plt.subplots(1, 2, figsize=(6, 2))
for axis, x, title in zip(axes, (points, white), ("points", "whitened"), strict=True):
    found = kmeans(x, 2, generator(SEED))[0]
    axis.scatter(*x.T, c=group, cmap="coolwarm", s=10)
    axis.set_title(f"{title}, k-means: NMI {nmi(group, found):.2f}")
plt.show()

# %% [markdown]
# **NMI**, the normalized mutual information of two sortings, is 1 where each tells the other, and about 0 where they
# have nothing to do with each other.
#
# **Uniform over clusters.** If most images are in one cluster, a network does well that always answers with it: a
# *trivial solution*. So every cluster is drawn equally often. By hand, with clusters of seven, two and one images:

# %%
print(inspect.getsource(deepcluster.uniform_over_clusters))
toy = torch.tensor([0, 0, 0, 0, 0, 0, 0, 1, 1, 2])
drawn = deepcluster.uniform_over_clusters(toy, generator(SEED))
print("images that are drawn:", drawn.tolist(), "\ntheir clusters:       ", toy[drawn].tolist())

# %% [markdown]
# ## 3. One epoch, step by step
#
# The network is LeNet-5, the features are its last 84 numbers. First the features of all images, whitened:

# %%
args = deepcluster.options(["--data", "digits"])
K, P = 30, 60  # clusters; directions that PCA keeps
loader = Loader(data, 64, 32, 1.0, device, workers=0)  # batches of 64 images, 32 x 32 pixels
torch.manual_seed(SEED)
_, encoder = deepcluster.make_encoder(args, channels=1)


def cluster(gen):
    x = extract(encoder, loader, torch.arange(len(data)))  # (N, 84)
    z = deepcluster.whiten(x, *deepcluster.pca(x, P, gen))  # (N, 60), of unit length
    assign, distance, _, _ = kmeans(z, K, gen)  # (N,) each
    return x, assign, distance


x, assign, distance = cluster(generator(SEED, 0))
at_first, random = x, nmi(assign, data.labels)
print(f"NMI of clusters and kinds of digits, random network: {random:.3f}")

# %% [markdown]
# The five largest clusters, a row each, with the images nearest to the centroid; and the sizes of all clusters.
# Labels were not used. Slant and thickness matter as much as the digit does.


# %%
def show_clusters(assign, distance, title):
    sizes = torch.bincount(assign, minlength=K)
    rows = []
    for k in sizes.argsort(descending=True)[:5]:
        members = (assign == k).nonzero()[:, 0]
        rows.append(data.pixels[members[distance[members].argsort()[:10]]])
    _, axes = plt.subplots(1, 2, figsize=(6, 2), width_ratios=[2, 1])
    axes[0].imshow(make_grid(torch.cat(rows), 10, pad_value=255)[0], cmap="gray")
    axes[0].set_title(title)
    axes[0].axis("off")
    axes[1].bar(range(K), sizes.sort(descending=True).values)
    axes[1].set(title="images in a cluster", xticks=[])
    plt.show()


show_clusters(assign, distance, "clusters of the random network")

# %% [markdown]
# Then a new head, for k-means numbers its clusters anew each time, and training on random crops: every batch is an
# ordinary step of classification, with the clusters as classes.

# %%
view = View(32, area=(0.7, 1.0), flip=0.0)  # crops of at least 70 % of the image, never mirrored
optimizer = torch.optim.SGD(encoder.parameters(), 0.1, momentum=0.9, weight_decay=1e-5)


def train(assign, gen):
    head = deepcluster.make_head(encoder.dim, K, gen)  # ReLU, and a linear layer to K numbers
    head_optimizer = torch.optim.SGD(head.parameters(), 0.1, weight_decay=1e-5)
    losses = []
    for index, (images,) in loader.train(deepcluster.uniform_over_clusters(assign, gen), [view]):
        loss = F.cross_entropy(head(encoder(images)), assign[index])
        encoder.zero_grad()
        head.zero_grad()
        loss.backward()
        optimizer.step()
        head_optimizer.step()
        losses.append(loss.item())
    return losses


losses = train(assign, generator(SEED, 0))
print(
    f"loss of the first batch {losses[0]:.3f}, ln {K} = {torch.tensor(K).log():.3f}, last batch {losses[-1]:.3f}"
)

# %% [markdown]
# The first loss is that of a head which knows nothing, $\ln K$. One epoch hardly helps: it takes several.
#
# ## 4. The algorithm
#
# Cluster, train, repeat. On the way we look at two numbers: NMI with the kinds of digits (labels are used for nothing
# else), and NMI of these clusters with those of the epoch before, which tells how much still changes.

# %%
pixels = baselines(loader, K, generator(SEED))["pixels"]["nmi_labels"]
with_labels, with_previous, losses = [random], [], []
for epoch in range(1, 31):
    before = assign
    x, assign, distance = cluster(generator(SEED, epoch))
    losses += train(assign, generator(SEED, epoch))
    with_labels.append(nmi(assign, data.labels))
    with_previous.append(nmi(assign, before))

_, axes = plt.subplots(1, 2, figsize=(7, 2.6))
axes[0].plot(with_labels, label="labels")
axes[0].plot(range(1, 31), with_previous, label="the epoch before")
axes[0].axhline(random, color="gray", ls=":", label="labels, random network")
axes[0].axhline(pixels, color="gray", ls="--", label="labels, pixels")
axes[0].set(xlabel="epoch", title="NMI of clusters with ..", ylim=(0.5, 1.2))
axes[0].legend(fontsize=7, loc="upper left")
axes[1].plot(losses, lw=0.5)
axes[1].axhline(torch.tensor(K).log(), color="gray", ls=":")
axes[1].set(xlabel="batch", title="loss; dotted: ln K")
plt.show()

# %% [markdown]
# The loss jumps up at every epoch's start, when the head is new. Clusters settle, but never quite. On images this
# simple the pixels themselves are hard to beat. The clusters at the end, and the features of every third image in
# two dimensions, by PCA, with a color for each digit:

# %%
show_clusters(assign, distance, "clusters after training")
_, axes = plt.subplots(1, 2, figsize=(6, 2.2))
both = {"features of the random network": at_first, "features after training": x}
for axis, (title, x) in zip(axes, both.items(), strict=True):
    mean, two = deepcluster.pca(x, 2, None)
    axis.scatter(*((x - mean) @ two)[::3].T, c=data.labels[::3], cmap="tab10", s=4)
    axis.set(title=title, xticks=[], yticks=[])
plt.show()
print(
    f"NMI of clusters and labels: DeepCluster {with_labels[-1]:.3f}, random network {random:.3f}, pixels {pixels:.3f}"
)

# %% [markdown]
# ## 5. Exercises, and the paper
#
# 1. Keep the head from epoch to epoch (make it once, before the loop). What does the loss do, and why?
# 2. Leave whitening and unit length out: `z = x`. What happens to NMI?
# 3. `K = 10`, as many as there are digits. Is it better than the random network at the same K? The paper finds 10,000 clusters best for the 1,000 classes
#    of ImageNet.
#
# The paper's numbers: on ImageNet, NMI of an epoch's clusters with the next one's rises and "saturates below 0.8", so
# many images change their cluster to the end; "in practice, this has no impact on the training" (section 4.1).
