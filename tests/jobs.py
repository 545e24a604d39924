"""Whole runs of the scripts: a server that forks a process for each, and what is read off the runs."""

import contextlib
import csv
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent

# --------------------------------------------------------------------------- the server
# It has imported everything once and forks the processes of each job: a start costs milliseconds
# instead of seconds. It does no arithmetic of its own, so there are no threads to lose in the fork.
# One thread for each process, so that two runs with equal arguments must agree in every bit; ranks
# and addresses are given as torchrun gives them.

CODE = """
import json, os, signal, socket, sys, traceback
import common
import scipy.linalg, scipy.sparse, sklearn.datasets, sklearn.metrics, torch, torchvision
def child(job, rank, port):
    os.chdir(job["folder"])
    for number, name in ((0, os.devnull), (1, f"out.{rank}"), (2, f"err.{rank}")):
        os.dup2(os.open(name, os.O_RDWR | os.O_CREAT | os.O_TRUNC * (number > 0)), number)
    if job["world"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(job["world"]), LOCAL_WORLD_SIZE=str(job["world"]),
                          MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv, code = job["argv"], 0
    try:
        exec(compile(job["code"], "snippet", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
def write(path, text):
    with open(path + ".new", "w") as file:
        file.write(text)
    os.rename(path + ".new", path)
signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    job = json.loads(line)
    if os.fork():
        continue
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks = {}
    for rank in range(job["world"]):
        pid = os.fork()
        if pid == 0:
            child(job, rank, port)
        ranks[pid] = rank
    write(job["folder"] + "/pids", json.dumps(list(ranks)))
    codes = [None] * job["world"]
    for _ in ranks:
        pid, status = os.wait()
        codes[ranks[pid]] = os.waitstatus_to_exitcode(status)
    write(job["folder"] + "/codes", json.dumps(codes))
    os._exit(0)
"""
ONE_THREAD = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Server:
    """start() a job at a time; close() ends what is still running."""

    def __init__(self):
        path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "PYTHONPATH": path, **ONE_THREAD}
        command = [sys.executable, "-c", CODE]
        self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, text=True)
        self.lock, self.jobs = threading.Lock(), []

    def start(self, argv, code, world, folder):
        """A Job: code on `world` processes in a folder, which may be a former job's."""
        with self.lock:
            for old in ("pids", "codes"):
                (folder / old).unlink(missing_ok=True)
            job = {"argv": list(map(str, argv)), "code": code, "world": world, "folder": str(folder)}
            self.process.stdin.write(json.dumps(job) + "\n")
            self.process.stdin.flush()
            self.jobs.append(Job(Path(argv[0]).name, folder, world))
        return self.jobs[-1]

    def close(self):
        for job in {job.folder: job for job in self.jobs}.values():
            job.kill()
        self.process.stdin.close()
        self.process.wait(60)


class Job:
    """A run on its way: wait() for it, then .codes, .out and .err by process; .code of the first."""

    def __init__(self, script, folder, world):
        self.script, self.folder, self.world, self.run = script, folder, world, folder / "run"

    def pids(self):
        wait_for(lambda: (self.folder / "pids").exists(), 60)
        return json.loads((self.folder / "pids").read_text())

    def kill(self):
        if self.folder.exists() and not (self.folder / "codes").exists():
            for pid in self.pids():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)

    def wait(self, limit=150):
        if not wait_for((self.folder / "codes").exists, limit, fail=False):
            self.kill()
            pytest.fail(f"still running after {limit} s: {self.read('out')} {self.read('err')}")
        self.codes = json.loads((self.folder / "codes").read_text())
        self.code, self.out, self.err = self.codes[0], self.read("out"), self.read("err")
        return self

    def read(self, stream):
        return "".join(self.by_process(stream))

    def by_process(self, stream):
        return [(self.folder / f"{stream}.{r}").read_text() for r in range(self.world)]

    def ok(self):
        self.wait()
        assert self.codes == [0] * self.world, self.out + self.err
        return self

    def log(self):
        return read_log(self.run / "log.jsonl")

    def state(self, name="checkpoint.pt"):
        return torch.load(self.run / name, map_location="cpu", weights_only=True)


def plain(script):
    """The code of a job that runs a script as it is."""
    return f"import runpy; runpy.run_path({str(script)!r}, run_name='__main__')"


