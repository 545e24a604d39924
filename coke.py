"""CoKe: k-means that runs along with training, and pushes clusters up that fall below a least size.

Qian, Xu, Hu, Li & Jin, Unsupervised Visual Representation Learning by Online Constrained K-Means, CVPR 2022.

    each batch:  x, p = unit(project(net(crops))), unit(predict(..))   (V, B, D)  for each of V views
                 label = argmax_k(mean of x . C_now + dual_k)          (B, H)     kept for the next epoch
                 duals -= eta * (share of the batch in k - r / K)      (H, K)     not below 0 if r < 1
                 C_now = unit(running mean of k's images this epoch)   (H, K, D)
                 loss = cross-entropy of softmax(x . C_prev / T), and of p's, with the last epoch's label
    each epoch:  C_prev = C_now

A dual is a bonus for choosing a cluster: it grows while the cluster gets less than its share of the images. H heads
with different K cluster the same embeddings. Two views: an image's target is its label and, for the larger part,
where its other view is: a label + (1 - a) softmax(x_other . C_prev / T). Multi view: small crops besides, with
the mean of both large ones in that place. One view has a second stage instead (the last fifth): images are
assigned to C_prev, labels and centres become averages over its epochs.

Symbols: N images, B batch (--batch-size, over all processes), V views (--views), H heads, K clusters of a head
(--k), D --dim, S --label-size, C_now, C_prev centres now and of the last epoch, r --ratio, eta --dual-lr, T
--temperature, a --label-share, b --predictor-share.

    python coke.py                                                  laptop: digits, no download, no GPU
    python coke.py --views 1                                        one view; --views multi: two and small crops
    python coke.py --data my/photos --recipe photos                 some thousand images, no labels needed
    torchrun --nproc_per_node=8 coke.py --views 2                   the paper's ImageNet run (data/imagenet)

What to expect: on digits, 35 s on 2 cores, ACC 93.1, NMI 90.5, ARI 86.6 % of the test images (mean of seeds 90.8, 94.2,
94.4 ACC); one view 89.6, 87.4, 81.7 (83.3, 93.1, 92.5); multi view,
50 s: 88.1, 86.2, 80.0 (79.4, 94.2, 90.8); k-means on the untrained network 63.6, 60.4, 45.4.
Fashion-MNIST, 10 epochs, seed 0: 65.2, 56.8, 45.9; one view 68.8, 61.6, 51.8; untrained 57.2, 49.3, 37.6.
A line's "chance" is the loss if all similarities were equal; the first epochs may lie above it. "changed" falls to
10 %. A head keeps its bound r N / K up to some sqrt(2 N) images (Theorem 1): on digits K = 10 to within twelve, while
clusters of larger heads, whose bound is below sqrt(2 N) = 54, may be almost empty. Which images end up together is
decided early, and rounding is enough to change it: seeds differ by ten points, and numbers of threads do.

Departs from the paper and the authors' code, on purpose:
 1. The first clustering pass is --init-epochs, on top of the paper's count of epochs; the code calls it epoch 0 of
    1001, at learning rate 0, where its momentum already gathers gradients. Here nothing is computed backward.
 2. One view: b = 0.5 (the code's script: 1, its parser 0.5; the paper: as good as 1).
 3. The views differ in blur, the second may be solarised, as in the code (the paper: "as in others").
 4. Duals have the code's floor at 0, for r < 1; the theory's bound on their sum is left out, there as well.
 5. Averaged labels are never spread out over all K: the loss reads their at most S clusters. In the code a new
    label whose number is 1 can take two places. An epoch's last incomplete batch is dropped: its
    images keep the label they have; one that has none yet (or --init-epochs 0) is trained with what it gets now.
 6. All tables lie outside the network, a copy on each process, the same after every step as all see the whole
    batch; in the code they are buffers that are sent around before every step.
 7. Batch norm sees the whole batch of all processes, on CPUs, too (torch has that for GPUs alone); each view on its
    own, as in the code.
 8. Similarities and losses are float32, the network in bf16 autocast on CUDA (--no-amp). Outputs shorter than 0.01,
    of images that are all alike, are not stretched to unit length.
 9. LARS: the rate of a tensor is trust ||w|| / ||g + wd w||, the learning rate outside of the momentum (You et al. 2017
    divide by ||g|| + wd ||w||; the authors' optimiser is not among their files). No weight decay for biases and
    batch norm, with SGD either.
10. Clusters that are scored, written and drawn are those of centre crops by the nearest centre, without duals; each
    epoch's log has the labels of training.
11. Blur is a Gaussian cut off at a twentieth of the image to each side (the code: Pillow's box blurs). Jitter has
    one order for a batch. Crops of data in memory are bilinear without antialiasing.
12. Networks are those of the other scripts: batch norm in all linear layers, which start as PyTorch starts them; a
    ReLU before the projector, where the network has none; ResNets up to 64 pixels have a 3x3 stem and no pooling.
13. cifar10, cifar100-20: what the paper leaves open is ours: momentum 0.9, weight decay 1e-4, 10 warm-up epochs and
    cosine, no blur. Recipes of the other small sets and of photos are ours. Only those of digits and Fashion-MNIST
    have been run to the end.
"""

import argparse
import copy
import math
import os
import time
from dataclasses import replace
from typing import NamedTuple

