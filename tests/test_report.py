"""results/report.py: the tables are those of the logs, the figures of made-up logs by hand, rows without logs."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parent.parent / "results"
sys.path.insert(0, str(RESULTS))

from common import MAY_CHANGE  # noqa: E402

import report  # noqa: E402

PLACE = "{baselines/random network,result}/nmi_labels"
ENTRY = ("M", "digits", "python m.py --seed S", "m-seed?.jsonl", "NMI", PLACE, ".3f", "none", "a remark")


def write(path, *records):
    path.write_text("".join(json.dumps(r) + "\n" for r in records))


@pytest.fixture
def logs(tmp_path):
    """Two seeds of today's scripts, of which the second was resumed and did epoch 2 twice."""
    about = {"command": "lsdc.py", "commit": "abc1234", "hardware": "NVIDIA H200"}
    args = {"data": "digits", "arch": "lenet5", "image_size": 32}
    for seed, before, after in ((0, 0.5, 0.7), (1, 0.6, 0.9)):
        epochs = [{"epoch": e, "loss": 1.0, "seconds": 60 * (1 + seed)} for e in (1, 2, 2)[: 2 + seed]]
        end = {"result": {"nmi_labels": after, "clusters": 9, "empty": 1}}
        end["baselines"] = {"random network": {"nmi_labels": before}}
        write(tmp_path / f"m-seed{seed}.jsonl", {**about, "args": {**args, "seed": seed}}, *epochs, end)
    (tmp_path / "origin.json").write_text('{"m.jsonl": {"commit": "0000001", "hardware": "1 core"}}')
    return tmp_path


def test_readme_has_the_tables_of_the_logs():
    text = (RESULTS / "README.md").read_text()
    assert text == report.readme(text, RESULTS / "logs"), "run python results/report.py"


def test_readme_links_to_every_log():
    """Figures that the table leaves out have their log linked in the text; no link leads nowhere."""
    linked = set(re.findall(r"\(logs/([^)]*)\)", (RESULTS / "README.md").read_text()))
    here = {path.name for path in (RESULTS / "logs").iterdir()} - {"origin.json"}
    assert linked == here


def test_figures_by_hand(logs):
    cells = dict(zip(report.TITLES, report.row(ENTRY, logs), strict=True))
    assert cells["command"] == "`python m.py --seed S`"
    assert cells["seeds, one by one"] == "0.500 / 0.700; 0.600 / 0.900"
    assert cells["mean"] == "0.550 / 0.800"
    assert cells["deviation"] == "0.071 / 0.141"  # of two: their difference / sqrt(2)
    assert cells["minutes a run"] == "2.0, 4.0; a remark"
    assert cells["hardware"] == "NVIDIA H200" and cells["commit"] == "abc1234"
    assert cells["logs"] == "[seed 0](logs/m-seed0.jsonl), [seed 1](logs/m-seed1.jsonl)"


def test_an_earlier_log_and_its_evaluation(logs):
    """Its minutes stand at its end, its commit in origin.json; one seed has no deviation."""
    write(
        logs / "m.jsonl", {"args": {"seed": 3}}, {"epoch": 1, "seconds": {"training": 7}}, {"minutes": 1.25}
    )
    (logs / "m-eval.json").write_text(json.dumps({"stages": [{"test": 0.825}, {"test": 0.9}]}))
    entry = (*ENTRY[:3], "m.jsonl", "probes", "eval/stages/{0,1}/test", ".1%", "80", "")
    links = "[seed 3](logs/m.jsonl), [probes](logs/m-eval.json)"
    assert report.row(entry, logs)[4:] == ["82.5 / 90.0"] * 2 + ["", "80", "1.2", "1 core", "0000001", links]


def tables(logs, rows):
    """The lines of the short table and of the long one, in a README that had others."""
    long, short = (
        [f"<!-- {x}: python results/report.py -->", f"<!-- end of {x} -->"] for x in ("table", "short table")
    )
    around = [f"a\n{short[0]}", f"{short[1]}\nb\n{long[0]}", f"{long[1]}\nc"]
    parts = report.readme("\nold\n".join(around), logs, rows).split("\n\n")
    assert parts[::2] == around
    return [part.splitlines() for part in parts[1::2]]


def test_both_tables_stand_between_their_marks(logs):
    short, long = tables(logs, [ENTRY])
    assert len(long) == 3 and "| 0.550 / 0.800 | 0.071 / 0.141 |" in long[2]
    assert short == [  # in %; deviations as above
        "| method | data, network | K, images | runs | NMI |",
        "| --- | --- | --- | --- | --- |",
        "| random network (LSD-C) | digits, lenet5 | 10, train | 2 | 55.0 ± 7.1 |",
        "| LSD-C | digits, lenet5 | 10, train | 2 | 80.0 ± 14.1 |",
    ]


def test_a_row_without_logs_is_left_out(logs):
    absent = (*ENTRY[:3], "n-seed?.jsonl", *ENTRY[4:])
    assert report.row(absent, logs) is None
    assert tables(logs, [absent, ENTRY, absent]) == tables(logs, [ENTRY])


def test_the_short_table_leaves_out_variants_and_earlier_scripts(logs):
    text = (logs / "m-seed0.jsonl").read_text().replace("lsdc.py", "coke.py")
    names = ["m-init-seed0.jsonl", "n.jsonl"]
    rows = [
        ENTRY,
        (*ENTRY[:3], names[0], *ENTRY[4:]),
        ("M, earlier script", *ENTRY[1:3], names[1], *ENTRY[4:]),
    ]
    for name in names:
        (logs / name).write_text(text)
    (short, long), (same, _) = tables(logs, rows), tables(logs, [ENTRY])
    assert short == same and len(long) == 5


def test_a_run_that_has_not_ended_is_named(logs):
    write(logs / "m-seed1.jsonl", {"args": {"seed": 1}, "commit": "abc1234"}, {"epoch": 1, "seconds": 1})
    with pytest.raises(SystemExit, match="m-seed.*has every run ended"):
        report.row(ENTRY, logs)


ROWS = [entry for entry in report.ROWS if "earlier" not in entry[0] and entry[1] != report.PHOTOS]
ROWS = [entry for entry in ROWS if "eval_linear" not in entry[2].split(";")[0]]


@pytest.mark.parametrize("entry", ROWS, ids=lambda entry: f"{entry[3]}: {entry[4]}")
def test_commands_are_those_of_the_logs(entry):
    """What the table prints as typed gives the arguments that the log has, by today's recipes. Those of photographs
    follow from the folder, which is not here."""
    command, settled = (
        entry[2].split(";")[0],
        {"recipe", "head", "num_neighbors", "ir_loss"},
    )  # with the data at hand
    for path in (path for name in entry[3].split() for path in report.HERE.glob(f"logs/{name}")):
        ran = json.loads(path.read_text().split("\n")[0])["args"]
        script, *flags = command.replace("seed S", f"seed {ran['seed']}").split()[1:]
        settled |= {"dual_lr"} if ran.get("ratio") == 0 else set()  # without a bound no dual variable moves
        typed = vars(importlib.import_module(script.removesuffix(".py")).options(flags))
        compared = typed.keys() & ran.keys() - MAY_CHANGE - settled
        assert len(compared) > 15 and {k: typed[k] for k in compared} == {k: ran[k] for k in compared}
