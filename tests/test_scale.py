"""Scale: phases and sizes, baselines, precision; and that any number of processes computes the same."""

import contextlib
import json
import os
import sys
from dataclasses import asdict, replace
from functools import partial
from typing import ClassVar
from unittest import mock

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import nn

import attacks
import data
import models
import runs
import train
from gradreg import Penalised, cross_entropy, dual_norm, fd_penalty

IMAGENET = train.RECIPES["imagenet"]


def command(monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return runs.run_command(train.main)


class Crash(Exception):
    pass


@pytest.fixture(autouse=True, scope="module")
def _shorter_looks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "PROBE_IMAGES", 20)
        yield


def records(run, kind):
    lines = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == kind]


def weights(run):
    return models.read_checkpoint(run / "checkpoint.pt")["model"]


# --- the plan of a run ------------------------------------------------------------------------------------


def plan_of(*, epochs=29, batch_size=512, images=1_281_167, **options):
    asked = replace(IMAGENET, epochs=epochs, batch_size=batch_size, replays=4, **options)
    return train.Plan(replace(asked, phases=train.stretch(IMAGENET, asked)), images)


def test_the_imagenet_recipe_is_the_authors():
    plan = plan_of()
    sizes = [plan.phase(epoch).size for epoch in range(29)]
    assert sizes == [128] * 15 + [224] * 13 + [288]
    assert [plan.phase(epoch).batch_size for epoch in (0, 14, 15, 27, 28)] == [512, 512, 192, 192, 128]
    rates = {epoch: plan.rate(plan.starts[epoch]) for epoch in (0, 4, 8, 15, 20, 25, 28)}
    assert rates == pytest.approx({0: 0.25, 4: 0.375, 8: 0.5, 15: 0.1, 20: 0.055, 25: 0.01, 28: 0.000625})
    assert plan.rate(plan.total - 1) == pytest.approx(0.0000625, rel=1e-2)
    assert plan.rate(plan.starts[15] - 1) == pytest.approx(0.0625, rel=1e-2)


WHOLE = plan_of(images=51_200)
RECIPES_RATES = [(WHOLE.epoch(step), WHOLE.rate(step)) for step in range(WHOLE.total)]  # not stretched


@settings(deadline=None)
@given(st.integers(1, 60), st.integers(1, 1024), st.integers(0, 2**31), st.sampled_from(["fd", "free"]))
def test_every_step_has_its_place(epochs, batch_size, draw, method):
    plan = plan_of(epochs=epochs, batch_size=batch_size, images=5000, method=method)
    sizes = {plan.phase(epoch).size for epoch in range(epochs)}
    assert len(sizes) == min(epochs, 3)  # no phase is lost while there is an epoch for it
    replays = 4 if method == "free" else 1
    assert plan.steps == [5000 // plan.phase(epoch).batch_size * replays for epoch in range(epochs)]
    step = draw % plan.total
    epoch, index = plan.locate(step)
    assert step == sum(plan.steps[:epoch]) + index
    assert 0 <= index < plan.steps[epoch]
    assert plan.epoch(step) == pytest.approx(epoch + index / plan.steps[epoch])
    # The schedule's break at a change of size stays at the change of size.
    rows = [phase.epoch for phase in IMAGENET.phases if phase.size == plan.phase(epoch).size]
    later = [phase.epoch for phase in IMAGENET.phases if phase.epoch > rows[0]]
    rates = [rate for e, rate in RECIPES_RATES if rows[0] <= e < (later or [29])[0]]
    if epochs >= 3:
        assert min(rates) * 0.98 <= plan.rate(step) <= max(rates) * 1.02


# --- coordinates of the penalty ---------------------------------------------------------------------------


def normalizing(std=0.25):
    torch.manual_seed(0)
    body = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.Tanh(), nn.Linear(16, 4))
    return nn.Sequential(models.Normalize([0.4, 0.5, 0.6], [std] * 3), body).double()


