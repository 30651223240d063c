"""Section 4: the data.  Images with pixels in [0, 1], and every batch a pure function of (seed, epoch, step).

    digits    scikit-learn's 8x8 digits: nothing to download
    cifar10   torchvision's layout (downloaded if absent), or a folder DIR/train/<class>/*, DIR/test/<class>/*
    imagenet  DIR/train/<wnid>/*, DIR/val/<wnid>/*
    FOLDER    any folder laid out like one of the last two, or copies of one, made by

    python data.py DIR OUT                         OUT/160 and OUT/352: smaller copies, which are decoded much faster
    python data.py DIR OUT --short-side 256        copies of another size

Small images live in memory as uint8 and are augmented a batch at a time; large ones are decoded by threads.
In both cases the order of an epoch depends on (seed, epoch) alone, and the augmentation of an image on (seed,
epoch, its index) alone: not on the batch, the process, the thread, or what came before.  So a run can resume in
the middle of an epoch, and any number of processes can share a batch, without saving or sending random states.
The shape at which a test image is evaluated depends on that image alone.

Pixels are taken as they are stored: EXIF orientation is not applied (nor is it by torchvision's ImageFolder).
"""

import io
import os
import shlex
import sys
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from rich.console import Console
from torch import Tensor
from torch.nn.functional import pad

from runs import Failure, Unusable, one_line, progress_bar, run_command
from runs import replace as write

NAMES = "digits", "cifar10", "imagenet"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 64  # pixels: folders of images up to this size are held in memory
TRIES = 2000  # images in a row: a lost class of ImageNet (1300) does not end a run, a lost disk does
EXPECTED = "expected train/<class>/*, and test/ or val/ beside it (train.py keeps a share of train/ with --split 0.2)"
UNFINISHED = "unfinished"  # the file that marks a folder of copies to which some are still to come

Shape = tuple[int, int]  # height, width
Batch = tuple[Tensor, Tensor]  # images in [0, 1], labels
Stop = Callable[[], bool] | None  # asked once a second while nothing comes, whether to wait no longer
Problems = list[str] | None  # collects a line for each unreadable image; without it, they raise DataError

warnings.filterwarnings("ignore", module="PIL")  # on metadata


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

    def chosen(self, which: np.ndarray) -> "InMemory":
        return replace(self, images=self.images[which], labels=self.labels[which])

    def to(self, device: torch.device) -> "InMemory":
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> Batch:
        """Pixels, 0 to `top`, and labels of the images at `indices`."""
        where = torch.from_numpy(indices).to(self.images.device)
        images = self.images[where]
        if self.augmented:
            # Column 0 ordered the epoch; the augmentation has the others to itself.
            u = torch.from_numpy(uniforms(seed, epoch, indices, 6)[:, 1:]).to(images.device)
            images = augment(images, u) if self.cutout else augment(images, u, fill=None, cutout=0)
        return images, self.labels[where]


