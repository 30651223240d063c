"""Batches are a pure function of (seed, epoch, index); images are what is on disk; errors name the file."""

import io
import os
import pickle
import shutil
import struct
import tempfile
import threading
import time
from multiprocessing.pool import ThreadPool
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import data

CPU = torch.device("cpu")
seeds = st.integers(0, 2**63 - 1)


def write_images(root, count=6, size=(32, 32), classes=("cat", "dog"), kind="png", parts=("train", "test")):
    generator = np.random.default_rng(0)
    for part in parts:
        for name in classes:
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = generator.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
                Image.fromarray(pixels).save(root / part / name / f"{i}.{kind}")
    return root


def batches(source, **how):
    return list(data.training_batches(source, **({"batch_size": 8, "seed": 1, "epoch": 2, "device": CPU} | how)))


# --- chance without state ---------------------------------------------------------------------------------


@given(seeds, st.integers(0, 10**6), st.lists(st.integers(0, 2**40), min_size=1, max_size=20), st.data())
def test_uniforms_depend_on_seed_epoch_and_index_alone(seed, epoch, indices, more):
    all_rows = data.uniforms(seed, epoch, np.array(indices), 5)
    i = more.draw(st.integers(0, len(indices) - 1))
    assert np.array_equal(data.uniforms(seed, epoch, np.array(indices[i : i + 1]), 5)[0], all_rows[i])
    assert ((all_rows >= 0) & (all_rows < 1)).all()


def test_uniforms_are_uniform_and_independent():
    from scipy.stats import kstest

    u = data.uniforms(7, 3, np.arange(20_000), 4)
    others = [data.uniforms(8, 3, np.arange(20_000), 1)[:, 0], data.uniforms(7, 4, np.arange(20_000), 1)[:, 0]]
    assert all(kstest(column, "uniform").pvalue > 1e-3 for column in u.T)
    columns = np.vstack([*u.T, np.roll(u[:, 0], 1), *others])
    assert np.abs(np.corrcoef(columns) - np.eye(len(columns))).max() < 0.03


@given(seeds, st.integers(0, 1000), st.integers(1, 500))
def test_order_is_a_permutation_that_changes_with_seed_and_epoch(seed, epoch, count):
    first = data.order(count, seed=seed, epoch=epoch)
    assert sorted(first) == list(range(count))
    if count > 20:
        assert not np.array_equal(first, data.order(count, seed=seed, epoch=epoch + 1))
        assert not np.array_equal(first, data.order(count, seed=seed + 1, epoch=epoch))


# --- batches ----------------------------------------------------------------------------------------------


def cifar_like(count=40, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=generator)
    return data.InMemory(images, torch.arange(count), augmented=True)


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_any_number_of_processes_see_the_same_batches(processes):
    source = cifar_like()
    whole = batches(source)
    shares = [batches(source, rank=rank, processes=processes) for rank in range(processes)]
    assert len(whole) == 5
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)


