"""What the method scripts share: infrastructure only, no method lives here.

    command line  one-line errors, finite numbers
    processes     setup, gather, total, shard, heartbeat, ..: the same call on 1 or 80 processes
    data          digits, torchvision's sets, folders; one Loader for memory and for files
    augmentation  a whole batch at once, every image with its own random numbers
    networks      Sobel and the backbones, with named stages for probing
    faiss         nearest, kmeans, pca, whiten: over shards, on CPU or GPU
    metrics       NMI, clustering accuracy, ARI, weighted kNN, cluster sizes
    run folder    log, checkpoint, backbone, assignments, pictures

The earlier common.py, kept until the scripts that import it have moved to the new one.

Would this line change if a sentence of one paper changed? Then it belongs in that paper's script.
Sizes: N images, B batch (over all processes), b batch of this process, C channels, S image size,
D feature size, K clusters. Each function can be copied out with the verbs it calls.
"""

import argparse
import atexit
import contextlib
import csv
import fcntl
import functools
import hashlib
import importlib
import itertools
import json
import math
import multiprocessing
import os
import platform
import secrets
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
import warnings
import zipfile
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch  # before faiss: both bring an OpenMP, and this order is the one that works
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image
from torch import nn
from tqdm import tqdm

import faiss  # isort: skip

DATASETS = ["digits", "mnist", "fashionmnist", "cifar10", "cifar100-20", "svhn", "stl10"]
ARCHS = ["lenet5", "alexnet", "alexnet-small", "vgg16", "resnet18", "resnet50"]
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".ppm", ".pgm", ".tif", ".tiff", ".webp"}


# --------------------------------------------------------------------------- command line


class Parser(argparse.ArgumentParser):
    """argparse that shows defaults in its help, and says what is wrong in one line, once on a machine."""

    def __init__(self, description=None, **more):
        super().__init__(
            description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **more
        )

    def parse_args(self, *words, **more):
        args = super().parse_args(*words, **more)
        for action in self._actions:
            if getattr(args, action.dest, None) == "":  # an unset variable of the shell: --out "$OUT"
                self.error(f"{(action.option_strings or [action.dest])[0]} is empty")
        return args

    def error(self, message):
        if _first():
            _complain(f"{message} (--help explains the options)")
        raise SystemExit(2)


def _first():
    """True on one process of each machine, before they have joined."""
    return int(os.environ.get("LOCAL_RANK") or os.environ.get("RANK") or 0) == 0


def _complain(message):
    line = f"{Path(sys.argv[0]).name}: error: {message}"
    print(" ".join(line.split()), file=sys.stderr, flush=True)


def number(text):
    """A finite float of the command line; ValueError for anything else, NaN and infinity included."""
    if not math.isfinite(float(text)):
        raise ValueError
    return float(text)


# --------------------------------------------------------------------------- processes
# On one process every verb below does nothing, so the scripts never ask how many there are.


def processes():
    """Number of processes in this run, 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank():
    """This process's number, 0 .. processes() - 1."""
    return dist.get_rank() if dist.is_initialized() else 0


def main_process():
    """True on the one process that prints and writes. Decide everywhere, speak on one."""
    return rank() == 0


def setup(device="auto"):
    """Join torchrun's processes if there are any; return this process's torch.device.

    device: "auto" (CUDA where there is some, else the CPU), "cpu", "cuda" or "cuda:1".
    gloo carries CPU tensors and nccl CUDA tensors. Joining may take 10 minutes. From then on a process
    that dies, is stopped or is lost with its machine ends all others within half a minute (see _Watch);
    a collective that one of them never enters, after an hour: that long the others wait for a download.
    """
    global _watch
    # Until all have joined, a signal ends the process at once: there is nothing to save, and nobody to agree with.
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device, name = torch.device(device), device
    except RuntimeError:
        device, name = None, device
    if device is None or device.type not in ("cpu", "cuda"):
        refuse(f"--device {name}: use auto, cpu, cuda or cuda:N")
    if device.type == "cuda":
        if not torch.cuda.is_available():
            refuse("--device cuda: torch sees no CUDA device here; leave --device out to run on the CPU")
        if (device.index or 0) >= torch.cuda.device_count():
            refuse(f"--device {device}: torch sees {torch.cuda.device_count()} CUDA devices here")
        if device.index is None:
            device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
    if int(os.environ.get("WORLD_SIZE", 1)) > 1 and not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        store, own, world = next(dist.rendezvous("env://", timeout=timedelta(minutes=10)))
        store = dist.PrefixStore(_meet(store, own, world), store)
        store.set(f"alive {own}", "0")
        dist.init_process_group(backend, store=store, rank=own, world_size=world, timeout=timedelta(hours=1))
        _watch = _Watch(store.clone(), own, world)
    for name in SIGNALS:
        if name != signal.SIGHUP or signal.getsignal(name) != signal.SIG_IGN:  # nohup ignores it
            signal.signal(name, _remember_signal)
    return device


SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # SIGHUP: the terminal is gone


def _meet(store, own, world, limit=600):
    """A name that the processes of this start share, and no former start had.

    torchrun keeps its store when it starts the processes again, with what dead ones wrote, their addresses among
    it; and it counts restarts on each machine apart. So process 0 makes up a name and waits for the others to
    say hello to it, each with a word of its own; who gets that word back knows that the name is alive.
    """
    word, end = secrets.token_hex(8), time.monotonic() + limit
    if own == 0:
        store.set("name", word)
        for r in range(1, world):
            store.set(f"go {word} {r}", store.get(f"hello {word} {r}"))  # waits for it
        return word
    while time.monotonic() < end:
        name = store.get("name").decode()
        store.set(f"hello {name} {own}", word)
        with contextlib.suppress(RuntimeError):  # nothing heard in a second: a dead one's name
            store.wait([f"go {name} {own}"], timedelta(seconds=1))
            if store.get(f"go {name} {own}").decode() == word:
                return name
        time.sleep(0.05)
    raise TimeoutError(f"process 0 was not found in {limit} s")


def restarted():
    """True if torchrun or Slurm started this command again by itself."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(name) or 0) > 0 for name in counts)


SILENCE, TICK = 10, 2.0  # a process is lost after so many ticks of so many seconds without a sign of life
_watch = None


class _Watch:
    """Ends this process with one line when another has been silent for SILENCE ticks.

    A process that is stopped, or whose machine is lost, closes no connection: those that wait for it would
    wait on. So each counts up a number in the store they joined by, and listens to the others'. Silence is
    measured in own ticks, for a laptop may sleep and wake up; it says nothing of slow work, for the
    counting is a thread of its own.
    """

    def __init__(self, store, own, world):
        self.store, self.own, self.names = store, own, [f"alive {r}" for r in range(world)]
        self.heard, self.end = [None] * world, threading.Event()
        self.counting = threading.Thread(target=self._count, daemon=True)
        self.counting.start()
        threading.Thread(target=self._listen, daemon=True).start()
        atexit.register(self.stop)

    def _count(self):
        for tick in itertools.count(1):
            with contextlib.suppress(RuntimeError):  # the store is gone: _listen hears nothing more
                self.store.set(self.names[self.own], str(tick))
                self.heard = self.store.multi_get(self.names)
            if self.end.wait(TICK):
                return

    def _listen(self):
        before, silent = self.heard, [0] * len(self.names)
        while not self.end.wait(TICK):
            heard = self.heard
            silent = [s + 1 if a == b else 0 for s, a, b in zip(silent, before, heard, strict=True)]
            before = heard
            lost = [r for r, s in enumerate(silent) if s >= SILENCE and heard[r] != b"left"]
            if lost and heard[0] != b"left":
                who = "all processes are" if self.own in lost else f"process {lost[0]} is"
                silence = f"{who} silent for {SILENCE * TICK:.0f} s: stopped, or out of reach"
                try:
                    print(f"{silence}; this one ends", file=sys.stderr, flush=True)
                finally:  # though nobody may be left to read it
                    _exit_now(1)

    def stop(self, word=None):
        """No more counting or listening; word "left": nor need the others listen to this process."""
        self.end.set()
        self.counting.join(TICK)
        if word and not self.counting.is_alive():
            with contextlib.suppress(RuntimeError):
                self.store.set(self.names[self.own], word)


def refuse(message, code=2):
    """End with one line and no traceback. All processes must come here together (see agree)."""
    if main_process() if dist.is_initialized() else _first():
        _complain(message)
    leave(code)


def leave(code=0):
    """Say goodbye to the other processes and exit with this code."""
    if _watch:
        _watch.stop("left")
    if dist.is_initialized():
        dist.destroy_process_group()
    raise SystemExit(code)


def agree(problem):
    """Refuse on every process if any of them passes a message instead of None."""
    if dist.is_initialized():
        problems = [None] * processes()
        dist.all_gather_object(problems, problem)
        problem = next((p for p in problems if p), None)
    if problem:
        refuse(problem)


def from_main(make):
    """Call make() on the main process and give its result to all; its SystemExit ends all."""
    if not dist.is_initialized():
        return make()
    box = [None, None]
    if main_process():
        try:
            box = [make(), None]
        except SystemExit as end:
            box = [None, end.code]
    dist.broadcast_object_list(box)
    if box[1] is not None:
        leave(box[1])
    return box[0]


def total(x):
    """Sum of x (any shape) over the processes; a new tensor, no gradient."""
    x = x.detach().clone()
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather(x, equal=False):
    """Concatenate x (n, ..) over the processes, whose n may differ; no gradient.

    equal: all bring as many rows (the parts of a batch), which saves asking how many.
    """
    x = x.detach().contiguous()
    if not dist.is_initialized():
        return x
    sizes = [len(x)] * processes()
    if not equal:
        dist.all_gather_object(sizes, len(x))
    padded = x.new_zeros(max(sizes), *x.shape[1:])
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(parts, padded)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])


class _GatherWithGradient(torch.autograd.Function):
    """The parts of all processes, one below the other; a part's gradient is the sum of what all found for it."""

    @staticmethod
    def forward(ctx, x):
        return gather(x, equal=True)

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient)[slice(*shard(len(gradient)))]


def gather_with_gradient(x):
    """gather(x, equal=True) with a gradient, for losses that compare images of different processes.

    Each process should average its own part of the loss, such as the pairs of its images with everyone's: the
    mean over processes, which parallel() takes of gradients, is then the gradient of the whole batch's loss.
    """
    return _GatherWithGradient.apply(x) if processes() > 1 else x


