"""The report: intervals of their definition, the paper's rows beside their own networks, nothing without content."""

import csv
import io
import math
import os
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from scipy import stats

import evaluate
import report
from report import Table

# --- error bars -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(5, 60))
def test_percentages_have_the_intervals_of_their_definition(seed, n):
    hits = np.random.default_rng(seed).random(n) < 0.3
    value, low, high = report.percent("x", hits).values()
    assert value == pytest.approx(100 * hits.mean())
    assert 0 <= low <= value <= high <= 100
    flipped = report.percent("x", ~hits)
    assert (flipped["x_low"], flipped["x_high"]) == pytest.approx((100 - high, 100 - low))
    if not hits.any():  # closed form: 1 - (0.025)^(1/n)
        assert high == pytest.approx(100 * (1 - 0.025 ** (1 / n)))


def test_intervals_cover_as_often_as_they_say():
    rng, covered = np.random.default_rng(0), []
    for _ in range(2000):
        _, low, high = report.mean("x", rng.normal(3, 2, 10) + 3).values()
        covered.append(low <= 6 <= high)
    assert 0.935 < np.mean(covered) < 0.965


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=5))
def test_no_interval_of_a_distance_reaches_below_zero(distances):
    value, low, high = report.mean("x", np.array(distances)).values()
    assert 0 <= low <= value * (1 + 1e-12)
    assert value <= high


def test_the_interval_of_differences_is_that_of_the_paired_t_test():
    a, b = np.random.default_rng(0).uniform(0, 1, (2, 30))
    for nearer, further in ((a, b), (np.zeros(5), np.eye(5)[0])):  # also where none is negative
        known = stats.ttest_rel(further, nearer).confidence_interval(0.95)
        found = list(report.mean("x", further - nearer, -math.inf).values())
        assert found == pytest.approx([(further - nearer).mean(), known.low, known.high])


def test_a_mean_with_an_unknown_distance_is_not_a_number_to_quote():
    known = report.mean("x", np.array([3.0, 4.0, 5.0]))
    assert list(known) == ["x", "x_low", "x_high"]
    assert list(known.values()) == pytest.approx([4, 4 - 2.4841, 4 + 2.4841], abs=1e-4)
    assert report.text(report.mean("x", np.array([1.0, math.inf])), "x") == "∞"


def test_one_draw_has_no_interval_in_words_and_no_ends_in_files():
    draw = {"x": 25.0, "x_low": None, "x_high": None}
    assert report.text(draw, "x") == "25.0 (one draw)"
    table = Table("t", "T", [{"model": "a"} | draw, {"model": "b", "x": 1.0, "x_low": 0.5, "x_high": 2.0}])
    lines = report.as_csv(table.columns, table.rows).decode().splitlines()
    assert lines == ["model,x,x_low,x_high", "a,25.0,,", "b,1.0,0.5,2.0"]


# --- tables -----------------------------------------------------------------------------------------------

CELLS = st.one_of(st.none(), st.floats(allow_nan=False), st.text("ω∞–×|,\n abc", max_size=9))


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), CELLS), max_size=4), st.booleans(), st.booleans())
def test_a_column_is_shown_if_and_only_if_one_of_our_rows_fills_it(rows, with_paper, with_interval):
    rows = [{"model": f"net{i}"} | row for i, row in enumerate(rows)]
    for row in rows[:with_interval]:
        row |= {"a": 1.0, "a_low": 0.0, "a_high": 2.0}
    paper = [{"model": "paper: undefended", "a": 1.0, "g": 2.0}] * with_paper
    table = Table("t", "T", rows + paper)
    filled = {name for row in rows for name, cell in row.items() if cell is not None} - {"a_low", "a_high"}
    assert set(table.columns) == filled
    header, *lines = csv.reader(io.StringIO(report.as_csv(table.columns, table.rows).decode()))
    assert len(lines) == len(rows + paper) or not filled
    assert all(len(line) == len(header) for line in lines)
    head, *lines = table.grid
    for i, row in enumerate(rows):  # lying on its side it says the same
        for j, column in enumerate(table.columns):
            assert lines[i][j] == table._replace(sideways=True).grid[j][i + 1] == report.text(row, column)
    assert head == [report.heading(column) for column in table.columns]


