"""LSD-C: images that lie close together should be classified alike, seen whole or as parts of a mixture.

Rebuffi, Ehrhardt, Han, Vedaldi & Zisserman, LSD-C: Linearly Separable Deep Clusters, 2020.

    RotNet:      a network learns by which of four angles an image was turned; then its first stages are frozen
    each batch:  z = relu(net(x)),  p = softmax(classifier(z))      (B, D), (B, K)   x: random crops
                 S = z_i and z_j are close                          (B, B)  0 or 1: nearest neighbours, cosine or SNE
                 x1, x2 = two mixtures of other crops               of the same images in the same shares W_m
                 T[r, c] = sum over m of W_m S[pi_m(r), c]          (B, B)  image pi_m(r) is part m of mixture r
                 P[r, c] = p1_r . p_c                               (B, B)  are they in the same cluster?
                 loss = mean of -[T log P + (1 - T) log(1 - P)] + w(t) mean of (p1 - p2)^2

Symbols: N images, B batch (--batch-size, over all processes), D feature size, K clusters (--k), M parts of a mixture
(4 in RICAP, 2 in MixUp), w(t) --consistency times the ramp of --ramp-up epochs.

    python lsdc.py                                              laptop: digits, no download, no GPU
    python lsdc.py --data fashionmnist                          with RotNet; --labeling sne or cosine: another S
    python lsdc.py --data my/photos --k 10                      unlabelled photographs
    python lsdc.py --data reuters.npz --k 4                     vectors; README tells how to make the file
    torchrun --nproc_per_node=8 lsdc.py --data cifar10          the paper's Table 1

What to expect: on digits, 50 s on 2 cores, ACC 93.3, NMI 90.8, ARI 87.1 % of the test images (mean of seeds 89.7, 95.8,
94.4 ACC); k-means on the untrained network: ACC 60.1, NMI 58.2, ARI 42.4.
MNIST, all images, seed 0: 97.7, 93.8, 94.9; --labeling sne 96.2, 91.0, 91.7; cosine 88.9, 77.7, 76.5; k-means after RotNet
72.9, 69.3, 61.3. Fashion-MNIST, test: 61.6, 59.9, 46.5 (62.1, 59.8, 62.8 ACC); k-means after RotNet 49.5, 55.3, 37.1.
A line's "chance" is the loss if all pairs were alike; mixtures keep even a perfect network's well above 0. "similar" is
the share of pairs that S calls similar (with kNN here 5 %), "of one class" how many of them are: it starts at 40 to 60 %
and rises with accuracy; cosine labels may run away to ever more pairs. Nothing keeps clusters equal in size. Which
images end up together is decided in the first tenth of the epochs, and rounding is enough to change it: seeds differ
by ten points, and numbers of threads do.

Departs from the paper and the authors' code, on purpose:
 1. RICAP: T[r, c] belongs to mixture r and image c, as the paper says; the code has S[r, pi(c)], its transpose.
 2. --neighbours counts others. The code's strict comparison leaves of its k the image itself and k - 2 others:
    18, 8, 8 and 3 in the recipes of CIFAR-10, CIFAR-100-20, MNIST and Reuters. Every image is similar to itself.
 3. Pairs, mixtures and batch norm are those of the whole batch of all processes, with gradients to all of them; the
    result does not depend on their number (the paper: one GPU).
 4. --train-on both is the paper's way and its recipes' default: training and test images together, without labels,
    in RotNet, too. Recipes of ours learn from training images alone. Scores of both parts are always given.
 5. MNIST's RotNet has 3 epochs; the paper's 200 on all data are for a GPU.
 6. Networks: LeNet-5 for MNIST, and 500-500-2000 for Reuters, with batch norm, are ours (not printed), so is the hidden
    layer of --classifier-layers 2, as wide as the features. LeNet-5's features are taken after a ReLU. The 3x3 stem
    goes up to 96 pixels (STL-10's is not printed), above it is torchvision's. Where a side is odd, average
    pooling takes what is left. Convolutions start as DeepCluster's.
 7. Vectors have no crops: an image's three views are equal, and the consistency term is 0. What the 25 and 100 of
    the table's Reuters row acted upon is not printed.
 8. 1 - P is kept at 0 or above where rounding would bring it below. An epoch's last incomplete batch is dropped.
 9. On CUDA, networks run in bf16 autocast (--no-amp); features are compared, and losses computed, in float32.
10. What the table leaves open for STL-10, MNIST and Reuters is ours, and so are digits, fashionmnist, svhn, photos.
    digits has no RotNet. Crops of data in memory are bilinear without antialiasing.
11. --backbone keeps the mean and deviation that its images were normalised by.
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import replace
from typing import NamedTuple

from legacy import (
    ARCHS,
    DATASETS,
    Images,
    Loader,
    Parser,
    Run,
    View,
    agree,
    before_leaving,
    cluster_sizes,
    default_data,
    default_resize,
    extract,
    fill_batch_norm,
    finite_or_leave,
    gather,
    gather_with_gradient,
    generator,
    heartbeat,
    kmeans,
    label_scores,
    learning_rate,
    leave,
    load_backbone,
    load_data,
    main_process,
    matched,
    nearest,
    nmi,
    number,
    overdue,
    parallel,
    percent,
    progress,
    rebuild,
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
    though_the_disk_be_full,
    to_device,
    warn_if_trivial,
)

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

# --------------------------------------------------------------------------- recipes and options
# Data set -> hyper-parameters. cifar10, cifar100-20, stl10, mnist, reuters: supplementary, table 1, and the code. The
# others are ours, and what the table leaves open, marked below, too. Flags override.

PAPER = {
    "arch": "resnet18", "k": 10, "epochs": 220, "batch_size": 256, "lr": 0.1, "wd": 5e-4, "optimizer": "sgd",
    "lr_steps": [140, 180], "consistency": 5.0, "ramp_up": 100, "labeling": "knn", "neighbours": 18,
    "cosine_threshold": 0.9, "sne_threshold": 0.01, "sne_temperature": 1.0, "mix": "ricap", "freeze_stages": 3,
    "image_size": 32, "resize": 32, "pad": 4, "crop_area": 1.0, "flip": True, "train_on": "both",
    "pretrain": "rotnet", "pretrain_epochs": 200, "pretrain_lr": 0.1, "pretrain_lr_steps": [60, 120, 160],
    "score_every": 1,
}  # fmt: skip
SMALL = {
    **PAPER, "arch": "lenet5", "freeze_stages": 1, "neighbours": 10, "mix": "mixup", "wd": 1e-4, "flip": False, "pad": 2,
    "cosine_threshold": 0.8,
}  # fmt: skip
RECIPES = {
    "cifar10": PAPER,
    "cifar100-20": {
        **PAPER, "k": 20, "epochs": 200, "lr_steps": [170], "consistency": 25.0, "ramp_up": 150, "neighbours": 8,
        "cosine_threshold": 0.95, "sne_temperature": 0.5,
    },
    "stl10": {
        # ours: cosine, neighbours; 12 pixels are the code's
        **PAPER, "epochs": 200, "ramp_up": 50, "labeling": "sne", "sne_temperature": 0.5, "image_size": 96,
        "resize": 96, "pad": 12,
    },
    "mnist": {
        # ours: network, crops, MixUp, frozen stages, cosine, SNE; 3 epochs of RotNet instead of 200
        **SMALL, "epochs": 15, "lr_steps": [], "ramp_up": 50, "neighbours": 8, "image_size": 28, "resize": 28,
        "pretrain_epochs": 3, "pretrain_lr_steps": [1, 2],
    },
    "reuters": {
        # ours: network, cosine, SNE, weight decay
        **PAPER, "arch": "mlp", "k": 4, "epochs": 75, "lr": 1e-3, "wd": 0.0, "optimizer": "adam", "lr_steps": [],
        "consistency": 25.0, "neighbours": 3, "mix": "none", "freeze_stages": 0, "pad": 0, "flip": False,
        "train_on": "train", "pretrain": "none",
    },
    "fashionmnist": {
        **SMALL, "epochs": 12, "lr_steps": [7, 10], "ramp_up": 10, "image_size": 28, "resize": 28, "flip": True,
        "train_on": "train", "pretrain_epochs": 3, "pretrain_lr_steps": [1, 2],
    },
    "digits": {
        **SMALL, "epochs": 100, "lr_steps": [75, 90], "ramp_up": 50, "freeze_stages": 0,
        "sne_temperature": 2.0, "train_on": "train", "pretrain": "none", "pretrain_epochs": 5, "pretrain_lr_steps": [3, 4], "score_every": 10,
    },
    "photos": {
        **PAPER, "lr": 0.02, "pretrain_lr": 0.02, "epochs": 40, "lr_steps": [25, 33], "ramp_up": 20, "batch_size": 128, "neighbours": 8,
        "image_size": 128, "resize": 146, "pad": 0, "crop_area": 0.3, "train_on": "train", "pretrain_epochs": 20,
        "pretrain_lr_steps": [6, 12, 16],
    },
}  # fmt: skip
RECIPES["svhn"] = {**PAPER, "flip": False}
CONFIDENT = 0.9  # a prediction above this probability [supplementary 2]


def options(argv=None):
    """The command line as a namespace; unknown or impossible values end with exit code 2."""
    p = Parser("LSD-C, linearly separable deep clusters (Rebuffi et al. 2020)")
    # fmt: off
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=default_data(), help=f"{', '.join(DATASETS)}, or a folder of images: train/ and val/, one folder per class, or unlabelled; or FILE.npz: features (N, D) float32 and, if there are any, labels (N,)")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--arch", choices=[*ARCHS, "mlp"], help="network; mlp for vectors")
    g.add_argument("--k", type=int, help="clusters; the paper's: as many as classes")
    g.add_argument("--epochs", type=int, help="passes over the data in clustering, after --pretrain-epochs [supplementary, table 1]")
    g.add_argument("--batch-size", type=int, help="images per step, over all processes, in clustering: their pairs are what is learnt from [supplementary 1, table 5]")
    g.add_argument("--lr", type=number, help="learning rate of clustering [supplementary, table 1]")
    g.add_argument("--wd", type=number, help="weight decay of clustering; 1e-4 with --mix mixup [supplementary 1]")
    g.add_argument("--image-size", type=int, help="side of the square the network sees, in pixels")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode files, for each training process; not used for data in memory")
    g.add_argument("--seed", type=int, default=0, help="decides every random number")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast of the network, never of pairs and losses; None: on for CUDA")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    g.add_argument("--out", help="run folder")
    g.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    g.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints; a signal saves at once")
    g.add_argument("--max-bad", type=int, default=100, help="unreadable image files to put up with")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take")
    g.add_argument("--resize", type=int, help="shorter side before the centre crop, in pixels")
    g = p.add_argument_group("LSD-C")
    g.add_argument("--labeling", choices=["knn", "cosine", "sne"], help="which pairs count as similar [paper]")
    g.add_argument("--neighbours", type=int, help="knn: nearest others of an image that are similar to it; a third to two thirds of the images that a cluster has in a batch [supplementary, table 1, less two: see Departs]")
    g.add_argument("--cosine-threshold", type=number, help="cosine: pairs of at least this cosine are similar, -1..1; raise it if ever more pairs are, in steps of 0.05 [supplementary, table 1]")
    g.add_argument("--sne-threshold", type=number, help="sne: pairs above this probability are similar, 0..1 [supplementary, table 1]")
    g.add_argument("--sne-temperature", type=number, help="sne: distances are divided by it; smaller: only the nearest count; changes the share of similar pairs more than the threshold [supplementary, table 1]")
    g.add_argument("--mix", choices=["ricap", "mixup", "none"], help="mixtures: four patches; two images laid over each other; none: single crops [supplementary 1]")
    g.add_argument("--consistency", type=number, help="lambda, highest weight of the squared difference of two mixtures' predictions; 0: without [supplementary, tables 1, 2]")
    g.add_argument("--ramp-up", type=int, help="T, epochs over which that weight rises; 0: at once [supplementary, table 1]")
    g.add_argument("--classifier-layers", type=int, choices=[1, 2], default=1, help="linear layers from features to clusters [supplementary, table 2]")
    g.add_argument("--freeze-stages", type=int, help="stages of the network that clustering leaves as they are: of a ResNet's 4, of other networks' convolutions [supplementary, table 3]")
    g.add_argument("--freeze-bn", action=argparse.BooleanOptionalAction, default=False, help="leave their batch-norm statistics, too, instead of letting them follow the data [code: follow]")
    g.add_argument("--optimizer", choices=["sgd", "adam"], help="of clustering [supplementary, table 1]")
    g.add_argument("--momentum", type=number, default=0.9, help="of SGD [code]")
    g.add_argument("--lr-steps", type=int, nargs="*", help="epochs of clustering after which the learning rate is divided by ten [supplementary, table 1]")
    g.add_argument("--train-on", choices=["train", "both"], help="images to learn from; both: those of the test set, too, as the paper; their labels are never used")
    g.add_argument("--pad", type=int, help="pixels of black around an image before a random crop of --image-size [code]; 0: resized crops instead")
    g.add_argument("--crop-area", type=number, help="smallest share of the image a resized crop keeps, 0..1")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the crops [code]")
    g.add_argument("--score-every", type=int, help="epochs between clusterings of all images for the log")
    g = p.add_argument_group("RotNet")
    g.add_argument("--pretrain", choices=["rotnet", "none"], help="what comes before clustering [supplementary 1, table 4]")
    g.add_argument("--backbone", metavar="FILE", help="start from this backbone.pt, rotnet.pt or run folder instead, whatever --pretrain says")
    g.add_argument("--pretrain-epochs", type=int, help="passes over the data, each image in all four turns, with --pretrain rotnet [supplementary 1]")
    g.add_argument("--pretrain-lr", type=number, help="learning rate [supplementary 1]")
    g.add_argument("--pretrain-lr-steps", type=int, nargs="*", help="epochs after which it is divided by five [supplementary 1]")
    g.add_argument("--pretrain-batch-size", type=int, default=128, help="images per step, each in four turns [RotNet, code]")
    g.add_argument("--pretrain-wd", type=number, default=5e-4, help="weight decay [RotNet, code]")
    # fmt: on
    # What the other defaults hang on is looked at first, so that --help shows the values that would run.
    peek = Parser(add_help=False)
    known = ("--data", "--recipe", "--arch", "--mix", "--labeling", "--optimizer")
    for flag in (*known, "--image-size"):
        peek.add_argument(flag, type=str if flag in known else int)
    first = peek.parse_known_args(argv)[0]
    data = first.data or default_data()
    base = data if data in RECIPES else "reuters" if data.endswith(".npz") else "photos"
    recipe = first.recipe if first.recipe in RECIPES else base
    size = first.image_size or RECIPES[recipe]["image_size"]
    p.set_defaults(**{**RECIPES[recipe], "recipe": recipe})
    p.set_defaults(out=default_out(data, first.labeling, RECIPES[recipe]["labeling"]))
    if first.mix == "mixup" and RECIPES[recipe]["optimizer"] == "sgd":
        p.set_defaults(wd=1e-4)
    elif first.mix and RECIPES[recipe]["mix"] == "mixup" != first.mix:
        p.set_defaults(wd=PAPER["wd"])
    if size != RECIPES[recipe]["image_size"]:
        p.set_defaults(resize=default_resize(size))
    if RECIPES[recipe]["pad"] and (data not in RECIPES or size != RECIPES[recipe]["image_size"]):
        p.set_defaults(pad=0, crop_area=0.3)  # padding takes images as they come
    if data not in RECIPES:
        p.set_defaults(train_on="train")
    if first.optimizer not in (None, RECIPES[recipe]["optimizer"]):
        p.set_defaults(lr=0.1 if first.optimizer == "sgd" else 1e-3)
    if first.arch not in (None, RECIPES[recipe]["arch"]):
        p.set_defaults(freeze_stages=3 if first.arch.startswith("resnet") else 1)
    args = p.parse_args(argv)
    counts = ("k", "epochs", "batch_size", "image_size", "save_every", "score_every", "pretrain_epochs")
    counts += ("pretrain_batch_size", "neighbours")
    for name in (*counts, "workers", "max_bad", "ramp_up", "pad", "freeze_stages"):
        if getattr(args, name) < (name in counts):
            other = "; --pretrain none leaves RotNet out" * (name == "pretrain_epochs")
            p.error(f"--{name.replace('_', '-')} must be at least {int(name in counts)}{other}")
    for name in ("lr", "wd", "consistency", "pretrain_lr", "pretrain_wd"):
        if not 0 <= getattr(args, name) < math.inf:
            p.error(f"--{name.replace('_', '-')} must be at least 0")
    if not 0 <= args.momentum < 1:
        p.error("--momentum must lie in 0..1 (1 excluded)")
    if not -1 <= args.cosine_threshold <= 1:
        p.error("--cosine-threshold must lie in -1..1")
    if not 0 <= args.sne_threshold <= 1:
        p.error("--sne-threshold must lie in 0..1")
    if not 0 < args.sne_temperature < math.inf:
        p.error("--sne-temperature must be above 0")
    if not 0 < args.crop_area <= 1:
        p.error("--crop-area must lie in 0..1 (0 excluded)")
    if any(s < 1 for s in (*args.lr_steps, *args.pretrain_lr_steps)):
        p.error("--lr-steps and --pretrain-lr-steps must be at least 1")
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2: pairs of images are what is learnt from")
    if args.labeling == "knn" and args.neighbours >= args.batch_size:
        p.error(
            f"--neighbours {args.neighbours}: a batch of {args.batch_size} holds {args.batch_size - 1} others"
        )
    if args.resize > 16384:
        p.error("--resize and --image-size must be at most 16384")
    if args.resize < args.image_size:
        p.error(f"--resize {args.resize} is smaller than --image-size {args.image_size}")
    vectors = args.data.endswith(".npz")
    if vectors != (args.arch == "mlp"):
        p.error(f"--arch {args.arch}: vectors (--data FILE.npz) take mlp, and images any other")
    if vectors and (args.mix == "ricap" or args.pretrain == "rotnet" or args.backbone):
        p.error(
            "vectors have no patches and no angles: leave out --mix ricap, --pretrain rotnet and --backbone"
        )
    if args.backbone:
        args.pretrain = "none"
    if args.pretrain == "none":
        args.pretrain_epochs = 0
    return args


def default_out(data, labeling, usual):
    """runs/lsdc-<data>, with the labeling if it is not the recipe's."""
    name = os.path.basename(os.path.normpath(data)).removesuffix(".npz")
    return f"runs/lsdc-{name}" + f"-{labeling}" * (labeling not in (None, usual))


