"""Batches from splits: the study's augmentation, example by example, and a fast one, batch by batch.

Every random number derives from (seed, epoch, position), so an epoch repeats bit for bit whatever was drawn
before it and however many workers there are, and the caller's generators are left alone.
"""

import hashlib
import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from effnet_fast.data import CROP_PCT, DataError, Split, TensorSplit, check_crop_pct, resize_square, source_side
from effnet_fast.signals import SIGNALS, obey_parent_only

AUGMENTS = ("reference", "fast", "crop")
AUTOAUGMENTS = tuple(policy.value for policy in v2.AutoAugmentPolicy)

# ImageNet's, of pixels in 0..1.
MEAN = (0.485, 0.456, 0.406)
STD = (0.229, 0.224, 0.225)

# Share of an image's area that a random crop keeps: torchvision's default in `reference`. `fast` keeps more: a crop of
# 8 % is 9 pixels wide at 32 px and shows nothing (compound on digits after 6 epochs: 43 % top-1 with it, 67 % without).
CROP_SCALE = (0.08, 1.0)
FAST_CROP_SCALE = (0.35, 1.0)
CROP_RATIO = (3 / 4, 4 / 3)
# Share of the images that lose a part.
ERASE = {"reference": 0.5, "fast": 0.5, "crop": 0.0}
ERASE_SCALE = (0.02, 0.33)
ERASE_RATIO = (0.3, 3.3)

Batch = tuple[Tensor, Tensor]


