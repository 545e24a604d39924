# %% [markdown]
# # CoKe: cluster while training
#
# Qian, Xu, Hu, Li & Jin, *Unsupervised Visual Representation Learning by Online Constrained K-Means*, CVPR 2022.
# Everything is computed by the functions of [coke.py](../coke.py); a CPU is enough.

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

import coke
from common import Loader, generator, label_scores, load_data, pixel_net, setup

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torchvision.utils import make_grid

plt.rcParams.update({"figure.dpi": 70, "figure.autolayout": True})
SEED = 0

# %% [markdown]
# ## 1. The problem
#
# Here are images, without labels. We want ten groups, and a network whose features are good for grouping. One can
# cluster the features by k-means, train the network to predict the clusters, and repeat. Two things are unpleasant:
# k-means needs the features of *all* images at once, and clusters may run empty while the network changes. In the
# worst case all images end up in one cluster, which is very easy to predict: a trivial solution.
# **CoKe** clusters each batch as it comes, and sees to it that every cluster gets about a least number of images.

# %%
device = setup("cpu")
data, test = load_data("digits")
print(f"{len(data)} images of 32 x 32 pixels to learn from, {len(test)} to test")


def show(images):
    """Twenty images (20, 1, S, S)."""
    plt.figure(figsize=(7, 1.6))
    plt.imshow(make_grid(images, 10, pad_value=255)[0], cmap="gray")
    plt.axis("off")
    plt.show()


show(data.pixels[:20])

# %% [markdown]
# ## 2. The formula
#
# $$y_i = \arg\max_k \; x_i^\top c_k + \rho_k
# \qquad
# \rho_k \leftarrow \max\Big(0,\; \rho_k - \eta \big(s_k - \tfrac{r}{K}\big)\Big)
# \qquad
# c_k \leftarrow \mathrm{unit}\big(\mathrm{mean\ of\ the}\ x_i\ \mathrm{with}\ y_i = k\big)$$
#
# - $x_i$: the embedding of image $i$, of unit length (of several views, their mean); $c_k$: the center of cluster $k$ of $K$, of unit length
# - $y_i$: the cluster that the image gets
# - $\rho_k$: the *dual variable* of cluster $k$, a bonus for choosing it
# - $s_k$: the share of the batch that cluster $k$ got; $r$: every cluster shall get at least $r/K$; $\eta$: a step size
#
# A cluster that gets less than $r/K$ becomes the more attractive, until it gets enough. (In terms of optimization:
# $\rho_k$ is the Lagrange multiplier of the constraint "at least $rN/K$ images of all $N$", found by gradient steps.)

# %%
print(inspect.getsource(coke.assign))
print(inspect.getsource(coke.step_duals))

# %% [markdown]
# Six points and two centers, by hand: five points are nearer to center 0. We ask for equal sizes, nearly: $r = 0.9$.

# %%
angles = torch.tensor([5.0, 15, 25, 35, 42, 80]).deg2rad()
points = torch.stack([angles.cos(), angles.sin()], 1)  # (6, 2)
centers = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # (2, 2)
duals = torch.zeros(2)
_, axes = plt.subplots(1, 4, figsize=(7, 2.1), sharey=True)
for step, axis in enumerate(axes):
    y = coke.assign(points, centers, duals)
    sizes = torch.bincount(y, minlength=2)
    axis.scatter(*points.T, c=y, cmap="coolwarm", s=40)
    axis.scatter(*centers.T, c=[0, 1], cmap="coolwarm", marker="*", s=150)
    axis.set(title=f"step {step}: {sizes[0]} and {sizes[1]}", aspect="equal", xticks=[], yticks=[])
    axis.set_xlabel("$\\rho$ = " + ", ".join(f"{x:.2f}" for x in duals))
    duals = coke.step_duals(duals, sizes / 6, ratio=0.9, lr=0.5)
plt.show()

