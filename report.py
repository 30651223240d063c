"""Section 4: what evaluate.py measured, in the paper's Tables 1 to 6 and Figures 1 and 2, with intervals; files.

Every percentage has a 95 % Clopper-Pearson interval, every mean a t interval: of the draw of the images, not of the
training.  What follows from one random estimate of the constants (`sampled`) has none: one draw has no spread.
"""

import csv
import fnmatch
import io
import itertools
import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import rich.box
import rich.table
import scipy.stats
import torch
from matplotlib import rcParams
from matplotlib.figure import Figure
from rich.console import Console

import attacks
import bounds
from evaluate import METHODS, OMEGA_RADII, RADII, Target
from runs import World, duration, one_line, provenance, replace

rcParams["text.parse_math"] = False  # names of classes and runs may have dollars
SAMPLED = METHODS["sampling"]
SMOOTHING_RADII = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 1.75, 2.0)  # of Table 5
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")  # Okabe & Ito (2008)
HEADINGS = {r"pct_(?=\d)": "% at ", r"(\d)_(\d)": r"\1/\2", "L_bound": "L-bound", "omega_bound": "ω-bound"}
HEADINGS |= {"omega_error": "ω-bound error", r"omega_([\d.]+)": r"ω(\1)", "distance_empirical": "distance found"}
HEADINGS |= {"empirical_error": "error", "pct": "%", "_": " "}
PAPER = "paper: "  # before the name of a row of the paper

# Column -> text, number or nothing; beside x its 95 % interval, x_low and x_high: nothing there, x follows from a draw.
Row = dict[str, Any]
ENDS, END = ("", "_low", "_high"), re.compile("_(low|high)$")


# --- tables -----------------------------------------------------------------------------------------------


def percent(name: str, hits: np.ndarray) -> Row:
    """The share of True, in percent, with its Clopper-Pearson interval."""
    low, high = scipy.stats.binomtest(int(hits.sum()), len(hits)).proportion_ci(0.95, "exact")
    return {name: 100 * float(hits.mean()), f"{name}_low": 100 * float(low), f"{name}_high": 100 * float(high)}


def mean(name: str, values: np.ndarray, least: float = 0.0) -> Row:
    """The mean of values of at least `least`, with its t interval; infinite, and without one, where a value is."""
    values = np.asarray(values, dtype=float)
    if math.isinf(centre := float(values.mean())):
        return {name: centre}
    reach = float(scipy.stats.sem(values) * scipy.stats.t.ppf(0.975, len(values) - 1)) if len(values) > 1 else math.inf
    return {name: centre, f"{name}_low": max(centre - reach, least), f"{name}_high": centre + reach}


