"""results/report.py: the table against plain reading of the logs, the picture, and logs that are missing or damaged."""

import importlib
import json
import shutil
import struct
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
sys.path.insert(0, str(RESULTS))

import report  # noqa: E402

PAPER = 7  # the cell of the paper's number
MEASURED = (4, 5, 6, 8, 9, 10, 11)  # seeds, mean, deviation; minutes, hardware, commit, logs
HEAD = {"command": "deepcluster.py", "args": {"arch": "lenet5"}, "device": "cpu", "data": {"name": "digits"}}
EPOCHS = [
    {"epoch": e, "loss": 3 - e, "ln_k": 3.0, "nmi_labels": e / 10, "nmi_previous": None} for e in (1, 2)
]
RESULT = {"result": {"nmi_labels": 0.7, "nmi_labels_untrained": 0.6}, "minutes": 1.0}
DIGITS = next(e for e in report.EXPERIMENTS if e.files[0] == "deepcluster-digits-seed0.jsonl")


def experiment(file):
    return next(e for e in report.EXPERIMENTS if file in e.files[0].split())


def row(file, where, folder=RESULTS):
    """The cells of the row whose figure lies at a place whose name begins so."""
    e = experiment(file)
    return report.row(folder, e, next(f for f in e.figures if f.where.startswith(where)))


def last(name):
    """The last line of a log, or the JSON of an evaluation, without report.py."""
    text = (RESULTS / name).read_text()
    return json.loads(text if name.endswith(".json") else text.splitlines()[-1])


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


def refused(capsys, *argv):
    """The one line that report.py leaves on standard error as it ends with code 2."""
    with pytest.raises(SystemExit) as end:
        report.main([str(a) for a in argv])
    said = capsys.readouterr().err
    assert end.value.code == 2 and said.count("\n") == 1 and said.startswith("report.py: ")
    return said


def numbers(cell):
    """The numbers of a cell: a row for each seed."""
    return np.array([[float(n.replace(",", "")) for n in seed.split(" / ")] for seed in cell.split("; ")])


# --------------------------------------------------------------------------------------------------------- the table


def test_values_are_those_of_the_logs():
    """Six rows, read here with json alone."""
    found = [last(f"deepcluster-digits-seed{s}.jsonl")["result"] for s in range(3)]
    want = "; ".join(f"{r['nmi_labels_untrained']:.3f} / {r['nmi_labels']:.3f}" for r in found)
    assert row("deepcluster-digits-seed0.jsonl", "result/nmi")[4] == want

    probe = last("deepcluster-fashionmnist-k100-eval.json")
    want = " / ".join(f"{100 * probe['stages'][s]['test_last']:.2f}" for s in ("conv1", "conv2"))
    assert row("deepcluster-fashionmnist-k100.jsonl", "stages")[4] == want
    want = f"{100 * probe['knn']['1']:.2f} / {100 * probe['knn']['200']:.2f}"
    assert row("deepcluster-fashionmnist-k100.jsonl", "knn")[4] == want

    knn = [last(f"local_aggregation-digits-la-seed{s}.jsonl")["result"]["knn_centre_crops"] for s in range(3)]
    want = "; ".join(f"{100 * k['1']:.1f} / {100 * k['200']:.1f}" for k in knn)
    assert row("local_aggregation-digits-la-seed0.jsonl", "result/knn_centre")[4] == want

    lines = (RESULTS / "coke-fashionmnist.jsonl").read_text().splitlines()
    head = json.loads(lines[-2])["heads"][0]
    want = f"{head['smallest']:,} / {head['largest']:,} / {head['bound']:,.0f}"
    assert row("coke-fashionmnist.jsonl", "epoch")[4].split("; ")[0] == want and "5,385" in want

    lines = [json.loads(x) for x in (RESULTS / "lsdc-mnist-rotnet.jsonl").read_text().splitlines()]
    turns = [r["turns_right"] for r in lines if r.get("phase") == "rotnet"]
    assert row("lsdc-mnist-rotnet.jsonl", "rotnet")[4] == f"{100 * turns[-1]:.1f}" and len(turns) == 3


