"""Initial Alignment: what clusters of a random network tell of the labels (Mustapha et al. 2022, 4.1.1 and 4.3).

    IA(theta, K) = NMI(labels, K clusters of the features of the random network theta)

    python -m extras.alignment --ks 5 10 20 50 100 200              digits, 20 seconds on one core
    python -m extras.alignment --data fashionmnist --ks 5           some minutes
    python -m extras.alignment --data svhn --ks 10 50 100 500 --seeds 100    figure B.1

The paper chooses K by the median over seeds: where it is higher, the trained network is better, too. All other flags are
deepcluster.py's. In --out (runs/alignment-DATA): alignment.jsonl, first the command, then a line for each K and seed;
and alignment.png, for each K a histogram over seeds with the median in red, and the medians over K, with quartiles and
extremes. What to expect: digits, ten seeds, medians 0.41, 0.62, 0.64, 0.64, 0.63, 0.61 for the six K above.
"""

import argparse
import json
from pathlib import Path

from common import (  # isort: skip
    Loader, draw, error, generator, is_main, label_scores, load_data, number, print_once, setup, to_device, what_runs,
)  # fmt: skip
import deepcluster

import numpy as np
import torch
from matplotlib.figure import Figure


def alignment(args, data, loader, seed):
    """NMI of the labels and args.k clusters of the network from which deepcluster.py starts with this seed."""
    torch.manual_seed(seed)
    encoder = to_device(deepcluster.make_encoder(args, len(data.mean))[1], loader.device)
    assign = deepcluster.cluster(encoder, loader, args, generator(seed, 0))[0]
    return label_scores(data.labels, assign, data.unreadable)["nmi_labels"]


def draw_alignment(path, found):
    """found {K: its values}: histograms over the same range, one below the other; beside them medians over K, between
    quartiles (dark) and between the extremes (light)."""
    figure = Figure((11, max(4.5, 1.3 * len(found))), layout="constrained")
    left, right = figure.subfigures(1, 2)
    edges = np.histogram_bin_edges(np.concatenate(list(found.values())), 30)
    panels = left.subplots(len(found), sharex=True, squeeze=False)[:, 0]
    for axis, (k, values) in zip(panels, found.items(), strict=True):
        axis.hist(values, edges)
        axis.axvline(np.median(values), color="red")
        axis.set(ylabel=f"K = {k}", yticks=[])
    panels[-1].set(xlabel="initial alignment, seeds")
    axis, ks = right.subplots(), list(found)
    shares = [np.percentile(values, (0, 25, 50, 75, 100)) for values in found.values()]
    least, low, middle, high, most = np.transpose(shares)
    axis.fill_between(ks, least, most, color="C0", alpha=0.2, linewidth=0)
    axis.fill_between(ks, low, high, color="C0", alpha=0.4, linewidth=0)
    axis.plot(ks, middle, "r.-")
    axis.set(xlabel="K", xscale="log", ylabel="initial alignment, median", ylim=(0, None))
    figure.savefig(path)


def main(argv=None):
    p = argparse.ArgumentParser("python -m extras.alignment", allow_abbrev=False)  # --seed is not --seeds
    p.add_argument("--ks", type=number(int, 1), nargs="+", help="numbers of clusters; None: --k")
    p.add_argument("--seeds", type=number(int, 1), default=10, help="how many for each K, from --seed on")
    asked, rest = p.parse_known_args(argv)
    args = deepcluster.options(rest)
    device, out = setup(args.device), Path(args.out.replace("runs/deepcluster-", "runs/alignment-"))
    data, _ = load_data(args.data, args.root, args.normalize)
    if data.labels is None:
        error(f"initial alignment compares with labels, and {data} have none")
    loader = Loader(data, args.batch_size, args.image_size, args.center_fraction, device, args.workers)
    out.mkdir(parents=True, exist_ok=True)
    lines, found = [what_runs(args, data) | {"args": {**vars(args), **vars(asked)}}], {}
    for k in sorted(asked.ks or [args.k]):
        args.k, values = k, found.setdefault(k, [])
        for seed in range(args.seed, args.seed + asked.seeds):
            values.append(alignment(args, data, loader, seed))
            lines.append({"k": k, "seed": seed, "initial_alignment": values[-1]})
        median, low, high = (f"{f(values):.4f}" for f in (np.median, min, max))
        print_once(f"K = {k}: median {median}, min {low}, max {high}")
        if is_main():
            (out / "alignment.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
            draw(draw_alignment, out / "alignment.png", found)
    print_once(f"drawn in {out}/alignment.png")


if __name__ == "__main__":
    main()
