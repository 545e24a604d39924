"""local_aggregation.py: its losses against plain loops, its steps against formulas, whole runs."""

import ast
import functools
import math
import re
from collections import Counter
from decimal import Decimal

import common
import local_aggregation
from local_aggregation import RECIPES, Network, options, parameter_groups, parts

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, assert_same, epochs, one_error, plain, plain_nmi, read_assignments, two_at_once
from torch import nn

SCRIPT = ROOT / "local_aggregation.py"
QUICK = "--epochs 3 --ir-epochs 1 --k 20 --num-neighbors 300 --batch-size 128 --lr-steps 2 --image-size 16 --out run"
SMALL = "--recipe digits --batch-size 8 --k 4 --image-size 16 --epochs 2 --ir-epochs 1 --workers 0 --out run"
N, STEPS = 1437, 1437 // 128  # digits: 11 steps an epoch
trap = functools.partial(jobs.trap, "local_aggregation")
digits = functools.cache(lambda: common.load_data("digits"))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(seed, n, d, dtype=torch.float32):
    """(n, d) random rows of unit length."""
    return F.normalize(torch.randn(n, d, generator=seeded(seed), dtype=torch.float64), dim=1).to(dtype)


# --------------------------------------------------------------------------- the algorithm, pasted
# All tests of formulas call what the pasted text defines, and so show that it can be pasted.

