"""Shared by all tests: the import path, and ways to run a snippet or a script on several processes."""

import json
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("jobs")

from jobs import Server, plain  # noqa: E402
from trust import LEDGER, Ledger, table  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--full", action="store_true", help="the full count of the tests of trust (an hour)")


@pytest.fixture(scope="session")
def ledger(request):
    """ledger(what, script, tried, held, note): see trust.py."""
    full = request.config.getoption("--full")
    ledger = Ledger(full)
    yield ledger
    if full:
        ledger.write()


def pytest_terminal_summary(terminalreporter, config):
    if config.getoption("--full") and LEDGER.exists():
        terminalreporter.write_line(table(json.loads(LEDGER.read_text())))


@pytest.fixture(scope="session")
def server():
    server = Server()
    yield server
    server.close()


@pytest.fixture
def launch(server, tmp_path):
    """launch(code, world, limit): run code on `world` processes in tmp_path; .codes, .out, .err by rank."""

    def run(code, world=2, limit=40):
        job = server.start(["script.py"], textwrap.dedent(code), world, tmp_path).wait(limit)
        out, err = job.by_process("out"), job.by_process("err")
        return SimpleNamespace(codes=job.codes, out=out, err=err, path=tmp_path)

    run.path = tmp_path
    return run


@pytest.fixture(scope="module")
def start(request, server, tmp_path_factory):
    """start(arguments, code, world, folder): a Job of the test file's SCRIPT, or of code that has its
    command line, in a folder of its own or in a former job's."""
    script = request.module.SCRIPT

    def go(arguments, code=None, world=1, folder=None):
        folder = folder or tmp_path_factory.mktemp("job")
        return server.start([script, *arguments], code or plain(script), world, folder)

    return go
