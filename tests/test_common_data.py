"""common.py, data: splits, folders good and bad, and a Loader that is the same everywhere."""

import os
import shutil
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.datasets
import torch
from PIL import Image
from torchvision.transforms import v2

import common
from common import IMAGENET_MEAN, IMAGENET_STD, Loader, View, load_data

CPU = torch.device("cpu")
VIEWS = [View(area=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5), View(solarise=0.3)]


def loader_of(data, batch_size=8, size=16, **more):
    return Loader(data, batch_size, size, size, CPU, **{"workers": 0, **more})


def colours(n):
    """n colours far enough apart to be told from each other after resizing."""
    return [((37 * i) % 256, (101 * i + 50) % 256, (11 * i) % 256) for i in range(n)]


def save_flat(folder, n, side=12):
    folder.mkdir(parents=True, exist_ok=True)
    for i, colour in enumerate(colours(n)):
        Image.new("RGB", (side + i % 5, side + i % 3), colour).save(folder / f"{i:03d}.png")
    return folder


def rgb(images):
    """(b, 3, S, S) normalised images -> (b, 3) mean colours in 0..255."""
    x = images * torch.tensor(IMAGENET_STD).view(3, 1, 1) + torch.tensor(IMAGENET_MEAN).view(3, 1, 1)
    return x.mean((2, 3)) * 255


def refused(capsys, name, *words):
    """load_data(name) must end with exit code 2 and one line with these words."""
    with pytest.raises(SystemExit) as end:
        load_data(str(name))
    err = capsys.readouterr().err
    assert end.value.code == 2 and len(err.splitlines()) == 1, err
    assert all(str(w) in err for w in words), err


# --------------------------------------------------------------------------- named data


def test_digits_are_sklearns_enlarged_once():
    """1437 / 360, the same each time; every image is one of sklearn's, 32x32, with its own label."""
    train, test = load_data("digits")
    again, _ = load_data("digits")
    assert (len(train), len(test)) == (1437, 360) and train.classes == list("0123456789")
    assert torch.equal(train.pixels, again.pixels) and torch.equal(train.labels, again.labels)
    raw, labels = sklearn.datasets.load_digits(return_X_y=True)
    small = torch.from_numpy(raw).view(-1, 1, 8, 8).float() * 255 / 16
    large = v2.functional.resize(small, [32, 32], antialias=False)
    ours = torch.cat([train.pixels, test.pixels])
    assert ours.dtype == torch.uint8 and ours.shape == (1797, 1, 32, 32)
    gap = torch.cdist(ours.flatten(1).float(), large.flatten(1)) / 32  # root mean square per pixel
    assert gap.argmin(1).unique().numel() > 1790, "an image is missing or used twice"
    assert gap.min(1).values.max() < 1
    assert np.array_equal(labels[gap.argmin(1)], torch.cat([train.labels, test.labels]).numpy())
    assert np.bincount(test.labels).min() > 20
    assert abs(train.mean[0] - train.pixels.double().mean().item() / 255) < 1e-6
    assert abs(train.std[0] - train.pixels.double().std().item() / 255) < 1e-4


def test_cifar100_superclasses():
    """The 20 superclasses hold the five classes of the published list (classes in alphabetical order)."""
    groups = """beaver dolphin otter seal whale; aquarium_fish flatfish ray shark trout;
    orchid poppy rose sunflower tulip; bottle bowl can cup plate; apple mushroom orange pear sweet_pepper;
    clock keyboard lamp telephone television; bed chair couch table wardrobe;
    bee beetle butterfly caterpillar cockroach; bear leopard lion tiger wolf;
    bridge castle house road skyscraper; cloud forest mountain plain sea;
    camel cattle chimpanzee elephant kangaroo; fox porcupine possum raccoon skunk;
    crab lobster snail spider worm; baby boy girl man woman; crocodile dinosaur lizard snake turtle;
    hamster mouse rabbit shrew squirrel; maple_tree oak_tree palm_tree pine_tree willow_tree;
    bicycle bus motorcycle pickup_truck train; lawn_mower rocket streetcar tank tractor"""
    superclass = {name: g for g, names in enumerate(groups.split(";")) for name in names.split()}
    assert [superclass[name] for name in sorted(superclass)] == common.CIFAR100_SUPERCLASS


