"""--init: weights of others and of torchvision, held against networks built without common.py; recipes of folders."""

import importlib
from urllib.error import URLError

import common

import pytest
import torch
import torchvision
from jobs import refusal, write_images
from torch import nn
from torchvision.models.vgg import cfgs, make_layers

SCRIPTS = {
    name: importlib.import_module(name) for name in ("deepcluster", "local_aggregation", "coke", "lsdc")
}
every = pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS.keys())


def filled(net):
    """In evaluation mode, with batch norm that does something."""
    for m in net.modules():
        if isinstance(m, nn.BatchNorm2d):
            for x in (m.weight, m.bias, m.running_mean, m.running_var):
                nn.init.uniform_(x, 0.5, 1.5)
    return net.eval()


def assert_close(got, want):
    assert got.shape == want.shape and want.std() > 0
    torch.testing.assert_close(got / want.std(), want / want.std(), atol=1e-4, rtol=1e-4)


def resnet(arch):
    torch.manual_seed(0)
    return filled(getattr(torchvision.models, arch)())


# --------------------------------------------------------------------------- files of other people


def deepclusters(arch, sobel, hidden):
    """The network of DeepCluster's authors, with their names of weights; its output is the last hidden layer's."""

    def conv(cin, *layer):
        return [nn.Conv2d(cin, *layer), nn.BatchNorm2d(layer[0]), nn.ReLU()]

    channels, drop, (a, b) = 2 if sobel else 3, nn.Dropout(), hidden
    if arch == "alexnet":
        maps = [
            *conv(channels, 96, 11, 4, 2),
            nn.MaxPool2d(3, 2),
            *conv(96, 256, 5, 1, 2),
            nn.MaxPool2d(3, 2),
        ]
        maps += [
            *conv(256, 384, 3, 1, 1),
            *conv(384, 384, 3, 1, 1),
            *conv(384, 256, 3, 1, 1),
            nn.MaxPool2d(3, 2),
        ]
        linear = [drop, nn.Linear(256 * 6 * 6, a), nn.ReLU(), drop, nn.Linear(a, b)]
    else:
        maps = [nn.Conv2d(channels, 64, 3, 1, 1), *make_layers(cfgs["D"], batch_norm=True)[1:]]
        linear = [nn.Linear(512 * 7 * 7, a), nn.ReLU(), drop, nn.Linear(a, b)]
    net = nn.Sequential()
    if sobel:
        x = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]])
        net.sobel = nn.Sequential(nn.Conv2d(3, 1, 1), nn.Conv2d(1, 2, 3, padding=1))
        weights = (
            torch.full((1, 3, 1, 1), 1 / 3),
            torch.zeros(1),
            torch.stack([x, x.T])[:, None],
            torch.zeros(2),
        )
        net.sobel.load_state_dict(dict(zip(net.sobel.state_dict(), weights, strict=True)))
    net.features = nn.Sequential()
    net.features.module = nn.Sequential(*maps)  # of DataParallel
    net.flatten, net.classifier = nn.Flatten(), nn.Sequential(*linear)
    return filled(net)


@pytest.mark.parametrize("arch, sobel", [("alexnet", True), ("alexnet", False), ("vgg16", True)])
def test_checkpoints_of_deepclusters_authors(arch, sobel, tmp_path, monkeypatch):
    """Old ones: no zip, no num_batches_tracked. The network takes their Sobel filter along."""
    monkeypatch.setitem(common.HIDDEN, arch, (24, 16))  # of 4096, which take long
    monkeypatch.setattr(common, "he_init", lambda net: None)
    torch.manual_seed(0)
    theirs, path = deepclusters(arch, sobel, (24, 16)), tmp_path / "checkpoint.pth.tar"
    state = {k: v for k, v in theirs.state_dict().items() if "num_batches" not in k}
    state |= {"top_layer.weight": torch.zeros(100, 16), "top_layer.bias": torch.zeros(100)}
    saved = {"epoch": 500, "arch": arch, "state_dict": state, "optimizer": {"param_groups": [{"lr": 0.05}]}}
    torch.save(saved, path, _use_new_zipfile_serialization=False)
    (net, meta), x = common.load_backbone(path), torch.rand(2, 3, 224, 224)
    with torch.no_grad():
        assert_close(net(x), theirs(x))
    want = {"arch": arch, "sobel": sobel, "method": "pretrained", "image_size": 224}
    assert want.items() <= meta.items()
    args = SCRIPTS["local_aggregation"].options(["--recipe", "imagenet", "--init", str(path)])
    assert (args.arch, args.sobel, args.image_size) == (arch, sobel, 224)  # also where there is no such flag


