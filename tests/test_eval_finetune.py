"""eval_linear.py --finetune against plain loops, and its runs on the digits."""

import json
import math
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import eval_linear
from legacy import Images, Loader, backbone, load_backbone, load_data, seed_all

import pytest
import torch
from jobs import trap
from torch import nn

SCRIPT = Path(__file__).resolve().parent.parent / "eval_linear.py"
CPU = torch.device("cpu")
SHORT = ["--random", "lenet5", "--finetune", "--batch-size", "64", "--epochs", "2"]


@pytest.fixture(autouse=True)
def guest(monkeypatch):
    """main() runs in this process here: it leaves Ctrl-C alone and takes one core."""
    monkeypatch.setattr("signal.signal", lambda *_: None)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def few(monkeypatch):
    """The digits, but 400 of them to train on."""
    train, test = load_data("digits")
    train = replace(train, pixels=train.pixels[:400], labels=train.labels[:400])
    monkeypatch.setattr(eval_linear, "load_data", lambda *_: (train, test))
    return train, test


def run_main(*argv):
    with pytest.raises(SystemExit) as end:
        eval_linear.main([str(a) for a in argv])
    return end.value.code


def read(folder):
    return json.loads((folder / "eval_linear-digits-finetune.json").read_text())


def save_lenet(path, embedding=False):
    seed_all("test")
    meta = {"arch": "lenet5", "image_size": 32, "resize": 32, "sobel": False, "method": "test", "channels": 1}
    meta |= {"data": "digits", "mean": [0.3], "std": [0.35]}
    net = backbone("lenet5", 1, 32)
    for layer in (net.classifier[0], net.classifier[2]):
        layer.weight.data *= 5  # else the untrained features are too small to learn from in a few steps
    saved = {"state_dict": net.state_dict(), "meta": meta}
    if embedding:
        saved["embedding"] = {"weight": torch.randn(3, 84), "bias": torch.zeros(3)}
    torch.save(saved, path)
    return path


# --------------------------------------------------------------------------- the algorithm


def test_cosine_by_hand():
    values = [1, (2 + math.sqrt(2)) / 4, 0.5, (2 - math.sqrt(2)) / 4]
    assert [eval_linear.cosine(t, 4) for t in range(4)] == pytest.approx(values)


def test_the_best_point_is_the_first_of_the_highest():
    assert eval_linear.best_point([0.3, None, 0.9, 0.9]) == 2
    assert eval_linear.best_point([None, 0.0]) == 1, "an accuracy of 0 is no divergence"
    assert eval_linear.best_point([None, None]) is None


def test_the_output_layer_is_small_and_the_same_for_every_point():
    net = nn.Flatten()
    model = eval_linear.with_output_layer(net, 400, 100, seed=3)
    assert model[0] is net and model[2].weight.shape == (100, 400)
    assert model[2].weight.std().item() == pytest.approx(0.01, rel=0.02)
    assert abs(model[2].weight.mean().item()) < 2e-4 and not model[2].bias.any()
    weights = [eval_linear.with_output_layer(net, 400, 100, seed)[2].weight for seed in (3, 4)]
    assert torch.equal(weights[0], model[2].weight) and not torch.equal(weights[1], model[2].weight)


def test_the_last_layer_learns_ten_times_as_fast():
    model = eval_linear.with_output_layer(backbone("lenet5", 1, 32), 84, 10, seed=0)
    groups = eval_linear.layer_rates(model, 0.03)
    assert [group["peak"] for group in groups] == [0.03, pytest.approx(0.3)]
    assert {id(p) for p in groups[1]["params"]} == {id(model[2].weight), id(model[2].bias)}
    assert [id(p) for g in groups for p in g["params"]] == [id(p) for p in model.parameters()]


