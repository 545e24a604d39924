"""Speed, side by side with a plain reference: every piece of the scripts, on this machine, as a ratio.

    python -m extras.bench                     all rows, a quarter of an hour on two cores
    python -m extras.bench --quick             small sizes, some minutes: does everything run?
    python -m extras.bench --only kmeans pca   some rows; --help has the names
    python -m extras.bench --scale             instead: time as images and clusters grow, and its law

Both sides run once to warm up, then in turns; the ratio is that of the medians, next to our aim (<=: of time or memory;
>=: of speed). Each row's function says what the reference is. Timings mean something where the load is below 0.5.
"""

import argparse
import copy
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from unittest.mock import patch

import common  # isort: skip  (before torch)
import coke
import deepcluster
import eval_linear
import local_aggregation
import lsdc

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from sklearn.preprocessing import normalize
from torch import nn
from torchvision import datasets, transforms

import faiss  # isort: skip  (after torch)

# %% measuring


@dataclass
class Case:
    """One line of the table: two functions to time, or two numbers that were measured already."""

    name: str
    ours: object
    reference: object
    images: int = 0  # how many each side handles: then images/s are printed, else seconds
    aim: str | None = None  # instead of the row's


def race(functions, rounds=5, limit=20):
    """Median seconds of a call of each function, run in turns. The first turn warms up; after `limit` seconds no other
    turn begins, and a first one that took as long counts. Short calls are repeated for 20 ms and divided."""
    turns, began = [], time.perf_counter()
    while len(turns) <= rounds and (not turns or time.perf_counter() - began < limit):
        turns.append([])
        for function in functions:
            calls, start, spent = 0, time.perf_counter(), 0
            while spent < 0.02:
                function()
                if torch.cuda.is_available():
                    torch.cuda.synchronize()
                calls, spent = calls + 1, time.perf_counter() - start
            turns[-1].append(spent / calls)
    return np.median(turns[1:] or turns, axis=0).tolist()


def step_case(name, args, loader, views, train, net, ready=lambda views: views, aim=None):
    """train(batches, meter) takes a step for each batch; the reference: forward and backward of the bare network, of
    ready(views) of one batch, as often."""
    everything, steps = torch.arange(len(loader.data)), len(loader.data) // args.batch_size
    images = ready(next(loader.train(everything, views))[1])

    def reference():
        net.train()
        for _ in range(steps):
            net.zero_grad()
            with common.autocast(loader.device, args.amp):
                found = net(images)
            found = found if isinstance(found, tuple) else (found,)
            sum(x.float().square().sum() for x in found).backward()

    ours = lambda: train(loader.train(everything, views), common.Meter("bench", len(everything)))
    name = f"{name}: {args.arch}, {args.image_size} px, B={args.batch_size}"
    return Case(name, ours, reference, steps * args.batch_size, aim)


def steps_of(script, run, device, *flags, batch_size=None):
    """(args, channels, loader) for each recipe whose training steps are measured."""
    recipes, gpu = [("fashionmnist", 1, 28, 6), ("cifar10", 3, 32, 2)], device.type == "cuda"
    if gpu:
        recipes = [(*rest, 50) for *rest, _ in recipes] + [("imagenet", 3, 256, 10)] * (script is not lsdc)
    for recipe, channels, side, steps in recipes[: 1 if run.quick else None]:
        args = script.options(["--recipe", recipe, "--data", "noise", "--lr", "1e-4", *flags])
        args.amp, args.batch_size = gpu, batch_size or min(args.batch_size, 256)
        data = noise(args.batch_size * steps, channels, side, device)
        loader = common.Loader(data, args.batch_size, args.image_size, args.center_fraction, device, 0)
        yield args, channels, loader


def blobs(n, d, device):
    """(n, d) rows around 500 random centers that overlap, the same on every call."""
    gen = common.generator("bench", n, d)
    centers = 0.2 * torch.randn(500, d, generator=gen)
    x = centers[torch.randint(500, (n,), generator=gen)]
    return x.add_(torch.randn(n, d, generator=gen)).to(device)