def test_an_epoch_can_start_in_the_middle():
    source = cifar_like()
    for (x, y), (x2, y2) in zip(batches(source)[3:], batches(source, first=3), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


def test_an_epoch_shows_every_image_once_and_drops_the_rest():
    labels = torch.cat([y for _, y in batches(cifar_like(43))])
    assert len(labels) == 40
    assert len(set(labels.tolist())) == 40


def test_batches_leave_torchs_generator_alone():
    before = torch.get_rng_state()
    batches(cifar_like())
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("processes", [1, 3])
def test_evaluation_shows_every_image_once_unaugmented(processes):
    source = data.InMemory(torch.arange(20, dtype=torch.uint8).view(20, 1, 1, 1), torch.arange(20))
    seen = []
    for rank in range(processes):
        for x, y in data.evaluation_batches(source, batch_size=4, device=CPU, rank=rank, processes=processes):
            torch.testing.assert_close(x.flatten() * 255, y.float())
            seen += y.tolist()
    assert sorted(seen) == list(range(20))


# --- augmentation against a slow one, image by image ------------------------------------------------------


def slow_augmentation(image, u, *, border=4, fill=128, cutout=16):
    channels, height, width = image.shape
    cutout = min(cutout, height // 2, width // 2)
    if fill is None:  # row -k is row k, and row n - 1 + k is row n - 1 - k
        rows, columns = ([n - 1 - abs(n - 1 - abs(i - border)) for i in range(n + 2 * border)] for n in (height, width))
        padded = image[:, rows][:, :, columns].astype(np.float64)
    else:
        padded = np.full((channels, height + 2 * border, width + 2 * border), fill, dtype=np.float64)
        padded[:, border : border + height, border : border + width] = image
    top, left = int(u[0] * (2 * border + 1)), int(u[1] * (2 * border + 1))
    image = padded[:, top : top + height, left : left + width]
    if u[2] < 0.5:
        image = image[:, :, ::-1]
    if cutout:
        image = image.copy()
        even = cutout % 2 == 0
        y, x = (int(v * (n + even)) - cutout // 2 for v, n in ((u[3], height), (u[4], width)))
        rows, columns = slice(max(0, y), min(height, y + cutout)), slice(max(0, x), min(width, x + cutout))
        image[:, rows, columns] = image[:, rows, columns].mean((1, 2), keepdims=True)
    return image


HOW = {
    "border": st.integers(0, 5),
    "cutout": st.integers(0, 9),
    "fill": st.none() | st.integers(0, 255),
}


@given(seeds, st.just({}) | st.fixed_dictionaries(HOW))
def test_augmentation_is_crop_flip_and_cutout(seed, how):
    images = np.random.default_rng(seed).integers(0, 256, (6, 2, 9, 7), dtype=np.uint8)
    u = data.uniforms(seed, 0, np.arange(6), 5)
    got = data.augment(torch.from_numpy(images), torch.from_numpy(u), **how).numpy()
    expected = np.stack([slow_augmentation(image, row, **how) for image, row in zip(images, u, strict=True)])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16, 32])
def test_cutout_takes_a_quarter_of_an_image_at_most(side):
    """A square of 16 pixels leaves nothing of digits."""
    images = torch.arange(side**2, dtype=torch.uint8).view(1, 1, side, side).repeat(64, 1, 1, 1)
    u = torch.from_numpy(data.uniforms(0, 0, np.arange(64), 5))
    changed = data.augment(images, u, border=0) != data.augment(images, u, border=0, cutout=0)
    assert changed.flatten(1).sum(1).max() <= side**2 / 4
    assert changed.any() == (side > 2)


@pytest.mark.parametrize("cutout", [True, False])
def test_small_images_are_augmented_with_cutout_or_with_reflected_borders(cutout):
    images = torch.randint(1, 255, (4, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    source = data.InMemory(images, torch.arange(4), augmented=True)
    both = data.Data(source, source, list("abcd"), 1).at(size=8, min_scale=1, cutout=cutout)
    got = both.train.batch(np.arange(4), seed=3, epoch=2)[0]
    u = torch.from_numpy(data.uniforms(3, 2, np.arange(4), 6)[:, 1:])
    how = {} if cutout else {"fill": None, "cutout": 0}
    torch.testing.assert_close(got, data.augment(images, u, **how), rtol=0, atol=0)


def test_the_augmentation_of_an_image_depends_on_seed_epoch_and_its_index_alone():
    source = cifar_like()
    both = source.batch(np.array([3, 11]), seed=5, epoch=6)[0]
    alone = source.batch(np.array([11]), seed=5, epoch=6)[0]
    assert torch.equal(both[1], alone[0])
    assert not torch.equal(alone, source.batch(np.array([11]), seed=5, epoch=7)[0])
    assert not torch.equal(alone, source.batch(np.array([11]), seed=6, epoch=6)[0])


# --- large images -----------------------------------------------------------------------------------------


@given(seeds, st.integers(1, 2000), st.integers(1, 2000), st.floats(0.01, 1.0))
def test_random_boxes_lie_in_the_image(seed, width, height, min_scale):
    u = np.random.default_rng(seed).random(5)
    left, top, right, bottom = data.random_box(width, height, min_scale, u)
    assert 0 <= left < right <= width + 1e-9
    assert 0 <= top < bottom <= height + 1e-9


def test_random_boxes_have_the_promised_area_and_shape_in_a_large_image():
    u = data.uniforms(0, 0, np.arange(3000), 5)
    boxes = np.array([data.random_box(1000, 1000, 0.1, row) for row in u])
    w, h = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    inside = (w < 1000) & (h < 1000)
    area, ratio = (w * h / 1e6)[inside], (w / h)[inside]
    assert 0.1 <= area.min() < 0.15
    assert area.max() > 0.9
    assert 0.75 - 1e-9 <= ratio.min() < 0.77
    assert 1.3 < ratio.max() <= 4 / 3 + 1e-9


@pytest.mark.parametrize("size", [(256, 256), (400, 256), (256, 700)])
def test_a_test_image_is_shown_as_resize_256_crop_224(tmp_path, size):
    from torchvision.transforms import functional as F

    y, x = np.mgrid[: size[1], : size[0]]
    smooth = np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) * 255 / sum(size)], -1).astype(np.uint8)
    image = Image.fromarray(smooth)
    for name in ("train/a/0.png", "train/b/0.png", "test/a/0.png"):
        (tmp_path / name).parent.mkdir(parents=True)
        image.save(tmp_path / name)
    source = data.load(str(tmp_path)).test
    ours = data.fetch(source, np.arange(1), CPU)[0][0].permute(1, 2, 0).numpy() * 255
    theirs = np.asarray(F.center_crop(F.resize(image, 256), 224), dtype=float)
    assert np.abs(ours - theirs).max() <= 3


def test_draft_decoding_gives_the_same_image_as_full_decoding(tmp_path):
    y, x = np.mgrid[:900, :1200]
    smooth = np.stack([x / 5, y / 4, (x + y) / 9], -1).astype(np.uint8)
    Image.fromarray(smooth).save(tmp_path / "big.jpg", quality=95)
    box = (100.0, 50.0, 1000.0, 850.0)
    with data.open_image(tmp_path / "big.jpg") as image:
        drafted = np.asarray(data.crop(image, box, 64), dtype=float)
        assert image.size[0] < 1200, "draft did not reduce the image"
    full = Image.open(tmp_path / "big.jpg").convert("RGB").resize((64, 64), Image.Resampling.BILINEAR, box=box)
    assert np.abs(drafted - np.asarray(full, dtype=float)).max() <= 4


@pytest.mark.parametrize("workers", [0, 2])
def test_large_images_come_from_disk_the_same_whatever_the_workers(tmp_path, workers):
    write_images(tmp_path, size=(100, 80))
    loaded = data.load(str(tmp_path))
    assert not loaded.small
    for (x, y), (x2, y2) in zip(
        batches(loaded.train, batch_size=4), batches(loaded.train, batch_size=4, workers=workers), strict=True
    ):
        assert x.shape == (4, 3, 224, 224)
        assert torch.equal(x, x2)
        assert torch.equal(y, y2)