# --------------------------------------------------------------------------- network


class Perceptron(nn.Module):
    """Vectors (B, D) -> (B, 2000) features through 500, 500 and 2000 units, a ReLU to follow; the Reuters network."""

    def __init__(self, inputs):
        super().__init__()
        units, self.features, self.stages = [inputs, 500, 500, 2000], nn.Sequential(), {}
        for i, (before, after) in enumerate(zip(units, units[1:], strict=False), 1):
            self.features.append(nn.Linear(before, after))
            self.features.append(nn.BatchNorm1d(after))
            if i < 3:
                self.features.append(nn.ReLU(inplace=True))
            self.stages[f"linear{i}"] = self.features[-1]
        self.dim = 2000

    def forward(self, x):
        return self.features(x)


class RotNet(nn.Module):
    """Images -> logits (B, 4): by how many quarters were they turned? Shares its trunk with Network."""

    def __init__(self, trunk):
        super().__init__()
        self.trunk, self.angle = trunk, nn.Linear(trunk.dim, 4)

    def forward(self, images):
        return self.angle(F.relu(self.trunk(images)))


class Network(nn.Module):
    """Views of images -> features (B, D) of the first, without gradient, and cluster probabilities (V, B, K), float32."""

    def __init__(self, trunk, k, layers):
        super().__init__()
        self.features = nn.Sequential(trunk, nn.ReLU())  # a ResNet's are not below 0 anyway
        hidden = [nn.Linear(trunk.dim, trunk.dim), nn.ReLU()] * (layers - 1)
        self.classifier = nn.Sequential(*hidden, nn.Linear(trunk.dim, k))
        self.features.dim, self.dim = trunk.dim, k
        self.still = []  # modules that stay in evaluation mode: frozen ones with --freeze-bn

    def train(self, mode=True):
        super().train(mode)
        for module in self.still:
            module.eval()
        return self

    def forward(self, views):
        z = [self.features(images) for images in views]  # each with the batch norm of its own view
        p = torch.stack([self.classifier(features) for features in z]).float().softmax(-1)
        return z[0].detach().float(), p


