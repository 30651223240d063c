"""Smallest distances: this suite beside foolbox, torchattacks, ART and adversarial-library, on the same images.

    pip install foolbox torchattacks adversarial-robustness-toolbox adv-lib       # only this script needs them
    python benchmarks/attacks.py                                                  # digits, a few minutes
    python benchmarks/attacks.py --data cifar10 --data-dir cifar --cache cifar_cnn.pt

--data-dir holds train/<class>/*.jpg and test/<class>/*.jpg of 32x32 images.  The network is trained here (digits:
seconds; CIFAR-10: minutes, kept in --cache) with eq. (8), lam in --lam.  Only images that it classifies correctly
are attacked.  Every library's output is clipped to [0, 1], tested again and measured here; a failure is inf, and a
mean over the images that all attacks in the table broke would hide it, so the table gives success and the mean
over the attack's own successes.  A call is one image through a forward or through a backward pass.
"""

import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))
import attacks
import gradreg

ORDER = {"l2": 2, "linf": float("inf")}


# Networks --------------------------------------------------------------------------------------------------


def block(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU()]


def network(data: str) -> nn.Sequential:
    if data == "digits":
        return nn.Sequential(*block(1, 32, 1), *block(32, 64, 2), nn.Flatten(), nn.Linear(64 * 16, 10))
    blocks = [*block(3, 32, 2), *block(32, 64, 1), *block(64, 64, 2), *block(64, 128, 2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(128 * 16, 10))


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
        for path in sorted((folder / name).glob("*.jpg"))[:per_class]
    ]
    images = np.stack([np.asarray(Image.open(path).convert("RGB")) for path, _ in files])
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


def prepare(data: str, data_dir: Path, cache: Path | None, lam: float, count: int):
    """The trained network, and the first `count` test images that it classifies correctly."""
    torch.manual_seed(0)
    model = network(data)
    if data == "digits":
        x, y, images, labels = load_digits()
    else:
        images, labels = load_folder(data_dir / "test", 100)
    if cache and cache.exists():
        model.load_state_dict(torch.load(cache, weights_only=True))
    else:
        if data != "digits":
            x, y = load_folder(data_dir / "train", 5000)
        train(model, x, y, lam, epochs=30 if data == "digits" else 3)
        if cache:
            torch.save(model.state_dict(), cache)
    model.eval().requires_grad_(False)
    right = torch.cat([model(part).argmax(1) for part in images.split(500)]) == labels
    print(f"{data}: test error {100 * (~right).double().mean():.1f} % of {len(images)} images")
    return model, images[right][:count], labels[right][:count]


# Peers -----------------------------------------------------------------------------------------------------


