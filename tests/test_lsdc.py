"""lsdc.py: pair labels, mixtures, losses and scores against plain loops from the formulas; options and recipes."""

import itertools
import math
from collections import Counter
from types import SimpleNamespace

import legacy
import lsdc
from legacy import (
    Images,
    Loader,
    PoolShortcut,
    backbone,
    learning_rate,
    load_backbone,
    rebuild,
    save_backbone,
)
from lsdc import (
    Network,
    Perceptron,
    RotNet,
    Vectors,
    clustering_losses,
    confident,
    confusion,
    cosine_pairs,
    draw_mixture,
    four_turns,
    frozen,
    joined,
    knn_pairs,
    load_vectors,
    matched,
    mix,
    mixed_targets,
    mixup,
    options,
    pair_loss,
    patches,
    ramp,
    ricap,
    rotation_losses,
    scores,
    similar_pairs,
    sne_pairs,
    splits_of,
    squared_distances,
)

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, refusal
from scipy.special import betainc
from torch import nn

SCRIPT = ROOT / "lsdc.py"
CPU = torch.device("cpu")


def random(seed, *shape, **more):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), **more)


def uniform(seed, *shape, **more):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed), **more)


def dot(a, b):
    return sum(x * y for x, y in zip(a, b, strict=True))


# --------------------------------------------------------------------------- who is similar, in plain loops
# Pair by pair in double precision; each returns also how far the decision is from the other one.


