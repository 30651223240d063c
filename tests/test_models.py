"""The networks, against their description; and loading, which executes nothing."""

import argparse
import functools
import json
import pickle
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import models


def parameters(network):
    return sum(p.numel() for p in network.parameters() if p.requires_grad)


def test_resnext34_has_the_papers_shape():
    """34 layers with weights in a row: stem, 15 blocks of 2, 2 transitions, 1 linear; 3.9 million weights."""
    network = models.build("resnext34", classes=10)
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 34

    def block(c):  # 3x3 from c to 2c, normalization, 3x3 in two groups, normalization
        return 9 * c * 2 * c + 4 * c + 9 * c * 2 * c + 4 * c

    stem, half1, half2, head = 27 * 32 + 32, 32 * 64 + 64, 64 * 128 + 128, 128 * 10 + 10
    assert parameters(network) == stem + half1 + half2 + head + 5 * (block(32) + block(64) + block(128))
    shapes = []
    for m in network.modules():
        if isinstance(m, models.BranchBlock):
            m.register_forward_hook(lambda _, __, out: shapes.append(tuple(out.shape[1:])))
    assert network.eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)
    assert shapes == [(32, 32, 32)] * 5 + [(64, 16, 16)] * 5 + [(128, 8, 8)] * 5


def test_a_branch_block_is_the_mean_of_separate_branches():
    """Written out: each branch has its own half of both convolutions, and the two are averaged."""
    block = models.BranchBlock(4).eval()
    first, bn1, _, second, bn2 = block.body
    for bn in (bn1, bn2):
        nn.init.uniform_(bn.weight)
        nn.init.uniform_(bn.running_mean)
    x = torch.rand(3, 4, 5, 5)

    def normalise(z, bn, half):
        part = slice(4 * half, 4 * half + 4)
        scale = (bn.weight[part] / (bn.running_var[part] + bn.eps).sqrt())[:, None, None]
        return (z - bn.running_mean[part, None, None]) * scale + bn.bias[part, None, None]

    branches = []
    for half in range(2):
        part = slice(4 * half, 4 * half + 4)
        hidden = normalise(nn.functional.conv2d(x, first.weight[part], padding=1), bn1, half).relu()
        branches.append(normalise(nn.functional.conv2d(hidden, second.weight[part], padding=1), bn2, half))
    torch.testing.assert_close(block(x), (x + sum(branches) / 2).relu())


def test_the_authors_head_has_a_relu_on_the_logits_and_ours_does_not():
    x = torch.rand(8, 3, 8, 8)
    assert models.build("resnext34-authors", classes=10)(x).min() == 0
    assert models.build("resnext34", classes=10)(x).min() < 0


@pytest.mark.parametrize(("name", "width", "weights"), [("resnet9", 32, 611_872), ("resnet9-narrow", 16, 153_872)])
def test_resnet9_has_nine_layers_and_pools_before_it_normalises(name, width, weights):
    """With increasing scales and activation that is the ResNet-9 that pools last: the maximum commutes with them."""
    network = models.build(name, classes=10).eval()
    layers = [m for m in network.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(layers) == 9
    assert parameters(network) == weights
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.weight, 0.5, 2)
            nn.init.normal_(m.running_mean, std=0.1)
            nn.init.uniform_(m.running_var, 0.5, 2)
    images = torch.rand(2, 3, 32, 32)
    x = (images - network[0].mean) / network[0].std

    def conv(x, layer, norm):
        return norm(layer(x)).relu()

    convs, norms = layers[:-1], [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    pairs = list(zip(convs, norms, strict=True))
    x = F.max_pool2d(conv(conv(x, *pairs[0]), *pairs[1]), 2)
    x = x + conv(conv(x, *pairs[2]), *pairs[3])
    x = F.max_pool2d(conv(F.max_pool2d(conv(x, *pairs[4]), 2), *pairs[5]), 2)
    x = x + conv(conv(x, *pairs[6]), *pairs[7])
    torch.testing.assert_close(network(images), layers[-1](x.amax((2, 3))) / 8)
    assert convs[0].out_channels == width


def test_normalization_without_a_scale_keeps_it_at_one():
    network = models.build("resnext34", classes=10)
    fixed = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d) and not m.weight.requires_grad]
    assert len(fixed) == 3  # the stem and the two transitions
    assert all((m.weight == 1).all() and m.bias.requires_grad for m in fixed)


