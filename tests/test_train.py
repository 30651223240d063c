"""Training: what a run writes, that it can be killed anywhere, that processes do not matter, what it refuses."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import data
import models
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["digits", "--subset", "200", "--batch-size", "10", "--epochs", "2"]  # 20 steps an epoch
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


def command(monkeypatch, *arguments):
    """Run train.py's command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return runs.run_command(train.main)


def records(run, kind=None):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if kind in (None, line["kind"])]


def weights(run):
    return models.read_checkpoint(run / "checkpoint.pt")["model"]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """An uninterrupted run, to compare with."""
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *SMALL, "--runs", root, "--name", "whole") == 0
    return root / "whole"


# --- the run directory ------------------------------------------------------------------------------------


def test_a_run_writes_what_the_readme_documents(whole):
    config = json.loads((whole / "config.json").read_text())
    assert (config["steps_per_epoch"], config["steps_total"], config["images_train"]) == (20, 40, 200)
    assert config["options"]["method"] == "fd"
    steps, epochs, events = (records(whole, kind) for kind in ("step", "epoch", "event"))
    assert [r["step"] for r in steps] == [10, 20, 30, 40]
    assert [r["step"] for r in epochs] == [20, 40]
    for r in steps:
        assert {"loss", "penalty", "grad_norm_mean", "grad_norm_max", "fd_error_pct", "lr", "images_per_s"} <= r.keys()
        assert 0 < r["grad_norm_mean"] <= r["grad_norm_max"]
    for r in epochs:
        assert 0 <= r["clean_error_pct"] <= r["attacked_error_pct"] + 20
        assert r["fd_rounding_pct"] < 5
        assert len(r["omega"]) == len(config["omega_eps"])
        assert 0 < r["margin_grad_norm_mean"] <= r["margin_grad_norm_max"]
    assert [e["event"] for e in events] == ["start", "checkpoint", "checkpoint", "checkpoint", "finish"]
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["step"], status["error"]) == ("finished", 40, None)
    assert os.readlink(whole.parent / "latest") == "whole"
    assert models.load(whole)(torch.rand(3, 1, 8, 8)).shape == (3, 10)


def test_every_field_of_every_record_is_in_the_readme(whole):
    text = (ROOT / "README.md").read_text()
    for record in records(whole):
        for name in record:
            assert f"`{name}`" in text, f"{record['kind']} records have {name}, README.md does not"


def test_records_are_strict_json_and_name_what_is_not_finite(tmp_path):
    run = runs.Run(tmp_path, runs.World("cpu"))
    run.record("step", loss=math.nan, penalty=math.inf, omega=[0.5, math.nan], lr=0.1)
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    record = json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} in the log"))
    assert (record["loss"], record["penalty"], record["omega"], record["lr"]) == (None, None, None, 0.1)
    assert record["nonfinite"] == ["loss", "penalty", "omega"]


def test_half_a_line_left_by_a_killed_process_stays_alone(tmp_path):
    (tmp_path / "metrics.jsonl").write_bytes(b'{"kind": "step", "lo')
    runs.Run(tmp_path, runs.World("cpu")).record("event", event="resume", message="")
    assert json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[1])["event"] == "resume"


def test_the_penalty_in_the_log_is_what_is_added_to_the_loss(monkeypatch, tmp_path):
    seen = []

    class Spy(train.Objective):
        def forward(self, images, labels):
            out = super().forward(images, labels)
            seen.append(out.objective(0.5).item())
            return out

    monkeypatch.setattr(train, "Objective", Spy)
    assert command(monkeypatch, *SMALL, "--epochs", 1, "--lam", 0.5, "--runs", tmp_path) == 0
    logged = [r["loss"] + r["penalty"] for r in records(tmp_path / "latest", "step")]
    expected = [sum(seen[i : i + 10]) / 10 for i in (0, 10)]
    assert logged == pytest.approx(expected, rel=1e-5)


# --- the objective ----------------------------------------------------------------------------------------


def test_schedule_of_the_cifar_recipe_is_the_papers():
    schedule = train.RECIPES["cifar10"]["schedule"]
    rates = {epoch: train.learning_rate(schedule, epoch) for epoch in (0, 59.9, 60, 119.9, 120, 160, 199.9)}
    expected = {0: 0.1, 59.9: 0.1, 60: 0.02, 119.9: 0.02, 120: 0.004, 160: 0.0008, 199.9: 0.0008}
    assert rates == pytest.approx(expected)
    assert train.learning_rate([(0, 1.0, 3.0), (10, 0, 0)], 2.5) == pytest.approx(1.5)


def test_epochs_and_lr_stretch_and_scale_the_schedule(whole):
    rates = [r["lr"] for r in records(whole, "step")]
    assert rates == pytest.approx([0.05, 0.01, 0.002, 0.0004])  # 10, 20, 30, 40 of 40 steps: rates of the step before


