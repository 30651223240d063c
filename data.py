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

import atexit
import io
import os
import shlex
import signal
import sys
import threading
import traceback
import warnings
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import cycle, pairwise, starmap
from multiprocessing import get_context, parent_process
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from runs import Failure, Unusable, explain, progress_bar, run_command
from runs import replace as write

NAMES = "digits", "cifar10", "imagenet"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 64  # pixels: folders of images up to this size are held in memory
TRIES = 2000  # images in a row: a lost class of ImageNet (1300) does not end a run, a lost disk does
EXPECTED = "expected train/<class>/*, and test/ or val/ beside it"
UNFINISHED = "unfinished"  # the file that marks a folder of copies to which some are still to come


class DataError(Unusable):
    """Data that is missing or cannot be used; the message is one line and says what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


def one_line(text: str) -> str:
    """The text on one line that every terminal of UTF-8 can show: file names may hold any bytes."""
    return " ".join(text.encode(errors="backslashreplace").decode().split())


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


def augment(
    images: Tensor, u: Tensor, *, border: int = 4, fill: int | None = 128, flip: bool = True, cutout: int = 16
) -> Tensor:
    """Images (N, C, H, W) augmented by the uniform numbers u (N, 5): like images, but float.

    Random crop after padding by `border` with value `fill` (None: with the image, reflected), horizontal flip, and
    cutout: a square of side `cutout`, centred anywhere and clipped at the border, is filled with its own mean colour.
    """
    y, x = (torch.arange(length, device=u.device) for length in images.shape[2:])
    corner = (u[:, :2] * (2 * border + 1)).long()
    rows, columns = corner[:, :1] + y, corner[:, 1:] + x
    if flip:
        columns = torch.where(u[:, 2:3] < 0.5, columns.flip(1), columns)
    how = {"mode": "reflect"} if fill is None else {"value": fill}
    padded = pad(images, (border,) * 4, **how)
    image = torch.arange(len(images), device=u.device)[:, None, None]
    images = padded[image, :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2).float()
    if not cutout:
        return images
    even = cutout % 2 == 0
    top, left = ((u[:, [k]] * (len(line) + even)).long() - cutout // 2 for k, line in ((3, y), (4, x)))
    mask = ((y >= top) & (y < top + cutout))[:, None, :, None] & ((x >= left) & (x < left + cutout))[:, None, None]
    mean = (images * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    return torch.where(mask, mean, images)


@dataclass(frozen=True)
class InMemory:
    """Images held as uint8 (N, C, H, W) with values 0 to `top`, and labels (N,)."""

    images: Tensor
    labels: Tensor
    top: int = 255
    augmented: bool = False
    cutout: bool = True  # of the augmentation: grey borders and cutout, or else reflected borders alone
    notes: Sequence[str] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def to(self, device: torch.device) -> "InMemory":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, indices: np.ndarray, _: None = None, *, seed: int, epoch: int) -> tuple[Tensor, Tensor, list[str]]:
        """Pixels, 0 to `top`, and labels of the images at `indices`; all have one shape, and none is unreadable."""
        where = torch.from_numpy(indices).to(self.images.device)
        images = self.images[where]
        if self.augmented:
            # Column 0 ordered the epoch; the augmentation has the others to itself.
            u = torch.from_numpy(uniforms(seed, epoch, indices, 6)[:, 1:]).to(images.device)
            images = augment(images, u) if self.cutout else augment(images, u, fill=None, cutout=0)
        return images, self.labels[where], []


Shape = tuple[int, int]  # height, width
Batch = tuple[Tensor, Tensor]  # images in [0, 1], labels
Stop = Callable[[], bool] | None  # asked once a second while nothing comes, whether to wait no longer
Problems = list[str] | None  # collects a line for each unreadable image; without it, they raise DataError


@dataclass(frozen=True, eq=False)
class Files:
    """Images root/name decoded on demand, with random resized crop and flip if `train`.

    The names are one array, which forked processes share and do not copy.  `copies` has the folders of pre-resized
    copies by their short sides, or {0: that of the originals}; `root` is one of them.
    """

    root: Path
    names: np.ndarray
    labels: Tensor
    classes: Sequence[str]
    copies: dict[int, Path]
    channels: int = 3
    size: int = 224
    train: bool = False
    min_scale: float = 0.08
    rectangular: bool = False
    top: int = 255
    notes: Sequence[str] = ()
    known: dict[int, Shape] = field(default_factory=dict, init=False, repr=False)  # see `shapes`

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self.root / str(self.names[i])

    def to(self, device: torch.device) -> "Files":
        return self

    def at(self, size: int, **fields: float | bool) -> "Files":
        """The same images at another size, from the smallest copies with a fifth to spare, or else the largest."""
        large_enough = [side for side in self.copies if 5 * side >= 6 * size]
        return replace(self, root=self.copies[min(large_enough, default=max(self.copies))], size=size, **fields)

    def shapes(self, indices: np.ndarray) -> list[Shape]:
        """At which the images are evaluated; of an unreadable one: the square.  Each header is read once."""

        def look(i: int) -> None:
            with suppress(DataError), open_image(self.path(i)) as image:  # whoever decodes it meets the error again
                self.known[i] = rectangle(*image.size, self.size)

        unknown = [i for i in indices.tolist() if i not in self.known] if self.rectangular else []
        with ThreadPoolExecutor(16) as threads:  # they wait for the disk
            list(threads.map(look, unknown))
        return [self.known.get(i, (self.size, self.size)) for i in indices.tolist()]

    def batch(
        self, indices: np.ndarray, shape: Shape | None = None, *, seed: int, epoch: int
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Pixels, 0 to 255, (N, height, width, channels), and labels of the images at `indices`; what went wrong.

        All of one shape (default: the square).  An unreadable image is named and left out; if `train`, the next
        readable one takes its place, with its own label and the crop and flip that were drawn for the place (so it
        is not seen twice alike).  DataError after TRIES in a row.
        """
        shape = shape or (self.size, self.size)
        tries = min(TRIES, len(self)) if self.train else 1
        pixels, shown, problems = [], [], []
        for index, u in zip(indices.tolist(), uniforms(seed, epoch, indices, 6)[:, 1:], strict=True):
            for i in ((index + k) % len(self) for k in range(tries)):
                try:
                    pixels.append(self._image(self.path(i), u, shape))
                    shown.append(i)
                    break
                except DataError as error:
                    problems.append(str(error))
            else:
                if self.train:
                    reason = f"nor is any of the {tries - 1} images after it: is the disk there?"
                    raise DataError(f"{problems[-tries]}; {reason}")
        stacked = np.array(pixels, dtype=np.uint8).reshape(-1, *shape, self.channels)
        return stacked, self.labels[shown].numpy(), problems

    def _image(self, path: Path, u: np.ndarray, shape: Shape) -> np.ndarray:
        with open_image(path) as image:
            box = random_box(*image.size, self.min_scale, u) if self.train else centre_box(*image.size, shape)
            pixels = np.asarray(crop(image, box, shape, self.channels))
        return pixels[:, ::-1] if self.train and u[4] < 0.5 else pixels


