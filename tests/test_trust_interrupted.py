"""Runs that are killed, stopped, lose a process or go on with another number of them: they end as if nothing had
happened.

A job can be told to come to grief at the n-th moment of a phase. A run that is left alone counts how many moments
each phase has; which of them are tried is drawn by a seed.
"""

import contextlib
import hashlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import sklearn.datasets
import torch
from jobs import ONE_THREAD, ROOT, plain, read_log, two_at_once, wait_for
from PIL import Image
from trust import RUNS, ordinarily

import common

SCRIPTS = pytest.mark.parametrize("script", RUNS)
NUMBER = {script: number for number, script in enumerate(RUNS)}

# --------------------------------------------------------------------------- moments of a run

# The script, with a fault at the NUMBER-th moment of PHASE on the process VICTIM: a signal to itself, or an exception.
# A write comes to grief in the middle of its bytes, everything else before or after it has happened. Only the first
# start under torchrun is harmed. A run that comes to its end leaves behind how many moments each phase had.
FAULTY = """
import builtins, importlib, io, json, os, signal, sys, time, torch, torchvision, common
from torch.optim.optimizer import register_optimizer_step_post_hook
script = importlib.import_module(SCRIPT)
sys.argv[0] = script.__file__
counts, drawing = {}, False

class Fault(Exception):
    pass

def moment(phase, half=None):
    counts[phase] = counts.get(phase, 0) + 1
    if (phase, counts[phase], common.rank()) != (PHASE, NUMBER, VICTIM):
        return
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0":
        return
    if half:
        half()
    with open("fault", "w") as file:
        file.write(str(time.time()))
    if FAULT == "raise":
        raise Fault("this is the fault")
    os.kill(os.getpid(), signal.Signals[FAULT])

def around(module, name, phase):
    real = getattr(module, name)
    def wrapped(*a, **k):
        moment(phase)
        result = real(*a, **k)
        moment(phase)
        return result
    setattr(module, name, wrapped)

class Torn:
    def __init__(self, file, phase):
        self.file, self.phase = file, phase
    def write(self, data):
        def half():
            self.file.write(data[: len(data) // 2])
            self.file.flush()
        moment(self.phase, half)
        return self.file.write(data)
    def __getattr__(self, name):
        return getattr(self.file, name)
    def __enter__(self):
        return self
    def __exit__(self, *error):
        self.file.close()

def opened(path, mode="r", **k):
    file = builtins.open(path, mode, **k)
    return Torn(file, "log" if str(path).endswith("jsonl") else "table") if mode in ("a", "w") else file

def fixed(self, *a, real=common.Loader.fixed, **k):
    for batch in real(self, *a, **k):
        moment("pictures" if drawing else "features")
        yield batch

def save_pictures(*a, real=common.save_pictures, **k):
    global drawing
    drawing = True
    real(*a, **k)
    drawing = False

def save_image(tiles, path, *a, real=torchvision.utils.save_image, **k):
    real(tiles, path, *a, **k)
    moment("pictures", lambda: os.truncate(path, os.path.getsize(path) // 2))

common.open = script.open = opened
common.Loader.fixed, script.save_pictures, torchvision.utils.save_image = fixed, save_pictures, save_image
def save(state, file, *a, real=torch.save, **k):
    return real(state, Torn(file, "bytes") if isinstance(file, io.BufferedWriter) else file, *a, **k)

torch.save = save
for name in ("fsync", "replace", "link"):
    around(os, name, "renames")
own = {"deepcluster": "pca", "local_aggregation": "describe", "coke": "cluster", "lsdc": "similar_pairs"}
around(script, own[SCRIPT], "clustering")
around(common, "nearest", "clustering")
around(script, "heartbeat", "training")
register_optimizer_step_post_hook(lambda *_: moment("training"))
exec(MORE)
try:
    script.main()
finally:
    with open(f"counts.{os.environ.get('RANK', 0)}", "w") as file:
        json.dump(counts, file)
"""
PHASES = ["features", "clustering", "training", "bytes", "renames", "log", "table", "pictures"]


