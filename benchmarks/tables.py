"""The paper's tables on one data set: every row trained and evaluated, and set beside the paper's.

    python benchmarks/tables.py digits --images 150 --audit-images 10       about an hour on two CPU cores
    python benchmarks/tables.py cifar10 --data-dir DIR --seeds 1            wants a GPU
    python benchmarks/tables.py cifar10 --data-dir DIR --seeds 1 --fast --model resnet9-narrow --epochs 6 \\
        --images 500 --budget 100 --table 1 --table 2 --table 3 --table 4 --table 5 --table 6                hours

Runs `train.py` and then `evaluate.py` once for each row and seed (13 networks a seed for Tables 1, 2, 3 and 6; four
steps h more for Table 4, and for Table 5 one that is trained on noise), with names that are fixed: killed and started
again it goes on where it was, and a row whose evaluation is there is not trained again.  --only names rows to go on
with; the others are left out of the tables until they are there.  It ends with Markdown tables of means over the seeds
(lowest to highest seed in brackets), a slash, and the paper's figure; and Spearman's rank correlation of each column
with the paper's.
On digits, whose images have 64 pixels, adversarial training uses eps 0.03 and 0.1 in the place of 2/255 and 8/255, and
errors at 8/255 and 32/255 stand where the paper has 2/255 and 8/255; the finite difference step is the recipe's 0.1,
and there is no Table 4.  On CIFAR-10 the network is the authors', with their last layers, or with --fast that of the
fast recipe.  Bounds and Table 3's regularity are the paper's, sampled, beside the paper's; a last table has all
estimates of bounds.
"""

import csv
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import typer
from scipy.stats import spearmanr

ROOT = Path(__file__).resolve().parent.parent
AUTHORS = ["--model", "resnext34-authors"]
STEPS = {"0.0001": "1e-4", "0.001": "1e-3", "0.01": "1e-2", "1": "1"}  # of Table 4, beside Table 1's; the paper's names
SIGMA = "0.25"  # of Table 5


class Row(NamedTuple):
    """name: of the run, without data set and seed; paper: what each of the paper's tables that has it calls it."""

    name: str
    paper: dict[int, str]
    options: list[str]


class Column(NamedTuple):
    """A column of evaluate.py's CSV, and its name in results/paper_tables.csv."""

    title: str
    ours: str
    paper: str


def rows_of(dataset: str, recipe: list[str] = AUTHORS) -> list[Row]:
    """The rows of the paper's tables: the l1 penalties are Tables 1's and 4's, the l2 penalties Tables 2's, 3's, 6's.

    recipe: options of `train.py cifar10`.
    """
    small, large = ("0.03", "0.1") if dataset == "digits" else ("2/255", "8/255")
    rows = [Row("none", dict.fromkeys((1, 2, 3, 4, 5, 6), "undefended"), ["--method", "none"])]
    for eps, paper in ((small, "2/255"), (large, "8/255")):
        name, tables = f"at-linf-eps{eps.replace('/', '_')}", (1, 2, 3, 6)
        rows.append(Row(name, dict.fromkeys(tables, f"linf 7-step AT eps={paper}"), ["--method", "at", "--eps", eps]))
    for m in ("2", "8"):
        options = ["--method", "free", "--replays", m, "--eps", large]
        paper = dict.fromkeys((1, 2, 3), f"linf For Free AT m={m}")
        rows.append(Row(f"free-m{m}-eps{large.replace('/', '_')}", paper, options))
    for norm, kind in (("linf", "squared l1"), ("l2", "squared l2")):
        for method, how in (("exact", "DBP"), ("fd", "FD")):
            for lam in ("0.1", "1"):
                large_step = (method, norm, lam) == ("fd", "linf", "1")  # Table 1 has h = 0.1 in this row only
                step = ["--h", "0.1"] if large_step and dataset != "digits" else []
                tables = (1,) if norm == "linf" else (2, 3) if method == "exact" else (2, 3, 6)
                paper = dict.fromkeys(tables, f"{kind} ({how}) lambda={lam}" + " h=0.1" * large_step)
                if dataset != "digits" and (norm, lam) == ("linf", "1"):
                    paper[4] = "finite difference h=0.1" if large_step else "double backpropagation"
                if (method, norm, lam) == ("fd", "l2", "1"):
                    paper[5] = paper[2]
                options = ["--method", method, "--norm", norm, "--lam", lam, *step]
                rows.append(Row(f"{method}-{norm}-lam{lam}", paper, options))
    for h, shown in STEPS.items() if dataset != "digits" else ():
        options = ["--method", "fd", "--norm", "linf", "--lam", "1", "--h", h]
        rows.append(Row(f"fd-linf-lam1-h{h}", {4: f"finite difference h={shown}"}, options))
    rows.append(Row("noise", {5: "Cohen et al. (2019)"}, ["--method", "noise", "--sigma", SIGMA]))
    recipe = [] if dataset == "digits" else recipe
    return [row._replace(options=[*row.options, *shortened(recipe, row)]) for row in rows]


