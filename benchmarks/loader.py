"""How fast images are decoded, cropped and resized: images a second of one core, and of an epoch with workers.

    python benchmarks/loader.py --data-dir DIR                      DIR/train/<class>/*, DIR/val/<class>/*
    python benchmarks/loader.py --data-dir DIR --images 200 --repeats 3

Two ways to the same random crops: the whole image decoded (plain PIL), and JPEG decoded no larger than the crop needs
("draft", what data.py does).  They take turns, on the same images; a ratio is the median of ratios to plain PIL in the
same turn.  What smaller copies would gain, a second run says, on a folder of these.
"""

import contextlib
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import numpy as np
import PIL
import torch
import typer
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data
import runs

SIZES = 128, 224  # pixels of the crop
MIN_SCALE = 0.08
BATCH = 32
EPOCH = 3000  # images at least, shown more than once where there are fewer: the start of the workers should not matter


def plain(source: data.Files, indices: np.ndarray, *, seed: int, epoch: int) -> list[np.ndarray]:
    """What `Files.batch` shows, from images that are decoded whole."""
    found = []
    for i, u in zip(indices, data.uniforms(seed, epoch, indices, 6)[:, 1:], strict=True):
        with data.open_image(source.path(i)) as image:
            box = data.random_box(*image.size, source.min_scale, u)
            size = source.size, source.size
            pixels = np.asarray(image.convert("RGB").resize(size, Image.Resampling.BILINEAR, box=box, reducing_gap=2.0))
        found.append(pixels[:, ::-1].copy() if u[4] < 0.5 else pixels)
    return found


def turns(ways: dict[str, Callable[[int], object]], repeats: int, clock: Callable[[], float]) -> dict[str, list[float]]:
    """Seconds of each way in each turn, after one that does not count: way(turn)."""
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            started = clock()
            way(turn)
            if turn:
                taken[name].append(clock() - started)
    return taken


def rows(size: int, taken: dict[str, list[float]], images: int) -> list[str]:
    """Lines of the table; the first way is what the others are compared with."""
    base = next(iter(taken.values()))
    return [
        f"| {size} | {name} | {statistics.median(images / s for s in seconds):.0f} "
        f"({images / max(seconds):.0f} to {images / min(seconds):.0f}) | "
        f"{statistics.median(b / s for b, s in zip(base, seconds, strict=True)):.2f} |"
        for name, seconds in taken.items()
    ]


def one_core(size: int, source: data.Data, indices: np.ndarray, seed: int, repeats: int) -> list[str]:
    """One thread, in seconds of its processor time."""
    ours = source.at(size=size, min_scale=MIN_SCALE).train
    ways = {
        "plain PIL": lambda turn: plain(ours, indices, seed=seed, epoch=turn),
        "draft": lambda turn: ours.batch(indices, seed=seed, epoch=turn),
    }
    return rows(size, turns(ways, repeats, time.process_time), len(indices))


def with_workers(size: int, source: data.Data, seed: int, repeats: int) -> list[str]:
    """An epoch of `training_batches` on the clock, with the start of the workers."""
    how = {"batch_size": BATCH, "seed": seed, "device": torch.device("cpu")}
    train, ways = long_epoch(source.at(size=size, min_scale=MIN_SCALE).train), {}
    for workers in (0, 1, 2):

        def epoch(turn: int, workers: int = workers) -> None:
            for _ in data.training_batches(train, epoch=turn, workers=workers, **how):
                pass

        ways[f"{workers} workers"] = epoch
    return rows(size, turns(ways, repeats, time.perf_counter), len(train) // BATCH * BATCH)


def long_epoch(source: data.Files) -> data.Files:
    times = -(-EPOCH // len(source))
    return replace(source, names=np.tile(source.names, times), labels=source.labels.repeat(times))


def processor() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def sizes_of(source: data.Files, indices: np.ndarray) -> str:
    short = []
    for i in indices:
        with data.open_image(source.path(i)) as image:
            short.append(min(image.size))
    return f"short sides {min(short)} to {max(short)}, median {statistics.median(short):.0f}"


def main(
    data_dir: Annotated[Path, typer.Option(help="Images: DIR/train/<class>/*, DIR/val/<class>/*.", show_default=False)],
    images: Annotated[int, typer.Option(help="Training images to read.", min=BATCH)] = 500,
    repeats: Annotated[int, typer.Option(help="Turns that count.", min=1)] = 5,
    seed: int = 0,
) -> None:
    """Measure, and print Markdown."""
    torch.set_num_threads(1)
    load = f"load {os.getloadavg()[0]:.1f} at the start"
    source = data.load(str(data_dir), subset=images)
    if source.small:
        raise data.Unusable(f"{data_dir}: its images are held in memory; this measures files of large ones")
    indices = np.arange(len(source.train))
    print(f"{len(indices)} training images of {data_dir} ({sizes_of(source.train, indices)}), {repeats} turns,")
    print(f"seed {seed}, random crops of {MIN_SCALE:.0%} to 100 % of the area. {processor()}, {os.cpu_count()} cores,")
    print(f"{load}; Python {platform.python_version()}, Pillow {PIL.__version__}, torch {torch.__version__}.\n")
    title = "images/s, median (range) | times the first |\n|---|---|---|---|"
    print(f"One thread, per second of processor time:\n\n| pixels | how | {title}")
    for size in SIZES:
        print(*one_core(size, source, indices, seed, repeats), sep="\n", flush=True)
    print(f"\nEpochs of `training_batches`, batches of {BATCH}, per second on the clock:\n\n| pixels | how | {title}")
    for size in SIZES:
        print(*with_workers(size, source, seed, repeats), sep="\n", flush=True)


if __name__ == "__main__":
    sys.exit(runs.run_command(main))
