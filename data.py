"""Section 4: the data.  Images with pixels in [0, 1], and every batch a pure function of (seed, epoch, step).

    digits    scikit-learn's 8x8 digits: nothing to download
    cifar10   torchvision's layout (downloaded if absent), or a folder DIR/train/<class>/*, DIR/test/<class>/*
    imagenet  DIR/train/<wnid>/*, DIR/val/<wnid>/*
    FOLDER    any folder laid out like one of the last two

Small images live in memory as uint8 and are augmented a batch at a time; large ones are decoded by worker
processes.  In both cases the order of an epoch depends on (seed, epoch) alone, and the augmentation of an
image on (seed, epoch, its index) alone: not on the batch, the process, the worker, or what came before.  So a
run can resume in the middle of an epoch, and any number of processes can share a batch, without saving or
sending random states.
"""

import os
import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils.data import DataLoader, Dataset

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 64  # pixels: folders of images up to this size are held in memory


class DataError(ValueError):
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


@dataclass(frozen=True)
class Files:
    """Images decoded on demand as uint8 (N, 3, size, size), with random resized crop and flip if `train`."""

    paths: Sequence[Path]
    labels: Tensor
    size: int = 224
    train: bool = False
    min_scale: float = 0.08
    top: int = 255

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "Files":
        return self

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
        """Pixels, 0 to 255, and labels of the images at `indices`.  Raises DataError, naming the file."""
        u = uniforms(seed, epoch, indices, 6)[:, 1:]
        images = [self._image(self.paths[i], row) for i, row in zip(indices, u, strict=True)]
        return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2), self.labels[torch.from_numpy(indices)]

    def _image(self, path: Path, u: np.ndarray) -> np.ndarray:
        with open_image(path) as image:
            box = random_box(*image.size, self.min_scale, u) if self.train else centre_box(*image.size)
            pixels = np.asarray(crop(image, box, self.size))
        return pixels[:, ::-1].copy() if self.train and u[4] < 0.5 else pixels


Source = InMemory | Files


def fetch(source: Source, indices: np.ndarray, device: torch.device) -> tuple[Tensor, Tensor]:
    """The images at `indices`, in [0, 1], and their labels, on the device; augmented only if the source is."""
    images, labels = source.batch(indices, seed=0, epoch=0)
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


def centre_box(width: int, height: int) -> Box:
    """The central square, 7/8 of the shorter side: what "resize to 256, crop 224" shows of an image."""
    side = min(width, height) * 224 / 256
    left, top = (width - side) / 2, (height - side) / 2
    return left, top, left + side, top + side


def crop(image: Image.Image, box: Box, size: int) -> Image.Image:
    """The box of the image, resized to size x size.  JPEG is decoded no larger than that needs."""
    width, height = image.size
    scale = size / min(box[2] - box[0], box[3] - box[1])
    image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
    sx, sy = image.size[0] / width, image.size[1] / height
    box = (box[0] * sx, box[1] * sy, min(box[2] * sx, image.size[0]), min(box[3] * sy, image.size[1]))
    return image.convert("RGB").resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


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
    """Images in root/train/<class>/* and root/test/<class>/* (or val/): in memory if small, else from disk."""
    if not (root / "train").is_dir():
        raise DataError(f"{root}: no folder train in it; expected {root}/train/<class>/* and test/ or val/ beside it")
    held_out = next((root / part for part in ("test", "val") if (root / part).is_dir()), None)
    if held_out is None:
        raise DataError(f"{root}: no folder test or val in it; expected test/<class>/* beside train/")
    classes = _folders(root / "train")
    paths, labels = _list_images(root / "train", classes, subset)
    test_paths, test_labels = _list_images(held_out, classes, subset)
    with open_image(paths[0]) as first:
        small = max(first.size) <= SMALL
    if not small:
        return Data(Files(paths, labels, train=True), Files(test_paths, test_labels), classes, channels=3)
    train = InMemory(_decode(paths), labels, augmentation=CIFAR)
    test = InMemory(_decode(test_paths), test_labels)
    if train.images.shape[1:] != test.images.shape[1:]:
        raise DataError(f"{held_out}: images differ in size from those in {root / 'train'}; resize them")
    return Data(train, test, classes, channels=3)


def _folders(root: Path) -> list[str]:
    classes = sorted(entry.name for entry in os.scandir(root) if entry.is_dir())
    if len(classes) < 2:
        raise DataError(f"{root}: {len(classes)} class folders in it; expected at least 2, each a class's images")
    return classes


def _list_images(root: Path, classes: list[str], subset: int | None) -> tuple[list[Path], Tensor]:
    """Paths and labels in a fixed order, or a fixed random subset of them."""
    if unknown := sorted(set(_folders(root)) - set(classes)):
        raise DataError(f"{root / unknown[0]}: no training images for this class; it is not in train/")
    found = []
    for label, name in enumerate(classes):
        if (root / name).is_dir():
            files = sorted(e.name for e in os.scandir(root / name) if e.name.lower().endswith(EXTENSIONS))
            found += [(root / name / file, label) for file in files]
    if not found:
        raise DataError(f"{root}: no images in its class folders; known kinds are {' '.join(EXTENSIONS)}")
    kept = [found[i] for i in _keep(len(found), subset)]
    return [path for path, _ in kept], torch.tensor([label for _, label in kept])


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


class _Batches(Dataset):
    """Batch i of a list of index arrays; errors are returned, not raised, and so cross processes whole."""

    def __init__(self, source: Source, batches: list[np.ndarray], seed: int, epoch: int):
        self.source, self.batches, self.seed, self.epoch = source, batches, seed, epoch

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor] | DataError:
        try:
            return self.source.batch(self.batches[i], seed=self.seed, epoch=self.epoch)
        except DataError as error:
            return error


def _ignore_signals(_: int) -> None:
    """Workers leave Ctrl-C and SIGTERM, which reach the whole process group, to the process that trains."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _stream(
    source: Source,
    batches: list[np.ndarray],
    device: torch.device,
    workers: int,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    workers = min(workers, len(batches)) if isinstance(source, Files) else 0
    pin = device.type == "cuda" and isinstance(source, Files)
    dataset = _Batches(source, batches, seed, epoch)
    loader = DataLoader(
        dataset,
        batch_size=None,
        num_workers=workers,
        pin_memory=pin,
        generator=torch.Generator(),  # its own, so that the global generator is left alone
        worker_init_fn=_ignore_signals,
    )
    for item in loader:
        if isinstance(item, DataError):
            raise item
        images, labels = (part.to(device, non_blocking=True) for part in item)
        yield images.float() / source.top, labels


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
) -> Iterator[tuple[Tensor, Tensor]]:
    """This process's share of every batch of one epoch, from batch `first` on: images in [0, 1] and labels.

    batch_size counts the images of all processes together; the last, incomplete batch of an epoch is dropped.
    """
    shuffled = order(len(source), seed=seed, epoch=epoch)
    whole = [shuffled[i : i + batch_size] for i in range(0, len(source) - batch_size + 1, batch_size)]
    share = batch_size // processes
    mine = [batch[rank * share : (rank + 1) * share] for batch in whole[first:]]
    return _stream(source, mine, device, workers, seed, epoch)


def evaluation_batches(
    source: Source,
    *,
    batch_size: int,
    device: torch.device,
    rank: int = 0,
    processes: int = 1,
    workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Every image once over all processes, in order, not augmented: images in [0, 1] and labels."""
    mine = np.arange(len(source))[rank::processes]
    batches = [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)]
    return _stream(source, batches, device, workers)
