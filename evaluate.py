"""Section 4: how robust a trained run, or anybody's network, is; report.py shows it.

    python evaluate.py runs/digits-none-seed0 runs/digits-fd-l2-lam1-seed0      two runs, side by side
    python evaluate.py model.py:build --data cifar10 --data-dir DIR             a function that returns an nn.Module
    python evaluate.py model.py:build --data DIR --images 100 --budget 100      a large network, on a laptop
    torchrun --nproc_per_node 4 evaluate.py runs/latest                         the same report, sooner
    python evaluate.py runs/latest --suite paper                                its four attacks, each on every image
    python evaluate.py runs/latest --smoothing 0.25 --smoothing 0.5             and randomized smoothing (Table 5)

A network maps images with pixels in [0, 1] to logits.  Two disjoint parts of the test images are drawn by the seed:
calibration images, from which the bounds' constants are estimated, and evaluation images, for everything else.

    distances   the smallest over the suite of attacks.py: upper bounds of the true distance, nothing more
    bounds      Prop. 2.2 with three estimates of L and omega, none of them a certificate.  So each is printed
                with the share of images on which an adversarial image is nearer than it says ("false")
    audit       does anything suggest that the distances are large only because gradients are masked?

The work is cut into parts of a minute at most, each a pure function of network, images, options and seed, and a file
that is written whole.  So the same command goes on where it was interrupted, any number of processes share the parts,
and the report is the same, byte for byte.  A `call` is one image through one forward pass, or one backward pass.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import io
import json
import math
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
import torch
import typer
from torch import Generator, Tensor, nn

import attacks
import bounds
import data
import gradreg
import models
import runs
from gradreg import cross_entropy, direction, input_gradient
from runs import Failure, Stop, World, read_checkpoint, refuse_if_running, replace, resolve

BLOCK, VALUES = 100, 25 * 3 * 224**2  # images in a part, and numbers in these, at most: what memory may hold
PART = 40.0  # seconds that a part takes, at most, at the speed that was measured first
BUDGET = attacks.CALLS  # calls an image and norm
RADII = {  # at which errors are reported: those of Tables 1 and 6, and what the 8x8 digits need
    "l2": {"0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1.0": 1.0, "1.25": 1.25, "1.5": 1.5},
    "linf": {"2_255": 2 / 255, "8_255": 8 / 255, "32_255": 32 / 255},
}
OMEGA_RADII = (0.5, 1.0)  # of Table 3, in l2
SAMPLED = 1000  # images for the paper's estimate, where there are as many
SAMPLED_RADII = 24
ASCENT = 64  # calibration images for gradient ascent, and to see around which radii to look
SHOWN = 10  # images that the figure of adversarial images chooses from
RIVALS = 9  # classes that the calibrated bound looks at
AUDIT_SCALES = (0.5, 1.0, 2.0, 4.0)  # times PGD's median distance
AUDIT_STEPS = (1, 4, 16)
AUDIT = 550  # calls an image
SUITES = {"best": attacks.SUITE, "paper": ("pgd", "carlini_wagner", "boundary", "logbarrier")}
METHODS = {"ahead": "two tangents", "calibration": "calibrated", "ascent": "ascent", "sampling": "sampled"}


# --- what is evaluated ------------------------------------------------------------------------------------


def option(panel: str, text: str, *names: str, **limits: Any) -> Any:
    return typer.Option(*names, help=text, rich_help_panel=panel, **limits)


IMAGES, WORK, FILES = (functools.partial(option, panel) for panel in ("The images", "What is done", "Where"))


@dataclass
class Settings:
    """Measure how robust networks are: the paper's tables and figures, and a masking audit."""

    # fmt: off
    targets: Annotated[list[str], typer.Argument(help="Run directories, or FILE.py:FACTORY (a function that returns an nn.Module for images in [0, 1]).")]
    dataset: Annotated[str, IMAGES("The images for FILE.py:FACTORY (digits, cifar10, imagenet, or an image folder).", "--data")] = "digits"
    data_dir: Annotated[Path | None, IMAGES("Where the images are (default: where the run had them; else data).")] = None
    size: Annotated[int | None, IMAGES("Pixels a side of images read from a folder of large ones (default: as the run was trained; else 224).", min=1, max=4096)] = None
    split: Annotated[float, IMAGES("As train.py's: the share of a folder's images to test on, where it has no test/ or val/; a run knows its own.")] = 0.0
    images: Annotated[int, IMAGES("Images to evaluate; at most half of the test images.", min=2)] = 1000
    calibration: Annotated[int, IMAGES("Other images, attacked to calibrate the bounds: 199 or more; 0 for no bounds.", min=0)] = 200
    topk: Annotated[int | None, IMAGES("Count an image as right when its label is in the top K (default 1; imagenet 5).", min=1)] = None
    seed: Annotated[int, IMAGES("Draws the images, and every random start.", min=0)] = 0
    norm: Annotated[list[str], WORK("Norms of the attacks: l2, linf.")] = tuple(RADII)
    budget: Annotated[int | None, WORK(f"Calls that the attacks may spend on an image and norm, forward and backward passes (default {BUDGET}).", min=10)] = None
    suite: Annotated[Literal["best", "paper"], WORK("best: until two attacks in a row bring an image no nearer.  paper: PGD, Carlini-Wagner, Boundary and LogBarrier, each alone on every image.")] = "best"
    attack: Annotated[list[str] | None, WORK("Attacks to use, in this order (default: all of the suite).")] = None
    blocks: Annotated[int, WORK("Blocks for the paper's estimate by sampling, 5 or more; 0: leave it out.", min=0)] = 100
    audit_images: Annotated[int, WORK("Images for the masking audit, at most: it takes about a quarter of what the attacks may spend.", min=1)] = 100
    smoothing: Annotated[list[float] | None, WORK("Certify by randomized smoothing with this standard deviation; may be given several times.")] = None
    samples: Annotated[int, WORK("Noisy copies of an image for --smoothing; the more, the larger the radii that can be certified.", min=100)] = 10_000
    out: Annotated[Path, FILES("For comparisons, and for FILE.py:FACTORY; a run's own report goes into the run.")] = Path("evaluations")
    device: Annotated[str | None, FILES("cpu, cuda or cuda:N (default cuda where there is one).")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """What is given several times counts once.  Raises Failure for options that mean nothing."""
        data.check_split(self.dataset, self.split)
        if 0 < self.blocks < 5:
            raise Failure(f"--blocks must be 0, or 5 or more, not {self.blocks}", 2)
        if self.suite == "paper" and self.budget:
            raise Failure("--budget: the attacks of --suite paper run in full; leave one of the two out", 2)
        self.norm, self.smoothing = list(dict.fromkeys(self.norm)), sorted(set(self.smoothing or ()))
        if wrong := [sigma for sigma in self.smoothing if not 0 < sigma < math.inf]:
            raise Failure(f"--smoothing must be positive, not {wrong[0]}", 2)
        self.attack = list(dict.fromkeys(self.attack or SUITES[self.suite]))
        for name, known in (("norm", RADII), ("attack", attacks.SUITE)):
            if unknown := set(getattr(self, name)) - set(known):
                raise Failure(f"--{name} must be one of {', '.join(known)}, not {min(unknown)}", 2)
        self.budget = 330 * len(self.attack) if self.suite == "paper" else self.budget or BUDGET


class Watched(nn.Module):
    """A network that tells `watch` of every call, before it; `watch` may raise, to end the work.

    At most `most` images go through it at once, so that it can be stopped soon.  Where no gradient comes through the
    network (detached, under no_grad, quantised) it is `blind`, and its gradient is zero: whoever asks for it learns
    that, in place of an error of torch.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.blind, self.most, self.calls = network, False, BLOCK, 0
        self.watch: Callable[[int], None] = lambda calls: None

    def forward(self, x: Tensor) -> Tensor:
        logits = [self.some(part) for part in x.split(self.most)]
        return torch.cat(logits) if logits[1:] else logits[0]

    def some(self, x: Tensor) -> Tensor:
        self.count(x)
        if self.blind:
            logits = self.network(x.detach())
            return logits + (0 * x.flatten(1).sum(1, keepdim=True)).to(logits.dtype)
        if (logits := self.network(x)).requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, images: Tensor) -> None:
        """Of images on their way forward, or of gradients on their way back."""
        self.watch(len(images))
        self.calls += len(images)

    def try_gradient(self, images: Tensor, labels: Tensor, topk: int) -> None:
        """Learn whether it is blind: no gradient of the margin, or a zero one, on all these images."""
        self.blind, x = False, images.clone().requires_grad_()
        try:
            (grad,) = torch.autograd.grad(attacks.margin(self(x), labels, topk).sum(), x)
            self.blind = not grad.any()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError:  # torch's for what it cannot differentiate
            self.blind = True


@dataclass
class Target:
    """A network in evaluation mode, the test images it is measured on, and where its files go."""

    name: str
    network: nn.Module
    path: Path
    dataset: str
    source: data.Source
    classes: list[str]
    topk: int
    config: dict[str, Any] | None = None
    step: int | None = None  # of a run's checkpoint
    seconds: float | None = None
    code: bytes = b""  # of a stranger's network: its forward pass may change while its weights stay
    suite: list[str] = field(default_factory=list)  # attacks
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    pace: float = 0.0  # seconds that a call takes
    speed: int = 1  # calls a second by which the work is cut into parts
    block: int = BLOCK  # images in a part, at most
    undefended: "Target | None" = None  # whose attacks are tried on this one

    def __post_init__(self) -> None:
        self.network.eval()
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self.fingerprint = fingerprint(self.network, self.code)
        self.network = Watched(self.network).eval()

    @property
    def version(self) -> str:
        """Which weights these are."""
        step = f", step {self.step} of {self.config.get('steps_total', '?')}" if self.config else ""
        return self.fingerprint + step

    @property
    def speed_file(self) -> Path:
        return self.path / "parts" / "speed.json"

    def fetch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        return data.fetch(self.source, np.asarray(rows), device)

    def same_images(self, other: "Target") -> bool:
        """Whether a comparison with the other network, image by image, makes sense."""
        return self.dataset == other.dataset and len(self.source) == len(other.source) and self.topk == other.topk


def fingerprint(network: nn.Module, code: bytes) -> str:
    """A digest of the weights, of the layers' names, and of a stranger's code."""
    digest, state = hashlib.sha256(repr(network).encode() + code), network.state_dict()
    frozen = [module for module in network.children() if isinstance(module, torch.jit.ScriptModule) and not state]
    for module in frozen:  # whose weights have become part of its code
        digest.update(module.save_to_buffer())
    for name, value in state.items():
        digest.update(name.encode())
        if isinstance(value, Tensor) and not value.is_quantized:
            digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        else:  # of quantised layers
            torch.save(value, packed := io.BytesIO())
            digest.update(packed.getvalue())
    return digest.hexdigest()[:16]


def at_size(source: data.Source, size: int | None) -> data.Source:
    """The images, shown at `size` pixels a side where they are decoded on demand, else Failure."""
    if size and not isinstance(source, data.Files):
        shape = " x ".join(map(str, source.images.shape[2:]))
        raise Failure(f"--size {size}: these images have a size of their own, {shape}; leave it out", 2)
    return source.at(size) if size else source


def open_run(path: Path, settings: Settings) -> Target:
    """A run directory's network and test images.  Raises Failure."""
    refuse_if_running(path)
    state = read_checkpoint(path / "checkpoint.pt")
    config, network, options = state["config"], models.load(path), state["config"]["options"]
    how = {"classes": config.get("class_names"), "channels": config["channels"], "split": options.get("split", 0)}
    how["small"] = config.get("small", True)
    source, classes = data.load_test(options["dataset"], settings.data_dir or data.stored_place(options), **how)
    trained = options["phases"][-1]["size"] if isinstance(source, data.Files) and "phases" in options else None
    topk = settings.topk or (5 if options["dataset"] == "imagenet" else 1)
    about = path.name, network, path / "evaluation", Path(options["dataset"]).name
    code = models.source_of(options["model"]) if models.is_file(options["model"]) else b""
    target = Target(*about, at_size(source, settings.size or trained), classes, topk, config, code=code)
    target.step, target.seconds = state["step"], state.get("seconds")
    return target


def open_factory(spec: str, settings: Settings) -> Target:
    """The network that FILE.py:FACTORY returns; its weights, where they are random, depend on the seed.

    Images of a folder are shown in colour, or in grey to a network that takes only these.  Raises Failure.
    """
    network = refused = None
    for channels in (3, 1):
        how = {"channels": channels, "split": settings.split}
        source, classes = data.load_test(settings.dataset, settings.data_dir, **how)
        source = at_size(source, settings.size)
        network = network or models.from_file(spec, classes=len(classes), seed=settings.seed).eval()
        images, _ = data.fetch(source, np.arange(min(2, len(source))), torch.device("cpu"))
        try:
            models.check_output(network, images, len(classes))
            break
        except Failure as error:
            refused = refused or Failure(f"{spec}: {error}", 2)
    else:
        raise refused
    topk, label = settings.topk or (5 if settings.dataset == "imagenet" else 1), models.name_of_spec(spec)
    about = label, network, settings.out / label, Path(settings.dataset).name
    return Target(*about, source, classes, topk, code=models.source_of(spec))


def open_targets(settings: Settings) -> list[Target]:
    """The targets, each once, with names that tell them apart.  Raises Failure."""
    targets: list[Target] = []
    for spec in {str(Path(spec).resolve()): spec for spec in settings.targets}.values():
        path = resolve(Path(spec))
        target = open_run(path, settings) if path.is_dir() else open_factory(spec, settings)
        if twins := sum(other.name.split("#")[0] == target.name for other in targets):
            target.name = f"{target.name}#{twins + 1}"
        targets.append(target)
    source = next((t for t in targets if t.config and t.config["options"]["method"] == "none"), None)
    for target in targets:
        target.undefended = source if source is not target and source and target.same_images(source) else None
    return targets


def prepare(target: Target, settings: Settings, world: World) -> None:
    """Draw the images, refuse what cannot be measured, and see how fast it is.  Raises Failure."""
    order = data.order(len(target.source), seed=settings.seed, epoch=0)
    if len(order) < 2:
        raise Failure(f"{target.name}: {len(order)} test images of {target.dataset}; at least 2 are needed", 2)
    count = min(settings.images, len(order) // 2)
    calibration = min(settings.calibration, len(order) - count)
    others = order[count : count + (max(calibration, SAMPLED) if calibration else 0)]
    target.rows = {"evaluation": order[:count], "smoothing": order[:count], "sampling": others}
    target.rows |= {"calibration": others[:calibration], "ascent": others[: min(ASCENT, calibration)]}
    target.network.to(world.device)
    try:
        warning = learn(target, settings, world.device)
    except Exception as error:  # a stranger's network may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Failure(f"{target.name}: {kind}{error}", 2) from None
    (target.pace,) = world.max(torch.tensor([target.pace]))
    target.speed = world.same(speed_of(target))
    target.network.most = max(1, min(target.block, target.speed // 4))  # about half a second, there and back
    target.suite = ["boundary"] if target.network.blind else settings.attack  # the others need a gradient
    audited = max(10, int(0.25 * settings.budget * count / AUDIT))
    target.rows["audit"] = order[: min(count, settings.audit_images, audited)]
    for note in [*target.source.notes, *filter(None, [warning])]:
        world.console.print(f"warning: {target.name}: {note}")


def learn(target: Target, settings: Settings, device: torch.device) -> str | None:
    """Whether it can be measured, whether gradients come through it, its pace; a warning.  Raises anything.

    A call takes what it takes in a short attack, on few images first: there may be a hundred in half a second, or one.
    """
    network, how = target.network, {"norm": settings.norm[0], "topk": target.topk}
    for few in (4, BLOCK):
        images, labels = target.fetch(target.rows["evaluation"][: min(few, target.block)], device)
        target.block = max(1, min(BLOCK, VALUES // images[0].numel()))
        warning = models.check_output(network.network, images, len(target.classes))
        attacks.check_model(network, images, labels, topk=target.topk, gradients=False)
        network.try_gradient(images, labels, target.topk)
        for _ in range(2):  # the first is slow
            start, network.calls = time.perf_counter(), 0
            attacks.fab(network, images, labels, **how, steps=3, targets=0, restarts=0)
            seconds = time.perf_counter() - start
        target.pace = seconds / network.calls
        if seconds > 0.2:
            break
    return warning


def speed_of(target: Target) -> int:
    """Calls a second, a power of 2, by which the work is cut into parts: as these weights' first evaluation has it."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        known = json.loads(target.speed_file.read_text(encoding="utf-8"))
        if known["network"] == target.fingerprint:
            return max(1, int(known["calls a second"]))
    return 2 ** max(0, min(12, int(-math.log2(target.pace))))


# --- parts: pure functions of network, images, options and seed -------------------------------------------

Arrays = dict[str, np.ndarray]


class Unit(NamedTuple):
    """A part to be done: what, in which norm, on which test images."""

    target: Target
    kind: str
    norm: str
    block: int
    rows: tuple[int, ...]
    sigma: float = 0.0  # of the noise of randomized smoothing
    draws: int = 0  # blocks of the paper's estimate

    @property
    def file(self) -> Path:
        noise = f"-{self.sigma}" if self.sigma else ""
        return self.target.path / "parts" / f"{self.kind}-{self.norm}{noise}-{self.block:04d}.npz"

    @property
    def sampled(self) -> int:
        """Images in a block: few of them, or the same would be the maximum of many blocks, which no GEV fits."""
        return min(64, max(1, len(self.rows) // 20))

    def calls(self, settings: Settings) -> int:
        """What it may take; an audit and an ascent, what they take on digits."""
        if self.kind == "sampling":
            return self.draws * self.sampled * (SAMPLED_RADII + 4)
        each = {"evaluation": settings.budget + 35, "calibration": settings.budget + 15, "ascent": 400, "audit": AUDIT}
        return len(self.rows) * each.get(self.kind, settings.samples)


def units_of(target: Target, settings: Settings) -> list[Unit]:
    """Everything that has to be done for a target; the longest parts come first."""
    wanted = [(kind, norm, 0.0) for norm in settings.norm for kind in list(PARTS)[:-1]]
    units = []
    for kind, norm, sigma in wanted + [("smoothing", "l2", sigma) for sigma in settings.smoothing]:
        rows, sampling = tuple(target.rows[kind].tolist()), kind == "sampling"
        count = len(rows) and settings.blocks if sampling else len(rows)
        one = Unit(target, kind, norm, 0, rows if sampling else rows[:1], sigma, int(sampling))
        size = max(1, min(target.block, int(PART * target.speed / max(1, one.calls(settings)))))
        for i, start in enumerate(range(0, count, size)):
            some = {"draws": min(size, count - start)} if sampling else {"rows": rows[start : start + size]}
            units.append(one._replace(block=i, **some))
    return units


def key_of(unit: Unit, settings: Settings, world: World) -> str:
    """All that a part depends on, in one string: a part with another key is done again."""
    target = unit.target
    attack = {"suite": settings.suite, "attacks": target.suite, "budget": settings.budget}
    grid = {"grid": target.rows["ascent"].tolist()}
    depends = {
        **dict.fromkeys(("calibration", "evaluation"), attack | {"margins": settings.calibration > 0}),
        "ascent": grid,
        "audit": {"undefended": target.undefended and target.undefended.fingerprint},
        "sampling": grid | {"draws": unit.draws},
        "smoothing": {"sigma": unit.sigma, "samples": settings.samples},
    }[unit.kind]
    depends |= {"format": 2, "kind": unit.kind, "norm": unit.norm, "rows": unit.rows, "seed": settings.seed}
    depends |= {"network": target.fingerprint, "topk": target.topk, "dataset": target.dataset, "code": code()}
    depends |= {"images": pixels_of(target.source, unit.rows), "most": target.network.most}
    return json.dumps(depends | {"torch": str(torch.__version__), "device": world.device.type}, sort_keys=True)


@functools.cache
def code() -> str:
    """A digest of the code that measures: with another attack or bound, the parts are done again."""
    files = [Path(module.__file__).read_bytes() for module in (attacks, bounds, gradreg)]
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def pixels_of(source: data.Source, rows: Sequence[int]) -> str:
    """A digest that changes with the images (files: with their names and sizes, and the size they are shown at)."""
    if isinstance(source, data.InMemory):
        content = source.images[list(rows)].cpu().contiguous().numpy().tobytes()
    else:
        files = [(source.path(i).name, source.path(i).stat().st_size) for i in rows]
        content = repr((source.size, files)).encode()
    return hashlib.sha256(content).hexdigest()[:16]


def read_part(unit: Unit, key: str) -> Arrays | None:
    """A part that is there, whole, and of the same key; else None."""
    try:
        with np.load(unit.file, allow_pickle=False) as file:
            return dict(file) if str(file["key"]) == key else None
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def write_part(unit: Unit, key: str, arrays: Arrays) -> None:
    buffer = io.BytesIO()
    np.savez(buffer, key=np.array(key), **arrays)
    replace(unit.file, buffer.getvalue())


def compute(unit: Unit, settings: Settings, world: World) -> Arrays:
    """Do a part.  Raises Failure where the model turns out to be unfit."""
    label = f"{settings.seed} {unit.kind} {unit.norm} {unit.block}"
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    generator = torch.Generator(world.device).manual_seed(seed)
    images, labels = unit.target.fetch(unit.rows, world.device)
    try:
        return PARTS[unit.kind](unit, settings, images, labels, generator)
    except ValueError as error:
        raise Failure(f"{unit.target.name}: {error}", 2) from None


def attacked(
    unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator
) -> tuple[Tensor, Arrays]:
    """The nearest adversarial images; their distances, whose they are, and each attack's own if each is alone.

    `calls`: of each attack of SUITE, and beside them, in all (1, attacks + 1).
    """
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk, "generator": generator}
    alone = {"calls": settings.budget} if target.network.blind else {}
    if settings.suite == "best" and not alone:
        options = {"attacks": target.suite, "check": False, "budget": settings.budget}
        found = attacks.smallest(target.network, images, labels, **options, **how)
        arrays = {"distances": numpy(found.distances), "attacks": np.array(found.attacks)}
        return found.adversarial, arrays | {"calls": tally(found.calls, len(images))}
    each, calls = {}, {}
    for name in target.suite:
        target.network.calls = 0
        each[name] = one_attack(name, target.network, images, labels, **how, **alone)
        calls[name] = target.network.calls
    least, who = torch.stack([distances for _, distances in each.values()]).min(0)
    names = np.array([*each, "clean", "none"])[numpy(who.where(least > 0, -2).where(least.isfinite(), -1))]
    adversarial = torch.stack([x for x, _ in each.values()])[who, torch.arange(len(who), device=who.device)]
    own = {f"distances_{name}": numpy(distances) for name, (_, distances) in each.items()}
    return adversarial, {"distances": numpy(least), "attacks": names, "calls": tally(calls)} | own


def tally(calls: dict[str, float], images: int = 1) -> np.ndarray:
    """Calls by attack, in the order of SUITE, and all others (1, attacks + 1), of so many images each."""
    others = sum(count for name, count in calls.items() if name not in attacks.SUITE)
    return images * np.array([[*(calls.get(name, 0) for name in attacks.SUITE), others]])


def one_attack(name: str, network: nn.Module, images: Tensor, labels: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """What one attack finds for every image by itself, and how far it is: 0 misclassified, inf not found.

    LogBarrier is to know nothing of the other attacks' kind of step: told to go on from the images, which are not
    adversarial, it starts from noise, as its authors do, and not beyond the linearised boundary.
    """
    start = images if name == "logbarrier" else None
    x = getattr(attacks, name)(network, images, labels, start=start, **how)
    right = ~misclassified(network, x, labels, how["topk"])
    return x, attacks.distance(images, x, how["norm"]).masked_fill(right, math.inf)


def misclassified(network: nn.Module, x: Tensor, labels: Tensor, topk: int) -> Tensor:
    with torch.no_grad():
        return attacks.margin(network(x), labels, topk) > 0


def margins_of(unit: Unit, settings: Settings, images: Tensor, labels: Tensor) -> Arrays:
    """Losses and gradient norms: the paper's loss and, for the bounds, that of the logits with several rivals."""
    target, arrays = unit.target, {}
    wanted = {"probabilities": 1, "logits": min(RIVALS, len(target.classes) - target.topk)}
    for loss, rivals in wanted.items() if settings.calibration else [("probabilities", 1)]:
        how = {"norm": unit.norm, "topk": target.topk, "loss": loss, "rivals": rivals}
        found = bounds.margins(target.network, images, labels, **how, ahead=loss == "logits")
        arrays |= {f"{loss}_losses": numpy(found.losses), f"{loss}_grad_norms": numpy(found.grad_norms)}
    return arrays


def evaluation_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances, who found them, predictions, margins, and in l2 omega of Table 3 by ascent."""
    target, (adversarial, found) = unit.target, attacked(unit, settings, images, labels, generator)
    with torch.no_grad():
        logits, moved = target.network(images), target.network(adversarial)
    arrays = margins_of(unit, settings, images, labels) | found
    arrays |= {"labels": numpy(labels), "predicted": numpy(logits.argmax(1))}
    arrays["ahead"] = numpy((logits > logits.gather(1, labels[:, None])).sum(1))  # classes before the label
    if unit.norm == "l2":
        how = {"norm": "l2", "eps": OMEGA_RADII, "topk": target.topk, "steps": 3}
        arrays["omega"] = np.array([bounds.omega_statistics(target.network, images, labels, **how).omega])
    if unit.rows[0] in target.rows["evaluation"][:SHOWN]:
        arrays |= {"images": numpy(images), "adversarial": numpy(adversarial), "moved": numpy(moved.argmax(1))}
    return arrays


def calibration_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances and margins, for estimate_by_calibration."""
    return margins_of(unit, settings, images, labels) | attacked(unit, settings, images, labels, generator)[1]


def estimated(make: Callable, unit: Unit, images: Tensor, labels: Tensor, count: int, **options: Any) -> Arrays:
    """What `make` gives at `count` radii around the distances to be expected and those of Table 3; or why nothing."""
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk}
    some = target.fetch(target.rows["ascent"], images.device)
    try:
        radii = bounds.default_radii(target.network, *some, count=count, **how)
        eps = torch.cat([radii, radii.new_tensor(OMEGA_RADII if unit.norm == "l2" else ())]).unique()
        found = make(target.network, images, labels, eps=eps, **how, **options)
    except ValueError as error:  # also where, say, no image of the block is classified correctly
        return {"refused": np.array(str(error))}
    if isinstance(found, bounds.Estimate):
        return {"eps": numpy(eps), "omega": numpy(found.omega)[None], "lipschitz": numpy(found.lipschitz)[None]}
    return {"eps": numpy(eps), "maxima": numpy(found)}


def ascent_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """The suprema that gradient ascent finds on these images."""
    return estimated(bounds.estimate_by_ascent, unit, images, labels, 16, steps=5, generator=generator)


def sampling_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Maxima over blocks, to which the paper's estimate of L and omega is fitted."""
    how = {"blocks": unit.draws, "block_size": unit.sampled, "generator": generator}
    return estimated(bounds.sample_maxima, unit, images, labels, SAMPLED_RADII, **how)


def smoothing_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Classes and certified radii of the smoothed classifier (Cohen et al. 2019)."""
    how = {"n": settings.samples, "generator": generator}
    found = bounds.certify_smoothing(unit.target.network, images, sigma=unit.sigma, **how)
    arrays = {name: numpy(getattr(found, name)) for name in ("classes", "radii", "cap")}
    return arrays | {"right": arrays["classes"] == numpy(labels)}


def audit_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Attacks of three families, each on its own, and PGD with more and more radius and steps."""
    target, norm = unit.target, unit.norm
    how = {"norm": norm, "topk": target.topk, "generator": generator}

    def alone(name: str, **options: Any) -> np.ndarray:
        return numpy(one_attack(name, target.network, images, labels, **how, **options)[1])

    def broken(eps: float, steps: int = 8) -> np.ndarray:
        return np.isfinite(alone("pgd", eps=eps, steps=steps, targets=0))

    arrays = {"pgd": alone("pgd", steps=10), "boundary": alone("boundary", calls=135)}
    arrays["logbarrier"] = alone("logbarrier", steps=20)
    known = arrays["pgd"][np.isfinite(arrays["pgd"]) & (arrays["pgd"] > 0)]
    eps = float(np.median(known)) if len(known) else 1.0
    arrays |= slopes(unit, images, labels, 0.05 * eps)
    arrays["by_eps"] = np.stack([broken(scale * eps) for scale in AUDIT_SCALES], 1)
    arrays["by_steps"] = np.stack([broken(eps, steps) for steps in AUDIT_STEPS], 1)
    arrays["whole_box"] = broken(1.0 if norm == "linf" else math.sqrt(images[0].numel()))
    if target.undefended:
        moved = attacks.pgd(target.undefended.network, images, labels, eps=eps, **how)
        arrays["transferred"] = numpy(misclassified(target.network, moved, labels, target.topk))
    return arrays


def slopes(unit: Unit, images: Tensor, labels: Tensor, step: float) -> Arrays:
    """Where gradients vanish, and where a step along the margin's gradient does not raise the margin."""
    target = unit.target

    def margin(x: Tensor) -> Tensor:
        return bounds.margin_loss(target.network(x), labels, target.topk, loss="logits")

    start, grad = input_gradient(margin, images)
    _, training_grad = input_gradient(lambda x: cross_entropy(target.network(x), labels), images)
    longest = math.sqrt(images[0].numel()) if unit.norm == "linf" else 1
    with torch.no_grad():
        ahead = margin((images + step * longest * direction(grad, unit.norm)).clamp(0, 1))
    zero, zero_training = (numpy((g.flatten(1) == 0).all(1)) for g in (grad, training_grad))
    return {"zero": zero, "zero_training": zero_training, "flat": numpy(ahead <= start)}


def numpy(values: Any) -> np.ndarray:
    """On the CPU; numbers of 16 bits with 32, since numpy knows no bfloat16."""
    values = torch.as_tensor(values).detach().cpu()
    return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()


MEASURES = (sampling_part, ascent_part, calibration_part, evaluation_part, audit_part, smoothing_part)
PARTS: dict[str, Callable[..., Arrays]] = {part.__name__.removesuffix("_part"): part for part in MEASURES}


# --- doing them -------------------------------------------------------------------------------------------


def work(units: list[Unit], settings: Settings, world: World) -> None:
    """Do the parts that are missing, one a process and round.  Raises Failure when a signal asked to stop."""
    keys = [key_of(unit, settings, world) for unit in units]
    missing = [i for i, unit in enumerate(units) if read_part(unit, keys[i]) is None] if world.main else None
    todo = [(units[i], keys[i]) for i in world.same(missing)]
    if len(todo) < len(units):
        world.console.print(f"{len(units) - len(todo)} of {len(units)} parts are there already")
    for target in {unit.target.name: unit.target for unit, _ in todo}.values():
        world.console.print(price([unit for unit, _ in todo if unit.target is target], settings, world))
    costs = [unit.calls(settings) * unit.target.pace for unit, _ in todo]
    with Stop(world) as stop, runs.progress_bar(world.console, "evaluating, %", 100) as show:
        meter = Meter(stop, show, world, sum(costs))
        for unit in units:
            unit.target.network.watch = meter
        for first in range(0, len(todo), world.size):
            now = slice(first, first + world.size)
            for unit, key in todo[now][world.rank :][:1]:
                meter.begin(sum(costs[:first]), sum(costs[now]), unit.calls(settings))
                with contextlib.suppress(InterruptedError):  # the part is done again another time
                    write_part(unit, key, compute(unit, settings, world))
            (signum,) = world.max(torch.tensor([stop.signal]))
            if signum:
                raise Failure("stopped; the same command goes on from here", 128 + int(signum))


def price(units: list[Unit], settings: Settings, world: World) -> str:
    """What the parts of a target will cost, at most, as far as one can tell."""
    target, calls = units[0].target, sum(unit.calls(settings) for unit in units)
    images, norms = len(target.rows["evaluation"]), len(settings.norm)
    each = f"{norms} x {calls / images / norms:,.0f} calls of {1000 * target.pace:.2g} ms"
    by = f" by {world.size} processes" * (world.size > 1)
    all_ = runs.duration(calls * target.pace / world.size)
    return f"{target.name}: about {all_}: {images:,} images, {norms} norms, {each}, in {len(units)} parts{by}"


class Meter:
    """What a network calls before each pass: obeys a signal, and moves a bar; without a terminal, a line a minute."""

    def __init__(self, stop: Stop, show: Callable[[float], None], world: World, total: float):
        self.stop, self.show, self.console, self.total = stop, show, world.console, total
        self.begun = self.said = time.monotonic()

    def __deepcopy__(self, _: Any) -> "Meter":  # with a network, which bounds may copy to float64
        return self

    def begin(self, done: float, seconds: float, calls: int) -> None:
        """A part of so many calls, and others beside it, which take so many seconds, after those that are done."""
        self.done, self.end, self.each = done, done + seconds, seconds / calls

    def __call__(self, calls: int) -> None:
        if self.stop.signal:
            raise InterruptedError
        self.done, now = min(self.done + calls * self.each, self.end), time.monotonic()
        share = self.done / self.total
        self.show(100 * share)
        if not self.console.is_terminal and now > self.said + 60:
            self.said, left = now, runs.duration((now - self.begun) * (1 / share - 1))
            self.console.print(f"{100 * share:.0f} % done, {left} left")


# --- the masking audit (Athalye et al. 2018, Carlini et al. 2019) -----------------------------------------


class Verdict(NamedTuple):
    """One line of the audit: what was looked at, its figure, and the limit that it has to keep."""

    line: str
    figure: float
    limit: float
    unit: str = "%"
    at: str = "most"  # or "least"

    @property
    def passed(self) -> bool:
        return bool(self.figure <= self.limit if self.at == "most" else self.figure >= self.limit)


def largest_fall(broken: np.ndarray) -> float:
    """By how many points an error (images, settings) that should rise falls below its running maximum."""
    errors = 100 * broken.mean(0)
    return float((np.maximum.accumulate(errors) - errors).max())


def ratio_to_pgd(distances: np.ndarray, pgd: np.ndarray) -> np.ndarray:
    """distances / pgd of the images that were classified correctly; 1 where neither attack found anything."""
    with np.errstate(invalid="ignore"):
        ratios = distances[pgd > 0] / pgd[pgd > 0]
    return np.where(np.isnan(ratios), 1.0, ratios) if len(ratios) else np.ones(1)


def audit(found: Arrays) -> list[Verdict]:
    """The verdicts of one target and norm, from the arrays of `audit_part`."""
    share = {name: 100 * float(found[name].mean()) for name in ("zero", "zero_training", "flat", "whole_box")}
    black_box, non_local = (ratio_to_pgd(found[name], found["pgd"]) for name in ("boundary", "logbarrier"))
    verdicts = [
        Verdict("gradient of the margin exactly zero", share["zero"], 1),
        Verdict("gradient of the cross-entropy exactly zero", share["zero_training"], 1),
        Verdict("a step along the gradient does not raise the margin", share["flat"], 5),
        Verdict("black-box attack nearer than PGD by 5 %", 100 * float((black_box < 0.95).mean()), 10),
        Verdict("non-local attack's distance over PGD's, median", float(np.median(non_local)), 0.9, "", "least"),
        Verdict("error under PGD in the whole box", share["whole_box"], 100, "%", "least"),
        Verdict("error falls as eps grows", largest_fall(found["by_eps"]), 5, "points"),
        Verdict("error falls with more steps", largest_fall(found["by_steps"]), 5, "points"),
    ]
    if "transferred" in found:
        more = 100 * float(found["transferred"].mean() - found["by_eps"][:, AUDIT_SCALES.index(1.0)].mean())
        verdicts.append(Verdict("attacks on the undefended network do better than its own by", more, 0, "points"))
    return verdicts


# --- assembling the parts ---------------------------------------------------------------------------------


class Bounds(NamedTuple):
    """Both bounds of Prop. 2.2, of each image (N,), with one method's constants."""

    L: Tensor
    omega: Tensor
    constants: bounds.Estimate


@dataclass
class Measured:
    """What is known of one network in one norm."""

    found: Arrays  # evaluation_part's, over all images
    verdicts: list[Verdict]
    bounds: dict[str, Bounds]
    refused: dict[str, str]  # method -> why there is no bound

    @property
    def best(self) -> str | None:
        """The method whose bounds are reported where there is room for one."""
        return next((method for method in METHODS if method in self.bounds), None)

    @property
    def audit_failed(self) -> list[str]:
        return [verdict.line for verdict in self.verdicts if not verdict.passed]


@dataclass
class Evaluation:
    """A target and what was measured of it, by norm."""

    target: Target
    settings: Settings
    norms: dict[str, Measured]
    smoothing: dict[float, Arrays]  # by sigma

    @property
    def first(self) -> Arrays:
        return next(iter(self.norms.values())).found

    @property
    def wrong(self) -> np.ndarray:
        return self.first["ahead"] >= self.target.topk


def joined(parts: list[Arrays]) -> Arrays:
    """Each array that all parts have, over all of them."""
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in sorted(names - {"key"})}


def assemble(target: Target, settings: Settings, world: World) -> Evaluation:
    """An evaluation from its parts, which must all be there."""
    parts: dict[tuple[str, str | float], list[Arrays]] = collections.defaultdict(list)
    for unit in units_of(target, settings):
        parts[unit.kind, unit.sigma or unit.norm].append(read_part(unit, key_of(unit, settings, world)))
    norms = {}
    for norm in settings.norm:
        found = joined(parts["evaluation", norm])
        found["first"] = joined([part for part in parts["evaluation", norm] if "images" in part])
        norms[norm] = Measured(found, audit(joined(parts["audit", norm])), {}, {})
        for method in METHODS:
            if some := parts["calibration" if method == "ahead" else method, norm]:
                add_bounds(norms[norm], method, some, norm, target.topk)
    smoothing = {sigma: joined(parts["smoothing", sigma]) for sigma in settings.smoothing}
    return Evaluation(target, settings, norms, smoothing)


def add_bounds(measured: Measured, method: str, parts: list[Arrays], norm: str, topk: int) -> None:
    """The bounds of a method on the evaluation images, or why there are none."""
    loss = "probabilities" if method == "sampling" else "logits"

    def margins_in(found: Arrays) -> bounds.Margins:
        """Of the nearest class alone; calibrated, of all rivals, and with the tangent ahead, the last column."""
        last = {"ahead": None, "calibration": -1}.get(method, 1)
        both = (torch.from_numpy(found[f"{loss}_{what}"])[:, :last] for what in ("losses", "grad_norms"))
        return bounds.Margins(*both, norm, topk, loss, method == "ahead")

    try:
        usable = [part for part in parts if "refused" not in part]
        if not usable:
            raise ValueError(str(parts[0]["refused"]))
        found, how = joined(usable), {"norm": norm, "topk": topk, "loss": loss}
        if method in ("ahead", "calibration"):
            known, exponent = (margins_in(found), torch.from_numpy(found["distances"])), 2 if method == "ahead" else 1.5
            constants = bounds.estimate_by_calibration(*known, exponent=exponent)
        elif method == "sampling":
            some = torch.from_numpy(found["maxima"]), torch.from_numpy(usable[0]["eps"])
            constants = bounds.estimate_by_sampling(*some, **how)
        else:  # the suprema are over images: the largest of the parts'
            eps, omega = torch.from_numpy(usable[0]["eps"]), torch.from_numpy(found["omega"]).amax(0)
            constants = bounds.Estimate("ascent", **how, lipschitz=found["lipschitz"].max(), eps=eps, omega=omega)
        margins = margins_in(measured.found)
        both = bounds.lipschitz_bound(margins, constants), bounds.omega_bound(margins, constants)
        measured.bounds[method] = Bounds(*both, constants)
    except ValueError as error:
        measured.refused[method] = str(error)


# --- command line -----------------------------------------------------------------------------------------


def make_directories(targets: list[Target], together: Path) -> None:
    """Make those that will be written to, and try them out.  Raises Failure."""
    try:
        for target in targets:
            target.speed_file.parent.mkdir(parents=True, exist_ok=True)
            speed = {"network": target.fingerprint, "calls a second": target.speed}
            replace(target.speed_file, json.dumps(speed).encode())
        together.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Failure(f"{error.filename or together}: cannot write there ({error.strerror})", 2) from None


def main(**options: Any) -> None:
    """What `Settings` says."""
    settings = Settings(**options)
    import report  # here, since it imports this module

    with contextlib.closing(World(settings.device)) as world:
        # One thread a process and full precision: neither the processes nor the batches change a result.
        torch.set_num_threads(1 if world.device.type == "cpu" else torch.get_num_threads())
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        torch.backends.cudnn.deterministic = True
        opened = open_targets(settings)
        for target in opened:
            prepare(target, settings, world)
            report.introduce(target, settings, world.console)
        name = "_vs_".join(target.name for target in opened)
        if len(name) > 200:  # more than a file may have; still different for different names
            name = f"{name[:190]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"
        together = settings.out / name if opened[1:] else opened[0].path
        if world.main:
            make_directories(opened, together)
        work([unit for target in opened for unit in units_of(target, settings)], settings, world)
        if world.main:
            report.publish([assemble(target, settings, world) for target in opened], together, world)


main.__signature__, main.__doc__ = inspect.signature(Settings), Settings.__doc__

if __name__ == "__main__":
    sys.modules["evaluate"] = sys.modules["__main__"]  # one module, also for report.py, which imports evaluate
    sys.exit(runs.run_command(main))
