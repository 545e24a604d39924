"""common.py: command line, data and augmentation, held against torchvision, Pillow and plain arithmetic."""

import argparse
import io
import os
import pickle
import sys
from types import SimpleNamespace

import common
from common import Loader, View, load_data, open_image

import numpy as np
import pytest
import sklearn.datasets
import torch
import torchvision
from jobs import ROOT, refusal
from PIL import Image, features
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as V

SCRIPT, CPU = ROOT / "deepcluster.py", torch.device("cpu")
COLORS = [((37 * i) % 256, (101 * i + 50) % 256, (11 * i) % 256) for i in range(64)]
KINDS = {"MNIST": (28, 28), "FashionMNIST": (28, 28), "SVHN": (3, 32, 32), "STL10": (3, 96, 96)}
RAMP = np.linspace(0, 1, 64 * 64).reshape(64, 64)
JITTER = ["brightness", "contrast", "saturation", "hue"]
pytestmark = pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
linux = pytest.mark.skipif(sys.platform != "linux", reason="needs Linux")


def bytes_of(*shape, seed=0):
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


def picture(height=40, width=50):
    return Image.fromarray(bytes_of(height, width, 3).numpy())


def save_all(folder, *names):
    """Images of one color each, of different sizes."""
    for i, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12 + i % 5, 14), COLORS[i]).save(folder / name)
    return folder


def loader_of(data, workers=0, batch_size=8, size=16):
    return Loader(data, batch_size, size, 1.0, CPU, workers)


# %% command line
@pytest.mark.parametrize("kind, text", [(int, "x"), (int, "1.5"), (int, "0"), (int, "6"), (float, "nan")])
def test_number_refuses(kind, text, capsys):
    p = argparse.ArgumentParser()
    p.add_argument("--n", type=common.number(kind, 1, 5))
    assert [p.parse_args(["--n", end]).n for end in "15"] == [1, 5]
    with pytest.raises(SystemExit):
        p.parse_args(["--n", text])
    assert ("1..5" if text in "0 6 nan" else "invalid int value") in capsys.readouterr().err


@pytest.mark.parametrize("cores, local, workers", [(1, 1, 1), (64, 1, 8), (16, 4, 4), (4, 8, 1), (4, 0, 4)])
def test_workers_are_the_cores_of_this_process(cores, local, workers, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)), raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 128 if sys.platform == "linux" else cores)
    monkeypatch.setenv("RANK", "0")
    if local:  # not everybody starts with torchrun
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(local))
    assert common.make_parser("").parse_args([]).workers == workers


def test_data_is_imagenet_where_it_lies_and_else_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert common.make_parser("").parse_args([]).data == "digits"
    assert "data/imagenet was not found" in str(load_data("digits")[0])
    (tmp_path / "data/imagenet").mkdir(parents=True)
    assert common.make_parser("").parse_args([]).data == "data/imagenet"
    assert str(load_data("digits")[0]) == "1437 images of digits"


def test_a_left_over_local_rank_is_ignored_and_said(launch):
    code = "import os, common; os.environ['LOCAL_RANK'] = '1'; common.setup('cpu'); common.error(common.is_main())"
    run = launch(code, world=1)
    said, error = run.err[0].splitlines()
    assert run.codes == [2] and "LOCAL_RANK" in said and error == "script.py: error: True"


# %% named sets
def test_digits_are_sklearns_enlarged_once():
    train, test = load_data("digits")
    assert (len(train), len(test)) == (1437, 360) and train.classes == list("0123456789")
    raw, labels = sklearn.datasets.load_digits(return_X_y=True)
    large = V.resize(torch.from_numpy(raw).view(-1, 1, 8, 8).float() * 255 / 16, [32, 32], antialias=False)
    ours = torch.cat([train.pixels, test.pixels])
    gap, nearest = (torch.cdist(ours.flatten(1).float(), large.flatten(1)) / 32).min(1)  # RMS per pixel
    assert nearest.unique().numel() > 1790 and gap.max() < 1, "an image is missing or used twice"
    assert np.array_equal(labels[nearest], torch.cat([train.labels, test.labels]).numpy())
    assert np.bincount(test.labels).min() > 20, "the test images are a random part"


