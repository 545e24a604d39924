"""extras/visualize.py: the numbers that are drawn, the page and its images, whole runs, what ends in one line."""

import base64
import io
import re
import shutil
import subprocess
from html.parser import HTMLParser

import common
from extras import visualize

import numpy as np
import pytest
import torch
from jobs import ROOT, read_assignments, refusal
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox
from PIL import Image

FILES = "--data PLACES/both --recipe digits --batch-size 8 --image-size 16 --epochs 2 --out run"
RUNS = {
    "deepcluster": f"{FILES} --k 4 --pca 5",
    "deepcluster pic": f"{FILES} --clustering pic --pca 5",
    "local_aggregation": f"{FILES} --k 4 --ir-epochs 1",
    "coke": f"{FILES} --k 4 2 --warmup-epochs 1 --dim 16",
    "lsdc": f"{FILES} --k 3 --num-neighbors 2 --pretrain rotnet --pretrain-epochs 1 --pretrain-batch-size 8",
}
PICTURES = ["map.png", "curves.png", "confusion.png"]
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Page(HTMLParser):
    """sections: [(heading, {alt: decoded image})]; images[-1]: those that follow them; text: all of it."""

    def __init__(self, path):
        super().__init__()
        self.heads, self.images, self.text = [], [{}], ""
        self.feed(path.read_text(encoding="utf-8"))
        self.sections = list(zip(self.heads, self.images, strict=False))

    def handle_starttag(self, tag, attributes):
        if tag == "section":
            self.heads.append("")
        if tag == "img":
            src, alt, title = (dict(attributes)[name] for name in ("src", "alt", "title"))
            assert alt == title and alt not in self.images[-1]
            self.images[-1][alt] = Image.open(io.BytesIO(base64.b64decode(src.split(",")[1]))).convert("RGB")

    def handle_endtag(self, tag):
        self.images += [{}] if tag == "section" else []

    def handle_data(self, data):
        self.text += data
        if len(self.heads) == len(self.images):  # within a section
            self.heads[-1] += data.strip("\n")


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path: found.append(self))
    return found


@pytest.fixture(scope="module")
def visualized(run_script):
    """{name: the folder of a run of RUNS with its pictures}, each made once."""
    done = {}

    def go(name):
        if name not in done:
            done[name] = run_script(f"{ROOT}/{name.split()[0]}.py", RUNS[name]).run
            visualize.main([str(done[name]), "--html", "--workers", "0"])
        return done[name]

    return go


def test_curves_are_those_of_the_log_with_phases(drawn):
    epochs = [
        {"phase": "rotnet", "loss": 1.25, "ln_k": 1.5, "rotation_accuracy": 0.5},  # its name in old logs
        {"phase": "rotnet", "loss": 0.75, "uniform": 1.5, "rotation_accuracy": 0.625},
        {"phase": "lsdc", "loss": 0.5, "uniform": 0.25},
        {"phase": "lsdc", "loss": 0.375, "uniform": 0.25, "acc_labels": 0.0, "nmi_previous": None},
    ]
    visualize.draw_curves("curves.png", *visualize.curves(epochs))
    lines = [{x.get_label(): x.get_xydata().tolist() for x in axis.lines} for axis in drawn[0].axes]
    lines = [{name: x for name, x in part.items() if name[0] != "_"} for part in lines]
    assert lines[0]["loss"] == [[1, 1.25], [2, 0.75], [3, 0.5], [4, 0.375]]
    assert lines[0]["of a uniform prediction"] == [[1, 1.5], [2, 1.5], [3, 0.25], [4, 0.25]]
    assert lines[1] == {"rotation_accuracy": [[1, 0.5], [2, 0.625]], "acc_labels": [[4, 0.0]]}
    for axis in drawn[0].axes:
        assert [x.get_xdata()[0] for x in axis.lines if x.get_label()[0] == "_"] == [0.5, 2.5]
        assert [text.get_text() for text in axis.texts] == ["rotnet", "lsdc"]


