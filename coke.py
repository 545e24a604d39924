"""CoKe: cluster and train in one pass. Every batch is assigned to the nearest centers, subject to a lower bound on
every cluster's size; the network learns to predict the cluster that each image had in the epoch before.

Qian, Xu, Hu, Li & Jin, Unsupervised Visual Representation Learning by Online Constrained K-Means, CVPR 2022.

    each batch:  z = projector(backbone(V random crops of each image)); x = unit(z), p = unit(predictor(z))  (V, B, D)
                 label = argmax_k(mean of x . C_now + duals)      (B,)       the target one epoch later
                 duals -= eta (share_k - r / K)                   (K,)       of the batch; not below 0 if r < 1
                 C_now = unit(mean of the images of k this epoch) (K, D)
                 loss = (1 - b) CE(x) + b CE(p): cross-entropies of softmax(x . C_prev / T) to last epoch's label
    each epoch:  C_prev = C_now

The duals (Lagrange multipliers of the bound) are a bonus for choosing a cluster, which grows while the cluster gets
less than its share of the images. H heads of different K cluster the same embeddings. With two views the target is
a label + (1 - a) softmax(x_other . C_prev / T), of which the latter is what the other view predicts; "multi" adds small,
local crops, which take the mean of what both large, global ones predict. With one view a second stage, the last fifth
of the epochs, assigns images to C_prev, and labels and centers become averages over its epochs.

Symbols: N images, B batch (--batch-size, over all processes), V views (--views), H heads, K clusters of a head (--k),
D embedding size (--dim), S clusters in an averaged label (--label-size), C_now, C_prev centers now and of the last
epoch, r --ratio, eta --dual-lr, T --temperature, a --label-weight, b --predictor-weight.

    python coke.py                                             laptop: digits, no download, no GPU
    python coke.py --views 1                                   one view; --views multi: two and local crops
    python coke.py --data my/photos                            a folder of images, no labels needed
    python coke.py --data cifar10 --arch lenet5                a quarter of an hour on a CPU; with a GPU leave out --arch
    torchrun --nproc_per_node=8 coke.py --data data/imagenet   the paper's run with two views

What to expect: digits, a minute on a CPU, ACC / NMI / ARI of test images 92.4 / 88.8 / 84.8 % (seeds 0 to 4: ACC
89.7, 95.0, 88.6, 93.9, 94.7), one view 90.9, multi 89.8 (3 seeds); k-means on pixels 72.8, on the random network
55.4. The loss falls below that of a uniform prediction, printed first; still above it at the end, nothing was learnt:
more epochs or images. The bound, 127 images in each of 10 clusters, may be missed by some sqrt(2 N) (Theorem 1): the
smallest has 124 to 133 in the last epoch; without the bound (--ratio 0) 61 to 111, and ACC is 84.2. Which images end up
together is decided early; rounding changes it by points. CIFAR-10 with LeNet-5: ACC 30, k-means on pixels 22. Stopped
at any time, the same command goes on after the last epoch. A folder of N images has K = 10, 20, 40 as far as
N / K >= 10, and the rest by folder_recipe of common.py.

Departs from the paper and the authors' code, on purpose:
 1. The first clustering pass is --init-epochs, before the paper's epochs, and trains nothing (the code: rate 0).
 2. One view: b = 0.5 (the code's script: 1, its parser 0.5; the paper: as good as 1).
 3. The two views differ in blur, and the second may be solarized, as in the code (the paper: "as in others").
 4. Duals have the code's floor at 0, for r < 1; the theory's bound on their sum is left out, as in the code.
 5. An averaged label is stored as at most S clusters, not spread out over all K. An epoch's last incomplete
    batch is dropped: its images keep their label; one that has none yet is trained with what it gets now.
 6. Every process finds the centers, duals and labels of the whole batch; process 0's are sent around once an epoch.
 7. Batch norm is over all GPUs, each view on its own, as in the code; processes on CPUs normalize their own part.
 8. On GPUs the network trains in bf16 autocast (--no-amp), similarities and losses are float32. Outputs shorter than
    0.01, of images that are all alike, are not stretched to unit length.
 9. Clusters that are scored at the end, written and drawn are of center crops, by the nearest center without duals.
10. Blur is a Gaussian cut off at a twentieth of the image to each side (the code: Pillow's box blurs). Jitter has one
    order for a batch. Random crops of data in memory are bilinear without antialiasing.
11. Networks are the other scripts': batch norm in all linear layers, a ReLU before the projector where the network has
    none. ResNets up to 64 pixels: 3x3 stem, no pooling. No weight decay for biases and batch norm, nor with SGD.
12. cifar10, cifar100-20: what the paper leaves open is ours: momentum 0.9, weight decay 1e-4, 10 warm-up epochs and
    cosine, no blur. The other recipes are ours; of color images only LeNet-5's were run to the end.
"""

