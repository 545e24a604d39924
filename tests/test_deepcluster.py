"""deepcluster.py: its functions against plain loops, its optimization against formulas, whole runs."""

import ast
import functools
import math
import re
from collections import Counter
from types import SimpleNamespace

import common
from deepcluster import RECIPES, cluster, make_encoder, make_head, options

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import QUIET, ROOT, assert_same, epochs, one_error, plain, plain_nmi, read_assignments, two_at_once
from scipy import linalg, sparse
from torch import nn

SCRIPT = ROOT / "deepcluster.py"
QUICK = "--epochs 3 --k 20 --batch-size 128 --image-size 20 --out run"
SMALL = "--recipe digits --batch-size 8 --k 4 --image-size 16 --epochs 2 --workers 0 --out run"
STEPS = 1437 // 128  # of an epoch
IMAGENET = ("alexnet", True, 0.05, 1e-5, 0.9, 500, 10000, 256, 256)
trap = functools.partial(jobs.trap, "deepcluster")
digits = functools.cache(lambda: common.load_data("digits")[0])


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed))


# --------------------------------------------------------------------------- the algorithm, pasted
# All tests of formulas call what the pasted text defines, and so show that it can be pasted.

CELL = re.search(r"^# %% the algorithm.*?(?=^# %% )", SCRIPT.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
TAKEN = re.search(r"with ([\w, ]+) of common\.py", CELL.splitlines()[0])[1].split(", ")
PASTED = {"math": math, "np": np, "torch": torch, "F": F, "nn": nn, "sparse": sparse, "linalg": linalg}
PASTED |= {name: getattr(common, name) for name in TAKEN}
exec(compile(CELL, "the algorithm", "exec"), PASTED)
NAMES = "pca whiten uniform_over_clusters loss_weights neighbor_graph power_iteration_clustering"
pca, whiten, uniform_over_clusters, loss_weights, neighbor_graph, pic = map(PASTED.get, NAMES.split())


def test_the_pasted_algorithm_runs_where_nobody_set_up_processes_and_takes_no_args_or_loader(launch):
    code = f"""
        import math, numpy as np, torch, torch.nn.functional as F, common
        from scipy import linalg, sparse
        from torch import nn
        names = {{"math": math, "np": np, "torch": torch, "F": F, "nn": nn, "sparse": sparse, "linalg": linalg}}
        names |= {{name: getattr(common, name) for name in {TAKEN}}}
        exec({CELL!r}, names)
        assert not torch.distributed.is_initialized()
        pca, whiten, uniform, weights, graph, pic = map(names.get, {NAMES.split()})
        gen = torch.Generator().manual_seed(0)
        z = whiten(x := torch.randn(40, 6, generator=gen), *pca(x, 4, gen))
        assign = pic(*graph(z, z, 0))
        print(*z.shape, *assign.shape, *uniform(assign, gen).shape, *weights(assign).shape)
    """
    taken = {a.arg for a in ast.walk(ast.parse(CELL)) if isinstance(a, ast.arg)}
    assert not {"args", "loader", "data"} & taken
    job = launch(code, world=1)
    assert job.codes == [0] and job.out[0].split() == ["40", "4", "40", "40", "40"], job.err


def random_assignment(gen, n, k):
    ids = torch.randperm(3 * k, generator=gen)[:k]
    return ids[torch.multinomial(torch.rand(k, generator=gen) ** 4 + 1e-3, n, True, generator=gen)]


def test_draws_are_n_shuffled_images_at_most_the_quota_of_each_cluster_and_no_repeats_in_large_ones():
    gen = seeded()
    for n, k in [(1, 1), (7, 3), (50, 50), (200, 12), (1000, 90)] * 10:
        assign = random_assignment(gen, n, k)
        order = uniform_over_clusters(assign, gen)
        assert order.shape == (n,) and order.dtype == torch.int64 and order.min() >= 0 and order.max() < n
        sizes, drawn = Counter(assign.tolist()), Counter(assign[order].tolist())
        quota = n // len(sizes) + 1
        left = [quota - drawn[c] for c in sizes]
        assert min(left) >= 0 and sum(left) == quota * len(sizes) - n
        assert all(sizes[int(assign[i])] < quota for i, times in Counter(order.tolist()).items() if times > 1)
    assign = torch.arange(1000) % 10 // 2
    order, again, other = (uniform_over_clusters(assign, seeded(s)) for s in (4, 4, 5))
    assert torch.equal(order, again) and not torch.equal(order, other)
    for c in range(5):  # the middle of a cluster's draws is that of the epoch
        mine = torch.arange(1000.0)[assign[order] == c]
        assert abs(mine.mean() - 499.5) < 5 * 1000 / math.sqrt(12 * len(mine))


def test_draws_do_not_follow_sizes_and_members_come_alike():
    gen, assign = seeded(2), torch.arange(4).repeat_interleave(torch.tensor([1, 10, 100, 1000]))
    counts = torch.stack([torch.bincount(assign[uniform_over_clusters(assign, gen)]) for _ in range(300)])
    mean, error = counts.double().mean(0), counts.double().std(0) / math.sqrt(300)
    assert ((mean - len(assign) / 4).abs() <= 4 * error + 1e-9).all(), mean
    assign = torch.cat([torch.zeros(40), torch.ones(4)]).long()
    times = sum(torch.bincount(uniform_over_clusters(assign, gen), minlength=44) for _ in range(2000)) / 2000
    assert (times[:40] - 22 / 40).abs().max() < 0.06 and (times[40:] - 22 / 4).abs().max() < 0.23  # 5 sigma


def test_loss_weights_are_one_over_the_size_and_have_the_gradient_of_uniform_sampling():
    """Mean 1; the weighted full-batch gradient is the mean over clusters of the mean over members [3.3]."""
    gen = seeded(8)
    for n, k in [(1, 1), (9, 9), (60, 5), (300, 40)]:
        assign = random_assignment(gen, n, k)
        want = [1 / Counter(assign.tolist())[c] for c in assign.tolist()]
        torch.testing.assert_close(loss_weights(assign), torch.tensor([w * n / sum(want) for w in want]))
    assign = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, 5])
    x, v = normal(9, 4, seed=9).double(), normal(6, 4, seed=10).double().requires_grad_()
    loss = (loss_weights(assign).double() * F.cross_entropy(x @ v.T, assign, reduction="none")).mean()
    want, p = torch.zeros(6, 4, dtype=torch.float64), (x @ v.detach().T).softmax(1)
    for i, c in enumerate(assign.tolist()):
        for k in range(6):
            want[k] += (p[i, k] - float(k == c)) * x[i] / {0: 6, 2: 2, 5: 1}[c] / 3
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], want, rtol=1e-6, atol=1e-8)


