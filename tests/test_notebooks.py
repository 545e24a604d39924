"""The lectures in notebooks/: each runs to its end as a script and learns; what is stored is what the script says.

A notebook is made by `jupytext --set-kernel python3 --to ipynb --execute notebooks/NAME.py`.
"""

import base64
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from jobs import ONE_THREAD

ROOT = Path(__file__).resolve().parent.parent
# Notebook -> by how much its last figure exceeds the random network's, at least: half of the least of three seeds, or less.
GAIN = {"coke": 0.15, "deepcluster": 0.03, "lsdc": 0.13, "local_aggregation": 0.004}


def figures(line):
    """(trained, random network, pixels), in this order in the last line that a notebook prints."""
    names = re.findall(r"[A-Za-z-][A-Za-z -]* (?=0\.\d{3})", line)
    assert [name.strip() for name in names[1:]] == ["random network", "pixels"], line
    return [float(x) for x in re.findall(r"0\.\d{3}", line)]


def cells(text):
    """[(kind, source)] of a percent script."""
    found = []
    for block in re.split(r"^# %%", text, flags=re.MULTILINE)[1:]:
        head, _, body = block.partition("\n")
        lines = body.strip("\n").split("\n")
        markdown = head == " [markdown]"
        assert markdown or not head, head
        found.append(("markdown", [line[2:] for line in lines]) if markdown else ("code", lines))
    return [(kind, "\n".join(lines)) for kind, lines in found]


@pytest.mark.parametrize("name", GAIN)
def test_lectures_run_as_scripts_and_learn(name):
    """In the folder of notebooks or in the root; without warnings."""
    folder = ROOT / "notebooks" if name in ("coke", "lsdc") else ROOT
    command = [sys.executable, str(ROOT / "notebooks" / f"{name}.py")]
    environment = {**os.environ, **ONE_THREAD, "MPLBACKEND": "Agg"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "Warning" not in done.stderr, done.stderr
    trained, random, pixels = figures(done.stdout.splitlines()[-1])
    assert trained > random + GAIN[name] and 0.5 < pixels < 1


@pytest.mark.parametrize("name", GAIN)
def test_stored_notebooks_are_the_scripts_with_their_outputs(name):
    """Equal sources, run once from top to bottom, no error or warning, what is printed or drawn is there, small."""
    path = ROOT / "notebooks" / f"{name}.ipynb"
    stored = json.loads(path.read_text())["cells"]
    sources = [(cell["cell_type"], "".join(cell["source"])) for cell in stored]
    assert sources == cells(path.with_suffix(".py").read_text())
    code = [cell for cell in stored if cell["cell_type"] == "code"]
    assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
    outputs = [output for cell in code for output in cell["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    for cell in code:
        if re.search(r"^(print|plt\.show|show\w*)\(", "".join(cell["source"]), flags=re.MULTILINE):
            assert cell["outputs"], cell["source"]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 5
    trained, random, _ = figures("".join(outputs[-1]["text"]).splitlines()[-1])
    assert trained > random + GAIN[name]
    assert path.stat().st_size < 300 * 1024


def test_pictures_of_the_readme_are_outputs_of_a_notebook():
    cells = json.loads((ROOT / "notebooks" / "lsdc.ipynb").read_text())["cells"]
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    drawn = [
        base64.b64decode("".join(o["data"]["image/png"])) for o in outputs if "image/png" in o.get("data", {})
    ]
    for name in ("pairs-first.png", "pairs-after.png"):
        assert name in (ROOT / "README.md").read_text() and (ROOT / "results" / name).read_bytes() in drawn
