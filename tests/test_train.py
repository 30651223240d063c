"""Training: what a run writes, that it can be killed anywhere, that processes do not matter, what it refuses."""

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import asdict, fields, replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from PIL import Image
from torch import nn

import attacks
import data
import evaluate
import models
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["digits", "--subset", "200", "--batch-size", "10", "--epochs", "2"]  # 20 steps an epoch
OFTEN = ["--checkpoint-minutes", "1e-9"]
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}


@pytest.fixture(autouse=True, scope="module")
def _shorter_looks():
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(train, "PROBE_IMAGES", 20)
        yield


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


def one_line(capsys):
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("train.py: ")
    return lines[0]


def copy_of(run, tmp_path):
    return Path(shutil.copytree(run, tmp_path / "copy"))


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
    assert config["class_names"] == [str(i) for i in range(10)]
    steps, epochs, events = (records(whole, kind) for kind in ("step", "epoch", "event"))
    assert [r["step"] for r in steps] == [1, 10, 20, 30, 40]
    assert [r["step"] for r in epochs] == [20, 40]
    for r in steps:
        assert {"loss", "penalty", "grad_norm_mean", "grad_norm_max", "fd_error_pct", "lr", "images_per_s"} <= r.keys()
        assert 0 < r["grad_norm_mean"] <= r["grad_norm_max"]
    for r in epochs:
        assert 0 <= r["clean_error_pct"] <= r["attacked_error_pct"] + 20
        assert len(r["omega"]) == len(config["omega_eps"])
        assert 0 < r["margin_grad_norm_mean"] <= r["margin_grad_norm_max"]
    assert [e["event"] for e in events] == ["start", "checkpoint", "checkpoint", "checkpoint", "finish"]
    status = json.loads((whole / "status.json").read_text())
    assert (status["state"], status["step"], status["error"]) == ("finished", 40, None)
    assert os.readlink(whole.parent / "latest") == "whole"
    assert models.load(whole)(torch.rand(3, 1, 8, 8)).shape == (3, 10)
    # The schedule is stretched to the epochs and follows them: the rates of the steps before.
    assert [r["lr"] for r in steps] == pytest.approx([0.05, 0.05, 0.01, 0.002, 0.0004])


def test_every_field_of_every_record_is_documented(whole):
    text = "".join(path.read_text() for path in (ROOT / "README.md", *ROOT.glob("docs/*.md")))
    for record in records(whole):
        for name in record:
            assert f"`{name}`" in text, f"{record['kind']} records have {name}, the documentation does not"


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


def spied(monkeypatch):
    """What Objective is given and what it returns, from here on: (method, images, scalar of eq. (8) at lam 0.5)."""
    seen = []

    class Spy(train.Objective):
        def forward(self, images, labels, lam):
            out = super().forward(images, labels, lam)
            seen.append((self.options.method, images.clone(), out.objective(0.5).item()))
            return out

    monkeypatch.setattr(train, "Objective", Spy)
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.setattr(train, "try_out", lambda *_: [])
    return seen


@pytest.mark.parametrize("part", [[], ["--penalty-share", 0.3], ["--penalty-share", 0.3, "--method", "ascent"]])
def test_the_penalty_in_the_log_is_what_is_added_to_the_loss(monkeypatch, tmp_path, part):
    seen = spied(monkeypatch)
    assert command(monkeypatch, *SMALL, "--epochs", 1, "--lam", 0.5, "--runs", tmp_path, *part) == 0
    steps = records(tmp_path / "latest", "step")
    logged = [r["loss"] + r["penalty"] for r in steps]
    scalars = [scalar for _, _, scalar in seen]
    assert logged == pytest.approx([scalars[0], sum(scalars[1:10]) / 9, sum(scalars[10:]) / 10], rel=1e-5)
    assert all(r["penalty"] > 0 and r["grad_norm_mean"] > 0 for r in steps)
    assert all(r["fd_error_pct"] is None if "ascent" in part else 0 < r["fd_error_pct"] < 30 for r in steps)


@pytest.mark.parametrize("share", [0.01, 0.25, 0.5, 0.97, 0.99])
@pytest.mark.parametrize("n", [1, 3, 4, 5, 50])
@pytest.mark.parametrize("method", ["fd", "exact", "ascent"])
def test_no_image_is_normalized_alone_whatever_the_share(method, n, share):
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 8), nn.BatchNorm1d(8), nn.GELU(), nn.Linear(8, 3))
    seen = []
    network[2].register_forward_pre_hook(lambda _, inputs: seen.append(len(inputs[0])))
    x, labels = torch.rand(n, 1, 2, 2), torch.randint(3, (n,))
    objective = train.Objective(network.train(n > 1), method=method, penalty_share=share)
    out = objective(x, labels)
    out.objective(1.0).backward()
    assert len(out.losses) == len(out.penalties) == n
    assert min(seen) >= min(n, 2)
    m = math.ceil(n * share)
    assert (out.penalties > 0).sum() == (n if n < 4 or m == n else min(max(m, 2), n - 2))


def test_noise_training_adds_that_noise_to_the_images(monkeypatch, tmp_path):
    seen = spied(monkeypatch)
    for method, more in (("none", []), ("noise", ["--sigma", 0.3])):
        assert command(monkeypatch, *SMALL, "--epochs", 1, "--runs", tmp_path, "--method", method, *more) == 0
    none, noise = (torch.stack([images for name, images, _ in seen if name == method]) for method in ("none", "noise"))
    assert (noise - none).std().item() == pytest.approx(0.3, rel=0.03)
    assert abs((noise - none).mean().item()) < 0.01
    assert not torch.equal((noise - none)[0], (noise - none)[1])


FINE = {"test_loss": 0.0, "clean_error_pct": 0.0, "attacked_error_pct": 0.0}


