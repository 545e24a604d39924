"""extras/retrieval.py: regions counted by hand, average precision on paper, a made-up set with known objects."""

import json
import random
from itertools import product

import common
from extras import retrieval

import numpy as np
import pytest
import torch
from jobs import refusal
from PIL import Image

GRAY = (128, 128, 128)
OBJECTS = {"all_souls": (250, 0, 0), "bodleian": (0, 250, 0), "keble": (250, 250, 0)}


@pytest.mark.parametrize(
    "ranked, positive, junk, area",
    [
        ("ab..", "ab", "", 1.0),
        (".a", "a", "", (0 + 1 / 2) / 2),  # precision 0, then 1/2, while recall grows to 1
        # a: recall 0 to 1/2 at precisions 1 and 1. Then 1/2 at the miss. b: 1/2 to 1 at precisions 1/2 and 2/3.
        ("a.b", "ab", "", 1 / 2 * (1 + 1) / 2 + 1 / 2 * (1 / 2 + 2 / 3) / 2),
        ("ja.jb", "ab", "j", 1 / 2 + 7 / 24),
        ("a", "ab", "", 1 / 2),  # b is never found
        ("..", "a", "", 0.0),
        ("a...b", "ab", "", 1 / 2 + 1 / 2 * (1 / 4 + 2 / 5) / 2),
    ],
)
def test_average_precision_worked_out_on_paper(ranked, positive, junk, area):
    assert retrieval.average_precision(list(ranked), set(positive), set(junk)) == pytest.approx(
        area, abs=1e-12
    )


def test_average_precision_is_the_area_of_trapezoids_and_junk_changes_nothing():
    draw = random.Random(0)
    for _ in range(50):
        names = [str(i) for i in range(30)]
        draw.shuffle(names)
        positive = set(draw.sample(names, 6))
        recall = [0.0] + [sum(n in positive for n in names[:k]) / 6 for k in range(1, 31)]
        precision = [1.0] + [sum(n in positive for n in names[:k]) / k for k in range(1, 31)]
        area = np.trapezoid(precision, recall)
        assert 0 < area <= 1
        assert retrieval.average_precision(names, positive, {"other"}) == pytest.approx(area)
        for place in range(0, 31, 5):
            mixed = [*names[:place], "j1", *names[place:], "j2"]
            assert retrieval.average_precision(mixed, positive, {"j1", "j2"}) == pytest.approx(area)


def test_regions_counted_by_hand():
    square = retrieval.regions(12, 12, 3)
    # l = 1: the map; l = 2: 2 x 2 of side 24 // 3, 4 apart; l = 3: 3 x 3 of side 24 // 4, 3 apart.
    assert square == [(0, 0, 12)] + [(x, y, 8) for y in (0, 4) for x in (0, 4)] + [
        (x, y, 6) for y in (0, 3, 6) for x in (0, 3, 6)
    ]
    # 24 x 12: two squares of side 12 overlap by 0, three by 6 (50 %), four by 8 (67 %): three are nearest to 40 %.
    # l = 2: 4 columns, 16 / 3 apart, 2 rows of side 8; l = 3: 5 columns, 18 / 4 apart, 3 rows of side 6.
    wide = [(x, 0, 12) for x in (0, 6, 12)] + [(x, y, 8) for y in (0, 4) for x in (0, 5, 10, 16)]
    wide += [(x, y, 6) for y in (0, 3, 6) for x in (0, 4, 9, 13, 18)]
    assert retrieval.regions(24, 12, 3) == wide
    assert sorted(retrieval.regions(12, 24, 3)) == sorted((y, x, side) for x, y, side in wide)
    # 32 x 20: two overlap by 8 (40 %), exactly.
    assert retrieval.regions(32, 20, 1) == [(0, 0, 20), (12, 0, 20)]
    # 37 x 20: two overlap by 3 of 20 (15 %), three by 57.5 %, which is nearer to 40 %.
    assert retrieval.regions(37, 20, 1) == [(0, 0, 20), (8, 0, 20), (17, 0, 20)]
    assert retrieval.regions(1, 1, 2) == [(0, 0, 1)] * 5


@pytest.mark.parametrize("width, height", [(7, 7), (32, 21), (21, 32), (33, 32), (64, 9), (1, 5), (50, 3)])
def test_regions_lie_in_the_map_and_cover_it(width, height):
    for levels in (1, 3):
        covered = torch.zeros(height, width)
        for left, top, side in retrieval.regions(width, height, levels):
            assert 0 <= left <= width - side and 0 <= top <= height - side
            covered[top : top + side, left : left + side] = 1
        assert covered.all()