@pytest.mark.parametrize("kind", [*KINDS, "CIFAR10", "CIFAR100"])
def test_named_sets_as_torchvision_holds_them(kind, tmp_path, monkeypatch):
    """CIFAR-100's superclasses come from its file: torchvision leaves them out."""
    labels, shape = {"train": [3, 0, 19, 7, 3], "test": [1, 19]}, KINDS.get(kind, (32, 32, 3))
    raw = {split: bytes_of(len(labels[split]), *shape) for split in labels}
    (tmp_path / "cifar-100-python").mkdir()
    for split, coarse in labels.items():
        (tmp_path / "cifar-100-python" / split).write_bytes(pickle.dumps({"coarse_labels": coarse}))

    def fake(root, download, split=None, train=None):
        assert root == str(tmp_path) and download and (split is None) == (kind not in ("SVHN", "STL10"))
        part = split or ("train" if train else "test")
        targets = [99] * len(labels[part]) if kind == "CIFAR100" else labels[part]
        data = raw[part] if "MNIST" in kind else raw[part].numpy()
        return SimpleNamespace(data=data, **{"labels" if split else "targets": targets})

    monkeypatch.setattr(torchvision.datasets, kind, fake)
    train, test = load_data("cifar100-20" if kind == "CIFAR100" else kind.lower(), str(tmp_path))
    for split, data in (("train", train), ("test", test)):
        want = raw[split].view(len(data), -1, 28, 28) if "MNIST" in kind else raw[split]
        want = want.permute(0, 3, 1, 2) if "CIFAR" in kind else want
        assert torch.equal(data.pixels, want) and data.labels.tolist() == labels[split]
        assert data.labels.dtype == torch.int64 and len(data.classes) == 20
        scaled = train.pixels.double() / 255  # both are normalized by the training images
        close(torch.tensor([data.std, data.mean]), torch.stack(torch.std_mean(scaled, (0, 2, 3))).float())


# %% folders
@pytest.mark.parametrize("train, val", [("train", "val"), ("Train", "Test"), ("deeper/train", "deeper/val")])
def test_splits_of_class_folders(train, val, tmp_path):
    names = [f"{train}/{c}/{i}.png" for c in ("dog", "cat") for i in (1, 0, 2)]
    names += [f"{val}/dog/0.png", f"{val}/cat/0.png", f"{train}/.cache/0.png", f"{train}/cat/._0.png"]
    first, second = load_data(str(save_all(tmp_path / "d", *names)))
    assert first.classes == second.classes == ["cat", "dog"]
    assert first.labels.tolist() == [0, 0, 0, 1, 1, 1] and second.labels.tolist() == [0, 1]
    assert [path.split("/")[-2:] for path in list(first.paths)[2:4]] == [["cat", "2.png"], ["dog", "0.png"]]


@pytest.mark.parametrize(
    "names, labels",
    [
        ("a/0.png a/deep/er/1.png b/0.png", [0, 0, 1]),
        ("images/a/0.png images/b/0.png images/b/1.png", [0, 1, 1]),
        ("a/0.png a/1.png", None),  # one class is none: no accuracy of 100 %
        ("0.png 1.png 2.png a/0.png b/0.png", None),  # most lie beside the folders
        ("a/0.png a/1.png b/0.png preview.jpg", [0, 0, 1]),  # a stray image is named, labels stay
        ("images/a/0.png images/a/1.png images/b/0.png preview.jpg", [0, 0, 1]),
    ],
)
def test_labels_of_one_folder(names, labels, tmp_path, capsys):
    data, test = load_data(str(save_all(tmp_path / "d", *names.split())))
    assert test is None and len(data) == len(names.split()) - (stray := "preview.jpg" in names)
    assert (data.labels if labels is None else data.labels.tolist()) == labels
    assert len(data.classes) == (max(labels) + 1 if labels else 0)
    assert ("preview.jpg" in capsys.readouterr().out) == stray


