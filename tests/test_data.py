"""Reading data: official and hostile CIFAR-10 files, digits, image folders."""

import builtins
import gzip
import hashlib
import io
import os
import pickle
import random
import resource
import shutil
import struct
import tarfile
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from effnet_fast import data
from effnet_fast.data import DataError, FolderSplit, TensorSplit, load_dataset

CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
BATCHES = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]


class Python2Pickler:
    """Pickle protocol 2 as Python 2's cPickle wrote it: byte strings, and a memo entry after every object."""

    def __init__(self, array_module: str) -> None:
        self.memo = 0
        self.array_module = array_module

    def put(self) -> bytes:
        self.memo += 1
        return b"q" + bytes([self.memo]) if self.memo < 256 else b"r" + struct.pack("<I", self.memo)

    def string(self, value: bytes) -> bytes:
        if len(value) < 256:
            return b"U" + bytes([len(value)]) + value + self.put()
        return b"T" + struct.pack("<i", len(value)) + value + self.put()

    def integer(self, value: int) -> bytes:
        if 0 <= value < 256:
            return b"K" + bytes([value])
        return b"M" + struct.pack("<H", value) if 0 <= value < 65536 else b"J" + struct.pack("<i", value)

    def array(self, value: np.ndarray) -> bytes:
        out = b"c" + self.array_module.encode() + b"\n_reconstruct\n" + self.put() + b"cnumpy\nndarray\n"
        out += self.put() + b"K\x00\x85" + self.put() + self.string(b"b") + b"\x87" + self.put() + b"R"
        out += self.put() + b"(K\x01" + b"".join(self.integer(n) for n in value.shape) + b"\x86" + self.put()
        out += b"cnumpy\ndtype\n" + self.put() + self.string(b"u1") + b"K\x00K\x01\x87" + self.put() + b"R"
        out += self.put() + b"(K\x03" + self.string(b"|") + b"NNN" + b"J\xff\xff\xff\xff" * 2 + b"K\x00t"
        return out + self.put() + b"b\x89" + self.string(value.tobytes()) + b"t" + self.put() + b"b"

    def dump(self, value: Any) -> bytes:
        if isinstance(value, bytes):
            return self.string(value)
        if isinstance(value, int):
            return self.integer(value)
        if isinstance(value, np.ndarray):
            return self.array(value)
        if isinstance(value, list):
            return b"]" + self.put() + b"(" + b"".join(self.dump(item) for item in value) + b"e"
        items = b"".join(self.dump(key) + self.dump(item) for key, item in value.items())
        return b"}" + self.put() + b"(" + items + b"u"


def python2_pickle(value: Any, array_module: str = "numpy.core.multiarray") -> bytes:
    return b"\x80\x02" + Python2Pickler(array_module).dump(value) + b"."


def batch(pixels: np.ndarray, labels: list[Any]) -> dict[bytes, Any]:
    names = [b"some_image_%d.png" % i for i in range(len(labels))]
    return {b"batch_label": b"a batch", b"labels": labels, b"data": pixels, b"filenames": names}


