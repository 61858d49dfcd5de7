"""Batches: pixels against Pillow, distributions against torchvision, reproducibility, validation."""

import math
import multiprocessing
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from effnet_fast import augment as augment_module
from effnet_fast.augment import (
    AUGMENTS,
    MEAN,
    STD,
    Loader,
    crop_resize_flip,
    derive_seed,
    mirror_edges,
    random_crops,
    random_holes,
    random_windows,
    resampling_matrix,
    train_loader,
    val_loader,
)
from effnet_fast.data import DataError, FolderSplit, TensorSplit


def noise_split(count: int, height: int = 32, width: int = 32) -> TensorSplit:
    """Noise, labelled 0, 1, 2, ... so that a label names its example."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, height, width), dtype=torch.uint8, generator=generator)
    return TensorSplit(images, torch.arange(count))


def folder_split(folder: Path, sizes: list[tuple[int, int]]) -> FolderSplit:
    rng = np.random.default_rng(0)
    files = tuple(folder / f"{i}.png" for i in range(len(sizes)))
    for file, (width, height) in zip(files, sizes, strict=True):
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(file)
    return FolderSplit(files, torch.arange(len(sizes)))


def train(split: Any, augment: str = "fast", **overrides: Any) -> Loader:
    return train_loader(split, **{"augment": augment, "size": 16, "batch_size": 8, "seed": 0} | overrides)


def batches(loader: Loader, epoch: int = 0, start: int = 0) -> list[tuple[Tensor, Tensor]]:
    return list(loader.epoch(epoch, start))


def assert_same(first: list[tuple[Tensor, Tensor]], second: list[tuple[Tensor, Tensor]]) -> None:
    assert len(first) == len(second)
    for (images, labels), (other_images, other_labels) in zip(first, second, strict=True):
        assert torch.equal(images, other_images)
        assert torch.equal(labels, other_labels)


def levels(images: Tensor) -> Tensor:
    """Normalized images back to 0..255."""
    return (images * torch.tensor(STD)[:, None, None] + torch.tensor(MEAN)[:, None, None]) * 255


def pillow(image: Tensor) -> Image.Image:
    return Image.fromarray(image.permute(1, 2, 0).numpy())


def pillow_resize(image: Image.Image, width: int, height: int) -> Image.Image:
    """Pillow's bicubic resize, across first. In one call some versions choose the order by the shape.

    The order matters where the first pass overshoots black or white and is cut off.
    """
    across = image.resize((width, image.height), Image.Resampling.BICUBIC)
    return across.resize((width, height), Image.Resampling.BICUBIC)


def array(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).float()


# Crop, resize, flip


@pytest.mark.parametrize(("height", "width"), [(32, 32), (37, 21)])
@pytest.mark.parametrize("size", [1, 7, 32, 64])
@pytest.mark.parametrize("content", ["noise", "black and white", "gradient"])
def test_crop_resize_flip_is_pillows(height: int, width: int, size: int, content: str) -> None:
    rng = np.random.default_rng(0)
    count = 24
    images = noise_split(count, height, width).images
    if content == "black and white":
        images = (images > 127).to(torch.uint8) * 255
    elif content == "gradient":
        images = (torch.arange(width) * 255 // width).to(torch.uint8).expand(count, 3, height, width)
    top, left = rng.integers(0, height, count), rng.integers(0, width, count)
    boxes = np.stack([top, left, rng.integers(1, height - top + 1), rng.integers(1, width - left + 1)], 1)
    boxes[0] = (0, 0, height, width)
    boxes[1] = (height - 1, width - 1, 1, 1)
    boxes[2] = (5, 3, 8, 8)
    flipped = torch.from_numpy(rng.random(count) < 0.5)

    pixels = crop_resize_flip(images, torch.from_numpy(boxes), flipped, size)

    assert pixels.shape == (count, size, size, 3)
    assert pixels.dtype == torch.float32
    for i, (y, x, h, w) in enumerate(boxes.tolist()):
        expected = pillow_resize(pillow(images[i]).crop((x, y, x + w, y + h)), size, size)
        if flipped[i]:
            expected = expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        # Pillow rounds to whole levels twice. The first rounding, at most 0.5, is multiplied by the second
        # pass's sum of absolute weights, at most 1.25; the second adds at most 0.5. Weights add a little.
        assert (pixels[i] - array(expected)).abs().max() < 1.15


def test_crop_resize_of_soft_contrast_is_pillows_in_one_call() -> None:
    # Nothing overshoots 0..255, so that the order of Pillow's passes doesn't matter.
    images = noise_split(1, 37, 21).images // 4 + 96
    for size in (7, 18, 32, 64):
        box = torch.tensor([[2, 1, 33, 19]])
        pixels = crop_resize_flip(images, box, torch.tensor([False]), size)[0]
        expected = pillow(images[0]).crop((1, 2, 20, 35)).resize((size, size), Image.Resampling.BICUBIC)
        # As above.
        assert (pixels - array(expected)).abs().max() < 1.15


@pytest.mark.parametrize("size", [1, 5, 32, 100])
def test_resampling_matrix_looks_at_the_crop_only(size: int) -> None:
    start, length = torch.tensor([0, 3, 31, 10]), torch.tensor([32, 5, 1, 22])
    weights = resampling_matrix(start, length, 32, size)
    assert weights.shape == (4, size, 32)
    # 32 float32 weights of about 1: rounding of their sum.
    torch.testing.assert_close(weights.sum(2), torch.ones(4, size), rtol=0, atol=1e-6)
    for matrix, first, count in zip(weights, start.tolist(), length.tolist(), strict=True):
        assert not matrix[:, :first].any()
        assert not matrix[:, first + count :].any()


# Distributions


def assert_same_distribution(ours: Tensor, theirs: Tensor) -> None:
    """Two-sample Kolmogorov-Smirnov test at p = 1e-6, about five sigma; conservative for discrete values."""
    values = torch.cat([ours, theirs]).unique()
    shares = [torch.searchsorted(s.sort().values, values, right=True) / len(s) for s in (ours, theirs)]
    counts = 1 / len(ours) + 1 / len(theirs)
    assert (shares[0] - shares[1]).abs().max() < math.sqrt(-math.log(1e-6 / 2) / 2 * counts)


@pytest.mark.parametrize(("height", "width"), [(32, 32), (24, 40)])
def test_crops_are_distributed_as_random_resized_crop(height: int, width: int) -> None:
    count = 4000
    ours = random_crops(torch.Generator().manual_seed(0), count, height, width)
    transform = v2.RandomResizedCrop(32, scale=(0.35, 1.0))
    image = torch.zeros(3, height, width)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[p[key] for key in ("top", "left", "height", "width")] for p in drawn])
    assert ours.dtype == torch.int64
    assert (ours >= torch.tensor([0, 0, 1, 1])).all()
    assert (ours[:, :2] + ours[:, 2:] <= torch.tensor([height, width])).all()
    for column in range(4):
        assert_same_distribution(ours[:, column], theirs[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])


@pytest.mark.parametrize("size", [8, 32])
def test_holes_are_distributed_as_random_erasing(size: int) -> None:
    count = 4000
    drawn_ours = random_holes(torch.Generator().manual_seed(0), 2 * count, size, 0.5)
    ours = drawn_ours[(drawn_ours[:, 2:] > 0).all(1)]
    transform = v2.RandomErasing()
    image = torch.zeros(3, size, size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        drawn = [transform.make_params([image]) for _ in range(count)]
    theirs = torch.tensor([[p[key] for key in ("i", "j", "h", "w")] for p in drawn])
    # Five sigma of a fair coin thrown 2 * count times.
    assert abs(len(ours) / (2 * count) - 0.5) < 5 * 0.5 / math.sqrt(2 * count)
    assert (ours[:, 2:] < size).all()
    assert (ours[:, :2] + ours[:, 2:] <= size).all()
    for column in range(4):
        assert_same_distribution(ours[:, column], theirs[:, column])
    assert_same_distribution(ours[:, 2] * ours[:, 3], theirs[:, 2] * theirs[:, 3])
    assert_same_distribution(ours[:, 2] / ours[:, 3], theirs[:, 2] / theirs[:, 3])


@pytest.mark.parametrize("size", [1, 2, 3])
def test_tiny_images_still_have_crops(size: int) -> None:
    boxes = random_crops(torch.Generator().manual_seed(0), 1000, size, size)
    assert (boxes[:, 2:] >= 1).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= size).all()
    images, _ = batches(train(noise_split(8, size, size), size=4))[0]
    assert images.isfinite().all()


@pytest.mark.parametrize("augment", AUGMENTS)
def test_half_of_the_images_are_flipped(augment: str) -> None:
    count = 1000
    # A gradient keeps its direction under crops, and a hole leaves most of its steps alone.
    gradient = (torch.arange(32) * 8).to(torch.uint8).expand(count, 3, 32, 32)
    images, _ = batches(train(TensorSplit(gradient, torch.zeros(count).long()), augment, batch_size=count))[0]
    direction = images.diff(dim=3).sign().sum((1, 2, 3))
    flipped = (direction < 0).float().mean().item()
    if augment != "reference":
        assert direction.ne(0).all()
        # Five sigma of a fair coin.
        assert abs(flipped - 0.5) < 5 * 0.5 / math.sqrt(count)
    else:
        # AutoAugment's Invert mirrors a gradient's direction, and neither depends on the other.
        assert abs(flipped - 0.5) < 5 * 0.5 / math.sqrt(count) + direction.eq(0).float().mean()


def test_holes_are_zero_rectangles_after_normalization() -> None:
    count = 1000
    white = TensorSplit(torch.full((count, 3, 32, 32), 255, dtype=torch.uint8), torch.zeros(count).long())
    images, _ = batches(train(white, batch_size=count, size=32))[0]
    hole = images.eq(0).all(1)
    assert torch.equal(images.eq(0).any(1), hole)
    # White survives resampling up to the rounding of weights that sum to 1.
    kept = levels(images)[~hole[:, None].expand_as(images)]
    torch.testing.assert_close(kept, torch.full_like(kept, 255), rtol=0, atol=1e-3)
    rows, columns = hole.any(2), hole.any(1)
    assert torch.equal(hole, rows[:, :, None] & columns[:, None, :])
    erased = hole.any(2).any(1)
    assert abs(erased.float().mean() - 0.5) < 5 * 0.5 / math.sqrt(count)
    area = hole.sum((1, 2))[erased] / 32**2
    # Sides are rounded to whole pixels: half a pixel on each of two sides of up to 32.
    assert area.min() > 0.02 - 1 / 32
    assert area.max() < 0.33 + 1 / 32


# Recipes


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({}, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        ({"autoaugment": "imagenet"}, v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)),
        ({"randaugment": 7}, v2.RandAugment(magnitude=7)),
    ],
)
def test_reference_is_the_studys_chain_of_transforms(options: dict[str, Any], policy: v2.Transform) -> None:
    split = noise_split(24)
    chain = v2.Compose(
        [
            v2.RandomResizedCrop(40, interpolation=v2.InterpolationMode.BICUBIC),
            policy,
            v2.RandomHorizontalFlip(0.5),
            v2.PILToTensor(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
            v2.RandomErasing(p=0.5, scale=(0.02, 0.33), ratio=(0.3, 3.3)),
        ]
    )
    position = 0
    for images, labels in train(split, "reference", size=40, seed=5, **options).epoch(3):
        for image, label in zip(images, labels.tolist(), strict=True):
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(derive_seed(5, 3, "augment", position))
                assert torch.equal(image, chain(pillow(split.images[label])))
            position += 1
    assert position == 24


def test_fast_composes_its_parts() -> None:
    split = noise_split(16)
    images, labels = batches(train(split, size=20, seed=5, batch_size=16), epoch=3)[0]
    generator = torch.Generator().manual_seed(derive_seed(5, 3, "augment", 0))
    boxes = random_crops(generator, 16, 32, 32)
    flipped = torch.rand(16, generator=generator) < 0.5
    holes = random_holes(generator, 16, 20, 0.5)
    expected = crop_resize_flip(split.images[labels], boxes, flipped, 20).permute(0, 3, 1, 2) / 255
    expected = v2.functional.normalize(expected, list(MEAN), list(STD))
    for image, (top, left, height, width) in zip(expected, holes.tolist(), strict=True):
        image[:, top : top + height, left : left + width] = 0
    # The same arithmetic with the constants folded: a few units in the last place of values up to 2.7.
    torch.testing.assert_close(images, expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize(("size", "crop_pct", "side"), [(20, 0.875, 22), (32, 0.875, 36), (32, 1.0, 32), (20, 0.5, 40)])
def test_crop_composes_its_parts(size: int, crop_pct: float, side: int) -> None:
    split = noise_split(16)
    loader = train(split, "crop", size=size, crop_pct=crop_pct, seed=5, batch_size=16)
    images, labels = batches(loader, epoch=3)[0]
    generator = torch.Generator().manual_seed(derive_seed(5, 3, "augment", 0))
    padded = v2.functional.pad(
        v2.functional.resize(split.images, [side, side], v2.InterpolationMode.BICUBIC),
        size // 8,
        padding_mode="reflect",
    )
    windows = random_windows(generator, 16, side + 2 * (size // 8), side + 2 * (size // 8), size=size)
    flipped = torch.rand(16, generator=generator) < 0.5
    for image, label, (top, left, *_), flip in zip(images, labels, windows.tolist(), flipped, strict=True):
        expected = padded[label, :, top : top + size, left : left + size]
        expected = v2.functional.normalize((expected.flip(2) if flip else expected) / 255, list(MEAN), list(STD))
        # A window is not resampled: the constants are folded, a few units in the last place of values up to 2.7.
        torch.testing.assert_close(image, expected, rtol=0, atol=2e-6)


def test_windows_are_everywhere_alike() -> None:
    count = 7000
    windows = random_windows(torch.Generator().manual_seed(0), count, 18, 14, size=12)
    assert windows[:, 2:].eq(12).all()
    for corner, places in ((windows[:, 0], 7), (windows[:, 1], 3)):
        found = corner.bincount(minlength=places)
        assert len(found) == places
        # Five sigma of a binomial distribution.
        assert (found - count / places).abs().max() < 5 * math.sqrt(count / places)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("share", [0.0, 0.3, 1.0, None])
def test_erase_is_the_share_of_images_that_lose_a_part(augment: str, share: float | None) -> None:
    count = 400
    white = TensorSplit(torch.full((count, 3, 24, 24), 255, dtype=torch.uint8), torch.zeros(count, dtype=torch.int64))
    images, _ = map(torch.cat, zip(*batches(train(white, augment, batch_size=50, erase=share)), strict=True))
    erased = (images == 0).all(1).flatten(1).any(1).float().mean()
    expected = {"reference": 0.5, "fast": 0.5, "crop": 0.0}[augment] if share is None else share
    # Five standard deviations; and one image in a hundred keeps its pixels as no hole that was drawn fits into it.
    assert abs(erased - expected) <= 5 * math.sqrt(expected * (1 - expected) / count) + 0.02 * expected


@pytest.mark.parametrize(("crop_pct", "side"), [(0.875, 36), (1.0, 32)])
def test_crop_keeps_what_validation_sees(crop_pct: float, side: int) -> None:
    """The window in the middle is the validation image."""
    split = noise_split(3, 40, 40)
    padded = mirror_edges(augment_module.resize_square(split.images, side), 4)
    (images, _), *_ = batches(val_loader(split, augment="crop", size=32, batch_size=3, crop_pct=crop_pct))
    middle = slice(4 + (side - 32) // 2, 36 + (side - 32) // 2)
    torch.testing.assert_close(levels(images), padded[:, :, middle, middle].float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_validation_at_crop_pct_1_sees_images_whole(augment: str, tmp_path: Path) -> None:
    files = folder_split(tmp_path, [(20, 20)] * 3)
    pixels = torch.stack([files[i][0] for i in range(3)])
    for split in (files, TensorSplit(pixels, files.labels)):
        (images, _), *_ = batches(val_loader(split, augment=augment, size=20, batch_size=3, crop_pct=1.0))
        torch.testing.assert_close(levels(images), pixels.float(), rtol=0, atol=1e-3)


@pytest.mark.parametrize("augment", AUGMENTS)
@pytest.mark.parametrize("workers", [0, 1])
def test_batches_have_the_promised_form(augment: str, workers: int) -> None:
    split = noise_split(20)
    loaders = (
        train(split, augment, num_workers=workers),
        val_loader(split, augment=augment, size=16, batch_size=8, num_workers=workers),
    )
    for loader, counts in zip(loaders, ([8, 8], [8, 8, 4]), strict=True):
        found = batches(loader)
        assert len(loader) == len(counts)
        assert [len(labels) for _, labels in found] == counts
        for images, labels in found:
            assert images.shape == (len(labels), 3, 16, 16)
            assert images.dtype == torch.float32
            assert images.is_contiguous(memory_format=torch.channels_last)
            assert labels.dtype == torch.int64


@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_epoch_is_a_permutation(augment: str) -> None:
    loader = train(noise_split(32), augment, size=2)
    orders = [torch.cat([labels for _, labels in loader.epoch(e)]).tolist() for e in range(2)]
    assert sorted(orders[0]) == sorted(orders[1]) == list(range(32))
    assert orders[0] != orders[1]
    assert orders[0] != list(range(32))


@pytest.mark.parametrize("augment", AUGMENTS)
def test_a_split_smaller_than_a_batch_is_one_batch(augment: str) -> None:
    loader = train(noise_split(5), augment)
    found = batches(loader)
    assert len(loader) == len(found) == 1
    assert sorted(found[0][1].tolist()) == list(range(5))


# Reproducibility


@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_epoch_repeats_whatever_was_drawn_before(augment: str) -> None:
    split = noise_split(24)
    torch.manual_seed(1)
    first = batches(train(split, augment, mixup=0.2, num_classes=24), epoch=2)
    torch.manual_seed(2)
    loader = train(split, augment, mixup=0.2, num_classes=24)
    other = batches(loader, epoch=0)
    assert_same(first, batches(loader, epoch=2))
    assert not torch.equal(first[0][0], other[0][0])
    assert not torch.equal(first[0][0], batches(train(split, augment, seed=1), epoch=2)[0][0])


@pytest.mark.parametrize("augment", AUGMENTS)
def test_epochs_draw_anew_for_the_same_example(augment: str) -> None:
    loader = train(noise_split(1), augment)
    assert not torch.equal(batches(loader, 0)[0][0], batches(loader, 1)[0][0])


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_start_is_the_tail_of_the_epoch(augment: str, workers: int) -> None:
    loader = train(noise_split(40), augment, num_workers=workers)
    whole = batches(loader, epoch=1)
    # An epoch that is left half way, as a run that is stopped.
    next(iter(loader.epoch(1)))
    for start in (2, 5):
        assert_same(batches(loader, 1, start), whole[start:])
    with pytest.raises(ValueError, match=r"start: 6, must be from 0 to 5"):
        loader.epoch(1, start=6)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(tmp_path: Path, workers: int) -> None:
    split = folder_split(tmp_path, [(30, 20), (16, 16), (20, 50), (9, 9), (33, 32)])
    for count in (0, workers):
        loader = train(split, "reference", batch_size=2, num_workers=count)
        val = val_loader(split, augment="reference", size=16, batch_size=2, num_workers=count)
        found = [batches(loader, 0), batches(loader, 1), batches(val)]
        if count == 0:
            expected = found
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def keep_until_exit(loader: Loader) -> None:
    global kept
    kept = loader.epoch(0)
    next(kept)


def test_a_process_ends_with_its_loader_in_use() -> None:
    """Its workers, which no signal from elsewhere ends, must not keep it."""
    loader = train(noise_split(40), "reference", num_workers=1)
    process = multiprocessing.get_context("fork").Process(target=keep_until_exit, args=(loader,))
    process.start()
    process.join(60)
    process.kill()
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("augment", AUGMENTS)
def test_the_callers_generators_are_left_alone(augment: str) -> None:
    torch.manual_seed(0)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    split = noise_split(20)
    for workers in (0, 1):
        batches(train(split, augment, num_workers=workers, mixup=0.2, num_classes=20))
        batches(val_loader(split, augment=augment, size=16, batch_size=8, num_workers=workers))
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
    assert np.random.get_state()[1].tolist() == states[2]


def test_seeds_depend_on_every_part_of_the_key() -> None:
    keys = [(0,), (0, 0), (0, 0, 0), (0, 1), (1, 0), (1, 23), (12, 3), (0, "1"), (2**40, 0), (-1, 0)]
    seeds = {derive_seed(*key) for key in keys}
    assert len(seeds) == len(keys)
    assert all(0 <= seed < 2**63 for seed in seeds)


@pytest.mark.parametrize(
    ("options", "policy"),
    [
        ({"autoaugment": "cifar10"}, v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10)),
        ({"randaugment": 7}, v2.RandAugment(magnitude=7)),
    ],
)
def test_fast_applies_a_policy_to_each_image_after_its_crop(options: dict[str, Any], policy: v2.Transform) -> None:
    split = noise_split(8)
    (plain, labels), *_ = batches(train(split, seed=5, erase=0.0), epoch=3)
    (changed, same_labels), *_ = batches(train(split, seed=5, erase=0.0, **options), epoch=3)
    assert torch.equal(labels, same_labels)
    expected = levels(plain).round().to(torch.uint8)
    with torch.random.fork_rng(devices=[]):
        for position in range(8):
            torch.manual_seed(derive_seed(5, 3, "policy", position))
            expected[position] = policy(expected[position])
    # Levels survive the normalization to float32 rounding; a level that is a tie would be another one.
    assert (levels(changed) - expected).abs().max() < 1.01
    assert (levels(changed) - expected).abs().mean() < 1e-3
    assert (levels(changed) - levels(plain)).abs().max() > 2


# Mixup


def test_cutmix_pastes_boxes_of_the_share_that_the_targets_say() -> None:
    split = noise_split(16)
    plain = batches(train(split, batch_size=8))
    mixed = batches(train(split, batch_size=8, cutmix=1.0, num_classes=20))
    shares = []
    for (images, labels), (mixed_images, targets) in zip(plain, mixed, strict=True):
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)  # two rounded shares
        kept = (mixed_images == images).all(1)
        share = targets.gather(1, labels[:, None])[:, 0]
        for i, other in enumerate(targets.scatter(1, labels[:, None], 0).argmax(1).tolist()):
            partner = images[labels.tolist().index(other)]
            assert (kept[i] | (mixed_images[i] == partner).all(0)).all()
            # Pixels that both images erased are the same in both.
            assert kept[i].float().mean() >= share[i] - 1e-6
        shares.append(share[0].item())
        assert mixed_images.is_contiguous(memory_format=torch.channels_last)
    assert shares[0] != shares[1]


def test_mixup_and_cutmix_take_turns() -> None:
    split = noise_split(64)
    options = {"batch_size": 4, "num_classes": 64}
    plain = batches(train(split, batch_size=4))
    both = batches(train(split, mixup=1.0, cutmix=1.0, **options))
    # CutMix leaves most pixels exactly as they were in one image or the other, mixup hardly any.
    cut = [
        ((mixed == images) | (mixed == images.roll(1, 0))).float().mean()
        for (images, _), (mixed, _) in zip(plain, both, strict=True)
    ]
    assert 0 < sum(share > 0.99 for share in cut) < len(cut)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_mixup_mixes_images_as_it_mixes_targets(augment: str) -> None:
    split = noise_split(16)
    plain = batches(train(split, augment, batch_size=8))
    mixed = batches(train(split, augment, batch_size=8, mixup=1.0, num_classes=20))
    ratios = []
    for (images, labels), (mixed_images, targets) in zip(plain, mixed, strict=True):
        assert targets.shape == (8, 20)
        assert targets.dtype == torch.float32
        # The two shares are rounded separately.
        torch.testing.assert_close(targets.sum(1), torch.ones(8), rtol=0, atol=1e-6)
        assert (targets > 0).sum(1).eq(2).all()
        share = targets.gather(1, labels[:, None])[:, 0]
        assert share.unique().numel() == 1
        others = targets.scatter(1, labels[:, None], 0).argmax(1)
        partner = torch.tensor([labels.tolist().index(other) for other in others.tolist()])
        expected = share[0] * images + (1 - share[0]) * images[partner]
        # Values up to 2.7, two products and a sum in float32.
        torch.testing.assert_close(mixed_images, expected, rtol=0, atol=2e-6)
        assert mixed_images.is_contiguous(memory_format=torch.channels_last)
        ratios.append(share[0].item())
    assert ratios[0] != ratios[1]


def test_mixup_ratios_are_beta_distributed() -> None:
    count = 500
    split = noise_split(2 * count, 2, 2)
    loader = train(split, batch_size=2, size=1, mixup=0.2, num_classes=2 * count)
    shares = torch.stack([t.gather(1, t.argmax(1)[:, None])[0, 0] for _, t in loader.epoch(0)])
    exact = torch.distributions.Beta(torch.tensor(0.2), torch.tensor(0.2)).sample((100_000,))
    exact = torch.maximum(exact, 1 - exact)
    # Five sigma of the mean of `count` draws.
    assert abs(shares.mean() - exact.mean()) < 5 * exact.std() / math.sqrt(count)


# Shards


@pytest.mark.parametrize(("augment", "options"), [("fast", {}), ("fast", {"randaugment": 5}), ("reference", {})])
def test_shards_together_are_the_batches_of_one_process(augment: str, options: dict[str, Any]) -> None:
    split = noise_split(29)
    whole = batches(train(split, augment, batch_size=12, **options), epoch=2, start=1)
    shards = [batches(train(split, augment, batch_size=4, shard=(i, 3), **options), epoch=2, start=1) for i in range(3)]
    assert len(whole) == 1
    together = [
        (torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts]))
        for parts in zip(*shards, strict=True)
    ]
    assert_same(together, whole)
    with pytest.raises(ValueError, match="batch_size: 10 in each of 3 processes, more than 29 examples"):
        train(split, augment, batch_size=10, shard=(0, 3))


@pytest.mark.parametrize("count", [1, 4, 13, 16])
def test_shards_of_the_validation_have_every_example_once(count: int) -> None:
    split = noise_split(count)
    shared: dict[str, Any] = {"augment": "fast", "size": 8, "batch_size": 4}
    whole = batches(val_loader(split, **shared))
    loaders = [val_loader(split, shard=(i, 3), **shared) for i in range(3)]
    shards = [batches(loader) for loader in loaders]
    assert [len(loader) for loader in loaders] == [len(shard) for shard in shards]
    assert_same([shards[i % 3][i // 3] for i in range(len(whole))], whole)
    assert sum(len(labels) for shard in shards for _, labels in shard) == count


# Validation


@pytest.mark.parametrize("augment", AUGMENTS)
def test_validation_is_pillows_resize_and_centre_crop(tmp_path: Path, augment: str) -> None:
    files = folder_split(tmp_path, [(40, 40), (30, 61), (100, 37), (12, 15), (18, 18)])
    for split in (files, noise_split(5), noise_split(3, 40, 24)):
        loader = val_loader(split, augment=augment, size=16, batch_size=2)
        images, labels = (torch.cat(tensors) for tensors in zip(*loader.epoch(0), strict=True))
        assert labels.tolist() == list(range(len(split)))
        for i in range(len(split)):
            image = pillow(split[i][0])
            width, height = (18 * side // min(image.size) for side in image.size)
            # First to a square of 18, then to 16.
            left, top = round((width - 18) / 2) + 1, round((height - 18) / 2) + 1
            resized = pillow_resize(image, width, height)
            expected = array(resized.crop((left, top, left + 16, top + 16))).permute(2, 0, 1)
            # Whole levels whose filter weights were rounded in another way, and float32 normalization.
            assert (levels(images[i]) - expected).abs().max() < 1.001


@pytest.mark.parametrize("workers", [0, 1])
def test_both_recipes_validate_on_the_same_pixels(tmp_path: Path, workers: int) -> None:
    files = folder_split(tmp_path, [(40, 40), (30, 61), (100, 37), (12, 15), (19, 18)])
    for split in (files, noise_split(5)):
        reference, fast = (
            val_loader(split, augment=augment, size=16, batch_size=2, num_workers=workers)
            for augment in ("reference", "fast")
        )
        assert_same(batches(reference), batches(fast))
        assert_same(batches(fast, 1), batches(fast, 0))


# Errors


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("make", ["train", "val"])
def test_a_broken_image_is_one_line(tmp_path: Path, make: str, workers: int) -> None:
    split = folder_split(tmp_path, [(10, 10)] * 4)
    (tmp_path / "2.png").write_bytes(b"broken")
    common: dict[str, Any] = {"augment": "reference", "size": 8, "batch_size": 2, "num_workers": workers}
    loader = train_loader(split, seed=0, **common) if make == "train" else val_loader(split, **common)
    for _ in range(2):
        with pytest.raises(DataError, match=r"2\.png: not a readable image") as caught:
            batches(loader)
        assert "\n" not in str(caught.value)


LEFT_OVER = """
import torch
from effnet_fast.augment import train_loader
from effnet_fast.data import TensorSplit
split = TensorSplit(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.zeros(4, dtype=torch.int64))
loader = train_loader(split, augment="reference", size=8, batch_size=2, seed=0, num_workers=1)
cycle = [loader, next(loader.epoch(0))]
cycle.append(cycle)
"""


def test_workers_end_with_a_process_that_still_holds_their_loader() -> None:
    done = subprocess.run([sys.executable, "-c", LEFT_OVER], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"augment": "auto"}, "augment: 'auto' is unknown, choose from reference, fast"),
        ({"size": 0}, "size: 0, must be at least 1"),
        ({"batch_size": 0}, "batch_size: 0, must be at least 1"),
        ({"num_workers": -1}, "num_workers: -1, must be at least 0"),
        ({"erase": 1.1}, "erase: got 1.1, must be from 0 to 1"),
        ({"erase": -0.1}, "erase: got -0.1, must be from 0 to 1"),
        ({"crop_pct": 0.0}, "crop_pct: got 0.0, must be more than 0 and at most 1"),
        ({"crop_pct": 1.1}, "crop_pct: got 1.1, must be more than 0 and at most 1"),
        ({"crop_pct": math.nan}, "crop_pct: got nan, must be"),
        ({"mixup": -0.1, "num_classes": 10}, "mixup: -0.1, must be at least 0"),
        ({"mixup": 0.1}, "num_classes: None, must be given with mixup"),
        ({"cutmix": -0.1}, "cutmix: -0.1, must be at least 0"),
        ({"autoaugment": "mnist"}, "autoaugment: 'mnist' is unknown, choose from imagenet, cifar10, svhn"),
        ({"randaugment": 31}, "randaugment: 31, must be from 0 to 30"),
        ({"randaugment": 3, "autoaugment": "svhn"}, "give one of them"),
    ],
)
def test_arguments_out_of_range(overrides: dict[str, Any], message: str) -> None:
    arguments = {"augment": "fast", "size": 8, "batch_size": 2} | overrides
    with pytest.raises(ValueError, match=message):
        train_loader(noise_split(4), seed=0, **arguments)
    if not {"mixup", "cutmix", "autoaugment", "randaugment", "erase"} & set(overrides):
        with pytest.raises(ValueError, match=message):
            val_loader(noise_split(4), **arguments)


@pytest.mark.parametrize("augment", AUGMENTS)
def test_an_empty_split_is_refused(augment: str) -> None:
    empty = noise_split(4).first(4)
    empty = TensorSplit(empty.images[:0], empty.labels[:0])
    with pytest.raises(DataError, match="no examples"):
        train(empty, augment)
    with pytest.raises(DataError, match="no examples"):
        val_loader(empty, augment=augment, size=8, batch_size=2)