def faulty(script, phase=None, number=0, fault="SIGKILL", victim=0, more=""):
    """The code of a job that comes to grief; more: what else is to be changed in the script."""
    names = {
        "SCRIPT": script,
        "PHASE": phase,
        "NUMBER": number,
        "FAULT": fault,
        "VICTIM": victim,
        "MORE": more,
    }
    return "".join(f"{name} = {value!r}\n" for name, value in names.items()) + FAULTY


def counted(job, rank=0):
    """Moments of each phase of a run that came to its end."""
    return json.loads((job.folder / f"counts.{rank}").read_text())


# --------------------------------------------------------------------------- what is compared

TIMES = {"minutes", "log_bytes", "seconds", "images_per_second"}


def flat(x, at=""):
    """{where: bits or text} of everything in a checkpoint or a log but for times."""
    if isinstance(x, torch.Tensor):
        return {at: (x.dtype, x.shape, hashlib.sha1(x.contiguous().numpy().tobytes()).hexdigest())}
    if isinstance(x, dict):
        items = [(k, v) for k, v in x.items() if k not in TIMES]
    elif isinstance(x, (list, tuple)):
        items = enumerate(x)
    else:
        return {at: repr(x)}
    parts = {f"{at} {k}": v for k, v in items}
    return {at: sorted(parts), **{k: v for name, part in parts.items() for k, v in flat(part, name).items()}}


def left_behind(run):
    """All that a run leaves in its folder, for comparing; no times, and nothing of having been interrupted."""
    aside = re.compile(r"\.prev\.pt$|\.tmp$|\.old$|^\.lock$")
    found = {"files": sorted(p.name for p in run.iterdir() if not aside.search(p.name))}
    for path in map(run.joinpath, found["files"]):
        if path.suffix == ".pt":
            found |= flat(torch.load(path, map_location="cpu", weights_only=True), path.name)
        elif path.name == "log.jsonl":
            found |= flat([r for r in read_log(path) if "resumed" not in r], path.name)
        else:
            found[path.name] = path.read_bytes()
    return found


def unlike(job, reference):
    """ "" if a job ended well and left behind what the reference did, bit for bit; else what is wrong, in short."""
    if job.codes != [0] * job.world:
        return f"exit codes {job.codes}: {(job.read('err') or job.read('out'))[-300:]!r}"
    a, b = left_behind(job.run), left_behind(reference.run)
    odd = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return f"{len(odd)} of {len(b)} differ: {', '.join(odd[:5])}" if odd else ""


# --------------------------------------------------------------------------- starting them


@pytest.fixture(scope="module")
def go(server, tmp_path_factory):
    """go(script, code, world, folder, flags): a Job of the script's short run, waited for unless told otherwise."""
    tmp_path_factory.getbasetemp()  # or two at once would both make it

    def go(script, code=None, world=1, folder=None, flags=(), wait=True):
        path = ROOT / f"{script}.py"
        folder = folder or tmp_path_factory.mktemp(script)
        job = server.start([path, *RUNS[script], *flags], code or plain(path), world, folder)
        return job.wait() if wait else job

    return go


class Torchrun:
    """A script's short run on two processes of the real torchrun."""

    world = 1  # is seen of it

    def __init__(self, script, folder, flags, code=None, restarts=0):
        self.folder, self.run, path = folder, folder / "run", ROOT / f"{script}.py"
        if code:
            path = folder / "snippet.py"
            path.write_text(code)
        launcher = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            f"--max-restarts={restarts}",
        ]
        command = [sys.executable, *launcher, path, *RUNS[script], *flags]
        environment = {**os.environ, "PYTHONPATH": str(ROOT), **ONE_THREAD}
        self.began = time.time()
        with open(folder / "out", "w") as out:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=out)

    def read(self, stream="out"):
        return (self.folder / stream).read_text() if stream == "out" else ""

    def living(self):
        """Ids of torchrun, of its processes and of their loaders: all that live in the folder."""
        found = []
        for link in Path("/proc").glob("[0-9]*/cwd"):
            with contextlib.suppress(OSError):  # ended just now, or somebody else's
                found += [int(link.parent.name)] if os.readlink(link) == str(self.folder) else []
        return found

    def gone(self, limit):
        """Did everything end in time? If not, it is ended."""
        gone = wait_for(lambda: self.process.poll() is not None and not self.living(), limit, fail=False)
        self.seconds = time.time() - self.began
        for pid in self.living():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.codes = [self.process.wait(10)]
        return gone