def noise(n, channels, side, device):
    """n images in memory, with ten labels."""
    pixels = torch.randint(0, 256, (n, channels, side, side), dtype=torch.uint8, device=device)
    labels, middle = torch.arange(n) % 10, (0.5,) * channels
    return common.Images("noise", pixels, None, labels, list(map(str, range(10))), middle, middle)


# %% rows


def kmeans(run, device):
    """faiss.Kmeans and scikit-learn's KMeans: same rows, start, K and iterations, no subsampling, a last assignment."""
    for n, d, k in [(6_000, 84, 100)] if run.quick else [(60_000, 84, 100), (50_000, 256, 1000)]:
        x, rows, gen = blobs(n, d, device), blobs(n, d, "cpu").numpy(), partial(common.generator, "kmeans")
        first = rows[torch.randperm(n, generator=gen())[:k].numpy()]  # where ours starts

        def by_faiss():
            plain = faiss.Kmeans(d, k, niter=20, max_points_per_centroid=n, min_points_per_centroid=1)
            if device.type == "cuda":  # on this one; gpu=1 would take all there are
                plain.index = faiss.index_cpu_to_gpu(common.gpu_resources(), device.index, plain.index)
            plain.train(rows, init_centroids=first)
            return plain.assign(rows)

        by_sklearn = lambda: KMeans(k, init=first, n_init=1, max_iter=20, tol=0).fit_predict(rows)
        ours = lambda: common.kmeans(x, k, gen())
        yield Case(f"kmeans N={n} D={d} K={k}, faiss", ours, by_faiss)
        if device.type == "cpu":
            yield Case(f"kmeans N={n} D={d} K={k}, scikit-learn", ours, by_sklearn)


def pca(run, device):
    """faiss.PCAMatrix and scikit-learn's PCA, both in float32: fitted to the same rows, applied, unit length."""
    wide = 2048 if device.type == "cuda" else 4096  # faiss takes minutes, on the CPU, whatever the device
    for n, d in [(4_000, 512)] if run.quick else [(60_000, 84), (20_000, 1024), (20_000, wide)]:
        p = min(d, 256)
        x, rows = blobs(n, d, device), blobs(n, d, "cpu").numpy()

        def by_faiss():
            plain = faiss.PCAMatrix(d, p, -0.5)
            plain.train(rows)
            return F.normalize(torch.from_numpy(plain.apply(rows)))

        plain = PCA(p, whiten=True, svd_solver="covariance_eigh")
        by_sklearn = lambda: normalize(plain.fit_transform(rows), copy=False)
        ours = lambda: deepcluster.whiten(x, *deepcluster.pca(x, p, None))
        yield Case(f"pca + whiten N={n} D={d} P={p}, faiss", ours, by_faiss)
        if device.type == "cpu":
            yield Case(f"pca + whiten N={n} D={d} P={p}, scikit-learn", ours, by_sklearn)


def augmentation(run, device):
    """torchvision's transforms on PIL images one by one; one thread on both sides."""
    n, strength = 256 if run.quick else 2_048, (0.4, 0.4, 0.4, 0.1)
    data = noise(n, 3, 32, device)
    loader = common.Loader(data, 256, 32, 1.0, device, 0)
    view = common.View(32, (0.2, 1.0), jitter=strength, jitter_p=0.8, gray=0.2)
    pictures = [Image.fromarray(x) for x in data.pixels.cpu().permute(0, 2, 3, 1).numpy()]
    steps = [transforms.RandomResizedCrop(32, (0.2, 1.0)), transforms.RandomHorizontalFlip()]
    jitter = transforms.RandomApply([transforms.ColorJitter(*strength)], 0.8)
    steps += [jitter, transforms.RandomGrayscale(0.2)]
    plain = transforms.Compose([*steps, transforms.ToTensor(), transforms.Normalize(data.mean, data.std)])
    torch.set_num_threads(1)
    ours = lambda: list(loader.train(torch.arange(n), [view] * 2))
    reference = lambda: [torch.stack([plain(x) for x in pictures]) for _ in range(2)]
    yield Case("augmentation 32 px, two views with color", ours, reference, 2 * n)