def make_net(args, about):
    """(trunk, net) of the command line; about: the trunk, in the words of a backbone.pt's meta (see describe)."""
    trunk = Perceptron(about["channels"]) if args.arch == "mlp" else rebuild(about, dropout=0.0, pool=True)
    return trunk, Network(trunk, args.k, args.classifier_layers)


def describe(args, data):
    """(about the trunk, its weights or None): that of --backbone, of whichever method, or a new one.

    Refused if --backbone takes other images. Images are normalised as its own were.
    """
    channels = data.pixels.shape[1] if args.arch == "mlp" else data.channels
    about = {
        "arch": args.arch,
        "channels": channels,
        "image_size": args.image_size,
        "sobel": False,
        "norm": True,
    }
    about |= {"small_stem": args.image_size <= 96, "pool_shortcuts": True}  # 3x3 for STL-10 and smaller
    about |= {"mean": list(data.mean), "std": list(data.std)}
    if not args.backbone:
        return about, None
    weights = problem = None
    try:
        loaded, found = load_backbone(args.backbone)
        loaded.embedding = None  # Local Aggregation's
        for name in ("arch", "channels", "image_size"):
            if found[name] != about[name]:
                problem = f"--backbone {args.backbone} has {name} {found[name]}, this run {about[name]}"
        about, weights = (
            {**found, "mean": list(found["mean"]), "std": list(found["std"])},
            loaded.state_dict(),
        )
    except (ValueError, OSError) as error:
        problem = f"--backbone: {error}"
    agree(problem)
    return about, weights