FORMS = {  # before the names of the backbone; the names of some other tensors in the file
    "plain": ("", ""),
    "supervised": ("", "fc.weight fc.bias"),
    "swav": ("module.", "module.projection_head.0.weight module.prototypes.weight"),
    "moco": ("module.encoder_q.", "module.encoder_q.fc.weight module.encoder_k.conv1.weight module.queue"),
    "coke": (
        "module.encoder.",
        "module.encoder.fc.0.weight module.encoder.fc.1.running_mean module.encoder.fc.6.bias "
        "module.predictor.0.weight module.assign_labels module.pre_center_0 module.dual_0",
    ),
}


def checkpoint(form, state):
    prefix, others = FORMS[form]
    state = {prefix + name: x for name, x in state.items() if not name.startswith("fc.")}
    state |= {name: torch.ones(128 if form == "moco" else 1000, 3) for name in others.split()}
    return {"epoch": 9, "arch": "resnet50", "state_dict": state} if form in ("moco", "coke") else state


@pytest.mark.parametrize(
    "arch, forms", [("resnet18", "supervised plain moco swav"), ("resnet50", "supervised coke")]
)
def test_resnets_of_others_give_the_outputs_of_torchvisions(arch, forms, tmp_path, monkeypatch):
    monkeypatch.setattr(common, "he_init", lambda net: None)  # which takes long
    theirs, x = resnet(arch), torch.rand(2, 3, 96, 96)
    with torch.no_grad():
        want = nn.Sequential(*list(theirs.children())[:-2])(x)
        for form in forms.split():
            torch.save(checkpoint(form, theirs.state_dict()), tmp_path / form)
            net, meta = common.load_backbone(tmp_path / form, image_size=96)
            assert_close(net(x), want.flatten(1))
            assert meta["method"] == ("supervised" if form == "supervised" else "pretrained"), form
        assert_close(common.load_backbone(tmp_path / form, pool=True)[0](x), want.mean((2, 3)))