CELL = re.search(r"^# %% the algorithm.*?(?=^# %% )", SCRIPT.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
PASTED = {"math": math, "torch": torch, "F": F}
exec(compile(CELL, "the algorithm", "exec"), PASTED)
NAMES = "instance_softmax instance_nce background_neighbors close_neighbors aggregation_loss update_bank"
softmax, nce, background, close_neighbors, aggregation_loss, update_bank = map(PASTED.get, NAMES.split())
CONSTANT = 2876934.2 / 1281167


def test_the_algorithm_is_functions_of_tensors():
    code = ast.parse(CELL)
    taken = {a.arg for a in ast.walk(code) if isinstance(a, ast.arg)}
    assert not {"args", "loader", "data", "self"} & taken
    assert all(isinstance(f, ast.FunctionDef) and ast.get_docstring(f) for f in code.body)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def plain_softmax(v, bank, own, tau):
    """-log( exp(bank_i.v / tau) / sum over all j of exp(bank_j.v / tau) ) of one image [Wu et al. 3.1]."""
    e = [math.exp(dot(row, v) / tau) for row in bank]
    return -math.log(e[own] / sum(e))


def plain_nce(v, bank, own, negatives, tau):
    """-log(p_i / (p_i + m Pn)) - sum over the m negatives of log(m Pn / (p_j + m Pn)) [Wu et al. 3.2]."""
    m, pn, z = len(negatives), 1 / len(bank), CONSTANT * len(bank)
    p = [math.exp(dot(row, v) / tau) / z for row in bank]
    return -math.log(p[own] / (p[own] + m * pn)) - sum(math.log(m * pn / (p[j] + m * pn)) for j in negatives)


def plain_background(v, bank, own, k):
    """(the set B_i, was the own image outside?): the k nearest rows, the last one out for the own image."""
    order = sorted(range(len(bank)), key=lambda j: -dot(bank[j], v))[:k]
    outside = own not in order
    return set(order[: k - outside]) | {own}, outside


def plain_aggregation(v, bank, own, k, clusterings, tau):
    """-log( P(C_i and B_i | v) / P(B_i | v) ), C_i all images that share a cluster with i [3, eq. 6]."""
    b, c = plain_background(v, bank, own, k)[0], set()
    for assign in clusterings:
        c |= {j for j in range(len(bank)) if assign[j] == assign[own]}
    e = [math.exp(dot(row, v) / tau) for row in bank]
    return -math.log(sum(e[j] for j in c & b) / sum(e[j] for j in b))


def assert_right(loss, plain, v, step=1e-5):
    """loss(v) (B,) and its gradient against plain(v_i, i) for each row and its central differences."""
    v = v.double().requires_grad_()
    each = loss(v)
    slope = torch.autograd.grad(each.sum(), v)[0].tolist()
    for i, row in enumerate(v.tolist()):
        assert each[i].item() == pytest.approx(plain(row, i), rel=1e-9)
        for d in range(len(row)):
            ends = [plain([x + s * (j == d) for j, x in enumerate(row)], i) for s in (step, -step)]
            assert slope[i][d] == pytest.approx((ends[0] - ends[1]) / (2 * step), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize(("b", "n", "d", "tau"), [(3, 12, 4, 1.0), (5, 20, 6, 0.3), (4, 30, 5, 0.07)])
def test_losses_are_their_formulas(b, n, d, tau):
    """Negatives: fewer and more than images, with the own one and repetitions. Neighbors: one other to all."""
    bank, v, index = rows(0, n, d, torch.float64), rows(2, b, d), torch.randperm(n, generator=seeded(1))[:b]
    own, listed, clusterings = (
        index.tolist(),
        bank.tolist(),
        torch.randint(4, (3, n), generator=seeded(3)).int(),
    )
    assert_right(
        lambda v: softmax(v, bank, index, tau), lambda x, i: plain_softmax(x, listed, own[i], tau), v
    )
    for m in (1, 7, 60):
        drawn = torch.randint(n, (b, m), generator=seeded(m))
        drawn[0, 0] = index[0]

        def want(x, i, drawn=drawn):
            return plain_nce(x, listed, own[i], drawn[i].tolist(), tau)

        assert_right(lambda v, drawn=drawn: nce(v, bank, index, drawn, tau), want, v)
    for k, h in ((2, 3), (9, 1), (9, 3), (n, 3)):
        some = clusterings[:h]

        def want(x, i, k=k, some=some):
            return plain_aggregation(x, listed, own[i], k, some.tolist(), tau)

        def loss(v, k=k, some=some):
            similarity, ids, _ = background(v, bank, index, k)
            return aggregation_loss(similarity, close_neighbors(some, index, ids), tau)

        assert_right(loss, want, v)


def log_sum(similarities, tau):
    """log of the sum of exp(s / tau), in decimal numbers that know no overflow."""
    return sum((Decimal(s) / Decimal(tau)).exp() for s in similarities).ln()


@pytest.mark.parametrize("tau", [1.0, 0.07, 0.03, 0.001])
def test_the_loss_of_float32_is_right_from_1e_minus_30_to_1000(tau):
    similarity = torch.linspace(-1, 1, 40).repeat(39, 1)
    close = torch.arange(40) >= torch.arange(1, 40)[:, None]  # the nearest 39, 38, .. 1
    close = torch.cat([close, ~close])
    got = aggregation_loss(similarity.repeat(2, 1), close, tau)
    for loss, mask in zip(got.tolist(), close, strict=True):
        far, near = (log_sum(similarity[0][m].tolist(), tau) for m in (~mask, mask))
        want = float(far - near) if far - near > 40 else math.log1p((far - near).exp())
        assert loss == pytest.approx(want, rel=1e-4 if tau > 0.01 else 3e-3, abs=1e-30)


def test_losses_where_everything_or_nothing_is_close():
    """Everything: exactly 0 and no gradient. Nothing: huge, and no NaN even then."""
    for tau in (0.07, 1e-4):
        similarity = rows(0, 5, 30).requires_grad_()
        loss = aggregation_loss(similarity, torch.ones(5, 30, dtype=torch.bool), tau)
        assert loss.eq(0).all() and torch.autograd.grad(loss.sum(), similarity)[0].eq(0).all()
        loss = aggregation_loss(similarity, torch.zeros(5, 30, dtype=torch.bool), tau)
        gradient = torch.autograd.grad(loss.sum(), similarity)[0]
        assert loss.min() > 1e30 and not loss.isnan().any() and gradient.isfinite().all()


def test_instance_recognition_in_float32_is_that_of_float64_and_does_not_overflow():
    """exp(1 / 0.001) is no float at all."""
    bank, index, drawn = rows(0, 50, 6), torch.arange(9), torch.randint(50, (9, 30), generator=seeded())
    for tau in (0.07, 0.001):
        for loss in (softmax, functools.partial(nce, negatives=drawn)):
            v = torch.cat([bank[:5], rows(1, 4, 6)]).requires_grad_()  # some know themselves
            want = loss(v.double(), bank.double(), index, tau=tau)
            torch.testing.assert_close(loss(v, bank, index, tau=tau).double(), want, rtol=1e-4, atol=1e-3)
            assert torch.autograd.grad(want.sum(), v)[0].isfinite().all()


@pytest.mark.parametrize("most", [1, 64 * 7, 2**27])
def test_background_is_the_brute_force_one(most):
    """The k nearest rows and the own one, however many rows of v are searched at a time."""
    found = Counter()
    for b, n, k in [(1, 1, 1), (3, 7, 2), (20, 64, 5), (20, 64, 1), (20, 64, 64), (64, 64, 40)]:
        bank, v, index = rows(b, n, 6), rows(b + 1, b, 6), torch.randperm(n, generator=seeded(3))[:b]
        v[: b // 2] = (v[: b // 2] + 2 * bank[index[: b // 2]]) / 3  # half of them know themselves
        similarity, ids, outside = background(v, bank, index, k, most=most)
        assert similarity.shape == ids.shape == (b, k) and outside.dtype == torch.bool
        torch.testing.assert_close(similarity, (v[:, None] * bank[ids]).sum(2), rtol=1e-5, atol=1e-6)
        for i in range(b):
            want = plain_background(v[i].tolist(), bank.tolist(), index[i].item(), k)
            assert (set(ids[i].tolist()), outside[i].item()) == want and len(want[0]) == k
        found.update(outside.tolist())
    assert found[True] > 20 and found[False] > 20


def test_the_search_holds_no_matrix_larger_than_allowed(monkeypatch):
    """At most `most` similarities at once, or those of one row."""
    real, seen = torch.Tensor.topk, []
    monkeypatch.setattr(torch.Tensor, "topk", lambda x, *a, **k: seen.append(x.numel()) or real(x, *a, **k))
    for most, largest in ((700, 600), (100, 200), (2**27, 60 * 200)):
        background(rows(1, 60, 3), rows(0, 200, 3), torch.arange(60), 3, most)
        assert max(seen) == largest and sum(seen) == 60 * 200
        seen.clear()


def test_an_opposite_embedding_leaves_a_row_of_unit_length():
    for wobble in (0.0, 1e-7, 1e-6, 1e-4):
        bank = rows(0, 10, 6)
        v = F.normalize(-bank[[2, 3]] + wobble * rows(1, 2, 6), dim=1)
        update_bank(bank, torch.tensor([2, 3]), v)
        torch.testing.assert_close(bank.norm(dim=1), torch.ones(10))


# --------------------------------------------------------------------------- network, recipes and steps


@pytest.mark.parametrize(("arch", "norms"), [("lenet5", 4), ("alexnet-small", 7), ("resnet18", 20)])
def test_embeddings_have_unit_length_and_only_batch_norm_has_no_decay(arch, norms):
    net = Network(options(["--data", "x", "--arch", arch, "--image-size", "16", "--dim", "12"]), 3)
    images = torch.randn(6, 3, 16, 16, generator=seeded())
    for mode in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=mode):
            v = net.train(mode)(images)
        assert v.shape == (6, 12) and v.dtype == torch.float32
        torch.testing.assert_close(v.norm(dim=1), torch.ones(6))
    assert not any(m.p for m in net.modules() if isinstance(m, nn.Dropout))
    names = {k.rsplit(".", 1)[0] for k in net.state_dict() if k.endswith("running_mean")}
    decay = {id(p): group["weight_decay"] for group in parameter_groups(net, 0.125) for p in group["params"]}
    assert len(names) == norms and len(decay) == len(list(net.parameters()))
    for name, p in net.named_parameters():
        assert decay[id(p)] == (0 if name.rsplit(".", 1)[0] in names else 0.125), name


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ("--data x --recipe imagenet", ("resnet18", 10, 30000, 200, [160, 187], 128)),
        ("--data x --recipe imagenet --arch alexnet", ("alexnet", 3, 10000, 160, [119, 142], 128)),
        ("--data x --recipe imagenet --arch vgg16", ("vgg16", 6, 10000, 168, [126, 148], 256)),
        ("--data x --recipe imagenet --arch resnet50 --k 7", ("resnet50", 10, 7, 200, [152, 189], 128)),
        ("--data digits --recipe imagenet --lr-steps", ("resnet18", 10, 30000, 200, [], 128)),
    ],
)
def test_recipes_are_the_papers_and_flags_override(argv, want):
    a = options(argv.split())
    assert (a.arch, a.clusterings, a.k, a.epochs, a.lr_steps, a.batch_size) == want
    assert (a.lr, a.wd, a.momentum, a.ir_epochs, a.temperature) == (0.03, 1e-4, 0.9, 10, 0.07)
    assert (a.num_neighbors, a.num_negatives, a.dim, a.bank_momentum) == (4096, 4096, 128, 0.5)
    assert (a.image_size, a.center_fraction, a.crop_area, a.flip, a.color) == (224, 0.875, 0.2, True, True)
    assert (a.loss, a.ir_loss, a.cluster_on, a.cluster_every) == ("la", "auto", "bank", 0)
    assert not any(jobs.unset(options(["--recipe", name])) for name in RECIPES)


