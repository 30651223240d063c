"""`smallest` and its peers under an outside judge: AttackBench (Cinà et al., AAAI 2025), which counts every query.

In an environment of its own, on top of this project's (both libraries import packages of which nothing is needed here):

    pip install --no-deps attackbenchlib==2.0.2 adv-lib==0.2.8 foolbox==3.3.4 torchattacks==3.5.1 \
        adversarial-robustness-toolbox==1.20.1 cleverhans eagerpy tqdm requests gitpython six absl-py easydict
    python benchmarks/attackbench.py runs/digits-fd-l2-lam1-seed0
    python benchmarks/attackbench.py runs/cifar --data-dir cifar --images 16 --budgets 1000,200,50
    python benchmarks/attackbench.py --picture docs/attack-frontier.png          # of all that is in --out

For each norm and budget (queries an image: a forward or a backward pass, beyond which AttackBench answers no more):

    optimality   area under the curve of robust accuracy, relative to the best of all attacks and budgets: 1 is the best
    ratio        mean over images of distance / the least that any attack found for it at any budget (inf: one failed)

Peers run as AttackBench configures them, with as many steps as the budget allows where that is an option of theirs.
Only images that the network classifies correctly are attacked.  Results are kept in --out and not measured again.
"""

import contextlib
import copy
import functools
import io
import json
import sys
import warnings
from pathlib import Path
from typing import Annotated, NamedTuple
from unittest.mock import MagicMock

import numpy as np
import torch
import typer
from torch.utils.data import DataLoader, TensorDataset

sys.path.pop(0)  # this folder, in which `attackbench` is this file
sys.path.insert(0, str(Path(__file__).parent.parent))
import attacks
import data
import models
import runs

# Library, attack, and the calls of each of its steps; 0: its number of steps is no option, or it ends by itself.
PEERS = {
    "l2": (
        ("adv_lib", "fmn", 2),
        ("adv_lib", "ddn_NQ", 2),
        ("foolbox", "ddn", 2),
        ("adv_lib", "alma", 2),
        ("adv_lib", "pdgd", 2),
        ("original", "superdeepfool", 0),
        ("torchattacks", "deepfool", 0),
    ),
    "linf": (
        ("adv_lib", "fmn", 2),
        ("foolbox", "fmn", 2),
        ("adv_lib", "pdpgd", 2),
        ("adv_lib", "fab", 0),
        ("adv_lib", "tr", 0),
        ("adv_lib", "apgd_minimal", 0),
        ("foolbox", "deepfool", 0),
    ),
}


class Result(NamedTuple):
    """One attack under one budget: distances, inf where it failed; queries an image."""

    distances: list[float]
    queries: float


def ours(norm: str, budget: int):
    def smallest(model, inputs, labels):
        generator = torch.Generator().manual_seed(0)
        how = {"norm": norm, "budget": budget, "check": False, "generator": generator}
        return attacks.smallest(model.eval(), inputs, labels, **how).adversarial

    return smallest