def plain_pic(ids, distance, sigma=0.2, a=0.001, iterations=200):
    n = len(ids)
    A = np.zeros((n, n))
    for i in range(n):
        for j, d in zip(ids[i], distance[i], strict=True):
            A[i, j] = math.exp(-d / sigma**2)
    W, v = A + A.T, np.full(n, 1 / n)
    for _ in range(iterations):
        v = a * W.T @ v + (1 - a) / n
        v = v / v.sum()
    gain = [[W[i, j] * (v[j] - v[i]) for j in range(n)] for i in range(n)]
    top = [int(np.argmax(row)) if max(row) > 0 else i for i, row in enumerate(gain)]
    for _ in range(n):
        top = [top[j] for j in top]
    size, result = Counter(top), list(top)
    for i in range(n):
        if size[top[i]] == 1:
            result[i] = next((top[j] for j in ids[i] if size[top[j]] > 1), top[i])  # nearest first
    return result, sum(s == 1 for s in size.values())


def brute_neighbors(z, k):
    distance = ((z.double()[:, None] - z.double()) ** 2).sum(2).fill_diagonal_(math.inf)
    near = [sorted((d, j) for j, d in enumerate(row))[: min(k, len(z) - 1)] for row in distance.tolist()]
    return [[j for _, j in row] for row in near], [[d for d, _ in row] for row in near]


def test_power_iteration_clustering_is_its_formula_in_plain_loops():
    """Random graphs; five groups of a center and two leaves, and a point that all leaves are tied to."""
    sizes = [(12, 2), (30, 2), (40, 3), (40, 4), (45, 6)]
    graphs = [brute_neighbors(F.normalize(normal(n, d, seed=n + d)), 5) for n, d in sizes]
    graphs += [brute_neighbors(0.3 * normal(n, 3, seed=n), k) for n, k in [(30, 2), (40, 3), (45, 1)]]
    ids, distance = [[8, 2]], [[0.05, 0.06]]  # more edges than a leaf: follows nobody, nobody follows it
    for center in range(1, 16, 3):
        ids += [[center + 1, center + 2], [center, 0], [center, 0]]
        distance += [[0.01, 0.01], [0.01, 0.06], [0.01, 0.06]]
    graphs.append((ids, distance))
    for ids, distance in graphs:
        want, alone = plain_pic(ids, distance)
        got = pic(torch.tensor(ids), torch.tensor(distance))
        assert got.dtype == torch.int64 and sorted(set(got.tolist())) == list(range(len(set(want))))
        assert len(set(zip(got.tolist(), want, strict=True))) == len(set(want))  # one to one
    assert all(len(set(got[c : c + 3].tolist())) == 1 for c in range(1, 16, 3))
    assert alone == 1 and got[0] == got[8]  # of its neighbors, 8 is nearest