@pytest.mark.parametrize("method", ["exact", "jvp"])
def test_exact_methods_follow_the_same_path(monkeypatch, tmp_path, method):
    """With a tiny step, the finite difference trains (nearly) the network of its exact twins."""
    small = [*SMALL, "--epochs", 1, "--runs", tmp_path, "--activation", "gelu", "--lam", 0.1]
    assert command(monkeypatch, *small, "--h", 0.003, "--central", "--name", "fd") == 0
    assert command(monkeypatch, *small, "--method", method, "--name", method) == 0
    a, b = (torch.cat([w.flatten() for w in weights(tmp_path / name).values()]) for name in ("fd", method))
    assert (a - b).norm() < 1e-2 * a.norm()
    assert not torch.equal(a, b)


def with_batch_normalization(classes, channels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes))


@pytest.mark.parametrize("method", ["none", "fd"])
def test_looking_at_a_run_does_not_change_it(monkeypatch, tmp_path, method):
    """Records, probes and checkpoints leave weights and running statistics alone."""
    monkeypatch.setattr(models, "cnn", with_batch_normalization)
    small = [*SMALL, "--method", method, "--runs", tmp_path]
    assert command(monkeypatch, *small, "--name", "often", "--checkpoint-minutes", 1e-9) == 0
    monkeypatch.setattr(train, "LOG_EVERY", 7)
    assert command(monkeypatch, *small, "--name", "seldom") == 0
    assert same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))


# --- killed, stopped, damaged -----------------------------------------------------------------------------


class Crash(Exception):
    pass


def dying_after(steps, real=train.Plan.rate):
    left = iter(range(steps))

    def rate(self, step):
        if next(left, None) is None:
            raise Crash
        return real(self, step)

    return rate


def test_noise_training_adds_that_noise_to_the_images(monkeypatch, tmp_path):
    seen = {}

    class Spy(train.Objective):
        def forward(self, images, labels):
            seen.setdefault(self.method, []).append(images.clone())
            return super().forward(images, labels)

    monkeypatch.setattr(train, "Objective", Spy)
    small = [*SMALL, "--epochs", 1, "--runs", tmp_path]
    for method, more in (("none", []), ("noise", ["--sigma", 0.3])):
        assert command(monkeypatch, *small, "--method", method, *more) == 0
    added = torch.stack([a - b for a, b in zip(seen["noise"], seen["none"], strict=True)])
    assert added.std().item() == pytest.approx(0.3, rel=0.03)
    assert abs(added.mean().item()) < 0.01
    assert not torch.equal(added[0], added[1])


@pytest.mark.parametrize("step", [1, 9, 10, 19, 20, 21, 33, 39])
def test_a_run_that_dies_at_any_step_ends_as_if_it_had_not(monkeypatch, tmp_path, whole, step):
    real = train.Meter.add

    def dies(self, out):
        real(self, out)
        dies.count += 1
        if dies.count == step:
            raise Crash

    dies.count = 0
    monkeypatch.setattr(train.Meter, "add", dies)
    with pytest.raises(Crash):
        command(monkeypatch, *SMALL, "--runs", tmp_path, "--name", "a", "--checkpoint-minutes", 1e-9)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "failed"
    monkeypatch.setattr(train.Meter, "add", real)
    assert command(monkeypatch, "--resume", tmp_path / "a") == 0
    assert same(weights(tmp_path / "a"), weights(whole))
    resumed = [e["step"] for e in records(tmp_path / "a", "event") if e["event"] == "resume"]
    assert resumed == [10 * ((step - 1) // 10) if step % 10 else 10 * (step // 10 - 1)]
    # Without the work that was lost, the log is that of the uninterrupted run.
    kept = {r["step"]: r["loss"] for r in records(tmp_path / "a", "step")}
    assert kept == {r["step"]: r["loss"] for r in records(whole, "step")}


def started(*arguments):
    line = [sys.executable, str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition, process, seconds=120):
    deadline = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)


def has_step(run, step):
    def reached():
        try:
            return any(r["step"] >= step for r in records(run, "step"))
        except (OSError, ValueError):
            return False

    return reached


LONGER = ["digits", "--subset", "200", "--batch-size", "10", "--epochs", "5"]  # 100 steps


@pytest.fixture(scope="module")
def longer(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *LONGER, "--runs", root, "--name", "longer") == 0
    return root / "longer"


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_killed_process_is_resumed_bit_for_bit(monkeypatch, tmp_path, longer, signum, code):
    run = tmp_path / "run"
    process = started(*LONGER, "--runs", tmp_path, "--name", "run", "--checkpoint-minutes", 1e-9)
    wait_for(has_step(run, 30), process)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == code
    assert models.read_checkpoint(run / "checkpoint.pt")["step"] < 100, "the run ended before it could be stopped"
    if signum != signal.SIGKILL:
        assert stderr.splitlines()[-1].startswith("train.py: stopped by SIG")
        assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(longer))


