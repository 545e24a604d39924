"""common.py, processes: the verbs mean the same on one, two and three processes."""

import copy
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

import common

SETUP = "import json, sys, torch, common\ncommon.setup('cpu')\nr = common.rank()\n"


def lines(text):
    return [line for line in text.splitlines() if line.strip()]


def test_gather_total_shard_from_main_on_three_processes(launch):
    """Unequal and empty shards are joined in rank order, dtypes kept; sums, shares and results agree."""
    run = launch(
        SETUP
        + """
dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
own = torch.arange(3 * r, dtype=torch.float32).view(-1, 3) + 10 * r  # 0, 1 and 2 rows
x = torch.ones(2, requires_grad=True) * (r + 1)
made = []
got = {
    "rows": [common.gather(own.to(d)) for d in dtypes],
    "none": common.gather(torch.zeros(0, 4, dtype=torch.int64)),
    "total": common.total(x), "kept": x.detach(),
    "shards": [common.shard(n) for n in (0, 1, 2, 3, 10, 11)],
    "main": common.from_main(lambda: made.append(r) or {"from": r}), "made": made,
    "who": (r, common.processes(), common.main_process()),
}
torch.save(got, f"got.{r}")
common.leave()
""",
        world=3,
    )
    assert run.codes == [0, 0, 0], run.err
    got = [torch.load(run.path / f"got.{r}") for r in range(3)]
    rows = torch.tensor([[10.0, 11, 12], [20, 21, 22], [23, 24, 25]])
    dtypes = [torch.float32, torch.float64, torch.float16, torch.int64, torch.uint8, torch.bool]
    for r in range(3):
        for dtype, joined in zip(dtypes, got[r]["rows"], strict=True):
            assert joined.dtype == dtype and torch.equal(joined, rows.to(dtype))
        assert got[r]["none"].shape == (0, 4) and got[r]["none"].dtype == torch.int64
        assert got[r]["total"].tolist() == [6, 6] and not got[r]["total"].requires_grad
        assert got[r]["kept"].tolist() == [r + 1, r + 1], "total must leave its input alone"
        assert got[r]["main"] == {"from": 0} and got[r]["made"] == ([0] if r == 0 else [])
        assert got[r]["who"] == (r, 3, r == 0)
    for j, n in enumerate((0, 1, 2, 3, 10, 11)):
        owned = [list(range(*got[r]["shards"][j])) for r in range(3)]
        assert sum(owned, []) == list(range(n))
        assert max(map(len, owned)) - min(map(len, owned)) <= 1


@pytest.mark.parametrize("world", [2, 3])
def test_gather_of_equal_parts_does_not_ask_for_sizes(world, launch):
    """equal=True: the same rows in rank order, dtypes kept, one row or none, without exchanging sizes."""
    run = launch(
        SETUP
        + """
parts = [
    torch.arange(8).view(4, 2) + 100 * r,
    torch.arange(6, dtype=torch.float32).view(2, 3).T / 7 + r,  # not contiguous
    torch.full((1, 5), r + 0.5, dtype=torch.float64).requires_grad_(),
    torch.tensor([r]),
    torch.zeros(0, 2, dtype=torch.int32),
]
plain = [common.gather(x) for x in parts]
common.dist.all_gather_object = None  # asking how many would fail from here on
torch.save([plain, [common.gather(x, equal=True) for x in parts]], f"got.{r}")
common.leave()
""",
        world=world,
    )
    assert run.codes == [0] * world, run.err
    ranks = range(world)
    want = [
        torch.cat([torch.arange(8).view(4, 2) + 100 * r for r in ranks]),
        torch.cat([torch.arange(6.0).view(2, 3).T / 7 + r for r in ranks]),
        torch.tensor([[r + 0.5] * 5 for r in ranks], dtype=torch.float64),
        torch.arange(world),
        torch.zeros(0, 2, dtype=torch.int32),
    ]
    for r in ranks:
        plain, equal = torch.load(run.path / f"got.{r}")
        for x, a, b in zip(want, plain, equal, strict=True):
            assert a.dtype == b.dtype == x.dtype and torch.equal(a, x) and torch.equal(b, x)
            assert not a.requires_grad and not b.requires_grad


