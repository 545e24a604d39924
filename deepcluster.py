"""DeepCluster: cluster the features of a network, train the network to predict the clusters, repeat.

Caron et al., Deep Clustering for Unsupervised Learning of Visual Features, ECCV 2018; with the options of
Mustapha et al., A Deep Dive into Deep Cluster, 2022 ("Deep Dive").

    each epoch:  x = encoder(center crops)        (N, D)  features, no gradient
                 z = unit(whiten(x, pca(x)))      (N, P)
                 assign = k-means(z)              (N,)    pseudo-labels
                 new head; one epoch of cross-entropy(head(encoder(random crops)), assign),
                 images drawn uniformly over the clusters

Symbols: N images, B batch (--batch-size, over all processes), D feature size, P --pca, K clusters (--k).

    python deepcluster.py                                            laptop: digits, no download, no GPU
    python deepcluster.py --data fashionmnist                        Deep Dive, 10 minutes on 2 cores
    python deepcluster.py --data cifar10 --arch lenet5               10 minutes on a CPU; leave out --arch with a GPU
    python deepcluster.py --data my/photos                           a folder of images, no labels needed
    python deepcluster.py --data my/photos --init imagenet           a few hundred of them: from trained weights
    torchrun --nproc_per_node=8 deepcluster.py --data data/imagenet --arch vgg16 --k 10000   the paper's run

What to expect: on digits, NMI of clusters and labels goes from 0.65 (random network) to 0.73 in 40 epochs, 20 s on
2 cores; k-means on the pixels reaches 0.73, too. The loss leaves ln K after the first few epochs; staying there,
nothing is learnt. Collapse: one cluster holds most images, NMI to the previous epoch goes to 0 or jumps to 1.
Stopped at any time, the same command goes on after the last epoch. A folder of N images has K = N / 10 and the rest by
folder_recipe of common.py.

Departs from the paper and its code, on purpose:
 1. Images are drawn uniformly over clusters as the paper says, for 500 epochs; the released code has 200, and its
    draws follow the clusters' sizes, since it looks ids up in a re-ordered dataset (near to --balance none).
 2. An epoch's last incomplete batch is dropped. At the end images are clustered once more, for assignments.csv.
 3. PCA is fitted on 65,536 images, or as many as give 2^28 numbers (the code: all); over 8192 columns its axes come
    from ten power iterations. PCA and k-means are sharded. NMI has the geometric mean (libraries: arithmetic).
 4. On GPUs, training runs in bf16 autocast (the paper: float32; --no-amp), features in TF32, k-means in float32.
 5. On several GPUs batch norm is over all of them (the paper: one GPU); several processes on CPUs each normalize
    their own part of a batch, and features are computed with process 0's statistics.
 6. Random crops of data in memory are bilinear without antialiasing; center crops are cut to whole pixels before
    they are resized. ResNets up to 64 pixels: 3x3 stem, no pooling.
 7. Deep Dive: its text trains on center crops with flips (--train-crop center), its code on random ones without
    (--no-flip); ours: random, flipped. After halting its code starts a new head in every cycle (--reset-head), ours
    keeps it; its head has momentum, ours has none. Its LeNet and small AlexNet: see PLANS in common.py.
 8. digits, mnist, cifar100-20, stl10 and LeNet-5 on cifar10 are in neither paper: recipes are ours. ResNet B's layers
    have the AlexNet's dropout (not printed).
"""

import math
import time
from argparse import BooleanOptionalAction as YesNo
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Loader, Meter, Run, View, all_gather, all_reduce_sum, assign_folder, autocast, baselines,
    check_finite, cluster_sizes, error, extract, folder_recipe, generator, he_init, init_defaults, is_main,
    kmeans, label_scores, load_backbone, load_data, load_file, make_backbone, make_parser, nearest, nmi,
    number, parallel, print_once, save_clusters, save_file, seed_epoch, setup, shard, to_device,
)  # fmt: skip

import numpy as np
import torch
import torch.nn.functional as F
from scipy import linalg, sparse
from torch import nn

# %% recipes and options
# Data set (or data-arch) -> the hyper-parameters of the paper that used it. Flags override.

