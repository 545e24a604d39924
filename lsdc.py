"""LSD-C: images whose features lie close together should be put into the same cluster, also when they are mixed.

Rebuffi, Ehrhardt, Han, Vedaldi & Zisserman, LSD-C, 2020; pretrained as Gidaris et al., ICLR 2018 ("RotNet").

    RotNet:      the network learns by which of four angles an image was turned; then its first stages are frozen
    each batch:  z = relu(backbone(x)),  p = softmax(classifier(z))     (B, D), (B, K)  x: random crops
                 S = 1 where z_i and z_j are close, else 0              (B, B)  pairwise pseudo-labels
                 x1, x2 = two mixed samples: of other crops of the same images, with weights W_m
                 T[r, c] = sum over m of W_m S[pi_m(r), c]              (B, B)  pi_m(r): part m of mixed sample r
                 P[r, c] = p1_r . p_c                                   (B, B)  are both in the same cluster?
                 loss = mean of -[T log P + (1 - T) log(1 - P)] + w(t) mean of (p1 - p2)^2

Close (--labeling): one of the nearest neighbors (knn), or of a large cosine (cosine) or probability as in t-SNE (sne).
Mixed (--mix): four patches in one image (ricap), two images laid over each other (mixup), or not at all (none).
Symbols: N images, B batch (--batch-size, over all processes), D feature size, K clusters (--k), w(t) the weight of
consistency, which rises to lambda (--consistency) in the T epochs of --ramp-up.

    python lsdc.py                                       laptop: digits, no download, no GPU
    python lsdc.py --data fashionmnist                   with RotNet, 5 minutes
    python lsdc.py --data cifar10 --arch lenet5          12 minutes on a CPU; leave out --arch with a GPU
    python lsdc.py --data my/photos --k 10               a folder of images, no labels needed
    python lsdc.py --data reuters.npz --k 4              vectors: array features (N, D) and, if known, labels (N,)
    torchrun --nproc_per_node=8 lsdc.py --data cifar10   the paper's table 1

What to expect: on digits, 50 s on 2 cores, accuracy of the test images 94, 87, 96 % with seeds 0 to 2 (k-means on the
random network 59, on pixels 70; the recipe was chosen by looking at it). Nothing keeps clusters equal in size. Of all
pairs 5 % are "positive", half of these of one class ("purity" in log.jsonl), at the end nine tenths. Mixed samples keep
the loss far above 0. Stopped at any time, the same command goes on after the last epoch, of RotNet, too. A folder of images
has K = 10, --num-neighbors half of what one of ten clusters has in a batch, and the rest by folder_recipe of common.py.

Departs from the paper and its code, on purpose:
 1. RICAP: T[r, c] belongs to mixed sample r and image c, as the paper says; the code has S[r, pi(c)], its transpose.
 2. --num-neighbors counts others. The code's strict comparison leaves of its k the image itself and k - 2 others:
    18, 8, 8, 3 in the recipes of CIFAR-10, CIFAR-100-20, MNIST, Reuters. Every image is close to itself.
 3. On several processes pairs and mixed samples are those of the whole batch, with gradients to all (the paper: one
    GPU). Batch norm is over all GPUs; several processes on CPUs each normalize their own part of a batch.
 4. The paper learns from training and test images together (--train-on both), recipes of ours from training images.
 5. LeNet-5 on CIFAR-10 and, with three epochs of RotNet, on MNIST, 500-500-2000 for Reuters, batch norm in both, and
    the hidden layer of --classifier-layers 2, as wide as the features, are ours. ResNets: 3x3 stem up to 96 pixels.
 6. A vector has no crops: its three views are equal, and the table's lambda of 25 for Reuters nothing to act on.
 7. Rounding does not bring 1 - P below 0. Weights start as in the other scripts; --init brings mean and deviation.
 8. On GPUs networks, features too, run in bf16 autocast (--no-amp). Resized crops in memory are not antialiased.
"""

import copy
import math
import time
from argparse import BooleanOptionalAction as YesNo
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Backbone, Images, Loader, Meter, Run, View, all_gather, all_reduce_sum, assign_folder, autocast,
    center_crop, cluster_sizes, draw, error, extract, fill_batch_norm, folder_recipe, generator,
    init_defaults, is_main, kmeans, label_scores, load_backbone, load_data, load_file, make_backbone,
    make_parser, nearest, nmi, number, parallel, pixel_net, print_once, read_backbone, save_clusters,
    save_file, seed_epoch, setup, shard, to_device,
)  # fmt: skip

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from torchvision.transforms import v2

# %% recipes and options
# Data set (or data-arch) -> hyper-parameters of the supplementary's table 1 and of the code. Ours is what they leave
# open: all but the schedule, batch and neighbors of mnist, and what is marked below. Flags override.