# --- data sets --------------------------------------------------------------------------------------------


def test_digits_are_scikit_learns_and_split_once():
    from sklearn.datasets import load_digits

    loaded = data.load("digits")
    train, test = loaded.train, loaded.test
    assert (len(train), len(test), len(loaded.classes), loaded.channels) == (1000, 797, 10, 1)
    ours = torch.cat([train.images, test.images]).flatten(1).numpy()
    theirs = load_digits().data
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs.astype(np.uint8)))
    x, y = data.fetch(train, np.arange(5), CPU)
    assert x.min() >= 0
    assert x.max() == 1
    assert y.tolist() == train.labels[:5].tolist()


def test_a_folder_of_small_images_is_held_in_memory_exactly(tmp_path):
    write_images(tmp_path)
    loaded = data.load("cifar10", tmp_path)
    train, test = loaded.train, loaded.test
    assert (loaded.classes, loaded.channels, len(train), len(test)) == (["cat", "dog"], 3, 12, 12)
    on_disk = np.asarray(Image.open(tmp_path / "test/dog/4.png"))
    assert torch.equal(test.images[10], torch.from_numpy(on_disk.copy()).permute(2, 0, 1))
    assert test.labels.tolist() == [0] * 6 + [1] * 6
    assert (train.augmented, test.augmented) == (True, False)


def test_val_serves_as_test_and_subset_is_fixed(tmp_path):
    write_images(tmp_path, parts=("train", "val"))
    first, second = (data.load(str(tmp_path), subset=5) for _ in range(2))
    assert len(first.train) == len(first.test) == 5
    assert torch.equal(first.train.images, second.train.images)


def test_torchvisions_layout(tmp_path, monkeypatch):
    import hashlib

    from torchvision.datasets import CIFAR10

    base = tmp_path / CIFAR10.base_folder
    base.mkdir()
    generator = np.random.default_rng(0)

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((base / name).read_bytes()).hexdigest()

    def batch(name):
        pixels = generator.integers(0, 256, (4, 3072), dtype=np.uint8)
        return name, write(name, {"data": pixels, "labels": [0, 1, 2, 1]}), pixels

    parts = [batch(f"data_batch_{i}") for i in range(1, 6)]
    test_part = batch("test_batch")
    meta = write("batches.meta", {"label_names": ["a", "b", "c"]})
    monkeypatch.setattr(CIFAR10, "train_list", [list(p[:2]) for p in parts])
    monkeypatch.setattr(CIFAR10, "test_list", [list(test_part[:2])])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": meta})
    with monkeypatch.context() as patched:  # where all is there nothing is written: the disk may be read-only
        for name in ("mkdir", "unlink", "touch"):
            patched.setattr(data.Path, name, None)
        loaded = data.load("cifar10", tmp_path)
    assert (len(loaded.train), len(loaded.test), loaded.classes) == (20, 4, ["a", "b", "c"])
    assert torch.equal(loaded.test.images.flatten(1), torch.from_numpy(test_part[2]))
    source, classes = data.load_test("cifar10", tmp_path, classes=["c", "x", "b", "a"])
    assert (source.labels.tolist(), classes) == ([3, 2, 0, 2], ["c", "x", "b", "a"])
    with pytest.raises(data.Unusable, match="cifar10/c: no training images for this class; the classes are a, b"):
        data.load_test("cifar10", tmp_path, classes=["a", "b"])
    (base / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(data.Unusable, match="no usable CIFAR-10") as error:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


def test_cifar10_is_downloaded_once_and_not_read_before_it_is_there(tmp_path, monkeypatch):
    """By several processes (here threads) that begin at once; the files come one after the other."""
    import torchvision

    downloads = []

    class Slow:
        base_folder, classes = "batches", ["a", "b"]

        def __init__(self, root, train, download=False):
            if download and not (root / "batches").is_dir():
                downloads.append(root)
                (root / "batches").mkdir()
                for name in "12":
                    time.sleep(0.3)
                    (root / "batches" / name).touch()
            if not all((root / "batches" / name).exists() for name in "12"):
                raise RuntimeError("Dataset not found or corrupted. You can use download=True to download it")
            self.data, self.targets = np.zeros((3, 32, 32, 3), np.uint8), [0, 1, 0]

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Slow)

    def loaded(wait):
        time.sleep(wait)
        return len(data.load("cifar10", tmp_path / "new").train)

    with ThreadPool(3) as pool:
        assert pool.map(loaded, [0, 0.1, 0.4], chunksize=1) == [3, 3, 3]
    assert len(downloads) == 1
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["batches"]
    with pytest.raises(data.Unusable, match="--split is for folders of images; cifar10 has a test part"):
        data.load("cifar10", tmp_path / "new", split=0.2)


# --- test images of several sizes -------------------------------------------------------------------------

SIZES = [(100, 80), (100, 80), (80, 100), (70, 200), (90, 90), (300, 75), (75, 90), (100, 81), (101, 80)]


def write_sizes(root, sizes=SIZES, parts=("train", "val")):
    """Images of different sizes, all of the same two gradients: red from left to right, green from top to bottom."""
    for part in parts:
        for i, (width, height) in enumerate(sizes):
            (root / part / f"c{i % 2}").mkdir(parents=True, exist_ok=True)
            x, y = (np.arange(width) + 0.5) / width * 255, (np.arange(height) + 0.5) / height * 255
            red, green = np.broadcast_to(x, (height, width)), np.broadcast_to(y[:, None], (height, width))
            pixels = np.stack([red, green, np.full_like(red, i)], -1).round().astype(np.uint8)
            Image.fromarray(pixels).save(root / part / f"c{i % 2}" / f"{i}.png")
    return root