@pytest.mark.parametrize("every", [1, 4, 10, 23, 100])
def test_an_epoch_is_cut_where_a_clustering_is_due(every):
    due, steps = set(), []
    for epoch in range(7):
        for start, stop, first in parts(10 * epoch, 10, every):
            assert start < stop
            steps += range(10 * epoch + start, 10 * epoch + stop)
            due |= {10 * epoch + start} if first else set()
    assert steps == list(range(70)) and due == set(range(0, 70, every))


TRAIN = """
import torch, common, local_aggregation as la
from types import SimpleNamespace
common.setup()
(rank, world), given = common.rank_and_world(), torch.load("given.pt")
args = SimpleNamespace(temperature=0.1, num_neighbors=25, bank_momentum=0.4, ir_loss="softmax", amp=False)
class Net(torch.nn.Linear):
    def forward(self, x):
        return torch.nn.functional.normalize(super().forward(x), dim=1)
net = Net(6, 5)
net.load_state_dict(dict(zip(("weight", "bias"), given["net"])))
optimizer, bank = torch.optim.SGD(net.parameters(), 0.2, 0.9, weight_decay=0.05), given["bank"]
net, found = common.parallel(net), []
for clusterings in (None, given["clusterings"]):
    mine = [index[rank::world] for index in torch.arange(60).split(20)]
    meter, batches = common.Meter("", 1), [(index, [given["images"][index]]) for index in mine]
    found.append(common.all_reduce_sum(la.train(net, optimizer, batches, bank, clusterings, meter, args)))
    found.append(torch.tensor(meter.mean_loss()))
torch.save([*net.state_dict().values(), bank, *found], f"found.{rank}")
"""


