"""No step waits for the device: on torch's meta device nothing has a value, so whoever asks for one fails.

meta      shapes only: .item(), .tolist(), .cpu(), if tensor:, nonzero, x[mask] raise
copies    those to the device are recorded; one without non_blocking waits for all that came before it
late      heartbeat on a GPU returns each step's numbers a step later; played here on the CPU
"""

import argparse
import contextlib

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import coke
import common
import deepcluster
import eval_linear
import local_aggregation
import lsdc

META = torch.device("meta")
N, B = 128, 32


INDEXING = [torch.ops.aten.index, torch.ops.aten.index_put, torch.ops.aten.index_put_]


class Copies(TorchDispatchMode):
    """Remembers copies from the CPU to another device, and which of them the CPU waits for."""

    def __init__(self):
        super().__init__()
        self.all, self.waiting = 0, []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        source = target = None
        if function is torch.ops.aten.lift_fresh.default and args[0].device.type != "cpu":
            self.waiting.append("a tensor made of a list, on the device")
        if function is torch.ops.aten._to_copy.default and kwargs.get("device") is not None:
            source, target, waits = args[0], kwargs["device"].type, not kwargs.get("non_blocking")
        elif function is torch.ops.aten.copy_.default:
            source, target, waits = args[1], args[0].device.type, not (len(args) > 2 and args[2])
        if function.overloadpacket in INDEXING and args[0].device.type != "cpu":
            indices = [x for x in args[1] if x is not None]
            self.waiting += [f"{function} by a mask" for x in indices if x.dtype == torch.bool]
            given = [*indices, *args[2:3]]  # index_put's values, too
            self.waiting += [f"{function} with a tensor on the CPU" for x in given if x.device.type == "cpu"]
        if source is not None and source.device.type == "cpu" and target != "cpu":
            self.all += 1
            self.waiting += [f"{function} of {tuple(source.shape)} {source.dtype}"] * waits
        return function(*args, **kwargs)


@pytest.fixture
def on_meta(monkeypatch):
    """torch.autocast and fused optimisers do not know the meta device; heartbeat's numbers arrive as zeros."""
    real = torch.optim.SGD
    monkeypatch.setattr(torch.optim, "SGD", lambda *a, fused=None, **k: real(*a, **k))
    monkeypatch.setattr(torch, "autocast", lambda *a, **k: contextlib.nullcontext())
    monkeypatch.setattr(common, "LATE", {"meta"})
    monkeypatch.setattr(common, "_read_later", lambda values: lambda: [0.0] * len(values))


def noise(size=32):
    """Images on the meta device with a Loader, labels and order on the CPU, as in a run."""
    pixels = torch.zeros(N, 3, size, size, dtype=torch.uint8, device=META)
    data = common.Images(
        "noise", pixels, None, torch.arange(N) % 10, list("0123456789"), (0.5,) * 3, (0.5,) * 3
    )
    loader = common.Loader(data, B, 32, 32, torch.device("cpu"))
    loader.device = META
    loader.mean, loader.std = loader.mean.to(META), loader.std.to(META)
    return data, loader


def steps(work):
    """Run it, and return the Copies it made."""
    with Copies() as copies:
        work()
    return copies


def deepcluster_step():
    args = deepcluster.options(["--recipe", "cifar10", "--data", "noise", "--batch-size", str(B)])
    args.amp, (_, loader) = False, noise()
    body = deepcluster.make_body(args, 3)[1].to(META)
    head = deepcluster.make_head(body.dim, 10, 0).to(META)
    optimizers = [torch.optim.SGD(net.parameters(), 0.1, 0.9) for net in (body, head)]
    assign, weights = torch.arange(N) % 10, torch.ones(N)
    return lambda: deepcluster.train(body, head, optimizers, loader, None, assign, weights, 0, 0, 0.0, args)


def aggregation_step(phase):
    args = local_aggregation.options(
        [
            "--recipe",
            "cifar10",
            "--data",
            "noise",
            "--batch-size",
            str(B),
            "--arch",
            "lenet5",
            "--background",
            "20",
        ]
        + (["--ir-loss", "nce", "--noise", "16"] if phase == "nce" else ["--ir-loss", "softmax"])
    )
    args.amp, args.colour, (_, loader) = False, True, noise()
    net = local_aggregation.make_net(args, 3)[1].to(META)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    bank = torch.zeros(N, args.dim, device=META)
    clusterings = torch.zeros(3, N, dtype=torch.int32, device=META) if phase == "la" else None
    return lambda: local_aggregation.train(
        net, optimizer, loader, bank, clusterings, 0, 0, 2, [0.0] * 4, args
    )