WRONG = {  # instead of the tensor of this name; None: it is missing
    "conv1.weight": None,
    "layer2.0.bn1.bias": None,
    "layer3.1.bn2.running_var": None,
    "layer4.1.conv1.weight": torch.zeros(512, 256, 3, 3),
    "layer1.0.conv9.weight": torch.zeros(3),
    "layer5.0.conv1.weight": torch.zeros(3),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_missing_too_much_or_of_another_shape_is_named(name, tmp_path, capsys):
    state = dict(resnet("resnet18").state_dict())
    state.pop(name) if WRONG[name] is None else state.update({name: WRONG[name]})
    torch.save(checkpoint("moco", state), tmp_path / "file")
    assert name in refusal(common.load_backbone, tmp_path / "file", capsys)


# --------------------------------------------------------------------------- torchvision's, and folders


@pytest.fixture
def torchvisions(monkeypatch):
    """The names of torchvision's weights that were asked for; random ones come, without the network."""
    asked = []

    def get_state_dict(self, *rest, **more):
        asked.append(type(self).__name__)
        with torch.device("meta" if "VGG" in asked[-1] else "cpu"):
            return getattr(torchvision.models, asked[-1].removesuffix("_Weights").lower())().state_dict()

    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", get_state_dict)
    return asked


@every
def test_init_imagenet(script, torchvisions, capsys, monkeypatch):
    """--arch says which; its mean and deviation, whatever the data; tables call it supervised."""
    args = script.options(["--data", "cifar10"])
    assert (args.start, args.normalize) == ("random network", None)
    names = [("", "resnet18"), ("-resnet50", "resnet50")]
    for more, arch in [*names, *((f" --arch {arch}", arch) for arch in ("resnet50", "vgg16"))]:
        args = script.options(f"--data cifar10 --init imagenet{more}".split())
        assert (args.arch, args.sobel, args.start) == (arch, False, "supervised initialization")
        assert args.normalize == [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
    want = ["ResNet18_Weights", "ResNet50_Weights", "ResNet50_Weights", "VGG16_BN_Weights"]
    assert torchvisions == want and args.image_size == 224
    line = refusal(script.options, ["--data", "cifar10", "--init", "imagenet", "--arch", "lenet5"], capsys)
    assert "not of lenet5" in line and "resnet50" in line
    fails = lambda *a, **k: (_ for _ in ()).throw(URLError("no route to host"))  # noqa: E731
    monkeypatch.setattr(torchvision.models.WeightsEnum, "get_state_dict", fails)
    assert "no route to host" in refusal(script.options, ["--init", "imagenet"], capsys)


def test_vgg_has_torchvisions_names_and_shapes(torchvisions):
    with torch.device("meta"):
        ours = common.Backbone("vgg16", 3, 224).net.state_dict()
    theirs = common.read_backbone("imagenet-vgg16")["state_dict"]
    assert {k: x.shape for k, x in ours.items()} == {k: x.shape for k, x in theirs.items()}


def test_data_get_the_mean_and_deviation_of_the_weights(capsys):
    train, test = common.load_data("digits", normalize=[[0.25], [0.125]])
    assert (train.mean, train.std, test.mean, test.std) == ((0.25,), (0.125,)) * 2
    color, gray = common.load_data("digits", normalize=[[0.5] * 3] * 2)[0].pixels, train.pixels
    assert color.shape[1] == 3 and (color == gray).all()  # gray three times
    line = refusal(lambda data: common.load_data(data, normalize=[[0.5] * 5] * 2), "digits", capsys)
    assert "1 channel" in line and "5" in line


@every
@pytest.mark.parametrize("init", [False, True])
def test_folders_have_a_recipe_by_number_and_size_of_images(script, init, torchvisions, monkeypatch):
    """At least ten steps an epoch (LSD-C, whose batch is its pairs: five), some images in each cluster, images that
    are not enlarged; weights that fit."""
    argv = ["--data", "my/photos", *["--init", "imagenet"] * init]
    for n, side in ((320, 500), (1000, 90), (9469, 48), (99_999, 224)):
        monkeypatch.setattr(common, "look_at", lambda folder, found=(n, side): found)
        args = script.options(argv)
        assert (
            n >= (5 if script.__name__ == "lsdc" else 10) * args.batch_size
            and args.epochs > 1
            and (init or args.image_size <= side)
        ), n
        assert max(args.k if isinstance(args.k, list) else [args.k]) <= n / 5, n
        if init and n == 320:
            common.make_backbone(args, 3, dropout=0.0, pool=True)


@pytest.mark.parametrize("name", ["deepcluster", "local_aggregation", "coke"])
def test_large_folders_have_the_recipe_of_imagenet(name, monkeypatch):
    script = SCRIPTS[name]
    monkeypatch.setattr(common, "look_at", lambda folder: (100_000, 300))
    large, paper = (vars(script.options(["--data", "x", *more])) for more in ([], ["--recipe", "imagenet"]))
    assert large.pop("recipe") is None and paper.pop("recipe") == "imagenet" and large == paper


def test_number_and_size_of_the_images_of_a_folder(tmp_path):
    assert common.look_at(tmp_path / "nowhere") == (0, 0)
    write_images(tmp_path / "x" / "train" / "a", 30, size=40)
    write_images(tmp_path / "x" / "val", 9, size=7)
    (tmp_path / "x" / "train" / "odd.jpg").write_text("no image")
    assert common.look_at(tmp_path / "x") == (31, 40) and common.look_at(tmp_path / "x" / "val") == (9, 7)
