"""Section 4 and Appendix A: train a network with the paper's penalty, on one process or many.

    python train.py                             undefended and penalised networks on digits, and a table of both
    python train.py cifar10 --data-dir DIR      the paper's CIFAR-10 recipe with Algorithm 1
    python train.py cifar10 --method at         its baselines: none, at, free, noise
    torchrun --nproc_per_node 4 train.py imagenet --data-dir DIR
    python train.py --resume runs/latest        go on where a run stopped, or was stopped

What an option leaves open is a row of RECIPES.  A run lives in runs/<name>/, in the files that README.md
describes.  A run that was interrupted, or killed, and resumed ends with the weights, bit for bit, of one that was
not (on the CPU, with as many processes and threads).  The same command again, with the same --name, goes on too:
so do torchrun's restarts and a requeued job.

Exit codes: 0 finished, 1 failed, 2 bad usage, 3 diverged, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import copy
import json
import math
import signal
import sys
import time
from bisect import bisect_right
from collections.abc import Iterator
from itertools import accumulate, pairwise
from os import cpu_count
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
import typer
from rich.table import Table
from torch import Tensor, nn

import attacks
import bounds
import data
import models
from gradreg import (
    Penalised,
    cross_entropy,
    direction,
    dual_norm,
    exact_penalty,
    fd_penalty,
    input_gradient,
    jvp_penalty,
    uniform_ball,
)
from runs import (
    Failure,
    Run,
    Stop,
    World,
    duration,
    last_checkpoint,
    new_directory,
    progress_bar,
    provenance,
    reason_of,
    refuse_if_running,
    run_command,
    save_checkpoint,
    state_of,
)

# --- recipes ----------------------------------------------------------------------------------------------

# schedule: epoch, learning rate there, learning rate at the next row, linear in between; stretched to --epochs.
# phases: first epoch, image size, images a step over all processes, least area of a random crop, and whether the
# test images are shown in rectangles; stretched and scaled to --epochs and --batch-size.
# eps: radius of adversarial training.  radii: the attack sizes to report, in pixels, for each norm.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "cnn",
        "epochs": 40,
        "batch_size": 50,
        "weight_decay": 5e-4,
        "lam": 1.0,
        "h": 0.1,
        "eps": 0.1,
        "schedule": [(0, 0.05, 0.05), (12, 0.01, 0.01), (24, 0.002, 0.002), (32, 0.0004, 0.0004), (40, 0, 0)],
        "radii": {"l2": [0.25, 0.5, 1.0], "linf": [0.03, 0.06, 0.1]},
    },
    "cifar10": {  # Table 1 and 2; the authors' learning rates and augmentation
        "model": "resnext34",
        "epochs": 200,
        "batch_size": 128,
        "weight_decay": 5e-4,
        "lam": 0.1,
        "h": 0.01,
        "eps": 8 / 255,
        "schedule": [(0, 0.1, 0.1), (60, 0.02, 0.02), (120, 0.004, 0.004), (160, 0.0008, 0.0008), (200, 0, 0)],
        "radii": {"l2": [0.25, 0.5, 1.0], "linf": [2 / 255, 4 / 255, 8 / 255]},
    },
    "imagenet": {  # the authors' sizes, batches (of four GPUs) and learning rates; lam and h in their coordinates
        "model": "resnet50",
        "epochs": 29,
        "batch_size": 512,
        "weight_decay": 1e-4,
        "lam": 0.1,
        "h": 0.01,
        "eps": 4 / 255,
        "penalty_space": "normalized",
        "decay_biases": False,
        "phases": [(0, 128, 512, 0.08, False), (15, 224, 192, 0.087, False), (28, 288, 128, 0.5, True)],
        "schedule": [
            *[(0, 0.25, 0.5), (8, 0.5, 0.0625), (15, 0.1, 0.01), (25, 0.01, 0.001)],
            *[(28, 0.000625, 0.0000625), (29, 0, 0)],
        ],
        "radii": {"l2": [0.25, 0.5, 1.0], "linf": [1 / 255, 2 / 255, 4 / 255]},
    },
}
MOMENTUM = 0.9
LOG_EVERY = 10  # steps between two records
PROBE_IMAGES = 200  # test images attacked after each epoch, always the same
UNPENALISED = {"none", "noise", "at", "free"}  # methods that change the images, if anything, and not the loss
LARGE_ROUNDING = 5.0  # percent, of the difference quotient, that make a warning
UNREADABLE = 100  # images that a run may skip
PATIENCE = 5.0  # seconds, about, between two times that the processes ask each other whether to stop, at most


def learning_rate(schedule: list[tuple[float, float, float]], epoch: float) -> float:
    """The schedule's rate at `epoch`, in the schedule's own epochs."""
    for (start, first, last), (end, _, _) in pairwise(schedule):
        if start <= epoch < end:
            return first + (last - first) * (epoch - start) / (end - start)
    raise ValueError(f"epoch must be in [0, {schedule[-1][0]}), not {epoch}")


def stretch(phases: list[tuple], schedule: list[tuple], *, epochs: int, batch_size: int) -> list[dict[str, Any]]:
    """The phases of a run of `epochs` epochs that begins with batches of `batch_size`.

    Each phase has at least one epoch; where there are fewer epochs than phases, the last phases are left out.
    """
    rows, last = [], schedule[-1][0]
    for i, (first, size, batch, min_scale, rectangular) in enumerate(phases):
        start = min(max(round(first * epochs / last), i), max(epochs - len(phases) + i, i))
        scaled = max(1, round(batch * batch_size / phases[0][2]))
        row = {"epoch": start, "schedule_epoch": first, "batch_size": scaled, "size": size}
        rows.append(row | {"min_scale": min_scale, "rectangular": rectangular})
    return [row for row in rows if row["epoch"] < epochs]


class Plan:
    """Which epoch, phase and learning rate a step has: functions of the step alone, so that any step can be the first.

    With m replays (the free baseline) each batch is m steps.
    """

    def __init__(self, options: dict[str, Any], images: int):
        self.phases, self.schedule, self.epochs = options["phases"], options["schedule"], options["epochs"]
        self.replays = options["replays"] if options["method"] == "free" else 1
        self.steps = [images // self.phase(e)["batch_size"] * self.replays for e in range(self.epochs)]
        self.starts = [0, *accumulate(self.steps)]
        self.total = self.starts[-1]

    def phase(self, epoch: int) -> dict[str, Any]:
        return [phase for phase in self.phases if phase["epoch"] <= epoch][-1]

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
        epoch = self.epoch(step)
        rows = [(phase["epoch"], phase["schedule_epoch"]) for phase in self.phases] + [
            (self.epochs, self.schedule[-1][0])
        ]
        for (start, from_), (end, to) in pairwise(rows):
            if start <= epoch < end:
                return learning_rate(self.schedule, from_ + (epoch - start) * (to - from_) / (end - start))
        raise ValueError(f"step must be in [0, {self.total}), not {step}")


# --- the objective ----------------------------------------------------------------------------------------


class Objective(nn.Module):
    """images, labels -> the losses and penalties of eq. (8).

    One module computes the whole objective, with all its passes, so that DistributedDataParallel sees one forward
    and one backward a step: then the gradients it averages are those of eq. (8).

    amp: bfloat16 where no digits cancel, that is, in the direction of the penalty, and in everything where there
    is no penalty.  Losses that a penalty is made of are computed in float32.
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        method: str,
        norm: str,
        h: float,
        central: bool = False,
        penalty_space: str = "pixel",
        amp: bool = False,
    ):
        super().__init__()
        self.network, self.method, self.norm, self.h, self.central = network, method, norm, h, central
        self.penalty_space, self.amp = penalty_space, amp

    def forward(self, images: Tensor, labels: Tensor) -> Penalised:
        x, network = penalty_coordinates(self.network, images, self.penalty_space)

        def loss_fn(z: Tensor) -> Tensor:
            return cross_entropy(network(z), labels)

        def rounded(z: Tensor) -> Tensor:
            with torch.autocast(z.device.type, torch.bfloat16):
                logits = network(z)
            return cross_entropy(logits.float(), labels)

        scout = rounded if self.amp else None
        if self.method == "fd":
            return fd_penalty(loss_fn, x, norm=self.norm, h=self.h, central=self.central, scout=scout)
        if self.method == "exact":
            return exact_penalty(loss_fn, x, norm=self.norm)
        if self.method == "jvp":
            return jvp_penalty(loss_fn, x, norm=self.norm, scout=scout)
        losses = (scout or loss_fn)(x)
        return Penalised(losses, torch.zeros_like(losses), None)


