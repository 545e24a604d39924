"""eval_linear.py against plain torch, the papers' numbers and plain loops, and its runs on small data."""

import json
import math
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import eval_linear
from common import Backbone, Images, Loader, View, generator, knn_accuracy, load_data
from eval_linear import (
    Features,
    Probes,
    TenCrops,
    choose,
    learning_rate,
    options,
    pool_for,
    probe_loss,
    stages,
)

import numpy as np
import pytest
import torch
from jobs import ROOT, write_images
from PIL import Image
from torch import nn
from torch.nn import functional as F

SCRIPT = ROOT / "eval_linear.py"
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def blocks(n, side, channels=3, classes=4, seed=0, block=8):
    """Images of colored squares, in memory, with random labels."""
    gen, coarse = torch.Generator().manual_seed(seed), math.ceil(side / block)
    pixels = torch.randint(0, 256, (n, channels, coarse, coarse), generator=gen).byte()
    pixels = pixels.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :side, :side].contiguous()
    labels = torch.randint(0, classes, (n,), generator=gen)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    return Images("blocks", pixels, None, labels, [str(c) for c in range(classes)], mean, std)


def lenet(channels=3, seed=0):
    torch.manual_seed(seed)
    return Backbone("lenet5", channels, 32).eval().requires_grad_(False)


def normalized(data):
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in (data.mean, data.std))
    return (data.pixels / 255 - mean) / std


def arguments(**changed):
    given = {"batch_size": 16, "image_size": 32, "seed": 3, "flip": False, "amp": False, "crops": "center"}
    given |= {"center_fraction": 1.0, "lr_steps": None, "lr": [0.01], "wd": [1e-2, 0.0], "epochs": 2}
    given |= {"finetune": False, "protocol": "deepcluster", "arch": "lenet5", "compile": False}
    return Namespace(**{**given, "ten_crops": False, **changed})


def order_of(args, epoch, n):
    """The order in which train visits n images: seed_epoch's generator draws it."""
    return torch.randperm(n, generator=generator(args.seed, epoch))


# --------------------------------------------------------------------------- pools and stages


def test_alexnets_pools_give_the_features_of_the_released_code():
    net, seen = Backbone("alexnet", 3, 224, sobel=True).eval().requires_grad_(False), []

    def pool(stage, channels, side):
        seen.append((channels, side))
        pool = pool_for("deepcluster", "alexnet", stage, channels, side)
        kernel, padding = {"conv1": (6, 3), "conv2": (4, 0), "conv5": (2, 0)}.get(stage, (3, 1))
        x = normal(1, channels, side, side)
        torch.testing.assert_close(pool(x), F.avg_pool2d(x, kernel, kernel, padding))
        return pool

    found = Features(net, pool, False)(torch.zeros(1, 3, 224, 224))
    assert seen == [(96, 55), (256, 27), (384, 13), (384, 13), (256, 13)]
    assert [x.shape[1] for x in found.values()] == [9600, 9216, 9600, 9600, 9216]


def test_vggs_five_maps_before_its_pools_are_averaged_to_12_8_6_4_4():
    layers, names = stages(Backbone("vgg16", 3, 32))
    assert list(names.values()) == [f"conv{i}" for i in range(1, 6)]
    assert all(isinstance(layers[i], nn.ReLU) and isinstance(layers[i + 1], nn.MaxPool2d) for i in names)
    for channels, side, want in [(64, 224, 12), (128, 112, 8), (256, 56, 6), (512, 28, 4), (512, 14, 4)]:
        x = normal(1, channels, side, side)
        pooled = pool_for("deepcluster", "vgg16", "conv1", channels, side)(x)
        torch.testing.assert_close(pooled, F.adaptive_avg_pool2d(x, want))
    assert (
        pool_for("deepcluster", "lenet5", "conv1", 6, 28)(torch.zeros(1, 6, 28, 28)).shape[2] == 28
    )  # as it is


LA = [
    (64, 224, 56),
    (128, 112, 28),
]  # VGG's: 3.2 and 1.6 million features, still over 200,000 after pooling by 2
LA += [(64, 56, 28), (256, 28, 14)]  # a ResNet's: 200,704
LA += [
    (96, 55, 28),
    (256, 27, 27),
]  # AlexNet's: 290,400, whose last of 55 columns is not lost; 186,624 as it is


@pytest.mark.parametrize(("channels", "side", "want"), LA)
def test_la_pools_maps_of_over_200000_features_by_2_then_4(channels, side, want):
    x, kernel = torch.rand(1, channels, side, side), math.ceil(side / want)
    pooled = pool_for("la", "vgg16", "conv1", channels, side)(x)
    assert pooled.shape == (1, channels, want, want)
    corner = x[0, 0, (want - 1) * kernel :, (want - 1) * kernel :].mean()
    torch.testing.assert_close(pooled[0, 0, -1, -1], corner)


