"""Hostile input: wrong command lines, damaged and foreign files, full disks, odd images, strange data.

A script either does its work or makes a clean end: exit code 2 and one line that names what is wrong. Nothing that
it reads is executed, and nothing that it reads is believed if it is damaged.
"""

import contextlib
import csv
import importlib
import io
import itertools
import json
import math
import os
import pickle
import random
import shutil
import signal
import struct
import tarfile
import zipfile
import zlib

import numpy as np
import pytest
import torch
from jobs import ROOT, contents, plain, read_log, two_at_once, wait_for, without_times, write_images
from PIL import Image
from trust import RUNS, ordinarily

import common

SCRIPTS = pytest.mark.parametrize("script", RUNS)


class Tally:
    """Counts what held and keeps the first failures."""

    def __init__(self):
        self.tried, self.failures = 0, []

    def __call__(self, held, what):
        self.tried += 1
        self.failures += [] if held else [str(what)[:250]]

    def into(self, ledger, what, script, note=""):
        shown = "; ".join([*[note] * bool(note), *self.failures[:6]])
        ledger(what, script, self.tried, self.tried - len(self.failures), shown)


def module_of(script):
    return importlib.import_module(script)


@pytest.fixture
def go(server, tmp_path):
    """go(script, arguments, code=None, world=1, folder=None): a Job of a script, or of code that has its arguments."""
    numbers = itertools.count()

    def start(script, arguments, code=None, world=1, folder=None):
        folder = folder or tmp_path / f"job{next(numbers)}"
        folder.mkdir(exist_ok=True)
        path = ROOT / f"{script}.py"
        return server.start([path, *arguments], code or plain(path), world, folder)

    return start


@pytest.fixture(scope="module")
def reference(server, tmp_path_factory):
    """{script: its run of trust.RUNS, left alone}; nobody writes there."""

    def run(script):
        folder, path = tmp_path_factory.mktemp(script), ROOT / f"{script}.py"
        return server.start([path, *RUNS[script]], plain(path), 1, folder).wait().ok()

    return two_at_once({script: lambda s=script: run(s) for script in RUNS})


# The script, bound by permissions even as root: without the capabilities to pass over them (1 and 2).
BOUND = """
import ctypes, importlib
script = importlib.import_module({script!r})
libc, head, sets = ctypes.CDLL(None), (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
assert libc.capget(head, sets) == 0
for i in (0, 1):
    sets[i] &= ~6
assert libc.capset(head, sets) == 0
script.main()
"""


# Many starts of one script in one process: [exit code, what it wrote to stderr, an exception's name] for each. A run
# that gets so far as to learn is ended there by the exception Began.
ATTEMPTS = """
import importlib, json, os, sys, common
script = importlib.import_module({script!r})
class Began(Exception):
    pass
def began(*a, **k):
    raise Began
script.heartbeat = began
name, found, err = sys.argv[0], [], os.dup(2)
for arguments in json.load(open("attempts.json")):
    sys.argv, code, crash = [name, *arguments], 0, None
    os.dup2(os.open("one.err", os.O_RDWR | os.O_CREAT | os.O_TRUNC), 2)
    try:
        script.main()
    except SystemExit as end:
        code = end.code or 0
    except BaseException as error:
        crash = type(error).__name__ + " " + str(error)[:100]
    sys.stderr.flush()
    made = sorted(f for f in os.listdir(".") if f not in ("attempts.json", "one.err", "pids") and not f.endswith(".0"))
    found.append([code, open("one.err", errors="replace").read(), crash, made])
os.dup2(err, 2)
json.dump(found, open("attempts.found", "w"))
"""


def attempts(go, script, lines, folder):
    """[(exit code, stderr, exception or None, what lies in the folder afterwards)] for each command line."""
    folder.mkdir(exist_ok=True)
    (folder / "attempts.json").write_text(json.dumps(lines))
    go(script, [], ATTEMPTS.format(script=script), folder=folder).wait(400).ok()
    return [tuple(f) for f in json.loads((folder / "attempts.found").read_text())]