def frozen(trunk, stages):
    """The modules up to the end of the first `stages` stages; a ResNet's stem belongs to its first."""
    ends = [module for name, module in trunk.stages.items() if name != "stem"]
    if stages > len(ends):
        refuse(f"--freeze-stages {stages}: this network has {len(ends)}")
    modules = list(getattr(trunk, "features", trunk).children())
    return modules[: modules.index(ends[stages - 1]) + 1] if stages else []


# --------------------------------------------------------------------------- the algorithm
# Who is similar to whom: S (B, B) bool, symmetric, every image to itself, from features z (B, D) without gradient.


def squared_distances(z):
    """||z_i - z_j||^2 of all pairs, (B, B), from one product; centred first, which keeps it precise."""
    z = z - z.mean(0)
    norms = z.square().sum(1)
    return (norms[:, None] + norms - 2 * z @ z.T).clamp(min=0)


def knn_pairs(z, neighbours):
    """i ~ j if j is among the nearest `neighbours` others of i, or i among those of j [paper]."""
    distance = squared_distances(z).fill_diagonal_(-1)  # first comes the image itself
    near = distance.topk(neighbours + 1, largest=False).indices  # (B, neighbours + 1)
    similar = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, near, True)
    return similar | similar.T


def cosine_pairs(z, threshold):
    """i ~ j if the cosine of z_i and z_j is at least the threshold [paper]."""
    z = F.normalize(z, dim=1)
    return (z @ z.T >= threshold).fill_diagonal_(True)


def sne_pairs(z, threshold, temperature):
    """i ~ j if (P_ij + P_ji) / 2 > threshold, P_i = softmax over j != i of -||z_i - z_j||^2 / temperature^2 [paper]."""
    p = (-squared_distances(z) / temperature**2).fill_diagonal_(-math.inf).softmax(1)
    return ((p + p.T) / 2 > threshold).fill_diagonal_(True)


def similar_pairs(z, labeling, neighbours, cosine_threshold, sne_threshold, sne_temperature):
    """S by the labeling "knn", "cosine" or "sne"; each reads the numbers of its own name."""
    if labeling == "knn":
        return knn_pairs(z, neighbours)
    if labeling == "cosine":
        return cosine_pairs(z, cosine_threshold)
    return sne_pairs(z, sne_threshold, sne_temperature)


# Mixtures: part m of mixture r comes from image pi_m(r), with share W_m. permutations (M, b) and shares (M,) are
# one draw for the batch and for both mixed views; b <= B mixtures are made of B images.


def draw_mixture(kind, batch, size, rng, beta=0.3):
    """(permutations (M, B), shares (M,), (h, w) of RICAP's first patch) for --mix `kind`; size: of the images, in pixels.

    RICAP: h and w are size * Beta(0.3, 0.3), rounded; patches are h x w, h x (size - w), .. [supplementary 1]; one of
    more than a quarter of the image is of image r itself [code]. MixUp: one share from the same Beta.
    """
    identity, cut = np.arange(batch), (0, 0)
    if kind == "none":
        permutations, shares = [identity], [1.0]
    elif kind == "mixup":
        share = rng.beta(beta, beta)
        permutations, shares = [identity, rng.permutation(batch)], [share, 1 - share]
    else:
        cut = h, w = round(size * rng.beta(beta, beta)), round(size * rng.beta(beta, beta))
        shares = [high * wide / size**2 for high, wide in patches(cut, size)]
        permutations = [identity if share > 1 / 4 else rng.permutation(batch) for share in shares]
    return torch.from_numpy(np.stack(permutations)), torch.tensor(shares, dtype=torch.float32), cut


def patches(cut, size):
    """Height and width of RICAP's four patches: top left (h, w), top right, bottom left, bottom right."""
    h, w = cut
    return [(h, w), (h, size - w), (size - h, w), (size - h, size - w)]


def ricap(images, permutations, cut, corners):
    """Four patches in one image [supplementary 1]: images (B, C, S, S), permutations (4, b) -> (b, C, S, S).

    Patch m is taken out of images[permutations[m]] at a random place: corners (4, 2) in 0..1 are its top and left.
    """
    size, parts = images.shape[-1], []
    for who, (high, wide), (y, x) in zip(permutations, patches(cut, size), corners, strict=True):
        top, left = int(y * (size - high + 1)), int(x * (size - wide + 1))
        parts.append(images[who, :, top : top + high, left : left + wide])
    return torch.cat([torch.cat(parts[:2], 3), torch.cat(parts[2:], 3)], 2)


def mixup(images, permutations, shares):
    """sum over m of W_m images[pi_m]: images (B, ..), permutations (M, b), shares (M,) -> (b, ..) [supplementary 1]."""
    return sum(share * images[who] for who, share in zip(permutations, shares.tolist(), strict=True))