def test_a_run_is_introduced_and_printed_in_twenty_lines(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = ["digits", "--subset", 20, "--batch-size", 10, "--method", "at", "--eps", "0.1", "--attack-steps", 2]
    assert command(monkeypatch, *small, "--epochs", 45, "--runs", tmp_path) == 0
    first, *epochs, last = capsys.readouterr().out.splitlines()
    said = (
        "digits-at-linf-eps0.1-seed0: at, linf, eps 0.1, attack_steps 2; cnn, 151,306 parameters; digits, 20 training"
    )
    said += " and 20 test images, 10 classes, 8 pixels a side; 90 steps of 10 images, 45 epochs from rate 0.05, each"
    said += " step at the cost of 2.33 plain"
    assert first == said
    assert [line.split()[1] for line in epochs] == [f"{i}/45" for i in range(3, 46, 3)]
    assert last.endswith(f"python tui.py {tmp_path / 'digits-at-linf-eps0.1-seed0'}")


# --- the objective ----------------------------------------------------------------------------------------


def test_schedule_of_the_cifar_recipe_is_the_papers():
    recipe = train.RECIPES["cifar10"]
    plan = train.Plan(recipe, images=10 * recipe.batch_size)
    rates = {epoch: plan.rate(round(10 * epoch)) for epoch in (0, 59.9, 60, 119.9, 120, 160, 199.9)}
    expected = {0: 0.1, 59.9: 0.1, 60: 0.02, 119.9: 0.02, 120: 0.004, 160: 0.0008, 199.9: 0.0008}
    assert rates == pytest.approx(expected)


def test_the_rate_is_linear_between_the_rows_of_a_schedule():
    plan = train.Plan(train.Options(epochs=10, schedule=((0, 1.0, 3.0), (10, 0, 0))), images=1280)
    assert [plan.rate(step) for step in (0, 25, 99)] == pytest.approx([1.0, 1.5, 2.98])


def test_the_weight_rises_from_0_in_a_warm_up():
    options = train.Options(epochs=10, lam=0.4, schedule=((0, 1, 1), (10, 0, 0)))
    assert [train.Plan(options, images=1280).lam(step) for step in (0, 99)] == [0.4, 0.4]
    plan = train.Plan(replace(options, lam_warmup=2.0), images=1280)
    assert [plan.lam(step) for step in (0, 10, 20, 99)] == pytest.approx([0, 0.2, 0.4, 0.4])


def test_the_exact_method_follows_the_same_path(monkeypatch, tmp_path):
    """With a tiny step, the finite difference trains (nearly) the network of its exact twin."""
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = [*SMALL, "--epochs", 1, "--runs", tmp_path, "--activation", "gelu", "--lam", 0.1]
    assert command(monkeypatch, *small, "--h", 0.003, "--name", "fd") == 0
    assert command(monkeypatch, *small, "--method", "exact", "--name", "exact") == 0
    a, b = (torch.cat([w.flatten() for w in weights(tmp_path / name).values()]) for name in ("fd", "exact"))
    assert (a - b).norm() < 1e-2 * a.norm()
    assert not torch.equal(a, b)


def random_network(classes, channels=1):
    """With batch normalization and dropout: statistics and chance that a resumed run has to find again."""
    return nn.Sequential(nn.BatchNorm2d(1), *dropping(classes))


def dropping(classes, channels=1):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.GELU(), nn.Dropout(0.3), nn.Linear(16, classes))


@pytest.mark.parametrize("method", ["none", "fd"])
def test_looking_at_a_run_does_not_change_it(monkeypatch, tmp_path, method):
    """Records, probes, checkpoints and a resume leave weights, running statistics and chance alone."""
    monkeypatch.setattr(models, "cnn", random_network)
    small = [*SMALL, "--method", method, "--runs", tmp_path]
    assert command(monkeypatch, *small, "--name", "often", *OFTEN) == 0
    with monkeypatch.context() as patched:
        patched.setattr(train, "LOG_EVERY", 7)
        patched.setattr(train.Plan, "rate", dying_after(16))
        with pytest.raises(Crash):
            command(patched, *small, "--name", "seldom", *OFTEN)
    assert models.read_checkpoint(tmp_path / "seldom/checkpoint.pt")["step"] == 14
    torch.manual_seed(1)  # whatever the state of the global generator
    assert command(monkeypatch, "--resume", tmp_path / "seldom") == 0
    assert same(weights(tmp_path / "often"), weights(tmp_path / "seldom"))


def test_both_passes_of_a_step_see_one_draw_of_a_random_network(monkeypatch, tmp_path):
    """Else the difference of two draws, over h, would be the penalty: thousands of times what it is."""
    monkeypatch.setattr(models, "cnn", dropping)
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = [*SMALL, "--epochs", 1, "--h", 0.01, "--runs", tmp_path]
    assert command(monkeypatch, *small) == 0
    for record in records(tmp_path / "latest", "step"):
        assert record["fd_error_pct"] < 5, record


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


def at_step(step, do, real=train.Watch.add):
    """Watch.add, which after so many steps does something more."""
    steps = iter(range(1, step + 1))

    def add(self, *out):
        real(self, *out)
        if next(steps, None) == step:
            do()

    return add


def crash():
    raise Crash


