"""Speed, side by side with a plain reference: every piece of the scripts, on this machine, as a ratio.

    for each row:  warm up both sides; then in turns: ours, reference, ours, reference, ..
                   ratio of the medians, next to what we aim at (see "aim": <= is time, >= is speed)

    python bench.py                          all rows that run here, 20 minutes on two cores
    python bench.py --quick                  small sizes, a minute: does everything run?
    python bench.py --only kmeans pca        some rows; names: see --help
    python bench.py --device cuda            on the GPU; also networks at 224 pixels
    python bench.py --scale                  instead: time and memory as images and clusters grow, and the laws

Prints a table and writes --out (bench.json). What the references are:

    kmeans        faiss.Kmeans: same rows, start, K and 20 iterations, no subsampling, a last assignment
    pca           faiss.PCAMatrix with eigen_power -0.5, trained on the same rows, applied, unit length
    nearest       torch: product and topk, in chunks of queries
    augmentation  torchvision's transforms on PIL images one by one, one thread on both sides
    files         torchvision's ImageFolder on the same JPEGs (--folder), RandomResizedCrop, mirror, normalise; no
                  loader processes and one thread on both sides
    training      the same networks on one ready batch: zero_grad, forward, cross-entropy, backward.
                  Ours has everything: fetching and augmenting images, head, progress, optimisers
    aggregation   Local Aggregation from embeddings to their gradient, against product and topk alone;
                  its whole training step against forward and backward of the same network
    labels        CoKe's averaged labels of a batch, targets and update, against a loop over its images
    online        CoKe's training step with one, two and many views, against forward and backward of the same
                  network, projector and predictor on the same views, ready in memory
    pairs         LSD-C's pair labels, targets and loss with its gradient, against enumerating all pairs
    lsdc_training its training step, and RotNet's, against forward and backward of the same network on the same
                  views, ready in memory
    extraction    the same network in evaluation mode on the same batches, ready in memory
    probes        one linear classifier after another, the network run up to its stage only; for "stages" those
                  of all weight decays at once
    processes     k-means in one process of one core, against two of one core each; without start-up
    memory        not a race: peak memory of clustering at growing N, against (N, D) features in memory

Timings say something on a quiet machine only. Nothing here is a test.
"""

import argparse
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from statistics import median

import common  # isort: skip  (first: it says how long OpenMP's threads spin)
import coke
import deepcluster
import eval_linear
import legacy
import local_aggregation
import lsdc

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from torchvision import transforms

import faiss  # isort: skip  (after torch, see common.py)

# --------------------------------------------------------------------------- measuring


def race(ours, reference, device, rounds=5, warm_up=True):
    """Median seconds of ours() and of reference(), run in turns."""
    seconds = [], []
    for turn in range(-warm_up, rounds):
        for function, found in zip((ours, reference), seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            function()
            synchronize(device)
            if turn >= 0:
                found.append(time.perf_counter() - start)
    return median(seconds[0]), median(seconds[1])


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def threads(n):
    """Run the block with n threads in torch."""
    before = torch.get_num_threads()
    torch.set_num_threads(n)
    yield
    torch.set_num_threads(before)


def row(name, seconds, aim="<=", images=0, note="", **more):
    """One line of the table from (ours, reference) seconds.

    aim: "<= 1.1", at most 1.1 times the reference's time; ">= 4", at least 4 times as fast; the number
    may be missing. images: how many each side handled, to print images/s instead of seconds.
    """
    ours, reference = seconds
    sign, *limit = aim.split()
    ratio = ours / reference if sign == "<=" else reference / ours
    met = None
    if limit:
        met = ratio <= float(limit[0]) if sign == "<=" else ratio >= float(limit[0])
    ours, reference = (f"{images / s:,.0f} img/s" if images else f"{s:.3g} s" for s in seconds)
    what = "time" if sign == "<=" else "speed"
    aim = aim if limit else ""
    return {"name": name, "ours": ours, "reference": reference, "ratio": ratio, "of": what, "aim": aim,
            "met": met, "seconds": seconds, "images": images, "note": note, **more}  # fmt: skip


def blobs(n, d, device, clusters=500):
    """(n, d) float32 rows around random centres that overlap, the same on every call."""
    gen = legacy.generator("bench", n, d)
    centres = 0.2 * torch.randn(clusters, d, generator=gen)
    x = centres[torch.randint(clusters, (n,), generator=gen)]
    return x.add_(torch.randn(n, d, generator=gen)).to(device)


def synthetic(n, channels, size, device, kind=legacy.Images):
    """n images of noise, in memory, with ten labels."""
    gen = legacy.generator("bench images", n, channels, size)
    pixels = torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=gen)
    labels = torch.randint(10, (n,), generator=gen)
    middle = (0.5,) * channels
    return kind("noise", pixels.to(device), None, labels, [str(i) for i in range(10)], middle, middle)


# --------------------------------------------------------------------------- rows
# A function for each name of --only yields rows; quick: smaller sizes.
# ruff: noqa: B023 (a row's two functions have run before its loop goes on)


