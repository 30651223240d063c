"""Which step h?  How much of the finite difference's weight gradient is signal, and how much is noise.

    python benchmarks/step.py RUN --data-dir DIR                networks of train.py, on their training images
    python benchmarks/step.py RUN --norm linf --batches 32 --float64

Table 4 of the paper trains with h from 1e-4 to 1 and finds 0.1 best, the small ones worst.  Not the penalty's value is
why, which the difference quotient gives to a few percent at every h, but its gradient with respect to the weights,

    slope_i (grad_w l(x_i + h d_i) - grad_w l(x_i)) / h,

whose two terms jump apart where a ReLU or a max pooling switches between x_i and x_i + h d_i.  Such switches are rare,
in proportion to h, and each counts 1/h: the expectation stays (it is the curvature of the kinks, which double
backpropagation does not see), and the variance grows as 1/h.  For independent batches a and b, over all pairs,

    signal = <g_a, g_b>, an unbiased estimate of ||E g||^2;    its share = signal / mean ||g_a||^2

of penalty gradients g alone, without the loss.  Rounding is not the cause: --float64 shows the same.
"""

import copy
import sys
from functools import partial
from pathlib import Path
from typing import Annotated

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


def of_a_batch(network: nn.Module, method, images: Tensor, labels: Tensor, norm: gradreg.Norm) -> tuple[Tensor, float]:
    """The weight gradient of half the mean penalty, and how far its slopes are from the exact ones, in %."""
    out: Penalised = method(lambda z: cross_entropy(network(z), labels), images, norm=norm)
    exact = (out.grad * gradreg.direction(out.grad, norm)).flatten(1).sum(1)
    off = 100 * (out.penalties.detach().sqrt() - exact).abs().sum() / exact.sum()
    return weight_gradient(network, out.penalties.mean() / 2), float(off)


def row(name: str, found: list[tuple[Tensor, float]], reference: Tensor | None) -> str:
    """Name, error of the slopes, length of the gradients, signal share, cosine of their mean to the reference."""
    grads = torch.stack([grad for grad, _ in found])
    products = grads @ grads.T
    n, power = len(grads), float(products.diagonal().mean())
    signal = float(products.sum() - products.diagonal().sum()) / (n * (n - 1))
    cosine = "" if reference is None else f"{torch.cosine_similarity(grads.mean(0), reference, dim=0).item():.3f}"
    return f"| {name} | {np.mean([off for _, off in found]):.1f} | {power**0.5:.3g} | {signal / power:.3f} | {cosine} |"


def main(
    run: Path,
    data_dir: Annotated[Path | None, typer.Option(help="Where the images are.")] = None,
    norm: Annotated[str, typer.Option(help="l2, linf or l1.")] = "l2",
    batches: Annotated[int, typer.Option(help="Of the training images, at random.", min=2)] = 24,
    batch_size: int = 128,
    float64: Annotated[bool, typer.Option("--float64")] = False,
    evaluation_mode: Annotated[bool, typer.Option("--eval", help="Batch normalization as in evaluation.")] = False,
) -> None:
    torch.set_num_threads(1)
    network = models.load(run).train(not evaluation_mode)
    options = runs.read_checkpoint(run / "checkpoint.pt")["config"]["options"]
    images = data.load(options["dataset"], data_dir or data.stored_place(options))
    network = copy.deepcopy(network).double() if float64 else network
    source = images.train
    order = data.order(len(source), seed=0, epoch=0)[: batches * batch_size].reshape(batches, batch_size)
    parts = [data.fetch(source, rows, torch.device("cpu")) for rows in order]
    parts = [(x.double() if float64 else x, labels) for x, labels in parts]
    print(f"{run.name}, {norm}, {batches} batches of {batch_size}, torch {torch.__version__}, {runs.git_commit()}\n")
    print("| h | slopes off by % | length of a batch's gradient | share of signal | cosine to the exact one |")
    print("|---" * 5 + "|")
    methods = {"exact": gradreg.exact_penalty} | {f"{h:g}": partial(gradreg.fd_penalty, h=h) for h in STEPS}
    reference = None
    for name, method in methods.items():
        found = [of_a_batch(network, method, *part, norm) for part in parts]
        print(row(name, found, reference), flush=True)
        reference = torch.stack([grad for grad, _ in found]).mean(0) if reference is None else reference


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
