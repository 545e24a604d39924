"""eval_linear.py against plain loops, the papers' numbers and runs on the digits."""

import json
import math
import os
import socket
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import eval_linear  # noqa: E402
from legacy import Embedding, Images, Loader, backbone, load_data, seed_all  # noqa: E402

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def guest(monkeypatch):
    """main() runs in this process here: it leaves Ctrl-C alone and takes one core."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def small_images(n, side, channels=3, classes=4, seed=0, block=8):
    gen = torch.Generator().manual_seed(seed)
    coarse = torch.randint(
        0, 256, (n, channels, math.ceil(side / block), math.ceil(side / block)), generator=gen
    )
    pixels = (
        coarse.repeat_interleave(block, 2).repeat_interleave(block, 3)[:, :, :side, :side].to(torch.uint8)
    )
    labels = torch.randint(0, classes, (n,), generator=gen)
    mean, std = (0.4, 0.5, 0.6)[:channels], (0.2, 0.3, 0.25)[:channels]
    return Images("small", pixels, None, labels, [str(c) for c in range(classes)], mean, std)


def arguments(**changes):
    given = {"batch_size": 16, "image_size": 32, "lr": 0.01, "seed": 3, "flip": False, "amp": False}
    given |= {"crops": "centre", "lr_steps": None}
    return Namespace(**{**given, "wd": [1e-2, 0.0], **changes})


def lenet(channels=3):
    seed_all("test")
    return backbone("lenet5", channels, 32, sobel=False).eval().requires_grad_(False)


def run_main(*argv):
    with pytest.raises(SystemExit) as end:
        eval_linear.main([str(a) for a in argv])
    return end.value.code


def read(folder, data="digits"):
    return json.loads((folder / f"eval_linear-{data}.json").read_text())


# --------------------------------------------------------------------------- pooling and stages


def test_alexnet_features_are_those_of_the_released_code():
    net = backbone("alexnet", 3, 224, sobel=True).eval()
    maps = eval_linear.stage_maps(net, torch.zeros(1, 3, 224, 224))
    assert [tuple(m.shape[1:]) for m in maps.values()] == [
        (96, 55, 55), (256, 27, 27), (384, 13, 13), (384, 13, 13), (256, 13, 13),
    ]  # fmt: skip
    pools = {s: eval_linear.pool_for("alexnet", 224, s, *m.shape[1:3]) for s, m in maps.items()}
    features = eval_linear.stage_maps(net, torch.zeros(2, 3, 224, 224), pools)
    assert [tuple(x.shape) for x in features.values()] == [
        (2, d) for d in (9600, 9216, 9600, 9600, 9216)
    ]  # fmt: skip


def test_vgg_maps_are_averaged_to_12_8_6_4_4():
    for i, (channels, side, want) in enumerate(
        [(64, 224, 12), (128, 112, 8), (256, 56, 6), (512, 28, 4), (512, 14, 4)]
    ):
        pool = eval_linear.pool_for("vgg16", 224, f"conv{i + 1}", channels, side)
        assert pool(torch.zeros(1, channels, side, side)).shape == (1, channels, want, want)


def test_no_map_is_enlarged():
    assert eval_linear.pool_for("lenet5", 32, "conv1", 6, 28)(torch.zeros(1, 6, 28, 28)).shape[2] == 28


def test_stage_maps_are_the_relu_outputs_before_pooling():
    net, images = lenet(), torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    maps = eval_linear.stage_maps(net, images)
    f = net.features  # conv, bn, relu, pool, conv, bn, relu, pool
    first = f[1](f[0](images)).clamp(min=0)
    second = f[5](f[4](nn.functional.max_pool2d(first, 2))).clamp(min=0)
    assert list(maps) == ["conv1", "conv2"]
    torch.testing.assert_close(maps["conv1"], first)
    torch.testing.assert_close(maps["conv2"], second)
    assert not net.features[2]._forward_hooks, "hooks must not stay behind"


def test_resnet_stages_come_out_unchanged_by_what_follows():
    seed_all("test")
    net = backbone("resnet18", 3, 32).eval()
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    x = want = net.relu(net.bn1(net.conv1(images))).detach().clone()
    maps = eval_linear.stage_maps(net, images)
    torch.testing.assert_close(maps["stem"], want)
    with torch.no_grad():
        for i in (1, 2, 3, 4):
            x = getattr(net, f"layer{i}")(x.clone())
            torch.testing.assert_close(maps[f"layer{i}"], x)


# --------------------------------------------------------------------------- training


@pytest.mark.parametrize("stage", ["conv1", "conv2"])
def test_all_stages_at_once_equal_one_probe_alone(stage):
    data, args, net = small_images(48, 32), arguments(), lenet()
    loader = Loader(data, 16, 32, 32, CPU)
    pools = {"conv1": nn.AdaptiveAvgPool2d(5), "conv2": nn.AdaptiveAvgPool2d(3)}
    probes = eval_linear.Probes({"conv1": 150, "conv2": 144}, args.wd, 4)
    optimizer = torch.optim.SGD(probes.groups(args.wd), args.lr, momentum=0.9)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    for epoch in range(2):
        eval_linear.train(net, pools, probes, optimizer, loader, order, epoch, args)

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    images = (data.pixels.float() / 255 - mean) / std
    f, side = net.features, {"conv1": 5, "conv2": 3}[stage]
    maps = f[:3](images) if stage == "conv1" else f[:7](images)
    x = nn.functional.adaptive_avg_pool2d(maps, side).flatten(1)
    for w, wd in enumerate(args.wd):
        weight, bias = torch.zeros(4, x.shape[1]), torch.zeros(4)
        speed_w, speed_b = torch.zeros_like(weight), torch.zeros_like(bias)
        for t in range(6):
            ids = order[16 * (t % 3) : 16 * (t % 3) + 16]
            error = (x[ids] @ weight.T + bias).softmax(1) - nn.functional.one_hot(data.labels[ids], 4)
            lr = 0.01 / math.sqrt(1 + 0.01 * wd * t)
            speed_w = 0.9 * speed_w + error.T @ x[ids] / 16 + wd * weight
            speed_b = 0.9 * speed_b + error.mean(0) + wd * bias
            weight, bias = weight - lr * speed_w, bias - lr * speed_b
        torch.testing.assert_close(probes.linear[stage][w].weight.data, weight, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(probes.linear[stage][w].bias.data, bias, atol=1e-6, rtol=1e-4)
        assert weight.abs().max() > 1e-3


def test_learning_rate_follows_the_formula():
    assert eval_linear.decayed_lr(0.01, 1e-4, 0) == 0.01
    assert eval_linear.decayed_lr(0.01, 1e-4, 3_000_000) == pytest.approx(0.005)  # 0.01 / sqrt(4)
    assert eval_linear.decayed_lr(0.1, 0.0, 10**9) == 0.1


def test_every_weight_decay_has_its_own_rate():
    data, args = small_images(48, 32), arguments(lr=0.5, wd=[0.5, 0.0])
    probes = eval_linear.Probes({"conv1": 6, "conv2": 16}, args.wd, 4)
    optimizer = torch.optim.SGD(probes.groups(args.wd), args.lr, momentum=0.9)
    pools = {stage: nn.AdaptiveAvgPool2d(1) for stage in ("conv1", "conv2")}
    eval_linear.train(
        lenet(), pools, probes, optimizer, Loader(data, 16, 32, 32, CPU), torch.arange(48), 4, args
    )
    t = 4 * 3 + 2  # the last of the fifth epoch's three steps
    assert [g["lr"] for g in optimizer.param_groups] == pytest.approx([0.5 / math.sqrt(1 + 0.25 * t), 0.5])
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert sum(len(g["params"]) for g in optimizer.param_groups) == 8  # 2 stages, 2 decays, weight and bias


def test_crops_and_flips_are_those_of_a_plain_loop():
    gen = torch.Generator().manual_seed(2)
    images, random = torch.randn(40, 2, 9, 11, generator=gen), torch.rand(40, 3, generator=gen)
    got = eval_linear.crop_and_flip(images, 8, random, 0.5)
    for i, (a, b, c) in enumerate(random.tolist()):
        top, left = int(a * 2), int(b * 4)
        want = images[i, :, top : top + 8, left : left + 8]
        torch.testing.assert_close(got[i], want.flip(-1) if c < 0.5 else want, rtol=0, atol=0)
    assert len({int(r * 4) for r in random[:, 1].tolist()}) == 4, "every position occurs"


def test_choice_by_hand():
    # Two stages, three decays, three epochs; stage 0 ends best with decay 2, stage 1 with decay 0.
    held_out = torch.tensor(
        [
            [[0.9, 0.1, 0.5], [0.8, 0.2, 0.3]],
            [[0.9, 0.2, 0.7], [0.6, 0.9, 0.3]],
            [[0.3, 0.4, 0.6], [0.7, 0.5, 0.7]],
        ]
    )
    decay, epoch = eval_linear.choose(held_out)
    assert decay.tolist() == [2, 0]
    assert epoch.tolist() == [1, 0]


# --------------------------------------------------------------------------- scoring


def test_ten_crops_are_the_mean_of_the_softmax_over_a_plain_loop():
    data, args, net = small_images(30, 40, seed=4), arguments(batch_size=40), lenet()
    gen = torch.Generator().manual_seed(0)
    probes = eval_linear.Probes({"conv1": 6 * 25, "conv2": 16 * 9}, args.wd, 4)
    for name, weight in probes.named_parameters():
        weight.data = torch.randn(weight.shape, generator=gen) * (name.endswith("weight"))
        if name.endswith("weight"):
            weight.data -= weight.data.mean(1, keepdim=True)  # what all images share cancels out
    pools = {"conv1": nn.AdaptiveAvgPool2d(5), "conv2": nn.AdaptiveAvgPool2d(3)}
    ids, loader = torch.arange(3, 30), Loader(data, 40, 32, 40, CPU)

    def predict(images):
        return probes(eval_linear.stage_maps(net, images, pools))

    got = {t: eval_linear.accuracies(predict, (2, 2), loader, ids, args, t) for t in (False, True)}
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    right = {False: torch.zeros(2, 2), True: torch.zeros(2, 2)}
    for i in ids.tolist():
        image = (data.pixels[i].float() / 255 - mean) / std
        crops = [image[:, y : y + 32, x : x + 32] for y, x in ((0, 0), (0, 8), (8, 0), (8, 8), (4, 4))]
        crops = torch.stack([view for crop in crops for view in (crop, crop.flip(-1))])
        for s, (end, side) in enumerate(((3, 5), (7, 3))):
            x = nn.functional.adaptive_avg_pool2d(net.features[:end](crops), side).flatten(1)
            for w in range(2):
                p = [probes.linear[f"conv{s + 1}"][w](row).softmax(0) for row in x]
                right[True][s, w] += int(sum(p).argmax()) == data.labels[i]
                right[False][s, w] += int(p[8].argmax()) == data.labels[i]  # the centre, not mirrored
    assert (right[True] != right[False]).any(), "the example tells the two apart"
    for ten in (False, True):
        torch.testing.assert_close(got[ten].float(), right[ten] / 27)


def test_neighbours_by_a_plain_loop():
    train, test = (small_images(n, 2, 1, 3, seed, block=1) for n, seed in ((30, 7), (25, 8)))
    train.labels[:12] = 0  # more of one class, so that 1 and 200 neighbours answer differently
    net = nn.Flatten()
    loaders = [Loader(d, 8, 2, 2, CPU) for d in (train, test)]
    got = eval_linear.nearest_neighbours(net, *loaders, arguments())

    def rows(d):
        x = [[(p / 255 - 0.4) / 0.2 for p in image] for image in d.pixels.flatten(1).tolist()]
        return [[v / math.sqrt(sum(u * u for u in r)) for v in r] for r in x]

    bank, labels, right = rows(train), train.labels.tolist(), {1: 0, 30: 0}
    for query, label in zip(rows(test), test.labels.tolist(), strict=True):
        cosine = sorted(
            (
                (sum(a * b for a, b in zip(query, key, strict=True)), c)
                for key, c in zip(bank, labels, strict=True)
            ),
            reverse=True,
        )
        for k in right:
            votes = [0.0, 0.0, 0.0]
            for similarity, c in cosine[:k]:
                votes[c] += math.exp(similarity / 0.07)
            right[k] += votes.index(max(votes)) == label
    assert right[1] != right[30]
    assert got == {"last feature": {"1": pytest.approx(right[1] / 25), "200": pytest.approx(right[30] / 25)}}


# --------------------------------------------------------------------------- data


def test_test_labels_choose_nothing(monkeypatch, tmp_path):
    train, test = load_data("digits")
    train = replace(train, pixels=train.pixels[:400], labels=train.labels[:400])
    shuffled = replace(test, labels=test.labels[torch.randperm(360, generator=torch.Generator())])
    results = []
    for i, data in enumerate((test, shuffled)):
        monkeypatch.setattr(eval_linear, "load_data", lambda *_, data=data: (train, data))
        argv = ["--random", "lenet5", "--epochs", 3, "--batch-size", 64, "--wd", "1", "0.1", "0"]
        assert run_main(*argv, "--no-knn", "--out", tmp_path / str(i)) == 0
        results.append(read(tmp_path / str(i))["stages"])
    for stage, before in results[0].items():
        after = results[1][stage]
        for name in ("wd", "best_epoch", "held_out_last", "held_out_best"):
            assert before[name] == after[name]
        assert before["test_last"] > 0.6 > 0.25 > after["test_last"]


def test_held_out_and_test_images_are_not_trained_on(tmp_path, monkeypatch):
    seen, train = [], eval_linear.train
    scored, accuracies = [], eval_linear.accuracies
    monkeypatch.setattr(eval_linear, "train", lambda *a: seen.append(a[5]) or train(*a))
    monkeypatch.setattr(
        eval_linear, "accuracies", lambda *a, **k: scored.append((a[2].data, a[3])) or accuracies(*a, **k)
    )
    assert run_main("--random", "lenet5", "--epochs", 2, "--no-knn", "--out", tmp_path) == 0
    (held_data, held), (test_data, _) = scored[:2]
    assert len(held) == 144 and len(held_data) == 1437 and len(test_data) == 360
    for order in seen:
        assert sorted(torch.cat([order, held]).tolist()) == list(range(1437))
    assert not torch.equal(seen[0], seen[1]), "every epoch has its own order"


def folder_of(path, classes, images, side=20):
    for c in range(classes):
        (path / f"class{c}").mkdir(parents=True)
        for i in range(images):
            pixels = np.random.default_rng(100 * c + i).integers(0, 255, (side, side, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(path / f"class{c}" / f"{i}.png")
    return path


def test_a_labelled_folder_without_val_is_split_by_a_fifth(tmp_path, capsys):
    folder = folder_of(tmp_path / "photos", 2, 10)
    train, test = eval_linear.labelled(str(folder), "data", CPU)
    assert (len(train), len(test)) == (16, 4)
    assert sorted(train.paths + test.paths) == sorted(str(p) for p in folder.rglob("*.png"))
    for data in (train, test):
        assert [f"class{c}" for c in data.labels.tolist()] == [Path(p).parent.name for p in data.paths]
    assert "4 of its 20 images" in capsys.readouterr().out


def save_lenet(path, channels, **meta):
    net = lenet(channels)
    meta = {"arch": "lenet5", "image_size": 32, "sobel": False, "method": "test", "data": "digits", **meta}
    meta |= {"channels": channels, "mean": [0.25] * channels, "std": [0.5] * channels}
    torch.save({"state_dict": net.state_dict(), "meta": meta}, path)
    return path


def test_a_file_is_evaluated_beside_itself_and_grey_images_become_three_channels(tmp_path):
    path = save_lenet(tmp_path / "backbone.pt", 3, resize=36)
    flags = ["--epochs", 1, "--ten-crops", "--wd", "1e-4"]
    assert run_main(path, *flags) == 0
    from_file = read(tmp_path)
    (tmp_path / "eval_linear-digits.json").unlink()
    assert run_main(tmp_path, *flags) == 0
    assert read(tmp_path)["stages"] == from_file["stages"]
    assert from_file["args"]["resize"] == 36, "the run's own resize"
    assert from_file["knn"]["last feature"]["1"] > 0.8
    stage = from_file["stages"]["conv1"]
    assert 0 < stage["ten_crops_last"] <= 1 and stage["ten_crops_last"] != stage["test_last"]
    grey, _ = load_data("digits")
    seen = eval_linear.as_trained(grey, from_file["network"])
    assert seen.mean == (0.25, 0.25, 0.25) and seen.std == (0.5, 0.5, 0.5)
    assert seen.pixels.shape == (1437, 3, 32, 32) and torch.equal(seen.pixels[:, 2], grey.pixels[:, 0])


def test_large_images_train_on_random_crops_of_the_central_square(tmp_path, monkeypatch):
    folder = folder_of(tmp_path / "photos", 2, 10, side=100)
    shapes, crop = [], eval_linear.crop_and_flip
    monkeypatch.setattr(
        eval_linear, "crop_and_flip", lambda x, *a: shapes.append((x.shape, a[0], a[2])) or crop(x, *a)
    )
    flags = ["--data", folder, "--image-size", 80, "--epochs", 1, "--batch-size", 7, "--workers", 0]
    assert run_main("--random", "lenet5", *flags, "--out", tmp_path) == 0
    assert shapes == [((7, 3, 91, 91), 80, 0.5)] * 2  # 80 * 256 / 224; 16 - 2 images, flips
    assert read(tmp_path, "photos")["stages"]["conv2"]["ten_crops_last"] is not None


# --------------------------------------------------------------------------- Local Aggregation's protocol


def test_la_pools_maps_of_over_200000_features_by_2_then_4():
    for channels, side, want in [
        (64, 224, 56),  # VGG's conv1: 3.2 million, 802,816 after pooling by 2
        (128, 112, 28),  # 1.6 million, 401,408 after pooling by 2
        (64, 56, 28),  # a ResNet's stem: 200,704
        (96, 55, 28),  # AlexNet's conv1: 290,400; 55 is odd, and its last column is not lost
        (256, 28, 14),  # 200,704
        (256, 27, 27),  # 186,624: as it is
    ]:
        pool = eval_linear.pool_for("vgg16", 224, "conv", channels, side, "la")
        x = torch.rand(1, channels, side, side)
        assert pool(x).shape == (1, channels, want, want), (channels, side)
        kernel = math.ceil(side / want)
        corner = x[0, 0, (want - 1) * kernel :, (want - 1) * kernel :].mean()
        torch.testing.assert_close(pool(x)[0, 0, -1, -1], corner)


def la_arguments(arch, *argv, data="digits"):
    meta = {"arch": arch, "image_size": 224, "resize": 256, "sobel": False}
    args = eval_linear.options(["run", "--protocol", "la", *argv])
    return eval_linear.resolve(args, meta, data, CPU)


def test_la_schedules_and_crops_are_the_papers():
    for arch, epochs, steps, wd, crops in [
        ("alexnet", 65, [45, 55], [0.0], "alexnet"),
        ("vgg16", 51, [11, 41], [1e-4], "resnet"),
        ("resnet18", 70, [30, 60], [1e-4], "resnet"),
        ("resnet50", 70, [30, 60], [1e-4], "resnet"),
    ]:
        args = la_arguments(arch)
        assert (args.epochs, args.lr_steps, args.wd, args.crops) == (epochs, steps, wd, crops)
        assert (args.lr, args.batch_size, args.held_out, args.ten_crops) == (0.01, 128, 0, True)
        assert la_arguments(arch, data="data/Places205").crops == "alexnet"
    given = la_arguments("alexnet", "--epochs", "3", "--lr-steps", "1", "--crops", "centre")
    assert (given.epochs, given.lr_steps, given.crops, given.ten_crops) == (3, [1], "centre", False)
    assert [eval_linear.learning_rate(1.0, e, [11, 41]) for e in (0, 10, 11, 40, 41, 50)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )


@pytest.mark.parametrize(
    ("crops", "area"), [("alexnet", None), ("resnet", 0.2), ("imagenet", 0.08), ("cifar", 0.3)]
)
def test_crops_of_the_whole_image(crops, area):
    """A column ramp tells where a crop lies and how wide it is: 24 of 32 pixels, or an area of some share to 1."""
    ramp = torch.arange(64).view(1, 1, 1, 64).expand(400, 1, 32, 64) * 4
    data = Images(
        "ramp", ramp.to(torch.uint8).contiguous(), None, torch.zeros(400).long(), ["a"], (0.0,), (1.0,)
    )
    args = arguments(batch_size=100, crops=crops, image_size=24, resize=32)
    loader = Loader(data, 100, 24, 32, CPU)
    found = list(eval_linear.batches(loader, torch.arange(400), 0, args))
    assert torch.equal(torch.cat([i for i, _ in found]), torch.arange(400))
    images = torch.cat([x for _, x in found])[:, 0, 0] * 255 / 4  # (400, 24): the column in every pixel
    width = (images[:, -1] - images[:, 0]) * 24 / 23
    if crops == "alexnet":
        assert (width - 24).abs().max() < 0.01
        left = images[:, 0].round()
        assert left.min() == 0 and left.max() == 40, "not the central square alone"
    else:
        least = math.sqrt(area * 32 * 64 * 3 / 4)  # of 400 draws one is near
        assert least - 1 < width.min() < least + 3 and 32 < width.max() < 44  # ratio 4/3 of 32 rows: 43


def test_la_chooses_nothing_and_a_choice_needs_held_out_images(tmp_path, capsys):
    flags = ["--random", "lenet5", "--protocol", "la", "--epochs", 2, "--no-knn", "--out", tmp_path]
    assert run_main(*flags) == 0
    result = json.loads((tmp_path / "eval_linear-digits-la.json").read_text())
    assert result["images"] == {"train": 1437, "held_out": 0, "test": 360}
    stage = result["stages"]["conv1"]
    assert stage["wd"] == 1e-4 and stage["test_last"] > 0.6
    assert not {"best_epoch", "test_best", "held_out_last"} & set(stage)
    capsys.readouterr()
    assert run_main(*flags, "--wd", "0", "1e-4") == 2
    assert "--held-out 0" in capsys.readouterr().err


# --------------------------------------------------------------------------- CoKe's protocol


def test_coke_has_one_schedule_and_the_rate_of_its_views():
    def resolved(method, *argv, data="digits"):
        meta = {"arch": "resnet50", "image_size": 224, "resize": 256, "sobel": False, "method": method}
        return eval_linear.resolve(eval_linear.options(["run", *argv]), meta, data, CPU)

    for data in ("digits", "data/imagenet"):
        args = resolved("coke-2", "--protocol", "coke", data=data)
        assert (args.epochs, args.batch_size, args.wd, args.held_out) == (90, 1024, [1e-6], 0)
        assert (args.lr_steps, args.crops, args.ten_crops) == (None, "imagenet", True)
        assert args.flip == (data != "digits")
    methods = ("coke-1", "coke-2", "coke-multi", "deepcluster", "random")
    rates = [resolved(method, "--protocol", "coke").lr for method in methods]
    assert rates == [0.2, 0.4, 0.4, 0.4, 0.4]
    assert resolved("coke-1", "--protocol", "coke", "--lr", "0.3").lr == 0.3
    assert [resolved("coke-1", *p).lr for p in ((), ("--protocol", "la"))] == [0.01, 0.01]


def test_coke_probes_what_the_network_gives_by_a_plain_loop():
    """Softmax regression on net(images), the learning rate 0.4 (1 + cos(pi e / 4)) / 2 in epoch e."""
    data, args, net = small_images(48, 32), arguments(lr=0.4, wd=[1e-2], epochs=4), lenet()
    for layer in (layer for layer in net.modules() if isinstance(layer, nn.Linear)):
        layer.weight.data *= 10  # features of a size that can be learnt from
    probes = eval_linear.Probes({"last feature": 84}, args.wd, 4)
    optimizer = torch.optim.SGD(probes.groups(args.wd), args.lr, momentum=0.9)
    rates, step = [], optimizer.step
    optimizer.step = lambda: rates.append(optimizer.param_groups[0]["lr"]) or step()
    order = torch.randperm(48, generator=torch.Generator().manual_seed(5))
    for epoch in range(3):
        eval_linear.train(net, None, probes, optimizer, Loader(data, 16, 32, 32, CPU), order, epoch, args)

    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (data.mean, data.std))
    x = net((data.pixels.float() / 255 - mean) / std)  # (48, 84)
    weight, bias, speed_w, speed_b, want = torch.zeros(4, 84), torch.zeros(4), 0.0, 0.0, []
    for t in range(9):
        ids = order[16 * (t % 3) : 16 * (t % 3) + 16]
        error = (x[ids] @ weight.T + bias).softmax(1) - nn.functional.one_hot(data.labels[ids], 4)
        lr = 0.4 * (1 + math.cos(math.pi * (t // 3) / 4)) / 2
        speed_w = 0.9 * speed_w + error.T @ x[ids] / 16 + 1e-2 * weight
        speed_b = 0.9 * speed_b + error.mean(0) + 1e-2 * bias
        weight, bias = weight - lr * speed_w, bias - lr * speed_b
        want.append(lr)
    assert rates == pytest.approx(want) and want[3] == pytest.approx(0.4 * 0.8535533906)
    torch.testing.assert_close(probes.linear["last feature"][0].weight.data, weight, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(probes.linear["last feature"][0].bias.data, bias, atol=1e-6, rtol=1e-4)
    assert weight.abs().max() > 1e-3


def test_coke_probes_a_resnets_average(tmp_path):
    folder = folder_of(tmp_path / "photos", 2, 10)
    flags = ["--random", "resnet18", "--data", folder, "--image-size", 16, "--epochs", 1, "--workers", 0]
    assert run_main(*flags, "--protocol", "coke", "--batch-size", 8, "--out", tmp_path) == 0
    result = json.loads((tmp_path / "eval_linear-photos-coke.json").read_text())
    assert list(result["stages"]) == ["last feature"] and result["stages"]["last feature"]["features"] == 512


def test_coke_on_the_digits(tmp_path):
    flags = ["--random", "lenet5", "--protocol", "coke", "--batch-size", 64, "--epochs", 6]
    flags += ["--lr", 10, "--crops", "centre"]  # an untrained LeNet's last feature is about 0.01
    assert run_main(*flags, "--ten-crops", "--out", tmp_path) == 0
    result = json.loads((tmp_path / "eval_linear-digits-coke.json").read_text())
    stage = result["stages"]["last feature"]
    assert (stage["features"], stage["wd"], result["args"]["lr"]) == (84, 1e-6, 10)
    assert result["images"]["train"] == 1437 and len(result["loss"]) == 6
    assert stage["test_last"] > 0.6 and stage["ten_crops_last"] is not None
    assert result["knn"]["last feature"]["1"] > 0.8


# --------------------------------------------------------------------------- nearest neighbours


def test_neighbours_in_the_embedding_by_a_plain_loop():
    """ReLU, linear layer, unit length; a bank made anew from the training images' centre crops."""
    train, test = (small_images(n, 2, 1, 3, seed, block=1) for n, seed in ((30, 7), (25, 8)))
    net = nn.Flatten()
    net.embedding = Embedding(4, 3)
    loaders = [Loader(d, 8, 2, 2, CPU) for d in (train, test)]
    got = eval_linear.nearest_neighbours(net, *loaders, arguments())
    weight, bias = (x.tolist() for x in net.embedding.linear.parameters())

    def rows(d):
        found = []
        for image in d.pixels.flatten(1).tolist():
            x = [max(0.0, (p / 255 - 0.4) / 0.2) for p in image]
            z = [sum(a * b for a, b in zip(w, x, strict=True)) + c for w, c in zip(weight, bias, strict=True)]
            found.append([v / math.sqrt(sum(u * u for u in z)) for v in z])
        return found

    bank, right = rows(train), 0
    for query, label in zip(rows(test), test.labels.tolist(), strict=True):
        cosine = [sum(a * b for a, b in zip(query, key, strict=True)) for key in bank]
        right += train.labels.tolist()[cosine.index(max(cosine))] == label
    assert got["embedding"]["1"] == pytest.approx(right / 25)
    assert set(got) == {"last feature", "embedding"}


