"""Evaluation: exact on what is known in closed form, the same however it is interrupted or shared, and not fooled."""

import csv
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import data
import evaluate
import runs
import train

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
MODELS = '''
import torch
from torch import nn

import data


def fit(network):
    torch.set_num_threads(1)
    digits = data.load("digits").train
    images, labels = digits.images / digits.top, digits.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    return network


def linear():
    return fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 10)))


def honest():
    return fit(nn.Sequential(nn.Flatten(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)))


class Masked(nn.Module):
    def __init__(self, scale, levels):
        super().__init__()
        self.network, self.scale, self.levels = honest(), scale, levels

    def forward(self, x):
        x = torch.round(x * self.levels) / self.levels if self.levels else x
        return self.scale * self.network(x)


class StraightThrough(Masked):
    """Quantised, with a gradient that pretends it is not."""

    def forward(self, x):
        return self.network(x + (torch.round(x * self.levels) / self.levels - x).detach())


def loud():
    return Masked(100, None)


def quantised():
    return Masked(1, 2.5)


def pretending():
    return StraightThrough(1, 2.5)  # thresholds away from the sixteenths of the digits


def broken():
    raise RuntimeError("no weights\\nhere")


def not_a_module():
    return 3


def seven_classes():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 7))


class Nan(Masked):
    def forward(self, x):
        return self.network(x) * float("nan")


def nan():
    return Nan(1, None)


def detached():
    class Detached(Masked):
        def forward(self, x):
            return self.network(x.detach())

    return Detached(1, None)


def hopeless():
    network = honest()
    with torch.no_grad():
        network[-1].bias -= 1000 * torch.eye(10)[3]  # never a 3
    return network
'''
QUICK = ["--images", "12", "--calibration", "5", "--audit-images", "6", "--blocks", "0", "--norm", "l2"]
SHORT = ["--images", "30", "--calibration", "5", "--audit-images", "2", "--blocks", "20", "--attack", "fab"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with somebody's models in it."""
    path = tmp_path_factory.mktemp("models")
    (path / "theirs.py").write_text(MODELS)
    return path


def command(monkeypatch, *arguments):
    """Run evaluate.py's command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return runs.run_command(evaluate.main)


def evaluated(here, name, *options):
    """The directory of an evaluation of one of the models, done once."""
    out = here / "-".join([name, *options]).replace(" ", "")
    if not out.exists():
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert command(monkeypatch, f"{here}/theirs.py:{name}", "--out", out, *options) == 0
    return out / f"theirs-{name}"


def rows(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def verdicts(path, norm="l2"):
    """line -> whether it passed, of the audit of one target."""
    column = next(name for name in rows(path / "audit.csv")[0] if name.endswith(norm))
    return {row["line"]: row[column].split()[0] for row in rows(path / "audit.csv")}


def files_of(path):
    """All files; the commit in the report is left out, since somebody may commit during a test."""
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: re.sub(rb"commit \S+", b"", content) for name, content in files.items()}


# --- truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_of_a_linear_network_are_the_known_ones(here, norm):
    """Between the distance to the nearest hyperplane, which ignores the box, and that within the box."""
    path = evaluated(here, "linear", *QUICK[:-1], norm)
    namespace = {}
    exec(MODELS, namespace)
    torch.manual_seed(0)
    network = namespace["linear"]()
    weight, digits = network[1].weight.detach().double(), data.load("digits").test
    shown = rows(path / "images.csv")
    index = [int(row["image (index in the test set)"]) for row in shown]
    images, labels = data.fetch(digits, np.array(index), torch.device("cpu"))
    logits = network.double()(images.double())
    gaps = (logits.gather(1, labels[:, None]) - logits).detach()
    slopes = weight[labels][:, None] - weight[None]
    lengths = slopes.norm(dim=2) if norm == "l2" else slopes.abs().sum(2)
    nearest = (gaps / lengths).scatter(1, labels[:, None], math.inf).amin(1).clamp_min(0)
    found = torch.tensor([float(row[f"distance {norm} (pixels 0 to 1)"]) for row in shown]).double()
    assert ((found == 0) == (nearest == 0)).all()
    assert (found >= nearest * (1 - 1e-5)).all()
    assert (found <= 3 * nearest + 1e-9).all()
    assert found.sum() <= 1.5 * nearest.sum()


def test_tables_say_what_the_images_say(here):
    path = evaluated(here, "honest", *QUICK)
    images, (row, *_) = rows(path / "images.csv"), rows(path / "table2.csv")
    distances = [float(image["distance l2 (pixels 0 to 1)"]) for image in images]
    wrong = [image["label"] != image["predicted"] for image in images]
    assert float(row["mean_distance_empirical"]) == pytest.approx(np.mean(distances))
    assert float(row["clean_error_pct"]) == pytest.approx(100 * np.mean(wrong))
    assert [d == 0 for d in distances] == wrong
    summary = json.loads((path / "summary.json").read_text())
    assert summary["images"] == 12
    assert summary["clean_error_pct"] == pytest.approx(100 * np.mean(wrong))
    figures = summary["norms"]["l2"]
    assert figures["mean_distance"] == pytest.approx(np.mean(distances))
    assert figures["error_pct"]["0.5"] == pytest.approx(100 * np.mean([d <= 0.5 for d in distances]))
    bound = [float(image[f"omega-bound l2 {figures['bound_method']} (pixels 0 to 1)"]) for image in images]
    assert figures["omega_bound_mean"] == pytest.approx(np.mean(bound), rel=1e-5)
    (allowed, *_), (regularity, *_) = rows(path / "table6.csv"), rows(path / "table3.csv")
    assert float(allowed["0.25"]) == pytest.approx(100 * np.mean([b < 0.25 for b in bound]))
    gradients = [float(v) for image in images for name, v in image.items() if name.startswith("gradient norm")]
    assert float(regularity["grad_norm_max"]) == pytest.approx(max(gradients))
    assert float(regularity["grad_norm_mean"]) == pytest.approx(np.mean(gradients))
    false = np.mean([b > d for b, d in zip(bound, distances, strict=True)])
    assert figures["violations_pct"] == pytest.approx(100 * false)


def test_summary_has_what_the_readme_promises(here):
    text = next(
        t for t in (ROOT / "README.md").read_text().splitlines() if "evaluation/summary.json" in t and "`norms`" in t
    )
    summary = json.loads((evaluated(here, "honest", *QUICK) / "summary.json").read_text())
    for name in ("images", "clean_error_pct", "norms"):
        assert f"`{name}`" in text
        assert name in summary
    for name in ("mean_distance", "median_distance", "lipschitz_bound_mean", "omega_bound_mean", "violations_pct"):
        assert f"`{name}`" in text
        assert math.isfinite(summary["norms"]["l2"][name])


def test_calibration_and_evaluation_images_are_disjoint_and_drawn_by_the_seed(here):
    settings = evaluate.Settings(("l2",), 10_000, 200, 3, (), 0, 100, None, 100)
    world = runs.World("cpu")
    target = evaluate.open_factory(f"{here}/theirs.py:linear", "digits", Path("data"), None, here, 0)
    evaluate.prepare(target, settings, world)
    rows = target.rows
    assert len(rows["evaluation"]) == 797 // 2
    assert len(rows["calibration"]) == 200
    assert not set(rows["evaluation"]) & set(rows["calibration"])
    assert rows["evaluation"].tolist() == data.order(797, seed=3, epoch=0)[:398].tolist()


def test_a_paper_row_is_found_for_the_same_method_and_only_for_it(here):
    target = evaluate.open_factory(f"{here}/theirs.py:linear", "digits", Path("data"), None, here, 0)
    target.dataset = "cifar10"

    def row(number, **options):
        target.config = {"options": options}
        return evaluate.paper_row(number, evaluate.Evaluation(target, None, {}, None, "x"))

    fd = {"method": "fd", "norm": "l2", "lam": 0.1, "h": 0.01}
    assert row("2", **fd)[0]["mean_distance_empirical"] == 0.63
    assert row("2", **fd | {"method": "exact"})[0]["mean_distance_empirical"] == 0.13
    assert row("1", method="fd", norm="linf", lam=1.0, h=0.1)[0]["empirical_error_pct_2_255"] == 18.47
    assert row("2", method="none")[0]["training"] == "2.06 h"
    assert row("2", **fd | {"lam": 0.2}) == row("2", **fd | {"h": 0.1}) == row("2", **fd | {"method": "noise"}) == []
    at = {"method": "at", "norm": "linf", "attack_steps": 7, "eps": 8 / 255}
    assert row("1", **at)[0]["empirical_error_pct_8_255"] == 46.02
    assert row("2", **at | {"eps": 2 / 255})[0]["mean_distance_empirical"] == 0.66
    assert row("1", method="free", replays=8, eps=8 / 255)[0]["clean_error_pct"] == 19.94
    assert row("1", **at | {"attack_steps": 10}) == row("1", method="free", replays=8, eps=0.1) == []
    target.dataset = "imagenet"
    assert row("2", **fd)[0]["mean_distance_empirical"] == 1.14
    assert row("2", **fd | {"penalty_space": "pixel"}) == []
    target.dataset = "digits"
    assert row("2", method="none") == []


# --- error bars -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(5, 60))
def test_percentages_have_the_intervals_of_their_definition(seed, n):
    hits = np.random.default_rng(seed).random(n) < 0.3
    value, low, high, _ = evaluate.percent(hits)
    assert value == pytest.approx(100 * hits.mean())
    assert low <= value <= high
    flipped = evaluate.percent(~hits)
    assert (flipped.low, flipped.high) == pytest.approx((100 - high, 100 - low))
    if not hits.any():  # closed form: 1 - (0.025)^(1/n)
        assert high == pytest.approx(100 * (1 - 0.025 ** (1 / n)))


@given(st.integers(0, 2**32), st.integers(5, 60))
def test_paired_differences_are_antisymmetric_and_never_certain(seed, n):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) < 0.3, rng.random(n) < 0.6
    forth, back = evaluate.paired_percent(a, b), evaluate.paired_percent(b, a)
    assert forth.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    same = evaluate.paired_percent(a, a)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    shares, means = [], []
    for _ in range(2000):
        both = rng.random((2, 80)) < np.array([[0.2], [0.35]])
        _, low, high, _ = evaluate.paired_percent(*both)
        shares.append(low <= -15 <= high)
        _, low, high, _ = evaluate.mean(rng.normal(3, 2, 10))
        means.append(low <= 3 <= high)
    assert 0.935 < np.mean(shares) < 0.97
    assert 0.935 < np.mean(means) < 0.965


def test_a_mean_with_an_unknown_distance_is_not_a_number_to_quote():
    assert evaluate.mean(np.array([1.0, 2.0, 3.0]))[:3] == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert evaluate.text(evaluate.mean(np.array([1.0, math.inf]))) == "∞"


# --- the audit --------------------------------------------------------------------------------------------

ZERO, SATURATED = "gradient of the margin exactly zero", "gradient of the cross-entropy exactly zero"
FLAT, BLACK_BOX = "a step along the gradient does not raise the margin", "black-box attack nearer than PGD by 5 %"
WHOLE_BOX = "error under PGD in the whole box"


@pytest.mark.parametrize(
    ("name", "fails", "passes"),
    [
        ("honest", set(), {ZERO, SATURATED, FLAT, BLACK_BOX, WHOLE_BOX}),
        ("linear", set(), {ZERO, SATURATED, FLAT, BLACK_BOX, WHOLE_BOX}),
        ("loud", {SATURATED}, {ZERO, FLAT, BLACK_BOX, WHOLE_BOX}),
        ("quantised", {ZERO, SATURATED, FLAT, BLACK_BOX}, set()),
        ("pretending", {FLAT}, {ZERO, SATURATED}),
    ],
)
def test_masked_networks_fail_on_the_right_lines_and_honest_ones_pass(here, name, fails, passes):
    found = verdicts(evaluated(here, name, *QUICK))
    failed = {line for line, verdict in found.items() if verdict == "FAIL"}
    assert fails <= failed
    assert not passes & failed
    if not fails:
        assert not failed


def arrays(**changed):
    """What audit_part gives for ten images of a network that has nothing to hide."""
    n = 10
    no, pgd = np.zeros(n, bool), np.linspace(0.1, 1, n)
    rising = np.arange(n) < np.array([[2], [4], [6], [10], [10]])
    found = {"zero": no, "zero_training": no, "flat": no, "pgd": pgd, "boundary": 1.3 * pgd, "logbarrier": pgd}
    return found | {"by_eps": rising, "by_steps": rising, "whole_box": ~no, "transferred": no} | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"zero": np.arange(10) < 1},
        {"zero_training": np.arange(10) < 1},
        {"flat": np.arange(10) < 1},
        {"boundary": np.linspace(0.1, 1, 10) * np.where(np.arange(10) < 2, 0.9, 1)},
        {"pgd": np.full(10, math.inf)},
        {"logbarrier": 0.8 * np.linspace(0.1, 1, 10)},
        {"whole_box": np.arange(10) < 9},
        {"by_steps": np.arange(10) < np.array([[3], [5], [4]])},
        {"by_eps": np.arange(10) < np.array([[6], [4], [5], [9], [10]])},
        {"transferred": np.arange(10) < 7},
    ],
)
def test_each_line_of_the_audit_can_fail_alone(changed):
    assert all(verdict.passed for verdict in evaluate.audit(arrays()))
    failed = [verdict.line for verdict in evaluate.audit(arrays(**changed)) if not verdict.passed]
    assert len(failed) == (2 if "pgd" in changed else 1)


def test_misclassified_images_say_nothing_about_black_box_attacks():
    pgd = np.array([0.0, 0.0, 1.0])
    assert evaluate.ratio_to_pgd(np.array([0.0, 0.0, 2.0]), pgd).tolist() == [2.0]
    assert evaluate.ratio_to_pgd(pgd[:2], pgd[:2]).tolist() == [1.0]
    assert evaluate.ratio_to_pgd(np.array([math.inf, 1.0]), np.array([math.inf, math.inf])).tolist() == [1.0, 0.0]


def test_only_the_boundary_attack_is_run_where_no_gradient_arrives(here):
    path = evaluated(here, "quantised", *QUICK)
    assert {row["attack l2"] for row in rows(path / "images.csv")} <= {"boundary", "clean"}
    assert "only the boundary attack was run" in (path / "report.md").read_text()
    assert json.loads((path / "summary.json").read_text())["norms"]["l2"]["omega_bound_mean"] is None


def test_a_network_that_is_wrong_on_a_class_is_evaluated(here):
    path = evaluated(here, "hopeless", *QUICK)
    shown = rows(path / "images.csv")
    assert all(row["distance l2 (pixels 0 to 1)"] == "0.0" for row in shown if row["label"] == "3")
    assert verdicts(path)[BLACK_BOX] == "pass"


# --- the same report, whatever happens --------------------------------------------------------------------


def arguments(here, out):
    targets = [f"{here}/theirs.py:honest", f"{here}/theirs.py:linear"]
    return [*targets, *SHORT, "--norm", "l2", "--smoothing", "0.25", "--samples", "200", "--out", str(out)]


def launch(here, out, *prefix):
    line = [sys.executable, *prefix, str(ROOT / "evaluate.py"), *arguments(here, out), "--device", "cpu"]
    return subprocess.Popen(line, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finished(process):
    _, err = process.communicate(timeout=300)
    assert process.returncode == 0, err


@pytest.fixture(scope="module")
def whole(here):
    """The files of an evaluation that nothing interrupted."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        assert command(monkeypatch, *arguments(here, here / "whole")) == 0
    return files_of(here / "whole")


def test_it_writes_tables_figures_and_parts(whole):
    names = {Path(name).name for name in whole}
    assert {"table2.csv", "table3.csv", "table5.csv", "table6.csv", "differences.csv", "report.md"} <= names
    assert {"errors.png", "bounds.png", "adversarial-l2.png", "gev.png", "images.csv", "summary.json"} <= names
    assert all(content.startswith(b"\x89PNG") for name, content in whole.items() if name.endswith(".png"))


def test_stopped_by_a_signal_or_an_error_it_goes_on_and_ends_with_the_same_files(here, whole, monkeypatch, capsys):
    out, real, done = here / "stopped", evaluate.compute, []

    def interrupted(unit, *rest):
        done.append(unit.file)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        if len(done) == 5:
            raise OSError(28, "No space left on device")
        return real(unit, *rest)

    monkeypatch.setattr(evaluate, "compute", interrupted)
    assert command(monkeypatch, *arguments(here, out)) == 128 + signal.SIGTERM
    assert "goes on from here" in capsys.readouterr().err
    assert len(done) == 2
    assert command(monkeypatch, *arguments(here, out)) == 1
    assert not list(out.rglob("report.md"))
    damaged = sorted(out.rglob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    assert command(monkeypatch, *arguments(here, out)) == 0
    assert files_of(out) == whole
    assert sorted(set(done)) == sorted(out.rglob("*.npz"))
    assert len(done) == len(set(done)) + 2  # the one that failed, the one that was damaged


@pytest.mark.slow
def test_killed_anywhere_and_run_again_it_ends_with_the_same_files(here, whole):
    out = here / "killed"
    for parts in (2, 5):
        process = launch(here, out)
        deadline = time.monotonic() + 200
        while len(list(out.rglob("*.npz"))) < parts and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert not list(out.rglob("report.md"))
    damaged = sorted(out.rglob("*.npz"))[0]
    damaged.write_bytes(damaged.read_bytes()[:-100])
    finished(launch(here, out))
    now = {name: content for name, content in files_of(out).items() if not Path(name).name.startswith(".")}
    assert now == whole


@pytest.mark.slow
def test_two_processes_write_what_one_does(here, whole):
    finished(launch(here, here / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    assert files_of(here / "two") == whole


def test_parts_are_kept_for_the_same_options_and_redone_for_others(here, tmp_path, monkeypatch):
    out, spec = here / "again", f"{here}/theirs.py:linear"
    options = ["--images", "25", "--calibration", "0", "--audit-images", "2", "--norm", "l2", "--out", out]
    computed = []
    real = evaluate.compute
    monkeypatch.setattr(evaluate, "compute", lambda unit, *rest: computed.append(unit.kind) or real(unit, *rest))
    assert command(monkeypatch, spec, *options) == 0
    assert sorted(computed) == ["audit", "evaluation"]
    first = files_of(out)
    assert command(monkeypatch, spec, *options) == 0
    assert len(computed) == 2
    assert files_of(out) == first
    assert command(monkeypatch, spec, *options, "--attack", "pgd") == 0
    assert computed[2:] == ["evaluation"]
    assert command(monkeypatch, spec, *options, "--seed", "1") == 0
    assert sorted(computed[3:]) == ["audit", "evaluation"]
    with open(tmp_path / "theirs.py", "w") as file:  # the same weights behind another forward pass
        file.write(MODELS.replace("return self.scale", "return 2 * self.scale"))
    assert command(monkeypatch, f"{tmp_path}/theirs.py:linear", *options, "--seed", "1") == 0
    assert sorted(computed[5:]) == ["audit", "evaluation"]
    monkeypatch.setattr(evaluate, "code", lambda: "another attack")
    assert command(monkeypatch, f"{tmp_path}/theirs.py:linear", *options, "--seed", "1") == 0
    assert sorted(computed[7:]) == ["audit", "evaluation"]


def test_two_models_of_one_name_are_two_and_one_named_twice_is_one(here, tmp_path):
    (tmp_path / "theirs.py").write_text(MODELS)
    specs = [f"{here}/theirs.py:linear", f"{tmp_path}/theirs.py:linear", f"{here}/../{here.name}/theirs.py:linear"]
    targets = evaluate.open_targets(specs, "digits", None, None, tmp_path / "out", 0)
    assert [target.name for target in targets] == ["theirs-linear", "theirs-linear#2"]
    assert targets[0].path != targets[1].path


def test_what_an_earlier_evaluation_left_and_this_one_has_not_is_removed(here, monkeypatch):
    out, spec = here / "less", f"{here}/theirs.py:linear"
    few = ["--images", "2", "--calibration", "0", "--audit-images", "1", "--attack", "fab", "--out", out]
    assert command(monkeypatch, spec, *few, "--smoothing", "0.1", "--samples", "100") == 0
    (out / "theirs-linear" / "notes.csv").write_text("mine")
    before = {path.name for path in (out / "theirs-linear").iterdir()}
    assert command(monkeypatch, spec, *few, "--norm", "l2") == 0
    after = {path.name for path in (out / "theirs-linear").iterdir()}
    assert before - after == {"table1.csv", "table5.csv", "adversarial-linf.png"}
    assert "notes.csv" in after


# --- a run directory --------------------------------------------------------------------------------------


def test_runs_are_compared_and_reported_in_their_own_directories(tmp_path, monkeypatch):
    options = ["digits", "--subset", "300", "--batch-size", "20", "--epochs", "1", "--runs", str(tmp_path / "runs")]
    for method, h in (("none", 0.1), ("fd", 0.1), ("fd", 0.2)):
        monkeypatch.setattr(sys, "argv", ["train.py", *options, "--method", method, "--h", str(h)])
        assert runs.run_command(train.main) == 0
    targets = sorted(path for path in (tmp_path / "runs").iterdir() if path.name != "latest")
    few = ["--images", "25", "--calibration", "0", "--audit-images", "2", "--norm", "linf", "--attack", "fab"]
    assert command(monkeypatch, *targets, *few, "--out", tmp_path / "out") == 0
    (together,) = (tmp_path / "out").iterdir()
    table4 = rows(together / "table4.csv")
    assert sorted(row["h"] for row in table4) == ["", "0.1", "0.2"]
    for row, target in zip(table4, targets, strict=True):
        found = [float(image["distance linf (pixels 0 to 1)"]) for image in rows(target / "evaluation" / "images.csv")]
        share = 100 * np.mean([d <= 8 / 255 for d in found])
        assert row["model"] == target.name
        assert float(row["empirical_error_pct_8_255"]) == pytest.approx(share)
    lines = rows(together / "audit.csv")
    transfer = next(row for row in lines if "undefended network" in row["line"])
    assert sum(value.startswith(("pass", "FAIL")) for value in transfer.values()) == 2
    assert "epochs of 300" in rows(together / "table1.csv")[0]["training"]
    assert evaluate.seconds_of(targets[0] / "metrics.jsonl") > 0
    with open(targets[0] / "metrics.jsonl", "a") as log:
        log.write('{"kind": "epoch", "sec')
    assert evaluate.seconds_of(targets[0] / "metrics.jsonl") > 0
    for target in targets:
        assert json.loads((target / "evaluation" / "summary.json").read_text())["images"] == 25


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "no such file"),
        ("nowhere.py:build", "no such file"),
        ("{here}/theirs.py:missing", "missing"),
        ("{here}/theirs.py:broken", "no weights here"),
        ("{here}/theirs.py:not_a_module", "int"),
        ("{here}/theirs.py:seven_classes", "7 classes"),
        ("{here}/theirs.py:nan", "not finite"),
        ("{here}/theirs.py:detached", "grad"),
        ("{here}", "checkpoint"),
    ],
)
def test_a_target_that_cannot_be_measured_is_refused_in_one_line(here, tmp_path, monkeypatch, capsys, target, says):
    assert command(monkeypatch, target.format(here=here), *QUICK, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad", [["--attack", "magic"], ["--norm", "l7"], ["--blocks", "3"], ["--smoothing", "-1"], ["--data", "nothing"]]
)
def test_bad_options_are_refused_in_one_line(here, tmp_path, monkeypatch, capsys, bad):
    assert command(monkeypatch, f"{here}/theirs.py:linear", *bad, "--out", tmp_path / "out") == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.rglob("*.npz"))


def test_images_outside_0_1_are_refused_and_earlier_results_stay(here, monkeypatch, capsys):
    path = evaluated(here, "linear", *QUICK)
    before, real = files_of(path), data.fetch
    monkeypatch.setattr(data, "fetch", lambda *arguments: (2 * real(*arguments)[0], real(*arguments)[1]))
    assert command(monkeypatch, f"{here}/theirs.py:linear", *QUICK, "--out", path.parent, "--seed", "5") == 2
    assert "[0, 1]" in capsys.readouterr().err
    assert files_of(path) == before


def test_a_place_where_nothing_can_be_written_is_refused(here, tmp_path, monkeypatch, capsys):
    (tmp_path / "out").write_text("a file")
    assert command(monkeypatch, f"{here}/theirs.py:linear", *QUICK, "--out", tmp_path / "out") == 2
    assert "cannot write" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "a file"