def test_tsne_keeps_far_groups_apart_and_takes_few_images():
    odd = torch.arange(40) % 2
    z = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)) + 100 * odd[:, None]
    places = visualize.tsne(z)
    assert places.min(0).tolist() == [0, 0] and places.max(0).tolist() == pytest.approx([1, 1])
    distance = np.square(places[:, None] - places).sum(2) + 9 * np.eye(40)
    assert (odd[distance.argmin(1)] == odd).all()
    assert (visualize.tsne(z) == places).all() and np.isfinite(visualize.tsne(z[:2])).all()
    with pytest.raises(ValueError, match="equal"):
        visualize.tsne(torch.ones(5, 3))


def test_the_map_has_a_color_for_each_cluster_and_images_far_apart(drawn):
    places = np.array([[0, 0], [1, 0], [0.5, 0], [0.9, 0], [0.1, 0]])
    assert visualize.spread_out(places, 3) == [0, 1, 2] and len(visualize.spread_out(places, 9)) == 5
    assign, labels = torch.tensor([2, 2, 0, 0, 25]), torch.tensor([0, -1, 1, 1, 2])
    images = {i: Image.new("RGB", (8, 8), "red") for i in (0, 2)}
    visualize.draw_map("map.png", places, assign, labels, ["_a$", "b", "猫"], images)
    left, right = drawn[0].axes
    assert left.collections[0].get_offsets().tolist() == places.tolist()
    a, b, c, d, e = map(tuple, left.collections[0].get_facecolors())
    assert a == b and c == d and len({a, c, e}) == 3
    boxes = [x for x in left.artists if isinstance(x, AnnotationBbox)]
    assert [x.xy for x in boxes] == [(0, 0), (0.5, 0)] and [x.patch.get_edgecolor() for x in boxes] == [a, c]
    assert [x.get_text() for x in left.texts] == ["2", "0"]
    assert right.collections[0].get_offsets().tolist() == places[[0, 2, 3, 4]].tolist()  # of known label
    assert [x.get_text() for x in right.get_legend().get_texts()] == [r" _a\$", " b", " 2"]


def test_central_images_come_first_of_the_largest_clusters(monkeypatch):
    z = torch.tensor([0.0, 4, 1, 7, 9, 3, 5, 8])[:, None]
    assign = torch.tensor([3, 3, 3, 1, -1, 1, 0, 3])  # means: 13/4 of cluster 3, 5 of cluster 1
    everything = [(3, 4, [1, 2, 0, 7]), (1, 2, [3, 5]), (0, 1, [6])]
    assert list(visualize.most_central(assign, lambda index: z[index], None)) == everything
    monkeypatch.setattr(visualize, "EACH", 2)
    monkeypatch.setattr(visualize, "CLUSTERS", 2)
    found = visualize.most_central(assign, lambda index: z[index], lambda z: ((z - 8).abs(), None))
    assert list(found) == [(3, 4, [7, 1]), (1, 2, [3, 5])]


def test_the_page_shows_each_cluster_with_its_images_and_purity(tmp_path, monkeypatch):
    names = [f"{tmp_path}/{name}.png" for name in ('<b>"1"', "猫&amp;", "3", "4", "5", "6")]
    paint = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250), (250, 0, 250)]
    for name, color in zip(names, paint, strict=True):
        Image.new("RGB", (40, 30), color).save(name)
    data = common.Images("x", None, names, torch.tensor([1, 1, 0, -1, 0, 0]), ["<i>猫", "b"])
    page, given = tmp_path / "clusters.html", ({"command": "coke.py <x>"}, {"result": "</pre>"}, data, names)
    assign, clusters = torch.tensor([7, 7, 7, 7, 2, -1]), [(7, 4, [2, 0, 1]), (2, 1, [4])]
    visualize.write_html(page, *given, assign, clusters, 1.0)
    found, wanted = Page(page), [("cluster 7 4 images, 67% b", [2, 0, 1])]
    wanted += [("cluster 2 1 images, 100% <i>猫", [4])]
    for (head, images), (words, positions) in zip(found.sections, wanted, strict=True):
        assert head == words and list(images) == [names[i] for i in positions]
        for image, i in zip(images.values(), positions, strict=True):
            assert np.abs(np.subtract(image.getpixel((40, 40)), paint[i])).max() < 8
    # Classes 1 1 0 0 are in clusters 7 7 7 2: three of four are right.
    assert "coke.py <x>" in found.text and "ACC 0.750" in found.text and "not shown" not in found.text
    assert "5 images in 2 clusters, 1 unreadable" in found.text and '"</pre>"' in found.text
    monkeypatch.setattr(visualize, "CLUSTERS", 1)
    visualize.write_html(page, *given, assign, clusters[:1], 1.0)
    assert "1 smaller clusters are not shown" in Page(page).text


