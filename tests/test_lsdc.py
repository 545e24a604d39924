"""lsdc.py: pairs, mixed samples and losses against plain loops, networks, options, whole runs."""

import ast
import csv
import functools
import itertools
import math
import re
from collections import Counter
from types import SimpleNamespace

import common
import lsdc
from lsdc import RECIPES, Network, PaddedView, first_stages, options

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, assert_same, epochs, one_error, plain, plain_nmi, two_at_once, write_images
from scipy.optimize import linear_sum_assignment
from scipy.special import betainc
from torch import nn

SCRIPT = ROOT / "lsdc.py"
PLAIN = "--image-size 16 --freeze-stages 1 --epochs 1 --out run"  # without RotNet
QUICK = f"{PLAIN} --epochs 3 --lr-steps 2 --score-every 2 --ramp-up 2 --pretrain rotnet --pretrain-epochs 2"
QUICK += " --pretrain-lr-steps 1"
SMALL = "--recipe digits --image-size 16 --batch-size 8 --k 3 --epochs 2 --score-every 1 --workers 0"
SMALL += " --pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 8 --out run"
FEW = f"{SMALL} --num-neighbors 2"
LARGE = f"--data PLACES/large {FEW} --mix ricap --workers 2 --train-on both --freeze-bn --freeze-stages 1"
VECTORS = "--data PLACES/vectors.npz --k 10 --batch-size 64 --epochs 3 --out run"
trap = functools.partial(jobs.trap, "lsdc")
rng = np.random.default_rng
digits = functools.cache(lambda: common.load_data("digits"))


def normal(seed, *shape, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **more)


def shuffles(seed, parts, batch):
    return torch.from_numpy(np.stack([rng(seed + m).permutation(batch) for m in range(parts)]))


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------- the algorithm, pasted
# All tests of formulas call what the pasted text defines, and so show that it can be pasted.

CELL = re.search(r"^# %% the algorithm.*?(?=^# %% )", SCRIPT.read_text(), flags=re.MULTILINE | re.DOTALL)[0]
PASTED = {"math": math, "np": np, "torch": torch, "F": F}
exec(compile(CELL, "the algorithm", "exec"), PASTED)
cell = SimpleNamespace(**PASTED)
knn_pairs, draw_mixture, ricap, mixup = cell.knn_pairs, cell.draw_mixture, cell.ricap, cell.mixup
mixed_targets, pair_loss = cell.mixed_targets, cell.pair_loss


def test_the_algorithm_is_functions_of_tensors():
    code = ast.parse(CELL)
    taken = {a.arg for a in ast.walk(code) if isinstance(a, ast.arg)}
    assert not {"args", "loader", "data", "self"} & taken
    assert all(isinstance(f, ast.FunctionDef) and ast.get_docstring(f) for f in code.body)


def plain_knn(z, k):
    """i ~ j if j is among the k nearest others of i, or i among those of j; i ~ i."""
    ids = range(len(z))
    near = {i: sorted((j for j in ids if j != i), key=lambda j: math.dist(z[i], z[j]))[:k] for i in ids}
    return [[i == j or j in near[i] or i in near[j] for j in ids] for i in ids]


def plain_cosines(z):
    unit = [[x / math.sqrt(dot(v, v)) for x in v] for v in z]
    return [[dot(a, b) for b in unit] for a in unit]


def plain_sne(z, temperature):
    """(P_ij + P_ji) / 2 with P_ij = exp(-d_ij / temp^2) / sum over k != i of exp(-d_ik / temp^2); 0 for i = j."""
    ids = range(len(z))
    e = [[math.exp(-((math.dist(z[i], z[j]) / temperature) ** 2)) for j in ids] for i in ids]
    p = [[e[i][j] / sum(e[i][k] for k in ids if k != i) for j in ids] for i in ids]
    return [[0.0 if i == j else (p[i][j] + p[j][i]) / 2 for j in ids] for i in ids]


def above(values, threshold, margin=1e-5):
    """Which of (B, B) numbers reach the threshold, the diagonal always; none may be too close to call."""
    ids = range(len(values))
    assert all(abs(values[i][j] - threshold) > margin for i in ids for j in ids if i != j)
    return [[i == j or values[i][j] > threshold for j in ids] for i in ids]


def test_pairs_against_loops():
    """kNN with every number of neighbors from 1 to all others; each labeling reads its own numbers alone."""
    for n, d in [(2, 1), (5, 3), (12, 8), (17, 2)]:
        z = normal(n, n, d)
        for k in range(1, n):
            assert cell.pairwise_pseudo_labels(z, "knn", k, 9, 9, 0).tolist() == plain_knn(z.tolist(), k)
    z = torch.tensor([[7.0, 0], [2, 0], [3, 4], [0, 1]])  # a cosine at the threshold counts
    assert [cell.cosine_pairs(z, t)[0].sum().item() for t in (1.0, 0.599, 0.0)] == [2, 3, 4]
    z = normal(1, 14, 3) * normal(2, 14, 1).exp()  # of all lengths
    for threshold in (-0.6, 0.0, 0.5, 0.9):
        found = cell.pairwise_pseudo_labels(z, "cosine", 0, threshold, 9, 0)
        assert found.tolist() == above(plain_cosines(z.tolist()), threshold) and 0 < found.float().mean() < 1
    z = normal(3, 15, 4)
    for threshold, temperature in itertools.product((0.01, 0.07, 0.3), (0.5, 1.0, 3.0)):
        want = above(plain_sne(z.tolist(), temperature), threshold)
        assert cell.pairwise_pseudo_labels(z, "sne", 0, 9, threshold, temperature).tolist() == want