from legacy import (
    ARCHS,
    DATASETS,
    Loader,
    Parser,
    Run,
    View,
    backbone,
    before_leaving,
    cluster_sizes,
    default_data,
    default_resize,
    extract,
    fill_batch_norm,
    finite_or_leave,
    gather,
    generator,
    heartbeat,
    kmeans,
    label_scores,
    leave,
    load_data,
    nearest,
    nmi,
    number,
    overdue,
    parallel,
    percent,
    progress,
    refuse,
    save_assignments,
    save_backbone,
    save_pictures,
    say,
    seed_all,
    setup,
    shaped,
    shard,
    stop,
    synchronise,
    to_device,
    unit,
    warn_if_few,
    warn_if_trivial,
)

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------- recipes and options
# Data set (or data-views) -> hyper-parameters. Folders: the paper's ImageNet runs (supplementary 2.1, main
# tables, code). cifar10 and cifar100-20: its clustering runs (supplementary 2.4). The others are ours; photos is for
# some thousand photographs (--recipe photos). Flags override.

VIEWS = {
    "1": {"temperature": 0.1, "first_stage": 0.8},
    "2": {"temperature": 0.05, "first_stage": 1.0},
    "multi": {"temperature": 0.05, "first_stage": 1.0},
}
IMAGENET = {
    "arch": "resnet50", "k": [3000, 4000, 5000], "epochs": 1000, "batch_size": 1024, "lr": 1.6, "wd": 1e-6,
    "optimizer": "lars", "warm_up": 10, "ratio": 0.4, "dual_lr": 20.0, "label_share": 0.2, "image_size": 224,
    "resize": 256, "crop_area": 0.08, "small_area": [0.05, 0.6], "flip": True, "colour": True, "blur": True,
    "projector_layers": 3,
}  # fmt: skip
FEW = {
    "arch": "resnet18", "k": [10, 20, 40], "epochs": 20, "warm_up": 2, "batch_size": 256, "lr": 0.8, "ratio": 0.9,
    "dual_lr": 0.1,
}  # fmt: skip
CIFAR = {
    **IMAGENET, "arch": "resnet18", "epochs": 400, "batch_size": 128, "lr": 0.2, "wd": 1e-4, "optimizer": "sgd",
    "ratio": 0.9, "dual_lr": 0.1, "image_size": 32, "resize": 32, "crop_area": 0.3, "blur": False,
}  # fmt: skip
SMALL = {
    **CIFAR, "arch": "lenet5", "k": [10, 20, 30, 40, 50], "lr": 0.05, "warm_up": 5, "projector_layers": 2,
    "temperature": 0.1, "label_share": 0.5, "colour": False, "small_area": [0.5, 0.9],
}  # fmt: skip
RECIPES = {
    "imagenet": IMAGENET,
    "imagenet-multi": {**IMAGENET, "epochs": 800},
    "photos": {**IMAGENET, **FEW},
    "cifar10": {**CIFAR, "k": list(range(10, 101, 10))},
    "cifar100-20": {**CIFAR, "k": list(range(20, 201, 20))},
    "fashionmnist": {**SMALL, "k": [10, 20, 50, 100], "epochs": 10, "crop_area": 0.6},
    "digits": {**SMALL, "epochs": 60, "crop_area": 0.8, "flip": False},
    "digits-1": {**SMALL, "epochs": 100, "crop_area": 0.8, "flip": False},
    "digits-multi": {**SMALL, "epochs": 30, "crop_area": 0.8, "flip": False},
}
RECIPES["mnist"] = {**RECIPES["fashionmnist"], "flip": False}
RECIPES["stl10"] = RECIPES["cifar10"]
RECIPES["svhn"] = {**RECIPES["cifar10"], "flip": False}