@pytest.mark.parametrize("step", [1, 9, 10, 20, 21, 39])
def test_a_run_that_dies_at_any_step_ends_as_if_it_had_not(monkeypatch, tmp_path, whole, step):
    with monkeypatch.context() as patched:
        patched.setattr(train.Watch, "add", at_step(step, crash))
        with pytest.raises(Crash):
            command(monkeypatch, *SMALL, "--runs", tmp_path, "--name", "a", *OFTEN)
    assert json.loads((tmp_path / "a/status.json").read_text())["state"] == "failed"
    assert command(monkeypatch, "--resume", tmp_path / "a") == 0
    assert same(weights(tmp_path / "a"), weights(whole))
    (resumed,) = [e["step"] for e in records(tmp_path / "a", "event") if e["event"] == "resume"]
    assert resumed == max(step > 1, (step - 1) // 10 * 10)
    # Without the work that was lost, the log is that of the uninterrupted run.
    kept = {r["step"]: r["loss"] for r in records(tmp_path / "a", "step")}
    assert kept == {r["step"]: r["loss"] for r in records(whole, "step")}


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_stopped_run_is_resumed_bit_for_bit(monkeypatch, tmp_path, whole, capsys, signum):
    run, before = tmp_path / "run", signal.signal(signum, signal.SIG_DFL)  # ignored, perhaps, as in the background
    with monkeypatch.context() as patched:
        patched.setattr(train.Watch, "add", at_step(23, lambda: os.kill(os.getpid(), signum)))
        assert command(patched, *SMALL, "--runs", tmp_path, "--name", "run") == 128 + signum
    signal.signal(signum, before)
    assert f"train.py: stopped by {signum.name} at step" in capsys.readouterr().err
    assert json.loads((run / "status.json").read_text())["state"] == "interrupted"
    assert 23 <= models.read_checkpoint(run / "checkpoint.pt")["step"] <= 30
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))


def test_a_stop_while_it_waits_for_images_saves_the_last_step(monkeypatch, tmp_path, whole):
    """Then the source of batches ends early: no epoch ends with it."""
    real = data.training_batches

    def interrupted(*arguments, **options):
        for i, batch in enumerate(real(*arguments, **options)):
            if i == 13:
                os.kill(os.getpid(), signal.SIGTERM)
                while not options["stop"]():
                    time.sleep(0.001)
                return
            yield batch

    with monkeypatch.context() as patched:
        patched.setattr(data, "training_batches", interrupted)
        assert command(patched, *SMALL, "--runs", tmp_path, "--name", "run", "--checkpoint-minutes", 60) == 143
    assert models.read_checkpoint(tmp_path / "run/checkpoint.pt")["step"] == 13
    assert command(monkeypatch, "--resume", tmp_path / "run") == 0
    assert same(weights(tmp_path / "run"), weights(whole))


def test_a_killed_process_is_resumed_bit_for_bit(monkeypatch, tmp_path, whole):
    run, line = tmp_path / "run", [sys.executable, ROOT / "train.py", *SMALL, "--runs", tmp_path, "--name", "run"]
    process = subprocess.Popen([*line, *OFTEN], env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 120
    while not ((run / "metrics.jsonl").exists() and '"step": 10,' in (run / "metrics.jsonl").read_text()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.kill()
    process.communicate(timeout=60)
    assert models.read_checkpoint(run / "checkpoint.pt")["step"] < 40, "the run ended before it could be killed"
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))


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
    before = {file: file.read_bytes() for file in run.iterdir() if file.name != "lock"}
    assert command(monkeypatch, "--resume", run) == 2
    assert one_line(capsys).endswith("and there is no earlier one")
    assert {file: file.read_bytes() for file in run.iterdir() if file.name != "lock"} == before


def test_a_run_that_died_before_its_first_checkpoint_is_begun_anew(monkeypatch, tmp_path, whole):
    run = tmp_path / "run"
    run.mkdir()
    shutil.copy(whole / "config.json", run)
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize("content", [None, "", "[1]", '{"options": 3}', "{"])
def test_a_folder_that_is_no_run_is_one_line_and_stays_as_it_is(monkeypatch, tmp_path, capsys, content):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = list(tmp_path.iterdir())
    assert command(monkeypatch, "--resume", tmp_path) == 2
    assert one_line(capsys).endswith("no such run")
    assert command(monkeypatch, *SMALL, "--runs", tmp_path.parent, "--name", tmp_path.name) == 2
    assert "with no run in it" in one_line(capsys)
    assert list(tmp_path.iterdir()) == before


def test_a_run_of_before_some_options_is_one_with_their_defaults(monkeypatch, tmp_path, whole, capsys):
    run, new = copy_of(whole, tmp_path), {"lam_warmup", "unsquared", "statistics", "init", "nesterov", "cutout"}
    state = models.read_checkpoint(run / "checkpoint.pt")
    state["config"]["options"] = {k: v for k, v in state["config"]["options"].items() if k not in new}
    state["config"]["options"]["phases"][0]["rectangular"] = False
    torch.save(state, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(state["config"]))
    again = [*SMALL, "--runs", tmp_path, "--name", run.name]
    assert command(monkeypatch, *again, "--lr", 1, "--unsquared") == 2
    assert "exists, with other options (lr, schedule, unsquared); " in one_line(capsys)
    assert command(monkeypatch, *again) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    gone = {"central": False}, {"penalty_from": 0.5}, {"accumulate": 1}  # options that are no more
    for other in (*gone, {"amp": True, "h": 0.05}):  # which once rounded the direction alone
        changed = state["config"] | {"options": state["config"]["options"] | other}
        torch.save(state | {"config": changed}, run / "checkpoint.pt")
        assert command(monkeypatch, "--resume", run) == 2
        assert "begun with another version of this project" in one_line(capsys)


def test_a_foreign_checkpoint_is_refused(monkeypatch, tmp_path, whole, capsys):
    run = copy_of(whole, tmp_path)
    state = models.read_checkpoint(run / "checkpoint.pt")
    torch.save(state | {"model": {"weight": torch.zeros(2)}, "step": 20}, run / "checkpoint.pt")
    assert command(monkeypatch, "--resume", run) == 2
    assert "does not fit its run" in one_line(capsys)
    state["config"]["options"]["warp"] = 9  # of a later version
    torch.save(state, run / "checkpoint.pt")
    assert command(monkeypatch, "--resume", run) == 2
    assert "begun with another version of this project" in one_line(capsys)


