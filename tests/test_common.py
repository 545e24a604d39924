"""common.py: processes, networks, clustering, metrics, run folder."""

import contextlib
import errno
import io
import itertools
import math
import os
import pickle
import subprocess
import sys
import textwrap
from argparse import Namespace
from functools import partial
from types import SimpleNamespace
from unittest.mock import Mock

import common
from common import Backbone, Images, Loader, Run, generator, kmeans, load_checkpoint, nearest, save_file

import numpy as np
import pytest
import torch
from jobs import ROOT, plain_nmi, read_log, wait_for
from torch import nn

CPU = torch.device("cpu")
SETUP = "import json, os, torch, common\ncommon.setup('cpu')\nr, world = common.rank_and_world()\n"


@pytest.fixture
def go(launch):
    """go(code, world): launch after setup(); r is the process's number."""
    return lambda code, world=2: launch(SETUP + textwrap.dedent(code), world)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def one_error(run, *words):
    """All processes ended with exit code 2, and one line in all says why."""
    lines = "".join(run.err).splitlines()
    assert run.codes == [2] * len(run.codes) and len(lines) == 1, run.err
    assert lines[0].startswith("script.py: error: ") and all(word in lines[0] for word in words), lines


def exits(capsys, call, *words):
    """call() ends with exit code 2 and one line with these words."""
    with pytest.raises(SystemExit) as end:
        call()
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and ": error: " in line and all(word in line for word in words), line


# %% processes


def test_without_setup_a_group_of_one_forms_itself(launch):
    code = """
    import os, torch, common
    os.environ["LOCAL_RANK"] = "1"  # left over from somewhere
    x = torch.arange(6.0).view(3, 2)
    assert torch.equal(common.all_reduce_sum(x), x) and torch.equal(common.all_gather(x), x)
    assert common.is_main() and common.setup("cpu") == torch.device("cpu")
    common.error("the reason")
    """
    run = launch(code, world=1)
    ignored, line = run.err[0].splitlines()
    assert run.codes == [2] and "LOCAL_RANK" in ignored and line == "script.py: error: the reason"


@pytest.mark.parametrize("world", [1, 2, 3])
def test_verbs_on_unequal_parts(world, go):
    code = """
    rows = torch.tensor([[0.0, 11, 12], [20, 21, 22], [23, 24, 25]])[: world * (world - 1) // 2]  # r of each process
    for kind in (torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool):
        own = rows[r * (r - 1) // 2 :][:r].to(kind).T.contiguous().T
        got = common.all_gather(own.requires_grad_(kind == torch.float64))
        assert got.dtype == kind and torch.equal(got, rows.to(kind)) and not got.requires_grad
    assert common.all_gather(torch.zeros(0, 4, dtype=torch.int64)).shape == (0, 4)
    x = torch.ones(2, 3, requires_grad=True).T * (r + 1)
    assert common.setup("cpu") == torch.device("cpu")  # once more: nothing happens
    got = common.all_reduce_sum(x)
    assert torch.equal(got, torch.full((3, 2), world * (world + 1) / 2)) and not got.requires_grad
    assert torch.equal(x, torch.full((3, 2), r + 1.0)) and common.is_main() == (r == 0)
    for n in (0, 1, 2, 3, 10, 11):
        own = torch.arange(*common.shard(n))
        assert torch.equal(common.all_gather(own), torch.arange(n)) and abs(len(own) - n / world) < 1
    common.print_once("once")
    drawn = [(common.seed_epoch(7, epoch), torch.rand(4)) for epoch in (4, 5, 4)]
    drawn = [(torch.rand(4, generator=shared), own) for shared, own in drawn]
    assert all(map(torch.equal, drawn[0], drawn[2])) and not any(map(torch.equal, drawn[0], drawn[1]))
    shared, own = (common.all_gather(x[None]) for x in drawn[0])
    assert len(shared.unique(dim=0)) == 1 and len(own.unique(dim=0)) == world  # crops differ between processes
    """
    run = go(code, world)
    assert run.codes == [0] * world and run.out == ["once\n"] + [""] * (world - 1), run.err


def test_generator_depends_on_its_key_alone():
    keys = [(0,), (1,), (0, 1), (0, "1"), (1, 0), (12, 3), (1, 23), (0, "weights"), ("0, 1",)]
    before = torch.get_rng_state()
    first, again = ([torch.rand(8, generator=generator(*key)) for key in keys] for _ in range(2))
    assert all(map(torch.equal, first, again)) and len(torch.stack(first).unique(dim=0)) == len(keys)
    assert torch.equal(torch.get_rng_state(), before)


MOVED = [path.stem for path in sorted(ROOT.glob("*.py")) if "\nfrom common import" in path.read_text()]


