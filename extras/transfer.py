"""Transfer of a trained backbone: classification, detection and segmentation of PASCAL VOC, and COCO.

Protocols of DeepCluster (ECCV 2018, 4.4, code) and CoKe (CVPR 2022, supplementary 2.3, which follows MoCo's code).

    classification  logits = linear(features)  (B, 20)                   mAP of the mean of ten random crops
    detection       proposals = boxes which two small convolutions of the map take for objects
                    class, box = head(map cut to each proposal)          Faster R-CNN: AP, AP50, AP75 of boxes
    coco            the same, and a mask for each box                    Mask R-CNN: those of masks, too
    segmentation    scores = enlarge(convolutions(map))  (B, 21, H, W)   FCN: mean IoU

map, head: ResNets' layer3, layer4 (C4; segmentation: map of layer4); others' last convolution, hidden linear layers.

    python -m extras.transfer RUN --layers fc6-8            convolutions frozen; RUN: run folder, backbone.pt, checkpoint
    python -m extras.transfer --random alexnet --sobel      a random network, to compare with
    torchrun --nproc_per_node=8 -m extras.transfer RUN --task coco --data data/coco

Task and network decide the recipe, flags override. The papers' iterations are epochs here: iterations x batch size /
images, rounded: 5,011 of VOC 2007 trainval, 16,551 with 2012's, 1,464 of VOC 2012 train, 117,266 of COCO train2017 with
objects. --epochs 0 tests the network as it starts. Own data: in these formats, VOC's with its 20 names. What to expect:
VOC and COCO were never run. Up to 64 pixels proposals are few, a step of 4 images takes a core 0.1 s (ResNet-18: 5 s).

Departs from the papers and their code, on purpose:
 1. Batch norm of convolutions is frozen; MoCo and CoKe train it, over all GPUs, and add one behind layer4, and
    DeepCluster's classification trains its weights. A random network's has the statistics of 256 training images.
 2. CoKe's network for COCO is an FPN, ours MoCo's C4, with schedule "1x". CoKe searches the learning rate: --lr.
 3. Boxes are scored as COCO's (101 points, 100 an image), on VOC, too (the papers: 11 points). Difficult objects are
    COCO's crowds: not missed, and no box inside them is wrong, which raises AP. With ResNets they are trained on.
 4. AlexNet, VGG-16, LeNet-5: RoIAlign (py-faster-rcnn: pooling); layers pad half their kernel, so that a cell of the
    map lies where it looks, or half a cell off; masks by four convolutions. The first convolutions train, too. Anchors
    follow the size of test images. Of all networks losses, RoIAlign, resizing and new layers are torchvision's.
 5. Segmentation: torchvision's FCN head, not fc6 and fc7 as convolutions; VOC 2012 train (the code: SBD); images
    padded to the batch's largest, half of them flipped; the loss is the mean over pixels.
 6. Classification: crops, 150,000 iterations and mAP by area are DeepCluster's code's, not in the paper.
 7. bf16 autocast on GPUs, but for detectors, whose boxes it rounds. Images are tested one by one but in classification.
"""

import argparse
import time
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Backbone, Images, Loader, Meter, Run, all_gather, all_reduce_sum, autocast, error, fill_batch_norm,
    load_backbone, number, parallel, print_once, read_backbone, seed_epoch, setup, shard, to_device,
)  # fmt: skip

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.datasets import CocoDetection, VOCDetection, VOCSegmentation
from torchvision.models.detection.faster_rcnn import AnchorGenerator, FasterRCNN, FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNN, MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation.fcn import FCN_ResNet50_Weights, FCNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import normalize, pil_to_tensor
from torchvision.tv_tensors import BoundingBoxes, Mask

# %% recipes and options
# Task and task-variant -> hyper-parameters. lr_factor: at each of lr_steps; clip: the gradient's largest norm; rois:
# regions of an image that train the head; proposals: before and after suppression in training, then in testing; nms:
# from this IoU on the weaker of two boxes is dropped.

