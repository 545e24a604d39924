"""common.py, faiss section: neighbours, whitening and k-means against loops and numpy."""

import numpy as np
import pytest
import torch

import common
from common import generator


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blobs(n=300, k=6, d=5, seed=0):
    """Well-separated clusters in the positive quadrant and their labels."""
    centres = torch.rand(k, d, generator=torch.Generator().manual_seed(seed)) * 20
    labels = torch.arange(n) % k
    return centres[labels] + 0.3 * normal(n, d, seed=seed + 1), labels


# --------------------------------------------------------------------------- nearest


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("n, k", [(7, 1), (64, 1), (64, 5), (7, 100)])
def test_nearest_is_brute_force(n, k, inner):
    """k best keys, best first, squared distance or inner product; k is cut to the number of keys."""
    queries, keys = normal(n, 9), normal(30, 9, seed=1)
    values, ids = common.nearest(queries, keys, k, inner=inner)
    k = min(k, 30)
    assert values.shape == ids.shape == (n, k) and ids.dtype == torch.int64
    for i in range(n):
        score = [
            sum((a * b) if inner else (a - b) ** 2 for a, b in zip(q, key, strict=True))
            for q, key in [(queries[i].tolist(), key.tolist()) for key in keys]
        ]
        order = sorted(range(30), key=lambda j: -score[j] if inner else score[j])[:k]
        assert ids[i].tolist() == order
        np.testing.assert_allclose(values[i], [score[j] for j in order], atol=1e-4)


def test_nearest_without_queries():
    """No rows of its own: empty answers of the right shape."""
    values, ids = common.nearest(torch.zeros(0, 4), normal(6, 4), 3)
    assert values.shape == ids.shape == (0, 3) and ids.dtype == torch.int64


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("k", [1, 20, 3000])
def test_nearest_on_the_gpu(k):
    """The same neighbours as on the CPU; over 2048 of them too."""
    queries, keys = normal(50, 16), normal(4000, 16, seed=1)
    want = torch.cdist(queries.double(), keys.double()).square()
    values, ids = common.nearest(queries.cuda(), keys.cuda(), k)
    assert ids.is_cuda
    np.testing.assert_allclose(values.cpu(), want.sort(1).values[:, :k], atol=1e-3)
    np.testing.assert_allclose(want.gather(1, ids.cpu()), want.sort(1).values[:, :k], atol=1e-3)


# --------------------------------------------------------------------------- pca and whiten


def numpy_whitened(x, p):
    """(x - mean) V / sqrt(lambda) in float64 by numpy, largest eigenvalue first."""
    x = x.double().numpy()
    values, vectors = np.linalg.eigh(np.cov(x.T, bias=True))
    return (x - x.mean(0)) @ vectors[:, ::-1][:, :p] / np.sqrt(values[::-1][:p])


def same_up_to_sign(got, want, atol):
    got = np.asarray(got)
    for j in range(want.shape[1]):
        gap = min(np.abs(got[:, j] - want[:, j]).max(), np.abs(got[:, j] + want[:, j]).max())
        assert gap < atol, (j, gap)


@pytest.mark.parametrize("offset", [0.0, 1e4])
@pytest.mark.parametrize("p", [6, 12, 99])
def test_whitening_is_numpys(p, offset):
    """z = V^T (x - mean) / sqrt(lambda): numpy's up to signs, covariance I, then unit rows; p cut to D."""
    x = normal(2000, 12) @ (normal(12, 12, seed=1) + 2 * torch.diag(torch.arange(12.0))) + offset
    mean, axes = common.pca(x, p)
    p = min(p, 12)
    assert mean.shape == (12,) and axes.shape == (12, p)
    z = (x - mean) @ axes
    atol = 1e-3 if offset == 0 else 2e-2
    same_up_to_sign(z, numpy_whitened(x, p), atol)
    np.testing.assert_allclose(np.cov(z.double().numpy().T, bias=True), np.eye(p), atol=atol)
    got = common.whiten(x, mean, axes)
    want = z.double() / z.double().norm(dim=1, keepdim=True)
    np.testing.assert_allclose(got, want, atol=1e-5)


def test_whitening_of_degenerate_data():
    """Dead features, fewer rows than columns, constant rows, a single row: finite, rank as it is."""
    x = normal(400, 5)
    dead = torch.cat([x, torch.full((400, 2), 7.0)], 1)
    mean, axes = common.pca(dead, 7)
    z = (dead - mean) @ axes
    assert z.isfinite().all() and common.whiten(dead, mean, axes).isfinite().all()
    same_up_to_sign(z[:, :5], numpy_whitened(x, 5), 1e-3)
    assert z[:, 5:].abs().max() < 1e-2, "a dead feature carries nothing"
    few = normal(10, 30, seed=2)
    mean, axes = common.pca(few, 30)
    z = (few - mean) @ axes
    assert z.isfinite().all() and common.whiten(few, mean, axes).isfinite().all()
    np.testing.assert_allclose(np.cov(z[:, :9].double().numpy().T, bias=True), np.eye(9), atol=1e-3)
    assert z[:, 9:].abs().max() < 0.05, "ten rows span nine directions"
    for constant in (torch.zeros(20, 6), torch.full((20, 6), 1e4), torch.full((20, 6), 0.1), normal(1, 6)):
        mean, axes = common.pca(constant, 4)
        assert axes.isfinite().all() and common.whiten(constant, mean, axes).isfinite().all()