def simulate(given, momentum=0.9, wd=0.05, mix=0.4, k=25, h=2, tau=0.1, lr=0.2):
    """W, b, bank, and of both phases the sums and the mean loss, after three steps of each, in float64."""
    p, m, found = [v.double() for v in given["net"]], [0, 0], []
    bank, near = given["bank"].double(), []
    for phase in ("ir", "la"):
        losses, sums = [], torch.zeros(3, dtype=torch.float64)
        for index in torch.arange(60).split(20):
            p = [x.detach().requires_grad_() for x in p]
            v = F.linear(given["images"][index].double(), *p)
            v, total = v / v.norm(dim=1, keepdim=True), 0
            e = (v @ bank.T / tau).exp()  # (20, 60)
            for row, i in zip(e, index.tolist(), strict=True):
                if phase == "ir":
                    total = total - (row[i] / row.sum()).log()
                    continue
                near = row.argsort(descending=True)[:k].tolist()
                outside = i not in near
                near = near[: k - outside] + [i] * outside
                c = [j for j in near if any(a[j] == a[i] for a in given["clusterings"][:h].tolist())]
                total = total - (row[c].sum() / row[near].sum()).log()
                sums += torch.tensor([len(c), outside, math.log(len(near) / len(c))])
            losses.append(total / 20)
            gradients = torch.autograd.grad(losses[-1], p)
            m = [momentum * old + g + wd * x for old, g, x in zip(m, gradients, p, strict=True)]
            p = [x - lr * step for x, step in zip(p, m, strict=True)]
            mixed = mix * bank[index] + (1 - mix) * v.detach()
            bank[index] = mixed / mixed.norm(dim=1, keepdim=True)
        found += [sums, sum(losses) / 3]
    return [*p, bank, *found]


