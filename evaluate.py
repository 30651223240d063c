"""Section 4: the paper's tables and figures, for a trained run or for anybody's model, and what they are worth.

    python evaluate.py runs/digits-none-seed0 runs/digits-fd-l2-lam1-seed0      two runs, side by side
    python evaluate.py model.py:build --data cifar10 --data-dir DIR             a function that returns an nn.Module
    torchrun --nproc_per_node 4 evaluate.py runs/latest                         the same report, sooner
    python evaluate.py runs/latest --smoothing 0.25                             and randomized smoothing (Table 5)

A model maps images with pixels in [0, 1] to logits.  Two disjoint parts of the test images are drawn by the seed:
calibration images, from which the bounds' constants are estimated, and evaluation images, for everything else.

    distances   the smallest over the suite of attacks.py: upper bounds of the true distance, nothing more
    bounds      Prop. 2.2 with three estimates of L and omega, none of them a certificate.  So each is printed
                with the share of images on which an adversarial image is nearer than it says ("false")
    audit       does anything suggest that the distances are large only because gradients are masked?

Every percentage has a 95 % Clopper-Pearson interval, every mean a t interval; differences between two models are
paired, on the same images.  The intervals speak of the draw of the images, not of the seed of the training.

The work is cut into parts, each a pure function of network, images, options and seed, and each is a file that is
written whole.  So the same command goes on where it was interrupted, any number of processes share the parts, and
the report is the same, byte for byte (on the CPU, where a process uses one thread: use torchrun for more cores).

This module is long because it is three things that share their words: what is measured (parts), how it is put
together (intervals, audit, bounds), and how it is shown (tables, figures, report).  Each can be read alone.
"""

import contextlib
import csv
import functools
import hashlib
import io
import json
import math
import sys
import zipfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import scipy.stats
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from torch import Generator, Tensor, nn

import attacks
import bounds
import data
import gradreg
import models
from gradreg import cross_entropy, direction, input_gradient
from runs import (
    Failure,
    Stop,
    World,
    duration,
    progress_bar,
    provenance,
    read_checkpoint,
    refuse_if_running,
    replace,
    run_command,
)

BLOCK = 25  # images in a part
RADII = {  # at which errors are reported: those of Tables 1 and 6, and what the 8x8 digits need
    "l2": {"0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1.0": 1.0, "1.25": 1.25, "1.5": 1.5},
    "linf": {"2_255": 2 / 255, "8_255": 8 / 255, "32_255": 32 / 255},
}
OMEGA_RADII = (0.5, 1.0)  # of Table 3, in l2
SMOOTHING_RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # of Table 5
SAMPLED = 1000  # images for the paper's estimate, where there are as many
RIVALS = 9  # classes that the calibrated bound looks at
AUDIT_SCALES = (0.25, 0.5, 1.0, 2.0, 4.0)  # times PGD's median distance
AUDIT_STEPS = (1, 5, 20, 100)
METHODS = {"calibration": "calibrated", "ascent": "ascent", "sampling": "sampled"}
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito (2008)


# --- what is evaluated ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """Options that every target shares."""

    norms: tuple[str, ...]
    images: int
    calibration: int
    seed: int
    suite: tuple[str, ...]
    blocks: int
    audit: int
    smoothing: float | None
    samples: int


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
    seconds: float | None = None
    code: bytes = b""  # of a stranger's network: its forward pass may change while its weights stay
    suite: tuple[str, ...] = ()  # attacks
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    blind: bool = False  # no gradient reaches the image
    undefended: "Target | None" = None  # whose attacks are tried on this one

    def __post_init__(self) -> None:
        self.network.eval().requires_grad_(False)
        digest = hashlib.sha256(repr(self.network).encode() + self.code)
        for name, value in self.network.state_dict().items():
            digest.update(name.encode())
            if isinstance(value, Tensor):
                digest.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy())
        self.fingerprint = digest.hexdigest()[:16]

    def fetch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        return data.fetch(self.source, np.asarray(rows), device)

    def same_images(self, other: "Target") -> bool:
        """Whether a comparison with the other target, image by image, makes sense."""
        return self.dataset == other.dataset and len(self.source) == len(other.source) and self.topk == other.topk


def open_run(path: Path, data_dir: Path | None, topk: int | None) -> Target:
    """A run directory's network and test images.  Raises Failure."""
    refuse_if_running(path)
    try:
        config = read_checkpoint(path / "checkpoint.pt")["config"]
        network = models.load(path)
    except ValueError as error:
        raise Failure(str(error), 2) from None
    options = config["options"]
    source, classes = data.load_test(options["dataset"], data_dir or Path(options["data_dir"]))
    if isinstance(source, data.Files) and "phases" in options:
        source = source.at(options["phases"][-1]["size"])  # that the network was trained on last
    topk = topk or (5 if options["dataset"] == "imagenet" else 1)
    dataset = Path(options["dataset"]).name
    target = Target(path.resolve().name, network, path / "evaluation", dataset, source, classes, topk, config)
    target.seconds = seconds_of(path / "metrics.jsonl")
    return target


def seconds_of(log: Path) -> float | None:
    """The training time in the last "epoch" record; broken lines are passed over, as every reader of a log must."""
    with contextlib.suppress(OSError):
        for line in reversed(log.read_bytes().splitlines()):
            with contextlib.suppress(ValueError, KeyError, TypeError):
                return float(json.loads(line)["seconds"])
    return None


def open_factory(spec: str, name: str, data_dir: Path, topk: int | None, root: Path, seed: int) -> Target:
    """The network that FILE.py:FACTORY returns; its weights, where they are random, depend on the seed."""
    source, classes = data.load_test(name, data_dir)
    network = models.from_file(spec, classes=len(classes), seed=seed)
    file, _, factory = spec.rpartition(":")
    topk = topk or (5 if name == "imagenet" else 1)
    label = f"{Path(file).stem}-{factory}"
    content = Path(file).read_bytes()
    return Target(label, network, root / label, Path(name).name, source, classes, topk, code=content)


