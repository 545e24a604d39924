"""extras/table.py: rows, numbers and layouts of made-up logs, by hand."""

import json

from extras import table

import pytest

ABOUT = {"data": "digits", "arch": "lenet5", "image_size": 32, "center_fraction": 1.0, "lr": 0.1}
COLUMNS = "| method | data, network | K, images | runs | "


def scores(acc, nmi=0.5, ari=0.25):
    return {"acc_labels": acc, "nmi_labels": nmi, "ari_labels": ari}


def log(path, command, seed, end, **args):
    """A run folder's log, or a log, of two epochs; end: its last record, if it has ended."""
    path = path / "log.jsonl" if path.suffix == "" else path
    path.parent.mkdir(exist_ok=True)
    first = {"command": command, "args": {**ABOUT, "out": str(path), "workers": seed, "seed": seed, **args}}
    records = [first, {"epoch": 1, "loss": 2.0}, {"epoch": 2, "loss": 1.0}, *([end] if end else [])]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path.parent if path.name == "log.jsonl" else path


def result(ours, **baselines):
    """The last record as deepcluster.py and local_aggregation.py write it."""
    return {"result": {"clusters": 19, "empty": 1, **ours}, "baselines": baselines}


def evaluation(path, command="eval_linear.py RUN", knn=None, stages=None, **args):
    stages = {name: {"test_last": 0.0, "report": share} for name, share in (stages or {}).items()}
    args = {**ABOUT, "seed": 0, "run": None, "protocol": "deepcluster", **args}
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"command": command, "args": args, "stages": stages, "knn": knn or {}}))
    return path


def lines(capsys, *runs):
    """What the command prints, without the line below the titles."""
    table.main([str(run) for run in runs])
    out = capsys.readouterr().out.splitlines()
    return [out[0], *out[2:]]


def test_seeds_are_one_row_and_baselines_have_their_own(tmp_path, capsys):
    """ACC 0.4, 0.5, 0.9: mean 0.6, squared deviations 0.04 + 0.01 + 0.09, over 2: 0.07, its root 0.2646."""
    runs = []
    for seed, acc in enumerate((0.4, 0.5, 0.9)):
        others = {"random network": scores(0.2), "pixels": scores(0.3), "chance": scores(0.1 + seed / 10)}
        end = result(scores(acc), **others)
        runs.append(log(tmp_path / f"r{seed}", f"deepcluster.py --seed {seed}", seed, end))
    assert lines(capsys, *runs) == [
        COLUMNS + "ACC | NMI | ARI |",
        "| chance | digits | 20, train | 3 | 20.0 ± 10.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |",
        "| pixels | digits, 32 pixels | 20, train | 3 | 30.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |",
        "| random network (DeepCluster) | digits, lenet5 | 20, train | 3 | 20.0 ± 0.0 | 50.0 ± 0.0 | 25.0 ± 0.0 |",
        "| DeepCluster | digits, lenet5 | 20, train | 3 | 60.0 ± 26.5 | 50.0 ± 0.0 | 25.0 ± 0.0 |",
    ]
    assert lines(capsys, runs[0], runs[0])[-1] == (  # one seed: no deviation, and twice the same is once
        "| DeepCluster | digits, lenet5 | 20, train | 1 | 40.0 | 50.0 | 25.0 |"
    )


def test_test_images_where_there_are_some_and_the_head_of_coke(tmp_path, capsys):
    heads = [{"k": k, "train": scores(0.9), "test": scores(acc)} for k, acc in ((10, 0.1), (20, 0.6))]
    end = result({"head": 20, "heads": heads}, pixels=scores(0.3))
    coke = log(tmp_path / "coke", "coke.py", 0, end, k=[10, 20])
    parts = [{"train": scores(0.9), "test": scores(acc), "both": scores(0.8)} for acc in (0.7, 0.2)]
    end = {"result": {"clusters": 20, "empty": 0, "scores": parts[0], "baselines": {"RotNet": parts[1]}}}
    lsdc = log(tmp_path / "lsdc", "lsdc.py", 0, end)
    found = [line.split(" | ") for line in lines(capsys, coke, lsdc)[1:]]
    assert [[line[0], *line[2:5]] for line in found] == [
        ["| pixels", "20, test", "1", "30.0"],
        ["| CoKe", "20, test", "1", "60.0"],
        ["| RotNet (LSD-C)", "20, test", "1", "20.0"],
        ["| LSD-C", "20, test", "1", "70.0"],
    ]


