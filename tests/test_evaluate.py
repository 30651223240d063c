"""Evaluation: exact on what is known in closed form, the same however it is interrupted or shared, and not fooled."""

import contextlib
import csv
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import scipy.stats
import torch
from matplotlib.figure import Figure
from PIL import Image

import data
import evaluate
import models
import runs
import train
from gradreg import cross_entropy, input_gradient

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PYTHONPATH": str(ROOT)}
MODELS = '''
from pathlib import Path

import torch
from torch import nn

import data


def fit(network):
    torch.set_num_threads(1)
    file = Path(__file__).parent / f"fitted-{len(network)}.pt"
    if file.exists():
        network.load_state_dict(torch.load(file, weights_only=True))
        return network
    digits = data.load("digits").train
    images, labels = digits.images / digits.top, digits.labels
    optimizer = torch.optim.Adam(network.parameters(), lr=0.01)
    for _ in range(150):
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(images), labels).backward()
        optimizer.step()
    torch.save(network.state_dict(), file)
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


def loud():
    return Masked(100, None)


def quantised():
    return Masked(1, 2.5)


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


class Cut(Masked):
    """The honest network, through which no gradient comes."""

    def forward(self, x):
        how = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(self.scale)
        if how is None:
            return self.network(x.detach())
        with how():
            return self.network(x)


def detached():
    return Cut("detached", None)


def no_grad():
    return Cut("no_grad", None)


def inference_mode():
    return Cut("inference_mode", None)


def int8():
    return torch.ao.quantization.quantize_dynamic(honest().eval(), {nn.Linear}, dtype=torch.qint8)


class Half(Masked):
    def forward(self, x):
        return self.network(x).bfloat16()


def bfloat16():
    return Half(1, None)


def script():
    return torch.jit.script(honest())


def grey():
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def colour():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))


def dead():
    """Ten logits that are always 0: argmax says 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.ReLU())
    with torch.no_grad():
        network[1].bias -= 1000
    return network


def fixed():
    return Fixed(1, None)


class Fixed(Masked):
    def forward(self, x):
        return self.network(x.float())


def hopeless():
    network = honest()
    with torch.no_grad():
        network[-1].bias -= 1000 * torch.eye(10)[3]  # never a 3
    return network
'''
QUICK = ["--images", "10", "--calibration", "4", "--audit-images", "5", "--blocks", "0", "--norm", "l2"]
FEW = ["--images", "4", "--calibration", "0", "--audit-images", "1", "--norm", "l2", "--attack", "fab"]
SHORT = ["--images", "26", "--calibration", "4", "--audit-images", "2", "--blocks", "6", "--attack", "fab"]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """A directory with somebody's models in it."""
    path = tmp_path_factory.mktemp("models")
    (path / "theirs.py").write_text(MODELS)
    return path


@pytest.fixture(autouse=True, scope="module")
def _unrendered_figures():
    """Figures are drawn, but not rendered: that takes most of the time of a report, and test_report.py does it."""
    with pytest.MonkeyPatch.context() as monkeypatch:
        drawn = lambda figure, file, **_: file.write(b"\x89PNG %d axes" % len(figure.axes))  # noqa: E731
        monkeypatch.setattr(Figure, "savefig", drawn)
        yield


