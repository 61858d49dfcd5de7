"""Datasets as splits of uint8 images and integer labels: CIFAR-10, scikit-learn's digits, image folders.

Files are untrusted: a CIFAR batch is interpreted as data (nothing in it is imported or called), an archive
never chooses where its members are written, and an image is refused before it is decoded if it is too large.
"""

import gzip
import hashlib
import pickletools
import tarfile
import tempfile
import urllib.error
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.datasets import CIFAR10
from torchvision.datasets.utils import download_url
from torchvision.transforms.v2 import InterpolationMode
from torchvision.transforms.v2 import functional as F

DATASETS = ("cifar10", "digits", "folder")

# Share of an image's side that the study's validation sees.
CROP_PCT = 0.875

MAX_PIXELS = 64_000_000
IMAGE_EXTENSIONS = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm"})
# Pillow would also hand a file to Ghostscript or to rarely exercised decoders if its content asked for them.
_IMAGE_FORMATS = ("JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM")

_CIFAR_TRAIN = tuple(name for name, _ in CIFAR10.train_list)
_CIFAR_TEST = tuple(name for name, _ in CIFAR10.test_list)
_CIFAR_META = CIFAR10.meta["filename"]
_CIFAR_MD5 = {**dict(CIFAR10.train_list), **dict(CIFAR10.test_list), _CIFAR_META: CIFAR10.meta["md5"]}
# An official batch has 31 MB, the official archive 9 members.
_CIFAR_MAX_BYTES = 40_000_000
_CIFAR_MAX_MEMBERS = 32


class DataError(ValueError):
    """Data that is missing, damaged or not what it claims to be. The message is one line for the user."""


def resize_square(images: Tensor, side: int) -> Tensor:
    """Resize the shorter side to `side` (bicubic, antialiased) and crop the centre.

    Args:
        images: uint8 [..., 3, H, W].
        side: pixels.

    Returns:
        uint8 [..., 3, side, side]; the input itself where it has that size already.
    """
    resized = F.resize(images, [side], interpolation=InterpolationMode.BICUBIC, antialias=True)
    return F.center_crop(resized, [side, side])


def check_crop_pct(crop_pct: float) -> None:
    """Raises ValueError for a share of an image's side that can't be."""
    if not 0 < crop_pct <= 1:
        raise ValueError(f"crop_pct: got {crop_pct}, must be more than 0 and at most 1")


def source_side(size: int, crop_pct: float) -> int:
    """Side in pixels that an image is resized to before its centre, this share of the side, is cropped to `size`."""
    return int(size / crop_pct)


def _first_indices(count: int, n: int) -> Tensor:
    """The first n of a fixed shuffle of range(count): splits may be sorted by class."""
    if n < 1:
        raise DataError(f"n: {n} examples asked for, at least 1 is needed")
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:n]


