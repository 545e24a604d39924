"""extras/channels.py: filters in the grid, ascent towards known filters, the nine strongest images, whole runs."""

import common
from extras import channels

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from jobs import ROOT, refusal
from matplotlib.figure import Figure
from PIL import Image
from torch import nn

COLORS = torch.tensor(
    [[1.0, -0.5, -0.5], [-0.5, 1.0, -0.5], [-0.5, -0.5, 1.0], [0.5, 0.5, -1.0]]
)  # of four filters
LOW, HIGH = -torch.full((3, 1, 1), 2.0), torch.full((3, 1, 1), 2.0)


def convolution(weight, bias=0.0):
    """A network of one convolution by weight (D, C, k, k)."""
    return lambda images: F.conv2d(images, weight, torch.full((len(weight),), bias))


def noise(count, depth=3, size=24):
    return torch.randn(count, depth, size, size, generator=torch.Generator().manual_seed(0)) / 10


@pytest.mark.parametrize("depth", [1, 3])
def test_filters_appear_where_they_belong(tmp_path, depth):
    weight = torch.zeros(6, depth, 5, 5)
    for d in range(6):
        weight[d, d % depth, d // 5, d % 5] = d + 1  # one weight of its own place in each
        weight[d, d % depth, 4, 4] = -(d + 1) / 2
    channels.draw_filters(tmp_path / "filters.png", channels.filter_images(weight))
    with Image.open(tmp_path / "filters.png") as image:
        pixels = np.asarray(image.convert("RGB"), dtype=int)
    zoom, gap = 96 // 5, 4
    side = 5 * zoom
    assert pixels.shape == (
        2 * (side + gap) + gap,
        3 * (side + gap) + gap,
        3,
    )  # six filters: two rows of three
    for d in range(6):
        top, left = gap + d // 3 * (side + gap), gap + d % 3 * (side + gap)
        cells = pixels[top + zoom // 2 :: zoom, left + zoom // 2 :: zoom][:5, :5]
        expected = np.full((5, 5, 3), 127)  # 0 is gray
        colors = [d % 3] if depth == 3 else [0, 1, 2]
        expected[d // 5, d % 5, colors] = 255
        expected[4, 4, colors] = 64
        assert np.abs(cells - expected).max() <= 1, d
        assert (pixels[top - 1, left : left + side] == 255).all()


def test_filters_after_sobel_are_shown_as_they_act_on_the_gray_image():
    weight, gen = (
        torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(0)),
        torch.Generator().manual_seed(1),
    )
    images, sobel = torch.rand(2, 3, 20, 20, generator=gen), common.Sobel()
    shown = channels.filter_images(weight, sobel.filters)
    assert shown.shape == (4, 1, 7, 7) and shown.min() >= 0 and shown.max() <= 1
    through = F.conv2d(sobel(images), weight)[:, :, 3:-3, 3:-3]  # without the border, where zeros were added
    direct = F.conv2d(images.mean(1, keepdim=True), 2 * shown - 1)[:, :, 2:-2, 2:-2]
    ratio = through / direct  # one number for each filter: how it was scaled
    torch.testing.assert_close(ratio, ratio[:1, :, :1, :1].expand_as(ratio), rtol=1e-3, atol=0)
    assert (ratio > 0).all()


def test_a_step_follows_the_gradient_worked_out_on_paper():
    # One pixel, 1x1 filters w, all responses above 0: d log softmax(w x)_c / dx = w_c - sum_d p_d w_d.
    weight, x = torch.tensor([[1.0, 2.0], [3.0, 1.0], [2.0, 2.0]]), torch.tensor([[0.2, 0.1], [0.3, 0.4]])
    ours = channels.step_up(
        convolution(weight[:, :, None, None]), x[:, :, None, None], torch.tensor([2, 0]), 0.1, 0.25
    )
    for i, c in enumerate((2, 0)):
        power = np.exp(weight.numpy() @ x[i].numpy())
        gradient = weight[c].numpy() - power / power.sum() @ weight.numpy()
        expected = 0.75 * x[i].numpy() + 0.1 * gradient / np.sqrt((gradient**2).mean())
        np.testing.assert_allclose(ours[i].flatten(), expected, rtol=1e-5)


def test_ascent_finds_the_color_of_each_channel():
    net, chosen = convolution(COLORS[:, :, None, None]), torch.tensor([0, 1, 2, 3])
    start = noise(4)
    found = channels.ascend(net, start, chosen, 60, LOW, HIGH)
    means = F.normalize(found.mean((2, 3)))
    assert ((means * F.normalize(COLORS)).sum(1) > 0.9).all(), means
    before, after = (channels.responses(net(x)).diagonal() for x in (start, found))
    assert (after > 10 * before).all() and (channels.responses(net(found)).argmax(1) == chosen).all()
    assert found.max() <= 2 and found.min() >= -2


def test_ascent_finds_the_direction_of_an_edge_also_through_sobel():
    edge = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    plain = convolution(torch.stack([edge, edge.T])[:, None].repeat(1, 3, 1, 1))
    pair = torch.eye(2)[:, :, None, None]  # the derivatives themselves
    for net in (plain, nn.Sequential(common.Sobel(), nn.Conv2d(2, 2, 1, bias=False))):
        if isinstance(net, nn.Sequential):
            net[1].weight.data = pair
        found = channels.ascend(net, noise(2), torch.tensor([0, 1]), 60, LOW, HIGH).mean(1)
        across, down = (found.diff(dim=d).abs().mean((1, 2)) for d in (2, 1))
        assert across[0] > 3 * down[0] and down[1] > 3 * across[1]


def test_a_silent_channel_wakes():
    net, start = convolution(COLORS[:, :, None, None], -1.0), noise(1)
    assert channels.responses(net(start)).max() == 0
    found = channels.ascend(net, start, torch.tensor([2]), 60, LOW, HIGH)
    assert channels.responses(net(found))[0, 2] > 0.5


def test_blur_leaves_fewer_high_frequencies():
    weight = torch.randn(4, 3, 5, 5, generator=torch.Generator().manual_seed(2))
    frequency = torch.fft.fftfreq(24).abs()
    high, shares = (frequency[:, None] > 0.25) | (frequency[None] > 0.25), []
    for every in (0, 2):
        found = channels.ascend(convolution(weight), noise(4), torch.arange(4), 40, LOW, HIGH, every)
        power = torch.fft.fft2(found - found.mean((2, 3), keepdim=True)).abs().square()
        shares.append((power[:, :, high].sum() / power.sum()).item())
    assert shares[1] < shares[0] / 3, shares


def test_the_strongest_come_first_and_unreadable_files_never():
    scores = torch.tensor([[5.0, 0], [1, 1], [9, 2], [9, 3], *[[0, 4 + i] for i in range(9)]])
    best = channels.strongest(scores)
    assert best[:4, 0].tolist() == [2, 3, 0, 1] and best[:, 1].tolist() == [12, 11, 10, 9, 8, 7, 6, 5, 4]
    assert channels.strongest(scores, {2, 12})[:3, 0].tolist() == [3, 0, 1]
    assert channels.strongest(scores, {2, 12})[:2, 1].tolist() == [11, 10]
    assert channels.strongest(scores[:3], {0}).T.tolist() == [[2, 1], [2, 1]]


def test_layers_go_by_name_and_number_and_give_the_maps_before_relu(capsys):
    backbone = common.Backbone("resnet18", 3, 32).eval()
    for norm in (m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)):
        nn.init.uniform_(norm.running_mean, -1, 1)
    net, x = backbone.net, torch.randn(4, 3, 32, 32)
    assert channels.find_layer(net, None) == ("layer4.1.conv2", 512)
    assert channels.find_layer(net, "1") == ("conv1", 64)
    assert (
        channels.find_layer(net, "layer2.0.conv1") == channels.find_layer(net, "6") == ("layer2.0.conv1", 128)
    )
    for wrong in ("0", "18", "layer2.0.downsample.0"):
        assert "1 to 17" in refusal(lambda a: channels.find_layer(net, a), wrong, capsys)
    block = net.layer1[0]
    with torch.no_grad():
        stem = net.relu(net.bn1(net.conv1(x)))
        expected = block.bn2(block.conv2(F.relu(block.bn1(block.conv1(stem)))))
        found = channels.layer_maps(backbone, "layer1.0.conv2")(x)["maps"]
    torch.testing.assert_close(found, expected)
    small = common.Backbone("lenet5", 1, 32, sobel=True).eval()
    with torch.no_grad():
        maps = channels.layer_maps(small, "features.4")(x[:, :1])["maps"]
        torch.testing.assert_close(maps, small.net.features[:6](small.sobel(x[:, :1])))
    assert maps.min() < 0


@pytest.fixture
def drawn(monkeypatch):
    """The figures that would be saved."""
    found = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **how: found.append(self))
    return found


