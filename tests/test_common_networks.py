"""common.py, networks: Sobel, shapes, torchvision's key names, initialisation, the backbone file."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torchvision
from torch import nn

import common
from common import backbone


def on_meta(*args, **more):
    """A backbone without memory for its weights: enough for names and shapes."""
    with torch.device("meta"):
        return backbone(*args, **more)


def maps(net, images):
    """{stage: shape of its output map} of one forward pass, and the features."""
    shapes, hooks = {}, []
    for name, module in net.stages.items():
        hooks.append(
            module.register_forward_hook(lambda _m, _i, out, name=name: shapes.update({name: out.shape[1:]}))
        )
    features = net(images)
    for hook in hooks:
        hook.remove()
    return shapes, features


@pytest.mark.parametrize("channels", [1, 3])
def test_sobel_by_loops(channels):
    """Mean of the channels, then the two 3x3 filters with zero padding, every pixel by hand; frozen."""
    images = torch.rand(2, channels, 5, 6, generator=torch.Generator().manual_seed(0))
    filters = [
        [(1, 0, -1), (2, 0, -2), (1, 0, -1)],
        [(1, 2, 1), (0, 0, 0), (-1, -2, -1)],
    ]
    want = torch.zeros(2, 2, 5, 6)
    for i in range(2):
        for f in range(2):
            for y in range(5):
                for x in range(6):
                    for dy in range(3):
                        for dx in range(3):
                            if 0 <= y + dy - 1 < 5 and 0 <= x + dx - 1 < 6:
                                grey = sum(images[i, c, y + dy - 1, x + dx - 1] for c in range(channels))
                                want[i, f, y, x] += filters[f][dy][dx] * grey / channels
    sobel = common.Sobel()
    torch.testing.assert_close(sobel(images), want, atol=1e-5, rtol=0)
    assert not list(sobel.parameters())


def test_sobel_is_part_of_the_network():
    """sobel=True gives the network two input maps, whatever the images' channels, and no new weights."""
    for channels in (1, 3):
        net = backbone("lenet5", channels, 32, sobel=True).eval()
        assert net.features[0].in_channels == 2
        x = torch.rand(2, channels, 32, 32)
        with torch.no_grad():
            direct = net.classifier(net.features(common.Sobel()(x)).flatten(1))
            assert torch.equal(net(x), direct)
    plain = backbone("lenet5", 3, 32)
    assert list(plain.state_dict()) == list(net.state_dict())


def test_alexnet_maps_at_224():
    """55, 27, 13, 13, 13; pool5 256x6x6 = 9216; 96-256-384-384-256 maps; 4096 features before the ReLU."""
    net = on_meta("alexnet", 3, 224)
    shapes, features = maps(net, torch.zeros(1, 3, 224, 224, device="meta"))
    assert [s[1] for s in shapes.values()] == [55, 27, 13, 13, 13]
    assert [s[0] for s in shapes.values()] == [96, 256, 384, 384, 256]
    linear = [m for m in net.modules() if isinstance(m, nn.Linear)]
    assert [(m.in_features, m.out_features) for m in linear] == [(9216, 4096), (4096, 4096)]
    assert features.shape == (1, 4096)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in net.modules()) == 5
    assert [m.p for m in net.modules() if isinstance(m, nn.Dropout)] == [0.5, 0.5]


def test_small_networks_of_the_papers():
    """LeNet-5: 6-16, 120-84. Small AlexNet: 48-126-192-192-128, 3x3, two pools. VGG-16: 13 convolutions."""

    def plan(net):
        convolutions = [m for m in net.modules() if isinstance(m, nn.Conv2d)]
        return [m.out_channels for m in convolutions], {m.kernel_size[0] for m in convolutions}

    lenet = on_meta("lenet5", 1, 32)
    assert plan(lenet) == ([6, 16], {5}) and lenet.dim == 84
    assert [m.in_features for m in lenet.modules() if isinstance(m, nn.Linear)] == [400, 120]
    small = on_meta("alexnet-small", 3, 32)
    assert plan(small) == ([48, 126, 192, 192, 128], {3})
    shapes, _ = maps(small, torch.zeros(1, 3, 32, 32, device="meta"))
    assert [s[1] for s in shapes.values()] == [32, 16, 8, 8, 8]
    vgg = on_meta("vgg16", 3, 224)
    assert plan(vgg)[0] == [64] * 2 + [128] * 2 + [256] * 3 + [512] * 6
    assert [m.in_features for m in vgg.modules() if isinstance(m, nn.Linear)] == [25088, 4096]


