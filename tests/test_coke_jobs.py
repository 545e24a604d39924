"""coke.py as a whole: what runs leave behind, interruptions, several processes, odd data, what is learnt."""

import functools
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

from coke import make_net, options
from legacy import Loader, clustering_accuracy, kmeans, load_backbone, load_data

import jobs
import numpy as np
import pytest
import torch
from jobs import (
    ROOT,
    contents,
    copied,
    epochs,
    one_line,
    plain_nmi,
    read_assignments,
    two_at_once,
    without_times,
    write_images,
)
from PIL import Image
from torch import nn

SCRIPT = ROOT / "coke.py"
N, B, STEPS, KS = 1437, 256, 1437 // 256, [10, 20]  # digits: 5 steps an epoch
QUICK = ["--data", "digits", "--k", "10", "20", "--batch-size", str(B), "--epochs", "4", "--warm-up", "1"]
QUICK += ["--lr", "0.05", "--wd", "0.001", "--ratio", "0.8", "--dual-lr", "1", "--temperature", "0.1"]
QUICK += [
    "--label-share",
    "0.5",
    "--projector-layers",
    "2",
    "--image-size",
    "16",
    "--resize",
    "16",
    "--dim",
    "16",
    "--workers",
    "0",
    "--out",
    "run",
]
ONE = [*QUICK, "--views", "1", "--first-stage", "0.5", "--label-size", "3"]  # init, 2 of each stage
TWO = [*QUICK, "--views", "2"]
MULTI = [*QUICK, "--views", "multi", "--small-crops", "2", "--epochs", "2"]
LARS = [
    *QUICK,
    "--optimizer",
    "lars",
    "--lr",
    "2",
    "--init-epochs",
    "2",
    "--epochs",
    "3",
    "--predictor-share",
    "0",
]
CPU = torch.device("cpu")
trap = functools.partial(jobs.trap, "coke")

# The script, with what it does written down: the memory after every step and every epoch, the batches, the
# weights and gradients before every step, what the processes tell each other.
RECORD = """
import os, torch, legacy, coke
names = ("memories", "ends", "batches", "phases", "weights", "grads", "beats")
seen = {name: [] for name in names}
def copy(memory):
    return {name: tensor.clone() for name, tensor in memory.items()}
def cluster(memory, index, x, now, args, real=coke.cluster):
    found = real(memory, index, x, now, args)
    seen["memories"].append(copy(memory))
    seen["batches"].append((index.clone(), x.clone()))
    seen["phases"].append(tuple(now))
    return found
def end_epoch(memory, now, real=coke.end_epoch):
    seen["ends"].append(copy(real(memory, now)))
    return copy(seen["ends"][-1])
def make_net(args, channels, real=coke.make_net):
    global net
    trunk, net = real(args, channels)
    return trunk, net
def heartbeat(*values, real=coke.heartbeat):
    seen["weights"].append([w.detach().clone() for w in net.parameters()])
    seen["grads"].append([None if w.grad is None else w.grad.clone() for w in net.parameters()])
    seen["beats"].append(real(*values))
    return seen["beats"][-1]
def new_memory(*a, real=coke.new_memory):
    memory = real(*a)
    seen["start"] = copy(memory)
    return memory
coke.cluster, coke.end_epoch, coke.make_net = cluster, end_epoch, make_net
coke.heartbeat, coke.new_memory = heartbeat, new_memory
try:
    coke.main()
finally:
    seen["buffers"] = {name: b.numel() for name, b in net.named_buffers()}
    seen["last"] = [w.detach().clone() for w in net.parameters()]
    torch.save(seen, f"seen.{os.environ.get('RANK', 0)}")
"""


def seen_by(job, rank=0):
    return torch.load(job.folder / f"seen.{rank}", weights_only=True)


@pytest.fixture(scope="module")
def learner(start):
    """A run that learns, on its way while other tests run."""
    return start(LEARN)


@pytest.fixture(scope="module")
def whole(start, learner):
    """Recorded runs from beginning to end without interruption, by name."""
    flags = {"one": ONE, "two": TWO, "multi": MULTI, "lars": LARS, "other seed": [*ONE, "--seed", "1"]}
    return two_at_once({name: lambda f=f: start(f, RECORD).ok() for name, f in flags.items()})


@functools.cache
def digits():
    """(train, test)"""
    return load_data("digits")


def digit_labels():
    return digits()[0].labels.tolist()


def biggest(memory):
    """The largest cluster of the label of each image in each head, (N, H); -1 without a label."""
    labels, shares = memory["labels"], memory["shares"]
    top = labels.gather(-1, shares.argmax(-1, keepdim=True).long())[..., 0].long()
    return torch.where(shares.sum(-1) > 0, top, -1)


# --------------------------------------------------------------------------- what a run does


@pytest.mark.parametrize("name", ["one", "two", "multi", "lars"])
def test_images_are_visited_once_an_epoch(whole, name):
    """Whole batches without repetition, another order each time; what is clustered is the mean of two views."""
    seen = seen_by(whole[name])
    batches, count = seen["batches"], len(seen["ends"])
    assert len(batches) == STEPS * count
    order = [torch.cat([i for i, _ in batches[e * STEPS : (e + 1) * STEPS]]) for e in range(count)]
    assert all(len(o) == len(o.unique()) == STEPS * B for o in order)
    assert not any(torch.equal(a, b) for a, b in zip(order, order[1:], strict=False))
    lengths = torch.cat([x for _, x in batches]).norm(dim=1)
    if name == "one":
        torch.testing.assert_close(lengths, torch.ones(len(lengths)))
    else:
        assert 0.3 < lengths.mean() < 0.999 and lengths.max() < 1 + 1e-5


