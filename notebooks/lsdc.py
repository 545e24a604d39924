# %% [markdown]
# # LSD-C: which pairs of images belong together?
#
# Rebuffi, Ehrhardt, Han, Vedaldi & Zisserman, *LSD-C: Linearly Separable Deep Clusters*, 2020.
# Everything is computed by the functions of [lsdc.py](../lsdc.py); a CPU is enough.

# %%
import copy
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

import lsdc

from common import (  # isort: skip
    Loader, View, extract, fill_batch_norm, generator, kmeans, label_scores, load_data, make_backbone, nearest,
    pixel_net, setup,
)  # fmt: skip

import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

plt.rcParams.update({"figure.dpi": 70, "figure.autolayout": True})
SEED = 0

# %% [markdown]
# ## 1. The problem
#
# Here are images, without labels, and we want ten groups. Which image is in which group nobody knows, but there is an
# easier question: are these *two* images of one group? Two images whose features are very close mostly are.
# **LSD-C** marks such pairs in every batch, and trains a linear classifier to put both images of a pair into one
# cluster, and images of other pairs into different ones.

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
# $$L = -\frac{1}{B^2} \sum_{i,j} \Big[ S_{ij} \log\big(p_i^\top p_j\big)
# + (1 - S_{ij}) \log\big(1 - p_i^\top p_j\big) \Big]$$
#
# - $p_i$: probabilities of the $K$ clusters for image $i$ of a batch of $B$; $p_i^\top p_j$: the probability that
#   images $i$ and $j$ are in the same cluster
# - $S_{ij}$: 1 if $i$ is among the nearest neighbors of $j$ in the batch, or $j$ among those of $i$, or $i = j$, else 0: the
#   *pairwise pseudo-label*, from the features before the classifier

# %%
print(inspect.getsource(lsdc.knn_pairs))
print(inspect.getsource(lsdc.pair_loss))

# %% [markdown]
# Six points in the plane, two neighbors each. Left the pairs, in the middle the matrix $S$. Right the loss of three
# ways to cluster the points: the two groups, one cluster for all, and no decision.

# %%
points = torch.tensor([[0.0, 0.0], [1.0, 0.2], [0.3, 1.0], [4.0, 3.0], [5.0, 3.3], [4.2, 4.0]])
S = lsdc.knn_pairs(points, num_neighbors=2)
groups = F.one_hot(torch.tensor([0, 0, 0, 1, 1, 1])).float()  # (6, 2) probabilities
ways = {"two groups": groups, "one for all": groups[[0] * 6], "undecided": torch.full((6, 2), 0.5)}
_, axes = plt.subplots(1, 3, figsize=(7, 2.3))
for i, j in S.nonzero().tolist():
    axes[0].plot(*points[[i, j]].T, "o-", color="C0")
for i, (x, y) in enumerate(points.tolist()):
    axes[0].text(x + 0.2, y, i)
axes[1].imshow(S, cmap="Blues")
axes[1].set(title="S", xticks=range(6), yticks=range(6))
axes[2].bar(ways.keys(), [lsdc.pair_loss(p, p, S.float()) for p in ways.values()])
axes[2].set(title="loss")
axes[2].tick_params(axis="x", labelrotation=20, labelsize=8)
plt.show()

# %% [markdown]
# The pairs say which three points belong together, and the loss is 0 where they do. One cluster for all pays for every
# pair that should be apart: this keeps LSD-C from the trivial solution. To be undecided costs $\log 2$.
#
# ## 3. One step, in detail
#
# The network is LeNet-5, with a linear layer to $K = 10$ probabilities. Every image comes three times, as random
# crops: the clean one finds the pairs and is one side of them, a mixed one is the other side, and the second mixed
# one must get the same probabilities as the first.

# %%
args = lsdc.options(["--data", "digits"])
B, K, NEIGHBORS = 128, 10, 5
loader = Loader(data, B, 32, 1.0, device, workers=0)
test_loader = Loader(test, B, 32, 1.0, device, workers=0, training=False)
view = View(32, area=(0.85, 1.0), flip=0.0)  # crops of at least 85 % of the image, never mirrored
torch.manual_seed(SEED)
rng = np.random.default_rng(SEED)
net = lsdc.Network(make_backbone(args, 1, dropout=0.0, norm=True), K, layers=1)


def batches():
    return loader.train(torch.randperm(len(data)), [view] * 3)


