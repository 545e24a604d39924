"""coke.py: its state, labels, losses and optimiser against plain loops from the formulas; options and recipes."""

import math
from argparse import Namespace

import coke
from coke import (
    Phase,
    assign,
    average_centres,
    average_labels,
    end_epoch,
    lars,
    learning_rate,
    make_net,
    make_views,
    new_memory,
    options,
    phase,
    soft_targets,
    step_duals,
    stored,
)

import numpy as np
import pytest
import torch
from jobs import ROOT, refusal
from torch import nn

SCRIPT = ROOT / "coke.py"


# --------------------------------------------------------------------------- one head in plain loops
# An image and a cluster at a time, in double precision, from the formulas of the paper [3.1, 3.2].


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


def one(v):
    """v at unit length."""
    length = math.sqrt(dot(v, v))
    return [x / length for x in v]


def directions(seed, *shape):
    """Random rows of unit length, float64."""
    x = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x / x.square().sum(-1, keepdim=True).sqrt()


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

    def __init__(self, centres, images, args):
        self.previous, self.centres = [list(c) for c in centres], [list(c) for c in centres]
        self.duals, self.counts = [0.0] * len(centres), [0] * len(centres)
        self.labels, self.args = [{} for _ in range(images)], args

    def batch(self, index, x, averaging, w):
        """(clusters found, labels that the loss sees, whether the label changed) of each image."""
        centres, ks = self.previous if averaging else self.centres, range(len(self.duals))
        found = []
        for v in x:
            score = [dot(v, centres[k]) + self.duals[k] for k in ks]
            found.append(score.index(max(score)))
        for k in ks:
            hits = found.count(k)
            rho = self.duals[k] - self.args.dual_lr * (hits / len(x) - self.args.ratio / len(ks))
            self.duals[k] = rho if self.args.ratio == 1 else max(0.0, rho)
            if hits:
                n = self.counts[k] + hits
                sums = [sum(v[d] for v, f in zip(x, found, strict=True) if f == k) for d in range(len(x[0]))]
                c = [self.counts[k] / n * a + s / n for a, s in zip(self.centres[k], sums, strict=True)]
                self.centres[k], self.counts[k] = c if averaging else one(c), n
        seen, changed = [], []
        for i, f in zip(index, found, strict=True):
            old = self.labels[i]
            self.labels[i] = plain_label(old, f, w, self.args.slots)
            seen.append(old or self.labels[i])
            changed.append(not old or max(old, key=old.get) != f)
        return found, seen, changed

    def end(self, w):
        new = map(one, self.centres)
        mixed = [
            [(1 - w) * a + w * b for a, b in zip(c, d, strict=True)]
            for c, d in zip(self.previous, new, strict=True)
        ]
        self.previous = [one(c) for c in mixed]
        self.centres, self.counts = [list(c) for c in self.previous], [0] * len(self.counts)


def as_label(labels, shares):
    """{cluster: share} of one image in one head; every cluster once."""
    pairs = [(c, s) for c, s in zip(labels.tolist(), shares.tolist(), strict=True) if s > 0]
    assert len({c for c, _ in pairs}) == len(pairs)
    return dict(pairs)