def write_cifar10(folder: Path, rows: int = 3) -> dict[str, dict[bytes, Any]]:
    """A small dataset in the official layout; returns what was written."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    content: dict[str, dict[bytes, Any]] = {}
    for name in BATCHES:
        pixels = rng.integers(0, 256, (rows, 3072), dtype=np.uint8)
        content[name] = batch(pixels, rng.integers(0, 10, rows).tolist())
    content["batches.meta"] = {
        b"num_cases_per_batch": 10000,
        b"label_names": [name.encode() for name in CLASSES],
        b"num_vis": 3072,
    }
    for name, value in content.items():
        (folder / name).write_bytes(python2_pickle(value))
    return content


def write_archive(path: Path, members: Iterable[tuple[tarfile.TarInfo, bytes]]) -> None:
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


def official_members(folder: Path) -> list[tuple[tarfile.TarInfo, bytes]]:
    files = [(f"cifar-10-batches-py/{p.name}", p.read_bytes()) for p in sorted(folder.iterdir())]
    files.append(("cifar-10-batches-py/readme.html", b"x"))
    return [(tarfile.TarInfo(name), content) for name, content in files]


def assert_refused(data_dir: Path, *words: str, name: str = "cifar10", verify: bool = False) -> None:
    with pytest.raises(DataError) as caught:
        load_dataset(name, data_dir, verify=verify)
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message


@pytest.fixture
def cifar(tmp_path: Path) -> Path:
    write_cifar10(tmp_path / "cifar-10-batches-py")
    return tmp_path


# CIFAR-10


@pytest.mark.parametrize("inner", ["", "cifar-10-batches-py"])
def test_cifar10_equals_what_was_written(tmp_path: Path, inner: str) -> None:
    content = write_cifar10(tmp_path / "cifar-10-batches-py")
    dataset = load_dataset("cifar10", tmp_path / inner, verify=False)
    train = [content[name] for name in BATCHES[:5]]
    assert isinstance(dataset.train, TensorSplit)
    assert isinstance(dataset.val, TensorSplit)
    assert dataset.train.images.shape == (15, 3, 32, 32)
    assert dataset.train.images.flatten(1).tolist() == np.concatenate([b[b"data"] for b in train]).tolist()
    assert dataset.train.labels.tolist() == [label for b in train for label in b[b"labels"]]
    assert dataset.val.images.flatten(1).tolist() == content["test_batch"][b"data"].tolist()
    assert dataset.val.labels.tolist() == content["test_batch"][b"labels"]
    assert dataset.classes == tuple(CLASSES)
    assert dataset.name == "cifar10"
    image, label = dataset.val[1]
    assert image.flatten().tolist() == content["test_batch"][b"data"][1].tolist()
    assert label == content["test_batch"][b"labels"][1]


def test_the_files_written_here_are_pickles_of_the_official_kind(tmp_path: Path) -> None:
    content = write_cifar10(tmp_path / "c")
    loaded = pickle.loads((tmp_path / "c" / "data_batch_1").read_bytes(), encoding="bytes")
    np.testing.assert_array_equal(loaded.pop(b"data"), content["data_batch_1"].pop(b"data"))
    assert loaded == content["data_batch_1"]


def test_module_name_of_numpy_2_is_read(cifar: Path) -> None:
    pixels = np.full((1, 3072), 7, np.uint8)
    raw = python2_pickle(batch(pixels, [4]), "numpy._core.multiarray")
    (cifar / "cifar-10-batches-py" / "test_batch").write_bytes(raw)
    val = load_dataset("cifar10", cifar, verify=False).val
    assert val[0][0].eq(7).all()
    assert val[0][1] == 4


def test_verify_accepts_the_right_checksums_only(cifar: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cifar / "cifar-10-batches-py"
    assert_refused(cifar, str(folder / "batches.meta"), "--no-verify", verify=True)
    for path in folder.iterdir():
        digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
        monkeypatch.setitem(data._CIFAR_MD5, path.name, digest)
    assert len(load_dataset("cifar10", cifar).train) == 15
    path = folder / "data_batch_4"
    path.write_bytes(path.read_bytes() + b"x")
    assert_refused(cifar, str(path), "--no-verify", verify=True)


def test_missing_files_are_named(cifar: Path, tmp_path: Path) -> None:
    (cifar / "cifar-10-batches-py" / "data_batch_3").unlink()
    assert_refused(cifar, "data_batch_3", "missing")
    empty = tmp_path / "empty"
    empty.mkdir()
    assert_refused(empty, str(empty), "missing", "--data-dir")
    assert_refused(tmp_path / "nowhere", "nowhere", "missing", "--data-dir")


class Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def hostile_pickles(marker: Path) -> dict[str, bytes]:
    objects = np.empty((1, 3072), dtype=object)
    objects[:] = Payload(marker)
    good = python2_pickle(batch(np.zeros((1, 3072), np.uint8), [0]))
    # A key that takes 2^60 steps to hash.
    nested = b"(K\x00K\x00t" + b"q\x00h\x00\x86" * 60
    return {
        "call": pickle.dumps(Payload(marker), protocol=2),
        "call inside": pickle.dumps({"data": Payload(marker), "labels": [0]}, protocol=2),
        "call by an older protocol": pickle.dumps(Payload(marker), protocol=0),
        "call by a newer protocol": pickle.dumps(Payload(marker), protocol=4),
        "object array": pickle.dumps({"data": objects, "labels": [0]}, protocol=2),
        "memo index of 2 billion": good.replace(b"q\x01", b"r\xff\xff\xff\x7f", 1)[:60],
        "string longer than the file": b"\x80\x02T\xff\xff\xff\x7fabc.",
        "huge byte array": b"\x80\x05\x96" + struct.pack("<Q", 1 << 62) + b".",
        "deep key": b"\x80\x02}" + nested + b"K\x00s.",
        "deep nesting": b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b".",
        "attribute of a string": b"\x80\x02U\x01aNb.",
    }


@pytest.mark.parametrize("kind", sorted(hostile_pickles(Path("unused"))))
@pytest.mark.parametrize("name", ["test_batch", "batches.meta"])
def test_hostile_pickles_are_refused_and_not_executed(cifar: Path, name: str, kind: str) -> None:
    marker = cifar / "marker"
    path = cifar / "cifar-10-batches-py" / name
    path.write_bytes(hostile_pickles(marker)[kind])
    assert_refused(cifar, str(path))
    assert not marker.exists()


def test_the_payload_would_have_run(tmp_path: Path) -> None:
    pickle.loads(hostile_pickles(tmp_path / "marker")["call inside"])
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(batch(np.zeros((0, 3072), np.uint8), []), id="empty"),
        pytest.param(batch(np.zeros((2, 3072), np.uint8), [1]), id="too few labels"),
        pytest.param(batch(np.zeros((1, 3072), np.uint8), [10]), id="label out of range"),
        pytest.param(batch(np.zeros((1, 3072), np.uint8), [-1]), id="negative label"),
        pytest.param(batch(np.zeros((1, 3072), np.uint8), [b"1"]), id="label not an integer"),
        pytest.param(batch(np.zeros((2, 1536), np.uint8), [1]), id="wrong shape"),
        pytest.param(batch(np.zeros((1, 3071), np.uint8), [1]), id="short row"),
        pytest.param({b"labels": [1]}, id="no data"),
        pytest.param({b"data": b"x" * 3072, b"labels": [1]}, id="data not an array"),
        pytest.param([1, 2], id="not a dictionary"),
    ],
)
def test_malformed_batches_are_refused(cifar: Path, content: Any) -> None:
    path = cifar / "cifar-10-batches-py" / "test_batch"
    path.write_bytes(python2_pickle(content))
    assert_refused(cifar, str(path), "not a CIFAR-10 file")


@pytest.mark.parametrize(
    ("original", "replaced"),
    [
        (b"U\x02u1", b"U\x02i1"),
        (b"numpy\ndtype", b"numpy\nint64"),
        (b"_reconstruct", b"_deconstruct"),
        # The order of the axes: row-major becomes column-major.
        (b"b\x89T", b"b\x88T"),
    ],
)
def test_other_arrays_are_refused(cifar: Path, original: bytes, replaced: bytes) -> None:
    path = cifar / "cifar-10-batches-py" / "test_batch"
    raw = path.read_bytes()
    assert raw.count(original) == 1
    path.write_bytes(raw.replace(original, replaced))
    assert_refused(cifar, str(path), "data is not")


@pytest.mark.parametrize("names", [[b"a"] * 10, [b"a", b"b"], [b"%d\n" % i for i in range(10)], 3])
def test_malformed_class_names_are_refused(cifar: Path, names: Any) -> None:
    path = cifar / "cifar-10-batches-py" / "batches.meta"
    path.write_bytes(python2_pickle({b"label_names": names}))
    assert_refused(cifar, str(path))


def test_a_file_that_is_too_large_is_not_parsed(cifar: Path) -> None:
    path = cifar / "cifar-10-batches-py" / "test_batch"
    with path.open("wb") as file:
        file.truncate(1 << 40)
    assert_refused(cifar, str(path), "larger")


def test_damaged_files_are_refused_or_read(cifar: Path) -> None:
    rng = random.Random(0)
    messages = []
    for _ in range(300):
        path = cifar / "cifar-10-batches-py" / rng.choice(["data_batch_2", "batches.meta"])
        original = path.read_bytes()
        damaged = bytearray(original)
        if rng.random() < 0.2:
            del damaged[rng.randrange(len(damaged)) :]
        else:
            # Within 400 bytes of either end is everything but pixels.
            for _ in range(rng.choice([1, 1, 1, 4])):
                damaged[rng.randrange(-400, 400) % len(damaged)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            dataset = load_dataset("cifar10", cifar, verify=False)
        except DataError as error:
            messages.append(str(error).partition(str(path))[1:])
        else:
            assert dataset.train.labels.min() >= 0
            assert dataset.train.labels.max() <= 9
            assert len(dataset.train) == 15
            assert len(dataset.classes) == 10
        assert path.read_bytes() == damaged
        path.write_bytes(original)
    assert 0 < len(messages) < 300
    assert all(path and "\n" not in reason for path, reason in messages)


def test_the_official_archive_is_extracted(cifar: Path, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    place.mkdir()
    write_archive(place / "cifar-10-python.tar.gz", official_members(cifar / "cifar-10-batches-py"))
    extracted = load_dataset("cifar10", place, verify=False)
    direct = load_dataset("cifar10", cifar, verify=False)
    assert torch.equal(extracted.train.images, direct.train.images)
    assert sorted(p.name for p in place.iterdir()) == ["cifar-10-batches-py", "cifar-10-python.tar.gz"]
    (place / "cifar-10-python.tar.gz").unlink()
    assert len(load_dataset("cifar10", place, verify=False).train) == 15


def link(name: str, target: str, kind: bytes) -> tuple[tarfile.TarInfo, bytes]:
    member = tarfile.TarInfo(name)
    member.type = kind
    member.linkname = target
    return member, b""


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.DIRTYPE, tarfile.FIFOTYPE])
def test_an_archive_with_links_for_files_is_refused(cifar: Path, tmp_path: Path, kind: bytes) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes((cifar / "cifar-10-batches-py" / "test_batch").read_bytes())
    members = official_members(cifar / "cifar-10-batches-py")
    members = [m for m in members if not m[0].name.endswith("test_batch")]
    members.append(link("cifar-10-batches-py/test_batch", str(secret), kind))
    place = tmp_path / "archive"
    place.mkdir()
    write_archive(place / "cifar-10-python.tar.gz", members)
    assert_refused(place, "cifar-10-python.tar.gz", "test_batch")
    assert [p.name for p in place.iterdir()] == ["cifar-10-python.tar.gz"]


def test_an_archive_writes_nothing_elsewhere(cifar: Path, tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    place.mkdir(parents=True)
    before = {p for p in tmp_path.rglob("*")}
    names = ["../../outside", str(tmp_path / "outside"), "cifar-10-batches-py/../../../outside", "extra"]
    members = official_members(cifar / "cifar-10-batches-py")
    members += [(tarfile.TarInfo(name), b"x") for name in names]
    members.insert(0, link("cifar-10-batches-py", str(tmp_path), tarfile.SYMTYPE))
    write_archive(place / "cifar-10-python.tar.gz", members)
    assert len(load_dataset("cifar10", place, verify=False).train) == 15
    files = {place / "cifar-10-batches-py" / name for name in [*BATCHES, "batches.meta"]}
    new = {p for p in tmp_path.rglob("*")} - before
    assert new == {place / "cifar-10-python.tar.gz", place / "cifar-10-batches-py"} | files


def test_damaged_and_oversized_archives(cifar: Path, tmp_path: Path) -> None:
    place = tmp_path / "archive"
    place.mkdir()
    path = place / "cifar-10-python.tar.gz"
    members = official_members(cifar / "cifar-10-batches-py")
    write_archive(path, members)
    whole = path.read_bytes()
    expected = load_dataset("cifar10", cifar, verify=False)
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.5 else whole)
        for _ in range(4):
            if damaged:
                damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            extracted = load_dataset("cifar10", place, verify=False)
        except DataError as error:
            messages.append(str(error))
        else:
            assert torch.equal(extracted.train.images, expected.train.images)  # gzip has a checksum
        assert path.read_bytes() == damaged
        assert {p.name for p in place.iterdir()} <= {"cifar-10-batches-py", "cifar-10-python.tar.gz"}
        shutil.rmtree(place / "cifar-10-batches-py", ignore_errors=True)
    assert 150 < len(messages) <= 200
    assert all(str(place) in message and "\n" not in message for message in messages)
    write_archive(path, [*members, *((tarfile.TarInfo(f"{i}"), b"") for i in range(100))])
    assert_refused(place, str(path), "too much")
    write_archive(path, [(tarfile.TarInfo("cifar-10-batches-py/test_batch"), bytes(50_000_000))])
    assert_refused(place, str(path), "too much")


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME])
def test_an_archive_with_a_huge_header_is_refused(tmp_path: Path, kind: bytes) -> None:
    """Twenty thousand million bytes of name that pack to a few."""
    header = tarfile.TarInfo("x")
    header.type, header.size = kind, 20_000_000_000
    zeros = gzip.compress(bytes(100_000_000), 1)
    path = tmp_path / "cifar-10-python.tar.gz"
    with path.open("wb") as file:
        file.write(gzip.compress(header.tobuf(tarfile.GNU_FORMAT)))
        for _ in range(5):
            file.write(zeros)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert_refused(tmp_path, str(path), "too much")
    # In kilobytes: what was read before the limit of 280 MB, and a copy of it.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 700_000


def test_download_without_a_data_dir(cifar: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)

    def offline(*_: Any) -> None:
        raise OSError("no route\nto host")

    monkeypatch.setattr(data, "download_url", offline)
    with pytest.raises(DataError, match=r"no route to host.*--data-dir") as caught:
        load_dataset("cifar10", verify=False)
    assert "\n" not in str(caught.value)

    def online(url: str, root: Path, filename: str, md5: str) -> None:
        Path(root).mkdir()
        write_archive(Path(root) / filename, official_members(cifar / "cifar-10-batches-py"))

    monkeypatch.setattr(data, "download_url", online)
    assert len(load_dataset("cifar10", verify=False).train) == 15
    monkeypatch.setattr(data, "download_url", offline)
    assert len(load_dataset("cifar10", verify=False).train) == 15


# Digits


def test_digits_are_scikit_learns() -> None:
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.val)) == (1437, 360)
    assert dataset.classes == tuple("0123456789")
    images = torch.cat([dataset.train.images, dataset.val.images])
    labels = torch.cat([dataset.train.labels, dataset.val.labels])
    assert images.shape == (1797, 3, 32, 32)
    assert torch.equal(images[:, 0], images[:, 1])
    assert torch.equal(images[:, 0], images[:, 2])

    bunch = load_digits()
    small = np.round(bunch.images * 255 / 16).astype(np.uint8)
    enlarged = [Image.fromarray(s).resize((32, 32), Image.Resampling.BICUBIC) for s in small]
    expected = torch.from_numpy(np.stack(enlarged))
    distance = torch.cdist(images[:, 0].flatten(1).float(), expected.flatten(1).float())
    match = distance.argmin(1)
    assert sorted(match.tolist()) == list(range(1797))
    # Pillow's filter weights have other rounding than torchvision's.
    assert (images[:, 0].int() - expected[match].int()).abs().max() <= 1
    assert labels.tolist() == bunch.target[match.numpy()].tolist()

    # Stratified: each class has its share of the validation split, up to rounding.
    share = torch.bincount(labels) * 360 / 1797
    assert (torch.bincount(dataset.val.labels) - share).abs().max() <= 1


def test_digits_split_is_fixed() -> None:
    torch.manual_seed(1)
    first = load_dataset("digits")
    torch.manual_seed(2)
    second = load_dataset("digits")
    assert torch.equal(first.val.images, second.val.images)


def test_digits_without_scikit_learn(monkeypatch: pytest.MonkeyPatch) -> None:
    original = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("sklearn"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(DataError, match="pip install scikit-learn"):
        load_dataset("digits")


# Image folders


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three classes in train, two of them in val, each image of its own size."""
    seed = 0
    for part, classes in (("train", ["cat", "ant", "bee"]), ("val", ["cat", "bee"])):
        for name in classes:
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(2):
                noise(20 + seed, 40 - seed, seed).save(tmp_path / part / name / f"{i}.png")
                seed += 1
            (tmp_path / part / name / "notes.txt").write_text("not an image")
    return tmp_path


