"""Section 4: the data.  Images with pixels in [0, 1], and every batch a pure function of (seed, epoch, step).

    digits    scikit-learn's 8x8 digits: nothing to download
    cifar10   torchvision's layout (downloaded if absent), or a folder DIR/train/<class>/*, DIR/test/<class>/*
    imagenet  DIR/train/<wnid>/*, DIR/val/<wnid>/*
    FOLDER    any folder laid out like one of the last two, or copies of one, made by

    python data.py DIR OUT                         OUT/160 and OUT/352: smaller copies, which are decoded much faster
    python data.py DIR OUT --short-side 256        copies of another size

Small images live in memory as uint8 and are augmented a batch at a time; large ones are decoded by worker
processes.  In both cases the order of an epoch depends on (seed, epoch) alone, and the augmentation of an
image on (seed, epoch, its index) alone: not on the batch, the process, the worker, or what came before.  So a
run can resume in the middle of an epoch, and any number of processes can share a batch, without saving or
sending random states.  The shape at which a test image is evaluated depends on that image alone.

Pixels are taken as they are stored: EXIF orientation is not applied (nor is it by torchvision's ImageFolder).
"""

import io
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import pairwise
from multiprocessing import connection, parent_process
from pathlib import Path
from typing import Annotated, NamedTuple

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

from runs import Failure, Unusable, progress_bar, run_command

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 64  # pixels: folders of images up to this size are held in memory
TRIES = 2000  # images in a row: a lost class of ImageNet (1300) does not end a run, a lost disk does
UNFINISHED = "unfinished"  # the file that marks a folder of copies to which some are still to come


class DataError(Unusable):
    """Data that is missing or cannot be used; the message is one line and says what to do."""


# --- chance without state ---------------------------------------------------------------------------------


def uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (len(indices), count): row i depends on (seed, epoch, indices[i]) alone.

    SplitMix64 (Steele, Lea & Flood 2014) used as a hash of the counter, as in Salmon et al. (2011).
    """
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    rows = _mix(key ^ np.asarray(indices, dtype=np.uint64))
    counters = rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(counters) >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of range(count) that depends on (seed, epoch) alone."""
    return np.argsort(uniforms(seed, epoch, np.arange(count), 1)[:, 0], kind="stable")