# %% [markdown]
# Nothing moved but the dual variables: the bonus of the second center grew until it had its share.
#
# ## 3. One epoch, step by step
#
# The network is LeNet-5 and two linear layers, giving 128 numbers. It gets two random crops ("views") of each image.

# %%
args = coke.options(["--data", "digits", "--k", "10", "--head", "10", "--seed", str(SEED)])
RATIO = 0.9  # r: how much of an equal share every cluster shall get
ETA = 1.0  # step of the dual variables
T, A = 0.1, 0.5  # temperature and weight of the label, both of the loss below
loader = Loader(data, 128, 32, 1.0, device, workers=0)  # batches of 128 images, 32 x 32 pixels
loaders = {"train": loader, "test": Loader(test, 128, 32, 1.0, device, workers=0, training=False)}

torch.manual_seed(SEED)
net = coke.Network(args, channels=1)


def batches():
    return loader.train(torch.randperm(len(data)), coke.make_views(args))


index, views = next(batches())
x, p = net(views)  # (2, B, D) each, of unit length
print("a view:", *views[0].shape, " embeddings:", *x.shape, " predictions, see below:", *p.shape)
show(torch.cat([view[:10] for view in views]) * loader.std * 255 + loader.mean * 255)

# %% [markdown]
# The first pass trains nothing: nearly every image gets its first label. All that CoKe remembers is in `head`: centers,
# dual variables, counts, a label for each image. `online_kmeans` assigns a batch and moves all of them. (Its last two
# arguments are for training with one view; here each image has one label, and a center is the mean of one epoch.)

# %%
print(inspect.getsource(coke.online_kmeans))

# %%
passes = {}
for ratio in (0, RATIO):
    head = coke.new_head(10, 128, len(data), slots=1, gen=generator(SEED, "centers"))
    duals = []
    for index, views in batches():
        x, _ = net(views)
        coke.online_kmeans(head, index, x.mean(0).detach(), ratio, ETA)
        duals.append(head["duals"])
    passes[ratio] = head["counts"]

_, axes = plt.subplots(1, 2, figsize=(7, 2.4))
axes[0].bar(torch.arange(10) - 0.2, passes[0].sort().values, 0.4, color="silver", label="r = 0")
axes[0].bar(torch.arange(10) + 0.2, passes[RATIO].sort().values, 0.4, label=f"r = {RATIO}")
axes[0].axhline(RATIO * 1408 / 10, color="black", ls=":", label="r N / K")
axes[0].set(xlabel="clusters, the smallest first", title="images in each cluster", xticks=[], ylim=(0, 280))
axes[0].legend(fontsize=8, frameon=False)
axes[1].plot(torch.stack(duals), color="C0")
axes[1].set(xlabel="batch", title=f"dual variables, r = {RATIO}")
plt.show()

# %% [markdown]
# The dual variables lift the small clusters towards the bound. After one pass they come close: the bound is missed by some $\sqrt{2N}$ images (Theorem 1, for a suitable $\eta$). Then the epoch ends: the
# centers that the batches moved become those that the loss uses.
#
# **The loss** is a cross-entropy: of $x$, and of $p$, what a small *predictor* makes of $x$, half each. The target of an image is, by half, its label of the epoch before ($a = 0.5$), and
# by half what the network says of its *other* view:
#
# $$q_1 = a\,\mathrm{onehot}(y) + (1-a)\,\mathrm{softmax}(x_2^\top C / T)$$

# %%
coke.end_epoch([head], 1.0)
print(inspect.getsource(coke.coke_loss))

# %%
index, views = next(batches())
x, p = net(views)
label = head["labels"][index].long()  # (B, 1)
other = (x[1] @ head["previous"].T / T).softmax(1).detach()
target = A * F.one_hot(label[:, 0], 10) + (1 - A) * other
loss = coke.coke_loss(x, p, head["previous"], label, torch.ones(128, 1), T, A)
print(f"loss {loss.mean():.3f}; all clusters equally likely: ln 10 = 2.303")
_, axes = plt.subplots(1, 4, figsize=(7, 1.9), width_ratios=[1, 3, 1, 3])
for i in range(2):
    axes[2 * i].imshow(views[0][i, 0], cmap="gray")
    axes[2 * i].axis("off")
    axes[2 * i + 1].bar(range(10), target[i])
    axes[2 * i + 1].set(title="its target", xlabel="cluster", ylim=(0, 1), xticks=range(10))
