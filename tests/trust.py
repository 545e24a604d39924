"""What the tests of trust share: a short run of each script, and the ledger behind the README's table.

`pytest` tries a few of everything; `pytest --full tests/test_trust_*.py` the full count, and writes the ledger
to results/trust.json.
"""

import json
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).resolve().parent.parent
LEDGER = ROOT / "results" / "trust.json"

# Runs of a few seconds on one core, with every phase of the method in them.
SMALL = "--data digits --arch lenet5 --image-size 16 --resize 16 --workers 0 --out run --batch-size 128"
RUNS = {
    "deepcluster": "--epochs 3 --k 20",
    "local_aggregation": "--epochs 3 --k 20 --warm-up 1 --background 300 --lr-steps 2",
    "coke": "--epochs 3 --k 10 20 --warm-up 1 --lr 0.05 --dual-lr 1",
    "lsdc": "--epochs 2 --k 10 --neighbours 5 --score-every 1 --pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 128",
}
RUNS = {name: f"{SMALL} {flags}".split() for name, flags in RUNS.items()}


def ordinarily(ledger, script, *scripts):
    """Skip the other scripts, unless all is tried: what the test is about is common.py's, the same for all."""
    if not ledger.full and script not in scripts:
        pytest.skip(
            f"only with --full; without it {' and '.join(scripts)} stand for all, as this is common.py's"
        )


class Ledger:
    """Rows of what was tried, how often, and how often it held."""

    def __init__(self, full):
        self.full, self.rows = full, {}

    def __call__(self, what, script, tried, held, note=""):
        """Note it down, then insist that it held every time; what: a row of the table, script: a column."""
        self.rows[f"{what} | {script}"] = {"tried": tried, "held": held, "note": note}
        assert tried > 0 and held == tried, f"{what}, {script}: held {held} of {tried}. {note}"

    def write(self):
        """Into results/trust.json, beside the rows that were not tried this time."""
        old = json.loads(LEDGER.read_text()) if LEDGER.exists() else {}
        new = {key: {**row, "commit": common.commit()} for key, row in self.rows.items()}
        LEDGER.write_text(json.dumps({**old, **new}, indent=1, sort_keys=True) + "\n")


def table(rows):
    """The ledger as a Markdown table: a row for each thing tried, a column for each script."""
    found = {tuple(key.split(" | ")): row for key, row in rows.items()}
    columns = [c for c in (*RUNS, "all") if any(script == c for _, script in found)]
    lines = ["| tried | " + " | ".join(columns) + " |", "|---" * (1 + len(columns)) + "|"]
    for what in dict.fromkeys(what for what, _ in found):
        cells = [found.get((what, c)) for c in columns]
        shown = [f"{c['held']} of {c['tried']}" if c else "" for c in cells]
        lines.append(f"| {what} | " + " | ".join(shown) + " |")
    return "\n".join(lines)
