"""House style, read from the sources: imports, flags, banners, and what no script may contain.

A script that does not exist yet is passed over: it joins with its first line.
"""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import legacy

import pytest

ROOT = Path(__file__).resolve().parent.parent
METHODS = ["deepcluster", "local_aggregation", "coke", "lsdc"]
METHODS = [name for name in METHODS if (ROOT / f"{name}.py").exists()]
SCRIPTS = [*METHODS, "eval_linear"]
# The others stand on legacy.py, the earlier common.py, and share flags and sections until they have moved.
MOVED = {"deepcluster", "local_aggregation", "lsdc", "eval_linear"}
UNMOVED = [name for name in METHODS if name not in MOVED]
OURS = {path.stem for path in ROOT.glob("*.py")}

# The flags that these share, in their order.
SHARED = "data root arch k epochs batch-size lr wd image-size workers seed device amp compile".split()  # noqa: SIM905
SHARED = [f"--{name}" for name in [*SHARED, "out", "overwrite", "save-every"]]
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
    return re.split(r"^# -{60,} (.+)$", source(name), flags=re.MULTILINE)[
        2 * SECTIONS.index("the algorithm") + 2
    ]


def shared(name):
    """The module of ours that a script imports."""
    return "common" if name in MOVED else "legacy"


def names_in(text):
    """Every identifier of a piece of code, dotted ones part by part; strings and comments do not count."""
    nodes = list(ast.walk(ast.parse(text)))
    found = {n.id for n in nodes if isinstance(n, ast.Name)} | {
        n.attr for n in nodes if isinstance(n, ast.Attribute)
    }
    return found | {a.name for n in nodes if isinstance(n, (ast.Import, ast.ImportFrom)) for a in n.names}


def test_there_is_a_script_to_look_at():
    assert "deepcluster" in METHODS and "common" in OURS


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_import_only_the_shared_module_and_name_what_they_take(name):
    """A method is one file and the shared module: no script imports another, none imports *."""
    for node in ast.walk(tree(name)):
        if isinstance(node, ast.Import):
            assert not OURS & {a.name.split(".")[0] for a in node.names}, "from module import names"
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0 and "*" not in [a.name for a in node.names]
            assert node.module.split(".")[0] not in OURS - {shared(name)}


@pytest.mark.parametrize("name", ["common", "legacy"])
def test_the_shared_modules_import_no_script(name):
    modules = {n.module for n in ast.walk(tree(name)) if isinstance(n, ast.ImportFrom)}
    modules |= {a.name for n in ast.walk(tree(name)) if isinstance(n, ast.Import) for a in n.names}
    assert not OURS & {m.split(".")[0] for m in modules}


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_flag_is_explained(name):
    """Help with a meaning, for every flag."""
    assert flags(name)
    for flag, call in flags(name):
        text = option(call, "help")
        assert text is not None and ast.unparse(text) not in ("''", "argparse.SUPPRESS"), flag


@pytest.mark.parametrize("name", UNMOVED)
def test_shared_flags_come_first_and_in_their_order(name):
    """The same flags in the same order, before any other."""
    names = [flag for flag, _ in flags(name)]
    assert names[: len(SHARED)] == SHARED and len(set(names)) == len(names)


@pytest.mark.parametrize("name", UNMOVED)
def test_shared_flags_are_declared_alike(name):
    """The copies agree with coke.py's in type and kind; only defaults and help are each script's own."""

    def kind(script):
        found = {}
        for flag, call in flags(script):
            if flag in SHARED:
                parts = [option(call, k) for k in ("type", "choices")] + [option(call, "action")]
                found[flag] = [None if p is None else ast.unparse(p) for p in parts]
        return found

    theirs, wanted = kind(name), kind("coke")
    if name == "lsdc":  # it alone clusters vectors
        wanted["--arch"][1] = "[*ARCHS, 'mlp']"
    for flag, want in wanted.items():
        assert theirs[flag] == want, flag


@pytest.mark.parametrize("name", UNMOVED)
def test_every_flag_is_used(name):
    """No flag without effect: each is read as args.<name> in the script or in legacy.py."""
    read = {
        n.attr
        for script in (name, "legacy")
        for n in ast.walk(tree(script))
        if isinstance(n, ast.Attribute) and getattr(n.value, "id", None) == "args"
    }
    assert {flag[2:].replace("-", "_") for flag, _ in flags(name)} <= read


@pytest.mark.parametrize("name", UNMOVED)
def test_sections_stand_in_the_order_of_the_house(name):
    """Card, then recipes and options, network, the algorithm, one epoch, main."""
    assert re.findall(r"^# -{60,} (.+)$", source(name), flags=re.MULTILINE) == SECTIONS
    card = ast.get_docstring(tree(name))
    for part in ("Symbols", f"python {name}.py", "torchrun", "What to expect", "Departs"):
        assert part in card, f"the card lacks {part!r}"
    assert source(name).rstrip().endswith('if __name__ == "__main__":\n    main()')


@pytest.mark.parametrize("name", UNMOVED)
def test_method_files_do_not_know_about_processes_or_devices(name):
    """No rank, barrier, backend or .cuda(): distribution hides behind the shared module's verbs."""
    forbidden = {"rank", "dist", "distributed", "barrier", "all_reduce", "all_gather", "broadcast", "cuda"}
    assert not forbidden & names_in(source(name))
    assert not re.search(r"\bnccl\b|\bgloo\b", source(name))


@pytest.mark.parametrize("name", UNMOVED)
def test_the_algorithm_prints_nothing_and_opens_nothing(name):
    """Pure functions with docstrings: no printing, no files, no globals, no classes."""
    code = ast.parse(algorithm(name))
    assert not {"print", "say", "open", "save"} & names_in(algorithm(name))
    functions = [n for n in code.body if isinstance(n, ast.FunctionDef)]
    assert len(functions) >= 3 and all(ast.get_docstring(f) for f in functions)
    assert not [n for n in ast.walk(code) if isinstance(n, (ast.Global, ast.ClassDef))]


@pytest.mark.parametrize("name", sorted(OURS))
def test_files_are_loaded_without_unpickling(name):
    """torch.load with weights_only=True, never without; no pickle but CIFAR-100's own file of coarse labels."""
    for call in calls(name, "load"):
        if ast.unparse(call.func) == "torch.load":
            assert ast.unparse(option(call, "weights_only") or ast.Constant(None)) == "True"
    assert "weights_only=False" not in source(name)
    assert not {"pickle", "cPickle", "dill", "joblib"} & names_in(source(name)) or name == "common"


def test_names_of_data_sets_and_networks():
    """The names that users type, in the order of the help."""
    assert legacy.DATASETS == ["digits", "mnist", "fashionmnist", "cifar10", "cifar100-20", "svhn", "stl10"]
    assert legacy.ARCHS == ["lenet5", "alexnet", "alexnet-small", "vgg16", "resnet18", "resnet50"]


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