# --------------------------------------------------------------------------- the Loader


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_flat(tmp_path_factory.mktemp("images"), 22)


def epoch_of(loader, epoch=0, **more):
    return [(index, views) for index, views in loader.epoch(epoch, VIEWS, **more)]


def assert_same(a, b):
    assert len(a) == len(b) > 0
    for (i, x), (j, y) in zip(a, b, strict=True):
        assert torch.equal(i, j) and len(x) == len(y)
        assert all(torch.equal(u, v) for u, v in zip(x, y, strict=True))


@pytest.mark.parametrize("source", ["memory", "files"])
def test_start_seed_epoch_and_leftovers(source, folder):
    """start=s gives the rest exactly; epochs and seeds differ; each image at most once; the rest is left."""
    data = load_data("digits" if source == "memory" else str(folder))[0]
    order = torch.randperm(len(data))[:22]
    whole = epoch_of(loader_of(data), order=order)
    assert len(whole) == loader_of(data).steps(order) == 2, "22 images: two batches of 8, 6 left over"
    assert torch.equal(torch.cat([i for i, _ in whole]), order[:16])
    assert all(v.shape == (8, data.channels, 16, 16) and v.isfinite().all() for _, x in whole for v in x)
    assert_same(whole[1:], epoch_of(loader_of(data), order=order, start=1))
    (_, (one, two)), *_ = loader_of(data).epoch(0, [View(jitter=(0.4, 0, 0, 0))] * 2, order=order)
    assert not torch.allclose(one[0], two[0]), "equal views must draw apart"
    for other in (epoch_of(loader_of(data), 1, order=order), epoch_of(loader_of(data, seed=1), order=order)):
        assert not torch.allclose(whole[0][1][0], other[0][1][0])
    full = loader_of(data, batch_size=20)
    own, again = (torch.cat([i for i, _ in full.epoch(e, [View()])]) for e in (0, 1))
    assert len(own) == len(own.unique()) == len(data) // 20 * 20 and own.max() < len(data)
    assert not torch.equal(own, again)


@pytest.mark.parametrize("source, workers", [("memory", 0), ("files", 0), ("files", 1)])
def test_segments_make_the_epoch(source, workers, folder):
    """start, stop: the steps in between and no more; segments, an empty one too, join to the whole epoch."""
    data = load_data("digits" if source == "memory" else str(folder))[0]
    loader, order = loader_of(data, batch_size=4, workers=workers), torch.arange(22).flip(0)
    whole = epoch_of(loader, 2, order=order)
    assert [index.tolist() for index, _ in whole] == [
        list(range(21 - 4 * s, 17 - 4 * s, -1)) for s in range(5)
    ]
    parts = [epoch_of(loader, 2, order=order, start=a, stop=b) for a, b in ((0, 2), (2, 2), (2, 3), (3, 5))]
    assert [len(part) for part in parts] == [2, 0, 1, 2]
    assert_same(whole, sum(parts, []))
    assert epoch_of(loader, 2, order=order, stop=0) == []
    assert_same(whole[:1], epoch_of(loader, 2, order=order, stop=1))
    shuffled = epoch_of(loader, 2, stop=2) + epoch_of(loader, 2, start=2, stop=4)
    assert_same(epoch_of(loader, 2, stop=4), shuffled)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_workers_change_nothing(folder):
    """0, 1 and 3 workers give bit-identical batches, in an epoch and for fixed crops."""
    data = load_data(str(folder))[0]
    want = epoch_of(loader_of(data))
    crops = list(loader_of(data).fixed(torch.arange(22)))
    for workers in (1, 3):
        assert_same(want, epoch_of(loader_of(data, workers=workers)))
        assert_same(crops, list(loader_of(data, workers=workers).fixed(torch.arange(22))))


