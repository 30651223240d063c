"""Robust for less than a penalty on every image of every step: what each saving costs, paired on seeds and images.

    python benchmarks/cheaper.py digits --seeds 5                       about an hour on one CPU core
    python benchmarks/cheaper.py cifar10 --data-dir DIR --model resnet9-narrow --epochs 6 --lam 1 --seeds 3     hours

Trains one network for each saving and seed (`train.py`'s options, printed below), and measures its error, its error
under PGD (40 steps) and the mean distance of the nearest adversarial image found (`attacks.smallest`).  Each finished
network is a line of OUT/cheaper-DATASET.jsonl: killed and started again it goes on where it was; --only names savings
to go on with, for more seeds of those that matter.  Costs are counted, in plain steps of the whole training (a
penalised one: 7/3, which tests/test_cost.py holds); seconds are this machine's, and noisy.  The table has means over
the seeds and, from three on, the difference from the penalty on everything, with a 95 % t-interval over them; the
picture has every network.
"""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from scipy import stats

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attacks
import data
import runs
import train

# A penalty that begins late was measured with an earlier version that had it: results/cheaper-digits.md.
# length: of the training, the whole being 1.
SAVINGS: dict[str, dict[str, Any]] = {
    "no penalty": {"method": "none"},
    "everything (Algorithm 1)": {},
    "everything (Algorithm 1), h 0.01": {"h": 0.01},
    "half of each batch": {"penalty_share": 0.5},
    "half of each batch, 9/10 of the epochs": {"penalty_share": 0.5, "length": 9 / 10},
    "three eighths of each batch": {"penalty_share": 0.375},
    "three eighths of each batch, h 0.01": {"penalty_share": 0.375, "h": 0.01},
    "everything, 5/8 of the epochs": {"length": 5 / 8},
    "a quarter of each batch": {"penalty_share": 0.25},
    "one step up (7)": {"method": "ascent"},
    "one step up (7), three quarters of each batch": {"method": "ascent", "penalty_share": 0.75},
    "one step up (7), half of each batch": {"method": "ascent", "penalty_share": 0.5},
    "adversarial training, one step": {"method": "at", "norm": "l2", "eps": 0.5, "attack_steps": 1},
}
WHOLE = "everything (Algorithm 1)"
DIVERGED = 3  # train.py's exit code
COLOURS = ["0.3", *(f"C{i}" for i in range(12))]  # of which the last are the first again, in squares


def cost(how: dict[str, Any]) -> float:
    """Of the training, in plain steps of three units, the whole length counting as 1."""
    units = train.PENALISED.get(how.get("method", "fd"), 0) * how.get("penalty_share", 1)
    return how.get("length", 1) * (1 + (units + 2 * how.get("attack_steps", 0)) / 3)


def measure(trainer: train.Trainer, world: runs.World, images: int, budget: int) -> dict[str, Any]:
    """Errors of the whole test set, clean and under PGD, in percent; mean distance of the first `images` of it."""
    test, (norm, radii) = trainer.images.test, (trainer.config[key] for key in ("attack_norm", "attack_radii"))
    few = data.order(len(test), seed=0, epoch=2)[:images]
    shown, labels = data.fetch(test, few, world.device)
    found: dict[str, Any] = {}
    with train.evaluating(trainer.network):
        whole = data.evaluation_batches(test, batch_size=500, device=world.device)
        found["clean"] = train.losses_and_errors(trainer.network, whole, world)[1]
        for eps in radii:
            ball = {"norm": norm, "eps": eps, "steps": 40}
            found[f"eps {eps:.3g}"] = train.losses_and_errors(trainer.network, [(shown, labels)], world, **ball)[1]
        generator = torch.Generator().manual_seed(0)
        nearest = attacks.smallest(trainer.network, shown, labels, norm=norm, budget=budget, generator=generator)
    distances = nearest.distances.double()
    found["distance"] = distances[distances.isfinite()].mean().item()  # 0 where misclassified, as in Table 2
    return found