def test_pca_of_many_columns():
    """Over 8192 columns (power iteration): the same whitened rows as numpy's SVD on low-rank data."""
    n, d, rank, p = 60, 8200, 12, 8
    x = normal(n, rank) @ (torch.linspace(6, 1, rank)[:, None] * normal(rank, d, seed=1)) / d**0.5 + 0.5
    mean, axes = common.pca(x, p)
    assert mean.shape == (d,) and axes.shape == (d, p)
    u, _, _ = np.linalg.svd(x.double().numpy() - x.double().numpy().mean(0), full_matrices=False)
    same_up_to_sign((x - mean) @ axes, u[:, :p] * n**0.5, 5e-3)
    mean, axes = common.pca(x, 40)  # more axes than the data's rank
    assert common.whiten(x, mean, axes).isfinite().all()


# --------------------------------------------------------------------------- k-means


def lloyd(x, centroids):
    """One iteration by loops: (labels, mean of the squared distances, new centroids)."""
    labels, squares = [], 0.0
    for row in x:
        distance = [((row - c) ** 2).sum().item() for c in centroids]
        labels.append(min(range(len(centroids)), key=distance.__getitem__))
        squares += min(distance)
    means = []
    for c in range(len(centroids)):
        members = [x[i] for i in range(len(x)) if labels[i] == c]
        means.append(sum(members) / len(members) if members else centroids[c])
    return labels, squares / len(x), torch.stack(means)


def test_kmeans_is_lloyds():
    """It starts from k distinct rows drawn by gen; each iteration is that of the loops."""
    x, _ = blobs()
    start = common.kmeans(x, 6, iterations=0, gen=generator(3))
    rows = [(x == c).all(1).nonzero()[:, 0].tolist() for c in start.centroids]
    assert all(len(r) == 1 for r in rows) and len(set(map(tuple, rows))) == 6
    other = common.kmeans(x, 6, iterations=0, gen=generator(4))
    assert not torch.equal(start.centroids, other.centroids)
    centroids = start.centroids.double()
    for iterations in range(4):
        got = common.kmeans(x, 6, iterations=iterations, gen=generator(3))
        labels, objective, means = lloyd(x.double(), centroids)
        np.testing.assert_allclose(got.centroids, centroids, atol=1e-4)
        assert got.assign.tolist() == labels and got.assign.dtype == torch.int64
        assert got.objective == pytest.approx(objective, rel=1e-5, abs=1e-5)
        own = (x - got.centroids[got.assign]).square().sum(1)
        np.testing.assert_allclose(got.distance, own, atol=1e-3)
        centroids = means


def test_kmeans_objective_never_rises_and_finds_blobs():
    """More iterations never cost more; with a start in every blob the clusters are the blobs."""
    x, labels = blobs(k=6)
    best = []
    for seed in range(4):
        curve = [common.kmeans(x, 6, iterations=i, gen=generator(seed)).objective for i in range(10)]
        assert all(b <= a + 1e-5 for a, b in zip(curve, curve[1:], strict=False)), curve
        best.append(curve[-1])
    found = next(s for s in range(100) if len(set(labels[start_rows(x, s)].tolist())) == 6)
    got = common.kmeans(x, 6, gen=generator(found))
    pairs = set(zip(got.assign.tolist(), labels.tolist(), strict=True))
    assert len(pairs) == 6 and got.objective < 1 and got.objective <= min(best) + 1e-5


def start_rows(x, seed):
    start = common.kmeans(x, 6, iterations=0, gen=generator(seed)).centroids
    return torch.stack([(x == c).all(1).nonzero()[0, 0] for c in start])


def test_split_empty_by_hand():
    """An empty cluster takes half of its donor: copies times 1 +- 1/1024, even one way, odd the other."""
    centroids = torch.tensor([[0.0, 0, 0], [1024, 2048, 4096], [5, 5, 5]])
    counts = torch.tensor([0.0, 9, 1])  # a cluster of one has none to give: the donor is certain
    common.split_empty(centroids, counts, generator(0))
    assert centroids.tolist() == [[1025, 2046, 4100], [1023, 2050, 4092], [5, 5, 5]]
    assert counts.tolist() == [4.5, 4.5, 1]
    counts = torch.tensor([0.0, 1, 1])  # nobody has one to give
    before = centroids.clone()
    common.split_empty(centroids, counts, generator(0))
    assert torch.equal(centroids, before) and counts.tolist() == [0, 1, 1]


