"""Evaluation with labels: linear probes on every stage of a frozen network, nearest neighbors, fine-tuning.

Probes of DeepCluster (Caron et al., ECCV 2018, 4.3 and code), Local Aggregation (Zhuang et al., ICCV 2019, supplementary
2.1 and code) and CoKe (Qian et al., CVPR 2022, code), whose supplementary 2.3 has --finetune. kNN: Wu et al., CVPR 2018.

    each batch:  x_s = pool(map of stage s)          (B, D_s)      frozen, evaluation mode
                 logits_sw = linear_sw(x_s)          (S, W, B, K)  for every stage s and weight decay w
                 loss = sum over s, w of cross-entropy(logits_sw, label): one backward for all
    at the end:  for each stage the w that is best on held-out training images; its accuracy on the test images

    --finetune:  logits = linear(relu(net(images))), training mode, all layers, for each learning rate and weight decay;
                 the pair that is best on held-out training images; its accuracy on the test images

Symbols: B batch (--batch-size, over all processes), S stages, W weight decays (--wd), K classes, D features.

    python eval_linear.py runs/deepcluster-digits                    laptop: a run folder or a backbone.pt
    python eval_linear.py --pixels --data digits                     the raw pixels: the lowest row of a table
    python eval_linear.py --random lenet5 --data digits              the random network: the next one
    python eval_linear.py --random lenet5 --data digits --finetune   the supervised network: the upper row
    python eval_linear.py RUN --data svhn --knn-only                 on other data than it was trained on, no probes
    torchrun --nproc_per_node=8 eval_linear.py runs/deepcluster-imagenet

The protocol is that of the method that the file names; up to 64 pixels, where no paper has one, and for other methods
DeepCluster's. REPORT is the number to report: last epoch, test images, ten crops (DeepCluster's and Local Aggregation's,
after training on random crops) or the center crop. kNN compares last features (of ResNets their average) and the
embedding, if the file has one. Files that cannot be read are neither trained on nor counted.

What to expect: on digits, 10 s on a core, --random lenet5 (seeds 0 to 3): conv1 97.4, conv2 97.5, kNN 96.5 with K=1;
pixels: probe 95.8, kNN 99.2; --finetune, a minute: 92.2, for its crops hide much of a digit.

Departs from the papers and their code, on purpose:
 1. All stages and weight decays train in one pass. Classifiers of frozen features start at zero. An epoch's last
    incomplete batch is dropped. An evaluation is not resumed; what it has is written before kNN.
 2. DeepCluster: the weight decay is chosen on --held-out of the training images, and the classifier is not trained
    again with them; the best epoch, too (the code: on test images). Other networks than AlexNet at 224 pixels: maps are
    averaged to s x s, s = sqrt(9600 / channels) rounded down, but no more than they have.
 3. A labelled folder without val/ or test/: a fifth of its images, the same for all seeds, is the test set.
 4. --random: batch norm gets the statistics of 256 training images: the stronger baseline (--no-fill-batch-norm).
 5. Named sets have 20 epochs [Deep Dive 3.3], on every stage instead of the topmost alone, and no flips in digits,
    mnist and svhn, where flipped images are other classes. --pixels sees whole images, at 32x32 unless told.
 6. On GPUs networks run in bf16 autocast (--no-amp), classifiers and losses in float32, kNN's features in TF32.
 7. Local Aggregation: all training images train, nothing is chosen; networks that are not in the paper have ResNet's
    schedule. The code never pools AlexNet's maps (its conv1 has 186,624 features, ours 290,400: averaged by 2) and
    crops AlexNet's images in the middle square (the paper: anywhere). Places: --crops alexnet for all networks.
 8. CoKe: the code's schedule and crops of ImageNet for all data. Networks other than ResNets are probed on their last
    hidden layer before its ReLU; two views and other methods have its rate for multi view, 0.4.
 9. --finetune: the paper gives the grid and the factor 10 of the last layer; the rest is ours: 20 epochs of batches of
    256, momentum 0.9, cosine by the step, crops of area 0.08 to 1 (0.3 to 1 up to 64 pixels), a ReLU before the last
    layer. A pair whose loss is not finite is given up. On CPUs each process normalizes its own part of a batch.
10. Random crops of data in memory are bilinear without antialiasing; squares are cut out before they are resized.
"""

