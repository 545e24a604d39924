"""One table of our runs beside the papers' numbers, and a picture of their curves, both from the logs in this folder.

    python results/report.py                                         README.md's table, and curves.png
    python results/report.py --only table                            or --only curves
    python results/report.py --logs runs/*/log.jsonl --out mine.png  curves of your own runs, folders or logs

Every measured figure is read from a log: NAME.jsonl is a run's log.jsonl, NAME-eval.json what eval_linear.py wrote.
EXPERIMENTS says which, and holds what no log knows: the papers' numbers, and remarks. An experiment whose logs are
not here has empty cells; copied in under the name given below, they fill them. The picture needs matplotlib.
"""

import argparse
import json
import re
import sys
from fnmatch import fnmatch
from itertools import product
from pathlib import Path
from statistics import mean, median, stdev
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
BEGIN, END = "<!-- table: python results/report.py -->", "<!-- end of table -->"


def stop(message):
    """End with one line and exit code 2."""
    print(f"report.py: {message}", file=sys.stderr)
    raise SystemExit(2)


# ------------------------------------------------------------------------------------------------------- what was run


class Figure(NamedTuple):
    """A row of the table: what is measured, where it stands in the logs, the paper's number, how it is shown."""

    what: str
    where: str  # keys down to a number, or to a list of one for each seed; {a,b}: several numbers, one after the other
    paper: str = "none"
    form: tuple = (100, ".1f")  # factor and format; 100: per cent


class Experiment(NamedTuple):
    """A command but for its seed, the files of seeds 0, 1, .. (a string for each), and what was read from them."""

    method: str
    data: str
    command: str  # a second one after "; "
    files: list
    figures: list
    minutes: str = ""  # a remark on them


# fmt: off
FINE, NMI, COUNT = (100, ".2f"), (1, ".3f"), (1, ",.0f")
BUSY = "beside other work"
THREE = "{acc,nmi,ari}_labels"

LABELS = Figure("NMI of clusters and labels, training images: untrained / trained", "result/nmi_labels{_untrained,}", "none", NMI)
ALIGNMENT = "Initial Alignment: NMI of labels and the untrained network's clusters, K = {}, seeds 0 to 9"
PROBES = Figure("probes on conv1 / conv2, test images, last epoch, %", "stages/conv{1,2}/test_last", "figure only", FINE)
PLAIN_PROBES = PROBES._replace(paper="none")
KNN = Figure("kNN in the last features, 1 / 200 neighbours, test images, %", "knn/last feature/{1,200}", "none", FINE)
CONV2 = PROBES._replace(what="probe on conv2, test images, last epoch, %", where="stages/conv2/test_last")
TOP = Figure("probe on conv5, test images, last epoch, %", "stages/conv5/test_last", "", FINE)
FIVE = Figure("probes on conv1 / 2 / 3 / 4 / 5, ten crops, %", "stages/conv{1,2,3,4,5}/ten_crops_last", "13.4 / 32.3 / 41.0 / 39.6 / 38.2")
LAST = Figure("probe on the last features, validation images, %", "stages/last feature/test_last")
LABELLED = Figure("trained with labels, test images, %", "test", "93.8 (CoKe's table 9)", FINE)

BANK = Figure("kNN in the memory bank, 1 / 200 neighbours, test images, %", "result/knn/{1,200}")
CROPS = Figure("kNN in a bank of centre crops, 1 / 200 neighbours, test images, %", "result/knn_centre_crops/{1,200}")
CROPS_BEFORE = Figure("kNN of the untrained network in centre crops, 1 / 200 neighbours, test images, %", "result/knn_untrained_centre_crops/{1,200}")

HEAD = Figure("ACC / NMI / ARI of 10 clusters, test images, %", f"result/heads/0/test/{THREE}")
HEAD_TRAIN = Figure("ACC / NMI / ARI of 10 clusters, training images, %", f"result/heads/0/train/{THREE}")
SIZES = Figure("smallest / largest of 10 clusters in the last epoch / bound r N / K", "epoch/heads/0/{smallest,largest,bound}", "none", COUNT)
HEAD_BEFORE = Figure("k-means on the untrained network's features: ACC / NMI / ARI, test images, %", f"result/untrained/{THREE}")
COKE = [HEAD, HEAD_TRAIN, SIZES]