def command(monkeypatch, *arguments):
    """Run evaluate.py's command line in this process; its exit code."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, arguments)])
    return runs.run_command(evaluate.main)


def evaluated(here, name, *options):
    """The directory of an evaluation of one of the models, done once."""
    out, spec = here / "-".join([name, *options]).replace(" ", ""), f"{here}/theirs.py:{name}"
    if not out.exists():
        with pytest.MonkeyPatch.context() as monkeypatch:
            assert command(monkeypatch, spec, "--out", out, *options) == 0
    return out / models.name_of_spec(spec)


def column(path, name):
    """The column of images.csv that begins so."""
    return [value for row in rows(path / "images.csv") for key, value in row.items() if key.startswith(name)]


@pytest.fixture
def _passing_audit(monkeypatch):
    """An audit at no cost, which everything passes, for tests of something else."""

    def audited(unit, *_):
        no = np.zeros(len(unit.rows), dtype=bool)
        found = {"zero": no, "zero_training": no, "by_eps": np.stack([no] * 4, 1), "by_steps": np.stack([no] * 3, 1)}
        return found | dict.fromkeys(("pgd", "boundary", "logbarrier"), np.ones(len(no))) | {"whole_box": ~no}

    monkeypatch.setitem(evaluate.PARTS, "audit", audited)


def rows(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def verdicts(path, norm="l2"):
    """line -> whether it passed, of the audit of one target."""
    (row,) = rows(path / f"summary-{norm}.csv")
    audit = {re.match(r"audit: (.*) \(at most", name): value for name, value in row.items()}
    return {name[1]: value.split()[0] for name, value in audit.items() if name}


def files_of(path):
    """All files; but not the commit in the report, since somebody may commit during a test."""
    files = {str(p.relative_to(path)): p.read_bytes() for p in path.rglob("*") if p.is_file()}
    return {name: re.sub(rb"commit \S+", b"", content) for name, content in files.items()}


# --- truth ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_distances_of_a_linear_network_are_the_known_ones(here, norm):
    """Between the distance to the nearest hyperplane, which ignores the box, and that within the box."""
    path = evaluated(here, "linear", *QUICK[:-1], norm)
    namespace = {"__file__": str(here / "theirs.py")}
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
    assert summary["images"] == 10
    assert summary["clean_error_pct"] == pytest.approx(100 * np.mean(wrong))
    figures = summary["norms"]["l2"]
    assert figures["mean_distance"] == pytest.approx(np.mean(distances))
    assert figures["error_pct"]["0.5"] == pytest.approx(100 * np.mean([d <= 0.5 for d in distances]))
    bound = [float(image[f"omega-bound l2 {figures['bound_method']} (pixels 0 to 1)"]) for image in images]
    assert figures["omega_bound_mean"] == pytest.approx(np.mean(bound), rel=1e-5)
    (allowed, *_), (regularity, *_) = rows(path / "table6.csv"), rows(path / "table3.csv")
    assert float(allowed["omega_error_pct_0.25"]) == pytest.approx(100 * np.mean([b < 0.25 for b in bound]))
    gradients = [float(v) for image in images for name, v in image.items() if name.startswith("gradient norm")]
    assert float(regularity["grad_norm_max"]) == pytest.approx(max(gradients))
    assert float(regularity["grad_norm_mean"]) == pytest.approx(np.mean(gradients))
    false = np.mean([b > d for b, d in zip(bound, distances, strict=True)])
    assert figures["violations_pct"] == pytest.approx(100 * false)


def test_summary_has_what_the_documentation_promises(here):
    page = (ROOT / "docs" / "run-directory.md").read_text(encoding="utf-8")
    (text,) = [part for part in page.split("\n\n") if "summary.json" in part and "`norms`" in part]
    summary = json.loads((evaluated(here, "honest", *QUICK) / "summary.json").read_text())
    for name in ("images", "topk", "clean_error_pct", "checkpoint_step", "network", "norms"):
        assert f"`{name}`" in text
        assert name in summary
    for name in ("mean_distance", "median_distance", "lipschitz_bound_mean", "omega_bound_mean", "violations_pct"):
        assert f"`{name}`" in text
        assert math.isfinite(summary["norms"]["l2"][name])
    assert summary["checkpoint_step"] is None  # a stranger's
    assert summary["network"] in (evaluated(here, "honest", *QUICK) / "report.md").read_text(encoding="utf-8")


def settings(**fields):
    named = {"targets": [], "norm": ["l2"], "images": 12, "calibration": 5, "blocks": 0, "audit_images": 6}
    return evaluate.Settings(**named | {"samples": 100} | fields)


def test_calibration_and_evaluation_images_are_disjoint_and_drawn_by_the_seed(here):
    asked = settings(images=10_000, calibration=200, seed=3, out=here)
    target = evaluate.open_factory(f"{here}/theirs.py:linear", asked)
    evaluate.prepare(target, world := runs.World("cpu"))
    rows = target.rows
    assert len(rows["evaluation"]) == 797 // 2
    assert len(rows["calibration"]) == 200
    assert not set(rows["evaluation"]) & {*rows["calibration"], *target.others}
    assert rows["evaluation"] == data.order(797, seed=3, epoch=0)[:398].tolist()
    said = evaluate.price(evaluate.units_of(target, world), 1)
    assert "398 of 797 images, 200 others to calibrate with" in said


def test_the_papers_suite_is_each_attack_alone_on_every_image_and_the_nearest_of_them(here, monkeypatch):
    """LogBarrier is an independent witness, in the audit too: told to start from the images, it starts from noise."""
    from_images, real = [], evaluate.attacks.logbarrier

    def spy(network, images, labels, *, start, **how):
        from_images.append(start is images)
        return real(network, images, labels, start=start, **how)

    monkeypatch.setattr(evaluate.attacks, "logbarrier", spy)
    path, default = evaluated(here, "honest", *QUICK, "--suite", "paper"), evaluated(here, "honest", *QUICK)
    names = evaluate.SUITES["paper"]
    each = {name: np.array(column(path, f"{name} alone, distance l2"), float) for name in names}
    found, who = np.array(column(path, "distance l2"), float), column(path, "attack l2")
    np.testing.assert_array_equal(found, np.min(list(each.values()), axis=0))
    assert all(each[name][i] == found[i] for i, name in enumerate(who) if name in names)
    assert all((name == "clean") == (found[i] == 0) for i, name in enumerate(who))
    np.testing.assert_allclose(found, np.array(column(default, "distance l2"), float), rtol=0.02)
    ((table,), (other,)) = (rows(some / "summary-l2.csv") for some in (path, default))
    for name in names:
        assert float(table[f"mean_distance_{name}_alone"]) == pytest.approx(each[name].mean())
        assert f"mean_distance_{name}_alone" not in other
    shares = [f"{name} {100 * who.count(name) / len(who):.1f}" for name in evaluate.attacks.SUITE if name in who]
    assert table["found_by_%"] == ", ".join(shares)
    assert len(from_images) >= 3  # calibration, evaluation, audit
    assert all(from_images)


def test_an_attack_that_finds_nothing_is_at_infinity_and_the_misclassified_are_at_0(here, monkeypatch):
    target, images, labels = opened(here, "honest")
    labels[0] = (labels[0] + 1) % 10
    for name in evaluate.SUITES["paper"]:
        monkeypatch.setattr(evaluate.attacks, name, lambda network, images, labels, **_: images)
    target.suite, target.settings = evaluate.SUITES["paper"], settings(suite="paper")
    unit = evaluate.Unit(target, "evaluation", "l2", 0.0, 0, [], 0, here)
    adversarial, found = evaluate.attacked(unit, images, labels, torch.Generator())
    assert torch.equal(adversarial, images)
    assert found["attacks"][0] == "clean"
    assert found["distances"][0] == 0
    correct = found["distances"] > 0
    assert (found["attacks"][correct] == "none").all()
    assert np.isinf(found["distances"][correct]).all()
    assert correct.any()


# --- networks of all kinds --------------------------------------------------------------------------------


def opened(here, name):
    """One of the models, ready to be measured, and images to measure it on."""
    asked, world = settings(out=here, attack=["fab"]), runs.World("cpu")
    target = evaluate.open_factory(f"{here}/theirs.py:{name}", asked)
    evaluate.prepare(target, world)
    return target, *target.fetch(target.rows["evaluation"], world.device)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["detached", "no_grad", "inference_mode", "int8", "quantised", "honest", "script"])
def test_a_network_without_gradients_is_known_and_decides_as_before(here, name):
    """Its gradient is zero, in place of an error; one with gradients keeps them, TorchScript's as well."""
    target, images, labels = opened(here, name)
    _, grad = input_gradient(lambda x: cross_entropy(target.network(x), labels), images)
    assert target.network.blind == (name not in ("honest", "script"))
    assert target.suite == (["boundary"] if target.network.blind else ["fab"])
    assert grad.any() != target.network.blind
    assert not any(parameter.requires_grad for parameter in target.network.parameters())
    if name not in ("int8", "quantised"):
        honest, *_ = opened(here, "honest")
        assert torch.equal(target.network(images), honest.network(images))
        if not target.network.blind:
            assert torch.equal(grad, input_gradient(lambda x: cross_entropy(honest.network(x), labels), images)[1])