def test_split_empty_chooses_donors_by_size():
    """Donor j with probability (n_j - 1) / (N - K), here 1, 12, 0 and 4 of 17."""
    gen, given = generator(1), torch.zeros(5)
    for _ in range(1700):
        counts = torch.tensor([0.0, 2, 13, 1, 5])
        common.split_empty(torch.ones(5, 2), counts, gen)
        given += counts < torch.tensor([0.0, 2, 13, 1, 5])
    assert given[0] == given[3] == 0
    for j, expected in ((1, 100), (2, 1200), (4, 400)):
        assert abs(given[j] - expected) < 5 * (expected * (1 - expected / 1700)) ** 0.5


def test_kmeans_repairs_empty_clusters():
    """A start with the same point several times leaves clusters empty; the repair puts all to use."""
    x = torch.cat([torch.full((100, 4), 3.0), 5 + normal(100, 4)])
    for seed in range(3):
        start = common.kmeans(x, 8, iterations=0, gen=generator(seed)).centroids
        assert len(start.unique(dim=0)) < 8
        assert len(common.kmeans(x, 8, gen=generator(seed)).assign.unique()) == 8


def test_kmeans_limits():
    """K = N: every row its own; K > N, K = 0, NaN or infinity: ValueError; K = 1: the mean."""
    x, _ = blobs(20)
    got = common.kmeans(x, 20)
    assert sorted(got.assign.tolist()) == list(range(20)) and got.objective < 1e-4
    one = common.kmeans(x, 1)
    np.testing.assert_allclose(one.centroids[0], x.mean(0), atol=1e-4)
    for k in (21, 0, -1):
        with pytest.raises(ValueError, match=str(k)):
            common.kmeans(x, k)
    for value in (float("nan"), float("inf")):
        y = x.clone()
        y[3, 2] = value
        with pytest.raises(ValueError, match="NaN"):
            common.kmeans(y, 4)


def test_kmeans_of_repeated_rows():
    """Identical rows, or fewer distinct rows than clusters: finite, ids in range, nothing lost."""
    for rows in (torch.zeros(30, 4), torch.full((30, 4), 1e4), normal(1, 4).expand(30, 4)):
        got = common.kmeans(rows.contiguous(), 5)
        assert got.centroids.isfinite().all() and got.assign.min() >= 0 and got.assign.max() < 5
        assert got.objective <= 1e-4 * max(1.0, rows[0].square().sum().item())
    x = normal(3, 4).repeat(20, 1)
    got = common.kmeans(x, 10, gen=generator(2))
    assert got.objective < 1e-3 and got.centroids.isfinite().all()
    for i in range(3):
        assert len(set(got.assign[i::3].tolist())) == 1, "equal rows must share a cluster"


SHARDS = {1: [(0, 300)], 2: [(0, 37), (37, 300)], 3: [(0, 160), (160, 160), (160, 300)]}


def test_one_two_and_three_processes_agree(launch):
    """Unequal and empty shards: the same k-means (also with empty clusters), PCA, and errors on all."""
    x = normal(300, 8)
    few = normal(5, 8, seed=1).repeat(60, 1)
    torch.save([x, few], launch.path / "x.pt")
    got = {}
    for world, shards in SHARDS.items():
        run = launch(
            f"""
import torch, common
common.setup("cpu")
x, few = torch.load("x.pt")
first, last = {shards}[common.rank()]
result = {{}}
for name, data, k in (("x", x, 12), ("few", few, 12)):
    c = common.kmeans(data[first:last], k, gen=common.generator("start"))
    result[name] = (common.gather(c.assign), c.objective, c.centroids, common.gather(c.distance))
result["pca"] = common.pca(x[first:last] + 3, 5)
result["errors"] = []
bad = x[first:last].clone()
if common.rank() == common.processes() - 1:
    bad[0, 0] = float("nan")
for data, k in ((bad, 3), (x[first:last], 301)):
    try:
        common.kmeans(data, k)
    except ValueError as error:
        result["errors"].append(str(error))
torch.save(result, f"got.{{common.rank()}}")
common.leave()
""",
            world=world,
        )
        assert run.codes == [0] * world, run.err
        got[world] = [torch.load(run.path / f"got.{r}") for r in range(world)]
    one = got[1][0]
    assert len(one["x"][0].unique()) == 12 and one["few"][1] < 1e-3
    for results in got.values():
        for result in results:
            for name in ("x", "few"):
                assert torch.equal(result[name][0], one[name][0]), name
                assert result[name][1] == pytest.approx(one[name][1], rel=1e-6, abs=1e-6)
                np.testing.assert_allclose(result[name][2], one[name][2], atol=1e-5)
            for a, b in zip(result["pca"], one["pca"], strict=True):
                np.testing.assert_allclose(a, b, atol=1e-5)
            assert len(result["errors"]) == 2
