"""Section 4: how robust a trained run, or anybody's network, is; report.py shows it.

    python evaluate.py runs/digits-none-seed0 runs/digits-fd-l2-lam1-seed0      two runs, side by side
    python evaluate.py model.py:build --data cifar10 --data-dir DIR             a function that returns an nn.Module
    torchrun --nproc_per_node 4 evaluate.py runs/latest                         the same report, sooner
    python evaluate.py runs/latest --suite paper                                its four attacks, each on every image
    python evaluate.py runs/latest --smoothing 0.25 --smoothing 0.5             and randomized smoothing (Table 5)

A network maps images with pixels in [0, 1] to logits.  Two disjoint parts of the test images are drawn by the seed:
calibration images, from which the bounds' constants are estimated, and evaluation images, for everything else.

    distances   the smallest over the suite of attacks.py: upper bounds of the true distance, nothing more
    bounds      Prop. 2.2 with three estimates of L and omega, none of them a certificate.  So each is printed
                with the share of images on which an adversarial image is nearer than it says ("false")
    audit       does anything suggest that the distances are large only because gradients are masked?

The work is cut into parts, each a pure function of network, images, options and seed, and each is a file that is
written whole.  So the same command goes on where it was interrupted, any number of processes share the parts, and
the report is the same, byte for byte (on the CPU, where a process uses one thread: use torchrun for more cores).
"""

import contextlib
import functools
import hashlib
import io
import json
import math
import sys
import timeit
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

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

BLOCK = 25  # images in a part
RADII = {  # at which errors are reported: those of Tables 1 and 6, and what the 8x8 digits need
    "l2": {"0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1.0": 1.0, "1.25": 1.25, "1.5": 1.5},
    "linf": {"2_255": 2 / 255, "8_255": 8 / 255, "32_255": 32 / 255},
}
OMEGA_RADII = (0.5, 1.0)  # of Table 3, in l2
SAMPLED = 1000  # images for the paper's estimate, where there are as many
RIVALS = 9  # classes that the calibrated bound looks at
AUDIT_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times PGD's median distance
AUDIT_STEPS = (1, 5, 20, 100)
SUITES = {"best": attacks.SUITE, "paper": ("pgd", "carlini_wagner", "boundary", "logbarrier")}
METHODS = {"calibration": "calibrated", "ascent": "ascent", "sampling": "sampled"}


# --- what is evaluated ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """The options of the command line, which all networks share."""

    norms: tuple[str, ...]
    images: int
    calibration: int
    seed: int
    suite: tuple[str, ...]
    alone: bool  # each attack on every image, in place of the schedule of `attacks.smallest`
    blocks: int
    audit: int
    smoothing: tuple[float, ...]
    samples: int
    dataset: str = "digits"  # this and what follows: of the images, and where reports go
    data_dir: Path | None = None
    size: int | None = None
    topk: int | None = None
    out: Path = Path("evaluations")