# --------------------------------------------------------------------------- the command line


def test_errors_are_one_line_and_exit_code_2(tmp_path, capsys):
    grey = save_lenet(tmp_path / "grey.pt", 1)
    damaged = tmp_path / "damaged.pt"
    damaged.write_bytes(grey.read_bytes()[:5000])
    photos = folder_of(tmp_path / "photos", 2, 10)
    (tmp_path / "flat").mkdir()
    Image.new("RGB", (32, 32)).save(tmp_path / "flat" / "a.png")
    (tmp_path / "file").write_text("")
    random = ["--random", "lenet5"]
    for argv, words in [
        ([], "--random ARCH"),
        ([grey, *random], "--random ARCH"),
        (["--random", "lenet7"], "lenet7"),
        ([grey, "--image-size", 64], "--random"),
        ([tmp_path / "nowhere"], "no such file"),
        ([damaged], "damaged"),
        ([grey, "--data", photos], "1 channel"),
        ([*random, "--data", tmp_path / "flat"], "no labels"),
        ([*random, "--data", "imagnet"], "no such folder"),
        ([*random, "--batch-size", 1294], "1293"),
        ([*random, "--out", tmp_path / "file" / "below"], "cannot write"),
        ([*random, "--resize", 16], "smaller than"),
        ([*random, "--held-out", 1], "--held-out"),
        ([*random, "--epochs", 0], "--epochs"),
        ([*random, "--wd", -1], "--wd"),
        ([*random, "--lr", 0], "--lr"),
        ([*random, "--lr", 0.1, 0.01], "--finetune"),
        ([*random, "--protocol", "coke", "--wd", 0, 1], "--held-out 0"),
        ([*random, "--data", photos, "--protocol", "coke"], "1024 is more than the 16"),
    ]:
        assert run_main(*argv) == 2, argv
        said = capsys.readouterr().err.strip().splitlines()
        assert words in said[-1] and "error:" in said[-1], (argv, said)
        assert "Traceback" not in "".join(said)