import copy
import csv
import json
import math
import time
from argparse import BooleanOptionalAction as YesNo
from functools import partial
from itertools import product
from pathlib import Path

from common import (  # isort: skip
    ARCHS, SETS, Backbone, Loader, Meter, View, all_gather, all_reduce_sum, autocast, error, extract, fill_batch_norm,
    generator, is_main, knn_accuracy, load_backbone, load_data, look_at, make_parser, number, parallel,
    print_once, read_backbone, seed_epoch, setup, shard, to_device, what_runs,
)  # fmt: skip

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torchvision.transforms.v2 import functional as tv

# %% recipes and options
# What the data and the protocol bring; flags override. A trained network brings its own size, center crop and Sobel.

SMALL = {"image_size": 32, "center_fraction": 1.0, "sobel": False, "flip": True}
RECIPES = {
    "imagenet": {"image_size": 224, "center_fraction": 0.875, "sobel": True, "flip": True},  # and folders
    "fashionmnist": {**SMALL, "center_fraction": 0.73},
    "svhn": {**SMALL, "center_fraction": 0.73, "sobel": True, "flip": False},
    "cifar10": {**SMALL, "center_fraction": 0.73, "sobel": True},
    "cifar100-20": {**SMALL, "sobel": True},
    "stl10": {**SMALL, "sobel": True},
    "mnist": {**SMALL, "flip": False},
    "digits": {**SMALL, "flip": False},
}
# fmt: off
PROTOCOLS = {  # crops: above 64 pixels, and up to that
    "deepcluster": {"batch_size": 256, "epochs": 90, "lr": [0.01], "wd": [1e-3, 1e-4, 1e-5, 1e-6], "held_out": 0.1, "crops": ("central", "center")},
    "la": {"batch_size": 128, "epochs": 70, "lr": [0.01], "lr_steps": [30, 60], "wd": [1e-4], "held_out": 0.0, "crops": ("resnet", "resnet")},
    "la-vgg16": {"epochs": 51, "lr_steps": [11, 41]},
    "la-alexnet": {"epochs": 65, "lr_steps": [45, 55], "wd": [0.0], "crops": ("alexnet", "alexnet")},
    "coke": {"batch_size": 1024, "epochs": 90, "lr": [0.4], "wd": [1e-6], "held_out": 0.0, "crops": ("imagenet", "imagenet")},
    "coke-coke-1": {"lr": [0.2]},  # trained with one view
    "finetune": {"batch_size": 256, "epochs": 20, "lr": [1.0, 0.1, 0.01, 0.001], "wd": [1e-5, 1e-6, 0.0], "held_out": 0.1, "crops": ("imagenet", "cifar")},
}
# fmt: on
OWN = {"local_aggregation": "la", "coke": "coke"}  # method -> its paper's protocol
AREAS = {"resnet": 0.2, "imagenet": 0.08, "cifar": 0.3}  # --crops -> smallest share of the image