import copy
import math
import time
from argparse import BooleanOptionalAction as YesNo
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Loader, Meter, Run, View, all_gather, all_reduce_sum, assign_folder, autocast, check_finite,
    cluster_sizes, error, extract, fill_batch_norm, folder_recipe, generator, init_defaults, is_main, kmeans,
    label_scores, load_backbone, load_data, load_file, make_backbone, make_parser, nearest, nmi,
    number, parallel, pixel_net, print_once, read_backbone, save_clusters, save_file, seed_epoch, setup,
    shard, to_device,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import nn

# %% recipes and options
# Data set (or data-views, data-arch) -> hyper-parameters. imagenet: the paper's runs (supplementary 2.1, main tables,
# code); cifar10 and cifar100-20: its clustering runs (supplementary 2.4). The others are ours. Flags override.

IMAGENET = {
    "arch": "resnet50", "k": [3000, 4000, 5000], "epochs": 1000, "batch_size": 1024, "lr": 1.6, "wd": 1e-6,
    "optimizer": "lars", "warmup_epochs": 10, "ratio": 0.4, "dual_lr": 20.0, "label_weight": 0.2, "image_size": 224,
    "center_fraction": 0.875, "crop_area": 0.08, "local_area": [0.05, 0.6], "flip": True, "color": True, "blur": True,
    "projector_layers": 3,
}  # fmt: skip
CIFAR = {
    **IMAGENET, "arch": "resnet18", "k": list(range(10, 101, 10)), "epochs": 400, "batch_size": 128, "lr": 0.2,
    "wd": 1e-4, "optimizer": "sgd", "ratio": 0.9, "dual_lr": 0.1, "image_size": 32, "center_fraction": 1.0,
    "crop_area": 0.3, "blur": False,
}  # fmt: skip
GRAY = {
    **CIFAR, "arch": "lenet5", "k": [10, 20, 50, 100], "epochs": 10, "lr": 0.05, "warmup_epochs": 5, "crop_area": 0.6,
    "projector_layers": 2, "temperature": 0.1, "label_weight": 0.5, "color": False, "local_area": [0.5, 0.9],
}  # fmt: skip
LENET_CIFAR = {
    **CIFAR, "arch": "lenet5", "k": [10, 20, 50, 100], "epochs": 20, "warmup_epochs": 1, "projector_layers": 2,
    "temperature": 0.1, "label_weight": 0.5, "dual_lr": 1.0,
}  # fmt: skip
DIGITS = {**GRAY, "k": [10, 20, 30, 40, 50], "epochs": 60, "dual_lr": 1.0, "crop_area": 0.8, "flip": False}
RECIPES = {
    "imagenet": IMAGENET,  # and folders
    "imagenet-multi": {**IMAGENET, "epochs": 800},
    **dict.fromkeys(("cifar10", "stl10"), CIFAR),
    "cifar10-lenet5": LENET_CIFAR,
    "cifar100-20": {**CIFAR, "k": list(range(20, 201, 20))},
    "svhn": {**CIFAR, "flip": False},
    "fashionmnist": GRAY,
    "mnist": {**GRAY, "flip": False},
    "digits": DIGITS,
    "digits-1": {**DIGITS, "epochs": 100},
    "digits-multi": {**DIGITS, "epochs": 30},
}


def photos(known):
    """The recipe of a folder, ours: see folder_recipe; {} where it is the paper's."""
    n, shared = folder_recipe(known, 60_000)
    if not n:
        return {}
    return {
        **CIFAR, "k": [k for k in (10, 20, 40) if 10 * k <= n] or [2], "warmup_epochs": shared["epochs"] // 20,
        "lr": max(64, shared["batch_size"]) / 64 * (0.01 if known.init else 0.1), "temperature": 0.1, "dual_lr": 0.3,
        "label_weight": 0.5, "projector_layers": 2, "local_area": [0.1, 0.5], **shared,
    }  # fmt: skip