Source = InMemory | Files


# --- pixels -----------------------------------------------------------------------------------------------


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Context: a PIL image, opened but not yet decoded.  Raises DataError, naming the file, here or on decoding."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise DataError(f"{path}: not a readable image ({error}); replace it or remove it") from None


def eight_bits(image: Image.Image, channels: int = 3) -> Image.Image:
    """The image as RGB or grey, with 16 bits scaled to 8.  Raises ValueError where numbers have no defined range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # of TIFF: 258 bits of a sample, perhaps 12; 262 whether 0 is white
        pixels = np.asarray(image) / (2 ** tags.get(258, (16,))[0] - 1)
        pixels = 1 - pixels if tags.get(262) == 0 else pixels
        image = Image.fromarray(np.rint(255 * pixels).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"the numbers of PIL's mode {image.mode} have no defined range: store 8 or 16 bits")
    return image.convert("RGB" if channels == 3 else "L")


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


def crop(image: Image.Image, box: Box, shape: Shape, channels: int = 3) -> Image.Image:
    """The box of the image, resized to a shape.  JPEG is decoded no larger than that needs."""
    (h, w), (width, height) = shape, image.size
    scale = max(w / (box[2] - box[0]), h / (box[3] - box[1]))
    image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
    sx, sy = image.size[0] / width, image.size[1] / height
    box = (box[0] * sx, box[1] * sy, min(box[2] * sx, image.size[0]), min(box[3] * sy, image.size[1]))
    return eight_bits(image, channels).resize((w, h), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


# --- image folders: what lies where -----------------------------------------------------------------------


def _holds_images(root: Path) -> bool:
    return any((root / part).is_dir() for part in ("train", "test", "val"))


def image_sets(root: Path) -> dict[int, Path]:
    """The folders that hold train/, test/ or val/: {0: root}, or those of the copies in root by their short side."""
    if _holds_images(root):
        return {0: root}
    copies = {int(path.name): path for path in root.glob("*") if path.name.isdecimal() and _holds_images(path)}
    if copies and (root / UNFINISHED).exists():
        raise DataError(f"{root}: the copies in it are not complete; run {(root / UNFINISHED).read_text()} again")
    return copies


def part_of(sets: dict[int, Path], *names: str, classes: Sequence[str] | None = None, channels: int = 3) -> Files:
    """The images of the folder of this name, labelled by `classes`, or else by those of the folder.

    Of several names, the first that has a folder of a class is taken: ImageNet's own test/ has none.  All copies must
    hold the same images.  Raises DataError.
    """
    root = sets[max(sets)]
    there = [name for name in names if (root / name).is_dir()]
    if not there:
        raise DataError(f"{root}: no folder {' or '.join(names)} in it; {EXPECTED}")
    name = max(there, key=lambda part: any(not classes or folder in classes for folder in _folders(root / part)))
    files = list_images(root / name)
    if len(classes or files.classes) < 2:
        raise DataError(f"{files.root}: {len(files.classes)} class folders in it; expected at least 2")
    for copy in (place / name for place in sets.values() if place != root):
        if odd := sorted({*files.names.tolist()} ^ {*list_images(copy).names.tolist()}):
            raise DataError(f"{odd[0]}: is in only one of {files.root} and {copy}; make it again, or remove the other")
    passed = f"{root / there[0]}: passed over, since it has no folders of the classes, unlike {files.root}"
    notes = [passed, *files.notes] if name != there[0] else files.notes
    copies = {side: place / name for side, place in sets.items()}
    classes = classes or files.classes
    labels = _labels(files.labels, files.classes, classes, files.root)
    return replace(files, labels=labels, classes=classes, copies=copies, channels=channels, notes=notes)


def held_out(sets: dict[int, Path], channels: int = 3, classes: Sequence[str] | None = None, split: float = 0) -> Files:
    """The images of test/ or val/, or the share `split` of train/ where there is neither.

    Labelled by `classes`, or else by those of train/, or else by their own.  Raises DataError.
    """
    root = sets[max(sets)]
    known = classes or _folders(root / "train")
    if not split:
        return part_of(sets, "test", "val", classes=known, channels=channels)
    for part in (root / "test", root / "val"):
        if part.is_dir():
            raise DataError(f"{part}: is there, so no training images need be kept for testing: leave out --split")
    return _share(part_of(sets, "train", classes=known, channels=channels), split, kept=True)


def _labels(labels: Tensor, own: Sequence[str], classes: Sequence[str], where: str | Path) -> Tensor:
    """The labels that count in `classes`, of those that count in `own`.  Raises DataError."""
    if unknown := sorted(set(own) - set(classes)):
        known = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        raise DataError(f"{where}/{unknown[0]}: no training images for this class; the classes are {known}")
    return torch.tensor([classes.index(name) for name in own])[labels]


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def list_images(root: Path) -> Files:
    """All images in the folders of root, the classes, and in folders inside these, as torchvision's ImageFolder.

    But what is hidden (.DS_Store, ._x.png) is no image and no class.  Raises DataError.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    number = {name: i for i, name in enumerate(_folders(root))}
    names, labels, passed = [], [], []
    for path, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        inside = path[len(str(root)) + 1 :].replace(os.sep, "/")
        if inside.count("/") > 20:
            raise DataError(f"{path}: cannot be read (a link to a folder that holds the link?)")
        hidden = {name for name in folders if name[0] == "."}
        images = sorted(name for name in files if inside and name[0] != "." and name.lower().endswith(EXTENSIONS))
        names += [f"{inside}/{name}" for name in images]
        labels += [number.get(inside.split("/")[0])] * len(images)
        passed += sorted(os.path.join(inside, name) for name in hidden.union(files).difference(images))
        folders[:] = sorted({*folders} - hidden)  # where to go on
    if not names:
        raise DataError(f"{root}: no images in its class folders; known kinds are {' '.join(EXTENSIONS)}")
    empty = sorted(number.keys() - {name.split("/")[0] for name in names})
    said = {"passed over as no images of a class": passed, "class folders without images": empty}
    said = "; ".join(f"{len(odd)} {what} ({', '.join(odd[:3])})" for what, odd in said.items() if odd)
    notes = [one_line(f"{root}: {said}")] if said else []
    return Files(root, np.array(names), torch.tensor(labels), list(number), {0: root}, notes=notes)