def squares(root, size=64):
    return data.load(str(root)).at(size=size, min_scale=0.2).test


def evaluated(source, **how):
    """{blue, which names the image: (image, label)} of all batches."""
    found = {}
    for images, labels in data.evaluation_batches(source, **({"batch_size": 3, "device": CPU} | how)):
        assert len(images) == len(labels) > 0
        for image, label in zip(images, labels.tolist(), strict=True):
            name = round(float(image[2].mean() * 255))
            assert name not in found
            found[name] = image, label
    return found


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_processes_together_evaluate_every_image_once(tmp_path, processes):
    source = squares(write_sizes(tmp_path))
    shares = [evaluated(source, rank=rank, processes=processes, workers=rank % 2) for rank in range(processes)]
    assert sorted(name for share in shares for name in share) == list(range(len(SIZES)))
    for share in shares:
        for name, (image, label) in share.items():
            assert tuple(image.shape) == (3, 64, 64)
            assert label == name % 2


def test_how_an_image_is_evaluated_depends_on_it_alone(tmp_path):
    """Not on batch size, processes, workers or which other images there are."""
    root = write_sizes(tmp_path)
    reference = evaluated(squares(root), batch_size=1)
    others = [
        evaluated(squares(root), batch_size=100),
        evaluated(squares(root), rank=1, processes=2, workers=2),
    ]
    few = data.load(str(root), subset=4).at(size=64, min_scale=1).test
    for found in (*others, evaluated(few)):
        assert len(found) >= 4
        for name, (image, label) in found.items():
            assert torch.equal(image, reference[name][0])
            assert label == reference[name][1]


def test_a_test_image_shows_its_central_square(tmp_path):
    """On gradients, where the pixel at distance d from the centre is known in closed form."""
    for name, (image, _) in evaluated(squares(write_sizes(tmp_path))).items():
        step = min(SIZES[name]) * 7 / 8 / 64  # pixels of the original to a pixel of ours
        for channel, length in enumerate(SIZES[name]):
            expected = 127.5 + (np.arange(64) - 31.5) * step * 255 / length
            np.testing.assert_allclose(image[channel].mean(channel).numpy() * 255, expected, atol=1.2)