def names(found):
    return [line.split(" | ")[0].removeprefix("| ") for line in found[1:]]


def test_flags_name_rows_where_there_are_several(tmp_path, capsys):
    """As they were typed; all that differ where that does not tell rows apart; paths of --init per seed are one row."""

    def run(name, seed=0, typed="", **args):
        return log(
            tmp_path / name, f"coke.py --seed {seed}{typed}", seed, result(scores(0.5 + seed / 10)), **args
        )

    bound, again = run("a", ratio=0.9, amp=True), run("b", 1, ratio=0.9, amp=True)
    free = run("c", typed=" --ratio 0 --lr=0.1 --no-amp --out x", ratio=0.0, amp=False, epochs=7)
    assert names(lines(capsys, bound, again)) == ["CoKe"]
    assert names(lines(capsys, bound, free, again)) == ["CoKe", "CoKe --ratio 0 --no-amp"]
    assert names(lines(capsys, run("d", lr=0.1), run("e", lr=0.2))) == ["CoKe --lr 0.1", "CoKe --lr 0.2"]
    started = [run(f"f{s}", s, f" --init a-seed{s}", init=f"a-seed{s}", normalize=[s]) for s in (0, 1)]
    assert names(lines(capsys, *started, run("g", init=None))) == ["CoKe --init a-seedS", "CoKe"]
    moved = [run("h", data="x/photos/train"), run("i", data="y/photos"), run("j", 1, data="photos")]
    assert [line.split(" | ")[1:4] for line in lines(capsys, *moved)[1:]] == [
        ["folder photos, lenet5", "20, train", "2"]
    ]


def test_baselines_of_several_methods(tmp_path, capsys):
    """Pixels are shared, kNN of one added to k-means of the other; random networks are their method's."""
    pixels, random = scores(0.3), {"random network": scores(0.2)}
    one = log(tmp_path / "one", "deepcluster.py", 0, result(scores(0.5), pixels=pixels, **random))
    end = result(scores(0.6), pixels=pixels, **random)
    spaces = {"center crops": 0.9, "memory bank": 0.8, "pixels": 0.7, "random network": 0.6}
    end["knn"] = {name: {"knn_1": share, "knn_200": share - 0.5} for name, share in spaces.items()}
    two = log(tmp_path / "two", "local_aggregation.py --loss ir", 0, end, loss="ir")
    three = log(tmp_path / "three", "deepcluster.py", 1, result(scores(0.5), pixels=pixels))
    found = [line.split(" | ") for line in lines(capsys, one, two, three)]
    assert found[0][4:] == ["ACC", "NMI", "ARI", "kNN, K=1", "kNN, K=200 |"]
    assert {line[0]: [line[3], line[4], *line[7:]] for line in found[1:]} == {
        "| pixels": ["2", "30.0 ± 0.0", "70.0 (1)", "20.0 (1) |"],
        "| random network (DeepCluster)": ["1", "20.0", "", " |"],
        "| DeepCluster": ["2", "50.0 ± 0.0", "", " |"],
        "| random network (Local Aggregation)": ["1", "20.0", "60.0", "10.0 |"],
        "| instance recognition": ["1", "60.0", "90.0", "40.0 |"],
        "| instance recognition, memory bank": ["1", "", "80.0", "30.0 |"],
    }