def bench_kmeans(device, quick):
    sizes = [(6_000, 84, 100), (5_000, 256, 100)] if quick else [(60_000, 84, 100), (50_000, 256, 1000)]
    for n, d, k in sizes:
        x, last = blobs(n, d, device), {}
        start = torch.randperm(n, generator=common.generator(0, "kmeans"))[:k]  # where common.kmeans starts

        def ours():
            last["ours"] = common.kmeans(x, k, common.generator(0, "kmeans"))[3]

        rows, first = x.cpu().numpy(), x[start.to(device)].cpu().numpy()

        def reference():
            plain = faiss.Kmeans(d, k, niter=20, max_points_per_centroid=n, min_points_per_centroid=1)
            if device.type == "cuda":  # on this one; gpu=1 would take all there are
                plain.index = faiss.index_cpu_to_gpu(bench_kmeans.resources, device.index, plain.index)
            plain.train(rows, init_centroids=first)
            last["faiss"] = plain.assign(rows)[0].mean()
            last["iterations"] = len(plain.obj)  # newer versions stop where nothing changes any more

        if device.type == "cuda":
            bench_kmeans.resources = faiss.StandardGpuResources()
        seconds = race(ours, reference, device, rounds=3)
        note = f"mean squared distance {last['ours']:.6g} against {last['faiss']:.6g}"
        note += f"; iterations 20 against {last['iterations']}"
        yield row(f"kmeans N={n} D={d} K={k}", seconds, "<= 1.1", note=note)


def bench_pca(device, quick):
    for n, d, rounds in [(4_000, 512, 3)] if quick else [(20_000, 1024, 3), (8_192, 4096, 1)]:
        x = blobs(n, d, device)
        rows = x.cpu().numpy()

        def ours():
            return deepcluster.whiten(x, *deepcluster.pca(x, 256, None))

        def reference():
            plain = faiss.PCAMatrix(d, 256, -0.5)
            plain.max_points_per_d = n
            plain.train(rows)
            return F.normalize(torch.from_numpy(plain.apply(rows)))

        seconds = race(ours, reference, device, rounds, warm_up=rounds > 1)
        yield row(f"pca + whiten N={n} D={d} P=256", seconds)


def bench_nearest(device, quick):
    n, queries, d = (5_000, 500, 128) if quick else (50_000, 4_096, 128)
    keys, q = F.normalize(blobs(n, d, device)), F.normalize(blobs(queries, d, device))

    def plain(k):
        return torch.cat([(chunk @ keys.T).topk(k, 1)[1] for chunk in q.split(512)])

    for k in (1, 200):
        seconds = race(lambda: common.nearest(q, keys, k, inner=True), lambda: plain(k), device)
        same = (common.nearest(q, keys, k, inner=True)[1] == plain(k)).double().mean().item()
        yield row(f"nearest {queries} in {n}, D={d}, k={k}", seconds, note=f"{same:.2%} of the ids agree")