def options(argv=None):
    """The command line as a namespace."""
    p = make_parser("CoKe, online constrained k-means (Qian et al. 2022)")
    share, count, positive = number(float, 0, 1), number(int, 1), number(float, 1e-4)
    # fmt: off
    g = p.add_argument_group("training")
    g.add_argument("--recipe", choices=sorted({name.removesuffix("-1").removesuffix("-multi") for name in RECIPES}), help="whose defaults to take; None: those of --data. NAME-ARCH, where there is one, for --arch ARCH")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--epochs", type=count, help="passes over the data with training, --init-epochs not among them; the learning rate falls to 0 over them")
    g.add_argument("--batch-size", type=number(int, 2), help="images per step, over all processes; with another one than the recipe's change --lr, too [supplementary 2.1]")
    g.add_argument("--optimizer", choices=["lars", "sgd"], help="LARS or plain SGD [supplementary 2.1, 2.4]")
    g.add_argument("--lr", type=number(float, 0), help="highest learning rate, after --warmup-epochs; it grows with the batch: LARS on ImageNet 0.8 with batch 256, 1.2 with 512, 1.6 with 1024 [supplementary 2.2.1]; SGD in proportion")
    g.add_argument("--warmup-epochs", type=number(int, 0), help="epochs in which the learning rate rises [supplementary 2.1]")
    g.add_argument("--momentum", type=share, default=0.9, help="of LARS [supplementary 2.1]; of SGD ours")
    g.add_argument("--wd", type=number(float, 0), help="weight decay, not of biases and batch norm [supplementary 2.1]")
    g.add_argument("--image-size", type=number(int, 1, 4096), help="side of the square the network sees, in pixels [code]")
    g.add_argument("--center-fraction", type=number(float, 0.01, 1), help="share of the shorter side that a center crop keeps; 0.875: 224 of 256 pixels [code]")
    g.add_argument("--crop-area", type=number(float, 0.001, 1), help="smallest share of the image that a global crop keeps [code; supplementary 2.4]")
    g.add_argument("--flip", action=YesNo, help="flip half of the crops horizontally [supplementary 2.1]")
    g.add_argument("--color", action=YesNo, help="jitter colors, turn a fifth of the crops gray, solarize a fifth of the second view's [code]")
    g.add_argument("--blur", action=YesNo, help="blur crops: all of the first view, a tenth of the second, half of a single view and of local crops [code]")
    g = p.add_argument_group("CoKe")
    g.add_argument("--k", type=count, nargs="+", help="clusters of each head; for clustering results the number of classes and larger ones [code; supplementary 2.4]")
    g.add_argument("--head", type=count, metavar="K", help="clusters of the head that is printed, written and drawn; None: as many as classes, else the first")
    g.add_argument("--views", choices=["1", "2", "multi"], default="2", help="random crops of an image in each step: one; two [supplementary 2.2.3]; two and --local-crops [supplementary 2.1]")
    g.add_argument("--ratio", type=share, help="r: every cluster holds at least about r N / K images; 1: exactly; 0: no bound [3.1, code]")
    g.add_argument("--dual-lr", type=number(float, 0), help="eta, step of the dual variables; raise it if clusters stay below their bound, lower it if most labels change in every epoch [3.1, code]")
    g.add_argument("--temperature", type=positive, help="T; 0.1 for one view, 0.05 for more [code; supplementary 2.1]; ours for LeNet-5")
    g.add_argument("--label-weight", type=share, help="a: weight of last epoch's label in the target, the other view's prediction has 1 - a; not for one view [supplementary 2.2.3]")
    g.add_argument("--predictor-weight", type=share, default=0.5, help="b: weight of the predictor's loss, the projector's has 1 - b; 0: no predictor [supplementary 2.2.4]")
    g.add_argument("--local-crops", type=count, default=6, help="small crops of an image with --views multi [supplementary 2.1]")
    g.add_argument("--local-size", type=count, help="their side in pixels; None: 96 for images of 224 [supplementary 2.1], but --image-size where the network is no ResNet and takes no other")
    g.add_argument("--local-area", type=number(float, 0.001, 1), nargs=2, metavar=("LOW", "HIGH"), help="share of the image that they keep [code]")
    g.add_argument("--local-weight", type=share, default=0.5, help="weight of their loss, the global crops' has the rest [code]")
    g.add_argument("--init-epochs", type=number(int, 0), default=1, help="passes that cluster and do not train, before the first epoch [code]")
    g.add_argument("--first-stage", type=share, help="share of the epochs after which labels and centers are averaged; one view: 160 of 200 [supplementary 2.2.2]; 1: never")
    g.add_argument("--label-size", type=count, default=5, help="S, clusters in an averaged label at most [supplementary 2.2.2]")
    g.add_argument("--label-temperature", type=positive, default=0.5, help="of the softmax over an averaged label's clusters [supplementary 2.2.2]")
    g.add_argument("--dim", type=number(int, 1, 16384), default=128, help="D, numbers in an embedding [supplementary 2.1]")
    g.add_argument("--projector-layers", type=number(int, 1, 16), help="linear layers between network and embedding: 3; in the paper's ablations 2 [supplementary 2.1]")
    # fmt: on
    known, _ = p.parse_known_args(argv)
    base = known.recipe or (known.data if known.data in RECIPES else "imagenet")
    first_stage, temperature = (0.8, 0.1) if known.views == "1" else (1.0, 0.05)
    p.set_defaults(first_stage=first_stage, temperature=temperature)
    for name in (base, f"{base}-{known.views}", f"{base}-{known.arch}"):
        p.set_defaults(**RECIPES.get(name, {}))
    p.set_defaults(**photos(known))
    p.set_defaults(**init_defaults(known))
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of --data or --recipe")
    args = p.parse_args(argv)
    if args.head and args.head not in args.k:
        p.error(f"--head {args.head} is not among --k {' '.join(map(str, args.k))}")
    if args.local_area[0] > args.local_area[1]:
        p.error("--local-area wants LOW before HIGH")
    unused = {"label_weight": "--views 2 or multi"} if args.views == "1" else {}
    if args.first_stage == 1:
        unused |= dict.fromkeys(("label_size", "label_temperature"), "--first-stage below 1")
    if args.views != "multi":
        unused |= dict.fromkeys(("local_crops", "local_size", "local_area", "local_weight"), "--views multi")
    for name in (name for name in unused if vars(args)[name] != p.get_default(name)):
        p.error(f"--{name.replace('_', '-')} is for {unused[name]}")
    resnet = args.arch.startswith("resnet")
    args.local_size = args.local_size or (round(args.image_size * 96 / 224) if resnet else args.image_size)
    if args.local_size != args.image_size and not resnet:
        p.error(f"--local-size {args.local_size}: {args.arch} takes images of --image-size alone")
    views = f"-{args.views}" * (args.views != "2")
    args.out = args.out or f"runs/coke-{Path(args.data).resolve().name}{views}"
    return args


