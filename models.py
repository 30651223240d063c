"""Section 4: the networks, on images with pixels in [0, 1], and how to load a trained one.

    cnn                two convolutions and two linear layers, no batch normalization: for small data sets
    resnext34          ResNeXt-34 (2x32), the paper's CIFAR-10 network, with a linear layer as its last
    resnext34-authors  the same as the authors trained it: batch normalization and a ReLU on the logits
    resnet9            nine layers that learn CIFAR-10 in minutes; resnet9-narrow: half as wide
    resnet50           the paper's ImageNet network, from torchvision; each block starts as the identity
    torchvision:NAME   any other classifier of torchvision, behind ImageNet's normalization
    FILE.py:FACTORY    anybody's: what a function or a class in a file makes

Normalization of the input, where a network wants it, is its first layer, so that every distance and every
step size in this project is in pixels.  Any activation can take the place of every ReLU that is a module.
"""

import argparse
import builtins
import contextlib
import difflib
import hashlib
import importlib
import inspect
import itertools
import os
import pkgutil
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils._python_dispatch import TorchDispatchMode

from runs import Unusable, launched, read_checkpoint, resolve

CIFAR10_MEAN, CIFAR10_STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
MEAN_STD = sum(IMAGENET_STD) / 3  # pixels, of range 0 to 1, to a normalized unit, about
NORMALIZED = {"resnet9", "resnet9-narrow", "resnet50"}  # models whose first layer is Normalize
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "celu": nn.CELU}
RECTIFIERS = nn.ReLU, nn.ReLU6, nn.LeakyReLU  # modules in whose place an activation can be put
# Around or in front of the names of weights; what a file may hold beside them, numpy's numbers and argparse's options.
WRAPPINGS = "state_dict", "model_state_dict", "model", "network", "net"
PREFIXES = "module.", "_orig_mod.", "network.", "model.", "net."
SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [np.dtype, type(np.dtype(float)), SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), argparse.Namespace]
SOURCE = "source.txt"  # of a run: the code of a user's network, to read
CLASSES = "classes", "num_classes", "n_classes"  # names of a factory's parameter for the number of classes
# Files that came with Python or by pip, none of a user's own.
INSTALLED = re.compile(rf"[\\/](site|dist)-packages[\\/]|^<|^{re.escape(os.path.dirname(os.__file__))}")
OURS = {"gradreg", "runs", "models", "data", "attacks", "bounds", "train", "evaluate", "report", "tui"}
HERE = Path(__file__).resolve().parent


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