def test_fine_tuning_by_a_plain_loop():
    """Two linear layers with a ReLU between: momentum 0.9, weight decay, cosine by the step, 10 times."""
    gen = torch.Generator().manual_seed(7)
    pixels = torch.randint(0, 256, (24, 3, 2, 2), generator=gen).to(torch.uint8)
    labels = torch.randint(0, 4, (24,), generator=gen)
    data = Images("small", pixels, None, labels, list("abcd"), (0.5,) * 3, (0.25,) * 3)
    seed_all("fine-tuning")
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 6))
    model = eval_linear.with_output_layer(net, 6, 4, seed=1)
    parts = [p.detach().clone() for p in model.parameters()]  # w1, b1, w2, b2
    first, speed = [p.clone() for p in parts], [torch.zeros_like(p) for p in parts]
    args = Namespace(batch_size=8, image_size=2, seed=0, flip=False, amp=False, crops="centre", epochs=3)
    optimizer = torch.optim.SGD(eval_linear.layer_rates(model, 0.05), 1, momentum=0.9, weight_decay=0.02)
    loader, order = Loader(data, 8, 2, 2, CPU), torch.randperm(24, generator=gen)
    losses = [eval_linear.tune(model, optimizer, loader, order, epoch, args) for epoch in range(3)]

    x, want = (pixels.flatten(1).float() / 255 - 0.5) / 0.25, []
    for t in range(9):
        ids = order[8 * (t % 3) : 8 * (t % 3) + 8]
        w1, b1, w2, b2 = (p.requires_grad_() for p in parts)
        logits = (x[ids] @ w1.T + b1).clamp(min=0) @ w2.T + b2
        loss = -logits.log_softmax(1)[range(8), labels[ids]].mean()
        gradients = torch.autograd.grad(loss, parts)
        lr = 0.05 * (1 + math.cos(math.pi * t / 9)) / 2
        speed = [0.9 * s + g + 0.02 * p.detach() for s, g, p in zip(speed, gradients, parts, strict=True)]
        rates = (lr, lr, 10 * lr, 10 * lr)
        parts = [p.detach() - r * s for p, r, s in zip(parts, rates, speed, strict=True)]
        want.append(loss.item())
    assert losses == pytest.approx([sum(want[i : i + 3]) / 3 for i in (0, 3, 6)], rel=1e-5)
    for got, weight, start in zip(model.parameters(), parts, first, strict=True):
        torch.testing.assert_close(got.data, weight, atol=1e-6, rtol=1e-4)
        assert (weight - start).abs().max() > 1e-3


def test_the_grid_and_what_is_ours_by_default():
    def resolved(*argv, size=32, data="cifar10"):
        meta = {"arch": "resnet18", "image_size": size, "sobel": False, "method": "coke-2"}
        return eval_linear.resolve(eval_linear.options(["run", "--finetune", *argv]), meta, data, CPU)

    for size, data, crops, flip in [(32, "cifar10", "cifar", True), (64, "svhn", "cifar", False)] + [
        (224, "data/imagenet", "imagenet", True),
        (65, "mnist", "imagenet", False),
    ]:
        args = resolved(size=size, data=data)
        assert (args.crops, args.flip, args.ten_crops) == (crops, flip, False)
        assert args.lr == [1, 0.1, 0.01, 0.001] and args.wd == [1e-5, 1e-6, 0]
        assert (args.batch_size, args.epochs, args.held_out) == (256, 20, 0.1)
    given = resolved("--lr", "0.1", "0.2", "0.1", "--crops", "centre", "--ten-crops")
    assert (given.lr, given.crops, given.ten_crops) == ([0.1, 0.2], "centre", True)


# --------------------------------------------------------------------------- runs


def test_all_layers_are_trained_and_the_saved_file_is_not(tmp_path, monkeypatch):
    path = save_lenet(tmp_path / "backbone.pt", embedding=True)
    before, seen, real = path.read_bytes(), [], eval_linear.answer

    def answer(model, *rest):
        seen.append((model, model.training, torch.is_grad_enabled()))
        return real(model, *rest)

    monkeypatch.setattr(eval_linear, "answer", answer)
    flags = ["--finetune", "--batch-size", 256, "--epochs", 1, "--wd", 0, "--lr"]
    assert run_main(path, *flags, 0.5) == 0
    assert path.read_bytes() == before
    steps = 1293 // 256
    assert {s[1:] for s in seen[:steps]} == {(True, True)}, "trained in training mode"
    assert {s[1:] for s in seen[steps:]} == {(False, False)}, "scored in evaluation mode"
    trained, (saved, _) = seen[-1][0][0], load_backbone(path)
    assert not hasattr(trained.embedding, "linear")
    for (name, old), new in zip(backbone_state(saved), trained.state_dict().values(), strict=True):
        assert not torch.equal(old, new), name


def backbone_state(net):
    return [(k, v) for k, v in net.state_dict().items() if "embedding" not in k]


def test_points_do_not_touch_one_another_and_one_is_tested(tmp_path, monkeypatch, few):
    train, test = few
    scored, real = [], eval_linear.accuracies
    monkeypatch.setattr(eval_linear, "accuracies", lambda *a: scored.append((a[2].data, a[3])) or real(*a))
    assert run_main(*SHORT, "--lr", 0.3, 0.05, "--wd", 0, 0.5, "--out", tmp_path / "grid") == 0
    grid = read(tmp_path / "grid")
    assert [(p["lr"], p["wd"]) for p in grid["grid"]] == [(0.3, 0), (0.3, 0.5), (0.05, 0), (0.05, 0.5)]
    for data, ids in scored[:4]:
        assert len(data) == len(train) and len(ids) == 40, "held-out training images judge each point"
    assert len(scored) == 5 and len(scored[4][0]) == len(scored[4][1]) == len(test) == 360
    assert run_main(*SHORT, "--lr", 0.05, "--wd", 0, "--ten-crops", "--out", tmp_path / "one") == 0
    one = read(tmp_path / "one")
    assert one["grid"][0] == grid["grid"][2], "equal in every bit"
    assert one["ten_crops"] is not None and grid["ten_crops"] is None
    assert len({p["loss"][1] for p in grid["grid"]}) == 4, "the points differ"