# %% network


class Network(nn.Module):
    """Views of images -> unit projections x and unit predictions p, (V, B, D) float32 each [supplementary 2.2.4].

    encoder: backbone and projector, d-d-d-D with batch norm, after the last layer, too. predictor: D-d-D.
    """

    def __init__(self, args, channels):
        super().__init__()
        backbone, self.predictor = make_backbone(args, channels, dropout=0.0, pool=True, norm=True), None
        d = backbone.dim
        self.encoder = nn.Sequential(backbone, make_projector([d] * args.projector_layers + [args.dim]))
        if args.predictor_weight > 0:
            hidden = [nn.Linear(args.dim, d), nn.BatchNorm1d(d), nn.ReLU(inplace=True)]
            self.predictor = nn.Sequential(*hidden, nn.Linear(d, args.dim))

    def forward(self, views):
        z = [self.encoder(images) for images in views]  # each with the batch norm of its own view
        p = [self.predictor(x) for x in z] if self.predictor else z
        # Where all images are alike, batch norm leaves next to nothing to stretch: without the floor its gradient,
        # 1 / length, explodes. The length of others is about the root of D.
        return tuple(F.normalize(torch.stack(y).float(), dim=-1, eps=0.01) for y in (z, p))


def make_projector(units):
    """Features (B, d) -> (B, D): linear layers of so many units, each with batch norm, ReLU before each."""
    layers = [[nn.ReLU(), nn.Linear(a, b), nn.BatchNorm1d(b)] for a, b in pairwise(units)]
    return nn.Sequential(*sum(layers, []))


# %% the algorithm (no process or device: nothing to set up)
# One head of K clusters at a time. Embeddings x, p (.., D) and centers (K, D) have unit length, but see step_centers.


def new_head(k, dim, images, slots, gen):
    """All that one head remembers beside the weights; for ImageNet with one view labels and shares take 51 MB."""
    centers = F.normalize(torch.randn(k, dim, generator=gen), dim=1)
    return {
        "previous": centers,  # (K, D) centers of the last epoch, for the loss
        "centers": centers.clone(),  # (K, D) and as they move
        "duals": torch.zeros(k),  # (K,)
        "counts": torch.zeros(k),  # (K,) images assigned in this epoch
        "labels": torch.zeros(images, slots, dtype=torch.int32),  # (N, S) clusters of each image ..
        "shares": torch.zeros(images, slots),  # (N, S) .. and its share in each; all 0: no label yet
    }


def assign(x, centers, duals):
    """The cluster of each image, (B,): argmax over k of x.c_k + rho_k [3.1, supplementary (1)]."""
    return (x @ centers.T + duals).argmax(1)


def step_duals(duals, share, ratio, lr):
    """rho_k - lr (share_k - r / K), (K,); share (K,) of the batch [3.1].

    A cluster below its share becomes the more attractive. r < 1: not below 0; r = 1 wants equal sizes: no floor.
    """
    duals = duals - lr * (share - ratio / len(share))
    return duals if ratio == 1 else duals.clamp(min=0)