class Residual(nn.Sequential):
    """x + what its layers make of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Scale(nn.Module):
    """Its input times a fixed factor."""

    def __init__(self, factor: float):
        super().__init__()
        self.factor = factor

    def forward(self, x: Tensor) -> Tensor:
        return self.factor * x


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

    body = conv_block(3, 32, 3)
    for channels in (32, 64, 128):
        if channels > 32:
            body += [*conv_block(channels // 2, channels, 1), nn.AvgPool2d(2)]
        body += [BranchBlock(channels) for _ in range(5)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes, bias=not authors_head)]
    if authors_head:
        head += [unscaled(nn.BatchNorm1d(classes)), nn.ReLU()]
    return nn.Sequential(*body, *head)


def resnet9(classes: int, width: int = 32) -> nn.Sequential:
    """The ResNet-9 of the DAWNBench entries (Page 2018) for a CPU: half as wide, its last stage a quarter as wide.

    Eight convolutions of 3x3 and a linear layer: 612k weights, 72 million products for an image of 32x32.

    Where a stage halves the image, pooling comes right after the convolution, before normalization and activation: a
    quarter of their work is left, and what they make is the same where they are increasing.  The logits are an eighth
    of the last layer's output, so that a large learning rate does not saturate the loss at once.
    """

    def conv(inputs: int, outputs: int, *pool: nn.Module) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), *pool, nn.BatchNorm2d(outputs), nn.ReLU()]

    def residual(channels: int) -> Residual:
        return Residual(*conv(channels, channels), *conv(channels, channels))

    a, b, c = width, 2 * width, 4 * width
    return nn.Sequential(
        Normalize(CIFAR10_MEAN, CIFAR10_STD),
        *conv(3, a),
        *conv(a, b, nn.MaxPool2d(2)),
        residual(b),
        *conv(b, c, nn.MaxPool2d(2)),
        *conv(c, c, nn.MaxPool2d(2)),
        residual(c),
        nn.AdaptiveMaxPool2d(1),
        nn.Flatten(),
        nn.Linear(c, classes, bias=False),
        Scale(1 / 8),
    )


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
    "resnet9": resnet9,
    "resnet9-narrow": lambda classes: resnet9(classes, width=16),
    "resnet50": resnet50,
}


def build(name: str, *, classes: int, channels: int = 3, activation: str = "relu", seed: int = 0) -> nn.Module:
    """The network `name`: images (N, channels, H, W) -> logits (N, classes).

    Weights are drawn from torch's default generator; those of FILE.py:FACTORY depend on the seed.  Raises Unusable for
    an unknown name or activation, a number of channels the network does not take, and what `from_file` refuses.
    """
    if activation not in ACTIVATIONS:
        raise Unusable(f"unknown activation {activation!r}: choose from {', '.join(ACTIVATIONS)}")
    if is_file(name):
        network = from_file(name, classes=classes, seed=seed)
    elif name == "cnn":
        network = cnn(classes, channels)
    elif name not in MODELS and not name.startswith("torchvision:"):
        raise Unusable(f"unknown model {name!r}: choose from {', '.join(MODELS)}, torchvision:NAME and FILE.py:FACTORY")
    elif channels != 3:
        raise Unusable(f"model {name} takes colour images (3 channels), these have {channels}: use the model cnn")
    else:
        network = MODELS[name](classes) if name in MODELS else from_torchvision(name, classes)
    return network if activation == "relu" else with_activation(network, activation)


def from_torchvision(name: str, classes: int) -> nn.Module:
    """torchvision:NAME with random weights, behind the normalization that torchvision's weights want."""
    from torchvision import models as theirs

    names, wanted = theirs.list_models(module=theirs), name.partition(":")[2]
    if wanted not in names:
        like = ", ".join(difflib.get_close_matches(wanted, names) or [*names[:5], "..."])
        raise Unusable(f"{name}: no classifier of torchvision; there are {like}")
    with one_line(name):
        return nn.Sequential(Normalize(IMAGENET_MEAN, IMAGENET_STD), theirs.get_model(wanted, num_classes=classes))


def with_activation(network: nn.Module, activation: str) -> nn.Module:
    """The same network, changed in place, with `activation` for every ReLU, ReLU6 and LeakyReLU that is a module.

    Raises Unusable where there is none.  What calls torch's relu function stays: `hidden_relus` counts it.
    """
    names = [name for name, m in network.named_modules(remove_duplicate=False) if isinstance(m, RECTIFIERS)]
    if not names:
        reason = "a relu that is called as a function cannot be replaced: write nn.ReLU() in its place"
        raise Unusable(f"--activation {activation}: there is no ReLU among the network's modules, and {reason}")
    for name in names:
        network.set_submodule(name, ACTIVATIONS[activation]())
    return network