TEST = Figure("ACC / NMI / ARI of 10 clusters, test images, %", f"result/scores/test/{THREE}")
ALL = Figure("ACC / NMI / ARI of 10 clusters, training and test images, %", f"result/scores/both/{THREE}", "not printed")
SURE = Figure("test images above 0.9: share / right, %", "result/confident/test/{share,accuracy}")
ALL_SURE = Figure("all images above 0.9: share / right, %", "result/confident/both/{share,accuracy}")
BEFORE = Figure("k-means on the untrained network's features: ACC / NMI / ARI, test images, %", f"result/baselines/untrained/test/{THREE}")
ALL_BEFORE = Figure("k-means on the untrained network's features: ACC / NMI / ARI, all images, %", f"result/baselines/untrained/both/{THREE}")
ROTATED = Figure("k-means on RotNet's features: ACC / NMI / ARI, test images, %", f"result/baselines/pretrained/test/{THREE}")
ALL_ROTATED = Figure("k-means on RotNet's features: ACC / NMI / ARI, all images, %", f"result/baselines/pretrained/both/{THREE}")
TURNS = Figure("RotNet: turns right in its last epoch, %", "rotnet/turns_right")

DC, LA, IR = "DeepCluster", "Local Aggregation", "instance recognition"
DIGITS, MNIST, FASHION = "digits, LeNet-5", "MNIST, LeNet-5", "Fashion-MNIST, LeNet-5"
SMALL, ALEX, CIFAR = "CIFAR-10, small AlexNet", "CIFAR-10, AlexNet", "CIFAR-10, ResNet-18"
PROBE, EIGHT = "; eval_linear.py RUN", "torchrun --nproc_per_node=8"
TURNED, CIFAR_TURNED = (f"--backbone runs/lsdc-{name}/rotnet.pt" for name in ("mnist-rotnet", "cifar10"))
KS, HALTS = (5, 20, 200), (1, 10, 0)  # the grid; 0: never halted
GRID = (
    "DeepCluster on Fashion-MNIST in short: probe on conv2, test images, last epoch, %, for K clusters, by the cycle (of 50) after which "
    "clustering halts.\nThe paper shows figures only: accuracy falls with K, halting costs about a point."
)


def seeds(name, first=0):
    """Files of seeds 0, 1, 2; first: the name of seed 0's, where it is another."""
    return [first or f"{name}-seed0.jsonl", *(f"{name}-seed{seed}.jsonl" for seed in (1, 2))]


def probed(name):
    """A run's log and its probes, one seed."""
    return [f"{name}.jsonl {name}-eval.json"]


def grid(k, halt):
    """(command, files) of a cell of the grid."""
    flags = f"--k {k}" + f" --halt-clustering {halt}" * bool(halt)
    name = f"-k{k}" * (k != 5 or bool(halt)) + f"-halt{halt}" * bool(halt)  # 5 is the recipe's
    return f"deepcluster.py --data fashionmnist {flags}{PROBE}", probed(f"deepcluster-fashionmnist{name}")


def on_cifar(title, flags, name, paper, *more):
    """LSD-C on CIFAR-10."""
    return Experiment(title, CIFAR, f"lsdc.py --data cifar10{flags}", seeds(f"lsdc-cifar10{name}"), [ALL._replace(paper=f"ACC {paper}"), TEST, *more])