def options(argv=None):
    """The command line as a namespace; unknown or impossible values end with exit code 2."""
    p = Parser("CoKe, online constrained k-means (Qian et al. 2022)")
    # fmt: off
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=default_data(), help=f"{', '.join(DATASETS)}, or a folder of images: train/ and val/, one folder per class, or unlabelled")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--k", type=int, nargs="+", help="clusters of each head; for clustering results one of them should be the number of classes, the others more [code; supplementary 2.4]")
    g.add_argument("--epochs", type=int, help="passes over the data with training, --init-epochs not among them; the learning rate falls to 0 over them")
    g.add_argument("--batch-size", type=int, help="images per step, over all processes [supplementary 2.1]")
    g.add_argument("--lr", type=number, help="highest learning rate, after --warm-up; ImageNet: 0.8 with batch 256, 1.2 with 512 [supplementary 2.2.1]")
    g.add_argument("--wd", type=number, help="weight decay [supplementary 2.1], not of biases and batch norm")
    g.add_argument("--image-size", type=int, help="side of the square the network sees, in pixels")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode files, for each training process; not used for data in memory")
    g.add_argument("--seed", type=int, default=0, help="decides every random number")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast of the network, never of centres and losses; None: on for CUDA")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    g.add_argument("--out", help="run folder")
    g.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    g.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints; a signal saves at once")
    g.add_argument("--max-bad", type=int, default=100, help="unreadable image files to put up with")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take")
    g.add_argument("--resize", type=int, help="shorter side before the centre crop, in pixels [code]")
    g = p.add_argument_group("CoKe")
    g.add_argument("--views", choices=sorted(VIEWS), default="2", help="random crops of an image in each step: one; two [supplementary 2.2.3]; two and --small-crops [supplementary 2.1]")
    g.add_argument("--ratio", type=number, help="r in 0..1: every cluster holds at least about r N / K images; 1: exactly; 0: no constraint [3.1, code]")
    g.add_argument("--dual-lr", type=number, help="eta, step of the duals; if most labels change in every epoch, lower it; if clusters fall below their bound, raise it [3.1, code]")
    g.add_argument("--temperature", type=number, help="T; 0.1 for one view, 0.05 for more [code; supplementary 2.1]; ours for small data")
    g.add_argument("--label-share", type=number, help="a in 0..1: share of the last epoch's label in the target, against the other view's; not used with one view [supplementary 2.2.3]")
    g.add_argument("--predictor-share", type=number, default=0.5, help="b in 0..1: share of the predictor's loss against the projector's; 0: no predictor [supplementary 2.2.4]")
    g.add_argument("--small-crops", type=int, default=6, help="small crops of an image with --views multi [supplementary 2.1]")
    g.add_argument("--small-size", type=int, help="their side in pixels; 96 for images of 224 [supplementary 2.1]; networks other than ResNets take images of one size only")
    g.add_argument("--small-area", type=number, nargs=2, metavar=("LOW", "HIGH"), help="share of the image that they keep, 0..1 [code]")
    g.add_argument("--small-share", type=number, default=0.5, help="share of the small crops' loss against the large ones', 0..1 [code]")
    g.add_argument("--init-epochs", type=int, default=1, help="passes that cluster and do not train, before the first epoch [code]")
    g.add_argument("--first-stage", type=number, help="share of the epochs, 0..1, after which labels and centres are averaged; one view: 160 of 200 [supplementary 2.2.2]; 1: never")
    g.add_argument("--label-size", type=int, default=5, help="S, clusters in an averaged label at most [supplementary 2.2.2]")
    g.add_argument("--label-temperature", type=number, default=0.5, help="of the softmax over an averaged label's clusters [supplementary 2.2.2]")
    g.add_argument("--dim", type=int, default=128, help="D, numbers in an embedding [supplementary 2.1]")
    g.add_argument("--projector-layers", type=int, help="linear layers between network and embedding: 3; in the paper's ablations 2 [supplementary 2.1]")
    g.add_argument("--optimizer", choices=["lars", "sgd"], help="LARS or plain SGD [supplementary 2.1, 2.4]")
    g.add_argument("--momentum", type=number, default=0.9, help="of LARS [supplementary 2.1]; of SGD ours")
    g.add_argument("--warm-up", type=int, help="epochs in which the learning rate rises [supplementary 2.1]")
    g.add_argument("--head", type=int, metavar="K", help="clusters of the head that is written to assignments.csv and clusters.png; default: as many as classes, without labels the first")
    g.add_argument("--crop-area", type=number, help="smallest share of the image a large crop keeps, 0..1 [code; supplementary 2.4]")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the crops [supplementary 2.1]")
    g.add_argument("--colour", action=argparse.BooleanOptionalAction, help="colour jitter, a fifth of the crops grey, a fifth of the second view's solarised [code]")
    g.add_argument("--blur", action=argparse.BooleanOptionalAction, help="blur crops: all of the first view, a tenth of the second, half of a single view and of small ones [code]")
    # fmt: on
    # What the other defaults hang on is looked at first, so that --help shows the values that would run.
    peek = Parser(add_help=False)
    known = {"--data": default_data(), "--arch": None, "--recipe": None, "--views": "2", "--image-size": None}
    for flag, default in known.items():
        peek.add_argument(flag, default=default, type=int if flag == "--image-size" else str)
    first = peek.parse_known_args(argv)[0]
    base = first.data if first.data in RECIPES else "imagenet"
    recipe = first.recipe if first.recipe in RECIPES else base
    recipe = next(r for r in (f"{recipe}-{first.views}", recipe) if r in RECIPES)
    views = VIEWS.get(first.views, VIEWS["2"])
    size = first.image_size or RECIPES[recipe]["image_size"]
    out = f"runs/coke-{os.path.basename(os.path.normpath(first.data))}"
    out += f"-{first.views}" * (first.views != "2")
    p.set_defaults(out=out, **{**views, **RECIPES[recipe], "recipe": recipe})
    resnet = (first.arch or RECIPES[recipe]["arch"]).startswith("resnet")
    p.set_defaults(small_size=round(size * 96 / 224) if resnet else size)
    if size != RECIPES[recipe]["image_size"]:
        p.set_defaults(resize=default_resize(size))
    args = p.parse_args(argv)
    counts = ("epochs", "batch_size", "image_size", "save_every", "small_crops", "small_size", "label_size")
    counts += ("dim", "projector_layers")
    for name in (*counts, "workers", "max_bad", "init_epochs", "warm_up"):
        if getattr(args, name) < (name in counts):
            p.error(f"--{name.replace('_', '-')} must be at least {int(name in counts)}")
    for name in ("ratio", "label_share", "predictor_share", "small_share", "first_stage"):
        if not 0 <= getattr(args, name) <= 1:
            p.error(f"--{name.replace('_', '-')} must lie in 0..1")
    for name in ("temperature", "label_temperature"):
        if not 0 < getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must be above 0")
    if not (0 <= args.lr < math.inf and 0 <= args.wd < math.inf and 0 <= args.momentum < 1):
        p.error("--lr and --wd must be at least 0, --momentum in 0..1 (1 excluded)")
    if not 0 <= args.dual_lr < math.inf:
        p.error("--dual-lr must be at least 0")
    if min(args.k) < 1 or len(set(args.k)) < len(args.k):
        p.error("--k must be at least 1, and the heads' numbers must differ")
    if not (0 < args.crop_area <= 1 and 0 < args.small_area[0] <= args.small_area[1] <= 1):
        p.error("--crop-area and --small-area must lie in 0..1 (0 excluded), LOW not above HIGH")
    if args.head is not None and args.head not in args.k:
        p.error(f"--head {args.head} is not among --k {' '.join(map(str, args.k))}")
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2: batch norm compares images")
    if max(args.resize, args.dim) > 16384 or args.projector_layers > 16:
        p.error("--resize, --image-size and --dim must be at most 16384, --projector-layers at most 16")
    if args.resize < args.image_size:
        p.error(f"--resize {args.resize} is smaller than --image-size {args.image_size}")
    if args.views == "multi" and args.small_size != args.image_size and not args.arch.startswith("resnet"):
        p.error(
            f"--small-size {args.small_size}: {args.arch} takes images of --image-size alone; leave it out, or use a ResNet"
        )
    return args