@torch.no_grad()
def hidden_relus(network: nn.Module, images: Tensor) -> int:
    """How often a forward pass calls relu or what is like it: after `with_activation`, as functions."""
    aten, found = torch.ops.aten, []
    likes = {aten.relu, aten.relu_, aten.hardtanh, aten.hardtanh_, aten.leaky_relu, aten.leaky_relu_}

    class Count(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found.append(function.overloadpacket in likes)
            return function(*args, **(kwargs or {}))

    with Count():
        network(images)
    return sum(found)


# --- trained networks, and weights ------------------------------------------------------------------------


def load(path: str | os.PathLike) -> nn.Module:
    """The trained network of a run directory or a checkpoint file, in evaluation mode, on the CPU.

    Where it is FILE.py:FACTORY, that file is executed; what has changed in it since is said before.  Raises Unusable
    where `read_checkpoint` or `from_file` does, or where the weights do not fit the network.
    """
    path = Path(path)
    path = path / "checkpoint.pt" if path.is_dir() else path
    state = read_checkpoint(path)
    try:
        for line in changed_since(state["config"], path.parent):
            if launched()[0] == 0:
                print(f"warning: {path}: {line}", file=sys.stderr)
        network = from_config(state["config"])
        network.load_state_dict(state["model"])
    except Unusable as error:
        raise Unusable(f"{path}: {error}") from None
    except (RuntimeError, KeyError, TypeError, ValueError, AttributeError):
        raise Unusable(f"{path}: the weights do not fit the network its config names") from None
    return network.eval()


def from_config(config: dict[str, Any]) -> nn.Module:
    """The network that a run's config describes, with fresh weights."""
    options, sizes = config["options"], {key: config[key] for key in ("classes", "channels")}
    return build(options["model"], **sizes, activation=options["activation"], seed=options.get("seed", 0))


def changed_since(config: dict[str, Any], run: Path) -> list[str]:
    """A line for each file of a user's network that is not as it was when the run began, before it is executed.

    Raises Unusable for a file in the run directory itself: what came with a run is data, and is never executed.
    """
    file = Path(config["options"]["model"].rpartition(":")[0])
    if is_file(config["options"]["model"]) and file.resolve().is_relative_to(run.resolve()):
        raise Unusable(f"{file} lies in the run itself, from where nothing is executed: look at it, and move it away")
    now = {name: _digest(name) if Path(name).is_file() else None for name in config.get("sources", {})}
    changed = [name for name, digest in now.items() if digest != config["sources"][name]]
    how = {name: "has changed since this run began" if now[name] else "is gone" for name in changed}
    return [f"{name} {how[name]}: {run}/{SOURCE} has what it was" for name in changed]


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a state dict, by name: of a .pt, .pth or .safetensors file, or a run; on the CPU.

    Dictionaries around it, with an epoch or an optimizer beside it, are looked through (WRAPPINGS).  Nothing in the
    file is executed.  Raises Unusable where that would be needed, or where there are no weights.
    """
    path = resolve(Path(path))
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        if path.suffix == ".safetensors":
            from safetensors.torch import load_file

            found = load_file(path)
        else:
            with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except ModuleNotFoundError:
        raise Unusable(f"{path}: pip install safetensors reads it, or torch.save its state dict as .pt") from None
    except OSError as error:
        raise Unusable(f"{path}: {error.strerror or error}") from None
    except Exception as error:  # torch's and safetensors', of any kind
        if objects := re.findall(r"GLOBAL (\S+) was|(TorchScript) archive", str(error)):
            reason = f"more than weights ({''.join(objects[0])}), and reading that executes code; in the program that"
            reason += " made it, torch.save(network.state_dict(), 'weights.pt') saves weights alone"
            raise Unusable(f"{path}: it holds {reason}") from None
        raise Unusable(f"{path}: not a file of weights ({type(error).__name__})") from None
    while isinstance(found, dict) and (inner := [found[k] for k in WRAPPINGS if isinstance(found.get(k), dict)]):
        found = inner[0]
    weights = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise Unusable(f"{path}: no state dict in it; torch.save(network.state_dict(), 'weights.pt') makes one")
    return weights


def initialise(network: nn.Module, path: str | os.PathLike, *, classes: int, new_head: bool = False) -> list[str]:
    """Give the network the weights of `read_weights`, all of them; lines for the user on what was left out.

    Prefixes that wrappers add (PREFIXES) and a normalization in front that the file does not have are seen through.
    new_head: weights that differ in the number of classes alone, or lack in the file, keep what they are.  Raises
    Unusable, with names and shapes, for anything else that does not fit, and for weights that are not finite.
    """
    theirs, candidates, prefix = read_weights(path), [], ""
    while prefix is not None:
        theirs = {name.removeprefix(prefix): value for name, value in theirs.items()}
        candidates += [(module, theirs) for module in (network, coordinates(network)[1])]
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in theirs)), None)
    module, theirs = max(candidates, key=lambda pair: len(pair[0].state_dict().keys() & pair[1].keys()))
    ours = {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    there, here = ({name: tuple(value.shape) for name, value in state.items()} for state in (theirs, ours))
    odd = {n for n in there | here if there.get(n) != here.get(n)}
    odd -= {n for n in odd if n.endswith("num_batches_tracked") and n in here}  # not in files of old
    head = {n for n in odd if here.get(n, ())[:1] == (classes,) and there.get(n, here[n])[1:] == here[n][1:]}
    if wrong := sorted(odd - head if new_head else odd):
        shown = "; ".join(f"{n}: {there.get(n, 'nothing')} there, {here.get(n, 'nothing')} here" for n in wrong[:3])
        way = "; --new-head leaves out the last layer, for another number of classes" * (odd == head)
        raise Unusable(f"{path}: does not fit the network in {len(wrong)} of {len(there | here)} weights: {shown}{way}")
    if new_head and not head:
        raise Unusable(f"--new-head: all of {path} fits the network, for {classes} classes: leave it out")
    if broken := [name for name, value in theirs.items() if not value.isfinite().all()]:
        raise Unusable(f"{path}: {broken[0]} is not finite (weights that are not: {len(broken)})")
    module.load_state_dict({name: value for name, value in theirs.items() if name not in head}, strict=False)
    return [f"--new-head: {', '.join(sorted(head))} not taken from {path}: they begin at random"] if head else []


def from_release(path: str | os.PathLike) -> nn.Module:
    """The network in a CIFAR-10 checkpoint of the authors' release, as resnext34-authors, in evaluation mode.

    github.com/cfinlay/tulip names the files, with a SHA-256 to compare (cifar10/fetch_model.py).  Their layers come
    in our order, and so do the kernels and linear maps (of two or more dimensions) and, apart, the vectors of biases
    and normalizations; scales fixed at 1 are ours alone.  Raises Unusable where `read_weights` does, or where number
    or shapes of the weights do not fit.
    """
    network, theirs = build("resnext34-authors", classes=10), read_weights(path)
    fixed = {name for name, weight in network.named_parameters() if not weight.requires_grad}
    ours = {name: value for name, value in network.state_dict().items() if name not in fixed}
    orders = (sorted(state, key=lambda name, state=state: state[name].dim() < 2) for state in (ours, theirs))
    try:
        network.load_state_dict({name: theirs[other] for name, other in zip(*orders, strict=True)}, strict=False)
    except (ValueError, RuntimeError):
        raise Unusable(f"{path}: not a CIFAR-10 checkpoint of the authors' release") from None
    return network.eval()


# --- anybody's network: FILE.py:FACTORY --------------------------------------------------------------------


def is_file(name: str) -> bool:
    """Whether the name of a network means a user's file: FILE.py:FACTORY, or FILE.py, where FACTORY was forgotten."""
    return name.endswith(".py") or name.rpartition(":")[0].endswith(".py")


def absolute(name: str) -> str:
    """The name of a user's file, FILE.py:FACTORY or weights, in a form that holds from any working directory."""
    file, colon, factory = name.rpartition(":") if is_file(name) and not name.endswith(".py") else (name, "", "")
    return os.path.abspath(file) + colon + factory if is_file(name) or os.path.exists(name) else name


def from_file(spec: str, *, classes: int, seed: int = 0) -> nn.Module:
    """The network of a user's FILE.py:FACTORY: what a function or a class there makes, or a network itself.

    FACTORY is called with nothing, or with the number of classes where it has a parameter of that name (CLASSES).
    The file imports what it would under `python FILE.py` (`Neighbours`).  Random weights depend on the seed alone;
    the working directory, the default dtype and the gradient mode are afterwards what they were.
    Raises Unusable, in one line with file and line, for whatever goes wrong.
    """
    file, _, factory = spec.rpartition(":")
    if spec.endswith(".py") and Path(spec).is_file():
        raise Unusable(f"{spec}: name what makes the network, {spec}:FACTORY; {_offers(spec)}")
    if not (file.endswith(".py") and Path(file).is_file()):
        raise Unusable(f"{spec}: no such file (.py) or run; a target is a run directory or FILE.py:FACTORY")
    place, dtype, argv = Neighbours(Path(file).resolve()), torch.get_default_dtype(), sys.argv
    sys.argv = [file]  # the file may parse its command line, which is not ours
    try:
        with contextlib.chdir("."), torch.enable_grad(), place.inside(), one_line(spec):
            torch.manual_seed(seed)
            network = found = getattr(importlib.import_module(place.name), factory, None)
            if callable(found) and not isinstance(found, nn.Module):
                torch.manual_seed(seed)
                wanted = inspect.signature(found).parameters
                network = found(**{name: classes for name in CLASSES if name in wanted})
    finally:
        sys.argv = argv
        torch.set_default_dtype(dtype)
    if found is None:
        raise Unusable(f"{spec}: no {factory!r} in it; {_offers(file)}")
    if not isinstance(network, nn.Module):
        raise Unusable(f"{spec}: it gives a {type(network).__name__}; expected is a torch.nn.Module or what makes one")
    tensors = *network.parameters(), *network.buffers()
    if any(map(is_lazy, tensors)):
        raise Unusable(f"{spec}: it has lazy layers without weights; run one image through it in {factory}")
    if any(tensor.is_inference() for tensor in tensors):
        raise Unusable(f"{spec}: weights made in torch.inference_mode allow no gradient; use torch.no_grad there")
    # A module of TorchScript has no requires_grad_ of its own.
    return nn.Sequential(network) if isinstance(network, torch.jit.ScriptModule) else network


def _offers(file: str) -> str:
    """What a file defines that may make a network."""
    source = Path(file).read_text(encoding="utf-8", errors="replace")
    names = re.findall(r"^(?:def|class) ([^\W_]\w*)", source, re.MULTILINE)
    return f"there are {', '.join(names)}" if names else "there is no function or class in it"


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Context: what a user's code raises becomes an Unusable, with the innermost line of the user's own files.

    Running out of memory and Ctrl-C are the caller's to handle, and pass through.
    """
    try:
        yield
    except (torch.OutOfMemoryError, Unusable):
        raise
    except (Exception, SystemExit) as error:
        frames = traceback.extract_tb(error.__traceback__)
        ours = {str(HERE / f"{name}.py") for name in OURS}
        own = [f for f in frames if not INSTALLED.search(f.filename) and f.filename not in ours]
        said = " ".join(str(error).split())[:300]
        line = ": ".join(filter(None, (what, type(error).__name__, said)))
        if own:
            line += f" ({own[-1].filename}, line {own[-1].lineno})"
        elif "required positional argument" in line or "required keyword-only argument" in line:
            line += "; it gets the number of classes at most: write a function around it"
        if "no known parent package" in line:
            line += "; for relative imports put an empty __init__.py beside it"
        raise Unusable(line) from None


class Neighbours:
    """Imports as they would be under `python FILE.py`, where nobody has heard of this project.

    A user's own `models`, `data` or `utils` come before ours and before those of another user's file.  Afterwards
    ours are back, and the user's are put away for the next time.  What the file's code imports later, say in forward,
    it finds alike.  Where the user has no module of a name of ours it is ours, so that a file may `import models`.
    """

    opened: ClassVar[dict[Path, "Neighbours"]] = {}  # by file
    entered: ClassVar[list["Neighbours"]] = []  # the innermost last, and only that one in force

    def __init__(self, file: Path):
        folders = list(itertools.takewhile(lambda folder: (folder / "__init__.py").is_file(), file.parents))
        package = [folder.name for folder in reversed(folders)]
        own = [] if package and file.stem == "__init__" else [re.sub(r"\W", "_", file.stem if package else file.name)]
        self.file, self.name = file, ".".join(package + own)  # random.py is random_py, as no other module is called
        places = [file.parent, file.parents[len(folders)]]  # for `import layers`, and for the package's own name
        self.path = [*map(str, places), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]
        self.modules: dict[str, ModuleType] = {}  # put away: the user's or, inside the context, ours
        self.names = set(OURS)  # of both
        if package and not INSTALLED.search(str(file)):  # an installed package may have the same name
            self.names |= {name for name in sys.modules if name.partition(".")[0] == package[0]}
        self.builtins = vars(builtins) | {"__import__": self.import_}
        self.opened[file] = self

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Context: imports are the user's.  Within another one, that one is left for as long."""
        outer = self.entered[-1:]
        for place in (*outer, self):
            place.swap()
        self.entered.append(self)
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self.entered.pop()
            for place in (self, *outer):
                place.swap()

    def swap(self) -> None:
        """Exchange modules and path with those put away; done twice, all is as before."""
        away = {name: sys.modules.pop(name) for name in self.names if name in sys.modules}
        sys.modules.update(self.modules)
        self.modules, self.path, sys.path[:] = away, sys.path[:], self.path

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        """Where a module of the user's is; None for one that is installed.  (Python asks what is in sys.meta_path.)"""
        if name == self.name:
            spec = spec_from_file_location(name, self.file)
        else:
            spec, parent = PathFinder.find_spec(name, path), name.rpartition(".")[0]
            place = spec and (spec.origin or spec.submodule_search_locations[0])
            if not place or (parent not in self.names if parent else INSTALLED.search(place)):
                return None
        self.names.add(name)
        if isinstance(spec.loader, SourceFileLoader):
            spec.loader.create_module = self.create_module
        return spec

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """An empty module whose import statements are `import_`."""
        module = ModuleType(spec.name)
        module.__builtins__ = self.builtins
        return module

    def import_(self, name: str, *arguments: Any, **named: Any) -> ModuleType:
        """What an import statement in the user's code does, at once or later."""
        with self.inside():
            if name in OURS and name in self.modules and name not in sys.modules and not _exists(name):
                sys.modules[name] = self.modules[name]
            return __import__(name, *arguments, **named)


def _exists(name: str) -> bool:
    """Whether there is such a module but ours; a folder of images called data, or of weights called models, is none."""
    spec = PathFinder.find_spec(name)
    if spec and spec.origin:
        return Path(spec.origin).resolve().parent != HERE
    return bool(spec) and any(pkgutil.iter_modules(spec.submodule_search_locations))


def name_of_spec(spec: str) -> str:
    """A short name for FILE.py:FACTORY, fit for a file and different for each path: net-build-1f0c5a."""
    file, _, factory = spec.rpartition(":")
    path = Path(file).resolve()
    digest = hashlib.sha256(os.fsencode(path)).hexdigest()[:6]
    return re.sub(r"[^\w.-]", "_", f"{path.stem}-{factory}-{digest}")


def files_of(spec: str) -> list[Path]:
    """FILE.py and, once `from_file` has loaded it, the file of every module of the user's that it imported."""
    file = Path(spec.rpartition(":")[0]).resolve()
    modules = Neighbours.opened[file].modules if file in Neighbours.opened else {}
    theirs = [module for name, module in modules.items() if module is not sys.modules.get(name)]
    return [file, *sorted({Path(module.__file__) for module in theirs if getattr(module, "__file__", None)} - {file})]


def sources_of(name: str) -> dict[str, str]:
    """The SHA-256 of each of `files_of`, by its path; empty for a network that is no user's."""
    return {str(path): _digest(path) for path in (files_of(name) if is_file(name) else [])}


def _digest(path: str | os.PathLike) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def source_of(spec: str) -> bytes:
    """The content of `files_of`, each after a line with its name."""
    return b"\n".join(f"# --- {path.name}\n".encode() + path.read_bytes() for path in files_of(spec))


def check_output(network: nn.Module, images: Tensor, classes: int) -> str | None:
    """Raise Unusable, in one line that says how to wrap it, unless the network maps images to logits (N, classes).

    Refused: a submodule in training mode, by name; a forward pass that raises or works in place (the images stay
    as they are); any other type, shape or dtype; values that are not finite.  Returns a warning, in one line, for
    outputs that look like those of a softmax; otherwise None.
    """
    training = [name or "the network itself" for name, module in network.named_modules() if module.training]
    if training:
        raise Unusable(f"{training[0]} is in training mode (modules that are: {len(training)}): call eval() on it")
    given, weights = images.clone(), next(network.parameters(), images)
    types = f"weights are {weights.dtype} on {weights.device}, images {images.dtype} on {images.device}"
    with torch.no_grad(), one_line(f"the forward pass fails ({types})"):
        output = network(given)
    if given._version or not torch.equal(given, images):
        raise Unusable("the forward pass changes the images in place: let it begin with x = x.clone()")
    if odd := complaint(output, len(images), classes):
        raise Unusable(f"{odd}; expected are logits, a floating-point tensor of shape (images, {classes})")
    if (output < 0).any() or ((output.double().sum(1) - 1).abs() >= 1e-2).any():
        return None
    return (
        "the outputs look like probabilities (rows sum to 1): return logits, without the softmax; where it saturates"
        " gradients vanish, attacks go blind, and the network seems more robust than it is"
    )


def complaint(output: Any, n: int, classes: int) -> str | None:
    """What is wrong with the output for n images, and how to wrap the network; None where nothing is."""
    wrap = "wrap it in a module whose forward returns"
    if not isinstance(output, Tensor):
        parts = list(output) if isinstance(output, dict) else [0] if isinstance(output, tuple | list) else []
        part = ".logits" if hasattr(output, "logits") else f"[{parts[0]!r}]" if parts else ""
        return f"it returns a {type(output).__name__}" + (f": {wrap} network(x){part}" if part else "")
    shape = tuple(output.shape)
    if shape in ((n,), (n, 1)):
        return f"it returns one value an image, shape {shape}: if it is a logit z, {wrap} torch.stack([0 * z, z], 1)"
    if shape != (n, classes):
        counts = f": {shape[1]} classes, and the images have {classes}" if len(shape) == 2 and shape[0] == n else ""
        return f"it returns shape {shape} for {n} images{counts}"
    if not output.is_floating_point():
        return f"it returns {output.dtype}, rounded or quantised: {wrap} what comes before"
    return None if output.isfinite().all() else "its outputs are not finite"