SHARED = {"layers": "all", "lr_factor": 0.1, "warmup": 0, "clip": None, "difficult": False}
C4 = {
    **SHARED, "epochs": 23, "batch_size": 16, "lr": 0.02, "lr_steps": [17, 21], "wd": 1e-4, "warmup": 100,
    "train": ["2007 trainval", "2012 trainval"], "test": "2007 test", "difficult": True,
    "min_size": [*range(480, 801, 32)], "max_size": 1333, "anchors": [32, 64, 128, 256, 512], "anchors_for": 800,
    "rois": 512, "proposals": [12000, 2000, 6000, 1000], "nms": 0.5,
}  # fmt: skip
PLAIN = {
    "epochs": 28, "batch_size": 2, "lr": 0.001, "lr_steps": [20], "wd": 5e-4, "warmup": 0, "difficult": False,
    "train": ["2007 trainval"], "min_size": [600], "max_size": 1000, "anchors": [128, 256, 512], "anchors_for": 600,
    "rois": 128, "proposals": [12000, 2000, 6000, 300], "nms": 0.3,
}  # fmt: skip
LAPTOP = {"rois": 64, "proposals": [500, 200, 500, 100], "min_size": [64], "max_size": 107}  # up to 64 pixels
RECIPES = {
    "classification": {**SHARED, "epochs": 479, "batch_size": 16, "lr": 0.001, "lr_steps": [*range(64, 479, 64)],
        "lr_factor": 0.5, "wd": 1e-6, "clip": 10.0, "train": ["2007 trainval"], "test": "2007 test", "crop_area": [0.1, 0.5]},
    "classification-fc6-8": {"lr": 0.003, "lr_steps": [*range(16, 479, 16)]},
    "detection": C4, "detection-plain": PLAIN, "detection-small": LAPTOP, "coco-small": LAPTOP,
    "coco": {**C4, "epochs": 12, "lr_steps": [8, 11], "warmup": 1000, "min_size": [*range(640, 801, 32)],
        "train": ["train2017"], "test": "val2017", "difficult": False},
    "segmentation": {**SHARED, "epochs": 1366, "batch_size": 20, "lr": 1e-4, "lr_steps": [], "wd": 5e-4,
        "train": ["2012 train"], "test": "2012 val"},
}  # fmt: skip
VOC = FCN_ResNet50_Weights.DEFAULT.meta["categories"]  # the background and 20 names


