"""common.py, run folder: nothing is lost, nothing damaged is believed, nothing foreign is executed."""

import argparse
import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import Run, load_checkpoint, load_file, save_file


def state(n):
    """A checkpoint that can be recognised whole."""
    return {
        "config": {"k": 3},
        "minutes": 0,
        "log_bytes": 0,
        "epoch": n,
        "w": torch.full((500,), float(n)),
        "l": [n, {"a": n}],
    }


def assert_is(got, n):
    assert (
        got["epoch"] == n
        and torch.equal(got["w"], torch.full((500,), float(n)))
        and got["l"] == [n, {"a": n}]
    )


def arguments(out, **more):
    return argparse.Namespace(
        **{"out": str(out), "overwrite": False, "k": 3, "lr": 0.1, "workers": 2, **more}
    )


def exits(capsys, call, *words):
    """call() must end with exit code 2 and one line with these words."""
    with pytest.raises(SystemExit) as end:
        call()
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1, err
    assert all(w in err for w in words), err


# --------------------------------------------------------------------------- files


def test_save_and_load_keep_everything(tmp_path):
    """Tensors of all kinds, numbers, strings, lists and dictionaries come back equal; the one before is kept."""
    rich = {
        "f": torch.randn(3, 4),
        "i": torch.arange(5),
        "b": torch.tensor([True]),
        "s": "ñ",
        "x": [1, 2.5, None],
    }
    assert save_file(tmp_path / "c.pt", rich) is True
    got = load_file(tmp_path / "c.pt")
    assert all(torch.equal(got[k], rich[k]) and got[k].dtype == rich[k].dtype for k in "fib")
    assert got["s"] == "ñ" and got["x"] == [1, 2.5, None]
    for n in range(3):
        save_file(tmp_path / "c.pt", state(n), keep="before.pt")
    assert_is(load_file(tmp_path / "c.pt"), 2)
    assert_is(load_file(tmp_path / "before.pt"), 1)
    assert sorted(os.listdir(tmp_path)) == ["before.pt", "c.pt"]
    with pytest.raises(FileNotFoundError):
        load_file(tmp_path / "none.pt")


def test_flipped_bits_and_truncations_are_found(tmp_path):
    """60 cut files: ValueError each. 60 flipped bits: ValueError, or (outside the contents) nothing changed."""
    good, path = tmp_path / "good.pt", tmp_path / "bad.pt"
    save_file(
        good, {"w": torch.randn(4000, generator=torch.Generator().manual_seed(0)), "n": list(range(50))}
    )
    data, want = good.read_bytes(), load_file(good)
    rng = np.random.default_rng(0)
    for length in [0, 1, len(data) - 1, *rng.integers(2, len(data) - 1, 57).tolist()]:
        path.write_bytes(data[:length])
        with pytest.raises(ValueError):
            load_file(path)
    found = 0
    for bit in rng.choice(8 * len(data), 60, replace=False).tolist():
        broken = bytearray(data)
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            got = load_file(path)
        except ValueError as error:
            found += str(path) in str(error)
        else:
            assert torch.equal(got["w"], want["w"]) and got["n"] == want["n"], f"bit {bit} became data"
    assert found >= 50


class Evil:
    """Unpickling this makes a directory."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


def test_foreign_code_is_not_executed(tmp_path):
    """A pickle with a payload, raw, in torch's zip or in its old format: ValueError, and nothing happens."""
    path = tmp_path / "evil.pt"
    pickle.loads(pickle.dumps(Evil(tmp_path / "control")))
    assert (tmp_path / "control").is_dir(), "the payload must work where it is let in"
    trap = tmp_path / "trap"
    for write in (
        lambda: torch.save({"config": {}, "x": Evil(trap)}, path),
        lambda: torch.save({"config": {}, "x": Evil(trap)}, path, _use_new_zipfile_serialization=False),
        lambda: path.write_bytes(pickle.dumps(Evil(trap))),
        lambda: path.write_text("plain text"),
    ):
        write()
        with pytest.raises(ValueError):
            load_file(path)
        with pytest.raises(ValueError):
            common.load_backbone(path)
        assert not trap.exists()


# --------------------------------------------------------------------------- checkpoints


def two_checkpoints(folder):
    for n in (1, 2):
        save_file(folder / "checkpoint.pt", state(n), keep="checkpoint.prev.pt")