def step_centers(centers, counts, members, x, normalize=True):
    """(centers (K, D), counts (K,)) after a batch: c_k <- (n_old c_k + sum of its images) / n_k, n_k the images
    assigned to k since the counts were 0, then unit length if told so [3.1, code].

    members (B, K): 1 where an image was assigned. The first batch of an epoch that hits a center replaces it; a center
    that is not hit stays. Without unit length it is the plain mean; with it, early batches weigh more, as their mean is
    stretched to 1. Sums are a product, not index_add, which adds in any order on a GPU.
    """
    hits = members.sum(0)  # (K,)
    total = counts + hits
    mean = (counts[:, None] * centers + members.T @ x) / total.clamp(min=1)[:, None]
    mean = F.normalize(mean, dim=1) if normalize else mean
    return torch.where(hits[:, None] > 0, mean, centers), total


def average_centers(previous, centers, weight):
    """An epoch's end: C_prev <- unit((1 - w) C_prev + w unit(C_now)) [3.2.2]; first stage: w = 1."""
    return F.normalize((1 - weight) * previous + weight * F.normalize(centers, dim=1), dim=1)


def average_labels(labels, shares, found, weight):
    """Labels (B, S) and their shares after the clusters found (B,) came in with weight w [3.2.2].

    shares <- (1 - w) shares, that of the found cluster + w. If it is not among the S of an image, it takes the place of
    the smallest, and the others are scaled to 1 - w. w = 1 (first stage) or no label yet: it alone is left.
    """
    hit = (labels == found[:, None]) & (shares > 0)
    least = F.one_hot(shares.argmin(1), shares.shape[1]).bool()
    slot = torch.where(hit.any(1, keepdim=True), hit, least)  # (B, S) where the found cluster goes
    evicted = slot & ~hit
    kept = shares * ~evicted
    kept = kept / kept.sum(1, keepdim=True).clamp(min=1e-12)
    shares = (1 - weight) * kept + weight * slot
    return torch.where(slot, found[:, None], labels), shares / shares.sum(1, keepdim=True)


def online_kmeans(head, index, x, ratio, dual_lr, weight=1.0, averaging=False):
    """CoKe's step for the images `index` (B,) with embeddings x (B, D): they get clusters, and the head moves on.

    weight, averaging: of the second stage, see average_labels and step_centers. -> labels, shares (B, S) of the epoch
    before; of images that had none, those just found.
    """
    found = assign(x, head["previous" if averaging else "centers"], head["duals"])  # (B,)
    members = F.one_hot(found, len(head["duals"])).to(x.dtype)  # (B, K)
    head["duals"] = step_duals(head["duals"], members.mean(0), ratio, dual_lr)
    moved = step_centers(head["centers"], head["counts"], members, x, normalize=not averaging)
    head["centers"], head["counts"] = moved
    labels, shares = head["labels"][index].long(), head["shares"][index]  # (B, S)
    after = average_labels(labels, shares, found, weight)
    head["labels"][index], head["shares"][index] = after[0].int(), after[1]
    new = shares.sum(1, keepdim=True) == 0  # (B, 1)
    return torch.where(new, after[0], labels), torch.where(new, after[1], shares)


def soft_targets(shares, temperature):
    """How much the target of an image is of each cluster of its label, (B, S): softmax of the shares / lambda' over
    those that are not 0 [supplementary 2.2.2]. One cluster alone gives 1."""
    weight = ((shares - shares.amax(1, keepdim=True)) / temperature).exp() * (shares > 0)
    return weight / weight.sum(1, keepdim=True)


def other_views(log_q):
    """What the other views predict, (V, B, K) without gradient, from log probabilities (V, B, K): the global crops,
    which come first, have each other's, local crops the mean of both [supplementary 2.2.3, code]."""
    q = log_q[:2].detach().exp()
    local = q.mean(0, keepdim=True).expand(len(log_q) - 2, *q.shape[1:])
    return torch.cat([q.flip(0), local])


def coke_loss(x, p, previous, labels, weight, temperature, a):
    """Cross-entropy of the projections x and of the predictions p (V, B, D) to the same targets, (2, V) [3.3].

    previous (K, D) and labels (B, S) are of the last epoch, weight (B, S) comes from soft_targets. One view: the label
    is the target. More: a label + (1 - a) other views [supplementary 2.2.3]. Means over the images.
    """
    assert labels.shape == weight.shape and len(labels) == x.shape[1], (labels.shape, weight.shape, x.shape)
    log_x, log_p = ((y @ previous.T / temperature).log_softmax(-1) for y in (x, p))  # (V, B, K)
    losses, q = [], other_views(log_x) if len(x) > 1 else None
    for log in (log_x, log_p):
        loss = -(weight * log.gather(-1, labels.expand(len(x), -1, -1))).sum(-1)  # (V, B)
        if q is not None:
            loss = a * loss - (1 - a) * (q * log).sum(-1)
        losses.append(loss.mean(1))
    return torch.stack(losses)


