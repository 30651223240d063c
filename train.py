"""Section 4 and Appendix A: train a network with the paper's penalty, on one process or many.

    python train.py                             undefended and penalised networks on digits, and a table of both
    python train.py cifar10 --data-dir DIR      the paper's CIFAR-10 recipe with Algorithm 1
    python train.py cifar10 --method none       the same, undefended
    torchrun --nproc_per_node 4 train.py imagenet --data-dir DIR
    python train.py --resume runs/latest        go on where a run stopped, or was stopped

What an option leaves open is a row of RECIPES.  A run lives in runs/<name>/, in the files that README.md
describes.  A run that was interrupted, or killed, and resumed ends with the weights, bit for bit, of one that was
not (on the CPU, with as many processes and threads).

Exit codes: 0 finished, 1 failed, 2 bad usage, 3 diverged, 130 Ctrl-C, 143 SIGTERM.
"""

import contextlib
import copy
import math
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
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
    refuse_if_running,
    run_command,
    save_checkpoint,
)

# --- recipes ----------------------------------------------------------------------------------------------

# schedule: epoch, learning rate there, learning rate at the next row, linear in between; stretched to --epochs.
# radii: the attack sizes to report, in pixels, for each norm.
RECIPES: dict[str, dict[str, Any]] = {
    "digits": {
        "model": "cnn",
        "epochs": 40,
        "batch_size": 50,
        "weight_decay": 5e-4,
        "lam": 1.0,
        "h": 0.1,
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
        "schedule": [(0, 0.1, 0.1), (60, 0.02, 0.02), (120, 0.004, 0.004), (160, 0.0008, 0.0008), (200, 0, 0)],
        "radii": {"l2": [0.25, 0.5, 1.0], "linf": [2 / 255, 4 / 255, 8 / 255]},
    },
    "imagenet": {  # one image size throughout; the authors' progressive sizes are not there yet
        "model": "resnet50",
        "epochs": 29,
        "batch_size": 256,
        "weight_decay": 1e-4,
        "lam": 0.1,
        "h": 0.01,
        "schedule": [(0, 0.1, 0.2), (8, 0.2, 0.1), (15, 0.1, 0.01), (25, 0.01, 0.001), (28, 6e-4, 6e-5), (29, 0, 0)],
        "radii": {"l2": [0.25, 0.5, 1.0], "linf": [1 / 255, 2 / 255, 4 / 255]},
    },
}
MOMENTUM = 0.9
LOG_EVERY = 10  # steps between two records
PROBE_IMAGES = 200  # test images attacked after each epoch, always the same
UNPENALISED = {"none", "noise"}  # methods without a penalty: undefended, and Gaussian noise (Cohen et al. 2019)
LARGE_ROUNDING = 5.0  # percent, of the difference quotient, that make a warning


def learning_rate(schedule: list[tuple[float, float, float]], progress: float) -> float:
    """The schedule's rate when a share `progress`, 0 to 1, of the training is done."""
    epoch = progress * schedule[-1][0]
    for (start, first, last), (end, _, _) in pairwise(schedule):
        if start <= epoch < end:
            return first + (last - first) * (epoch - start) / (end - start)
    raise ValueError(f"progress must be in [0, 1), not {progress}")


# --- the objective ----------------------------------------------------------------------------------------


class Objective(nn.Module):
    """images, labels -> the losses and penalties of eq. (8).

    One module computes the whole objective, with all its passes, so that DistributedDataParallel sees one forward
    and one backward a step: then the gradients it averages are those of eq. (8).
    """

    def __init__(self, network: nn.Module, *, method: str, norm: str, h: float, central: bool = False):
        super().__init__()
        self.network, self.method, self.norm, self.h, self.central = network, method, norm, h, central

    def forward(self, images: Tensor, labels: Tensor) -> Penalised:
        def loss_fn(z: Tensor) -> Tensor:
            return cross_entropy(self.network(z), labels)

        if self.method == "fd":
            return fd_penalty(loss_fn, images, norm=self.norm, h=self.h, central=self.central)
        if self.method == "exact":
            return exact_penalty(loss_fn, images, norm=self.norm)
        if self.method == "jvp":
            return jvp_penalty(loss_fn, images, norm=self.norm)
        losses = loss_fn(images)
        return Penalised(losses, torch.zeros_like(losses), None)  # undefended, or noise already in the images