def test_two_processes_share_the_batch(folder, launch):
    """Memory and files: the slices of two processes are together the batch of one."""
    launched = launch(
        f"""
import torch, common
common.setup("cpu")
views = [common.View(area=(0.3, 1.0), jitter=(0.4, 0.4, 0.4, 0.1), grey=0.2, blur=0.5), common.View(solarise=0.3)]
got = {{}}
for name in ("digits", {str(folder)!r}):
    data = common.load_data(name)[0]
    loader = common.Loader(data, 8, 16, 16, torch.device("cpu"), workers=0)
    got[name] = list(loader.epoch(3, views, order=torch.arange(21)))
torch.save(got, f"got.{{common.rank()}}")
common.leave()
"""
    )
    assert launched.codes == [0, 0], launched.err
    got = [torch.load(launched.path / f"got.{r}") for r in range(2)]
    for name in ("digits", str(folder)):
        one = epoch_of(loader_of(load_data(name)[0]), 3, order=torch.arange(21))
        joined = [
            (torch.cat([i, j]), [torch.cat(v) for v in zip(x, y, strict=True)])
            for (i, x), (j, y) in zip(got[0][name], got[1][name], strict=True)
        ]
        assert [len(i) for i, _ in got[0][name]] == [4, 4]
        assert_same(one, joined)


def test_a_batch_that_does_not_divide_is_refused(launch):
    """9 images for 2 processes: both end with exit code 2 and one line."""
    run = launch(
        """
import torch, common
common.setup("cpu")
common.Loader(common.load_data("digits")[0], 9, 16, 16, torch.device("cpu"))
"""
    )
    assert run.codes == [2, 2] and len("".join(run.err).splitlines()) == 1 and "--batch-size 9" in run.err[0]


def test_index_stays_beside_its_image(folder):
    """The image that comes with index i is file i (the colour tells), in epochs and fixed crops."""
    data = load_data(str(folder))[0]
    want, seen = torch.tensor(colours(22)).float(), 0
    for workers in (0, 2):
        loader = loader_of(data, workers=workers)
        for index, views in loader.epoch(0, [View(), View(pad=2)]):
            torch.testing.assert_close(rgb(views[0]), want[index], atol=0.6, rtol=0)
            seen += len(index)
        for index, crops in loader.fixed(torch.tensor([5, 21, 0]), ten=True):
            assert crops.shape == (3, 10, 3, 16, 16) and index.tolist() == [5, 21, 0]
            for c in range(10):
                torch.testing.assert_close(rgb(crops[:, c]), want[index], atol=0.6, rtol=0)
    assert seen == 32
    digits = load_data("digits")[0]
    for index, views in loader_of(digits, size=32, batch_size=100).epoch(
        0, [View(area=(1, 1), ratio=(1, 1), flip=0)]
    ):
        x = views[0] * digits.std[0] + digits.mean[0]
        torch.testing.assert_close(x, digits.pixels[index].float() / 255, atol=1e-5, rtol=0)