def coke_step(views, optimizer="sgd"):
    args = coke.options(
        [
            "--recipe",
            "cifar10",
            "--data",
            "noise",
            "--views",
            views,
            "--batch-size",
            str(B),
            "--arch",
            "lenet5",
        ]
        + ["--optimizer", optimizer]
    )
    args.amp, args.colour, args.blur, (data, loader) = False, True, True, noise()
    net = coke.make_net(args, 3)[1].to(META)
    weights = torch.optim.SGD(net.parameters(), 0.1)
    memory = coke.new_memory(args.k, args.dim, len(data), 2, META, "test")
    late = coke.Phase(learn=True, averaging=True, weight=0.5, done=0)
    return lambda: coke.train(net, weights, loader, memory, 0, 0, 2, [0.0] * 4, late, args)


def lsdc_step(labeling, mix, pretrain=0):
    words = (
        f"--recipe cifar10 --data noise --batch-size {B} --labeling {labeling} --mix {mix} --freeze-stages 1"
    )
    args = lsdc.options(words.split() + ["--pretrain", "rotnet" if pretrain else "none"])
    args.amp, args.arch, (data, loader) = False, "lenet5", noise()
    trunk, net = (x.to(META) for x in lsdc.make_net(args, lsdc.describe(args, data)[0]))
    stage = lsdc.begin(0, lsdc.RotNet(trunk).to(META), net, [loader, loader], args)
    assert stage.name == ("rotnet" if pretrain else "clustering")
    views = [common.View(pad=2)] * (1 if pretrain else 3)
    losses = lsdc.losses_of(stage, data.labels.to(META), 0, args)
    batches = loader.epoch(0, views, torch.arange(N))
    return lambda: lsdc.train(stage.trained, stage.optimizer, losses, batches, 0, N // B, [], "test")


def probes_step():
    data, loader = noise()
    options = {"batch_size": B, "seed": 0, "image_size": 32, "flip": True, "amp": False, "lr": 0.01}
    options |= {"crops": "centre", "lr_steps": None}
    args = argparse.Namespace(**options)
    net = common.backbone("alexnet-small", 3, 32, sobel=True).to(META).eval().requires_grad_(False)
    maps = eval_linear.stage_maps(net, torch.zeros(1, 3, 32, 32, device=META))
    pools = {s: eval_linear.pool_for("alexnet-small", 32, s, *x.shape[1:3]) for s, x in maps.items()}
    features = {s: pools[s](x).numel() for s, x in maps.items()}
    probes = eval_linear.Probes(features, [1e-4, 1e-5], 10).to(META)
    optimizer = torch.optim.SGD(probes.groups([1e-4, 1e-5]), 0.1)
    return lambda: eval_linear.train(net, pools, probes, optimizer, loader, torch.arange(N), 0, args)


def extraction():
    _, loader = noise()
    net = common.backbone("lenet5", 3, 32).to(META)
    return lambda: common.extract(net, loader, torch.arange(N), then=common.unit)


CASES = {
    "deepcluster": deepcluster_step,
    "local aggregation": lambda: aggregation_step("la"),
    "instance recognition": lambda: aggregation_step("softmax"),
    "instance recognition, nce": lambda: aggregation_step("nce"),
    "coke, one view": lambda: coke_step("1"),
    "coke, two views": lambda: coke_step("2"),
    "coke, many views, lars": lambda: coke_step("multi", "lars"),
    "lsdc, knn, ricap": lambda: lsdc_step("knn", "ricap"),
    "lsdc, cosine, mixup": lambda: lsdc_step("cosine", "mixup"),
    "lsdc, sne, no mixture": lambda: lsdc_step("sne", "none"),
    "rotnet": lambda: lsdc_step("knn", "none", pretrain=1),
    "probes": probes_step,
    "extraction": extraction,
}


@pytest.mark.parametrize("case", CASES)
def test_no_step_waits_for_the_device(case, on_meta):
    copies = steps(CASES[case]())
    assert copies.all >= 2  # indices and random numbers went there
    assert copies.waiting == []


def asks_for_a_value(x):
    return float(x.sum())


def picks_by_mask(x):
    return x[x > 0]


def copies_and_waits(x):
    return x + torch.ones(len(x)).to(META)


def makes_of_a_list(x):
    return x.new_tensor([1.0, 2.0, 3.0])


def picks_by_an_index_on_the_cpu(x):
    return x[torch.tensor([1, 0])]


def puts_by_an_index_on_the_cpu(x):
    x.detach()[torch.tensor([1, 0])] = 1.0


def puts_by_mask(x):
    x.detach()[x.detach() > 0] = x.new_zeros(())


SLIPS = [asks_for_a_value, picks_by_mask, copies_and_waits, makes_of_a_list]
SLIPS += [picks_by_an_index_on_the_cpu, puts_by_an_index_on_the_cpu, puts_by_mask]


@pytest.mark.parametrize("slip", SLIPS)
def test_a_slip_is_noticed(slip, monkeypatch, on_meta):
    """What the test above relies on: each way to wait either raises or is recorded."""
    real = deepcluster.F.cross_entropy
    monkeypatch.setattr(
        deepcluster.F, "cross_entropy", lambda x, *a, **k: (slip(x[:, 0]), real(x, *a, **k))[1]
    )
    work = deepcluster_step()
    try:
        copies = steps(work)
    except (RuntimeError, NotImplementedError):
        return
    assert copies.waiting


# --------------------------------------------------------------------------- numbers that come a step later


@pytest.fixture
def late(monkeypatch):
    """heartbeat as on a GPU, its copies counted: how many were started before the last one was read."""
    seen = []

    def read_later(values):
        seen.append("started")
        return lambda: seen.append("read") or values.tolist()

    monkeypatch.setattr(common, "LATE", {"cpu"})
    monkeypatch.setattr(common, "_read_later", read_later)
    yield seen
    assert common._underway is None  # nothing is left for another epoch


def test_late_numbers_are_those_of_the_call_before(late):
    one, two, three = (torch.tensor([x, 10 * x]) for x in (1.0, 2.0, 3.0))
    assert common.heartbeat(*one) == (0, 0, 0)
    assert common.heartbeat(*two) == (1, 10, 0)
    assert common.heartbeat(*three) == (2, 20, 0)
    assert late == ["started", "started", "read", "started", "read"]
    assert common.overdue([3.0, 30.0]) == [6, 60]
    assert common.overdue([6.0, 60.0]) == [6, 60]  # once only


def test_on_the_cpu_nothing_is_overdue():
    assert common.heartbeat(torch.tensor(2.5)) == (2.5, 0)
    assert common.overdue([2.5]) == [2.5]


def test_late_signal_is_not_late(late, monkeypatch):
    monkeypatch.setattr(common, "_signal", 15)
    assert common.heartbeat(torch.tensor(1.0)) == (0, 15)
    assert common.overdue([0.0]) == [1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_late_nan_ends_the_run_one_step_later_or_before_it_is_saved(bad, late, capsys):
    assert common.heartbeat(torch.tensor(bad)) == (0, 0)
    with pytest.raises(SystemExit) as end:
        common.heartbeat(torch.tensor(1.0))
    assert end.value.code == 1 and "what was saved is as it was" in capsys.readouterr().err
    with contextlib.suppress(SystemExit):
        common.overdue([0.0])
    assert common.heartbeat(torch.tensor(bad)) == (0, 0)
    with pytest.raises(SystemExit):
        common.overdue([0.0])


def labelled_noise(n=512):
    """Grey images with labels, in memory, and a Loader of batches of 64."""
    pixels = torch.randint(0, 256, (n, 1, 32, 32), dtype=torch.uint8, generator=common.generator("noise"))
    data = common.Images("noise", pixels, None, torch.arange(n) % 10, list("0123456789"), (0.5,), (0.5,))
    return data, common.Loader(data, 64, 32, 32, torch.device("cpu"))


def epoch_of(script, kind):
    """(function that trains for eight steps and returns (.., sums, ..), its network)."""
    data, loader = labelled_noise()
    order, words = torch.arange(512), ["--data", "digits", "--batch-size", "64"]
    common.seed_all(0)
    if script is eval_linear:
        options = {
            "batch_size": 64,
            "seed": 0,
            "image_size": 32,
            "resize": 32,
            "flip": True,
            "amp": False,
            "lr": 0.01,
        }
        args = argparse.Namespace(**options, crops="centre", lr_steps=None, epochs=1)
        net = common.backbone("lenet5", 1, 32)
        if kind == "tune":
            net = torch.nn.Sequential(net, torch.nn.Linear(net.dim, 10))
            optimizer = torch.optim.SGD([{"params": net.parameters(), "peak": 0.1}], 0.1)
            return lambda: eval_linear.tune(net, optimizer, loader, order, 0, args), net
        pools = dict.fromkeys(net.stages, torch.nn.Flatten())
        features = {
            stage: x.flatten(1).shape[1]
            for stage, x in eval_linear.stage_maps(net, torch.zeros(1, 1, 32, 32)).items()
        }
        probes = eval_linear.Probes(features, [1e-4], 10)
        optimizer = torch.optim.SGD(probes.groups([1e-4]), 0.1)
        return lambda: eval_linear.train(net, pools, probes, optimizer, loader, order, 0, args), probes
    args = script.options(words + {coke: ["--views", "2"], lsdc: ["--pretrain", "none"]}.get(script, []))
    args.amp = False
    if script is deepcluster:
        body = deepcluster.make_body(args, 1)[1]
        head = deepcluster.make_head(body.dim, 10, 0)
        optimizers = [torch.optim.SGD(net.parameters(), 0.05) for net in (body, head)]
        given = loader, order, torch.arange(512) % 10, torch.ones(512), 0, 0, 0.0, args
        return lambda: deepcluster.train(body, head, optimizers, *given), body
    if script is lsdc:
        trunk, net = lsdc.make_net(args, lsdc.describe(args, data)[0])
        stage = lsdc.begin(0, lsdc.RotNet(trunk), net, [loader, loader], args)
        losses, views = lsdc.losses_of(stage, data.labels, 0, args), [common.View(pad=2)] * 3
        given = stage.trained, stage.optimizer, losses
        return lambda: lsdc.train(*given, loader.epoch(0, views, order), 0, 8, [], "test"), net
    net = script.make_net(args, 1)[1]
    optimizer = torch.optim.SGD(net.parameters(), 0.05)
    if script is coke:
        memory = coke.new_memory(args.k, args.dim, 512, 1, torch.device("cpu"), "test")
        now = coke.Phase(learn=True, averaging=False, weight=1.0, done=0)
        return lambda: coke.train(net, optimizer, loader, memory, 0, 0, 8, [0.0] * 4, now, args), net
    bank = common.unit(torch.randn(512, args.dim, generator=common.generator("bank")))
    return lambda: local_aggregation.train(net, optimizer, loader, bank, None, 0, 0, 8, [0.0] * 4, args), net


SCRIPTS = [
    (deepcluster, ""),
    (local_aggregation, ""),
    (coke, ""),
    (lsdc, ""),
    (eval_linear, "probes"),
    (eval_linear, "tune"),
]


@pytest.mark.parametrize("script, kind", SCRIPTS)
@pytest.mark.parametrize("stopped", [False, True])
def test_late_numbers_change_nothing_else(script, kind, stopped, monkeypatch):
    """An epoch, or one that a signal ends in its fifth step, gives the same sums and weights to the bit."""
    found, real = [], common.heartbeat
    for devices in ({"cuda"}, {"cpu"}):
        monkeypatch.setattr(common, "LATE", devices)
        monkeypatch.setattr(common, "_read_later", lambda values: values.tolist)
        calls = []

        def heartbeat(*values, calls=calls):
            calls.append(1)
            monkeypatch.setattr(common, "_signal", 15 if stopped and len(calls) == 5 else None)
            return real(*values)

        monkeypatch.setattr(script, "heartbeat", heartbeat)
        work, net = epoch_of(script, kind)
        try:
            result = work()
        except SystemExit as end:  # eval_linear.py keeps nothing
            assert script is eval_linear and stopped and end.code == 143
            result = common.overdue([0.0])[1:]
        assert common._underway is None and len(calls) == (5 if stopped else 8)
        found.append((result, [w.clone() for w in net.parameters()]))
    (one, weights), (two, others) = found
    assert one == two
    assert all(torch.equal(a, b) for a, b in zip(weights, others, strict=True))


@pytest.mark.parametrize("step", [3, 8])
def test_late_nan_ends_a_point_of_the_grid(step, late, monkeypatch):
    """Fine-tuning gives a setting up whose loss is NaN in the third step of eight, or in the last; the next one starts clean."""
    real, calls = common.heartbeat, []

    def heartbeat(zero, loss):
        calls.append(1)
        return real(zero, loss * float("nan") if len(calls) == step else loss)

    monkeypatch.setattr(eval_linear, "heartbeat", heartbeat)
    assert epoch_of(eval_linear, "tune")[0]() is None
    assert len(calls) == min(step + 1, 8) and common._underway is None
    assert epoch_of(eval_linear, "tune")[0]() > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_heartbeat_does_not_make_a_gpu_wait():
    values = torch.arange(3.0, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert common.heartbeat(*values) == (0, 0, 0, 0)
        assert common.heartbeat(*values) == (0, 1, 2, 0)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert common.overdue([0.0, 1.0, 2.0]) == [0, 2, 4]
