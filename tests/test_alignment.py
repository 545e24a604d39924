"""extras/alignment.py: its values are those of whole runs, its picture shows what it is given."""

import json

from extras import alignment

import numpy as np
import pytest
from jobs import ROOT, epochs, plain
from matplotlib.figure import Figure

SCRIPT = ROOT / "deepcluster.py"
FLAGS = "--data digits --out run --batch-size 64 --image-size 20 --workers 0"


def test_values_are_those_with_which_runs_begin(run):
    found = {
        (k, s): epochs(run(f"{FLAGS} --epochs 1 --k {k} --seed {s}").log())[0] for k in (6, 9) for s in (1, 2)
    }
    code = plain(alignment.__file__)
    job = run(f"{FLAGS} --ks 9 6 --seeds 2 --seed 1", code)
    first, *rows = [json.loads(line) for line in (job.run / "alignment.jsonl").read_text().splitlines()]
    assert {"data": "digits", "ks": [9, 6], "seeds": 2, "seed": 1}.items() <= first["args"].items()
    assert [(row["k"], row["seed"]) for row in rows] == [*found]
    assert [row["initial_alignment"] for row in rows] == [row["nmi_labels"] for row in found.values()]
    (low, high), said = sorted(row["initial_alignment"] for row in rows[:2]), job.out.splitlines()[-3]
    assert said == f"K = 6: median {(low + high) / 2:.4f}, min {low:.4f}, max {high:.4f}" and low < high
    assert (job.run / "alignment.png").stat().st_size > 10_000


def test_histograms_and_medians_by_hand(monkeypatch):
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, path: drawn.append(figure))
    alignment.draw_alignment("", {5: [0.1, 0.4, 0.4, 0.205, 0.305], 50: [0.355, 0.365]})
    *panels, curve = drawn[0].axes
    bars = [[(bar.get_x(), bar.get_height()) for bar in axis.patches if bar.get_height()] for axis in panels]
    assert [x for x, _ in bars[0]] == pytest.approx([0.1, 0.2, 0.3, 0.39])  # 30 bars of 0.01 from 0.1 to 0.4
    assert [n for _, n in bars[0]] == [1, 1, 1, 2] and [n for _, n in bars[1]] == [1, 1]
    assert [axis.lines[0].get_xdata()[0] for axis in panels] == pytest.approx([0.305, 0.36])
    assert curve.lines[0].get_xydata() == pytest.approx(np.array([[5, 0.305], [50, 0.36]]))
    light = curve.collections[0].get_paths()[0].vertices
    assert {*light[:, 1]} == {0.1, 0.4, 0.355, 0.365}


def test_without_labels_there_is_nothing_to_compare_with(run):
    job = run("--data PLACES/flat --batch-size 8 --out run", plain(alignment.__file__), ok=False)
    assert job.code == 2 and "labels" in job.err and "Traceback" not in job.err