def test_fixed_resizes_and_crops_like_torchvision(tmp_path):
    """Files: Pillow's resize of the shorter side and centre crop, to one grey level."""
    noise = np.random.default_rng(0).integers(0, 256, (60, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    loader = Loader(load_data(str(tmp_path))[0], 1, 16, 20, CPU, workers=0)
    (_, crop), *_ = loader.fixed(torch.tensor([0]))
    pil = v2.functional.center_crop(v2.functional.resize(Image.fromarray(noise), 20), [16, 16])
    want = torch.from_numpy(np.array(pil)).permute(2, 0, 1)
    got = (crop[0, 0] * loader.std + loader.mean) * 255
    torch.testing.assert_close(got, want.float(), atol=1.01, rtol=0)


# --------------------------------------------------------------------------- folders


def test_folder_layouts(tmp_path, capsys):
    """train/val, train/test, one ImageFolder, flat; names with a dot in front are skipped everywhere."""
    for split, n in (("train", 3), ("val", 2)):
        for c in ("cat", "dog"):
            save_flat(tmp_path / "both" / split / c, n)
    save_flat(tmp_path / "both" / "train" / ".cache", 4)
    shutil.copy(tmp_path / "both/train/cat/000.png", tmp_path / "both/train/cat/._000.png")
    (tmp_path / "both/train/cat/notes.txt").write_text("no image")
    train, test = load_data(str(tmp_path / "both"))
    assert train.classes == test.classes == ["cat", "dog"]
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1] and test.labels.tolist() == [0, 0, 1, 1]
    assert [os.path.relpath(p, tmp_path) for p in train.paths[2:4]] == [
        "both/train/cat/002.png",
        "both/train/dog/000.png",
    ]
    os.rename(tmp_path / "both/val", tmp_path / "both/test")
    assert len(load_data(str(tmp_path / "both"))[1]) == 4
    one, none = load_data(str(tmp_path / "both/train"))
    assert none is None and len(one) == 6 and one.classes == ["cat", "dog"]
    flat, none = load_data(str(tmp_path / "both/train/dog"))
    assert none is None and len(flat) == 3 and flat.labels is None and flat.classes == []
    shutil.rmtree(tmp_path / "both/test/dog")
    save_flat(tmp_path / "both/test/cow", 1)
    refused(capsys, tmp_path / "both", "cow", "dog")


def test_missing_empty_and_unknown_folders(tmp_path, capsys):
    """Exit code 2 and one line that names the folder."""
    refused(capsys, tmp_path / "nowhere", "nowhere")
    refused(capsys, "cifar11", "cifar11", "cifar10")
    (tmp_path / "empty/cat").mkdir(parents=True)
    (tmp_path / "empty/cat/readme.txt").write_text("x")
    refused(capsys, tmp_path / "empty", "empty")
    save_flat(tmp_path / "half/train/cat", 1)
    (tmp_path / "half/val").mkdir()
    refused(capsys, tmp_path / "half", "val")
    (tmp_path / "file.png").write_text("x")
    refused(capsys, tmp_path / "file.png", "file.png")


@pytest.mark.parametrize("closed", ["data", "data/train", "data/train/cat", "."])
def test_unreadable_folder(closed, launch):
    """A folder without read permission, or below one: exit code 2 and one line."""
    if os.name != "posix":
        pytest.skip("needs POSIX permissions")
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders let nobody but the owner in
        os.chmod(top, 0o755)
        save_flat(Path(top, "data/train/cat"), 1)
        os.chmod(Path(top, closed), 0)
        become_nobody = "import os\nif os.geteuid() == 0: os.seteuid(65534)\n"  # root may read everything
        load = f"import common\ncommon.load_data({top + '/data'!r})"
        try:
            run = launch(become_nobody + load, world=1)
        finally:
            os.chmod(Path(top, closed), 0o755)
    assert run.codes == [2] and len(run.err[0].splitlines()) == 1, run.err[0]
    assert top + "/data" in run.err[0]


# --------------------------------------------------------------------------- odd images


def ramp16():
    return np.linspace(0, 65535, 64 * 64).reshape(64, 64)


def save_odd(folder):
    """Write files of every odd kind; returns the names of the unreadable ones and the number of all."""
    folder.mkdir()
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    for name in ("a.jpg", "b.png"):
        noise.save(folder / name)
        data = (folder / name).read_bytes()
        (folder / f"cut{name}").write_bytes(data[: len(data) // 2])
    (folder / "c_zero.jpg").write_bytes(b"")
    (folder / "d_text.jpg").write_text("this is not an image\n" * 20)
    noise.convert("CMYK").save(folder / "e_cmyk.jpg")
    Image.fromarray(ramp16().astype(np.uint16)).save(folder / "f_16bit.png")
    Image.fromarray((ramp16() / 65535).astype(np.float32)).save(folder / "g_float.tif")
    noise.quantize(16).save(folder / "h_palette.png", transparency=3)
    Image.new("RGBA", (9, 7), (10, 200, 30, 100)).save(folder / "i_alpha.png")
    Image.new("RGB", (1, 1), (200, 10, 10)).save(folder / "j_1x1.png")
    Image.new("RGB", (1, 400), (10, 10, 200)).save(folder / "k_1x400.png")
    Image.new("RGB", (400, 1), (10, 10, 200)).save(folder / "k_400x1.png")
    os.symlink(folder / "gone.jpg", folder / "l_dangling.jpg")
    (folder / "m_folder.jpg").mkdir()
    Image.new("1", (20, 20), 1).save(folder / "ñ_图像 space.png")
    Image.new("LA", (20, 20), (90, 40)).save(folder / "o_la.png")
    return ["cuta.jpg", "cutb.png", "c_zero.jpg", "d_text.jpg", "l_dangling.jpg"], 17


def test_odd_images_complete_the_epoch(tmp_path, capsys):
    """Bad files are named once and replaced the same way each time; the rest is read; nothing crashes."""
    bad, count = save_odd(tmp_path / "odd")
    data = load_data(str(tmp_path / "odd"))[0]
    assert len(data) == count, data.paths
    loader = loader_of(data, batch_size=count, workers=2)
    first = epoch_of(loader)
    assert sorted(first[0][0].tolist()) == list(range(count))
    assert all(v.shape == (count, 3, 16, 16) and v.isfinite().all() for v in first[0][1])
    list(loader.epoch(1, VIEWS))
    (crops,) = [x for _, x in loader.fixed(torch.arange(count), batch_size=count)]
    assert crops.shape == (count, 1, 3, 16, 16) and crops.isfinite().all()
    out = capsys.readouterr().out
    said = [[line for line in out.splitlines() if f"{name}' (" in line] for name in bad]
    assert [len(x) for x in said] == [1] * len(bad) and len(out.splitlines()) == len(bad), out
    assert sorted(os.path.basename(data.paths[i]) for i in loader.bad) == sorted(bad)
    assert_same(first, epoch_of(loader_of(data, batch_size=count)))
    at = {os.path.basename(p): i for i, p in enumerate(data.paths)}
    for name in ("c_zero.jpg", "d_text.jpg"):  # the next readable one stands in
        assert torch.equal(crops[at[name]], crops[at["e_cmyk.jpg"]])
    assert not torch.equal(crops[at["a.jpg"]], crops[at["e_cmyk.jpg"]])
    torch.testing.assert_close(
        rgb(crops[at["j_1x1.png"]])[0], torch.tensor([200.0, 10, 10]), atol=0.6, rtol=0
    )


@pytest.mark.parametrize("limit", [4, 5])
def test_more_than_max_bad_ends_with_2(limit, tmp_path, capsys):
    """Five bad files: fine with --max-bad 5, exit code 2 and one line with --max-bad 4."""
    bad, count = save_odd(tmp_path / "odd")
    loader = loader_of(load_data(str(tmp_path / "odd"))[0], batch_size=count, max_bad=limit)
    if limit == 5:
        assert len(epoch_of(loader)) == 1
        return
    with pytest.raises(SystemExit) as end:
        epoch_of(loader)
    assert end.value.code == 2 and len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("workers", [0, 1])
def test_no_readable_file_ends_with_2(workers, world, tmp_path, launch):
    """Every file of one process (or of all) is bad: all leave with exit code 2 and one line, none hangs."""
    (tmp_path / "data").mkdir()
    for i in range(8):
        (tmp_path / f"data/{i}.jpg").write_text("no image")
    run = launch(
        f"""
import torch, common
device = common.setup("cpu")
data = common.load_data("data")[0]
loader = common.Loader(data, 4, 16, 16, device, workers={workers}, max_bad=3)
list(loader.epoch(0, [common.View()]))
""",
        world=world,
        limit=20,
    )
    assert run.codes == [2] * world, (run.codes, run.err)
    assert len("".join(run.err).splitlines()) == 1, run.err


def test_decoding_keeps_ramps_and_colours(tmp_path):
    """16-bit, float and palette files: within a grey level of the right 8-bit image, not black or white."""

    def decoded(name):
        image = common.open_image(tmp_path / name)
        assert image.mode == "RGB"
        return np.asarray(image).astype(float)

    ramp = ramp16()
    want = (ramp / 65535 * 255)[..., None].repeat(3, 2)
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.png")
    Image.fromarray(ramp.astype(np.uint16)).save(tmp_path / "a.tif")
    Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "i.tif")
    Image.fromarray((ramp / 65535).astype(np.float32)).save(tmp_path / "f1.tif")
    Image.fromarray((ramp / 257).astype(np.float32)).save(tmp_path / "f255.tif")
    holes = (ramp / 65535).astype(np.float32)
    holes[0, 0] = np.nan
    Image.fromarray(holes).save(tmp_path / "nan.tif")
    for name in ("a.png", "a.tif", "i.tif", "f1.tif", "f255.tif", "nan.tif"):
        gap = np.abs(decoded(name) - want)
        assert gap[1:].max() <= 1.01, f"{name}: {gap.max()}"
    assert common.open_image(tmp_path / "a.png").size == (64, 64)
    stripes = Image.fromarray(np.arange(4, dtype=np.uint8).repeat(4).reshape(4, 4), "P")
    stripes.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255, 9, 9, 9])
    stripes.save(tmp_path / "p.png", transparency=1)
    assert np.array_equal(decoded("p.png")[:, 0], [[255, 0, 0], [0, 255, 0], [0, 0, 255], [9, 9, 9]])


