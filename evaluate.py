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

The work is cut into parts, each a pure function of network, images, options and seed, and a file that is written whole.
So the same command goes on where it was interrupted, any number of processes share the parts, and the report is the
same, byte for byte.  A `call` is one image through one forward pass, or one backward pass.
"""

import collections
import contextlib
import functools
import hashlib
import inspect
import io
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
from runs import Failure, Stop, World, read_checkpoint, refuse_if_running, replace

# Images in a part, and numbers in these, at most: what memory may hold; on a CPU, for parts of a minute or so.
BLOCK, VALUES, CPU_VALUES = 100, 25 * 3 * 224**2, 50_000
LONG = 2000  # calls an image, from which on parts have fewer images
RADII = {  # at which errors are reported: those of Tables 1 and 6, and what the 8x8 digits need
    "l2": {"0.25": 0.25, "0.5": 0.5, "0.75": 0.75, "1.0": 1.0, "1.25": 1.25, "1.5": 1.5},
    "linf": {"2_255": 2 / 255, "8_255": 8 / 255, "32_255": 32 / 255},
}
OMEGA_RADII = (0.5, 1.0)  # of Table 3, in l2
SAMPLED, SAMPLED_RADII = 1000, 24  # images for the paper's estimate, where there are as many, and radii
ASCENT = 64  # calibration images for gradient ascent, and to see around which radii to look
SHOWN = 10  # images that the figure of adversarial images chooses from
RIVALS = 9  # classes that the calibrated bound looks at
AUDIT = 550  # calls an image
AUDIT_SCALES, AUDIT_STEPS = (0.5, 1.0, 2.0, 4.0), (1, 4, 16)  # times PGD's median distance; of PGD
SUITES = {"best": attacks.SUITE, "paper": ("pgd", "carlini_wagner", "boundary", "logbarrier")}
METHODS = {"calibration": "two tangents", "ascent": "ascent", "sampling": "sampled"}  # bounds, by kind of part
PANELS = ("The images", "What is done", "Where")  # of --help
IMAGES, WORK, FILES = (functools.partial(typer.Option, rich_help_panel=name) for name in PANELS)

Arrays = dict[str, np.ndarray]
Bounds = tuple[Tensor, Tensor, bounds.Estimate]  # L and omega of Prop. 2.2 (N,), and the constants they follow from


@dataclass
class Settings:
    """Measure how robust networks are: the paper's tables and figures, and a masking audit."""

    # fmt: off
    targets: Annotated[list[str], typer.Argument(help="Run directories, or FILE.py:FACTORY (a function that returns an nn.Module for images in [0, 1]).")]
    dataset: Annotated[str, IMAGES("--data", help="The images for FILE.py:FACTORY (digits, cifar10, imagenet, or an image folder).")] = "digits"
    data_dir: Annotated[Path | None, IMAGES(help="Where the images are (default: where the run had them; else data).")] = None
    size: Annotated[int | None, IMAGES(help="Pixels a side of images read from a folder of large ones (default: as the run was trained; else 224).", min=1, max=4096)] = None
    split: Annotated[float, IMAGES(help="As train.py's: the share of a folder's images to test on, where it has no test/ or val/; a run knows its own.")] = 0.0
    images: Annotated[int, IMAGES(help="Images to evaluate; at most half of the test images.", min=2)] = 1000
    calibration: Annotated[int, IMAGES(help="Other images, attacked to calibrate the bounds: 199 or more; 0 for no bounds.", min=0)] = 200
    topk: Annotated[int | None, IMAGES(help="Count an image as right when its label is in the top K (default 1; imagenet 5).", min=1)] = None
    seed: Annotated[int, IMAGES(help="Draws the images, and every random start.", min=0, max=2**64 - 1)] = 0
    norm: Annotated[list[str], WORK(help="Norms of the attacks: l2, linf.")] = tuple(RADII)
    budget: Annotated[int | None, WORK(help=f"Calls that the attacks may spend on an image and norm, forward and backward passes (default {attacks.CALLS}).", min=10)] = None
    suite: Annotated[Literal["best", "paper"], WORK(help="best: the nearest image that --budget calls find.  paper: PGD, Carlini-Wagner, Boundary and LogBarrier, each alone on every image.")] = "best"
    attack: Annotated[list[str] | None, WORK(help="Attacks to use, in this order (default: all of the suite).")] = None
    blocks: Annotated[int, WORK(help="Blocks for the paper's estimate by sampling, 5 or more; 0: leave it out.", min=0)] = 100
    audit_images: Annotated[int, WORK(help="Images for the masking audit, at most: it takes about a quarter of what the attacks may spend.", min=1)] = 100
    smoothing: Annotated[list[float] | None, WORK(help="Certify by randomized smoothing with this standard deviation; may be given several times.")] = None
    samples: Annotated[int, WORK(help="Noisy copies of an image for --smoothing; the more, the larger the radii that can be certified.", min=100)] = 10_000
    out: Annotated[Path, FILES(help="For comparisons, and for FILE.py:FACTORY; a run's own report goes into the run.")] = Path("evaluations")
    device: Annotated[str | None, FILES(help="cpu, cuda or cuda:N (default cuda where there is one).")] = None
    # fmt: on

    def __post_init__(self) -> None:
        """What is given several times counts once.  Raises Failure for options that mean nothing."""
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
        self.budget = 330 * len(self.attack) if self.suite == "paper" else self.budget or attacks.CALLS