def test_folder_classes_and_images(folder: Path) -> None:
    dataset = load_dataset("folder", folder)
    assert dataset.classes == ("ant", "bee", "cat")
    assert dataset.train.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert dataset.val.labels.tolist() == [1, 1, 2, 2]
    # cat was written first: its second image has seed 1.
    image, label = dataset.train[5]
    assert label == 2
    assert image.permute(1, 2, 0).tolist() == np.array(noise(21, 39, 1)).tolist()


def test_folder_test_stands_in_for_val(folder: Path) -> None:
    (folder / "val").rename(folder / "test")
    assert len(load_dataset("folder", folder).val) == 4


def test_folder_layout_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--data-dir"):
        load_dataset("folder")
    assert_refused(folder / "nowhere", "train", name="folder")
    (folder / "val" / "dog").mkdir()
    assert_refused(folder, "dog", "train", name="folder")
    (folder / "train" / "dog").mkdir()
    assert_refused(folder, str(folder / "train" / "dog"), "no images", name="folder")
    for part in ("train", "val"):
        shutil.rmtree(folder / part)
        assert_refused(folder, str(folder), part if part == "train" else "val", name="folder")
        (folder / part).mkdir()
    assert_refused(folder, "no classes", name="folder")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_applied(folder: Path, orientation: int) -> None:
    upright = noise(24, 16)
    # What a camera would have stored, for each value of the tag.
    stored = {
        1: upright,
        2: upright.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
        3: upright.transpose(Image.Transpose.ROTATE_180),
        4: upright.transpose(Image.Transpose.FLIP_TOP_BOTTOM),
        5: upright.transpose(Image.Transpose.TRANSPOSE),
        6: upright.transpose(Image.Transpose.ROTATE_90),
        7: upright.transpose(Image.Transpose.TRANSVERSE),
        8: upright.transpose(Image.Transpose.ROTATE_270),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    stored.save(folder / "photo.png", exif=exif)
    image, _ = FolderSplit((folder / "photo.png",), torch.tensor([0]))[0]
    assert image.permute(1, 2, 0).tolist() == np.array(upright).tolist()


@pytest.mark.parametrize(("mode", "suffix"), [("L", "png"), ("RGBA", "png"), ("P", "gif"), ("1", "tiff")])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, suffix: str) -> None:
    original = noise(9, 5).convert(mode)
    original.save(tmp_path / f"a.{suffix}")
    image, _ = FolderSplit((tmp_path / f"a.{suffix}",), torch.tensor([0]))[0]
    assert image.dtype == torch.uint8
    assert image.permute(1, 2, 0).tolist() == np.array(original.convert("RGB")).tolist()


