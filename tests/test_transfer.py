"""extras/transfer.py: its scores beside plain loops, each task learning drawn shapes, runs that go on, processes."""

import copy
import json
import shutil
from argparse import Namespace
from types import SimpleNamespace
from xml.etree import ElementTree

import common
from extras import transfer

import numpy as np
import pytest
import torch
from jobs import ROOT, epochs, one_error, refusal, trap
from PIL import Image

for name in ("torchmetrics", "pycocotools"):
    pytest.importorskip(name, reason="pip install -r extras/requirements.txt")

SCRIPT = f"{ROOT}/extras/transfer.py"
LENET = "--random lenet5 --image-size 32 --workers 0 --device cpu --out run --data VOC"
RUNS = {  # that learn to find drawn shapes, and for the network as it starts
    "classification": f"{LENET} --task classification --batch-size 4 --epochs 40 --lr 0.01 --lr-steps 25 35",
    "detection": f"{LENET} --task detection --epochs 6 --batch-size 4 --lr 0.02 --lr-steps 5 --warmup 20",
    "coco": f"{LENET}/coco --task coco --epochs 5 --batch-size 4 --lr 0.02 --lr-steps 4 --warmup 20",
    "segmentation": f"{LENET} --task segmentation --epochs 8 --batch-size 8 --lr 0.05",
}
COUNT = """
from extras import transfer
def counted(examples, keys, *rest, real=transfer.batches):
    print(len(keys), "images")
    return real(examples, keys, *rest)
transfer.batches = counted
transfer.main()
"""
SIDE = 64
COLORS = {"aeroplane": (255, 40, 40), "cat": (40, 255, 40), "sofa": (60, 90, 255)}  # of the drawn classes


