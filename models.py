"""Section 4: the networks (`MODELS`), anybody's (torchvision:NAME, FILE.py:FACTORY), and how to load a trained one.

Images have pixels in [0, 1], and every distance is in pixels: normalization, if any, is a network's first layer.
"""

import argparse
import builtins
import contextlib
import difflib
import importlib
import inspect
import os
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from hashlib import sha256
from importlib import machinery, util
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils.flop_counter import FlopCounterMode

from runs import Unusable, launched, read_checkpoint

CIFAR10_MEAN, CIFAR10_STD = [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]
IMAGENET_MEAN, IMAGENET_STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
ACTIVATIONS = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU, "celu": nn.CELU}
# Around or in front of the names of weights; what a file may hold beside them, numpy's numbers and argparse's options.
WRAPPINGS = "state_dict", "model_state_dict", "model", "network", "net"
PREFIXES = "module.", "_orig_mod.", "network.", "model.", "net."
SCALAR = np.float64(0).__reduce__()[0]
HARMLESS = [np.dtype, type(np.dtype(float)), SCALAR, (SCALAR, "numpy.core.multiarray.scalar"), argparse.Namespace]
SOURCE = "source.txt"  # of a run: the code of a user's network, to read
CLASSES = "classes", "num_classes", "n_classes"  # names of a factory's parameter for the number of classes
OURS = {"gradreg", "runs", "models", "data", "attacks", "bounds", "train", "evaluate", "report", "tui"}
HERE = Path(__file__).resolve().parent
# Files that came with Python or by pip, and ours: none of a user's own.
FOREIGN = rf"[\\/](site|dist)-packages[\\/]|^<|^{re.escape(os.path.dirname(os.__file__))}"
FOREIGN = re.compile(rf"{FOREIGN}|^{re.escape(str(HERE))}[\\/]({'|'.join(OURS)})\.py$")


class Normalize(nn.Module):
    """(x - mean) / std for each channel; a network's first layer."""

    def __init__(self, mean: list[float], std: list[float]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean)[:, None, None])
        self.register_buffer("std", torch.tensor(std)[:, None, None])

    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.std


def coordinates(network: nn.Module) -> tuple[nn.Module, nn.Module]:
    """Two modules, one after the other the same as `network`: Normalize, or the identity, and the rest."""
    if isinstance(network, nn.Sequential) and isinstance(network[0], Normalize):
        return network[0], network[1] if len(network) == 2 else network[1:]
    return nn.Identity(), network


class Residual(nn.Sequential):
    """x + what its layers make of x."""

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


def conv(inputs: int, outputs: int, kernel: int = 3, *, groups: int = 1, pool: bool = False) -> list[nn.Module]:
    """A convolution, pooling if so, batch normalization and a ReLU."""
    first = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
    return [first, *[nn.MaxPool2d(2)] * pool, nn.BatchNorm2d(outputs), nn.ReLU()]


class BranchBlock(nn.Module):
    """relu(x + mean of two branches of two layers, the groups of the second convolution): ResNeXt's, averaged."""

    def __init__(self, channels: int):
        super().__init__()
        self.body = nn.Sequential(*conv(channels, 2 * channels), *conv(2 * channels, 2 * channels, groups=2)[:-1])
        self.activation = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(x + self.body(x).unflatten(1, (2, -1)).mean(1))


def resnext34(classes: int, *, authors_head: bool = False) -> nn.Sequential:
    """ResNeXt-34 (2x32), the paper's CIFAR-10 network; the authors' has normalization and a ReLU on its logits."""
    layers = conv(3, 32)
    for channels in (32, 64, 128):
        if channels > 32:
            layers += [*conv(channels // 2, channels, kernel=1), nn.AvgPool2d(2)]
        layers += [BranchBlock(channels) for _ in range(5)]
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, classes, bias=not authors_head)]
    layers += [nn.BatchNorm1d(classes), nn.ReLU()] if authors_head else []
    for layer in layers:
        if isinstance(layer, nn.BatchNorm2d | nn.BatchNorm1d):  # outside the blocks its scale stays 1, as the authors'
            layer.weight.requires_grad_(False)
    return nn.Sequential(*layers)