def copy_of(run, tmp_path):
    import shutil

    return Path(shutil.copytree(run, tmp_path / "copy"))


def test_a_damaged_checkpoint_gives_way_to_the_one_before(monkeypatch, tmp_path, whole, capsys):
    run = copy_of(whole, tmp_path)
    content = (run / "checkpoint.pt").read_bytes()
    (run / "checkpoint.pt").write_bytes(content[: len(content) // 2])
    assert command(monkeypatch, "--resume", run) == 0
    assert "going on from the one before it, of step 20" in capsys.readouterr().out
    assert same(weights(run), weights(whole))
    assert any(e["event"] == "warning" for e in records(run, "event"))


@pytest.mark.parametrize("content", [b"", b"garbage", b"PK\x03\x04garbage"])
def test_no_whole_checkpoint_is_one_line_and_changes_nothing(monkeypatch, tmp_path, whole, capsys, content):
    run = copy_of(whole, tmp_path)
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        (run / name).write_bytes(content)
    before = {file: file.read_bytes() for file in run.iterdir()}
    assert command(monkeypatch, "--resume", run) == 2
    assert one_line(capsys).endswith("and there is no earlier one")
    assert {file: file.read_bytes() for file in run.iterdir()} == before


def test_a_foreign_checkpoint_is_refused(monkeypatch, tmp_path, whole, capsys):
    run = copy_of(whole, tmp_path)
    state = models.read_checkpoint(run / "checkpoint.pt")
    torch.save(state | {"model": {"weight": torch.zeros(2)}, "step": 20}, run / "checkpoint.pt")
    assert command(monkeypatch, "--resume", run) == 2
    assert "does not fit its run" in one_line(capsys)


def test_a_finished_run_has_nothing_to_resume(monkeypatch, tmp_path, whole):
    run = copy_of(whole, tmp_path)
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))
    assert len(records(run)) == len(records(whole))


