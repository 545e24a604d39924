"""lsdc.py as a whole: what runs leave behind, interruptions, several processes, odd data, what is learnt."""

import functools
import json
import math
import os
import pickle
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from legacy import Images, Loader, backbone, load_backbone, load_data, save_backbone
from lsdc import make_net, options

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import (
    ROOT,
    contents,
    copied,
    epochs,
    one_line,
    plain,
    plain_nmi,
    read_assignments,
    two_at_once,
    without_times,
    write_images,
)
from PIL import Image
from scipy.optimize import linear_sum_assignment
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.metrics import adjusted_rand_score
from torch import nn

SCRIPT = ROOT / "lsdc.py"
CPU = torch.device("cpu")
trap = functools.partial(jobs.trap, "lsdc")


def words(text):
    return text.split()


# A few digits of four classes as files, 60 to learn from and 20 to test on: RotNet makes 3 steps an epoch,
# clustering 3 (with the test images 4 and 5).
# What a recipe may change is said in full.
PLAIN = words(
    "--workers 0 --out run --optimizer sgd --momentum 0.9 --labeling knn --mix mixup --pretrain none"
)
IMAGES = [
    *PLAIN,
    *words("--pad 0 --crop-area 0.85 --no-flip --freeze-stages 1 --train-on train --image-size 16"),
]
IMAGES += words("--resize 16 --classifier-layers 1 --arch lenet5 --pretrain-wd 0.0005")
FEW = [*IMAGES, *words("--recipe digits --k 4 --lr 0.05 --pretrain-lr 0.05 --batch-size 16 --neighbours 3")]
FEW += words("--epochs 3 --pretrain-batch-size 20 --pretrain-epochs 2 --lr-steps 1 2 --pretrain-lr-steps 1")
FEW += words("--ramp-up 2 --score-every 1 --consistency 4 --wd 0.001")
DIGITS = [*IMAGES, *words("--data digits --batch-size 256 --epochs 3 --lr 0.1 --lr-steps --wd 0.0001")]
DIGITS += words(
    "--pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 128 --pretrain-lr 0.1 --ramp-up 2"
)
DIGITS += words("--neighbours 8 --score-every 2 --consistency 5")
VECTORS = words("--k 10 --batch-size 64 --neighbours 3 --epochs 2 --workers 0 --out run --ramp-up 1")
LEARN = [
    *IMAGES,
    *words("--data digits --epochs 40 --score-every 20 --mix none --freeze-stages 0 --batch-size 128"),
]
LEARN += words("--neighbours 5 --lr 0.1 --wd 0.0005 --lr-steps 28 36 --ramp-up 15 --consistency 5")
RUNS = {  # name: (data, flags)
    "ricap": ("few", [*FEW, *words("--pretrain rotnet --mix ricap")]),
    "mixup": (
        "few",
        [
            *FEW,
            *words("--pretrain rotnet --mix mixup --labeling cosine --cosine-threshold 0.8 --train-on both"),
            *words("--optimizer adam --lr 0.002 --freeze-bn --score-every 2 --save-every 3"),
        ],
    ),
    "sne": ("few", [*FEW, *words("--pretrain none --mix none --labeling sne --classifier-layers 2 --flip")]),
    "digits": (None, DIGITS),
    "vectors": ("vectors", VECTORS),
}

# The script, with what it does written down: batches and their views, weights and gradients before every step,
# what the processes tell each other, and what the clustering loss is given besides the images.
RECORD = """
import dataclasses, os, torch, legacy, lsdc
names = ("batches", "views", "weights", "grads", "names", "beats", "calls", "lrs")
seen = {name: [] for name in names}
def begin(*a, real=lsdc.begin):
    global now
    now = real(*a)
    return now
def epoch(self, number, views, *a, real=legacy.Loader.epoch, **k):
    for index, images in real(self, number, views, *a, **k):
        seen["batches"].append((number, index.clone(), [x.clone() for x in images]))
        seen["views"].append([dataclasses.asdict(v) for v in views])
        yield index, images
def heartbeat(*values, real=lsdc.heartbeat):
    seen["names"].append([name for name, _ in now.net.named_parameters()])
    seen["weights"].append([w.detach().clone() for w in now.net.parameters()])
    seen["grads"].append([w.grad.clone() if w.requires_grad else None for w in now.net.parameters()])
    seen["lrs"].append(now.optimizer.param_groups[0]["lr"])
    seen["beats"].append(real(*values))
    return seen["beats"][-1]
def clustering_losses(net, views, labels, weight, number, step, args, real=lsdc.clustering_losses):
    seen["calls"].append((weight, number, step, None if labels is None else labels.tolist()))
    return real(net, views, labels, weight, number, step, args)
lsdc.begin, legacy.Loader.epoch, lsdc.heartbeat = begin, epoch, heartbeat
lsdc.clustering_losses = clustering_losses
try:
    lsdc.main()
finally:
    seen["last"] = [w.detach().clone() for w in now.net.parameters()]
    torch.save(seen, f"seen.{os.environ.get('RANK', 0)}")
"""


def seen_by(job, rank=0):
    return torch.load(job.folder / f"seen.{rank}", weights_only=True)


@functools.cache
def digits():
    """(train, test)"""
    return load_data("digits")


def write_digits(folder, first, count, classes=4):
    """So many digits of each of the first classes, from the `first`-th on, as files of 20 x 20 pixels."""
    pixels, labels = load_digits(return_X_y=True)
    for c in range(classes):
        chosen = pixels[labels == c][first : first + count].reshape(-1, 8, 8)

        def make(i, chosen=chosen):
            grey = Image.fromarray((chosen[i] * 15.9).astype(np.uint8)).resize(
                (20, 20), Image.Resampling.BILINEAR
            )
            return np.asarray(grey.convert("RGB"))

        write_images(folder / "abcdefghij"[c], count, make)