@dataclass(frozen=True, eq=False)
class Files:
    """Images root/name decoded on demand, with random resized crop and flip if `train`.

    `copies` has the folders of pre-resized copies by their short sides, or {0: that of the originals}; `root` is one
    of them.
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

    def __len__(self) -> int:
        return len(self.names)

    def path(self, i: int) -> Path:
        return self.root / str(self.names[i])

    def chosen(self, which: np.ndarray) -> "Files":
        return replace(self, names=self.names[which], labels=self.labels[which])

    def to(self, device: torch.device) -> "Files":
        return self

    def at(self, size: int, **fields: float | bool) -> "Files":
        """The same images at another size, from the smallest copies with a fifth to spare, or else the largest."""
        large_enough = [side for side in self.copies if 5 * side >= 6 * size]
        return replace(self, root=self.copies[min(large_enough, default=max(self.copies))], size=size, **fields)

    def batch(self, indices: np.ndarray, *, seed: int, epoch: int) -> tuple[list[Batch], list[str]]:
        """Pixels, 0 to 255, and labels of the images at `indices`, a batch for each shape; what went wrong.

        An unreadable image is named and left out; if `train`, the next readable one takes its place, with its own
        label and the crop and flip that were drawn for the place (so it is not seen twice alike).  DataError after
        TRIES in a row.
        """
        tries = min(TRIES, len(self)) if self.train else 1
        parts: dict[Shape, list[tuple[np.ndarray, int]]] = {}
        problems: list[str] = []
        for index, u in zip(indices.tolist(), uniforms(seed, epoch, indices, 6)[:, 1:], strict=True):
            for i in ((index + k) % len(self) for k in range(tries)):
                try:
                    pixels = self._image(self.path(i), u)
                    parts.setdefault(pixels.shape, []).append((pixels, i))
                    break
                except DataError as error:
                    problems.append(str(error))
            else:
                if self.train:
                    reason = f"nor is any of the {tries - 1} images after it: is the disk there?"
                    raise DataError(f"{problems[-tries]}; {reason}")
        shown = (map(list, zip(*part, strict=True)) for part in parts.values())
        return [(torch.from_numpy(np.stack(x)).permute(0, 3, 1, 2), self.labels[i]) for x, i in shown], problems

    def _image(self, path: Path, u: np.ndarray) -> np.ndarray:
        with open_image(path) as image:
            shape = rectangle(*image.size, self.size) if self.rectangular else (self.size, self.size)
            box = random_box(*image.size, self.min_scale, u) if self.train else centre_box(*image.size, shape)
            pixels = np.asarray(crop(image, box, shape, self.channels)).reshape(*shape, self.channels)
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


# --- folders of images ------------------------------------------------------------------------------------


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


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def list_images(sets: dict[int, Path], *parts: str, classes: Sequence[str] = (), channels: int = 3) -> Files:
    """All images in the folders of a part of the data, and in folders inside these, as torchvision's ImageFolder.

    But what is hidden (.DS_Store, ._x.png) is no image and no class.  Labels count in `classes`, or else in the part's
    own folders.  The part is the first of `parts` that has a folder of a class: ImageNet's own test/ has none.  Raises
    DataError.
    """

    def refuse(error: OSError) -> None:
        raise DataError(f"{error.filename}: cannot be read ({error.strerror})")

    place = sets[max(sets)]
    there = [place / part for part in parts if (place / part).is_dir()]
    if not there:
        raise DataError(f"{place}: no folder {' or '.join(parts)} in it; {EXPECTED}")
    root = next((part for part in there if {*_folders(part)} & {*(classes or _folders(part))}), there[0])
    own, names, passed = _folders(root), [], []
    for path, folders, files in os.walk(root, followlinks=True, onerror=refuse):
        inside = path[len(str(root)) + 1 :].replace(os.sep, "/")
        if inside.count("/") > 20:
            raise DataError(f"{path}: cannot be read (a link to a folder that holds the link?)")
        hidden = {name for name in folders if name[0] == "."}
        images = sorted(name for name in files if inside and name[0] != "." and name.lower().endswith(EXTENSIONS))
        names += [f"{inside}/{name}" for name in images]
        passed += sorted(os.path.join(inside, name) for name in hidden.union(files).difference(images))
        folders[:] = sorted({*folders} - hidden)  # where to go on
    if not names:
        raise DataError(f"{root}: no images in its class folders; known kinds are {' '.join(EXTENSIONS)}")
    if len(classes or own) < 2:
        raise DataError(f"{root}: {len(own)} class folders in it; expected at least 2")
    folder_of = [name.split("/")[0] for name in names]
    empty = sorted({*own} - {*folder_of})
    said = {"passed over as no images of a class": passed, "class folders without images": empty}
    notes = [one_line(f"{root}: {len(odd)} {what} ({', '.join(odd[:3])})") for what, odd in said.items() if odd]
    if root != there[0]:
        notes.append(f"{there[0]}: passed over, since it has no folders of the classes, unlike {root}")
    labels, copies = labels_of(folder_of, own, classes or own, root), {k: v / root.name for k, v in sets.items()}
    return Files(root, np.array(names), labels, classes or own, copies, channels, notes=notes)


def labels_of(names: Sequence[str], own: Sequence[str], classes: Sequence[str], where: str | Path) -> Tensor:
    """Where the names, one for each image and each in `own`, stand in `classes`.  Raises DataError."""
    if unknown := sorted({*own} - {*classes}):
        known = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        raise DataError(f"{where}/{unknown[0]}: no training images for this class; the classes are {known}")
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in names])


def held_out(sets: dict[int, Path], channels: int = 3, classes: Sequence[str] = (), split: float = 0) -> Files:
    """The images of test/ or val/, or the share `split` of train/ where there is neither.

    Labelled by `classes`, or else by those of train/, or else by their own.  Raises DataError.
    """
    root = sets[max(sets)]
    how = {"classes": classes or _folders(root / "train"), "channels": channels}
    if not split:
        return list_images(sets, "test", "val", **how)
    for part in (root / "test", root / "val"):
        if part.is_dir():
            raise DataError(f"{part}: is there, so no training images need be kept for testing: leave out --split")
    return _share(list_images(sets, "train", **how), split, kept=True)


def check_split(name: str, split: float) -> float:
    """The same `split`.  Raises DataError for one that is no share, or where `name` is not a folder of images."""
    if not 0 <= split < 1 or (split and name == "digits"):
        raise DataError(f"--split {split:g}: must be a share from 0 to less than 1, of a folder of images")
    return split


def _share(files: Files, split: float, *, kept: bool) -> Files:
    """The images that are kept for testing, or the others: a fixed function of each name, whatever else there is."""
    stems = [os.fsencode(os.path.splitext(name)[0]) for name in files.names.tolist()]
    which = (np.array([zlib.crc32(stem) for stem in stems]) < split * 2**32) == kept
    if not which.any():
        raise DataError(f"{files.root}: --split {split} leaves no image for {'testing' if kept else 'training'}")
    return files.chosen(which)


def _held(files: Files) -> Source:
    """The images in memory, if they are originals and the first is small; all must have its size then."""
    with open_image(files.path(0)) as first:
        size = first.size
    if 0 not in files.copies or max(size) > SMALL:
        return files

    def decode(indices: np.ndarray) -> np.ndarray:
        pixels = np.empty((len(indices), size[1], size[0], files.channels), np.uint8)
        for place, path in zip(pixels, map(files.path, indices), strict=True):
            with open_image(path) as image:
                if image.size != size:
                    sizes = "{}x{} pixels, others are {}x{}".format(*image.size, *size)
                    raise DataError(f"{path}: is {sizes}; resize it to the same size")
                place[:] = np.asarray(eight_bits(image, files.channels)).reshape(place.shape)
        return pixels

    parts = np.array_split(np.arange(len(files)), len(files) // 100 + 1)
    images = np.concatenate(list(in_threads(decode, parts, min(8, os.cpu_count() or 1))))
    pixels = torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()
    return InMemory(pixels, files.labels, augmented=files.train, notes=files.notes)


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

    def at(self, *, size: int, min_scale: float, rectangular: bool = False, cutout: bool = True) -> "Data":
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
    where = options.get("data_dir") if options["dataset"] in NAMES else options["dataset"]
    return Path(where) if where else None


def load(name: str, data_dir: Place = None, *, subset: int | None = None, channels: int = 3, split: float = 0) -> Data:
    """The data set `name`, or its first `subset` training and test images in a fixed random order.

    Its place is data_dir, or the default (`place`); images of folders are read as RGB, or grey if channels is 1.
    Of a folder without a test part, the share `split` is kept for testing.  Raises DataError.
    """
    root = place(name, data_dir)
    if name == "digits":
        loaded = digits()
    elif sets := image_sets(root):
        train, test = list_images(sets, "train", channels=channels), held_out(sets, channels, split=split)
        train = replace(_share(train, split, kept=False) if split else train, train=True)
        loaded = Data(train, test, train.classes, channels)
    else:
        loaded = cifar10(root)
    # `subset` images, the first in a fixed random order
    train, test = (s.chosen(np.sort(order(len(s), seed=0, epoch=1)[:subset])) for s in (loaded.train, loaded.test))
    if isinstance(train, Files) and isinstance(held := _held(train), InMemory):
        train, test = held, _held(test)
        if isinstance(test, Files) or test.images.shape[1:] != held.images.shape[1:]:
            raise DataError(f"{loaded.test.root}: images differ in size from those in {loaded.train.root}; resize them")
    return replace(loaded, train=train, test=test)


def load_test(
    name: str, data_dir: Place = None, *, classes: Sequence[str] = (), channels: int = 3, split: float = 0
) -> tuple[Source, list[str]]:
    """The test images of a data set and its classes; of an image folder, which may lack train/, those alone.

    With `classes`, those that a network knows, labels follow these names.  Otherwise as `load`.  Raises DataError.
    """
    if name != "digits" and (sets := image_sets(place(name, data_dir))):
        files = held_out(sets, channels, classes, split)
        return _held(files), files.classes
    loaded = load(name, data_dir)
    names = [loaded.classes[label] for label in loaded.test.labels]
    labels = labels_of(names, loaded.classes, classes or loaded.classes, name)
    return replace(loaded.test, labels=labels), classes or loaded.classes


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

    Files are shown in squares.  Unreadable images raise DataError, or are left out and named in `problems`.
    """
    source = replace(source, rectangular=False) if isinstance(source, Files) else source
    for batch in _stream(source, [indices], device=device, problems=problems):
        return batch
    raise DataError(f"none of {len(indices)} images can be read: is the disk there?")