@pytest.mark.parametrize("labeling", ["knn", "cosine", "sne"])
def test_pairs_are_symmetric_with_oneself_and_in_any_order(labeling):
    """Bool (B, B), S = S^T, true on the diagonal; images in another order, the same pairs. Copies and zeros, too."""

    def pairs(z):
        positive = cell.pairwise_pseudo_labels(z, labeling, 3, 0.6, 0.05, 1.0)
        assert torch.equal(positive, positive.T) and positive.diagonal().all()
        return positive

    z, order = normal(4, 30, 5), torch.randperm(30, generator=torch.Generator().manual_seed(5))
    assert torch.equal(pairs(z[order]), pairs(z)[order][:, order]) and 40 < pairs(z).sum() < 900
    alike, empty = pairs(torch.full((8, 4), 0.3)), pairs(torch.zeros(8, 4))
    if labeling == "knn":
        assert (alike.sum(1) >= 1 + 3).all() and (empty.sum(1) >= 1 + 3).all()
    else:  # zeros have a place, but no direction
        assert alike.all() and torch.equal(empty, alike if labeling == "sne" else torch.eye(8) > 0)


def test_distances_are_precise_far_from_the_origin():
    """Squared norms of 1e10 would swallow distances of 1 if they were subtracted from each other as they are."""
    z = normal(8, 20, 50) - 30000.0
    want, got = torch.cdist(z.double(), z.double()).square(), cell.squared_distances(z)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    assert (got >= 0).all() and knn_pairs(z, 4).tolist() == plain_knn(z.tolist(), 4)


@pytest.mark.parametrize("cut", [(3, 5), (6, 7), (8, 8), (0, 0), (0, 5), (3, 8), (4, 4)])  # in 8 pixels
def test_ricap_pixel_by_pixel(cut):
    """Pixel (y, x) of sample r: of the patch it lies in, at its corner's place in the image chosen for it."""
    size, batch, (h, w) = 8, 6, cut
    images, permutations = normal(1, batch, 2, size, size), shuffles(2, 4, batch)
    got = ricap(images, permutations, cut, corners := rng(3).random((4, 2)))
    for r, y, x in itertools.product(range(batch), range(size), range(size)):
        m = 2 * (y >= h) + (x >= w)
        high, wide = (h, size - h)[y >= h], (w, size - w)[x >= w]
        top, left = (math.floor(c * (size - n + 1)) for c, n in zip(corners[m], (high, wide), strict=True))
        source = images[permutations[m, r], :, top + y - h * (y >= h), left + x - w * (x >= w)]
        assert torch.equal(got[r, :, y, x], source)


def test_draws_of_mixtures():
    """RICAP: permutations, the own image in patches of more than a quarter, areas are the weights. MixUp: the own
    image and another, weights that sum to 1. None: the image itself in full."""
    generator, small, own = rng(0), Counter(), list(range(40))
    for _ in range(200):
        permutations, weights, (h, w) = draw_mixture("ricap", 40, 32, generator)
        permutations, areas = permutations.tolist(), [h * w, h * (32 - w), (32 - h) * w, (32 - h) * (32 - w)]
        assert weights.tolist() == pytest.approx([a / 1024 for a in areas]) and weights.dtype == torch.float32
        assert all(sorted(p) == own for p in permutations) and 0 <= min(h, w) <= max(h, w) <= 32
        assert [p == own for p in permutations] == [a > 256 for a in areas]
        small[len({tuple(p) for p in permutations if p != own})] += 1
    assert len(small) > 1 and max(small) <= 3
    permutations, weights, _ = draw_mixture("mixup", 40, 8, rng(2))
    assert permutations[0].tolist() == own == sorted(permutations[1].tolist()) != permutations[1].tolist()
    assert weights.shape == (2,) and weights.sum() == 1
    permutations, weights, _ = draw_mixture("none", 40, 8, rng(2))
    assert permutations.tolist() == [own] and weights.tolist() == [1.0]


def test_draws_are_beta_distributed():
    """Beta(0.3, 0.3): mean 1/2, variance 0.09 / (0.36 * 1.6), and its distribution function; h and w independent."""
    generator, n = rng(1), 3000
    cuts = np.array([draw_mixture("ricap", 2, 1000, generator)[2] for _ in range(n)]) / 1000
    weights = np.array([draw_mixture("mixup", 2, 8, generator)[1][0] for _ in range(n)])
    for x in (cuts[:, 0], cuts[:, 1], weights):
        assert abs(x.mean() - 0.5) < 0.03 and abs(x.var() - 0.15625) < 0.01
        for at in (0.05, 0.25, 0.6, 0.9):
            assert abs((x < at).mean() - betainc(0.3, 0.3, at)) < 0.03
    assert abs(np.corrcoef(cuts.T)[0, 1]) < 0.07