def train_loader(
    split: Split,
    *,
    augment: str,
    size: int,
    batch_size: int,
    seed: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    mixup: float = 0.0,
    cutmix: float = 0.0,
    num_classes: int | None = None,
    autoaugment: str | None = None,
    randaugment: int | None = None,
    crop_pct: float = CROP_PCT,
    erase: float | None = None,
    shard: tuple[int, int] = (0, 1),
) -> "Loader":
    """Shuffled, augmented batches; the last partial batch is dropped unless it is the only one.

    Args:
        split: the examples.
        augment: `reference`: random resized crop, AutoAugment, flip and random erasing of one example at a
            time; or `fast`: the same with larger crops and without AutoAugment, of whole batches on the device,
            from pixels that are kept there; or `crop`: as `fast`, but the crop is a window at validation's scale,
            moved by up to an eighth of `size` beyond the edges, where pixels are mirrored.
        size: of the batches, in pixels.
        batch_size: examples.
        seed: of everything random.
        num_workers: processes that augment; only `reference` needs them and starts them.
        device: where the batches are.
        mixup: alpha of the Beta(alpha, alpha) distribution that each batch's mixing ratio is drawn from;
            0 mixes nothing.
        cutmix: the same of CutMix. With both, each batch takes one of them.
        num_classes: needed with mixup and cutmix.
        autoaugment: AutoAugment policy of AUTOAUGMENTS; None is cifar10 in `reference`, no AutoAugment in the others.
        randaugment: magnitude of RandAugment in place of AutoAugment. In `fast` and `crop`, both cost a call an image.
        crop_pct: as in `val_loader`; decides the scale of `crop`.
        erase: share of the images of which random erasing hides a part; None is the `augment`'s of ERASE.
        shard: (number, count) of the process among those that share each step: together their batches are one of
            `count * batch_size` examples, augmented as it would be in one process.

    Raises:
        ValueError: an argument out of range.
        DataError: an empty split, or an image that can't be read.
    """
    _check_arguments(split, augment, size, batch_size, num_workers, crop_pct)
    policy = _policy(autoaugment, randaugment)
    if erase is None:
        erase = ERASE[augment]
    if not 0 <= erase <= 1:
        raise ValueError(f"erase: got {erase}, must be from 0 to 1")
    fetch: Callable[[_Job], Batch]
    if augment == "reference":
        fetch = _ReferenceTraining(split, size, seed, policy or v2.AutoAugment(v2.AutoAugmentPolicy.CIFAR10), erase)
    else:
        num_workers = 0
        boxes = random_crops
        side = source_side(size, crop_pct)
        tensors = split.to_tensor(side)
        if augment == "crop":
            boxes = partial(random_windows, size=size)
            tensors = TensorSplit(mirror_edges(resize_square(tensors.images, side), size // 8), tensors.labels)
        fetch = _FastTraining(tensors, size, seed, torch.device(device), policy, boxes, erase)
    return Loader(
        fetch,
        len(split),
        batch_size,
        seed=seed,
        num_workers=num_workers,
        device=torch.device(device),
        mix=_mix(mixup, cutmix, num_classes),
        shard=shard,
    )


def val_loader(
    split: Split,
    *,
    augment: str,
    size: int,
    batch_size: int,
    num_workers: int = 0,
    device: torch.device | str = "cpu",
    crop_pct: float = CROP_PCT,
    shard: tuple[int, int] = (0, 1),
) -> "Loader":
    """Every example in order: resized to int(size / crop_pct), bicubic, and its centre cropped to `size`.

    The batches are the same for every `augment`. `reference` reads an image folder again in every epoch, in
    `num_workers` processes; the others read it once and keep its pixels on the device.

    crop_pct: share of the image's side that is seen, in 0..1; the study's is 0.875. At 1 nothing is cut off.
    shard: (number, count) of the process among those that share the batches; each batch is one process's.
    Other Args, and Raises: as `train_loader`.
    """
    _check_arguments(split, augment, size, batch_size, num_workers, crop_pct)
    fetch: Callable[[_Job], Batch]
    if augment != "reference" or isinstance(split, TensorSplit):
        num_workers = 0
        tensors = split.to_tensor(source_side(size, crop_pct))
        fetch = _TensorValidation(tensors, size, crop_pct, torch.device(device))
    else:
        fetch = _FileValidation(split, size, crop_pct)
    return Loader(fetch, len(split), batch_size, num_workers=num_workers, device=torch.device(device), shard=shard)


def _check_arguments(split: Split, augment: str, size: int, batch_size: int, num_workers: int, crop_pct: float) -> None:
    if augment not in AUGMENTS:
        raise ValueError(f"augment: {augment!r} is unknown, choose from {', '.join(AUGMENTS)}")
    limits = (("size", size, 1), ("batch_size", batch_size, 1), ("num_workers", num_workers, 0))
    for name, value, least in limits:
        if value < least:
            raise ValueError(f"{name}: {value}, must be at least {least}")
    check_crop_pct(crop_pct)
    if len(split) == 0:
        raise DataError("split: has no examples, needs at least 1")


class _Job(NamedTuple):
    """One batch: which examples, where in which epoch, and which part of it is this process's."""

    epoch: int
    position: int
    indices: list[int]
    part: slice

    def examples(self) -> list[tuple[int, int]]:
        """(position in the epoch, index) of this process's examples."""
        return list(enumerate(self.indices, self.position))[self.part]


class _Schedule:
    """The jobs of the epoch at hand. A DataLoader asks its sampler anew in every epoch."""

    def __init__(self) -> None:
        self.jobs: list[_Job] = []

    def __iter__(self) -> Iterator[_Job]:
        return iter(self.jobs)

    def __len__(self) -> int:
        return len(self.jobs)


class _Fetcher(Dataset[Batch | str]):
    """Batches by job, or the message of an error: raised in a worker, it would gain a traceback."""

    def __init__(self, fetch: Callable[[_Job], Batch]) -> None:
        self.fetch = fetch

    def __getitem__(self, job: _Job) -> Batch | str:
        try:
            return self.fetch(job)
        except DataError as error:
            return str(error)


class Loader:
    """Batches of a split, epoch by epoch, from `train_loader` or `val_loader`.

    A batch is (images, labels): float32 [B, 3, size, size], channels_last, normalized with ImageNet's mean
    and standard deviation; int64 [B], or with mixup float32 [B, num_classes] whose rows sum to 1.
    """

    def __init__(
        self,
        fetch: Callable[[_Job], Batch],
        count: int,
        batch_size: int,
        *,
        seed: int | None = None,
        num_workers: int,
        device: torch.device,
        mix: Callable[[Tensor, Tensor], Batch] | None = None,
        shard: tuple[int, int] = (0, 1),
    ) -> None:
        processes = shard[1]
        if seed is not None and processes > 1 and count < processes * batch_size:
            raise ValueError(f"batch_size: {batch_size} in each of {processes} processes, more than {count} examples")
        self._count = count
        self._batch_size = batch_size
        self._seed = seed
        self._device = device
        self._mix = mix
        self._shard = shard
        self._schedule = _Schedule()
        self._batches = DataLoader(
            _Fetcher(fetch),
            sampler=self._schedule,
            batch_size=None,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=num_workers > 0 and device.type == "cuda",
            worker_init_fn=_start_worker,
            # Without one of its own a DataLoader draws from the caller's.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Batches in an epoch, of this process."""
        number, processes = self._shard
        if self._seed is None:
            return len(range(self._count)[:: self._batch_size][number::processes])
        return max(1, self._count // (self._batch_size * processes))

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on. One epoch at a time: a new one ends the one before.

        Raises:
            ValueError: start is not in 0..len(self).
            DataError: an image that can't be read.
        """
        if not 0 <= start <= len(self):
            raise ValueError(f"start: {start}, must be from 0 to {len(self)}")
        self._schedule.jobs = self._jobs(epoch)[start:]
        # A terminal or a supervisor signals all processes, but the one that trains decides when its workers end: those
        # that are started here are deaf to it, see `_start_worker`.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            batches = iter(self._batches)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return self._iterate(self._schedule.jobs, batches)

    def _jobs(self, epoch: int) -> list[_Job]:
        number, processes = self._shard
        if self._seed is None:
            order, size, part = torch.arange(self._count), self._batch_size, slice(None)
            starts = range(0, self._count, size)[number::processes]
        else:
            order = torch.randperm(self._count, generator=_generator(self._seed, epoch, "order"))
            size = self._batch_size * processes
            part = slice(number * self._batch_size, (number + 1) * self._batch_size)
            starts = range(0, len(self) * size, size)
        return [_Job(epoch, i, order[i : i + size].tolist(), part) for i in starts]

    def _iterate(self, jobs: list[_Job], batches: Iterator[Batch | str]) -> Iterator[Batch]:
        for job, batch in zip(jobs, batches, strict=True):
            if isinstance(batch, str):
                raise DataError(batch)
            images, labels = (tensor.to(self._device, non_blocking=True) for tensor in batch)
            if self._mix is not None:
                with _seeded(self._seed, job.epoch, "mix", job.position):
                    images, labels = self._mix(images, labels)
                images = images.contiguous(memory_format=torch.channels_last)
            yield images, labels


def _start_worker(_: int) -> None:
    obey_parent_only()


def validation_images(images: Iterable[Tensor], size: int, crop_pct: float) -> Tensor:
    """Images, each uint8 [3, h, w], resized, cropped to `size` pixels and normalized: float32 [N, 3, size, size].

    crop_pct: as in `val_loader`.
    """
    cropped = torch.stack([_center(image, size, crop_pct) for image in images])
    return _normalize(cropped.permute(0, 2, 3, 1))


def derive_seed(*key: int | str) -> int:
    """A 63-bit seed that depends on every part of the key."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _generator(*key: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(*key))


@contextmanager
def _seeded(*key: int | str) -> Iterator[None]:
    """torch's generator of the CPU, which its transforms draw from, seeded by the key; as it was before afterwards."""
    with torch.random.fork_rng(devices=[]):
        # torch.manual_seed would touch CUDA's as well.
        torch.default_generator.manual_seed(derive_seed(*key))
        yield


def _mix(mixup: float, cutmix: float, num_classes: int | None) -> Callable[[Tensor, Tensor], Batch] | None:
    for name, alpha in (("mixup", mixup), ("cutmix", cutmix)):
        if alpha < 0:
            raise ValueError(f"{name}: {alpha}, must be at least 0")
        if alpha > 0 and num_classes is None:
            raise ValueError(f"num_classes: None, must be given with {name}")
    mixes = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup > 0 else []
    mixes += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix > 0 else []
    return v2.RandomChoice(mixes) if mixes else None


def _policy(autoaugment: str | None, randaugment: int | None) -> v2.Transform | None:
    if randaugment is not None:
        if autoaugment is not None:
            raise ValueError("randaugment: takes the place of autoaugment, give one of them")
        if not 0 <= randaugment <= 30:
            raise ValueError(f"randaugment: {randaugment}, must be from 0 to 30")
        return v2.RandAugment(magnitude=randaugment)
    if autoaugment is None:
        return None
    if autoaugment not in AUTOAUGMENTS:
        raise ValueError(f"autoaugment: {autoaugment!r} is unknown, choose from {', '.join(AUTOAUGMENTS)}")
    return v2.AutoAugment(v2.AutoAugmentPolicy(autoaugment))


# reference


class _ReferenceTraining:
    def __init__(self, split: Split, size: int, seed: int, policy: v2.Transform, erase: float) -> None:
        self.split = split
        self.seed = seed
        self.transform = v2.Compose(
            [
                # AutoAugment's operations are defined by Pillow's.
                v2.ToPILImage(),
                v2.RandomResizedCrop(size, CROP_SCALE, CROP_RATIO, v2.InterpolationMode.BICUBIC),
                policy,
                v2.RandomHorizontalFlip(),
                v2.PILToTensor(),
                v2.ToDtype(torch.float32, scale=True),
                v2.Normalize(MEAN, STD),
                v2.RandomErasing(erase, ERASE_SCALE, ERASE_RATIO),
            ]
        )

    def __call__(self, job: _Job) -> Batch:
        images = []
        labels = []
        for position, index in job.examples():
            image, label = self.split[index]
            with _seeded(self.seed, job.epoch, "augment", position):
                images.append(self.transform(image))
            labels.append(label)
        return torch.stack(images).contiguous(memory_format=torch.channels_last), torch.tensor(labels)


class _FileValidation:
    def __init__(self, split: Split, size: int, crop_pct: float) -> None:
        self.split = split
        self.size = size
        self.crop_pct = crop_pct

    def __call__(self, job: _Job) -> Batch:
        images, labels = zip(*(self.split[index] for index in job.indices), strict=True)
        return validation_images(images, self.size, self.crop_pct), torch.tensor(labels)


# fast, crop


class _TensorValidation:
    def __init__(self, split: TensorSplit, size: int, crop_pct: float, device: torch.device) -> None:
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.size = size
        self.crop_pct = crop_pct

    def __call__(self, job: _Job) -> Batch:
        chosen = slice(job.indices[0], job.indices[-1] + 1)
        cropped = _center(self.images[chosen], self.size, self.crop_pct)
        return _normalize(cropped.permute(0, 2, 3, 1)), self.labels[chosen]


class _FastTraining:
    def __init__(
        self,
        split: TensorSplit,
        size: int,
        seed: int,
        device: torch.device,
        policy: v2.Transform | None,
        random_boxes: Callable[[torch.Generator, int, int, int], Tensor],
        erase: float,
    ) -> None:
        self.images = split.images.to(device)
        self.labels = split.labels.to(device)
        self.size = size
        self.seed = seed
        self.policy = policy
        self.random_boxes = random_boxes
        self.erase = erase

    def __call__(self, job: _Job) -> Batch:
        generator = _generator(self.seed, job.epoch, "augment", job.position)
        # Drawn for the examples of all processes.
        count = len(job.indices)
        boxes = self.random_boxes(generator, count, self.images.shape[2], self.images.shape[3])[job.part]
        flipped = (torch.rand(count, generator=generator) < 0.5)[job.part]
        chosen = torch.tensor(job.indices[job.part], device=self.images.device)
        images = self.images[chosen]
        pixels = crop_resize_flip(images, boxes, flipped, self.size)
        if self.policy is not None:
            levels = pixels.round().to(torch.uint8).permute(0, 3, 1, 2)
            changed = []
            for (position, _), image in zip(job.examples(), levels, strict=True):
                with _seeded(self.seed, job.epoch, "policy", position):
                    changed.append(self.policy(image))
            pixels = torch.stack(changed).permute(0, 2, 3, 1)
        batch = _normalize(pixels)
        if self.erase:
            _erase(batch, random_holes(generator, count, self.size, self.erase)[job.part])
        return batch, self.labels[chosen]


def _center(images: Tensor, size: int, crop_pct: float) -> Tensor:
    return F.center_crop(resize_square(images, source_side(size, crop_pct)), [size, size])


def _normalize(pixels: Tensor) -> Tensor:
    """Levels 0..255, [B, H, W, 3], to normalized float32 [B, 3, H, W], channels_last."""
    count, height, width, _ = pixels.shape
    # Rows rather than single pixels are the inner dimension, because three values are too few to vectorize.
    scale = torch.tensor([1 / (255 * std) for std in STD], device=pixels.device).repeat(width)
    shift = torch.tensor([-mean / std for mean, std in zip(MEAN, STD, strict=True)], device=pixels.device)
    rows = pixels.reshape(count, height, width * 3).to(torch.float32)
    return torch.addcmul(shift.repeat(width), rows, scale).view(count, height, width, 3).permute(0, 3, 1, 2)


def _random_boxes(
    generator: torch.Generator,
    count: int,
    height: int,
    width: int,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    smallest: int,
    largest: tuple[int, int],
    otherwise: tuple[int, int],
) -> Tensor:
    """Boxes at random places in an image: int64 [count, 4], of (top, left, height, width).

    The area is uniform in `scale` of the image's, height / width is log-uniform in `ratio`. The first of ten
    attempts that is no larger than `largest` counts, as in torchvision's transforms; if there is none the
    box is `otherwise`. Sides that round to less than `smallest` pixels have that many.
    """
    # float64, because a float32 just below 1 times the number of places can round up to that number.
    draws = torch.rand(2, 10, count, generator=generator, dtype=torch.float64)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[0])
    aspect = ratio[0] * (ratio[1] / ratio[0]) ** draws[1]
    exact_sides = torch.stack([(area * aspect).sqrt(), (area / aspect).sqrt()])
    sides = exact_sides.round().to(torch.int64).clamp_(min=smallest)
    fits = (sides <= torch.tensor(largest)[:, None, None]).all(0)
    attempt = fits.to(torch.uint8).argmax(0)
    first = sides.gather(1, attempt.expand(2, 1, count))[:, 0]
    box_sides = torch.where(fits.any(0), first, torch.tensor(otherwise)[:, None])
    places = torch.tensor([[height], [width]]) - box_sides + 1
    corners = (torch.rand(2, count, generator=generator, dtype=torch.float64) * places).to(torch.int64)
    return torch.cat([corners, box_sides]).T


def random_crops(generator: torch.Generator, count: int, height: int, width: int) -> Tensor:
    """Boxes as RandomResizedCrop's of FAST_CROP_SCALE: int64 [count, 4], (top, left, height, width), on the CPU."""
    return _random_boxes(
        generator,
        count,
        height,
        width,
        scale=FAST_CROP_SCALE,
        # RandomResizedCrop's ratio is width / height; this range is its own inverse.
        ratio=CROP_RATIO,
        smallest=1,
        largest=(height, width),
        otherwise=(height, width),
    )


def random_windows(generator: torch.Generator, count: int, height: int, width: int, *, size: int) -> Tensor:
    """Boxes of `size` pixels at random places: int64 [count, 4], (top, left, height, width), on the CPU."""
    corners = [torch.randint(side - size + 1, (count,), generator=generator) for side in (height, width)]
    return torch.stack([*corners, *torch.full((2, count), size)], 1)


def mirror_edges(images: Tensor, pixels: int) -> Tensor:
    """Continue images [N, 3, H, W] by so many pixels on every side, mirrored in the outermost ones."""
    height, width = (torch.arange(-pixels, side + pixels) for side in images.shape[2:])
    rows, columns = (
        (side - 1) - ((side - 1) - index.abs()).abs()
        for index, side in zip((height, width), images.shape[2:], strict=True)
    )
    return images[:, :, rows][:, :, :, columns]


def random_holes(generator: torch.Generator, count: int, size: int, share: float) -> Tensor:
    """Boxes as RandomErasing's: int64 [count, 4], of (top, left, height, width) in pixels, on the CPU.

    share: of the images that lose a part; the others have a box of height and width 0.
    """
    boxes = _random_boxes(
        generator,
        count,
        size,
        size,
        scale=ERASE_SCALE,
        ratio=ERASE_RATIO,
        smallest=0,
        largest=(size - 1, size - 1),
        otherwise=(0, 0),
    )
    boxes[torch.rand(count, generator=generator) >= share, 2:] = 0
    return boxes


def crop_resize_flip(images: Tensor, boxes: Tensor, flipped: Tensor, size: int) -> Tensor:
    """Crop each image to its box, resize it as Pillow's bicubic filter does, mirror some.

    All of it is two matrix products: rows of weights @ image @ columns of weights.

    Args:
        images: uint8 [B, 3, H, W].
        boxes: int64 [B, 4], of (top, left, height, width), inside the images.
        flipped: bool [B], the images to mirror left to right.
        size: of the result, in pixels.

    Returns:
        float32 [B, size, size, 3], levels in 0..255, not rounded.
    """
    count, channels, height, width = images.shape
    top, left, box_height, box_width = boxes.to(images.device).T
    rows = resampling_matrix(top, box_height, height, size)
    columns = resampling_matrix(left, box_width, width, size)
    columns = torch.where(flipped.to(images.device)[:, None, None], columns.flip(1), columns)
    narrow = torch.bmm(images.reshape(count, channels * height, width).to(torch.float32), columns.mT)
    # The small intermediate is transposed, not the result, so that the result comes out channels last.
    narrow = narrow.view(count, channels, height, size).permute(0, 2, 3, 1).contiguous()
    # Pillow's intermediate image has levels 0..255 too.
    narrow.clamp_(0, 255)
    pixels = torch.bmm(rows, narrow.view(count, height, size * channels))
    return pixels.clamp_(0, 255).view(count, size, size, channels)


def resampling_matrix(start: Tensor, length: Tensor, source: int, size: int) -> Tensor:
    """Weights of an antialiased bicubic (a = -0.5) resize of a line's crop to `size` pixels.

    Args:
        start, length: int64 [B], first pixel and number of pixels of each crop.
        source: pixels of the line.
        size: pixels of the result.

    Returns:
        float32 [B, size, source]. Rows sum to 1, pixels outside the crop weigh 0.
    """
    pixel = torch.arange(source, device=start.device)
    position = torch.arange(size, device=start.device) + 0.5
    scale = (length / size)[:, None, None]
    # The filter widens when the line shrinks: that is the antialiasing.
    center = start[:, None, None] + position[:, None] * scale
    distance = ((pixel + 0.5 - center) / scale.clamp(min=1)).abs_()
    near = (1.5 * distance - 2.5) * distance * distance + 1
    far = ((-0.5 * distance + 2.5) * distance - 4) * distance + 2
    weights = torch.where(distance < 1, near, torch.where(distance < 2, far, 0))
    inside = (pixel >= start[:, None]) & (pixel < (start + length)[:, None])
    weights *= inside[:, None]
    return weights / weights.sum(2, keepdim=True)


def _erase(images: Tensor, holes: Tensor) -> Tensor:
    """Set each image's box of (top, left, height, width) to 0, in place."""
    pixel = torch.arange(images.shape[2], device=images.device)
    top, left, height, width = holes.to(images.device)[:, :, None].unbind(1)
    rows = (pixel >= top) & (pixel < top + height)
    columns = (pixel >= left) & (pixel < left + width)
    return images.masked_fill_((rows[:, :, None] & columns[:, None, :])[:, None], 0)