@pytest.mark.parametrize("n, k, first, stop, copies", [(60, 5, 0, 60, 9), (60, 4, 9, 33, 1), (4, 5, 1, 4, 1)])
def test_neighbor_graph_is_the_brute_force_one_without_the_image_itself(n, k, first, stop, copies):
    z = normal(n, 5, seed=12)
    z[3 : 3 + copies] = z[3].clone()
    ids, distance = neighbor_graph(z[first:stop], z, first, k)
    want_ids, want = brute_neighbors(z, k)
    assert copies > 1 or ids.tolist() == want_ids[first:stop]
    assert all(i not in row and len(set(row)) == len(row) for i, row in enumerate(ids.tolist(), first))
    torch.testing.assert_close(distance, torch.tensor(want[first:stop]), rtol=1e-3, atol=1e-5)


def numpy_whitened(x, p, fitted=None):
    """Unit rows of x in the whitened axes of PCA of the rows `fitted`, in double precision."""
    x = np.asarray(x, dtype=np.float64)
    fitted = x if fitted is None else fitted
    _, scale, axes = np.linalg.svd(fitted - fitted.mean(0), full_matrices=False)
    z = (x - fitted.mean(0)) @ axes[:p].T / scale[:p]
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def assert_same_up_to_signs(z, want):
    np.testing.assert_allclose(np.asarray(z) @ np.asarray(z).T, want @ want.T, atol=1e-3)  # of all pairs


def test_whitening_of_dead_features_few_rows_and_more_axes_than_columns_is_finite():
    x = normal(50, 6)
    dead = torch.cat([x, torch.full((50, 3), 7.0)], 1)
    assert_same_up_to_signs(whiten(dead, *pca(dead, 6, seeded())), numpy_whitened(x, 6))  # as without them
    assert_same_up_to_signs(whiten(x[:4], *pca(x[:4], 6, seeded())), numpy_whitened(x[:4], 3))  # span three
    twice = torch.eye(84).repeat(3, 1)  # one eigenvalue, 83 times
    for rows, p in [(dead, 40), (twice, 60), (x[:1], 3), (x[:1].expand(20, 6), 5), (normal(9, 8200), 12)]:
        mean, axes = pca(rows, p, seeded())
        assert axes.shape == (rows.shape[1], min(p, rows.shape[1])) and axes.isfinite().all()
        z = whiten(rows, mean, axes)
        assert z.isfinite().all() and z.norm(dim=1).max() < 1 + 1e-5


def test_pca_is_numpys_and_the_same_on_one_and_two_processes(launch):
    code = """
        import os, torch
        from common import setup
        from deepcluster import pca
        setup()
        rank = int(os.environ["RANK"])
        for name in ("few", "many"):
            x = torch.load(f"{name}.pt")[slice(*((0, 17), (17, 70))[rank])]
            torch.save(pca(x, 5, torch.Generator().manual_seed(0)), f"{name}.{rank}")
    """
    many = normal(70, 60) * torch.logspace(0, -1, 60) @ F.normalize(normal(60, 8200, seed=1)) + 3
    rows = {"few": normal(70, 8) * torch.logspace(0, -1, 8) + 300, "many": many}
    for name, x in rows.items():
        torch.save(x, launch.path / f"{name}.pt")
    job = launch(code)
    assert job.codes == [0, 0], job.err
    for name, x in rows.items():
        both = [torch.load(launch.path / f"{name}.{rank}") for rank in (0, 1)]
        assert all(map(torch.equal, *both))
        for mean, axes in (both[0], pca(x, 5, seeded())):
            assert_same_up_to_signs(whiten(x, mean, axes), numpy_whitened(x, 5))
            z = ((x - mean) @ axes).double()  # variance 1 in every column, the strongest axis first
            np.testing.assert_allclose(z.var(0, unbiased=False), 1, rtol=1e-2)
            assert (axes.norm(dim=0).diff() > 0).all()