@pytest.fixture(scope="module")
def torchrun(tmp_path_factory):
    """torchrun(script, flags, code, restarts): a Torchrun that has just begun."""
    return lambda script, *more: Torchrun(script, tmp_path_factory.mktemp(f"{script}-torchrun"), *more)


@pytest.fixture(scope="module")
def files(tmp_path_factory, ledger):
    """Flags by script, to learn from files, which need processes that decode them; fewer epochs if not in full."""
    digits, folder = sklearn.datasets.load_digits(), tmp_path_factory.mktemp("files")
    for i in range(480):
        at = folder / ("train" if i < 400 else "val") / str(digits.target[i])
        at.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[i] * 15).astype(np.uint8).repeat(2, 0).repeat(2, 1)
        Image.fromarray(pixels).convert("RGB").save(at / f"{i:03}.png")
    few = {script: [] if ledger.full else ["--epochs", str(2 - (script == "lsdc"))] for script in RUNS}
    return {script: ["--data", folder, "--workers", "1", *few[script]] for script in RUNS}


@pytest.fixture(scope="module")
def scripts(request):
    """The scripts that are to be tested this time: all four, if -k does not say otherwise."""
    names = [item.name for item in request.session.items if item.path == request.path]
    return [script for script in RUNS if any(script in name for name in names)]


@pytest.fixture(scope="module")
def pairs(go, files, scripts):
    """The runs on two processes, from files, that nothing happens to, by script."""
    jobs = two_at_once({s: lambda s=s: go(s, faulty(s), world=2, flags=files[s]) for s in scripts})
    for job in jobs.values():
        assert job.codes == [0, 0], job.err
    return jobs


def tried(trial, names):
    """{name: "" or what is wrong with trial(*name)}, two at a time."""

    def told(name):
        try:
            return trial(*name)
        except (Exception, pytest.fail.Exception) as error:
            return f"{name}: {type(error).__name__}: {error}"[:500]

    return two_at_once({name: lambda name=name: told(name) for name in names})


def enter(ledger, what, script, problems):
    """Into the ledger: a row's cell, of the trials that have the script as the first part of their name."""
    own = [problem for (first, *_), problem in problems.items() if first == script]
    wrong = [problem for problem in own if problem]
    ledger(what, script, len(own), len(own) - len(wrong), "; ".join(wrong)[:1500])


# --------------------------------------------------------------------------- kill -9


@pytest.fixture(scope="module")
def killed(go, ledger, scripts):
    """What is wrong with runs that were killed, some of them twice."""
    alone = two_at_once({script: lambda s=script: go(s, faulty(s)) for script in scripts})
    for job in alone.values():
        assert job.code == 0 and set(counted(job)) == set(PHASES), job.err

    def kill(script, trial):
        draw, counts = random.Random(f"{script} {trial}"), counted(alone[script])
        phase = PHASES[(3 * NUMBER[script] + trial) % len(PHASES)]
        number = draw.randint(1, counts[phase])
        job = go(script, faulty(script, phase, number))
        found = f"{phase} {number} of {counts[phase]}"
        if trial % 5 == 4 and job.code == -9:  # how many moments are left shows in a copy
            copy = job.folder.with_name(job.folder.name + "-copy")
            shutil.copytree(job.folder, copy)
            rest = counted(go(script, faulty(script), folder=copy))
            phase = draw.choice(sorted(rest))
            number = draw.randint(1, rest[phase])
            found += f", then {phase} {number} of {rest[phase]}"
            job = go(script, faulty(script, phase, number), folder=job.folder)
        if job.code != -9:
            return f"{found}: not killed, exit code {job.code}: {job.err[-300:]!r}"
        problem = unlike(go(script, folder=job.folder), alone[script])
        return problem and f"{found}: {problem}"

    return tried(kill, [(script, trial) for script in scripts for trial in range(25 if ledger.full else 3)])


