"""coke.py: its clustering, labels, losses and optimizer against plain loops from the formulas; network, options."""

import ast
import functools
import math
import re
from argparse import Namespace

import coke
import common
from coke import RECIPES, Network, check, describe, end_epoch, make_views, options, phase, stored

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, plain_nmi
from torch import nn

SCRIPT = ROOT / "coke.py"

# --------------------------------------------------------------------------- the algorithm, pasted
# All tests of formulas call what the pasted text defines, and so show that it can be pasted.

CELL = re.search(r"^# %% the algorithm.*?(?=^# %% )", SCRIPT.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
PASTED = {"math": math, "torch": torch, "F": F}
exec(compile(CELL, "the algorithm", "exec"), PASTED)
NAMES = "new_head online_kmeans soft_targets coke_loss learning_rate lars"
new_head, online_kmeans, soft_targets, coke_loss, learning_rate, lars = map(PASTED.get, NAMES.split())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(seed, *shape):
    """Random rows of unit length, float64."""
    return F.normalize(torch.randn(*shape, generator=seeded(seed), dtype=torch.float64), dim=-1)


def test_the_algorithm_is_functions_of_tensors():
    code = ast.parse(CELL)
    taken = {a.arg for a in ast.walk(code) if isinstance(a, ast.arg)}
    assert not {"args", "loader", "data", "self"} & taken
    assert all(isinstance(f, ast.FunctionDef) and ast.get_docstring(f) for f in code.body)


# --------------------------------------------------------------------------- one head in plain loops
# An image and a cluster at a time, from the formulas of the paper [3.1, 3.2].


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def unit(v):
    return [x / math.sqrt(dot(v, v)) for x in v]


def plain_label(label, new, w, most):
    """{cluster: share} after the cluster `new` came in with weight w; no more than `most` of them.

    There: its share <- (1 - w) share + w, others (1 - w). Not there: the smallest share u goes, if there is no
    free place, the others are scaled by (1 - w) / (1 - u), and w is its own. Nothing there yet: all is its own.
    """
    if not label or most == 1:
        return {new: 1.0}
    label, u = dict(label), 0.0
    if new not in label and len(label) == most:
        u = label.pop(min(label, key=label.get))
    label = {c: share * (1 - w) / (1 - u) for c, share in label.items()}
    label[new] = label.get(new, 0.0) + w
    return {c: share for c, share in label.items() if share > 0}


class OneHead:
    """What CoKe remembers for one head of K clusters."""

    def __init__(self, centers, images, ratio, dual_lr, slots):
        self.previous, self.centers = [list(c) for c in centers], [list(c) for c in centers]
        self.duals, self.counts = [0.0] * len(centers), [0] * len(centers)
        self.labels, self.ratio, self.dual_lr, self.slots = [{} for _ in range(images)], ratio, dual_lr, slots

    def batch(self, index, x, averaging, w):
        """Labels that the loss sees, {cluster: share} of each image."""
        centers, ks = self.previous if averaging else self.centers, range(len(self.duals))
        scores = [[dot(v, centers[k]) + self.duals[k] for k in ks] for v in x]
        found = [s.index(max(s)) for s in scores]
        for k in ks:
            hits = found.count(k)
            rho = self.duals[k] - self.dual_lr * (hits / len(x) - self.ratio / len(ks))
            self.duals[k] = rho if self.ratio == 1 else max(0.0, rho)
            if hits:
                n = self.counts[k] + hits
                sums = [sum(v[d] for v, f in zip(x, found, strict=True) if f == k) for d in range(len(x[0]))]
                c = [self.counts[k] / n * a + s / n for a, s in zip(self.centers[k], sums, strict=True)]
                self.centers[k], self.counts[k] = c if averaging else unit(c), n
        seen = []
        for i, f in zip(index, found, strict=True):
            old = self.labels[i]
            self.labels[i] = plain_label(old, f, w, self.slots)
            seen.append(old or self.labels[i])
        return seen

    def end(self, w):
        pairs = zip(self.previous, map(unit, self.centers), strict=True)
        self.previous = [unit([(1 - w) * a + w * b for a, b in zip(c, d, strict=True)]) for c, d in pairs]
        self.centers, self.counts = [list(c) for c in self.previous], [0] * len(self.counts)


def as_label(labels, shares):
    """{cluster: share} of one image; every cluster once."""
    pairs = [(c, s) for c, s in zip(labels.tolist(), shares.tolist(), strict=True) if s > 0]
    assert len({c for c, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.fixture
def double():
    """Double precision for all that has no type of its own: exact comparisons with the loops."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_same(head, plain):
    for name in ("previous", "centers", "duals", "counts"):
        want = torch.tensor(getattr(plain, name), dtype=torch.float64)
        torch.testing.assert_close(head[name], want, rtol=1e-9, atol=1e-9)
    for i, label in enumerate(plain.labels):
        assert as_label(head["labels"][i], head["shares"][i]) == pytest.approx(label, abs=1e-9)
    assert stored(head).tolist() == [max(x, key=x.get, default=-1) for x in plain.labels]


N, D, B = 44, 6, 8
STAGES = {  # (averaging, w) of each epoch; w would be 1, 1/2, 1/3, others make shares that tell slots apart
    "first": [(False, 1.0)] * 4,
    "second": [(False, 1.0)] * 2 + [(True, w) for w in (1.0, 0.6, 0.45, 0.3, 0.35, 0.2)],
}


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("stage", "k"), [("first", 7), ("first", 1), ("second", 4), ("second", 7)])
def test_a_head_moves_as_the_formulas_say(stage, k, ratio, double):
    """Labels, duals, centers and counts after every batch and every epoch; labels that the loss sees."""
    slots, evicted = 2 if stage == "second" else 1, 0
    head = new_head(k, D, N, slots, seeded(5))
    assert not head["shares"].any() and head["labels"].dtype == torch.int32 and (stored(head) == -1).all()
    torch.testing.assert_close(head["previous"].norm(dim=1), torch.ones(k))
    plain = OneHead(head["previous"].tolist(), N, ratio, 0.7, slots)
    for epoch, (averaging, w) in enumerate(STAGES[stage]):
        order = torch.randperm(N, generator=seeded(epoch))
        for step in range(N // B):  # 5 batches; 4 images are left out
            index = order[step * B : (step + 1) * B]
            x = F.normalize(rows(99, N, D)[index] + 0.5 * rows(10 * epoch + step, B, D), dim=1)
            labels, shares = online_kmeans(head, index, x, ratio, 0.7, w, averaging)
            seen = plain.batch(index.tolist(), x.tolist(), averaging, w)
            assert_same(head, plain)
            for b, label in enumerate(seen):
                assert as_label(labels[b], shares[b]) == pytest.approx(label, abs=1e-9)
                evicted += len(set(label) - set(plain.labels[index[b]])) * (w < 1)
        end_epoch([head], w)
        plain.end(w)
        assert_same(head, plain)
    assert (evicted > 2 or stage == "first") and (head["duals"].abs().max() > 0.05 or k == 1 or ratio == 0)
    assert (head["duals"].min() < 0) == (ratio == 1 and k > 1)


# --------------------------------------------------------------------------- the bound


def sizes_after(ratio, k, n=4000, d=8):
    """Sizes of the clusters after eight epochs over unbalanced features: nine images of ten around one direction, the
    others around nine more."""
    gen, head = seeded(), new_head(k, d, n, 1, seeded(1))
    group = torch.where(torch.rand(n, generator=gen) < 0.9, 0, torch.randint(1, 10, (n,), generator=gen))
    x = torch.randn(10, d, generator=gen)[group] + 0.25 * torch.randn(n, d, generator=gen)
    x = F.normalize(x, dim=1)
    for epoch in range(8):
        for index in torch.randperm(n, generator=seeded(epoch)).split(50):
            online_kmeans(head, index, x[index], ratio, 1.0)
        sizes = torch.bincount(stored(head), minlength=k)
        assert sizes.tolist() == head["counts"].tolist()
        end_epoch([head], 1.0)
    return sizes.tolist()


@pytest.mark.parametrize("k", [5, 10, 20])
def test_the_bound_raises_the_smallest_cluster(k):
    """Theorem 1: no cluster is more than sqrt(2N) below r N / K; without the constraint some are. r = 1: none is much
    larger than N / K either, while r = 0.4 leaves the large one large."""
    n, slack = 4000, math.sqrt(2 * 4000)  # 89; bounds at r = 0.9: 720, 360, 180
    sizes = {r: sizes_after(r, k) for r in (0.0, 0.4, 0.9, 1.0)}
    for r in (0.4, 0.9, 1.0):
        assert min(sizes[r]) >= r * n / k - slack, (r, sizes[r])
    assert min(sizes[0.9]) > 0.5 * n / k > 0.3 * n / k > min(sizes[0.0]), sizes
    assert max(sizes[1.0]) <= n / k + slack < max(sizes[0.4])


# --------------------------------------------------------------------------- averaged labels


@pytest.mark.parametrize("temperature", [0.5, 0.05, 1e-3])
def test_soft_targets_against_loops(temperature):
    """exp(share / lambda') over the sum of those of the clusters that are there; none for empty slots."""
    shares = torch.rand(6, 5, generator=seeded(1), dtype=torch.float64)
    shares[0, 1:] = shares[1, [0, 2]] = shares[2, 3] = 0
    shares = shares / shares.sum(1, keepdim=True)
    got = soft_targets(shares, temperature)
    for row, result in zip(shares.tolist(), got.tolist(), strict=True):
        e = [math.exp((s - max(row)) / temperature) if s > 0 else 0.0 for s in row]
        assert result == pytest.approx([x / sum(e) for x in e], abs=1e-12)
    assert got[0].tolist() == [1, 0, 0, 0, 0]


# --------------------------------------------------------------------------- losses


def plain_softmax(v, centers, tau):
    logits = [dot(v, c) / tau for c in centers]
    e = [math.exp(x - max(logits)) for x in logits]
    return [x / sum(e) for x in e]


def plain_losses(vectors, q, centers, targets, tau, a):
    """Of each view: mean over the images of the cross-entropy to the label {cluster: weight} and, with several views, to
    what the other global crop predicts, local crops: both [3.3, supplementary 2.2.3]. vectors, q: [view][image][..]."""
    losses, views, images = [], range(len(vectors)), range(len(vectors[0]))
    for v in views:
        each = []
        for i in images:
            logs = [math.log(s) for s in plain_softmax(vectors[v][i], centers, tau)]
            hard = -sum(w * logs[k] for k, w in targets[i].items())
            others = [] if len(vectors) == 1 else [1 - v] if v < 2 else [0, 1]
            soft = [-dot(q[o][i], logs) for o in others]
            each.append(a * hard + (1 - a) * sum(soft) / len(soft) if soft else hard)
        losses.append(sum(each) / len(each))
    return losses


@pytest.mark.parametrize(("views", "a", "tau"), [(1, 0.2, 0.1), (2, 0.2, 0.05), (2, 0.0, 0.3), (5, 0.7, 0.1)])
def test_the_loss_is_its_formula_and_so_is_its_gradient(views, a, tau):
    """Sparse labels; what the other views predict has no gradient."""
    x, p = rows(1, views, 3, 4).requires_grad_(), rows(2, views, 3, 4).requires_grad_()
    centers, labels = rows(5, 6, 4), torch.tensor([[5, 0], [2, 1], [0, 3]])
    weight = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.5, 0.5]], dtype=torch.float64)
    targets = [dict(zip(*pair, strict=True)) for pair in zip(labels.tolist(), weight.tolist(), strict=True)]
    found, listed = coke_loss(x, p, centers, labels, weight, tau, a), centers.tolist()
    q = [[plain_softmax(v, listed, tau) for v in view] for view in x.tolist()]
    for loss, y in zip(found, (x, p), strict=True):
        numbers = y.tolist()
        want = functools.partial(plain_losses, q=q, centers=listed, targets=targets, tau=tau, a=a)
        assert loss.tolist() == pytest.approx(want(numbers), rel=1e-9)
        gradient, slopes = torch.autograd.grad(loss.sum(), y, retain_graph=True)[0], torch.zeros_like(y)
        for v, i, d in np.ndindex(*y.shape):
            kept, ends = numbers[v][i][d], []
            for side in (1e-5, -1e-5):
                numbers[v][i][d] = kept + side
                ends.append(sum(want(numbers)))
            numbers[v][i][d] = kept
            slopes[v, i, d] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(gradient, slopes.detach(), rtol=1e-5, atol=1e-7)


# Three epochs of train() on a linear network without batch norm: all but the number of processes is the same.
TRAIN = """
import torch, common, coke
common.setup("cpu")
(rank, world), given = common.rank_and_world(), torch.load("given.pt")
class Net(torch.nn.Linear):
    def forward(self, views):
        z = torch.stack([super(Net, self).forward(v) for v in views])
        return torch.nn.functional.normalize(z, dim=-1), torch.nn.functional.normalize(z * z, dim=-1)
for name, views in given["views"].items():
    args = coke.options(["--data", "digits", "--views", name, "--batch-size", "20", *given["flags"]])
    net, found = Net(6, 5), []
    net.load_state_dict(given["net"])
    heads = [coke.new_head(k, 5, 60, 3, torch.Generator().manual_seed(k)) for k in (4, 7)]
    optimizer, trained = torch.optim.SGD(net.parameters(), 0.0, 0.9), common.parallel(net)
    for now in (("clustering", 1.0), ("training", 1.0), ("averaging", 0.5)):
        mine = [i[rank::world] for i in torch.arange(60).split(20)]
        batches, meter = [(i, [v[i] for v in views]) for i in mine], common.Meter("", 1)
        sums = coke.train(trained, optimizer, batches, [0.3, 0.2, 0.1], heads, now, meter, args)
        coke.end_epoch(heads, now[1])
        found += [meter.mean_loss(), *(common.all_reduce_sum(sums) / 60).tolist()]
        found += [x.detach().clone() for x in (net.weight, torch.zeros(1) if net.weight.grad is None else net.weight.grad)]
    torch.save([found, heads], f"{name}.{world}.{rank}")
"""


@pytest.mark.parametrize("optimizer", ["sgd", "lars"])
def test_steps_on_two_processes_are_those_of_one(launch, optimizer):
    """Losses, weights, gradients and heads to 1e-5, and the heads of both processes bit for bit. The first epoch trains
    nothing; the loss is (1 - b) that of the projections + b that of the predictions."""
    given = {"flags": f"--optimizer {optimizer} --dual-lr 0.7 --predictor-weight 0.3".split()}
    given["views"] = {name: list(rows(n, n, 60, 6).float()) for name, n in (("1", 1), ("2", 2), ("multi", 4))}
    given["net"] = {"weight": rows(7, 5, 6).float(), "bias": rows(8, 5).float()}
    torch.save(given, launch.path / "given.pt")
    for world in (1, 2):
        job = launch(TRAIN, world)
        assert job.codes == [0] * world, job.err
    for name in given["views"]:
        one, both, other = (torch.load(launch.path / f"{name}.{ends}") for ends in ("1.0", "2.0", "2.1"))
        torch.testing.assert_close(both, one, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(other[1], both[1], rtol=0, atol=0)
        found, heads = one
        assert torch.equal(found[3], given["net"]["weight"]) and not torch.equal(found[8], found[3])
        assert not found[4].any() and found[9].any() and heads[0]["duals"].any()
        assert (heads[0]["shares"] > 0).sum(1).max() == 2
        if name != "multi":  # where these two are of the global crops alone
            assert found[0] == pytest.approx(0.7 * found[1] + 0.3 * found[2], rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_local_crops_have_their_weight(weight):
    """Loss = (1 - weight) mean over the global crops + weight mean over the local ones; clusters: of the global mean."""
    flags = f"--local-weight {weight} --predictor-weight 0 --data digits --views multi --batch-size 6"
    args, x, meter = options(flags.split()), rows(1, 5, 6, 4).float(), common.Meter("", 6)
    head, net = new_head(3, 4, 6, 1, seeded(2)), nn.Module()
    previous, net.forward = head["previous"].clone(), lambda views: (x, x)
    coke.train(net, None, [(torch.arange(6), [])], [0.0], [head], ("clustering", 1.0), meter, args)
    assert torch.equal(stored(head), (x[:2].mean(0) @ previous.T).argmax(1))
    rest = head["labels"].long(), head["shares"], args.temperature, args.label_weight
    each = coke_loss(x, x, previous, *rest)[0]
    want = (1 - weight) * each[:2].mean() + weight * each[2:].mean()
    assert meter.mean_loss() == pytest.approx(want.item(), rel=1e-6)


# --------------------------------------------------------------------------- stages, learning rate, LARS


def test_stages_of_200_epochs_with_one_view():
    """T' = 160: then w = 1, 1/2, .., 1/40; before epoch 0 no training."""
    args = Namespace(first_stage=0.8, epochs=200)
    assert phase(-1, args) == ("clustering", 1.0)
    assert {phase(epoch, args) for epoch in range(160)} == {("training", 1.0)}
    assert [phase(159 + j, args) for j in range(1, 41)] == [("averaging", 1 / j) for j in range(1, 41)]
    assert phase(4, Namespace(first_stage=1.0, epochs=5)) == ("training", 1.0)
    assert phase(0, Namespace(first_stage=0.0, epochs=5)) == ("averaging", 1.0)


def test_learning_rate_warms_up_and_falls_to_0():
    want = [
        1.6 * max(1, s) / 100 if s < 100 else 0.8 * (1 + math.cos(math.pi * (s - 100) / 900))
        for s in range(1000)
    ]
    assert [learning_rate(1.6, s, 1000, 100) for s in range(1000)] == pytest.approx(want)
    assert learning_rate(0.5, 0, 10, 0) == 0.5
    assert learning_rate(0.5, 3, 4, 8) == pytest.approx(0.5 * 3 / 8)  # all epochs are warm-up


@pytest.mark.parametrize("wd", [1e-6, 0.1, 0.0])
def test_lars_is_its_formula(wd):
    """20 steps with momentum: g + wd w scaled by 0.001 |w| / |g|; biases as they are; zero norms: factor 1."""
    gen, shapes = (
        seeded(),
        {"matrix": (4, 3), "kernel": (2, 3, 3, 3), "bias": (4,), "zero": (3, 2), "flat": (2, 2)},
    )
    w = {k: torch.randn(s, generator=gen, dtype=torch.float64) * (k != "zero") for k, s in shapes.items()}
    weights, unused = {k: nn.Parameter(v.clone()) for k, v in w.items()}, nn.Parameter(torch.ones(2, 2))
    optimizer, m = torch.optim.SGD([*weights.values(), unused], 0.3, 0.9), dict.fromkeys(shapes, 0)
    for _ in range(20):
        for k, v in weights.items():
            g = v.grad = torch.randn(shapes[k], generator=gen, dtype=torch.float64) * (k != "flat")
            if len(shapes[k]) > 1:
                g = g + wd * w[k]
                length, size = (math.sqrt(sum(x * x for x in y.flatten().tolist())) for y in (g, w[k]))
                g = g * (0.001 * size / length if size > 0 and length > 0 else 1)
            m[k] = 0.9 * m[k] + g
            w[k] = w[k] - 0.3 * m[k]
        lars([*weights.values(), unused], wd)  # the last one has no gradient
        optimizer.step()
    for k, v in weights.items():
        torch.testing.assert_close(v.detach(), w[k], rtol=1e-12, atol=1e-14, msg=k)


# --------------------------------------------------------------------------- what a log says of the heads


def test_the_log_describes_the_heads():
    """Sizes, bound and scores of every head's labels, without images that have none; what changed since before."""
    args, gen = options(["--data", "digits", "--k", "3", "4", "--head", "4", "--ratio", "0.5"]), seeded()
    heads, truth = [new_head(k, 5, 30, 1, gen) for k in (3, 4)], torch.arange(30) % 4
    for first in (0, 5):
        before = stored(heads[1])
        for head in heads:
            online_kmeans(head, torch.arange(first, first + 20), rows(first, 20, 5).float(), 0.5, 1.0)
    found, known = (
        describe(heads, before, Namespace(labels=truth, unreadable={3}), args),
        [*range(3), *range(4, 25)],
    )
    for shown, head in zip(found["heads"], heads, strict=True):
        labels, counts = stored(head), head["counts"].tolist()
        assert shown["nmi_labels"] == pytest.approx(plain_nmi(truth[known].tolist(), labels[known].tolist()))
        assert (shown["smallest"], shown["largest"], 40) == (min(counts), max(counts), sum(counts))
        assert shown["bound"] == 0.5 * 40 / shown["k"]
    assert found["changed"] == pytest.approx((labels[:25] != before[:25]).sum().item() / 25)
    assert found["nmi_previous"] == pytest.approx(plain_nmi(before[:20].tolist(), labels[:20].tolist()))
    assert found["nmi_labels"] == shown["nmi_labels"]
    assert "nmi_previous" not in describe(
        heads, before * 0 - 1, Namespace(labels=None, unreadable=set()), args
    )


# --------------------------------------------------------------------------- network and views


def network(flags, channels=1):
    torch.manual_seed(0)
    return Network(options(["--data", "some/folder", "--image-size", "16", *flags.split()]), channels)


def widths(module):
    """(in, out) of linear layers and width of batch norms, in their order."""
    found = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))]
    return [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m.num_features for m in found]