# --------------------------------------------------------------------------- network


class Network(nn.Module):
    """Views of images -> unit projections x and unit predictions p, (V, B, D) float32 each [supplementary 2.2.4, Fig. 1]."""

    def __init__(self, trunk, dim, layers, predictor):
        """trunk: (B, C, S, S) -> (B, d), a ReLU may follow; layers: of the projector; predictor: is there one?"""
        super().__init__()
        d, parts = trunk.dim, [nn.ReLU()]
        for out in [d] * (layers - 1) + [dim]:
            parts += [nn.Linear(d, out), nn.BatchNorm1d(out), nn.ReLU(inplace=True)]
        projector = nn.Sequential(*parts[:-1])  # ends with batch norm, without ReLU
        self.encoder = nn.Sequential(trunk, projector)
        self.encoder.dim = dim
        self.predictor = None
        if predictor:
            hidden = [nn.Linear(dim, d), nn.BatchNorm1d(d), nn.ReLU(inplace=True)]
            self.predictor = nn.Sequential(*hidden, nn.Linear(d, dim))

    def forward(self, views):
        z = [self.encoder(images) for images in views]  # each with the batch norm of its own view
        p = [self.predictor(x) for x in z] if self.predictor else z
        # Where all images are alike, batch norm leaves next to nothing to stretch: without the floor its gradient,
        # 1 / length, explodes. The length of others is about the root of D.
        return tuple(F.normalize(torch.stack(y).float(), dim=-1, eps=0.01) for y in (z, p))


def make_net(args, channels):
    """(trunk, net) of the command line."""
    trunk = backbone(args.arch, channels, args.image_size, dropout=0.0, pool=True, norm=True)
    return trunk, Network(trunk, args.dim, args.projector_layers, args.predictor_share > 0)


def new_memory(ks, dim, images, slots, device, *key):
    """All that CoKe remembers beside the weights, {name: tensor}; the same on all processes, at every step.

    Heads with fewer clusters than the largest are padded: exists (H, K) tells which clusters there are.
    For ImageNet with one view (N = 1,281,167, H = 3, S = 5) labels and shares take 154 MB together.
    """
    h, k = len(ks), max(ks)
    centres = F.normalize(torch.randn(h, k, dim, generator=generator(*key)), dim=-1)
    exists = torch.arange(k) < torch.tensor(ks)[:, None]
    memory = {
        "exists": exists,  # (H, K) bool
        "previous": centres * exists[..., None],  # (H, K, D) centres of the last epoch, for the loss
        "centres": centres * exists[..., None],  # (H, K, D) and as they move
        "duals": torch.zeros(h, k),  # (H, K)
        "counts": torch.zeros(h, k),  # (H, K) images assigned in this epoch
        "labels": torch.zeros(images, h, slots, dtype=torch.int32),  # (N, H, S) clusters of each image ..
        "shares": torch.zeros(images, h, slots),  # (N, H, S) .. and its share in each; 0: empty
    }
    return {name: tensor.to(device) for name, tensor in memory.items()}


# --------------------------------------------------------------------------- the algorithm
# Heads stand side by side in one tensor, (H, K), padded to the largest; `exists` (H, K) tells where. Embeddings
# x, p (.., D) and centres (H, K, D) have unit length (but see step_centres).


def similarities(x, centres):
    """Cosine to every centre of every head: x (.., D), centres (H, K, D) -> (.., H, K)."""
    return (x @ centres.flatten(0, 1).T).unflatten(-1, centres.shape[:2])


def assign(x, centres, duals, exists):
    """The cluster of each image in each head, (B, H): argmax over k of x.c_k + rho_k [3.1, supplementary (1)]."""
    score = similarities(x, centres) + duals  # (B, H, K)
    return score.masked_fill(~exists, -math.inf).argmax(-1)


def step_duals(duals, members, exists, ratio, lr):
    """rho_k - lr (share of the batch in k - r / K), (H, K) [3.1].

    members (B, H, K): 1 where an image was assigned. A cluster below its share becomes the more attractive.
    r < 1: not below 0, as more than r / K is no fault. r = 1: equal sizes are wanted, no floor.
    """
    bound = ratio / exists.sum(-1, keepdim=True)  # (H, 1)
    duals = duals - lr * (members.mean(0) - bound)
    return (duals if ratio == 1 else duals.clamp(min=0)) * exists