# Before a script: without its picture, which takes as long as three epochs.
QUIET = "import common; common.draw_clusters = lambda *a: None\n"
# A script that kills itself at the n-th call of a function; late: of those after its first checkpoint.
TRAP = """
import os, signal, sys, torch, common, {script}
def trap(module, name, n, late, torn):
    real, calls = getattr(module, name), 0
    def wrapped(*a, **k):
        nonlocal calls
        calls += not late or os.path.exists("run/checkpoint.pt")
        if calls == n:
            if torn:
                a[1].write(b"PK half a file"); a[1].flush()
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a, **k)
    setattr(module, name, wrapped)
trap({module}, {name!r}, {n}, {late}, {torn})
{script}.main()
"""


def trap(script, module, name, n, late=False, torn=False):
    return QUIET + TRAP.format(script=script, module=module, name=name, n=n, late=late, torn=torn)


def wait_for(true, limit, fail=True):
    end = time.time() + limit
    while time.time() < end:
        if true():
            return True
        time.sleep(0.01)
    if fail:
        pytest.fail(f"nothing happened for {limit} s")
    return False


def two_at_once(work, alone=None):
    """{name: function()} -> {name: result}, two running at any time; alone: how names of those begin that
    share a folder, which no two runs may, and come one after another."""
    one = {name: function() for name, function in work.items() if alone and name.startswith(alone)}
    with ThreadPoolExecutor(2) as pool:
        futures = {name: pool.submit(function) for name, function in work.items() if name not in one}
        return one | {name: future.result() for name, future in futures.items()}


# --------------------------------------------------------------------------- run folders


def read_log(path):
    """The records of a log.jsonl, refusing what JSON does not know: NaN and infinity."""

    def refuse(word):
        raise AssertionError(f"{word} in {path}")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def epochs(records):
    return [r for r in records if "loss" in r]


def read_assignments(path):
    with open(path, newline="") as file:
        head, *rows = csv.reader(file)
    assert head == ["image", "cluster"]
    return [r[0] for r in rows], [r[1] if r[1] == "unreadable" else int(r[1]) for r in rows]


def unset(args):
    """Names of the arguments that a recipe leaves open."""
    return {name for name, value in vars(args).items() if value is None} - {"init", "assign", "normalize"}


def contents(run):
    return {p.name: p.read_bytes() for p in run.iterdir()}


def write_images(folder, count, make=None, size=32):
    """Noise, or what make(i) returns, as PNG files."""
    folder.mkdir(parents=True)
    noise = np.random.default_rng(len(str(folder)))
    for i in range(count):
        pixels = noise.integers(0, 256, (size, size, 3), dtype=np.uint8) if make is None else make(i)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def plain_nmi(a, b):
    """I(A;B) / sqrt(H(A) H(B)) from counts."""
    n, both, ca, cb = len(a), Counter(zip(a, b, strict=True)), Counter(a), Counter(b)
    information = sum(m / n * math.log(m * n / ca[x] / cb[y]) for (x, y), m in both.items())
    entropy = [-sum(m / n * math.log(m / n) for m in c.values()) for c in (ca, cb)]
    return information / math.sqrt(entropy[0] * entropy[1])


def refusal(options, arguments, capsys):
    """The one line with which a command line ends, exit code 2."""
    with pytest.raises(SystemExit) as end:
        options(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert end.value.code == 2
    return line


def one_error(job):
    """The one line with which all processes ended, exit code 2; argparse's usage may precede it."""
    assert set(job.codes) == {2} and "Traceback" not in job.out + job.err, job.out + job.err
    lines = [line for line in job.err.splitlines() if ": error: " in line]
    assert len(lines) == 1 and job.err.splitlines()[-1] == lines[0] and lines[0].startswith(job.script)
    return lines[0]


def assert_same(a, b):
    """Two jobs ended with the same checkpoint, backbone, clustering, csv and log (--epochs may have grown), bit for bit."""
    x, y = ({k: v for k, v in job.state().items() if k != "log_bytes"} for job in (a, b))
    assert x.pop("config") == y.pop("config")
    torch.testing.assert_close(x, y, rtol=0, atol=0)
    for name in {"backbone.pt", "rotnet.pt", "clustering.pt", "assignments.csv"} & contents(a.run).keys():
        assert (a.run / name).read_bytes() == (b.run / name).read_bytes(), name
    logs = [job.log()[1:] for job in (a, b)]
    same = [
        [{k: v for k, v in r.items() if "seconds" not in k and k != "epochs"} for r in log] for log in logs
    ]
    assert same[0] == same[1]
