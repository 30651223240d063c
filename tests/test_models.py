"""The networks, against their description; and loading, which executes nothing."""

import functools
import hashlib
import pickle

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


@pytest.mark.filterwarnings("error")
def test_a_checkpoint_of_the_authors_is_their_network(tmp_path, monkeypatch):
    checkpoint, network = released(0)
    path, x = tmp_path / "x.pth.tar", torch.rand(2, 3, 16, 16)
    for new in (True, False):  # they saved it in 2019, in torch's old format
        torch.save(checkpoint, path, _use_new_zipfile_serialization=new)
        with pytest.warns(UserWarning, match="its SHA-256 is none of the release's"):
            loaded = models.from_release(path)
        torch.testing.assert_close(loaded(x), network(x), rtol=1e-4, atol=1e-4)
        assert loaded(x).std() > 0.01
    monkeypatch.setattr(models, "RELEASED", {hashlib.sha256(path.read_bytes()).hexdigest()})
    models.from_release(path)  # says nothing: a warning is an error here


def test_what_is_not_a_checkpoint_of_the_authors_is_refused(tmp_path):
    path, (whole, _) = tmp_path / "x.pth.tar", released(0)
    state = whole["state_dict"]
    for wrong in (
        state,
        {"state_dict": dict(list(state.items())[:-2])},
        {"state_dict": state | {"layers.3.0.weight": torch.zeros(1)}},
        {"state_dict": state | {"module.layer0.weight": torch.zeros(1)}},
        {"state_dict": state | {"fc.weight": torch.zeros(5, 128)}},
        {"state_dict": nn.Linear(2, 2)},
    ):
        torch.save(wrong, path)
        with pytest.raises(ValueError, match="not a CIFAR-10 checkpoint of the authors"):
            models.from_release(path)
    with pytest.raises(ValueError, match="FileNotFoundError"):
        models.from_release(tmp_path / "absent")