def test_a_finished_run_has_nothing_to_resume(monkeypatch, tmp_path, whole):
    run = copy_of(whole, tmp_path)
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))
    assert len(records(run)) == len(records(whole))


def test_a_run_of_the_version_before_goes_on(monkeypatch, tmp_path, whole):
    """Without names of classes, with lists for tuples, with random states and with the absolute path of ./data."""
    run = copy_of(whole, tmp_path)
    state = models.read_checkpoint(run / "checkpoint.previous.pt")
    config = json.loads(json.dumps(state["config"]))
    del config["class_names"]
    config["options"]["data_dir"] = "/somewhere/data"
    torch.save(state | {"config": config, "rng": torch.get_rng_state()}, run / "checkpoint.pt")
    (run / "config.json").write_text(json.dumps(config))
    assert command(monkeypatch, "--resume", run) == 0
    assert same(weights(run), weights(whole))


@pytest.mark.parametrize(
    "wild", [[], OFTEN, ["--method", "none", "--epochs", 3], ["--method", "noise", "--batch-size", 10, *OFTEN]]
)
def test_a_run_that_diverges_says_so_and_keeps_a_finite_checkpoint(monkeypatch, tmp_path, capsys, wild):
    """In the last step, in an earlier epoch's, or anywhere: a network that is of no use makes no checkpoint."""
    small = ["digits", "--subset", 50, "--epochs", 1, "--lr", 1e30, "--runs", tmp_path, "--name", "wild"]
    assert command(monkeypatch, *small, *wild) == 3
    message = one_line(capsys)
    assert re.search(r"diverged: the (test )?loss.* is not finite at step", message)
    assert "keeps the checkpoint from before" in message
    for name in ("checkpoint.pt", "checkpoint.previous.pt"):
        if (tmp_path / "wild" / name).exists():
            state = models.read_checkpoint(tmp_path / "wild" / name)
            assert all(w.isfinite().all() for w in state["model"].values())
            assert state["step"] == 0
    status = json.loads((tmp_path / "wild/status.json").read_text())
    assert status["state"] == "failed"
    assert "not finite" in status["error"]


def test_a_stopped_run_that_has_diverged_is_not_saved(monkeypatch, tmp_path, capsys):
    small = ["digits", "--subset", 50, "--batch-size", 10, "--epochs", 1, "--lr", 1e30, "--runs", tmp_path]
    with monkeypatch.context() as patched:
        patched.setattr(train.Watch, "add", at_step(1, lambda: os.kill(os.getpid(), signal.SIGTERM)))
        assert command(patched, *small) == 3
    assert models.read_checkpoint(tmp_path / "latest/checkpoint.pt")["step"] == 0


# --- several processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "norm"), [("noise", "l2"), ("at", "l2"), ("at", "linf")])
def test_two_processes_draw_what_one_draws(monkeypatch, method, norm):
    """And adversarial training starts anywhere in the ball: uniformly, P(length <= t eps) = t^4 in four dimensions."""
    images = torch.full((4000, 1, 2, 2), 0.5)
    monkeypatch.setattr(attacks, "ascend", lambda network, images, labels, start, **how: start)

    def drawn(rank, size, share):
        trainer = train.Trainer.__new__(train.Trainer)
        trainer.options = train.Options(seed=3, sigma=0.5, eps=0.1, method=method, norm=norm)
        trainer.step, trainer.world, trainer.network = 7, runs.World("cpu"), nn.Identity()
        trainer.world.rank, trainer.world.size = rank, size
        monkeypatch.setattr(trainer.world, "share_buffers", lambda network: None)
        return train.training_inputs(trainer, share, None)

    both = torch.cat([drawn(rank, 2, half) for rank, half in enumerate(images.chunk(2))])
    assert torch.equal(both, drawn(0, 1, images))
    assert not torch.equal(both[0], both[1])
    if method == "at":
        lengths = attacks.distance(images, both, norm)
        for t in (0.5, 0.8, 0.95):
            assert (lengths <= 0.1 * t).double().mean().item() == pytest.approx(t**4, abs=0.03)
        assert lengths.max() <= 0.1 * (1 + 1e-6)
        assert (both - images).mean(0).abs().max() < 0.005


def test_two_processes_train_the_network_of_one_and_log_once(tmp_path, whole):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", ROOT / "train.py"]
    line += [*SMALL, "--runs", tmp_path, "--name", "two"]
    done = subprocess.run(line, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("epoch 1/2") == done.stdout.count("two: fd, l2, lam 1, h 0.1; cnn") == 1
    for one, two in zip(records(whole), records(tmp_path / "two"), strict=True):
        assert (one["kind"], one["step"]) == (two["kind"], two["step"])
        for name in ("loss", "penalty", "grad_norm_mean", "grad_norm_max", "test_loss", "clean_error_pct"):
            assert two.get(name, 0) == pytest.approx(one.get(name, 0), rel=1e-3), name
    one, two = weights(whole), weights(tmp_path / "two")
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5)


# --- options ----------------------------------------------------------------------------------------------


def test_help_shows_choices_and_the_recipes_defaults_without_torch():
    """In 80 columns, also into a pipe; and before anything is imported that takes seconds."""
    line = [sys.executable, "-X", "importtime", ROOT / "train.py", "--help"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "COLUMNS"}
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=120, check=True)
    imported = {line.rpartition("|")[2].strip().partition(".")[0] for line in done.stderr.splitlines()}
    assert "typer" in imported
    assert not imported & {"torch", "torchvision", "numpy", "scipy", "runs"}
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert "fd|exact|ascent|none|noise|at|free" in done.stdout
    text = re.sub(r"[\s│]+", " ", done.stdout)
    for shown in (
        "(digits 1, cifar10 0.1, cifar10-fast 0.1, imagenet 0.0051)",
        "(digits 40, cifar10 200, cifar10-fast 16, imagenet 29)",
        "at: PGD steps",
    ):
        assert shown in text
    shown = [f.name for f in fields(train.Command) if f.metadata]
    for name in shown:
        assert f" --{name.replace('_', '-')} " in text