def test_verbs_do_nothing_on_one_process():
    """Without torchrun: the same values, no gradient, this process owns everything."""
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    for verb in (common.gather, common.total, lambda y: common.gather(y, equal=True)):
        assert torch.equal(verb(x), x) and not verb(x).requires_grad
    assert common.total(x).data_ptr() != x.data_ptr()
    assert common.shard(7) == (0, 7) and common.main_process() and common.processes() == 1
    assert common.from_main(lambda: 5) == 5
    common.agree(None)
    net = torch.nn.Linear(2, 2)
    assert common.parallel(net) is net


def test_setup_refuses_an_unknown_device(launch):
    """--device nonsense: one line and exit code 2, on one process and on two."""
    for world in (1, 2):
        run = launch("import common\ncommon.setup('nonsense')", world)
        assert run.codes == [2] * world and len(lines(run.err[0])) == 1 and "nonsense" in run.err[0]
        assert run.err[1:] == [""] * (world - 1)


def test_processes_of_one_start_find_each_other_in_an_old_store():
    """Three starts in one store, where every one leaves what it wrote: a name of its own for each, the same for
    all its processes, whoever comes first."""
    second = timedelta(seconds=20)
    server = dist.TCPStore("127.0.0.1", 0, None, True, second, wait_for_workers=False)
    names = []
    for delays in ((0, 0, 0.2), (0.3, 0, 0), (0, 0.2, 0)):

        def meet(own, delays=delays):
            time.sleep(delays[own])
            store = dist.TCPStore("127.0.0.1", server.port, None, False, second, wait_for_workers=False)
            return common._meet(store, own, 3, limit=20)

        with ThreadPoolExecutor(3) as pool:
            found = list(pool.map(meet, range(3)))
        assert len(set(found)) == 1
        names += found[:1]
    assert len(set(names)) == 3


# Two processes that count ten times a second; MISHAP happens on one of them, the other waits for it.
WATCHED = """
import os, signal, sys, time, torch, common
common.TICK = 0.1
common.setup("cpu")
def stop():  # until somebody takes pity
    me = os.getpid()
    if os.fork() == 0:
        time.sleep(4)
        os.kill(me, signal.SIGKILL)
        os._exit(0)
    os.kill(me, signal.SIGSTOP)
if common.rank() == {who}:
    {mishap}
    common.total(torch.ones(1))
else:
    began = time.time()
    try:
        {waits}
    finally:
        print(time.time() - began, flush=True)
common.leave()
"""


@pytest.mark.parametrize("who", [0, 1])
def test_a_stopped_process_ends_the_other_with_a_line(who, launch):
    """In a second, at ten ticks of a tenth; process 0 keeps the store, so without it nobody is heard."""
    run = launch(WATCHED.format(who=who, mishap="stop()", waits="common.total(torch.ones(1))"))
    assert run.codes[who] == -9 and run.codes[1 - who] == 1, run.err
    said = ["all processes are silent for 1 s", "process 1 is silent for 1 s"][who]
    assert run.err[1 - who].startswith(said) and len(run.err[1 - who].splitlines()) == 1, run.err


def test_slow_work_is_not_silence(launch):
    """A process that computes or waits for three seconds, or has left, is not missed."""
    slow = "torch.stack([(torch.rand(400, 400) @ torch.rand(400, 400)).sum() for _ in range(500)]); time.sleep(3)"
    run = launch(WATCHED.format(who=1, mishap=slow, waits="common.total(torch.ones(1))"))
    assert run.codes == [0, 0] and float(run.out[0]) > 3, run.err
    run = launch(WATCHED.format(who=1, mishap="common.leave()", waits="time.sleep(3)"))
    assert run.codes == [0, 0] and float(run.out[0]) > 3, run.err


def test_a_process_that_fails_is_missed(launch):
    """An exception ends both, long before a collective would give up; its message is on screen."""
    run = launch(WATCHED.format(who=1, mishap="raise ValueError('made up')", waits="time.sleep(30)"))
    assert run.codes == [1, 70] and "made up" in run.err[1] and "process 1 is silent" in run.err[0]


