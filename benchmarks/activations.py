"""Smooth activations: does the penalty do better with GELU, SiLU or CELU than with ReLU, and how far is it from
adversarial training at the same cost?  Rodríguez-Muñoz, Wang and Torralba (ECCV 2024) say so of ImageNet.

    python benchmarks/activations.py --activation relu --activation gelu --activation silu    digits, an hour of a core
    python benchmarks/activations.py --seeds 1 --images 100                                   a quicker look, CELU too

Every network gets the same number of operations, counted in units of a forward pass (a plain step has 3, see
docs/training.md), by its number of epochs: 40 of Algorithm 1.  One weight a penalty and one radius for adversarial
training, the larger of those that were tried on seed 0 (results/activations.md).  Killed and started again it goes on
where it was.  It ends with a table in Markdown.
"""

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer
from rich.progress import track

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import attacks  # noqa: E402
import data  # noqa: E402
import models  # noqa: E402
import runs  # noqa: E402
import train  # noqa: E402

BUDGET = 40 * 7  # epochs times units of a step
UNITS = {"none": 3, "exact": 6, "fd": 7, "at": 3 + 2 * 7}
WEIGHT, RADII = "3", {"l2": "0.5", "linf": "0.1"}
MEASURED = "activations-{}.json"  # in a run: what is known of so many images
REPORTED = {norm: float(radius) for norm, radius in RADII.items()}  # of the errors in the table


class Row(NamedTuple):
    """How a network is trained; strength: the weight of a penalty, or the radius of adversarial training."""

    activation: str
    method: str
    norm: str
    strength: str

    def options(self, seed: int) -> list[str]:
        """Of train.py."""
        own = {"none": [], "at": ["--eps", self.strength]}.get(self.method, ["--lam", self.strength])
        epochs = round(BUDGET / UNITS[self.method])
        how = ["--method", self.method, "--norm", self.norm, *own, "--epochs", epochs, "--seed", seed]
        return [str(part) for part in ("digits", "--activation", self.activation, *how)]

    def name(self, seed: int) -> str:
        return "-".join((self.activation, self.method, self.norm, self.strength, f"seed{seed}"))


def rows(activations: list[str]) -> list[Row]:
    """Those of one activation lie together."""
    found = []
    for activation in activations:
        found.append(Row(activation, "none", "l2", "0"))
        for norm, radius in RADII.items():
            found += [Row(activation, method, norm, WEIGHT) for method in ("fd", "exact")]
            found.append(Row(activation, "at", norm, radius))
    return found


def trained(row: Row, seed: int, root: Path, images: int) -> Path:
    """The run of a network, begun or gone on with unless it is measured already."""
    if (root / row.name(seed) / MEASURED.format(images)).exists():
        return root / row.name(seed)
    arguments = [*row.options(seed), "--runs", str(root), "--name", row.name(seed)]
    sys.argv, said = ["train.py", *arguments], io.StringIO()
    with contextlib.redirect_stdout(said):
        code = runs.run_command(train.main)
    if code not in (0, 3):  # 3: it diverged, which is a result
        raise typer.Exit(code)
    return root / row.name(seed)


def measure(path: Path, images: int) -> dict[str, Any]:
    """Clean error of all test images, distances of the first ones; kept in the run, and read from there."""
    file = path / MEASURED.format(images)
    if file.exists():
        return json.loads(file.read_text())
    status = json.loads((path / "status.json").read_text())
    found: dict[str, Any] = {"state": status["state"], "step": status["step"]}
    state = models.read_checkpoint(path / "checkpoint.pt")
    network, test = models.load(path), data.load("digits").test
    pixels, labels = test.images / test.top, test.labels
    with torch.no_grad():
        found["clean_error_pct"] = 100 * (network(pixels).argmax(1) != labels).double().mean().item()
    for norm in REPORTED:
        how = {"norm": norm, "attacks": ("fab",), "generator": torch.Generator().manual_seed(0)}
        found[norm] = attacks.smallest(network, pixels[:images], labels[:images], **how).distances.tolist()
    found |= {"seconds": state["seconds"], "commit": state["config"]["commit"]}
    runs.replace(file, json.dumps(found).encode())
    return found


def shown(values: list[float], digits: str) -> str:
    """Mean over the seeds, lowest and highest."""
    return f"{np.mean(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"


def line(row: Row, found: list[dict[str, Any]]) -> str:
    """A row of the table."""
    cells = [row.activation, row.method, *((row.norm, row.strength) if row.method != "none" else ("", ""))]
    cells.append(shown([seed["clean_error_pct"] for seed in found], ".1f"))
    for norm, radius in REPORTED.items():
        distances = [np.array(seed[norm]) for seed in found]
        cells.append(shown([d[np.isfinite(d)].mean() for d in distances], ".3f"))
        cells.append(shown([100 * (d <= radius).mean() for d in distances], ".1f"))
    lost = sum(seed["state"] != "finished" for seed in found)
    cells.append(shown([seed["seconds"] for seed in found], ".0f") + f", {lost} diverged" * bool(lost))
    return f"| {' | '.join(cells)} |"


def main(
    seeds: Annotated[int, typer.Option(help="0, 1, ... of the networks.", min=1)] = 3,
    images: Annotated[int, typer.Option(help="Test images that are attacked.", min=1)] = 150,
    activation: Annotated[list[str] | None, typer.Option(help="Of the networks (default: all).")] = None,
    root: Annotated[Path, typer.Option("--runs", help="Where the networks are kept.")] = Path("runs/activations"),
) -> None:
    torch.set_num_threads(1)
    train.PROBE_IMAGES = 20  # which are looked at after each epoch, and in no table here
    found: dict[Row, list[dict[str, Any]]] = {row: [] for row in rows(activation or list(models.ACTIVATIONS))}
    for row, seed in track(
        [(row, seed) for seed in range(seeds) for row in found], "training", disable=not sys.stdout.isatty()
    ):
        found[row].append(measure(trained(row, seed, root, images), images))
    columns = "| activation | method | norm | weight or radius | clean error % "
    columns += "".join(f"| mean {n} distance | error % at {n} {r:g} " for n, r in REPORTED.items()) + "| seconds |"
    print(columns, "|---" * (columns.count("|") - 1) + "|", *(line(row, each) for row, each in found.items()), sep="\n")


if __name__ == "__main__":
    typer.run(main)
