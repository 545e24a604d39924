"""Write the two tables of README.md beside this file from the logs in logs/.

    python results/report.py

NAME.jsonl is a run's log.jsonl, NAME-eval.json what eval_linear.py wrote about it; origin.json has commit and hardware
of logs without a commit. To add runs, copy their logs to logs/NAME-seed0.jsonl and so on, add a line to ROWS for each
thing that was measured, and run the command. Where new logs replace old ones, "place" may be another. A line whose logs
are not there is left out. The short table leaves out earlier scripts and VARIANTS. The entries of a line:

    method, data and network
    command    as it is typed; S is the seed, RUN the run folder of the command before it
    logs       names of files in logs/, separated by spaces; ? stands for the seed
    measured   what the numbers are
    place      keys, with "/" between them, that lead to a number in the log's last record, or in NAME-eval.json where
               the first key is "eval"; {a,b}: a number for a and one for b
    form       of the number: .1% is a share in percent with one digit, .3f has three digits
    paper      the paper's number
    remark     stands behind the minutes
"""

import json
import re
import sys
from functools import reduce
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from extras.table import markdown, read_run, spread, summary  # noqa: E402

VARIANTS = "init|ratio|consistency|layers|ricap|nomix|-1-|-multi-"  # in names of logs
TITLES = ["method", "data, network", "command", "what is measured", "seeds, one by one", "mean", "deviation"]
TITLES += ["the paper's", "minutes a run", "hardware", "commit", "logs"]
CPU = "2 cores of an AMD EPYC, no GPU"  # of all runs on a CPU; logs do not name it

# fmt: off
DIGITS, MNIST, FASHION, CIFAR = "digits, LeNet-5", "MNIST, LeNet-5", "Fashion-MNIST, LeNet-5", "CIFAR-10, small AlexNet"
LENET_CIFAR = "CIFAR-10 (compressed once more), LeNet-5"
CIFAR_FLAGS = "--data data/cifar10 --recipe cifar10 --arch lenet5 --seed S"
PHOTOS = "1,000 photographs of 10 kinds (ImageNet), LeNet-5 at 64 pixels"
BUSY, THREAD = "beside other work", "one thread, beside other work"
BORDERS = "deepcluster-fashionmnist-epoch-borders-seed?.jsonl"
NMI3 = "NMI of clusters and labels, training images: random network / pixels / trained"
NMI3_AT = "{baselines/random network,baselines/pixels,result}/nmi_labels"
PROBES, PROBES_AT = "probes on conv1 / conv2, test images, %", "eval/stages/conv{1,2}/test_last"
KNN, KNN_AT = "kNN in the last features, K = 1 / 200, test images, %", "eval/knn/last feature/{1,200}"
BANK, CROPS = "kNN in the memory bank, K = 1 / 200, test images, %", "kNN in center crops, K = 1 / 200, test images, %"
CROPS2 = "kNN in center crops, K = 1 / 200, test images, %: random network, then pixels"
CROPS2_AT = "knn/{random network/knn_1,random network/knn_200,pixels/knn_1,pixels/knn_200}"
BANK_AT, CROPS_AT = "knn/memory bank/{knn_1,knn_200}", "knn/center crops/{knn_1,knn_200}"
BANK_OLD, CROPS_OLD = "result/knn/{1,200}", "result/knn_centre_crops/{1,200}"
TEST, ALL = "ACC / NMI / ARI of 10 clusters, test images, %", "ACC / NMI / ARI of 10 clusters, all images, %"
COKE_AT, LSDC_TEST, LSDC_ALL = (f"result/{part}/{{acc,nmi,ari}}_labels" for part in ("heads/0/test", "scores/test", "scores/both"))
KMEANS2 = "ACC of k-means: random network / pixels, test images, %"
SIZES = "smallest / largest of 10 clusters, 1,437 training images"
KMEANS = "k-means on the features of the random network, ACC / NMI / ARI, test images, %"