def test_without_gradients_decisions_alone_are_attacked_and_the_report_says_so(here):
    path, reference = (
        np.array(column(evaluated(here, name, *QUICK), "distance l2"), float) for name in ("detached", "honest")
    )
    assert (path >= 0.99 * reference).all()
    assert (path <= 2 * reference).all()
    path = evaluated(here, "detached", *QUICK)
    assert set(column(path, "attack l2")) == {"boundary"}
    assert "attacked by its decisions alone" in (path / "report.md").read_text(encoding="utf-8")
    assert json.loads((path / "summary.json").read_text())["norms"]["l2"]["omega_bound_mean"] is None
    assert not {"bounds.png", "table6.csv"} & {file.name for file in path.iterdir()}
    assert verdicts(path)[ZERO] == "FAIL"


@pytest.mark.usefixtures("_passing_audit")
def test_logits_of_16_bits_are_measured(here):
    half, whole = (
        np.array(column(evaluated(here, name, *FEW), "distance l2"), float) for name in ("bfloat16", "honest")
    )
    np.testing.assert_allclose(half, whole, rtol=0.2, atol=0.02)


@pytest.mark.filterwarnings("ignore")
def test_other_weights_are_another_network_also_where_they_are_packed():
    def packed(scale):
        network = torch.nn.Sequential(torch.nn.Linear(4, 3))
        torch.nn.init.constant_(network[0].weight, scale)
        torch.nn.init.zeros_(network[0].bias)
        return torch.ao.quantization.quantize_dynamic(network.eval(), {torch.nn.Linear}, dtype=torch.qint8)

    prints = [evaluate.fingerprint(packed(scale), b"") for scale in (1.0, 1.0, 2.0)]
    assert prints[0] == prints[1] != prints[2]
    frozen = [torch.jit.freeze(torch.jit.script(torch.nn.Linear(4, 3).eval())) for _ in range(2)]
    prints = [evaluate.fingerprint(torch.nn.Sequential(frozen[i]), b"") for i in (0, 0, 1)]
    assert prints[0] == prints[1] != prints[2]
    plain = [torch.nn.Linear(4, 3) for _ in range(2)]
    assert evaluate.fingerprint(plain[0], b"") != evaluate.fingerprint(plain[1], b"")
    assert evaluate.fingerprint(plain[0], b"") != evaluate.fingerprint(plain[0], b"other code")


# --- the audit --------------------------------------------------------------------------------------------

ZERO, SATURATED = "gradient of the margin exactly zero", "gradient of the cross-entropy exactly zero"
BLACK_BOX, WHOLE_BOX = "black-box attack nearer than PGD by 5 %", "PGD fails in the whole box"