def test_mixup_and_targets_against_loops_and_not_transposed():
    """sum over m of W_m x[pi_m(r)], and T[r, c] = sum of W_m S[pi_m(r), c]; some columns give some samples."""
    permutations, weights = shuffles(6, 4, 9), torch.tensor([0.4, 0.3, 0.2, 0.1])
    images, positive = normal(3, 9, 3, 5, 5), knn_pairs(normal(5, 9, 3), 2)

    def plain(x):
        return [sum(w * x[p[r]] for w, p in zip(weights, permutations, strict=True)) for r in range(9)]

    torch.testing.assert_close(mixup(images, permutations, weights), torch.stack(plain(images)))
    got, want = mixed_targets(positive, permutations, weights), torch.stack(plain(positive.float()))
    torch.testing.assert_close(got, want)
    assert (got - want.T).abs().max() > 0.2 and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(mixed_targets(positive, permutations[:, 4:7], weights), want[4:7])


def plain_pairs(mixed, clean, target):
    total = 0.0
    for r, c in itertools.product(range(len(mixed)), range(len(clean))):
        t, p = target[r][c], dot(mixed[r], clean[c])
        total -= t * math.log(p + 1e-7) + (1 - t) * math.log(1 - p + 1e-7)
    return total / len(mixed) / len(clean)


def test_pair_loss_and_gradients_against_loops():
    """Every pair of b mixed samples and B images, and central differences."""
    mixed, clean, target = (normal(n, n, d, dtype=torch.float64) for n, d in ((4, 3), (7, 3), (4, 7)))
    mixed, clean, target = (
        mixed.softmax(1).requires_grad_(),
        clean.softmax(1).requires_grad_(),
        target.sigmoid(),
    )
    want = plain_pairs(mixed.tolist(), clean.tolist(), target.tolist())
    assert pair_loss(mixed, clean, target).item() == pytest.approx(want, abs=1e-12)
    assert torch.autograd.gradcheck(lambda a, b: pair_loss(a, b, target), (mixed, clean))
    with pytest.raises(AssertionError):
        pair_loss(mixed, clean, target.T)


def test_the_loss_of_one_pair_by_hand():
    """-log of the probability of what is true, which is never below 1e-7; finite where a product rounds above 1."""
    for target, same, want in [(1, 0, 1e-7), (0, 1, 1e-7), (1, 1, 1), (0, 0, 1), (0.5, 0.5, 0.5)]:
        mixed, clean = torch.tensor([[1.0, 0.0]]), torch.tensor([[float(same), 1.0 - same]])
        loss = pair_loss(mixed, clean, torch.tensor([[float(target)]]))
        assert loss.item() == pytest.approx(-math.log(want), abs=1e-6)
    p = torch.tensor([[1.0000001]], requires_grad=True)
    assert (p @ p.T).item() > 1 + 1.5e-7
    for target in (0.0, 0.3, 1.0):
        loss = pair_loss(p, p.detach(), torch.tensor([[target]]))
        (gradient,) = torch.autograd.grad(loss, p)
        assert loss.item() == pytest.approx(-(1 - target) * math.log(1e-7), abs=1e-4)
        assert gradient.isfinite()


def test_the_ramp_and_the_rotations():
    """exp(-5) at first, exp(-1.25) in the middle, 1 from T on; all images unturned, then all by one quarter, .."""
    got = [cell.ramp(*x) for x in ((0, 100), (50, 100), (100, 100), (10**6, 100), (0, 0), (7, 0))]
    assert got == pytest.approx([math.exp(-5), math.exp(-1.25), 1, 1, 1, 1])
    turned, quarters = cell.rotate4(images := normal(4, 3, 2, 5, 5))
    want = np.concatenate([np.rot90(images.numpy(), q, axes=(2, 3)) for q in range(4)])
    assert np.array_equal(turned.numpy(), want)
    assert quarters.tolist() == [q for q in range(4) for _ in range(3)] and quarters.dtype == torch.int64


class Given(nn.Module):
    """A network whose probabilities are parameters; keeps the views it is given."""

    def __init__(self, z, logits):
        super().__init__()
        self.z, self.logits = z, nn.Parameter(logits)

    def forward(self, views):
        self.views = views
        return self.z, self.logits.softmax(-1)


