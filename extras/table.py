"""Mean and standard deviation over the seeds of finished runs, their baselines beside them, as one table.

    python -m extras.table runs/coke-seed* runs/lsdc-seed*           Markdown
    python -m extras.table runs/* --latex > baselines.tex            a tabular for \\usepackage{booktabs}

A RUN is a run folder, what eval_linear.py wrote there included; or a log NAME.jsonl, NAME-eval.json beside it included;
or what eval_linear.py wrote alone.

rows     runs whose arguments differ in the seed and the place alone. Flags tell rows of one name apart. A random network
         is that of the method in brackets, pixels and chance are those of all. Equal scores of a seed count once.
columns  in %: ACC, NMI and ARI of K clusters and labels, of test images where there are any; kNN, and probes on stages
         (REPORT of eval_linear.py), of test images
numbers  mean ± standard deviation of the sample (n - 1); (n): of n runs, not of all of the row
"""

import argparse
import json
import re
import sys
from collections import namedtuple
from itertools import groupby
from pathlib import Path
from statistics import mean, stdev

from common import MAY_CHANGE, SETS, error

METHODS = {"deepcluster": "DeepCluster", "local_aggregation": "Local Aggregation"}
METHODS |= {"coke": "CoKe", "lsdc": "LSD-C"}
SCORES = {"ACC": "acc_labels", "NMI": "nmi_labels", "ARI": "ari_labels"}
FOLLOW = {"seed", "start", "normalize", "meta"}  # the seed, and arguments that follow from --init
NETWORK = ("arch", "image_size", "center_fraction", "sobel", "dim")
NETWORK += ("pca", "clustering", "resnet_head", "train_on")
SHARED = {"chance": (), "pixels": ("image_size", "center_fraction", "init", "train_on")}
SHARED["random network"] = NETWORK
# apart: arguments (key, value) that make it another row
Row = namedtuple("Row", "data images k name network apart")


def read_run(path):
    """(records of a log, evaluations beside it); of an evaluation ([itself], [])."""
    log = path / "log.jsonl" if path.is_dir() else path
    beside = path.glob("eval_linear-*.json") if path.is_dir() else [path.with_name(f"{path.stem}-eval.json")]
    text, evals = log.read_text(), [json.loads(file.read_text()) for file in sorted(beside) if file.exists()]
    return [json.loads(line) for line in (text.splitlines() if log.suffix == ".jsonl" else [text])], evals


def spread(numbers):
    """(mean, standard deviation of the sample); of one number (itself, None)."""
    return mean(numbers), stdev(numbers) if len(numbers) > 1 else None


def data_of(args):
    name = args["data"]
    return name if name in SETS else f"folder {Path(name.rstrip('/').removesuffix('/train')).name}"


def method_of(first):
    """(method of a run, or what was evaluated; its name, where a flag makes it another method)."""
    args, script = first["args"], Path(first["command"].split()[0]).stem
    if script in METHODS:
        return METHODS[script], "instance recognition" if args.get("loss") == "ir" else METHODS[script]
    network = "supervised" if args.get("finetune") else "random network"
    name = network if args.get("random") else Path(args["run"] or "pixels").name
    return name, name


def scores_of(first, last, evals):
    """({row: {column: share}} of a run and its baselines or of an evaluation, images that were clustered, K)."""
    method, data, result = method_of(first)[1], data_of(first["args"]), last.get("result", {})
    heads = [head for head in result.get("heads", ()) if head["k"] == result["head"]]  # CoKe's
    parts = {**result.get("baselines", {}), **last.get("baselines", {})}
    parts[method] = heads[0] if heads else result.get("scores", result)
    images, found = "test" if "test" in parts[method] else "train", {}
    for row in sorted(parts, key=[*SHARED, *parts].index):
        scores = parts[row].get(images, parts[row])
        found[row] = {title: scores[name] for title, name in SCORES.items() if name in scores}
    main = "center crops" if result and last.get("knn") else "last feature"
    for one in (last, *evals):
        args, knn = one.get("args", first["args"]), one.get("knn") or {}
        row = method + f" on {data_of(args)}" * (data_of(args) != data)
        for space, part in ({"last feature": knn} if "1" in knn else knn).items():
            at = row if space == main else space if space in {*parts, *SHARED} else f"{row}, {space}"
            part = {f"kNN, K={k.removeprefix('knn_')}": x for k, x in part.items() if k[-1].isdigit()}
            found[at] = found.get(at, {}) | part
        other = args.get("protocol", "deepcluster").replace("deepcluster", "")
        for stage, part in one.get("stages", {}).items():
            title = "fine-tuned" if other == "finetune" else f"{stage} {other}".strip()
            found[row] = found.get(row, {}) | {title: part.get("report", part["test_last"])}
    return found, images if result else "", result.get("clusters", 0) + result.get("empty", 0)


