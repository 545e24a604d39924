"""Evaluation with labels: linear classifiers on a frozen network, ten crops, nearest neighbours; fine-tuning.

Linear probes as in Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV
2018, section 4.3 and released code, or (--protocol la) as in Zhuang et al., Local Aggregation for
Unsupervised Learning of Visual Embeddings, ICCV 2019, supplementary 2.1 and released code, or (--protocol
coke) as in Qian et al., Unsupervised Visual Representation Learning by Online Constrained K-Means, CVPR 2022,
released code, whose supplementary 2.3 has --finetune; kNN as in Wu et al., Unsupervised Feature Learning via
Non-Parametric Instance Discrimination, CVPR 2018.

    each batch:  x_s = pool(output map of stage s)       (B, D_s)  frozen, evaluation mode, no gradient
                 logits_sw = linear_sw(x_s)              (B, K)    for every stage s and weight decay w
                 loss = sum over s, w of cross-entropy(logits_sw, label): one backward for all
    at the end:  per stage the w that is best on held-out training images; its accuracy on the test images

    --finetune, each learning rate and weight decay w, from the same weights:
    each batch:  logits = linear(relu(net(images)))      (B, K)    training mode, gradients for all layers
                 loss = cross-entropy(logits, label); the linear layer learns ten times as fast
    at the end:  the pair that is best on held-out training images; its accuracy on the test images

Symbols: B batch (--batch-size, over all processes), S stages, W weight decays (--wd), K classes, D features.

    python eval_linear.py runs/deepcluster-digits                laptop: a run folder or a backbone.pt
    python eval_linear.py --random lenet5 --data digits          the untrained network to compare with
    python eval_linear.py runs/deepcluster-cifar10 --data svhn   on other data than it was trained on
    python eval_linear.py RUN --protocol la                      whole maps, Local Aggregation's schedule
    python eval_linear.py RUN --protocol coke                    the network's output alone, CoKe's schedule
    python eval_linear.py RUN --finetune --data cifar10          all layers, the best of a grid of 12
    torchrun --nproc_per_node=8 eval_linear.py runs/deepcluster-imagenet

Images: the probe trains on what --crops says; by default on centre crops up to 64 pixels and on random
crops of the central square of larger images, with --protocol la or coke on the paper's crops. Half of them
are mirrored, but not digits, mnist and svhn, where mirror images are other classes. The network's own mean
and deviation normalise them. Probes that trained on random crops are tested on ten crops, too. kNN compares
last features and, where the network was trained with one, its embedding: a bank made anew from centre crops,
on any data set.

What to expect: the second line, 15 seconds on one core: conv1 96.4, conv2 96.1, kNN 94.4 with K=1; with
--finetune, a minute, 93.1 (what local_aggregation.py trained: 98.6).

Departs from the paper and its code, on purpose:
 1. All stages and weight decays train in one pass; the gradients of one do not touch another.
 2. With --protocol deepcluster the weight decay is chosen on --held-out of the training images, and the
    classifier is not trained again with them. "Last" is the last epoch, "best" the best epoch on the held-out
    images; the released code prints its best epoch on the test images.
 3. Classifiers of frozen features start at zero: the problem is convex (the codes: PyTorch's default; CoKe's:
    N(0, 0.01)).
 4. An epoch's last incomplete batch is dropped.
 5. Networks other than AlexNet at 224 pixels, with --protocol deepcluster: every map is averaged to s x s,
    s = sqrt(9600 / channels) rounded down, but no more than the map has.
 6. ResNets: kNN compares the average of the last map, also where training used the whole map.
 7. A labelled folder without val/ or test/: a fifth of its images, the same for all seeds, is the test set.
 8. --random: batch norm gets the statistics of 256 training images, as a trained network has them: the
    stronger baseline; --no-fill-batch-norm is the network as it was initialised.
 9. The small sets have 20 epochs [Deep Dive 3.3], on every stage instead of the topmost alone.
10. On CUDA the frozen network runs in bf16 autocast (--no-amp), the classifiers in float32; --finetune: all
    layers in autocast, the loss in float32.
11. An evaluation is not resumed: interrupted, it writes nothing; run again, it overwrites its JSON.
12. --protocol la: all training images train, for a schedule told beforehand, so nothing is chosen. Networks
    that are not in the paper have ResNet's schedule. The code never pools AlexNet's maps (its conv1 has
    186,624 features, ours 290,400: averaged by 2), crops AlexNet's images in the central square (the paper:
    anywhere), and counts Places' epochs in steps of ImageNet's.
13. Random resized crops of data in memory are bilinear without antialiasing.
14. --protocol coke: the code's schedule and crops of ImageNet for all data. Networks other than ResNets are
    probed on their last hidden layer before its ReLU; two views and other methods than
    CoKe's have its rate for multi view, 0.4.
15. --finetune: the paper gives the grid and the factor 10 of the last layer; the rest of its "standard
    procedure" is ours: 20 epochs of batches of 256 for all data, momentum 0.9, cosine to 0 by the step, crops
    of area 0.08 to 1 (0.3 to 1 for networks up to 64 pixels), a ReLU before the last layer (what a ResNet
    averages has had its own), choice on --held-out, not trained again with it. A point whose loss becomes NaN
    or infinite is given up. Batch norm starts with what is saved, --random: as initialised, and is over the
    whole batch of all processes; dropout where the network has it.
"""