def test_test_labels_choose_nothing(tmp_path, monkeypatch, few):
    train, test = few
    shuffled = replace(test, labels=test.labels[torch.randperm(360, generator=torch.Generator())])
    found = []
    for name, data in (("right", test), ("shuffled", shuffled)):
        monkeypatch.setattr(eval_linear, "load_data", lambda *_, data=data: (train, data))
        flags = ["--random", "lenet5", "--finetune", "--batch-size", 32, "--epochs", 8, "--wd", 0]
        assert run_main(*flags, "--lr", 0.001, 0.1, 0.01, "--out", tmp_path / name) == 0
        found.append(read(tmp_path / name))
    right, wrong = found
    assert right["grid"] == wrong["grid"] and (right["lr"], right["wd"]) == (wrong["lr"], wrong["wd"])
    held_out = [p["held_out"] for p in right["grid"]]
    assert (
        right["held_out"] == max(held_out)
        and right["lr"] == [0.001, 0.1, 0.01][held_out.index(max(held_out))]
    )
    assert right["loss"] == right["grid"][1]["loss"] and len(right["loss"]) == 8
    assert right["test"] > 0.5 > 0.25 > wrong["test"]


def test_nothing_held_out_leaves_one_point_and_all_images(tmp_path, capsys):
    flags = [*SHORT, "--epochs", 1, "--held-out", 0, "--out", tmp_path]
    assert run_main(*flags, "--lr", 0.1, "--wd", 0) == 0
    result = read(tmp_path)
    assert result["images"] == {"train": 1437, "held_out": 0, "test": 360}
    assert result["held_out"] is None and result["grid"][0]["held_out"] is None
    assert 0 < result["test"] <= 1 and len(result["loss"]) == 1
    capsys.readouterr()
    for grid, word in (
        (["--lr", 0.1, "--wd", 0, 1], "weight decay"),
        (["--lr", 0.1, 1, "--wd", 0], "learning rate"),
    ):
        assert run_main(*flags, *grid) == 2
        assert word in capsys.readouterr().err


def test_what_does_not_go_with_fine_tuning_is_one_line_and_exit_code_2(capsys):
    for argv in (["--protocol", "la"], ["--protocol", "coke"], ["--lr-steps", 1], ["--lr-steps"]):
        assert run_main(*SHORT, *argv) == 2, argv
        assert "--finetune has a schedule" in capsys.readouterr().err.splitlines()[-1]
    assert run_main(*SHORT, "--lr", 0.1, 0) == 2
    assert "--lr must be above 0" in capsys.readouterr().err.splitlines()[-1]


def test_two_processes_equal_one_and_give_up_a_point_together(start, tmp_path):
    path = save_lenet(tmp_path / "backbone.pt", embedding=True)
    flags = [
        path,
        "--finetune",
        "--batch-size",
        "128",
        "--epochs",
        "2",
        "--wd",
        "1e-5",
        "--lr",
        "1e30",
        "0.02",
    ]
    results = []
    for world in (1, 2):
        job = start([*flags, "--out", "out"], world=world).ok()
        assert "lr 1e+30  wd 1e-05  the loss became NaN or infinite in epoch 1: given up" in job.out
        results.append(read(job.folder / "out"))
    one, two = results
    assert (one["processes"], two["processes"]) == (1, 2)
    for result in results:
        assert result["grid"][0] == {"lr": 1e30, "wd": 1e-5, "held_out": None, "loss": [None]}
        assert result["lr"] == 0.02 and len(result["grid"]) == 2
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5) and one["loss"][1] < one["loss"][0]
    assert (two["held_out"], two["test"]) == pytest.approx((one["held_out"], one["test"]), abs=0.011)


def test_all_points_diverged_is_exit_code_1_and_nothing_written(start):
    job = start([*SHORT, "--lr", "1e30", "1e25", "--wd", "0", "--out", "out"], world=2).wait()
    assert job.codes == [1, 1]
    assert job.err.count("error:") == 1 and "lower --lr" in job.err and "Traceback" not in job.err
    assert not list((job.folder / "out").iterdir())


def test_a_signal_ends_it_with_nothing_written(start):
    code = trap("eval_linear", "eval_linear", "cosine", 30, "SIGTERM")
    job = start([*SHORT, "--lr", "0.1", "--wd", "0", "--out", "out"], code).wait()
    assert job.code == 128 + 15 and "nothing was written" in job.out
    assert not list((job.folder / "out").iterdir())