class Watched(nn.Module):
    """A network that tells `watch` of every call, before it; `watch` may raise, to end the work.

    Where no gradient comes through it (detached, under no_grad, quantised) it is `blind`, and its gradient is zero.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.blind, self.calls = network, False, 0
        self.watch: Callable[[int], None] = lambda calls: None

    def forward(self, x: Tensor) -> Tensor:
        self.count(x)
        logits = self.network(x.detach() if self.blind else x)
        if self.blind:
            return logits + (0 * x.flatten(1).sum(1, keepdim=True)).to(logits.dtype)
        if logits.requires_grad:
            logits.register_hook(self.count)
        return logits

    def count(self, images: Tensor) -> None:
        """Of images on their way forward, or of gradients on their way back."""
        self.watch(len(images))
        self.calls += len(images)


@dataclass(eq=False)
class Target:
    """A network in evaluation mode, the images it is measured on, where its files go, and what was measured.

    `prepare` adds attacks (suite), rows, images for the paper's estimate (others) and for a block of it (drawn), the
    seconds that a call takes (pace), and how many images a part has at most (block).
    """

    name: str
    network: nn.Module
    path: Path
    dataset: str
    source: data.Source
    classes: list[str]
    settings: Settings
    config: dict[str, Any] | None = None  # of a run; step, seconds: of its checkpoint
    step: int | None = None
    seconds: float | None = None
    code: bytes = b""  # of a stranger's network: its forward pass may change while its weights stay
    rows: dict[str, list[int]] = field(default_factory=dict)  # what to work on, by kind of part; as a rule test images
    norms: "dict[str, Measured]" = field(default_factory=dict)
    smoothing: dict[float, Arrays] = field(default_factory=dict)  # by sigma

    def __post_init__(self) -> None:
        self.topk = self.settings.topk or (5 if self.dataset == "imagenet" else 1)
        self.dataset, self.fingerprint = Path(self.dataset).name, fingerprint(self.network, self.code)
        for parameter in self.network.parameters():
            parameter.requires_grad_(False)
        self.network = Watched(self.network).eval()

    @property
    def first(self) -> Arrays:
        return next(iter(self.norms.values())).found

    @property
    def wrong(self) -> np.ndarray:
        return self.first["ahead"] >= self.topk

    def fetch(self, rows: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        return data.fetch(self.source, np.asarray(rows), device)


def fingerprint(network: nn.Module, code: bytes) -> str:
    """A digest of the weights, of the layers' names, and of a stranger's code."""
    state = {k: v.cpu() if isinstance(v, Tensor) else v for k, v in network.state_dict().items()}
    torch.save(state, packed := io.BytesIO())  # quantised layers as well
    frozen = [part for part in network.children() if isinstance(part, torch.jit.ScriptModule) and not state]
    parts = [repr(network).encode(), code, packed.getvalue(), *(part.save_to_buffer() for part in frozen)]
    return hashlib.sha256(b"".join(parts)).hexdigest()[:16]


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
    source, classes = data.load_test(options["dataset"], settings.data_dir or options.get("data_dir"), **how)
    trained = options["phases"][-1]["size"] if isinstance(source, data.Files) and "phases" in options else None
    images = options["dataset"], at_size(source, settings.size or trained), classes, settings
    code = models.source_of(options["model"])
    return Target(path.name, network, path / "evaluation", *images, config, state["step"], state.get("seconds"), code)


def open_factory(spec: str, settings: Settings) -> Target:
    """The network that FILE.py:FACTORY returns; its weights, where they are random, depend on the seed.

    Images of a folder are shown in colour, or in grey to a network that takes only these.  Raises Failure.
    """
    if not models.is_file(spec):
        why = "no checkpoint.pt in it, see train.py --resume" if Path(spec, "config.json").exists() else "no such run"
        raise Failure(f"{spec}: {why}; a target is a run directory or FILE.py:FACTORY", 2)
    network, refused, name = None, [], models.name_of_spec(spec)
    for channels in (3, 1):
        source, classes = data.load_test(settings.dataset, settings.data_dir, channels=channels, split=settings.split)
        source = at_size(source, settings.size)
        network = network or models.from_file(spec, classes=len(classes), seed=settings.seed).eval()
        images, _ = data.fetch(source, np.arange(min(2, len(source))), torch.device("cpu"))
        try:
            models.check_output(network, images, len(classes))
        except Failure as error:
            refused.append(error)
            continue
        given = settings.out / name, settings.dataset, source, classes, settings
        return Target(name, network, *given, code=models.source_of(spec))
    raise Failure(f"{spec}: {refused[0]}", 2)


def open_targets(settings: Settings) -> list[Target]:
    """The targets, each once, with names that tell them apart.  Raises Failure."""
    places, targets = {Path(spec).resolve(): spec for spec in settings.targets}, []
    for path, spec in places.items():
        targets.append(open_run(path, settings) if (path / "checkpoint.pt").exists() else open_factory(spec, settings))
        alike = sum(target.name.partition("#")[0] == targets[-1].name for target in targets)
        targets[-1].name += f"#{alike}" * (alike > 1)
    if (settings.split or settings.dataset != Settings.dataset) and all(target.config for target in targets):
        raise Failure("--data and --split are for FILE.py:FACTORY; a run knows its own (moved: --data-dir)", 2)
    shown = [f"{len(t.source):,} of {t.dataset}, {getattr(t.source, 'size', 'as held')}, top-{t.topk}" for t in targets]
    if len({*shown}) > 1:
        raise Failure(f"not the same images: {'; '.join(shown)}; compare with one --size and --topk, or not at all", 2)
    return targets


def prepare(target: Target, world: World) -> None:
    """Draw the images, refuse what cannot be measured, and see how fast it is.  Raises Failure."""
    settings, order = target.settings, data.order(len(target.source), seed=target.settings.seed, epoch=0).tolist()
    if len(order) < 2:
        raise Failure(f"{target.name}: {len(order)} test images of {target.dataset}; at least 2 are needed", 2)
    n = min(settings.images, len(order) // 2)
    rest, audited = order[n:] if settings.calibration else [], max(10, int(0.25 * settings.budget * n / AUDIT))
    audit = order[: min(n, settings.audit_images, audited)]
    target.rows = {"evaluation": order[:n], "smoothing": order[:n], "audit": audit}
    target.rows |= {"calibration": rest[: settings.calibration], "ascent": rest[: min(ASCENT, settings.calibration)]}
    target.rows["sampling"] = list(range(settings.blocks if rest else 0))  # the paper's blocks, of others
    target.others = rest[: max(SAMPLED, settings.calibration)]
    target.drawn = min(64, max(1, len(target.others) // 20))  # few, or the same would be the maximum of many blocks
    try:
        warning = learn(target, world.device)
    except Exception as error:
        kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
        raise Failure(f"{target.name}: {kind}{error}", 2) from None
    (target.pace,) = world.max(torch.tensor([target.pace]))
    for note in [*target.source.notes, *filter(None, [warning])]:
        world.console.print(f"warning: {target.name}: {note}")


def learn(target: Target, device: torch.device) -> str | None:
    """Learn suite, pace and block; a warning.  Raises anything, where it cannot be measured."""
    network, settings, topk = target.network.to(device), target.settings, target.topk
    image, _ = target.fetch(target.rows["evaluation"][:1], device)
    target.block = max(1, min(BLOCK, (CPU_VALUES if device.type == "cpu" else VALUES) // image.numel()))
    images, labels = target.fetch(target.rows["evaluation"][: max(4, target.block)], device)
    warning = models.check_output(network.network, images, len(target.classes))
    attacks.check_model(network, images, labels, topk=topk, gradients=False)
    try:
        x = images.clone().requires_grad_()
        (grad,) = torch.autograd.grad(attacks.margin(network(x), labels, topk).sum(), x)
        network.blind = not grad.any()
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:  # torch's for what it cannot differentiate
        network.blind = True
    target.suite = ["boundary"] if network.blind else settings.attack  # the others need a gradient
    for _ in range(2):  # the first is slow
        start, network.calls = time.perf_counter(), 0
        attacks.fab(network, images, labels, norm=settings.norm[0], topk=topk, steps=3, targets=0, restarts=0)
        target.pace = (time.perf_counter() - start) / network.calls
    return warning


# --- parts: pure functions of network, images, options and seed -------------------------------------------


class Unit(NamedTuple):
    """A part to be done: what, in which norm, on which of the target's rows, at most at what cost; its file."""

    target: Target
    kind: str
    norm: str
    sigma: float  # of the noise of randomized smoothing, or 0
    block: int
    rows: list[int]
    calls: int
    file: Path


