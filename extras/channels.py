"""What the channels of a trained network respond to: first filters, an image made for a channel, images found.

DeepCluster (Caron et al., ECCV 2018), 4.2 with figures 3 to 5, as Yosinski et al., Understanding neural networks
through deep visualization, 2015: an image is changed until it activates one channel of a layer more than others.

    maps = relu(layer(images))                                        (B, D, h, w)
    response = mean over h, w of maps                                 (B, D)
    image of channel c, from small noise, --steps times:
        g = gradient of log softmax(response)_c                       (C, S, S)  c against the layer's other channels
        image = (1 - decay) image + step g / rms(g)                   every few steps blurred, kept in 0..1
    beside it the nine images of --data with the largest response_c

    python -m extras.channels runs/deepcluster-imagenet
    python -m extras.channels runs/coke-digits --layer 1 --channels 0 1 2

filters.png   of the first convolution; gray is 0. Behind a Sobel filter: as they act on the gray image, 2 pixels wider
channels.png  a row each of ten channels, or --channels, of the last convolution; channels-LAYER.png with --layer

Both lie in the run's folder. Start it in the folder where the run was started, or say with --data where images
are. One process, on a GPU where there is one.

What to expect: on a core, 7 s for CoKe's digits, whose second layer sees strokes of one direction; LeNet-5's first
layer sees mostly colors of photographs, and edges behind a Sobel filter. A step for ten channels of the last layer,
at 224 pixels, takes AlexNet 0.7 s and VGG-16 10 s: use a GPU for those.

Departs from the papers and DeepCluster's code, on purpose:
 1. The gradient is divided by its root mean square, not by its norm: a step is the same for all image sizes. Images
    stay in the range of real ones: what is shown is what the network sees. Steps, decay and blur are ours.
 2. Below zero ReLU has a slope of 0.01 in the gradient, so that a silent channel wakes (the code: no ReLU for it).
 3. The last convolution of a ResNet's block is taken before the shortcut is added.
"""

import argparse
import os
from pathlib import Path

from common import (  # isort: skip
    ARCHS, Loader, Meter, blur, draw, error, extract, generator, load_backbone, load_data, number, print_once,
    read_backbone, setup, to_device,
)  # fmt: skip

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from torch import nn
from torchvision.models.feature_extraction import create_feature_extractor
from torchvision.transforms.v2.functional import to_pil_image
from torchvision.utils import make_grid

STEP, DECAY = 0.2, 0.01  # of gradient ascent, in standard deviations of the pixels; share that a step forgets
SIGMA, EVERY = 1.0, 4  # of the blur, in pixels; steps from one blur to the next
BEST = 9  # images beside it

# %% the algorithm


def filter_images(weight, sobel=None):
    """Filters (D, C, k, k) as images in 0..1, a weight of 0 as 0.5; sobel (2, 1, 3, 3): filters before them."""
    if sobel is not None:
        weight = F.conv_transpose2d(weight, sobel)  # one filter of the gray image (D, 1, k + 2, k + 2)
    weight = weight[:, : 3 if weight.shape[1] > 2 else 1]
    return 0.5 + 0.5 * weight / weight.abs().amax((1, 2, 3), keepdim=True).clamp(min=1e-12)


def responses(maps, slope=0.0):
    """Mean over maps (B, D, h, w) after ReLU: (B, D); slope: that of ReLU below zero."""
    return F.leaky_relu(maps, slope).mean((2, 3))


def step_up(net, images, channels, step=STEP, decay=DECAY):
    """Images (B, C, S, S) a step on: each responds more with its own of `channels` (B,), against the others."""
    images = images.detach().requires_grad_()
    score = F.log_softmax(responses(net(images), 0.01), 1).gather(1, channels[:, None]).sum()
    gradient = torch.autograd.grad(score, images)[0]
    rms = gradient.square().mean((1, 2, 3), keepdim=True).sqrt()
    return (1 - decay) * images.detach() + step * gradient / rms.clamp(min=1e-12)


def ascend(net, images, channels, steps, low, high, every=EVERY):
    """Images (B, C, S, S) after so many steps in low..high (C, 1, 1), blurred `every` few, or never if 0."""
    sigma, meter = torch.full((len(images), 1, 1, 1), SIGMA, device=images.device), Meter("ascent", steps)
    for i in range(1, steps + 1):
        images = step_up(net, images, channels)
        if every and i % every == 0:
            images = blur(images, sigma)
        images = images.clamp(low, high)
        meter.add(1)
    meter.bar.close()
    return images


def strongest(scores, left_out=()):
    """Positions (BEST, c) of the largest scores (N, c), the largest first, without the positions left out."""
    scores = scores.index_fill(0, torch.tensor(sorted(left_out), dtype=torch.int64), -torch.inf)
    return scores.argsort(dim=0, descending=True, stable=True)[: min(BEST, len(scores) - len(left_out))]


# %% pictures