EXPERIMENTS = [
    Experiment(DC, DIGITS, "deepcluster.py", seeds("deepcluster-digits"), [LABELS], "0.3 on two threads"),
    Experiment("untrained network", FASHION, "eval_linear.py --random lenet5 --data fashionmnist",
        ["random-lenet5-fashionmnist-eval.json"], [PLAIN_PROBES, KNN]),
    Experiment("untrained network, batch norm as initialised", FASHION, "eval_linear.py --random lenet5 --data fashionmnist --no-fill-batch-norm --no-knn",
        ["random-lenet5-as-initialised-fashionmnist-eval.json"], [PLAIN_PROBES]),
    Experiment(DC, FASHION, "deepcluster.py --data fashionmnist" + PROBE, probed("deepcluster-fashionmnist"), [PROBES, KNN, LABELS]),
    Experiment(DC, FASHION, "deepcluster.py --data fashionmnist --k 100" + PROBE, probed("deepcluster-fashionmnist-k100"), [PROBES, KNN, LABELS], BUSY),
    *(Experiment(DC, FASHION, *grid(k, halt), [PROBES, KNN], BUSY) for k, halt in product(KS, HALTS) if (k, halt) != (5, 0)),
    Experiment(DC, FASHION, "deepcluster.py --data fashionmnist --initial-alignment 10", ["initial-alignment-fashionmnist.jsonl"],
        [Figure(ALIGNMENT.format(5), "initial_alignment", "0.37 to 0.41", NMI)], BUSY),
    Experiment(DC, SMALL, "deepcluster.py --data data/cifar10 --recipe cifar10 --initial-alignment 10", ["initial-alignment-cifar10.jsonl"],
        [Figure(ALIGNMENT.format(1000), "initial_alignment", "0.065 to 0.085", NMI)], BUSY),
    Experiment(LA, DIGITS, "local_aggregation.py", seeds("local_aggregation-digits-la"), [BANK, CROPS, CROPS_BEFORE], BUSY),
    Experiment(IR, DIGITS, "local_aggregation.py --loss ir", seeds("local_aggregation-digits-ir"), [BANK, CROPS], BUSY),
    Experiment(LA, FASHION, "local_aggregation.py --data fashionmnist" + PROBE,
        probed("local_aggregation-fashionmnist"), [BANK, CROPS, CROPS_BEFORE, PLAIN_PROBES], BUSY),
    Experiment(IR, FASHION, "local_aggregation.py --data fashionmnist --loss ir" + PROBE,
        probed("local_aggregation-fashionmnist-ir"), [BANK, CROPS, PLAIN_PROBES], BUSY),
    Experiment(LA, FASHION, "local_aggregation.py --data fashionmnist --epochs 20 --ir-epochs 5 --lr-steps 16 19 --crop-area 0.2",
        ["local_aggregation-fashionmnist-20-epochs.jsonl"], [BANK, CROPS], BUSY),
    Experiment("CoKe, two views", DIGITS, "coke.py", seeds("coke-digits"), [*COKE, HEAD_BEFORE], BUSY + "; 0.5 on an idle machine"),
    Experiment("CoKe, one view", DIGITS, "coke.py --views 1", seeds("coke-digits-1"), COKE, BUSY + "; 0.5 on an idle machine"),
    Experiment("CoKe, two views and six small crops", DIGITS, "coke.py --views multi", seeds("coke-digits-multi"), COKE),
    Experiment("CoKe, two views", FASHION, "coke.py --data fashionmnist",
        seeds("coke-fashionmnist", "coke-fashionmnist.jsonl"), [*COKE, HEAD_BEFORE], f"the first two {BUSY}"),
    Experiment("CoKe, one view", FASHION, "coke.py --data fashionmnist --views 1",
        seeds("coke-fashionmnist-1", "coke-fashionmnist-1.jsonl"), COKE, f"the first and the last {BUSY}"),
    Experiment("CoKe, two views", FASHION, "coke.py --data fashionmnist --epochs 30", ["coke-fashionmnist-30-epochs.jsonl"], COKE, BUSY),
    Experiment("LSD-C, kNN", DIGITS, "lsdc.py", seeds("lsdc-digits"), [TEST, SURE, BEFORE], BUSY + "; 0.8 on an idle machine"),
    Experiment("RotNet, 3 epochs", MNIST, "lsdc.py --data mnist --epochs 1 --out runs/lsdc-mnist-rotnet",
        ["lsdc-mnist-rotnet.jsonl"], [TURNS, ALL_ROTATED, ROTATED, ALL_BEFORE], BUSY),
    *(Experiment(f"LSD-C, {name}", MNIST, f"lsdc.py --data mnist {TURNED}{flags}", [f"lsdc-mnist-{name.lower()}.jsonl"], [ALL, TEST, ALL_SURE], BUSY)
        for name, flags in (("kNN", ""), ("SNE", " --labeling sne"), ("cosine", " --labeling cosine"))),
    Experiment("LSD-C, kNN", FASHION, "lsdc.py --data fashionmnist", seeds("lsdc-fashionmnist"), [TEST, SURE, TURNS, ROTATED, BEFORE], "two runs at a time"),
    Experiment("LSD-C, kNN", FASHION, "lsdc.py --data fashionmnist --pretrain-epochs 5 --pretrain-lr-steps 2 4 --lr-steps 8 10",
        ["lsdc-fashionmnist-rotnet5.jsonl"], [TEST, SURE, TURNS, ROTATED], BUSY),
    # From here on nobody has run them yet. --pca 256 is the recipe: the row of table A.1 that never halts.
    *(Experiment(DC, FASHION, *grid(k, halt), [PROBES, KNN]) for k, halt in ((10, 0), (5, 30))),
    *(Experiment(DC, ALEX, f"deepcluster.py --data cifar10 --arch alexnet{flag}{PROBE}",
        probed("deepcluster-cifar10-alexnet" + flag.replace(" --", "-").replace("-clustering ", "").replace(" ", "")), [TOP._replace(paper=paper)])
        for flag, paper in ((" --halt-clustering 15", "62.00"), (" --halt-clustering 30", "64.06"), (" --halt-clustering 50", "65.18"),
            ("", "66.98 (table A.1), 65.47 (A.2)"), (" --pca 32", "64.97"), (" --pca 64", "64.80"), (" --pca 128", "65.50"))),
    Experiment(LA, CIFAR, "local_aggregation.py --data cifar10", seeds("local_aggregation-cifar10"), [BANK, CROPS, CROPS_BEFORE]),
    Experiment(IR, CIFAR, "local_aggregation.py --data cifar10 --loss ir", seeds("local_aggregation-cifar10-ir"),
        [BANK._replace(paper="80.8 (Wu et al. 2018)"), CROPS]),
    Experiment("CoKe, two views", CIFAR, "coke.py --data cifar10", seeds("coke-cifar10"),
        [HEAD._replace(paper="85.7±0.2 / 76.6±0.3 / 73.2±0.4"), HEAD_BEFORE]),
    on_cifar("LSD-C, kNN", "", "", "81.7", ALL_SURE._replace(paper="60 / 94.0"), ALL_ROTATED._replace(paper="ACC 14.3")),
    on_cifar("LSD-C, SNE", f" {CIFAR_TURNED} --labeling sne", "-sne", "81.7±0.9"),
    on_cifar("LSD-C, kNN, without the consistency term", f" {CIFAR_TURNED} --consistency 0", "-consistency0", "80.2"),
    on_cifar("LSD-C, kNN, classifier of two layers", f" {CIFAR_TURNED} --classifier-layers 2", "-layers2", "82.0"),
    *(on_cifar(f"LSD-C, SNE, batch {size}", f" {CIFAR_TURNED} --labeling sne --batch-size {size}", f"-sne-batch{size}", paper)
        for size, paper in ((64, "72.4±1.3"), (128, "76.9±1.5"), (512, "80.9±1.2"))),
    Experiment("supervised, all layers", CIFAR, "eval_linear.py --random resnet18 --data cifar10 --no-sobel --center-fraction 1 --finetune --epochs 100 --lr 0.1 0.01 --wd 5e-4",
        ["random-resnet18-cifar10-finetune-eval.json"], [LABELLED]),
    Experiment(DC, "ImageNet, AlexNet", f"{EIGHT} deepcluster.py; {EIGHT} eval_linear.py RUN", probed("deepcluster-imagenet"), [FIVE]),
    *(Experiment(f"CoKe, {views}", "ImageNet, ResNet-50", f"{EIGHT} coke.py --views {flag}; {EIGHT} eval_linear.py RUN --protocol coke",
        probed(f"coke-imagenet-{flag}"), [LAST._replace(paper=paper)])
        for views, flag, paper in (("one view", "1", "72.5"), ("two views", "2", "74.9"), ("two views and six small crops", "multi", "76.4"))),
]
COMMITS = {  # of logs that do not say; the first pattern that fits
    "d33004d": "initial-alignment-cifar10.jsonl coke-fashionmnist-1-seed2.jsonl coke-digits-multi-seed[12].jsonl deepcluster-fashionmnist-k5-* deepcluster-fashionmnist-k20*",
    "283e469": "deepcluster-digits-seed?.jsonl random-lenet5-as-initialised-*",
    "fe707cd": "deepcluster-fashionmnist.jsonl deepcluster-fashionmnist-eval.json deepcluster-fashionmnist-k100* random-lenet5-fashionmnist-*",
    "814a233": "initial-alignment-fashionmnist.jsonl",
    "23d0573": "local_aggregation-digits-*",
    "before c18eb14": "local_aggregation-fashionmnist-20-epochs.jsonl",
    "c18eb14": "local_aggregation-fashionmnist*",
    "f4b20bd": "coke-digits-multi-seed0.jsonl coke-fashionmnist-seed2.jsonl coke-fashionmnist-1-seed1.jsonl",
    "ee64642": "coke-fashionmnist-30-epochs.jsonl",
    "9505a90": "coke-digits-seed?.jsonl coke-digits-1-* coke-fashionmnist.jsonl coke-fashionmnist-seed1.jsonl coke-fashionmnist-1.jsonl",
    "5db3d8e": "lsdc-digits-*",
    "f8179a4": "lsdc-mnist-rotnet.jsonl",
    "5362cc2": "lsdc-mnist-*",
    "7f140ec": "lsdc-fashionmnist-rotnet5.jsonl",
    "32b2afb": "lsdc-fashionmnist-seed?.jsonl",
}
HARDWARE = "2 cores of an AMD EPYC, no GPU"  # of logs that do not say
# fmt: on