def _chosen(source: Source, which: np.ndarray) -> Source:
    pixels = {"images": source.images[which]} if isinstance(source, InMemory) else {"names": source.names[which]}
    return replace(source, labels=source.labels[which], **pixels)


def _subset(source: Source, subset: int | None) -> Source:
    """`subset` of the images, the first in a fixed random order."""
    return _chosen(source, np.sort(order(len(source), seed=0, epoch=1)[:subset]))


def _share(files: Files, split: float, *, kept: bool) -> Files:
    """The images that are kept for testing, or the others: a fixed function of each name, whatever else there is."""
    stems = [os.fsencode(os.path.splitext(name)[0]) for name in files.names.tolist()]
    which = (np.array([zlib.crc32(stem) for stem in stems]) < split * 2**32) == kept
    if not which.any():
        raise DataError(f"{files.root}: --split {split} leaves no image for {'testing' if kept else 'training'}")
    return _chosen(files, which)


def _held(files: Files) -> Source:
    """The images in memory, if they are originals and the first is small; all must have its size then."""
    if 0 not in files.copies:
        return files
    with open_image(files.path(0)) as first:
        if max(first.size) > SMALL:
            return files

    def decode(i: int) -> np.ndarray:
        with open_image(files.path(i)) as image:
            pixels = np.asarray(eight_bits(image, files.channels))
        if image.size != first.size:
            sizes = "{}x{} pixels, others are {}x{}".format(*image.size, *first.size)
            raise DataError(f"{files.path(i)}: is {sizes}; resize it to the same size")
        return pixels.reshape(*pixels.shape[:2], files.channels)

    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as threads:
        images = np.stack(list(threads.map(decode, range(len(files)))))
    return InMemory(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous(), files.labels, notes=files.notes)