def test_folders_beside_train_are_not_dropped_in_silence(tmp_path, capsys):
    """Of means of transport, say, as in COCO: classes, or a line that they are left out."""
    data, _ = load_data(str(save_all(tmp_path / "d", "bus/0.png", "car/0.png", "train/0.png")))
    assert len(data) == 1 and "nothing else in it is read" in capsys.readouterr().out


def test_empty_folders_are_no_class_but_splits_must_agree(tmp_path, capsys):
    top = save_all(tmp_path / "d", *[f"{s}/{c}/0.png" for s in ("train", "val") for c in "ab"])
    (top / "train/c").mkdir(), (top / "val/c").mkdir()
    train, val = load_data(str(top))
    assert train.classes == val.classes == ["a", "b"]
    line = refusal(load_data, str(save_all(top, "val/c/0.png")), capsys)
    assert line.endswith(" c") and all(word in line for word in ("train", "val", "classes"))


def test_missing_and_empty_folders(tmp_path, capsys):
    save_all(tmp_path, "half/train/a/0.png")
    for name in ("empty/a/notes.txt", "half/val/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("no image")
    for name in ("nowhere", "empty", "half/val", "half", "half/train/a/0.png"):
        assert name in refusal(load_data, str(tmp_path / name), capsys)
    assert "cifar10" in refusal(load_data, "cifar11", capsys)


def test_what_pillow_reads_is_taken_and_the_rest_is_counted(tmp_path, capsys):
    names = ["a.jfif", "b.jpe", "c.JPG", "d.webp", "e.tif", "f.gif"] + ["g.avif"] * features.check("avif")
    (save_all(tmp_path, *names) / "h.mp4").write_text("no image")
    os.symlink(tmp_path / "gone.jpg", tmp_path / "k.jpg")  # as of a store that is not there
    os.symlink(tmp_path / "a.jfif", tmp_path / "i.jpg")
    names.append("i.jpg")
    data, said = load_data(str(tmp_path))[0], capsys.readouterr().out
    assert [os.path.basename(path) for path in data.paths] == names and "h.mp4" in said
    assert len(list(loader_of(data, batch_size=1).test(torch.arange(len(names))))) == len(names)
    assert "2 files left out" in said and not data.unreadable


@pytest.mark.parametrize(
    "link, target, labels",
    [
        ("a/more", "elsewhere", [0, 0, 0, 1]),
        ("a/again", "d/a", [0, 0, 1]),
        ("a/up", "d", [0, 0, 1]),
        ("a/other", "d/b", [0, 0, 1]),  # not into another class
        ("a/other", "d/b/deep", [0, 0, 1]),
        ("a/up", "d/a", None),  # of a flat folder
    ],
)
def test_linked_folders_are_entered_once(link, target, labels, tmp_path):
    save_all(tmp_path, "d/a/0.png", "d/a/1.png", "d/b/deep/0.png", "elsewhere/2.png")
    for at, to in ((link, target), ("../elsewhere/again", "elsewhere")):
        os.symlink(tmp_path / to, tmp_path / "d" / at)
    data = load_data(str(tmp_path / ("d" if labels else "d/a")))[0]
    assert len({*map(os.path.realpath, data.paths)}) == len(data) == len(labels or "01")
    assert labels is None or data.labels.tolist() == labels


@linux
def test_file_names_that_are_no_text(tmp_path, monkeypatch):
    """Latin-1 where the system writes UTF-8: a stranger, an unreadable image, and one that is read."""
    for name in (b"\xe9.txt", b"\xe9.jpg"):
        (tmp_path / os.fsdecode(name)).write_text("no image")
    Image.new("RGB", (9, 200)).save(tmp_path / os.fsdecode(b"\xe9.png"))
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))  # strict
    loader = loader_of(load_data(str(tmp_path))[0], batch_size=2)
    assert len(list(loader.test(torch.arange(2)))) == 1 and loader.data.unreadable == {0}


# %% images
def test_transparent_images_are_laid_on_white(tmp_path):
    drawing = np.zeros((8, 8, 4), np.uint8)  # black, and transparent but for a square
    drawing[2:6, 2:6, 3], drawing[0, 0, 3] = 255, 51
    want = np.full((8, 8, 3), 255)
    want[2:6, 2:6], want[0, 0] = 0, 204  # 80 % of white
    drawing, opaque = Image.fromarray(drawing), picture().convert("RGBA")
    for image, found in ((drawing, want), (drawing.convert("LA"), want), (opaque, picture())):
        image.save(tmp_path / "a.png")
        assert np.array_equal(np.asarray(open_image(tmp_path / "a.png")), np.asarray(found))