def plain_distance(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def plain_knn(z, k):
    """i ~ j if j is among the k nearest others of i, or i among those of j; i ~ i."""
    ids = range(len(z))
    near = {i: sorted((j for j in ids if j != i), key=lambda j: plain_distance(z[i], z[j]))[:k] for i in ids}
    return [[i == j or j in near[i] or i in near[j] for j in ids] for i in ids]


def plain_cosines(z):
    lengths = [math.sqrt(dot(v, v)) for v in z]
    return [
        [dot(a, b) / (p * q) for b, q in zip(z, lengths, strict=True)]
        for a, p in zip(z, lengths, strict=True)
    ]


def plain_sne(z, temperature):
    """(P_ij + P_ji) / 2 with P_ij = exp(-d_ij / temp^2) / sum over k != i of exp(-d_ik / temp^2); 0 for i = j."""
    ids = range(len(z))
    e = [[math.exp(-plain_distance(z[i], z[j]) / temperature**2) for j in ids] for i in ids]
    p = [[e[i][j] / sum(e[i][k] for k in ids if k != i) for j in ids] for i in ids]
    return [[0.0 if i == j else (p[i][j] + p[j][i]) / 2 for j in ids] for i in ids]


def above(values, threshold, margin=1e-5):
    """Which of (B, B) numbers reach the threshold, the diagonal always; none may be too close to call."""
    ids = range(len(values))
    assert all(abs(values[i][j] - threshold) > margin for i in ids for j in ids if i != j)
    return [[i == j or values[i][j] > threshold for j in ids] for i in ids]


@pytest.mark.parametrize("n,d", [(2, 1), (5, 3), (12, 8), (17, 2)])
def test_knn_pairs_against_loops(n, d):
    """Every number of neighbours from 1 to all others."""
    z = random(n, n, d)
    for k in range(1, n):
        assert knn_pairs(z, k).tolist() == plain_knn(z.tolist(), k)


@pytest.mark.parametrize("threshold", [-0.6, 0.0, 0.5, 0.9])
def test_cosine_pairs_against_loops(threshold):
    z = random(1, 14, 3) * uniform(2, 14, 1) * 5  # of all lengths
    assert cosine_pairs(z, threshold).tolist() == above(plain_cosines(z.tolist()), threshold)
    assert 0 < cosine_pairs(z, threshold).float().mean() < 1


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("threshold", [0.01, 0.07, 0.3])
def test_sne_pairs_against_loops(threshold, temperature):
    z = random(3, 15, 4)
    joint = plain_sne(z.tolist(), temperature)
    assert sne_pairs(z, threshold, temperature).tolist() == above(joint, threshold)


LABELINGS = {
    "knn": lambda z: knn_pairs(z, 3),
    "cosine": lambda z: cosine_pairs(z, 0.6),
    "sne": lambda z: sne_pairs(z, 0.05, 1.0),
}


@pytest.mark.parametrize("name", LABELINGS)
def test_pairs_are_symmetric_with_oneself_and_in_any_order(name):
    """bool (B, B), S = S^T, True on the diagonal; images in another order, the same pairs; input left alone."""
    z = random(4, 30, 5)
    kept, similar = z.clone(), LABELINGS[name](z)
    assert similar.dtype == torch.bool and similar.shape == (30, 30)
    assert torch.equal(similar, similar.T) and similar.diagonal().all() and not similar.all()
    order = torch.randperm(30, generator=torch.Generator().manual_seed(5))
    assert torch.equal(LABELINGS[name](z[order]), similar[order][:, order])
    assert torch.equal(z, kept) and similar.sum() > 40


@pytest.mark.parametrize("name", LABELINGS)
def test_identical_and_empty_features_have_pairs(name):
    """Images all alike are similar, for knn so many of them; zeros have no direction, but a place."""
    alike, empty = (LABELINGS[name](z) for z in (torch.full((8, 4), 0.3), torch.zeros(8, 4)))
    for similar in (alike, empty):
        assert torch.equal(similar, similar.T) and similar.diagonal().all()
        assert name != "knn" or (similar.sum(1) >= 1 + 3).all()
    if name != "knn":
        assert alike.all()
        assert torch.equal(empty, alike if name == "sne" else torch.eye(8, dtype=torch.bool))


def test_an_image_is_no_neighbour_of_its_own():
    """k neighbours are k others: 1 joins the two of each couple; k = B - 1 joins all, one less not."""
    couples = torch.tensor([[0.0], [1.0], [10.0], [11.0], [30.0], [31.0]])
    assert knn_pairs(couples, 1).tolist() == [[i // 2 == j // 2 for j in range(6)] for i in range(6)]
    z = random(6, 9, 2)
    assert knn_pairs(z, 8).all() and not knn_pairs(z, 7).all()
    for k in range(1, 9):
        assert (knn_pairs(z, k).sum(1) >= k + 1).all() and (knn_pairs(z, k).sum(1) == k + 1).any()


def test_hand_case_of_neighbours():
    """On a line at 0, 2, 5, 9: each one's nearest is the one before it; either side's choice counts."""
    line = torch.tensor([[0.0], [2.0], [5.0], [9.0]])
    assert knn_pairs(line, 1).int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [0, 1, 1, 1], [0, 0, 1, 1]]


def test_copies_of_an_image_are_its_neighbours():
    """Twins at distance 0 choose each other, not themselves twice; three alike do not choose a fourth."""
    a, b = random(7, 2, 6)
    twins = torch.stack([a, b, a, b + 3, a + 5])
    assert knn_pairs(twins, 1)[0, 2] and knn_pairs(twins, 1)[2, 0]
    three = torch.stack([a, a, a, b + 9, b + 9.5])
    similar = knn_pairs(three, 2)
    assert similar[:3, :3].all() and similar[3, 4]
    assert not knn_pairs(three, 1)[:3, 3:].any()


@pytest.mark.parametrize("offset", [0.0, 1000.0, -30000.0])
def test_distances_are_precise_far_from_the_origin(offset):
    """Squared norms of 1e10 would swallow distances of 1 if they were subtracted from each other as they are."""
    z = random(8, 20, 50) + offset
    want = torch.cdist(z.double(), z.double()).square()
    got = squared_distances(z)
    torch.testing.assert_close(got.double(), want, rtol=2e-3, atol=2e-3)
    assert (got >= 0).all()
    assert knn_pairs(z, 4).tolist() == plain_knn(z.tolist(), 4)
    assert torch.equal(sne_pairs(z, 0.05, 9.0), torch.tensor(above(plain_sne(z.tolist(), 9.0), 0.05, 1e-6)))


def test_distances_of_copies_are_0():
    z = torch.cat([random(9, 10, 40)] * 2)
    assert squared_distances(z)[range(10), range(10, 20)].max() < 1e-4


def test_rows_of_zeros_have_cosine_0():
    """Neither NaN nor similar to all: above a threshold of 0.1 alone, at 0 with everybody."""
    z = torch.tensor([[0.0, 0.0], [0.0, 0.0], [1.0, 2.0]])
    assert torch.equal(cosine_pairs(z, 0.1), torch.eye(3, dtype=torch.bool))
    assert cosine_pairs(z, 0.0).all() and cosine_pairs(z, -1.0).all()


def test_a_cosine_at_the_threshold_counts():
    """3-4-5: a cosine of 0.6 (and 1 of equal directions) reaches just those thresholds; lengths do not matter."""
    z = torch.tensor([[7.0, 0.0], [2.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    assert cosine_pairs(z, 1.0)[0].tolist() == [True, True, False, False]
    assert cosine_pairs(z, 0.599)[0].tolist() == [True, True, True, False]
    assert cosine_pairs(z, 0.601)[0].tolist() == [True, True, False, False]
    assert cosine_pairs(z, 0.0)[0].all()


def test_hand_case_of_sne():
    """Points at 0, 1 and 3: P by hand; each pair appears as the threshold falls below its joint probability."""
    z, e = torch.tensor([[0.0], [1.0], [3.0]]), math.exp
    p01, p02 = e(-1) / (e(-1) + e(-9)), e(-9) / (e(-1) + e(-9))
    p10, p12 = e(-1) / (e(-1) + e(-4)), e(-4) / (e(-1) + e(-4))
    p20, p21 = e(-9) / (e(-9) + e(-4)), e(-4) / (e(-9) + e(-4))
    for (i, j), joint in {
        (0, 1): (p01 + p10) / 2,
        (0, 2): (p02 + p20) / 2,
        (1, 2): (p12 + p21) / 2,
    }.items():
        assert sne_pairs(z, joint * 0.999, 1.0)[i, j] and not sne_pairs(z, joint * 1.001, 1.0)[i, j]


def test_sne_compares_with_others_and_strictly():
    """Two images have each other alone: probability 1, which is above 0.99, not above 1; far ones are finite."""
    z = torch.tensor([[0.0], [200.0]])
    assert sne_pairs(z, 0.99, 1.0).all() and not sne_pairs(z, 1.0, 1.0)[0, 1]
    z = torch.tensor([[0.0], [2.0], [1e4], [1e4 + 3]])
    assert sne_pairs(z, 0.5, 1.0).int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [0, 0, 1, 1], [0, 0, 1, 1]]


def test_the_temperature_divides_distances():
    """Twice the temperature is half of the features; a lower one leaves the nearest alone."""
    z = random(10, 20, 3)
    assert torch.equal(sne_pairs(z, 0.02, 2.0), sne_pairs(z / 2, 0.02, 1.0))
    assert sne_pairs(z, 0.02, 2.0).sum() > sne_pairs(z, 0.02, 0.3).sum() > 20


def test_each_labeling_reads_its_own_numbers():
    """knn the neighbours, cosine its threshold, sne its threshold and temperature, and nothing else."""
    z = random(11, 12, 4)
    assert torch.equal(similar_pairs(z, "knn", 2, 9, 9, 0), knn_pairs(z, 2))
    assert torch.equal(similar_pairs(z, "cosine", -5, 0.3, 9, 0), cosine_pairs(z, 0.3))
    assert torch.equal(similar_pairs(z, "sne", -5, 9, 0.04, 0.7), sne_pairs(z, 0.04, 0.7))
    assert len({knn_pairs(z, 2).sum().item(), cosine_pairs(z, 0.3).sum().item()}) == 2


# --------------------------------------------------------------------------- mixtures


def rng(seed):
    return np.random.default_rng(seed)


def shuffles(seed, parts, batch):
    return torch.from_numpy(np.stack([rng(seed + m).permutation(batch) for m in range(parts)]))


def coded(batch, size):
    """Images whose three channels say of which image, row and column a pixel is, (B, 3, S, S)."""
    who = torch.arange(batch).view(-1, 1, 1).expand(-1, size, size)
    row, column = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    return torch.stack([who, row.expand_as(who), column.expand_as(who)], 1).float()


CUTS = {  # name: (h, w) of the first patch in images of 8 pixels
    "four patches": (3, 5),
    "large": (6, 7),
    "all of one": (8, 8),
    "all of the last": (0, 0),
    "no top": (0, 5),
    "no right": (3, 8),
    "halves": (4, 8),
    "quarters": (4, 4),
    "a pixel": (1, 1),
}


@pytest.mark.parametrize("cut", CUTS.values(), ids=CUTS)
def test_ricap_pixel_by_pixel(cut):
    """Pixel (y, x) of mixture r: of the patch it lies in, at its corner's place in the image chosen for it."""
    size, batch, (h, w) = 8, 6, cut
    images, permutations = random(1, batch, 2, size, size), shuffles(2, 4, batch)
    corners = rng(3).random((4, 2))
    got = ricap(images, permutations, cut, corners)
    assert got.shape == images.shape
    for r, y, x in itertools.product(range(batch), range(size), range(size)):
        m = 2 * (y >= h) + (x >= w)
        high, wide = (h, size - h)[y >= h], (w, size - w)[x >= w]
        top, left = (math.floor(c * (size - n + 1)) for c, n in zip(corners[m], (high, wide), strict=True))
        source = images[permutations[m, r], :, top + y - h * (y >= h), left + x - w * (x >= w)]
        assert torch.equal(got[r, :, y, x], source)


@pytest.mark.parametrize("seed", range(4))
def test_a_patch_is_a_window_of_the_image_its_share_counts(seed):
    """One image, consecutive rows and columns in each patch; as many pixels of it as its share says."""
    size, batch, generator = 20, 9, rng(seed)
    permutations, shares, cut = draw_mixture("ricap", batch, size, generator)
    got = ricap(coded(batch, size), permutations, cut, generator.random((4, 2)))
    assert torch.isclose(shares.sum(), torch.tensor(1.0))
    (h, w), areas = cut, []
    for m, (rows, columns) in enumerate(
        itertools.product((slice(0, h), slice(h, size)), (slice(0, w), slice(w, size)))
    ):
        patch = got[:, :, rows, columns]
        areas.append(patch[0, 0].numel())
        if patch.numel():
            assert torch.equal(patch[:, 0], permutations[m].view(-1, 1, 1).expand_as(patch[:, 0]).float())
            assert (patch[:, 1].diff(dim=1) == 1).all() and (patch[:, 2].diff(dim=2) == 1).all()
            assert (patch[:, 1].diff(dim=2) == 0).all() and (patch[:, 2].diff(dim=1) == 0).all()
    torch.testing.assert_close(shares, torch.tensor(areas) / size**2)


def test_windows_lie_everywhere_equally_often():
    """Corners in 0..1 reach every place where a 3 x 5 window fits in 8 x 8 pixels, and none more often."""
    seen, identity = Counter(), torch.arange(1).expand(4, 1)
    for y, x in itertools.product((np.arange(60) + 0.5) / 60, (np.arange(40) + 0.5) / 40):
        corners = [(y, x)] + [(0.0, 0.999999)] * 3
        first = ricap(coded(1, 8), identity, (3, 5), corners)[0, :, 0, 0]
        seen[tuple(first[1:].int().tolist())] += 1
    assert seen == {(row, column): 100 for row in range(6) for column in range(4)}


def test_hand_case_of_ricap():
    """2 x 2 pixels cut in the middle: top left of image 0, the others of images 1, 2, 3, from where the corners say."""
    images = torch.arange(16.0).view(4, 1, 2, 2)
    permutations = torch.tensor([[0], [1], [2], [3]])
    corners = np.array([(0.0, 0.9), (0.9, 0.0), (0.4, 0.4), (0.5, 0.5)])
    got = ricap(images, permutations, (1, 1), corners)
    assert got.tolist() == [[[[1.0, 6.0], [8.0, 15.0]]]]


def test_patches_fill_the_image():
    assert patches((3, 5), 8) == [(3, 5), (3, 3), (5, 5), (5, 3)]
    for h, w in itertools.product(range(9), repeat=2):
        assert sum(a * b for a, b in patches((h, w), 8)) == 64


def test_draws_of_ricap():
    """Permutations, the same image in all large patches, others in small ones; shares of whole pixels that sum to 1."""
    generator, small = rng(0), Counter()
    for _ in range(200):
        permutations, shares, (h, w) = draw_mixture("ricap", 40, 32, generator)
        assert permutations.shape == (4, 40) and shares.shape == (4,) and shares.dtype == torch.float32
        assert all(sorted(p) == list(range(40)) for p in permutations.tolist())
        assert isinstance(h, int) and isinstance(w, int) and 0 <= h <= 32 and 0 <= w <= 32
        areas = [h * w, h * (32 - w), (32 - h) * w, (32 - h) * (32 - w)]
        assert shares.tolist() == pytest.approx([a / 1024 for a in areas])
        own = [p == list(range(40)) for p in permutations.tolist()]
        assert own == [a > 256 for a in areas]
        others = [tuple(p) for p, mine in zip(permutations.tolist(), own, strict=True) if not mine]
        assert len(set(others)) == len(others)
        small[len(others)] += 1
    assert len(small) > 1 and max(small) <= 3


def test_a_patch_of_just_a_quarter_is_of_another_image():
    class Halves:
        def beta(self, a, b):
            assert (a, b) == (0.3, 0.3)
            return 0.5

        def permutation(self, n):
            return np.arange(n)[::-1].copy()

    permutations, shares, cut = draw_mixture("ricap", 5, 8, Halves())
    assert cut == (4, 4) and shares.tolist() == [0.25] * 4
    assert permutations.tolist() == [[4, 3, 2, 1, 0]] * 4


def test_cuts_and_shares_are_beta_distributed():
    """Beta(0.3, 0.3): mean 1/2, variance 0.09 / (0.36 * 1.6), and its distribution function; h and w independent."""
    generator, n = rng(1), 3000
    cuts = np.array([draw_mixture("ricap", 2, 1000, generator)[2] for _ in range(n)]) / 1000
    shares = np.array([draw_mixture("mixup", 2, 8, generator)[1][0] for _ in range(n)])
    for x in (cuts[:, 0], cuts[:, 1], shares):
        assert abs(x.mean() - 0.5) < 0.03 and abs(x.var() - 0.15625) < 0.01
        for at in (0.05, 0.25, 0.6, 0.9):
            assert abs((x < at).mean() - betainc(0.3, 0.3, at)) < 0.03
    assert abs(np.corrcoef(cuts.T)[0, 1]) < 0.07


def test_cuts_are_rounded():
    class Fixed:
        def __init__(self, *values):
            self.values = list(values)

        def beta(self, a, b):
            return self.values.pop(0)

        def permutation(self, n):
            return np.arange(n)

    assert draw_mixture("ricap", 3, 10, Fixed(0.26, 0.94))[2] == (3, 9)
    assert draw_mixture("ricap", 3, 10, Fixed(0.99, 0.01))[2] == (10, 0)


def test_draws_of_mixup_and_of_none():
    """Two images, the first its own, in shares that sum to 1; none: the image itself in full."""
    permutations, shares, _ = draw_mixture("mixup", 30, 8, rng(2))
    assert permutations[0].tolist() == list(range(30)) == sorted(permutations[1].tolist())
    assert permutations[1].tolist() != list(range(30))
    assert shares.shape == (2,) and shares.sum() == 1 and shares.min() >= 0 and shares.dtype == torch.float32
    permutations, shares, _ = draw_mixture("none", 5, 8, rng(2))
    assert permutations.tolist() == [[0, 1, 2, 3, 4]] and shares.tolist() == [1.0]


@pytest.mark.parametrize("shape", [(4,), (3, 5, 5)])
def test_mixup_against_loops(shape):
    """Images and vectors, as sums over the parts, number by number; some columns give some mixtures."""
    images, permutations = random(3, 7, *shape), shuffles(4, 3, 7)
    shares = torch.tensor([0.5, 0.2, 0.3])
    got = mixup(images, permutations, shares)
    for r in range(7):
        for at in itertools.product(*map(range, shape)):
            want = sum(float(shares[m]) * float(images[permutations[m, r]][at]) for m in range(3))
            assert got[r][at].item() == pytest.approx(want, abs=1e-6)
    assert torch.equal(mixup(images, permutations[:, 2:5], shares), got[2:5])


def test_targets_against_loops_and_not_transposed():
    """T[r, c] = sum of W_m S[pi_m(r), c]: row of the mixture, column of the clean image."""
    similar = knn_pairs(random(5, 9, 3), 2)
    permutations, shares = shuffles(6, 4, 9), torch.tensor([0.4, 0.3, 0.2, 0.1])
    got = mixed_targets(similar, permutations, shares)
    want = [
        [sum(float(shares[m]) * bool(similar[permutations[m, r], c]) for m in range(4)) for c in range(9)]
        for r in range(9)
    ]
    torch.testing.assert_close(got, torch.tensor(want))
    assert (got - torch.tensor(want).T).abs().max() > 0.2 and got.min() >= 0 and got.max() <= 1
    torch.testing.assert_close(mixed_targets(similar, permutations[:, 4:7], shares), torch.tensor(want)[4:7])


def test_hand_case_of_a_target():
    """Images 0 and 1 are similar; mixture 0 is image 0 with a quarter of image 2: three quarters like 0 and 1."""
    similar = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    permutations = torch.tensor([[0, 1, 2], [2, 0, 1]])
    got = mixed_targets(similar, permutations, torch.tensor([0.75, 0.25]))
    assert got.tolist() == [[0.75, 0.75, 0.25], [1.0, 1.0, 0.0], [0.25, 0.25, 0.75]]


def settings(*flags):
    args = options(["--data", "digits", "--workers", "0", *flags])
    args.amp = False
    return args


@pytest.mark.parametrize("kind", ["ricap", "mixup", "none"])
def test_targets_are_what_the_pixels_say(kind):
    """Of whom each mixture is, read off its pixels, times S: the target; the same for both views of a batch."""
    batch, size = 10, 16
    args = settings("--mix", kind, "--batch-size", str(batch), "--image-size", str(size), "--neighbours", "3")
    images = torch.eye(batch).view(batch, batch, 1, 1).expand(-1, -1, size, size)
    similar = knn_pairs(random(7, batch, 3), 2)
    for step in range(6):
        mixed, permutations, shares = mix([images, images], 1, step, args)
        target = mixed_targets(similar, permutations, shares)
        for view in mixed:
            torch.testing.assert_close(view.mean((2, 3)) @ similar.float(), target)


def test_both_views_share_images_and_differ_in_corners():
    """Each mixture is of the same images in the same patches; windows lie elsewhere; new in every step."""
    args = settings("--mix", "ricap", "--batch-size", "12", "--image-size", "24")
    images, draws, elsewhere = coded(12, 24), [], 0
    for epoch, step in itertools.product(range(2), range(4)):
        (one, two), permutations, shares = mix([images, images], epoch, step, args)
        assert torch.equal(one[:, 0], two[:, 0])
        elsewhere += not torch.equal(one[:, 1:], two[:, 1:])
        again = mix([images, images], epoch, step, args)
        assert torch.equal(again[0][0], one) and torch.equal(again[1], permutations)
        draws.append((tuple(shares.tolist()), tuple(permutations[-1].tolist())))
    assert elsewhere >= 6 and len(set(draws)) == 8
    args.seed = 1
    assert tuple(mix([images, images], 0, 0, args)[2].tolist()) != draws[0][0]


# --------------------------------------------------------------------------- losses


def probabilities(seed, n, k, **more):
    return random(seed, n, k, **more).mul(2).softmax(1)


def test_pair_loss_and_gradients_against_loops():
    """Every pair of b mixtures and B images, and the derivative by hand, in double precision."""
    e, b, n, k = 1e-7, 4, 7, 3
    mixed = probabilities(1, b, k, dtype=torch.float64).requires_grad_()
    clean = probabilities(2, n, k, dtype=torch.float64).requires_grad_()
    target = uniform(3, b, n, dtype=torch.float64)
    value, d_mixed, d_clean = 0.0, torch.zeros(b, k), torch.zeros(n, k)
    d_mixed, d_clean = d_mixed.double(), d_clean.double()
    for r, c in itertools.product(range(b), range(n)):
        t, p = target[r, c].item(), dot(mixed[r].tolist(), clean[c].tolist())
        value -= (t * math.log(p + e) + (1 - t) * math.log(1 - p + e)) / (b * n)
        slope = -(t / (p + e) - (1 - t) / (1 - p + e)) / (b * n)
        d_mixed[r] += slope * clean[c].detach()
        d_clean[c] += slope * mixed[r].detach()
    loss = pair_loss(mixed, clean, target)
    loss.backward()
    assert loss.item() == pytest.approx(value, abs=1e-12)
    torch.testing.assert_close(mixed.grad, d_mixed)
    torch.testing.assert_close(clean.grad, d_clean)
    assert torch.autograd.gradcheck(lambda a, b: pair_loss(a, b, target), (mixed, clean))


@pytest.mark.parametrize(
    "target,same,want", [(1, 0, 1e-7), (0, 1, 1e-7), (1, 1, 1), (0, 0, 1), (0.5, 0.5, 0.5)]
)
def test_the_loss_of_one_pair_by_hand(target, same, want):
    """-log of the probability of what is true, which is never below 1e-7."""
    mixed, clean = torch.tensor([[1.0, 0.0]]), torch.tensor([[float(same), 1.0 - same]])
    loss = pair_loss(mixed, clean, torch.tensor([[float(target)]]))
    assert loss.item() == pytest.approx(-math.log(want), abs=1e-6)


def test_a_product_that_rounds_above_1_is_1():
    """Finite loss and gradient where the sum of squares of probabilities is 1.0000002."""
    p = torch.tensor([[1.0000001]], requires_grad=True)
    assert (p @ p.T).item() > 1 + 1.5e-7
    for target in (0.0, 0.3, 1.0):
        loss = pair_loss(p, p.detach(), torch.tensor([[target]]))
        (gradient,) = torch.autograd.grad(loss, p)
        assert loss.item() == pytest.approx(-(1 - target) * math.log(1e-7), abs=1e-4) and gradient.isfinite()


def test_the_shape_of_targets_is_checked():
    """(b, B) for b mixtures and B images, not the other way round."""
    with pytest.raises(AssertionError):
        pair_loss(probabilities(1, 3, 2), probabilities(2, 5, 2), torch.zeros(5, 3))


def test_the_ramp():
    """exp(-5) at first, exp(-1.25) in the middle, 1 from T on, or at once without a ramp; it never falls."""
    assert ramp(0, 100) == pytest.approx(math.exp(-5)) and ramp(50, 100) == pytest.approx(math.exp(-1.25))
    assert ramp(25, 50) == ramp(50, 100) and ramp(1, 4) == pytest.approx(math.exp(-5 * 9 / 16))
    assert ramp(100, 100) == ramp(101, 100) == ramp(10**6, 100) == 1 == ramp(0, 0) == ramp(7, 0)
    values = [ramp(t, 30) for t in range(40)]
    assert values == sorted(values) and len(set(values)) == 31


def test_four_turns_are_numpys():
    """All images unturned, then all by one quarter, .., and by how many each was turned."""
    images = random(4, 3, 2, 5, 5)
    turned, quarters = four_turns(images)
    want = np.concatenate([np.rot90(images.numpy(), q, axes=(2, 3)) for q in range(4)])
    assert np.array_equal(turned.numpy(), want)
    assert quarters.tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3, 3, 3] and quarters.dtype == torch.int64


def test_rotation_losses_by_hand():
    """Mean cross-entropy over the four turns of each image, and the share of turns found."""
    images, logits = random(5, 3, 1, 4, 4), random(6, 12, 4)

    def net(x):
        assert x.shape == (12, 1, 4, 4)
        return logits

    loss, right = rotation_losses(net, images, settings())
    rows, truth = logits.tolist(), [q for q in range(4) for _ in range(3)]
    want = (
        -sum(math.log(math.exp(row[t]) / sum(map(math.exp, row))) for row, t in zip(rows, truth, strict=True))
        / 12
    )
    assert loss.item() == pytest.approx(want, rel=1e-6)
    hits = sum(row.index(max(row)) == t for row, t in zip(rows, truth, strict=True)) / 12
    assert right.item() == pytest.approx(hits) and 0 < hits < 1


@pytest.mark.parametrize("kind", ["ricap", "mixup", "none"])
def test_the_whole_loss_of_a_batch(kind):
    """Pairs of the first mixture and the clean crop, w(t) times the squared difference of both, what is watched."""
    batch, k, weight = 12, 4, 3.5
    args = settings("--mix", kind, "--batch-size", str(batch), "--neighbours", "3", "--image-size", "16")
    z, logits = random(7, batch, 6), random(8, 3, batch, k).requires_grad_()
    views = [random(9 + v, batch, 1, 16, 16) for v in range(3)]
    labels = torch.arange(batch) % 3
    seen = []

    def net(given):
        seen.extend(given)
        return z, logits.softmax(-1)

    loss, pairs, difference, similar, right = clustering_losses(net, views, labels, weight, 2, 5, args)
    mixed, permutations, shares = mix(views[1:], 2, 5, args)
    assert len(seen) == 3 and torch.equal(seen[0], views[0])
    assert torch.equal(seen[1], mixed[0]) and torch.equal(seen[2], mixed[1])
    s, p = plain_knn(z.tolist(), 3), logits.softmax(-1).tolist()
    total = 0.0
    for r, c in itertools.product(range(batch), range(batch)):
        t = sum(w * s[pi[r]][c] for w, pi in zip(shares.tolist(), permutations.tolist(), strict=True))
        same = dot(p[1][r], p[0][c])
        total -= t * math.log(same + 1e-7) + (1 - t) * math.log(1 - same + 1e-7)
    square = sum((p[1][i][c] - p[2][i][c]) ** 2 for i in range(batch) for c in range(k)) / (batch * k)
    assert pairs.item() == pytest.approx(total / batch**2, rel=1e-5)
    assert difference.item() == pytest.approx(square, rel=1e-5)
    assert loss.item() == pytest.approx(total / batch**2 + weight * square, rel=1e-5)
    couples = [(i, j) for i in range(batch) for j in range(batch) if i != j and s[i][j]]
    assert similar.item() == pytest.approx(len(couples) / (batch**2 - batch))
    same = sum(labels[i] == labels[j] for i, j in couples).item()
    assert right.item() == pytest.approx(same / (batch**2 - batch)) and 0 < same < len(couples)
    loss.backward()
    assert all(g.abs().max() > 1e-4 for g in logits.grad)  # clean and both mixed predictions learn
    without = clustering_losses(net, views, None, 0.0, 2, 5, args)
    assert without[0].item() == pytest.approx(total / batch**2, rel=1e-5) and without[3] == similar


# --------------------------------------------------------------------------- networks


def test_the_network_gives_features_of_the_first_view_and_probabilities_of_all():
    """relu of the trunk without gradient; softmax of the classifier; each view with its own batch norm."""
    torch.manual_seed(0)
    net = Network(backbone("lenet5", 1, 16, norm=True), 5, 1).train()
    views = [random(v, 6, 1, 16, 16) * (1 + v) for v in range(3)]
    z, p = net(views)
    assert z.shape == (6, 84) and p.shape == (3, 6, 5) and z.dtype == p.dtype == torch.float32
    assert not z.requires_grad and p.requires_grad
    torch.testing.assert_close(z, F.relu(net.features[0](views[0])))
    for v in range(3):
        alone = net.classifier(F.relu(net.features[0](views[v])))
        torch.testing.assert_close(p[v], alone.exp() / alone.exp().sum(1, keepdim=True))


@pytest.mark.parametrize("layers,widths", [(1, [(84, 7)]), (2, [(84, 84), (84, 7)])])
def test_the_classifier_has_one_or_two_layers(layers, widths):
    net = Network(backbone("lenet5", 1, 16), 7, layers)
    linear = [m for m in net.classifier.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == widths
    kinds = [type(m) for m in net.classifier]
    assert kinds == [nn.Linear] + [nn.ReLU, nn.Linear] * (layers - 1)


def test_rotnet_turns_the_same_trunk():
    """Its weights are the trunk's and a layer for four angles; what it learns is where clustering starts."""
    trunk = backbone("lenet5", 1, 16)
    net, rotnet = Network(trunk, 3, 1), RotNet(trunk)
    assert rotnet.trunk is net.features[0] and rotnet.angle.out_features == 4
    x = random(1, 5, 1, 16, 16)
    trunk.eval()
    torch.testing.assert_close(rotnet(x), rotnet.angle(F.relu(trunk(x))))


def test_the_network_of_vectors():
    """500-500-2000 with ReLUs between; no layer without a name to freeze it by."""
    net = Perceptron(7)
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(7, 500), (500, 500), (500, 2000)]
    assert net.dim == 2000 and net(random(1, 4, 7)).shape == (4, 2000) and len(net.stages) == 3


def test_a_new_trunk_is_the_papers():
    """3x3 stem up to STL-10's 96 pixels, shortcuts without weights, averaged maps; batch norm in plain networks."""
    for size, kernel in ((32, 3), (96, 3), (97, 7)):
        flags = ["--arch", "resnet18", "--image-size", str(size), "--resize", str(size)]
        trunk, net = new_net(settings(*flags), 3)
        assert trunk.conv1.kernel_size == (kernel, kernel) and trunk.dim == 512 == net.features.dim
        assert not [k for k in trunk.state_dict() if "downsample" in k]
    trunk, net = new_net(settings("--classifier-layers", "2", "--k", "6"))
    assert [m.num_features for m in trunk.modules() if isinstance(m, nn.BatchNorm1d)] == [120, 84]
    assert not [m for m in net.modules() if isinstance(m, nn.Dropout) and m.p]
    assert net.classifier[-1].out_features == 6 and len(net.classifier) == 3


def meta_trunk(arch):
    with torch.device("meta"):
        return (
            Perceptron(10)
            if arch == "mlp"
            else backbone(arch, 3, 224 if arch == "alexnet" else 32, pool=True)
        )


CONVOLUTIONS = {  # arch: convolutions up to the end of each stage
    "lenet5": [1, 2],
    "alexnet": [1, 2, 3, 4, 5],
    "alexnet-small": [1, 2, 3, 4, 5],
    "vgg16": [2, 4, 7, 10, 13],
}


@pytest.mark.parametrize("arch", CONVOLUTIONS)
def test_frozen_stages_of_plain_networks_are_their_first_convolutions(arch):
    """Convolutions and batch norm up to the end of the stage, in order; linear layers never."""
    trunk = meta_trunk(arch)
    every = [m for m in trunk.modules() if isinstance(m, nn.Conv2d)]
    for stages, count in enumerate([0, *CONVOLUTIONS[arch]]):
        inside = [m for module in frozen(trunk, stages) for m in module.modules()]
        found = [m for m in inside if isinstance(m, nn.Conv2d)]
        assert len(found) == count and all(a is b for a, b in zip(found, every, strict=False))
        assert len([m for m in inside if isinstance(m, nn.BatchNorm2d)]) == count
        assert not [m for m in inside if isinstance(m, nn.Linear)]


@pytest.mark.parametrize("arch", ["resnet18", "resnet50"])
def test_frozen_stages_of_resnets_begin_with_the_stem(arch):
    """3 of 4 leave layer4; none leave all; all leave nothing of the trunk."""
    trunk = meta_trunk(arch)
    for stages in range(5):
        fixed = {id(w) for module in frozen(trunk, stages) for w in module.parameters()}
        left = {name.split(".")[0] for name, w in trunk.named_parameters() if id(w) not in fixed}
        want = {f"layer{i}" for i in range(stages + 1, 5)} | ({"conv1", "bn1"} if stages == 0 else set())
        assert left == want


def test_frozen_stages_of_the_network_of_vectors():
    trunk = meta_trunk("mlp")
    for stages in range(4):
        fixed = {id(w) for module in frozen(trunk, stages) for w in module.parameters()}
        assert len(fixed) == 4 * stages  # weight and bias of a linear layer and its batch norm
        left = [m for m in trunk.modules() if isinstance(m, nn.Linear) and id(m.weight) not in fixed]
        assert len(left) == 3 - stages


@pytest.mark.parametrize("arch,most", [("lenet5", 2), ("resnet18", 4), ("vgg16", 5), ("mlp", 3)])
def test_more_stages_than_there_are_is_refused(arch, most, capsys):
    frozen(meta_trunk(arch), most)
    with pytest.raises(SystemExit) as end:
        frozen(meta_trunk(arch), most + 1)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and f"--freeze-stages {most + 1}" in line and str(most) in line


def new_net(args, channels=1):
    """(trunk, net) for images of so many channels."""
    data = Images("some", None, [], None, [], (0.5,) * channels, (0.2,) * channels)
    about, weights = lsdc.describe(args, data)
    assert weights is None
    return lsdc.make_net(args, about)


def epoch_of(args, steps=2, net=None):
    """(state before, state after, net) an epoch of clustering on random images."""
    torch.manual_seed(1)
    if net is None:
        _, net = new_net(args)
    stage = lsdc.begin(args.pretrain_epochs, RotNet(net.features[0]), net, [None, None], args)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    b, s = args.batch_size, args.image_size
    batches = [(torch.arange(b), [random(3 * i + v, b, 1, s, s) for v in range(3)]) for i in range(steps)]
    losses = lsdc.losses_of(stage, None, args.pretrain_epochs, args)
    done, sums, signal = lsdc.train(stage.trained, stage.optimizer, losses, batches, 0, steps, [], "epoch")
    assert done == steps and signal == 0 and len(sums) == 5
    return before, net.state_dict(), net


FREEZE = {  # arch: (image size, stages, what stays as it is)
    "lenet5": (16, 1, ("features.0.features.0.", "features.0.features.1.")),
    "resnet18": (8, 3, tuple(f"features.0.{m}." for m in ("conv1", "bn1", "layer1", "layer2", "layer3"))),
}


@pytest.mark.parametrize("still", [False, True])
@pytest.mark.parametrize("arch", FREEZE)
def test_frozen_stages_stay_as_they_are_and_all_else_learns(arch, still):
    """Bit for bit; batch norm's statistics follow the data everywhere, or with --freeze-bn only behind."""
    size, stages, names = FREEZE[arch]
    flags = ["--arch", arch, "--image-size", str(size), "--resize", str(size), "--freeze-stages", str(stages)]
    flags += ["--batch-size", "8", "--neighbours", "2", *["--freeze-bn"] * still]
    before, after, net = epoch_of(settings(*flags))
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    weights = {k for k, _ in net.named_parameters()}
    assert weights - moved == {k for k in weights if k.startswith(names)} != set()
    statistics = {k for k in before if "running" in k}
    assert statistics - moved == {k for k in statistics if k.startswith(names) and still}
    net.train()
    fixed = {m for k, m in net.named_modules() if f"{k}.".startswith(names) and isinstance(m, nn.BatchNorm2d)}
    assert fixed and all(m.training != still for m in fixed)


def test_without_frozen_stages_everything_learns():
    flags = ["--image-size", "16", "--resize", "16", "--batch-size", "8", "--neighbours", "2"]
    before, after, net = epoch_of(settings(*flags, "--freeze-stages", "0", "--freeze-bn"))
    assert all(not torch.equal(before[k], after[k]) for k, _ in net.named_parameters())


def test_optimisers_of_both_stages():
    """RotNet: Nesterov, all weights; clustering: SGD or Adam with the decay and rate of the flags, unfrozen weights."""
    flags = [
        "--pretrain",
        "rotnet",
        "--pretrain-epochs",
        "4",
        "--pretrain-lr",
        "0.2",
        "--pretrain-wd",
        "0.01",
    ]
    flags += ["--lr", "0.3", "--wd", "0.02", "--momentum", "0.8", "--image-size", "16", "--resize", "16"]
    args = settings(*flags, "--freeze-stages", "1", "--optimizer", "sgd")
    trunk, net = new_net(args)
    rotnet, loaders = RotNet(trunk), ["rotnet's", "clustering's"]
    first = lsdc.begin(0, rotnet, net, loaders, args)
    (group,) = first.optimizer.param_groups
    assert isinstance(first.optimizer, torch.optim.SGD) and first.loader == "rotnet's" and first.first == 0
    numbers = [group[n] for n in ("lr", "momentum", "nesterov", "weight_decay")]
    assert numbers == [0.2, 0.9, True, 0.01] and len(group["params"]) == len(list(rotnet.parameters()))
    second = lsdc.begin(4, rotnet, net, loaders, args)
    (group,) = second.optimizer.param_groups
    assert [group[n] for n in ("lr", "momentum", "nesterov", "weight_decay")] == [0.3, 0.8, False, 0.02]
    assert second.loader == "clustering's" and second.first == 4 and second.net is net
    assert len(group["params"]) == len([w for w in net.parameters() if w.requires_grad])
    assert len(group["params"]) == len(list(net.parameters())) - 4
    args.optimizer = "adam"
    adam = lsdc.begin(4, rotnet, net, loaders, args).optimizer
    assert isinstance(adam, torch.optim.Adam) and adam.param_groups[0]["weight_decay"] == 0.02


def test_learning_rates_of_both_stages():
    """RotNet's by five, clustering's by ten, after so many epochs of its own."""
    args = settings(
        "--lr", "0.5", "--lr-steps", "2", "3", "--pretrain-lr", "0.7", "--pretrain-lr-steps", "1", "4"
    )
    rotnet, clustering = (SimpleNamespace(name=name) for name in ("rotnet", "clustering"))
    got = [lsdc.rate(rotnet, e, args) for e in range(6)]
    assert got == pytest.approx([0.7, 0.14, 0.14, 0.14, 0.028, 0.028])
    got = [lsdc.rate(clustering, e, args) for e in range(5)]
    assert got == pytest.approx([0.5, 0.5, 0.05, 0.005, 0.005])
    assert learning_rate(0.1, 6, [2, 4, 9], 0.2) == pytest.approx(0.004)
    assert learning_rate(0.1, 6, [2, 4, 9]) == pytest.approx(0.001)
    assert learning_rate(0.1, 1, [2, 4, 9], 0.2) == 0.1 == learning_rate(0.1, 99, [])


def test_the_consistency_weight_follows_the_ramp_of_its_own_stage():
    """Epochs of RotNet do not count: lambda exp(-5) in the first of clustering."""
    args = settings("--consistency", "8", "--ramp-up", "4", "--batch-size", "4", "--neighbours", "2")
    weights = []

    def watch(net, views, labels, weight, *rest):
        weights.append(weight)

    real, lsdc.clustering_losses = lsdc.clustering_losses, watch
    try:
        stage = SimpleNamespace(name="clustering", trained=None, first=3)
        for epoch in (3, 5, 7, 9):
            lsdc.losses_of(stage, None, epoch, args)(0, torch.arange(4), [None] * 3)
    finally:
        lsdc.clustering_losses = real
    assert weights == pytest.approx([8 * math.exp(-5), 8 * math.exp(-1.25), 8, 8])


# --------------------------------------------------------------------------- what legacy.py has for it


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("size", [(4, 4), (5, 7), (1, 6)])
def test_shortcut_by_pooling_against_loops(stride, size):
    """Means of stride x stride pixels, of those there are at odd ends; zeros for the new channels."""
    x = random(1, 2, 3, *size)
    got = PoolShortcut(5, stride)(x)
    high, wide = (math.ceil(n / stride) for n in size)
    assert got.shape == (2, 5, high, wide) and not got[:, 3:].any()
    for i, c, y, a in itertools.product(range(2), range(3), range(high), range(wide)):
        window = x[i, c, y * stride : (y + 1) * stride, a * stride : (a + 1) * stride].flatten().tolist()
        assert got[i, c, y, a].item() == pytest.approx(sum(window) / len(window), abs=1e-6)
    assert not PoolShortcut(5, stride).state_dict()


@pytest.mark.parametrize("arch,width", [("resnet18", 512), ("resnet50", 2048)])
def test_resnets_with_shortcuts_without_weights(arch, width):
    """No downsampling convolutions are left, shapes are as ever, odd sides among them; the blocks stay."""
    with torch.device("meta"):
        plain, pooled = (backbone(arch, 3, 36, pool=True, pool_shortcuts=p) for p in (False, True))
        assert pooled.dim == width and pooled(torch.zeros(2, 3, 36, 36)).shape == (2, width)
        assert pooled.maps(torch.zeros(2, 3, 36, 36)).shape == plain.maps(torch.zeros(2, 3, 36, 36)).shape
    names = {k for k in plain.state_dict() if "downsample" not in k}
    assert names == set(pooled.state_dict()) and len(names) < len(plain.state_dict())


def test_a_block_with_a_pooled_shortcut_by_hand():
    """relu(convolutions(x) + pooled x beside zeros)."""
    torch.manual_seed(0)
    net = backbone("resnet18", 3, 9, pool=True, pool_shortcuts=True).eval()
    block, x = net.layer2[0], random(2, 2, 64, 9, 9).relu()
    inner = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(x)))))
    pooled = F.avg_pool2d(F.pad(x, [0, 1, 0, 1]), 2) * 4
    count = F.avg_pool2d(F.pad(torch.ones(1, 1, 9, 9), [0, 1, 0, 1]), 2) * 4
    beside = torch.cat([pooled / count, torch.zeros(2, 64, 5, 5)], 1)
    with torch.no_grad():
        torch.testing.assert_close(block(x), F.relu(inner + beside), atol=1e-5, rtol=1e-5)