import argparse
import copy
import json
import math
import os
import time
from dataclasses import replace
from itertools import product
from pathlib import Path

from legacy import (
    ARCHS,
    DATASETS,
    Loader,
    Parser,
    View,
    agree,
    backbone,
    default_resize,
    extract,
    fill_batch_norm,
    gather,
    generator,
    heartbeat,
    knn_accuracy,
    learning_rate,
    leave,
    leave_if_asked,
    load_backbone,
    load_data,
    main_process,
    number,
    overdue,
    parallel,
    processes,
    progress,
    refuse,
    say,
    seed_all,
    seed_step,
    setup,
    shard,
    synchronise,
    to_device,
    total,
    unwritable,
    what_runs,
)

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------- recipes and options
# Data set -> how its probe is trained; folders are "imagenet". resize is for --random alone: a trained
# network brings its own. Flags override.

RECIPES = {
    "imagenet": {"epochs": 90, "flip": True, "sobel": True, "image_size": 224, "resize": 256},
    "cifar10": {"epochs": 20, "flip": True, "sobel": True, "image_size": 32, "resize": 45},
    "svhn": {"epochs": 20, "flip": False, "sobel": True, "image_size": 32, "resize": 44},
    "fashionmnist": {"epochs": 20, "flip": True, "sobel": False, "image_size": 32, "resize": 44},
    "digits": {"epochs": 20, "flip": False, "sobel": False, "image_size": 32, "resize": 32},
}
RECIPES["mnist"] = RECIPES["digits"]
RECIPES["cifar100-20"] = RECIPES["stl10"] = {**RECIPES["cifar10"], "resize": 32}

PROTOCOLS = {  # for all data; "la": Local Aggregation, supplementary 2.1 and code; "coke": code; "finetune": 15 above
    "deepcluster": {"batch_size": 256, "lr": 0.01, "wd": [1e-3, 1e-4, 1e-5, 1e-6], "held_out": 0.1, "lr_steps": None},
    "la": {"batch_size": 128, "lr": 0.01, "wd": [1e-4], "held_out": 0.0, "epochs": 70, "lr_steps": [30, 60], "crops": "resnet"},
    "coke": {"batch_size": 1024, "lr": 0.4, "wd": [1e-6], "held_out": 0.0, "epochs": 90, "lr_steps": None, "crops": "imagenet"},
    "finetune": {"batch_size": 256, "lr": [1.0, 0.1, 0.01, 0.001], "wd": [1e-5, 1e-6, 0.0], "held_out": 0.1, "epochs": 20, "lr_steps": None},
}  # fmt: skip
PROTOCOLS["la-vgg16"] = {**PROTOCOLS["la"], "epochs": 51, "lr_steps": [11, 41]}
PROTOCOLS["la-alexnet"] = {**PROTOCOLS["la"], "epochs": 65, "lr_steps": [45, 55], "wd": [0.0]}
PROTOCOLS["la-alexnet"]["crops"] = "alexnet"

# --crops anywhere in the image -> smallest share of it that a random resized crop keeps; alexnet: a square instead
AREAS = {"alexnet": 1.0, "resnet": 0.2, "imagenet": 0.08, "cifar": 0.3}