def options(argv=None):
    """The command line as a namespace."""
    # fmt: off
    p = argparse.ArgumentParser("python -m extras.transfer", formatter_class=argparse.ArgumentDefaultsHelpFormatter, add_help=False)
    p.add_argument("run", nargs="?", help="run folder, backbone.pt or others' checkpoint, imagenet-resnet50 for torchvision's; else --random")
    p.add_argument("--task", choices=["classification", "detection", "coco", "segmentation"], default="classification", help="VOC 2007 classes, VOC boxes, COCO boxes and masks, VOC 2012 pixels")
    p.add_argument("--data", default="data", help="folder that has VOCdevkit/VOC2007 and VOC2012; coco: train2017, val2017, annotations")
    p.add_argument("--out", help="run folder; None: runs/transfer-TASK-LAYERS-NAME")
    p.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    p.add_argument("--seed", type=number(int, 0, 2**32), default=0, help="decides every random number")
    p.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs where there are some")
    p.add_argument("--amp", action=argparse.BooleanOptionalAction, default=True, help="train in bf16 autocast on GPUs that compute in it")
    p.add_argument("--workers", type=number(int, 0), default=min(8, torch.multiprocessing.cpu_count()), help="processes that decode files, for each training process")
    p.add_argument("--random", metavar="ARCH", choices=ARCHS, help=f"start from random weights: {', '.join(ARCHS)}")
    p.add_argument("--sobel", action=argparse.BooleanOptionalAction, default=False, help="with --random: filter images by Sobel's operator")
    p.add_argument("--image-size", type=number(int, 1, 4096), default=224, help="with --random: of images at which linear layers and stem are built, and of classification's crops")
    g = p.add_argument_group("training")
    g.add_argument("--layers", choices=["all", "fc6-8"], help="fc6-8: convolutions of the backbone are frozen [DeepCluster 4.4]")
    g.add_argument("--epochs", type=number(int, 0), help="passes over the training images")
    g.add_argument("--batch-size", type=number(int, 1), help="images per step, over all processes")
    g.add_argument("--lr", type=number(float, 0), help="learning rate at the start")
    g.add_argument("--lr-steps", type=number(int, 1), nargs="*", help="epochs after which the rate is divided by ten; classification: by two")
    g.add_argument("--wd", type=number(float, 0), help="weight decay")
    g.add_argument("--warmup", type=number(int, 0), help="iterations in which the rate rises")
    g.add_argument("--min-size", type=number(int, 1), nargs="+", help="detection, coco: shorter side of images in pixels, drawn from these in training, the last one in testing")
    g.add_argument("--max-size", type=number(int, 1), help="detection, coco: the longer side has no more pixels than this")
    # fmt: on
    known, _ = p.parse_known_args(argv)
    if bool(known.run) == bool(known.random):
        p.add_argument("-h", "--help", action="help")
        p.parse_known_args(argv)
        p.error("give a run folder, backbone.pt or checkpoint, or --random ARCH")
    meta = {"arch": known.random, "channels": 3, "image_size": known.image_size, "center_fraction": 0.875}
    meta = read_backbone(known.run)["meta"] if known.run else {**meta, "mean": Images.mean, "std": Images.std}
    task, arch, layers = known.task, meta["arch"], known.layers or "all"
    if arch not in ARCHS or meta["channels"] != 3:
        error(f"{known.run}: {arch} for {meta['channels']} channels is no network for photographs")
    if task in ("detection", "coco") and not (find_spec("torchmetrics") and find_spec("pycocotools")):
        error(f"--task {task} needs torchmetrics and pycocotools: pip install -r extras/requirements.txt")
    kind, size = "resnet" if "resnet" in arch else "plain", "small" if meta["image_size"] <= 64 else "large"
    for variant in ("", f"-{kind}", f"-{size}", f"-{layers}"):  # the later ones override
        p.set_defaults(**RECIPES.get(task + variant, {}))
    run = Path(known.run or f"random-{arch}{'-sobel' * known.sobel}").resolve()
    name = (run.parent if run.name == "backbone.pt" else run).name
    p.set_defaults(out=f"runs/transfer-{task}-{layers}-{name}")
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of the task")
    args = p.parse_args(argv)
    args.mean, args.std = list(meta["mean"]), list(meta["std"])
    args.image_size, args.center_fraction = meta["image_size"], meta["center_fraction"]
    return args


# %% data


def as_target(image, rows, **more):
    """(image, {"boxes" (n, 4), "labels" (n,), "iscrowd" (n,)}) of rows left, top, right, bottom, label, is it a crowd?"""
    rows = torch.tensor(rows, dtype=torch.float64).view(-1, 6)
    boxes = BoundingBoxes(rows[:, :4].float(), format="XYXY", canvas_size=image.size[::-1])
    return image, {"boxes": boxes, "labels": rows[:, 4].long(), "iscrowd": rows[:, 5].long(), **more}