@pytest.mark.parametrize("kind", ["ricap", "mixup", "none"])
def test_the_whole_loss_of_a_batch(kind):
    """Pairs of the first mixed sample and the clean crop, w(t) times the squared difference, and what is logged."""
    n, k, args = 12, 4, SimpleNamespace(mix=kind, batch_size=12, image_size=8, labeling="knn", k=4, amp=False)
    args.num_neighbors, args.cosine_threshold, args.sne_threshold, args.sne_temperature = 3, 1.0, 1.0, 1.0
    net, views = Given(normal(7, n, 6), normal(8, 3, n, k)), [normal(9 + v, n, 1, 8, 8) for v in range(3)]
    labels, index = torch.arange(20) % 3, torch.arange(n) + 5

    def step(labels):
        optimizer, meter = torch.optim.SGD(net.parameters(), 0.0), common.Meter("", n)
        return lsdc.train(net, optimizer, [(index, views)], labels, 3.5, rng(3), meter, args)

    record, (permutations, weights, cut) = step(labels), draw_mixture(kind, n, 8, generator := rng(3))
    assert torch.equal(net.views[0], views[0])
    for view, mixed, at in zip(views[1:], net.views[1:], generator.random((2, 4, 2)), strict=True):
        want = ricap(view, permutations, cut, at) if kind == "ricap" else mixup(view, permutations, weights)
        assert torch.equal(mixed, want)
    s, p = plain_knn(net.z.tolist(), 3), net.logits.softmax(-1).tolist()
    parts = list(zip(weights.tolist(), permutations.tolist(), strict=True))
    target = [[sum(w * s[q[r]][c] for w, q in parts) for c in range(n)] for r in range(n)]
    pairs = plain_pairs(p[1], p[0], target)
    square = sum((p[1][i][c] - p[2][i][c]) ** 2 for i in range(n) for c in range(k)) / (n * k)
    couples = [(i, j) for i in range(n) for j in range(n) if i != j and s[i][j]]
    right, even = sum(bool(labels[index[i]] == labels[index[j]]) for i, j in couples), [[1 / k] * k] * n
    want = {"loss": pairs + 3.5 * square, "loss_pairs": pairs, "loss_consistency": square}
    want |= {"positive": len(couples) / (n * n - n), "purity": right / len(couples)}
    assert record == pytest.approx(want | {"uniform": plain_pairs(even, even, s)}, rel=1e-5)
    assert 0 < right < len(couples) and all(g.abs().max() > 1e-4 for g in net.logits.grad)  # all three learn
    assert "purity" not in step(labels - 1)  # some labels are unknown


SEVERAL = """
import numpy as np, torch, common, lsdc
from types import SimpleNamespace
common.setup("cpu")
(rank, world), given, found = common.rank_and_world(), torch.load("given.pt"), []
mine = lambda x: x[rank * len(x) // world : (rank + 1) * len(x) // world]
batches = [(mine(i), [mine(x[i]) for x in given["views"]]) for i in torch.arange(60).split(20)]
for kind in ("ricap", "mixup", "none", "rotnet"):
    args = SimpleNamespace(mix=kind, batch_size=20, image_size=8, labeling="knn", num_neighbors=4, k=4, amp=False,
                           cosine_threshold=1, sne_threshold=1, sne_temperature=1)
    backbone = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 7))
    backbone.dim = 7
    net = lsdc.Network(backbone, 4, 1)
    net = torch.nn.Sequential(net.features, net.classifier) if kind == "rotnet" else net
    for w, x in zip(net.parameters(), given["weights"], strict=True):
        w.data.copy_(x)
    rest = torch.optim.SGD(net.parameters(), 0.2, 0.9), [(i, x[:1]) for i, x in batches], common.Meter("", 1), args
    if kind == "rotnet":
        record = lsdc.train_rotnet(common.parallel(net), *rest)
    else:
        more = given["labels"], 2.0, np.random.default_rng(1)
        record = lsdc.train(common.parallel(net), rest[0], batches, *more, *rest[2:])
    found.append((record, list(net.state_dict().values())))
torch.save(found, f"found.{world}.{rank}")
"""


def test_two_processes_take_the_steps_of_one(launch):
    """Three steps of clustering with each mixture, and of RotNet: weights and records, to 1e-5."""
    given = {"views": [normal(v, 60, 1, 8, 8) for v in range(3)], "labels": torch.arange(60) % 4}
    given["weights"] = [normal(9, 7, 64) / 8, normal(10, 7), normal(11, 4, 7), normal(12, 4)]
    torch.save(given, launch.path / "given.pt")
    for world in (1, 2):
        assert launch(SEVERAL, world).codes == [0] * world
    one, *two = (torch.load(launch.path / f"found.{name}") for name in ("1.0", "2.0", "2.1"))
    for found in two:
        for (record, weights), (want, expected) in zip(found, one, strict=True):
            assert record == pytest.approx(want, rel=1e-5)
            torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-5)
    assert all((w - g).abs().max() > 1e-3 for w, g in zip(one[0][1], given["weights"], strict=True))


def make(argv, channels=3):
    args, kind = options(argv.split()), {"dropout": 0.0, "pool": True, "norm": True, "pool_shortcuts": True}
    return lsdc.make_mlp(channels) if args.arch == "mlp" else common.make_backbone(args, channels, **kind)


@pytest.mark.parametrize("layers,widths", [(1, [(84, 7)]), (2, [(84, 84), (84, 7)])])
def test_the_network_gives_features_of_the_first_view_and_probabilities_of_all(layers, widths):
    """relu of the backbone without gradient; softmax of the classifier; each view with its own batch norm."""
    net = Network(make("--data digits --image-size 16", 1), 7, layers).train()
    assert [(m.in_features, m.out_features) for m in net.classifier if isinstance(m, nn.Linear)] == widths
    views = [normal(v, 6, 1, 16, 16) * (1 + v) for v in range(3)]
    z, p = net(views)
    assert z.dtype == p.dtype == torch.float32 and not z.requires_grad and p.requires_grad
    torch.testing.assert_close(z, F.relu(net.features[0](views[0])))
    for v in range(3):
        alone = net.classifier(F.relu(net.features[0](views[v])))
        torch.testing.assert_close(p[v], alone.exp() / alone.exp().sum(1, keepdim=True))


STAGES = {  # arch: (side in pixels, weights of convolutions, linear and batch-norm layers before each stage's end)
    "lenet5": (16, [4, 8]),
    "vgg16": (32, [8, 16, 28, 40, 52]),
    "resnet18": (16, [3 + 4 * 3, 3 + 8 * 3, 3 + 12 * 3, 3 + 16 * 3]),  # no weights in shortcuts
    "mlp": (1, [4, 8, 12]),
}