def step_centres(centres, counts, members, x, normalise=True):
    """(centres (H, K, D), counts (H, K)) after a batch: c_k <- (n_old c_k + sum of its images) / n_k, n_k the images
    assigned to k since the counts were 0, then unit length if told so [3.1, code].

    The first batch of an epoch that hits a centre replaces it; a centre that is not hit stays. Without unit
    length it is the plain mean; with it, early batches weigh more, as their mean is stretched to 1. Sums are
    a product, not index_add: on a GPU the latter adds in any order, and processes would drift apart.
    """
    hits = members.sum(0)  # (H, K)
    sums = (members.flatten(1).T @ x).view_as(centres)  # (H, K, D)
    total = counts + hits
    mean = (counts[..., None] * centres + sums) / total.clamp(min=1)[..., None]
    mean = F.normalize(mean, dim=-1) if normalise else mean
    return torch.where(hits[..., None] > 0, mean, centres), total


def average_centres(previous, centres, weight):
    """An epoch's end: C_prev <- unit((1 - w) C_prev + w unit(C_now)) [3.2.2]; first stage: w = 1."""
    return F.normalize((1 - weight) * previous + weight * F.normalize(centres, dim=-1), dim=-1)


def average_labels(labels, shares, found, weight):
    """Labels (B, H, S) and their shares after the clusters found (B, H) came in with weight w [3.2.2].

    shares <- (1 - w) shares, that of the found cluster + w. If it is not among the S of an image, it takes
    the place of the smallest, and the others are scaled to 1 - w. Shares sum to 1; w = 1 (first stage, and
    images without a label) leaves the found cluster alone.
    """
    hit = (labels == found[..., None]) & (shares > 0)
    least = F.one_hot(shares.argmin(-1), shares.shape[-1]).bool()
    slot = torch.where(hit.any(-1, keepdim=True), hit, least)  # (B, H, S) where the found cluster goes
    kept = shares * (hit | ~slot)  # all but what an evicted cluster had
    kept = kept / kept.sum(-1, keepdim=True).clamp(min=1e-12)
    shares = (1 - weight) * kept + weight * slot
    return torch.where(slot, found[..., None], labels), shares / shares.sum(-1, keepdim=True)


def soft_targets(shares, temperature):
    """How much the target of an image is of each cluster of its label, (B, H, S): softmax of the shares / lambda'
    over those that are not 0 [supplementary 2.2.2]. One cluster alone gives 1."""
    weight = ((shares - shares.amax(-1, keepdim=True)) / temperature).exp() * (shares > 0)
    return weight / weight.sum(-1, keepdim=True)


def other_views(log_q):
    """Where the other views of an image are, (V, B, H, K) without gradient, from log probabilities (V, B, H, K).

    The first two are each other's target; those after them, small crops, have the mean of both [supplementary 2.2.3, code].
    """
    q = log_q[:2].detach().exp()
    small = q.mean(0, keepdim=True).expand(len(log_q) - 2, *q.shape[1:])
    return torch.cat([q.flip(0), small])


def coke_loss(x, p, centres, exists, labels, weight, temperature, label_share):
    """Cross-entropy of projections x and of predictions p (V, B, D) against the same targets, (V,) each [3.3].

    centres (H, K, D) and labels (B, H, S) are of the last epoch, weight (B, H, S) from soft_targets. One view:
    the label is the target. More: a label + (1 - a) other views [supplementary 2.2.3]. Mean over images and heads.
    """
    assert labels.shape == weight.shape and labels.shape[:2] == (x.shape[1], len(centres)), labels.shape

    def log_softmax(y):  # (V, B, D) -> (V, B, H, K); -1e4, for a target of 0 times -inf would be NaN
        return (similarities(y, centres) / temperature).masked_fill(~exists, -1e4).log_softmax(-1)

    log_x, losses = log_softmax(x), []
    q = other_views(log_x) if len(x) > 1 else None
    for log_p in (log_x, log_softmax(p)):
        loss = -(weight * log_p.gather(-1, labels.expand(len(x), *labels.shape))).sum(-1)  # (V, B, H)
        if q is not None:
            loss = label_share * loss - (1 - label_share) * (q * log_p).sum(-1)
        losses.append(loss.mean((1, 2)))
    return tuple(losses)


def learning_rate(lr, step, steps, warm_up):
    """lr at a step 0, 1, .. of all `steps`: rising in a line for warm_up steps, then a cosine to 0 [code]."""
    if step < warm_up:
        return lr * max(1, step) / warm_up
    return lr * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))) / 2


@torch.no_grad()
def lars(weights, wd, trust=0.001):
    """Make the gradients those whose SGD with momentum is LARS, in place [supplementary 2.1; after You et al. 2017].

    Tensors with two dimensions or more: g <- g + wd w, then g <- g trust ||w|| / ||g||, if neither is 0.
    The others, biases and batch norm's, keep their gradient: no decay, no scaling.
    """
    for w in weights:
        if w.ndim > 1 and w.grad is not None:
            g = w.grad + wd * w
            length, size = g.norm(), w.norm()
            w.grad = g * torch.where((length > 0) & (size > 0), trust * size / length, 1.0)


# --------------------------------------------------------------------------- one epoch


class Phase(NamedTuple):
    """What an epoch is to the method."""

    learn: bool  # or cluster only
    averaging: bool  # the second stage
    weight: float  # w: of this epoch's labels and centres in the averages
    done: int  # training steps before it


def phase(epoch, steps, args):
    """The Phase of epoch 0, 1, .., those of --init-epochs among them, of `steps` steps each."""
    trained, learn = max(0, epoch - args.init_epochs), epoch >= args.init_epochs
    late = trained - round(args.first_stage * args.epochs)
    return Phase(learn, learn and late >= 0, 1 / (max(0, late) + 1), trained * steps)