CARON = {  # 3.4, and its code
    "arch": "alexnet", "sobel": True, "epochs": 500, "batch_size": 256, "lr": 0.05, "wd": 1e-5, "momentum": 0.9,
    "pca": 256, "image_size": 224, "center_fraction": 0.875,
}  # fmt: skip
DEEP_DIVE = {  # Table 1 and section 3.3; center_fraction is the code's
    "arch": "alexnet-small", "sobel": True, "epochs": 100, "batch_size": 64, "lr": 0.1, "wd": 1e-3, "momentum": 0.9,
    "pca": 256, "image_size": 32, "center_fraction": 0.73,
}  # fmt: skip
LENET = {"arch": "lenet5", "sobel": False, "batch_size": 128, "momentum": 0.1, "pca": 0, "epochs": 50}
RECIPES = {
    "imagenet": {**CARON, "k": 10000},  # and folders
    "fashionmnist": {**DEEP_DIVE, **LENET, "k": 5},
    "svhn": {**DEEP_DIVE, "k": 200, "momentum": 0.5},
    "cifar10": {**DEEP_DIVE, "k": 1000},
    "cifar10-alexnet": {**CARON, "k": 2000, "epochs": 100},  # Deep Dive, appendix A
    "cifar10-lenet5": {**DEEP_DIVE, **LENET, "momentum": 0.9, "k": 100, "pca": 60, "epochs": 30},  # from here on ours
    "cifar100-20": {**DEEP_DIVE, "k": 1000, "center_fraction": 1.0},
    "stl10": {**DEEP_DIVE, "k": 1000, "center_fraction": 1.0},
    "mnist": {**DEEP_DIVE, **LENET, "k": 10, "flip": False, "center_fraction": 1.0},
    "digits": {
        "arch": "lenet5", "sobel": False, "epochs": 40, "batch_size": 64, "lr": 0.1, "wd": 1e-5, "momentum": 0.9,
        "pca": 60, "image_size": 32, "center_fraction": 1.0, "k": 30, "crop_area": 0.7, "flip": False,
    },
}  # fmt: skip


