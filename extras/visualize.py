"""Pictures of a finished run of any of the four scripts, made in its folder.

    python -m extras.visualize runs/deepcluster-digits --html       half a minute on 2 cores

map.png        t-SNE of up to 2,000 images' embeddings, colored by cluster and, where there are labels, by class
curves.png     loss beside that of a uniform prediction, and scores, over epochs
confusion.png  classes by clusters, where there are labels
clusters.html  with --html: the most central images of each cluster, one file that any browser opens

Start it in the folder where the run was started, or say with --data where its images are now.
"""

import argparse
import base64
import csv
import importlib
import json
import os
from html import escape
from io import BytesIO
from pathlib import Path

from common import (  # isort: skip
    Loader, center_crop, draw, error, extract, generator, label_scores, load_backbone, load_data, load_file, number,
    open_image, print_once, read_backbone, setup,
)  # fmt: skip
import lsdc

import numpy as np
import torch
import torch.nn.functional as F
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator
from torchvision.transforms.v2.functional import to_pil_image

LOSSES = ("loss", "uniform")
SCORES = ("nmi_previous", "nmi_labels", "acc_labels", "knn_1", "changed", "rotation_accuracy")
POINTS, ON_MAP = 2000, 40  # images on the map; those of them that are shown there
CLUSTERS, EACH, SIDE = 100, 24, 80  # in the page (and confusion.png); images of each; their side in pixels
STYLE = """body { font: 15px sans-serif; margin: 2em } h1 { font-size: 18px; overflow-wrap: anywhere }
h2 { font-size: 16px; margin: 1.5em 0 .3em } small { font-weight: normal; margin-left: 1em }
div { display: flex; flex-wrap: wrap; gap: 3px; max-width: 993px } pre { white-space: pre-wrap }
p img { max-width: 100% }"""


def read_log(run):
    """(first record, those of epochs, last one) of a finished run; else the end, with exit code 2."""
    try:
        records = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    except (OSError, ValueError) as problem:
        error(f"{run} is no run folder, or its log is damaged ({problem})")
    if not records or "args" not in records[0] or "result" not in records[-1]:
        error(f"{run} is not finished; the command that began it goes on")
    for name in ("backbone.pt", "clustering.pt", "assignments.csv"):
        if not (run / name).exists():
            error(f"{run} has no {name}")
    return records[0], [record for record in records if "loss" in record], records[-1]


def read_images(run, args, meta):
    """(Images that the run clustered, their names in assignments.csv, clusters (N,)); -1: no label, unreadable."""
    load = lsdc.load if meta["method"] == "lsdc" else load_data
    data = load(args.data, args.root, (meta["mean"], meta["std"]) if "mean" in meta else None)[
        0
    ]  # lsdc: tests, too
    data.labels = torch.full((len(data),), -1) if data.labels is None else data.labels
    with open(run / "assignments.csv", newline="", encoding="utf-8", errors="surrogateescape") as file:
        names, clusters = zip(*list(csv.reader(file))[1:], strict=True)
    ours = map(str, data.paths or range(len(data)))
    if list(map(os.path.basename, ours)) != list(map(os.path.basename, names)):
        error(f"--data {args.data} has other images than {run}/assignments.csv")
    return data, names, torch.tensor([-1 if c == "unreadable" else int(c) for c in clusters])


def load_network(run, meta, device):
    """(network, embed, decide), see assign_folder; decide is None where nothing assigns new images: PIC, vectors."""
    if meta["arch"] == "mlp":
        backbone = lsdc.make_mlp(meta["channels"])
        backbone.net.load_state_dict(read_backbone(run)["state_dict"])
        return backbone.to(device), F.relu, None
    if load_file(run / "clustering.pt").get("centroids", ()) is None:
        return load_backbone(run)[0].to(device), F.normalize, None
    return importlib.import_module(meta["method"].split("-")[0]).load_model(run, device)


def thumbnail(data, i, center):
    """The center crop of an image as the network sees it, SIDE x SIDE, for Pillow."""
    if data.pixels is None:
        return center_crop(open_image(data.paths[i], 2 * SIDE), SIDE, center)
    pixels = data.pixels[i][: 3 if data.pixels.shape[1] > 2 else 1]  # of any number of channels
    return to_pil_image(center_crop(pixels, SIDE, center))


def tsne(z):
    """Embeddings (n, P) -> places (n, 2) in 0..1."""
    from sklearn.manifold import TSNE

    if torch.equal(z, z[:1].expand_as(z)):
        raise ValueError("all embeddings are equal")
    near = min(30, max(1, (len(z) - 1) / 3))
    places = TSNE(perplexity=near, init="pca", random_state=0).fit_transform(z.numpy())
    return (places - places.min(0)) / np.ptp(places, axis=0).clip(1e-9)