@pytest.mark.parametrize("scale, side, size", [(1, 0, (40, 60)), (40, 64, (200, 300))])
def test_exif_orientation(scale, side, size, tmp_path):
    """Orientation 6: what the camera called left is the top; of a large JPEG decoded small, too."""
    image, exif = Image.new("RGB", (60 * scale, 40 * scale), (255, 0, 0)), Image.Exif()
    image.paste((0, 0, 255), (0, 0, 30 * scale, 40 * scale))  # blue on the left
    exif[0x0112] = 6
    image.save(tmp_path / "a.jpg", exif=exif)
    found = open_image(tmp_path / "a.jpg", side)
    top, bottom = found.getpixel((20, 5)), found.getpixel((20, size[1] - 5))
    assert found.size == size and top[2] > 200 > 50 > bottom[2]


@pytest.mark.parametrize("name", ["a.jpg", "b.png"])
def test_damaged_exif_is_passed_over_in_silence(name, tmp_path, recwarn):
    exif = {"a.jpg": b"Exif\0\0II*\0\xff\xff\xff\xff", "b.png": b"garbage garbage"}[name]
    picture().save(tmp_path / name, exif=exif)
    assert open_image(tmp_path / name).size == (50, 40) and not [str(w.message) for w in recwarn]


@pytest.mark.parametrize(
    "kind, low, high, black, white",
    [
        ("uint16", 0, 4095, 0, 255),  # 12 bits of a camera
        ("uint16", 0, 65535, 0, 255),
        ("uint16", 10000, 50000, 38.9, 194.6),  # most of the range: unchanged, high / 257
        ("int32", 0, 1_000_000, 0, 255),
        ("float32", 280, 310, 0, 255),
        ("float32 with holes", 280, 310, 0, 255),
    ],
)
def test_deep_grays_keep_their_contrast(kind, low, high, black, white, tmp_path):
    values = (low + RAMP * (high - low)).astype(kind.split()[0])
    if "holes" in kind:
        values[0, :3] = np.nan, np.inf, -np.inf
    Image.fromarray(values).save(path := tmp_path / ("a.png" if kind == "uint16" else "a.tif"))
    gap = np.abs(np.asarray(open_image(path)) - (black + RAMP * (white - black))[:, :, None])
    assert gap.shape == (64, 64, 3) and gap[1:].max() <= 1.01


MEMORY = """
import common, resource, torch
megabytes = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
common.is_main(), torch.manual_seed(0)
before = megabytes()
data = common.load_data("d")[0]
loader = common.Loader(data, 1, 224, 0.875, torch.device("cpu"), 0)
((_, crop),) = loader.test(torch.arange(1))
list(loader.train(torch.arange(1), [common.View(224)]))
print(megabytes() - before, len(data.unreadable))
torch.save((crop * loader.std + loader.mean)[0] * 255, "crop")
"""


