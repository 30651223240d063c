"""Section 4: what evaluate.py measured, in the paper's Tables 1 to 6 and Figures 1 and 2, with intervals; files.

Every percentage has a 95 % Clopper-Pearson interval, every mean a t interval; differences between two networks are
paired, on the same images.  These intervals speak of the draw of the images, not of the seed of the training; and
what follows from one random estimate of the constants (`sampled`) has none, since one draw has no spread.
"""

import contextlib
import csv
import fnmatch
import io
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import scipy.stats
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table as RichTable
from torch import Tensor

import attacks
import bounds
from evaluate import METHODS, OMEGA_RADII, RADII, Evaluation, Measured, Settings, Target
from runs import World, duration, provenance, replace

SMOOTHING_RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # of Table 5
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito (2008)
NORM_NAMES = {"l2": "l2", "linf": "l∞"}
HEADINGS = {"L_bound": "L-bound", "omega_bound": "ω-bound", "omega_error": "ω-bound error", "omega": "ω", "pct": "%"}
HEADINGS |= {"distance_empirical": "distance found", "empirical_error": "error"}
PAPER = "paper: "  # before the name of a row of the paper


# --- figures with their error bars ------------------------------------------------------------------------


class Interval(NamedTuple):
    """A value and its 95 % confidence interval, nan where there is none; decimals: how many to show, if not digits."""

    value: float
    low: float
    high: float
    decimals: int | None = None


def percent(hits: np.ndarray) -> Interval:
    """The share of True, in percent, with its Clopper-Pearson interval."""
    found = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "exact")
    return Interval(100 * float(hits.mean()), 100 * float(found.low), 100 * float(found.high), 1)


def mean(values: np.ndarray, least: float = -math.inf) -> Interval:
    """The mean of values that are never below `least`, with its t interval; infinite where one of them is."""
    values = np.asarray(values, dtype=float)
    centre, reach = float(values.mean()), math.inf
    if len(values) > 1 and math.isfinite(centre):
        reach = float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1))
    return Interval(centre, max(centre - reach, least), centre + reach)


def paired_percent(hits: np.ndarray, reference: np.ndarray) -> Interval:
    """Difference of two shares on the same images, in points: Wald with 1/2 a cell added (Agresti & Min 2005).

    The estimate is the plain difference; the interval is centred on the adjusted one, so that it has a length
    where the two never differ.
    """
    hits, reference, n = hits.astype(bool), reference.astype(bool), len(hits) + 2
    gained, lost = int((hits & ~reference).sum()) + 0.5, int((~hits & reference).sum()) + 0.5
    centre = (gained - lost) / n
    reach = scipy.stats.norm.ppf(0.975) * math.sqrt(gained + lost - (gained - lost) ** 2 / n) / n
    difference = 100 * (hits.mean() - reference.mean())
    return Interval(float(difference), 100 * (centre - reach), 100 * (centre + reach), 1)


def one_draw(value: Interval) -> Interval:
    """Without its interval: over images there are many values, but all follow from one draw of the constants."""
    return value._replace(low=math.nan, high=math.nan)


# --- tables -----------------------------------------------------------------------------------------------

Row = dict[str, Any]  # column -> text, number, Interval or nothing


class Table(NamedTuple):
    """Rows that can be shown as Markdown, as CSV and on a terminal; wanted: patterns of columns, in order."""

    name: str
    title: str
    rows: list[Row]
    wanted: str = "*"
    named: bool = False  # columns are networks: their names are shown as they are

    @property
    def columns(self) -> list[str]:
        """Those in which one of our own rows has something: the paper's alone compare with nothing."""
        ours = [row for row in self.rows if not str(row.get("model")).startswith(PAPER)]
        names = [c for row in ours for c, cell in row.items() if cell is not None]
        return list(dict.fromkeys(c for wanted in self.wanted.split() for c in fnmatch.filter(names, wanted)))

    @property
    def empty(self) -> bool:
        return set(self.columns) <= {"model", "bound", "estimate", "training"}

    @property
    def turned(self) -> "Table":
        """On its side: a line a quantity, a column a network."""
        lines = [{row["model"]: row.get(column) for row in self.rows} for column in self.columns if column != "model"]
        names = [heading(column) for column in self.columns if column != "model"]
        rows = [{"": name} | line for name, line in zip(names, lines, strict=True)]
        return Table(self.name, self.title, rows, named=True)


def heading(column: str) -> str:
    """omega_error_pct_2_255 -> ω-bound error % at 2/255"""
    words = re.sub(r"(\d)_(\d)", r"\1/\2", re.sub(r"pct_(?=\d)", "% at ", column))
    for name, said in HEADINGS.items():
        words = words.replace(name, said)
    return re.sub(r"ω ([\d.]+)$", r"ω(\1)", words.replace("_", " "))