def test_assignments_name_every_file(tmp_path):
    """assignments.csv: one row per image with its path, however odd, or its index without one."""
    import csv

    paths = [str(tmp_path / name) for name in ("a.png", "ñ,图\n.png", os.fsdecode(b"caf\xe9.png"))]
    data = SimpleNamespace(title=lambda i: paths[i])
    common.save_assignments(tmp_path / "assignments.csv", data, torch.tensor([4, 0, 4]))
    with open(tmp_path / "assignments.csv", newline="", errors="surrogateescape") as file:
        rows = list(csv.reader(file))
    assert rows == [["image", "cluster"], [paths[0], "4"], [paths[1], "0"], [paths[2], "4"]]
    digits = load_data("digits")[1]
    common.save_assignments(tmp_path / "b.csv", digits, torch.arange(360) % 3)
    assert (tmp_path / "b.csv").read_text().split()[:4] == ["image,cluster", "0,0", "1,1", "2,2"]


# --------------------------------------------------------------------------- large photographs


@pytest.fixture(scope="module")
def photograph(tmp_path_factory):
    """A JPEG of 1600 x 1200 pixels whose picture can be told from a reduced one, and the same as PNG."""
    folder = tmp_path_factory.mktemp("photograph")
    coarse = np.random.default_rng(0).integers(0, 256, (30, 40, 3), dtype=np.uint8)
    image = Image.fromarray(coarse).resize((1600, 1200), Image.Resampling.BICUBIC)
    image.save(folder / "large.jpg", quality=95)
    image.save(folder / "large.png")
    return folder