def maps(net, images):
    """Whole maps (B, C, h, w) of all stages."""
    sides, found = {}, {}

    def pool(stage, channels, side):
        sides[stage] = (channels, side, side)
        return nn.Identity()

    for stage, x in Features(net, pool, False)(images).items():
        found[stage] = x.view(-1, *sides[stage])
    return found


def test_stages_are_relu_outputs_before_pooling():
    net, images = lenet(), normal(3, 3, 32, 32)
    f = net.net.features  # conv, bn, relu, pool, conv, bn, relu, pool
    first = f[1](f[0](images)).clamp(min=0)
    second = f[5](f[4](F.max_pool2d(first, 2))).clamp(min=0)
    found = maps(net, images)
    assert list(found) == ["conv1", "conv2"]
    torch.testing.assert_close(list(found.values()), [first, second])


@pytest.mark.parametrize("size", [32, 80])
def test_stages_of_a_resnet_come_out_unchanged_by_what_follows(size):
    torch.manual_seed(0)
    backbone, images = (
        Backbone("resnet18", 3, size, sobel=True).eval().requires_grad_(False),
        normal(2, 3, size, size),
    )
    net, found = backbone.net, maps(backbone, images)
    x = net.maxpool(net.relu(net.bn1(net.conv1(backbone.sobel(images))))).clone()
    torch.testing.assert_close(found["stem"], x)
    for i in (1, 2, 3, 4):
        x = getattr(net, f"layer{i}")(x.clone())
        torch.testing.assert_close(found[f"layer{i}"], x)
    assert len(found) == 5


# --------------------------------------------------------------------------- training


def softmax_regression(x, labels, rates, batches, wd, classes=4):
    """Weights, biases and mean losses of plain SGD with momentum 0.9."""
    weight, bias, losses = torch.zeros(classes, x.shape[1]), torch.zeros(classes), []
    speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
    for lr, ids in zip(rates, batches, strict=True):
        logits = x[ids] @ weight.T + bias
        losses.append(-logits.log_softmax(1)[range(len(ids)), labels[ids]].mean().item())
        error = logits.softmax(1) - F.one_hot(labels[ids], classes)
        speed_w = 0.9 * speed_w + error.T @ x[ids] / len(ids) + wd * weight
        speed_b = 0.9 * speed_b + error.mean(0) + wd * bias
        weight, bias = weight - lr * speed_w, bias - lr * speed_b
    return weight, bias, losses


def train(net, data, args):
    """main's models and epochs: (model, mean losses, order of each step's images)."""
    ((model, optimizer),) = eval_linear.models(net, args, data, CPU)
    loader, n = Loader(data, args.batch_size, args.image_size, 1.0, CPU, 0), len(data)
    run = [eval_linear.train(model, optimizer, loader, torch.arange(n), e, args) for e in range(args.epochs)]
    batches = [b for e in range(args.epochs) for b in order_of(args, e, n).split(args.batch_size)]
    return model, run, batches


def test_all_stages_and_weight_decays_at_once_equal_softmax_regression_alone():
    data, args, net = blocks(48, 32), arguments(), lenet()
    model, losses, batches = train(net, data, args)
    features, want = Features(net, lambda *about: pool_for("deepcluster", "lenet5", *about), False), []
    for stage, x in features(normalized(data)).items():
        for row, wd in zip(model[1].linear, args.wd, strict=True):
            rates = [0.01 / math.sqrt(1 + 0.01 * wd * t) for t in range(6)]
            weight, bias, each = softmax_regression(x, data.labels, rates, batches, wd)
            torch.testing.assert_close(row[stage].weight.data, weight, atol=1e-6, rtol=1e-4)
            torch.testing.assert_close(row[stage].bias.data, bias, atol=1e-6, rtol=1e-4)
            assert weight.abs().max() > 1e-3
            want.append(each)
    mean = np.array(want).reshape(4, 2, 3).mean((0, 2))
    assert losses == pytest.approx(mean.tolist(), rel=1e-5)


