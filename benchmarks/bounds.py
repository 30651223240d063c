"""How far the bounds of Section 2 can be trusted: false bounds, tightness and cost, on scikit-learn's digits.

    python benchmarks/bounds.py                     l2, 5 seeds, 3 networks each (about an hour on one core)
    python benchmarks/bounds.py --norm linf --seeds 2
    python benchmarks/bounds.py --cost              only the cost of a bound next to plain inference
    python benchmarks/bounds.py --paper             only what the paper's Table 1 says about its own bounds

Each seed shuffles the images anew: half of them train a network, a quarter calibrates, a quarter is checked.  A
bound is false when it exceeds the distance of an adversarial image that attacks.smallest found.  Tightness is the
mean bound over the mean distance; misclassified images count with 0 in both.

What is drawn is the estimate: all bounds of a network share it, so intervals count networks and not images.  The
sampled estimate has a second draw, of its points: it is repeated `draws` times on each network.
"""

import csv
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import numpy as np
import scipy.stats
import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attacks
import bounds
import gradreg

LAMBDAS = (0.0, 0.1, 1.0)
PAPER = Path(__file__).resolve().parent.parent / "results" / "paper_tables.csv"


def network() -> nn.Sequential:
    """A small convolutional network, so that fifteen of them can be attacked on one core."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(512, 64), nn.ReLU(), nn.Linear(64, 10),
    )  # fmt: skip


def train(images: Tensor, labels: Tensor, *, lam: float, norm: str, seed: int, epochs: int = 40) -> nn.Sequential:
    """Eq. (8) by finite differences, Adam, cosine schedule."""
    torch.manual_seed(seed)
    model, generator = network(), torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        for batch in torch.randperm(len(images), generator=generator).split(64):
            loss_fn = lambda x, y=labels[batch]: gradreg.cross_entropy(model(x), y)  # noqa: E731
            optimizer.zero_grad()
            gradreg.fd_penalty(loss_fn, images[batch], norm=norm, h=0.01).objective(lam).backward()
            optimizer.step()
        schedule.step()
    return model.eval().requires_grad_(False)


def split(seed: int) -> list[tuple[Tensor, Tensor]]:
    """(images, labels) to train on, to calibrate with, to check."""
    digits = load_digits()
    images, labels = torch.tensor(digits.images / 16).float()[:, None], torch.tensor(digits.target)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(100 + seed))
    return [(images[rows], labels[rows]) for rows in order.split([len(order) - 900, 450, 450])]


def sampled(model, images: Tensor, labels: Tensor, *, generator: torch.Generator, **how) -> bounds.Estimate:
    """The paper's estimate, at the default radii; how: norm, loss."""
    eps = bounds.default_radii(model, images, labels, norm=how["norm"])
    return bounds.estimate_by_sampling(
        bounds.sample_maxima(model, images, labels, eps=eps, generator=generator, **how), eps, **how
    )


def claims(model, calibration, check, distances: Tensor, norm: str, seed: int):
    """Every estimator's bounds on the checked images, and the calls it cost per calibration image."""
    generator, forwards = torch.Generator().manual_seed(seed), []
    for name, loss in (("sampling", "probabilities"), ("ascent", "probabilities"), ("ascent", "logits")):
        estimate_by = sampled if name == "sampling" else bounds.estimate_by_ascent
        before = sum(forwards)
        with model.register_forward_hook(lambda *passed: forwards.append(len(passed[2]))):
            estimate = estimate_by(model, *calibration, norm=norm, loss=loss, generator=generator)
        calls = (sum(forwards) - before) / len(distances)
        found = bounds.margins(model, *check, norm=norm, loss=loss)
        yield f"{name}, {loss}, L-bound", bounds.lipschitz_bound(found, estimate), calls
        yield f"{name}, {loss}, omega-bound", bounds.omega_bound(found, estimate), calls
    for loss, rivals, exponent in (
        ("probabilities", 1, 1.5), ("logits", 1, 1.0), ("logits", 1, 1.5), ("logits", 1, 2.0),
        ("logits", 3, 1.0), ("logits", 3, 1.5), ("logits", 3, 2.0), ("logits", 9, 1.5), ("logits", 9, 2.0),
    ):  # fmt: skip
        settings = {"norm": norm, "loss": loss, "rivals": rivals}
        known, found = (bounds.margins(model, *part, **settings) for part in (calibration, check))
        estimate = bounds.estimate_by_calibration(known, distances, exponent=exponent)
        row = f"calibration, {loss}, {rivals} rival{'s' * (rivals > 1)}"
        if (rivals, exponent) == (1, 1.5):
            yield f"{row}, L-bound", bounds.lipschitz_bound(found, estimate), rivals
        yield f"{row}, t eps^{exponent:g}", bounds.omega_bound(found, estimate), rivals
    settings = {"norm": norm, "rivals": 9, "ahead": True}
    known, found = (bounds.margins(model, *part, **settings) for part in (calibration, check))
    estimate = bounds.estimate_by_calibration(known, distances, exponent=2)
    yield "calibration, logits, 9 rivals and the tangent ahead, t eps^2", bounds.omega_bound(found, estimate), 11