def clean(script, code, err, *words, crash=None):
    """A clean end: exit code 2, one line by the script, with these words."""
    line = err.startswith(f"{script}.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return code == 2 and crash is None and line and all(w in err for w in words)


# Small photographs in a folder, for runs of a second.
SMALL = "--data photos --recipe digits --arch lenet5 --image-size 16 --resize 16 --workers 0 --out run --batch-size 8"
FEW = {
    "deepcluster": "--epochs 2 --k 4 --pca 8",
    "local_aggregation": "--epochs 2 --k 4 --warm-up 1 --background 10 --lr-steps 1",
    "coke": "--epochs 2 --k 4 --warm-up 1 --lr 0.05 --dual-lr 0.1",
    "lsdc": "--epochs 2 --k 4 --neighbours 2 --score-every 1 --pad 0 --crop-area 0.5 --lr 0.05 --lr-steps 1 "
    "--pretrain rotnet --pretrain-epochs 1 --pretrain-lr-steps --pretrain-batch-size 8",
}
FEW = {script: f"{SMALL} {flags}".split() for script, flags in FEW.items()}


# --------------------------------------------------------------------------- 1. wrong command lines

# Values that look senseless and are not. Each list is kept by hand: a flag that is not here must refuse them.
NONE = "workers max-bad pca halt-clustering initial-alignment warm-up cluster-every init-epochs ramp-up pad"
NONE += " freeze-stages"  # 0 of them: leave it out
STILL = "lr wd momentum dropout dual-lr consistency pretrain-lr pretrain-wd"  # weight 0: without it
SHARES = "ratio label-share predictor-share small-share first-stage bank-momentum sne-threshold"  # 0 % of it
ZERO = {f"--{name}" for name in f"{NONE} {STILL} {SHARES} seed cosine-threshold".split()}
MINUS = {"--seed", "--cosine-threshold"}  # any whole number seeds; cosines begin at -1
FOREVER = "epochs save-every halt-clustering reassign warm-up cluster-every init-epochs ramp-up score-every"
FOREVER += " lr-steps pretrain-lr-steps pretrain-epochs initial-alignment clusterings"  # never reached, or until stopped
ENOUGH = "seed max-bad workers pca pca-sample background noise label-size"  # cut to what there is
ENOUGH += " small-crops small-size"  # not used without --views multi
STRONG = "lr wd temperature dual-lr consistency sne-temperature label-temperature pretrain-lr pretrain-wd"
HUGE = {f"--{name}" for name in f"{FOREVER} {ENOUGH} {STRONG}".split()}  # the last: heartbeat sees the loss


def parser_of(script):
    """The parser that a script reads its command line with: the one with the most flags."""
    seen, real = [], common.Parser.parse_args

    def parse(self, *a, **k):
        seen.append(self)
        return real(self, *a, **k)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", parse)
        module_of(script).options(["--data", "digits"])
    return max(seen, key=lambda parser: len(parser._actions))


def wrong_lines(script, places):
    """[(what is appended to a good command line, a word that the error must have)], from the script's own flags."""
    lines = [(["--no-such-flag"], "--no-such-flag"), (["stray"], "stray"), (["--lr", "0.1", "-9"], "-9")]
    lines += [(["--seed=1", "--seed=x"], "--seed"), (["--", "--k"], "--k"), (["-z"], "-z"), ([""], "")]
    for action in parser_of(script)._actions:
        flag = action.option_strings[0]
        if flag == "-h":
            continue
        if action.nargs == 0 and not action.choices:  # switches
            lines += [([f"{name}=1"], name) for name in action.option_strings]
            lines += [([flag, "yes"], "yes")]
            continue
        many, whole = action.nargs in ("+", "*"), action.type is int
        size = action.nargs if isinstance(action.nargs, int) else 1
        fill = ["1"] * (size - 1)
        if action.nargs != "*":
            lines += [([flag], flag), ([flag, "--seed", "1"], flag)]
        if not many:
            lines += [([flag, *["1"] * size, "surplus"], "surplus")] * bool(action.type)
        if action.choices and not whole:
            lines += [
                ([flag, value], flag) for value in ("nonesuch", "", str(action.choices[0]).upper() + "x")
            ]
        if action.type:
            bad = ["word", "nan", "inf", "-inf", "", "1,5", "0x10", "1e400"] + ["2.5", "1e3", "1.0"] * whole
            named = {"-inf": "-inf" if action.nargs == "*" else flag}  # it looks like a flag of its own
            lines += [([flag, value, *fill], named.get(value, flag)) for value in bad]
            limits = [("-1", MINUS), ("0", ZERO), (str(10**30) if whole else "1e30", HUGE)]
            lines += [([flag, value, *fill], flag) for value, fine in limits if flag not in fine]
    lines += [(["--data", places["missing"]], "missing"), (["--data", places["file"]], "a_file")]
    lines += [
        (["--data", places["empty"]], "empty"),
        (["--data", places["bare"]], "bare"),
        (["--data", ""], "--data"),
    ]
    lines += [(["--out", places["below"]], "--out"), (["--out", ""], "--out"), (["--device", ""], "--device")]
    lines += [(["--device", d], "--device") for d in ("cuda", "cuda:99", "tpu", "cpu:x", "meta", "cuda:-3")]
    lines += [(["--image-size", "32", "--resize", "31"], "--resize"), (["--k", "100000"], "--k")]
    lines += [
        (["--batch-size", "100000"], "--batch-size"),
        (["--data", "mnist", "--root", places["missing"]], "mnist"),
    ]
    if script == "lsdc":
        lines += [
            (["--backbone", places[name]], "--backbone") for name in ("missing", "file", "empty", "bare")
        ]
        lines += [(["--data", places["missing"] + ".npz"], "--arch"), (["--backbone", ""], "--backbone")]
    return [line for line in lines if len(line[0]) > 0]


@pytest.fixture
def places(tmp_path):
    """Folders and files that hold no data: {name: path}."""
    (tmp_path / "a_file").write_text("no images here")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare/train").mkdir(parents=True)
    names = {"missing": "missing", "file": "a_file", "empty": "empty", "bare": "bare", "below": "a_file/run"}
    return {name: str(tmp_path / path) for name, path in names.items()}


@SCRIPTS
def test_wrong_command_lines(script, go, places, tmp_path, ledger):
    """Wrong command lines, a hundred drawn from all that the flags allow, or all: exit code 2, one line, no folder."""
    lines = wrong_lines(script, places)
    assert len(lines) > 300
    lines = lines if ledger.full else random.Random(1).sample(lines, 100)
    found = attempts(go, script, [[*RUNS[script], *line] for line, _ in lines], tmp_path / "work")
    tally, left = Tally(), set()
    for (line, word), (code, err, crash, made) in zip(lines, found, strict=True):
        new, left = set(made) - left, set(made)
        tally(clean(script, code, err, word, crash=crash) and not new, (line, code, err, crash, sorted(new)))
    tally.into(ledger, "wrong command lines: exit code 2, one line", script)


@SCRIPTS
def test_wrong_command_lines_on_two_processes(script, go, places, ledger):
    """Whether the parser, the data, the check or the run folder refuses: one line in all, both leave with 2."""
    lines = [["--lr", "nan"], ["--data", places["empty"]], ["--k", "5000"], ["--out", places["below"]]]
    lines += [["--batch-size", "33"], ["--device", "tpu"]]
    jobs = two_at_once(
        {line[0]: lambda a=line: go(script, [*RUNS[script], *a], world=2).wait() for line in lines}
    )
    tally = Tally()
    for flag, job in jobs.items():
        tally(job.codes == [2, 2] and clean(script, 2, job.err, flag[2:]), (flag, job.codes, job.err))
    tally.into(ledger, "wrong command lines on two processes: both exit with 2, one line in all", script)


# --------------------------------------------------------------------------- 2. damaged and foreign checkpoints


def same(a, b):
    """Equal in every tensor, number and word, types included."""
    if type(a) is not type(b):
        return False
    if torch.is_tensor(a):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def without_content(path):
    """Positions of the bytes of a zip file that are not a record's content: headers, padding, the directory."""
    data, content = path.read_bytes(), set()
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            name, extra = struct.unpack("<HH", data[info.header_offset + 26 : info.header_offset + 30])
            first = info.header_offset + 30 + name + extra
            content.update(range(first, first + info.compress_size))
    return [i for i in range(len(data)) if i not in content]


def loaded(folder, newest, before=None):
    """load_checkpoint of a folder with these bytes: (state or exit code, what it said)."""
    for name, data in (("checkpoint.pt", newest), ("checkpoint.prev.pt", before)):
        (folder / name).unlink(missing_ok=True)
        if data is not None:
            (folder / name).write_bytes(data)
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        try:
            state = common.load_checkpoint(folder)
        except SystemExit as end:
            state = end.code
    return state, said.getvalue()


@SCRIPTS
def test_damaged_checkpoints(script, reference, tmp_path, ledger):
    """Cut short, or with a bit flipped: the file is named and the one before taken, or nothing has changed."""
    run, rng, n = reference[script].run, random.Random(2), 200 if ledger.full else 15
    good, before = ((run / name).read_bytes() for name in ("checkpoint.pt", "checkpoint.prev.pt"))
    want, earlier = (torch.load(io.BytesIO(x), weights_only=True) for x in (good, before))
    path, cuts, flips = f"{tmp_path}/checkpoint.pt", Tally(), Tally()

    def named(data):
        state, said = loaded(tmp_path, data, before)
        if not (
            same(state, earlier) and said.count("\n") == 1 and path in said and "checkpoint.prev.pt" in said
        ):
            return False
        code, said = loaded(tmp_path, data)
        return code == 2 and said.count("\n") == 1 and path in said

    for length in [0, 1, len(good) - 1, *(rng.randrange(2, len(good) - 1) for _ in range(n - 3))]:
        cuts(named(good[:length]), f"cut to {length}")
    outside, harmless = without_content(run / "checkpoint.pt"), 0
    for i in range(n):  # half of them where no checksum looks
        place = rng.choice(outside) if i % 2 else rng.randrange(len(good))
        flipped = bytearray(good)
        flipped[place] ^= 1 << rng.randrange(8)
        if same(loaded(tmp_path, flipped, before)[0], want):
            harmless += 1
            flips(place in set(outside), f"bit in content byte {place} not found")
        else:
            flips(named(flipped), f"bit in byte {place}")
    cuts.into(ledger, "checkpoints cut short: named, the one before taken", script)
    note = f"{n - harmless} found, {harmless} without effect, outside of all content"
    flips.into(
        ledger, "checkpoints with a flipped bit: named, the one before taken, or no effect", script, note
    )


class Evil:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def zipped(records, method=zipfile.ZIP_STORED):
    """A zip file of (name, bytes), with right checksums."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in records:
            archive.writestr(name, data)
    return file.getvalue()


def tarred(records):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, data in records:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def saved(state, **more):
    file = io.BytesIO()
    torch.save(state, file, **more)
    return file.getvalue()


def foreign(trap, good):
    """{name: bytes} of files with a payload that makes the directory trap, in all that torch.load can read."""
    evil, path = {"config": {}, "meta": {}, "state_dict": Evil(trap)}, str(trap)
    raw, tail = pickle.dumps(evil, 2), [("a/version", b"3\n"), ("a/byteorder", b"little")]
    files = {f"raw pickle, protocol {p}": pickle.dumps(evil, p) for p in range(6)}
    files["torch's zip"] = saved(evil)
    files["torch's zip, payload as a key"] = saved({"config": {}, (Evil(trap),): 1})
    files["torch's old format"] = saved(evil, _use_new_zipfile_serialization=False)
    codes = {  # the same payload by other instructions of the pickle machine
        "INST": f"(S'{path}'\nios\nmkdir\n.",
        "OBJ": f"(cos\nmkdir\nS'{path}'\no.",
        "GLOBAL and REDUCE": f"cos\nmkdir\n(S'{path}'\ntR.",
        "eval": f"cbuiltins\neval\n(S\"__import__('os').mkdir('{path}')\"\ntR.",
        "getattr": f"cbuiltins\ngetattr\n(cos\npath\nS'os'\ntRcos\nmkdir\n(S'{path}'\ntR.",
        "under an allowed call": f"ccollections\nOrderedDict\n((cos\nmkdir\n(S'{path}'\ntRltR.",
        "as a state": f"ccollections\nOrderedDict\n)R}}S'x'\ncos\nmkdir\n(S'{path}'\ntRsb.",
    }
    files |= {
        f"torch's zip, {name}": zipped([("a/data.pkl", c.encode()), *tail]) for name, c in codes.items()
    }
    files["deflated zip"] = zipped([("a/data.pkl", raw), *tail], zipfile.ZIP_DEFLATED)
    with pytest.warns(UserWarning, match="Duplicate"):  # whichever is read, the first is the payload
        files["zip with two data.pkl"] = zipped([("a/data.pkl", raw), *tail, ("a/data.pkl", b"}.")])
    zero = pickle.dumps(0, 2)
    for place in ("storages", "tensors", "pickle"):
        parts = {
            "sys_info": zero,
            "storages": zero + pickle.dumps([], 2),
            "tensors": zero,
            "pickle": zero,
            place: raw,
        }
        files[f"torch's tar, {place}"] = tarred(parts.items())
    code = ("a/code/__torch__.py", b"class A(Module):\n  pass\n")
    files["TorchScript"] = zipped([("a/data.pkl", raw), ("a/constants.pkl", raw), code, *tail])
    files["pickle before a zip"] = raw + good
    # A whole checkpoint that carries something along which nobody reads: it is read as if it were not there.
    with zipfile.ZipFile(io.BytesIO(good)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    folder = records[0][0].split("/")[0]
    files["harmless: one more record"] = zipped([*records, (f"{folder}/data2.pkl", raw)])
    files["harmless: pickle behind"] = good + raw
    files["text"] = b"this is no checkpoint\n"
    return files


def let_in(data):
    """Unpickle, without any guard, all that a file holds: itself, one pickle after the other, or its records."""
    parts, file = [data], io.BytesIO(data)
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            parts += [archive.read(info) for info in archive.infolist()]
    elif tarfile.is_tarfile(io.BytesIO(data)):
        with tarfile.open(fileobj=io.BytesIO(data)) as archive:
            parts += [archive.extractfile(info).read() for info in archive]
    for part in map(io.BytesIO, parts):
        with contextlib.suppress(Exception):
            while True:
                pickle.load(part)


def test_payloads_work_where_they_are_let_in(tmp_path, ledger):
    """The payloads are real: unpickled without a guard, every file runs its own."""
    trap, tally = tmp_path / "trap", Tally()
    for name, data in foreign(trap, saved({"config": {}})).items():
        let_in(data)
        tally(trap.exists() != name.startswith(("text", "harmless: pickle behind")), name)
        shutil.rmtree(trap, ignore_errors=True)
    tally.into(ledger, "payloads work where they are let in", "all")


@SCRIPTS
def test_foreign_files(script, go, reference, tmp_path, ledger):
    """As checkpoint.pt, as checkpoint.prev.pt or both: nothing is executed, the file is named, a good one goes on."""
    trap, work, good = tmp_path / "trap", tmp_path / "work", reference[script].run / "checkpoint.prev.pt"
    files, lines, cases = foreign(trap, good.read_bytes()), [], []
    names = list(files) if ledger.full else random.Random(3).sample(list(files), 10)
    for name in names:
        for newest, before in ((name, None), (None, name), (name, "good")):
            out = work / f"run{len(lines)}"
            out.mkdir(parents=True)
            for place, what in (("checkpoint.pt", newest), ("checkpoint.prev.pt", before)):
                if what:
                    (out / place).write_bytes(good.read_bytes() if what == "good" else files[what])
            lines.append([*RUNS[script], "--out", out.name])
            cases.append((name, before, f"{out.name}/{'checkpoint.pt' if newest else 'checkpoint.prev.pt'}"))
    if script == "lsdc":
        for name in names:
            (tmp_path / "b").mkdir(exist_ok=True)
            (tmp_path / f"b/{len(lines)}.pt").write_bytes(files[name])
            lines.append([*RUNS[script], "--out", "new", "--backbone", f"../b/{len(lines)}.pt"])
            cases.append((name, None, f"b/{len(lines) - 1}.pt"))
            (tmp_path / f"b/{len(lines)}.npz").write_bytes(files[name])
            data = [
                *RUNS[script],
                "--arch",
                "mlp",
                "--pretrain",
                "none",
                "--mix",
                "none",
                "--neighbours",
                "2",
            ]
            lines.append([*data, "--out", "new", "--data", f"../b/{len(lines)}.npz"])
            cases.append((name, None, f"b/{len(lines) - 1}.npz"))
    found, tally = attempts(go, script, lines, work), Tally()
    for (name, before, path), (code, err, crash, _) in zip(cases, found, strict=True):
        held, damaged = (
            clean(script, code, err, path, crash=crash),
            (work / path).with_name("checkpoint.damaged.pt"),
        )
        if before == "good" or (name.startswith("harmless") and path.startswith("run")):
            held = (code, err, crash) == (0, "", None) and damaged.exists() != name.startswith("harmless")
        tally(held, (name, path, code, err, crash))
    tally(not trap.exists(), "the payload ran")
    tally.into(ledger, "foreign files, with payloads: named, not executed", script)


@SCRIPTS
def test_runs_that_do_not_fit(script, go, reference, tmp_path, ledger):
    """Another method's, size's or network's checkpoint, or one whose state lacks something: refused, by name."""
    run, work, tally = reference[script].run, tmp_path / "work", Tally()
    state = torch.load(run / "checkpoint.prev.pt", weights_only=True)  # all is done but the end
    method = [k for k in state if k not in ("script", "config", "processes", "log_bytes", "minutes")]
    cases = []  # (what, checkpoint, more flags, words of the error; no words: it goes on)

    def case(what, checkpoint, flags, *words):
        cases.append((what, checkpoint, flags, words))

    for other in RUNS:
        if other != script:
            case(
                other,
                reference[other].run / "checkpoint.pt",
                [],
                "another run",
                f"of {other}.py",
                "--overwrite",
            )
    ks = ("[10, 20] -> [10, 21]", ["10", "21"]) if script == "coke" else ("10 -> 9", ["9"])
    ks = ("20 -> 19", ["19"]) if script in ("deepcluster", "local_aggregation") else ks
    case("k", run / "checkpoint.pt", ["--k", *ks[1]], f"k {ks[0]}")
    case("arch", run / "checkpoint.pt", ["--arch", "alexnet-small"], "arch lenet5 -> alexnet-small")
    case("seed", run / "checkpoint.pt", ["--seed", "7"], "seed 0 -> 7")
    case("batch size", run / "checkpoint.pt", ["--batch-size", "100"], "batch_size 128 -> 100")
    case("empty", b"", [], "checkpoint.pt", "damaged")
    case("a list", [1, 2], [], "checkpoint.pt")
    for key in method:
        if key == "trunk":  # for readers of the file alone: a run goes by its command line
            continue
        case(
            f"without {key}", {k: v for k, v in state.items() if k != key}, [], "does not fit", "--overwrite"
        )
    for key in ("net", "body", "head", "optimizer", "memory", "bank", "assign_all", "clusterings"):
        if isinstance(state.get(key), dict):
            case(f"{key} empty", {**state, key: {}}, [], "does not fit")
            case(f"{key} a word", {**state, key: "x"}, [], "does not fit")
            shorter = {k: v[..., :-1] if torch.is_tensor(v) and v.ndim else v for k, v in state[key].items()}
            if not same(shorter, state[key]):
                case(f"{key} shorter", {**state, key: shorter}, [], "does not fit")
        elif torch.is_tensor(state.get(key)):
            case(f"{key} shorter", {**state, key: state[key][..., :-1]}, [], "does not fit")
    for key, value in (("config", [1]), ("log_bytes", "x"), ("minutes", "x")):
        case(f"{key} {value}", {**state, key: value}, [], "checkpoint.pt")
    case("without log_bytes", {k: v for k, v in state.items() if k != "log_bytes"}, [], "checkpoint.pt")
    lines = []
    for i, (_, checkpoint, flags, _) in enumerate(cases):
        out = work / f"run{i}"
        out.mkdir(parents=True)
        shutil.copy(run / "log.jsonl", out)
        if isinstance(checkpoint, bytes):
            (out / "checkpoint.pt").write_bytes(checkpoint)
        elif hasattr(checkpoint, "exists"):
            shutil.copy(checkpoint, out / "checkpoint.pt")
        else:
            torch.save(checkpoint, out / "checkpoint.pt")
        lines.append([*RUNS[script], *flags, "--out", out.name])
    for (what, *_, words), (code, err, crash, _) in zip(
        cases, attempts(go, script, lines, work), strict=True
    ):
        tally(clean(script, code, err, *words, crash=crash), (what, code, err, crash))
    tally.into(ledger, "checkpoints that do not fit: exit code 2, one line", script)


@SCRIPTS
def test_other_images(script, go, tmp_path, ledger):
    """Images added to a folder, renamed in it or taken away between two starts: refused, the change named."""
    write_images(tmp_path / "work/photos", 24, size=16)
    (tmp_path / "work/photos/bystander.txt").write_text("no image")
    job = go(script, FEW[script], folder=tmp_path / "work").wait().ok()
    photos, before, tally = tmp_path / "work/photos", contents(job.run), Tally()
    changes = {
        "images 24 -> 25": lambda: shutil.copy(photos / "003.png", photos / "024.png"),
        "file names": lambda: (
            (photos / "024.png").unlink() or (photos / "003.png").rename(photos / "0035.png")
        ),
        "images 24 -> 23": lambda: (photos / "007.png").unlink(),
    }
    for words, change in changes.items():
        change()
        again = go(script, FEW[script], folder=tmp_path / "work").wait()
        held = clean(script, again.code, again.err, words, "another run", "--overwrite")
        tally(held and contents(job.run) == before, (words, again.code, again.err))
    tally.into(ledger, "images added, renamed or taken away between two starts: refused", script)


# --------------------------------------------------------------------------- 3. two runs on one folder

# The script, stopped at its n-th step: whoever comes meets a run that is under way.
STOPPED = """
import importlib, os, signal, sys, common
script = importlib.import_module({script!r})
real, calls = script.heartbeat, 0
def heartbeat(*a, **k):
    global calls
    calls += 1
    if calls == {n}:
        open(f"stopped.{{common.rank()}}", "w").close()
        os.kill(os.getpid(), signal.SIGSTOP)
    return real(*a, **k)
script.heartbeat = heartbeat
script.main()
"""


def results(run):
    """What a run found: its assignments, its weights and its log without times."""
    weights = torch.load(run / "backbone.pt", weights_only=True)["state_dict"]
    return (run / "assignments.csv").read_bytes(), weights, without_times(read_log(run / "log.jsonl"))


@SCRIPTS
def test_two_runs_on_one_folder(script, go, reference, ledger):
    """The second is refused, with --overwrite, too; the first ends as if alone; when it is killed, the next goes on."""
    ordinarily(ledger, script, "coke")
    want, tally = results(reference[script].run), Tally()
    moments = [1, 5, 14, 20, 30] if ledger.full else [14]

    def signal_all(job, number):
        for pid in job.pids():
            os.kill(pid, number)

    def stopped(n):
        job = go(script, RUNS[script], STOPPED.format(script=script, n=n))
        wait_for((job.folder / "stopped.0").exists, 60)
        return job, [*RUNS[script], "--out", job.run]

    def refused(job, line, world=1):
        before = contents(job.run)
        other = go(script, line, world=world).wait()
        held = other.codes == [2] * world and clean(script, 2, other.err, "another run", str(job.run))
        tally(held and contents(job.run) == before, (line[-1], other.codes, other.err))

    for n in moments:
        job, line = stopped(n)
        refused(job, line)
        refused(job, [*line, "--overwrite"])
        refused(job, line, world=2)
        signal_all(job, signal.SIGCONT)
        job.wait()
        tally(job.code == 0 and same(results(job.run), want), ("the first", job.code, job.err))
        job, line = stopped(n)
        signal_all(job, signal.SIGKILL)
        job.wait()
        other = go(script, line).wait()
        tally(other.code == 0 and same(results(job.run), want), ("after a kill", other.code, other.err))
    tally.into(
        ledger, "two runs on one folder: the second refused, the first unharmed, free after kill -9", script
    )


# --------------------------------------------------------------------------- 4. disks

# The script in a process whose files may not grow beyond LIMIT bytes from the SAVES-th checkpoint on, or from the
# start; what it prints goes through pipes.
FULL_DISK = """
import importlib, os, resource, sys, common
script = importlib.import_module({script!r})
pipes = [os.pipe(), os.pipe()]
if os.fork():
    for _, w in pipes:
        os.close(w)
    for (r, _), own in zip(pipes, (1, 2)):
        with os.fdopen(r, "rb") as file:
            os.write(own, file.read())
    os._exit(os.waitstatus_to_exitcode(os.wait()[1]))
for (_, w), own in zip(pipes, (1, 2)):
    os.dup2(w, own)
def fill():
    resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
real, calls = common.Run.save, 0
def save(self, state):
    global calls
    real(self, state)
    calls += 1
    if calls == {saves}:
        fill()
common.Run.save = save
code = 70
try:
    fill() if {saves} == 0 else None
    script.main()
except SystemExit as end:
    code = end.code or 0
except BaseException:
    import traceback
    traceback.print_exc()
sys.stdout.flush(); sys.stderr.flush()
os._exit(code)
"""


@SCRIPTS
def test_full_disks(script, go, reference, tmp_path, ledger):
    """The run goes on, says what it could not save and ends with 1; what was there stays readable and goes on later."""
    ordinarily(ledger, script, "local_aggregation")
    want, tally = results(reference[script].run), Tally()
    states = {"nothing fits": (0, 0), "full after one checkpoint": (20_000, 1)}
    states |= (
        {"logs fit": (20_000, 0), "nothing fits after two": (0, 2), "half a checkpoint fits": (60_000, 1)}
        if ledger.full
        else {}
    )
    work = {}
    for name, (limit, saves) in states.items():
        code = FULL_DISK.format(script=script, limit=limit, saves=saves)
        work[name] = lambda code=code: go(script, RUNS[script], code).wait()
    for name, job in two_at_once(work).items():
        limit, saves = states[name]
        epochs_said = sum(line.startswith("epoch ") for line in job.out.splitlines())
        said = [job.code == 1, "could not save run/checkpoint.pt" in job.err, "Traceback" not in job.err]
        said.append(epochs_said == len(want[2]))
        if limit:
            said.append(without_times(read_log(job.run / "log.jsonl")) == want[2])
        state = common.load_checkpoint(job.run)
        said.append((state is None) == (saves == 0))
        said.append(not list(job.run.glob("*.tmp")))
        again = go(script, RUNS[script], folder=job.folder).wait()
        said += [again.code == 0, again.code == 0 and same(results(job.run), want)]
        tally(all(said), (name, said, job.code, job.err[-150:], again.err[-150:]))
    tally.into(ledger, "full disks: training goes on, exit code 1, a later start with room goes on", script)


@SCRIPTS
def test_folders_that_cannot_be_written(script, go, tmp_path, ledger):
    """Read-only, below a file, in a folder that may not be entered, a device: a clean end that names it."""
    tally = Tally()
    folder = tmp_path / "work"
    (folder / "theirs").mkdir(parents=True)
    (folder / "theirs/log.jsonl").write_text("theirs\n")
    (folder / "closed").mkdir()
    (folder / "file").write_text("a file")
    (folder / "link").symlink_to("nowhere/at/all")
    (folder / "closed").chmod(0)
    (folder / "theirs").chmod(0o555)
    code = BOUND.format(script=script)
    outs = [
        "file",
        "file/run",
        "link",
        "/proc/run",
        "/dev/null",
        "x" * 300,
        "theirs",
        "theirs/run",
        "closed/run",
    ]
    for out in outs:
        job = go(script, [*RUNS[script], "--out", out], code, folder=folder).wait()
        tally(clean(script, job.code, job.err, "--out", out), (out[:20], job.code, job.err, job.out[-100:]))
    tally((folder / "theirs/log.jsonl").read_text() == "theirs\n", "theirs was changed")
    tally.into(ledger, "folders that cannot be written: exit code 2, one line", script)


# --------------------------------------------------------------------------- 5. odd images


def chunk(kind, data):
    """A chunk of a PNG file with its right checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png(side):
    """A 1-bit PNG of side x side pixels in a few kilobytes."""
    rows = zlib.compress(bytes((side // 8 + 1) * side), 9)
    head = chunk(b"IHDR", struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def odd_corpus(folder):
    """42 odd things and 40 good files: (names of the files to find, names of those that cannot be read)."""
    noise = np.random.default_rng(0)
    write_images(folder, 40)
    photo = Image.fromarray(noise.integers(0, 256, (40, 50, 3), dtype=np.uint8))
    grey = np.linspace(0, 65535, 1600).reshape(40, 40)

    def encoded(image, kind, **more):
        file = io.BytesIO()
        image.save(file, kind, **more)
        return file.getvalue()

    jpeg, png = encoded(photo, "JPEG"), encoded(photo, "PNG")
    floats = (grey / 65535).astype(np.float32)
    holes = np.where(np.arange(1600).reshape(40, 40) % 7 == 0, np.nan, floats)
    turned = Image.Exif()
    turned[0x0112] = 6  # orientation: a quarter turn
    frames = [Image.new("P", (20, 20), i) for i in range(3)]
    bad = {
        "zero.jpg": b"",
        "forbidden.png": png,
        "text.jpg": b"this is not an image\n" * 20,
        "cut10.jpg": jpeg[:10],
        "cut half.jpg": jpeg[: len(jpeg) // 2],
        "cut_end.jpg": jpeg[:-200],
        "cut10.png": png[:10],
        "cut half.png": png[: len(png) // 2],
        "checksum.png": png[:29] + bytes([png[29] ^ 1]) + png[30:],  # of the header
        "huge.png": huge_png(20_000),
        'it\'s \n "bad".png': png[:50],
        b"bad\xff\xfe.jpg".decode(errors="surrogateescape"): jpeg[:300],
    }
    good = {
        "cmyk.jpg": encoded(photo.convert("CMYK"), "JPEG"),
        "grey16.png": encoded(Image.fromarray(grey.astype(np.uint16)), "PNG"),
        "grey16.tif": encoded(Image.fromarray(grey.astype(np.uint16)), "TIFF"),
        "float.tif": encoded(Image.fromarray(floats), "TIFF"),
        "float_nan.tiff": encoded(Image.fromarray(holes.astype(np.float32)), "TIFF"),
        "palette.png": encoded(photo.quantize(16), "PNG", transparency=3),
        "one_bit.png": encoded(photo.convert("1"), "PNG"),
        "la.png": encoded(Image.new("LA", (20, 20), (90, 40)), "PNG"),
        "rgba.png": encoded(Image.new("RGBA", (9, 7), (10, 200, 30, 0)), "PNG"),
        "1x1.png": encoded(Image.new("RGB", (1, 1), (200, 10, 10)), "PNG"),
        "1x400.png": encoded(Image.new("RGB", (1, 400)), "PNG"),
        "400x1.png": encoded(Image.new("RGB", (400, 1)), "PNG"),
        "frames.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "photo.webp": encoded(photo, "WEBP"),
        "photo.bmp": encoded(photo, "BMP"),
        "photo.ppm": encoded(photo, "PPM"),
        "turned.jpg": encoded(photo, "JPEG", exif=turned),
        "UPPER.JPG": jpeg,
        "ñ_图像 space.png": png,
        'it\'s \n "good".png': png,
        b"good\xff\xfe.jpg".decode(errors="surrogateescape"): jpeg,
    }
    for name, data in {**bad, **good}.items():
        (folder / name).write_bytes(data)
    (folder / "dangling.jpg").symlink_to("gone.jpg")
    (folder / "loop.jpg").symlink_to("loop.jpg")
    (folder / "linked.jpg").symlink_to("UPPER.JPG")
    (folder / "up").symlink_to("..")
    (folder / "up.jpg").symlink_to("..")
    (folder / ".hidden.jpg").write_bytes(jpeg)
    (folder / "._apple.jpg").write_bytes(b"resource fork")
    (folder / "folder.jpg").mkdir()
    (folder / "folder.jpg/inside.png").write_bytes(png)
    (folder / "Thumbs.db").write_bytes(b"no image")
    unreadable = ["dangling.jpg", "loop.jpg", *bad]
    (folder / "forbidden.png").chmod(0)
    names = [*(f"{i:03}.png" for i in range(40)), *good, *unreadable, "linked.jpg", "folder.jpg/inside.png"]
    return names, unreadable


@SCRIPTS
def test_odd_images(script, go, tmp_path, ledger):
    """The run completes, names each bad file once, clusters every file; with one less in --max-bad it ends cleanly."""
    names, bad = odd_corpus(tmp_path / "photos")
    code, tally, work = BOUND.format(script=script), Tally(), {}
    for workers in ("0", "1", "2") if ledger.full else ("1",):
        for most in (len(bad), len(bad) - 1):
            folder = tmp_path / f"job-{workers}-{most}"
            folder.mkdir()
            (folder / "photos").symlink_to("../photos")
            line = [*FEW[script], "--workers", workers, "--max-bad", most]
            work[workers, most] = lambda f=folder, a=line: go(script, a, code, folder=f).wait()
    for (workers, most), job in two_at_once(work).items():
        where = f"{workers} workers, --max-bad {most}"
        said = [line.split(" (")[0] for line in job.out.splitlines() if line.startswith("unreadable image ")]
        if most < len(bad):
            tally(
                clean(script, job.code, job.err, f"{len(bad)} image files", "--max-bad"),
                (where, job.code, job.err),
            )
            continue
        tally(job.code == 0 and job.err == "", (where, job.code, job.err))
        for name in bad:
            tally(said.count(f"unreadable image {'photos/' + name!r}") == 1, (where, name, job.err[-200:]))
        tally(len(said) == len(bad), (where, len(said), "lines"))
        if job.code == 0:
            with open(job.run / "assignments.csv", newline="", errors="surrogateescape") as file:
                found = [row[0] for row in csv.reader(file)][1:]
            tally(sorted(found) == sorted("photos/" + name for name in names), (where, "assignments"))
    note = f"{len(bad)} of {len(names)} files unreadable"
    tally.into(ledger, "odd images: the run completes, each bad file named once", script, note)


# --------------------------------------------------------------------------- 6. strange data


def photos_of(n, make=None):
    return lambda folder: write_images(folder, n, make)


def classes_of(n, classes):
    def write(folder):
        for c in range(classes):
            write_images(folder / f"class{c:02}", n)

    return write


def labels_in_train_alone(folder):
    classes_of(8, 4)(folder / "train")
    write_images(folder / "val", 9)


def an_empty_class(folder):
    classes_of(8, 3)(folder)
    (folder / "class99").mkdir()


RUNS_ON = ""  # it completes, all numbers finite
STRANGE = {  # name: (data, more flags, processes, words of the refusal for {script: ..} or for all)
    "all images equal": (photos_of(24, lambda i: np.full((32, 32, 3), 99, np.uint8)), "", 1, RUNS_ON),
    "one black image": (photos_of(24, lambda i: np.zeros((32, 32, 3), np.uint8)), "", 1, RUNS_ON),
    "black on two processes": (photos_of(24, lambda i: np.zeros((32, 32, 3), np.uint8)), "", 2, RUNS_ON),
    "one image": (photos_of(1), "", 1, "1 images"),
    "one image, batch 1": (
        photos_of(1),
        "--k 1 --batch-size 1",
        1,
        {
            "deepcluster": RUNS_ON,
            "local_aggregation": "at least 2",
            "coke": "at least 2",
            "lsdc": "--batch-size",
        },
    ),
    "two images, two processes": (photos_of(2), "--k 2 --batch-size 2", 2, RUNS_ON),
    "fewer images than a batch": (photos_of(7), "", 1, "--batch-size 8 is more than the 7 images"),
    "fewer images than clusters": (photos_of(20), "--k 21", 1, "--k 21"),
    "fewer images than processes": (photos_of(1), "--k 1 --batch-size 2", 2, "1 images"),
    "a prime number": (photos_of(23), "--batch-size 7", 1, RUNS_ON),
    "a prime number, two processes": (photos_of(23), "--batch-size 6", 2, RUNS_ON),
    "batch and processes do not fit": (photos_of(23), "--batch-size 7", 2, "no multiple of the 2 processes"),
    "as many clusters as images": (photos_of(20), "--k 20", 1, RUNS_ON),
    "one cluster": (photos_of(20), "--k 1", 1, RUNS_ON),
    "single-image classes": (classes_of(1, 24), "", 1, RUNS_ON),
    "one class": (classes_of(24, 1), "", 1, RUNS_ON),
    "an empty class": (an_empty_class, "", 1, RUNS_ON),
    "no labels": (photos_of(24), "", 1, RUNS_ON),
    "labels in train alone": (labels_in_train_alone, "", 1, RUNS_ON),
}


def finite(run):
    """Every number in the log, in the weights and in the checkpoint is finite; null stands for what cannot be known."""

    def bad(value, key=""):
        if isinstance(value, dict):
            return [b for k, v in value.items() for b in bad(v, k)]
        if isinstance(value, list):
            return [b for v in value for b in bad(v, key)]
        if torch.is_tensor(value):
            return [] if value.isfinite().all() else [key]
        return [key] if value is None or (isinstance(value, float) and not math.isfinite(value)) else []

    first, *records = read_log(run / "log.jsonl")
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    unknown = {
        "nmi_previous",
        "purity",
        "untrained",
        "nmi_labels_untrained",
    }  # the first epoch's; without labels
    odd = [key for key in bad(records) if key not in unknown]
    return odd + bad(
        {k: v for k, v in state.items() if torch.is_tensor(v) or k in ("net", "body", "head", "memory")}
    )


@SCRIPTS
def test_strange_data(script, go, tmp_path, ledger):
    """Each either completes with finite numbers or is refused as the table says, on every process."""
    work, tally = {}, Tally()
    every = slice(None) if ledger.full else slice(list(RUNS).index(script) % 2, None, 2)
    for name, (write, flags, world, _) in list(STRANGE.items())[every]:
        folder = tmp_path / name.replace(" ", "-")
        write(folder / "photos")
        line = [*FEW[script], *flags.split()]
        if script == "lsdc" and "--batch-size" in flags:
            size = flags.split()[flags.split().index("--batch-size") + 1]
            line += ["--pretrain-batch-size", size, "--neighbours", "1"]
        work[name] = lambda a=line, w=world, f=folder: go(script, a, world=w, folder=f).wait()
    for name, job in two_at_once(work).items():
        _, _, world, words = STRANGE[name]
        words = words[script] if isinstance(words, dict) else words
        if words:
            held = job.codes == [2] * world and clean(script, 2, job.err, words)
            tally(held, (name, job.codes, job.err[-200:]))
        else:
            held = job.codes == [0] * world and job.err == ""
            odd = finite(job.run) if held else None
            tally(held and not odd, (name, job.codes, odd, job.err[-200:]))
    tally.into(ledger, "strange data: finite numbers, or exit code 2 and one line", script)


NAN = """
import importlib, torch, common
script = importlib.import_module({script!r})
extract, heartbeat = script.extract, script.heartbeat
def spoilt_extract(*a, **k):
    x = extract(*a, **k)
    if {where!r} == "features" and common.rank() == 1:
        x[0] = float({value!r})
    return x
def spoilt_heartbeat(loss, *more):
    bad = {where!r} == "loss" and common.rank() == 1
    return heartbeat(loss * float({value!r}) if bad else loss, *more)
script.extract, script.heartbeat = spoilt_extract, spoilt_heartbeat
script.main()
"""


@SCRIPTS
def test_nan_on_one_process(script, go, tmp_path, ledger):
    """NaN or infinity in the features, or in the loss, of one of two processes: both end with 1, one line in all."""
    work, tally = {}, Tally()
    for where, value in itertools.product(("features", "loss"), ("nan", "inf")):
        folder = tmp_path / f"{where}-{value}"
        classes_of(8, 4)(folder / "photos")
        code = NAN.format(script=script, where=where, value=value)
        work[where, value] = lambda c=code, f=folder: go(script, FEW[script], c, 2, f).wait(60)
    for name, job in two_at_once(work).items():
        one = job.err.startswith(f"{script}.py: error: ") and job.err.count("\n") == 1
        tally(job.codes == [1, 1] and one, (name, job.codes, job.err[-300:]))
    tally.into(ledger, "NaN on one of two processes: both end with 1, one line in all", script)


# --------------------------------------------------------------------------- 7. leaks

# The script; at the end of every epoch: phase, open files, child processes, threads, bytes of all tensors, resident
# memory. A tensor that is kept shows exactly in the fifth, whatever the allocator does; all else in the last.
COUNTED = """
import gc, importlib, json, os, time, torch, common
script = importlib.import_module({script!r})
found, kept, real = [], [], common.Run.log
def processes_and_threads():
    tasks, children = os.listdir("/proc/self/task"), 0
    for task in tasks:
        try:
            children += len(open(f"/proc/self/task/{{task}}/children").read().split())
        except FileNotFoundError:
            pass
    return children, len(tasks)
def log(self, record):
    real(self, record)
    {leak}
    if "loss" in record:
        gc.collect()
        several = [processes_and_threads() for _ in range(10) if not time.sleep(0.01)]  # some are just leaving
        tensors = [o for o in gc.get_objects() if type(o) in (torch.Tensor, torch.nn.Parameter)]
        size = sum({{o.untyped_storage().data_ptr(): o.untyped_storage().nbytes() for o in tensors}}.values())
        resident = int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        found.append([record.get("phase"), len(os.listdir("/proc/self/fd")), *min(several), size, resident])
common.Run.log = log
gc.collect()
gc.freeze()  # what was there before need not be looked through
try:
    script.main()
finally:
    json.dump(found, open("counted", "w"))
"""


@SCRIPTS
def test_nothing_leaks(script, go, tmp_path, ledger):
    """From the second epoch of the last phase on: files, threads, processes and tensors constant, memory nearly so."""
    write_images(tmp_path / "photos", 60)
    short, long = (6, 18) if script == "coke" else (5, 15)
    work, tally, most = {}, Tally(), 0
    for epochs in (short, long) if ledger.full else (short,):
        photos = [*FEW[script], "--workers", "1", "--data", tmp_path / "photos"]
        for name, flags in (("folder", photos), ("memory", RUNS[script]))[: 1 + ledger.full]:
            line = [*flags, "--epochs", epochs]
            work[name, epochs] = lambda a=line: go(
                script, a, COUNTED.format(script=script, leak="pass")
            ).wait()
    for name, job in two_at_once(work).items():
        tally(job.code == 0, (name, job.err))
        rows = json.loads((job.folder / "counted").read_text())
        rows = [row[1:] for row in rows if row[0] == rows[-1][0]][1:]
        tally(len(rows) >= 2, (name, "epochs", len(rows)))
        for i, what in enumerate(("open files", "processes", "threads", "tensors")):
            values = [row[i] for row in rows]
            tally(len(set(values)) == 1, (name, what, values))
        resident = [row[4] for row in rows]
        growth = resident[-1] - resident[0]
        most = max(most, growth)
        tally(growth < 4 * 2**20, (name, "memory", [r // 1024 for r in resident]))
    tally.into(
        ledger,
        "open files, threads, tensors and memory over the epochs",
        script,
        f"at most {most // 1024} kB more",
    )


# --------------------------------------------------------------------------- 8. the same again


@SCRIPTS
def test_the_same_again(script, go, tmp_path, ledger):
    """With the same seed, and with 0, 1 or 3 loader workers, every bit is the same; with another seed none need be."""
    ordinarily(ledger, script, "deepcluster", "lsdc")
    write_images(tmp_path / "photos", 60)
    photos, tally = [*FEW[script], "--data", tmp_path / "photos"], Tally()
    work = {}
    for seed in ("0", "1", "7", "-5") if ledger.full else ("0", "1"):
        for workers in ("0", "0 ", "1", "3") if ledger.full or seed == "0" else ("1",):
            line = [*photos, "--seed", seed, "--workers", workers.strip()]
            work["photos", seed, workers] = lambda a=line: go(script, a).wait().ok()
        if ledger.full:
            for again in ("", "again"):
                line = [*RUNS[script], "--seed", seed]
                work["digits", seed, again] = lambda a=line: go(script, a).wait().ok()
    first = {}
    for (data, seed, how), job in two_at_once(work).items():
        found = results(job.run)
        if (data, seed) not in first:
            other = [weights for (d, _), (_, weights, _) in first.items() if d == data]
            tally(not any(same(found[1], weights) for weights in other), (data, seed, "as with another seed"))
        first.setdefault((data, seed), found)
        tally(same(found, first[data, seed]), (data, seed, how))
    tally.into(ledger, "same seed, 0, 1 or 3 loader workers: the same in every bit", script)
