"""Transfer of a trained backbone to other tasks: classification, detection and segmentation of PASCAL VOC, and COCO.

The protocols of DeepCluster (Caron et al., ECCV 2018, 4.4 and code) and CoKe (Qian et al., CVPR 2022, supplementary
2.3, which follows MoCo's code): what a network learnt without labels is worth where there are few.

    classification  logits = linear(fc7(fc6(map)))                    20 sigmoids, mAP; ten random crops in testing
    detection       proposals(map); class, box = head(RoIAlign(map))  Faster R-CNN, AP, AP50, AP75 of boxes
    coco            the same, and mask = layer4(RoIAlign(map))        Mask R-CNN, those of boxes and of masks
    segmentation    scores = FCN head(map), enlarged                  mean IoU of 21 classes

map: of ResNets that of layer3 (C4), and layer4 is the head; of AlexNet, VGG-16 and LeNet-5 the convolutions without the
last pool, and the head is the hidden linear layers. For classification and segmentation all convolutions are the map.

    python -m extras.transfer RUN --task classification --layers fc6-8      RUN: run folder, backbone.pt, checkpoint
    python -m extras.transfer --random alexnet --task classification        the random network: the lowest row
    python -m extras.transfer RUN --task segmentation --data data           VOC 2012 in data/VOCdevkit/VOC2012
    torchrun --nproc_per_node=8 -m extras.transfer RUN --task detection     VOC 2007 and 2012
    torchrun --nproc_per_node=8 -m extras.transfer RUN --task coco --data data/coco    train2017/, val2017/, annotations/

The recipe is that of the task and network; flags override. Iterations of the papers are epochs here: iterations x batch
size / images, rounded, for 5,011 images of VOC 2007 trainval, 16,551 with 2012, 117,266 of COCO train2017 that have
objects, 1,464 of VOC 2012 train. --epochs 0 tests the network as it starts. Stopped, the same command goes on after the
last epoch. Detection and coco need `pip install -r extras/requirements.txt`.

Departs from the papers and their code, on purpose:
 1. Batch norm of convolutions is frozen (MoCo and CoKe train it, over all GPUs, and add one behind layer4). Those of
    --random have the statistics of 256 training images. A random network's convolutions train with --layers all only.
 2. CoKe's COCO network is an FPN, ours is MoCo's C4 with the schedule "1x". CoKe searches learning rates: --lr.
 3. Boxes are scored by COCO's rules (101 points, 100 detections an image), on VOC, too (the papers: 11 points).
    Difficult objects are neither found nor missed: COCO's crowds. They train ResNets, as in Detectron2, only.
 4. Plain networks: RoIAlign (py-faster-rcnn: pooling); convolutions pad half a kernel, so that a cell of the map lies
    where it looks. coco: four convolutions for masks, of the map's width, for no paper has them.
 5. Anchors follow the side of test images: 32 to 512 for 800 pixels (C4), 128 to 512 for 600 (plain).
 6. Segmentation: torchvision's FCN head (one hidden layer of a quarter of the maps) on the last map, not the 32-stride
    FCN with fc6 and fc7; VOC 2012 train (the code: SBD); whole images, padded to the batch's largest, half of them
    flipped; the loss is the mean over pixels.
 7. Classification: 150,000 iterations [scripts of DeepCluster's code], crops as its eval_voc_classif.py draws them.
    Images of test sets are seen one at a time in detection and segmentation, so that no result depends on a batch.
 8. One factor for a batch's last images: an epoch's incomplete batch is dropped. bf16 autocast on GPUs (--no-amp).
"""

import argparse
import math
import os
import time
from functools import partial
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
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.segmentation.fcn import FCNHead
from torchvision.ops import MultiScaleRoIAlign
from torchvision.transforms import v2

# %% recipes and options
# Task, task-family or task-layers -> hyper-parameters. lr_factor: what --lr-steps multiply by; clip: the gradient's
# largest norm; rois: regions of an image that train the head; proposals: of the RPN, before and after suppression,
# in testing; anchors: for test images of this side.