@pytest.mark.parametrize("name", ["cnn", "resnext34", "resnet50"])
@pytest.mark.parametrize(("activation", "kind"), [("gelu", nn.GELU), ("silu", nn.SiLU)])
def test_activation_replaces_every_relu(name, activation, kind):
    with torch.device("meta"):
        relu, other = (models.build(name, classes=10, activation=a) for a in ("relu", activation))
    found = [sum(isinstance(m, k) for m in network.modules()) for network, k in ((relu, nn.ReLU), (other, kind))]
    assert found[0] == found[1] > 0
    assert not any(isinstance(m, nn.ReLU) for m in other.modules())


def test_resnet50_normalises_first_and_starts_its_blocks_as_identities():
    network = models.build("resnet50", classes=5)
    mean, std = network[0].mean, network[0].std
    torch.testing.assert_close(network[0](mean.expand(1, 3, 4, 4) + std), torch.ones(1, 3, 4, 4))
    assert all((m.bn3.weight == 0).all() for m in network.modules() if hasattr(m, "bn3"))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: models.build("resnet7", classes=10), "unknown model 'resnet7'"),
        (lambda: models.build("cnn", classes=10, activation="elu"), "unknown activation 'elu'"),
        (lambda: models.build("resnext34", classes=10, channels=1), "colour images"),
    ],
)
def test_build_refuses_in_one_line(call, message):
    with pytest.raises(ValueError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


def checkpoint(network, **extra):
    options = {"model": "cnn", "activation": "gelu"}
    config = {"options": options, "classes": 10, "channels": 1}
    return {"config": config, "model": network.state_dict(), "step": 3} | extra


def test_load_gives_back_the_network(tmp_path):
    network = models.build("cnn", classes=10, channels=1, activation="gelu")
    torch.save(checkpoint(network), tmp_path / "checkpoint.pt")
    x = torch.rand(2, 1, 8, 8)
    for path in (tmp_path, tmp_path / "checkpoint.pt"):
        loaded = models.load(path)
        assert not loaded.training
        assert torch.equal(loaded(x), network.eval()(x))


def test_load_refuses_what_is_not_a_checkpoint_and_executes_nothing(tmp_path):
    network = models.build("cnn", classes=10, channels=1)
    path = tmp_path / "checkpoint.pt"
    torch.save(checkpoint(network), path)
    whole = path.read_bytes()
    marker = tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    def written(obj):
        torch.save(obj, path)
        return path.read_bytes()

    contents = {
        "truncated": whole[: len(whole) // 2],
        "empty": b"",
        "text": b"not a checkpoint",
        "pickle": pickle.dumps(Touch()),
        "code inside": written({"config": Touch(), "model": {}, "step": 0}),
        "another project's": written({"state_dict": {}}),
        "a tensor": written(torch.zeros(3)),
        "other weights": written(checkpoint(nn.Linear(2, 2))),
    }
    for name, content in contents.items():
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"checkpoint\.pt: ") as error:
            models.load(path)
        assert "\n" not in str(error.value), name
    assert not marker.exists()
    with pytest.raises(ValueError, match="No such file"):
        models.load(tmp_path / "absent.pt")


# --- the authors' release ----------------------------------------------------------------------------------


def released(seed):
    """A checkpoint in the layout of the authors' release, with random weights, and its network written out."""
    torch.manual_seed(seed)
    state, steps = {}, []

    def norm(name, channels, **affine):
        state.update({f"{name}.{key}": value for key, value in affine.items()})
        state[f"{name}.running_mean"], state[f"{name}.running_var"] = torch.randn(channels), torch.rand(channels) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    def normalised(name, z):
        weight, bias = (state.get(f"{name}.{key}") for key in ("weight", "bias"))
        return F.batch_norm(z, state[f"{name}.running_mean"], state[f"{name}.running_var"], weight, bias)

    def layer(name, apply, channels, *shape):
        state[f"{name}.weight"], state[f"{name}.bias"] = 0.1 * torch.randn(channels, *shape), torch.randn(channels)
        norm(f"{name}.bn", channels)
        bias = state[f"{name}.bias"].view(1, -1, *[1] * (len(shape) - 1))
        steps.append(lambda z: (normalised(f"{name}.bn", apply(z, state[f"{name}.weight"])) + bias).relu())

    def block(name, c):
        state[f"{name}.conv0.weight"] = 0.1 * torch.randn(2 * c, c, 3, 3)
        state[f"{name}.conv1.weight"] = 0.1 * torch.randn(2 * c, c, 3, 3)
        for bn in ("bn0", "bn1"):
            norm(f"{name}.{bn}", 2 * c, weight=torch.rand(2 * c), bias=torch.randn(2 * c))

        def forward(x):
            z = normalised(f"{name}.bn0", F.conv2d(x, state[f"{name}.conv0.weight"], padding=1)).relu()
            z = normalised(f"{name}.bn1", F.conv2d(z, state[f"{name}.conv1.weight"], padding=1, groups=2))
            return (x + sum(z.chunk(2, dim=1)) / 2).relu()

        steps.append(forward)

    layer("layer0", lambda z, w: F.conv2d(z, w, padding=1), 32, 3, 3, 3)
    for stage, c in enumerate((32, 64, 128)):
        if stage:
            layer(f"layers.{stage}.0", F.conv2d, c, c // 2, 1, 1)
            steps.append(lambda z: F.avg_pool2d(z, 2))
        for i in range(5):
            block(f"layers.{stage}.{i + 2 * bool(stage)}", c)
    layer("fc", lambda z, w: z.mean((2, 3)) @ w.T, 10, 128)
    checkpoint = {
        "ix": 1,
        "epoch": 200,
        "model": "ResNeXt34_2x32",
        "state_dict": state,
        "pct_err": np.float64(8),
        "loss": 0.1,
    }
    return checkpoint, lambda x: functools.reduce(lambda z, step: step(z), steps, x)


@pytest.mark.parametrize("new", [True, False])  # they saved it in 2019, in torch's old format
def test_a_checkpoint_of_the_authors_is_their_network(tmp_path, new):
    checkpoint, network = released(0)
    path, x = tmp_path / "x.pth.tar", torch.rand(2, 3, 16, 16)
    torch.save(checkpoint, path, _use_new_zipfile_serialization=new)
    loaded = models.from_release(path)
    torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-4)
    assert loaded(x).std() > 0.01


def test_what_is_not_a_checkpoint_of_the_authors_is_refused(tmp_path):
    path, (whole, _) = tmp_path / "x.pth.tar", released(0)
    state = whole["state_dict"]
    for wrong in (
        {"state_dict": dict(list(state.items())[:-2])},
        {"state_dict": state | {"layers.3.0.weight": torch.zeros(1)}},
        {"state_dict": state | {"module.layer0.weight": torch.zeros(1)}},
        {"state_dict": state | {"fc.weight": torch.zeros(5, 128)}},
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="not a CIFAR-10 checkpoint of the authors"):
            models.from_release(path)
    with pytest.raises(ValueError, match="No such file"):
        models.from_release(tmp_path / "absent")


# --- weights of anybody's ----------------------------------------------------------------------------------


def small(classes=3, normalize=False):
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network = nn.Sequential(body, nn.Linear(4, classes))
    return nn.Sequential(models.Normalize([0.5] * 3, [0.2] * 3), network) if normalize else network


def trained(seed=1, **how):
    torch.manual_seed(seed)
    network = small(**how)
    for m in network.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.normal_(m.running_mean)
            nn.init.uniform_(m.running_var, 0.5, 2)
    return network.eval()


def prefixed(state, *prefixes):
    return {"".join(prefixes) + name: value for name, value in state.items()}


WRAPPED = {
    "plain": lambda state: state,
    "DataParallel": lambda state: prefixed(state, "module."),
    "compiled, in ours": lambda state: prefixed(state, "_orig_mod.", "network."),
    "a checkpoint": lambda state: {
        "state_dict": state,
        "epoch": 3,
        "best": np.float64(0.5),
        "optimizer": {"state": {}},
    },
    "timm's": lambda state: {"model": prefixed(state, "module."), "args": argparse.Namespace(lr=0.1)},
    "the tutorial's": lambda state: {"epoch": 1, "model_state_dict": state, "loss": torch.tensor(0.5)},
    "Lightning's": lambda state: {"state_dict": prefixed(state, "model."), "global_step": 7},
    "a run": lambda state: {"config": {}, "model": state, "step": 3},
    "of torch before 0.4": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "half": lambda state: {n: v.half() if v.is_floating_point() else v for n, v in state.items()},
}


@pytest.mark.parametrize("kind", WRAPPED)
@pytest.mark.parametrize("normalize", [False, True])
def test_weights_are_found_in_whatever_they_are_wrapped(tmp_path, kind, normalize):
    """Also behind a normalization in front of the network, that the file knows nothing of."""
    source, target = trained(seed=1), trained(seed=2, normalize=normalize)
    torch.save(WRAPPED[kind](source.state_dict()), tmp_path / "weights.pt")
    assert models.initialise(target, tmp_path / "weights.pt", classes=3) == []
    x, (first, rest) = torch.rand(2, 3, 8, 8), models.coordinates(target)
    assert isinstance(first, models.Normalize) == normalize
    tolerance = {"rtol": 1e-2, "atol": 1e-2} if kind == "half" else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(rest(x), source(x), **tolerance)


def test_the_prefix_of_a_network_that_has_it_itself_stays(tmp_path):
    networks = [nn.ModuleDict({"model": nn.ModuleDict({"model": nn.Linear(2, 3)})}) for _ in range(2)]
    torch.save(networks[0].state_dict(), tmp_path / "weights.pt")
    models.initialise(networks[1], tmp_path / "weights.pt", classes=3)
    assert torch.equal(networks[0]["model"]["model"].weight, networks[1]["model"]["model"].weight)


def test_a_head_for_other_classes_is_left_out_only_when_asked(tmp_path):
    source, target = trained(seed=1, classes=5), trained(seed=2, classes=3)
    path, before = tmp_path / "weights.pt", target[1].weight.clone()
    torch.save(source.state_dict(), path)
    with pytest.raises(ValueError, match=r"1\.bias: \(5,\) there, \(3,\) here; 1\.weight: .*--new-head") as error:
        models.initialise(target, path, classes=3)
    assert "2 of 9 weights" in str(error.value)
    assert not torch.equal(target[0][0].weight, source[0][0].weight)  # nothing was taken
    (said,) = models.initialise(target, path, classes=3, new_head=True)
    assert "1.bias, 1.weight not taken" in said
    assert torch.equal(target[1].weight, before)
    assert torch.equal(target[0][0].weight, source[0][0].weight)
    with pytest.raises(ValueError, match=r"all of .* fits the network, for 5 classes: leave it out"):
        models.initialise(trained(seed=2, classes=5), path, classes=5, new_head=True)


def test_what_does_not_fit_is_named_with_shapes_and_count(tmp_path):
    state, path = trained().state_dict(), tmp_path / "weights.pt"
    wider = {"0.0.weight": torch.zeros(4, 3, 5, 5), "0.0.bias": torch.zeros(7)}
    for change, new_head, says in (
        (wider, False, r"2 of 9 weights: 0\.0\.bias: \(7,\) there, \(4,\) here; 0\.0\.weight: \(4, 3, 5, 5\) there"),
        (wider, True, r"2 of 9 weights"),
        ({"extra": torch.zeros(2)}, False, r"1 of 10 weights: extra: \(2,\) there, nothing here"),
        ({"1.weight": torch.tensor([[float("nan")] * 4] * 3)}, False, r"1\.weight is not finite"),
        ({"1.weight": torch.zeros(5, 6), "1.bias": torch.zeros(5)}, True, r"1 of 9 weights: 1\.weight: \(5, 6\)"),
    ):
        torch.save(state | change, path)
        with pytest.raises(ValueError, match=says) as error:
            models.initialise(trained(seed=2), path, classes=3, new_head=new_head)
        assert "\n" not in str(error.value)
    torch.save({n: v for n, v in state.items() if not n.startswith("0.1")}, path)
    with pytest.raises(ValueError, match=r"4 of 9 weights: 0\.1\.bias: nothing there, \(4,\) here; .*; .*$"):
        models.initialise(trained(seed=2), path, classes=3)


def test_files_of_other_things_are_refused_in_a_line_and_nothing_runs(tmp_path):
    path, marker = tmp_path / "weights.pt", tmp_path / "executed"

    class Touch:
        def __reduce__(self):
            return (type(marker).touch, (marker,))

    def script():
        torch.jit.script(nn.Linear(2, 2)).save(path)

    for write, says in (
        (
            lambda: torch.save(small(), path),
            r"more than weights \(torch\.nn\.\S+Sequential\).*save\(network\.state_dict",
        ),
        (lambda: torch.save({"state_dict": Touch()}, path), "more than weights"),
        (script, r"more than weights \(TorchScript\)"),
        (lambda: path.write_bytes(b"x"), "not a file of weights"),
        (lambda: path.write_bytes(b""), "not a file of weights"),
        (lambda: torch.save(torch.zeros(2), path), "no state dict in it"),
        (lambda: torch.save({"epoch": 3}, path), "no state dict in it"),
        (lambda: torch.save({0: torch.zeros(2)}, path), "no state dict in it"),
        (path.unlink, "No such file"),
        (path.mkdir, r"checkpoint\.pt: No such file"),
    ):
        write()
        with pytest.raises(ValueError, match=says) as error:
            models.read_weights(path)
        assert str(error.value).startswith(str(path))
        assert "\n" not in str(error.value)
        assert not marker.exists()


def test_safetensors_are_read_where_the_package_is(tmp_path, monkeypatch):
    path, state = tmp_path / "weights.safetensors", trained().state_dict()
    path.write_bytes(b"x" * 20)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "safetensors.torch", None)
        with pytest.raises(ValueError, match="pip install safetensors"):
            models.read_weights(path)
    package = pytest.importorskip("safetensors.torch")
    with pytest.raises(ValueError, match="not a file of weights"):
        models.read_weights(path)
    package.save_file(state, path)
    found = models.read_weights(path)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in state)