OPTIONS = {"method": "fd", "norm": "l2", "h": 0.05, "amp": False}


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_same_penalty_in_both_coordinates(norm):
    """The authors' lam and h, behind the normalization, are std^2 lam and std h in pixels: the ImageNet recipe's."""
    std, recipe = 0.25, train.RECIPES["imagenet"]
    network, images, labels = normalizing(std), torch.rand(5, 3, 4, 4).double(), torch.tensor([0, 1, 2, 3, 0])
    first, rest = models.coordinates(network)

    def gradient(part, x, lam, h):
        network.zero_grad()
        out = train.Objective(part, **OPTIONS | {"norm": norm, "h": h})(x, labels)
        out.objective(lam).backward()
        return torch.cat([p.grad.flatten() for p in network.parameters()]), out

    inside, a = gradient(rest, first(images), 0.1, 0.01)
    outside, b = gradient(network, images, 0.1 * std**2, 0.01 * std)
    torch.testing.assert_close(inside, outside, rtol=1e-8, atol=1e-12)
    torch.testing.assert_close(dual_norm(a.grad, norm), dual_norm(b.grad, norm) * std)
    mean = sum(models.IMAGENET_STD) / 3
    assert (recipe.lam, recipe.h) == (pytest.approx(0.1 * mean**2, rel=0.01), pytest.approx(0.01 * mean, rel=0.02))


# --- precision --------------------------------------------------------------------------------------------


def test_amp_has_the_digits_of_a_large_step_and_not_of_a_small_one():
    network, images, labels = normalizing().float(), torch.rand(6, 3, 4, 4), torch.tensor([0, 1, 2, 3, 0, 1])
    whole = train.Objective(network, **OPTIONS)(images, labels)

    def off(h):
        mixed, exact = (train.Objective(network, **OPTIONS | {"h": h, "amp": amp})(images, labels) for amp in (1, 0))
        assert mixed.losses.dtype == mixed.penalties.dtype == torch.float32
        assert not torch.equal(mixed.losses, exact.losses)
        return (mixed.penalties - exact.penalties).abs().max() / exact.penalties.max()

    assert off(0.3) < 0.1
    assert off(1e-3) > 0.2
    plain = train.Objective(network, **OPTIONS | {"amp": True, "method": "none"})(images, labels)
    assert not torch.equal(plain.losses, whole.losses)
    torch.testing.assert_close(plain.losses, whole.losses, rtol=0.02, atol=0.02)
    assert plain.losses.dtype == torch.float32


@pytest.mark.parametrize(("method", "h", "allowed"), [("fd", 0.01, False), ("fd", 0.1, True), ("none", 0.01, True)])
def test_tf32_only_where_the_step_is_large(method, h, allowed):
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        train.set_precision(train.Options(method=method, h=h, model="resnet50"))
        assert torch.backends.cuda.matmul.allow_tf32 == torch.backends.cudnn.allow_tf32 == allowed
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def test_biases_are_not_decayed_in_the_imagenet_recipe():
    with torch.device("meta"):
        network = models.build("resnet50", classes=10)
    one = train.decayed(network, train.Options(weight_decay=0.5))
    assert [(len(g["params"]), g["weight_decay"]) for g in one] == [(161, 0.5)]
    weights, biases = train.decayed(network, train.Options(weight_decay=0.5, decay_biases=False))
    assert (weights["weight_decay"], biases["weight_decay"]) == (0.5, 0)
    named = {id(p): name for name, p in network.named_parameters()}
    assert all(named[id(p)].endswith("bias") for p in biases["params"])
    assert len(weights["params"]) + len(biases["params"]) == 161


# --- baselines --------------------------------------------------------------------------------------------


def small(classes=4, channels=3, *, norm=True):
    torch.manual_seed(1)
    middle = [nn.BatchNorm2d(6)] if norm else []
    return nn.Sequential(
        nn.Conv2d(channels, 6, 3, padding=1), *middle, nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(),
        nn.Linear(24, classes),
    )  # fmt: skip


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_adversarial_images_are_in_the_ball_and_worse(tmp_path, norm):
    eps = {"l2": 0.5, "linf": 0.05}[norm]
    trainer = trainer_of(tmp_path, small, world=runs.World("cpu"), method="at", norm=norm, eps=eps)
    network = trainer.network.float()
    images, labels = torch.rand(20, 3, 6, 6), torch.arange(20) % 4
    images[0] = 0  # in a corner of [0, 1]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    found = train.training_inputs(trainer, images, labels)
    lengths = attacks.distance(images, found, norm)
    assert lengths.max() <= eps
    assert lengths.mean() > 0.7 * eps
    assert found.min() >= 0
    assert found.max() <= 1
    assert network.training
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    network.eval()
    assert (cross_entropy(network(found), labels) > cross_entropy(network(images), labels)).all()