CLASSIFICATION = {
    "layers": "all", "epochs": 479, "batch_size": 16, "lr": 0.001, "lr_steps": [*range(64, 479, 64)], "lr_factor": 0.5, "wd": 1e-6,
    "warmup": 0, "clip": 10.0, "train": ["2007 trainval"], "test": "2007 test", "crop_area": [0.1, 0.5],
}  # fmt: skip
C4 = {
    "layers": "all", "epochs": 23, "batch_size": 16, "lr": 0.02, "lr_steps": [17, 21], "lr_factor": 0.1, "wd": 1e-4, "warmup": 100,
    "clip": None, "train": ["2007 trainval", "2012 trainval"], "test": "2007 test", "difficult": True,
    "min_size": [*range(480, 801, 32)], "max_size": 1333, "anchors": [32, 64, 128, 256, 512], "anchors_for": 800,
    "rois": 512, "proposals": [12000, 2000, 6000, 1000],
}  # fmt: skip
SMALL = {"rois": 64, "proposals": [500, 200, 500, 100], "min_size": [64], "max_size": 107}  # ours, for a laptop
RECIPES = {
    "classification": CLASSIFICATION,
    "classification-fc6-8": {"lr": 0.003, "lr_steps": [*range(16, 479, 16)]},
    "detection": C4,
    "detection-plain": {
        "epochs": 28, "batch_size": 2, "lr": 0.001, "lr_steps": [20], "wd": 5e-4, "warmup": 0, "train": ["2007 trainval"],
        "difficult": False, "min_size": [600], "max_size": 1000, "anchors": [128, 256, 512], "anchors_for": 600,
        "rois": 128, "proposals": [12000, 2000, 6000, 300],
    },
    "coco": {
        **C4, "epochs": 12, "lr_steps": [8, 11], "warmup": 1000, "min_size": [*range(640, 801, 32)], "train": ["train2017"],
        "test": "val2017",
    },
    **dict.fromkeys(("detection-lenet5", "coco-lenet5"), SMALL),
    "segmentation": {
        "layers": "all", "epochs": 1366, "batch_size": 20, "lr": 1e-4, "lr_steps": [], "lr_factor": 0.1, "wd": 5e-4, "warmup": 0,
        "clip": None, "train": ["2012 train"], "test": "2012 val",
    },
}  # fmt: skip
TASKS = ["classification", "detection", "coco", "segmentation"]
VOC = [
    "aeroplane", "bicycle", "bird", "boat", "bottle", "bus", "car", "cat", "chair", "cow", "diningtable", "dog", "horse",
    "motorbike", "person", "pottedplant", "sheep", "sofa", "train", "tvmonitor",
]  # fmt: skip


def options(argv=None):
    """The command line as a namespace."""
    kind, yes_no = argparse.ArgumentDefaultsHelpFormatter, argparse.BooleanOptionalAction
    p = argparse.ArgumentParser("python -m extras.transfer", description="Transfer of a backbone to other tasks", formatter_class=kind, add_help=False)  # fmt: skip
    # fmt: off
    p.add_argument("run", nargs="?", help="run folder, backbone.pt or others' checkpoint, imagenet-resnet50 for torchvision's; else --random")
    p.add_argument("--task", choices=TASKS, default="classification", help="what to learn, see above")
    p.add_argument("--data", default="data", help="folder that has VOCdevkit/VOC2007 and VOC2012; coco: train2017, val2017, annotations")
    p.add_argument("--out", help="run folder; None: runs/transfer-TASK-LAYERS-NAME")
    p.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    p.add_argument("--seed", type=number(int, 0, 2**32), default=0, help="decides every random number")
    p.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs where there are some")
    p.add_argument("--amp", action=yes_no, default=True, help="train in bf16 autocast on GPUs that compute in it")
    p.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()), help="processes that decode files, for each training process")
    g = p.add_argument_group("random network")
    g.add_argument("--random", metavar="ARCH", choices=ARCHS, help=f"start from random weights: {', '.join(ARCHS)}")
    g.add_argument("--sobel", action=yes_no, default=False, help="with --random: filter images by Sobel's operator")
    g.add_argument("--image-size", type=number(int, 1, 4096), default=224, help="with --random: of images at which linear layers and stem are built, and of classification's crops")
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
        p.error("give a run folder, backbone.pt or checkpoint, or --random ARCH")
    arch, image_size = known.random, known.image_size
    if known.run:
        meta = read_backbone(known.run)["meta"]
        arch, image_size = meta["arch"], meta.get("image_size")
        if arch not in ARCHS or meta["channels"] != 3:
            error(
                f"{known.run}: a network ({arch}) of {meta['channels']} channels; images here have three colors"
            )
    layers = known.layers or "all"
    plain = "" if arch.startswith("resnet") else "-plain"
    for variant in (known.task, f"{known.task}{plain}", f"{known.task}-{layers}", f"{known.task}-{arch}"):
        p.set_defaults(**RECIPES.get(variant, {}))
    name = f"random-{arch}" if known.random else Path(known.run).resolve().stem
    p.set_defaults(out=f"runs/transfer-{known.task}-{layers}-{name}")
    p.add_argument("-h", "--help", action="help", help="show this, with the defaults of the task")
    args = p.parse_args(argv)
    args.image_size = image_size
    return args