@SCRIPTS
def test_kill_9_at_random_moments(killed, ledger, script):
    """Killed in any phase, some of them once more after going on: the same command ends in the same bits."""
    enter(ledger, "kill -9, resumed: bit-identical", script, killed)


# --------------------------------------------------------------------------- signals


@pytest.fixture(scope="module")
def signalled(go, torchrun, files, pairs, ledger, scripts):
    """What is wrong with runs whose torchrun was sent a signal."""
    whole = {}  # full: runs of torchrun that are left alone; they and those that go on here must agree
    for script in scripts if ledger.full else ():
        whole[script] = torchrun(script, files[script])
        assert whole[script].gone(150) and not unlike(whole[script], pairs[script]), whole[script].read()

    def interrupt(script, trial):
        draw = random.Random(f"{script} {trial}")
        name = ("SIGTERM", "SIGINT")[(trial + NUMBER[script]) % 2]
        for _ in range(3):  # a machine that was busy before may be ahead of the clock
            job = torchrun(script, files[script])
            if not ledger.full:  # somewhere from the first line on
                wait_for((job.run / "log.jsonl").exists, 60)
            time.sleep(draw.random() * (whole[script].seconds if ledger.full else 1))
            found = f"{name} after {time.time() - job.began:.1f} s"
            if job.process.poll() is None:
                break
            job.gone(10)
        else:
            return f"{found}: too late"
        job.process.send_signal(signal.Signals[name])
        if not job.gone(10):
            return f"{found}: something is left after 10 s: {job.read()[-300:]!r}"
        try:
            state = common.load_checkpoint(job.run)
        except SystemExit:
            return f"{found}: no checkpoint can be read"
        if (
            state is None
            and (job.run / "checkpoint.pt").exists()
            or (job.run / "checkpoint.damaged.pt").exists()
        ):
            return f"{found}: the checkpoint cannot be read"
        problem = unlike(go(script, world=2, folder=job.folder, flags=files[script]), pairs[script])
        return problem and f"{found}: {problem}"

    return tried(
        interrupt, [(script, trial) for script in scripts for trial in range(10 if ledger.full else 1)]
    )


@SCRIPTS
def test_signals_to_torchrun(signalled, ledger, script):
    """SIGTERM or SIGINT at any time: no process is left after 10 s, and the same command ends in the same bits."""
    enter(ledger, "SIGTERM or SIGINT to torchrun: gone in 10 s, resumed: bit-identical", script, signalled)


# --------------------------------------------------------------------------- a lost process

PARTS = ["features", "clustering", "training", "saving"]
CAUSES = {
    "SIGKILL": "SIGKILL|Signal 9|exitcode: -9",
    "SIGSTOP": "process {victim} is silent for 20 s: stopped, or out of reach",
    "raise": "this is the fault",
}


def lost(script, part, fault, pair, more=""):
    """(code, victim, what happens) of a run that loses a process in a part of its work, drawn by the names."""
    draw = random.Random(f"{script} {part} {fault}")
    victim = 0 if part == "saving" else draw.randint(0, 1)
    # an exception while bytes are written is torch's RuntimeError then, and taken for a full disk
    saving = ["renames"] if fault == "raise" else ["bytes", "renames"]
    phase = draw.choice(saving) if part == "saving" else part
    count = counted(pair, victim)[phase]
    number = draw.randint(1, count)
    code = faulty(script, phase, number, fault, victim, more)
    return code, victim, f"{fault} of process {victim}, {phase} {number} of {count}"


@pytest.fixture(scope="module")
def lose(go, torchrun, files, pairs):
    """lose(script, part, fault, restarts): "" or what is wrong with a run that loses a process."""

    def lose(script, part, fault, restarts):
        code, victim, found = lost(script, part, fault, pairs[script])
        job = torchrun(script, files[script], code, restarts)
        mark = job.folder / "fault"
        wait_for(lambda: mark.exists() or job.process.poll() is not None, 90, fail=False)
        if not mark.exists():
            job.gone(0)
            return f"{found}: did not happen"
        # torchrun itself waits for half a minute before it kills a process that was stopped
        limit = (60 if fault == "SIGSTOP" else 25) + (35 if restarts else 0)
        if not job.gone(limit + mark.stat().st_mtime - time.time()):
            return f"{found}: something is left after {limit} s: {job.read()[-300:]!r}"
        if not re.search(CAUSES[fault].format(victim=victim), job.read()):
            return f"{found}: no cause on screen: {job.read()[-300:]!r}"
        problem = unlike(job, pairs[script]) if restarts else "" if job.codes != [0] else "exit code 0"
        return problem and f"{found}: {problem}"

    return lose