class Watched(nn.Module):
    """A network that tells `watch` how many images go through it; `watch` may raise, to end the work.

    Where no gradient comes through the network (detached, under no_grad, quantised) it is `blind`, and its gradient
    is zero: whoever asks for it learns that, in place of an error of torch.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.blind, self.watch = network, False, lambda images: None

    def forward(self, x: Tensor) -> Tensor:
        self.watch(len(x))
        if not self.blind:
            return self.network(x)
        logits = self.network(x.detach())
        return logits + (0 * x.flatten(1).sum(1, keepdim=True)).to(logits.dtype)

    def try_gradient(self, images: Tensor, labels: Tensor, topk: int) -> None:
        """Learn whether it is blind: no gradient of the margin, or a zero one, on all these images."""
        x = images.clone().requires_grad_()
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
    suite: tuple[str, ...] = ()  # attacks
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    pace: float = 0.0  # seconds that an image takes, forward and backward
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
    """The images, shown at `size` pixels a side where they are decoded on demand.  Raises Failure where they are not."""
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
    network, complaints = None, []
    for channels in (3, 1):
        source, classes = data.load_test(settings.dataset, settings.data_dir, channels=channels)
        source = at_size(source, settings.size)
        if network is None:
            network = models.from_file(spec, classes=len(classes), seed=settings.seed).eval()
        images, _ = data.fetch(source, np.arange(min(2, len(source))), torch.device("cpu"))
        try:
            models.check_output(network, images, len(classes))
            break
        except Failure as error:
            complaints.append(f"{spec}: {error}")
    else:
        raise Failure(complaints[0], 2)
    topk, label = settings.topk or (5 if settings.dataset == "imagenet" else 1), models.name_of_spec(spec)
    about = label, network, settings.out / label, Path(settings.dataset).name
    return Target(*about, source, classes, topk, code=models.source_of(spec))


def open_targets(specs: list[str], settings: Settings) -> list[Target]:
    """The targets, each once, with names that tell them apart.  Raises Failure."""
    targets: list[Target] = []
    for spec in {str(Path(spec).resolve()): spec for spec in specs}.values():
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
    target.rows = {"evaluation": order[:count], "calibration": others[:calibration], "sampling": others}
    target.network.to(world.device)
    images, labels = target.fetch(target.rows["evaluation"][:BLOCK], world.device)
    try:
        warning = models.check_output(target.network.network, images, len(target.classes))
        attacks.check_model(target.network, images, labels, topk=target.topk, gradients=False)
        once = functools.partial(target.network.try_gradient, images, labels, target.topk)
        target.pace = min(timeit.repeat(once, number=1, repeat=3)) / len(images)  # the first is slow
    except Exception as error:  # a stranger's network may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Failure(f"{target.name}: {kind}{error}", 2) from None
    target.suite = ("boundary",) if target.network.blind else settings.suite  # the others need a gradient
    for note in [*target.source.notes, *filter(None, [warning])]:
        world.console.print(f"warning: {target.name}: {note}")


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

    @property
    def file(self) -> Path:
        noise = f"-{self.sigma}" if self.sigma else ""
        return self.target.path / "parts" / f"{self.kind}-{self.norm}{noise}-{self.block:04d}.npz"


def units_of(target: Target, settings: Settings) -> list[Unit]:
    """Everything that has to be done for a target; the longest parts come first."""
    rows, units = {kind: found.tolist() for kind, found in target.rows.items()}, []
    if settings.blocks and rows["sampling"]:
        units += [Unit(target, "sampling", norm, 0, tuple(rows["sampling"])) for norm in settings.norms]
    rows |= {"audit": rows["evaluation"][: settings.audit], "smoothing": rows["evaluation"]}
    wanted = [(kind, norm, 0.0) for norm in settings.norms for kind in ("calibration", "evaluation", "audit")]
    for kind, norm, sigma in wanted + [("smoothing", "l2", sigma) for sigma in settings.smoothing]:
        blocks = [tuple(rows[kind][start : start + BLOCK]) for start in range(0, len(rows[kind]), BLOCK)]
        units += [Unit(target, kind, norm, i, block, sigma) for i, block in enumerate(blocks)]
    return units


def key_of(unit: Unit, settings: Settings, world: World) -> str:
    """All that a part depends on, in one string: a part with another key is done again."""
    target = unit.target
    grid = target.rows["calibration"][:64].tolist()  # of the images that `estimated` looks at
    suite = ("alone", *target.suite) if settings.alone else target.suite
    depends = {
        "calibration": {"suite": suite, "grid": grid},
        "evaluation": {"suite": suite},
        "audit": {"undefended": target.undefended and target.undefended.fingerprint, "logbarrier": "from noise"},
        "sampling": {"blocks": settings.blocks, "grid": grid},
        "smoothing": {"sigma": unit.sigma, "samples": settings.samples},
    }[unit.kind]
    depends |= {"format": 1, "kind": unit.kind, "norm": unit.norm, "rows": unit.rows, "seed": settings.seed}
    depends |= {"network": target.fingerprint, "topk": target.topk, "dataset": target.dataset, "code": code()}
    depends |= {"images": pixels_of(target.source, unit.rows)}
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
        if unit.kind != "sampling":
            attacks.check_model(unit.target.network, images, labels, topk=unit.target.topk, gradients=False)
        return PARTS[unit.kind](unit, settings, images, labels, generator)
    except ValueError as error:
        raise Failure(f"{unit.target.name}: {error}", 2) from None


def attacked(unit: Unit, alone: bool, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Arrays]:
    """The nearest adversarial images; their distances, whose they are, and each attack's own if each is alone."""
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk, "generator": generator}
    if not alone:
        found = attacks.smallest(target.network, images, labels, attacks=target.suite, check=False, **how)
        arrays = {"distances": numpy(found.distances), "attacks": np.array(found.attacks)}
        return found.adversarial, arrays | {"calls": np.array(sum(found.calls.values()) * len(images))}
    each = {name: one_attack(name, target.network, images, labels, **how) for name in target.suite}
    least, who = torch.stack([distances for _, distances in each.values()]).min(0)
    names = np.array([*each, "clean", "none"])[numpy(who.where(least > 0, -2).where(least.isfinite(), -1))]
    adversarial = torch.stack([x for x, _ in each.values()])[who, torch.arange(len(who), device=who.device)]
    own = {f"distances_{name}": numpy(distances) for name, (_, distances) in each.items()}
    return adversarial, {"distances": numpy(least), "attacks": names} | own


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