@pytest.mark.parametrize("p", [6, 0])
def test_cluster_whitens_center_crops_by_a_random_sample_and_gives_what_assigns_new_images(p):
    pixels, samples = torch.randint(0, 256, (300, 1, 12, 12), generator=seeded(1)).byte(), []
    data = common.Images("gray", pixels, None, None, [], (0.4,), (0.3,))
    loader = common.Loader(data, 16, 8, 8 / 12, torch.device("cpu"), 0)
    crops = ((pixels.double().numpy()[:, :, 2:10, 2:10] / 255 - 0.4) / 0.3).reshape(300, 64)
    few, args = 60 if p else 0, SimpleNamespace(pca=p, clustering="kmeans", k=7)
    encoder, seen = nn.Sequential(nn.Dropout(), nn.Flatten(), nn.Linear(64, 20)), []
    encoder.dim = 20
    encoder.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(1)))
    with torch.no_grad():
        x = encoder[2](torch.from_numpy(crops).float()).double().numpy()
    for seed in (0, 1):
        seen.clear()
        assign, distance, k, model = cluster(encoder, loader, args, seeded(seed), sample=60)
        which = torch.cdist(torch.cat(seen).double(), torch.from_numpy(crops)).argmin(1).numpy()
        assert encoder.training and which[few:].tolist() == list(range(300))
        samples.append(set(which[:few].tolist()))
        z = (x - model["mean"].double().numpy()) @ model["axes"].double().numpy() if p else x
        z = z / np.linalg.norm(z, axis=1, keepdims=True)
        assert_same_up_to_signs(z, numpy_whitened(x, 6, x[which[:few]]) if p else z)
        squares = ((z[:, None] - model["centroids"].double().numpy()) ** 2).sum(-1)
        assert k == 7 and assign.tolist() == squares.argmin(1).tolist()
        np.testing.assert_allclose(distance, squares.min(1), atol=1e-4)
        assert model["objective"] == pytest.approx(squares.min(1).mean(), rel=1e-4)
    assert [len(s) for s in samples] == [few, few] and (not few or samples[0] != samples[1])


# --------------------------------------------------------------------------- network, recipes and steps


def test_features_are_taken_before_the_relu_and_the_head_is_a_relu_and_small_normal_weights():
    heads = [make_head(300, 200, seeded(s)) for s in (3, 3, 4)]
    weight, x = heads[0][1].weight.detach(), normal(5, 300)
    assert abs(weight.std().item() / 0.01 - 1) < 0.02 and abs(weight.mean().item()) < 2e-4
    torch.testing.assert_close(heads[0](x), torch.where(x > 0, x, 0.0) @ weight.T)
    assert torch.equal(weight, heads[1][1].weight) and not torch.equal(weight, heads[2][1].weight)
    _, encoder = encoder_of("--arch alexnet-small --image-size 16")
    with torch.no_grad():
        assert 0.2 < (encoder.eval()(normal(2, 3, 16, 16)) < 0).float().mean() < 0.8


def encoder_of(arguments, device="cpu"):
    with torch.device(device):
        return make_encoder(
            options(["--data", "x", "--recipe", "imagenet", "--no-sobel", *arguments.split()]), 3
        )


@pytest.mark.parametrize(
    ("arguments", "flat", "dim"),
    [
        ("--arch alexnet", 9216, 4096),
        ("--arch vgg16", 25088, 4096),
        ("--arch resnet18", 512 * 49, 4096),  # B unless told
        ("--arch resnet18 --resnet-head A", 512 * 49, 512 * 49),
        ("--arch resnet50", 2048 * 49, 2048 * 49),
        ("--arch resnet50 --resnet-head B", 2048 * 49, 4096),  # collapses [Local Aggregation, suppl. 2.2]
    ],
)
def test_features_are_the_last_hidden_layer_or_the_flattened_map(arguments, flat, dim, capsys):
    backbone, encoder = encoder_of(arguments, "meta")
    assert encoder(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, dim) and encoder.dim == dim
    linear = [m for m in encoder.modules() if isinstance(m, nn.Linear)]
    assert (linear[0].in_features if linear else dim) == flat and len(linear) == (0 if flat == dim else 2)
    assert (backbone is encoder) == ("resnet" not in arguments or flat == dim)
    if backbone is not encoder:
        kinds = [type(m).__name__ for m in encoder[1]]
        assert kinds == ["Dropout", "Linear", "ReLU", "Dropout", "Linear"]
    assert ("WARNING" in capsys.readouterr().out) == ("resnet50" in arguments and dim == 4096)


