"""DeepCluster: cluster the features of a network, train the network to predict the clusters, repeat.

Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018; with the
options of Mustapha et al., A Deep Dive into Deep Cluster, 2022 ("Deep Dive").

    each epoch:  x = body(centre crops)                 (N, D)  features, no gradient
                 z = unit(whiten(pca(x)))               (N, P)
                 y = k-means(z)                         (N,)    pseudo-labels, --k
                 new head; one epoch of cross-entropy(head(body(random crops)), y),
                 images drawn uniformly over the clusters

Symbols: N images, B batch (--batch-size, over all processes), D feature size, P --pca, K --k.

    python deepcluster.py                                              laptop: digits, no download, no GPU
    python deepcluster.py --data fashionmnist                          Deep Dive, 10 minutes on 2 cores
    python deepcluster.py --data my/photos --k 100 --arch resnet18     a folder of images, no labels needed
    torchrun --nproc_per_node=8 deepcluster.py --arch vgg16 --k 10000  the paper's ImageNet run (data/imagenet)

What to expect: on digits, NMI of clusters and labels goes from 0.617 (untrained) to 0.720 in 40 epochs, 20 s
on 2 cores. Nothing learnt: the loss stays at ln K. Collapse: one cluster holds most images (a warning is
printed) and NMI to the previous epoch goes to 0 or jumps to 1.

Departs from the paper and its code, on purpose:
 1. Images are drawn uniformly over clusters as the paper says; the released code's draws follow the
    clusters' sizes (it looks ids up in a re-ordered dataset). --balance none comes closest to that.
 2. An epoch's last incomplete batch is dropped.
 3. PCA is fitted on --pca-sample images, at most 2^28 numbers in all (65,536 images of 4096 features, 2,674
    of ResNet-50's map), on all if there are no more (the code: on all); over 8192 columns its axes come
    from ten power iterations.
 4. On CUDA, training and features run in bf16 autocast (the paper: float32); --no-amp. k-means is float32.
 5. The paper trains on one GPU; with several processes every one normalises its own part of a batch, and
    features are computed with process 0's batch-norm statistics.
 6. k-means, PCA and whitening run in our own code around faiss's search: sharded, and finite where
    features are dead. NMI has the geometric mean, as printed in the paper.
 7. Crops of data in memory are bilinear without antialiasing. ResNets up to 64 pixels: 3x3 stem, no pooling.
 8. At the end images are clustered once more, also with --halt-clustering: assignments.csv shows the trained
    network's clusters, not the last pseudo-labels.
 9. Deep Dive: kernels, pools and hidden layers of its small AlexNet are not printed (3x3, two 2x2 pools,
    2048 as in its code's AlexNet_Small); --halt-clustering keeps the head, too (its code starts a new one
    every cycle: --reset-head), and the head's SGD has no momentum (its code: the body's).
10. digits, mnist, cifar100-20 and stl10 have no recipe in either paper: theirs are ours. ResNet B's linear layers
    have the AlexNet's dropout (not printed).
"""

import argparse
import math
import os
import time
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import nn

from common import (
    ARCHS,
    DATASETS,
    Loader,
    Parser,
    Run,
    View,
    backbone,
    before_leaving,
    check_finite,
    cluster_sizes,
    default_data,
    default_resize,
    extract,
    finite_or_leave,
    gather,
    generator,
    he_init,
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
    pca,
    progress,
    refuse,
    save_assignments,
    save_backbone,
    save_pictures,
    say,
    seed_all,
    seed_step,
    setup,
    shaped,
    shard,
    share_buffers,
    stop,
    to_device,
    unit,
    warn_if_few,
    warn_if_trivial,
    whiten,
)

# --------------------------------------------------------------------------- recipes and options
# Data set (or data-arch) -> the hyper-parameters of the paper that used it. Flags override.