def learning_rate(lr, step, steps, warmup):
    """lr at a step 0, 1, .. of all `steps`: rising in a line for `warmup` steps, then a cosine to 0 [code]."""
    if step < warmup:
        return lr * max(1, step) / warmup  # not 0 at the first one
    return lr * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup))) / 2


@torch.no_grad()
def lars(parameters, wd, trust=0.001):
    """Make the gradients those whose SGD with momentum is LARS, in place [supplementary 2.1, code].

    Two dimensions or more: g <- g + wd w, then g <- g trust ||w|| / ||g||, if neither is 0. Others keep their gradient.
    """
    for w in parameters:
        if w.ndim > 1 and w.grad is not None:
            g = w.grad + wd * w
            length, size = g.norm(), w.norm()
            w.grad = g * torch.where((length > 0) & (size > 0), trust * size / length, 1.0)


# %% one epoch


def phase(epoch, args):
    """(name, w) of an epoch, below 0 of one that clusters only; w: weight of its labels and centers in averages."""
    late = epoch - round(args.first_stage * args.epochs)
    if epoch < 0:
        return "clustering", 1.0
    return ("averaging", 1 / (late + 1)) if late >= 0 else ("training", 1.0)


def make_views(args):
    """How the crops of an image are drawn [code; crop area: supplementary 2.4]."""
    strong, weak = ((0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)) if args.color else [(0.0,) * 4] * 2
    view = View(args.image_size, area=(args.crop_area, 1.0), flip=0.5 * args.flip, gray=0.2 * args.color)
    single = replace(view, jitter=strong, blur=0.5 * args.blur)
    if args.views == "1":
        return [single]
    first = replace(view, jitter=weak, blur=1.0 * args.blur)
    second = replace(view, jitter=weak, blur=0.1 * args.blur, solarize=0.2 * args.color)
    local = replace(single, size=args.local_size, area=tuple(args.local_area))
    return [first, second] + [local] * args.local_crops * (args.views == "multi")


def train(net, optimizer, batches, lrs, heads, now, meter, args):
    """A step for each learning rate; the heads move on and, but in phase "clustering", the network. -> sums over the
    images (2,): loss of the projections and of the predictions."""
    (name, weight), own, b, sums = now, slice(*shard(args.batch_size)), args.predictor_weight, 0
    net.train()
    for lr, (index, views) in zip(lrs, batches, strict=True):
        with torch.set_grad_enabled(name != "clustering"):
            with autocast(index.device, args.amp):
                x, p = net(views)  # (V, n, D) float32, unit length from here on
            # All processes' images get clusters, without gradient; the targets are what they had an epoch ago.
            everyone = all_gather(index, equal=True)  # (B,)
            mean = all_gather(x[:2].mean(0), equal=True)  # (B, D)
            losses = []
            for head in heads:
                rest = args.ratio, args.dual_lr, weight, name == "averaging"
                labels, shares = online_kmeans(head, everyone, mean, *rest)  # (B, S)
                target = labels[own], soft_targets(shares[own], args.label_temperature)  # (n, S)
                losses.append(coke_loss(x, p, head["previous"], *target, args.temperature, args.label_weight))
            loss_x, loss_p = torch.stack(losses).mean(0)  # (V,) each
            each = (1 - b) * loss_x + b * loss_p
            loss = each[:2].mean()
            if len(each) > 2:
                loss = (1 - args.local_weight) * loss + args.local_weight * each[2:].mean()
        if loss.requires_grad:
            optimizer.zero_grad()
            loss.backward()
            for group in optimizer.param_groups:
                group["lr"] = lr
            if args.optimizer == "lars":
                lars(net.parameters(), args.wd)
            optimizer.step()
        sums += len(index) * torch.stack([loss_x[:2].mean(), loss_p[:2].mean()]).detach().double()
        meter.add(len(index), loss)
    return sums


def end_epoch(heads, weight):
    """Make the heads those of the next epoch: the centers become those of the loss, alone or averaged, counts are 0.
    All is process 0's from here on, so that unlike machines, which round differently, cannot drift apart."""
    for head in heads:
        head["previous"] = average_centers(head["previous"], head["centers"], weight)
        head["centers"], head["counts"] = head["previous"].clone(), torch.zeros_like(head["counts"])
        for name in head:
            head[name] = all_reduce_sum(head[name] * is_main())