def mixed_targets(similar, permutations, shares):
    """T[r, c] = sum over m of W_m S[pi_m(r), c], (b, B): how much of mixture r is similar to image c."""
    return mixup(similar.float(), permutations, shares)


def pair_loss(mixed, clean, target):
    """Mean over all pairs of -[T log(P + 1e-7) + (1 - T) log(1 - P + 1e-7)], P[r, c] = mixed_r . clean_c.

    mixed (b, K) and clean (B, K) probabilities, target (b, B) in 0..1.
    """
    assert target.shape == (len(mixed), len(clean)), target.shape
    same = mixed @ clean.T
    same = same - (same - 1).clamp(min=0).detach()  # rounding lifts some above 1; clamp has no gradient
    apart, together = (1 - same + 1e-7).log(), (same + 1e-7).log()
    return -torch.lerp(apart, together, target).mean()  # (1 - T) apart + T together


def ramp(epoch, length):
    """exp(-5 (1 - min(t, T) / T)^2) for t = 0, 1, ..: from 0.007 to 1; T = 0: 1 at once [table 1, code]."""
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2) if length else 1.0


def four_turns(images):
    """The images by 0, 1, 2 and 3 quarters, one below the other, and by how many: (4 B, C, S, S), (4 B,) [RotNet]."""
    turned = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


# --------------------------------------------------------------------------- one epoch


def rotation_losses(net, images, args):
    """RotNet's loss, cross-entropy over the four turns of each image, and the share it gets right."""
    turned, quarters = four_turns(images)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
        logits = net(turned)  # (4 b, 4)
    right = (logits.argmax(1) == quarters).float().mean()
    return F.cross_entropy(logits.float(), quarters), right


def mix(views, epoch, step, args):
    """Two views (b, C, S, S) of this process's images, each mixed with everyone's; and how: permutations, shares."""
    rng = np.random.default_rng(generator(args.seed, epoch, step, "mix").initial_seed())
    permutations, shares, cut = draw_mixture(args.mix, args.batch_size, args.image_size, rng)
    corners = rng.random((2, 4, 2))
    permutations = permutations[:, slice(*shard(args.batch_size))]  # those of our images
    permutations = permutations.to(views[0].device, non_blocking=True)
    if args.mix == "none":
        return views, permutations, shares
    views = [gather(images, equal=True) for images in views]  # (B, C, S, S)
    if args.mix == "mixup":
        return [mixup(images, permutations, shares) for images in views], permutations, shares
    return [ricap(x, permutations, cut, c) for x, c in zip(views, corners, strict=True)], permutations, shares


def clustering_losses(net, views, labels, weight, epoch, step, args):
    """LSD-C's loss, its two terms, and what is watched: shares of other images that are similar, and rightly so.

    views: three of each image; labels (B,) of everyone's, or None; weight: w(t).
    """
    clean, *others = views
    mixed, permutations, shares = mix(others, epoch, step, args)
    with torch.autocast(clean.device.type, torch.bfloat16, enabled=args.amp):
        z, p = net([clean, *mixed])  # (b, D), (3, b, K)
    # One way, without gradient: which of everyone's images are similar, and to our mixtures.
    numbers = args.neighbours, args.cosine_threshold, args.sne_threshold, args.sne_temperature
    similar = similar_pairs(gather(z, equal=True), args.labeling, *numbers)  # (B, B)
    target = mixed_targets(similar, permutations, shares)  # (b, B)
    # The other: are they in the same cluster? Our mixtures against everyone's clean images, with gradients to both.
    pairs = pair_loss(p[1], gather_with_gradient(p[0]), target)
    difference = F.mse_loss(p[1], p[2])
    loss = pairs + weight * difference
    b = len(similar)
    similar = similar.fill_diagonal_(False)
    count = similar.sum()
    right = (similar & (labels[:, None] == labels)).sum() if labels is not None else count
    return loss, pairs, difference, count / (b * b - b), right / (b * b - b)


def train(net, optimizer, losses, batches, start, steps, sums, text):
    """Steps start .. of an epoch; losses(step, index, views) gives what to minimise and what else to sum up.

    -> (next step, sums over the steps, signal or 0)
    """
    net.train()
    for step, (index, views) in progress(enumerate(batches, start), steps - start, text):
        loss, *others = losses(step, index, views)
        optimizer.zero_grad()
        loss.backward()
        *means, signal = heartbeat(loss, *others)
        optimizer.step()
        sums = [a + b for a, b in zip(sums or [0.0] * len(means), means, strict=True)]
        if signal:
            return step + 1, overdue(sums), signal
    return steps, overdue(sums), 0


def losses_of(stage, labels, epoch, args):
    """What train() minimises in an epoch of this Stage, as a function of step, index and views."""
    weight = args.consistency * ramp(epoch - stage.first, args.ramp_up)

    def rotation(step, index, views):
        return rotation_losses(stage.trained, views[0], args)

    def clustering(step, index, views):
        known = labels
        if labels is not None:
            known = labels[gather(index.to(labels.device, non_blocking=True), equal=True)]
        return clustering_losses(stage.trained, views, known, weight, epoch, step, args)

    return rotation if stage.name == "rotnet" else clustering


# --------------------------------------------------------------------------- main


class Vectors(Loader):
    """Batches of vectors from memory: nothing is cut, mirrored or normalised, each view is the vector itself."""

    def epoch(self, epoch, views, order=None, start=0, stop=None):
        first, last = shard(self.batch_size)
        for step in range(start, self.steps(order) if stop is None else stop):
            index = order[step * self.batch_size : (step + 1) * self.batch_size][first:last]
            yield index, [self.data.pixels[index.to(self.device, non_blocking=True)]] * len(views)

    def fixed(self, index, ten=False, batch_size=None):
        for part in index.split(batch_size or self.batch_size) if len(index) else []:
            yield part, self.data.pixels[part.to(self.device)][:, None]


def load_vectors(path, device):
    """An .npz file as Images whose pixels are its rows, (N, D) float32; refused unless it holds finite numbers."""
    data = problem = None
    try:
        with np.load(path, allow_pickle=False) as file:
            features, labels = file["features"], file.get("labels")
        if features.ndim != 2 or features.dtype.kind not in "fiu" or 0 in features.shape:
            raise ValueError(f"features must be numbers (N, D), not {features.dtype} {features.shape}")
        with np.errstate(over="ignore"):  # it is refused below
            features = torch.from_numpy(features.astype(np.float32))
        if not features.isfinite().all():
            raise ValueError(f"{int((~features.isfinite()).sum())} of its features are NaN or infinite")
        names = []
        if labels is not None:
            if labels.shape != (len(features),):
                raise ValueError(f"labels must be ({len(features)},), one for each row, not {labels.shape}")
            names, labels = np.unique(labels, return_inverse=True)
            labels = torch.from_numpy(labels.astype(np.int64))
        data = Images(path, features.to(device), None, labels, [str(n) for n in names], (0.0,), (1.0,))
    except KeyError:
        problem = f"--data {path} has no array `features`"
    except Exception as error:  # no file, no zip, a pickle ..
        problem = f"--data {path}: {str(error).splitlines()[0] if str(error) else type(error).__name__}"
    agree(problem)
    return data


