"""What a training step costs with each way to compute the penalty: counted operations, time, memory.

    python benchmarks/penalty.py                                    ResNeXt-34 (2x32), counts only, seconds to run
    python benchmarks/penalty.py --time                             and time and memory, interleaved, on this device
    python benchmarks/penalty.py --model resnet50 --size 224 --classes 1000

Counts are of the convolutions and matrix products of one step, in units of a plain step's; they do not depend on the
machine.  Times are medians of ratios to a plain step that ran just before, in the same process.
"""

import math
import statistics
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import models
import train

METHODS = {
    "plain": {"method": "none"},
    "fd": {"method": "fd"},
    "fd, central": {"method": "fd", "central": True},
    "exact (double backpropagation)": {"method": "exact"},
    "jvp (forward mode)": {"method": "jvp"},
}


class CountProducts(TorchDispatchMode):
    """Context: `flops` counts two operations for every multiply-add of a convolution or matrix product.

    torch's own FlopCounterMode fails inside autograd.grad, and overcounts the backward pass of grouped convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

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
        return out


def conv_flops(image: Tensor, weight: Tensor, out: Tensor, *, transposed: bool) -> int:
    """Two operations for each product of a weight with a pixel; weight is (outputs, inputs / groups, *kernel)."""
    positions = (image if transposed else out)[0, 0].numel() * len(out)
    return 2 * positions * weight.numel()


def step(objective: nn.Module, images: Tensor, labels: Tensor) -> None:
    objective.zero_grad(set_to_none=True)
    objective(images, labels).objective(1.0).backward()


def count(objective: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Operations of one training step, without the optimizer."""
    with CountProducts() as counter:
        step(objective, images, labels)
    return counter.flops


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


def main(
    model: str = "resnext34",
    size: int = 32,
    classes: int = 10,
    batch_size: int = 16,
    h: float = 0.01,
    norm: str = "l2",
    timed: Annotated[bool, typer.Option("--time")] = False,
    repeats: int = 10,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(batch_size, 3, size, size, generator=generator).to(device)
    labels = torch.randint(classes, (batch_size,), generator=generator).to(device)

    def objective(how: dict[str, Any]) -> nn.Module:
        torch.manual_seed(0)
        network = models.build(model, classes=classes).to(device).train()
        return train.Objective(network, norm=norm, h=h, **how)

    objectives = {name: objective(how) for name, how in METHODS.items()}
    plain = count(objectives["plain"], images, labels)
    hardware = torch.cuda.get_device_name() if device.startswith("cuda") else f"cpu, {torch.get_num_threads()} threads"
    print(f"{model}, {size}x{size}, batch {batch_size}, torch {torch.__version__}, {hardware}")
    print(f"plain step: {plain / batch_size / 1e9:.2f} GFLOP an image")
    for name, module in objectives.items():
        line = f"{name:32} {count(module, images, labels) / plain:5.2f} x the operations"
        if timed:
            measure(module, images, labels)
            pairs = [
                (measure(objectives["plain"], images, labels), measure(module, images, labels)) for _ in range(repeats)
            ]
            ratio = statistics.median(mine[0] / base[0] for base, mine in pairs)
            line += f"   {ratio:5.2f} x the time ({statistics.median(p[1][0] for p in pairs) * 1e3:.1f} ms)"
            line += "" if math.isnan(pairs[0][1][1]) else f"   {max(p[1][1] for p in pairs):.2f} GiB"
        print(line, flush=True)


if __name__ == "__main__":
    typer.run(main)