class Evil:
    """What runs code as soon as it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """Folders and files to point the script at, by name."""
    root, grey = tmp_path_factory.mktemp("places"), np.full((20, 20, 3), 90, np.uint8)
    write_digits(root / "few" / "train", 0, 15)
    write_digits(root / "few" / "val", 15, 5)
    write_digits(root / "train labelled" / "train", 0, 8)
    write_digits(root / "val labelled" / "val", 15, 5)
    for part in ("train labelled/val", "val labelled/train"):
        write_images(root / part, 30, size=20)
    write_images(root / "flat", 30, size=20)
    write_images(root / "same", 30, lambda i: grey)
    sizes = np.random.default_rng(0).integers(12, 40, (30, 2))
    write_images(root / "sizes", 30, lambda i: np.full((*sizes[i], 3), 8 * i, np.uint8))
    write_images(root / "mismatch" / "train" / "cat", 2)
    write_images(root / "mismatch" / "val" / "dog", 2)
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    x, y = load_digits(return_X_y=True)
    x, y, rng = x[:300].astype(np.float32) / 16, y[:300], np.random.default_rng(0)
    np.savez(root / "vectors.npz", features=x, labels=y)
    np.savez(root / "shuffled.npz", features=x, labels=rng.permutation(y))
    np.savez(root / "unlabelled.npz", features=x)
    np.savez(root / "small.npz", features=x[:50], labels=y[:50])
    np.savez(root / "alike.npz", features=np.tile(x[:1], (60, 1)), labels=y[:60])
    bad = np.where(np.arange(64) == 9, np.nan, x)
    evil = np.array([Evil(root / "pwned")] * 300, dtype=object)
    wrong = {
        "nan": {"features": bad},
        "infinite": {"features": np.where(np.arange(64) == 9, np.inf, x)},
        "too large": {"features": x.astype(np.float64) * 1e300},
        "complex": {"features": x + 1j},
        "words": {"features": np.array([["a", "b"]] * 300)},
        "flat vectors": {"features": x[0]},
        "images": {"features": x[:40].reshape(40, 8, 8)},
        "no rows": {"features": x[:0]},
        "no columns": {"features": x[:, :0]},
        "no features": {"data": x, "labels": y},
        "labels too few": {"features": x, "labels": y[:-1]},
        "labels too many": {"features": x, "labels": [*y, 0]},
        "labels of two": {"features": x, "labels": np.stack([y] * 2, 1)},
        "objects": {"features": evil.reshape(300, 1)},
        "label objects": {"features": x, "labels": evil},
    }
    for name, arrays in wrong.items():
        np.savez(root / f"{name}.npz", **arrays)
    (root / "empty.npz").touch()
    (root / "text.npz").write_text("not a zip")
    (root / "pickle.npz").write_bytes(pickle.dumps(Evil(root / "pwned")))
    whole = (root / "vectors.npz").read_bytes()
    (root / "cut.npz").write_bytes(whole[: len(whole) // 2])
    middle = len(whole) // 2
    (root / "flipped.npz").write_bytes(whole[:middle] + bytes([whole[middle] ^ 64]) + whole[middle + 1 :])
    names = {
        p.name.replace(" ", "_").removesuffix(".npz"): p for p in root.iterdir() if p.name != "empty.npz"
    }
    return SimpleNamespace(**names, root=root)


def flags_of(name, places):
    data, flags = RUNS[name]
    return [*(["--data", getattr(places, data)] if data else []), *flags]


@pytest.fixture(scope="module")
def learner(start):
    """A run that learns, on its way while other tests run."""
    return start(LEARN)


@pytest.fixture(scope="module")
def whole(start, places, learner):
    """Recorded runs from beginning to end without interruption, by name."""
    return two_at_once({name: lambda n=name: start(flags_of(n, places), RECORD).ok() for name in RUNS})


# --------------------------------------------------------------------------- what a run does


PLAN = {  # name: (images to learn from, RotNet's epochs and steps, those of clustering)
    "ricap": (60, 2, 3, 3, 3),
    "mixup": (80, 2, 4, 3, 5),
    "sne": (60, 0, 0, 3, 3),
    "digits": (1437, 1, 11, 3, 5),
}


@pytest.mark.parametrize("name", PLAN)
def test_images_are_visited_once_an_epoch(whole, name):
    """Whole batches of the images to learn from alone, another order each time; RotNet sees one view, clustering three."""
    seen, (n, *plan) = seen_by(whole[name]), PLAN[name]
    sizes = {"ricap": (20, 16), "mixup": (20, 16), "sne": (0, 16), "digits": (128, 256)}[name]
    at, orders = 0, []
    for epoch in range(plan[0] + plan[2]):
        stage = int(epoch >= plan[0])
        batches = seen["batches"][at : at + plan[1 + 2 * stage]]
        at += len(batches)
        assert [number for number, _, _ in batches] == [epoch] * plan[1 + 2 * stage]
        assert all(len(x) == (1, 3)[stage] and len(i) == sizes[stage] for _, i, x in batches)
        order = torch.cat([i for _, i, _ in batches])
        assert len(order.unique()) == len(order) and order.max() < n
        orders.append(order.tolist())
    assert at == len(seen["batches"]) == len(seen["beats"])
    assert len({tuple(order[:16]) for order in orders}) == len(orders)
    if name == "mixup":  # those of the test set, too
        assert max(map(max, orders)) >= 60
    for _, _, views in seen["batches"][-2:]:  # three crops of their own
        assert not torch.equal(views[0], views[1]) and not torch.equal(views[1], views[2])
        assert not torch.equal(views[0], views[2])


def test_crops_are_those_of_the_flags(whole, start):
    """Area and mirroring; with --pad crops out of a black frame instead."""
    for name, flip in (("ricap", 0), ("sne", 0.5)):
        for views in seen_by(whole[name])["views"]:
            assert all(v["area"] == (0.85, 1.0) and v["flip"] == flip and v["pad"] == 0 for v in views)
            assert not any(any(v["jitter"]) or v["grey"] or v["blur"] or v["solarise"] for v in views)
    flags = words("--data digits --pad 3 --batch-size 128 --workers 0 --out run")
    stop = "lsdc.heartbeat = lambda *values: (*[1.0] * len(values), 15)\ntry:\n"
    job = start(flags, RECORD.replace("try:\n", stop)).wait()
    assert job.code == 128 + 15, job.err
    (_, _, views), *_ = seen_by(job)["batches"]
    assert all(v["pad"] == 3 for v in seen_by(job)["views"][0])
    black = min(x.min().item() for x in views)
    frame = torch.stack([(x[:, 0, :3] <= black + 1e-6).all(2).any(1).float().mean() for x in views])
    assert (frame > 0.2).all() and frame.max() < 1  # some lie over the upper edge


def plain_step(w, g, state, t, lr, wd, kind):
    """Weights after one step of SGD, Nesterov's SGD or Adam, in double precision; state is (m, v)."""
    w, g = w.double(), g.double() + wd * w.double()
    m, v = state
    if kind == "adam":
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        return w - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + 1e-8), (m, v)
    m = 0.9 * m + g
    return w - lr * (g + 0.9 * m if kind == "nesterov" else m), (m, v)


RATES = {  # name: learning rates of RotNet's epochs, of clustering's; optimiser, decay
    "ricap": ([0.05, 0.01], [0.05, 0.005, 0.0005], "sgd", 0.001),
    "mixup": ([0.05, 0.01], [0.002, 0.0002, 0.00002], "adam", 0.001),
    "sne": ([], [0.05, 0.005, 0.0005], "sgd", 0.001),
    "digits": ([0.1], [0.1, 0.1, 0.1], "sgd", 1e-4),
}


@pytest.mark.parametrize("name", RATES)
def test_every_step_of_the_optimiser_follows_the_formulas(whole, name):
    """RotNet: Nesterov on all weights; clustering: SGD or Adam, new at its first step, on those not frozen."""
    seen, (_, *plan) = seen_by(whole[name]), PLAN[name]
    rotnet, clustering, kind, decay = RATES[name]
    first = plan[0] * plan[1]
    lrs = [lr for lr in rotnet for _ in range(plan[1])] + [lr for lr in clustering for _ in range(plan[3])]
    assert seen["lrs"] == pytest.approx(lrs)
    weights = [*seen["weights"], seen["last"]]
    for step, lr in enumerate(lrs):
        if step in (0, first):
            states = [(0.0, 0.0)] * len(weights[step])
        if step + 1 == first:  # rotnet.pt has what comes out of the last of RotNet's steps
            trunk = whole[name].state("rotnet.pt")["state_dict"]
            after = [trunk.get(n.removeprefix("trunk.")) for n in seen["names"][step]]
        else:
            after = weights[step + 1]
        largest = 0.0
        for i, (w, g, now) in enumerate(zip(weights[step], seen["grads"][step], after, strict=True)):
            if g is None:
                assert step >= first and torch.equal(w, now)
                continue
            how = (decay, kind) if step >= first else (5e-4, "nesterov")
            t = step - first + 1 if step >= first else step + 1
            want, states[i] = plain_step(w, g, states[i], t, lr, *how)
            if now is not None:
                torch.testing.assert_close(
                    now.double() - w, want - w, rtol=1e-3, atol=2e-2 * lr * (kind == "adam") + 1e-7
                )
                largest = max(largest, (now - w).abs().max().item())
        assert largest > 1e-6
    without = [n for n, g in zip(seen["names"][-1], seen["grads"][-1], strict=True) if g is None]
    frozen = [f"features.0.features.{i}.{part}" for i in (0, 1) for part in ("weight", "bias")]
    assert without == ([] if name == "sne" else frozen) or name == "sne"
    if name == "sne":
        assert without == frozen  # the recipe's one stage


@pytest.mark.parametrize("name", ["ricap", "mixup", "digits", "sne"])
def test_what_the_clustering_loss_is_given(whole, places, name):
    """w(t) by the epochs of clustering alone, a step's own random numbers, and the labels of the whole batch."""
    seen, (_, *plan) = seen_by(whole[name]), PLAN[name]
    highest = 5 if name == "digits" else 4
    train, test = load_data("digits" if name == "digits" else str(places.few))
    truth = torch.cat([train.labels, test.labels])
    batches = seen["batches"][plan[0] * plan[1] :]
    want = [(e, s) for e in range(plan[2]) for s in range(plan[3])]
    for (e, s), (weight, number, step, labels), (_, index, _) in zip(
        want, seen["calls"], batches, strict=True
    ):
        assert weight == pytest.approx(highest * math.exp(-5 * (1 - min(e, 2) / 2) ** 2))
        assert (number, step) == (plan[0] + e, s) and labels == truth[index].tolist()