def voc_target(task, image, target):
    """(image, y (20,)) for classification: 1 where it has an object of the class, -1 where all of these are difficult,
    else 0. Otherwise what as_target returns; labels 1..20; difficult objects are crowds."""
    rows, y = [], torch.zeros(20)
    for x in target["annotation"]["object"]:
        left, top, right, bottom = (float(x["bndbox"][k]) for k in ("xmin", "ymin", "xmax", "ymax"))
        hard, label = int(x.get("difficult", 0)), VOC.index(x["name"])
        rows.append([left - 1, top - 1, right, bottom, label, hard])  # pixels count from 1, to the last one
        y[label - 1] = -1 if hard and y[label - 1] < 1 else 1
    return (image, y) if task == "classification" else as_target(image, rows)


def coco_target(coco, label_of, image, annotations):
    """(image, what as_target returns, and "masks" (n, H, W))."""
    rows, masks = [], [torch.zeros(image.size[::-1], dtype=torch.uint8)]  # there may be no object
    for x in annotations:
        left, top, w, h = x["bbox"]
        if w > 0 and h > 0:
            rows.append([left, top, left + w, top + h, label_of[x["category_id"]], x.get("iscrowd", 0)])
            masks.append(torch.from_numpy(coco.annToMask(x)))
    return as_target(image, rows, masks=Mask(torch.stack(masks)[1:]))


def load_split(args, split):
    """torchvision's data set of "2007 test", say, or "val2017"; of COCO to train on, images with objects only."""
    if args.task == "segmentation":
        return VOCSegmentation(args.data, *split.split(), target_transform=Mask)
    if args.task != "coco":
        return VOCDetection(args.data, *split.split(), transforms=partial(voc_target, args.task))
    part = CocoDetection(f"{args.data}/{split}", f"{args.data}/annotations/instances_{split}.json")
    found, label_of = part.coco.imgToAnns, {c: k for k, c in enumerate(sorted(part.coco.getCatIds()), 1)}
    part.transforms = partial(coco_target, part.coco, label_of)
    part.ids = [i for i in part.ids if split == args.test or any(not x.get("iscrowd") for x in found[i])]
    part.images = [f"{args.data}/{split}/{part.coco.imgs[i]['file_name']}" for i in part.ids]
    return part


def load(args):
    """(training images, test images, file names of the former, number of classes)."""
    try:
        *train, test = [load_split(args, split) for split in [*args.train, args.test]]
    except (OSError, RuntimeError) as problem:
        wanted = "train2017, val2017, annotations" if args.task == "coco" else "VOCdevkit/VOC2007, say"
        splits = ", ".join([*args.train, args.test])
        error(f"--data {args.data} should have {wanted}, with {splits}; {str(problem).split('. You')[0]}")
    classes = 1 + len(test.coco.getCatIds()) if args.task == "coco" else 21  # 0 is the background
    return ConcatDataset(train), test, [path for part in train for path in part.images], classes


class Examples(Dataset):
    """(position, seed) -> image (3, H, W) in 0..1 and target, perhaps flipped; of segmentation normalized, and (H, W);
    of classification normalized crops (1 or 10, 3, S, S), and (20,). Runs in workers."""

    def __init__(self, source, args, training):
        self.source, self.args, self.training = source, args, training

    def __getitem__(self, key):
        (position, seed), args = key, self.args
        image, target = self.source[position]
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            if args.task == "classification":
                crop = v2.RandomResizedCrop(args.image_size, args.crop_area, (1, 1))
                crop = v2.Compose([v2.RandomHorizontalFlip(), crop, v2.PILToTensor()])
                crops = [crop(image) for _ in range(1 if self.training else 10)]
                return normalize(torch.stack(crops) / 255, args.mean, args.std), target
            flip = v2.RandomHorizontalFlip(0.5 * self.training)
            image, target = flip(pil_to_tensor(image) / 255, target)
        if args.task == "segmentation":
            return normalize(image, args.mean, args.std), target[0].long()
        if self.training and not args.difficult:
            target = {name: x[target["iscrowd"] == 0] for name, x in target.items()}
        return image, {name: x.as_subclass(torch.Tensor) for name, x in target.items()}