def shard(n):
    """(start, stop): the part of n things that this process owns; sizes differ by one at most."""
    return rank() * n // processes(), (rank() + 1) * n // processes()


def parallel(net, compiled=False):
    """The network with its gradients averaged over the processes; buffers follow process 0.

    compiled: by torch.compile, on the first batches it sees.
    """
    if compiled:
        say("compiling: the first steps may take a minute")
        net = torch.compile(net)
    if not dist.is_initialized() or not any(p.requires_grad for p in net.parameters()):
        return net
    device = next(net.parameters()).device
    return nn.parallel.DistributedDataParallel(net, [device.index] if device.type == "cuda" else None)


def to_device(net, device):
    """The network on the device, there in the memory layout that its convolutions like best."""
    return net.to(
        device, memory_format=torch.channels_last if device.type == "cuda" else torch.contiguous_format
    )


class _SumOverProcesses(torch.autograd.Function):
    """Sum of x over the processes; its gradient is the sum of theirs, as every one used the result."""

    @staticmethod
    def forward(ctx, x):
        return total(x)

    @staticmethod
    def backward(ctx, gradient):
        return total(gradient)


class _GlobalBatchNorm(nn.modules.batchnorm._BatchNorm):
    """Batch norm over the whole batch of all processes, on the CPU, where torch has none."""

    def _check_input_dim(self, x):  # (B, C) or (B, C, h, w)
        pass

    def forward(self, x):
        if not self.training:
            return super().forward(x)
        wide = x.to(self.running_mean.dtype)  # under autocast x may be bf16
        var, mean = (m.double() for m in torch.var_mean(wide, [0, *range(2, x.ndim)], correction=0))
        moments = _SumOverProcesses.apply(torch.stack([mean, var + mean**2])) / processes()  # (2, C)
        mean, var = moments[0], (moments[1] - moments[0] ** 2).clamp(min=0)
        with torch.no_grad():
            n = processes() * x[:, 0].numel()
            self.num_batches_tracked += 1
            self.running_mean.lerp_(mean.to(self.running_mean), self.momentum)
            self.running_var.lerp_((var * n / max(1, n - 1)).to(self.running_var), self.momentum)
        terms = (mean, (var + self.eps).rsqrt() * self.weight, self.bias)  # (C,) each
        mean, scale, shift = (t.to(wide).view(1, -1, *[1] * (x.ndim - 2)) for t in terms)
        return ((wide - mean) * scale + shift).to(x.dtype)


def synchronise(net):
    """Batch norm over the whole batch, not each process's part of it; equal parts are taken for granted.

    With it, images that are alike for any number of processes give gradients that are, too.
    """
    if processes() == 1:
        return net
    if next(net.parameters()).is_cuda:
        return nn.SyncBatchNorm.convert_sync_batchnorm(net)
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.__class__ = _GlobalBatchNorm  # the same weights and buffers, another forward
    return net


def share_buffers(net):
    """Copy process 0's buffers (batch-norm statistics) to all, before features are computed."""
    if dist.is_initialized():
        for buffer in net.buffers():
            dist.broadcast(buffer, 0)


_signal = None


def _remember_signal(number, _frame):
    global _signal
    if _signal:  # asked twice: go at once
        os._exit(128 + number)
    _signal = number


_before_leaving = []


def before_leaving(save):
    """What to call if a signal comes outside of a training step (see leave_if_asked)."""
    _before_leaving[:] = [save]


def _exit_now(code):
    """End at once, from any thread, and the loader's processes with this one."""
    with contextlib.suppress(ValueError):  # only the main thread may; it is also the one that would be told
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    try:
        for child in multiprocessing.active_children():
            child.kill()
    finally:
        os._exit(code)


def leave_if_asked():
    """Leave now if a signal came; for phases that are done again from their start, like clustering."""
    if _signal:
        for save in _before_leaving:
            save()
        say(
            f"stopped by signal {_signal} between steps; what was done before is saved, the same command (without"
            " --overwrite) does this part again"
        )
        _exit_now(128 + _signal)


LATE = {"cuda"}  # devices on which heartbeat reads a step's numbers one step later
_underway = None  # a function that waits for those of the last step and returns them


def _read_later(values):
    """Start copying the device's numbers; the function returned waits until they are here."""
    here, arrived = values.to("cpu", non_blocking=True), torch.cuda.Event()
    arrived.record()
    return lambda: arrived.synchronize() or here.tolist()


def heartbeat(loss, *others):
    """One small collective per step: (mean loss over the processes, means of the others, signal number or 0).

    loss, others: scalar tensors. Every process gets the same answer, so all stop together: with exit
    code 1 if any loss is NaN or infinite. On the CPU that is before the optimiser has touched the weights. A GPU's
    numbers are those of the call before (0 in the first), so that it always has a step to do; overdue() adds the
    last ones, or stops, before anything is saved.
    """
    global _underway
    values = torch.stack([x.detach().float() for x in (loss, *others)])
    if values.device.type not in LATE:
        return _compared(values.tolist())
    before, _underway = _underway, _read_later(values)
    return _compared(before() if before else [0.0] * len(values))


def overdue(sums):
    """sums, a list, with the means that heartbeat has not returned yet; at the end of an epoch or of its part."""
    global _underway
    before, _underway = _underway, None
    means = _compared(before())[: len(sums)] if before else [0.0] * len(sums)
    return [a + b for a, b in zip(sums, means, strict=True)]


def _compared(values):
    """(means of the values over the processes, the largest signal number), the same everywhere."""
    beat = torch.zeros(processes(), len(values) + 1, dtype=torch.float64)
    beat[rank()] = torch.tensor([*values, _signal or 0], dtype=torch.float64)
    beat = total(beat)
    means = beat[:, :-1].mean(0).tolist()
    if not math.isfinite(means[0]):
        refuse(f"the loss is {means[0]}: stopped, what was saved is as it was. Lower --lr?", 1)
    return *means, int(beat[:, -1].max().item())


def stop(signal, save, where):
    """Save and leave after a signal that heartbeat told of; all processes come here together."""
    save()
    say(f"stopped by signal {signal} after {where}; saved, the same command (without --overwrite) goes on")
    leave(128 + signal)


def generator(*key):
    """A CPU random generator that depends on the key alone, e.g. (seed, epoch, step, "flip").

    Nothing random is drawn from anywhere else (seed_all and seed_step seed torch's own generators by
    keys, too), so there is no random state to save, and images, crops and starting points are the same
    on 1 or 8 processes, on the CPU or a GPU.
    """
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def seed_all(*key):
    """Seed torch's global generators from the key alone, on all processes alike (initial weights)."""
    seed = generator(*key).initial_seed()
    torch.default_generator.manual_seed(seed)  # torch.manual_seed costs 0.3 ms more, every step
    if torch.cuda.is_available():
        torch.cuda.manual_seed_all(seed)


def learning_rate(lr, epoch, steps, factor=0.1):
    """lr, times `factor` at each of the epochs `steps`; epoch: those done, 0, 1, .."""
    return lr * factor ** sum(epoch >= s for s in steps)


def seed_step(seed, epoch, step):
    """Seed torch's global generators for one step, on every process differently (dropout)."""
    seed_all(seed, epoch, step, rank())


# --------------------------------------------------------------------------- data


@dataclass
class Images:
    """One split: pixels in memory, or paths to files. Labels are for reporting only."""

    name: str
    pixels: torch.Tensor | None  # (N, C, H, W) uint8, on the run's device
    paths: list | None  # N file names
    labels: torch.Tensor | None  # (N,) int64 on the CPU
    classes: list
    mean: tuple  # C numbers in 0..1
    std: tuple

    def __len__(self):
        return len(self.pixels if self.paths is None else self.paths)

    @property
    def channels(self):
        return len(self.mean)

    def title(self, i):
        return str(i) if self.paths is None else self.paths[i]


def default_data():
    """data/imagenet where that folder is, else the digits that come with scikit-learn."""
    return "data/imagenet" if os.path.isdir("data/imagenet") else "digits"


def load_data(name, root="data", device="cpu"):
    """(train, test) as Images; test is None where the data has none.

    name: one of DATASETS, or a folder: `train/` and `val/` (or `test/`), each an ImageFolder; or one
    ImageFolder (classes are its sub-folders); or a folder of unlabelled images.
    Ends with exit code 2 for an unknown name, a missing or empty folder, or classes that differ.
    """
    if name in DATASETS:
        # One process per machine downloads; the others wait for it.
        local_main = int(os.environ.get("LOCAL_RANK", 0)) == 0
        splits, problem = None, None
        for turn in (True, False):
            if local_main == turn and not problem:
                try:
                    splits = _torchvision_arrays(name, root, download=turn)
                except Exception as error:
                    problem = (
                        f"--data {name}: not found under {root!r} and not downloadable ({_short(error)})"
                    )
            agree(problem)
        mean = splits[0][0].mean((0, 2, 3)) / 255
        std = np.maximum(splits[0][0].std((0, 2, 3)) / 255, 1e-3)
        return tuple(
            Images(
                name,
                torch.from_numpy(pixels).to(device),
                None,
                torch.from_numpy(labels),
                classes,
                tuple(mean.tolist()),
                tuple(std.tolist()),
            )
            for pixels, labels, classes in splits
        )
    train = test = problem = None
    try:
        train, test = _folder_splits(name)
    except ValueError as error:
        problem = str(error)
    except OSError as error:  # even is_dir() raises where a parent may not be searched
        problem = f"--data {name}: cannot read it ({_short(error)})"
    agree(problem)
    return train, test


def _short(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:150]


def _torchvision_arrays(name, root, download):
    """[(pixels (N, C, H, W) uint8, labels (N,) int64, class names)] for train and test."""
    if name == "digits":
        return _digits()
    sets = torchvision.datasets
    if name in ("mnist", "fashionmnist"):
        make = sets.MNIST if name == "mnist" else sets.FashionMNIST
        both = [make(root, train=t, download=download) for t in (True, False)]
        return [(d.data.numpy()[:, None], d.targets.numpy(), list(d.classes)) for d in both]
    if name == "cifar10":
        both = [sets.CIFAR10(root, train=t, download=download) for t in (True, False)]
        return [(d.data.transpose(0, 3, 1, 2).copy(), np.array(d.targets), list(d.classes)) for d in both]
    if name == "cifar100-20":
        both = [sets.CIFAR100(root, train=t, download=download) for t in (True, False)]
        result = []
        for d in both:
            fine = np.array(d.targets)
            coarse = np.array(CIFAR100_SUPERCLASS)[fine]
            result.append((d.data.transpose(0, 3, 1, 2).copy(), coarse, [str(i) for i in range(20)]))
        return result
    make, part = (sets.SVHN, "labels") if name == "svhn" else (sets.STL10, "labels")
    both = [make(root, split=s, download=download) for s in ("train", "test")]
    classes = [str(i) for i in range(10)]
    return [(np.ascontiguousarray(d.data), getattr(d, part).astype(np.int64), classes) for d in both]