def test_the_stem_for_small_images_can_be_asked_for():
    """3x3 without pooling up to 64 pixels by itself; at 96 if told to, as LSD-C for STL-10; or not at 32."""
    with torch.device("meta"):
        for size, small, kernel in [
            (32, None, 3),
            (64, None, 3),
            (96, None, 7),
            (96, True, 3),
            (32, False, 7),
        ]:
            net = backbone("resnet18", 3, size, small_stem=small)
            side = math.ceil(size / (8 if kernel == 3 else 32))
            assert net.conv1.kernel_size == (kernel, kernel) and net.dim == 512 * side**2
            assert net(torch.zeros(2, 3, size, size)).shape == (2, net.dim)


KINDS = [
    ("resnet18", {"pool": True, "small_stem": True, "pool_shortcuts": True}, 65),
    ("resnet18", {"pool": True, "small_stem": False, "pool_shortcuts": True}, 33),
    ("resnet18", {"pool": True}, 16),
    ("lenet5", {"norm": True}, 16),
]


@pytest.mark.parametrize("arch,kind,size", KINDS)
def test_the_file_of_such_a_network_gives_it_back(arch, kind, size, tmp_path):
    """save_backbone, load_backbone: the same features in every bit; rebuild alone: the same shape, other weights."""
    torch.manual_seed(3)
    net = backbone(arch, 3, size, **kind)
    x = random(1, 2, 3, size, size)
    net.train()(x)
    data = Images("some", None, [], None, [], (0.5,) * 3, (0.2,) * 3)
    assert save_backbone(tmp_path / "backbone.pt", net, arch, size, size, False, data, "lsdc")
    again, meta = load_backbone(tmp_path)
    with torch.no_grad():
        assert torch.equal(again(x), net.eval()(x))
    other = rebuild(meta, dropout=0.0)
    assert other.state_dict().keys() == net.state_dict().keys()
    other.load_state_dict(net.state_dict())
    with torch.no_grad():
        assert torch.equal(other.eval()(x), net(x))
    if arch == "resnet18":
        small = kind.get("small_stem", True)
        side = math.ceil(size / (8 if small else 32))
        assert meta["small_stem"] is small and meta["pool"] is True and side > 1
        assert rebuild(meta, pool=False).dim == 512 * side**2