@pytest.mark.parametrize("dropout", [0.5, 0.0])
@pytest.mark.parametrize("arch", ["vgg16", "resnet18", "resnet50"])
def test_weights_load_into_torchvision(arch, dropout):
    """Key for key torchvision's names and shapes; only the last classifier is missing there."""
    net = on_meta(arch, 3, 224, dropout=dropout)
    with torch.device("meta"):
        theirs = getattr(torchvision.models, "vgg16_bn" if arch == "vgg16" else arch)(weights=None)
    missing, unexpected = theirs.load_state_dict(net.state_dict(), strict=False, assign=True)
    last = "classifier.6" if arch == "vgg16" else "fc"
    assert unexpected == [] and sorted(missing) == [f"{last}.bias", f"{last}.weight"]


def test_resnet_equals_torchvisions_forward():
    """Same weights, same pooled features as torchvision's ResNet-18 with fc taken away."""
    net = backbone("resnet18", 3, 96, pool=True).eval()
    theirs = torchvision.models.resnet18(weights=None)
    theirs.load_state_dict(net.state_dict(), strict=False)
    theirs.fc = nn.Identity()
    x = torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        torch.testing.assert_close(net(x), theirs.eval()(x), atol=1e-5, rtol=1e-4)


def test_resnet_stem_for_small_images():
    """32 px: a 3x3 stem of stride 1 without pooling, maps 32, 32, 16, 8, 4; 224 px: the usual stem."""
    net = on_meta("resnet18", 3, 32)
    assert (net.conv1.kernel_size, net.conv1.stride, net.conv1.padding) == ((3, 3), (1, 1), (1, 1))
    shapes, features = maps(net, torch.zeros(1, 3, 32, 32, device="meta"))
    assert [s[1] for s in shapes.values()] == [32, 32, 16, 8, 4] and features.shape == (1, 8192)
    shapes, _ = maps(on_meta("resnet18", 3, 224), torch.zeros(1, 3, 224, 224, device="meta"))
    assert [s[1] for s in shapes.values()] == [56, 56, 28, 14, 7]


@pytest.mark.parametrize("arch", common.ARCHS)
def test_feature_size_is_dim(arch):
    """net.dim is the width of what forward gives, flat or pooled, with Sobel, grey or colour, odd sizes."""
    sizes = {"lenet5": (32, 28), "alexnet": (224, 96), "alexnet-small": (32,), "resnet18": (32, 64, 100, 224)}
    for size in sizes.get(arch, (32, 224)):
        for channels, sobel in ((1, False), (3, True)):
            for pool in (False, True) if arch == "resnet18" else (False,):
                net = on_meta(arch, channels, size, sobel=sobel, pool=pool)
                x = torch.zeros(2, channels, size, size, device="meta")
                shapes, features = maps(net, x)
                assert features.shape == (2, net.dim), (size, sobel, pool)
                assert len(shapes) == len(net.stages) and all(len(s) == 3 for s in shapes.values())


def randomise_batch_norm(net):
    """Every batch norm gets weights, biases and statistics of its own."""
    for m in net.modules():
        if isinstance(m, (nn.BatchNorm1d, nn.BatchNorm2d)):
            for x in (m.weight, m.running_var):
                nn.init.uniform_(x, 0.5, 2.0)
            for x in (m.bias, m.running_mean):
                nn.init.normal_(x)
    return net


def normalised(x, m):
    """(x - mean) / sqrt(var + eps) * weight + bias with a batch norm's running statistics."""
    return (x - m.running_mean) / (m.running_var + m.eps).sqrt() * m.weight + m.bias


