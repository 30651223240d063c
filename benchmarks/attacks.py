"""Smallest distances: this suite beside foolbox, torchattacks, ART and adversarial-library, on the same images.

    pip install foolbox torchattacks adversarial-robustness-toolbox adv-lib       # only this script needs them
    python benchmarks/attacks.py                                                  # digits, a few minutes
    python benchmarks/attacks.py --data cifar10 --data-dir cifar --cache cifar_cnn.pt --images 24
    python benchmarks/attacks.py --data imagenet --data-dir imagenet --topk 5 --images 8
    python benchmarks/attacks.py --budgets                                        # no peers: `smallest` at every budget
    python benchmarks/attacks.py --budgets --run results/networks/cifar10-fast-robust --data-dir DIR     # of a run
    python benchmarks/attacks.py --budgets --run lite0.py:build --data imagenet --data-dir DIR --topk 5 --size 128
    python benchmarks/attacks.py --data exact                                     # no peers: against exact distances

--data-dir holds train/<class>/*.jpg and test/<class>/*.jpg of 32x32 images (cifar10) or val/<class>/*.JPEG, shrunk to
32x32 here (imagenet).  The network is trained here (digits: seconds; CIFAR-10: minutes, kept in --cache) with
eq. (8), lam in --lam; that for imagenet has a thousand classes and has seen nothing but the images it is attacked on.
Only images that it classifies correctly are attacked.  Every library's output is clipped to [0, 1], tested again and
measured here; a failure is inf, and a mean over the images that all attacks in the table broke would hide it, so the
table gives success and the mean over the attack's own successes.  A call is one image through a forward or
through a backward pass.

The second table holds each attack against its namesakes, with as many of its steps as take no more calls than they
do (`EFFORTS`), on the images that both broke.  With --topk no peer knows what to do; they get one image at a time, and
a network whose ten classes are the label, and the others by rank from the k-th on (`Ranked`).
"""

import functools
import itertools
import json
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).parent.parent))
import oracle

import attacks
import data as images_of
import gradreg
import models

ORDER = {"l2": 2, "linf": float("inf")}

# Ours, at e times the default effort, as keyword arguments.
EFFORTS = {
    "fab": lambda e, topk: {
        "targets": round(9 * e) if topk == 1 else 0,
        "restarts": round(6 * e),
        "steps": round((80 if topk == 1 else 240) * min(1, 4 * e)),
    },
    "pgd": lambda e, _: {"targets": min(3, 1 + round(e / 2)), "steps": max(2, round(20 * min(e, e**0.5)))},
    "carlini_wagner": lambda e, _: (
        {"steps": round(100 * e)} if e > 0.5 else {"targets": 0, "rounds": 2, "steps": max(2, round(300 * e))}
    ),
    "boundary": lambda e, _: {"calls": round(450 * e)},
}


# Networks --------------------------------------------------------------------------------------------------


def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def network(data: str) -> nn.Sequential:
    if data == "digits":
        return nn.Sequential(*block(1, 32, 1), *block(32, 64, 2), nn.Flatten(), nn.Linear(64 * 16, 10))
    blocks = [*block(3, 32, 2), *block(32, 64, 1), *block(64, 64, 2), *block(64, 128, 2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 1000 if data == "imagenet" else 10))


def load_digits() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from sklearn.datasets import load_digits

    data = load_digits()
    order = torch.randperm(len(data.target), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(data.data / 16, dtype=torch.float32).view(-1, 1, 8, 8)[order]
    labels = torch.tensor(data.target)[order]
    return images[:898], labels[:898], images[898:], labels[898:]


def load_folder(folder: Path, per_class: int) -> tuple[Tensor, Tensor]:
    from PIL import Image

    files = [
        (path, label)
        for label, name in enumerate(sorted(p.name for p in folder.iterdir()))
        for path in sorted([*(folder / name).glob("*.jpg"), *(folder / name).glob("*.JPEG")])[:per_class]
    ]
    images = np.stack([np.asarray(Image.open(path).convert("RGB").resize((32, 32))) for path, _ in files])
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(0))
    images = torch.tensor(images).permute(0, 3, 1, 2).contiguous()
    return images[order].float() / 255, torch.tensor([label for _, label in files])[order]


