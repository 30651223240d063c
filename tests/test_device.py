"""What must hold on any device: against closed forms, and against the same on the CPU.

On the device that GRADREG_TEST_DEVICE names; benchmarks/gpu.sh runs these on CUDA.
"""

import copy
import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from oracle import closed_form, linear
from PIL import Image
from torch import nn

import attacks
import bounds
import data
import gradreg
import models
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
NORMS = ("l2", "linf", "l1")
CPU = torch.device("cpu")


def seeded(seed, device=CPU):
    return torch.Generator(device).manual_seed(seed)


def smooth_case(device):
    """A smooth network in float64, its loss, and images."""
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(64, 3)
    network, labels = nn.Sequential(*layers).double().to(device), (torch.arange(6) % 3).to(device)
    images = torch.rand(6, 2, 6, 6, generator=seeded(1), dtype=torch.float64).to(device)
    return network, lambda z: gradreg.cross_entropy(network(z), labels), images


PENALTIES = {
    "fd": lambda loss_fn, x, norm: gradreg.fd_penalty(loss_fn, x, norm=norm, h=1e-5),
    "exact": lambda loss_fn, x, norm: gradreg.exact_penalty(loss_fn, x, norm=norm),
}


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("method", PENALTIES)
def test_penalties_and_their_weight_gradients_are_those_of_double_backpropagation_on_the_cpu(device, method, norm):
    def found(on, penalty):
        network, loss_fn, images = smooth_case(on)
        out = penalty(loss_fn, images, norm)
        grads = torch.autograd.grad(out.objective(1.0), list(network.parameters()))
        return [out.losses.detach(), out.penalties.detach(), *grads]

    for ours, exact in zip(found(device, PENALTIES[method]), found(CPU, PENALTIES["exact"]), strict=True):
        assert ours.device.type == device.type
        torch.testing.assert_close(ours.cpu(), exact, rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("norm", NORMS)
def test_draws_from_a_ball_lie_in_it_and_follow_the_devices_generator(device, norm):
    like = torch.zeros(50, 3, 4, 4, device=device)
    first, again, other = (gradreg.uniform_ball(like, norm, seeded(seed, device)) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    lengths = gradreg.vector_norm(first, norm)
    assert lengths.max() <= 1 + 1e-5
    assert lengths.max() > 0.8


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_nearest_adversarial_image_of_a_linear_classifier_and_the_bounds_below_it(device, norm):
    model = linear(seeded(0), 10, 64).to(device)
    images = 0.3 + 0.4 * torch.rand(12, 64, generator=seeded(1)).to(device)
    labels = model(images).argmax(1)
    exact = closed_form(copy.deepcopy(model).cpu(), images.cpu(), labels.cpu(), norm)
    found = attacks.smallest(model, images, labels, norm=norm, generator=seeded(0, device))
    assert found.distances.device.type == device.type
    distances = found.distances.cpu()
    assert (distances >= exact * (1 - 1e-5)).all()
    assert (distances <= exact * 1.01 + 1e-5).all()
    estimate = bounds.estimate_by_ascent(model, images, labels, norm=norm)
    margins = bounds.margins(model, images, labels, norm=norm)
    for bound in (bounds.omega_bound(margins, estimate), bounds.lipschitz_bound(margins, estimate)):
        assert (bound.cpu() <= exact * (1 + 1e-4) + 1e-6).all()
        assert (bound > 0).any()
    few = {"eps": estimate.eps, "blocks": 6, "block_size": 4, "generator": seeded(0, device)}
    maxima = bounds.sample_maxima(model, images, labels, norm=norm, **few)
    assert bounds.estimate_by_sampling(maxima, estimate.eps, norm=norm).lipschitz > 0


def test_a_smoothed_classifier_is_certified(device):
    model = linear(seeded(0), 3, 16).to(device)
    images = torch.rand(4, 16, generator=seeded(1)).to(device)
    found = bounds.certify_smoothing(model, images, sigma=0.1, n0=20, n=200, generator=seeded(0, device))
    assert found.radii.cpu().isfinite().all()


@pytest.mark.parametrize("model", ["cnn", "resnet9-narrow", "resnext34", "resnet50"])
def test_a_network_and_its_input_gradient_are_those_of_the_cpu(device, model):
    """In float32, without TF32."""
    train.set_precision(train.Options(method="fd", h=0.01))
    size = 8 if model == "cnn" else 32
    torch.manual_seed(0)
    network, images = models.build(model, classes=10).eval(), torch.rand(2, 3, size, size, generator=seeded(1))
    labels = torch.tensor([1, 2])

    def found(on):
        there = copy.deepcopy(network).to(on)
        losses, grad = gradreg.input_gradient(lambda z: gradreg.cross_entropy(there(z), labels.to(on)), images.to(on))
        return torch.cat([losses.cpu(), grad.cpu().flatten() / grad.abs().max().item()])

    torch.testing.assert_close(found(device), found(CPU), rtol=2e-3, atol=2e-3)


def command(monkeypatch, *arguments):
    monkeypatch.setattr(train, "PROBE_IMAGES", 20)
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return runs.run_command(train.main)


@pytest.mark.parametrize("method", ["fd", "exact", "ascent", "none", "noise", "at", "free"])
def test_a_run_trains_resumes_and_loads(monkeypatch, tmp_path, device, method):
    """Its first losses are those of a run on the CPU, where it draws nothing on the device."""
    replays = ["--replays", 2] if method == "free" else []
    small = ["digits", "--subset", 60, "--batch-size", 20, "--method", method, *replays, "--runs", tmp_path]
    assert command(monkeypatch, *small, "--epochs", 2, "--name", "here", "--device", device) == 0
    assert command(monkeypatch, "--resume", tmp_path / "here", "--device", device) == 0
    assert json.loads((tmp_path / "here/status.json").read_text())["state"] == "finished"

    def losses(name):
        lines = map(json.loads, (tmp_path / name / "metrics.jsonl").read_text().splitlines())
        return [line["loss"] for line in lines if line["kind"] == "step"]

    if method not in {"noise", "at"}:
        assert command(monkeypatch, *small, "--epochs", 2, "--name", "cpu", "--device", "cpu") == 0
        assert losses("here") == pytest.approx(losses("cpu"), rel=1e-2)
    logits = models.load(tmp_path / "here")(torch.rand(2, 1, 8, 8))
    assert logits.shape == (2, 10)


def test_batches_in_memory_and_from_files_are_the_same_on_the_device(tmp_path, device):
    generator = np.random.default_rng(0)
    for size in (32, 100):
        for part in ("train", "test"):
            for name in "ab":
                (tmp_path / str(size) / part / name).mkdir(parents=True)
                for i in range(4):
                    pixels = generator.integers(0, 256, (size, size, 3), dtype=np.uint8)
                    Image.fromarray(pixels).save(tmp_path / str(size) / part / name / f"{i}.png")
        source = data.load(str(tmp_path / str(size))).train
        how = {"batch_size": 4, "seed": 0, "epoch": 1}
        here = list(data.training_batches(source.to(device), device=device, workers=2, **how))
        there = list(data.training_batches(source, device=CPU, **how))
        for (x, y), (x2, y2) in zip(here, there, strict=True):
            assert x.device.type == device.type
            torch.testing.assert_close(x.cpu(), x2, rtol=0, atol=1e-6)
            assert torch.equal(y.cpu(), y2)


# --- benchmarks/gpu.sh ------------------------------------------------------------------------------------

TINY = {
    "TESTS": "-k certified",
    "COST": "--size 8 --batch-size 2 --repeats 1 --model resnet9-narrow",
    "WAYS": "float32 bfloat16+channels_last",
    "FAST": "--recipe fast --model resnet9-narrow --subset 16 --batch-size 8 --epochs 1",
    "LARGE": "--model cnn --subset 16 --batch-size 8 --epochs 1",
    "ATTACKED": "--images 4 --calibration 0 --audit-images 2 --norm l2 --attack pgd --blocks 0",
}


def script(tmp_path, **variables):
    own = {"CIFAR": str(tmp_path / "cifar"), "OUT": str(tmp_path / "out"), "PYTHON": sys.executable, "DEVICE": "cpu"}
    return subprocess.run(
        ["bash", ROOT / "benchmarks/gpu.sh"], env=os.environ | own | variables, capture_output=True, text=True
    )


@pytest.mark.parametrize("variables", [{}, TINY])
def test_every_command_of_the_script_is_understood(monkeypatch, tmp_path, variables):
    import evaluate
    from benchmarks import penalty

    source = data.InMemory(torch.zeros(1024, 3, 2, 2, dtype=torch.uint8), torch.zeros(1024, dtype=torch.int64))
    images = data.Data(source, source, list("ab"), 3)
    done = script(tmp_path, DRY="1", **variables)
    assert (done.returncode, done.stderr) == (0, "")
    programs = {"train.py": train.main, "evaluate.py": evaluate.main, "benchmarks/penalty.py": penalty.main}
    commands = [shlex.split(line)[1:] for line in done.stdout.splitlines()]
    assert [line[0] for line in commands] == ["-m", *["benchmarks/penalty.py"] * 2, *["train.py"] * 3, "evaluate.py"]
    for program, *arguments in commands[1:]:
        app = typer.Typer(add_completion=False)
        app.command()(programs[program])
        context = typer.main.get_command(app).make_context(program, arguments)
        if program == "train.py":
            given = {name: value for name, value in context.params.items() if value is not None}
            train.check_given(given)
            given = {name: given[name] for name in given if name in {f.name for f in fields(train.Options)}}
            train.resolve(given, images, runs.World("cpu"))
    assert not (tmp_path / "out").exists()


def test_without_its_images_the_script_says_what_is_missing(tmp_path):
    done = script(tmp_path, CIFAR="")
    assert done.returncode
    assert "CIFAR: is not set: the folder with" in done.stderr


@pytest.mark.slow
def test_the_script_runs_and_goes_on(tmp_path):
    """On the CPU, with tiny settings; a stage that failed is done again, one that ended well is not."""
    generator = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in map(str, range(10)):
            (tmp_path / "cifar" / part / name).mkdir(parents=True)
            for i in range(4):
                pixels = generator.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "cifar" / part / name / f"{i}.jpg")
    failing = script(tmp_path, **TINY | {"COST": "--model nonsense"})
    assert failing.returncode == 1
    assert "cost-resnext34: failed with exit code" in failing.stdout
    assert "## cost-resnet9: not to its end" in (tmp_path / "out/gpu.md").read_text()
    logs = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("*.log")}
    done = script(tmp_path, **TINY)
    assert done.returncode == 0, done.stdout + done.stderr
    changed = {path.name for path in (tmp_path / "out").glob("*.log") if path.stat().st_mtime_ns != logs[path.name]}
    assert changed == {"cost-resnext34.log", "cost-resnet9.log"}
    report = (tmp_path / "out/gpu.md").read_text()
    assert "not to its end" not in report
    assert re.search(r"fd +2\.\d\d x the operations +\d\.\d\d x the bytes +float32 +\d", report)
    assert "'device': 'cpu" in report