@pytest.mark.parametrize(
    "arch, size", [("lenet5", 32), ("alexnet", 67), ("alexnet-small", 32), ("vgg16", 32)]
)
def test_norm_comes_before_the_relu_of_hidden_layers(arch, size):
    """norm=True: linear, batch norm, ReLU, linear, batch norm; by hand. norm=False: linear, ReLU, linear."""
    torch.manual_seed(0)
    for norm in (True, False):
        net = on_meta(arch, 3, size, norm=norm).to_empty(device="cpu").eval()
        for x in net.parameters():
            nn.init.constant_(x, 0.01)  # convolutions: any will do
        randomise_batch_norm(net)
        one, two = (m for m in net.modules() if isinstance(m, nn.Linear))
        for m in (one, two):  # a few columns are enough, and soon drawn
            nn.init.normal_(m.bias)
            nn.init.normal_(m.weight[:, :64])
        norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d)]
        assert len(norms) == 2 * norm
        with torch.no_grad():
            flat = torch.randn(4, one.in_features)
            hidden = flat @ one.weight.T + one.bias
            hidden = (normalised(hidden, norms[0]) if norm else hidden).clamp(min=0)
            want = hidden @ two.weight.T + two.bias
            want = normalised(want, norms[1]) if norm else want
            torch.testing.assert_close(net.classifier(flat), want, atol=1e-3, rtol=1e-4)
            images = torch.rand(2, 3, size, size)
            torch.testing.assert_close(net(images), net.classifier(net.features(images).flatten(1)))
        assert (want < 0).any() and net.dim == two.out_features == want.shape[1]


@pytest.mark.parametrize("arch", common.ARCHS)
def test_norm_leaves_the_names_of_the_weights(arch):
    """Every weight of norm=False is there under its name and in its shape; ResNets do not change at all."""
    size = 224 if arch == "alexnet" else 32
    plain, normed = (on_meta(arch, 3, size, norm=norm).state_dict() for norm in (False, True))
    assert {k: v.shape for k, v in plain.items()}.items() <= {k: v.shape for k, v in normed.items()}.items()
    more = [k for k in normed if k not in plain]
    assert len(more) == (0 if arch.startswith("resnet") else 10) and all("classifier" in k for k in more)


def test_embedding_by_hand():
    """W max(x, 0) + b divided by its length: unit length, float32, under autocast too."""
    torch.manual_seed(0)
    embedding, x = common.Embedding(9, 4), torch.randn(20, 9)
    with torch.no_grad():
        embedding.linear.bias.normal_()
        want = np.maximum(x.numpy(), 0) @ embedding.linear.weight.numpy().T + embedding.linear.bias.numpy()
        want /= np.sqrt((want**2).sum(1, keepdims=True))
        np.testing.assert_allclose(embedding(x), want, atol=1e-6)
        with torch.autocast("cpu", torch.bfloat16):
            low = embedding(x)
    assert low.dtype == torch.float32 and embedding(x).shape == (20, 4)
    torch.testing.assert_close(low.norm(dim=1), torch.ones(20), atol=1e-6, rtol=0)
    np.testing.assert_allclose(low, want, atol=0.02)
    x.requires_grad_()
    common.Embedding(9, 4)(x)[:, 0].sum().backward()
    assert (x.grad[x <= 0] == 0).all() and (x.grad[x > 0] != 0).all()


def test_batch_norm_filled_from_one_batch():
    """Mean and unbiased variance of the batch at every layer, by loops; nothing kept of what was there."""
    torch.manual_seed(0)
    stem = [
        nn.Conv2d(2, 3, 3),
        nn.BatchNorm2d(3),
        nn.ReLU(),
        nn.Conv2d(3, 4, 2),
        nn.BatchNorm2d(4, momentum=None),
    ]
    net = nn.Sequential(
        *stem, nn.Flatten(), nn.Linear(16, 5), nn.BatchNorm1d(5, momentum=0.01), nn.Linear(5, 2)
    )
    randomise_batch_norm(net).eval()
    before = copy.deepcopy(net).double()
    images = torch.randn(12, 2, 5, 5) * 3 + 1
    with torch.no_grad():
        common.fill_batch_norm(net, images)
        x, seen = images.double(), 0
        for module, filled in zip(before, net, strict=True):
            if not isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
                x = module(x)
                continue
            y = x.clone()
            for c in range(x.shape[1]):
                values = x[:, c].flatten().tolist()
                mean = sum(values) / len(values)
                square = sum((v - mean) ** 2 for v in values)
                assert filled.running_mean[c].item() == pytest.approx(mean, abs=1e-5)
                assert filled.running_var[c].item() == pytest.approx(square / (len(values) - 1), rel=1e-4)
                y[:, c] = (x[:, c] - mean) / math.sqrt(square / len(values) + module.eps)
                y[:, c] = y[:, c] * module.weight[c] + module.bias[c]
                seen += 1
            x = y
    assert seen == 12
    for a, b in zip(net.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b.float()) and a.grad is None