def test_names_of_networks_are_shown_as_they_are_and_columns_in_words():
    name = "my_omega_net_8_255_pct"
    table = Table("t", "T", [{"model": name, "omega_error_pct_8_255": 1.0, "omega_0.5": 2.0}], sideways=True)
    assert table.markdown.splitlines()[2:] == [
        f"| model | {name} |",
        "| --- | --- |",
        "| ω-bound error % at 8/255 | 1 |",
        "| ω(0.5) | 2 |",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_of_any_encoding_and_width_shows_every_figure(encoding, width):
    """At 80 columns two networks stand beside each other, and no number is cut or broken."""
    ends = {"mean_distance_of_the_omega_bound_low": 0.05, "mean_distance_of_the_omega_bound_high": 0.5}
    rows = [{"model": f"digits-net{i}", "mean_distance_of_the_omega_bound": 0.1 * i} | ends for i in range(1, 5)]
    rows[0]["a_mean_distance"] = math.inf
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="replace")  # as runs.Screen does
    Table("summary", "What was measured", rows, sideways=True).show(Console(file=file, width=width))
    file.flush()
    lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert any(("∞" if encoding == "utf-8" else "?") in line for line in lines)
    for i in range(1, 5):
        assert any(f"{0.1 * i:.3g} (0.05 to 0.5)" in line for line in lines)
    assert all(len(line) <= width for line in lines)
    assert max(line.count("digits-net") for line in lines) == {60: 1, 80: 2, 200: 4}[width]


# --- the paper's rows -------------------------------------------------------------------------------------

OPTIONS = {
    **{"model": "resnext34-authors", "epochs": 200, "activation": "relu", "central": False, "subset": None},
    **{"batch_size": 128, "lr": 0.1},
    **{"norm": "l2", "lam": 0.1, "h": 0.01, "eps": 8 / 255, "attack_steps": 7, "replays": 8},
}


def paper_row(number, dataset="cifar10", step=100, **options):
    """The quantities of the row that the paper has for a run with these options; {} for none."""
    target = evaluate.Target.__new__(evaluate.Target)
    target.config, target.dataset, target.step = {"options": OPTIONS | options, "steps_total": 100}, dataset, step
    rows = report.paper_row(number, target)
    return rows[0] if rows else {}


def test_a_paper_row_is_found_for_the_same_method():
    fd = {"method": "fd"}
    assert paper_row("2", **fd)["mean_distance_empirical"] == 0.63
    assert paper_row("2", method="exact")["mean_distance_empirical"] == 0.13
    assert paper_row("1", method="fd", norm="linf", lam=1.0, h=0.1)["empirical_error_pct_2_255"] == 18.47
    assert paper_row("2", method="none")["training"] == "2.06 h"
    assert paper_row("1", method="at", norm="linf")["empirical_error_pct_8_255"] == 46.02
    assert paper_row("2", method="at", norm="linf", eps=2 / 255)["mean_distance_empirical"] == 0.66
    assert paper_row("1", method="free", epochs=25)["clean_error_pct"] == 19.94
    assert paper_row("6", **fd)["omega_error_pct_0.25"] > 0
    imagenet = {"model": "resnet50", "epochs": 29, "batch_size": 512, "lr": 0.25, "lam": 0.0051, "h": 0.0023}
    assert paper_row("2", "imagenet", **fd, **imagenet)["mean_distance_empirical"] == 1.14