@pytest.mark.parametrize(
    "name, keys",
    [
        ("coke-digits-seed{}.jsonl", ("heads", 0, "test")),
        ("lsdc-fashionmnist-seed{}.jsonl", ("scores", "test")),
    ],
)
def test_mean_and_deviation(name, keys):
    """ACC, NMI and ARI of three seeds: numpy's mean and sample deviation, of figures that are not rounded yet."""
    scores = []
    for seed in range(3):
        node = last(name.format(seed))["result"]
        for key in keys:
            node = node[key]
        scores.append([100 * node[f"{which}_labels"] for which in ("acc", "nmi", "ari")])
    cells = row(name.format(0), "/".join(str(k) for k in ("result", *keys)))
    scores = np.array(scores)
    assert np.abs(numbers(cells[5]) - scores.mean(0)).max() <= 0.0501
    assert np.abs(numbers(cells[6]) - scores.std(0, ddof=1)).max() <= 0.0501


def test_seeds_within_one_log():
    """Initial Alignment: ten seeds and their median from one log."""
    log = last("initial-alignment-fashionmnist.jsonl")
    cells = row("initial-alignment-fashionmnist.jsonl", "initial")
    assert numbers(cells[4]).shape == (10, 1) and f"median {log['median']:.3f}" in cells[5]
    assert float(cells[6]) == pytest.approx(np.std(log["initial_alignment"], ddof=1), abs=6e-4)


def test_readme_is_up_to_date(tmp_path):
    """Made again from the logs it is what stands there, and the text around it is left alone."""
    for path in [*RESULTS.glob("*.jsonl"), *RESULTS.glob("*-eval.json")]:
        shutil.copy(path, tmp_path)
    text = (RESULTS / "README.md").read_text()
    before, after = text.index(report.BEGIN), text.index(report.END) + len(report.END)
    (tmp_path / "README.md").write_text(f"{text[:before]}{report.BEGIN}\nold\n{report.END}{text[after:]}")
    report.main(["--only", "table", "--folder", str(tmp_path)])
    assert (tmp_path / "README.md").read_text() == text, "run python results/report.py"
    assert not (tmp_path / "curves.png").exists()


def test_every_log_is_in_the_table_under_its_seed():
    here = {path.name for path in [*RESULTS.glob("*.jsonl"), *RESULTS.glob("*-eval.json")]}
    known = [name for e in report.EXPERIMENTS for files in e.files for name in files.split()]
    assert here <= set(known) and len(known) == len(set(known))
    for e in report.EXPERIMENTS:
        for seed, files in enumerate(e.files):
            for name in here & {files.split()[0]}:
                assert report.read(RESULTS / name)[0]["args"]["seed"] == seed, name


def test_commands_give_what_the_logs_say_was_run():
    """Each command is accepted, and its settings are those of its logs, but for those that have no effect there."""
    free = {
        "out",
        "overwrite",
        "workers",
        "seed",
        "amp",
        "head",
        "ir_loss",
        "background",
        "backbone",
        "recipe",
        "lr",
    }
    unused = {"small_area": ("views", "multi"), "cosine_threshold": ("labeling", "cosine")}
    unused["sne_temperature"] = ("labeling", "sne")
    compared = 0
    for e in report.EXPERIMENTS:
        for i, part in enumerate(e.command.split("; ")):
            words = [word for word in part.split() if word not in report.EIGHT.split()]
            if words[:1] == ["eval_linear.py"] and "--random" not in words:
                continue  # its options are those of the run that it evaluates
            args = vars(importlib.import_module(words[0].removesuffix(".py")).options(words[1:]))
            skip = free | {key for key, (flag, value) in unused.items() if args.get(flag) != value}
            logs = [RESULTS / f.split()[0] for f in e.files if (RESULTS / f.split()[0]).exists() and i == 0]
            for path in logs:
                ran = report.read(path)[0]["args"]
                assert {k: v for k, v in args.items() if k in ran and k not in skip} == {
                    k: v for k, v in ran.items() if k in args and k not in skip
                }, f"{path.name}: {part}"
                compared += 1
    assert compared >= 39


def test_without_logs_all_measured_cells_are_empty(tmp_path):
    for e in report.EXPERIMENTS:
        for figure in e.figures:
            cells = report.row(tmp_path, e, figure)
            assert [cells[i] for i in MEASURED] == [""] * 7 and cells[PAPER] == figure.paper
            assert len(cells) == 12 and not any("|" in cell for cell in cells)