@pytest.mark.parametrize("world", [1, 2])
def test_steps_are_the_formulas_on_one_and_two_processes(launch, world):
    """Both phases: weights and so gradients, the bank, losses and what is counted, for the global batch."""
    given = {"net": [torch.randn(5, 6, generator=seeded(0)), torch.randn(5, generator=seeded(1))]}
    given |= {"images": torch.randn(60, 6, generator=seeded(2)), "bank": rows(3, 60, 5)}
    given |= {"clusterings": torch.randint(5, (2, 60), generator=seeded(4)).int()}
    torch.save(given, launch.path / "given.pt")
    job = launch(TRAIN, world)
    assert job.codes == [0] * world, job.err
    for rank in range(world):
        found = torch.load(launch.path / f"found.{rank}")
        for wrong in ({}, {"momentum": 0.8}, {"wd": 0}, {"mix": 0.5}, {"k": 24}, {"h": 1}):
            pairs = zip(found, simulate(given, **wrong), strict=True)
            off = max(((x - y).abs().max() / y.abs().max().clamp(min=1e-9)).item() for x, y in pairs)
            assert off > 1e-3 if wrong else off < 1e-5, wrong
        assert torch.equal(found[2], torch.load(launch.path / "found.0")[2])  # the banks, bit for bit


def plain_knn(queries, target, bank, labels):
    """Share of queries whose class the nearest rows tell, K = 1 and 200, each vote weighing exp(s / 0.07)."""
    right = Counter()
    for q, t in zip(queries.double().numpy(), target, strict=True):
        s = bank.double().numpy() @ q
        for k in (1, 200):
            votes = Counter()
            for j in np.argsort(-s)[:k]:
                votes[labels[j]] += math.exp(s[j] / 0.07)
            right[k] += votes.most_common(1)[0][0] == t
    return {f"knn_{k}": n / len(target) for k, n in right.items()}


# --------------------------------------------------------------------------- what runs when

# The script, with what it does written down: the losses and clusterings in order.
RECORD = """
import torch, common, local_aggregation as la
seen = {"events": [], "clusterings": []}
def watch(name):
    def wrapped(v, *rest, real=getattr(la, name)):
        if v.requires_grad:  # or it is no step, but the loss of a uniform prediction
            seen["events"].append(name)
        return real(v, *rest)
    setattr(la, name, wrapped)
def cluster(*a, real=la.cluster):
    seen["events"].append("cluster")
    seen["clusterings"].append(real(*a))
    return seen["clusterings"][-1]
for name in ("instance_softmax", "instance_nce", "aggregation_loss"):
    watch(name)
la.cluster, common.draw_clusters = cluster, lambda *a: None
la.main()
torch.save(seen, "seen")
"""
SCHEDULES = {  # name: (arguments, the loss of the first epochs, steps of it)
    "plain": ("", "instance_softmax", STEPS),
    "ir": ("--loss ir", "instance_softmax", 3 * STEPS),
    "nce": ("--ir-loss nce --num-negatives 50", "instance_nce", STEPS),
    "every": ("--cluster-every 4 --cluster-on center-crop --clusterings 1", "instance_softmax", STEPS),
}


@pytest.fixture(scope="module")
def recorded(run):
    """Jobs with .seen."""
    work = {name: functools.partial(run, f"{QUICK} {more}", RECORD) for name, (more, *_) in SCHEDULES.items()}
    found = two_at_once(work)
    for job in found.values():
        job.seen = torch.load(job.folder / "seen", weights_only=True)
    return found