plt.show()

# %% [markdown]
# ## 4. The algorithm
#
# All of it, in a dozen lines. After each epoch the test images go to their nearest center; *accuracy* is the share
# that is right when clusters and kinds of digits are matched one to one. Labels are used for nothing else.

# %%
random = coke.kmeans_scores(net.encoder[0], loaders, args)["acc_labels"]
pixels = coke.kmeans_scores(pixel_net(32), loaders, args)["acc_labels"]
optimizer = torch.optim.SGD(net.parameters(), 0.05, momentum=0.9, weight_decay=1e-4)
ones, curve, smallest = torch.ones(128, 1), [], []
before = coke.predict(net, loader, [head])

for _ in range(20):
    for index, views in batches():
        x, p = net(views)
        labels, _ = coke.online_kmeans(head, index, x.mean(0).detach(), RATIO, ETA)
        loss = coke.coke_loss(x, p, head["previous"], labels, ones, T, A).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    smallest.append(head["counts"].min())
    coke.end_epoch([head], 1.0)
    found = coke.predict(net, loaders["test"], [head])[0][:, 0]
    curve.append(label_scores(test.labels, found)["acc_labels"])

_, axes = plt.subplots(1, 2, figsize=(7, 2.4))
axes[0].plot(range(1, 21), curve, "o-", label="CoKe")
axes[0].axhline(pixels, color="gray", ls="--", label="k-means on pixels")
axes[0].axhline(random, color="gray", ls=":", label="k-means on the random network")
axes[0].set(xlabel="epoch", title="accuracy, test images", ylim=(0, 1))
axes[0].legend(fontsize=8)
axes[1].plot(range(1, 21), smallest, "o-")
axes[1].axhline(RATIO * 1408 / 10, color="black", ls=":")
axes[1].set(xlabel="epoch", title="smallest cluster; dotted: r N / K", ylim=(0, 140))
plt.show()

# %% [markdown]
# Clusters before and after training, a row each, with the first eight images of each:

# %%
_, axes = plt.subplots(1, 2, figsize=(6, 3))
both = {"random network": before, "after training": coke.predict(net, loader, [head])}
for axis, (title, (clusters, _)) in zip(axes, both.items(), strict=True):
    first = [data.pixels[clusters[:, 0] == k][:8] for k in range(10)]
    rows = [torch.cat([x, x.new_zeros(8 - len(x), 1, 32, 32)]) for x in first]
    axis.imshow(make_grid(torch.cat(rows), 8, pad_value=255)[0], cmap="gray")
    axis.set(title=title)
    axis.axis("off")
plt.show()
print(f"accuracy of test images: CoKe {curve[-1]:.3f}, random network {random:.3f}, pixels {pixels:.3f}")

# %% [markdown]
# ## 5. Exercises, and the paper
#
# 1. Set `RATIO = 0` and run again. What will the curves of the dual variables look like, what the smallest cluster?
# 2. Set `ETA = 20`, the authors' value for batches of 1024 and thousands of clusters. Why do labels now change all
#    the time? (Look at $s_k$ of a batch: how far does one step move $\rho_k$, and how large is $x^\top c$ at most?)
#
# The paper's numbers: on CIFAR-10, clusters are right for 85.7 ± 0.2 % of the test images (supplementary 2.4); on
# ImageNet, a linear classifier on ResNet-50 features reaches 74.9 % with two views, and 72.5 % with one (supplementary, table 4).
# There a network has several heads of thousands of clusters; `python coke.py` takes K = 10, 20, .. 50 on the digits.