def _stream(
    source: Source,
    batches: Sequence[np.ndarray],
    *,
    device: torch.device,
    workers: int = 0,
    problems: Problems = None,
    stop: Stop = None,
    seed: int = 0,
    epoch: int = 0,
) -> Iterator[Batch]:
    """The batches, read by `workers` threads if they are files, in [0, 1] on the device.

    An unreadable image raises DataError, or, with a list of problems, is named there and replaced or left out
    (`Files.batch`).  While no batch is there, `stop` is asked once a second whether to end without the rest.
    """

    def read(indices: np.ndarray) -> tuple[list[Batch], list[str]]:
        if isinstance(source, InMemory):
            return [source.batch(indices, seed=seed, epoch=epoch)], []
        parts, said = source.batch(indices, seed=seed, epoch=epoch)
        # From pinned memory the way to the device goes on beside the work.
        return [(x.pin_memory(), y) for x, y in parts] if device.type == "cuda" else parts, said

    for parts, said in in_threads(read, batches, workers * isinstance(source, Files), stop):
        if problems is not None:
            problems += said
        elif said:
            raise DataError(said[0])
        for images, labels in parts:
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
    starts = range(first * batch_size + rank * share, len(source) - batch_size + 1 + rank * share, batch_size)
    return _stream(source, [shuffled[i : i + share] for i in starts], seed=seed, epoch=epoch, **how)