@pytest.mark.parametrize(
    ("argv", "want"),
    [
        ("--data x --recipe imagenet", IMAGENET),
        (
            "--data x --recipe imagenet --arch vgg16 --k 7 --epochs 3",
            ("vgg16", *IMAGENET[1:5], 3, 7, 256, 256),
        ),
        ("--data fashionmnist", ("lenet5", False, 0.1, 1e-3, 0.1, 50, 5, 0, 128)),
        ("--data svhn", ("alexnet-small", True, 0.1, 1e-3, 0.5, 100, 200, 256, 64)),
        ("--data cifar10", ("alexnet-small", True, 0.1, 1e-3, 0.9, 100, 1000, 256, 64)),
        ("--data cifar10 --arch alexnet", ("alexnet", True, 0.05, 1e-5, 0.9, 100, 2000, 256, 256)),
        ("--data x --recipe svhn --lr 0.2", ("alexnet-small", True, 0.2, 1e-3, 0.5, 100, 200, 256, 64)),
    ],
)
def test_recipes_are_the_papers_and_flags_override(argv, want):
    a = options(argv.split())
    assert (a.arch, a.sobel, a.lr, a.wd, a.momentum, a.epochs, a.k, a.pca, a.batch_size) == want
    assert (a.dropout, a.reassign, a.crop_area, a.flip) == (0.5, 1, 0.08, True)
    assert (a.balance, a.clustering, a.halt_clustering, a.train_crop) == ("uniform", "kmeans", 0, "random")
    assert not any(jobs.unset(options(["--recipe", name])) for name in RECIPES)
    assert (a.image_size, a.center_fraction) == ((224, 0.875) if a.lr == 0.05 else (32, 0.73))


TRAIN = """
import torch, common, deepcluster
from types import SimpleNamespace
common.setup()
(rank, world), given = common.rank_and_world(), torch.load("given.pt")
encoder, args = torch.nn.Linear(6, 5), SimpleNamespace(lr=0.2, wd=0.05, amp=False)
encoder.load_state_dict(dict(zip(("weight", "bias"), given["encoder"])))
optimizer = torch.optim.SGD(encoder.parameters(), 0.2, 0.9, weight_decay=0.05)
for weight, bias in given["heads"]:
    head = deepcluster.make_head(5, 4, torch.Generator())
    head[1].load_state_dict({"weight": weight, "bias": bias})
    mine = [index[rank::world] for index in torch.arange(60).split(20)]
    batches = [(index, [given["images"][index]]) for index in mine]
    rest = batches, given["labels"], given["weights"], common.Meter("", 1), args
    loss = deepcluster.train(encoder, head, optimizer, *rest)
found = [*encoder.state_dict().values(), *head.state_dict().values(), torch.tensor(loss)]
torch.save(found, f"found.{rank}")
"""


def simulate(given, momentum=(0.9, 0.9, 0, 0), kept=True, weighted=True, wd=0.05, lr=0.2):
    """Encoder W, b, head V, c after two epochs of three steps, and the last epoch's loss, in float64."""
    p, m = [v.double() for v in given["encoder"]], [0, 0]
    for head in given["heads"]:
        p, m, losses = [*p[:2], *(v.double() for v in head)], [*(m[:2] if kept else (0, 0)), 0, 0], []
        for index in torch.arange(60).split(20):
            p = [v.detach().requires_grad_() for v in p]
            logits = F.linear(F.linear(given["images"][index].double(), *p[:2]).relu(), *p[2:])
            each = -logits.log_softmax(1)[range(20), given["labels"][index]]
            losses.append((each * given["weights"][index] if weighted else each).mean())
            gradients = torch.autograd.grad(losses[-1], p)
            m = [mu * old + g + wd * v for mu, old, g, v in zip(momentum, m, gradients, p, strict=True)]
            p = [v - lr * step for v, step in zip(p, m, strict=True)]
    return [*p, sum(losses) / 3]


@pytest.mark.parametrize("world", [1, 2])
def test_steps_are_the_formulas_on_one_and_two_processes(launch, world):
    """The encoder's momentum outlives the epoch, the head is new and has none, decay on both [3.4]."""
    given = {"encoder": [normal(5, 6), normal(5, seed=1)], "images": normal(60, 6, seed=2)}
    given["heads"] = [(normal(4, 5, seed=s), normal(4, seed=s + 1)) for s in (3, 5)]
    given |= {"labels": torch.arange(60) % 7 % 4, "weights": normal(60, seed=7).abs()}
    torch.save(given, launch.path / "given.pt")
    job = launch(TRAIN, world)
    assert job.codes == [0] * world, job.err
    for rank in range(world):
        found = torch.load(launch.path / f"found.{rank}")
        for wrong in ({}, {"momentum": (0.9,) * 4}, {"kept": False}, {"wd": 0}, {"weighted": False}):
            pairs = zip(found, simulate(given, **wrong), strict=True)
            off = max(((x - y).abs().max() / y.abs().max()).item() for x, y in pairs)
            assert off > 1e-3 if wrong else off < 1e-5, wrong


