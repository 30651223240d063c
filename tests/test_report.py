"""The report: intervals of their definition, the paper's rows beside their own networks, nothing without content."""

import csv
import io
import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

import evaluate
import report
from report import Interval, Table

# --- error bars -------------------------------------------------------------------------------------------


@given(st.integers(0, 2**32), st.integers(5, 60))
def test_percentages_have_the_intervals_of_their_definition(seed, n):
    hits = np.random.default_rng(seed).random(n) < 0.3
    value, low, high, _ = report.percent(hits)
    assert value == pytest.approx(100 * hits.mean())
    assert 0 <= low <= value <= high <= 100
    flipped = report.percent(~hits)
    assert (flipped.low, flipped.high) == pytest.approx((100 - high, 100 - low))
    if not hits.any():  # closed form: 1 - (0.025)^(1/n)
        assert high == pytest.approx(100 * (1 - 0.025 ** (1 / n)))


@given(st.integers(0, 2**32), st.integers(5, 60))
def test_paired_differences_are_antisymmetric_and_never_certain(seed, n):
    rng = np.random.default_rng(seed)
    a, b = rng.random(n) < 0.3, rng.random(n) < 0.6
    forth, back = report.paired_percent(a, b), report.paired_percent(b, a)
    assert forth.value == pytest.approx(100 * (a.mean() - b.mean()))
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low))
    same = report.paired_percent(a, a)
    assert same.value == 0
    assert same.low < 0 < same.high


def test_intervals_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    shares, means = [], []
    for _ in range(2000):
        both = rng.random((2, 80)) < np.array([[0.2], [0.35]])
        _, low, high, _ = report.paired_percent(*both)
        shares.append(low <= -15 <= high)
        _, low, high, _ = report.mean(rng.normal(3, 2, 10))
        means.append(low <= 3 <= high)
    assert 0.935 < np.mean(shares) < 0.97
    assert 0.935 < np.mean(means) < 0.965


@given(st.lists(st.floats(0, 1e3), min_size=1, max_size=5))
def test_no_interval_of_a_distance_reaches_below_zero(distances):
    value, low, high, _ = report.mean(np.array(distances), 0.0)
    assert 0 <= low <= value * (1 + 1e-12)
    assert value <= high


def test_a_mean_with_an_unknown_distance_is_not_a_number_to_quote():
    assert report.mean(np.array([1.0, 2.0, 3.0]))[:3] == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert report.text(report.mean(np.array([1.0, math.inf]), 0.0)) == "∞"


def test_one_draw_has_no_interval_in_words_and_no_ends_in_files():
    cell = report.one_draw(report.percent(np.array([True, False, False, False])))
    assert report.text(cell) == "25.0 (one draw)"
    table = Table("t", "T", [{"model": "a", "x": cell}, {"model": "b", "x": Interval(1.0, 0.5, 2.0)}])
    assert report.table_csv(table).decode().splitlines() == ["model,x,x_low,x_high", "a,25.0,,", "b,1.0,0.5,2.0"]


# --- tables -----------------------------------------------------------------------------------------------

CELLS = st.one_of(
    st.none(), st.floats(allow_nan=False), st.text("ω∞–×|,\n abc", max_size=9), st.just(Interval(1, 0, 2))
)


@settings(max_examples=50)
@given(st.lists(st.dictionaries(st.sampled_from("abcdef"), CELLS), max_size=4), st.booleans())
def test_a_column_is_shown_if_and_only_if_one_of_our_rows_fills_it(rows, with_paper):
    rows = [{"model": f"net{i}"} | row for i, row in enumerate(rows)]
    paper = [{"model": "paper: undefended", "a": 1.0}] * with_paper
    table = Table("t", "T", rows + paper)
    filled = {name for row in rows for name, cell in row.items() if cell is not None}
    assert set(table.columns) == filled
    assert table.empty == (filled <= {"model"})
    header, *lines = csv.reader(io.StringIO(report.table_csv(table).decode()))
    assert len(lines) == len(rows + paper) or not filled
    assert all(len(line) == len(header) for line in lines)
    for row in rows:  # on its side it says the same
        for column in filled - {"model"}:
            (line,) = [line for line in table.turned.rows if line[""] == column]
            assert line[row["model"]] == row.get(column)