def test_pixels_are_those_that_are_stored_whatever_exif_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    for name, orientation in (("plain", 1), ("turned", 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "0.jpg", exif=exif)
    assert Image.open(tmp_path / "val/turned/0.jpg").getexif()[0x0112] == 6
    ((images, _),) = data.evaluation_batches(squares(tmp_path), batch_size=2, device=CPU)
    assert images.shape == (2, 3, 64, 64)
    assert torch.equal(images[0], images[1])


def test_another_size_keeps_images_held_in_memory():
    digits = data.load("digits")
    assert digits.at(size=288, min_scale=0.5).train.images is digits.train.images


def test_another_size_changes_crops_and_nothing_else(tmp_path):
    loaded = data.load(str(write_images(tmp_path, size=(100, 80))))
    same, larger = (loaded.at(size=size, min_scale=0.08) for size in (224, 40))
    for (x, y), (x2, y2), (x3, y3) in zip(*(batches(d.train) for d in (loaded, same, larger)), strict=True):
        assert torch.equal(x, x2)
        assert x3.shape == (8, 3, 40, 40)
        assert y.tolist() == y2.tolist() == y3.tolist()
    whole = loaded.at(size=40, min_scale=1.0)
    assert not torch.equal(batches(whole.train)[0][0], batches(larger.train)[0][0])
    assert loaded.train.size == 224  # the source itself is as it was


# --- unreadable images ------------------------------------------------------------------------------------


def truncate(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def cut_header(path):
    path.write_bytes(path.read_bytes()[:12])


DAMAGE = {
    "truncated": truncate,
    "header": cut_header,
    "empty": lambda path: path.write_bytes(b""),
    "text": lambda path: path.write_text("not an image"),
    "missing": lambda path: path.unlink(),
}


def damaged(root, names, damage="truncated"):
    """Twelve training and twelve test images of 100x80; those with these indices are damaged after listing."""
    write_images(root, size=(100, 80), kind="jpg")
    loaded = data.load(str(root)).at(size=32, min_scale=0.3)
    for source in (loaded.train, loaded.test):
        for i in names:
            DAMAGE[damage](source.path(i))
    return loaded


@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_training_image_is_replaced_by_the_next(tmp_path, damage):
    whole = damaged(tmp_path / "whole", []).train
    source = damaged(tmp_path / "damaged", [3, 4], damage).train
    problems = []
    ((images, labels),) = batches(source, batch_size=12, problems=problems)
    shown = data.order(12, seed=1, epoch=2)
    u = data.uniforms(1, 2, shown, 6)[:, 1:]
    for place, index in enumerate(shown):
        stands_for = 5 if index in (3, 4) else index
        expected = whole._image(whole.path(stands_for), u[place])
        assert np.array_equal((images[place] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
        assert labels[place] == whole.labels[stands_for]
    assert sorted(line.split(":")[0] for line in problems) == sorted(map(str, [source.path(i) for i in (3, 4, 4)]))
    assert all("\n" not in line and "not a readable image" in line for line in problems)


@pytest.mark.parametrize(("processes", "workers"), [(1, 0), (2, 0), (1, 2), (2, 1)])
def test_replacements_are_the_same_whatever_the_processes_and_workers(tmp_path, processes, workers):
    source = damaged(tmp_path, [0, 11]).train  # the one after the last is the first, which is damaged too
    reference, problems = [], []
    whole = batches(source, batch_size=4, problems=reference)
    shares = []
    for rank in range(processes):
        how = {"rank": rank, "processes": processes, "workers": workers}
        shares.append(batches(source, batch_size=4, problems=problems, **how))
    for step, (images, labels) in enumerate(whole):
        assert torch.equal(torch.cat([share[step][0] for share in shares]), images)
        assert torch.equal(torch.cat([share[step][1] for share in shares]), labels)
    assert sorted(problems) == sorted(reference)
    assert len(reference) == 3


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", DAMAGE)
def test_an_unreadable_test_image_is_left_out(tmp_path, damage, workers):
    source = damaged(tmp_path, [2, 8, 9], damage).test
    problems, labels = [], []
    for x, y in data.evaluation_batches(source, batch_size=1, device=CPU, workers=workers, problems=problems):
        assert x.shape == (1, 3, 32, 32)
        labels += y.tolist()
    assert len(labels) == 9
    assert sum(labels) == 4  # of six images of the second class two are lost
    assert sorted(line.split(":")[0] for line in problems) == [str(source.path(i)) for i in (2, 8, 9)]


def test_a_run_of_unreadable_images_has_a_limit(tmp_path, monkeypatch):
    source = damaged(tmp_path, [3, 4, 5]).train
    monkeypatch.setattr(data, "TRIES", 4)
    problems = []
    assert len(batches(source, batch_size=12, problems=problems)[0][1]) == 12
    assert len(problems) == 1 + 2 + 3
    monkeypatch.setattr(data, "TRIES", 3)
    with pytest.raises(data.Unusable, match=r"cat/3\.jpg: not a readable .* nor is any of the 2 images after it"):
        batches(source, batch_size=12, problems=[])


def test_a_message_comes_before_its_batch(tmp_path):
    source = damaged(tmp_path, [1]).test
    problems = []
    stream = data.evaluation_batches(source, batch_size=4, device=CPU, problems=problems)
    assert len(next(stream)[1]) == 3
    assert len(problems) == 1


@pytest.mark.parametrize("damage", DAMAGE)
def test_without_a_list_an_unreadable_image_raises(tmp_path, damage):
    loaded = damaged(tmp_path, [5], damage)
    with pytest.raises(data.Unusable, match=r"cat/5\.jpg: not a readable image"):
        list(data.evaluation_batches(loaded.test, batch_size=4, device=CPU))
    with pytest.raises(data.Unusable, match=r"cat/5\.jpg: not a readable image"):
        batches(loaded.train, batch_size=12)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_disk_is_an_error(tmp_path, workers):
    loaded = damaged(tmp_path, [])
    shutil.rmtree(tmp_path)
    with pytest.raises(data.Unusable, match="nor is any of the 11 images after it") as error:
        batches(loaded.train, batch_size=4, workers=workers, problems=[])
    assert "\n" not in str(error.value)
    problems = []
    assert list(data.evaluation_batches(loaded.test, batch_size=4, device=CPU, problems=problems)) == []
    assert len(problems) == 12
    with pytest.raises(data.Unusable, match="none of 3 images can be read"):
        data.fetch(loaded.test, np.arange(3), CPU, problems=problems)


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


# --- test images alone ------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(32, 32), (100, 80)])
def test_test_images_can_be_loaded_without_training_images(tmp_path, size):
    root = write_images(tmp_path, size=size)
    both = data.load(str(root)).test, *data.load_test(str(root))[:1]
    assert data.load_test("cifar10", root)[1] == ["cat", "dog"]
    shutil.rmtree(root / "train")
    source, classes = data.load_test(str(root))
    assert classes == ["cat", "dog"]
    assert type(source) is type(both[0]) is type(both[1])
    for x, x2, x3 in zip(*(data.fetch(s, np.arange(12), CPU) for s in (source, *both)), strict=True):
        assert torch.equal(x, x2)
        assert torch.equal(x, x3)


def test_labels_of_test_images_are_those_of_training_where_that_is_there(tmp_path):
    root = write_images(tmp_path)
    shutil.rmtree(root / "test/cat")
    (root / "test/eel").mkdir()
    with pytest.raises(data.Unusable, match="test/eel: no training images"):
        data.load_test(str(root))
    (root / "test/eel").rename(root / "test/cat")
    assert set(data.load_test(str(root))[0].labels.tolist()) == {1}


def test_test_images_of_digits_and_of_nothing(tmp_path):
    assert torch.equal(data.load_test("digits", tmp_path)[0].images, data.load("digits").test.images)
    with pytest.raises(data.Unusable, match="unknown data set"):
        data.load_test("mnist")


# --- names, places and classes ----------------------------------------------------------------------------


def test_the_users_word_names_the_place_and_names_are_names(tmp_path, monkeypatch):
    """One resolution for `load` and `load_test`; each folder here has a class of its own name."""

    def where(name, data_dir=None):
        loaded = data.load(name, data_dir)
        assert data.load_test(name, data_dir)[1] == loaded.classes
        return loaded.classes[0]

    monkeypatch.chdir(tmp_path)
    for folder in ("imagenet", "cifar10", "ds", "data", "other/ds"):
        write_images(tmp_path / folder, 1, (8, 8), (folder.replace("/", "-"), "z"))
    assert where("imagenet") == where("cifar10") == where("cifar10", "data") == "data"
    assert where("imagenet", tmp_path / "other/ds") == where("ds", "other/ds") == "other-ds"
    assert where("ds") == where("./ds") == where(str(tmp_path / "ds")) == "ds"
    assert where("./imagenet") == "imagenet"
    with pytest.raises(data.Unusable, match=r"absent: no such folder"):
        data.load("ds", "absent")


@pytest.mark.parametrize(
    ("name", "data_dir", "message"),
    [
        ("mnist", None, "unknown data set 'mnist'; a data set is digits, cifar10, imagenet, or the path"),
        ("/no/such/dir", None, "/no/such/dir: no such folder"),
        ("imagenet", None, "^data: no folder train in it; .*; --data-dir names another place"),
        ("imagenet", "/no/such/dir", "/no/such/dir: no folder train in it; .*; --data-dir names another place"),
        (".", None, r"\.: no folder train in it; expected train/<class>/\*"),
    ],
)
def test_absent_data_is_told_as_what_it_is(tmp_path, monkeypatch, name, data_dir, message):
    monkeypatch.chdir(tmp_path)
    for load in (data.load, data.load_test):
        with pytest.raises(data.Unusable, match=message) as error:
            load(name, data_dir)
        assert "\n" not in str(error.value)


def test_labels_follow_the_names_that_a_network_knows(tmp_path):
    root = write_images(tmp_path, 2, classes=("cat", "dog"))
    source, classes = data.load_test(str(root), classes=["ape", "dog", "cat"])
    assert (classes, source.labels.tolist()) == (["ape", "dog", "cat"], [2, 2, 1, 1])
    shutil.rmtree(root / "test/cat")
    assert data.load_test(str(root), classes=["ape", "dog", "cat"])[0].labels.tolist() == [1, 1]
    with pytest.raises(data.Unusable, match=r"test/dog: no training images for this class; the classes are ape, cat"):
        data.load_test(str(root), classes=["ape", "cat"])
    digits = data.load("digits").test
    source, _ = data.load_test("digits", classes=[str(9 - i) for i in range(10)])
    assert torch.equal(source.labels, 9 - digits.labels)


# --- folders as they are found ----------------------------------------------------------------------------

FOUND = [
    "a",
    "b c",
    "\u00e4.b",
    "[x]",
    "160",
    "train",
    "-",
    "a.png",
    "B.PNG",
    "t.jpg.png",
    "n.txt",
    "\udcff.png",
    "l\nf.png",
]
NAMES = st.sampled_from([*FOUND, ".ipynb_checkpoints", ".DS_Store", "._a.png", "..png"])
TREES = st.dictionaries(
    NAMES, st.recursive(st.none(), lambda t: st.dictionaries(NAMES, t, max_size=4), max_leaves=8), max_size=4
)


def plant(root, tree, contents):
    """Write a tree of folders (dictionaries) and files; each has another colour."""
    root.mkdir(parents=True)
    for name, below in tree.items():
        if below is None:
            (root / name).write_bytes(next(contents))
        else:
            plant(root / name, below, contents)


def colours():
    for value in range(256):
        content = io.BytesIO()
        Image.new("RGB", (3, 3), (value, 0, 0)).save(content, "PNG")
        yield content.getvalue()


def walked(root):
    """The class folders and the images (class, colour) that a user means, by os.walk alone."""
    classes = sorted(name for name in next(os.walk(root))[1] if name[0] != ".")
    images = set()
    for path, _, files in os.walk(root):
        inside = Path(path).relative_to(root).parts
        for name in files:
            if (
                inside
                and not any(part[0] == "." for part in (*inside, name))
                and name.lower().endswith(data.EXTENSIONS)
            ):
                images.add((inside[0], np.asarray(Image.open(Path(path) / name))[0, 0, 0]))
    return classes, images


@settings(max_examples=60)
@given(TREES, TREES, st.sampled_from(["test", "val"]))
def test_any_tree_of_files_is_read_with_its_own_labels_or_refused_in_one_line(train, test, held_out):
    from torchvision.datasets import ImageFolder

    with tempfile.TemporaryDirectory() as directory:
        root, contents = Path(directory), colours()
        plant(root / "train", train, contents)
        plant(root / held_out, test, contents)
        (classes, images), (test_classes, test_images) = walked(root / "train"), walked(root / held_out)
        good = len(classes) > 1 and images and test_images and set(test_classes) <= set(classes)
        if not good:
            with pytest.raises(data.Unusable) as error:
                data.load(directory)
            assert len(str(error.value).encode().splitlines()) == 1
            return
        loaded = data.load(directory)
        for source, expected in ((loaded.train, images), (loaded.test, test_images)):
            found = [(classes[label], red) for label, red in zip(source.labels, source.images[:, 0, 0, 0], strict=True)]
            assert len(found) == len(expected)
            assert {(name, int(red)) for name, red in found} == expected
        assert loaded.classes == classes
        assert all(len(note.encode().splitlines()) == 1 for note in loaded.notes)
        empty = set(classes) - {name for name, _ in images}
        assert any("class folders without images" in note for note in loaded.train.notes) == bool(empty)
        if not any("/." in str(path.relative_to(root)) for path in root.rglob("*")):
            theirs = ImageFolder(root / "train", allow_empty=True)
            assert theirs.classes == classes
            assert sorted(y for _, y in theirs.samples) == loaded.train.labels.tolist()


@pytest.mark.parametrize("size", [(8, 8), (100, 80)])
def test_a_share_kept_for_testing_is_a_fixed_function_of_the_names(tmp_path, size):
    root = write_images(tmp_path, 60, size, parts=("train",))

    def names(split):
        loaded = data.load(str(root), split=split)
        source, classes = data.load_test(str(root), split=split)
        assert (len(source), source.labels.tolist(), classes) == (
            len(loaded.test),
            loaded.test.labels.tolist(),
            ["cat", "dog"],
        )
        assert len(loaded.train) + len(loaded.test) == len(list(root.rglob("*.png")))
        held = data.held_out(root, split=split)
        assert held.labels.tolist() == source.labels.tolist()
        return set(held.names)

    some, more = names(0.2), names(0.5)
    assert some < more
    assert 12 <= len(some) <= 36
    for path in list(root.glob("train/*/?.png")):
        path.unlink()
    assert names(0.2) == {name for name in some if len(Path(name).name) > 5}
    for split, says in ((1e-9, r"train: --split .* leaves no image for t"), (1.0, "must be a share from 0 to less")):
        with pytest.raises(data.Unusable, match=says):
            data.load(str(root), split=split)
    (root / "val/cat").mkdir(parents=True)
    with pytest.raises(data.Unusable, match=r"val: is there.* leave out --split"):
        data.load(str(root), split=0.2)


def test_imagenets_own_test_folder_is_no_test_part(tmp_path):
    root = write_images(tmp_path, 2, parts=("train", "val"))
    (root / "test").mkdir()
    Image.new("RGB", (32, 32)).save(root / "test/ILSVRC2012_test_1.png")
    loaded = data.load(str(root))
    assert len(loaded.test) == 4
    assert [note.split(": ")[1] for note in loaded.notes] == [
        f"passed over, since it has no folders of the classes, unlike {root / 'val'}"
    ]
    shutil.rmtree(root / "train")
    assert len(data.load_test(str(root))[0]) == 4
    (root / "test/unknown").mkdir()
    assert len(data.load_test(str(root), classes=["cat", "dog"])[0]) == 4


def test_what_is_passed_over_is_said_and_links_end(tmp_path):
    root = write_images(tmp_path, 1)
    (root / "train/.ipynb_checkpoints").mkdir()
    (root / "train/cat/._0.png").write_bytes(b"resource fork")
    (root / "train/dog/notes.txt").write_text("mine")
    (root / "train/eel").mkdir()
    assert data.load(str(root)).notes == [
        f"{root}/train: 3 passed over as no images of a class (.ipynb_checkpoints, cat/._0.png, dog/notes.txt)",
        f"{root}/train: 1 class folders without images (eel)",
    ]
    (root / "test/cat/more").symlink_to(root / "train/dog")
    assert data.load(str(root)).test.labels.tolist() == [0, 0, 1]
    (root / "test/cat/round").symlink_to(root / "test")
    with pytest.raises(OSError, match="Too many levels of symbolic links"):
        data.load(str(root))


# --- kinds of pixels --------------------------------------------------------------------------------------


def tiff(values, bits, photometric):
    """A grey TIFF of 8x8 pixels, little endian, as no writer here makes it: 12 or 16 bits, 0 black or (0) white."""
    numbers = values.ravel().tolist()
    if bits == 12:
        content = b"".join(((a << 12) | b).to_bytes(3, "big") for a, b in zip(numbers[::2], numbers[1::2], strict=True))
    else:
        content = np.array(numbers, "<u2").tobytes()
    fields = {256: 8, 257: 8, 258: bits, 259: 1, 262: photometric, 273: 8, 277: 1, 278: 8, 279: len(content)}
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, v) for tag, v in fields.items())
    head = struct.pack("<2sHI", b"II", 42, 8 + len(content))
    return head + content + struct.pack("<H", len(fields)) + entries + struct.pack("<I", 0)


RAMP = np.arange(64).reshape(8, 8) * 4  # grey levels
KINDS = {
    "I;16.png": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path),
    "I;16.tif": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path),
    "I;16B.tif": lambda path: Image.fromarray((RAMP * 257).astype(">u2")).save(path),
    "I.ppm": lambda path: Image.fromarray((RAMP * 257).astype(np.uint16)).save(path),
    "12 bits.tif": lambda path: path.write_bytes(tiff((RAMP * 4095 / 255).round().astype(int), 12, 1)),
    "0 is white.tif": lambda path: path.write_bytes(tiff((255 - RAMP) * 257, 16, 0)),
    "L.bmp": lambda path: Image.fromarray(RAMP.astype(np.uint8)).save(path),
    "LA.png": lambda path: Image.fromarray(RAMP.astype(np.uint8)).convert("LA").save(path),
    "RGBA.png": lambda path: Image.fromarray(RAMP.astype(np.uint8)).convert("RGBA").save(path),
    "P.png": lambda path: Image.fromarray(RAMP.astype(np.uint8)).convert("P").save(path),
    "CMYK.jpg": lambda path: Image.fromarray(RAMP.astype(np.uint8)).convert("CMYK").save(path, quality=100),
}
REFUSED = {
    "F.tif": lambda path: Image.fromarray((RAMP / 255).astype(np.float32)).save(path),
    "I.tif": lambda path: Image.fromarray((RAMP * 70_000).astype(np.int32)).save(path),
}


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_pixels_has_its_grey_levels(tmp_path, kind, channels):
    """In memory, and from disk."""
    for part in ("train", "test"):
        for name in "ab":
            (tmp_path / "in" / part / name).mkdir(parents=True)
            KINDS[kind](tmp_path / "in" / part / name / f"0{Path(kind).suffix}")
    loaded = data.load(str(tmp_path / "in"), channels=channels)
    assert (loaded.channels, loaded.small) == (channels, True)
    tolerance = 3 if "CMYK" in kind else 0.51  # lossy
    assert np.abs(loaded.test.images.numpy() - RAMP.astype(float)).max() <= tolerance
    source, _ = data.load_test(str(tmp_path / "in"), channels=channels, small=False)
    pixels = data.fetch(source.at(8), np.arange(2), CPU)[0] * 255
    assert pixels.shape == (2, channels, 8, 8)
    middle = np.asarray(data.crop(Image.fromarray(RAMP.astype(np.uint8)), (0.5, 0.5, 7.5, 7.5), 8, 1), dtype=float)
    assert np.abs(pixels.numpy() - middle).max() <= tolerance + 1