def collect(runs):
    """{Row: [(seed, scores, command), ..]} of what read_run returns, for each run."""
    rows = {}
    for log, evals in runs:
        args, seed, (method, own) = log[0]["args"], log[0]["args"]["seed"], method_of(log[0])
        args = {"train_on": "train", **args}  # as the others than LSD-C do
        command = log[0]["command"].replace(f"seed{seed}", "seedS")
        found, images, k = scores_of(log[0], log[-1], evals)
        for name, scores in found.items():
            keys = {*(args if name == own else SHARED.get(name, args))} - MAY_CHANGE - FOLLOW
            apart = frozenset((key, str(args.get(key)).replace(f"seed{seed}", "seedS")) for key in keys)
            networks = {"chance": "", "pixels": f", {args['image_size']} pixels"}
            shown = name if name in networks or name.startswith(own) else f"{name} ({method})"
            row = Row(data_of(args), images, k, shown, networks.get(name, f", {args['arch']}"), apart)
            seeds = rows.setdefault(row, [])
            same = [x for s, x, _ in seeds if s == seed and x | scores == scores | x]
            if same:
                same[0].update(scores)
            elif scores:
                seeds.append((seed, scores, command))
    return {row: seeds for row, seeds in rows.items() if seeds}


def name_rows(rows):
    """{Row: its name, with the flags that tell it from rows of that name}: as typed, or if need be all."""
    typed, every = {}, {}
    for row, seeds in rows.items():
        others = [other.apart for other in rows if other[:5] == row[:5]]
        differ = dict(sorted(pair for other in others for pair in row.apart - other))
        flags = re.findall(r"--([\w-]+)((?:[ =](?!--)\S+)*)", seeds[0][2])
        flags = [f" --{key}{x}" for key, x in flags if key.replace("-", "_").removeprefix("no_") in differ]
        typed[row] = row.name + "".join(flags)
        every[row] = row.name + "".join(f" --{key.replace('_', '-')} {x}" for key, x in differ.items())
    seen = [(row[:5], name) for row, name in typed.items()]
    return {row: every[row] if seen.count((row[:5], name)) > 1 else name for row, name in typed.items()}


def cell(shares, runs):
    words = [f"{100 * x:z.1f}" for x in (spread(shares) if shares else ()) if x is not None]
    return " ± ".join(words) + f" ({len(shares)})" * (0 < len(shares) < runs)


def summary(runs):
    """(titles, [[cells of a row, ..] for each data set, images and K]) of what read_run returns, for each run."""
    rows, blocks = collect(runs), []
    names, found = name_rows(rows), {title for seeds in rows.values() for _, x, _ in seeds for title in x}
    titles = sorted(found, key=lambda title: ([*SCORES, title].index(title), "kNN" not in title, title))
    for (_, images, k), block in groupby(sorted(rows, key=lambda row: row[:3]), lambda row: row[:3]):
        blocks.append([])
        for row in block:
            shares = [[x[title] for _, x, _ in rows[row] if title in x] for title in titles]
            cells = [names[row], row.data + row.network, f"{k}, {images}" * (k > 0), str(len(rows[row]))]
            blocks[-1].append(cells + [cell(x, len(rows[row])) for x in shares])
    return ["method", "data, network", "K, images", "runs", *titles], blocks


def markdown(titles, blocks):
    rows = [titles, ["---"] * len(titles), *(row for block in blocks for row in block)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def latex(titles, blocks):
    """A tabular in booktabs' commands, a rule between blocks."""

    def line(cells):
        cells = [re.sub(r"([&%$#_{}])", r"\\\1", cell).replace("--", "-{}-") for cell in cells]
        cells = [re.sub(r"^-?\d+\.\d( ± \d+\.\d)?", r"$\g<0>$", cell).replace("±", r"\pm") for cell in cells]
        return " & ".join(cells) + " \\\\\n"

    body = "\\midrule\n".join("".join(map(line, block)) for block in ([titles], *blocks))
    columns = "lll" + "r" * (len(titles) - 3)
    return f"\\begin{{tabular}}{{{columns}}}\n\\toprule\n{body}\\bottomrule\n\\end{{tabular}}"


def main(argv=None):
    how = argparse.RawDescriptionHelpFormatter
    p = argparse.ArgumentParser(prog="python -m extras.table", description=__doc__, formatter_class=how)
    p.add_argument("run", nargs="+", metavar="RUN", type=Path, help="run folder, log or evaluation")
    p.add_argument("--latex", action="store_true", help="LaTeX instead of Markdown")
    asked, runs = p.parse_args(argv), []
    for path in asked.run:
        alone = [] if (path / "log.jsonl").exists() else sorted(path.glob("eval_linear-*.json"))
        for file in alone or [path]:
            try:
                log, evals = read_run(file)
                if not log[-1].keys() & {"result", "stages", "knn"}:
                    raise ValueError("it has not ended")
                if "arch" not in log[0]["args"]:
                    raise ValueError("no run of these methods")
                runs.append((log, evals))
            except (OSError, ValueError, IndexError) as problem:
                print(f"left out: {file} ({problem})", file=sys.stderr)
    if not collect(runs):
        error("no run that has ended, with labels")
    print((latex if asked.latex else markdown)(*summary(runs)))


if __name__ == "__main__":
    main()