@contextlib.contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Context: the network in evaluation mode, and back in training mode afterwards."""
    network.eval()
    try:
        yield
    finally:
        network.train()


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
        self.config, self.options, self.world = config, config["options"], world
        self.steps, self.total = config["steps_per_epoch"], config["steps_total"]
        self.run, self.stop = Run(path, world), Stop(world.console)
        self.train_images, self.test_images = images.train.to(world.device), images.test.to(world.device)
        set_precision(self.options)
        torch.manual_seed(self.options["seed"])
        self.network = models.from_config(config).to(world.device).train()
        self.optimizer = torch.optim.SGD(
            [p for p in self.network.parameters() if p.requires_grad],
            lr=0.0,  # set before every step
            momentum=MOMENTUM,
            weight_decay=self.options["weight_decay"],
        )
        self.meter = Meter(self.options["norm"], self.options["lam"], world.device)
        self.step, self.seconds = 0, 0.0

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from a checkpoint.  Raises Failure where it does not fit."""
        try:
            self.network.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            torch.set_rng_state(state["rng"])
            self.step, self.seconds = state["step"], state["seconds"]
        except (KeyError, RuntimeError, ValueError, TypeError) as error:
            raise Failure(f"{self.run.path}: the checkpoint does not fit its run ({type(error).__name__})", 2) from None
        self.run.step, self.run.epoch = self.step, self.step / self.steps

    def save(self) -> None:
        """Write a checkpoint: the main process does."""
        state = {
            "config": self.config,
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": torch.get_rng_state(),
            "step": self.step,
            "seconds": self.seconds,
        }
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
        with self.stop, progress_bar(self.world.console, self.run.path.name, self.total) as self.show:
            while self.step < self.total:
                self._epoch()
                self._end_of_epoch()
        self.run.end("finished", "finish", f"finished, {duration(self.seconds)} of training")

    def _objective(self) -> nn.Module:
        how = {name: self.options[name] for name in ("method", "norm", "h", "central")}
        module = Objective(self.network, **how)
        return nn.parallel.DistributedDataParallel(module) if self.world.size > 1 else module

    def _epoch(self) -> None:
        """The rest of the epoch that the step lies in."""
        epoch, first = divmod(self.step, self.steps)
        batches = data.training_batches(
            self.train_images,
            batch_size=self.options["batch_size"],
            seed=self.options["seed"],
            epoch=epoch,
            first=first,
            device=self.world.device,
            rank=self.world.rank,
            processes=self.world.size,
            workers=self.options["workers"],
        )
        self.meter.clear()
        for images, labels in batches:
            rate = self._update(images, labels)
            end_of_epoch = self.step % self.steps == 0
            stop_now = self.stop.signal and self.world.size == 1  # several processes agree at the next record
            if end_of_epoch or self.step % LOG_EVERY == 0 or stop_now:
                self._log(images, labels, rate)
                if not end_of_epoch:
                    self._stop_or_save()

    def _update(self, images: Tensor, labels: Tensor) -> float:
        """One step of Algorithm 1; the learning rate it used."""
        rate = learning_rate(self.options["schedule"], self.step / self.total)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        if self.options["method"] == "noise":
            images = images + self.options["sigma"] * self._noise(images)
        out = self.objective(images, labels)
        self.optimizer.zero_grad(set_to_none=True)
        out.objective(self.options["lam"]).backward()
        self.optimizer.step()
        self.meter.add(out)
        self.step += 1
        self.run.step, self.run.epoch = self.step, self.step / self.steps
        self.run.heartbeat()
        self.show(self.step)
        return rate

    def _noise(self, images: Tensor) -> Tensor:
        """This process's part of the batch's Gaussian noise, a pure function of (seed, step, place in the batch)."""
        (bits,) = data.uniforms(self.options["seed"], self.step, np.zeros(1), 1)[0]
        generator = torch.Generator(self.world.device).manual_seed(int(bits * 2**53))
        shape = self.world.size, *images.shape
        return torch.randn(shape, generator=generator, device=images.device)[self.world.rank]

    def _log(self, images: Tensor, labels: Tensor, rate: float) -> None:
        """A "step" record.  Raises Failure when the loss is not finite."""
        if self.options["method"] in UNPENALISED:  # no step has computed an input gradient: look at a few images
            with evaluating(self.network):
                _, grad = input_gradient(lambda z: cross_entropy(self.network(z), labels[:32]), images[:32])
            self.meter.add_gradient(grad)
        self.fields = self.meter.read(self.world, differences=self.options["method"] == "fd")
        self.seconds += self.meter.elapsed
        self.run.record("step", **self.fields, lr=rate)
        if not math.isfinite(self.fields["loss"] + self.fields["penalty"]):
            advice = f"{self.run.path} keeps the checkpoint from before; try a smaller --lr or --lam"
            raise Failure(f"diverged: the loss is not finite at step {self.step}; {advice}", 3)

    def _stop_or_save(self) -> None:
        """After a record: stop if any process was told to, or write a checkpoint if one is due."""
        (signum,) = self.world.max(torch.tensor([self.stop.signal]))
        if signum:
            self.save()
            what = f"stopped by {signal.Signals(int(signum)).name} at step {self.step}"
            self.run.end("interrupted", "interrupt", what)
            raise Failure(f"{what}; go on with: python train.py --resume {self.run.path}", 128 + int(signum))
        if time.monotonic() - self.saved > 60 * self.options["checkpoint_minutes"]:
            self.save()

    def _end_of_epoch(self) -> None:
        """Evaluate, record, print, save; then stop if told to."""
        self.run.phase = "eval"
        self.run.heartbeat(force=True)
        self.world.share_buffers(self.network)
        with evaluating(self.network):
            fields = evaluate(self.network, self.test_images, self.config, self.world, self.run)
        self.run.record("epoch", **fields, seconds=round(self.seconds, 3))
        self.run.phase = "train"
        self._report(fields)
        self.save()
        if self.step < self.total:
            self._stop_or_save()

    def _report(self, fields: dict[str, Any]) -> None:
        """The epoch in a line, and a warning where the difference quotient has lost its digits."""
        self.world.console.print(
            f"epoch {self.step // self.steps}/{self.options['epochs']}  loss {self.fields['loss']:.4f}"
            f"  penalty {self.fields['penalty']:.4f}  gradient {self.fields['grad_norm_mean']:.3f}"
            f"  error {fields['clean_error_pct']:.2f} %  attacked {fields['attacked_error_pct']:.1f} %"
            f"  {self.fields['images_per_s']:,.0f} images/s"
        )
        rounding = fields.get("fd_rounding_pct")
        if rounding is not None and rounding > LARGE_ROUNDING:
            warning = f"rounding is {rounding:.0f} % of the finite difference: choose a larger --h"
            self.run.event("warning", warning)
            self.world.console.print(f"warning: {warning}")