@pytest.mark.parametrize("script, users", [("common", ""), ("common", "77"), *((name, "") for name in MOVED)])
def test_the_spin_count_is_set_before_torch_and_libgomp_takes_it(script, users, monkeypatch):
    code = f"""
import os, sys
class Watch:
    def find_spec(name, *_):
        if name == "torch":
            print(os.environ.get("GOMP_SPINCOUNT"), flush=True)
        if name == ("torchvision" if {script == "common"} else "torch"):
            os._exit(0)
sys.meta_path.insert(0, Watch)
import {script}
"""
    monkeypatch.setenv("OMP_DISPLAY_ENV", "VERBOSE")
    monkeypatch.setenv("GOMP_SPINCOUNT", users)
    if not users:
        monkeypatch.delenv("GOMP_SPINCOUNT")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == f"{users or 10000}\n", done.stderr
    told = [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT =" in line]
    if script == "common" and not told:
        pytest.skip("this torch brings no libgomp, or one that does not tell its spin count")
    assert set(told) <= {users or "10000"}


def test_a_restart_does_not_meet_dead_processes_in_torchruns_store(launch):
    """The first start leaves its addresses in the store; in the second, process 1 comes first and looks there."""
    server = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    code = """
    import os, time, torch, common
    os.environ.update(MASTER_PORT="{port}", TORCHELASTIC_USE_AGENT_STORE="True")
    os.environ["TORCHELASTIC_RESTART_COUNT"] = "{count}"
    time.sleep({count} * (os.environ["RANK"] == "0"))
    common.setup("cpu")
    assert common.all_reduce_sum(torch.ones(1)) == 2
    os.kill(os.getpid(), 9)
    """
    for count in (0, 1):
        assert launch(code.format(port=server.port, count=count), limit=20).codes == [-9, -9]


# %% networks


def modules(net, kind):
    return [m for m in net.modules() if isinstance(m, kind)]


def plan(net):
    """[(side of its map, out, kernel) of each convolution in order], [(in, out) of linear layers]."""
    found, (channels, size) = [], (net.meta["channels"], net.meta["image_size"])
    for m in modules(net, nn.Conv2d):
        m.register_forward_hook(lambda m, _, y: found.append((y.shape[-1], m.out_channels, m.kernel_size[0])))
    net(torch.zeros(2, channels, size, size))
    return found, [(m.in_features, m.out_features) for m in modules(net, nn.Linear)]


@pytest.mark.parametrize("channels", [1, 3])
def test_sobel_by_loops(channels):
    images = torch.rand(2, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    filters = [[(1, 0, -1), (2, 0, -2), (1, 0, -1)], [(1, 2, 1), (0, 0, 0), (-1, -2, -1)]]
    want, sobel = torch.zeros(2, 2, 5, 6), common.Sobel()
    for i, f, y, x, dy, dx in itertools.product(range(2), range(2), range(5), range(6), range(3), range(3)):
        if 0 <= y + dy - 1 < 5 and 0 <= x + dx - 1 < 6:
            want[i, f, y, x] += filters[f][dy][dx] * images[i, :, y + dy - 1, x + dx - 1].mean()
    with torch.autocast("cpu", torch.bfloat16):
        low = sobel(images)
    for got in (sobel(images), low):  # bf16 would be off by half a gray level
        assert got.dtype == torch.float32
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
    net, x = Backbone("lenet5", channels, 32, sobel=True).eval(), torch.rand(2, channels, 32, 32)
    torch.testing.assert_close(net(x), net.net(sobel(x)))


def test_networks_of_the_papers(request):
    torch.set_default_device("meta")  # no memory for weights: enough for names and shapes
    request.addfinalizer(lambda: torch.set_default_device(None))
    alexnet = Backbone("alexnet", 3, 224)
    sides = [(55, 96, 11), (27, 256, 5), (13, 384, 3), (13, 384, 3), (13, 256, 3)]
    assert plan(alexnet) == (sides, [(256 * 6 * 6, 4096), (4096, 4096)])
    assert len(modules(alexnet, nn.BatchNorm2d)) == 5 and alexnet.dim == 4096
    assert [m.p for m in modules(alexnet, nn.Dropout)] == [0.5, 0.5]
    assert plan(Backbone("lenet5", 1, 32)) == ([(28, 6, 5), (10, 16, 5)], [(400, 120), (120, 84)])
    sides = [(32, 48, 3), (16, 126, 3), (8, 192, 3), (8, 192, 3), (8, 128, 3)]
    assert plan(Backbone("alexnet-small", 3, 32)) == (sides, [(8192, 2048), (2048, 2048)])
    for norm, layers in ((False, "Linear ReLU Linear"), (True, "Linear BatchNorm1d ReLU Linear BatchNorm1d")):
        classifier = Backbone("lenet5", 1, 32, norm=norm).net.classifier
        assert layers.split() == [type(m).__name__ for m in classifier.modules() if not list(m.children())]
        assert {"0.weight", "2.weight"} <= set(classifier.state_dict())  # the same names
    for size, stem, sides in ((32, (32, 64, 3), [32, 16, 8, 4]), (224, (112, 64, 7), [56, 28, 14, 7])):
        net = Backbone("resnet18", 3, size)
        maps = plan(net)[0]
        assert maps[0] == stem and list(dict.fromkeys(side for side, _, _ in maps[1:])) == sides
        assert net.dim == 512 * sides[-1] ** 2 and Backbone("resnet18", 3, size, pool=True).dim == 512


def test_initialization():
    torch.manual_seed(0)
    for net in (Backbone("alexnet-small", 3, 16), Backbone("resnet18", 3, 32)):
        assert all(m.training for m in net.modules())
        for m in modules(net, (nn.Conv2d, nn.Linear)):
            n = m.weight.numel()
            want = math.sqrt(2 / m.weight[:, 0].numel()) if m.weight.ndim == 4 else 0.01
            assert m.weight.std().item() == pytest.approx(want, rel=5 / math.sqrt(n)), m
            assert abs(m.weight.mean().item()) < 5 * want / math.sqrt(n), m
            assert m.bias is None or not m.bias.any()
    for m in modules(Backbone("lenet5", 1, 32, norm=True), nn.Linear):
        bound = 1 / math.sqrt(m.in_features)  # as PyTorch starts them: uniform
        assert 0.98 * bound < m.weight.abs().max() <= bound and m.bias.any()


@pytest.mark.parametrize("arch, size", [("lenet5", 8), ("alexnet", 32), ("alexnet-small", 3), ("vgg16", 16)])
def test_too_small_images_are_refused(arch, size, capsys):
    exits(capsys, lambda: Backbone(arch, 3, size), f"--image-size {size}", arch)


# %% clustering


@pytest.mark.parametrize("inner", [False, True])
@pytest.mark.parametrize("n, k", [(7, 1), (64, 1), (64, 5), (7, 100)])
def test_nearest_is_brute_force(n, k, inner):
    """By faiss on the CPU, and by what a GPU without faiss does, in chunks of 9 queries."""
    queries, keys = normal(n, 9), normal(30, 9, seed=1)
    a, b = queries.double().numpy(), keys.double().numpy()
    score = [[float(q @ key if inner else ((q - key) ** 2).sum()) for key in b] for q in a]
    order = [sorted(range(30), key=row.__getitem__, reverse=inner)[:k] for row in score]
    want = [[row[j] for j in ids] for row, ids in zip(score, order, strict=True)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "split", lambda x, n, real=torch.Tensor.split: real(x, min(n, 9)))
        by_torch = common.nearest_by_torch(queries, keys, min(k, 30), inner)
    for values, ids in (by_torch, nearest(queries, keys, k, inner)):
        assert ids.dtype == torch.int64 and ids.tolist() == order
        np.testing.assert_allclose(values, want, atol=1e-4)


@pytest.mark.parametrize("where", ["query", "key"])
def test_nearest_raises_for_nan(where):
    for n, k, inner in itertools.product((3, 64), (1, 5), (False, True)):
        queries, keys = normal(n, 9), normal(30, 9, seed=1)
        (queries if where == "query" else keys)[1, 3] = math.nan
        with pytest.raises(ValueError, match="NaN"):
            nearest(queries, keys, k, inner)


def test_features_that_are_not_finite_and_too_many_clusters_end_all_processes(go):
    code = """
    x, gen = torch.ones(20, 4), common.generator(0)
    common.check_finite(x * 1e18)
    for bad in (float("nan"), float("inf"), -1e20, 1.5e19):  # squared, the distance of +-1.5e19 overflows
        y = x.clone()
        y[3:, 2] = bad if r == 1 else -1.5e19
        for check in (common.check_finite, lambda y: common.kmeans(y, 2, gen)):
            try:
                check(y)
            except SystemExit as end:
                print(end.code)
    common.kmeans(x, 41, gen)
    """
    run = go(code)
    assert run.codes == [2, 2] and run.out == ["2\n" * 8] * 2 and run.err[1] == "", (run.out, run.err)
    lines = run.err[0].splitlines()
    assert len(lines) == 9 and all("NaN" in line for line in lines[:8]) and "41 clusters for 40" in lines[8]


def test_kmeans_is_lloyds():
    x = normal(200, 5)
    start = kmeans(x, 6, generator(3), 0)[2]  # rows of K different images, drawn by gen
    rows = [(x == c).all(1).nonzero()[:, 0].tolist() for c in start]
    assert all(len(r) == 1 for r in rows) and len(set(map(tuple, rows))) == 6
    assert not torch.equal(start, kmeans(x, 6, generator(4), 0)[2])
    points, centers = x.double().numpy(), start.double().numpy()
    for iterations in range(5):
        assign, distance, found, objective = kmeans(x, 6, generator(3), iterations)
        squares = [[((row - c) ** 2).sum() for c in centers] for row in points]
        labels = [min(range(6), key=row.__getitem__) for row in squares]
        np.testing.assert_allclose(found, centers, atol=1e-4)
        np.testing.assert_allclose(distance, [min(row) for row in squares], atol=1e-3)
        assert assign.tolist() == labels and assign.dtype == torch.int64
        assert objective == pytest.approx(sum(map(min, squares)) / 200, rel=1e-5)
        members = [[row for row, label in zip(points, labels, strict=True) if label == c] for c in range(6)]
        centers = np.array([sum(rows) / len(rows) for rows in members])  # none is empty here
    curves = [[kmeans(x, 6, generator(seed), i)[3] for i in range(9)] for seed in range(4)]
    assert np.diff(curves).max() < 1e-5 and np.diff(curves)[:, 0].max() < -0.01


def test_split_empty_by_hand():
    centroids = torch.tensor([[0.0, 0, 0], [1024, 2048, 4096], [5, 5, 5]])
    counts = torch.tensor([0.0, 9, 1])  # a cluster of one has none to give: the donor is certain
    common.split_empty(centroids, counts, generator(0))
    assert centroids.tolist() == [[1025, 2046, 4100], [1023, 2050, 4092], [5, 5, 5]]
    assert counts.tolist() == [4.5, 4.5, 1]
    counts = torch.tensor([0.0, 1, 1])  # nobody has one to give
    common.split_empty(centroids, counts, generator(0))
    assert centroids[1].tolist() == [1023, 2050, 4092] and counts.tolist() == [0, 1, 1]
    gen, given, sizes = generator(1), torch.zeros(5), torch.tensor([0.0, 2, 13, 1, 5])
    for _ in range(1700):  # donor j with probability (n_j - 1) / 17
        common.split_empty(torch.ones(5, 2), counts := sizes.clone(), gen)
        given += counts < sizes
    want = torch.tensor([0, 1, 12, 0, 4]) * 100.0
    assert ((given - want).abs() <= 5 * (want * (1 - want / 1700)).sqrt()).all(), given


def test_kmeans_of_odd_data():
    x = normal(20, 5)
    assign, _, _, objective = kmeans(x, 20, generator(0))
    assert sorted(assign.tolist()) == list(range(20)) and objective < 1e-4
    np.testing.assert_allclose(kmeans(x, 1, generator(0))[2][0], x.mean(0), atol=1e-4)
    for rows in (torch.zeros(30, 4), torch.full((30, 4), 1e4), normal(3, 4).repeat(10, 1)):
        assign, _, centroids, objective = kmeans(rows, 10, generator(2))
        assert centroids.isfinite().all() and assign.min() >= 0 and assign.max() < 10
        assert objective <= 1e-4 * max(1.0, rows[0].square().sum().item())
        assert all(len(set(assign[i::3].tolist())) == 1 for i in range(3)), "equal rows share a cluster"
    half = torch.cat([torch.full((100, 4), 3.0), 5 + normal(100, 4)])  # some start at the same point
    assert len(kmeans(half, 8, generator(0), 0)[2].unique(dim=0)) < 8
    assert len(kmeans(half, 8, generator(0))[0].unique()) == 8


@pytest.mark.parametrize("shards", [[300], [37, 300], [160, 160, 300]])
def test_any_number_of_processes_finds_the_same_clusters(shards, go, tmp_path):
    both = [(x, kmeans(x, 12, generator(7))) for x in (normal(300, 8), normal(5, 8, seed=1).repeat(60, 1))]
    assert len(both[0][1][0].unique()) == 12 and both[1][1][3] < 1e-3
    torch.save(both, tmp_path / "both.pt")
    code = f"""
    mine = slice({[0, *shards]}[r], {shards}[r])
    for x, (assign, distance, centroids, objective) in torch.load("both.pt"):
        got = common.kmeans(x[mine], 12, common.generator(7))
        assert torch.equal(got[0], assign[mine]) and abs(got[3] - objective) < 1e-6 * max(1, objective)
        torch.testing.assert_close(got[1:3], (distance[mine], centroids), atol=1e-4, rtol=1e-4)
    """
    run = go(code, len(shards))
    assert run.codes == [0] * len(shards), run.err


# %% metrics


def plain_scores(labels, assign):
    a, b = list(map(int, labels)), list(map(int, assign))
    clusters, classes = sorted(set(b)), sorted(set(a))
    matchings = itertools.permutations(classes + [None] * (len(clusters) - len(classes)), len(clusters))
    partners = [dict(zip(clusters, names, strict=True)) for names in matchings]
    accuracy = max(sum(p[c] == y for c, y in zip(b, a, strict=True)) for p in partners) / len(a)
    pairs = list(itertools.combinations(range(len(a)), 2))
    one, two = ([x[i] == x[j] for i, j in pairs] for x in (a, b))
    both, expected = sum(map(int.__mul__, one, two)), sum(one) * sum(two) / len(pairs)
    ari = (both - expected) / ((sum(one) + sum(two)) / 2 - expected)
    return {"nmi_labels": plain_nmi(a, b), "acc_labels": accuracy, "ari_labels": ari}


@pytest.mark.parametrize("a, b", [(4, 4), (3, 6), (6, 3), (2, 7)])
def test_label_scores_by_counting(a, b):
    rng = np.random.default_rng(10 * a + b)
    labels = rng.integers(0, a, 40)
    assign = torch.from_numpy(np.where(rng.random(40) < 0.5, labels % b, rng.integers(0, b, 40)))
    labels, kept = torch.from_numpy(labels), [i for i in range(40) if i not in {0, 5, 39}]
    want, less = plain_scores(labels, assign), plain_scores(labels[kept], assign[kept])
    assert common.label_scores(labels, assign) == pytest.approx(want)
    assert common.label_scores(labels, assign * 1000 + 7) == pytest.approx(want)  # ids with gaps
    assert common.label_scores(labels, assign, {5, 0, 39}) == pytest.approx(less) and less != want
    assert common.label_scores(None, assign) == {}


def test_metrics_by_hand(capsys):
    a, b = np.arange(400) // 2, np.arange(400) // 40
    want = math.log(10) / math.sqrt(math.log(200) * math.log(10))  # 0.66; arithmetic: 0.61
    assert common.nmi(a, b) == common.nmi(torch.from_numpy(b), a) == pytest.approx(want)
    assert common.nmi([2, 2, 2], [5, 5, 5]) == 1 and common.nmi([2, 2, 2, 2], [0, 1, 0, 1]) == 0
    assert common.label_scores(torch.tensor([0, 0, 1, 1]), torch.tensor([7, 7, 3, 3]))["acc_labels"] == 1
    sizes = common.cluster_sizes(torch.tensor([3, 3, 0, 5, 5, 3, 0, 5]), 7)
    assert sizes == {"clusters": 3, "empty": 4, "smallest": 2, "largest": 3} and capsys.readouterr().out == ""
    assert common.cluster_sizes(torch.tensor([1, 1, 1, 0]), 2)["largest"] == 3
    assert "trivial solution" in (out := capsys.readouterr().out) and "75%" in out


@pytest.mark.parametrize("size", [8, 40])
def test_baselines(size, monkeypatch):
    """Dark and bright images: 2-means of the pixels finds them, and one label in five is wrong."""
    group, n, seen = torch.arange(200) * 7 % 200 % 2, 200, []
    labels, kept = group ^ (torch.arange(n) % 5 == 0), [i for i in range(n) if i not in {3, 10, 11}]
    gray = torch.where(group == 1, 200, 30).view(n, 1, 1, 1) + normal(n, 1, size, size) * 9
    data = Images("toy", gray.to(torch.uint8), None, labels, ["a", "b"], (0.5,), (0.2,), {3, 10, 11})
    monkeypatch.setattr(common, "kmeans", lambda x, *more: seen.append(x.shape) or kmeans(x, *more))
    found = common.baselines(Loader(data, 50, size, 1.0, CPU, 0), 2, generator(0))
    assert found.pop("pixels") == pytest.approx(plain_scores(labels[kept], group[kept]))
    assert found["chance"]["nmi_labels"] < 0.05 and found["chance"]["acc_labels"] < 0.62
    assert seen == [(n, min(size, 32) ** 2)]
    data.labels = None
    assert common.baselines(Loader(data, 50, size, 1.0, CPU, 0), 2, generator(0)) == {}
    many = Images("many", torch.zeros(100_001, 1, 1, 1).byte(), None, torch.zeros(100_001), [], (0,), (1,))
    assert common.baselines(Loader(many, 50, 1, 1.0, CPU, 0), 2, generator(0)) == {}


# %% run folder


def toy(name="toy", n=4, paths=None):
    return Images(name, torch.zeros(n, 1, 32, 32, dtype=torch.uint8), paths, None, [], (0.5,), (0.2,))


def new_run(out, data=None, may_change=frozenset(), **more):
    args = {"out": str(out), "overwrite": False, "device": "cpu", "epochs": 3, "lr": 0.1, **more}
    return Run("test", Namespace(**args), data or toy(), may_change)


def save(run, epoch, backbone=None):
    run.log({"epoch": epoch})
    loader = Loader(toy(), 2, 32, 0.875, CPU, 0)
    run.save({"epoch": epoch, "w": torch.ones(9)}, backbone or Backbone("lenet5", 1, 32), loader)


def logged(run):
    return [record["epoch"] for record in read_log(run.log_path)[1:]]


def state(n):
    return {"config": {}, "log_bytes": 0, "epoch": n, "w": torch.full((500,), float(n))}


def found_epoch(folder):
    """That of what load_checkpoint finds, which is whole; 0: nothing."""
    found, _ = load_checkpoint(folder)
    assert found is None or (found["w"] == found["epoch"]).all()
    return found["epoch"] if found else 0


@pytest.mark.parametrize("before", ["one", "two", "disk full", "nothing", "newest damaged", "previous only"])
def test_stopped_at_any_step_of_saving_nothing_is_lost(before, tmp_path, monkeypatch, capsys):
    def step(real, *args):
        if next(taken) == steps:
            raise OSError if before == "disk full" else KeyboardInterrupt
        return real(*args)

    torch.save(state(3), buffer := io.BytesIO())
    parts = buffer.getvalue()[:900], buffer.getvalue()[900:]
    for steps in itertools.count():
        path, taken = tmp_path / str(steps) / "checkpoint.pt", itertools.count()
        path.parent.mkdir()
        for n in range(1, {"nothing": 1, "one": 2}.get(before, 3)):
            save_file(path, state(n), keep=True)
        if before == "newest damaged":
            path.write_bytes(b"PK")
        if before == "previous only":
            path.unlink()
        last, damaged = found_epoch(path.parent), load_checkpoint(path.parent)[1]
        with monkeypatch.context() as patch, contextlib.suppress(KeyboardInterrupt, SystemExit):
            patch.setattr(torch, "save", lambda _, file: [step(file.write, part) for part in parts])
            for name in ("fsync", "replace"):
                patch.setattr(os, name, partial(step, getattr(os, name)))
            save_file(path, state(3), keep=not damaged)
            break
        assert found_epoch(path.parent) in (last, 3)
        assert capsys.readouterr().err.count(f"error: cannot write {path}") == (before == "disk full")
    assert found_epoch(path.parent) == 3 and steps == (5 if before in ("one", "two", "disk full") else 4)
    path.write_bytes(b"PK")
    assert before == "nothing" or found_epoch(path.parent) == last, "the last good one must have been kept"


def test_flipped_bits_and_truncations_are_named_and_the_previous_is_taken(tmp_path, capsys):
    path, rng, found = tmp_path / "checkpoint.pt", np.random.default_rng(0), 0
    for n in (1, 2):
        save_file(path, state(n), keep=True)
    assert found_epoch(tmp_path) == 2 and not load_checkpoint(tmp_path)[1] and capsys.readouterr().out == ""
    data = path.read_bytes()
    broken = [data[:length] for length in [0, 1, len(data) - 1, *rng.integers(2, len(data) - 1, 37)]]
    for bit in rng.choice(8 * len(data), 100, replace=False).tolist():
        broken.append(data[: bit // 8] + bytes([data[bit // 8] ^ 1 << bit % 8]) + data[bit // 8 + 1 :])
    for i, content in enumerate(broken):
        path.write_bytes(content)
        epoch, out = found_epoch(tmp_path), capsys.readouterr().out
        assert epoch == 1 and f"{path} is damaged" in out or epoch == 2 and not out and i >= 40, i
        found += epoch == 1  # a bit beside the contents does no harm
    assert found >= 90
    (tmp_path / "checkpoint.prev.pt").write_bytes(b"")
    torch.save([1, 2], path)
    exits(capsys, lambda: load_checkpoint(tmp_path), "damaged", "--overwrite")


@pytest.mark.parametrize("form", ["zip", "old", "raw"])
def test_foreign_pickles_are_not_executed(form, tmp_path, capsys):
    path, trap = tmp_path / "checkpoint.pt", tmp_path / "trap"
    evil = {**state(1), "x": type("Evil", (), {"__reduce__": lambda self: (os.mkdir, (str(trap),))})()}
    pickle.loads(pickle.dumps(evil["x"]))
    trap.rmdir()  # so the payload works where it is let in
    if form == "raw":
        path.write_bytes(pickle.dumps(evil))
    else:
        torch.save(evil, path, _use_new_zipfile_serialization=form == "zip")
    exits(capsys, lambda: load_checkpoint(tmp_path), "damaged")
    with contextlib.suppress(Exception, SystemExit):
        pytest.fail(f"loaded {common.load_backbone(path)}")
    assert not trap.exists()


def test_resuming_cuts_the_log_and_a_finished_run_says_so(tmp_path, capsys):
    run = new_run(tmp_path / "a" / "run")
    assert run.state is None and not run.finished
    save(run, 1)
    with open(run.log_path, "a") as file:
        file.write('{"epoch": 2}\n{"epoch": 3, "los')  # killed in the middle of a line
    again = new_run(run.out, workers=7)  # may change
    assert again.state["epoch"] == 1 and not again.finished and "1 epochs are done" in capsys.readouterr().out
    for epoch in (2, 3):
        save(again, epoch)
    again.log({"result": {"clusters": 7}})
    whole = run.log_path.read_bytes()
    assert new_run(run.out).finished and run.log_path.read_bytes() == whole
    assert "3 epochs are done; finished" in capsys.readouterr().out
    assert not new_run(run.out, may_change={"epochs"}, epochs=5).finished and logged(run) == [1, 2, 3]


@pytest.mark.parametrize("left", ["torn result", "shorter than it was", "nothing"])
def test_a_log_that_was_lost_or_torn_does_not_stop_a_run(left, tmp_path):
    run = new_run(tmp_path, epochs=1)
    save(run, 1)
    first, second = run.log_path.read_text().splitlines(keepends=True)
    torn = {"torn result": first + second + '{"result": {"clus', "shorter than it was": first, "nothing": ""}
    run.log_path.write_text(torn[left])
    again = new_run(tmp_path, epochs=1)
    again.log({"result": {}})
    assert again.state["epoch"] == 1 and not again.finished and read_log(run.log_path)[-1] == {"result": {}}


def test_a_damaged_checkpoint_is_not_kept_as_the_next_previous(tmp_path):
    for epoch in (1, 2):
        save(new_run(tmp_path), epoch)
    (tmp_path / "checkpoint.pt").write_bytes(b"PK")
    run = new_run(tmp_path)
    assert run.state["epoch"] == 1 and logged(run) == [1]
    for epoch in (2, 3):
        save(run, epoch)
        both = [common.load_file(tmp_path / f"checkpoint{name}.pt")["epoch"] for name in (".prev", "")]
        assert both == [epoch - 1, epoch]


def test_other_arguments_or_images_are_refused_by_name(tmp_path, capsys, monkeypatch):
    def go(name="x", files=("0.png", "1.png"), **more):
        data = toy(name, len(files), [os.path.join(name, file) for file in files])
        return new_run("run", data, **{"heads": (1, 2), **more})

    monkeypatch.chdir(tmp_path)
    save(go(), 1)
    assert all(go(name).state["epoch"] == 1 for name in ("x", "x/", "./x", str(tmp_path / "x")))
    exits(capsys, lambda: go(lr=0.2, k=3), "lr 0.1 -> 0.2", "k None -> 3", "--overwrite")
    exits(capsys, lambda: go(files=["0.png"]), "images 2 -> 1")
    exits(capsys, lambda: go(files=["0.png", "y.png"]), "file_names")
    exits(capsys, lambda: go("y"), "data x -> y")


def test_overwrite_removes_old_checkpoints_but_not_when_torchrun_restarts(tmp_path, monkeypatch):
    for epoch in (1, 2):
        save(new_run(tmp_path), epoch)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert new_run(tmp_path, overwrite=True).state["epoch"] == 2
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "0")
    run = new_run(tmp_path, overwrite=True, lr=7.0)
    assert run.state is None and not list(tmp_path.glob("checkpoint*"))
    assert read_log(run.log_path)[0]["args"]["lr"] == 7.0 and logged(run) == []


START = """
from argparse import Namespace
args = Namespace(out={out!r}.format(r=r), overwrite=False, device="cpu", epochs=3)
run = common.Run("test", args, common.Images("toy", torch.zeros(4, 1, 2, 2), None, None, []))
print("open", flush=True)
"""


@pytest.mark.parametrize("world", [1, 2])
def test_a_second_run_is_refused_while_the_first_lives(world, go, server, tmp_path, tmp_path_factory):
    out, elsewhere = str(tmp_path / "run"), tmp_path_factory.mktemp("first")
    code = SETUP + START.format(out=out) + "import time; time.sleep(60)"
    first = server.start(["script.py"], code, 1, elsewhere)
    wait_for(lambda: (elsewhere / "out.0").exists() and first.read("out") == "open\n", 30)
    one_error(go(START.format(out=out), world), "--out", out, "another run")
    first.kill()
    wait_for((elsewhere / "codes").exists, 20)
    assert go(START.format(out=out), world).codes == [0] * world


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_that_cannot_be_used_is_refused(world, go, tmp_path):
    (tmp_path / "file").write_text("x")
    for out in ("file", "file/run"):
        one_error(go(START.format(out=out), world), f"--out {out}: ")
    if world == 2:  # several machines without a shared folder
        save(new_run(tmp_path / "run0"), 1)
        one_error(go(START.format(out="run{r}")), "not the same folder")


@pytest.mark.parametrize("poor", [False, True])
def test_the_first_record_says_what_runs(poor, tmp_path, monkeypatch):
    """In a folder with a space; where there is neither git nor a file system with locks, it runs all the same."""
    git = Mock(return_value=(127, "sh: git: not found") if poor else (0, "abc1234"))
    if poor:
        monkeypatch.setattr("fcntl.lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    monkeypatch.setattr(common, "__file__", str(tmp_path / "a b" / "common.py"))
    monkeypatch.setattr("subprocess.getstatusoutput", git)
    monkeypatch.setattr("sys.argv", ["/some/where/x.py", "--lr", "0.1", "ñ"])
    run = new_run(tmp_path / "run", toy(n=7), heads=(1, 2), text="a\n\udcff")
    (record,) = read_log(run.log_path)  # refuses NaN and infinity
    assert record["command"] == "x.py --lr 0.1 ñ" and record["args"]["text"] == "a\n\udcff"
    assert record["args"]["heads"] == [1, 2] and record["images"] == 7 and record["processes"] == 1
    assert record["versions"]["torch"] == torch.__version__ and os.uname().machine in record["hardware"]
    assert record["commit"] == (None if poor else "abc1234")
    assert f"'{tmp_path / 'a b'}'" in git.call_args.args[0]


@pytest.mark.parametrize("arch, option", [("lenet5", "norm"), ("lenet5", "sobel"), ("resnet18", "pool")])
def test_backbone_file_round_trip(arch, option, tmp_path):
    torch.manual_seed(1)
    backbone, x = Backbone(arch, 1, 16, **{option: True}), torch.randn(4, 1, 16, 16)
    backbone.train()(x)  # moves the batch-norm statistics
    save(new_run(tmp_path), 1, backbone)
    again, meta = common.load_backbone(tmp_path / "backbone.pt")
    assert not again.training and torch.equal(again(x), backbone.eval()(x))
    fed = {"arch": arch, "image_size": 16, "mean": [0.5], "std": [0.2], "center_fraction": 0.875}
    assert fed.items() <= meta.items() and meta["method"] == "test"


def test_time_left_of_each_phase_and_a_loss_that_stays_at_that_of_a_uniform_prediction(tmp_path, capsys):
    """By records of two phases; said again by a run that goes on; warned after a fifth of the epochs and at the end."""

    def go(run, first, last, losses, phase="a", **more):
        for epoch in range(first, last + 1):
            record = {"epoch": epoch, "epochs": 11, "phase": phase, "seconds": 400.4, "loss": losses, **more}
            run.end_epoch(record, "epoch", "loss")
        return capsys.readouterr().out.splitlines()

    run = new_run(tmp_path)
    lines = go(run, 1, 4, 2.99, uniform=3.0)
    assert [line for line in lines if not line.startswith("epoch")] == [
        "about 1:06:44 left at this pace",
        lines[4],
    ]
    assert "epoch 3" in lines[3] and all(
        x in lines[4] for x in ("WARNING", "2.990", "3.000", "--lr", "--init")
    )
    assert sum("left" in line for line in go(run, 5, 6, 2.99, "b", uniform=3.0)) == 1
    lines = go(new_run(tmp_path), 7, 11, 2.99, "b", uniform=3.0)
    assert lines[1] == "about 0:26:42 left at this pace" and "WARNING" in lines[-1] and len(lines) == 7
    assert not [x for x in go(run, 1, 11, 2.9, uniform=3.0) + go(run, 1, 11, 9.9) if "WARNING" in x]
    assert read_log(run.log_path)[-1]["epochs"] == 11


@pytest.mark.parametrize("kind", ["right", "gone", "random", "unreadable"])
def test_clusters_that_are_gone_or_random_are_said(kind, tmp_path, capsys):
    """Of 60 images in two classes; the table is written, also without labels."""
    labels, data = torch.arange(60) % 2, toy(n=60)
    assign = labels * 2 if kind == "gone" else torch.arange(60) // 2 % 2 if kind == "random" else labels
    data.labels = labels if kind != "unreadable" else torch.full((60,), -1)
    data.unreadable = {3} if kind == "unreadable" else set()
    common.save_clusters(
        tmp_path, Loader(data, 4, 32, 1.0, CPU, 0), assign, torch.zeros(60), 2 + (kind == "gone"), False
    )
    want = {"gone": "1 of 3 clusters", "random": "NMI"}
    sizes, *lines = capsys.readouterr().out.splitlines()
    most = {"gone": "3 clusters of 0 to 30 images", "unreadable": "2 clusters of 29 to 30 images"}
    assert sizes == most.get(kind, "2 clusters of 30 to 30 images")
    assert len(lines) == (kind in want) and all(
        "WARNING" in x and want[kind] in x and "--" in x for x in lines
    )
    rows = (tmp_path / "assignments.csv").read_text().splitlines()
    assert rows[4] == ("3,unreadable" if kind == "unreadable" else f"3,{int(assign[3])}") and len(rows) == 61


def test_words_beside_a_row_of_pictures(tmp_path, monkeypatch):
    """Number, size, the class that most are of; by number where no font has its name; nothing without labels."""
    words, data = [], toy(n=10)
    monkeypatch.setattr(
        "matplotlib.figure.Figure.savefig", lambda f, *a, **k: words.extend(x.get_ylabel() for x in f.axes)
    )
    assign, loader = torch.tensor([1, 1, 1, 1, 4, 4, 4, 0, -1, -1]), Loader(data, 4, 32, 1.0, CPU, 0)
    data.labels, data.classes = torch.tensor([0, 2, 2, 2, 1, 1, 0, 0, 1, 1]), ["a b", "猫", "c$^"]
    common.draw_clusters(tmp_path / "x.png", loader, assign, torch.zeros(10))
    assert words == [
        "cluster 1, 4 images\nc$^ 75%",
        "cluster 4, 3 images\n1 67%",
        "cluster 0, 1 images\na b 100%",
    ]
    for labels in (None, torch.full((10,), -1)):
        data.labels = labels
        common.draw_clusters(tmp_path / "x.png", loader, assign, torch.zeros(10), rows=2)
        assert words[-2:] == ["cluster 1, 4 images", "cluster 0, 1 images"]  # the largest and the smallest


def test_a_line_a_minute_without_a_terminal(monkeypatch, capsys):
    now = [1000.0]
    monkeypatch.setattr(common, "time", SimpleNamespace(time=lambda: now[0]))
    meter = common.Meter("epoch 1/2", 400)
    for step in range(40):
        now[0] += 5
        meter.add(10, torch.tensor(float(step), requires_grad=True))
    want = [("130/400", "6.000"), ("260/400", "12.500"), ("390/400", "19.000")]  # after 65 seconds each
    for line, words in zip(capsys.readouterr().out.splitlines(), want, strict=True):
        assert all(word in line for word in ("epoch 1/2", *words, "images/s")), line


@pytest.mark.parametrize("bad", [None, "nan", "-inf"])
def test_the_mean_loss_of_two_processes_and_its_end(bad, go):
    code = f"""
    meter = common.Meter("epoch", 20)
    for loss in ((1.0, 2.0), (3.0, float("{bad or 6}")))[r]:
        meter.add(5, torch.tensor(loss))
    print(meter.mean_loss())
    """
    if bad:
        one_error(go(code), f"loss is {bad}")
    else:
        assert go(code).out == ["3.0\n"] * 2