def test_a_missing_seed_and_a_missing_probe(tmp_path):
    """A seed without a log is passed over, its place is kept; a run without its probe is not shown yet."""
    for seed in (0, 2):
        shutil.copy(RESULTS / f"deepcluster-digits-seed{seed}.jsonl", tmp_path)
    cells = row("deepcluster-digits-seed0.jsonl", "result", tmp_path)
    first, absent, third = cells[4].split("; ")
    assert absent == "-" and first != third and "seed 2" in cells[11] and "seed 1" not in cells[11]
    spread = np.ptp([float(x.split(" / ")[1]) for x in (first, third)]) / 2**0.5  # deviation of two
    assert float(cells[6].split(" / ")[1]) == pytest.approx(spread, abs=2e-3)
    shutil.copy(RESULTS / "deepcluster-fashionmnist.jsonl", tmp_path)
    assert row("deepcluster-fashionmnist.jsonl", "stages", tmp_path)[4] == ""


def test_one_seed_has_no_deviation(tmp_path):
    shutil.copy(RESULTS / "deepcluster-digits-seed0.jsonl", tmp_path)
    cells = row("deepcluster-digits-seed0.jsonl", "result", tmp_path)
    assert cells[4] == cells[5] != "" and cells[6] == ""


def test_commit_and_hardware_of_the_log_come_first(tmp_path):
    """Typed ones are for logs that have none; commits that differ are each shown once."""
    write(tmp_path / DIGITS.files[0], HEAD, *EPOCHS, RESULT)
    about = {"commit": "abc1234", "hardware": "1 x NVIDIA H200", "device": "NVIDIA H200"}
    for name in DIGITS.files[1:]:
        write(tmp_path / name, {**HEAD, **about}, *EPOCHS, RESULT)
    cells = report.row(tmp_path, DIGITS, DIGITS.figures[0])
    assert cells[9] == f"{report.HARDWARE}, 1 x NVIDIA H200" and cells[10] == "283e469, abc1234"


def test_small_table_of_k_and_halting(tmp_path):
    probe = {"command": "eval_linear.py", "seconds": {}, "knn": {"last feature": {"1": 0.5, "200": 0.5}}}
    name = "deepcluster-fashionmnist-k20-halt10"
    write(tmp_path / f"{name}.jsonl", HEAD, *EPOCHS, RESULT)
    stages = {s: {"test_last": v} for s, v in (("conv1", 0.8), ("conv2", 0.8125))}
    (tmp_path / f"{name}-eval.json").write_text(json.dumps({**probe, "stages": stages}, indent=1))
    text = report.table(tmp_path)
    assert "| K | halted after cycle 1 | halted after cycle 10 | never halted |" in text
    assert "| 20 |  | 81.25 |  |" in text and "| 5 |  |  |  |" in text
    assert row(f"{name}.jsonl", "knn", tmp_path)[4] == "50.00 / 50.00"


# ---------------------------------------------------------------------------------------------------------- the logs


def test_resumed_logs(tmp_path):
    """An epoch done again counts once, as it was the last time; what is last in the log is the result."""
    again = {**EPOCHS[1], "loss": 0.25}
    write(tmp_path / "log.jsonl", HEAD, *EPOCHS, {"resumed": True, "epoch": 1, "step": 3}, again, RESULT)
    head, epochs, end = report.read(tmp_path / "log.jsonl")
    assert head == HEAD and end == RESULT and epochs == [EPOCHS[0], again]
    assert report.curve(epochs, "loss") == [(1, 2), (2.0, 0.25)]
    assert report.curve(epochs, "nmi_previous") == []


def test_phases_with_epochs_of_their_own(tmp_path):
    """LSD-C counts the epochs of RotNet and of clustering from 1, each: none replaces another."""
    epochs = report.read(RESULTS / "lsdc-fashionmnist-seed0.jsonl")[1]
    assert [r["phase"] for r in epochs] == ["rotnet"] * 3 + ["clustering"] * 12
    assert all(a["epoch"] < b["epoch"] for a, b in pairwise(epochs[3:]))