class Table(NamedTuple):
    """Rows, which Markdown, CSV and terminal show; sideways: a line a quantity and a column a network, but in CSV."""

    name: str
    title: str
    rows: list[Row]
    sideways: bool = False

    @property
    def columns(self) -> list[str]:
        """Those in which one of our own rows has something: the paper's alone compare with nothing."""
        ours = [row for row in self.rows if not str(row.get("model")).startswith(PAPER)]
        return list(dict.fromkeys(END.sub("", c) for row in ours for c, cell in row.items() if cell is not None))

    @property
    def grid(self) -> list[list[str]]:
        """The cells in words, below their headings or beside them."""
        lines = [[heading(c) for c in self.columns], *([text(row, c) for c in self.columns] for row in self.rows)]
        return [list(line) for line in zip(*lines, strict=True)] if self.sideways else lines

    @property
    def markdown(self) -> str:
        first, *rest = [[cell.replace("|", "/") for cell in line] for line in self.grid]
        lines = [f"| {' | '.join(line)} |" for line in (first, ["---"] * len(first), *rest)]
        return "\n".join([f"### {self.title}\n", *lines, ""])

    def show(self, console: Console) -> None:
        """On a terminal, lying sideways: as many networks beside each other as there is room."""
        first, *widths = [max(map(len, column)) for column in zip(*self.grid, strict=True)]
        count = max(1, (console.width - min(first, 40) - 4) // (min(max(widths), 28) + 3))
        for start in range(1, len(widths) + 1, count):
            head, *lines = [line[:1] + line[start : start + count] for line in self.grid]
            columns = [rich.table.Column(name, overflow="fold") for name in head]
            shown = rich.table.Table(*columns, title=self.title, title_justify="left", box=rich.box.SIMPLE_HEAD)
            for line in lines:
                shown.add_row(*line)
            console.print(shown)


def heading(column: str) -> str:
    """omega_error_pct_2_255 -> ω-bound error % at 2/255"""
    for pattern, said in HEADINGS.items():
        column = re.sub(pattern, said, column)
    return column


def number(value: float) -> str:
    """Three digits, or all before the point."""
    digits = ".3g" if abs(value) < 10 or abs(value) >= 1e6 else f",.{int(abs(value) < 1000)}f"
    return f"{value:{digits}}".replace("inf", "∞")


def text(row: Row, column: str) -> str:
    """A cell, with its interval if it has one."""
    cell, low, high = (row.get(column + end) for end in ENDS)
    shown = number(cell) if isinstance(cell, float) else "" if cell is None else str(cell)
    if f"{column}_low" not in row:
        return shown
    return f"{shown} (one draw)" if low is None else f"{shown} ({number(low)} to {number(high)})"


def as_csv(columns: Iterable[str], rows: list[Row]) -> bytes:
    """With the ends of the intervals, where there are any, beside them."""
    names = [c + end for c in columns for end in ENDS if any(c + end in row for row in rows)]
    writer = csv.DictWriter(buffer := io.StringIO(), names, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue().encode()


# What all rows of the paper have in common, and those on a data set; a run that differs in it is not set beside them.
COMMON = {"activation": "relu", "central": False, "unsquared": False, "recipe": "paper", "statistics": "batch"}
COMMON |= {"lam_warmup": 0.0, "penalty_share": 1.0, "penalty_from": 0.0, "subset": None, "init": None, "size": None}
RECIPES = {"cifar10": {"model": "resnext34-authors", "epochs": 200, "batch_size": 128, "lr": 0.1}}
RECIPES |= {"imagenet": {"model": "resnet50", "epochs": 29, "batch_size": 512, "lr": 0.25}}


def paper_rows(number: str, dataset: str) -> dict[str, Row]:
    """The paper's rows of a table by model; from results/paper_tables.csv."""
    rows: dict[str, Row] = {}
    with open(Path(__file__).parent / "results" / "paper_tables.csv", newline="", encoding="utf-8") as file:
        for line in csv.DictReader(file):
            if (line["table"], line["dataset"]) == (number, dataset):
                row = rows.setdefault(line["model"], {"model": PAPER + line["model"]})
                row["omega_error_pct_" * (number == "6") + line["quantity"]] = float(line["value"])
                if line["quantity"] == "train_hours":
                    row["training"] = f"{row['train_hours']:g} h"
    return rows


def paper_row(number: str, target: Target) -> list[Row]:
    """The paper's row for a network that was trained, to the end, as this row's was, where there is one."""
    trained = target.config and target.step == target.config.get("steps_total")
    model = paper_model(target.config["options"], target.dataset) if trained else None
    return [row for name, row in paper_rows(number, target.dataset).items() if name == model]


def paper_model(options: dict[str, Any], dataset: str) -> str | None:
    """What the paper's tables call the network that these options train; None for a network of another recipe."""
    method, recipe = options["method"], COMMON | RECIPES.get(dataset, {})
    if method == "free":  # as many steps as the others
        recipe |= {"epochs": math.ceil(recipe.get("epochs", 0) / options["replays"]), "eps": 8 / 255}
    if method == "ascent" or any(options.get(name, value) != value for name, value in recipe.items()):
        return None
    attacked = f"{options.get('norm')} {options.get('attack_steps')}-step AT eps={255 * options.get('eps', 0):g}/255"
    names = {"none": "undefended", "at": attacked, "free": f"linf For Free AT m={options.get('replays')}"}
    kind = {"l2": "squared l2", "linf": "squared l1"}.get(options["norm"])
    how = {"fd": " (FD)", "exact": " (DBP)"}.get(method, "?") if dataset == "cifar10" else "?" * (method != "fd")
    lam, h = options["lam"], options["h"]
    if dataset == "imagenet":  # where the paper's are behind the normalization
        lam, h = {0.0051: 0.1, 0.051: 1.0}.get(lam), 0.01 if h == 0.0023 else None
    step = f" h={h}" if method == "fd" and h != 0.01 else ""
    return names.get(method, f"{kind}{how} lambda={lam}{step}".replace("=1.0", "=1"))


ERRORS, OMEGA, FALSE = "empirical_error_pct_*", "omega_error_pct_*", "false_pct_omega_bound"
MEANS = f"mean_distance_L_bound false_pct_L_bound mean_distance_omega_bound {FALSE} mean_distance_empirical"
TABLES = {  # of the paper: norm, title, columns
    "1": ("linf", "Robustness in linf", f"model clean_error_pct bound {OMEGA} {FALSE} {ERRORS} training"),
    "2": ("l2", "Robustness in l2", f"model clean_error_pct bound {MEANS} training"),
    "3": ("l2", "Regularity of the margin of the probabilities, l2", "model estimate grad_norm_* omega_[0-9]*"),
    "4": ("linf", "Error against the finite difference step h, linf", f"model h clean_error_pct {ERRORS}"),
    "6": ("l2", "Error % within a radius by the ω-bound, l2", f"model bound {OMEGA} {FALSE}"),
}
SUMMARY = f"model clean_error_pct top-* *_empirical *_alone median_distance {ERRORS} mean*_omega_bound {FALSE} bound"
SUMMARY += " found_by_% calls_an_image"


def pick(row: Row, wanted: str) -> Row:
    """The columns of these patterns, in their order, with their intervals."""
    return {c: row[c] for pattern in wanted.split() for c in row if fnmatch.fnmatchcase(END.sub("", c), pattern)}


def figures_of(target: Target, norm: str, method: str | None) -> Row:
    """All that is known of a network in a norm, by a bound's method, or without a bound; misclassified: distance 0."""
    measured, radii, options = target.norms[norm], RADII[norm].items(), (target.config or {}).get("options", {})
    found, distances, names = measured.found, measured.found["distances"], measured.found["attacks"].tolist()
    row = {"model": target.name, "bound": method, "training": training_of(target)}
    row |= percent("clean_error_pct", target.wrong) | mean("mean_distance_empirical", distances)
    for k in [k for k in (1, 5) if target.topk != k < len(target.classes)]:
        row |= percent(f"top-{k}_error_pct", target.first["ahead"] >= k)
    for name, own in measured.alone.items():
        row |= mean(f"mean_distance_{name}_alone", own)
    for name, radius in radii:
        row |= percent(f"empirical_error_pct_{name}", distances <= radius)
    shares = {name: 100 * names.count(name) / len(names) for name in (*attacks.SUITE, "none")}
    row["found_by_%"] = ", ".join(f"{name} {share:.1f}" for name, share in shares.items() if share)
    row |= {"median_distance": float(np.median(distances)), "calls_an_image": float(found["calls"].sum() / len(names))}
    row["h"] = options["h"] if options.get("method") in {"fd", "ascent"} else None
    for kind, bound in zip(("L", "omega"), measured.bounds.get(method, ()), strict=False):
        known = bounds.violations(bound, torch.from_numpy(distances))
        claims = mean(f"mean_distance_{kind}_bound", bound)
        for end, share in zip(ENDS, (known.rate, known.low, known.high), strict=True):
            claims[f"false_pct_{kind}_bound{end}"] = 100 * share
        for name, radius in radii:
            claims |= percent(f"{kind}_error_pct_{name}", bound.numpy() < radius)
        row |= {name: None if method == SAMPLED and END.search(name) else value for name, value in claims.items()}
    return row | regularity_of(target, method) if norm == "l2" else row


def regularity_of(target: Target, method: str | None) -> Row:
    """Of the margin of the probabilities, l2: gradient norms, and omega as ascent found it, or as it was sampled."""
    measured = target.norms["l2"]
    norms, omega = measured.found["probabilities_grad_norms"][:, 0], measured.found["omega"].max(0)
    estimate, largest = "ω′, at most ω: the largest found by ascent", float(norms.max())
    if method == SAMPLED:
        _, _, found = measured.bounds[method]
        estimate, largest = method, found.lipschitz
        omega = [found.omega.cummax(0).values[(found.eps - r).abs().argmin()] for r in OMEGA_RADII]
    row = {"estimate": estimate, **mean("grad_norm_mean", norms), "grad_norm_max": largest}
    return row | {f"omega_{r}": float(w) for r, w in zip(OMEGA_RADII, omega, strict=True)}


def training_of(target: Target) -> str | None:
    """How long it took and how long it was: a run of few epochs is not the paper's network."""
    if target.config is None or target.seconds is None:
        return None
    epochs = target.config["options"]["epochs"] * target.step / target.config.get("steps_total", target.step)
    return f"{duration(target.seconds)}, {epochs:.3g} epochs of {target.config['images_train']:,}"


def table_of_the_paper(number: str, targets: list[Target]) -> Table:
    """Of each network a row for each bound, or for what has none, and the paper's own row; of Table 4, all of these."""
    norm, title, wanted = TABLES[number]
    rows = []
    for target in targets:
        known = target.norms[norm].bounds
        methods = {"3": [None, *{SAMPLED} & known.keys()], "4": [None]}.get(number, [*known] or [None])
        rows += [pick(figures_of(target, norm, method), wanted) for method in methods]
        rows += [] if number == "4" else paper_row(number, target)
    if number == "4":  # where networks differ in h
        several = len({row["h"] for row in rows} - {None}) > 1
        rows = [*rows, *paper_rows("4", targets[0].dataset).values()] if several else []
    return Table(f"table{number}", f"Table {number}. {title}", rows)


def table_5(targets: list[Target]) -> Table:
    """Certified error of the smoothed classifier: for each sigma and, at each radius, for the best of them."""
    rows: list[Row] = []
    for target in targets:
        each = []
        for sigma, found in target.smoothing.items():
            each.append({"model": target.name, "sigma": sigma, "largest_radius": float(found["cap"][0])})
            for radius in SMOOTHING_RADII:
                each[-1] |= percent(str(radius), ~found["right"] | (found["radii"] < radius))
        if each[1:]:
            best = {str(radius): min(row[str(radius)] for row in each) for radius in SMOOTHING_RADII}
            largest = max(row["largest_radius"] for row in each)
            rows.append({"model": target.name, "sigma": "best", "largest_radius": largest} | best)
        rows += each
    title = "Table 5. Certified top-1 error % of the smoothed classifier, l2: confidence 99.9 % an image, "
    title += f"{targets[0].settings.samples:,} samples; best: the least of the column, chosen on these images"
    return Table("table5", title, [*rows, *paper_rows("5", targets[0].dataset).values()])


def summary_table(targets: list[Target], norm: str) -> Table:
    """What was measured in a norm, and what each line of the masking audit says: what the terminal shows."""
    rows = []
    for target in targets:
        rows.append(pick(figures_of(target, norm, target.norms[norm].best), SUMMARY))
        first, own = (some.norms[norm].found for some in (targets[0], target))
        same = np.array_equal(own["first"]["images"], first["first"]["images"])  # then image by image
        if own is not first and same and np.isfinite(own["distances"] + first["distances"]).all():
            rows[-1] |= mean("mean_distance_beyond_the_first", own["distances"] - first["distances"], -math.inf)
        for line, (figure, limit) in target.norms[norm].audit.items():
            rows[-1][f"audit: {line} (at most {limit})"] = f"{'pass' if figure <= limit else 'FAIL'} {number(figure)}"
    title = f"What was measured, {norm}; masking audit of {len(targets[0].rows['audit'])} images: in %, falls in points"
    return Table(f"summary-{norm}", title, rows, sideways=True)


def tables_of(targets: list[Target]) -> list[Table]:
    """All tables in which something stands."""
    norms = targets[0].norms
    tables = [table_of_the_paper(number, targets) for number, (norm, *_) in TABLES.items() if norm in norms]
    tables += [table_5(targets), *(summary_table(targets, norm) for norm in norms)]
    filled = [table for table in tables if not {*table.columns} <= {"model", "bound", "estimate", "training"}]
    return sorted(filled, key=lambda table: table.name)


# --- figures ----------------------------------------------------------------------------------------------


def panels(columns: int, rows: int = 1, *, width: float = 4.6, height: float = 3.6) -> tuple[Figure, np.ndarray]:
    figure = Figure(figsize=(width * columns, height * rows), layout="constrained")
    return figure, figure.subplots(rows, columns, squeeze=False)


def error_figure(targets: list[Target]) -> Figure:
    """Figures 1 and 2: error against distance, with 95 % bands; dashed, the error that the bound allows."""
    figure, axes = panels(len(targets[0].norms))
    for axis, norm in zip(axes[0], targets[0].norms, strict=True):
        for target, colour in zip(targets, itertools.cycle(COLOURS), strict=False):
            measured, distances = target.norms[norm], np.sort(target.norms[norm].found["distances"])
            known = distances[np.isfinite(distances)]
            errors = [percent("y", distances <= distance) for distance in known]
            low, y, high = ([error[name] for error in errors] for name in ("y_low", "y", "y_high"))
            axis.fill_between(known, low, high, step="post", color=colour, alpha=0.15, linewidth=0)
            axis.step(known, y, where="post", color=colour, label=f" {target.name}")  # without a space _name is hidden
            if measured.best:
                omega = np.sort(measured.bounds[measured.best][1])
                axis.step(omega, np.linspace(0, 100, len(omega) + 1)[1:], "--", where="post", color=colour, linewidth=1)
        axis.set(xlim=(0, None), ylim=(0, 100), xlabel=f"{norm} distance, pixels in [0, 1]", ylabel="error, %")
        axis.legend(fontsize=8, loc="lower right")
    return figure


def bounds_figure(targets: list[Target]) -> Figure | None:
    """Each image's ω-bound against its distance: above the diagonal the bound is false."""
    shown = [(target.name, norm, known) for target in targets for norm, known in target.norms.items() if known.bounds]
    if not shown:
        return None
    figure, axes = panels(len(shown))
    for axis, (name, norm, known) in zip(axes[0], shown, strict=True):
        distances = np.where(np.isfinite(known.found["distances"]), known.found["distances"], np.nan)
        for (method, (_, omega, _)), colour, marker in zip(known.bounds.items(), COLOURS, "o+x", strict=False):
            axis.scatter(distances, omega, s=9, marker=marker, color=colour, lw=0.7, label=method)
        axis.axline((0, 0), slope=1, color="0.3", linewidth=1)
        axis.set(xlim=(0, None), ylim=(0, None), xlabel=f"{norm} distance found, pixels", ylabel="ω-bound, pixels")
        axis.set_title(name, fontsize=10)
        axis.legend(fontsize=8, loc="upper left")
    return figure


def adversarial_figure(target: Target, norm: str, count: int = 5) -> Figure | None:
    """The first images that the network gets right: the image, its adversarial image, and the change."""
    found = target.norms[norm].found["first"]
    rows = np.flatnonzero(np.isfinite(found["distances"]) & (found["distances"] > 0))[:count]
    if len(rows) == 0:
        return None
    figure, axes = panels(3, len(rows), width=1.5, height=1.65)
    for row, i in zip(axes, rows, strict=True):
        image, adversarial, distance = (found[name][i] for name in ("images", "adversarial", "distances"))
        peak = float(np.abs(adversarial - image).max()) or 1.0
        was, now = (one_line(target.classes[found[name][i]])[:12] for name in ("labels", "moved"))
        shown = [(image, was, "gray"), (adversarial, f"{now}, {number(distance)}", "gray")]
        shown += [(0.5 + (adversarial - image) / (2 * peak), f"±{number(peak)}", "RdBu_r")]  # grey: blue down, red up
        for axis, (pixels, title, colours) in zip(row, shown, strict=True):
            pixels = pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)
            axis.imshow(np.clip(pixels, 0, 1), cmap=colours, vmin=0, vmax=1, interpolation="nearest")
            axis.set_title(title, fontsize=8, pad=2)
            axis.set(xticks=[], yticks=[])
    return figure


# --- files ------------------------------------------------------------------------------------------------

PREAMBLE = """# {title}

Networks, with digests of their weights: {networks}

{evaluation} evaluation and {calibration} calibration images of {size} (channels first), drawn from {test:,} test images
of {dataset} with seed {seed}; errors are top-{topk}. Python {python}, torch {torch}, {device}, commit {commit}.

Distances are those of the nearest adversarial images found, upper bounds of the true ones, in pixels of range 0 to 1; a
misclassified image has distance 0 and bound 0, and where nothing broke an image a mean is infinite. Intervals are 95 %,
of the draw of the images, not of the training: Clopper-Pearson for percentages, t for means. `beyond the first`: the
mean difference, image by image, from the first network.

Bounds are estimates, not certificates. `false`: the share of images with an adversarial image nearer than the bound
says, a lower estimate, as good as the attacks. `two tangents`: the smallest modulus whose bounds are false for at most
0.5 % of the calibration images. `ascent`: the largest ω′ (at most ω, and all that the proof needs) that ascent finds.
`sampled`: the paper's ω, of random perturbations and a GEV fit; one draw: with another seed far more may be false.

{notes}
"""
# Names of what is written here, or was by earlier versions.
WRITTEN = r"(table\d|audit|differences|(summary|attacks|bounds)(-\w+)?)\.csv|(errors|bounds|adversarial-\w+)\.png"


def images_csv(target: Target) -> bytes:
    """Everything known of each image; distances and bounds in pixels, 0 to 1."""
    first, pixels = target.first, "(pixels 0 to 1)"
    columns = {"image (index in the test set)": target.rows["evaluation"], "label": first["labels"]}
    columns |= {"predicted": first["predicted"], "classes ahead of the label": first["ahead"]}
    for norm, measured in target.norms.items():
        found, gradient = measured.found, f"gradient norm of the margin, {norm} attacks (probability per pixel unit)"
        columns |= {f"distance {norm} {pixels}": found["distances"], f"attack {norm}": found["attacks"]}
        columns |= {f"{name} alone, distance {norm} {pixels}": values for name, values in measured.alone.items()}
        columns[gradient] = found["probabilities_grad_norms"][:, 0]
        for method, (lipschitz, omega, _) in measured.bounds.items():
            columns |= {f"L-bound {norm} {method} {pixels}": lipschitz, f"omega-bound {norm} {method} {pixels}": omega}
    for sigma, found in target.smoothing.items():
        columns[f"smoothed class, sigma {sigma} (-1: abstains)"] = found["classes"]
        columns[f"certified radius of the smoothed classifier l2, sigma {sigma} {pixels}"] = found["radii"]
    lines = zip(*(np.asarray(values).tolist() for values in columns.values()), strict=True)
    return as_csv(columns, [dict(zip(columns, line, strict=True)) for line in lines])


def summary(target: Target) -> dict[str, Any]:
    """evaluation/summary.json, as the documentation of the run directory has it."""
    norms = {}
    for norm, measured in target.norms.items():
        row = figures_of(target, norm, measured.best)
        names = {"mean_distance": "mean_distance_empirical", "lipschitz_bound_mean": "mean_distance_L_bound"}
        names |= {"omega_bound_mean": "mean_distance_omega_bound", "violations_pct": "false_pct_omega_bound"}
        known = {name: row.get(column) for name, column in (names | {"median_distance": "median_distance"}).items()}
        norms[norm] = {name: None if value == math.inf else value for name, value in known.items()}
        errors = {f"{r:.4g}": row[f"empirical_error_pct_{name}"] for name, r in RADII[norm].items()}
        norms[norm] |= {"bound_method": measured.best, "error_pct": errors, "audit_failed": measured.audit_failed}
    head = {"images": len(target.wrong), "topk": target.topk, "clean_error_pct": 100 * float(target.wrong.mean())}
    return head | {"checkpoint_step": target.step, "network": target.fingerprint, "norms": norms}


def preamble(targets: list[Target], world: World) -> str:
    """What every figure has to be quoted with, and how it is to be read."""
    first, made, names = targets[0], provenance(world), []
    for target in targets:
        step = f", step {target.step} of {target.config.get('steps_total', '?')}" if target.config else ""
        names.append(f"{target.name} ({target.fingerprint}{step})")
    about = {"title": ", ".join(target.name for target in targets), "networks": ", ".join(names), "topk": first.topk}
    about |= {kind: len(first.rows[kind]) for kind in ("evaluation", "calibration")} | {"test": len(first.source)}
    about |= {"size": " x ".join(map(str, first.first["first"]["images"].shape[1:])), "dataset": first.dataset}
    about |= {"device": made["device"].partition(",")[0], "commit": made["commit"], "seed": first.settings.seed}
    return PREAMBLE.format(**about, **made["versions"], notes="\n".join(f"* {line}" for line in notes(targets)))


def notes(targets: list[Target]) -> list[str]:
    """What a reader of the tables has to know beside them, a line each."""
    lines = []
    for target, norm, measured in [(some, *item) for some in targets for item in some.norms.items()]:
        said = [f"no {method} bound: {why}" for method, why in measured.refused.items()]
        if target.network.blind:
            said = ["no gradient reaches the image: attacked by its decisions alone, without bounds"]
        said += [f"the audit FAILS: {'; '.join(measured.audit_failed)}"] * bool(measured.audit_failed)
        lines += [f"{target.name}, {norm}: {line}" for line in said]
    return lines


def write_report(targets: list[Target], path: Path, world: World) -> None:
    """Tables, figures and report.md of one network, or of several beside each other."""
    files, parts = {}, [preamble(targets, world)]
    for table in tables_of(targets):
        files[f"{table.name}.csv"] = as_csv(table.columns, table.rows)
        parts.append(table.markdown)
    figures = {"errors": (error_figure, targets), "bounds": (bounds_figure, targets)}
    if not targets[1:]:
        figures |= {f"adversarial-{norm}": (adversarial_figure, *targets, norm) for norm in targets[0].norms}
    for name, (draw, *given) in figures.items():
        if figure := draw(*given):
            figure.savefig(buffer := io.BytesIO(), format="png", dpi=140, metadata={"Software": None})  # no version
            files[f"{name}.png"] = buffer.getvalue()
            parts.append(f"![{name}]({name}.png)\n\n{draw.__doc__}\n")
    files["report.md"] = "\n".join(parts).encode()
    for old in [old for old in path.iterdir() if re.fullmatch(WRITTEN, old.name) and old.name not in files]:
        old.unlink()  # of an evaluation with other options
    for name, content in files.items():
        replace(path / name, content)


def publish(targets: list[Target], together: Path, world: World) -> None:
    """Write each network's report and, of several, one on all of them; show what was measured on the terminal."""
    for target in targets:
        write_report([target], target.path, world)
        replace(target.path / "images.csv", images_csv(target))
        replace(target.path / "summary.json", json.dumps(summary(target), indent=2, allow_nan=False).encode())
    if len(targets) > 1:
        write_report(targets, together, world)
    world.console.width = max(world.console.width, 0 if world.console.is_terminal else 140)
    for norm in targets[0].norms:
        summary_table(targets, norm).show(world.console)
    for line in [*notes(targets), f"report: {together / 'report.md'}"]:
        world.console.print(line)
