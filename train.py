"""Section 4 and Appendix A: train a network with the paper's penalty, on one process or many.

    python train.py                             undefended and penalised networks on digits, and a table of both
    python train.py cifar10 --data-dir DIR      the paper's CIFAR-10 recipe with Algorithm 1 (on a linear last layer)
    python train.py cifar10 --method at         its baselines: none, at, free, noise
    python train.py cifar10 --recipe fast       a small network and 16 epochs: minutes of a CPU
    python train.py DIR --model net.py:build --init weights.pt      fine-tune anybody's network
    torchrun --nproc_per_node 4 train.py imagenet --data-dir DIR
    python train.py --resume runs/latest        go on where a run stopped, or was stopped

A run lives in runs/<name>/; docs/run-directory.md describes its files.  Interrupted or killed, and resumed, it ends
with the weights, bit for bit, of one that was not (on the CPU, with as many processes and threads).  The same command
again, with the same --name, goes on too: so do torchrun's restarts.
Exit codes: 0 finished, 1 failed, 2 bad usage, 3 diverged, 128 + a signal: 130 Ctrl-C, 143 SIGTERM.
"""
# ruff: noqa: E402 (torch, which takes seconds to import, comes after --help)

import contextlib
import json
import math
import os
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable, Iterator, Set
from dataclasses import asdict, dataclass, field, fields, replace
from functools import partial
from inspect import Parameter, Signature
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import typer

# --- options and recipes ----------------------------------------------------------------------------------


def option(panel: str, default: Any, text: str, *, of: str = "", **how: Any) -> Any:
    """A field that is an option of the command line too; `of`: the methods to which it means something, if not all."""
    metavar = {bool: "", str: "NAME"}.get(type(default), "N")
    how = {"rich_help_panel": panel, "metavar": metavar, "show_default": False} | how
    return field(default=default, metadata={"text": text, "of": of.split(), "how": how})


def fraction(text: str) -> float:
    """A number, or a quotient of two: 8/255."""
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not a number, nor a fraction such as 8/255") from None


penalty, baseline = partial(option, "The penalty of eq. (8)"), partial(option, "Its baselines")
training, placed = partial(option, "Training"), partial(option, "The run")


@dataclass(frozen=True)
class Phase:
    """Epochs of one image size; a recipe's are stretched and scaled to --epochs and --batch-size."""

    epoch: int  # the first
    schedule_epoch: int  # the same, in the epochs of the recipe's schedule
    batch_size: int  # images a step, over all processes
    size: int = 224  # pixels a side; images that are held in memory stay as they are
    min_scale: float = 0.08  # least share of an image's area in a random crop


@dataclass(frozen=True)
class Options:
    """What makes a run: the command line, RECIPES, config.json and a resumed run share it.

    The defaults are the paper's CIFAR-10 recipe (its network: --model resnext34-authors); lengths in pixels, 0 to 1.
    """

    dataset: str = "cifar10"  # or digits, or imagenet, or the absolute path of a folder
    method: Literal["fd", "exact", "ascent", "none", "noise", "at", "free"] = penalty(
        "fd", "finite differences (Algorithm 1), double backpropagation, one step up eq. (7); none, or a baseline"
    )  # fmt: skip
    norm: Literal["l2", "linf", "l1"] = penalty("l2", "the attacks to defend against; for at and free linf")
    lam: float = penalty(0.1, "the loss gains lam/2 times the mean penalty", of="fd exact ascent")  # paper: 0.1, 1
    h: float = penalty(0.01, "step of the difference; ascent: the longest step, 0.5", of="fd ascent")  # l2, pixels
    unsquared: bool = penalty(False, "the norm itself, not its square (Section 3)", of="fd exact ascent")
    penalty_share: float = penalty(1.0, "of each batch that is penalised, at random", of="fd exact ascent")
    # Madry et al. (2018), Shafahi et al. (2019), Cohen et al. (2019); docs/training.md says how the paper's own differ.
    eps: float = baseline(8 / 255, "radius; 8/255 is understood", of="at free", parser=fraction)
    attack_steps: int = baseline(7, "PGD steps, each of 1.75 eps / steps", of="at")
    replays: int = baseline(8, "steps on each batch, m; divides the recipe's epochs", of="free")
    sigma: float = baseline(0.25, "standard deviation", of="noise")
    recipe: Literal["paper", "fast"] = training("paper", "fast: for small colour images and two CPU cores")
    model: str = training("resnext34", "one of models.py, torchvision:NAME, or yours: FILE.py:FACTORY")
    init: str | None = training(None, "fine-tune these weights: .pt, .pth, .safetensors, or a run", metavar="WEIGHTS")
    new_head: bool = training(False, "leave out of them a last layer for another number of classes")
    activation: Literal["relu", "gelu", "silu", "celu"] = training("relu", "in the place of every ReLU")
    epochs: int = training(200, "stretches the learning rate schedule")
    batch_size: int = training(128, "images a step, over all processes; scales later phases")
    lr: float = training(0.1, "first learning rate; scales the schedule")
    amp: bool = training(False, "bfloat16; for fd with --h 0.1 or more")
    channels_last: bool = training(False, "memory layout, faster on recent GPUs with --amp")
    size: int | None = training(None, "pixels a side of large images; a folder's: their own, up to 224")
    seed: int = training(0, "of weights, order, augmentation, noise and random layers")
    subset: int | None = training(None, "train on N images and test on at most N")
    split: float = training(0.0, "share of a folder's images to keep for testing, where it has no test/ or val/")
    data_dir: str | None = placed(None, "where the images are; data, if not given", metavar="DIR")
    checkpoint_minutes: float = placed(10.0, "between checkpoints inside an epoch: what a power cut may cost")
    # Not on the command line.  schedule: epoch, learning rate there, and at the next row; linear in between.
    schedule: tuple[tuple[float, float, float], ...] = (
        *((0, 0.1, 0.1), (60, 0.02, 0.02), (120, 0.004, 0.004), (160, 0.0008, 0.0008), (200, 0, 0)),
    )
    phases: tuple[Phase, ...] = (Phase(0, 0, 128),)
    lam_warmup: float = 0.0  # epochs in which lam rises from 0, linearly
    statistics: str = "batch"  # of batch normalization; or running, which then stay as they are
    weight_decay: float = 5e-4
    decay_biases: bool = True
    nesterov: bool = False
    cutout: bool = True  # of small images: grey borders and cutout; or else borders that are reflections


@dataclass(frozen=True)
class Command(Options):
    """Train a classifier with the paper's input gradient penalty.

    Without DATASET: train an undefended and a penalised network on digits, and print what the penalty buys.
    """

    runs: str = placed("runs", "where runs are kept", metavar="DIR")
    name: str | None = placed(None, "of a new run; the same command again goes on with it", metavar="NAME")
    resume: str | None = placed(None, "go on with this run, with its own options", metavar="RUN")
    device: str | None = placed(None, "cpu, cuda or cuda:N; cuda, where there is one", metavar="NAME")