def bench_augmentation(device, quick):
    n = 256 if quick else 2_048
    data = synthetic(n, 3, 32, device, common.Images)
    loader = common.Loader(data, 256, 32, 1.0, device, 0)
    pictures = [Image.fromarray(x) for x in data.pixels.cpu().permute(0, 2, 3, 1).numpy()]
    end = [transforms.ToTensor(), transforms.Normalize(data.mean, data.std)]
    crop = [transforms.RandomResizedCrop(32, (0.2, 1.0)), transforms.RandomHorizontalFlip()]
    tint = transforms.ColorJitter(0.4, 0.4, 0.4, 0.1)
    tint = [transforms.RandomApply([tint], 0.8), transforms.RandomGrayscale(0.2)]
    simple = common.View(32, (0.2, 1.0)), transforms.Compose([*crop, *end])
    colourful = (
        common.View(32, (0.2, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, gray=0.2),
        transforms.Compose([*crop, *tint, *end]),
    )
    cases = [("two views with colour", 2, *colourful, ">= 4"), ("one view, crop + flip", 1, *simple, ">=")]
    for name, count, view, one_by_one, aim in cases:

        def ours():
            return sum(len(index) for index, _ in loader.train(torch.randperm(n), [view] * count))

        def reference():
            for batch in range(0, n, 256):
                for _ in range(count):
                    torch.stack([one_by_one(x) for x in pictures[batch : batch + 256]])

        with threads(1):
            seconds = race(ours, reference, device)
        yield row(f"augmentation 32 px, {name}", seconds, aim, images=n * count)


def bench_files(device, quick, folder=None):
    with tempfile.TemporaryDirectory() as made_up:
        where = "made up" if folder is None else f"of {folder.name}"
        if folder is None:
            folder = photographs(Path(made_up), 32 if quick else 256)
        middle = legacy.IMAGENET_MEAN, legacy.IMAGENET_STD
        one_by_one = transforms.Compose(
            [
                transforms.RandomResizedCrop(224, (0.08, 1.0)),
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(*middle),
            ]
        )
        try:
            plain = torchvision.datasets.ImageFolder(folder, one_by_one)
        except OSError as error:
            legacy.refuse(f"--folder: {error}")
        n = min(len(plain), 512)
        n -= n % 32 if n >= 32 else 0
        paths = [path for path, _ in plain.samples[:: max(1, len(plain) // n)]][:n]
        plain.samples = [(path, 0) for path in paths]
        data = legacy.Images("files", None, paths, None, [], *middle)
        loader = legacy.Loader(data, min(32, n), 224, 256, device, workers=0)
        batches = torch.utils.data.DataLoader(plain, min(32, n), shuffle=True)

        def ours():
            return sum(len(index) for index, _ in loader.epoch(0, [legacy.View()]))

        def reference():
            return sum(len(images.to(device)) for images, _ in batches)

        with threads(1):
            seconds = race(ours, reference, device, rounds=3)
        yield row(
            "files: JPEG to 224 px, crop + flip", seconds, "<= 1", images=n, note=f"{n} images, {where}"
        )


def photographs(folder, n):
    """n JPEG files of 500 x 375 pixels in folder/made-up: smooth noise, about as many bytes as a photograph has."""
    (folder / "made-up").mkdir()
    gen = np.random.default_rng(0)
    for i in range(n):
        coarse = Image.fromarray(gen.integers(0, 256, (94, 125, 3), dtype=np.uint8))
        coarse.resize((500, 375), Image.Resampling.BICUBIC).save(folder / "made-up" / f"{i}.jpg", quality=90)
    return folder


def networks(device, quick):
    """(name, options, loader, body, head) of each network to measure, with its paper's recipe."""
    found = [("digits", "lenet5", 1, 32, 12), ("fashionmnist", "lenet5", 1, 28, 12)]
    found += [("cifar10", "alexnet-small", 3, 32, 6)]
    if device.type == "cuda":
        found = [(*rest, 100) for *rest, _ in found]
        found += [("imagenet", arch, 3, 256, 10) for arch in ("alexnet", "vgg16", "resnet18")]
    for recipe, arch, channels, side, steps in found:
        args = deepcluster.options(["--recipe", recipe, "--data", "noise", "--arch", arch, "--lr", "1e-4"])
        args.amp = device.type == "cuda"
        data = synthetic(args.batch_size * (2 if quick else steps), channels, side, device, common.Images)
        loader = common.Loader(data, args.batch_size, args.image_size, args.center_fraction, device, 0)
        body = deepcluster.make_encoder(args, channels)[1]
        head = deepcluster.make_head(body.dim, args.k, common.generator("head"))
        name = f"{arch}, {args.image_size} px, B={args.batch_size}"
        yield name, args, loader, common.to_device(body, device), head.to(device)


def bench_training(device, quick):
    for name, args, loader, body, head in networks(device, quick):
        n, b = len(loader.data), args.batch_size
        assign, weights = torch.arange(n) % args.k, torch.ones(n, device=device)
        optimizer = torch.optim.SGD(body.parameters(), args.lr, args.momentum, weight_decay=args.wd)
        view = common.View(args.image_size, (args.crop_area, 1.0), flip=0.5 * args.flip)
        index, (images,) = next(loader.train(torch.arange(n), [view]))
        target = assign.to(device)[index]
        both = nn.Sequential(body, head)

        def ours():
            order = deepcluster.uniform_over_clusters(assign, common.generator("order"))
            batches, meter = loader.train(order, [view]), common.Meter("bench", n)
            deepcluster.train(body, head, optimizer, batches, assign.to(device), weights, meter, args)

        def reference():
            both.train()
            for _ in range(n // b):
                both.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    logits = both(images)
                F.cross_entropy(logits.float(), target).backward()

        seconds = race(ours, reference, device)
        yield row(f"DeepCluster step: {name}", seconds, "<= 1.15", images=n)


def bench_extraction(device, quick):
    for name, _, loader, body, _ in networks(device, quick):
        index = torch.arange(len(loader.data))
        batches = [images for _, images in loader.test(index)]

        @torch.no_grad()
        def reference():
            body.eval()
            return torch.cat([body(images) for images in batches])

        def ours():
            return common.extract(body, loader, index)

        yield row(f"extraction: {name}", race(ours, reference, device), images=len(index))


def bench_aggregation(device, quick):
    """Local Aggregation without its network: everything from v to its gradient and the bank."""
    b, d, k = 128, 128, 4096
    for n in (20_000,) if quick else (50_000, 1_281_167):
        bank = legacy.unit(torch.randn(n, d, generator=legacy.generator("bank"))).to(device)
        v = legacy.unit(blobs(b, d, device)).requires_grad_()
        index, m = torch.randperm(n, generator=legacy.generator("index"))[:b].to(device), min(10_000, n // 50)
        h = 3 if n <= 50_000 else 10
        clusterings = torch.randint(m, (h, n), generator=legacy.generator("clusters")).int().to(device)
        noise = torch.randint(n, (b, k), generator=legacy.generator("noise")).to(device)
        args = local_aggregation.options(["--batch-size", str(b), "--noise", str(k)])
        args.ir_loss = "softmax" if n <= local_aggregation.EXACT else "nce"

        def aggregate():
            similarity, ids, _ = local_aggregation.background(v, bank, index, k)
            close = local_aggregation.close_neighbours(clusterings, index, ids)
            local_aggregation.aggregation_loss(similarity, close, 0.07).mean().backward()
            local_aggregation.update_bank(bank, index, v)

        def plain():
            for part in v.detach().split(max(1, 2**27 // n)):
                (part @ bank.T).topk(k)

        rounds = 5 if n <= 50_000 or device.type == "cuda" else 1
        yield row(f"Local Aggregation N={n:,} H={h}: v to loss to v", race(aggregate, plain, device, rounds), "<= 2",
                  note="against the product bank @ v and its top 4096")  # fmt: skip

        def recognise():
            each = local_aggregation.recognise(v, bank, index, 0, 0, args)  # nce: draws its noise, too
            each.mean().backward()
            local_aggregation.update_bank(bank, index, v)

        def product():
            return (
                v.detach() @ bank.T if n <= local_aggregation.EXACT else bank[noise] @ v.detach()[:, :, None]
            )

        seconds = race(recognise, product, device, 5)
        yield row(
            f"instance recognition N={n:,}, {args.ir_loss}: v to loss to v",
            seconds,
            note="against its product",
        )


def bench_aggregation_training(device, quick):
    """A whole training step of instance recognition and of Local Aggregation, against the bare network."""
    cases = [("fashionmnist", 1, 60_000, 6), ("cifar10", 3, 50_000, 2)]
    if device.type == "cuda":
        cases = [(*rest, 50) for *rest, _ in cases] + [("imagenet", 3, 1_281_167, 10)]
    for recipe, channels, n, steps in cases[: 1 if quick else None]:
        args = local_aggregation.options(["--recipe", recipe, "--data", "noise"])
        args.amp, b = device.type == "cuda", args.batch_size
        args.ir_loss = "softmax" if n <= local_aggregation.EXACT else "nce"
        data = synthetic(b * steps, channels, args.resize, device)
        loader = legacy.Loader(data, b, args.image_size, args.resize, device)
        _, net = local_aggregation.make_net(args, channels)
        net = legacy.to_device(net, device)
        groups = local_aggregation.parameter_groups(net, args.wd)
        optimizer = torch.optim.SGD(groups, 1e-4, args.momentum, fused=True)
        bank = legacy.unit(torch.randn(n, args.dim, generator=legacy.generator("bank"))).to(device)
        clusterings = torch.randint(args.k, (args.clusterings, n), generator=legacy.generator("clusters"))
        images = next(loader.epoch(0, [legacy.View()]))[1][0]

        def reference():
            net.train()
            for _ in range(steps):
                net.zero_grad()
                with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                    v = net(images)
                v.square().sum().backward()

        for phase, given, aim in (("IR", None, "<= 1.15"), ("LA", clusterings.int().to(device), "<= 1.15")):
            aim = "<= 1.5" if n > 1e6 and phase == "LA" else aim

            def ours():
                local_aggregation.train(net, optimizer, loader, bank, given, 0, 0, steps, [0.0] * 4, args)

            name = f"{phase} step: {args.arch}, {args.image_size} px, B={b}, N={n:,}"
            yield row(name, race(ours, reference, device, 3), aim, images=b * steps)


def bench_labels(device, quick):
    n, b, k, slots = (2_000, 128, 100, 5) if quick else (100_000, 1_024, 5_000, 5)
    gen = legacy.generator("bench labels")
    labels = torch.randint(k, (n, 1, slots), generator=gen).to(device)
    shares = torch.rand(n, 1, slots, generator=gen) * (torch.rand(n, 1, slots, generator=gen) < 0.7)
    shares[..., 0] += 0.1
    shares = (shares / shares.sum(-1, keepdim=True)).to(device)
    index = torch.randperm(n, generator=gen)[:b].to(device)
    found = torch.randint(k, (b, 1), generator=gen).to(device)

    def targets():
        return coke.soft_targets(shares[index], 0.5)

    def targets_loop():
        rows = []
        for i in index.tolist():
            weight = torch.where(shares[i, 0] > 0, (shares[i, 0] / 0.5).exp(), 0.0)
            rows.append(weight / weight.sum())
        return torch.stack(rows)[:, None]

    def update():
        return coke.average_labels(labels[index], shares[index], found, 0.25)

    def update_loop():
        rows = []
        for i, new in zip(index.tolist(), found[:, 0].tolist(), strict=True):
            own, value = labels[i, 0].clone(), shares[i, 0].clone()
            at = ((own == new) & (value > 0)).nonzero()
            slot, least = (at[0, 0], 0.0) if len(at) else (value.argmin(), value.min())
            value[slot] = value[slot] * bool(len(at))
            value *= (1 - 0.25) / (1 - least)
            value[slot] += 0.25
            own[slot] = new
            rows.append((own, value))
        return tuple(torch.stack(x)[:, None] for x in zip(*rows, strict=True))

    if not torch.allclose(targets(), targets_loop(), atol=1e-6):
        raise AssertionError("the targets differ")
    if not torch.allclose(update()[1], update_loop()[1], atol=1e-6):
        raise AssertionError("the updates differ")
    size = f"B={b}, K={k}, S={slots}"
    yield row(f"CoKe targets, {size}", race(targets, targets_loop, device), ">= 50")
    yield row(f"CoKe targets and update, {size}", race(
        lambda: (targets(), update()), lambda: (targets_loop(), update_loop()), device), ">= 50")  # fmt: skip


def bench_online(device, quick):
    cases = [("fashionmnist", 1, 6), ("cifar10", 3, 2)]
    if device.type == "cuda":
        cases = [(*rest, 50) for *rest, _ in cases] + [("imagenet", 3, 10)]
    for recipe, channels, steps in cases[: 1 if quick else None]:
        for count in ("1", "2", "multi"):
            args = coke.options(["--recipe", recipe, "--data", "noise", "--views", count])
            args.amp, args.batch_size = device.type == "cuda", min(args.batch_size, 128)
            data = synthetic(args.batch_size * steps, channels, args.resize, device)
            loader = legacy.Loader(data, args.batch_size, args.image_size, args.resize, device)
            net = legacy.to_device(coke.make_net(args, channels)[1], device)
            optimizer = torch.optim.SGD(net.parameters(), 1e-4, args.momentum, fused=True)
            slots = args.label_size if args.first_stage < 1 else 1
            memory = coke.new_memory(args.k, args.dim, len(data), slots, device, "bench")
            args.init_epochs, args.lr = 0, 1e-4
            images = next(loader.epoch(0, coke.make_views(args)))[1]

            def ours():
                coke.train(
                    net, optimizer, loader, memory, 0, 0, steps, [0.0] * 4, coke.phase(0, steps, args), args
                )

            def reference():
                net.train()
                for _ in range(steps):
                    net.zero_grad()
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        x, p = net(images)
                    (x.square().sum() + p.square().sum()).backward()

            name = f"CoKe step, {count} view(s): {args.arch}, {args.image_size} px, B={args.batch_size}, H={len(args.k)}"
            yield row(name, race(ours, reference, device, 3), "<= 1.15", images=args.batch_size * steps)


def bench_pairs(device, quick):
    b, d, k = (64, 64, 10) if quick else (256, 512, 10)
    gen, rng = legacy.generator("bench pairs"), np.random.default_rng(0)
    z = (torch.randn(k, d, generator=gen).repeat(b // k + 1, 1)[:b] + torch.randn(b, d, generator=gen)).relu()
    z, logits = z.to(device), torch.randn(2, b, k, generator=gen).to(device).requires_grad_()
    permutations, shares, _ = lsdc.draw_mixture("ricap", b, 32, rng)
    permutations = permutations.to(device)
    numbers = (18, 0.9, 0.01, 8.0)  # neighbours, cosine threshold, SNE's threshold and temperature

    def ours():
        mixed, clean = logits.softmax(-1)
        target = lsdc.mixed_targets(lsdc.similar_pairs(z, kind, *numbers), permutations, shares)
        loss = lsdc.pair_loss(mixed, clean, target)
        return loss, torch.autograd.grad(loss, logits)[0]

    def enumeration():
        rows, columns = torch.arange(b).repeat_interleave(b).to(device), torch.arange(b).repeat(b).to(device)
        left, right = z[rows], z[columns]  # (B * B, D) each
        if kind == "cosine":
            similar = (left * right).sum(1) / left.norm(dim=1) / right.norm(dim=1) >= numbers[1]
        else:
            distance = (left - right).square().sum(1).view(b, b)
            if kind == "knn":
                near = distance <= distance.kthvalue(numbers[0] + 1, 1, keepdim=True)[0]
                similar = near | near.T
            else:
                p = (-distance / numbers[3] ** 2).fill_diagonal_(-float("inf")).softmax(1)
                similar = ((p + p.T) / 2 > numbers[2]).fill_diagonal_(True)
        similar, mixed, clean = similar.view(b, b).float(), *logits.softmax(-1)
        target = sum(w * similar[who] for w, who in zip(shares.tolist(), permutations, strict=True)).flatten()
        same = (mixed[rows] * clean[columns]).sum(1)
        loss = -(target * (same + 1e-7).log() + (1 - target) * (1 - same + 1e-7).log()).mean()
        return loss, torch.autograd.grad(loss, logits)[0]

    for kind in ("knn", "cosine", "sne"):
        if not all(
            torch.allclose(x, y, rtol=1e-4, atol=1e-6) for x, y in zip(ours(), enumeration(), strict=True)
        ):
            raise AssertionError(f"{kind}: the losses differ")
        # Ours takes so little that it is timed over 20 calls in a row; a single one would be the cache's time.
        many, one = race(lambda: [ours() for _ in range(20)], enumeration, device)
        seconds = many / 20, one
        yield row(f"LSD-C pairs, {kind}, B={b}, D={d}", seconds, ">= 100")


def bench_lsdc_training(device, quick):
    cases = [("fashionmnist", 1, 28, 6), ("cifar10", 3, 32, 2)]
    if device.type == "cuda":
        cases = [(*rest, 50) for *rest, _ in cases]
    for recipe, channels, side, steps in cases[: 1 if quick else None]:
        for kind in ("rotnet", "clustering"):
            args = lsdc.options(
                ["--recipe", recipe, "--data", "noise", "--lr", "1e-4", "--pretrain-lr", "1e-4"]
            )
            args.amp, args.pretrain_epochs = device.type == "cuda", int(kind == "rotnet")
            b = args.batch_size if device.type == "cuda" else 128 if kind == "clustering" else 32
            args.batch_size = b
            data = synthetic(b * steps, channels, side, device)
            loader = legacy.Loader(data, b, args.image_size, args.resize, device)
            trunk, net = (
                legacy.to_device(x, device) for x in lsdc.make_net(args, lsdc.describe(args, data)[0])
            )
            rotations = lsdc.RotNet(trunk).to(device)
            stage = lsdc.begin(0, rotations, net, [loader, loader], args)
            view = legacy.View((args.crop_area, 1.0), flip=0.5 * args.flip, pad=args.pad)
            views = [view] * (3 if kind == "clustering" else 1)
            labels, order = data.labels.to(device), torch.arange(len(data))
            images = next(loader.epoch(0, views))[1]
            turned = lsdc.four_turns(images[0])[0]

            def ours():
                losses, batches = lsdc.losses_of(stage, labels, 0, args), loader.epoch(0, views, order)
                lsdc.train(stage.trained, stage.optimizer, losses, batches, 0, steps, [], "bench")

            def reference():
                stage.net.train()
                for _ in range(steps):
                    stage.net.zero_grad()
                    with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                        found = net(images)[1] if kind == "clustering" else rotations(turned)
                    found.float().square().sum().backward()

            name = f"LSD-C step, {kind}: {args.arch}, {args.image_size} px, B={b}"
            yield row(name, race(ours, reference, device, 3), "<= 1.15", images=b * steps)


def bench_probes(device, quick):
    decays, b, n = [1e-3, 1e-4, 1e-5, 1e-6], 128, 128 if quick else 512
    loader = legacy.Loader(synthetic(n, 3, 32, device), b, 32, 32, device)
    options = {"batch_size": b, "seed": 0, "image_size": 32, "flip": True, "amp": False, "lr": 0.01}
    options |= {"crops": "centre", "lr_steps": None}
    args, order, labels = argparse.Namespace(**options), torch.arange(n), loader.data.labels.to(device)
    net = legacy.backbone("alexnet-small", 3, 32, sobel=True).to(device).eval().requires_grad_(False)
    maps = eval_linear.stage_maps(net, torch.zeros(1, 3, 32, 32, device=device))
    pools = {s: eval_linear.pool_for("alexnet-small", 32, s, *x.shape[1:3]) for s, x in maps.items()}
    features = {s: pools[s](x).numel() for s, x in maps.items()}

    def classifiers(wanted, decays):
        probes = eval_linear.Probes({s: features[s] for s in wanted}, decays, 10).to(device)
        return probes, torch.optim.SGD(probes.groups(decays), args.lr, momentum=0.9)

    def ours():
        probes, optimizer = classifiers(features, decays)
        eval_linear.train(net, pools, probes, optimizer, loader, order, 0, args)

    def one_after_another(sets):
        for stage, module in net.stages.items():
            end = list(net.features).index(module) + 1
            upto = nn.Sequential(net.sobel, net.features[:end], pools[stage], nn.Flatten())
            for decay in sets:
                probes, optimizer = classifiers([stage], decay)
                for index, crops in loader.fixed(order):
                    with torch.no_grad():
                        x = upto(crops[:, 0])
                    loss = eval_linear.probe_loss(probes({stage: x}), labels[index.to(device)])
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()

    @torch.no_grad()
    def upto_each(ends):
        images = torch.zeros(b, 3, 32, 32, device=device)
        for end in ends:
            nn.Sequential(net.sobel, net.features[:end])(images)

    ends = [list(net.features).index(module) + 1 for module in net.stages.values()]
    every, once = race(lambda: upto_each(ends), lambda: upto_each(ends[-1:]), device)
    for name, sets in (("stages", [decays]), ("classifiers", [[d] for d in decays])):
        seconds = race(ours, lambda: one_after_another(sets), device, rounds=3)
        count = len(features) * len(sets)
        note = f"the network's forward alone, up to each stage against once: {every / once:.2f}"
        note *= name == "stages"
        yield row(f"probes: one pass against {count} {name}", seconds, ">= 3", images=n, note=note)


def bench_processes(device, quick):
    n, found, apart = 5_000 if quick else 40_000, {1: [], 2: []}, []
    for _ in range(2):
        for count, seconds in found.items():
            seconds += spawn("processes", n, processes=count)["seconds"]
        with ThreadPoolExecutor(2) as pool:  # what the machine allows: two at once that share nothing
            halves = pool.map(lambda _: spawn("processes", n // 2)["seconds"], range(2))
            apart.append(max(sum(seconds) / len(seconds) for seconds in halves))
    seconds = median(found[2]), median(found[1])
    note = f"two processes that know nothing of each other, half of the images each: {median(found[1]) / median(apart):.2f}"
    yield row("kmeans: 2 processes against 1, a core each", seconds, ">= 1.8", note=note)


def bench_memory(device, quick):
    images, share = (10_000, 20_000) if quick else (40_000, 160_000, 640_000), 1_280_000 // 8
    peaks = {n: spawn("memory", n, device)["bytes"] for n in images}
    (n, low), (m, high) = list(peaks.items())[-2:]
    slope = (high - low) / (m - n)
    peak = peaks.get(share, high + slope * (share - m))  # 160,000: one of 8 processes with ImageNet
    plain = 1_280_000 * 4096 * 4
    note = ", ".join(f"{n:,} images {p / 1e9:.2f} GB" for n, p in peaks.items())
    yield {"name": "memory: clustering, D=4096, N=1.28M / 8", "ours": f"{peak / 1e9:.2f} GB",
           "reference": f"{plain / 1e9:.0f} GB", "ratio": peak / plain, "of": "size", "aim": "<= 2 GB",
           "met": peak <= 2e9, "bytes": peaks, "note": f"{note}; {slope:.0f} bytes an image"}  # fmt: skip


ROWS = [bench_kmeans, bench_pca, bench_nearest, bench_augmentation, bench_files, bench_training]
ROWS += [
    bench_extraction,
    bench_aggregation,
    bench_aggregation_training,
    bench_labels,
    bench_online,
    bench_pairs,
    bench_lsdc_training,
    bench_probes,
    bench_processes,
    bench_memory,
]

# --------------------------------------------------------------------------- as the work grows
# Each case yields (size, seconds, bytes or None); a law is fitted through them.


def scale_kmeans(device, quick):
    """k-means of N rows of 256 numbers (DeepCluster's after PCA), K = 1000; seconds of one pass over the rows."""
    for n in (1_000, 2_000, 4_000) if quick else (10_000, 30_000, 100_000, 300_000):
        found = spawn("scale", n, device)
        yield n, found["seconds"], found["bytes"]


def scale_clusters(device, quick):
    """The same, N = 30,000, as K grows."""
    x, gen = blobs(2_000 if quick else 30_000, 256, device), common.generator("kmeans")
    common.rank_and_world()  # forms the group of one before the clock runs
    for k in (100, 300, 1_000) if quick else (100, 300, 1_000, 3_000, 10_000):
        yield k, seconds_of(lambda: common.kmeans(x, k, gen, PASSES - 1), device, 1) / PASSES, None
    dist.destroy_process_group()  # see main


def scale_background(device, quick):
    """Local Aggregation from embeddings to their gradient, B = 128, D = 128, H = 3, as the bank grows."""
    v = legacy.unit(blobs(128, 128, device)).requires_grad_()
    for n in (10_000, 20_000, 40_000) if quick else (10_000, 30_000, 100_000, 300_000, 1_000_000):
        bank = legacy.unit(torch.randn(n, 128, generator=legacy.generator("bank"))).to(device)
        clusterings = torch.randint(n // 50, (3, n), generator=legacy.generator("clusters")).int().to(device)
        index = torch.arange(128, device=device)

        def step():
            similarity, ids, _ = local_aggregation.background(v, bank, index, 4096)
            close = local_aggregation.close_neighbours(clusterings, index, ids)
            local_aggregation.aggregation_loss(similarity, close, 0.07).mean().backward()
            local_aggregation.update_bank(bank, index, v)

        yield n, seconds_of(step, device), None


PASSES = 6  # of k-means: five iterations, too few to converge here, and the last assignment
KS = 100, 300, 1_000, 3_000, 10_000, 30_000


def scale_head(device, quick):
    """DeepCluster's training step behind its features: head, loss, gradient, SGD; B = 256, D = 4096."""
    x = blobs(256, 4096, device).requires_grad_()
    for k in KS[:3] if quick else KS:
        head = deepcluster.make_head(4096, k, common.generator("head")).to(device)
        target, optimizer = torch.arange(256, device=device) % k, torch.optim.SGD(head.parameters(), 1e-4)

        def step():
            optimizer.zero_grad()
            F.cross_entropy(head(x), target).backward()
            optimizer.step()

        yield k, seconds_of(step, device), None


def scale_online(device, quick):
    """CoKe's training step behind its embeddings: clusters, duals, centres, labels, loss, gradient; B = 256, two views."""
    x = legacy.unit(torch.randn(2, 256, 128, generator=legacy.generator("x"))).to(device).requires_grad_()
    index, args = torch.arange(256, device=device), coke.options(["--recipe", "imagenet", "--data", "noise"])
    now = coke.Phase(learn=True, averaging=True, weight=0.5, done=0)
    for k in KS[:3] if quick else KS:
        memory = coke.new_memory([k], 128, 10_000, args.label_size, device, "bench")

        def step():
            labels, shares, _ = coke.cluster(memory, index, x.detach().mean(0), now, args)
            weight = coke.soft_targets(shares, args.label_temperature)
            where = memory["previous"], memory["exists"], labels, weight
            loss_x, loss_p = coke.coke_loss(x, x, *where, args.temperature, args.label_share)
            (loss_x + loss_p).mean().backward()

        yield k, seconds_of(step, device), None


def scale_pairs(device, quick):
    """LSD-C's training step behind its features: pairs, targets, loss, gradient; B = 256, D = 512, kNN."""
    z = blobs(256, 512, device)
    permutations, shares, _ = lsdc.draw_mixture("mixup", 256, 32, np.random.default_rng(0))
    permutations = permutations.to(device)
    for k in KS[:3] if quick else KS:
        logits = torch.randn(3, 256, k, generator=legacy.generator("logits")).to(device).requires_grad_()

        def step():
            clean, mixed, other = logits.softmax(-1)
            similar = lsdc.similar_pairs(z, "knn", 18, 0.9, 0.01, 8.0)
            loss = lsdc.pair_loss(mixed, clean, lsdc.mixed_targets(similar, permutations, shares))
            (loss + F.mse_loss(mixed, other)).backward()

        yield k, seconds_of(step, device), None


SCALE = [scale_kmeans, scale_clusters, scale_background, scale_head, scale_online, scale_pairs]


def seconds_of(work, device, rounds=5):
    """Median seconds of work(), after one call to warm up if there are several."""
    return race(work, lambda: None, device, rounds, warm_up=rounds > 1)[0]


def law(sizes, costs):
    """(a, b, p): cost = a + b size, fitted to relative errors, and the power p that the last two points follow."""
    sizes, costs = np.array(sizes, dtype=float), np.array(costs, dtype=float)
    b, a = np.polyfit(sizes, costs, 1, w=1 / costs)
    return float(a), float(b), float(np.log(costs[-1] / costs[-2]) / np.log(sizes[-1] / sizes[-2]))


def scale(case, device, quick):
    """One case as a dictionary, for the report, and as lines to print."""
    name, what = case.__name__.removeprefix("scale_"), case.__doc__.split("\n")[0]
    lines, points = [f"{name}: {what}"], []
    for size, seconds, memory in case(device, quick):
        points.append((size, seconds, memory))
        lines.append(f"{size:>14,}{seconds:>12.4g} s" + (f"{memory / 1e6:>12,.0f} MB" if memory else ""))
    sizes, seconds, memory = zip(*points, strict=True)
    a, b, p = law(sizes, seconds)
    unit = "an image" if name in ("kmeans", "background") else "a cluster"
    lines.append(
        f"    seconds = {a:.3g} + {b:.3g} x {unit.split()[1]}s; at the end they grow with the power {p:.2f}"
    )
    found = {"name": name, "what": what, "points": points, "seconds": {"constant": a, "each": b, "power": p}}
    if all(memory):
        found["bytes"] = dict(zip(("constant", "each", "power"), law(sizes, memory), strict=True))
        lines.append(
            f"    memory = {found['bytes']['constant'] / 1e6:.0f} MB + {found['bytes']['each']:.0f} bytes {unit}"
        )
    return found, lines


# --------------------------------------------------------------------------- in a process of its own


def spawn(work, n, device="cpu", processes=1):
    """What this file prints as `--worker work` in new processes (with one thread each for "processes")."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += [__file__, "--worker", work, "--images", str(n), "--device", str(device)]
    one = {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")} if work == "processes" else {}
    done = subprocess.run(command, env=os.environ | one, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def worker_processes(n, device, rounds=3):
    """Seconds of k-means on this process's shard of n rows, between barriers."""
    x, seconds = blobs(n, 256, device), []
    first, last = common.shard(n)
    x = x[first:last].clone()
    for turn in range(-1, rounds):
        dist.barrier()
        start = time.perf_counter()
        common.kmeans(x, 500, common.generator("kmeans"), 3 if turn < 0 else 10)
        dist.barrier()
        seconds += [time.perf_counter() - start] if turn >= 0 else []
    return {"seconds": seconds}


def worker_scale(n, device):
    """Seconds of k-means of n rows, and how much memory it took beside them."""
    x = blobs(n, 256, device)
    gen = common.generator("kmeans")
    common.kmeans(x[:2_000], 100, gen, 2)  # warms up
    before = peak(device, anew=True)
    seconds = seconds_of(lambda: common.kmeans(x, min(1_000, n // 4), gen, PASSES - 1), device, 1)
    return {"seconds": seconds / PASSES, "bytes": peak(device) - before}


def peak(device, anew=False):
    """Bytes of memory that this process (or its GPU) has used at most; anew: since now, so what it uses now."""
    if device.type == "cuda":
        if anew:
            torch.cuda.reset_peak_memory_stats(device)
        return torch.cuda.max_memory_allocated(device)
    try:  # not ru_maxrss: on Linux a new process starts with the peak of the one that made it
        if anew:
            Path("/proc/self/clear_refs").write_text("5")
        with open("/proc/self/status") as file:
            return 1024 * next(int(x.split()[1]) for x in file if x.startswith("VmHWM"))
    except OSError:  # macOS: bytes, never anew
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def worker_memory(n, device):
    """Peak memory of PCA and k-means with features of 4096 numbers, made from 16 pixels to be quick."""
    loader = common.Loader(synthetic(n, 1, 4, device, common.Images), 256, 4, 1.0, device, 0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(16, 4096), nn.ReLU()).to(device)
    body.dim = 4096
    args = deepcluster.options(["--data", "noise", "--pca", "256", "--k", "100"])
    deepcluster.cluster(body, loader, args, common.generator("bench"), 8_192)
    return {"bytes": peak(device)}


# --------------------------------------------------------------------------- main


def machine(device):
    """What ran: commit, hardware, threads, versions, and how busy the machine was."""
    return {
        "commit": legacy.commit(),
        "hardware": legacy.hardware(device),
        "threads": torch.get_num_threads(),
        "load": os.getloadavg()[0],
        "versions": {"python": platform.python_version()}
        | {m.__name__: m.__version__ for m in (torch, torchvision, faiss, np)},
    }


def main():
    names = [f.__name__.removeprefix("bench_") for f in ROWS]
    p = argparse.ArgumentParser(
        description="Speed next to a plain reference", formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    # fmt: off
    p.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME", help=f"rows to run, of: {', '.join(names)}")
    p.add_argument("--quick", action="store_true", help="small sizes: shows that everything runs, not how fast")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    p.add_argument("--out", default="bench.json", help="JSON file with the machine and all rows, written anew")
    p.add_argument("--scale", action="store_true", help="instead of the rows: what grows with images and clusters, and how")
    p.add_argument("--folder", type=Path, help="for the row `files`: classes of JPEGs, as ImageFolder wants them; else some are made up")
    p.add_argument("--worker", choices=["processes", "memory", "scale"], help="internal: what a spawned process does")
    p.add_argument("--images", type=int, default=1000, help="internal: with --worker, number of images")
    # fmt: on
    args = p.parse_args()
    device = legacy.setup(args.device)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # there is no step to finish first
    if args.worker:
        work = {"processes": worker_processes, "memory": worker_memory, "scale": worker_scale}[args.worker]
        found = work(args.images, device)
        if legacy.main_process():
            print(json.dumps(found), flush=True)
        legacy.leave()

    report = {"command": " ".join(["bench.py", *sys.argv[1:]]), "machine": machine(device), "rows": []}

    def write():
        try:
            with open(args.out, "w") as file:
                json.dump(report, file, indent=1)
        except OSError as error:
            legacy.refuse(f"--out {args.out}: cannot write there ({error.strerror})")

    write()
    m = report["machine"]
    print(f"{m['hardware']}, {m['threads']} threads, commit {m['commit']}")
    print(", ".join(f"{name} {version}" for name, version in m["versions"].items()))
    if m["load"] > 0.5:
        print(f"WARNING: load average {m['load']:.1f}: something else is running, timings mean little")
    if args.scale:
        for case in SCALE:
            found, lines = scale(case, device, args.quick)
            print("\n" + "\n".join(lines), flush=True)
            report["rows"].append(found)
            write()
        legacy.leave()
    line = "{:46}{:>15}{:>15}{:>8} {:6}{:>8}  {:4}".format
    print("\n" + line("name", "ours", "reference", "ratio", "of", "aim", "met"))
    for bench in ROWS:
        if bench.__name__.removeprefix("bench_") not in args.only:
            continue
        more = {"folder": args.folder} if bench is bench_files else {}
        for r in bench(device, args.quick, **more):
            if args.quick:  # the aims are for full sizes
                r |= {"aim": "", "met": None}
            met = {True: "yes", False: "NO", None: ""}[r["met"]]
            ratio = f"{r['ratio']:.2f}"
            text = line(r["name"], r["ours"], r["reference"], ratio, r["of"], r["aim"], met)
            print(text.rstrip() + (f"\n    {r['note']}" if r["note"] else ""), flush=True)
            report["rows"].append(r)
            write()
        if dist.is_initialized():  # common.py's group of one, for which legacy.py would wrap its networks
            dist.destroy_process_group()
    legacy.leave()


if __name__ == "__main__":
    main()
