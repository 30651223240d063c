"""Section 4: the networks, on images with pixels in [0, 1], and how to load a trained one.

    cnn                two convolutions and two linear layers, no batch normalization: for small data sets
    resnext34          ResNeXt-34 (2x32), the paper's CIFAR-10 network, with a linear layer as its last
    resnext34-authors  the same as the authors trained it: batch normalization and a ReLU on the logits
    resnet50           the paper's ImageNet network, from torchvision; each block starts as the identity

Normalization of the input, where a network wants it, is its first layer, so that every distance and every
step size in this project is in pixels.  Any activation can take the place of every ReLU.
"""

import importlib.util
import os
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from runs import Failure, Unusable, read_checkpoint

IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MEAN_STD = sum(IMAGENET_STD) / 3  # pixels, of range 0 to 1, to a normalized unit, about
NORMALIZED = {"resnet50"}  # models whose first layer is Normalize
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}


class Normalize(nn.Module):
    """(x - mean) / std for each channel; a network's first layer."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def unscaled(norm: nn.Module) -> nn.Module:
    """Batch normalization with a bias but no scale: its weight stays 1, as in the authors' stem and head."""
    norm.weight.requires_grad_(False)
    return norm


def coordinates(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two modules, one after the other the same as `network`: Normalize, or the identity, and the rest."""
    if isinstance(network, nn.Sequential) and isinstance(network[0], Normalize):
        return network[0], network[1] if len(network) == 2 else network[1:]
    return nn.Identity(), network


class BranchBlock(nn.Module):
    """relu(x + mean of `branches` two-layer branches): a ResNeXt block that averages its branches.

    The branches are the groups of the second convolution; all read the same input.
    """

    def __init__(self, channels: int, branches: int = 2):
        super().__init__()
        width = channels * branches
        self.branches = branches
        self.body = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1, groups=branches, bias=False),
            nn.BatchNorm2d(width),
        )
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.body(x).unflatten(1, (self.branches, -1)).mean(1))


def resnext34(classes: int, *, authors_head: bool = False) -> nn.Sequential:
    """ResNeXt-34 (2x32): a 3x3 stem, three stages of five blocks with 32, 64, 128 channels, average, linear.

    authors_head=True ends as the authors' network: batch normalization, a bias and a ReLU on the logits.
    """

    def conv_block(inputs: int, outputs: int, kernel: int) -> list[nn.Module]:
        conv = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, bias=False)
        return [conv, unscaled(nn.BatchNorm2d(outputs)), nn.ReLU()]

    def stage(channels: int) -> list[nn.Module]:
        return [BranchBlock(channels) for _ in range(5)]

    def half(channels: int) -> list[nn.Module]:
        return [*conv_block(channels, 2 * channels, 1), nn.AvgPool2d(2)]

    body = [*conv_block(3, 32, 3), *stage(32), *half(32), *stage(64), *half(64), *stage(128)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes, bias=not authors_head)]
    if authors_head:
        head += [unscaled(nn.BatchNorm1d(classes)), nn.ReLU()]
    return nn.Sequential(*body, *head)


def cnn(classes: int, channels: int = 1) -> nn.Sequential:
    """A small network for small images; its average pooling to 4x4 makes it independent of their size."""
    return nn.Sequential(
        nn.Conv2d(channels, 32, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(32, 64, 3, padding=1),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(4),
        nn.Flatten(),
        nn.Linear(64 * 16, 128),
        nn.ReLU(),
        nn.Linear(128, classes),
    )


def resnet50(classes: int) -> nn.Sequential:
    """ResNet-50 behind ImageNet's normalization."""
    import torchvision  # here, since it takes a second to import and only this network needs it

    network = torchvision.models.resnet50(num_classes=classes, zero_init_residual=True)
    return nn.Sequential(Normalize(IMAGENET_MEAN, IMAGENET_STD), network)


MODELS = {
    "cnn": cnn,
    "resnext34": resnext34,
    "resnext34-authors": lambda classes: resnext34(classes, authors_head=True),
    "resnet50": resnet50,
}


def build(name: str, *, classes: int, channels: int = 3, activation: str = "relu") -> nn.Module:
    """The network `name`: images (N, channels, H, W) -> logits (N, classes).  Weights: torch's default generator.

    Raises ValueError for an unknown name or activation, or a number of channels the network does not take.
    """
    if name not in MODELS:
        raise ValueError(f"unknown model {name!r}: choose from {', '.join(MODELS)}")
    if activation not in ACTIVATIONS:
        raise ValueError(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if name != "cnn" and channels != 3:
        raise ValueError(f"model {name} takes colour images (3 channels), these have {channels}: use the model cnn")
    network = cnn(classes, channels) if name == "cnn" else MODELS[name](classes)
    return with_activation(network, activation)


def with_activation(network: nn.Module, activation: str) -> nn.Module:
    """The same network, changed in place, with every ReLU replaced by `activation`."""
    for name, child in network.named_children():
        if isinstance(child, nn.ReLU):
            setattr(network, name, ACTIVATIONS[activation]())
        else:
            with_activation(child, activation)
    return network


def load(path: str | os.PathLike) -> nn.Module:
    """The trained network of a run directory or a checkpoint file, in evaluation mode, on the CPU.

    Raises Unusable where `read_checkpoint` does or where the weights do not fit the network.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    try:
        network = from_config(state["config"])
        network.load_state_dict(state["model"])
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise Unusable(f"{path}: the weights do not fit the network its config names") from None
    return network.eval()


def from_config(config: dict[str, Any]) -> nn.Module:
    """The network that a run's config describes, with fresh weights."""
    options = config["options"]
    return build(
        options["model"],
        classes=config["classes"],
        channels=config["channels"],
        activation=options["activation"],
    )


def from_file(spec: str, *, classes: int, seed: int = 0) -> nn.Module:
    """The network that a stranger's FILE.py:FACTORY returns; its weights, where they are random, depend on the seed.

    Raises Failure, in one line, for whatever goes wrong in there.
    """
    file, _, factory = spec.rpartition(":")
    if not Path(file).is_file():
        raise Failure(f"{spec}: no such file or run; a target is a run directory or FILE.py:FACTORY", 2)
    module_spec = importlib.util.spec_from_file_location(f"target_{Path(file).stem}", file)
    sys.path.insert(0, str(Path(file).resolve().parent))  # so that the file can import its neighbours
    try:
        module = importlib.util.module_from_spec(module_spec)
        module_spec.loader.exec_module(module)
        torch.manual_seed(seed)
        network = getattr(module, factory)()
    except Exception as error:  # anything can happen in somebody's file
        raise Failure(f"{spec}: {type(error).__name__}: {error}", 2) from None
    finally:
        sys.path.pop(0)
    if not isinstance(network, nn.Module):
        raise Failure(f"{spec}: returned a {type(network).__name__}, not a torch.nn.Module", 2)
    return network
