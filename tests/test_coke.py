"""coke.py: its clustering, labels, losses and optimizer against plain loops; network, options, whole runs."""

import ast
import functools
import math
import re
from argparse import Namespace

import coke
import common
from coke import RECIPES, Network, check, describe, end_epoch, make_views, options, phase, stored

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, assert_same, epochs, one_error, plain, plain_nmi, read_assignments
from torch import nn

SCRIPT = ROOT / "coke.py"

# --------------------------------------------------------------------------- the algorithm, pasted
# All tests of formulas call what the pasted text defines.

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


def plain_label(label, new, w, most):
    """{cluster: share} after the cluster `new` came in with weight w; no more than `most` of them.

    There: its share <- (1 - w) share + w, others (1 - w). Not there: the smallest share u goes, if there is no free
    place, the others are scaled by (1 - w) / (1 - u), and w is its own."""
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
                self.centers[k], self.counts[k] = c if averaging else [v / math.hypot(*c) for v in c], n
        seen = []
        for i, f in zip(index, found, strict=True):
            old = self.labels[i]
            self.labels[i] = plain_label(old, f, w, self.slots)
            seen.append(old or self.labels[i])
        return seen

    def end(self, w):
        for k, (c, d) in enumerate(zip(self.previous, self.centers, strict=True)):
            mixed = [(1 - w) * x + w * y / math.hypot(*d) for x, y in zip(c, d, strict=True)]
            self.previous[k] = [x / math.hypot(*mixed) for x in mixed]
        self.centers, self.counts = [list(c) for c in self.previous], [0] * len(self.counts)


def as_label(labels, shares):
    pairs = [(c, s) for c, s in zip(labels.tolist(), shares.tolist(), strict=True) if s > 0]
    assert len({c for c, _ in pairs}) == len(pairs)
    return dict(pairs)


def assert_follows(head, plain):
    for name in ("previous", "centers", "duals", "counts"):
        want = torch.tensor(getattr(plain, name), dtype=torch.float64)
        torch.testing.assert_close(head[name], want, rtol=1e-9, atol=1e-9)
    for i, label in enumerate(plain.labels):
        assert as_label(head["labels"][i], head["shares"][i]) == pytest.approx(label, abs=1e-6)
    assert stored(head).tolist() == [max(x, key=x.get, default=-1) for x in plain.labels]


N, D, B = 44, 6, 8
# (averaging, w) of each epoch; w would be 1, 1/2, 1/3, others make shares that tell slots apart
STAGES = {"first": [(False, 1.0)] * 4, "second": [(False, 1.0)] * 2}
STAGES["second"] += [(True, w) for w in (1.0, 0.6, 0.45, 0.3, 0.35, 0.2)]