# fmt: off
RECIPES = {
    "digits": Options(  # 64 pixels: a weight of 0.1 buys little, and a step of 0.01 only costs digits
        dataset="digits", lam=1.0, h=0.1, eps=0.1, model="cnn", epochs=40, batch_size=50, lr=0.05,
        schedule=((0, 0.05, 0.05), (12, 0.01, 0.01), (24, 0.002, 0.002), (32, 0.0004, 0.0004), (40, 0, 0)),
    ),
    "cifar10": Options(),
    # One cycle of the learning rate; smooth: results/activations.md; a large step h: results/step.md.
    "cifar10-fast": Options(
        recipe="fast", h=0.3, model="resnet9", activation="gelu", epochs=16, lr=0.02, nesterov=True, cutout=False,
        amp=True, channels_last=True, schedule=((0, 0.02, 0.2), (3, 0.2, 0), (16, 0, 0)),
    ),
    # The authors' sizes, batches (of four GPUs) and rates.  They penalise behind the normalization by std, 0.226 on
    # average, with 0.1 and 0.01: that is std^2 and std times as much in pixels.
    "imagenet": Options(
        dataset="imagenet", lam=0.0051, h=0.0023, eps=4 / 255, model="resnet50", epochs=29, batch_size=512,
        lr=0.25, weight_decay=1e-4, decay_biases=False,
        phases=(Phase(0, 0, 512, 128), Phase(15, 15, 192, 224, 0.087), Phase(28, 28, 128, 288, 0.5)),
        schedule=((0, 0.25, 0.5), (8, 0.5, 0.0625), (15, 0.1, 0.01), (25, 0.01, 0.001),
                  (28, 0.000625, 0.0000625), (29, 0, 0)),
    ),
}
# fmt: on


def command_line(main: Callable[..., None]) -> Callable[..., None]:
    """main, for typer with the fields of Command as its options, None if not given; recipes' defaults in their help."""
    dataset = Annotated[str | None, typer.Argument(help="digits, cifar10, imagenet, or the path of an image folder")]
    parameters = [Parameter("dataset", Parameter.KEYWORD_ONLY, default=None, annotation=dataset)]
    for f in (f for f in fields(Command) if f.metadata):
        found = [getattr(recipe, f.name, f.default) for recipe in RECIPES.values()]
        shown = [f"{value:.3g}" if isinstance(value, float) else str(value) for value in found]
        default = ", ".join(map(" ".join, zip(RECIPES, shown, strict=True))) if len(set(shown)) > 1 else shown[0]
        choices = "|".join(get_args(f.type)) if get_origin(f.type) is Literal else ""
        text = ": ".join(filter(None, [", ".join(f.metadata["of"]), choices, f.metadata["text"]]))
        text += f" ({default})" * (default not in ("None", "False"))
        how = typer.Option(flag(f.name), help=text, **f.metadata["how"])
        parameters.append(parameters[0].replace(name=f.name, annotation=Annotated[f.type | None, how]))
    main.__signature__, main.__doc__ = Signature(parameters), Command.__doc__
    return main


def flag(name: str) -> str:
    return f"--{name.replace('_', '-')}" if name != "dataset" else "DATASET"


if __name__ == "__main__" and "--help" in sys.argv:
    typer.run(command_line(lambda **_: None))

import numpy as np
import torch
from rich.table import Table
from torch import Tensor, nn

import attacks
import bounds
import data
import gradreg
import models
import runs
from gradreg import Penalised, cross_entropy
from runs import Failure, World

# --- the objective ----------------------------------------------------------------------------------------

ROUGH = 0.1  # the least h that bfloat16 and TF32 have digits for
PENALISED = {"fd": 4, "exact": 3, "ascent": 2}  # units of work beside the 3 of a plain step; tests/test_cost.py


class Objective(nn.Module):
    """images, labels -> the losses and penalties of eq. (8).

    All passes in one module: DistributedDataParallel sees one forward and one backward a step.  amp: in bfloat16.
    """

    def __init__(self, network: nn.Module, options: Options | None = None, **changed: Any):
        super().__init__()
        self.network, self.options = network, replace(options or Options(), **changed)

    def forward(self, images: Tensor, labels: Tensor, lam: float = 1.0) -> Penalised:
        n, share = len(images), self.options.penalty_share if self.options.method in PENALISED else 0
        m = math.ceil(n * share)  # the order of an epoch is random: the first images of a batch are a random part of it
        m = m if m in {0, n} else n if n < 4 else min(max(m, 2), n - 2)  # one image alone has no batch statistics
        if self.options.method == "ascent":  # moved images and others are normalized together
            return self.part(images, labels, "ascent", lam=lam, first=m)
        part = self.part(images[:m], labels[:m], self.options.method) if m else None
        rest = self.part(images[m:], labels[m:], "none") if m < n else None
        return gradreg.joined(part, rest.losses) if part and rest else part or rest

    def part(self, images: Tensor, labels: Tensor, method: str, **ascent: float) -> Penalised:
        options = self.options

        def loss_fn(z: Tensor) -> Tensor:
            with torch.autocast(z.device.type, torch.bfloat16) if options.amp else contextlib.nullcontext():
                logits = self.network(z)
            return cross_entropy(logits.float() if options.amp else logits, labels[: len(z)])

        how = {"norm": options.norm, "squared": not options.unsquared}
        if method == "fd":
            return gradreg.fd_penalty(loss_fn, images, h=options.h, **how)
        if method == "exact":
            return gradreg.exact_penalty(loss_fn, images, **how)
        if method == "ascent":
            return gradreg.ascent_penalty(loss_fn, images, h=options.h, **ascent, **how)
        losses = loss_fn(images)
        return Penalised(losses, torch.zeros_like(losses), None)


# --- the step and the epochs ------------------------------------------------------------------------------

KEPT = "step", "seconds", "evaluated", "fields"  # of a trainer: a checkpoint holds them