class Counted(nn.Module):
    """Counts calls: an image through the forward pass, or through a backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.calls = model, 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += len(x)
        logits = self.model(x.float())  # some libraries hand over float64
        if logits.requires_grad:
            logits.register_hook(self.backward)
        return logits

    def backward(self, grad: Tensor) -> None:
        self.calls += len(grad)


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

    def minimal(attack):
        def run(model, images, labels):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
            return attack(wrapped, images, labels, epsilons=None)[1]

        return run

    def grid(attack):
        def run(model, images, labels):
            wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=images.device)
            radii = (scale * np.geomspace(0.25, 4, 16)).tolist()
            _, found, broken = attack(wrapped, images, labels, epsilons=radii)
            first = broken.int().argmax(0)
            return torch.stack([found[k][i] for i, k in enumerate(first.tolist())])

        return run

    lib = foolbox.attacks
    start = lib.LinearSearchBlendedUniformNoiseAttack(steps=50)
    peers = {"boundary": minimal(lib.BoundaryAttack(steps=1000, init_attack=start))}
    if norm == "linf":
        return peers | {
            "pgd, 16 radii": grid(lib.LinfPGD(steps=40)),
            "deepfool": minimal(lib.LinfDeepFoolAttack()),
            "brendel_bethge": minimal(lib.LinfinityBrendelBethgeAttack(init_attack=start, steps=50)),
        }
    return peers | {
        "pgd, 16 radii": grid(lib.L2PGD(steps=40)),
        "deepfool": minimal(lib.L2DeepFoolAttack()),
        "ddn": minimal(lib.DDNAttack(steps=200)),
        "carlini_wagner": minimal(lib.L2CarliniWagnerAttack(binary_search_steps=6, steps=100)),
        "brendel_bethge": minimal(lib.L2BrendelBethgeAttack(init_attack=start, steps=50)),
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
    if norm == "linf":
        return {"carlini_wagner": run(lambda c: evasion.CarliniLInfMethod(c, max_iter=10, batch_size=128, **quiet))}
    return {
        "carlini_wagner": run(
            lambda c: evasion.CarliniL2Method(c, max_iter=20, binary_search_steps=5, batch_size=128, **quiet)
        ),
        "boundary, 20 images": first(
            20, run(lambda c: evasion.BoundaryAttack(c, targeted=False, max_iter=60, num_trial=5, **quiet))
        ),
    }


def first(count: int, attack):
    """The attack on the first images only (its library takes them one by one), the others unchanged."""

    def run(model, images, labels):
        return torch.cat([attack(model, images[:count], labels[:count]), images[count:]])

    return run


LIBRARIES = {
    "adv-lib": adv_lib_peers,
    "foolbox": foolbox_peers,
    "torchattacks": torchattacks_peers,
    "art": art_peers,
}


# Measurement -----------------------------------------------------------------------------------------------


def measure(attack, model: nn.Module, images: Tensor, labels: Tensor, norm: str):
    """Distances (N,), inf where it failed; calls per image; seconds."""
    counted = Counted(model).eval()
    torch.manual_seed(0)
    began = time.perf_counter()
    found = attack(counted, images.clone(), labels.clone()).detach()
    seconds = time.perf_counter() - began
    found = found.float().clamp(0, 1)
    wrong = model(found).argmax(1) != labels
    distances = attacks.distance(images, found, norm)
    return distances.where(wrong, torch.inf), counted.calls / len(images), seconds


def row(library: str, name: str, distances: Tensor, calls: float, seconds: float) -> None:
    broken = distances.isfinite()
    mean = f"{distances[broken].mean():.5f}" if broken.any() else "-"
    print(f"| {library} | {name} | {mean} | {100 * broken.double().mean():.0f} | {calls:.0f} | {seconds:.1f} |")
    sys.stdout.flush()


def ours(norm: str) -> dict:
    def seeded(attack, **options):
        return lambda model, x, y: attack(model, x, y, norm=norm, generator=torch.Generator().manual_seed(0), **options)

    return {
        "fab": seeded(attacks.fab),
        "pgd": seeded(attacks.pgd),
        "carlini_wagner": seeded(attacks.carlini_wagner),
        "carlini_wagner, 40 steps": seeded(attacks.carlini_wagner, steps=40),
        "logbarrier": seeded(attacks.logbarrier),
        "boundary, 1000 steps": seeded(attacks.boundary, steps=1000),
    }


def compare(model: nn.Module, images: Tensor, labels: Tensor, norm: str) -> None:
    print(f"\n{norm}, n = {len(images)}\n")
    print("| library | attack | mean distance | success % | calls | s |\n|---|---|---|---|---|---|")
    for name, attack in ours(norm).items():
        row("ours", name, *measure(attack, model, images, labels, norm))
    suite = {}

    def smallest(counted, x, y):
        suite["result"] = attacks.smallest(counted, x, y, norm=norm, generator=torch.Generator().manual_seed(0))
        return suite["result"].adversarial

    distances, calls, seconds = measure(smallest, model, images, labels, norm)
    row("ours", "**smallest**", distances, calls, seconds)
    scale = distances.median().item()
    best, total, spent = torch.full_like(distances, torch.inf), 0.0, 0.0
    for library, peers in LIBRARIES.items():
        try:
            named = peers(norm, scale)
        except ImportError as error:
            print(f"| {library} | not installed: {error} | | | | |")
            continue
        for name, attack in named.items():
            try:
                theirs, theirs_calls, theirs_seconds = measure(attack, model, images, labels, norm)
            except Exception as error:  # a peer that cannot run is a row of the table
                print(f"| {library} | {name}: {type(error).__name__} {str(error)[:80]} | | | | |")
                continue
            row(library, name, theirs, theirs_calls, theirs_seconds)
            best, total, spent = best.minimum(theirs), total + theirs_calls, spent + theirs_seconds
    row("peers", "**smallest of all**", best, total, spent)
    ratio = distances / best
    print(
        f"\n{norm}: smallest / smallest of all peers: means {distances.mean() / best.mean():.4f}, "
        f"per image mean {ratio.mean():.4f}, worst {ratio.max():.3f}, best {ratio.min():.3f}; "
        f"calls {calls / total:.3f}, seconds {seconds / spent:.3f}"
    )
    print("found by", {name: suite["result"].attacks.count(name) for name in sorted(set(suite["result"].attacks))})


def main(
    data: Annotated[str, typer.Option(help="digits or cifar10")] = "digits",
    data_dir: Annotated[Path, typer.Option(help="holds train/<class>/*.jpg and test/<class>/*.jpg")] = Path("cifar"),
    cache: Annotated[Path | None, typer.Option(help="where the trained network is kept")] = None,
    lam: Annotated[float, typer.Option(help="weight of the penalty in eq. (8), 0: undefended")] = 0.1,
    images: Annotated[int, typer.Option(help="images attacked")] = 50,
    norms: Annotated[str, typer.Option(help="comma-separated")] = "linf,l2",
) -> None:
    """Print one table per norm."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    model, x, y = prepare(data, data_dir, cache, lam, images)
    print(f"lam {lam}, seed 0, one thread, torch {torch.__version__}")
    for norm in norms.split(","):
        compare(model, x, y, norm)


if __name__ == "__main__":
    typer.run(main)