def stored(head):
    """The cluster that each image is most in, (N,) on the CPU; -1 for images that were not seen yet."""
    top = head["labels"].gather(1, head["shares"].argmax(1, keepdim=True))[:, 0]
    return top.masked_fill(head["shares"].sum(1) == 0, -1).long().cpu()


def predict(net, loader, heads):
    """Clusters (N, H) of all images by the nearest center of center crops, without duals; their cosine to it (N, H)."""
    z = extract(net.encoder, loader, torch.arange(*shard(len(loader.data))), F.normalize)
    check_finite(z)
    found = [nearest(z, head["previous"], inner=True) for head in heads]
    cosine, clusters = (torch.cat(x, 1) for x in zip(*found, strict=True))  # (n, H)
    return all_gather(clusters).cpu(), all_gather(cosine).cpu()


# %% main

# Shown of each epoch, of the head --head; bound is r N / K.
SHOWN = ("epoch", "loss", "changed", "smallest", "largest", "bound", "nmi_labels")
SCORES = ("acc_labels", "nmi_labels", "ari_labels")


def check(args, data):
    """Settle, refuse or say what can only be judged with the data at hand."""
    n, most, classes = len(data), max(args.k), len(data.classes)
    if most > n:
        error(f"--k {most} is more than the {data}; try {max(1, n // 50)}")
    if n < 10 * most:
        print_once(f"WARNING: --k {most}: only {n / most:.3g} images in each; try {max(2, n // 10)} or fewer")
    if args.warmup_epochs >= args.epochs:
        print_once(f"WARNING: --lr is never reached: {args.warmup_epochs} --warmup-epochs of {args.epochs}")
    args.head = args.head or (classes if classes in args.k else args.k[0])


def kmeans_scores(net, loaders, args):
    """What CoKe has to beat: label_scores of the images of the last loader by the nearest of K = --head centroids, from
    k-means on the features of the training images; nothing without labels or for over 100,000 images."""
    data = list(loaders.values())[-1].data
    if data.labels is None or len(loaders["train"].data) > 100_000:
        return {}
    features = [extract(net, part, torch.arange(*shard(len(part.data)))) for part in loaders.values()]
    centroids = kmeans(features[0], args.head, generator(args.seed, "baselines"))[2]
    return label_scores(data.labels, all_gather(nearest(features[-1], centroids)[1][:, 0]), data.unreadable)


def describe(heads, before, data, args):
    """Sizes of all heads in this epoch and scores of their labels; of head --head also what changed since `before`."""
    found, assigned, h = [], [stored(head) for head in heads], args.k.index(args.head)
    for k, head, labels in zip(args.k, heads, assigned, strict=True):
        counts, unseen = head["counts"], (labels < 0).nonzero()[:, 0].tolist()
        sizes = {"k": k, "smallest": int(counts.min()), "largest": int(counts.max())}
        sizes["bound"] = args.ratio * int(counts.sum()) / k
        found.append({**sizes, **label_scores(data.labels, labels, data.unreadable.union(unseen))})
    changes, seen = {"changed": (assigned[h] != before)[assigned[h] >= 0].double().mean().item()}, before >= 0
    changes |= {"nmi_previous": nmi(before[seen], assigned[h][seen])} if seen.any() else {}
    return {**found[h], **changes, "heads": found}


def load_model(run, device):
    """What clusters images as a finished run did, see assign_folder: by the head that it wrote."""
    backbone, saved, found = load_backbone(run)[0], read_backbone(run), load_file(run / "clustering.pt")
    widths = [x.shape[1] for name, x in saved["projector"].items() if x.ndim == 2]
    centers = found["centers"][found["k"].index(found["head"])].to(device)
    projector = make_projector([*widths, centers.shape[1]])
    projector.load_state_dict(saved["projector"])

    def decide(z):
        cosine, clusters = nearest(z, centers, inner=True)
        return 1 - cosine, clusters

    return nn.Sequential(backbone, projector).to(device), F.normalize, decide


