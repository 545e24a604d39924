"""deepcluster.py: its functions against plain loops, its optimisation against formulas, whole runs."""

import functools
import math
import os
import signal
import subprocess
import sys
import weakref
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jobs
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from jobs import (
    ONE_THREAD,
    ROOT,
    contents,
    copied,
    epochs,
    one_line,
    plain_nmi,
    read_assignments,
    read_log,
    two_at_once,
    wait_for,
    without_times,
    write_images,
)
from PIL import Image
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common import Images, Loader, load_backbone, load_data, save_backbone
from deepcluster import (
    deep_features,
    loss_weights,
    make_body,
    make_head,
    neighbour_graph,
    options,
    power_iteration_clustering,
    train,
    uniform_over_clusters,
)

SCRIPT = ROOT / "deepcluster.py"
QUICK = ["--epochs", "4", "--k", "20", "--batch-size", "128"]  # 11 steps an epoch
QUICK += ["--image-size", "20", "--resize", "20", "--out", "run"]
STEPS = 1437 // 128
trap = functools.partial(jobs.trap, "deepcluster")


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """The real launcher, started when the whole run is through, looked at in the end."""
    folder = tmp_path_factory.mktemp("torchrun")
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command = [sys.executable, *launcher, str(SCRIPT), *QUICK, "--epochs", "2"]
    with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
        environment = {**os.environ, **ONE_THREAD}
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=err)
    yield process, folder
    if process.poll() is None:
        process.terminate()  # the launcher ends its processes
    process.wait(60)


@pytest.fixture(scope="module")
def whole(start):
    """The quick run from beginning to end without interruption."""
    return start(QUICK).ok()


@pytest.fixture(scope="module")
def defaults(start):
    """`python deepcluster.py`, on its way while other tests run."""
    return start([])


# --------------------------------------------------------------------------- drawing over clusters


def random_assignment(gen, n, k):
    """(n,) ids below 3k, of which about k occur, with very unequal sizes."""
    ids = torch.randperm(3 * k, generator=gen)[:k]
    odds = torch.rand(k, generator=gen) ** 4 + 1e-3
    return ids[torch.multinomial(odds, n, replacement=True, generator=gen)]


def test_draws_are_n_images_at_most_the_quota_of_each_cluster():
    """N positions; floor(N/K')+1 of each occurring cluster, of which the cut takes some away."""
    gen = torch.Generator().manual_seed(0)
    for n, k in [(1, 1), (7, 3), (50, 50), (200, 12), (1000, 90)]:
        for _ in range(10):
            assign = random_assignment(gen, n, k)
            before = assign.clone()
            order = uniform_over_clusters(assign, gen)
            assert order.shape == (n,) and order.dtype == torch.int64 and torch.equal(assign, before)
            assert order.min() >= 0 and order.max() < n
            sizes = Counter(assign.tolist())
            quota = n // len(sizes) + 1
            drawn = Counter(assign[order].tolist())
            left = [quota - drawn[c] for c in sizes]
            assert min(left) >= 0 and sum(left) == quota * len(sizes) - n


def test_a_cluster_larger_than_the_quota_repeats_no_image():
    """Nothing is drawn twice where there are enough images; where there are not, everything comes again."""
    assign = torch.cat([torch.zeros(600), torch.ones(300), torch.full((100,), 9)]).long()
    order = uniform_over_clusters(assign, torch.Generator().manual_seed(1))  # quota 334
    times = torch.bincount(order, minlength=1000)
    assert times[:600].max() == 1
    assert times[600:900].max() > 1 and times[900:].max() > 1


def test_share_of_a_cluster_does_not_depend_on_its_size():
    """Clusters of 1, 10, 100 and 1000 images are drawn N/4 times each in the mean."""
    assign = torch.cat([torch.full((s,), c) for c, s in enumerate([1, 10, 100, 1000])])
    gen = torch.Generator().manual_seed(2)
    counts = torch.stack([torch.bincount(assign[uniform_over_clusters(assign, gen)]) for _ in range(300)])
    mean, error = counts.double().mean(0), counts.double().std(0) / math.sqrt(300)
    assert ((mean - len(assign) / 4).abs() <= 4 * error + 1e-9).all(), mean


def test_images_of_a_cluster_are_drawn_alike_and_independently():
    """In a large and in a small cluster every member comes as often; the small one's draws are with replacement."""
    assign = torch.cat([torch.zeros(40), torch.ones(4)]).long()  # quota 23, one or two are cut away
    gen = torch.Generator().manual_seed(3)
    times = torch.stack(
        [torch.bincount(uniform_over_clusters(assign, gen), minlength=44) for _ in range(2000)]
    )
    mean = times.double().mean(0)
    assert (mean[:40] - 22 / 40).abs().max() < 5 * math.sqrt(0.25 / 2000)
    assert (mean[40:] - 22 / 4).abs().max() < 5 * math.sqrt(22 * 3 / 16 / 2000)
    # binomial: 22 draws of which a quarter hit a given image; a fixed rotation would vary by less than 1
    assert (times[:, 40:].double().var(0) - 22 * 3 / 16).abs().max() < 0.8


def test_the_order_is_shuffled_over_clusters():
    """The clusters follow each other at random: their draws lie in the middle of the epoch in the mean."""
    assign = torch.arange(1000) % 10 // 2
    order = uniform_over_clusters(assign, torch.Generator().manual_seed(4))
    place = torch.arange(1000.0)
    for c in range(5):
        mine = place[assign[order] == c]
        assert abs(mine.mean() - 499.5) < 5 * 1000 / math.sqrt(12 * len(mine))
    assert len(set(assign[order][:20].tolist())) > 2


def test_draws_with_one_cluster_with_n_clusters_and_with_the_same_generator():
    """The two ends work, and the generator alone decides."""
    one = uniform_over_clusters(torch.full((30,), 7), torch.Generator().manual_seed(5))
    assert len(one) == 30 and set(one.tolist()) <= set(range(30)) and len(set(one.tolist())) > 5
    each = uniform_over_clusters(torch.randperm(30), torch.Generator().manual_seed(5))
    assert len(each) == 30 and max(Counter(each.tolist()).values()) <= 2

    assign = random_assignment(torch.Generator().manual_seed(6), 300, 9)
    a, b, c = (uniform_over_clusters(assign, torch.Generator().manual_seed(s)) for s in (0, 0, 1))
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_draws_do_not_follow_the_sizes_of_clusters():
    """Sizes of 1 to 300: no correlation between size and draws (the released code: 0.97)."""
    gen = torch.Generator().manual_seed(7)
    sizes = torch.cat([torch.arange(1, 101), torch.randint(1, 300, (100,), generator=gen)])
    assign = torch.arange(200).repeat_interleave(sizes)
    draws = sum(torch.bincount(assign[uniform_over_clusters(assign, gen)]) for _ in range(20))
    assert abs(np.corrcoef(sizes.numpy(), draws.numpy())[0, 1]) < 0.2
    assert draws.min() > 0.97 * draws.double().mean() and draws.max() < 1.03 * draws.double().mean()


def test_loss_weights_are_one_over_the_size_of_the_cluster_with_mean_1():
    """Against a loop; ids that never occur do not matter."""
    gen = torch.Generator().manual_seed(8)
    for n, k in [(1, 1), (9, 9), (60, 5), (300, 40)]:
        assign = random_assignment(gen, n, k)
        sizes = Counter(assign.tolist())
        want = [1 / sizes[c] for c in assign.tolist()]
        want = torch.tensor([w * n / sum(want) for w in want])
        torch.testing.assert_close(loss_weights(assign), want)
        assert abs(loss_weights(assign).mean().item() - 1) < 1e-5


def test_weighting_the_loss_has_the_gradient_of_uniform_sampling():
    """Weighted full-batch gradient = mean over clusters of the mean over their members: 3.3's equivalence."""
    gen = torch.Generator().manual_seed(9)
    assign = torch.tensor([0, 0, 0, 0, 0, 0, 2, 2, 5])
    x = torch.randn(9, 4, generator=gen, dtype=torch.float64)
    v = torch.randn(6, 4, generator=gen, dtype=torch.float64, requires_grad=True)
    loss = (loss_weights(assign).double() * F.cross_entropy(x @ v.T, assign, reduction="none")).mean()
    got = torch.autograd.grad(loss, v)[0]

    want = torch.zeros(6, 4, dtype=torch.float64)
    p = (x @ v.detach().T).softmax(1)
    for c in (0, 2, 5):
        members = [i for i in range(9) if assign[i] == c]
        for i in members:
            for k in range(6):
                want[k] += (p[i, k] - float(k == c)) * x[i] / len(members) / 3
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-8)