# The superclass (0..19) of each of CIFAR-100's fine classes in alphabetical order, from the list of
# superclasses that Krizhevsky published with the data.
CIFAR100_SUPERCLASS = [  # fmt: skip
    4, 1, 14, 8, 0, 6, 7, 7, 18, 3, 3, 14, 9, 18, 7, 11, 3, 9, 7, 11, 6, 11, 5, 10, 7,
    6, 13, 15, 3, 15, 0, 11, 1, 10, 12, 14, 16, 9, 11, 5, 5, 19, 8, 8, 15, 13, 14, 17, 18, 10,
    16, 4, 17, 4, 2, 0, 17, 4, 18, 17, 10, 3, 2, 12, 12, 16, 12, 1, 9, 19, 2, 10, 0, 1, 16,
    12, 9, 13, 15, 13, 16, 19, 2, 4, 6, 19, 5, 5, 8, 19, 18, 1, 2, 15, 6, 0, 17, 8, 14, 13,
]  # fmt: skip


def _digits():
    """scikit-learn's 1,797 handwritten digits, 8x8 in 17 greys, enlarged once to 32x32; 1437 / 360."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    small = torch.from_numpy(images.reshape(-1, 1, 8, 8)).float() * (255 / 16)
    large = F.interpolate(small, size=32, mode="bilinear", align_corners=False).round()
    order = torch.randperm(len(large), generator=generator("digits"))
    pixels, labels = large.to(torch.uint8)[order].numpy(), labels.astype(np.int64)[order.numpy()]
    classes = [str(i) for i in range(10)]
    return [(pixels[:1437], labels[:1437], classes), (pixels[1437:], labels[1437:], classes)]


def _folder_splits(name):
    folder = Path(name)
    if not folder.is_dir():
        raise ValueError(f"--data {name}: no such folder, and not one of {', '.join(DATASETS)}")
    if not (folder / "train").is_dir():
        return _folder(name, folder), None
    train = _folder(name, folder / "train")
    held = next((folder / s for s in ("val", "test") if (folder / s).is_dir()), None)
    test = None if held is None else _folder(name, held)
    if test is not None and train.classes and test.classes and train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        where = ", ".join(f"{c} only in {'train' if c in train.classes else held.name}" for c in odd[:5])
        raise ValueError(f"--data {name}: train and {held.name} have different classes: {where}")
    return train, test


def _folder(name, folder):
    """Images of one folder: labelled by sub-folder, unless images lie directly inside it."""

    def listing(at):
        try:
            return sorted(e for e in at.iterdir() if not e.name.startswith("."))
        except OSError as error:
            raise ValueError(f"--data {name}: cannot read {at}: {error.strerror}") from None

    def images_below(at):
        for entry in listing(at):
            if entry.is_dir():
                if not entry.is_symlink():  # a link to a parent would never end
                    yield from images_below(entry)
            elif entry.suffix.lower() in IMAGE_SUFFIXES:
                yield str(entry)

    entries = listing(folder)
    flat = any(e.suffix.lower() in IMAGE_SUFFIXES and not e.is_dir() for e in entries)
    classes = [] if flat else [e.name for e in entries if e.is_dir()]
    paths, labels = list(images_below(folder)) if flat else [], []
    for label, c in enumerate(classes):
        found = list(images_below(folder / c))
        paths += found
        labels += [label] * len(found)
    if not paths:
        raise ValueError(
            f"--data {name}: no images in {folder} (looked for {' '.join(sorted(IMAGE_SUFFIXES))})"
        )
    labels = torch.tensor(labels, dtype=torch.int64) if classes else None
    return Images(name, None, paths, labels, classes, IMAGENET_MEAN, IMAGENET_STD)


def open_image(path, side=0):
    """Decode a file to an RGB PIL image; 16-bit and float greys are scaled to 0..255, not clipped.

    side: a JPEG may come at 1/2, 1/4 or 1/8 of its size, its shorter side not below this many pixels: a photograph
    of 12 million pixels in a fraction of the time. 0: as it is.
    Pillow, not torchvision.io: on damaged PNG files the latter takes the process down.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):  # a named pipe would be waited for
        raise OSError("not a regular file")
    with warnings.catch_warnings(), Image.open(path) as image:
        warnings.simplefilter("ignore")
        if side:
            image.draft(None, (side, side))  # other formats ignore it
        image.load()
        if image.mode.startswith("I") or image.mode == "F":
            grey = np.nan_to_num(np.asarray(image, dtype=np.float64), posinf=0, neginf=0)
            top = grey.max(initial=0)
            sixteen = image.mode.startswith("I;16") or top > 255
            scale = 255 / 65535 if sixteen else 255 if image.mode == "F" and top <= 1 else 1
            image = Image.fromarray(np.clip(grey * scale, 0, 255).astype(np.uint8), "L")
        return image.convert("RGB")


class _Files(torch.utils.data.Dataset):
    """What a loader worker runs: one file to uint8 crops. Keys carry the index and its random numbers."""

    def __init__(self, paths, make, side):
        self.paths, self.make, self.side = paths, make, side

    def __getitem__(self, key):
        i, random = key
        bad = []
        for k in range(min(100, len(self.paths))):  # an unreadable file is replaced by the next one
            j = (i + k) % len(self.paths)
            try:
                return i, self.make(open_image(self.paths[j], self.side), random), bad
            except Exception as error:
                bad.append((j, _short(error)))
        return (
            i,
            self.make(Image.new("RGB", (64, 64)), random),
            bad,
        )  # black: a hundred in a row could not be read


def _collate(items):
    index, views, bad = zip(*items, strict=True)
    return torch.tensor(index), [torch.stack(v) for v in zip(*views, strict=True)], sum(bad, [])


def _ignore_signals(_worker):
    """A signal to the whole process group is for the training process: it still needs its workers."""
    for name in SIGNALS:
        signal.signal(name, signal.SIG_IGN)


def _to_tensor(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)


class Loader:
    """Batches of a split, from memory or from files; the image's index never leaves its side."""

    def __init__(self, data, batch_size, size, resize, device, workers=4, seed=0, max_bad=100):
        self.data, self.batch_size, self.size, self.resize = data, batch_size, size, resize
        self.device, self.workers, self.seed, self.max_bad = device, workers, seed, max_bad
        self.bad = {}  # index -> why the file could not be read
        if batch_size % processes():
            refuse(f"--batch-size {batch_size} is no multiple of the {processes()} processes")
        self.mean = torch.tensor(data.mean, device=device).view(-1, 1, 1)
        self.std = torch.tensor(data.std, device=device).view(-1, 1, 1)

    def steps(self, order=None):
        """Whole batches in an epoch; the images left over wait for another epoch's order."""
        return len(self.data if order is None else order) // self.batch_size

    def epoch(self, epoch, views, order=None, start=0, stop=None):
        """Yield (index (b,), [one (b, C, S, S) normalised float tensor per View, S its size or the loader's]).

        order: (M,) dataset positions to visit, default a shuffle of all; start, stop: steps start .. stop - 1.
        The random numbers of the whole batch are drawn on the CPU, then cut to this process's part:
        one row per image and view, whatever the number of processes or workers.
        """
        if order is None:
            order = torch.randperm(len(self.data), generator=generator(self.seed, epoch, "order"))
        first, last = shard(self.batch_size)

        def draw(step):
            index = order[step * self.batch_size : (step + 1) * self.batch_size][first:last]
            gens = [generator(self.seed, epoch, step, "view", v) for v in range(len(views))]
            rows = [torch.rand(self.batch_size, RANDOM, generator=g)[first:last] for g in gens]
            return index, rows, [torch.randperm(4, generator=g).tolist() for g in gens]

        steps = range(start, self.steps(order) if stop is None else stop)
        if self.data.paths is None:
            for index, rows, turns in map(draw, steps):
                raw = self.data.pixels[index.to(self.device, non_blocking=True)]
                images = [geometry(raw, v, r, v.size or self.size) for v, r in zip(views, rows, strict=True)]
                yield index, self._finish(images, views, rows, turns)
            return

        def make(image, rows):
            pairs = zip(views, map(torch.from_numpy, rows), strict=True)
            return [_pil_geometry(image, v, r, v.size or self.size) for v, r in pairs]

        def keys():
            for index, rows, _ in map(draw, steps):
                rows = [r.numpy() for r in rows]  # as tensors, each would travel through a file of its own
                yield [(i, r) for i, *r in zip(index.tolist(), *rows, strict=True)]

        files = self._files(make, keys(), least_side(views, self.size))
        for step, (index, images) in zip(steps, files, strict=True):
            _, rows, turns = draw(step)
            yield index, self._finish([x.float().div_(255) for x in images], views, rows, turns)
        self.check_files()

    def _finish(self, images, views, rows, turns):
        rows = [r.to(self.device, non_blocking=True) for r in rows]
        quadruples = zip(images, views, rows, turns, strict=True)
        return [colour(*q).sub_(self.mean).div_(self.std) for q in quadruples]

    def fixed(self, index, ten=False, batch_size=None):
        """Yield (index (b,), crops (b, n, C, S, S)) over the given positions, in their order.

        n = 1: the centre crop; ten: the corners and the centre, then their mirror images. The
        shorter side is `resize` first. Every process passes its own index, no batch is left out.
        """
        size = batch_size or max(1, self.batch_size // processes())
        parts = index.split(size) if len(index) else []
        if self.data.paths is None:
            there = ((i, i.to(self.device, non_blocking=True)) for i in parts)
            batches = ((i, fixed_crops(self._resized(self.data.pixels[j]), self.size, ten)) for i, j in there)
        else:

            def make(image, _):
                side = self.resize / min(image.size)
                wanted = [max(self.size, round(n * side)) for n in image.size]
                small = image.resize(wanted, Image.Resampling.BILINEAR)
                return [fixed_crops(_to_tensor(small)[None], self.size, ten)[0]]

            keys = [[(i, None) for i in part.tolist()] for part in parts]
            batches = self._files(make, keys, 2 * self.resize)
            batches = ((i, x[0].float().div_(255)) for i, x in batches)
        for i, crops in batches:
            crops = torch.cat([crops, crops.flip(-1)], 1) if ten else crops
            yield i, crops.sub_(self.mean).div_(self.std)

    def _resized(self, pixels):
        x, (h, w) = pixels.float().div_(255), pixels.shape[2:]
        if min(h, w) == self.resize:
            return x
        side = self.resize / min(h, w)
        wanted = [max(self.size, round(n * side)) for n in (h, w)]
        down, across = (resizing(n, m, x.device) for n, m in zip((h, w), wanted, strict=True))
        return (down @ x @ across.T).clamp_(0, 1)

    def _files(self, make, keys, side):
        workers = self.workers if sys.platform == "linux" else 0  # elsewhere, forking is not safe
        loader = torch.utils.data.DataLoader(
            _Files(self.data.paths, make, side),
            batch_sampler=keys,
            num_workers=workers,
            collate_fn=_collate,
            worker_init_fn=_ignore_signals,
            pin_memory=self.device.type == "cuda",
            multiprocessing_context="fork" if workers else None,
        )
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)  # until the workers ignore them
        batches = iter(loader)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)
        # After an exception, whose traceback holds the iterator, nobody else ends the workers: they ignore signals.
        end = getattr(batches, "_shutdown_workers", lambda: None)
        atexit.register(end)
        try:
            for index, images, bad in batches:
                for j, why in bad:
                    if j not in self.bad:
                        print(
                            f"unreadable image {self.data.paths[j]!r} ({why}): the next one stands in",
                            flush=True,
                        )
                    self.bad[j] = why
                yield index, [x.to(self.device, non_blocking=True) for x in images]
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            _complain(
                f"a process that decodes images died, for lack of memory perhaps ({_short(error)});"
                " the same command goes on from the checkpoint"
            )
            _exit_now(1)
        finally:
            atexit.unregister(end)
            end()

    def check_files(self):
        """Refuse, on all processes, when more than max_bad files could not be read."""
        count = len(set(gather(torch.tensor(sorted(self.bad), dtype=torch.int64)).tolist()))
        if count and count == len(self.data):
            refuse(f"none of the {count} image files of {self.data.name} could be read")
        if count > self.max_bad:
            refuse(f"{count} image files could not be read, more than --max-bad {self.max_bad}")
        return count


