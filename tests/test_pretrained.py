"""Models in files of their own, from runs' folders, and as backbones of other networks."""

import json
import random
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import timm
import torch

from effnet_fast import EfficientNet, Scaling, create_model
from effnet_fast.interop import from_timm
from effnet_fast.model import STRIDES
from effnet_fast.passes.backend import use_backend
from effnet_fast.run_folder import RunFolder
from tests.test_interop import randomize_batch_norm
from tests.test_resume import mutated

OTHER = {
    "strides": (1, 1, 2, 1, 2, 1, 1, 2),
    "in_chans": 1,
    "drop_rate": 0.4,
    "drop_path_rate": 0.1,
    "bn_eps": 1e-3,
    "bn_momentum": 0.01,
}


@pytest.fixture
def model() -> EfficientNet:
    """Nothing about it is as by default."""
    torch.manual_seed(0)
    model = create_model(Scaling(0.3, 0.25), 7, family="paper", pad_type="same", **OTHER)
    with torch.no_grad():
        randomize_batch_norm(model, torch.randn(4, 1, 40, 40))
    return model


@pytest.mark.parametrize("name", ["folder/of/models", "weights.safetensors"])
@torch.no_grad()
def test_a_saved_model_comes_back(model: EfficientNet, tmp_path: Path, name: str) -> None:
    file = model.save_pretrained(str(tmp_path / name))
    assert file == tmp_path / name / "model.safetensors" or file == tmp_path / "weights.safetensors"
    again = EfficientNet.from_pretrained(tmp_path / name, memory="min")
    assert not any(module.training for module in again.modules())
    state, expected = again.state_dict(), model.state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[key], tensor) for key, tensor in expected.items())
    images = torch.randn(2, 1, 33, 47)
    assert torch.equal(again(images), model(images))
    # What does not show in evaluation.
    assert again.dropout.p == 0.4
    assert again.stem.bn.momentum == 0.01
    assert [m.drop_path_rate for m in again.stages[5]] == [m.drop_path_rate for m in model.stages[5]]
    assert again.stem.memory == "min"
    assert all(parameter.requires_grad for parameter in again.parameters())


def test_weights_keep_their_dtype(model: EfficientNet, tmp_path: Path) -> None:
    file = model.bfloat16().save_pretrained(tmp_path)
    assert EfficientNet.from_pretrained(file).head.conv.weight.dtype == torch.bfloat16


def test_the_file_is_read_by_others(model: EfficientNet, tmp_path: Path) -> None:
    file = model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    tensors = safetensors.torch.load_file(file)
    assert all(torch.equal(tensors[key], tensor) for key, tensor in model.state_dict().items())


def test_a_fused_model_is_not_saved(model: EfficientNet, tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^save_pretrained: the model is fused"):
        model.fuse().save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["run", "run/checkpoint.pt"])
def test_a_runs_moving_average(tmp_path: Path, name: str) -> None:
    raw, average = create_model("baseline", 5), create_model("baseline", 5)
    run = RunFolder.create(tmp_path / "run", {})
    config = {"variant": "baseline", "family": "reference", "strides": list(STRIDES)}
    state = {"model": raw.state_dict(), "ema": average.state_dict(), "epoch": 1, "config": config}
    run.save_checkpoint(state, best=True)
    model = EfficientNet.from_pretrained(tmp_path / name)
    assert all(torch.equal(tensor, average.state_dict()[key]) for key, tensor in model.state_dict().items())
    run.save_checkpoint(state | {"config": {"variant": "b9"}}, best=True)
    with pytest.raises(ValueError, match=r"best\.pt: its weights do not fit its configuration"):
        EfficientNet.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize(
    "change",
    [
        {"scaling": {"depth": 1e9, "width": 0.25, "resolution": 1.0}},
        {"scaling": {"depth": 0.3, "width": 1e300, "resolution": 1.0}},
        {"scaling": {"depth": float("inf"), "width": 0.25, "resolution": 1.0}},
        {"scaling": 1},
        {"num_classes": 10**18},
        {"num_classes": "7"},
        {"bn_eps": "x"},
        {"pad_type": "valid"},
        {"device": "cuda"},
    ],
)
def test_a_foreign_configuration_gets_one_line(model: EfficientNet, tmp_path: Path, change: dict[str, object]) -> None:
    file = model.save_pretrained(tmp_path)
    with safetensors.safe_open(file, framework="pt") as handle:
        config = json.loads(handle.metadata()["config"])
    safetensors.torch.save_file(model.state_dict(), file, {"config": json.dumps(config | change)})
    with pytest.raises(ValueError, match=r"model\.safetensors: its weights do not fit its configuration$"):
        EfficientNet.from_pretrained(file)