# --- data sets --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Data:
    """Training and test images, and the names of the classes in the order of their labels."""

    train: Source
    test: Source
    classes: list[str]
    channels: int

    @property
    def small(self) -> bool:
        """Whether the images are small enough to be held in memory."""
        return isinstance(self.train, InMemory)

    @property
    def notes(self) -> list[str]:
        """Lines for the user, on what is odd about the folders."""
        return [*self.train.notes, *self.test.notes]

    @property
    def short_side(self) -> int:
        """Median short side of the training images, in pixels; of a hundred of them where they are files."""
        if self.small:
            return min(self.train.images.shape[2:])
        sides = []
        for i in order(len(self.train), seed=0, epoch=0)[:100]:
            with suppress(DataError), open_image(self.train.path(i)) as image:
                sides.append(min(image.size))
        return int(np.median(sides or self.train.size))

    def at(self, *, size: int, min_scale: float, rectangular: bool, cutout: bool = True) -> "Data":
        """The same images at another size; images held in memory stay as they are, augmented with or without cutout.

        Training shows random resized crops of at least min_scale of an image's area; the test images are evaluated in
        squares or, if `rectangular`, in the shape that `rectangle` gives each of them.
        """
        if self.small:
            return replace(self, train=replace(self.train, cutout=cutout))
        test = self.test.at(size, rectangular=rectangular)
        return replace(self, train=self.train.at(size, min_scale=min_scale), test=test)