def default_resize(size):
    """Shorter side before the centre crop: 256 for 224, and nothing to cut off small images."""
    return size if size <= 64 else round(size * 256 / 224)


# --------------------------------------------------------------------------- augmentation
# A batch at a time on any device, but image by image its own numbers: row i of `random` (b, RANDOM)
# in 0..1 decides everything about image i. torchvision's v2 transforms give a whole batch one crop.

RANDOM = 36  # 0-21 crop, 22 flip, 23 jitter or not, 24-27 its strengths, 28 grey, 29-30 blur, 31 solarise, rest spare


@dataclass(frozen=True)
class View:
    """How one view of an image is drawn; probabilities and ranges as in torchvision's transforms."""

    area: tuple = (0.08, 1.0)  # share of the image a random resized crop keeps
    ratio: tuple = (3 / 4, 4 / 3)  # width / height of the crop
    flip: float = 0.5
    pad: int = 0  # pixels; > 0: pad and crop at random instead of a resized crop (CIFAR)
    square: float = 0.0  # > 0: a random square, this share of the shorter side, instead (AlexNet: 224 / 256)
    jitter: tuple = (0.0, 0.0, 0.0, 0.0)  # brightness, contrast, saturation, hue
    jitter_p: float = 1.0
    grey: float = 0.0
    blur: float = 0.0
    sigma: tuple = (0.1, 2.0)
    solarise: float = 0.0
    size: int = 0  # pixels; > 0: side of the result, instead of the loader's (small crops)


def crop_boxes(random, height, width, area, ratio):
    """(b, 4) integer boxes top, left, height, width from (b, 22) numbers in 0..1 on the CPU.

    torchvision's RandomResizedCrop: ten tries at an area and a log-uniform ratio, the first that
    fits counts; if none does, the largest centred box within the ratios.
    """
    random = np.asarray(random, dtype=np.float64)  # numpy: a third of torch's time for so few numbers
    stretch = np.exp((math.log(ratio[0]) + random[:, 10:20] * math.log(ratio[1] / ratio[0])) / 2)
    side = np.sqrt(height * width * (area[0] + random[:, :10] * (area[1] - area[0])))
    w, h = np.rint(side * stretch), np.rint(side / stretch)  # (b, 10) tries
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = np.arange(len(random)), fits.argmax(1)
    found = fits[first]
    image_ratio = width / height
    w = np.where(found, w[first], width if image_ratio <= ratio[1] else round(height * ratio[1]))
    h = np.where(found, h[first], height if image_ratio >= ratio[0] else round(width / ratio[0]))
    top = np.where(found, random[:, 20] * (height - h + 1), (height - h) / 2)
    left = np.where(found, random[:, 21] * (width - w + 1), (width - w) / 2)
    return torch.from_numpy(np.stack([top, left, h, w], 1).astype(np.int64))  # cut down to whole pixels


def view_boxes(view, random, height, width):
    """(b, 4) boxes of a view's crops of images without padding; random (b, RANDOM) on the CPU."""
    if not view.square:
        return crop_boxes(random[:, :22], height, width, view.area, view.ratio)
    side = max(1, round(view.square * min(height, width)))
    top, left = ((random[:, 20 + i] * (n - side + 1)).floor().long() for i, n in enumerate((height, width)))
    return torch.stack([top, left, torch.full_like(top, side), torch.full_like(top, side)], 1)


def least_side(views, size):
    """Shorter side in pixels of an image that is enough for the smallest crop by any of the views; 0: all it has."""
    if any(v.pad for v in views):
        return 0
    shares = [v.square or (v.area[0] * min(v.ratio[0], 1 / v.ratio[1])) ** 0.5 for v in views]
    return max(math.ceil((v.size or size) / share) for v, share in zip(views, shares, strict=True))


def crop_resize(images, boxes, flip, size):
    """Cut box i out of image i, resize it to size x size, mirror it where flip: (b, C, size, size).

    images (b, C, H, W) float, boxes (b, 4), flip (b,) bool. Bilinear without antialiasing; samples
    stay inside the crop, as if it had been cut out first.
    """
    height, width = images.shape[2:]
    top, left, h, w = boxes.to(images.dtype).unbind(1)
    unit = (torch.arange(size, device=images.device, dtype=images.dtype) + 0.5) / size  # pixel centres
    across = torch.where(flip[:, None], 1 - unit, unit)  # (b, size)
    y = (top[:, None] + h[:, None] * unit - 0.5).clamp(top[:, None], (top + h - 1)[:, None])
    x = (left[:, None] + w[:, None] * across - 0.5).clamp(left[:, None], (left + w - 1)[:, None])
    y, x = (2 * y + 1) / height - 1, (2 * x + 1) / width - 1  # grid_sample's -1..1
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], -1)
    return F.grid_sample(images, grid, mode="bilinear", padding_mode="border", align_corners=False)


def geometry(pixels, view, random, size):
    """Random crop and flip of uint8 (b, C, H, W) pixels: (b, C, size, size) float in 0..1.

    random (b, RANDOM) lies on the CPU, so that rounding gives the same boxes for every device.
    """
    images = pixels.float().div_(255)
    flip = (random[:, 22] < view.flip).to(pixels.device, non_blocking=True)
    if view.pad:
        images = F.pad(images, [view.pad] * 4)
        top, left = ((random[:, 20 + i] * (images.shape[2 + i] - size + 1)).floor().long() for i in (0, 1))
        boxes = torch.stack([top, left, torch.full_like(top, size), torch.full_like(top, size)], 1)
    else:
        boxes = view_boxes(view, random, *images.shape[2:])
    return crop_resize(images, boxes.to(images.device, non_blocking=True), flip, size)


def _pil_geometry(image, view, random, size):
    """The same for one PIL image, antialiased: uint8 (3, size, size)."""
    if view.pad:
        x = geometry(_to_tensor(image)[None], view, random[None], size)[0]
        return (x * 255).round().to(torch.uint8)
    top, left, h, w = view_boxes(view, random[None], image.height, image.width)[0].tolist()
    cut = image.resize((size, size), Image.Resampling.BILINEAR, box=(left, top, left + w, top + h))
    x = _to_tensor(cut)
    return x.flip(-1) if random[22] < view.flip else x


def colour(images, view, random, turns):
    """Jitter, grey, blur and solarise (b, C, S, S) images in 0..1, each image with its own numbers.

    turns: the order of brightness, contrast, saturation and hue, one for the batch.
    """

    def chosen(column, p):
        return (random[:, column] < p).view(-1, 1, 1, 1)

    if any(view.jitter):
        b, c, s, h = view.jitter
        strength = [1 + m * (2 * random[:, 24 + i] - 1) for i, m in enumerate((b, c, s))]
        strength.append(h * (2 * random[:, 27] - 1))
        changed = images
        for t in turns:
            if view.jitter[t]:
                changed = JITTER[t](changed, strength[t].view(-1, 1, 1, 1))
        images = torch.where(chosen(23, view.jitter_p), changed, images)
    if view.grey and images.shape[1] == 3:
        images = torch.where(chosen(28, view.grey), luminance(images), images)
    if view.blur:
        sigma = view.sigma[0] + random[:, 30] * (view.sigma[1] - view.sigma[0])
        images = torch.where(chosen(29, view.blur), blur(images, sigma), images)
    if view.solarise:
        images = torch.where(chosen(31, view.solarise) & (images >= 0.5), 1 - images, images)
    return images


def luminance(images):
    """(b, 3, S, S) -> (b, 1, S, S): ITU-R 601 grey; a grey image is its own."""
    if images.shape[1] == 1:
        return images
    r, g, b = images.split(1, 1)
    return 0.2989 * r + 0.587 * g + 0.114 * b


def brightness(images, factor):
    return (images * factor).clamp(0, 1)


def contrast(images, factor):
    mean = luminance(images).mean((2, 3), keepdim=True)
    return (images * factor + mean * (1 - factor)).clamp(0, 1)


def saturation(images, factor):
    if images.shape[1] == 1:
        return images
    return (images * factor + luminance(images) * (1 - factor)).clamp(0, 1)


