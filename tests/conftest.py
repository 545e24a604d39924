"""Shared by all tests: the import path, and a way to run a snippet on several processes."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

# A server that has imported common once and forks the processes of each request: a start costs
# milliseconds instead of the seconds that `import torch` takes. It does no arithmetic of its own,
# so there are no threads to lose in the fork. Ranks and addresses are given as torchrun gives them.
SERVER = """
import json, os, signal, socket, sys, time, traceback
import torch, common
torch.set_num_threads(1)
def child(rank, request, port):
    os.chdir(request["folder"])
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{name}.{rank}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(request["world"]),
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    sys.argv = ["script.py"]
    code = 0
    try:
        exec(compile(request["code"], "snippet", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
        code = 70
    sys.stdout.flush(); sys.stderr.flush()
    os._exit(code)
for line in sys.stdin:
    request = json.loads(line)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    running, codes, end = {}, [None] * request["world"], time.time() + request["limit"]
    for rank in range(request["world"]):
        pid = os.fork()
        if pid == 0:
            child(rank, request, port)
        running[pid] = rank
    while running and time.time() < end:
        for pid in list(running):
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[running.pop(pid)] = os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    for pid in running:  # what is left hangs: its code stays None
        os.kill(pid, signal.SIGKILL); os.waitpid(pid, 0)
    print(json.dumps(codes), flush=True)
"""


@pytest.fixture(scope="session")
def _server():
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    server = subprocess.Popen([sys.executable, "-c", SERVER], env=environment, **pipes)
    yield server
    server.kill()
    server.wait()


@pytest.fixture
def launch(_server, tmp_path):
    """launch(code, world, limit): run code on `world` processes in tmp_path; .codes, .out, .err by rank."""

    def run(code, world=2, limit=40):
        request = {"code": textwrap.dedent(code), "world": world, "limit": limit, "folder": str(tmp_path)}
        _server.stdin.write(json.dumps(request) + "\n")
        _server.stdin.flush()
        codes = json.loads(_server.stdout.readline())
        out, err = ([(tmp_path / f"{s}.{r}").read_text() for r in range(world)] for s in ("out", "err"))
        return SimpleNamespace(codes=codes, out=out, err=err, path=tmp_path)

    run.path = tmp_path
    return run