ROWS = [
    ("DeepCluster", DIGITS, "python deepcluster.py --seed S", "deepcluster-digits-seed?.jsonl", NMI3, NMI3_AT, ".3f", "none", THREAD),
    ("random network", FASHION, "python eval_linear.py --random lenet5 --data fashionmnist", "random-lenet5-fashionmnist-eval.json", PROBES, "stages/conv{1,2}/test_last", ".2%", "none", ""),
    ("random network", FASHION, "python eval_linear.py --random lenet5 --data fashionmnist", "random-lenet5-fashionmnist-eval.json", KNN, "knn/{1,200}", ".2%", "none", ""),
    ("random network, batch norm as initialized", FASHION, "python eval_linear.py --random lenet5 --data fashionmnist --no-fill-batch-norm --no-knn", "random-lenet5-as-initialised-fashionmnist-eval.json", PROBES, "stages/conv{1,2}/test_last", ".2%", "none", ""),
    ("DeepCluster", FASHION, "python deepcluster.py --data fashionmnist --seed S; python eval_linear.py RUN", BORDERS, PROBES, PROBES_AT, ".2%", "figure only", "at times beside other work"),
    ("DeepCluster", FASHION, "python deepcluster.py --data fashionmnist --seed S; python eval_linear.py RUN", BORDERS, KNN, KNN_AT, ".2%", "none", "at times beside other work"),
    ("DeepCluster", FASHION, "python deepcluster.py --data fashionmnist --seed S; python eval_linear.py RUN", BORDERS, NMI3, NMI3_AT, ".3f", "none", "at times beside other work"),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S; python eval_linear.py RUN", "deepcluster-fashionmnist.jsonl", PROBES, PROBES_AT, ".2%", "figure only", ""),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --k 20; python eval_linear.py RUN", "deepcluster-fashionmnist-k20.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --k 100; python eval_linear.py RUN", "deepcluster-fashionmnist-k100.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --k 200; python eval_linear.py RUN", "deepcluster-fashionmnist-k200.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --halt-clustering 1; python eval_linear.py RUN", "deepcluster-fashionmnist-k5-halt1.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --halt-clustering 10; python eval_linear.py RUN", "deepcluster-fashionmnist-k5-halt10.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python deepcluster.py --data fashionmnist --seed S --k 20 --halt-clustering 1; python eval_linear.py RUN", "deepcluster-fashionmnist-k20-halt1.jsonl", PROBES, PROBES_AT, ".2%", "figure only", BUSY),
    ("DeepCluster, earlier script", FASHION, "python -m extras.alignment --data fashionmnist", "initial-alignment-fashionmnist.jsonl", "Initial Alignment: NMI of labels and a random network's clusters, K = 5, seeds 0 to 9", "initial_alignment", ".3f", "0.37 to 0.41", BUSY),
    ("DeepCluster, earlier script", CIFAR, "python -m extras.alignment --data data/cifar10 --recipe cifar10", "initial-alignment-cifar10.jsonl", "Initial Alignment: NMI of labels and a random network's clusters, K = 1000, seeds 0 to 9", "initial_alignment", ".3f", "0.065 to 0.085", BUSY),
    ("Local Aggregation", DIGITS, "python local_aggregation.py --seed S", "local_aggregation-digits-la-seed?.jsonl", BANK, BANK_AT, ".1%", "none", THREAD),
    ("Local Aggregation", DIGITS, "python local_aggregation.py --seed S", "local_aggregation-digits-la-seed?.jsonl", CROPS, CROPS_AT, ".1%", "none", THREAD),
    ("Local Aggregation", DIGITS, "python local_aggregation.py --seed S", "local_aggregation-digits-la-seed?.jsonl", CROPS2, CROPS2_AT, ".1%", "none", THREAD),
    ("supervised network", DIGITS, "python eval_linear.py --random lenet5 --data digits --finetune --epochs 200 --lr 0.1 --wd 1e-4", "supervised-lenet5-digits-eval.json", "test images classified right, %", "stages/last feature/test_last", ".1%", "none", THREAD),
    ("instance recognition", DIGITS, "python local_aggregation.py --seed S --loss ir", "local_aggregation-digits-ir-seed?.jsonl", BANK, BANK_AT, ".1%", "none", THREAD),
    ("instance recognition", DIGITS, "python local_aggregation.py --seed S --loss ir", "local_aggregation-digits-ir-seed?.jsonl", CROPS, CROPS_AT, ".1%", "none", THREAD),
    ("Local Aggregation, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S; python eval_linear.py RUN", "local_aggregation-fashionmnist.jsonl", BANK, BANK_OLD, ".1%", "none", BUSY),
    ("Local Aggregation, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S; python eval_linear.py RUN", "local_aggregation-fashionmnist.jsonl", CROPS, CROPS_OLD, ".1%", "none", BUSY),
    ("Local Aggregation, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S; python eval_linear.py RUN", "local_aggregation-fashionmnist.jsonl", "kNN of the random network in center crops, K = 1 / 200, test images, %", "result/knn_untrained_centre_crops/{1,200}", ".1%", "none", BUSY),
    ("Local Aggregation, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S; python eval_linear.py RUN", "local_aggregation-fashionmnist.jsonl", PROBES, PROBES_AT, ".2%", "none", BUSY),
    ("instance recognition, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S --loss ir; python eval_linear.py RUN", "local_aggregation-fashionmnist-ir.jsonl", BANK, BANK_OLD, ".1%", "none", BUSY),
    ("instance recognition, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S --loss ir; python eval_linear.py RUN", "local_aggregation-fashionmnist-ir.jsonl", CROPS, CROPS_OLD, ".1%", "none", BUSY),
    ("instance recognition, earlier script", FASHION, "python local_aggregation.py --data fashionmnist --seed S --loss ir; python eval_linear.py RUN", "local_aggregation-fashionmnist-ir.jsonl", PROBES, PROBES_AT, ".2%", "none", BUSY),
    ("CoKe, two views", DIGITS, "python coke.py --seed S", "coke-digits-2-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views", DIGITS, "python coke.py --seed S", "coke-digits-2-seed?.jsonl", KMEANS2, "baselines/{random network,pixels}/acc_labels", ".1%", "none", THREAD),
    ("CoKe, two views", DIGITS, "python coke.py --seed S", "coke-digits-2-seed?.jsonl", SIZES, "result/{smallest,largest}", ".0f", "none", THREAD),
    ("CoKe, two views, no bound", DIGITS, "python coke.py --ratio 0 --seed S", "coke-digits-2-ratio0-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views, no bound", DIGITS, "python coke.py --ratio 0 --seed S", "coke-digits-2-ratio0-seed?.jsonl", SIZES, "result/{smallest,largest}", ".0f", "none", THREAD),
    ("CoKe, two views, half the bound", DIGITS, "python coke.py --ratio 0.4 --seed S", "coke-digits-2-ratio0.4-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views, half the bound", DIGITS, "python coke.py --ratio 0.4 --seed S", "coke-digits-2-ratio0.4-seed?.jsonl", SIZES, "result/{smallest,largest}", ".0f", "none", THREAD),
    ("CoKe, two views, equal sizes", DIGITS, "python coke.py --ratio 1 --seed S", "coke-digits-2-ratio1-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views, equal sizes", DIGITS, "python coke.py --ratio 1 --seed S", "coke-digits-2-ratio1-seed?.jsonl", SIZES, "result/{smallest,largest}", ".0f", "none", THREAD),
    ("CoKe, one view", DIGITS, "python coke.py --views 1 --seed S", "coke-digits-1-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views and six local crops", DIGITS, "python coke.py --views multi --seed S", "coke-digits-multi-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views", FASHION, "python coke.py --data fashionmnist --seed S", "coke-fashionmnist-2-seed?.jsonl", TEST, COKE_AT, ".1%", "none", THREAD),
    ("CoKe, two views", FASHION, "python coke.py --data fashionmnist --seed S", "coke-fashionmnist-2-seed?.jsonl", KMEANS2, "baselines/{random network,pixels}/acc_labels", ".1%", "none", THREAD),
    ("CoKe, two views, earlier script", FASHION, "python coke.py --data fashionmnist --seed S", "coke-fashionmnist.jsonl coke-fashionmnist-seed?.jsonl", TEST, COKE_AT, ".1%", "none", "the first two beside other work"),
    ("CoKe, two views, earlier script", FASHION, "python coke.py --data fashionmnist --seed S", "coke-fashionmnist.jsonl coke-fashionmnist-seed?.jsonl", KMEANS, "result/untrained/{acc,nmi,ari}_labels", ".1%", "none", "the first two beside other work"),
    ("CoKe, one view, earlier script", FASHION, "python coke.py --data fashionmnist --views 1 --seed S", "coke-fashionmnist-1.jsonl coke-fashionmnist-1-seed?.jsonl", TEST, COKE_AT, ".1%", "none", "the first and the last beside other work"),
    ("LSD-C, kNN", DIGITS, "python lsdc.py --seed S", "lsdc-digits-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, kNN", DIGITS, "python lsdc.py --seed S", "lsdc-digits-seed?.jsonl", KMEANS2, "result/baselines/{random network/test,pixels/test}/acc_labels", ".1%", "none", THREAD),
    ("LSD-C, no consistency", DIGITS, "python lsdc.py --consistency 0 --seed S", "lsdc-digits-consistency0-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, two layers", DIGITS, "python lsdc.py --classifier-layers 2 --seed S", "lsdc-digits-layers2-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, RICAP", DIGITS, "python lsdc.py --mix ricap --seed S", "lsdc-digits-ricap-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, nothing mixed", DIGITS, "python lsdc.py --mix none --seed S", "lsdc-digits-nomix-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, kNN", MNIST, "python lsdc.py --data mnist --seed S", "lsdc-mnist-seed?.jsonl", ALL, LSDC_ALL, ".1%", "not printed", THREAD),
    ("LSD-C, kNN", MNIST, "python lsdc.py --data mnist --seed S", "lsdc-mnist-seed?.jsonl", "ACC of k-means: random network / RotNet / pixels, all images, %", "result/baselines/{random network,pretrained network,pixels}/both/acc_labels", ".1%", "none", THREAD),
    ("RotNet, 3 epochs, earlier script", MNIST, "python lsdc.py --data mnist --epochs 1 --out runs/lsdc-mnist-rotnet", "lsdc-mnist-rotnet.jsonl", "ACC of k-means on the features of the random network / of RotNet, all images, %", "result/baselines/{untrained,pretrained}/both/acc_labels", ".1%", "none", BUSY),
    ("LSD-C, kNN, earlier script", MNIST, "python lsdc.py --data mnist --backbone runs/lsdc-mnist-rotnet/rotnet.pt --seed S", "lsdc-mnist-knn.jsonl", ALL, LSDC_ALL, ".1%", "not printed", BUSY),
    ("LSD-C, SNE, earlier script", MNIST, "python lsdc.py --data mnist --backbone runs/lsdc-mnist-rotnet/rotnet.pt --seed S --labeling sne", "lsdc-mnist-sne.jsonl", ALL, LSDC_ALL, ".1%", "not printed", BUSY),
    ("LSD-C, cosine, earlier script", MNIST, "python lsdc.py --data mnist --backbone runs/lsdc-mnist-rotnet/rotnet.pt --seed S --labeling cosine", "lsdc-mnist-cosine.jsonl", ALL, LSDC_ALL, ".1%", "not printed", BUSY),
    ("LSD-C, kNN", FASHION, "python lsdc.py --data fashionmnist --seed S", "lsdc-fashionmnist-new-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", THREAD),
    ("LSD-C, kNN", FASHION, "python lsdc.py --data fashionmnist --seed S", "lsdc-fashionmnist-new-seed?.jsonl", "ACC of k-means: random network / RotNet / pixels, test images, %", "result/baselines/{random network,pretrained network,pixels}/test/acc_labels", ".1%", "none", THREAD),
    ("LSD-C, kNN, earlier script", FASHION, "python lsdc.py --data fashionmnist --seed S", "lsdc-fashionmnist-seed?.jsonl", TEST, LSDC_TEST, ".1%", "none", "two runs at a time"),
    ("LSD-C, kNN, earlier script", FASHION, "python lsdc.py --data fashionmnist --seed S", "lsdc-fashionmnist-seed?.jsonl", "ACC of k-means on the features of the random network / of RotNet, test images, %", "result/baselines/{untrained,pretrained}/test/acc_labels", ".1%", "none", "two runs at a time"),
    ("Local Aggregation", PHOTOS, "python local_aggregation.py --data data/imagenette-mini/train --seed S", "local_aggregation-photos-seed?.jsonl", "NMI of 20 clusters and kinds: random assignment / pixels / trained", "{baselines/chance,baselines/pixels,result}/nmi_labels", ".3f", "none", THREAD),
    ("CoKe, two views", PHOTOS, "python coke.py --data data/imagenette-mini/train --seed S", "coke-photos-seed?.jsonl", "NMI of 10 clusters and kinds: random network / pixels / trained", "{baselines/random network,baselines/pixels,result/heads/0/train}/nmi_labels", ".3f", "none", THREAD),
    ("Local Aggregation, from weights of CIFAR-10", PHOTOS, "python local_aggregation.py --data data/imagenette-mini/train --init RUN --epochs 6", "local_aggregation-photos-init-seed?.jsonl", "NMI of 20 clusters and kinds: random assignment / pixels / trained", "{baselines/chance,baselines/pixels,result}/nmi_labels", ".3f", "none", THREAD),
    ("CoKe, two views, from weights of CIFAR-10", PHOTOS, "python coke.py --data data/imagenette-mini/train --init RUN --epochs 6", "coke-photos-init-seed?.jsonl", "NMI of 10 clusters and kinds: k-means on the start / pixels / trained", "{baselines/local_aggregation initialization,baselines/pixels,result/heads/0/train}/nmi_labels", ".3f", "none", THREAD),
    ("DeepCluster", PHOTOS, "python deepcluster.py --data data/imagenette-mini/train --seed S", "deepcluster-photos-seed?.jsonl", "NMI of 100 clusters and kinds: random network / pixels / trained", NMI3_AT, ".3f", "none", THREAD),
    ("LSD-C", PHOTOS, "python lsdc.py --data data/imagenette-mini/train --seed S", "lsdc-photos-seed?.jsonl", "NMI of 10 clusters and kinds: random network / pixels / RotNet / trained", "result/{baselines/random network/train,baselines/pixels/train,baselines/RotNet/train,scores/train}/nmi_labels", ".3f", "none", THREAD),
    ("DeepCluster", LENET_CIFAR, f"python deepcluster.py {CIFAR_FLAGS}", "deepcluster-cifar10-seed?.jsonl", "NMI of 100 clusters and labels, training images: random network / pixels / trained", NMI3_AT, ".3f", "none", THREAD),
    ("DeepCluster", LENET_CIFAR, f"python deepcluster.py {CIFAR_FLAGS}; python eval_linear.py RUN --epochs 20", "deepcluster-cifar10-seed?.jsonl", PROBES, PROBES_AT, ".2%", "none", THREAD),
    ("random network", LENET_CIFAR, "python eval_linear.py --random lenet5 --data data/cifar10 --epochs 20 --image-size 32 --center-fraction 0.73", "random-lenet5-cifar10-eval.json", PROBES, "stages/conv{1,2}/test_last", ".2%", "none", THREAD),
    ("Local Aggregation", LENET_CIFAR, f"python local_aggregation.py {CIFAR_FLAGS}", "local_aggregation-cifar10-seed?.jsonl", CROPS, CROPS_AT, ".1%", "none", THREAD),
    ("Local Aggregation", LENET_CIFAR, f"python local_aggregation.py {CIFAR_FLAGS}", "local_aggregation-cifar10-seed?.jsonl", CROPS2, CROPS2_AT, ".1%", "none", THREAD),
    ("instance recognition", LENET_CIFAR, f"python local_aggregation.py {CIFAR_FLAGS} --loss ir", "local_aggregation-cifar10-ir-seed?.jsonl", CROPS, CROPS_AT, ".1%", "none", THREAD),
    ("CoKe, two views", LENET_CIFAR, f"python coke.py {CIFAR_FLAGS}", "coke-cifar10-seed?.jsonl", TEST, COKE_AT, ".1%", "ResNet-18: 85.7 / 76.6 / 73.2", THREAD),
    ("CoKe, two views", LENET_CIFAR, f"python coke.py {CIFAR_FLAGS}", "coke-cifar10-seed?.jsonl", KMEANS2, "baselines/{random network,pixels}/acc_labels", ".1%", "none", THREAD),
    ("LSD-C, kNN", LENET_CIFAR, f"python lsdc.py {CIFAR_FLAGS}", "lsdc-cifar10-seed?.jsonl", TEST, LSDC_TEST, ".1%", "ResNet-18, all images: ACC 81.7", THREAD),
    ("LSD-C, kNN", LENET_CIFAR, f"python lsdc.py {CIFAR_FLAGS}", "lsdc-cifar10-seed?.jsonl", "ACC of k-means: random network / RotNet / pixels, test images, %", "result/baselines/{random network,RotNet,pixels}/test/acc_labels", ".1%", "RotNet of ResNet-18, all images: 14.3", THREAD),
]
# fmt: on