@pytest.mark.parametrize(
    "other",
    [
        {"model": "cnn"},
        {"model": "resnext34"},  # with a linear last layer
        {"epochs": 1},
        {"central": True},
        {"activation": "silu"},
        {"subset": 1000},
        {"lam": 0.2},
        {"h": 0.1},
        {"lr": 0.05},
        {"batch_size": 64},
        {"unsquared": True},
        {"init": "weights.pt"},
        {"recipe": "fast"},
        {"size": 64},
        {"statistics": "running"},
        {"lam_warmup": 1.0},
        {"penalty_share": 0.5},
        {"penalty_from": 0.5},
        {"method": "noise"},
        {"step": 99},  # interrupted
        {"dataset": "digits"},
        {"dataset": "imagenet"},
        {"method": "at", "norm": "linf", "attack_steps": 10},
        {"method": "free"},  # of 200 epochs, not 25
        {"method": "free", "epochs": 25, "dataset": "digits"},
        {"method": "free", "epochs": 25, "eps": 0.1},
    ],
)
def test_a_run_that_differs_from_the_papers_in_anything_is_not_set_beside_it(other):
    assert paper_row("2", **{"method": "fd"} | other) == {}
    assert paper_row("1", **{"method": "fd", "norm": "linf"} | other) == {}


def test_sampled_bounds_stand_beside_the_papers_and_no_others(tmp_path):
    """In the tables of benchmarks/tables.py; where that estimate was refused there is no bound, but all the rest."""
    from benchmarks import tables

    lines = ["model,bound,omega_error_pct_2_255,mean_distance_L_bound,empirical_error_pct_2_255"]
    lines += ["a,calibrated,1,2,3", "a,sampled,4,5,3", "paper: a,,6,7,8", "b,calibrated,9,10,11"]
    (tmp_path / "table.csv").write_text("\n".join(lines))
    found = tables.read(tmp_path / "table.csv")
    assert list(found) == ["a", "b"]
    assert (found["a"]["omega_error_pct_2_255"], found["a"]["mean_distance_L_bound"]) == ("4", "5")
    assert found["b"] == {"model": "b", "bound": "calibrated", "empirical_error_pct_2_255": "11"}


def test_all_estimates_of_bounds_stand_in_the_last_table_with_their_means(tmp_path):
    from benchmarks import tables

    rows = [row for row in tables.rows_of("cifar10") if row.name in ("none", "fd-l2-lam1", "fd-l2-lam0.1")]
    head = "model,bound,mean_distance_omega_bound,mean_distance_empirical,false_pct_omega_bound"
    for name, scale in (("none", 1), ("fd-l2-lam1", 2)):
        (folder := tmp_path / f"p-{name}-seed0").mkdir()
        l2 = [head, f"{name},two tangents,0.{scale},0.5,{scale}", f"{name},sampled,1,0.5,50", "paper: x,,,9,"]
        linf = ["model,bound,false_pct_omega_bound", f"{name},sampled,{10 * scale}"]
        for table, lines in ((2, l2), (1, linf)):
            (folder / f"table{table}.csv").write_text("\n".join(lines))
    body = [line.split(" | ") for line in tables.bounds_table(rows, "p", tmp_path, 2)[2:-1]]
    assert body == [
        ["| none, seed0", "0.20", "1.00", "", "", "", "", "2.00", "50.00", "10.00 |"],
        ["| fd-l2-lam1, seed0", "0.40", "2.00", "", "", "", "", "2.00", "50.00", "20.00 |"],
        ["| *mean*", "0.30", "1.50", "", "", "", "", "2.00", "50.00", "15.00 |"],
    ]


def smoothed(cap, radii, right):
    return {"cap": np.array([cap]), "radii": np.array(radii), "right": np.array(right)}


def table_5(**by_sigma):
    target = SimpleNamespace(name="net", dataset="digits", settings=SimpleNamespace(samples=100), smoothing=by_sigma)
    return report.table_5([target])


