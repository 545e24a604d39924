"""Local Aggregation: draw an image's embedding to those of its neighbours that share a cluster with it.

Zhuang, Zhai & Yamins, Local Aggregation for Unsupervised Learning of Visual Embeddings, ICCV 2019; with the
instance recognition it starts from and is compared with: Wu, Xiong, Yu & Lin, Unsupervised Feature Learning
via Non-Parametric Instance Discrimination, CVPR 2018.

    each epoch:  clusterings = H times k-means(bank)     (H, N)  another start each time, --clusterings, --k
    each batch:  v = unit(net(random crops))             (B, D)  embeddings
                 background = nearest rows of the bank   (B, k)  to each v, of all N, --background
                 close = background in the same cluster  (B, k)  in any of the H clusterings
                 loss = -log( sum over close of exp(bank.v / tau) / sum over background of the same )
                 bank = unit((bank + v) / 2)             (N, D)  for the images of the batch

The first --warm-up epochs, and all of them with --loss ir, learn instance recognition: of all images, which
one is this? loss = -log softmax(bank.v / tau) at the image's own row, or NCE's estimate of it.

Symbols: N images, B batch (--batch-size, over all processes), D embedding size (--dim), H --clusterings,
K --k (the paper's m: clusters in each), k --background, m --noise, tau --temperature.

    python local_aggregation.py                                     laptop: digits, no download, no GPU
    python local_aggregation.py --loss ir                           the baseline: instance recognition alone
    python local_aggregation.py --data my/photos --k 100            some 5,000 images, no labels needed
    torchrun --nproc_per_node=8 local_aggregation.py --arch vgg16   the paper's ImageNet run (data/imagenet)

What to expect: on digits, 24 s on 2 cores, kNN (K=1) of the test images ends at 97.2 % in the memory
bank (mean of three seeds; instance recognition alone 91.5) and 98.5 % in a bank of centre crops (93.4; untrained
93.3). On Fashion-MNIST, 12 epochs, it does not beat instance recognition (78.0 and 78.5 %; untrained 76.4).
A line's "chance" is the loss if all similarities were 0. Recognition starts above it, as the first embeddings
are all alike, and should fall below it within ten epochs. Collapse: one cluster holds most images, kNN falls
to chance. Training from a random bank is chaotic: rounding that differs in the last bit (another number of
threads or processes) moves kNN on digits by a point or two (seed 0, one thread: 96.7 and 97.2).

Departs from the papers and the authors' code, on purpose:
 1. Instance recognition is exact, a softmax over the bank, up to 131,072 images; NCE beyond (the code: NCE
    always; --ir-loss nce). NCE needs far fewer noise images than there are images: with 4096 for the 1,437
    digits its loss rises above 1,500 and nothing is learnt.
 2. The losses are computed in log space, without the code's 1e-7.
 3. An image is always among its own background (the code: if it is near enough; else the loss may be log 1e-7).
 4. The first clustering comes before the first step of Local Aggregation, the others at the start of each
    epoch (the authors' PyTorch code: after the first step; it never clusters again if B divides N).
 5. AlexNet has (H, K) = (3, 10,000) as in the paper's table (the code: 3 x 30,000).
 6. Networks are those of the other scripts, with batch norm in the linear layers, too, as in the code. The code's
    AlexNet has 64-192-384-384-256 maps, its VGG normalises one layer in each stage, its ResNets are
    pre-activation ones, its batch norm keeps 0.997 of its statistics at a step (here 0.9).
 7. Batch norm sees the whole batch of all processes, so that their number matters by rounding alone. It has no
    weight decay (the code's AlexNet: it has).
 8. Colours are jittered before, not after, a fifth of the images turn grey, in one order for a batch.
 9. vgg16: batch 256 in the warm-up, too (the code: 128 there).
10. On CUDA the network runs in bf16 autocast (--no-amp). Bank, nearest images, k-means: float32.
11. An epoch's last incomplete batch is dropped.
12. At the end, the trained network's embeddings of centre crops are clustered once: assignments.csv.
13. Linear layers start as PyTorch starts them. Crops of data in memory are bilinear without antialiasing. ResNets
    up to 64 pixels: 3x3 stem, no pooling.
14. Recipes of data other than ImageNet are ours; cifar10's and those like it have not been run to the end.
"""