@pytest.mark.parametrize(
    "damage, told",
    [
        ('{"epoch": 2, "los', "line 3: no JSON object"),
        ("[1, 2]", "line 3: no JSON object"),
        (json.dumps(EPOCHS[1]), "no result/nmi_labels_untrained; has the run ended?"),
    ],
)
def test_damaged_and_unfinished_logs(tmp_path, capsys, damage, told):
    """One line that names the file, exit code 2, and README.md as it was."""
    (tmp_path / DIGITS.files[0]).write_text(
        "\n".join([json.dumps(HEAD), json.dumps(EPOCHS[0]), damage]) + "\n"
    )
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    said = refused(capsys, "--only", "table", "--folder", tmp_path)
    assert told in said and DIGITS.files[0] in said
    assert (tmp_path / "README.md").read_text() == f"{report.BEGIN}\n{report.END}\n"


def test_exit_code_of_the_script(tmp_path):
    """As a user starts it: a file that is no log, on the command line."""
    (tmp_path / "log.jsonl").write_text("\x00\x01")
    command = [sys.executable, RESULTS / "report.py", "--folder", tmp_path, "--only", "table"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "README.md: wants a line" in done.stderr
    assert done.stdout == ""


# ------------------------------------------------------------------------------------------------------- the picture


@pytest.fixture
def drawing():
    pytest.importorskip("matplotlib", reason="the picture is drawn with matplotlib: pip install matplotlib")


def png_size(path):
    """(width, height) of a PNG whose chunks are whole: magic, header first, end last."""
    data = path.read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and data[-8:-4] == b"IEND"
    return struct.unpack(">II", data[16:24])


def test_the_picture(drawing, tmp_path):
    """All four methods; drawn again it has the size of the one in the repository, which is small."""
    logs = [RESULTS / name for method in report.DRAWN for name in report.seeds(method)]
    assert len(logs) == 12 and all(path.exists() for path in logs)
    report.main(["--only", "curves", "--out", str(tmp_path / "curves.png")])
    for path in (tmp_path / "curves.png", RESULTS / "curves.png"):
        assert png_size(path) == (1600, 900) and path.stat().st_size < 150_000


def test_own_logs(drawing, tmp_path, monkeypatch):
    """Run folders and logs, one that is still going on and one with less in it; README.md is not asked for."""
    monkeypatch.chdir(tmp_path)
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name / "log.jsonl", HEAD, *EPOCHS)
    ir = RESULTS / "local_aggregation-fashionmnist-ir.jsonl"
    report.main(["--logs", "one", "two/log.jsonl", str(ir), "--out", "mine.png"])
    assert png_size(tmp_path / "mine.png") == (800, 900)
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "mine.png"}
    assert report.curve(report.read(ir)[1], "nmi_labels") == []  # "not logged"


@pytest.mark.parametrize("log", ["", "\x00\x01", "{}\n", json.dumps(HEAD) + "\n"])
def test_own_logs_that_are_none(drawing, tmp_path, capsys, log):
    (tmp_path / "log.jsonl").write_text(log)
    assert str(tmp_path) in refused(capsys, "--logs", tmp_path, "--out", tmp_path / "mine.png")
    assert not (tmp_path / "mine.png").exists()


def test_paths_that_are_not_there(drawing, tmp_path, capsys):
    assert "nowhere" in refused(capsys, "--logs", tmp_path / "nowhere")
    write(tmp_path / "log.jsonl", HEAD, *EPOCHS)
    assert "--out" in refused(capsys, "--logs", tmp_path, "--out", tmp_path / "nowhere" / "mine.png")
    assert "no logs" in refused(capsys, "--only", "curves", "--folder", tmp_path)


def test_without_matplotlib(tmp_path, capsys, monkeypatch):
    """One line that names the remedy; the table needs none."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    write(tmp_path / "log.jsonl", HEAD, *EPOCHS)
    assert "pip install matplotlib" in refused(capsys, "--logs", tmp_path)
    (tmp_path / "README.md").write_text(f"{report.BEGIN}\n{report.END}\n")
    report.main(["--only", "table", "--folder", str(tmp_path)])
    assert "| method |" in (tmp_path / "README.md").read_text()