def test_table_5_has_each_sigma_and_at_each_radius_the_least_error_of_them():
    """What is chosen on these very images has no interval; of one sigma nothing is chosen."""
    small, large = smoothed(0.8, [0.6, 0.3, 0.8], [True, True, False]), smoothed(3.2, [2.1, 0.0, 0.0], [True] * 3)
    best, *each = table_5(**{"0.25": small, "1.0": large}).rows
    assert [row["largest_radius"] for row in (best, *each)] == [3.2, 0.8, 3.2]
    assert [row["0.25"] for row in each] == pytest.approx([100 / 3, 200 / 3])
    assert [row["2.0"] for row in each] == pytest.approx([100, 200 / 3])
    for radius in map(str, report.SMOOTHING_RADII):
        assert best[radius] == min(row[radius] for row in each)
        assert f"{radius}_low" not in best
        assert f"{radius}_low" in each[0]
    (alone,) = table_5(**{"0.25": small}).rows
    assert alone == each[0]


# --- figures ----------------------------------------------------------------------------------------------


def test_a_figure_is_the_same_file_every_time(monkeypatch, tmp_path):
    def drawn(_):
        """A line."""
        figure, axes = report.panels(2)
        axes[0, 0].plot([0, 1], [1, 0])
        return figure

    monkeypatch.setattr(report, "error_figure", drawn)
    monkeypatch.setattr(report, "bounds_figure", lambda _: None)
    monkeypatch.setattr(report, "tables_of", lambda _: [])
    monkeypatch.setattr(report, "preamble", lambda *_: "# Two")
    seen = []
    for _ in range(2):
        report.write_report([None, None], tmp_path, None)
        seen.append((tmp_path / "errors.png").read_bytes())
    assert seen[0] == seen[1]
    assert seen[0].startswith(b"\x89PNG")
    assert (tmp_path / "report.md").read_text().splitlines() == ["# Two", "![errors](errors.png)", "", "A line."]


def test_the_first_images_that_are_broken_are_pictured_with_what_broke_them():
    images, distances = np.random.default_rng(0).random((7, 1, 4, 4)), np.array([0, 1, np.inf, 1, 1, 1, 1.0])
    first = {"images": images, "adversarial": images**2, "labels": np.zeros(7, int), "moved": np.ones(7, int)}
    measured = SimpleNamespace(found={"first": first | {"distances": distances}})
    figure = report.adversarial_figure(SimpleNamespace(classes=["a", "b"], norms={"l2": measured}), "l2")
    for start, pixels in ((0, images), (1, images**2)):
        shown = [axis.images[0].get_array() for axis in figure.axes[start::3]]
        np.testing.assert_allclose(np.array(shown), pixels[[1, 3, 4, 5, 6], 0])
    for axis, i in zip(
        figure.axes[2::3], [1, 3, 4, 5, 6], strict=True
    ):  # the change: red where it grows, blue where not
        change, shown = (images**2 - images)[i, 0], np.array(axis.images[0].get_array())
        np.testing.assert_allclose(shown - 0.5, change / (2 * np.abs(change).max()), atol=1e-12)
        assert axis.images[0].cmap.name == "RdBu_r"
    odd = SimpleNamespace(classes=["a$x_$", os.fsdecode(b"caf\xe9")], norms={"l2": measured})  # a formula; no UTF-8
    report.adversarial_figure(odd, "l2").savefig(io.BytesIO())
    first["distances"] = np.zeros(7)
    measured.found["first"] = first
    assert report.adversarial_figure(SimpleNamespace(classes=["a", "b"], norms={"l2": measured}), "l2") is None


def known_of(distances, omega):
    """A network of one norm whose omega-bounds are these."""
    bounds_, found = {"two tangents": (None, torch.tensor(omega), None)}, {"distances": np.array(distances)}
    measured = SimpleNamespace(found=found, bounds=bounds_, best="two tangents")
    return SimpleNamespace(name="_net", norms={"l2": measured})