@pytest.mark.parametrize("arch", STAGES)
def test_first_stages_are_the_first_weights(arch, capsys):
    """In order, up to the end of the stage; none for 0; more than there are is refused."""
    side, counts = STAGES[arch]
    backbone = make(f"--data x{'.npz' * (arch == 'mlp')} --arch {arch} --image-size {side}")
    if arch == "mlp":
        shapes = [tuple(m.weight.shape) for m in backbone.net if isinstance(m, nn.Linear)]
        assert shapes == [(500, 3), (500, 500), (2000, 500)]
        assert backbone(normal(0, 3, 3, 1, 1)).shape == (3, 2000)
    every = list(backbone.net.parameters())
    for stages, count in enumerate([0, *counts]):
        found = [w for layer in first_stages(backbone.net, stages) for w in layer.parameters()]
        assert len(found) == count and all(a is b for a, b in zip(found, every, strict=False))
    with pytest.raises(SystemExit):
        first_stages(backbone.net, len(counts) + 1)
    assert f"has {len(counts)}" in capsys.readouterr().err


def test_shortcuts_without_weights(tmp_path):
    """Means of what there is of 2 x 2 pixels beside maps of zeros; the file gives the network back."""
    torch.manual_seed(0)
    net, x = make("--data cifar10 --image-size 17").eval(), normal(2, 2, 64, 5, 5)
    want, names = torch.zeros(2, 128, 3, 3), list(net.state_dict())
    for row, column in itertools.product(range(3), range(3)):
        want[:, :64, row, column] = x[:, :, 2 * row :, 2 * column :][:, :, :2, :2].mean((2, 3))
    torch.testing.assert_close(net.net.layer2[0].downsample(x), want)
    assert not [name for name in names if "downsample" in name]
    assert [make(f"--data cifar10 --image-size {s}").net.conv1.kernel_size[0] for s in (96, 97)] == [3, 7]
    images, saved = normal(3, 2, 3, 17, 17), {"state_dict": net.net.state_dict(), "meta": net.meta}
    torch.save(saved, tmp_path / "backbone.pt")
    with torch.no_grad():
        assert torch.equal(common.load_backbone(tmp_path)[0](images), net(images))
    del saved["meta"]["pool_shortcuts"]  # an older file, whose shortcuts had weights
    torch.save(saved, tmp_path / "backbone.pt")
    with pytest.raises(SystemExit):
        common.load_backbone(tmp_path)


def test_padded_crops_are_windows_of_the_padded_image():
    """Everywhere equally often, half of them mirrored, black outside; of files, too."""
    pixels = torch.arange(1, 26, dtype=torch.uint8).view(1, 1, 5, 5).expand(4000, 3, -1, -1)
    view = PaddedView(5, center=1.0, flip=0.5, pad=2)
    torch.manual_seed(0)
    frame = F.pad(pixels[0, 0], [2] * 4)
    places = [frame[y : y + 5, x : x + 5] for y in range(5) for x in range(5)]
    windows = {tuple(x.flatten().tolist()) for p in places for x in (p, p.flip(1))}
    crops = (view.crop(pixels) * 255).round().long()
    assert crops.shape == (4000, 3, 5, 5) and torch.equal(crops[:, 0], crops[:, 2])
    seen = Counter(tuple(c.flatten().tolist()) for c in crops[:, 0])
    assert seen.keys() == windows and min(seen.values()) > 40 and max(seen.values()) < 130  # 80 on average
    image = lsdc.v2.functional.to_pil_image(pixels[0])
    for _ in range(20):
        assert tuple(view.crop_file(image)[1].flatten().tolist()) in windows


def values(argv, names):
    args = options(argv.split())
    return [getattr(args, name) for name in names.split()]


TABLE = {  # data: supplementary, table 1, and k, which counts the image itself and, strictly, stops before it
    "cifar10": ("sgd", 220, [140, 180], 0.1, 5, 100, 20 - 2),
    "cifar100-20": ("sgd", 200, [170], 0.1, 25, 150, 10 - 2),
    "stl10": ("sgd", 200, [140, 180], 0.1, 5, 50, 18),
    "mnist": ("sgd", 15, [], 0.1, 5, 50, 10 - 2),
    "x.npz": ("adam", 75, [], 0.001, 0, 100, 5 - 2),
}


def test_recipes_are_the_papers():
    for data, want in TABLE.items():
        names = "optimizer epochs lr_steps lr consistency ramp_up num_neighbors batch_size momentum"
        assert values(f"--data {data}", names) == [*want, 256, 0.9], data
    names = "cosine_threshold sne_threshold sne_temperature labeling k"
    assert values("--data cifar10", names) == [0.9, 0.01, 1.0, "knn", 10]
    assert values("--data cifar100-20", names) == [0.95, 0.01, 0.5, "knn", 20]
    assert values("--data stl10", names)[1:] == [0.01, 0.5, "sne", 10]
    names = "arch freeze_stages mix wd pad flip image_size train_on classifier_layers freeze_bn"
    assert values("--data cifar10", names) == ["resnet18", 3, "ricap", 5e-4, 4, True, 32, "both", 1, False]
    names = "pretrain pretrain_epochs pretrain_lr pretrain_lr_steps pretrain_batch_size pretrain_wd"
    assert values("--data cifar10", names) == ["rotnet", 200, 0.1, [60, 120, 160], 128, 5e-4]