def photos(known):
    """The recipe of a folder, ours: see folder_recipe; from 100,000 images on the paper's."""
    n, shared = folder_recipe(known, 60_000)
    if not n:
        return RECIPES["imagenet"]
    return {
        **CARON, "sobel": False, "resnet_head": "pool", "crop_area": 0.3, "k": max(2, n // 10), "pca": 60,
        "lr": 0.01 if known.init else 0.1, **shared,
    }  # fmt: skip


def options(argv=None):
    """The command line as a namespace."""
    p = make_parser("DeepCluster (Caron et al. 2018)")
    # fmt: off
    g = p.add_argument_group("training")
    g.add_argument("--recipe", choices=sorted(RECIPES), help="whose defaults to take; None: those of --data. NAME-ARCH, where there is one, for --arch ARCH")
    g.add_argument("--arch", choices=ARCHS, help="network")
    g.add_argument("--epochs", type=number(int, 1), help="passes over the data; a longer run may continue a finished one")
    g.add_argument("--batch-size", type=number(int, 2), help="images per step, over all processes [3.4]")
    g.add_argument("--lr", type=number(float, 0), help="learning rate, constant [3.4]")
    g.add_argument("--wd", type=number(float, 0), help="weight decay of encoder and head [3.4]")
    g.add_argument("--momentum", type=number(float, 0, 1), help="of the encoder's SGD; the head has none [3.4, code]")
    g.add_argument("--image-size", type=number(int, 1, 4096), help="side of the square the network sees, in pixels [3.4, code]")
    g.add_argument("--center-fraction", type=number(float, 0.01, 1), help="share of the shorter side that a center crop keeps; 0.875: 224 of 256 pixels [3.4, code]")
    g.add_argument("--train-crop", choices=["random", "center"], default="random", help="center: train on the crops that are clustered [Deep Dive 3.3]")
    g.add_argument("--crop-area", type=number(float, 0.001, 1), default=0.08, help="smallest share of the image that a random crop keeps [3.4, code]")
    g.add_argument("--flip", action=YesNo, default=True, help="flip half of the training images horizontally [3.4]")
    g.add_argument("--dropout", type=number(float, 0, 0.99), default=0.5, help="before the hidden linear layers of the AlexNets and ResNet B, between those of vgg16; none in lenet5 [3.4]")
    g.add_argument("--sobel", action=YesNo, help="filter images by Sobel's operator, without color [3.4]")
    g.add_argument("--resnet-head", choices=["A", "B", "pool"], help="A: K-way layer on the flattened map; B: two 4096 layers before it; None: B for resnet18, A for resnet50 [Local Aggregation, supplementary 2.2]; pool: on the averaged map")
    g = p.add_argument_group("DeepCluster")
    g.add_argument("--k", type=number(int, 1), help="clusters; some over-clustering helps [4.1]; not used by pic")
    g.add_argument("--clustering", choices=["kmeans", "pic"], default="kmeans", help="pic: power iteration clustering, which finds K itself [1, supplementary]")
    g.add_argument("--pca", type=number(int, 0), help="dimensions kept and whitened before clustering; 0: none, unit length only [3.4]")
    g.add_argument("--balance", choices=["uniform", "loss", "none"], default="uniform", help="draw uniformly over clusters, weight the loss by 1/size instead, or neither [3.3]")
    g.add_argument("--reassign", type=number(int, 1), default=1, help="epochs of training per clustering [3.4]")
    g.add_argument("--halt-clustering", type=number(int, 0), default=0, metavar="H", help="cluster in the first H epochs only, then keep labels and head; 0: never halt [Deep Dive 4.2]")
    g.add_argument("--reset-head", action=YesNo, default=False, help="with --halt-clustering: a new head every epoch all the same [Deep Dive, code]")
    # fmt: on
    known, _ = p.parse_known_args(argv)
    base = known.recipe or known.data
    names = (f"{base}-{known.arch}", base)
    recipes = [RECIPES[name] for name in names if name in RECIPES]
    p.set_defaults(**(recipes or [photos(known)])[0])
    p.set_defaults(**init_defaults(known))
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of --data or --recipe")
    args = p.parse_args(argv)
    if args.reset_head and not args.halt_clustering:
        p.error("--reset-head is for --halt-clustering: before that, every epoch has a new head anyway")
    args.out = args.out or f"runs/deepcluster-{Path(args.data).resolve().name}"
    args.resnet_head = args.resnet_head or ("B" if args.arch == "resnet18" else "A")
    return args


# %% network


def make_encoder(args, channels):
    """(backbone, encoder): images (B, C, S, S) -> the features (B, D) that are clustered.

    alexnet, vgg16, lenet5: the last hidden linear layer before its ReLU; encoder and backbone are one.
    ResNet A: the flattened last map, "pool": averaged; ResNet B: two linear layers of 4096 on top of A.
    """
    backbone = make_backbone(args, channels, dropout=args.dropout, pool=args.resnet_head == "pool")
    if not args.arch.startswith("resnet") or args.resnet_head != "B":
        return backbone, backbone
    if args.arch == "resnet50":
        print_once("WARNING: ResNet-50 with head B becomes trivial [Local Aggregation, supplementary 2.2]")
    encoder = nn.Sequential(backbone, hidden_layers(backbone.dim, args.dropout))
    encoder.dim = 4096
    return backbone, encoder


def hidden_layers(dim, dropout):
    """ResNet B's: features (B, dim) -> (B, 4096)."""
    layers = [nn.Dropout(dropout), nn.Linear(dim, 4096), nn.ReLU(inplace=True)]
    layers = nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(4096, 4096))
    he_init(layers)
    return layers


def make_head(dim, k, gen):
    """ReLU and a linear layer to K logits, N(0, 0.01) weights and bias 0."""
    head = nn.Sequential(nn.ReLU(), nn.Linear(dim, k))
    nn.init.normal_(head[1].weight, 0, 0.01, generator=gen)
    nn.init.zeros_(head[1].bias)
    return head


# %% the algorithm, with all_reduce_sum, check_finite, is_main, nearest of common.py (one process: nothing to set up)


