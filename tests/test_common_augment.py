"""common.py, augmentation: equal parameters give torchvision's result, image by image."""

import numpy as np
import pytest
import torch
from torchvision.transforms import RandomResizedCrop, v2
from torchvision.transforms.v2 import functional as V

import common
from common import RANDOM, View


def noise(b=6, c=3, h=37, w=46, seed=0):
    return torch.rand(b, c, h, w, generator=torch.Generator().manual_seed(seed))


def per_image(values):
    return torch.as_tensor(values, dtype=torch.float32).view(-1, 1, 1, 1)


def close(got, want, atol=1e-5):
    torch.testing.assert_close(got, want, atol=atol, rtol=0)


# --------------------------------------------------------------------------- geometry


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [16, 40])
def test_crop_resize_is_torchvisions_resized_crop(channels, size):
    """Cut, resize without antialiasing, mirror: equal to torchvision for the same boxes, up and down."""
    images = noise(7, channels)
    boxes = [
        (0, 0, 37, 46),
        (3, 5, 20, 11),
        (36, 45, 1, 1),
        (0, 40, 37, 6),
        (10, 0, 2, 46),
        (7, 9, 16, 16),
        (0, 0, 1, 46),
    ]
    flips = [False, True, True, True, False, True, False]
    got = common.crop_resize(images, torch.tensor(boxes), torch.tensor(flips), size)
    for i, (box, flip) in enumerate(zip(boxes, flips, strict=True)):
        want = V.resized_crop(images[i], *box, [size, size], antialias=False)
        close(got[i], V.horizontal_flip(want) if flip else want)


def test_crop_boxes_follow_torchvisions_distribution():
    """4000 draws: inside the image; area, ratio, width, place and share of fallbacks as RandomResizedCrop."""
    n, height, width, area, ratio = 4000, 60, 90, (0.2, 1.0), (3 / 4, 4 / 3)
    random = torch.rand(n, 22, generator=torch.Generator().manual_seed(1))
    boxes = common.crop_boxes(random, height, width, area, ratio)
    top, left, h, w = boxes.unbind(1)
    assert boxes.dtype == torch.int64 and boxes.shape == (n, 4)
    assert (top >= 0).all() and (left >= 0).all() and (h >= 1).all() and (w >= 1).all()
    assert (top + h <= height).all() and (left + w <= width).all()
    torch.manual_seed(2)
    image = torch.zeros(3, height, width)
    want = np.array([RandomResizedCrop.get_params(image, list(area), list(ratio)) for _ in range(n)])
    got = boxes.numpy()
    for name, f in {
        "area": lambda b: b[:, 2] * b[:, 3] / (height * width),
        "log ratio": lambda b: np.log(b[:, 3] / b[:, 2]),
        "width": lambda b: b[:, 3],
        "left": lambda b: b[:, 1],
        "top": lambda b: b[:, 0],
    }.items():
        a, b = f(got), f(want)
        error = np.sqrt((a.var() + b.var()) / n)
        assert abs(a.mean() - b.mean()) < 5 * error, name
        assert 0.85 < a.std() / b.std() < 1.15, name
    small = got[(got[:, 2] < 45) & (got[:, 3] < 60)]  # with room to move both ways
    assert len(small) > 500 and len(np.unique(small[:, 1])) > 30
    assert abs(np.corrcoef(small[:, 0], small[:, 1])[0, 1]) < 0.2, "top and left must be drawn apart"