def test_older_backbone_files_are_read_as_before(tmp_path):
    """Without the words small_stem and pool_shortcuts: the stem by the image size, shortcuts with weights."""
    net = backbone("resnet18", 3, 16, pool=True)
    data = Images("some", None, [], None, [], (0.5,) * 3, (0.2,) * 3)
    save_backbone(tmp_path / "backbone.pt", net, "resnet18", 16, 16, False, data, "deepcluster")
    saved = torch.load(tmp_path / "backbone.pt", weights_only=True)
    for word in ("small_stem", "pool_shortcuts"):
        del saved["meta"][word]
    torch.save(saved, tmp_path / "backbone.pt")
    again, _ = load_backbone(tmp_path)
    assert again.conv1.kernel_size == (3, 3) and "layer2.0.downsample.0.weight" in again.state_dict()


# A loss between the rows of all processes, and its gradient for rows and for a layer before them.
PAIRS_OF_ALL = """
import torch, legacy
from torch import nn
legacy.setup("cpu")
gen = torch.Generator().manual_seed(0)
x, y = torch.randn(12, 5, generator=gen), torch.randn(12, 5, generator=gen)
weights = torch.randn(12, 12, generator=gen)
layer = nn.Linear(5, 4, bias=False)
with torch.no_grad():
    layer.weight.copy_(torch.randn(4, 5, generator=gen))
first, last = legacy.shard(12)
net = legacy.parallel(layer)
clean, mixed = net(torch.cat([x[first:last], y[first:last]])).split(last - first)
clean.retain_grad()
everyone = legacy.gather_with_gradient(clean)
pairs = (mixed @ everyone.T).tanh() * weights[first:last]
loss = pairs.mean()
loss.backward()
got = {"everyone": everyone.detach(), "loss": legacy.total(loss) / legacy.processes(), "layer": layer.weight.grad}
got["rows"] = legacy.gather(clean.grad) / legacy.processes()
got["needs"] = everyone.requires_grad
torch.save(got, f"got.{legacy.processes()}.{legacy.rank()}")
legacy.leave()
"""