@pytest.mark.parametrize("name", ["one", "two"])
def test_the_memory_goes_through_the_stages(whole, name):
    """Clustering, then training; with one view the last half averages: w = 1, 1/2; counts begin anew, duals do not."""
    seen, flags = seen_by(whole[name]), {"one": ONE, "two": TWO}[name]
    weights = [1, 1, 1, 1, 1 / 2] if name == "one" else [1] * 5
    late = [False] * 3 + [name == "one"] * 2
    before = seen["start"]
    for epoch in range(5):
        steps = seen["memories"][epoch * STEPS : (epoch + 1) * STEPS]
        phases = seen["phases"][epoch * STEPS : (epoch + 1) * STEPS]
        assert phases == [(epoch > 0, late[epoch], weights[epoch], max(0, epoch - 1) * STEPS)] * STEPS
        for step, memory in enumerate(steps):
            assert torch.equal(memory["previous"], before["previous"])  # not before the epoch's end
            for h, k in enumerate(KS):
                assert memory["counts"][h, :k].sum() == (step + 1) * B and not memory["counts"][h, k:].any()
                lengths = memory["centres"][h, :k].norm(dim=-1)
                assert torch.allclose(lengths, torch.ones(k), atol=1e-5) == (not late[epoch])
        now, end = steps[-1]["centres"], seen["ends"][epoch]
        now = now / now.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        mixed = (1 - weights[epoch]) * before["previous"] + weights[epoch] * now
        mixed = mixed / mixed.norm(dim=-1, keepdim=True).clamp(min=1e-9)
        torch.testing.assert_close(end["previous"], mixed)
        assert torch.equal(end["centres"], end["previous"]) and not end["counts"].any()
        assert torch.equal(end["duals"], steps[-1]["duals"]) and end["duals"].any()
        for part in ("labels", "shares"):
            assert torch.equal(end[part], steps[-1][part])
        visited = torch.cat([i for i, _ in seen["batches"][epoch * STEPS : (epoch + 1) * STEPS]])
        left = torch.ones(N, dtype=torch.bool).index_fill(0, visited, False)
        assert torch.equal(end["shares"][left], before["shares"][left])
        several = (end["shares"] > 0).sum(-1)
        assert several.max() == (2 if epoch == 4 and name == "one" else 1)
        before = end
    state = whole[name].state()
    assert all(torch.equal(tensor, before[part]) for part, tensor in state["memory"].items())
    assert state["memory"]["labels"].shape == (N, 2, 3 if name == "one" else 1)
    assert "--first-stage" in flags or name == "two"


@pytest.mark.parametrize("name", ["one", "lars"])
def test_every_step_of_the_optimiser_follows_the_formulas(whole, name):
    """Warm-up and cosine per step, momentum, decay of weights alone, LARS; nothing in the clustering epochs."""
    seen, nothing, all_epochs = seen_by(whole[name]), 5 if name == "one" else 10, 4 if name == "one" else 3
    highest, wd = (0.05, 0.001) if name == "one" else (2, 0.001)
    weights, grads = [*seen["weights"], seen["last"]], seen["grads"]
    m, last = [0.0] * len(weights[0]), STEPS * all_epochs
    for step in range(nothing + last):
        if step < nothing:
            assert all(torch.equal(a, b) for a, b in zip(weights[step], weights[step + 1], strict=True))
            assert all(g is None for g in grads[step])
            continue
        t = step - nothing
        lr = highest * max(1, t) / STEPS
        if t >= STEPS:
            lr = highest / 2 * (1 + math.cos(math.pi * (t - STEPS) / (last - STEPS)))
        largest = 0.0
        for i, (w, g) in enumerate(zip(weights[step], grads[step], strict=True)):
            w, g = w.double(), g.double()
            if w.ndim > 1:
                g = g + wd * w
                if name == "lars":
                    g = g * 0.001 * w.norm() / g.norm()
            m[i] = 0.9 * m[i] + g
            moved = weights[step + 1][i].double() - w
            torch.testing.assert_close(moved, -lr * m[i], rtol=1e-3, atol=1e-7)
            largest = max(largest, moved.abs().max().item())
        assert largest > 1e-5 or t > last - 2
    lrs = [r["lr"] for r in epochs(whole[name].log())]
    assert lrs[0] == 0 and lrs[-1] == pytest.approx(lr) and len(lrs) == all_epochs + nothing // 5
    if name == "lars":  # the second of these epochs trains no more than the first
        assert lrs[1] == 0 and [r["epoch"] for r in epochs(whole[name].log())] == [-1, 0, 1, 2, 3]


# --------------------------------------------------------------------------- what a run leaves behind

EPOCH = {
    "epoch",
    "phase",
    "lr",
    "loss",
    "loss_projection",
    "loss_prediction",
    "changed",
    "chance",
    "nmi_previous",
}
EPOCH |= {
    "nmi_labels",
    "acc_labels",
    "ari_labels",
    "heads",
    "test",
    "images_per_second",
    "seconds",
    "bad_files",
}
SCORES = {"nmi_labels", "ari_labels"}


@pytest.mark.parametrize("name", ["one", "two", "multi", "lars"])
def test_log_holds_what_ran_every_epoch_and_the_result(whole, name):
    """First record, one an epoch, result last; the accuracy for as many clusters as classes alone."""
    first, *records, last = whole[name].log()
    flags = {"one": ONE, "two": TWO, "multi": MULTI, "lars": LARS}[name]
    assert first["command"] == "coke.py " + " ".join(flags)
    assert first["args"]["k"] == KS and first["args"]["ratio"] == 0.8 and first["args"]["head"] == 10
    assert {"torch", "torchvision", "faiss"} <= set(first["versions"])
    assert first["data"] == {"name": "digits", "images": N, "classes": 10} and first["processes"] == 1
    kinds = ["clustering", "training", "training", "averaging", "averaging"] if name == "one" else None
    kinds = kinds or ["clustering"] * (1 + (name == "lars")) + ["training"] * first["args"]["epochs"]
    assert [r["phase"] for r in records] == kinds
    assert [r["epoch"] for r in records] == [
        i + 1 - first["args"]["init_epochs"] for i in range(len(records))
    ]
    for i, r in enumerate(records):
        assert set(r) == EPOCH and set(r["test"]) == SCORES | {"acc_labels"}
        assert set(r["seconds"]) == {"training", "scoring"} and r["images_per_second"] > 0
        assert [set(h) for h in r["heads"]] == [
            SCORES | {"k", "smallest", "largest", "bound", "acc_labels"},
            SCORES | {"k", "smallest", "largest", "bound"},
        ]
        assert r["chance"] == pytest.approx((math.log(10) + math.log(20)) / 2)
        assert (r["nmi_previous"] is None) == (i == 0) and 0 <= r["changed"] <= 1 and r["bad_files"] == 0
        assert all(r[s] == r["heads"][0][s] for s in SCORES | {"acc_labels"})
    assert set(last["result"]) == {"head", "heads", "untrained"} and last["minutes"] >= 0
    sizes = {"clusters", "empty", "smallest", "largest", "largest_share"}
    assert [h["k"] for h in last["result"]["heads"]] == KS
    assert [set(h["train"]) for h in last["result"]["heads"]] == [
        sizes | SCORES | {"acc_labels"},
        sizes | SCORES,
    ]
    assert [set(h["test"]) for h in last["result"]["heads"]] == [SCORES | {"acc_labels"}, SCORES]
    assert set(last["result"]["untrained"]) == SCORES | {"acc_labels"}