RECIPES = {
    "imagenet": {  # Caron et al. 3.4
        "arch": "alexnet", "sobel": True, "k": 10000, "epochs": 500, "batch_size": 256, "lr": 0.05, "wd": 1e-5,
        "momentum": 0.9, "pca": 256, "image_size": 224,
    },
    "fashionmnist": {  # Deep Dive, Table 1 and section 3.3; resize here and below is the code's
        "arch": "lenet5", "sobel": False, "k": 5, "epochs": 50, "batch_size": 128, "lr": 0.1, "wd": 1e-3,
        "momentum": 0.1, "pca": 0, "image_size": 32, "resize": 44,
    },
    "svhn": {
        "arch": "alexnet-small", "sobel": True, "k": 200, "epochs": 100, "batch_size": 64, "lr": 0.1, "wd": 1e-3,
        "momentum": 0.5, "pca": 256, "image_size": 32, "resize": 44,
    },
    "cifar10": {
        "arch": "alexnet-small", "sobel": True, "k": 1000, "epochs": 100, "batch_size": 64, "lr": 0.1, "wd": 1e-3,
        "momentum": 0.9, "pca": 256, "image_size": 32, "resize": 45,
    },
    "cifar10-alexnet": {  # Deep Dive, appendix A
        "arch": "alexnet", "sobel": True, "k": 2000, "epochs": 100, "batch_size": 256, "lr": 0.05, "wd": 1e-5,
        "momentum": 0.9, "pca": 256, "image_size": 224,
    },
    "digits": {  # ours
        "arch": "lenet5", "sobel": False, "k": 30, "epochs": 40, "batch_size": 64, "lr": 0.1, "wd": 1e-5,
        "momentum": 0.9, "pca": 60, "image_size": 32, "crop_area": 0.7, "flip": False,
    },
}  # fmt: skip
RECIPES["mnist"] = {**RECIPES["fashionmnist"], "k": 10, "flip": False, "resize": 32}
RECIPES["cifar100-20"] = RECIPES["stl10"] = {**RECIPES["cifar10"], "resize": 32}