# %% data


def voc_boxes(target):
    """{"boxes" (n, 4), "labels" (n,) in 1..20, "iscrowd" (n,): 1 for difficult objects} of an annotation."""
    objects = target["annotation"]["object"]
    corners = [[int(float(x["bndbox"][k])) for k in ("xmin", "ymin", "xmax", "ymax")] for x in objects]
    boxes = torch.tensor(corners, dtype=torch.float32).view(-1, 4)
    boxes[:, :2] -= 1  # pixels count from 1, and the last one belongs to the box
    labels = torch.tensor([VOC.index(x["name"]) + 1 for x in objects], dtype=torch.int64)
    difficult = torch.tensor([int(x.get("difficult", 0)) for x in objects], dtype=torch.int64)
    return {"boxes": boxes, "labels": labels, "iscrowd": difficult}


def voc_classes(target):
    """(20,): 1 where the image has an object of the class, -1 where all of these are difficult, else 0."""
    found, y = voc_boxes(target), torch.zeros(20)
    difficult = found["iscrowd"] == 1
    y[found["labels"][difficult] - 1] = -1
    y[found["labels"][~difficult] - 1] = 1
    return y


def coco_target(coco, label_of, image, annotations):
    """(image, what voc_boxes returns, and "masks" (n, H, W) uint8)."""
    some = [x for x in annotations if x["bbox"][2] > 0 and x["bbox"][3] > 0]
    boxes = torch.tensor([x["bbox"] for x in some], dtype=torch.float32).view(-1, 4)
    boxes[:, 2:] += boxes[:, :2]
    masks = [torch.from_numpy(coco.annToMask(x)) for x in some]
    masks = torch.stack(masks) if masks else torch.zeros(0, *image.size[::-1], dtype=torch.uint8)
    labels = torch.tensor([label_of[x["category_id"]] for x in some], dtype=torch.int64)
    crowd = torch.tensor([x.get("iscrowd", 0) for x in some], dtype=torch.int64)
    return image, {"boxes": boxes, "labels": labels, "iscrowd": crowd, "masks": masks}


def load(args):
    """(training images, test images, file names of the former, number of classes)."""

    def voc(split):
        if args.task == "segmentation":
            return VOCSegmentation(args.data, *split.split())
        target = voc_classes if args.task == "classification" else voc_boxes
        return VOCDetection(args.data, *split.split(), target_transform=target)

    def coco(split):
        part = CocoDetection(f"{args.data}/{split}", f"{args.data}/annotations/instances_{split}.json")
        label_of = {c: k for k, c in enumerate(sorted(part.coco.getCatIds()), 1)}
        part.transforms = partial(coco_target, part.coco, label_of)
        if split in args.train:  # only images with objects
            own = part.coco.imgToAnns
            part.ids = [i for i in part.ids if any(not x.get("iscrowd") for x in own[i])]
        part.images = [f"{args.data}/{split}/{part.coco.imgs[i]['file_name']}" for i in part.ids]
        return part

    try:
        parts = [(coco if args.task == "coco" else voc)(split) for split in [*args.train, args.test]]
    except (OSError, RuntimeError) as problem:
        wanted = "VOCdevkit/VOC" if args.task != "coco" else "train2017, val2017, annotations/instances_"
        error(
            f"--data {args.data}: {wanted}.. of {', '.join([*args.train, args.test])} is missing ({problem})"
        )
    classes = {"classification": 20, "detection": 21, "segmentation": 21}.get(args.task)
    classes = classes or len(parts[0].coco.getCatIds()) + 1
    return ConcatDataset(parts[:-1]), parts[-1], sum((part.images for part in parts[:-1]), []), classes