def test_other_files_get_one_line(model: EfficientNet, tmp_path: Path) -> None:
    def refuse(path: Path, expected: str) -> None:
        with pytest.raises(ValueError, match=expected) as caught:
            EfficientNet.from_pretrained(path)
        assert "\n" not in str(caught.value)

    refuse(tmp_path, r"model\.safetensors: No such file")
    file = tmp_path / "model.safetensors"
    for metadata in (None, {}, {"config": "{"}, {"config": "[" * 100_000}):
        safetensors.torch.save_file(model.state_dict(), file, metadata)
        refuse(file, r"model\.safetensors: has no configuration of a model")
    file.write_bytes(b"text")
    refuse(file, r"model\.safetensors: damaged, or not a safetensors file$")
    with pytest.raises(ValueError, match=r"^memory: got 'none'"):
        EfficientNet.from_pretrained(file, memory="none")


def test_mutated_files_are_refused_or_read(model: EfficientNet, tmp_path: Path) -> None:
    file = model.save_pretrained(tmp_path)
    raw = file.read_bytes()
    rng = random.Random(0)
    messages = []
    for _ in range(200):
        content = mutated(raw, rng)
        file.write_bytes(content)
        try:
            again = EfficientNet.from_pretrained(file)
        except ValueError as error:
            messages.append(str(error))
        else:
            assert isinstance(again, EfficientNet)  # safetensors has no checksums
        assert file.read_bytes() == content
    assert all(message.startswith(f"{file}: ") and "\n" not in message for message in messages)
    assert 50 < len(messages) < 200


@pytest.mark.parametrize("variant", ["b0", "b2"])
@torch.no_grad()
def test_feature_maps_are_timms(variant: str) -> None:
    torch.manual_seed(0)
    whole = timm.create_model(f"efficientnet_{variant}")
    images = torch.randn(2, 3, 64, 52)
    randomize_batch_norm(whole, images)
    images = images.double()
    theirs = timm.create_model(f"efficientnet_{variant}", features_only=True).eval().double()
    theirs.load_state_dict(whole.state_dict(), strict=False)
    ours = create_model(variant, 1000, family="paper").eval().double()
    ours.load_state_dict(from_timm(whole.state_dict()))
    assert [info.channels for info in ours.feature_info] == theirs.feature_info.channels()
    assert [info.stride for info in ours.feature_info] == theirs.feature_info.reduction()
    with use_backend("eager"):
        maps = ours.feature_maps(images)
    for our_map, their_map, info in zip(maps, theirs(images), ours.feature_info, strict=True):
        assert our_map.shape[1] == info.channels
        # The same operations in plain PyTorch, rounded to float64 in another order.
        torch.testing.assert_close(our_map, their_map, rtol=0, atol=1e-12 * their_map.abs().max().item())


def test_gradients_flow_through_feature_maps() -> None:
    model = create_model(Scaling(0.3, 0.25))
    sum(features.square().mean() for features in model.feature_maps(torch.randn(2, 3, 64, 64))).backward()
    assert all(parameter.grad is not None for parameter in (*model.stem.parameters(), *model.stages.parameters()))
    assert model.head.conv.weight.grad is None


@torch.no_grad()
def test_feature_maps_of_other_strides() -> None:
    model = create_model(Scaling(0.3, 0.25), strides=(1, 1, 2, 1, 2, 1, 1, 2)).eval()
    maps = model.feature_maps(torch.randn(1, 3, 32, 40))
    assert [info.stride for info in model.feature_info] == [1, 2, 4, 8]
    for features, info in zip(maps, model.feature_info, strict=True):
        assert features.shape == (1, info.channels, 32 // info.stride, 40 // info.stride)
    assert torch.equal(
        model.forward_features(torch.zeros(1, 3, 32, 40)), model.head(model.feature_maps(torch.zeros(1, 3, 32, 40))[-1])
    )


def test_a_run_of_other_strides_comes_back(tmp_path: Path) -> None:
    torch.manual_seed(0)
    strides = [1, 1, 2, 2, 1, 1, 2, 1]
    model = create_model("baseline", 10, strides=strides).eval()
    config = {"variant": "baseline", "family": "reference", "strides": strides}
    torch.save({"model": {}, "ema": model.state_dict(), "epoch": 1, "config": config}, tmp_path / "best.pt")
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(EfficientNet.from_pretrained(tmp_path / "best.pt")(images), model(images))
