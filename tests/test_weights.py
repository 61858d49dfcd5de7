"""Starting from a file of weights: torchvision's, timm's, a run's, and what is none."""

import pickle
import random
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import timm
import torch
import torchvision

from effnet_fast import Scaling, create_model
from effnet_fast.interop import to_torchvision
from effnet_fast.weights import load_weights
from tests.test_resume import mutated


@pytest.fixture(scope="module")
def official() -> torch.nn.Module:
    torch.manual_seed(0)
    return torchvision.models.efficientnet_b0(num_classes=7).eval()


def test_torchvisions_weights(official: torch.nn.Module, tmp_path: Path) -> None:
    path = tmp_path / "b0.pth"
    torch.save(official.state_dict(), path)
    model = create_model("b0", 7, family="paper").eval()
    assert load_weights(model, path) == [f"Weights of torchvision from {path}"]
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(model(images), official(images), rtol=1e-4, atol=1e-5)  # other kernels, float32


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_timms_weights_with_another_classifier(tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(0)
    theirs = timm.create_model("efficientnet_b0", num_classes=5).eval()
    path = tmp_path / f"b0{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, path)
    else:
        safetensors.torch.save_file(theirs.state_dict(), path)
    model = create_model("b0", 10, family="paper").eval()
    classifier = model.classifier.weight.detach().clone()
    assert load_weights(model, path)[1] == "Left out: the classifier of 5 classes; ours starts anew"
    assert torch.equal(model.classifier.weight, classifier)
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = theirs.forward_features(images)
        # Other kernels, float32.
        torch.testing.assert_close(model.forward_features(images), expected, rtol=1e-4, atol=1e-5)


def test_a_runs_checkpoint_gives_its_average(tmp_path: Path) -> None:
    average, raw = create_model("b0").state_dict(), create_model("b0").state_dict()
    torch.save({"model": raw, "ema": average, "epoch": 1}, tmp_path / "best.pt")
    model = create_model("b0")
    load_weights(model, tmp_path / "best.pt")
    assert all(torch.equal(tensor, average[name]) for name, tensor in model.state_dict().items())


class _Payload:
    def __reduce__(self):
        return (open, ("executed", "w"))


def test_other_files_get_one_line_and_execute_nothing(
    official: torch.nn.Module, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = create_model("b0", 7)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    path = tmp_path / "w.pth"

    def refuse(expected: str) -> None:
        with pytest.raises(ValueError, match=expected) as caught:
            load_weights(model, path)
        assert str(path) in str(caught.value)
        assert "\n" not in str(caught.value)

    refuse("No such file")
    torch.save(official.state_dict(), path)
    refuse("another model: .* check --variant and --family")  # of the paper's family
    for content in (b"", b"text", pickle.dumps(_Payload()), pickle.dumps({"stem": _Payload()})):
        path.write_bytes(content)
        refuse("damaged, or not a file of weights")
    torch.save({"stem": 3}, path)
    refuse("not a file of weights")
    path = tmp_path / "w.safetensors"
    path.write_bytes(random.Random(0).randbytes(1000))
    refuse("damaged, or not a file of weights")
    # Any file of zeros packs to a thousandth of its size.
    torch.save(official.state_dict(), tmp_path / "w.pth")
    path = tmp_path / "bomb.pth"
    with zipfile.ZipFile(tmp_path / "w.pth") as original, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as bomb:
        for member in original.infolist():
            bomb.writestr(member.filename, original.read(member))
    refuse("damaged, or not a file of weights")
    assert not (tmp_path / "executed").exists()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("suffix", [".pth", ".safetensors", "legacy.pth"])
def test_mutated_files_are_refused_or_read(tmp_path: Path, suffix: str) -> None:
    model = create_model(Scaling(0.3, 0.25), 7, family="paper")
    path = tmp_path / f"w{suffix}"
    state = to_torchvision(model.state_dict())
    if suffix == ".safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pth")
    raw, rng = path.read_bytes(), random.Random(0)
    messages = []
    for _ in range(200):
        content = mutated(raw, rng)
        path.write_bytes(content)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        try:
            load_weights(model, path)
        except ValueError as error:
            messages.append(str(error))
            assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        assert path.read_bytes() == content
    assert all(str(path) in message and "\n" not in message for message in messages)
    assert 50 < len(messages) < 200