def hue(images, shift):
    """Turn the hue by `shift` (-0.5..0.5 of the circle) through HSV; grey images stay as they are."""
    if images.shape[1] == 1:
        return images
    r, g, b = images.split(1, 1)
    top, spread = (
        images.amax(1, keepdim=True),
        images.amax(1, keepdim=True) - images.amin(1, keepdim=True),
    )
    safe = torch.where(spread > 0, spread, torch.ones_like(spread))
    sector = torch.where(
        top == r, (g - b) / safe, torch.where(top == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    )
    k = torch.cat([sector + turn + 6 * shift for turn in (5, 3, 1)], 1) % 6  # (b, 3, S, S)
    return top - spread * torch.minimum(k, 4 - k).clamp(0, 1)


JITTER = [brightness, contrast, saturation, hue]


def blur(images, sigma):
    """Gaussian blur, standard deviation sigma (b,) pixels; the kernel spans a tenth of the image [SimCLR]."""
    b, c, _, size = images.shape
    half = max(1, size // 20)
    offset = torch.arange(-half, half + 1, device=images.device, dtype=images.dtype)
    kernel = torch.exp(-0.5 * (offset / sigma[:, None]) ** 2)
    kernel = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, 0)[:, None]  # (b*c, 1, 2*half+1)
    x = F.pad(images, [half] * 4, mode="reflect").reshape(1, b * c, size + 2 * half, -1)
    x = F.conv2d(F.conv2d(x, kernel[:, :, :, None], groups=b * c), kernel[:, :, None], groups=b * c)
    return x.view(images.shape)


@functools.lru_cache
def resizing(n, wanted, device):
    """The matrix (wanted, n) that resizes a line of n pixels, bilinear and antialiased; for images down @ x @ across.T.

    F.interpolate gives the same, slower for small images on a CPU.
    """
    lines = torch.eye(n, device=device)[None, None]
    return F.interpolate(lines, (wanted, n), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def fixed_crops(images, size, ten=False):
    """(b, C, H, W) -> (b, n, C, size, size): the centre, or the four corners and the centre."""
    bottom, right = images.shape[2] - size, images.shape[3] - size
    at = [(round(bottom / 2), round(right / 2))]
    at = [(0, 0), (0, right), (bottom, 0), (bottom, right)] * ten + at
    return torch.stack([images[:, :, y : y + size, x : x + size] for y, x in at], 1)


# --------------------------------------------------------------------------- networks
# forward(images (B, C, S, S)) gives (B, net.dim) features: for lenet5, the AlexNets and vgg16 the last
# hidden linear layer before its ReLU, for ResNets the last map, flattened or (pool=True) averaged.
# net.stages names the modules whose output maps are worth probing.


class Sobel(nn.Module):
    """Grey = mean of the channels, then its two 3x3 derivatives: (B, C, S, S) -> (B, 2, S, S), frozen.

    Part of the network, so evaluation applies it too; its filters are no weights and are not saved.
    """

    def __init__(self):
        super().__init__()
        x = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
        self.register_buffer("filters", torch.stack([x, x.T])[:, None], persistent=False)

    def forward(self, images):
        return F.conv2d(images.mean(1, keepdim=True), self.filters, padding=1)


class PlainNet(nn.Module):
    """Convolutions (`features`), then hidden linear layers (`classifier`), both as torchvision names them."""

    def __init__(self, features, classifier, stages, channels, size, sobel):
        super().__init__()
        self.sobel = Sobel() if sobel else nn.Identity()
        self.features = nn.Sequential(*features)
        with torch.no_grad():
            self.features.eval()
            try:
                flat = self.features(torch.zeros(1, 2 if sobel else channels, size, size)).numel()
            except RuntimeError:
                refuse(f"--image-size {size} is too small for this --arch: nothing is left of the map")
        self.features.train()
        self.classifier = nn.Sequential(*classifier(flat))
        self.stages = {name: self.features[i] for name, i in stages.items()}
        self.dim = [m for m in self.classifier if isinstance(m, nn.Linear)][-1].out_features
        he_init(self)

    def maps(self, images):
        """The last map (B, C, h, w); what lies before it can be read off the stages."""
        return self.features(self.sobel(images))

    def forward(self, images):
        return self.classifier(self.maps(images).flatten(1))


class PoolShortcut(nn.Module):
    """A ResNet shortcut without weights: average pooling by the stride, zeros for the new channels.

    (B, C, h, w) -> (B, channels, ceil(h / stride), ceil(w / stride)) [LSD-C, code].
    """

    def __init__(self, channels, stride):
        super().__init__()
        self.channels, self.stride = channels, stride

    def forward(self, x):
        # ceil_mode: where the side is odd, as large as the convolution beside it makes it
        x = F.avg_pool2d(x, self.stride, ceil_mode=True)
        return F.pad(x, [0, 0, 0, 0, 0, self.channels - x.shape[1]])


class ResNet(torchvision.models.ResNet):
    """torchvision's ResNet without fc; small_stem: 3x3, no pooling, for small images; pool_shortcuts: PoolShortcut."""

    def __init__(self, block, layers, channels, size, sobel, pool, small_stem, pool_shortcuts):
        super().__init__(block, layers)
        del self.fc, self.avgpool
        width, cin = 512 * block.expansion, 2 if sobel else channels
        self.sobel, self.pool = Sobel() if sobel else nn.Identity(), pool
        self.small_stem, self.pool_shortcuts = small_stem, pool_shortcuts
        for module in list(self.modules()) if pool_shortcuts else []:
            if isinstance(module, block) and module.downsample:
                convolution = module.downsample[0]
                module.downsample = PoolShortcut(convolution.out_channels, convolution.stride[0])
        if small_stem:
            self.conv1, self.maxpool = nn.Conv2d(cin, 64, 3, padding=1, bias=False), nn.Identity()
        elif cin != 3:
            self.conv1 = nn.Conv2d(cin, 64, 7, stride=2, padding=3, bias=False)
        self.stages = {"stem": self.maxpool}
        self.stages |= {f"layer{i}": getattr(self, f"layer{i}") for i in (1, 2, 3, 4)}
        side = math.ceil(size / (8 if small_stem else 32))
        self.dim = width if pool else width * side * side
        he_init(self)

    def maps(self, images):
        """The last map (B, C, h, w); what lies before it can be read off the stages."""
        x = self.maxpool(self.relu(self.bn1(self.conv1(self.sobel(images)))))
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))

    def forward(self, images):
        x = self.maps(images)
        return x.mean((2, 3)) if self.pool else x.flatten(1)


class Embedding(nn.Module):
    """ReLU, a linear layer, unit length: features (B, D) -> (B, dim) float32; here, for load_backbone makes it anew."""

    def __init__(self, features, dim):
        super().__init__()
        self.linear = nn.Linear(features, dim)

    def forward(self, x):
        return unit(self.linear(F.relu(x)).float())


def he_init(net):
    """Convolutions N(0, sqrt(2 / (k*k*out))), linear layers N(0, 0.01), biases 0 [as DeepCluster's code]."""
    for m in net.modules():
        if isinstance(m, nn.Conv2d):
            nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")
        if isinstance(m, nn.Linear):
            nn.init.normal_(m.weight, 0, 0.01)
        if isinstance(m, (nn.Conv2d, nn.Linear)) and m.bias is not None:
            nn.init.zeros_(m.bias)


def _convolutions(plan, cin):
    """plan: (out, kernel, stride, padding) or ("pool", kernel, stride); -> modules, stage positions."""
    modules, ends = [], []
    for step in plan:
        if step[0] == "pool":
            modules.append(nn.MaxPool2d(*step[1:]))
            continue
        out, *rest = step
        modules += [nn.Conv2d(cin, out, *rest), nn.BatchNorm2d(out), nn.ReLU(inplace=True)]
        ends.append(len(modules) - 1)
        cin = out
    return modules, ends


def backbone(
    arch,
    channels=3,
    size=224,
    sobel=False,
    dropout=0.5,
    pool=False,
    norm=False,
    small_stem=None,
    pool_shortcuts=False,
):
    """A network without its head: .dim features per image, .stages to probe.

    channels: of the images; sobel: filter them first; dropout: of the hidden linear layers;
    pool: ResNets average the last map instead of flattening it; norm: batch norm before the ReLUs of
    the hidden linear layers, too, which then start as PyTorch starts them: what is scaled to a given
    size afterwards turns the faster, the smaller its weights, and N(0, 0.01) is very small. small_stem:
    ResNets start with a 3x3 convolution and no pooling; by default up to 64 pixels. pool_shortcuts: theirs
    have no weights (PoolShortcut).
    """
    cin = 2 if sobel else channels

    def hidden(first, second, before=True, between=True):
        """Dropout where told, even if it is 0: the names of the weights must not depend on it."""

        def make(flat):
            start, middle = [nn.Dropout(dropout)] * before, [nn.Dropout(dropout)] * between
            relu, end = nn.ReLU(inplace=True), [nn.BatchNorm1d(second)] * norm
            if norm:  # in the ReLU's place, so that the linear layers keep their names
                relu = nn.Sequential(nn.BatchNorm1d(first), relu)
            return [*start, nn.Linear(flat, first), relu, *middle, nn.Linear(first, second), *end]

        return make

    if arch == "lenet5":  # LeCun et al. 1998, with batch norm and max-pooling
        modules, ends = _convolutions([(6, 5), ("pool", 2, 2), (16, 5), ("pool", 2, 2)], cin)
        tail = hidden(120, 84, before=False, between=False)
    elif (
        arch == "alexnet"
    ):  # Krizhevsky et al. 2012 without groups and LRN, with batch norm [DeepCluster 3.4]
        plan = [(96, 11, 4, 2), ("pool", 3, 2), (256, 5, 1, 2), ("pool", 3, 2)]
        plan += [(384, 3, 1, 1), (384, 3, 1, 1), (256, 3, 1, 1), ("pool", 3, 2)]
        modules, ends = _convolutions(plan, cin)
        tail = hidden(4096, 4096)
    elif (
        arch == "alexnet-small"
    ):  # Deep Dive 3.3; kernels, pools and hidden layers are not printed; 2048 as in its code
        plan = [(48, 3, 1, 1), ("pool", 2, 2), (126, 3, 1, 1), ("pool", 2, 2)]
        plan += [(192, 3, 1, 1), (192, 3, 1, 1), (128, 3, 1, 1)]
        modules, ends = _convolutions(plan, cin)
        tail = hidden(2048, 2048)
    elif arch == "vgg16":  # torchvision's vgg16_bn, key for key
        plan = []
        for out, repeat in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
            plan += [(out, 3, 1, 1)] * repeat + [("pool", 2, 2)]
        modules, ends = _convolutions(plan, cin)
        ends = [ends[i] for i in (1, 3, 6, 9, 12)]
        tail = hidden(4096, 4096, before=False)
    elif arch in ("resnet18", "resnet50"):
        blocks = torchvision.models.resnet
        block, layers = (
            (blocks.BasicBlock, [2] * 4) if arch == "resnet18" else (blocks.Bottleneck, [3, 4, 6, 3])
        )
        small_stem = size <= 64 if small_stem is None else small_stem
        return ResNet(block, layers, channels, size, sobel, pool, small_stem, pool_shortcuts)
    else:
        refuse(f"--arch {arch} is unknown; choose one of {', '.join(ARCHS)}")
    stages = {f"conv{i + 1}": end for i, end in enumerate(ends)}
    net = PlainNet(modules, tail, stages, channels, size, sobel)
    net.norm = norm
    for layer in net.modules() if norm else []:
        if isinstance(layer, nn.Linear):
            layer.reset_parameters()
    return net