def test_an_option_that_a_method_does_not_have_is_refused_and_no_other():
    values = {"h": 0.1, "lam": 0.1, "eps": 0.1, "sigma": 0.1, "attack_steps": 3, "replays": 3}
    values |= {"penalty_share": 0.5, "unsquared": True}
    every = {"lam", "penalty_share", "unsquared"}
    meant = {
        "fd": {"h", *every},
        "exact": every,
        "ascent": {"h", *every},
        "none": set(),
        "noise": {"sigma"},
        "at": {"eps", "attack_steps"},
        "free": {"eps", "replays"},
    }
    assert values.keys() == {f.name for f in fields(train.Options) if f.metadata.get("of")}
    for method, own in meant.items():
        for name, value in values.items():
            if name in own:
                train.check_given({"method": method, name: value})
            else:
                with pytest.raises(
                    runs.Failure, match=rf"--{name.replace('_', '-')} means nothing to --method {method}"
                ):
                    train.check_given({"method": method, name: value})


def test_the_two_networks_of_the_table_differ_in_the_method_alone(monkeypatch):
    trained = []
    monkeypatch.setattr(train, "begin", lambda given, **how: trained.append(given) or crash())
    given = {"dataset": "digits", "method": "at", "eps": 0.1, "amp": True, "epochs": 3, "norm": "linf", "seed": 5}
    with pytest.raises(Crash):
        train.compare(given, root=Path("runs"), images=None, world=None)
    assert trained == [{"dataset": "digits", "method": "none", "amp": True, "epochs": 3, "norm": "linf", "seed": 5}]