def spread_out(places, count):
    """Up to `count` of the places (n, 2): each the farthest one from those before it."""
    chosen, distance = [0], np.full(len(places), np.inf)
    while len(chosen) < min(count, len(places)):
        distance = np.minimum(distance, np.square(places - places[chosen[-1]]).sum(1))
        chosen.append(int(distance.argmax()))
    return chosen


def draw_map(path, places, assign, labels, classes, images):
    """Places (n, 2) colored by assign (n,), with images {point: image}; beside it by labels (n,), if any is known."""
    names = [name.replace("$", r"\$") if name.isascii() else i for i, name in enumerate(classes)]
    panels = [("clusters", assign, range(int(assign.max()) + 1)), ("classes", labels, names)]
    panels = panels[: 1 if labels.max() < 0 else 2]
    figure = Figure((9.5 * len(panels), 9), layout="tight")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (title, groups, names) in zip(axes, panels, strict=True):
        k, known, used = len(names), groups >= 0, groups[groups >= 0].unique().tolist()
        kind = "tab10" if k <= 10 else "tab20" if k <= 20 else "turbo"  # the hues of 1 and 2 are far apart:
        colors = colormaps[kind](np.arange(k) if k <= 20 else np.arange(k) * 0.618034 % 1)
        axis.scatter(*places[known].T, s=12, c=colors[groups[known]], linewidths=0)
        axis.set(title=f"{len(used)} {title}, t-SNE of {len(places):,} embeddings", xticks=[], yticks=[])
        if len(used) <= 20:  # matplotlib leaves labels out that begin with _
            patches = [Patch(color=colors[c], label=f" {names[c]}") for c in used]
            axis.legend(handles=patches, loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
        for i, image in images.items() if groups is assign else ():
            picture = OffsetImage(np.asarray(image.convert("RGB")), zoom=36 / SIDE)
            frame, (x, y) = {"edgecolor": colors[groups[i]], "linewidth": 2}, places[i]
            axis.add_artist(AnnotationBbox(picture, (x, y), pad=0, bboxprops=frame))
            axis.text(x, y - 0.045, int(groups[i]), size=7, ha="center", va="center")
    figure.savefig(path)


def curves(epochs):
    """Of the records of epochs: ({name of a loss or score: (epochs, values) (2, m)}, [(first epoch, phase)])."""
    rows = [{"uniform": r.get("ln_k"), **r} for r in epochs]  # ln_k: in old logs of DeepCluster
    lines, phases = {}, [None, *[row.get("phase") for row in rows]]
    for name in (*LOSSES, *SCORES):
        points = [(i, row[name]) for i, row in enumerate(rows, 1) if row.get(name) is not None]
        lines |= {name: np.array(points).T} if points else {}
    return lines, [(i, phases[i]) for i in range(1, len(phases)) if phases[i] != phases[i - 1]]


def draw_curves(path, lines, phases):
    """Losses, and beside them scores, over epochs; a phase begins at a dotted line."""
    parts = [part for part in (LOSSES, SCORES) if lines.keys() & set(part)]
    figure = Figure((6.5 * len(parts), 4.5), layout="tight")
    for axis, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        drawn = [name for name in part if name in lines]
        for name in drawn:
            gray = {"color": "gray", "ls": "--", "drawstyle": "steps-mid", "label": "of a uniform prediction"}
            axis.plot(*lines[name], **(gray if name == "uniform" else {"marker": ".", "label": name}))
        for i, (first, phase) in enumerate(phases if len(phases) > 1 else ()):
            axis.axvline(first - 0.5, color="black", lw=0.7, ls=":")
            place = first - 0.5, 1.01 + i % 2 * 0.035  # a phase may be short
            axis.annotate(phase, place, xycoords=("data", "axes fraction"), size=8)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        top = 1.0 if part is SCORES else max(lines[name][1].max() for name in drawn)
        axis.set(xlabel="epoch", ylim=(0, 1.05 * top))
        axis.legend()
    figure.savefig(path)


def most_central(assign, embed, decide):
    """Yield (cluster, its size, up to EACH of its images, most central first) of the largest clusters.

    embed: positions (n,) -> (n, P). Of large clusters, as many images drawn at random as make 10,000 in all.
    """
    counts = torch.bincount(assign[assign >= 0])
    order = counts.argsort(descending=True, stable=True)[: min(CLUSTERS, int((counts > 0).sum()))].tolist()
    found, most = [], max(EACH, 10_000 // len(order))
    for c in order:
        members = (assign == c).nonzero()[:, 0]
        found.append(members[torch.randperm(len(members), generator=generator(c))[:most]].sort().values)
    parts = embed(torch.cat(found)).split([len(members) for members in found])
    for c, members, z in zip(order, found, parts, strict=True):
        distance = decide(z)[0][:, 0] if decide else (z - z.mean(0)).square().sum(1)
        yield c, int(counts[c]), members[distance.cpu().argsort(stable=True)][:EACH].tolist()


def main_class(data, members):
    """["83% NAME"], the most frequent class of those images `members` that have a label; [] if none has."""
    known = data.labels[members][data.labels[members] >= 0]
    size, best = torch.bincount(known, minlength=1).max(0)
    return [f"{size / len(known):.0%} {data.classes[best]}"] if len(known) else []


def embedded(kind, content, words):
    content, words = base64.b64encode(content).decode(), escape(words)
    return f'<img src="data:image/{kind};base64,{content}" alt="{words}" title="{words}">'


def write_html(path, first, last, data, names, assign, clusters, center):
    """A page without scripts or other files; clusters: see most_central."""
    known, k = assign >= 0, len(assign[assign >= 0].unique())
    words = [f"{known.sum():,} images in {k} clusters"]
    words += [f"{(~known).sum():,} unreadable files"] * (not known.all())
    known &= data.labels >= 0
    if known.any():
        scores = label_scores(data.labels[known], assign[known])
        words += [f"{name[:3].upper()} {score:.3f}" for name, score in scores.items()]
    command, logged = escape(first["command"]), escape(json.dumps(last, indent=1))
    page = ['<!DOCTYPE html><html lang="en"><meta charset="utf-8">']
    page += [f"<title>{command}</title><style>{STYLE}</style><h1>{command}</h1><p>{', '.join(words)}</p>"]
    page += [f"<details><summary>the result as logged</summary><pre>{logged}</pre></details>"]
    for c, size, images in clusters:
        words = escape(", ".join([f"{size:,} images", *main_class(data, assign == c)]))
        page += [f"<section><h2>cluster {c} <small>{words}</small></h2><div>"]
        for i in images:
            thumbnail(data, i, center).save(content := BytesIO(), "JPEG", quality=85)
            page += [embedded("jpeg", content.getvalue(), names[i])]
        page += ["</div></section>"]
    page += [f"<p>{k - CLUSTERS} smaller clusters are not shown</p>"] * (k > CLUSTERS)
    for picture in map(path.with_name, ("map.png", "curves.png", "confusion.png")):
        page += [f"<p>{embedded('png', picture.read_bytes(), picture.name)}</p>"] if picture.exists() else []
    path.write_text("\n".join([*page, "</html>\n"]), encoding="utf-8", errors="replace")


def main(argv=None):
    p = argparse.ArgumentParser(prog="python -m extras.visualize", description="Pictures of a finished run")
    p.add_argument("run", metavar="RUN", type=Path, help="its folder, where the pictures go")
    p.add_argument("--data", help="where its images are; None: where they were when it ran")
    p.add_argument("--html", action="store_true", help="clusters.html, too")
    p.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()), help="that decode files")
    asked = p.parse_args(argv)
    run, (first, epochs, last) = asked.run, read_log(asked.run)
    draw(lambda path: draw_curves(path, *curves(epochs)), run / "curves.png")
    meta, device = read_backbone(run)["meta"], setup()
    args = argparse.Namespace(**{**first["args"], "data": asked.data or first["args"]["data"]})
    data, names, assign = read_images(run, args, meta)
    labels, k, readable = data.labels, int(assign.max()) + 1, (assign >= 0).nonzero()[:, 0]
    if labels.max() >= 0 and max(k, len(data.classes)) <= CLUSTERS:
        table, class_of = lsdc.confusion(data, assign, k, (assign >= 0) & (labels >= 0))
        draw(lsdc.draw_confusion, run / "confusion.png", table, class_of, data.classes)

    network, embed, decide = load_network(run, meta, device)
    center, vectors = meta["center_fraction"], meta["arch"] == "mlp"
    loader = Loader(data, 256, meta.get("image_size", 1), center, device, asked.workers, training=False)

    def make_map(path):
        some = readable[torch.randperm(len(readable), generator=generator("map"))[:POINTS]].sort().values
        places = tsne(extract(network, loader, some, embed).cpu())
        images = {i: thumbnail(data, some[i], center) for i in spread_out(places, ON_MAP) if not vectors}
        draw_map(path, places, assign[some], labels[some], data.classes, images)

    draw(make_map, run / "map.png")
    if asked.html and vectors:
        error(f"{run} clusters vectors, not images: no clusters.html")
    if asked.html:
        clusters = most_central(assign, lambda index: extract(network, loader, index, embed), decide)
        draw(write_html, run / "clusters.html", first, last, data, names, assign, clusters, center)
    print_once(f"pictures are in {run}")


if __name__ == "__main__":
    main()