@torch.no_grad()
def fill_batch_norm(net, images):
    """Batch-norm statistics of an untrained network from one batch of images; all processes do the same.

    As it comes, batch norm does nothing: maps shrink or grow from stage to stage, and at a fixed
    learning rate that alone costs linear probes points (86 instead of 96 % on the digits, lenet5 conv2).
    """
    for module in net.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0  # keep nothing of the 0 and 1 that are there
    net.train()
    net(images)


@torch.no_grad()
def extract(net, loader, index, amp=False, then=None):
    """Centre-crop features (n, D) float32 of this process's images `index`, in evaluation mode.

    then: applied to each batch as it comes (a projection, say), so that only its result is kept.
    """
    was_training, result, done = net.training, None, 0
    net.eval()
    for _, crops in loader.fixed(index):
        leave_if_asked()
        with torch.autocast(loader.device.type, torch.bfloat16, enabled=amp):
            features = net(crops[:, 0])
        features = features.float() if then is None else then(features.float())
        if result is None:  # all at once: a list of parts would leave holes of a batch's size between them
            result = features.new_empty(len(index), features.shape[1])
        result[done : done + len(features)] = features
        done += len(features)
    net.train(was_training)
    loader.check_files()
    if result is None:  # more processes than images
        none = torch.zeros(0, net.dim, device=loader.device)
        return none if then is None else then(none)
    return result


# --------------------------------------------------------------------------- faiss
# Every process brings its shard; what is found is the same for any number of processes.


def unit(x, eps=1e-12):
    """Rows of x with length 1; rows of zeros stay zeros."""
    return F.normalize(x, dim=1, eps=eps)


