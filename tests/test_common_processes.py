"""common.py, processes: the verbs mean the same on one, two and three processes."""

import numpy as np
import torch

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


def test_verbs_do_nothing_on_one_process():
    """Without torchrun: the same values, no gradient, this process owns everything."""
    x = torch.arange(6.0).view(3, 2).requires_grad_()
    for verb in (common.gather, common.total):
        assert torch.equal(verb(x), x) and not verb(x).requires_grad
    assert common.total(x).data_ptr() != x.data_ptr()
    assert common.shard(7) == (0, 7) and common.main_process() and common.processes() == 1
    assert common.from_main(lambda: 5) == 5
    common.agree(None)
    net = torch.nn.Linear(2, 2)
    assert common.parallel(net) is net


def test_setup_refuses_an_unknown_device(launch):
    """--device nonsense: one line and exit code 2, on one process."""
    run = launch("import common\ncommon.setup('nonsense')", world=1)
    assert run.codes == [2] and len(lines(run.err[0])) == 1 and "nonsense" in run.err[0]


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
    for value in ("nan", "inf"):
        run = launch(
            SETUP + f"common.heartbeat(torch.tensor(float('{value}') if r == 1 else 1.0))\nprint('went on')"
        )
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