def penalty_coordinates(network: nn.Module, images: Tensor, space: str) -> tuple[Tensor, nn.Module]:
    """What the penalty calls x, and the network as a function of it: pixels, or the output of the first layer."""
    if space == "pixel":
        return images, network
    first, rest = models.coordinates(network)
    return first(images), rest


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context: the network in evaluation mode, and back in training mode afterwards."""
    network.eval()
    try:
        yield
    finally:
        network.train()


# --- the baselines that the paper compares with -----------------------------------------------------------


def random_starts(images: Tensor, *, norm: str, eps: float, generator: torch.Generator, world: World) -> Tensor:
    """Points drawn uniformly from the balls around this process's images; the generator draws for all processes."""
    everyones = images.expand(world.size, *images.shape).flatten(0, 1)
    drawn = uniform_ball(everyones, norm, generator).unflatten(0, (world.size, -1))
    return images + eps * drawn[world.rank]


def adversarial(network: nn.Module, images: Tensor, labels: Tensor, starts: Tensor, options: dict[str, Any]) -> Tensor:
    """Images for adversarial training (Madry et al. 2018): PGD on the loss, from `starts`, kept in [0, 1].

    The network is in evaluation mode meanwhile, so that the attack leaves the running statistics alone.  The
    step is eps/4 for the seven steps of the paper: 2/255 for an eps of 8/255, as in Madry et al.
    """
    how = {"norm": options["norm"], "eps": options["eps"], "steps": options["attack_steps"]}
    how["step_size"] = 1.75 * options["eps"] / options["attack_steps"]
    with evaluating(network), torch.autocast(images.device.type, torch.bfloat16, enabled=options["amp"]):
        return attacks.pgd(network, images, labels, loss=cross_entropy, start=starts, **how)


class Free:
    """Adversarial training "for free" (Shafahi et al. 2019): each backward pass updates weights and perturbation.

    The perturbation (one for each place in the batch) outlives the batch.  Its step is eps, as in the paper.
    """

    def __init__(self, eps: float):
        self.eps, self.delta = eps, torch.zeros(0)

    def inputs(self, images: Tensor) -> Tensor:
        """The perturbed images, a leaf that collects its gradient; the perturbation is 0 after a change of shape."""
        if self.delta.shape != images.shape:
            self.delta = torch.zeros_like(images)
        self.delta = self.delta.to(images.device)
        self.moved = images + self.delta
        self.leaf = self.moved.clamp(0, 1).requires_grad_()
        return self.leaf

    def update(self) -> None:
        """One step up the loss; pixels that lie beyond [0, 1] have gradient 0, and stay."""
        inside = self.moved == self.leaf
        self.delta = (self.delta + self.eps * inside * self.leaf.grad.sign()).clamp(-self.eps, self.eps)


# --- training ---------------------------------------------------------------------------------------------