def options(argv=None):
    """The flags that were given and those with a fixed default; the recipe fills in the rest (main)."""
    p = Parser("Linear probes on every stage of a frozen network, and kNN; or fine-tuning")
    later, yes_no = argparse.SUPPRESS, argparse.BooleanOptionalAction
    # fmt: off
    p.add_argument("run", nargs="?", help="run folder or backbone.pt to evaluate; or use --random")
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=later, help=f"{', '.join(DATASETS)}, or a folder with labels; default: what the network was trained on, digits with --random")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--epochs", type=int, default=later, help="passes over the training images; default: 90 for folders [DeepCluster], 20 for named sets [Deep Dive 3.3]; la: 65 for alexnet, 51 for vgg16, else 70; coke: 90; --finetune: 20, for each point of the grid")
    g.add_argument("--batch-size", type=int, default=later, help="images per step, over all processes; default: 256 [DeepCluster, code], la: 128, coke: 1024")
    g.add_argument("--lr", type=number, nargs="+", default=later, help="learning rate at the start, with --finetune several to choose from; default: 0.01, falling as lr / sqrt(1 + lr wd t), t the step [DeepCluster, code]; la: 0.01, falling in --lr-steps; coke: 0.2 after training with one view (coke-1), else 0.4, cosine by the epoch [CoKe, code; 0.4 is its rate for multi view]; --finetune: 1 0.1 0.01 0.001 [CoKe, supplementary 2.3], cosine by the step")
    g.add_argument("--wd", type=number, nargs="+", default=later, help="weight decays to choose from, for each stage its own; default: 1e-3 1e-4 1e-5 1e-6 [DeepCluster 4.3: cross-validated; the grid is ours]; la: 1e-4, alexnet 0; coke: 1e-6; --finetune: 1e-5 1e-6 0 [CoKe, supplementary 2.3]")
    g.add_argument("--image-size", type=int, default=later, help="side of the square the network sees, in pixels; only with --random; default: 224 for folders, 32 for named sets")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode files, for each evaluating process; not used for data in memory")
    g.add_argument("--seed", type=int, default=0, help="decides every random number")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", action=yes_no, default=later, help="bf16 autocast of the network, not of the classifiers of frozen features; None: on for CUDA")
    g.add_argument("--out", default=later, help="folder for eval_linear-<data>.json (else ..-la.json, ..-coke.json, ..-finetune.json); default: the run folder, beside the file, or runs/eval-random-<arch>-<data>")
    g.add_argument("--max-bad", type=int, default=100, help="unreadable image files to put up with")
    g.add_argument("--resize", type=int, default=later, help="shorter side before cropping, in pixels; default: what the run used, else 256 for 224, no enlargement up to 64")
    g = p.add_argument_group("evaluation")
    g.add_argument("--protocol", choices=["deepcluster", "la", "coke"], default="deepcluster", help="of the probes. la: full maps, averaged by 2 or 4 if above 200,000 features, its schedule and crops [Local Aggregation]; coke: what the network gives, for ResNets the average of the last map, its schedule and crops [CoKe, code]")
    g.add_argument("--finetune", action="store_true", help="train all layers instead of probes, the new last one at 10 times --lr, for each pair of --lr and --wd; the pair that is best on --held-out is tested [CoKe, supplementary 2.3]")
    g.add_argument("--lr-steps", type=int, nargs="*", default=later, help="epochs after which a probe's learning rate is divided by ten, instead of falling otherwise; default with la: 30 60, alexnet 45 55, vgg16 11 41")
    g.add_argument("--random", metavar="ARCH", choices=ARCHS, help=f"evaluate an untrained network: {', '.join(ARCHS)}; its weights are those a run of deepcluster.py with this --seed starts from")
    g.add_argument("--sobel", action=yes_no, default=later, help="with --random: filter images by Sobel's operator; default: as deepcluster.py for this data")
    g.add_argument("--fill-batch-norm", action=yes_no, default=True, help="with --random: batch-norm statistics from 256 training images, not 0 and 1; --finetune makes its own")
    g.add_argument("--held-out", type=number, default=later, help="share of the training images, 0..1, that choose weight decay and best epoch, with --finetune learning rate and weight decay; 0: none, one of each; default: 0.1, la and coke: 0")
    g.add_argument("--flip", action=yes_no, default=later, help="mirror half of the training images; default: on, off for digits, mnist and svhn")
    g.add_argument("--crops", choices=["centre", "central", *AREAS], default=later, help="training crops: the centre; anywhere in the central square of --resize pixels [DeepCluster, code]; anywhere in the image resized to --resize (Places, AlexNet), or area 0.2 to 1 and ratio 3/4 to 4/3 [Local Aggregation], the same with area 0.08 [CoKe, code] or 0.3 [CoKe on CIFAR] to 1; default: central above 64 pixels, centre up to 64; la: alexnet for alexnet and where --data has places in its name, else resnet; coke: imagenet; --finetune: imagenet above 64 pixels, cifar up to 64")
    g.add_argument("--ten-crops", action=yes_no, default=later, help="test on the corners, the centre and their mirror images as well; default: off where --crops is centre, for a classifier that saw centre crops alone fails on corners, and with --finetune")
    g.add_argument("--knn", action=yes_no, default=True, help="nearest neighbours, K = 1 and weighted 200, in a bank of centre crops of the training images; keeps their features on every process; not with --finetune")
    # fmt: on
    args = p.parse_args(argv)
    if (args.run is None) == (args.random is None):
        p.error("give either a run folder or backbone.pt to evaluate, or --random ARCH")
    if args.run and ("image_size" in args or "sobel" in args):
        p.error("--image-size and --sobel go with --random; a trained network has its own")
    for name in ("epochs", "batch_size", "image_size", "resize"):
        if getattr(args, name, 1) < 1:
            p.error(f"--{name.replace('_', '-')} must be at least 1")
    if args.workers < 0 or args.max_bad < 0:
        p.error("--workers and --max-bad must be at least 0")
    rates, decays = (vars(args).get(name, []) for name in ("lr", "wd"))
    if not (all(0 < lr < math.inf for lr in rates) and all(0 <= wd < math.inf for wd in decays)):
        p.error("--lr must be above 0, --wd at least 0")
    if not 0 <= vars(args).get("held_out", 0) < 1:
        p.error("--held-out must lie in 0..1 (1 excluded)")
    if args.finetune and (args.protocol != "deepcluster" or "lr_steps" in args):
        p.error("--finetune has a schedule of its own: leave out --protocol and --lr-steps")
    if len(rates) > 1 and not args.finetune:
        p.error("several --lr go with --finetune, which chooses one; a probe has one --lr")
    if args.finetune:
        args.protocol = "finetune"
    elif rates:
        args.lr = rates[0]
    return args


# --------------------------------------------------------------------------- network and data