@dataclass(frozen=True, eq=False)
class TensorSplit:
    """Examples held in memory.

    Attributes:
        images: uint8 [N, 3, H, W].
        labels: int64 [N].

    Raises:
        DataError: another shape or dtype.
    """

    images: Tensor
    labels: Tensor

    def __post_init__(self) -> None:
        images, labels = self.images, self.labels
        if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
            raise DataError(f"images: {images.dtype} {tuple(images.shape)}, must be uint8 [N, 3, H, W]")
        if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
            raise DataError(f"labels: {labels.dtype} {tuple(labels.shape)}, must be int64 [{len(images)}]")

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image, uint8 [3, H, W], and its label."""
        return self.images[index], int(self.labels[index])

    def first(self, n: int) -> "TensorSplit":
        """The first n examples of a fixed shuffle; all of them if there are fewer."""
        chosen = _first_indices(len(self), n)
        return TensorSplit(self.images[chosen], self.labels[chosen])

    def to_tensor(self, side: int) -> "TensorSplit":
        """The split itself: its images are in memory already, whatever size they are used at."""
        return self


@dataclass(frozen=True, eq=False)
class FolderSplit:
    """Image files, decoded when they are read.

    Attributes:
        files: N paths.
        labels: int64 [N].
    """

    files: tuple[Path, ...]
    labels: Tensor

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        """The image, uint8 [3, h, w], upright and in RGB, and its label.

        Raises:
            DataError: the file is not a readable image or has more than 64 megapixels.
        """
        return read_image(self.files[index]), int(self.labels[index])

    def first(self, n: int) -> "FolderSplit":
        """The first n examples of a fixed shuffle; all of them if there are fewer."""
        chosen = _first_indices(len(self), n)
        return FolderSplit(tuple(self.files[i] for i in chosen.tolist()), self.labels[chosen])

    def to_tensor(self, side: int) -> TensorSplit:
        """Decode every image once, as squares of `side` pixels.

        Raises:
            DataError: an image can't be read, or all of them together don't fit in memory.
        """
        try:
            images = torch.empty(len(self), 3, side, side, dtype=torch.uint8)
        except RuntimeError:
            gigabytes = len(self) * 3 * side * side / 1e9
            raise DataError(
                f"{len(self)} images of {side} pixels need {gigabytes:.0f} GB of memory: "
                "use the reference augmentation, which reads them one by one, or a smaller size"
            ) from None
        with ThreadPoolExecutor() as pool:
            squares = pool.map(lambda file: resize_square(read_image(file), side), self.files)
            for image, square in zip(images, squares, strict=True):
                image.copy_(square)
        return TensorSplit(images, self.labels)


Split = TensorSplit | FolderSplit


@dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a validation split over the same classes; label i means `classes[i]`."""

    train: Split
    val: Split
    classes: tuple[str, ...]
    name: str


def load_dataset(name: str, data_dir: str | Path | None = None, *, verify: bool = True) -> Dataset:
    """Load a dataset by name.

    Args:
        name: `cifar10`, `digits` (bundled with scikit-learn, 8 x 8 digits enlarged to 32 x 32), or `folder`
            (`data_dir/train/<class>/*` and `data_dir/val/<class>/*` or `data_dir/test/<class>/*`).
        data_dir: where the files are. For `cifar10` the folder `cifar-10-batches-py`, or the one that holds
            it or the official `cifar-10-python.tar.gz`; without it `./data`, downloaded if nothing is there.
        verify: compare the CIFAR-10 files with the official MD5 sums.

    Raises:
        DataError: unknown name, or files that are missing, damaged or not what they should be.
    """
    directory = None if data_dir is None else Path(data_dir)
    if name == "cifar10":
        return _load_cifar10(directory, verify)
    if name == "digits":
        return _load_digits()
    if name == "folder":
        if directory is None:
            raise DataError("folder: --data-dir is needed, a folder with train/<class>/* and val/<class>/*")
        return _load_folder(directory)
    raise DataError(f"dataset: {name!r} is unknown, choose from {', '.join(DATASETS)}")


# CIFAR-10


def _load_cifar10(data_dir: Path | None, verify: bool) -> Dataset:
    if data_dir is None:
        data_dir = Path("data")
        if _find_cifar10(data_dir) is None:
            _download_cifar10(data_dir)
    folder = _find_cifar10(data_dir)
    if folder is None:
        raise DataError(
            f"{data_dir / CIFAR10.base_folder / _CIFAR_TRAIN[0]} is missing: --data-dir must hold "
            f"{CIFAR10.base_folder} or {CIFAR10.filename}; without --data-dir it is downloaded"
        )
    if folder.is_file():
        folder = _extract_cifar10(folder)

    def read(name: str, parse: Callable[[dict[str, Any]], Any]) -> Any:
        return _read_cifar_file(folder / name, parse, verify)

    classes = read(_CIFAR_META, _cifar_classes)
    train = [read(name, _cifar_batch) for name in _CIFAR_TRAIN]
    val = [read(name, _cifar_batch) for name in _CIFAR_TEST]
    return Dataset(_concatenate(train), _concatenate(val), classes, "cifar10")