def show_pairs(title):
    """S of a batch, its images ordered by digit: what is right lies in the ten squares along the diagonal."""
    index, (clean, _, _) = next(batches())
    order = data.labels[index].argsort()
    labels = data.labels[index][order]
    z, p = net([clean[order]])  # features (B, D), probabilities (1, B, K)
    S = lsdc.knn_pairs(z, NEIGHBORS)
    right = (S & (labels[:, None] == labels)).sum() - B  # without each image with itself
    _, axes = plt.subplots(1, 2, figsize=(7, 3))
    axes[0].imshow(S, cmap="Blues", interpolation="nearest")
    axes[0].set(title=f"S {title}: {right / (S.sum() - B):.0%} right", xticks=[], yticks=[])
    axes[1].imshow((p[0] @ p[0].T).detach(), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
    axes[1].set(title="probability of the same cluster", xticks=[], yticks=[])
    plt.show()


show_pairs("at first")

# %% [markdown]
# Half of the pairs are right already, by chance it would be a tenth; the classifier knows nothing yet. (Labels are used for such pictures alone.)
#
# **Mixing.** MixUp lays two images over each other, $r$ and $\pi(r)$ of the shuffled batch, with weights $W_1 + W_2 = 1$.
# The mixed sample is as close to image $c$ as its parts are: $T_{rc} = W_1 S_{rc} + W_2 S_{\pi(r)c}$.

# %%
print(inspect.getsource(lsdc.mixup))
print(inspect.getsource(lsdc.mixed_targets))
index, (clean, first, second) = next(batches())
permutations, weights = torch.stack([torch.arange(B), torch.randperm(B)]), torch.tensor([0.6, 0.4])
mixed = lsdc.mixup(first, permutations, weights)
parts = torch.cat([first[permutations[0, :10]], first[permutations[1, :10]], mixed[:10]])
plt.figure(figsize=(7, 2.3))
plt.imshow(make_grid(parts, 10, normalize=True, pad_value=1)[0], cmap="gray")
plt.title("0.6 of these, 0.4 of those, mixed")
plt.axis("off")
plt.show()

# %% [markdown]
# ## 4. The algorithm
#
# All of it. The last term asks that two mixed samples of the same images get the same probabilities; its weight rises
# during the first half. The number that is drawn is the *accuracy* on test images: the share that is right when
# clusters and kinds of digits are matched one to one.


# %%
def accuracy(network, cluster=False):
    """Of the clusters that the network tells or, with cluster=True, that k-means finds in its features."""
    found = extract(network, test_loader, torch.arange(len(test))).argmax(1)
    if cluster:
        x, y = (extract(network, part, torch.arange(len(part.data))) for part in (loader, test_loader))
        found = nearest(y, kmeans(x, K, generator(SEED))[2])[1][:, 0]
    return label_scores(test.labels, found)["acc_labels"]


filled = fill_batch_norm(copy.deepcopy(net.features), loader, torch.arange(256))  # as if it had seen images
random, pixels = accuracy(filled, cluster=True), accuracy(pixel_net(32), cluster=True)
optimizer = torch.optim.SGD(net.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
curve, CONSISTENCY = [], 5
for epoch in range(30):
    optimizer.param_groups[0]["lr"] = 0.1 if epoch < 22 else 0.01
    for _, (clean, first, second) in batches():
        permutations, weights, _ = lsdc.draw_mixture("mixup", B, 32, rng)
        mixed = [lsdc.mixup(images, permutations, weights) for images in (first, second)]
        z, p = net([clean, *mixed])  # features of the clean images, probabilities (3, B, K)
        S = lsdc.knn_pairs(z, NEIGHBORS)
        T = lsdc.mixed_targets(S, permutations, weights)
        loss = lsdc.pair_loss(p[1], p[0], T) + CONSISTENCY * lsdc.ramp(epoch, 15) * F.mse_loss(p[1], p[2])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    curve.append(accuracy(torch.nn.Sequential(net.features, net.classifier)))

plt.figure(figsize=(5, 2.4))
plt.plot(range(1, 31), curve, "o-", label="LSD-C")
plt.axhline(pixels, color="gray", ls="--", label="k-means on pixels")
plt.axhline(random, color="gray", ls=":", label="k-means on the random network")
plt.title("accuracy, test images")
plt.xlabel("epoch")
plt.ylim(0, 1)
plt.legend(fontsize=8)
plt.show()

# %% [markdown]
# Now the pairs again, and the ten clusters, a row each, with the images that the network is surest of:

# %%
show_pairs("after training")
probability = extract(torch.nn.Sequential(net.features, net.classifier), test_loader, torch.arange(len(test)))
top, found = probability.softmax(1).max(1)
rows = []
for k in range(K):
    members = (found == k).nonzero()[:, 0]
    best = test.pixels[members[top[members].argsort(descending=True)[:10]]]
    rows.append(torch.cat([best, best.new_zeros(10 - len(best), 1, 32, 32)]))
plt.figure(figsize=(3, 3))
plt.imshow(make_grid(torch.cat(rows), 10, pad_value=255)[0], cmap="gray")
plt.axis("off")
plt.show()
print(f"accuracy of test images: LSD-C {curve[-1]:.3f}, random network {random:.3f}, pixels {pixels:.3f}")

# %% [markdown]
# ## 5. Exercises, and the paper
#
# 1. Set `NEIGHBORS = 30`. A batch of 128 has about 13 images of each digit: what happens to the share of right pairs,
#    what to the clusters?
# 2. Leave the mixing out: `mixed = [first, second]`, `T = S.float()`. Does the loss get smaller? Does accuracy rise?
#
# The paper's numbers, CIFAR-10 with a ResNet-18 that had first learnt to tell rotations: 81.7 % of the images are in
# the right cluster, and 80.2 % without the last term of the loss; k-means on the features before: 14.3 %
# (supplementary, table 2).
