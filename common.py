"""What the method scripts share: infrastructure only, no method lives here.

Would this line change if a sentence of one paper changed? Then it belongs in that paper's script. Sections: command
line, processes, data, augmentation, networks, clustering, metrics, run folder.

Sizes: N images, n of this process; B batch, b of this process; C channels, S image size, D features, K clusters.
"""

import os

# Read when libgomp and numpy's OpenBLAS are loaded, so before torch and numpy: waiting threads soon sleep. Spinning,
# they made a run five times slower beside another one, and PCA twice as slow, where torch and numpy take turns.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "4")

import argparse
import csv
import fcntl
import hashlib
import io
import json
import math
import pickle
import subprocess
import sys
import time
import warnings
import zipfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cache, partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch  # before faiss: both bring an OpenMP, and this order is the one that works
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from tqdm import tqdm

import faiss  # isort: skip
import faiss.contrib.torch_utils  # isort: skip  # lets it take torch's tensors

# %% command line


def number(kind, low, high=math.inf):
    """An argparse type: a finite int or float in low..high."""

    def parse(text):
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            raise argparse.ArgumentTypeError(f"{text} does not lie in {low}..{high}")
        return value

    parse.__name__ = kind.__name__  # what argparse calls it if the text is no number at all
    return parse


def make_parser(description, trains=True):
    """An argparse parser with the options that say where and how to run, not what; trains: and from which weights.

    Without -h: a script adds it once its recipe has set the defaults, so that --help shows those.
    """
    style, yes_no = argparse.ArgumentDefaultsHelpFormatter, argparse.BooleanOptionalAction
    p = argparse.ArgumentParser(description=description, formatter_class=style, add_help=False)
    data = "data/imagenet" if os.path.isdir("data/imagenet") else "digits"
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count()
    workers = max(1, min(8, cores // from_torchrun("LOCAL_WORLD_SIZE", 1)))
    # fmt: off
    g = p.add_argument_group("shared by all scripts")
    g.add_argument("--data", default=data, help=f"{', '.join(SETS)}, or a folder of images: train/ and val/, one folder per class, or unlabelled")
    g.add_argument("--root", default="data", help="where named data sets lie or are downloaded to")
    g.add_argument("--out", help="run folder; None: runs/METHOD-DATA")
    g.add_argument("--overwrite", action="store_true", help="start afresh instead of continuing what is in --out")
    g.add_argument("--seed", type=number(int, 0, 2**32), default=0, help="decides every random number")
    g.add_argument("--device", choices=["auto", "cpu"], default="auto", help="auto: GPUs where there are some")
    g.add_argument("--amp", action=yes_no, default=True, help="train in bf16 autocast on GPUs that compute in it; without: float32, convolutions in TF32")
    g.add_argument("--compile", action=yes_no, default=False, help="torch.compile the network")
    g.add_argument("--workers", type=number(int, 0), default=workers, help="processes that decode files, for each training process")
    if trains:
        p.set_defaults(sobel=False)
        g.add_argument("--init", metavar="FILE", help="start from the weights of a run folder, a backbone.pt, a checkpoint with torchvision's names or the DeepCluster or CoKe authors'; imagenet: torchvision's, learnt with labels")
        g.add_argument("--assign", metavar="FOLDER", help="no training: clusters of these images by the finished run in --out, as assignments-FOLDER.csv in it")
    # fmt: on
    return p


# %% processes
# One process is a group of one, so nothing below or in the scripts asks how many there are.


def from_torchrun(name, otherwise):
    """A number that torchrun gives its processes; what is left over from another start is no such number."""
    return int(os.environ.get(name, otherwise)) if "RANK" in os.environ else otherwise


def setup(device="auto"):
    """Join torchrun's processes, or form a group of one; return this process's torch.device. May be called twice.

    device: "auto", a GPU for each process where there are any, or "cpu". A process that dies is missed at once, by
    torchrun; one that is stopped, after ten minutes.
    """
    gpus = torch.cuda.device_count() if device == "auto" and torch.cuda.is_available() else 0
    if 0 < gpus < from_torchrun("LOCAL_WORLD_SIZE", 1):
        error(f"{os.environ['LOCAL_WORLD_SIZE']} processes on a machine with {gpus} GPUs; start one for each")
    device = torch.device("cuda", from_torchrun("LOCAL_RANK", 0)) if gpus else torch.device("cpu")
    if gpus:
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if dist.is_initialized():
        return device
    store, rank, world = dist.HashStore(), 0, 1
    if "RANK" in os.environ:
        store, rank, world = next(dist.rendezvous("env://"))
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # torchrun keeps its store over restarts, with dead processes' addresses in it [pytorch#135712]
            store = dist.PrefixStore(os.environ["TORCHELASTIC_RESTART_COUNT"], store)
    elif "LOCAL_RANK" in os.environ:
        print("LOCAL_RANK without RANK is ignored: this is a single process", file=sys.stderr)
    backend, own = ("cpu:gloo,cuda:nccl", device) if gpus else ("gloo", None)
    more = {"rank": rank, "world_size": world, "timeout": timedelta(minutes=10), "device_id": own}
    dist.init_process_group(backend, store=store, **more)
    sys.excepthook = partial(interrupted, sys.excepthook)
    # From here on a process that ends with an error leaves nobody who still connects.
    all_reduce_sum(torch.zeros(1))
    return device


def interrupted(otherwise, kind, problem, trace):
    """Ctrl-C is no error: a line instead of a traceback."""
    if kind is not KeyboardInterrupt:
        return otherwise(kind, problem, trace)
    print("stopped; the same command goes on after the last finished epoch", file=sys.stderr)


def rank_and_world():
    """(this process's number, number of processes); where nobody called setup(), a group of one is formed."""
    if not dist.is_initialized():
        setup()
    return dist.get_rank(), dist.get_world_size()


def is_main():
    """True on the one process that prints and writes. Decide everywhere, speak on one."""
    return rank_and_world()[0] == 0


def print_once(*words, sep=" "):
    """Print on the main process only; file names that are no text, too."""
    if is_main():
        print(sep.join(map(str, words)).encode(errors="replace").decode(), flush=True)


def error(message):
    """End with exit code 2 and one line, which one process of each machine prints."""
    if from_torchrun("LOCAL_RANK", 0) == 0:
        print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(2)


def all_reduce_sum(x):
    """Sum of the tensor x over the processes; no gradient."""
    rank_and_world()
    x = x.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(x)
    return x


def all_gather(x, equal=False):
    """Concatenate x (n, ..) over the processes, no gradient; n may differ, unless told that it is equal, which saves
    asking, as in a step."""
    if rank_and_world()[1] == 1:
        return x.detach()  # three copies fewer
    sizes = [torch.tensor([len(x) * equal]) for _ in range(dist.get_world_size())]
    if not equal:
        dist.all_gather(sizes, torch.tensor([len(x)]))
    padded = x.new_zeros(int(max(sizes)), *x.shape[1:])
    padded[: len(x)] = x.detach()
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


def shard(n):
    """(start, stop): the part of n things that this process owns; sizes differ by one at most."""
    rank, world = rank_and_world()
    return rank * n // world, (rank + 1) * n // world


def to_device(net, device):
    """The network on its device; on GPUs channels last and, with several processes, batch norm over all of them."""
    if device.type == "cpu":
        return net
    net = nn.SyncBatchNorm.convert_sync_batchnorm(net) if rank_and_world()[1] > 1 else net
    return net.to(device, memory_format=torch.channels_last)


def parallel(net):
    """The network with its gradients averaged over the processes."""
    several = rank_and_world()[1] > 1
    return nn.parallel.DistributedDataParallel(net, gradient_as_bucket_view=True) if several else net


def autocast(device, wanted):
    """bf16 autocast, if wanted, on GPUs that compute in it (a T4 only imitates it); elsewhere nothing."""
    able = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.autocast(device.type, torch.bfloat16, enabled=wanted and able)


def generator(*key):
    """A CPU random generator that depends on the key alone, e.g. (seed, "weights")."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seed_epoch(seed, epoch):
    """Seed torch for what differs between processes, like crops and dropout; return a generator for what must not.

    Nothing else is random, so checkpoints need no random state: an epoch done again is the same, bit by bit.
    """
    torch.manual_seed(generator(seed, epoch, rank_and_world()[0]).initial_seed())
    return generator(seed, epoch)


# %% data

# Names on the command line -> torchvision's.
SETS = {"digits": None, "mnist": "MNIST", "fashionmnist": "FashionMNIST", "cifar10": "CIFAR10"}
SETS |= {"cifar100-20": "CIFAR100", "svhn": "SVHN", "stl10": "STL10"}

Image.init()
KINDS = Image.OPEN.keys() - {"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"}  # Pillow needs others for these
SUFFIXES = tuple(suffix for suffix, kind in Image.registered_extensions().items() if kind in KINDS)
Image.MAX_IMAGE_PIXELS = 2**28  # Pillow refuses twice as many: photographs of 196 megapixels are read


class Names(Sequence):
    """Strings as one: a process that decodes files would write to each object of a list, and so copy all of them."""

    def __init__(self, names):
        names = [os.fsencode(name) for name in names]
        self.joined, self.ends = b"".join(names), np.cumsum([0, *map(len, names)])

    def __len__(self):
        return len(self.ends) - 1

    def __getitem__(self, i):
        i = range(len(self))[i]
        return os.fsdecode(self.joined[self.ends[i] : self.ends[i + 1]])


@dataclass
class Images:
    """One split: pixels in memory, or paths to files. Labels are for reporting only."""

    name: str
    pixels: torch.Tensor | None  # (N, C, H, W) uint8
    paths: Sequence | None  # N file names; None for named sets
    labels: torch.Tensor | None  # (N,) int64
    classes: list  # their names
    mean: tuple = (0.485, 0.456, 0.406)  # C numbers in 0..1: ImageNet's
    std: tuple = (0.229, 0.224, 0.225)
    unreadable: set = field(default_factory=set)  # positions of files that could not be read

    def __len__(self):
        return len(self.paths or self.pixels)

    def without_unreadable(self, x):
        """x (N,) int64, with -1 for files that could not be read."""
        return x.index_fill(0, torch.tensor(sorted(self.unreadable), dtype=torch.int64), -1)

    def __str__(self):
        digits = self.name == "digits" and not os.path.isdir("data/imagenet")
        return f"{len(self)} images of {self.name}" + " (data/imagenet was not found)" * digits


def load_data(name, root="data", normalize=None):
    """(train, test) as Images; test is None where the data has none. Ends with exit code 2 if it cannot be read.

    name: one of SETS, or a folder, see load_folder. normalize: a trained network's (mean, std) instead of their own.
    """
    try:
        if name in SETS:
            first, splits = from_torchrun("LOCAL_RANK", 0) == 0, ("train", "test")
            found = [load_set(name, root, split, download=True) for split in splits if first]
            all_reduce_sum(torch.zeros(1))  # one process of each machine downloads, the others wait
            train, test = found or [load_set(name, root, split) for split in splits]
        else:
            train, test = load_folder(name)
    except Exception as problem:
        error(f"--data {name}: {problem}")
    if train.pixels is not None:
        part = train.pixels[:: len(train) // 100_001 + 1] / 255
        train.mean = tuple(part.mean((0, 2, 3)).tolist())
        train.std = tuple(part.std((0, 2, 3)).clamp(min=1e-3).tolist())
    if normalize:
        for data in filter(None, (train, test)):
            as_channels(data, len(normalize[0]))
        train.mean, train.std = map(tuple, normalize)
    if test:
        test.mean, test.std = train.mean, train.std
    return train, test


def as_channels(data, wanted):
    """Make the images gray, or gray ones three times the same, as a network wants; ends the run where they cannot be."""
    channels = 3 if data.pixels is None else data.pixels.shape[1]
    if channels == wanted:
        return
    if data.pixels is None or {channels, wanted} != {1, 3}:
        error(f"{data.name} has {channels} channel(s), the network sees {wanted}")
    gray = data.pixels if channels == 1 else luminance(data.pixels.float()).round().to(torch.uint8)
    data.pixels = gray.expand(-1, wanted, -1, -1)  # no copy


def load_set(name, root, split, download=False):
    """A named data set's training or test images, in memory."""
    if name == "digits":
        return load_digits(split)
    chosen = {"split": split} if name in ("svhn", "stl10") else {"train": split == "train"}
    found = getattr(torchvision.datasets, SETS[name])(root, download=download, **chosen)
    pixels, labels = torch.as_tensor(found.data), found.labels if "split" in chosen else found.targets
    if name == "cifar100-20":  # torchvision leaves the superclasses out
        with open(f"{root}/cifar-100-python/{split}", "rb") as file:
            labels = pickle.load(file, encoding="latin1")["coarse_labels"]
    if pixels.ndim == 3:  # (N, H, W)
        pixels = pixels[:, None]
    elif pixels.shape[3] == 3:  # (N, H, W, C)
        pixels = pixels.permute(0, 3, 1, 2).contiguous()
    labels = torch.as_tensor(labels).long()
    return Images(name, pixels, None, labels, [str(c) for c in range(int(labels.max()) + 1)])


def load_digits(split):
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 grays, enlarged once to 32x32; 1437 / 360."""
    from sklearn.datasets import load_digits

    images, labels = map(torch.from_numpy, load_digits(return_X_y=True))
    small = images.view(-1, 1, 8, 8).float() * (255 / 16)
    large = F.interpolate(small, size=32, mode="bilinear").round().to(torch.uint8)
    order = torch.randperm(len(large), generator=generator("digits"))
    part = order[:1437] if split == "train" else order[1437:]
    return Images("digits", large[part], None, labels[part], [str(c) for c in range(10)])


def load_folder(folder):
    """(train, test) of a folder: train/ and val/ (or test/) in it; or all its images, and None.

    Images are labelled by the sub-folders, if there are several and most images lie in them; a single one is taken
    for the folder itself. Empty ones are no classes. Files of one size of at most 96 pixels are decoded into memory.
    """
    if not os.path.isdir(folder):
        raise ValueError(f"no such folder, and not one of {', '.join(SETS)}")
    parts = {entry.name.lower(): entry.path for entry in os.scandir(folder) if entry.is_dir()}
    if "train" in parts:
        held_out = parts.get("val") or parts.get("test")
        print_once(f"{folder}: train is {parts['train']}, test is {held_out}; nothing else in it is read")
        train, test = load_folder(parts["train"])[0], held_out and load_folder(held_out)[0]
        if test and (odd := sorted(set(train.classes) ^ set(test.classes))):
            raise ValueError(f"only one of {parts['train']} and {held_out} has classes {', '.join(odd[:5])}")
        return train, test
    left_out, classes, start = [], {}, len(os.path.join(folder, ""))
    paths = list(list_images(folder, os.path.realpath(folder), set(), left_out))
    labels = []  # -1: in no sub-folder
    for path in paths:
        name, below, _ = path[start:].partition("/")
        labels.append(classes.setdefault(name, len(classes)) if below else -1)
    if labelled := 2 * labels.count(-1) < len(paths):
        left_out += [path for path, c in zip(paths, labels, strict=True) if c < 0]
        paths = [path for path, c in zip(paths, labels, strict=True) if c >= 0]
        labels = torch.tensor([c for c in labels if c >= 0])
    if left_out:
        print_once(f"{folder}: {len(left_out)} files left out, no images or in no class: {left_out[0]}, ..")
    if labelled and len(classes) == 1:
        return load_folder(os.path.join(folder, *classes))
    data = Images(folder, None, Names(paths), *((labels, list(classes)) if labelled else (None, [])))
    decode_small(data)
    if len(data.unreadable) == len(paths):
        raise ValueError(f"no images in {folder}, or none that can be read")
    return data, None


def look_at(folder):
    """(how many images a folder has to train on, counted up to 100,000; the usual shorter side of some in pixels);
    (0, 0) if there is none."""
    if not os.path.isdir(folder):
        return 0, 0
    parts = {entry.name.lower(): entry.path for entry in os.scandir(folder) if entry.is_dir()}
    folder, sides = parts.get("train", folder), []
    paths = list(islice(list_images(folder, os.path.realpath(folder), set(), []), 100_000))
    for path in paths[:: len(paths) // 20 + 1]:
        with suppress(Exception), Image.open(path) as image:
            sides.append(min(image.size))
    return len(paths), int(np.median(sides)) if sides else 0


def folder_recipe(known, views):
    """How many images --data has to train on if it is a folder of fewer than 100,000 and no --recipe was named, else 0;
    and what the methods' recipes for such folders have in common.

    LeNet-5 at 64 pixels, from 10,000 images on ResNet-18 at 128, if the images' shorter side has as many; with --init
    its network at 128. A batch of N / 30 images, 16 to 256 and a power of two, but no more than N. As many epochs as see
    `views` images, 20 to 300; with --init a sixth, 5 to 50. What was typed stays.
    """
    n, side = (0, 0) if known.recipe or known.data in SETS else look_at(known.data)
    if not 0 < n < 100_000:
        return 0, {}
    found = {"arch": "resnet18" if known.init or n >= 10_000 else "lenet5", "center_fraction": 0.875}
    found["image_size"] = 128 if known.init else min(64 if n < 10_000 else 128, side or 64)
    found["batch_size"] = known.batch_size or 2 ** int(math.log2(max(2, min(n, 256, max(16, n / 30)))))
    found["epochs"] = max(5, min(50, views // n // 6)) if known.init else max(20, min(300, views // n))
    return n, {**found, "epochs": known.epochs or found["epochs"]}


def list_images(folder, root, seen, left_out):
    """Yield the paths of the images below a folder, by name; other files are added to the list left_out.

    Hidden files and run folders are passed over. Links are followed once, and not to what lies below the real path
    `root` anyway; `seen` is the set of real paths that were.
    """
    entries = [entry for entry in os.scandir(folder) if entry.name[0] != "."]
    for entry in sorted(entries, key=lambda entry: entry.name):
        if not entry.is_dir():
            if entry.is_file() and entry.name.lower().endswith(SUFFIXES):
                yield entry.path
            else:
                left_out.append(entry.path)
            continue
        real = os.path.realpath(entry)
        known = real in seen or entry.is_symlink() and f"{real}/".startswith(f"{root}/")
        if not known and not os.path.exists(f"{entry.path}/log.jsonl"):
            seen.add(real)
            yield from list_images(entry.path, root, seen, left_out)


def decode_small(data, side=96, limit=2**29):
    """Decode the files into data.pixels if all have one size of at most `side` pixels; else change nothing."""
    pixels, unreadable = None, set()
    for i, path in enumerate(data.paths):
        try:
            image = v2.functional.pil_to_tensor(open_image(path, side + 1))
        except Exception:
            unreadable.add(i)
            continue
        if pixels is None and max(image.shape) <= side and len(data) * image.numel() <= limit:
            pixels = image.new_zeros(len(data), *image.shape)
        if pixels is None or pixels.shape[1:] != image.shape:
            return
        pixels[i] = image
    data.pixels, data.unreadable = pixels, unreadable
    for i in unreadable:
        print_once(f"WARNING: cannot read {data.paths[i]!r}, which is taken as black")


def open_image(path, side=0):
    """A file as an upright RGB image of Pillow (torchvision.io crashes on damaged files); transparent ones on white.

    side: a JPEG may come at 1/2, 1/4 or 1/8 of its size, in less time, but not below this many pixels. Grays of 16
    bits or floats are scaled by the file's own range, or by 0..65535 if they use most of it.
    """
    with warnings.catch_warnings(action="ignore"), Image.open(path) as image:
        if side:
            image.draft(None, (side, side))
        image.load()
        with suppress(Exception):  # damaged EXIF
            image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":
        gray = np.asarray(image, dtype=np.float64)
        low, high = gray[np.isfinite(gray)].min(), gray[np.isfinite(gray)].max()
        if image.mode[0] == "I" and low >= 0 and 2**15 < high - low < 2**16:
            low, high = 0, 2**16 - 1
        gray = np.nan_to_num((gray - low) * (255 / max(high - low, 1e-12)), posinf=255, neginf=0)
        image = Image.fromarray(gray.round().clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


class Files(Dataset):
    """(position, seed, views) -> position, uint8 crops (3, S, S) of that file, could it be read? Runs in workers."""

    def __init__(self, paths):
        self.paths = paths

    def __getitem__(self, key):
        position, seed, views = key
        try:
            image, readable = open_image(self.paths[position], 4 * max(view.size for view in views)), True
        except Exception:
            image, readable = Image.new("RGB", (64, 64)), False
        with torch.random.fork_rng(devices=()):
            torch.default_generator.manual_seed(seed)
            return position, [view.crop_file(image) for view in views], readable


class Loader:
    """Batches of a split, from memory or from files; an image's position never leaves its side."""

    def __init__(self, data, batch_size, size, center, device, workers, training=True):
        """batch_size: over all processes; size, center: of test crops, see View; training: or may images be fewer?"""
        self.data, self.device, self.world = data, device, rank_and_world()[1]
        self.b, rest = divmod(batch_size, self.world)  # images of this process in a batch
        if rest:
            error(f"--batch-size {batch_size} is no multiple of the {self.world} processes")
        if len(data) < self.world:
            error(f"{data} are fewer than the {self.world} processes")
        if training and batch_size > len(data):
            error(f"--batch-size {batch_size} is more than the {data}")
        self.mean, self.std = (torch.tensor(x, device=device).view(-1, 1, 1) for x in (data.mean, data.std))
        self.center = View(size, center=center, flip=0.0)
        self.pixels = None if data.pixels is None else data.pixels.to(device)
        self.keys = []  # what the workers are to read next; they stay from one pass to the next
        more = {"num_workers": workers, "persistent_workers": workers > 0, "generator": torch.Generator()}
        pin = device.type == "cuda"
        self.files = DataLoader(Files(data.paths), self.b, sampler=self.keys, pin_memory=pin, **more)

    def train(self, order, views):
        """Yield (index (b,), [images (b, C, S, S) of each View]), this process's part of whole batches.

        order (M,): positions to visit; those left over wait for another epoch.
        """
        mine = order[rank_and_world()[0] :: self.world][: len(order) // (self.b * self.world) * self.b]
        for index, crops in self._batches(mine, views):
            images = [view.color(x) for view, x in zip(views, crops, strict=True)]
            yield index, [(x - self.mean) / self.std for x in images]

    def test(self, index):
        """Yield (index (b,), center crops (b, C, S, S)) over this process's positions `index`, in order."""
        for part, (crops,) in self._batches(index, [self.center]):
            yield part, (crops - self.mean) / self.std

    def _batches(self, index, views):
        if self.pixels is not None:
            for part in index.to(self.device).split(self.b):
                yield part, [view.crop(self.pixels[part]) for view in views]
            return
        seeds = torch.randint(2**62, (len(index),))  # a file's crop is the same for any number of workers
        self.keys[:] = [(*key, views) for key in zip(index.tolist(), seeds.tolist(), strict=True)]
        try:
            for part, crops, readable in self.files:
                for i in set(part[~readable].tolist()) - self.data.unreadable:
                    self.data.unreadable.add(i)
                    print(f"WARNING: cannot read {self.data.paths[i]!r}, which is taken as black", flush=True)
                crops = [x.to(self.device, non_blocking=True) / 255 for x in crops]
                yield part.to(self.device, non_blocking=True), crops
        except RuntimeError as problem:
            if "DataLoader worker" not in str(problem):
                raise
            error("a process that decodes files died: is memory or /dev/shm full? try --workers 0")


# %% augmentation
# A batch at a time on any device, but every image has its own random numbers. torchvision's transforms give a
# whole batch one crop; image by image they take 15 times as long at 32 pixels.


@dataclass(frozen=True)
class View:
    """How one view of an image is drawn; probabilities and ranges as in torchvision's transforms."""

    size: int  # side of the result, in pixels
    area: tuple = (0.08, 1.0)  # share of the image that a random crop keeps
    ratio: tuple = (3 / 4, 4 / 3)  # width / height of the crop
    center: float = 0.0  # > 0: a center crop of this share of the shorter side instead
    square: float = 0.0  # > 0: a random square of this share of the shorter side instead (AlexNet)
    central: bool = False  # random crops of the middle square alone
    flip: float = 0.5
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue; only where C = 3
    jitter_p: float = 0.8
    gray: float = 0.0
    blur: float = 0.0  # sigma 0.1 to 2 pixels
    solarize: float = 0.0

    def crop_file(self, image):
        """A crop of an image of Pillow, antialiased, perhaps flipped: uint8 (3, S, S)."""
        if self.central:
            image = v2.functional.center_crop(image, [min(image.size)] * 2)
        random = v2.RandomResizedCrop(self.size, *self.shape(*image.size))
        image = center_crop(image, self.size, self.center) if self.center else random(image)
        return v2.functional.pil_to_tensor(v2.RandomHorizontalFlip(self.flip)(image))

    def shape(self, height, width):
        """Ranges of the area, as a share of an image of this size, and of the ratio of random crops."""
        share = (self.square * min(height, width)) ** 2 / (height * width)
        return ((share, share), (1.0, 1.0)) if self.square else (self.area, self.ratio)

    def crop(self, pixels):
        """Crops of uint8 pixels (b, C, H, W), some flipped, random ones not antialiased: (b, C, S, S) in 0..1.

        Drawn as torchvision's: whole pixels, the first of ten tries that fits; if none does, cut to the image.
        """
        if self.central:
            pixels = v2.functional.center_crop(pixels, [min(pixels.shape[2:])] * 2)
        (height, width), rand = pixels.shape[2:], partial(torch.rand, len(pixels), device=pixels.device)
        flip, (share, ratio) = rand(1) < self.flip, self.shape(height, width)
        if self.center:
            crops = center_crop(pixels, self.size, self.center) / 255
            return torch.where(flip[:, :, None, None], crops.flip(3), crops)
        area = height * width * (share[0] + rand(10) * (share[1] - share[0]))  # (b, 10) tries
        ratio = ratio[0] * (ratio[1] / ratio[0]) ** rand(10)
        h, w = (area / ratio).sqrt().round().clamp(min=1), (area * ratio).sqrt().round().clamp(min=1)
        first = ((h <= height) & (w <= width)).byte().argmax(1, keepdim=True)
        h, w = h.gather(1, first).clamp(max=height), w.gather(1, first).clamp(max=width)  # (b, 1)
        top, left = (rand(1) * (height - h + 1)).floor(), (rand(1) * (width - w + 1)).floor()
        steps = (torch.arange(self.size, device=pixels.device) + 0.5) / self.size
        x = left + (w * torch.where(flip, 1 - steps, steps)).clamp(min=0.5).minimum(w - 0.5)
        y = top + (h * steps).clamp(min=0.5).minimum(h - 0.5)  # (b, S), as if the box had been cut out first
        grid = torch.broadcast_tensors((2 / width * x - 1)[:, None, :], (2 / height * y - 1)[:, :, None])
        return F.grid_sample(pixels / 255, torch.stack(grid, -1), padding_mode="border", align_corners=False)

    def color(self, images):
        """Jitter, gray, blur and solarize images (b, C, S, S) in 0..1."""
        if not (any(self.jitter) or self.gray or self.blur or self.solarize):
            return images
        chunk = max(1, 2**20 // self.size**2)  # what a processor's cache holds
        if len(images) > chunk and not images.is_cuda:
            return torch.cat([self.color(part) for part in images.split(chunk)])
        rand = partial(torch.rand, len(images), 1, 1, 1, device=images.device)
        if any(self.jitter) and images.shape[1] == 3:
            strength = [s * (2 * rand() - 1) for s in self.jitter]
            images = torch.where(rand() < self.jitter_p, jitter(images, *strength), images)
        if self.gray and images.shape[1] == 3:
            images = torch.where(rand() < self.gray, luminance(images), images)
        if self.blur:
            images = torch.where(rand() < self.blur, blur(images, 0.1 + 1.9 * rand()), images)
        if self.solarize:
            images = torch.where((rand() < self.solarize) & (images >= 0.5), 1 - images, images)
        return images


def center_crop(image, size, fraction):
    """The middle square of an image of Pillow or of pixels (.., H, W), this share of the shorter side, as size x size."""
    side = max(1, round(fraction * min(v2.functional.get_size(image))))
    return v2.functional.resize(v2.functional.center_crop(image, [side, side]), [size, size], antialias=True)


def luminance(images):
    """(b, 3, S, S) -> (b, 1, S, S): ITU-R 601 gray."""
    r, g, b = images.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def jitter(images, brightness, contrast, saturation, hue):
    """Change (b, 3, S, S) images, one after the other, by (b, 1, 1, 1) numbers; 0: not at all. Hue is a share of the
    color circle. torchvision draws the order anew for each call."""
    images = (images * (1 + brightness)).clamp(0, 1)
    mean = luminance(images).mean((2, 3), keepdim=True)
    images = mean.lerp(images, 1 + contrast).clamp(0, 1)
    images = luminance(images).lerp(images, 1 + saturation).clamp(0, 1)
    r, g, b = images.split(1, 1)
    top, spread = images.amax(1, keepdim=True), images.amax(1, keepdim=True) - images.amin(1, keepdim=True)
    sixth = torch.where(top == r, g - b, torch.where(top == g, b - r, r - g)) / spread.clamp(min=1e-6)
    sixth = sixth + torch.where(top == r, 0, torch.where(top == g, 2, 4)) + 6 * hue
    k = torch.cat([sixth + turn for turn in (5, 3, 1)], 1) % 6
    return top - spread * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images, sigma):
    """Gaussian blur by sigma (b, 1, 1, 1) pixels; the kernel spans a tenth of the image [SimCLR]."""
    b, c, size, _ = images.shape
    half = max(1, size // 20)
    offset = torch.arange(-half, half + 1, device=images.device)
    kernel = (-0.5 * (offset / sigma) ** 2).softmax(-1).repeat_interleave(c, 0)  # (b c, 1, 1, 2 half + 1)
    x = F.pad(images, [half] * 4, mode="reflect").flatten(0, 1)[None]  # each channel of each image by itself
    x = F.conv2d(F.conv2d(x, kernel, groups=b * c), kernel.transpose(2, 3), groups=b * c)
    return x.view(images.shape)


# %% networks

# fmt: off
PLANS = {  # (out, kernel, stride, padding) of a convolution, (kernel, stride) of a max-pool
    "lenet5": [(6, 5, 1, 0), (2, 2), (16, 5, 1, 0), (2, 2)],  # LeCun et al. 1998, with max-pools, ReLU, batch norm
    "alexnet": [(96, 11, 4, 2), (3, 2), (256, 5, 1, 2), (3, 2),  # Krizhevsky et al. 2012 without groups and LRN
                (384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), (3, 2)],  # [DeepCluster 3.4]
    "alexnet-small": [(48, 3, 1, 1), (2, 2), (126, 3, 1, 1), (2, 2),  # Deep Dive 3.3, which prints no kernels and
                      (192, 3, 1, 1), (192, 3, 1, 1), (128, 3, 1, 1)],  # pools: ours; hidden layers: its code's
    "vgg16": [*[(64, 3, 1, 1)] * 2, (2, 2), *[(128, 3, 1, 1)] * 2, (2, 2), *[(256, 3, 1, 1)] * 3, (2, 2),
              *[(512, 3, 1, 1)] * 3, (2, 2), *[(512, 3, 1, 1)] * 3, (2, 2)],
}
# fmt: on
HIDDEN = {"lenet5": (120, 84), "alexnet": (4096, 4096), "alexnet-small": (2048, 2048), "vgg16": (4096, 4096)}
ARCHS = [*PLANS, "resnet18", "resnet50"]


class Sobel(nn.Module):
    """Gray = mean of the channels, then its two 3x3 derivatives: (B, C, S, S) -> (B, 2, S, S), frozen, in float32."""

    def __init__(self):
        super().__init__()
        x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, images):
        with torch.autocast(images.device.type, enabled=False):
            return F.conv2d(images.float().mean(1, keepdim=True), self.filters, padding=1)


class Backbone(nn.Module):
    """Images (B, C, S, S) -> features (B, dim): of lenet5, the AlexNets and vgg16 the last hidden linear layer
    before its ReLU, of ResNets the last map, flattened or (pool) averaged.

    net: the network with torchvision's names of weights; norm: batch norm in the hidden linear layers, too, which
    then start as PyTorch starts them; pool_shortcuts: see resnet.
    """

    def __init__(
        self,
        arch,
        channels=3,
        image_size=224,
        sobel=False,
        dropout=0.5,
        pool=False,
        norm=False,
        pool_shortcuts=False,
    ):
        super().__init__()
        self.meta = {"arch": arch, "channels": channels, "image_size": image_size, "sobel": sobel}
        self.meta |= {"pool": pool, "norm": norm, "pool_shortcuts": pool_shortcuts}
        self.sobel, cin = (Sobel(), 2) if sobel else (nn.Identity(), channels)
        try:
            make, more = (plain_net, (dropout, norm)) if arch in PLANS else (resnet, (pool, pool_shortcuts))
            self.net = make(arch, cin, image_size, *more)
            with torch.no_grad():
                self.dim = self.eval()(torch.zeros(1, channels, image_size, image_size)).shape[1]
        except RuntimeError as problem:
            if "size" not in str(problem):
                raise
            error(f"--image-size {image_size} is too small for {arch}: nothing is left of the map")
        self.train()

    def forward(self, images):
        return self.net(self.sobel(images))


def plain_net(arch, channels, size, dropout, norm):
    """Convolutions with batch norm (`features`), then two hidden linear layers (`classifier`)."""
    modules, cin = [], channels
    for layer in PLANS[arch]:
        if len(layer) == 2:
            modules.append(nn.MaxPool2d(*layer))
        else:
            modules += [nn.Conv2d(cin, *layer), nn.BatchNorm2d(layer[0]), nn.ReLU(inplace=True)]
            cin = layer[0]
    net, (first, second) = nn.Sequential(), HIDDEN[arch]
    net.features, net.flatten = nn.Sequential(*modules), nn.Flatten()
    with torch.no_grad():
        flat = net.eval()(torch.zeros(1, channels, size, size)).shape[1]
    relu, end = nn.ReLU(inplace=True), []
    if norm:  # in the ReLU's place, so that the linear layers keep their names
        relu, end = nn.Sequential(nn.BatchNorm1d(first), relu), [nn.BatchNorm1d(second)]
    before = [nn.Dropout(dropout)] if arch.startswith("alexnet") else []
    between = [] if arch == "lenet5" else [nn.Dropout(dropout)]
    hidden = [*before, nn.Linear(flat, first), relu, *between, nn.Linear(first, second), *end]
    net.classifier = nn.Sequential(*hidden)
    he_init(net.features if norm else net)
    return net


def resnet(arch, channels, size, pool, pool_shortcuts):
    """torchvision's ResNet without fc; up to 64 pixels with a 3x3 stem and no pooling.

    pool_shortcuts: the 3x3 stem up to 96 pixels; shortcuts without weights, which average a map where it shrinks and
    add maps of zeros [LSD-C].
    """
    net = getattr(torchvision.models, arch)()
    for block in [net.get_submodule(f"layer{i}.0") for i in (1, 2, 3, 4)] if pool_shortcuts else []:
        if block.downsample:
            conv = block.downsample[0]
            zeros = nn.ConstantPad3d((0, 0, 0, 0, 0, conv.out_channels - conv.in_channels), 0.0)
            block.downsample = nn.Sequential(nn.AvgPool2d(conv.stride, ceil_mode=True), zeros)
    net.conv1 = nn.Conv2d(channels, 64, 7, stride=2, padding=3, bias=False)
    if size <= (96 if pool_shortcuts else 64):
        net.conv1, net.maxpool = nn.Conv2d(channels, 64, 3, padding=1, bias=False), nn.Identity()
    net.fc, net.avgpool = nn.Identity(), net.avgpool if pool else nn.Identity()
    he_init(net)
    return net


def he_init(net):
    """Convolutions N(0, sqrt(2 / (k*k*out))), linear layers N(0, 0.01), biases 0 [as DeepCluster's code]."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.zeros_(m.bias)


def pixel_net(size):
    """The images themselves, shrunk to at most 32x32 pixels, as features: what a network has to beat."""
    return nn.Sequential(nn.AdaptiveAvgPool2d(min(32, size)), nn.Flatten())


@torch.no_grad()
def fill_batch_norm(net, loader, index):
    """Give a random network the batch-norm statistics of the images `index`, the same on all processes.

    With those it starts with, 0 and 1, batch norm does nothing in evaluation mode: maps shrink or grow from layer to
    layer, and the network looks worse than it is.
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # keep nothing of the 0 and 1
    net.train()(torch.cat([images for _, images in loader.test(index)]))
    return net


@torch.no_grad()
def extract(net, loader, index, then=lambda x: x):
    """Center-crop features (n, D) of this process's images `index`, in evaluation mode and float32.

    then: applied to each batch as it comes (a projection, say), so that only its result is kept.
    """
    was_training, features, meter = net.training, [], Meter("features", len(index))
    net.eval()
    for buffer in net.buffers():  # batch-norm statistics: process 0's
        dist.broadcast(buffer, 0)
    for _, images in loader.test(index):
        features.append(then(net(images)))
        meter.add(len(images))
    meter.bar.close()
    net.train(was_training)
    bad = loader.data.unreadable  # each process has met those of its own images
    bad.update(all_gather(torch.tensor(sorted(bad), dtype=torch.int64)).tolist())
    return torch.cat(features)


# %% clustering
# Every process brings its shard of the rows; what is found is the same for any number of processes.


@cache
def gpu_resources():
    """faiss's memory on the GPU, beside torch's: 256 MB instead of its 1.5 GB."""
    resources = faiss.StandardGpuResources()
    resources.setTempMemory(2**28)
    return resources


def nearest(queries, keys, k=1, inner=False):
    """The k nearest keys (M, D) of each query (n, D): (n, k) values, (n, k) int64 ids, best first.

    Squared Euclidean distance, or the inner product if inner. Exact, float32: by faiss on the CPU and, where its
    build has GPUs, there; else by torch. Raises ValueError for NaN.
    """
    queries, keys, k = queries.float().contiguous(), keys.float().contiguous(), min(k, len(keys))
    metric, gpu = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2, queries.device.index
    if not queries.is_cuda:
        values, ids = faiss.knn(queries, keys, k, metric=metric)
    elif k <= 2048 and faiss.get_num_gpus() > 0:  # knn_gpu without a GPU ends the process
        values, ids = faiss.knn_gpu(gpu_resources(), queries, keys, k, metric=metric, device=gpu)
    else:
        values, ids = nearest_by_torch(queries, keys, k, inner)
    if (ids < 0).any() or values.isnan().any() or keys.isnan().any():
        raise ValueError("a query or key is NaN")
    return values, ids


def nearest_by_torch(queries, keys, k, inner):
    """nearest as chunks of a matrix product, at most 512 MiB of similarities at a time."""
    found, norms = [], keys.square().sum(1)
    for q in queries.split(max(1, 2**27 // len(keys))):
        score, ids = (q @ keys.T if inner else 2 * (q @ keys.T) - norms).topk(k, 1)
        found.append((score if inner else (q.square().sum(1, keepdim=True) - score).clamp(min=0), ids))
    return tuple(torch.cat(parts) for parts in zip(*found, strict=True))


def check_finite(x):
    """End the run if a row of x (n, D), on any process, is NaN, infinite, or too large to be squared."""
    bad = any(not (2 * rows).square().sum(1).isfinite().all() for rows in x.split(4096))
    if all_reduce_sum(torch.tensor(float(bad))) > 0:
        error("the features are NaN, infinite or too large to be squared; lower --lr?")


def kmeans(x, k, gen, iterations=20):
    """Lloyd's k-means of the rows x (n, D) of all processes, as DeepCluster ran it with faiss.

    -> assign (n,) int64, squared distance (n,) to the own centroid, centroids (K, D), the mean of all N distances.
    The rows of K different images start as centroids, drawn by `gen`. Some ids may never occur. Ends the run if K
    exceeds N, or if features are not finite.
    """
    check_finite(x)
    sizes = all_gather(torch.tensor([len(x)])).tolist()
    n, first = sum(sizes), sum(sizes[: rank_and_world()[0]])
    if k > n:
        error(f"{k} clusters for {n} images")
    start = torch.randperm(n, generator=gen)[:k] - first  # positions in x
    mine = (start >= 0) & (start < len(x))
    centroids = x.new_zeros(k, x.shape[1])
    centroids[mine.to(x.device)] = x[start[mine].to(x.device)]
    centroids = all_reduce_sum(centroids)  # each row comes from the one process that owns it
    own = x.new_zeros(k + 1, x.shape[1], dtype=torch.float64)  # this process's sums; last: of no cluster yet
    assign = torch.full((len(x),), k, device=x.device)
    for _ in range(iterations):
        before, assign = assign, nearest(x, centroids)[1][:, 0]
        moved = (assign != before).nonzero()[:, 0]  # the others are in the sums already
        for part in moved.split(2048):
            rows = x[part].double()
            own.index_add_(0, assign[part], rows).index_add_(0, before[part], rows, alpha=-1)
        sums, counts = all_reduce_sum(own[:k]), all_reduce_sum(torch.bincount(assign, minlength=k))
        if all_reduce_sum(torch.tensor(len(moved))) == 0 < counts.min():
            break  # more iterations would change nothing
        centroids = torch.where(counts[:, None] > 0, sums / counts[:, None], centroids).float()
        split_empty(centroids, counts.double().cpu(), gen)
    distance, assign = nearest(x, centroids)
    objective = all_reduce_sum(distance.double().sum()).item() / n
    return assign[:, 0], distance[:, 0], centroids, objective


def split_empty(centroids, counts, gen, eps=1 / 1024):
    """Give every empty cluster half of a larger one j, chosen in proportion to n_j - 1; in place: both get its
    centroid, even coordinates of one times 1 + eps and odd ones times 1 - eps, the other the other way round."""
    sign = 1 + eps * (1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2))  # 1+e, 1-e, ..
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        odds = (counts - 1).clamp(min=0)
        if odds.sum() == 0:  # as many clusters as images: nobody has one to give
            return
        donor = torch.multinomial(odds, 1, generator=gen).item()
        centroids[empty], centroids[donor] = centroids[donor] * sign, centroids[donor] * (2 - sign)
        counts[empty] = counts[donor] / 2
        counts[donor] -= counts[empty]


# %% metrics


def nmi(a, b):
    """Normalized mutual information I(A;B) / sqrt(H(A) H(B)) of two labelings (N,): the geometric mean, as in
    DeepCluster 4.1; libraries default to the arithmetic one today."""
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(a, b, average_method="geometric"))


def label_scores(labels, assign, left_out=()):
    """{nmi_labels, acc_labels, ari_labels} of an assignment (N,); nothing without labels.

    ACC: the share right under the best one-to-one matching of clusters to classes, whose numbers may differ.
    left_out: positions of images that do not count.
    """
    if labels is None:
        return {}
    from scipy.optimize import linear_sum_assignment
    from sklearn.metrics import adjusted_rand_score
    from sklearn.metrics.cluster import contingency_matrix

    counted = torch.ones(len(labels), dtype=torch.bool)
    counted[list(left_out)] = False
    labels, assign = labels[counted], assign.cpu()[counted]
    table = contingency_matrix(labels, assign)
    accuracy = float(table[linear_sum_assignment(table, maximize=True)].sum() / len(labels))
    ari = float(adjusted_rand_score(labels, assign))
    return {"nmi_labels": nmi(labels, assign), "acc_labels": accuracy, "ari_labels": ari}


def knn_accuracy(queries, target, parts, ks=(1, 200), temperature=0.07):
    """{K: share of the queries whose class their K nearest rows of the bank tell}, each with a vote of exp(cosine / 0.07)
    [Wu et al. 2018, 3.4].

    queries (n, D) with classes target (n,), and parts of the bank, pairs of rows (m, D) and their classes (m,): this
    process's, rows of unit length. A class below 0, of a file that could not be read, is neither asked nor heard.
    """

    def nearest_first(cosines, classes):
        cosines, order = cosines.topk(min(max(ks), cosines.shape[1]), 1)
        return cosines, classes.gather(1, order)

    queries, target = all_gather(queries), all_gather(target.to(queries.device))
    cosines, classes = queries[:, :0], target[:, None][:, :0]
    for rows, labels in parts:
        rows, labels = rows[labels >= 0], labels[labels >= 0].to(rows.device)
        if len(rows):
            values, ids = nearest(queries, rows, max(ks), inner=True)
            found = torch.cat([cosines, values], 1), torch.cat([classes, labels[ids]], 1)
            cosines, classes = nearest_first(*found)
    cosines, classes = nearest_first(all_gather(cosines.T).T, all_gather(classes.T).T)
    votes, right = ((cosines - cosines[:, :1]) / temperature).exp(), {}  # a common factor changes nothing
    for k in ks:
        sums = votes.new_zeros(len(votes), int(max(classes.max(), target.max())) + 1)
        voted = sums.scatter_add_(1, classes[:, :k], votes[:, :k]).argmax(1)
        right[k] = (voted == target)[target >= 0].double().mean().item()
    return right


def baselines(loader, k, gen):
    """What any K clusters of these images have to beat, as label_scores: {"pixels": k-means on the center crops
    themselves, see pixel_net; "chance": a random assignment}; nothing without labels or over 100,000 images."""
    n, labels = len(loader.data), loader.data.labels
    if labels is None or n > 100_000:
        return {}
    x = extract(pixel_net(loader.center.size), loader, torch.arange(*shard(n)))
    found = {"pixels": all_gather(kmeans(x, k, gen)[0]), "chance": torch.randint(k, (n,), generator=gen)}
    return {name: label_scores(labels, assign, loader.data.unreadable) for name, assign in found.items()}


def cluster_sizes(assign, k):
    """{clusters, empty, smallest, largest} of an assignment (N,); the smallest of those that are not empty."""
    counts = torch.bincount(assign, minlength=k)
    used = counts[counts > 0]
    if used.max() > 0.5 * len(assign):
        print_once(f"WARNING: trivial solution: {used.max() / len(assign):.0%} of the images in one cluster")
    sizes = {"clusters": len(used), "empty": k - len(used)}
    return {**sizes, "smallest": int(used.min()), "largest": int(used.max())}


# %% run folder


class Meter:
    """Progress through this process's images and the mean of their losses: a bar on a terminal, elsewhere a line a
    minute. Losses are read from the device every 100 steps, or once a minute, so that it rarely waits."""

    def __init__(self, title, total):
        self.steps, self.losses, self.shown, self.world = 0, 0, time.time(), rank_and_world()[1]
        self.terminal = is_main() and sys.stderr.isatty()
        file = sys.stderr if self.terminal else io.StringIO()
        more = {"leave": False, "file": file, "mininterval": 0.1 if self.terminal else 60}
        self.bar = tqdm(total=total * self.world, desc=title, unit=" images", **more)

    def add(self, n, loss=None):
        """n more images are done; loss: their mean, a tensor."""
        self.steps += 1
        self.losses += 0 if loss is None else loss.detach().double()
        self.bar.update(n * self.world)
        minute = time.time() - self.shown > 60
        if minute or self.terminal and self.steps % 100 == 0:
            self.shown = time.time()
            self.bar.set_postfix({} if loss is None else {"loss": f"{self.losses.item() / self.steps:.3f}"})
            if not self.terminal:
                print_once(self.bar)

    def mean_loss(self):
        """Over all processes, at the end; one that is not finite ends the run, before anything is saved."""
        self.bar.close()
        mean = all_reduce_sum(self.losses / self.steps).item() / self.world
        if not math.isfinite(mean):
            error(f"the loss is {mean}; the last checkpoint is as it was. Lower --lr?")
        return mean


# From one start of a run to the next.
MAY_CHANGE = {"data", "root", "out", "overwrite", "device", "workers", "assign"}


class Run:
    """The run folder, seen by all processes: log.jsonl, checkpoint.pt, and what else a run leaves behind."""

    def __init__(self, method, args, data, may_change=frozenset()):
        """Open args.out. self.state: the checkpoint to go on from, or None; self.finished: it did all its epochs.

        Ends with exit code 2, naming what differs, if the checkpoint came from other arguments or images.
        """
        self.method, self.out, self.log_path = method, Path(args.out), Path(args.out) / "log.jsonl"
        self.phase = None  # of the last epoch
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"  # by torchrun, to go on
        problem = self._open(args.overwrite and not restarted) if is_main() else None
        if all_reduce_sum(torch.tensor(problem is not None)):
            error(f"--out {self.out}: {problem or 'see process 0'}")
        self.state, self.damaged = load_checkpoint(self.out)
        epochs = all_gather(torch.tensor([self.state["epoch"] if self.state else 0]))
        if epochs.min() < epochs.max():
            error(f"--out {self.out} is not the same folder for all processes: their checkpoints differ")
        names = "\n".join(path[len(data.name) :].lstrip("/") for path in data.paths or ())
        self.config = {k: v for k, v in vars(args).items() if k not in MAY_CHANGE | may_change}
        self.config |= {"method": method, "data": Path(data.name).resolve().name, "images": len(data)}
        self.config["file_names"] = hashlib.blake2b(names.encode(errors="surrogateescape")).hexdigest()[:8]
        old = self.state["config"] if self.state else self.config
        if odd := [f"{k} {old.get(k)} -> {v}" for k, v in self.config.items() if old.get(k) != v]:
            error(f"--out {self.out} holds another run ({', '.join(odd)}): use another --out, or --overwrite")
        self.finished = False
        if not self.state:
            return self.log(what_runs(args, data))
        last = ["", *self.log_path.read_text().splitlines(keepends=True)][-1]
        self.finished = '"result"' in last and last[-1] == "\n" and self.state["epoch"] >= args.epochs
        said = f"finished, see the last line of {self.log_path}" if self.finished else "going on"
        print_once(f"{self.out}: {self.state['epoch']} epochs are done; {said}")
        if is_main() and not self.finished:  # what was logged after the checkpoint will happen again
            os.truncate(self.log_path, min(self.state["log_bytes"], self.log_path.stat().st_size))

    def _open(self, overwrite):
        """Make the folder, locked against a second run for as long as this process lives; None, or what is wrong."""
        try:
            self.out.mkdir(parents=True, exist_ok=True)
            self.log_path.touch()
            self.lock = open(self.out / ".lock", "w")  # noqa: SIM115
        except OSError as problem:
            return f"cannot write there ({problem.strerror})"
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return "another run is writing there just now"
        except OSError:
            pass  # a file system without locks
        for path in self.out.glob("checkpoint*.pt") if overwrite else ():
            path.unlink()
        if not any(self.out.glob("checkpoint*.pt")):
            self.log_path.write_text("")

    def log(self, record, *shown):
        """Append one JSON object to log.jsonl; print those of its entries whose names are `shown`."""
        found = {name: record[name] for name in shown if name in record}
        words = [f"{name} {x:.3f}" if isinstance(x, float) else f"{name} {x}" for name, x in found.items()]
        print_once(*words, sep="  ") if words else None
        if is_main():
            with open(self.log_path, "a") as file:
                file.write(json.dumps(record) + "\n")

    def end_epoch(self, record, *shown):
        """Log an epoch; of the first one of each phase say what time is left; after a fifth of them and at the end,
        whether the loss still is that of a uniform prediction."""
        epoch, epochs, uniform = record["epoch"], record["epochs"], record.get("uniform", math.inf)
        self.log(record, *shown)
        if record.get("phase", "") != self.phase and 0 < epoch < epochs:
            self.phase = record.get("phase", "")
            left = timedelta(seconds=round(record["seconds"] * (epochs - epoch)))
            print_once(f"about {left} left at this pace")
        if epoch in (math.ceil(epochs / 5), epochs) and record["loss"] > 0.98 * uniform:
            print_once(
                f"WARNING: the loss is {record['loss']:.3f}, that of a uniform prediction {uniform:.3f}: nothing is "
                "learnt so far. More steps (a smaller --batch-size, more --epochs), another --lr, or --init"
            )

    def save(self, state, backbone, loader, **more):
        """checkpoint.pt; and backbone.pt, a Backbone alone, with what more a method has, like the layer behind it."""
        if is_main():
            state = {**state, "config": self.config, "log_bytes": self.log_path.stat().st_size}
            save_file(self.out / "checkpoint.pt", state, keep=not self.damaged)
            self.damaged = False
        self.save_backbone("backbone.pt", self.method, backbone, loader, **more)

    def save_backbone(self, name, method, backbone, loader, **more):
        """A file {"state_dict": torchvision's names, "meta": how to build and feed it, and whose it is}, and more."""
        data = loader.data
        meta = {**backbone.meta, "method": method, "center_fraction": loader.center.center}
        meta |= {"data": data.name, "mean": list(data.mean), "std": list(data.std)}
        meta["start"] = self.config.get("start")
        save_file(self.out / name, {"state_dict": backbone.net.state_dict(), "meta": meta, **more})


def what_runs(args, data):
    """Command, arguments, versions, commit, hardware and data, for a log's first record."""
    git = f"git -C '{Path(__file__).parent}' describe --always --dirty"
    failed, commit = subprocess.getstatusoutput(git)
    gpu = torch.cuda.is_available()
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "args": vars(args),
        "commit": None if failed else commit,
        "versions": {m.__name__: m.__version__ for m in (torch, torchvision, faiss, np)},
        "hardware": torch.cuda.get_device_name() if gpu else f"CPU ({os.uname().machine})",
        "processes": rank_and_world()[1],
        "images": len(data),
    }


def save_file(path, state, keep=False):
    """torch.save, on the main process, that survives a kill; keep: the file before it stays as NAME.prev.pt."""
    if not is_main():
        return
    temporary = path.with_suffix(".tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            os.replace(path, path.with_suffix(".prev.pt"))
        os.replace(temporary, path)
    except (OSError, RuntimeError) as problem:  # torch reports a full disk as a RuntimeError
        error(f"cannot write {path} ({problem}); the file before it is as it was")


def load_file(path):
    """torch.load for plain data only; raises if the file is damaged. Checks every zip checksum first: torch does
    not, and flipped bits would become wrong weights. Only torch before 1.6 wrote files that are no zips."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            if broken := archive.testzip():
                raise ValueError(f"checksum of {broken} is wrong")
    return torch.load(path, map_location="cpu", weights_only=True)


def load_checkpoint(folder):
    """(the newest readable checkpoint or None, was a newer one damaged?)"""
    paths = [path for name in ("checkpoint.pt", "checkpoint.prev.pt") if (path := folder / name).exists()]
    for path in paths:
        try:
            state = load_file(path)
            if not {"config", "epoch", "log_bytes"} <= state.keys():
                raise ValueError("not a checkpoint of these scripts")
            return state, path is not paths[0]
        except Exception as problem:
            print_once(f"WARNING: {path} is damaged: {problem}")
    if paths:
        error(f"--out {folder} has damaged checkpoints only; --overwrite starts afresh")
    return None, False


def read_backbone(path, arch=None):
    """{"state_dict", "meta", ..} of a backbone.pt or of that of a run folder; of others' weights, see translate; or
    of "imagenet" or "imagenet-ARCH", torchvision's. Ends the run if it is none of these."""
    try:
        kind, _, name = str(path).partition("-")
        if kind == "imagenet" and not Path(path).exists():
            name = name or arch or "resnet18"
            if name not in ("resnet18", "resnet50", "vgg16"):
                raise ValueError(f"torchvision has weights of resnet18, resnet50 and vgg16, not of {name}")
            weights = torchvision.models.get_model_weights(name.replace("vgg16", "vgg16_bn")).DEFAULT
            try:
                return translate(weights.get_state_dict(progress=False))
            except OSError as problem:
                error(f"--init {path}: no download ({problem}); fetch {weights.url} and --init that file")
        saved = load_file(f"{path}/backbone.pt" if Path(path).is_dir() else path)
        return saved if "arch" in saved.get("meta", ()) else translate(saved)
    except Exception as problem:
        why = " ".join(str(problem).split())[:300]
        error(f"{path} is no run folder with a backbone.pt, and no file of weights, or damaged ({why})")


def translate(saved):
    """Others' weights as a backbone.pt: torchvision's, and checkpoints that name weights as it does, behind prefixes:
    those of the authors of DeepCluster and CoKe, of MoCo, SwAV and DINO. Heads are left out; 1,000 outputs tell that
    there were labels, and two input channels a Sobel filter."""
    names = state = saved.get("state_dict", saved)
    state = {name.replace("module.", ""): x for name, x in state.items()}
    for prefix in ("encoder_q.", "base_encoder.", "encoder.", "backbone."):
        if any(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    head = next((state[name] for name in ("fc.weight", "classifier.6.weight") if name in state), ())
    kept = ("conv1.", "bn1.", "layer", "features.", "classifier.")
    state = {name: x for name, x in state.items() if name.startswith(kept) and "classifier.6." not in name}
    first = state.get("conv1.weight", state.get("features.0.weight"))
    if first is None:
        found = ", ".join(list(names)[:5]) or "its names"
        raise ValueError(f"no conv1.weight or features.0.weight among {found}")
    arch = ("alexnet" if first.shape[2] == 11 else "vgg16") if "features.0.weight" in state else "resnet18"
    arch = "resnet50" if "layer1.0.conv3.weight" in state else arch
    meta = {"arch": arch, "channels": 3, "image_size": 224, "sobel": first.shape[1] == 2}
    meta |= {"pool": False, "norm": False}
    meta |= {"method": "supervised" if len(head) == 1000 else "pretrained", "center_fraction": 0.875}
    meta |= {"data": "data/imagenet", "mean": list(Images.mean), "std": list(Images.std)}
    return {"state_dict": state, "meta": meta}


def load_backbone(path, arch=None, **changed):
    """(Backbone in evaluation mode, meta) of what read_backbone reads; changed: other arguments of Backbone."""
    saved = read_backbone(path, arch)
    kind = {"pool_shortcuts": False, **saved["meta"], **changed, "arch": arch or saved["meta"]["arch"]}
    names = ("arch", "channels", "image_size", "sobel", "dropout", "pool", "norm", "pool_shortcuts")
    try:
        backbone = Backbone(**{name: kind[name] for name in names if name in kind})
        backbone.net.load_state_dict(saved["state_dict"])
    except (KeyError, RuntimeError) as problem:
        why = " ".join(str(problem).split())[:300]
        error(f"{path}: no weights for {kind['arch']} at {kind.get('image_size')} pixels: {why}")
    return backbone.eval(), saved["meta"]


def make_backbone(args, channels, **kind):
    """The Backbone that training starts from: of --arch, --image-size and --sobel, random but for --init; then in the
    variant (norm, pool_shortcuts) of that file."""
    kind |= {"channels": channels, "image_size": args.image_size, "sobel": args.sobel}
    if not args.init:
        return Backbone(args.arch, **kind)
    print_once(f"{args.start}: {args.init}")
    kind = {name: value for name, value in kind.items() if name not in ("norm", "pool_shortcuts")}
    return load_backbone(args.init, args.arch, **kind)[0].train()


def init_defaults(known):
    """What --init decides where no flag does: network, Sobel filter, mean and deviation of the images; and what tables
    call the network that training starts from."""
    if not known.init:
        return {"start": "random network", "normalize": None}
    meta = read_backbone(known.init, known.arch)["meta"]
    found = {"arch": meta["arch"], "sobel": meta["sobel"], "normalize": [meta["mean"], meta["std"]]}
    small = meta["image_size"] <= (96 if meta.get("pool_shortcuts") else 64)
    if small or not meta["arch"].startswith("resnet"):
        found["image_size"] = meta["image_size"]  # what linear layers take, and the 3x3 stem
    supervised = "supervised" in f"{meta['method']} {meta.get('start')}"
    return {**found, "start": f"{'supervised' if supervised else meta['method']} initialization"}


def save_clusters(out, loader, assign, distance, k=None, picture=True, name=""):
    """assignments.csv: image (path, or position in a named set) and cluster, or "unreadable"; perhaps clusters.png.

    assign, distance (N,) of all images, the same on all processes. k: say which of so many clusters vanished, and
    whether labels tell more than those of a random assignment. name: follows "assignments" and "clusters".
    """
    if not is_main():
        return
    assign = loader.data.without_unreadable(assign)
    names = loader.data.paths or range(len(assign))
    clusters = ["unreadable" if c < 0 else c for c in assign.tolist()]
    path = out / f"assignments{name}.csv"
    with open(path, "w", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerows([("image", "cluster"), *zip(names, clusters, strict=True)])
    known = assign >= 0
    if k:
        sizes = torch.bincount(assign[known], minlength=k)
        print(f"{k} clusters of {sizes.min()} to {sizes.max()} images")
    if k and (empty := k - len(assign[known].unique())):
        print(f"WARNING: {empty} of {k} clusters have no image left: fewer --k, a smaller --lr, or --init")
    if k and loader.data.labels is not None:
        known &= loader.data.labels >= 0
        labels, assign_known = loader.data.labels[known], assign[known]
        shuffled = assign_known[torch.randperm(len(labels), generator=generator("shuffled"))]
        ours, chance = nmi(labels, assign_known), nmi(labels, shuffled)
        if len(labels) and ours < chance + 0.01:
            print(f"WARNING: NMI with the labels {ours:.3f}, random {chance:.3f}: more --epochs, or --init")
    if picture:
        draw(draw_clusters, out / f"clusters{name}.png", loader, assign, distance)


@torch.no_grad()
def assign_folder(args, load_model, load=load_data):
    """--assign: write the clusters of a folder's images by the finished run --out into assignments-FOLDER.csv there.

    load_model(run folder) -> (network, embed, decide): images -> features (B, D), embed: -> (B, P), decide: those of
    all images of this process -> distance, cluster (n, 1)."""
    out, device, meta = Path(args.out), setup(args.device), read_backbone(args.out)["meta"]
    if '"result"' not in (out / "log.jsonl").read_text().rpartition("\n{")[2]:
        error(f"--out {out}: this run has not finished")
    try:
        net, embed, decide = load_model(out, device)
    except (AttributeError, KeyError, OSError) as problem:  # of another method, or of vectors
        error(f"--out {out} is no run by which this script could assign images (no {problem})")
    data, _ = load(args.assign, args.root, (meta["mean"], meta["std"]))
    how = meta["image_size"], meta["center_fraction"], device, args.workers
    loader = Loader(data, args.batch_size, *how, training=False)
    found = decide(extract(net, loader, torch.arange(*shard(len(data))), embed))
    distance, assign = (all_gather(x)[:, 0].cpu() for x in found)
    name = f"-{Path(args.assign).resolve().name}"
    save_clusters(out, loader, assign, distance, name=name)
    print_once(f"which of {data} is in which cluster: {out}/assignments{name}.csv and clusters{name}.png")
    dist.destroy_process_group()


def draw(function, path, *rest):
    """function(path, ..) draws a picture; one that fails does not end the run."""
    try:
        function(path, *rest)
    except Exception as problem:
        print(f"WARNING: no {path} ({problem})", flush=True)


def draw_clusters(path, loader, assign, distance, rows=10, columns=10):
    """A row for each of up to `rows` clusters, from the largest to the smallest: number, size, with labels the class
    that most of it are of, and its most central images."""
    from matplotlib.figure import Figure

    counts, data = torch.bincount(assign[assign >= 0]), loader.data
    used = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    used = used[torch.linspace(0, len(used) - 1, min(rows, len(used))).round().long()].tolist()
    figure = Figure(figsize=(columns, len(used)))
    for axis, c in zip(figure.subplots(len(used), squeeze=False)[:, 0], used, strict=True):
        members = (assign == c).nonzero()[:, 0]
        best = members[distance[members].argsort(stable=True)][:columns]
        images = torch.cat([x for _, x in loader.test(best)]) * loader.std + loader.mean
        images = images[:, : 3 if images.shape[1] > 2 else 1]  # of any number of channels
        images = torch.cat([images, images.new_ones(columns - len(best), *images.shape[1:])]).clamp(0, 1)
        row = torchvision.utils.make_grid(images, nrow=columns, pad_value=1)
        axis.imshow(row.permute(1, 2, 0).cpu().numpy())
        words = [f"cluster {c}, {counts[c]} images", *main_class(data, members)]
        axis.set_ylabel("\n".join(words), rotation=0, ha="right", va="center", parse_math=False)
        axis.set(xticks=[], yticks=[], frame_on=False)
    figure.savefig(path, bbox_inches="tight")


def main_class(data, members):
    """["NAME 83%"], the most frequent class of the images `members`; [] without labels."""
    labels = members[:0] if data.labels is None else data.labels[members]
    if not len(labels := labels[labels >= 0]):
        return []
    best = int(labels.mode().values)
    name = data.classes[best] if data.classes[best].isascii() else best  # what every font has
    return [f"{name} {(labels == best).double().mean():.0%}"]