@pytest.mark.parametrize("kind", REFUSED)
def test_pixels_without_a_defined_range_are_refused_in_one_line(tmp_path, kind):
    write_images(tmp_path, 1, (8, 8))
    REFUSED[kind](tmp_path / "test/cat/0.tif")
    with pytest.raises(
        data.Unusable, match=r"test/cat/0\.tif: not a readable image \(the numbers .* store 8 or 16"
    ) as error:
        data.load(str(tmp_path))
    assert "\n" not in str(error.value)


# --- threads that read ------------------------------------------------------------------------------------


def test_results_of_threads_come_in_order_and_errors_as_they_are():
    assert list(data.in_threads(lambda i: time.sleep(0.01 * (i % 3)) or i, range(20), 3)) == list(range(20))
    for count in (0, 2):
        found = data.in_threads(int, ["1", "x", "2"], count)
        assert next(found) == 1
        with pytest.raises(ValueError, match="invalid literal"):
            next(found)


@pytest.mark.parametrize("count", [1, 3])
def test_threads_work_ahead_by_two_items_each_and_end_with_their_reader(count):
    started, before = [], threading.active_count()
    found = data.in_threads(started.append, range(100), count)
    for read in range(1, 5):
        next(found)
        wait_for(lambda read=read: len(started) == 2 * count + read)
    time.sleep(0.05)
    assert sorted(started) == list(range(2 * count + 4))
    found.close()
    wait_for(lambda: threading.active_count() <= before)