@pytest.mark.parametrize("name", RUNS)
def test_a_run_of_each_script_gets_its_pictures(visualized, name):
    run = visualized(name)
    for picture in PICTURES:
        with Image.open(run / picture) as image:
            assert len(set(image.convert("L").tobytes())) > 10, picture
    images, clusters = read_assignments(run / "assignments.csv")
    page, of, sizes = Page(run / "clusters.html"), dict(zip(images, clusters, strict=True)), []
    for head, shown in page.sections:
        cluster, size = map(int, re.fullmatch(r"cluster (\d+) (\d+) images, \d+% [ab]", head).groups())
        assert clusters.count(cluster) == size and len(shown) == min(24, size)
        assert {of[alt] for alt in shown} == {cluster}
        sizes.append(size)
    assert sizes == sorted(sizes, reverse=True) and sum(sizes) == len(images) - clusters.count("unreadable")
    assert list(page.images[-1]) == PICTURES


def test_vectors_have_a_map_but_no_page(run_script, tmp_path):
    rows = np.random.default_rng(0).normal(size=(40, 6)).astype(np.float32)
    np.savez(tmp_path / "v.npz", features=rows, labels=np.arange(40) % 2)
    job = run_script(f"{ROOT}/lsdc.py", f"--data {tmp_path}/v.npz --k 2 --epochs 2 --batch-size 20 --out run")
    job = run_script(f"{ROOT}/extras/visualize.py", "run --html", folder=job.folder, ok=False)
    assert job.code == 2 and len(job.err.splitlines()) == 1 and "vectors" in job.err, job.err
    assert {*PICTURES} <= {path.name for path in job.run.iterdir()}


def test_mistakes_end_with_one_line(visualized, places, tmp_path, capsys):
    run = shutil.copytree(visualized("coke"), tmp_path / "run")
    assert "no run folder" in refusal(visualize.main, [f"{tmp_path}/none"], capsys)
    for data, words in ((f"{places}/none", "no such folder"), (f"{places}/same", "other images")):
        assert words in refusal(visualize.main, [str(run), "--data", data], capsys)
    (run / "clustering.pt").unlink()
    assert "clustering.pt" in refusal(visualize.main, [str(run)], capsys)
    log = (run / "log.jsonl").read_text().splitlines(keepends=True)
    (run / "log.jsonl").write_text("".join(log[:-1]))
    assert "not finished" in refusal(visualize.main, [str(run)], capsys)


def test_moved_images_and_a_failing_picture_end_nothing(visualized, places, tmp_path, monkeypatch, capsys):
    without = shutil.ignore_patterns("*.png", "*.html")
    run = shutil.copytree(visualized("coke"), tmp_path / "run", ignore=without)
    moved = shutil.copytree(places / "both" / "train", tmp_path / "moved")
    monkeypatch.setattr(visualize, "tsne", lambda z: 1 / 0)
    visualize.main([str(run), "--html", "--workers", "0", "--data", str(moved)])
    assert "map.png (division by zero)" in capsys.readouterr().out
    assert {path.name for path in run.glob("*.png")} == {*PICTURES[1:]} and (run / "clusters.html").exists()


@pytest.mark.skipif(not CHROMIUM, reason="no chromium, chromium-browser or google-chrome")
def test_a_browser_shows_the_page(visualized, tmp_path):
    page = visualized("lsdc") / "clusters.html"
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile"]
    command, how = [*command, "--window-size=1100,900", page.as_uri()], {"timeout": 90, "check": True}
    dom = subprocess.run([*command, "--dump-dom"], capture_output=True, **how).stdout.decode()
    subprocess.run([*command, f"--screenshot={tmp_path}/shot.png"], capture_output=True, **how)
    sections = Page(page).sections
    assert dom.count("<section>") == len(sections) > 0
    assert dom.count("<img ") == sum(len(images) for _, images in sections) + 3
    with Image.open(tmp_path / "shot.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    colored = np.ptp(pixels, axis=2) > 40  # the images are colored noise, all else is gray
    assert colored.sum() > 1000 * min(12, len(sections[0][1]))