def number(value: float, decimals: int | None = None) -> str:
    """Three digits, or as many decimals as asked for."""
    if not math.isfinite(value):
        return "–" if math.isnan(value) else "∞" if value > 0 else "-∞"
    if decimals is None and (abs(value) < 10 or abs(value) >= 1e6):
        return f"{value:.3g}"
    decimals = int(abs(value) < 1000) if decimals is None else decimals
    return f"{value:,.{decimals}f}"


def text(cell: Any) -> str:
    """A cell, with its interval if it has one."""
    if isinstance(cell, Interval):
        value, low, high = (number(v, cell.decimals) for v in cell[:3])
        reach = "one draw" if math.isnan(cell.low) else f"{low} to {high}"
        return f"{value} ({reach})" if math.isfinite(cell.value) else value
    return number(cell) if isinstance(cell, float) else "" if cell is None else str(cell)


def markdown(table: Table) -> str:
    columns = table.columns
    lines = [" | ".join(columns if table.named else map(heading, columns)), " | ".join("---" for _ in columns)]
    lines += [" | ".join(text(row.get(column)).replace("|", "/") for column in columns) for row in table.rows]
    return "\n".join([f"### {table.title}\n", *(f"| {line} |" for line in lines), ""])


def as_csv(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> bytes:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(header)
    writer.writerows(rows)
    return buffer.getvalue().encode()


def table_csv(table: Table) -> bytes:
    """One column each for a value and the ends of its interval, where any row has one."""
    wide = {c for c in table.columns for row in table.rows if isinstance(row.get(c), Interval)}
    header = [name for c in table.columns for name in ((c, f"{c}_low", f"{c}_high") if c in wide else (c,))]

    def cells(cell: Any, column: str) -> tuple:
        values = cell[:3] if isinstance(cell, Interval) else (cell, None, None)
        values = [None if isinstance(v, float) and math.isnan(v) else v for v in values]
        return values if column in wide else values[:1]

    return as_csv(header, ([v for c in table.columns for v in cells(row.get(c), c)] for row in table.rows))


def show(table: Table, console: Console) -> None:
    """A turned table on a terminal: as many networks beside each other as there is room."""
    plain = str.maketrans({"ω": "omega", "∞": "inf", "–": "-"} if console.options.ascii_only else {})
    label, *names = table.columns
    longest = [max(len(text(row.get(name))) for row in table.rows) for name in table.columns]
    count = max(1, (console.width - longest[0] - 4) // (min(max(longest[1:]), 28) + 3))
    for first in range(0, len(names), count):
        some = [label, *names[first : first + count]]
        shown = RichTable(title=table.title, title_justify="left", box=SIMPLE_HEAD)
        for name in some:
            shown.add_column(name.translate(plain), overflow="fold")
        for row in table.rows:
            shown.add_row(*(text(row.get(name)).translate(plain) for name in some))
        console.print(shown)


# --- the paper's rows -------------------------------------------------------------------------------------

# What all rows of the paper on a data set have in common; a run that differs in it is not set beside them.
RECIPES = {
    "cifar10": {"model": ("resnext34-authors",), "epochs": (200,), "batch_size": (128,), "lr": (0.1,)},
    "imagenet": {"model": ("resnet50",), "epochs": (29,), "penalty_space": ("normalized",)},
}
COMMON = {"activation": ("relu",), "central": (None, False), "subset": (None,)}
COMMON |= {"unsquared": (None, False), "init": (None,), "size": (None,)}  # runs of before have none
COMMON |= {"recipe": (None, "paper"), "statistics": (None, "batch"), "lam_warmup": (None, 0.0)}
COMMON |= {"penalty_share": (None, 1.0), "penalty_from": (None, 0.0)}


def paper_rows(number: str, dataset: str) -> dict[str, Row]:
    """The paper's rows of a table by model; from results/paper_tables.csv."""
    rows: dict[str, Row] = {}
    with open(Path(__file__).parent / "results" / "paper_tables.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["table"], line["dataset"]) == (number, dataset):
                row = rows.setdefault(line["model"], {"model": PAPER + line["model"]})
                row["omega_error_pct_" * (number == "6") + line["quantity"]] = float(line["value"])
    return {m: row | {"training": f"{h:g} h"} if (h := row.get("train_hours")) else row for m, row in rows.items()}


def paper_row(number: str, target: Target) -> list[Row]:
    """The paper's row for a network that was trained, to the end, as this row's was, where there is one."""
    if target.config is None or target.step != target.config.get("steps_total"):
        return []
    row = paper_rows(number, target.dataset).get(paper_model(target.config["options"], target.dataset))
    return [row] if row else []


def paper_model(options: dict[str, Any], dataset: str) -> str | None:
    """What the paper's tables call the network that these options train; None for a network of another recipe."""
    method, eps = options["method"], 255 * options.get("eps", 0)
    recipe = COMMON | RECIPES.get(dataset, {"epochs": ()})
    if method == "free":  # as many steps as the others
        recipe |= {"epochs": [math.ceil(epochs / options["replays"]) for epochs in recipe["epochs"]]}
    if any(options.get(name) not in values for name, values in recipe.items()):
        return None
    if method == "none":
        return "undefended"
    if method == "at":
        return f"{options['norm']} {options['attack_steps']}-step AT eps={eps:g}/255"
    if method == "free":
        return f"linf For Free AT m={options['replays']}" if round(eps, 3) == 8 else None
    kind = {"l2": "squared l2", "linf": "squared l1"}.get(options["norm"])
    how = {"fd": " (FD)", "exact": " (DBP)"}.get(method, "?") if dataset == "cifar10" else ""
    step = f" h={options['h']:g}" if method == "fd" and options["h"] != 0.01 else ""
    return f"{kind}{how} lambda={options['lam']:g}{step}"


# --- the tables -------------------------------------------------------------------------------------------

ERRORS, OMEGA, FALSE = "empirical_error_pct_*", "omega_error_pct_*", "false_pct_omega_bound"
MEANS = f"mean_distance_L_bound false_pct_L_bound mean_distance_omega_bound {FALSE} mean_distance_empirical"
TABLES = {  # of the paper: norm, title, columns
    "1": ("linf", "Robustness in linf", f"model clean_error_pct bound {OMEGA} {FALSE} {ERRORS} training"),
    "2": ("l2", "Robustness in l2", f"model clean_error_pct bound {MEANS} training"),
    "3": ("l2", "Regularity of the margin of the probabilities, l2", "model estimate grad_norm_* omega_[0-9]*"),
    "6": ("l2", "Error % within a radius by the ω-bound, l2", f"model bound {OMEGA} {FALSE}"),
}


def worth(bound: Tensor, measured: Measured) -> bounds.Violations:
    """On how many images a bound is false, and more."""
    return bounds.violations(bound, torch.from_numpy(measured.found["distances"]))


def figures_of(evaluation: Evaluation, norm: str, method: str | None) -> Row:
    """All that is known of a network in a norm, by a bound's method, or without a bound; misclassified: distance 0."""
    measured, target = evaluation.norms[norm], evaluation.target
    distances, names = measured.found["distances"], measured.found["attacks"].tolist()
    shares = {name: 100 * names.count(name) / len(names) for name in (*attacks.SUITE, "none")}
    row = {"model": target.name, "clean_error_pct": percent(evaluation.wrong), "bound": METHODS.get(method)}
    row |= {f"empirical_error_pct_{name}": percent(distances <= r) for name, r in RADII[norm].items()}
    row |= {"mean_distance_empirical": mean(distances, 0.0), "median_distance": float(np.median(distances))}
    row |= {"found_by_%": ", ".join(f"{name} {share:.1f}" for name, share in shares.items() if share)}
    calls = measured.found["calls"].sum(0) / len(names)
    pairs = zip((*attacks.SUITE, "checks"), calls, strict=True)
    row |= {"calls_an_image": float(calls.sum()), "training": training_of(target)}
    row["spent_on"] = ", ".join(f"{who} {n:.0f}" for who, n in pairs if n)
    for kind, bound in zip(("L", "omega"), measured.bounds.get(method, ()), strict=False):
        false = worth(bound, measured)
        found = {f"{kind}_error_pct_{name}": percent(bound.numpy() < r) for name, r in RADII[norm].items()}
        found[f"mean_distance_{kind}_bound"] = mean(bound, 0.0)
        found[f"false_pct_{kind}_bound"] = Interval(100 * false.rate, 100 * false.low, 100 * false.high, 1)
        row |= {name: one_draw(value) if method == "sampling" else value for name, value in found.items()}
        row |= {f"worst_ratio_{kind}_bound": false.worst, f"ratio_of_means_{kind}_bound": false.tightness}
    return row | regularity_of(measured, method) if norm == "l2" else row


def regularity_of(measured: Measured, method: str | None) -> Row:
    """Of the margin of the probabilities: gradient norms, and omega as ascent found it, or as it was sampled."""
    norms, omega = measured.found["probabilities_grad_norms"][:, 0], measured.found["omega"].max(0)
    row: Row = {"estimate": "largest found by ascent", "grad_norm_mean": mean(norms, 0.0)}
    row["grad_norm_max"] = float(norms.max())
    if method == "sampling":
        found = measured.bounds[method].constants
        row |= {"estimate": METHODS[method], "grad_norm_max": found.lipschitz}
        omega = [found.omega[(found.eps - r).abs().argmin()] for r in OMEGA_RADII]
    return row | {f"omega_{r}": float(w) for r, w in zip(OMEGA_RADII, omega, strict=True)}


def training_of(target: Target) -> str | None:
    """How long it took and how long it was: a run of few epochs is not the paper's network."""
    if target.config is None or target.seconds is None:
        return None
    epochs = target.config["options"]["epochs"] * target.step / target.config.get("steps_total", target.step)
    return f"{duration(target.seconds)}, {epochs:.3g} epochs of {target.config['images_train']:,}"


def table_of_the_paper(number: str, evaluations: list[Evaluation]) -> Table:
    """Of each network a row for its most reliable bound, one for the paper's, and the paper's own row."""
    norm, title, wanted = TABLES[number]
    rows = []
    for evaluation in evaluations:
        measured = evaluation.norms[norm]
        for method in dict.fromkeys([None if number == "3" else measured.best, "sampling"]):
            if method is None or method in measured.bounds:
                rows.append(figures_of(evaluation, norm, method))
        rows += paper_row(number, evaluation.target)
    return Table(f"table{number}", f"Table {number}. {title}", rows, wanted)


def table_4(evaluations: list[Evaluation]) -> Table:
    """Errors against the finite difference step; empty unless networks differ in it."""
    options = [(evaluation.target.config or {}).get("options", {}) for evaluation in evaluations]
    steps = [o["h"] if o.get("method") == "fd" else None for o in options]
    rows = [figures_of(e, "linf", None) | {"h": step} for e, step in zip(evaluations, steps, strict=True)]
    rows += paper_rows("4", evaluations[0].target.dataset).values()
    title = "Table 4. Error against the finite difference step h, linf"
    return Table("table4", title, rows if len({*steps} - {None}) > 1 else [], f"model h clean_error_pct {ERRORS}")


def table_5(evaluations: list[Evaluation]) -> Table:
    """Certified error of the smoothed classifier: for each sigma and, at each radius, for the best of them."""
    rows: list[Row] = []
    for evaluation in evaluations:
        each = []
        for sigma, found in evaluation.smoothing.items():
            errors = {str(r): percent(~found["right"] | (found["radii"] < r)) for r in SMOOTHING_RADII}
            each.append({"sigma": sigma, "largest_radius": float(found["cap"][0])} | errors)
        best = {"sigma": "best", "largest_radius": max(row["largest_radius"] for row in each)}
        best |= {str(r): min(row[str(r)].value for row in each) for r in SMOOTHING_RADII}
        rows += [{"model": evaluation.target.name} | row for row in [best] * bool(each[1:]) + each]
    rows += paper_rows("5", evaluations[0].target.dataset).values()
    title = "Table 5. Certified error % of the smoothed classifier within a radius, l2: confidence 99.9 % an image, "
    title += f"{evaluations[0].settings.samples:,} samples; best: the least of the column, chosen on these images"
    return Table("table5", title, rows)


def summary_table(evaluations: list[Evaluation]) -> Table:
    """What was measured, a network a line: what the terminal shows."""
    each = f"*_empirical median_distance {ERRORS} mean*_omega_bound {FALSE} bound found_by_% calls_an_image spent_on"
    rows, wanted = [], ["model", "clean_error_pct", "top-?_error_pct"]
    for evaluation in evaluations:
        ahead, classes = evaluation.first["ahead"], len(evaluation.target.classes)
        row = {f"top-{k}_error_pct": percent(ahead >= k) for k in (1, 5) if k != evaluation.target.topk and k < classes}
        for norm, measured in evaluation.norms.items():
            found = figures_of(evaluation, norm, measured.best)
            row |= {"model": found["model"], "clean_error_pct": found["clean_error_pct"]}
            row |= {f"{norm}:_{column}": value for column, value in found.items()}
            wanted += [f"{norm}:_{column}" for column in each.split()]
        failed = sum(len(measured.audit_failed) for measured in evaluation.norms.values())
        rows.append(row | {"masking_audit": f"FAILS in {failed} lines" if failed else "passes"})
    return Table("summary", "What was measured", rows, " ".join([*wanted, "masking_audit"]))


def bounds_table(evaluations: list[Evaluation], norm: str) -> Table:
    """Every bound with what it is worth."""
    pairs = [(evaluation, method) for evaluation in evaluations for method in evaluation.norms[norm].bounds]
    rows = [figures_of(evaluation, norm, method) for evaluation, method in pairs]
    title = f"Bounds in {norm}: on how many images they are false, the worst bound / distance, and the ratio of means"
    return Table(f"bounds-{norm}", title, rows, "model bound *_L_bound *_omega_bound")


def attacks_table(evaluations: list[Evaluation], norm: str) -> Table:
    """What each attack found by itself; empty unless each was alone on every image, and some image is right."""
    rows: list[Row] = []
    for evaluation in evaluations:
        found, right = evaluation.norms[norm].found, ~evaluation.wrong
        for attack in [name for name in evaluation.target.suite if f"distances_{name}" in found and right.any()]:
            distances = found[f"distances_{attack}"]
            near = np.isfinite(distances) & (distances <= 1.01 * found["distances"])
            row = {"model": evaluation.target.name, "attack": attack, "mean_distance": mean(distances, 0.0)}
            row["nearest_pct"] = percent(found["attacks"][right] == attack)
            rows.append(row | {"within_1_%_of_it": percent(near[right])})
    title = f"Each attack alone, {norm}: mean distance, and on how many of the correct images it found the nearest"
    return Table(f"attacks-{norm}", title, rows)


def differences_table(evaluations: list[Evaluation]) -> Table:
    """Paired differences from the first network, on the same images; errors in points."""
    reference, rows = evaluations[0], []
    for evaluation in [e for e in evaluations[1:] if e.target.same_images(reference.target)]:
        row = {"model": evaluation.target.name, "clean_error_pct": paired_percent(evaluation.wrong, reference.wrong)}
        for norm, measured in evaluation.norms.items():
            ours, theirs = measured.found["distances"], reference.norms[norm].found["distances"]
            with np.errstate(invalid="ignore"):
                row[f"{norm}:_mean_distance"] = mean(ours - theirs)
            for name, radius in RADII[norm].items():
                row[f"{norm}:_error_pct_{name}"] = paired_percent(ours <= radius, theirs <= radius)
        rows.append(row)
    return Table("differences", f"Differences from {reference.target.name} on the same images, errors in points", rows)


def audit_table(evaluations: list[Evaluation]) -> Table:
    """A verdict per line, with its figure."""
    rows: dict[str, Row] = {}
    for evaluation in evaluations:
        for norm, measured in evaluation.norms.items():
            for verdict in measured.verdicts:
                row = rows.setdefault(verdict.line, {"line": verdict.line})
                row["limit"] = f"at {verdict.at} {verdict.limit:g} {verdict.unit}"
                said = "pass" if verdict.passed else "FAIL"
                row[f"{evaluation.target.name}, {norm}"] = f"{said} {number(verdict.figure)}"
    n = len(evaluations[0].target.rows["audit"])
    return Table("audit", f"Masking audit, {n} images", list(rows.values()), named=True)


def tables_of(evaluations: list[Evaluation]) -> list[Table]:
    """All tables in which something stands."""
    norms = evaluations[0].norms
    tables = [table_of_the_paper(number, evaluations) for number, (norm, *_) in TABLES.items() if norm in norms]
    tables += [table_4(evaluations)] if "linf" in norms else []
    tables += [table_5(evaluations)] if evaluations[0].smoothing else []
    tables.sort(key=lambda table: table.name)
    tables += [make(evaluations, norm) for make in (attacks_table, bounds_table) for norm in norms]
    tables += [differences_table(evaluations)]
    return [table for table in [summary_table(evaluations), *tables, audit_table(evaluations)] if not table.empty]


# --- figures ----------------------------------------------------------------------------------------------


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False)
    for axis in axes.flat:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(color="0.9", linewidth=0.6)
        axis.set_axisbelow(True)
    return figure, axes


def png(figure: Figure) -> bytes:
    """The same bytes for the same figure: no date, no version in them."""
    buffer = io.BytesIO()
    FigureCanvasAgg(figure)
    figure.savefig(buffer, format="png", dpi=140, metadata={"Software": None})
    return buffer.getvalue()


def known_distances(evaluation: Evaluation, norm: str) -> np.ndarray:
    distances = evaluation.norms[norm].found["distances"]
    return np.sort(distances[np.isfinite(distances)])


def error_figure(evaluations: list[Evaluation]) -> Figure | None:
    """Figures 1 and 2: error against distance; dashed, the error that the bound allows."""
    norms = [n for n in evaluations[0].norms if any(known_distances(e, n).any() for e in evaluations)]
    if not norms:
        return None
    figure, axes = panels(len(norms))
    dashed = {"linestyle": (0, (4, 2)), "linewidth": 1}
    for axis, norm in zip(axes[0], norms, strict=True):
        for evaluation, colour in zip(evaluations, COLOURS * len(evaluations), strict=False):
            measured, known = evaluation.norms[norm], known_distances(evaluation, norm)
            n, counts = len(evaluation.wrong), np.arange(1, len(known) + 1)
            low = scipy.stats.beta.ppf(0.025, counts, n - counts + 1)
            high = scipy.stats.beta.ppf(0.975, counts + 1, np.maximum(n - counts, 1e-9))
            axis.fill_between(known, 100 * low, 100 * high, step="post", color=colour, alpha=0.15, linewidth=0)
            axis.step(known, 100 * counts / n, where="post", color=colour, label=evaluation.target.name)
            if measured.best:
                bound = np.sort(measured.bounds[measured.best].omega.numpy())
                axis.step(bound, 100 * np.arange(1, n + 1) / n, where="post", color=colour, **dashed)
        reach = max(np.quantile(known, 0.995) for e in evaluations if len(known := known_distances(e, norm)))
        axis.set(xlim=(0, 1.05 * reach or 1), ylim=(0, 100), xlabel=f"{NORM_NAMES[norm]} distance, pixels in [0, 1]")
    axes[0, 0].set_ylabel("error, %")
    if any(e.norms[norm].best for e in evaluations for norm in norms):
        axes[0, 0].plot([], [], color="0.3", label="ω-bound", **dashed)
    where = {"loc": "outside upper center", "ncols": 1 if len(norms) == 1 else 3}
    figure.legend(*axes[0, 0].get_legend_handles_labels(), **where, frameon=False, fontsize=9)
    return figure


def bounds_figure(evaluations: list[Evaluation]) -> Figure | None:
    """Each image's ω-bound against its distance: above the diagonal the bound is false."""
    shown = {"sampling": (COLOURS[1], "x"), "ahead": (COLOURS[0], "o")}
    full = [(e, n) for e in evaluations for n in e.norms if shown.keys() & e.norms[n].bounds.keys()]
    if not full:
        return None
    columns = len({norm for _, norm in full})
    figure, axes = panels(columns, math.ceil(len(full) / columns))
    for axis in axes.flat[len(full) :]:
        axis.remove()
    for axis, (evaluation, norm) in zip(axes.flat, full, strict=False):
        measured, known = evaluation.norms[norm], known_distances(evaluation, norm)
        for method, (colour, marker) in shown.items():
            if found := measured.bounds.get(method):
                label = f"{METHODS[method]}: {number(100 * worth(found.omega, measured).rate, 1)} % false"
                how = {"s": 9, "marker": marker, "color": colour, "lw": 0.7, "label": label}
                axis.scatter(measured.found["distances"], found.omega, **how)
        limit = 1.05 * float(known.max()) if known.any() else 1.0
        axis.plot([0, limit], [0, limit], color="0.3", linewidth=1)
        axis.set(xlim=(0, limit), ylim=(0, limit), xlabel=f"{NORM_NAMES[norm]} distance found, pixels")
        axis.set(ylabel="ω-bound, pixels")
        axis.set_title(evaluation.target.name, fontsize=10)
        axis.legend(fontsize=8, loc="upper left", frameon=True, framealpha=0.9, edgecolor="none")
    return figure


def adversarial_figure(evaluations: list[Evaluation], norm: str, count: int = 5) -> Figure | None:
    """The first images that all networks get right: the image, and each one's adversarial image and change."""
    firsts = [evaluation.norms[norm].found["first"] for evaluation in evaluations]
    shared = min(len(first["distances"]) for first in firsts)  # first parts begin alike, and a slow network's is short
    distances = np.array([first["distances"][:shared] for first in firsts])
    usable = (np.isfinite(distances) & (distances > 0)).all(0)
    rows, target = np.flatnonzero(usable)[:count], evaluations[0].target
    if len(rows) == 0 or not all(e.target.same_images(target) for e in evaluations):
        return None
    figure, axes = panels(1 + 2 * len(firsts), len(rows), width=1.5, height=1.65)
    for row, i in zip(axes, rows, strict=True):
        picture(row[0], firsts[0]["images"][i], target.classes[firsts[0]["labels"][i]][:12])
        for j, found in enumerate(firsts):
            change = found["adversarial"][i] - found["images"][i]
            moved = f"{target.classes[found['moved'][i]][:12]}, {number(found['distances'][i])}"
            picture(row[1 + 2 * j], found["adversarial"][i], moved)
            peak = float(np.abs(change).max()) or 1.0
            picture(row[2 + 2 * j], 0.5 + change / (2 * peak), f"±{number(peak)}", diverging=True)
    headings = ["image", *(part for e in evaluations for part in (e.target.name, "change"))]
    for axis, heading in zip(axes[-1], headings, strict=True):
        axis.set_xlabel(heading.replace("-", "-\u200b"), fontsize=7, wrap=True)
    figure.suptitle(f"Nearest adversarial images found, {NORM_NAMES[norm]}: class, distance", fontsize=10)
    return figure


def picture(axis: Any, image: np.ndarray, title: str, *, diverging: bool = False) -> None:
    """Grey or colour; a grey change from blue, down, to red, up."""
    shown = image[0] if image.shape[0] == 1 else image.transpose(1, 2, 0)
    axis.imshow(np.clip(shown, 0, 1), cmap="RdBu_r" if diverging else "gray", vmin=0, vmax=1, interpolation="nearest")
    axis.set_title(title, fontsize=8, pad=2)
    axis.grid(False)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


# --- files ------------------------------------------------------------------------------------------------


DISTANCES = """Distances are those of the nearest adversarial images found, upper bounds of the true ones, in pixels of
range 0 to 1; a misclassified image has distance 0 and bound 0, and an image that nothing broke makes a mean infinite.
Intervals are 95 %: Clopper-Pearson for percentages, t for means; they speak of the draw of the images, not of the
training."""
BOUNDS = """Bounds are estimates, not certificates. `false`: the share of images with an adversarial image nearer than
the bound says, a lower estimate, as good as the attacks. `calibrated`: the smallest modulus whose bounds are false for
0.5 % of the images at most, from distances of the calibration images; `two tangents`: the same, with the tangent at the
linearised boundary too. `ascent`: the largest values that gradient ascent finds. `sampled`: the paper's, from random
perturbations and a GEV fit. All its bounds follow from one draw of these, and with another seed several times as many
can be false: so it has no interval over images. The intervals of the other bounds hold for these calibration
images."""


def images_csv(evaluation: Evaluation) -> bytes:
    """Everything known of each image; distances and bounds in pixels, 0 to 1."""
    found = evaluation.first
    columns: dict[str, Any] = {
        "image (index in the test set)": evaluation.target.rows["evaluation"],
        "label": found["labels"],
        "predicted": found["predicted"],
        "classes ahead of the label": found["ahead"],
    }
    for norm, measured in evaluation.norms.items():
        columns[f"distance {norm} (pixels 0 to 1)"] = measured.found["distances"]
        columns[f"attack {norm}"] = measured.found["attacks"]
        for name in [name for name in measured.found if name.startswith("distances_")]:
            columns[f"{name.removeprefix('distances_')} alone, distance {norm} (pixels 0 to 1)"] = measured.found[name]
        gradient = measured.found["probabilities_grad_norms"][:, 0]
        columns[f"gradient norm of the margin, {norm} attacks (probability per pixel unit)"] = gradient
        for method, bound in measured.bounds.items():
            columns[f"L-bound {norm} {method} (pixels 0 to 1)"] = bound.L.numpy()
            columns[f"omega-bound {norm} {method} (pixels 0 to 1)"] = bound.omega.numpy()
    for sigma, found in evaluation.smoothing.items():
        columns[f"smoothed class, sigma {sigma} (-1: abstains)"] = found["classes"]
        columns[f"certified radius of the smoothed classifier l2, sigma {sigma} (pixels 0 to 1)"] = found["radii"]
    return as_csv(columns, zip(*(values.tolist() for values in columns.values()), strict=True))


def summary(evaluation: Evaluation) -> dict[str, Any]:
    """evaluation/summary.json, as the documentation of the run directory has it."""
    target, norms = evaluation.target, {}
    for norm, measured in evaluation.norms.items():
        distances, bound = measured.found["distances"], measured.bounds.get(measured.best)
        norms[norm] = {
            "mean_distance": float(distances.mean()) if np.isfinite(distances).all() else None,
            "median_distance": middle if math.isfinite(middle := float(np.median(distances))) else None,
            "lipschitz_bound_mean": float(bound.L.mean()) if bound else None,
            "omega_bound_mean": float(bound.omega.mean()) if bound else None,
            "violations_pct": 100 * worth(bound.omega, measured).rate if bound else None,
            "bound_method": measured.best,
            "error_pct": {f"{r:.4g}": percent(measured.found["distances"] <= r).value for r in RADII[norm].values()},
            "audit_failed": measured.audit_failed,
        }
    head = {"images": len(evaluation.wrong), "topk": target.topk, "clean_error_pct": percent(evaluation.wrong).value}
    return head | {"checkpoint_step": target.step, "network": target.fingerprint, "norms": norms}


def preamble(evaluations: list[Evaluation], world: World) -> str:
    """What every figure has to be quoted with."""
    settings, first, made = evaluations[0].settings, evaluations[0].target, provenance(world)
    device = "cpu" if world.device.type == "cpu" else made["device"]
    size = " x ".join(map(str, evaluations[0].first["first"]["images"].shape[1:]))
    of = {part: len(rows) for part, rows in first.rows.items()}
    versions = "Python {python}, torch {torch}".format(**made["versions"])
    paragraphs = [
        f"# {', '.join(e.target.name for e in evaluations)}",
        "Networks, with digests of their weights: "
        + ", ".join(f"{e.target.name} ({e.target.version})" for e in evaluations),
        f"{of['evaluation']} evaluation and {of['calibration']} calibration images of {size} (channels first)"
        f", drawn from {len(first.source):,} test images of {first.dataset} with seed {settings.seed}; errors are "
        f"top-{first.topk}. {versions}, {device}, commit {made['commit']}.",
        DISTANCES,
        BOUNDS if any(measured.bounds for e in evaluations for measured in e.norms.values()) else "",
        "\n".join(f"* {note}" for note in notes(evaluations)),
    ]
    return "\n\n".join(filter(None, paragraphs)) + "\n"


def notes(evaluations: list[Evaluation]) -> list[str]:
    """What a reader of the tables has to know beside them, a line each."""
    lines = []
    for evaluation in evaluations:
        name = evaluation.target.name
        if evaluation.target.network.blind:
            lines.append(f"{name}: no gradient reaches the image: attacked by its decisions alone, without bounds")
        for norm, measured in evaluation.norms.items():
            refused = {} if evaluation.target.network.blind else measured.refused
            lines += [f"{name}, {norm}: no {METHODS[method]} bound: {why}" for method, why in refused.items()]
            if failed := measured.audit_failed:
                lines.append(f"{name}, {norm}: the audit FAILS: {'; '.join(failed)}")
            if unbroken := int(np.isinf(measured.found["distances"]).sum()):
                lines.append(f"{name}, {norm}: {unbroken} images that no attack broke")
    return lines


def write_report(evaluations: list[Evaluation], path: Path, world: World) -> None:
    """Tables, figures and report.md of one network, or of several beside each other."""
    tables = tables_of(evaluations)
    figures = {"errors": error_figure(evaluations), "bounds": bounds_figure(evaluations)}
    figures |= {f"adversarial-{norm}": adversarial_figure(evaluations, norm) for norm in evaluations[0].norms}
    figures = {name: figure for name, figure in figures.items() if figure}
    captions = {
        "errors": "Error against distance, 95 % bands (the paper's Figures 1, 2 on a linear axis); dashed, a bound's.",
        "bounds": "ω-bound against distance, an image a point. Above the diagonal the bound is false.",
    }
    parts = [preamble(evaluations, world), markdown(tables[0].turned), *map(markdown, tables[1:])]
    for name, figure in figures.items():
        replace(path / f"{name}.png", png(figure))
        parts.append(f"![{name}]({name}.png)\n\n{captions.get(name, 'The nearest adversarial images found.')}\n")
    ours = {*(f"{name}.png" for name in figures), *(f"{table.name}.csv" for table in tables)}
    for kind in ("*.png", "table?.csv", "differences.csv", "bounds*.csv", "attacks-*.csv", "distances.csv"):
        for old in path.glob(kind):
            old.unlink() if old.name not in ours else None  # of an evaluation with other options
    for table in tables:
        replace(path / f"{table.name}.csv", table_csv(table))
    replace(path / "report.md", "\n".join(parts).encode())


def introduce(target: Target, settings: Settings, console: Console) -> None:
    """Say what will be measured, and whether an evaluation is there of other weights."""
    images, rest = len(target.rows["evaluation"]), len(target.rows["calibration"])
    some = f" (half of the {len(target.source):,} there are)" if images < settings.images else ""
    others = f", {rest:,} others to calibrate with" if rest else ""
    console.print(f"{target.name}: {images:,} images of {target.dataset}{some}{others}")
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        before = json.loads((target.path / "summary.json").read_text(encoding="utf-8"))
        if before["network"] != target.fingerprint:
            step = f"step {before['checkpoint_step']}" if before["checkpoint_step"] else before["network"]
            console.print(f"{target.path}: the evaluation in it is of other weights ({step}); now {target.version}")


def publish(evaluations: list[Evaluation], together: Path, world: World) -> None:
    """Write each network's report and, of several, one on all of them; show one table on the terminal."""
    for evaluation in evaluations:
        path = evaluation.target.path
        write_report([evaluation], path, world)
        replace(path / "images.csv", images_csv(evaluation))
        replace(path / "summary.json", json.dumps(summary(evaluation), indent=2, allow_nan=False).encode())
    if len(evaluations) > 1:
        write_report(evaluations, together, world)
    if not world.console.is_terminal:
        world.console.width = max(world.console.width, 140)
    show(summary_table(evaluations).turned, world.console)
    for note in notes(evaluations):
        world.console.print(note)
    world.console.print(f"report: {together / 'report.md'}")