def batches(examples, keys, size, device):
    """Yield ([images], [targets]) on the device, `size` of them at a time."""
    how = {"num_workers": examples.args.workers, "pin_memory": device.type == "cuda", "collate_fn": list}
    move = partial(torch.Tensor.to, device=device, non_blocking=True)
    for batch in DataLoader(examples, size, sampler=keys, **how):
        images, targets = zip(*batch, strict=True)
        targets = [{k: move(x) for k, x in y.items()} if isinstance(y, dict) else move(y) for y in targets]
        yield [move(x) for x in images], targets


# %% network


def split(backbone):
    """(layers from images to the map, its channels, head: (B, channels, side, side) of regions -> (B, D), side)."""
    net, size = backbone.net, backbone.dim
    if hasattr(net, "layer4"):
        head = nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        layers = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3]
        return [backbone.sobel, *layers], size // 2, head, 14
    layers = list(net.features)
    layers = layers[:-1] if isinstance(layers[-1], nn.MaxPool2d) else layers
    for layer in layers:
        if isinstance(layer, nn.MaxPool2d):
            layer.padding = (layer.kernel_size - 1) // 2
        if isinstance(layer, nn.Conv2d):
            layer.padding, channels = tuple(k // 2 for k in layer.kernel_size), layer.out_channels
    inputs = next(layer for layer in net.classifier if isinstance(layer, nn.Linear)).in_features
    head = nn.Sequential(nn.Flatten(), net.classifier, nn.ReLU())
    return [backbone.sobel, *layers], channels, head, round((inputs / channels) ** 0.5)


def make_network(args, backbone, classes):
    """The network of the task around the backbone; its new layers are random."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) or args.layers == "fc6-8" and isinstance(module, nn.Conv2d):
            module.requires_grad_(False)
    if args.task == "classification":
        net = nn.Sequential(backbone, nn.ReLU(), nn.Linear(backbone.dim, 20))
        for layer in (m for m in net.modules() if isinstance(m, nn.Linear)):  # all start anew, as in the code
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.constant_(layer.bias, 0.1)
        return net
    (layers, channels, head, side), resnet = split(backbone), hasattr(backbone.net, "layer4")
    if args.task == "segmentation":
        layers, channels = ([*layers, head[0]], backbone.dim) if resnet else (layers, channels)
        return nn.Sequential(*layers, FCNHead(channels, classes))
    trunk, regions = nn.Sequential(*layers), partial(MultiScaleRoIAlign, ["0"], sampling_ratio=0)
    trunk.out_channels = channels
    sides = tuple(max(1, round(a * args.min_size[-1] / args.anchors_for)) for a in args.anchors)
    kind, more = FasterRCNN, {}
    if args.task == "coco":
        mask_head = head[0] if resnet else MaskRCNNHeads(channels, [channels] * 4, 1)
        last = MaskRCNNPredictor(backbone.dim if resnet else channels, min(channels, 256), classes)
        kind, more = MaskRCNN, {"mask_roi_pool": regions(14), "mask_head": mask_head, "mask_predictor": last}
    names = ("pre_nms_top_n_train", "post_nms_top_n_train", "pre_nms_top_n_test", "post_nms_top_n_test")
    more |= {f"rpn_{name}": count for name, count in zip(names, args.proposals, strict=True)}
    return kind(
        trunk, min_size=args.min_size, max_size=args.max_size, image_mean=args.mean, image_std=args.std,
        rpn_anchor_generator=AnchorGenerator((sides,), ((0.5, 1.0, 2.0),)), box_batch_size_per_image=args.rois,
        box_nms_thresh=args.nms, box_roi_pool=regions(side), box_head=head, box_predictor=FastRCNNPredictor(backbone.dim, classes), **more,
    )  # fmt: skip


# %% losses and scores


def pad(images, value):
    """[(.., h, w)] of different sizes -> (B, .., H, W), padded to the right and below."""
    h, w = (max(x.shape[d] for x in images) for d in (-2, -1))
    return torch.stack([F.pad(x, (0, w - x.shape[-1], 0, h - x.shape[-2]), value=value) for x in images])


def segment(net, images):
    """[(3, h, w)] -> scores (B, 21, H, W) of pixels, of the padded ones, too."""
    images = pad(images, 0.0)
    return F.interpolate(net(images).float(), size=images.shape[2:], mode="bilinear", align_corners=False)


def loss_of(task, net, images, targets):
    """Loss of a batch: of classification the sum over classes, of segmentation the mean over pixels."""
    if task == "classification":
        logits, y = net(torch.cat(images)).float(), torch.stack(targets)  # (b, 20)
        each = F.binary_cross_entropy_with_logits(logits, (y > 0).float(), reduction="none")
        return (each * (y >= 0)).sum() / len(y)
    if task == "segmentation":
        return F.cross_entropy(segment(net, images), pad(targets, 255), ignore_index=255)
    return sum(net(images, targets).values())


def average_precision(scores, positive):
    """(AP of 11 points [VOC 2007], AP as area [DeepCluster's code]) of a ranking: scores (n,), positive (n,) bool.

    The mean over recalls 0, 0.1 .. 1 of the best precision at this recall or more; the mean of the precision at each
    positive. Of equal scores those of positives come last. Without positives NaN."""
    if not (count := positive.sum()):
        return 0 / count, 0 / count
    order = positive.byte().argsort(stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    hit = positive[order]
    found = hit.cumsum(0)  # (n,)
    precision = found.double() / torch.arange(1, len(hit) + 1)
    best = precision.flip(0).cummax(0).values.flip(0)
    reached = 10 * found >= torch.arange(11)[:, None] * count  # (11, n), in whole numbers
    return (reached * best).amax(1).mean(), precision[hit].mean()


def mean_iou(confusion):
    """Mean of intersection / union over classes, there or predicted, from counts (K, K) of pixels [class, prediction]."""
    hit = confusion.diagonal().double()
    return (hit / (confusion.sum(0) + confusion.sum(1) - hit)).nanmean()


def score_classes(net, found):
    """{mAP} of the mean logits of ten crops; classes without positives do not count. Of random scores: their share."""
    rows = [(net(torch.cat(x)).view(len(x), 10, -1).mean(1), torch.stack(y)) for x, y in found]
    scores, y = (all_gather(torch.cat(x)).cpu() for x in zip(*rows, strict=True))  # (n, 20)
    each = [average_precision(s[t >= 0], t[t >= 0] > 0) for s, t in zip(scores.T, y.T, strict=True)]
    eleven, area = torch.tensor(each).nanmean(0).tolist()
    share = ((y > 0).sum(0) / (y >= 0).sum(0))[(y > 0).any(0)].mean().item()
    return {"mAP, 11 points (VOC 2007)": eleven, "mAP, area": area, "mAP of random scores": share}


def score_pixels(net, found):
    """{mean IoU}; 255 is no class."""
    confusion = 0
    for images, (truth,) in found:
        guess, known = segment(net, images).argmax(1)[0], truth != 255
        confusion += torch.bincount(21 * truth[known] + guess[known], minlength=21**2)
    return {"mean IoU": mean_iou(all_reduce_sum(confusion).view(21, 21)).item()}


def score_boxes(net, found):
    """{AP, AP50, AP75} of boxes and, where there are any, of masks; test images come one by one."""
    from torchmetrics.detection import MeanAveragePrecision  # which no other task needs

    kinds, scores = {"box": "bbox"} | ({"mask": "segm"} if net.roi_heads.has_mask() else {}), {}
    metrics = {k: MeanAveragePrecision(iou_type=kind, sync_on_compute=False) for k, kind in kinds.items()}
    for images, targets in found:
        (guess,) = net(images)
        guess |= {"masks": guess["masks"][:, 0] > 0.5} if "mask" in kinds else {}
        for metric in metrics.values():
            metric.update(*([{k: x.cpu() for k, x in y.items()}] for y in (guess, *targets)))
    for kind, metric in metrics.items():
        for name, own in metric.metric_state.items():  # torchmetrics would hang where lengths of lists differ
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, own)
            setattr(metric, name, sum(parts, []))
        computed = metric.compute()
        scores |= {f"{kind} AP{n}": computed[f"map_{n}".strip("_")].item() for n in ("", "50", "75")}
    return scores


# %% one epoch, main


def train(net, optimizer, found, epoch, first, meter, args):
    """Steps over the batches `found`, numbered from `first` on."""
    lr = args.lr * args.lr_factor ** sum(epoch >= e for e in args.lr_steps)
    for module in net.train().modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()  # it keeps its statistics
    for step, (images, targets) in enumerate(found, first):
        optimizer.param_groups[0]["lr"] = lr * min(1.0, 0.001 + step / args.warmup) if args.warmup else lr
        with autocast(images[0].device, args.amp and args.task not in ("detection", "coco")):
            loss = loss_of(args.task, net, images, targets)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), args.clip or float("inf"))
        optimizer.step()
        meter.add(len(images), loss)


def main():
    args = options()
    device = setup(args.device)
    train_set, test_set, paths, classes = load(args)
    data = Images(args.data, None, paths, None, [], args.mean, args.std)
    loader = Loader(data, args.batch_size, args.image_size, args.center_fraction, device, args.workers)
    examples, tests = Examples(train_set, args, True), Examples(test_set, args, False)
    steps = len(data) // args.batch_size
    print_once(f"{args.task}: {len(data)} and {len(test_set)} images, {steps} steps an epoch, on {device}")

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    if args.run:
        backbone = load_backbone(args.run, pool=True)[0]
    else:
        backbone = Backbone(args.random, 3, args.image_size, args.sobel, pool=True).to(device)
        fill_batch_norm(backbone, loader, torch.arange(min(256, len(data))))
    net = to_device(make_network(args, backbone.cpu(), classes), device)
    optimizer = torch.optim.SGD(net.parameters(), args.lr, momentum=0.9, weight_decay=args.wd)
    run = Run("transfer", args, data, may_change={"epochs"})
    if run.finished:
        return
    done = run.state["epoch"] if run.state else 0
    if run.state:
        net.load_state_dict(run.state["net"])
        optimizer.load_state_dict(run.state["optimizer"])
    trained = parallel(net)
    for epoch in range(done, args.epochs):
        began, gen = time.time(), seed_epoch(args.seed, epoch)
        order = torch.randperm(len(data), generator=gen)[: steps * args.batch_size].view(steps, -1)
        seeds = torch.randint(2**62, (len(data),), generator=gen)  # of each image's crop and flip
        own = order[:, slice(*shard(args.batch_size))].flatten()  # a part of each batch
        found = batches(examples, list(zip(own.tolist(), seeds[own].tolist(), strict=True)), loader.b, device)
        meter = Meter(f"epoch {epoch + 1}/{args.epochs}", len(own))
        train(trained, optimizer, found, epoch, epoch * steps, meter, args)
        record = {"epoch": epoch + 1, "epochs": args.epochs, "loss": meter.mean_loss()}
        run.end_epoch(record | {"seconds": time.time() - began}, "epoch", "loss", "seconds")
        state = {"epoch": epoch + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
        run.save(state, backbone, loader)
    score = {"classification": score_classes, "segmentation": score_pixels}.get(args.task, score_boxes)
    size, keys = args.batch_size if args.task == "classification" else 1, range(*shard(len(test_set)))
    with torch.no_grad():
        result = score(net.eval(), batches(tests, [(i, i) for i in keys], size, device))
    run.log({"result": result})
    print_once("REPORT", ", ".join(f"{name}: {100 * score:.1f}" for name, score in result.items()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