def draw(rng, names, low=18, high=30):
    """(noise (S, S, 3) with one square or disk of each class, [(name, box as (left, top, right, bottom), mask)])."""
    pixels, objects = rng.integers(0, 90, (SIDE, SIDE, 3), dtype=np.uint8), []
    places = rng.permutation(4)[: len(names)]  # in quarters, so that nothing is hidden
    y, x = np.mgrid[:SIDE, :SIDE]
    for name, place in zip(names, places, strict=True):
        w, h = rng.integers(low, high, 2)
        left = 32 * (place % 2) + rng.integers(0, 33 - w)
        top = 32 * (place // 2) + rng.integers(0, 33 - h)
        mask = (x >= left) & (x < left + w) & (y >= top) & (y < top + h)
        pixels[mask] = COLORS[name]
        objects.append((name, [int(left), int(top), int(left + w), int(top + h)], mask))
    return pixels, objects


def choose(rng):
    return [name for name in COLORS if rng.random() < 0.5] or [str(rng.choice(list(COLORS)))]


def write_voc(root, year, splits, seed=0):
    """VOCdevkit/VOC{year} in the real format: JPEG, annotations, lists, palette PNGs of classes."""
    rng, base = np.random.default_rng(seed), root / "VOCdevkit" / f"VOC{year}"
    for name in (
        "JPEGImages",
        "Annotations",
        "ImageSets/Main",
        "ImageSets/Segmentation",
        "SegmentationClass",
    ):
        (base / name).mkdir(parents=True)
    number = 0
    for split, count in splits.items():
        names = []
        for _ in range(count):
            number += 1
            names.append(f"{number:06}")
            pixels, objects = draw(rng, choose(rng))
            Image.fromarray(pixels).save(base / "JPEGImages" / f"{names[-1]}.jpg", quality=95)
            top = ElementTree.Element("annotation")
            labels = np.zeros((SIDE, SIDE), np.uint8)
            for name, (left, upper, right, lower), mask in objects:
                labels[mask] = transfer.VOC.index(name) + 1
                entry = ElementTree.SubElement(top, "object")
                ElementTree.SubElement(entry, "name").text = name
                ElementTree.SubElement(entry, "difficult").text = "0"
                box = ElementTree.SubElement(entry, "bndbox")
                corners = (left + 1, upper + 1, right, lower)  # from 1, the last pixel belongs to it
                for key, value in zip(("xmin", "ymin", "xmax", "ymax"), corners, strict=True):
                    ElementTree.SubElement(box, key).text = str(value)
            ElementTree.ElementTree(top).write(base / "Annotations" / f"{names[-1]}.xml")
            labels[:2] = 255
            picture = Image.fromarray(labels)
            picture.putpalette([i for i in range(256) for _ in range(3)])
            picture.save(base / "SegmentationClass" / f"{names[-1]}.png")
        for kind in ("Main", "Segmentation"):
            (base / "ImageSets" / kind / f"{split}.txt").write_text("\n".join(names) + "\n")


def write_coco(root):
    """train2017/, val2017/ and annotations/ in the real format: polygons, a crowd as run lengths, ids with gaps, an
    image without objects."""
    rng, ids = np.random.default_rng(5), dict(zip(COLORS, (7, 3, 50), strict=True))
    categories = [{"id": c, "name": name} for name, c in ids.items()]
    (root / "annotations").mkdir(parents=True)
    for split, count in (("train2017", 64), ("val2017", 33)):
        (root / split).mkdir()
        images, annotations = [], []
        for i in range(1, count + 1):
            pixels, objects = draw(rng, choose(rng) if i > 1 else [])
            images.append({"id": i, "file_name": f"{i:012}.jpg", "height": SIDE, "width": SIDE})
            Image.fromarray(pixels).save(root / split / images[-1]["file_name"], quality=95)
            for name, (left, top, right, bottom), mask in objects:
                one = {"id": len(annotations) + 1, "image_id": i, "category_id": ids[name], "iscrowd": 0}
                one |= {
                    "bbox": [left, top, right - left, bottom - top],
                    "area": int(mask.sum()),
                    "segmentation": [[left, top, right, top, right, bottom, left, bottom]],
                }
                annotations.append(one)
        crowd = {"counts": [64 * 10, 64 * 5, 64 * 49], "size": [SIDE, SIDE]}  # columns 10 to 14
        one = {
            "id": len(annotations) + 1,
            "image_id": 2,
            "category_id": 3,
            "iscrowd": 1,
            "segmentation": crowd,
        }
        annotations.append({**one, "bbox": [10, 0, 5, 64], "area": 320})
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (root / "annotations" / f"instances_{split}.json").write_text(text)


@pytest.fixture(scope="session")
def voc(tmp_path_factory):
    """The root of VOC 2007 and 2012, and of COCO below it."""
    root = tmp_path_factory.mktemp("voc")
    write_voc(root, 2007, {"trainval": 64, "test": 33})
    write_voc(root, 2012, {"train": 64, "val": 33}, 1)
    lists = root / "VOCdevkit" / "VOC2012" / "ImageSets" / "Main"
    (lists / "trainval.txt").write_text((lists / "train.txt").read_text() + (lists / "val.txt").read_text())
    write_coco(root / "coco")
    return root


@pytest.fixture(scope="module")
def go(run, voc):
    """go(arguments, ..): a run of the script; VOC stands for the data."""
    return lambda arguments, *more, **named: run(arguments.replace("VOC", str(voc)), *more, **named)


@pytest.fixture(scope="module")
def trained(go):
    """{task: the job of RUNS}, each run once."""
    done = {}

    def get(task):
        if task not in done:
            done[task] = go(RUNS[task])
        return done[task]

    return get


def result(job):
    return job.log()[-1]["result"]


def untrained(go, task):
    return result(go(f"{RUNS[task]} --epochs 0"))


# --------------------------------------------------------------------------- scores


def plain_ap(scores, positive):
    """(11 points, area) of a ranking without ties, from their definitions."""
    ranked = [p for _, p in sorted(zip(scores, positive, strict=True), reverse=True)]
    points = []  # (positives so far, precision) after each image
    for n in range(1, len(ranked) + 1):
        points.append((sum(ranked[:n]), sum(ranked[:n]) / n))
    total = sum(positive)
    at = [max((p for hits, p in points if hits * 10 >= t * total), default=0.0) for t in range(11)]
    area = [next(p for hits, p in points if hits == k) for k in range(1, total + 1)]  # where the k-th comes
    return sum(at) / 11, sum(area) / total


def test_average_precision_is_that_of_plain_loops():
    rng = np.random.default_rng(0)
    for n in (1, 2, 7, 40, 41, 300):
        for share in (0.1, 0.5, 0.9):
            scores, positive = rng.permutation(n) / n, rng.random(n) < share
            positive[rng.integers(n)] = True
            found = transfer.average_precision(torch.tensor(scores), torch.tensor(positive))
            wanted = plain_ap(scores.tolist(), positive.tolist())
            assert [x.item() for x in found] == pytest.approx(wanted, abs=1e-12), (n, share)


def test_average_precision_by_hand():
    def ap(scores, positive):
        found = transfer.average_precision(torch.tensor(scores), torch.tensor(positive) > 0)
        return [x.item() for x in found]

    assert ap([4.0, 3, 2, 1], [1, 1, 0, 0]) == [1, 1]
    assert ap([1.0, 2, 3, 4], [1, 0, 0, 0]) == [0.25, 0.25]
    # Precision 1 up to recall 1/2, then 2/3: six recalls 0 .. 0.5, and five.
    assert ap([9.0, 8, 7, 6], [1, 0, 1, 0]) == pytest.approx([(6 + 5 * 2 / 3) / 11, (1 + 2 / 3) / 2])
    # First 1/2, then 2/3 at full recall, which the 11 points count for all recalls.
    assert ap([9.0, 8, 7], [0, 1, 1]) == pytest.approx([2 / 3, (1 / 2 + 2 / 3) / 2])
    assert ap([5.0, 5, 5, 5], [1, 1, 0, 0]) == ap([4.0, 3, 2, 1], [0, 0, 1, 1])  # ties count against us
    assert all(np.isnan([*ap([1.0, 2], [0, 0]), *ap([], [])]))


def test_random_scores_have_the_share_of_positives():
    gen = torch.Generator().manual_seed(0)
    scores, positive = torch.rand(20, 4000, generator=gen), torch.rand(20, 4000, generator=gen) < 0.3
    found = torch.tensor([transfer.average_precision(*x) for x in zip(scores, positive, strict=True)])
    assert found[:, 1].mean() == pytest.approx(0.3, abs=0.02)
    assert found[:, 0].mean() == pytest.approx(
        0.3, abs=0.06
    )  # the best precision is often that of a few images


def test_mean_iou_is_that_of_plain_loops():
    rng = np.random.default_rng(0)
    truth, guess = rng.integers(0, 5, 500), rng.integers(0, 5, 500)
    guess[:200], counts = truth[:200], torch.zeros(7, 7, dtype=torch.int64)  # classes 5 and 6 are nowhere
    guess[0] = 5  # but where it is predicted, once
    for t, g in zip(truth, guess, strict=True):
        counts[t, g] += 1
    shares = []
    for c in range(6):
        both = sum(t == c and g == c for t, g in zip(truth, guess, strict=True))
        shares.append(both / sum(t == c or g == c for t, g in zip(truth, guess, strict=True)))
    assert transfer.mean_iou(counts).item() == pytest.approx(sum(shares) / 6)


def test_pixels_are_scored_but_the_void():
    truth = torch.tensor([[0, 1, 255], [20, 20, 255]])
    guess = torch.tensor([[0, 1, 7], [20, 0, 3]])
    net = lambda images: torch.nn.functional.one_hot(guess, 21).permute(2, 0, 1)[None].float()  # noqa: E731
    found = [([torch.zeros(3, 2, 3)], [truth])]
    # Class 0: 1 of 2 pixels, 1: 1 of 1, 20: 1 of 2.
    assert transfer.score_pixels(net, found) == {"mean IoU": pytest.approx(2 / 3)}


def test_padding_and_void_are_out_of_the_loss():
    """Images of two sizes, a network of single pixels: the mean over the pixels of both that are known."""
    gen = torch.Generator().manual_seed(0)
    images = [torch.rand(3, *size, generator=gen) for size in ((4, 6), (5, 3))]
    truth = [torch.randint(21, x.shape[1:], generator=gen) for x in images]
    truth[0][1, 2], truth[1][4, :] = 255, 255
    weights = torch.randn(21, 3, generator=gen)
    loss = transfer.loss_of(
        "segmentation", lambda x: torch.einsum("kc,bchw->bkhw", weights, x), images, truth
    )
    each = []
    for image, classes in zip(images, truth, strict=True):
        for pixel, c in zip(image.flatten(1).T, classes.flatten().tolist(), strict=True):
            each += [] if c == 255 else [-(weights @ pixel).log_softmax(0)[c].item()]
    assert len(each) == 24 + 15 - 4 and loss.item() == pytest.approx(np.mean(each), rel=1e-5)


def test_difficult_objects_are_out_of_loss_and_score():
    y = torch.tensor([[1.0, -1, 0], [0.0, 1, -1]])
    y = torch.cat([y, torch.zeros(2, 17)], 1)  # (2, 20)
    logits = torch.randn(2, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    loss = transfer.loss_of("classification", lambda x: x, [logits[:1], logits[1:]], list(y))
    wanted = 0
    for row, marks in zip(logits.tolist(), y.tolist(), strict=True):
        for x, mark in zip(row, marks, strict=True):
            p = 1 / (1 + np.exp(-x))
            wanted -= 0 if mark < 0 else np.log(p if mark else 1 - p)
    assert loss.item() == pytest.approx(wanted / 2, rel=1e-5)
    loss.backward()
    assert ((logits.grad == 0) == (y < 0)).all()

    # Three images, one class; crops' mean logits are 3, 2, 1; the difficult one is first, and no error.
    crops = [torch.full((10, 20), -9.0) for _ in range(3)]
    for x, mean in zip(crops, (3.0, 2.0, 1.0), strict=True):
        x[:, 4] = mean + torch.linspace(-1, 1, 10)
    y = torch.zeros(3, 20)
    y[:, 4] = torch.tensor([-1.0, 1.0, 0.0])
    scores = transfer.score_classes(lambda x: x, [(crops[:2], list(y[:2])), (crops[2:], list(y[2:]))])
    assert scores == {"mAP, 11 points (VOC 2007)": 1.0, "mAP, area": 1.0, "mAP of random scores": 0.5}
    y[0, 4] = 0
    scores = transfer.score_classes(lambda x: x, [(crops, list(y))])
    assert scores.pop("mAP of random scores") == pytest.approx(1 / 3)
    assert scores == {"mAP, 11 points (VOC 2007)": 0.5, "mAP, area": 0.5}


def test_boxes_are_scored_but_difficult_ones():
    common.setup("cpu")
    boxes = torch.tensor([[0.0, 0, 20, 20], [30, 30, 50, 50], [0, 40, 20, 60]])
    target = {"boxes": boxes, "labels": torch.tensor([3, 3, 3]), "iscrowd": torch.tensor([0, 0, 1])}

    def score(guessed):
        guess = {"boxes": guessed, "labels": torch.full((len(guessed),), 3)}
        guess["scores"] = torch.linspace(0.9, 0.5, len(guessed))
        net = lambda images: [guess]  # noqa: E731
        net.roi_heads = SimpleNamespace(has_mask=lambda: False)
        return transfer.score_boxes(net, [([torch.zeros(3, 64, 64)], [target])])

    assert score(boxes[:2]) == {"box AP": 1, "box AP50": 1, "box AP75": 1}
    assert score(boxes) == {"box AP": 1, "box AP50": 1, "box AP75": 1}  # the third is no error
    half = pytest.approx(51 / 101)  # recalls 0, 0.01 .. 0.5
    assert score(boxes[[2, 0]]) == {"box AP": half, "box AP50": half, "box AP75": half}
    low = boxes[:2] + torch.tensor([0, 0, 0, 10.0])  # IoU 2/3: four of the ten thresholds
    assert score(low) == {"box AP": pytest.approx(0.4), "box AP50": 1, "box AP75": 0}


# --------------------------------------------------------------------------- data


def annotation(*objects):
    made = [{"name": n, "difficult": d, "bndbox": dict(zip(("xmin", "ymin", "xmax", "ymax"), map(str, b), strict=True))}
            for n, d, b in objects]  # fmt: skip
    return {"annotation": {"object": made}}


def test_annotations_of_voc():
    target = annotation(
        ("cat", "0", (1, 1, 10, 20)), ("cat", "1", (5, 6, 7, 8)), ("tvmonitor", "1", (2, 3, 4, 5))
    )
    image = Image.new("RGB", (64, 48))
    _, found = transfer.voc_target("detection", image, target)
    assert found["boxes"].tolist() == [[0, 0, 10, 20], [4, 5, 7, 8], [1, 2, 4, 5]]
    assert found["labels"].tolist() == [8, 8, 20] and found["iscrowd"].tolist() == [0, 1, 1]
    for order in (target["annotation"]["object"], target["annotation"]["object"][::-1]):
        _, y = transfer.voc_target("classification", image, {"annotation": {"object": order}})
        assert y.tolist() == [0] * 7 + [1] + [0] * 11 + [-1]


def splits(task, voc, arch="lenet5", more=""):
    args = transfer.options(
        [*f"--random {arch} --task {task} --data {voc} --image-size 32 --workers 0 {more}".split()]
    )
    train, test, paths, classes = transfer.load(args)
    return args, transfer.Examples(train, args, True), transfer.Examples(test, args, False), paths, classes


def test_coco_is_read_with_its_masks_and_crowds(voc):
    _, train, test, paths, classes = splits("coco", voc / "coco")
    assert (
        classes == 4 and len(train.source) == len(paths) == 63 and len(test.source) == 33
    )  # one has no object
    assert paths[0].endswith("train2017/000000000002.jpg")
    rng = np.random.default_rng(5)
    drawn = [draw(rng, choose(rng) if i else []) for i in range(64)]
    label = {"cat": 1, "aeroplane": 2, "sofa": 3}  # by ids 3, 7, 50
    seen = set()
    for i in range(8):
        for seed in range(4):
            image, target = train[i, seed]
            masks = torch.stack([torch.tensor(mask) for *_, mask in drawn[i + 1][1]])
            assert target["labels"].tolist() == [label[name] for name, *_ in drawn[i + 1][1]]
            boxes = torch.tensor([box for _, box, _ in drawn[i + 1][1]]).float()
            same = torch.equal(target["masks"] > 0, masks)
            flipped = torch.stack([64 - boxes[:, 2], boxes[:, 1], 64 - boxes[:, 0], boxes[:, 3]], 1)
            assert torch.equal(target["boxes"], boxes if same else flipped)
            assert same or torch.equal(target["masks"] > 0, masks.flip(2))
            background = ~(target["masks"] > 0).any(0)  # colors are bright, and so shapes lie where masks are
            assert image.amax(0)[background].mean() < 0.4 < image.amax(0)[~background].min()
            seen.add(same)
    assert seen == {True, False} and not (target["iscrowd"] > 0).any()
    image, target = test[1, 0]
    assert target["iscrowd"].tolist()[-1] == 1 and target["masks"][-1].nonzero()[:, 1].unique().tolist() == [
        *range(10, 15)
    ]
    image, target = test[0, 0]
    assert target["boxes"].shape == (0, 4) and target["masks"].shape == (0, 64, 64)


def test_difficult_boxes_train_resnets_alone():
    target = annotation(("cat", "0", (1, 1, 10, 20)), ("cat", "1", (5, 6, 7, 8)))
    source = [transfer.voc_target("detection", Image.new("RGB", (64, 48)), target)]
    for arch, count in (("lenet5", 1), ("resnet18", 2)):
        args = transfer.options(["--random", arch, "--task", "detection"])
        assert len(transfer.Examples(source, args, True)[0, 0][1]["boxes"]) == count
        assert len(transfer.Examples(source, args, False)[0, 0][1]["boxes"]) == 2


def test_crops_of_classification(voc):
    _, train, test, paths, classes = splits("classification", voc)
    assert len(paths) == 64 and len(test.source) == 33
    crops, y = train[3, 1]
    assert crops.shape == (1, 3, 32, 32) and y.shape == (20,)
    crops, _ = test[3, 3]
    assert crops.shape == (10, 3, 32, 32) and len({x.sum().item() for x in crops}) == 10
    assert torch.equal(crops, test[3, 3][0])


# --------------------------------------------------------------------------- recipes and networks


def recipe(task, arch="resnet50", more=""):
    return transfer.options(["--task", task, "--random", arch, *more.split()])


def test_recipes_are_the_papers():
    """Numbers of the papers and their code, typed by hand; iterations x batch / images gives epochs."""
    for more, lr, every in (("", 0.001, 20_000), ("--layers fc6-8", 0.003, 5_000)):
        args = recipe("classification", "alexnet", more)
        assert (args.batch_size, args.lr, args.wd, args.clip, args.lr_factor) == (16, lr, 1e-6, 10, 0.5)
        assert args.epochs == round(150_000 * 16 / 5011) and args.lr_steps[0] == round(every * 16 / 5011)
        assert np.diff([0, *args.lr_steps, 479]).max() == args.lr_steps[0] and args.crop_area == [0.1, 0.5]
        assert args.train == ["2007 trainval"] and args.test == "2007 test"
    args = recipe("detection")
    assert (args.batch_size, args.lr, args.wd, args.warmup, args.lr_factor) == (16, 0.02, 1e-4, 100, 0.1)
    wanted = [round(n * 16 / 16_551) for n in (24_000, 18_000, 22_000)]
    assert [args.epochs, *args.lr_steps] == wanted == [23, 17, 21]
    assert args.min_size == [480, 512, 544, 576, 608, 640, 672, 704, 736, 768, 800] and args.max_size == 1333
    assert (
        args.train == ["2007 trainval", "2012 trainval"] and args.test == "2007 test" and args.layers == "all"
    )
    assert (args.rois, args.anchors, args.anchors_for) == (512, [32, 64, 128, 256, 512], 800)
    for arch in ("alexnet", "vgg16"):
        args = recipe("detection", arch)
        assert (args.batch_size, args.lr, args.wd, args.warmup, args.min_size) == (2, 0.001, 5e-4, 0, [600])
        assert [args.epochs, *args.lr_steps] == [round(n * 2 / 5011) for n in (70_000, 50_000)]
        assert args.train == ["2007 trainval"] and args.max_size == 1000 and args.rois == 128
        assert (args.anchors, args.anchors_for) == ([128, 256, 512], 600)
    args = recipe("coco")
    assert (args.batch_size, args.lr, args.wd, args.warmup) == (16, 0.02, 1e-4, 1000)
    wanted = [round(n * 16 / 117_266) for n in (90_000, 60_000, 80_000)]
    assert [args.epochs, *args.lr_steps] == wanted == [12, 8, 11]
    assert (
        args.min_size == [640, 672, 704, 736, 768, 800]
        and args.train == ["train2017"]
        and args.test == "val2017"
    )
    args = recipe("segmentation", "alexnet")
    assert (args.batch_size, args.lr, args.wd, args.lr_steps) == (20, 1e-4, 5e-4, [])
    assert (
        args.epochs == round(100_000 * 20 / 1464) and args.train == ["2012 train"] and args.test == "2012 val"
    )
    names = "aeroplane bicycle bird boat bottle bus car cat chair cow diningtable dog horse motorbike person pottedplant"
    assert transfer.VOC[1:] == [*names.split(), "sheep", "sofa", "train", "tvmonitor"]


def test_the_rate_rises_then_falls():
    args = Namespace(
        task="classification", amp=False, lr=8.0, lr_factor=0.5, lr_steps=[1, 2], warmup=4, clip=None
    )
    net, rates = torch.nn.Linear(4, 20), []
    optimizer = torch.optim.SGD(net.parameters(), 0.0)
    optimizer.step = lambda: rates.append(optimizer.param_groups[0]["lr"])
    for epoch in range(3):
        found = [([torch.zeros(1, 4)], [torch.zeros(20)])] * 3
        transfer.train(net, optimizer, found, epoch, 3 * epoch, common.Meter("", 3), args)
    assert rates == pytest.approx([0.008, 2.008, 4.008, 3.004, 4, 4, 2, 2, 2])


@pytest.mark.parametrize("arch", ["lenet5", "alexnet-small", "resnet18"])
@pytest.mark.parametrize("layers", ["all", "fc6-8"])
@pytest.mark.parametrize("task", RUNS)
def test_what_is_frozen_stays_and_all_else_trains(voc, task, layers, arch):
    """Each trainable parameter moves, so that none is unused, for which several processes would wait; batch norm of
    convolutions keeps weights and statistics. With a Sobel filter before."""
    root = voc / "coco" if task == "coco" else voc
    args, train, _, _, classes = splits(task, root, arch, f"--layers {layers} --sobel")
    args.rois, args.proposals, args.min_size, args.warmup, args.lr = 8, [100, 20, 100, 20], [64], 0, 0.1
    torch.manual_seed(0)
    backbone = common.Backbone(arch, 3, 32, True, pool=True)
    net = transfer.make_network(args, backbone, classes)
    before = copy.deepcopy(net.state_dict())
    optimizer = torch.optim.SGD([x for x in net.parameters() if x.requires_grad], args.lr, weight_decay=1e-3)
    found = transfer.batches(train, [(i, i) for i in range(2, 4)], 2, torch.device("cpu"))
    transfer.train(net, optimizer, found, 0, 0, common.Meter("", 2), args)
    norms = [m for m in backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    frozen = {id(x) for m in norms for x in (m.weight, m.bias, m.running_mean, m.running_var)}
    if layers == "fc6-8":
        frozen |= {id(m.weight) for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)}
        frozen |= {id(m.bias) for m in backbone.modules() if isinstance(m, torch.nn.Conv2d)} - {id(None)}
    moved = {name: not torch.equal(x, before[name]) for name, x in net.state_dict().items()}
    ours = {
        **dict(net.named_parameters(remove_duplicate=False)),
        **dict(net.named_buffers(remove_duplicate=False)),
    }
    kept = {name for name, x in ours.items() if id(x) in frozen}
    assert len(kept) > 5 and not any(moved[name] for name in kept if name in moved)
    others = {n for n in moved if n not in kept and "num_batches" not in n and "filters" not in n}
    assert len(others) >= 2 and all(moved[name] for name in others), [n for n in others if not moved[n]]


def test_regions_of_each_network():
    """Map, stride and head of networks at 224 pixels, by hand."""
    wanted = {"alexnet": (256, 6, 4096, 14), "vgg16": (512, 7, 4096, 14), "resnet18": (256, 14, 512, 14)}
    for arch, (channels, side, dim, size) in wanted.items():
        backbone = common.Backbone(arch, pool=True).eval()
        layers, found, head, region = transfer.split(backbone)
        with torch.no_grad():
            x = torch.nn.Sequential(*layers)(torch.zeros(1, 3, 224, 224))
            assert head(torch.zeros(3, channels, side, side)).shape == (3, dim)
        assert (found, region) == (channels, side) and x.shape[:2] == (1, channels)
        assert abs(x.shape[2] - size) <= 1  # stride 16


def test_a_cell_of_a_plain_map_lies_where_it_looks():
    """The gradient of the map's middle is centered on the image's."""
    torch.manual_seed(0)
    for arch, stride in (("lenet5", 2), ("vgg16", 16), ("alexnet", 16)):
        layers = transfer.split(common.Backbone(arch, image_size=64).eval())[0]
        image = torch.rand(1, 3, 160, 160, requires_grad=True)
        x = torch.nn.Sequential(*layers)(image)
        assert x.shape[2] == 160 // stride
        x[0, :, 80 // stride].sum().backward()
        rows = image.grad[0].abs().sum((0, 2))
        center = (rows * (torch.arange(160) + 0.5)).sum() / rows.sum()
        assert abs(center - 80) <= stride / 2 + 0.5


def test_anchors_follow_the_size(voc):
    args, _, _, _, classes = splits("detection", voc)
    net = transfer.make_network(args, common.Backbone("lenet5", image_size=32), classes)
    assert net.rpn.anchor_generator.sizes == ((14, 27, 55),)  # 128, 256, 512 x 64 / 600
    args = recipe("detection", "resnet18")
    net = transfer.make_network(args, common.Backbone("resnet18", pool=True), classes)
    assert net.rpn.anchor_generator.sizes == ((32, 64, 128, 256, 512),)


# --------------------------------------------------------------------------- runs


def test_classification_learns_drawn_classes(trained, go):
    job, names = trained("classification"), ("mAP, 11 points (VOC 2007)", "mAP, area")
    found, start = result(job), untrained(go, "classification")
    assert min(found[name] for name in names) > 0.8 > 0.7 > max(start[name] for name in names)
    assert found["mAP of random scores"] == pytest.approx(0.5, abs=0.15)  # about half of the images have each
    assert epochs(job.log())[-1]["loss"] < 4 < 20 * np.log(2)
    means, stds = (job.state()["net"][f"0.net.features.1.running_{name}"] for name in ("mean", "var"))
    assert (means != 0).all() and (stds != 1).all()  # of training images, as the network is random


def test_detection_finds_drawn_shapes(trained, go):
    assert result(trained("detection"))["box AP50"] > 0.5
    assert untrained(go, "detection")["box AP50"] < 0.05


def test_coco_finds_boxes_and_masks(trained, go):
    found, before = result(trained("coco")), untrained(go, "coco")
    assert found["mask AP50"] > 0.2 and found["box AP50"] > 0.2
    assert before["mask AP50"] < 0.05 and before["box AP50"] < 0.05
    assert [*found] == [f"{kind} {name}" for kind in ("box", "mask") for name in ("AP", "AP50", "AP75")]


def test_segmentation_of_drawn_shapes(trained, go):
    assert result(trained("segmentation"))["mean IoU"] > 0.5 > 0.2 > untrained(go, "segmentation")["mean IoU"]


@pytest.mark.parametrize("task", ["classification", "detection"])
def test_a_killed_run_goes_on_as_if_nothing_had_happened(go, task):
    short = f"{RUNS[task]} --epochs 2"
    whole = go(short)
    steps = 64 // 4
    killed = go(short, trap("extras.transfer", "extras.transfer", "loss_of", steps + 2), ok=False)
    assert killed.code == -9 and killed.state()["epoch"] == 1
    again = go(short, folder=killed.folder)
    assert [r["loss"] for r in epochs(again.log())] == [r["loss"] for r in epochs(whole.log())]
    assert result(again) == result(whole)
    torch.testing.assert_close(again.state()["net"], whole.state()["net"], rtol=0, atol=0)
    size = len((again.run / "log.jsonl").read_bytes())
    assert "finished" in go(short, folder=killed.folder).out  # and the next time there is nothing to do
    assert len((again.run / "log.jsonl").read_bytes()) == size


@pytest.mark.parametrize("task", RUNS)
def test_two_processes_give_the_same_scores(trained, go, task, tmp_path):
    """33 test images, 16 and 17 for each; the log without its result makes the run evaluate once more."""
    job = trained(task)
    shutil.copytree(job.run, tmp_path / "run")
    lines = (job.run / "log.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "run" / "log.jsonl").write_text("".join(lines[:-1]))
    again = go(RUNS[task], COUNT, world=2, folder=tmp_path)
    assert ["16 images" in again.by_process("out")[0], "17 images" in again.by_process("out")[1]] == [
        True,
        True,
    ]
    assert result(again) == pytest.approx(result(job), abs=1e-6) and "result" in lines[-1]


def test_two_processes_train_as_one(go):
    """Each takes half of every batch, so classification, without dropout here, is the same up to rounding."""
    short = f"{RUNS['classification']} --epochs 2"
    one, two = (epochs(go(short, world=world).log()) for world in (1, 2))
    assert [r["loss"] for r in two] == pytest.approx([r["loss"] for r in one], rel=1e-4)


@pytest.mark.parametrize("layers", ["all", "fc6-8"])
def test_two_processes_train_a_detector(go, layers):
    """No parameter is without gradient, which the other process would miss; losses fall."""
    records = epochs(
        go(f"{RUNS['detection']} --epochs 2 --batch-size 8 --warmup 5 --layers {layers}", world=2).log()
    )
    assert records[1]["loss"] < records[0]["loss"]


def test_a_backbone_of_a_run_is_taken(go, voc, tmp_path):
    """The file's weights, normalization and size; frozen, they are there in the end."""
    torch.manual_seed(1)
    backbone = common.Backbone("lenet5", 3, 40, True)
    meta = {**backbone.meta, "method": "coke-2", "center_fraction": 1.0, "data": "x", "mean": [0.1, 0.2, 0.3]}
    saved = {"state_dict": backbone.net.state_dict(), "meta": {**meta, "std": [0.5, 0.6, 0.7]}}
    common.save_file(tmp_path / "backbone.pt", saved)
    more = "--task classification --data VOC --workers 0 --device cpu --layers fc6-8 --epochs 1 --out run"
    job = go(f"{tmp_path} {more}")
    args = job.log()[0]["args"]
    assert (args["mean"], args["std"], args["image_size"]) == ([0.1, 0.2, 0.3], [0.5, 0.6, 0.7], 40)
    after = torch.load(job.run / "backbone.pt", weights_only=True)
    assert after["meta"]["sobel"] and after["meta"]["arch"] == "lenet5"
    for name, x in saved["state_dict"].items():
        assert torch.equal(x, after["state_dict"][name]) == name.startswith("features"), name


def test_mistakes_end_with_one_line(go, voc, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as end:
        transfer.options(["--task", "detection"])
    assert end.value.code == 2 and "--random" in capsys.readouterr().err
    assert "VOCdevkit" in one_error(go(f"{LENET} --data {tmp_path} --task detection", ok=False))
    assert "train2017" in one_error(go(f"{LENET} --data {tmp_path} --task coco", ok=False))
    assert "batch-size" in one_error(go(f"{LENET} --batch-size 65", ok=False))
    monkeypatch.setattr(transfer, "find_spec", lambda name: name != "torchmetrics")
    for task in ("detection", "coco"):
        assert "pip install -r extras/requirements.txt" in refusal(
            transfer.options, ["--random", "lenet5", "--task", task], capsys
        )
    assert transfer.options(["--random", "lenet5", "--task", "segmentation"]).epochs == 1366