class Meter:
    """Sums over the images since the last record, kept on the device, so that no step waits for them."""

    def __init__(self, norm: str, lam: float, device: torch.device):
        self.norm, self.lam, self.device, self.elapsed = norm, lam, device, 0.0
        self.clear()

    def clear(self) -> None:
        self.images, self.since = 0, time.perf_counter()
        self.sums = torch.zeros(6, dtype=torch.float64, device=self.device)
        self.largest = torch.zeros(1, dtype=torch.float64, device=self.device)

    @torch.no_grad()
    def add(self, out: Penalised) -> None:
        self.images += len(out.losses)
        self.sums[0] += out.losses.sum()
        self.sums[1] += self.lam / 2 * out.penalties.sum()
        if out.grad is not None:
            self.add_gradient(out.grad)
            slopes = (out.grad * direction(out.grad, self.norm)).flatten(1).sum(1)
            self.sums[4] += (out.penalties.sqrt() - slopes).abs().sum()
            self.sums[5] += slopes.sum()

    def add_gradient(self, grad: Tensor) -> None:
        norms = dual_norm(grad, self.norm)
        self.sums[2] += norms.sum()
        self.sums[3] += len(norms)
        self.largest = torch.maximum(self.largest, norms.max())

    def read(self, world: World, *, differences: bool) -> dict[str, Any]:
        """The fields of a "step" record, over all processes; clears the meter."""
        loss, penalty, norm, norms, error, slope = world.sum(self.sums)
        (largest,) = world.max(self.largest)
        images, self.elapsed = self.images * world.size, time.perf_counter() - self.since
        self.clear()
        return {
            "loss": loss / images,
            "penalty": penalty / images,
            "grad_norm_mean": norm / norms,
            "grad_norm_max": largest,
            "fd_error_pct": 100 * error / slope if differences and slope else None,
            "images_per_s": round(images / self.elapsed, 1),
        }