def set_precision(options: dict[str, Any]) -> None:
    """TF32 stays out of the difference quotient, which cancels leading digits: its products keep only three."""
    allowed = options["method"] != "fd"
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = allowed
    if options["model"] == "cnn":
        torch.set_num_threads(1)  # too small to share: on a busy machine threads that wait for each other crawl


# --- evaluation after each epoch --------------------------------------------------------------------------


def evaluate(network: nn.Module, test: data.Source, config: dict[str, Any], world: World, run: Run) -> dict[str, Any]:
    """The fields of an "epoch" record: the whole test set clean, and the same few images of it attacked."""
    workers = config["options"]["workers"]
    sums = torch.zeros(3, dtype=torch.float64, device=world.device)
    share = {"rank": world.rank, "processes": world.size}
    for images, labels in data.evaluation_batches(test, batch_size=256, device=world.device, workers=workers, **share):
        with torch.no_grad():
            logits = network(images)
            sums[0] += cross_entropy(logits, labels).sum()
            sums[1] += (logits.argmax(1) != labels).sum()
            sums[2] += len(labels)
        run.heartbeat()
    loss, wrong, count = world.sum(sums)
    return {"test_loss": loss / count, "clean_error_pct": 100 * wrong / count} | probe(network, test, config, world)


def probe(network: nn.Module, test: data.Source, config: dict[str, Any], world: World) -> dict[str, Any]:
    """What PGD, the margin loss and float64 say of the first PROBE_IMAGES test images in a fixed random order."""
    options, norm = config["options"], config["attack_norm"]
    mine = data.order(len(test), seed=0, epoch=2)[:PROBE_IMAGES][world.rank :: world.size]
    images, labels = data.fetch(test, mine, world.device)
    fields = {"attacked_error_pct": attacked_error(network, images, labels, norm, config["attack_eps"], 10, world)}
    looked = bounds.omega_statistics(network, images, labels, norm=norm, eps=config["omega_eps"])
    *fields["omega"], fields["margin_grad_norm_max"] = world.max(torch.tensor([*looked.omega, looked.grad_norm_max]))
    total, count = world.sum(torch.tensor([looked.grad_norm_mean * len(labels), len(labels)]))
    fields["margin_grad_norm_mean"] = total / count
    if options["method"] == "fd":
        fields["fd_rounding_pct"] = fd_rounding(network, images[:32], labels[:32], options)
    return fields