def test_one_line_errors_of_the_command_line(capsys, monkeypatch):
    """No usage, exit code 2, on the first process alone; numbers are finite."""
    monkeypatch.setattr("sys.argv", ["x.py"])
    parser = common.Parser("what it is")
    parser.add_argument("--lr", type=common.number, default=0.5, help="a rate")
    assert parser.parse_args(["--lr", "1e-3"]).lr == 0.001 and "(default: 0.5)" in parser.format_help()
    parser.add_argument("run", nargs="?", default=".")
    for words, what in ((["--lr", "1", ""], "run is empty"), (["--out", ""], "--out is empty")):
        parser.add_argument("--out", default="runs") if words[0] == "--out" else None
        with pytest.raises(SystemExit):
            parser.parse_args(words)
        assert f"error: {what}" in capsys.readouterr().err
    for said, rank in ((1, None), (1, "0"), (0, "1")):
        monkeypatch.setenv("RANK", rank) if rank else monkeypatch.delenv("RANK", raising=False)
        for words in (
            ["--lr", "nan"],
            ["--lr", "-inf"],
            ["--lr", "x"],
            ["--lr"],
            ["--l\nr", "1"],
            ["x", "stray"],
        ):
            with pytest.raises(SystemExit) as end:
                parser.parse_args(words)
            err = capsys.readouterr().err
            assert end.value.code == 2 and len(err.splitlines()) == said, err
            assert not said or err.startswith("x.py: error: "), err


def test_generator_depends_on_its_key_alone():
    """The same key gives the same numbers in any order of calls; other keys give other numbers."""
    keys = [
        (0,),
        (1,),
        (0, 1),
        (0, "1"),
        (1, 0),
        (12, 3),
        (1, 23),
        (0, 1, "flip"),
        (0, 1, "order"),
        ("0, 1",),
    ]
    first = {k: torch.rand(8, generator=common.generator(*k)) for k in keys}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    again = {k: torch.rand(8, generator=common.generator(*k)) for k in reversed(keys)}
    assert torch.equal(torch.get_rng_state(), state), "the global generator was touched"
    assert all(torch.equal(first[k], again[k]) for k in keys)
    assert len({tuple(x.tolist()) for x in first.values()}) == len(keys)
    common.seed_all(3, "net")
    a = torch.rand(4)
    common.seed_all(4, "net")
    b = torch.rand(4)
    common.seed_all(3, "net")
    assert torch.equal(torch.rand(4), a) and not torch.equal(a, b)


