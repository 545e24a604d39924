"""Interrupt runs at random moments and spoil their checkpoints: does the same command end as if nothing had happened?

    python -m extras.trust                              all of it, an hour on two cores; writes trust.json, prints a table
    python -m extras.trust --scripts coke --tries 2     one script, few tries

Every run is on the digits, on the CPU, on one thread a process. "Bit-identical": every tensor and number of the last
checkpoint, and assignments.csv, byte for byte, as in a run that nobody interrupted.
"""

import argparse
import json
import os
import pickle
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import common  # isort: skip  (before torch)
import torch

ROOT = Path(__file__).parent.parent
SCRIPTS = {  # short runs of some epochs
    "deepcluster": ["--epochs", "8"],
    "local_aggregation": ["--epochs", "8", "--ir-epochs", "2"],
    "coke": ["--epochs", "6", "--warmup-epochs", "1"],
    "lsdc": ["--epochs", "6", "--lr-steps", "4"],
}


def start(script, out, processes=1):
    """A run on its way, torchrun's with --max-restarts where there are two processes; it cannot be stopped by a terminal."""
    python = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts=1"]
    python = [*python, f"--nproc_per_node={processes}"] if processes > 1 else [sys.executable]
    command = [
        *python,
        ROOT / f"{script}.py",
        *SCRIPTS[script],
        "--data",
        "digits",
        "--device",
        "cpu",
        "--out",
        out,
    ]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "start_new_session": True}
    return subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, **quiet)


def wait_for_log(out):
    """Until the run has begun: imports, data and network are done."""
    while not (out / "log.jsonl").exists():
        time.sleep(0.01)


def same(a, b):
    """Are two values of checkpoints equal, bit by bit? Where the log stood may differ: it holds times."""
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a if name != "log_bytes")
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def results(out):
    return common.load_file(out / "checkpoint.pt"), (out / "assignments.csv").read_text()


def reference(script, folder, processes):
    """(results of a run that nobody interrupts, its seconds from its log's first line to its end)."""
    run = start(script, folder, processes)
    wait_for_log(folder)
    began = time.time()
    assert run.wait() == 0, f"{script} fails by itself"
    return results(folder), time.time() - began


def begun(script, out, seconds, rng, processes=1):
    """A run that has been going on for a random time of up to `seconds`, and is not over."""
    while True:
        shutil.rmtree(out, ignore_errors=True)
        run = start(script, out, processes)
        wait_for_log(out)
        time.sleep(rng.uniform(0, seconds))
        if run.poll() is None:
            return run


def killed(script, folder, tries, rng):
    """kill -9 at a random moment; the same command again."""
    wanted, seconds = reference(script, folder / "alone", 1)
    for i in range(tries):
        out = folder / f"killed-{i}"
        run = begun(script, out, seconds, rng)
        run.kill()
        run.wait()
        yield start(script, out).wait() == 0 and same(results(out), wanted)
        shutil.rmtree(out)


def restarted(script, folder, tries, rng):
    """kill -9 of one of two processes under torchrun --max-restarts=1, which goes on by itself."""
    wanted, seconds = reference(script, folder / "two", 2)
    for i in range(tries):
        out = folder / f"restarted-{i}"
        workers = []
        while not workers:  # torchrun outlives its processes for a moment
            run = begun(script, out, 0.8 * seconds, rng, 2)
            children = ["pgrep", "-P", str(run.pid)]
            workers = subprocess.run(children, capture_output=True, text=True).stdout.split()
        os.kill(int(rng.choice(workers)), signal.SIGKILL)
        yield run.wait() == 0 and same(results(out), wanted)
        shutil.rmtree(out)


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def loads_as(folder, state, before):
    """Does load_checkpoint take the one before, saying so, or what the file said before it was spoilt?"""
    with redirect_stdout(StringIO()) as said:
        found, damaged = common.load_checkpoint(folder)
    return (
        damaged and same(found, before) and "damaged" in said.getvalue() or not damaged and same(found, state)
    )


def spoilt(script, folder, tries, rng):
    """{what: held for each try} of a checkpoint of the script with flipped bits, cut short, or replaced by other files."""
    newest, previous = folder / "alone/checkpoint.pt", folder / "alone/checkpoint.prev.pt"
    state, before, good = common.load_file(newest), common.load_file(previous), newest.read_bytes()
    found = {"flipped": [], "cut": [], "foreign": []}
    for _ in range(8 * tries):
        bad = bytearray(good)
        bad[rng.randrange(len(bad))] ^= 1 << rng.randrange(8)
        newest.write_bytes(bad)
        found["flipped"].append(loads_as(newest.parent, state, before))
        newest.write_bytes(good[: rng.randrange(len(good))])
        found["cut"].append(loads_as(newest.parent, state, before))
    mark = folder / "executed"
    payload = Payload(mark)
    foreign = [b"", b"no checkpoint", rng.randbytes(10_000), pickle.dumps(payload), good[::-1]]
    for thing in (
        payload,
        {"config": payload, "epoch": 1, "log_bytes": 0},
        torch.zeros(3),
        [state],
        {"net": state},
    ):
        torch.save(thing, newest)
        foreign.append(newest.read_bytes())
    for content in foreign:
        newest.write_bytes(content)
        found["foreign"].append(loads_as(newest.parent, None, before) and not mark.exists())
    newest.write_bytes(good)
    return found


TRIED = {
    "killed": "kill -9 at a random moment, the same command again: bit-identical",
    "restarted": "one of two processes killed under `--max-restarts=1`: goes on by itself, bit-identical",
    "flipped": "a flipped bit in checkpoint.pt: said, the one before taken, or without effect",
    "cut": "checkpoint.pt cut short: said, the one before taken",
    "foreign": "another file in its place, with a payload or not: said, never executed, the one before taken",
}


def main():
    p = argparse.ArgumentParser(prog="python -m extras.trust", description="Interruptions and damage")
    p.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    p.add_argument(
        "--tries",
        type=int,
        default=25,
        help="kills; restarts: two fifths; flips and cuts: eight times as many",
    )
    p.add_argument("--seed", type=int, default=0, help="of the moments and bits")
    p.add_argument("--folder", default="runs/trust", help="where the runs go; removed at the end")
    p.add_argument("--out", default="trust.json", help="JSON file; scripts that are in it already stay")
    args = p.parse_args()
    report = json.loads(Path(args.out).read_text()) if os.path.exists(args.out) else {}
    for script in args.scripts:
        rng, folder = random.Random(f"{args.seed} {script}"), Path(args.folder).resolve() / script
        shutil.rmtree(folder, ignore_errors=True)
        found = {"killed": list(killed(script, folder, args.tries, rng))}
        found["restarted"] = list(restarted(script, folder, args.tries * 2 // 5, rng))
        found |= spoilt(script, folder, args.tries, rng)
        counts = {name: [sum(held), len(held)] for name, held in found.items()}
        report[script] = {**counts, "commit": common.what_runs(args, ())["commit"]}
        Path(args.out).write_text(json.dumps(report, indent=1) + "\n")
        shutil.rmtree(folder)
    print(f"| tried | {' | '.join(report)} |\n|---{'|---' * len(report)}|")
    for name, what in TRIED.items():
        print(f"| {what} | {' | '.join('{} of {}'.format(*found[name]) for found in report.values())} |")


if __name__ == "__main__":
    main()