def options(argv=None):
    """The command line as a namespace."""
    p = make_parser("Linear probes on every stage of a frozen network, and kNN; or fine-tuning", trains=False)
    # fmt: off
    p.add_argument("run", nargs="?", help="run folder, backbone.pt or others' checkpoint (see --init of the methods) to evaluate, imagenet-resnet50 for torchvision's; else --random or --pixels")
    g = p.add_argument_group("evaluation")
    g.add_argument("--random", metavar="ARCH", choices=ARCHS, help=f"a random network, the one from which deepcluster.py starts with this --seed; with --finetune the supervised row: {', '.join(ARCHS)}")
    g.add_argument("--pixels", action="store_true", help="no network: kNN and a probe of the images themselves")
    g.add_argument("--protocol", choices=["deepcluster", "la", "coke"], help="of the probes; by default of the method that trained the network. la: whole maps, averaged by 2 or 4 if above 200,000 features; coke: the network's output, of ResNets the average of the last map")
    g.add_argument("--finetune", action="store_true", help="train all layers, the new last one at 10 times the rate, for each pair of --lr and --wd [CoKe, supplementary 2.3]")
    g.add_argument("--knn", action=YesNo, default=True, help="nearest neighbors, K = 1 and weighted 200, among center crops of the training images; not with --finetune")
    g.add_argument("--knn-only", action="store_true", help="no probes")
    g.add_argument("--features", metavar="FILE", help="evaluate nothing, but write what is known of all images into an .npz: features (N, D), labels, clusters (-1: none), images (file names), split")
    g.add_argument("--ten-crops", action=YesNo, help="test on corners and center, flipped and not, too; None: if training crops are random and flipped, for a classifier that saw no such images fails on them; not with --finetune")
    g.add_argument("--held-out", type=number(float, 0, 0.99), help="share of the training images that choose: weight decay and best epoch, with --finetune learning rate and weight decay")
    g.add_argument("--fill-batch-norm", action=YesNo, default=True, help="with --random: batch-norm statistics of 256 training images, not 0 and 1; --finetune makes its own")
    g.add_argument("--sobel", action=YesNo, help="with --random: filter images by Sobel's operator")
    g.add_argument("--image-size", type=number(int, 1, 4096), help="with --random or --pixels: side of the square that is seen, in pixels; None: the data set's, 224 or 32, but no more than a folder's files have")
    g = p.add_argument_group("training")
    g.add_argument("--epochs", type=number(int, 1), help="passes over the training images, with --finetune for each pair")
    g.add_argument("--batch-size", type=number(int, 1), help="images per step, over all processes")
    g.add_argument("--lr", type=number(float, 0), nargs="+", help="learning rate, with --finetune several; falls as lr / sqrt(1 + lr wd t), t the step; la: in --lr-steps; coke: cosine by the epoch; --finetune: cosine by the step")
    g.add_argument("--lr-steps", type=number(int, 0), nargs="*", help="epochs after which a probe's learning rate is divided by ten, instead of falling otherwise")
    g.add_argument("--wd", type=number(float, 0), nargs="+", help="weight decays to choose from, for each stage its own [DeepCluster 4.3: cross-validated; the grid is ours]")
    g.add_argument("--flip", action=YesNo, help="flip half of the training images horizontally")
    g.add_argument("--crops", choices=["center", "central", "alexnet", *AREAS], help="training crops: the center; a random square of --center-fraction in the middle square [DeepCluster, code] or (alexnet) anywhere; area 0.2 to 1 (resnet), both [Local Aggregation]; 0.08 to 1 (imagenet) or 0.3 to 1 (cifar) [CoKe]")
    g.add_argument("--center-fraction", type=number(float, 0.01, 1), help="share of the shorter side that a center crop keeps; 0.875: 224 of 256 pixels")
    # fmt: on
    otherwise = p.get_default("data")
    p.set_defaults(data=None)
    known, _ = p.parse_known_args(argv)
    meta = read_backbone(known.run)["meta"] if known.run else {"data": otherwise}
    data = known.data or meta["data"]
    recipe = RECIPES.get(data, RECIPES["imagenet"])
    if not known.run:
        meta = {**(SMALL if known.pixels else recipe), "arch": known.random or "pixels", "method": "random"}
        side = look_at(data)[1] if data not in SETS else 0  # of a folder's files: they are not enlarged
        meta["image_size"] = known.image_size or min(meta["image_size"], side or 224)
    elif meta["arch"] not in ARCHS:
        error(f"{known.run}: a network ({meta['arch']}) for vectors; this script evaluates those for images")
    small = meta["image_size"] <= 64
    own = "deepcluster" if small else OWN.get(meta["method"].split("-")[0], "deepcluster")
    name = "finetune" if known.finetune else known.protocol or own
    p.set_defaults(data=data, flip=recipe["flip"], arch=meta["arch"], protocol=name)
    p.set_defaults(**{key: meta[key] for key in ("image_size", "center_fraction", "sobel")})
    for variant in (name, f"{name}-{meta['arch']}", f"{name}-{meta['method']}"):
        p.set_defaults(**PROTOCOLS.get(variant, {}))
    p.set_defaults(crops=p.get_default("crops")[small])
    if name == "deepcluster" and data in SETS:
        p.set_defaults(epochs=20)
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of what is evaluated")
    args = p.parse_args(argv)
    if bool(args.run) + bool(args.random) + args.pixels != 1:
        p.error("give a run folder or backbone.pt to evaluate, or --random ARCH, or --pixels")
    if known.sobel is not None and not args.random or known.image_size and args.run:
        p.error("--image-size and --sobel go with --random; a trained network has its own")
    if args.finetune and (known.protocol or known.lr_steps is not None or args.pixels or args.knn_only):
        p.error("--finetune has a schedule of its own: not with --protocol, --lr-steps, --pixels, --knn-only")
    if not args.finetune and (len(args.lr) > 1 or args.compile):
        p.error("several --lr, and --compile, go with --finetune")
    if not args.held_out and max(len(args.wd), len(args.lr)) > 1:
        p.error("--held-out 0 leaves nothing to choose by: give one --wd and one --lr")
    run = Path(args.run or args.random or "pixels")
    run = run.parent if run.name == "backbone.pt" else run  # others' files have no folder of their own
    run = run if run.is_dir() else Path(f"runs/eval-{run.stem}-{Path(data).resolve().name}")
    args.out = args.out or str(run)
    seen = args.crops != "center" and args.flip and not args.finetune
    args.ten_crops, args.meta = seen if args.ten_crops is None else args.ten_crops, meta
    return args