def test_initialisation():
    """Convolutions N(0, sqrt(2/(k*k*out))), linear layers N(0, 0.01), biases 0."""
    torch.manual_seed(0)
    for net in (backbone("alexnet-small", 3, 32), backbone("resnet18", 3, 32)):
        for m in net.modules():
            if isinstance(m, nn.Conv2d):
                want = math.sqrt(2 / (m.kernel_size[0] ** 2 * m.out_channels))
            elif isinstance(m, nn.Linear):
                want = 0.01
            else:
                continue
            n = m.weight.numel()
            assert m.weight.std().item() == pytest.approx(want, rel=5 / math.sqrt(n)), m
            assert abs(m.weight.mean().item()) < 5 * want / math.sqrt(n), m
            assert m.bias is None or not m.bias.any()
    head = nn.Sequential(nn.Linear(50, 40), nn.Conv2d(3, 4, 3))
    common.he_init(head)
    assert not head[0].bias.any() and not head[1].bias.any() and head[0].weight.std() < 0.02


@pytest.mark.parametrize("arch", ["lenet5", "alexnet-small", "resnet18"])
def test_a_new_network_is_in_training_mode(arch):
    """Like any torch module: batch norm and dropout train unless eval() was called."""
    assert [name for name, m in backbone(arch, 3, 32).named_modules() if not m.training] == []


def test_wrong_names_and_sizes_are_refused(capsys):
    """An unknown --arch, or images too small for it: exit code 2 and one line."""
    for arch, size in (("alexnet7", 32), ("alexnet", 32)):
        with pytest.raises(SystemExit) as end:
            backbone(arch, 3, size)
        err = capsys.readouterr().err
        assert end.value.code == 2 and len(err.splitlines()) == 1 and ("arch" in err or "size" in err)


def test_extract_gives_centre_crop_features_in_order():
    """Evaluation mode, given order, no batch left out, `then` applied; the network's mode is kept."""
    data = common.load_data("digits")[1]
    loader = common.Loader(data, 50, 32, 32, torch.device("cpu"))
    net = backbone("lenet5", 1, 32).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    index = torch.randperm(360)[:123]
    features = common.extract(net, loader, index)
    assert net.training and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    x = (data.pixels[index].float() / 255 - data.mean[0]) / data.std[0]
    with torch.no_grad():
        want = net.eval()(x)
    torch.testing.assert_close(features, want, atol=1e-5, rtol=1e-5)
    halves = common.extract(net, loader, index, then=lambda z: z[:, :7] / 2)
    torch.testing.assert_close(halves, want[:, :7] / 2, atol=1e-5, rtol=1e-5)
    assert not net.training and not features.requires_grad and features.dtype == torch.float32
    assert common.extract(net, loader, index[:0]).shape == (0, 84)
    assert common.extract(net, loader, index[:0], then=lambda z: z[:, :7]).shape == (0, 7)


# --------------------------------------------------------------------------- backbone.pt


def write_backbone(path, net, arch, channels, sobel, **more):
    data = SimpleNamespace(name="x", channels=channels, mean=(0.5,) * channels, std=(0.2,) * channels)
    common.save_backbone(path, net, arch, size=32, resize=32, sobel=sobel, data=data, method="test", **more)


@pytest.mark.parametrize(
    "arch, options",
    [
        ("lenet5", {}),
        ("lenet5", {"norm": True}),
        ("alexnet-small", {"sobel": True}),
        ("alexnet-small", {"dropout": 0.0}),
        ("resnet18", {"sobel": True}),
        ("resnet18", {"pool": True}),
    ],
)
def test_backbone_file_round_trip(arch, options, tmp_path):
    """save_backbone, then load_backbone from the file or its folder: equal outputs, also without dropout."""
    torch.manual_seed(1)
    channels = 1 if arch == "lenet5" else 3
    net = backbone(arch, channels, 32, **options)
    x = torch.randn(4, channels, 32, 32)
    net.train()(x)  # moves the batch-norm statistics
    write_backbone(tmp_path / "backbone.pt", net, arch, channels, options.get("sobel", False))
    for path in (tmp_path, tmp_path / "backbone.pt"):
        again, meta = common.load_backbone(path)
        assert not again.training and meta["arch"] == arch and meta["mean"] == [0.5] * channels
        assert again.embedding is None and meta["norm"] is options.get("norm", False)
        with torch.no_grad():
            torch.testing.assert_close(again(x), net.eval()(x), atol=0, rtol=0)