def test_defaults_follow_what_is_typed(tmp_path):
    """Decay the mixture, the rate Adam, RotNet --init, the folder the labeling; every recipe fits itself."""
    meta = {
        "arch": "resnet18",
        "image_size": 99,
        "sobel": False,
        "mean": [0.5],
        "std": [0.2],
        "method": "rotnet",
    }
    torch.save({"meta": meta}, tmp_path / "backbone.pt")
    for data in ("cifar10", "digits", "some/folder"):
        assert [values(f"--data {data} --mix {mix}", "wd") for mix in ("mixup", "ricap")] == [[1e-4], [5e-4]]
        assert values(f"--data {data} --mix mixup --wd 0.3 --optimizer adam", "wd lr") == [0.3, 1e-3]
    assert values(f"--data cifar10 --init {tmp_path}", "pretrain pretrain_epochs") == ["none", 0]
    assert values("--data digits --pretrain rotnet", "pretrain_epochs") == [3]
    assert values("--data my/photos/ --labeling cosine", "out pad") == ["runs/lsdc-photos-cosine", 12]
    assert values("--data a/reuters.npz", "out arch mix wd") == ["runs/lsdc-reuters", "mlp", "none", 0.0]
    assert values("--data x --recipe cifar100-20 --lr-steps", "k lr_steps") == [20, []]
    for data in [*RECIPES.keys() - {"reuters"}, "x.npz", "some/folder"]:
        args = options(["--data", data])
        assert 1 <= args.num_neighbors < args.batch_size / args.k


REFUSED = {  # arguments: words of the message
    "--data x.npz --consistency 5": ["--consistency", "vector"],
    "--data x.npz --mix ricap": ["--mix ricap"],
    "--data x.npz --arch lenet5": ["--arch lenet5", "mlp"],
    "--data digits --num-neighbors 256": ["--num-neighbors 256", "255"],
    "--data digits --cosine-threshold 0.5": ["--cosine-threshold", "--labeling cosine"],
    "--data digits --labeling sne --num-neighbors 5": ["--num-neighbors", "--labeling knn"],
    "--data digits --labeling cosine --sne-temperature 1": ["--sne-temperature", "--labeling sne"],
    "--data digits --pretrain-epochs 5": ["--pretrain-epochs", "--pretrain rotnet"],
    "--data cifar10 --pretrain none --pretrain-wd 0": ["--pretrain-wd", "--pretrain rotnet"],
    "--data cifar10 --crop-area 0.5": ["--crop-area", "--pad 0"],
}


@pytest.mark.parametrize("argv", REFUSED)
def test_what_would_be_ignored_or_is_impossible_is_refused(argv, capsys):
    with pytest.raises(SystemExit, match="2"):
        options(argv.split())
    line = capsys.readouterr().err.splitlines()[-1]
    assert ": error: " in line and not [word for word in REFUSED[argv] if word not in line], line


# --------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def odd(places):
    """The folder `places`, and more in it: names that no font knows, vectors, files that are no vectors."""
    root = places
    for i, name in enumerate(("猫", "a$b^{")):
        for part in ("train", "val"):  # too large to be decoded once
            shade = np.full((100, 110, 3), 90 * i, np.uint8)
            write_images(root / "large" / part / name, 12, lambda k, shade=shade: shade + np.uint8(9 * k))
    y = np.arange(300) % 10
    x = normal(0, 300, 8).numpy() + 3 * normal(1, 10, 8).numpy()[y]
    np.savez(root / "vectors.npz", features=x, labels=y)
    np.savez(root / "nan.npz", features=np.where(np.arange(8) == 3, np.nan, x))
    np.savez(root / "images.npz", features=x[:40].reshape(40, 4, 2))
    np.savez(root / "few.npz", features=x, labels=y[:-1])
    np.savez(root / "objects.npz", features=np.array([[{}]] * 300))
    (root / "text.npz").write_text("not a zip")
    return root


@pytest.fixture(scope="module")
def whole(run, odd):
    return run(QUICK, plain(SCRIPT))


def features(path, data, refill=False):
    """Of center crops, as a backbone.pt tells to make them; refill: with the batch norm of 256 training images."""
    backbone, meta = common.load_backbone(path)
    assert meta["arch"] == "lenet5" and meta["center_fraction"] == 1.0 and meta["pool"]
    loaders = [common.Loader(x, 100, 16, 1.0, torch.device("cpu"), 0) for x in (digits()[0], data)]
    train, images = (torch.cat([x for _, x in it.test(torch.arange(len(it.data)))]) for it in loaders)
    for m in backbone.modules():
        m.momentum = 1.0
    with torch.no_grad():
        backbone.train(refill)(train[:256])
        return backbone.eval()(images).relu()