@pytest.mark.parametrize("ratio", [0.0, 0.9, 1.0])
@pytest.mark.parametrize(("stage", "k"), [("first", 7), ("first", 1), ("second", 4), ("second", 7)])
def test_a_head_moves_as_the_formulas_say(stage, k, ratio):
    """Labels, duals, centers and counts after every batch and every epoch; labels that the loss sees."""
    slots, evicted = 2 if stage == "second" else 1, 0
    head = new_head(k, D, N, slots, seeded(5))
    assert (stored(head) == -1).all() and torch.allclose(head["previous"].norm(dim=1), torch.ones(k))
    head = {name: x.double() if x.is_floating_point() else x for name, x in head.items()}
    plain = OneHead(head["previous"].tolist(), N, ratio, 0.7, slots)
    for epoch, (averaging, w) in enumerate(STAGES[stage]):
        order = torch.randperm(N, generator=seeded(epoch))
        for step in range(N // B):  # 5 batches; 4 images are left out
            index = order[step * B : (step + 1) * B]
            x = F.normalize(rows(99, N, D)[index] + 0.5 * rows(10 * epoch + step, B, D), dim=1)
            labels, shares = online_kmeans(head, index, x, ratio, 0.7, w, averaging)
            seen = plain.batch(index.tolist(), x.tolist(), averaging, w)
            assert_follows(head, plain)
            for b, label in enumerate(seen):
                assert as_label(labels[b], shares[b]) == pytest.approx(label, abs=1e-6)
                evicted += len(set(label) - set(plain.labels[index[b]])) * (w < 1)
        end_epoch([head], w)
        plain.end(w)
        assert_follows(head, plain)
    assert (evicted > 2 or stage == "first") and (head["duals"].abs().max() > 0.05 or k == 1 or ratio == 0)
    assert (head["duals"].min() < 0) == (ratio == 1 and k > 1)


def sizes_after(ratio, k, n=4000, d=8):
    """Sizes of the clusters after eight epochs: nine features of ten are around one direction, the others around nine."""
    gen, head = seeded(), new_head(k, d, n, 1, seeded(1))
    group = torch.where(torch.rand(n, generator=gen) < 0.9, 0, torch.randint(1, 10, (n,), generator=gen))
    x = torch.randn(10, d, generator=gen)[group] + 0.25 * torch.randn(n, d, generator=gen)
    x = F.normalize(x, dim=1)
    for epoch in range(8):
        end_epoch([head], 1.0)
        for index in torch.randperm(n, generator=seeded(epoch)).split(50):
            online_kmeans(head, index, x[index], ratio, 1.0)
    assert torch.bincount(stored(head), minlength=k).tolist() == head["counts"].tolist()
    return head["counts"].tolist()


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
    """Averaged labels, whose weights are exp(share / lambda'), 0 for empty slots, over their sum; what the other views
    predict has no gradient."""
    x, p = rows(1, views, 3, 4).requires_grad_(), rows(2, views, 3, 4).requires_grad_()
    centers, labels = rows(5, 6, 4), torch.tensor([[5, 0], [2, 1], [0, 3]])
    shares, targets = torch.tensor([[0.7, 0.3], [1.0, 0.0], [0.4, 0.6]], dtype=torch.float64), []
    for pair in zip(labels.tolist(), shares.tolist(), strict=True):
        e = {c: math.exp(share / 0.4) for c, share in zip(*pair, strict=True) if share}
        targets.append({c: y / sum(e.values()) for c, y in e.items()})
    weight = soft_targets(shares, 0.4)
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
        grad = torch.zeros(1) if net.weight.grad is None else net.weight.grad.clone()
        found += [net.weight.detach().clone(), grad]
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
        assert not found[4].any() and (found[9].norm() < 0.01) == (optimizer == "lars")  # there 0.001 |w|
        assert (heads[0]["shares"] > 0).sum(1).max() == 2 and heads[0]["duals"].any()
        if name != "multi":  # where these two are of the global crops alone
            assert found[0] == pytest.approx(0.7 * found[1] + 0.3 * found[2], rel=1e-5)


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_local_crops_have_their_weight(weight):
    """Loss = (1 - weight) mean over the global crops + weight mean over the local ones; clusters: of the global mean."""
    flags = f"--local-weight {weight} --predictor-weight 0 --data digits --views multi --batch-size 6"
    args, x, meter = options(flags.split()), rows(1, 5, 6, 4).float(), common.Meter("", 6)
    head, net = new_head(3, 4, 6, 1, seeded(2)), nn.Module()
    centers, net.forward = head["previous"].clone().tolist(), lambda views: (x, x)
    coke.train(net, None, [(torch.arange(6), [])], [0.0], [head], ("clustering", 1.0), meter, args)
    mean = x[:2].mean(0).tolist()
    assert stored(head).tolist() == [max(range(3), key=lambda k: dot(v, centers[k])) for v in mean]
    q = [[plain_softmax(v, centers, args.temperature) for v in view] for view in x.tolist()]
    targets, rest = [{c: 1.0} for c in stored(head).tolist()], (args.temperature, args.label_weight)
    each = plain_losses(x.tolist(), q, centers, targets, *rest)
    want = (1 - weight) * sum(each[:2]) / 2 + weight * sum(each[2:]) / 3
    assert meter.mean_loss() == pytest.approx(want, rel=1e-5)


def test_stages_and_rates_of_200_epochs_with_one_view():
    """T' = 160: then w = 1, 1/2, .., 1/40; before epoch 0 no training. The rate warms up and falls to 0."""
    args = Namespace(first_stage=0.8, epochs=200)
    found = [phase(epoch, args) for epoch in range(-1, 200)]
    assert found[:161] == [("clustering", 1.0)] + [("training", 1.0)] * 160
    assert found[161:] == [("averaging", 1 / j) for j in range(1, 41)]
    want = [1.6 * max(1, s) / 100 for s in range(100)]
    want += [0.8 * (1 + math.cos(math.pi * s / 900)) for s in range(900)]
    assert [learning_rate(1.6, s, 1000, 100) for s in range(1000)] == pytest.approx(want)
    assert [learning_rate(0.5, s, 4, warmup) for s, warmup in ((0, 0), (3, 8))] == [0.5, 0.1875]


@pytest.mark.parametrize("wd", [1e-6, 0.1, 0.0])
def test_lars_is_its_formula(wd):
    """20 steps with momentum: g + wd w scaled by 0.001 |w| / |g|; biases as they are; zero norms: factor 1."""
    gen, shapes = seeded(), dict(matrix=(4, 3), kernel=(2, 3, 3, 3), bias=(4,), zero=(3, 2), flat=(2, 2))  # noqa: C408
    w = {k: torch.randn(s, generator=gen, dtype=torch.float64) * (k != "zero") for k, s in shapes.items()}
    weights, m = {k: nn.Parameter(v.clone()) for k, v in w.items()}, dict.fromkeys(shapes, 0)
    optimizer = torch.optim.SGD(weights.values(), 0.3, 0.9)
    for _ in range(20):
        for k, v in weights.items():
            g = v.grad = torch.randn(shapes[k], generator=gen, dtype=torch.float64) * (k != "flat")
            if len(shapes[k]) > 1:
                g = g + wd * w[k]
                length, size = (math.sqrt(sum(x * x for x in y.flatten().tolist())) for y in (g, w[k]))
                g = g * (0.001 * size / length if size > 0 and length > 0 else 1)
            m[k] = 0.9 * m[k] + g
            w[k] = w[k] - 0.3 * m[k]
        lars([*weights.values(), nn.Parameter(torch.ones(2, 2))], wd)  # the last one has no gradient
        optimizer.step()
    for k, v in weights.items():
        torch.testing.assert_close(v.detach(), w[k], rtol=1e-12, atol=1e-14, msg=k)


def test_the_log_describes_the_heads():
    """Sizes, bound and scores of every head's labels, without images that have none; what changed since before."""
    args, gen = options(["--data", "digits", "--k", "3", "4", "--head", "4", "--ratio", "0.5"]), seeded()
    heads, truth = [new_head(k, 5, 30, 1, gen) for k in (3, 4)], torch.arange(30) % 4
    for first in (0, 5):
        before = stored(heads[1])
        for head in heads:
            online_kmeans(head, torch.arange(first, first + 20), rows(first, 20, 5).float(), 0.5, 1.0)
    known = [*range(3), *range(4, 25)]
    found = describe(heads, before, Namespace(labels=truth, unreadable={3}), args)
    for shown, head in zip(found["heads"], heads, strict=True):
        labels, counts = stored(head), head["counts"].tolist()
        assert shown["nmi_labels"] == pytest.approx(plain_nmi(truth[known].tolist(), labels[known].tolist()))
        assert (shown["smallest"], shown["largest"], 40) == (min(counts), max(counts), sum(counts))
        assert shown["bound"] == 0.5 * 40 / shown["k"]
    assert found["changed"] == pytest.approx((labels[:25] != before[:25]).sum().item() / 25)
    assert found["nmi_previous"] == pytest.approx(plain_nmi(before[:20].tolist(), labels[:20].tolist()))


def network(flags, channels=1):
    torch.manual_seed(0)
    return Network(options(["--data", "some/folder", "--image-size", "16", *flags.split()]), channels)


def widths(module):
    """(in, out) of linear layers and width of batch norms, in their order."""
    found = [m for m in module.modules() if isinstance(m, (nn.Linear, nn.BatchNorm1d))]
    return [(m.in_features, m.out_features) if isinstance(m, nn.Linear) else m.num_features for m in found]


@pytest.mark.parametrize(("arch", "d"), [("lenet5", 84), ("resnet18", 512)])
def test_the_network_is_the_papers(arch, d):
    """Projector d-d-d-128 with batch norm, after the last, too, predictor 128-d-128; shorter or without on demand. Of
    every view (B, 128), unit length, float32; each has the batch norm of its own; features are cut at 0 before."""
    net, sides = network(f"--arch {arch}", 3), (16, 16, 8 if d == 512 else 16)
    small = network("--arch lenet5 --projector-layers 2 --dim 7 --predictor-weight 0")
    assert widths(net.encoder[1]) == [(d, d), d, (d, d), d, (d, 128), 128]
    assert widths(net.predictor) == [(128, d), d, (d, 128)]
    assert widths(small.encoder[1]) == [(84, 84), 84, (84, 7), 7]
    assert torch.equal(*small([torch.randn(4, 1, 16, 16)]))
    views = [torch.randn(4, 3, side, side) + i for i, side in enumerate(sides)]
    with torch.no_grad():
        with torch.autocast("cpu", torch.bfloat16):
            both = torch.stack(net(views))
        assert both.shape == (2, 3, 4, 128) and both.dtype == torch.float32
        torch.testing.assert_close(both.norm(dim=-1), torch.ones(2, 3, 4))
        for images, *found in zip(views, *net(views), strict=True):
            z = net.encoder[1][1:](net.encoder[0](images).clamp(min=0))
            for y, got in zip((z, net.predictor(z)), found, strict=True):
                torch.testing.assert_close(got, y / y.norm(dim=1, keepdim=True), rtol=1e-4, atol=1e-5)


def test_views_are_those_of_the_released_code():
    """ImageNet: one view strong; two weak ones, blurred always and seldom, the second solarized; local ones strong."""
    folder, strong, weak = "--data some/folder --views", (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
    (single,), two, multi = (make_views(options(f"{folder} {v}".split())) for v in ("1", "2", "multi"))
    assert len(two) == 2 and two == multi[:2] and len(multi) == 8 and len(set(multi[2:])) == 1
    found = [(v.jitter, v.blur, v.solarize, v.area, v.size) for v in (single, *multi[:3])]
    first, second = ((weak, blur, solarize, (0.08, 1.0), 224) for blur, solarize in ((1.0, 0), (0.1, 0.2)))
    assert found == [(strong, 0.5, 0, (0.08, 1.0), 224), first, second, (strong, 0.5, 0, (0.05, 0.6), 96)]
    assert {(v.flip, v.gray, v.jitter_p) for v in (single, *multi)} == {(0.5, 0.2, 0.8)}
    for v in make_views(options(f"{folder} multi --no-flip --no-color --no-blur".split())):
        assert not (v.flip or v.gray or v.blur or v.solarize or any(v.jitter))


def values(flags, names):
    return [getattr(options(["--data", *flags.split()]), name) for name in names.split()]


def test_recipes_are_the_papers_and_flags_override():
    """Supplementary 2.1 and the code's numbers for folders, 2.4 for CIFAR; what hangs on the image size follows it."""
    names = "arch k epochs batch_size lr wd optimizer momentum warmup_epochs ratio dual_lr label_weight"
    want = ["resnet50", [3000, 4000, 5000], 1000, 1024, 1.6, 1e-6, "lars", 0.9, 10, 0.4, 20, 0.2]
    assert values("x --recipe imagenet", names) == want
    want = ["resnet18", list(range(20, 201, 20)), 400, 128, 0.2, 1e-4, "sgd", 0.9, 10, 0.9, 0.1, 0.2]
    assert values("cifar100-20", names) == want
    names = "temperature predictor_weight dim projector_layers init_epochs image_size center_fraction crop_area flip blur"
    assert values("x --recipe imagenet", names) == [0.05, 0.5, 128, 3, 1, 224, 0.875, 0.08, True, True]
    names = "epochs temperature first_stage label_size label_temperature out"
    assert values("x --recipe imagenet --views 1", names) == [1000, 0.1, 0.8, 5, 0.5, "runs/coke-x-1"]
    assert values("x --recipe imagenet --views multi", names) == [800, 0.05, 1, 5, 0.5, "runs/coke-x-multi"]
    assert values("x --recipe imagenet --views multi", "local_crops local_size local_weight") == [6, 96, 0.5]
    assert values("digits --views multi --image-size 20", "local_size epochs") == [20, 30]
    assert values("x --recipe digits --k 7 7 --flip", "k flip arch") == [[7, 7], True, "lenet5"]
    for recipe, views in [(recipe, views) for recipe in RECIPES for views in ("1", "2", "multi")]:
        if recipe.endswith(("-1", "-multi")):
            continue  # taken with --views alone
        assert jobs.unset(options(["--data", "x", "--recipe", recipe, "--views", views])) == {"head"}


IMPOSSIBLE = """--head 30 --k 10 20|--k 10 0|--ratio 1.1|--temperature 0|--batch-size 1|--views 3
--local-area 0.5 0.2 --views multi|--local-size 16 --views multi|--local-crops 2|--local-weight 0.1 --views 1
--label-weight 0.1 --views 1|--label-size 3|--label-temperature 0.1"""


@pytest.mark.parametrize("flags", re.split(r"[|\n]", IMPOSSIBLE))
def test_what_cannot_be_or_would_be_ignored_is_refused(flags, capsys):
    with pytest.raises(SystemExit) as end:
        options(["--data", "digits", *flags.split()])
    line = capsys.readouterr().err.splitlines()[-1]
    assert end.value.code == 2 and "error" in line and flags.split()[0] in line


def test_which_head_is_shown_and_what_is_warned_of(capsys):
    """The head with as many clusters as classes, else the first."""
    late = "--k 10 --warmup-epochs 9 --epochs 9"
    cases = [("--k 20 10 30", 500, 10, ""), ("--k 20 10 --head 20", 500, 20, ""), ("--k 20 30", 500, 20, "")]
    for flags, n, head, word in [*cases, ("--k 10", 99, 10, "--k 10"), (late, 500, 10, "--warmup-epochs")]:
        args = options(f"--data digits {flags}".split())
        check(args, common.Images("x", torch.zeros(n, 1), None, None, list(range(10))))
        said = capsys.readouterr().out
        assert args.head == head and said.count("WARNING") == bool(word) and word in said


# --------------------------------------------------------------------------- whole runs
STEPS = 1437 // 256  # of an epoch of the digits
QUICK = "--batch-size 256 --epochs 3 --warmup-epochs 1 --image-size 16 --dim 16 --out run"
SMALL = f"--recipe digits {QUICK} --batch-size 8 --k 4 2 --epochs 2 --workers 0"
QUICK += " --data digits --k 10 20"
ONE, MULTI = QUICK + " --views 1 --first-stage 0.4 --label-size 3", QUICK + " --views multi --local-crops 2"


@pytest.fixture(scope="module")
def whole(run):
    return {flags: run(flags, plain(SCRIPT)) for flags in (ONE, QUICK, MULTI)}


@pytest.mark.parametrize(("flags", "views"), [(ONE, "1"), (QUICK, "2"), (MULTI, "multi")])
def test_a_run_leaves_what_assigns_new_images(whole, flags, views):
    """backbone.pt, its projector and clustering.pt give every head's clusters, by the nearest center, without duals."""
    job, (train, test) = whole[flags], common.load_data("digits")
    net = Network(options(flags.split()), 1)
    backbone, meta = common.load_backbone(job.run / "backbone.pt")
    net.encoder[1].load_state_dict(job.state("backbone.pt")["projector"])
    net.encoder[0], model = backbone, job.state("clustering.pt")
    result, clusters = job.log()[-1]["result"], read_assignments(job.run / "assignments.csv")[1]
    assert meta["method"] == f"coke-{views}" and model["k"] == [10, 20] == [len(c) for c in model["centers"]]
    for h, centers in enumerate(model["centers"]):
        for name, data in (("train", train), ("test", test)):
            loader = common.Loader(data, 100, 16, 1.0, torch.device("cpu"), 0)
            with torch.no_grad():
                z = torch.cat([net.eval().encoder(x) for _, x in loader.test(torch.arange(len(data)))])
            found = (z @ centers.T).argmax(1).tolist()
            near = pytest.approx(result["heads"][h][name]["nmi_labels"], abs=0.01)  # a tie or two
            assert plain_nmi(data.labels.tolist(), found) == near
            if (h, name) == (0, "train"):
                assert len(found) - sum(map(int.__eq__, found, clusters)) < 4
                assert result["largest"] == max(map(clusters.count, set(clusters)))


@pytest.mark.parametrize("flags", [ONE, QUICK, MULTI])
def test_log_files_and_words_of_a_run(whole, flags):
    """Clustering, training, with one view averaging; rates by the step; result, random network and pixels last."""
    job, lines = whole[flags], whole[flags].out.splitlines()
    first, *records, last = job.log()
    assert [r["epoch"] for r in records] == [0, 1, 2, 3] and first["args"]["k"] == [10, 20]
    late = ["averaging" if flags == ONE else "training"] * 2
    assert [r["phase"] for r in records] == ["clustering", "training", *late]
    rates = [0.0, 0.04, *(0.025 * (1 + math.cos(math.pi * t / 10)) for t in (4, 9))]
    assert [r["lr"] for r in records] == pytest.approx(rates)
    assert records[0]["changed"] == 1 and "nmi_previous" not in records[0] and "nmi_previous" in records[1]
    for r in records:
        assert r["uniform"] == pytest.approx((math.log(10) + math.log(20)) / 2)
        assert [h["bound"] for h in r["heads"]] == pytest.approx([0.9 * STEPS * 256 / k for k in (10, 20)])
        assert r["smallest"] == r["heads"][0]["smallest"] <= 128 <= r["largest"]
    assert records[-1]["test"] == last["result"]["heads"][0]["test"]
    shown = [line for line in lines if line.startswith("epoch")]
    assert len(shown) == 4 and all("bound 115.2" in x for x in shown)
    assert (job.run / "clusters.png").exists() and job.err == ""
    scores = [last["result"]["heads"][0]["test"], *last["baselines"].values()]
    assert list(last["baselines"]) == ["random network", "pixels"]
    assert all(f"{100 * x['acc_labels']:.1f} / {100 * x['nmi_labels']:.1f}" in lines[-2] for x in scores)
    state = job.state()
    assert (state["heads"][1]["shares"] > 0).sum(1).max() == 1 + (flags == ONE)
    assert [g["weight_decay"] for g in state["optimizer"]["param_groups"]] == [1e-4, 0]  # weights, biases


@pytest.mark.parametrize(
    (
        "flags",
        "n",
        "saved",
    ),  # the online_kmeans that kills, for two heads a step; epochs that checkpoint.pt holds by then
    [
        (ONE, 3, None),  # in the clustering epoch
        (ONE, 6 * STEPS + 3, 3),  # averaging
        (MULTI, 2 * STEPS + 3, 1),
        (SMALL + " --data PLACES/both --optimizer lars", 8, 1),
    ],
)
def test_other_kinds_of_runs_survive_a_kill(run, whole, flags, n, saved):
    killed = run(flags, jobs.trap("coke", "coke", "online_kmeans", n), ok=False)
    assert -9 in killed.codes, killed.out + killed.err
    assert (killed.state()["epoch"] if (killed.run / "checkpoint.pt").exists() else None) == saved
    assert_same(run(flags, folder=killed.folder), whole.get(flags) or run(flags))


@pytest.mark.parametrize(
    ("arguments", "parts", "world"),
    [
        ("--k 10 1438", "--k 1438|1437|try 28", 1),
        ("--head 30", "--head 30|10 20", 1),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(run, arguments, parts, world):
    line = one_error(run(f"{QUICK} {arguments}", world=world, ok=False))
    assert all(part in line for part in parts.split("|")), line


@pytest.mark.parametrize(
    "more",
    [
        "--data PLACES/same --optimizer lars",
        "--data PLACES/flat --k 24 1 --ratio 1 --views 1 --first-stage 0 --predictor-weight 1",
        "--data PLACES/flat --init-epochs 0 --ratio 0 --label-weight 0",
        "--data PLACES/both --arch resnet18 --views multi --local-size 8 --color --blur --local-crops 2",
    ],
)
def test_odd_data_runs_and_every_number_is_finite(run, more):
    """Identical images, as many clusters as images, no labels; labels, files that cannot be read, all colors."""
    job = run(f"{SMALL} {more}")
    images, clusters = read_assignments(job.run / "assignments.csv")
    records = epochs(job.log())  # the log refuses NaN
    tables = [job.state()["net"], *job.state()["heads"]]
    assert all(x.isfinite().all() for table in tables for x in table.values())
    assert len(images) == len(set(images)) and ("unreadable" in clusters) == ("resnet18" in more)
    assert all(("nmi_labels" in r) == ("resnet18" in more) for r in records)
    if "resnet18" in more:  # of the five test images that can be read
        assert round(5 * records[-1]["test"]["acc_labels"], 9) in range(6)


def test_digits_are_learnt(run):
    """A quarter of `python coke.py`: better than k-means on the random network; the bound holds within sqrt(2 N)."""
    job = run("--data digits --epochs 14 --k 10 30 --out run")
    *_, record, last = job.log()
    reached, others = last["result"]["heads"][0]["test"], last["baselines"]
    assert reached["acc_labels"] > max(0.72, others["random network"]["acc_labels"] + 0.08), (reached, others)
    assert record["nmi_previous"] > 0.8 and record["loss"] < record["uniform"] / 1.5
    assert "WARNING" not in job.out
    assert record["smallest"] > record["bound"] - math.sqrt(2 * 1437) and record["heads"][1]["smallest"] > 0