@pytest.mark.parametrize(
    ("name", "fails", "passes"),
    [
        ("honest", set(), {ZERO, SATURATED, BLACK_BOX, WHOLE_BOX}),
        ("linear", set(), {ZERO, SATURATED, BLACK_BOX, WHOLE_BOX}),
        ("loud", {SATURATED}, {ZERO, BLACK_BOX, WHOLE_BOX}),
        ("quantised", {ZERO, SATURATED, BLACK_BOX}, set()),
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
    rising = np.arange(n)[:, None] < np.array([2, 4, 6, 10])
    found = {"zero": no, "zero_training": no, "pgd": pgd, "boundary": 1.3 * pgd, "logbarrier": pgd}
    return found | {"by_eps": rising, "by_steps": rising, "whole_box": ~no} | changed


@pytest.mark.parametrize(
    "changed",
    [
        {"zero": np.arange(10) < 1},
        {"zero_training": np.arange(10) < 1},
        {"boundary": np.linspace(0.1, 1, 10) * np.where(np.arange(10) < 2, 0.9, 1)},
        {"pgd": np.full(10, math.inf)},
        {"logbarrier": 0.8 * np.linspace(0.1, 1, 10)},
        {"whole_box": np.arange(10) < 9},
        {"by_steps": np.arange(10)[:, None] < np.array([3, 5, 4])},
        {"by_eps": np.arange(10)[:, None] < np.array([6, 4, 9, 10])},
    ],
)
def test_each_line_of_the_audit_can_fail_alone(changed):
    assert all(figure <= limit for figure, limit in evaluate.audit(arrays()).values())
    failed = [line for line, (figure, limit) in evaluate.audit(arrays(**changed)).items() if figure > limit]
    assert len(failed) == (2 if "pgd" in changed else 1)


def test_misclassified_images_say_nothing_about_attacks_that_are_compared():
    def nearer(pgd, boundary):
        return evaluate.audit(arrays(pgd=np.array(pgd), boundary=np.array(boundary), logbarrier=np.array(pgd)))

    some = nearer([0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 0.9])
    assert some[BLACK_BOX] == (50.0, 10)
    assert nearer([0.0, 0.0], [0.0, 0.0])[BLACK_BOX] == (0.0, 10)
    assert nearer([math.inf, math.inf], [math.inf, 1.0])[BLACK_BOX] == (50.0, 10)


def test_a_network_that_is_wrong_on_a_class_is_evaluated(here):
    path = evaluated(here, "hopeless", *QUICK)
    shown = rows(path / "images.csv")
    assert all(row["distance l2 (pixels 0 to 1)"] == "0.0" for row in shown if row["label"] == "3")
    assert verdicts(path)[BLACK_BOX] == "pass"


def test_equal_logits_are_decided_as_argmax_does(here):
    """A network whose ten logits are always the same is right on the first class alone, and for good there."""
    path = evaluated(here, "dead", *QUICK)
    shown = rows(path / "images.csv")
    for row in shown:
        first = row["label"] == "0"
        assert row["predicted"] == "0"
        assert row["classes ahead of the label"] == row["label"]
        assert row["distance l2 (pixels 0 to 1)"] == ("inf" if first else "0.0")
    (summary,) = rows(path / "summary-l2.csv")
    share = 100 * np.mean([row["label"] != "0" for row in shown])
    assert float(summary["clean_error_pct"]) == pytest.approx(share)
    assert float(summary["top-5_error_pct"]) == pytest.approx(100 * np.mean([int(row["label"]) >= 5 for row in shown]))


# --- what it costs ----------------------------------------------------------------------------------------


class Times(torch.nn.Module):
    """x -> a x, that remembers how many images each pass had, forward and backward."""

    def __init__(self):
        super().__init__()
        self.forwards, self.backwards = [], []

    def forward(self, x):
        self.forwards.append(len(x))
        if x.requires_grad:
            x.register_hook(lambda grad: self.backwards.append(len(grad)))
        return x.flatten(1) * torch.arange(1.0, 4)


def test_a_network_is_watched_before_each_pass_both_ways_and_computes_the_same():
    x, weights = torch.rand(10, 3, generator=torch.Generator().manual_seed(0)), torch.arange(30.0).view(10, 3)
    network, watched = Times(), evaluate.Watched(Times())
    results = [input_gradient(lambda z: (n(z) * weights).sum(1), x) for n in (network, watched)]  # noqa: B023
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert (watched.network.forwards, watched.network.backwards, watched.calls) == ([10], [10], 20)
    with oracle.Looks() as looks:
        input_gradient(lambda z: watched(z).sum(1), x)
    assert looks.count == 0
    for stop in (1, 2):  # before the pass forward, and before that back
        seen, watched = [], evaluate.Watched(Times())

        def watch(calls, seen=seen, stop=stop):
            seen.append(calls)
            if len(seen) == stop:
                raise InterruptedError

        watched.watch = watch
        with pytest.raises(InterruptedError):
            input_gradient(lambda z: watched(z).sum(1), x)  # noqa: B023
        assert seen == [10] * stop
        assert len(watched.network.forwards) == stop - 1


@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_a_part_costs_about_what_was_announced(here, norm):
    """The attacks may stop early; nothing may take much more than it said."""
    asked, world = settings(out=here, norm=[norm], calibration=12, blocks=5, budget=60), runs.World("cpu")
    target = evaluate.open_factory(f"{here}/theirs.py:honest", asked)
    evaluate.prepare(target, world)
    units = evaluate.units_of(target, world)
    assert {unit.kind for unit in units} == {"sampling", "ascent", "calibration", "evaluation", "audit"}
    for unit in units:
        seen = []
        target.network.watch = seen.append
        evaluate.compute(unit, world)
        assert 0.2 * unit.calls < sum(seen) < 1.2 * unit.calls, unit.kind


def test_the_budget_is_what_an_image_may_cost_and_the_report_says_what_was_spent(here):
    few, more = (evaluated(here, "honest", *FEW[:-2], "--budget", str(budget)) for budget in (20, 300))
    near, far = (np.array(column(path, "distance l2"), float) for path in (more, few))
    assert (near <= far * (1 + 1e-6)).all()
    spent = []
    for path, budget in ((few, 20), (more, 300)):
        lines = (path / "report.md").read_text(encoding="utf-8").splitlines()
        (calls,) = [float(line.split("|")[2]) for line in lines if "calls an image" in line]
        assert 0.5 * budget < calls <= budget
        spent.append(calls)
    assert spent[0] < spent[1]


def test_parts_have_all_rows_and_fewer_where_each_takes_long(here, tmp_path):
    asked = settings(out=tmp_path, images=300, calibration=0, audit_images=100, smoothing=[0.1], samples=20_000)
    target, world = evaluate.open_factory(f"{here}/theirs.py:linear", asked), runs.World("cpu")
    evaluate.prepare(target, world)
    units = evaluate.units_of(target, world)
    for kind, size in (("evaluation", 100), ("audit", 100), ("smoothing", 10)):
        parts = [unit.rows for unit in units if unit.kind == kind]
        assert [row for part in parts for row in part] == target.rows[kind]
        assert max(map(len, parts)) <= size
    assert len({unit.file for unit in units}) == len(units)


def test_the_price_is_the_product_of_its_parts(here, tmp_path):
    asked = settings(out=tmp_path, images=300, calibration=0, norm=["l2", "linf"])
    target, world = evaluate.open_factory(f"{here}/theirs.py:linear", asked), runs.World("cpu")
    evaluate.prepare(target, world)
    target.pace = 0.12
    units = evaluate.units_of(target, world)
    for processes, by in ((1, ""), (2, " by 2 processes")):
        pattern = rf": about ([\d.]+) h{by}: 300 of 797 images, .* with, ([\d,]+) calls of (\d+) ms, in (\d+) parts"
        hours, calls, ms, parts = re.search(pattern, evaluate.price(units, processes)).groups()
        assert (int(ms), int(parts), int(calls.replace(",", ""))) == (120, len(units), sum(u.calls for u in units))
        assert float(hours) == pytest.approx(sum(u.calls for u in units) * 0.12 / 3600 / processes, abs=0.06)


def test_progress_moves_within_a_part_and_is_said_where_there_is_no_terminal(monkeypatch, capsys, tmp_path):
    """Of three parts of 1000 calls, all of 0.1 s, the second: more calls than were expected, one of them stopped."""
    clock, shown, world = [1000.0], [], runs.World("cpu")
    network = evaluate.Watched(torch.nn.Identity())
    known = {"name": "net", "pace": 0.1, "rows": {"evaluation": [1, 2], "calibration": []}, "source": range(4)}
    target = type("Target", (), known | {"network": network})()
    files = [tmp_path / name for name in ("0.npz", "1.npz", "2.npz")]
    units = [evaluate.Unit(target, "evaluation", "l2", 0.0, i, [], 1000, file) for i, file in enumerate(files)]
    monkeypatch.setattr(evaluate.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(runs, "progress_bar", lambda *_: contextlib.nullcontext(shown.append))

    def compute(unit, _):
        for _ in range(110 * (unit.block == 1)):
            clock[0] += 1
            network.watch(20)
        if unit.block == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            network.watch(1)
            shown.append("not stopped")
        return {"x": np.zeros(1)}

    monkeypatch.setattr(evaluate, "compute", compute)
    with pytest.raises(runs.Failure, match="goes on from here"):
        evaluate.work(units, world)
    assert shown == pytest.approx([100 * min(1, (1000 + 20 * i) / 3000) for i in range(1, 111)])
    said = capsys.readouterr().out.splitlines()
    assert said[-1] == "74 % done, 21 s left"  # after 61 s
    assert [file.exists() for file in files] == [True, True, False]


# --- the same report, whatever happens --------------------------------------------------------------------


def arguments(here, out):
    targets = [f"{here}/theirs.py:honest", f"{here}/theirs.py:linear"]
    noise = ["--smoothing", "0.25", "--smoothing", "0.1", "--samples", "200"]
    return [*targets, *SHORT, "--norm", "l2", *noise, "--out", str(out)]


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
        for module in ("evaluate", "report"):
            monkeypatch.delitem(sys.modules, module, raising=False)
        monkeypatch.setattr(sys, "argv", ["evaluate.py", *arguments(here, here / "whole")])
        with pytest.raises(SystemExit) as end:
            runpy.run_path(str(ROOT / "evaluate.py"), run_name="__main__")  # as the command does
        assert end.value.code == 0
    return files_of(here / "whole")


def test_it_writes_tables_figures_and_parts(whole):
    names = {Path(name).name for name in whole}
    assert {"table2.csv", "table3.csv", "table5.csv", "table6.csv", "summary-l2.csv", "report.md"} <= names
    assert {"errors.png", "bounds.png", "adversarial-l2.png", "images.csv", "summary.json"} <= names
    assert all(content.startswith(b"\x89PNG") for name, content in whole.items() if name.endswith(".png"))
    texts = [content.decode() for name, content in whole.items() if name.endswith("report.md")]
    assert all("1 x 8 x 8" in text for text in texts)
    assert len(texts) == 3
    assert re.search(r"sampled \| .*\(one draw\)", texts[0])


def test_two_networks_are_compared_image_by_image(here, whole):
    """The mean difference from the first has the interval of the paired t test."""
    (together,) = (here / "whole").glob("*_vs_*")
    first, second = rows(together / "summary-l2.csv")
    a, b = (np.array(column(here / "whole" / name, "distance l2"), float) for name in together.name.split("_vs_"))
    known = scipy.stats.ttest_rel(b, a).confidence_interval(0.95)
    ends = [float(second[f"mean_distance_beyond_the_first{end}"]) for end in ("", "_low", "_high")]
    assert ends == pytest.approx([(b - a).mean(), known.low, known.high])
    assert first["mean_distance_beyond_the_first"] == ""


def unrendered(files):
    return {name: content for name, content in files.items() if not name.endswith(".png")}


def test_stopped_by_a_signal_or_an_error_it_goes_on_and_ends_with_the_same_files(here, whole, monkeypatch, capsys):
    """A signal is obeyed in the middle of a part, before the network is called again; and no part is done twice."""
    out, real, done, calls = here / "stopped", evaluate.compute, [], []

    def interrupted(unit, *rest):
        done.append(unit.file)
        if len(done) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
            unit.target.network.network.register_forward_hook(lambda *_: calls.append(1))
        if len(done) == 5:
            raise OSError(28, "No space left on device")
        return real(unit, *rest)

    monkeypatch.setattr(evaluate, "compute", interrupted)
    assert command(monkeypatch, *arguments(here, out)) == 128 + signal.SIGTERM
    said = capsys.readouterr()
    assert re.search(r"about \d+ s: 26 of 797 images, 4 others .* [\d,]+ calls of \S+ ms, in \d+ parts", said.out)
    assert "goes on from here" in said.err
    assert len(done) == 2
    assert not calls
    assert not done[1].exists()
    assert command(monkeypatch, *arguments(here, out)) == 1
    assert not list(out.rglob("report.md"))
    assert command(monkeypatch, *arguments(here, out)) == 0
    assert files_of(out) == whole
    assert sorted(set(done)) == sorted(out.rglob("*.npz"))
    assert len(done) == len(set(done)) + 2  # the one that was stopped, the one that failed
    damaged = done[0]
    damaged.write_bytes(damaged.read_bytes()[:100])  # by a disk that was full, say: that part, and no other, is new
    assert command(monkeypatch, *arguments(here, out)) == 0
    assert files_of(out) == whole
    assert done[-1] == damaged
    assert done.count(damaged) == 2


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
    finished(launch(here, out))
    now = {name: content for name, content in files_of(out).items() if not Path(name).name.startswith(".")}
    assert now.keys() == whole.keys()
    assert unrendered(now) == unrendered(whole)
    finished(launch(here, out))
    assert all(files_of(out)[name] == content for name, content in now.items())  # the figures as well


@pytest.mark.slow
def test_two_processes_write_what_one_does(here, whole):
    finished(launch(here, here / "two", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"))
    assert unrendered(files_of(here / "two")) == unrendered(whole)


@pytest.mark.usefixtures("_passing_audit")
def test_parts_are_kept_for_the_same_options_and_redone_for_others(here, tmp_path, monkeypatch):
    for file in here.glob("fitted-*.pt"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "theirs.py").write_text(MODELS)
    options = ["--images", "4", "--audit-images", "1", "--norm", "l2", "--samples", "100", "--blocks", "0"]
    computed, real = [], evaluate.compute

    def redone(*others):
        """The kinds of the parts that are done with these options besides."""
        computed.clear()
        assert command(monkeypatch, f"{tmp_path}/theirs.py:linear", *options, "--out", tmp_path / "out", *others) == 0
        return sorted(computed)

    monkeypatch.setattr(evaluate, "compute", lambda unit, *rest: computed.append(unit.kind) or real(unit, *rest))
    none, both = ["--calibration", "0", "--attack", "fab"], ["audit", "evaluation"]
    assert redone(*none) == both
    first = files_of(tmp_path / "out")
    assert redone(*none) == []
    assert files_of(tmp_path / "out") == first
    assert redone(*none, "--smoothing", "0.1") == ["smoothing"]
    assert redone(*none, "--smoothing", "0.1", "--norm", "linf") == both  # beside l2
    assert redone("--calibration", "2", "--attack", "fab") == ["ascent", "audit", "calibration", "evaluation"]
    assert redone("--calibration", "0", "--attack", "pgd") == both
    assert redone(*none) == []  # nothing is thrown away
    assert redone(*none, "--seed", "1") == both
    (tmp_path / "theirs.py").write_text(MODELS.replace("return self.scale", "return 2 * self.scale"))
    assert redone(*none) == both  # the same weights behind another forward pass
    monkeypatch.setattr(evaluate.attacks, "__file__", __file__)
    assert redone(*none) == both  # another attack


def test_two_models_of_one_name_are_two_and_one_named_twice_is_one(here, tmp_path):
    (tmp_path / "theirs.py").write_text(MODELS)
    specs = [f"{here}/theirs.py:linear", f"{tmp_path}/theirs.py:linear", f"{here}/../{here.name}/theirs.py:linear"]
    targets = evaluate.open_targets(settings(targets=specs, out=tmp_path / "out"))
    assert len({target.name for target in targets}) == len({target.path for target in targets}) == 2
    (alone,) = evaluate.open_targets(settings(targets=specs[1:2], out=tmp_path / "out"))
    assert alone.path == targets[1].path  # whoever is evaluated beside it


@pytest.mark.usefixtures("_passing_audit")
def test_what_an_earlier_evaluation_left_and_this_one_has_not_is_removed(here, monkeypatch):
    out, spec = here / "less", f"{here}/theirs.py:linear"
    few = ["--images", "2", "--calibration", "0", "--audit-images", "1", "--attack", "fab", "--out", out]
    assert command(monkeypatch, spec, *few, "--smoothing", "0.1", "--samples", "100") == 0
    path = out / models.name_of_spec(spec)
    (path / "notes.csv").write_text("mine")
    (path / "differences.csv").write_text("of a version before this one")
    before = {file.name for file in path.iterdir()}
    assert command(monkeypatch, spec, *few, "--norm", "l2") == 0
    after = {file.name for file in path.iterdir()}
    assert before - after == {"table1.csv", "table5.csv", "summary-linf.csv", "adversarial-linf.png", "differences.csv"}
    assert "notes.csv" in after


# --- a run directory --------------------------------------------------------------------------------------


def changed(run, name, step=0, **options):
    """A copy of a run with other options in its config, and other weights where it has another step."""
    path = run.parent / name
    path.mkdir(exist_ok=True)
    state = runs.read_checkpoint(run / "checkpoint.pt")
    state["config"]["options"] |= options
    state["step"] += step
    for value in state["model"].values():
        value += 0.01 * step
    torch.save(state, path / "checkpoint.pt")
    return path


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    options = ["--subset", "60", "--batch-size", "20", "--epochs", "1", "--method", "none", "--name", "run"]
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(sys, "argv", ["train.py", "digits", *options, "--runs", str(root)])
        assert runs.run_command(train.main) == 0
    return root / "run"


@pytest.mark.usefixtures("_passing_audit")
@pytest.mark.parametrize("norm", ["l2", "linf"])
def test_the_audit_looks_at_the_median_of_what_can_be_broken_and_in_the_whole_box(monkeypatch, norm):
    """Of distances 0 (misclassified), 1, 2, 3 and inf the median is 2; no image is farther than the diagonal of 9."""
    images, asked = torch.zeros(5, 1, 3, 3), []

    def one_attack(name, network, images, labels, *, eps=None, steps=8, **how):
        asked.append((eps, steps) if eps else name)
        return images, torch.tensor([0.0, 1.0, 2.0, 3.0, math.inf])

    monkeypatch.setattr(evaluate, "one_attack", one_attack)
    target = SimpleNamespace(network=lambda x: torch.cat([x.flatten(1)[:, :1], -x.flatten(1)[:, 1:2]], 1), topk=1)
    unit = evaluate.Unit(target, "audit", norm, 0.0, 0, [], 0, None)
    evaluate.audit_part(unit, images, torch.zeros(5, dtype=torch.int64), None)
    radii = [asked_[0] for asked_ in asked if isinstance(asked_, tuple)]
    scaled = [scale * 2 for scale in evaluate.AUDIT_SCALES]
    assert radii == [*scaled, *[2.0] * len(evaluate.AUDIT_STEPS), 3.0 if norm == "l2" else 1.0]


def test_names_tell_runs_and_their_comparisons_apart(trained, tmp_path, monkeypatch):
    """Two of one name; and names that differ only where a file's name would end."""
    (tmp_path / "else").mkdir()
    same = [trained, shutil.copytree(trained, tmp_path / "else" / "run")]
    assert [target.name for target in evaluate.open_targets(settings(targets=same))] == ["run", "run#2"]
    long = [shutil.copytree(trained, tmp_path / (150 * letter)) for letter in "abc"]
    few = ["--images", "2", "--calibration", "0", "--audit-images", "1", "--norm", "linf", "--attack", "fab"]
    for other in long[1:]:
        assert command(monkeypatch, long[0], other, *few, "--out", tmp_path / "out") == 0
    reports = [(place / "report.md").read_text() for place in (tmp_path / "out").iterdir()]
    assert sorted(150 * "c" in text for text in reports) == [False, True]


def test_networks_that_see_different_images_are_not_compared(here, trained, tmp_path, monkeypatch, capsys):
    for i in range(10):
        (tmp_path / "photos" / "test" / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(tmp_path / "photos" / "test" / str(i) / "a.png")
    spec = f"{here}/theirs.py:linear"
    assert command(monkeypatch, trained, spec, "--data", tmp_path / "photos", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err.strip()
    assert re.search("not the same images: 797 of digits, .*; 10 of photos, .*; compare with one", said)
    assert "\n" not in said
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("_passing_audit")
def test_runs_are_compared_and_reported_in_their_own_directories(trained, tmp_path, monkeypatch):
    steps = {"a": ("none", 0.1), "b": ("fd", 0.1), "c": ("fd", 0.2)}
    targets = [changed(trained, name, method=method, h=h) for name, (method, h) in steps.items()]
    few = ["--images", "4", "--calibration", "0", "--audit-images", "2", "--norm", "linf", "--attack", "fab"]
    assert command(monkeypatch, *targets, *few, "--out", tmp_path / "out") == 0
    (together,) = (tmp_path / "out").iterdir()
    table4 = rows(together / "table4.csv")
    assert sorted(row["h"] for row in table4) == ["", "0.1", "0.2"]
    for row, target in zip(table4, targets, strict=True):
        share = 100 * np.mean([float(d) <= 8 / 255 for d in column(target / "evaluation", "distance linf")])
        assert row["model"] == target.name
        assert float(row["empirical_error_pct_8_255"]) == pytest.approx(share)
        assert json.loads((target / "evaluation" / "summary.json").read_text())["images"] == 4
    assert "1 epochs of 60" in rows(together / "table1.csv")[0]["training"]
    assert not list(together.glob("bounds*"))

    def marked():
        found = json.loads((targets[0] / "evaluation" / "summary.json").read_text())
        report_ = (targets[0] / "evaluation" / "report.md").read_text(encoding="utf-8")
        assert f"{found['network']}, step {found['checkpoint_step']} of 3" in report_
        return found["checkpoint_step"], found["network"]

    step, network = marked()
    assert step == 3
    changed(targets[0], "a", step=-1)  # as after more training
    assert command(monkeypatch, targets[0], *few) == 0
    assert marked()[0] == 2
    assert marked()[1] != network


# --- images from folders ----------------------------------------------------------------------------------


def folder(root, classes, size=8):
    """Test images: root/test/<class>/<i>.png, of the brightness that belongs to the class."""
    for name, brightness in classes.items():
        (root / "test" / name).mkdir(parents=True)
        for i in range(4):
            pixels = np.full((size, size), brightness + i, dtype=np.uint8)
            Image.fromarray(pixels).save(root / "test" / name / f"{i}.png")
    return root


@pytest.mark.parametrize(("name", "channels"), [("grey", 1), ("colour", 3)])
def test_a_folder_is_shown_in_the_channels_the_network_takes(here, tmp_path, name, channels):
    folder(tmp_path, {"dark": 30, "light": 220})
    target = evaluate.open_factory(f"{here}/theirs.py:{name}", settings(dataset=str(tmp_path)))
    images, labels = target.fetch(range(8), torch.device("cpu"))
    assert images.shape == (8, channels, 8, 8)
    assert labels.tolist() == [int(image.mean() > 0.5) for image in images]


@pytest.mark.parametrize("what", ["pixels", "labels"])
def test_other_images_of_the_same_names_and_sizes_are_measured_again(here, tmp_path, what):
    folder(tmp_path / "data", {"dark": 30, "light": 220}, size=100)
    digests = []
    for change in (False, False, True):
        files = sorted((tmp_path / "data").rglob("*.png"))
        if change and what == "labels":
            dark, light = (tmp_path / "data" / "test" / name for name in ("dark", "light"))
            dark.rename(tmp_path / "aside"), light.rename(dark), (tmp_path / "aside").rename(light)
        for file in files * (what == "pixels"):
            pixels = 255 - np.asarray(Image.open(file)) if change else np.asarray(Image.open(file))
            Image.fromarray(pixels).save(file.with_suffix(".bmp"))
            file.with_suffix(".bmp").rename(file)  # uncompressed: always of the same size
        asked = settings(dataset=str(tmp_path / "data"), size=16, out=tmp_path, images=4)
        evaluate.prepare(target := evaluate.open_factory(f"{here}/theirs.py:colour", asked), runs.World("cpu"))
        digests.append(evaluate.digest_of(target, runs.World("cpu")))
    assert digests[0] == digests[1] != digests[2]


def test_parts_of_large_images_hold_as_many_numbers_as_memory_and_time_allow(here, tmp_path):
    folder(tmp_path, {"dark": 30, "light": 220}, size=300)
    for size, most in ((16, 65), (64, 4), (224, 1)):
        asked = settings(dataset=str(tmp_path), size=size, out=tmp_path, images=4)
        evaluate.prepare(target := evaluate.open_factory(f"{here}/theirs.py:colour", asked), runs.World("cpu"))
        assert target.block == most


def test_large_images_are_shown_at_the_size_asked_for_and_measured_again_at_another(here, tmp_path):
    folder(tmp_path, {"dark": 30, "light": 220}, size=100)
    world, digests = runs.World("cpu"), set()
    for size in (16, 32):
        asked = settings(dataset=str(tmp_path), size=size, out=tmp_path)
        target = evaluate.open_factory(f"{here}/theirs.py:colour", asked)
        evaluate.prepare(target, world)
        assert target.fetch([0], world.device)[0].shape == (1, 3, size, size)
        digests.add(evaluate.digest_of(target, world))
    assert len(digests) == 2


def test_a_run_is_measured_on_the_users_folder_and_labels_follow_the_names_of_its_classes(
    trained, tmp_path, monkeypatch
):
    """Also where a folder of the training's name lies in the working directory; an unknown class is refused by name."""
    monkeypatch.chdir(tmp_path)
    for root in (tmp_path / "digits", tmp_path / "set"):
        folder(root, {"0": 10, "1": 200})
    theirs = folder(tmp_path / "other", {"7": 30, "3": 220})
    run = changed(trained, "folder", dataset=str(tmp_path / "set"), data_dir=None)
    state = torch.load(run / "checkpoint.pt", weights_only=True)
    state["config"]["class_names"] = [str(i) for i in range(10)]
    torch.save(state, run / "checkpoint.pt")
    target = evaluate.open_run(run, settings())
    assert sorted(set(target.fetch(range(8), torch.device("cpu"))[1].tolist())) == [0, 1]
    target = evaluate.open_run(run, settings(data_dir=theirs))
    images, labels = target.fetch(range(8), torch.device("cpu"))
    assert labels.tolist() == [3 if image.mean() > 0.5 else 7 for image in images]
    assert target.classes == [str(i) for i in range(10)]
    (theirs / "test" / "7").rename(theirs / "test" / "seven")
    with pytest.raises(runs.Failure, match="seven"):
        evaluate.open_run(run, settings(data_dir=theirs))


def test_top_5_of_one_is_not_compared_with_top_1_of_another(here, trained, tmp_path, monkeypatch, capsys):
    """A run of ImageNet counts the top 5, anybody's network the top 1, be it on the same folder."""
    for i in range(10):
        (tmp_path / "imagenet/val" / str(i)).mkdir(parents=True)
        Image.fromarray(np.full((8, 8), 9 * i, np.uint8)).save(tmp_path / "imagenet/val" / str(i) / "a.png")
    run = shutil.copytree(trained, tmp_path / "run")
    state = torch.load(run / "checkpoint.pt")
    state["config"]["options"] |= {"dataset": "imagenet", "data_dir": str(tmp_path / "imagenet")}
    torch.save(state, run / "checkpoint.pt")
    spec, few = f"{here}/theirs.py:linear", ["--images", 4, "--calibration", 0, "--out", tmp_path / "out"]
    assert command(monkeypatch, run, spec, "--data", tmp_path / "imagenet", *few) == 2
    said = capsys.readouterr().err.strip()
    assert re.search("not the same images: 10 of imagenet, .*, top-5; 10 of imagenet, .*, top-1; compare with", said)
    assert not (tmp_path / "out").exists()


def test_a_run_without_its_newest_checkpoint_is_told_as_one(trained, tmp_path, monkeypatch, capsys):
    """Killed between two renames: only the one before is there."""
    run = shutil.copytree(trained, tmp_path / "run")
    (run / "checkpoint.pt").rename(run / "checkpoint.previous.pt")
    assert command(monkeypatch, run, "--out", tmp_path / "out") == 2
    assert f"{run}: no checkpoint.pt in it, see train.py --resume" in capsys.readouterr().err


# --- what it refuses --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "says"),
    [
        ("nowhere", "no such run; a target is a run directory"),
        ("nowhere.py:build", "no such file"),
        ("{here}/theirs.py:missing", "missing"),
        ("{here}/theirs.py:broken", "no weights here"),
        ("{here}/theirs.py:not_a_module", "int"),
        ("{here}/theirs.py:seven_classes", "7 classes"),
        ("{here}/theirs.py:nan", "not finite"),
        ("{here}/theirs.py:seven_classes --size 9", "8 x 8"),
        ("{here}", "a target is a run directory"),
    ],
)
def test_a_target_that_cannot_be_measured_is_refused_in_one_line(here, tmp_path, monkeypatch, capsys, target, says):
    assert command(monkeypatch, *target.format(here=here).split(), *QUICK, "--out", tmp_path / "out") == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1
    assert says in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "bad",
    [
        *(["--attack", "magic"], ["--suite", "all"], ["--norm", "l7"], ["--blocks", "3"], ["--data", "nothing"]),
        *(["--smoothing", "-1"], ["--smoothing", "1", "--smoothing", "nan"], ["--budget", "9"]),
        ["--budget", "100", "--suite", "paper"],
    ],
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
