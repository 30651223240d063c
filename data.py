"""Section 4: the data.  Images with pixels in [0, 1], and every batch a pure function of (seed, epoch, step).

    digits             scikit-learn's 8x8 digits: nothing to download
    cifar10            torchvision's layout (downloaded if absent), or a folder of images
    imagenet, FOLDER   a folder of images: train/<class>/* in it, and test/<class>/* or val/<class>/*

Small images of one size live in memory as uint8 and are augmented a batch at a time; others are decoded by threads.
The order of an epoch depends on (seed, epoch) alone, an image's augmentation on (seed, epoch, its index) alone: a run
resumes within an epoch, and processes share a batch, without saving or sending random states.
"""

import fcntl
import os
import warnings
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from runs import Unusable, one_line

NAMES = "digits", "cifar10", "imagenet"
EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff")
SMALL = 64  # pixels: folders of images of one size up to this are held in memory
TRIES = 2000  # images in a row: a lost class of ImageNet (1300) does not end a run, a lost disk does
PARTS = {"train", "test", "val"}
EXPECTED = "expected train/<class>/*, and test/ or val/ beside it (train.py keeps a share of train/ with --split 0.2)"

Batch = tuple[Tensor, Tensor]  # images in [0, 1], labels
Place = str | os.PathLike | None
Problems = list[str] | None  # collects a line for each unreadable image; without it, they raise Unusable

warnings.filterwarnings("ignore", module="PIL")  # on metadata