# ---------------------------------------------------------------------------------------------------------- the logs


def read(path):
    """A log: (first record, one record for each epoch and phase, last record).

    An epoch done again counts once, as it was the last time; records of resuming are passed over. eval_linear.py's JSON
    is one record, the first and the last.
    """
    try:
        text = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        stop(f"{path}: cannot be read ({error})")
    records = []
    for number, line in enumerate([text] if path.suffix == ".json" else text.splitlines(), 1):
        try:
            records.append(dict(json.loads(line)))
        except (ValueError, TypeError):
            stop(f"{path}, line {number}: no JSON object, the log is damaged")
    if not records or "command" not in records[0]:
        stop(f"{path}: its first record holds no command, so it is no log of ours")
    epochs = {(r.get("phase"), r["epoch"]): r for r in records if "epoch" in r and "resumed" not in r}
    if "1" in (records[-1].get("knn") or {}) and not epochs:  # eval_linear.py's, before it had two spaces
        records[-1]["knn"] = {"last feature": records[-1]["knn"]}
    return records[0], list(epochs.values()), records[-1]


def values(folder, files, where):
    """What a figure's path names in the files of a seed: [its numbers], or those of each seed of the log."""
    known = {}
    for path in (folder / name for name in files.split()):
        _, epochs, last = read(path)
        for record in epochs:  # "epoch": the last one; "rotnet", "averaging": the last one of that phase
            known |= {record.get("phase"): record, "epoch": record}
        known |= last
    found = []
    head, *several = re.split(r"[{}]", where)  # "a/{b,c}/d" -> "a/", "b,c", "/d"
    for choice in several[0].split(",") if several else [""]:
        node, path = known, head + choice + "".join(several[1:])
        for key in path.split("/"):
            try:
                node = node[int(key) if isinstance(node, list) else key]
            except (KeyError, IndexError, ValueError, TypeError):
                node = None
        if not isinstance(node, (int, float, list)):
            stop(f"{folder / files.split()[-1]}: no {path}; has the run ended?")
        found.append(node)
    return [[v] for v in found[0]] if isinstance(found[0], list) else [found]