# --------------------------------------------------------------------------- power iteration clustering


def plain_pic(ids, distance, sigma=0.2, a=0.001, iterations=200):
    """(cluster of each point, how many were alone before they joined one), in plain loops."""
    n = len(ids)
    A = [[0.0] * n for _ in range(n)]
    for i in range(n):
        for j, d in zip(ids[i], distance[i], strict=True):
            A[i][j] = math.exp(-d / sigma**2)
    W = [[A[i][j] + A[j][i] for j in range(n)] for i in range(n)]
    v = [1 / n] * n
    for _ in range(iterations):
        v = [a * sum(W[j][i] * v[j] for j in range(n) if W[j][i]) + (1 - a) / n for i in range(n)]
        v = [value / sum(v) for value in v]
    up = list(range(n))
    for i in range(n):
        best = 0.0
        for j in range(n):
            gain = W[i][j] * (v[j] - v[i])
            if gain > best:
                best, up[i] = gain, j
    top = []
    for i in range(n):
        while up[i] != up[up[i]]:
            up[i] = up[up[i]]
        top.append(up[i])
    size = Counter(top)
    result = list(top)
    for i in range(n):
        if size[top[i]] == 1:
            for j in ids[i]:  # nearest first
                if size[top[j]] > 1:
                    result[i] = top[j]
                    break
    return result, sum(s == 1 for s in size.values())


def brute_neighbours(z, k):
    """ids and squared distances of the k nearest other rows, in plain loops."""
    ids, distances = [], []
    for i in range(len(z)):
        pairs = sorted(
            (sum((float(p) - float(q)) ** 2 for p, q in zip(z[i], z[j], strict=True)), j)
            for j in range(len(z))
            if j != i
        )[:k]
        ids.append([j for _, j in pairs])
        distances.append([d for d, _ in pairs])
    return ids, distances


def same_partition(a, b):
    return len(set(zip(a, b, strict=True))) == len(set(a)) == len(set(b))


def hub():
    """Five groups of a centre and two leaves; every leaf is also, weakly, tied to point 0 in the middle.

    0 has more edges than the leaves, so it follows nobody, and nobody follows it: it is alone, and the
    nearest of its neighbours is leaf 8, in the third group.
    """
    groups = [[c, c + 1, c + 2] for c in range(1, 16, 3)]
    ids, distance = [[8, 2]], [[0.05, 0.06]]
    for centre, a, b in groups:
        ids += [[a, b], [centre, 0], [centre, 0]]
        distance += [[0.01, 0.01], [0.01, 0.06], [0.01, 0.06]]
    return ids, distance, groups


def test_power_iteration_clustering_is_its_formula_in_plain_loops():
    """Random graphs, with a point alone, too; clusters are numbered 0, 1, .. without gaps."""
    gen = torch.Generator().manual_seed(10)
    graphs = []
    for n, dim in [(12, 2), (30, 2), (40, 3), (40, 4), (50, 3), (45, 6)]:
        graphs.append(brute_neighbours(F.normalize(torch.randn(n, dim, generator=gen), dim=1), 5))
    for n, k, scale in [(30, 2, 0.1), (40, 3, 0.2), (45, 1, 0.1)]:
        others = [torch.tensor([j for j in range(n) if j != i]) for i in range(n)]
        ids = [o[torch.randperm(n - 1, generator=gen)[:k]].tolist() for o in others]
        graphs.append((ids, (scale * torch.rand(n, k, generator=gen)).sort(1).values.tolist()))
    graphs.append(hub()[:2])
    lonely = several = 0
    for ids, distance in graphs:
        want, alone = plain_pic(ids, distance)
        got = power_iteration_clustering(torch.tensor(ids), torch.tensor(distance)).tolist()
        assert same_partition(got, want)
        assert sorted(set(got)) == list(range(len(set(got))))
        lonely, several = lonely + alone, several + (len(set(got)) > 1)
    assert lonely == 1 and several > 6


def test_power_iteration_clustering_by_hand():
    """Points follow their centre, which has more and heavier edges; one alone joins its nearest neighbour's."""
    ids = torch.tensor([[1], [0], [0], [0], [5], [4], [4], [4]])
    assign = power_iteration_clustering(ids, torch.full((8, 1), 0.01)).tolist()
    assert len(set(assign[:4])) == 1 and len(set(assign[4:])) == 1 and assign[0] != assign[4]

    ids, distance, groups = hub()
    groups[2].append(0)
    assign = power_iteration_clustering(torch.tensor(ids), torch.tensor(distance)).tolist()
    assert {tuple(sorted(i for i in range(16) if assign[i] == c)) for c in set(assign)} == {
        tuple(sorted(g)) for g in groups
    }


def test_power_iteration_clustering_never_joins_two_separate_groups():
    """No edge leads from one group to the other, so no cluster does."""
    gen = torch.Generator().manual_seed(11)
    centre = torch.eye(6)[:2].repeat_interleave(25, 0)
    z = F.normalize(centre + 0.05 * torch.randn(50, 6, generator=gen), dim=1)
    z = z[torch.randperm(50, generator=gen)]
    assign = power_iteration_clustering(*neighbour_graph(z))
    first = z[:, 0] > z[:, 1]
    assert not set(assign[first].tolist()) & set(assign[~first].tolist())
    assert assign.shape == (50,) and assign.dtype == torch.int64


def test_neighbour_graph_is_the_brute_force_one():
    """The k nearest others, nearest first, with squared distances; all others where there are fewer."""
    z = torch.randn(60, 5, generator=torch.Generator().manual_seed(12))
    for rows, k in [(60, 5), (60, 1), (4, 5), (2, 5)]:
        ids, distance = neighbour_graph(z[:rows], k)
        want_ids, want = brute_neighbours(z[:rows], k)
        assert ids.tolist() == want_ids
        torch.testing.assert_close(distance, torch.tensor(want), rtol=1e-4, atol=1e-5)


def test_an_image_is_not_its_own_neighbour_even_among_copies():
    """Ten copies of one image, three of another: nobody is named twice or finds itself."""
    gen = torch.Generator().manual_seed(13)
    z = torch.randn(30, 4, generator=gen)
    z[3:13], z[20:23] = z[3].clone(), z[20].clone()
    ids, distance = neighbour_graph(z)
    for i in range(30):
        row = ids[i].tolist()
        assert i not in row and len(set(row)) == 5
        want = sorted((z[i] - z[j]).square().sum().item() for j in range(30) if j != i)[:5]
        torch.testing.assert_close(distance[i], torch.tensor(want), rtol=1e-3, atol=1e-5)


# --------------------------------------------------------------------------- head and body


def test_head_starts_small_without_bias_and_by_its_key():
    """ReLU, then weights N(0, 0.01) and bias 0 [1, step 4]; the key decides."""
    head = make_head(300, 200, 0, 3)
    weight = head[1].weight
    assert weight.shape == (200, 300) and head[1].bias.eq(0).all()
    assert abs(weight.std().item() / 0.01 - 1) < 0.02 and abs(weight.mean().item()) < 2e-4
    assert abs(((weight / 0.01) ** 4).mean().item() - 3) < 0.2  # normal, not uniform
    x = torch.randn(5, 300)
    torch.testing.assert_close(head(x), torch.where(x > 0, x, 0.0) @ weight.T)
    assert torch.equal(weight, make_head(300, 200, 0, 3)[1].weight)
    assert not torch.equal(weight, make_head(300, 200, 0, 4)[1].weight)


def body_of(*arguments, device="cpu"):
    """(trunk, body, arguments); device "meta": shapes only, at no cost."""
    args = options(["--data", "somewhere", *arguments])  # a folder: the ImageNet recipe
    torch.manual_seed(0)
    with torch.device(device):
        return (*make_body(args, 3), args)


SMALL = ["--resize", "64", "--image-size"]


@pytest.fixture(scope="module")
def resnet_b():
    return body_of("--arch", "resnet18", *SMALL, "32", "--dropout", "0.25")