class Examples(Dataset):
    """(position, seed) -> image (3, H, W) and target as the task wants them, perhaps flipped; of classification crops
    (1 or 10, 3, S, S). Runs in workers."""

    def __init__(self, source, args, mean, std, training):
        self.source, self.training, self.task = source, training, args.task
        self.normalize = v2.Normalize(mean, std)
        self.easy_only = training and (args.task == "coco" or args.task == "detection" and not args.difficult)
        if args.task == "classification":
            crop = v2.RandomResizedCrop(args.image_size, args.crop_area, (1, 1))
            self.crop, self.crops = v2.Compose([v2.RandomHorizontalFlip(), crop]), 1 if training else 10

    def __getitem__(self, key):
        position, seed = key
        image, target = self.source[position]
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            if self.task == "classification":
                crops = [v2.functional.pil_to_tensor(self.crop(image)) for _ in range(self.crops)]
                return self.normalize(torch.stack(crops) / 255), target
            flip = self.training and torch.rand(()) < 0.5
        image = v2.functional.pil_to_tensor(image) / 255
        if self.task == "segmentation":
            image, target = self.normalize(image), v2.functional.pil_to_tensor(target)[0].long()
            return (image.flip(-1), target.flip(-1)) if flip else (image, target)
        if self.easy_only:
            target = {name: x[target["iscrowd"] == 0] for name, x in target.items()}
        if flip:
            image, boxes = image.flip(-1), target["boxes"]
            boxes = torch.stack(
                [image.shape[2] - boxes[:, 2], boxes[:, 1], image.shape[2] - boxes[:, 0], boxes[:, 3]], 1
            )
            target |= {"boxes": boxes} | {name: x.flip(-1) for name, x in target.items() if name == "masks"}
        return image, target


def batches(examples, keys, size, args, device):
    """Yield ([images], [targets]) on the device, `size` of them at a time."""
    pin = device.type == "cuda"
    for batch in DataLoader(
        examples, size, sampler=keys, collate_fn=list, num_workers=args.workers, pin_memory=pin
    ):
        images, targets = zip(*batch, strict=True)
        move = partial(torch.Tensor.to, device=device, non_blocking=True)
        targets = [{k: move(x) for k, x in y.items()} if isinstance(y, dict) else move(y) for y in targets]
        yield [move(x) for x in images], targets


# %% network


def make_backbone(args, loader):
    """The Backbone that is transferred; random ones get batch-norm statistics of the training images."""
    if args.run:
        return load_backbone(args.run, pool=True)[0]
    backbone = Backbone(args.random, 3, args.image_size, args.sobel, pool=True).to(loader.device)
    return fill_batch_norm(backbone, loader, torch.arange(min(256, len(loader.data)))).cpu()


def freeze(backbone, layers):
    """Batch norm of convolutions does not train, nor, with fc6-8, do convolutions."""
    for module in backbone.modules():
        if isinstance(module, nn.BatchNorm2d) or layers == "fc6-8" and isinstance(module, nn.Conv2d):
            module.requires_grad_(False)


def train_mode(net):
    """Training mode, but for batch norm that is frozen: it keeps its statistics."""
    net.train()
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and not module.weight.requires_grad:
            module.eval()


