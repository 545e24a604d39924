"""common.py, metrics: hand cases and plain loops."""

import itertools
import json
import math

import numpy as np
import pytest
import torch

import common


def labelings(n=60, a=4, b=6, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.integers(0, a, n)
    return x, np.where(rng.random(n) < 0.5, x, rng.integers(0, b, n))


def entropy(counts):
    n = sum(counts)
    return -sum(c / n * math.log(c / n) for c in counts if c)


def information(a, b):
    """(I(A;B), H(A), H(B)) by counting."""
    ha, hb = (entropy([list(x).count(v) for v in set(x)]) for x in (a, b))
    pairs = list(zip(a, b, strict=True))
    return ha + hb - entropy([pairs.count(p) for p in set(pairs)]), ha, hb


def test_nmi_is_geometric():
    """I / sqrt(H(A) H(B)) by loops, also where the arithmetic mean gives another number; symmetric."""
    many = np.arange(400) // 2, np.arange(400) // 40
    for a, b in (labelings(), labelings(seed=1, a=2, b=9), many):
        i, ha, hb = information(a.tolist(), b.tolist())
        want = i / math.sqrt(ha * hb)
        assert common.nmi(a, b) == pytest.approx(want, abs=1e-9)
        assert common.nmi(torch.from_numpy(b), torch.from_numpy(a)) == pytest.approx(want, abs=1e-9)
    assert abs(want - 2 * i / (ha + hb)) > 0.05


def test_nmi_hand_cases():
    """Renamed clusters 1, independent ones 0, one cluster on both sides 1, on one side 0."""
    assert common.nmi([0, 0, 1, 1], [7, 7, 3, 3]) == pytest.approx(1)
    assert common.nmi([0, 0, 1, 1], [0, 1, 0, 1]) == pytest.approx(0, abs=1e-12)
    assert common.nmi([2, 2, 2], [5, 5, 5]) == 1
    assert common.nmi([2, 2, 2, 2], [0, 1, 0, 1]) == common.nmi([0, 1, 0, 1], [2, 2, 2, 2]) == 0
    assert common.nmi([0, 0, 1, 2], [0, 0, 1, 1]) == pytest.approx(
        math.log(2) / math.sqrt(1.5 * math.log(2) ** 2)
    )


@pytest.mark.parametrize("a, b", [(4, 4), (3, 6), (6, 3), (1, 4), (4, 1)])
def test_accuracy_by_brute_force(a, b):
    """The best one-to-one matching of clusters to classes, equal numbers or not, by all permutations."""
    labels, assign = labelings(40, a, b, seed=a * 10 + b)
    clusters, classes = sorted(set(assign.tolist())), sorted(set(labels.tolist()))
    width = max(len(clusters), len(classes))
    best = 0
    for names in itertools.permutations(classes + [-1] * (width - len(classes)), len(clusters)):
        partner = dict(zip(clusters, names, strict=True))
        best = max(best, sum(partner[c] == y for c, y in zip(assign.tolist(), labels.tolist(), strict=True)))
    assert common.clustering_accuracy(labels, assign) == pytest.approx(best / 40)
    far = torch.from_numpy(assign) * 1000 + 7  # ids with gaps
    assert common.clustering_accuracy(torch.from_numpy(labels), far) == pytest.approx(best / 40)


def test_ari_by_counting_pairs():
    """(pairs together in both - expected) / (mean of both - expected), by all pairs."""
    for seed in range(3):
        a, b = labelings(seed=seed)
        both = one = two = every = 0
        for i, j in itertools.combinations(range(len(a)), 2):
            both += a[i] == a[j] and b[i] == b[j]
            one += a[i] == a[j]
            two += b[i] == b[j]
            every += 1
        want = (both - one * two / every) / ((one + two) / 2 - one * two / every)
        assert common.ari(a, b) == pytest.approx(want)
        assert common.ari(torch.from_numpy(a), torch.from_numpy(a) + 3) == 1


def vote(queries, bank, labels, k, classes=4):
    """Class of each query by loops: cosine similarity, weight exp(s / 0.07), the largest sum of a class."""
    found = []
    for q in queries.double():
        score = [(q @ r / q.norm() / r.norm()).item() for r in bank.double()]
        near = sorted(range(len(bank)), key=lambda j: -score[j])[:k]
        votes = [sum(math.exp(score[j] / 0.07) for j in near if labels[j] == c) for c in range(classes)]
        found.append(votes.index(max(votes)))
    return found


def four_classes(seed):
    """25 queries near four centres, their labels, a bank of 40 rows and theirs; rows with much in common."""
    gen = torch.Generator().manual_seed(seed)
    labels, target = torch.arange(40) % 4, torch.arange(25) * 7 % 4
    centres = torch.randn(4, 6, generator=gen) + 2
    bank = (centres[labels] + torch.randn(40, 6, generator=gen)) * torch.rand(40, 1, generator=gen).add(0.1)
    queries = (centres[target] + torch.randn(25, 6, generator=gen)) * 10
    return queries, target, bank, labels


@pytest.mark.parametrize("k", [1, 5, 200])
def test_knn_by_loops(k):
    """Cosine similarity, weight exp(s / 0.07), sum per class; lengths do not count; k is cut to N."""
    queries, _, bank, labels = four_classes(k)
    want = vote(queries, bank, labels, k)
    assert common.knn_predict(queries, bank, labels, k).tolist() == want
    assert len(set(want)) > 1


def test_knn_for_several_k_at_once():
    """A list with the classes of each k, in the order asked for: those of the loops, and of one k alone."""
    queries, _, bank, labels = four_classes(2)
    for ks in ([5, 1, 200], (1, 12), [3]):
        found = common.knn_predict(queries, bank, labels, ks, classes=9)
        assert isinstance(found, list) and len(found) == len(ks)
        for k, predicted in zip(ks, found, strict=True):
            assert predicted.tolist() == vote(queries, bank, labels, k)
            assert torch.equal(predicted, common.knn_predict(queries, bank, labels, k))
    one, five, all_of_them = (vote(queries, bank, labels, k) for k in (1, 5, 40))
    assert one != five and five != all_of_them and one != all_of_them
    none = common.knn_predict(queries[:0], bank, labels, [1, 5])
    assert [p.tolist() for p in none] == [[], []]


def shares(queries, target, bank, labels, ks):
    """{k as text: share of queries of the right class} by loops."""
    found = {k: vote(queries, bank, labels, k) for k in ks}
    return {str(k): sum(map(int.__eq__, p, target.tolist())) / len(target) for k, p in found.items()}


def test_knn_accuracy_by_loops():
    """The share of right classes for each k; 1 and 200 unless told."""
    everything = four_classes(2)
    want = shares(*everything, (1, 200))
    assert common.knn_accuracy(*everything, 4) == pytest.approx(want)
    assert want["1"] == 0.4 and want["200"] == 0.56  # ten and fourteen of 25
    assert common.knn_accuracy(*everything, 4, (7,)) == pytest.approx(shares(*everything, (7,)))


def test_knn_accuracy_over_two_processes(launch):
    """Uneven shares of the queries, and none on one process: all get the share of all queries."""
    queries, target, bank, labels = four_classes(2)
    torch.save([queries, target, bank, labels], launch.path / "data")
    run = launch(
        """
import json, torch, common
common.setup("cpu")
queries, target, bank, labels = torch.load("data")
got = []
for cut in (7, 0, 25):
    mine = slice(cut, None) if common.rank() else slice(cut)
    got.append(common.knn_accuracy(queries[mine], target[mine], bank, labels, 4, (3, 40)))
print(json.dumps(got))
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    want = shares(queries, target, bank, labels, (3, 40))
    parts = [shares(queries[mine], target[mine], bank, labels, (3,)) for mine in (slice(7), slice(7, 25))]
    assert abs(sum(p["3"] for p in parts) / 2 - want["3"]) > 0.005  # the mean of the shares is another number
    for out in run.out:
        assert [pytest.approx(want)] * 3 == json.loads(out)


def test_knn_weights_beat_the_majority():
    """One very near neighbour outweighs three far ones; without weights (high temperature) it does not."""
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8], [0.6, -0.8]])
    labels, query = torch.tensor([2, 1, 1, 1]), torch.tensor([[3.0, 0.0]])
    assert common.knn_predict(query, bank, labels, 4).tolist() == [2]
    assert common.knn_predict(query, bank, labels, 4, temperature=100.0, classes=9).tolist() == [1]


def test_cluster_sizes_by_hand():
    """Empty, smallest non-empty and largest cluster, and the largest share."""
    assign = torch.tensor([3, 3, 3, 0, 5, 5, 3, 3])
    want = {"clusters": 3, "empty": 4, "smallest": 1, "largest": 5, "largest_share": 5 / 8}
    assert common.cluster_sizes(assign, 7) == want
