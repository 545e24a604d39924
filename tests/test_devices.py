"""The GPU path without a GPU: CPU tensors that say they lie on cuda:0. Mixing raises, values can be compared."""

import common
import deepcluster

import pytest
import torch
from matplotlib import image
from torch import nn
from torch.backends import cudnn

internals = "_subclasses.fake_tensor", "utils._python_dispatch", "utils._pytree"
fake, dispatch, tree = (pytest.importorskip(f"torch.{name}") for name in internals)

CPU, GPU, aten = torch.device("cpu"), torch.device("cuda", 0), torch.ops.aten
MOVES, INDEXED = (aten._to_copy, aten.copy_), (aten.index, aten.index_put_)
VIEW = common.View(16, jitter=(0.4, 0.4, 0.2, 0.1), gray=0.3, blur=0.5, solarize=0.3)  # all colors


class Ghost(torch.Tensor):
    """A CPU tensor, .held, that says it lies on the GPU."""

    __torch_dispatch__ = classmethod(lambda *_: NotImplemented)  # what to do is up to Ghosts

    def __new__(cls, held):
        x = torch.Tensor._make_wrapper_subclass(cls, held.shape, held.stride(), dtype=held.dtype, device=GPU)
        x.held = held
        return x


class Ghosts(dispatch.TorchDispatchMode):
    """Computes as a machine with a GPU would, and refuses what it would refuse."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.overloadpacket, dict(kwargs or {})
        tensors = [x for x in tree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        ghosts = {id(x.held): x for x in tensors if isinstance(x, Ghost)}
        may_mix = name in MOVES or name in INDEXED and isinstance(args[0], Ghost)
        if ghosts and not may_mix and any(x.ndim and not isinstance(x, Ghost) for x in tensors):
            raise RuntimeError(f"{name}: tensors on GPU and CPU")
        there = kwargs["device"].type == "cuda" if kwargs.get("device") else bool(ghosts)
        kwargs |= {"device": CPU} if "device" in kwargs else {}
        with fake.unset_fake_temporarily():
            result = function(*held(args), **held(kwargs))
            result = result.clone() if name is aten._to_copy else result  # shared with nothing on the CPU
        return tree.tree_map_only(torch.Tensor, lambda x: ghosts.get(id(x), Ghost(x)) if there else x, result)


def held(result):
    return tree.tree_map_only(Ghost, lambda x: x.held, result)


@pytest.fixture
def gpu(monkeypatch):
    common.setup("cpu")
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda *_: (8, 0))
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **_: True)
    monkeypatch.setattr("torch.cuda.amp.common.amp_definitely_not_available", lambda: False)
    monkeypatch.setattr("torch.__future__._overwrite_module_params_on_conversion", True)
    if torch.__version__ < "2.14":
        pytest.skip(f"tensors that lie about their device were never tried with torch {torch.__version__}")
    monkeypatch.setattr(common.faiss, "get_num_gpus", lambda: 0)
    try:
        with fake.FakeTensorMode(allow_non_fake_inputs=True), Ghosts(), cudnn.flags(enabled=False):
            assert (torch.ones(2).to(GPU) + 1).is_cuda
            yield GPU
    except Exception as problem:
        pytest.skip(f"torch {torch.__version__} has other internals: {problem}")


def make_loader(device):
    pixels = torch.randint(256, (40, 3, 32, 32), generator=common.generator(1)).byte()
    data = common.Images("", pixels, None, torch.arange(40) % 4, list("0123"))
    return common.Loader(data, 8, 16, 0.5, device, 0)


def train(device, monkeypatch, options, left=None):
    """Loss of two steps and {(layer, type, channels last?)}; left: a part left on the CPU."""
    monkeypatch.setattr("torch.Tensor.backward", lambda loss: None)  # the real one asks the driver
    args = deepcluster.options(f"--data cifar10 --sobel --dropout 0 --image-size 16 --arch {options}".split())
    at, seen, loader = (lambda part: CPU if part == left else device), set(), make_loader(device)
    torch.manual_seed(0)
    encoder = common.to_device(deepcluster.make_encoder(args, 3)[1], at("encoder"))
    for m in (m for m in encoder.modules() if isinstance(m, (nn.Conv2d, common.Sobel))):
        m.register_forward_hook(lambda m, _, x: seen.add((type(m).__name__, x.dtype, x.stride(1) == 1)))
    loader.mean, targets = loader.mean.to(at("mean")), (torch.arange(40) % 4).to(at("targets"))
    head = deepcluster.make_head(encoder.dim, 4, common.generator(0)).to(at("head"))
    batches, optimizer = loader.train(torch.arange(16), [VIEW]), torch.optim.SGD(encoder.parameters(), 0.1)
    rest = torch.ones(40).to(at("weights")), common.Meter("", 16), args
    return deepcluster.train(encoder, head, optimizer, batches, targets, *rest), seen


@pytest.mark.parametrize("options", ["lenet5", "alexnet-small", "resnet18", "resnet18 --resnet-head A"])
def test_training_runs_in_bf16_and_channels_last(gpu, monkeypatch, options):
    found, seen = train(gpu, monkeypatch, options)
    assert abs(found / train(CPU, monkeypatch, options)[0] - 1) < 0.02
    assert seen == {("Sobel", torch.float32, True), ("Conv2d", torch.bfloat16, True)}


@pytest.mark.parametrize("left", ["encoder", "head", "mean", "targets", "weights"])
def test_a_part_of_training_left_on_the_cpu_raises(gpu, monkeypatch, left):
    with pytest.raises(RuntimeError, match="on GPU and CPU"):
        train(gpu, monkeypatch, "lenet5", left)


def cluster(device, method):
    args = deepcluster.options(f"--data digits --image-size 16 --k 4 --pca 6 --clustering {method}".split())
    encoder = common.to_device(deepcluster.make_encoder(args, 3)[1], device)
    assign, distance, k, model = deepcluster.cluster(encoder, make_loader(device), args, common.generator(1))
    common.save_clusters(common.Path(), make_loader(device), assign, distance)
    turned = {name: abs(model[name]) for name in ("axes", "centroids") if model.get(name) is not None}
    model |= turned  # the signs of eigenvectors are free
    return assign, distance, k, model, image.imread("clusters.png")


def features(device, n=40, d=9):
    return (torch.randn(n, d) * torch.linspace(1, 2, d)).to(device)


WORK = {
    "batches": lambda device: list(make_loader(device).train(torch.arange(40), [VIEW])),
    "cluster by k-means": lambda device: cluster(device, "kmeans"),
    "cluster by PIC": lambda device: cluster(device, "pic"),
    "cluster pixels": lambda device: common.baselines(make_loader(device), 4, common.generator(0)),
    "cluster copies": lambda device: common.kmeans(features(device, 4).repeat(9, 1), 8, torch.Generator())[3],
    "2049 nearest": lambda device: common.nearest(features(device), features(device, 2100), 2049)[0],
    "power iterations": lambda device: deepcluster.pca(features(device, d=8200), 2, common.generator(0)),
}


@pytest.mark.parametrize("name", WORK)
def test_the_same_as_on_the_cpu(gpu, monkeypatch, tmp_path_factory, name):
    def knn_gpu(resources, queries, keys, k, metric, device):
        assert k <= 2048 and device == 0 and queries.is_contiguous() and keys.is_contiguous()
        searches.append(k)
        return [Ghost(x) for x in common.faiss.knn(queries.held, keys.held, k, metric=metric)]

    found, searches = [], []
    monkeypatch.setattr(common, "gpu_resources", lambda: None)
    monkeypatch.setattr(common.faiss, "knn_gpu", knn_gpu, raising=False)
    for device, gpus in ((CPU, 0), (gpu, 0), (gpu, 1)):  # faiss without GPUs and with some
        monkeypatch.setattr(common.faiss, "get_num_gpus", lambda gpus=gpus: gpus)
        monkeypatch.chdir(tmp_path_factory.mktemp("run"))
        torch.manual_seed(0)
        found.append(held(WORK[name](device)))
    torch.testing.assert_close(found[1:], found[:1] * 2, rtol=1e-4, atol=1e-4)
    assert bool(searches) == name.startswith("cluster")


def test_mixed_or_not_finite_features_are_noticed(gpu):
    with pytest.raises(RuntimeError, match="on GPU and CPU"):
        common.nearest(features(gpu), features(CPU))
    with pytest.raises(SystemExit):
        common.check_finite(features(gpu) / 0)


@pytest.mark.parametrize("real, wanted", [(True, True), (True, False), (False, True)])
def test_autocast_where_bf16_is_not_emulated(gpu, monkeypatch, real, wanted):
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda **strict: real or not strict)
    with common.autocast(gpu, wanted):
        assert torch.is_autocast_enabled("cuda") == (real and wanted)


@pytest.mark.parametrize("step", [1, -1])
def test_mains_optimizer_takes_momentum_of_another_memory_layout(monkeypatch, step):
    layout, other = (torch.contiguous_format, torch.channels_last)[::step]
    made, sgd, expected = [], torch.optim.SGD, []
    monkeypatch.setattr("torch.optim.SGD", lambda *a, **more: pytest.fail(made.append(sgd(*a, **more))))
    monkeypatch.setattr(deepcluster, "to_device", lambda net, device: net.to(memory_format=layout))
    monkeypatch.setattr(
        "sys.argv", ["", "--data=digits", "--device=cpu", "--lr=0.1", "--momentum=0.5", "--wd=0"]
    )
    with pytest.raises(pytest.fail.Exception):  # by then the optimizer is made
        deepcluster.main()
    for w in made[0].param_groups[0]["params"]:
        m, w.grad = torch.randn(2, *w.shape)
        expected.append((w, w.detach() - 0.1 * (0.5 * m + w.grad)))
        made[0].state[w]["momentum_buffer"] = m.contiguous(memory_format=other) if m.ndim == 4 else m
    made[0].load_state_dict(made[0].state_dict())
    made[0].step()
    torch.testing.assert_close(*zip(*expected, strict=True))


def test_more_processes_than_gpus_end_with_one_line(monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "3")
    for rank in "012":
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit, match="2"):
            common.setup()
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 GPUs" in line