@pytest.mark.parametrize(("arch", "flat", "size"), [("alexnet", 9216, 64), ("vgg16", 25088, 32)])
def test_the_feature_is_4096_numbers_before_the_relu(arch, flat, size):
    """fc7 before its ReLU [1, step 1]: both signs occur; body and trunk are one; pool5 is 9216 or 25088 wide."""
    trunk, body, _ = body_of("--arch", arch, *SMALL, str(size))
    with torch.no_grad():
        x = body.eval()(torch.randn(2, 3, size, size))
    assert trunk is body and body.dim == 4096 and x.shape == (2, 4096)
    assert 0.2 < (x < 0).float().mean() < 0.8
    _, body, _ = body_of("--arch", arch, device="meta")
    assert body(torch.empty(2, 3, 224, 224, device="meta")).shape == (2, 4096)
    assert next(m for m in body.classifier if isinstance(m, nn.Linear)).in_features == flat


def hidden_layers(net):
    shown = {nn.Dropout: lambda m: m.p, nn.Linear: lambda m: m.out_features, nn.ReLU: lambda m: None}
    return [(type(m).__name__, shown[type(m)](m)) for m in net]


def test_dropout_stands_where_the_papers_put_it(resnet_b):
    """AlexNet: dropout-4096-ReLU-dropout-4096; VGG: 4096-ReLU-dropout-4096; ResNet B like AlexNet."""
    drop, relu, wide = ("Dropout", 0.5), ("ReLU", None), ("Linear", 4096)
    nets = {arch: body_of("--arch", arch, device="meta")[1] for arch in ("alexnet", "vgg16")}
    assert hidden_layers(nets["alexnet"].classifier) == [drop, wide, relu, drop, wide]
    assert hidden_layers(nets["vgg16"].classifier) == [wide, relu, drop, wide]
    trunk, body, _ = resnet_b
    less = ("Dropout", 0.25)
    assert hidden_layers(body[1]) == [less, wide, relu, less, wide]
    for convolutions in (trunk, nets["alexnet"].features, nets["vgg16"].features):
        assert not any(isinstance(m, nn.Dropout) for m in convolutions.modules())


def test_resnet_a_is_the_flattened_map_and_b_two_layers_of_4096(resnet_b):
    """No pooling, no fc; B for ResNet-18 and A for ResNet-50 unless told [Local Aggregation, suppl. 2.2]."""
    images = torch.empty(2, 3, 224, 224, device="meta")
    for arch, flag, fmap, dim in [
        ("resnet18", ["--resnet-head", "A"], 512 * 49, 512 * 49),
        ("resnet18", [], 512 * 49, 4096),
        ("resnet50", [], 2048 * 49, 2048 * 49),
    ]:
        trunk, body, args = body_of("--arch", arch, *flag, device="meta")
        assert trunk(images).shape == (2, fmap) and body(images).shape == (2, dim), (arch, flag)
        assert body.dim == dim and (trunk is body) == (dim == fmap)
        assert not any(isinstance(m, nn.AdaptiveAvgPool2d) for m in body.modules())
        assert sum(isinstance(m, nn.Linear) for m in body.modules()) == 2 * (dim == 4096)
    _, body, _ = resnet_b
    with torch.no_grad():
        x = body.eval()(torch.randn(2, 3, 32, 32))
    assert 0.2 < (x < 0).float().mean() < 0.8  # before the head's ReLU
    assert abs(body[1][1].weight.std().item() / 0.01 - 1) < 0.01 and body[1][1].bias.eq(0).all()


def test_sobel_removes_colour_and_is_not_trained():
    """With it the order of the channels does not matter; without it, it does."""
    x = torch.randn(2, 3, 32, 32)
    for flag, channels in (("--sobel", 2), ("--no-sobel", 3)):
        _, body, _ = body_of("--arch", "alexnet-small", *SMALL, "32", flag)
        with torch.no_grad():
            a, b = body.eval()(x), body(x[:, [2, 0, 1]])
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5) == (flag == "--sobel")
        assert body.features[0].in_channels == channels
        assert not list(body.sobel.parameters()) and not any("sobel" in k for k in body.state_dict())


def test_the_trunk_has_torchvisions_names():
    """vgg16 is vgg16_bn without its last layer, resnet18 is resnet18 without fc, key for key and shape for shape."""
    with torch.device("meta"):
        theirs = {"vgg16": torchvision.models.vgg16_bn(), "resnet18": torchvision.models.resnet18()}
    for arch, last in {"vgg16": "classifier.6.", "resnet18": "fc."}.items():
        trunk, _, _ = body_of("--arch", arch, "--no-sobel", device="meta")
        want = {k: v.shape for k, v in theirs[arch].state_dict().items() if not k.startswith(last)}
        assert {k: v.shape for k, v in trunk.state_dict().items()} == want


@pytest.mark.parametrize("arch", ["alexnet-small", "vgg16"])
def test_a_backbone_trained_without_dropout_can_be_loaded(arch, tmp_path):
    """--dropout 0 changes no name in backbone.pt: eval_linear.py and torchvision find every layer."""
    trunk, body, args = body_of("--arch", arch, *SMALL, "32", "--dropout", "0")
    data = SimpleNamespace(name="x", channels=3, mean=(0.5,) * 3, std=(0.2,) * 3)
    path = tmp_path / "backbone.pt"
    save_backbone(path, trunk, arch, 32, 32, args.sobel, data, "deepcluster")
    loaded, _ = load_backbone(path)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.equal(loaded(x), body.eval()(x))


def test_recipes_are_the_papers():
    """The hyper-parameters of Caron et al. 3.4 and of Deep Dive, Table 1 and appendix A; flags override."""

    def values(*argv):
        a = options(list(argv))
        return a.arch, a.sobel, a.lr, a.wd, a.momentum, a.epochs, a.k, a.pca, a.batch_size

    imagenet = ("alexnet", True, 0.05, 1e-5, 0.9, 500, 10000, 256, 256)
    assert values("--data", "some/folder") == imagenet
    assert values("--data", "x", "--arch", "vgg16", "--k", "7") == ("vgg16", *imagenet[1:6], 7, 256, 256)
    assert values("--data", "fashionmnist") == ("lenet5", False, 0.1, 1e-3, 0.1, 50, 5, 0, 128)
    assert values("--data", "svhn") == ("alexnet-small", True, 0.1, 1e-3, 0.5, 100, 200, 256, 64)
    assert values("--data", "cifar10") == ("alexnet-small", True, 0.1, 1e-3, 0.9, 100, 1000, 256, 64)
    appendix = ("alexnet", True, 0.05, 1e-5, 0.9, 100, 2000, 256, 256)
    assert values("--data", "cifar10", "--arch", "alexnet") == appendix
    a = options(["--data", "some/folder"])
    assert (a.image_size, a.resize, a.dropout, a.reassign, a.crop_area, a.flip) == (
        224,
        256,
        0.5,
        1,
        0.08,
        True,
    )
    assert (a.balance, a.clustering, a.halt_clustering, a.resnet_head) == ("uniform", "kmeans", 0, "A")


# --------------------------------------------------------------------------- features to cluster


class Counting(nn.Module):
    """Pixels times a fixed matrix; remembers its inputs and how many rows of its output are alive."""

    def __init__(self, inputs, dim):
        super().__init__()
        self.dim, self.seen, self.alive, self.peak = dim, [], 0, 0
        gen = torch.Generator().manual_seed(0)
        self.matrix = torch.randn(inputs, dim, generator=gen)

    def forward(self, images):
        x = images.flatten(1)
        self.seen.append(x)
        out = x @ self.matrix
        self.alive += len(out)
        self.peak = max(self.peak, self.alive)
        weakref.finalize(out, self.died, len(out))
        return out

    def died(self, rows):
        self.alive -= rows


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor that any operation made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor):
            self.elements = max(self.elements, out.numel())
        return out


def grey_images(n):
    pixels = torch.randint(0, 256, (n, 1, 12, 12), generator=torch.Generator().manual_seed(1)).byte()
    return Images("grey", pixels, None, None, [], (0.4,), (0.3,))


def grey_loader(n, batch):
    return Loader(grey_images(n), batch, 8, 12, torch.device("cpu"), workers=0)


def centre_pixels(n):
    """(n, 64) float64: what the network is promised to see: the normalised centre crop."""
    pixels = grey_images(n).pixels.numpy().astype(np.float64)
    return ((pixels[:, :, 2:10, 2:10] / 255 - 0.4) / 0.3).reshape(n, 64)


def whitened(x, fitted, p):
    """Unit rows of x in the whitened axes of PCA of the rows `fitted`, in double precision."""
    mean = fitted.mean(0)
    values, axes = np.linalg.eigh((fitted - mean).T @ (fitted - mean) / len(fitted))
    z = (x - mean) @ axes[:, -p:] / np.sqrt(values[-p:])
    return z / np.linalg.norm(z, axis=1, keepdims=True)