def redraws(model, calibration, check, distances: Tensor, norm: str, draws: int) -> list[bounds.Violations]:
    """The sampled omega-bounds of one network, from estimates that differ in their random seed alone."""
    found = bounds.margins(model, *check, norm=norm, loss="probabilities")
    seeds = [torch.Generator().manual_seed(seed) for seed in range(draws)]
    estimates = [sampled(model, *calibration, norm=norm, generator=seed) for seed in seeds]
    return [bounds.violations(bounds.omega_bound(found, estimate), distances) for estimate in estimates]


def spread(found: list[bounds.Violations]) -> str:
    """Median and range of the share of false bounds, in percent: each of `found` is one draw of an estimate."""
    rates = [100 * f.rate for f in found]
    return f"{statistics.median(rates):.1f} ({min(rates):.1f} to {max(rates):.1f})"


def interval(found: list[bounds.Violations]) -> str:
    """Mean share of false bounds in percent, with a 95 % t interval: its unit is the estimate, not the image.

    All the images of one network share one estimate, and are false or true together.  Fewer than five estimates, or
    some that all agree, have no interval.
    """
    rates = np.array([100 * f.rate for f in found])
    if len(rates) < 5 or not rates.std():
        return f"{rates.mean():.2f}"
    low, high = scipy.stats.t.interval(0.95, len(rates) - 1, rates.mean(), scipy.stats.sem(rates))
    return f"{rates.mean():.2f} ({max(0, low):.2f} to {min(100, high):.2f})"


def at_least_false(table: Path = PAPER) -> list[tuple[str, str, float]]:
    """(network, eps, percent) of the paper's Table 1 where its own bounds are false on that share of images at least.

    Of its images, omega % have a bound below eps and empirical % an adversarial image within eps.  Where the second
    is more, the difference at least has both: a bound of eps or more, and an adversarial image within eps.
    """
    cells = {}
    for row in csv.DictReader(table.open()):
        if row["table"] == "1":
            cells[row["dataset"], row["model"], row["quantity"]] = float(row["value"])
    return [
        (model, f"{eps}/255", round(cells[data, model, f"empirical_error_pct_{eps}_255"] - omega, 2))
        for eps in (2, 8)
        for (data, model, quantity), omega in cells.items()
        if quantity == f"omega_error_pct_{eps}_255" and cells[data, model, f"empirical_error_pct_{eps}_255"] > omega
    ]