def test_a_run_that_diverges_says_so_and_keeps_a_finite_checkpoint(monkeypatch, tmp_path, capsys):
    assert command(monkeypatch, *SMALL, "--lr", 1e6, "--runs", tmp_path, "--name", "wild") == 3
    assert "diverged: the loss is not finite at step" in one_line(capsys)
    assert all(w.isfinite().all() for w in weights(tmp_path / "wild").values())
    status = json.loads((tmp_path / "wild/status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite" in status["error"]
    assert records(tmp_path / "wild", "step")[-1]["nonfinite"]


# --- several processes ------------------------------------------------------------------------------------


def torchrun(processes, *arguments):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    line += [str(ROOT / "train.py"), *map(str, arguments)]
    return subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.parametrize("method", ["noise", "at l2", "at linf"])
def test_two_processes_draw_what_one_draws(monkeypatch, method):
    images = torch.full((8, 1, 4, 4), 0.5)
    monkeypatch.setattr(train, "adversarial", lambda network, images, labels, starts, options: starts)

    def drawn(rank, size, share):
        world = runs.World("cpu")
        world.rank, world.size = rank, size
        trainer = train.Trainer.__new__(train.Trainer)
        trainer.options = {"seed": 3, "sigma": 0.5, "eps": 0.1, "method": method.split()[0], "norm": method.split()[-1]}
        trainer.step, trainer.world, trainer.network, trainer.free = 7, world, None, None
        return trainer._inputs(share, None)

    both = torch.cat([drawn(rank, 2, images[:4]) for rank in range(2)])
    assert torch.equal(both, drawn(0, 1, images))
    assert not torch.equal(both[0], both[1])


def test_two_processes_train_the_network_of_one_and_log_once(tmp_path, whole):
    done = torchrun(2, *SMALL, "--runs", tmp_path, "--name", "two")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == 1
    for one, two in zip(records(whole), records(tmp_path / "two"), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        for name in ("loss", "penalty", "grad_norm_mean", "grad_norm_max", "test_loss", "clean_error_pct"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-3), name
    one, two = weights(whole), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


# --- refusals: one line, exit code 2, nothing written -----------------------------------------------------


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "unknown data set 'mnist'"),
        (["imagenet", "--data-dir", "/nonexistent"], "no folder train in it"),
        (["digits", "--method", "magic"], "--method"),
        (["digits", "--norm", "l7"], "--norm"),
        (["digits", "--h", "0"], "--h must be positive, not 0"),
        (["digits", "--method", "noise", "--sigma", "0"], "--sigma must be positive"),
        (["digits", "--h", "nan"], "--h must be positive, not nan"),
        (["digits", "--lam", "-1"], "--lam must be 0 or more"),
        (["digits", "--lr", "-0.1"], "--lr must be positive"),
        (["digits", "--epochs", "0"], "--epochs must be positive"),
        (["digits", "--epochs", "many"], "--epochs"),
        (["digits", "--batch-size", "5000"], "there are only 1000 training images"),
        (["digits", "--subset", "0"], "--subset"),
        (["digits", "--seed", "-1"], "--seed"),
        (["digits", "--model", "resnext34"], "colour images"),
        (["digits", "--device", "abacus"], "--device abacus: no such device"),
        (["digits", "--frobnicate"], "--frobnicate"),
        (["--method", "none"], "name its data set too"),
        (["digits", "cifar10"], "cifar10"),
        (["--resume", "/nonexistent/run"], "no such run"),
        (["digits", "--resume", "/nonexistent/run", "--lam", "2"], "leave out --lam, DATASET"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_name_that_other_options_have_taken_is_refused_and_untouched(monkeypatch, whole, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.iterdir()}
    for other in (["--lam", 2], ["--epochs", 3], ["--method", "none"]):
        assert command(monkeypatch, *SMALL, *other, "--runs", whole.parent, "--name", "whole") == 2
        assert re.search(r"exists, with other options \(.*\); choose another name", one_line(capsys))
    (whole.parent / "mine").mkdir(exist_ok=True)
    assert command(monkeypatch, *SMALL, "--runs", whole.parent, "--name", "mine") == 2
    assert "mine exists, with no run in it" in one_line(capsys)
    assert {file: file.stat().st_mtime_ns for file in whole.iterdir()} == before


def test_the_same_command_again_goes_on(monkeypatch, tmp_path, whole, capsys):
    """What a requeued job does: the run ends as if it had not been stopped, and then nothing more happens."""
    small = [*SMALL, "--runs", tmp_path, "--name", "a", "--checkpoint-minutes", 1e-9]
    for steps in (15, 15, 3):  # dies after as many
        with monkeypatch.context() as patched:
            patched.setattr(train.Plan, "rate", dying_after(steps))
            with pytest.raises(Crash):
                command(monkeypatch, *small)
    assert command(monkeypatch, *small) == 0
    assert "was begun with the same options: going on with it" in capsys.readouterr().out
    assert same(weights(tmp_path / "a"), weights(whole))
    lines = records(tmp_path / "a")
    assert command(monkeypatch, *small) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert records(tmp_path / "a") == lines


def test_a_run_that_is_being_trained_cannot_be_resumed_beside(monkeypatch, tmp_path, whole, capsys):
    run = copy_of(whole, tmp_path)
    import socket

    status = {"state": "running", "host": socket.gethostname(), "pid": os.getppid()}
    (run / "status.json").write_text(json.dumps(status))
    assert command(monkeypatch, "--resume", run) == 2
    assert "is still working on it" in one_line(capsys)


def test_an_unreadable_image_is_named(monkeypatch, tmp_path, capsys):
    from PIL import Image

    for part in ("train", "test"):
        for name in ("cat", "dog"):
            (tmp_path / "images" / part / name).mkdir(parents=True)
            Image.new("RGB", (32, 32)).save(tmp_path / "images" / part / name / "0.png")
    (tmp_path / "images/train/dog/0.png").write_bytes(b"nothing")
    assert command(monkeypatch, tmp_path / "images", "--runs", tmp_path / "runs") == 2
    assert "train/dog/0.png: not a readable image" in one_line(capsys)


def test_help_is_not_an_error(monkeypatch, capsys):
    assert command(monkeypatch, "--help") == 0
    assert "--checkpoint-minutes" in capsys.readouterr().out


# --- what it is for ---------------------------------------------------------------------------------------


def test_the_penalty_buys_robustness(monkeypatch, tmp_path, capsys):
    """The default command with fewer epochs: clearly fewer errors under attack, and not at the cost of clean ones."""
    monkeypatch.setattr(train, "PROBE_IMAGES", 100)
    assert command(monkeypatch, "--epochs", 12, "--subset", 500, "--batch-size", 25, "--runs", tmp_path) == 0
    none, fd = (records(tmp_path / name, "epoch")[-1] for name in ("digits-none-seed0", "digits-fd-l2-lam1-seed0"))
    assert fd["attacked_error_pct"] < 0.8 * none["attacked_error_pct"]
    assert fd["clean_error_pct"] < none["clean_error_pct"] + 8  # 500 images, 12 epochs: it differs by machine
    assert "undefended" in capsys.readouterr().out


def test_images_of_the_recipes_exist():
    assert set(train.RECIPES) == {"digits", "cifar10", "imagenet"}
    assert data.load("digits", subset=20).small