def peer(library: str, name: str, norm: str, budget: int, step: int):
    from attackbench.attacks import registry

    steps = {"num_steps": max(1, budget // step)} if step else {}
    return registry.get_attack(library, name, norm, **steps)


def load(run: Path, data_dir: Path | None, count: int):
    """The network of a run, and the first `count` test images, in a random order, that it classifies correctly."""
    network = models.load(run).requires_grad_(False)
    dataset = runs.read_checkpoint(run / "checkpoint.pt")["config"]["options"]["dataset"]
    source, _ = data.load_test(dataset, data_dir)
    rows = np.random.default_rng(0).permutation(len(source))[: 3 * count]
    images, labels, *_ = data.fetch(source, rows, torch.device("cpu"))
    right = (attacks.margin(network(images), labels) <= 0).nonzero()[:count, 0]
    return network, images[right], labels[right]


def measure(network, images, labels, norm: str, budget: int, attack) -> Result:
    import attackbench

    loader = DataLoader(TensorDataset(images, labels), batch_size=len(images))
    torch.manual_seed(0)
    with contextlib.redirect_stderr(io.StringIO()):  # its progress bar and warnings
        how = {"device": torch.device("cpu"), "query_budget": budget, "debug": True}  # debug: a failure is an error
        raw = attackbench.run_attack(copy.deepcopy(network), loader, attack, norm, **how)
    queries = np.add(raw["num_forwards"], raw["num_backwards"]).mean()
    return Result(raw["distances"][norm], float(queries))


def read(path: Path) -> dict:
    return json.loads(path.read_text()) if path.exists() else {}


def ratios(results: dict) -> dict[tuple[str, int], tuple[float, float, float]]:
    """(attack, budget) -> mean and worst of distance / least known, queries; of one network and norm."""
    least = np.min([one["distances"] for one in results.values()], axis=0)
    table = {}
    for key, one in results.items():
        name, _, budget = key.rpartition(" ")
        found = np.array(one["distances"]) / least
        table[name, int(budget)] = found.mean(), found.max(), one["queries"]
    return table


def tables(title: str, norm: str, results: dict) -> None:
    from attackbench.metrics.distances import eval_optimality

    least = np.min([one["distances"] for one in results.values()], axis=0)
    table, budgets = ratios(results), sorted({int(key.rpartition(" ")[2]) for key in results}, reverse=True)
    print(f"\n### {title}, {norm}, n = {len(least)}: optimality; mean ratio (queries)\n")
    print(
        "| attack | " + " | ".join(f"at most {budget}" for budget in budgets) + " |\n|---" + "|---" * len(budgets) + "|"
    )
    names = sorted({name for name, _ in table}, key=lambda name: (name != "ours", name))
    for name in names:
        cells = []
        for budget in budgets:
            if (name, budget) not in table:
                cells.append("-")
                continue
            optimality = eval_optimality(results[f"{name} {budget}"]["distances"], least, clean_acc=1.0)
            mean, _, queries = table[name, budget]
            cells.append(f"{optimality:.3f}; {mean:.3f} ({queries:.0f})")
        print(f"| {name} | " + " | ".join(cells) + " |", flush=True)


def draw(path: Path, out: Path) -> None:
    """Mean ratio - 1 against queries, ours and the peers', a panel for each file of results."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = sorted(out.glob("*.json"))
    figure, axes = plt.subplots(1, len(files), figsize=(5 * len(files), 4), squeeze=False, layout="constrained")
    for axis, file in zip(axes[0], files, strict=True):
        table = ratios(read(file))
        for name in sorted({name for name, _ in table}, key=lambda name: (name == "ours", name)):
            points = sorted((queries, mean - 1) for (n, _), (mean, _, queries) in table.items() if n == name)
            points = [(q, max(m, 1e-4)) for q, m in points if np.isfinite(m)]
            if points:
                style = {"color": "black", "linewidth": 2.5} if name == "ours" else {"linewidth": 1, "alpha": 0.8}
                axis.plot(*zip(*points, strict=True), marker="o", markersize=3, label=name, **style)
        axis.set(xscale="log", yscale="log", xlabel="queries an image", title=file.stem, ylim=(1e-4, 2))
        axis.grid(alpha=0.3)
        axis.legend(fontsize=6)
    axes[0][0].set_ylabel("mean excess over the nearest known")
    figure.savefig(path, dpi=110)


def main(
    run: Annotated[Path | None, typer.Argument(help="run directory of the network")] = None,
    data_dir: Annotated[Path | None, typer.Option(help="where its images are")] = None,
    images: Annotated[int, typer.Option(help="images attacked")] = 30,
    budgets: Annotated[str, typer.Option(help="queries an image, comma-separated")] = "2000,1000,200,100,50",
    norms: Annotated[str, typer.Option(help="comma-separated")] = "l2,linf",
    out: Annotated[Path, typer.Option(help="where the results are kept")] = Path("attackbench"),
    picture: Annotated[Path | None, typer.Option(help="draw all that is in --out, and measure nothing")] = None,
) -> None:
    """Print one table for each norm."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if picture or run is None:
        return draw(picture or Path("attack-frontier.png"), out)
    for name in ("wandb", "visdom"):  # imported by attackbenchlib and by adv-lib; nothing of them is used here
        sys.modules.setdefault(name, MagicMock())
    out.mkdir(exist_ok=True)
    network, x, y = load(run, data_dir, images)
    for norm in norms.split(","):
        file = out / f"{run.name} {norm}.json"
        results = read(file)
        for budget in sorted(map(int, budgets.split(","))):
            wanted = {"ours": functools.partial(ours, norm, budget)}
            for library, name, step in PEERS[norm]:
                wanted[f"{library} {name}"] = functools.partial(peer, library, name, norm, budget, step)
            for name, make in wanted.items():
                if f"{name} {budget}" in results:
                    continue
                try:
                    found = measure(network, x, y, norm, budget, make())
                except Exception as error:  # a peer that cannot run is missing from the table
                    print(f"{name}: {type(error).__name__} {str(error)[:100]}", flush=True)
                    continue
                results[f"{name} {budget}"] = found._asdict()
                file.write_text(json.dumps(results))
        tables(run.name, norm, results)


if __name__ == "__main__":
    typer.run(main)