def _concatenate(splits: list[TensorSplit]) -> TensorSplit:
    return TensorSplit(torch.cat([s.images for s in splits]), torch.cat([s.labels for s in splits]))


def _find_cifar10(data_dir: Path) -> Path | None:
    """The folder with the batches, or else the archive to extract, or None."""
    for folder in (data_dir / CIFAR10.base_folder, data_dir):
        if any((folder / name).is_file() for name in _CIFAR_MD5):
            return folder
    archive = data_dir / CIFAR10.filename
    return archive if archive.is_file() else None


def _download_cifar10(data_dir: Path) -> None:
    try:
        download_url(CIFAR10.url, data_dir, CIFAR10.filename, CIFAR10.tgz_md5)
    except (OSError, RuntimeError, urllib.error.URLError) as error:
        raise DataError(
            f"CIFAR-10 could not be downloaded ({_one_line(error)}): fetch {CIFAR10.url} "
            "and give its folder with --data-dir"
        ) from error


class _CappedGzip(gzip.GzipFile):
    """A file to read no more than the official archive's content from."""

    left = len(_CIFAR_MD5) * _CIFAR_MAX_BYTES

    def read(self, size: int | None = -1) -> bytes:
        content = super().read(size)
        self.left -= len(content)
        if self.left < 0:
            raise DataError(f"{self.name}: not the official archive, it has too much content")
        return content


def _extract_cifar10(archive: Path) -> Path:
    """Extract the seven expected files beside the archive; whatever else it holds is ignored."""
    target = archive.parent / CIFAR10.base_folder
    expected = {f"{CIFAR10.base_folder}/{name}": name for name in _CIFAR_MD5}
    try:
        with tempfile.TemporaryDirectory(dir=archive.parent) as temporary:
            folder = Path(temporary) / CIFAR10.base_folder
            folder.mkdir()
            # Read as a stream, because tarfile alone would unpack a header of any size into memory.
            with _CappedGzip(archive) as unpacked, tarfile.open(fileobj=unpacked, mode="r|") as tar:
                for number, member in enumerate(tar):
                    if number >= _CIFAR_MAX_MEMBERS or member.size > _CIFAR_MAX_BYTES:
                        raise DataError(f"{archive}: not the official archive, it has too much content")
                    if member.name not in expected:
                        continue
                    content = tar.extractfile(member) if member.isreg() else None
                    if content is None:
                        raise DataError(f"{archive}: {member.name} is not a regular file")
                    # The name comes from our own list, so that no path in the archive is ever used.
                    (folder / expected[member.name]).write_bytes(content.read())
                # tarfile stops before gzip's checksum.
                while unpacked.read(1 << 20):
                    pass
            # Renamed only when complete, so that an interrupted extraction leaves nothing half done.
            folder.rename(target)
    except DataError:
        raise
    except (tarfile.TarError, EOFError, OSError, zlib.error, ValueError) as error:
        raise DataError(f"{archive}: could not be extracted ({_one_line(error)}), fetch it again") from error
    return target


def _read_cifar_file(path: Path, parse: Callable[[dict[str, Any]], Any], verify: bool) -> Any:
    try:
        with path.open("rb") as file:
            raw = file.read(_CIFAR_MAX_BYTES + 1)
    except FileNotFoundError:
        raise DataError(f"{path} is missing: the dataset needs {', '.join(_CIFAR_MD5)}") from None
    except OSError as error:
        raise DataError(f"{path}: can't be read ({_one_line(error)})") from error
    if len(raw) > _CIFAR_MAX_BYTES:
        raise DataError(f"{path}: larger than {_CIFAR_MAX_BYTES:,} bytes, not a CIFAR-10 file")
    if verify and hashlib.md5(raw, usedforsecurity=False).hexdigest() != _CIFAR_MD5[path.name]:
        raise DataError(f"{path}: differs from the official file (MD5), fetch it again or give --no-verify")
    try:
        return parse(_parse_pickle(raw))
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, MemoryError) as error:
        raise DataError(f"{path}: not a CIFAR-10 file ({_one_line(error)})") from error