def make_views(args):
    """How the crops of an image are drawn [code; crop area: supplementary 2.4]."""
    strong, weak = ((0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)) if args.colour else [(0, 0, 0, 0)] * 2
    view = View((args.crop_area, 1.0), flip=0.5 * args.flip, grey=0.2 * args.colour, jitter_p=0.8)
    single = replace(view, jitter=strong, blur=0.5 * args.blur)
    if args.views == "1":
        return [single]
    first = replace(view, jitter=weak, blur=1.0 * args.blur)
    second = replace(view, jitter=weak, blur=0.1 * args.blur, solarise=0.2 * args.colour)
    # small crops are coloured and blurred as a single view is
    small = replace(single, area=tuple(args.small_area), size=args.small_size)
    return [first, second] + [small] * args.small_crops * (args.views == "multi")


@torch.no_grad()
def cluster(memory, index, x, now, args):
    """CoKe's step for the images `index` (B,) with embeddings x (B, D) of all processes; memory moves on.

    -> labels, shares (B, H, S) of the epoch before, of new images those just found; share of labels that changed
    """
    centres = memory["previous" if now.averaging else "centres"]
    found = assign(x, centres, memory["duals"], memory["exists"])  # (B, H)
    members = F.one_hot(found, centres.shape[1]).to(x.dtype)  # (B, H, K)
    memory["duals"] = step_duals(memory["duals"], members, memory["exists"], args.ratio, args.dual_lr)
    memory["centres"], memory["counts"] = step_centres(
        memory["centres"], memory["counts"], members, x, normalise=not now.averaging
    )
    labels, shares = memory["labels"][index].long(), memory["shares"][index]  # (B, H, S)
    after = average_labels(labels, shares, found, now.weight)
    memory["labels"][index], memory["shares"][index] = after[0].int(), after[1]
    new = shares.sum(-1, keepdim=True) == 0
    changed = (labels.gather(-1, shares.argmax(-1, keepdim=True)) != found[..., None]) | new
    return torch.where(new, after[0], labels), torch.where(new, after[1], shares), changed.float().mean()


def train(net, optimizer, loader, memory, epoch, start, steps, sums, now, args):
    """Steps start .. of an epoch, with or without learning as its Phase `now` says.

    -> (next step, sums over the steps of the loss, projections' loss, predictions' loss and the share of
    labels that changed, signal or 0)
    """
    batches = enumerate(loader.epoch(epoch, make_views(args), start=start), start)
    own, last = slice(*shard(args.batch_size)), args.epochs * steps
    net.train()
    for step, (index, views) in progress(batches, steps - start, f"epoch {epoch - args.init_epochs + 1}"):
        index = index.to(loader.device, non_blocking=True)
        with torch.set_grad_enabled(now.learn):
            with torch.autocast(loader.device.type, torch.bfloat16, enabled=args.amp):
                x, p = net(views)  # (V, b, D) float32, unit length
            # One way, without gradient: all processes' images into clusters; what was known of them comes back.
            everyone, features = gather(index, equal=True), gather(x[:2].mean(0), equal=True)  # (B,), (B, D)
            labels, shares, changed = cluster(memory, everyone, features, now, args)
            target = labels[own], soft_targets(shares[own], args.label_temperature)  # (b, H, S) each
            # The other: this process's images against the last epoch's labels and centres.
            heads = memory["previous"], memory["exists"]
            loss_x, loss_p = coke_loss(x, p, *heads, *target, args.temperature, args.label_share)
            per_view = (1 - args.predictor_share) * loss_x + args.predictor_share * loss_p  # (V,)
            loss = per_view[:2].mean()
            if len(per_view) > 2:
                loss = (1 - args.small_share) * loss + args.small_share * per_view[2:].mean()
        optimizer.zero_grad()
        if now.learn:
            loss.backward()
        *means, signal = heartbeat(loss, loss_x[:2].mean(), loss_p[:2].mean(), changed)
        if now.learn:
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(args.lr, now.done + step, last, args.warm_up * steps)
            if args.optimizer == "lars":
                lars((w for group in optimizer.param_groups for w in group["params"]), args.wd)
            optimizer.step()
        sums = [a + b for a, b in zip(sums, means, strict=True)]
        if signal:
            return step + 1, overdue(sums), signal
    return steps, overdue(sums), 0


def end_epoch(memory, now):
    """The memory for the next epoch: the centres become those of the loss, alone or averaged; counts are 0."""
    centres = average_centres(memory["previous"], memory["centres"], now.weight)
    counts = torch.zeros_like(memory["counts"])
    return {**memory, "previous": centres, "centres": centres.clone(), "counts": counts}


def stored(memory):
    """The cluster that each image is most in, (N, H) on the CPU; -1 for images that were not seen yet."""
    labels, shares = memory["labels"], memory["shares"]
    top = labels.gather(-1, shares.argmax(-1, keepdim=True))[..., 0]
    return top.masked_fill(shares.sum(-1) == 0, -1).long().cpu()


# --------------------------------------------------------------------------- main


def embed(net, loader, args):
    """Unit projections (n, D) of the centre crops of this process's images, in evaluation mode."""
    return extract(net.encoder, loader, torch.arange(*shard(len(loader.data))), args.amp, then=unit)


def predict(net, loader, memory, args):
    """Clusters (N, H) of all images by the nearest centre of centre crops, no duals; and their cosine to it."""
    z, h = embed(net, loader, args), len(memory["exists"])
    score, found = z.new_zeros(len(z), h), torch.zeros(len(z), h, dtype=torch.int64, device=z.device)
    for part in torch.arange(len(z), device=z.device).split(4096):
        near = similarities(z[part], memory["previous"]).masked_fill(~memory["exists"], -math.inf)
        score[part], found[part] = near.max(-1)
    return gather(found).cpu(), gather(score).cpu()