@pytest.mark.parametrize("name", ["one", "two", "multi"])
def test_numbers_in_the_log_are_those_of_the_memory(whole, name):
    """Sizes, bounds, changes, scores and losses of every epoch, from what was recorded."""
    seen, truth = seen_by(whole[name]), digit_labels()
    before = torch.full((N, 2), -1)
    for epoch, r in enumerate(epochs(whole[name].log())):
        memory = seen["memories"][(epoch + 1) * STEPS - 1]
        labels = biggest(memory)
        for h, k in enumerate(KS):
            sizes, head = memory["counts"][h, :k], r["heads"][h]
            assert (head["k"], head["smallest"], head["largest"]) == (k, sizes.min(), sizes.max())
            assert head["bound"] == pytest.approx(0.8 * STEPS * B / k)
            assert head["smallest"] >= head["bound"] - math.sqrt(2 * N)
            assert head["smallest"] <= STEPS * B / k <= head["largest"]
            known = (labels[:, h] >= 0).nonzero()[:, 0].tolist()
            found, right = [labels[i, h].item() for i in known], [truth[i] for i in known]
            assert head["nmi_labels"] == pytest.approx(plain_nmi(right, found), abs=1e-9)
            if k == 10:
                assert head["acc_labels"] == pytest.approx(clustering_accuracy(right, found))
        both = ((labels[:, 0] >= 0) & (before[:, 0] >= 0)).nonzero()[:, 0]
        if epoch:
            pair = labels[both, 0].tolist(), before[both, 0].tolist()
            assert r["nmi_previous"] == pytest.approx(plain_nmi(*pair), abs=1e-9)
            assert len(both) > 1000
        beats = np.mean(seen["beats"][epoch * STEPS : (epoch + 1) * STEPS], 0)
        shown = [r[s] for s in ("loss", "loss_projection", "loss_prediction", "changed")]
        assert shown == pytest.approx(beats[:4].tolist(), rel=1e-6)
        if epoch == 0:
            assert r["changed"] == 1
        elif r["phase"] != "averaging":  # of the images visited; the first visit counts as a change
            visited = torch.cat([i for i, _ in seen["batches"][epoch * STEPS : (epoch + 1) * STEPS]])
            assert r["changed"] == pytest.approx((labels != before)[visited].float().mean().item(), abs=1e-6)
        before = labels