def test_log_and_files_of_a_run(whole):
    _, *records, last = whole.log()
    assert [(r["phase"], r["epoch"]) for r in records[1:4]] == [("rotnet", 2), ("lsdc", 1), ("lsdc", 2)]
    assert [r["lr"] for r in records] == pytest.approx([0.1, 0.02, 0.1, 0.1, 0.01])
    for r in records[:2]:
        assert r["uniform"] == pytest.approx(math.log(4)) and 0.25 < r["rotation_accuracy"] < 1
    for r, w in zip(records[2:], (math.exp(-5), math.exp(-1.25), 1), strict=True):
        assert r["loss"] == pytest.approx(r["loss_pairs"] + 5 * w * r["loss_consistency"], rel=1e-5)
        assert 10 / 255 <= r["positive"] <= 20 / 255 and 0 < r["purity"] <= 1
    assert ["scores" in r for r in records] == [False, False, False, True, True]
    assert ["nmi_previous" in r for r in records] == [False, False, False, False, True]
    assert last["result"]["scores"] == records[-1]["scores"]  # the same network, looked at twice
    assert set(last["result"]["baselines"]) == {"random network", "pixels", "RotNet"}
    assert (whole.run / "clusters.png").exists()
    line = whole.out.split("\ntest images in 10 clusters, ")[1].splitlines()[1]
    assert all(name in line for name in ("LSD-C", *last["result"]["baselines"]))


def test_the_result_is_what_backbone_and_classifier_say_about_center_crops(whole):
    """assignments.csv, sizes, scores, confident images, confusion matrix."""
    (train, test), result = digits(), whole.log()[-1]["result"]
    z = torch.cat([features(whole.run, x) for x in (train, test)])
    layer = whole.state("clustering.pt")["classifier"]
    top, assign = F.linear(z, layer["0.weight"], layer["0.bias"]).softmax(1).max(1)
    with open(whole.run / "assignments.csv", newline="") as file:
        images, clusters = zip(*list(csv.reader(file))[1:], strict=True)
    clusters, labels = [int(c) for c in clusters], [*train.labels.tolist(), *test.labels.tolist()]
    assert list(images) == [str(i) for i in range(1797)]
    assert sum(map(int.__ne__, clusters, assign.tolist())) <= 1  # one may lie between two
    sizes = sorted(Counter(clusters).values())
    assert [result[n] for n in ("clusters", "smallest", "largest")] == [len(sizes), sizes[0], sizes[-1]]
    for name, part in {"train": slice(0, 1437), "test": slice(1437, None), "both": slice(0, None)}.items():
        truth, here, sure = labels[part], clusters[part], (top[part] > 0.9).tolist()
        pairs = Counter(zip(truth, here, strict=True))
        table = np.array([[pairs[t, c] for c in range(10)] for t in range(10)])
        rows, columns = linear_sum_assignment(-table)
        want = {"nmi_labels": plain_nmi(truth, here), "acc_labels": table[rows, columns].sum() / len(truth)}
        assert {k: result["scores"][name][k] for k in want} == pytest.approx(want)
        found, class_of = result["confident"][name], dict(zip(columns, rows, strict=True))
        assert found["share"] == pytest.approx(np.mean(sure), abs=1.5 / len(sure))
        right = [class_of[c] == t for c, t, s in zip(here, truth, sure, strict=True) if s]
        assert not right or found["accuracy"] == pytest.approx(np.mean(right), abs=1.5 / len(right))
    assert result["confusion"] == table.tolist()
    after, before = whole.state("backbone.pt"), whole.state("rotnet.pt")
    assert (after["meta"].pop("method"), before["meta"].pop("method")) == ("lsdc", "rotnet")
    assert after["meta"] == before["meta"]  # frozen weights stay in every bit, their statistics do not
    same = {k for k, v in after["state_dict"].items() if torch.equal(v, before["state_dict"][k])}
    assert same == {f"features.{i}.{w}" for i in (0, 1) for w in ("weight", "bias")}


def test_baselines_are_k_means_with_the_centroids_of_the_training_images(run, whole):
    """Of the network after RotNet, and of that of the start, its batch norm filled."""
    still = run(PLAIN + " --lr 0")  # the weights stay as they were drawn
    given = (whole, "RotNet", "rotnet.pt", False), (still, "random network", "backbone.pt", True)
    for job, name, file, refill in given:
        z = [features(job.run / file, x, refill).double() for x in digits()]
        centroids = common.kmeans(z[0].float(), 10, common.generator(0, "baselines"))[2].double()
        for part, data, x in zip(("train", "test"), digits(), z, strict=True):
            want = plain_nmi(data.labels.tolist(), torch.cdist(x, centroids).argmin(1).tolist())
            shown = job.log()[-1]["result"]["baselines"][name][part]["nmi_labels"]
            assert shown == pytest.approx(want, abs=0.01)


@pytest.mark.parametrize(
    ("place", "saved"),  # where the kill comes, epochs that checkpoint.pt holds by then
    [
        (("torch", "save", 5, False, True), 2),  # while rotnet.pt is written
        (("lsdc", "kmeans", 3), 2),  # while RotNet's features are clustered
        (("lsdc", "pair_loss", 7), 3),
    ],
)
def test_a_run_killed_between_its_phases_or_in_the_second_goes_on(run, whole, place, saved):
    killed = run(QUICK, jobs.trap("lsdc", *place), ok=False)
    assert killed.code == -9 and killed.state()["epoch"] == saved, killed.out + killed.err
    assert_same(run(QUICK, folder=killed.folder), whole)