@pytest.mark.parametrize("world", [2, 3])
def test_gather_with_gradient_is_the_whole_batchs(world, launch):
    """Value, gradient of the rows and of the layer before them, as one process computes them; losses averaged."""
    assert launch(PAIRS_OF_ALL, world=1).codes == [0]
    run = launch(PAIRS_OF_ALL, world=world)
    assert run.codes == [0] * world, run.err
    one = torch.load(run.path / "got.1.0", weights_only=True)
    assert one["layer"].abs().max() > 1e-2 and one["rows"].abs().min(1).values.max() > 1e-5
    for rank in range(world):
        got = torch.load(run.path / f"got.{world}.{rank}", weights_only=True)
        assert got["needs"] and got["everyone"].shape == (12, 4)
        for name in ("everyone", "loss", "rows", "layer"):
            torch.testing.assert_close(got[name], one[name], rtol=1e-5, atol=1e-6, msg=name)


# --------------------------------------------------------------------------- vectors, splits, scores


def saved(path, **arrays):
    np.savez(path, **arrays)
    return str(path)


def test_vectors_are_read_as_they_are(tmp_path):
    """Rows in their order as float32, of any number type; labels numbered by their sorted names."""
    rows = rng(0).normal(size=(6, 3))
    for dtype in (np.float64, np.float32, np.float16, np.int32, np.uint8, ">f8"):
        features = (rows * 10).astype(dtype)
        data = load_vectors(saved(tmp_path / "x.npz", features=features), CPU)
        assert data.pixels.dtype == torch.float32 and data.paths is None and data.labels is None
        assert data.pixels.tolist() == features.astype(np.float32).tolist()
        assert (len(data), data.classes, data.title(4)) == (6, [], "4")
    words = np.array(["crude", "acq", "earn", "crude", "acq", "acq"])
    for labels, names, want in [
        (words, ["acq", "crude", "earn"], [1, 0, 2, 1, 0, 0]),
        (np.array([7, -1, 3, 7, -1, -1]), ["-1", "3", "7"], [2, 0, 1, 2, 0, 0]),
    ]:
        data = load_vectors(saved(tmp_path / "x.npz", features=rows, labels=labels), CPU)
        assert data.classes == names and data.labels.tolist() == want and data.labels.dtype == torch.int64