def joined(train, test):
    """Both splits as one set, training images first; -1 is the label of those without, None if all are."""
    if test is None:
        return train
    labels = None
    if train.labels is not None or test.labels is not None:
        parts = (s.labels if s.labels is not None else torch.full((len(s),), -1) for s in (train, test))
        labels = torch.cat(list(parts))
    pixels = None if train.pixels is None else torch.cat([train.pixels, test.pixels])
    paths = None if train.paths is None else train.paths + test.paths
    return replace(train, pixels=pixels, paths=paths, labels=labels, classes=train.classes or test.classes)


def splits_of(train, test):
    """{"train": where its images stand among all, "test": .., "both": ..}, as slices."""
    if test is None:
        return {"train": slice(0, len(train))}
    n = len(train) + len(test)
    return {"train": slice(0, len(train)), "test": slice(len(train), n), "both": slice(0, n)}


def scores(data, splits, found):
    """{split: NMI, ACC and ARI} of clusters (N,), of splits with labels."""
    known = data.labels is not None
    return {
        name: label_scores(data.labels[part], found[part])
        for name, part in splits.items()
        if known and data.labels[part].min() >= 0
    }


def baseline(net, loader, learn, splits, args, name):
    """Scores of k-means on the network's features as they are; centroids from the images to learn from."""
    own = torch.arange(*shard(len(loader.data)))
    z = extract(net.features, loader, own, args.amp)
    with finite_or_leave():
        centroids = kmeans(z[own < learn], args.k, gen=generator(args.seed, name)).centroids
    return scores(loader.data, splits, gather(nearest(z, centroids)[1][:, 0]).cpu())


def predict(net, loader, args):
    """Cluster (N,) and its probability (N,) of the centre crop of every image."""
    both = nn.Sequential(net.features, net.classifier)
    both.dim = net.dim

    def top(logits):
        return torch.stack(logits.softmax(1).max(1), 1)  # (n, 2); float32 counts clusters to 16 million

    found = gather(extract(both, loader, torch.arange(*shard(len(loader.data))), args.amp, then=top)).cpu()
    return found[:, 1].long(), found[:, 0]


def confusion(labels, found, k, classes):
    """How many images of each class are in each cluster, (classes, K)."""
    return torch.bincount(labels * k + found, minlength=classes * k).view(classes, k)


def confident(data, splits, found, top, k):
    """{split: share of predictions above 0.9 and how many of those are right} [supplementary 2].

    Right under the matching of clusters to classes that is best for all of the split's images.
    """
    result = {}
    for name, part in splits.items():
        sure = top[part] > CONFIDENT
        result[name] = {"share": float(sure.float().mean())}
        if data.labels is not None and data.labels[part].min() >= 0 and sure.any():
            labels, clusters, class_of = data.labels[part], found[part], torch.full((k,), -1)
            for r, c in matched(confusion(labels, clusters, k, len(data.classes))):
                class_of[c] = r
            result[name]["accuracy"] = float((class_of[clusters] == labels)[sure].float().mean())
    return result


def save_confusion(folder, data, found, top, k):
    """confusion.json and confusion.png: classes in rows, clusters in columns; all images, and confident ones."""
    known = data.labels >= 0
    labels, found, sure = data.labels[known], found[known], top[known] > CONFIDENT
    both = (labels, found), (labels[sure], found[sure])
    tables = [confusion(*x, k, len(data.classes)) for x in both]
    order = [c for _, c in matched(tables[0])]  # in the order of their classes, which come in theirs
    order += [c for c in range(k) if c not in order]
    tables = [table[:, order] for table in tables]
    if not main_process():
        return
    names = {"classes": data.classes, "clusters": order, "confident_above": CONFIDENT}
    with though_the_disk_be_full(folder / "confusion.json"), open(folder / "confusion.json", "w") as file:
        json.dump({**names, "all": tables[0].tolist(), "confident": tables[1].tolist()}, file)
    if k <= 30:
        with though_the_disk_be_full(folder / "confusion.png"):
            picture(tables, data.classes, order).save(folder / "confusion.png")


def picture(tables, classes, clusters, cell=44, margin=110):
    """Confusion matrices side by side, as an image: darker is a larger share of the class; numbers count images."""
    wide, high = margin + cell * len(clusters), margin + cell * len(classes)
    page = Image.new("RGB", (wide * len(tables), high), "white")
    draw = ImageDraw.Draw(page)
    for t, (table, title) in enumerate(zip(tables, ("all images", f"above {CONFIDENT}"), strict=True)):
        left = t * wide + margin
        draw.text((left, 10), f"{title}: classes down, clusters across, as they fit best", "black")
        for c, cluster in enumerate(clusters):
            draw.text((left + cell * c + 4, margin - 16), str(cluster), "black")
        for r, (name, row) in enumerate(zip(classes, table.tolist(), strict=True)):
            draw.text((t * wide + 4, margin + cell * r + 16), name[:16], "black")
            for c, count in enumerate(row):
                share, at = count / max(1, sum(row)), (left + cell * c, margin + cell * r)
                shade = tuple(round(255 - share * (255 - x)) for x in (20, 60, 120))
                draw.rectangle((*at, at[0] + cell - 2, at[1] + cell - 2), shade)
                draw.text((at[0] + 4, at[1] + 16), str(count), "white" if share > 0.5 else "black")
    return page


def check(args, data, learn):
    """Refuse, or say, what can only be judged with the data at hand; learn: images to learn from."""
    if args.k > learn:
        refuse(f"--k {args.k} is more than the {learn} images of {args.data}")
    for name in ("batch_size", *["pretrain_batch_size"] * (args.pretrain_epochs > 0)):
        if getattr(args, name) > learn:
            refuse(
                f"--{name.replace('_', '-')} {getattr(args, name)} is more than the {learn} images of {args.data}; lower"
                f" --batch-size and --pretrain-batch-size, and with them --neighbours (at most 2/3 of B / K)"
            )
    if args.pad:
        sides = set() if data.pixels is None else set(data.pixels.shape[2:])
        if sides != {args.resize}:
            refuse(
                f"--pad {args.pad} takes images that all have {args.resize} x {args.resize} pixels (--resize) as they"
                f" come; --pad 0 --crop-area 0.3 takes any"
            )
    elif args.crop_area == 1 and args.arch != "mlp":
        say("WARNING: with --pad 0 and --crop-area 1 nothing but mirror images tells an image's views apart")
    if data.labels is not None and len(data.classes) != args.k:
        say(f"note: {args.data} has {len(data.classes)} classes, and --k is {args.k}")
    if args.labeling == "knn" and args.neighbours > 0.75 * args.batch_size / args.k:
        say(
            f"WARNING: {args.neighbours} neighbours, and a batch of {args.batch_size} holds"
            f" {args.batch_size / args.k:.3g} images of a cluster: others get in; lower --neighbours or raise"
            " --batch-size"
        )
    for prefix in ("", "pretrain_"):
        steps, epochs = getattr(args, f"{prefix}lr_steps"), getattr(args, f"{prefix}epochs")
        late = " ".join(str(s) for s in steps if s >= epochs)
        if late and epochs:
            say(f"note: --{prefix.replace('_', '-')}lr-steps {late}: not reached in {epochs} epochs")


