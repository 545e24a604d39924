"""Local Aggregation: pull an image's embedding towards those of its neighbors that share a cluster with it.

Zhuang, Zhai & Yamins, Local Aggregation for Unsupervised Learning of Visual Embeddings, ICCV 2019; with what it starts
from and is compared with: Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination, 2018.

    each epoch:  clusterings = H times k-means(bank)           (H, N)  another start each time
    each batch:  v = unit(net(random crops))                   (B, D)  embeddings
                 background = the bank's k nearest rows to v   (B, k)
                 close = background in the image's cluster     (B, k)  in any of the H clusterings
                 loss = -log( sum over close of exp(bank.v / tau) / sum over background of the same )
                 bank = unit((bank + v) / 2)                   (N, D)  for the images of the batch

The first --ir-epochs, and all of them with --loss ir, learn instance recognition: which one of all images is this?
loss = -log softmax(bank.v / tau) at the image's own row, or its estimate by noise-contrastive estimation (NCE).

Symbols: N images, B batch (--batch-size, over all processes), D embedding size (--dim), H --clusterings, K clusters
in each (--k, the paper's m), k --num-neighbors, m --num-negatives of NCE, tau --temperature.

    python local_aggregation.py                            laptop: digits, no download, no GPU
    python local_aggregation.py --loss ir                  the baseline: instance recognition alone
    python local_aggregation.py --data cifar10 --arch lenet5   half an hour on a CPU; leave out --arch with a GPU
    python local_aggregation.py --data my/photos           a folder of images, no labels needed
    torchrun --nproc_per_node=8 local_aggregation.py --data data/imagenet --arch vgg16   a run of the paper

What to expect: on digits, 30 s on 2 cores, the nearest neighbor tells the class of 98 % of the test images by their
center crops (instance recognition alone 92, random network 93; pixels 99), of 96 to 97 % in the memory bank (91).
Rounding moves these numbers by a point. The loss falls below "uniform", that of equal similarities, within ten epochs.
Collapse: one cluster holds most images. Stopped at any time, the same command goes on after the last epoch. A folder of N
images has K = N / 50, k = N / 5, half of its epochs for instance recognition, and the rest by folder_recipe of common.py.

Departs from the papers and their code, on purpose:
 1. Instance recognition is exact up to 131,072 images, NCE beyond (the code: NCE always; --ir-loss nce). NCE needs
    far fewer negatives than images: with 4096 for the 1,437 digits nothing is learnt.
 2. Losses are computed in log space, without the code's 1e-7. An image is always among its own neighbors (the code:
    if it is near enough; else the loss may be log 1e-7).
 3. Clusterings come before an epoch's first step (the authors' PyTorch code: after it, and only once if B divides N).
 4. AlexNet has (H, K) = (3, 10,000), the paper's table (the code: 3 x 30,000); vgg16 has batch 256 throughout.
 5. Networks are the other scripts', with batch norm in the linear layers, too, as in the code. The code's AlexNet has
    64-192-384-384-256 maps, its VGG normalizes one layer in each stage, its ResNets are pre-activation ones, its
    batch norm keeps 0.997 of its statistics at a step (ours 0.9). ResNets up to 64 pixels: 3x3 stem, no pooling.
 6. Batch norm has no weight decay (the code's AlexNet: it has). On several GPUs it is over all of them; several
    processes on CPUs each normalize their own part of a batch.
 7. Colors are jittered before, not after, a fifth of the images turn gray, in one order for a batch. Random crops of
    data in memory are bilinear without antialiasing. An epoch's last incomplete batch is dropped.
 8. On GPUs the network trains in bf16 autocast (--no-amp). Bank, neighbors and k-means are float32.
 9. Recipes of data other than ImageNet are ours; of color images only LeNet-5's were run to the end.
"""