# --- sources: where pixels come from ----------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """Random crop after padding by `pad` with value `fill`, horizontal flip, cutout of a square of side `cutout`."""

    pad: int = 0
    fill: int = 128
    flip: bool = False
    cutout: int = 0

    def __call__(self, images: Tensor, u: Tensor) -> Tensor:
        """Images (N, C, H, W) augmented by the uniform numbers u (N, 5): like images, but float."""
        images = self._crop_and_flip(images, u) if self.pad or self.flip else images
        return self._cut_out(images.float(), u) if self.cutout else images.float()

    def _crop_and_flip(self, images: Tensor, u: Tensor) -> Tensor:
        count, _, height, width = images.shape
        offsets = (u[:, :2] * (2 * self.pad + 1)).long()
        rows = offsets[:, :1] + torch.arange(height, device=u.device)
        columns = offsets[:, 1:] + torch.arange(width, device=u.device)
        if self.flip:
            columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns)
        padded = pad(images, (self.pad,) * 4, value=self.fill)
        image = torch.arange(count, device=u.device)[:, None, None]
        return padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)

    def _cut_out(self, images: Tensor, u: Tensor) -> Tensor:
        """Fill a square, centred anywhere and clipped at the border, with its own mean colour."""

        def inside(length: int, u: Tensor) -> Tensor:
            centre = (u * (length + (self.cutout % 2 == 0))).long()
            offset = torch.arange(length, device=u.device) - (centre - self.cutout // 2)[:, None]
            return (offset >= 0) & (offset < self.cutout)

        mask = inside(images.shape[2], u[:, 3])[:, None, :, None] & inside(images.shape[3], u[:, 4])[:, None, None]
        mean = (images * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
        return torch.where(mask, mean, images)


@dataclass(frozen=True)
class InMemory:
    """Images held as uint8 (N, C, H, W) with values 0 to `top`, and labels (N,)."""

    images: Tensor
    labels: Tensor
    top: int = 255
    augmentation: Augmentation | None = None

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "InMemory":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Pixels, 0 to `top`, and labels of the images at `indices`."""
        where = torch.from_numpy(indices).to(self.images.device)
        images = self.images[where]
        if self.augmentation:
            # Column 0 ordered the epoch; the augmentation has the others to itself.
            u = torch.from_numpy(uniforms(seed, epoch, indices, 6)[:, 1:]).to(images.device)
            images = self.augmentation(images, u)
        return images, self.labels[where]


@dataclass(frozen=True, eq=False)
class Paths(Sequence[Path]):
    """root/name for every name.  The names are one array, which forked processes share and do not copy."""

    root: Path
    names: np.ndarray

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> Path:
        return self.root / str(self.names[i])


Shape = tuple[int, int]  # height, width
Problems = list[str] | None  # collects a line for each unreadable image; without it, they raise DataError


@dataclass(frozen=True, eq=False)
class Files:
    """Images decoded on demand as uint8 (N, 3, size, size), with random resized crop and flip if `train`.

    `copies` has the folders of pre-resized copies by their short sides; `paths` is in one of them.
    """

    paths: Paths
    labels: Tensor
    size: int = 224
    train: bool = False
    min_scale: float = 0.08
    rectangular: bool = False
    copies: dict[int, Path] = field(default_factory=dict)
    top: int = 255
    known: dict[int, Shape] = field(default_factory=dict, init=False, repr=False)  # see `shapes`

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Files":
        return self

    def at(self, size: int, **fields: float | bool) -> "Files":
        """The same images at another size, from the smallest copies with a fifth to spare, or else the largest."""
        paths = self.paths
        if self.copies:
            large_enough = [side for side in self.copies if 5 * side >= 6 * size]
            paths = replace(paths, root=self.copies[min(large_enough, default=max(self.copies))])
        return replace(self, paths=paths, size=size, **fields)

    def shapes(self, indices: np.ndarray) -> list[Shape]:
        """At which the images are evaluated; of an unreadable one: the square.  Each header is read once."""
        square = self.size, self.size
        if not self.rectangular:
            return [square] * len(indices)
        with ThreadPoolExecutor(16) as threads:  # they wait for the disk
            new = [i for i in indices.tolist() if i not in self.known]
            found = zip(new, threads.map(self._shape, new), strict=True)
            self.known.update((i, shape) for i, shape in found if shape)
        return [self.known.get(i, square) for i in indices.tolist()]

    def _shape(self, i: int) -> Shape | None:
        try:
            with open_image(self.paths[i]) as image:
                return rectangle(*image.size, self.size)
        except DataError:  # whoever decodes the image meets it again
            return None

    def batch(
        self, indices: np.ndarray, *, seed: int, epoch: int, shape: Shape | None = None, problems: Problems = None
    ) -> tuple[Tensor, Tensor]:
        """Pixels, 0 to 255, and labels of the images at `indices`, of one shape (default: the square).

        An unreadable image raises DataError, naming the file.  With a list of problems, this message is appended to
        it, and the image is left out; if `train`, the next readable one takes its place, with its own label and the
        crop and flip that were drawn for the place (so it is not seen twice alike).  DataError after TRIES in a row.
        """
        shape = shape or (self.size, self.size)
        u = uniforms(seed, epoch, indices, 6)[:, 1:]
        found = [self._readable(int(i), row, shape, problems) for i, row in zip(indices, u, strict=True)]
        found = [pair for pair in found if pair]
        images = np.stack([pixels for _, pixels in found]) if found else np.empty((0, *shape, 3), dtype=np.uint8)
        where = torch.tensor([i for i, _ in found], dtype=torch.int64)
        return torch.from_numpy(images).permute(0, 3, 1, 2), self.labels[where]

    def _readable(self, index: int, u: np.ndarray, shape: Shape, problems: Problems) -> tuple[int, np.ndarray] | None:
        """The image at `index`, or what stands for it, and its own index."""
        tries = min(TRIES, len(self)) if self.train else 1
        for i in ((index + k) % len(self) for k in range(tries)):
            try:
                return i, self._image(self.paths[i], u, shape)
            except DataError as error:
                if problems is None:
                    raise
                problems.append(str(error))
        if self.train:
            raise DataError(f"{problems[-tries]}; nor is any of the {tries - 1} images after it: is the disk there?")
        return None

    def _image(self, path: Path, u: np.ndarray, shape: Shape) -> np.ndarray:
        with open_image(path) as image:
            box = random_box(*image.size, self.min_scale, u) if self.train else centre_box(*image.size, shape)
            pixels = np.asarray(crop(image, box, shape))
        return pixels[:, ::-1].copy() if self.train and u[4] < 0.5 else pixels


Source = InMemory | Files


def fetch(
    source: Source, indices: np.ndarray, device: torch.device, *, problems: Problems = None
) -> tuple[Tensor, Tensor]:
    """The images at `indices`, in [0, 1], and their labels, on the device; augmented only if the source is.

    Unreadable images raise DataError, or are left out and named in `problems`.
    """
    how = {"problems": problems} if isinstance(source, Files) else {}
    images, labels = source.batch(indices, seed=0, epoch=0, **how)
    return images.to(device).float() / source.top, labels.to(device)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Context: a PIL image, opened but not yet decoded.  Raises DataError, naming the file, here or on decoding."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a readable image ({reason}); replace it or remove it") from None


Box = tuple[float, float, float, float]  # left, top, right, bottom


def random_box(width: int, height: int, min_scale: float, u: np.ndarray) -> Box:
    """A box of min_scale to 1 times the image's area, of aspect ratio 3/4 to 4/3, clipped to the image."""
    area = width * height * (min_scale + (1 - min_scale) * u[0])
    ratio = (3 / 4) ** (1 - 2 * u[1])
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = u[2] * (width - w), u[3] * (height - h)
    return left, top, left + w, top + h


def rectangle(width: int, height: int, size: int) -> Shape:
    """The shape at which an image is evaluated: `size` by size to 2 size, a multiple of 32, of the image's aspect."""
    long = min(max(size, size * max(width, height) // min(width, height) // 32 * 32), 2 * size)
    return (size, long) if width >= height else (long, size)


def centre_box(width: int, height: int, shape: Shape = (1, 1)) -> Box:
    """The central box of the aspect of `shape`, its short side 7/8 of the image's.

    A square is what "resize to 256, crop 224" shows of an image; a rectangle shows that and more, at the same scale.
    """
    side = min(width, height) * 224 / 256
    w, h = side * (shape[1] / min(shape)), side * (shape[0] / min(shape))
    left, top = (width - w) / 2, (height - h) / 2
    return left, top, left + w, top + h


def crop(image: Image.Image, box: Box, shape: int | Shape) -> Image.Image:
    """The box of the image, resized to a shape or a square.  JPEG is decoded no larger than that needs."""
    h, w = (shape, shape) if isinstance(shape, int) else shape
    width, height = image.size
    scale = max(w / (box[2] - box[0]), h / (box[3] - box[1]))
    image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
    sx, sy = image.size[0] / width, image.size[1] / height
    box = (box[0] * sx, box[1] * sy, min(box[2] * sx, image.size[0]), min(box[3] * sy, image.size[1]))
    return image.convert("RGB").resize((w, h), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


# --- data sets --------------------------------------------------------------------------------------------


class Data(NamedTuple):
    """Training and test images, and the names of the classes in the order of their labels."""

    train: Source
    test: Source
    classes: list[str]
    channels: int

    @property
    def small(self) -> bool:
        """Whether the images are small enough to be held in memory."""
        return isinstance(self.train, InMemory)

    def at(self, *, size: int, min_scale: float, rectangular: bool) -> "Data":
        """The same images at another size; images held in memory stay as they are.

        Training shows random resized crops of at least min_scale of an image's area; the test images are evaluated in
        squares or, if `rectangular`, in the shape that `rectangle` gives each of them.
        """
        if self.small:
            return self
        test = self.test.at(size, rectangular=rectangular)
        return self._replace(train=self.train.at(size, min_scale=min_scale), test=test)


def load(name: str, data_dir: str | os.PathLike = "data", *, subset: int | None = None) -> Data:
    """The data set `name`, or its first `subset` training and test images in a fixed random order.

    Raises DataError.
    """
    data_dir = Path(data_dir)
    if name == "digits":
        return digits(subset)
    if name == "cifar10":
        return folder(data_dir, subset) if (data_dir / "train").is_dir() else cifar10(data_dir, subset)
    if name == "imagenet":
        return folder(data_dir, subset)
    if Path(name).is_dir():
        return folder(Path(name), subset)
    raise DataError(f"unknown data set {name!r}: choose digits, cifar10, imagenet, or the path of an image folder")


def digits(subset: int | None = None) -> Data:
    """scikit-learn's 1797 digits, 8x8 with values 0 to 16, in a fixed random order: 1000 train, 797 test."""
    from sklearn.datasets import load_digits  # here, since only this data set needs it

    bunch = load_digits()
    shuffled = order(len(bunch.target), seed=0, epoch=0)
    images = torch.from_numpy(bunch.images.astype(np.uint8))[shuffled, None]
    labels = torch.from_numpy(bunch.target)[shuffled]
    train, test = InMemory(images[:1000], labels[:1000], 16), InMemory(images[1000:], labels[1000:], 16)
    return Data(_subset(train, subset), _subset(test, subset), [str(i) for i in range(10)], channels=1)


CIFAR = Augmentation(pad=4, fill=128, flip=True, cutout=16)


def cifar10(data_dir: Path, subset: int | None = None) -> Data:
    """CIFAR-10 as torchvision stores it, downloaded into data_dir when it is not there."""
    from torchvision.datasets import CIFAR10

    layout = "cifar-10-batches-py inside it, or train/<class>/* and test/<class>/*"
    try:
        download = not (data_dir / CIFAR10.base_folder).is_dir()
        train, test = (CIFAR10(data_dir, train=part, download=download) for part in (True, False))
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = str(error).split(". ")[0]
        raise DataError(f"--data-dir {data_dir}: no usable CIFAR-10 ({reason}); it should hold {layout}") from None

    def held(part: CIFAR10, augmentation: Augmentation | None) -> InMemory:
        images = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous()
        return _subset(InMemory(images, torch.tensor(part.targets), augmentation=augmentation), subset)

    return Data(held(train, CIFAR), held(test, None), list(train.classes), channels=3)


def folder(root: Path, subset: int | None = None) -> Data:
    """Images in root/train/<class>/* and root/test/<class>/* (or val/): in memory if small, else from disk.

    Or pre-resized copies of such a folder, root/<short side>/train/<class>/* and so on, as `main` makes them.
    """
    copies = _copies(root)
    train_part, test_part = _parts(copies[max(copies)] if copies else root)
    classes = _folders(train_part)
    train = _source(train_part, classes, copies, subset)
    test = _source(test_part, classes, copies, subset, small=isinstance(train, InMemory))
    if isinstance(train, Files):
        return Data(replace(train, train=True), test, classes, channels=3)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{test_part}: images differ in size from those in {train_part}; resize them")
    return Data(replace(train, augmentation=CIFAR), test, classes, channels=3)


def load_test(name: str, data_dir: str | os.PathLike = "data") -> tuple[Source, list[str]]:
    """The test images of a data set and its classes; of an image folder, which may lack train/, those alone.

    Raises DataError.
    """
    root = Path(name) if Path(name).is_dir() else Path(data_dir)
    copies = _copies(root)
    base = copies[max(copies)] if copies else root
    held_out = _held_out(base)
    if name == "digits" or held_out is None:
        loaded = load(name, data_dir)
        return loaded.test, loaded.classes
    classes = _folders(base / "train" if (base / "train").is_dir() else held_out)
    return _source(held_out, classes, copies), classes


def _held_out(root: Path) -> Path | None:
    return next((root / part for part in ("test", "val") if (root / part).is_dir()), None)


def _holds_images(root: Path) -> bool:
    return (root / "train").is_dir() or _held_out(root) is not None


def _parts(root: Path) -> tuple[Path, Path]:
    """The folders of the training and of the test images."""
    if not (root / "train").is_dir():
        raise DataError(f"{root}: no folder train in it; expected {root}/train/<class>/* and test/ or val/ beside it")
    if not (held_out := _held_out(root)):
        raise DataError(f"{root}: no folder test or val in it; expected test/<class>/* beside train/")
    return root / "train", held_out


def _copies(root: Path) -> dict[int, Path]:
    """The folders of pre-resized copies in root, by short side; none where root itself holds images."""
    if not root.is_dir() or _holds_images(root):
        return {}
    numbers = [name for name in os.listdir(root) if name.isdecimal() and _holds_images(root / name)]
    if numbers and (root / UNFINISHED).exists():
        raise DataError(f"{root}: the copies in it are not complete; run {(root / UNFINISHED).read_text()} again")
    return {int(name): root / name for name in numbers}


def _source(
    part: Path, classes: list[str], copies: dict[int, Path], subset: int | None = None, small: bool | None = None
) -> Source:
    """The images of train/, test/ or val/, in memory if small (default: if the first of them is), and not augmented."""
    paths, labels = _list_images(part, classes, subset)
    if copies:
        parts = {side: root / part.name for side, root in copies.items()}
        names = {root: set(_list_images(root, classes)[0].names.tolist()) for root in parts.values()}
        for root in parts.values():
            if different := sorted(names[root] ^ names[part]):
                missing = (part if different[0] in names[root] else root) / different[0]
                raise DataError(f"{missing}: not there, unlike another copy of it; make it again, or remove the other")
        return Files(paths, labels, copies=parts)
    if small is None:
        with open_image(paths[0]) as first:
            small = max(first.size) <= SMALL
    return InMemory(_decode(paths), labels) if small else Files(paths, labels)


def _folders(root: Path) -> list[str]:
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root}: {len(classes)} class folders in it; expected at least 2, each a class's images")
    return classes


def _list_images(root: Path, classes: list[str], subset: int | None = None) -> tuple[Paths, Tensor]:
    """Paths and labels in a fixed order, or a fixed random subset of them."""
    if unknown := sorted(set(_folders(root)) - set(classes)):
        raise DataError(f"{root / unknown[0]}: no training images for this class; it is not in train/")
    names, labels = [], []
    for label, name in enumerate(classes):
        if (root / name).is_dir():
            files = sorted(e.name for e in os.scandir(root / name) if e.name.lower().endswith(EXTENSIONS))
            names += [f"{name}/{file}" for file in files]
            labels += [label] * len(files)
    if not names:
        raise DataError(f"{root}: no images in its class folders; known kinds are {' '.join(EXTENSIONS)}")
    kept = _keep(len(names), subset)
    return Paths(root, np.array(names)[kept]), torch.tensor(labels)[torch.from_numpy(kept)]


def _decode(paths: Sequence[Path]) -> Tensor:
    """All images as uint8 (N, 3, H, W); they must have one size."""

    def decode(path: Path) -> np.ndarray:
        with open_image(path) as image:
            return np.asarray(image.convert("RGB"))

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        images = list(threads.map(decode, paths))
    for path, image in zip(paths, images, strict=True):
        if image.shape != images[0].shape:
            sizes = "x".join(map(str, image.shape[1::-1])), "x".join(map(str, images[0].shape[1::-1]))
            raise DataError(f"{path}: is {sizes[0]} pixels, others are {sizes[1]}; resize it to the same size")
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous()


def _keep(count: int, subset: int | None) -> np.ndarray:
    return np.arange(count) if subset is None else np.sort(order(count, seed=0, epoch=1)[:subset])


def _subset(source: InMemory, subset: int | None) -> InMemory:
    keep = torch.from_numpy(_keep(len(source), subset))
    return replace(source, images=source.images[keep], labels=source.labels[keep])


# --- batches ----------------------------------------------------------------------------------------------


Batch = tuple[np.ndarray, Shape | None]  # indices of images, and the shape at which they are read (default: square)


class _Batches(Dataset):
    """Batch i of a list of them; what goes wrong is returned, not raised, and so crosses processes whole."""

    def __init__(self, source: Source, batches: list[Batch], seed: int, epoch: int, tolerant: bool):
        self.source, self.batches, self.seed, self.epoch, self.tolerant = source, batches, seed, epoch, tolerant

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor, list[str]] | DataError:
        """Images, labels, and the problems with them."""
        indices, shape = self.batches[i]
        problems: list[str] = []
        how = {"shape": shape, "problems": problems if self.tolerant else None}
        try:
            more = how if isinstance(self.source, Files) else {}
            return *self.source.batch(indices, seed=self.seed, epoch=self.epoch, **more), problems
        except DataError as error:
            return error


def _ignore_signals(_: int) -> None:
    """Workers leave Ctrl-C and SIGTERM, which reach the whole process group, to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stream(
    source: Source,
    batches: list[Batch],
    device: torch.device,
    workers: int,
    problems: Problems,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    workers = min(workers, len(batches)) if isinstance(source, Files) else 0
    pin = device.type == "cuda" and isinstance(source, Files)
    loader = DataLoader(
        _Batches(source, batches, seed, epoch, tolerant=problems is not None),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # its own, so that the global generator is left alone
        worker_init_fn=_ignore_signals,
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        images, labels, messages = item
        if messages:
            problems.extend(messages)
        if len(labels):
            yield images.to(device, non_blocking=True).float() / source.top, labels.to(device, non_blocking=True)


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    device: torch.device,
    first: int = 0,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    problems: Problems = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch of one epoch, from batch `first` on: images in [0, 1] and labels.

    batch_size counts the images of all processes together; the last, incomplete batch of an epoch is dropped.
    An unreadable image raises DataError, or, with a list of problems, is named there and replaced (`Files.batch`).
    """
    shuffled = order(len(source), seed=seed, epoch=epoch)
    whole = [shuffled[i : i + batch_size] for i in range(0, len(source) - batch_size + 1, batch_size)]
    share = batch_size // processes
    mine = [(batch[rank * share : (rank + 1) * share], None) for batch in whole[first:]]
    return _stream(source, mine, device, workers, problems, seed, epoch)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
    problems: Problems = None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once over all processes, not augmented: images in [0, 1] and labels.

    In the order of the source, and one shape after the other where the source is rectangular.  An unreadable image
    raises DataError, or, with a list of problems, is named there and left out; no batch is empty.
    """
    mine = np.arange(len(source))[rank::processes]
    groups: dict[Shape | None, list[int]] = {}
    for i, shape in zip(mine, source.shapes(mine) if isinstance(source, Files) else [None] * len(mine), strict=True):
        groups.setdefault(shape, []).append(i)
    batches = [
        (np.array(group[i : i + batch_size]), shape)
        for shape, group in groups.items()
        for i in range(0, len(group), batch_size)
    ]
    return _stream(source, batches, device, workers, problems)


# --- smaller copies ---------------------------------------------------------------------------------------

Job = tuple[Paths, dict[int, Path]]  # images, and by short side the folders for their copies


def plan_copies(root: Path, out: Path, sides: list[int]) -> list[Job]:
    """What is to be copied where: the training images, the test images.  Raises DataError."""
    parts = _parts(root)
    if out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out}: lies in {root}; choose a folder outside of it for the copies")
    if _holds_images(out):
        raise DataError(f"{out}: holds images itself; choose a new folder for the copies")
    classes = _folders(parts[0])
    jobs = [(_list_images(part, classes)[0], {side: out / str(side) / part.name for side in sides}) for part in parts]
    for paths, _ in jobs:
        for name, following in pairwise(paths.names.tolist()):
            if copy_name(name) >= copy_name(following) and name.split("/")[0] == following.split("/")[0]:
                reason = f"its copy, a .jpg, would not come after that of {name}"
                raise DataError(f"{paths.root / following}: {reason}; rename one of them")
    return jobs


def copy_name(name: str) -> str:
    return os.path.splitext(name)[0] + ".jpg"


def make_folders(jobs: list[Job], out: Path) -> None:
    """Make the folders for the copies, without what a killed process left in them.  Raises DataError."""
    folders = [root / name for paths, targets in jobs for root in targets.values() for name in _folders(paths.root)]
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / UNFINISHED).write_text(shlex.join(["python", *sys.argv]))
        for path in folders:
            path.mkdir(parents=True, exist_ok=True)
            for remains in path.glob(".*.jpg.*"):
                remains.unlink()
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot write there ({error.strerror})") from None


def shrink(name: str, *, source: Path, targets: dict[int, Path], quality: int) -> str | None:
    """Write the copies of source/name that are not there yet into the folders `targets`, by short side, as RGB JPEG.

    An image whose short side is no longer than that is copied as it is.  Returns the message if it is unreadable.
    """
    paths = {side: root / copy_name(name) for side, root in targets.items()}
    paths = {side: path for side, path in paths.items() if not (path.exists() and path.stat().st_size)}
    if not paths:
        return None
    try:
        with open_image(source / name) as image:
            short, size = min(image.size), image.size
            image.draft("RGB", tuple(2 * max(paths) * length // short + 1 for length in size))
            pixels = image.convert("RGB")
    except DataError as error:
        return str(error)
    for side, path in paths.items():
        content = io.BytesIO()
        if short > side:
            # Rounded up: 4:3 must not become a little less, which `rectangle` would take for a shorter shape.
            smaller = [-(-length * side // short) for length in size]
            pixels.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0).save(content, "JPEG", quality=quality)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        temporary.write_bytes(content.getvalue() or (source / name).read_bytes())
        os.replace(temporary, path)
    return None


def shrink_all(jobs: list[Job], quality: int) -> Iterator[str | None]:
    """Copy all images, in a process for each core: the message of each that is unreadable, None for the others."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    with ProcessPoolExecutor(cores, initializer=_end_with_parent) as pool:
        try:
            for paths, targets in jobs:
                copy = partial(shrink, source=paths.root, targets=targets, quality=quality)
                yield from pool.map(copy, paths.names.tolist(), chunksize=16)
        finally:
            pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """Let this process end with the one that started it, however that one ends, and by no other signal."""
    _ignore_signals(0)
    warnings.simplefilter("ignore")  # PIL's, on metadata

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def option(text: str, **limits: int) -> typer.models.OptionInfo:
    return typer.Option(help=text, **limits)


def main(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="DIR/train/<class>/*, and DIR/val or DIR/test.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="For the copies: OUT/<short side>/train/<class>/*.")],
    short_side: Annotated[list[int], option("Pixels; once for each set of copies.", min=32)] = [160, 352],  # noqa: B006
    quality: Annotated[int, option("JPEG quality of the copies.", min=1, max=95)] = 90,
) -> int:
    """Make smaller copies of an image folder, decoded faster.  Killed, the same command goes on where it was."""
    jobs = plan_copies(root, out, sorted(set(short_side)))
    make_folders(jobs, out)
    console, total = Console(soft_wrap=True, highlight=False), sum(len(paths) for paths, _ in jobs)
    try:
        unreadable = collect(shrink_all(jobs, quality), total, console)
    except BrokenProcessPool:
        raise Failure("a process was killed (out of memory?); the same command goes on from here", 1) from None
    except KeyboardInterrupt:
        raise Failure("stopped; the same command goes on from here", 130) from None
    (out / UNFINISHED).unlink()
    print(*unreadable, sep="\n", end="\n" * bool(unreadable), file=sys.stderr)
    left_out = f" ({len(unreadable)} unreadable, left out)" * bool(unreadable)
    total -= len(unreadable)
    console.print(f"{total} images in {out}{left_out}; now: python train.py imagenet --data-dir {out}")
    return 1 if unreadable else 0


def collect(messages: Iterator[str | None], total: int, console: Console) -> list[str]:
    """The messages, while a bar or now and then a line shows how far it is."""
    found, said = [], time.monotonic()
    with closing(messages), progress_bar(console, "copying", total) as show:
        for done, message in enumerate(messages, 1):
            show(done)
            found += [message] if message else []
            if not console.is_terminal and time.monotonic() > said + 30:
                said = time.monotonic()
                console.print(f"{done} of {total} images")
    return found


if __name__ == "__main__":
    sys.exit(run_command(main))