import argparse
import copy
import math
import os
import time

from legacy import (
    ARCHS,
    DATASETS,
    Embedding,
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
    knn_accuracy,
    label_scores,
    learning_rate,
    leave,
    load_data,
    nmi,
    number,
    overdue,
    parallel,
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
    warn_if_trivial,
)

import torch
import torch.nn.functional as F
from torch import nn

# --------------------------------------------------------------------------- recipes and options
# Data set (or data-arch) -> hyper-parameters. Folders: the paper's ImageNet runs, section 4 and the code's
# schedules, in epochs that count the warm-up. The others are ours. Flags override.

IMAGENET = {
    "warm_up": 10, "batch_size": 128, "lr": 0.03, "wd": 1e-4, "image_size": 224, "resize": 256,
    "crop_area": 0.2, "flip": True, "colour": True, "background": 4096,
}  # fmt: skip
SMALL = {**IMAGENET, "image_size": 32, "resize": 32, "k": 1000, "clusterings": 3}
RECIPES = {
    "imagenet-alexnet": {**IMAGENET, "arch": "alexnet", "clusterings": 3, "k": 10000, "epochs": 160, "lr_steps": [119, 142]},
    "imagenet-vgg16": {**IMAGENET, "arch": "vgg16", "clusterings": 6, "k": 10000, "epochs": 168, "lr_steps": [126, 148], "batch_size": 256},
    "imagenet-resnet18": {**IMAGENET, "arch": "resnet18", "clusterings": 10, "k": 30000, "epochs": 200, "lr_steps": [160, 187]},
    "imagenet-resnet50": {**IMAGENET, "arch": "resnet50", "clusterings": 10, "k": 30000, "epochs": 200, "lr_steps": [152, 189]},
    "cifar10": {**SMALL, "arch": "resnet18", "epochs": 200, "lr_steps": [160, 187]},
    "fashionmnist": {**SMALL, "arch": "lenet5", "epochs": 12, "lr_steps": [9, 11], "warm_up": 4, "crop_area": 0.5, "colour": False},
    "digits": {**SMALL, "arch": "lenet5", "epochs": 60, "lr_steps": [48, 57], "k": 30, "crop_area": 0.5, "flip": False, "colour": False},
}  # fmt: skip
RECIPES["imagenet"] = RECIPES["imagenet-resnet18"]
RECIPES["mnist"] = {**RECIPES["fashionmnist"], "flip": False}
RECIPES["cifar100-20"] = RECIPES["stl10"] = RECIPES["cifar10"]
RECIPES["svhn"] = {**RECIPES["cifar10"], "flip": False}
EXACT = 2**17  # images up to which instance recognition's softmax runs over the whole bank