import copy
import math
import time
from argparse import BooleanOptionalAction as YesNo
from itertools import pairwise
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Loader, Meter, Run, View, all_gather, all_reduce_sum, assign_folder, autocast, baselines,
    cluster_sizes, error, extract, fill_batch_norm, folder_recipe, generator, init_defaults, kmeans,
    knn_accuracy, label_scores, load_backbone, load_data, load_file, make_backbone, make_parser,
    nearest, nmi, number, parallel, pixel_net, print_once, read_backbone, save_clusters, save_file,
    seed_epoch, setup, shard, to_device,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import nn

# %% recipes and options
# Data set (or recipe-arch) -> hyper-parameters: the paper's ImageNet runs, section 4, with the code's schedules, which
# count the epochs of instance recognition, too. Flags override.

IMAGENET = {
    "arch": "resnet18", "epochs": 200, "lr_steps": [160, 187], "clusterings": 10, "k": 30000, "num_neighbors": 4096,
    "ir_epochs": 10, "batch_size": 128, "lr": 0.03, "wd": 1e-4, "image_size": 224, "center_fraction": 0.875,
    "crop_area": 0.2, "flip": True, "color": True,
}  # fmt: skip
CIFAR = {**IMAGENET, "image_size": 32, "center_fraction": 1.0, "k": 1000, "clusterings": 3}
GRAY = {**CIFAR, "arch": "lenet5", "crop_area": 0.5, "color": False}
FASHION = {**GRAY, "epochs": 12, "lr_steps": [9, 11], "ir_epochs": 4}
RECIPES = {
    "imagenet": IMAGENET,  # and folders
    "imagenet-resnet50": {**IMAGENET, "arch": "resnet50", "lr_steps": [152, 189]},
    "imagenet-alexnet": {**IMAGENET, "arch": "alexnet", "clusterings": 3, "k": 10000, "epochs": 160, "lr_steps": [119, 142]},
    "imagenet-vgg16": {**IMAGENET, "arch": "vgg16", "clusterings": 6, "k": 10000, "epochs": 168, "lr_steps": [126, 148], "batch_size": 256},
    **dict.fromkeys(("cifar10", "cifar100-20", "stl10"), CIFAR),  # from here on ours
    "cifar10-lenet5": {**CIFAR, "arch": "lenet5", "epochs": 16, "ir_epochs": 8, "lr_steps": [13, 15]},
    "svhn": {**CIFAR, "flip": False},
    "fashionmnist": FASHION,
    "mnist": {**FASHION, "flip": False},
    "digits": {**GRAY, "epochs": 60, "lr_steps": [48, 57], "k": 30, "flip": False},
}  # fmt: skip
EXACT, NEGATIVES = 2**17, 4096  # images up to which the softmax over the whole bank is taken; --num-negatives