def untrained_scores(trunk, loader, judge, args):
    """Scores of k-means, K = number of classes, on the untrained network's features, its batch norm filled.

    Centroids are those of the training images, scored are the images of `judge`.
    """
    trunk, some = copy.deepcopy(trunk), torch.arange(min(256, len(loader.data)))
    fill_batch_norm(trunk, next(loader.fixed(some, batch_size=256))[1][:, 0])
    own = [
        extract(trunk, images, torch.arange(*shard(len(images.data))), args.amp) for images in (loader, judge)
    ]
    k = min(len(loader.data), len(loader.data.classes))
    with finite_or_leave():
        centroids = kmeans(own[0], k, gen=generator(args.seed, "untrained")).centroids
    return label_scores(judge.data.labels, gather(nearest(own[1], centroids)[1][:, 0]).cpu())


def check(args, data):
    """Refuse, or say, what can only be judged with the data at hand."""
    n, classes = len(data), len(data.classes)
    enough = [k for k in dict.fromkeys([classes, *(max(1, n // m) for m in (200, 100, 50))]) if 0 < k <= n]
    if max(args.k) > n:
        refuse(
            f"--k {max(args.k)} (of recipe {args.recipe}, if not given) is more than the {n} images of {args.data};"
            f" give --k, such as {' '.join(map(str, enough))}"
        )
    if args.batch_size > n:
        refuse(
            f"--batch-size {args.batch_size} is more than the {n} images of {args.data}; a smaller one wants a"
            f" smaller --lr than {args.lr:g}, too"
        )
    if data.labels is not None and classes not in args.k:
        say(
            f"WARNING: {args.data} has {classes} classes and no head has as many clusters (--k): no accuracy (ACC)"
        )
    if args.head is None:
        args.head = classes if data.labels is not None and classes in args.k else args.k[0]
    if args.warm_up >= args.epochs > 0:
        say(
            f"WARNING: --warm-up {args.warm_up} leaves none of {args.epochs} epochs at the full learning rate"
        )
    if args.dual_lr * args.ratio / min(args.k) > 0.1:
        say(
            f"WARNING: --dual-lr {args.dual_lr:g} is large for {min(args.k)} clusters: a batch moves duals by"
            f" {args.dual_lr * args.ratio / min(args.k):.2g}, and similarities lie in -1..1; try"
            f" {0.01 * min(args.k):g}"
        )
    warn_if_few(n, max(args.k))


def main():
    args = options()
    device = setup(args.device)
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    data, test = load_data(args.data, args.root, device)
    labels = "labels for reporting only" if data.labels is not None else "no labels"
    say(f"data: {args.data}, {len(data)} images of {data.channels} channels, {labels}; recipe {args.recipe}")
    check(args, data)
    rest = (args.image_size, args.resize, device, args.workers, args.seed, args.max_bad)
    loader = Loader(data, args.batch_size, *rest)
    # The images that show what was learnt: the test set, if it has labels.
    judge = None if data.labels is None else loader
    if judge and test is not None and test.labels is not None:
        judge = Loader(test, args.batch_size, *rest)
    seed_all(args.seed, "weights")
    trunk, net = make_net(args, data.channels)
    to_device(net, device)
    wide = [w for w in net.parameters() if w.ndim > 1]
    flat = [w for w in net.parameters() if w.ndim <= 1]  # biases and batch norm: no decay
    groups = [{"params": wide, "weight_decay": args.wd * (args.optimizer == "sgd")}, {"params": flat}]
    optimizer = torch.optim.SGD(groups, args.lr, args.momentum, fused=True)
    run = Run(args, data)
    slots = args.label_size if args.first_stage < 1 else 1
    memory = new_memory(args.k, args.dim, len(data), slots, device, args.seed, "centres")
    epoch, step, sums, before, untrained = 0, 0, [0.0] * 4, None, None
    if run.state:
        state = run.state
        with run.restoring():
            epoch, step, sums, before = (state[k] for k in ("epoch", "step", "sums", "before"))
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            memory = {k: shaped(state["memory"][k], *own.shape).to(device) for k, own in memory.items()}
            untrained, finished = state["untrained"], state["finished"]
        if finished:
            say(f"{args.out} is finished after {args.epochs} epochs; its last lines: {args.out}/log.jsonl")
            leave()
        run.state = state = None  # its copy of the memory
        say(f"going on from epoch {epoch - args.init_epochs + 1}, step {step} of {args.out}")
        run.log({"resumed": True, "epoch": epoch, "step": step})
    else:
        run.first_record(args, device, data)
        if judge:
            say("clustering the features of the untrained network, to compare with")
            untrained = untrained_scores(trunk, loader, judge, args)

    net = synchronise(net)
    trained = parallel(net, args.compile)

    def save(finished=False):
        """Everything there is to the method's state, and the network on its own."""
        run.save(
            {
                "epoch": epoch,  # epochs done, those of --init-epochs among them ..
                "step": step,  # .. and steps of the one after
                "sums": sums,  # over those steps: loss, projections' and predictions' loss, changed labels
                "before": before,  # (N,) labels of the chosen head at the epoch's start
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "memory": memory,  # centres, duals, counts, labels: see new_memory
                "untrained": untrained,
                "finished": finished,
            }
        )
        about = (args.arch, args.image_size, args.resize, False, data, f"coke-{args.views}")
        run.unsaved |= save_backbone(run.out / "backbone.pt", trunk, *about) is False

    before_leaving(save)
    steps, head = loader.steps(), args.k.index(args.head)
    while epoch < args.init_epochs + args.epochs:
        began, first, now = time.time(), step, phase(epoch, steps, args)
        before = stored(memory)[:, head] if step == 0 else before
        step, sums, signal = train(trained, optimizer, loader, memory, epoch, step, steps, sums, now, args)
        if signal:
            stop(signal, save, f"step {step} of epoch {epoch - args.init_epochs + 1}")
        seconds = {"training": time.time() - began}
        record = {"epoch": epoch - args.init_epochs + 1, "phase": title(now)}
        record |= {"lr": optimizer.param_groups[0]["lr"] if now.learn else 0.0}
        names = ("loss", "loss_projection", "loss_prediction", "changed")
        record |= {name: x / steps for name, x in zip(names, sums, strict=True)}
        record["chance"] = sum(map(math.log, args.k)) / len(args.k)  # the loss if all similarities were equal
        record |= describe(memory, before, data, head, args)
        after = end_epoch(memory, now)  # memory stays as it is until nothing can interrupt any more
        if judge and judge is not loader:
            found, _ = predict(net, judge, after, args)
            record["test"] = scores(judge.data, found[:, head], args.head)
        seconds["scoring"] = time.time() - began - seconds["training"]
        rate = (steps - first) * args.batch_size / max(1e-9, seconds["training"])
        record |= {"images_per_second": rate, "seconds": seconds, "bad_files": len(loader.bad)}
        epoch, step, sums, memory = epoch + 1, 0, [0.0] * 4, after
        run.log(record)
        report(record, args)
        if epoch % args.save_every == 0 or epoch == args.init_epochs + args.epochs:
            save()
    finish(run, net, loader, judge, memory, untrained, args)
    save(finished=True)
    run.finish()


def finish(run, net, loader, judge, memory, untrained, args):
    """Cluster centre crops by the last centres, score every head, write what the run leaves behind."""
    data, (found, score) = loader.data, predict(net, loader, memory, args)
    tested = predict(net, judge, memory, args)[0] if judge and judge is not loader else None
    heads = []
    for h, k in enumerate(args.k):
        heads.append({"k": k, "train": {**cluster_sizes(found[:, h], k), **scores(data, found[:, h], k)}})
        if tested is not None:
            heads[h]["test"] = scores(judge.data, tested[:, h], k)
    head = args.k.index(args.head)
    if args.head > 1:
        warn_if_trivial(heads[head]["train"])
    run.log({"result": {"head": args.head, "heads": heads, "untrained": untrained}, "minutes": run.minutes()})
    save_assignments(run.out / "assignments.csv", data, found[:, head])
    save_pictures(run.out / "clusters.png", loader, found[:, head], 1 - score[:, head])
    if judge:
        split = "train" if judge is loader else "test"
        say(f"{len(judge.data)} {split} images in {args.head} clusters: {percent(heads[head][split])}; "
            f"k-means on the untrained network: {percent(untrained)}")  # fmt: skip
    say(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")
    labelled = "" if data.labels is not None else " --data LABELLED"
    protocol = " --protocol coke" if args.image_size > 64 else ""  # made for ImageNet
    say(f"evaluate the features: python eval_linear.py {run.out}{labelled}{protocol}")


def scores(data, found, k):
    """NMI, ARI and, for as many clusters as classes, accuracy of clusters (N,); -1: not clustered yet."""
    if data.labels is None:
        return {}
    known = found >= 0
    result = label_scores(data.labels[known], found[known])
    return {name: x for name, x in result.items() if name != "acc_labels" or k == len(data.classes)}


def describe(memory, before, data, head, args):
    """Sizes in this epoch and scores of all heads' labels; of the chosen head its NMI to the epoch before, too."""
    labels, counts = stored(memory), memory["counts"].cpu()
    heads = []
    for h, k in enumerate(args.k):
        sizes = counts[h, :k]
        heads.append({"k": k, "smallest": int(sizes.min()), "largest": int(sizes.max())})
        heads[h] |= {"bound": args.ratio * int(sizes.sum()) / k, **scores(data, labels[:, h], k)}
    seen = (labels[:, head] >= 0) & (before >= 0)
    previous = nmi(before[seen], labels[seen, head]) if seen.any() else None
    chosen = {name: x for name, x in heads[head].items() if name.endswith("_labels")}
    return {"nmi_previous": previous, **chosen, "heads": heads}


def title(now):
    """The name of an epoch's phase."""
    return "clustering" if not now.learn else "averaging" if now.averaging else "training"


def report(record, args):
    """One readable line per epoch."""
    parts = [f"epoch {record['epoch']:3d}/{args.epochs}  {record['phase']} loss {record['loss']:.3f}"]
    parts[0] += f" (chance {record['chance']:.2f})"
    parts.append(f"{record['changed']:.0%} changed")
    head = record["heads"][args.k.index(args.head)]
    parts.append(f"K={args.head}: {head['smallest']}-{head['largest']} images, bound {head['bound']:.0f}")
    if record["nmi_previous"] is not None:
        parts.append(f"NMI to previous {record['nmi_previous']:.3f}")
    parts += [
        f"{part} {percent(found)}"
        for part, found in (("train", record), ("test", record.get("test")))
        if found and "nmi_labels" in found
    ]
    seconds = " + ".join(f"{s:.1f}" for s in record["seconds"].values())
    say("  ".join(parts), f" {record['images_per_second']:.0f} img/s  {seconds} s")


if __name__ == "__main__":
    main()