def pca(x, p, gen):
    """Mean (D,) and whitening matrix V / sqrt(lambda) (D, P) of the rows x (n, D) of all processes [3.4].

    P = min(p, D). In double precision; eigenvalues are floored at 1e-6 of the largest, so dead features and few rows
    stay finite. Over 8192 columns V comes from ten power iterations, whose start `gen` draws.
    """
    check_finite(x)
    d, p, double = x.shape[1], min(p, x.shape[1]), {"dtype": torch.float64, "device": x.device}
    n = all_reduce_sum(torch.tensor(float(len(x)), **double))
    mean = all_reduce_sum(sum(rows.double().sum(0) for rows in x.split(4096))) / n

    def covariance_times(q=None):
        if q is None and not x.is_cuda:  # numpy computes half of a symmetric product
            centered = (rows.numpy() - mean.numpy() for rows in x.split(4096))
            return all_reduce_sum(torch.from_numpy(sum(rows.T @ rows for rows in centered))) / n
        result = torch.zeros(d, d if q is None else q.shape[1], **double)
        for rows in x.split(4096):
            rows = rows.double() - mean
            result += rows.T @ (rows if q is None else rows @ q)
        return all_reduce_sum(result) / n

    if d <= 8192:
        values, axes = largest_eigenvectors(covariance_times(), p)
    else:
        q = torch.randn(d, p + 32, generator=gen).to(**double)
        for _ in range(10):
            q = torch.linalg.qr(covariance_times(q))[0]
        values, small = torch.linalg.eigh(q.T @ covariance_times(q))
        axes = q @ small
    values, axes = values[-p:].flip(0), axes[:, -p:].flip(1)
    axes = axes / values.clamp(min=1e-6 * values[0] + 1e-12).sqrt()
    return mean.float(), all_reduce_sum(axes * is_main()).float()  # of unlike machines, process 0's


def largest_eigenvectors(c, p):
    """Eigenvalues and -vectors of a symmetric matrix c (D, D), the largest last: p or more of them."""
    try:
        if not c.is_cuda:  # without the others it takes a third of the time
            return map(torch.from_numpy, linalg.eigh(c.numpy(), subset_by_index=(len(c) - p, len(c) - 1)))
    except linalg.LinAlgError:
        pass  # LAPACK gives up on some matrices that have an eigenvalue twice
    return torch.linalg.eigh(c)


def whiten(x, mean, axes):
    """Unit rows of z = V^T (x - mean) / sqrt(lambda): (n, D) -> (n, P); axes None: of x itself."""
    return F.normalize(x if axes is None else (x - mean) @ axes, dim=1)