def evaluation_batches(
    source: Source, *, batch_size: int, rank: int = 0, processes: int = 1, **how: Any
) -> Iterator[Batch]:
    """Every image once over all processes, not augmented: images in [0, 1] and labels; no batch is empty.

    In the order of the source; of each batch one shape after the other where the source is rectangular.
    How they are read: device, workers, problems, stop, as `_stream` says.
    """
    mine = np.arange(rank, len(source), processes)
    return _stream(source, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)], **how)


def in_threads(function: Callable, items: Iterable, count: int, stop: Stop = None) -> Iterator:
    """function(item) for every item, in order, from `count` threads that work ahead (0: from this one).

    While waiting, `stop` is asked once a second whether to end here.  Raises what the function raises.
    """
    # Pillow leaves Python's lock to others while it decodes, resizes and encodes: of the 0.74 ms of an image 0.09 are
    # Python's.  So threads do what processes do, and none is killed, left behind, or short of shared memory.
    if not count:
        yield from map(function, items)
        return
    todo = iter(items)
    with ThreadPool(count) as pool:  # of daemons: one that a lost disk holds does not hold the program
        pending = deque(pool.apply_async(function, [item]) for item in islice(todo, 2 * count))
        while pending:
            while not pending[0].ready():
                pending[0].wait(1.0)
                if stop and not pending[0].ready() and stop():
                    return
            pending.extend(pool.apply_async(function, [item]) for item in islice(todo, 1))
            yield pending.popleft().get()