@pytest.mark.parametrize("name", SCHEDULES)
def test_instance_recognition_first_then_clusters_then_aggregation(recorded, name):
    """--ir-epochs of the one or, with --loss ir, all; then clusterings before they are needed."""
    job, (flags, recognition, steps) = recorded[name], SCHEDULES[name]
    every = int(flags.split()[1]) if "--cluster-every" in flags else STEPS
    records, events = epochs(job.log()), job.seen["events"]
    total, losses = len(records) * STEPS, [e for e in events if e != "cluster"]
    assert losses == [recognition] * steps + ["aggregation_loss"] * (total - steps)
    at = [i - events[:i].count("cluster") for i, e in enumerate(events) if e == "cluster"]
    assert at == list(range(steps, total, every))
    p, q = 1 / (CONSTANT * N), 50 / N  # exp(0) for all
    uniform = -math.log(p / (p + q)) - 50 * math.log(q / (p + q)) if name == "nce" else math.log(N)
    for epoch, r in enumerate(records):
        assert r["phase"] == ("ir" if epoch * STEPS < steps else "la")
        assert ("clusters" in r) == any(a // STEPS == epoch for a in at)
        assert r["lr"] == pytest.approx(0.03 if epoch < 2 else 0.003)
        assert (
            r["uniform"] == pytest.approx(uniform, rel=1e-5) if r["phase"] == "ir" else 1 <= r["close"] <= 300
        )
    flat = {tuple(row.tolist()) for c in job.seen["clusterings"] for row in c}
    assert len(flat) == len(at) * job.log()[0]["args"]["clusterings"] and all(len(c) == N for c in flat)


# --------------------------------------------------------------------------- whole runs, and interrupted ones


@pytest.fixture(scope="module")
def whole(run):
    return run(QUICK, plain(SCRIPT))


def embeddings(job, data, random=False):
    """Of center crops, as backbone.pt tells to make them; random: with the batch norm of the first 256 images."""
    backbone, meta = common.load_backbone(job.run / "backbone.pt")
    layer = job.state("backbone.pt")["embedding"]
    loader = [common.Loader(x, 100, 16, 1.0, torch.device("cpu"), 0) for x in (digits()[0], data)]
    train, images = (torch.cat([x for _, x in it.test(torch.arange(len(it.data)))]) for it in loader)
    assert meta["method"] == "local_aggregation" and meta["center_fraction"] == 1.0
    for m in backbone.modules():
        m.momentum = 1.0  # nothing is kept of the statistics that are there
    with torch.no_grad():
        backbone.train(random)(train[:256])
        return F.normalize(F.linear(backbone.eval()(images).relu(), layer["weight"], layer["bias"]), dim=1)


def test_log_files_and_words_of_a_run(whole, recorded):
    (first, *records, last), labels = whole.log(), digits()[0].labels.tolist()
    assert first["args"]["ir_loss"] == "softmax" and (whole.run / "clusters.png").exists()
    found = [c[0].tolist() for c in recorded["plain"].seen["clusterings"]]
    for r, assign in zip(records[1:], found, strict=True):
        sizes = Counter(assign).values()
        assert [r["clusters"], r["smallest"], r["largest"]] == [len(sizes), min(sizes), max(sizes)]
        assert r["nmi_labels"] == pytest.approx(plain_nmi(labels, assign))
    assert records[2]["nmi_previous"] == pytest.approx(plain_nmi(*found)) and "nmi_previous" not in records[1]
    assert last["result"]["nmi_labels"] == pytest.approx(
        plain_nmi(labels, read_assignments(whole.run / "assignments.csv")[1])
    )
    assert whole.state()["clusterings"][0].tolist() == found[-1]
    shown = [f"{name} {100 * x['knn_1']:.1f} / {100 * x['knn_200']:.1f}" for name, x in last["knn"].items()]
    assert all(text in whole.out for text in shown)


def test_backbone_pt_and_clustering_pt_embed_and_assign_as_the_run_did(whole):
    train, test = digits()
    z, queries, labels = embeddings(whole, train), embeddings(whole, test), train.labels.tolist()
    got = torch.cdist(z.double(), whole.state("clustering.pt")["centroids"].double()).argmin(1).tolist()
    want = read_assignments(whole.run / "assignments.csv")[1]
    assert len(set(want)) > 5 and sum(map(int.__ne__, got, want)) <= 1  # one may lie between two
    *_, record, last = whole.log()
    pixels = [
        F.normalize(common.center_crop(x.pixels / 255, 16, 1.0).flatten(1) - x.mean[0]) for x in (test, train)
    ]
    bank, one = whole.state()["bank"], 1.01 / 360  # where two votes are as good as equal
    assert {k: record[k] for k in ("knn_1", "knn_200")} == last["knn"]["memory bank"]
    for name, places in {
        "memory bank": (queries, bank),
        "center crops": (queries, z),
        "pixels": pixels,
    }.items():
        want = plain_knn(places[0], test.labels.tolist(), places[1], labels)
        assert last["knn"][name] == pytest.approx(want, abs=one), name


def test_the_random_network_is_that_of_the_start_with_batch_norm_filled(run):
    job = run(QUICK + " --epochs 2 --lr 0")  # the weights stay as they were drawn
    z, queries = (embeddings(job, data, random=True) for data in digits())
    want = plain_knn(queries, digits()[1].labels.tolist(), z, digits()[0].labels.tolist())
    found = job.log()[-1]["knn"]["random network"]
    assert {name: found[name] for name in want} == pytest.approx(want, abs=1.01 / 360)


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("same", ""),
        ("same", "--cluster-on center-crop --ir-loss nce --num-negatives 7"),
        ("flat", "--k 24 --num-neighbors 2"),  # as many as there are images
        ("flat", "--k 1 --workers 1 --ir-epochs 0 --color --batch-size 24"),
    ],
)
def test_degenerate_data_runs_warns_and_has_no_nan(run, places, data, more):
    job = run(f"--data PLACES/{data} {SMALL} {more}")
    records, (images, clusters) = (
        epochs(job.log()),
        read_assignments(job.run / "assignments.csv"),
    )  # the log refuses NaN
    assert all(v.isfinite().all() for v in job.state()["net"].values())
    torch.testing.assert_close(job.state()["bank"].norm(dim=1), torch.ones(len(images)))
    assert "trivial" in job.out or "--k 24" in more
    assert not any("knn_1" in r or "nmi_labels" in r for r in [*records, job.log()[-1]["result"]])
    assert images == [str(p) for p in sorted((places / data).iterdir())]
    assert records[-1]["loss"] == 0 if "--k 1 " in more else records[-1]["loss"] >= 0
    assert "--k 24" not in more or len(set(clusters)) == 24