def photos(known):
    """The recipe of a folder, ours: see folder_recipe; {} where it is the paper's."""
    n, shared = folder_recipe(known, 60_000)
    if not n:
        return {}
    return {
        **IMAGENET, "k": max(2, n // 50), "clusterings": 3, "num_neighbors": min(4096, max(2, n // 5)),
        "ir_epochs": shared["epochs"] // 2, "lr_steps": [max(1, shared["epochs"] * 4 // 5)],
        "lr": 0.003 if known.init else 0.03, **shared,
    }  # fmt: skip


def options(argv=None):
    """The command line as a namespace."""
    p = make_parser("Local Aggregation (Zhuang et al. 2019)")
    share, count = number(float, 0, 1), number(int, 1)
    # fmt: off
    g = p.add_argument_group("training")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take; None: those of --data. NAME-ARCH, where there is one, for --arch ARCH")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--epochs", type=count, help="passes over the data, those of --ir-epochs among them; a longer run may continue a finished one")
    g.add_argument("--batch-size", type=number(int, 2), help="images per step, over all processes [4]")
    g.add_argument("--lr", type=number(float, 0), help="learning rate at the start [4]")
    g.add_argument("--lr-steps", type=count, nargs="*", help="epochs after which the learning rate is divided by ten [code]")
    g.add_argument("--wd", type=number(float, 0), help="weight decay, of all weights but batch norm's [4, code]")
    g.add_argument("--momentum", type=share, default=0.9, help="of SGD [4]")
    g.add_argument("--image-size", type=number(int, 1, 4096), help="side of the square the network sees, in pixels [4]")
    g.add_argument("--center-fraction", type=number(float, 0.01, 1), help="share of the shorter side that a center crop keeps; 0.875: 224 of 256 pixels [code]")
    g.add_argument("--crop-area", type=number(float, 0.001, 1), help="smallest share of the image that a random crop keeps [code]")
    g.add_argument("--flip", action=YesNo, help="flip half of the training images horizontally [code]")
    g.add_argument("--color", action=YesNo, help="jitter brightness, contrast, saturation and hue by 0.4; a fifth of the images gray [code]")
    g = p.add_argument_group("Local Aggregation")
    g.add_argument("--loss", choices=["la", "ir"], default="la", help="ir: instance recognition in all epochs, the baseline [4]")
    g.add_argument("--ir-epochs", type=number(int, 0), help="epochs of instance recognition before the first clustering [4, code]; on small data 5 to 20, longer hurts")
    g.add_argument("--k", type=count, help="clusters in each clustering, the paper's m [3, 4]; the recipes have 40 to 130 images in each")
    g.add_argument("--clusterings", type=count, help="H: k-means runs whose clusters are united [3]")
    g.add_argument("--cluster-every", type=number(int, 0), default=0, metavar="STEPS", help="steps between clusterings; 0: once an epoch [supplementary 3]")
    g.add_argument("--cluster-on", choices=["bank", "center-crop"], default="bank", help="embeddings to cluster: the bank's, or fresh ones of center crops [supplementary 3]")
    g.add_argument("--num-neighbors", type=number(int, 2), help="k: nearest images each one is compared with, itself among them; at most N [3]")
    g.add_argument("--temperature", type=number(float, 1e-4), default=0.07, help="tau; smaller: only the nearest images count [3]")
    g.add_argument("--bank-momentum", type=share, default=0.5, help="share of the old embedding when the bank is updated [3, code]")
    g.add_argument("--dim", type=number(int, 1, 16384), default=128, help="D, numbers in an embedding [4]")
    g.add_argument("--ir-loss", choices=["auto", "softmax", "nce"], default="auto", help=f"instance recognition over the whole bank (B x N matrices), or its estimate from --num-negatives; auto: softmax up to {EXACT:,} images")
    g.add_argument("--num-negatives", type=count, default=NEGATIVES, help="m: images that nce takes for others, for each image; far fewer than there are [Wu et al.]")
    # fmt: on
    known, _ = p.parse_known_args(argv)
    base = known.recipe or (known.data if known.data in RECIPES else "imagenet")
    p.set_defaults(**RECIPES.get(f"{base}-{known.arch}", RECIPES[base]))
    p.set_defaults(**photos(known))
    p.set_defaults(**init_defaults(known))
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of --data or --recipe")
    args = p.parse_args(argv)
    if args.loss == "la" and args.epochs <= args.ir_epochs:
        p.error(f"all {args.epochs} --epochs would be --ir-epochs: no Local Aggregation; if meant, --loss ir")
    name = Path(args.data).resolve().name + "-ir" * (args.loss == "ir")
    args.out = args.out or f"runs/local_aggregation-{name}"
    return args


# %% network


class Network(nn.Module):
    """Images (B, C, S, S) -> embeddings (B, D), float32 of unit length. No dropout, no Sobel [4, code]."""

    def __init__(self, args, channels):
        super().__init__()
        self.backbone = make_backbone(args, channels, dropout=0.0, pool=True, norm=True)
        self.embedding = nn.Linear(self.backbone.dim, args.dim)

    def forward(self, images):
        return F.normalize(self.embedding(F.relu(self.backbone(images))).float(), dim=1)