# --------------------------------------------------------------------------------------------------------- the table


def shown(numbers, form):
    """Numbers of one seed as text: 90.8 / 89.4 / 84.2."""
    return " / ".join(f"{form[0] * number:{form[1]}}" for number in numbers)


def command(text):
    """The commands in backticks; the first one takes the seed."""
    first, *second = (c if c.startswith("torchrun") else f"python {c}" for c in text.split("; "))
    first += " --seed S" * ("--initial-alignment" not in first)
    return ", ".join(f"`{c}`" for c in (first, *second))


def minutes(last):
    """Of a run; of an evaluation alone the seconds it took."""
    return last["minutes"] if "minutes" in last else sum(last["seconds"].values()) / 60


def hardware(head):
    cpu = head.get("device") == "cpu"
    machine = head.get("hardware") or (HARDWARE if cpu else head.get("device", ""))
    many = head.get("threads") if cpu else None
    return machine + (f", {many} thread{'s' * (many > 1)}" if many else "")


def commit(path, head):
    typed = (c for c, names in COMMITS.items() if any(fnmatch(path.name, name) for name in names.split()))
    return head.get("commit") or next(typed, "")


def once(words):
    return ", ".join(dict.fromkeys(filter(None, words)))


def row(folder, e, figure):
    """The twelve cells of one figure of an experiment; what only logs can tell stays empty where they are not here."""
    here = {s: f for s, f in enumerate(e.files) if all((folder / name).exists() for name in f.split())}
    found = {s: values(folder, f, figure.where) for s, f in here.items()}
    numbers = [n for seed in found.values() for n in seed]
    seed_by_seed = ["-"] * (max(found, default=-1) + 1)
    for s, of_seed in found.items():
        seed_by_seed[s] = "; ".join(shown(n, figure.form) for n in of_seed)
    columns = list(zip(*numbers, strict=True))
    middle = shown(map(mean, columns), figure.form)
    spread = shown(map(stdev, columns), figure.form) if len(numbers) > 1 else ""
    inside = len(numbers) > len(
        here
    )  # all seeds in one log, Initial Alignment's: the paper speaks of the median
    middle += f", median {shown(map(median, columns), figure.form)}" * inside
    took = ", ".join(f"{minutes(read(folder / f.split()[0])[2]):.1f}" for f in here.values())
    took += f"; {e.minutes}" if took and e.minutes else ""
    logs = [("log" if inside else f"seed {s}", folder / name) for s, f in here.items() for name in f.split()]
    heads = [(path, read(path)[0]) for _, path in logs]
    links = (f"[{name if path.suffix == '.jsonl' else 'probe'}]({path.name})" for name, path in logs)
    measured = ["; ".join(seed_by_seed), middle, spread, figure.paper, took]
    where = [once(hardware(head) for _, head in heads), once(commit(path, head) for path, head in heads)]
    return [e.method, e.data, command(e.command), figure.what, *measured, *where, ", ".join(links)]