def test_the_error_within_a_distance_is_drawn_with_what_the_bound_allows():
    """An image that nothing broke never counts; of a bound every image does, from its bound on."""
    (axis,) = report.error_figure([known_of([0.3, 0.0, np.inf, 0.1], [0.2, 0.0, 0.4, 0.05])]).axes
    found, allowed = axis.lines
    np.testing.assert_allclose(found.get_xydata(), [[0, 25], [0.1, 50], [0.3, 75]])
    np.testing.assert_allclose(allowed.get_xydata(), [[0, 25], [0.05, 50], [0.2, 75], [0.4, 100]], rtol=1e-6)
    assert [label.get_text().strip() for label in axis.get_legend().get_texts()] == ["_net"]
    assert {line.get_drawstyle() for line in axis.lines} == {"steps-post"}


def test_a_bound_above_the_diagonal_is_false():
    (axis,) = report.bounds_figure([known_of([0.3, 0.0, np.inf], [0.2, 0.0, 0.4])]).axes
    np.testing.assert_allclose(axis.collections[0].get_offsets()[:2], [[0.3, 0.2], [0, 0]], rtol=1e-6)
    assert (axis.get_xlabel(), axis.get_ylabel()) == ("l2 distance found, pixels", "ω-bound, pixels")


def test_regularity_is_the_largest_over_all_parts_and_at_the_radii_that_are_named():
    """By ascent the maximum over parts; sampled, of the nearest radius, and never less than at a smaller one."""
    found = {"probabilities_grad_norms": np.array([[1.0], [3.0]]), "omega": np.array([[0.2, 0.5], [0.3, 0.4]])}
    eps, omega = torch.tensor([0.1, 0.5, 0.7, 1.0, 3.0]), torch.tensor([0.1, 0.6, 0.2, 0.4, 9.0])
    sampled = {report.SAMPLED: (None, None, SimpleNamespace(eps=eps, omega=omega, lipschitz=7.0))}
    target = SimpleNamespace(norms={"l2": SimpleNamespace(found=found, bounds=sampled)})
    by_ascent, by_sampling = (report.regularity_of(target, method) for method in (None, report.SAMPLED))
    assert [by_ascent[f"omega_{r}"] for r in (0.5, 1.0)] == [0.3, 0.5]
    assert [by_sampling[f"omega_{r}"] for r in (0.5, 1.0)] == pytest.approx([0.6, 0.6])
    assert (by_ascent["grad_norm_mean"], by_ascent["grad_norm_max"], by_sampling["grad_norm_max"]) == (2, 3, 7)


def test_suprema_by_ascent_are_over_all_parts():
    """Either part holds one of the largest values."""
    evaluated = {"logits_losses": np.array([[-1.0]]), "logits_grad_norms": np.array([[2.0]])}
    eps = np.array([0.1, 0.2])
    parts = [
        {"omega": np.array([[0.3, 0.4]]), "lipschitz": np.array(5.0), "eps": eps},
        {"omega": np.array([[0.1, 0.6]]), "lipschitz": np.array(2.0), "eps": eps},
    ]
    for some in (parts, parts[::-1]):
        lipschitz, _, constants = evaluate.bounds_of("ascent", some, evaluated, "l2", 1)
        np.testing.assert_allclose(constants.omega, [0.3, 0.6])
        np.testing.assert_allclose(lipschitz, [1 / 5])


def test_distances_of_different_images_are_not_paired(monkeypatch):
    """As many images of the same name may be others, or in another order."""
    images = np.random.default_rng(0).random((3, 1, 4, 4))

    def target(shown):
        found = {"distances": np.arange(3.0), "first": {"images": shown}}
        return SimpleNamespace(norms={"l2": SimpleNamespace(found=found, audit={}, best="")}, rows={"audit": []})

    monkeypatch.setattr(report, "figures_of", lambda *_: {})
    for other, paired in ((images.copy(), True), (images[::-1], False), (images[:2], False)):
        table = report.summary_table([target(images), target(other)], "l2")
        assert ("mean_distance_beyond_the_first" in table.rows[1]) == paired
