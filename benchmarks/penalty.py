"""What a training step costs with each way to compute the penalty: counted operations, time, memory.

    python benchmarks/penalty.py                                    ResNeXt-34 (2x32), counts only, seconds to run
    python benchmarks/penalty.py --time                             and time and memory, interleaved, on this device
    python benchmarks/penalty.py --model resnet50 --size 224 --classes 1000
    python benchmarks/penalty.py --time --way float32 --way tf32 --way bfloat16+channels_last

Counts are of the convolutions and matrix products of one step, and of the bytes that all else in it (normalization,
activation, pooling) reads and writes, in units of a plain step's; they do not depend on the machine.
Times are medians of ratios to a plain step of the first way that ran just before, in the same process.
A way is what train.py offers to be faster, joined by +: float32 (nothing), tf32 and bfloat16 (--amp), which train.py
refuses for an h below 0.1, channels_last.  Beside it stands what it costs: how far the mean penalty is from the same in
float64, and the cosine of its weight gradient to that.
"""

import contextlib
import copy
import math
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import runs
import train

METHODS = {
    "plain": {"method": "none"},
    "fd": {"method": "fd"},
    "exact (double backpropagation)": {"method": "exact"},
    "ascent": {"method": "ascent"},
}
WAYS = ("float32", "tf32", "bfloat16", "channels_last")


