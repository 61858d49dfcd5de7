"""Models written for other programs, loaded and run as those would."""

import json
from collections.abc import Iterator
from pathlib import Path

import onnx
import onnxruntime
import pytest
import safetensors.torch
import timm
import torch
import torchvision
from torch import Tensor

from effnet_fast import EfficientNet, create_model, export
from effnet_fast.model import STRIDES
from effnet_fast.run_folder import RunFolder
from tests.tiny import tiny_run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with tiny_run(tmp_path_factory.mktemp("runs") / "run") as folder:
        yield folder


def assert_logits(run: Path, forward: export.Forward) -> None:
    """Of any number of images, against the run's model in float64."""
    torch.manual_seed(1)
    model = EfficientNet.from_pretrained(run).double()
    for count in (1, 4, 9):
        images = torch.randn(count, 3, 32, 32)
        with torch.no_grad():
            expected = model(images.double())
            # The format's own promise.
            torch.testing.assert_close(
                forward(images).double(), expected, rtol=0, atol=1e-4 * expected.abs().max().item()
            )


def assert_description(text: str) -> None:
    facts = json.loads(text)
    assert facts["classes"] == [f"digit {i}" for i in range(10)]
    assert (facts["input_size"], facts["crop_pct"]) == (32, 0.875)
    assert (facts["mean"], facts["std"]) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])


def test_onnx(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "tiny.onnx"
    export.main([str(run), "--format", "onnx", "--output", str(file)])
    assert capsys.readouterr().out.splitlines()[-1] == f"{file}: {file.stat().st_size:,} bytes"
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    assert_logits(run, lambda images: torch.from_numpy(session.run(["logits"], {"images": images.numpy()})[0]))
    assert_description(session.get_modelmeta().custom_metadata_map["effnet_fast"])
    onnx.checker.check_model(onnx.load(file), full_check=True)
    assert list(tmp_path.iterdir()) == [file]


def test_torchscript(run: Path) -> None:
    export.main([str(run), "--format", "torchscript"])
    files = {"effnet_fast": ""}
    assert_logits(run, torch.jit.load(run / "model.pt", _extra_files=files))
    assert_description(files["effnet_fast"])


def test_exported_program(run: Path) -> None:
    export.main([str(run), "--format", "pt2"])
    files = {"effnet_fast": ""}
    program = torch.export.load(run / "model.pt2", extra_files=files)
    assert_logits(run, program.module())
    assert_description(files["effnet_fast"])
    # It needs nothing of this package.
    operators = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
    assert all(name.startswith(("aten.", "<built-in function", "sym_size")) for name in operators)


def test_aot_inductor(run: Path) -> None:
    export.main([str(run), "--format", "aoti"])
    program = torch._inductor.aoti_load_package(str(run / "model-aoti.pt2"))
    assert_logits(run, program)
    assert_description(program.get_metadata()["effnet_fast"])


def test_our_weights(run: Path) -> None:
    export.main([str(run), "--format", "safetensors"])
    assert_logits(run, lambda images: EfficientNet.from_pretrained(run / "model.safetensors")(images).detach())


@pytest.mark.parametrize("names", ["timm", "torchvision"])
def test_weights_for_others(tmp_path: Path, names: str) -> None:
    torch.manual_seed(0)
    model = create_model("b0", 5, family="paper")
    config = {"variant": "b0", "family": "paper", "strides": list(STRIDES), "classes": list("abcde")}
    config |= {"input_size": 64, "crop_pct": 0.875}
    run = RunFolder.create(tmp_path / "run", config)
    weights = {"model": {}, "ema": model.state_dict()}
    run.save_checkpoint({**weights, "epoch": 1, "config": config}, best=True)
    file = tmp_path / "b0.safetensors"
    export.main([str(run.path), "--format", "safetensors", "--names", names, "--output", str(file)])
    if names == "timm":
        theirs = timm.create_model("efficientnet_b0", num_classes=5, checkpoint_path=str(file)).eval()
    else:
        theirs = torchvision.models.efficientnet_b0(num_classes=5).eval()
        theirs.load_state_dict(safetensors.torch.load_file(file))
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval()(images)
        torch.testing.assert_close(theirs(images), expected, rtol=0, atol=1e-4 * expected.abs().max().item())


def test_a_program_that_computes_something_else_is_not_written(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong(model: torch.nn.Module, images: Tensor, file: Path, description: dict[str, str]) -> export.Forward:
        file.write_bytes(b"program")
        return lambda x: model(x) * 1.001

    monkeypatch.setitem(export.PROGRAMS, "onnx", (wrong, "model.onnx"))
    file = tmp_path / "old.onnx"
    file.write_bytes(b"old")
    with pytest.raises(SystemExit) as ended:
        export.main([str(run), "--format", "onnx", "--output", str(file)])
    assert ended.value.code == 2
    assert "error: onnx: its logits differ by " in capsys.readouterr().err
    assert file.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--format", "onnx", "--names", "timm"], "argument --names: got 'timm', goes with --format safetensors only"),
        (["--format", "onnx", "--output", "x.pt"], "argument --output: got 'x.pt', must end with .onnx"),
        (["--format", "pt2", "--output", "/dev/null/x.pt2"], "can't write /dev/null/x.pt2: Not a directory"),
        (["--format", "tflite"], "argument --format: invalid choice: 'tflite'"),
    ],
)
def test_wrong_options_get_one_line(
    run: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        export.main([str(run), *options])
    line = capsys.readouterr().err
    assert (ended.value.code, line.count("\n")) == (2, 1)
    assert message in line


def test_a_missing_library_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(SystemExit):
        export.main([str(run), "--format", "onnx"])
    assert "onnxruntime is not installed, run `pip install effnet_fast[export]`" in capsys.readouterr().err
