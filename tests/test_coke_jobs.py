"""coke.py as a whole: what runs leave behind, interruptions, several processes, odd data, what is learnt."""

import ast
import csv
import functools
import math
import os
import re
import subprocess
import sys

import common
from coke import Network, options

import jobs
import numpy as np
import pytest
import torch
from jobs import ONE_THREAD, ROOT, contents, epochs, plain, plain_nmi, write_images

SCRIPT = ROOT / "coke.py"
STEPS, TESTS, CROPS = 1437 // 256, math.ceil(360 / 256), math.ceil(1437 / 256)  # digits: 5 steps an epoch
QUICK = "--data digits --k 10 20 --batch-size 256 --epochs 3 --warmup-epochs 1 --image-size 16 --dim 16 --dual-lr 1 --out run"
ONE, MULTI = QUICK + " --views 1 --first-stage 0.4 --label-size 3", QUICK + " --views multi --local-crops 2"
SMALL = "--recipe digits --image-size 16 --batch-size 8 --k 4 2 --epochs 2 --warmup-epochs 1 --workers 0 --dim 16 --out run"
# The script without its picture, which takes as long as three epochs.
QUIET = "import common; common.draw_clusters = lambda *a: None\n" + plain(SCRIPT)
trap = functools.partial(jobs.trap, "coke")


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    root, gray = tmp_path_factory.mktemp("places"), np.full((32, 32, 3), 90, np.uint8)
    write_images(root / "same", 40, lambda i: gray)
    write_images(root / "flat", 24, size=100)  # too large to be decoded once
    for name in ("a", "b"):
        write_images(root / "both" / "train" / name, 12, size=100)
        write_images(root / "both" / "val" / name, 3, size=100)
    (root / "both" / "val" / "b" / "001.png").write_bytes(b"no image")
    (root / "both" / "train" / "a" / "003.png").write_bytes(b"no image")
    return root


@pytest.fixture(scope="module")
def run(start, places):  # a job of the script, to its end
    def go(arguments, code=QUIET, world=1, folder=None, ok=True):
        code = f"import os; os.environ['LOCAL_WORLD_SIZE'] = '{world}'\n{code}"  # as torchrun does
        job = start(arguments.replace("PLACES", str(places)).split(), code, world, folder)
        return job.ok() if ok else job.wait()

    return go


@pytest.fixture(scope="module")
def whole(run):
    """Runs with one, two and many views, by their flags."""
    return {flags: run(flags, plain(SCRIPT)) for flags in (ONE, QUICK, MULTI)}


def assignments(job):
    with open(job.run / "assignments.csv", newline="") as file:
        return [list(column) for column in zip(*list(csv.reader(file))[1:], strict=True)]


@pytest.mark.parametrize(("flags", "views"), [(ONE, "1"), (QUICK, "2"), (MULTI, "multi")])
def test_a_run_leaves_what_assigns_new_images(whole, flags, views):
    """backbone.pt, its projector and clustering.pt give every head's clusters, by the nearest center, without duals."""
    job, (train, test) = whole[flags], common.load_data("digits")
    net = Network(options(flags.split()), 1)
    backbone, meta = common.load_backbone(job.run / "backbone.pt")
    net.encoder[1].load_state_dict(job.state("backbone.pt")["projector"])
    net.encoder[0], model = backbone, job.state("clustering.pt")
    result, clusters = job.log()[-1]["result"], [int(c) for c in assignments(job)[1]]
    assert meta["method"] == f"coke-{views}" and model["k"] == [10, 20] == [len(c) for c in model["centers"]]
    for h, centers in enumerate(model["centers"]):
        torch.testing.assert_close(centers.norm(dim=1), torch.ones(len(centers)))
        for name, data in (("train", train), ("test", test)):
            loader = common.Loader(data, 100, 16, 1.0, torch.device("cpu"), 0)
            with torch.no_grad():
                z = torch.cat([net.eval().encoder(x) for _, x in loader.test(torch.arange(len(data)))])
            found = (z @ centers.T).argmax(1).tolist()
            near = pytest.approx(plain_nmi(data.labels.tolist(), found), abs=0.01)  # a tie or two
            assert result["heads"][h][name]["nmi_labels"] == near
            if (h, name) == (0, "train"):
                assert len(found) - sum(map(int.__eq__, found, clusters)) < 4
                assert (
                    result["largest"] == max(clusters.count(c) for c in set(clusters))
                    and result["head"] == 10
                )