def test_files_that_are_no_backbone(tmp_path):
    """A missing file, another dictionary, an empty description or weights that do not fit: ValueError."""
    with pytest.raises(ValueError, match="no such file"):
        common.load_backbone(tmp_path)
    net = backbone("lenet5", 1, 32)
    meta = {"arch": "lenet5", "channels": 1, "image_size": 32, "sobel": False, "mean": [0.5], "std": [0.2]}
    weights = net.state_dict()
    broken = {k: v for k, v in weights.items() if k != "features.0.weight"}
    for state in (
        {"weights": 1},
        [1, 2],
        {"state_dict": broken, "meta": meta},
        {"state_dict": weights, "meta": {**meta, "channels": 3}},
        {"state_dict": weights, "meta": {}},
        {"state_dict": weights, "meta": {**meta, "arch": "transformer"}},
    ):
        torch.save(state, tmp_path / "backbone.pt")
        with pytest.raises(ValueError):
            common.load_backbone(tmp_path)


def test_backbone_file_with_an_embedding(tmp_path):
    """The linear layer comes back as what follows the features: ReLU, linear, unit length, by hand."""
    torch.manual_seed(2)
    net, linear, x = backbone("lenet5", 1, 32, norm=True), nn.Linear(84, 7), torch.randn(6, 1, 32, 32)
    net.train()(x)  # moves the batch-norm statistics
    write_backbone(tmp_path / "backbone.pt", net, "lenet5", 1, False, embedding=linear)
    again, meta = common.load_backbone(tmp_path)
    assert meta["norm"] is True and not any(m.training for m in again.modules())
    with torch.no_grad():
        features = net.eval()(x)
        torch.testing.assert_close(again(x), features, atol=0, rtol=0)
        assert (features > 0).any() and (features < 0).any()
        want = features.clamp(min=0) @ linear.weight.T + linear.bias
        want /= want.square().sum(1, keepdim=True).sqrt()
        torch.testing.assert_close(again.embedding(again(x)), want, atol=1e-6, rtol=0)


def test_damaged_embeddings_are_refused(tmp_path):
    """No dictionary, a part missing or in the wrong shape: ValueError with the file's name."""
    path, weight, bias = tmp_path / "some.pt", torch.zeros(7, 84), torch.zeros(7)
    write_backbone(path, backbone("lenet5", 1, 32), "lenet5", 1, False, embedding=nn.Linear(84, 7))
    good = common.load_file(path)
    assert common.load_backbone(path)[0].embedding is not None
    for bad in (
        None,
        torch.zeros(3),
        [weight, bias],
        {},
        {"weight": weight},
        {"bias": bias},
        {"weight": weight[:, 1:], "bias": bias},
        {"weight": weight[1:], "bias": bias},
        {"weight": weight, "bias": bias[0]},
        {"weight": weight, "bias": bias, "more": bias},
        {"weight": "none", "bias": bias},
    ):
        torch.save({**good, "embedding": bad}, path)
        with pytest.raises(ValueError) as error:
            common.load_backbone(path)
        assert str(path) in str(error.value) and len(str(error.value).splitlines()) == 1


def test_a_loaded_network_can_be_saved_again(tmp_path):
    """Its embedding goes beside the trunk once more, not into it."""
    first, second = tmp_path / "first.pt", tmp_path / "second.pt"
    write_backbone(first, backbone("lenet5", 1, 32), "lenet5", 1, False, embedding=nn.Linear(84, 7))
    net, _ = common.load_backbone(first)
    write_backbone(second, net, "lenet5", 1, False, embedding=net.embedding.linear)
    for name in ("state_dict", "embedding"):
        old, new = (common.load_file(p)[name] for p in (first, second))
        assert list(old) == list(new) and all(torch.equal(old[k], new[k]) for k in old)
    assert common.load_backbone(second)[0].embedding is not None


def test_older_backbone_files_load(tmp_path):
    """Files from before norm and pool: neither is in meta, and the network is the plain one."""
    torch.manual_seed(3)
    net, x = backbone("lenet5", 1, 32).eval(), torch.randn(4, 1, 32, 32)
    write_backbone(tmp_path / "backbone.pt", net, "lenet5", 1, False)
    saved = common.load_file(tmp_path / "backbone.pt")
    assert "embedding" not in saved
    del saved["meta"]["norm"], saved["meta"]["pool"]
    torch.save(saved, tmp_path / "backbone.pt")
    again, _ = common.load_backbone(tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(again(x), net(x), atol=0, rtol=0)
    assert again.embedding is None