@linux
@pytest.mark.parametrize("width, height, limit", [(4000, 1, 60), (14000, 14000, 200)])
def test_extreme_images_in_little_memory(width, height, limit, tmp_path, launch):
    """A line is cut before it is enlarged; of 196 megapixels (560 MB) few are decoded. Left half dark, right light."""
    (tmp_path / "d").mkdir()
    image = Image.new("L", (width, height), 200)
    image.paste(50, (0, 0, width // 2, height))
    image.save(tmp_path / "d" / ("a.png" if height == 1 else "a.jpg"))
    run = launch(MEMORY, world=1)
    crop, (used, unreadable) = torch.load(tmp_path / "crop"), map(float, run.out[0].split())
    assert abs(crop[:, :, :110] - 50).max() < 3 or height == 1
    assert abs(crop[:, :, 114:] - 200).max() < 3 and unreadable == 0 and used < limit


# %% the Loader
VIEWS = [View(16, (0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), gray=0.2, blur=0.5), View(12, solarize=0.3)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return str(save_all(tmp_path_factory.mktemp("images"), *[f"{i:02}.png" for i in range(22)]))


def test_workers_change_nothing(folder):
    """Neither batches nor what else the main process draws, dropout for instance, in two epochs and a test."""
    found = []
    for workers in (0, 1, 3):
        torch.manual_seed(3)
        loader, got = loader_of(load_data(folder)[0], workers), []
        for _ in range(2):
            for index, views in loader.train(torch.arange(22), VIEWS):
                got += [index, *views, torch.rand(3)]
        got += [x for pair in loader.test(torch.arange(22)) for x in pair] + [torch.rand(3)]
        found.append(got)
    assert len(found[0]) == 2 * 2 * 4 + 7 and not torch.equal(found[0][1], found[0][9])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_index_stays_beside_its_image(folder):
    loader, want, seen = loader_of(load_data(folder)[0], workers=2), torch.tensor(COLORS).float(), []
    order = torch.randperm(22)
    batches = [(index, views[1]) for index, views in loader.train(order, [VIEWS[0], View(16)])]
    for index, images in batches + list(loader.test(torch.tensor([5, 21, 0]))):
        close((images * loader.std + loader.mean).mean((2, 3)) * 255, want[index], 0.6)
        seen += index.tolist()
    assert seen == order[:16].tolist() + [5, 21, 0], "two batches of 8; 6 are left over"
    data, order = load_data("digits")[0], torch.randperm(1437)[:30]
    loader = loader_of(data, size=32)
    for index, (images,) in loader.train(order, [View(32, (1, 1), (1, 1), flip=0)]):
        close(images, (data.pixels[index] / 255 - data.mean[0]) / data.std[0], 1e-4)
    assert torch.equal(torch.cat([index for index, _ in loader.test(order)]), order)


def test_one_and_two_processes_see_the_same_images_in_a_step(folder, launch):
    code = f"""
import common, torch
for name in ("digits", {folder!r}):
    loader = common.Loader(common.load_data(name)[0], 8, 16, 1.0, torch.device("cpu"), 0)
    print([i.tolist() for i, _ in loader.train(torch.arange(21).flip(0), [common.View(16)])])
common.Loader(loader.data, 9, 16, 1.0, torch.device("cpu"), 0)
"""
    run = launch(code)
    for first, second in zip(*(map(eval, out.splitlines()) for out in run.out), strict=True):
        both = [sorted(a + b) for a, b in zip(first, second, strict=True)]
        assert both == [[*range(13, 21)], [*range(5, 13)]] and {len(part) for part in first + second} == {4}
    assert run.codes == [2, 2] and "--batch-size 9" in run.err[0] and run.err[1] == ""


@pytest.mark.parametrize("sizes", [[(20, 30)] * 4, [(20, 30), (20, 31)], [(97, 20)]])
def test_small_files_of_one_size_are_kept_in_memory(sizes, tmp_path, capsys):
    (tmp_path / "0.png").write_text("no image")
    for i, size in enumerate(sizes):
        picture(*size).save(tmp_path / f"{i + 1}.png")
    data = load_data(str(tmp_path))[0]
    assert (data.pixels is None) == (len(sizes) < 4) and len(data) == len(sizes) + 1
    for _ in range(2):
        crops = torch.cat([x for _, x in loader_of(data, batch_size=1).test(torch.arange(len(data)))])
    assert data.unreadable == {0} and capsys.readouterr().out.count("0.png") == 1
    close(crops[0], (-torch.tensor(data.mean) / torch.tensor(data.std))[:, None, None].expand(3, 16, 16))
    if len(sizes) == 4:
        want = np.stack([np.asarray(picture(*sizes[0])) * (i > 0) for i in range(5)]).transpose(0, 3, 1, 2)
        assert np.array_equal(data.pixels, want) and abs(data.mean[0] - want[:, 0].mean() / 255) < 1e-6


def test_large_jpegs_give_the_crops_of_the_whole_file(tmp_path, monkeypatch):
    picture(120, 160).resize((1600, 1200)).save(tmp_path / "a.jpg", quality=95)
    loader, real, sides = Loader(load_data(str(tmp_path))[0], 1, 64, 0.3, CPU, 0), open_image, []
    ((_, small),) = loader.test(torch.arange(1))
    monkeypatch.setattr(common, "open_image", lambda path, side: sides.append(side) or real(path))
    ((_, whole),) = loader.test(torch.arange(1))
    assert (
        real(tmp_path / "a.jpg", sides[0]).width < 1600
        and 0 < (small - whole).abs().mean() < 0.08 * whole.std()
    )


# %% augmentation
def boxes_of(crops):
    """(top, left, height, width) (n, 4) and whether flipped (n,), from crops of channels that hold x and y."""
    s, found = crops.shape[3], []
    for line in (crops[:, 1, :, 0] * 255, crops[:, 0, 0] * 255):
        step = s * (line[:, s // 2] - line[:, s // 2 - 1])
        length = step.abs().round().clamp(min=1)
        low = (line[:, s // 2] + line[:, s // 2 - 1]) / 2 + 0.5 - length / 2
        gaps = torch.cat([(step.abs() - length)[length > 1], low - low.round()])
        assert gaps.abs().max() < 0.05, "boxes are whole pixels"
        found += [low.round().int(), length.int()]
    return torch.stack(found, 1)[:, [0, 2, 1, 3]], step < 0


def coordinates(n, height, width):
    x_and_y = torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy")
    return torch.stack(x_and_y).byte().expand(n, 2, height, width)


@pytest.mark.parametrize("size, most", [(16, 0.01), (16, 1.0), (40, 1.0)])
def test_crops_are_torchvisions_resized_crops(size, most):
    """Each image its own whole pixels, larger and smaller than the result, down to one pixel."""
    images = torch.cat([coordinates(60, 37, 46), bytes_of(60, 3, 37, 46)], 1)
    crops = View(size, (0.001, most)).crop(images)
    boxes, flipped = boxes_of(crops)
    for image, crop, box, flip in zip(images, crops, boxes.tolist(), flipped, strict=True):
        want = V.resized_crop(image / 255, *box, [size, size], antialias=False)
        close(crop, want.flip(2) if flip else want, 1e-4)
    assert len(boxes.unique(dim=0)) > 50 and (boxes[:, 2:].min() == 1) == (most < 1)


def test_crop_boxes_follow_torchvisions_distribution():
    n, height, width, area, ratio = 4000, 60, 90, (0.2, 1.0), (3 / 4, 4 / 3)
    torch.manual_seed(1)
    boxes, flipped = boxes_of(View(8, area, ratio, flip=0.3).crop(coordinates(n, height, width)))
    image, params = torch.zeros(3, height, width), torchvision.transforms.RandomResizedCrop.get_params
    theirs = np.array([params(image, list(area), list(ratio)) for _ in range(n)]).T
    top, left, h, w = ours = boxes.numpy().T
    room = (h < 45) & (w < 60)
    assert ours.min() == 0 and (top + h)[room].max() == height and (left + w)[room].max() == width
    for a, b in zip(*([*x, x[2] * x[3], np.log(x[3] / x[2])] for x in (ours, theirs)), strict=True):
        assert abs(a.mean() - b.mean()) < 5 * np.sqrt((a.var() + b.var()) / n)
        assert 0.85 < a.std() / b.std() < 1.15
    assert abs(np.corrcoef(top[room], left[room])[0, 1]) < 0.2, "top and left must be drawn apart"
    assert abs(flipped.float().mean() - 0.3) < 0.04


def test_crops_of_files_are_torchvisions():
    view, image = View(32, (0.3, 0.6), (1, 2), flip=0.3), picture(70, 90)
    theirs = v2.Compose([v2.RandomResizedCrop(32, (0.3, 0.6), (1, 2)), v2.RandomHorizontalFlip(0.3)])
    for seed in range(20):
        ours, want = ((torch.manual_seed(seed), cut(image))[1] for cut in (view.crop_file, theirs))
        assert torch.equal(ours, V.pil_to_tensor(want))


@pytest.mark.parametrize("height, width, atol", [(256, 341, 0), (300, 256, 0), (512, 640, 3)])
def test_center_crops_are_torchvisions_resize_and_center_crop(height, width, atol):
    """0.875 of the shorter side is 224 of 256 pixels: the same where nothing is resized, else but for rounding."""
    image = picture(12, 16).resize((width, height), Image.Resampling.BICUBIC)
    view = View(224, center=0.875, flip=1)
    want = V.pil_to_tensor(V.center_crop(V.resize(image, 256), [224, 224])).flip(2).float()
    close(view.crop_file(image).float(), want, atol)
    close(view.crop(V.pil_to_tensor(image).expand(2, -1, -1, -1))[1] * 255, want, atol + 1e-4)


@pytest.mark.parametrize("part", JITTER)
def test_jitter_is_torchvisions(part):
    """Each image its own strength; grays, black, white and pure colors, too; one after the other."""
    images, values = bytes_of(6, 3, 20, 20) / 255, torch.tensor([-1.0, -0.8, -0.3, 0.0, 0.4, 0.8])
    images[:, :, 0, :3] = torch.tensor([0.0, 1.0, 0.5])
    images[:, :, 1, :6] = torch.tensor([[1, 1, 0, 0, 0, 1.0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    values = values.view(6, 1, 1, 1) / (2 if part == "hue" else 1)
    pairs = zip(images, (values.flatten() + (part != "hue")).tolist(), strict=True)
    want = torch.stack([getattr(V, f"adjust_{part}")(*pair) for pair in pairs])
    close(common.jitter(images, *[values * (name == part) for name in JITTER]), want)
    chain = V.adjust_saturation(V.adjust_contrast(V.adjust_brightness(images, 1.3), 0.6), 1.5)
    chained = common.jitter(images, *[torch.full((6, 1, 1, 1), value) for value in (0.3, -0.4, 0.5, 0.1)])
    close(chained, V.adjust_hue(chain, 0.1), 1e-4)


@pytest.mark.parametrize("size, channels, kernel", [(32, 3, 3), (96, 1, 9), (60, 3, 7)])
def test_blur_is_torchvisions(size, channels, kernel):
    images, sigma = bytes_of(3, channels, size, size) / 255, [0.1, 0.9, 2.0]
    got = common.blur(images, torch.tensor(sigma).view(3, 1, 1, 1))
    close(got, torch.stack([V.gaussian_blur(x, kernel, s) for x, s in zip(images, sigma, strict=True)]))


@pytest.mark.parametrize("part", ["gray", "solarize", "blur", "jitter_p"])
def test_colors_change_as_often_as_asked(part):
    """Each image by its own chance and as torchvision does it, the others not at all; in several chunks."""
    images = bytes_of(600, 3, 64, 64) / 255
    torch.manual_seed(5)
    got = View(64, jitter=((part == "jitter_p") / 2, 0, 0, 0), **{part: 0.3}).color(images)
    changed = ((got - images).abs() > 1e-5).flatten(1).any(1)  # no jitter: but for rounding
    assert 0.22 < changed.float().mean() < 0.38
    if part in ("gray", "solarize"):
        want = V.rgb_to_grayscale(images, 3) if part == "gray" else V.solarize(images, 0.5)
        close(got[changed], want[changed])
    assert View(64, jitter=(0.5,) * 4, gray=1.0).color(images[:9, :1]).equal(images[:9, :1])


DRAWN = {  # one row of an image, and what tells by how much it was changed, in -1..1
    "brightness": ([[0.5, 0.5]] * 3, lambda x: (x[:, 0, 0, 0] / 0.5 - 1) / 0.8),
    "contrast": ([[0.4, 0.6]] * 3, lambda x: ((x[:, 0, 0, 1] - x[:, 0, 0, 0]) / 0.2 - 1) / 0.6),
    "saturation": ([[0.6], [0.4], [0.4]], lambda x: ((x[:, 0, 0, 0] - x[:, 1, 0, 0]) / 0.2 - 1) / 0.4),
    "hue": ([[1.0], [0.0], [0.0]], lambda x: (x[:, 1, 0, 0] - x[:, 2, 0, 0]) / 6 / 0.1),
    "blur": (
        [[0, 0, 1.0, 0, 0]],
        lambda x: (2 * (x[:, 0, 0, 2] / x[:, 0, 0, 1]).log()) ** -0.5 / 0.95 - 1.1053,
    ),
}


@pytest.mark.parametrize("part", DRAWN)
def test_strengths_are_drawn_evenly(part):
    image, strength = DRAWN[part]
    jitter = tuple(most * (name == part) for name, most in zip(JITTER, (0.8, 0.6, 0.4, 0.1), strict=True))
    torch.manual_seed(0)
    images = torch.tensor(image)[:, None].expand(2000, len(image), 5, -1)
    drawn = strength(View(5, jitter=jitter, jitter_p=1.0, blur=float(part == "blur")).color(images))
    assert -1.002 < drawn.min() < -0.97 and 0.97 < drawn.max() < 1.002
    assert abs(drawn.mean()) < 0.06 and abs(drawn.std() - 1 / 3**0.5) < 0.03


# %% whole runs
SMALL = "--recipe digits --image-size 16 --k 3 --pca 4 --epochs 1 --batch-size 8 --workers 0".split()  # noqa: SIM905


def test_a_run_in_its_own_folder_of_photographs_is_continued(start, tmp_path):
    """Its picture is no photograph; flat/ is flat; what cannot be read is no cluster's."""
    flat = save_all(tmp_path / "flat", *[f"{i:02}.png" for i in range(23)])
    (flat / "zz.jpg").write_text("no image")
    first = start([*SMALL, "--data", "."], folder=flat).wait().ok()
    run = flat / "runs/deepcluster-flat"
    rows = [line.rsplit(",", 1) for line in (run / "assignments.csv").read_text().splitlines()[1:]]
    assert [os.path.basename(name) for name, _ in rows] == [*(f"{i:02}.png" for i in range(23)), "zz.jpg"]
    assert rows[23][1] == "unreadable" and {cluster for _, cluster in rows[:23]} <= set("012")
    assert first.out.count("cannot read") == 1 and (run / "clusters.png").exists()
    for data, folder in ((".", flat), ("flat/", tmp_path), ("flat", tmp_path)):
        assert "are done" in start([*SMALL, "--data", data, "--out", run], folder=folder).wait().ok().out


def test_images_of_five_channels(start):
    code = """
import common, deepcluster, torch
data = common.Images("five", torch.randint(256, (40, 5, 16, 16)).byte(), None, None, [], (0.5,) * 5, (0.3,) * 5)
deepcluster.load_data = lambda *a: (data, None)
deepcluster.main()
"""
    job = start([*SMALL, "--out", "run"], code).wait().ok()
    assert (job.run / "clusters.png").exists() and "WARNING: no" not in job.out


@linux
def test_a_full_dev_shm_ends_in_seconds_with_one_line(tmp_path, launch):
    save_all(tmp_path / "d", *[f"{i}.png" for i in range(64)])
    code = """
import common, ctypes, torch
libc = ctypes.CDLL(None)  # as unshare --mount, mount -t tmpfs -o size=64m
private = not libc.unshare(2**17) and not libc.mount(b"none", b"/", None, 2**14 + 2**18, None)
if not private or libc.mount(b"tmpfs", b"/dev/shm", b"tmpfs", 0, b"size=64m"):
    raise SystemExit(77)
loader = common.Loader(common.load_data("d")[0], 16, 1536, 1.0, torch.device("cpu"), 2)
list(loader.test(torch.arange(64)))
"""
    run = launch(code, world=1, limit=30)
    if run.codes == [77]:
        pytest.skip("only root may mount another /dev/shm")
    (line,) = [line for line in run.err[0].splitlines() if "script.py: " in line]
    assert run.codes == [2] and "Traceback" not in run.err[0] and "/dev/shm" in line and "--workers 0" in line


def test_names_are_those_of_a_list():
    names = ["a/b.jpg", "", "\u00fc \u4e2d.png", "no text \udcff.jpg", "z"]
    found = common.Names(names)
    assert list(found) == names and len(found) == 5
    assert (found[4], found[3], found[0], found[-1]) == ("z", names[3], names[0], "z")
    assert not common.Names([]) and list(common.Names([])) == []