# --- torchvision's networks, and activations in anybody's --------------------------------------------------


def test_torchvisions_networks_come_behind_their_normalization(tmp_path):
    import torchvision

    network, theirs = models.build("torchvision:resnet18", classes=4).eval(), torchvision.models.resnet18(num_classes=4)
    torch.save(theirs.state_dict(), tmp_path / "resnet18.pth")
    models.initialise(network, tmp_path / "resnet18.pth", classes=4)
    x = torch.rand(2, 3, 32, 32)
    normalize = torchvision.transforms.Normalize(models.IMAGENET_MEAN, models.IMAGENET_STD)
    torch.testing.assert_close(network(x), theirs.eval()(normalize(x)))
    for name in ("torchvision:resnet19", "torchvision:fasterrcnn_resnet50_fpn", "torchvision:"):
        with pytest.raises(ValueError, match=f"{name}: no classifier of torchvision; there are "):
            models.build(name, classes=4)
    with pytest.raises(ValueError, match="colour images"):
        models.build("torchvision:resnet18", classes=4, channels=1)


class Hidden(nn.Module):
    """Two names for one ReLU, a ReLU6, and `calls` of the function."""

    def __init__(self, calls):
        super().__init__()
        self.calls, self.a, self.b, self.c = calls, nn.ReLU(), nn.Sequential(nn.ReLU6()), nn.Linear(4, 3)
        self.again = self.a

    def forward(self, x):
        x = self.b(self.again(self.a(x.flatten(1))))
        for call in (torch.relu, F.relu6, torch.Tensor.relu, lambda x: F.leaky_relu(x, 0.1))[: self.calls]:
            x = call(x)
        return self.c(x)