def attacked_error(
    network: nn.Module, images: Tensor, labels: Tensor, norm: str, eps: float, steps: int, world: World
) -> float:
    """Percent of these images, over all processes, that plain PGD moves to another class within eps."""
    generator = torch.Generator(images.device).manual_seed(0)
    moved = attacks.pgd(network, images, labels, norm=norm, eps=eps, steps=steps, generator=generator)
    with torch.no_grad():
        wrong = (network(moved).argmax(1) != labels).double()
    errors, count = world.sum(torch.stack([wrong.sum(), wrong.new_tensor(len(wrong))]))
    return 100 * errors / count


def fd_rounding(network: nn.Module, images: Tensor, labels: Tensor, options: dict[str, Any]) -> float | None:
    """How far the difference quotient is from itself in float64, in percent: what cancellation costs."""

    def slopes(network: nn.Module, images: Tensor) -> Tensor:
        def loss_fn(z: Tensor) -> Tensor:
            return cross_entropy(network(z), labels)

        how = {name: options[name] for name in ("norm", "h", "central")}
        return fd_penalty(loss_fn, images, **how, squared=False).penalties.detach()

    exact = slopes(copy.deepcopy(network).double(), images.double())
    total = exact.sum().item()
    return 100 * (slopes(network, images) - exact).abs().sum().item() / total if total else None


# --- a run from its options -------------------------------------------------------------------------------


def recipe_of(dataset: str, images: data.Data) -> dict[str, Any]:
    """A data set's own recipe; for an image folder that of the data set whose images it resembles."""
    return RECIPES.get(dataset) or RECIPES["cifar10" if images.small else "imagenet"]


def resolve(given: dict[str, Any], images: data.Data, world: World) -> dict[str, Any]:
    """All options of a run: those given, and the recipe's for the rest.  Raises Failure for what cannot work."""
    options = {name: v for name, v in recipe_of(given["dataset"], images).items() if name != "radii"} | given
    first_rate = options["schedule"][0][1]
    scale = options.setdefault("lr", first_rate) / first_rate
    options["schedule"] = [[epoch, start * scale, end * scale] for epoch, start, end in options["schedule"]]
    if options["method"] in UNPENALISED:
        options["lam"] = 0.0
    for name in ("h", "lr", "epochs", "batch_size", "checkpoint_minutes", "sigma"):
        if not (math.isfinite(options[name]) and options[name] > 0):
            raise Failure(f"--{name.replace('_', '-')} must be positive, not {options[name]}", 2)
    if not (math.isfinite(options["lam"]) and options["lam"] >= 0):
        raise Failure(f"--lam must be 0 or more, not {options['lam']}", 2)
    if options["batch_size"] > len(images.train):
        raise Failure(f"--batch-size {options['batch_size']}: there are only {len(images.train)} training images", 2)
    if len(images.test) < world.size:
        raise Failure(f"only {len(images.test)} test images for {world.size} processes", 2)
    check_share(options, world)
    return options


def check_share(options: dict[str, Any], world: World) -> None:
    if options["batch_size"] % world.size:
        raise Failure(f"--batch-size {options['batch_size']} cannot be shared evenly by {world.size} processes", 2)