def resnet9(classes: int, width: int = 32) -> nn.Sequential:
    """The ResNet-9 of the DAWNBench entries (Page 2018) for a CPU: half as wide, its last stage a quarter as wide.

    612k weights, 72 million products for 32x32.  Pooling precedes normalization and activation: a quarter of the work,
    no change where they increase.  The last layer sees an eighth of its input, lest large steps saturate the loss.
    """
    a, b, c = width, 2 * width, 4 * width
    layers = [Normalize(CIFAR10_MEAN, CIFAR10_STD), *conv(3, a), *conv(a, b, pool=True)]
    layers += [Residual(*conv(b, b), *conv(b, b)), *conv(b, c, pool=True), *conv(c, c, pool=True)]
    eighth = nn.Sequential(nn.AdaptiveMaxPool2d(1), nn.AvgPool2d(1, divisor_override=8))
    layers += [Residual(*conv(c, c), *conv(c, c)), eighth, nn.Flatten(), nn.Linear(c, classes, bias=False)]
    return nn.Sequential(*layers)


def cnn(classes: int, channels: int = 1) -> nn.Sequential:
    """A small network for small images; its average pooling to 4x4 makes it independent of their size."""
    layers = [nn.Conv2d(channels, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 3, padding=1), nn.ReLU()]
    head = nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64 * 16, 128), nn.ReLU(), nn.Linear(128, classes)
    return nn.Sequential(*layers, *head)


def from_torchvision(name: str, classes: int, **options: Any) -> nn.Sequential:
    """torchvision:NAME with random weights, behind the normalization that torchvision's weights want."""
    from torchvision import models as theirs  # here, since it takes a second to import

    names, wanted = theirs.list_models(module=theirs), name.partition(":")[2]
    if wanted not in names:
        like = ", ".join(difflib.get_close_matches(wanted, names) or [*names[:5], "..."])
        raise Unusable(f"{name}: no classifier of torchvision; there are {like}")
    with one_line(name):
        network = theirs.get_model(wanted, num_classes=classes, **options)
    return nn.Sequential(Normalize(IMAGENET_MEAN, IMAGENET_STD), network)


MODELS = {
    "cnn": cnn,
    "resnext34": resnext34,
    "resnext34-authors": lambda classes: resnext34(classes, authors_head=True),
    "resnet9": resnet9,
    "resnet9-narrow": lambda classes: resnet9(classes, width=16),
    "resnet50": lambda classes: from_torchvision("torchvision:resnet50", classes, zero_init_residual=True),
}


def build(name: str, *, classes: int, channels: int = 3, activation: str = "relu", seed: int = 0) -> nn.Module:
    """The network `name`: images (N, channels, H, W) -> logits (N, classes); the seed is for FILE.py."""
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


def with_activation(network: nn.Module, activation: str) -> nn.Module:
    """The same network, with `activation` for every module that is a ReLU or one like it; Unusable without any."""
    kinds = nn.ReLU, nn.ReLU6, nn.LeakyReLU
    names = [name for name, m in network.named_modules(remove_duplicate=False) if isinstance(m, kinds)]
    if not names:
        what = f"--activation {activation}: there is no ReLU among the network's modules"
        raise Unusable(f"{what}, and a relu that is called as a function cannot be replaced: write nn.ReLU() for it")
    for name in names:
        network.set_submodule(name, ACTIVATIONS[activation]())
    return network


def hidden_relus(network: nn.Module, images: Tensor) -> int:
    """How often a forward pass calls relu or what is like it: after `with_activation`, as functions."""
    kinds = "relu", "relu_", "hardtanh", "hardtanh_", "leaky_relu", "leaky_relu_"
    likes = {getattr(torch.ops.aten, kind): lambda *_, **__: 1 for kind in kinds}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=likes) as seen:
        network(images)
    return sum(seen.get_flop_counts()["Global"].get(like, 0) for like in likes)


def load(path: str | os.PathLike) -> nn.Module:
    """The trained network of a run directory or a checkpoint file, in evaluation mode, on the CPU.

    FILE.py is executed; what has changed in it is said before.  Raises Unusable, also where weights do not fit.
    """
    path = Path(path, "checkpoint.pt") if Path(path).is_dir() else Path(path)
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


