"""Instance retrieval: finds the images that show the building of a query, by the maps of a frozen network.

DeepCluster (Caron et al., ECCV 2018), 5.3 and table 5, as Tolias, Sicre and Jegou, Particular object retrieval with
integral max-pooling, ICLR 2016. Data sets: Oxford 5k and Paris 6k (Philbin et al., CVPR 2007 and 2008).

    each image:  map = convolutions(image, longer side 1024)        (D, h, w)  any shape
                 v_r = unit(max of the map over region r)           (R, D)     squares of L sizes
                 v_r = unit((v_r - mean) axes)                      (R, D)     whitening, learnt on the other set
                 descriptor = unit(sum over r of v_r)               (D,)
    each query:  the same of its rectangle; images by cosine, the nearest first; average precision of that list

Symbols: D channels of the last map, h, w its sides, L --levels, R regions. This descriptor is called R-MAC.

    python -m extras.retrieval runs/deepcluster-imagenet --data data/oxford5k --whiten data/paris6k
    python -m extras.retrieval random-vgg16 --data data/oxford5k --whiten data/paris6k        the table's first row

A data set is a folder with images and its own ground truth anywhere in it: NAME_query.txt, NAME_good.txt,
NAME_ok.txt and NAME_junk.txt for each query. Files that cannot be read are named and ranked nowhere. One process, on
a GPU where there is one. The result is printed and written beside the run: retrieval-DATA.json, -DATA-whitened.json.

What to expect: the sets were not at hand, table 5 is not reproduced. VGG-16 takes 5 s for 1024 x 768 pixels on one
core, so Oxford seven hours: use a GPU. On the tests' colored squares, a network that sees colors has an mAP of 1.0
with whitening and 0.97 without, a random ranking 0.25.

Departs from the papers and their code, on purpose:
 1. Regions are as many as the overlap asks for (the code: at most 7), and images all of the set (the code leaves out 20
    of Paris).
 2. The map is that before the last pooling layer, as in DeepCluster's code.
 3. A query is cut out, then resized (the code: the other way round). Images lie upright as their files say.
 4. Whitening floors eigenvalues at 1e-6 of the largest (the code: 1e-5) and keeps all D axes (the code: 512).
 5. Images that the ground truth names but the folder lacks are never found, as in the benchmark's program.
"""

import argparse
import json
import os
import time
from functools import partial
from pathlib import Path
from statistics import mean

from common import (  # isort: skip
    ARCHS, Backbone, Images, Loader, Meter, error, fill_batch_norm, generator, list_images, load_backbone, number,
    open_image, print_once, read_backbone, setup, to_device, what_runs,
)  # fmt: skip
from deepcluster import pca

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as tv

OVERLAP = 0.4  # of neighboring regions for l = 1, as near as a whole number of regions allows [Tolias et al.]

# %% the algorithm


