"""extras/bench.py runs and writes what it measured; a timing is never a test."""

import json
import subprocess
import sys
from pathlib import Path


def test_rows_run_and_are_written(tmp_path):
    command = [
        sys.executable,
        "-m",
        "extras.bench",
        "--quick",
        "--device",
        "cpu",
        "--out",
        tmp_path / "bench.json",
    ]
    root = Path(__file__).parent.parent
    done = subprocess.run(
        [*command, "--only", "labels", "pairs", "augmentation"], cwd=root, capture_output=True
    )
    assert done.returncode == 0, done.stderr.decode()
    report = json.loads((tmp_path / "bench.json").read_text())
    assert len(report["rows"]) == 3 and {"versions", "commit", "load"} <= report.keys()
    for row in report["rows"]:
        ours, reference = row["ours"], row["reference"]
        ratio = ours / reference if row["aim"].startswith("<=") else reference / ours
        assert ours > 0 and row["ratio"] == ratio and row["met"] == ""