def margins_of(unit: Unit, images: Tensor, labels: Tensor) -> Arrays:
    """Losses and gradient norms: the paper's loss, and that of the logits with several rivals."""
    target, arrays = unit.target, {}
    for loss, rivals in (("probabilities", 1), ("logits", min(RIVALS, len(target.classes) - target.topk))):
        how = {"norm": unit.norm, "topk": target.topk, "loss": loss, "rivals": rivals}
        found = bounds.margins(target.network, images, labels, **how, batch_size=BLOCK)
        arrays |= {f"{loss}_losses": numpy(found.losses), f"{loss}_grad_norms": numpy(found.grad_norms)}
    return arrays


def evaluation_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances, who found them, predictions, margins, and in l2 omega of Table 3 by ascent."""
    target, (adversarial, found) = unit.target, attacked(unit, settings.alone, images, labels, generator)
    with torch.no_grad():
        logits, moved = target.network(images), target.network(adversarial)
    arrays = margins_of(unit, images, labels) | found
    arrays |= {"labels": numpy(labels), "predicted": numpy(logits.argmax(1))}
    arrays["ahead"] = numpy((logits > logits.gather(1, labels[:, None])).sum(1))  # classes before the label
    if unit.norm == "l2":
        how = {"norm": "l2", "eps": OMEGA_RADII, "topk": target.topk, "steps": 10}
        arrays["omega"] = np.array(bounds.omega_statistics(target.network, images, labels, **how).omega)
    if unit.block == 0:  # for the figure
        arrays |= {"images": numpy(images), "adversarial": numpy(adversarial), "moved": numpy(moved.argmax(1))}
    return arrays


def estimated(make: Callable, unit: Unit, images: Tensor, labels: Tensor, count: int, **options: Any) -> Arrays:
    """L and omega at `count` radii around the distances to be expected and at those of Table 3; or why there are none."""
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk}
    some = target.fetch(target.rows["calibration"][:64], images.device)
    try:
        radii = bounds.default_radii(target.network, *some, count=count, **how)
        if not radii.isfinite().all():
            raise ValueError("gradients are exactly zero: there are no radii to look at")
        eps = torch.cat([radii, radii.new_tensor(OMEGA_RADII if unit.norm == "l2" else ())]).unique()
        found = make(target.network, images, labels, eps=eps, **how, **options)
    except ValueError as error:  # also where, say, no image of the block is classified correctly
        return {"refused": np.array(str(error))}
    arrays = {name: numpy(getattr(found, name)) for name in ("eps", "omega", "lipschitz")}
    return arrays | ({"maxima": found.gevs[0].maxima} if found.gevs else {})


def calibration_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances and margins, for estimate_by_calibration, and this block's suprema by ascent."""
    adversarial, found = attacked(unit, settings.alone, images, labels, generator)
    arrays = margins_of(unit, images, labels) | {"distances": found["distances"]}
    how = {"steps": 5, "known": [adversarial], "generator": generator}
    return arrays | estimated(bounds.estimate_by_ascent, unit, images, labels, 16, **how)