def test_crop_boxes_at_the_edges():
    """Fallback boxes are torchvision's exactly; numbers next to 0 and 1 stay inside the image."""
    torch.manual_seed(0)
    for height, width in ((1, 400), (400, 1), (1, 1), (7, 300)):
        random = torch.rand(50, 22)
        want = RandomResizedCrop.get_params(torch.zeros(3, height, width), [0.9, 1.0], [3 / 4, 4 / 3])
        got = common.crop_boxes(random, height, width, (0.9, 1.0), (3 / 4, 4 / 3))
        assert got.unique(dim=0).tolist() == [list(want)], (height, width)
    for value in (0.0, 1 - 2**-24):
        for side in (33, 224, 257, 500):
            box = common.crop_boxes(torch.full((1, 22), value), side, side, (0.08, 1.0), (1, 1))[0].tolist()
            edge = round((0.08 * side * side) ** 0.5) if value == 0 else side
            assert box == [0, 0, edge, edge]
    random = torch.full((1, 22), 1 - 2**-24)
    random[:, :10] = 0
    top, left, h, w = common.crop_boxes(random, 257, 224, (0.08, 1.0), (1, 1))[0].tolist()
    assert (top + h, left + w) == (257, 224), "the last place must be reachable and not beyond"


@pytest.mark.parametrize("channels", [1, 3])
def test_pad_4_crop(channels):
    """Zero padding of 4, then every offset 0..8 in turn, mirrored or not: plain slices, exactly."""
    pixels = (noise(20, channels, 32, 32) * 255).round().to(torch.uint8)
    random = torch.rand(20, RANDOM, generator=torch.Generator().manual_seed(3))
    random[:2, 20:22] = torch.tensor([[0.0, 1 - 2**-24], [1 - 2**-24, 0.0]])
    got = common.geometry(pixels, View(pad=4), random, 32)
    padded = np.zeros((20, channels, 40, 40), np.float32)
    padded[:, :, 4:36, 4:36] = pixels.numpy() / 255
    for i in range(20):
        y, x = int(random[i, 20] * 9), int(random[i, 21] * 9)
        want = padded[i, :, y : y + 32, x : x + 32]
        close(got[i], torch.from_numpy(want[:, :, ::-1].copy() if random[i, 22] < 0.5 else want), 1e-5)
    flat = common.geometry(pixels, View(pad=4, flip=0), random, 32)
    mirrored = common.geometry(pixels, View(pad=4, flip=1), random, 32)
    assert torch.equal(flat.flip(-1), mirrored) or (flat.flip(-1) - mirrored).abs().max() < 1e-5


@pytest.mark.parametrize("height, width", [(32, 47), (47, 32), (32, 32)])
def test_squares_lie_anywhere_and_equally_often(height, width):
    """AlexNet's crop: 7/8 of the shorter side, every place as often as the others, down and across apart."""
    n, side = 8000, 28
    random = torch.rand(n, RANDOM, generator=torch.Generator().manual_seed(4))
    boxes = common.view_boxes(View(square=224 / 256), random, height, width)
    assert boxes.dtype == torch.int64 and boxes.shape == (n, 4)
    assert boxes[:, 2:].unique(dim=0).tolist() == [[side, side]]
    places = (height - side + 1) * (width - side + 1)  # 5 x 20, 20 x 5, 5 x 5
    found, count = boxes[:, :2].unique(dim=0, return_counts=True)
    assert found.min(0).values.tolist() == [0, 0] and len(found) == places
    assert found.max(0).values.tolist() == [height - side, width - side]
    surprise = ((count - n / places) ** 2 / (n / places)).sum().item()  # chi squared, places - 1 degrees
    assert surprise < places - 1 + 5 * (2 * (places - 1)) ** 0.5