def test_rmac_is_that_of_a_plain_loop():
    gen = torch.Generator().manual_seed(0)
    maps, mean, axes = (torch.randn(*s, generator=gen) for s in ((4, 6, 9), (4,), (4, 3)))
    total, bare = np.zeros(3), np.zeros(4)
    for left, top, side in retrieval.regions(9, 6, 3):
        best = np.full(4, -np.inf)
        for d, y, x in product(range(4), range(top, top + side), range(left, left + side)):
            best[d] = max(best[d], maps[d, y, x])
        best /= np.sqrt((best**2).sum())
        bare += best
        white = (best - mean.numpy()) @ axes.numpy()
        total += white / np.sqrt((white**2).sum())
    found = retrieval.rmac(maps, 3, mean, axes), retrieval.rmac(maps, 3)
    for ours, plain in zip(found, (total, bare), strict=True):
        np.testing.assert_allclose(ours, plain / np.sqrt((plain**2).sum()), atol=1e-5)


def test_regions_have_unit_covariance_after_whitening():
    maps = torch.rand(40, 5, 8, 11, generator=torch.Generator().manual_seed(0))
    maps[:, 1] += maps[:, 0]  # correlated channels of different spread
    maps[:, 2] *= 3
    vectors = torch.cat([retrieval.region_vectors(x, 3) for x in maps]).double()
    before = np.cov(vectors.T.numpy(), bias=True)
    mean, axes = retrieval.pca(vectors.float(), 5, common.generator(0))
    after = np.cov(((vectors - mean) @ axes.double()).T.numpy(), bias=True)
    # Of five channels with unit length four directions are free to first order, the fifth is small but there.
    assert np.abs(before - np.eye(5)).max() > 0.5 and np.abs(after - np.eye(5)).max() < 1e-2


def test_maps_are_those_before_the_last_pool_or_of_the_last_block():
    images = torch.rand(1, 3, 40, 72)
    for arch, shape in (("lenet5", (16, 14, 30)), ("vgg16", (512, 2, 4)), ("resnet18", (512, 2, 3))):
        backbone = common.Backbone(arch, 3, 224 if arch == "resnet18" else 32, sobel=arch == "vgg16").eval()
        with torch.no_grad():
            maps = retrieval.convolutions(backbone)(images)[0]
        assert maps.shape == shape and maps.min() >= 0
        if arch == "resnet18":
            expected = backbone.net(images)
            torch.testing.assert_close(maps.flatten(), expected.flatten())


def test_a_query_is_cut_out_and_resized_by_the_factor_of_its_image(tmp_path):
    pixels = np.zeros((60, 100, 3), np.uint8)
    pixels[10:40, 20:60] = (200, 100, 0)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    whole = retrieval.read_image((tmp_path / "a.png", None), 50, 3)
    assert whole.shape == (3, 30, 50)
    box = retrieval.read_image((tmp_path / "a.png", (19.6, 10.4, 60.3, 40.1)), 50, 3)
    assert box.shape == (3, 15, 20) and (torch.tensor([200, 100, 0]) == box.view(3, -1).T).all()
    assert retrieval.read_image((tmp_path / "a.png", (50, -5, 130, 99)), 200, 3).shape == (3, 120, 100)
    gray = retrieval.read_image((tmp_path / "a.png", (20, 10, 60, 40)), 50, 1)
    assert gray.shape == (1, 15, 20) and (gray == round(0.299 * 200 + 0.587 * 100)).all()
    (tmp_path / "b.jpg").write_bytes(b"no image")
    assert retrieval.read_image((tmp_path / "b.jpg", None), 50, 3) is None