class Trainer:
    """One run, from its config to its end: Algorithm 1, and around it what a long run needs."""

    def __init__(self, path: Path, config: dict[str, Any], images: data.Data, world: World):
        self.config, self.options, self.world, self.images = config, config["options"], world, images
        self.plan = Plan(self.options, len(images.train))
        self.run, self.stop = Run(path, world), Stop(world)
        set_precision(self.options)
        torch.manual_seed(self.options["seed"])
        self.network = models.from_config(config).to(world.device).train()
        self.layout = torch.channels_last if self.options["channels_last"] else torch.contiguous_format
        self.network.to(memory_format=self.layout)
        self.optimizer = torch.optim.SGD(decayed(self.network, self.options), lr=0.0, momentum=MOMENTUM)
        self.meter = Meter(self.options["norm"], self.options["lam"], world.device)
        self.free = Free(self.options["eps"]) if self.options["method"] == "free" else None
        self.step, self.seconds, self.evaluated = 0, 0.0, True
        self.fields: dict[str, Any] = {}  # of the last "step" record
        self.phase, self.ask_every = None, 1
        self.unreadable: list[str] = []  # this process's, not yet told
        self.skipped: set[str] = set()  # of all processes

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.  Raises Failure where it does not fit."""
        try:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step, self.seconds = state["step"], state["seconds"]
            self.evaluated, self.fields = state["evaluated"], state["fields"]
            if self.free:
                self.free.delta = state["delta"].tensor_split(self.world.size)[self.world.rank]
        except (KeyError, RuntimeError, ValueError, TypeError, AttributeError) as error:
            raise Failure(f"{self.run.path}: the checkpoint does not fit its run ({type(error).__name__})", 2) from None
        self.run.step, self.run.epoch = self.step, self.plan.epoch(self.step)

    def save(self) -> None:
        """Write a checkpoint: the main process does."""
        state = {
            "config": self.config,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
            "evaluated": self.evaluated,
            "fields": self.fields,
        }
        if self.free:
            state["delta"] = self.world.join(self.free.delta)
        if self.world.main:
            save_checkpoint(self.run.path, state)
            self.run.event("checkpoint", f"checkpoint at step {self.step}")
        self.saved = time.monotonic()
        self.meter.clear()

    def fit(self) -> None:
        """Train to the end.  Raises Failure when a signal asked to stop, or when the loss is not finite."""
        self.run.make_latest()
        self.run.heartbeat(force=True)
        self.objective = self._objective()
        self.saved = time.monotonic()
        if self.step == 0:
            self.save()  # so that there is always something to resume
        with self.stop, progress_bar(self.world.console, self.run.path.name, self.plan.total) as self.show:
            if not self.evaluated:
                self._enter_phase(self.plan.locate(self.step - 1)[0])
                self._end_of_epoch()
            while self.step < self.plan.total:
                self._epoch()
                self._end_of_epoch()
        self.run.end("finished", "finish", f"finished, {duration(self.seconds)} of training")

    def _objective(self) -> nn.Module:
        if self.options["compile"]:
            from torch._functorch import config  # where torch's own error message sends one

            config.donated_buffer = False  # the penalty goes twice through the graph of l(x)
            models.coordinates(self.network)[1].compile()
        names = "method", "norm", "h", "central", "penalty_space", "amp"
        module = Objective(self.network, **{name: self.options[name] for name in names})
        return nn.parallel.DistributedDataParallel(module) if self.world.size > 1 else module

    def _enter_phase(self, epoch: int) -> None:
        """Take up the images in the size of an epoch's phase."""
        phase = self.plan.phase(epoch)
        if phase == self.phase:
            return
        self.phase = phase
        images = self.images.at(**{name: phase[name] for name in ("size", "min_scale", "rectangular")})
        self.train_images, self.test_images = images.train.to(self.world.device), images.test.to(self.world.device)
        if len(self.plan.phases) > 1:
            what = f"epoch {epoch}: {phase['size']} pixels, {phase['batch_size']} images a step"
            self.run.event("phase", what)
            self.world.console.print(what)

    @property
    def at_once(self) -> int:
        """Images that a forward and a backward pass of a training step hold in memory here."""
        return self.phase["batch_size"] // (self.world.size * self.options["accumulate"])

    def _epoch(self) -> None:
        """The rest of the epoch that the step lies in."""
        epoch, first = self.plan.locate(self.step)
        self._enter_phase(epoch)
        batches = data.training_batches(
            self.train_images,
            batch_size=self.phase["batch_size"],
            seed=self.options["seed"],
            epoch=epoch,
            first=first // self.plan.replays,
            device=self.world.device,
            rank=self.world.rank,
            processes=self.world.size,
            workers=self.options["workers"],
            problems=self.unreadable,
        )
        self.meter.clear()
        with contextlib.closing(batches):  # whatever happens, its worker processes end
            self._steps(epoch, batches)

    def _steps(self, epoch: int, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for images, labels in batches:
            for _ in range(self.plan.replays - self.plan.locate(self.step)[1] % self.plan.replays):
                self._update(images.contiguous(memory_format=self.layout), labels)
                self._after_step(images, labels, last=self.step == self.plan.starts[epoch + 1])

    def _update(self, images: Tensor, labels: Tensor) -> None:
        """One step of Algorithm 1, or of a baseline; the images in as many parts as --accumulate says."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate = self.plan.rate(self.step)
        if self.options["method"] == "at":
            self.world.share_buffers(self.network)  # which its attack sees: as after a resume, the main one's
        inputs = self._inputs(images, labels)
        parts = list(zip(*(whole.chunk(self.options["accumulate"]) for whole in (inputs, labels)), strict=True))
        self.optimizer.zero_grad(set_to_none=True)
        for i, part in enumerate(parts):
            with contextlib.nullcontext() if i + 1 == len(parts) or self.world.size == 1 else self.objective.no_sync():
                out = self.objective(*part)
                (out.objective(self.options["lam"]) / len(parts)).backward()
            self.meter.add(out)
        self.optimizer.step()
        if self.free:
            self.free.update()
        self.step += 1

    def _inputs(self, images: Tensor, labels: Tensor) -> Tensor:
        """What the network is trained on: the images, or what a baseline makes of them."""
        if self.options["method"] == "noise":
            shape = self.world.size, *images.shape
            noise = torch.randn(shape, generator=self._generator(), device=images.device)[self.world.rank]
            return images + self.options["sigma"] * noise
        if self.options["method"] == "at":
            ball = {"norm": self.options["norm"], "eps": self.options["eps"]}
            starts = random_starts(images, **ball, generator=self._generator(), world=self.world)
            return adversarial(self.network, images, labels, starts, self.options)
        return self.free.inputs(images) if self.free else images

    def _generator(self) -> torch.Generator:
        """The same in all processes, and a pure function of (seed, step): each process takes its part of a draw."""
        (bits,) = data.uniforms(self.options["seed"], self.step, np.zeros(1), 1)[0]
        return torch.Generator(self.world.device).manual_seed(int(bits * 2**53))

    def _after_step(self, images: Tensor, labels: Tensor, *, last: bool) -> None:
        """What follows a step: a heartbeat; every few steps a record, and the question whether to go on."""
        self.run.step, self.run.epoch = self.step, self.plan.epoch(self.step)
        self.run.heartbeat()
        self.show(self.step)
        record = last or self.step % LOG_EVERY == 0
        if record:
            self._log(images, labels)
        if not last and (record or self.step % self.ask_every == 0):
            self._ask(images, labels, recorded=record)

    def _log(self, images: Tensor, labels: Tensor) -> None:
        """A "step" record.  Raises Failure when the loss is not finite."""
        if self.options["method"] in UNPENALISED:  # no step has computed an input gradient: look at a few images
            with evaluating(self.network):
                _, grad = input_gradient(lambda z: cross_entropy(self.network(z), labels[:32]), images[:32])
            self.meter.add_gradient(grad)
        steps = self.meter.images // len(images)
        self.fields = self.meter.read(self.world, differences=self.options["method"] == "fd")
        self.seconds += self.meter.elapsed
        self.run.record("step", **self.fields, lr=self.rate)
        if not math.isfinite(self.fields["loss"] + self.fields["penalty"]):
            advice = f"{self.run.path} keeps the checkpoint from before; try a smaller --lr or --lam"
            raise Failure(f"diverged: the loss is not finite at step {self.step}; {advice}", 3)
        (slowest,) = self.world.max(torch.tensor([self.meter.elapsed / max(steps, 1)]))
        self.ask_every = max(1, min(LOG_EVERY, int(PATIENCE / slowest)))

    def _ask(self, images: Tensor | None = None, labels: Tensor | None = None, *, recorded: bool = True) -> None:
        """All processes together: name unreadable images, stop if any was told to, or save if that is due."""
        due = self.world.main and recorded and time.monotonic() - self.saved > 60 * self.options["checkpoint_minutes"]
        signum, due = self.world.max(torch.tensor([self.stop.signal, due]))
        self._name_unreadable()
        if signum:
            if not recorded:
                self._log(images, labels)
            self._stop(int(signum))
        if due:
            self.save()

    def _stop(self, signum: int) -> None:
        """Save, say so, and raise Failure."""
        self.save()
        what = f"stopped by {signal.Signals(signum).name} at step {self.step}"
        self.run.end("interrupted", "interrupt", what)
        raise Failure(f"{what}; go on with: python train.py --resume {self.run.path}", 128 + signum)

    def _name_unreadable(self) -> None:
        """Name each image that was skipped once.  Raises Failure where there are too many."""
        if self.world.max(torch.tensor([len(self.unreadable)])) == [0]:
            return
        found = {message for part in self.world.gather(self.unreadable) for message in part}
        self.unreadable.clear()
        for message in sorted(found - self.skipped):
            self.run.event("warning", f"skipped: {message}")
            self.world.console.print(f"warning: skipped: {message}")
        self.skipped |= found
        if len(self.skipped) > UNREADABLE:
            self.save()
            message = f"more than {UNREADABLE} images cannot be read; {self.run.path}/metrics.jsonl names them"
            raise Failure(f"{message}; repair them, then: python train.py --resume {self.run.path}", 1)

    def _end_of_epoch(self) -> None:
        """Evaluate, record, print, save; then stop if told to."""
        self.evaluated = False
        self._ask()  # a long evaluation begins with a checkpoint, where one is due
        self.run.phase = "eval"
        self.run.heartbeat(force=True)
        self.world.share_buffers(self.network)
        with evaluating(self.network):
            fields = evaluate(self)
        if fields is None:
            self._ask()
        self._name_unreadable()
        self.evaluated = True
        self.run.record("epoch", **fields, seconds=round(self.seconds, 3))
        self.run.phase = "train"
        self._report(fields)
        self.save()
        if self.step < self.plan.total:
            self._ask()

    def _report(self, fields: dict[str, Any]) -> None:
        """The epoch in a line, and a warning where the difference quotient has lost its digits."""
        top5 = f"  top-5 error {fields['top5_error_pct']:.2f} %" if "top5_error_pct" in fields else ""
        self.world.console.print(
            f"epoch {self.plan.locate(self.step)[0]}/{self.options['epochs']}  loss {self.fields['loss']:.4f}"
            f"  penalty {self.fields['penalty']:.4f}  gradient {self.fields['grad_norm_mean']:.3f}"
            f"  error {fields['clean_error_pct']:.2f} %{top5}  attacked {fields['attacked_error_pct']:.1f} %"
            f"  {self.fields['images_per_s']:,.0f} images/s"
        )
        rounding = fields.get("fd_rounding_pct")
        if rounding is not None and rounding > LARGE_ROUNDING:
            warning = f"rounding is {rounding:.0f} % of the finite difference: choose a larger --h"
            self.run.event("warning", warning)
            self.world.console.print(f"warning: {warning}")


def decayed(network: nn.Module, options: dict[str, Any]) -> list[dict[str, Any]]:
    """What the optimizer updates; biases apart where the recipe does not decay them."""
    weights, biases = [], []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            apart = name.endswith("bias") and not options["decay_biases"]
            (biases if apart else weights).append(parameter)
    groups = [{"params": weights, "weight_decay": options["weight_decay"]}]
    return groups + [{"params": biases, "weight_decay": 0.0}] * bool(biases)


def set_precision(options: dict[str, Any]) -> None:
    """TF32 stays out of a difference quotient with a small step, which cancels the digits that TF32 keeps."""
    allowed = options["method"] != "fd" or options["h"] * pixels(options) >= 0.1
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    if options["model"] == "cnn":
        torch.set_num_threads(1)  # too small to share: on a busy machine threads that wait for each other crawl


# --- evaluation after each epoch --------------------------------------------------------------------------


def evaluate(trainer: Trainer) -> dict[str, Any] | None:
    """The fields of an "epoch" record: the whole test set clean, and the same few images of it attacked.

    None, in all processes, where one of them was told to stop meanwhile.
    """
    network, world, test = trainer.network, trainer.world, trainer.test_images
    top5 = trainer.config["classes"] > 10
    sums = torch.zeros(5, dtype=torch.float64, device=world.device)
    share = {"rank": world.rank, "processes": world.size, "workers": trainer.options["workers"]}
    batches = data.evaluation_batches(
        test, batch_size=min(256, 4 * trainer.at_once), device=world.device, problems=trainer.unreadable, **share
    )
    for images, labels in batches:
        if trainer.stop.signal:
            sums[4] += 1
            break
        with torch.no_grad():
            logits = network(images)
            sums[0] += cross_entropy(logits, labels).sum()
            sums[1] += (logits.argmax(1) != labels).sum()
            sums[2] += (logits.topk(5).indices != labels[:, None]).all(1).sum() if top5 else 0
            sums[3] += len(labels)
        trainer.run.heartbeat()
    loss, wrong, wrong5, count, stopped = world.sum(sums)
    if stopped:
        return None
    if not count:
        raise Failure("none of the test images can be read", 1)
    fields = {"test_loss": loss / count, "clean_error_pct": 100 * wrong / count}
    fields |= {"top5_error_pct": 100 * wrong5 / count} if top5 else {}
    return fields | probe(trainer)


def probe(trainer: Trainer) -> dict[str, Any]:
    """What PGD, the margin loss and float64 say of the first PROBE_IMAGES test images in a fixed random order."""
    network, world, test, config = trainer.network, trainer.world, trainer.test_images, trainer.config
    options, norm = config["options"], config["attack_norm"]
    mine = data.order(len(test), seed=0, epoch=2)[:PROBE_IMAGES][world.rank :: world.size]
    images, labels = data.fetch(test, mine, world.device, problems=trainer.unreadable)
    few = trainer.at_once
    error = attacked_error(network, images, labels, norm, config["attack_eps"], 10, world, at_once=few)
    parts = list(zip(images.split(few), labels.split(few), strict=True))
    looked = [bounds.omega_statistics(network, *part, norm=norm, eps=config["omega_eps"]) for part in parts]
    highest = torch.tensor([[*part.omega, part.grad_norm_max] for part in looked]).amax(0)
    means, counts = torch.tensor(
        [(some.grad_norm_mean, len(part[1])) for some, part in zip(looked, parts, strict=True)]
    ).T
    total, count = world.sum(torch.stack([means @ counts, counts.sum()]))
    fields = {"attacked_error_pct": error, "margin_grad_norm_mean": total / count}
    *fields["omega"], fields["margin_grad_norm_max"] = world.max(highest)
    if options["method"] == "fd":
        some = min(32, max(1, few // 4))  # in float64 they need twice the memory, and more
        fields["fd_rounding_pct"] = fd_rounding(network, images[:some], labels[:some], options)
    return fields


def attacked_error(
    network: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, steps: int, world: World, *, at_once: int
) -> float:
    """Percent of these images, over all processes, that plain PGD moves to another class within eps."""
    wrong = torch.zeros((), dtype=torch.float64, device=images.device)
    for some, their in zip(images.split(at_once), labels.split(at_once), strict=True):
        generator = torch.Generator(images.device).manual_seed(0)
        moved = attacks.pgd(network, some, their, norm=norm, eps=eps, steps=steps, generator=generator)
        with torch.no_grad():
            wrong += (network(moved).argmax(1) != their).sum()
    errors, count = world.sum(torch.stack([wrong, wrong.new_tensor(len(images))]))
    return 100 * errors / count


def fd_rounding(network: nn.Module, images: Tensor, labels: Tensor, options: dict[str, Any]) -> float | None:
    """How far the difference quotient is from itself in float64, in percent: what cancellation costs."""

    def slopes(network: nn.Module, images: Tensor) -> Tensor:
        x, network = penalty_coordinates(network, images, options["penalty_space"])
        how = {name: options[name] for name in ("norm", "h", "central")}
        return fd_penalty(lambda z: cross_entropy(network(z), labels), x, **how, squared=False).penalties.detach()

    exact = slopes(copy.deepcopy(network).double(), images.double())
    total = exact.sum().item()
    return 100 * (slopes(network, images) - exact).abs().sum().item() / total if total else None


# --- a run from its options -------------------------------------------------------------------------------


def recipe_of(dataset: str, images: data.Data) -> dict[str, Any]:
    """A data set's own recipe; for an image folder that of the data set whose images it resembles."""
    return RECIPES.get(dataset) or RECIPES["cifar10" if images.small else "imagenet"]


def resolve(given: dict[str, Any], images: data.Data, world: World) -> dict[str, Any]:
    """All options of a run: those given, and the recipe's for the rest.  Raises Failure for what cannot work."""
    recipe = recipe_of(given["dataset"], images)
    options = {"decay_biases": True} | {name: v for name, v in recipe.items() if name != "radii"} | given
    options.setdefault("norm", "linf" if options["method"] in {"at", "free"} else "l2")
    if options["method"] == "free" and "epochs" not in given:
        options["epochs"] = math.ceil(options["epochs"] / max(1, options["replays"]))  # as many steps as the others
    options |= coordinates_of(given, recipe, options["model"])
    first_rate = options["schedule"][0][1]
    scale = options.setdefault("lr", first_rate) / first_rate
    options["schedule"] = [[epoch, start * scale, end * scale] for epoch, start, end in options["schedule"]]
    if options["method"] in UNPENALISED:
        options["lam"] = 0.0
    check_numbers(options)
    phases = options.get("phases", [(0, 224, recipe["batch_size"], 0.08, False)])
    how = {"epochs": options["epochs"], "batch_size": options["batch_size"]}
    options["phases"] = stretch(phases, options["schedule"], **how)
    if options["batch_size"] > len(images.train):
        raise Failure(f"--batch-size {options['batch_size']}: there are only {len(images.train)} training images", 2)
    if len(images.test) < world.size:
        raise Failure(f"only {len(images.test)} test images for {world.size} processes", 2)
    check_share(options, world)
    return options


def coordinates_of(given: dict[str, Any], recipe: dict[str, Any], model: str) -> dict[str, Any]:
    """penalty_space, lam and h: the recipe's, translated where its coordinates are not those of the run.

    With x = (pixels - mean) / std, gradients are std times as long in x as in pixels: the same penalty has
    std^2 lam in pixels, and the same step std h.
    """
    taken = recipe.get("penalty_space", "pixel")
    normalized = model in models.NORMALIZED
    space = given.get("penalty_space", taken if normalized else "pixel")
    if space == "normalized" and not normalized:
        raise Failure(f"--penalty-space normalized: model {model} takes pixels as they are; leave it out", 2)
    std = 1.0 if space == taken else models.MEAN_STD if taken == "normalized" else 1 / models.MEAN_STD
    own = {"lam": recipe["lam"] * std**2, "h": recipe["h"] * std}
    return {"penalty_space": space} | {name: given.get(name, value) for name, value in own.items()}


def pixels(options: dict[str, Any]) -> float:
    """How many pixels (of range 0 to 1) a unit of the penalty's coordinates is."""
    return models.MEAN_STD if options["penalty_space"] == "normalized" else 1.0


def check_numbers(options: dict[str, Any]) -> None:
    """Raise Failure for an option that is not finite, too small, or means nothing with this method."""
    positive = "h", "lr", "epochs", "batch_size", "checkpoint_minutes", "sigma", "eps", "attack_steps", "replays"
    for name in (*positive, "accumulate"):
        if not (math.isfinite(options[name]) and options[name] > 0):
            raise Failure(f"--{name.replace('_', '-')} must be positive, not {options[name]}", 2)
    if not (math.isfinite(options["lam"]) and options["lam"] >= 0):
        raise Failure(f"--lam must be 0 or more, not {options['lam']}", 2)
    method, norm = options["method"], options["norm"]
    if (method == "free" and norm != "linf") or (method == "at" and norm == "l1"):
        raise Failure(f"--norm {norm}: --method {method} is for {'linf' if method == 'free' else 'l2 and linf'}", 2)
    if options["compile"] and method in {"exact", "jvp"}:
        raise Failure(f"--compile: what torch compiles has no second derivative, which --method {method} needs", 2)


def check_share(options: dict[str, Any], world: World) -> None:
    """Raise Failure where the batch of a phase cannot be shared evenly by the processes and their parts."""
    for phase in options["phases"]:
        batch, parts = phase["batch_size"], options["accumulate"]
        if batch % (world.size * parts):
            of = f" (at {phase['size']} pixels)" if len(options["phases"]) > 1 else ""
            by = f"{world.size} processes" + f" in {parts} parts each" * (parts > 1)
            raise Failure(f"--batch-size: {batch} images a step{of} cannot be shared evenly by {by}", 2)


def describe(options: dict[str, Any], images: data.Data, world: World) -> dict[str, Any]:
    """What config.json holds.  Raises Failure for a model that cannot take these images."""
    radii = recipe_of(options["dataset"], images)["radii"]
    norm = options["norm"] if options["norm"] in radii else "l2"
    plan = Plan(options, len(images.train))
    config = {
        "format": FORMAT,
        "options": options,
        **provenance(world),
        "steps_per_epoch": plan.steps[0],
        "steps_total": plan.total,
        "images_train": len(images.train),
        "images_test": len(images.test),
        "classes": len(images.classes),
        "channels": images.channels,
        "attack_norm": norm,
        "attack_radii": radii[norm],
        "attack_eps": radii[norm][1],
        "omega_eps": radii[norm][1:],
        "omega_method": "ascent",
    }
    try:
        with torch.device("meta"):
            models.from_config(config)
    except ValueError as error:
        raise Failure(f"--model {options['model']}: {error}", 2) from None
    return config


def name_of(options: dict[str, Any]) -> str:
    """What a run is called when nobody names it."""
    method, norm = options["method"], options["norm"]
    kinds = {"none": [], "noise": [f"sigma{options['sigma']:g}"], "at": [norm, f"eps{options['eps']:.3g}"]}
    kinds["free"] = [f"m{options['replays']}", f"eps{options['eps']:.3g}"]
    kind = kinds.get(method, [norm, f"lam{options['lam']:g}"])
    return "-".join([Path(options["dataset"]).name, method, *kind, f"seed{options['seed']}"])


def start_run(given: dict[str, Any], root: Path, name: str | None, images: data.Data, world: World) -> Trainer:
    """Train a new run to its end; or go on with one that the same command began."""
    options = resolve(given, images, world)
    config = describe(options, images, world)
    begun = world.same(begun_by(root, name, config, world) if world.main else None)
    if begun and list(begun.glob("checkpoint*.pt")):
        world.console.print(f"{begun} was begun with the same options: going on with it")
        return resume_run(begun, {key: value for key, value in given.items() if key in MAY_CHANGE}, world)
    path = begun or world.same(new_directory(root, name, name_of(options), config) if world.main else None)
    trainer = Trainer(path, config | {"name": path.name}, images, world)
    trainer.run.event("start", config["command"])
    fit_and_tell(trainer)
    return trainer


def begun_by(root: Path, name: str | None, config: dict[str, Any], world: World) -> Path | None:
    """The run that this command began before: of this name, or by this torchrun before it restarted.

    Raises Failure where `name` is taken by a run with other options, or by anything else.
    """
    if name and (root / name).exists():
        differing = differences(root / name, config)
        if differing:
            advice = f"choose another name, or go on with --resume {root / name}"
            raise Failure(f"--name {name}: {root / name} exists, with {differing}; {advice}", 2)
        refuse_if_running(root / name)
        return root / name
    if name is None and world.restarts:
        for path in root.glob(f"{name_of(config['options'])}*/config.json"):
            if not differences(path.parent, config) and json.loads(path.read_text())["launch"] == config["launch"]:
                return path.parent
    return None


def differences(path: Path, config: dict[str, Any]) -> str | None:
    """Which options of the run at `path` are not those of this config, as text; None where all are the same."""
    try:
        theirs = json.loads((path / "config.json").read_text())["options"]
    except (OSError, ValueError, KeyError, TypeError):
        return "no run in it"
    ours = json.loads(json.dumps(config["options"]))
    names = sorted(key for key in (ours.keys() | theirs.keys()) - MAY_CHANGE if ours.get(key) != theirs.get(key))
    return f"other options ({', '.join(names)})" if names else None


def resume_run(path: Path, changed: dict[str, Any], world: World) -> Trainer:
    """Take a run to its end from its newest whole checkpoint."""
    if not path.is_dir():
        raise Failure(f"--resume {path}: no such run", 2)
    path = path.resolve()  # runs/latest may point elsewhere tomorrow
    if world.main:  # the others may come here when it is already at work
        refuse_if_running(path)
    state, warning = last_checkpoint(path)
    config = state["config"]
    if config.get("format") != FORMAT:
        raise Failure(f"--resume {path}: begun with another version of this project, which has to finish it", 2)
    config["options"] |= changed
    check_share(config["options"], world)
    images = load_images(config["options"])
    if (len(images.train), len(images.classes)) != (config["images_train"], config["classes"]):
        now, then = f"{len(images.train)} training images", config["images_train"]
        raise Failure(f"--resume {path}: the data is not what it was: {now}, not {then}; see --data-dir", 2)
    trainer = Trainer(path, config, images, world)
    trainer.restore(state)
    if warning:
        world.console.print(f"warning: {warning}")
        trainer.run.event("warning", warning)
    if trainer.step == trainer.plan.total and trainer.evaluated:
        world.console.print(f"{path} is finished: nothing to resume")
        if state_of(path) != "finished":  # killed after the last checkpoint
            trainer.run.end("finished", "finish", f"finished, {duration(trainer.seconds)} of training")
        return trainer
    trainer.run.event("resume", f"resumed at step {trainer.step}, {world.size} processes")
    fit_and_tell(trainer)
    return trainer


def fit_and_tell(trainer: Trainer) -> None:
    """trainer.fit(); what stops it is written to status.json and to the log, then raised."""
    try:
        trainer.fit()
    except BaseException as error:
        if trainer.run.state == "running":
            reason = reason_of(error)
            with contextlib.suppress(OSError):  # a full disk, say, must not hide the error itself
                trainer.run.end("failed", "error", reason, error=reason)
        raise
    trainer.world.console.print(f"{trainer.run.path}: watch or look back with python tui.py {trainer.run.path}")


def load_images(options: dict[str, Any]) -> data.Data:
    return data.load(options["dataset"], options["data_dir"], subset=options["subset"])


def compare(given: dict[str, Any], root: Path, images: data.Data, world: World) -> None:
    """Train an undefended and a penalised network, and print what the penalty buys."""
    methods = "none", given["method"]
    trainers = [start_run(given | {"method": method}, root, None, images, world) for method in methods]
    norm, radii = trainers[0].config["attack_norm"], trainers[0].config["attack_radii"]
    table = Table(title=f"% error of {len(images.test)} test images, clean and under PGD ({norm}, 40 steps)")
    table.add_column("network")
    for heading in ("clean", *(f"eps {eps:.3g}" for eps in radii), "training"):
        table.add_column(heading, justify="right")
    mine = np.arange(len(images.test))[world.rank :: world.size]
    batch = data.fetch(images.test, mine, world.device)
    for trainer in trainers:
        with evaluating(trainer.network):
            how = {"steps": 40, "world": world, "at_once": 1000}
            errors = [attacked_error(trainer.network, *batch, norm, eps, **how) for eps in (0.0, *radii)]
        options = trainer.options
        table.add_row(title_of(options), *(f"{error:.1f}" for error in errors), duration(trainer.seconds))
    world.console.print(table)


def title_of(options: dict[str, Any]) -> str:
    """A network's name in a table."""
    titles = {"none": "undefended", "fd": f"penalty, lam {options['lam']:g}, h {options['h']:g}"}
    titles["at"] = f"adversarial training, eps {options['eps']:.3g}"
    titles["free"] = f"free, m {options['replays']}, eps {options['eps']:.3g}"
    return titles.get(options["method"], f"penalty ({options['method']}), lam {options['lam']:g}")


# --- command line -----------------------------------------------------------------------------------------

Method = Literal["fd", "exact", "jvp", "none", "noise", "at", "free"]
Space = Literal["pixel", "normalized"]
AttackNorm = Literal["l2", "linf", "l1"]
Model = Literal["cnn", "resnext34", "resnext34-authors", "resnet50"]
Activation = Literal["relu", "gelu", "silu"]

DEFAULTS = {
    "method": "fd",
    "central": False,
    "activation": "relu",
    "seed": 0,
    "subset": None,
    "sigma": 0.25,
    "attack_steps": 7,
    "replays": 8,
    "accumulate": 1,
    "amp": False,
    "channels_last": False,
    "compile": False,
    "checkpoint_minutes": 10.0,
}
MAY_CHANGE = {"data_dir", "device", "workers", "checkpoint_minutes", "accumulate"}  # when a run goes on
FORMAT = 2  # of config.json and checkpoint.pt


def fraction(text: str) -> float:
    """A number, or a quotient of two: 8/255."""
    try:
        above, _, below = text.partition("/")
        return float(above) / float(below or 1)
    except (ValueError, ZeroDivisionError):
        raise typer.BadParameter(f"{text!r} is not a number, nor a fraction such as 8/255") from None


def option(panel: str, text: str, **how: Any) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False, **how)