def parameter_groups(net, wd):
    """SGD's groups: weight decay for all weights but batch norm's [code]."""
    norms = [m for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    free = {p for m in norms for p in m.parameters()}
    decayed = [p for p in net.parameters() if p not in free]
    rest = [p for p in net.parameters() if p in free]
    return [{"params": decayed, "weight_decay": wd}, {"params": rest, "weight_decay": 0.0}]


# %% the algorithm (no process or device: nothing to set up)
# Rows of the bank (N, D) and embeddings v (B, D) have unit length; gradients flow through v alone. Every process holds
# the whole bank, which is searched at every step: 0.66 GB for ImageNet's 1,281,167 images and D = 128.


def instance_softmax(v, bank, index, tau):
    """Instance recognition: -log softmax over all N images at the own one, (B,) [Wu et al. 3.1].

    v (B, D), bank (N, D), index (B,) rows of the images themselves. Three (B, N) matrices exist at once."""
    return F.cross_entropy(v @ bank.T / tau, index, reduction="none")


def instance_nce(v, bank, index, negatives, tau, normalizer=2876934.2 / 1281167):
    """Instance recognition by noise-contrastive estimation, (B,) [Wu et al. 3.2].

    v (B, D), bank (N, D), index (B,) rows of the images themselves, negatives (B, m) rows drawn from all N.
    p(j) = exp(bank_j.v / tau) / (N normalizer), a constant of the released code; h(j) = p(j) / (p(j) + m/N), the
    probability that j is the image and no negative; loss = -log h(index) - sum over negatives of log(1 - h(j)).
    Their rows, (B, m, D), are 0.27 GB for B = 128 and m = 4096.
    """
    offset = math.log(normalizer * negatives.shape[1])  # in log space, for exp(1 / 0.07) is 1.6 million
    own = (v * bank[index]).sum(1) / tau - offset  # (B,) log of p / (m/N)
    other = torch.einsum("bmd,bd->bm", bank[negatives], v) / tau - offset  # (B, m)
    return F.softplus(-own) + F.softplus(other).sum(1)


def background_neighbors(v, bank, index, k, most=2**27):
    """B_i: the k rows of the bank nearest to each v, the image's own row always among them [3].

    -> similarity (B, k) with gradient, ids (B, k) in no order, outside (B,): was the own row not among the nearest?
    It then takes the place of the least near. Exact; as many rows of v at a time as keep every matrix within `most`
    entries (2^27: 512 MiB), or one.
    """
    parts = v.split(max(1, most // len(bank)))
    found = [(part @ bank.T).topk(k, sorted=False) for part in parts]
    similarity, ids = (torch.cat(x) for x in zip(*found, strict=True))  # (B, k)
    outside = (ids != index[:, None]).all(1)
    last = similarity.detach().argmin(1, keepdim=True)  # (B, 1) where the least near stands
    give_up = torch.zeros_like(ids, dtype=torch.bool).scatter_(1, last, outside[:, None])
    own = (v * bank[index]).sum(1, keepdim=True)  # (B, 1)
    return torch.where(give_up, own, similarity), torch.where(give_up, index[:, None], ids), outside


def close_neighbors(clusterings, index, ids):
    """C_i within B_i, (B, k) bool: who shares a cluster with the image in any of the clusterings [3].

    clusterings (H, N), index (B,) the images, ids (B, k) their background neighbors. An image is close to itself.
    """
    close = torch.zeros_like(ids, dtype=torch.bool)
    for assign in clusterings:
        close |= assign[ids] == assign[index][:, None]
    return close


def aggregation_loss(similarity, close, tau):
    """-log( sum over close of exp(similarity / tau) / sum over all of the same ), (B,) [3].

    similarity (B, k) to the background neighbors, close (B, k) bool; all in a row: 0; none: a huge loss. Computed as
    log(1 + far / close), for the difference of two logarithms has no digits left where losses are small."""
    assert similarity.shape == close.shape, f"{tuple(similarity.shape)} against {tuple(close.shape)}"
    logits = similarity / tau
    nothing = torch.finfo(logits.dtype).min  # not -inf: where it stands alone, its gradient would be NaN
    far, near = (logits.masked_fill(mask, nothing).logsumexp(1) for mask in (close, ~close))
    return F.softplus(far - near)


def update_bank(bank, index, v, momentum=0.5):
    """bank_i <- unit(momentum bank_i + (1 - momentum) v_i) for the batch's rows, in place [3, code].

    An embedding exactly opposite to its row would leave nothing to normalize: it then replaces the row.
    """
    v = v.detach()
    mixed = momentum * bank[index] + (1 - momentum) * v
    gone = mixed.norm(dim=1, keepdim=True) < 1e-6
    bank[index] = F.normalize(torch.where(gone, v, mixed), dim=1)


# %% one epoch


def parts(position, steps, every):
    """[(start, stop, cluster first?)], the parts of an epoch of `steps` steps that begins `position` steps after the
    first clustering; another one follows every `every` steps."""
    due = range(-position % every, steps, every)
    return [(start, stop, start in due) for start, stop in pairwise(sorted({0, *due, steps}))]


def embed(net, loader):
    """Unit embeddings (n, D) of the center crops of this process's images."""
    return extract(net, loader, torch.arange(*shard(len(loader.data))), F.normalize)


def cluster(net, loader, bank, args, gen):
    """H clusterings of all embeddings, (H, N) int32, each from another start."""
    z = bank[slice(*shard(len(bank)))] if args.cluster_on == "bank" else embed(net, loader)
    return torch.stack([all_gather(kmeans(z, args.k, gen)[0]).int() for _ in range(args.clusterings)])


def recognize(v, bank, index, args):
    """Instance recognition of a batch, (b,), exact or estimated as --ir-loss says."""
    if args.ir_loss == "softmax":
        return instance_softmax(v, bank, index, args.temperature)
    negatives = torch.randint(len(bank), (len(v), args.num_negatives), device=v.device)
    return instance_nce(v, bank, index, negatives, args.temperature)


def train(net, optimizer, batches, bank, clusterings, meter, args):
    """Steps of Local Aggregation or, without clusterings, of instance recognition; the bank moves on. -> sums over the
    images (3,): close neighbors; own row not among the nearest; the loss of equal similarities."""
    sums = bank.new_zeros(3, dtype=torch.float64)
    net.train()
    for index, (images,) in batches:
        with autocast(images.device, args.amp):
            v = net(images)  # (b, D) float32, unit length from here on
        if clusterings is None:
            each = recognize(v, bank, index, args)  # (b,)
        else:
            similarity, ids, outside = background_neighbors(v, bank, index, args.num_neighbors)  # (b, k)
            close = close_neighbors(clusterings, index, ids)  # (b, k)
            each = aggregation_loss(similarity, close, args.temperature)  # (b,)
            count = close.sum(1).double()
            sums += torch.stack([count.sum(), outside.sum(), (ids.shape[1] / count).log().sum()])
        loss = each.mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        update_bank(bank, all_gather(index, equal=True), all_gather(v, equal=True), args.bank_momentum)
        meter.add(len(index), loss)
    return sums


def knn(net, loader, eval_loader, bank=None):
    """knn_accuracy of the test images in the memory bank (N, D) or, without one, among center crops [4]; {} without
    test images that have labels."""
    if not eval_loader:
        return {}
    data, test, own = loader.data, eval_loader.data, slice(*shard(len(loader.data)))
    if bank is None:
        bank, labels = embed(net, loader), data.without_unreadable(data.labels)[own]
    else:  # where files that cannot be read have rows, too
        bank, labels = bank[own], data.labels[own]
    queries, target = embed(net, eval_loader), test.without_unreadable(test.labels)
    found = knn_accuracy(queries, target[slice(*shard(len(test)))], [(bank, labels)])
    return {f"knn_{k}": share for k, share in found.items()}


# %% main

# Shown of each epoch; uniform is the loss if all similarities were equal.
SHOWN = ("epoch", "phase", "loss", "uniform", "nmi_previous", "knn_1", "seconds")


def check(args, data):
    """Settle, refuse or say what can only be judged with the data at hand."""
    n = len(data)
    if args.k > n:
        error(f"--k {args.k} is more than the {data}; try {max(2, n // 50)}")
    if args.loss == "la" and not 10 * args.k <= n <= 1000 * args.k:
        print_once(f"WARNING: --k {args.k} for {n} images is {n / args.k:.3g} in each; about 50 is usual")
    if args.lr_steps and min(args.lr_steps) >= args.epochs:
        print_once(f"WARNING: the learning rate never falls: --lr-steps begin with {min(args.lr_steps)}")
    args.num_neighbors = min(args.num_neighbors, n)
    if args.ir_loss == "auto":
        args.ir_loss = "softmax" if n <= EXACT else "nce"
    if args.ir_loss == "softmax" and args.num_negatives != NEGATIVES:
        error("--num-negatives is for --ir-loss nce, and these images take the exact softmax")
    if args.ir_loss == "nce" and args.num_negatives >= n:
        print_once(f"WARNING: nce learns nothing from {args.num_negatives} --num-negatives of {n} images")


def load_model(run, device):
    """What clusters images as a finished run did, see assign_folder."""
    backbone, saved = load_backbone(run)[0], read_backbone(run)
    embedding = nn.Linear(*saved["embedding"]["weight"].T.shape)
    embedding.load_state_dict(saved["embedding"])
    centroids = load_file(run / "clustering.pt")["centroids"].to(device)
    net = nn.Sequential(backbone, nn.ReLU(), embedding).to(device)
    return net, F.normalize, lambda z: nearest(z, centroids)


def main():
    args = options()
    if args.assign:
        return assign_folder(args, load_model)
    device = setup(args.device)
    data, test = load_data(args.data, args.root, args.normalize)
    check(args, data)
    how = args.batch_size, args.image_size, args.center_fraction, device, args.workers
    loader, eval_loader = Loader(data, *how), None
    if data.labels is not None and test and test.labels is not None:
        eval_loader = Loader(test, *how, training=False)
    steps = len(data) // args.batch_size
    print_once(f"{data}, K = {args.k}, {steps} steps an epoch, on {device}")

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    net = to_device(Network(args, len(data.mean)), device)
    optimizer = torch.optim.SGD(parameter_groups(net, args.wd), args.lr, args.momentum)
    colors = {"jitter": (0.4, 0.4, 0.4, 0.4), "jitter_p": 1.0, "gray": 0.2} if args.color else {}
    view = View(args.image_size, area=(args.crop_area, 1.0), flip=0.5 * args.flip, **colors)

    run = Run("local_aggregation", args, data, may_change={"epochs", "recipe"})
    if run.finished:
        return
    if run.state:
        done, bank, clusterings, random = map(run.state.get, ("epoch", "bank", "clusterings", "random"))
        clusterings = clusterings if clusterings is None else clusterings.to(device)
        net.load_state_dict(run.state["net"])
        optimizer.load_state_dict(run.state["optimizer"])
    else:
        done, clusterings = 0, None
        bank = F.normalize(torch.randn(len(data), args.dim, generator=generator(args.seed, "bank")))
        random = copy.deepcopy(net)
        random = random if args.init else fill_batch_norm(random, loader, torch.arange(min(256, len(data))))
        few = data.labels is not None and len(data) <= 100_000
        random = (cluster_crops(random, loader, args)[2] if few else {}) | knn(random, loader, eval_loader)
    bank, zero = bank.to(device), torch.zeros(1, dtype=torch.int64, device=device)
    trained = parallel(torch.compile(net) if args.compile else net)

    for epoch in range(done, args.epochs):
        began, gen, seconds, sums = time.time(), seed_epoch(args.seed, epoch), 0.0, 0
        aggregate = args.loss == "la" and epoch >= args.ir_epochs
        lr = args.lr * 0.1 ** sum(epoch >= step for step in args.lr_steps)
        record = {"epoch": epoch + 1, "epochs": args.epochs, "phase": "la" if aggregate else "ir", "lr": lr}
        for group in optimizer.param_groups:
            group["lr"] = lr
        order = torch.randperm(len(data), generator=gen)
        meter = Meter(f"epoch {epoch + 1}/{args.epochs}", steps * loader.b)
        position, every = (epoch - args.ir_epochs) * steps, args.cluster_every or steps
        for start, stop, due in parts(position, steps, every) if aggregate else [(0, steps, False)]:
            if due:
                seconds -= time.time()
                before, clusterings = clusterings, cluster(net, loader, bank, args, gen)
                seconds += time.time()
                assign = clusterings[0].long().cpu()
                record |= {**cluster_sizes(assign, args.k), **label_scores(data.labels, assign)}
                record |= {} if before is None else {"nmi_previous": nmi(before[0].cpu(), assign)}
            batches = loader.train(order[start * args.batch_size : stop * args.batch_size], [view])
            sums += train(trained, optimizer, batches, bank, clusterings, meter, args)
        record["loss"] = meter.mean_loss()
        close, outside, uniform = (all_reduce_sum(sums) / (steps * args.batch_size)).tolist()
        record |= {"close": close, "outside": outside} if aggregate else {}
        record["uniform"] = uniform if aggregate else recognize(0 * bank[:1], bank, zero, args).item()
        record |= knn(net, loader, eval_loader, bank)
        record |= {"seconds_clustering": seconds, "seconds": time.time() - began}
        run.end_epoch(record, *SHOWN)
        state = {
            "epoch": epoch + 1,
            "net": net.state_dict(),
            "optimizer": optimizer.state_dict(),
            "bank": bank,  # (N, D)
            "clusterings": clusterings,  # (H, N), None in the epochs of instance recognition
            "random": random,  # scores of the random network
        }
        run.save(state, net.backbone, loader, embedding=net.embedding.state_dict())
    finish(run, net, loader, eval_loader, bank, random, args)
    torch.distributed.destroy_process_group()


def cluster_crops(net, loader, args):
    """Cluster the embeddings of center crops once: (N,) clusters and squared distances, their scores, and what assigns
    a new image."""
    data = loader.data
    assign, distance, centroids, objective = kmeans(embed(net, loader), args.k, generator(args.seed, "final"))
    assign, distance = all_gather(assign).cpu(), all_gather(distance).cpu()
    scores = label_scores(data.labels, assign, data.unreadable)
    return assign, distance, scores, {"centroids": centroids, "objective": objective}


def finish(run, net, loader, eval_loader, bank, random, args):
    """Write and print what the run leaves behind."""
    assign, distance, scores, model = cluster_crops(net, loader, args)
    save_file(run.out / "clustering.pt", model)
    save_clusters(run.out, loader, assign, distance, args.k)
    others, found = {args.start: random, **baselines(loader, args.k, generator(args.seed, "baselines"))}, {}
    if eval_loader:
        found = {"center crops": knn(net, loader, eval_loader), args.start: random}
        found["memory bank"] = knn(net, loader, eval_loader, bank)
        if "pixels" in others:
            found["pixels"] = knn(pixel_net(args.image_size), loader, eval_loader)
        words = [f"{name} {100 * x['knn_1']:.1f} / {100 * x['knn_200']:.1f}" for name, x in found.items()]
        print_once(f"kNN of test images in %, K = 1 / 200: {', '.join(words)}")
    run.log({"result": {**cluster_sizes(assign, args.k), **scores}, "knn": found, "baselines": others})
    if scores:
        words = [f"{name} {x['nmi_labels']:.3f}" for name, x in others.items() if "nmi_labels" in x]
        print_once(f"NMI of clusters and labels: {scores['nmi_labels']:.3f}; {', '.join(words)}")
    print_once(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")


if __name__ == "__main__":
    main()