def read(path):
    """A run's last record, to which its first one, its evaluation and its minutes are added."""
    records, evals = read_run(path)
    run, first = records[-1], records[0]
    if not first.get("commit"):
        first |= json.loads((path.parent / "origin.json").read_text())[path.name]
    if "minutes" not in run:  # the earlier scripts logged them; an epoch done again counts once
        seconds = {(r.get("phase"), r["epoch"]): r["seconds"] for r in records if "epoch" in r}
        spent = seconds or run["seconds"]
        run["minutes"] = (sum(spent.values()) if isinstance(spent, dict) else spent) / 60
    return run | {"first": first, "eval": evals[0] if evals else {}}


def look_up(run, place):
    """The numbers at a place of a run."""
    choices = (re.search("{(.*)}|$", place)[1] or "").split(",")
    places = [re.sub("{.*}", choice, place).split("/") for choice in choices]
    return [reduce(lambda x, key: x[int(key) if isinstance(x, list) else key], keys, run) for keys in places]


def show(numbers, form):
    return " / ".join(f"{x:{form}}".rstrip("%") for x in numbers)


def row(entry, logs):
    """The cells of a line of ROWS, or None where none of its logs is in the folder `logs`."""
    method, data, command, names, measured, place, form, paper, remark = entry
    runs = {path: read(path) for name in names.split() for path in sorted(logs.glob(name))}
    if not runs:
        return None
    try:
        seeds = [look_up(run, place) for run in runs.values()]
    except (KeyError, IndexError):
        raise SystemExit(f"{names}: no {place}; has every run ended?") from None
    seeds = [[x] for x in seeds[0][0]] if isinstance(seeds[0][0], list) else seeds  # all seeds in one log
    means, deviations = zip(*map(spread, zip(*seeds, strict=True)), strict=True)
    firsts, numbers = [run["first"] for run in runs.values()], ["; ".join(show(seed, form) for seed in seeds)]
    numbers += [show(means, form), show(deviations, form) if len(seeds) > 1 else "", paper]
    commands = ", ".join(f"`{part}`" for part in command.split("; "))
    minutes = ", ".join(f"{run['minutes']:.1f}" for run in runs.values()) + f"; {remark}" * bool(remark)
    machines = dict.fromkeys(first["hardware"].replace("CPU (x86_64)", CPU) for first in firsts)
    commits = dict.fromkeys(first["commit"] for first in firsts)  # each once
    links = [f"[seed {run['first']['args']['seed']}](logs/{path.name})" for path, run in runs.items()]
    links += [f"[probes](logs/{path.stem}-eval.json)" for path in runs if place.startswith("eval/")]
    return [method, data, commands, measured, *numbers, minutes, *map(", ".join, (machines, commits, links))]


def readme(text, logs, rows=ROWS):
    """README.md with both tables between their marks."""
    names = {name for entry in rows if "earlier" not in entry[0] for name in entry[3].split()}
    paths = sorted(path for name in names for path in logs.glob(name) if not re.search(VARIANTS, path.name))
    found = [cells for entry in rows if (cells := row(entry, logs))]
    tables = {"short table": summary(map(read_run, paths)), "table": (TITLES, [found])}
    for name, cells in tables.items():
        begin, end = f"<!-- {name}: python results/report.py -->", f"<!-- end of {name} -->"
        text = text[: text.index(begin)] + f"{begin}\n\n{markdown(*cells)}\n\n" + text[text.index(end) :]
    return text


if __name__ == "__main__":
    (HERE / "README.md").write_text(readme((HERE / "README.md").read_text(), HERE / "logs"))