def test_squares_at_the_edges():
    """Side: the share of the shorter side, rounded, one pixel at least; numbers next to 1 stay inside."""
    last = torch.full((1, RANDOM), 1 - 2**-24)
    for h, w, square, side in (
        (256, 341, 224 / 256, 224),
        (500, 375, 224 / 256, 328),
        (20, 30, 1.0, 20),
        (30, 20, 1.0, 20),
        (33, 9, 0.6, 5),
        (41, 30, 0.69, 21),
        (3, 400, 0.01, 1),
        (1, 1, 0.5, 1),
    ):
        view = View(square=square, area=(0.1, 0.2), ratio=(2, 3))  # area and ratio have no say
        assert common.view_boxes(view, 0 * last, h, w).tolist() == [[0, 0, side, side]]
        assert common.view_boxes(view, last, h, w).tolist() == [[h - side, w - side, side, side]]
    mixed = 0 * last
    mixed[:, 21] = 0.5
    assert common.view_boxes(View(square=0.5), mixed, 40, 60).tolist() == [[0, 20, 20, 20]]


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("size", [14, 28, 40])
def test_squares_in_memory_and_from_files(channels, size):
    """The square is cut out and resized, plainly in memory and by Pillow for files, mirrored or not."""
    from PIL import Image

    for h, w in ((32, 47), (47, 32)):
        pixels = (noise(20, channels, h, w) * 255).round().to(torch.uint8)
        random = torch.rand(20, RANDOM, generator=torch.Generator().manual_seed(size))
        view = View(square=224 / 256)
        got = common.geometry(pixels, view, random, size)
        assert got.shape == (20, channels, size, size)
        for i in range(20):
            y, x = int(random[i, 20] * (h - 27)), int(random[i, 21] * (w - 27))
            cut = pixels[i, :, y : y + 28, x : x + 28]
            mirror = V.horizontal_flip if random[i, 22] < 0.5 else lambda z: z
            close(got[i], mirror(V.resize(cut.float() / 255, [size, size], antialias=False)))
            if channels == 3:
                pil = Image.fromarray(pixels[i].permute(1, 2, 0).numpy())
                small = pil.crop((x, y, x + 28, y + 28)).resize((size, size), Image.Resampling.BILINEAR)
                want = mirror(torch.from_numpy(np.array(small)).permute(2, 0, 1))
                files = common._pil_geometry(pil, view, random[i], size)
                gap = (files.int() - want.int())[
                    :, 1:-1, 1:-1
                ]  # Pillow's filter may see past the square's edge
                assert files.dtype == torch.uint8 and gap.abs().max() <= 1


def test_memory_and_file_crops_agree():
    """The crop of a PIL image is that of the pixels in memory, up to antialiasing and rounding."""
    from PIL import Image

    smooth = torch.nn.functional.interpolate(noise(1, 3, 5, 5), size=64, mode="bicubic").clamp(0, 1)
    pixels = (smooth * 255).round().to(torch.uint8)
    pil = Image.fromarray(pixels[0].permute(1, 2, 0).numpy())
    for seed in range(10):
        random = torch.rand(1, RANDOM, generator=torch.Generator().manual_seed(seed))
        for view in (View(area=(0.3, 0.6)), View(pad=4)):
            size = 64 if view.pad else 32
            memory = common.geometry(pixels, view, random, size)[0]
            files = common._pil_geometry(pil, view, random[0], size)
            assert files.dtype == torch.uint8 and files.shape == (3, size, size)
            gap = (memory - files.float() / 255).abs()
            assert gap.max() < 0.05 and gap.mean() < 0.01, (seed, view, gap.max())


def test_fixed_crops_are_torchvisions():
    """Centre crop for even and odd margins; corners and centre with mirror images are ten_crop's ten."""
    for h, w in ((40, 52), (41, 37), (32, 33), (32, 32)):
        images = noise(2, 3, h, w)
        assert torch.equal(common.fixed_crops(images, 32)[:, 0], V.center_crop(images, [32, 32]))
        five = common.fixed_crops(images, 32, ten=True)
        assert torch.equal(five, torch.stack(V.five_crop(images, [32, 32]), 1))
    images = noise(2, 3, 40, 52)
    data = common.Images("x", (images * 255).to(torch.uint8), None, None, [], (0.0,) * 3, (1.0,) * 3)
    loader = common.Loader(data, 2, 32, 40, torch.device("cpu"))
    ((_, ten),) = loader.fixed(torch.arange(2), ten=True)
    want = torch.stack(V.ten_crop(data.pixels.float() / 255, [32, 32]), 1)
    for i in range(2):  # in any order
        assert sorted(x.sum().item() for x in ten[i]) == pytest.approx(
            sorted(x.sum().item() for x in want[i])
        )
        for a, b in ((ten[i], want[i]), (want[i], ten[i])):
            assert all(any((x - y).abs().max() < 1e-6 for y in b) for x in a)