def test_waiting_for_data_can_be_stopped(tmp_path):
    """Of twelve training images one, the last to be shown, is a pipe that nobody writes into."""
    source = damaged(tmp_path, []).train
    path = source.path(int(data.order(12, seed=1, epoch=2)[-1]))
    path.unlink()
    os.mkfifo(path)
    asked = []
    how = {"batch_size": 4, "workers": 2, "stop": lambda: asked.append(1) or len(asked) == 1}
    try:
        assert len(batches(source, **how)) == 2
        assert len(asked) == 1
    finally:
        os.close(os.open(path, os.O_WRONLY | os.O_NONBLOCK))  # lets the reader go


# --- errors name what and where, in one line --------------------------------------------------------------


REFUSED_FOLDERS = {
    "garbage": (lambda root: (root / "train/dog/3.png").write_bytes(b"\x89PNG but"), "train/dog/3.png: not a readable"),
    "half": (lambda root: truncate(root / "train/cat/2.png"), "train/cat/2.png: not a readable image"),
    "no test": (lambda root: (root / "test").rename(root / "unused"), "no folder test or val"),
    "empty test": (
        lambda root: [file.unlink() for file in root.glob("test/*/*")],
        "test: 0 images in 2 class folders; expected at least 2, with images of these kinds",
    ),
    "new class": (lambda root: (root / "test/horse").mkdir(), "test/horse: no training images for this class"),
    "one class": (
        lambda root: (root / "train/dog").rename(root / "dog"),
        "train: 4 images in 1 class folders; expected at least 2",
    ),
}