def main():
    args = options()
    if args.assign:
        return assign_folder(args, load_model)
    device = setup(args.device)
    data, test = load_data(args.data, args.root, args.normalize)
    check(args, data)
    how = args.batch_size, args.image_size, args.center_fraction, device, args.workers
    loader = Loader(data, *how)
    loaders = {"train": loader}  # images of the last one are scored
    if data.labels is not None and test and test.labels is not None:
        loaders["test"] = Loader(test, *how, training=False)
    steps, h = len(data) // args.batch_size, args.k.index(args.head)
    uniform = sum(map(math.log, args.k)) / len(args.k)  # the loss if all similarities were equal
    ks = " ".join(map(str, args.k))
    print_once(f"{data}, K = {ks}, {steps} steps an epoch, on {device}")
    print_once(f"loss of a uniform prediction: {uniform:.3f}")

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    net = to_device(Network(args, len(data.mean)), device)
    groups = [{"params": [w for w in net.parameters() if (w.ndim > 1) == wide]} for wide in (True, False)]
    groups[0]["weight_decay"] = args.wd if args.optimizer == "sgd" else 0.0  # LARS has its own
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum)
    total, warmup = args.epochs * steps, args.warmup_epochs * steps

    run = Run(f"coke-{args.views}", args, data, may_change={"recipe"})
    if run.finished:
        return
    if run.state:
        done, heads, random = map(run.state.get, ("epoch", "heads", "random"))
        net.load_state_dict(run.state["net"])
        optimizer.load_state_dict(run.state["optimizer"])
    else:
        done, slots, gen = 0, args.label_size if args.first_stage < 1 else 1, generator(args.seed, "centers")
        heads = [new_head(k, args.dim, len(data), slots, gen) for k in args.k]
        random = copy.deepcopy(net.encoder[0])
        random = random if args.init else fill_batch_norm(random, loader, torch.arange(min(256, len(data))))
        random = kmeans_scores(random, loaders, args)
    heads = [{name: x.to(device) for name, x in head.items()} for head in heads]
    run.state = None  # its tables may be large: one copy of them is enough
    trained = parallel(torch.compile(net) if args.compile else net)

    for epoch in range(done - args.init_epochs, args.epochs):  # below 0: no training yet
        began, now, gen = time.time(), phase(epoch, args), seed_epoch(args.seed, epoch)
        first, before = max(0, epoch) * steps, stored(heads[h])
        lrs = [learning_rate(args.lr, first + i, total, warmup) for i in range(steps)]
        meter = Meter(f"epoch {epoch + 1}/{args.epochs}", steps * loader.b)
        batches = loader.train(torch.randperm(len(data), generator=gen), make_views(args))
        sums = train(trained, optimizer, batches, lrs, heads, now, meter, args)
        lr = lrs[-1] if epoch >= 0 else 0.0
        record = {"epoch": epoch + 1, "epochs": args.epochs, "phase": now[0], "lr": lr}
        means = [meter.mean_loss(), *(all_reduce_sum(sums) / (steps * args.batch_size)).tolist()]
        record |= zip(("loss", "loss_projection", "loss_prediction"), means, strict=True)
        record |= {"uniform": uniform, **describe(heads, before, data, args)}
        end_epoch(heads, now[1])
        if "test" in loaders:
            found = predict(net, loaders["test"], heads)[0][:, h]
            record["test"] = label_scores(test.labels, found, test.unreadable)
        run.end_epoch({**record, "seconds": time.time() - began}, *SHOWN)
        state = {
            "epoch": epoch + 1 + args.init_epochs,  # epochs done
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "heads": heads,  # centers, duals, counts, labels: see new_head
            "random": random,  # scores of k-means on the random network
        }
        run.save(state, net.encoder[0], loader, projector=net.encoder[1].state_dict())
    finish(run, net, loaders, heads, random, args)
    torch.distributed.destroy_process_group()


def finish(run, net, loaders, heads, random, args):
    """Cluster center crops by the last centers, score every head, write and print what the run leaves behind."""
    h, result = args.k.index(args.head), [{"k": k} for k in args.k]
    for name, images in loaders.items():
        clusters, cosine = predict(net, images, heads)
        for found, assign_all in zip(result, clusters.T, strict=True):
            found[name] = label_scores(images.data.labels, assign_all, images.data.unreadable)
        if name == "train":
            sizes = cluster_sizes(clusters[:, h], args.head)
            sizes["smallest"] *= sizes["empty"] == 0
            save_clusters(run.out, images, clusters[:, h], 1 - cosine[:, h], args.head)
    centers = [head["previous"] for head in heads]
    save_file(run.out / "clustering.pt", {"k": args.k, "head": args.head, "centers": centers})
    others = {args.start: random, "pixels": kmeans_scores(pixel_net(args.image_size), loaders, args)}
    run.log({"result": {"head": args.head, **sizes, "heads": result}, "baselines": others})
    part = list(loaders)[-1]
    shown = {"CoKe": result[h][part], **others}
    words = [f"{who} {' / '.join(f'{100 * x[s]:.1f}' for s in SCORES)}" for who, x in shown.items() if x]
    if words:
        print_once(f"ACC / NMI / ARI of {part} images in {args.head} clusters, in %:\n{', '.join(words)}")
    print_once(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")


if __name__ == "__main__":
    main()