# The script, with what goes into each epoch's training written down.
RECORD = """
import os, torch, common, deepcluster
seen = []
def train(encoder, head, optimizer, batches, labels, weights, *a, real=deepcluster.train):
    batches = [(index, images[0]) for index, images in batches]
    epoch = {"labels": labels.clone(), "weights": weights.clone(), "head": head[1].weight.detach().clone()}
    epoch |= {name: torch.cat(parts) for name, parts in zip(("index", "images"), zip(*batches))}
    epoch["momenta"] = len(optimizer.state)
    loss = real(encoder, head, optimizer, [(i, [x]) for i, x in batches], labels, weights, *a)
    state = torch.nn.Sequential(encoder, head).state_dict()
    seen.append(epoch | {"after": {name: v.clone() for name, v in state.items()}})
    return loss
deepcluster.train, common.draw_clusters = train, lambda *a: None
deepcluster.main()
torch.save(seen, f"seen.{os.environ.get('RANK', 0)}")
"""


@pytest.fixture(scope="module")
def recorded(run):
    """Jobs with .seen by process; at learning rate 0, heads and labels change only when they are replaced."""
    flags = {"plain": "", "halt": "--halt-clustering 2 --balance loss", "reassign": "--reassign 2"}
    flags |= {"reset": "--halt-clustering 2 --reset-head --balance none"}
    flags |= {"center": "--train-crop center --center-fraction 0.625 --epochs 1"}
    flags |= {"flip": flags["center"] + " --flip"}
    work = {name: functools.partial(run, f"{QUICK} --lr 0 {more}", RECORD) for name, more in flags.items()}
    found = two_at_once(work | {"two": lambda: run(QUICK, RECORD, 2)})
    for job in found.values():
        job.seen = [torch.load(job.folder / f"seen.{rank}", weights_only=True) for rank in range(job.world)]
    return found


# labels replaced, head replaced: at epoch 2; at epoch 3
@pytest.mark.parametrize("name", ["plain 11 11", "halt 11 00", "reset 11 01", "reassign 00 11"])
def test_when_labels_and_head_are_replaced(recorded, name):
    name, *want = name.split()
    seen, records = recorded[name].seen[0], epochs(recorded[name].log())
    for i, (new, head) in enumerate(want):
        before, now, record = seen[i], seen[i + 1], records[i + 1]
        assert torch.equal(before["labels"], now["labels"]) == (new == "0")
        assert torch.equal(before["after"]["1.1.weight"], now["head"]) == (head == "0")
        nmi = plain_nmi(before["labels"].tolist(), now["labels"].tolist())  # to the previous clustering
        assert record.get("nmi_previous") == (pytest.approx(nmi) if new == "1" else None)
        assert ("objective" in record) == (new == "1") and now["momenta"] > seen[0]["momenta"] == 0