def shortened(recipe: list[str], row: Row) -> list[str]:
    """The recipe; its epochs divided by the replays of For Free, which makes so many steps on each batch."""
    replays = int(row.options[row.options.index("--replays") + 1]) if "--replays" in row.options else 1
    shorter = {i: str(max(1, int(recipe[i]) // replays)) for i, word in enumerate(recipe, 1) if word == "--epochs"}
    return [shorter.get(i, word) for i, word in enumerate(recipe)]


def columns_of(dataset: str, table: int) -> list[Column]:
    clean = Column("clean error %", "clean_error_pct", "clean_error_pct")
    if table == 2:
        kinds = {"L_bound": "L-bound", "omega_bound": "omega-bound", "empirical": "distance found"}
        return [clean, *(Column(f"mean {t}", f"mean_distance_{k}", f"mean_distance_{k}") for k, t in kinds.items())]
    if table == 3:
        norms = [Column(f"{k} gradient norm", f"grad_norm_{k}", f"grad_norm_{k}") for k in ("mean", "max")]
        return norms + [Column(f"omega({r})", f"omega_{r}", f"omega_{r}") for r in ("0.5", "1.0")]
    if table == 5:
        return [Column(f"certified error % at l2 {r}", r, r) for r in ("0.25", "0.5", "0.75", "1.0")]
    if table == 6:
        radii = ("0.25", "0.5", "0.75", "1.0", "1.25", "1.5")
        return [Column(f"error % by the omega-bound, l2 {r}", f"omega_error_pct_{r}", r) for r in radii]
    radii = (
        [("8_255", "2_255"), ("32_255", "8_255")] if dataset == "digits" else [("2_255", "2_255"), ("8_255", "8_255")]
    )
    kinds = {"omega": "error % by the omega-bound", "empirical": "error % found"}
    found = [
        Column(f"{title}, eps {ours.replace('_', '/')}", f"{k}_error_pct_{ours}", f"{k}_error_pct_{paper}")
        for k, title in kinds.items()
        for ours, paper in radii
    ]
    return [clean, *(found if table == 1 else found[2:])]


def run(program: str, *arguments: str | Path) -> None:
    """Run one of our programs; stop where it does."""
    line = [sys.executable, str(ROOT / program), *map(str, arguments)]
    print(f"$ python {program} {' '.join(line[2:])}", flush=True)
    code = subprocess.run(line, check=False).returncode
    if code:
        raise typer.Exit(code)


def read(file: Path) -> dict[str, dict[str, str]]:
    """The rows of a table by run, with the paper's estimate of the bounds, or without bounds where it was refused."""
    found: dict[str, dict[str, str]] = {}
    with open(file, newline="") as lines:
        for row in csv.DictReader(lines):
            estimate = row.get("bound", row.get("estimate"))
            if estimate == "sampled" or (estimate is None and not row["model"].startswith("paper")):
                found[row["model"]] = row
            elif not row["model"].startswith("paper"):
                bare = {name: value for name, value in row.items() if "omega" not in name and "L_bound" not in name}
                found.setdefault(row["model"], bare)
    return found


def file_of(folder: Path, table: int) -> Path:
    """Where an evaluation keeps what a table wants: Table 4's errors stand in Table 1 too, where h is the same."""
    return folder / f"table{1 if table == 4 else table}.csv"


def papers(table: int) -> dict[str, dict[str, float]]:
    """The paper's CIFAR-10 rows, by model and quantity."""
    found: dict[str, dict[str, float]] = {}
    with open(ROOT / "results" / "paper_tables.csv", newline="") as lines:
        for line in csv.DictReader(lines):
            if (line["table"], line["dataset"]) == (str(table), "cifar10"):
                found.setdefault(line["model"], {})[line["quantity"]] = float(line["value"])
    return found


def table_of(dataset: str, prefix: str, number: int, out: Path, seeds: int) -> list[str]:
    """Lines of Markdown: of the rows that are there, means over seeds; rank correlations with the paper's columns."""
    columns, paper, found = columns_of(dataset, number), papers(number), {}
    rows = [row for row in rows_of(dataset) if number in row.paper]
    for row in rows:
        files = [file_of(out / f"{prefix}-{row.name}-seed{seed}", number) for seed in range(seeds)]
        known = [values for file in files if file.exists() for values in read(file).values()]
        if known:
            found[row.name] = known
    rows = [row for row in rows if row.name in found]

    def values(row: Row, column: Column) -> np.ndarray:
        return np.array([cells.get(column.ours) or np.nan for cells in found[row.name]], dtype=float)

    title = f"Table {number} on {prefix}: means over the seeds (lowest to highest) / the paper's"
    lines = [title, "", "| row of the paper | " + " | ".join(c.title for c in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for row in rows:
        cells, printed = [values(row, column) for column in columns], paper[row.paper[number]]
        shown = [f"{v.mean():.3g}" + f" ({v.min():.3g} to {v.max():.3g})" * (len(v) > 1) for v in cells]
        shown = [f"{ours} / {printed[c.paper]:g}" for ours, c in zip(shown, columns, strict=True)]
        lines.append(f"| {row.paper[number]} | " + " | ".join(shown) + " |")
    ranks = []
    for column in columns:
        ours = [values(row, column).mean() for row in rows]
        theirs = [paper[row.paper[number]][column.paper] for row in rows]
        ranks.append(spearmanr(ours, theirs).statistic if len(set(ours)) > 1 else np.nan)
    last = "| *rank correlation with the paper's column* | " + " | ".join(f"{r:.2f}" for r in ranks) + " |"
    return [*lines, last, ""] if len(rows) > 2 else [*lines, ""]


def bounds_table(rows: list[Row], prefix: str, out: Path, seeds: int) -> list[str]:
    """Lines of Markdown: how far and how often false each estimate's omega-bounds are, for rows of Tables 1 and 2."""
    files = [(row, out / f"{prefix}-{row.name}-seed{seed}") for row in rows for seed in range(seeds)]
    known: dict[str, dict[tuple[str, int], dict[str, str]]] = {}
    for row, folder in [(row, folder) for row, folder in files if (folder / "table2.csv").exists()]:
        for table in (1, 2):
            with open(folder / f"table{table}.csv", newline="") as lines:
                for cells in csv.DictReader(lines):
                    if cells.get("bound") and not cells["model"].startswith("paper"):
                        known.setdefault(f"{row.name}, {folder.name[-5:]}", {})[cells["bound"], table] = cells
    names, figures = ("two tangents", "ascent", "sampled"), ("mean bound / distance, l2", "false % l2", "false % linf")
    parts = [f"{name}: {figure}" for name in names for figure in figures]
    lines = [f"| omega-bounds, {prefix} | {' | '.join(parts)} |", "|---" * (len(parts) + 1) + "|"]

    def cell(found: dict[tuple[str, int], dict[str, str]], name: str, what: int) -> float:
        cells = found.get((name, 2 if what < 2 else 1), {})
        values = [float(cells.get(c) or "nan") for c in ("mean_distance_omega_bound", "mean_distance_empirical")]
        return values[0] / values[1] if what == 0 else float(cells.get("false_pct_omega_bound") or "nan")

    table = [[cell(found, name, what) for name in names for what in range(3)] for found in known.values()]
    there = [[v for v in column if v == v] for column in zip(*table, strict=True)]  # without NaN
    means = [sum(values) / len(values) if values else np.nan for values in there]
    for title, values in [*zip(known, table, strict=True), ("*mean*", means)]:
        lines.append(f"| {title} | {' | '.join('' if v != v else f'{v:.2f}' for v in values)} |")
    return [*lines, ""] if known else []


def main(
    dataset: Annotated[str, typer.Argument(help="digits or cifar10.")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="Where the images are.")] = Path("data"),
    seeds: Annotated[int, typer.Option(help="0, 1, ... of the networks.", min=1)] = 3,
    images: Annotated[int, typer.Option(help="Images to evaluate.")] = 1000,
    calibration: Annotated[int, typer.Option(help="Images that calibrate the bounds.")] = 200,
    audit_images: Annotated[int, typer.Option(help="Images for the masking audit.")] = 100,
    blocks: Annotated[int, typer.Option(help="Blocks for the paper's estimate by sampling.")] = 100,
    attack: Annotated[list[str] | None, typer.Option(help="Attacks to use (default: all).")] = None,
    budget: Annotated[int | None, typer.Option(help="Calls that they may spend on an image.")] = None,
    table: Annotated[list[int] | None, typer.Option(help="Of the paper, 1 to 6 (default: 1 and 2).")] = None,
    fast: Annotated[bool, typer.Option("--fast", help="Train cifar10 by the fast recipe.")] = False,
    model: Annotated[str, typer.Option(help="Of the fast recipe.")] = "resnet9",
    epochs: Annotated[int, typer.Option(help="Of the fast recipe.")] = 16,
    only: Annotated[list[str] | None, typer.Option(help="Rows to go on with: none, fd-l2-lam1, ...")] = None,
    runs: Annotated[Path, typer.Option(help="Where the networks are kept.")] = Path("runs"),
    out: Annotated[Path, typer.Option(help="Where the tables are written.")] = Path("evaluations"),
) -> None:
    if dataset not in ("digits", "cifar10"):
        raise typer.BadParameter("choose digits or cifar10, which the paper's rows are for")
    numbers = sorted(set(table or (1, 2)))
    if not set(numbers) <= {1, 2, 3, 4, 5, 6} or (dataset == "digits" and 4 in numbers):
        raise typer.BadParameter("--table: the paper has 1 to 6, of which 4 is not for digits")
    recipe = ["--recipe", "fast", "--model", model, "--epochs", str(epochs)] if fast else AUTHORS
    prefix = f"{dataset}-{model}" if fast else dataset
    rows = [row for row in rows_of(dataset, recipe) if row.paper.keys() & numbers]
    if unknown := {*(only or [])} - {row.name for row in rows}:
        raise typer.BadParameter(f"--only {min(unknown)}: the rows are {', '.join(row.name for row in rows)}")
    how = ["--images", images, "--calibration", calibration, "--audit-images", audit_images, "--blocks", blocks]
    how += [part for name in attack or [] for part in ("--attack", name)] + (["--budget", budget] if budget else [])
    for seed in range(seeds):
        for row in rows:
            name = f"{prefix}-{row.name}-seed{seed}"
            if (only and row.name not in only) or (out / name).exists():
                continue
            where = ["--seed", seed, "--data-dir", data_dir, "--runs", runs, "--name", name]
            run("train.py", dataset, *row.options, *where)
            smoothing = ["--smoothing", SIGMA] if 5 in row.paper.keys() & numbers else []
            run("evaluate.py", runs / name, *how, *smoothing, "--data-dir", data_dir)
            (out / name).mkdir(parents=True)
            for file in (*(runs / name / "evaluation").glob("*.csv"), runs / name / "evaluation" / "report.md"):
                if file.name != "images.csv":
                    shutil.copy(file, out / name)
    lines = [line for number in numbers for line in table_of(dataset, prefix, number, out, seeds)]
    text = "\n".join(lines + bounds_table(rows, prefix, out, seeds))
    (out / f"tables-{prefix}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    typer.run(main)
