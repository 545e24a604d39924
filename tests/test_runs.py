"""What the method scripts share, seen from outside: runs that end, die and go on, bad input, two processes."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter

import jobs
import numpy as np
import pytest
import torch
from jobs import ONE_THREAD, ROOT, assert_same, contents, epochs, one_error, read_assignments, write_images

QUICK = {  # three epochs of the digits
    "deepcluster": "--epochs 3 --k 20 --batch-size 128 --image-size 20 --out run",
    "local_aggregation": "--epochs 3 --ir-epochs 1 --k 20 --num-neighbors 300 --batch-size 128 --lr-steps 2 "
    "--image-size 16 --out run",
    "coke": "--epochs 3 --warmup-epochs 1 --k 10 20 --batch-size 256 --image-size 16 --dim 16 --out run",
    "lsdc": "--epochs 3 --lr-steps 2 --ramp-up 2 --score-every 2 --image-size 16 --freeze-stages 1 "
    "--pretrain rotnet --pretrain-epochs 2 --pretrain-lr-steps 1 --out run",
}
FILES = "--recipe digits --batch-size 8 --image-size 16 --epochs 2 --out run"
SMALL = {  # two epochs of a folder of images
    "deepcluster": f"{FILES} --k 4",
    "local_aggregation": f"{FILES} --k 4 --ir-epochs 1",
    "coke": f"{FILES} --k 4 2 --warmup-epochs 1 --dim 16",
    "lsdc": f"{FILES} --k 3 --num-neighbors 2 --pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 8",
}
CHANGED = {"deepcluster": ("--k 30", "k 20 -> 30"), "local_aggregation": ("--loss ir", "loss la -> ir")}
CHANGED |= {"coke": ("--ratio 0.5", "ratio 0.9 -> 0.5"), "lsdc": ("--labeling sne", "labeling knn -> sne")}
GROWING = {"deepcluster", "local_aggregation"}  # whose schedule does not hang on the number of epochs
FIRST = {"deepcluster": "K = 20, 11", "local_aggregation": "K = 20, 11", "coke": "K = 10 20, 5"}
FIRST |= {"lsdc": "K = 10, 1437 of them to learn from, 5"}  # clusters and steps of an epoch
START = "--recipe digits --batch-size 256 --epochs 2 --out run"  # to take weights of another run
OWN = {"local_aggregation": "--ir-epochs 1 --k 20 --num-neighbors 300", "coke": "--k 10 20 --warmup-epochs 1"}
HARDER = {"deepcluster": "--arch resnet18 --image-size 8 --pca 0 --epochs 1", "coke": "--head 2"}
HARDER |= {"lsdc": "--classifier-layers 2"}
BRIEF = {"local_aggregation": "--ir-epochs 1", "coke": "--warmup-epochs 1", "lsdc": "--pretrain none"}
LEFT = {"log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "backbone.pt", "clustering.pt", "assignments.csv"}

every = pytest.mark.parametrize("name", QUICK)


@pytest.fixture(scope="module")
def whole(run_script):
    """{name: a run that nobody interrupts}, each made once."""
    done = {}
    return lambda name: done.get(name) or done.setdefault(name, run_script(f"{ROOT}/{name}.py", QUICK[name]))


@pytest.fixture
def go(run_script):
    return lambda name, arguments, *rest, **more: run_script(f"{ROOT}/{name}.py", arguments, *rest, **more)


@every
def test_a_run_leaves_its_files_and_short_lines(whole, name):
    job = whole(name)
    more = (
        {".lock", "rotnet.pt", "confusion.png"} if name == "lsdc" else {".lock"}
    )  # no clusters.png: see QUIET
    assert {p.name for p in job.run.iterdir()} == LEFT | more and job.err == ""
    first, *records, last = job.log()
    assert first["command"] == f"{name}.py {QUICK[name]}" and {"torch", "faiss"} <= first["versions"].keys()
    assert (
        first["images"] == (1797 if name == "lsdc" else 1437)
        and "result" in last
        and len(epochs(records)) >= 3
    )
    assert len(re.findall(r"^epoch", job.out, re.MULTILINE)) == len(records)
    lines = re.sub(r"(epoch|clusters|smallest|largest|bound|seconds) \d+", r"\1 1000", job.out).splitlines()
    assert [line for line in lines if line.startswith("epoch") and len(line) > 100] == [], "a long run's wrap"
    assert f"{FIRST[name]} steps an epoch" in lines[0]
    phases = {record.get("phase") for record in epochs(records) if 0 < record["epoch"] < record["epochs"]}
    assert len(re.findall(r"^about \d:\d\d:\d\d left at this pace$", job.out, re.MULTILINE)) == len(phases)


@every
def test_training_starts_from_the_weights_of_another_run(go, whole, name):
    """Which stay what they are with a rate of 0, also normalized as they were; then nothing is learnt, and that is said."""
    source = whole("coke" if name == "local_aggregation" else "local_aggregation")
    saved = source.state("backbone.pt")
    saved["meta"] |= {"mean": [0.25], "std": [0.125]}
    (source.folder / "other").mkdir(exist_ok=True)
    torch.save(saved, source.folder / "other" / "backbone.pt")
    job = go(name, f"{START} {OWN.get(name, '')} --lr 0 --init {source.folder}/other")
    after, method = job.state("backbone.pt"), saved["meta"]["method"]
    kept = [k for k in saved["state_dict"] if not k.endswith(("mean", "var", "tracked"))]
    assert len(kept) == 16 and all(torch.equal(after["state_dict"][k], saved["state_dict"][k]) for k in kept)
    same = ("arch", "image_size", "norm", "mean", "std")
    assert [after["meta"][k] for k in same] == ["lenet5", 16, True, [0.25], [0.125]]
    assert f"{method} initialization" in job.out and f'"{method} initialization": {{' in json.dumps(
        job.log()[-1]
    )
    said = job.out.count("WARNING: the loss is ")  # elsewhere centers and bank move without it
    assert said == 2 or name in ("coke", "local_aggregation")


@every
@pytest.mark.parametrize(
    "where",
    [
        ("{}.Meter", "add", 5, True),  # in the second epoch
        ("torch", "save", 3, False, True),  # with half a file written
        ("os", "replace", 4),  # between the two renames of a checkpoint
        ("{}", "save_clusters", 1),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(go, whole, name, where):
    module, *rest = where
    killed = go(name, QUICK[name], jobs.trap(name, module.format(name), *rest), ok=False)
    assert killed.code == -9, killed.out + killed.err
    resumed = go(name, QUICK[name], folder=killed.folder)
    assert "epochs are done" in resumed.out
    assert_same(resumed, whole(name))


@every
@pytest.mark.parametrize(
    ("arguments", "world"), [("{small} --data PLACES/both --workers 2", 1), ("{quick} --seed 3", 2)]
)
def test_files_with_workers_and_two_processes_survive_a_kill(go, name, arguments, world):
    arguments = arguments.format(small=SMALL[name], quick=QUICK[name])
    reference = go(name, arguments, world=world)
    killed = go(name, arguments, jobs.trap(name, f"{name}.Meter", "add", 2, True), world, ok=False)
    assert -9 in killed.codes and killed.state()["epoch"] >= 1
    assert_same(go(name, arguments, world=world, folder=killed.folder), reference)


@every
def test_a_finished_run_says_so_and_another_argument_is_refused_by_name(go, whole, name):
    if name in GROWING:
        two = go(name, QUICK[name] + " --epochs 2")
        assert_same(go(name, QUICK[name] + " --workers 1", folder=two.folder), whole(name))
    else:
        two = whole(name)
        line = one_error(go(name, QUICK[name] + " --epochs 4", folder=two.folder, ok=False))
        assert "epochs 3 -> 4" in line
    before, (flags, words) = contents(two.run), CHANGED[name]
    line = one_error(go(name, f"{QUICK[name]} {flags} --seed 5", folder=two.folder, ok=False))
    assert all(word in line for word in (words, "seed 0 -> 5", "--overwrite")), line
    again = go(name, QUICK[name], folder=two.folder)
    assert "epochs are done; finished" in again.out and contents(two.run) == before


@every
@pytest.mark.parametrize(
    ("arguments", "words", "world"),
    [
        ("--k 10000", ["--k", "1437"], 2),
        ("--batch-size 1438", ["--batch-size", "1437"], 1),
        ("--batch-size 63", ["--batch-size 63", "2 processes"], 2),
        ("--data PLACES/none --recipe digits", ["none", "no such folder", "digits"], 2),
        ("--out PLACES/file", ["--out", "file"], 2),
        ("--lr 1e30", ["--lr"], 2),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(go, name, arguments, words, world):
    line = one_error(go(name, f"{QUICK[name]} {arguments}", world=world, ok=False))
    assert not [word for word in words if word not in line], line


@every
def test_equal_images_run_and_are_called_a_trivial_solution(go, places, name):
    job = go(name, f"{SMALL[name]} --data PLACES/same")
    images, clusters = read_assignments(job.run / "assignments.csv")  # the log refuses NaN
    assert images == [str(p) for p in sorted((places / "same").iterdir())]
    assert "trivial" in job.out or max(Counter(clusters).values()) <= 20


@every
@pytest.mark.parametrize("world", [1, 2])
def test_files_that_cannot_be_read_are_named_and_in_no_cluster(go, name, world):
    job = go(name, f"{SMALL[name]} --data PLACES/both", world=world)
    images, clusters = read_assignments(job.run / "assignments.csv")
    bad = [path.split("both")[-1] for path, c in zip(images, clusters, strict=True) if c == "unreadable"]
    assert bad == ["/train/b/001.png", "/val/b/001.png"][: 2 if name == "lsdc" else 1]  # it clusters both
    assert 1 <= job.out.count("train/b/001.png'") <= world


@every
def test_two_dozen_photographs_run_by_the_recipe_of_folders(go, name):
    job = go(name, f"--data PLACES/flat --epochs 2 --out run {BRIEF.get(name, '')}")
    assert len(read_assignments(job.run / "assignments.csv")[0]) == 24
    assert job.state("backbone.pt")["meta"]["image_size"] < 100  # pixels of the files


# --------------------------------------------------------------------------- clusters of other images


@every
@pytest.mark.parametrize("world", [1, 2])
def test_a_runs_own_images_get_their_clusters_again(go, whole, name, world):
    job = whole(name)
    go(name, "--assign digits --out run", world=world, folder=job.folder)
    found, want = (read_assignments(job.run / f"assignments{which}.csv") for which in ("-digits", ""))
    assert found[0] == want[0] and len(set(want[1])) > 5
    assert sum(map(int.__ne__, found[1], want[1])) <= 1  # one may lie between two
    (job.run / "assignments-digits.csv").unlink()


@every
def test_copies_get_the_clusters_of_the_images_they_are_of(go, places, name):
    """In another order, from a flat folder, one that cannot be read among them; by one process and by two."""
    shades = np.random.default_rng(0).integers(0, 256, (24, 3), dtype=np.uint8)
    if not (places / "colors").exists():  # too large to be decoded once
        write_images(places / "colors", 24, lambda i: np.broadcast_to(shades[i], (100, 110, 3)).copy())
        (places / "colors" / "007.png").write_bytes(b"no image")
    job = go(name, f"{SMALL[name]} {HARDER.get(name, '')} --data PLACES/colors")
    images, clusters = read_assignments(job.run / "assignments.csv")
    assert clusters[7] == "unreadable" and len(set(clusters)) > 2, "of different images"
    (job.folder / "new").mkdir()
    for i in range(20):
        shutil.copy(images[19 - i], job.folder / f"new/{i:02}.png")
    for world in (1, 2):
        said = go(name, f"--assign new/ --out run --workers {world}", world=world, folder=job.folder).out
        want = [f"new/{i:02}.png" for i in range(20)], clusters[19::-1]
        assert read_assignments(job.run / "assignments-new.csv") == want and "assignments-new.csv" in said
        (job.run / "assignments-new.csv").unlink()


@every
def test_who_cannot_assign_ends_with_exit_code_2_and_one_line(go, whole, name, tmp_path):
    """Gray digits and photographs, no run, one of another method, one that was started afresh and has not ended."""
    shutil.copytree(whole(name).run, tmp_path / "run")
    shutil.copytree(whole("lsdc" if name == "coke" else "coke").run, tmp_path / "other")

    def refused(arguments, **more):
        return one_error(go(name, arguments, folder=tmp_path, ok=False, **more))

    assert "1 channel" in (line := refused("--assign PLACES/flat --out run")) or "3 channel" in line
    assert "none" in refused("--assign digits --out none", world=2)
    assert "other" in refused("--assign digits --out other")
    killed = go(
        name,
        f"{QUICK[name]} --overwrite",
        jobs.trap(name, f"{name}.Meter", "add", 5, True),
        ok=False,
        folder=tmp_path,
    )
    assert killed.code == -9 and (tmp_path / "run/clustering.pt").exists()
    assert "finished" in refused("--assign digits --out run")
    (tmp_path / "run/clustering.pt").unlink()
    assert "finished" in refused("--assign digits --out run")


@every
def test_torchrun_with_two_processes(tmp_path, name):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command, environment = (
        [*launcher, ROOT / f"{name}.py", *QUICK[name].split()],
        {**os.environ, **ONE_THREAD},
    )
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    records = jobs.read_log(tmp_path / "run" / "log.jsonl")
    assert records[0]["processes"] == 2 and "result" in records[-1]
    assert len(re.findall(r"^epoch", done.stdout, re.MULTILINE)) == len(records) - 2, (
        "each epoch is told once"
    )