def uniform_over_clusters(assign, gen):
    """An epoch's images (N,), drawn uniformly over the clusters that have any [3.3].

    assign (N,) int64 -> positions (N,): floor(N/K') + 1 from each of the K' non-empty clusters, with replacement
    where a cluster is smaller, shuffled and cut to N.
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


def neighbor_graph(z, keys, first, k=5):
    """The k nearest other images of images first, first + 1, ..: ids (n, k), squared distances (n, k), nearest first.

    z (n, P): their features; keys (N, P): those of all images.
    """
    distance, ids = nearest(z, keys, k + 1)  # an image is its own neighbor ..
    own = ids == torch.arange(first, first + len(z), device=ids.device)[:, None]
    own[:, -1] |= ~own.any(1)  # .. unless more than k copies of it come first
    left = (len(z), ids.shape[1] - 1)
    return ids[~own].view(left), distance[~own].view(left)


def power_iteration_clustering(ids, distance, sigma=0.2, a=0.001, iterations=200):
    """Cluster of each image (N,) by PIC on a graph of nearest neighbors [supplementary; Lin & Cohen 2010].

    ids (N, k), distance (N, k) squared, nearest first. A_ij = exp(-d_ij / sigma^2), W = A + A^T; v <- a W^T v +
    (1-a)/N, kept at sum 1; then every image follows the neighbor with the largest positive W_ij (v_j - v_i) up to a
    maximum, and each maximum is a cluster. An image alone joins the cluster of the nearest of its k neighbors that is
    not alone; if all are, it stays.
    """
    (n, k), ids = ids.shape, ids.numpy()
    affinity = np.exp(-distance.double().numpy() / sigma**2)
    w = sparse.csr_matrix((affinity.ravel(), (np.arange(n).repeat(k), ids.ravel())), shape=(n, n))
    w = (w + w.T).tocsr()  # mutual neighbors count twice
    v = np.full(n, 1 / n)
    for _ in range(iterations):
        v = a * (w.T @ v) + (1 - a) / n
        v /= v.sum()

    w.data *= v[w.indices] - v[np.arange(n).repeat(np.diff(w.indptr))]
    uphill = np.where(w.max(axis=1).toarray().ravel() > 0, np.asarray(w.argmax(axis=1)).ravel(), np.arange(n))
    while (uphill != uphill[uphill]).any():  # v rises along the way, so this ends
        uphill = uphill[uphill]

    _, assign, sizes = np.unique(uphill, return_inverse=True, return_counts=True)
    alone = np.flatnonzero(sizes[assign] == 1)
    company = sizes[assign[ids[alone]]] > 1  # (alone, k)
    joins = company.any(1)
    assign[alone[joins]] = assign[ids[alone[joins], company[joins].argmax(1)]]
    return torch.from_numpy(np.unique(assign, return_inverse=True)[1])


# %% one epoch


def cluster(encoder, loader, args, gen, sample=65536):
    """Pseudo-labels of all images, on the CPU: assign (N,), squared distance to the centroid (N,), K, and what assigns
    a new image, {"mean", "axes", "centroids"}, with "objective", the mean of the distances. PIC: zeros, and no such.

    PCA is fitted on `sample` images, at most 2^28 numbers; where there are more, images are projected as they are
    computed, so that (N, D) features never exist at once.
    """
    n, sample = len(loader.data), min(sample, max(args.pca, 2**28 // encoder.dim))
    mine, enough = torch.arange(*shard(n)), not args.pca or n <= sample
    chosen = mine if enough else torch.randperm(n, generator=gen)[slice(*shard(sample))]
    x = extract(encoder, loader, chosen)  # (n, D), or the sample's
    check_finite(x)
    mean, axes = pca(x, args.pca, gen) if args.pca else (None, None)
    z = whiten(x, mean, axes)  # (n, P)
    if not enough:
        z = extract(encoder, loader, mine, lambda x: whiten(x, mean, axes))
    if args.clustering == "pic":
        check_finite(z)
        graph = neighbor_graph(z, all_gather(z), shard(n)[0])
        assign = power_iteration_clustering(*(all_gather(x).cpu() for x in graph))
        return assign, torch.zeros(n), int(assign.max()) + 1, {"centroids": None, "objective": None}
    assign, distance, centroids, objective = kmeans(z, args.k, gen)
    model = {"mean": mean, "axes": axes, "centroids": centroids, "objective": objective}
    return all_gather(assign).cpu(), all_gather(distance).cpu(), args.k, model


def train(encoder, head, optimizer, batches, assign_all, weights, meter, args):
    """Cross-entropy to the pseudo-labels assign_all (N,), weighted by weights (N,); the epoch's mean loss."""
    net = parallel(nn.Sequential(encoder, head))
    head_optimizer = torch.optim.SGD(head.parameters(), args.lr, weight_decay=args.wd)
    net.train()
    for index, (images,) in batches:
        target = assign_all[index]  # (b,)
        with autocast(images.device, args.amp):
            logits = net(images)  # (b, K)
        each = F.cross_entropy(logits.float(), target, reduction="none")  # (b,)
        loss = (weights[index] * each).mean()
        net.zero_grad()
        loss.backward()
        optimizer.step()
        head_optimizer.step()
        meter.add(len(index), loss)
    return meter.mean_loss()


# %% main


def load_model(run, device):
    """What clusters images as a finished run did, see assign_folder."""
    backbone, found = load_backbone(run)[0], load_file(run / "clustering.pt")
    if found["centroids"] is None:
        error(f"{run}: power iteration clustering has no centroids that could assign new images")
    mean, axes, centroids = (
        found[x] if found[x] is None else found[x].to(device) for x in ("mean", "axes", "centroids")
    )
    net = nn.Sequential(backbone)
    if "hidden" in found:  # of ResNet B
        net.append(hidden_layers(backbone.dim, 0.0)).to(device)[1].load_state_dict(found["hidden"])
    return net.to(device), lambda x: whiten(x, mean, axes), lambda z: nearest(z, centroids)