def markdown(rows):
    return [f"| {' | '.join(r)} |" for r in (rows[0], ["---"] * len(rows[0]), *rows[1:])]


def table(folder):
    """README.md's part between the markers: the one table, and the grid of K and halting in short."""
    titles = "method", "data, network", "command", "what is measured", "seeds 0, 1, ..", "mean", "deviation"
    titles += "the paper's number", "minutes a run", "hardware", "commit", "logs"
    rows = [row(folder, e, figure) for e in EXPERIMENTS for figure in e.figures]
    small = [["K", *(f"halted after cycle {h}" if h else "never halted" for h in HALTS)]]
    for k in KS:
        cells = [row(folder, Experiment("", "", *grid(k, h), []), CONV2)[4] for h in HALTS]
        small.append([str(k), *cells])
    return "\n".join([BEGIN, "", *markdown([titles, *rows]), "", GRID, "", *markdown(small), "", END])


def write_table(folder):
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else ""
    if not (text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)):
        stop(f"{readme}: wants a line {BEGIN} and below it a line {END}")
    readme.write_text(text[: text.index(BEGIN)] + table(folder) + text[text.index(END) + len(END) :])


# ------------------------------------------------------------------------------------------------------- the picture

SCRIPTS = {"deepcluster.py": DC, "local_aggregation.py": LA, "coke.py": "CoKe", "lsdc.py": "LSD-C"}
DRAWN = [
    "deepcluster-digits",
    "local_aggregation-digits-la",
    "coke-digits",
    "lsdc-digits",
]  # three seeds each
PANELS = {"loss": "loss", "nmi_labels": "NMI with the labels", "nmi_previous": "NMI to the previous epoch"}