def color_network(path):
    """A LeNet-5 as backbone.pt whose maps are red, green, blue above and below gray; nothing else."""
    backbone = common.Backbone("lenet5", 3, 32)
    first, second = (m for m in backbone.net.features if isinstance(m, torch.nn.Conv2d))
    for conv in (first, second):
        torch.nn.init.zeros_(conv.weight)
        torch.nn.init.zeros_(conv.bias)
    with torch.no_grad():
        for i in range(6):
            first.weight[i, i % 3, 2, 2] = 1 - 2 * (i // 3)
            second.weight[i, i, 2, 2] = 1
    meta = {**backbone.meta, "method": "coke", "mean": [128 / 255] * 3, "std": [0.25] * 3, "data": "made up"}
    torch.save({"state_dict": backbone.net.state_dict(), "meta": meta}, path)


def draw(objects, size=(160, 120)):
    """An image with objects [(name, left, top, side)] on gray."""
    image = Image.new("RGB", size, GRAY)
    for name, left, top, side in objects:
        image.paste(OBJECTS[name], (left, top, left + side, top + side))
    return image


def write_set(folder, prefix, nested=False):
    """Five images of each object, four of nothing, and ground truth in the sets' format.

    A query's image shows the next object, too, larger and outside of the rectangle; that object's query has it as junk.
    """
    places = [(8, 8, 40), (90, 60, 44), (60, 20, 64), (20, 70, 36), (100, 10, 48)]
    truth, objects = folder / "gt_files", [*OBJECTS]
    truth.mkdir(parents=True)
    for number, name in enumerate(objects):
        home = folder / (f"images/{name}" if nested else "images")
        home.mkdir(parents=True, exist_ok=True)
        names = [f"{name}_{i:06}" for i in range(5)]
        for i, place in enumerate(places):
            beside = [(objects[number - 1], 70, 30, 80)] if i == 0 else []
            draw([(name, *place), *beside], (168, 112) if i % 2 else (160, 120)).save(
                home / f"{names[i]}.png"
            )
        files = {"query": [f"{prefix}{names[0]} 8.2 7.9 48.0 48.1"], "good": names[:2], "ok": names[2:]}
        for kind, lines in {**files, "junk": [f"{objects[(number + 1) % 3]}_000000"]}.items():
            (truth / f"{name}_1_{kind}.txt").write_text("".join(f"{line}\n" for line in lines))
    for i in range(4):
        draw([]).save(folder / "images" / f"empty_{i}.png")


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """A folder with oxford/, paris/ in sub-folders, and a run/ whose network sees colors."""
    root = tmp_path_factory.mktemp("sets")
    write_set(root / "oxford", "oxc1_")
    write_set(root / "paris", "", nested=True)
    (root / "run").mkdir()
    color_network(root / "run" / "backbone.pt")
    return root


def test_ground_truth_is_read_as_the_sets_have_it(sets):
    for name in ("oxford", "paris"):
        queries = retrieval.read_queries(sets / name)
        assert list(queries) == ["all_souls_1", "bodleian_1", "keble_1"]
        image, box, positive, junk = queries["keble_1"]
        assert image == "keble_000000" and box == (8.2, 7.9, 48.0, 48.1) and junk == {"all_souls_000000"}
        assert positive == {f"keble_{i:06}" for i in range(5)}


@pytest.mark.parametrize("data, whiten", [("oxford", "paris"), ("oxford", None), ("paris", "oxford")])
def test_a_network_that_sees_colors_finds_the_objects(sets, capsys, data, whiten):
    more = ["--whiten", str(sets / whiten)] if whiten else []
    run = sets / "run" / "backbone.pt" if data == "paris" else sets / "run"
    retrieval.main([str(run), "--data", f"{sets}/{data}", "--size", "160", "--workers", "0", *more])
    result = json.loads((sets / "run" / f"retrieval-{data}{'-whitened' * bool(whiten)}.json").read_text())
    chance, draw = [], random.Random(0)
    # As many names as a ranking has without its one of junk.
    names = [f"{name}_{i:06}" for name in OBJECTS for i in range(5)] + [f"empty_{i}" for i in range(3)]
    for _ in range(300):
        draw.shuffle(names)
        chance.append(retrieval.average_precision(names, {f"keble_{i:06}" for i in range(5)}, set()))
    assert result["map"] == pytest.approx(np.mean(list(result["average_precision"].values())))
    assert set(result["average_precision"]) == {"all_souls_1", "bodleian_1", "keble_1"}
    assert result["map"] > 0.9 > 2 * np.mean(chance)
    assert result["map_of_random_ranking"] < 2 * np.mean(chance)
    assert (
        result["args"]["whiten"] == (f"{sets}/{whiten}" if whiten else None) and "torch" in result["versions"]
    )
    assert f"mAP {result['map']:.4f}" in capsys.readouterr().out


def test_scores_of_a_random_network_are_those_of_a_plain_program(sets, tmp_path):
    torch.manual_seed(0)
    backbone = common.Backbone("lenet5", 3, 32).eval()
    meta = {**backbone.meta, "method": "coke", "mean": [0.4] * 3, "std": [0.3] * 3, "data": "made up"}
    torch.save({"state_dict": backbone.net.state_dict(), "meta": meta}, tmp_path / "backbone.pt")

    def region_maxima(path, box=None):
        image = Image.open(path).convert("RGB")
        scale = 96 / max(image.size)
        image = image.crop(box) if box else image
        image = image.resize([round(scale * side) for side in image.size], Image.BILINEAR)
        x = (torch.tensor(np.array(image)).permute(2, 0, 1)[None] / 255 - 0.4) / 0.3
        with torch.no_grad():
            x = backbone.net.features[:-1](x)[0].numpy()
        parts = [
            x[:, top : top + n, left : left + n].max((1, 2))
            for left, top, n in retrieval.regions(x.shape[2], x.shape[1], 2)
        ]
        return np.array([part / np.linalg.norm(part) for part in parts])

    others = np.concatenate([region_maxima(path) for path in (sets / "paris").rglob("*.png")])
    values, axes = np.linalg.eigh(np.cov(others.T, bias=True))
    axes /= np.sqrt(values.clip(1e-6 * values.max()))

    def descriptor(*which):
        white = (region_maxima(*which) - others.mean(0)) @ axes
        total = (white / np.linalg.norm(white, axis=1, keepdims=True)).sum(0)
        return total / np.linalg.norm(total)

    found = {path.stem: descriptor(path) for path in (sets / "oxford").rglob("*.png")}
    more = ["--whiten", f"{sets}/paris", "--size", "96", "--levels", "2", "--workers", "0"]
    retrieval.main([str(tmp_path), "--data", f"{sets}/oxford", *more])
    scores = json.loads((tmp_path / "retrieval-oxford-whitened.json").read_text())["average_precision"]
    for number, name in enumerate(OBJECTS):
        query = descriptor(sets / "oxford/images" / f"{name}_000000.png", (8, 8, 48, 48))
        ranked = sorted(found, key=lambda image: -(query @ found[image]))
        ranked.remove(f"{[*OBJECTS][(number + 1) % 3]}_000000")
        area, before, hits = 0, 1, 0
        for place, image in enumerate(ranked, 1):
            hits += name in image
            area += (name in image) / 5 * (before + hits / place) / 2
            before = hits / place
        assert scores[f"{name}_1"] == pytest.approx(area, abs=1e-9), name
    assert min(scores.values()) < 0.95  # it is no ranking that every program would find


def test_a_random_network_has_the_statistics_of_the_images(sets, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    data, more = str(sets / "oxford"), ["--size", "96", "--workers", "0"]
    retrieval.main(["random-lenet5", "--data", data, *more])
    found = json.loads((tmp_path / "random-lenet5-retrieval-oxford.json").read_text())
    torch.manual_seed(0)
    backbone, paths = common.Backbone("lenet5", 3, 224, sobel=True), sorted((sets / "oxford").rglob("*.png"))
    for layer in (m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)):
        layer.momentum = None  # the average of all batches, which is one
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (common.Images.mean, common.Images.std))
    crops = [common.center_crop(Image.open(path).convert("RGB"), 224, 0.875) for path in paths]
    backbone((torch.stack([torch.tensor(np.array(x)).permute(2, 0, 1) / 255 for x in crops]) - mean) / std)
    meta = {
        **backbone.meta,
        "method": "random",
        "mean": common.Images.mean,
        "std": common.Images.std,
        "data": "x",
    }
    torch.save({"state_dict": backbone.net.state_dict(), "meta": meta}, tmp_path / "backbone.pt")
    retrieval.main([str(tmp_path), "--data", data, *more])
    wanted = json.loads((tmp_path / "retrieval-oxford.json").read_text())
    assert found["average_precision"] == pytest.approx(wanted["average_precision"], abs=1e-6)
    with pytest.raises(SystemExit):
        retrieval.main(["random-lenet", "--data", data])
    assert "lenet is none of the networks" in capsys.readouterr().err