class Trainer:
    """Algorithm 1 on one run: the step, the epochs, and what a checkpoint holds."""

    def __init__(self, path: Path, config: dict[str, Any], images: data.Data, world: World):
        self.config, self.options, self.images, self.world = config, options_of(config), images, world
        self.step, self.seconds, self.evaluated, self.fields = 0, 0.0, True, {}
        self.plan, self.phase = Plan(self.options, len(images.train), world.size), None
        self.run, self.checkpoints, self.stop = runs.Run(path, world), runs.Checkpoints(path, world), runs.Stop(world)
        self.watch, self.delta = Watch(self), torch.zeros(0)  # delta: the perturbation of free adversarial training
        set_precision(self.options)
        torch.manual_seed(self.options.seed)
        self.layout = torch.channels_last if self.options.channels_last else torch.contiguous_format
        for line in models.changed_since(config, path):
            self.run.warn(line)
        self.network = models.from_config(config).to(world.device, memory_format=self.layout).train()
        for module in self.network.modules():
            if self.options.statistics == "running" and isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.eval()  # it uses its running statistics, and keeps them
        groups = decayed(self.network, self.options)
        self.optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9, nesterov=self.options.nesterov)
        workers = min(8, max(1, (os.cpu_count() or 1) // world.size))  # threads that decode large images
        self.share = {"rank": world.rank, "processes": world.size, "device": world.device, "workers": workers}
        self.share |= {"problems": self.watch.unreadable, "stop": lambda: bool(self.stop.signal)}

    def update(self, images: Tensor, labels: Tensor) -> None:
        """One step of Algorithm 1, or of a baseline, on this process's share of a batch."""
        self.rate, self.lam = self.plan.rate(self.step), self.plan.lam(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate
        inputs = training_inputs(self, images, labels)
        torch.manual_seed(self.chance(1 + self.world.rank))  # from here random layers draw
        self.optimizer.zero_grad(set_to_none=True)
        out = self.objective(inputs, labels, self.lam)
        out.objective(self.lam).backward()
        self.optimizer.step()
        if self.options.method == "free":  # one step up the loss; what lies beyond [0, 1] has gradient 0, and stays
            eps, rise = self.options.eps, inputs.grad.sign() * (images + self.delta == inputs)
            self.delta = (self.delta + eps * rise).clamp(-eps, eps)
        self.watch.add(out, self.lam)
        self.step += 1

    def chance(self, index: int) -> int:
        """Where a generator begins in this step; index 0 is for all processes, 1 + rank for one's own draws."""
        return int(data.uniforms(self.options.seed, self.step, np.array([index]), 1)[0, 0] * 2**53)

    def fit(self) -> None:
        """Train to the end.  Raises Failure when a signal asked to stop, or when a loss is not finite."""
        self.objective = Objective(self.network, self.options)
        if self.world.size > 1:  # whether a user's network uses all its weights in each step, nobody knows
            how = {"find_unused_parameters": models.is_file(self.options.model)}
            self.objective = nn.parallel.DistributedDataParallel(self.objective, **how)
        if self.step == 0:
            self.save()  # so that there is always something to resume
        with self.stop, runs.progress_bar(self.world.console, self.run.path.name, self.plan.total) as self.watch.show:
            while self.step < self.plan.total or not self.evaluated:
                if self.evaluated:
                    self.train_epoch(*self.plan.locate(self.step))
                self.end_epoch()
        self.run.end("finished", "finish", f"finished, {runs.duration(self.seconds)} of training")

    def train_epoch(self, epoch: int, first: int) -> None:
        """The steps of an epoch, from its step number `first` on."""
        self.enter_phase(epoch)
        self.watch.clear()
        which = {"seed": self.options.seed, "epoch": epoch, "first": first // self.plan.replays}
        batches = data.training_batches(self.train_images, batch_size=self.phase.batch_size, **which, **self.share)
        with contextlib.closing(batches):  # whatever happens, its threads end
            for images, labels in batches:
                for _ in range(self.plan.replays - self.plan.locate(self.step)[1] % self.plan.replays):
                    self.update(images.contiguous(memory_format=self.layout), labels)
                    self.watch.after_step(images, labels)
        if self.step < self.plan.starts[epoch + 1]:  # a signal has ended the wait for images
            self.watch.ask(may_save=False) if self.world.size == 1 else self.watch.end(self.stop.signal)

    def end_epoch(self) -> None:
        """Evaluate, record, print, save; then stop if told to.  Raises Failure when the test loss is not finite."""
        self.enter_phase(self.plan.locate(self.step - 1)[0])
        self.evaluated = False
        self.watch.ask()  # a long evaluation begins with a checkpoint, where one is due
        self.run.phase = "eval"
        self.run.heartbeat(force=True)
        self.world.share_buffers(self.network)
        with evaluating(self.network):
            fields = evaluate(self)
        self.evaluated, self.run.phase = True, "train"
        self.watch.after_epoch(fields)
        self.save()
        if self.step < self.plan.total:
            self.watch.ask()

    def enter_phase(self, epoch: int) -> None:
        """Take up the images in the size of an epoch's phase."""
        if self.phase == (phase := self.plan.phase(epoch)):
            return
        self.phase = phase
        self.at_once = phase.batch_size // self.world.size  # images that a training step holds in memory here
        images = self.images.at(size=phase.size, min_scale=phase.min_scale, cutout=self.options.cutout)
        self.train_images, self.test_images = images.train.to(self.world.device), images.test.to(self.world.device)
        if len(self.plan.phases) > 1:
            self.run.event("phase", f"epoch {epoch}: {phase.size} pixels, {phase.batch_size} images a step")

    def save(self) -> None:
        """Write a checkpoint: the main process does.  There are no random states in it: `chance` is a pure function."""
        state = {name: getattr(self, name) for name in ("config", *KEPT)}
        state |= {"model": self.network.state_dict(), "optimizer": self.optimizer.state_dict()}
        if self.options.method == "free":
            state["delta"] = torch.cat(self.world.gather(self.delta.cpu()))
        self.checkpoints.save(state)
        self.run.event("checkpoint", f"checkpoint at step {self.step}")
        self.watch.clear()

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.  Raises Failure where it does not fit."""
        try:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            vars(self).update({name: state[name] for name in KEPT})
            if self.options.method == "free":
                self.delta = state["delta"].tensor_split(self.world.size)[self.world.rank]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Failure(f"{self.run.path}: the checkpoint does not fit its run ({type(error).__name__})", 2) from None
        self.run.step, self.run.epoch = self.step, self.plan.epoch(self.step)


class Plan:
    """Which epoch, phase, learning rate and weight a step has: functions of the step alone, so any can be first."""

    def __init__(self, options: Options, images: int, processes: int = 1):
        self.options, self.phases, self.schedule = options, options.phases, options.schedule
        self.replays = options.replays if options.method == "free" else 1  # steps on each batch
        for first, size in [(phase.epoch, phase.batch_size) for phase in self.phases]:
            if size > images:
                raise Failure(f"--batch-size {size}: there are only {images} training images: give {images} or less", 2)
            if size % processes:
                what = f"{size} images a step, from epoch {first} on,"
                raise Failure(f"--batch-size: {what} cannot be shared evenly by {processes} processes", 2)
        self.steps = [images // self.phase(e).batch_size * self.replays for e in range(options.epochs)]
        self.starts = [0, *accumulate(self.steps)]
        self.total = self.starts[-1]

    def phase(self, epoch: int) -> Phase:
        return [phase for phase in self.phases if phase.epoch <= epoch][-1]

    def locate(self, step: int) -> tuple[int, int]:
        """The epoch that a step lies in, and its number in there."""
        epoch = bisect_right(self.starts, step) - 1
        return epoch, step - self.starts[epoch]

    def epoch(self, step: int) -> float:
        """Epochs done before a step."""
        epoch, done = self.locate(step)
        return epoch + (done / self.steps[epoch] if done else 0)

    def rate(self, step: int) -> float:
        """The learning rate of a step: phases may be stretched unevenly, the schedule follows them."""
        own = [*(phase.epoch for phase in self.phases), self.options.epochs]
        recipes = [*(phase.schedule_epoch for phase in self.phases), self.schedule[-1][0]]
        epoch = float(np.interp(self.epoch(step), own, recipes))
        (start, first, last), (end, _, _) = [rows for rows in pairwise(self.schedule) if rows[0][0] <= epoch][-1]
        return first + (epoch - start) * (last - first) / (end - start)

    def lam(self, step: int) -> float:
        warmup = self.options.lam_warmup
        return self.options.lam * min(1.0, self.epoch(step) / warmup if warmup else 1.0)


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context: the network in evaluation mode, and afterwards each module in the mode that it was in."""
    modes = [(module, module.training) for module in network.modules()]
    network.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def decayed(network: nn.Module, options: Options) -> list[dict[str, Any]]:
    """What the optimizer updates; biases apart where the recipe does not decay them."""
    groups: dict[float, list[nn.Parameter]] = {options.weight_decay: []}
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            apart = name.endswith("bias") and not options.decay_biases
            groups.setdefault(0.0 if apart else options.weight_decay, []).append(parameter)
    return [{"params": parameters, "weight_decay": decay} for decay, parameters in groups.items()]


def may_round(options: Options) -> bool:
    """Whether TF32 and bfloat16 may compute: not a difference with a small step, which cancels the digits they keep."""
    return options.method != "fd" or options.h >= ROUGH


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device has instructions for bfloat16; a CPU without them takes ten times as long as in float32."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return any(getattr(torch.cpu, "get_capabilities", dict)().get(name) for name in ("avx512_bf16", "amx_bf16"))


def set_precision(options: Options) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = may_round(options)
    if options.model == "cnn":
        torch.set_num_threads(1)  # too small to share: on a busy machine threads that wait for each other crawl


def training_inputs(trainer: Trainer, images: Tensor, labels: Tensor) -> Tensor:
    """What the network is trained on: the images, or what a baseline makes of them."""
    options, world = trainer.options, trainer.world
    if options.method == "free":  # Shafahi et al. (2019): each backward pass updates weights and perturbation
        kept = trainer.delta.shape == images.shape  # it outlives the batch
        trainer.delta = trainer.delta.to(images.device) if kept else torch.zeros_like(images)
        return (images + trainer.delta).clamp(0, 1).requires_grad_()
    if options.method not in {"noise", "at"}:
        return images
    generator = torch.Generator(images.device).manual_seed(trainer.chance(0))
    everyones = images.expand(world.size, *images.shape).flatten(0, 1)
    mine = slice(world.rank * len(images), (world.rank + 1) * len(images))
    if options.method == "noise":
        return images + options.sigma * torch.randn(everyones.shape, generator=generator, device=images.device)[mine]
    world.share_buffers(trainer.network)  # which the attack sees: as after a resume, the main one's
    start = images + options.eps * gradreg.uniform_ball(everyones, options.norm, generator)[mine]
    # Madry et al. (2018): PGD in [0, 1], of steps eps/4 for the paper's seven.  It leaves running statistics alone.
    how = {"norm": options.norm, "eps": options.eps, "steps": options.attack_steps, "loss": cross_entropy}
    how |= {"start": start, "step_size": 1.75 * options.eps / options.attack_steps}
    with evaluating(trainer.network), torch.autocast(images.device.type, torch.bfloat16, enabled=options.amp):
        return attacks.ascend(trainer.network, images, labels, **how)


# --- what surrounds the steps: records, lines, stops ------------------------------------------------------

LOG_EVERY = 10  # steps between two records
PROBE_IMAGES = 200  # test images attacked after each epoch: the first in a fixed random order
LINES = 20  # epochs of a run that are printed, about
PATIENCE = 5.0  # seconds, about, between two times that the processes ask each other whether to stop, at most


class Watch:
    """What surrounds the steps of a trainer: its records and lines, the images it skips, when it stops or saves.

    What the steps since the last record have found is kept on the device, so that no step waits for it.
    """

    def __init__(self, trainer: Trainer):
        self.trainer, self.run, self.world, self.ask_every = trainer, trainer.run, trainer.world, 1
        self.unreadable: list[str] = []  # this process's, not yet told
        self.skipped: set[str] = set()  # of all processes
        self.last: tuple[Tensor, Tensor] | None = None  # a few images of the last step
        self.clear()

    def clear(self) -> None:
        self.images, self.since = 0, time.perf_counter()
        self.norms: list[Tensor] = []  # of input gradients, an image each
        self.sums = torch.zeros(4, dtype=torch.float64, device=self.world.device)

    @torch.no_grad()
    def add(self, out: Penalised, lam: float) -> None:
        self.images += len(out.losses)
        slopes = errors = torch.zeros_like(out.losses)
        if out.grad is not None:
            m, n, options = len(out.grad), len(out.losses), self.trainer.options
            slopes = (out.grad * gradreg.direction(out.grad, options.norm)).flatten(1).sum(1)
            errors = ((out.penalties[:m] * (m / n)) ** (1.0 if options.unsquared else 0.5) - slopes).abs()
            self.norms.append(gradreg.dual_norm(out.grad, options.norm))
        sums = out.losses, lam / 2 * out.penalties, errors, slopes
        self.sums += torch.stack([values.double().sum() for values in sums])

    def after_step(self, images: Tensor, labels: Tensor) -> None:
        """A heartbeat; every few steps a record, and the question whether to go on."""
        step, plan = self.trainer.step, self.trainer.plan
        self.run.step, self.run.epoch, self.last = step, plan.epoch(step), (images[:8], labels[:8])
        self.run.heartbeat()
        self.show(step)
        ends = plan.locate(step)[1] == 0  # its epoch, whose end asks
        record = ends or step == 1 or step % LOG_EVERY == 0
        if record:
            self.record()
        if not ends and (record or step % self.ask_every == 0):
            self.ask(may_save=record)

    def record(self) -> None:
        """A "step" record, over all processes.  Raises Failure when the loss is not finite."""
        trainer, options, world, images = self.trainer, self.trainer.options, self.world, self.images * self.world.size
        if not self.norms:  # no step has computed an input gradient: look at a few images
            few, labels = self.last
            with evaluating(trainer.network):
                _, grad = gradreg.input_gradient(lambda z: cross_entropy(trainer.network(z), labels), few)
            self.norms.append(gradreg.dual_norm(grad, options.norm))
        norms = torch.cat(self.norms).double()
        loss, penalty, error, slope, norm = world.sum(torch.cat([self.sums, norms.sum()[None]]))
        seconds = time.perf_counter() - self.since  # until the sums are there
        largest, seconds = world.max(torch.tensor([norms.max(), seconds], dtype=torch.float64))  # the slowest one's
        self.clear()
        trainer.seconds += seconds
        trainer.fields = {"loss": loss / images, "penalty": penalty / images, "grad_norm_max": largest}
        trainer.fields |= {"grad_norm_mean": norm / len(norms) / world.size, "images_per_s": round(images / seconds, 1)}
        trainer.fields["fd_error_pct"] = 100 * error / slope if options.method == "fd" and slope else None
        self.run.record("step", **trainer.fields, lr=trainer.rate, lam=trainer.lam)
        self.require_finite((loss + penalty) / images, "loss")
        self.ask_every = max(1, min(LOG_EVERY, int(PATIENCE * images / seconds / trainer.phase.batch_size)))

    def after_epoch(self, fields: dict[str, Any]) -> None:
        """The epoch's record, and some epochs' lines."""
        trainer, step = self.trainer, self.trainer.fields
        self.run.record("epoch", **fields, seconds=round(trainer.seconds, 3))
        self.require_finite(fields["test_loss"], "test loss")
        epoch, epochs = trainer.plan.locate(trainer.step)[0], trainer.options.epochs
        top5 = f"  top-5 error {fields['top5_error_pct']:.2f} %" if "top5_error_pct" in fields else ""
        errors = f"error {fields['clean_error_pct']:.2f} %{top5}  attacked {fields['attacked_error_pct']:.1f} %"
        self.show(trainer.step, description=f"{self.run.path.name}  {errors}")
        if epoch % math.ceil(epochs / LINES) == 0 or epoch == epochs:
            seen = f"loss {step['loss']:.4f}  penalty {step['penalty']:.4f}  gradient {step['grad_norm_mean']:.3f}"
            self.world.console.print(f"epoch {epoch}/{epochs}  {seen}  {errors}  {step['images_per_s']:,.0f} images/s")

    def ask(self, *, may_save: bool = True) -> None:
        """All processes together: name unreadable images, stop if any was told to, or save if that is due."""
        trainer = self.trainer
        due = may_save and trainer.checkpoints.due(trainer.options.checkpoint_minutes)
        signals, dues, unreadable = zip(*self.world.gather((trainer.stop.signal, due, self.unreadable)), strict=True)
        for message in sorted(set().union(*unreadable) - self.skipped):
            self.run.warn(f"skipped: {message}")
        self.skipped.update(*unreadable)
        self.unreadable.clear()
        signum = max(signals)
        if signum or any(dues):
            if self.images:  # not yet recorded
                self.record()
            if self.last:  # a network of no use makes no checkpoint
                images, labels = self.last
                with evaluating(trainer.network), torch.no_grad():
                    losses = cross_entropy(trainer.network(images), labels)
                self.require_finite(*self.world.sum(losses.sum()[None]), "loss after the update")
            trainer.save()
        if signum:
            self.end(signum)

    def until_told(self, batches: Iterable) -> Iterator:
        """The batches of an evaluation, with a heartbeat for each, until a process is told to stop: then all stop."""
        for batch in batches:
            if self.trainer.stop.signal:
                break
            yield batch
            self.run.heartbeat()
        self.ask(may_save=False)

    def end(self, signum: int) -> None:
        """Say that a signal has stopped the run, and raise Failure.  Nothing here waits for another process."""
        what = f"stopped by {signal.Signals(signum).name} at step {self.trainer.step}"
        self.run.end("interrupted", "interrupt", what)
        raise Failure(f"{what}; go on with: python train.py --resume {self.run.path}", 128 + signum)

    def require_finite(self, loss: float, what: str) -> None:
        if not math.isfinite(loss):
            advice = f"{self.run.path} keeps the checkpoint from before; try a smaller --lr or --lam"
            raise Failure(f"diverged: the {what} is not finite at step {self.trainer.step}; {advice}", 3)


def evaluate(trainer: Trainer) -> dict[str, Any]:
    """The fields of an "epoch" record: all test images clean, the same few attacked.  Failure where told to stop."""
    network, world, test, few = trainer.network, trainer.world, trainer.test_images, trainer.at_once
    norm, eps, radii = (trainer.config[name] for name in ("attack_norm", "attack_eps", "omega_eps"))
    batches = data.evaluation_batches(test, batch_size=min(256, 4 * few), **trainer.share)
    loss, error, top5_error = losses_and_errors(network, trainer.watch.until_told(batches), world)
    fields = {"test_loss": loss, "clean_error_pct": error}
    fields |= {"top5_error_pct": top5_error} if trainer.config["classes"] > 10 else {}
    if not math.isfinite(loss):
        return fields
    mine = data.order(len(test), seed=0, epoch=2)[:PROBE_IMAGES][world.rank :: world.size]
    images, labels = data.fetch(test, mine, world.device, problems=trainer.watch.unreadable)
    parts = list(zip(images.split(few), labels.split(few), strict=True))
    pgd, told = {"norm": norm, "eps": eps, "steps": 10}, trainer.watch.until_told
    fields["attacked_error_pct"] = losses_and_errors(network, told(parts), world, **pgd)[1]
    looked = [bounds.omega_statistics(network, *part, norm=norm, eps=radii) for part in told(parts)]
    omega, norms = torch.stack([omega for omega, _ in looked]).amax(0), torch.cat([norms for _, norms in looked])
    *omega, largest = world.max(torch.cat([omega, norms.amax()[None]]))
    total, count = world.sum(torch.stack([norms.double().sum(), torch.ones_like(norms).double().sum()]))
    return fields | {"margin_grad_norm_mean": total / count, "omega": omega, "margin_grad_norm_max": largest}


def losses_and_errors(network: nn.Module, batches: Iterable, world: World, **ball: Any) -> tuple[float, float, float]:
    """Mean loss, % not the first and % not among the first five classes, over the images of all processes.

    With a ball (norm, eps, steps): of the images that `attacks.pgd` makes of them.
    """
    sums = torch.zeros(4, dtype=torch.float64, device=world.device)
    for images, labels in batches:
        if ball:
            generator = torch.Generator(images.device).manual_seed(0)
            images = attacks.pgd(network, images, labels, generator=generator, **ball)
        with torch.no_grad():
            logits = network(images)
        losses, place = cross_entropy(logits, labels), attacks.ahead(logits, labels)
        sums += torch.stack([losses, place >= 1, place >= 5, torch.ones_like(losses)]).double().sum(1)
    loss, wrong, wrong5, count = world.sum(sums)
    if not count:
        raise Failure("none of the test images can be read", 1)
    return loss / count, 100 * wrong / count, 100 * wrong5 / count


# --- a run, from the options given and a recipe -----------------------------------------------------------

FORMAT = 2  # of config.json and checkpoint.pt
MAY_CHANGE = {"data_dir", "checkpoint_minutes"}  # when a run goes on
LINF_RADII = {"digits": [0.03, 0.06, 0.1], "cifar10": [2 / 255, 4 / 255, 8 / 255]}
LINF_RADII["imagenet"] = [1 / 255, 2 / 255, 4 / 255]
NAMES = {"none": "", "noise": "-sigma{sigma:g}", "at": "-{norm}-eps{eps:.3g}", "free": "-m{replays}-eps{eps:.3g}"}
LIMITS = {"seed": 2**64 - 1, "epochs": 10**5, "size": 4096, "penalty_share": 1}


def check_given(given: dict[str, Any]) -> None:
    """Raise Failure for an option that is not finite, too small or too large, or that its method does not have."""
    method = given.get("method", Options.method)
    for f in fields(Options):
        name, value, of = flag(f.name), given.get(f.name), f.metadata.get("of")
        zero = f.name in {"lam", "seed", "split"}
        if value is not None and of and method not in of:
            raise Failure(f"{name} means nothing to --method {method}, only to {', '.join(of)}: leave it out", 2)
        if isinstance(value, int | float):
            most = LIMITS.get(f.name, sys.float_info.max if isinstance(value, float) else 10**9)
            if not value >= 0 or not (value or zero):
                raise Failure(f"{name} must be {'0 or more' if zero else 'positive'}, not {value}", 2)
            if value > most:
                raise Failure(f"{name} must be at most {most}, not {value}", 2)


def recipe_of(dataset: str, images: data.Data) -> str:
    """A data set's own recipe; for an image folder that of the data set whose images it resembles."""
    return dataset if dataset in data.NAMES else "cifar10" if images.small else "imagenet"


def resolve(given: dict[str, Any], images: data.Data, world: World) -> Options:
    """All options of a run: those given, and the recipe's for the rest.  Raises Failure for what cannot work.

    Fine-tuning (--init): a tenth of the largest rate, falling to 0 in two epochs of one size; lam rises from 0 over the
    first (or half of a single one): it meets a penalty it has never seen; running statistics are kept.  Large images of
    a folder keep their median short side, up to 224.  A batch is at most an eighth of the images; rates fall with it.
    """
    name, tuned, size = recipe_of(given["dataset"], images), "init" in given, given.get("size")
    recipe = RECIPES["cifar10-fast" if given.get("recipe") == "fast" else name]
    if given.get("recipe") == "fast" and name != "cifar10":
        raise Failure("--recipe fast: it is for small colour images, as CIFAR-10's; leave it out", 2)
    if "new_head" in given and not tuned:
        raise Failure("--new-head is about the weights of --init, which is not given", 2)
    if images.small and size:
        raise Failure(f"--size {size}: these images have a size of their own, {images.short_side}; leave it out", 2)
    if len(images.test) < world.size:
        raise Failure(f"only {len(images.test)} test images for {world.size} processes", 2)
    if tuned:
        rate = max(max(rates) for _, *rates in recipe.schedule) / 10
        recipe = replace(recipe, epochs=2, lr=rate, schedule=((0, rate, 0.0), (2, 0.0, 0.0)), phases=recipe.phases[:1])
        recipe = replace(recipe, lam_warmup=min(1.0, given.get("epochs", 2) / 2), statistics="running")
    if not images.small and (tuned or given["dataset"] != "imagenet"):
        size = size or min(224, images.short_side)
    method = given.get("method", recipe.method)
    own = {"norm": "linf" if method in {"at", "free"} else "l2", "h": 0.5 if method == "ascent" else recipe.h}
    own["amp"] = recipe.amp and (method != "fd" or given.get("h", recipe.h) >= ROUGH) and has_bfloat16(world.device)
    own["channels_last"] = recipe.channels_last and method != "exact"  # which mixes the layouts, and is slower so
    if method not in PENALISED:
        own |= {"lam": 0.0, "lam_warmup": 0.0}
    if method == "free":  # as many steps as the others
        own["epochs"] = math.ceil(recipe.epochs / given.get("replays", recipe.replays))
    each = len(images.train) // world.size  # at least two, where there are: one alone has no batch statistics
    most = max(1, min(2, each), each // 8) * world.size
    if "batch_size" not in given and most < recipe.batch_size:
        own |= {"batch_size": most, "lr": recipe.lr * most / recipe.batch_size}
    options, norms = replace(recipe, **own | given), {"free": ["linf"], "at": ["l2", "linf"]}
    if options.amp and not may_round(options):
        raise Failure(f"--amp: bfloat16 lacks the digits for --h {options.h:g}; give {ROUGH} or more, or no --amp", 2)
    if options.norm not in norms.get(method, [options.norm]):
        raise Failure(f"--norm {options.norm}: --method {method} is for {' and '.join(norms[method])}", 2)
    scale = options.lr / recipe.lr
    rates = tuple((epoch, scale * first, scale * last) for epoch, first, last in recipe.schedule)
    return replace(options, schedule=rates, phases=stretch(recipe, options, fit="batch_size" not in given, size=size))


def stretch(recipe: Options, options: Options, *, fit: bool = False, size: int | None = None) -> tuple[Phase, ...]:
    """The recipe's phases in a run of so many epochs that begins with batches of that size, and ends with images of it.

    Each phase has at least one epoch; where there are fewer epochs than phases, the last phases are left out.
    fit: batches are as the recipe's, but never larger than the first.
    """
    rows, epochs, scale = [], options.epochs, options.batch_size / recipe.phases[0].batch_size
    for i, phase in enumerate(recipe.phases):
        start = max(round(phase.epoch * epochs / recipe.schedule[-1][0]), i)
        start = min(start, max(epochs - len(recipe.phases) + i, i))
        batch_size = min(phase.batch_size, options.batch_size) if fit else max(1, round(phase.batch_size * scale))
        rows.append(replace(phase, epoch=start, batch_size=batch_size, size=min(phase.size, size or phase.size)))
    *first, last = (phase for phase in rows if phase.epoch < epochs)
    return *first, replace(last, size=size or last.size)


def describe(options: Options, images: data.Data, world: World) -> dict[str, Any]:
    """What config.json holds.  Raises Failure for a model that cannot take these images."""
    # Radii of the attacks to report, in pixels; the second is that of `attacked_error_pct`.
    norm = "linf" if options.norm == "linf" else "l2"
    radii = LINF_RADII[recipe_of(options.dataset, images)] if norm == "linf" else [0.25, 0.5, 1.0]
    plan = Plan(options, len(images.train), world.size)
    set_precision(options)  # and the number of threads, which `provenance` tells
    config = {"format": FORMAT, "options": asdict(options), **runs.provenance(world)}
    config |= {"steps_per_epoch": plan.steps[0], "steps_total": plan.total, "channels": images.channels}
    config |= {"images_train": len(images.train), "images_test": len(images.test), "small": images.small}
    config |= {"classes": len(images.classes), "class_names": list(images.classes)}
    config |= {"attack_norm": norm, "attack_radii": radii, "attack_eps": radii[1], "omega_eps": radii[1:]}
    network, notes = models.from_config(config), []
    if options.init:
        notes = models.initialise(network, options.init, classes=config["classes"], new_head=options.new_head)
    if options.method == "fd" and options.h < 1e-3:
        notes.append(f"--h {options.h:g}: float32 loses digits of the finite difference, choose a larger one")
    if (options.amp or (options.recipe == "fast" and may_round(options))) and not has_bfloat16(world.device):
        notes.append("no bfloat16 known here: --amp is slow; --recipe fast takes float32, some three times as long")
    notes += try_out(network.to(world.device), options, images, world)
    return config | {"omega_method": "ascent", "notes": notes, "sources": models.sources_of(options.model)}


def try_out(network: nn.Module, options: Options, images: data.Data, world: World) -> list[str]:
    """Lines for the user on the network.  Raises Unusable unless it can be trained: one step of few images is tried."""
    own = images.at(size=options.phases[0].size, min_scale=options.phases[0].min_scale).train
    few = min(4, len(own), options.batch_size // world.size if options.statistics == "batch" else 4)
    x, labels = data.fetch(own, np.arange(few), world.device, problems=[])
    try:
        notes = [models.check_output(network.eval(), x, len(images.classes))]
        with models.one_line("a training step fails"):
            if odd := models.complaint(network.train()(x), len(x), len(images.classes)):
                raise models.Unusable(f"in training mode {odd}")
            if not any(weight.requires_grad for weight in network.parameters()):
                raise models.Unusable("it has no weights that can be trained (requires_grad is False)")
            gradreg.input_gradient(lambda z: cross_entropy(network(z), labels), x)
            Objective(network, options)(x, labels).objective(1.0).backward()
    except models.Unusable as error:
        raise models.Unusable(f"--model {options.model}: {error}") from None
    if options.activation != "relu" and (hidden := models.hidden_relus(network, x)):
        notes.append(f"--activation {options.activation}: {hidden} calls of relu as a function stay (write nn.ReLU())")
    return [note for note in notes if note]


def config_at(path: Path) -> dict[str, Any]:
    """What config.json says of a run; empty where there is none, or none that can be read."""
    with contextlib.suppress(OSError, ValueError):
        config = json.loads((path / "config.json").read_text())
        if isinstance(config, dict) and isinstance(config.get("options"), dict):
            return config
    return {}


def options_of(config: dict[str, Any]) -> Options:
    """The options of a run, from its config.  Raises Failure for another version's."""
    try:
        known = config["options"] | {"schedule": tuple(map(tuple, config["options"]["schedule"]))}
        known["phases"] = tuple(Phase(*(phase[f.name] for f in fields(Phase))) for phase in known["phases"])
        if config["format"] != FORMAT or (known["method"] == "fd" and known["amp"] and known["h"] < ROUGH):
            raise ValueError
        return Options(**known)
    except (KeyError, TypeError, ValueError):
        name = config.get("name")
        raise Failure(f"{name}: begun with another version of this project, which has to end it", 2) from None


def introduce(trainer: Trainer) -> None:
    """What is trained, how, on what, at which cost (a plain step has three units of work), in one line."""
    options, images, plan = trainer.options, trainer.images, trainer.plan
    own = {f.name: getattr(options, f.name) for f in fields(Options) if options.method in f.metadata.get("of", [])}
    how = [f"{k} {v:g}" for k, v in own.items() if not isinstance(v, bool | str) and (k, v) != ("penalty_share", 1)]
    how = [options.method, options.norm, *how, *(k for k, v in own.items() if v is True), *["amp"] * options.amp]
    weights, start = sum(p.numel() for p in trainer.network.parameters()), f" from {options.init}" * bool(options.init)
    sides = dict.fromkeys([images.short_side] if images.small else [phase.size for phase in plan.phases])
    cost = 1 + options.penalty_share * (PENALISED | {"at": 2 * options.attack_steps}).get(options.method, 0) / 3
    trainer.world.console.print(
        f"{trainer.run.path.name}: {', '.join(how)}; {options.model}, {weights:,} parameters{start}; {options.dataset},"
        f" {len(images.train):,} training and {len(images.test):,} test images, {len(images.classes)} classes,"
        f" {', '.join(map(str, sides))} pixels a side; {plan.total - trainer.step:,} steps of {options.batch_size}"
        f" images, {options.epochs} epochs from rate {options.lr:.3g}, each step at the cost of {cost:.3g} plain"
    )


def begin(given: dict[str, Any], *, root: Path, images: data.Data, world: World, name: str | None = None) -> Trainer:
    """Train a new run to its end, or go on with one that the same command began; in grey if the network needs that."""
    try:
        config = describe(resolve(given, images, world), images, world)
    except models.Unusable as unusable:
        if images.channels == 1 or not models.is_file(given.get("model", "")):
            raise
        images = load_images(given, channels=1)
        try:
            config = describe(resolve(given, images, world), images, world)
        except models.Unusable:
            raise unusable from None
    path = world.same(claim(root, name, config, world, MAY_CHANGE | ({"amp"} - given.keys())) if world.main else None)
    return work(path, {key: given[key] for key in MAY_CHANGE & given.keys()}, world, images)


def claim(root: Path, name: str | None, config: dict[str, Any], world: World, may_differ: Set[str]) -> Path:
    """A new run's directory, or that of the run this command began.  Raises Failure where anything else has `name`."""
    options = options_of(config)
    kind = NAMES.get(options.method, "-unsquared" * options.unsquared + "-{norm}-lam{lam:g}").format_map(vars(options))
    recipe, tuned = "-fast" * (options.recipe == "fast"), "-tuned" * bool(options.init)
    default = f"{Path(options.dataset).name}{recipe}-{options.method}{kind}{tuned}-seed{options.seed}"
    again = [p for p in root.glob("*") if p.name.startswith(default) and config_at(p).get("launch") == config["launch"]]
    for path in [root / name] if name else again * bool(world.restarts):
        if old := config_at(path):
            others = sorted(dict(vars(options_of(old)).items() ^ vars(options).items()).keys() - may_differ)
            if not others:
                world.console.print(f"{path} was begun with the same options: going on with it")
                return path
        if name and path.exists():
            found = f"other options ({', '.join(others)})" if old else "no run in it"
            advice = f"choose another name, or go on with --resume {path}"
            raise Failure(f"--name {name}: {path} exists, with {found}; {advice}", 2)
    return runs.new_directory(root, name, default, config)


def load_images(options: dict[str, Any], channels: int = 3) -> data.Data:
    """The images of a run.  Raises Failure."""
    how = {"subset": options.get("subset"), "split": options.get("split", 0.0), "channels": channels}
    return data.load(options["dataset"], options["data_dir"], **how)


def located(dataset: str, data_dir: str | Path | None) -> dict[str, str | None]:
    """The options dataset and data_dir with an absolute place in them, which holds from any working directory."""
    place = os.path.abspath(data.place(dataset, data_dir))
    return {"dataset": dataset, "data_dir": place} if dataset in data.NAMES else {"dataset": place, "data_dir": None}


def work(path: Path, changed: dict[str, Any], world: World, images: data.Data | None = None) -> Trainer:
    """Take a run to its end, from its newest whole checkpoint if it has one.  Raises Failure where it cannot be."""
    with runs.owned(path, world):
        state, warning = runs.Checkpoints(path, world).load() if any(path.glob("checkpoint*.pt")) else (None, None)
        config = state["config"] if state else config_at(path)
        options = replace(options_of(config), **changed)
        options = replace(options, **located(options.dataset, options.data_dir))
        images = images or load_images(asdict(options), channels=config["channels"])
        now, then = [len(images.train), len(images.test)], [config["images_train"], config["images_test"]]
        others = sorted(set(images.classes) ^ set(config.get("class_names", images.classes)))
        if others or now != then or len(images.classes) != config["classes"]:
            what = f"class {others[0]} is new or gone" if others else f"{now} training and test images, not {then}"
            raise Failure(f"{config['name']}: the data is not what it was: {what}; see --data-dir", 2)
        trainer = Trainer(path, config | {"options": asdict(options)}, images, world)
        for said in [*images.notes, *([] if state else config.get("notes", [])), *filter(None, [warning])]:
            trainer.run.warn(said)
        if state:
            trainer.restore(state)
        elif options.init:
            models.initialise(trainer.network, options.init, classes=config["classes"], new_head=options.new_head)
        if not state and config.get("sources") and world.main:
            runs.replace(path / models.SOURCE, models.source_of(options.model))
        if trainer.step == trainer.plan.total and trainer.evaluated and runs.state_of(path) == "finished":
            world.console.print(f"{path} is finished: nothing to resume")
            return trainer
        resumed = f"resumed at step {trainer.step}, {world.size} processes"
        trainer.run.event(*("resume", resumed) if state else ("start", config["command"]))
        trainer.run.make_latest()
        trainer.run.heartbeat(force=True)
        introduce(trainer)
        try:
            trainer.fit()
        except BaseException as error:
            if trainer.run.state == "running":
                with contextlib.suppress(OSError):  # a full disk, say, must not hide the error itself
                    trainer.run.end("failed", "error", runs.explain(error)[0])
            raise
    world.console.print(f"{path}: watch or look back with python tui.py {path}")
    return trainer


def compare(given: dict[str, Any], *, root: Path, images: data.Data, world: World) -> None:
    """Train an undefended and a penalised network, and print what the penalty buys."""
    shared = [f.name for f in fields(Options) if "none" in (f.metadata.get("of") or ["none"])]
    plain = {name: given[name] for name in shared if name in given} | {"method": "none"}
    trainers = [begin(options, root=root, images=images, world=world) for options in (plain, given)]
    norm, radii = trainers[0].config["attack_norm"], trainers[0].config["attack_radii"]
    table = Table("network", title=f"% error of {len(images.test)} test images, clean and under PGD ({norm}, 40 steps)")
    for heading in ("clean", *(f"eps {eps:.3g}" for eps in radii), "training"):
        table.add_column(heading, justify="right")
    parts = [data.fetch(images.test, np.arange(len(images.test))[world.rank :: world.size], world.device)]
    for trainer in trainers:
        with evaluating(trainer.network):
            balls = [{}, *({"norm": norm, "eps": eps, "steps": 40} for eps in radii)]
            errors = [losses_and_errors(trainer.network, parts, world, **ball)[1] for ball in balls]
        table.add_row(trainer.run.path.name, *(f"{error:.1f}" for error in errors), runs.duration(trainer.seconds))
    world.console.print(table)


@command_line
def main(**options: Any) -> None:
    """What `Command` says."""
    given = {name: value for name, value in options.items() if value is not None}
    if empty := [name for name, value in given.items() if value == ""]:  # of a shell's variable that is not set, say
        raise Failure(f"{flag(empty[0])} is empty: give it a value, or leave it out", 2)
    if "resume" in given and (extra := given.keys() - MAY_CHANGE - {"resume", "device"}):
        flags = ", ".join(sorted(map(flag, extra)))
        raise Failure(f"--resume takes the run's own options: leave out {flags}", 2)
    check_given(given)
    resume, device, name = (given.pop(key, None) for key in ("resume", "device", "name"))
    root, alone = Path(given.pop("runs", Command.runs)), "dataset" in given
    if name is not None:
        runs.check_name(name)
    world = World(device)
    if resume:
        path = Path(resume).resolve()  # runs/latest may point elsewhere tomorrow
        if not (list(path.glob("checkpoint*.pt")) or config_at(path)):
            raise Failure(f"--resume {resume}: no such run", 2)
        work(path, given, world)
        return
    if not alone and (name or given.get("method") in {"none", "noise"}):
        raise Failure("--name, --method none and noise are of one network: name its data set too, say digits", 2)
    given |= {k: models.absolute(given[k]) for k in ("model", "init") if given.get(k) not in {None, *models.MODELS}}
    run = Path(given["init"]).resolve() if "init" in given else None
    if run and (config := config_at(run)):  # it knows its network
        given["init"] = str(run)  # runs/latest will be the new run
        known = {key: config["options"][key] for key in ("model", "activation") if key in config["options"]}
        for line in models.changed_since(config, run) if "model" in known.keys() - given.keys() else ():
            world.console.print(f"warning: {line}")
        given = known | given
    given |= located(given.get("dataset", "digits"), given.get("data_dir"))
    (partial(begin, name=name) if alone else compare)(given, root=root, images=load_images(given), world=world)


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