PENALTY, BASELINE = "The penalty of eq. (8)", "Its baselines"
TRAINING, RUN = "Training (the rest is the recipe's)", "The run"


# fmt: off
def main(
    dataset: Annotated[str | None, typer.Argument(help="digits, cifar10, imagenet, or the path of an image folder.")] = None,
    method: Annotated[Method | None, option(PENALTY, "Finite differences (default), double backpropagation, forward mode; none; or a baseline: Gaussian noise, adversarial training, free adversarial training.")] = None,
    norm: Annotated[AttackNorm | None, option(PENALTY, "Norm of the attacks to defend against (default l2; at and free: linf).")] = None,
    lam: Annotated[float | None, option(PENALTY, "Weight: lam/2 times the mean penalty is added to the loss.")] = None,
    h: Annotated[float | None, option(PENALTY, "Finite difference step, in the coordinates of the penalty.")] = None,
    central: Annotated[bool | None, option(PENALTY, "Central differences, for one more forward pass.")] = None,
    penalty_space: Annotated[Space | None, option(PENALTY, "Coordinates of gradient and step: pixels of range 0 to 1, or what comes out of the network's first layer (imagenet, as the authors).")] = None,
    eps: Annotated[float | None, option(BASELINE, "at, free: radius in pixels of range 0 to 1; 8/255 is understood.", parser=fraction, metavar="NUMBER")] = None,
    attack_steps: Annotated[int | None, option(BASELINE, "at: PGD steps (default 7), each 1.75 eps / steps.")] = None,
    replays: Annotated[int | None, option(BASELINE, "free: steps on each batch, m (default 8); divides the recipe's epochs.")] = None,
    sigma: Annotated[float | None, option(BASELINE, "noise: standard deviation (default 0.25).")] = None,
    model: Annotated[Model | None, option(TRAINING, "The network.")] = None,
    activation: Annotated[Activation | None, option(TRAINING, "Takes the place of every ReLU (default relu).")] = None,
    epochs: Annotated[int | None, option(TRAINING, "Stretches the learning rate schedule.")] = None,
    batch_size: Annotated[int | None, option(TRAINING, "Images a step, over all processes; scales those of later phases.")] = None,
    accumulate: Annotated[int | None, option(TRAINING, "Take each process's share of a batch in N parts, for small devices.")] = None,
    amp: Annotated[bool | None, option(TRAINING, "bfloat16 where no digits cancel; the penalty stays in float32.")] = None,
    channels_last: Annotated[bool | None, option(TRAINING, "Memory layout, faster on recent GPUs with --amp.")] = None,
    compile: Annotated[bool | None, option(TRAINING, "torch.compile the network (not for exact and jvp).")] = None,
    lr: Annotated[float | None, option(TRAINING, "First learning rate; scales the schedule.")] = None,
    seed: Annotated[int | None, option(TRAINING, "Of weights, order and augmentation (default 0).", min=0)] = None,
    subset: Annotated[int | None, option(TRAINING, "Use N training images and at most N test images.", min=1)] = None,
    data_dir: Annotated[Path | None, option(RUN, "Where the images are (default data).")] = None,
    runs: Annotated[Path | None, option(RUN, "Where runs are kept (default runs).")] = None,
    name: Annotated[str | None, option(RUN, "Name of the run, a new one.")] = None,
    resume: Annotated[Path | None, option(RUN, "Go on with this run, with its own options.")] = None,
    device: Annotated[str | None, option(RUN, "cpu, cuda or cuda:N (default cuda where there is one).")] = None,
    workers: Annotated[int | None, option(RUN, "Processes that decode large images (default one a core).", min=0)] = None,
    checkpoint_minutes: Annotated[float | None, option(RUN, "Between checkpoints inside an epoch (default 10).")] = None,
) -> None:
    """Train a classifier with the paper's input gradient penalty.

    Without DATASET: train an undefended and a penalised network on digits, and print what the penalty buys.
    """
    # fmt: on
    given = {name: value for name, value in locals().items() if value is not None}
    if resume and (extra := given.keys() - MAY_CHANGE - {"resume"}):
        flags = ", ".join(sorted("DATASET" if e == "dataset" else f"--{e.replace('_', '-')}" for e in extra))
        raise Failure(f"--resume takes the run's own options: leave out {flags}", 2)
    if "data_dir" in given:
        given["data_dir"] = str(data_dir.absolute())
    for taken in ("device", "runs", "name", "resume"):
        given.pop(taken, None)
    with contextlib.closing(World(device)) as world:
        if resume:
            resume_run(resume, given, world)
            return
        given = DEFAULTS | {"data_dir": str(Path("data").absolute())} | given
        given.setdefault("workers", min(8, max(1, (cpu_count() or 1) // world.size)))
        images = load_images(given | {"dataset": dataset or "digits"})
        if dataset is None:
            if name or method in {"none", "noise"}:
                raise Failure(f"--name and --method {method} are of one network: name its data set too, say digits", 2)
            compare(given | {"dataset": "digits"}, runs or Path("runs"), images, world)
        else:
            start_run(given, runs or Path("runs"), name, images, world)


if __name__ == "__main__":
    sys.exit(run_command(main))