@pytest.mark.parametrize(
    "side, size",
    [(0, (1600, 1200)), (601, (1600, 1200)), (600, (800, 600)), (256, (400, 300)), (9, (200, 150))],
)
def test_large_jpegs_are_decoded_smaller_but_not_below_the_side_asked_for(photograph, side, size):
    image = common.open_image(photograph / "large.jpg", side)
    assert image.size == size and image.mode == "RGB"
    whole = common.open_image(photograph / "large.jpg").resize((80, 60), Image.Resampling.BILINEAR)
    small = image.resize((80, 60), Image.Resampling.BILINEAR)
    difference = np.abs(np.asarray(whole, dtype=float) - np.asarray(small, dtype=float))
    assert difference.mean() < 2 and difference.max() < 16
    assert common.open_image(photograph / "large.png", side).size == (1600, 1200)


def test_least_side():
    half = common.View(
        (0.5, 1.0), ratio=(0.5, 2.0)
    )  # the smallest crop: a quarter of the area of a square, at worst
    assert common.least_side([half], 100) == 200
    assert common.least_side([half, common.View((0.08, 1.0), size=10)], 100) == 200
    assert common.least_side([common.View(square=0.5)], 100) == 200
    assert (
        common.least_side([half, common.View(pad=4)], 100) == 0
    )  # it shifts by pixels of the image as it is
    for view in (half, common.View((0.08, 1.0))):
        side = common.least_side([view], 100)
        boxes = common.crop_boxes(torch.rand(20_000, 22), side, side, view.area, view.ratio)
        assert boxes[:, 2:].min() in (99, 100, 101)  # boxes are whole pixels


