from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from effnet_fast import VARIANTS, create_model
from effnet_fast.interop import from_timm, from_torchvision, to_timm, to_torchvision
from effnet_fast.passes.backend import use_backend

StateDict = dict[str, Tensor]


class Source(NamedTuple):
    build: Callable[[str], nn.Module]
    arguments: dict[str, Any]
    convert_from: Callable[..., StateDict]
    convert_to: Callable[..., StateDict]


SOURCES = {
    "torchvision": Source(
        lambda variant: getattr(torchvision.models, f"efficientnet_{variant}")(), {}, from_torchvision, to_torchvision
    ),
    "timm": Source(lambda variant: timm.create_model(f"efficientnet_{variant}"), {"bn_eps": 1e-5}, from_timm, to_timm),
    "timm_tf": Source(
        lambda variant: timm.create_model(f"tf_efficientnet_{variant}"),
        {"bn_eps": 1e-3, "pad_type": "same"},
        from_timm,
        to_timm,
    ),
}


def randomize_batch_norm(model: nn.Module, images: Tensor) -> None:
    """Give every BatchNorm its own affine, and the images' statistics; leave the model in evaluation.

    Fresh BatchNorms are all alike, so that a mistaken one would not show, and the signal dies out behind them.
    """
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.weight.uniform_(0.3, 0.9)
            module.bias.normal_(0, 0.1)
            module.momentum = 1.0
            module.train()
    model(images)
    model.eval()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("variant", ["b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7"])
@torch.no_grad()
def test_equal_logits_and_exact_round_trip(variant: str, source: Source) -> None:
    torch.manual_seed(0)
    # Both even and odd sizes occur on the way down: a stride of 2 pads them differently.
    images = torch.randn(4, 3, 64, 52).contiguous(memory_format=torch.channels_last)
    theirs = source.build(variant).to(memory_format=torch.channels_last)  # the layout that our blocks compute in
    randomize_batch_norm(theirs, images)
    state = theirs.state_dict()

    with torch.device("meta"):
        ours = create_model(variant, 1000, family="paper", **source.arguments)
    ours.load_state_dict(source.convert_from(state), strict=True, assign=True)
    ours.eval()

    expected = theirs(images[:1])
    scale = expected.abs().max().item()
    # Random weights decide the logits' scale, so the tolerances are relative to it. In plain PyTorch the operations are
    # the same; the fused ones differ in rounding, as their own models do in float32: up to 1.8e-5 from float64 and
    # 3.1e-5 from themselves in a batch of two (B7, of 55 blocks).
    with use_backend("eager"):
        torch.testing.assert_close(ours(images[:1]), expected, rtol=0, atol=1e-5 * scale)
    torch.testing.assert_close(ours(images[:1]), expected, rtol=0, atol=5e-5 * scale)
    # Another image's logits are about 1 of it away, so that the signal does reach the end.
    assert (theirs(images[1:2]) - expected).abs().max() > 0.5 * scale

    back = source.convert_to(ours.state_dict())
    assert list(back) == list(state)
    assert all(torch.equal(back[key], tensor) for key, tensor in state.items())
    theirs.load_state_dict(back, strict=True)


def our_state(variant: str = "b0", family: str = "paper") -> StateDict:
    with torch.device("meta"):
        return create_model(variant, 7, family=family).state_dict()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
@pytest.mark.parametrize("family", ["reference", "paper"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_tensors_of_any_variant_pass_through(variant: str, family: str, source: Source) -> None:
    state = our_state(variant, family)
    back = source.convert_from(source.convert_to(state))
    assert list(back) == list(state)
    assert all(back[key] is tensor for key, tensor in state.items())


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_a_key_without_counterpart_is_an_error_or_left_out(source: Source) -> None:
    ours = our_state()
    theirs = source.convert_to(ours)
    extra = {"epoch": torch.zeros(()), "ema.decay": torch.zeros(())}
    with pytest.raises(
        ValueError, match=r"^state_dict: 2 of 362 keys are no effnet_fast EfficientNet's: epoch, ema.decay$"
    ):
        source.convert_to({**ours, **extra})
    with pytest.raises(ValueError, match=r"^state_dict: 2 of 362 keys are no \w+ EfficientNet's: epoch, ema.decay$"):
        source.convert_from({**theirs, **extra})
    assert source.convert_to({**ours, **extra}, strict=False) == theirs
    assert source.convert_from({**theirs, **extra}, strict=False) == ours


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES)
def test_the_error_names_only_the_first_keys(source: Source) -> None:
    prefixed = {f"module.{key}": tensor for key, tensor in source.convert_to(our_state()).items()}
    with pytest.raises(ValueError, match=r"^state_dict: 360 of 360 keys .*: (module\.[\w.]+, ){3}\.\.\.$"):
        source.convert_from(prefixed)


@pytest.mark.parametrize("name", ["efficientnet_v2_s", "mobilenet_v2", "resnet18"])
def test_another_architecture_is_an_error(name: str) -> None:
    with torch.device("meta"):
        state = getattr(torchvision.models, name)().state_dict()
    for convert in (from_torchvision, from_timm, to_torchvision, to_timm):
        with pytest.raises(ValueError, match=r"^state_dict: "):
            convert(state)


def test_the_other_librarys_keys_are_an_error() -> None:
    state = our_state()
    for convert, other in ((from_torchvision, to_timm), (from_timm, to_torchvision)):
        with pytest.raises(ValueError, match=r"^state_dict: "):
            convert(other(state))