def curve(epochs, key):
    """[epochs, values] where the log has the key, [] if nowhere; of LSD-C's scores those of training images."""
    found = [(r["epoch"], r.get(key, r.get("scores", {}).get("train", {}).get(key))) for r in epochs]
    return list(zip(*((e, v) for e, v in found if v is not None), strict=True))


def draw(paths, out, named):
    """A column for each method and data set, a line for each log; named: in its own colour, with its name."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
        from PIL import Image
    except ImportError:
        stop("the picture needs matplotlib: pip install matplotlib")
    columns = {}
    for path in paths:
        head, epochs, _ = read(path)
        epochs = [r for r in epochs if r.get("phase") != "rotnet"]  # another task
        if not epochs:
            stop(f"{path}: no epochs to draw")
        script = head["command"].split()[0]
        name = path.parent.name if path.name == "log.jsonl" else path.stem
        title = f"{SCRIPTS.get(script, script)}\n{head['data']['name']}, {head['args']['arch']}"
        columns.setdefault(title, []).append((name, epochs))
    if not columns:
        stop("no logs to draw")
    wide, blocks = min(4, len(columns)), -(-len(columns) // 4)
    size = {"figsize": (max(4 * wide, 6), 9 * blocks), "dpi": 100, "layout": "constrained"}
    figure, panels = pyplot.subplots(3 * blocks, wide, squeeze=False, **size)
    for panel in panels[-3:, (len(columns) - 1) % wide + 1 :].flat:  # of the last block
        panel.set_axis_off()
    for c, (title, runs) in enumerate(columns.items()):
        block = panels[3 * (c // wide) : 3 * (c // wide) + 3, c % wide]
        for panel in block[1:]:
            panel.sharex(block[0])
        for panel, (key, what) in zip(block, PANELS.items(), strict=True):
            for i, (name, epochs) in enumerate(runs):
                if xy := curve(epochs, key):
                    style = {"color": f"C{i}", "label": name} if named else {"color": "C0"}
                    panel.plot(*xy, lw=1, marker="." if len(xy[0]) < 20 else "", **style)
            if not panel.lines:
                panel.text(0.5, 0.5, "not logged", ha="center", va="center", transform=panel.transAxes)
            for floor, meaning in (("ln_k", "ln K"), ("chance", "chance")):
                if key == "loss" and (xy := curve(runs[0][1], floor)):
                    panel.plot(*xy, "--", lw=1, color="0.4", label=meaning)
            if key == "loss" and panel.get_legend_handles_labels()[0]:
                panel.legend(fontsize=9)
            if key != "loss":
                panel.set_ylim(0, 1.02)
            panel.set_ylabel("" if c % wide else what)
            panel.grid(alpha=0.3)
        block[0].set_title(title if named else f"{title}, {len(runs)} seeds")
        block[2].set_xlabel("epoch")
    try:
        figure.savefig(out)
        if out.suffix == ".png":
            Image.open(out).convert("RGB").quantize(32).save(out, optimize=True)  # a third of the size
    except (OSError, ValueError) as error:
        stop(f"--out {out}: {error}")
    pyplot.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description="README.md's table of runs, and curves.png, from the logs")
    p.add_argument("--only", choices=["table", "curves"], help="make one of the two; default: both")
    p.add_argument(
        "--logs", nargs="+", type=Path, metavar="LOG", help="draw these instead: logs, run folders"
    )
    p.add_argument("--out", type=Path, help="the picture; default: curves.png in --folder, with --logs here")
    p.add_argument("--folder", type=Path, default=HERE, help="where logs and README.md lie")
    args = p.parse_args(argv)
    if args.logs:
        paths = [path / "log.jsonl" if path.is_dir() else path for path in args.logs]
        return draw(paths, args.out or Path("curves.png"), named=True)
    if args.only != "curves":
        write_table(args.folder)
    if args.only != "table":
        paths = [args.folder / name for method in DRAWN for name in seeds(method)]
        draw([path for path in paths if path.exists()], args.out or args.folder / "curves.png", named=False)


if __name__ == "__main__":
    main()