@pytest.fixture(scope="module")
def without_torchrun(go, files, pairs):
    """without_torchrun(script, part, fault): the same, where nobody is there who kills what is stopped."""

    def lose(script, part, fault):
        soon = "common.TICK = 0.2" if fault == "SIGSTOP" else ""
        code, victim, found = lost(script, part, fault, pairs[script], soon)
        job = go(script, code, world=2, flags=files[script], wait=False)
        pids = job.pids()
        wait_for((job.folder / "fault").exists, 60)
        wait_for(lambda: not Path(f"/proc/{pids[1 - victim]}").exists(), 20, fail=False)
        if fault == "SIGSTOP":
            os.kill(pids[victim], signal.SIGKILL)
        job.wait()
        # process 0 is the one through which they hear of each other, and of themselves
        who = "process 1 is" if victim else "(process 0 is|all processes are)"
        cause = f"{who} silent for 2 s: stopped, or out of reach" if fault == "SIGSTOP" else "by peer"
        line = job.by_process("err")[1 - victim]
        if job.codes[1 - victim] not in (1, 70) or job.codes[victim] != -9 or not re.search(cause, line):
            return f"{found}: exit codes {job.codes}, {line[-300:]!r}"
        problem = unlike(go(script, world=2, folder=job.folder, flags=files[script]), pairs[script])
        return problem and f"{found}: {problem}"

    return lose


@pytest.fixture(scope="module")
def restarted(lose, without_torchrun, ledger, scripts):
    """What is wrong with runs that lose a process and go on."""
    if ledger.full:
        names = [(script, part, fault, 1) for part in PARTS for fault in CAUSES for script in scripts]
        return tried(lose, names)
    # one of each, only the exception under torchrun: what follows a start of it takes half a minute
    names = [(script, PARTS[NUMBER[script]]) for script in scripts]
    faults = ("SIGKILL", "SIGSTOP", "raise", "SIGSTOP")

    def one(script, part):
        fault = faults[NUMBER[script]]
        return lose(script, part, fault, 1) if fault == "raise" else without_torchrun(script, part, fault)

    return tried(one, names)


@SCRIPTS
def test_a_process_is_lost(restarted, ledger, script):
    """Killed, stopped or failed on one process: the cause is on screen; a restart ends in the same bits."""
    what = "a process killed, stopped or failed: cause shown, restarted: bit-identical"
    enter(ledger, what, script, restarted)


@pytest.fixture(scope="module")
def ended(lose, ledger, scripts):
    """What is wrong with runs that lose a process and are not started again."""
    if not ledger.full:
        pytest.skip("only in full")
    draw = {script: random.Random(script) for script in scripts}
    return tried(lose, [(s, draw[s].choice(PARTS), fault, 0) for fault in CAUSES for s in scripts])


@SCRIPTS
def test_a_process_is_lost_for_good(ended, ledger, script):
    """Without restarts all others end, too, within a minute, torchrun fails, and the cause is on screen."""
    enter(ledger, "a process killed, stopped or failed: all end in a minute, cause shown", script, ended)


# A loader process is killed, as the kernel does when memory runs out, in the third step.
ORPHANED = """
import multiprocessing
steps = 0
def heartbeat(*a, real=script.heartbeat):
    global steps
    steps += 1
    if steps == 3 and not os.path.exists("killed"):
        open("killed", "w").close()
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    return real(*a)
script.heartbeat = heartbeat
"""