def test_rows_have_the_made_image_and_then_those_found(drawn):
    made, found = (
        torch.full((3, 8, 8), 0.2),
        torch.linspace(0.3, 0.9, 7)[:, None, None, None].expand(7, 3, 8, 8),
    )
    channels.draw_channels("channels.png", "conv5", {4: (made, found), 7: (made + 0.1, found.flip(0))})
    for axis, name, first, others in zip(
        drawn[0].axes, ("channel 4", "channel 7"), (0.2, 0.3), (found, found.flip(0)), strict=True
    ):
        assert axis.get_ylabel() == name
        row = axis.images[0].get_array()[6, 6::10, 0].tolist()  # the middle of each tile
        expected = [first, 1, *others[:, 0, 0, 0].tolist(), 1, 1]
        assert row == pytest.approx(expected)


def color_run(folder, sobel=False):
    """A run folder with a LeNet-5 whose first convolution sees red, green, blue, and less of them."""
    backbone = common.Backbone("lenet5", 3, 32, sobel)
    conv = backbone.net.features[0]
    with torch.no_grad():
        conv.weight.zero_(), conv.bias.zero_()
        for i in range(6):
            conv.weight[i, i % 3, 2, 2] = 1 - 2 * (i // 3)
    meta = {**backbone.meta, "method": "coke", "mean": [0.5] * 3, "std": [0.25] * 3, "center_fraction": 1.0}
    folder.mkdir()
    saved = {"state_dict": backbone.net.state_dict(), "meta": meta | {"data": str(folder.parent / "images")}}
    torch.save(saved, folder / "backbone.pt")


def test_the_nine_greenest_and_reddest_images_are_found_in_their_order(tmp_path, monkeypatch, capsys):
    color_run(tmp_path / "run")
    (tmp_path / "images").mkdir()
    order = np.random.default_rng(0)
    reds, greens = (
        order.permutation(np.arange(130, 250, 6)).tolist() for _ in range(2)
    )  # above the mean, 127.5
    for i, color in enumerate(zip(reds, greens, [100] * 20, strict=True)):
        Image.new("RGB", (100, 100), color).save(tmp_path / f"images/{i:02}.png")
    (tmp_path / "images/20.png").write_bytes(b"no image")
    monkeypatch.setattr(
        channels, "draw_channels", lambda path, layer, rows: shown.append((path, layer, rows))
    )
    shown = []
    command = [
        f"{tmp_path}/run",
        "--layer",
        "1",
        "--steps",
        "20",
        "--workers",
        "0",
        "--channels",
        "1",
        "0",
        "5",
    ]
    channels.main(command)
    (path, layer, rows) = shown[0]
    assert (
        path == tmp_path / "run/channels-features.0.png" and layer == "features.0" and list(rows) == [1, 0, 5]
    )
    for made, found in rows.values():
        assert (
            found.shape == (9, 3, 32, 32) and made.shape == (3, 32, 32) and 0 <= made.min() <= made.max() <= 1
        )
    for channel, values, others in ((0, reds, greens), (1, greens, reds)):
        best = sorted(range(20), key=lambda i: -values[i])[:9]
        seen = (rows[channel][1].mean((2, 3)) * 255)[:, [channel, 1 - channel]]
        expected = torch.tensor([[values[i], others[i]] for i in best]).float()
        torch.testing.assert_close(seen, expected, atol=0.01, rtol=0)
    assert rows[0][0].mean((1, 2))[0] > 0.7 > 0.6 > rows[0][0][1:].mean((1, 2)).max()
    assert rows[1][0].mean((1, 2))[1] > 0.7 > 0.6 > rows[1][0][[0, 2]].mean((1, 2)).max()
    assert rows[5][0].mean((1, 2))[2] < 0.3  # the less blue, the more it responds
    assert f"{tmp_path}/run/filters.png and {tmp_path}/run/channels-features.0.png" in capsys.readouterr().out


@pytest.mark.parametrize("script, more", [("coke", "--warmup-epochs 1"), ("deepcluster", "--k 10 --sobel")])
def test_a_run_on_digits_gets_both_pictures(run_script, script, more):
    job = run_script(f"{ROOT}/{script}.py", f"--data digits --epochs 2 --workers 0 --out run {more}")
    made = run_script(f"{ROOT}/extras/channels.py", "run --steps 8 --workers 0", folder=job.folder)
    assert made.out.splitlines() == ["written: run/filters.png and run/channels.png (features.4)"]
    side = 7 if script == "deepcluster" else 5  # after a Sobel filter two more
    with Image.open(job.run / "filters.png") as image:
        assert image.size == (3 * (96 // side * side + 4) + 4, 2 * (96 // side * side + 4) + 4)
    with Image.open(job.run / "channels.png") as image:
        assert min(image.size) > 500 and len(set(image.convert("L").tobytes())) > 50


def test_mistakes_end_with_one_line(tmp_path, capsys):
    color_run(tmp_path / "run")
    assert "no run folder" in refusal(channels.main, [f"{tmp_path}/none"], capsys)
    run = ["--data", "digits", f"{tmp_path}/run"]
    assert "features.0, features.4" in refusal(channels.main, [*run, "--layer", "5"], capsys)
    assert "has 0 to 15" in refusal(channels.main, [*run, "--channels", "16"], capsys)
    assert "no such folder" in refusal(
        channels.main, [f"{tmp_path}/run", "--data", f"{tmp_path}/none"], capsys
    )
    common.save_file(tmp_path / "backbone.pt", {"state_dict": {}, "meta": {"arch": "mlp"}})
    assert "for vectors" in refusal(channels.main, [str(tmp_path)], capsys)