def measure(norm: str, seeds: int, draws: int) -> None:
    """Both tables, after each seed anew."""
    results: dict[str, dict[float, list]] = {}
    redrawn: dict[float, list] = {lam: [] for lam in LAMBDAS}
    calls = {}
    for seed in range(seeds):
        training, calibration, check = split(seed)
        for lam in LAMBDAS:
            start = time.perf_counter()
            model = train(*training, lam=lam, norm=norm, seed=seed)
            both = [torch.cat(pair) for pair in zip(calibration, check, strict=True)]
            generator = torch.Generator().manual_seed(seed)
            suite = "fab", "pgd", "logbarrier"
            attacked = attacks.smallest(model, *both, norm=norm, attacks=suite, generator=generator)
            distances = attacked.distances
            clean = 100 * float((distances == 0).double().mean())
            for name, bound, cost in claims(model, calibration, check, distances[:450], norm, seed):
                results.setdefault(name, {}).setdefault(lam, []).append(bounds.violations(bound, distances[450:]))
                calls[name] = cost
            redrawn[lam].append(redraws(model, calibration, check, distances[450:], norm, draws))
            spent, attack = time.perf_counter() - start, sum(attacked.calls.values())
            print(
                f"seed {seed} lambda {lam:g}: clean error {clean:.1f} %, mean distance {distances.mean():.3f}, "
                f"{attack:.0f} attack calls per image, false over {draws} draws {spread(redrawn[lam][-1])} %, "
                f"{spent:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
        report(norm, results, calls)
        report_redraws(norm, redrawn, draws)


def report(norm: str, results: dict[str, dict[float, list]], calls: dict[str, float]) -> None:
    header = " | ".join(f"lambda {lam:g}: false %, tightness" for lam in LAMBDAS)
    print(f"\n| {norm} | {header} | false %, over networks (95 %) | tightness | worst | calls |")
    print("|---|" + "---|" * (len(LAMBDAS) + 4))
    for name, by_lam in results.items():
        cells = [
            f"{100 * statistics.mean(f.rate for f in found):.2f}, {statistics.mean(f.tightness for f in found):.2f}"
            for found in by_lam.values()
        ]
        everything = [found for part in by_lam.values() for found in part]
        tightness, worst = statistics.mean(f.tightness for f in everything), max(f.worst for f in everything)
        row = [name, *cells, interval(everything), f"{tightness:.2f}", f"{worst:.2f} x", f"{calls[name]:.0f}"]
        print(f"| {' | '.join(row)} |")


def report_redraws(norm: str, redrawn: dict[float, list], draws: int) -> None:
    print(f"\n| sampled omega-bounds, {norm}, {draws} draws a network | false %: median (range) | tightness: range |")
    print("|---|---|---|")
    for lam, networks in redrawn.items():
        for seed, found in enumerate(networks):
            tight = [f.tightness for f in found]
            print(f"| lambda {lam:g}, network {seed} | {spread(found)} | {min(tight):.2f} to {max(tight):.2f} |")
        print(f"| lambda {lam:g}, all | {spread([f for found in networks for f in found])} | |")
    everything = [f for networks in redrawn.values() for found in networks for f in found]
    print(f"| all | {spread(everything)} | |", flush=True)


def cost(repeats: int = 15) -> None:
    """Medians over interleaved repeats of time relative to plain inference, on the untrained network."""
    images, labels = (torch.cat(column) for column in zip(*split(0), strict=True))
    model = network().eval().requires_grad_(False)
    estimate = bounds.estimate_by_ascent(model, images[:64], labels[:64], norm="l2", steps=1)

    def plain() -> None:
        with torch.no_grad():
            for batch in images.split(512):
                model(batch)

    def bound(rivals: int) -> None:
        bounds.omega_bound(bounds.margins(model, images, labels, norm="l2", rivals=rivals), estimate)

    jobs = {"plain inference": plain, "omega-bound": lambda: bound(1), "omega-bound, 3 rivals": lambda: bound(3)}
    seconds: dict[str, list[float]] = {name: [] for name in jobs}
    for _ in range(repeats):
        for name, job in jobs.items():
            start = time.perf_counter()
            job()
            seconds[name].append(time.perf_counter() - start)
    for name, times in seconds.items():
        ratio = statistics.median(t / p for t, p in zip(times, seconds["plain inference"], strict=True))
        print(f"{name:24s} {len(images) / statistics.median(times):9.0f} images/s   {ratio:.2f} x plain inference")


def main(
    norm: Annotated[str, typer.Option(help="Norm of the attacks: l2 or linf.")] = "l2",
    seeds: Annotated[int, typer.Option(help="Shuffles of the images, with three networks each.")] = 5,
    draws: Annotated[int, typer.Option(help="Draws of the sampled estimate for each network.")] = 20,
    only_cost: Annotated[bool, typer.Option("--cost", help="Only the cost of a bound.")] = False,
    only_paper: Annotated[bool, typer.Option("--paper", help="Only the paper's Table 1.")] = False,
) -> None:
    torch.set_num_threads(1)
    if not only_cost and not only_paper:
        measure(norm, seeds, draws)
    if not only_cost:
        for name, eps, percent in at_least_false():
            print(f"Table 1, {name}, {eps}: at least {percent:.2f} % of the omega-bounds are false")
    if not only_paper:
        cost()


if __name__ == "__main__":
    typer.run(main)