@SCRIPTS
def test_a_loader_process_is_killed(go, files, ledger, script):
    """The run ends by itself, says what died, and the same command ends as if nothing had been."""
    ordinarily(ledger, script, "coke")
    flags = [*files[script], "--workers", "2", "--batch-size", "32"]  # more batches than are fetched ahead
    flags += ["--pretrain-batch-size", "32"] if script == "lsdc" else []
    whole = go(script, faulty(script), flags=flags)
    job = go(script, faulty(script, more=ORPHANED), flags=flags, wait=False).wait(60)
    problem = (
        "" if job.code not in (0, None) and "DataLoader worker" in job.err else f"{job.code}: {job.err!r}"
    )
    problem = problem or unlike(go(script, faulty(script), folder=job.folder, flags=flags), whole)
    what = "a loader process killed: the run ends and says so, resumed: bit-identical"
    ledger(what, script, 1, int(not problem), problem[-500:])


# --------------------------------------------------------------------------- another number of processes

# A network without batch norm: deepcluster.py's is over each process's own part of the batch.
LINEAR = """
def make_body(args, channels):
    body = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(channels * args.image_size**2, 24))
    body.dim = 24
    return body, body
script.make_body = make_body
"""
# Rounding must stay rounding: few small steps, and a seed for which no maximum is a matter of rounding. A step too
# few or too many still moves the weights by 4e-5 of the largest or more.
GENTLE = {
    "deepcluster": "--lr 0.01",
    "local_aggregation": "--lr 0.001",
    "coke": "--lr 0.001 --warm-up 0 --seed 1",
    "lsdc": "--lr 0.001 --pretrain-lr 0.001 --pretrain-batch-size 240",
}
GENTLE = {script: f"--epochs 2 --batch-size 240 {flags}".split() for script, flags in GENTLE.items()}


def weights(job):
    """All weights of a run's networks, (n,)."""
    state = job.state()
    parts = [state[part] for part in ("body", "head", "net") if part in state]
    named = [(k, w) for p in parts for k, w in p.items() if not re.search("running|tracked", k)]
    return torch.cat([w.double().flatten() for _, w in named])


def change(go, script, more=""):
    """A job on 1, then 2, then 1 processes, each ended by a signal but the last; or what went wrong."""
    flags = GENTLE[script]
    # 5 steps an epoch, 3 moments each: in the third step of the first epoch, and in the third one of the second
    job = go(script, faulty(script, "training", 7, "SIGTERM", more=more), flags=flags)
    for world, before, fault in ((2, 1, ("training", 13, "SIGTERM", 1)), (1, 2, ())):
        if job.codes != [143] * job.world:
            return f"exit codes {job.codes}: {job.err[-300:]!r}"
        job = go(script, faulty(script, *fault, more=more), world, job.folder, flags)
        if len(re.findall(f"(?m)^{world} process(?:es)? now, {before} before.*$", job.out)) != 1:
            return f"not said: {world} processes now, {before} before: {job.out!r}"
    return job if job.codes == [0] else f"exit codes {job.codes}: {job.err[-300:]!r}"


@SCRIPTS
def test_another_number_of_processes(go, ledger, script):
    """On 1, then 2, then 1: said in one line, and the weights are those of one process up to 1e-5 of the largest."""
    more = LINEAR if script == "deepcluster" else ""
    jobs = {"changed": lambda: change(go, script, more)}
    jobs["alone"] = lambda: go(script, faulty(script, more=more), flags=GENTLE[script])
    jobs = two_at_once(jobs)
    problem = jobs["changed"]
    if not isinstance(problem, str):
        found, alone = weights(jobs["changed"]), weights(jobs["alone"])
        far = float((found - alone).abs().max() / alone.abs().max())
        problem = "" if far <= 1e-5 else f"differs by {far:.1e}"
    ledger("1, then 2, then 1 processes: equal to 1e-5", script, 1, int(not problem), problem)


def test_another_number_of_processes_where_batch_norm_sees_it(go, ledger):
    """DeepCluster's batch norm is over each process's part: accepted, said in one line, ends with finite numbers."""
    job = change(go, "deepcluster")
    problem = job if isinstance(job, str) else "" if weights(job).isfinite().all() else "not finite"
    what = "1, then 2, then 1 processes, own batch norm: accepted and said"
    ledger(what, "deepcluster", 1, int(not problem), problem)