def read_weights(path: str | os.PathLike) -> dict[str, Tensor]:
    """The tensors of a state dict, by name: of a .pt, .pth or .safetensors file, or a run; on the CPU.

    Dictionaries around it (WRAPPINGS) are looked through.  Nothing in the file is executed: Unusable where it must be.
    """
    path, advice = Path(path).resolve(), "torch.save(network.state_dict(), 'weights.pt')"
    path = path / "checkpoint.pt" if path.is_dir() else path
    try:
        if path.suffix == ".safetensors":
            found = importlib.import_module("safetensors.torch").load_file(path)
        else:
            with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings(action="ignore"):
                found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch's and safetensors', of any kind
        reason = f"not a file of weights ({type(error).__name__})"
        if isinstance(error, ModuleNotFoundError):
            reason = "pip install safetensors reads it, or torch.save its state dict as .pt"
        elif isinstance(error, OSError):
            reason = error.strerror or error
        elif objects := re.findall(r"GLOBAL (\S+) was|(TorchScript) archive", str(error)):
            reason = f"it holds more than weights ({''.join(objects[0])}), and reading that executes code;"
            reason += f" in the program that made it, {advice} saves weights alone"
        raise Unusable(f"{path}: {reason}") from None
    while isinstance(found, dict) and (inner := [found[k] for k in WRAPPINGS if isinstance(found.get(k), dict)]):
        found = inner[0]
    weights = {k: v for k, v in found.items() if isinstance(v, Tensor)} if isinstance(found, dict) else {}
    if not weights or not all(isinstance(name, str) for name in weights):
        raise Unusable(f"{path}: no state dict in it; {advice} makes one")
    return weights


def initialise(network: nn.Module, path: str | os.PathLike, *, classes: int, new_head: bool = False) -> list[str]:
    """Give the network the weights of `read_weights`, all of them; lines for the user on what was left out.

    PREFIXES, and a normalization in front that the file does not have, are seen through.  new_head: weights that differ
    in the number of classes alone, or lack in the file, stay as they are.  Unusable, with names, for anything else.
    """
    theirs, candidates, prefix = read_weights(path), [], ""
    while prefix is not None:
        theirs = {name.removeprefix(prefix): value for name, value in theirs.items()}
        candidates += [(module, theirs) for module in (network, coordinates(network)[1])]
        prefix = next((p for p in PREFIXES if all(name.startswith(p) for name in theirs)), None)
    module, theirs = max(candidates, key=lambda pair: len(pair[0].state_dict().keys() & pair[1].keys()))
    states = theirs, {name: value for name, value in module.state_dict().items() if isinstance(value, Tensor)}
    there, here = ({name: tuple(value.shape) for name, value in state.items()} for state in states)
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

    github.com/cfinlay/tulip names the files.  Kernels come in our order and, apart, vectors; scales fixed at 1 do not.
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


def parts(name: str) -> tuple[str, str]:
    """FILE.py and FACTORY, empty where it was forgotten, of a user's network; two empty names for any other."""
    file, _, factory = (name, "", "") if name.endswith(".py") else name.rpartition(":")
    return (file, factory) if file.endswith(".py") else ("", "")


def is_file(name: str) -> bool:
    """Whether the name of a network means a user's file."""
    return bool(parts(name)[0])


def absolute(name: str) -> str:
    """The name of a user's network, or of weights, in a form that holds from any working directory."""
    file, factory = parts(name)
    return f"{os.path.abspath(file)}:{factory}" if file else os.path.abspath(name) if os.path.exists(name) else name


def name_of_spec(spec: str) -> str:
    """A short name for FILE.py:FACTORY, fit for a file and different for each path: net-build-1f0c5a."""
    path, factory = Path(parts(spec)[0]).resolve(), parts(spec)[1]
    return re.sub(r"[^\w.-]", "_", f"{path.stem}-{factory}-{sha256(os.fsencode(path)).hexdigest()[:6]}")