def assert_same_up_to_signs(z, want):
    """Axes of PCA have no sign, so compare all inner products between rows."""
    np.testing.assert_allclose(z @ z.T, want @ want.T, atol=2e-4)


def test_features_are_pca_whitened_and_of_unit_length():
    """Rows in the order of the data, as numpy whitens the normalised centre crops of all images."""
    body = Counting(64, 20)
    z = deep_features(body, grey_loader(90, 16), 6, 1000, 0, False).double().numpy()
    x = centre_pixels(90) @ body.matrix.double().numpy()
    assert z.shape == (90, 6)
    np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
    assert_same_up_to_signs(z, whitened(x, x, 6))


def test_pca_is_fitted_on_a_random_sample_and_on_nothing_else():
    """--pca-sample: the images that pass the network first are the sample; its PCA whitens all."""
    chosen = []
    pixels = centre_pixels(300)
    for seed in (0, 1):
        body = Counting(64, 20)
        z = deep_features(body, grey_loader(300, 16), 6, 60, seed, False).double().numpy()
        seen = torch.cat(body.seen).double().numpy()
        assert len(seen) == 360
        distance = ((seen[:60, None] - pixels[None]) ** 2).sum(-1)
        assert distance.min(1).max() < 1e-6
        sample = distance.argmin(1)
        assert len(set(sample.tolist())) == 60
        chosen.append(set(sample.tolist()))
        x = pixels @ body.matrix.double().numpy()
        np.testing.assert_allclose(np.linalg.norm(z, axis=1), 1, atol=1e-5)
        assert_same_up_to_signs(z, whitened(x, x[sample], 6))
    assert chosen[0] != chosen[1] and chosen[0] != set(range(60))


def test_all_features_never_exist_at_once_when_pca_is_sampled():
    """N x D numbers are never in memory: neither in one tensor nor in many."""
    body = Counting(64, 400)
    with Largest() as largest:
        z = deep_features(body, grey_loader(1200, 20), 5, 60, 0, False)
    assert z.shape == (1200, 5)
    assert 20 <= body.peak <= 60 + 2 * 20
    assert 1200 * 5 <= largest.elements < 1200 * 400 / 2


def test_without_pca_features_are_scaled_to_unit_length_only():
    body = Counting(64, 20)
    z = deep_features(body, grey_loader(50, 16), 0, 10, 0, False).double().numpy()
    x = centre_pixels(50) @ body.matrix.double().numpy()
    np.testing.assert_allclose(z, x / np.linalg.norm(x, axis=1, keepdims=True), atol=1e-5)