@dataclass
class _Call:
    """A call that a pickle asks for: recorded, never made."""

    function: str
    args: tuple[Any, ...]
    state: Any = None


_ARRAY_FUNCTIONS = ("numpy.core.multiarray _reconstruct", "numpy._core.multiarray _reconstruct")


def _parse_pickle(raw: bytes) -> dict[str, Any]:
    """Interpret the part of pickle protocol 2 that Python 2 wrote the official files with.

    Byte strings are returned as str, one character per byte. Imports and calls become `_Call` records. Unlike
    `pickle.Unpickler` this can't be made to call anything, to hash deep structures, or to allocate much more
    than the file's own size.

    Raises:
        ValueError, LookupError, TypeError, AttributeError: malformed, or outside that part.
    """
    stack: list[Any] = []
    marks: list[int] = []
    memo: dict[Any, Any] = {}

    def since_mark() -> list[Any]:
        start = marks.pop()
        items = stack[start:]
        del stack[start:]
        return items

    for opcode, arg, _ in pickletools.genops(raw):
        match opcode.name:
            case "PROTO":
                pass
            case "BINSTRING" | "SHORT_BINSTRING" | "BINUNICODE" | "GLOBAL" | "NONE":
                stack.append(arg)
            case "BININT" | "BININT1" | "BININT2" | "LONG1":
                stack.append(arg)
            case "NEWTRUE" | "NEWFALSE":
                stack.append(opcode.name == "NEWTRUE")
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_TUPLE":
                stack.append(())
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                length = int(opcode.name[-1])
                stack[-length:] = [tuple(stack[-length:])]
            case "MARK":
                marks.append(len(stack))
            case "TUPLE":
                items = since_mark()
                stack.append(tuple(items))
            case "APPEND":
                item = stack.pop()
                stack[-1].append(item)
            case "APPENDS":
                items = since_mark()
                stack[-1].extend(items)
            case "SETITEM" | "SETITEMS":
                items = since_mark() if opcode.name == "SETITEMS" else [stack.pop(-2), stack.pop()]
                if not all(isinstance(key, str) for key in items[::2]):
                    raise ValueError("a key is not a string")
                stack[-1].update(zip(items[::2], items[1::2], strict=True))
            case "BINPUT" | "LONG_BINPUT":
                memo[arg] = stack[-1]
            case "BINGET" | "LONG_BINGET":
                stack.append(memo[arg])
            case "REDUCE":
                args = stack.pop()
                stack.append(_Call(stack.pop(), args))
            case "BUILD":
                state = stack.pop()
                stack[-1].state = state
            case "STOP":
                if len(stack) != 1 or not isinstance(stack[0], dict):
                    raise ValueError("not a dictionary")
            case _:
                raise ValueError(f"unexpected opcode {opcode.name}")
    return stack[0]


def _cifar_batch(content: dict[str, Any]) -> TensorSplit:
    call, labels = content["data"], content["labels"]
    if not isinstance(call, _Call) or call.function not in _ARRAY_FUNCTIONS:
        raise ValueError("data is not an array")
    _, shape, dtype, fortran_order, pixels = call.state
    if not isinstance(dtype, _Call) or dtype.function != "numpy dtype" or dtype.args[0] != "u1":
        raise ValueError("data is not an array of uint8")
    if fortran_order:
        raise ValueError("data is not row-major")
    # A copy, because frombuffer's array is read-only.
    images = np.frombuffer(pixels.encode("latin-1"), np.uint8).reshape(-1, 3, 32, 32).copy()
    if shape != (len(images), 3072) or len(images) < 1:
        raise ValueError(f"data has {len(pixels)} bytes and claims another shape, must be n x 3072")
    if type(labels) is not list or len(labels) != len(images):
        raise ValueError("labels do not match data")
    if not all(type(label) is int and 0 <= label <= 9 for label in labels):
        raise ValueError("labels are not integers from 0 to 9")
    return TensorSplit(torch.from_numpy(images), torch.tensor(labels))


