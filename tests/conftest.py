"""Shared by all tests: the import path, and ways to run a snippet or a script on several processes."""

import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("jobs")

from jobs import Server, plain  # noqa: E402

if "PYTEST_XDIST_WORKER" in os.environ:  # several at once: threads of one would wait for those of another
    torch.set_num_threads(1)


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
