"""The predict command on a run of the tiny variant, and what it does with images that are none."""

import io
import json
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from effnet_fast import EfficientNet, augment, data, predict
from effnet_fast.run_folder import RunFolder
from tests.test_resume import mutated
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_run(tmp_path_factory.mktemp("runs") / "run") as folder:
        yield folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """20 images of different sizes, more than a batch of the command, some of them in a folder below."""
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    (folder / "below").mkdir()
    for i in range(20):
        pixels = rng.integers(0, 256, (40 + i, 50, 3), np.uint8)
        Image.fromarray(pixels).save(folder / ("below" if i % 5 == 0 else ".") / f"{i:02}.png")
    return folder


class Result(NamedTuple):
    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def call(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    def call(*arguments: str | Path) -> Result:
        with pytest.raises(SystemExit) as ended:
            predict.main([str(run), *map(str, arguments)])
        out, err = capsys.readouterr()
        return Result(ended.value.code, out.splitlines(), err.splitlines())

    return call


def expected(run: Path, file: Path) -> torch.Tensor:
    """Probabilities of one image, by the parts that validation uses."""
    pixels = torch.from_numpy(np.array(Image.open(file))).permute(2, 0, 1)
    split = data.TensorSplit(pixels[None], torch.zeros(1, dtype=torch.int64))
    loader = augment.val_loader(split, augment="fast", size=32, batch_size=1, num_workers=0, device=torch.device("cpu"))
    model = EfficientNet.from_pretrained(run).double()
    with torch.no_grad():
        return model(next(iter(loader.epoch(0)))[0].double()).softmax(1)[0]


def test_json_of_a_folder(run: Path, images: Path, call: Callable[..., Result]) -> None:
    status, out, err = call("--json", images)
    assert (status, err) == (0, [])
    rows = [json.loads(line) for line in out]
    assert [row["image"] for row in rows] == sorted(str(path) for path in images.rglob("*.png"))
    for row in rows[::7]:
        probabilities = expected(run, Path(row["image"]))
        top = row["predictions"]
        assert [entry["index"] for entry in top] == probabilities.topk(5).indices.tolist()
        assert [entry["class"] for entry in top] == [f"digit {entry['index']}" for entry in top]
        values = [entry["probability"] for entry in top]
        assert values == pytest.approx(probabilities.topk(5).values.tolist(), abs=1e-5)  # float32 against float64


def test_table(run: Path, images: Path, call: Callable[..., Result]) -> None:
    file = images / "07.png"
    status, out, err = call(file)
    assert (status, err) == (0, [])
    assert out[0] == str(file)
    top = expected(run, file).topk(5)
    lines = zip(top.values.tolist(), top.indices.tolist(), strict=True)
    assert out[1:] == [f"  {100 * value:6.2f} %  digit {index}" for value, index in lines]


def test_names_from_stdin(images: Path, call: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    strange = images.parent / os.fsdecode(b"not utf-8 \xff.png")
    strange.write_bytes((images / "01.png").read_bytes())
    # An empty line is no name: as a path it would be the current folder.
    names = b"\n".join([*map(os.fsencode, [images / "02.png", strange]), b"", os.fsencode(images / "below"), b""])
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(names)))
    status, out, err = call("--json", "-")
    assert (status, err) == (0, [])
    found = [json.loads(line)["image"] for line in out]
    assert found == [str(images / "02.png"), str(strange), *(str(p) for p in sorted((images / "below").iterdir()))]
    status, out, err = call(strange)
    assert status == 0
    assert out[0].endswith(r"not utf-8 \udcff.png")


def test_bad_images_get_a_line_each_and_the_others_are_classified(
    images: Path, tmp_path: Path, call: Callable[..., Result]
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "text\nfile.png").write_text("text")
    huge = io.BytesIO()
    Image.new("1", (10_000, 8_000)).save(huge, "png")
    (tmp_path / "huge.png").write_bytes(huge.getvalue())
    good = images / "03.png"
    bad = [tmp_path / name for name in ("missing.png", "text\nfile.png", "huge.png", "empty")]
    status, out, err = call("--json", *bad, good)
    assert status == 1
    assert [json.loads(line)["image"] for line in out] == [str(good)]
    assert len(err) == 4
    for line, word in zip(err, ("not a file", "not a readable image", "10000 x 8000 pixels", "no images"), strict=True):
        assert line.startswith("python -m effnet_fast.predict: ")
        assert word in line
    assert call(*bad).status == 1


def test_mutated_images(images: Path, tmp_path: Path, call: Callable[..., Result]) -> None:
    raw = (images / "04.png").read_bytes()
    rng = random.Random(0)
    for i in range(200):
        (tmp_path / f"{i:03}.png").write_bytes(mutated(raw, rng))
    status, out, err = call("--json", tmp_path)
    assert status == 1
    assert len(out) + len(err) == 200
    assert len(out) > 10


def test_other_runs_get_one_line(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refuse(folder: Path, expected: str, *options: str) -> None:
        with pytest.raises(SystemExit) as ended:
            predict.main([str(folder), "x.png", *options])
        line = capsys.readouterr().err
        assert (ended.value.code, line.count("\n")) == (2, 1)
        assert expected in line

    refuse(tmp_path, "config.json: No such file or directory; give the folder of a training run")
    config = RunFolder(run).config()
    for change in ({"classes": None}, {"classes": [1]}, {"input_size": "32"}, {"input_size": 0}):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        refuse(tmp_path, "config.json: lacks classes or input_size")
    for crop_pct in (0, 1.5, "1", None):
        (tmp_path / "config.json").write_text(json.dumps(config | {"crop_pct": crop_pct}))
        refuse(tmp_path, f"config.json: crop_pct is {crop_pct!r}, not a run's configuration")
    (tmp_path / "config.json").write_text(json.dumps(config | {"classes": ["a", "b"]}))
    refuse(tmp_path, "best.pt: No such file")
    (tmp_path / "best.pt").write_bytes((run / "best.pt").read_bytes())
    refuse(tmp_path, "the best checkpoint does not fit")
    refuse(run, "argument --device: invalid choice: 'tpu'", "--device", "tpu")