@pytest.mark.parametrize("flags", [ONE, QUICK, MULTI])
def test_log_files_and_words_of_a_run(whole, flags):
    """Clustering, training, with one view averaging; rates by the step; result, random network and pixels last."""
    job, ((first, *records, last), lines) = whole[flags], (whole[flags].log(), whole[flags].out.splitlines())
    assert [r["epoch"] for r in records] == [0, 1, 2, 3] and first["command"] == f"coke.py {flags}"
    late = "averaging" if flags == ONE else "training"
    assert [r["phase"] for r in records] == ["clustering", "training", late, late]
    rates = [0.0, 4 / 5, *((1 + math.cos(math.pi * t / 10)) / 2 for t in (4, 9))]
    assert [r["lr"] for r in records] == pytest.approx([0.05 * rate for rate in rates])
    assert records[0]["changed"] == 1 and "nmi_previous" not in records[0] and "nmi_previous" in records[1]
    for r in records:
        assert r["uniform"] == pytest.approx((math.log(10) + math.log(20)) / 2)
        assert [h["bound"] for h in r["heads"]] == pytest.approx([0.9 * STEPS * 256 / k for k in (10, 20)])
        assert r["smallest"] == r["heads"][0]["smallest"] <= 128 <= r["largest"]
    assert records[-1]["test"] == last["result"]["heads"][0]["test"]
    shown = [line for line in lines if line.startswith("epoch")]
    assert (
        len(shown) == 4 and max(map(len, shown)) <= 100 and all(f"bound {0.9 * 128:.4g}" in x for x in shown)
    )
    names = ".lock log.jsonl checkpoint.pt checkpoint.prev.pt backbone.pt clustering.pt clusters.png assignments.csv"
    assert {p.name for p in job.run.iterdir()} == set(names.split()) and job.err == ""
    scores = [last["result"]["heads"][0]["test"], *last["baselines"].values()]
    assert list(last["baselines"]) == ["random network", "pixels"] and len(scores) == 3
    assert all(f"{100 * x['acc_labels']:.1f} / {100 * x['nmi_labels']:.1f}" in lines[-2] for x in scores)
    state = job.state()["heads"][1]
    assert (state["shares"] > 0).sum(1).max() == (2 if flags == ONE else 1) and state["labels"].shape[
        0
    ] == 1437


def assert_same(a, b):
    """Two jobs ended with the same checkpoint, backbone, clustering, csv and log, bit for bit."""
    x, y = ({k: v for k, v in job.state().items() if k != "log_bytes"} for job in (a, b))
    assert x.pop("config") == y.pop("config")
    torch.testing.assert_close(x, y, rtol=0, atol=0)
    for name in ("backbone.pt", "clustering.pt", "assignments.csv"):
        assert (a.run / name).read_bytes() == (b.run / name).read_bytes(), name
    logs = [[{k: v for k, v in r.items() if k != "seconds"} for r in job.log()[1:]] for job in (a, b)]
    assert logs[0] == logs[1]


METER = ("coke.Meter", "add")
START, EACH = CROPS + TESTS, STEPS + TESTS  # its calls before the first epoch, in each


@pytest.mark.parametrize(
    ("flags", "world", "code", "saved"),  # where the kill comes, epochs that checkpoint.pt holds by then
    [
        (ONE, 1, trap(*METER, START + 2), None),  # in the clustering epoch
        (ONE, 1, trap(*METER, START + EACH + 3), 1),
        (ONE, 1, trap(*METER, START + 3 * EACH + 3), 3),  # averaging
        (MULTI, 1, trap("torch", "save", 3, torn=True), 1),
        (QUICK, 1, trap("coke", "save_clusters", 1), 4),
        (ONE, 2, trap(*METER, START + 3 * EACH + 3), 3),
        (SMALL + " --data PLACES/both --workers 2 --optimizer lars", 1, trap(*METER, 3 + 1 + 2 * 4 + 2), 2),
    ],
)
def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_happened(run, whole, flags, world, code, saved):
    reference = whole[flags] if world == 1 and flags in whole else run(flags, world=world)
    killed = run(flags, code, world, ok=False)
    assert -9 in killed.codes, killed.out + killed.err
    assert (killed.state()["epoch"] if (killed.run / "checkpoint.pt").exists() else None) == saved
    assert_same(run(flags, world=world, folder=killed.folder), reference)