# %% network and data


def make_network(args, channels):
    """(network, {space: what follows the last features where neighbors are compared})."""
    saved, spaces = read_backbone(args.run) if args.run else {}, {"last feature": nn.Identity()}
    torch.manual_seed(args.seed)
    net = nn.Sequential()
    if args.random:
        net = Backbone(args.random, channels, args.image_size, args.sobel, pool=True)
    elif args.pixels:
        net.sobel, net.net = nn.Identity(), nn.Sequential()
        net.net.features, net.net.flatten = nn.Sequential(nn.Identity()), nn.Flatten()
    else:
        net = load_backbone(args.run, pool=True)[0]
    if "embedding" in saved:
        linear = nn.Linear(*saved["embedding"]["weight"].T.shape)
        linear.load_state_dict(saved["embedding"])
        spaces["embedding"] = nn.Sequential(nn.ReLU(), linear)
    return net, spaces


def load_splits(args, device):
    """(images to train on, their positions, images to test on, their positions), fed as the network was trained."""
    train, test = load_data(args.data, args.root, normalization(args))
    for data in filter(None, (train, test)):
        if data.labels is None:
            error(f"--data {args.data} has no labels, and a classifier needs them: one sub-folder per class")
        data.labels = data.labels.to(device)
    if test:
        return train, torch.arange(len(train)), test, torch.arange(len(test))
    order = torch.randperm(len(train), generator=generator("test split"))
    fifth = max(1, len(train) // 5)
    print_once(f"{args.data} has no val/ or test/: {fifth} of its {len(train)} images are the test set")
    return train, order[fifth:], train, order[:fifth]


def normalization(args):
    """(mean, std) by which the trained network was fed, or None."""
    return (args.meta["mean"], args.meta["std"]) if args.run else None


def write_features(args, device):
    """--features: last features of center crops with what else is known of the images, those to train on first."""
    parts, found, clusters = list(filter(None, load_data(args.data, args.root, normalization(args)))), [], []
    if (path := Path(args.run or "", "assignments.csv")).is_file():
        with open(path, newline="", encoding="utf-8", errors="surrogateescape") as file:
            clusters = [(Path(name).name, cluster) for name, cluster in csv.reader(file)][1:]
    net = to_device(make_network(args, len(parts[0].mean))[0], device)
    for split, data, first in zip(("train", "test"), parts, (0, len(parts[0])), strict=False):
        n = len(data)
        how = args.batch_size, args.image_size, args.center_fraction, device, args.workers, False
        rows = all_gather(extract(net, Loader(data, *how), torch.arange(*shard(n)))).cpu()
        images = data.paths or [str(i) for i in range(first, first + n)]
        labels = torch.full((n,), -1) if data.labels is None else data.labels
        known = dict(enumerate(clusters[first:]))  # an image's by its place, if its name is there, too
        known = [c if Path(images[i]).name == name else "" for i, (name, c) in sorted(known.items())[:n]]
        ids = [int(c) if c.isdecimal() else -1 for c in [*known, *[""] * (n - len(known))]]
        part = {"features": rows, "labels": labels, "clusters": ids, "images": images}
        found.append(part | {"split": [split] * n})
    found = {name: np.concatenate([part[name] for part in found]) for name in found[0]}
    if is_main():
        np.savez(args.features, **found)
    print_once(f"{args.features}: {', '.join(f'{name} {x.shape}' for name, x in found.items())}")
    torch.distributed.destroy_process_group()


def labels_of(data, index):
    """Classes (n,) of the images `index`; -100, which counts nowhere, for files that could not be read."""
    index = index.to(data.labels.device)
    bad = torch.tensor(sorted(data.unreadable), dtype=torch.int64, device=index.device)
    return data.labels[index].masked_fill(torch.isin(index, bad), -100)


class TenCrops(View):
    """Corners and center, of the image and of the flipped one, each the share `center` of the shorter side: (b, 10, C, S, S)."""

    def squares(self, image):
        squares = tv.ten_crop(image, max(1, round(self.center * min(tv.get_size(image)))))
        return [tv.resize(square, [self.size] * 2, antialias=True) for square in squares]

    def crop_file(self, image):
        return torch.stack([tv.pil_to_tensor(square) for square in self.squares(image)])

    def crop(self, pixels):
        return torch.stack(self.squares(pixels), 1) / 255


# %% the algorithm

ALEXNET_POOLS = {  # kernel = stride, padding: 9600, 9216, 9600, 9600, 9216 features [DeepCluster, code]
    "conv1": (6, 3), "conv2": (4, 0), "conv3": (3, 1), "conv4": (3, 1), "conv5": (2, 0),
}  # fmt: skip


def stages(net):
    """(layers in their order, {position: name of the stage that ends there}): after each ReLU, if these are more than
    five (VGG) only before a pool; of ResNets after the stem and its pool, and after each of the four layers."""
    layers = dict(getattr(net.net, "features", net.net).named_children())
    names = {"maxpool": "stem"} | {f"layer{i}": f"layer{i}" for i in (1, 2, 3, 4)}
    ends = {i: names[name] for i, name in enumerate(layers) if name in names}
    layers = list(layers.values())
    relus = [i for i, layer in enumerate(layers) if isinstance(layer, nn.ReLU)]
    if len(relus) > 5:
        relus = [i for i in relus if isinstance(layers[i + 1], nn.MaxPool2d)]
    return layers, ends or {i: f"conv{n}" for n, i in enumerate(relus, 1)} or {0: "pixels"}


def pool_for(protocol, arch, stage, channels, side):
    """The pooling of a stage's map (B, channels, side, side) before its classifier. deepcluster: to 9 or 10 thousand
    features; la: none up to 200,000 features, else averages by 2, by 4 if that leaves more than 200,000 [code]."""
    if protocol == "la":
        features = channels * side**2
        kernel = 1 + (features > 200_000) + 2 * (features / 4 > 200_000)  # 1, 2 or 4
        return nn.AvgPool2d(kernel, ceil_mode=True)  # what is left at the edge counts, as in the code
    if arch == "alexnet" and side == {"conv1": 55, "conv2": 27}.get(stage, 13):  # at 224 pixels
        kernel, padding = ALEXNET_POOLS[stage]
        return nn.AvgPool2d(kernel, kernel, padding)
    return nn.AdaptiveAvgPool2d(min(math.isqrt(9600 // channels), side))


class Features(nn.Module):
    """Images (B, C, S, S) -> what classifiers see: {stage: its pooled map (B, D), float32}; with pool None, the network's
    output alone. pool: (stage, channels, side) -> module."""

    def __init__(self, net, pool, amp):
        super().__init__()
        self.net, self.pool, self.amp = net, pool, amp

    def forward(self, images):
        images, found = images.flatten(0, -4), {}  # of ten crops (b, 10, C, S, S) each is an image
        with autocast(images.device, self.amp):
            if self.pool is None:
                return {"last feature": self.net(images).float()}
            (layers, names), x = stages(self.net), self.net.sobel(images)
            for i in range(max(names) + 1):
                x = layers[i](x)
                if i in names:
                    found[names[i]] = self.pool(names[i], *x.shape[1:3])(x.float()).flatten(1)
        return found


class Probes(nn.Module):
    """Linear classifiers for every stage and each of W weight decays: {stage: (B, D)} -> logits (S, W, B, K)."""

    def __init__(self, x, w, classes):
        """x: {stage: features (B, D)}, an example; weights start at 0."""
        super().__init__()
        stages = {stage: features.shape[1] for stage, features in x.items()}
        row = {stage: nn.Linear(d, classes) for stage, d in stages.items()}
        self.linear = nn.ModuleList(nn.ModuleDict(copy.deepcopy(row)) for _ in range(w))
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x):
        return torch.stack([torch.stack([f(x[stage]) for stage, f in row.items()]) for row in self.linear], 1)


def probe_loss(logits, target):
    """Mean cross-entropy of each classifier, summed: (S, W, B, K) logits, (B,) labels -> scalar; -100 is no label. No
    weight belongs to two classifiers, so each gets the gradient it would get alone."""
    s, w, b, k = logits.shape
    assert target.shape == (b,), f"want {(b,)} labels, got {tuple(target.shape)}"
    return F.cross_entropy(logits.reshape(-1, k), target.repeat(s * w), reduction="sum") / b


def learning_rate(schedule, lr, wd, epoch, epochs, step, steps):
    """At a step, of `steps`, of an epoch, of `epochs`; all count from 0. schedule: epochs after which it is divided by
    ten; "deepcluster": lr / sqrt(1 + lr wd t), t the step; "coke": cosine by the epoch; "finetune": by the step."""
    t, end = (epoch, epochs) if schedule == "coke" else (epoch * steps + step, epochs * steps)
    if schedule == "deepcluster":
        return lr / math.sqrt(1 + lr * wd * t)
    if schedule in ("coke", "finetune"):
        return lr * (1 + math.cos(math.pi * t / end)) / 2
    return lr * 0.1 ** sum(epoch >= after for after in schedule)


def choose(held_out):
    """By held-out accuracies (epochs, S, W) alone: (S,) weight decay that is best at the last epoch, (S,) epoch at which
    that one is best; the first of equals. NaN is never best."""
    held_out = held_out.nan_to_num(-1)
    decay = held_out[-1].argmax(1)
    return decay, held_out[:, torch.arange(len(decay)), decay].argmax(0)


# %% one epoch


def training_view(args):
    """How training images are cropped, as --crops says."""
    share = args.center_fraction
    kinds = {"center": {"center": share}, "alexnet": {"square": share}}
    kinds["central"] = {"square": share, "central": True}
    kinds |= {name: {"area": (area, 1.0)} for name, area in AREAS.items()}
    return View(args.image_size, flip=0.5 * args.flip, **kinds[args.crops])


def train(net, optimizer, loader, fit, epoch, args):
    """One epoch over the positions `fit`; the mean loss of a classifier, which may be NaN."""
    gen, steps = seed_epoch(args.seed, epoch), len(fit) // args.batch_size
    order = fit[torch.randperm(len(fit), generator=gen)]
    schedule = args.protocol if args.lr_steps is None else args.lr_steps
    meter = Meter(f"epoch {epoch + 1}/{args.epochs}", steps * loader.b)
    net.train(args.finetune)
    for step, (index, (images,)) in enumerate(loader.train(order, [training_view(args)])):
        logits = net(images)  # (S, W, b, K)
        loss = probe_loss(logits, labels_of(loader.data, index))
        for group in optimizer.param_groups:
            about = group["peak"], group["weight_decay"]
            group["lr"] = learning_rate(schedule, *about, epoch, args.epochs, step, steps)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        meter.add(len(index), loss / logits.shape[:2].numel())
    meter.bar.close()
    return all_reduce_sum(meter.losses / steps).item() / loader.world


def accuracy(model, loader, index, crops=1):
    """The share of the images `index`, of those that can be read, that each classifier gets right: (S, W). The mean of
    the softmax over an image's crops decides."""

    def classes(logits):  # (S, W, b * crops, K) -> (b, S, W)
        return logits.softmax(-1).unflatten(-2, (-1, crops)).mean(-2).argmax(-1).movedim(-1, 0)

    found = all_gather(extract(model.eval(), loader, index[slice(*shard(len(index)))], classes))  # (N, S, W)
    labels = labels_of(loader.data, index)
    if (labels < 0).all():
        error(f"none of the {len(index)} images of {loader.data.name} can be read")
    return (found.movedim(0, -1) == labels)[..., labels >= 0].double().mean(-1).cpu()


def neighbors(net, space, loader, fit, test, asked, limit=2**28):
    """knn_accuracy of the test images `asked` among the training images `fit`, in space(net(images)). Features of training
    images exist for a part at a time, of at most `limit` numbers over all processes."""

    def unit(x):
        return F.normalize(space(x), dim=1)

    asked, mine = asked[slice(*shard(len(asked)))], fit[slice(*shard(len(fit)))]
    queries = extract(net, test, asked, unit)
    parts = mine.tensor_split(1 + len(fit) * queries.shape[1] // limit)
    bank = ((extract(net, loader, part, unit), labels_of(loader.data, part)) for part in parts)
    return knn_accuracy(queries, labels_of(test.data, asked), bank)


# %% main


def write(path, result=None):
    """The result as JSON, whole or not at all; None: only see whether the folder can be written."""
    temporary = path.with_suffix(".tmp")
    try:
        if is_main():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary.write_text(json.dumps(result, indent=1) + "\n")
            temporary.replace(path) if result else temporary.unlink()
    except OSError as problem:
        error(f"--out {path.parent}: cannot write there ({problem.strerror})")


def models(net, args, data, device):
    """Yield (images -> logits (S, W, b, K), SGD): all probes at once; or one for each learning rate and weight decay."""
    blank = torch.zeros(1, len(data.mean), args.image_size, args.image_size, device=device)
    pool = partial(pool_for, args.protocol, args.arch) if args.protocol in ("deepcluster", "la") else None
    together = [args.wd] if not args.finetune else [[wd] for wd in args.wd]
    for lr, decays in product(args.lr, together):
        own = nn.Sequential(copy.deepcopy(net), nn.ReLU()) if args.finetune else net.requires_grad_(False)
        body = Features(own, pool, args.amp)
        head = Probes(body(blank), len(decays), len(data.classes)).to(device)
        rows = zip(head.linear, decays, strict=True)
        groups = [{"params": row.parameters(), "peak": lr, "weight_decay": wd} for row, wd in rows]
        if args.finetune:
            weight, _ = head.parameters()
            nn.init.normal_(weight, 0, 0.01, generator=generator(args.seed, "output layer"))
            groups[0]["peak"] = 10 * lr
            groups.append({"params": body.parameters(), "peak": lr, "weight_decay": decays[0]})
        yield nn.Sequential(body, head), torch.optim.SGD(groups, lr, momentum=0.9)


def evaluate(model, optimizer, loaders, splits, args):
    """Train a model: its loss in each epoch, and accuracies on the images held out (E, S, W), on those to test on (E, S,
    W) and on ten crops of these (1, S, W). E: all epochs, or the last. NaN: not computed, or given up."""
    (loader, test, ten), (fit, held, asked), last = loaders, splits, optimizer.param_groups[-1]
    trained = parallel(torch.compile(model) if args.compile else model)
    title = f"lr {last['peak']:g}  wd {last['weight_decay']:g}  " * args.finetune
    losses, held_out, on_test = [], [], []
    for epoch in range(1, args.epochs + 1):
        losses.append(train(trained, optimizer, loader, fit, epoch - 1, args))
        line = f"{title}epoch {epoch}/{args.epochs}  loss {losses[-1]:.3f}"
        if not math.isfinite(losses[-1]):
            print_once(f"{line}: given up")
            return losses[:-1], *torch.full((3, 1, 1, 1), math.nan)
        if epoch == args.epochs or len(held) and not args.finetune:
            on_test.append(accuracy(model, test, asked))
            held_out.append(accuracy(model, loader, held) if len(held) else on_test[-1] * math.nan)
            found = zip(model[1].linear[0], held_out[-1].amax(1).tolist(), strict=True)
            line += "  held-out %:" * (len(held) > 0)
            line += "".join(f"  {stage} {100 * best:.1f}" for stage, best in found if best == best)
        if epoch == args.epochs or not args.finetune:
            print_once(line)
    crops = accuracy(model, ten, asked, 10) if args.ten_crops else on_test[-1] * math.nan
    return losses, torch.stack(held_out), torch.stack(on_test), crops[None]


def table(linear, held_out, on_test, ten, args):
    """{stage: what was chosen and what it gives}, accuracies in 0..1; printed in %. Accuracies: see evaluate."""
    line, stages = "{:13}{:>8}{:>7}{:>7}{:>10}{:>7}{:>8}{:>10}{:>7}{:>11}{:>9}".format, {}
    titles = "features", "lr", "wd", "held-out", "test", "epoch:", "held-out", "test", "ten crops", "REPORT"
    print_once(line("", *titles))
    chosen, pairs = torch.stack(choose(held_out), 1).tolist(), list(product(args.lr, args.wd))
    center = not args.ten_crops or args.crops == "center" or args.protocol == "coke"
    for s, ((stage, layer), (w, e)) in enumerate(zip(linear.items(), chosen, strict=True)):
        numbers = {"held_out_last": held_out[-1], "test_last": on_test[-1], "held_out_best": held_out[e]}
        numbers |= {"test_best": on_test[e] + 0 * held_out[e], "ten_crops_last": ten[-1]}
        found = {name: None if x[s, w].isnan() else x[s, w].item() for name, x in numbers.items()}
        found["report"] = found["test_last" if center else "ten_crops_last"]
        held, last, *rest = ("-" if x is None else f"{100 * x:.2f}" for x in found.values())
        d, (lr, wd), best = layer.in_features, pairs[w], args.epochs - len(held_out) + e + 1
        print_once(line(stage, d, f"{lr:g}", f"{wd:g}", held, last, best, *rest))
        found["held_out_each"] = [None if x != x else x for x in held_out[-1, s].tolist()]  # of all pairs
        stages[stage] = {"features": d, "lr": lr, "wd": wd, "best_epoch": best, **found}
    return stages


def main():
    args = options()
    device, began = setup(args.device), time.time()
    if args.features:
        return write_features(args, device)
    kind = "knn" if args.knn_only else args.protocol
    name = Path(args.data).resolve().name + f"-{kind}" * (kind != "deepcluster")
    path = Path(args.out) / f"eval_linear-{name}.json"
    if path.exists() and not args.overwrite:
        error(f"{path} is there; --overwrite evaluates again")
    write(path)

    data, fit, test_data, asked = load_splits(args, device)
    fit = fit[torch.randperm(len(fit), generator=generator(args.seed, "held out"))]
    held, fit = fit.tensor_split([max(1, round(args.held_out * len(fit))) if args.held_out else 0])
    if args.batch_size > len(fit) and not args.knn_only:
        error(f"--batch-size {args.batch_size} is more than the {len(fit)} images that are left to train on")
    feeding = args.image_size, args.center_fraction, device, args.workers, False
    loader, test = (Loader(x, args.batch_size, *feeding) for x in (data, test_data))
    ten = Loader(test_data, test.world * max(1, test.b // 10), *feeding)
    ten.center = TenCrops(args.image_size, center=args.center_fraction)
    row = f"{args.run}, {args.meta['method']}, from {args.meta.get('start') or 'weights of its own'}"
    row = row if args.run else "raw pixels: the lowest row"
    if args.random:
        row = "supervised: the upper row" if args.finetune else "random weights: what training has to beat"
    images = {"train": len(fit), "held_out": len(held), "test": len(asked)}
    print_once(f"{args.data}: {images}, on {device}\n{args.arch} at {args.image_size} pixels, {row}; {kind}")

    net, spaces = make_network(args, len(data.mean))
    net = to_device(net, device)
    if args.random and args.fill_batch_norm and not args.finetune:
        fill_batch_norm(net, loader, fit[:256])
    net.eval()
    result = {**what_runs(args, data), "row": row, "images": images, "classes": len(data.classes)}
    if not args.knn_only:
        found, loaders, splits = [], (loader, test, ten), (fit, held, asked)
        for model, optimizer in models(net, args, data, device):
            found.append(evaluate(model, optimizer, loaders, splits, args))
        losses, *numbers = zip(*found, strict=True)
        numbers = [torch.cat(x, -1) for x in numbers]  # (E, S, W), W for all pairs
        if numbers[1].isnan().all():
            error("the loss became NaN or infinite; lower --lr?")
        result |= {"loss": losses, "stages": table(model[1].linear[0], *numbers, args)}
        write(path, result)
    if args.knn_only or args.knn and not args.finetune:
        result["knn"] = {}
        for name, space in spaces.items():
            found = neighbors(net, space.to(device), loader, torch.cat([held, fit]), test, asked)
            print_once(f"kNN of the {name}: {100 * found[1]:.2f} with K=1, {100 * found[200]:.2f} with K=200")
            result["knn"][name] = found
    bad = {x.paths[i] for x in (data, test_data) for i in x.unreadable}
    print_once(f"{len(bad)} files could not be read: neither trained on nor counted") if bad else None
    result |= {"unreadable": len(bad), "seconds": time.time() - began}
    write(path, result)
    print_once(f"{path}, {time.time() - began:.0f} s")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