def split(backbone):
    """(layers from images to the map, its channels, head of a region of the map -> (B, D), D, side of that region)."""
    net = backbone.net
    if hasattr(net, "layer4"):
        layers = [net.conv1, net.bn1, net.relu, net.maxpool, net.layer1, net.layer2, net.layer3]
        head = nn.Sequential(net.layer4, nn.AdaptiveAvgPool2d(1), nn.Flatten())
        return [backbone.sobel, *layers], backbone.dim // 2, head, backbone.dim, 14
    layers = list(net.features)
    layers = layers[:-1] if isinstance(layers[-1], nn.MaxPool2d) else layers
    convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
    for layer in convolutions:
        layer.padding = tuple(k // 2 for k in layer.kernel_size)
    channels = convolutions[-1].out_channels
    flat = next(layer for layer in net.classifier if isinstance(layer, nn.Linear)).in_features
    head = nn.Sequential(nn.Flatten(), net.classifier, nn.ReLU())
    return [backbone.sobel, *layers], channels, head, backbone.dim, math.isqrt(flat // channels)


def make_classifier(backbone, classes):
    """Images -> logits (B, classes); hidden linear layers start anew, as in Kraehenbuehl's code."""
    net = nn.Sequential(backbone, nn.ReLU(), nn.Linear(backbone.dim, classes))
    for layer in net.modules():
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0, 0.01)
            nn.init.constant_(layer.bias, 0.1)
        if isinstance(layer, nn.BatchNorm1d):
            layer.reset_parameters()
    return net


def make_network(args, backbone, classes, mean, std):
    """The network of the task around the backbone, its new layers random."""
    freeze(backbone, args.layers)
    if args.task == "classification":
        return make_classifier(backbone, classes)
    layers, channels, head, dim, side = split(backbone)
    if args.task == "segmentation":  # up to the last map
        layers, channels = (layers + [head[0]], dim) if side == 14 else (layers, channels)
        return nn.Sequential(*layers, FCNHead(channels, classes))
    trunk = nn.Sequential(*layers)
    trunk.out_channels = channels
    sizes = tuple(max(1, round(a * args.min_size[-1] / args.anchors_for)) for a in args.anchors)
    pool = partial(MultiScaleRoIAlign, ["0"], sampling_ratio=0)
    kind, more = FasterRCNN, {}
    if args.task == "coco":
        own = MaskRCNNHeads(channels, (channels,) * 4, 1)
        mask_head, width = (head[0], dim) if side == 14 else (own, channels)
        kind, more = MaskRCNN, {"mask_roi_pool": pool(output_size=14), "mask_head": mask_head}
        more["mask_predictor"] = MaskRCNNPredictor(width, min(256, width), classes)
    return kind(
        trunk,
        min_size=args.min_size,
        max_size=args.max_size,
        image_mean=mean,
        image_std=std,
        rpn_anchor_generator=AnchorGenerator((sizes,), ((0.5, 1.0, 2.0),)),
        rpn_pre_nms_top_n_train=args.proposals[0],
        rpn_post_nms_top_n_train=args.proposals[1],
        rpn_pre_nms_top_n_test=args.proposals[2],
        rpn_post_nms_top_n_test=args.proposals[3],
        box_roi_pool=pool(output_size=side),
        box_head=head,
        box_predictor=FastRCNNPredictor(dim, classes),
        box_batch_size_per_image=args.rois,
        **more,
    )


# %% the algorithm


def average_precision(scores, positive):
    """(AP by 11 points [VOC 2007], AP as area [VOC 2010]) of a ranking: scores (n,), positive (n,) bool.

    Both average, over recalls, the best precision at this recall or a higher one. Among equal scores positives come
    last. Without positives NaN.
    """
    order = positive.byte().argsort(stable=True)
    order = order[scores[order].argsort(descending=True, stable=True)]
    hit, count = positive[order].long(), positive.sum()
    found = hit.cumsum(0)  # (n,) positives so far
    precision = found.double() / torch.arange(1, len(hit) + 1, device=hit.device)
    best = precision.flip(0).cummax(0).values.flip(0)
    tenths = torch.arange(11, device=hit.device)[:, None] * count  # of the positives, in whole numbers
    points = torch.where(10 * found >= tenths, best, 0.0).amax(1)  # (11,): 0 is always reached
    return points.mean() + 0 / count, (best * hit).sum() / count


def mean_iou(confusion):
    """Mean over classes of intersection / union, from counts (K, K) of pixels [class, prediction]; without classes that
    are neither there nor predicted."""
    hit = confusion.diagonal().double()
    return (hit / (confusion.sum(0) + confusion.sum(1) - hit)).nanmean()


def pad(images, value):
    """[(.., h, w)] of different sizes -> (B, .., H, W), padded to the right and below."""
    size = [max(x.shape[d] for x in images) for d in (-2, -1)]
    return torch.stack(
        [F.pad(x, (0, size[1] - x.shape[-1], 0, size[0] - x.shape[-2]), value=value) for x in images]
    )


def segment(net, images):
    """[(3, h, w)] -> scores (B, K, H, W) of the pixels, padded."""
    images = pad(images, 0.0)
    return F.interpolate(net(images).float(), size=images.shape[-2:], mode="bilinear", align_corners=False)


def loss_of(task, net, images, targets):
    """Loss of a batch: classification's sum over classes, the mean over pixels, or the detectors' sum of losses."""
    if task == "classification":
        logits, y = net(torch.cat(images)).float(), torch.stack(targets)  # (b, 20)
        each = F.binary_cross_entropy_with_logits(logits, (y > 0).float(), reduction="none")
        return (each * (y >= 0)).sum() / len(y)
    if task == "segmentation":
        return F.cross_entropy(segment(net, images), pad(targets, 255), ignore_index=255)
    return sum(net(images, targets).values())


# %% one epoch


def rate(args, epoch, step):
    """The learning rate of a step, counted over all epochs: --warmup from a thousandth, then --lr-steps."""
    rise = min(1.0, 0.001 + step / args.warmup) if args.warmup else 1.0
    return args.lr * rise * args.lr_factor ** sum(epoch >= e for e in args.lr_steps)


def train(net, optimizer, found, epoch, step, meter, args):
    """Steps over the batches `found`, the first one number `step`."""
    train_mode(net)
    for images, targets in found:
        for group in optimizer.param_groups:
            group["lr"] = rate(args, epoch, step)
        with autocast(images[0].device, args.amp):
            loss = loss_of(args.task, net, images, targets)
        optimizer.zero_grad()
        loss.backward()
        if args.clip:
            nn.utils.clip_grad_norm_(net.parameters(), args.clip)
        optimizer.step()
        meter.add(len(images), loss)
        step += 1


def precision_metric(task):
    """torchmetrics' MeanAveragePrecision, which is asked for before anything is trained."""
    try:
        from torchmetrics.detection import MeanAveragePrecision

        kinds = ("bbox", "segm") if task == "coco" else ("bbox",)
        return MeanAveragePrecision(iou_type=kinds, sync_on_compute=False)
    except ImportError as problem:
        error(f"--task {task}: {problem}; pip install -r extras/requirements.txt")


def classify(net, found):
    """{mAP}, of the mean logits of ten crops."""
    rows = [(net(torch.cat(x)).view(len(x), -1, 20).mean(1), torch.stack(y)) for x, y in found]
    scores, y = (all_gather(torch.cat(x)).cpu() for x in zip(*rows, strict=True))  # (n, 20)
    each = [average_precision(s[t >= 0], t[t >= 0] > 0) for s, t in zip(scores.T, y.T, strict=True)]
    eleven, area = torch.tensor(each).nanmean(0).tolist()
    return {"mAP, 11 points (VOC 2007)": eleven, "mAP, area": area}


def score_pixels(net, found):
    """{mean IoU}, confusion summed over the processes."""
    confusion = 0
    for images, (truth,) in found:
        truth, guess = truth.flatten(), segment(net, images).argmax(1).flatten()
        known = truth != 255
        confusion += torch.bincount(21 * truth[known] + guess[known], minlength=21**2)
    return {"mean IoU": mean_iou(all_reduce_sum(confusion).view(21, 21)).item()}


def detect(net, found, task):
    """{AP, AP50, AP75} of boxes, and of masks."""
    metric = precision_metric(task)
    for images, targets in found:
        guess = [{k: x.cpu() for k, x in y.items()} for y in net(images)]
        for y in guess if task == "coco" else ():
            y["masks"] = y["masks"][:, 0] > 0.5
        metric.update(guess, [{k: x.cpu() for k, x in y.items()} for y in targets])
    for (
        name,
        own,
    ) in metric.metric_state.items():  # lists, of other lengths on other processes: torchmetrics would hang
        parts = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(parts, own)
        setattr(metric, name, sum(parts, []))
    scores = metric.compute()
    names = {"box": "bbox_", "mask": "segm_"} if task == "coco" else {"box": ""}
    return {
        f"{k} AP{n}": scores[f"{v}map{'_' * bool(n)}{n}"].item()
        for k, v in names.items()
        for n in ("", "50", "75")
    }


@torch.no_grad()
def evaluate(net, examples, args, device):
    """{name: score} of the test images."""
    net.eval()
    size = (
        args.batch_size if args.task == "classification" else 1
    )  # no result depends on how a batch is padded
    found = batches(examples, [(i, i) for i in range(*shard(len(examples.source)))], size, args, device)
    if args.task == "classification":
        return classify(net, found)
    return score_pixels(net, found) if args.task == "segmentation" else detect(net, found, args.task)


# %% main


def main():
    args = options()
    device = setup(args.device)
    if args.task in ("detection", "coco"):
        precision_metric(args.task)
    train_set, test_set, paths, classes = load(args)
    meta = read_backbone(args.run)["meta"] if args.run else {"mean": Images.mean, "std": Images.std}
    mean, std = list(meta["mean"]), list(meta["std"])
    data = Images(args.data, None, paths, None, [], mean, std)
    loader = Loader(
        data, args.batch_size, args.image_size, meta.get("center_fraction", 0.875), device, args.workers
    )
    examples, tests = (Examples(x, args, mean, std, x is train_set) for x in (train_set, test_set))
    steps = len(data) // args.batch_size
    print_once(
        f"{args.task}: {len(data)} images to train on, {len(test_set)} to test, {steps} steps an epoch, on {device}"
    )

    torch.manual_seed(args.seed)  # the same initial weights on all processes
    backbone = make_backbone(args, loader)
    net = to_device(make_network(args, backbone, classes, mean, std), device)
    weights = [x for x in net.parameters() if x.requires_grad]
    optimizer = torch.optim.SGD(weights, args.lr, momentum=0.9, weight_decay=args.wd)

    run = Run("transfer", args, data, may_change={"epochs"})
    if run.finished:
        return
    done = 0
    if run.state:
        done = run.state["epoch"]
        net.load_state_dict(run.state["net"])
        optimizer.load_state_dict(run.state["optimizer"])
    trained = parallel(net)

    for epoch in range(done, args.epochs):
        began, gen = time.time(), seed_epoch(args.seed, epoch)
        order = torch.randperm(len(data), generator=gen)[: steps * args.batch_size]
        seeds = torch.randint(2**62, (len(data),), generator=gen)  # of each image's flip and crop
        own = order[slice(*shard(len(order)))]
        keys = list(zip(own.tolist(), seeds[own].tolist(), strict=True))
        meter = Meter(f"epoch {epoch + 1}/{args.epochs}", len(own))
        found = batches(examples, keys, loader.b, args, device)
        train(trained, optimizer, found, epoch, epoch * steps, meter, args)
        record = {"epoch": epoch + 1, "epochs": args.epochs, "loss": meter.mean_loss()}
        run.end_epoch(record | {"seconds": time.time() - began}, "epoch", "loss", "seconds")
        state = {"epoch": epoch + 1, "net": net.state_dict(), "optimizer": optimizer.state_dict()}
        run.save(state, backbone, loader)
    result = evaluate(net, tests, args, device)
    run.log({"result": result})
    print_once(", ".join(f"{name} {100 * x:.1f}" for name, x in result.items()))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