PAPER = {
    "arch": "resnet18", "k": 10, "epochs": 220, "batch_size": 256, "lr": 0.1, "optimizer": "sgd",
    "lr_steps": [140, 180], "consistency": 5.0, "ramp_up": 100, "labeling": "knn", "num_neighbors": 18,
    "cosine_threshold": 0.9, "sne_threshold": 0.01, "sne_temperature": 1.0, "mix": "ricap", "freeze_stages": 3,
    "image_size": 32, "center_fraction": 1.0, "pad": 4, "crop_area": 0.3, "flip": True, "train_on": "both",
    "pretrain": "rotnet", "pretrain_epochs": 200, "pretrain_lr": 0.1, "pretrain_lr_steps": [60, 120, 160],
    "pretrain_batch_size": 128, "pretrain_wd": 5e-4, "score_every": 1,
}  # fmt: skip
SMALL = {
    **PAPER, "arch": "lenet5", "freeze_stages": 1, "num_neighbors": 10, "cosine_threshold": 0.8, "mix": "mixup",
    "flip": False, "pad": 2, "pretrain_epochs": 3, "pretrain_lr_steps": [1, 2],
}  # fmt: skip
RECIPES = {
    "cifar10": PAPER,
    "cifar100-20": {**PAPER, "k": 20, "epochs": 200, "lr_steps": [170], "consistency": 25.0, "ramp_up": 150,
                    "num_neighbors": 8, "cosine_threshold": 0.95, "sne_temperature": 0.5},
    "stl10": {**PAPER, "epochs": 200, "ramp_up": 50, "labeling": "sne", "sne_temperature": 0.5,
              "image_size": 96, "pad": 12},  # ours: cosine, neighbors; 12 pixels are the code's
    "mnist": {**SMALL, "epochs": 15, "lr_steps": [], "ramp_up": 50, "num_neighbors": 8, "image_size": 28},
    "reuters": {**PAPER, "arch": "mlp", "k": 4, "epochs": 75, "lr": 1e-3, "wd": 0.0, "optimizer": "adam",
                "lr_steps": [], "consistency": 0.0, "num_neighbors": 3, "mix": "none", "freeze_stages": 0,
                "image_size": 1, "train_on": "train", "pretrain": "none"},
    "svhn": {**PAPER, "flip": False, "train_on": "train"},  # from here on ours
    "cifar10-lenet5": {**PAPER, "arch": "lenet5", "epochs": 6, "lr_steps": [3, 5], "ramp_up": 6, "consistency": 1.0,
                       "freeze_stages": 0, "num_neighbors": 5, "pad": 2, "train_on": "train", "pretrain_epochs": 10,
                       "pretrain_lr_steps": [4, 8]},
    "fashionmnist": {**SMALL, "epochs": 12, "lr_steps": [7, 10], "ramp_up": 10, "image_size": 28, "flip": True,
                     "train_on": "train"},
    "digits": {**SMALL, "epochs": 100, "lr_steps": [75, 90], "ramp_up": 50, "freeze_stages": 0, "pad": 0,
               "crop_area": 0.85, "sne_temperature": 2.0, "train_on": "train", "pretrain": "none", "score_every": 10},
}  # fmt: skip
ONLY = [("num_neighbors", "labeling", "knn"), ("cosine_", "labeling", "cosine"), ("sne_", "labeling", "sne")]
ONLY += [("pretrain_", "pretrain", "rotnet"), ("crop_area", "pad", 0)]  # what flags that begin so are for
CONFIDENT = 0.9  # a prediction above this probability [supplementary 2]