def options(argv=None):
    """The command line as a namespace; unknown or impossible values end with exit code 2."""
    p = Parser("DeepCluster (Caron et al. 2018)")
    # fmt: off
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=default_data(), help=f"{', '.join(DATASETS)}, or a folder of images: train/ and val/, one folder per class, or unlabelled")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--k", type=int, help="clusters; some over-clustering helps [4.1]; not used by pic")
    g.add_argument("--epochs", type=int, help="passes over the data; a longer run may continue a finished one")
    g.add_argument("--batch-size", type=int, help="images per step, over all processes [3.4]")
    g.add_argument("--lr", type=number, help="learning rate, constant [3.4]")
    g.add_argument("--wd", type=number, help="weight decay of body and head [3.4]")
    g.add_argument("--image-size", type=int, help="side of the square the network sees, in pixels [3.4, code]")
    g.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1), help="processes that decode files, for each training process; not used for data in memory")
    g.add_argument("--seed", type=int, default=0, help="decides every random number")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    g.add_argument("--amp", action=argparse.BooleanOptionalAction, help="bf16 autocast; None: on for CUDA")
    g.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False, help="torch.compile the body")
    g.add_argument("--out", help="run folder")
    g.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    g.add_argument("--save-every", type=int, default=1, help="epochs between checkpoints; a signal saves at once")
    g.add_argument("--max-bad", type=int, default=100, help="unreadable image files to put up with")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take")
    g.add_argument("--resize", type=int, help="shorter side before the centre crop, in pixels [3.4, code]")
    g = p.add_argument_group("DeepCluster")
    g.add_argument("--clustering", choices=["kmeans", "pic"], default="kmeans", help="pic: power iteration clustering, which finds K itself [3.2, supplementary]")
    g.add_argument("--pca", type=int, help="dimensions kept and whitened before clustering, at most D; 0: none, unit length only [3.4]")
    g.add_argument("--pca-sample", type=int, default=65536, help="images PCA is fitted on where there are more; cut to 2^28 numbers in all (65,536 images of 4096 features)")
    g.add_argument("--balance", choices=["uniform", "loss", "none"], default="uniform", help="draw uniformly over clusters, weight the loss by 1/size instead, or neither [3.3]")
    g.add_argument("--reassign", type=int, default=1, help="epochs of training per clustering [3.4]")
    g.add_argument("--halt-clustering", type=int, default=0, metavar="H", help="cluster in the first H epochs only, then keep labels and head; 0: never halt [Deep Dive 4.2]")
    g.add_argument("--reset-head", action=argparse.BooleanOptionalAction, default=False, help="with --halt-clustering: a new head every epoch all the same [Deep Dive, code]")
    g.add_argument("--initial-alignment", type=int, default=0, metavar="S", help="print NMI(labels, clusters of the untrained network) for S seeds and stop [Deep Dive 4.1.1]")
    g.add_argument("--sobel", action=argparse.BooleanOptionalAction, help="filter images by Sobel's operator, without colour [3.4]")
    g.add_argument("--momentum", type=number, help="of the body's SGD; the head has none [3.4, code]")
    g.add_argument("--dropout", type=number, default=0.5, help="before the hidden linear layers of the AlexNets and ResNet B, between those of vgg16 [3.4]")
    g.add_argument("--resnet-head", choices=["auto", "A", "B"], default="auto", help="A: K-way layer on the flattened map; B: two 4096 layers before it; auto: B for resnet18, A for resnet50 [Local Aggregation, supplementary 2.2]")
    g.add_argument("--crop-area", type=number, default=0.08, help="smallest share of the image a random crop keeps, 0..1 [3.4, code]")
    g.add_argument("--flip", action=argparse.BooleanOptionalAction, default=True, help="mirror half of the training images [3.4]")
    # fmt: on
    # What the other defaults hang on is looked at first, so that --help shows the values that would run.
    peek = Parser(add_help=False)
    for flag, default in (("--data", default_data()), ("--arch", None), ("--recipe", None)):
        peek.add_argument(flag, default=default)
    for flag in ("--image-size", "--initial-alignment"):
        peek.add_argument(flag, type=int)
    first = peek.parse_known_args(argv)[0]
    named = (first.recipe, f"{first.data}-{first.arch}", first.data)
    recipe = next((r for r in named if r in RECIPES), "imagenet")
    size = first.image_size or RECIPES[recipe]["image_size"]
    out = f"runs/deepcluster-{os.path.basename(os.path.normpath(first.data))}"
    out += "-initial-alignment" if first.initial_alignment else ""
    p.set_defaults(out=out, **{**RECIPES[recipe], "recipe": recipe})
    if size != RECIPES[recipe]["image_size"] or "resize" not in RECIPES[recipe]:
        p.set_defaults(resize=default_resize(size))
    args = p.parse_args(argv)
    if args.resnet_head == "auto":
        args.resnet_head = "B" if args.arch == "resnet18" else "A"
    if args.arch == "resnet50" and args.resnet_head == "B":
        p.error(
            "--resnet-head B: ResNet-50 becomes trivial at its third epoch [Local Aggregation, suppl. 2.2]"
        )
    counts = ("k", "epochs", "batch_size", "image_size", "save_every", "reassign", "pca_sample")
    for name in (*counts, "workers", "pca", "halt_clustering", "initial_alignment", "max_bad"):
        if getattr(args, name) < (name in counts):
            p.error(f"--{name.replace('_', '-')} must be at least {int(name in counts)}")
    if not (args.lr >= 0 and args.wd >= 0 and 0 <= args.momentum < 1 and 0 <= args.dropout < 1):
        p.error("--lr and --wd must be at least 0, --momentum and --dropout in 0..1 (1 excluded)")
    if not 0 < args.crop_area <= 1:
        p.error("--crop-area must lie in 0..1")
    if args.resize > 16384:
        p.error("--resize and --image-size must be at most 16384")
    if args.resize < args.image_size:
        p.error(f"--resize {args.resize} is smaller than --image-size {args.image_size}")
    return args


# --------------------------------------------------------------------------- network