def regions(width, height, levels):
    """[(left, top, side)] of squares of a map: for l = 1..levels, l x (l + m - 1) of side 2 min(W, H) / (l + 1).

    They reach from border to border. m: how many squares of side min(W, H) there are, 1 of a square map, else 2 or more.
    """
    short, long = sorted((width, height))
    m, found = 1, []
    if long > short:  # m regions, (long - short) / (m - 1) apart
        enough = range(2, 3 + 2 * long // short)
        m = min(enough, key=lambda m: abs(1 - (long - short) / (m - 1) / short - OVERLAP))
    for level in range(1, levels + 1):
        side = max(1, 2 * short // (level + 1))
        columns, rows = (level + (m - 1) * (length > short) for length in (width, height))
        lefts = [i * (width - side) // max(1, columns - 1) for i in range(columns)]
        tops = [i * (height - side) // max(1, rows - 1) for i in range(rows)]
        found += [(left, top, side) for top in tops for left in lefts]
    return found


def region_vectors(map, levels):
    """Maximum of the map (D, h, w) over each region, of unit length: (R, D)."""
    places = regions(map.shape[2], map.shape[1], levels)
    return F.normalize(
        torch.stack([map[:, y : y + side, x : x + side].amax((1, 2)) for x, y, side in places])
    )


def rmac(map, levels, mean=None, axes=None):
    """R-MAC descriptor (P,), a unit vector, of a map (D, h, w); mean (D,), axes (D, P): see pca, or None."""
    vectors = region_vectors(map, levels)
    if axes is not None:
        vectors = F.normalize((vectors - mean) @ axes)
    return F.normalize(vectors.sum(0), dim=0)


def average_precision(ranked, positive, junk):
    """Area under precision over recall, by trapezoids, of names ranked best first; `junk` is passed over."""
    area, found, before, seen = 0.0, 0, 1.0, 0
    for name in ranked:
        if name in junk:
            continue
        seen, hit = seen + 1, name in positive
        found += hit
        area += hit * (before + found / seen) / 2  # recall grows at hits alone
        before = found / seen
    return area / len(positive)


# %% images and main


def find_images(folder):
    """Paths of all images below the folder; ends with exit code 2 if there are none."""
    paths = list(list_images(folder, os.path.realpath(folder), set(), [])) if os.path.isdir(folder) else []
    if not paths:
        error(f"no images below {folder}")
    return paths


def read_queries(folder):
    """{query: (name of its image, (left, top, right, bottom), positive names, junk names)}."""
    queries = {}
    for path in sorted(Path(folder).rglob("*_query.txt")):
        query = path.name.removesuffix("_query.txt")
        image, *box = path.read_text().split()
        parts = [path.with_name(f"{query}_{kind}.txt").read_text() for kind in ("good", "ok", "junk")]
        good, ok, junk = (set(part.split()) for part in parts)
        queries[query] = image.removeprefix("oxc1_"), tuple(map(float, box)), good | ok, junk
    if not queries:
        error(f"no NAME_query.txt, the ground truth, below {folder}")
    return queries


def read_image(item, size, channels):
    """(path, rectangle or None) -> uint8 (C, H, W), the whole image's longer side being `size`; or None."""
    path, box = item
    try:
        image = open_image(path)
    except Exception:
        return None
    (width, height), scale = image.size, size / max(image.size)
    if box:
        left, top, right, bottom = map(round, box)
        image = image.crop((max(0, left), max(0, top), min(width, right), min(height, bottom)))
    shape = [max(1, round(scale * side)) for side in reversed(image.size)]
    return tv.pil_to_tensor(tv.resize(image.convert("RGB" if channels == 3 else "L"), shape))


def convolutions(backbone):
    """Images (B, C, H, W) of any shape -> maps (B, D, h, w) of the last convolution or block, after ReLU."""
    net = backbone.net
    layers = list(net.features) if hasattr(net, "features") else list(net.children())[:-2]  # not avgpool, fc
    return nn.Sequential(backbone.sobel, *layers[: -1 if isinstance(layers[-1], nn.MaxPool2d) else None])


@torch.inference_mode()
def describe(net, meta, items, then, title, args, device):
    """(positions that could be read, [then(map (D, h, w))] of each) of items, see read_image."""
    mean, std = (torch.tensor(meta[name], device=device).view(-1, 1, 1) for name in ("mean", "std"))
    read = partial(read_image, size=args.size, channels=len(mean))
    positions, found, meter = [], [], Meter(title, len(items))
    for i, pixels in enumerate(DataLoader(items, None, num_workers=args.workers, collate_fn=read)):
        meter.add(1)
        if pixels is None:
            print_once(f"WARNING: cannot read {items[i][0]!r}, which is left out")
            continue
        positions.append(i)
        found.append(then(net((pixels[None].to(device) / 255 - mean) / std)[0]))
    meter.bar.close()
    return positions, found


def random_network(arch, data, workers, device):
    """(Backbone, meta) from which deepcluster.py starts, with the batch-norm statistics of 256 of the images."""
    data = Images(data, None, find_images(data), None, [])
    loader = Loader(data, 32, 224, 0.875, device, workers, training=False)
    torch.manual_seed(0)
    backbone = Backbone(arch, 3, 224, sobel=True).to(device)
    fill_batch_norm(backbone, loader, torch.arange(min(256, len(data))))
    return backbone.eval(), {"mean": data.mean, "std": data.std}


def main(argv=None):
    more = {"description": "Instance retrieval", "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = argparse.ArgumentParser(prog="python -m extras.retrieval", **more)
    # fmt: off
    p.add_argument("run", metavar="RUN", help="run folder, backbone.pt or others' checkpoint; imagenet-vgg16: torchvision's; random-ARCH: a random network behind a Sobel filter")
    p.add_argument("--data", required=True, help="folder of images and ground truth: Oxford 5k, Paris 6k")
    p.add_argument("--whiten", metavar="FOLDER", help="images on whose regions PCA-whitening is learnt: the other set; None: none")
    p.add_argument("--size", type=number(int, 1), default=1024, help="pixels of an image's longer side [table 5]")
    p.add_argument("--levels", type=number(int, 1), default=3, help="L: sizes of regions [table 5]")
    p.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()), help="processes that decode files")
    # fmt: on
    args, begin, device = p.parse_args(argv), time.time(), setup()
    torch.backends.cudnn.benchmark = False  # images have many shapes, and it would try each one
    random = args.run.startswith("random-")
    arch = args.run.removeprefix("random-") if random else read_backbone(args.run)["meta"]["arch"]
    if arch not in ARCHS:
        error(f"{args.run}: {arch} is none of the networks for images: {', '.join(ARCHS)}")
    if random:
        backbone, meta = random_network(arch, args.data, args.workers, device)
    else:
        backbone, meta = load_backbone(args.run)
    net, queries = to_device(convolutions(backbone), device), read_queries(args.data)
    paths = {Path(path).stem: path for path in find_images(args.data)}
    if missing := {image for image, *_ in queries.values()} - paths.keys():
        error(f"--data {args.data} lacks {len(missing)} images of its queries: {min(missing)}, ..")
    if missing := set().union(*(positive for *_, positive, _ in queries.values())) - paths.keys():
        print_once(f"WARNING: {len(missing)} images of the ground truth are missing and count as never found")

    run, axes = partial(describe, net, meta, args=args, device=device), (None, None)
    if args.whiten:
        items = [(path, None) for path in find_images(args.whiten)]
        vectors = torch.cat(run(items, partial(region_vectors, levels=args.levels), "whitening")[1])
        axes = pca(vectors, vectors.shape[1], generator("whitening"))
    then = partial(rmac, levels=args.levels, mean=axes[0], axes=axes[1])
    readable, images = run([(path, None) for path in paths.values()], then, "images")
    names = [list(paths)[i] for i in readable]
    asked, rows = run([(paths[image], box) for image, box, *_ in queries.values()], then, "queries")
    if len(asked) < len(queries):
        error(f"--data {args.data}: images of queries cannot be read")
    order = (torch.stack(rows) @ torch.stack(images).T).argsort(dim=1, descending=True, stable=True).tolist()
    chance = torch.randperm(len(names), generator=generator("chance")).tolist()

    scores, chances = {}, []
    for (query, (_, _, positive, junk)), ranking in zip(queries.items(), order, strict=True):
        scores[query] = average_precision([names[i] for i in ranking], positive, junk)
        chances.append(average_precision([names[i] for i in chance], positive, junk))
    result = {"map": mean(scores.values()), "map_of_random_ranking": mean(chances)}
    record = {**what_runs(args, names), **result, "average_precision": scores, "seconds": time.time() - begin}
    folder = Path(args.run) if os.path.isdir(args.run) else Path(args.run).parent
    name = f"retrieval-{Path(args.data).resolve().name}{'-whitened' * bool(args.whiten)}.json"
    path = folder / (f"{args.run}-{name}" if random else name)
    path.write_text(json.dumps(record, indent=1) + "\n")
    print_once(f"REPORT mAP {result['map']:.4f}, random ranking {mean(chances):.4f}; written to {path}")


if __name__ == "__main__":
    main()