def test_heartbeat_mean_and_signal(launch):
    """The mean loss on all; a signal on one process reaches all, with its own number."""
    run = launch(
        SETUP
        + """
import os, signal
first = common.heartbeat(torch.tensor(1.0 + 2 * r))
if r == 1:
    os.kill(os.getpid(), signal.SIGTERM)
second = common.heartbeat(torch.tensor(0.5))
json.dump([first, second], open(f"beat.{r}", "w"))
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    for r in range(2):
        text = (run.path / f"beat.{r}").read_text()
        assert text == "[[2.0, 0], [0.5, 15]]", text


def test_heartbeat_means_of_others(launch):
    """Loss first, then the mean of every other value in its place, the signal last; NaN there goes on."""
    run = launch(
        SETUP
        + """
import os, signal
one = torch.tensor(1.0 + 2 * r, requires_grad=True)
count, half = torch.tensor(3 * r), torch.tensor(r / 2, dtype=torch.bfloat16)
first = common.heartbeat(one, count, half, torch.tensor(-4.0, dtype=torch.float64))
if r == 0:
    os.kill(os.getpid(), signal.SIGINT)
odd = [torch.tensor(x if r == 1 else 5.0) for x in (float("nan"), 7.0, float("inf"))]
second = common.heartbeat(torch.tensor(0.5), *odd)
print(json.dumps([first, second]))
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    want = "[[2.0, 1.5, 0.25, -4.0, 0], [0.5, NaN, 6.0, Infinity, 2]]\n"
    assert run.out == [want, want]


def test_heartbeat_on_one_process():
    """The values themselves and no signal; one line and exit code 1 only if the loss is NaN."""
    assert common.heartbeat(torch.tensor(1.5)) == (1.5, 0)
    assert common.heartbeat(torch.tensor(1.5), torch.tensor(3), torch.tensor(-2.0)) == (1.5, 3, -2, 0)
    loss, nothing, signal = common.heartbeat(torch.tensor(1.5), torch.tensor(float("nan")))
    assert (loss, signal) == (1.5, 0) and nothing != nothing
    with pytest.raises(SystemExit) as end:
        common.heartbeat(torch.tensor(float("nan")), torch.tensor(1.0))
    assert end.value.code == 1


def test_stop_saves_and_leaves_together(launch):
    """All processes save, one tells where it stopped, exit code 128 + the signal."""
    run = launch(SETUP + "common.stop(15, lambda: print('saved', flush=True), 'step 7')\nprint('went on')")
    assert run.codes == [143, 143], run.err
    (saved, line), other = lines(run.out[0]), lines(run.out[1])
    assert saved == "saved" and "signal 15" in line and "step 7" in line and other == ["saved"]


def test_a_signal_ends_phases_without_news(launch):
    """leave_if_asked: nothing without a signal; after SIGTERM one line and exit code 128 + 15."""
    ask = "import os, signal\ncommon.leave_if_asked()\nos.kill(os.getpid(), signal.SIGTERM)\n"
    run = launch(
        SETUP + ask + "print('alive', flush=True)\ncommon.leave_if_asked()\nprint('went on')", world=1
    )
    assert run.codes == [143] and run.out[0].startswith("alive\n") and len(lines(run.out[0])) == 2, run.out
    assert "went on" not in run.out[0]


def test_nan_on_one_process_stops_all(launch):
    """NaN or infinity on one process: all leave with exit code 1, one line in all, nobody hangs."""
    for value, others in (("nan", ""), ("inf", ""), ("nan", ", torch.tensor(1.0), torch.tensor(2.0)")):
        loss = f"torch.tensor(float('{value}') if r == 1 else 1.0)"
        run = launch(SETUP + f"common.heartbeat({loss}{others})\nprint('went on')")
        assert run.codes == [1, 1], (value, run.codes, run.err)
        assert len(lines("".join(run.err))) == 1 and value in run.err[0] and "".join(run.out) == ""


def test_agree_refuse_and_from_main_end_both(launch):
    """A problem on one process of two ends both: exit code 2 and one line."""
    for call in (
        "common.agree('the reason' if r == 1 else None)",
        "common.refuse('the reason')",
        "common.from_main(lambda: print('the reason', file=sys.stderr) or sys.exit(2))",
    ):
        run = launch(SETUP + f"common.agree(None)\n{call}\nprint('went on')")
        assert run.codes == [2, 2], (call, run.codes, run.err)
        assert len(lines("".join(run.err))) == 1 and "the reason" in run.err[0], run.err
        assert "".join(run.out) == ""


def test_gradient_on_two_processes_is_that_of_the_whole_batch(launch):
    """One step: parallel(net) on the shards of a batch, against the same batch on one process."""
    make = """
torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 5))
x, y = torch.randn(6, 3, 8, 8), torch.arange(6) % 5
"""
    run = launch(
        SETUP
        + make
        + """
if r == 1:  # a copy that starts elsewhere must be brought into line
    torch.nn.init.zeros_(net[0].weight)
first, last = common.shard(6)
wrapped = common.parallel(net)
torch.nn.functional.cross_entropy(wrapped(x[first:last]), y[first:last]).backward()
torch.save([p.grad for p in net.parameters()], f"grad.{r}")
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    space = {"torch": torch}
    exec(make, space)
    net = space["net"]
    torch.nn.functional.cross_entropy(net(space["x"]), space["y"]).backward()
    for r in range(2):
        for p, grad in zip(net.parameters(), torch.load(run.path / f"grad.{r}"), strict=True):
            assert p.grad.abs().max() > 1e-3
            np.testing.assert_allclose(grad, p.grad, atol=1e-6)


def test_share_buffers_and_seeds(launch):
    """Statistics are process 0's afterwards; initial weights agree, a step's dropout does not."""
    run = launch(
        SETUP
        + """
net = torch.nn.BatchNorm1d(3)
net.running_mean.fill_(r + 1.0)
net.num_batches_tracked.fill_(r + 5)
common.share_buffers(net)
print(net.running_mean.tolist(), net.num_batches_tracked.item())
common.seed_all(1, "net")
print(torch.rand(3).tolist())
common.seed_step(1, 0, 0)
print(torch.rand(3).tolist())
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    (buffers, weights, dropout), other = (out.splitlines() for out in run.out)
    assert buffers == "[1.0, 1.0, 1.0] 5" and [buffers, weights] == other[:2] and dropout != other[2]


# --------------------------------------------------------------------------- batch norm over all processes

# Networks in which every batch norm has its own weights, eps and momentum, and batches whose rows differ so
# much that the statistics of a part are far from those of the whole. `train` runs on one process and on
# several: two steps' outputs, gradients and buffers.
NETWORKS = """
from torch import nn

def randomise(net):
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for x in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(x, 0.5, 2.0)
    return net

def two_dimensional():
    stem = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4, eps=0.02, momentum=0.3), nn.Softplus()]
    return randomise(nn.Sequential(*stem, nn.Conv2d(4, 5, 2), nn.BatchNorm2d(5), nn.Flatten()))

def both():
    stem = [nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Softplus(), nn.Flatten(), nn.Linear(64, 6)]
    tail = [nn.BatchNorm1d(6, eps=0.05, momentum=0.2), nn.Softplus(), nn.Linear(6, 5)]
    return randomise(nn.Sequential(*stem, *tail))

def maps(n):
    scale, shift = (torch.linspace(a, 2, n).view(n, 1, 1, 1) for a in (0.3, -1))
    return torch.randn(n, 3, 6, 6) * scale + shift

def rows_only():
    norm = nn.BatchNorm1d(6, eps=0.1)
    return randomise(nn.Sequential(nn.Linear(7, 6), norm, nn.Softplus(), nn.Linear(6, 5)))

def rows(n):
    return torch.randn(n, 7) + torch.linspace(-1, 2, n)[:, None]

def train(net, wrapped, batches, part):
    first, last, steps = *part, []
    for x, y in batches:
        x, y = x[first:last].clone().requires_grad_(), y[first:last]
        out = wrapped(x)
        net.zero_grad()
        nn.functional.cross_entropy(out, y).backward()
        steps.append([out.detach(), x.grad, [p.grad.clone() for p in net.parameters()]])
    return steps, {k: b.clone() for k, b in net.named_buffers()}

def cases(world):
    # A network, its two batches, and the dtype; the last one has one row on every process.
    kinds = [(two_dimensional, maps, 12), (both, maps, 12), (rows_only, rows, 6), (rows_only, rows, world)]
    for i, (make, data, n) in enumerate(kinds):
        for dtype in (torch.float32, torch.float64):
            torch.manual_seed(i)
            net = make().to(dtype)
            yield net, [(data(n).to(dtype), torch.randint(5, (n,))) for _ in range(2)], dtype
"""


@pytest.mark.parametrize("world", [2, 3])
def test_synchronised_batch_norm_is_that_of_the_whole_batch(world, launch):
    """Outputs, gradients of weights and inputs, and statistics of two steps: torch's on the whole batch.

    Gradients of weights are those of the mean loss, averaged by `parallel`; an input's is that of the sum
    of the processes' mean losses, so `world` times the whole batch's.
    """
    run = launch(
        SETUP
        + NETWORKS
        + """
got = []
for net, batches, _ in cases(common.processes()):
    net = common.synchronise(net)
    got.append(train(net, common.parallel(net), batches, common.shard(len(batches[0][0]))))
torch.save(got, f"got.{r}")
common.leave()
""",
        world=world,
    )
    assert run.codes == [0] * world, run.err
    space = {"torch": torch}
    exec(NETWORKS, space)
    got = [torch.load(run.path / f"got.{r}") for r in range(world)]
    for i, (net, batches, dtype) in enumerate(space["cases"](world)):
        alone = copy.deepcopy(net)  # what a part's own statistics would give: it must be far away
        n = len(batches[0][0])
        want, buffers = space["train"](net, net, batches, (0, n))
        atol = 1e-5 if dtype == torch.float32 else 1e-10
        for step, (out, x_grad, grads) in enumerate(want):
            mine = [got[r][i][0][step] for r in range(world)]
            np.testing.assert_allclose(torch.cat([m[0] for m in mine]), out, atol=atol, rtol=0)
            np.testing.assert_allclose(torch.cat([m[1] for m in mine]) / world, x_grad, atol=atol, rtol=0)
            assert x_grad.abs().max() > 1e-3 and max(g.abs().max() for g in grads) > 1e-2
            for m in mine:
                for a, b in zip(m[2], grads, strict=True):
                    assert a.dtype == dtype
                    np.testing.assert_allclose(a, b, atol=atol, rtol=0)
        for r in range(world):
            assert list(got[r][i][1]) == list(buffers)
            for name, b in buffers.items():
                a = got[r][i][1][name]
                assert a.dtype == b.dtype and ("tracked" not in name or a.item() == 2), name
                np.testing.assert_allclose(a, b, atol=atol, rtol=1e-6, err_msg=name)
        if n // world > 1:
            own, _ = space["train"](alone, alone, batches, (0, n // world))
            assert (own[0][0] - want[0][0][: n // world]).abs().max() > 0.05


def test_synchronised_batch_norm_far_from_zero(launch):
    """Mean 100, deviation 1: output, gradients and variance as in float64, with parts of different means."""
    make = """
torch.manual_seed(0)
x = torch.randn(24, 3, 4, 4) + 100 + torch.linspace(-1, 1, 24).view(24, 1, 1, 1)
g, weight = torch.randn(24, 3, 4, 4), torch.tensor([0.5, 1.0, 2.0])
"""
    run = launch(
        SETUP
        + make
        + """
bn = torch.nn.BatchNorm2d(3, momentum=1.0)
bn.weight.data.copy_(weight)
bn = common.synchronise(bn)
first, last = common.shard(24)
x = x[first:last].requires_grad_()
out = bn(x)
(out * g[first:last]).sum().backward()
torch.save([out.detach(), x.grad, common.total(bn.weight.grad), bn.running_mean, bn.running_var], f"got.{r}")
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    space = {"torch": torch}
    exec(make, space)
    x, g, weight = (space[name].double() for name in ("x", "g", "weight"))
    bn = nn.BatchNorm2d(3, momentum=1.0).double()
    bn.weight.data.copy_(weight)
    x.requires_grad_()
    out = bn(x)
    (out * g).sum().backward()
    got = [torch.load(run.path / f"got.{r}") for r in range(2)]
    np.testing.assert_allclose(torch.cat([a[0] for a in got]), out.detach(), atol=5e-5)
    np.testing.assert_allclose(torch.cat([a[1] for a in got]), x.grad, atol=5e-5)
    for _, _, weight_grad, mean, var in got:
        np.testing.assert_allclose(weight_grad, bn.weight.grad, atol=3e-3)  # sums of 384 products near 200
        np.testing.assert_allclose(mean, bn.running_mean, rtol=1e-6)
        np.testing.assert_allclose(var, bn.running_var, rtol=1e-5)


def test_synchronised_networks_evaluate_and_save_as_before(launch):
    """Evaluation takes the running statistics, for any number of rows; a plain network loads the same keys."""
    run = launch(
        SETUP
        + NETWORKS
        + """
torch.manual_seed(0)
net = both()
keys = list(net.state_dict())
torch.manual_seed(1)
x, few = maps(12), maps(3)
same = common.synchronise(net) is net
net(x[slice(*common.shard(12))])
net.eval()
before = {k: v.clone() for k, v in net.state_dict().items()}
with torch.no_grad():
    out = net(few[: 2 * r + 1])  # 1 and 3 rows
    out = net(few) if r == 1 else out  # and once more on one of them: nobody waits for the other
kept = all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
torch.save([same, kept, keys == list(net.state_dict()), net.state_dict(), few[: 2 * r + 1], out], f"got.{r}")
common.leave()
"""
    )
    assert run.codes == [0, 0], run.err
    space = {"torch": torch}
    exec(NETWORKS, space)
    for r in range(2):
        *good, weights, few, out = torch.load(run.path / f"got.{r}")
        assert good == [True] * 3 and len(out) == 2 * r + 1
        plain = space["both"]()
        plain.load_state_dict(weights)
        with torch.no_grad():
            np.testing.assert_allclose(out, plain.eval()(few), atol=1e-6)
            assert (out - space["both"]().eval()(few)).abs().max() > 0.01


def test_one_process_keeps_torchs_batch_norm():
    """synchronise leaves the network as it is: the same object, the same classes, no other outputs."""
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Unflatten(1, (4, 1, 1)), nn.BatchNorm2d(4))
    kinds = [type(m) for m in net.modules()]
    assert common.synchronise(net) is net and [type(m) for m in net.modules()] == kinds


def test_to_device_moves_and_changes_nothing_else():
    """On the CPU: the network itself, every value, dtype and order of memory as it was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 2).double())
    net[0].half()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    assert common.to_device(net, torch.device("cpu")) is net
    after = net.state_dict()
    assert list(after) == list(before) and len(after) == 9
    for name, x in before.items():
        assert after[name].dtype == x.dtype and torch.equal(after[name], x), name
        assert after[name].device.type == "cpu" and after[name].is_contiguous(), name