def photos(known):
    """The recipe of a folder, ours: see folder_recipe; from 100,000 images on, and where there is no folder, stl10's."""
    n, shared = folder_recipe(known, 25_000)
    if not n:
        return RECIPES["stl10"]
    epochs, batch = shared["epochs"], known.batch_size or min(256, 4 * shared["batch_size"], n)
    return {
        **PAPER, "lr_steps": [max(1, epochs * 2 // 3)], "ramp_up": epochs // 2, "num_neighbors": max(1, batch // 20),
        "pad": 0, "lr": 0.01 if known.init else 0.05, "freeze_stages": 0, "train_on": "train",
        "pretrain_epochs": epochs, "pretrain_lr_steps": [max(1, epochs // 2), max(1, epochs * 3 // 4)],
        "pretrain_batch_size": shared["batch_size"], **shared, "batch_size": batch,
    }  # fmt: skip


def options(argv=None):
    """The command line as a namespace."""
    p = make_parser("LSD-C, linearly separable deep clusters (Rebuffi et al. 2020)")
    share, count, from_0 = number(float, 0, 1), number(int, 1), number(float, 0)
    # fmt: off
    g = p.add_argument_group("training")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take; None: those of --data. NAME-ARCH, where there is one, for --arch ARCH")
    g.add_argument("--arch", choices=[*ARCHS, "mlp"], help="network; mlp for vectors")
    g.add_argument("--epochs", type=count, help="passes over the data in clustering, after those of RotNet [supplementary, table 1]")
    g.add_argument("--batch-size", type=number(int, 2), help="images per step, over all processes: their pairs are what is learnt from [supplementary 1, table 5]")
    g.add_argument("--optimizer", choices=["sgd", "adam"], help="of clustering [supplementary, table 1]")
    g.add_argument("--lr", type=from_0, help="learning rate of clustering; 0.001 with --optimizer adam [supplementary, table 1]")
    g.add_argument("--lr-steps", type=count, nargs="*", help="epochs of clustering after which the learning rate is divided by ten [supplementary, table 1]")
    g.add_argument("--wd", type=from_0, help="weight decay of clustering; 1e-4 with --mix mixup [supplementary 1]")
    g.add_argument("--momentum", type=share, default=0.9, help="of SGD [code]")
    g.add_argument("--train-on", choices=["train", "both"], help="images to learn from; both: those of the test set, too, as the paper; their labels are never used")
    g.add_argument("--image-size", type=number(int, 1, 4096), help="side of the square the network sees, in pixels")
    g.add_argument("--center-fraction", type=number(float, 0.01, 1), help="share of the shorter side that a center crop keeps")
    g.add_argument("--pad", type=number(int, 0, 1024), help="black pixels around the center crop, out of which a random crop of --image-size is cut [code]; 0: random resized crops instead")
    g.add_argument("--crop-area", type=number(float, 0.001, 1), help="with --pad 0: smallest share of the image that a random crop keeps")
    g.add_argument("--flip", action=YesNo, help="flip half of the crops horizontally [code]")
    g.add_argument("--score-every", type=count, help="epochs between clusterings of all center crops, for the log")
    g = p.add_argument_group("LSD-C")
    g.add_argument("--k", type=count, help="clusters; the paper's: as many as classes")
    g.add_argument("--labeling", choices=["knn", "cosine", "sne"], help="which pairs are positive [paper]")
    g.add_argument("--num-neighbors", type=count, help="knn: nearest others of an image that form positive pairs with it; a third to two thirds of the images that a cluster has in a batch [supplementary, table 1, less two: see Departs]")
    g.add_argument("--cosine-threshold", type=number(float, -1, 1), help="cosine: pairs of at least this cosine are positive; raise it by 0.05 if ever more pairs are [supplementary, table 1]")
    g.add_argument("--sne-threshold", type=share, help="sne: pairs above this probability are positive [supplementary, table 1]")
    g.add_argument("--sne-temperature", type=number(float, 1e-6), help="sne: distances are divided by it; smaller: only the nearest count; changes the share of positive pairs more than the threshold [supplementary, table 1]")
    g.add_argument("--mix", choices=["ricap", "mixup", "none"], help="mixed samples: four patches; two images laid over each other; none: single crops [supplementary 1]")
    g.add_argument("--consistency", type=from_0, help="lambda, highest weight of the squared difference of two mixed samples' predictions; 0: without [supplementary, tables 1, 2]")
    g.add_argument("--ramp-up", type=number(int, 0), help="T, epochs over which that weight rises; 0: at once [supplementary, table 1]")
    g.add_argument("--classifier-layers", type=int, choices=[1, 2], default=1, help="linear layers from features to clusters [supplementary, table 2]")
    g.add_argument("--freeze-stages", type=number(int, 0), help="stages of the network that clustering leaves as they are: of a ResNet's 4, of other networks' convolutions [supplementary, table 3]")
    g.add_argument("--freeze-bn", action=YesNo, default=False, help="leave their batch-norm statistics, too, instead of letting them follow the data [code: follow]")
    g = p.add_argument_group("RotNet")
    g.add_argument("--pretrain", choices=["rotnet", "none"], help="what comes before clustering [supplementary 1, table 4]")
    g.add_argument("--pretrain-epochs", type=count, help="passes over the data, each image in all four rotations [supplementary 1]")
    g.add_argument("--pretrain-lr", type=from_0, help="learning rate [supplementary 1]")
    g.add_argument("--pretrain-lr-steps", type=count, nargs="*", help="epochs after which it is divided by five [supplementary 1]")
    g.add_argument("--pretrain-batch-size", type=count, help="images per step, each in four rotations [RotNet, code]")
    g.add_argument("--pretrain-wd", type=from_0, help="weight decay [RotNet, code]")
    # fmt: on
    typed, _ = p.parse_known_args(argv)
    vectors = typed.data.endswith(".npz")
    name = typed.recipe or (typed.data, "reuters")[vectors]
    recipe = RECIPES.get(f"{name}-{typed.arch}") or RECIPES.get(name) or photos(typed)
    p.set_defaults(wd=1e-4 if (typed.mix or recipe["mix"]) == "mixup" else 5e-4)
    p.set_defaults(**recipe)
    if not (typed.arch or "resnet").startswith("resnet"):
        p.set_defaults(freeze_stages=min(1, recipe["freeze_stages"]))  # LeNet-5 has two
    p.set_defaults(**({"lr": 1e-3} if typed.optimizer == "adam" else {}))
    p.set_defaults(**init_defaults(typed), **({"pretrain": "none"} if typed.init else {}))
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of --data or --recipe")
    args = p.parse_args(argv)
    if vectors != (args.arch == "mlp"):
        p.error(f"--arch {args.arch}: vectors (--data FILE.npz) take mlp, and images any other")
    crops = typed.consistency or typed.pad or typed.flip
    if vectors and (crops or args.mix == "ricap" or args.pretrain == "rotnet" or args.init):
        p.error("a vector has no crops: no --mix ricap, --pretrain, --init, --consistency, --pad, --flip ..")
    if args.labeling == "knn" and args.num_neighbors >= args.batch_size:
        p.error(f"--num-neighbors {args.num_neighbors}: a batch holds {args.batch_size - 1} others")
    if args.init and args.pretrain == "rotnet":
        p.error("--init takes the place of --pretrain rotnet")
    given = [name for name, value in vars(typed).items() if value is not None]
    for start, other, value in ONLY:
        if (unused := [x for x in given if x.startswith(start)]) and getattr(args, other) != value:
            p.error(f"--{unused[0].replace('_', '-')} is for --{other} {value}")
    if args.pretrain == "none":
        args.pretrain_epochs = args.pretrain_batch_size = 0
    args.image_size = 1 if vectors else args.image_size
    suffix = f"-{args.labeling}" * (args.labeling != recipe["labeling"])
    args.out = args.out or f"runs/lsdc-{Path(args.data).resolve().name.removesuffix('.npz')}{suffix}"
    return args


# %% network


class Network(nn.Module):
    """V views (B, C, S, S) -> features (B, D) of the first, no gradient; probabilities of clusters (V, B, K)."""

    def __init__(self, backbone, k, layers):
        super().__init__()
        self.features = nn.Sequential(backbone, nn.ReLU())  # a ResNet's are not below 0 anyway
        hidden = [nn.Linear(backbone.dim, backbone.dim), nn.ReLU()] * (layers - 1)
        self.classifier = nn.Sequential(*hidden, nn.Linear(backbone.dim, k))
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


def make_mlp(d):
    """Vectors (B, d, 1, 1) -> features (B, 2000) by layers of 500, 500 and 2000 units, before the last one's ReLU."""
    backbone, units = nn.Sequential(), [d, 500, 500, 2000]
    layers = [[nn.Linear(a, b), nn.BatchNorm1d(b), nn.ReLU()] for a, b in pairwise(units)]
    backbone.net = nn.Sequential(nn.Flatten(), *sum(layers, [])[:-1])
    backbone.dim, backbone.meta = units[-1], {"arch": "mlp", "channels": d}
    return backbone


def first_stages(net, stages):
    """The layers of the first stages: of a ResNet's four (its stem belongs to the first), of a plain network's
    convolutions (VGG's: those between two pools), of a perceptron's linear layers."""
    layers = list(getattr(net, "features", net).named_children())
    starts = [i for i, (name, _) in enumerate(layers) if name.startswith("layer")]
    starts = starts or [i for i, (_, layer) in enumerate(layers) if isinstance(layer, (nn.Conv2d, nn.Linear))]
    if len(starts) > 5:
        starts = [i for i in starts if i == 0 or isinstance(layers[i - 1][1], nn.MaxPool2d)]
    if stages > len(starts):
        error(f"--freeze-stages {stages}: this network has {len(starts)}")
    return [layer for _, layer in layers[: [0, *starts[1:], len(layers)][stages]]]


# %% the algorithm
# S (B, B) bool: which pairs are positive, from features z (B, D) without gradient; symmetric, each image with itself.
# Part m of mixed sample r is of image pi_m(r), with weight W_m: permutations (M, b), weights (M,), b <= B samples.


def squared_distances(z):
    """||z_i - z_j||^2 of all pairs, (B, B), from one product; centered first, which keeps it precise."""
    z = z - z.mean(0)
    norms = z.square().sum(1)
    return (norms[:, None] + norms - 2 * z @ z.T).clamp(min=0)


def knn_pairs(z, num_neighbors):
    """i ~ j if j is among the nearest `num_neighbors` others of i, or i among those of j [paper]."""
    distance = squared_distances(z).fill_diagonal_(-1)  # first comes the image itself
    near = distance.topk(num_neighbors + 1, largest=False).indices  # (B, num_neighbors + 1)
    positive = torch.zeros_like(distance, dtype=torch.bool).scatter_(1, near, True)
    return positive | positive.T


def cosine_pairs(z, threshold):
    """i ~ j if the cosine of z_i and z_j is at least the threshold [paper]."""
    z = F.normalize(z, dim=1)
    return (z @ z.T >= threshold).fill_diagonal_(True)


def sne_pairs(z, threshold, temperature):
    """i ~ j if (P_ij + P_ji) / 2 > threshold, P_i the softmax over j != i of -||z_i - z_j||^2 / temperature^2."""
    p = (-squared_distances(z) / temperature**2).fill_diagonal_(-math.inf).softmax(1)
    return ((p + p.T) / 2 > threshold).fill_diagonal_(True)


def pairwise_pseudo_labels(z, labeling, num_neighbors, cosine_threshold, sne_threshold, sne_temperature):
    """S by the labeling "knn", "cosine" or "sne"; each reads the numbers of its own name."""
    if labeling == "sne":
        return sne_pairs(z, sne_threshold, sne_temperature)
    return knn_pairs(z, num_neighbors) if labeling == "knn" else cosine_pairs(z, cosine_threshold)


def draw_mixture(kind, batch, size, rng, beta=0.3):
    """(permutations (M, B), weights (M,), (h, w) of RICAP's first patch) for --mix `kind`; size: of the images.

    RICAP: h and w are size * Beta(0.3, 0.3), rounded; patches are h x w, h x (size - w), .., and their areas are the
    weights [supplementary 1]; one of more than a quarter of the image is of image r itself [code]. MixUp: lambda from
    the same Beta, and 1 - lambda.
    """
    identity, cut = np.arange(batch), (0, 0)
    if kind == "none":
        permutations, weights = [identity], [1.0]
    elif kind == "mixup":
        weight = rng.beta(beta, beta)
        permutations, weights = [identity, rng.permutation(batch)], [weight, 1 - weight]
    else:
        cut = round(size * rng.beta(beta, beta)), round(size * rng.beta(beta, beta))
        weights = [high * wide / size**2 for high, wide in patches(cut, size)]
        permutations = [identity if weight > 1 / 4 else rng.permutation(batch) for weight in weights]
    return torch.from_numpy(np.stack(permutations)), torch.tensor(weights, dtype=torch.float32), cut


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


def mixup(images, permutations, weights):
    """sum over m of W_m images[pi_m], (b, ..): images (B, ..), permutations (M, b), weights (M,)."""
    return sum(weight * images[who] for who, weight in zip(permutations, weights.tolist(), strict=True))


def mixed_targets(positive, permutations, weights):
    """T[r, c] = sum over m of W_m S[pi_m(r), c], (b, B): how much of mixed sample r is close to image c."""
    return mixup(positive.float(), permutations, weights)


def pair_loss(mixed, clean, target):
    """Mean over all pairs of -[T log(P + 1e-7) + (1 - T) log(1 - P + 1e-7)], P[r, c] = mixed_r . clean_c.

    mixed (b, K) and clean (B, K) probabilities, target (b, B) in 0..1.
    """
    assert target.shape == (len(mixed), len(clean)), f"target is {tuple(target.shape)}"
    same = mixed @ clean.T
    same = same - (same - 1).clamp(min=0).detach()  # rounding lifts some above 1; clamp has no gradient
    apart, together = (1 - same + 1e-7).log(), (same + 1e-7).log()
    return -torch.lerp(apart, together, target).mean()  # (1 - T) apart + T together


def ramp(epoch, length):
    """w(t) / lambda = exp(-5 (1 - min(t, T) / T)^2), t = 0, 1, ..: from 0.007 to 1; T = 0: 1 [table 1, code]."""
    return math.exp(-5 * (1 - min(epoch, length) / length) ** 2) if length else 1.0


def rotate4(images):
    """The images by 0, 1, 2 and 3 quarters, one below the other, and by how many: (4 B, C, S, S), (4 B,) [RotNet]."""
    turned = torch.cat([images.rot90(quarters, (2, 3)) for quarters in range(4)])
    return turned, torch.arange(4, device=images.device).repeat_interleave(len(images))


# %% one epoch


@dataclass(frozen=True)
class PaddedView(View):
    """Random crops out of the center crop with `pad` black pixels around it, as is usual for CIFAR."""

    pad: int = 0

    def crop_file(self, image):
        image = v2.RandomCrop(self.size, padding=self.pad)(center_crop(image, self.size, self.center))
        return v2.functional.pil_to_tensor(v2.RandomHorizontalFlip(self.flip)(image))

    def crop(self, pixels):
        images = F.pad(center_crop(pixels, self.size, self.center), [self.pad] * 4)
        b, steps = len(images), torch.arange(self.size, device=images.device)
        rows, columns = torch.randint(2 * self.pad + 1, (2, b, 1), device=steps.device) + steps  # (b, S)
        columns = torch.where(torch.rand(b, 1, device=steps.device) < self.flip, columns.flip(1), columns)
        each = torch.arange(b, device=steps.device)[:, None, None]
        return images[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2) / 255


class GatherWithGradient(torch.autograd.Function):
    """all_gather whose rows get the sum of the gradients that all processes found for them: where each averages its
    own part of the loss, parallel()'s mean over the processes is then the gradient of the whole batch's loss."""

    @staticmethod
    def forward(ctx, x):
        return all_gather(x, equal=True)

    @staticmethod
    def backward(ctx, gradient):
        return all_reduce_sum(gradient)[slice(*shard(len(gradient)))]


def train_rotnet(net, optimizer, batches, meter, args):
    """Cross-entropy over the four rotations of each image; the epoch's mean loss and rotation accuracy."""
    right = 0
    net.train()
    for index, (images,) in batches:
        turned, quarters = rotate4(images)
        with autocast(images.device, args.amp):
            logits = net(turned)  # (4 b, 4)
        loss = F.cross_entropy(logits.float(), quarters)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        right += (logits.argmax(1) == quarters).double().mean()
        meter.add(len(index), loss)
    accuracy = all_reduce_sum(right / meter.steps).item() / meter.world
    return {"loss": meter.mean_loss(), "uniform": math.log(4), "rotation_accuracy": accuracy}


def mix(views, rng, args):
    """Views (b, C, S, S) of this process's images, mixed with everyone's; permutations (M, b), weights (M,)."""
    permutations, weights, cut = draw_mixture(args.mix, args.batch_size, args.image_size, rng)
    corners = rng.random((len(views), 4, 2))
    permutations = permutations[:, slice(*shard(args.batch_size))].to(views[0].device)  # those of our images
    views = [all_gather(images, equal=True) for images in views]  # (B, C, S, S)
    if args.mix == "ricap":
        views = [ricap(x, permutations, cut, where) for x, where in zip(views, corners, strict=True)]
    else:
        views = [mixup(images, permutations, weights) for images in views]
    return views, permutations, weights


def train(net, optimizer, batches, labels, weight, rng, meter, args):
    """Steps of clustering with w(t) = weight; the epoch's record. labels (n,): for its `purity` alone, -1 unknown."""
    numbers, sums = (args.num_neighbors, args.cosine_threshold, args.sne_threshold, args.sne_temperature), 0
    net.train()
    for index, (clean, *others) in batches:
        mixed, permutations, weights = mix(others, rng, args)  # two of (b, C, S, S)
        with autocast(clean.device, args.amp):
            z, p = net([clean, *mixed])  # (b, D), (3, b, K)
        positive = pairwise_pseudo_labels(all_gather(z, equal=True), args.labeling, *numbers)  # (B, B)
        target = mixed_targets(positive, permutations, weights)  # (b, B)
        pairs = pair_loss(p[1], GatherWithGradient.apply(p[0]), target)  # ours with everyone's
        consistency = F.mse_loss(p[1], p[2])
        loss = pairs + weight * consistency
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        known = labels[all_gather(index, equal=True)]  # (B,)
        right = positive & (known[:, None] == known)
        terms = [pairs.detach(), consistency.detach(), positive.sum() - len(known), right.sum() - len(known)]
        sums += torch.stack([x.double() for x in terms])  # pairs of two images alone
        meter.add(len(index), loss)
    pairs, consistency, positive, right = (all_reduce_sum(sums) / (meter.steps * meter.world)).tolist()
    record = {"loss": meter.mean_loss(), "loss_pairs": pairs, "loss_consistency": consistency}
    record["positive"] = positive / (args.batch_size**2 - args.batch_size)  # share of the pairs
    if labels.min() >= 0 and positive:
        record["purity"] = right / positive  # share of the positive pairs that are of one class
    share = (positive + args.batch_size) / args.batch_size**2  # each image with itself, too
    record["uniform"] = share * math.log(args.k) - (1 - share) * math.log(1 - 1 / args.k + 1e-7)
    return record


def labelled(data, where):
    """The parts {name: positions} that have labels, without files that could not be read."""
    known = data.without_unreadable(data.labels) >= 0
    return {name: index[known[index]] for name, index in where.items() if data.labels[index].min() >= 0}


def kmeans_scores(features, loader, learn, where, args):
    """label_scores, by part, of k-means on features as they are; its centroids from the first `learn` images."""
    data, own = loader.data, torch.arange(*shard(len(loader.data)))
    if data.labels.max() < 0:
        return {}
    z = extract(features, loader, own)
    centroids = kmeans(z[own < learn], args.k, generator(args.seed, "baselines"))[2]
    assign = all_gather(nearest(z, centroids)[1][:, 0]).cpu()
    return {name: label_scores(data.labels[i], assign[i]) for name, i in labelled(data, where).items()}


def evaluate(net, loader, where, args):
    """Clusters of all center crops (N,), their probabilities (N,), and {sizes, scores by part, share of confident
    images and of the right ones among them, with clusters as they fit the part's classes best}."""
    data, whole = loader.data, nn.Sequential(net.features, net.classifier)
    own, top = torch.arange(*shard(len(data))), lambda logits: torch.stack(logits.softmax(1).max(1), 1)
    top, assign = all_gather(extract(whole, loader, own, top)).cpu().T
    assign = assign.long()  # float32 counts clusters up to 16 million
    found = {**cluster_sizes(assign, args.k), "scores": {}, "confident": {}}
    for name, index in where.items():
        found["confident"][name] = {"share": (top[index] > CONFIDENT).double().mean().item()}
    for name, index in labelled(data, where).items():
        found["scores"][name] = label_scores(data.labels[index], assign[index])
        _, class_of = confusion(data, assign, args.k, index)
        right = (class_of[assign[index]] == data.labels[index])[top[index] > CONFIDENT]
        found["confident"][name] |= {"accuracy": right.double().mean().item()} if len(right) else {}
    return assign, top, found


def confusion(data, assign, k, index):
    """(images of each class in each cluster (classes, K), class of each cluster (K,): one to one, best for most; -1)."""
    cells = data.labels[index] * k + assign[index]
    table = torch.bincount(cells, minlength=len(data.classes) * k).view(-1, k)
    class_of, (rows, columns) = torch.full((k,), -1), linear_sum_assignment(table, maximize=True)
    class_of[columns] = torch.from_numpy(rows)
    return table, class_of


# %% main

# Shown of each epoch; uniform is the loss of a uniform prediction, acc_labels that of test images, if there are some.
SCORES = ("acc_labels", "nmi_labels", "ari_labels")
SHOWN = ("epoch", "phase", "loss", "uniform", "rotation_accuracy", "positive", "acc_labels")


def load(name, root, normalize):
    """All images, the training set first, -1 the label of those without; positions of "train", "test" and "both"."""
    train, test = (load_vectors(name), None) if name.endswith(".npz") else load_data(name, root, normalize)
    data, parts, n = copy.copy(train), [train, test] if test else [train], len(train)
    data.labels = torch.cat([torch.full((len(x),), -1) if x.labels is None else x.labels for x in parts])
    both = torch.arange(len(data.labels))
    if not test:
        return data, {"train": both}
    data.paths = train.paths and [*train.paths, *test.paths]
    data.unreadable = train.unreadable | {n + i for i in test.unreadable}
    shapes = {None if x.pixels is None else x.pixels.shape[1:] for x in parts}
    data.pixels = torch.cat([x.pixels for x in parts]) if len(shapes) == 1 and None not in shapes else None
    return data, {"train": both[:n], "test": both[n:], "both": both}


def load_vectors(path):
    """The rows of the array `features` of an .npz file as Images of one pixel, with its `labels` if it has some."""
    try:
        with np.load(path, allow_pickle=False) as file:
            features, labels = file["features"], file.get("labels")
        if features.ndim != 2 or features.dtype.kind not in "fiu" or not features.size:
            raise ValueError(f"features must be numbers (N, D), not {features.dtype} {features.shape}")
        if labels is not None and labels.shape != features.shape[:1]:
            raise ValueError(f"labels must be ({len(features)},), one for each row, not {labels.shape}")
        pixels = torch.from_numpy(features.astype(np.float32))[:, :, None, None]
        if not pixels.isfinite().all():
            raise ValueError("features that are NaN or infinite")
        names, labels = ([], None) if labels is None else np.unique(labels, return_inverse=True)
    except Exception as problem:  # no file, no zip, a pickle ..
        error(f"--data {path}: {problem}")
    labels, d = labels if labels is None else torch.from_numpy(labels).long(), features.shape[1]
    # A View divides pixels by 255; with this mean and deviation vectors are as they were.
    return Images(path, pixels, None, labels, list(map(str, names)), (0.0,) * d, (1 / 255,) * d)


def pretrain(run, backbone, loader, view, learn, baselines, args):
    """RotNet, the first phase: those of its epochs that are not done yet. Leaves rotnet.pt."""
    net, done = nn.Sequential(backbone, nn.ReLU(), nn.Linear(backbone.dim, 4)).to(loader.device), 0
    how = {"momentum": 0.9, "nesterov": True, "weight_decay": args.pretrain_wd}  # [RotNet, code]
    optimizer = torch.optim.SGD(net.parameters(), args.pretrain_lr, **how)
    if run.state:
        done = run.state["epoch"]
        net.load_state_dict(run.state["rotnet"])
        optimizer.load_state_dict(run.state["optimizer"])
    trained = parallel(torch.compile(net) if args.compile else net)
    for epoch in range(done, args.pretrain_epochs):
        began, gen = time.time(), seed_epoch(args.seed, epoch)
        lr = args.pretrain_lr * 0.2 ** sum(epoch >= step for step in args.pretrain_lr_steps)
        optimizer.param_groups[0]["lr"] = lr
        batches = loader.train(torch.randperm(learn, generator=gen), [view])
        meter = Meter(f"RotNet {epoch + 1}/{args.pretrain_epochs}", learn // loader.world)
        record = {"epoch": epoch + 1, "epochs": args.pretrain_epochs, "phase": "rotnet", "lr": lr}
        record |= train_rotnet(trained, optimizer, batches, meter, args)
        run.end_epoch({**record, "seconds": time.time() - began}, *SHOWN)
        state = {
            "epoch": epoch + 1,
            "rotnet": net.state_dict(),  # clustering starts with its backbone
            "optimizer": optimizer.state_dict(),
            "baselines": baselines,
        }
        run.save(state, backbone, loader)
    run.save_backbone("rotnet.pt", "rotnet", backbone, loader)


def load_model(run, device):
    """What clusters images as a finished run did, see assign_folder."""
    if read_backbone(run)["meta"]["arch"] == "mlp":
        error(f"{run} clusters vectors: --assign is for images")
    backbone, saved = load_backbone(run)[0], load_file(run / "clustering.pt")["classifier"]
    net = Network(backbone, len(list(saved.values())[-1]), len(saved) // 2).to(device)
    net.classifier.load_state_dict(saved)

    def decide(z):
        probability, clusters = net.classifier(z).softmax(1).max(1, keepdim=True)
        return 1 - probability, clusters

    return net.features, lambda z: z, decide


def main():
    args = options()
    if args.assign:
        return assign_folder(args, load_model, load)
    device = setup(args.device)
    data, where = load(args.data, args.root, args.normalize)
    learn = len(where.get(args.train_on, data))  # the first so many
    if max(args.k, args.batch_size, args.pretrain_batch_size) > learn:
        error(f"{learn} images to learn from: too few for --k, --batch-size or --pretrain-batch-size")

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    kind = {"dropout": 0.0, "pool": True, "norm": True, "pool_shortcuts": True}
    backbone = make_mlp(len(data.mean)) if args.arch == "mlp" else make_backbone(args, len(data.mean), **kind)
    net = to_device(Network(backbone, args.k, args.classifier_layers), device)
    frozen = first_stages(backbone.net, args.freeze_stages)
    how, steps = (args.image_size, args.center_fraction, device, args.workers), learn // args.batch_size
    loader = Loader(data, args.batch_size, *how)
    view = View(args.image_size, area=(args.crop_area, 1.0), flip=0.5 * args.flip)
    if args.pad:
        view = PaddedView(args.image_size, center=args.center_fraction, flip=0.5 * args.flip, pad=args.pad)
    view = loader.center if args.arch == "mlp" else view
    print_once(f"{data}, K = {args.k}, {learn} of them to learn from, {steps} steps an epoch, on {device}")

    run = Run("lsdc", args, data, may_change={"recipe"})
    if run.finished:
        return
    state, given = run.state or {}, (loader, learn, where, args)
    baselines = state.get("baselines", {})
    if not state and len(data) <= 100_000:
        random = Backbone(**backbone.meta, dropout=0.0) if args.init else copy.deepcopy(backbone)
        random = fill_batch_norm(to_device(random, device), loader, torch.arange(min(256, len(data))))
        baselines["random network"] = kmeans_scores(nn.Sequential(random, nn.ReLU()), *given)
        baselines["pixels"] = kmeans_scores(pixel_net(args.image_size), *given)
    if args.pretrain_epochs and "net" not in state:
        rotnet_loader = Loader(data, args.pretrain_batch_size, *how)
        pretrain(run, backbone, rotnet_loader, view, learn, baselines, args)
    if (args.pretrain_epochs or args.init) and "net" not in state:
        baselines["RotNet" if args.pretrain_epochs else args.start] = kmeans_scores(net.features, *given)

    nn.ModuleList(frozen).requires_grad_(False)
    net.still = frozen if args.freeze_bn else []
    weights = [w for w in net.parameters() if w.requires_grad]
    optimizer = torch.optim.SGD(weights, args.lr, args.momentum, weight_decay=args.wd)
    if args.optimizer == "adam":
        optimizer = torch.optim.Adam(weights, args.lr, weight_decay=args.wd)
    done, assign = args.pretrain_epochs, None
    if "net" in state:
        done, assign = state["epoch"], state["assign"]
        net.load_state_dict(state["net"])
        optimizer.load_state_dict(state["optimizer"])
    trained = parallel(torch.compile(net) if args.compile else net)

    for epoch in range(done, args.pretrain_epochs + args.epochs):
        began, gen, number = time.time(), seed_epoch(args.seed, epoch), epoch - args.pretrain_epochs
        lr = args.lr * 0.1 ** sum(number >= step for step in args.lr_steps)
        optimizer.param_groups[0]["lr"] = lr
        weight = args.consistency * ramp(number, args.ramp_up)
        order, rng = torch.randperm(learn, generator=gen), np.random.default_rng(gen.initial_seed())
        record = {"epoch": number + 1, "epochs": args.epochs, "phase": "lsdc", "lr": lr, "weight": weight}
        batches = loader.train(order, [view] * 3)
        meter = Meter(f"epoch {number + 1}/{args.epochs}", steps * loader.b)
        record |= train(trained, optimizer, batches, data.labels[:learn].to(device), weight, rng, meter, args)
        if (number + 1) % args.score_every == 0 or number + 1 == args.epochs:
            before, (assign, _, found) = assign, evaluate(net, loader, where, args)
            record |= {**found, **found["scores"].get("test", found["scores"].get("train", {}))}
            record |= {} if before is None else {"nmi_previous": nmi(before, assign)}
        run.end_epoch({**record, "seconds": time.time() - began}, *SHOWN)
        if number == 0 and args.k > 1 and not 0.03 / args.k < record["positive"] < 1.5 / args.k:
            print_once(f"WARNING: with labels about {1 / args.k:.1%} would be positive; see --labeling")
        state = {
            "epoch": epoch + 1,  # those of RotNet among them
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "assign": assign,  # (N,) clusters when they were last looked at
            "baselines": baselines,  # scores of k-means before clustering
        }
        run.save(state, backbone, loader)
    finish(run, net, loader, where, baselines, args)
    torch.distributed.destroy_process_group()


def finish(run, net, loader, where, baselines, args):
    """Cluster all center crops, score them, write and print what the run leaves behind."""
    data, (assign, top, found) = loader.data, evaluate(net, loader, where, args)
    save_file(run.out / "clustering.pt", {"classifier": net.classifier.state_dict()})
    save_clusters(run.out, loader, assign, 1 - top, args.k, args.arch != "mlp")  # most confident first
    result = {**found, "baselines": baselines}
    if 0 < len(data.classes) * args.k <= 10_000:
        table, class_of = confusion(data, assign, args.k, data.without_unreadable(data.labels) >= 0)
        result["confusion"] = table.tolist()  # classes in rows
    run.log({"result": result})
    if is_main() and "confusion" in result and args.k <= 100:
        draw(draw_confusion, run.out / "confusion.png", table, class_of, data.classes)
    for name, sure in found["confident"].items():
        right = f", {sure['accuracy']:.1%} of them right" if "accuracy" in sure else ""
        print_once(f"{name}: {sure['share']:.1%} of the images have p > {CONFIDENT}{right}")
    for name, ours in found["scores"].items():
        rows = {"LSD-C": ours} | {other: parts[name] for other, parts in baselines.items()}
        words = [f"{who} {' / '.join(f'{100 * row[s]:.1f}' for s in SCORES)}" for who, row in rows.items()]
        print_once(f"{name} images in {args.k} clusters, ACC / NMI / ARI in %:\n{', '.join(words)}")
    print_once(f"which image is in which cluster: {run.out}/assignments.csv, and pictures beside it")


def draw_confusion(path, table, class_of, classes):
    """Classes and clusters (classes, K), these in the order of their classes; darker: a larger share of a row."""
    from matplotlib.figure import Figure

    names = [name if name.isascii() else i for i, name in enumerate(classes)]  # what every font has
    order = class_of.remainder(2**62).argsort(stable=True).tolist()  # -1, of no class: last
    figure = Figure((2 + 0.5 * len(order), 2 + 0.4 * len(names)), layout="tight")
    counts, axis = table[:, order].numpy(), figure.subplots()
    axis.imshow(counts / counts.sum(1, keepdims=True).clip(1), cmap="Blues", vmax=2, aspect="auto")
    axis.set(xlabel="cluster", ylabel="class")
    axis.set_xticks(range(len(order)), order)
    axis.set_yticks(range(len(names)), names, parse_math=False)
    for (row, column), count in np.ndenumerate(counts):
        axis.text(column, row, count, ha="center", va="center", size=7)
    figure.savefig(path)


if __name__ == "__main__":
    main()