def sampling_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """The paper's estimate of L and omega, and the maxima it is fitted to.

    A block is a twentieth of the images at most: were it larger, the same few images would be the maximum of many
    blocks, and no distribution fits that.
    """
    size = min(64, max(1, len(images) // 20))
    how = {"blocks": settings.blocks, "block_size": size, "generator": generator}
    return estimated(bounds.estimate_by_sampling, unit, images, labels, 24, **how)


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

    arrays = {name: alone(name) for name in ("pgd", "boundary", "logbarrier")}
    known = arrays["pgd"][np.isfinite(arrays["pgd"]) & (arrays["pgd"] > 0)]
    eps = float(np.median(known)) if len(known) else 1.0
    arrays |= slopes(unit, images, labels, 0.05 * eps)
    arrays["by_eps"] = np.isfinite([alone("pgd", eps=scale * eps) for scale in AUDIT_SCALES])
    arrays["by_steps"] = np.isfinite([alone("pgd", eps=eps, steps=steps) for steps in AUDIT_STEPS])
    arrays["whole_box"] = np.isfinite(alone("pgd", eps=1.0 if norm == "linf" else math.sqrt(images[0].numel())))
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
    return {
        "zero": numpy((grad.flatten(1) == 0).all(1)),
        "zero_training": numpy((training_grad.flatten(1) == 0).all(1)),
        "flat": numpy(ahead <= start),
    }


def numpy(values: Any) -> np.ndarray:
    """On the CPU; numbers of 16 bits with 32, since numpy knows no bfloat16."""
    values = torch.as_tensor(values).detach().cpu()
    return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()


MEASURES = (sampling_part, calibration_part, evaluation_part, audit_part, smoothing_part)
PARTS: dict[str, Callable[..., Arrays]] = {part.__name__.removesuffix("_part"): part for part in MEASURES}


# --- doing them -------------------------------------------------------------------------------------------


def passes(unit: Unit, settings: Settings) -> float:
    """How many images go through the network for a part: about, as on the digits."""
    suite = 330 * min(5 if settings.alone else 3, len(unit.target.suite))
    each = {"evaluation": suite + 60, "calibration": suite + 350, "audit": 900, "smoothing": settings.samples}
    each["sampling"] = 26 * settings.blocks / 20
    return each[unit.kind] * len(unit.rows)


def work(units: list[Unit], settings: Settings, world: World) -> None:
    """Do the parts that are missing, one a process and round.  Raises Failure when a signal asked to stop."""
    keys = [key_of(unit, settings, world) for unit in units]
    missing = [i for i, unit in enumerate(units) if read_part(unit, keys[i]) is None] if world.main else None
    todo = world.same(missing)
    if len(todo) < len(units):
        world.console.print(f"{len(units) - len(todo)} of {len(units)} parts are there already")
    if todo:
        seconds = sum(passes(units[i], settings) * units[i].target.pace for i in todo) / world.size
        world.console.print(f"{len(todo)} parts to do, about {runs.duration(seconds)}")
    with Stop(world) as stop, runs.progress_bar(world.console, "evaluating", len(todo)) as show:
        for first in range(0, len(todo), world.size):
            for i in todo[first + world.rank : first + world.size][:1]:
                units[i].target.network.watch = watcher(stop, show, first, world.size, passes(units[i], settings))
                with contextlib.suppress(InterruptedError):  # the part is done again another time
                    write_part(units[i], keys[i], compute(units[i], settings, world))
            (signum,) = world.max(torch.tensor([stop.signal]))
            if signum:
                raise Failure("stopped; the same command goes on from here", 128 + int(signum))
            show(min(first + world.size, len(todo)))


def watcher(stop: Stop, show: Callable[[float], None], done: int, size: int, expected: float) -> Callable[[int], None]:
    """What a network calls for a part: moves the progress within it, and obeys a signal within one pass."""
    seen = 0

    def watch(images: int) -> None:
        nonlocal seen
        if stop.signal:
            raise InterruptedError
        before, seen = seen, seen + images
        if int(100 * before / expected) < int(100 * seen / expected) < 100:
            show(done + size * seen / expected)

    return watch


# --- the masking audit (Athalye et al. 2018, Carlini et al. 2019) -----------------------------------------


class Verdict(NamedTuple):
    """One line of the audit: what was looked at, its figure, the limit it has to keep, and whether it does."""

    line: str
    figure: float
    unit: str
    limit: str
    passed: bool


def at_most(line: str, figure: float, limit: float, unit: str = "%") -> Verdict:
    return Verdict(line, figure, unit, f"at most {limit:g}", bool(figure <= limit))


def largest_fall(errors: np.ndarray) -> float:
    """By how much a sequence that should rise falls below its running maximum."""
    return float((np.maximum.accumulate(errors) - errors).max())


def ratio_to_pgd(distances: np.ndarray, pgd: np.ndarray) -> np.ndarray:
    """distances / pgd of the images that were classified correctly; 1 where neither attack found anything."""
    with np.errstate(invalid="ignore"):
        ratios = distances[pgd > 0] / pgd[pgd > 0]
    return np.where(np.isnan(ratios), 1.0, ratios) if len(ratios) else np.ones(1)


def audit(found: Arrays) -> list[Verdict]:
    """The verdicts of one target and norm, from the arrays of `audit_part`."""
    black_box = ratio_to_pgd(found["boundary"], found["pgd"])
    non_local = float(np.median(ratio_to_pgd(found["logbarrier"], found["pgd"])))
    error = 100 * float(found["whole_box"].mean())
    verdicts = [
        at_most("gradient of the margin exactly zero", 100 * found["zero"].mean(), 1),
        at_most("gradient of the cross-entropy exactly zero", 100 * found["zero_training"].mean(), 1),
        at_most("a step along the gradient does not raise the margin", 100 * found["flat"].mean(), 5),
        at_most("black-box attack nearer than PGD by 5 %", 100 * float((black_box < 0.95).mean()), 10),
        Verdict("non-local attack's distance over PGD's, median", non_local, "", "at least 0.9", non_local >= 0.9),
        Verdict("error under PGD in the whole box", error, "%", "at least 100", error == 100),
        at_most("error falls as eps grows", largest_fall(100 * found["by_eps"].mean(1)), 5, "points"),
        at_most("error falls with more steps", largest_fall(100 * found["by_steps"].mean(1)), 5, "points"),
    ]
    if "transferred" in found:
        white_box = found["by_eps"][AUDIT_SCALES.index(1.0)]
        excess = 100 * float(found["transferred"].mean() - white_box.mean())
        verdicts.append(at_most("attacks on the undefended network do better than its own by", excess, 0, "points"))
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
    gev: bounds.GEV | None
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
    """Each array over all parts; along the images, which are the last axis of the audit's and else the first."""
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    axis = {"by_eps": 1, "by_steps": 1}
    return {n: np.concatenate([np.atleast_1d(p[n]) for p in parts], axis.get(n, 0)) for n in sorted(names - {"key"})}


def assemble(target: Target, settings: Settings, world: World) -> Evaluation:
    """An evaluation from its parts, which must all be there."""
    parts: dict[tuple[str, str | float], list[Arrays]] = {}
    for unit in units_of(target, settings):
        part = read_part(unit, key_of(unit, settings, world))
        parts.setdefault((unit.kind, unit.sigma or unit.norm), []).append(part)
    norms = {}
    for norm in settings.norms:
        found = joined(parts["evaluation", norm]) | {"first": parts["evaluation", norm][0]}
        if norm == "l2":
            found["omega"] = found["omega"].reshape(-1, len(OMEGA_RADII)).max(0)
        sampled = parts.get(("sampling", norm), [])
        gev = bounds.fit_gev(sampled[0]["maxima"]) if sampled and "maxima" in sampled[0] else None
        norms[norm] = Measured(found, audit(joined(parts["audit", norm])), gev, {}, {})
        add_bounds(norms[norm], parts.get(("calibration", norm), []), sampled, norm, target.topk)
    smoothing = {sigma: joined(parts["smoothing", sigma]) for sigma in settings.smoothing}
    return Evaluation(target, settings, norms, smoothing)


def margins_in(found: Arrays, loss: str, norm: str, topk: int, rivals: int | None = None) -> bounds.Margins:
    """Those of the nearest `rivals` classes, of all without that."""
    both = (torch.from_numpy(found[f"{loss}_{what}"])[:, :rivals] for what in ("losses", "grad_norms"))
    return bounds.Margins(*both, norm, topk, loss)


def add_bounds(measured: Measured, calibration: list[Arrays], sampled: list[Arrays], norm: str, topk: int) -> None:
    """The bounds of each method that was asked for, on the evaluation images, or why there are none."""
    makers = [("calibration", calibration, "logits"), ("ascent", calibration, "logits")]
    makers += [("sampling", sampled, "probabilities")]
    for method, parts, loss in [maker for maker in makers if maker[1]]:
        try:
            if method == "calibration":
                found = joined(parts)
                known, distances = margins_in(found, loss, norm, topk), torch.from_numpy(found["distances"])
                constants = bounds.estimate_by_calibration(known, distances)
            else:
                constants = estimate_in(parts, method, loss, norm, topk)
            # Unlike the calibrated, the other constants are those of the nearest class alone.
            margins = margins_in(measured.found, loss, norm, topk, None if method == "calibration" else 1)
            both = bounds.lipschitz_bound(margins, constants), bounds.omega_bound(margins, constants)
            measured.bounds[method] = Bounds(*both, constants)
        except ValueError as error:
            measured.refused[method] = str(error)


def estimate_in(parts: list[Arrays], method: str, loss: str, norm: str, topk: int) -> bounds.Estimate:
    """The blocks' suprema are maxima over images: theirs is the maximum over the blocks."""
    usable = [part for part in parts if "refused" not in part]
    if not usable:
        raise ValueError(str(parts[0]["refused"]))
    omega, lipschitz = (np.max([part[name] for part in usable], axis=0) for name in ("omega", "lipschitz"))
    eps = torch.from_numpy(usable[0]["eps"])
    return bounds.Estimate(method, norm, topk, loss, float(lipschitz), eps, torch.from_numpy(omega))


# --- command line -----------------------------------------------------------------------------------------


def make_directory(path: Path) -> None:
    """Make the directory, if need be, and try it out.  Raises Failure."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace(path / ".writable", b"", sync=False)
        (path / ".writable").unlink()
    except OSError as error:
        raise Failure(f"{path}: cannot write there ({error.strerror})", 2) from None


def shortened(name: str) -> str:
    """A name that a file may have, still different for different names."""
    return name if len(name) <= 200 else f"{name[:190]}-{hashlib.sha256(name.encode()).hexdigest()[:6]}"


def set_precision(device: torch.device) -> None:
    """One thread a process and full precision, so that neither the processes nor the batches change a result."""
    if device.type == "cpu":
        torch.set_num_threads(1)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True


def option(panel: str, text: str, **limits: float) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, **limits)


IMAGES, WORK, FILES = "The images", "What is done", "Where"


# fmt: off
def main(
    targets: Annotated[list[str], typer.Argument(help="Run directories, or FILE.py:FACTORY (a function that returns an nn.Module for images in [0, 1]).")],
    dataset: Annotated[str, typer.Option("--data", help="The images for FILE.py:FACTORY (digits, cifar10, imagenet, or an image folder).", rich_help_panel=IMAGES)] = "digits",
    data_dir: Annotated[Path | None, option(IMAGES, "Where the images are (default: where the run had them; else data).")] = None,
    size: Annotated[int | None, option(IMAGES, "Pixels a side of images read from a folder of large ones (default: as the run was trained; else 224).", min=1)] = None,
    images: Annotated[int, option(IMAGES, "Images to evaluate; at most half of the test images.", min=2)] = 1000,
    calibration: Annotated[int, option(IMAGES, "Other images, attacked to calibrate the bounds: 199 or more; 0 for no bounds.", min=0)] = 200,
    topk: Annotated[int | None, option(IMAGES, "Count an image as right when its label is in the top K (default 1; imagenet 5).", min=1)] = None,
    seed: Annotated[int, option(IMAGES, "Draws the images, and every random start.", min=0)] = 0,
    norm: Annotated[list[str], option(WORK, "Norms of the attacks: l2, linf.")] = ["l2", "linf"],  # noqa: B006
    suite: Annotated[str, option(WORK, "best: until two attacks in a row bring an image no nearer.  paper: PGD, Carlini-Wagner, Boundary and LogBarrier, each alone on every image.")] = "best",
    attack: Annotated[list[str] | None, option(WORK, "Attacks to use, in this order (default: all of the suite).")] = None,
    blocks: Annotated[int, option(WORK, "Blocks for the paper's estimate by sampling, 5 or more; 0: leave it out.", min=0)] = 100,
    audit_images: Annotated[int, option(WORK, "Images for the masking audit.", min=1)] = 100,
    smoothing: Annotated[list[float] | None, option(WORK, "Certify by randomized smoothing with this standard deviation; may be given several times.")] = None,
    samples: Annotated[int, option(WORK, "Noisy copies of an image for --smoothing; the more, the larger the radii that can be certified.", min=100)] = 10_000,
    out: Annotated[Path, option(FILES, "For comparisons, and for FILE.py:FACTORY; a run's own report goes into the run.")] = Path("evaluations"),
    device: Annotated[str | None, option(FILES, "cpu, cuda or cuda:N (default cuda where there is one).")] = None,
) -> None:
    """Measure how robust networks are: the paper's tables and figures, and a masking audit."""
    # fmt: on
    if 0 < blocks < 5:
        raise Failure(f"--blocks must be 0, or 5 or more, not {blocks}", 2)
    sigmas = tuple(sorted(set(smoothing or ())))
    if wrong := [sigma for sigma in sigmas if not 0 < sigma < math.inf]:
        raise Failure(f"--smoothing must be positive, not {wrong[0]}", 2)
    norms, names = tuple(dict.fromkeys(norm)), tuple(dict.fromkeys(attack or SUITES.get(suite, ())))
    for name, given, known in (("suite", {suite}, SUITES), ("attack", names, attacks.SUITE), ("norm", norms, RADII)):
        if unknown := set(given) - set(known):
            raise Failure(f"--{name} must be one of {', '.join(known)}, not {min(unknown)}", 2)
    options = images, calibration, seed, names, suite == "paper", blocks, audit_images, sigmas, samples
    settings = Settings(norms, *options, dataset, data_dir, size, topk, out)
    import report  # here, since it imports this module

    with contextlib.closing(World(device)) as world:
        set_precision(world.device)
        opened = open_targets(targets, settings)
        for target in opened:
            prepare(target, settings, world)
            report.introduce(target, settings, world.console)
        together = out / shortened("_vs_".join(target.name for target in opened)) if opened[1:] else opened[0].path
        if world.main:
            for path in (together, *(target.path / "parts" for target in opened)):
                make_directory(path)
        work([unit for target in opened for unit in units_of(target, settings)], settings, world)
        if world.main:
            report.publish([assemble(target, settings, world) for target in opened], together, world)


if __name__ == "__main__":
    sys.modules["evaluate"] = sys.modules["__main__"]  # one module, also for report.py, which imports evaluate
    sys.exit(runs.run_command(main))