def open_network(args, device):
    """(network, meta, train, test) of a saved backbone or, with --random, of an untrained one."""
    if args.random is None:
        net = meta = problem = None
        try:
            net, meta = load_backbone(args.run)
        except ValueError as error:
            problem = str(error)
        agree(problem)
        return net, meta, *labelled(vars(args).get("data", meta["data"]), args.root, device)
    name = vars(args).get("data", "digits")
    train, test = labelled(name, args.root, device)
    recipe = RECIPES.get(name, RECIPES["imagenet"])
    meta = {key: recipe[key] for key in ("image_size", "resize")}
    meta |= {"arch": args.random, "method": "random"}
    if "image_size" in args:
        meta |= {"image_size": args.image_size, "resize": default_resize(args.image_size)}
    meta |= {"sobel": vars(args).get("sobel", recipe["sobel"]), "data": name}
    meta |= {"channels": train.channels, "mean": list(train.mean), "std": list(train.std)}
    seed_all(args.seed, "weights")
    return backbone(args.random, train.channels, meta["image_size"], meta["sobel"]), meta, train, test


def labelled(name, root, device):
    """(train, test) with labels; refuses data without. Where there is no test set, a fifth becomes it."""
    train, test = load_data(name, root, device)
    if train.labels is None or (test is not None and test.labels is None):
        refuse(f"--data {name} has no labels, and a linear classifier needs them: one sub-folder per class")
    if test is None:
        order = torch.randperm(len(train), generator=generator("test split"))
        fifth = max(1, len(train) // 5)
        say(f"{name} has no val/ or test/: {fifth} of its {len(train)} images are held out as test set")
        train, test = part(train, order[fifth:].sort()[0]), part(train, order[:fifth].sort()[0])
    return train, test


def part(data, ids):
    """The images of a folder at these positions, as a data set of its own."""
    return replace(data, paths=[data.paths[i] for i in ids.tolist()], labels=data.labels[ids])


def as_trained(data, meta):
    """The data with the channels and the normalisation that the network was trained with."""
    pixels, channels = data.pixels, meta["channels"]
    if data.channels == 1 and channels == 3:
        pixels = pixels.expand(-1, 3, -1, -1)  # grey three times, no copy
    elif data.channels != channels:
        refuse(f"the network sees {channels} channel(s), --data {data.name} has {data.channels}")
    return replace(data, pixels=pixels, mean=tuple(meta["mean"]), std=tuple(meta["std"]))


# --------------------------------------------------------------------------- the algorithm

ALEXNET_POOLS = {  # kernel = stride, padding: 9600, 9216, 9600, 9600, 9216 features [DeepCluster, code]
    "conv1": (6, 3), "conv2": (4, 0), "conv3": (3, 1), "conv4": (3, 1), "conv5": (2, 0),
}  # fmt: skip


def pool_for(arch, size, stage, channels, side, protocol="deepcluster"):
    """The pooling of a stage's map (B, channels, side, side) before its classifier.

    deepcluster: to 9 or 10 thousand features. la: none up to 200,000 features, else average pooling by 2,
    by 4 if that leaves more than 200,000 [code].
    """
    if protocol == "la":
        features = channels * side**2
        kernel = 1 + (features > 200_000) + 2 * (features / 4 > 200_000)  # 1, 2 or 4
        return nn.AvgPool2d(kernel, ceil_mode=True)  # what is left at the edge counts, as in the code
    if arch == "alexnet" and size == 224:
        kernel, padding = ALEXNET_POOLS[stage]
        return nn.AvgPool2d(kernel, kernel, padding)
    return nn.AdaptiveAvgPool2d(min(math.isqrt(9600 // channels), side))


@torch.no_grad()
def stage_maps(net, images, pools=None, amp=False):
    """{stage: map (B, C, h, w)} of every stage of the network, or {stage: features (B, D)} if pools.

    The maps are float32, after ReLU and before the next pooling layer. pools: {stage: module}, applied
    as soon as a map is there: the maps themselves (1.6 GB for a batch at VGG's first) do not pile up.
    """
    found = {}

    def keep(stage):
        def hook(module, inputs, output):
            found[stage] = pools[stage](output.float()).flatten(1) if pools else output.float()

        return hook

    hooks = [module.register_forward_hook(keep(stage)) for stage, module in net.stages.items()]
    try:
        with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
            net.maps(images)
    finally:
        for hook in hooks:
            hook.remove()
    return found


@torch.no_grad()
def probed(net, images, pools, amp=False):
    """What classifiers see: {stage: features (B, D)}, float32; without pools, the network's output [CoKe, code]."""
    if pools is not None:
        return stage_maps(net, images, pools, amp)
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return {"last feature": net(images).float()}


class Probes(nn.Module):
    """A linear classifier for every stage and weight decay: {stage: (B, D)} -> logits (S, W, B, K)."""

    def __init__(self, features, decays, classes):
        """features: {stage: D}; decays: the W weight decays; classes: K."""
        super().__init__()
        self.linear = nn.ModuleDict(
            {stage: nn.ModuleList(nn.Linear(d, classes) for _ in decays) for stage, d in features.items()}
        )
        for weight in self.parameters():
            nn.init.zeros_(weight)

    def forward(self, x):
        return torch.stack([torch.stack([f(x[stage]) for f in row]) for stage, row in self.linear.items()])

    def groups(self, decays):
        """SGD's parameter groups, one for each weight decay."""
        rows = list(self.linear.values())
        return [
            {"params": [p for row in rows for p in row[w].parameters()], "weight_decay": wd}
            for w, wd in enumerate(decays)
        ]


def probe_loss(logits, target):
    """Mean cross-entropy of each classifier, summed: (S, W, B, K) logits, (B,) labels -> scalar.

    No weight belongs to two classifiers, so each gets the gradient it would get alone.
    """
    s, w, b, k = logits.shape
    assert target.shape == (b,), f"want {(b,)} labels, got {tuple(target.shape)}"
    return F.cross_entropy(logits.reshape(-1, k), target.repeat(s * w), reduction="sum") / b


def decayed_lr(lr, wd, t):
    """Learning rate at step t = 0, 1, ..: lr / sqrt(1 + lr wd t) [DeepCluster, code]."""
    return lr / math.sqrt(1 + lr * wd * t)


def cosine(t, end):
    """Share of the learning rate that is left at step or epoch t = 0 .. end - 1: (1 + cos(pi t / end)) / 2."""
    return (1 + math.cos(math.pi * t / end)) / 2


def crop_and_flip(images, size, random, flip):
    """A size x size crop of each image (B, C, H, W), at random, mirrored with probability flip.

    random (B, 3) in 0..1 decides: top, left, mirror.
    """
    b, _, h, w = images.shape
    top, left = ((random[:, i] * (n - size + 1)).long() for i, n in enumerate((h, w)))
    along = torch.arange(size, device=images.device)
    across = torch.where((random[:, 2] < flip)[:, None], along.flip(0), along)  # (B, size)
    rows, columns = top[:, None] + along, left[:, None] + across
    each = torch.arange(b, device=images.device)[:, None, None]
    return images.movedim(1, -1)[each, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def mean_over_crops(logits, crops):
    """Mean of the softmax over an image's crops: (.., B * crops, K) -> (.., B, K)."""
    return logits.softmax(-1).unflatten(-2, (-1, crops)).mean(-2)


def choose(held_out):
    """Weight decay and best epoch of each stage from held-out accuracies (epochs, S, W) alone.

    (S,) weight decay that is best at the last epoch, and (S,) epoch at which that one is best; the first
    of equals. Test accuracies do not come in here.
    """
    decay = held_out[-1].argmax(1)
    chosen = held_out[:, torch.arange(len(decay)), decay]  # (epochs, S)
    return decay, chosen.argmax(0)


def with_output_layer(net, features, classes, seed):
    """The network (B, C, S, S) -> (B, D), a ReLU and a new linear layer, N(0, 0.01), bias 0: -> logits (B, K)."""
    linear = nn.Linear(features, classes)
    nn.init.normal_(linear.weight, 0, 0.01, generator=generator(seed, "output layer"))
    nn.init.zeros_(linear.bias)
    return nn.Sequential(net, nn.ReLU(), linear)


def layer_rates(model, lr):
    """SGD's parameter groups: all layers at lr, the last at 10 lr, for it is new [CoKe, supplementary 2.3]."""
    parts = ((model[:-1], lr), (model[-1:], 10 * lr))
    return [{"params": list(part.parameters()), "peak": peak} for part, peak in parts]


def best_point(held_out):
    """Position of the highest accuracy, the first of equals; None stands for a point, or all, that diverged."""
    alive = [accuracy for accuracy in held_out if accuracy is not None]
    return held_out.index(max(alive)) if alive else None


# --------------------------------------------------------------------------- one epoch


def batches(loader, order, epoch, args):
    """Yield (index (b,), images (b, C, S, S)) of an epoch over the positions `order`, cropped as --crops says."""
    if args.crops in AREAS:
        square = args.image_size / args.resize if args.crops == "alexnet" else 0.0
        view = View((AREAS[args.crops], 1.0), flip=0.5 * args.flip, square=square)
        yield from ((index, images) for index, (images,) in loader.epoch(epoch, [view], order))
        return
    steps, (first, last) = len(order) // args.batch_size, shard(args.batch_size)
    mine = order[: steps * args.batch_size].view(steps, -1)[:, first:last].flatten()
    for step, (index, crops) in enumerate(loader.fixed(mine, batch_size=last - first)):
        random = torch.rand(args.batch_size, 3, generator=generator(args.seed, epoch, step, "crop"))
        random = random[first:last].to(crops.device, non_blocking=True)  # (b, 3)
        yield index, crop_and_flip(crops[:, 0], args.image_size, random, 0.5 * args.flip)
    loader.check_files()


def train(net, pools, probes, optimizer, loader, order, epoch, args):
    """One epoch of all classifiers over the positions `order`; mean loss of a classifier."""
    steps, loss_sum = len(order) // args.batch_size, 0.0
    walk = enumerate(batches(loader, order, epoch, args))
    for step, (index, images) in progress(walk, steps, f"epoch {epoch + 1}"):
        target = loader.data.labels[index].to(images.device, non_blocking=True)  # (b,)
        logits = probes(probed(net, images, pools, args.amp))  # (S, W, b, K)
        loss = probe_loss(logits, target)
        for group in optimizer.param_groups:
            group["lr"] = decayed_lr(args.lr, group["weight_decay"], epoch * steps + step)
            if args.lr_steps is not None:
                group["lr"] = learning_rate(args.lr, epoch, args.lr_steps)
            elif pools is None:  # CoKe's
                group["lr"] = args.lr * cosine(epoch, args.epochs)
        optimizer.zero_grad()
        loss.backward()
        mean, signal = heartbeat(loss)
        stop_if(signal)
        optimizer.step()
        loss_sum += mean
    return overdue([loss_sum])[0] / steps / logits.shape[:2].numel()


def stop_if(signal):
    """Leave, all processes together, if heartbeat told of a signal."""
    if signal:
        say(f"stopped by signal {signal}; nothing was written")
        leave(128 + signal)


def answer(model, images, amp):
    """Logits (b, K), float32, of a network with its output layer."""
    with torch.autocast(images.device.type, torch.bfloat16, enabled=amp):
        return model(images).float()


def tune(model, optimizer, loader, order, epoch, args):
    """One epoch of all layers over the positions `order`; mean loss, or None if it became NaN or infinite."""
    steps, loss_sum = len(order) // args.batch_size, 0.0
    walk = enumerate(batches(loader, order, epoch, args))
    model.train()
    for step, (index, images) in progress(walk, steps, f"epoch {epoch + 1}"):
        target = loader.data.labels[index].to(images.device, non_blocking=True)  # (b,)
        seed_step(args.seed, epoch, step)  # dropout
        loss = F.cross_entropy(answer(model, images, args.amp), target)
        for group in optimizer.param_groups:
            group["lr"] = group["peak"] * cosine(epoch * steps + step, args.epochs * steps)
        optimizer.zero_grad()
        loss.backward()
        # heartbeat ends the run where its first number is not finite; here that ends this point of the grid.
        _, mean, signal = heartbeat(loss.new_zeros(()), loss)
        stop_if(signal)
        if not math.isfinite(mean):  # on all processes, for it is their mean
            overdue([])
            return None
        optimizer.step()
        loss_sum += mean
    loss_sum = overdue([0.0, loss_sum])[1]
    return loss_sum / steps if math.isfinite(loss_sum) else None


@torch.no_grad()
def accuracies(predict, shape, loader, ids, args, ten=False):
    """Accuracy, of a shape like (S, W), on the images `ids`, from the centre crop or ten crops.

    predict: images (n, C, S, S) -> logits (*shape, n, K).
    """
    right = torch.zeros(shape, dtype=torch.float64, device=loader.device)
    first, last = shard(len(ids))
    crops_at_once = max(1, args.batch_size // processes() // (10 if ten else 1))
    for index, crops in loader.fixed(ids[first:last], ten, crops_at_once):
        leave_if_asked()
        target = loader.data.labels[index].to(crops.device, non_blocking=True)
        logits = predict(crops.flatten(0, 1))  # (S, W, b * crops, K)
        right += (mean_over_crops(logits, crops.shape[1]).argmax(-1) == target).sum(-1)  # (S, W)
    loader.check_files()
    return total(right).cpu() / len(ids)


@torch.no_grad()
def nearest_neighbours(net, train_loader, test_loader, args):
    """{"last feature" and, where there is one, "embedding": {"1": accuracy, "200": accuracy}} of the test images."""
    train, test = train_loader.data, test_loader.data
    mine, asked = (torch.arange(*shard(len(data))) for data in (train, test))
    bank = extract(net, train_loader, mine, args.amp)  # (n, D) of this process
    queries = extract(net, test_loader, asked, args.amp)
    spaces = {"last feature": nn.Identity()}
    if getattr(net, "embedding", None):
        spaces["embedding"] = net.embedding
    labels = (train.labels, len(train.classes))
    return {
        name: knn_accuracy(embed(queries), test.labels[asked], gather(embed(bank)), *labels)
        for name, embed in spaces.items()
    }


# --------------------------------------------------------------------------- main


def main(argv=None):
    args, began = options(argv), time.time()
    device = setup(args.device)
    net, meta, train_data, test_data = open_network(args, device)
    args = resolve(args, meta, train_data.name, device)
    train_data, test_data = as_trained(train_data, meta), as_trained(test_data, meta)
    size = args.image_size
    order = torch.randperm(len(train_data), generator=generator(args.seed, "held out"))
    count = max(1, round(args.held_out * len(order))) if args.held_out else 0
    held, fit = order[:count], order[count:]
    say(f"data: {args.data}, {len(fit)} training, {count} held-out and {len(test_data)} test images")
    origin = f"{meta['method']} on {meta['data']}" if args.run else "untrained"
    say(f"network: {args.arch} at {size} pixels, {origin}")
    check(args, len(fit))

    rest = (args.resize, device, args.workers, args.seed, args.max_bad)
    wide = Loader(train_data, args.batch_size, args.resize if args.crops == "central" else size, *rest)
    centre = Loader(train_data, args.batch_size, size, *rest)
    test = Loader(test_data, args.batch_size, size, *rest)
    to_device(net, device)
    if hasattr(net, "pool"):
        net.pool = True  # ResNets: 512 or 2048 features for kNN, not the 100,352 of a whole map
    found = (fine_tune if args.finetune else probe)(net, wide, centre, test, fit, held, args)

    result = {
        **what_runs(args, device),
        "network": meta,
        "images": {"train": len(fit), "held_out": count, "test": len(test_data)},
        "classes": len(train_data.classes),
        **found,
        "seed": args.seed,
        "bad_files": len(wide.bad | centre.bad) + len(test.bad),
    }
    name = f"eval_linear-{base(args.data)}" + f"-{args.protocol}" * (args.protocol != "deepcluster")
    path = Path(args.out) / f"{name}.json"
    agree(write(path, result) if main_process() else None)
    say(f"{path}, {time.time() - began:.0f} s")
    leave()


def shuffled(fit, epoch, args):
    """The training positions in an epoch's order."""
    return fit[torch.randperm(len(fit), generator=generator(args.seed, epoch, "order"))]


def probe(net, wide, centre, test, fit, held, args):
    """Train classifiers of the frozen network's features; what they and the nearest neighbours give, for the JSON."""
    began, data, everything = time.time(), centre.data, torch.arange(len(test.data))
    if args.random and args.fill_batch_norm:
        fill_batch_norm(net, next(centre.fixed(fit[:256], batch_size=256))[1][:, 0])
    net.eval().requires_grad_(False)
    blank, pools = torch.zeros(1, data.channels, test.size, test.size, device=test.device), None
    if args.protocol != "coke":
        maps = stage_maps(net, blank)
        about = (args.arch, test.size)
        pools = {s: pool_for(*about, s, *x.shape[1:3], args.protocol) for s, x in maps.items()}
    features = {stage: x.shape[1] for stage, x in probed(net, blank, pools).items()}  # {stage: D}
    probes = Probes(features, args.wd, len(data.classes)).to(test.device)
    optimizer = torch.optim.SGD(probes.groups(args.wd), args.lr, momentum=0.9)
    trained, losses, held_out, on_test = parallel(probes), [], [], []

    def score(*where, ten=False):
        shape = (len(features), len(args.wd))
        return accuracies(lambda x: probes(probed(net, x, pools, args.amp)), shape, *where, args, ten)

    for epoch in range(args.epochs):
        start = time.time()
        losses.append(train(net, pools, trained, optimizer, wide, shuffled(fit, epoch, args), epoch, args))
        line = f"epoch {epoch + 1:3d}/{args.epochs}  loss {losses[-1]:.3f}"
        if len(held):
            held_out.append(score(centre, held))
            best = zip(features, held_out[-1].amax(1), strict=True)
            line += "  held-out %: " + "  ".join(f"{s} {100 * a:.1f}" for s, a in best)
        if len(held) or epoch + 1 == args.epochs:
            on_test.append(score(test, everything))
        say(f"{line}  {time.time() - start:.1f} s")
    probed_at = time.time()
    ten = score(test, everything, ten=True) if args.ten_crops else None
    held_out = torch.stack(held_out) if len(held) else None
    stages = summary(features, args.wd, held_out, torch.stack(on_test), ten)
    knn = nearest_neighbours(net, centre, test, args) if args.knn else None
    table(stages, knn)
    return {
        "stages": stages,  # accuracies in 0..1
        "knn": knn,
        "loss": losses,  # per epoch, mean of all classifiers
        "seconds": {"probes": probed_at - began, "ten_crops_and_knn": time.time() - probed_at},
    }


def fine_tune(net, wide, centre, test, fit, held, args):
    """Train all layers for every learning rate and weight decay; what the best of them gives, for the JSON."""
    began, grid, best = time.time(), [], None
    net.embedding = None  # it is not trained here
    blank = torch.zeros(1, test.data.channels, test.size, test.size, device=test.device)
    features = probed(net.eval(), blank, None)["last feature"].shape[1]  # D
    start = to_device(with_output_layer(net, features, len(test.data.classes), args.seed), test.device)

    def score(model, *where, ten=False):
        model.eval()
        return accuracies(lambda x: answer(model, x, args.amp), (), *where, args, ten).item()

    for lr, wd in product(args.lr, args.wd):
        since, losses, accuracy = time.time(), [], None
        model = synchronise(copy.deepcopy(start))
        optimizer = torch.optim.SGD(layer_rates(model, lr), lr, momentum=0.9, weight_decay=wd)
        trained = parallel(model)
        for epoch in range(args.epochs):
            losses.append(tune(trained, optimizer, wide, shuffled(fit, epoch, args), epoch, args))
            if losses[-1] is None:
                break
        line = f"lr {lr:g}  wd {wd:g}  "
        if losses[-1] is None:
            line += f"the loss became NaN or infinite in epoch {len(losses)}: given up"
        else:  # with nothing held out there is one point and no choice
            accuracy = score(model, centre, held) if len(held) else math.nan
            line += f"loss {losses[-1]:.3f}" + f"  held-out {100 * accuracy:.2f} %" * (len(held) > 0)
        grid.append({"lr": lr, "wd": wd, "held_out": accuracy, "loss": losses})
        if best_point([point["held_out"] for point in grid]) == len(grid) - 1:
            best, chosen = model, grid[-1]
        say(f"{line}  {time.time() - since:.1f} s")
    if best is None:
        refuse("the loss became NaN or infinite for every --lr and --wd; give a lower --lr", 1)
    tuned, everything = time.time(), torch.arange(len(test.data))
    if not len(held):
        chosen["held_out"] = None  # JSON has no NaN
    on_test = score(best, test, everything)
    ten = score(best, test, everything, ten=True) if args.ten_crops else None
    line = f"chosen: lr {chosen['lr']:g}, wd {chosen['wd']:g}; {100 * on_test:.2f} % of the test images"
    say(line + (f", {100 * ten:.2f} % from ten crops" if args.ten_crops else ""))
    return {
        **chosen,  # lr, wd, held_out, loss per epoch
        "test": on_test,  # accuracies in 0..1
        "ten_crops": ten,
        "grid": grid,  # held_out null: given up; loss null: in that epoch
        "seconds": {"fine_tuning": tuned - began, "test": time.time() - tuned},
    }


def base(data):
    """The last part of a folder's name; a named set's own name."""
    return os.path.basename(os.path.normpath(data))


def resolve(args, meta, data, device):
    """All arguments: the recipe's, then what the network brings, then what the command line gave."""
    size = meta["image_size"]
    where = Path(args.run or f"runs/eval-random-{args.random}-{base(data)}")
    network = {"data": data, "arch": meta["arch"], "sobel": meta["sobel"], "image_size": size}
    network |= {"resize": meta.get("resize") or default_resize(size)}
    protocol = PROTOCOLS.get(f"{args.protocol}-{meta['arch']}", PROTOCOLS[args.protocol])
    crops = ("imagenet", "cifar") if args.finetune else ("central", "centre")
    protocol = {"crops": crops[size <= 64], **protocol}
    if args.protocol == "la" and "places" in base(data).lower():
        protocol["crops"] = "alexnet"
    if args.protocol == "coke" and meta["method"] == "coke-1":
        protocol["lr"] = 0.2
    recipe = RECIPES.get(data, RECIPES["imagenet"])
    resolved = argparse.Namespace(**{**recipe, **network, **protocol, **vars(args)})
    resolved.wd = list(dict.fromkeys(resolved.wd))
    if args.finetune:
        resolved.lr = list(dict.fromkeys(resolved.lr))
    rest = {
        "ten_crops": resolved.crops != "centre" and not args.finetune,
        "amp": device.type == "cuda",
        "out": str(where.parent if where.is_file() else where),
    }
    return argparse.Namespace(**{**rest, **vars(resolved)})


def check(args, images):
    """Refuse what can only be judged with the data at hand."""
    if args.batch_size > images:
        refuse(f"--batch-size {args.batch_size} is more than the {images} images that are left to train on")
    if not args.held_out and len(args.wd) > 1:
        refuse("--held-out 0 leaves nothing to choose a weight decay by: give one --wd")
    if not args.held_out and args.finetune and len(args.lr) > 1:
        refuse("--held-out 0 leaves nothing to choose a learning rate by: give one --lr")
    if args.resize < args.image_size:
        refuse(f"--resize {args.resize} is smaller than the {args.image_size} pixels that the network sees")
    agree(unwritable(args.out) if main_process() else None)


def write(path, result):
    """Write JSON whole or not at all; what went wrong, or None."""
    try:
        temporary = path.with_name(f"{path.name}.tmp")
        temporary.write_text(json.dumps(result, indent=1) + "\n")
        temporary.replace(path)
    except OSError as error:
        return f"--out {path.parent}: cannot write there ({error.strerror})"


def summary(features, decays, held_out, on_test, ten):
    """{stage: what was chosen and what it gives}.

    held_out, on_test (epochs, S, W), ten (S, W) or None; without held-out images (None) there is one weight
    decay, on_test holds the last epoch alone, and nothing is best.
    """
    chosen = choose(held_out) if held_out is not None else torch.zeros(2, len(features), dtype=torch.int64)
    stages = {}
    for s, (w, e) in enumerate(zip(*(x.tolist() for x in chosen), strict=True)):
        found = {
            "features": list(features.values())[s],
            "wd": decays[w],
            "test_last": on_test[-1, s, w].item(),
            "ten_crops_last": None if ten is None else ten[s, w].item(),
        }
        if held_out is not None:
            found |= {
                "held_out_last": held_out[-1, s, w].item(),
                "best_epoch": e + 1,  # by held-out accuracy
                "held_out_best": held_out[e, s, w].item(),
                "test_best": on_test[e, s, w].item(),
                "by_wd": {
                    str(wd): {"held_out": held_out[:, s, i].tolist(), "test": on_test[:, s, i].tolist()}
                    for i, wd in enumerate(decays)
                },
            }
        stages[list(features)[s]] = found
    return stages


def table(stages, knn):
    """Print the results, accuracies in per cent."""
    titles = "stage", "features", "wd", "held-out", "test last", "test at best held-out", "(epoch)"
    line = "{:8}{:>9}{:>8}{:>10}{:>11}{:>23}{:>9}{:>11}".format
    say("\n" + line(*titles, "ten crops"))
    for stage, r in stages.items():
        names = ("held_out_last", "test_last", "test_best", "ten_crops_last")
        held, last, best, ten = ("-" if r.get(n) is None else f"{100 * r[n]:.2f}" for n in names)
        say(line(stage, r["features"], f"{r['wd']:.0e}", held, last, best, r.get("best_epoch", "-"), ten))
    say("held-out and ten crops: last epoch")
    for space, found in (knn or {}).items():
        say(f"kNN of the {space}: {100 * found['1']:.2f} with K=1, {100 * found['200']:.2f} with K=200")


if __name__ == "__main__":
    main()