# --- smaller copies ---------------------------------------------------------------------------------------


def shrink(original: Path, copy: Path, side: int, quality: int) -> str | None:
    """Write a copy with a short side of `side` pixels, as RGB JPEG whatever its name: readers go by content.

    One that would be no smaller is the original itself.  Returns the message if that is unreadable.
    """
    if copy.exists() and copy.stat().st_size:  # a power cut may leave an empty one
        return None
    content = io.BytesIO()
    try:
        with open_image(original) as image:
            # Rounded up: 4:3 must not become a little less, which `rectangle` would take for a shorter shape.
            smaller = [-(-length * side // min(image.size)) for length in image.size]
            small = min(image.size) <= side
            image.draft("RGB", tuple(2 * length for length in smaller))
            pixels = eight_bits(image)
    except DataError as error:
        return str(error)
    if not small:
        pixels.resize(smaller, Image.Resampling.LANCZOS, reducing_gap=3.0).save(content, "JPEG", quality=quality)
    copy.parent.mkdir(parents=True, exist_ok=True)
    write(copy, content.getvalue() or original.read_bytes(), sync=False)
    return None


def main(
    root: Annotated[Path, typer.Argument(metavar="DIR", help="DIR/train/<class>/*, and DIR/val or DIR/test.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="For the copies: OUT/<short side>/train/<class>/*.")],
    short_side: Annotated[list[int], typer.Option(help="Pixels; once for each set.", min=32)] = [160, 352],  # noqa: B006
    quality: Annotated[int, typer.Option(help="JPEG quality of the copies.", min=1, max=95)] = 90,
) -> int:
    """Make smaller copies of an image folder, decoded faster.  Killed, the same command goes on where it was."""
    parts = [list_images({0: root}, "train"), held_out({0: root})]
    sized = [out / str(side) for side in short_side]
    if out.resolve().is_relative_to(root.resolve()) or _holds_images(out):
        raise DataError(f"{out}: lies in {root}, or holds images itself; choose a new folder for the copies")
    if taken := [path for path in sized if path.exists() and not (out / UNFINISHED).exists()]:
        raise DataError(f"{taken[0]}: is there already; remove it, or choose another folder for the copies")
    names = [f"{files.root.name}/{name}" for files in parts for name in files.names.tolist()]
    folders = [f"{files.root.name}/{name}" for files in parts for name in files.classes]
    out.mkdir(parents=True, exist_ok=True)
    (out / UNFINISHED).write_text(shlex.join(["python", *sys.argv]))
    for folder in (path / name for path in sized for name in folders):
        folder.mkdir(parents=True, exist_ok=True)
    for remains in out.rglob(".*.tmp"):  # of a process that was killed
        remains.unlink()
    console, unreadable = Console(soft_wrap=True, highlight=False), []
    tasks = [(name, side) for name in names for side in short_side]

    def copy(task: tuple[str, int]) -> str | None:
        return shrink(root / task[0], out / str(task[1]) / task[0], task[1], quality)

    try:
        with progress_bar(console, "copying", len(tasks)) as show:
            for done, message in enumerate(in_threads(copy, tasks, os.cpu_count() or 1), 1):
                show(done)
                unreadable += [message] if message and message not in unreadable else []
                if done % 10_000 == 0 and not console.is_terminal:
                    console.print(f"{done} of {len(tasks)} copies")
    except KeyboardInterrupt:
        raise Failure("stopped; the same command goes on from here", 130) from None
    (out / UNFINISHED).unlink()
    print(*unreadable, sep="\n", end="\n" * bool(unreadable), file=sys.stderr)
    left_out = f" ({len(unreadable)} unreadable, left out)" * bool(unreadable)
    done = len(names) - len(unreadable)
    console.print(f"{done} images in {out}{left_out}; now: python train.py imagenet --data-dir {out}")
    return 1 if unreadable else 0


if __name__ == "__main__":
    sys.exit(run_command(main))