def png_header_of(width: int, height: int) -> bytes:
    """A tiny PNG whose header claims another size."""
    buffer = io.BytesIO()
    noise(1, 1).save(buffer, "PNG")
    raw = bytearray(buffer.getvalue())
    raw[16:24] = struct.pack(">II", width, height)
    raw[29:33] = struct.pack(">I", zlib.crc32(raw[12:29]))
    return bytes(raw)


def encoded(kind: str) -> bytes:
    buffer = io.BytesIO()
    noise(64, 64).save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "word"),
    [
        pytest.param(b"", "not a readable image", id="empty"),
        pytest.param(b"hello\nworld", "not a readable image", id="text"),
        pytest.param(encoded("JPEG")[:-1000], "not a readable image", id="truncated"),
        pytest.param(encoded("EPS"), "cannot identify", id="PostScript"),
        pytest.param(encoded("PCX"), "cannot identify", id="a rare format"),
        pytest.param(png_header_of(8001, 8000), "8001 x 8000", id="above the limit"),
        pytest.param(png_header_of(2**31 - 1, 2**31 - 1), "not a readable image", id="bomb"),
    ],
)
def test_unreadable_images_are_named(tmp_path: Path, content: bytes, word: str) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(content)
    split = FolderSplit((path,), torch.tensor([0]))
    for read in (lambda: split[0], lambda: split.to_tensor(8)):
        with pytest.raises(DataError) as caught:
            read()
        assert str(path) in str(caught.value)
        assert word in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "BMP", "WEBP", "GIF", "TIFF", "PPM"])
