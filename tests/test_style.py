"""House style, read from the sources: imports, flags, banners, and what no script may contain."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import common

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["deepcluster", "local_aggregation", "coke", "lsdc"]
SCRIPTS = [*METHODS, "eval_linear"]
OURS = {path.stem for path in ROOT.glob("*.py")}

SECTIONS = ["recipes and options", "network", "the algorithm", "one epoch", "main"]


def source(name):
    return (ROOT / f"{name}.py").read_text()


def tree(name):
    return ast.parse(source(name))


def calls(name, function):
    """All calls of something.function(..) or function(..) in a script."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Call):
            called = node.func
            if function in (getattr(called, "attr", None), getattr(called, "id", None)):
                yield node


def flags(name):
    """[(flag, its add_argument call)] in the order of the script, positional arguments left out."""
    found = [(c.args[0].value, c) for c in calls(name, "add_argument") if isinstance(c.args[0], ast.Constant)]
    found = [(flag, call) for flag, call in found if flag.startswith("--")]
    return sorted(found, key=lambda pair: pair[1].lineno)


def option(call, name):
    return next((k.value for k in call.keywords if k.arg == name), None)


def algorithm(name):
    """The lines between the banner of the algorithm and the next one."""
    return re.split(r"^# %% (the algorithm|one epoch).*$", source(name), flags=re.MULTILINE)[2]


def names_in(text):
    """Every identifier of a piece of code, dotted ones part by part; strings and comments do not count."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }
    return found | {a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_only_common_and_name_what_they_take(name):
    """A method is one file and common.py: no script imports another, none imports *."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            assert not OURS & {a.name.split(".")[0] for a in node.names}, "from module import names"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and "*" not in [a.name for a in node.names]
            assert node.module.split(".")[0] not in OURS - {"common"}


@pytest.mark.parametrize("name", [*SCRIPTS, "common"])
def test_functions_are_short_and_common_is_imported_before_torch(name):
    functions = [f for f in ast.walk(tree(name)) if isinstance(f, ast.FunctionDef)]
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions}
    assert {f: n for f, n in lengths.items() if n > (85 if f in ("main", "options") else 45)} == {}
    order = [line.split()[1] for line in source(name).splitlines() if re.match(r"(from|import) ", line)]
    assert name == "common" or order.index("common") < order.index("torch")


def test_common_imports_no_script():
    modules = {n.module for n in ast.walk(tree("common")) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree("common")) if isinstance(n, ast.Import) for a in n.names}
    assert not OURS & {m.split(".")[0] for m in modules}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_explained(name):
    """Help with a meaning, for every flag."""
    assert flags(name)
    for flag, call in flags(name):
        text = option(call, "help")
        assert text is not None and ast.unparse(text) not in ("''", "argparse.SUPPRESS"), flag


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_used(name):
    """No flag without effect: each is read as args.<name> in the script or in common.py."""
    read = {
        n.attr
        for script in (name, "common")
        for n in ast.walk(tree(script))
        if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) in ("args", "known", "typed")
    }
    assert {flag[2:].replace("-", "_") for flag, _ in flags(name)} <= read


@pytest.mark.parametrize("name", METHODS)
def test_sections_stand_in_the_order_of_the_house(name):
    """Card, then recipes and options, network, the algorithm, one epoch, main."""
    found = re.findall(r"^# %% (.+)$", source(name), flags=re.MULTILINE)
    assert [next((s for s in SECTIONS if title.startswith(s)), title) for title in found] == SECTIONS
    card = ast.get_docstring(tree(name))
    for part in ("Symbols", f"python {name}.py", "torchrun", "What to expect", "Departs"):
        assert part in card, f"the card lacks {part!r}"
    assert source(name).rstrip().endswith('if __name__ == "__main__":\n    main()')


@pytest.mark.parametrize("name", METHODS)
def test_method_files_do_not_know_about_processes_or_devices(name):
    """No rank, barrier, backend or .cuda(): distribution hides behind common.py's verbs."""
    forbidden = {"rank", "get_rank", "barrier", "all_reduce", "cuda"}
    assert not forbidden & names_in(source(name))
    assert not re.search(r"\bnccl\b|\bgloo\b", source(name))


@pytest.mark.parametrize("name", METHODS)
def test_the_algorithm_prints_nothing_and_opens_nothing(name):
    """Pure functions with docstrings: no printing, no files, no globals, no classes."""
    code = ast.parse(algorithm(name))
    assert not {"print", "print_once", "open", "save", "args", "loader"} & names_in(algorithm(name))
    functions = [n for n in code.body if isinstance(n, ast.FunctionDef)]
    assert len(functions) >= 3 and all(ast.get_docstring(f) for f in functions)
    assert not [n for n in ast.walk(code) if isinstance(n, (ast.Global, ast.ClassDef))]


@pytest.mark.parametrize("name", sorted(OURS))
def test_files_are_loaded_without_unpickling(name):
    """torch.load with weights_only=True, never without; no pickle but CIFAR-100's own file of coarse labels."""
    for call in calls(name, "load"):
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(option(call, "weights_only") or ast.Constant(None)) == "True"
    assert f"weights_only={False}" not in source(name)
    assert not {"pickle", "cPickle", "dill", "joblib"} & names_in(source(name)) or name == "common"


def test_names_of_data_sets_and_networks():
    """The names that users type, in the order of the help."""
    assert list(common.SETS) == ["digits", "mnist", "fashionmnist", "cifar10", "cifar100-20", "svhn", "stl10"]
    assert common.ARCHS == ["lenet5", "alexnet", "alexnet-small", "vgg16", "resnet18", "resnet50"]


@pytest.fixture(scope="module")
def helps(tmp_path_factory):
    """Standard output of every script's --help in an empty folder, without a GPU."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "COLUMNS": "500", "OMP_NUM_THREADS": "1"}
    environment |= dict.fromkeys(("http_proxy", "https_proxy", "HTTPS_PROXY"), "http://127.0.0.1:9")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment}
    folder = tmp_path_factory.mktemp("empty")
    running = {}
    for name in SCRIPTS:
        command = [sys.executable, str(ROOT / f"{name}.py"), "--help"]
        running[name] = subprocess.Popen(command, cwd=folder, **pipes)
    results = {}
    for name, process in running.items():
        out, err = process.communicate(timeout=120)
        results[name] = (process.returncode, out, err)
    assert not list(folder.iterdir())  # asking for help leaves nothing behind
    return results


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_works_anywhere(helps, name):
    """Exit code 0 without data, GPU and network; every flag is shown."""
    code, out, err = helps[name]
    assert code == 0 and err == ""
    for flag, _ in flags(name):
        assert re.search(rf"^ +{flag}\b", out, flags=re.MULTILINE), flag