def describe(options: dict[str, Any], images: data.Data, world: World) -> dict[str, Any]:
    """What config.json holds.  Raises Failure for a model that cannot take these images."""
    radii = recipe_of(options["dataset"], images)["radii"]
    norm = options["norm"] if options["norm"] in radii else "l2"
    steps = len(images.train) // options["batch_size"]
    config = {
        "format": 1,
        "options": options,
        **provenance(world),
        "steps_per_epoch": steps,
        "steps_total": steps * options["epochs"],
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


def start_run(given: dict[str, Any], root: Path, name: str | None, images: data.Data, world: World) -> Trainer:
    """Train a new run to its end."""
    options = resolve(given, images, world)
    config = describe(options, images, world)
    parts = [Path(options["dataset"]).name, options["method"], f"seed{options['seed']}"]
    if options["method"] not in UNPENALISED:
        parts.insert(2, f"{options['norm']}-lam{options['lam']:g}")
    if options["method"] == "noise":
        parts.insert(2, f"sigma{options['sigma']:g}")
    path = world.same(new_directory(root, name, "-".join(parts)) if world.main else None)
    config["name"] = path.name
    trainer = Trainer(path, config, images, world)
    trainer.run.config(config)
    trainer.run.event("start", config["command"])
    fit_and_tell(trainer)
    return trainer


def resume_run(path: Path, changed: dict[str, Any], world: World) -> None:
    """Take a run to its end from its newest whole checkpoint."""
    if not path.is_dir():
        raise Failure(f"--resume {path}: no such run", 2)
    path = path.resolve()  # runs/latest may point elsewhere tomorrow
    refuse_if_running(path)
    state, warning = last_checkpoint(path)
    config = state["config"]
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
    if trainer.step == trainer.total:
        world.console.print(f"{path} is finished: nothing to resume")
        return
    trainer.run.event("resume", f"resumed at step {trainer.step}, {world.size} processes")
    fit_and_tell(trainer)


def fit_and_tell(trainer: Trainer) -> None:
    """trainer.fit(); what stops it is written to status.json and to the log, then raised."""
    try:
        trainer.fit()
    except BaseException as error:
        if trainer.run.state == "running":
            reason = " ".join(str(error).split()) or type(error).__name__
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
            errors = [attacked_error(trainer.network, *batch, norm, eps, 40, world) for eps in (0.0, *radii)]
        options = trainer.options
        name = "undefended" if options["method"] == "none" else f"penalty, lam {options['lam']:g}, h {options['h']:g}"
        table.add_row(name, *(f"{error:.1f}" for error in errors), duration(trainer.seconds))
    world.console.print(table)


# --- command line -----------------------------------------------------------------------------------------

Method = Literal["fd", "exact", "jvp", "none", "noise"]
AttackNorm = Literal["l2", "linf", "l1"]
Model = Literal["cnn", "resnext34", "resnext34-authors", "resnet50"]
Activation = Literal["relu", "gelu", "silu"]

DEFAULTS = {
    "method": "fd",
    "norm": "l2",
    "central": False,
    "activation": "relu",
    "seed": 0,
    "subset": None,
    "sigma": 0.25,
}
MAY_CHANGE = {"data_dir", "device", "workers", "checkpoint_minutes"}  # when a run goes on


def option(panel: str, text: str, **limits: float) -> Any:
    return typer.Option(help=text, rich_help_panel=panel, show_default=False, **limits)


PENALTY, TRAINING, RUN = "The penalty of eq. (8)", "Training (the rest is the recipe's)", "The run"


# fmt: off
def main(
    dataset: Annotated[str | None, typer.Argument(help="digits, cifar10, imagenet, or the path of an image folder.")] = None,
    method: Annotated[Method | None, option(PENALTY, "Finite differences (default), double backpropagation, forward mode; none; Gaussian noise instead.")] = None,
    norm: Annotated[AttackNorm | None, option(PENALTY, "Norm of the attacks to defend against (default l2).")] = None,
    lam: Annotated[float | None, option(PENALTY, "Weight: lam/2 times the mean penalty is added to the loss.")] = None,
    h: Annotated[float | None, option(PENALTY, "Finite difference step, in pixels of range 0 to 1.")] = None,
    central: Annotated[bool | None, option(PENALTY, "Central differences, for one more forward pass.")] = None,
    sigma: Annotated[float | None, option(PENALTY, "Standard deviation of the noise of --method noise (default 0.25).")] = None,
    model: Annotated[Model | None, option(TRAINING, "The network.")] = None,
    activation: Annotated[Activation | None, option(TRAINING, "Takes the place of every ReLU (default relu).")] = None,
    epochs: Annotated[int | None, option(TRAINING, "Stretches the learning rate schedule.")] = None,
    batch_size: Annotated[int | None, option(TRAINING, "Images a step, over all processes.")] = None,
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
            return resume_run(resume, given, world)
        given = DEFAULTS | {"data_dir": str(Path("data").absolute()), "checkpoint_minutes": 10.0} | given
        given.setdefault("workers", min(8, max(1, (cpu_count() or 1) // world.size)))
        images = load_images(given | {"dataset": dataset or "digits"})
        if dataset is None:
            if name or method in UNPENALISED:
                raise Failure(f"--name and --method {method} are of one network: name its data set too, say digits", 2)
            return compare(given | {"dataset": "digits"}, runs or Path("runs"), images, world)
        start_run(given, runs or Path("runs"), name, images, world)


if __name__ == "__main__":
    sys.exit(run_command(main))