@pytest.mark.parametrize("calls", [0, 1, 4])
def test_an_activation_takes_the_place_of_modules_and_functions_are_counted(calls):
    network = models.with_activation(Hidden(calls), "celu")
    assert [type(m) for m in (network.a, network.again, network.b[0])] == [nn.CELU] * 3
    assert models.hidden_relus(network, torch.rand(2, 1, 2, 2)) == calls
    assert models.hidden_relus(torch.jit.script(nn.Sequential(nn.ReLU())), torch.rand(2, 2)) == 1


def test_a_network_without_a_relu_that_is_a_module_is_refused():
    with pytest.raises(ValueError, match="no ReLU among the network's modules, and a relu that is called"):
        models.with_activation(nn.Sequential(nn.Linear(2, 2), nn.GELU()), "silu")


KEPT = sorted((Path(__file__).parent.parent / "results" / "networks").glob("*/checkpoint.pt"))


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.parent.name)
def test_a_network_that_is_kept_opens_as_a_run_and_knows_no_place(path):
    network, config = models.load(path.parent), json.loads((path.parent / "config.json").read_text())
    logits = network(torch.rand(2, config["channels"], 32, 32))
    assert logits.shape == (2, config["classes"])
    assert not any(isinstance(value, str) and value.startswith("/") for value in config["options"].values())
    card = (path.parent.parent / "README.md").read_text()
    assert path.parent.name in card


def test_some_networks_are_kept():
    assert KEPT