def nearest(queries, keys, k=1, inner=False):
    """The k nearest keys (M, D) of each query (n, D): (n, k) values, (n, k) int64 ids, best first.

    Squared Euclidean distance, or the inner product if inner. Exact, float32. faiss on the CPU and,
    where its GPU build sees this device, on the GPU (k <= 2048 there); else chunks of a torch product.
    """
    n, k = len(queries), min(k, len(keys))
    queries, keys = queries.float().contiguous(), keys.float().contiguous()
    if n == 0:
        return queries.new_zeros(0, k), torch.zeros(0, k, dtype=torch.int64, device=queries.device)
    metric = faiss.METRIC_INNER_PRODUCT if inner else faiss.METRIC_L2
    if not queries.is_cuda:
        values, ids = faiss.knn(queries.numpy(), keys.numpy(), k, metric=metric)
        return torch.from_numpy(values), torch.from_numpy(ids)
    if (
        k <= 2048 and getattr(faiss, "get_num_gpus", lambda: 0)() > 0
    ):  # knn_gpu aborts the process without one
        importlib.import_module("faiss.contrib.torch_utils")  # teaches faiss torch's tensors
        if not hasattr(nearest, "resources"):
            nearest.resources = faiss.StandardGpuResources()
        return faiss.knn_gpu(nearest.resources, queries, keys, k, metric=metric, device=queries.device.index)
    found, chunk = [], max(1, 2**27 // len(keys))  # at most 512 MiB of similarities at a time
    key_norms = keys.square().sum(1)
    for q in queries.split(chunk):
        score = q @ keys.T if inner else 2 * (q @ keys.T) - key_norms
        value, ids = score.topk(k, 1)
        found.append((value if inner else (q.square().sum(1, keepdim=True) - value).clamp(min=0), ids))
    return torch.cat([f[0] for f in found]), torch.cat([f[1] for f in found])


def check_finite(x):
    """ValueError on all processes if one of them has NaN or infinite features."""
    ends = torch.stack(x.aminmax()) if len(x) else x.new_zeros(2)  # they show in the extremes
    if total((~ends.isfinite().all()).int()) > 0:
        raise ValueError("the features to cluster hold NaN or infinite values; lower --lr?")


@contextlib.contextmanager
def finite_or_leave():
    """Features that kmeans, pca or check_finite refuse end the run with one line and code 1, on all processes alike."""
    try:
        yield
    except ValueError as error:
        refuse(f"{error}", 1)


def pca(x, p):
    """Mean (D,) and whitening matrix (D, p) of the rows x (n, D) of all processes: V / sqrt(lambda).

    Covariance in double precision; eigenvalues are floored at 1e-6 of the largest, so dead features
    and fewer rows than columns stay finite (faiss's own PCAMatrix gives NaN there). p is cut to D.
    Over 8192 columns the p leading axes come from a block power iteration instead.
    Raises ValueError if x has NaN or infinite entries on any process.
    """
    check_finite(x)
    columns, p = x.shape[1], min(p, x.shape[1])
    count = total(torch.tensor(len(x), dtype=torch.float64, device=x.device)).clamp(min=1)
    mean = (
        total(
            sum(
                (c.double().sum(0) for c in x.split(4096)),
                x.new_zeros(columns, dtype=torch.float64),
            )
        )
        / count
    )

    def covariance_times(q=None):
        width = columns if q is None else q.shape[1]
        result = torch.zeros(columns, width, dtype=torch.float64, device=x.device)
        for c in x.split(4096):
            c = c.double() - mean
            result += c.T @ (c if q is None else c @ q)
        return total(result) / count

    if columns <= 8192:
        covariance = covariance_times()
        if x.is_cuda:
            values, axes = torch.linalg.eigh(covariance)
        else:  # LAPACK through scipy finds the p largest alone, several times as fast
            from scipy.linalg import eigh

            values, axes = map(
                torch.from_numpy,
                eigh(covariance.numpy(), subset_by_index=[columns - p, columns - 1]),
            )
        values, axes = values[-p:].flip(0), axes[:, -p:].flip(1)
    else:
        q = torch.randn(columns, min(columns, p + 32), dtype=torch.float64, generator=generator("pca")).to(
            x.device
        )
        for _ in range(10):
            q = torch.linalg.qr(covariance_times(q))[0]
        values, small = torch.linalg.eigh(q.T @ covariance_times(q))
        values, axes = values[-p:].flip(0), (q @ small)[:, -p:].flip(1)
    values = values.clamp(min=0)
    floor = 1e-6 * values[0] + 1e-12
    # Which way an axis points is arbitrary: let its largest entry be positive, on every machine.
    axes = axes * axes.gather(0, axes.abs().argmax(0, keepdim=True)).sign()
    return mean.float(), (axes / values.clamp(min=floor).sqrt()).float()


def whiten(x, mean, axes):
    """z = V^T (x - mean) / sqrt(lambda), then unit length: (n, D) -> (n, p)."""
    return unit((x - mean) @ axes)


@dataclass
class Clusters:
    assign: torch.Tensor  # (n,) int64: cluster of each of this process's rows; some ids may never occur
    centroids: torch.Tensor  # (K, D), the same on all processes
    distance: torch.Tensor  # (n,) squared distance to the own centroid
    objective: float  # mean of the squared distances over all N rows
    iterations: int  # done; fewer than asked for if nothing changed any more


def kmeans(x, k, iterations=20, gen=None):
    """Lloyd's k-means of the rows x (n, D) of all processes, as DeepCluster ran it with faiss.

    The rows of k different images start as centroids, drawn by `gen`. An empty cluster k takes half of a donor j,
    chosen with probability proportional to n_j - 1: both get j's centroid, even coordinates of one
    times 1 + 1/1024 and odd ones times 1 - 1/1024, the other one the other way round. The repair
    comes before the last assignment, so clusters may still be empty at the end.
    Raises ValueError if k exceeds the number of rows or x has NaN or infinite entries anywhere.
    """
    gen = gen or generator(0, "kmeans")
    sizes = [len(x)] if processes() == 1 else gather(torch.tensor([len(x)])).tolist()
    n, first = sum(sizes), sum(sizes[: rank()])
    if not 1 <= k <= n:
        raise ValueError(f"k = {k} clusters for {n} images: k must lie in 1..{n}")
    check_finite(x)
    start = torch.randperm(n, generator=gen)[:k]
    mine = (start >= first) & (start < first + len(x))
    centroids = x.new_zeros(k, x.shape[1])
    centroids[mine.to(x.device)] = x[(start[mine] - first).to(x.device)]
    centroids = total(centroids)  # each row comes from the one process that owns it
    own = torch.zeros(k, x.shape[1], dtype=torch.float64, device=x.device)  # sums of this process's rows
    before, done = None, 0
    for _ in range(iterations):
        leave_if_asked()
        done += 1
        assign = nearest(x, centroids)[1][:, 0]
        moved = torch.arange(len(x), device=x.device)
        moved = moved if before is None else moved[assign != before]
        for part in moved.split(2048):  # the others are in the sums already
            rows = x[part].double()
            own.index_add_(0, assign[part], rows)
            if before is not None:
                own.index_add_(0, before[part], rows, alpha=-1)
        counts = torch.cat([torch.bincount(assign, minlength=k), moved.new_tensor([len(moved)])])
        sums, counts, before = total(own), total(counts), assign
        counts, changed = counts[:-1], counts[-1]
        if changed == 0 and counts.min() > 0:  # converged: more iterations would change nothing
            break
        centroids = torch.where(counts[:, None] > 0, sums / counts.clamp(min=1)[:, None], centroids).float()
        split_empty(centroids, counts.double().cpu(), gen)
    distance, assign = nearest(x, centroids)
    objective = total(distance.double().sum()).item() / n
    return Clusters(assign[:, 0], centroids, distance[:, 0], objective, done)


def split_empty(centroids, counts, gen, eps=1 / 1024):
    """Give every empty cluster half of a larger one; centroids (K, D) and counts (K,) change in place."""
    sign = 1 + eps * (1 - 2 * (torch.arange(centroids.shape[1], device=centroids.device) % 2))  # 1+e, 1-e, ..
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        odds = (counts - 1).clamp(min=0)
        if odds.sum() == 0:  # as many clusters as images: nobody has one to give
            return
        donor = torch.multinomial(odds, 1, generator=gen).item()
        centroids[empty], centroids[donor] = centroids[donor] * sign, centroids[donor] * (2 - sign)
        counts[empty] = counts[donor] / 2
        counts[donor] -= counts[empty]


# --------------------------------------------------------------------------- metrics


def nmi(a, b):
    """Normalised mutual information I(A;B) / sqrt(H(A) H(B)) of two labelings (N,) [DeepCluster 4.1].

    The geometric mean, as in the paper; libraries default to the arithmetic one today. In 0..1; one
    cluster on both sides counts as 1, on one side as 0.
    """
    from sklearn.metrics import normalized_mutual_info_score

    return float(normalized_mutual_info_score(np.asarray(a), np.asarray(b), average_method="geometric"))


def ari(a, b):
    """Adjusted Rand index of two labelings (N,): 1 equal, 0 as by chance."""
    from sklearn.metrics import adjusted_rand_score

    return float(adjusted_rand_score(np.asarray(a), np.asarray(b)))


def matched(table):
    """[(class, cluster)] of a confusion matrix: one to one, so that as many images as possible are in such pairs.

    table (classes, K) counts images; classes come in their order.
    """
    from scipy.optimize import linear_sum_assignment

    return [tuple(map(int, pair)) for pair in zip(*linear_sum_assignment(table, maximize=True), strict=True)]


def clustering_accuracy(labels, assign):
    """Share of images right under the best one-to-one matching of clusters to classes, in 0..1.

    labels, assign (N,) integers; their numbers may differ, what has no partner is wrong.
    """
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(np.asarray(labels), np.asarray(assign))
    return float(sum(table[pair] for pair in matched(table)) / table.sum())


def label_scores(labels, assign):
    """{nmi_labels, acc_labels, ari_labels} of an assignment (N,); nothing without labels."""
    if labels is None:
        return {}
    acc = clustering_accuracy(labels, assign)
    return {"nmi_labels": nmi(labels, assign), "acc_labels": acc, "ari_labels": ari(labels, assign)}


def percent(found):
    """What label_scores found, as text: ACC 93.1 NMI .. ARI .., in %."""
    names = {"acc_labels": "ACC", "nmi_labels": "NMI", "ari_labels": "ARI"}
    return " ".join(f"{title} {100 * found[name]:.1f}" for name, title in names.items() if name in found)


def knn_predict(queries, bank, labels, k=200, temperature=0.07, classes=None):
    """Class (n,) of each query by its k nearest rows of the bank, weighted exp(cosine / 0.07) [Wu et al.].

    queries (n, D), bank (N, D), labels (N,) of the bank; k is cut to N. Several k: a list of classes.
    """
    labels, ks = labels.to(queries.device), [k] if isinstance(k, int) else k
    similarity, ids = nearest(unit(queries), unit(bank), max(ks), inner=True)
    weight = ((similarity - similarity[:, :1]) / temperature).exp()  # a common factor changes nothing
    votes = [weight.new_zeros(len(queries), classes or int(labels.max()) + 1) for _ in ks]
    votes = [v.scatter_add_(1, labels[ids[:, :j]], weight[:, :j]) for v, j in zip(votes, ks, strict=True)]
    found = [v.argmax(1) for v in votes]
    return found[0] if isinstance(k, int) else found


def knn_accuracy(queries, target, bank, labels, classes, ks=(1, 200)):
    """{"1": .., "200": ..}, the share of queries whose class knn_predict finds, over all processes.

    queries (n, D) and target (n,) of this process; bank (N, D) and labels (N,) the same on all.
    """
    found = knn_predict(queries, bank, labels, ks, classes=classes)
    right = [(p == target.to(p)).sum() for p in found]
    *right, n = total(torch.stack([*right, torch.tensor(len(target)).to(queries.device)])).tolist()
    return {str(k): r / n for k, r in zip(ks, right, strict=True)}


def cluster_sizes(assign, k):
    """{clusters, empty, smallest, largest, largest_share} of an assignment (N,) to k clusters; the smallest
    of those that are not empty."""
    counts = torch.bincount(assign.cpu(), minlength=k)
    largest = int(counts.max())
    return {
        "clusters": int((counts > 0).sum()),
        "empty": int((counts == 0).sum()),
        "smallest": int(counts[counts > 0].min()),
        "largest": largest,
        "largest_share": largest / len(assign),
    }


def warn_if_few(n, k):
    """Say so if k clusters of n images are smaller than ten on average."""
    if n < 10 * k:
        say(f"WARNING: --k {k} for {n} images is {n / k:.3g} in a cluster")


def warn_if_trivial(sizes):
    """Say so when one cluster holds most of the images; sizes as from cluster_sizes."""
    if sizes["largest_share"] > 0.5:
        say(f"WARNING: one cluster holds {sizes['largest_share']:.0%} of all images: a trivial solution")


# --------------------------------------------------------------------------- run folder

FILES = ["log.jsonl", "checkpoint.pt", "checkpoint.prev.pt", "backbone.pt"]
FILES += ["checkpoint.damaged.pt", "assignments.csv", "clusters.png"]
FILES += ["rotnet.pt", "confusion.json", "confusion.png"]  # lsdc.py's
NOT_COMPARED = {"out", "overwrite", "workers", "device", "save_every", "root", "max_bad"}


def say(*words):
    """Print on the main process only."""
    if main_process():
        print(*words, flush=True)


def progress(items, length, text):
    """A bar while iterating, on a terminal and on the main process only."""
    hidden = not (main_process() and sys.stderr.isatty())
    return tqdm(items, text, length, leave=False, disable=hidden, dynamic_ncols=True)


@contextlib.contextmanager
def though_the_disk_be_full(path):
    """A file that cannot be written is told of and does not end the run."""
    try:
        yield
    except OSError as error:
        print(f"could not write {path} ({_short(error)}); the run goes on", file=sys.stderr, flush=True)


def commit():
    """The short commit of the checkout that this file lies in, "+" if tracked files were changed; None without git."""
    here = {"cwd": Path(__file__).parent, "capture_output": True, "text": True, "timeout": 10}
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        name = subprocess.run(["git", "rev-parse", "--short", "HEAD"], check=True, **here).stdout.strip()
        changed = subprocess.run(["git", "diff", "--quiet", "HEAD", "--"], **here).returncode
        return f"{name}+" if changed else name


def hardware(device):
    """In words, for logs: the GPUs' name, else the processor's, and how many of them this machine shows."""
    if device.type == "cuda":
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        name = next(x.split(":")[1].strip() for x in file if x.startswith("model name"))
    return f"{os.cpu_count()} cores of {name}, no GPU"


def what_runs(args, device):
    """Command, all arguments, versions, device and number of processes, for a log's first record."""
    versions = {m.__name__: m.__version__ for m in (torch, torchvision, faiss, np)}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return {
        "command": " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]),
        "args": vars(args),
        "commit": commit(),
        "versions": {"python": sys.version.split()[0], **versions},
        "hardware": hardware(device),
        "device": name,
        "processes": processes(),
        "threads": torch.get_num_threads(),
    }


def unwritable(folder):
    """Make the folder; None, or what to tell its owner if nothing can be written there."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
        probe = Path(folder) / f".write-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        return f"--out {folder}: cannot write there ({error.strerror})"


def _plain(value):
    """The same with NaN and infinity, which JSON does not have, as None."""
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def shaped(x, *shape):
    """The tensor x, if this is its shape; else ValueError, for a checkpoint that is not this run's."""
    if tuple(x.shape) != shape:
        raise ValueError(f"a tensor of shape {tuple(x.shape)} instead of {shape}")
    return x


class Run:
    """The run folder: log.jsonl, the checkpoint, and what else a run leaves behind."""

    def __init__(self, args, data=None, may_differ=()):
        """Open args.out. self.state is the checkpoint to go on from, or None for a fresh start.

        Refuses (exit code 2) a folder that cannot be written, that another run is writing to, or whose
        checkpoint came from other arguments or images; names what differs. may_differ: names that need
        not agree.
        """
        self.out, self.unsaved, self.script = Path(args.out), False, Path(sys.argv[0]).name
        config = {k: v for k, v in vars(args).items() if k not in NOT_COMPARED and k not in may_differ}
        self.config = json.loads(json.dumps(config))
        if data is not None:  # a folder may have got more images since
            names = "\n".join(data.paths or ()).encode(errors="surrogateescape")
            self.config |= {
                "images": len(data),
                "file_names": hashlib.blake2b(names, digest_size=4).hexdigest(),
            }
        self.state = from_main(lambda: self._open(args))
        self.began = time.time() - 60 * (self.state["minutes"] if self.state else 0)

    def minutes(self):
        """Time the run has taken, what was done before a resume included."""
        return (time.time() - self.began) / 60

    def _open(self, args):
        if problem := unwritable(self.out):
            self._refuse(problem)
        self._lock(120 if restarted() else 0)
        for path in [*self.out.glob("*.pt.tmp"), *self.out.glob("*.pt.old")]:  # of a save that was killed
            path.unlink(missing_ok=True)
        if args.overwrite and not restarted():  # or a restart would throw away what it is to save
            for path in [*map(self.out.joinpath, FILES), *self.out.glob("eval_linear-*.json")]:
                path.unlink(missing_ok=True)
        state = load_checkpoint(self.out)
        if state is not None:
            old = state["config"]
            known = [k for k in {**old, **self.config} if k in old or k not in ("images", "file_names")]
            odd = [k for k in known if old.get(k, "unset") != self.config.get(k, "unset")]
            if odd:
                told = {k: f"{k} {old.get(k)} -> {self.config.get(k)}" for k in odd}
                told |= {"file_names": "other file names"} if "file_names" in odd else {}
                what = ", ".join(told[k] for k in sorted(odd)[:8])
                what += f", and {len(odd) - 8} more" if len(odd) > 8 else ""
                by = f" of {state['script']}" if state.get("script", self.script) != self.script else ""
                self._refuse(
                    f"--out {self.out} holds another run{by} ({what}); use another --out, or --overwrite"
                )
            if state.get("processes", processes()) != processes():
                many = "processes" if processes() > 1 else "process"
                print(
                    f"{processes()} {many} now, {state['processes']} before: the same images in the same steps, but sums "
                    "round differently, and dropout and a process's own batch norm see other parts of the batch",
                    flush=True,
                )
        log = self.out / "log.jsonl"
        if log.exists():  # forget what was logged after the checkpoint: it is about to happen again
            os.truncate(log, min(log.stat().st_size, state["log_bytes"] if state else 0))
        return state

    def _lock(self, patience):
        """Keep other runs out for as long as this process lives, however it ends; patience in seconds."""
        try:
            self.lock = open(self.out / ".lock", "a")  # noqa: SIM115
            while True:
                try:
                    return fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                except (BlockingIOError, PermissionError):  # a lost machine's lock may last a while
                    if patience <= 0:
                        raise
                time.sleep(1)
                patience -= 1
        except (BlockingIOError, PermissionError):
            self._refuse(
                f"--out {self.out}: another run is writing there just now (or remove .lock if a lost machine"
                " holds it); use another --out"
            )
        except OSError:
            pass  # a file system without locks

    def _refuse(self, message):  # on the main process alone: from_main carries the exit to the others
        _complain(message)
        raise SystemExit(2)

    def log(self, record):
        """Append one JSON object to log.jsonl; NaN is written as null."""
        if main_process():
            path = self.out / "log.jsonl"
            with though_the_disk_be_full(path), open(path, "a") as file:
                file.write(json.dumps(_plain(record)) + "\n")

    def first_record(self, args, device, data):
        """What ran: the command, all arguments, versions, device and data."""
        about = {"name": data.name, "images": len(data), "classes": len(data.classes)}
        self.log({**what_runs(args, device), "data": about})

    def save(self, state):
        """Write the checkpoint: whole or not at all, the one before kept as checkpoint.prev.pt."""
        if main_process():
            log = self.out / "log.jsonl"
            state = {
                **state,
                "script": self.script,
                "config": self.config,
                "processes": processes(),
                "log_bytes": log.stat().st_size if log.exists() else 0,
                "minutes": self.minutes(),
            }
            self.unsaved = not save_file(self.out / "checkpoint.pt", state, keep="checkpoint.prev.pt")

    @contextlib.contextmanager
    def restoring(self):
        """What is taken from self.state in here must fit; if it does not, one line and exit code 2."""
        try:
            yield
            problem = None
        except (torch.OutOfMemoryError, getattr(torch, "AcceleratorError", torch.OutOfMemoryError)):
            raise  # the machine's fault, not the file's
        except (KeyError, IndexError, TypeError, ValueError, RuntimeError, AttributeError) as error:
            why = f"{type(error).__name__}: {_short(error)}"
            problem = (
                f"{self.out}/checkpoint.pt does not fit this {self.script}, another version's perhaps ({why}); "
                "use another --out, or --overwrite"
            )
        agree(problem)

    def finish(self):
        """Exit code 1 if the last checkpoint could not be written; all processes leave together."""
        leave(1 if from_main(lambda: self.unsaved) else 0)


def save_file(path, state, keep=None):
    """torch.save that survives a kill at any moment; False (and a line) if the disk refuses.

    keep: the name under which the file that was there before stays available.
    """
    path, temporary = Path(path), Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            torch.save(state, file)
            file.flush()
            os.fsync(file.fileno())
        if keep and path.exists():
            shutil.copyfile(path, f"{path}.old") if not _link(path, f"{path}.old") else None
            os.replace(f"{path}.old", path.with_name(keep))
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
        return True
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        full = "; is the disk full?" if isinstance(error, RuntimeError) else ""
        print(f"could not save {path} ({_short(error)}{full}); the run goes on", file=sys.stderr, flush=True)
        return False


def _link(old, new):
    with contextlib.suppress(OSError):
        Path(new).unlink(missing_ok=True)
        os.link(old, new)
        return True
    return False


def load_file(path):
    """torch.load for tensors, numbers, strings, lists and dicts; ValueError if the file is damaged.

    Checks every zip checksum first (torch does not: flipped bits would become wrong weights), and
    never unpickles anything but plain data.
    """
    with open(path, "rb") as file:  # not to be read at all is another thing than to be damaged
        file.read(1)
    try:
        with zipfile.ZipFile(path) as archive:
            broken = archive.testzip()
        if broken:
            raise ValueError(f"checksum of {broken} is wrong")
        with warnings.catch_warnings():  # of TorchScript archives, which are refused
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:
        raise ValueError(f"{path} is damaged or not a checkpoint ({_short(error)})") from None


def load_checkpoint(folder):
    """The newest readable checkpoint of a run folder, or None; refuses if there are only damaged ones."""
    damaged = None
    for name in ("checkpoint.pt", "checkpoint.prev.pt"):
        path = Path(folder) / name
        if not path.exists():
            continue
        try:
            state = load_file(path)
            kinds = {"config": dict, "log_bytes": int, "minutes": (int, float)}
            if not isinstance(state, dict) or not all(isinstance(state.get(k), t) for k, t in kinds.items()):
                raise ValueError(f"{path} is not a checkpoint of these scripts")
            if damaged:
                print(f"{damaged}; going on from {name}", flush=True)
                # Out of the way, or the next save would keep it in place of the good one.
                os.replace(Path(folder) / "checkpoint.pt", Path(folder) / "checkpoint.damaged.pt")
            return state
        except ValueError as error:
            damaged = damaged or str(error)
        except OSError as error:
            _complain(f"cannot read {path} ({error.strerror})")
            raise SystemExit(2) from None
    if damaged:
        _complain(f"{damaged}; --overwrite starts afresh")
        raise SystemExit(2)
    return None


def save_backbone(path, net, arch, size, resize, sobel, data, method, embedding=None):
    """backbone.pt: {"state_dict": torchvision's key names, "meta": how to build and feed the network}.

    embedding: the linear layer that follows the ReLU of the network's features, if the method compares
    images by what comes out of it; saved beside them, {"embedding": {"weight", "bias"}}.
    """
    meta = {
        "arch": arch,
        "image_size": size,
        "resize": resize,
        "sobel": sobel,
        "method": method,
        "data": data.name,
    }
    meta |= {"channels": data.channels, "mean": list(data.mean), "std": list(data.std)}
    meta |= {"pool": getattr(net, "pool", False), "norm": getattr(net, "norm", False)}
    meta |= {name: getattr(net, name) for name in ("small_stem", "pool_shortcuts") if hasattr(net, name)}
    if main_process():
        # A loaded network carries its embedding with it, but the trunk is saved alone.
        parts = {"state_dict": net} | ({"embedding": embedding} if embedding is not None else {})
        saved = {
            name: {k: v.detach().cpu().clone() for k, v in part.state_dict().items() if "embedding." not in k}
            for name, part in parts.items()
        }
        return save_file(path, {**saved, "meta": meta})


def rebuild(meta, **changed):
    """The network that a backbone.pt's meta tells of, without its weights; changed: other options of backbone()."""
    shape = (meta["arch"], meta["channels"], meta["image_size"], meta["sobel"])
    kind = {name: bool(meta.get(name)) for name in ("pool", "norm", "pool_shortcuts")}
    return backbone(*shape, **{**kind, "small_stem": meta.get("small_stem"), **changed})


def load_backbone(path):
    """(network in evaluation mode, meta) from backbone.pt or a run folder; ValueError if it is neither.

    net.embedding: features (B, D) -> unit embeddings, where the method has them, else None.
    """
    path = Path(path)
    path = path / "backbone.pt" if path.is_dir() else path
    try:
        saved = load_file(path)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; give a run folder or a backbone.pt") from None
    except OSError as error:
        raise ValueError(f"cannot read {path} ({error.strerror})") from None
    if not isinstance(saved, dict) or not {"state_dict", "meta"} <= set(saved):
        raise ValueError(f"{path} is no backbone.pt (it lacks state_dict and meta)")
    meta = saved["meta"]
    missing = {"arch", "channels", "image_size", "sobel", "mean", "std", "data", "method"} - set(meta)
    if missing or meta["arch"] not in ARCHS:
        raise ValueError(f"{path}: its network cannot be rebuilt, meta lacks {missing or 'a known arch'}")
    if "resize" not in meta and meta.get("center_fraction"):  # as deepcluster.py says it
        meta["resize"] = round(meta["image_size"] / meta["center_fraction"])
    net = rebuild(meta)
    try:
        net.load_state_dict(saved["state_dict"])
        net.embedding = None
        if "embedding" in saved:
            if not isinstance(saved["embedding"], dict):
                raise TypeError("its embedding is no dictionary")
            net.embedding = Embedding(net.dim, len(saved["embedding"]["bias"]))
            net.embedding.linear.load_state_dict(saved["embedding"])
    except (RuntimeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: weights do not fit {meta['arch']} ({_short(error)})") from None
    return net.eval(), meta


def save_assignments(path, data, assign):
    """assignments.csv: image (path, or index for named sets), cluster."""
    if main_process():
        utf8 = {"newline": "", "encoding": "utf-8", "errors": "surrogateescape"}
        with though_the_disk_be_full(path), open(path, "w", **utf8) as file:
            writer = csv.writer(file)
            writer.writerow(["image", "cluster"])
            writer.writerows((data.title(i), c) for i, c in enumerate(assign.tolist()))


def save_pictures(path, loader, assign, distance, rows=10, columns=10):
    """clusters.png: for up to `rows` clusters spread over all, the images nearest to the centroid.

    assign, distance (N,) of the whole dataset; without distances, the first ones. Rows go by size, from the largest cluster down.
    """
    if not main_process():
        return
    distance = torch.zeros(len(assign)) if distance is None else distance
    counts = torch.bincount(assign)
    wanted = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
    wanted = wanted[torch.linspace(0, len(wanted) - 1, min(rows, len(wanted))).round().long()]
    say(f"rows of {path}, from the top: clusters {', '.join(map(str, wanted.tolist()))}")
    tiles = []
    for c in wanted.tolist():
        members = (assign == c).nonzero()[:, 0]
        best = members[distance[members].argsort(stable=True)][:columns]
        crops = torch.cat([x[:, 0] for _, x in loader.fixed(best)]) * loader.std + loader.mean
        tiles.append(torch.cat([crops.cpu(), torch.ones(columns - len(best), *crops.shape[1:])]))
    tiles = torch.cat(tiles).clamp(0, 1)
    with though_the_disk_be_full(path):
        torchvision.utils.save_image(tiles, path, nrow=columns, padding=2, pad_value=1)
