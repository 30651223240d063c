"""What robustness costs: each evaluated run a line of a table and a point of a picture.

    python benchmarks/frontier.py runs/cifar10-*-seed0 --picture frontier.png
    python benchmarks/frontier.py MORE-RUNS --keep results/frontier-narrow.jsonl --picture results/frontier-narrow.png

Cost is counted in epochs of plain steps (three units of a forward pass; docs/training.md says what the others take); of
a fine-tuned run with that of the run it began from.  Clean errors are of all test images, at the end of training;
distances and errors under attack are of the images that `evaluate.py` attacked, in both norms: upper bounds of the true
distances, lower bounds of the true errors.  Intervals are 95 %: t for means, Clopper-Pearson for errors.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import typer
from scipy import stats

UNITS = {"fd": 4, "exact": 3, "ascent": 2}  # of a penalty, beside the three of a plain step
RADII = (2, 4, 8)  # 255ths, linf
LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
COLOURS = {"none": "0.3", "fd": "#0072b2", "exact": "#009e73", "ascent": "#56b4e9", "at": "#d55e00", "free": "#cc79a7"}


class Point(NamedTuple):
    """A run: its name and method, plain epochs, clean error %, distances of its images by norm."""

    name: str
    method: str
    cost: float
    clean: float
    distances: dict[str, np.ndarray]


def config_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "config.json").read_text())


def cost_of(run: Path) -> float:
    """In epochs of plain steps."""
    config = config_of(run)
    options, batch = config["options"], config["options"]["batch_size"]
    extra = UNITS.get(options["method"], 0) * options.get("penalty_share", 1.0)
    extra += 2 * options["attack_steps"] if options["method"] == "at" else 0
    before = cost_of(Path(options["init"])) if options.get("init") and Path(options["init"]).is_dir() else 0.0
    return before + (1 + extra / 3) * config["steps_total"] * batch / config["images_train"]


def read(run: Path) -> Point:
    """A run that has been evaluated in both norms."""
    if not (run / "evaluation" / "images.csv").exists():
        raise typer.BadParameter(f"{run}: not evaluated yet, or no run: python evaluate.py {run}")
    records = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clean = [record["clean_error_pct"] for record in records if record["kind"] == "epoch"][-1]
    with open(run / "evaluation" / "images.csv", newline="") as file:
        images = list(csv.DictReader(file))
    distances = {
        norm: np.array([float(row[f"distance {norm} (pixels 0 to 1)"]) for row in images]) for norm in ("l2", "linf")
    }
    return Point(run.name, config_of(run)["options"]["method"], cost_of(run), clean, distances)


def kept(path: Path) -> list[Point]:
    """The points of a file, each a line of JSON; none where there is no file."""
    found = [Point(*json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []
    return [p._replace(distances={norm: np.array(d) for norm, d in p.distances.items()}) for p in found]


def share(hit: np.ndarray) -> tuple[float, float, float]:
    """Percent, and both ends of its interval."""
    interval = stats.binomtest(int(hit.sum()), len(hit)).proportion_ci(0.95, "exact")
    return 100 * hit.mean(), 100 * interval.low, 100 * interval.high


def mean(values: np.ndarray) -> tuple[float, float, float]:
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / len(values) ** 0.5
    return values.mean(), values.mean() - half, values.mean() + half


def line(point: Point) -> str:
    """A row of the table."""
    cells = [point.name, f"{point.cost:.1f}", f"{point.clean:.2f}"]
    cells.append("{:.3f} ({:.3f} to {:.3f})".format(*mean(point.distances["l2"])))
    cells += ["{:.0f} ({:.0f} to {:.0f})".format(*share(point.distances["linf"] <= r / 255)) for r in RADII]
    return f"| {' | '.join(cells)} |"


def draw(points: list[Point], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 6), layout="constrained")
    same = [[p.cost for p in points[:i]].count(point.cost) for i, point in enumerate(points)]  # cost: side by side
    count = [[p.cost for p in points].count(point.cost) for point in points]
    costs = [p.cost * 1.035 ** (k - (n - 1) / 2) for p, k, n in zip(points, same, count, strict=True)]
    measured = (
        (axes[0], "error at linf 4/255, %", lambda p: share(p.distances["linf"] <= 4 / 255)),
        (axes[1], "mean l2 distance", lambda p: mean(p.distances["l2"])),
    )
    for axis, title, of in measured:
        for letter, point, cost in zip(LETTERS, points, costs, strict=False):
            value, low, high = of(point)
            how = {"fmt": "o", "color": COLOURS.get(point.method, "0.5"), "elinewidth": 0.8, "markersize": 5}
            how |= {"markerfacecolor": "white"} if "h 0.01" in point.name else {}
            shown = axis.errorbar(cost, value, [[value - low], [high - value]], **how)
            shown.set_label(f"{letter}  {point.name}: {point.clean:.0f} %")
            axis.annotate(letter, (cost, value), xytext=(4, 3), textcoords="offset points", fontsize=9)
        axis.set(xscale="log", xlabel="cost of training, plain epochs (the same cost: side by side)", ylabel=title)
        axis.set_xticks([5, 10, 20, 40, 80], labels=["5", "10", "20", "40", "80"])
        axis.minorticks_off()
        axis.set_xlim(0.8 * min(p.cost for p in points), 1.3 * max(p.cost for p in points))
        axis.grid(alpha=0.3)
    how = {"loc": "outside lower center", "ncols": 3, "title": "clean error", "fontsize": 8, "frameon": False}
    figure.legend(*axes[0].get_legend_handles_labels(), **how)
    figure.savefig(path, dpi=110)


def main(
    runs: Annotated[list[Path] | None, typer.Argument(help="Evaluated runs.")] = None,
    picture: Annotated[Path | None, typer.Option(help="Where to draw.")] = None,
    keep: Annotated[Path | None, typer.Option(help="A file of such points: they join, and all are kept there.")] = None,
    without: Annotated[str, typer.Option(help="Names with this in them are left out of the picture.")] = "",
    strip: Annotated[str, typer.Option(help="What all names share, and no table needs.")] = "",
) -> None:
    points = [read(run) for run in runs or ()]
    points = [point._replace(name=point.name.replace(strip, "").removesuffix("-seed0")) for point in points]
    if keep:
        points += [point for point in kept(keep) if point.name not in {known.name for known in points}]
        lines = [json.dumps(p._replace(distances={n: d.tolist() for n, d in p.distances.items()})) for p in points]
        keep.write_text("\n".join(lines) + "\n")
    points.sort(key=lambda point: point.cost)
    images = {len(d) for point in points for d in point.distances.values()}
    errors = " | ".join(f"error % at {r}/255" for r in RADII)
    print(f"images attacked: {', '.join(map(str, sorted(images)))}\n")
    print(f"| network | plain epochs | clean error % | mean l2 distance | {errors} |", "|---" * 7 + "|", sep="\n")
    print(*map(line, points), sep="\n")
    if picture:
        draw([point for point in points if not without or without not in point.name], picture)


if __name__ == "__main__":
    sys.exit(typer.run(main))
