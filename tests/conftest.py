"""Shared by all tests: the import path, and ways to run a snippet or a script on several processes."""

import functools
import os
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
pytest.register_assert_rewrite("jobs")

from jobs import QUIET, Server, plain, write_images  # noqa: E402

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


@pytest.fixture(scope="session")
def places(tmp_path_factory):
    """A folder of folders: equal images; unlabelled ones; train/ and val/ of two classes, each with one damaged file."""
    root, gray = tmp_path_factory.mktemp("places"), np.full((32, 32, 3), 90, np.uint8)
    write_images(root / "same", 40, lambda i: gray)
    write_images(root / "flat", 24, size=100)  # too large to be decoded once
    for name in ("a", "b"):
        write_images(root / "both" / "train" / name, 12, size=100)
        write_images(root / "both" / "val" / name, 3, size=100)
    for name in ("train", "val"):
        (root / "both" / name / "b" / "001.png").write_bytes(b"no image")
    (root / "file").write_text("not a folder")
    return root


@pytest.fixture(scope="session")
def run_script(server, places, tmp_path_factory):
    """run_script(script, arguments, code, world, folder, ok): a job of a script, or of code that has its command line,
    to its end, in a folder of its own or in a former job's; ok: it ended well."""

    def go(script, arguments, code=None, world=1, folder=None, ok=True):
        code = f"import os; os.environ['LOCAL_WORLD_SIZE'] = '{world}'\n{code or QUIET + plain(script)}"
        arguments = arguments.replace("PLACES", str(places)).split()
        job = server.start([script, *arguments], code, world, folder or tmp_path_factory.mktemp("job"))
        return job.ok() if ok else job.wait()

    return go


@pytest.fixture(scope="module")
def run(request, run_script):
    """run_script of the test file's SCRIPT."""
    return functools.partial(run_script, request.module.SCRIPT)


@pytest.fixture(scope="module")
def start(request, server, tmp_path_factory):
    """start(arguments, code, world, folder): a Job of the test file's SCRIPT, or of code that has its
    command line, in a folder of its own or in a former job's."""
    script = request.module.SCRIPT

    def go(arguments, code=None, world=1, folder=None):
        folder = folder or tmp_path_factory.mktemp("job")
        return server.start([script, *arguments], code or plain(script), world, folder)

    return go