def test_features_are_computed_in_evaluation_mode():
    """No dropout, stored batch-norm statistics, which stay as they were; training mode comes back."""
    body = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Dropout(0.5))
    body.dim = 108
    body[1].running_mean += 0.3
    before = {k: v.clone() for k, v in body.state_dict().items()}
    body.train()
    z = deep_features(body, grey_loader(40, 16), 0, 1000, 0, False)
    assert body.training and all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    with torch.no_grad():
        x = body.eval()(torch.from_numpy(centre_pixels(40)).float().view(40, 1, 8, 8))
    torch.testing.assert_close(z, F.normalize(x), rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------- one epoch


class FewBatches:
    """A loader of given (index, images) batches."""

    def __init__(self, batches):
        self.batches = batches

    def steps(self, order=None):
        return len(self.batches)

    def epoch(self, epoch, views, order=None, start=0):
        for index, images in self.batches[start:]:
            yield index, [images]


def test_a_nan_loss_stops_before_the_step(capsys):
    """The good batch is trained on, the NaN batch ends with exit code 1 and untouched weights."""
    x = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    args = SimpleNamespace(seed=0, amp=False, crop_area=0.5, flip=False)
    weights = {}
    for name, batches in {"good": [x], "bad": [x, x * float("nan")]}.items():
        torch.manual_seed(0)
        body, head = nn.Linear(5, 6), make_head(6, 3, 0)
        start = body.weight.detach().clone()
        optimizers = [torch.optim.SGD(net.parameters(), 1.0, weight_decay=0.1) for net in (body, head)]
        loader = FewBatches([(torch.arange(4), b) for b in batches])
        labels, ones = torch.tensor([0, 1, 2, 0]), torch.ones(4)
        run = (body, head, optimizers, loader, None, labels, ones, 0, 0, 0.0, args)
        if name == "good":
            steps, loss, stop = train(*run)
            assert (steps, stop) == (1, 0) and loss == pytest.approx(math.log(3), abs=0.05)
        else:
            with pytest.raises(SystemExit) as end:
                train(*run)
            assert end.value.code == 1
        weights[name] = torch.cat([body.weight.detach().flatten(), head[1].weight.detach().flatten()])
        assert not torch.equal(body.weight, start)
    assert torch.equal(weights["good"], weights["bad"])
    assert len(capsys.readouterr().err.splitlines()) == 1


# The script itself on a network of one linear layer, with everything written down that goes into a
# step: labels, images, the head as it was drawn (enlarged, so that the body's gradient is not tiny).
RECORD = """
import os, sys, torch, common, deepcluster
from torch import nn
seen = {"batches": [], "labels": [], "heads": [], "states": []}
def make_body(args, channels):
    body = nn.Sequential(nn.Flatten(), nn.Linear(channels * args.image_size**2, 12))
    body.dim = 12
    seen["body"] = {k: v.clone() for k, v in body.state_dict().items()}
    return body, body
def make_head(*key, real=deepcluster.make_head):
    head = real(*key)
    head[1].weight.data.mul_(50)
    seen["heads"].append({k: v.clone() for k, v in head.state_dict().items()})
    return head
def cluster(*a, real=deepcluster.cluster):
    found = real(*a)
    seen["labels"].append(found[0].clone())
    return found
def epoch(self, number, *a, real=common.Loader.epoch, **k):
    for index, (images,) in real(self, number, *a, **k):
        seen["batches"].append((number, index.clone(), images.clone()))
        yield index, [images]
def save(self, state, real=common.Run.save):
    seen["states"].append({"epoch": state["epoch"], "assign_all": state["assign_all"].clone()} | {
        part: {k: v.clone() for k, v in state[part].items()} for part in ("body", "head")})
    real(self, state)
if os.environ.get("RECORD_BODY", "linear") == "linear":
    deepcluster.make_body = make_body
    deepcluster.make_head = make_head
deepcluster.cluster, common.Loader.epoch, common.Run.save = cluster, epoch, save
try:
    deepcluster.main()
finally:
    torch.save(seen, f"seen.{os.environ.get('RANK', 0)}")
"""
REAL_NET = "import os; os.environ['RECORD_BODY'] = 'real'\n" + RECORD
LINEAR = [
    "--image-size",
    "8",
    "--pca",
    "5",
    "--k",
    "6",
    "--lr",
    "0.2",
    "--wd",
    "0.05",
    "--momentum",
    "0.9",
    "--epochs",
    "2",
    "--out",
    "run",
]


def seen_by(job, rank=0):
    return torch.load(job.folder / f"seen.{rank}", weights_only=True)


def simulate(seen, weights, lr=0.2, wd=0.05, momentum=0.9, head_momentum=0.0, fresh_body=False):
    """Body W, b and head V, c after all recorded steps, from the formulas, in double precision."""
    W, b = (seen["body"][k].double().numpy() for k in ("1.weight", "1.bias"))
    mW, mb, epoch = 0.0, 0.0, -1
    for number, index, images in seen["batches"]:
        if number != epoch:
            epoch = number
            V, c = (seen["heads"][epoch][k].double().numpy() for k in ("1.weight", "1.bias"))
            mV, mc = 0.0, 0.0
            if fresh_body:
                mW, mb = 0.0, 0.0
        x = images.flatten(1).double().numpy()
        y = seen["labels"][epoch][index].numpy()
        h = x @ W.T + b
        r = np.maximum(h, 0)
        p = np.exp(r @ V.T + c)
        p /= p.sum(1, keepdims=True)
        p[np.arange(len(y)), y] -= 1  # gradient of the cross-entropy
        p *= weights(seen["labels"][epoch])[index.numpy()][:, None] / len(y)
        back = (p @ V) * (h > 0)
        mW, mb = momentum * mW + back.T @ x + wd * W, momentum * mb + back.sum(0) + wd * b
        mV, mc = head_momentum * mV + p.T @ r + wd * V, head_momentum * mc + p.sum(0) + wd * c
        W, b, V, c = W - lr * mW, b - lr * mb, V - lr * mV, c - lr * mc
    return [W, b, V, c]


def parameters(job):
    state = job.state()
    both = [*state["body"].values(), *state["head"].values()]
    return [p.double().numpy() for p in both]


def difference(a, b):
    return max(np.abs(x - y).max() / np.abs(y).max() for x, y in zip(a, b, strict=True))


def ones(labels):
    return np.ones(len(labels))


def inverse_sizes(labels):
    sizes = Counter(labels.tolist())
    return np.array([len(labels) / len(sizes) / sizes[c] for c in labels.tolist()])


@pytest.fixture(scope="module")
def linear(start):
    """The recorded run by way of balancing: two epochs of two steps of 700 images."""
    names = ("uniform", "loss", "none")
    arguments = {b: [*LINEAR, "--batch-size", "700", "--balance", b] for b in names}
    return two_at_once({b: lambda a=a: start(a, RECORD).ok() for b, a in arguments.items()})


def test_body_has_momentum_over_epochs_head_is_new_and_has_none(linear):
    """Four steps against the formulas: decay on both, the body's momentum outlives the epoch [1, step 6]."""
    seen, got = seen_by(linear["uniform"]), parameters(linear["uniform"])
    assert [n for n, _, _ in seen["batches"]] == [0, 0, 1, 1] and len(seen["heads"]) == 2
    assert difference(got, simulate(seen, ones)) < 1e-5
    # what the formulas could be mistaken for is far away
    assert difference(got, simulate(seen, ones, head_momentum=0.9)) > 1e-3
    assert difference(got, simulate(seen, ones, fresh_body=True)) > 1e-3
    assert difference(got, simulate(seen, ones, wd=0.0)) > 1e-3


def test_balance_loss_weights_a_plain_shuffle(linear):
    """--balance loss: every image at most once, losses weighted by 1 / cluster size."""
    seen = seen_by(linear["loss"])
    assert difference(parameters(linear["loss"]), simulate(seen, inverse_sizes)) < 1e-5
    assert difference(parameters(linear["loss"]), simulate(seen, ones)) > 1e-3
    for epoch in (0, 1):
        index = torch.cat([i for n, i, _ in seen["batches"] if n == epoch])
        assert len(index.unique()) == 1400


def test_balance_none_is_plain_training_and_uniform_draws_clusters_alike(linear):
    """none: a shuffle without weights; uniform: the same number of images of every cluster."""
    seen = seen_by(linear["none"])
    assert difference(parameters(linear["none"]), simulate(seen, ones)) < 1e-5
    assert len(torch.cat([i for n, i, _ in seen["batches"] if n == 0]).unique()) == 1400
    seen = seen_by(linear["uniform"])
    counts = torch.bincount(seen["labels"][0][torch.cat([i for n, i, _ in seen["batches"] if n == 0])])
    sizes = torch.bincount(seen["labels"][0])
    quota = 1437 // len(sizes) + 1
    assert counts.max() <= quota and counts.min() > quota - 43 and sizes.max() - sizes.min() > 60


@pytest.fixture(scope="module")
def schedules(start):
    """States after each epoch with learning rate 0: heads and labels change only when they are replaced."""
    flags = {
        "plain": [],
        "halt": ["--halt-clustering", "2"],
        "halt and reset": ["--halt-clustering", "2", "--reset-head"],
        "reassign": ["--reassign", "2"],
    }
    jobs = {
        name: lambda more=more: start([*QUICK, "--lr", "0", *more], REAL_NET).ok()
        for name, more in flags.items()
    }
    return {name: (seen_by(job), job) for name, job in two_at_once(jobs).items()}


def changes(states):
    """For epochs 2, 3, 4: (labels differ from the epoch before, head differs)."""
    return [
        (
            not torch.equal(a["assign_all"], b["assign_all"]),
            not torch.equal(a["head"]["1.weight"], b["head"]["1.weight"]),
        )
        for a, b in zip(states[:3], states[1:4], strict=True)
    ]


@pytest.mark.parametrize(
    ("name", "want"),
    [
        ("plain", [(True, True), (True, True), (True, True)]),
        ("halt", [(True, True), (False, False), (False, False)]),
        ("halt and reset", [(True, True), (False, True), (False, True)]),
        ("reassign", [(False, False), (True, True), (False, False)]),
    ],
)
def test_when_labels_and_head_are_replaced(schedules, name, want):
    """Every epoch; up to --halt-clustering, with --reset-head the head after it, too; every --reassign epochs."""
    seen, job = schedules[name]
    assert [s["epoch"] for s in seen["states"]] == [1, 2, 3, 4, 4]
    assert changes(seen["states"]) == want
    clusterings = 1 + sum(labels for labels, _ in want)
    assert len(seen["labels"]) == clusterings + 1  # and the final one: no needless pass over the data
    assert sum("objective" in r for r in job.log()) == clusterings


# --------------------------------------------------------------------------- whole runs


def digit_labels():
    return load_data("digits")[0].labels.tolist()


PROMISED = [
    "epoch",
    "lr",
    "loss",
    "ln_k",
    "images_per_second",
    "seconds",
    "nmi_previous",
    "nmi_labels",
    "objective",
    "clusters",
    "empty",
    "smallest",
    "largest",
    "largest_share",
    "bad_files",
]


def test_log_holds_what_ran_every_epoch_and_the_result(whole):
    """First record, one a epoch, result last; sizes are those of the stored labels."""
    first, *records, last = whole.log()
    assert first["command"] == "deepcluster.py " + " ".join(QUICK)
    assert first["args"]["k"] == 20 and first["args"]["wd"] == 1e-5 and first["args"]["seed"] == 0
    assert first["versions"]["torch"] == torch.__version__ and {"torchvision", "faiss"} <= set(
        first["versions"]
    )
    assert first["data"] == {"name": "digits", "images": 1437, "classes": 10} and first["processes"] == 1
    assert "cpu" in first["device"]
    assert [r["epoch"] for r in records] == [1, 2, 3, 4]
    for r in records:
        assert set(PROMISED) <= set(r), set(PROMISED) - set(r)
        assert (r["nmi_previous"] is None) == (r["epoch"] == 1)
        assert (
            r["clusters"] + r["empty"] == 20 and r["largest"] / 1437 == r["largest_share"] and r["lr"] == 0.1
        )
        assert set(r["seconds"]) == {"clustering", "training"} and min(r["seconds"].values()) > 0
        assert r["ln_k"] == pytest.approx(math.log(r["clusters"])) and 0 < r["loss"] < 2 * r["ln_k"]
    assert set(last["result"]) >= {"nmi_labels", "nmi_labels_untrained", "epochs"}
    assert last["result"]["nmi_labels_untrained"] == records[0]["nmi_labels"]

    labels = digit_labels()
    now, before = whole.state(), records[-1]
    sizes = Counter(now["assign_all"].tolist())
    assert before["largest"] == max(sizes.values()) and before["smallest"] == min(sizes.values())
    assert before["nmi_labels"] == pytest.approx(plain_nmi(labels, now["assign_all"].tolist()), abs=1e-9)


def test_nmi_to_the_previous_epoch_is_that_of_the_two_labelings(schedules):
    """From the labels of all epochs, by the formula."""
    seen, job = schedules["plain"]
    labels = [s["assign_all"].tolist() for s in seen["states"]]
    got = [r["nmi_previous"] for r in epochs(job.log())[1:]]
    want = [plain_nmi(a, b) for a, b in zip(labels[:3], labels[1:4], strict=True)]
    assert got == pytest.approx(want, abs=1e-9)


def test_files_of_a_run(whole):
    """checkpoint, the one before, backbone, one line per image, a picture; nothing else stays behind."""
    names = {".lock", "log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "assignments.csv"}
    assert {p.name for p in whole.run.iterdir()} == names | {"clusters.png"}
    images, clusters = read_assignments(whole.run / "assignments.csv")
    assert images == [str(i) for i in range(1437)]
    result = whole.log()[-1]["result"]
    sizes = Counter(clusters)
    assert (result["clusters"], result["smallest"], result["largest"]) == (
        len(sizes),
        min(sizes.values()),
        max(sizes.values()),
    )
    assert result["nmi_labels"] == pytest.approx(plain_nmi(digit_labels(), clusters), abs=1e-9)
    with Image.open(whole.run / "clusters.png") as picture:
        assert picture.size == (10 * 22 + 2, 10 * 22 + 2)  # ten clusters, ten images of 20 pixels each
        assert np.asarray(picture).std() > 10

    state = whole.state()
    assert state["epoch"] == 4 and state["step"] == 0 and len(state["assign_all"]) == 1437
    assert state["head"]["1.weight"].shape == (20, 84) and len(state["optimizer"]["state"]) == len(
        trained(state)
    )
    net, meta = load_backbone(whole.run)
    assert all(torch.equal(v, state["body"][k]) for k, v in net.state_dict().items())
    fed = (meta["arch"], meta["sobel"], meta["image_size"], meta["method"])
    assert fed == ("lenet5", False, 20, "deepcluster")
    assert len(meta["mean"]) == len(meta["std"]) == 1


def trained(state):
    buffers = ("running_mean", "running_var", "num_batches_tracked")
    return [k for k in state["body"] if not k.endswith(buffers)]


def test_what_a_run_says(whole):
    """The data first, one line an epoch, what was learnt, and the command to evaluate it."""
    lines = whole.out.splitlines()
    assert lines[0].startswith("data: digits") and "1437" in lines[0]
    assert [line.split()[1] for line in lines if line.startswith("epoch")] == ["1/4", "2/4", "3/4", "4/4"]
    result = whole.log()[-1]["result"]
    assert f"{result['nmi_labels_untrained']:.3f} untrained, {result['nmi_labels']:.3f} now" in whole.out
    assert lines[-1].endswith("python eval_linear.py run") and whole.err == ""


def test_the_seed_decides_the_result_and_initial_alignment_is_the_untrained_nmi(start):
    """Same seed, same bits; another seed, another result; --initial-alignment agrees with both."""
    short = [*QUICK, "--epochs", "2"]
    jobs = two_at_once(
        {
            "a": lambda: start(short).ok(),
            "b": lambda: start(short).ok(),
            "c": lambda: start([*short, "--seed", "1"]).ok(),
            "ia": lambda: start([*short, "--initial-alignment", "3"]).ok(),
        }
    )
    same(jobs["a"], jobs["b"])
    a, c = jobs["a"].state(), jobs["c"].state()
    assert not torch.equal(a["body"]["features.0.weight"], c["body"]["features.0.weight"])
    assert not torch.equal(a["assign_all"], c["assign_all"])

    result = jobs["ia"].log()[-1]
    values = result["initial_alignment"]
    assert len(values) == 3 and len(set(values)) == 3
    assert values[:2] == [a["untrained_nmi"], c["untrained_nmi"]]
    assert (result["min"], result["median"], result["max"]) == tuple(sorted(values))
    last = jobs["ia"].out.splitlines()[-1]
    assert all(f"{word} {result[word]:.4f}" in last for word in ("median", "min", "max"))
    assert not (jobs["ia"].run / "checkpoint.pt").exists()


# --------------------------------------------------------------------------- interruptions


def same(a, b):
    """Two jobs ended with the same weights, head, optimiser, labels and files, bit for bit."""
    x, y = a.state(), b.state()
    for part in ("body", "head"):
        assert x[part].keys() == y[part].keys()
        for k in x[part]:
            assert torch.equal(x[part][k], y[part][k]), f"{part} {k}"
    for k, m in x["optimizer"]["state"].items():
        assert torch.equal(m["momentum_buffer"], y["optimizer"]["state"][k]["momentum_buffer"])
    assert torch.equal(x["assign_all"], y["assign_all"])
    assert (x["epoch"], x["step"], x["result"]) == (y["epoch"], y["step"], y["result"])
    for name in ("assignments.csv", "clusters.png"):
        assert (a.run / name).read_bytes() == (b.run / name).read_bytes(), name


OTHER = ["--clustering", "pic", "--reassign", "2", "--balance", "loss"]
HALTED = ["--halt-clustering", "2", "--reset-head", "--save-every", "3"]
DROPOUT = ["--arch", "alexnet-small", "--image-size", "8", "--resize", "8", "--epochs", "2"]
# name: (exit code, flags, where the signal comes). A k-means asks for neighbours up to 21 times; a save
# renames checkpoint.pt to .prev (from the second on), the new file to checkpoint.pt, and backbone.pt.
CRASHES = {
    "kill in a step": (-9, [], trap("deepcluster", "heartbeat", 2 * STEPS + 4)),
    "kill in k-means": (-9, [], trap("common", "nearest", 30)),
    "kill after the log, before the checkpoint": (-9, [], trap("common.Run", "save", 3)),
    "kill in the middle of writing": (-9, [], trap("torch", "save", 3, torn=True)),
    "kill between the two renames": (-9, [], trap("os", "replace", 4)),
    "kill before backbone.pt": (-9, [], trap("os", "replace", 5)),
    "kill in the first epoch": (-9, [], trap("deepcluster", "heartbeat", 3)),
    "kill while drawing the pictures": (-9, [], trap("deepcluster", "save_pictures", 1)),
    "SIGINT in a step": (130, [], trap("deepcluster", "heartbeat", STEPS + 4, "SIGINT")),
    "SIGTERM in k-means": (143, [], trap("deepcluster", "kmeans", 3, "SIGTERM")),
    "SIGTERM in the last step": (143, [], trap("deepcluster", "heartbeat", 4 * STEPS, "SIGTERM")),
    "PIC, SIGTERM in a step": (143, OTHER, trap("deepcluster", "heartbeat", 2 * STEPS + 2, "SIGTERM")),
    "dropout, SIGTERM in a step": (143, DROPOUT, trap("deepcluster", "heartbeat", STEPS + 4, "SIGTERM")),
    "halted, kill in the last epoch": (-9, HALTED, trap("deepcluster", "heartbeat", 3 * STEPS + 2)),
}


@pytest.fixture(scope="module")
def crashed(start, whole, defaults):
    """Every crash, then the same command again: name -> (first job's output, resumed job, reference)."""
    wholes = {"": whole}
    for flags in (OTHER, HALTED, DROPOUT):
        wholes[" ".join(flags)] = start([*QUICK, *flags])

    def crash(flags, code):
        job = start([*QUICK, *flags], code)
        first = job.wait()
        first = SimpleNamespace(code=first.code, out=first.out, err=first.err)
        return first, start([*QUICK, *flags], folder=job.folder).wait(), wholes[" ".join(flags)]

    jobs = {name: lambda f=flags, c=code: crash(f, c) for name, (_, flags, code) in CRASHES.items()}
    results = two_at_once(jobs)
    for job in wholes.values():
        job.ok()
    return results


@pytest.mark.parametrize("name", CRASHES)
def test_a_run_interrupted_anywhere_ends_as_if_nothing_had_happened(crashed, name):
    """kill -9, SIGINT and SIGTERM at the worst moments; the same command goes on, bit for bit."""
    first, resumed, reference = crashed[name]
    assert first.code == CRASHES[name][0], first.out + first.err
    if first.code > 0:
        assert f"stopped by signal {first.code - 128}" in first.out and "same command" in first.out
        assert first.err == ""
    assert resumed.code == 0, resumed.err
    same(resumed, reference)


@pytest.mark.parametrize("name", CRASHES)
def test_the_log_of_an_interrupted_run_misses_nothing_and_repeats_nothing(crashed, name):
    """Every epoch once, with all fields and the same values as without the interruption."""
    _, resumed, reference = crashed[name]
    assert without_times(resumed.log()) == without_times(reference.log())
    assert resumed.log()[-1]["result"] == reference.log()[-1]["result"]
    assert sum("resumed" in r for r in resumed.log()) == (name != "kill in the first epoch")


# The script, which leaves a mark in the folder when it has come to the fifth step of the second epoch.
MARK = """
import common, deepcluster
steps = 0
def heartbeat(loss, real=common.heartbeat):
    global steps
    steps += 1
    if steps == 359 + 5:
        open("mark", "w").close()
    return real(loss)
deepcluster.heartbeat = heartbeat
deepcluster.main()
"""


def test_sigterm_saves_in_the_middle_of_an_epoch(start):
    """Exit code 143, a checkpoint of that very step, and the resumed run ends bit-identical."""
    slow = [*QUICK, "--epochs", "2", "--batch-size", "4"]  # 359 steps an epoch
    reference, job = start(slow), start(slow, MARK)
    wait_for((job.folder / "mark").exists, 120)
    os.kill(job.pids()[0], signal.SIGTERM)
    job.wait()
    state = job.state()
    assert job.code == 143 and job.err == ""
    assert state["epoch"] == 1 and 5 <= state["step"] < 359 and state["result"] is None
    assert f"signal 15 after step {state['step']} of epoch 2" in job.out and "saved" in job.out
    resumed = start(slow, folder=job.folder).ok()
    assert f"going on from epoch 2, step {state['step']}" in resumed.out
    same(resumed, reference.ok())


def test_a_finished_run_says_so_and_changes_nothing(start, whole):
    job = copied(start, whole, QUICK, "again")
    assert job.code == 0 and "finished after 4 epochs" in job.out and job.err == ""
    assert contents(job.run) == contents(whole.run)


def test_more_epochs_continue_a_finished_run(start, whole):
    """2 epochs, then 4: the same as 4 at once; what need not agree may differ."""
    two = start([*QUICK, "--epochs", "2"]).ok()
    assert two.state()["epoch"] == 2
    job = start([*QUICK, "--workers", "1", "--save-every", "2", "--device", "cpu"], folder=two.folder).wait()
    assert job.code == 0, job.err
    same(job, whole)
    assert without_times(job.log()) == without_times(whole.log())


def test_overwrite_starts_afresh(start, whole):
    """Nothing of the run before has any influence, whatever its arguments were."""
    job = copied(start, whole, [*QUICK, "--epochs", "1", "--seed", "1", "--overwrite"], "overwrite")
    fresh = start([*QUICK, "--epochs", "1", "--seed", "1"]).ok()
    assert job.code == 0
    same(job, fresh)
    assert len(epochs(job.log())) == 1 and job.log()[0]["args"]["seed"] == 1


def flip_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


def cut_short(path):
    path.write_bytes(path.read_bytes()[:-1000])


@pytest.mark.parametrize("harm", [flip_bit, cut_short])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(start, whole, harm):
    """One flipped bit or a lost end: says so, goes on from checkpoint.prev.pt, ends the same."""
    killed = start(QUICK, trap("deepcluster", "heartbeat", 2 * STEPS + 4)).wait()
    assert killed.state()["epoch"] == 2
    harm(killed.run / "checkpoint.pt")
    job = start(QUICK, folder=killed.folder).ok()
    assert "damaged" in job.out and "going on from checkpoint.prev.pt" in job.out
    assert "going on from epoch 2, step 0" in job.out
    same(job, whole)
    assert without_times(job.log()) == without_times(whole.log())


# --------------------------------------------------------------------------- several processes


def test_two_processes_find_the_same_first_clusters_and_keep_equal_weights(start, schedules):
    """Objective to 1e-6 and labels of the first clustering as on one process; parameters equal on both."""
    job = start(QUICK, REAL_NET, world=2).ok()
    one = schedules["plain"][0]  # no step was taken before its first clustering, either
    first = epochs(schedules["plain"][1].log())[0]["objective"]
    assert epochs(job.log())[0]["objective"] == pytest.approx(first, rel=1e-6)
    both = [seen_by(job, r) for r in (0, 1)]
    assert torch.equal(both[0]["labels"][0], one["labels"][0])
    for a, b in zip(both[0]["states"], both[1]["states"], strict=True):
        assert torch.equal(a["assign_all"], b["assign_all"])
        for part in ("body", "head"):
            names = [k for k in a[part] if "running" not in k and "tracked" not in k]
            assert all(torch.equal(a[part][k], b[part][k]) for k in names)
    assert job.out.count("epoch   1/4") == 1 and job.log()[0]["processes"] == 2
    # both looked at other images, and together at all of the epoch's
    indices = [torch.cat([i for n, i, _ in seen["batches"] if n == 0]) for seen in both]
    assert [len(i) for i in indices] == [STEPS * 64] * 2 and not torch.equal(*indices)


def test_two_processes_take_the_steps_of_one(start, linear):
    """Without batch norm the weights after four steps are those of one process: same mean gradient."""
    one = linear["loss"]
    two = start([*LINEAR, "--batch-size", "700", "--balance", "loss"], RECORD, world=2).ok()
    assert torch.equal(seen_by(two)["labels"][0], seen_by(one)["labels"][0])
    assert [len(i) for _, i, _ in seen_by(two, 1)["batches"]] == [350] * 4
    assert difference(parameters(two), parameters(one)) < 1e-5
    losses = [[r["loss"] for r in epochs(job.log())] for job in (one, two)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


def test_two_processes_stop_together(start):
    """A signal to one, a NaN on one, a mistake in the command: both end alike, nobody hangs."""
    to_one = trap("deepcluster", "heartbeat", STEPS + 4, "SIGTERM")
    to_one = to_one.replace("calls == n", "calls == n and common.rank() == 1")
    nan_on_one = POISON.replace("number == 1", "number == 1 and common.rank() == 1")
    jobs = two_at_once(
        {
            "signal": lambda: start(QUICK, to_one, world=2).wait(60),
            "nan": lambda: start(QUICK, nan_on_one, world=2).wait(60),
            "uneven": lambda: start([*QUICK, "--batch-size", "63"], world=2).wait(60),
            "mistake": lambda: start([*QUICK, "--k", "2000"], world=2).wait(60),
            "no folder": lambda: start([*QUICK, "--data", "nowhere"], world=2).wait(60),
        }
    )
    assert {name: job.codes for name, job in jobs.items()} == {
        "signal": [143, 143],
        "nan": [1, 1],
        "uneven": [2, 2],  # a batch that two processes cannot share: its mean gradient would be wrong
        "mistake": [2, 2],
        "no folder": [2, 2],
    }
    assert (jobs["signal"].state()["epoch"], jobs["signal"].state()["step"]) == (1, 4)
    for name in ("nan", "uneven", "mistake", "no folder"):
        assert len(jobs[name].err.splitlines()) == 1, jobs[name].err


# --------------------------------------------------------------------------- mistakes


@pytest.fixture(scope="module")
def places(tmp_path_factory, whole):
    """Folders to point the script at, by name."""
    root = tmp_path_factory.mktemp("places")
    grey = np.full((32, 32, 3), 90, np.uint8)
    write_images(root / "flat", 20)
    write_images(root / "same", 40, lambda i: grey)
    write_images(root / "one class" / "train" / "thing", 24)
    write_images(root / "mismatch" / "train" / "cat", 2)
    write_images(root / "mismatch" / "val" / "dog", 2)
    (root / "empty").mkdir()
    (root / "file").write_text("not a folder")
    return SimpleNamespace(**{p.name.replace(" ", "_"): p for p in root.iterdir()}, root=root, run=whole.run)


# name: (arguments as a function of the places, words that the message must hold)
NAMES = ["digits", "mnist", "fashionmnist", "cifar10", "cifar100-20", "svhn", "stl10"]
NETS = ["lenet5", "alexnet", "alexnet-small", "vgg16", "resnet18", "resnet50"]
FOLDER = ["--recipe", "digits", "--batch-size", "8", "--k", "4", "--workers", "0"]
MISTAKES = {
    "k larger than N": (lambda p: ["--k", "1438"], ["--k", "1438", "1437"]),
    "unknown data": (lambda p: ["--data", "cifar"], ["cifar", *NAMES]),
    "unknown arch": (lambda p: ["--arch", "resnet"], ["--arch", *NETS]),
    "missing folder": (lambda p: ["--data", p.root / "none"], ["none", "no such folder"]),
    "ResNet-50 B": (lambda p: ["--arch", "resnet50", "--resnet-head", "B"], ["--resnet-head", "trivial"]),
    "empty folder": (lambda p: ["--data", p.empty], ["empty", "no images"]),
    "a file for a folder": (lambda p: ["--data", p.file], ["file"]),
    "batch larger than N": (lambda p: ["--batch-size", "1438"], ["--batch-size", "1438", "1437"]),
    "batch larger than a folder": (lambda p: ["--data", p.flat, *FOLDER, "--batch-size", "21"], ["21", "20"]),
    "classes differ": (lambda p: ["--data", p.mismatch, *FOLDER], ["mismatch", "cat", "dog"]),
    "out below a file": (lambda p: ["--out", p.file / "run"], ["--out", "cannot write"]),
    "out is a file": (lambda p: ["--out", p.file], ["--out", "cannot write"]),
    "out of another run": (
        lambda p: [*QUICK, "--k", "30", "--lr", "0.2", "--out", p.run],
        ["k 20 -> 30", "lr 0.1 -> 0.2", "--overwrite"],
    ),
    "out of another seed": (lambda p: [*QUICK, "--seed", "5", "--out", p.run], ["seed 0 -> 5"]),
    "alignment without labels": (
        lambda p: ["--data", p.flat, *FOLDER, "--initial-alignment", "2"],
        ["--initial-alignment", "labels"],
    ),
    "image too small": (lambda p: ["--image-size", "8"], ["--image-size"]),
    "resize below the crop": (lambda p: ["--resize", "16"], ["--resize", "--image-size"]),
    "negative resize": (lambda p: ["--resize", "-1"], ["--resize"]),
    "momentum 1": (lambda p: ["--momentum", "1"], ["--momentum"]),
    "dropout 1": (lambda p: ["--dropout", "1"], ["--dropout"]),
    "negative lr": (lambda p: ["--lr", "-0.1"], ["--lr"]),
    "lr nan": (lambda p: ["--lr", "nan"], ["--lr"]),
    "negative wd": (lambda p: ["--wd", "-0.1"], ["--wd"]),
    "crop area 0": (lambda p: ["--crop-area", "0"], ["--crop-area"]),
    "crop area over 1": (lambda p: ["--crop-area", "1.5"], ["--crop-area"]),
    "pca -1": (lambda p: ["--pca", "-1"], ["--pca"]),
    "k that is no number": (lambda p: ["--k", "many"], ["--k", "many"]),
    "unknown flag": (lambda p: ["--clusters", "5"], ["--clusters"]),
    "unknown device": (lambda p: ["--device", "gpu"], ["--device", "cuda"]),
    "no cuda here": (lambda p: ["--device", "cuda"], ["--device", "cuda"]),
    "a device that is no choice": (lambda p: ["--device", "mps"], ["--device", "cuda"]),
}
for _flag in ["k", "epochs", "batch-size", "image-size", "save-every", "reassign", "pca-sample"]:
    MISTAKES[f"{_flag} 0"] = (lambda p, f=_flag: [f"--{f}", "0"], [f"--{_flag}", "at least 1"])
    MISTAKES[f"{_flag} -3"] = (lambda p, f=_flag: [f"--{f}", "-3"], [f"--{_flag}", "at least 1"])
for _flag in ["workers", "halt-clustering", "initial-alignment", "max-bad"]:
    MISTAKES[f"{_flag} -1"] = (lambda p, f=_flag: [f"--{f}", "-1"], [f"--{_flag}", "at least 0"])


@pytest.fixture(scope="module")
def refused(start, places, torchrun):
    kept = contents(places.run)
    jobs = {name: lambda a=arguments: start(a(places)).wait() for name, (arguments, _) in MISTAKES.items()}
    return two_at_once(jobs, "out of"), kept


@pytest.mark.parametrize("name", MISTAKES)
def test_mistakes_end_with_exit_code_2_and_one_line(refused, name):
    """The line names the flag or the thing, says what would be right, and nothing is a traceback."""
    job = refused[0][name]
    line = one_line(job)
    assert not [word for word in MISTAKES[name][1] if word not in line], line


def test_a_refused_run_folder_stays_as_it_was(refused, places):
    assert contents(places.run) == refused[1]


# The script, with NaN images in the fourth step of the second epoch.
POISON = """
import common, deepcluster
def epoch(self, number, *a, real=common.Loader.epoch, **k):
    for step, (index, (images,)) in enumerate(real(self, number, *a, **k)):
        yield index, [images * float("nan") if number == 1 and step == 3 else images]
common.Loader.epoch = epoch
deepcluster.main()
"""


def test_a_nan_in_the_second_epoch_leaves_the_first_ones_checkpoint(start, whole):
    """Exit code 1, one line; the checkpoint is epoch 1's, and going on from it reaches the usual end."""
    job = start(QUICK, POISON).wait()
    one_line(job, 1)
    assert (job.state()["epoch"], job.state()["step"]) == (1, 0)
    same(start(QUICK, folder=job.folder).ok(), whole)


@pytest.mark.parametrize("pca", ["0", "60"])
def test_a_learning_rate_that_blows_up_ends_in_one_line(start, pca):
    """--lr 1e30: NaN in a step; or, with one step an epoch, in the features: no traceback either way."""
    in_a_step = start([*QUICK, "--lr", "1e30", "--pca", pca])
    in_features = start([*QUICK, "--lr", "1e30", "--batch-size", "1437", "--pca", pca]).wait()
    one_line(in_a_step.wait(), 1)
    assert "--lr" in in_a_step.err
    assert in_features.state()["epoch"] == 1  # whole and readable
    one_line(in_features, 1)


# --------------------------------------------------------------------------- degenerate data

PIC = ["--clustering", "pic"]
DEGENERATE = {  # name: (arguments, there must be a warning)
    "identical": (lambda p: ["--data", p.same, *FOLDER], True),
    "identical, no pca": (lambda p: ["--data", p.same, *FOLDER, "--pca", "0"], True),
    "identical, pic": (lambda p: ["--data", p.same, *FOLDER, *PIC], None),
    "one class": (lambda p: ["--data", p.one_class, *FOLDER], None),
    "k close to N": (lambda p: ["--data", p.flat, *FOLDER, "--k", "18"], False),
    "k is N": (lambda p: ["--data", p.flat, *FOLDER, "--k", "20", "--workers", "1"], False),
    "few, pic": (lambda p: ["--data", p.flat, *FOLDER, *PIC], None),
    "k is 1": (lambda p: [*QUICK, "--k", "1"], True),
    "loss weights": (lambda p: ["--data", p.flat, *FOLDER, "--k", "15", "--balance", "loss"], False),
}


@pytest.fixture(scope="module")
def degenerate(start, places):
    return two_at_once(
        {
            name: lambda a=arguments: start([*a(places), "--epochs", "2", "--out", "run"]).wait()
            for name, (arguments, _) in DEGENERATE.items()
        }
    )


@pytest.mark.parametrize("name", DEGENERATE)
def test_degenerate_data_runs_warns_and_has_no_nan(degenerate, name):
    """Every number in the log is finite, every image has a cluster, a trivial solution is called one."""
    job = degenerate[name]
    assert job.code == 0, job.err
    records = epochs(job.log())
    absent = {"nmi_previous"} if "pic" not in name else {"nmi_previous", "objective"}
    for r in records:
        missing = {k for k, v in r.items() if v is None}
        assert missing <= (absent if r["epoch"] == 1 else absent - {"nmi_previous"}), missing
        assert r["clusters"] >= 1 and r["loss"] >= 0
    assert len(records) == 2 and all(v.isfinite().all() for v in job.state()["body"].values())
    images, clusters = read_assignments(job.run / "assignments.csv")
    assert len(images) == len(set(images)) == job.log()[0]["data"]["images"]
    share = max(r["largest_share"] for r in records)
    warned = "WARNING" in job.out and "trivial" in job.out
    assert warned == (share > 0.5)
    if DEGENERATE[name][1] is not None:
        assert warned == DEGENERATE[name][1]


def test_unlabelled_images_have_no_label_metrics_and_are_named_by_path(degenerate):
    """Without labels everything runs and label metrics are left out; one class is a labelled folder."""
    job = degenerate["k close to N"]
    assert not any("nmi_labels" in r for r in job.log()) and "nmi_labels" not in job.log()[-1]["result"]
    assert "no labels" in job.out.splitlines()[0]
    images, _ = read_assignments(job.run / "assignments.csv")
    assert [Path(i).name for i in images] == [f"{i:03}.png" for i in range(20)]
    assert all(Path(i).is_file() for i in images)
    assert all(r["nmi_labels"] == 0 for r in epochs(degenerate["one class"].log()))


# --------------------------------------------------------------------------- the real commands


def test_torchrun_with_two_processes(torchrun, whole):
    """The real launcher: one log, one clustering over both, the same first objective."""
    process, folder = torchrun
    process.wait(200)
    assert process.returncode == 0, (folder / "err").read_text()
    records = read_log(folder / "run" / "log.jsonl")
    assert records[0]["processes"] == 2 and len(epochs(records)) == 2 and "result" in records[-1]
    first = epochs(whole.log())[0]["objective"]
    assert epochs(records)[0]["objective"] == pytest.approx(first, rel=1e-6)
    assert (folder / "out").read_text().count("epoch   2/2") == 1


def test_the_defaults_learn(defaults):
    """`python deepcluster.py`: NMI to the labels ends at least 0.03 above the untrained network's."""
    run = defaults.ok().folder / "runs" / "deepcluster-digits"
    result = read_log(run / "log.jsonl")[-1]["result"]
    _, clusters = read_assignments(run / "assignments.csv")
    reached = plain_nmi(digit_labels(), clusters)
    assert result["nmi_labels"] == pytest.approx(reached, abs=1e-9)
    assert reached >= result["nmi_labels_untrained"] + 0.03
    assert result["nmi_labels_untrained"] > 0.4  # a working start, so that the bar means something
