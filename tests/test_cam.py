"""Grad-CAM figures: the maps against Grad-CAM written out, the command's files and errors."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from effnet_fast import cam
from effnet_fast.run_model import RunModel
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_run(tmp_path_factory.mktemp("runs") / "$run$", input_size=128) as folder:
        yield folder


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name in ("a", "$b_"):
        pixels = rng.integers(0, 256, (9, 12, 3), np.uint8)
        Image.fromarray(pixels).resize((160, 140)).save(folder / f"{name}.png")
    return folder


def scaled(heat: Tensor) -> Tensor:
    heat = heat - heat.min()
    return heat / heat.max()


def test_heat_map_is_grad_cam(run: Path) -> None:
    loaded = RunModel.load(run)
    torch.manual_seed(0)
    image = torch.randn(1, 3, 128, 128)
    heat, probabilities = cam.heat_map(loaded, image)
    model = loaded.model.double()
    features = model.feature_maps(image.double())[-1]
    logits = model.classifier(model.head(features).mean((2, 3)))[0]
    (gradient,) = torch.autograd.grad(logits.max(), features)
    coarse = (features * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    expected = scaled(F.interpolate(scaled(coarse), size=(128, 128), mode="bilinear"))[0, 0]
    assert expected.std() > 0.1
    # float32 in a model against float64.
    torch.testing.assert_close(torch.from_numpy(heat).double(), expected.detach(), rtol=0, atol=1e-3)
    torch.testing.assert_close(probabilities.double(), logits.detach().softmax(0), rtol=0, atol=1e-4)


def test_visible_undoes_the_normalization(run: Path, images: Path) -> None:
    loaded = RunModel.load(run)
    pixels = torch.randint(0, 256, (3, 146, 146), dtype=torch.uint8)  # 128 / 0.875: cropped only
    expected = pixels[:, 9:137, 9:137].permute(1, 2, 0).numpy() / 255
    np.testing.assert_allclose(cam.visible(loaded.prepare(pixels)), expected, atol=1e-6)
    whole = loaded._replace(crop_pct=1.0).prepare(pixels[:, 9:137, 9:137])
    np.testing.assert_allclose(cam.visible(whole), expected, atol=1e-6)


@pytest.mark.parametrize("suffix", ["png", "svg"])
def test_runs_side_by_side(run: Path, images: Path, tmp_path: Path, suffix: str) -> None:
    out = tmp_path / f"cam.{suffix}"
    with pytest.raises(SystemExit) as ended:
        cam.main([str(run), str(images), "--beside", str(run), "--out", str(out)])
    assert ended.value.code == 0
    assert list(tmp_path.iterdir()) == [out]
    if suffix == "png":
        width, height = Image.open(out).size
        assert (width, height) == (3 * 375, 2 * 420)  # 2.5 and 2.8 inches at 150 dots
    else:
        assert out.read_bytes().startswith(b"<?xml")


def test_titles_name_runs_images_and_classes(run: Path, images: Path) -> None:
    loaded = RunModel.load(run)
    file = images / "$b_.png"
    image = loaded.prepare(torch.randint(0, 256, (3, 100, 100), dtype=torch.uint8))
    figure = cam.draw([("$run$", loaded)], [(file, [image])])
    left, right = (axes.get_title() for axes in figure.axes)
    probabilities = loaded.model(image).softmax(1)[0]
    best = int(probabilities.argmax())
    assert left == r"\$b_.png"
    assert right == f"\\$run\\$\ndigit {best}, {100 * probabilities[best]:.1f} %"


def test_a_bad_image_gets_a_line(run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bad = tmp_path / "bad.png"
    bad.write_text("text")
    out = tmp_path / "cam.png"
    with pytest.raises(SystemExit) as ended:
        cam.main([str(run), str(bad), str(images / "a.png"), "--out", str(out)])
    assert ended.value.code == 1
    assert out.exists()
    assert [line.partition(": ")[2] for line in capsys.readouterr().err.splitlines()] == [
        f"{bad}: not a readable image (cannot identify image file {str(bad)!r})"
    ]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["a.png", "--out", "cam.txt"], "argument --out: got 'cam.txt', must end with .png, .jpg, .pdf or .svg"),
        (["a.png", "--out", "/dev/null/cam.png"], "can't write /dev/null/cam.png: Not a directory"),
        (["a.png", "--out", "cam.png", "--beside", "nowhere"], "nowhere/config.json: No such file"),
        (["missing.png", "--out", "cam.png"], "error: no image can be read"),
    ],
)
def test_wrong_options_get_a_line(
    run: Path,
    images: Path,
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(images)
    with pytest.raises(SystemExit) as ended:
        cam.main([str(run), *options])
    assert ended.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_a_missing_library_is_named(
    run: Path, images: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pytorch_grad_cam", None)
    with pytest.raises(SystemExit):
        cam.main([str(run), str(images), "--out", "cam.png"])
    assert "pytorch_grad_cam is not installed, run `pip install effnet_fast[cam]`" in capsys.readouterr().err