def units_of(target: Target, world: World) -> list[Unit]:
    """Everything that has to be done for a target."""
    settings, folder, units = target.settings, target.path / "parts" / digest_of(target, world), []
    each = {"sampling": target.drawn * (SAMPLED_RADII + 4), "ascent": 400, "audit": AUDIT}  # or a little less
    each |= dict.fromkeys(("calibration", "evaluation"), settings.budget + 35) | {"smoothing": settings.samples}
    wanted = [(kind, norm, 0.0) for norm in settings.norm for kind in PARTS if kind != "smoothing"]
    for kind, norm, sigma in wanted + [("smoothing", "l2", sigma) for sigma in settings.smoothing]:
        size = max(1, min(target.block, target.block * LONG // each[kind]))
        for block, start in enumerate(range(0, len(target.rows[kind]), size)):
            rows, noise = target.rows[kind][start : start + size], f"-{sigma}" if sigma else ""
            file = folder / f"{kind}-{norm}{noise}-{block:04d}.npz"
            units.append(Unit(target, kind, norm, sigma, block, rows, len(rows) * each[kind], file))
    return units


def digest_of(target: Target, world: World) -> str:
    """Of all that the parts depend on, but what their names say: with another one they are done again."""
    settings, source, images = target.settings, target.source, b""
    about = [target.fingerprint, target.topk, target.suite, target.rows, target.others, settings.suite]
    about += [settings.budget, settings.samples, settings.seed, str(torch.__version__), world.device.type]
    if isinstance(source, data.Files):
        paths = [source.path(i) for i in (*target.rows["evaluation"], *target.others)]
        about += [source.size, source.labels.tolist(), [hashlib.sha256(path.read_bytes()).digest() for path in paths]]
    else:
        images = source.images.numpy().tobytes() + source.labels.numpy().tobytes()
    code = b"".join(Path(module.__file__).read_bytes() for module in (attacks, bounds, gradreg))
    return hashlib.sha256(repr(about).encode() + images + code).hexdigest()[:16]


def compute(unit: Unit, world: World) -> Arrays:
    """Do a part.  Raises Failure where the model turns out to be unfit."""
    target, label = unit.target, f"{unit.target.settings.seed} {unit.kind} {unit.norm} {unit.block}"
    seed = int.from_bytes(hashlib.sha256(label.encode()).digest()[:7], "big")
    images = target.fetch(target.others if unit.kind == "sampling" else unit.rows, world.device)
    try:
        return PARTS[unit.kind](unit, *images, torch.Generator(world.device).manual_seed(seed))
    except ValueError as error:
        raise Failure(f"{target.name}: {error}", 2) from None


def attacked(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> tuple[Tensor, Arrays]:
    """The nearest adversarial images; their distances, whose they are, and each attack's own if each is alone."""
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk, "generator": generator}
    if target.settings.suite == "best" and not target.network.blind:
        options = {"attacks": target.suite, "check": False, "budget": target.settings.budget}
        found = attacks.smallest(target.network, images, labels, **options, **how)
        return found.adversarial, {"distances": numpy(found.distances), "attacks": np.array(found.attacks)}
    alone = {"calls": target.settings.budget} if target.network.blind else {}
    each = {name: one_attack(name, target.network, images, labels, **how, **alone) for name in target.suite}
    least, who = torch.stack([distances for _, distances in each.values()]).min(0)
    names = np.array([*each, "clean", "none"])[numpy(who.where(least > 0, -2).where(least.isfinite(), -1))]
    adversarial = torch.stack([x for x, _ in each.values()])[who, torch.arange(len(who), device=who.device)]
    own = {f"distances_{name}": numpy(distances) for name, (_, distances) in each.items()}
    return adversarial, {"distances": numpy(least), "attacks": names} | own


def one_attack(name: str, network: nn.Module, images: Tensor, labels: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
    """What one attack finds for every image by itself, and how far it is: 0 misclassified, inf not found.

    LogBarrier, told to go on from the images, starts from noise, as its authors do, not from the linearised boundary.
    """
    start = images if name == "logbarrier" else None
    x = getattr(attacks, name)(network, images, labels, start=start, **how)
    with torch.no_grad():
        right = attacks.ahead(network(x), labels) < how["topk"]
    return x, attacks.distance(images, x, how["norm"]).masked_fill(right, math.inf)


def evaluation_part(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Distances, who found them, at what cost; predictions; margins of both losses; in l2 Table 3's omega, by ascent."""
    target, network, how = unit.target, unit.target.network, {"norm": unit.norm, "topk": unit.target.topk}
    network.calls = 0
    adversarial, arrays = attacked(unit, images, labels, generator)
    arrays["calls"] = np.array([network.calls])
    with torch.no_grad():
        logits, moved = network(images), network(adversarial)
    arrays |= {"labels": numpy(labels), "predicted": numpy(logits.argmax(1))}
    arrays["ahead"] = numpy(attacks.ahead(logits, labels))
    for loss, rivals in (("probabilities", 1), ("logits", min(RIVALS, len(target.classes) - target.topk))):
        found = bounds.margins(network, images, labels, **how, loss=loss, rivals=rivals, ahead=loss == "logits")
        arrays |= {f"{loss}_losses": numpy(found.losses), f"{loss}_grad_norms": numpy(found.grad_norms)}
    if unit.norm == "l2":
        arrays["omega"] = np.array([numpy(bounds.omega_statistics(network, images, labels, **how, eps=OMEGA_RADII)[0])])
    if unit.rows[0] in target.rows["evaluation"][:SHOWN]:
        arrays |= {"images": numpy(images), "adversarial": numpy(adversarial), "moved": numpy(moved.argmax(1))}
    return arrays


def estimate_part(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """The paper's block maxima, or suprema by ascent, at radii around what is expected, and Table 3's; or why not."""
    target, how = unit.target, {"norm": unit.norm, "topk": unit.target.topk}
    given, count = (target.network, images, labels), SAMPLED_RADII if unit.kind == "sampling" else 16
    try:
        some = target.fetch(target.rows["ascent"][: 4 * target.block], images.device)
        radii = bounds.default_radii(target.network, *some, count=count, **how)
        how["eps"] = torch.cat([radii, radii.new_tensor(OMEGA_RADII if unit.norm == "l2" else ())]).unique()
        if unit.kind == "sampling":
            draw = {"blocks": len(unit.rows), "block_size": target.drawn, "generator": generator}
            found = {"maxima": bounds.sample_maxima(*given, **how, **draw)}
        else:
            known = bounds.estimate_by_ascent(*given, **how, steps=5, generator=generator)
            found = {"omega": known.omega[None], "lipschitz": known.lipschitz}
    except ValueError as error:  # also where, say, no image of the block is classified correctly
        return {"refused": np.array(str(error))}
    return {name: numpy(value) for name, value in (found | {"eps": how["eps"]}).items()}


def smoothing_part(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Classes and certified radii of the smoothed classifier (Cohen et al. 2019)."""
    how = {"sigma": unit.sigma, "n": unit.target.settings.samples, "batch_size": 10 * unit.target.block}
    found = bounds.certify_smoothing(unit.target.network, images, **how, generator=generator)
    arrays = {name: numpy(getattr(found, name)) for name in ("classes", "radii", "cap")}
    return arrays | {"right": arrays["classes"] == numpy(labels)}


def audit_part(unit: Unit, images: Tensor, labels: Tensor, generator: Generator) -> Arrays:
    """Zero gradients; attacks of three families, each on its own; and PGD with more and more radius and steps."""
    network, how = unit.target.network, {"norm": unit.norm, "topk": unit.target.topk, "generator": generator}

    def alone(name: str, **options: Any) -> np.ndarray:
        return numpy(one_attack(name, network, images, labels, **how, **options)[1])

    def broken(eps: float, steps: int = 8) -> np.ndarray:
        return np.isfinite(alone("pgd", eps=eps, steps=steps, targets=0))

    def zero(loss: Callable[..., Tensor], *topk: int) -> np.ndarray:
        _, grad = gradreg.input_gradient(lambda x: loss(network(x), labels, *topk), images)
        return numpy((grad.flatten(1) == 0).all(1))

    arrays = {"pgd": alone("pgd", steps=10), "boundary": alone("boundary", calls=135)}
    arrays |= {"logbarrier": alone("logbarrier", steps=20), "zero": zero(attacks.margin, unit.target.topk)}
    known = arrays["pgd"][np.isfinite(arrays["pgd"]) & (arrays["pgd"] > 0)]
    eps = float(np.median(known)) if len(known) else 1.0
    arrays |= {"zero_training": zero(gradreg.cross_entropy)}
    arrays["by_eps"] = np.stack([broken(scale * eps) for scale in AUDIT_SCALES], 1)
    arrays["by_steps"] = np.stack([broken(eps, steps) for steps in AUDIT_STEPS], 1)
    return arrays | {"whole_box": broken(1.0 if unit.norm == "linf" else math.sqrt(images[0].numel()))}


def numpy(values: Any) -> np.ndarray:
    """On the CPU; numbers of 16 bits with 32, since numpy knows no bfloat16."""
    values = torch.as_tensor(values).detach().cpu()
    return (values.float() if values.is_floating_point() and values.itemsize < 4 else values).numpy()


PARTS = {"sampling": estimate_part, "ascent": estimate_part, "calibration": evaluation_part}
PARTS |= {"evaluation": evaluation_part, "audit": audit_part, "smoothing": smoothing_part}


def read_part(unit: Unit) -> Arrays:
    """A part that is there, whole; else nothing."""
    unreadable = contextlib.suppress(OSError, ValueError, EOFError, zipfile.BadZipFile)
    with unreadable, np.load(unit.file, allow_pickle=False) as file:
        return dict(file)
    return {}


def work(units: list[Unit], world: World) -> None:
    """Do the parts that are missing, one a process and round.  Raises Failure when a signal asked to stop."""
    missing = [i for i, unit in enumerate(units) if not read_part(unit)] if world.main else None
    todo = [units[i] for i in world.same(missing)]
    for target in dict.fromkeys(unit.target for unit in todo):
        world.console.print(price([unit for unit in todo if unit.target is target], world.size))
    costs = [unit.calls * unit.target.pace for unit in todo]
    begun = said = time.monotonic()
    with Stop(world) as stop, runs.progress_bar(world.console, "evaluating, %", 100) as show:

        def watch(calls: int) -> None:
            """Obeys a signal, and moves a bar; without a terminal, says a line a minute."""
            nonlocal done, said
            if stop.signal:
                raise InterruptedError
            done, now = min(done + calls * unit.target.pace * world.size, sum(costs)), time.monotonic()
            share = done / sum(costs)
            show(100 * share)
            if not world.console.is_terminal and now > said + 60:
                said, left = now, runs.duration((now - begun) * (1 / share - 1))
                world.console.print(f"{100 * share:.0f} % done, {left} left")

        for first in range(0, len(todo), world.size):
            done = sum(costs[:first])
            for unit in todo[first + world.rank :][:1]:
                unit.target.network.watch = watch
                with contextlib.suppress(InterruptedError):  # the part is done again another time
                    np.savez(buffer := io.BytesIO(), **compute(unit, world))
                    replace(unit.file, buffer.getvalue())
            if signum := int(*world.max(torch.tensor([stop.signal]))):
                raise Failure("stopped; the same command goes on from here", 128 + signum)


def price(units: list[Unit], processes: int) -> str:
    """What parts of a target will cost, at most, as far as one can tell."""
    target, calls, by = units[0].target, sum(unit.calls for unit in units), f" by {processes} processes"
    n, rest = len(target.rows["evaluation"]), len(target.rows["calibration"])
    about = f"{target.name}: about {runs.duration(calls * target.pace / processes)}{by if processes > 1 else ''}"
    images = f"{n:,} of {len(target.source):,} images, {rest:,} others to calibrate with"
    return f"{about}: {images}, {calls:,} calls of {1000 * target.pace:.3g} ms, in {len(units)} parts"


def audit(found: Arrays) -> dict[str, tuple[float, float]]:
    """Each line of the masking audit (Athalye et al. 2018, Carlini et al. 2019): its figure, in %, and the limit.

    found: the arrays of `audit_part`.  Images that are misclassified as they are say nothing about attacks.
    """
    right, pgd = found["pgd"] > 0, found["pgd"]
    shares = {
        "gradient of the margin exactly zero": (found["zero"], 1),
        "gradient of the cross-entropy exactly zero": (found["zero_training"], 1),
        "black-box attack nearer than PGD by 5 %": ((found["boundary"] < 0.95 * pgd)[right], 10),
        "non-local attack nearer than PGD by 10 %": ((found["logbarrier"] < 0.9 * pgd)[right], 50),
        "PGD fails in the whole box": (~found["whole_box"], 0),
    }
    lines = {name: (100 * float(hits.mean()) if len(hits) else 0.0, limit) for name, (hits, limit) in shares.items()}
    for what, name in (("as eps grows", "by_eps"), ("with more steps", "by_steps")):
        errors = 100 * found[name].mean(0)
        lines[f"error falls {what}"] = float((np.maximum.accumulate(errors) - errors).max()), 5
    return lines


class Measured(NamedTuple):
    """What is known of one network in one norm."""

    found: Arrays  # evaluation_part's, over all images
    audit: dict[str, tuple[float, float]]
    bounds: dict[str, Bounds]  # by the names of METHODS
    refused: dict[str, str]  # method -> why there is no bound

    @property
    def best(self) -> str | None:
        """The method whose bounds are reported where there is room for one."""
        return next((method for method in METHODS.values() if method in self.bounds), None)

    @property
    def alone(self) -> Arrays:
        """The distances of each attack, where it was alone on every image."""
        return {k.removeprefix("distances_"): v for k, v in self.found.items() if k.startswith("distances_")}

    @property
    def audit_failed(self) -> list[str]:
        return [line for line, (figure, limit) in self.audit.items() if not figure <= limit]


def joined(parts: list[Arrays]) -> Arrays:
    """Each array that all parts have, over all of them."""
    names = set.intersection(*(set(part) for part in parts)) if parts else set()
    return {name: np.concatenate([np.atleast_1d(part[name]) for part in parts]) for name in sorted(names)}


def assemble(target: Target, units: list[Unit]) -> Target:
    """The target with what its parts say, which must all be there."""
    parts: dict[tuple[str, str | float], list[Arrays]] = collections.defaultdict(list)
    for unit in units:
        parts[unit.kind, unit.sigma or unit.norm].append(read_part(unit))
    for norm in target.settings.norm:
        found = joined(parts["evaluation", norm])
        found["first"] = joined([part for part in parts["evaluation", norm] if "images" in part])
        target.norms[norm] = measured = Measured(found, audit(joined(parts["audit", norm])), {}, {})
        for kind in [kind for kind in METHODS if parts[kind, norm]]:
            try:
                measured.bounds[METHODS[kind]] = bounds_of(kind, parts[kind, norm], found, norm, target.topk)
            except ValueError as error:
                measured.refused[METHODS[kind]] = str(error)
    target.smoothing = {sigma: joined(parts["smoothing", sigma]) for sigma in target.settings.smoothing}
    return target


def bounds_of(kind: str, parts: list[Arrays], evaluated: Arrays, norm: str, topk: int) -> Bounds:
    """The bounds that a kind of parts gives the evaluation images.  Raises ValueError: why there are none."""
    loss, calibrated = "probabilities" if kind == "sampling" else "logits", kind == "calibration"
    how = {"norm": norm, "topk": topk, "loss": loss}

    def margins_in(arrays: Arrays) -> bounds.Margins:
        both = (torch.from_numpy(arrays[f"{loss}_{what}"]) for what in ("losses", "grad_norms"))
        every = both if calibrated else (values[:, :1] for values in both)  # all rivals, or the nearest class alone
        return bounds.Margins(*every, **how, ahead=calibrated)

    usable = [part for part in parts if "refused" not in part]
    if not usable:
        raise ValueError(str(parts[0]["refused"]))
    found = joined(usable)
    if calibrated:
        constants = bounds.estimate_by_calibration(margins_in(found), torch.from_numpy(found["distances"]), exponent=2)
    elif kind == "sampling":
        some = torch.from_numpy(found["maxima"]), torch.from_numpy(usable[0]["eps"])
        constants = bounds.estimate_by_sampling(*some, **how)
    else:  # the suprema are over images: the largest of the parts'
        omega, eps = torch.from_numpy(found["omega"]).amax(0), torch.from_numpy(usable[0]["eps"])
        constants = bounds.Estimate(**how, lipschitz=found["lipschitz"].max(), eps=eps, omega=omega)
    margins = margins_in(evaluated)
    return bounds.lipschitz_bound(margins, constants), bounds.omega_bound(margins, constants), constants


def main(**options: Any) -> None:
    """What `Settings` says."""
    settings = Settings(**options)
    import report  # here, since it imports this module

    world = World(settings.device)
    # One thread a process and full precision: neither the processes nor the batches change a result.
    torch.set_num_threads(1 if world.device.type == "cpu" else torch.get_num_threads())
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.deterministic = True
    targets = open_targets(settings)
    for target in targets:
        prepare(target, world)
    name = "_vs_".join(target.name for target in targets)
    if len(name.encode()) > 200:  # more than 255 bytes no file may have
        name = f"{name[:60]}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"
    together = settings.out / name if targets[1:] else targets[0].path
    units = [units_of(target, world) for target in targets]
    for path in dict.fromkeys([together, *(unit.file.parent for some in units for unit in some)]):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise Failure(f"{error.filename or path}: cannot write there ({error.strerror})", 2) from None
    work([unit for some in units for unit in some], world)
    if world.main:
        report.publish(list(map(assemble, targets, units)), together, world)


main.__signature__, main.__doc__ = inspect.signature(Settings), Settings.__doc__

if __name__ == "__main__":
    sys.modules["evaluate"] = sys.modules["__main__"]  # one module, also for report.py, which imports evaluate
    sys.exit(runs.run_command(main))