Place = str | os.PathLike | None


def place(name: str, data_dir: Place = None) -> Path:
    """The folder of a data set: what the user says, or the default.  Raises DataError where none can be there.

    digits, cifar10 and imagenet are names, whatever lies in the working directory; all else is a folder's path.
    """
    default = {"imagenet": ["data/imagenet", "data"], "cifar10": ["data"], "digits": ["data"]}.get(name, [name])
    roots = [Path(root) for root in (default if data_dir is None else [data_dir])]
    found = next((root for root in roots if name != "digits" and image_sets(root)), None)
    if found or name in ("digits", "cifar10"):
        return found or roots[0]
    if not roots[0].is_dir() and name not in NAMES:
        missing = f"{roots[0]}: no such folder" if data_dir or os.sep in name else f"unknown data set {name!r}"
        known = f"a data set is {', '.join(NAMES)}, or the path of an image folder"
        raise DataError(f"{missing}; {known}; where it has moved, --data-dir names the place")
    where, instead = " and ".join(map(str, roots)), "; --data-dir names another place" * (name in NAMES)
    raise DataError(f"{where}: no folder train in it; {EXPECTED}{instead}")


def stored_place(options: dict[str, Any]) -> Path | None:
    """Where the images of a run are, by the options in its config.json; None: where `place` looks by itself."""
    name, data_dir = options["dataset"], options.get("data_dir")
    if name in NAMES:
        return Path(data_dir) if data_dir else None
    # Runs made before kept a folder's path as it was given, and, unless told otherwise, the absolute path of ./data.
    there = Path(data_dir or "").parent / name
    return there if there.is_dir() else Path(name)


def load(name: str, data_dir: Place = None, *, subset: int | None = None, channels: int = 3, split: float = 0) -> Data:
    """The data set `name`, or its first `subset` training and test images in a fixed random order.

    Its place is data_dir, or the default (`place`); images of folders are read as RGB, or grey if channels is 1.
    Of a folder without a test part, the share `split` is kept for testing.  Raises DataError.
    """
    sets = {} if name == "digits" else image_sets(place(name, data_dir))
    if not sets:
        loaded = digits() if name == "digits" else cifar10(place(name, data_dir))
        return replace(loaded, train=_subset(loaded.train, subset), test=_subset(loaded.test, subset))
    train, test = part_of(sets, "train", channels=channels), held_out(sets, channels, split=split)
    train = _share(train, split, kept=False) if split else train
    train, test = _subset(train, subset), _subset(test, subset)
    held = _held(train)
    if isinstance(held, Files):
        return Data(replace(train, train=True), test, train.classes, channels)
    held_test = _held(test)
    if isinstance(held_test, Files) or held.images.shape[1:] != held_test.images.shape[1:]:
        raise DataError(f"{test.root}: images differ in size from those in {train.root}; resize them")
    return Data(replace(held, augmented=True), held_test, train.classes, channels)