@pytest.fixture
def double():
    """Double precision for all that has no type of its own: exact comparisons with the loops."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def assert_label(got, want):
    assert got == pytest.approx(want, abs=1e-9), (got, want)


def assert_same_state(memory, heads):
    """Every tensor of the memory against the loops; nothing in the padding."""
    for h, head in enumerate(heads):
        k = len(head.duals)
        for name in ("previous", "centres", "duals", "counts"):
            want = torch.tensor(getattr(head, name), dtype=torch.float64)
            torch.testing.assert_close(memory[name][h, :k], want, rtol=1e-9, atol=1e-9, msg=name)
            assert memory[name][h, k:].eq(0).all(), name
        for i, label in enumerate(head.labels):
            assert_label(as_label(memory["labels"][i, h], memory["shares"][i, h]), label)
    biggest = [[max(head.labels[i], key=head.labels[i].get, default=-1) for head in heads] for i in range(N)]
    assert stored(memory).tolist() == biggest


N, D, B, KS = 44, 6, 8, [2, 7, 1, 4]
FIRST = Phase(True, False, 1.0, 0)
PHASES = {
    "first stage": [FIRST] * 4,
    # j = 1, 2, ..: the weights of the averages would be 1, 1/2, 1/3; others make shares that tell slots apart
    "second stage": [FIRST, FIRST, *(Phase(True, True, w, 0) for w in (1.0, 0.6, 0.45, 0.3, 0.35, 0.2))],
    "second stage from the start": [Phase(True, True, w, 0) for w in (1.0, 0.55, 0.4)],
    "clustering": [Phase(False, False, 1.0, 0)] * 2,
}


@pytest.mark.parametrize("ratio", [0.0, 0.4, 0.9, 1.0])
@pytest.mark.parametrize("name", PHASES)
def test_the_memory_moves_as_the_formulas_say(name, ratio, double):
    """Labels, duals, centres and counts after every batch and every epoch, in heads of different sizes."""
    slots = 2 if "second" in name else 1
    args = Namespace(ratio=ratio, dual_lr=0.7, slots=slots)
    memory = new_memory(KS, D, N, slots, "cpu", 5)
    heads = [OneHead(memory["previous"][h, :k].tolist(), N, args) for h, k in enumerate(KS)]
    assert_same_state(memory, heads)
    evicted = moved = 0
    for epoch, now in enumerate(PHASES[name]):
        order = torch.randperm(N, generator=torch.Generator().manual_seed(epoch))
        for step in range(N // B):  # 5 batches; 4 images are left out
            index = order[step * B : (step + 1) * B]
            x = directions(99, N, D)[index] + 0.5 * directions(10 * epoch + step, B, D)
            x = x / x.norm(dim=1, keepdim=True)
            before = [[set(head.labels[i]) for head in heads] for i in index.tolist()]
            labels, shares, changed = coke.cluster(memory, index, x, now, args)
            want = [head.batch(index.tolist(), x.tolist(), now.averaging, now.weight) for head in heads]
            assert_same_state(memory, heads)
            for b in range(B):
                for h in range(len(KS)):
                    assert_label(as_label(labels[b, h], shares[b, h]), want[h][1][b])
                    evicted += len(before[b][h] - set(heads[h].labels[index[b]])) * (now.weight < 1)
            assert changed.item() == pytest.approx(np.mean([c for _, _, c in want]))
            moved += sum(map(sum, (c for _, _, c in want)))
        memory = end_epoch(memory, now)
        for head in heads:
            head.end(now.weight)
        assert_same_state(memory, heads)
    assert moved > 20 and (evicted > 5 or name != "second stage")
    if ratio:
        assert memory["duals"].abs().max() > 0.05
    assert (memory["duals"].min() < 0) == (ratio == 1)


def test_new_memory_is_random_directions_and_nothing_else():
    """Unit centres, both the same, another for every head, key and cluster; no label, no dual; float32, int32."""
    memory = new_memory([50, 80], 32, 9, 5, "cpu", 1, "centres")
    kinds = {k: v.dtype for k, v in memory.items()}
    assert kinds.pop("exists") == torch.bool and kinds.pop("labels") == torch.int32
    assert set(kinds.values()) == {torch.float32}
    assert torch.equal(memory["previous"], memory["centres"])
    assert memory["previous"].data_ptr() != memory["centres"].data_ptr()
    exists = memory["exists"]
    assert exists.sum(1).tolist() == [50, 80] and exists[0, :50].all() and exists[1].all()
    torch.testing.assert_close(memory["centres"].norm(dim=-1), exists.float())
    all_of_them = memory["centres"][exists]  # (130, 32)
    gram = all_of_them @ all_of_them.T - torch.eye(130)
    assert gram.abs().max() < 0.9 and all_of_them.mean(0).abs().max() < 0.1
    assert memory["labels"].shape == memory["shares"].shape == (9, 2, 5)
    assert not any(memory[k].any() for k in ("duals", "counts", "shares")) and (stored(memory) == -1).all()
    other = new_memory([50, 80], 32, 9, 5, "cpu", 2, "centres")["centres"]
    assert not torch.equal(other, memory["centres"])
    assert torch.equal(new_memory([50, 80], 32, 9, 5, "cpu", 1, "centres")["centres"], memory["centres"])


@pytest.mark.parametrize("ratio", [0.0, 0.5, 1.0])
def test_padding_is_never_chosen(ratio):
    """Images opposite to every centre, duals far below 0: a padded cluster would have the larger score, 0."""
    memory = new_memory([2, 30], 4, 12, 1, "cpu", 0)
    memory["previous"][0, :2] = memory["centres"][0, :2] = torch.eye(4)[:1]
    x = -torch.eye(4)[:1].repeat(12, 1)
    memory["duals"][0, :2] = -3.0
    args = Namespace(ratio=ratio, dual_lr=1.0)
    found = assign(x, memory["centres"], memory["duals"], memory["exists"])
    assert found[:, 0].max() < 2
    for averaging in (False, True):
        for _ in range(3):
            coke.cluster(memory, torch.arange(12), x, Phase(True, averaging, 1.0, 0), args)
            assert stored(memory)[:, 0].max() < 2
            assert not memory["duals"][0, 2:].any() and not memory["counts"][0, 2:].any()
        memory = end_epoch(memory, Phase(True, averaging, 1.0, 0))
        assert not memory["previous"][0, 2:].any()


def test_heads_know_nothing_of_each_other(double):
    """Three heads at once are three heads one by one, bit for bit in labels."""
    args, ks = Namespace(ratio=0.8, dual_lr=0.5), [3, 9, 5]
    together = new_memory(ks, 5, 60, 2, "cpu", 3)
    memories = [new_memory([k], 5, 60, 2, "cpu", 3) for k in ks]
    for h, k in enumerate(ks):
        for name in ("previous", "centres"):
            memories[h][name] = together[name][h : h + 1, :k].clone()
    memories.append(together)
    for step, now in enumerate([FIRST] * 4 + [Phase(True, True, w, 0) for w in (1.0, 0.6, 0.3)]):
        index = torch.randperm(60, generator=torch.Generator().manual_seed(step))[:20]
        for i in range(4):
            coke.cluster(memories[i], index, directions(step, 20, 5), now, args)
            memories[i] = end_epoch(memories[i], now)
    *alone, together = memories
    for h, k in enumerate(ks):
        assert torch.equal(stored(together)[:, h], stored(alone[h])[:, 0])
        for name in ("previous", "duals"):
            torch.testing.assert_close(together[name][h, :k], alone[h][name][0])


def test_an_epochs_end_leaves_the_memory_before_it_alone():
    """A signal between the end and the checkpoint must find the memory as the last step left it."""
    memory, now = new_memory([3, 5], 4, 12, 2, "cpu", 1), Phase(True, True, 0.5, 0)
    coke.cluster(
        memory, torch.arange(12), directions(1, 12, 4).float(), now, Namespace(ratio=0.9, dual_lr=0.1)
    )
    kept = {name: tensor.clone() for name, tensor in memory.items()}
    after = end_epoch(memory, now)
    assert all(torch.equal(memory[name], tensor) for name, tensor in kept.items())
    assert after["counts"].sum() == 0 < kept["counts"].sum()


def test_hand_case_of_assignment_duals_and_centres(double):
    """Two clusters in the plane, four images: the dual of the empty cluster wins the next one."""
    memory = new_memory([2], 2, 4, 1, "cpu", 0)
    memory["previous"][0] = memory["centres"][0] = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
    x = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, -0.8], [0.8, 0.6]], dtype=torch.float64)
    args = Namespace(ratio=0.5, dual_lr=2.0)
    coke.cluster(memory, torch.arange(4), x, FIRST, args)
    assert stored(memory)[:, 0].tolist() == [0, 0, 0, 0]  # all on the right
    assert memory["duals"].tolist() == [[0.0, 0.5]]  # 0 - 2 (1 - 1/4) < 0; 0 - 2 (0 - 1/4)
    want = torch.tensor([3.0, 0.6], dtype=torch.float64) / math.hypot(3.0, 0.6)
    torch.testing.assert_close(memory["centres"][0, 0], want)
    assert memory["centres"][0, 1].tolist() == [-1, 0] and memory["counts"].tolist() == [[4, 0]]
    for _ in range(3):  # to the right of (1, 0) it is just below 1; to the left -1 + 0.5, + 1, + 1.5
        coke.cluster(memory, torch.arange(2), x[[0, 0]], FIRST, args)
    assert memory["duals"].tolist() == [[0, 2]] and memory["counts"].tolist() == [[10, 0]]
    coke.cluster(memory, torch.arange(2), x[[0, 0]], FIRST, args)  # -1 + 2
    assert stored(memory)[:2, 0].tolist() == [1, 1]
    assert memory["duals"].tolist() == [[0.5, 0.5]]  # 0 - 2 (0 - 1/4); 2 - 2 (1 - 1/4)
    assert memory["centres"][0, 1].tolist() == [1, 0] and memory["counts"].tolist() == [[10, 2]]


def test_the_floor_of_the_duals_is_for_inequalities_alone():
    """r = 1 asks for equal sizes: a cluster with too many is made unattractive; less than 1: only its floor 0."""
    members = torch.tensor([[1.0, 0.0]]).repeat(4, 1)[:, None]  # (4, 1, 2): all four in the first cluster
    exists, zero = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2)
    assert step_duals(zero, members, exists, 1, 0.1)[0].tolist() == pytest.approx([-0.05, 0.05])
    assert step_duals(zero, members, exists, 0.999, 0.1)[0].tolist() == pytest.approx([0, 0.04995])
    assert step_duals(zero, members, exists, 0, 0.1).tolist() == [[0, 0]]


def test_average_of_centres():
    """unit((1 - w) C_prev + w unit(C_now)): a hand case in the plane; w = 1 keeps nothing of the former."""
    previous, now = torch.tensor([[[1.0, 0.0]]]), torch.tensor([[[0.0, 0.2]]])  # not of unit length
    third = average_centres(previous, now, 1 / 3)[0, 0].tolist()
    assert third == pytest.approx([2 / math.sqrt(5), 1 / math.sqrt(5)])
    assert average_centres(previous, now, 1.0)[0, 0].tolist() == [0, 1]


# --------------------------------------------------------------------------- the bound


def unbalanced(n=4000, d=8):
    """Nine images of ten around one direction, the others around nine more."""
    gen = torch.Generator().manual_seed(0)
    group = torch.where(torch.rand(n, generator=gen) < 0.9, 0, torch.randint(1, 10, (n,), generator=gen))
    x = torch.randn(10, d, generator=gen)[group] + 0.25 * torch.randn(n, d, generator=gen)
    return x / x.norm(dim=1, keepdim=True)


def sizes_after(ratio, ks, epochs=8, batch=50, **more):
    """Images of every cluster in the last of some epochs over the unbalanced data, for each head."""
    x, args = unbalanced(), Namespace(ratio=ratio, dual_lr=1.0, **more)
    n = len(x)
    memory = new_memory(ks, x.shape[1], n, 1, "cpu", 0)
    for epoch in range(epochs):
        order = torch.randperm(n, generator=torch.Generator().manual_seed(epoch))
        for index in order.split(batch):
            coke.cluster(memory, index, x[index], FIRST, args)
        sizes = [torch.bincount(stored(memory)[:, h], minlength=k) for h, k in enumerate(ks)]
        assert [s.tolist() for s in sizes] == [
            memory["counts"][h, :k].int().tolist() for h, k in enumerate(ks)
        ]
        memory = end_epoch(memory, FIRST)
    return sizes


def test_every_cluster_reaches_its_bound():
    """Theorem 1: no cluster is more than sqrt(2N) below r N / K; without the constraint some are."""
    n, ks = 4000, [5, 10, 20]
    slack = math.sqrt(2 * n)  # 89; bounds at r = 0.9: 720, 360, 180
    smallest = {r: [int(s.min()) for s in sizes_after(r, ks)] for r in (0.0, 0.4, 0.9, 1.0)}
    for r in (0.4, 0.9, 1.0):
        for small, k in zip(smallest[r], ks, strict=True):
            assert small >= r * n / k - slack, (r, k, small)
    for small, k in zip(smallest[0.0], ks, strict=True):
        assert small < 0.4 * n / k - min(slack, 0.2 * n / k), (k, small)


def test_equality_holds_from_above_too():
    """r = 1: no cluster is much larger than N / K; r = 0.4 leaves the large one large."""
    n, k = 4000, 10
    equal, lower = sizes_after(1.0, [k])[0], sizes_after(0.4, [k])[0]
    assert equal.max() <= n / k + math.sqrt(2 * n)
    assert lower.max() > n / k + math.sqrt(2 * n) and lower.min() >= 0.4 * n / k - math.sqrt(2 * n)


# --------------------------------------------------------------------------- sparse labels


@pytest.mark.parametrize("slots", [1, 2, 5])
def test_average_labels_against_loops(slots, double):
    """Twenty epochs with random weights: S clusters at most, shares that sum to 1, evictions; new ones any time."""
    gen, images, ks = torch.Generator().manual_seed(slots), 30, [3, 9]
    labels = torch.zeros(images, 2, slots, dtype=torch.int64)
    shares = torch.zeros(images, 2, slots, dtype=torch.float64)
    plain = [[{}, {}] for _ in range(images)]
    evictions = present = fresh = 0
    for epoch in range(20):
        index = torch.randperm(images, generator=gen)[: 12 if epoch == 0 else 25]
        found = torch.stack([torch.randint(k, (len(index),), generator=gen) for k in ks], 1)
        w = 1.0 if epoch < 2 else 0.1 + 0.5 * torch.rand((), generator=gen).item()
        after = average_labels(labels[index], shares[index], found, w)
        labels[index], shares[index] = after
        torch.testing.assert_close(after[1].sum(-1), torch.ones(len(index), 2, dtype=torch.float64))
        assert (after[1] >= 0).all()
        for i, clusters in zip(index.tolist(), found.tolist(), strict=True):
            for h, new in enumerate(clusters):
                old = plain[i][h]
                plain[i][h] = plain_label(old, new, w, slots)
                fresh += not old and epoch > 0
                present += new in old
                evictions += len(old) == slots and new not in old
                assert_label(as_label(labels[i, h], shares[i, h]), plain[i][h])
    assert evictions > 50 and present > 50 and fresh > 5


def test_hand_case_of_an_eviction():
    """0.5, 0.3, 0.2 and a new cluster with weight 1/4: the 0.2 goes, the others become 0.75 / 0.8 of theirs."""
    labels, shares = torch.tensor([[[4, 0, 7]]]), torch.tensor([[[0.5, 0.2, 0.3]]])
    got = as_label(*(t[0, 0] for t in average_labels(labels, shares, torch.tensor([[9]]), 0.25)))
    assert got == pytest.approx({4: 0.46875, 7: 0.28125, 9: 0.25})
    got = as_label(*(t[0, 0] for t in average_labels(labels, shares, torch.tensor([[0]]), 0.25)))
    assert got == pytest.approx({4: 0.375, 0: 0.4, 7: 0.225})


def test_an_empty_slot_is_no_cluster_0():
    """Slots start as cluster 0 with share 0: cluster 0 is put in like any other, once."""
    labels, shares = torch.tensor([[[3, 0, 0]]]), torch.tensor([[[1.0, 0.0, 0.0]]])
    for w, want in [(0.5, {3: 0.5, 0: 0.5}), (0.25, {3: 0.375, 0: 0.625})]:
        labels, shares = average_labels(labels, shares, torch.tensor([[0]]), w)
        assert as_label(labels[0, 0], shares[0, 0]) == pytest.approx(want)


@pytest.mark.parametrize("temperature", [0.5, 0.05, 1e-3])
def test_soft_targets_against_loops(temperature):
    """exp(share / lambda') over the sum of those of the clusters that are there; none for empty slots."""
    shares = torch.rand(6, 2, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    shares[0, 0, 1:] = shares[1, 1, [0, 2]] = shares[2, :, 3] = 0
    shares = shares / shares.sum(-1, keepdim=True)
    got = soft_targets(shares, temperature)
    for row, result in zip(shares.flatten(0, 1).tolist(), got.flatten(0, 1).tolist(), strict=True):
        top = max(row)
        e = [math.exp((s - top) / temperature) if s > 0 else 0.0 for s in row]
        assert result == pytest.approx([x / sum(e) for x in e], abs=1e-12)
    assert got[0, 0].tolist() == [1, 0, 0, 0, 0]


# --------------------------------------------------------------------------- losses
# One call of train() with a network that gives what it is given, so that its gradient can be looked at.


class Given(nn.Module):
    """Projections and predictions (V, B, D) that are weights themselves; keeps the mode it was put in."""

    def __init__(self, x, p):
        super().__init__()
        self.x, self.p = nn.Parameter(x.clone()), nn.Parameter(p.clone())

    def forward(self, views):
        return self.x * 1, self.p * 1


class OneBatch:
    """A loader of one batch that keeps the views it is asked for."""

    device = torch.device("cpu")

    def __init__(self, index):
        self.index = index

    def epoch(self, epoch, views, start=0):
        self.views = views
        yield self.index, [None] * len(views)


def plain_softmax(logits):
    top = max(logits)
    e = [math.exp(v - top) for v in logits]
    return [v / sum(e) for v in e]


def plain_losses(x, p, heads, args, q=None):
    """{"all", "x", "p"} of one batch [3.3, supplementary 2.2.3, 2.2.4], view by view, image by image, head by head.

    x, p: [view][image][number]; heads: [(C_prev, [target of the label, {cluster: weight}, of each image])].
    q: where the large crops are, [view][image][head][cluster], if they shall not follow x.
    """
    a, b, tau = args.label_share, args.predictor_share, args.temperature
    views, images = range(len(x)), range(len(x[0]))

    def logits(v, centres):
        return [dot(v, c) / tau for c in centres]

    if q is None:
        q = [[[plain_softmax(logits(x[v][i], c)) for c, _ in heads] for i in images] for v in views[:2]]
    each = {"x": [], "p": []}
    for name, vectors in (("x", x), ("p", p)):
        for v in views:
            losses = []
            for i in images:
                for h, (centres, targets) in enumerate(heads):
                    logs = [math.log(s) for s in plain_softmax(logits(vectors[v][i], centres))]
                    hard = -sum(w * logs[k] for k, w in targets[i].items())
                    others = [] if len(x) == 1 else [1 - v] if v < 2 else [0, 1]
                    soft = [-sum(t * y for t, y in zip(q[o][i][h], logs, strict=True)) for o in others]
                    losses.append(a * hard + (1 - a) * sum(soft) / len(soft) if soft else hard)
            each[name].append(sum(losses) / len(losses))
    both = [b * lp + (1 - b) * lx for lx, lp in zip(each["x"], each["p"], strict=True)]

    def mean(numbers):
        return sum(numbers) / len(numbers)

    loss = mean(both[:2])
    if len(both) > 2:
        loss = (1 - args.small_share) * loss + args.small_share * mean(both[2:])
    return {"all": loss, "x": mean(each["x"][:2]), "p": mean(each["p"][:2])}, q


LOSSES = {  # name: (crops, flags)
    "one view": (1, ["--views", "1"]),
    "one view, predictions weigh 0.3": (1, ["--views", "1", "--predictor-share", "0.3"]),
    "two views": (2, []),
    "two views, other shares": (
        2,
        ["--label-share", "0.7", "--predictor-share", "0.2", "--temperature", "0.3"],
    ),
    "two views, other view alone": (2, ["--label-share", "0", "--predictor-share", "1"]),
    "two views, label alone": (2, ["--label-share", "1", "--predictor-share", "0"]),
    "three small crops": (5, ["--views", "multi", "--small-crops", "3"]),
    "one small crop": (3, ["--views", "multi", "--small-crops", "1", "--small-share", "0.2"]),
    "six small crops": (8, ["--views", "multi", "--label-share", "0.35"]),
}


@pytest.mark.parametrize("averaging", [False, True])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_its_formula_and_so_is_its_gradient(name, averaging, double):
    """a, b, T, both views, small crops, several heads, sparse labels; the other views' q has no gradient."""
    views, flags = LOSSES[name]
    args = options(["--data", "some/folder", "--arch", "lenet5", "--label-temperature", "0.4", *flags])
    args.lr, args.amp, args.batch_size, args.epochs, args.k = 0.0, False, 3, 1, [2, 5, 3]
    args.optimizer = "sgd"
    x, p = directions(1, views, 3, 4), directions(2, views, 3, 4)
    index, slots = torch.tensor([5, 0, 3]), 3 if averaging else 1
    memory = new_memory(args.k, 4, 7, slots, "cpu", 1)
    memory["centres"] = directions(
        5, 3, 5, 4
    )  # as if some batches had moved them: the loss knows C_prev alone
    now = Phase(True, averaging, 0.25 if averaging else 1.0, 0)
    hard, label = Namespace(slots=slots), {}
    for i in (5, 0):  # image 3 is new: its target is the cluster found now
        for h, k in enumerate(args.k):
            kept = {(i + h) % k: 0.7, (i + h + 1) % k: 0.3} if averaging else {(i + h) % k: 1.0}
            for s, (cluster, share) in enumerate(kept.items()):
                memory["labels"][i, h, s], memory["shares"][i, h, s] = cluster, share
            label[i, h] = kept
    hard.ratio, hard.dual_lr, heads, before = args.ratio, args.dual_lr, [], stored(memory)
    changed = []
    for h, k in enumerate(args.k):
        head = OneHead(memory["previous"][h, :k].tolist(), 7, hard)
        head.centres = memory["centres"][h, :k].tolist()
        head.labels = [label.get((i, h), {}) for i in range(7)]
        found, seen, new = head.batch(index.tolist(), x[:2].mean(0).tolist(), averaging, now.weight)
        weights = [[math.exp(s / 0.4) for s in one_label.values()] for one_label in seen]
        targets = [
            {c: w / sum(ws) for c, w in zip(one_label, ws, strict=True)}
            for one_label, ws in zip(seen, weights, strict=True)
        ]
        heads.append((memory["previous"][h, :k].tolist(), targets))
        changed += new
    net = Given(x, p)
    optimizer, loader = torch.optim.SGD(net.parameters(), 0.1), OneBatch(index)
    step, sums, signal = coke.train(net, optimizer, loader, memory, 1, 0, 1, [1.0, 2.0, 3.0, 4.0], now, args)
    assert (step, signal) == (1, 0) and len(loader.views) == views
    x, p = x.tolist(), p.tolist()
    want, q = plain_losses(x, p, heads, args)
    shown = [want["all"], want["x"], want["p"], np.mean(changed)]
    assert [s - i for i, s in enumerate(sums, 1)] == pytest.approx(shown, rel=1e-5)
    for name, numbers in (("x", x), ("p", p)):
        gradient = getattr(net, name).grad
        slopes = torch.zeros(views, 3, 4, dtype=torch.float64)
        for v, i, d in [(v, i, d) for v in range(views) for i in range(3) for d in range(4)]:
            kept, ends = numbers[v][i][d], []
            for side in (1e-5, -1e-5):
                numbers[v][i][d] = kept + side
                ends.append(plain_losses(x, p, heads, args, q)[0]["all"])
            numbers[v][i][d] = kept
            slopes[v, i, d] = (ends[0] - ends[1]) / 2e-5
        torch.testing.assert_close(gradient, slopes, rtol=1e-5, atol=1e-8)
    assert net.x.grad.abs().max() + net.p.grad.abs().max() > 1e-3
    assert before.shape == (7, 3) and (stored(memory)[3] >= 0).all() and (before[3] == -1).all()


def test_clusterings_own_epoch_learns_nothing(double):
    """--init-epochs: the memory moves, the loss is said, weights and the optimiser stay as they were."""
    args = options(["--data", "digits", "--k", "4", "--batch-size", "6", "--epochs", "1", "--lr", "0.5"])
    args.amp = False
    for learn in (False, True):
        net = Given(directions(1, 2, 6, 4), directions(2, 2, 6, 4))
        memory = new_memory([4], 4, 6, 1, "cpu", 1)
        optimizer = torch.optim.SGD(net.parameters(), 0.1, 0.9)
        start = net.x.detach().clone()
        now = Phase(learn, False, 1.0, 0)
        _, sums, _ = coke.train(
            net, optimizer, OneBatch(torch.arange(6)), memory, 0, 0, 1, [0.0] * 4, now, args
        )
        assert net.training and sums[0] > 0.5 and sums[3] == 1  # every label is new
        assert torch.equal(net.x.detach(), start) == (not learn)
        assert (net.x.grad is None) == (not learn) and bool(optimizer.state) == learn
        assert (stored(memory) >= 0).all()


# --------------------------------------------------------------------------- stages, learning rate, LARS


def test_stages_of_200_epochs_with_one_view():
    """T' = 160: then w = 1, 1/2, .., 1/40; one epoch before them that clusters and does not learn."""
    args = Namespace(init_epochs=1, first_stage=0.8, epochs=200)
    assert phase(0, 7, args) == Phase(False, False, 1.0, 0)
    for epoch in range(1, 161):
        assert phase(epoch, 7, args) == Phase(True, False, 1.0, 7 * (epoch - 1))
    for j in range(1, 41):
        assert phase(160 + j, 7, args) == Phase(True, True, 1 / j, 7 * (159 + j))


def test_other_stages():
    """More epochs of clustering or none, no second stage, nothing but a second stage."""
    never = Namespace(init_epochs=2, first_stage=1.0, epochs=5)
    found = [phase(e, 3, never) for e in range(7)]
    assert [p.learn for p in found] == [False] * 2 + [True] * 5
    assert not any(p.averaging for p in found) and {p.weight for p in found} == {1.0}
    assert [p.done for p in found] == [0, 0, 0, 3, 6, 9, 12]
    none = [phase(e, 3, Namespace(init_epochs=0, first_stage=0.5, epochs=4)) for e in range(4)]
    assert none == [Phase(True, e > 1, [1, 1, 1, 0.5][e], 3 * e) for e in range(4)]
    only = [phase(e, 3, Namespace(init_epochs=1, first_stage=0.0, epochs=3)) for e in range(4)]
    assert [(p.learn, p.averaging) for p in only[1:]] == [(True, True)] * 3
    assert [p.weight for p in only[1:]] == [1, 1 / 2, 1 / 3] and not only[0].learn and only[0].weight == 1


def test_learning_rate_warms_up_and_falls_to_0():
    """A line over the warm-up, then a cosine per step; what it is depends on the step alone."""
    lr, steps, warm_up = 1.6, 1000, 100
    all_of_them = [learning_rate(lr, s, steps, warm_up) for s in range(steps)]
    assert all_of_them == [learning_rate(lr, s, steps, warm_up) for s in reversed(range(steps))][::-1]
    for s in range(1, warm_up):
        assert all_of_them[s] == pytest.approx(lr * s / warm_up)
    assert 0 < all_of_them[0] <= lr / warm_up and all_of_them[warm_up] == max(all_of_them) == lr
    for s in range(warm_up, steps):
        assert all_of_them[s] == pytest.approx(lr / 2 * (1 + math.cos(math.pi * (s - warm_up) / 900)))
    assert all(a <= b for a, b in zip(all_of_them[:100], all_of_them[1:101], strict=True))
    assert all(a > b for a, b in zip(all_of_them[100:], all_of_them[101:], strict=False))
    assert 0 < all_of_them[-1] < 1e-5 * lr
    assert learning_rate(0.5, 0, 10, 0) == 0.5 and learning_rate(0.5, 10, 10, 0) == pytest.approx(0)
    assert learning_rate(0.5, 3, 4, 8) == pytest.approx(0.5 * 3 / 8)  # all epochs are warm-up: no crash


@pytest.mark.parametrize("wd", [1e-6, 0.1, 0.0])
def test_lars_is_its_formula(wd):
    """20 steps with momentum: g + wd w scaled by 0.001 |w| / |g|; biases as they are; zero norms: factor 1."""
    gen = torch.Generator().manual_seed(0)
    shapes = {
        "matrix": (4, 3),
        "kernel": (2, 3, 3, 3),
        "bias": (4,),
        "scalar": (),
        "zero": (3, 2),
        "flat": (2, 2),
    }
    w = {k: torch.randn(s, generator=gen, dtype=torch.float64) for k, s in shapes.items()}
    w["zero"][:] = 0
    weights = {k: nn.Parameter(v.clone()) for k, v in w.items()}
    unused = nn.Parameter(torch.ones(2, 2))  # without a gradient
    optimizer = torch.optim.SGD([*weights.values(), unused], 0.3, 0.9)
    plain = {k: v.numpy().copy() for k, v in w.items()}
    m = {k: np.zeros(s) for k, s in shapes.items()}
    for step in range(20):
        optimizer.zero_grad()
        for k, v in weights.items():
            g = torch.randn(shapes[k], generator=gen, dtype=torch.float64) * (k != "flat")
            v.grad = g.clone()
            g, lr = g.numpy(), 0.3 / (step + 1)
            if len(shapes[k]) > 1:
                g = g + wd * plain[k]
                length, size = math.sqrt((g**2).sum()), math.sqrt((plain[k] ** 2).sum())
                g = g * (0.001 * size / length if size > 0 and length > 0 else 1)
            m[k] = 0.9 * m[k] + g
            plain[k] = plain[k] - lr * m[k]
            optimizer.param_groups[0]["lr"] = lr
        lars([*weights.values(), unused], wd)
        optimizer.step()
        for k, v in weights.items():
            np.testing.assert_allclose(v.detach().numpy(), plain[k], rtol=1e-12, atol=1e-14, err_msg=k)
    assert torch.equal(unused, torch.ones(2, 2))
    assert np.abs(plain["matrix"] - w["matrix"].numpy()).max() > 1e-4
    if wd == 0:
        np.testing.assert_array_equal(plain["flat"], w["flat"].numpy())


# --------------------------------------------------------------------------- network and views


def net_of(*flags, channels=1, size=16):
    args = options(["--data", "some/folder", "--image-size", str(size), "--resize", str(size), *flags])
    torch.manual_seed(0)
    return make_net(args, channels)


def widths(module):
    """[in, out] of linear layers and [width] of batch norms, in their order."""
    found = []
    for m in module.modules():
        if isinstance(m, nn.Linear):
            found.append([m.in_features, m.out_features])
        if isinstance(m, nn.BatchNorm1d):
            found.append([m.num_features])
    return found


@pytest.mark.parametrize(("arch", "d"), [("lenet5", 84), ("resnet18", 512)])
def test_projector_and_predictor_are_the_papers(arch, d):
    """d-d-d-128 with batch norm, after the last, too; 128-d-128; shorter or without on demand."""
    trunk, net = net_of("--arch", arch)
    assert widths(net.encoder[1]) == [[d, d], [d], [d, d], [d], [d, 128], [128]]
    assert widths(net.predictor) == [[128, d], [d], [d, 128]]
    assert trunk is net.encoder[0] and trunk.dim == d
    _, small = net_of("--arch", arch, "--projector-layers", "2", "--dim", "7", "--predictor-share", "0")
    assert widths(small.encoder[1]) == [[d, d], [d], [d, 7], [7]] and small.predictor is None
    assert widths(net_of("--arch", arch, "--projector-layers", "1")[1].encoder[1]) == [[d, 128], [128]]


def test_the_network_gives_unit_projections_and_predictions_of_every_view():
    """(V, B, 128) in float32, bf16 or not; views of other sizes; each view has the batch norm of its own."""
    _, net = net_of("--arch", "resnet18", channels=3)
    views = [torch.randn(4, 3, 16, 16), 3 + torch.randn(4, 3, 16, 16), torch.randn(4, 3, 8, 8)]
    for enabled in (False, True):
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            x, p = net.train()(views)
        assert x.shape == p.shape == (3, 4, 128) and x.dtype == p.dtype == torch.float32
        for y in (x, p):
            torch.testing.assert_close(y.norm(dim=-1), torch.ones(3, 4))
    with torch.no_grad():
        for together in (views[:2], views):
            x, p = net(together)
            for v, images in enumerate(together):
                alone = net([images])
                torch.testing.assert_close(alone[0][0], x[v])
                torch.testing.assert_close(alone[1][0], p[v])
        raw = net.encoder(views[0])
        torch.testing.assert_close(x[0], raw / raw.norm(dim=1, keepdim=True))
        predicted = net.predictor(raw)
        torch.testing.assert_close(p[0], predicted / predicted.norm(dim=1, keepdim=True))
    assert (x - p).abs().max() > 0.1


def test_without_a_predictor_the_prediction_is_the_projection():
    _, net = net_of("--arch", "lenet5", "--predictor-share", "0")
    x, p = net([torch.randn(4, 1, 16, 16)])
    assert torch.equal(x, p)


def test_features_are_cut_at_0_before_the_projector():
    """LeNet's features come before their ReLU."""
    trunk, net = net_of("--arch", "lenet5")
    images = torch.randn(5, 1, 16, 16)
    with torch.no_grad():
        features = trunk.eval()(images)
        assert features.min() < 0
        want = features.clamp(min=0)
        for layer in net.eval().encoder[1][1:]:
            want = layer(want)
        torch.testing.assert_close(net.encoder(images), want)


def test_views_are_those_of_the_released_code():
    """ImageNet: one view strong; two weak ones, blurred always and seldom, the second solarised; small ones strong."""
    folder = ["--data", "some/folder", "--views"]
    strong, weak = (0.8, 0.8, 0.8, 0.2), (0.4, 0.4, 0.2, 0.1)
    (single,) = make_views(options([*folder, "1"]))
    two, multi = make_views(options([*folder, "2"])), make_views(options([*folder, "multi"]))
    assert len(two) == 2 and two == multi[:2] and len(multi) == 8 and len(set(multi[2:])) == 1
    for view, jitter, blur, solarise in [
        (single, strong, 0.5, 0),
        (two[0], weak, 1.0, 0),
        (two[1], weak, 0.1, 0.2),
        (multi[2], strong, 0.5, 0),
    ]:
        assert (tuple(view.jitter), view.jitter_p, view.blur, view.solarise) == (jitter, 0.8, blur, solarise)
        assert (view.flip, view.grey, tuple(view.sigma)) == (0.5, 0.2, (0.1, 2.0))
        assert view.ratio == (3 / 4, 4 / 3) and not view.pad and not view.square
        assert tuple(view.area) == ((0.05, 0.6) if view is multi[2] else (0.08, 1.0))
        assert view.size == (96 if view is multi[2] else 0)
    plain = make_views(
        options([*folder, "multi", "--no-flip", "--no-colour", "--no-blur", "--crop-area", "0.5"])
    )
    for view in plain:
        assert not (view.flip or view.grey or view.blur or view.solarise or any(view.jitter) * view.jitter_p)
    assert plain[0].area == (0.5, 1.0) and plain[2].area == (0.05, 0.6)


# --------------------------------------------------------------------------- options


def values(args, names):
    return [getattr(args, name) for name in names.split()]


def test_imagenet_recipe_is_the_papers():
    """A folder: supplementary 2.1 and the released code's numbers, for one, two and many views."""
    args = options(["--data", "some/folder"])
    names = "arch k epochs batch_size lr wd optimizer momentum warm_up ratio dual_lr views recipe"
    want = ["resnet50", [3000, 4000, 5000], 1000, 1024, 1.6, 1e-6, "lars", 0.9, 10, 0.4, 20, "2", "imagenet"]
    assert values(args, names) == want
    names = (
        "temperature label_share predictor_share dim projector_layers init_epochs image_size resize crop_area"
    )
    assert values(args, names) == [0.05, 0.2, 0.5, 128, 3, 1, 224, 256, 0.08]
    names = "flip colour blur first_stage label_size label_temperature out amp"
    assert values(args, names) == [True, True, True, 1, 5, 0.5, "runs/coke-folder", None]
    args = options(["--data", "some/folder", "--views", "1"])
    assert values(args, "temperature first_stage epochs out") == [0.1, 0.8, 1000, "runs/coke-folder-1"]
    args = options(["--data", "some/folder/", "--views", "multi"])
    names = "temperature first_stage epochs small_crops small_size small_area small_share out"
    assert values(args, names) == [0.05, 1, 800, 6, 96, [0.05, 0.6], 0.5, "runs/coke-folder-multi"]


def test_cifar_recipes_are_the_papers():
    """Supplementary 2.4: ten heads, ResNet-18, SGD 0.2, 400 epochs of batches of 128, r 0.9, eta 0.1."""
    for data, ks in [("cifar10", range(10, 101, 10)), ("cifar100-20", range(20, 201, 20))]:
        args = options(["--data", data])
        assert args.k == list(ks) and args.recipe == data
        names = (
            "arch epochs batch_size lr wd optimizer momentum warm_up ratio dual_lr temperature label_share"
        )
        assert values(args, names) == ["resnet18", 400, 128, 0.2, 1e-4, "sgd", 0.9, 10, 0.9, 0.1, 0.05, 0.2]
        names = "crop_area image_size resize flip colour blur predictor_share views first_stage"
        assert values(args, names) == [0.3, 32, 32, True, True, False, 0.5, "2", 1]


def test_flags_override_recipes():
    """Another data set's recipe by name; single numbers by flags; what hangs on the image size follows it."""
    args = options(["--data", "cifar10", "--k", "7", "--lr", "0.3", "--temperature", "0.2", "--no-flip"])
    assert values(args, "k lr temperature flip epochs") == [[7], 0.3, 0.2, False, 400]
    args = options(["--data", "some/folder", "--recipe", "cifar10"])
    assert values(args, "arch lr image_size recipe out data") == [
        "resnet18",
        0.2,
        32,
        "cifar10",
        "runs/coke-folder",
        "some/folder",
    ]
    args = options(["--data", "cifar10", "--recipe", "imagenet", "--views", "multi"])
    assert values(args, "arch epochs small_size") == ["resnet50", 800, 96]
    args = options(["--data", "some/folder", "--image-size", "112", "--views", "multi"])
    assert values(args, "resize small_size") == [128, 48]
    args = options(["--data", "cifar10", "--views", "multi"])
    assert values(args, "resize small_size image_size") == [32, 14, 32]
    args = options(["--data", "digits", "--views", "multi", "--arch", "resnet18", "--image-size", "28"])
    assert values(args, "small_size image_size resize") == [12, 28, 28]
    args = options(["--data", "digits", "--views", "multi", "--image-size", "20"])
    assert values(args, "small_size image_size arch") == [20, 20, "lenet5"]
    assert options(["--data", "svhn"]).flip is False and options(["--data", "stl10"]).arch == "resnet18"
    assert options(["--data", "mnist"]).flip is False and options(["--data", "fashionmnist"]).flip is True


@pytest.mark.parametrize(
    "data", ["some/folder", "digits", "mnist", "cifar10", "cifar100-20", "svhn", "stl10"]
)
def test_recipes_fit_themselves(data):
    """With all views: accepted as it is, and a head with as many clusters as there are classes."""
    for views in ("1", "2", "multi"):
        args = options(["--data", data, "--views", views])
        assert len(make_views(args)) == {"1": 1, "2": 2, "multi": 8}[views]
        assert {"cifar100-20": 20}.get(data, 10) in args.k or data == "some/folder"


WRONG = {  # flag: what the command line refuses
    "ratio": "-0.1 1.1 nan inf",
    "label-share": "-0.1 1.01 nan",
    "predictor-share": "-0.1 2 nan",
    "small-share": "-0.1 1.5 nan",
    "first-stage": "-0.1 1.5 nan",
    "temperature": "0 -0.1 nan inf",
    "label-temperature": "0 -0.5 nan inf",
    "lr": "-0.1 nan inf",
    "wd": "-0.1 nan inf",
    "momentum": "-0.1 1 nan",
    "dual-lr": "-1 nan inf",
    "crop-area": "0 -1 1.5 nan",
    "resize": "-1 31 many",
    "head": "7 0 many",
    "views": "0 3 two",
    "optimizer": "adam LARS",
    "arch": "resnet",
    "recipe": "imagenet21k",
}
COUNTS = "k epochs batch-size image-size save-every small-crops small-size label-size dim projector-layers"
for _flag in COUNTS.split():
    WRONG[_flag] = "0 -3 1.5 many nan"
WRONG["batch-size"] += " 1"  # batch norm compares images
for _flag in ("workers", "max-bad", "warm-up", "init-epochs"):
    WRONG[_flag] = "-1 0.5 nan"
TOGETHER = {  # words of the message: arguments
    "--k differ": ["--k", "10", "20", "10"],
    "--k at least": ["--k", "10", "0"],
    "--head 30 10 20": ["--k", "10", "20", "--head", "30"],
    "--small-size lenet5": ["--views", "multi", "--small-size", "16"],
    "--small-size vgg16": ["--views", "multi", "--arch", "vgg16", "--small-size", "16"],
    "--small-area": ["--small-area", "0.5", "0.2"],
    "--small-area 0..1": ["--small-area", "0.5", "1.2"],
    "--small-area excluded": ["--small-area", "0", "0.2"],
    "--small-area 'nan'": ["--small-area", "nan", "0.2"],
    "'nan' --small-area": ["--small-area", "0.1", "nan"],
    "--resize 40 --image-size 48": ["--image-size", "48", "--resize", "40"],
    "--colours unrecognized": ["--colours"],
}


def refused(arguments, capsys):
    """The line with which a command line ends."""
    line = refusal(options, ["--data", "digits", *arguments], capsys)
    assert line.startswith("coke.py: error: "), line
    return line


@pytest.mark.parametrize("flag", WRONG)
def test_impossible_values_end_with_exit_code_2_and_one_line(flag, capsys, monkeypatch):
    """The line names the flag."""
    monkeypatch.setattr("sys.argv", ["coke.py"])
    for value in WRONG[flag].split():
        assert f"--{flag}" in refused([f"--{flag}={value}"], capsys)


@pytest.mark.parametrize("words", TOGETHER)
def test_what_does_not_fit_together_is_refused(words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["coke.py"])
    line = refused(TOGETHER[words], capsys)
    assert not [word for word in words.split() if word not in line], line


def test_what_is_possible_is_not_refused():
    """The ends of the ranges; the small size counts with small crops alone."""
    for flags in [
        ["--ratio", "0"],
        ["--ratio", "1", "--label-share", "1", "--predictor-share", "1", "--first-stage", "1"],
        [
            "--dual-lr",
            "0",
            "--lr",
            "0",
            "--wd",
            "0",
            "--momentum",
            "0",
            "--warm-up",
            "0",
            "--init-epochs",
            "0",
        ],
        ["--small-size", "12"],
        ["--views", "multi", "--arch", "resnet18", "--small-size", "12"],
        ["--small-area", "0.3", "0.3", "--crop-area", "1", "--max-bad", "0", "--workers", "0"],
        ["--k", "5", "--head", "5", "--batch-size", "2", "--label-size", "1"],
    ]:
        options(["--data", "digits", *flags])


def test_help_shows_what_would_run(capsys, monkeypatch):
    """Every flag with the default of the data, the views and the recipe that were given."""
    monkeypatch.setattr("sys.argv", ["coke.py"])
    for flags, shown in [
        (
            ["--data", "some/folder", "--views", "1"],
            ["default: [3000, 4000, 5000]", "default: 0.8)", "coke-folder-1"],
        ),
        (["--data", "cifar10"], ["default: resnet18", "default: 400)", "runs/coke-cifar10)"]),
        (["--data", "x", "--views", "multi"], ["default: 800)", "default: 96)"]),
    ]:
        with pytest.raises(SystemExit) as end:
            options([*flags, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and not [s for s in shown if s not in out]
        assert "--dual-lr" in out and "--label-temperature" in out


class Labelled(list):
    """So many images of so many classes."""

    def __init__(self, n, classes, labels=True):
        super().__init__(range(n))
        self.classes, self.labels = list(range(classes)), torch.zeros(n) if labels else None


@pytest.mark.parametrize(
    ("flags", "data", "head", "words"),
    [
        (["--k", "20", "10", "30"], Labelled(1437, 10), 10, []),
        (["--k", "20", "10", "--head", "20"], Labelled(1437, 10), 20, []),
        (["--k", "20", "30"], Labelled(1437, 10), 20, ["10 classes", "ACC"]),
        (["--k", "20", "30", "--head", "30"], Labelled(1437, 10), 30, ["10 classes", "ACC"]),
        (["--k", "20", "10"], Labelled(1437, 0, labels=False), 20, []),
        (["--k", "10"], Labelled(100, 10), 10, []),
        (["--k", "10"], Labelled(99, 10), 10, ["--k 10", "99"]),
        (["--k", "10", "--dual-lr", "2.1"], Labelled(1437, 10), 10, ["--dual-lr 2.1", "10 clusters"]),
        (["--k", "10", "--dual-lr", "1.9"], Labelled(1437, 10), 10, []),
        (["--k", "10", "--epochs", "5"], Labelled(1437, 10), 10, ["--warm-up 5", "5 epochs"]),
        (["--k", "10", "--epochs", "6"], Labelled(1437, 10), 10, []),
    ],
)
def test_which_head_counts_and_what_is_warned_of(flags, data, head, words, capsys):
    """The head with as many clusters as classes, else the first; ACC left out, too few images, all warm-up: said."""
    args = options(
        [
            "--data",
            "digits",
            "--batch-size",
            "10",
            "--ratio",
            "0.5",
            "--dual-lr",
            "0.1",
            "--warm-up",
            "5",
            "--epochs",
            "9",
            *flags,
        ]
    )
    coke.check(args, data)
    said = capsys.readouterr().out.splitlines()
    assert args.head == head and len(said) == (len(words) > 0)
    assert not words or ("WARNING" in said[0] and not [w for w in words if w not in said[0]]), said


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--k", "10", "101"], ["--k 101", "100 images"]),
        (["--k", "101"], ["--k 101", "100 images"]),
        (["--batch-size", "101"], ["--batch-size 101", "100 images"]),
    ],
)
def test_more_than_there_are_images_is_refused(flags, words, capsys):
    """Exit code 2 and one line; as many as there are is accepted."""
    args = options(["--data", "digits", "--k", "10", "--batch-size", "10", *flags])
    with pytest.raises(SystemExit) as end:
        coke.check(args, Labelled(100, 10))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and not [w for w in words if w not in line]
    args = options(["--data", "digits", "--k", "100", "--batch-size", "100"])
    coke.check(args, Labelled(100, 10))