def prepare(target: Target, settings: Settings, world: World) -> None:
    """Draw the images, and refuse what cannot be measured.  Raises Failure."""
    order = data.order(len(target.source), seed=settings.seed, epoch=0)
    count = min(settings.images, len(order) // 2)
    calibration = min(settings.calibration, len(order) - count)
    others = order[count : count + (max(calibration, SAMPLED) if calibration else 0)]
    target.rows = {"evaluation": order[:count], "calibration": others[:calibration], "sampling": others}
    target.network.to(world.device)
    images, labels = target.fetch(target.rows["evaluation"][:BLOCK], world.device)
    try:
        with torch.no_grad():
            classes = target.network(images[:1]).shape[1]
        if classes != len(target.classes):
            given = f"the images of {target.dataset} have {len(target.classes)}"
            raise ValueError(f"the model has {classes} classes, {given}")
        attacks.check_model(target.network, images, labels, topk=target.topk, gradients=False)
        margins = bounds.margins(target.network, images, labels, norm="l2", topk=target.topk, batch_size=BLOCK)
    except Exception as error:  # a stranger's model may raise anything
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Failure(f"{target.name}: {kind}{error}", 2) from None
    target.suite = settings.suite
    target.blind = margins.zero_gradients == 1
    if target.blind:
        target.suite = ("boundary",)  # the others need a gradient


# --- parts: pure functions of network, images, options and seed -------------------------------------------

Arrays = dict[str, np.ndarray]


class Unit(NamedTuple):
    """A part to be done: what, in which norm, on which test images."""

    target: Target
    kind: str
    norm: str
    block: int
    rows: tuple[int, ...]

    @property
    def file(self) -> Path:
        return self.target.path / "parts" / f"{self.kind}-{self.norm}-{self.block:04d}.npz"


def units_of(target: Target, settings: Settings) -> list[Unit]:
    """Everything that has to be done for a target; the longest parts come first."""
    units = []
    for norm in settings.norms:
        if settings.blocks and len(target.rows["sampling"]):
            units.append(Unit(target, "sampling", norm, 0, tuple(target.rows["sampling"].tolist())))
    for norm in settings.norms:
        for kind, limit in (("calibration", None), ("evaluation", None), ("audit", settings.audit)):
            units += blocks_of(target, kind, norm, limit)
    return units + (blocks_of(target, "smoothing", "l2", None) if settings.smoothing else [])


def blocks_of(target: Target, kind: str, norm: str, limit: int | None) -> list[Unit]:
    rows = target.rows["calibration" if kind == "calibration" else "evaluation"][:limit].tolist()
    starts = range(0, len(rows), BLOCK)
    return [Unit(target, kind, norm, i, tuple(rows[start : start + BLOCK])) for i, start in enumerate(starts)]


def key_of(unit: Unit, settings: Settings, world: World) -> str:
    """All that a part depends on, in one string: a part with another key is done again."""
    target = unit.target
    depends = {
        "calibration": {"suite": target.suite},
        "evaluation": {"suite": target.suite},
        "audit": {"undefended": target.undefended and target.undefended.fingerprint},
        "sampling": {"blocks": settings.blocks},
        "smoothing": {"sigma": settings.smoothing, "samples": settings.samples},
    }[unit.kind]
    depends |= {"format": 1, "kind": unit.kind, "norm": unit.norm, "rows": unit.rows, "seed": settings.seed}
    depends |= {"network": target.fingerprint, "topk": target.topk, "dataset": target.dataset}
    depends |= {
        "code": code(),
        "images": pixels_of(target.source, unit.rows),
        "grid": target.rows["calibration"][:64].tolist(),
    }
    return json.dumps(depends | {"torch": str(torch.__version__), "device": world.device.type}, sort_keys=True)


@functools.cache
def code() -> str:
    """A digest of the code that measures: with another attack or bound, the parts are done again."""
    files = [Path(module.__file__).read_bytes() for module in (attacks, bounds, gradreg)]
    return hashlib.sha256(b"".join(files)).hexdigest()[:16]


def pixels_of(source: data.Source, rows: Sequence[int]) -> str:
    """A digest that changes with the images (files: with their names and sizes)."""
    if isinstance(source, data.InMemory):
        content = source.images[list(rows)].cpu().contiguous().numpy().tobytes()
    else:
        content = repr([(source.paths[i].name, source.paths[i].stat().st_size) for i in rows]).encode()
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


def attacked(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> attacks.Smallest:
    how = {"norm": unit.norm, "attacks": unit.target.suite, "topk": unit.target.topk, "check": False}
    return attacks.smallest(unit.target.network, images, labels, **how, generator=generator)


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
    target, found = unit.target, attacked(unit, images, labels, generator)
    with torch.no_grad():
        logits, moved = target.network(images), target.network(found.adversarial)
    arrays = margins_of(unit, images, labels) | {
        "labels": numpy(labels),
        "predicted": numpy(logits.argmax(1)),
        "ahead": numpy((logits > logits.gather(1, labels[:, None])).sum(1)),  # classes before the label
        "distances": numpy(found.distances),
        "attacks": np.array(found.attacks),
        "calls": np.array(sum(found.calls.values()) * len(images)),
    }
    if unit.norm == "l2":
        how = {"norm": "l2", "eps": OMEGA_RADII, "topk": target.topk, "steps": 10}
        arrays["omega"] = np.array(bounds.omega_statistics(target.network, images, labels, **how).omega)
    if unit.block == 0:  # for the figure
        arrays |= {"images": numpy(images), "adversarial": numpy(found.adversarial), "moved": numpy(moved.argmax(1))}
    return arrays


def radii_of(unit: Unit, device: torch.device, count: int) -> Tensor:
    """Radii at which omega is estimated: around the distances to be expected, and those of Table 3."""
    target = unit.target
    images, labels = target.fetch(target.rows["calibration"][:64], device)
    radii = bounds.default_radii(target.network, images, labels, norm=unit.norm, topk=target.topk, count=count)
    if not radii.isfinite().all():
        raise ValueError("gradients are exactly zero: there are no radii to look at")
    return torch.cat([radii, radii.new_tensor(OMEGA_RADII if unit.norm == "l2" else ())]).unique()


def calibration_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances and margins, for estimate_by_calibration, and this block's suprema by ascent."""
    found = attacked(unit, images, labels, generator)
    arrays = margins_of(unit, images, labels) | {"distances": numpy(found.distances)}
    try:
        estimate = bounds.estimate_by_ascent(
            unit.target.network,
            images,
            labels,
            norm=unit.norm,
            eps=radii_of(unit, images.device, 16),
            topk=unit.target.topk,
            steps=5,
            known=[found.adversarial],
            generator=generator,
        )
    except ValueError as error:  # say, no image of the block is classified correctly
        return arrays | {"refused": np.array(str(error))}
    return arrays | {name: numpy(getattr(estimate, name)) for name in ("eps", "omega", "lipschitz")}


def sampling_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """The paper's estimate of L and omega, and the maxima it is fitted to.

    A block is a twentieth of the images at most: were it larger, the same few images would be the maximum of many
    blocks, and no distribution fits that.
    """
    how = {"norm": unit.norm, "topk": unit.target.topk, "blocks": settings.blocks, "generator": generator}
    how["block_size"] = min(64, max(1, len(images) // 20))
    try:
        eps = radii_of(unit, images.device, 24)
        estimate = bounds.estimate_by_sampling(unit.target.network, images, labels, eps=eps, **how)
    except ValueError as error:
        return {"refused": np.array(str(error))}
    arrays = {name: numpy(getattr(estimate, name)) for name in ("eps", "omega", "lipschitz")}
    return arrays | {"maxima": estimate.gevs[0].maxima, "status": np.array([gev.status for gev in estimate.gevs])}


def smoothing_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Classes and certified radii of the smoothed classifier (Cohen et al. 2019)."""
    how = {"sigma": settings.smoothing, "n": settings.samples, "generator": generator}
    found = bounds.certify_smoothing(unit.target.network, images, **how)
    right = found.classes.to(labels.device) == labels
    return {
        "classes": numpy(found.classes),
        "radii": numpy(found.radii),
        "right": numpy(right),
        "cap": numpy(found.cap),
    }


def audit_part(unit: Unit, settings: Settings, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Attacks of three families, each on its own, and PGD with more and more radius and steps."""
    target, norm = unit.target, unit.norm
    how = {"norm": norm, "topk": target.topk, "generator": generator}

    def wrong(x: Tensor) -> Tensor:
        with torch.no_grad():
            return attacks.margin(target.network(x), labels, target.topk) > 0

    def pgd(eps: float, steps: int = 20) -> np.ndarray:
        return numpy(wrong(attacks.pgd(target.network, images, labels, eps=eps, steps=steps, **how)))

    arrays = {}
    for name in ("pgd", "boundary", "logbarrier"):
        found = getattr(attacks, name)(target.network, images, labels, **how)
        arrays[name] = numpy(attacks.distance(images, found, norm).masked_fill(~wrong(found), math.inf))
    known = arrays["pgd"][np.isfinite(arrays["pgd"]) & (arrays["pgd"] > 0)]
    eps = float(np.median(known)) if len(known) else 1.0
    arrays |= slopes(unit, images, labels, 0.05 * eps)
    arrays["by_eps"] = np.stack([pgd(scale * eps) for scale in AUDIT_SCALES])
    arrays["by_steps"] = np.stack([pgd(eps, steps) for steps in AUDIT_STEPS])
    arrays["whole_box"] = pgd(1.0 if norm == "linf" else math.sqrt(images[0].numel()))
    if target.undefended:
        moved = attacks.pgd(target.undefended.network, images, labels, eps=eps, **how)
        arrays["transferred"] = numpy(wrong(moved))
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
    return torch.as_tensor(values).detach().cpu().numpy()


PARTS: dict[str, Callable[..., Arrays]] = {
    "sampling": sampling_part,
    "calibration": calibration_part,
    "evaluation": evaluation_part,
    "audit": audit_part,
    "smoothing": smoothing_part,
}


def work(units: list[Unit], settings: Settings, world: World) -> None:
    """Do the parts that are missing, one a process and round.  Raises Failure when a signal asked to stop."""
    keys = [key_of(unit, settings, world) for unit in units]
    missing = [i for i, unit in enumerate(units) if read_part(unit, keys[i]) is None] if world.main else None
    todo = world.same(missing)
    if len(todo) < len(units):
        world.console.print(f"{len(units) - len(todo)} of {len(units)} parts are there already")
    with Stop(world) as stop, progress_bar(world.console, "evaluating", len(todo)) as show:
        for first in range(0, len(todo), world.size):
            for i in todo[first : first + world.size][world.rank : world.rank + 1]:
                write_part(units[i], keys[i], compute(units[i], settings, world))
            (signum,) = world.max(torch.tensor([stop.signal]))
            show(min(first + world.size, len(todo)))
            if signum:
                raise Failure("stopped; the same command goes on from here", 128 + int(signum))


# --- figures with their error bars ------------------------------------------------------------------------


class Interval(NamedTuple):
    """A value and its 95 % confidence interval; decimals: how many to show, for percentages."""

    value: float
    low: float
    high: float
    decimals: int | None = None


def percent(hits: np.ndarray) -> Interval:
    """The share of True, in percent, with its Clopper-Pearson interval."""
    found = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "exact")
    return Interval(100 * float(hits.mean()), 100 * float(found.low), 100 * float(found.high), 1)


def mean(values: np.ndarray) -> Interval:
    """The mean with its t interval; infinite, as the bound that it is, where a distance is not known."""
    values = np.asarray(values, dtype=float)
    centre, reach = float(values.mean()), math.inf
    if len(values) > 1 and math.isfinite(centre):
        reach = float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1))
    return Interval(centre, centre - reach, centre + reach)


def paired_percent(hits: np.ndarray, reference: np.ndarray) -> Interval:
    """Difference of two shares on the same images, in points: Wald with 1/2 a cell added (Agresti & Min 2005).

    The estimate is the plain difference; the interval is centred on the adjusted one, so that it has a length
    where the two never differ.
    """
    hits, reference, n = hits.astype(bool), reference.astype(bool), len(hits) + 2
    gained, lost = int((hits & ~reference).sum()) + 0.5, int((~hits & reference).sum()) + 0.5
    centre = (gained - lost) / n
    reach = scipy.stats.norm.ppf(0.975) * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    difference = 100 * (hits.mean() - reference.mean())
    return Interval(float(difference), 100 * (centre - reach), 100 * (centre + reach), 1)


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


class Bound(NamedTuple):
    """Both bounds of Prop. 2.2 with one method's constants (N,), and how often each is false."""

    lipschitz: Tensor
    omega: Tensor
    lipschitz_violations: bounds.Violations
    omega_violations: bounds.Violations
    constants: bounds.Estimate


@dataclass
class Measured:
    """What is known of one target in one norm."""

    found: Arrays  # evaluation_part's, over all images
    bounds: dict[str, Bound]
    refused: dict[str, str]  # method -> why there is no bound
    verdicts: list[Verdict]
    gev: bounds.GEV | None

    @property
    def best(self) -> str | None:
        """The method whose bounds are reported where there is room for one."""
        return next((method for method in METHODS if method in self.bounds), None)

    def error_within(self, radius: float) -> np.ndarray:
        """Images (N,) with an adversarial image within the radius; misclassified ones always."""
        return self.found["distances"] <= radius


@dataclass
class Evaluation:
    """A target and what was measured of it."""

    target: Target
    settings: Settings
    norms: dict[str, Measured]
    smoothing: Arrays | None
    name: str

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
    parts: dict[tuple[str, str], list[Arrays]] = {}
    for unit in units_of(target, settings):
        part = read_part(unit, key_of(unit, settings, world))
        parts.setdefault((unit.kind, unit.norm), []).append(part)
    norms = {}
    for norm in settings.norms:
        found = joined(parts["evaluation", norm]) | {"first": parts["evaluation", norm][0]}
        if norm == "l2":
            found["omega"] = found["omega"].reshape(-1, len(OMEGA_RADII)).max(0)
        measured = Measured(found, {}, {}, audit(joined(parts["audit", norm])), None)
        sampled = parts.get(("sampling", norm), [{"refused": "not asked for"}])[0]
        if "maxima" in sampled:
            measured.gev = bounds.fit_gev(sampled["maxima"])
        add_bounds(measured, parts.get(("calibration", norm), []), sampled, norm, target.topk)
        norms[norm] = measured
    smoothing = joined(parts["smoothing", "l2"]) if settings.smoothing else None
    return Evaluation(target, settings, norms, smoothing, target.name)


def margins_in(found: Arrays, loss: str, norm: str, topk: int) -> bounds.Margins:
    losses, grad_norms = (torch.from_numpy(found[f"{loss}_{what}"]) for what in ("losses", "grad_norms"))
    return bounds.Margins(losses, grad_norms, norm, topk, loss)


def add_bounds(measured: Measured, calibration: list[Arrays], sampled: Arrays, norm: str, topk: int) -> None:
    """The bounds of each method on the evaluation images, or why there are none."""
    makers = {
        "calibration": lambda: calibrated(calibration, norm, topk),
        "ascent": lambda: ascended(calibration, norm, topk),
        "sampling": lambda: estimate_in(sampled, "sampling", "probabilities", norm, topk),
    }
    distances = torch.from_numpy(measured.found["distances"])
    for method, make in makers.items():
        try:
            constants = make()
            margins = margins_in(measured.found, constants.loss, norm, topk)
            if method == "ascent":  # its constants are those of the nearest class alone
                margins = bounds.Margins(margins.losses[:, :1], margins.grad_norms[:, :1], norm, topk, "logits")
            lipschitz = bounds.lipschitz_bound(margins, constants)
            omega = bounds.omega_bound(margins, constants)
        except ValueError as error:
            measured.refused[method] = str(error)
            continue
        false = [bounds.violations(bound, distances) for bound in (lipschitz, omega)]
        measured.bounds[method] = Bound(lipschitz, omega, *false, constants)


def calibrated(parts: list[Arrays], norm: str, topk: int) -> bounds.Estimate:
    if not parts:
        raise ValueError("no calibration images")
    found = joined(parts)
    return bounds.estimate_by_calibration(margins_in(found, "logits", norm, topk), torch.from_numpy(found["distances"]))


def ascended(parts: list[Arrays], norm: str, topk: int) -> bounds.Estimate:
    """The blocks' suprema are maxima over images: theirs is the maximum over the blocks."""
    usable = [part for part in parts if "refused" not in part]
    if not usable:
        raise ValueError(str(parts[0]["refused"]) if parts else "no calibration images")
    highest = {name: np.max([part[name] for part in usable], axis=0) for name in ("omega", "lipschitz")}
    return estimate_in(highest | {"eps": usable[0]["eps"]}, "ascent", "logits", norm, topk)


def estimate_in(arrays: Arrays, method: str, loss: str, norm: str, topk: int) -> bounds.Estimate:
    if "refused" in arrays:
        raise ValueError(str(arrays["refused"]))
    eps, omega = torch.from_numpy(arrays["eps"]), torch.from_numpy(arrays["omega"])
    return bounds.Estimate(method, norm, topk, loss, float(arrays["lipschitz"]), eps, omega)


# --- tables -----------------------------------------------------------------------------------------------

Row = dict[str, Any]  # column -> text, number, Interval or nothing


class Table(NamedTuple):
    """A table that can be shown as Markdown, as CSV and on a terminal; columns: name -> heading."""

    name: str
    title: str
    columns: dict[str, str]
    rows: list[Row]


def number(value: float, decimals: int | None = None) -> str:
    """Three digits, or as many decimals as asked for."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if decimals is not None:
        return f"{value:.{decimals}f}"
    return (
        f"{value:.3g}"
        if abs(value) < 10 or abs(value) >= 1e6
        else f"{value:.1f}"
        if abs(value) < 1000
        else f"{value:,.0f}"
    )


def text(cell: Any) -> str:
    """A cell with its interval, if it has one."""
    if isinstance(cell, Interval):
        if not math.isfinite(cell.value):
            return number(cell.value)
        value, low, high = (number(v, cell.decimals) for v in cell[:3])
        return f"{value} ({low} to {high})"
    if isinstance(cell, float):
        return number(cell)
    return "" if cell is None else str(cell)


def markdown(table: Table) -> str:
    lines = [" | ".join(table.columns.values()), " | ".join("---" for _ in table.columns)]
    lines += [" | ".join(text(row.get(column)).replace("|", "/") for column in table.columns) for row in table.rows]
    return "\n".join([f"### {table.title}\n", *(f"| {line} |" for line in lines), ""])


def as_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def table_csv(table: Table) -> bytes:
    """One column each for a value and the ends of its interval, where any row has one."""
    wide = {c for c in table.columns for row in table.rows if isinstance(row.get(c), Interval)}
    header = [name for c in table.columns for name in ((c, f"{c}_low", f"{c}_high") if c in wide else (c,))]
    rows = []
    for row in table.rows:
        cells = {c: row.get(c) for c in table.columns}
        rows.append([v for c in cells for v in (spread(cells[c]) if c in wide else (cells[c],))])
    return as_csv(header, rows)


def spread(cell: Any) -> tuple:
    return cell[:3] if isinstance(cell, Interval) else (cell, None, None)


def show(table: Table, world: World) -> None:
    """The table on a terminal, without its intervals."""
    shown = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD)
    for column, heading in table.columns.items():
        words = column in ("model", "bound", "norm", "line", "by", "training")
        whole = column in ("model", "bound", "line", "limit")
        shown.add_column(heading, justify="left" if words else "right", no_wrap=whole, overflow="fold")
    for row in table.rows:
        cells = [row.get(column) for column in table.columns]
        values = [number(c.value, c.decimals) if isinstance(c, Interval) else text(c) for c in cells]
        shown.add_row(*values)
    world.console.print(shown)


def paper_rows(number: str, dataset: str) -> dict[str, Row]:
    """The paper's rows of a table by model; from results/paper_tables.csv."""
    rows: dict[str, Row] = {}
    with open(Path(__file__).parent / "results" / "paper_tables.csv", newline="") as file:
        for line in csv.DictReader(file):
            if (line["table"], line["dataset"]) == (number, dataset):
                row = rows.setdefault(line["model"], {"model": f"paper: {line['model']}"})
                row[line["quantity"]] = float(line["value"])
    for row in rows.values():
        if "train_hours" in row:
            row["training"] = f"{row['train_hours']:g} h"
    return rows


def paper_row(number: str, evaluation: Evaluation) -> list[Row]:
    """The paper's row for a network of the same method and data set, where it has one."""
    options = (evaluation.target.config or {}).get("options", {})
    model = paper_model(options, evaluation.target.dataset)
    row = paper_rows(number, evaluation.target.dataset).get(model)
    return [row] if row else []


def paper_model(options: dict[str, Any], dataset: str) -> str:
    """What the paper's tables call the network that these options train."""
    method, eps = options.get("method"), 255 * options.get("eps", 0)
    if method == "none":
        return "undefended"
    if method == "at":
        return f"{options['norm']} {options['attack_steps']}-step AT eps={eps:g}/255"
    if method == "free":
        return f"linf For Free AT m={options['replays']}" if round(eps, 3) == 8 else "?"
    if dataset == "imagenet" and options.get("penalty_space", "normalized") != "normalized":
        return "?"
    kind = {"l2": "squared l2", "linf": "squared l1"}.get(options.get("norm"))
    how = {"fd": " (FD)", "exact": " (DBP)"}.get(method, "?") if dataset == "cifar10" else ""
    step = f" h={options.get('h'):g}" if method == "fd" and options.get("h") != 0.01 else ""
    return f"{kind}{how} lambda={options.get('lam', math.nan):g}{step}"


def training_of(evaluation: Evaluation) -> str | None:
    """How long it took and how long it was: a run of few epochs is not the paper's network."""
    target = evaluation.target
    if target.config is None or target.seconds is None:
        return None
    epochs, images = target.config["options"]["epochs"], target.config["images_train"]
    return f"{duration(target.seconds)}, {epochs} epochs of {images:,}"


class Case(NamedTuple):
    """What a row of a table with bounds is about; bound is None where all were refused."""

    evaluation: Evaluation
    measured: Measured
    method: str | None
    bound: Bound | None


class Column(NamedTuple):
    """A column of such a table: the paper's name for it where it has one, heading, and value in a row."""

    key: str
    heading: str
    value: Callable[[Case], Any]


def of_bound(key: str, heading: str, value: Callable[[Bound], Any]) -> Column:
    return Column(key, heading, lambda case: case.bound and value(case.bound))


def omega_error(key: str, heading: str, radius: float) -> Column:
    return of_bound(key, heading, lambda bound: percent(bound.omega.numpy() < radius))


def error_within(key: str, heading: str, radius: float) -> Column:
    return Column(key, heading, lambda case: percent(case.measured.found["distances"] <= radius))


def false(violations: bounds.Violations) -> Interval:
    return Interval(100 * violations.rate, 100 * violations.low, 100 * violations.high, 1)


def with_bounds(evaluations: list[Evaluation], number: str, norm: str, title: str, columns: list[Column]) -> Table:
    """Of each target a row for the most reliable bound, one for the paper's, and the paper's own row."""
    rows = []
    for evaluation in evaluations:
        measured = evaluation.norms[norm]
        for method in dict.fromkeys([measured.best, "sampling"]):
            if method is None or method in measured.bounds:
                case = Case(evaluation, measured, method, measured.bounds.get(method))
                rows.append({column.key: column.value(case) for column in columns})
        rows += paper_row(number, evaluation)
    return Table(f"table{number}", f"Table {number}. {title}", {c.key: c.heading for c in columns}, rows)


MODEL = Column("model", "model", lambda case: case.evaluation.name)
CLEAN = Column("clean_error_pct", "clean error %", lambda case: percent(case.evaluation.wrong))
METHOD = Column("bound", "bound", lambda case: METHODS.get(case.method, "refused"))
FALSE = of_bound("false", "false %", lambda bound: false(bound.omega_violations))
TRAINING = Column("training", "training", lambda case: training_of(case.evaluation))


def table_1(evaluations: list[Evaluation]) -> Table:
    """Errors that the ω-bound allows, and those found, at the same radii."""
    radii = [(name, name.replace("_", "/"), radius) for name, radius in RADII["linf"].items()]
    allowed = [omega_error(f"omega_error_pct_{name}", f"ω-bound error % at {eps}", r) for name, eps, r in radii]
    found = [error_within(f"empirical_error_pct_{name}", f"error % at {eps}", r) for name, eps, r in radii]
    columns = [MODEL, CLEAN, METHOD, *allowed, FALSE, *found, TRAINING]
    return with_bounds(evaluations, "1", "linf", "Robustness in linf", columns)


def table_2(evaluations: list[Evaluation]) -> Table:
    """Mean distances; those of misclassified images are 0, as in the paper."""
    columns = [
        MODEL,
        CLEAN,
        METHOD,
        of_bound("mean_distance_L_bound", "mean L-bound", lambda bound: mean(bound.lipschitz)),
        of_bound("false_L", "false %", lambda bound: false(bound.lipschitz_violations)),
        of_bound("mean_distance_omega_bound", "mean ω-bound", lambda bound: mean(bound.omega)),
        FALSE,
        Column("mean_distance_empirical", "mean distance found", lambda c: mean(c.measured.found["distances"])),
        TRAINING,
    ]
    return with_bounds(evaluations, "2", "l2", "Robustness in l2", columns)


def table_6(evaluations: list[Evaluation]) -> Table:
    allowed = [omega_error(name, name, radius) for name, radius in RADII["l2"].items()]
    title = "Error % within a radius by the ω-bound, l2"
    return with_bounds(evaluations, "6", "l2", title, [MODEL, METHOD, *allowed, FALSE])


def table_3(evaluations: list[Evaluation]) -> Table:
    """Regularity of the margin of the probabilities, in l2."""
    rows = []
    for evaluation in evaluations:
        measured = evaluation.norms["l2"]
        norms = measured.found["probabilities_grad_norms"][:, 0]
        head = {"model": evaluation.name, "grad_norm_mean": mean(norms), "grad_norm_max": float(norms.max())}
        omega = {f"omega_{r}": float(w) for r, w in zip(OMEGA_RADII, measured.found["omega"], strict=True)}
        rows.append(head | {"bound": "largest found by ascent"} | omega)
        if sampled := measured.bounds.get("sampling"):
            constants = sampled.constants
            at = {f"omega_{r}": float(constants.omega[(constants.eps - r).abs().argmin()]) for r in OMEGA_RADII}
            rows.append(head | {"grad_norm_max": constants.lipschitz, "bound": METHODS["sampling"]} | at)
        rows += paper_row("3", evaluation)
    columns = {"model": "model", "bound": "estimate", "grad_norm_mean": "gradient norm, mean"}
    columns |= {"grad_norm_max": "max", "omega_0.5": "ω(0.5)", "omega_1.0": "ω(1.0)"}
    return Table("table3", "Table 3. Regularity of the margin of the probabilities, l2", columns, rows)


def table_4(evaluations: list[Evaluation]) -> Table | None:
    """Errors against the finite difference step; only where targets differ in it."""
    options = [(e.target.config or {}).get("options", {}) for e in evaluations]
    steps = {o["h"] for o in options if o.get("method") == "fd"}
    if len(steps) < 2:
        return None
    rows = []
    for evaluation, o in zip(evaluations, options, strict=True):
        row: Row = {"model": evaluation.name, "clean_error_pct": percent(evaluation.wrong)}
        row["h"] = o["h"] if o.get("method") == "fd" else None
        for name, radius in RADII["linf"].items():
            row[f"empirical_error_pct_{name}"] = percent(evaluation.norms["linf"].error_within(radius))
        rows.append(row)
    rows += list(paper_rows("4", evaluations[0].target.dataset).values())
    columns = {"model": "model", "h": "h", "clean_error_pct": "clean error %"}
    columns |= {f"empirical_error_pct_{n}": f"error % at {n.replace('_', '/')}" for n in RADII["linf"]}
    return Table("table4", "Table 4. Error against the finite difference step h, linf", columns, rows)


def table_5(evaluations: list[Evaluation]) -> Table:
    """Certified error of the smoothed classifier."""
    rows = []
    for evaluation in evaluations:
        radii, right = evaluation.smoothing["radii"], evaluation.smoothing["right"]
        rows.append({"model": evaluation.name} | {str(r): percent(~right | (radii < r)) for r in SMOOTHING_RADII})
    rows += list(paper_rows("5", evaluations[0].target.dataset).values())
    settings, cap = evaluations[0].settings, float(evaluations[0].smoothing["cap"][0])
    title = f"Table 5. Certified error % of the smoothed classifier, l2: sigma {settings.smoothing:g}"
    title += f", {settings.samples:,} samples, confidence 99.9 % an image, no radius above {cap:.2f}"
    return Table("table5", title, {"model": "model"} | {str(r): str(r) for r in SMOOTHING_RADII}, rows)


def bounds_table(evaluations: list[Evaluation]) -> Table:
    """Every bound with what it is worth."""
    rows = []
    for evaluation, norm, measured in measurements(evaluations):
        head = {"model": evaluation.name, "norm": norm}
        for method, bound in measured.bounds.items():
            for kind, values, found in (
                ("L", bound.lipschitz, bound.lipschitz_violations),
                ("ω", bound.omega, bound.omega_violations),
            ):
                row = head | {"bound": f"{kind}, {METHODS[method]}", "mean": mean(values), "false": false(found)}
                rows.append(row | {"worst": found.worst, "tightness": found.tightness})
        rows += [head | {"bound": METHODS[method], "mean": reason} for method, reason in measured.refused.items()]
    columns = {"model": "model", "norm": "norm", "bound": "bound", "mean": "mean", "false": "false %"}
    columns |= {"worst": "worst, × distance", "tightness": "mean bound / mean distance"}
    return Table("bounds", "Bounds, and on how many images they are false", columns, rows)


def distances_table(evaluations: list[Evaluation]) -> Table:
    """Distances, errors at every radius, and which attacks found them."""
    rows = []
    for evaluation, norm, measured in measurements(evaluations):
        distances, names = measured.found["distances"], measured.found["attacks"].tolist()
        shares = {name: 100 * names.count(name) / len(names) for name in (*attacks.SUITE, "none")}
        rows.append(
            {"model": evaluation.name, "norm": norm, "mean": mean(distances), "median": float(np.median(distances))}
            | {"top1": percent(evaluation.first["ahead"] >= 1), "top5": percent(evaluation.first["ahead"] >= 5)}
            | {"calls": float(measured.found["calls"].sum() / len(names))}
            | {"by": ", ".join(f"{name} {number(share)}" for name, share in shares.items() if share)}
        )
    columns = {"model": "model", "norm": "norm", "top1": "top-1 error %", "top5": "top-5 error %"}
    columns |= {"mean": "mean distance", "median": "median", "by": "found by, % of images", "calls": "calls an image"}
    return Table("distances", "Smallest distances found", columns, rows)


def differences_table(evaluations: list[Evaluation]) -> Table | None:
    """Paired differences from the first target, on the same images."""
    reference, rows = evaluations[0], []
    for evaluation, norm, measured in measurements(evaluations[1:]):
        if not evaluation.target.same_images(reference.target):
            continue
        theirs = reference.norms[norm]
        with np.errstate(invalid="ignore"):
            gain = mean(measured.found["distances"] - theirs.found["distances"])
        row: Row = {"model": evaluation.name, "norm": norm, "distance": gain}
        row["clean"] = paired_percent(evaluation.wrong, reference.wrong)
        for i, radius in enumerate(list(RADII[norm].values())[:3]):
            row[f"error_{i}"] = paired_percent(measured.error_within(radius), theirs.error_within(radius))
        rows.append(row)
    columns = {"model": "model", "norm": "norm", "distance": "mean distance", "clean": "clean error, points"}
    columns |= {"error_0": "error at 0.25 (2/255)", "error_1": "at 0.5 (8/255)", "error_2": "at 0.75 (32/255)"}
    title = f"Differences from {reference.name} on the same images"
    return Table("differences", title, columns, rows) if rows else None


def audit_table(evaluations: list[Evaluation]) -> Table:
    """A verdict per line, with its figure."""
    columns, rows = {"line": "line", "limit": "limit"}, {}
    for i, (evaluation, norm, measured) in enumerate(measurements(evaluations)):
        columns[f"{evaluation.name} {norm}"] = f"{evaluation.name}, {norm}"
        for verdict in measured.verdicts:
            row = rows.setdefault(verdict.line, {"line": verdict.line, "limit": f"{verdict.limit} {verdict.unit}"})
            row[list(columns)[i + 2]] = f"{'pass' if verdict.passed else 'FAIL'} {number(verdict.figure)}"
    n = min(evaluations[0].settings.audit, len(evaluations[0].wrong))
    return Table("audit", f"Masking audit, {n} images", columns, list(rows.values()))


def measurements(evaluations: list[Evaluation]) -> list[tuple[Evaluation, str, Measured]]:
    return [(e, norm, measured) for e in evaluations for norm, measured in e.norms.items()]


def tables_of(evaluations: list[Evaluation]) -> list[Table]:
    norms, tables = evaluations[0].settings.norms, []
    tables += [table_1(evaluations), table_4(evaluations)] if "linf" in norms else []
    tables += [table_2(evaluations), table_3(evaluations), table_6(evaluations)] if "l2" in norms else []
    tables += [table_5(evaluations)] if evaluations[0].smoothing else []
    tables = sorted((table for table in tables if table), key=lambda table: table.name)
    tables += [distances_table(evaluations), bounds_table(evaluations), differences_table(evaluations)]
    return [table for table in tables if table] + [audit_table(evaluations)]


# --- figures ----------------------------------------------------------------------------------------------

NORM_NAMES = {"l2": "l2", "linf": "l∞"}


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure: no date, no version in them."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def error_figure(evaluations: list[Evaluation]) -> Figure:
    """Figures 1 and 2: error against distance; dashed, the error that the bound allows."""
    norms = evaluations[0].settings.norms
    figure, axes = panels(len(norms))
    for axis, norm in zip(axes[0], norms, strict=True):
        reach = 0.0
        for i, evaluation in enumerate(evaluations):
            measured, colour = evaluation.norms[norm], COLOURS[i % len(COLOURS)]
            distances = np.sort(measured.found["distances"])
            known = distances[np.isfinite(distances)]
            reach = max(reach, float(np.quantile(known, 0.995)) if len(known) else 0.0)
            n, counts = len(distances), np.arange(1, len(known) + 1)
            low = scipy.stats.beta.ppf(0.025, counts, n - counts + 1)
            high = scipy.stats.beta.ppf(0.975, counts + 1, np.maximum(n - counts, 1e-9))
            axis.fill_between(known, 100 * low, 100 * high, step="post", color=colour, alpha=0.15, linewidth=0)
            axis.step(known, 100 * counts / n, where="post", color=colour, label=evaluation.name)
            if measured.best:
                bound = np.sort(measured.bounds[measured.best].omega.numpy())
                axis.step(bound, 100 * np.arange(1, n + 1) / n, where="post", color=colour, linestyle=(0, (4, 2)), lw=1)
        axis.set(xlim=(0, 1.05 * reach or 1), ylim=(0, 100), xlabel=f"{NORM_NAMES[norm]} distance, pixels in [0, 1]")
    axes[0, 0].set_ylabel("error, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    handles.append(axes[0, 0].plot([], [], color="0.3", linestyle=(0, (4, 2)), lw=1)[0])
    figure.legend(
        handles,
        [*labels, "ω-bound"],
        loc="outside upper center",
        ncols=1 if len(norms) == 1 else 3,
        frameon=False,
        fontsize=9,
    )
    return figure


def bounds_figure(evaluations: list[Evaluation]) -> Figure:
    """Each image's ω-bound against its distance: above the diagonal the bound is false."""
    norms = evaluations[0].settings.norms
    figure, axes = panels(len(norms), len(evaluations))
    for evaluation, row in zip(evaluations, axes, strict=True):
        for axis, norm in zip(row, norms, strict=True):
            measured = evaluation.norms[norm]
            distances = measured.found["distances"]
            for method, colour, marker in (("sampling", COLOURS[1], "x"), ("calibration", COLOURS[0], "o")):
                if bound := measured.bounds.get(method):
                    label = f"{METHODS[method]}: {number(100 * bound.omega_violations.rate, 1)} % false"
                    axis.scatter(distances, bound.omega, s=9, marker=marker, color=colour, lw=0.7, label=label)
            known = distances[np.isfinite(distances)]
            limit = 1.05 * float(known.max()) if len(known) and known.max() > 0 else 1.0
            axis.plot([0, limit], [0, limit], color="0.3", linewidth=1)
            axis.set(xlim=(0, limit), ylim=(0, limit), xlabel=f"{NORM_NAMES[norm]} distance found, pixels")
            axis.set(ylabel="ω-bound, pixels")
            axis.set_title(evaluation.name, fontsize=10)
            if axis.get_legend_handles_labels()[0]:
                axis.legend(fontsize=8, loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def gev_figure(evaluations: list[Evaluation]) -> Figure | None:
    """Return levels of the largest gradient norm of a block, with the 95 % interval at p = 0.001."""
    norms = [n for n in evaluations[0].settings.norms if any(e.norms[n].gev for e in evaluations)]
    if not norms:
        return None
    figure, axes = panels(len(norms))
    for axis, norm in zip(axes[0], norms, strict=True):
        for i, evaluation in enumerate(evaluations):
            if (gev := evaluation.norms[norm].gev) is None:
                continue
            colour, n = COLOURS[i % len(COLOURS)], len(gev.maxima)
            periods = np.logspace(math.log10(1.05), 3, 200)
            label = f"{evaluation.name}, ξ = {gev.xi:.2f}" + (f" ({gev.status})" if gev.status != "ok" else "")
            axis.plot(periods, gev.quantile(1 / periods), color=colour, label=label)
            axis.plot((n + 1) / np.arange(n, 0, -1), gev.maxima, ".", color=colour, markersize=4)
            low, high = gev.interval(0.001)
            top = high if math.isfinite(high) else 2 * gev.level(0.001)
            axis.plot(
                [1000, 1000],
                [max(low, gev.maxima[0]), top],
                color=colour,
                linewidth=2.5,
                alpha=0.5,
                solid_capstyle="butt",
            )
        axis.set(
            xscale="log",
            yscale="log",
            xlabel="return period, blocks",
            ylabel=f"largest gradient norm, {NORM_NAMES[norm]} attacks",
        )
        smallest = min(m.gev.maxima[0] for m in (e.norms[norm] for e in evaluations) if m.gev)
        axis.set_ylim(bottom=0.7 * smallest if smallest > 0 else None)
        axis.legend(fontsize=8, frameon=False, loc="best")
    return figure


def adversarial_figure(evaluations: list[Evaluation], norm: str, count: int = 5) -> Figure | None:
    """The first images that all targets get right: the image, and each target's adversarial image and change."""
    firsts = [evaluation.norms[norm].found["first"] for evaluation in evaluations]
    usable = np.all([np.isfinite(f["distances"]) & (f["distances"] > 0) for f in firsts], axis=0)
    rows = np.flatnonzero(usable)[:count]
    if len(rows) == 0 or not all(e.target.same_images(evaluations[0].target) for e in evaluations):
        return None
    figure, axes = panels(1 + 2 * len(firsts), len(rows), width=1.5, height=1.65)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
        axis.spines[:].set_visible(False)
    for row, i in enumerate(rows):
        name = class_names(evaluations[0].target)
        picture(axes[row, 0], firsts[0]["images"][i], name(firsts[0]["labels"][i]))
        for j, found in enumerate(firsts):
            change = found["adversarial"][i] - found["images"][i]
            moved = f"{name(found['moved'][i])}, {number(found['distances'][i])}"
            picture(axes[row, 1 + 2 * j], found["adversarial"][i], moved)
            peak = float(np.abs(change).max()) or 1.0
            picture(axes[row, 2 + 2 * j], 0.5 + change / (2 * peak), f"±{number(peak)}", diverging=True)
    headings = ["image", *(part for e in evaluations for part in (e.name, "change"))]
    for axis, heading in zip(axes[-1], headings, strict=True):
        axis.set_xlabel(heading.replace("-", "-\u200b"), fontsize=7, wrap=True)
    figure.suptitle(f"Nearest adversarial images found, {NORM_NAMES[norm]}: class, distance", fontsize=10)
    return figure


def class_names(target: Target) -> Callable[[int], str]:
    return lambda label: target.classes[int(label)][:12]


def picture(axis: Any, image: np.ndarray, title: str, *, diverging: bool = False) -> None:
    """Grey or colour; a grey change from blue, down, to red, up."""
    grey = image.shape[0] == 1
    shown = image[0] if grey else image.transpose(1, 2, 0)
    axis.imshow(np.clip(shown, 0, 1), cmap="RdBu_r" if diverging else "gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, pad=2)
    axis.grid(False)


# --- the report -------------------------------------------------------------------------------------------


def images_csv(evaluation: Evaluation) -> bytes:
    """Everything known of each image; distances and bounds in pixels, 0 to 1."""
    found = evaluation.first
    columns: dict[str, Any] = {
        "image (index in the test set)": evaluation.target.rows["evaluation"],
        "label": found["labels"],
        "predicted": found["predicted"],
        "classes ahead of the label": found["ahead"],
    }
    for norm, measured in evaluation.norms.items():
        columns[f"distance {norm} (pixels 0 to 1)"] = measured.found["distances"]
        columns[f"attack {norm}"] = measured.found["attacks"]
        gradient = measured.found["probabilities_grad_norms"][:, 0]
        columns[f"gradient norm of the margin, {norm} attacks (probability per pixel unit)"] = gradient
        for method, bound in measured.bounds.items():
            columns[f"L-bound {norm} {method} (pixels 0 to 1)"] = bound.lipschitz.numpy()
            columns[f"omega-bound {norm} {method} (pixels 0 to 1)"] = bound.omega.numpy()
    if evaluation.smoothing:
        columns["smoothed class (-1: abstains)"] = evaluation.smoothing["classes"]
        columns["certified radius of the smoothed classifier l2 (pixels 0 to 1)"] = evaluation.smoothing["radii"]
    return as_csv(columns, zip(*(values.tolist() for values in columns.values()), strict=True))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """evaluation/summary.json, as README.md documents it."""
    norms = {}
    for norm, measured in evaluation.norms.items():
        distances, bound = measured.found["distances"], measured.bounds.get(measured.best)
        norms[norm] = {
            "mean_distance": finite(mean(distances).value),
            "median_distance": finite(float(np.median(distances))),
            "lipschitz_bound_mean": float(bound.lipschitz.mean()) if bound else None,
            "omega_bound_mean": float(bound.omega.mean()) if bound else None,
            "violations_pct": 100 * bound.omega_violations.rate if bound else None,
            "bound_method": measured.best,
            "error_pct": {f"{r:.4g}": percent(measured.error_within(r)).value for r in RADII[norm].values()},
            "audit_failed": [verdict.line for verdict in measured.verdicts if not verdict.passed],
        }
    clean = percent(evaluation.wrong).value
    return {"images": len(evaluation.wrong), "topk": evaluation.target.topk, "clean_error_pct": clean, "norms": norms}


def finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def preamble(evaluations: list[Evaluation], world: World) -> str:
    """What every figure has to be quoted with."""
    s, first = evaluations[0].settings, evaluations[0].target
    made = provenance(world)
    device = "cpu" if world.device.type == "cpu" else made["device"]
    names = ", ".join(f"{e.name} ({e.target.fingerprint})" for e in evaluations)
    blind = [e.name for e in evaluations if e.target.blind]
    lines = [
        f"# {', '.join(e.name for e in evaluations)}\n",
        f"Networks, with digests of their weights: {names}.\n",
        f"{len(first.rows['evaluation'])} evaluation and {len(first.rows['calibration'])} calibration images, drawn "
        f"from {len(first.source):,} test images of {first.dataset} with seed {s.seed}; errors are top-{first.topk}. "
        f"Python {made['versions']['python']}, torch {made['versions']['torch']}, {device}, "
        f"commit {made['commit']}.\n",
        "Distances are those of the nearest adversarial images found, upper bounds of the true ones; a misclassified "
        "image has distance 0 and bound 0, and an image that nothing broke makes a mean infinite. Distances are in "
        "pixels of range 0 to 1. Intervals are 95 %: Clopper-Pearson for percentages, t for means; "
        "they speak of the draw of the images, not of the training.\n",
        "Bounds are estimates, not certificates. `false`: the share of images with an adversarial image nearer than "
        "the bound says, a lower estimate, as good as the attacks. `calibrated`: the smallest modulus whose bounds "
        "are false for 0.5 % of the images at most, from distances of the calibration images. `ascent`: the largest "
        "values that gradient ascent finds. `sampled`: the paper's, from random perturbations and a GEV fit.\n",
    ]
    if blind:
        lines.append(f"**No gradient reaches the image in {', '.join(blind)}: only the boundary attack was run.**\n")
    return "\n".join(lines)


def write_report(evaluations: list[Evaluation], path: Path, world: World) -> None:
    """Tables, figures and report.md of one target, or of several beside each other."""
    tables = tables_of(evaluations)
    figures = {"errors": error_figure(evaluations), "bounds": bounds_figure(evaluations)}
    figures |= {f"adversarial-{n}": adversarial_figure(evaluations, n) for n in evaluations[0].settings.norms}
    figures |= {"gev": gev_figure(evaluations)}
    figures = {name: figure for name, figure in figures.items() if figure}
    captions = {
        "errors": "Error against distance, with 95 % bands (Figures 1 and 2 of the paper); dashed, the ω-bound.",
        "bounds": "ω-bound against distance, an image a point. Above the diagonal the bound is false.",
        "gev": "Return levels of the largest gradient norm in a block; bars, 95 % intervals at p = 0.001.",
    }
    parts = [preamble(evaluations, world), *(markdown(table) for table in tables)]
    for name, figure in figures.items():
        replace(path / f"{name}.png", png(figure))
        caption = captions.get(name, "The nearest adversarial images found.")
        parts.append(f"![{name}]({name}.png)\n\n{caption}\n")
    for old in (*path.glob("table?.csv"), *path.glob("differences.csv"), *path.glob("*.png")):
        if old.stem not in figures and old.stem not in {table.name for table in tables}:
            old.unlink()  # of an evaluation with other options
    for table in tables:
        replace(path / f"{table.name}.csv", table_csv(table))
    replace(path / "report.md", "\n".join(parts).encode())


def write_target(evaluation: Evaluation, world: World) -> None:
    """The files of one target's own evaluation."""
    path = evaluation.target.path
    write_report([evaluation], path, world)
    replace(path / "images.csv", images_csv(evaluation))
    replace(path / "summary.json", json.dumps(summary(evaluation), indent=2, allow_nan=False).encode())


# --- command line -----------------------------------------------------------------------------------------


def open_targets(
    specs: list[str], dataset: str, data_dir: Path | None, topk: int | None, root: Path, seed: int
) -> list[Target]:
    """The targets, each once, with names that tell them apart.  Raises Failure."""
    targets: list[Target] = []
    for spec in {str(Path(spec).resolve()): spec for spec in specs}.values():
        if Path(spec).is_dir():
            target = open_run(Path(spec), data_dir, topk)
        else:
            target = open_factory(spec, dataset, data_dir or Path("data"), topk, root, seed)
        if twins := sum(other.name.split("#")[0] == target.name for other in targets):
            target.name = f"{target.name}#{twins + 1}"
            target.path = target.path if target.config else root / target.name
        targets.append(target)
    source = next((t for t in targets if t.config and t.config["options"]["method"] == "none"), None)
    for target in targets:
        target.undefended = source if source is not target and source and target.same_images(source) else None
    return targets


def make_directory(path: Path) -> None:
    """Make the directory, if need be, and try it out.  Raises Failure."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        replace(path / ".writable", b"", sync=False)
        (path / ".writable").unlink()
    except OSError as error:
        raise Failure(f"{path}: cannot write there ({error.strerror})", 2) from None


def finish(targets: list[Target], settings: Settings, together: Path, world: World) -> None:
    """Report on each target and, where there are several, on all of them; show the tables."""
    evaluations = [assemble(target, settings, world) for target in targets]
    for evaluation in evaluations:
        write_target(evaluation, world)
    if len(targets) > 1:
        write_report(evaluations, together, world)
    world.console.width = max(world.console.width, 140) if not world.console.is_terminal else None
    for table in tables_of(evaluations):
        show(table, world)
    world.console.print(f"report: {together / 'report.md'}")


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
    images: Annotated[int, option(IMAGES, "Images to evaluate; at most half of the test images.", min=2)] = 1000,
    calibration: Annotated[int, option(IMAGES, "Other images, attacked to calibrate the bounds: 199 or more; 0 for no bounds.", min=0)] = 200,
    topk: Annotated[int | None, option(IMAGES, "Count an image as right when its label is in the top K (default 1; imagenet 5).", min=1)] = None,
    seed: Annotated[int, option(IMAGES, "Draws the images, and every random start.", min=0)] = 0,
    norm: Annotated[list[str], option(WORK, "Norms of the attacks: l2, linf.")] = ["l2", "linf"],  # noqa: B006
    attack: Annotated[list[str], option(WORK, "Attacks to use, in this order (default all of attacks.SUITE).")] = list(attacks.SUITE),  # noqa: B006
    blocks: Annotated[int, option(WORK, "Blocks for the paper's estimate by sampling, 5 or more; 0: leave it out.", min=0)] = 100,
    audit_images: Annotated[int, option(WORK, "Images for the masking audit.", min=1)] = 100,
    smoothing: Annotated[float | None, option(WORK, "Certify by randomized smoothing with this standard deviation.")] = None,
    samples: Annotated[int, option(WORK, "Noisy copies of an image for --smoothing.", min=100)] = 10_000,
    out: Annotated[Path, option(FILES, "For comparisons, and for FILE.py:FACTORY; a run's own report goes into the run.")] = Path("evaluations"),
    device: Annotated[str | None, option(FILES, "cpu, cuda or cuda:N (default cuda where there is one).")] = None,
) -> None:
    """Measure how robust networks are: the paper's tables and figures, and a masking audit."""
    # fmt: on
    if 0 < blocks < 5:
        raise Failure(f"--blocks must be 0, or 5 or more, not {blocks}", 2)
    if smoothing is not None and not (math.isfinite(smoothing) and smoothing > 0):
        raise Failure(f"--smoothing must be positive, not {smoothing}", 2)
    norms, suite = tuple(dict.fromkeys(norm)), tuple(dict.fromkeys(attack))
    if unknown := set(suite) - set(attacks.SUITE):
        raise Failure(f"--attack must be one of {', '.join(attacks.SUITE)}, not {min(unknown)}", 2)
    if unknown := set(norms) - set(RADII):
        raise Failure(f"--norm must be l2 or linf, not {min(unknown)}", 2)
    settings = Settings(norms, images, calibration, seed, suite, blocks, audit_images, smoothing, samples)
    with contextlib.closing(World(device)) as world:
        set_precision(world.device)
        opened = open_targets(targets, dataset, data_dir, topk, out, seed)
        for target in opened:
            prepare(target, settings, world)
        together = out / "_vs_".join(target.name for target in opened)[:200] if len(opened) > 1 else opened[0].path
        if world.main:
            for path in (together, *(target.path / "parts" for target in opened)):
                make_directory(path)
        work([unit for target in opened for unit in units_of(target, settings)], settings, world)
        if world.main:
            finish(opened, settings, together, world)


if __name__ == "__main__":
    sys.exit(run_command(main))