def find_layer(net, layer):
    """(name, number of channels) of a convolution, by torchvision's name or number from 1; None: the last."""
    known = {
        name: m for name, m in net.named_modules() if isinstance(m, nn.Conv2d) and "downsample" not in name
    }
    names = dict(enumerate(known, 1))
    name = names[len(known)] if layer is None else names.get(int(layer) if layer.isdecimal() else 0, layer)
    if name not in known:
        error(f"--layer {layer}: 1 to {len(known)}, or one of {', '.join(known)}")
    return name, known[name].out_channels


def layer_maps(backbone, layer):
    """A network: images -> {"maps": (B, D, h, w)} of a convolution after its batch norm, before its ReLU."""
    names = [name for name, _ in backbone.net.named_modules()]
    after = names[names.index(layer) + 1]
    return nn.Sequential(backbone.sobel, create_feature_extractor(backbone.net, {after: "maps"})).eval()


def draw_filters(path, filters):
    """Filters (D, C, k, k) in 0..1 in a square grid, enlarged, white between them."""
    zoom = max(1, 96 // filters.shape[2])
    large = filters.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3)
    to_pil_image(make_grid(large, nrow=int((len(filters) - 1) ** 0.5) + 1, padding=4, pad_value=1)).save(path)


def draw_channels(path, layer, rows):
    """Rows {channel: (image made for it (C, S, S), images found for it (n, C, S, S))} in 0..1."""
    figure = Figure(figsize=(BEST + 1, len(rows)))
    axes = figure.subplots(len(rows), squeeze=False)[:, 0]
    for axis, (channel, (made, found)) in zip(axes, rows.items(), strict=True):
        gap = made.new_ones(1, *made.shape)
        images = torch.cat([made[None], gap, found, *[gap] * (BEST - len(found))])
        images = images[:, : 3 if images.shape[1] > 2 else 1]  # of any number of channels
        axis.imshow(make_grid(images, nrow=BEST + 2, pad_value=1).permute(1, 2, 0).numpy())
        axis.set_ylabel(f"channel {channel}", rotation=0, ha="right", va="center")
        axis.set(xticks=[], yticks=[], frame_on=False)
    axes[0].set_title(f"{layer}: an image made for each channel, and those that activate it most", loc="left")
    figure.savefig(path, bbox_inches="tight")


def main(argv=None):
    more = {"description": "Channels in pictures", "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    p = argparse.ArgumentParser(prog="python -m extras.channels", **more)
    # fmt: off
    p.add_argument("run", metavar="RUN", help="run folder, backbone.pt or others' checkpoint")
    p.add_argument("--data", help="images among which to look; None: those of the run")
    p.add_argument("--root", default="data", help="where named data sets lie")
    p.add_argument("--layer", help="a convolution: its number, from 1, or torchvision's name; None: the last one")
    p.add_argument("--channels", type=number(int, 0), nargs="+", metavar="C", help="counted from 0; None: ten, evenly spread")
    p.add_argument("--steps", type=number(int, 0), default=300, help="of gradient ascent")
    p.add_argument("--workers", type=number(int, 0), default=min(8, os.cpu_count()), help="processes that decode files")
    # fmt: on
    args, device = p.parse_args(argv), setup()
    if (arch := read_backbone(args.run)["meta"]["arch"]) not in ARCHS:
        error(f"{args.run}: a network ({arch}) for vectors, not for images")
    backbone, meta = load_backbone(args.run)
    folder = Path(args.run) if os.path.isdir(args.run) else Path(args.run).parent
    first = next(m for m in backbone.net.modules() if isinstance(m, nn.Conv2d)).weight.detach()
    draw_filters(
        folder / "filters.png", filter_images(first, backbone.sobel.filters if meta["sobel"] else None)
    )

    layer, count = find_layer(backbone.net, args.layer)
    chosen = args.channels or torch.linspace(0, count - 1, min(10, count)).round().int().tolist()
    if max(chosen) >= count:
        error(f"--channels: {layer} has 0 to {count - 1}")
    net, channels = to_device(layer_maps(backbone, layer), device), torch.tensor(chosen, device=device)
    data = load_data(args.data or meta["data"], args.root, (meta["mean"], meta["std"]))[0]
    size = meta["image_size"]
    loader = Loader(data, 256, size, meta["center_fraction"], device, args.workers, training=False)
    score = extract(net, loader, torch.arange(len(data)), lambda x: responses(x["maps"])[:, channels])
    best = strongest(score.cpu(), data.unreadable)

    low, high = (-loader.mean / loader.std, (1 - loader.mean) / loader.std)
    noise = torch.randn(len(chosen), len(low), size, size, generator=generator("noise")).to(device) / 10
    made = ascend(lambda x: net(x)["maps"], noise, channels, args.steps, low, high)

    def shown(images):
        return (images * loader.std + loader.mean).clamp(0, 1).cpu()

    rows = {}
    for i, channel in enumerate(chosen):
        found = torch.cat([x for _, x in loader.test(best[:, i])])
        rows[channel] = shown(made[i]), shown(found)
    name = f"channels-{layer}.png" if args.layer else "channels.png"
    draw(draw_channels, folder / name, layer, rows)
    print_once(f"written: {folder}/filters.png and {folder}/{name} ({layer})")


if __name__ == "__main__":
    main()