class Stage(NamedTuple):
    """RotNet's epochs, or those of clustering."""

    name: str
    net: nn.Module  # what the checkpoint keeps ..
    trained: nn.Module  # .. and the same, wrapped
    optimizer: torch.optim.Optimizer
    loader: Loader
    first: int  # its first epoch


def begin(epoch, rotnet, net, loaders, args):
    """The Stage of an epoch, with a new optimizer; where clustering begins, stages freeze."""
    if epoch < args.pretrain_epochs:
        about = {"momentum": 0.9, "nesterov": True, "weight_decay": args.pretrain_wd}  # [RotNet, code]
        optimizer = torch.optim.SGD(rotnet.parameters(), args.pretrain_lr, **about, fused=True)
        return Stage("rotnet", rotnet, wrapped(rotnet, args), optimizer, loaders[0], 0)
    fixed = frozen(net.features[0], args.freeze_stages)
    net.still = fixed if args.freeze_bn else []
    net.zero_grad()  # RotNet's last
    for module in fixed:
        module.requires_grad_(False)
    weights = [w for w in net.parameters() if w.requires_grad]
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(weights, args.lr, weight_decay=args.wd, fused=True)
    else:
        optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.wd, fused=True)
    return Stage("clustering", net, wrapped(net, args), optimizer, loaders[1], args.pretrain_epochs)


def wrapped(net, args):
    return parallel(net, args.compile)


def rate(stage, number, args):
    """The learning rate in epoch `number` of a Stage: by five at RotNet's steps, by ten at clustering's."""
    if stage.name == "rotnet":
        return learning_rate(args.pretrain_lr, number, args.pretrain_lr_steps, 0.2)
    return learning_rate(args.lr, number, args.lr_steps)


def main():
    args = options()
    device = setup(args.device)
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    vectors = args.arch == "mlp"
    parts = (load_vectors(args.data, device), None) if vectors else load_data(args.data, args.root, device)
    data, splits = joined(*parts), splits_of(*parts)
    learn = len(data) if args.train_on == "both" else len(parts[0])
    known = "labels for reporting only" if data.labels is not None else "no labels"
    what = f"{learn} {'vectors' if vectors else 'images'} to learn from, of {len(data)}"
    say(f"data: {args.data}, {what}, {known}; recipe {args.recipe}")
    if args.backbone:
        say(f"starting from {args.backbone} instead of RotNet")
    check(args, data, learn)
    sizes = [args.pretrain_batch_size if args.pretrain_epochs else args.batch_size, args.batch_size]
    rest = (args.image_size, args.resize, device, args.workers, args.seed, args.max_bad)
    about, weights = describe(args, data)
    data = replace(data, mean=tuple(about["mean"]), std=tuple(about["std"]))
    loaders = [(Vectors if vectors else Loader)(data, size, *rest) for size in sizes]
    loaders[0].bad = loaders[1].bad  # the same files
    seed_all(args.seed, "weights")
    trunk, net = make_net(args, about)
    frozen(trunk, args.freeze_stages)  # refused now, if ever
    if weights:
        trunk.load_state_dict(weights)
    rotnet = RotNet(trunk)
    for module in (net, rotnet):
        to_device(module, device)
        synchronise(module)
    run, loader = Run(args, data), loaders[1]
    epoch, step, sums, before = 0, 0, [], None
    if run.state:
        state = run.state
        with run.restoring():
            names = ("epoch", "step", "sums", "before", "baselines", "finished")
            epoch, step, sums, before, baselines, finished = (state[k] for k in names)
            before = None if before is None else shaped(before, len(data))
        if finished:
            say(f"{args.out} is finished after {args.epochs} epochs; its last lines: {args.out}/log.jsonl")
            leave()
    else:
        run.first_record(args, device, data)
        say("k-means on the network as it starts, to compare with")
        start, name = (net, "pretrained") if args.backbone else (filled(net, loader), "untrained")
        baselines = {name: baseline(start, loader, learn, splits, args, name)}
    stage = begin(epoch, rotnet, net, loaders, args)
    if run.state:
        with run.restoring():
            stage.net.load_state_dict(state["net"])
            stage.optimizer.load_state_dict(state["optimizer"])
        run.state = state = None
        say(f"going on from epoch {epoch - stage.first + 1} of {stage.name}, step {step}, of {args.out}")
        run.log({"resumed": True, "phase": stage.name, "epoch": epoch - stage.first, "step": step})

    def save(finished=False):
        """Everything there is to the method's state, and the network on its own."""
        run.save(
            {
                "epoch": epoch,  # epochs done, RotNet's among them ..
                "step": step,  # .. and steps of the one after
                "sums": sums,  # over those steps: the loss and what goes with it
                "before": before,  # (N,) clusters when they were last looked at
                "baselines": baselines,  # scores of k-means before clustering
                "trunk": about,  # how to build it, see make_net
                "net": stage.net.state_dict(),  # RotNet's or the clustering network's
                "optimizer": stage.optimizer.state_dict(),
                "finished": finished,
            }
        )
        run.unsaved |= not save_trunk("backbone.pt")

    def save_trunk(name):
        more = (args.arch, args.image_size, args.resize, about["sobel"], data, f"lsdc-{stage.name}")
        return save_backbone(run.out / name, trunk, *more) is not False

    before_leaving(save)
    view = View((args.crop_area, 1.0), flip=0.5 * args.flip, pad=args.pad)
    labels = None
    if data.labels is not None and data.labels[:learn].min() >= 0:
        labels = data.labels.to(device)
    while epoch < args.pretrain_epochs + args.epochs:
        began, first, number = time.time(), step, epoch - stage.first
        order = torch.randperm(learn, generator=generator(args.seed, epoch, "order"))
        steps, clustering = stage.loader.steps(order), stage.name == "clustering"
        for group in stage.optimizer.param_groups:
            group["lr"] = rate(stage, number, args)
        batches = stage.loader.epoch(epoch, [view] * (3 if clustering else 1), order, start=step)
        losses, text = losses_of(stage, labels, epoch, args), f"{stage.name} {number + 1}"
        step, sums, signal = train(stage.trained, stage.optimizer, losses, batches, step, steps, sums, text)
        if signal:
            stop(signal, save, f"step {step} of epoch {number + 1} of {stage.name}")
        seconds = {"training": time.time() - began}
        record = {"epoch": number + 1, "phase": stage.name, "lr": rate(stage, number, args)}
        record |= summary(sums, steps, clustering, labels is not None, args)
        found = before
        if clustering and ((number + 1) % args.score_every == 0 or number + 1 == args.epochs):
            found, top = predict(net, loader, args)
            record |= judge(data, splits, found, top, before, args)
        if epoch + 1 == args.pretrain_epochs:
            say("k-means on RotNet's features, to compare with")
            more = baseline(net, loader, learn, splits, args, "pretrained")
            baselines = {**baselines, "pretrained": more}
        # Nothing interrupts from here to the next step.
        seconds["scoring"] = time.time() - began - seconds["training"]
        record |= {
            "images_per_second": (steps - first) * stage.loader.batch_size / max(1e-9, seconds["training"])
        }
        run.log({**record, "seconds": seconds, "bad_files": len(loader.bad)})
        report(record, seconds, args)
        warn(record, number, args)
        epoch, step, sums, before = epoch + 1, 0, [], found
        saved = True
        if epoch == args.pretrain_epochs:
            saved = save_trunk("rotnet.pt")
            stage = begin(epoch, rotnet, net, loaders, args)
        if epoch % args.save_every == 0 or epoch in (
            args.pretrain_epochs,
            args.pretrain_epochs + args.epochs,
        ):
            save()
            run.unsaved |= not saved
    finish(run, net, loader, splits, baselines, args)
    save(finished=True)
    run.finish()