def test_coke_probes_what_the_network_gives_at_a_cosine_by_the_epoch():
    data, net = blocks(48, 32), lenet()
    args = arguments(protocol="coke", lr=[0.4], wd=[1e-2], epochs=4)
    for layer in (layer for layer in net.modules() if isinstance(layer, nn.Linear)):
        layer.weight.data *= 10  # features of a size that can be learnt from
    model, _, batches = train(net, data, args)
    rates = [0.4 * (1 + math.cos(math.pi * (t // 3) / 4)) / 2 for t in range(12)]
    weight, bias, _ = softmax_regression(net(normalized(data)), data.labels, rates, batches, 1e-2)
    linear = model[1].linear[0]["last feature"]
    torch.testing.assert_close(linear.weight.data, weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(linear.bias.data, bias, atol=1e-6, rtol=1e-4)


def test_fine_tuning_by_a_plain_loop():
    """Two linear layers with a ReLU between: momentum 0.9, weight decay, cosine by the step, the last 10 times as fast."""
    data = blocks(24, 2, block=1)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    nn.init.normal_(net[1].weight, generator=generator(1))
    first = [p.detach().clone() for p in net.parameters()]
    args = arguments(
        finetune=True, protocol="finetune", lr=[0.05], wd=[0.02], epochs=3, batch_size=8, image_size=2
    )
    model, losses, batches = train(net, data, args)
    linear = model[1].linear[0]["last feature"]
    assert all(map(torch.equal, net.parameters(), first))  # the pair trains a copy

    start = torch.empty(4, 6).normal_(0, 0.01, generator=generator(args.seed, "output layer"))
    parts, x, want = [*first, start, torch.zeros(4)], normalized(data).flatten(1), []
    speed = [torch.zeros_like(p) for p in parts]
    for t, ids in enumerate(batches):
        w1, b1, w2, b2 = (p.requires_grad_() for p in parts)
        logits = (x[ids] @ w1.T + b1).clamp(min=0) @ w2.T + b2
        loss = -logits.log_softmax(1)[range(8), data.labels[ids]].mean()
        gradients = torch.autograd.grad(loss, parts)
        lr = 0.05 * (1 + math.cos(math.pi * t / 9)) / 2
        speed = [0.9 * s + g + 0.02 * p.detach() for s, g, p in zip(speed, gradients, parts, strict=True)]
        rates = (lr, lr, 10 * lr, 10 * lr)
        parts = [p.detach() - r * s for p, r, s in zip(parts, rates, speed, strict=True)]
        want.append(loss.item())
    assert losses == pytest.approx([sum(want[i : i + 3]) / 3 for i in (0, 3, 6)], rel=1e-5)
    trained = [*model[0].net[0][1].parameters(), linear.weight, linear.bias]
    torch.testing.assert_close([p.data for p in trained], parts, atol=1e-6, rtol=1e-4)


def test_learning_rates_by_hand():
    assert learning_rate("deepcluster", 0.01, 1e-4, 0, 90, 0, 10) == 0.01
    assert learning_rate("deepcluster", 0.01, 1e-4, 30, 90, 0, 100_000) == pytest.approx(
        0.005
    )  # 0.01 / sqrt(4)
    assert learning_rate("deepcluster", 0.1, 0.0, 10**8, 90, 3, 10) == 0.1
    steps = [learning_rate([11, 41], 1.0, 0, e, 51, 0, 9) for e in (0, 10, 11, 40, 41, 50)]
    assert steps == pytest.approx([1, 1, 0.1, 0.1, 0.01, 0.01])
    assert learning_rate([], 1.0, 0, 40, 51, 3, 9) == 1
    values = [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]
    assert [learning_rate("coke", 1, 0, e, 4, 3, 9) for e in range(4)] == pytest.approx(values)
    assert [learning_rate("finetune", 1, 0, t // 2, 2, t % 2, 2) for t in range(4)] == pytest.approx(values)


def test_the_loss_is_a_sum_over_classifiers_and_files_without_label_have_no_part_in_it():
    logits, target = normal(2, 3, 5, 4).requires_grad_(), torch.tensor([1, -100, 0, 3, -100])
    loss = probe_loss(logits, target)
    (gradient,) = torch.autograd.grad(loss, logits)
    want = sum(
        -logits[s, w].log_softmax(1)[i, target[i]] / 5 for s in (0, 1) for w in range(3) for i in (0, 2, 3)
    )
    torch.testing.assert_close(loss, want)
    assert not gradient[:, :, [1, 4]].any() and gradient[:, :, [0, 2, 3]].all()


def test_choice_by_hand():
    # Two stages, three decays, three epochs; stage 0 ends best with decay 2, stage 1 with decay 0.
    held_out = torch.tensor(
        [
            [[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]],
            [[0.9, 0.2, 0.7], [0.6, 0.9, 0.3]],
            [[0.3, 0.4, 0.6], [0.7, 0.5, 0.7]],
        ]
    )
    assert [x.tolist() for x in choose(held_out)] == [[2, 0], [1, 0]]
    given_up = torch.tensor([[[math.nan, 0.0, 0.9, 0.9, math.nan]]])
    assert choose(given_up)[0].tolist() == [2] and choose(given_up[..., :2])[0].tolist() == [1]


# --------------------------------------------------------------------------- crops


@pytest.mark.parametrize("crops", ["alexnet", "central", "resnet", "imagenet", "cifar"])
@pytest.mark.parametrize("files", [False, True])
def test_training_crops(crops, files):
    """A column ramp tells where a crop lies and how wide it is."""
    n, args = (60 if files else 400), arguments(crops=crops, image_size=24, center_fraction=0.75)
    ramp = (torch.arange(64).view(1, 1, 1, 64).expand(n, 3, 32, 64) * 4).byte()
    view = eval_linear.training_view(args)
    torch.manual_seed(0)
    if files:
        image = Image.fromarray(ramp[0].permute(1, 2, 0).numpy())
        found = torch.stack([view.crop_file(image) for _ in range(n)]) / 255
    else:
        found = view.crop(ramp)
    columns = found[:, 0, 0] * 255 / 4  # (n, 24): the column in every pixel
    if crops in ("alexnet", "central"):
        width, left = (columns[:, 20] - columns[:, 3]) * 24 / 17, columns[:, 0].round()
        assert (width - 24).abs().max() < 0.6  # 24 of 32 rows, as columns
        low, high = (0, 40) if crops == "alexnet" else (16, 24)  # the whole image, its middle square
        assert low <= left.min() <= low + 3 and high - 3 <= left.max() <= high
    else:
        width = (columns[:, 20] - columns[:, 3]) * 24 / 17
        least = math.sqrt({"resnet": 0.2, "imagenet": 0.08, "cifar": 0.3}[crops] * 32 * 64 * 3 / 4)
        assert least - 1 < width.min() < 1.6 * least and 32 < width.max() < 56  # ratio 4/3 of 32 rows: 43


def test_ten_crops_are_corners_center_and_mirror_images_of_pixels_and_of_files():
    pixels = blocks(3, 40).pixels
    view = TenCrops(32, center=0.8)
    found = view.crop(pixels)
    at = ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))
    for i, image in enumerate(pixels / 255):
        want = [image[:, y : y + 32, x : x + 32] for y, x in at]
        want += [w.flip(-1) for w in want]
        distance = [min((w - crop).abs().max() for crop in found[i]) for w in want]
        assert found[i].shape == (10, 3, 32, 32) and max(distance) == 0
        as_file = view.crop_file(Image.fromarray(pixels[i].permute(1, 2, 0).numpy()))
        assert as_file.dtype == torch.uint8 and torch.equal(as_file / 255, found[i])
    small = TenCrops(16, center=0.8).crop(pixels)[0, 4]
    torch.testing.assert_close(
        small, View(16, center=0.8, flip=0).crop(pixels)[0]
    )  # the center crop, resized


def test_accuracy_of_ten_crops_is_that_of_a_plain_loop_over_the_softmax():
    data, net = blocks(30, 40, seed=4), lenet()
    body = Features(net, lambda *about: nn.AdaptiveAvgPool2d(4), False)
    model = nn.Sequential(body, Probes(body(torch.zeros(1, 3, 32, 32)), 2, 4)).eval()
    for i, weight in enumerate(model[1].parameters()):
        weight.data = normal(*weight.shape, seed=i) * (weight.ndim > 1)
        weight.data -= weight.data.mean(-1, keepdim=True)  # what all images share cancels out
    index, loader = torch.arange(3, 30), Loader(data, 8, 32, 0.8, CPU, 0)
    ten = Loader(data, 4, 32, 0.8, CPU, 0)
    ten.center = TenCrops(32, center=0.8)
    right = {1: torch.zeros(2, 2), 10: torch.zeros(2, 2)}
    for i in index.tolist():
        image = normalized(data)[i]
        crops = [image[:, y : y + 32, x : x + 32] for y, x in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
        p = model(torch.stack([view for crop in crops for view in (crop, crop.flip(-1))])).softmax(-1)
        for s in (0, 1):
            for w in (0, 1):
                right[10][s, w] += int(sum(p[s, w]).argmax()) == data.labels[i]
                right[1][s, w] += int(p[s, w, 8].argmax()) == data.labels[i]  # the center, not mirrored
    assert (right[1] != right[10]).any(), "the example tells the two apart"
    torch.testing.assert_close(eval_linear.accuracy(model, loader, index).float(), right[1] / 27)
    torch.testing.assert_close(eval_linear.accuracy(model, ten, index, 10).float(), right[10] / 27)


# --------------------------------------------------------------------------- nearest neighbors


def plain_knn(queries, target, bank, labels, ks):
    right = dict.fromkeys(ks, 0)
    for query, label in zip(queries.tolist(), target, strict=True):
        cosines = [sum(a * b for a, b in zip(query, key, strict=True)) for key in bank.tolist()]
        ranked = sorted(zip(cosines, labels, strict=True), reverse=True)
        for k in ks:
            votes = dict.fromkeys(labels, 0.0)
            for cosine, c in ranked[:k]:
                votes[c] += math.exp(cosine / 0.07)
            right[k] += max(votes, key=votes.get) == label
    return {k: n / len(target) for k, n in right.items()}


@pytest.mark.parametrize("parts", [1, 4])
def test_knn_accuracy_by_a_plain_loop_and_unreadable_files_are_neither_asked_nor_heard(parts):
    queries, bank = F.normalize(normal(40, 3)), F.normalize(normal(50, 3, seed=1))
    target, labels = (torch.randint(3, (n,), generator=generator(n)) for n in (40, 50))
    labels[:20] = 0  # more of one class, so that 1 and 30 neighbors answer differently
    target[5], labels[[3, 7, 30]] = -100, -1
    asked, heard = target >= 0, labels >= 0
    want = plain_knn(
        queries[asked], target[asked].tolist(), bank[heard], labels[heard].tolist(), (1, 30, 200)
    )
    bank = zip(bank.tensor_split(parts), labels.tensor_split(parts), strict=True)
    assert knn_accuracy(queries, target, bank, (1, 30, 200)) == pytest.approx(want) and want[1] != want[30]


def test_knn_accuracy_is_the_same_on_two_processes(launch):
    code = """
        import torch
        from common import generator, knn_accuracy, setup, shard
        from torch.nn.functional import normalize
        setup("cpu")
        gen = generator(3)
        x, y = normalize(torch.randn(301, 4, generator=gen)), torch.randint(3, (301,), generator=gen)
        (a, b), (c, d) = shard(60), shard(241)
        bank = [(x[60 + i : 60 + j], y[60 + i : 60 + j]) for i, j in ((c, c + 7), (c + 7, d))]
        print(knn_accuracy(x[a:b], y[a:b], bank))
    """
    one = launch(code, world=1)
    two = launch(code, world=2)
    assert one.codes == [0] and two.codes == [0, 0], two.err
    assert two.out[0] == two.out[1] == one.out[0] and "1: 0." in one.out[0]


def test_neighbors_look_in_parts_and_in_the_embedding():
    train, test = (blocks(n, 2, 1, 3, seed, block=1) for n, seed in ((50, 7), (30, 8)))
    linear = nn.Linear(4, 5)
    loaders = [Loader(d, 8, 2, 1.0, CPU, 0) for d in (train, test)]
    x, q = (normalized(d).flatten(1) for d in (train, test))
    for space in (nn.Identity(), nn.Sequential(nn.ReLU(), linear)):
        with torch.no_grad():
            bank, queries = F.normalize(space(x)), F.normalize(space(q))
        want = plain_knn(queries, test.labels.tolist(), bank[5:], train.labels[5:].tolist(), (1, 200))
        for limit in (2**28, 40):
            fit, asked = torch.arange(5, 50), torch.arange(30)
            about = (nn.Flatten(), space, loaders[0], fit, loaders[1], asked, limit)
            assert eval_linear.neighbors(*about) == pytest.approx(want)


# --------------------------------------------------------------------------- the command line


def save(path, net, *, data="digits", embedding=None, **changed):
    meta = {**net.meta, "method": "deepcluster", "center_fraction": 1.0, "data": data, **changed}
    meta |= {"mean": [0.3] * meta["channels"], "std": [0.35] * meta["channels"]}
    path.parent.mkdir(parents=True, exist_ok=True)
    saved = {"state_dict": net.net.state_dict(), "meta": meta}
    torch.save(saved | ({"embedding": embedding.state_dict()} if embedding else {}), path)
    return path


def fake(arch, size):
    """A network in name alone, for options()."""
    meta = {"arch": arch, "channels": 3, "image_size": size, "sobel": False, "pool": False, "norm": False}
    return Namespace(net=nn.Flatten(), meta=meta)


DECAYS = "[0.001, 0.0001, 1e-05, 1e-06]"
GRID = "[1.0, 0.1, 0.01, 0.001] [1e-05, 1e-06, 0.0]"
CASES = f"""
deepcluster       | alexnet  |                          | deepcluster 90 256 [0.01] {DECAYS} None central 0.1
lsdc-clustering   | resnet18 |                          | deepcluster 90 256 [0.01] {DECAYS} None central 0.1
local_aggregation | alexnet  |                          | la 65 128 [0.01] [0.0] [45, 55] alexnet 0.0
local_aggregation | vgg16    |                          | la 51 128 [0.01] [0.0001] [11, 41] resnet 0.0
local_aggregation | resnet50 |                          | la 70 128 [0.01] [0.0001] [30, 60] resnet 0.0
coke-1            | resnet50 |                          | coke 90 1024 [0.2] [1e-06] None imagenet 0.0
coke-multi        | resnet50 |                          | coke 90 1024 [0.4] [1e-06] None imagenet 0.0
coke              | resnet50 | --protocol la --epochs 3 | la 3 128 [0.01] [0.0001] [30, 60] resnet 0.0
coke-1            | vgg16    | --finetune               | finetune 20 256 {GRID} None imagenet 0.1
"""


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_the_protocol_is_that_of_the_method_the_file_names(tmp_path, case):
    method, arch, flags, want = (cell.strip() for cell in case.split("|"))
    names = ("protocol", "epochs", "batch_size", "lr", "wd", "lr_steps", "crops", "held_out")
    path = save(tmp_path / "run" / "backbone.pt", fake(arch, 224), data="data/places", method=method)
    args = options([str(path), *flags.split()])
    assert " ".join(str(getattr(args, name)) for name in names) == want
    assert args.ten_crops == (args.protocol != "finetune") and args.flip and args.out == str(path.parent)
    small = options([str(save(path, fake(arch, 32), method=method)), *flags.split()])
    assert small.protocol == (args.protocol if flags else "deepcluster")
    assert not small.flip and not small.ten_crops  # digits
    assert small.crops == {"deepcluster": "center", "finetune": "cifar"}.get(small.protocol, args.crops)
    assert small.epochs == (20 if small.protocol == "deepcluster" else args.epochs)


def run(*argv):
    """main() with this command line, in this process; its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["eval_linear.py", *map(str, argv)])
        try:
            eval_linear.main()
        except SystemExit as end:
            return end.code
    return 0


def read(folder, name="digits"):
    return json.loads((Path(folder) / f"eval_linear-{name}.json").read_text())


BAD = """
                                                       | --random ARCH
RUN --random lenet5                                    | --random ARCH
--pixels --random lenet5                               | --random ARCH
--random lenet7                                        | lenet7
RUN --image-size 64                                    | --random
AT/nowhere                                             | No such file
AT/photos                                              | no run folder
AT/damaged.pt                                          | damaged
AT/vectors.pt                                          | for vectors
--random lenet5 --data AT/flat                         | no labels
--random lenet5 --data imagnet                         | no such folder
RANDOM --batch-size 1294                               | 1293
RANDOM --out AT/file/below                             | cannot write
RANDOM --out AT/done                                   | --overwrite
RANDOM --held-out 1                                    | --held-out
RANDOM --epochs 0                                      | --epochs
RANDOM --wd -1                                         | --wd
RANDOM --lr 0.1 0.01                                   | --finetune
RANDOM --compile                                       | --finetune
RANDOM --finetune --protocol la                        | --finetune has a schedule
RANDOM --finetune --lr-steps                           | --finetune has a schedule
RANDOM --finetune --held-out 0                         | --held-out 0
RANDOM --protocol coke --wd 0 1                        | --held-out 0
--random lenet5 --data AT/photos --protocol coke       | 1024 is more than the 16
"""


def test_bad_input_ends_with_one_line_and_exit_code_2(tmp_path, capsys, monkeypatch):
    saved = save(tmp_path / "gray" / "backbone.pt", lenet(1))
    save(tmp_path / "vectors.pt", fake("mlp", 1))
    (tmp_path / "damaged.pt").write_bytes(saved.read_bytes()[:5000])
    for name, count in (("photos/a", 10), ("photos/b", 10), ("flat", 3)):
        write_images(tmp_path / name, count)
    (tmp_path / "file").write_text("")
    (tmp_path / "done").mkdir()
    (tmp_path / "done" / "eval_linear-digits.json").write_text("{}")
    monkeypatch.chdir(tmp_path)
    for case in BAD.strip("\n").splitlines():
        argv, words = case.split("|")
        argv = argv.replace("RANDOM", "--random lenet5 --data digits").replace("RUN", "AT/gray")
        assert run(*argv.replace("AT", str(tmp_path)).split()) == 2, case
        said = capsys.readouterr().err.strip().splitlines()
        assert words.strip() in said[-1] and "error:" in said[-1], (case, said)


# --------------------------------------------------------------------------- whole runs


def test_a_run_folder_its_file_and_its_gray_images_in_three_channels(tmp_path, capsys):
    linear = nn.Linear(84, 3)
    path = save(tmp_path / "backbone.pt", lenet(3), center_fraction=0.8, embedding=linear)
    flags = ["--epochs", 2, "--ten-crops", "--crops", "central", "--wd", 1e-4, 1e-2]
    assert run(path, *flags) == 0
    found, said = read(tmp_path), capsys.readouterr().out
    assert run(tmp_path, *flags, "--out", tmp_path / "again") == 0
    assert read(tmp_path / "again")["stages"] == found["stages"]
    assert found["args"]["center_fraction"] == 0.8 and found["args"]["sobel"] is False
    assert set(found["knn"]) == {"last feature", "embedding"} and found["knn"]["last feature"]["1"] > 0.8
    assert found["images"] == {"train": 1293, "held_out": 144, "test": 360} and len(found["loss"][0]) == 2
    for name, stage in found["stages"].items():
        assert stage["report"] == stage["ten_crops_last"] != stage["test_last"]
        shown = next(line for line in said.splitlines() if line.startswith(name)).split()
        assert shown[-1] == f"{100 * stage['report']:.2f}" and len(stage["held_out_each"]) == 2
    assert "REPORT" in said and max(len(x) for x in said.splitlines() if "/tmp" not in x) <= 100


def test_random_networks_are_those_deepcluster_starts_from(tmp_path):
    import deepcluster

    args = options(["--random", "lenet5", "--data", "digits", "--seed", "5"])
    net = eval_linear.make_network(args, 1)[0].net
    torch.manual_seed(5)
    want = deepcluster.make_encoder(deepcluster.options(["--data", "digits"]), 1)[0].net
    torch.testing.assert_close(net.state_dict(), want.state_dict(), rtol=0, atol=0)


def test_pixels_have_a_probe_and_neighbors(tmp_path):
    assert run("--pixels", "--data", "digits", "--epochs", 5, "--out", tmp_path) == 0
    found = read(tmp_path)
    assert list(found["stages"]) == ["pixels"] and found["stages"]["pixels"]["features"] == 1024
    assert found["stages"]["pixels"]["report"] > 0.9 and found["row"].startswith("raw pixels")
    train, test = load_data("digits")
    x, q = (
        F.normalize(normalized(replace(d, mean=train.mean, std=train.std)).flatten(1)) for d in (train, test)
    )
    one = (train.labels[(q @ x.T).argmax(1)] == test.labels).double().mean().item()
    assert found["knn"]["last feature"]["1"] == pytest.approx(one) and one > 0.985


def test_test_labels_choose_nothing(tmp_path, monkeypatch):
    train, test = load_data("digits")
    train = replace(train, pixels=train.pixels[:400], labels=train.labels[:400])
    shuffled = replace(test, labels=test.labels[torch.randperm(360, generator=torch.Generator())])
    for flags, name in (
        (["--wd", 1, 0.1, 0], "digits"),
        (["--finetune", "--lr", 0.1, 0.01, "--wd", 0], "digits-finetune"),
    ):
        results = []
        for i, data in enumerate((test, shuffled)):
            monkeypatch.setattr(
                eval_linear, "load_data", lambda *_, data=data: (replace(train), replace(data))
            )
            about = ["--random", "lenet5", "--data", "digits", "--epochs", 4, "--batch-size", 32, "--no-knn"]
            assert run(*about, *flags, "--out", tmp_path / str(i)) == 0
            results.append(read(tmp_path / str(i), name))
        assert results[0]["loss"] == results[1]["loss"]
        for stage, before in results[0]["stages"].items():
            after = results[1]["stages"][stage]
            same = ("lr", "wd", "best_epoch", "held_out_last", "held_out_best", "held_out_each")
            assert all(before[name] == after[name] for name in same)
            assert before["held_out_last"] == max(before["held_out_each"])
            assert "finetune" in name or before["test_last"] > 0.6 > 0.25 > after["test_last"]


def test_held_out_and_test_images_are_not_trained_on(tmp_path, monkeypatch):
    seen, scored, train, accuracy = [], [], eval_linear.train, eval_linear.accuracy
    monkeypatch.setattr(eval_linear, "train", lambda *a: seen.append(a[3]) or train(*a))
    monkeypatch.setattr(
        eval_linear, "accuracy", lambda *a: scored.append((len(a[1].data), a[2])) or accuracy(*a)
    )
    assert run("--random", "lenet5", "--data", "digits", "--epochs", 2, "--no-knn", "--out", tmp_path) == 0
    (tested, _), (from_training, held) = scored[:2]
    assert (tested, from_training, len(held)) == (360, 1437, 144)
    for fit in seen:
        assert sorted(torch.cat([fit, held]).tolist()) == list(range(1437))


@pytest.fixture
def photos(tmp_path):
    """Two classes of 60 large images, dark and bright, without val/; ten bright files are empty."""
    for name, base in (("bright", 160), ("dark", 40)):
        pixels = np.random.default_rng(base).integers(base, base + 60, (60, 100, 110, 3), np.uint8)
        write_images(tmp_path / "photos" / name, 60, pixels.__getitem__)
    for i in range(10):
        (tmp_path / "photos" / "bright" / f"{i:03}.png").write_bytes(b"no image")
    return tmp_path / "photos"


def test_files_are_not_enlarged(photos, tmp_path):
    write_images(tmp_path / "large", 3, size=300)
    for folder, side in ((photos, 100), (tmp_path / "large", 224)):
        assert eval_linear.options(["--random", "resnet18", "--data", str(folder)]).image_size == side
    flags = ["--random", "resnet18", "--data", str(photos), "--image-size", "120"]
    assert eval_linear.options(flags).image_size == 120


def test_files_that_cannot_be_read_count_nowhere_and_are_told(photos, tmp_path, capsys):
    flags = ["--random", "lenet5", "--data", photos, "--image-size", 32, "--workers", 0, "--no-sobel"]
    assert run(*flags, "--epochs", 6, "--batch-size", 16, "--ten-crops", "--lr", 0.02, "--out", tmp_path) == 0
    found, said = read(tmp_path, "photos"), capsys.readouterr().out
    assert found["images"] == {"train": 86, "held_out": 10, "test": 24} and "24 of its 120 images" in said
    assert found["unreadable"] == 10 and "10 files could not be read" in said
    bad = {f"{photos}/bright/{i:03}.png" for i in range(10)}
    order = torch.randperm(120, generator=generator("test split"))[:24].tolist()
    paths = load_data(str(photos))[0].paths
    assert sum(paths[i] in bad for i in order) > 0, "some of them are test images"
    for stage in found["stages"].values():  # black stand-ins would be called dark, and wrong
        assert stage["test_last"] == stage["report"] == 1 or stage["ten_crops_last"] == stage["report"] == 1
    assert found["knn"]["last feature"] == {"1": 1, "200": pytest.approx(1, abs=0.5)}


def test_what_there_is_is_written_before_neighbors_and_knn_only_writes_beside_it(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(eval_linear, "neighbors", fail)
        with pytest.raises(MemoryError):
            run("--random", "lenet5", "--data", "digits", "--epochs", 1, "--out", tmp_path)
    assert read(tmp_path)["stages"]["conv1"]["report"] > 0.5 and "knn" not in read(tmp_path)
    before = (tmp_path / "eval_linear-digits.json").read_bytes()
    assert run("--random", "lenet5", "--data", "digits", "--knn-only", "--out", tmp_path) == 0
    assert read(tmp_path, "digits-knn")["knn"]["last feature"]["1"] > 0.9
    assert (tmp_path / "eval_linear-digits.json").read_bytes() == before


def test_la_chooses_nothing_and_trains_on_all(tmp_path):
    flags = ["--random", "lenet5", "--data", "digits", "--protocol", "la", "--epochs", 2, "--no-knn"]
    assert run(*flags, "--out", tmp_path) == 0
    found = read(tmp_path, "digits-la")
    assert found["images"] == {"train": 1437, "held_out": 0, "test": 360}
    stage = found["stages"]["conv1"]
    assert stage["wd"] == 1e-4 and stage["report"] == stage["test_last"] > 0.6
    assert stage["test_best"] is stage["held_out_last"] is stage["ten_crops_last"] is None


def test_coke_probes_a_resnets_average_and_reports_the_center_crop(photos, tmp_path):
    flags = ["--random", "resnet18", "--data", photos, "--image-size", 16, "--epochs", 1, "--workers", 0]
    assert run(*flags, "--protocol", "coke", "--batch-size", 32, "--no-knn", "--out", tmp_path) == 0
    (stage,) = read(tmp_path, "photos-coke")["stages"].items()
    assert stage[0] == "last feature" and stage[1]["features"] == 512
    assert stage[1]["report"] == stage[1]["test_last"] and stage[1]["ten_crops_last"] is not None


def test_two_processes_equal_one(start, tmp_path):
    path = save(tmp_path / "backbone.pt", lenet(1))
    flags = [path, "--epochs", 2, "--batch-size", 64, "--wd", 1e-3, 1e-5, "--out", "out", "--device", "cpu"]
    one, two = (read(start(flags, world=world).ok().folder / "out") for world in (1, 2))
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["loss"][0] == pytest.approx(one["loss"][0], rel=1e-5)
    assert two["knn"] == one["knn"] and one["knn"]["last feature"]["1"] > 0.8
    for stage in ("conv1", "conv2"):
        a, b = one["stages"][stage], two["stages"][stage]
        assert b["report"] == pytest.approx(a["report"], abs=0.003) and a["report"] > 0.6
        assert b["held_out_each"] == pytest.approx(a["held_out_each"], abs=0.007)


def test_two_processes_give_up_a_pair_together_and_all_given_up_is_an_error(start, tmp_path):
    path = save(tmp_path / "backbone.pt", lenet(1))
    flags = [path, "--finetune", "--batch-size", 128, "--epochs", 1, "--wd", 1e-5, "--out", "out", "--lr"]
    job = start([*flags, "1e30", "0.02"], world=2).ok()
    found = read(job.folder / "out", "digits-finetune")
    assert "lr 1e+30" in job.out and "given up" in job.out
    stage = found["stages"]["last feature"]
    assert stage["lr"] == 0.02 and stage["held_out_each"][0] is None and len(found["loss"]) == 2
    job = start([*flags, "1e30"], world=2).wait()
    assert job.codes == [2, 2] and job.err.count("error:") == 1 and "lower --lr" in job.err
    assert not (job.folder / "out" / "eval_linear-digits-finetune.json").exists()