def test_unreadable_and_missing_images_are_named_and_count_as_not_found(tmp_path, sets, capsys):
    write_set(tmp_path / "half", "oxc1_")
    (tmp_path / "half/images/all_souls_000001.png").write_bytes(b"no image")
    (tmp_path / "half/images/keble_000002.png").unlink()
    command = [f"{sets}/run", "--data", f"{tmp_path}/half", "--size", "160", "--workers", "2"]
    retrieval.main(command)
    out = capsys.readouterr().out
    assert "all_souls_000001.png" in out and "1 images of the ground truth are missing" in out
    scores = json.loads((sets / "run" / "retrieval-half.json").read_text())["average_precision"]
    assert scores["bodleian_1"] > 0.9 and 0.7 < scores["keble_1"] <= 4 / 5 >= scores["all_souls_1"]
    (tmp_path / "half/images/keble_000000.png").write_bytes(b"no image")
    assert "queries cannot be read" in refusal(retrieval.main, command, capsys)
    (tmp_path / "half/images/keble_000000.png").unlink()
    assert "lacks 1 images of its queries: keble_000000" in refusal(retrieval.main, command, capsys)


def test_mistakes_end_with_one_line(tmp_path, sets, capsys):
    run, images = f"{sets}/run", f"{sets}/oxford/images"
    assert "no run folder" in refusal(retrieval.main, [f"{tmp_path}/none", "--data", images], capsys)
    assert "ground truth" in refusal(retrieval.main, [run, "--data", images], capsys)
    command = [run, "--data", f"{sets}/oxford", "--whiten", f"{tmp_path}/none"]
    assert "no images below" in refusal(retrieval.main, command, capsys)
    common.save_file(tmp_path / "backbone.pt", {"state_dict": {}, "meta": {"arch": "mlp"}})
    assert "mlp is none of the networks for images" in refusal(
        retrieval.main, [str(tmp_path), "--data", f"{sets}/oxford"], capsys
    )