def train(model: nn.Module, images: Tensor, labels: Tensor, lam: float, epochs: int) -> None:
    steps = epochs * (len(images) // 128)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=5e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps + 2)
    for _ in range(epochs):
        for batch in torch.randperm(len(images))[: len(images) // 128 * 128].split(128):
            loss = lambda x, y=labels[batch]: gradreg.cross_entropy(model(x), y)  # noqa: E731
            optimizer.zero_grad()
            gradreg.fd_penalty(loss, images[batch], norm="l2", h=0.01).objective(lam).backward()
            optimizer.step()
            schedule.step()


def load(data: str, data_dir: Path):
    """Images and labels to attack, and a function that loads those to train on."""
    if data == "digits":
        x, y, images, labels = load_digits()
        return images, labels, lambda: (x, y)
    if data == "imagenet":
        images, labels = load_folder(data_dir / "val", 1)
        return images, labels, lambda: (images, labels)
    return *load_folder(data_dir / "test", 100), lambda: load_folder(data_dir / "train", 5000)


def prepare(data: str, data_dir: Path, cache: Path | None, lam: float, count: int, seed: int = 0, topk: int = 1):
    """The trained network, and the first `count` images, from the seed-th count on, that it classifies correctly."""
    torch.manual_seed(seed)
    model = network(data)
    images, labels, for_training = load(data, data_dir)
    if cache and cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
    else:
        train(model, *for_training(), lam, epochs={"digits": 30, "cifar10": 3, "imagenet": 150}[data])
        if cache:
            torch.save(model.state_dict(), cache)
    model.eval().requires_grad_(False)
    right = attacks.margin(torch.cat([model(part) for part in images.split(500)]), labels, topk) <= 0
    print(f"{data}: top-{topk} error {100 * (~right).double().mean():.1f} % of {len(images)} images")
    return model, images[right][seed * count :][:count], labels[right][seed * count :][:count]


# Peers -----------------------------------------------------------------------------------------------------


def of_run(
    run: str, data: str, data_dir: Path | None, count: int, topk: int, size: int | None
) -> tuple[nn.Module, Tensor, Tensor]:
    """A run's network or a user's, and the first of its test images, in a fixed random order, that it gets right."""
    if models.is_file(run):
        test, classes = images_of.load_test(data, data_dir)
        model = models.from_file(run, classes=len(classes)).eval().requires_grad_(False)
    else:
        model, config = models.load(run), json.loads((Path(run) / "config.json").read_text())
        test, _ = images_of.load_test(config["options"]["dataset"], data_dir, classes=config["class_names"])
    rows = images_of.order(len(test), seed=0, epoch=2)[: 2 * count]
    x, y = images_of.fetch(test.at(size) if size else test, rows, torch.device("cpu"))
    with torch.no_grad():
        right = (attacks.margin(model(x), y, topk) <= 0).nonzero()[:count, 0]
    return model, x[right], y[right]


class Counted(nn.Module):
    """Counts calls: an image through the forward pass, or through a backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls, self.dtype = model, 0, next(model.parameters()).dtype

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        logits = self.model(x.to(self.dtype))  # some libraries hand over float64
        if logits.requires_grad:
            logits.register_hook(self.backward)
        return logits

    def backward(self, grad: Tensor) -> None:
        self.calls += len(grad)


class Ranked(nn.Module):
    """A network for one image, whose classes are its label, and the others by rank: the k-th, to the (k + 8)-th."""

    def __init__(self, model: nn.Module, label: Tensor, topk: int) -> None:
        super().__init__()
        self.model, self.label, self.topk = model, label, topk

    def forward(self, x: Tensor) -> Tensor:
        logits = self.model(x)
        label = self.label.expand(len(x), 1)
        others = logits.scatter(1, label, -torch.inf).topk(min(self.topk + 8, logits.shape[1] - 1), dim=1).values
        return torch.cat([logits.gather(1, label), others[:, self.topk - 1 :]], dim=1)


def adv_lib_peers(norm: str, scale: float) -> dict:
    import adv_lib.attacks as lib
    from adv_lib.attacks.auto_pgd import minimal_apgd

    p = ORDER[norm]
    apgd = partial(minimal_apgd, norm=p, max_eps=8 * scale, loss_function="dlr", binary_search_steps=10, n_iter=50)
    peers = {
        "fab": partial(lib.fab, norm=p, n_iter=50),
        "fab, targeted": partial(lib.fab, norm=p, n_iter=50, targeted_restarts=True),
        "fmn": partial(lib.fmn, norm=p, steps=500),
        "fmn, large step": partial(lib.fmn, norm=p, steps=500, α_init=10.0),
        "pdpgd": partial(lib.pdpgd, norm=p, num_steps=300),
        "apgd, bisection": apgd,
        "apgd, targeted, bisection": partial(apgd, targeted_version=True, num_targets=3),
    }
    if norm == "linf":
        return peers | {"carlini_wagner": partial(lib.carlini_wagner_linf, max_iterations=20)}
    return peers | {
        "ddn": partial(lib.ddn, steps=500, levels=None),
        "alma": partial(lib.alma, num_steps=500, init_lr_distance=scale),
        "pdgd": partial(lib.pdgd, num_steps=300),
        "superdeepfool": lib.sdf,
        "carlini_wagner": partial(lib.carlini_wagner_l2, max_iterations=100, binary_search_steps=6),
    }


def foolbox_peers(norm: str, scale: float) -> dict:
    import foolbox

    lib = foolbox.attacks

    def run(attack, **options):
        def broken(model, images, labels):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
            return attack(wrapped, images, labels, **options)

        return broken

    def minimal(attack):
        return lambda *data: run(attack, epsilons=None)(*data)[1]

    def from_noise(attack):
        """With our starting points, since the library's own search for one gives up on some images."""

        def started(model, images, labels):
            begun = attacks.boundary(model, images, labels, norm=norm, calls=1, generator=seeded())
            return run(attack, epsilons=None, starting_points=begun)(model, images, labels)[1]

        return started

    def grid(attack):
        radii = (scale * np.geomspace(0.25, 4, 16)).tolist()

        def smallest_radius(*data):
            _, found, broken = run(attack, epsilons=radii)(*data)
            first = broken.int().argmax(0)
            return torch.stack([found[k][i] for i, k in enumerate(first.tolist())])

        return smallest_radius

    peers = {
        "boundary": from_noise(lib.BoundaryAttack(steps=1000)),
        "boundary: HopSkipJump": from_noise(
            lib.HopSkipJumpAttack(steps=6, initial_gradient_eval_steps=100, constraint=norm)
        ),
    }
    if norm == "linf":
        return peers | {
            "pgd, 16 radii": grid(lib.LinfPGD(steps=40)),
            "deepfool": minimal(lib.LinfDeepFoolAttack()),
            "brendel_bethge": from_noise(lib.LinfinityBrendelBethgeAttack(steps=50)),
        }
    return peers | {
        "pgd, 16 radii": grid(lib.L2PGD(steps=40)),
        "deepfool": minimal(lib.L2DeepFoolAttack()),
        "ddn": minimal(lib.DDNAttack(steps=200)),
        "carlini_wagner": minimal(lib.L2CarliniWagnerAttack(binary_search_steps=6, steps=100)),
        "brendel_bethge": from_noise(lib.L2BrendelBethgeAttack(steps=50)),
    }


def torchattacks_peers(norm: str, scale: float) -> dict:
    import torchattacks

    def run(build):
        return lambda model, images, labels: build(model)(images, labels)

    if norm == "linf":
        return {"fab": run(lambda m: torchattacks.FAB(m, norm="Linf", eps=8 * scale, steps=50))}
    return {
        "fab": run(lambda m: torchattacks.FAB(m, norm="L2", eps=8 * scale, steps=50)),
        "carlini_wagner": run(lambda m: torchattacks.CW(m, c=1, steps=300)),
    }


def art_peers(norm: str, scale: float) -> dict:
    from art.attacks import evasion
    from art.estimators.classification import PyTorchClassifier

    def run(build):
        def attack(model, images, labels):
            classifier = PyTorchClassifier(
                model, nn.CrossEntropyLoss(), images.shape[1:], 10, clip_values=(0.0, 1.0), device_type="cpu"
            )
            return torch.tensor(build(classifier).generate(images.numpy(), labels.numpy()))

        return attack

    quiet = {"verbose": False}
    jump = {"norm": "inf" if norm == "linf" else 2, "max_iter": 6, "init_eval": 100, **quiet}
    peers = {"boundary: HopSkipJump": run(lambda c: evasion.HopSkipJump(c, **jump))}
    if norm == "linf":
        return peers | {
            "carlini_wagner": run(lambda c: evasion.CarliniLInfMethod(c, max_iter=10, batch_size=128, **quiet))
        }
    return peers | {
        "carlini_wagner": run(
            lambda c: evasion.CarliniL2Method(c, max_iter=20, binary_search_steps=5, batch_size=128, **quiet)
        ),
        "boundary": run(lambda c: evasion.BoundaryAttack(c, targeted=False, max_iter=60, num_trial=5, **quiet)),
    }


LIBRARIES = {
    "adv-lib": adv_lib_peers,
    "foolbox": foolbox_peers,
    "torchattacks": torchattacks_peers,
    "art": art_peers,
}


# Measurement -----------------------------------------------------------------------------------------------


class Measured(NamedTuple):
    """distances (N,), inf where the attack failed; calls an image; seconds."""

    distances: Tensor
    calls: float
    seconds: float


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def measure(attack, model: nn.Module, images: Tensor, labels: Tensor, norm: str, topk: int = 1) -> Measured:
    counted = Counted(model).eval()
    torch.manual_seed(0)
    began = time.perf_counter()
    found = attack(counted, images.clone(), labels.clone()).detach()
    seconds = time.perf_counter() - began
    found = found.to(images).clamp(0, 1)
    wrong = attacks.margin(model(found), labels, topk) > 0
    distances = attacks.distance(images, found, norm)
    return Measured(distances.where(wrong, torch.inf), counted.calls / len(images), seconds)


def one_by_one(attack, topk: int):
    """A peer's attack on top-k: image by image, on the network whose classes are ranks."""

    def run(model, images, labels):
        none = torch.zeros(1, dtype=torch.int64)
        return torch.cat([
            torch.as_tensor(attack(Ranked(model, label, topk).eval(), image[None], none)).detach()
            for image, label in zip(images, labels, strict=True)
        ])  # fmt: skip

    return run if topk > 1 else attack


def mean(distances: Tensor, where: Tensor) -> str:
    return f"{distances[where].mean():.5f}" if where.any() else "-"


def row(library: str, name: str, found: Measured) -> None:
    broken = found.distances.isfinite()
    success = f"{100 * broken.double().mean():.0f} | {found.calls:.0f} | {found.seconds:.1f} |"
    print(f"| {library} | {name} | {mean(found.distances, broken)} | {success}")
    sys.stdout.flush()


def within(name: str, calls: float, run, topk: int) -> Measured:
    """Our attack with the largest effort tried, at most six times its default, that takes no more calls."""
    effort = min(6, 1.2 * calls / run(name).calls)
    for _ in range(20):
        found = run(name, **EFFORTS[name](effort, topk))
        if found.calls <= calls:
            return found
        effort *= 0.85
    raise ValueError(f"{name} cannot be done in {calls:.0f} calls")


def namesakes(theirs: dict, run, topk: int) -> None:
    """Each attack of a peer beside ours of the same name, within as many calls."""
    print("\n| attack | peer | calls: ours, peer | success %: ours, peer | mean distance: ours, peer | ours / peer |")
    print("|---|---|---|---|---|---|")
    for (library, name), peer in theirs.items():
        own = next((own for own in EFFORTS if name.startswith(own)), "pgd" if name.startswith("apgd") else None)
        if own is None:
            continue
        ours = within(own, peer.calls, run, topk)
        both = ours.distances.isfinite() & peer.distances.isfinite()
        ratio = f"{ours.distances[both].mean() / peer.distances[both].mean():.3f}" if both.any() else "-"
        success = ", ".join(f"{100 * found.distances.isfinite().double().mean():.0f}" for found in (ours, peer))
        means = ", ".join(mean(found.distances, both) for found in (ours, peer))
        print(f"| {own} | {library} {name} | {ours.calls:.0f}, {peer.calls:.0f} | {success} | {means} | {ratio} |")
        sys.stdout.flush()


def compare(model: nn.Module, images: Tensor, labels: Tensor, norm: str, topk: int) -> None:
    @functools.cache
    def run(name: str, **options) -> Measured:
        def attack(counted, x, y):
            return getattr(attacks, name)(counted, x, y, norm=norm, topk=topk, generator=seeded(), **options)

        return measure(attack, model, images, labels, norm, topk)

    print(f"\n{norm}, top {topk}, n = {len(images)}\n")
    print("| library | attack | mean distance | success % | calls | s |\n|---|---|---|---|---|---|")
    for name in attacks.SUITE:
        row("ours", name, run(name))
    suite = {}

    def smallest(counted, x, y):
        suite["result"] = attacks.smallest(counted, x, y, norm=norm, topk=topk, generator=seeded())
        return suite["result"].adversarial

    ours = measure(smallest, model, images, labels, norm, topk)
    row("ours", "**smallest**", ours)
    theirs = {}
    for library, peers in LIBRARIES.items():
        try:
            named = peers(norm, ours.distances.median().item())
        except ImportError as error:
            print(f"| {library} | not installed: {error} | | | | |")
            continue
        for name, attack in named.items():
            try:
                found = measure(one_by_one(attack, topk), model, images, labels, norm, topk)
            except Exception as error:  # a peer that cannot run is a row of the table
                print(f"| {library} | {name}: {type(error).__name__} {str(error)[:80]} | | | | |")
                continue
            row(library, name, found)
            theirs[library, name] = found
    if not theirs:
        return
    best = torch.stack([found.distances for found in theirs.values()]).amin(dim=0)
    total, spent = (sum(getattr(found, name) for found in theirs.values()) for name in ("calls", "seconds"))
    row("peers", "**smallest of all**", Measured(best, total, spent))
    ratio = ours.distances / best
    print(
        f"\n{norm}: smallest / smallest of all peers: means {ours.distances.mean() / best.mean():.4f}, "
        f"per image mean {ratio.mean():.4f}, worst {ratio.max():.3f}, best {ratio.min():.3f}; "
        f"calls {ours.calls / total:.3f}, seconds {ours.seconds / spent:.3f}"
    )
    print("found by", {name: suite["result"].attacks.count(name) for name in sorted(set(suite["result"].attacks))})
    namesakes(theirs, run, topk)


def by_budget(model: nn.Module, images: Tensor, labels: Tensor, norm: str, topk: int) -> None:
    """`smallest` at budgets from 30 calls on, relative to the least that it found for an image at any of them."""
    budgets = (30, 100, 200, attacks.CALLS, 400, 1000, 2000, float("inf"))
    how = {"norm": norm, "topk": topk, "check": False}
    found = [attacks.smallest(model, images, labels, budget=b, generator=seeded(), **how) for b in budgets]
    least = torch.stack([one.distances for one in found]).amin(dim=0)
    print(f"\n{norm}, top {topk}, n = {len(images)}\n")
    print("| budget | calls, mean | found / least: mean | worst |\n|---|---|---|---|")
    for budget, one in zip(budgets, found, strict=True):
        ratio = one.distances / least
        print(f"| {budget:g} | {sum(one.calls.values()):.0f} | {ratio.mean():.4f} | {ratio.max():.3f} |", flush=True)


# Exact distances -------------------------------------------------------------------------------------------


def against_closed_forms(count: int, seed: int) -> None:
    """Every attack on linear classifiers, in float64, where the smallest distance is known."""
    print("| norm | classes | dimension | attack | found / exact, mean | worst | calls | s |")
    print("|---|---|---|---|---|---|---|---|")
    calls = {(2, 64): 1000, (10, 64): 16_000, (2, 3072): 12_000, (10, 3072): 40_000}  # of `boundary`
    for norm, (classes, dim) in itertools.product(ORDER, calls):
        generator = torch.Generator().manual_seed(seed)
        model = oracle.linear(generator, classes, dim, torch.float64, grey_ties=True)
        images = 0.3 + 0.4 * torch.rand(count, dim, generator=generator, dtype=torch.float64)
        labels = model(images).argmax(1)
        exact = oracle.closed_form(model, images, labels, norm)
        for name in attacks.SUITE:
            more = {"calls": calls[classes, dim]} if name == "boundary" else {}
            attack = functools.partial(getattr(attacks, name), norm=norm, generator=seeded(), **more)
            found = measure(attack, model, images, labels, norm)
            ratio = found.distances / exact
            figures = f"{ratio.mean():.4f} | {ratio.max():.4f} | {found.calls:.0f} | {found.seconds:.1f}"
            print(f"| {norm} | {classes} | {dim} | {name} | {figures} |", flush=True)


def against_the_oracle(count: int) -> None:
    """`smallest` in linf on networks whose exact distances mixed-integer programs give."""
    print("\n| network | n | found / exact, mean | worst | least | calls |\n|---|---|---|---|---|---|")
    for seed, lam in ((0, 0.0), (1, 1.0), (2, 0.1)):
        model, (images, labels) = oracle.digits_mlp(seed, lam), oracle.digits()
        images, labels = images[898 : 898 + count], labels[898 : 898 + count]
        found = attacks.smallest(model, images, labels, norm="linf", generator=seeded())
        exact = torch.tensor([
            oracle.exact_linf_distance(model, x, int(y), upper=1.05 * float(d) + 1e-3)
            for x, y, d in zip(images, labels, found.distances, strict=True)
        ])  # fmt: skip
        ratio = (found.distances / exact)[exact > 0]
        figures = f"{ratio.mean():.4f} | {ratio.max():.4f} | {ratio.min():.6f} | {sum(found.calls.values()):.0f}"
        print(f"| 64-20-10, lambda {lam:g} | {len(ratio)} | {figures} |", flush=True)


def main(
    data: Annotated[str, typer.Option(help="digits, cifar10, imagenet, or exact (closed forms)")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="holds train/<class>/* and test/<class>/*, or val/<class>/*")] = Path(
        "cifar"
    ),
    cache: Annotated[Path | None, typer.Option(help="where the trained network is kept")] = None,
    lam: Annotated[float, typer.Option(help="weight of the penalty in eq. (8), 0: undefended")] = 0.1,
    images: Annotated[int, typer.Option(help="images attacked")] = 50,
    topk: Annotated[int, typer.Option(help="out of how many likeliest classes an image is to be moved")] = 1,
    seed: Annotated[int, typer.Option(help="of the network, if not in --cache; other images for each")] = 0,
    norms: Annotated[str, typer.Option(help="comma-separated")] = "linf,l2",
    run: Annotated[str | None, typer.Option(help="a run, attacked on its test images; or FILE.py:FACTORY")] = None,
    size: Annotated[int | None, typer.Option(help="pixels a side of the images for FILE.py:FACTORY")] = None,
    budgets: Annotated[bool, typer.Option("--budgets", help="`smallest` alone, at several budgets")] = False,
) -> None:
    """Print one table per norm."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    if data == "exact":
        against_closed_forms(images, seed)
        return against_the_oracle(images)
    if run:
        model, x, y = of_run(run, data, data_dir, images, topk, size)
    else:
        model, x, y = prepare(data, data_dir, cache, lam, images, seed, topk)
    print(f"{run or f'lam {lam}, seed {seed}'}, one thread, torch {torch.__version__}")
    for norm in norms.split(","):
        (by_budget if budgets else compare)(model, x, y, norm, topk)


if __name__ == "__main__":
    typer.run(main)