@pytest.mark.parametrize(("arch", "d"), [("lenet5", 84), ("resnet18", 512)])
def test_projector_and_predictor_are_the_papers(arch, d):
    """d-d-d-128 with batch norm, after the last, too; 128-d-128; shorter or without on demand."""
    net, small = (
        network(f"--arch {arch}"),
        network("--arch lenet5 --projector-layers 2 --dim 7 --predictor-weight 0"),
    )
    assert widths(net.encoder[1]) == [(d, d), d, (d, d), d, (d, 128), 128]
    assert widths(net.predictor) == [(128, d), d, (d, 128)]
    assert widths(small.encoder[1]) == [(84, 84), 84, (84, 7), 7]
    assert torch.equal(*small([torch.randn(4, 1, 16, 16)]))


def test_the_network_gives_unit_projections_and_predictions_of_every_view():
    """(V, B, 128) in float32, bf16 or not; views of other sizes; each view has the batch norm of its own; features
    are cut at 0 before the projector."""
    net, gen = network("--arch resnet18", 3), seeded()
    views = [torch.randn(4, 3, side, side, generator=gen) + side for side in (16, 16, 8)]
    with torch.no_grad():
        for enabled in (True, False):
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                x, p = net(views)
            assert x.shape == p.shape == (3, 4, 128) and x.dtype == p.dtype == torch.float32
            torch.testing.assert_close(torch.stack([x, p]).norm(dim=-1), torch.ones(2, 3, 4))
        for v, images in enumerate(views):
            z = net.encoder[0](images).clamp(min=0)
            for layer in net.encoder[1]:
                z = layer(z)
            torch.testing.assert_close(x[v], z / z.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)
            z = net.predictor(z)
            torch.testing.assert_close(p[v], z / z.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_views_are_those_of_the_released_code():
    """ImageNet: one view strong; two weak ones, blurred always and seldom, the second solarized; local ones strong."""
    folder, strong, weak = "--data some/folder --views", (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
    (single,), two, multi = (make_views(options(f"{folder} {v}".split())) for v in ("1", "2", "multi"))
    assert len(two) == 2 and two == multi[:2] and len(multi) == 8 and len(set(multi[2:])) == 1
    found = [(v.jitter, v.blur, v.solarize, v.area, v.size) for v in (single, *multi[:3])]
    assert found == [
        (strong, 0.5, 0, (0.08, 1.0), 224),
        (weak, 1.0, 0, (0.08, 1.0), 224),
        (weak, 0.1, 0.2, (0.08, 1.0), 224),
        (strong, 0.5, 0, (0.05, 0.6), 96),
    ]
    assert {(v.flip, v.gray, v.jitter_p, v.ratio) for v in (single, *multi)} == {
        (0.5, 0.2, 0.8, (3 / 4, 4 / 3))
    }
    for v in make_views(options(f"{folder} multi --no-flip --no-color --no-blur".split())):
        assert not (v.flip or v.gray or v.blur or v.solarize or any(v.jitter))


# --------------------------------------------------------------------------- options


def values(flags, names):
    args = options(["--data", *flags.split()])
    return [getattr(args, name) for name in names.split()]


def test_recipes_are_the_papers_and_flags_override():
    """Supplementary 2.1 and the code's numbers for folders, 2.4 for CIFAR; what hangs on the image size follows it."""
    names = "arch k epochs batch_size lr wd optimizer momentum warmup_epochs ratio dual_lr label_weight"
    want = ["resnet50", [3000, 4000, 5000], 1000, 1024, 1.6, 1e-6, "lars", 0.9, 10, 0.4, 20, 0.2]
    assert values("some/folder", names) == want
    want = ["resnet18", list(range(20, 201, 20)), 400, 128, 0.2, 1e-4, "sgd", 0.9, 10, 0.9, 0.1, 0.2]
    assert values("cifar100-20", names) == want
    names = "temperature predictor_weight dim projector_layers init_epochs image_size center_fraction crop_area flip blur"
    assert values("x", names) == [0.05, 0.5, 128, 3, 1, 224, 0.875, 0.08, True, True]
    assert values("cifar10", names) == [0.05, 0.5, 128, 3, 1, 32, 1.0, 0.3, True, False]
    names = "epochs temperature first_stage label_size label_temperature out"
    assert values("x --views 1", names) == [1000, 0.1, 0.8, 5, 0.5, "runs/coke-x-1"]
    assert values("x --views multi", names) == [800, 0.05, 1, 5, 0.5, "runs/coke-x-multi"]
    assert values("x --views multi", "local_crops local_size local_weight") == [6, 96, 0.5]
    assert values("digits --views multi --image-size 20", "local_size epochs") == [20, 30]
    assert values("x --recipe digits --k 7 7 --lr 0.3 --flip", "k lr flip arch") == [
        [7, 7],
        0.3,
        True,
        "lenet5",
    ]
    for recipe, views in [(recipe, views) for recipe in RECIPES for views in ("1", "2", "multi")]:
        args = vars(options(["--data", "x", "--recipe", recipe, "--views", views]))
        assert [name for name, value in args.items() if value is None] == ["head"]


@pytest.mark.parametrize(
    "flags",
    """--head 30 --k 10 20
    --k 10 0
    --ratio 1.1
    --temperature 0
    --batch-size 1
    --local-area 0.5 0.2 --views multi
    --local-size 16 --views multi
    --local-crops 2
    --local-weight 0.1 --views 1
    --label-weight 0.1 --views 1
    --label-size 3
    --label-temperature 0.1""".splitlines(),
)
def test_what_cannot_be_or_would_be_ignored_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        options(["--data", "digits", *flags.split()])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error" in line and flags.split()[0] in line


@pytest.mark.parametrize(
    ("flags", "n", "classes", "head", "word"),
    [
        ("--k 20 10 30", 1437, 10, 10, ""),
        ("--k 20 10 --head 20", 1437, 10, 20, ""),
        ("--k 20 30", 1437, 0, 20, ""),
        ("--k 10", 99, 10, 10, "--k 10"),
        ("--k 10 --warmup-epochs 9", 1437, 10, 10, "--warmup-epochs"),
    ],
)
def test_which_head_is_shown_and_what_is_warned_of(flags, n, classes, head, word, capsys):
    """The head with as many clusters as classes, else the first."""
    args = options(f"--data digits --epochs 9 {flags}".split())
    check(args, common.Images("x", torch.zeros(n, 1), None, None, list(range(classes))))
    said = capsys.readouterr().out
    assert args.head == head and said.count("WARNING") == bool(word) and word in said