def test_mutated_images_are_refused_or_read(tmp_path: Path, kind: str) -> None:
    rng = random.Random(0)
    whole = encoded(kind)
    path = tmp_path / "a.png"
    messages = []
    for _ in range(200):
        damaged = bytearray(whole[: rng.randrange(len(whole))] if rng.random() < 0.3 else whole)
        # Most of the structure is in the first bytes.
        for _ in range(rng.choice([0, 1, 4, 16])):
            if damaged:
                damaged[min(int(rng.expovariate(1 / 100)), len(damaged) - 1)] = rng.randrange(256)
        path.write_bytes(damaged)
        try:
            image, _ = FolderSplit((path,), torch.tensor([0]))[0]
        except DataError as error:
            messages.append(str(error))
        else:
            assert image.dtype == torch.uint8
            assert image.shape[0] == 3
        assert path.read_bytes() == damaged
    assert len(messages) > 20
    assert all(message.startswith(f"{path}: ") and "\n" not in message for message in messages)


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "a.png")
    with pytest.raises(DataError, match=r"a\.png: not a file"):
        FolderSplit((tmp_path / "a.png",), torch.tensor([0]))[0]


def test_a_missing_image_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gone\.png"):
        FolderSplit((tmp_path / "gone.png",), torch.tensor([0]))[0]