# --------------------------------------------------------------------------- what a run leaves behind


@pytest.mark.parametrize("name", RUNS)
def test_log_holds_what_ran_every_epoch_and_the_result(whole, places, name):
    """First record, one an epoch, result last; what is scored with labels of three splits, of vectors one."""
    first, *records, last = whole[name].log()
    n, classes = {"digits": (1797, 10), "vectors": (300, 10)}.get(name, (80, 4))
    assert first["command"] == "lsdc.py " + " ".join(map(str, flags_of(name, places)))
    assert first["args"]["k"] == classes and first["processes"] == 1
    assert {"torch", "torchvision", "faiss"} <= set(first["versions"])
    data = "digits" if name == "digits" else str(getattr(places, RUNS[name][0]))
    assert first["data"] == {"name": data, "images": n, "classes": classes}
    turns, count = {"ricap": (2, 3), "mixup": (2, 3), "sne": (0, 3), "digits": (1, 3), "vectors": (0, 2)}[
        name
    ]
    assert [(r["phase"], r["epoch"]) for r in records] == [("rotnet", i + 1) for i in range(turns)] + [
        ("clustering", i + 1) for i in range(count)
    ]
    splits = {"train"} if name == "vectors" else {"train", "test", "both"}
    every, scored = first["args"]["score_every"], []
    for r in records:
        assert {"lr", "loss", "chance", "images_per_second", "seconds", "bad_files"} <= set(r)
        assert (
            r["bad_files"] == 0 and r["images_per_second"] > 0 and all(s >= 0 for s in r["seconds"].values())
        )
        if r["phase"] == "rotnet":
            assert (
                r["chance"] == pytest.approx(math.log(4)) and 0 < r["turns_right"] < 1 and "scores" not in r
            )
            continue
        assert 0 < r["similar"] < 1 and 0 < r["purity"] <= 1 and r["loss_consistency"] >= 0
        if r["epoch"] % every == 0 or r["epoch"] == count:
            scored.append(r)
            assert set(r["scores"]) == set(r["confident"]) == splits
            assert all(set(s) == {"nmi_labels", "acc_labels", "ari_labels"} for s in r["scores"].values())
            assert {"clusters", "empty", "smallest", "largest", "largest_share", "nmi_previous"} <= set(r)
        else:
            assert "scores" not in r and "largest" not in r
    assert [r["nmi_previous"] is None for r in scored] == [True] + [False] * (len(scored) - 1)
    names = {"untrained", "pretrained"} if turns else {"untrained"}
    assert set(last["result"]["baselines"]) == names and last["minutes"] >= 0
    assert all(set(b) == splits for b in last["result"]["baselines"].values())
    assert last["result"]["scores"] == records[-1]["scores"]  # the same network, looked at twice
    assert last["result"]["confident"] == records[-1]["confident"]


@pytest.mark.parametrize("name", ["ricap", "mixup", "sne", "digits"])
def test_losses_in_the_log_are_means_over_the_steps(whole, name):
    seen, (_, *plan) = seen_by(whole[name]), PLAN[name]
    records, at = epochs(whole[name].log()), 0
    for epoch, r in enumerate(records):
        stage = epoch >= plan[0]
        beats = np.mean(seen["beats"][at : at + plan[1 + 2 * stage]], 0)
        at += plan[1 + 2 * stage]
        if not stage:
            assert [r["loss"], r["turns_right"]] == pytest.approx(beats[:2].tolist())
            continue
        shown = [r[s] for s in ("loss", "loss_pairs", "loss_consistency", "similar")]
        assert [*shown, r["purity"] * r["similar"]] == pytest.approx(beats[:5].tolist())
        weight = (5 if name == "digits" else 4) * math.exp(-5 * (1 - min(epoch - plan[0], 2) / 2) ** 2)
        assert r["loss"] == pytest.approx(r["loss_pairs"] + weight * r["loss_consistency"], rel=1e-5)
        if name in ("ricap", "digits"):  # k nearest others of each of B images, and whose nearest they are
            k, b = (3, 16) if name == "ricap" else (8, 256)
            assert k / (b - 1) <= r["similar"] <= 2 * k / (b - 1)