def _cifar_classes(content: dict[str, Any]) -> tuple[str, ...]:
    names = content["label_names"]
    if type(names) is not list or not all(isinstance(name, str) and name.isprintable() for name in names):
        raise ValueError("label_names is not a list of names")
    if len(names) != 10 or len(set(names)) != 10:
        raise ValueError("label_names does not hold 10 different names")
    return tuple(names)


# Digits


def _load_digits() -> Dataset:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError:
        raise DataError("digits: scikit-learn is not installed, run `pip install scikit-learn`") from None
    bunch = load_digits()
    # The source has 17 grey levels, 0 to 16.
    pixels = torch.from_numpy(bunch.images * (255 / 16)).round().to(torch.uint8)
    images = resize_square(pixels[:, None].expand(-1, 3, -1, -1), 32)
    labels = torch.from_numpy(bunch.target).to(torch.int64)
    examples = np.arange(len(labels))
    train, val = train_test_split(examples, test_size=360, random_state=0, stratify=bunch.target)
    return Dataset(
        TensorSplit(images[train], labels[train]),
        TensorSplit(images[val], labels[val]),
        tuple(str(name) for name in bunch.target_names),
        "digits",
    )


# Image folders


def _load_folder(data_dir: Path) -> Dataset:
    train_dir = data_dir / "train"
    val_dir = data_dir / "val" if (data_dir / "val").is_dir() else data_dir / "test"
    for directory in (train_dir, val_dir):
        if not directory.is_dir():
            raise DataError(f"{directory} is missing: images must be in train/<class>/ and val/<class>/")
    classes = _subfolders(train_dir)
    for name in _subfolders(val_dir):
        if name not in classes:
            raise DataError(f"{val_dir / name}: class {name!r} has no folder in {train_dir}")
    return Dataset(_list_images(train_dir, classes), _list_images(val_dir, classes), classes, "folder")


def _subfolders(directory: Path) -> tuple[str, ...]:
    return tuple(sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith(".")))


def _list_images(directory: Path, classes: tuple[str, ...]) -> FolderSplit:
    files: list[Path] = []
    labels: list[int] = []
    for name in _subfolders(directory):
        images = sorted(p for p in (directory / name).iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS)
        if not images:
            raise DataError(f"{directory / name}: no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
        files += images
        labels += [classes.index(name)] * len(images)
    if not files:
        raise DataError(f"{directory}: no classes, images must be in {directory}/<class>/")
    return FolderSplit(tuple(files), torch.tensor(labels))


def read_image(path: Path) -> Tensor:
    """Decode an image file: uint8 [3, h, w], upright and in RGB.

    Raises:
        DataError: not a file, not a readable image, or one of more than 64 megapixels.
    """
    # Opening a pipe would wait for someone to write to it.
    if not path.is_file():
        raise DataError(f"{path}: not a file")
    try:
        with Image.open(path, formats=_IMAGE_FORMATS) as image:
            width, height = image.size
            if width * height > MAX_PIXELS:
                raise DataError(f"{path}: {width} x {height} pixels, at most {MAX_PIXELS:,} are read")
            return F.pil_to_tensor(ImageOps.exif_transpose(image).convert("RGB"))
    except DataError:
        raise
    # Pillow's decoders raise nearly every built-in exception on damaged content.
    except Exception as error:
        raise DataError(f"{path}: not a readable image ({_one_line(error)})") from error


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__