def load_test(
    name: str, data_dir: Place = None, *, classes: list[str] | None = None, channels: int = 3, split: float = 0
) -> tuple[Source, list[str]]:
    """The test images of a data set and its classes; of an image folder, which may lack train/, those alone.

    With `classes`, those that a network knows, labels follow these names.  Otherwise as `load`.  Raises DataError.
    """
    if name != "digits" and (sets := image_sets(place(name, data_dir))):
        files = held_out(sets, channels, classes, split)
        return _held(files), files.classes
    loaded = load(name, data_dir)
    classes = classes or loaded.classes
    return replace(loaded.test, labels=_labels(loaded.test.labels, loaded.classes, classes, name)), classes


def digits() -> Data:
    """scikit-learn's 1797 digits, 8x8 with values 0 to 16, in a fixed random order: 1000 train, 797 test."""
    from sklearn.datasets import load_digits  # here, since only this data set needs it

    bunch = load_digits()
    shuffled = order(len(bunch.target), seed=0, epoch=0)
    images = torch.from_numpy(bunch.images.astype(np.uint8))[shuffled, None]
    labels = torch.from_numpy(bunch.target)[shuffled]
    train, test = InMemory(images[:1000], labels[:1000], 16), InMemory(images[1000:], labels[1000:], 16)
    return Data(train, test, [str(i) for i in range(10)], channels=1)