def test_options_survive_the_config(whole):
    config = json.loads((whole / "config.json").read_text())
    options = train.options_of(config)
    assert json.loads(json.dumps(asdict(options))) == config["options"]
    assert options == train.options_of({"format": 2, "options": asdict(options)})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["mnist"], "unknown data set 'mnist'"),
        (["imagenet", "--data-dir", "/nonexistent"], "--data-dir"),
        (["imagenet"], "--data-dir"),
        (["digits", "--method", "magic"], "train.py: Invalid value for '--method': 'magic' is not one of"),
        (["digits", "--norm", "l7"], "--norm"),
        (["digits", "--h", "0"], "--h must be positive, not 0"),
        (["digits", "--method", "noise", "--sigma", "0"], "--sigma must be positive"),
        (["digits", "--h", "nan"], "--h must be positive, not nan"),
        (["digits", "--h", "inf"], "--h must be at most"),
        (["digits", "--lam", "-1"], "--lam must be 0 or more"),
        (["digits", "--lr", "-0.1"], "--lr must be positive"),
        (["digits", "--epochs", "0"], "--epochs must be positive"),
        (["digits", "--epochs", "many"], "--epochs"),
        (["digits", "--epochs", "1000000000"], "--epochs must be at most"),
        (["digits", "--batch-size", "5000"], "there are only 1000 training images"),
        (["digits", "--subset", "0"], "--subset must be positive"),
        (["digits", "--seed", "-1"], "--seed must be 0 or more"),
        (["digits", "--seed", "18446744073709551616"], "--seed must be at most 18446744073709551615"),
        (["digits", "--model", "resnext34"], "colour images"),
        (["digits", "--model", "magic"], "magic"),
        (["digits", "--device", "abacus"], "--device abacus: no such device"),
        (["digits", "--frobnicate"], "--frobnicate"),
        (["digits", "--eps", "0.1"], "--eps means nothing to --method fd, only to at, free: leave it out"),
        (["--method", "at", "--h", "0.1"], "--h means nothing to --method at"),
        (["--method", "none"], "name its data set too"),
        (["digits", "cifar10"], "cifar10"),
        (["digits", "--method", "free", "--norm", "l2"], "--norm l2: --method free is for linf"),
        (["digits", "--method", "at", "--norm", "l1"], "--norm l1: --method at is for l2 and linf"),
        (["digits", "--method", "at", "--eps", "8/0"], "'8/0' is not a number"),
        (["digits", "--method", "at", "--eps", "-8/255"], "--eps must be positive"),
        (["digits", "--method", "at", "--attack-steps", "0"], "--attack-steps must be positive"),
        (["digits", "--method", "free", "--replays", "0"], "--replays must be positive"),
        (["digits", "--amp", "--h", "0.09"], "--amp: bfloat16 lacks the digits for --h 0.09"),
        (["--resume", "/nonexistent/run"], "no such run"),
        (["digits", "--resume", "/nonexistent/run", "--lam", "2"], "leave out --lam, DATASET"),
    ],
)
def test_a_wrong_option_is_one_line_and_leaves_nothing(monkeypatch, tmp_path, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    assert message in one_line(capsys)
    assert list(tmp_path.iterdir()) == []


def test_a_run_tells_the_threads_that_it_has(monkeypatch, tmp_path):
    """The cnn has one, whatever torch had before."""
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        small = ["digits", "--subset", 20, "--batch-size", 10, "--epochs", 1, "--runs", tmp_path]
        assert command(monkeypatch, *small, "--name", "a", "--method", "none") == 0
    finally:
        torch.set_num_threads(threads)
    assert json.loads((tmp_path / "a/config.json").read_text())["device"].endswith("1 threads")


def test_the_largest_seed_is_one(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = ["digits", "--subset", 20, "--batch-size", 10, "--epochs", 1, "--runs", tmp_path]
    assert command(monkeypatch, *small, "--method", "noise", "--seed", 2**64 - 1) == 0


def test_a_name_that_other_options_have_taken_is_refused_and_untouched(monkeypatch, whole, capsys):
    before = {file: file.stat().st_mtime_ns for file in whole.iterdir()}
    for other in (["--lam", 2], ["--epochs", 3], ["--method", "none"], ["--amp"]):
        assert command(monkeypatch, *SMALL, *other, "--runs", whole.parent, "--name", "whole") == 2
        assert re.search(r"exists, with other options \(.*\); choose another name", one_line(capsys))
    (whole.parent / "mine").mkdir(exist_ok=True)
    assert command(monkeypatch, *SMALL, "--runs", whole.parent, "--name", "mine") == 2
    assert "mine exists, with no run in it" in one_line(capsys)
    assert {file: file.stat().st_mtime_ns for file in whole.iterdir()} == before


def test_a_run_goes_on_in_its_own_precision_where_the_device_has_another(monkeypatch, tmp_path, capsys):
    """A requeued job may come to another machine; what the recipe takes there is not what was begun."""
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = [*SMALL, "--method", "none", "--epochs", 1, "--runs", tmp_path, "--name", "a"]
    assert command(monkeypatch, *small, "--amp") == 0
    assert command(monkeypatch, *small) == 0
    assert "is finished: nothing to resume" in capsys.readouterr().out
    assert json.loads((tmp_path / "a/config.json").read_text())["options"]["amp"] is True


def test_the_same_command_again_goes_on(monkeypatch, tmp_path, whole, capsys):
    """What a requeued job does: the run ends as if it had not been stopped, and then nothing more happens."""
    small = [*SMALL, "--runs", tmp_path, "--name", "a", *OFTEN]
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
    monkeypatch.setattr(runs, "DYING", 0.0)
    with runs.owned(run, runs.World("cpu")):
        assert command(monkeypatch, "--resume", run) == 2
        assert f"process {os.getpid()} on" in one_line(capsys)


# --- folders ----------------------------------------------------------------------------------------------


@pytest.fixture
def pictures(tmp_path):
    """Ten images of two classes in train/, four in test/."""
    for part, count in (("train", 5), ("test", 2)):
        for label, name in enumerate(("cat", "dog")):
            (tmp_path / "pictures" / part / name).mkdir(parents=True)
            for i in range(count):
                colour = (20 * i, 100 * label, 50)
                Image.new("RGB", (8, 8), colour).save(tmp_path / "pictures" / part / name / f"{i}.png")
    return tmp_path / "pictures"


def test_a_share_of_a_folder_is_kept_for_testing_and_by_evaluation_too(monkeypatch, tmp_path, pictures, capsys):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.chdir(tmp_path)
    small = ["pictures", "--model", "cnn", "--batch-size", 2, "--epochs", 1, "--name", "a", "--split", 0.5]
    assert command(monkeypatch, *small) == 2
    assert "leave out --split" in one_line(capsys)
    shutil.rmtree(pictures / "test")
    assert command(monkeypatch, *small) == 0
    config = json.loads((tmp_path / "runs/a/config.json").read_text())
    assert config["images_train"] + config["images_test"] == 10
    settings = SimpleNamespace(data_dir=None, size=None, topk=None)
    assert len(evaluate.open_run(tmp_path / "runs/a", settings).source) == config["images_test"]
    assert command(monkeypatch, "digits", "--split", 0.5) == 2


def test_a_folder_is_found_again_from_anywhere_and_where_it_moves(monkeypatch, tmp_path, pictures, capsys):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/a"
    small = ["pictures", "--model", "cnn", "--batch-size", 5, "--epochs", 2, "--name", "a"]
    with monkeypatch.context() as patched:
        patched.setattr(train.Plan, "rate", dying_after(2))
        with pytest.raises(Crash):
            command(patched, *small)
    config = json.loads((run / "config.json").read_text())
    assert (config["options"]["dataset"], config["class_names"]) == (str(pictures), ["cat", "dog"])
    half = copy_of(run, tmp_path)
    # Another folder of the same relative name is not taken for it.
    shutil.copytree(pictures, tmp_path / "elsewhere/pictures")
    (tmp_path / "elsewhere/pictures/train/cat/0.png").unlink()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert command(monkeypatch, "--resume", run) == 0
    # Nor are others, which the user names, with other classes or fewer images; the same ones in another place are.
    assert command(monkeypatch, "--resume", half, "--data-dir", "pictures") == 2
    assert "[9, 4] training and test images, not [10, 4]" in one_line(capsys)
    (tmp_path / "elsewhere/pictures/train/cat/0.png").write_bytes((pictures / "train/cat/0.png").read_bytes())
    (tmp_path / "elsewhere/pictures/test/cat/0.png").unlink()
    assert command(monkeypatch, "--resume", half, "--data-dir", "pictures") == 2
    assert "[10, 3] training and test images, not [10, 4]" in one_line(capsys)
    moved = Path(shutil.move(pictures, tmp_path / "moved"))
    assert command(monkeypatch, "--resume", half) == 2
    assert str(pictures) in one_line(capsys)
    (moved / "train/dog").rename(moved / "train/wolf")
    (moved / "test/dog").rename(moved / "test/wolf")
    assert command(monkeypatch, "--resume", half, "--data-dir", "../moved") == 2
    assert "class dog is new or gone" in one_line(capsys)
    (moved / "train/wolf").rename(moved / "train/dog")
    (moved / "test/wolf").rename(moved / "test/dog")
    assert command(monkeypatch, "--resume", half, "--data-dir", "../moved") == 0
    assert same(weights(half), weights(run))
    assert models.read_checkpoint(half / "checkpoint.pt")["config"]["options"]["dataset"] == str(moved)


@pytest.fixture
def photographs(tmp_path):
    """Three classes of JPEGs of 70 to 90 pixels, as a phone's thumbnails: 16 each to train on, 4 to test."""
    for part, count in (("train", 16), ("test", 4)):
        for label, name in enumerate(("cat", "dog", "owl")):
            (tmp_path / "photos" / part / name).mkdir(parents=True)
            for i in range(count):
                image = Image.new("RGB", (70 + i, 90), tuple(255 * (label == k) for k in range(3)))
                image.save(tmp_path / "photos" / part / name / f"{i}.jpg")
    return tmp_path / "photos"


def first_run(monkeypatch, capsys, *arguments):
    """The first line and the options of a run."""
    assert command(monkeypatch, *arguments, "--model", "cnn") == 0
    said = capsys.readouterr().out
    run = Path(re.search(r"tui\.py (.*)", said)[1])
    return said.splitlines()[0], json.loads((run / "config.json").read_text())["options"]


def test_size_batch_and_rate_follow_the_images_when_nobody_says_so(monkeypatch, tmp_path, photographs, capsys):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    recipe, small = train.RECIPES["imagenet"], [photographs, "--runs", tmp_path / "runs", "--epochs", 3]
    line, options = first_run(monkeypatch, capsys, *small)
    assert "12 test images, 3 classes, 77 pixels a side; 24 steps of 6 images, 3 epochs from rate 0.00293," in line
    assert {phase["size"] for phase in options["phases"]} == {77}  # the median short side
    assert options["lr"] == pytest.approx(
        recipe.lr * 6 / recipe.batch_size
    )  # an eighth of the images, the rate with it
    assert options["schedule"][2][1] == pytest.approx(recipe.schedule[2][1] * 6 / recipe.batch_size)
    line, options = first_run(monkeypatch, capsys, *small, "--size", 150, "--batch-size", 48, "--lr", 0.01)
    assert "128, 150 pixels a side; 7 steps of 48" in line
    assert [phase["size"] for phase in options["phases"]] == [128, 150, 150]
    assert (options["batch_size"], options["lr"]) == (48, 0.01)
    assert [phase["batch_size"] for phase in options["phases"]] == [48, 18, 12]
    assert command(monkeypatch, *small, "--batch-size", 49, "--model", "cnn") == 2
    assert "there are only 48 training images: give 48 or less" in one_line(capsys)


def test_a_batch_that_follows_the_images_is_shared_by_processes():
    images, given = SimpleNamespace(small=True, train=range(100), test=range(50)), {"dataset": "cifar10"}
    for size, batch in ((1, 12), (2, 12), (8, 16), (32, 64)):
        options = train.resolve(given, images, SimpleNamespace(size=size))
        assert [options.batch_size, *(phase.batch_size for phase in options.phases)] == [batch, batch]
    images.train = range(1024)
    assert train.resolve(given, images, SimpleNamespace(size=1)).lr == 0.1
    images.train = range(1)  # there is no second
    assert train.resolve(given, images, SimpleNamespace(size=1)).batch_size == 1


@pytest.mark.parametrize("method", ["fd", "exact", "ascent"])
def test_the_unsquared_penalty_is_the_slope_and_is_named(monkeypatch, tmp_path, method):
    seen = spied(monkeypatch)
    small = [*SMALL, "--epochs", 1, "--method", method, "--lam", 0.5, "--runs", tmp_path]
    for more in ([], ["--unsquared"]):
        assert command(monkeypatch, *small, *more) == 0
    squared, plain = seen[0], seen[20]
    assert torch.equal(squared[1], plain[1])
    names = [f"digits-{method}-{how}l2-lam0.5-seed0" for how in ("", "unsquared-")]
    first = [records(tmp_path / name, "step")[0] for name in names]
    assert first[1]["penalty"] > first[0]["penalty"] > 0
    # Of the same network and images: E[s^2] >= E[s]^2, and both are what the input gradients say.
    assert first[0]["penalty"] * 0.25 >= first[1]["penalty"] ** 2 * (1 - 1e-4)
    assert first[1]["penalty"] == pytest.approx(0.25 * first[1]["grad_norm_mean"], rel=0.05)
    if method == "fd":
        assert first[1]["fd_error_pct"] == pytest.approx(first[0]["fd_error_pct"], rel=1e-3)


def test_a_step_up_is_of_the_weight_the_length_and_the_precision_that_the_run_says(monkeypatch, tmp_path):
    """Its logged values do not depend on where it leads: what it is given is looked at."""
    seen, kinds, real = [], set(), train.gradreg.ascent_penalty
    hook = torch.nn.modules.module.register_module_forward_hook

    def spy(loss_fn, x, **how):
        kinds.clear()
        watch = hook(lambda part, _, out: kinds.add(out.dtype) if isinstance(part, torch.nn.Linear) else None)
        out = real(loss_fn, x, **how)
        watch.remove()
        seen.append((how["lam"], how["h"], how["first"], len(x), *kinds))
        return out

    monkeypatch.setattr(train.gradreg, "ascent_penalty", spy)
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.setattr(train, "try_out", lambda *_: [])
    small = [*SMALL, "--method", "ascent", "--lam", 0.5, "--epochs", 2, "--runs", tmp_path]
    assert command(monkeypatch, *small, "--name", "first") == 0
    assert {*seen} == {(0.5, 0.5, 10, 10, torch.float32)}
    seen.clear()
    how = ["--init", tmp_path / "first", "--amp", "--h", 0.3, "--penalty-share", 0.25, "--name", "tuned"]
    assert command(monkeypatch, *small, *how) == 0
    assert [how[0] for how in seen] == pytest.approx([0.5 * min(1, step / 20) for step in range(40)])
    assert {how[1:] for how in seen} == {(0.3, 3, 10, torch.bfloat16)}


def test_a_warm_up_of_lambda_is_what_is_added_to_the_loss(monkeypatch, tmp_path):
    seen, real = [], train.Watch.add
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.setattr(train.Watch, "add", lambda self, out, lam: seen.append(lam) or real(self, out, lam))
    monkeypatch.setitem(train.RECIPES, "digits", replace(train.RECIPES["digits"], lam_warmup=1.5))
    assert command(monkeypatch, *SMALL, "--lam", 0.8, "--runs", tmp_path) == 0
    assert seen == pytest.approx([0.8 * min(1, step / 30) for step in range(40)])
    first, *_ = steps = records(tmp_path / "latest", "step")
    assert first["penalty"] == 0
    assert [r["lam"] for r in steps] == pytest.approx([0.8 * min(1, (r["step"] - 1) / 30) for r in steps])


def test_a_step_that_costs_digits_is_said(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = ["digits", "--subset", 20, "--batch-size", 10, "--epochs", 1, "--runs", tmp_path]
    for h, said in (("1e-4", True), ("1e-3", False)):
        assert command(monkeypatch, *small, "--h", h) == 0
        assert ("warning: --h 0.0001: float32 loses digits" in capsys.readouterr().out) == said


def test_an_unreadable_image_is_named(monkeypatch, tmp_path, pictures, capsys):
    (pictures / "train/dog/0.png").write_bytes(b"nothing")
    assert command(monkeypatch, pictures, "--runs", tmp_path / "runs") == 2
    assert "train/dog/0.png: not a readable image" in one_line(capsys)


# --- what it is for ---------------------------------------------------------------------------------------


def test_the_penalty_buys_robustness(monkeypatch, tmp_path, capsys):
    """The default command with fewer epochs: clearly fewer errors under attack, and not at the cost of clean ones."""
    few = data.load("digits", subset=150).test
    monkeypatch.setattr(data, "load", lambda *a, real=data.load, **how: replace(real(*a, **how), test=few))
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    assert command(monkeypatch, "--epochs", 12, "--subset", 500, "--batch-size", 25, "--runs", tmp_path) == 0
    rows = [line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("│")]
    table = {name.strip(): [float(cell) for cell in cells[:4]] for name, *cells in rows}
    none, fd = (table[name] for name in ("digits-none-seed0", "digits-fd-l2-lam1-seed0"))
    assert fd[2] < 0.8 * none[2]  # within eps 0.5
    assert fd[0] < none[0] + 8  # clean; few images and epochs: it differs by machine


def test_every_network_is_tried_on_these_images_before_a_run_begins(monkeypatch, tmp_path, capsys):
    for part in ("train", "test"):
        for i in range(8):
            (tmp_path / "tiny" / part / "ab"[i % 2]).mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (6, 6), (30 * i, 0, 0)).save(tmp_path / "tiny" / part / "ab"[i % 2] / f"{i}.png")
    small, runs_ = [tmp_path / "tiny", "--recipe", "fast", "--epochs", 1], ["--runs", tmp_path / "runs"]
    assert command(monkeypatch, *small, *runs_) == 2  # pooled below one pixel
    assert "--model resnet9: " in one_line(capsys)
    assert command(monkeypatch, *small[:1], "--model", "resnext34-authors", "--batch-size", 1, *runs_) == 2
    assert "Expected more than 1 value per channel" in one_line(capsys)
    assert not (tmp_path / "runs").exists()


def test_a_run_remembers_which_run_it_came_from(monkeypatch, tmp_path):
    """runs/latest, which it may be called, is the new run before its first step."""
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    small = [*SMALL, "--epochs", 1, "--runs", tmp_path, "--name"]
    assert command(monkeypatch, *small, "first") == 0
    assert command(monkeypatch, *small, "second", "--init", tmp_path / "latest") == 0
    assert json.loads((tmp_path / "second/config.json").read_text())["options"]["init"] == str(tmp_path / "first")


def test_a_network_of_ours_is_not_taken_for_a_folder_of_its_name(monkeypatch, tmp_path):
    monkeypatch.setattr(train, "evaluate", lambda trainer: FINE)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "cnn").mkdir()
    assert command(monkeypatch, *SMALL, "--epochs", 1, "--model", "cnn") == 0


@pytest.mark.parametrize(
    ("known", "able"),
    [
        ({"avx512_bf16": True}, True),
        ({"amx_bf16": True}, True),
        ({"avx2": True, "avx512_bf16": False}, False),
        ({}, False),
    ],
)
def test_bfloat16_is_taken_where_the_processor_has_instructions_for_it(monkeypatch, known, able):
    """Emulated it takes ten times as long as float32; a torch that cannot tell has none."""
    cpu = torch.device("cpu")
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: known, raising=False)
    assert train.has_bfloat16(cpu) is able
    monkeypatch.delattr(torch.cpu, "get_capabilities")
    assert not train.has_bfloat16(cpu)