def options(argv=None):
    """The command line as a namespace; unknown or impossible values end with exit code 2."""
    p = Parser("Local Aggregation (Zhuang et al. 2019)")
    # fmt: off
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=default_data(), help=f"{', '.join(DATASETS)}, or a folder of images: train/ and val/, one folder per class, or unlabelled")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--k", type=int, help="clusters in each clustering, the paper's m [3, 4]; the recipes have 40 to 130 images in each")
    g.add_argument("--epochs", type=int, help="passes over the data, those of --warm-up among them; a longer run may continue a finished one")
    g.add_argument("--batch-size", type=int, help="images per step, over all processes [4]")
    g.add_argument("--lr", type=number, help="learning rate at the start [4]")
    g.add_argument("--wd", type=number, help="weight decay, of all weights but batch norm's [4, code]")
    g.add_argument("--image-size", type=int, help="side of the square the network sees, in pixels [4]")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode files, for each training process; not used for data in memory")
    g.add_argument("--seed", type=int, default=0, help="decides every random number")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast of the network, never of the bank; None: on for CUDA")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the network")
    g.add_argument("--out", help="run folder")
    g.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    g.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints; a signal saves at once")
    g.add_argument("--max-bad", type=int, default=100, help="unreadable image files to put up with")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take")
    g.add_argument("--resize", type=int, help="shorter side before the centre crop, in pixels [code]")
    g = p.add_argument_group("Local Aggregation")
    g.add_argument("--loss", choices=["la", "ir"], default="la", help="ir: instance recognition in all epochs, the baseline [4]")
    g.add_argument("--warm-up", type=int, help="epochs of instance recognition before the first clustering [4, code]; on small data 5 to 20, longer hurts")
    g.add_argument("--clusterings", type=int, help="H: k-means runs whose clusters are united [3]")
    g.add_argument("--background", type=int, help="nearest images each one is compared with, the paper's k; cut to the number of images [3]")
    g.add_argument("--temperature", type=number, default=0.07, help="tau; smaller: only the nearest images count [3]")
    g.add_argument("--bank-momentum", type=number, default=0.5, help="share of the old embedding when the bank is updated, 0..1 [3, code]")
    g.add_argument("--dim", type=int, default=128, help="D, numbers in an embedding [4]")
    g.add_argument("--cluster-every", type=int, default=0, metavar="STEPS", help="steps between clusterings; 0: once an epoch [supplementary 3]")
    g.add_argument("--cluster-on", choices=["bank", "centre-crop"], default="bank", help="embeddings to cluster: the bank's, or fresh ones of centre crops [supplementary 3]")
    g.add_argument("--ir-loss", choices=["auto", "softmax", "nce"], default="auto", help=f"instance recognition over the whole bank, or its estimate from --noise images; auto: softmax up to {EXACT:,} images (its matrices are B x N)")
    g.add_argument("--noise", type=int, default=4096, help="noise images for each image in nce; far fewer than there are images [Wu et al.]")
    g.add_argument("--lr-steps", type=int, nargs="*", help="epochs after which the learning rate is divided by ten [code]")
    g.add_argument("--momentum", type=number, default=0.9, help="of SGD [4]")
    g.add_argument("--crop-area", type=number, help="smallest share of the image a random crop keeps, 0..1 [code]")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, help="mirror half of the training images [code]")
    g.add_argument("--colour", action=argparse.BooleanOptionalAction, help="jitter brightness, contrast, saturation and hue by 0.4; a fifth of the images grey [code]")
    # fmt: on
    # What the other defaults hang on is looked at first, so that --help shows the values that would run.
    peek = Parser(add_help=False)
    known = {"--data": default_data(), "--arch": None, "--recipe": None, "--loss": "la", "--image-size": None}
    for flag, default in known.items():
        peek.add_argument(flag, default=default, type=int if flag == "--image-size" else str)
    first = peek.parse_known_args(argv)[0]
    base = first.data if first.data in RECIPES else "imagenet"
    recipe = first.recipe if first.recipe in RECIPES else base
    recipe = next(r for r in (f"{recipe}-{first.arch}", recipe) if r in RECIPES)
    size = first.image_size or RECIPES[recipe]["image_size"]
    out = f"runs/local_aggregation-{os.path.basename(os.path.normpath(first.data))}"
    p.set_defaults(out=out + "-ir" * (first.loss == "ir"), **{**RECIPES[recipe], "recipe": recipe})
    if size != RECIPES[recipe]["image_size"]:
        p.set_defaults(resize=default_resize(size))
    args = p.parse_args(argv)
    counts = (
        "k",
        "epochs",
        "batch_size",
        "image_size",
        "save_every",
        "clusterings",
        "background",
        "dim",
        "noise",
    )
    for name in (*counts, "workers", "max_bad", "warm_up", "cluster_every"):
        if getattr(args, name) < (name in counts):
            p.error(f"--{name.replace('_', '-')} must be at least {int(name in counts)}")
    if not (0 <= args.lr < math.inf and 0 <= args.wd < math.inf and 0 <= args.momentum < 1):
        p.error("--lr and --wd must be at least 0, --momentum in 0..1 (1 excluded)")
    if not 0 < args.temperature < math.inf:
        p.error("--temperature must be above 0")
    if not 0 <= args.bank_momentum <= 1:
        p.error("--bank-momentum must lie in 0..1")
    if not 0 < args.crop_area <= 1:
        p.error("--crop-area must lie in 0..1 (0 excluded)")
    if args.batch_size < 2:
        p.error("--batch-size must be at least 2: batch norm compares images")
    if any(s < 1 for s in args.lr_steps):
        p.error("--lr-steps must be at least 1")
    if max(args.resize, args.dim) > 16384:
        p.error("--resize, --image-size and --dim must be at most 16384")
    if args.resize < args.image_size:
        p.error(f"--resize {args.resize} is smaller than --image-size {args.image_size}")
    return args