def test_vectors_come_in_the_order_asked_for():
    """Each view is the row itself; whole batches from the step asked for; fixed: all, in parts."""
    rows = random(1, 11, 4)
    loader = Vectors(Images("x", rows, None, None, [], (0.0,), (1.0,)), 4, 32, 32, CPU, 0, 5)
    order = torch.tensor([3, 9, 0, 7, 1, 10, 2, 5, 6, 8])
    assert loader.steps(order) == 2 and loader.steps() == 2
    got = list(loader.epoch(0, [None] * 3, order))
    assert [i.tolist() for i, _ in got] == [[3, 9, 0, 7], [1, 10, 2, 5]]
    for index, views in got:
        assert len(views) == 3 and all(torch.equal(v, rows[index]) for v in views)
    assert [i.tolist() for i, _ in loader.epoch(0, [None], order, start=1)] == [[1, 10, 2, 5]]
    parts = list(loader.fixed(torch.tensor([5, 4, 3, 2, 1])))
    assert torch.cat([i for i, _ in parts]).tolist() == [5, 4, 3, 2, 1]
    assert torch.equal(torch.cat([x for _, x in parts])[:, 0], rows[[5, 4, 3, 2, 1]])
    assert list(loader.fixed(torch.zeros(0, dtype=torch.int64))) == []


def images(n, labels=None, classes=(), paths=False, value=0):
    pixels = None if paths else torch.full((n, 1, 2, 2), value, dtype=torch.uint8)
    names = [f"{value}/{i}.png" for i in range(n)] if paths else None
    labels = None if labels is None else torch.tensor(labels)
    return Images("some", pixels, names, labels, list(classes), (0.5,), (0.2,))


def test_splits_are_joined_training_images_first():
    """Pixels or paths and labels in order, -1 for those without; classes of whichever has them."""
    train, test = images(3, [0, 1, 1], "ab", value=1), images(2, [1, 0], "ab", value=2)
    both = joined(train, test)
    assert both.pixels[:, 0, 0, 0].tolist() == [1, 1, 1, 2, 2] and both.labels.tolist() == [0, 1, 1, 1, 0]
    assert (len(both), both.classes, both.mean, len(train)) == (5, ["a", "b"], (0.5,), 3)
    both = joined(images(2, paths=True, value=1), images(2, [0, 1], "ab", paths=True, value=2))
    assert both.paths == ["1/0.png", "1/1.png", "2/0.png", "2/1.png"] and both.pixels is None
    assert both.labels.tolist() == [-1, -1, 0, 1] and both.classes == ["a", "b"]
    both = joined(images(2, [0, 1], "ab"), images(2))
    assert both.labels.tolist() == [0, 1, -1, -1] and both.classes == ["a", "b"]
    assert joined(images(2), images(1)).labels is None
    assert joined(train, None) is train
    assert splits_of(train, test) == {"train": slice(0, 3), "test": slice(3, 5), "both": slice(0, 5)}
    assert splits_of(train, None) == {"train": slice(0, 3)}


def test_confusion_counts_images():
    labels, found = torch.tensor([0, 0, 1, 1, 1, 2]), torch.tensor([3, 3, 0, 3, 0, 1])
    assert confusion(labels, found, 4, 3).tolist() == [[0, 0, 0, 2], [2, 0, 0, 1], [0, 1, 0, 0]]
    none = torch.zeros(0, dtype=torch.int64)
    assert confusion(none, none, 2, 3).tolist() == [[0, 0]] * 3


@pytest.mark.parametrize("rows,columns", [(4, 4), (3, 5), (5, 3), (1, 4), (4, 1)])
def test_matched_pairs_classes_and_clusters_for_the_most_images(rows, columns):
    """One to one, as many pairs as there can be, and of all such matchings the one with most images."""
    for seed in range(5):
        table = torch.from_numpy(rng(seed).integers(0, 30, (rows, columns)))
        pairs = matched(table)
        assert len(pairs) == min(rows, columns) and all(type(x) is int for pair in pairs for x in pair)
        assert len({r for r, _ in pairs}) == len({c for _, c in pairs}) == len(pairs)
        if rows <= columns:
            every = (list(enumerate(p)) for p in itertools.permutations(range(columns), rows))
        else:
            every = ([(r, c) for c, r in enumerate(p)] for p in itertools.permutations(range(rows), columns))
        best = max(sum(table[r, c].item() for r, c in one) for one in every)
        assert sum(table[r, c].item() for r, c in pairs) == best


def labelled(labels, classes):
    return Images(
        "some", None, ["x"] * len(labels), torch.tensor(labels), list(range(classes)), (0.5,), (0.2,)
    )


def test_confident_images_and_how_many_of_them_are_right():
    """Above 0.9; right under the matching that is best for all of the split's images, not for the sure ones alone."""
    labels = [0, 0, 0, 1, 1, 1, 0, 1]
    found = torch.tensor([1, 1, 1, 0, 0, 1, 1, 0])
    top = torch.tensor([0.95, 0.91, 0.9, 0.5, 0.99, 0.95, 0.3, 0.2])
    data, splits = labelled(labels, 2), {"train": slice(0, 6), "test": slice(6, 8), "both": slice(0, 8)}
    got = confident(data, splits, found, top, 2)
    assert got["train"] == {"share": pytest.approx(4 / 6), "accuracy": pytest.approx(3 / 4)}
    assert got["test"] == {"share": 0.0}
    assert got["both"] == {"share": pytest.approx(4 / 8), "accuracy": pytest.approx(3 / 4)}
    # The sure ones alone would match cluster 0 to class 0; all of them say otherwise.
    top = torch.tensor([0.1, 0.1, 0.1, 0.1, 0.1, 0.95, 0.1, 0.1])
    assert confident(data, splits, found, top, 2)["train"]["accuracy"] == 0.0
    assert confident(data, splits, found, top, 3)["both"] == {"share": pytest.approx(1 / 8), "accuracy": 0.0}
    data.labels[7] = -1
    assert "accuracy" not in confident(data, splits, found, top, 2)["both"]
    data.labels = None
    assert confident(data, splits, found, top, 2)["both"] == {"share": pytest.approx(1 / 8)}


def test_confident_images_of_a_cluster_without_a_class_are_wrong():
    """Three clusters for two classes, and two for three: who has no partner is not right."""
    data, splits = labelled([0, 0, 0, 1, 1], 2), {"train": slice(0, 5)}
    top = torch.tensor([0.95] * 4 + [0.5])
    got = confident(data, splits, torch.tensor([2, 2, 0, 1, 1]), top, 3)["train"]
    assert got == {"share": pytest.approx(4 / 5), "accuracy": pytest.approx(3 / 4)}
    data = labelled([0, 0, 1, 1, 2], 3)
    got = confident(data, splits, torch.tensor([1, 1, 0, 0, 0]), torch.full((5,), 0.99), 2)["train"]
    assert got == {"share": 1.0, "accuracy": pytest.approx(4 / 5)}