@pytest.mark.parametrize("kind", ["epoch", "fixed"])
def test_the_loader_reads_large_jpegs_as_it_does_small_ones(photograph, kind, monkeypatch):
    """The same crops, up to the decoder's rounding, as if every pixel had been decoded; and it asks for fewer."""
    paths = [str(photograph / "large.jpg")] * 4
    data = common.Images("photographs", None, paths, None, [], (0.0,) * 3, (1.0,) * 3)
    asked, real, found = [], common.open_image, []
    for reduce in (1, 0):

        def open_image(path, side, reduce=reduce):
            asked.append(side)
            return real(path, side * reduce)

        monkeypatch.setattr(common, "open_image", open_image)
        loader = common.Loader(data, 4, 32, 40, torch.device("cpu"), workers=0)
        if kind == "epoch":
            found += [images for _, (images,) in loader.epoch(0, [common.View((0.3, 1.0))])]
        else:
            found += [crops for _, crops in loader.fixed(torch.arange(4))]
    assert set(asked) == ({68} if kind == "epoch" else {80})
    difference = (found[0] - found[1]).abs()
    assert 0 < difference.mean() < 0.02


@pytest.mark.parametrize("n, wanted", [(28, 44), (28, 28), (32, 45), (96, 32), (7, 3), (1, 5)])
def test_resizing_is_interpolate(n, wanted):
    x = torch.rand(3, 2, n, 11, generator=common.generator("resizing"))
    plain = torch.nn.functional.interpolate(
        x, (wanted, 20), mode="bilinear", align_corners=False, antialias=True
    )
    cpu = torch.device("cpu")
    found = common.resizing(n, wanted, cpu) @ x @ common.resizing(11, 20, cpu).T
    assert (found - plain).abs().max() < 1e-6


def test_fixed_crops_of_memory_leave_the_pixels_alone():
    """Normalised in place, but never in the data set's own memory, resized or not."""
    pixels = torch.randint(0, 256, (8, 1, 32, 32), dtype=torch.uint8, generator=common.generator("fixed"))
    data = common.Images("noise", pixels.clone(), None, None, [], (0.5,), (0.25,))
    for resize in (32, 40):
        loader = common.Loader(data, 4, 32, resize, torch.device("cpu"))
        first, again = (torch.cat([crops for _, crops in loader.fixed(torch.arange(8))]) for _ in range(2))
        assert torch.equal(first, again) and torch.equal(data.pixels, pixels)
        if resize == 32:
            assert torch.allclose(first[:, 0], (pixels / 255 - 0.5) / 0.25, atol=1e-6)