def test_folder_to_tensor_is_pillows_resize_and_crop(folder: Path) -> None:
    split = load_dataset("folder", folder).train
    tensor = split.to_tensor(18)
    assert tensor.images.shape == (6, 3, 18, 18)
    assert torch.equal(tensor.labels, split.labels)
    for i in range(len(split)):
        image = Image.fromarray(split[i][0].permute(1, 2, 0).numpy())
        width, height = (18 * side // min(image.size) for side in image.size)
        left, top = round((width - 18) / 2), round((height - 18) / 2)
        # Across first, as torchvision; in one call some versions of Pillow choose the order by the shape.
        across = image.resize((width, image.height), Image.Resampling.BICUBIC)
        resized = across.resize((width, height), Image.Resampling.BICUBIC)
        expected = torch.from_numpy(np.array(resized.crop((left, top, left + 18, top + 18)))).permute(2, 0, 1)
        # Pillow's filter weights have other rounding than torchvision's.
        assert (tensor.images[i].int() - expected.int()).abs().max() <= 1


def test_folder_to_tensor_that_cannot_fit() -> None:
    split = FolderSplit((Path("a.png"),) * 1_000_000, torch.zeros(1_000_000, dtype=torch.int64))
    with pytest.raises(DataError, match="GB of memory"):
        split.to_tensor(100_000)


# Splits


def test_first_is_a_fixed_shuffle_of_both_kinds_of_split() -> None:
    labels = torch.arange(50).repeat_interleave(2)
    files = tuple(Path(f"{i}") for i in range(100))
    images = torch.arange(100, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)
    tensors = TensorSplit(images, labels)
    torch.manual_seed(3)
    chosen = [int(image[0, 0, 0]) for image, _ in tensors.first(30)]
    torch.manual_seed(4)
    assert [int(path.name) for path in FolderSplit(files, labels).first(30).files] == chosen
    assert len(set(chosen)) == 30
    assert tensors.first(30).labels.tolist() == labels[chosen].tolist()
    # Of a sorted split the first 30 in order would be the first 15 classes.
    assert labels[chosen].max() > 30
    assert [int(image[0, 0, 0]) for image, _ in tensors.first(10)] == chosen[:10]
    assert len(tensors.first(1000)) == 100
    with pytest.raises(DataError, match="at least 1"):
        tensors.first(0)


def test_a_tensor_split_is_its_own_tensor() -> None:
    split = TensorSplit(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64))
    assert split.to_tensor(99) is split


@pytest.mark.parametrize(
    ("images", "labels", "word"),
    [
        (torch.zeros(2, 3, 4, 4), torch.zeros(2, dtype=torch.int64), "images"),
        (torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.zeros(2, dtype=torch.int64), "images"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64), "labels"),
        (torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(2), "labels"),
    ],
)
def test_a_tensor_split_checks_its_tensors(images: torch.Tensor, labels: torch.Tensor, word: str) -> None:
    with pytest.raises(DataError, match=word):
        TensorSplit(images, labels)


def test_unknown_dataset() -> None:
    with pytest.raises(DataError, match=r"'imagenet'.*cifar10, digits, folder"):
        load_dataset("imagenet")