def test_a_finished_run_says_so_and_refuses_other_arguments(run, whole):
    job, before = whole[ONE], contents(whole[ONE].run)
    assert "result" in run(ONE, folder=job.folder).out and contents(job.run) == before
    line = one_error(run(ONE + " --ratio 0.5 --label-size 4", folder=job.folder, ok=False))
    assert "ratio 0.9 -> 0.5" in line and "label_size 3 -> 4" in line and contents(job.run) == before


def one_error(job):
    """The one line with which all processes ended, exit code 2; argparse's usage may precede it."""
    assert set(job.codes) == {2} and "Traceback" not in job.out + job.err, job.out + job.err
    (line,) = [line for line in job.err.splitlines() if ": error: " in line]
    assert line.startswith("coke.py") and job.err.splitlines()[-1] == line
    return line


@pytest.mark.parametrize(
    ("arguments", "parts", "world"),
    [
        ("--k 10 1438", ["--k 1438", "1437", "try 28"], 2),
        ("--batch-size 63", ["--batch-size 63", "2 processes"], 2),
        ("--lr 1e30 --momentum 0", ["--lr"], 2),
        ("--head 30", ["--head 30", "10 20"], 1),
    ],
)
def test_mistakes_end_with_exit_code_2_and_one_line(run, arguments, parts, world):
    line = one_error(run(f"{QUICK} {arguments}", world=world, ok=False))
    assert not [part for part in parts if part not in line], line


@pytest.mark.parametrize(
    "more",
    [
        "--data PLACES/same --optimizer lars",
        "--data PLACES/flat --k 24 1 --ratio 1 --views 1 --first-stage 0 --predictor-weight 1",
        "--data PLACES/flat --init-epochs 0 --ratio 0 --label-weight 0",
        "--data PLACES/both --arch resnet18 --views multi --local-size 8 --color --blur --local-crops 2",
    ],
)
def test_odd_data_runs_and_every_number_is_finite(run, more):
    """Identical images, as many clusters as images, no labels; labels, files that cannot be read, all colors."""
    job = run(f"{SMALL} {more}")
    records, (images, clusters) = epochs(job.log()), assignments(job)  # the log refuses NaN
    heads = [x for head in job.state()["heads"] for x in head.values()]
    assert all(x.isfinite().all() for x in [*job.state()["net"].values(), *heads])
    assert len(images) == len(set(images)) and ("unreadable" in clusters) == ("both" in more)
    assert all(("nmi_labels" in r) == ("both" in more) for r in records)
    if "both" in more:  # of the five test images that can be read
        assert round(5 * records[-1]["test"]["acc_labels"], 9) in range(6)


def test_digits_are_learnt(run):
    """A third of `python coke.py`: better than k-means on the random network; the bound holds within sqrt(2 N)."""
    *_, record, last = run("--data digits --epochs 20 --k 10 30 --out run").log()
    reached, others = last["result"]["heads"][0]["test"], last["baselines"]
    assert reached["acc_labels"] > max(0.72, others["random network"]["acc_labels"] + 0.08), (reached, others)
    assert (
        record["nmi_previous"] > 0.8 and record["changed"] < 0.3 and record["loss"] < record["uniform"] / 1.5
    )
    assert record["smallest"] > record["bound"] - math.sqrt(2 * 1437) and record["heads"][1]["smallest"] > 0


def test_torchrun_with_two_processes(tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command, environment = [*launcher, SCRIPT, *QUICK.split(), "--epochs", "2"], {**os.environ, **ONE_THREAD}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    records = jobs.read_log(tmp_path / "run" / "log.jsonl")
    assert records[0]["processes"] == 2 and len(epochs(records)) == 3 and "result" in records[-1]
    assert len(re.findall(r"^epoch 2\b", done.stdout, re.MULTILINE)) == 1


def test_functions_are_short_and_common_is_imported_before_torch():
    functions = [f for f in ast.walk(ast.parse(SCRIPT.read_text())) if isinstance(f, ast.FunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {f: n for f, n in lengths.items() if n > (85 if f in ("main", "options") else 45)} == {}
    order = [line.split()[1] for line in SCRIPT.read_text().splitlines() if re.match(r"(from|import) ", line)]
    assert order.index("common") < order.index("torch")
