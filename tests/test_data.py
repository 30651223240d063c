"""Batches are a pure function of (seed, epoch, index); images are what is on disk; errors name the file."""

import pickle

import numpy as np
import pytest
import torch
from hypothesis import given
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