def uniforms(seed: int, epoch: int, indices: np.ndarray, count: int) -> np.ndarray:
    """Uniform numbers in [0, 1), (len(indices), count): row i depends on (seed, epoch, indices[i]) alone."""
    key = _mix(_mix(np.array([seed], dtype=np.uint64)) ^ np.uint64(epoch))
    rows = _mix(key ^ np.asarray(indices, dtype=np.uint64))
    counters = rows[:, None] + np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    return (_mix(counters) >> np.uint64(11)) * 2.0**-53


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64 (Steele, Lea & Flood 2014), used as a hash of a counter, as in Salmon et al. (2011)."""
    z = z + np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def order(count: int, *, seed: int, epoch: int) -> np.ndarray:
    """A random permutation of range(count) that depends on (seed, epoch) alone."""
    return np.argsort(uniforms(seed, epoch, np.arange(count), 1)[:, 0], kind="stable")


def augment(images: Tensor, u: Tensor, *, border: int = 4, fill: int | None = 128, cutout: int = 16) -> Tensor:
    """Images (N, C, H, W) augmented by the uniform numbers u (N, 5): like images, but float.

    Random crop after padding by `border` with value `fill` (None: with the image, reflected), horizontal flip, and
    cutout: a square of side `cutout` (at most half the image's), centred anywhere and clipped at the border, is filled
    with its own mean colour.
    """
    h, w = images.shape[2:]
    cutout = min(cutout, h // 2, w // 2)
    padded = pad(images, (border,) * 4, **({"mode": "reflect"} if fill is None else {"value": fill}))
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (N, C, 2 border + 1, 2 border + 1, H, W): a view
    down, right = (u[:, :2] * (2 * border + 1)).long().T
    images = windows[torch.arange(len(images), device=u.device), :, down, right].float()
    images = torch.where(u[:, 2, None, None, None] < 0.5, images.flip(3), images)
    if not cutout:
        return images
    y, x = (torch.arange(length, device=u.device) for length in (h, w))
    top, left = ((u[:, [k]] * (len(line) + 1 - cutout % 2)).long() - cutout // 2 for k, line in ((3, y), (4, x)))
    mask = ((y >= top) & (y < top + cutout))[:, None, :, None] & ((x >= left) & (x < left + cutout))[:, None, None]
    mean = (images * mask).sum((2, 3), keepdim=True) / mask.sum((2, 3), keepdim=True)
    return torch.where(mask, mean, images)


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Context: a PIL image, opened but not yet decoded.  Raises Unusable, naming the file, here or on decoding."""
    try:
        with Image.open(path) as image:
            yield image
    except (OSError, SyntaxError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise Unusable(f"{path}: not a readable image ({error}); replace it or remove it") from None


def eight_bits(image: Image.Image, channels: int = 3) -> Image.Image:
    """The image as RGB or grey, with 16 bits scaled to 8.  Raises ValueError where numbers have no defined range."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        tags = getattr(image, "tag_v2", {})  # of TIFF: 258 bits of a sample, perhaps 12; 262 whether 0 is white
        pixels = np.asarray(image) / (2 ** tags.get(258, (16,))[0] - 1)
        image = Image.fromarray(np.rint(255 * (pixels if tags.get(262, 1) else 1 - pixels)).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"the numbers of PIL's mode {image.mode} have no defined range: store 8 or 16 bits")
    return image.convert("RGB" if channels == 3 else "L")


def random_box(width: int, height: int, min_scale: float, u: np.ndarray) -> tuple[float, ...]:
    """Left, top, right, bottom of min_scale to 1 times the image's area; aspect ratio 3/4 to 4/3, then clipped."""
    area = width * height * (min_scale + (1 - min_scale) * u[0])
    ratio = (3 / 4) ** (1 - 2 * u[1])
    w, h = min(width, (area * ratio) ** 0.5), min(height, (area / ratio) ** 0.5)
    left, top = u[2] * (width - w), u[3] * (height - h)
    return left, top, left + w, top + h


def crop(image: Image.Image, box: tuple[float, ...], size: int, channels: int = 3) -> Image.Image:
    """The box of the image, resized to a square.  JPEG is decoded no larger than that needs."""
    width, height = image.size
    scale = max(size / (box[2] - box[0]), size / (box[3] - box[1]))
    image.draft("RGB", (int(width * scale) + 1, int(height * scale) + 1))
    sx, sy = image.size[0] / width, image.size[1] / height
    box = (box[0] * sx, box[1] * sy, min(box[2] * sx, image.size[0]), min(box[3] * sy, image.size[1]))
    return eight_bits(image, channels).resize((size, size), Image.Resampling.BILINEAR, box=box, reducing_gap=2.0)


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

    def batch(self, indices: np.ndarray, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor, list[str]]:
        """Pixels, 0 to `top`, and labels of the images at `indices`; nothing can go wrong."""
        where = torch.from_numpy(indices).to(self.images.device)
        images = self.images[where]
        if self.augmented:
            u = torch.from_numpy(uniforms(seed, epoch, indices, 6)[:, 1:]).to(images.device)  # column 0 is `order`'s
            images = augment(images, u) if self.cutout else augment(images, u, fill=None, cutout=0)
        return images, self.labels[where], []


@dataclass(frozen=True, eq=False)
class Files:
    """Images root/name decoded on demand, in squares of `size`: random resized crops, flipped or not, if `train`."""

    root: Path
    names: np.ndarray
    labels: Tensor
    classes: Sequence[str]
    channels: int = 3
    size: int = 224
    train: bool = False
    min_scale: float = 0.08
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

    def at(self, size: int, **fields: float) -> "Files":
        return replace(self, size=size, **fields)

    def batch(self, indices: np.ndarray, *, seed: int = 0, epoch: int = 0) -> tuple[Tensor, Tensor, list[str]]:
        """Pixels, 0 to 255, and labels of the images at `indices`; a line for each image that cannot be read.

        Such a one is left out; if `train`, the next readable one takes its place, with its own label and the crop and
        flip that were drawn for the place (so it is not seen twice alike).  Unusable after TRIES in a row.
        """
        tries, shown, problems = min(TRIES, len(self)) if self.train else 1, [], []
        lost = f"nor is any of the {tries - 1} images after it: is the disk there?"
        pixels = np.empty((len(indices), self.size, self.size, self.channels), np.uint8)
        for index, u in zip(indices, uniforms(seed, epoch, indices, 6)[:, 1:], strict=True):
            for i in (index + np.arange(tries)) % len(self):
                try:
                    pixels[len(shown)] = self._image(self.path(i), u)
                    shown.append(i)
                    break
                except Unusable as error:
                    problems.append(str(error))
            else:
                if self.train:
                    raise Unusable(f"{problems[-tries]}; {lost}")
        images = torch.from_numpy(pixels[: len(shown)]).permute(0, 3, 1, 2)  # pinned, it travels beside the work
        return images.pin_memory() if torch.cuda.is_available() else images, self.labels[shown], problems

    def _image(self, path: Path, u: np.ndarray) -> np.ndarray:
        with open_image(path) as image:
            (w, h), half = image.size, min(image.size) * 224 / 256 / 2  # what "resize to 256, crop 224" shows
            centre = w / 2 - half, h / 2 - half, w / 2 + half, h / 2 + half
            box = random_box(w, h, self.min_scale, u) if self.train else centre
            pixels = np.asarray(crop(image, box, self.size, self.channels)).reshape(self.size, self.size, -1)
        return pixels[:, ::-1] if self.train and u[4] < 0.5 else pixels


Source = InMemory | Files


@dataclass(frozen=True)
class Data:
    """Training and test images, and the names of the classes in the order of their labels."""

    train: Source
    test: Source
    classes: list[str]
    channels: int

    @property
    def small(self) -> bool:
        """Whether the images are held in memory."""
        return isinstance(self.train, InMemory)

    @property
    def notes(self) -> list[str]:
        return [*self.train.notes, *self.test.notes]

    @property
    def short_side(self) -> int:
        """Median short side of the training images, in pixels; of a hundred of them where they are files."""
        if self.small:
            return min(self.train.images.shape[2:])
        sides = []
        for i in order(len(self.train), seed=0, epoch=0)[:100]:
            with suppress(Unusable), open_image(self.train.path(i)) as image:
                sides.append(min(image.size))
        return int(np.median(sides or self.train.size))

    def at(self, *, size: int, min_scale: float, cutout: bool = True) -> "Data":
        """Files at another size and least area of a random crop; images in memory with cutout or without."""
        if self.small:
            return replace(self, train=replace(self.train, cutout=cutout))
        return replace(self, train=self.train.at(size, min_scale=min_scale), test=self.test.at(size))


def _folders(root: Path) -> list[str]:
    return sorted(path.name for path in root.glob("[!.]*") if path.is_dir())


def _files(folder: str, inside: str = "") -> Iterator[str]:
    """Names of all files below a folder, and of hidden folders: first its own, then those in each folder, in order."""
    for entry in sorted(os.scandir(folder), key=lambda entry: (entry.is_dir(), entry.name)):
        if entry.is_dir() and entry.name[0] != ".":
            yield from _files(entry.path, f"{inside}{entry.name}/")
        else:
            yield inside + entry.name


def list_images(
    root: Path, *parts: str, classes: Sequence[str] = (), channels: int = 3, split: float = 0, kept: bool = False
) -> Files:
    """Images in the class folders of a part and folders inside these, as torchvision's ImageFolder.  Raises Unusable.

    What is hidden does not count.  Labels count in `classes`, or the part's own folders; the part is the first that has
    one (ImageNet's test/ has none).  The share `split`, a function of each name, is left out, or, if `kept`, the rest.
    """
    there = [root / part for part in parts if (root / part).is_dir()]
    if not there:
        raise Unusable(f"{root}: no folder {' or '.join(parts)} in it; {EXPECTED}")
    part = next((part for part in there if {*_folders(part)} & {*(classes or _folders(part))}), there[0])
    own, names, passed = _folders(part), [], []
    for name in _files(str(part)):
        image = "/" in name and "/." not in name and name.lower().endswith(EXTENSIONS)
        (names if image else passed).append(name)
    if not names or len(classes or own) < 2:
        found = f"{len(names)} images in {len(own)} class folders"
        raise Unusable(f"{part}: {found}; expected at least 2, with images of these kinds: {' '.join(EXTENSIONS)}")
    used = [name.split("/")[0] for name in names]
    odd = {"passed over as no images of a class": passed, "class folders without images": sorted({*own} - {*used})}
    notes = [one_line(f"{part}: {len(some)} {what} ({', '.join(some[:3])})") for what, some in odd.items() if some]
    if part != there[0]:
        notes.append(f"{there[0]}: passed over, since it has no folders of the classes, unlike {part}")
    marks = np.array([zlib.crc32(os.fsencode(os.path.splitext(name)[0])) for name in names])
    if not (which := (marks < split * 2**32) == kept).any():
        raise Unusable(f"{part}: --split {split} leaves no image for {'testing' if kept else 'training'}")
    labels, classes = labels_of(used, own, classes or own, part)[which], classes or own
    return Files(part, np.array(names)[which], labels, classes, channels, notes=notes)


def labels_of(names: Sequence[str], own: Sequence[str], classes: Sequence[str], where: str | Path) -> Tensor:
    """Where the names, one for each image and each in `own`, stand in `classes`.  Raises Unusable."""
    if unknown := sorted({*own} - {*classes}):
        known = ", ".join(classes[:5]) + ", ..." * (len(classes) > 5)
        raise Unusable(f"{where}/{unknown[0]}: no training images for this class; the classes are {known}")
    number = {name: i for i, name in enumerate(classes)}
    return torch.tensor([number[name] for name in names])


def is_folder(name: str, root: Path, split: float) -> bool:
    """Whether a data set at its `place` is a folder of images.  Raises Unusable for a `split` that it cannot have."""
    folder = name != "digits" and bool(PARTS & {*_folders(root)})
    if split and not folder:
        raise Unusable(f"--split is for folders of images; {name} has a test part: leave it out")
    if not 0 <= split < 1:
        raise Unusable(f"--split {split:g}: must be a share from 0 to less than 1")
    return folder


def held_out(root: Path, channels: int = 3, classes: Sequence[str] = (), split: float = 0) -> Files:
    """The images of test/ or val/, or the share `split` of train/; labels by `classes`, or train/'s, or their own."""
    if split and (there := {"test", "val"} & {*_folders(root)}):
        raise Unusable(f"{root / min(there)}: is there, so no training images are kept for testing: leave out --split")
    how = {"classes": classes or _folders(root / "train"), "channels": channels, "split": split, "kept": split > 0}
    return list_images(root, *(["train"] if split else ["test", "val"]), **how)


def _held(*parts: Files) -> Sequence[Source]:
    """The parts in memory, if all their images have one size, of up to SMALL pixels a side; else as they are."""
    with open_image(parts[0].path(0)) as first:
        shape = first.height, first.width, parts[0].channels
    if max(first.size) > SMALL:
        return parts

    def decode(path: Path) -> np.ndarray | None:
        with open_image(path) as image:
            return np.asarray(eight_bits(image, shape[2])).reshape(shape) if image.size == first.size else None

    paths = [files.path(i) for files in parts for i in range(len(files))]
    some = [paths[i : i + 100] for i in range(0, len(paths), 100)]
    decoded = in_threads(lambda few: list(map(decode, few)), some, min(8, os.cpu_count() or 1))
    pixels = [x for few in decoded for x in few]
    if any(x is None for x in pixels):
        return parts
    images = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).contiguous().split([len(f) for f in parts])
    return [InMemory(x, f.labels, augmented=f.train, notes=f.notes) for x, f in zip(images, parts, strict=True)]


def place(name: str, data_dir: Place = None) -> Path:
    """The folder of a data set: what the user says, or `data`.  Raises Unusable where none can be there.

    digits, cifar10 and imagenet are names, whatever lies in the working directory; all else is a folder's path.
    """
    root = Path(data_dir or ("data" if name in NAMES else name))
    if name in ("digits", "cifar10") or PARTS & {*_folders(root)}:
        return root
    if not root.is_dir() and name not in NAMES:
        missing = f"{root}: no such folder" if data_dir or os.sep in name else f"unknown data set {name!r}"
        known = f"a data set is {', '.join(NAMES)}, or the path of an image folder"
        raise Unusable(f"{missing}; {known}; where it has moved, --data-dir names the place")
    raise Unusable(f"{root}: no folder train in it; {EXPECTED}" + "; --data-dir names another place" * (name in NAMES))


def load(name: str, data_dir: Place = None, *, subset: int | None = None, channels: int = 3, split: float = 0) -> Data:
    """The data set `name` (`place`), or its first `subset` training and test images in a fixed random order.

    Folders are read as RGB, or grey if channels is 1; of one without a test part, the share `split` is that part.
    """
    root = place(name, data_dir)
    if is_folder(name, root, split):
        train = replace(list_images(root, "train", channels=channels, split=split), train=True)
        loaded = Data(train, held_out(root, channels, split=split), train.classes, channels)
    else:
        loaded = digits() if name == "digits" else cifar10(root)
    parts = [s.chosen(np.sort(order(len(s), seed=0, epoch=1)[:subset])) for s in (loaded.train, loaded.test)]
    train, test = parts if loaded.small else _held(*parts)
    return replace(loaded, train=train, test=test)


def load_test(
    name: str, data_dir: Place = None, *, classes: Sequence[str] = (), channels: int = 3, split: float = 0, small=True
) -> tuple[Source, list[str]]:
    """The test images of a data set and its classes; of an image folder, which may lack train/, those alone.

    With `classes`, those that a network knows, labels follow these names.  `small`: as `Data` says of its training.
    """
    root = place(name, data_dir)
    if is_folder(name, root, split):
        files = held_out(root, channels, classes, split)
        return _held(files)[0] if small else files, files.classes
    loaded = load(name, data_dir)
    names = [loaded.classes[label] for label in loaded.test.labels]
    labels = labels_of(names, loaded.classes, classes or loaded.classes, name)
    return replace(loaded.test, labels=labels), classes or loaded.classes


def digits() -> Data:
    """scikit-learn's 1797 digits, 8x8 with values 0 to 16, in a fixed random order: 1000 train, 797 test."""
    from sklearn.datasets import load_digits  # here, since only this data set needs it

    bunch = load_digits()
    whole = InMemory(torch.from_numpy(bunch.images.astype(np.uint8))[:, None], torch.from_numpy(bunch.target), 16)
    shuffled = order(len(whole), seed=0, epoch=0)
    return Data(whole.chosen(shuffled[:1000]), whole.chosen(shuffled[1000:]), [str(i) for i in range(10)], channels=1)


def cifar10(root: Path) -> Data:
    """CIFAR-10 as torchvision stores it, downloaded into root when it is not there: by one process, others wait."""
    from torchvision.datasets import CIFAR10

    base, lock = root / CIFAR10.base_folder, root / "download.lock"
    try:
        with ExitStack() as stack:
            if not base.is_dir() or lock.exists():  # one process downloads it, others wait until it has
                root.mkdir(parents=True, exist_ok=True)
                with suppress(OSError):  # some disks have no locks
                    fcntl.flock(stack.enter_context(open(lock, "a")), fcntl.LOCK_EX)
                    stack.callback(lock.unlink, missing_ok=True)
            parts = [CIFAR10(root, train=part, download=not base.is_dir()) for part in (True, False)]
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        reason, layout = str(error).split(". ")[0], f"{CIFAR10.base_folder}, or train/<class>/* and test/<class>/*"
        raise Unusable(f"--data-dir {root}: no usable CIFAR-10 ({reason}); it should hold {layout}") from None
    pixels = [torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous() for part in parts]
    train, test = (InMemory(x, torch.tensor(part.targets)) for x, part in zip(pixels, parts, strict=True))
    return Data(replace(train, augmented=True), test, list(parts[0].classes), channels=3)


def in_threads(function: Callable, items: Iterable, workers: int = 0, stop: Callable | None = None) -> Iterator:
    """function(item) for every item, in order, from `workers` threads that work ahead (0: from this one).

    While waiting, `stop` is asked once a second whether to end here.  Raises what the function raises.
    """
    # Pillow leaves Python's lock to others while it decodes and resizes: threads do what processes would.
    if not workers:
        yield from map(function, items)
        return
    with ThreadPool(workers) as pool:  # of daemons: one that a lost disk holds does not hold the program
        begun = (pool.apply_async(function, [item]) for item in items)
        pending = deque(islice(begun, 2 * workers))
        while pending:
            while not pending[0].ready():
                pending[0].wait(1.0)
                if stop and not pending[0].ready() and stop():
                    return
            pending.extend(islice(begun, 1))
            yield pending.popleft().get()


def _stream(
    source: Source, parts: Iterable, *, device: torch.device, problems: Problems = None, seed=0, epoch=0, **threads: Any
) -> Iterator[Batch]:
    """The images at the indices of each part, files `in_threads`, in [0, 1] on the device; no batch is empty."""
    threads = threads if isinstance(source, Files) else {}
    for images, labels, said in in_threads(partial(source.batch, seed=seed, epoch=epoch), parts, **threads):
        for line in said:
            if problems is None:
                raise Unusable(line)
            problems.append(line)
        if len(images):
            yield images.to(device, non_blocking=True).float() / source.top, labels.to(device, non_blocking=True)


def training_batches(
    source: Source, *, batch_size: int, seed: int, epoch: int, first: int = 0, rank: int = 0, processes: int = 1, **how
) -> Iterator[Batch]:
    """This process's share of every batch of one epoch, from batch `first` on: images in [0, 1] and labels.

    batch_size: of all processes together; a last, incomplete batch is dropped.  how: device, workers, problems, stop.
    """
    shuffled, share = order(len(source), seed=seed, epoch=epoch), batch_size // processes
    starts = range(first * batch_size + rank * share, len(source) - batch_size + 1 + rank * share, batch_size)
    return _stream(source, [shuffled[i : i + share] for i in starts], seed=seed, epoch=epoch, **how)


def evaluation_batches(source: Source, *, batch_size: int, rank: int = 0, processes: int = 1, **how) -> Iterator[Batch]:
    """Every image once over all processes, in the order of the source, and not augmented; how: as for training."""
    mine = np.arange(rank, len(source), processes)
    return _stream(source, [mine[i : i + batch_size] for i in range(0, len(mine), batch_size)], **how)


def fetch(source: Source, indices: np.ndarray, device: torch.device, *, problems: Problems = None) -> Batch:
    """The images at `indices`, in [0, 1], and their labels; augmented only if the source is."""
    for batch in _stream(source, [indices], device=device, problems=problems):
        return batch
    raise Unusable(f"none of {len(indices)} images can be read: is the disk there?")