def make_body(args, channels):
    """(trunk, body): images (B, C, S, S) -> the features (B, D) that are clustered.

    alexnet, vgg16, lenet5: the last hidden linear layer before its ReLU, body and trunk are one.
    ResNet A: the flattened last map; ResNet B: two linear layers of 4096 on top of it.
    """
    trunk = backbone(args.arch, channels, args.image_size, args.sobel, args.dropout)
    if not args.arch.startswith("resnet") or args.resnet_head == "A":
        return trunk, trunk
    hidden = [nn.Dropout(args.dropout), nn.Linear(trunk.dim, 4096), nn.ReLU(inplace=True)]
    hidden = nn.Sequential(*hidden, nn.Dropout(args.dropout), nn.Linear(4096, 4096))
    he_init(hidden)
    body = nn.Sequential(trunk, hidden)
    body.dim = 4096
    return trunk, body


def make_head(dim, k, *key):
    """ReLU and a linear layer to K logits, N(0, 0.01) weights and bias 0, drawn by the key."""
    head = nn.Sequential(nn.ReLU(), nn.Linear(dim, k))
    nn.init.normal_(head[1].weight, 0, 0.01, generator=generator(*key, "head"))
    nn.init.zeros_(head[1].bias)
    return head


# --------------------------------------------------------------------------- the algorithm


def uniform_over_clusters(assign, gen):
    """An epoch's images (N,), drawn uniformly over the clusters that have any [3.3].

    assign (N,) int64 -> positions (N,): floor(N/K') + 1 from each of the K' non-empty clusters, with
    replacement where a cluster is smaller, shuffled and cut to N.
    """
    n = len(assign)
    shuffled = torch.randperm(n, generator=gen)
    members = shuffled[assign[shuffled].argsort(stable=True)]  # (N,) by cluster, in random order within
    counts = torch.bincount(assign)
    counts = counts[counts > 0]  # (K',)
    starts = counts.cumsum(0) - counts
    quota = n // len(counts) + 1
    in_order = torch.arange(quota).expand(len(counts), -1)  # (K', quota): the first members, all different
    drawn = (torch.rand(len(counts), quota, generator=gen, dtype=torch.float64) * counts[:, None]).long()
    pick = torch.where(counts[:, None] >= quota, in_order, drawn)
    order = members[(starts[:, None] + pick).flatten()]
    return order[torch.randperm(len(order), generator=gen)][:n]


def loss_weights(assign):
    """Weight of each image's loss (N,), 1 / size of its cluster, scaled to mean 1: the same in expectation
    as drawing images uniformly over clusters [3.3]."""
    counts = torch.bincount(assign)
    return len(assign) / ((counts > 0).sum() * counts[assign]).float()