def main():
    args = options()
    if args.assign:
        return assign_folder(args, load_model)
    device = setup(args.device)
    data, _ = load_data(args.data, args.root, args.normalize)
    if args.clustering == "kmeans" and args.k > len(data):
        error(f"--k {args.k} is more than the {data}; try --k {max(2, len(data) // 10)}")
    loader = Loader(data, args.batch_size, args.image_size, args.center_fraction, device, args.workers)
    steps = len(data) // args.batch_size
    print_once(f"{data}, K = {args.k}, {steps} steps an epoch, on {device}")

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    backbone, encoder = make_encoder(args, len(data.mean))
    encoder = to_device(encoder, device)
    compiled = torch.compile(encoder) if args.compile else encoder
    optimizer = torch.optim.SGD(encoder.parameters(), args.lr, args.momentum, weight_decay=args.wd)
    center = args.center_fraction if args.train_crop == "center" else 0
    view = View(args.image_size, area=(args.crop_area, 1.0), center=center, flip=0.5 * args.flip)

    run = Run("deepcluster", args, data, may_change={"epochs", "recipe"})
    if run.finished:
        return
    done, k, assign_all, random = 0, None, None, {}
    if run.state:
        done, k, assign_all, random = map(run.state.get, ("epoch", "k", "assign_all", "random"))
        encoder.load_state_dict(run.state["encoder"])
        optimizer.load_state_dict(run.state["optimizer"])
        head = make_head(encoder.dim, k, None).to(device)
        head.load_state_dict(run.state["head"])

    for epoch in range(done, args.epochs):
        began, gen = time.time(), seed_epoch(args.seed, epoch)
        record = {"epoch": epoch + 1, "epochs": args.epochs}
        halted = 0 < args.halt_clustering <= epoch
        recluster = epoch % args.reassign == 0 and not halted
        if recluster:
            before = assign_all
            assign_all, _, k, model = cluster(encoder, loader, args, gen)
            scores = label_scores(data.labels, assign_all, data.unreadable)
            record |= {"objective": model["objective"], **scores}
            record |= {"nmi_previous": nmi(before, assign_all)} if epoch else {}
            random = random if epoch else scores
        if recluster or halted and args.reset_head:
            # k-means numbers its clusters anew each epoch, so the old head is useless.
            head = make_head(encoder.dim, k, gen).to(device)
        record |= {**cluster_sizes(assign_all, k), "seconds_clustering": time.time() - began}

        order, weights = torch.randperm(len(data), generator=gen), torch.ones(len(data))
        if args.balance == "uniform":
            order = uniform_over_clusters(assign_all, gen)
        if args.balance == "loss":
            weights = loss_weights(assign_all)
        meter = Meter(f"epoch {epoch + 1}/{args.epochs}", steps * loader.b)
        batches, targets = loader.train(order, [view]), assign_all.to(device)
        record["loss"] = train(compiled, head, optimizer, batches, targets, weights.to(device), meter, args)
        record |= {"uniform": math.log(k), "seconds": time.time() - began}
        run.end_epoch(record, "epoch", "loss", "uniform", "nmi_previous", "nmi_labels", "clusters")
        state = {
            "epoch": epoch + 1,
            "k": k,
            "assign_all": assign_all,  # (N,) pseudo-labels
            "random": random,  # scores of the first ones
            "encoder": encoder.state_dict(),
            "optimizer": optimizer.state_dict(),
            "head": head.state_dict(),  # its SGD has no momentum, so there is nothing to keep
        }
        run.save(state, backbone, loader)

    assign_all, distance_all, k, model = cluster(encoder, loader, args, generator(args.seed, "final"))
    if backbone is not encoder:
        model["hidden"] = encoder[1].state_dict()  # ResNet B's, which backbone.pt does not hold
    save_file(run.out / "clustering.pt", model)
    save_clusters(run.out, loader, assign_all, distance_all, k)
    scores = label_scores(data.labels, assign_all, data.unreadable)
    others = {args.start: random, **baselines(loader, k, generator(args.seed, "baselines"))}
    run.log({"result": {**cluster_sizes(assign_all, k), **scores}, "baselines": others})
    if scores:
        others = ", ".join(f"{name} {found['nmi_labels']:.3f}" for name, found in others.items())
        print_once(f"NMI of clusters and labels: {scores['nmi_labels']:.3f}; {others}")
    print_once(f"which image is in which cluster: {run.out}/assignments.csv and clusters.png")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