@pytest.mark.parametrize("name", ["one", "two", "multi"])
def test_files_of_a_run(whole, name):
    """checkpoint, the one before, backbone, one line per image, a picture; nothing else stays behind."""
    run = whole[name].run
    names = {".lock", "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "assignments.csv"}
    assert {p.name for p in run.iterdir()} == names | {"clusters.png"}
    with Image.open(run / "clusters.png") as picture:
        assert picture.size == (10 * 18 + 2, 10 * 18 + 2)  # ten clusters, ten images of 16 pixels each
        assert np.asarray(picture).std() > 10
    state = whole[name].state()
    assert (state["epoch"], state["step"], state["finished"]) == (2 + 1 + 2 * (name != "multi"), 0, True)
    assert all(x.isfinite().all() for x in [*state["net"].values(), *state["memory"].values()])


def embeddings(job, data):
    """Unit projections of centre crops by the network of a run's checkpoint."""
    _, net = make_net(options(job.log()[0]["command"].split()[1:]), 1)
    net.load_state_dict(job.state()["net"])
    net.eval()
    with torch.no_grad():
        crops = [x[:, 0] for _, x in Loader(data, 100, 16, 16, CPU, 0).fixed(torch.arange(len(data)))]
        z = torch.cat([net.encoder(x) for x in crops])
    return z / z.norm(dim=1, keepdim=True)


@pytest.mark.parametrize("name", ["one", "two", "multi", "lars"])
def test_the_result_is_the_nearest_centre_of_centre_crops(whole, name):
    """No duals, the last centres: assignments.csv, sizes and scores of every head, training and test images."""
    train, test = digits()
    centres, result = whole[name].state()["memory"]["previous"], whole[name].log()[-1]["result"]
    images, clusters = read_assignments(whole[name].run / "assignments.csv")
    assert images == [str(i) for i in range(N)]
    sizes = Counter(clusters)
    for h, k in enumerate(KS):
        shown = result["heads"][h]
        for part, data in (("train", train), ("test", test)):
            found = (embeddings(whole[name], data) @ centres[h, :k].T).argmax(1).tolist()
            near = pytest.approx(plain_nmi(data.labels.tolist(), found), abs=0.005)  # a tie or two
            assert shown[part]["nmi_labels"] == near
            if k == 10:
                accuracy = clustering_accuracy(data.labels.tolist(), found)
                assert shown[part]["acc_labels"] == pytest.approx(accuracy, abs=0.005)
                if part == "train":
                    assert sum(a != b for a, b in zip(found, clusters, strict=True)) < 4
    shown = result["heads"][0]["train"]
    assert (shown["clusters"], shown["largest"]) == (len(sizes), max(sizes.values()))
    assert result["heads"][0]["test"] == whole[name].log()[-2]["test"] and result["head"] == 10


def test_untrained_scores_are_those_of_the_start(whole):
    """k-means on the features of the weights as they were drawn, batch norm filled: the test images' score."""
    train, test = digits()
    trunk, net = make_net(options(ONE), 1)
    for w, drawn in zip(net.parameters(), seen_by(whole["one"])["weights"][0], strict=True):
        w.data.copy_(drawn)
    for m in trunk.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            m.momentum = 1.0
    with torch.no_grad():
        trunk.train()(next(Loader(train, 256, 16, 16, CPU, 0).fixed(torch.arange(256)))[1][:, 0])
        trunk.eval()
        z = []
        for data in (train, test):
            crops = [x[:, 0] for _, x in Loader(data, 100, 16, 16, CPU, 0).fixed(torch.arange(len(data)))]
            z.append(torch.cat([trunk(x) for x in crops]))
    scores = []
    for seed in range(6):
        c = kmeans(z[0], 10, gen=torch.Generator().manual_seed(seed)).centroids
        scores.append(plain_nmi(test.labels.tolist(), torch.cdist(z[1], c).argmin(1).tolist()))
    shown = whole["one"].log()[-1]["result"]["untrained"]
    assert min(scores) - 0.05 <= shown["nmi_labels"] <= max(scores) + 0.05
    assert shown == whole["two"].log()[-1]["result"]["untrained"]  # the same weights


@pytest.mark.parametrize(("name", "method"), [("one", "coke-1"), ("two", "coke-2"), ("multi", "coke-multi")])
def test_the_backbone_is_the_trunk_of_the_run(whole, name, method):
    """load_backbone rebuilds it; its features lead through the projector to the run's embeddings."""
    net, meta = load_backbone(whole[name].run)
    assert (meta["method"], meta["arch"], meta["sobel"], meta["norm"]) == (method, "lenet5", False, True)
    assert (meta["image_size"], meta["resize"], meta["data"], net.embedding) == (16, 16, "digits", None)
    state = whole[name].state()["net"]
    saved = whole[name].state("backbone.pt")["state_dict"]
    assert len(saved) > 10 and all(torch.equal(v, state[f"encoder.0.{k}"]) for k, v in saved.items())


def test_what_a_run_says(whole):
    """The data first, one line an epoch, what was learnt, the files and the command to evaluate it."""
    lines = whole["one"].out.splitlines()
    assert lines[0].startswith("data: digits") and "1437" in lines[0] and "recipe digits" in lines[0]
    shown = [line for line in lines if line.startswith("epoch")]
    assert [line.split()[1] for line in shown] == ["0/4", "1/4", "2/4", "3/4", "4/4"]
    for line, r in zip(shown, epochs(whole["one"].log()), strict=True):
        head = r["heads"][0]
        for text in (
            r["phase"],
            f"loss {r['loss']:.3f}",
            f"K=10: {head['smallest']}-{head['largest']} images",
        ):
            assert text in line, line
        assert f"train ACC {100 * r['acc_labels']:.1f} NMI {100 * r['nmi_labels']:.1f}" in line
        assert f"test ACC {100 * r['test']['acc_labels']:.1f}" in line
    result = whole["one"].log()[-1]["result"]
    line = next(line for line in lines if line.startswith("360 test images in 10 clusters"))
    assert f"ACC {100 * result['heads'][0]['test']['acc_labels']:.1f}" in line
    assert f"untrained network: ACC {100 * result['untrained']['acc_labels']:.1f}" in line
    assert "eval_linear.py run" in lines[-1] and whole["one"].err == ""


# --------------------------------------------------------------------------- the same command again


def momenta(job):
    return [m["momentum_buffer"] for m in job.state()["optimizer"]["state"].values()]


def same(a, b):
    """Two jobs ended with the same weights, optimiser, memory and files, bit for bit."""
    x, y = a.state(), b.state()
    for part in ("net", "memory"):
        assert x[part].keys() == y[part].keys()
        for k in x[part]:
            assert torch.equal(x[part][k], y[part][k]), k
    assert len(momenta(a)) == len(momenta(b)) > 0
    assert all(torch.equal(m, n) for m, n in zip(momenta(a), momenta(b), strict=True))
    for name in ("epoch", "step", "sums", "untrained", "finished", "config"):
        assert x[name] == y[name], name
    for name in ("assignments.csv", "clusters.png"):
        assert (a.run / name).read_bytes() == (b.run / name).read_bytes(), name
    assert without_times(a.log()) == without_times(b.log())
    assert a.log()[-1]["result"] == b.log()[-1]["result"]
    saved = [job.state("backbone.pt")["state_dict"] for job in (a, b)]
    assert saved[0].keys() == saved[1].keys()
    assert all(torch.equal(v, saved[1][k]) for k, v in saved[0].items())


def test_the_seed_decides_the_result(start, whole):
    """Same seed, same bits, watched or not, however many workers; another seed, other weights, centres, images."""
    same(start([*ONE, "--workers", "1", "--save-every", "3"]).ok(), whole["one"])
    a, b = seen_by(whole["one"]), seen_by(whole["other seed"])
    assert not torch.equal(a["weights"][0][0], b["weights"][0][0])
    assert not torch.equal(a["start"]["centres"], b["start"]["centres"])
    assert not torch.equal(a["batches"][0][0], b["batches"][0][0])
    pair = [without_times(whole[name].log())[-1] for name in ("one", "other seed")]
    assert pair[0]["loss"] != pair[1]["loss"]


def test_a_finished_run_says_so_and_changes_nothing(start, whole):
    job = copied(start, whole["one"], ONE, "again")
    assert job.code == 0 and "finished after 4 epochs" in job.out and job.err == ""
    assert contents(job.run) == contents(whole["one"].run)


def test_overwrite_starts_afresh(start, whole):
    """Over another finished run: the same as in an empty folder, nothing of the other is left."""
    job = copied(start, whole["two"], [*ONE, "--overwrite"], "over").ok()
    x, y = job.state(), whole["one"].state()
    assert all(torch.equal(x["net"][k], y["net"][k]) for k in y["net"])
    assert all(torch.equal(x["memory"][k], y["memory"][k]) for k in y["memory"])
    assert without_times(job.log()) == without_times(whole["one"].log())
    assert sum("command" in r for r in job.log()) == 1


# name: (flags, where it is killed). 5 steps an epoch: 5 of clustering, 10 of each stage.
STEP = ("coke", "heartbeat")
CRASHES = {
    "in the clustering epoch": ("one", trap(*STEP, 3)),
    "in the first stage": ("one", trap(*STEP, 8)),
    "at the border of the stages": ("one", trap(*STEP, 16)),
    "in the second stage": ("one", trap(*STEP, 23)),
    "two views": ("two", trap(*STEP, 18)),
}
FLAGS = {"one": ONE, "two": TWO}


@pytest.fixture(scope="module")
def crashed(start):
    """Every crash, then the same command again: name -> (exit code, where it stopped, resumed job)."""

    def crash(flags, code):
        job = start(flags, code).wait()
        state = job.state() if (job.run / "checkpoint.pt").exists() else {"epoch": None}
        return job.code, state["epoch"], start(flags, folder=job.folder).wait()

    return two_at_once({name: lambda f=f, c=c: crash(FLAGS[f], c) for name, (f, c) in CRASHES.items()})


@pytest.mark.parametrize("name", CRASHES)
def test_a_run_that_was_killed_ends_as_if_nothing_had_happened(crashed, whole, name):
    """The same command goes on from the last epoch's end, bit for bit."""
    code, epoch, resumed = crashed[name]
    assert code == -9 and resumed.code == 0, resumed.err
    same(resumed, whole[CRASHES[name][0]])
    assert sum("resumed" in r for r in resumed.log()) == (epoch is not None)


# The script, with NaN images in the fourth step of an epoch.
POISON = """
import legacy, coke
def epoch(self, number, *a, real=legacy.Loader.epoch, **k):
    for step, (index, views) in enumerate(real(self, number, *a, **k)):
        yield index, [v * float("nan") if number == {epoch} and step == 3 else v for v in views]
legacy.Loader.epoch = epoch
coke.main()
"""


@pytest.mark.parametrize("epoch", [0, 2])
def test_a_nan_leaves_the_checkpoint_before_it(start, whole, epoch):
    """Exit code 1, one line; neither weights nor memory took it in, and going on reaches the usual end."""
    job = start(ONE, POISON.format(epoch=epoch)).wait()
    one_line(job, 1)
    assert "--lr" in job.err and (job.run / "checkpoint.pt").exists() == (epoch > 0)
    if epoch:
        state = job.state()
        assert (state["epoch"], state["step"]) == (epoch, 0)
        assert all(x.isfinite().all() for x in [*state["net"].values(), *state["memory"].values()])
    same(start(ONE, folder=job.folder).ok(), whole["one"])


def test_a_learning_rate_that_blows_up_ends_in_one_line(start):
    job = start([*ONE, "--lr", "1e30"]).wait()
    one_line(job, 1)
    assert "--lr" in job.err


# --------------------------------------------------------------------------- several processes

# One step of train() on a given batch with learning rate 0: gradients stay to be looked at.
ONE_STEP = """
import torch, legacy, coke
legacy.setup("cpu")
gen = torch.Generator().manual_seed(0)
flags = ["--data", "digits", "--image-size", "16", "--dim", "16", "--batch-size", "24", "--epochs", "1"]
flags += ["--k", "4", "7", "--small-crops", "2", "--lr", "0", "--temperature", "0.2", "--ratio", "0.7"]
views = [torch.randn(24, 1, 16, 16, generator=gen) for _ in range(4)]
index = torch.randperm(60, generator=gen)[:24]
first, last = legacy.shard(24)
class Loader:
    device = torch.device("cpu")
    def epoch(self, epoch, wanted, start=0):
        yield index[first:last], [v[first:last] for v in views[: len(wanted)]]
for name in ("1", "2", "multi"):
    args = coke.options([*flags, "--views", name])
    args.amp = False
    legacy.seed_all(1, "weights")
    _, net = coke.make_net(args, 1)
    net = legacy.synchronise(net)
    slots = 3 if name == "1" else 1
    memory = coke.new_memory(args.k, 16, 60, slots, "cpu", 3)
    seen = torch.randperm(60, generator=torch.Generator().manual_seed(4))[:40]
    memory["labels"][seen, :, 0] = (seen % 4).int()[:, None]
    memory["shares"][seen, :, 0] = 1.0
    memory["duals"][0, 1], memory["duals"][1, 5] = 0.3, 0.2
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    now = coke.Phase(True, name == "1", 0.5 if name == "1" else 1.0, 0)
    rest = (memory, 1, 0, 1, [0.0] * 4, now, args)
    step, sums, _ = coke.train(legacy.parallel(net), optimizer, Loader(), *rest)
    assert step == 1
    got = {"sums": sums, "memory": memory, "grads": [p.grad for p in net.parameters()]}
    got["statistics"] = [b for k, b in net.named_buffers() if "running" in k]
    torch.save(got, f"{name}.{legacy.processes()}.{legacy.rank()}")
legacy.leave()
"""


@pytest.fixture(scope="module")
def one_step(start):
    """{(views, processes, rank): what one step left behind} for a batch of 24 on 1, 2 and 3 processes."""
    started = {w: start([], ONE_STEP, world=w) for w in (1, 2, 3)}
    folders = {w: job.ok().folder for w, job in started.items()}
    names = [(name, w, r) for name in ("1", "2", "multi") for w in folders for r in range(w)]
    return {(n, w, r): torch.load(folders[w] / f"{n}.{w}.{r}", weights_only=True) for n, w, r in names}


def assert_same_memory(a, b, exact=False, close=1e-5):
    """Labels equal, numbers close or the same in every bit."""
    for name in b:
        if exact or not b[name].is_floating_point():
            assert torch.equal(a[name], b[name]), name
        else:
            torch.testing.assert_close(a[name], b[name], rtol=0, atol=close, msg=name)


@pytest.mark.parametrize("views", ["1", "2", "multi"])
def test_a_step_on_several_processes_is_that_of_the_whole_batch(one_step, views):
    """Loss, gradients, memory and batch norm's statistics for a global batch; the memory alike in every bit."""
    one = one_step[views, 1, 0]
    assert max(g.abs().max() for g in one["grads"]) > 1e-3 and one["sums"][0] > 0.1
    assert (one["memory"]["shares"].sum(-1) > 0).all(1).sum() > 40 and one["memory"]["duals"].any()
    for world in (2, 3):
        for rank in range(world):
            got = one_step[views, world, rank]
            assert got["sums"] == pytest.approx(one["sums"], rel=1e-5)
            for a, b in zip(got["grads"], one["grads"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
            for a, b in zip(got["statistics"], one["statistics"], strict=True):
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
            assert_same_memory(got["memory"], one["memory"])
            assert_same_memory(got["memory"], one_step[views, world, 0]["memory"], exact=True)


@pytest.fixture(scope="module")
def places(tmp_path_factory, whole):
    """Folders to point the script at, by name."""
    root, grey = tmp_path_factory.mktemp("places"), np.full((20, 20, 3), 90, np.uint8)

    def noise(i):
        return np.random.default_rng(i).integers(0, 256, (20, 20, 3), dtype=np.uint8)

    write_images(root / "flat", 20, noise)
    write_images(root / "forty", 40, noise)
    write_images(root / "same", 40, lambda i: grey)
    write_images(root / "one class" / "cat", 20, size=20)
    for i in range(20):
        write_images(root / "single" / f"{i:02}", 1, size=20)
    for name in ("cat", "dog"):
        for folder in ("labelled train", "both"):
            write_images(root / folder / "train" / name, 12, size=20)
        write_images(root / "both" / "val" / name, 5, size=20)
        write_images(root / "val without labels" / "train" / name, 12, size=20)
    write_images(root / "val without labels" / "val", 5, size=20)
    write_images(root / "mismatch" / "train" / "cat", 2)
    write_images(root / "mismatch" / "val" / "dog", 2)
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    return SimpleNamespace(
        **{p.name.replace(" ", "_"): p for p in root.iterdir()}, root=root, run=whole["one"].run
    )


FOLDER = ["--recipe", "digits", "--image-size", "16", "--resize", "16", "--batch-size", "8", "--k", "4", "2"]
FOLDER += ["--workers", "0", "--epochs", "3", "--warm-up", "1", "--lr", "0.05", "--dim", "16", "--out", "run"]
FOLDER += ["--dual-lr", "0.1", "--ratio", "0.9", "--temperature", "0.1", "--projector-layers", "2"]


@pytest.fixture(scope="module")
def several(start, places):
    """Recorded runs on one and two processes.

    Few images and a small learning rate: a difference in the seventh digit must not grow, nor decide between
    two clusters.
    """
    gentle = ["--data", places.forty, *FOLDER, "--lr", "0.0001", "--epochs", "4"]
    pair = ["--data", places.flat, *FOLDER, "--lr", "0.0001", "--batch-size", "2", "--epochs", "1"]
    flags = {
        ("one view", 1): [*gentle, "--views", "1", "--first-stage", "0.5"],
        ("two views", 1): gentle,
        ("one image each", 1): [*pair, "--views", "2"],
    }
    flags |= {(name, 2): f for (name, _), f in flags.items()}
    flags |= {("digits", 2): ONE, ("digits, small crops", 2): MULTI}
    return two_at_once({k: lambda f=f, k=k: start(f, RECORD, world=k[1]).ok() for k, f in flags.items()})


@pytest.mark.parametrize("name", ["one view", "two views"])
def test_two_processes_learn_what_one_learns(several, name):
    """Memory after every step, weights, batch norm's statistics, log and files."""
    one, both = several[name, 1], several[name, 2]
    x, y = seen_by(both), seen_by(one)
    assert len(x["memories"]) == len(y["memories"]) == 25
    assert_same_memory(x["start"], y["start"], exact=True)
    for a, b in zip(x["memories"] + x["ends"], y["memories"] + y["ends"], strict=True):
        assert_same_memory(a, b)
    a, b = both.state(), one.state()
    for k in b["net"]:
        torch.testing.assert_close(a["net"][k], b["net"][k], rtol=1e-4, atol=1e-5, msg=k)
    for p, q in zip(epochs(both.log()), epochs(one.log()), strict=True):
        assert p["heads"] == q["heads"] and p["loss"] == pytest.approx(q["loss"], rel=1e-5)
        assert p["changed"] == pytest.approx(q["changed"])
    assert both.log()[0]["processes"] == 2 and both.out.count("epoch   1/") == 1
    assert (one.run / "assignments.csv").read_bytes() == (both.run / "assignments.csv").read_bytes()


def test_two_processes_with_one_image_each(several):
    """A batch of two works, on the images of one process in its order. What is computed cannot be compared:
    batch norm over two images enlarges the last digits of those that are nearly alike, layer by layer."""
    one, both = (several["one image each", world] for world in (1, 2))
    x, y = seen_by(both), seen_by(one)
    assert len(x["batches"]) == len(y["batches"]) == 20
    for (i, v), (j, _), memory in zip(x["batches"], y["batches"], x["memories"], strict=True):
        assert torch.equal(i, j) and len(i) == 2 and v.isfinite().all()
        assert (biggest(memory)[i] >= 0).all()
    assert x["memories"][-1]["counts"].sum(1).tolist() == [20, 20]
    assert not torch.equal(x["weights"][10][0], x["last"][0]) and x["phases"] == y["phases"]
    assert all(t.isfinite().all() for t in [*both.state()["net"].values(), *both.state()["memory"].values()])


@pytest.mark.parametrize("name", ["one view", "two views", "one image each", "digits", "digits, small crops"])
def test_two_processes_keep_the_same_memory(several, name):
    """Bit for bit after every step; it is no buffer of the network, which would be sent around each step."""
    a, b = (seen_by(several[name, 2], rank) for rank in (0, 1))
    assert len(a["memories"]) == len(b["memories"]) >= 15
    for x, y in zip(a["memories"] + a["ends"], b["memories"] + b["ends"], strict=True):
        assert_same_memory(x, y, exact=True)
    for (i, x), (j, y) in zip(a["batches"], b["batches"], strict=True):  # all images on both
        assert torch.equal(i, j) and torch.equal(x, y)
    for seen in (a, b):
        assert {k.split(".")[-1] for k in seen["buffers"]} == {
            "running_mean",
            "running_var",
            "num_batches_tracked",
        }


def test_two_processes_stop_together_and_go_on(start, several):
    """A signal to one, a NaN on one, a mistake in the command: both end alike, nobody hangs."""
    to_one = trap(*STEP, 18, "SIGTERM").replace("calls == n", "calls == n and legacy.rank() == 1")
    nan_on_one = POISON.format(epoch=1).replace("step == 3", "step == 3 and legacy.rank() == 1")
    found = two_at_once(
        {
            "signal": lambda: start(ONE, to_one, world=2).wait(60),
            "nan": lambda: start(ONE, nan_on_one, world=2).wait(60),
            "uneven": lambda: start([*ONE, "--batch-size", "63"], world=2).wait(60),
            "mistake": lambda: start([*ONE, "--k", "2000"], world=2).wait(60),
        }
    )
    codes = {"signal": [143, 143], "nan": [1, 1], "uneven": [2, 2], "mistake": [2, 2]}
    assert {name: job.codes for name, job in found.items()} == codes
    for name in ("nan", "uneven", "mistake"):
        assert len(found[name].err.splitlines()) == 1, found[name].err
    assert (found["signal"].state()["epoch"], found["signal"].state()["step"]) == (3, 3)
    same(start(ONE, folder=found["signal"].folder, world=2).ok(), several["digits", 2])


# --------------------------------------------------------------------------- mistakes

MISTAKES = {  # name: (arguments as a function of the places, words that the message must hold)
    "k larger than N": (lambda p: ["--data", "digits", "--k", "10", "1438"], ["--k", "1438", "1437"]),
    "k of a recipe": (lambda p: ["--data", p.flat], ["--k", "5000", "20", "imagenet"]),
    "batch larger than N": (lambda p: [*ONE, "--batch-size", "1438"], ["--batch-size", "1438", "1437"]),
    "batch larger than a folder": (lambda p: ["--data", p.flat, *FOLDER, "--batch-size", "21"], ["21", "20"]),
    "batch of one": (lambda p: ["--data", p.flat, *FOLDER, "--batch-size", "1"], ["--batch-size"]),
    "unknown data": (lambda p: ["--data", "cifar"], ["cifar", "cifar10", "digits"]),
    "missing folder": (lambda p: ["--data", p.root / "none"], ["none", "no such folder"]),
    "empty folder": (lambda p: ["--data", p.empty], ["empty", "no images"]),
    "a file for a folder": (lambda p: ["--data", p.file], ["file"]),
    "classes differ": (lambda p: ["--data", p.mismatch, *FOLDER], ["mismatch", "cat", "dog"]),
    "image too small": (lambda p: ["--data", "digits", "--image-size", "8"], ["--image-size"]),
    "out below a file": (lambda p: ["--data", "digits", "--out", p.file / "run"], ["--out", "cannot write"]),
    "out of other views": (
        lambda p: [*TWO, "--out", p.run],
        ["views 1 -> 2", "first_stage 0.5 -> 1", "--overwrite"],
    ),
    "out of another k": (
        lambda p: [*ONE, "--k", "30", "10", "--out", p.run],
        ["k [10, 20] -> [30, 10]", "--overwrite"],
    ),
    "out of more epochs": (lambda p: [*ONE, "--epochs", "5", "--out", p.run], ["epochs 4 -> 5"]),
    "out of another ratio": (lambda p: [*ONE, "--ratio", "0.7", "--out", p.run], ["ratio 0.8 -> 0.7"]),
    "unknown device": (lambda p: ["--device", "gpu"], ["--device", "cuda"]),
    "no cuda here": (lambda p: ["--device", "cuda"], ["--device", "cuda"]),
}


@pytest.fixture(scope="module")
def mistaken(start, places):
    kept = contents(places.run)
    work = {name: lambda a=arguments: start(a(places)).wait() for name, (arguments, _) in MISTAKES.items()}
    return two_at_once(work, "out of"), kept


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_exit_code_2_and_one_line(mistaken, name):
    """The line names the flag or the thing, says what would be right, and nothing is a traceback."""
    job = mistaken[0][name]
    line = one_line(job)
    assert not [word for word in MISTAKES[name][1] if word not in line], job.err


def test_a_refused_run_folder_stays_as_it_was(mistaken, places):
    assert contents(places.run) == mistaken[1]


# --------------------------------------------------------------------------- folders and odd data

PHOTO = ["--flip", "--colour", "--blur"]
RESNET = [
    "--arch",
    "resnet18",
    "--views",
    "multi",
    "--small-size",
    "8",
    "--small-crops",
    "2",
    "--epochs",
    "1",
]
STAGES = ["--views", "1", "--first-stage", "0.4"]  # one epoch, then two that average
ODD = {  # name: (arguments as a function of the places, has labels, a test set with labels, warnings)
    "no labels": (lambda p: [p.forty, *FOLDER], False, False, ""),
    "labels in train only": (lambda p: [p.labelled_train, *FOLDER, "--k", "2"], True, False, ""),
    "labels in train but not in val": (lambda p: [p.val_without_labels, *FOLDER], True, False, "--k 4"),
    "labels in both": (lambda p: [p.both, *FOLDER, "--workers", "1"], True, True, "--k 4"),
    "no head for the classes": (lambda p: [p.both, *FOLDER, "--k", "3"], True, True, "2 classes"),
    "bf16": (lambda p: [p.both, *FOLDER, "--amp"], True, True, "--k 4"),
    "photographs": (lambda p: [p.forty, *FOLDER, *PHOTO], False, False, ""),
    "photographs, small crops": (lambda p: [p.both, *FOLDER, *PHOTO, *RESNET], True, True, "--k 4"),
    "one class": (lambda p: [p.one_class, *FOLDER, "--k", "1"], True, False, ""),
    "one class, more clusters": (lambda p: [p.one_class, *FOLDER], True, False, "1 classes"),
    "one image a class": (lambda p: [p.single, *FOLDER], True, False, "20 classes"),
    "all images equal": (lambda p: [p.same, *FOLDER, "--epochs", "8"], False, False, ""),
    "all images equal, one view": (lambda p: [p.same, *FOLDER, *STAGES, "--epochs", "8"], False, False, ""),
    "all images equal, LARS": (lambda p: [p.same, *FOLDER, "--optimizer", "lars"], False, False, ""),
    "all images equal, in a hurry": (
        lambda p: [p.same, *FOLDER, "--epochs", "8", "--dual-lr", "1"],
        False,
        False,
        "--dual-lr",
    ),
    "two views, averages": (lambda p: [p.forty, *FOLDER, "--first-stage", "0.4"], False, False, ""),
    "k is 1": (lambda p: [p.forty, *FOLDER, "--k", "1"], False, False, ""),
    "k is 1, one view": (lambda p: [p.forty, *FOLDER, *STAGES, "--k", "1"], False, False, ""),
    "k is N": (lambda p: [p.flat, *FOLDER, "--k", "20"], False, False, "--k 20"),
    "one batch": (lambda p: [p.flat, *FOLDER, "--batch-size", "20", "--k", "2"], False, False, ""),
    "batches of two": (lambda p: [p.flat, *FOLDER, "--batch-size", "2", "--k", "2"], False, False, ""),
    "no constraint": (lambda p: [p.forty, *FOLDER, *STAGES, "--ratio", "0"], False, False, ""),
    "equal sizes": (lambda p: [p.forty, *FOLDER, *STAGES, "--ratio", "1"], False, False, ""),
    "no predictor": (lambda p: [p.forty, *FOLDER, "--predictor-share", "0"], False, False, ""),
    "predictor alone": (lambda p: [p.forty, *FOLDER, "--predictor-share", "1"], False, False, ""),
    "labels of one cluster": (lambda p: [p.forty, *FOLDER, *STAGES, "--label-size", "1"], False, False, ""),
    "averages from the start": (
        lambda p: [p.forty, *FOLDER, "--views", "1", "--first-stage", "0"],
        False,
        False,
        "",
    ),
    "no clustering before": (lambda p: [p.forty, *FOLDER, "--init-epochs", "0"], False, False, ""),
    "no warm-up": (lambda p: [p.forty, *FOLDER, "--warm-up", "0"], False, False, ""),
    "nothing but warm-up": (lambda p: [p.forty, *FOLDER, "--warm-up", "3"], False, False, "--warm-up 3"),
    "sharp": (lambda p: [p.forty, *FOLDER, "--temperature", "0.002"], False, False, ""),
}


@pytest.fixture(scope="module")
def odd(start, places):
    return two_at_once(
        {name: lambda a=a: start(["--data", *a(places)]).wait() for name, (a, *_) in ODD.items()}
    )


REASON = "batch norm amplifies rounding noise on identical images until it overflows (torch 2.14.1)"
XFAIL = {f"all images equal{more}" for more in ("", ", one view", ", in a hurry")}
MAY_OVERFLOW = pytest.mark.xfail(strict=False, reason=REASON)


@pytest.mark.parametrize("name", [pytest.param(x, marks=[MAY_OVERFLOW] * (x in XFAIL)) for x in ODD])
def test_odd_data_runs_and_every_number_is_finite(odd, name):
    """Label metrics where there are labels, accuracy for their number of clusters, an assignment for each file."""
    job, (_, labels, test, warning) = odd[name].ok(), ODD[name]
    first, *records, last = job.log()
    args, n, classes = first["args"], first["data"]["images"], first["data"]["classes"]
    assert len(records) == args["epochs"] + args["init_epochs"]
    accurate = labels and classes in args["k"]
    for i, r in enumerate(records):
        assert {k for k, v in r.items() if v is None} == ({"nmi_previous"} if i == 0 else set())
        assert r["loss"] >= -1e-6 and r["bad_files"] == 0 and ("test" in r) == (labels and test)
        assert ("nmi_labels" in r) == labels and ("acc_labels" in r) == (labels and args["head"] == classes)
        for head in r["heads"]:
            per_epoch = n // args["batch_size"] * args["batch_size"]
            assert head["smallest"] * head["k"] <= per_epoch <= head["largest"] * head["k"]
            assert head["bound"] == pytest.approx(args["ratio"] * per_epoch / head["k"])
    assert any("acc_labels" in h["train"] for h in last["result"]["heads"]) == accurate
    assert (last["result"]["untrained"] is not None) == labels
    assert all(("test" in h) == (labels and test) for h in last["result"]["heads"])
    assert args["head"] == (classes if accurate else args["k"][0])
    state = job.state()
    assert all(x.isfinite().all() for x in [*state["net"].values(), *state["memory"].values()])
    images, clusters = read_assignments(job.run / "assignments.csv")
    assert len(images) == len(set(images)) == n and all(Path(i).is_file() for i in images)
    assert set(clusters) <= set(range(args["head"]))
    assert (job.run / "clusters.png").stat().st_size > 100
    assert ("--data LABELLED" in job.out) != labels and "eval_linear.py run" in job.out
    said = [line for line in job.out.splitlines() if "WARNING" in line and "trivial" not in line]
    assert any(warning in line for line in said) if warning else not said, said
    if "k is 1" in name or name == "one class":
        assert all(abs(r["loss"]) < 1e-5 for r in records)
        assert "trivial" not in job.out


# --------------------------------------------------------------------------- learning

LEARN = ["--data", "digits", "--epochs", "20", "--workers", "0", "--out", "run"]


def test_digits_are_learnt(learner):
    """A third of `python coke.py`: test images are told apart better than by the untrained network's features.

    With six seeds the accuracy ended between 77 and 94 %, as two digits may share a cluster after so few epochs.
    """
    result = learner.ok().log()[-1]["result"]
    reached, untrained = result["heads"][0]["test"], result["untrained"]
    assert result["heads"][0]["k"] == result["head"] == 10 and 0.5 < untrained["acc_labels"] < 0.75
    assert reached["acc_labels"] > max(0.72, untrained["acc_labels"] + 0.08)
    assert reached["nmi_labels"] > max(0.72, untrained["nmi_labels"] + 0.1)
    records = epochs(learner.log())
    assert records[-1]["changed"] < 0.3 < records[1]["changed"] and records[-1]["nmi_previous"] > 0.8