def from_file(spec: str, *, classes: int, seed: int = 0) -> nn.Module:
    """The network of a user's FILE.py:FACTORY: what a function or a class there makes, or a network itself.

    FACTORY is called with nothing, or with the number of classes where it has a parameter of that name (CLASSES).
    Random weights depend on the seed alone; working directory, default dtype and gradient mode are afterwards what
    they were.  Raises Unusable, in one line with file and line, for whatever goes wrong.
    """
    file, factory = parts(spec)
    if not Path(file).is_file():
        raise Unusable(f"{spec}: no such file")
    place, dtype, argv = Neighbours(Path(file).resolve()), torch.get_default_dtype(), sys.argv
    sys.argv = [file]  # the file may parse its command line, which is not ours
    try:
        with contextlib.chdir("."), torch.enable_grad(), place.inside(), one_line(spec):
            torch.manual_seed(seed)
            module = importlib.import_module(place.name)
            network = found = getattr(module, factory, None)
            if callable(found) and not isinstance(found, nn.Module):
                torch.manual_seed(seed)
                network = found(**{n: classes for n in CLASSES if n in inspect.signature(found).parameters})
    finally:
        sys.argv = argv
        torch.set_default_dtype(dtype)
    if found is None:
        names = [name for name, value in vars(module).items() if getattr(value, "__module__", "") == place.name]
        what = f"no {factory!r} in it" if factory else f"name what makes the network, {file}:FACTORY"
        raise Unusable(f"{spec}: {what}; there are {', '.join(names) or 'no functions and no classes'}")
    if not isinstance(network, nn.Module):
        raise Unusable(f"{spec}: it gives a {type(network).__name__}; expected is a torch.nn.Module or what makes one")
    if any(map(is_lazy, [*network.parameters(), *network.buffers()])):
        raise Unusable(f"{spec}: it has lazy layers without weights; run one image through it in {factory}")
    return nn.Sequential(network) if isinstance(network, torch.jit.ScriptModule) else network  # it lacks requires_grad_


@contextlib.contextmanager
def one_line(what: str) -> Iterator[None]:
    """Context: what a user's code raises, but for a lack of memory, becomes an Unusable with a line of the user's."""
    try:
        yield
    except (torch.OutOfMemoryError, Unusable):
        raise
    except (Exception, SystemExit) as error:
        own = [f for f in traceback.extract_tb(error.__traceback__) if not FOREIGN.search(f.filename)]
        line = ": ".join(filter(None, (what, type(error).__name__, " ".join(str(error).split())[:300])))
        if own:
            line += f" ({own[-1].filename}, line {own[-1].lineno})"
        elif "required positional argument" in line or "required keyword-only argument" in line:
            line += "; it gets the number of classes at most: write a function around it"
        if "no known parent package" in line:
            line += "; for relative imports put an empty __init__.py beside it"
        raise Unusable(line) from None