def test_files_of_a_run(whole):
    """checkpoints, networks, one line per image, pictures; of vectors no picture; nothing else stays behind."""
    names = {".lock", "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "assignments.csv"}
    names |= {"confusion.json", "confusion.png"}
    assert {p.name for p in whole["digits"].run.iterdir()} == names | {"clusters.png", "rotnet.pt"}
    assert {p.name for p in whole["sne"].run.iterdir()} == names | {"clusters.png"}
    assert {p.name for p in whole["vectors"].run.iterdir()} == names
    for name in ("clusters.png", "confusion.png"):
        with Image.open(whole["digits"].run / name) as picture:
            assert min(picture.size) > 100 and np.asarray(picture).std() > 10
    for name, epoch in (("ricap", 5), ("sne", 3), ("digits", 4), ("vectors", 2)):
        state = whole[name].state()
        assert (state["epoch"], state["step"], state["finished"]) == (epoch, 0, True)
        assert all(x.isfinite().all() for x in state["net"].values())


def test_networks_a_run_leaves(whole):
    """backbone.pt is the trunk at the end, rotnet.pt that before clustering: frozen weights are equal in every bit."""
    for name, still in (("ricap", False), ("mixup", True), ("digits", False)):
        state, job = whole[name].state()["net"], whole[name]
        backbone_pt, rotnet_pt = (job.state(f"{n}.pt") for n in ("backbone", "rotnet"))
        trunk = {k.removeprefix("features.0."): v for k, v in state.items() if k.startswith("features.0.")}
        assert trunk.keys() == backbone_pt["state_dict"].keys() == rotnet_pt["state_dict"].keys()
        assert all(torch.equal(v, trunk[k]) for k, v in backbone_pt["state_dict"].items())
        moved = {k for k in trunk if not torch.equal(trunk[k], rotnet_pt["state_dict"][k])}
        first = {k for k in trunk if k.startswith(("features.0.", "features.1."))}
        statistics = {k for k in first if "running" in k or "batches" in k}
        assert moved == set(trunk) - first | (set() if still else statistics)
        for saved, method in ((backbone_pt, "lsdc-clustering"), (rotnet_pt, "lsdc-rotnet")):
            meta = saved["meta"]
            assert (meta["method"], meta["arch"], meta["sobel"], meta["norm"]) == (
                method,
                "lenet5",
                False,
                True,
            )
            assert (meta["image_size"], meta["resize"]) == (16, 16)
        net, meta = load_backbone(job.run / "rotnet.pt")
        assert net.embedding is None and net.dim == 84
    assert torch.equal(
        seen_by(whole["ricap"])["weights"][6][0], rotnet_of(whole["ricap"], "features.0.weight")
    )


def rotnet_of(job, name):
    return job.state("rotnet.pt")["state_dict"][name]


def splits_by_name(name, places):
    """(train, test) of a run; all vectors are the first."""
    if name == "vectors":
        return None
    return digits() if name in ("digits", "learner") else load_data(str(places.few))


def crops(data, size=16):
    return torch.cat(
        [x[:, 0] for _, x in Loader(data, 100, size, size, CPU, 0).fixed(torch.arange(len(data)))]
    )


def predictions(job, name, places):
    """(labels, clusters, their probabilities, {split: slice}) of all images by a run's last weights."""
    args = options([str(a) for a in job.log()[0]["command"].split()[1:]])
    if name == "vectors":
        with np.load(places.vectors) as file:
            x, labels = torch.from_numpy(file["features"]), file["labels"].tolist()
        splits = {"train": slice(0, len(x))}
    else:
        train, test = splits_by_name(name, places)
        x, labels = torch.cat([crops(train), crops(test)]), train.labels.tolist() + test.labels.tolist()
        splits = {"train": slice(0, len(train)), "test": slice(len(train), len(x)), "both": slice(0, len(x))}
    _, net = make_net(args, job.state()["trunk"])
    net.load_state_dict(job.state()["net"])
    net.eval()
    with torch.no_grad():
        top, found = net.classifier(F.relu(net.features[0](x))).softmax(1).max(1)
    return labels, found.tolist(), top, splits


def plain_table(labels, found, k):
    counts = Counter(zip(labels, found, strict=True))
    return np.array([[counts[c, f] for f in range(k)] for c in range(k)])


@pytest.mark.parametrize("name", ["ricap", "sne", "digits", "vectors", "learner"])
def test_the_result_is_what_the_weights_say_about_centre_crops(whole, learner, places, name):
    """assignments.csv, sizes, scores, confident images and the confusion matrix agree with each other."""
    job = learner.ok() if name == "learner" else whole[name]
    labels, found, top, splits = predictions(job, name, places)
    images, clusters = read_assignments(job.run / "assignments.csv")
    result, k = job.log()[-1]["result"], job.log()[0]["args"]["k"]
    assert sum(a != b for a, b in zip(found, clusters, strict=True)) < 3  # a tie
    if name in ("digits", "learner", "vectors"):
        assert images == [str(i) for i in range(300 if name == "vectors" else 1797)]
    else:
        assert [Path(i).parent.parent.name for i in images] == ["train"] * 60 + ["val"] * 20
        assert all(Path(i).is_file() for i in images)
    sizes = Counter(clusters)
    shown = [result[n] for n in ("clusters", "empty", "smallest", "largest")]
    assert shown == [len(sizes), k - len(sizes), min(sizes.values()), max(sizes.values())]
    assert result["largest_share"] == pytest.approx(max(sizes.values()) / len(clusters))
    assert set(result["scores"]) == set(result["confident"]) == set(splits)
    for split, part in splits.items():
        truth, here, sure = labels[part], clusters[part], top[part] > 0.9
        table = plain_table(truth, here, k)
        rows, columns = linear_sum_assignment(-table)
        got = result["scores"][split]
        assert got["acc_labels"] == pytest.approx(table[rows, columns].sum() / len(truth))
        assert got["nmi_labels"] == pytest.approx(plain_nmi(truth, here), abs=1e-9)
        assert got["ari_labels"] == pytest.approx(adjusted_rand_score(truth, here))
        got, near = result["confident"][split], 1.5 / len(truth)
        assert got["share"] == pytest.approx(sure.float().mean().item(), abs=near)
        assert ("accuracy" in got) == (got["share"] > 0)
        if sure.sum() > 20:
            class_of = dict(zip(columns, rows, strict=True))
            right = [class_of[f] == t for f, t, s in zip(here, truth, sure.tolist(), strict=True) if s]
            assert got["accuracy"] == pytest.approx(np.mean(right), abs=1.5 / len(right))
            assert got["accuracy"] > result["scores"][split]["acc_labels"]
    assert name != "learner" or result["confident"]["both"]["share"] > 0.05
    last = list(splits)[-1]
    confusion = json.loads((job.run / "confusion.json").read_text())
    order = confusion["clusters"]
    assert sorted(order) == list(range(k)) and confusion["confident_above"] == 0.9
    assert confusion["classes"] == [str(i) for i in range(10)] if k == 10 else ["a", "b", "c", "d"]
    table, sure = np.array(confusion["all"]), np.array(confusion["confident"])
    assert np.array_equal(table, plain_table(labels, clusters, k)[:, order])
    assert np.trace(table) == pytest.approx(result["scores"][last]["acc_labels"] * len(labels))
    assert (sure <= table).all() and sure.sum() == pytest.approx(
        result["confident"][last]["share"] * len(labels)
    )


def test_pictures_show_the_surest_images(whole, places):
    """The first row of clusters.png: of the largest cluster, the ten images of the highest probability."""
    _, found, top, _ = predictions(whole["digits"], "digits", places)
    largest = Counter(found).most_common(1)[0][0]
    members = [i for i, f in enumerate(found) if f == largest]
    best = sorted(members, key=lambda i: -top[i].item())[:10]
    train, test = digits()
    pixels = torch.cat([crops(train), crops(test)]) * train.std[0] + train.mean[0]
    with Image.open(whole["digits"].run / "clusters.png") as picture:
        shown = np.asarray(picture.convert("L")).astype(float) / 255
    for column, i in enumerate(best[:5]):
        tile = shown[2:18, 2 + 18 * column : 18 + 18 * column]
        assert np.abs(tile - pixels[i, 0].numpy()).max() < 0.02


@pytest.mark.parametrize("name", ["untrained", "pretrained"])
def test_baselines_are_k_means_of_the_features(whole, name):
    """Centroids from the training images, relu of the network as drawn (batch norm filled) or after RotNet."""
    train, test = digits()
    x, job = [crops(train), crops(test)], whole["digits"]
    if name == "pretrained":
        net, _ = load_backbone(job.run / "rotnet.pt")
    else:
        seen, net = seen_by(job), backbone("lenet5", 1, 16, norm=True)
        drawn = dict(zip(seen["names"][0], seen["weights"][0], strict=True))
        for n, w in net.named_parameters():
            w.data.copy_(drawn[f"trunk.{n}"])
        for m in net.modules():
            if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
                m.momentum = 1.0
        with torch.no_grad():
            net.train()(x[0][:256])
    with torch.no_grad():
        z = [F.relu(net.eval()(part)).numpy() for part in x]
    shown = job.log()[-1]["result"]["baselines"][name]
    found = [KMeans(10, n_init=1, init="random", random_state=s).fit(z[0]) for s in range(8)]
    for split, part, truth in (("train", z[0], train.labels), ("test", z[1], test.labels)):
        several = [plain_nmi(truth.tolist(), f.predict(part).tolist()) for f in found]
        assert min(several) - 0.04 <= shown[split]["nmi_labels"] <= max(several) + 0.04


def test_what_a_run_says(whole):
    """The data first, one line an epoch with its loss, what was learnt against the baselines, where it is."""
    lines = whole["digits"].out.splitlines()
    assert lines[0].startswith("data: digits") and "1437" in lines[0] and "recipe digits" in lines[0]
    shown = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[1] for line in shown] == ["1/1", "1/3", "2/3", "3/3"]
    for line, r in zip(shown, epochs(whole["digits"].log()), strict=True):
        assert r["phase"] in line and f"loss {r['loss']:.4f}" in line
        if "scores" in r:
            assert f"test ACC {100 * r['scores']['test']['acc_labels']:.1f}" in line
    result = whole["digits"].log()[-1]["result"]
    for split in ("train", "test", "both"):
        at = next(i for i, line in enumerate(lines) if line.startswith(f"{split},"))
        assert f"ACC {100 * result['scores'][split]['acc_labels']:.1f}" in lines[at]
        for i, name in enumerate(("untrained", "pretrained"), 1):
            assert name in lines[at + i]
            assert f"ACC {100 * result['baselines'][name][split]['acc_labels']:.1f}" in lines[at + i]
    assert "eval_linear.py run" in lines[-1] and whole["digits"].err == ""
    assert "eval_linear.py" not in whole["vectors"].out and whole["vectors"].err == ""


# --------------------------------------------------------------------------- the same command again