def test_balance_draws_uniformly_or_weights_the_loss_or_neither(recorded):
    for name, uniform, weighted in (("plain", True, False), ("halt", False, True), ("reset", False, False)):
        for epoch in recorded[name].seen[0]:
            sizes, drawn = (torch.bincount(x) for x in (epoch["labels"], epoch["labels"][epoch["index"]]))
            assert (drawn.max() <= 1437 // 20 + 1) == uniform
            assert uniform or len(epoch["index"].unique()) == STEPS * 128
            want = 1437 / 20 / sizes[epoch["labels"]] if weighted else torch.ones(1437)
            torch.testing.assert_close(epoch["weights"], want)


@pytest.mark.parametrize("name", ["center", "flip"])
def test_center_crops_for_training_are_the_middle_and_flipped_only_if_asked(recorded, name):
    data, first = digits(), recorded[name].seen[0][0]
    want = (data.pixels[first["index"]][:, :, 6:26, 6:26] / 255 - data.mean[0]) / data.std[0]
    straight, flipped = ((first["images"] - x).abs().amax((1, 2, 3)) < 1e-4 for x in (want, want.flip(3)))
    assert (straight | flipped).all() and len(want) == STEPS * 128
    assert 0.45 < (~straight).double().mean() < 0.55 if name == "flip" else straight.all()


def test_two_processes_find_the_same_first_clusters_and_keep_equal_weights(recorded):
    job, one = recorded["two"], recorded["plain"]  # no step was taken before its first clustering, either
    assert job.log()[1]["objective"] == pytest.approx(one.log()[1]["objective"], rel=1e-6)
    assert torch.equal(job.seen[0][0]["labels"], one.seen[0][0]["labels"])
    for a, b in zip(*job.seen, strict=True):
        assert torch.equal(a["labels"], b["labels"])
        assert all(torch.equal(v, b["after"][k]) for k, v in a["after"].items() if "running" not in k)
        assert len(a["index"]) == len(b["index"]) == STEPS * 64 and not torch.equal(a["index"], b["index"])
        drawn = torch.bincount(a["labels"][torch.cat([a["index"], b["index"]])])  # halves of one epoch
        assert drawn.max() <= 1437 // 20 + 1
    assert len(re.findall(r"^epoch 1\b", job.out, re.MULTILINE)) == 1 and job.log()[0]["processes"] == 2


# --------------------------------------------------------------------------- whole runs, and interrupted ones


@pytest.fixture(scope="module")
def whole(run):
    return run(QUICK, plain(SCRIPT))


def test_log_holds_what_ran_every_epoch_and_the_result(whole):
    first, *records, last = whole.log()
    assert first["args"]["k"] == 20 and [r["epoch"] for r in records] == [1, 2, 3]
    for r in records:
        assert ("nmi_previous" in r) == (r["epoch"] > 1) and 0 < r["objective"] < 4
        assert r["clusters"] + r["empty"] == 20
        assert r["uniform"] == pytest.approx(math.log(20)) and abs(r["loss"] - r["uniform"]) < 0.5
    assign = whole.state()["assign_all"].tolist()
    sizes = Counter(assign).values()
    assert (records[-1]["largest"], records[-1]["smallest"]) == (max(sizes), min(sizes))
    assert records[-1]["nmi_labels"] == pytest.approx(plain_nmi(digits().labels.tolist(), assign))
    others = {name: scores["nmi_labels"] for name, scores in last["baselines"].items()}
    assert others["random network"] == records[0]["nmi_labels"] and others["chance"] < 0.1 < others["pixels"]


def test_files_of_a_run_and_its_result(whole):
    images, clusters = read_assignments(whole.run / "assignments.csv")
    assert images == [str(i) for i in range(1437)]
    result, sizes = whole.log()[-1]["result"], Counter(clusters)
    found = [result[name] for name in ("clusters", "smallest", "largest")]
    assert found == [len(sizes), min(sizes.values()), max(sizes.values())]
    assert result["nmi_labels"] == pytest.approx(plain_nmi(digits().labels.tolist(), clusters))
    assert (whole.run / "clusters.png").read_bytes().startswith(b"\x89PNG")
    state, backbone = whole.state(), whole.state("backbone.pt")
    assert whole.state("checkpoint.prev.pt")["epoch"] == 2 and state["epoch"] == 3
    assert {f"net.{k}" for k in backbone["state_dict"]} == set(state["encoder"])
    assert all(torch.equal(v, state["encoder"][f"net.{k}"]) for k, v in backbone["state_dict"].items())
    assert {"arch": "lenet5", "image_size": 20, "method": "deepcluster"}.items() <= backbone["meta"].items()


@pytest.mark.parametrize("p", [60, 0])
def test_clustering_pt_and_backbone_pt_assign_the_images_as_assignments_csv(run, whole, p):
    job = whole if p else run(QUICK + " --epochs 1 --pca 0")
    (backbone, meta), model = common.load_backbone(job.run / "backbone.pt"), job.state("clustering.pt")
    loader = common.Loader(digits(), 100, 20, meta["center_fraction"], torch.device("cpu"), 0)
    with torch.no_grad():
        z = torch.cat([backbone(x) for _, x in loader.test(torch.arange(1437))]).double()
    z = (z - model["mean"].double()) @ model["axes"].double() if p else z
    z = z / z.norm(dim=1, keepdim=True)
    got = torch.cdist(z, model["centroids"].double()).argmin(1).tolist()
    want = read_assignments(job.run / "assignments.csv")[1]
    assert len(set(want)) > 5 and sum(map(int.__ne__, got, want)) <= 1  # one may lie between two


@pytest.mark.parametrize(
    ("data", "more"),
    [
        ("same", ""),
        ("same", "--pca 0"),
        ("same", "--clustering pic"),
        ("flat", "--k 24 --balance loss"),  # as many as there are images
        ("flat", "--k 1 --workers 1"),
    ],
)
def test_degenerate_data_runs_warns_and_has_no_nan(run, places, data, more):
    job = run(f"--data PLACES/{data} {SMALL} {more}")
    records, (images, clusters) = (
        job.log(),
        read_assignments(job.run / "assignments.csv"),
    )  # the log refuses NaN
    assert all(v.isfinite().all() for v in job.state()["encoder"].values())
    trivial = [max(r["largest"] for r in epochs(records)), *Counter(clusters).values()]
    assert ("trivial" in job.out) == (max(trivial) > len(images) / 2) >= (data == "same" or "--k 1" in more)
    assert not any("nmi_labels" in r for r in [*records, records[-1]["result"]])
    assert images == [str(p) for p in sorted((places / data).iterdir())]
    assert "--k 24" not in more or len(set(clusters)) == 24
    if "pic" in more:
        line = one_error(run("--assign PLACES/flat --out run", folder=job.folder, ok=False))
        assert "power iteration clustering has no centroids" in line


@pytest.mark.parametrize("world", [1, 2])
def test_scores_count_the_readable_images_of_all_processes(run, world):
    job = run("--data PLACES/both " + SMALL, world=world)
    rows = [(path[-9:], c) for path, c in zip(*read_assignments(job.run / "assignments.csv"), strict=True)]
    assert len(rows) == 24 and [x for x, c in rows if c == "unreadable"] == ["b/001.png"]
    labels, clusters = zip(*((x[0], c) for x, c in rows if c != "unreadable"), strict=True)
    assert job.log()[-1]["result"]["nmi_labels"] == pytest.approx(plain_nmi(labels, clusters), abs=1e-9)


def test_the_defaults_learn(run):
    job = run("--epochs 16 --out run")  # of 40
    reached = plain_nmi(digits().labels.tolist(), read_assignments(job.run / "assignments.csv")[1])
    others = {name: scores["nmi_labels"] for name, scores in job.log()[-1]["baselines"].items()}
    assert reached >= others["random network"] + 0.03 and reached >= others["chance"] + 0.5
    assert others["random network"] > 0.5  # a working start: the bar means something
    assert epochs(job.log())[-1]["loss"] < math.log(30) - 0.2
    assert (
        "WARNING" not in job.out.split("\nepoch 5 ")[1]
    )  # the loss leaves ln K in the 5th of usually 40 epochs


FEWER = "common.HIDDEN['alexnet-small'] = (32, 32)\n"  # not 5 million weights


@pytest.mark.parametrize(
    ("arguments", "before"),  # code before the script
    [
        (f"--data PLACES/flat {SMALL} --workers 2 --arch alexnet-small", FEWER),  # dropout
        (f"{QUICK} --clustering pic --balance loss --reassign 2", ""),
        (f"{QUICK} --halt-clustering 1", ""),
    ],
)
def test_other_kinds_of_runs_survive_a_kill_in_the_second_epoch(run, arguments, before):
    before = QUIET + before
    reference = run(arguments, before + plain(SCRIPT))
    killed = run(arguments, before + trap("deepcluster.Meter", "add", 4, late=True), ok=False)
    assert killed.code == -9 and killed.state()["epoch"] in (1, 2)
    assert_same(run(arguments, before + plain(SCRIPT), folder=killed.folder), reference)
    for r in epochs(reference.log()):  # pic finds K itself
        assert r["uniform"] == pytest.approx(math.log(r["clusters"] + r["empty"]))
        assert "pic" not in arguments or r["empty"] == 0 and r["clusters"] > 20
    assert len(reference.state()["head"]["1.bias"]) == r["clusters"] + r["empty"]


# --------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("arguments", "parts", "world"),
    [
        ("--k 10000", ["data/imagenet was not found"], 1),
        ("--reset-head", ["--reset-head", "--halt-clustering"], 1),
        ("--lr 1e30 --batch-size 1437 --clustering pic --pca 0", ["--lr"], 1),  # the features
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(run, arguments, parts, world):
    line = one_error(run(f"{QUICK} --recipe digits {arguments}", world=world, ok=False))
    assert not [part for part in parts if part not in line], line


def test_a_loss_that_is_not_finite_leaves_the_checkpoint_as_it_was(run):
    job = run(QUICK + " --epochs 1")
    state = job.state()
    state["optimizer"]["param_groups"][0]["lr"] = 1e30  # from the second epoch on
    torch.save(state, job.run / "checkpoint.pt")
    before = (job.run / "checkpoint.pt").read_bytes()
    assert "--lr" in one_error(run(QUICK, folder=job.folder, ok=False))
    assert (job.run / "checkpoint.pt").read_bytes() == before