def table_of(rows: list[dict[str, Any]], about: str) -> list[str]:
    """Lines of Markdown: means over the seeds, and differences from Algorithm 1 with their 95 % t-intervals."""
    quantities = [key for key in rows[0]["found"] if key != "seconds"]
    titles = [f"{key}, % error" if key != "distance" else "mean distance" for key in quantities]
    head = ["training", "plain steps", "seeds", *titles]
    lines = [about, "", f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    by_name = {name: {r["seed"]: r["found"] for r in rows if r["name"] == name and r["found"]} for name in SAVINGS}
    lost = [f"{r['name']}, seed {r['seed']}" for r in rows if r["name"] in SAVINGS and not r["found"]]
    for name, found in by_name.items():
        if not found:
            continue
        cells = [str(len(found))]
        for key in quantities:
            mean = np.mean([f[key] for f in found.values()])
            cell = f"{mean:.3f}" if key == "distance" else f"{mean:.1f}"
            shared = sorted(found.keys() & by_name[WHOLE].keys())
            differences = np.array([found[seed][key] - by_name[WHOLE][seed][key] for seed in shared])
            if name != WHOLE and len(shared) > 2:
                half = stats.t.ppf(0.975, len(shared) - 1) * differences.std(ddof=1) / len(shared) ** 0.5
                digits = 3 if key == "distance" else 1
                low, high = differences.mean() - half, differences.mean() + half
                cell += f" ({low:+.{digits}f} to {high:+.{digits}f})"
            cells.append(cell)
        lines.append(f"| {name} | {cost(SAVINGS[name]):.2f} | " + " | ".join(cells) + " |")
    return [*lines, "", f"Diverged: {'; '.join(lost) or 'none'}."]


def draw(rows: list[dict[str, Any]], file: Path, about: str) -> None:
    """Error under attack, and mean distance, against the cost: small points are networks, large ones means."""
    from matplotlib.figure import Figure

    attacked = [key for key in rows[0]["found"] if key.startswith("eps")][1]
    figure = Figure(figsize=(11, 4.6), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), (attacked, "distance"), strict=True):
        for i, (name, how) in enumerate(SAVINGS.items()):
            values = [row["found"][key] for row in rows if row["name"] == name and row["found"]]
            if values:
                look = {"color": COLOURS[i], "marker": "os"[i > 10]}
                axes.scatter([cost(how)] * len(values), values, s=9, alpha=0.5, **look)
                axes.scatter(cost(how), np.mean(values), s=60, label=name, **look)
        axes.set_xlabel("cost of the training, in plain steps")
        axes.set_ylabel(f"% error under PGD, {key}" if key != "distance" else "mean distance, pixels of range 0 to 1")
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside right center", fontsize=8, frameon=False)
    figure.suptitle(about, fontsize=9)
    figure.savefig(file, dpi=130)


def main(
    dataset: Annotated[str, typer.Argument(help="digits or cifar10")] = "digits",
    data_dir: Annotated[str | None, typer.Option(help="where the images are")] = None,
    seeds: Annotated[int, typer.Option(help="0, 1, ... of the networks", min=1)] = 5,
    model: Annotated[str | None, typer.Option(help="of cifar10's fast recipe")] = None,
    epochs: Annotated[int | None, typer.Option(help="the recipe's, if not given")] = None,
    lam: Annotated[float | None, typer.Option(help="the recipe's, if not given")] = None,
    images: Annotated[int, typer.Option(help="test images that are attacked")] = 200,
    budget: Annotated[int, typer.Option(help="calls an image to find the nearest adversarial one")] = 100,
    only: Annotated[list[str] | None, typer.Option(help="savings to go on with")] = None,
    out: Annotated[Path, typer.Option(help="where the results are kept")] = Path("results"),
    root: Annotated[Path, typer.Option("--runs", help="where the networks are kept")] = Path("runs/cheaper"),
) -> None:
    log = out / f"cheaper-{dataset}.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
    done = {(row["name"], row["seed"]) for row in rows}
    if unknown := {*(only or [])} - SAVINGS.keys():
        raise typer.BadParameter(f"--only {min(unknown)}: choose from {'; '.join(SAVINGS)}")
    shared = {"dataset": dataset, "data_dir": data_dir, "model": model, "epochs": epochs, "lam": lam}
    shared = {key: value for key, value in shared.items() if value is not None}
    shared |= {"recipe": "fast"} if dataset == "cifar10" else {}
    world, loaded = runs.World("cpu" if not torch.cuda.is_available() else None), None
    train.PROBE_IMAGES = 20  # which are looked at after each epoch, and in no table here
    for seed in range(seeds):
        for name, how in SAVINGS.items():
            if (name, seed) in done or (only and name not in only):
                continue
            given = shared | how | {"seed": seed}
            if how.get("method", "fd") not in train.PENALISED:
                given.pop("lam", None)
            if "length" in given:
                full = epochs or train.RECIPES["digits" if dataset == "digits" else "cifar10-fast"].epochs
                if given["length"] * full % 1:
                    continue  # there is no such number of epochs
                given["epochs"] = int(given.pop("length") * full)
            loaded = loaded or data.load(dataset, data_dir)
            called = "-".join([dataset, *(f"{key}{value}" for key, value in how.items()), f"seed{seed}"])
            try:
                trainer = train.begin(given, root=root, images=loaded, world=world, name=called)
                found = measure(trainer, world, images, budget) | {"seconds": round(trainer.seconds, 1)}
            except runs.Failure as failure:
                if failure.code != DIVERGED:
                    raise
                found = {}
            row = {"name": name, "seed": seed, "found": found, "options": how, "commit": runs.git_commit()}
            rows.append(row)
            out.mkdir(parents=True, exist_ok=True)
            with open(log, "a") as file:
                file.write(json.dumps(row) + "\n")
            print(name, seed, {key: round(value, 3) for key, value in found.items()}, flush=True)
    about = f"{dataset}: {images} images attacked, {budget} calls an image, torch {torch.__version__}"
    text = "\n".join(table_of(rows, about))
    (out / f"cheaper-{dataset}.md").write_text(text + "\n")
    draw(rows, out / f"cheaper-{dataset}.png", about)
    print(text)


if __name__ == "__main__":
    typer.run(main)