def assert_same(a, b, at="state"):
    """Dictionaries, lists, tensors and numbers, equal in every bit."""
    assert type(a) is type(b), at
    if isinstance(a, dict):
        assert a.keys() == b.keys(), at
        for k in a:
            assert_same(a[k], b[k], f"{at} {k}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), at
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            assert_same(x, y, f"{at} {i}")
    else:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, at


def same(a, b):
    """Two jobs ended with the same checkpoint, networks, log and files, bit for bit."""
    x, y = a.state(), b.state()
    for state in (x, y):
        assert state.pop("minutes") >= 0 and state.pop("log_bytes") > 0
        assert len(state["optimizer"]["state"]) > 0
    assert_same(x, y)
    for name in ("assignments.csv", "clusters.png", "confusion.json", "confusion.png"):
        assert (a.run / name).exists() == (b.run / name).exists(), name
        if (a.run / name).exists():
            assert (a.run / name).read_bytes() == (b.run / name).read_bytes(), name
    for name in ("backbone.pt", "rotnet.pt"):
        assert (a.run / name).exists() == (b.run / name).exists(), name
        if (a.run / name).exists():
            assert_same(a.state(name), b.state(name), name)
    assert without_times(a.log()) == without_times(b.log())
    assert a.log()[-1]["result"] == b.log()[-1]["result"]


def test_the_seed_decides_the_result(start, whole, places):
    """Same seed, same bits, watched or not, however many workers; another seed, other weights and images."""
    flags = flags_of("ricap", places)
    found = two_at_once(
        {
            "again": lambda: start([*flags, "--workers", "1", "--save-every", "3"]).ok(),
            "other": lambda: start([*flags, "--seed", "1"], RECORD).ok(),
        }
    )
    same(found["again"], whole["ricap"])
    a, b = seen_by(whole["ricap"]), seen_by(found["other"])
    assert not torch.equal(a["weights"][0][0], b["weights"][0][0])
    assert not torch.equal(a["batches"][0][1], b["batches"][0][1])
    pair = [without_times(job.log())[-1]["loss"] for job in (whole["ricap"], found["other"])]
    assert pair[0] != pair[1]


def test_a_finished_run_says_so_and_changes_nothing(start, whole, places):
    job = copied(start, whole["ricap"], flags_of("ricap", places), "again")
    assert job.code == 0 and "finished after 3 epochs" in job.out and job.err == ""
    assert contents(job.run) == contents(whole["ricap"].run)


def test_overwrite_starts_afresh(start, whole, places):
    """Over another finished run: the same as in an empty folder, nothing of the other is left."""
    flags = [*flags_of("sne", places), "--overwrite"]
    job = copied(start, whole["ricap"], flags, "over").ok()
    same(job, whole["sne"])
    assert not (job.run / "rotnet.pt").exists() and sum("command" in r for r in job.log()) == 1


# name: (run, where it is killed). With "ricap": 3 steps in each of 2 epochs of RotNet and of 3 of clustering.
STEP = ("lsdc", "heartbeat")
CRASHES = {
    "in RotNet": ("ricap", trap(*STEP, 5)),
    "while RotNet's features are clustered": ("ricap", trap("lsdc", "kmeans", 2)),
    "where clustering begins": ("ricap", trap("lsdc", "begin", 2)),
    "while scoring": ("ricap", trap("lsdc", "predict", 2)),
    "before the last checkpoint": ("ricap", trap("legacy.Run", "save", 6)),
    "Adam": ("mixup", trap(*STEP, 20)),
    "vectors": ("vectors", trap(*STEP, 6)),
}


@pytest.fixture(scope="module")
def crashed(start, places):
    """Every crash, then the same command again: name -> (exit code, where it stopped, resumed job)."""

    def crash(flags, code):
        job = start(flags, code).wait()
        state = job.state() if (job.run / "checkpoint.pt").exists() else {"epoch": None}
        return job.code, state["epoch"], start(flags, folder=job.folder).wait()

    work = {name: lambda r=r, c=c: crash(flags_of(r, places), c) for name, (r, c) in CRASHES.items()}
    return two_at_once(work)


@pytest.mark.parametrize("name", CRASHES)
def test_a_run_that_was_killed_ends_as_if_nothing_had_happened(crashed, whole, name):
    """The same command goes on from the last epoch's end, bit for bit."""
    code, epoch, resumed = crashed[name]
    assert code == -9 and resumed.code == 0, resumed.err
    same(resumed, whole[CRASHES[name][0]])
    assert sum("resumed" in r for r in resumed.log()) == (epoch is not None)


# The script, with NaN images in the second step of an epoch.
POISON = """
import legacy, lsdc
def epoch(self, number, *a, real=legacy.Loader.epoch, **k):
    for step, (index, views) in enumerate(real(self, number, *a, **k)):
        yield index, [v * float("nan") if number == {epoch} and step == 1 else v for v in views]
legacy.Loader.epoch = epoch
lsdc.main()
"""


@pytest.mark.parametrize("epoch", [1, 3])
def test_a_nan_leaves_the_checkpoint_before_it(start, whole, places, epoch):
    """Exit code 1, one line, in either stage; no weight took it in, and going on reaches the usual end."""
    job = start(flags_of("ricap", places), POISON.format(epoch=epoch)).wait()
    one_line(job, 1)
    state = job.state()
    assert (state["epoch"], state["step"]) == (epoch, 0)
    assert all(x.isfinite().all() for x in state["net"].values())
    same(start(flags_of("ricap", places), folder=job.folder).ok(), whole["ricap"])


@pytest.mark.parametrize("flag,epoch", [("--lr", 2), ("--pretrain-lr", None)])
def test_a_learning_rate_that_blows_up_ends_in_one_line(start, places, flag, epoch):
    """In the stage it belongs to; what was learnt before it is kept."""
    job = start([*flags_of("ricap", places), flag, "1e30"]).wait()
    one_line(job, 1)
    assert "--lr" in job.err and (job.run / "checkpoint.pt").exists() == (epoch is not None)
    if epoch:
        assert job.state()["epoch"] == epoch and all(x.isfinite().all() for x in job.state()["net"].values())


# --------------------------------------------------------------------------- labels are for reporting

RELABEL = """
import torch, lsdc
def load_data(*a, real=lsdc.load_data):
    parts = real(*a)
    for part in parts:
        part.labels = {labels}
    return parts
lsdc.load_data = load_data
lsdc.main()
"""


def test_labels_are_never_used_for_training(start, whole, places):
    """Moved among the images, or left out: weights, losses and clusters are the same in every bit, scores are not."""
    work = {
        "moved": lambda: start(flags_of("ricap", places), RELABEL.format(labels="part.labels.roll(7)")).ok(),
        "none": lambda: start(flags_of("ricap", places), RELABEL.format(labels="None")).ok(),
        "shuffled": lambda: start(["--data", places.shuffled, *VECTORS]).ok(),
        "unlabelled": lambda: start(["--data", places.unlabelled, *VECTORS]).ok(),
    }
    found = two_at_once(work)
    for name, job in found.items():
        other = whole["ricap" if name in ("moved", "none") else "vectors"]
        assert_same(job.state()["net"], other.state()["net"], name)
        assert_same(job.state()["optimizer"], other.state()["optimizer"], name)
        assert (job.run / "assignments.csv").read_bytes() == (other.run / "assignments.csv").read_bytes()
        for a, b in zip(epochs(job.log()), epochs(other.log()), strict=True):
            assert a["loss"] == b["loss"] and a.get("similar") == b.get("similar")
            if "purity" in b:
                assert (a.get("purity") != b["purity"]) and ("purity" in a) == (name in ("moved", "shuffled"))
        result, usual = job.log()[-1]["result"], other.log()[-1]["result"]
        assert result["scores"] != usual["scores"] and (result["scores"] == {}) == (
            name in ("none", "unlabelled")
        )


# --------------------------------------------------------------------------- several processes

GENTLE = words("--lr 0.01 --pretrain-lr 0.01")


@pytest.fixture(scope="module")
def several(start, places):
    """Recorded runs on one and two processes, at a moderate learning rate: neighbours must not change sides."""
    flags = {
        ("ricap", 1): [*flags_of("ricap", places), *GENTLE],
        ("mixup", 1): [*flags_of("mixup", places), *GENTLE, "--optimizer", "sgd", "--labeling", "knn"],
        ("none", 1): [*flags_of("sne", places), *GENTLE],
        ("vectors", 1): [*flags_of("vectors", places), *words("--lr 0.01 --optimizer sgd --mix mixup")],
    }
    flags |= {(name, 2): f for (name, _), f in flags.items()}
    return two_at_once({k: lambda f=f, k=k: start(f, RECORD, world=k[1]).ok() for k, f in flags.items()})


@pytest.mark.parametrize("name", ["ricap", "mixup", "none", "vectors"])
def test_two_processes_learn_what_one_learns(several, name):
    """Gradients of every step, weights to a hundredth of their way, batch norm, labels, losses, files.

    Sums in another order differ in the seventh digit, and gradients with them, but where a unit lies as close
    to the ReLU's corner as that: then one image more or less counts in one of hundreds of units, at most in
    two of the steps here.
    """
    one, both = several[name, 1], several[name, 2]
    x, y = seen_by(both), seen_by(one)
    assert len(x["grads"]) == len(y["grads"]) >= 8
    worst = []
    for a, b in zip(x["grads"], y["grads"], strict=True):
        assert [p is None for p in a] == [q is None for q in b]
        pairs = [(p, q, q.abs().max()) for p, q in zip(a, b, strict=True) if q is not None]
        # a bias before batch norm has no gradient to speak of
        worst.append(max(((p - q).abs().max() / top).item() for p, q, top in pairs if top > 1e-6))
    assert sum(d > 2e-4 for d in worst) <= 2 and max(worst) < 0.1, worst
    assert max(g.abs().max() for g in y["grads"][-1] if g is not None) > 1e-3
    for a, b, c in zip(x["last"], y["last"], y["weights"][-6], strict=True):
        way = (b - c).abs().max().item()
        torch.testing.assert_close(a, b, rtol=0, atol=0.01 * way + 2e-6)
    a, b = both.state()["net"], one.state()["net"]
    for k in b:
        torch.testing.assert_close(a[k], b[k], rtol=1e-3, atol=1e-4, msg=k)
    for p, q in zip(epochs(both.log()), epochs(one.log()), strict=True):
        assert p.keys() == q.keys() and p.get("scores") == q.get("scores")
        for term in {"loss", "loss_pairs", "loss_consistency", "similar", "purity", "turns_right"} & q.keys():
            assert p[term] == pytest.approx(q[term], rel=1e-4, abs=1e-7), term
    assert both.log()[-1]["result"]["baselines"] == one.log()[-1]["result"]["baselines"]
    assert both.log()[0]["processes"] == 2 and both.out.count("epoch   1/3") == one.out.count("epoch   1/3")
    assert (one.run / "assignments.csv").read_bytes() == (both.run / "assignments.csv").read_bytes()


@pytest.mark.parametrize("name", ["ricap", "mixup"])
def test_two_processes_keep_the_same_weights_and_see_their_own_images(several, name):
    """Weights alike in every bit after every step; halves of one process's batches; everyone's labels on both."""
    a, b, one = seen_by(several[name, 2], 0), seen_by(several[name, 2], 1), seen_by(several[name, 1])
    for x, y in zip([*a["weights"], a["last"]], [*b["weights"], b["last"]], strict=True):
        assert all(torch.equal(p, q) for p, q in zip(x, y, strict=True))
    for (_, i, v), (_, j, w), (_, k, u) in zip(a["batches"], b["batches"], one["batches"], strict=True):
        assert torch.equal(torch.cat([i, j]), k) and len(i) == len(j)
        assert all(torch.equal(torch.cat([p, q]), r) for p, q, r in zip(v, w, u, strict=True))
    assert a["calls"] == b["calls"] == one["calls"] and len(a["calls"]) >= 9


def test_two_processes_stop_together_and_go_on(start, several, places):
    """A signal to one, a NaN on one, a mistake in the command: both end alike, nobody hangs."""
    flags = [*flags_of("ricap", places), *GENTLE]
    one_alone = "calls == n and legacy.rank() == 1"
    nan_on_one = POISON.format(epoch=3).replace("step == 1", "step == 1 and legacy.rank() == 1")
    mistakes = {
        "uneven": [*flags, "--batch-size", "15"],
        "k": [*flags, "--k", "61"],
        "stages": [*flags, "--freeze-stages", "9", "--pretrain", "none"],
        "file": [*flags, "--backbone", places.file],
        "nan in a file": ["--data", places.nan, *VECTORS],
    }
    work = {n: lambda f=f: start(f, world=2).wait(60) for n, f in mistakes.items()}
    for name, step in (("signal in RotNet", 5), ("signal", 11)):
        code = trap(*STEP, step, "SIGTERM").replace("calls == n", one_alone)
        work[name] = lambda c=code: start(flags, c, world=2).wait(60)
    work["nan"] = lambda: start(flags, nan_on_one, world=2).wait(60)
    found = two_at_once(work)
    codes = {n: [2, 2] for n in mistakes} | {
        "nan": [1, 1],
        "signal": [143, 143],
        "signal in RotNet": [143, 143],
    }
    assert {name: job.codes for name, job in found.items()} == codes
    for name in (*mistakes, "nan"):
        assert len(found[name].err.splitlines()) == 1, found[name].err
    for name, at in (("signal in RotNet", (1, 2)), ("signal", (3, 2))):
        assert (found[name].state()["epoch"], found[name].state()["step"]) == at
        same(start(flags, folder=found[name].folder, world=2).ok(), several["ricap", 2])


# --------------------------------------------------------------------------- a network from elsewhere


@pytest.fixture(scope="module")
def networks(tmp_path_factory, whole, places):
    """Files for --backbone, by name."""
    root = tmp_path_factory.mktemp("networks")
    data = Images("some", None, [], None, [], (0.5,) * 3, (0.2,) * 3)
    torch.manual_seed(0)
    kinds = {
        "embedded": ("lenet5", {"norm": True}, nn.Linear(84, 8)),
        "plain": ("lenet5", {}, None),
        "sobel": ("resnet18", {"sobel": True}, None),
    }
    for name, (arch, kind, embedding) in kinds.items():
        net = backbone(arch, 3, 16, **kind)
        save_backbone(root / f"{name}.pt", net, arch, 16, 16, "sobel" in kind, data, name, embedding)
    good = (whole["ricap"].run / "rotnet.pt").read_bytes()
    (root / "damaged.pt").write_bytes(good[:-1000] + bytes([good[-1000] ^ 1]) + good[-999:])
    (root / "cut.pt").write_bytes(good[: len(good) // 2])
    (root / "empty.pt").touch()
    (root / "evil.pt").write_bytes(pickle.dumps(Evil(root / "pwned")))
    shutil.copy(whole["ricap"].run / "checkpoint.pt", root / "checkpoint.pt")
    return SimpleNamespace(root=root, rotnet=whole["ricap"].run / "rotnet.pt", run=whole["ricap"].run)


FROM = {  # name: (file, more flags, prefix of its weights in the network)
    "its own rotnet.pt": ("rotnet", []),
    "a run folder": ("run", []),
    "an embedding": ("root/embedded.pt", []),
    "without batch norm": ("root/plain.pt", []),
    "a filtered ResNet": ("root/sobel.pt", words("--arch resnet18 --epochs 1 --freeze-stages 3 --mix mixup")),
}


@pytest.fixture(scope="module")
def continued(start, networks, places):
    def file(path):
        return networks.root / path.removeprefix("root/") if "/" in path else getattr(networks, path)

    work = {
        name: lambda p=path, m=more: start(
            [*flags_of("ricap", places), "--backbone", file(p), *m], RECORD
        ).wait()
        for name, (path, more) in FROM.items()
    }
    return two_at_once(work), {name: file(path) for name, (path, _) in FROM.items()}


@pytest.mark.parametrize("name", FROM)
def test_clustering_starts_from_a_given_network(continued, name):
    """RotNet is left out; the first step finds the file's weights; its first stages stay; any method's file will do."""
    job, path = continued[0][name].ok(), continued[1][name]
    path = path / "backbone.pt" if path.is_dir() else path
    saved = torch.load(path, weights_only=True)["state_dict"]
    seen, records = seen_by(job), epochs(job.log())
    assert {r["phase"] for r in records} == {"clustering"} and not (job.run / "rotnet.pt").exists()
    assert set(job.log()[-1]["result"]["baselines"]) == {"pretrained"}
    first = dict(zip(seen["names"][0], seen["weights"][0], strict=True))
    trunk = {k.removeprefix("features.0."): w for k, w in first.items() if k.startswith("features.0.")}
    assert len(trunk) > 5 and all(torch.equal(w, saved[k]) for k, w in trunk.items())
    end = job.state()["net"]
    still = (
        ("conv1", "bn1", "layer1", "layer2", "layer3") if "ResNet" in name else ("features.0.", "features.1.")
    )
    moved = {k for k in trunk if not torch.equal(end[f"features.0.{k}"], saved[k])}
    assert moved == {k for k in trunk if not k.startswith(still)}
    meta, given = (torch.load(f, weights_only=True)["meta"] for f in (job.run / "backbone.pt", path))
    assert (meta["mean"], meta["std"]) == (given["mean"], given["std"])
    assert meta["sobel"] == ("ResNet" in name) and meta["method"] == "lsdc-clustering"
    load_backbone(job.run)


def test_images_are_normalised_as_the_given_networks_were(continued):
    """The same crops, by its own file's mean and deviation: 0.5 and 0.2, or ImageNet's, as files otherwise are."""
    a, b = (seen_by(continued[0][n])["batches"][0][2][0] for n in ("without batch norm", "its own rotnet.pt"))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    torch.testing.assert_close(a * 0.2 + 0.5, b * std + mean, atol=1e-5, rtol=0)
    assert (a - b).abs().max() > 0.1


def test_a_network_from_ones_own_rotnet_scores_as_it_did(continued, whole):
    """k-means on its features is that of the run that made it."""
    a = continued[0]["its own rotnet.pt"].log()[-1]["result"]["baselines"]["pretrained"]
    assert a == whole["ricap"].log()[-1]["result"]["baselines"]["pretrained"]


# --------------------------------------------------------------------------- mistakes


def from_file(name, *more):
    return lambda p, n: ["--data", p.few, *FEW, "--backbone", n.root / f"{name}.pt", *more]


def npz(name):
    return lambda p, n: ["--data", p.root / f"{name}.npz", *VECTORS]


MISTAKES = {  # name: (arguments as a function of places and networks, words that the message must hold)
    "k larger than N": (lambda p, n: ["--data", p.few, *FEW, "--k", "61"], ["--k 61", "60"]),
    "batch larger than N": (
        lambda p, n: ["--data", p.few, *FEW, "--batch-size", "61"],
        ["--batch-size 61", "60"],
    ),
    "RotNet's batch larger than N": (
        lambda p, n: ["--data", p.few, *FEW, "--pretrain", "rotnet", "--pretrain-batch-size", "61"],
        ["--pretrain-batch-size 61", "60"],
    ),
    "more stages than there are": (
        lambda p, n: ["--data", p.few, *FEW, "--freeze-stages", "3"],
        ["--freeze-stages 3", "2"],
    ),
    "more stages than there are, after RotNet": (
        lambda p, n: ["--data", p.few, *FEW, "--freeze-stages", "3", "--pretrain", "rotnet"],
        ["--freeze-stages 3", "2"],
    ),
    "unknown data": (lambda p, n: ["--data", "cifar"], ["cifar", "cifar10", "digits"]),
    "missing folder": (lambda p, n: ["--data", p.root / "none"], ["none", "no such folder"]),
    "empty folder": (lambda p, n: ["--data", p.root / "empty"], ["empty", "no images"]),
    "a file for a folder": (lambda p, n: ["--data", p.file], ["file"]),
    "classes differ": (lambda p, n: ["--data", p.mismatch, *FEW], ["mismatch", "cat", "dog"]),
    "image too small": (
        lambda p, n: ["--data", "digits", "--image-size", "8", "--pad", "0"],
        ["--image-size"],
    ),
    "padding of files": (lambda p, n: ["--data", p.sizes, *FEW, "--pad", "4"], ["--pad"]),
    "padding of vectors": (lambda p, n: ["--data", p.vectors, *VECTORS, "--pad", "4"], ["--pad"]),
    "out below a file": (
        lambda p, n: ["--data", "digits", "--out", p.file / "run"],
        ["--out", "cannot write"],
    ),
    "out of another k": (
        lambda p, n: [*flags_of("ricap", p), "--k", "3", "--out", n.run],
        ["k 4 -> 3", "--overwrite"],
    ),
    "out of another labeling": (
        lambda p, n: [*flags_of("ricap", p), "--labeling", "sne", "--out", n.run],
        ["labeling knn -> sne"],
    ),
    "out of another mixture": (
        lambda p, n: [*flags_of("ricap", p), "--mix", "none", "--lr", "1", "--out", n.run],
        ["mix ricap -> none", "lr 0.05 -> 1"],
    ),
    "out of more epochs": (
        lambda p, n: [*flags_of("ricap", p), "--pretrain-epochs", "3", "--out", n.run],
        ["pretrain_epochs 2 -> 3"],
    ),
    "out without RotNet": (
        lambda p, n: [*flags_of("ricap", p), "--backbone", n.rotnet, "--out", n.run],
        ["backbone", "pretrain"],
    ),
    "backbone missing": (from_file("none"), ["--backbone", "none.pt", "no such file"]),
    "backbone damaged": (from_file("damaged"), ["--backbone", "damaged.pt"]),
    "backbone cut": (from_file("cut"), ["--backbone", "cut.pt"]),
    "backbone empty": (from_file("empty"), ["--backbone", "empty.pt"]),
    "backbone that would run code": (from_file("evil"), ["--backbone", "evil.pt"]),
    "a checkpoint for a backbone": (from_file("checkpoint"), ["--backbone", "checkpoint.pt"]),
    "backbone of another network": (from_file("sobel"), ["--backbone", "sobel.pt", "resnet18", "lenet5"]),
    "backbone of another size": (
        from_file("plain", "--image-size", "20", "--resize", "20"),
        ["--backbone", "plain.pt", "16", "20"],
    ),
    "backbone of other channels": (
        lambda p, n: ["--data", "digits", *FEW, "--k", "10", "--backbone", n.root / "plain.pt"],
        ["--backbone", "plain.pt", "channels"],
    ),
    "no vectors": (npz("none"), ["none.npz"]),
    "vectors with NaN": (npz("nan"), ["nan.npz", "NaN"]),
    "vectors with infinity": (npz("infinite"), ["infinite.npz"]),
    "vectors too large for float32": (npz("too large"), ["too large.npz", "infinite"]),
    "complex vectors": (npz("complex"), ["complex.npz"]),
    "words for vectors": (npz("words"), ["words.npz"]),
    "one vector": (npz("flat vectors"), ["flat vectors.npz", "(N, D)"]),
    "images for vectors": (npz("images"), ["images.npz", "(N, D)"]),
    "no rows": (npz("no rows"), ["no rows.npz"]),
    "no columns": (npz("no columns"), ["no columns.npz"]),
    "no features": (npz("no features"), ["no features.npz", "features"]),
    "labels too few": (npz("labels too few"), ["labels too few.npz", "labels", "300"]),
    "labels too many": (npz("labels too many"), ["labels too many.npz", "(300,)", "301"]),
    "labels of two": (npz("labels of two"), ["labels of two.npz", "(300,)", "(300, 2)"]),
    "objects": (npz("objects"), ["objects.npz"]),
    "label objects": (npz("label objects"), ["label objects.npz"]),
    "a pickle": (npz("pickle"), ["pickle.npz"]),
    "text": (npz("text"), ["text.npz"]),
    "nothing": (npz("empty"), ["empty.npz"]),
    "half a zip": (npz("cut"), ["cut.npz"]),
    "a flipped bit": (npz("flipped"), ["flipped.npz"]),
    "a batch of more vectors than there are": (npz("small"), ["--batch-size 64", "50"]),
    "no cuda here": (lambda p, n: ["--device", "cuda"], ["--device", "cuda"]),
}


@pytest.fixture(scope="module")
def mistaken(start, places, networks):
    kept = contents(networks.run)
    work = {
        name: lambda a=arguments: start(a(places, networks)).wait()
        for name, (arguments, _) in MISTAKES.items()
    }
    return two_at_once(work, "out of"), kept


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_exit_code_2_and_one_line(mistaken, name):
    """Before anything is learnt; the line names the flag or the thing, nothing is a traceback."""
    job = mistaken[0][name]
    line = one_line(job)
    assert not [word for word in MISTAKES[name][1] if word not in line], job.err
    assert "loss" not in job.out, "only after an epoch"


def test_refused_files_run_no_code_and_refused_run_folders_stay(mistaken, places, networks):
    assert not (places.root / "pwned").exists() and not (networks.root / "pwned").exists()
    assert contents(networks.run) == mistaken[1]
    with open(places.pickle, "rb") as file:
        pickle.load(file)
    assert (places.root / "pwned").is_dir()  # it would have


# --------------------------------------------------------------------------- odd data

SMALL = [
    *IMAGES,
    *words("--recipe digits --k 3 --batch-size 8 --neighbours 2 --epochs 2 --lr 0.05 --ramp-up 1"),
]
SMALL += words("--pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 8 --score-every 1 --lr-steps")
TINY = [*VECTORS, *words("--batch-size 20 --k 3 --epochs 2 --neighbours 2")]
ODD = {  # name: (data, flags, splits with labels, warnings)
    "no labels": ("flat", SMALL, "", ""),
    "labels in both": ("few", [*SMALL, "--k", "4"], "train test both", ""),
    "another number of clusters": ("few", SMALL, "train test both", "4 classes"),
    "labels in train alone": ("train_labelled", [*SMALL, "--k", "4"], "train", ""),
    "labels in val alone": ("val_labelled", [*SMALL, "--k", "4", "--train-on", "both"], "test", ""),
    "labels in train alone, learning from both": (
        "train_labelled",
        [*SMALL, *words("--k 4 --train-on both")],
        "train",
        "",
    ),
    "images of all sizes, two workers": ("sizes", [*SMALL, "--workers", "2"], "", ""),
    "all images equal": ("same", SMALL, "", ""),
    "all images equal, cosine": ("same", [*SMALL, "--labeling", "cosine", "--mix", "ricap"], "", ""),
    "all images equal, sne": ("same", [*SMALL, "--labeling", "sne"], "", ""),
    "nobody similar": ("flat", [*SMALL, *words("--labeling sne --sne-threshold 1")], "", ""),
    "all similar": ("flat", [*SMALL, *words("--labeling cosine --cosine-threshold -1")], "", ""),
    "k is 1": ("flat", [*SMALL, "--k", "1"], "", ""),
    "k is N": ("flat", [*SMALL, *words("--k 30 --neighbours 1")], "", "neighbours"),
    "one batch": ("flat", [*SMALL, *words("--batch-size 30 --pretrain-batch-size 30")], "", ""),
    "batches of two": (
        "flat",
        [*SMALL, *words("--batch-size 2 --neighbours 1 --pretrain-batch-size 1")],
        "",
        "neighbours",
    ),
    "everybody a neighbour": ("flat", [*SMALL, "--neighbours", "7"], "", "neighbours"),
    "no consistency": ("flat", [*SMALL, *words("--consistency 0 --ramp-up 0 --mix none")], "", ""),
    "all stages frozen": ("flat", [*SMALL, *words("--freeze-stages 2 --freeze-bn")], "", ""),
    "none frozen": ("flat", [*SMALL, *words("--freeze-stages 0 --classifier-layers 2")], "", ""),
    "bf16": ("flat", [*SMALL, "--amp", "--mix", "ricap"], "", ""),
    "no learning": ("flat", [*SMALL, "--lr", "0", "--pretrain-lr", "0"], "", ""),
    "ResNet": (
        "flat",
        [
            *SMALL,
            *words(
                "--arch resnet18 --freeze-stages 3 --image-size 8 --resize 8 --epochs 1 --mix ricap --flip"
            ),
        ],
        "",
        "",
    ),
    "vectors, no labels": ("unlabelled", [*TINY, *words("--batch-size 100 --epochs 1")], "", ""),
    "vectors, two frozen": ("small", [*TINY, *words("--k 10 --freeze-stages 2 --mix mixup")], "train", ""),
    "vectors, all equal": ("alike", [*TINY, "--k", "10"], "train", ""),
    "vectors, one cluster": ("small", [*TINY, "--k", "1"], "train", "classes"),
    "vectors, patience": ("small", [*TINY, *words("--lr-steps 1 7")], "train", "--lr-steps 7"),
}


@pytest.fixture(scope="module")
def odd(start, places):
    work = {
        n: lambda d=d, f=f: start(["--data", getattr(places, d), *f]).wait() for n, (d, f, *_) in ODD.items()
    }
    return two_at_once(work)


@pytest.mark.parametrize("name", ODD)
def test_odd_data_runs_and_every_number_is_finite(odd, name):
    """Scores of splits with labels, accuracy for as many clusters as classes, an assignment for each image."""
    job, (_, _, labelled, warning) = odd[name].ok(), ODD[name]
    first, *records, last = job.log()
    args, n = first["args"], first["data"]["images"]
    assert len(records) == args["epochs"] + args["pretrain_epochs"] and job.err == ""
    purity = "train" in labelled and "learning from both" not in name
    clustering = [r for r in records if r["phase"] == "clustering"]
    for i, r in enumerate(clustering):
        lost = {"nmi_previous"} if i == 0 else set()
        assert {k for k, v in r.items() if v is None} == lost | (
            {"purity"} if purity and not r["similar"] else set()
        )
        assert ("purity" in r) == purity and set(r["scores"]) == set(labelled.split())
        assert all("acc_labels" in s for s in r["scores"].values())
        assert r["loss_pairs"] > -1e-6 and r["loss_consistency"] >= 0 and 0 <= r["similar"] <= 1
    assert all(isinstance(r["loss"], float) for r in records)
    state = job.state()
    assert all(x.isfinite().all() for x in state["net"].values()) and state["finished"]
    images, clusters = read_assignments(job.run / "assignments.csv")
    assert len(images) == len(set(images)) == n and set(clusters) <= set(range(args["k"]))
    assert (job.run / "confusion.json").exists() == bool(labelled)
    if "vectors" not in name:
        assert (job.run / "clusters.png").stat().st_size > 100
        assert ("--data LABELLED" in job.out) != bool(labelled)
    said = [
        line
        for line in job.out.splitlines()
        if ("WARNING" in line or "note:" in line) and "trivial" not in line
    ]
    if warning:
        assert any(warning in line for line in said), job.out
    by_similar = {"nobody similar": 0, "all similar": 1, "everybody a neighbour": 1}
    if name in by_similar:
        assert {r["similar"] for r in clustering} == {by_similar[name]}
    if name in ("all images equal, cosine", "all images equal, sne"):
        assert {r["similar"] for r in clustering} == {1}
    if name in ("k is 1", "vectors, one cluster"):
        assert set(clusters) == {0} and last["result"]["confident"]["train"]["share"] == 1


def test_no_learning_changes_no_weight(odd, start, places):
    """A learning rate of 0 ends with the weights that were drawn; batch norm alone has moved."""
    job = odd["no learning"]
    _, net = make_net(options(job.log()[0]["command"].split()[1:]), job.state()["trunk"])
    end, start_of_all = job.state()["net"], job.state("rotnet.pt")["state_dict"]
    names = {k for k, _ in net.named_parameters() if k.startswith("features.0.")}
    assert len(names) > 10
    assert all(torch.equal(end[k], start_of_all[k.removeprefix("features.0.")]) for k in names)


# --------------------------------------------------------------------------- learning and evaluation


def test_digits_are_learnt(learner):
    """Test images are told apart better than by k-means on the untrained network's features."""
    result = learner.ok().log()[-1]["result"]
    reached, untrained = result["scores"]["test"], result["baselines"]["untrained"]["test"]
    assert untrained["acc_labels"] < 0.65
    assert reached["acc_labels"] > max(0.72, untrained["acc_labels"] + 0.15)
    assert reached["nmi_labels"] > max(0.72, untrained["nmi_labels"] + 0.15)
    records = epochs(learner.log())
    assert records[-1]["purity"] > records[0]["purity"] + 0.1
    assert records[-1]["loss_pairs"] < records[0]["loss_pairs"]


def test_rotnet_learns_turns(whole):
    """After one epoch on the digits most turns are found, where guessing finds a quarter."""
    first = epochs(whole["digits"].log())[0]
    assert first["turns_right"] > 0.35 and first["loss"] < math.log(4) - 0.1


def test_a_run_can_be_evaluated(start, whole, places):
    """eval_linear.py reads the run folder and rotnet.pt and writes its numbers beside them."""
    script = ROOT / "eval_linear.py"
    for what, out in ((whole["digits"].run, "run"), (whole["digits"].run / "rotnet.pt", "other")):
        flags = words("--data digits --epochs 1 --device cpu --batch-size 256 --held-out 0 --wd 0 --out") + [
            out
        ]
        job = start([what, *flags], plain(script)).ok()
        numbers = json.loads((job.folder / out / "eval_linear-digits.json").read_text())
        assert numbers["stages"]["conv2"]["test_last"] > 0.2 and numbers["knn"]["last feature"]["1"] > 0.5