def files(run, device):
    """torchvision's ImageFolder on the same JPEGs, made up; no loader processes, one thread."""
    with tempfile.TemporaryDirectory() as made_up:
        os.mkdir(f"{made_up}/class")
        for i in range(32 if run.quick else 256):  # as many bytes as photographs have
            image = Image.effect_noise((125, 94), 100).convert("RGB").resize((500, 375))
            image.save(f"{made_up}/class/{i}.jpg", quality=90)
        steps = [transforms.RandomResizedCrop(224, (0.08, 1.0)), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.25,) * 3)]
        plain = datasets.ImageFolder(made_up, transforms.Compose(steps))
        data = common.Images("files", None, [path for path, _ in plain.samples], None, [])
        loader, n = common.Loader(data, 32, 224, 0.875, device, 0), len(data) // 32 * 32
        batches = torch.utils.data.DataLoader(plain, 32, shuffle=True, drop_last=True)
        torch.set_num_threads(1)
        ours = lambda: list(loader.train(torch.randperm(n), [common.View(224)]))
        reference = lambda: [images.to(device) for images, _ in batches]
        yield Case("files: JPEG of 500 x 375 to 224 px", ours, reference, n)


def listing(run, device):
    """torchvision's ImageFolder of the same names in 1,000 folders; then GB of the names, against a list of strings."""
    n = 20_000 if run.quick else 1_000_000
    with tempfile.TemporaryDirectory() as made_up:
        for c in range(1_000):
            os.mkdir(f"{made_up}/{c:03}")
            Image.new("RGB", (100, 100)).save(first := f"{made_up}/{c:03}/0.jpg")
            for i in range(1, n // 1_000):
                os.link(first, f"{made_up}/{c:03}/{c:03}_{i:08}.jpg")
        ours = lambda: common.load_folder(made_up)
        yield Case(f"listing {n:,} files", ours, lambda: datasets.ImageFolder(made_up))
        names = ours()[0].paths
        joined, strings = len(names.joined) + names.ends.nbytes, sum(sys.getsizeof(x) + 8 for x in names)
        yield Case(f"memory (GB): {n:,} names", joined / 1e9, strings / 1e9, aim="<= 1")


def training(run, device):
    """DeepCluster's: augmenting images, head, loss and optimizers, too."""
    for args, channels, loader in steps_of(deepcluster, run, device):
        n = len(loader.data)
        encoder = common.to_device(deepcluster.make_encoder(args, channels)[1], device)
        head = deepcluster.make_head(encoder.dim, args.k, common.generator("bench")).to(device)
        assign, weights = torch.arange(n, device=device) % args.k, torch.ones(n, device=device)
        optimizer = torch.optim.SGD(encoder.parameters(), args.lr, args.momentum, weight_decay=args.wd)
        views, net = [common.View(args.image_size, (args.crop_area, 1.0))], nn.Sequential(encoder, head)
        parts = encoder, head, optimizer
        train = lambda batches, meter: deepcluster.train(*parts, batches, assign, weights, meter, args)
        yield step_case("DeepCluster step", args, loader, views, train, net, lambda views: views[0])


def aggregation_training(run, device):
    """Instance recognition's and Local Aggregation's, with a bank of the whole data set."""
    for args, channels, loader in steps_of(local_aggregation, run, device):
        n = {"fashionmnist": 60_000, "cifar10": 50_000, "imagenet": 1_281_167}[args.recipe]
        args.ir_loss = "softmax" if n <= local_aggregation.EXACT else "nce"
        net = common.to_device(local_aggregation.Network(args, channels), device)
        optimizer = torch.optim.SGD(local_aggregation.parameter_groups(net, args.wd), 1e-4, args.momentum)
        bank, views = F.normalize(torch.randn(n, args.dim, device=device)), [common.View(args.image_size)]
        clusterings = torch.randint(args.k, (args.clusterings, n), device=device, dtype=torch.int32)
        for phase, given, aim in (("IR", None, None), ("LA", clusterings, "<= 1.5" if n > 1e6 else None)):

            def train(batches, meter, given=given):
                local_aggregation.train(net, optimizer, batches, bank, given, meter, args)

            name = f"{phase} step, N={n:,}"
            yield step_case(name, args, loader, views, train, net, lambda views: views[0], aim)


def online(run, device):
    """CoKe's with one, two and many views; the reference has its projector and predictor, too."""
    for count in ("1", "2", "multi"):
        for args, channels, loader in steps_of(coke, run, device, "--views", count, batch_size=128):
            slots, gen = args.label_size if count == "1" else 1, common.generator("bench")
            heads = [coke.new_head(k, args.dim, len(loader.data), slots, gen) for k in args.k]
            heads = [{name: x.to(device) for name, x in head.items()} for head in heads]
            net = common.to_device(coke.Network(args, channels), device)
            optimizer = torch.optim.SGD(net.parameters(), args.lr, args.momentum)
            rest = [args.lr] * (len(loader.data) // args.batch_size), heads, ("training", 1.0)
            train = lambda batches, meter: coke.train(net, optimizer, batches, *rest, meter, args)
            yield step_case(f"CoKe step, {count} view(s)", args, loader, coke.make_views(args), train, net)


def lsdc_training(run, device):
    """LSD-C's: RotNet's, then the clustering's."""
    for rotnet in (True, False):
        for args, _, loader in steps_of(lsdc, run, device, batch_size=32 if rotnet else 128):
            backbone, labels = lsdc.make_backbone(args, loader.data), loader.data.labels.to(device)
            net = nn.Sequential(backbone, nn.ReLU(), nn.Linear(backbone.dim, 4))
            if not rotnet:
                nn.ModuleList(lsdc.first_stages(backbone.net, args.freeze_stages)).requires_grad_(False)
                net = lsdc.Network(backbone, args.k, 1)
            net, rest = common.to_device(net, device), (labels, 1.0, np.random.default_rng(0))
            optimizer = torch.optim.SGD([w for w in net.parameters() if w.requires_grad], 1e-4, 0.9)
            views = [lsdc.PaddedView(args.image_size, center=1.0, pad=args.pad)] * (1 if rotnet else 3)
            train = lambda batches, meter: lsdc.train(net, optimizer, batches, *rest, meter, args)
            ready = lambda views: views
            if rotnet:
                train = lambda batches, meter: lsdc.train_rotnet(net, optimizer, batches, meter, args)
                ready = lambda views: lsdc.rotate4(views[0])[0]
            name = f"LSD-C step, {'rotnet' if rotnet else 'clustering'}"
            yield step_case(name, args, loader, views, train, net, ready)


def aggregation_step(n, h, device, k=4096):
    """(step, v (128, 128), bank (n, 128)): Local Aggregation behind its embeddings: search, loss, gradient, bank."""
    v, index = F.normalize(blobs(128, 128, device)).requires_grad_(), torch.arange(128, device=device)
    bank = F.normalize(torch.randn(n, 128, device=device))
    clusterings = torch.randint(n // 50, (h, n), device=device, dtype=torch.int32)

    def step():
        similarity, ids, _ = local_aggregation.background_neighbors(v, bank, index, k)
        close = local_aggregation.close_neighbors(clusterings, index, ids)
        local_aggregation.aggregation_loss(similarity, close, 0.07).mean().backward()
        local_aggregation.update_bank(bank, index, v)

    return step, v.detach(), bank


def aggregation(run, device):
    """The product with the bank and its top 4096 alone."""
    for n, h in [(20_000, 3)] if run.quick else [(50_000, 3), (1_281_167, 10)]:
        step, v, bank = aggregation_step(n, h, device)
        plain = lambda: [(part @ bank.T).topk(4096) for part in v.split(2**27 // n)]
        yield Case(f"LA N={n:,} H={h}: v to loss to v", step, plain)


def labels(run, device):
    """CoKe's targets of a batch from its averaged labels, against a loop over the images."""
    b = 128 if run.quick else 1_024
    shares = torch.rand(100_000, 5, device=device)  # (N, S)
    shares *= (shares < 0.7) / shares.sum(-1, keepdim=True)
    index = torch.randperm(len(shares), device=device)[:b]

    def reference():
        rows = [torch.where(x > 0, (x / 0.5).exp(), 0.0) for x in (shares[i] for i in index.tolist())]
        return torch.stack([x / x.sum() for x in rows])

    yield Case(f"CoKe targets, B={b}, S=5", lambda: coke.soft_targets(shares[index], 0.5), reference)


def pair_step(z, logits, permutations, shares):
    """LSD-C behind its features: pairwise pseudo-labels (kNN), targets, loss and its gradient."""
    mixed, clean = logits.softmax(-1)
    similar = lsdc.knn_pairs(z, 18)
    loss = lsdc.pair_loss(mixed, clean, lsdc.mixed_targets(similar, permutations, shares))
    return torch.autograd.grad(loss, logits)[0]


def pair_by_pair(z, logits, permutations, shares):
    """The same from a list of all B * B pairs."""
    rows, columns = torch.cartesian_prod(*[torch.arange(len(z), device=z.device)] * 2).T
    distance = (z[rows] - z[columns]).square().sum(1).view(len(z), -1)  # from (B * B, D)
    near = distance <= distance.kthvalue(18 + 1, 1, keepdim=True)[0]
    target = (shares[:, None, None] * (near | near.T).float()[permutations]).sum(0).flatten()
    mixed, clean = logits.softmax(-1)
    same = (mixed[rows] * clean[columns]).sum(1)
    loss = -(target * (same + 1e-7).log() + (1 - target) * (1 - same + 1e-7).log()).mean()
    return torch.autograd.grad(loss, logits)[0]


def pairs(run, device):
    """LSD-C's pairwise pseudo-labels (kNN), targets and loss with its gradient, against enumerating all pairs."""
    b, d = (64, 64) if run.quick else (256, 512)
    z = (blobs(10, d, device).repeat(b // 10 + 1, 1)[:b] + blobs(b, d, device)).relu()
    permutations, shares, _ = lsdc.draw_mixture("ricap", b, 32, np.random.default_rng(0))
    logits = torch.randn(2, b, 10, device=device).requires_grad_()
    given = z, logits, permutations.to(device), shares.to(device)
    torch.testing.assert_close(pair_step(*given), pair_by_pair(*given), rtol=1e-3, atol=1e-6)
    ours, reference = (partial(step, *given) for step in (pair_step, pair_by_pair))
    yield Case(f"LSD-C pairs, B={b}, D={d}", ours, reference)


def probes(run, device):
    """Every stage by itself, the network run up to it: its linear classifiers one after another, or all at once."""
    n, flags = (
        128 if run.quick else 512,
        ["--random", "alexnet-small", "--data", "cifar10", "--batch-size", "128"],
    )
    args = eval_linear.options([*flags, "--crops", "center"])
    args.amp, data = device.type == "cuda", noise(n, 3, 32, device)
    loader, data.labels = common.Loader(data, 128, 32, 1.0, device, 0), data.labels.to(device)
    net = common.to_device(common.Backbone("alexnet-small", 3, 32, sobel=True), device).eval()
    model, optimizer = next(eval_linear.models(net, args, data, device))
    layers, stages = eval_linear.stages(net)

    def reference(sets):
        for (end, stage), decays in product(stages.items(), sets):
            linear = nn.ModuleList(copy.deepcopy(row[stage]) for row in model[1].linear[: len(decays)])
            groups = [
                {"params": f.parameters(), "weight_decay": x} for f, x in zip(linear, decays, strict=True)
            ]
            sgd = torch.optim.SGD(groups, 0.01, momentum=0.9)
            for index, images in loader.test(torch.arange(n)):
                with torch.no_grad(), common.autocast(device, args.amp):
                    x = nn.Sequential(net.sobel, *layers[: end + 1])(images).float()
                    side = math.isqrt(linear[0].in_features // x.shape[1])
                    x = F.adaptive_avg_pool2d(x, side).flatten(1)
                sgd.zero_grad()
                sum(F.cross_entropy(f(x), data.labels[index]) for f in linear).backward()
                sgd.step()

    ours = lambda: eval_linear.train(model, optimizer, loader, torch.arange(n), 0, args)
    for sets in ([[decay] for decay in args.wd], [args.wd]):
        name = f"probes: one pass against {len(stages) * len(sets)}"
        yield Case(name, ours, partial(reference, sets), n)


def apart(work, *given):
    """What work(*arguments) returns for each of the `given` arguments, all at once, each in a new process."""
    with ProcessPoolExecutor(len(given), get_context("spawn")) as pool:
        return list(pool.map(work, *zip(*given, strict=True)))


def processes(run, device):
    """k-means in one process of one core, against two of one core each, on CPUs; without start-up."""
    n, found = 5_000 if run.quick else 40_000, {1: [], 2: []}
    one_thread = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
    for world in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as store, patch.dict(os.environ, one_thread):
            found[world] += apart(kmeans_apart, *[(n, store, rank, world) for rank in range(world)])[0]
    yield Case("kmeans: 2 processes against 1, a core each", *(float(np.median(found[w])) for w in (2, 1)))


def kmeans_apart(n, store, rank, world):
    """Seconds of k-means, three times, from a barrier on; each process has a part of the rows."""
    dist.init_process_group("gloo", init_method=f"file://{store}/store", rank=rank, world_size=world)
    spent, x = [], blobs(n, 256, "cpu")[slice(*common.shard(n))].clone()
    for _ in range(4):  # the first one warms up
        dist.barrier()
        start = time.perf_counter()
        common.kmeans(x, 500, common.generator("kmeans"), 10)
        spent.append(time.perf_counter() - start)
    return spent[1:]


def memory(run, device):
    """GB that one of 8 processes takes to cluster 1.28 million images, against all their features. Aim: 2 GB."""
    for n in (10_000,) if run.quick else (160_000, 640_000):
        peak = apart(memory_apart, (n, device))[0]
        yield Case(f"memory (GB): clustering, D=4096, N={n:,}", peak, 1.28e6 * 4096 * 4 / 1e9)


def memory_apart(n, device):
    loader = common.Loader(noise(n, 1, 4, device), 256, 4, 1.0, device, 0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16, 4096), nn.ReLU()).to(device)  # 16 pixels, to be quick
    net.dim = 4096
    args = deepcluster.options(["--data", "noise", "--pca", "256", "--k", "100"])
    deepcluster.cluster(net, loader, args, common.generator("bench"), 8_192)
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() / 1e9
    status = Path("/proc/self/status").read_text()  # ru_maxrss starts with the parent's peak
    return int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e9


ROWS = {  # function: its aim
    kmeans: "<= 1.1",
    pca: "<= 1.1",
    augmentation: ">= 4",
    files: "<= 1",
    listing: "<= 1.5",
    training: "<= 1.15",
    aggregation: "<= 2",
    aggregation_training: "<= 1.15",
    labels: ">= 50",
    online: "<= 1.15",
    pairs: ">= 100",
    lsdc_training: "<= 1.15",
    probes: ">= 3",
    processes: ">= 1.8",
    memory: "<= 0.095",
}

# %% as the work grows


def kmeans_of(n, k, device):
    return partial(common.kmeans, blobs(n, 256, device), k, common.generator("kmeans"), 5)


NS, KS = (10_000, 30_000, 100_000, 300_000), (100, 300, 1_000, 3_000, 10_000)
SCALE = {  # what: (sizes, what makes the work of one size)
    "images: k-means, D = 256, K = 1000, 5 iterations": (NS, lambda n, device: kmeans_of(n, 1_000, device)),
    "clusters: the same, N = 30,000": (KS, lambda k, device: kmeans_of(30_000, k, device)),
    "images: LA behind its embeddings, B = 128": (NS, lambda n, device: aggregation_step(n, 3, device)[0]),
}


def scale(run, device):
    """Measure and print the cases of SCALE, as dictionaries for the report; seconds = constant + each * size."""
    for what, (sizes, work) in SCALE.items():
        sizes, costs = np.array(sizes[: 3 if run.quick else None]), []
        print(f"\n{what}")
        for size in sizes.tolist():
            costs += race([work(size, device)])
            print(f"{size:>14,}{costs[-1]:>12.4g} s", flush=True)
        each, constant = np.polyfit(sizes, costs, 1, w=1 / np.array(costs)).tolist()  # by relative errors
        power = float(np.log(costs[-1] / costs[-2]) / np.log(sizes[-1] / sizes[-2]))
        print(f"    {constant:.3g} s + {each:.3g} s each; at the end with the power {power:.2f}")
        yield {"name": what, "sizes": sizes.tolist(), "seconds": costs, "each": each, "power": power}


# %% main


def rows(run, device):
    """Measure and print the rows one by one, as dictionaries for the report."""
    threads = torch.get_num_threads()
    print(f"\n{'name':56}{'ours':>14}{'reference':>14}{'ratio':>8}  aim (<=: time, >=: speed), met?")
    for function, usual in ROWS.items():
        for case in function(run, device) if function.__name__ in run.only else ():
            if callable(case.ours):
                case.ours, case.reference = race([case.ours, case.reference])
            sides, aim = (case.ours, case.reference), usual if case.aim is None else case.aim
            sign, limit = aim[:2], float(aim[2:] or "nan")
            ratio = sides[0] / sides[1] if sign == "<=" else sides[1] / sides[0]
            met = ratio <= limit if sign == "<=" else ratio >= limit
            verdict = "" if run.quick or aim == sign else "yes" if met else "NO"  # aims are for full sizes
            a, b = (f"{case.images / x:,.0f} img/s" if case.images else f"{x:.3g}" for x in sides)
            print(f"{case.name:56}{a:>14}{b:>14}{ratio:>8.2f}  {aim} {verdict}".rstrip(), flush=True)
            yield asdict(case) | {"ratio": ratio, "aim": aim, "met": verdict}
        torch.set_num_threads(threads)


def main():
    names = [function.__name__ for function in ROWS]
    p = argparse.ArgumentParser(prog="python -m extras.bench", description="Speed next to a plain reference")
    # fmt: off
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="ROW", help=f"rows to run, of: {', '.join(names)}")
    p.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs, not how fast")
    p.add_argument("--scale", action="store_true", help="instead of the rows: what grows with images and clusters, and how")
    p.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: a GPU where there is one")
    p.add_argument("--out", default="bench.json", help="JSON file with the machine and all rows, written anew")
    # fmt: on
    run = p.parse_args()
    device = common.setup(run.device)
    about = {"cpu": subprocess.getoutput("lscpu | grep 'Model name'").split(":")[-1].strip()}
    about |= {"cores": os.cpu_count(), "threads": torch.get_num_threads(), "load": os.getloadavg()[0]}
    report = {**common.what_runs(run, ()), **about, "rows": []}
    print(", ".join(f"{name} {report[name]}" for name in ("hardware", *about, "commit", "versions")))
    for row in scale(run, device) if run.scale else rows(run, device):
        report["rows"].append(row)
        Path(run.out).write_text(json.dumps(report, indent=1))  # what is measured stays if the next row fails


if __name__ == "__main__":
    main()