def damage(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_damaged_checkpoint_falls_back(tmp_path, capsys):
    """The one before takes over and both are named; only damaged ones: exit code 2; none: None."""
    assert load_checkpoint(tmp_path) is None
    two_checkpoints(tmp_path)
    assert_is(load_checkpoint(tmp_path), 2)
    assert capsys.readouterr().out == ""
    (tmp_path / "checkpoint.pt.tmp").write_bytes(b"half a file")  # of a killed writer
    assert_is(load_checkpoint(tmp_path), 2)
    save_file(tmp_path / "checkpoint.pt", state(3), keep="checkpoint.prev.pt")
    assert not (tmp_path / "checkpoint.pt.tmp").exists()
    damage(tmp_path / "checkpoint.pt")
    assert_is(load_checkpoint(tmp_path), 2)
    out = capsys.readouterr().out
    assert "checkpoint.pt is damaged" in out and "checkpoint.prev.pt" in out and len(out.splitlines()) == 1
    (tmp_path / "checkpoint.pt").unlink(missing_ok=True)
    assert_is(load_checkpoint(tmp_path), 2)
    torch.save([1, 2], tmp_path / "checkpoint.pt")
    assert_is(load_checkpoint(tmp_path), 2)
    capsys.readouterr()
    (tmp_path / "checkpoint.pt").write_bytes(b"")
    damage(tmp_path / "checkpoint.prev.pt")
    exits(capsys, lambda: load_checkpoint(tmp_path), "damaged", "--overwrite")


class Killed(BaseException):
    pass


@pytest.mark.parametrize("before", ["two good", "first", "newest damaged", "leftovers"])
def test_killed_at_any_step_of_saving(before, tmp_path, monkeypatch):
    """Stopped before its n-th call to the system, for every n: the last good or the new checkpoint loads."""
    calls, limit = [], 0

    def counted(real):
        def call(*args, **more):
            calls.append(real.__name__)
            if len(calls) > limit:
                raise Killed
            return real(*args, **more)

        return call

    for limit in range(30):
        folder = tmp_path / str(limit)
        folder.mkdir()
        if before == "first":
            save_file(folder / "checkpoint.pt", state(2), keep="checkpoint.prev.pt")
        else:
            two_checkpoints(folder)
        if before == "newest damaged":
            damage(folder / "checkpoint.pt")
        if before == "leftovers":
            (folder / "checkpoint.pt.tmp").write_bytes(b"x")
            os.link(folder / "checkpoint.prev.pt", folder / "checkpoint.pt.old")
        last, done = load_checkpoint(folder)["epoch"], False
        calls.clear()
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            for module, names in (
                (os, ("replace", "link", "fsync")),
                (torch, ("save",)),
                (shutil, ("copyfile",)),
            ):
                for name in names:
                    patch.setattr(module, name, counted(getattr(module, name)))
            done = save_file(folder / "checkpoint.pt", state(3), keep="checkpoint.prev.pt")
        try:
            got = load_checkpoint(folder)
        except SystemExit:
            pytest.fail(f"killed before step {limit + 1} ({calls[-1]}): no readable checkpoint is left")
        assert got["epoch"] == 3 if done else got["epoch"] in (last, 3)
        assert_is(got, got["epoch"])
        if done:
            assert limit >= 4, "writing, flushing and renaming must have been seen"
            return
    pytest.fail("saving never completed")


def test_kill_9_while_saving(launch):
    """A writer killed at random moments: what is there afterwards is whole, and never older than before."""
    run = launch(
        """
import os, random, signal, time, torch, common
random.seed(0)
def state(n):
    return {"config": {}, "log_bytes": 0, "minutes": 0, "epoch": n, "w": torch.full((200000,), float(n))}
last = 0
for trial in range(10):
    pid = os.fork()
    if pid == 0:
        for n in range(last + 1, last + 100000):
            common.save_file("checkpoint.pt", state(n), keep="checkpoint.prev.pt")
        os._exit(0)
    time.sleep(random.uniform(0.02, 0.15))
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    got = common.load_checkpoint(".")
    if got is not None:
        assert (got["w"] == got["epoch"]).all() and got["epoch"] >= last, (got["epoch"], last)
        last = got["epoch"]
assert last > 5, last
""",
        world=1,
    )
    assert run.codes == [0] and "damaged" not in run.out[0], (run.err, run.out)


def test_full_disk_keeps_the_old_checkpoint(launch):
    """A file-size limit as a full disk: False, one line, the old one loads; exit code 1 until one is saved."""
    run = launch(
        """
import argparse, os, resource, signal, torch, common
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
args = argparse.Namespace(out="run", overwrite=False, k=3)
run = common.Run(args)
run.log({"epoch": 1})
run.save({"epoch": 1, "w": torch.ones(100)})
assert not run.unsaved
soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
for size in (100, 20000, 10**6):
    resource.setrlimit(resource.RLIMIT_FSIZE, (20000, hard))
    run.save({"epoch": 2, "w": torch.ones(10**6), "more": torch.ones(size)})
    assert common.save_file("run/other.pt", {"w": torch.ones(10**6)}) is False
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.unsaved and sorted(os.listdir("run")) == [".lock", "checkpoint.pt", "log.jsonl"], os.listdir("run")
    assert common.load_checkpoint("run")["epoch"] == 1
print("unsaved", flush=True)
pid = os.fork()
if pid == 0:
    try:
        run.finish()
    except SystemExit as end:
        os._exit(end.code)
assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 1
run.save({"epoch": 3, "w": torch.ones(10**6)})
assert common.load_checkpoint("run")["epoch"] == 3
run.finish()
""",
        world=1,
    )
    assert run.codes == [0], run.err
    assert run.out == ["unsaved\n"] and len(run.err[0].splitlines()) == 6 and "could not save" in run.err[0]


# --------------------------------------------------------------------------- Run


def lines(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def strict(text):
    """Parse JSON that has no NaN or Infinity in it."""
    return json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_resume_finds_the_state_and_cuts_the_log(tmp_path):
    """The log ends where the checkpoint was written; without a checkpoint it starts afresh."""
    args = arguments(tmp_path / "a" / "run")
    run = Run(args)
    assert run.state is None
    run.log({"first": 1})
    run.save({"epoch": 1})
    run.log({"epoch": 2})
    with open(run.out / "log.jsonl", "a") as file:
        file.write('{"epoch": 3, "los')  # killed in the middle of a line
    again = Run(args)
    assert again.state["epoch"] == 1
    again.log({"epoch": 2, "again": True})
    assert lines(run.out) == [{"first": 1}, {"epoch": 2, "again": True}]
    again.save({"epoch": 2})
    damage(run.out / "checkpoint.pt")
    assert Run(args).state["epoch"] == 1 and lines(run.out) == [{"first": 1}]
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        (run.out / name).unlink(missing_ok=True)
    assert Run(args).state is None and lines(run.out) == []


def test_other_arguments_are_refused_by_name(tmp_path, capsys):
    """Only what shapes the result is compared; the names that differ are told; --overwrite starts afresh."""
    Run(arguments(tmp_path, heads=(1, 2))).save({"epoch": 1})
    assert Run(arguments(tmp_path, heads=[1, 2], workers=7)).state["epoch"] == 1
    exits(capsys, lambda: Run(arguments(tmp_path, heads=[1, 2], k=4, lr=0.2)), "k 3 -> 4", "lr 0.1 -> 0.2")
    exits(capsys, lambda: Run(arguments(tmp_path, heads=[1, 2], new=1)), "new")
    exits(capsys, lambda: Run(arguments(tmp_path)), "heads")
    Run(arguments(tmp_path / "b", k=3), may_differ=["k"]).save({"epoch": 2})
    assert Run(arguments(tmp_path / "b", k=4), may_differ=["k"]).state["epoch"] == 2
    changed = arguments(tmp_path, heads=[1, 2], k=4)
    (tmp_path / "mine.txt").write_text("keep")
    changed.overwrite = True
    assert Run(changed).state is None and load_checkpoint(tmp_path) is None
    assert (tmp_path / "mine.txt").exists()


class Folder:
    """As much of a data set as the run folder looks at."""

    def __init__(self, paths):
        self.paths = paths

    def __len__(self):
        return len(self.paths)


@pytest.mark.parametrize("count", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restart_does_not_overwrite(count, tmp_path, monkeypatch):
    """--overwrite in a command that torchrun or Slurm starts again is for its first start alone."""
    args = arguments(tmp_path, overwrite=True)
    monkeypatch.setenv(count, "0")
    Run(args).save({"epoch": 1})
    monkeypatch.setenv(count, "1")
    assert Run(args).state["epoch"] == 1
    monkeypatch.setenv(count, "0")
    assert Run(args).state is None


def test_checkpoints_from_before_images_were_compared_go_on(tmp_path, capsys):
    """Images and file names are compared where the checkpoint tells of them, and named if they differ."""
    two, three = (Folder(["a/1.png", "a/2.png", "a/3.png"][:n]) for n in (2, 3))
    Run(arguments(tmp_path)).save({"epoch": 1})
    Run(arguments(tmp_path), two).save({"epoch": 2})
    assert Run(arguments(tmp_path), two).state["epoch"] == 2
    exits(capsys, lambda: Run(arguments(tmp_path), three), "images 2 -> 3", "other file names")
    exits(capsys, lambda: Run(arguments(tmp_path), Folder(["a/1.png", "a/x.png"])), "other file names")


def test_a_folder_that_cannot_be_written_is_refused(tmp_path, capsys):
    """--out below a file, or a file itself: exit code 2 and one line."""
    (tmp_path / "file").write_text("x")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        exits(capsys, lambda out=out: Run(arguments(out)), "--out", str(out))


def test_log_is_plain_json(tmp_path):
    """NaN and infinity become null, at any depth; everything else is kept, one object per line."""
    run = Run(arguments(tmp_path))
    run.log({"a": float("nan"), "b": 1.5, "c": "x\ny"})
    run.log({"probes": [1.0, float("inf")], "sizes": {"x": float("nan"), "y": [2]}})
    text = (tmp_path / "log.jsonl").read_text()
    assert [strict(line) for line in text.splitlines()] == [
        {"a": None, "b": 1.5, "c": "x\ny"},
        {"probes": [1.0, None], "sizes": {"x": None, "y": [2]}},
    ]


def test_first_record_tells_what_ran(tmp_path):
    """Command, all arguments, versions, device, and the data's name, images and classes."""
    args, data = arguments(tmp_path), common.load_data("digits")[0]
    Run(args).first_record(args, torch.device("cpu"), data)
    (record,) = lines(tmp_path)
    assert record["args"] == vars(args) and record["versions"]["torch"] == torch.__version__
    assert record["data"] == {"name": "digits", "images": 1437, "classes": 10}
    assert record["device"].startswith("cpu") and record["processes"] == 1 and record["command"]


def test_two_processes_resume_and_refuse_together(launch):
    """Both get the state, one writes; other arguments end both with exit code 2 and one line."""
    code = """
import argparse, torch, common
common.setup("cpu")
run = common.Run(argparse.Namespace(out="run", overwrite=False, k={k}))
before = run.state and (run.state["epoch"], run.state["w"].tolist())
run.log({{"rank": common.rank()}})
run.save({{"epoch": 5, "w": torch.ones(2) * common.rank()}})
print(before, flush=True)
run.finish()
"""
    first = launch(code.format(k=3))
    assert first.codes == [0, 0] and first.out == ["None\n"] * 2, first.err
    second = launch(code.format(k=3))
    assert second.codes == [0, 0] and second.out == ["(5, [0.0, 0.0])\n"] * 2, second.err
    assert lines(launch.path / "run") == [{"rank": 0}, {"rank": 0}]
    other = launch(code.format(k=4))
    assert other.codes == [2, 2] and len("".join(other.err).splitlines()) == 1, other.err
    assert "k 3 -> 4" in other.err[0] and other.out == ["", ""]


# --------------------------------------------------------------------------- pictures


def test_pictures_show_the_nearest_images(tmp_path):
    """A row per cluster from the largest down, the images nearest to its centroid first, white where none."""
    data = common.load_data("digits")[1]
    loader = common.Loader(data, 64, 32, 32, torch.device("cpu"))
    assign = torch.tensor([0] * 8 + [3] * 40 + [5] * 20 + [9] * 292)  # clusters 1, 2, .. are empty
    distance = torch.rand(360, generator=torch.Generator().manual_seed(0))
    common.save_pictures(tmp_path / "clusters.png", loader, assign, distance, rows=10, columns=12)
    picture = np.asarray(Image.open(tmp_path / "clusters.png").convert("L")).astype(int)
    assert picture.shape == (4 * 34 + 2, 12 * 34 + 2)
    for row, cluster in enumerate((9, 3, 5, 0)):
        members = [i for i in range(360) if assign[i] == cluster]
        members.sort(key=lambda i: distance[i].item())
        for column in range(12):
            tile = picture[row * 34 + 2 : row * 34 + 34, column * 34 + 2 : column * 34 + 34]
            want = data.pixels[members[column], 0].numpy() if column < len(members) else 255
            assert np.abs(tile - want).max() <= 1, (row, column)
    common.save_pictures(tmp_path / "two.png", loader, assign, distance, rows=2, columns=3)
    assert Image.open(tmp_path / "two.png").size == (3 * 34 + 2, 2 * 34 + 2)