def test_evaluations(tmp_path, capsys):
    """Beside a run, beside a log, and alone; of other data, of other protocols."""
    knn = {"last feature": {"1": 0.7, "200": 0.6}, "embedding": {"1": 0.5, "200": 0.4}}
    run = log(tmp_path / "run", "coke.py", 3, result(scores(0.5)))
    evaluation(run / "eval_linear-digits.json", knn=knn, stages={"conv1": 0.8})
    evaluation(run / "eval_linear-digits-la.json", stages={"conv1": 0.85}, protocol="la")
    evaluation(run / "eval_linear-svhn.json", stages={"conv1": 0.3}, data="svhn")
    bare = log(tmp_path / "bare.jsonl", "coke.py", 4, result(scores(0.5)))
    evaluation(tmp_path / "bare-eval.json", stages={"conv1": 0.9})
    evaluation(
        tmp_path / "low" / "eval_linear-digits.json",
        "eval_linear.py --random lenet5",
        random="lenet5",
        stages={"conv1": 0.2},
    )
    kind = {"random": "lenet5", "finetune": True, "protocol": "finetune"}
    evaluation(tmp_path / "low" / "eval_linear-digits-finetune.json", stages={"output": 0.95}, **kind)
    pixels = evaluation(tmp_path / "pixels.json", knn=knn, pixels=True)
    found = [line.strip("|").split("|") for line in lines(capsys, run, bare, tmp_path / "low", pixels)]
    found = [[cell.strip() for cell in line] for line in found]
    assert found[0][7:] == ["kNN, K=1", "kNN, K=200", "conv1", "conv1 la", "fine-tuned"]
    assert {line[0]: line[2:5] + line[7:] for line in found[1:]} == {
        "supervised": ["", "1", "", "", "", "", "", "95.0"],
        "random network": ["", "1", "", "", "", "20.0", "", ""],
        "pixels": ["", "1", "", "70.0", "60.0", "", "", ""],
        "pixels, embedding": ["", "1", "", "50.0", "40.0", "", "", ""],
        "CoKe": ["20, train", "2", "50.0 ± 0.0", "70.0 (1)", "60.0 (1)", "85.0 ± 7.1", "85.0 (1)", ""],
        "CoKe, embedding": ["20, train", "1", "", "50.0", "40.0", "", "", ""],
        "CoKe on svhn": ["20, train", "1", "", "", "", "30.0", "", ""],
    }


LATEX = r"""\begin{tabular}{lllrrrr}
\toprule
method & data, network & K, images & runs & ACC & NMI & ARI \\
\midrule
LSD-C & digits, lenet5 & 20, train & 1 & $50.0$ & $50.0$ & $-25.0$ \\
\midrule
CoKe -{}-ratio 0 & folder my\_set\&100\%, lenet5 & 20, train & 1 & $50.0$ & $50.0$ & $25.0$ \\
CoKe & folder my\_set\&100\%, lenet5 & 20, train & 2 & $50.0 \pm 70.7$ & $50.0 \pm 0.0$ & $25.0 \pm 0.0$ \\
\bottomrule
\end{tabular}
"""


def test_latex(tmp_path, capsys):
    about, command = {"data": "my_set&100%"}, "coke.py --ratio 0"
    runs = [log(tmp_path / "a", command, 0, result(scores(0.5)), ratio=0, **about)]
    runs += [log(tmp_path / f"b{s}", "coke.py", s, result(scores(s)), ratio=1, **about) for s in (0, 1)]
    runs += [log(tmp_path / "c", "lsdc.py", 0, result(scores(0.5, ari=-0.25)))]
    table.main(["--latex", *map(str, runs)])
    assert capsys.readouterr().out == LATEX


def test_runs_that_have_not_ended_are_left_out_by_name(tmp_path, capsys):
    ended, cut = (
        log(tmp_path / "a", "coke.py", 0, result(scores(0.5))),
        log(tmp_path / "b", "coke.py", 1, None),
    )
    unlabelled = log(tmp_path / "c", "coke.py", 2, result({}, pixels={}))
    torn = log(tmp_path / "d", "coke.py", 3, None)
    (torn / "log.jsonl").write_text('{"command": "cok')
    (tmp_path / "other").mkdir()
    lines = [{"command": "transfer.py --random lenet5", "args": {"seed": 0}}, {"result": {}}]
    (tmp_path / "other" / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    table.main([str(x) for x in (cut, ended, unlabelled, torn, tmp_path / "none", tmp_path / "other")])
    out, err = capsys.readouterr()
    *err, last = err.splitlines(keepends=True)
    assert last == f"left out: {tmp_path}/other (no run of these methods)\n"
    err = "".join(err)
    assert "| 1 | 50.0 | 50.0 | 25.0 |" in out and len(out.splitlines()) == 3
    assert [line.split(" (")[0] for line in err.splitlines()] == [
        f"left out: {x}" for x in (cut, torn, tmp_path / "none")
    ]
    assert "(it has not ended)" in err.splitlines()[0]
    for runs, said in (([unlabelled], 1), ([cut], 2), ([tmp_path / "none"], 2)):
        with pytest.raises(SystemExit) as end:
            table.main([str(run) for run in runs])
        out, err = capsys.readouterr()
        assert end.value.code == 2 and out == "" and len(err.splitlines()) == said
        assert err.splitlines()[-1].endswith("error: no run that has ended, with labels")