def filled(net, loader):
    """A copy of an untrained network, its batch-norm statistics those of the first 256 images."""
    net, some = copy.deepcopy(net), torch.arange(min(256, len(loader.data)))
    fill_batch_norm(net.features, next(loader.fixed(some, batch_size=256))[1][:, 0])
    return net


def summary(sums, steps, clustering, labelled, args):
    """Means over an epoch's steps by name, and the loss of one who learnt nothing."""
    means = [x / max(1, steps) for x in sums]
    if not clustering:
        return {"loss": means[0], "turns_right": means[1], "chance": math.log(4)}
    names = ("loss", "loss_pairs", "loss_consistency", "similar", "rightly_similar")
    result = dict(zip(names, means, strict=True))
    right = result.pop("rightly_similar")
    if labelled:  # share of the similar pairs that are of one class
        result["purity"] = right / result["similar"] if result["similar"] else None
    # Of all pairs, with every image to itself; if all were given one probability, it could not be below 1 / K.
    share = (1 + result["similar"] * (args.batch_size - 1)) / args.batch_size
    same = max(share, 1 / args.k)
    result["chance"] = -sum(s * math.log(p) for s, p in ((share, same), (1 - share, 1 - same)) if p > 0)
    return result


def judge(data, splits, found, top, before, args):
    """Sizes, scores and confidence of the clusters found (N,), NMI to those before."""
    result = {**cluster_sizes(found, args.k), "nmi_previous": None if before is None else nmi(before, found)}
    return {
        **result,
        "scores": scores(data, splits, found),
        "confident": confident(data, splits, found, top, args.k),
    }


def finish(run, net, loader, splits, baselines, args):
    """Cluster all centre crops, score them, write what the run leaves behind."""
    data, (found, top) = loader.data, predict(net, loader, args)
    result = judge(data, splits, found, top, None, args)
    if args.k > 1:
        warn_if_trivial(result)
    run.log({"result": {**result, "baselines": baselines}, "minutes": run.minutes()})
    save_assignments(run.out / "assignments.csv", data, found)
    vectors = args.arch == "mlp"
    if not vectors:
        save_pictures(run.out / "clusters.png", loader, found, 1 - top)
    files = "assignments.csv" + ", clusters.png (surest first)" * (not vectors)
    if data.labels is not None:
        save_confusion(run.out, data, found, top, args.k)
        files += ", confusion.png"
    for split, part in result["scores"].items():
        sure = result["confident"][split]
        right = f", {sure['accuracy']:.1%} of them right" if "accuracy" in sure else ""
        count = splits[split].stop - splits[split].start
        say(
            f"{split}, {count} in {args.k} clusters: {percent(part)}; {sure['share']:.1%} above {CONFIDENT}{right}"
        )
        for name, rows in baselines.items():
            say(f"    k-means on the {name} network's features: {percent(rows[split])}")
    say(f"which image is in which cluster: {run.out}/{files}")
    if not vectors:
        labelled = "" if data.labels is not None else " --data LABELLED"
        say(f"evaluate the features: python eval_linear.py {run.out}{labelled}")


def report(record, seconds, args):
    """One readable line per epoch."""
    clustering = record["phase"] == "clustering"
    last = args.epochs if clustering else args.pretrain_epochs
    parts = [f"epoch {record['epoch']:3d}/{last}  {record['phase']} loss {record['loss']:.4f}"]
    if clustering:
        parts[0] += f", of pairs {record['loss_pairs']:.4f}"
    parts[0] += f" (chance {record['chance']:.3f})"
    if not clustering:
        parts.append(f"{record['turns_right']:.1%} of the turns right")
    else:
        pure = f", {record['purity']:.0%} of one class" if record.get("purity") is not None else ""
        parts.append(f"{record['similar']:.1%} of pairs similar{pure}")
    if "largest" in record:
        parts.append(f"{record['clusters']} clusters of {record['smallest']}-{record['largest']}")
        if record["nmi_previous"] is not None:
            parts.append(f"NMI to previous {record['nmi_previous']:.3f}")
        parts += [f"{split} {percent(found)}" for split, found in record["scores"].items() if split != "both"]
    spent = " + ".join(f"{s:.1f}" for s in seconds.values())
    say("  ".join(parts), f" {record['images_per_second']:.0f} img/s  {spent} s")


def warn(record, number, args):
    """Say so when RotNet ends without having learnt, or when clustering's first pairs are too few or too many."""
    if (
        record["phase"] == "rotnet"
        and number + 1 == args.pretrain_epochs
        and record["loss"] > record["chance"]
    ):
        say("WARNING: RotNet has learnt nothing; more --pretrain-epochs, or a lower --pretrain-lr")
    flag = {"knn": "neighbours", "cosine": "cosine-threshold", "sne": "sne-temperature"}[args.labeling]
    share = record.get("similar", 1 / args.k)
    few = 0.03 if args.labeling == "knn" else 0.1  # Reuters: three neighbours of 255 are 0.06 / K
    if number == 0 and args.k > 1 and not few / args.k < share < 2 / args.k:
        say(
            f"WARNING: {share:.2%} of the pairs are similar, and with true labels about {1 / args.k:.0%} would be;"
            f" change --{flag}"
        )


if __name__ == "__main__":
    main()