@pytest.mark.parametrize(
    "arguments",
    [f"{VECTORS} --score-every 1 --labeling sne --classifier-layers 2", LARGE],  # Adam; frozen batch norm
)
def test_other_kinds_of_runs_survive_a_kill(run, odd, arguments):
    reference = run(arguments)
    killed = run(arguments, jobs.trap("lsdc", "lsdc", "pair_loss", 2, late=True), ok=False)
    assert killed.code == -9 and 1 <= killed.state()["epoch"] < reference.state()["epoch"]
    assert_same(run(arguments, folder=killed.folder), reference)


def test_clustering_starts_from_a_given_network(run, whole):
    """From another run's rotnet.pt: its k-means, no RotNet; the random network beside it."""
    job = run(f"{PLAIN} --init {whole.run}/rotnet.pt")
    *records, last = job.log()
    found, want = last["result"]["baselines"], whole.log()[-1]["result"]["baselines"]["RotNet"]
    assert found["rotnet initialization"] == want and "random network" in found
    assert [r["phase"] for r in epochs(records)] == ["lsdc"] and not (job.run / "rotnet.pt").exists()


ODD = {  # arguments: parts with labels
    f"--data PLACES/same {SMALL} --labeling cosine --mix ricap": "",
    f"--data PLACES/same {SMALL} --labeling sne --sne-threshold 1 --consistency 0 --ramp-up 0": "",
    f"--data PLACES/same {SMALL} --k 1 --num-neighbors 7 --mix none --pad 0 --crop-area 0.5": "",
    f"--data PLACES/same {FEW} --arch resnet18 --image-size 8 --freeze-stages 4 --k 24": "",
    f"{LARGE} --k 4": "train test both",
    f"{VECTORS} --mix mixup --freeze-stages 3": "train",
}


def test_odd_data_runs_and_every_number_is_finite(run, odd):
    """Scores of parts with labels, an assignment for each image, names of classes that no font knows."""
    jobs_of = two_at_once({a: lambda a=a: run(a, plain(SCRIPT) if ODD[a] else None) for a in ODD})
    for arguments, job in jobs_of.items():
        first, *records, last = job.log()  # the log refuses NaN
        assert set(last["result"]["scores"]) == set(ODD[arguments].split()), arguments
        assert ("purity" in records[-1]) == ("train" in ODD[arguments]), arguments
        assert all(v.isfinite().all() for v in job.state()["net"].values())
        with open(job.run / "assignments.csv", newline="", encoding="utf-8") as file:
            assert len(list(csv.reader(file))) == first["images"] + 1
        assert (job.run / "confusion.png").exists() == bool(ODD[arguments])
        assert (job.run / "clusters.png").exists() == ("large" in arguments)
        positive = {"--sne-threshold 1": 0, "--k 1 ": 1}  # nobody and everybody
        assert all(records[-1]["positive"] == want for word, want in positive.items() if word in arguments)
        assert job.err == "", job.err
    assert "vectors" in one_error(
        run("--assign PLACES/large --out run", folder=job.folder, ok=False)
    )  # of vectors
    data, _ = lsdc.load(f"{odd}/vectors.npz", "data", None)  # vectors come as they are
    ((_, x),) = common.Loader(data, 300, 1, 1.0, torch.device("cpu"), 0).test(torch.arange(300))
    torch.testing.assert_close(x[:, :, 0, 0].numpy(), np.load(odd / "vectors.npz")["features"])


def test_digits_are_learnt(run):
    flags = "--image-size 16 --epochs 40 --score-every 40 --mix none"
    flags += " --batch-size 128 --num-neighbors 5 --wd 0.0005 --lr-steps 28 36 --ramp-up 15 --out run"
    job = run(flags)
    first, *records, last = job.log()
    reached, random = last["result"]["scores"]["test"], last["result"]["baselines"]["random network"]["test"]
    assert reached["acc_labels"] > max(0.72, random["acc_labels"] + 0.15)
    assert records[-1]["purity"] > records[0]["purity"] + 0.1
    assert records[-1]["loss_pairs"] < records[0]["loss_pairs"] < 1.05 * records[0]["uniform"]
    assert "WARNING" not in job.out


MISTAKES = {  # arguments: words of the message
    "--init PLACES/text.npz": ["text.npz", "backbone.pt"],
    f"{VECTORS} --batch-size 301": ["300", "--batch-size"],
    "--data PLACES/nowhere.npz": ["nowhere.npz"],
    "--data PLACES/nan.npz": ["nan.npz", "NaN"],
    "--data PLACES/images.npz": ["images.npz", "(N, D)"],
    "--data PLACES/few.npz": ["few.npz", "(299,)", "300"],
    "--data PLACES/objects.npz": ["objects.npz"],
    "--data PLACES/text.npz": ["text.npz"],
}


def test_mistakes_end_with_exit_code_2_and_one_line(run, odd, whole):
    found = two_at_once({a: lambda a=a: run(a, ok=False) for a in MISTAKES})
    for arguments, job in found.items():
        assert not [word for word in MISTAKES[arguments] if word not in one_error(job)], job.err
    for more, words in ("--image-size 20", "lenet5 at 20 pixels"), ("--pretrain rotnet", "--init takes"):
        wrong = f"{more} --out other --init {whole.run}/rotnet.pt"
        assert words in one_error(run(wrong, folder=whole.folder, ok=False))
