"""Batches are a pure function of (seed, epoch, index); images are what is on disk; errors name the file."""

import os
import pickle
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import data
import runs

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
    return data.InMemory(images, torch.arange(count), augmentation=data.CIFAR)


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


def slow_augmentation(image, u, how):
    channels, height, width = image.shape
    padded = np.full((channels, height + 2 * how.pad, width + 2 * how.pad), how.fill, dtype=np.float64)
    padded[:, how.pad : how.pad + height, how.pad : how.pad + width] = image
    top, left = int(u[0] * (2 * how.pad + 1)), int(u[1] * (2 * how.pad + 1))
    image = padded[:, top : top + height, left : left + width]
    if how.flip and u[2] < 0.5:
        image = image[:, :, ::-1]
    if how.cutout:
        image = image.copy()
        even = how.cutout % 2 == 0
        y, x = (int(v * (n + even)) - how.cutout // 2 for v, n in ((u[3], height), (u[4], width)))
        rows, columns = slice(max(0, y), min(height, y + how.cutout)), slice(max(0, x), min(width, x + how.cutout))
        image[:, rows, columns] = image[:, rows, columns].mean((1, 2), keepdims=True)
    return image


@given(seeds, st.integers(0, 5), st.booleans(), st.integers(0, 9), st.integers(0, 255))
def test_augmentation_is_crop_flip_and_cutout(seed, pad, flip, cutout, fill):
    how = data.Augmentation(pad=pad, fill=fill, flip=flip, cutout=cutout)
    images = np.random.default_rng(seed).integers(0, 256, (6, 2, 9, 7), dtype=np.uint8)
    u = data.uniforms(seed, 0, np.arange(6), 5)
    got = how(torch.from_numpy(images), torch.from_numpy(u)).numpy()
    expected = np.stack([slow_augmentation(image, row, how) for image, row in zip(images, u, strict=True)])
    np.testing.assert_allclose(got, expected, rtol=1e-5)


def test_the_augmentation_of_an_image_depends_on_seed_epoch_and_its_index_alone():
    source = cifar_like()
    both, _ = source.batch(np.array([3, 11]), seed=5, epoch=6)
    alone, _ = source.batch(np.array([11]), seed=5, epoch=6)
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
def test_centre_box_is_resize_256_crop_224(size):
    from torchvision.transforms import functional as F

    y, x = np.mgrid[: size[1], : size[0]]
    smooth = np.stack([x * 255 / size[0], y * 255 / size[1], (x + y) * 255 / sum(size)], -1).astype(np.uint8)
    image = Image.fromarray(smooth)
    ours = np.asarray(data.crop(image, data.centre_box(*size), 224), dtype=float)
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

    train, test, classes, channels = data.load("digits")
    assert (len(train), len(test), len(classes), channels) == (1000, 797, 10, 1)
    ours = torch.cat([train.images, test.images]).flatten(1).numpy()
    theirs = load_digits().data
    assert sorted(map(bytes, ours)) == sorted(map(bytes, theirs.astype(np.uint8)))
    x, y = data.fetch(train, np.arange(5), CPU)
    assert x.min() >= 0
    assert x.max() == 1
    assert y.tolist() == train.labels[:5].tolist()


def test_a_folder_of_small_images_is_held_in_memory_exactly(tmp_path):
    write_images(tmp_path)
    train, test, classes, channels = data.load("cifar10", tmp_path)
    assert (classes, channels, len(train), len(test)) == (["cat", "dog"], 3, 12, 12)
    on_disk = np.asarray(Image.open(tmp_path / "test/dog/4.png"))
    assert torch.equal(test.images[10], torch.from_numpy(on_disk.copy()).permute(2, 0, 1))
    assert test.labels.tolist() == [0] * 6 + [1] * 6
    assert test.augmentation is None
    assert train.augmentation == data.CIFAR


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
    train, test, classes, _ = data.load("cifar10", tmp_path)
    assert (len(train), len(test), classes) == (20, 4, ["a", "b", "c"])
    assert torch.equal(test.images.flatten(1), torch.from_numpy(test_part[2]))
    (base / "data_batch_3").write_bytes(b"broken")
    with pytest.raises(data.DataError, match="no usable CIFAR-10") as error:
        data.load("cifar10", tmp_path)
    assert "\n" not in str(error.value)


# --- rectangles -------------------------------------------------------------------------------------------

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


def rectangular(root, size=64):
    return data.folder(root).at(size=size, min_scale=0.2, rectangular=True).test


def evaluated(source, **how):
    """{blue, which names the image: (image, label)} of all batches, each of one shape."""
    found = {}
    for images, labels in data.evaluation_batches(source, **({"batch_size": 3, "device": CPU} | how)):
        assert len(images) == len(labels) > 0
        for image, label in zip(images, labels.tolist(), strict=True):
            name = round(float(image[2].mean() * 255))
            assert name not in found
            found[name] = image, label
    return found


@given(st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([128, 224, 288]))
def test_rectangles_have_the_documented_shape(width, height, size):
    short, long = sorted(data.rectangle(width, height, size))
    assert short == size
    exact = size * max(width, height) / min(width, height)
    assert size <= long <= 2 * size
    assert long % 32 == 0
    assert long <= exact
    assert long > exact - 32 or long == 2 * size
    assert data.rectangle(height, width, size) == data.rectangle(width, height, size)[::-1]
    left, top, right, bottom = data.centre_box(width, height, data.rectangle(width, height, size))
    assert min(right - left, bottom - top) == pytest.approx(min(width, height) * 7 / 8)
    assert (right - left) / (bottom - top) == pytest.approx(np.divide(*data.rectangle(width, height, size)[::-1]))
    assert left >= 0
    assert top >= 0
    assert (left + right, top + bottom) == pytest.approx((width, height))


@pytest.mark.parametrize(
    ("width", "height", "shape"), [(500, 375, (288, 384)), (375, 500, (384, 288)), (400, 400, (288, 288))]
)
def test_rectangles_of_common_images(width, height, shape):
    assert data.rectangle(width, height, 288) == shape
    assert data.rectangle(5 * width, height, 288)[1] <= 576


@pytest.mark.parametrize("processes", [1, 2, 4])
def test_all_processes_together_evaluate_every_image_once_in_its_rectangle(tmp_path, processes):
    source = rectangular(write_sizes(tmp_path))
    shares = [evaluated(source, rank=rank, processes=processes, workers=rank % 2) for rank in range(processes)]
    assert sorted(name for share in shares for name in share) == list(range(len(SIZES)))
    for share in shares:
        for name, (image, label) in share.items():
            assert tuple(image.shape[1:]) == data.rectangle(*SIZES[name], 64)
            assert label == name % 2


def test_how_an_image_is_evaluated_depends_on_it_alone(tmp_path):
    """Not on batch size, processes, workers or which other images there are."""
    root = write_sizes(tmp_path)
    reference = evaluated(rectangular(root), batch_size=1)
    others = [
        evaluated(rectangular(root), batch_size=100),
        evaluated(rectangular(root), rank=1, processes=2, workers=2),
    ]
    few = data.folder(root, subset=4).at(size=64, min_scale=1, rectangular=True).test
    for found in (*others, evaluated(few)):
        assert len(found) >= 4
        for name, (image, label) in found.items():
            assert torch.equal(image, reference[name][0])
            assert label == reference[name][1]


def test_rectangles_show_what_the_square_shows_and_more_at_the_same_scale(tmp_path):
    """On gradients, where the pixel at distance d from the centre is known in closed form."""
    root = write_sizes(tmp_path)
    squares = evaluated(data.folder(root).at(size=64, min_scale=1, rectangular=False).test)
    for name, (image, _) in evaluated(rectangular(root)).items():
        width, height = SIZES[name]
        step = min(width, height) * 7 / 8 / 64  # pixels of the original to a pixel of ours
        for channel, length, count in ((0, width, image.shape[2]), (1, height, image.shape[1])):
            expected = 127.5 + (np.arange(count) - (count - 1) / 2) * step * 255 / length
            ours = image[channel].mean(channel).numpy() * 255
            np.testing.assert_allclose(ours, expected, atol=1.2)
        top, left = (image.shape[1] - 64) // 2, (image.shape[2] - 64) // 2
        centre = image[:, top : top + 64, left : left + 64]
        assert (centre - squares[name][0]).abs().max() <= 2.01 / 255


def test_single_batches_stay_square(tmp_path):
    source = rectangular(write_sizes(tmp_path))
    assert data.fetch(source, np.arange(9), CPU)[0].shape == (9, 3, 64, 64)


def test_headers_are_read_once(tmp_path, monkeypatch):
    source, opened = rectangular(write_sizes(tmp_path)), []
    real = data.Image.open
    monkeypatch.setattr(data.Image, "open", lambda path: opened.append(path) or real(path))
    for _ in range(3):
        data.evaluation_batches(source, batch_size=2, device=CPU)
    assert len(opened) == len(SIZES)


def test_pixels_are_those_that_are_stored_whatever_exif_says(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (80, 120, 3), dtype=np.uint8)
    for name, orientation in (("plain", 1), ("turned", 6)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        for part in ("train", "val"):
            (tmp_path / part / name).mkdir(parents=True)
            Image.fromarray(pixels).save(tmp_path / part / name / "0.jpg", exif=exif)
    assert Image.open(tmp_path / "val/turned/0.jpg").getexif()[0x0112] == 6
    ((images, _),) = data.evaluation_batches(rectangular(tmp_path), batch_size=2, device=CPU)
    assert images.shape == (2, 3, 64, 96)
    assert torch.equal(images[0], images[1])


def test_another_size_keeps_images_held_in_memory():
    digits = data.load("digits")
    assert digits.at(size=288, min_scale=0.5, rectangular=True) is digits


def test_another_size_changes_crops_and_nothing_else(tmp_path):
    loaded = data.folder(write_images(tmp_path, size=(100, 80)))
    same, larger = (loaded.at(size=size, min_scale=0.08, rectangular=False) for size in (224, 40))
    for (x, y), (x2, y2), (x3, y3) in zip(*(batches(d.train) for d in (loaded, same, larger)), strict=True):
        assert torch.equal(x, x2)
        assert x3.shape == (8, 3, 40, 40)
        assert y.tolist() == y2.tolist() == y3.tolist()
    whole = loaded.at(size=40, min_scale=1.0, rectangular=False)
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
    loaded = data.folder(root).at(size=32, min_scale=0.3, rectangular=True)
    for source in (loaded.train, loaded.test):
        for i in names:
            DAMAGE[damage](source.paths[i])
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
        expected = whole._image(whole.paths[stands_for], u[place], (32, 32))
        assert np.array_equal((images[place] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
        assert labels[place] == whole.labels[stands_for]
    assert sorted(line.split(":")[0] for line in problems) == sorted(map(str, [source.paths[i] for i in (3, 4, 4)]))
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
    assert sorted(line.split(":")[0] for line in problems) == [str(source.paths[i]) for i in (2, 8, 9)]


def test_a_run_of_unreadable_images_has_a_limit(tmp_path, monkeypatch):
    source = damaged(tmp_path, [3, 4, 5]).train
    monkeypatch.setattr(data, "TRIES", 4)
    problems = []
    assert len(batches(source, batch_size=12, problems=problems)[0][1]) == 12
    assert len(problems) == 1 + 2 + 3
    monkeypatch.setattr(data, "TRIES", 3)
    with pytest.raises(data.DataError, match=r"cat/3\.jpg: not a readable .* nor is any of the 2 images after it"):
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
    with pytest.raises(data.DataError, match=r"cat/5\.jpg: not a readable image"):
        list(data.evaluation_batches(loaded.test, batch_size=4, device=CPU))
    with pytest.raises(data.DataError, match=r"cat/5\.jpg: not a readable image"):
        batches(loaded.train, batch_size=12)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_lost_disk_is_an_error(tmp_path, workers):
    loaded = damaged(tmp_path, [])
    shutil.rmtree(tmp_path)
    with pytest.raises(data.DataError, match="nor is any of the 11 images after it") as error:
        batches(loaded.train, batch_size=4, workers=workers, problems=[])
    assert "\n" not in str(error.value)
    problems = []
    assert list(data.evaluation_batches(loaded.test, batch_size=4, device=CPU, problems=problems)) == []
    assert len(problems) == 12


# --- smaller copies ---------------------------------------------------------------------------------------


def command(monkeypatch, *arguments):
    """The exit code of `python data.py ...`, run in this process."""
    monkeypatch.setattr(sys, "argv", ["data.py", *map(str, arguments)])
    return runs.run_command(data.main)


def photographs(root, count=3, sizes=((500, 375), (375, 500), (640, 360), (90, 70))):
    """Smooth images of several sizes, as JPEG."""
    for part in ("train", "val"):
        for label in range(2):
            (root / part / f"c{label}").mkdir(parents=True)
            for i in range(count):
                width, height = sizes[(i + label) % len(sizes)]
                y, x = np.mgrid[:height, :width] / 60
                waves = [np.sin(x + i + k) * np.cos(y * (label + 1) + k) for k in range(3)]
                pixels = (127 + 120 * np.stack(waves, -1)).astype(np.uint8)
                Image.fromarray(pixels).save(root / part / f"c{label}" / f"n{i}.v.JPEG", quality=95)
    return root


def tree(root):
    return {str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_copies_are_smaller_and_never_larger(tmp_path, monkeypatch, capsys):
    originals, out = photographs(tmp_path / "in", 4), tmp_path / "out"
    assert command(monkeypatch, originals, out) == 0
    assert f"16 images in {out}; now: python train.py imagenet --data-dir {out}" in capsys.readouterr().out
    listed = [path.relative_to(originals) for path in sorted(originals.rglob("*.JPEG"))]
    assert sorted(tree(out)) == sorted(f"{side}/{name.with_suffix('.jpg')}" for side in (160, 352) for name in listed)
    for side in (160, 352):
        for name in listed:
            copy = out / str(side) / name.with_suffix(".jpg")
            with Image.open(originals / name) as before, Image.open(copy) as after:
                if min(before.size) <= side:
                    assert copy.read_bytes() == (originals / name).read_bytes()
                else:
                    assert min(after.size) == side
                    assert (after.mode, after.format) == ("RGB", "JPEG")
                    assert max(after.size) == int(np.ceil(max(before.size) * side / min(before.size)))
                assert data.rectangle(*after.size, 288) == data.rectangle(*before.size, 288)


def test_copies_are_the_same_images_to_a_network(tmp_path, monkeypatch):
    originals, out = photographs(tmp_path / "in"), tmp_path / "out"
    assert command(monkeypatch, originals, out) == 0
    for name, data_dir in (("imagenet", out), (str(out), "data")):
        ours, theirs = (
            d.at(size=128, min_scale=0.3, rectangular=True) for d in (data.load(name, data_dir), data.folder(originals))
        )
        assert ours.classes == theirs.classes == ["c0", "c1"]
        assert ours.train.paths[0].parts[-4] == "160"
        for x, x2 in zip(batches(ours.train, batch_size=3), batches(theirs.train, batch_size=3), strict=True):
            assert torch.equal(x[1], x2[1])
            assert (x[0] - x2[0]).abs().mean() < 0.01
            assert (x[0] - x2[0]).abs().max() < 0.1
        tests = [data.evaluation_batches(d.test, batch_size=3, device=CPU) for d in (ours, theirs)]
        for x, x2 in zip(*tests, strict=True):
            assert torch.equal(x[1], x2[1])
            assert (x[0] - x2[0]).abs().mean() < 0.01


def test_the_smallest_copy_that_is_large_enough_is_read(tmp_path, monkeypatch):
    out = tmp_path / "out"
    sides = [flag for side in (60, 160, 96) for flag in ("--short-side", side)]
    assert command(monkeypatch, photographs(tmp_path / "in", 2), out, *sides) == 0
    loaded = data.folder(out)
    assert (loaded.train.size, loaded.train.paths.root) == (224, out / "160/train")
    for size, side in ((32, 60), (50, 60), (51, 96), (80, 96), (81, 160), (133, 160), (134, 160), (288, 160)):
        for source, part in zip(
            loaded.at(size=size, min_scale=1, rectangular=False)[:2], ("train", "val"), strict=True
        ):
            assert source.paths.root == out / str(side) / part


def test_copies_must_list_the_same_images(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(monkeypatch, photographs(tmp_path / "in"), out) == 0
    (out / "160/train/c1/n1.v.jpg").unlink()
    with pytest.raises(data.DataError, match=r"160/train/c1/n1\.v\.jpg: not there, unlike another copy"):
        data.folder(out)
    shutil.copy(out / "352/train/c1/n1.v.jpg", out / "160/train/c1/n1.v.jpg")
    (out / "352/val/c0/n0.v.jpg").unlink()
    with pytest.raises(data.DataError, match=r"352/val/c0/n0\.v\.jpg: not there"):
        data.folder(out, subset=2)


def test_unreadable_originals_are_named_and_left_out(tmp_path, monkeypatch, capsys):
    originals, out = photographs(tmp_path / "in"), tmp_path / "out"
    truncate(originals / "train/c0/n1.v.JPEG")
    (originals / "val/c1/n0.v.JPEG").write_bytes(b"")
    assert command(monkeypatch, originals, out) == 1
    said = capsys.readouterr()
    assert [line.split(": ")[0] for line in said.err.splitlines()] == [
        str(originals / "train/c0/n1.v.JPEG"),
        str(originals / "val/c1/n0.v.JPEG"),
    ]
    assert "10 images" in said.out
    assert "2 unreadable" in said.out
    loaded = data.folder(out)
    assert (len(loaded.train), len(loaded.test)) == (5, 5)


def test_copies_of_every_kind_of_image_are_rgb_jpeg(tmp_path, monkeypatch):
    originals, out = tmp_path / "in", tmp_path / "out"
    kinds = {"RGBA": "png", "L": "jpg", "CMYK": "jpeg", "P": "png", "1": "bmp", "RGB": "webp"}
    for part in ("train", "test"):
        for label in ("ä b", "c"):
            (originals / part / label).mkdir(parents=True)
            for mode, kind in kinds.items():
                Image.linear_gradient("L").convert("RGB").convert(mode).save(
                    originals / part / label / f"{mode}.{kind}"
                )
    assert command(monkeypatch, originals, out, "--short-side", 100) == 0
    assert len(tree(out)) == 24
    for path in out.rglob("*.jpg"):
        with Image.open(path) as image:
            assert (image.format, image.mode, image.size) == ("JPEG", "RGB", (100, 100))
    before, after = (data.folder(root).at(size=32, min_scale=1, rectangular=False).test for root in (originals, out))
    for x, x2 in zip(*(data.fetch(source, np.arange(12), CPU) for source in (before, after)), strict=True):
        assert (x.float() - x2).abs().mean() < 0.03


def wait_for(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_killed_and_stopped_copying_goes_on(tmp_path, monkeypatch, capfd):
    """SIGKILL, then Ctrl-C, then to the end: every file is whole at all times, and at the end as if never stopped."""
    originals, out = photographs(tmp_path / "in", 1, [(1600, 1200)]), tmp_path / "out"
    for part in ("train", "val"):
        for i in range(200):
            os.link(originals / part / "c0/n0.v.JPEG", originals / part / f"c0/link{i}.JPEG")
    for signum in (signal.SIGKILL, signal.SIGINT):
        before = len(list(out.rglob("*.jpg")))
        arguments = [sys.executable, Path(data.__file__), originals, out, "--short-side", "160"]
        how = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "start_new_session": True}
        if hasattr(os, "sched_setaffinity"):  # with many cores it would be done before it can be stopped
            how["preexec_fn"] = lambda: os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:2])
        with subprocess.Popen(arguments, **how) as process:
            wait_for(lambda: len(list(out.rglob("*.jpg"))) > before)  # noqa: B023
            (os.killpg if signum == signal.SIGINT else os.kill)(process.pid, signum)
            _, said = process.communicate(timeout=30)  # which ends when all its processes have
        assert said == ("data.py: stopped; the same command goes on from here\n" if signum == signal.SIGINT else "")
        assert process.returncode == (130 if signum == signal.SIGINT else -signum)
        assert before < len(list(out.rglob("*.jpg"))) < 402
        for path in out.rglob("*.jpg"):
            Image.open(path).load()
        with pytest.raises(data.DataError, match=r"not complete; run python .*data\.py .* again"):
            data.folder(out)
    (out / "160/val/c0/.link7.jpg.123").write_bytes(b"half")
    (out / "160/val/c0/link7.jpg").write_bytes(b"")  # a power cut
    done = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg") if path.stat().st_size}
    assert command(monkeypatch, originals, out, "--short-side", "160") == 0
    assert {path: path.stat().st_mtime_ns for path in done} == done
    files = tree(out)
    assert len(files) == 404
    assert len({content for name, content in files.items() if "/c0/" in name}) == 1
    assert len(data.folder(out).train) == 202


def in_itself(root):
    return root, root / "copies"


def into_images(root):
    write_images(root.parent / "other", 1)
    return root, root.parent / "other"


def without_train(root):
    return root / "train", root.parent / "out"


def without_test(root):
    shutil.rmtree(root / "val")
    return root, root.parent / "out"


def too_small(root):
    return root, root.parent / "out", "--short-side", "31"


def same_name(root):
    shutil.copy(root / "val/c0/n1.v.JPEG", root / "val/c0/n1.v.png")
    return root, root.parent / "out"


def onto_a_file(root):
    (root.parent / "out").write_text("mine")
    return root, root.parent / "out"


@pytest.mark.parametrize(
    ("how", "message"),
    [
        (without_train, "no folder train in it"),
        (without_test, "no folder test or val in it"),
        (lambda root: (root, root), "choose a folder outside of it"),
        (in_itself, "choose a folder outside of it"),
        (into_images, "holds images itself"),
        (too_small, "--short-side"),
        (same_name, r"val/c0/n1.v.png: its copy, a .jpg, would not come after that of c0/n1.v.JPEG"),
        (onto_a_file, "cannot write there"),
    ],
)
def test_copying_refuses(tmp_path, monkeypatch, capsys, how, message):
    arguments = how(photographs(tmp_path / "in", 2))
    before = tree(tmp_path)
    assert command(monkeypatch, *arguments) == 2
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.count("\n") == 1
    assert said.out == ""
    assert tree(tmp_path) == before


def test_links_do_not_hide_that_the_copies_would_lie_in_the_originals(tmp_path, monkeypatch):
    originals = photographs(tmp_path / "in", 1)
    (tmp_path / "link").symlink_to(originals)
    assert command(monkeypatch, originals, tmp_path / "link/copies") == 2


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
    with pytest.raises(data.DataError, match="test/eel: no training images"):
        data.load_test(str(root))
    (root / "test/eel").rename(root / "test/cat")
    assert set(data.load_test(str(root))[0].labels.tolist()) == {1}


def test_test_images_of_copies_and_of_digits(tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(monkeypatch, photographs(tmp_path / "in"), out) == 0
    for where in ((str(out),), ("imagenet", out)):
        source, classes = data.load_test(*where)
        assert (source.paths.root, classes) == (out / "352/val", ["c0", "c1"])
        assert source.at(128).paths.root == out / "160/val"
    assert torch.equal(data.load_test("digits", tmp_path)[0].images, data.load("digits").test.images)
    with pytest.raises(data.DataError, match="unknown data set"):
        data.load_test("mnist", tmp_path)


# --- errors name what and where, in one line --------------------------------------------------------------


def break_image(root):
    (root / "train/dog/3.png").write_bytes(b"\x89PNG but not really")


def truncate_image(root):
    whole = (root / "train/cat/2.png").read_bytes()
    (root / "train/cat/2.png").write_bytes(whole[: len(whole) // 2])


def odd_size(root):
    Image.new("RGB", (31, 32)).save(root / "train/cat/1.png")


def no_test(root):
    (root / "test").rename(root / "unused")


def empty_test(root):
    for file in (root / "test").rglob("*.png"):
        file.unlink()


def new_class(root):
    (root / "test/horse").mkdir()


def one_class(root):
    (root / "train/dog").rename(root / "dog")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (break_image, "train/dog/3.png: not a readable image"),
        (truncate_image, "train/cat/2.png: not a readable image"),
        (odd_size, "train/cat/1.png: is 31x32 pixels, others are 32x32"),
        (no_test, "no folder test or val"),
        (empty_test, "no images in its class folders"),
        (new_class, "test/horse: no training images for this class"),
        (one_class, "1 class folders in it"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, damage, message):
    damage(write_images(tmp_path))
    with pytest.raises(data.DataError, match=message) as error:
        data.load(str(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_large_image_is_named_from_any_process(tmp_path, workers):
    write_images(tmp_path, size=(100, 80))
    break_image(tmp_path)
    loaded = data.load(str(tmp_path))
    with pytest.raises(data.DataError, match=r"train/dog/3\.png: not a readable image") as error:
        batches(loaded.train, batch_size=12, workers=workers)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("name", "message"), [("mnist", "unknown data set 'mnist'"), ("imagenet", "no folder train")])
def test_unknown_and_absent_data_sets_are_refused(tmp_path, name, message):
    with pytest.raises(data.DataError, match=message):
        data.load(name, tmp_path)