# --------------------------------------------------------------------------- network


def make_net(args, channels):
    """(trunk, net): images (B, C, S, S) -> unit embeddings (B, D). No dropout, no Sobel [4, code]."""
    trunk = backbone(args.arch, channels, args.image_size, dropout=0.0, pool=True, norm=True)
    net = nn.Sequential(trunk, Embedding(trunk.dim, args.dim))
    net.dim = args.dim
    return trunk, net


def parameter_groups(net, wd):
    """SGD's groups: weight decay for all weights but batch norm's [code]."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    free = [p for m in norms for p in m.parameters()]
    rest = [p for p in net.parameters() if all(p is not q for q in free)]
    return [{"params": rest, "weight_decay": wd}, {"params": free, "weight_decay": 0.0}]


# --------------------------------------------------------------------------- the algorithm
# Rows of the bank (N, D) and embeddings v (B, D) have unit length; gradients flow through v alone.
# Every process holds the whole bank: it is searched at every step, and what a step changes, B rows, is next
# to nothing to send. float32 at D = 128: 0.66 GB for ImageNet's 1,281,167 images, 51 GB for 100 million (and
# as much again while kNN is validated), clusterings 4 H N bytes: 51 MB and 4 GB at H = 10. Shards would save
# that, at the price of B x k x processes candidates to exchange in every step.


def instance_softmax(v, bank, index, tau):
    """Instance recognition: -log softmax over all N images at the own one, (B,) [Wu et al. 3.1].

    v (B, D), bank (N, D), index (B,) rows of the images themselves. About three (B, N) matrices exist at
    once: 0.2 GB for B = 128 and N = 131,072, 2 GB for ImageNet.
    """
    return F.cross_entropy(v @ bank.T / tau, index, reduction="none")


def instance_loss(v, bank, index, noise, tau, normaliser):
    """Instance recognition by noise-contrastive estimation, (B,) [Wu et al. 3.2].

    v (B, D), bank (N, D), index (B,) rows of the images themselves, noise (B, m) rows drawn from all N; m is
    --noise (not Local Aggregation's m). p(j) = exp(bank_j.v / tau) / normaliser; h(j) = p(j) / (p(j) + m/N),
    the probability that j is the image and no noise; loss = -log h(index) - sum over noise of log(1 - h(j)).
    The rows of the noise, (B, m, D), are 0.27 GB for B = 128 and m = 4096.
    """
    n, m = len(bank), noise.shape[1]
    offset = math.log(normaliser * m / n)  # in log space, for exp(1 / 0.07) is 1.6 million
    own = (v * bank[index]).sum(1) / tau - offset  # (B,) log of p / (m/N)
    other = torch.einsum("bmd,bd->bm", bank[noise], v) / tau - offset  # (B, m)
    return F.softplus(-own) + F.softplus(other).sum(1)


def background(v, bank, index, k, most=2**27):
    """B_i: the k rows of the bank nearest to each v, the image's own row always among them [3].

    -> similarity (B, k) with gradient, ids (B, k) in no order, outside (B,): was the own row not among
    the nearest? It then takes the place of the least near. Exact and float32; as many rows of v at a time
    as keep every matrix within `most` entries (2^27: 512 MiB), or one.
    """
    parts = v.split(max(1, most // len(bank)))
    found = [(part @ bank.T).topk(k, sorted=False) for part in parts]
    similarity, ids = (torch.cat(x) for x in zip(*found, strict=True))  # (B, k)
    outside = (ids != index[:, None]).all(1)
    last = similarity.detach().argmin(1, keepdim=True)  # (B, 1) where the least near stands
    give_up = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, last, outside[:, None])
    own = (v * bank[index]).sum(1, keepdim=True)  # (B, 1)
    return torch.where(give_up, own, similarity), torch.where(give_up, index[:, None], ids), outside


def close_neighbours(clusterings, index, ids):
    """C_i within B_i, (B, k) bool: who shares a cluster with the image in any of the clusterings [3].

    clusterings (H, N), index (B,) the images, ids (B, k) their background. An image is close to itself.
    """
    close = torch.zeros_like(ids, dtype=torch.bool)
    for assign in clusterings:
        close |= assign[ids] == assign[index][:, None]
    return close


def aggregation_loss(similarity, close, tau):
    """-log( sum over close of exp(similarity / tau) / sum over all of the same ), (B,) [3].

    similarity (B, k) to the background, close (B, k) bool with at least one in each row.
    """
    assert similarity.shape == close.shape, f"{tuple(similarity.shape)} against {tuple(close.shape)}"
    logits = similarity / tau
    return logits.logsumexp(1) - logits.masked_fill(~close, -math.inf).logsumexp(1)


def update_bank(bank, index, v, momentum=0.5):
    """bank_i <- unit(momentum bank_i + (1 - momentum) v_i) for the batch's rows, in place [3, code].

    An embedding exactly opposite to its row would leave nothing to normalise: it then replaces the row.
    """
    v = v.detach()
    mixed = momentum * bank[index] + (1 - momentum) * v
    gone = mixed.norm(dim=1, keepdim=True) < 1e-6
    bank[index] = unit(torch.where(gone, v, mixed))


# --------------------------------------------------------------------------- one epoch

Z = 2876934.2 / 1281167  # NCE's normaliser for each image, a constant of the released code
JITTER = {"jitter": (0.4, 0.4, 0.4, 0.4), "grey": 0.2}


def clustering(z, args, *key):
    """k-means of the embeddings z (n, D) of this process, from a start of its own for every key."""
    with finite_or_leave():
        return kmeans(z, args.k, gen=generator(args.seed, *key))


def cluster(net, loader, bank, args, *key):
    """H clusterings of all embeddings, (H, N) int32, each from another start."""
    z = bank[slice(*shard(len(bank)))]
    if args.cluster_on == "centre-crop":
        z = embed(net, loader, args)
    found = [clustering(z, args, *key, "k-means", h) for h in range(args.clusterings)]
    return torch.stack([gather(c.assign).int() for c in found])


def embed(net, loader, args):
    """Embeddings (n, D) of the centre crops of this process's images."""
    return extract(net, loader, torch.arange(*shard(len(loader.data))), args.amp)


def recognise(v, bank, index, epoch, step, args):
    """Instance recognition of a batch, (b,), exact or estimated as --ir-loss says."""
    if args.ir_loss == "softmax":
        return instance_softmax(v, bank, index, args.temperature)
    gen, (first, last) = generator(args.seed, epoch, step, "noise"), shard(args.batch_size)
    noise = torch.randint(len(bank), (args.batch_size, args.noise), generator=gen)[first:last]
    noise = noise.to(bank.device, non_blocking=True)
    return instance_loss(v, bank, index, noise, args.temperature, Z * len(bank))


def train(net, optimizer, loader, bank, clusterings, epoch, start, end, sums, args):
    """Steps start .. end of an epoch, by Local Aggregation if there are clusterings, else by recognition.

    -> (next step, sums over the steps of the loss and of what is watched (see main), signal or 0)
    """
    view = View((args.crop_area, 1.0), flip=0.5 * args.flip, **JITTER if args.colour else {})
    batches = enumerate(loader.epoch(epoch, [view], start=start, stop=end), start)
    net.train()
    for step, (index, (images,)) in progress(batches, end - start, f"epoch {epoch + 1}"):
        index = index.to(bank.device, non_blocking=True)
        watched = bank.new_zeros(3).unbind()
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            v = net(images)  # (b, D) float32, unit length from here on
        if clusterings is None:
            each = recognise(v, bank, index, epoch, step, args)  # (b,)
        else:
            similarity, ids, outside = background(v, bank, index, args.background)  # (b, k)
            close = close_neighbours(clusterings, index, ids)  # (b, k)
            each = aggregation_loss(similarity, close, args.temperature)  # (b,)
            count = close.sum(1).float()
            watched = count.mean(), outside.float().mean(), (ids.shape[1] / count).log().mean()
        loss = each.mean()
        optimizer.zero_grad()
        loss.backward()
        *means, signal = heartbeat(loss, *watched)
        optimizer.step()
        update_bank(bank, gather(index, equal=True), gather(v, equal=True), args.bank_momentum)
        sums = [a + b for a, b in zip(sums, means, strict=True)]
        if signal:
            return step + 1, overdue(sums), signal
    return end, overdue(sums), 0


def validate(queries, test, bank, train):
    """{"1": .., "200": ..}: share of test images whose class their nearest rows of the bank tell [4].

    queries (n, D) embeddings of this process's test images, bank (N, D).
    """
    target = test.labels[slice(*shard(len(test)))]
    return knn_accuracy(queries, target, bank, train.labels, len(train.classes))


# --------------------------------------------------------------------------- main


def untrained_accuracy(net, loader, test_loader, args):
    """kNN of the network as it starts, its batch norm filled from 256 images, in a bank of centre crops."""
    net, some = copy.deepcopy(net), torch.arange(min(256, len(loader.data)))
    fill_batch_norm(net, next(loader.fixed(some, batch_size=256))[1][:, 0])
    bank = gather(embed(net, loader, args))
    return validate(embed(net, test_loader, args), test_loader.data, bank, loader.data)


def check(args, data):
    """Refuse, or say, what can only be judged with the data at hand."""
    n = len(data)
    if args.k > n:
        refuse(
            f"--k {args.k} (of recipe {args.recipe}, if not given) is more than the {n} images of {args.data};"
            f" give --k, about {max(2, n // 50)}"
        )
    if args.batch_size > n:
        refuse(f"--batch-size {args.batch_size} is more than the {n} images of {args.data}")
    if args.loss == "la" and not 10 * args.k <= n <= 1000 * args.k:
        say(f"WARNING: --k {args.k} for {n} images is {n / args.k:.3g} in a cluster; about 50 is usual")
    if args.loss == "la" and args.background < 2:
        say("WARNING: --background 1 is the image itself: the loss is 0 and nothing is learnt")
    if args.background > n and args.loss == "la":
        say(f"--background {args.background} is more than the {n} images: all of them are background")
    args.background = min(args.background, n)
    if args.loss == "la" and args.epochs <= args.warm_up:
        say(f"WARNING: all {args.epochs} epochs are warm-up: instance recognition alone")
    if args.lr_steps and min(args.lr_steps) >= args.epochs:
        say(
            f"note: the learning rate first falls after epoch {min(args.lr_steps)}, that is never; see --lr-steps"
        )
    if args.ir_loss == "auto":
        args.ir_loss = "softmax" if n <= EXACT else "nce"
    if args.ir_loss == "nce" and args.noise >= n:
        say(f"WARNING: nce estimates nothing with --noise {args.noise} of {n} images; use --ir-loss softmax")


def main():
    args = options()
    device = setup(args.device)
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    data, test = load_data(args.data, args.root, device)
    labelled = data.labels is not None and test is not None and test.labels is not None
    labels = "labels for reporting only" if data.labels is not None else "no labels"
    say(f"data: {args.data}, {len(data)} images of {data.channels} channels, {labels}; recipe {args.recipe}")
    check(args, data)
    rest = (args.image_size, args.resize, device, args.workers, args.seed, args.max_bad)
    loader = Loader(data, args.batch_size, *rest)
    test_loader = Loader(test, args.batch_size, *rest) if labelled else None
    seed_all(args.seed, "weights")
    trunk, net = make_net(args, data.channels)
    to_device(net, device)
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd), args.lr, args.momentum, fused=True)
    run = Run(args, data, may_differ=("epochs",))
    epoch, step, sums, record, clusterings, untrained = 0, 0, [0.0] * 4, {}, None, None
    if run.state:
        state = run.state
        with run.restoring():
            epoch, step, sums, record = (state[k] for k in ("epoch", "step", "sums", "record"))
            net.load_state_dict(state["net"])
            optimizer.load_state_dict(state["optimizer"])
            bank = shaped(state["bank"], len(data), args.dim).to(device)
            if state["clusterings"] is not None:
                clusterings = shaped(state["clusterings"], args.clusterings, len(data)).to(device)
            untrained, finished = state["untrained"], state["finished"]
        if finished and epoch >= args.epochs:
            say(f"{args.out} is finished after {epoch} epochs; its last lines: {args.out}/log.jsonl")
            leave()
        run.state = state = None  # its copy of the bank
        say(f"going on from epoch {epoch + 1}, step {step} of {args.out}")
        run.log({"resumed": True, "epoch": epoch, "step": step})
    else:
        run.first_record(args, device, data)
        bank = unit(torch.randn(len(data), args.dim, generator=generator(args.seed, "bank"))).to(device)
        if labelled:
            say("embedding all images with the untrained network, to compare with")
            untrained = untrained_accuracy(net, loader, test_loader, args)

    net = synchronise(net)
    trained = parallel(net, args.compile)

    def save(finished=False):
        """Everything there is to the method's state, and the network on its own."""
        run.save(
            {
                "epoch": epoch,  # epochs done ..
                "step": step,  # .. and steps of the one after
                "sums": sums,  # over those steps: loss, close neighbours, share outside, loss of chance
                "record": record,  # what the log will say of the epoch
                "net": net.state_dict(),
                "optimizer": optimizer.state_dict(),
                "bank": bank,  # (N, D)
                "clusterings": clusterings,  # (H, N), None during the warm-up
                "untrained": untrained,
                "finished": finished,
            }
        )
        about = (args.arch, args.image_size, args.resize, False, data, "local_aggregation")
        saved = save_backbone(run.out / "backbone.pt", trunk, *about, embedding=net[1].linear)
        run.unsaved |= saved is False

    before_leaving(save)
    steps = loader.steps()
    every = args.cluster_every or steps
    while epoch < args.epochs:
        began, seconds, first = time.time(), 0.0, step
        aggregate = args.loss == "la" and epoch >= args.warm_up
        lr = learning_rate(args.lr, epoch, args.lr_steps)
        for group in optimizer.param_groups:
            group["lr"] = lr
        record = record if step else {"epoch": epoch + 1, "phase": "la" if aggregate else "ir", "lr": lr}
        while step < steps:
            position, end = (epoch - args.warm_up) * steps + step, steps
            if aggregate and position % every == 0:
                start, before = time.time(), clusterings
                clusterings = cluster(net, loader, bank, args, epoch, step)
                record |= describe(clusterings, before, data.labels, args.k)
                if args.k > 1:
                    warn_if_trivial(record)
                seconds += time.time() - start
            if aggregate:
                end = min(steps, step + every - position % every)
            step, sums, signal = train(
                trained, optimizer, loader, bank, clusterings, epoch, step, end, sums, args
            )
            if signal:
                stop(signal, save, f"step {step} of epoch {epoch + 1}")
        trained_at = time.time()
        loss, close, outside, chance = (x / steps for x in sums)
        chance = chance if aggregate else recognise_nothing(bank, args)
        record |= {"loss": loss, "chance": chance}  # chance: the loss if all similarities were 0
        record |= {"close": close, "outside": outside} if aggregate else {}
        if labelled:
            record["knn"] = validate(embed(net, test_loader, args), test, bank, data)
        seconds = {"clustering": seconds, "training": trained_at - began - seconds}
        seconds["validation"] = time.time() - trained_at
        record |= {
            "images_per_second": (step - first) * args.batch_size / max(1e-9, seconds["training"]),
            "seconds": seconds,
            "bad_files": len(loader.bad),
        }
        epoch, step, sums = epoch + 1, 0, [0.0] * 4
        run.log(record)
        report(record, args.epochs)
        if epoch % args.save_every == 0 or epoch == args.epochs:
            save()
    finish(run, net, loader, test_loader, epoch, record.get("knn"), untrained, args)
    save(finished=True)
    run.finish()