def test_knn_counts_the_readable_test_images_fewer_than_a_batch(run):
    for job in two_at_once(
        {w: lambda w=w: run("--data PLACES/both " + SMALL, world=w) for w in (1, 2)}
    ).values():
        assert {round(5 * epochs(job.log())[-1][k], 9) for k in ("knn_1", "knn_200")} <= {0, 1, 2, 3, 4, 5}


def test_the_defaults_learn(run):
    job = run("--epochs 24 --ir-epochs 5 --lr-steps 19 --image-size 24 --out run")  # of 60
    first, *records, last = job.log()
    reached = {name: x["knn_1"] for name, x in last["knn"].items()}
    assert reached["memory bank"] >= 0.9 and records[0]["knn_1"] < 0.5, reached  # by chance 0.1
    assert reached["center crops"] >= 0.93 and reached["random network"] > 0.85, reached
    assert records[-1]["loss"] < records[-1]["uniform"] / 3 and "WARNING" not in job.out


@pytest.mark.parametrize(
    "arguments",
    [
        f"{SMALL} --data PLACES/both --cluster-every 2 --cluster-on center-crop",
        f"{QUICK} --ir-loss nce --num-negatives 50 --cluster-every 15",
    ],
)
def test_other_kinds_of_runs_survive_a_kill_in_the_second_epoch(run, arguments):
    reference = run(arguments)
    killed = run(arguments, trap("local_aggregation", "update_bank", 2, late=True), ok=False)
    assert killed.code == -9 and killed.state()["epoch"] == 1
    assert_same(run(arguments, folder=killed.folder), reference)


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "parts", "world"),
    [
        ("--k 10000", ["try 28"], 1),
        ("--ir-epochs 3", ["--ir-epochs", "--loss ir"], 1),
        ("--num-negatives 64", ["--num-negatives", "--ir-loss nce"], 1),
        ("--num-neighbors 1", ["--num-neighbors"], 1),
        ("--temperature 0", ["--temperature"], 1),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(run, arguments, parts, world):
    line = one_error(run(f"{QUICK} --recipe digits {arguments}", world=world, ok=False))
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize("flags", ["--k 144", "--k 1", "--lr-steps 60", "--num-negatives 1437 --ir-loss nce"])
def test_what_is_likely_to_fail_is_said(flags, capsys):
    for quiet in ("--k 143", "--k 1 --loss ir", "--lr-steps 59", "--num-negatives 1436 --ir-loss nce"):
        local_aggregation.check(options(["--data", "digits", *quiet.split()]), range(N))
    assert capsys.readouterr().out == ""
    local_aggregation.check(args := options(["--data", "digits", *flags.split()]), range(N))
    (line,) = capsys.readouterr().out.splitlines()
    assert "WARNING" in line and flags.split()[0] in line and args.num_neighbors == N
    local_aggregation.check(args := options(["--recipe", "imagenet"]), range(1281167))
    assert (args.ir_loss, args.num_neighbors) == ("nce", 4096)