def test_free_is_the_algorithm_of_shafahi_et_al(tmp_path):
    """Against a loop written from the paper's Algorithm 1, with clamping: same weights, same perturbation."""
    batches = [(torch.rand(8, 3, 6, 6), torch.arange(8) % 4) for _ in range(3)]
    eps, m, lr = 0.1, 3, 0.1

    network = small()
    optimizer, delta = torch.optim.SGD(network.parameters(), lr=lr), torch.zeros(8, 3, 6, 6)
    for images, labels in batches:
        for _ in range(m):
            delta.requires_grad_()
            optimizer.zero_grad()
            nn.functional.cross_entropy(network((images + delta).clamp(0, 1)), labels).backward()
            optimizer.step()
            delta = (delta.detach() + eps * delta.grad.sign()).clamp(-eps, eps)

    given_ = {"method": "free", "eps": eps, "replays": m, "batch_size": 8}
    trainer = trainer_of(tmp_path, small, world=runs.World("cpu"), **given_)
    trainer.network.float()
    trainer.plan.rate = lambda step: lr
    trainer.optimizer = torch.optim.SGD(trainer.network.parameters(), lr=lr)
    for images, labels in batches:
        for _ in range(m):
            trainer.update(images, labels)

    for a, b in zip(network.parameters(), trainer.network.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert (delta == trainer.delta).double().mean() > 0.99  # a gradient of rounding's size may have either sign
    assert trainer.delta.abs().max() <= eps
    assert train.training_inputs(trainer, torch.rand(2, 3, 4, 4), None).shape == (2, 3, 4, 4)  # another size: from 0
    assert trainer.delta.abs().max() == 0


FINE = {"test_loss": 0.0, "clean_error_pct": 0.0, "attacked_error_pct": 0.0}
TINY = ["digits", "--subset", 100, "--batch-size", 20]  # 5 batches an epoch


def test_free_replays_batches_in_a_quarter_of_the_epochs(monkeypatch, tmp_path):
    seen, real = [], train.training_inputs

    def spied(trainer, images, labels):
        seen.append(images.clone())
        return real(trainer, images, labels)

    monkeypatch.setattr(train, "training_inputs", spied)
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    assert command(monkeypatch, *TINY, "--method", "free", "--replays", 4, "--eps", "0.1", "--runs", tmp_path) == 0
    config = json.loads((tmp_path / "latest/config.json").read_text())
    assert config["name"] == "digits-free-m4-eps0.1-seed0"
    assert (config["options"]["epochs"], config["steps_per_epoch"], config["steps_total"]) == (10, 20, 200)
    assert len(seen) == 200
    for i in range(0, 200, 4):
        assert all(torch.equal(seen[i], seen[i + j]) for j in (1, 2, 3))
    assert not torch.equal(seen[0], seen[4])


@pytest.mark.parametrize("method", [["free", "--replays", 4], ["at", "--attack-steps", 3]])
def test_a_baseline_that_dies_ends_as_if_it_had_not(monkeypatch, tmp_path, method):
    """The perturbation of free outlives its process, and a batch that was half replayed is finished."""
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small_ = [*TINY, "--method", *method, "--eps", 0.1, "--epochs", 2, "--runs", tmp_path]
    assert command(monkeypatch, *small_, "--name", "whole") == 0
    real, replays = train.Plan.rate, 4 if method[0] == "free" else 1
    steps = iter(range(7 * replays + 2))  # within the second epoch

    def dies(self, step):
        if next(steps, None) is None:
            raise Crash
        return real(self, step)

    with monkeypatch.context() as patched:
        patched.setattr(train.Plan, "rate", dies)
        patched.setattr(train, "LOG_EVERY", 3)
        with pytest.raises(Crash):
            command(patched, *small_, "--name", "died", "--checkpoint-minutes", 1e-9)
    resumed = models.read_checkpoint(tmp_path / "died/checkpoint.pt")["step"]
    assert 5 * replays < resumed < 10 * replays
    assert replays == 1 or resumed % 4  # in the middle of a batch
    assert command(monkeypatch, "--resume", tmp_path / "died") == 0
    a, b = weights(tmp_path / "whole"), weights(tmp_path / "died")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_adversarial_training_buys_robustness_in_its_norm(monkeypatch, tmp_path):
    small_ = ["digits", "--subset", 500, "--epochs", 10, "--batch-size", 25, "--norm", "linf", "--runs", tmp_path]
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    images, labels = data.fetch(data.load("digits").test, np.arange(200), torch.device("cpu"))
    errors = {}
    for method, how in (("none", []), ("at", ["--attack-steps", 3])):
        assert command(monkeypatch, *small_, "--method", method, *how, "--name", method) == 0
        network = models.load(tmp_path / method)
        found = attacks.pgd(network, images, labels, norm="linf", eps=0.1, steps=10)
        errors[method] = (network(found).argmax(1) != labels).double().mean().item()
    assert errors["at"] < 0.8 * errors["none"], errors


# --- the same in parts, and in any number of processes ----------------------------------------------------


class Parts(train.Objective):
    """The objective of a batch that is taken in parts, each by itself: what so many processes make of it."""

    def __init__(self, network, options, parts):
        super().__init__(network, options)
        self.parts = parts

    def forward(self, images, labels, lam):
        parts = zip(images.chunk(self.parts), labels.chunk(self.parts), strict=True)
        losses, penalties, grads = zip(*(super(Parts, self).forward(*part, lam) for part in parts), strict=True)
        grad = None if grads[0] is None else torch.cat(grads)
        return Penalised(torch.cat(losses), torch.cat(penalties), grad)


def trainer_of(tmp_path, network, *, world, parts=1, **given_):
    """A Trainer in float64 of 32 coloured noise images, with `network` as its model; whole batches, or in parts."""
    images = torch.randint(0, 256, (32, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = data.InMemory(images, torch.arange(32) % 4)
    loaded = data.Data(source, source, list("abcd"), 3)
    given_ = {"dataset": "digits", "batch_size": 16, "lr": 0.05} | given_
    options = train.resolve(given_, loaded, world)
    with mock.patch.object(models, "cnn", side_effect=lambda classes, channels: network()):
        trainer = train.Trainer(tmp_path, train.describe(options, loaded, world), loaded, world)
    trainer.network.double()
    trainer.objective = Parts(trainer.network, options, parts)
    if world.size > 1:
        trainer.objective = nn.parallel.DistributedDataParallel(trainer.objective)
    return trainer


def weights_after(trainer, steps, methods=None):
    """All weights after a few updates on this process's share of the same batches, in one vector."""
    share = 16 // trainer.world.size
    for step in range(steps):
        if methods:
            module = trainer.objective.module if trainer.world.size > 1 else trainer.objective
            module.options = replace(module.options, method=methods[step % len(methods)])
        generator = torch.Generator().manual_seed(100 + step // 2)
        images, labels = torch.rand(16, 3, 6, 6, generator=generator).double(), torch.arange(16) % 4
        mine = slice(trainer.world.rank * share, (trainer.world.rank + 1) * share)
        trainer.update(images[mine], labels[mine])
    return torch.cat([p.detach().flatten() for p in trainer.network.parameters()])


def plain():
    return small(norm=False)


CASES = {  # options, network, updates
    "fd": ({"method": "fd"}, plain, 4),
    "fd, linf": ({"method": "fd", "norm": "linf"}, plain, 4),
    "fd, batch norm": ({"method": "fd"}, small, 4),
    "exact": ({"method": "exact"}, plain, 4),
    "exact, batch norm": ({"method": "exact"}, small, 4),
    "ascent, linf, a share, batch norm": ({"method": "ascent", "norm": "linf", "penalty_share": 0.5}, small, 4),
    "fd, a share, batch norm": ({"penalty_share": 0.5, "unsquared": True}, small, 4),
    "noise": ({"method": "noise"}, plain, 4),
    "at": ({"method": "at"}, plain, 4),
    "at, batch norm": ({"method": "at"}, small, 1),  # then the running statistics of the parts differ
    "free": ({"method": "free", "replays": 2}, plain, 4),
    "free, batch norm": ({"method": "free", "replays": 2}, small, 4),
    "alternating": ({"method": "fd"}, plain, 6),
}


class Dropping(nn.Dropout):
    """Dropout that remembers what it dropped."""

    masks: ClassVar[list] = []

    def forward(self, x):
        out = super().forward(x)
        Dropping.masks.append(out != 0)
        return out


def masks_of(tmp_path, world, method):
    """What each forward pass of two steps of a network with dropout dropped: (passes, images, values)."""
    network = partial(nn.Sequential, nn.Flatten(), nn.Linear(108, 40), nn.Sigmoid(), Dropping(0.5), nn.Linear(40, 4))
    trainer, Dropping.masks = trainer_of(tmp_path, network, world=world, method=method), []
    weights_after(trainer, 2)
    return torch.stack(Dropping.masks)


def all_cases(tmp_path, world, **given_):
    found = {}
    for name, (options, network, steps) in CASES.items():
        trainer = trainer_of(tmp_path, network, world=world, **options, **given_)
        methods = ["fd", "none", "exact"] if name == "alternating" else None
        found[name] = weights_after(trainer, steps, methods)
    return found


@pytest.mark.parametrize("method", ["fd"])
def test_passes_of_a_step_share_their_draw_and_nothing_else_does(job, method):
    """Both passes drop the same; steps and processes drop differently; and a step again, the same again."""
    folder, found = job
    for masks in (masks_of(folder, runs.World("cpu"), method), *(part[f"masks {method}"] for part in found)):
        first, again, second, second_again = masks
        assert torch.equal(first, again)
        assert torch.equal(second, second_again)
        assert not torch.equal(first, second)
    assert not torch.equal(found[0][f"masks {method}"], found[1][f"masks {method}"])
    assert torch.equal(masks_of(folder, runs.World("cpu"), method), masks_of(folder, runs.World("cpu"), method))


def canaries(tmp_path, world):
    """What torch makes of static_graph=True: of our one module, and of two forwards and an input gradient."""
    trainer = trainer_of(tmp_path, plain, world=world, method="fd")
    trainer.objective = nn.parallel.DistributedDataParallel(trainer.objective.module, static_graph=True)
    ours = weights_after(trainer, 4)
    torch.manual_seed(0)
    network = plain().double()
    wrapped = nn.parallel.DistributedDataParallel(network, static_graph=True)
    images, labels = torch.rand(16, 3, 6, 6).double(), torch.arange(16) % 4
    mine = slice(world.rank * 16 // world.size, (world.rank + 1) * 16 // world.size)
    with contextlib.suppress(RuntimeError):
        fd_penalty(lambda z: cross_entropy(wrapped(z), labels[mine]), images[mine], norm="l2", h=0.1).objective(
            1
        ).backward()
    return {"ours": ours, "naive": torch.cat([p.grad.flatten() for p in network.parameters()])}


def process(rank, size, folder):
    """One process of a job: every case, its weights written to a file."""
    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    world = runs.World("cpu")
    found = all_cases(folder, world) | canaries(folder, world)
    found |= {f"masks {method}": masks_of(folder, world, method) for method in ("fd",)}
    torch.save(found, folder / f"{size}-{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module", params=[2, pytest.param(4, marks=pytest.mark.slow)])
def job(request, tmp_path_factory):
    """The weights that each process of a job of 2 or 4 found."""
    import socket

    folder, size = tmp_path_factory.mktemp("job"), request.param
    with socket.socket() as free, pytest.MonkeyPatch.context() as monkeypatch:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        free.close()
        # Forked, they have imported everything already; but not after a long test that has started autograd's threads.
        how = "fork" if size == 2 else "spawn"
        torch.multiprocessing.start_processes(process, (size, folder), nprocs=size, start_method=how)
    return folder, [torch.load(folder / f"{size}-{rank}.pt", weights_only=True) for rank in range(size)]


def test_any_number_of_processes_computes_the_same(job):
    """In float64, every method; with batch normalization, whose statistics are of a part, the parts of one process."""
    folder, found = job
    world = runs.World("cpu")
    whole, parts = all_cases(folder, world), all_cases(folder, world, parts=len(found))
    for name in CASES:
        expected = (parts if "batch norm" in name else whole)[name]
        for rank, weights_ in enumerate(found):
            assert torch.allclose(weights_[name], expected, rtol=1e-9, atol=1e-11), (name, rank)
    assert (whole["fd, batch norm"] - parts["fd, batch norm"]).abs().max() > 1e-4  # the distinction is real


def test_static_graph_does_not_hurt_the_one_module(job):
    folder, found = job
    expected = weights_after(trainer_of(folder, plain, world=runs.World("cpu"), method="fd"), 4)
    for weights_ in found:
        torch.testing.assert_close(weights_["ours"], expected, rtol=1e-9, atol=1e-11)


def test_two_forwards_under_static_graph_are_still_wrong(job):
    """The canary: the reason why one module holds the whole objective.  Where torch mends it, this test says so."""
    _, found = job
    if torch.allclose(found[0]["naive"], found[1]["naive"]):
        pytest.skip("torch now reduces the gradients of two forwards under static_graph")


# --- ImageNet's recipe, small -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Twelve images of 12 classes, of several shapes, larger than what is held in memory."""
    root, generator = tmp_path_factory.mktemp("photographs"), np.random.default_rng(0)
    shapes = [(80, 80), (80, 120), (120, 80), (90, 200)]
    for part, count in (("train", 2), ("val", 1)):
        for label in range(12):
            (root / part / f"n{label:02}").mkdir(parents=True)
            for i in range(count):
                small_ = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
                image = Image.fromarray(small_).resize(shapes[(label + i) % 4][::-1])
                image.save(root / part / f"n{label:02}" / f"{i}.jpg")
    return root


def coarse(classes, channels=3):
    """A network for large images that costs next to nothing."""
    return nn.Sequential(nn.AvgPool2d(16), *small(classes, channels))


SHRUNK = ["imagenet", "--model", "cnn", "--epochs", 3, "--batch-size", 8, "--lr", 0.01]


def test_the_imagenet_recipe_goes_through_its_phases_and_resumes_across_them(monkeypatch, tmp_path, photographs):
    monkeypatch.setattr(models, "cnn", coarse)
    shapes, tested = [], set()

    class Spy(train.Objective):
        def forward(self, images, *others):
            shapes.extend([tuple(images.shape)] * self.network.training)
            return super().forward(images, *others)

    evaluation_batches = data.evaluation_batches

    def spied(*arguments, **options):
        for images, labels in evaluation_batches(*arguments, **options):
            tested.add(images.shape[2:])
            yield images, labels

    small_ = [*SHRUNK, "--data-dir", photographs, "--runs", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(train, "Objective", Spy)
        patched.setattr(train, "try_out", lambda *_: [])
        patched.setattr(data, "evaluation_batches", spied)
        assert command(monkeypatch, *small_, "--name", "whole") == 0
    run = tmp_path / "whole"
    # 24 images: 3 batches of 8 at 128 pixels, 8 of 3 at 224, 12 of 2 at 288
    assert shapes == [(8, 3, 128, 128)] * 3 + [(3, 3, 224, 224)] * 8 + [(2, 3, 288, 288)] * 12
    assert tested == {(128, 128), (224, 224), (288, 288)}
    assert [r["step"] for r in records(run, "epoch")] == [3, 11, 23]
    phases = [e["message"] for e in records(run, "event") if e["event"] == "phase"]
    assert phases == [
        f"epoch {i}: {s} pixels, {b} images a step" for i, s, b in ((0, 128, 8), (1, 224, 3), (2, 288, 2))
    ]
    for record in records(run, "epoch"):
        assert 0 <= record["top5_error_pct"] <= record["clean_error_pct"] <= 100
    real = train.Plan.rate
    begin = [*small_, "--name", "died"]
    for last in (2, 4, 11):  # dies in the first phase, after the first change of size, and just after the second

        def dies(self, step, last=last):
            if step == last:
                raise Crash
            return real(self, step)

        with monkeypatch.context() as patched:
            patched.setattr(train.Plan, "rate", dies)
            with pytest.raises(Crash):
                command(patched, *begin)
        begin = ["--resume", tmp_path / "died"]
    assert command(monkeypatch, *begin) == 0
    resumes = [e["message"] for e in records(tmp_path / "died", "event") if e["event"] == "resume"]
    assert len(resumes) == 3
    a, b = weights(run), weights(tmp_path / "died")
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_unreadable_images_are_named_and_skipped(monkeypatch, tmp_path, photographs):
    import shutil

    monkeypatch.setattr(models, "cnn", coarse)
    root = shutil.copytree(photographs, tmp_path / "damaged")
    damaged = [root / "train/n03/0.jpg", root / "val/n05/0.jpg"]
    for path in damaged:
        path.write_bytes(path.read_bytes()[:300])
    small_ = [*SHRUNK, "--data-dir", root, "--epochs", 1, "--runs", tmp_path]
    assert command(monkeypatch, *small_) == 0
    warnings = [e["message"] for e in records(tmp_path / "latest", "event") if e["event"] == "warning"]
    assert len(warnings) == 2
    for path in damaged:
        assert sum(str(path) in warning for warning in warnings) == 1


COMPILED = """
import models
from torch._functorch import config

config.donated_buffer = False  # the penalty goes twice through the graph of l(x)


def eager(classes): return models.cnn(classes)


def compiled(classes):
    network = models.cnn(classes)
    network.compile()
    return network
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["none", "fd"])
def test_a_network_that_its_file_compiles_trains_the_same(monkeypatch, tmp_path, method):
    (tmp_path / "net.py").write_text(COMPILED)
    small_ = ["digits", "--subset", 100, "--batch-size", 10, "--epochs", 1, "--method", method, "--runs", tmp_path]
    for name in ("eager", "compiled"):
        assert command(monkeypatch, *small_, "--name", name, "--model", tmp_path / f"net.py:{name}") == 0
    a, b = weights(tmp_path / "eager"), weights(tmp_path / "compiled")
    assert a.keys() == b.keys()
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)


def test_channels_last_is_a_layout_and_nothing_else(monkeypatch, tmp_path):
    small_ = ["digits", "--subset", 100, "--batch-size", 10, "--epochs", 1, "--runs", tmp_path]
    for name, more in (("rows", []), ("last", ["--channels-last"])):
        assert command(monkeypatch, *small_, "--name", name, *more) == 0
    a, b = weights(tmp_path / "rows"), weights(tmp_path / "last")
    for name in a:
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=1e-5)
    assert b["2.weight"].is_contiguous(memory_format=torch.channels_last)


def test_the_rows_of_the_tables_are_the_papers():
    """benchmarks/tables.py trains what report.py takes for the paper's rows, and all of them."""
    import report
    from benchmarks import tables

    source = data.InMemory(torch.zeros(1024, 3, 2, 2, dtype=torch.uint8), torch.zeros(1024, dtype=torch.int64))
    images = data.Data(source, source, list("ab"), 3)
    rows = tables.rows_of("cifar10")
    for row in rows:
        given_ = {flag[2:]: value for flag, value in zip(row.options[::2], row.options[1::2], strict=True)}
        numbers = {name: train.fraction(given_[name]) for name in ("lam", "h", "eps") if name in given_}
        numbers |= {"replays": int(given_["replays"])} if "replays" in given_ else {}
        given_ |= numbers
        train.check_given(given_)
        options = train.resolve({"dataset": "cifar10"} | given_, images, runs.World("cpu"))
        known = report.paper_model(asdict(options), "cifar10")
        assert {name for table, name in row.paper.items() if table not in (4, 5)} <= {known}
    imagenet = asdict(train.RECIPES["imagenet"])
    known = {report.paper_model(imagenet | other, "imagenet") for other in ({"lam": 0.051}, {"method": "none"}, {})}
    assert (
        known == {"squared l2 lambda=1", "undefended", "squared l2 lambda=0.1"} <= {*report.paper_rows("2", "imagenet")}
    )
    for other in ({"lr": 10.0}, {"batch_size": 8}, {"method": "exact"}, {"epochs": 1}):
        assert report.paper_model(imagenet | other, "imagenet") not in report.paper_rows("2", "imagenet")
    for table in (1, 2, 3, 4, 6):
        assert {row.paper[table] for row in rows if table in row.paper} == set(tables.papers(table))
    for table in range(1, 7):  # every column is one of the paper's
        wanted = {column.paper for column in tables.columns_of("cifar10", table)}
        assert all(wanted <= quantities.keys() for quantities in tables.papers(table).values())
