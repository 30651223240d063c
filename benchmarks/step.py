"""Which step h?  How much of the finite difference's weight gradient is signal, and how much is noise.

    python benchmarks/step.py RUN --data-dir DIR                networks of train.py, on their training images
    python benchmarks/step.py RUN RUN --norm linf --float64 --picture step.png
    python benchmarks/step.py net.py:build --data imagenet --data-dir DIR --size 128 --batch-size 16

Table 4 of the paper trains with h from 1e-4 to 1 and finds 0.1 best, the small ones worst.  Not the penalty's value is
why, which the difference quotient gives to a few percent at every h, but its gradient with respect to the weights,

    slope_i (grad_w l(x_i + h d_i) - grad_w l(x_i)) / h,

whose two terms jump apart where a ReLU or a max pooling switches between x_i and x_i + h d_i.  Such switches are rare,
in proportion to h, and each counts 1/h: the expectation stays (it is the curvature of the kinks, which double
backpropagation does not see), and the variance grows as 1/h.  For independent batches a and b, over all pairs,

    signal = <g_a, g_b>, an unbiased estimate of ||E g||^2;    its share = signal / mean ||g_a||^2

of penalty gradients g alone, without the loss.  Rounding is not the cause: --float64 shows the same.
"""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import gradreg
import models
import runs
from gradreg import Penalised, cross_entropy

STEPS = (1e-4, 1e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0)


def weight_gradient(network: nn.Module, value: Tensor) -> Tensor:
    weights = [weight for weight in network.parameters() if weight.requires_grad]
    return torch.cat([grad.flatten() for grad in torch.autograd.grad(value, weights, materialize_grads=True)])


def of_a_batch(
    network: nn.Module, method, images: Tensor, labels: Tensor, norm: gradreg.Norm, amp: bool
) -> tuple[Tensor, float]:
    """The weight gradient of half the mean penalty, and how far its slopes are from the exact ones, in %."""

    def loss_fn(z: Tensor) -> Tensor:
        with torch.autocast(z.device.type, torch.bfloat16, enabled=amp):
            logits = network(z)
        return cross_entropy(logits.float() if amp else logits, labels)

    out: Penalised = method(loss_fn, images, norm=norm)
    exact = (out.grad * gradreg.direction(out.grad, norm)).flatten(1).sum(1)
    off = 100 * (out.penalties.detach().sqrt() - exact).abs().sum() / exact.sum()
    return weight_gradient(network, out.penalties.mean() / 2), float(off)


class Seen(NamedTuple):
    """Of a way to compute the penalty: the slopes' error in %, the length of a batch's gradient, its share of signal,
    and the cosine of the mean gradient to the exact penalty's."""

    off: float
    length: float
    signal: float
    cosine: float


def seen(found: list[tuple[Tensor, float]], reference: Tensor) -> Seen:
    grads = torch.stack([grad for grad, _ in found])
    products, n = (grads @ grads.T).double(), len(grads)
    power = products.diagonal().mean()
    signal = (products.sum() - products.diagonal().sum()) / (n * (n - 1))
    cosine = torch.cosine_similarity(grads.mean(0), reference, dim=0)
    return Seen(float(np.mean([off for _, off in found])), float(power.sqrt()), float(signal / power), float(cosine))


def opened(target: str, data_dir: Path | None, folder: str, pixels: int) -> tuple[nn.Module, data.Source]:
    """A run in training mode and its training images; FILE.py:FACTORY in evaluation mode, and its test images."""
    if models.is_file(target):
        source, classes = data.load_test(folder, data_dir)
        return models.from_file(target, classes=len(classes)).eval(), source.at(pixels)
    options = runs.read_checkpoint(Path(target) / "checkpoint.pt")["config"]["options"]
    return models.load(target).train(), data.load(options["dataset"], data_dir or options["data_dir"]).train


def look(
    network: nn.Module, source: data.Source, norm: str, batches: int, size: int, float64: bool, amp: bool
) -> dict[str, Seen]:
    """By step h, and "exact", on so many random batches of images; printed as it is found.

    amp: all but the reference in bfloat16, and double backpropagation in it, too.
    """
    network = network.double() if float64 else network
    order = data.order(len(source), seed=0, epoch=0)[: batches * size].reshape(batches, size)
    parts = [data.fetch(source, rows, torch.device("cpu")) for rows in order]
    parts = [(x.double() if float64 else x, labels) for x, labels in parts]
    print("| h | slopes off by % | length of a batch's gradient | share of signal | cosine to the exact one |")
    print("|---" * 5 + "|")
    methods = {"exact": gradreg.exact_penalty} | ({"exact, bfloat16": gradreg.exact_penalty} if amp else {})
    methods |= {f"{h:g}": partial(gradreg.fd_penalty, h=h) for h in STEPS}
    reference, known = None, {}
    for name, method in methods.items():
        found = [of_a_batch(network, method, *part, norm, amp and name != "exact") for part in parts]
        reference = torch.stack([grad for grad, _ in found]).mean(0) if reference is None else reference
        known[name] = seen(found, reference)
        print("| {} | {:.1f} | {:.3g} | {:.3f} | {:.3f} |".format(name, *known[name]), flush=True)
    print()
    return known


def draw(known: dict[str, dict[str, Seen]], path: Path) -> None:
    """Share of signal, and cosine to the exact gradient, against h; dotted, what double backpropagation has."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 3.8), layout="constrained")
    for axes, name in zip(figure.subplots(1, 2), ("signal", "cosine"), strict=True):
        for i, (run, rows) in enumerate(known.items()):
            values = [getattr(rows[f"{h:g}"], name) for h in STEPS]
            axes.plot(STEPS, values, "o-", color=f"C{i}", label=run)
            if name == "signal":
                axes.axhline(rows["exact"].signal, color=f"C{i}", linestyle=":")
        axes.set(xscale="log", xlabel="step h, l2 length in pixels of range 0 to 1", ylim=(-0.02, None))
        axes.set_ylabel({"signal": "share of signal in a batch's gradient", "cosine": "cosine to the exact one"}[name])
        axes.grid(alpha=0.3)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", fontsize=8, frameon=False)
    figure.savefig(path, dpi=120)


def main(
    target: Annotated[list[str], typer.Argument(help="Runs of train.py, or FILE.py:FACTORY.")],
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are.")] = None,
    norm: Annotated[str, typer.Option(help="l2, linf or l1.")] = "l2",
    batches: Annotated[int, typer.Option(help="Of the training images, at random.", min=2)] = 24,
    batch_size: int = 128,
    float64: Annotated[bool, typer.Option("--float64")] = False,
    amp: Annotated[bool, typer.Option("--amp", help="All but the reference in bfloat16.")] = False,
    picture: Annotated[Path | None, typer.Option(help="Where to draw.")] = None,
    folder: Annotated[str, typer.Option("--data", help="Of FILE.py:FACTORY: imagenet, or a folder.")] = "imagenet",
    size: Annotated[int, typer.Option(help="Of FILE.py:FACTORY: pixels a side.")] = 224,
) -> None:
    torch.set_num_threads(1)
    known = {}
    for name in target:
        print(f"{name}, {norm}, {batches} batches of {batch_size}, torch {torch.__version__}, {runs.git_commit()}\n")
        found = look(*opened(name, data_dir, folder, size), norm, batches, batch_size, float64, amp)
        known[Path(name).name] = found
    if picture:
        draw(known, picture)


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
