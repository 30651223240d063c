"""How far the bounds of Section 2 can be trusted: false bounds, tightness and cost, on scikit-learn's digits.

    python benchmarks/bounds.py                     l2, 5 seeds, 3 networks each (about 20 minutes on one core)
    python benchmarks/bounds.py --norm linf --seeds 2
    python benchmarks/bounds.py --cost              only the cost of a bound next to plain inference

Each seed shuffles the images anew: half of them train a network, a quarter calibrates, a quarter is checked.  A
bound is false when it exceeds the distance of an adversarial image that attacks.smallest found.  Tightness is the
mean bound over the mean distance; misclassified images count with 0 in both.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

import torch
import typer
from sklearn.datasets import load_digits
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import attacks
import bounds
import gradreg

LAMBDAS = (0.0, 0.1, 1.0)


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


def claims(model, calibration, check, distances: Tensor, norm: str, seed: int):
    """Every estimator's bounds on the checked images, and the calls it cost per calibration image."""
    generator = torch.Generator().manual_seed(seed)
    for name, loss in (("sampling", "probabilities"), ("ascent", "probabilities"), ("ascent", "logits")):
        estimate_by = bounds.estimate_by_sampling if name == "sampling" else bounds.estimate_by_ascent
        estimate = estimate_by(model, *calibration, norm=norm, loss=loss, generator=generator)
        found = bounds.margins(model, *check, norm=norm, loss=loss)
        calls = estimate.calls / len(distances)
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


def measure(norm: str, seeds: int) -> None:
    results: dict[str, dict[float, list]] = {}
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
            spent, attack = time.perf_counter() - start, sum(attacked.calls.values())
            print(
                f"seed {seed} lambda {lam:g}: clean error {clean:.1f} %, mean distance {distances.mean():.3f}, "
                f"{attack:.0f} attack calls per image, {spent:.0f} s", file=sys.stderr, flush=True,
            )  # fmt: skip
    header = " | ".join(f"lambda {lam:g}: false %, tightness, worst" for lam in LAMBDAS)
    print(f"| {norm} | {header} | false % (95 %) | tightness | calls |\n|---|" + "---|" * (len(LAMBDAS) + 3))
    for name, by_lam in results.items():
        cells = [summary(found) for found in by_lam.values()]
        everything = [found for part in by_lam.values() for found in part]
        count, n = (sum(getattr(f, field) for f in everything) for field in ("count", "images"))
        interval = bounds.scipy.stats.binomtest(count, n).proportion_ci(0.95, "exact")
        total = f"{100 * count / n:.2f} ({100 * interval.low:.2f} to {100 * interval.high:.2f})"
        tightness = statistics.mean(f.tightness for f in everything)
        print(f"| {name} | {' | '.join(cells)} | {total} | {tightness:.3f} | {calls[name]:.0f} |")


def summary(found: list[bounds.Violations]) -> str:
    rate = 100 * sum(f.count for f in found) / sum(f.images for f in found)
    return f"{rate:.2f}, {statistics.mean(f.tightness for f in found):.3f}, {max(f.worst for f in found):.2f}"


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
    only_cost: Annotated[bool, typer.Option("--cost", help="Only the cost of a bound.")] = False,
) -> None:
    torch.set_num_threads(1)
    if not only_cost:
        measure(norm, seeds)
    cost()


if __name__ == "__main__":
    typer.run(main)
