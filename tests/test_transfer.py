"""extras/transfer.py: its measures beside plain loops, each task learning drawn shapes, runs that go on, processes."""

import json
from xml.etree import ElementTree

from extras import transfer

import numpy as np
import pytest
import torch
from PIL import Image

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
    for name in ("JPEGImages", "Annotations", "ImageSets/Main", "ImageSets/Segmentation", "SegmentationClass"):
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
            for name, (l, t, r, b), mask in objects:
                one = {"id": len(annotations) + 1, "image_id": i, "category_id": ids[name], "iscrowd": 0}
                one |= {"bbox": [l, t, r - l, b - t], "area": int(mask.sum()), "segmentation": [[l, t, r, t, r, b, l, b]]}
                annotations.append(one)
        crowd = {"counts": [64 * 10, 64 * 5, 64 * 49], "size": [SIDE, SIDE]}  # columns 10 to 14
        one = {"id": len(annotations) + 1, "image_id": 2, "category_id": 3, "iscrowd": 1, "segmentation": crowd}
        annotations.append({**one, "bbox": [10, 0, 5, 64], "area": 320})
        text = json.dumps({"images": images, "annotations": annotations, "categories": categories})
        (root / "annotations" / f"instances_{split}.json").write_text(text)


if __name__ == "__main__":
    import sys
    from pathlib import Path
    write_voc(Path(sys.argv[1]), 2007, {"trainval": 64, "test": 33})
    write_voc(Path(sys.argv[1]), 2012, {"train": 64, "val": 33}, 1)
    write_coco(Path(sys.argv[1]) / "coco")