def test_scores_of_splits_with_labels():
    """ACC, NMI and ARI by hand, for more clusters than classes, too; nothing for a split that lacks labels."""
    data = labelled([0, 0, 1, 1, 0, 1], 2)
    splits = {"train": slice(0, 4), "test": slice(4, 6), "both": slice(0, 6)}
    found = torch.tensor([1, 1, 0, 1, 1, 0])
    got = scores(data, splits, found)
    assert set(got) == set(splits) and got["train"]["acc_labels"] == 3 / 4
    assert got["test"] == {"acc_labels": 1.0, "nmi_labels": pytest.approx(1), "ari_labels": 1.0}
    assert got["both"]["acc_labels"] == pytest.approx(5 / 6)
    assert scores(data, splits, torch.tensor([1, 2, 0, 0, 1, 0]))["train"]["acc_labels"] == 3 / 4
    data.labels[5] = -1
    assert set(scores(data, splits, found)) == {"train"}
    data.labels = None
    assert scores(data, splits, found) == {}


def test_summary_of_an_epoch():
    """Means over the steps; purity of the similar pairs; chance: the best one probability for all pairs."""
    args = settings("--batch-size", "11", "--neighbours", "3", "--k", "4")

    def best(share):  # no probability of being together is below 1 / K
        several = [1 / 4 + (1 - 1 / 4) * i / 30000 for i in range(1, 30000)]
        return min(-share * math.log(p) - (1 - share) * math.log(1 - p) for p in several)

    got = lsdc.summary([8.0, 6.0, 4.0, 2.0, 1.0], 4, True, True, args)
    share = (11 + 0.5 * 11 * 10) / 121  # each is similar to itself, too
    want = {"loss": 2, "loss_pairs": 1.5, "loss_consistency": 1, "similar": 0.5, "purity": 0.5}
    assert got == {k: pytest.approx(v) for k, v in want.items()} | {
        "chance": pytest.approx(best(share), abs=1e-4)
    }
    got = lsdc.summary([8.0, 6.0, 4.0, 0.2, 0.2], 4, True, False, args)
    assert "purity" not in got
    assert got["chance"] == pytest.approx(best((11 + 0.05 * 110) / 121), abs=1e-4)
    assert lsdc.summary([8.0, 6.0, 4.0, 0.0, 0.0], 4, True, True, args)["purity"] is None
    got = lsdc.summary([6.0, 2.0], 4, False, True, args)
    assert got == {"loss": 1.5, "turns_right": 0.5, "chance": pytest.approx(math.log(4))}


def test_the_baseline_learns_from_the_images_to_learn_from_alone(monkeypatch):
    """k-means sees the features of the first images; the nearest of its centroids are the clusters of all."""
    z = torch.tensor([[0.0], [1.0], [10.0], [11.0], [2.0], [9.0]])
    data = Images("x", z, None, torch.tensor([0, 0, 1, 1, 0, 0]), ["a", "b"], (0.0,), (1.0,))
    net, seen = SimpleNamespace(features=nn.Identity()), []

    def kmeans(x, k, gen):
        seen.append((x.tolist(), k))
        return SimpleNamespace(centroids=torch.tensor([[0.5], [10.5]]))

    monkeypatch.setattr(lsdc, "kmeans", kmeans)
    splits = {"train": slice(0, 4), "test": slice(4, 6)}
    args = SimpleNamespace(k=2, seed=0, amp=False)
    got = lsdc.baseline(net, Vectors(data, 2, 1, 1, CPU, 0), 4, splits, args, "untrained")
    assert seen == [([[0.0], [1.0], [10.0], [11.0]], 2)]
    assert got["train"]["acc_labels"] == 1 and got["test"]["acc_labels"] == 0.5