def cifar10(data_dir: Path) -> Data:
    """CIFAR-10 as torchvision stores it, downloaded into data_dir when it is not there."""
    from torchvision.datasets import CIFAR10

    layout = "cifar-10-batches-py inside it, or train/<class>/* and test/<class>/*"
    try:
        download = not (data_dir / CIFAR10.base_folder).is_dir()
        parts = [CIFAR10(data_dir, train=train, download=download) for train in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason = str(error).split(". ")[0]
        raise DataError(f"--data-dir {data_dir}: no usable CIFAR-10 ({reason}); it should hold {layout}") from None
    images = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (InMemory(*pair) for pair in zip(images, [torch.tensor(p.targets) for p in parts], strict=True))
    return Data(replace(train, augmented=True), test, list(parts[0].classes), channels=3)


# --- batches ----------------------------------------------------------------------------------------------


def fetch(source: Source, indices: np.ndarray, device: torch.device, *, problems: Problems = None) -> Batch:
    """The images at `indices`, in [0, 1], and their labels, on the device; augmented only if the source is.

    Unreadable images raise DataError, or are left out and named in `problems`.
    """
    return next(_stream(source, [(indices, None)], device=device, problems=problems))


def _stream(
    source: Source,
    batches: Sequence[tuple],
    *,
    device: torch.device,
    workers: int = 0,
    problems: Problems = None,
    stop: Stop = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The batches, read by `workers` processes if they are files, in [0, 1] on the device.

    An unreadable image raises DataError, or, with a list of problems, is named there and replaced or left out
    (`Files.batch`).  While no batch is there, `stop` is asked once a second whether to end without the rest.
    """
    files = isinstance(source, Files)
    read = partial(source.batch, seed=seed, epoch=epoch)
    with closing(in_processes(read, batches, files * min(workers, len(batches)), "try fewer --workers", stop)) as found:
        for images, labels, said in found:
            if problems is not None:
                problems += said
            elif said:
                raise DataError(said[0])
            if files:
                images, labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels)
                if device.type == "cuda":
                    images, labels = images.pin_memory(), labels.pin_memory()
            yield images.to(device, non_blocking=True).float() / source.top, labels.to(device, non_blocking=True)


def training_batches(
    source: Source,
    *,
    batch_size: int,
    seed: int,
    epoch: int,
    first: int = 0,
    rank: int = 0,
    processes: int = 1,
    **how: Any,
) -> Iterator[Batch]:
    """This process's share of every batch of one epoch, from batch `first` on: images in [0, 1] and labels.

    batch_size counts the images of all processes together; the last, incomplete batch of an epoch is dropped.
    How they are read: device, workers, problems, stop, as `_stream` says.
    """
    shuffled, share = order(len(source), seed=seed, epoch=epoch), batch_size // processes
    starts = range(first * batch_size, len(source) - batch_size + 1, batch_size)
    mine = [(shuffled[i + rank * share : i + (rank + 1) * share], None) for i in starts]
    return _stream(source, mine, seed=seed, epoch=epoch, **how)


def evaluation_batches(
    source: Source, *, batch_size: int, rank: int = 0, processes: int = 1, **how: Any
) -> Iterator[Batch]:
    """Every image once over all processes, not augmented: images in [0, 1] and labels; no batch is empty.

    In the order of the source, and one shape after the other where the source is rectangular.
    How they are read: device, workers, problems, stop, as `_stream` says.
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
    return (batch for batch in _stream(source, batches, **how) if len(batch[1]))


# --- processes that read ----------------------------------------------------------------------------------


def in_processes(function: Callable, items: Sequence[tuple], count: int, advice: str, stop: Stop = None) -> Iterator:
    """function(*item) for every item, in order, from `count` processes that end with this generator (0: from this one).

    While waiting, `stop` is asked once a second whether to end here.  Raises what the function raises; Failure, with
    `advice`, for a process that is lost.
    """
    # Each process has its own pipe, which needs no shared memory and says at once when its process is gone.  torch's
    # DataLoader interrupts the main process wherever it is when a worker is lost, leaves workers behind when the main
    # process is killed, and cannot end those that a lost disk holds if they are to ignore the signals of a cluster.
    if not count:
        yield from starmap(function, items)
        return
    context = get_context("fork" if sys.platform == "linux" else None)  # which shares a million names, and copies none
    pipes, processes = [], []

    def end() -> None:
        for process in processes:
            process.kill()
        for process in processes:
            process.join(5)

    atexit.register(end)  # where an error keeps this generator alive until then
    try:
        for k in range(count):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(theirs, function, items[k::count]), daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            processes.append(process)
        for pipe, _ in zip(cycle(pipes), items, strict=False):
            while not pipe.poll(1.0):
                if stop and stop():
                    return
            answer = pipe.recv()
            if isinstance(answer, Exception):
                raise answer
            yield answer
    except (EOFError, OSError) as error:
        reason = getattr(error, "strerror", None) or "out of memory?"
        raise Failure(f"a process that reads images is lost ({reason}); {advice}", 1) from None
    finally:
        end()
        atexit.unregister(end)


def _work(pipe: Connection, function: Callable, items: Sequence[tuple]) -> None:
    """A process beside the main one: it ends with that one, however that ends, and by no signal to the whole group."""
    for name in {"SIGINT", "SIGTERM", "SIGHUP"} & set(dir(signal)):  # Windows has no SIGHUP
        signal.signal(getattr(signal, name), signal.SIG_IGN)
    warnings.simplefilter("ignore")  # PIL's, on metadata

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
    for item in items:
        try:
            answer = function(*item)
        except MemoryError:
            return
        except OSError as error:
            answer = Failure(*explain(error))
        except Exception as error:
            answer = error
            error.add_note(traceback.format_exc())  # which a pickle would leave behind
        pipe.send(answer)


# --- smaller copies ---------------------------------------------------------------------------------------


def plan_copies(root: Path, out: Path, sides: Sequence[int]) -> list[tuple[str, str]]:
    """The images of root, and how each copy is named in out/<short side>.  Makes the folders.  Raises DataError."""
    parts = [part_of({0: root}, "train"), held_out({0: root})]
    if out.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{out}: lies in {root}; choose a folder outside of it for the copies")
    if _holds_images(out):
        raise DataError(f"{out}: holds images itself; choose a new folder for the copies")
    names = [f"{files.root.name}/{name}" for files in parts for name in files.names.tolist()]
    pairs = [(name, os.path.splitext(name)[0] + ".jpg") for name in names]
    for (name, copy), (following, its_copy) in pairwise(pairs):
        if copy >= its_copy and os.path.dirname(name) == os.path.dirname(following):
            reason = f"its copy, a .jpg, would not come after that of {name}"
            raise DataError(f"{root / following}: {reason}; rename one of them")
    folders = {f"{files.root.name}/{name}" for files in parts for name in files.classes}.union(
        map(os.path.dirname, names)
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / UNFINISHED).write_text(shlex.join(["python", *sys.argv]))
        for path in (out / str(side) / name for side in sides for name in folders):
            path.mkdir(parents=True, exist_ok=True)
            for remains in path.glob(".*.jpg.*"):  # of a process that was killed
                remains.unlink()
    except OSError as error:
        raise DataError(f"{error.filename or out}: cannot write there ({error.strerror})") from None
    return pairs


def shrink(original: str, copy: str, root: Path, out: Path, sides: Sequence[int], quality: int) -> str | None:
    """Write the copies of root/original that are not yet in out/<short side>/copy, as RGB JPEG.

    An image whose short side is no longer than that is copied as it is.  Returns the message if it is unreadable.
    """
    paths = {side: out / str(side) / copy for side in sides}
    paths = {side: path for side, path in paths.items() if not (path.exists() and path.stat().st_size)}
    if not paths:
        return None
    try:
        with open_image(root / original) as image:
            short, size = min(image.size), image.size
            image.draft("RGB", tuple(2 * max(paths) * length // short + 1 for length in size))
            pixels = eight_bits(image)
    except DataError as error:
        return str(error)
    for side, path in paths.items():
        content = io.BytesIO()
        if short > side:
            # Rounded up: 4:3 must not become a little less, which `rectangle` would take for a shorter shape.
            smaller = [-(-length * side // short) for length in size]
            pixels.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0).save(content, "JPEG", quality=quality)
        write(path, content.getvalue() or (root / original).read_bytes(), sync=False)
    return None


def main(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="DIR/train/<class>/*, and DIR/val or DIR/test.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="For the copies: OUT/<short side>/train/<class>/*.")],
    short_side: Annotated[list[int], typer.Option(help="Pixels; once for each set.", min=32)] = [160, 352],  # noqa: B006
    quality: Annotated[int, typer.Option(help="JPEG quality of the copies.", min=1, max=95)] = 90,
) -> int:
    """Make smaller copies of an image folder, decoded faster.  Killed, the same command goes on where it was."""
    pairs, on = plan_copies(root, out, short_side), "the same command goes on from here"
    console, unreadable = Console(soft_wrap=True, highlight=False), []
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    copy = partial(shrink, root=root, out=out, sides=short_side, quality=quality)
    messages = in_processes(copy, pairs, min(len(pairs), cores), on)
    try:
        with closing(messages), progress_bar(console, "copying", len(pairs)) as show:
            for done, message in enumerate(messages, 1):
                show(done)
                unreadable += [message] if message else []
                if done % 10_000 == 0 and not console.is_terminal:
                    console.print(f"{done} of {len(pairs)} images")
    except KeyboardInterrupt:
        raise Failure(f"stopped; {on}", 130) from None
    (out / UNFINISHED).unlink()
    print(*unreadable, sep="\n", end="\n" * bool(unreadable), file=sys.stderr)
    left_out = f" ({len(unreadable)} unreadable, left out)" * bool(unreadable)
    done = len(pairs) - len(unreadable)
    console.print(f"{done} images in {out}{left_out}; now: python train.py imagenet --data-dir {out}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