# --------------------------------------------------------------------------- colour


@pytest.mark.parametrize(
    "ours, theirs, values",
    [
        (common.brightness, V.adjust_brightness, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (common.contrast, V.adjust_contrast, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (common.saturation, V.adjust_saturation, [0.0, 0.2, 0.7, 1.0, 1.4, 1.8]),
        (common.hue, V.adjust_hue, [-0.5, -0.21, 0.0, 0.1, 0.33, 0.5]),
    ],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_jitter_is_torchvisions(ours, theirs, values, channels):
    """Each image with its own strength; also greys, black, white, pure colours and one channel."""
    images = noise(6, channels)
    images[:, :, 0, :3] = torch.tensor([0.0, 1.0, 0.5])  # greys
    if channels == 3:
        images[:, :, 1, :6] = torch.tensor([[1, 1, 0, 0, 0, 1.0], [0, 1, 1, 1, 0, 0], [0, 0, 0, 1, 1, 1]])
    got = ours(images, per_image(values))
    for i, value in enumerate(values):
        close(got[i], theirs(images[i], value))
    if channels == 3 or ours in (common.brightness, common.contrast):
        assert (got[0] - images[0]).abs().max() > 0.1


def test_blur_is_torchvisions():
    """Gaussian blur with its own sigma per image; the kernel spans a tenth of the image, odd."""
    for size, kernel in ((32, 3), (96, 9), (60, 7)):
        images, sigma = noise(3, 3, size, size), [0.1, 0.9, 2.0]
        got = common.blur(images, torch.tensor(sigma))
        for i in range(3):
            close(got[i], V.gaussian_blur(images[i], [kernel, kernel], [sigma[i], sigma[i]]))
    close(
        common.blur(noise(2, 1, 32, 32), torch.tensor([1.0, 0.5]))[1],
        V.gaussian_blur(noise(2, 1, 32, 32)[1], 3, 0.5),
    )


def rows(b, **columns):
    """Random rows in which nothing happens (0.999) except the given columns."""
    random = torch.full((b, RANDOM), 0.999)
    for name, value in columns.items():
        random[:, int(name[1:])] = torch.as_tensor(value, dtype=torch.float32)
    return random


def test_grey_and_solarise():
    """Chosen images equal torchvision's grey and solarise at 0.5, the others are untouched."""
    images = noise(4)
    got = common.colour(images, View(grey=0.5), rows(4, c28=[0.1, 0.6, 0.49, 0.51]), [0, 1, 2, 3])
    for i in range(4):
        close(got[i], V.rgb_to_grayscale(images[i], 3) if i in (0, 2) else images[i])
    got = common.colour(images, View(solarise=0.2), rows(4, c31=[0.1, 0.6, 0.3, 0.0]), [0, 1, 2, 3])
    for i in range(4):
        close(got[i], V.solarize(images[i], 0.5) if i in (0, 3) else images[i])


def test_colour_chain_ranges_and_order():
    """Jitter 1 +- strength in the order of `turns`, then grey, blur, solarise: as torchvision one by one."""
    images, turns = noise(3, 3, 32, 32), [3, 1, 0, 2]
    view = View(jitter=(0.8, 0.6, 0.4, 0.2), jitter_p=0.8, blur=0.5, solarise=0.5, sigma=(0.1, 2.0))
    u = torch.tensor([[0.0, 0.25, 0.75, 1.0], [0.5, 0.5, 0.5, 0.5], [0.9, 0.1, 0.6, 0.3]])
    random = rows(3, c23=[0.1, 0.1, 0.9], c29=[0.9, 0.2, 0.2], c30=[0.0, 0.5, 1.0], c31=[0.2, 0.9, 0.2])
    random[:, 24:28] = u
    got = common.colour(images, view, random, turns)
    for i in range(3):
        x = images[i]
        if i < 2:
            b, c, s = (1 + m * (2 * u[i, j].item() - 1) for j, m in enumerate((0.8, 0.6, 0.4)))
            x = V.adjust_hue(x, 0.2 * (2 * u[i, 3].item() - 1))
            x = V.adjust_saturation(V.adjust_brightness(V.adjust_contrast(x, c), b), s)
        if i > 0:
            sigma = 0.1 + [0.0, 0.5, 1.0][i] * 1.9
            x = V.gaussian_blur(x, [3, 3], [sigma, sigma])
        if i != 1:
            x = V.solarize(x, 0.5)
        gap = (got[i] - x).abs()
        # solarise jumps at 0.5: a rounding error may fall on the other side there
        assert (gap > 1e-5).float().mean() < 0.001, gap.max()
    other = common.colour(images, view, random, [0, 1, 2, 3])
    assert (other[0] - got[0]).abs().max() > 0.01, "the order of the jitter must count"


@pytest.mark.parametrize("channels", [1, 3])
def test_images_do_not_depend_on_the_rest_of_the_batch(channels):
    """Row i of the random numbers and image i decide result i, alone or in company."""
    pixels = (noise(6, channels, 40, 40) * 255).to(torch.uint8)
    random = torch.rand(6, RANDOM, generator=torch.Generator().manual_seed(5))
    view = View(jitter=(0.8, 0.8, 0.8, 0.2), jitter_p=0.8, grey=0.3, blur=0.5, solarise=0.4)

    def augment(x, r):
        return common.colour(common.geometry(x, view, r, 24), view, r, [2, 0, 3, 1])

    whole = augment(pixels, random)
    assert whole.shape == (6, channels, 24, 24) and whole.min() >= 0 and whole.max() <= 1
    for i in range(6):
        close(augment(pixels[i : i + 1], random[i : i + 1])[0], whole[i], 1e-6)
    twice = augment(pixels[:1].expand(6, -1, -1, -1), random)
    assert all((twice[0] - twice[i]).abs().max() > 0.05 for i in range(1, 6)), "one crop for all"


def test_probabilities_are_met():
    """flip, jitter_p, grey, blur and solarise happen about as often as asked, independently."""
    n, view = 600, View(area=(1, 1), ratio=(1, 1), flip=0.5, grey=0.3)
    random = torch.rand(n, RANDOM, generator=torch.Generator().manual_seed(6))
    one = (noise(1, 3, 8, 8) * 255).to(torch.uint8)
    flipped = common.geometry(one.expand(n, -1, -1, -1), view, random, 8)
    is_flipped = (flipped - one.flip(-1).float() / 255).abs().amax((1, 2, 3)) < 1e-4
    assert 0.43 < is_flipped.float().mean() < 0.57
    x = one.float().expand(n, -1, -1, -1) / 255
    for column, options in {
        "jitter": {"jitter": (0.5, 0, 0, 0)},
        "grey": {},
        "blur": {},
        "solarise": {},
    }.items():
        p = 0.3
        chance = {"jitter_p": p} if column == "jitter" else {column: p}
        changed = common.colour(x, View(**options, **chance), random, [0, 1, 2, 3])
        happened = (changed - x).abs().amax((1, 2, 3)) > 1e-4
        assert 0.23 < happened.float().mean() < 0.37, column
        both = (happened & is_flipped).float().mean() - happened.float().mean() * is_flipped.float().mean()
        assert abs(both) < 0.05, f"{column} goes with flip"


def test_luminance_weights():
    """ITU-R 601 as torchvision has it."""
    close(common.luminance(noise()), v2.Grayscale()(noise()))