def test_names_of_networks_are_shown_as_they_are_and_columns_in_words():
    name = "my_omega_net_8_255_pct"
    table = Table("t", "T", [{"model": name, "omega_error_pct_8_255": 1.0, "omega_0.5": 2.0}])
    assert report.markdown(table.turned).splitlines()[2:] == [
        f"|  | {name} |",
        "| --- | --- |",
        "| ω-bound error % at 8/255 | 1 |",
        "| ω(0.5) | 2 |",
    ]


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1", "ascii", "cp1252"])
@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_of_any_encoding_and_width_shows_every_figure(encoding, width):
    """At 80 columns two networks stand beside each other, and no number is cut or broken."""
    rows = [{"model": f"digits-net{i}", "l2:_mean_omega_bound": Interval(0.1 * i, 0.05, 0.5)} for i in range(1, 5)]
    rows[0]["l2:_mean_distance"] = math.inf
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=file, width=width, legacy_windows=False)
    report.show(Table("summary", "What was measured", rows).turned, console)
    file.flush()
    lines = file.buffer.getvalue().decode(encoding).splitlines()
    assert any(("ω" if encoding == "utf-8" else "omega") in line for line in lines)
    assert any(("∞" if encoding == "utf-8" else "inf") in line for line in lines)
    for i in range(1, 5):
        assert any(f"{0.1 * i:.3g} (0.05 to 0.5)" in line for line in lines)
    assert all(len(line) <= width for line in lines)
    assert max(line.count("digits-net") for line in lines) == {60: 1, 80: 2, 200: 4}[width]


# --- the paper's rows -------------------------------------------------------------------------------------

OPTIONS = {
    **{"model": "resnext34-authors", "epochs": 200, "activation": "relu", "central": False, "subset": None},
    **{"batch_size": 128, "lr": 0.1},
    **{"norm": "l2", "lam": 0.1, "h": 0.01, "eps": 8 / 255, "attack_steps": 7, "replays": 8, "penalty_space": "pixel"},
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
    imagenet = {"model": "resnet50", "epochs": 29, "penalty_space": "normalized"}
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


def smoothed(cap, radii, right):
    return {"cap": np.array([cap]), "radii": np.array(radii), "right": np.array(right)}


def table_5(**by_sigma):
    evaluation = evaluate.Evaluation.__new__(evaluate.Evaluation)
    target = evaluate.Target.__new__(evaluate.Target)
    target.name, target.dataset, evaluation.target = "net", "digits", target
    evaluation.settings, evaluation.smoothing = type("S", (), {"samples": 100}), by_sigma
    return report.table_5([evaluation])


def test_table_5_has_each_sigma_and_at_each_radius_the_least_error_of_them():
    """What is chosen on these very images has no interval; of one sigma nothing is chosen."""
    small, large = smoothed(0.8, [0.6, 0.3, 0.8], [True, True, False]), smoothed(3.2, [2.1, 0.0, 0.0], [True] * 3)
    best, *each = table_5(**{"0.25": small, "1.0": large}).rows
    assert [row["largest_radius"] for row in (best, *each)] == [3.2, 0.8, 3.2]
    assert [row["0.25"].value for row in each] == pytest.approx([100 / 3, 200 / 3])
    assert [row["2.0"].value for row in each] == pytest.approx([100, 200 / 3])
    for radius in map(str, report.SMOOTHING_RADII):
        assert best[radius] == min(row[radius].value for row in each)
    (alone,) = table_5(**{"0.25": small}).rows
    assert alone == each[0]


# --- figures ----------------------------------------------------------------------------------------------


def test_a_figure_is_the_same_file_every_time():
    def drawn():
        figure, axes = report.panels(2)
        axes[0, 0].plot([0, 1], [1, 0])
        return report.png(figure)

    assert drawn() == drawn()
    assert drawn().startswith(b"\x89PNG")


@pytest.mark.parametrize("lengths", [(3, 7), (7, 3)])
def test_networks_are_pictured_together_though_one_ones_first_part_is_shorter(lengths):
    """A slow network's parts hold fewer images: shown are those that both have, and that both get right."""
    rng, evaluations = np.random.default_rng(0), []
    images = rng.random((7, 1, 4, 4))
    for length in lengths:
        first = {"images": images[:length], "adversarial": images[:length] ** 2, "labels": np.zeros(length, int)}
        first |= {"distances": np.array([0, 1, 1, 1, np.inf, 1, 1.0])[:length], "moved": np.ones(length, int)}
        target = SimpleNamespace(name=f"n{length}", classes=["a", "b"], same_images=lambda other: True)
        evaluations.append(SimpleNamespace(target=target, norms={"l2": SimpleNamespace(found={"first": first})}))
    figure = report.adversarial_figure(evaluations, "l2")
    shown = [axis.images[0].get_array() for axis in figure.axes[::5]]  # image, and two panels a network
    np.testing.assert_allclose(np.array(shown), images[1:3, 0])