class CountProducts(TorchDispatchMode):
    """Context: `flops` counts two operations for every multiply-add of a convolution or matrix product.

    `moved` counts the bytes of what goes into, and comes out of, every other operation that is not a mere view.

    torch's own FlopCounterMode fails inside autograd.grad, and overcounts the backward pass of grouped convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name == "convolution":
            self.flops += conv_flops(args[0], args[1], out, transposed=args[6])
        elif name == "convolution_backward":
            # The gradient of the image and that of the weights each cost what the forward pass cost.
            self.flops += sum(args[10][:2]) * conv_flops(args[1], args[2], args[0], transposed=args[7])
        elif name in ("mm", "addmm", "bmm"):
            a, b = args[-2:] if name == "addmm" else args[:2]
            self.flops += 2 * a.numel() * b.shape[-1]
        elif not (func.is_view or name in ("detach", "_unsafe_view")):
            tensors = [x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.moved += sum(x.numel() * x.element_size() for x in tensors)
        return out


def conv_flops(image: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> int:
    """Two operations for each product of a weight with a pixel; weight is (outputs, inputs / groups, *kernel)."""
    positions = (image if transposed else out)[0, 0].numel() * len(out)
    return 2 * positions * weight.numel()


def step(objective: nn.Module, images: Tensor, labels: Tensor) -> None:
    objective.zero_grad(set_to_none=True)
    objective(images, labels).objective(1.0).backward()


def count(objective: nn.Module, images: Tensor, labels: Tensor) -> tuple[int, int]:
    """Operations of one training step, without the optimizer, and the bytes that are moved beside them."""
    with CountProducts() as counter:
        step(objective, images, labels)
    return counter.flops, counter.moved


def measure(objective: nn.Module, images: Tensor, labels: Tensor) -> tuple[float, float]:
    """Seconds of one step, and on CUDA its peak memory in GiB."""
    cuda = images.is_cuda
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    started = time.perf_counter()
    step(objective, images, labels)
    if cuda:
        torch.cuda.synchronize()
    seconds = time.perf_counter() - started
    return seconds, torch.cuda.max_memory_allocated() / 2**30 if cuda else math.nan


class Prepared(NamedTuple):
    """An objective on its own copy of the network, in a way to compute it."""

    objective: nn.Module
    way: list[str]
    images: Tensor
    labels: Tensor

    @contextlib.contextmanager
    def precision(self) -> Iterator[None]:
        """Context: TF32 is allowed only where the way says so."""
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = "tf32" in self.way
        try:
            yield
        finally:
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False


def prepared(network: nn.Module, images: Tensor, labels: Tensor, way: list[str], **options: Any) -> Prepared | None:
    """None where train.py refuses the method in this way."""
    if "bfloat16" in way:
        options["amp"] = True
    try:
        train.check_given(options)
    except runs.Failure:
        return None
    if "amp" in options and not train.may_round(train.Options(**options)):
        return None
    layout = torch.channels_last if "channels_last" in way else torch.contiguous_format
    objective = train.Objective(copy.deepcopy(network).to(memory_format=layout), **options)
    return Prepared(objective, way, images.contiguous(memory_format=layout), labels)


def penalty_and_gradient(case: Prepared) -> tuple[float, Tensor]:
    """The mean penalty of a batch, and the gradient of (8) for lambda 1 with respect to the weights, in float64."""
    with case.precision():
        out = case.objective(case.images, case.labels)
        weights = [weight for weight in case.objective.network.parameters() if weight.requires_grad]
        found = torch.autograd.grad(out.objective(1.0), weights, allow_unused=True)
    return out.penalties.mean().item(), torch.cat([grad.double().flatten() for grad in found if grad is not None])


def accuracy(case: Prepared, exact: tuple[float, Tensor]) -> str:
    """Distance of the penalty and of the weight gradient from the same in float64."""
    penalty, grad = penalty_and_gradient(case)
    off = 100 * abs(penalty - exact[0]) / exact[0]
    return f"   penalty off by {off:.3g} %, cosine {torch.cosine_similarity(grad, exact[1], dim=0).item():.4f}"


def compared(plain: Prepared, case: Prepared, repeats: int) -> str:
    """Time, as a ratio and in ms, and memory of a step beside plain ones."""

    def one(of: Prepared) -> tuple[float, float]:
        with of.precision():
            return measure(of.objective, of.images, of.labels)

    for _ in range(3):  # algorithms are chosen
        one(plain), one(case)
    pairs = [(one(plain), one(case)) for _ in range(repeats)]
    ratio = statistics.median(mine[0] / base[0] for base, mine in pairs)
    line = f"   {ratio:5.2f} x the time ({statistics.median(p[1][0] for p in pairs) * 1e3:.1f} ms)"
    return line + ("" if math.isnan(pairs[0][1][1]) else f"   {max(p[1][1] for p in pairs):.2f} GiB")


def main(
    model: str = "resnext34",
    size: int = 32,
    classes: int = 10,
    batch_size: int = 16,
    h: float = 0.01,
    norm: str = "l2",
    timed: Annotated[bool, typer.Option("--time")] = False,
    way: Annotated[list[str], typer.Option(help=f"Of {', '.join(WAYS)}, joined by +.")] = ["float32"],  # noqa: B006
    repeats: int = 10,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    ways = {name: name.split("+") for name in way}
    if unknown := {part for parts in ways.values() for part in parts} - {*WAYS}:
        raise runs.Unusable(f"--way {unknown.pop()}: choose from {', '.join(WAYS)}")
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, size, size, generator=generator).to(device)
    labels = torch.randint(classes, (batch_size,), generator=generator).to(device)
    torch.manual_seed(0)
    network = models.build(model, classes=classes).to(device).train()
    plain = prepared(network, images, labels, ways[way[0]], **METHODS["plain"], norm=norm)
    flops, moved = count(prepared(network, images, labels, [], **METHODS["plain"]).objective, images, labels)
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    print(f"{model}, {size}x{size}, batch {batch_size}, torch {torch.__version__}, {hardware}, {runs.git_commit()}")
    print(f"plain step: {flops / batch_size / 1e9:.2f} GFLOP and {moved / batch_size / 1e6:.0f} MB an image")
    for name, how in METHODS.items():
        options = how | {"norm": norm} | ({"h": h} if how["method"] == "fd" else {})
        counted, bytes_moved = count(prepared(network, images, labels, [], **options).objective, images, labels)
        line, exact = f"{name:32} {counted / flops:5.2f} x the operations {bytes_moved / moved:5.2f} x the bytes", None
        if timed and name != "plain":
            double = prepared(copy.deepcopy(network).double(), images.double(), labels, [], **options)
            exact = penalty_and_gradient(double)
        for title, parts in ways.items():
            case, found = prepared(network, images, labels, parts, **options), ""
            if timed and case:
                found = compared(plain, case, repeats) + (accuracy(case, exact) if exact else "")
            print(f"{line}   {title:22}{found}" if case else f"{line}   {title:22}   refused by train.py", flush=True)


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