def finish(run, net, loader, test_loader, epochs, knn, untrained, args):
    """Cluster the trained network's embeddings of centre crops once, write what the run leaves behind."""
    data, z = loader.data, embed(net, loader, args)
    found = clustering(z, args, "final", "k-means")
    assign, distance = gather(found.assign).cpu(), gather(found.distance).cpu()
    result = {"epochs": epochs, **cluster_sizes(assign, args.k), **label_scores(data.labels, assign)}
    if args.k > 1:
        warn_if_trivial(result)
    if test_loader:
        now = validate(embed(net, test_loader, args), test_loader.data, gather(z), data)
        result |= {"knn": knn, "knn_centre_crops": now, "knn_untrained_centre_crops": untrained}
    run.log({"result": result, "minutes": run.minutes()})
    save_assignments(run.out / "assignments.csv", data, assign)
    save_pictures(run.out / "clusters.png", loader, assign, distance)
    if test_loader:
        say(f"kNN of {len(test_loader.data)} test images, with 1 / 200 neighbours: in a bank of centre crops "
            f"{percent(untrained)} untrained, {percent(now)} now; in the memory bank {percent(knn)}")  # fmt: skip
    say(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")
    labelled = "" if data.labels is not None else " --data LABELLED"
    say(f"evaluate the features: python eval_linear.py {run.out}{labelled}")


def recognise_nothing(bank, args):
    """Instance recognition's loss if all similarities were 0: ln N, or what NCE makes of it."""
    if args.ir_loss == "softmax":
        return math.log(len(bank))
    ids = torch.zeros(1, args.noise, dtype=torch.int64, device=bank.device)
    zero = bank.new_zeros(1, bank.shape[1])
    return instance_loss(zero, bank, ids[:, 0], ids, args.temperature, Z * len(bank)).item()


def describe(clusterings, before, labels, k):
    """Sizes of the first clustering, its NMI to the first of the clusterings before and to labels."""
    assign = clusterings[0].long().cpu()
    previous = None if before is None else nmi(before[0].cpu(), assign)
    return {**cluster_sizes(assign, k), "nmi_previous": previous, **label_scores(labels, assign)}


def percent(knn):
    """Accuracy with 1 and with 200 neighbours as text."""
    return f"{100 * knn['1']:.1f} / {100 * knn['200']:.1f} %"


def report(record, epochs):
    """One readable line per epoch."""
    parts = [f"epoch {record['epoch']:3d}/{epochs}  {record['phase']} loss {record['loss']:.3f}"]
    parts[0] += f" (chance {record['chance']:.2f})"
    if record["phase"] == "la":
        parts.append(f"{record['close']:.0f} close, own image outside {record['outside']:.1%}")
    if "clusters" in record:  # else none was due in this epoch (--cluster-every)
        parts.append(f"{record['clusters']} clusters of {record['smallest']}-{record['largest']}")
    for name, title in (("nmi_previous", "NMI to previous"), ("nmi_labels", "to labels")):
        parts += [f"{title} {record[name]:.3f}"] if record.get(name) is not None else []
    parts += [f"kNN {percent(record['knn'])}"] if "knn" in record else []
    seconds = " + ".join(f"{s:.1f}" for s in record["seconds"].values())
    say("  ".join(parts), f" {record['images_per_second']:.0f} img/s  {seconds} s")


if __name__ == "__main__":
    main()