@pytest.mark.parametrize("case", REFUSED_FOLDERS)
def test_damaged_folders_are_refused(tmp_path, case):
    damage, message = REFUSED_FOLDERS[case]
    damage(write_images(tmp_path, 4))
    with pytest.raises(data.Unusable, match=message) as error:
        data.load(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["train/cat/1.png", "train/dog/3.png", "test/dog/0.png"])
@pytest.mark.parametrize("size", [(31, 32), (400, 300)])
def test_small_images_of_several_sizes_are_decoded_on_demand(tmp_path, name, size):
    """As large ones are, wherever the odd one is, and by evaluate.py too, which sees the test images alone."""
    write_images(tmp_path, 4)
    assert data.load(str(tmp_path)).small
    Image.new("RGB", size).save(tmp_path / name)
    loaded = data.load(str(tmp_path))
    assert not loaded.small
    assert loaded.short_side == 32
    loaded = loaded.at(size=24, min_scale=0.5)
    assert [x.shape for x, _ in batches(loaded.train)] == [(8, 3, 24, 24)]
    source, _ = data.load_test(str(tmp_path), small=loaded.small)
    for x, x2 in zip(*(data.fetch(s, np.arange(8), CPU) for s in (source.at(24), loaded.test)), strict=True):
        assert torch.equal(x, x2)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_large_image_is_named_from_any_thread(tmp_path, workers):
    (write_images(tmp_path, size=(100, 80)) / "train/dog/3.png").write_bytes(b"\x89PNG but not really")
    loaded = data.load(str(tmp_path))
    with pytest.raises(data.Unusable, match=r"train/dog/3\.png: not a readable image") as error:
        batches(loaded.train, batch_size=12, workers=workers)
    assert "\n" not in str(error.value)