def test_the_fast_recipe_rounds_where_a_step_has_the_digits(monkeypatch):
    source = data.InMemory(torch.zeros(1024, 3, 2, 2, dtype=torch.uint8), torch.zeros(1024, dtype=torch.int64))
    images, world = data.Data(source, source, list("ab"), 3), runs.World("cpu")

    def of(**given_):
        options = train.resolve({"dataset": "cifar10", "recipe": "fast"} | given_, images, world)
        return options.h, options.amp, options.channels_last

    monkeypatch.setattr(train, "has_bfloat16", lambda device: False)
    assert of() == (0.3, False, True)  # a CPU that has to emulate it takes ten times as long
    assert of(amp=True) == (0.3, True, True)
    monkeypatch.setattr(train, "has_bfloat16", lambda device: device == torch.device("cpu"))
    assert of() == of(method="fd", h=0.3) == (0.3, True, True)
    assert of(h=0.05) == (0.05, False, True)
    assert of(method="exact")[1:] == (True, False)
    assert of(method="ascent") == (0.5, True, True)


def test_recipes_are_of_data_that_exists():
    assert (
        set(train.RECIPES) == {*train.LINF_RADII, "cifar10-fast"} == {"digits", "cifar10", "cifar10-fast", "imagenet"}
    )
    assert all(name.removesuffix("-fast") == recipe.dataset for name, recipe in train.RECIPES.items())
    assert data.load("digits", subset=20).small