def test_filling_batch_norm_leaves_the_network_alone():
    """The copy has the statistics of the first 256 images; weights and the network itself are as they were."""
    data = Images("some", (uniform(1, 300, 1, 16, 16) * 255).byte(), None, None, [], (0.4,), (0.3,))
    torch.manual_seed(2)
    net = Network(backbone("lenet5", 1, 16, norm=True), 3, 1)
    before = {k: v.clone() for k, v in net.state_dict().items()}
    other = lsdc.filled(net, Loader(data, 50, 16, 16, CPU, 0))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    maps = net.features[0].features[0]((data.pixels[:256].float() / 255 - 0.4) / 0.3)
    norm = other.features[0].features[1]
    torch.testing.assert_close(norm.running_mean, maps.mean((0, 2, 3)), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(norm.running_var, maps.var((0, 2, 3)), atol=1e-4, rtol=1e-3)
    assert all(torch.equal(w, before[k]) for k, w in other.named_parameters())


# --------------------------------------------------------------------------- options


def values(args, names):
    return [getattr(args, name) for name in names.split()]


TABLE = {  # data: optimiser, epochs, steps, rate, lambda, T of supplementary, table 1
    "cifar10": ("sgd", 220, [140, 180], 0.1, 5, 100),
    "cifar100-20": ("sgd", 200, [170], 0.1, 25, 150),
    "stl10": ("sgd", 200, [140, 180], 0.1, 5, 50),
    "mnist": ("sgd", 15, [], 0.1, 5, 50),
    "reuters.npz": ("adam", 75, [], 0.001, 25, 100),
}


@pytest.mark.parametrize("data", TABLE)
def test_recipes_are_the_papers_table(data):
    args = options(["--data", data])
    got = values(args, "optimizer epochs lr_steps lr consistency ramp_up")
    assert tuple(got) == TABLE[data] and values(args, "batch_size momentum") == [256, 0.9]


def test_recipes_of_the_labelings():
    """Thresholds and temperatures of the table; the paper's k counts the image itself and, strictly, stops before it."""
    names = "neighbours cosine_threshold sne_threshold sne_temperature"
    assert values(options(["--data", "cifar10"]), names) == [20 - 2, 0.9, 0.01, 1.0]
    assert values(options(["--data", "cifar100-20"]), names) == [10 - 2, 0.95, 0.01, 0.5]
    assert values(options(["--data", "stl10"]), "labeling sne_threshold sne_temperature") == [
        "sne",
        0.01,
        0.5,
    ]
    assert options(["--data", "mnist"]).neighbours == 10 - 2
    assert options(["--data", "reuters.npz"]).neighbours == 5 - 2
    for data in ("cifar10", "cifar100-20", "mnist", "reuters.npz"):
        assert options(["--data", data]).labeling == "knn"


def test_cifar_is_run_as_in_the_paper():
    """ResNet-18, three of four stages frozen, RICAP, RotNet's rates, crops with four pixels of padding, all images."""
    args = options(["--data", "cifar10"])
    names = "arch k freeze_stages mix wd pad flip image_size train_on classifier_layers freeze_bn recipe"
    want = ["resnet18", 10, 3, "ricap", 5e-4, 4, True, 32, "both", 1, False, "cifar10"]
    assert values(args, names) == want
    names = "pretrain pretrain_epochs pretrain_lr pretrain_lr_steps pretrain_batch_size pretrain_wd"
    assert values(args, names) == ["rotnet", 200, 0.1, [60, 120, 160], 128, 5e-4]
    assert options(["--data", "cifar100-20"]).k == 20 and options(["--data", "svhn"]).flip is False
    args = options(["--data", "stl10"])
    assert values(args, "image_size arch k") == [96, "resnet18", 10]


@pytest.mark.parametrize("data", [*list(TABLE)[:4], "svhn", "fashionmnist", "digits", "some/folder"])
def test_mixup_has_a_smaller_weight_decay(data):
    """1e-4 with --mix mixup and the paper's 5e-4 with patches, unless told otherwise."""
    for kind, decay in (("mixup", 1e-4), ("ricap", 5e-4)):
        assert options(["--data", data, "--mix", kind]).wd == decay
        assert options(["--data", data, "--mix", kind, "--wd", "0.3"]).wd == 0.3


@pytest.mark.parametrize("data", [*TABLE, "svhn", "fashionmnist", "digits", "some/folder"])
def test_a_flag_with_its_own_default_changes_nothing(data):
    """--mix, --labeling, --recipe and --image-size as they are without them."""
    args = options(["--data", data])
    for name in ("mix", "labeling", "recipe", "image_size"):
        flag = [f"--{name.replace('_', '-')}", str(getattr(args, name))]
        assert options(["--data", data, *flag]) == args, flag


def test_defaults_for_digits_folders_and_vectors():
    """A laptop's, photographs', and the Reuters network, which has no patches and no angles."""
    args = options(["--data", "digits"])
    names = "arch k train_on flip pretrain pretrain_epochs out recipe image_size resize"
    assert values(args, names) == [
        "lenet5",
        10,
        "train",
        False,
        "none",
        0,
        "runs/lsdc-digits",
        "digits",
        32,
        32,
    ]
    args = options(["--data", "my/photos/"])
    assert values(args, "pretrain out recipe pad flip") == ["rotnet", "runs/lsdc-photos", "photos", 0, True]
    args = options(["--data", "some/reuters.npz"])
    names = "arch k mix pretrain out recipe flip"
    assert values(args, names) == ["mlp", 4, "none", "none", "runs/lsdc-reuters", "reuters", False]
    args = options(["--data", "digits", "--labeling", "sne"])
    assert args.out == "runs/lsdc-digits-sne"
    assert options(["--data", "digits", "--labeling", "knn"]).out == "runs/lsdc-digits"


def test_flags_override_recipes():
    """Another data set's recipe by name; single numbers by flags; the resize follows the image size."""
    args = options(
        ["--data", "cifar10", "--k", "7", "--neighbours", "4", "--no-flip", "--lr-steps", "5", "9"]
    )
    assert values(args, "k neighbours flip lr_steps epochs") == [7, 4, False, [5, 9], 220]
    assert options(["--data", "cifar10", "--lr-steps"]).lr_steps == []
    args = options(["--data", "some/folder", "--recipe", "cifar100-20"])
    assert values(args, "arch k image_size recipe data consistency")[1:] == [
        20,
        32,
        "cifar100-20",
        "some/folder",
        25,
    ]
    args = options(["--data", "some/folder", "--image-size", "224"])
    assert values(args, "image_size resize") == [224, 256]
    args = options(["--data", "digits", "--image-size", "28"])
    assert values(args, "image_size resize") == [28, 28]
    args = options(["--data", "digits", "--pretrain", "rotnet", "--pretrain-epochs", "3"])
    assert values(args, "pretrain pretrain_epochs") == ["rotnet", 3]
    args = options(["--data", "cifar10", "--backbone", "some/run"])
    assert values(args, "pretrain pretrain_epochs backbone") == ["none", 0, "some/run"]
    assert options(["--data", "cifar10", "--pretrain", "none"]).pretrain_epochs == 0


@pytest.mark.parametrize("data", sorted(lsdc.RECIPES))
def test_recipes_fit_themselves(data):
    """Accepted as they are, with neighbours fewer than a batch's images of a cluster."""
    if data in ("reuters", "photos"):
        data = {"reuters": "x.npz", "photos": "some/folder"}[data]
    args = options(["--data", data])
    assert 1 <= args.neighbours < args.batch_size / args.k
    assert all(s < args.epochs for s in args.lr_steps)
    assert args.pretrain == "none" or all(s < args.pretrain_epochs for s in args.pretrain_lr_steps)


WRONG = {  # flag: what the command line refuses
    "cosine-threshold": "-1.01 1.01 nan inf",
    "sne-threshold": "-0.01 1.01 nan",
    "sne-temperature": "0 -1 nan inf",
    "crop-area": "0 -0.2 1.01 nan",
    "momentum": "-0.1 1 nan",
    "consistency": "-1 nan inf",
    "lr": "-0.1 nan inf",
    "wd": "-0.1 nan inf",
    "pretrain-lr": "-0.1 nan inf",
    "pretrain-wd": "-0.1 nan inf",
    "lr-steps": "0 -4 1.5 nan",
    "pretrain-lr-steps": "0 -4 1.5 nan",
    "resize": "0 31 many",
    "neighbours": "256 257 many",
    "labeling": "dbscan KNN",
    "mix": "cutmix RICAP",
    "optimizer": "lars SGD",
    "train-on": "test all",
    "pretrain": "simclr RotNet",
    "classifier-layers": "0 3 two",
    "arch": "resnet mlp",
    "recipe": "imagenet",
    "seed": "1.5 many",
}
COUNTS = (
    "k epochs batch-size image-size save-every score-every pretrain-epochs pretrain-batch-size neighbours"
)
for _flag in COUNTS.split():
    WRONG[_flag] = WRONG.get(_flag, "") + " 0 -3 1.5 many nan"
WRONG["batch-size"] += " 1"  # no pair in it
for _flag in ("workers", "max-bad", "ramp-up", "pad", "freeze-stages"):
    WRONG[_flag] = "-1 0.5 nan"
TOGETHER = {  # words of the message: arguments
    "--neighbours 20": ["--neighbours", "20", "--batch-size", "20"],
    "--neighbours 7": ["--neighbours", "7", "--batch-size", "2"],
    "--resize 40 --image-size 48": ["--image-size", "48", "--resize", "40"],
    "--arch lenet5 mlp": ["--data", "x.npz", "--arch", "lenet5"],
    "--arch mlp": ["--data", "cifar10", "--arch", "mlp"],
    "--arch resnet18": ["--data", "x.npz", "--recipe", "cifar10"],
    "--arch mlp images": ["--data", "digits", "--recipe", "reuters"],
    "--mix ricap vectors": ["--data", "x.npz", "--mix", "ricap"],
    "--pretrain rotnet vectors": ["--data", "x.npz", "--pretrain", "rotnet"],
    "--backbone vectors": ["--data", "x.npz", "--backbone", "run"],
    "--labelling": ["--labelling", "knn"],
}


@pytest.mark.parametrize("flag", WRONG)
def test_impossible_values_end_with_exit_code_2_and_one_line(flag, capsys, monkeypatch):
    """The line names the flag."""
    monkeypatch.setattr("sys.argv", ["lsdc.py"])
    for value in WRONG[flag].split():
        line = refusal(options, ["--data", "digits", f"--{flag}={value}"], capsys)
        assert line.startswith("lsdc.py: error: ") and f"--{flag}" in line, (value, line)


@pytest.mark.parametrize("words", TOGETHER)
def test_what_does_not_fit_together_is_refused(words, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["lsdc.py"])
    line = refusal(options, ["--data", "digits", *TOGETHER[words]], capsys)
    assert not [word for word in words.split() if word not in line], line


def test_what_is_possible_is_not_refused():
    """The ends of the ranges; neighbours count for one labeling alone."""
    for flags in [
        ["--neighbours", "255"],
        ["--neighbours", "1", "--batch-size", "2"],
        ["--neighbours", "300", "--labeling", "cosine"],
        ["--cosine-threshold", "1", "--sne-threshold", "1"],
        ["--cosine-threshold", "-1", "--sne-threshold", "0", "--sne-temperature", "1e-3"],
        ["--ramp-up", "0", "--consistency", "0", "--lr", "0", "--wd", "0", "--momentum", "0", "--pad", "0"],
        ["--freeze-stages", "0", "--crop-area", "1", "--workers", "0", "--max-bad", "0"],
        ["--k", "1", "--epochs", "1", "--lr-steps", "--pretrain", "none"],
        ["--data", "x.npz", "--mix", "mixup", "--labeling", "cosine"],
        ["--data", "x.npz", "--arch", "mlp", "--recipe", "digits"],
    ]:
        options(["--data", "digits", *flags])


def test_help_shows_what_would_run(capsys, monkeypatch):
    """Every flag with the default of the data, the recipe and the mixture that were given."""
    monkeypatch.setattr("sys.argv", ["lsdc.py"])
    for flags, shown in [
        (["--data", "cifar10"], ["default: resnet18", "default: 220)", "default: 0.0005)", "lsdc-cifar10)"]),
        (["--data", "cifar10", "--mix", "mixup"], ["default: 0.0001)"]),
        (["--data", "reuters.npz"], ["default: mlp", "default: 75)", "runs/lsdc-reuters)"]),
        (["--data", "cifar10", "--labeling", "sne"], ["runs/lsdc-cifar10-sne)"]),
    ]:
        with pytest.raises(SystemExit) as end:
            options([*flags, "--help"])
        out = " ".join(capsys.readouterr().out.split())
        assert end.value.code == 0 and not [s for s in shown if s not in out], flags


class Some(list):
    """So many images of so many classes, perhaps with pixels of some size."""

    def __init__(self, n, classes, size=None):
        super().__init__(range(n))
        self.classes, self.labels = list(range(classes)), torch.zeros(n) if classes else None
        self.pixels = None if size is None else torch.zeros(n, 1, *size)


FITS = ["--batch-size", "20", "--k", "5", "--neighbours", "3", "--epochs", "9", "--lr-steps", "5"]
FITS += ["--pad", "0", "--crop-area", "0.8", "--labeling", "knn", "--image-size", "32", "--resize", "32"]


@pytest.mark.parametrize(
    "flags,data,words",
    [
        ([], Some(100, 5), []),
        ([], Some(100, 0), []),
        ([], Some(100, 7), ["7 classes", "--k is 5"]),
        (["--neighbours", "4"], Some(100, 5), ["WARNING", "4 neighbours", "--batch-size"]),
        (["--neighbours", "4", "--labeling", "cosine"], Some(100, 5), []),
        (["--lr-steps", "5", "9"], Some(100, 5), ["--lr-steps 9", "9 epochs"]),
        (["--lr-steps", "5", "8"], Some(100, 5), []),
        (["--crop-area", "1"], Some(100, 5), ["WARNING", "--crop-area 1"]),
        (["--pad", "2", "--crop-area", "1"], Some(100, 5, (32, 32)), []),
    ],
)
def test_what_is_warned_of(flags, data, words, capsys):
    """Other numbers of classes and clusters, too many neighbours, steps never reached: said, in one line, and run."""
    lsdc.check(settings(*FITS, *flags), data, len(data))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == (len(words) > 0) and not [w for w in words if w not in said[0]], said


@pytest.mark.parametrize(
    "flags,data,words",
    [
        (["--k", "101", "--neighbours", "1"], Some(100, 5), ["--k 101", "100"]),
        (["--batch-size", "101"], Some(100, 5), ["--batch-size 101", "100"]),
        (
            ["--pretrain", "rotnet", "--pretrain-batch-size", "101"],
            Some(100, 5),
            ["--pretrain-batch-size 101"],
        ),
        (["--pad", "2"], Some(100, 5), ["--pad 2"]),
        (["--pad", "2"], Some(100, 5, (27, 40)), ["--pad 2", "32"]),
        (["--pad", "2"], Some(100, 5, (32, 40)), ["--pad 2", "32"]),
        (["--pad", "2"], Some(100, 5, ()), ["--pad 2"]),
    ],
)
def test_what_does_not_fit_the_data_is_refused(flags, data, words, capsys):
    """Exit code 2 and one line."""
    with pytest.raises(SystemExit) as end:
        lsdc.check(settings(*FITS, *flags), data, len(data))
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2 and not [w for w in words if w not in line], line


def test_rotnets_batch_counts_with_rotnet_alone():
    """As many as there are images is accepted; without pretraining its batch may be of any size."""
    lsdc.check(settings(*FITS, "--batch-size", "100", "--pretrain-batch-size", "101"), Some(100, 5), 100)
    flags = ["--pretrain", "rotnet", "--pretrain-batch-size", "100"]
    lsdc.check(settings(*FITS, *flags), Some(100, 5), 100)


def test_files_of_the_script_are_swept_by_overwrite():
    """What a run leaves is known to the run folder, so that --overwrite leaves nothing of an earlier one."""
    assert {"rotnet.pt", "confusion.json", "confusion.png", "backbone.pt"} <= set(legacy.FILES)