def deep_features(body, loader, p, sample, seed, amp):
    """Whitened unit features (n, P) of this process's shard of the images [3.4].

    PCA is fitted on `sample` images of a random order (on all if there are no more). Beyond that, images
    are projected as they are computed, so that (N, D) features never exist at once. p = 0: no PCA.
    Raises ValueError, on all processes, for NaN or infinite features.
    """
    n = len(loader.data)
    first, last = shard(n)
    mine = torch.arange(first, last)
    if not p:
        return extract(body, loader, mine, amp, then=unit)
    sample = min(sample, max(p, 2**28 // body.dim))  # wide maps: 1 GiB of features at most
    if n <= sample:
        x = extract(body, loader, mine, amp)  # (n, D)
        return whiten(x, *pca(x, p))
    chosen = torch.randperm(n, generator=generator(seed, "pca sample"))[:sample]
    first, last = shard(sample)
    mean, axes = pca(extract(body, loader, chosen[first:last], amp), p)  # (D,), (D, P)
    return extract(body, loader, mine, amp, then=lambda x: whiten(x, mean, axes))


def neighbour_graph(z, k=5):
    """The k nearest other images of every image: ids (N, k), squared distances (N, k), nearest first.

    z (n, P): this process's rows; the rows of all are gathered (N x P floats on each process).
    """
    check_finite(z)
    keys = gather(z)
    first, last = shard(len(keys))
    distance, ids = nearest(z, keys, min(k + 1, len(keys)))  # an image is its own neighbour ..
    own = ids == torch.arange(first, last, device=ids.device)[:, None]
    own[:, -1] |= ~own.any(1)  # .. unless more than k copies of it come first
    left = (len(z), ids.shape[1] - 1)
    return gather(ids[~own].view(left)).cpu(), gather(distance[~own].view(left)).cpu()


def power_iteration_clustering(ids, distance, sigma=0.2, a=0.001, iterations=200):
    """PIC on a graph of nearest neighbours [supplementary; Lin & Cohen 2010]: cluster of each image (N,).

    ids (N, k), distance (N, k) squared, nearest first. A_ij = exp(-d_ij / sigma^2), W = A + A^T;
    v <- a W^T v + (1-a)/N, kept at sum 1; then every image follows the neighbour with the largest
    positive W_ij (v_j - v_i) up to a maximum, and each maximum is a cluster. An image alone joins the
    cluster of the nearest of its k neighbours that is not alone; if all are, it stays.
    """
    n, k = ids.shape
    if k == 0:  # a single image
        return torch.zeros(n, dtype=torch.int64)
    rows, columns = np.arange(n).repeat(k), ids.numpy().ravel()
    affinity = np.exp(-distance.double().numpy().ravel() / sigma**2)
    w = sparse.csr_matrix((affinity, (rows, columns)), shape=(n, n))
    w = (w + w.T).tocsr()  # mutual neighbours count twice
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = a * (w.T @ v) + (1 - a) / n
        v /= v.sum()

    rows = np.arange(n).repeat(np.diff(w.indptr))
    gain = w.data * (v[w.indices] - v[rows])
    best = np.zeros(n)
    np.maximum.at(best, rows, gain)
    uphill = np.arange(n)
    winner = np.flatnonzero((gain == best[rows]) & (gain > 0))[::-1]  # backwards: the first of equals stays
    uphill[rows[winner]] = w.indices[winner]
    while (uphill != uphill[uphill]).any():  # v rises along the way, so this ends
        uphill = uphill[uphill]

    _, assign, sizes = np.unique(uphill, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(sizes[assign] == 1)
    company = sizes[assign[ids.numpy()[alone]]] > 1  # (alone, k)
    joins = company.any(1)
    assign[alone[joins]] = assign[ids.numpy()[alone[joins], company[joins].argmax(1)]]
    return torch.from_numpy(np.unique(assign, return_inverse=True)[1]).long()


def cluster(body, loader, args, *key):
    """Pseudo-labels of all images: assign (N,), distance to the centroid (N,) or None, K, objective."""
    with finite_or_leave():
        z = deep_features(body, loader, args.pca, args.pca_sample, args.seed, args.amp)
        if args.clustering == "pic":
            assign = power_iteration_clustering(*neighbour_graph(z))
            return assign, None, int(assign.max()) + 1, None
        found = kmeans(z, args.k, gen=generator(*key, "k-means"))  # a fresh start at every call
    return gather(found.assign).cpu(), gather(found.distance).cpu(), args.k, found.objective


# --------------------------------------------------------------------------- one epoch


def train(body, head, optimizers, loader, order, assign_all, weights, epoch, start, loss_sum, args):
    """Cross-entropy to the pseudo-labels from step `start` on; (next step, sum of losses, signal or 0)."""
    view = View(area=(args.crop_area, 1.0), flip=0.5 * args.flip)
    steps, signal = loader.steps(order), 0
    body.train()
    head.train()
    batches = enumerate(loader.epoch(epoch, [view], order, start), start)
    for step, (index, (images,)) in progress(batches, steps - start, f"epoch {epoch + 1}"):
        seed_step(args.seed, epoch, step)  # dropout
        target = assign_all[index].to(images.device, non_blocking=True)  # (b,) pseudo-labels
        with torch.autocast(images.device.type, torch.bfloat16, enabled=args.amp):
            logits = head(body(images))  # (b, K)
        each = F.cross_entropy(logits.float(), target, reduction="none")  # (b,)
        loss = (weights[index].to(each.device, non_blocking=True) * each).mean()
        for optimizer in optimizers:
            optimizer.zero_grad()
        loss.backward()
        mean, signal = heartbeat(loss)
        for optimizer in optimizers:
            optimizer.step()
        loss_sum += mean
        if signal:
            return step + 1, *overdue([loss_sum]), signal
    return steps, *overdue([loss_sum]), signal


# --------------------------------------------------------------------------- main


def initial_alignment(args, data, loader, device, run):
    """IA(theta, K) = NMI(labels, clusters of the untrained network) over seeds [Deep Dive 4.1.1]."""
    values = []
    for seed in range(args.seed, args.seed + args.initial_alignment):
        seed_all(seed, "weights")
        _, body = make_body(args, data.channels)
        assign = cluster(body.to(device), loader, args, seed, 0)[0]
        values.append(nmi(data.labels, assign))
        say(f"seed {seed}  initial alignment {values[-1]:.4f}")
    result = {"initial_alignment": values, "median": median(values), "min": min(values), "max": max(values)}
    run.log({**result, "minutes": run.minutes()})
    say(f"K = {args.k}: median {median(values):.4f}, min {min(values):.4f}, max {max(values):.4f}")


def check(args, data):
    """Refuse what can only be judged with the data at hand."""
    if args.clustering == "kmeans" and args.k > len(data):
        refuse(f"--k {args.k} is more than the {len(data)} images of {args.data}")
    if args.batch_size > len(data):
        refuse(f"--batch-size {args.batch_size} is more than the {len(data)} images of {args.data}")
    if args.clustering == "kmeans":
        warn_if_few(len(data), args.k)
    if args.initial_alignment and data.labels is None:
        refuse("--initial-alignment compares with labels, and this folder has none")


def main():
    args = options()
    device = setup(args.device)
    args.amp = device.type == "cuda" if args.amp is None else args.amp
    data, _ = load_data(args.data, args.root, device)
    labels = "labels for reporting only" if data.labels is not None else "no labels"
    say(f"data: {args.data}, {len(data)} images of {data.channels} channels, {labels}; recipe {args.recipe}")
    check(args, data)
    size = (args.image_size, args.resize)
    loader = Loader(data, args.batch_size, *size, device, args.workers, args.seed, args.max_bad)
    seed_all(args.seed, "weights")
    trunk, body = make_body(args, data.channels)
    to_device(body, device)
    optimizer = torch.optim.SGD(body.parameters(), args.lr, args.momentum, weight_decay=args.wd, fused=True)
    trained = parallel(body, args.compile)

    run = Run(args, data, may_differ=("epochs",))
    if args.initial_alignment:
        run.first_record(args, device, data)
        initial_alignment(args, data, loader, device, run)
        leave()
    epoch, step, loss_sum, head, assign_all, untrained, record = 0, 0, 0.0, None, None, None, None
    if run.state:
        state = run.state
        with run.restoring():
            epoch, step, loss_sum, record = (state[k] for k in ("epoch", "step", "loss_sum", "record"))
            assign_all, untrained = shaped(state["assign_all"], len(data)), state["untrained_nmi"]
            body.load_state_dict(state["body"])
            optimizer.load_state_dict(state["optimizer"])
            head = make_head(body.dim, state["clusters"]).to(device)
            head.load_state_dict(state["head"])
            finished = state["result"] and epoch >= args.epochs
        if finished:
            say(f"{args.out} is finished after {epoch} epochs; its last lines: {args.out}/log.jsonl")
            leave()
        say(f"going on from epoch {epoch + 1}, step {step} of {args.out}")
        run.log({"resumed": True, "epoch": epoch, "step": step})
    else:
        run.first_record(args, device, data)

    def save(result=None):
        """Everything there is to the method's state, and the network on its own."""
        if head is None:  # nothing has happened yet
            return
        run.save(
            {
                "epoch": epoch,  # epochs done ..
                "step": step,  # .. and steps of the one after
                "loss_sum": loss_sum,  # over those steps
                "record": record,  # what the log will say of the epoch
                "body": body.state_dict(),
                "optimizer": optimizer.state_dict(),
                "head": head.state_dict(),  # its SGD has no momentum, so nothing to keep
                "clusters": len(head[1].bias),
                "assign_all": assign_all,  # (N,) pseudo-labels
                "untrained_nmi": untrained,
                "result": result,
            }
        )
        about = (args.arch, *size, args.sobel, data, "deepcluster")
        run.unsaved |= save_backbone(run.out / "backbone.pt", trunk, *about) is False

    before_leaving(save)
    while epoch < args.epochs:
        began, halted = time.time(), 0 < args.halt_clustering <= epoch
        if step == 0:
            record = {"epoch": epoch + 1, "lr": args.lr}
        if step == 0 and not halted and epoch % args.reassign == 0:
            share_buffers(body)
            before = assign_all
            assign_all, _, k, objective = cluster(body, loader, args, args.seed, epoch)
            # k-means numbers its clusters afresh, so yesterday's head answers yesterday's question.
            head = make_head(body.dim, k, args.seed, epoch).to(device)
            record |= {
                "objective": objective,
                "nmi_previous": None if before is None else nmi(before, assign_all),
            }
            record |= label_scores(data.labels, assign_all)
            untrained = record.get("nmi_labels") if before is None else untrained
        elif step == 0 and halted and args.reset_head:
            head = make_head(body.dim, len(head[1].bias), args.seed, epoch).to(device)
        record |= cluster_sizes(assign_all, len(head[1].bias))
        warn_if_trivial(record)
        clustered, first = time.time(), step

        head_optimizer = torch.optim.SGD(
            head.parameters(), args.lr, weight_decay=args.wd, fused=True
        )  # no momentum
        order, weights = None, torch.ones(len(data))
        if args.balance == "uniform":
            order = uniform_over_clusters(assign_all, generator(args.seed, epoch, "order"))
        if args.balance == "loss":
            weights = loss_weights(assign_all)
        step, loss_sum, signal = train(
            trained, parallel(head), (optimizer, head_optimizer), loader, order, assign_all, weights, epoch,
            step, loss_sum, args,
        )  # fmt: skip
        if signal and step < loader.steps():
            stop(signal, save, f"step {step} of epoch {epoch + 1}")
        record |= {
            "loss": loss_sum / step,
            "ln_k": math.log(len(head[1].bias)),  # the loss of a network that has learnt nothing
            "images_per_second": (step - first) * args.batch_size / max(1e-9, time.time() - clustered),
            "seconds": {"clustering": clustered - began, "training": time.time() - clustered},
            "bad_files": len(loader.bad),
        }
        epoch, step, loss_sum = epoch + 1, 0, 0.0
        run.log(record)
        report(record, args.epochs)
        if signal:
            stop(signal, save, f"epoch {epoch}")
        if epoch % args.save_every == 0 or epoch == args.epochs:
            save()

    share_buffers(body)
    assign, distance, k, _ = cluster(body, loader, args, args.seed, "final")
    result = {"epochs": epoch, **cluster_sizes(assign, k), **label_scores(data.labels, assign)}
    result |= {"nmi_labels_untrained": untrained}
    warn_if_trivial(result)
    run.log({"result": result, "minutes": run.minutes()})
    save_assignments(run.out / "assignments.csv", data, assign)
    save_pictures(run.out / "clusters.png", loader, assign, distance)
    save(result)
    if data.labels is not None:
        say(f"NMI of clusters and labels: {untrained:.3f} untrained, {result['nmi_labels']:.3f} now")
    say(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")
    labelled = "" if data.labels is not None else " --data LABELLED"
    say(f"evaluate the features: python eval_linear.py {run.out}{labelled}")
    run.finish()


def report(record, epochs):
    """One readable line per epoch."""
    parts = [f"epoch {record['epoch']:3d}/{epochs}  loss {record['loss']:.3f} (ln K {record['ln_k']:.2f})"]
    for name, title in (("nmi_previous", "NMI to previous"), ("nmi_labels", "to labels")):
        parts += [f"{title} {record[name]:.3f}"] if record.get(name) is not None else []
    parts.append(
        f"{record['clusters']} clusters of {record['smallest']}-{record['largest']}, {record['empty']} empty"
    )
    seconds = record["seconds"]
    parts.append(f"{record['images_per_second']:.0f} img/s")
    say("  ".join(parts), f" {seconds['clustering']:.1f} + {seconds['training']:.1f} s")


if __name__ == "__main__":
    main()