class Neighbours:
    """Imports as they would be under `python FILE.py`, where nobody has heard of this project.

    A user's own `models` or `utils` come before ours and another file's; ours are found where a user has none.
    """

    opened: ClassVar[dict[Path, set[Path]]] = {}  # all files of the user's, by the one that was named
    inner: ClassVar["Neighbours | None"] = None  # the one in force

    def __init__(self, file: Path):
        root, name = file.parent, re.sub(r"\W", "_", file.stem)
        while (root / "__init__.py").is_file():  # a package: its modules know each other by its name
            root, name = root.parent, f"{root.name}.{name}"
        self.name = name.removesuffix(".__init__") if "." in name else f"{name}_py"  # random.py is no `random`
        self.path = [str(file.parent), str(root), *(entry for entry in sys.path if Path(entry).resolve() != HERE)]
        self.file, self.files, self.modules, self.ours = file, {file}, {}, {}
        self.names = set(OURS)  # and those of the user's modules
        if "." in name and not FOREIGN.search(str(file)):  # an installed package may have the same name
            self.names |= {other for other in sys.modules if other.partition(".")[0] == name.partition(".")[0]}
        self.opened[file] = self.files

    @contextlib.contextmanager
    def inside(self) -> Iterator[None]:
        """Context: imports are the user's, and neither ours nor, within that of another file, that one's."""
        outer, path = Neighbours.inner, sys.path[:]
        hidden = self.names | (outer.names if outer else set())
        away = {name: sys.modules.pop(name) for name in hidden & sys.modules.keys()}
        self.ours = outer.ours if outer else away
        sys.modules.update(self.modules)
        sys.path[:], Neighbours.inner = self.path, self
        sys.meta_path.insert(0, self)
        try:
            yield
        finally:
            sys.meta_path.remove(self)
            self.modules = {name: sys.modules.pop(name) for name in self.names & sys.modules.keys()}
            self.path, sys.path[:], Neighbours.inner = sys.path[:], path, outer
            sys.modules.update(away)

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> machinery.ModuleSpec | None:
        """Where a module of the user's is, whose import statements are `import_`; None for any other."""
        find = machinery.PathFinder.find_spec
        spec = util.spec_from_file_location(name, self.file) if name == self.name else find(name, path)
        place = spec and (spec.origin or spec.submodule_search_locations[0])
        if not place or (FOREIGN.search(place) and name != self.name):
            return None
        self.names.add(name)
        if isinstance(spec.loader, machinery.SourceFileLoader):
            self.files.add(Path(place))
            module = ModuleType(name)
            module.__builtins__ = vars(builtins) | {"__import__": self.import_}
            spec.loader.create_module = lambda spec: module
        return spec

    def import_(self, name: str, *arguments: Any, **named: Any) -> ModuleType:
        """What an import statement in the user's code does, at once or later, say in forward."""
        with contextlib.nullcontext() if Neighbours.inner is self else self.inside():
            if name in OURS and name in self.ours and name not in sys.modules and not self.find_spec(name):
                sys.modules[name] = self.ours[name]
            return __import__(name, *arguments, **named)


def changed_since(config: dict[str, Any], run: Path) -> list[str]:
    """A line for each file of a user's network that is not what it was; Unusable for one in the run: that is data."""
    file, was = parts(config["options"]["model"])[0], config.get("sources", {})
    if file and Path(file).resolve().is_relative_to(run.resolve()):
        raise Unusable(f"{file} lies in the run itself, from where nothing is executed: look at it, and move it away")
    now = {name: sha256(Path(name).read_bytes()).hexdigest() for name in was if os.path.isfile(name)}
    how = {True: "has changed since this run began", False: "is gone"}
    return [f"{n} {how[n in now]}: {run}/{SOURCE} has what it was" for n in was if now.get(n) != was[n]]


def sources_of(name: str) -> dict[str, str]:
    """The SHA-256 of FILE.py and, once it is loaded, of every module of the user's that it imported, by path; or {}."""
    file = Path(parts(name)[0]).resolve()
    files = [file, *sorted(Neighbours.opened.get(file, set()) - {file})] if is_file(name) else []
    return {str(path): sha256(path.read_bytes()).hexdigest() for path in files}


def source_of(name: str) -> bytes:
    """The content of the files of `sources_of`, each after a line with its name."""
    return b"\n".join(f"# --- {path.name}\n".encode() + path.read_bytes() for path in map(Path, sources_of(name)))


def check_output(network: nn.Module, images: Tensor, classes: int) -> str | None:
    """Raise Unusable, in one line that says how to wrap it, unless the network maps images to logits (N, classes).

    Refused are also values that are not finite, and a forward pass that raises or works in place (the images stay as
    they are).  Returns a warning, in one line, for outputs that look like those of a softmax.
    """
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
    warning = "the outputs look like probabilities (rows sum to 1): return logits, without the softmax; "
    return warning + "where it saturates gradients vanish, and the network seems more robust than it is"


def complaint(output: Any, n: int, classes: int) -> str | None:
    """What is wrong with the output for n images, and how to wrap the network; None where nothing is."""
    wrap = "wrap it in a module whose forward returns"
    if not isinstance(output, Tensor):
        keys = list(output) if isinstance(output, dict) else [0] if isinstance(output, tuple | list) else []
        part = ".logits" if hasattr(output, "logits") else f"[{keys[0]!r}]" if keys else ""
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