def launch(*argv, processes=1):
    with socket.socket() as s:
        s.bind(("localhost", 0))
        port = s.getsockname()[1]
    torchrun = ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", f"--master_port={port}"]
    command = [sys.executable, *(torchrun if processes > 1 else []), str(ROOT / "eval_linear.py"), *argv]
    done = subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_two_processes_equal_one_and_beat_chance(tmp_path):
    flags = ["--random", "lenet5", "--epochs", "2", "--batch-size", "64", "--wd", "1e-3", "1e-5", "--flip"]
    text = launch(*flags, "--out", str(tmp_path / "one"))
    launch(*flags, "--out", str(tmp_path / "two"), processes=2)
    one, two = read(tmp_path / "one"), read(tmp_path / "two")
    assert (one["processes"], two["processes"]) == (1, 2)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert two["knn"]["last feature"] == pytest.approx(one["knn"]["last feature"])
    assert two["stages"] == one["stages"]
    assert one["stages"]["conv1"]["test_last"] > 0.6, "chance is 0.1"
    assert one["knn"]["last feature"]["1"] > 0.8
    assert set(one["stages"]["conv2"]["by_wd"]) == {"0.001", "1e-05"}
    assert len(one["stages"]["conv2"]["by_wd"]["0.001"]["test"]) == 2
    row = next(line for line in text.splitlines() if line.startswith("conv1")).split()
    assert float(row[4]) == pytest.approx(100 * one["stages"]["conv1"]["test_last"], abs=0.005)
