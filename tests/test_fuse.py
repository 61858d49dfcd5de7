"""Folding BatchNorm: the fused model against the unfused one in float64, its state dict, compilers, errors."""

import copy
import gc
import io
import math

import pytest
import torch
from torch import Tensor, nn

from effnet_fast import EfficientNet, Scaling, create_model, ops
from effnet_fast.layers import MBConv
from effnet_fast.passes.backend import use_backend
from tests.ops.test_ops import relative_error
from tests.test_interop import randomize_batch_norm

# Relative to the norm of the unfused float64 result. float32: some hundred roundings of 6e-8. bfloat16: activations and
# folded weights are rounded (2^-9) some five times in a block.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}
# Whole models: B0 has 16 blocks, whose rounding errors add up as in any float32 model (2e-5 for bn_act and mbconv too).
MODEL_TOLERANCE = 1e-4


def evaluated_model(variant: str | Scaling = "b0", **arguments: object) -> EfficientNet:
    """A model in evaluation whose BatchNorms all differ, with statistics of images."""
    torch.manual_seed(0)
    model = create_model(variant, **arguments)
    with torch.no_grad():
        randomize_batch_norm(model, torch.randn(4, 3, 64, 52))
    return model


def block_kinds() -> list[tuple[int, int]]:
    """(stage, block) of every kind of block there is: a stage's first, and the others, which are alike."""
    return [(stage, block) for stage in range(7) for block in (0, 1) if block == 0 or stage in range(1, 6)]


@pytest.fixture(scope="module", params=["paper", "reference", "same"])
def model(request: pytest.FixtureRequest) -> EfficientNet:
    arguments = {"paper": {"family": "paper"}, "reference": {}, "same": {"pad_type": "same", "bn_eps": 1e-3}}
    return evaluated_model(**arguments[request.param])


@pytest.mark.parametrize("kind", block_kinds(), ids=str)
@torch.no_grad()
def test_every_kind_of_block(model: EfficientNet, kind: tuple[int, int]) -> None:
    block: MBConv = copy.deepcopy(model.stages[kind[0]][kind[1]])
    wide = copy.deepcopy(block).double()
    first = block.expand or block.depthwise
    channels = first.conv.in_channels
    # the last is large enough for the CPU to take it image by image
    side = math.ceil((2**20 / 4 / block.depthwise.conv.out_channels) ** 0.5)
    sizes = ((3, 7, 10), (1, 1, 1), (2, 5, 2), (4, side + 3, side))
    samples = [torch.randn(n, channels, h, w) for n, h, w in sizes]
    expected = [wide(x.double()) for x in samples]
    for part in (block.expand, block.depthwise, block.project):
        if part is not None:
            part.fuse()
    for dtype, limit in TOLERANCE.items():
        rounded = copy.deepcopy(block).to(dtype)
        for x, result in zip(samples, expected, strict=True):
            out = rounded(x.to(dtype))
            assert out.dtype == dtype
            assert out.is_contiguous(memory_format=torch.channels_last)
            assert relative_error(out, result) < limit
    assert block(samples[0][:0]).shape == expected[0][:0].shape


@torch.no_grad()
def test_the_folding_itself_is_exact(model: EfficientNet) -> None:
    """In float64 nothing but the folding differs."""
    wide = copy.deepcopy(model).double()
    images = torch.randn(2, 3, 33, 47, dtype=torch.float64)
    expected = wide(images)
    assert relative_error(wide.fuse()(images), expected) < 1e-12


@pytest.mark.parametrize("size", [(64, 64), (33, 47), (1, 1)])
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_whole_model_in_float32(model: EfficientNet, size: tuple[int, int], batch: int) -> None:
    images = torch.randn(batch, 3, *size)
    expected = copy.deepcopy(model).double()(images.double())
    fused = copy.deepcopy(model).fuse()
    assert relative_error(fused(images), expected) < MODEL_TOLERANCE
    assert relative_error(fused(images.to(memory_format=torch.channels_last)), expected) < 1e-4
    with use_backend("eager"):
        assert relative_error(fused(images), expected) < MODEL_TOLERANCE


@pytest.mark.parametrize("how", ["autocast", "model.to, then fuse", "fuse, then model.to"])
@torch.no_grad()
def test_whole_model_in_bfloat16(model: EfficientNet, how: str) -> None:
    # Some images are far harder than others, also for plain PyTorch in bfloat16: hence the median of many.
    images = torch.randn(24, 3, 64, 52, generator=torch.Generator().manual_seed(0))
    expected = copy.deepcopy(model).double()(images.double())
    fused = copy.deepcopy(model)
    if how == "autocast":
        fused.fuse()
    else:
        fused = fused.bfloat16().fuse() if how == "model.to, then fuse" else fused.fuse().bfloat16()
        images = images.bfloat16()

    def error() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=how == "autocast"):
            logits = fused(images)
        assert logits.dtype == torch.bfloat16
        return ((logits.double() - expected).norm(dim=1) / expected.norm(dim=1)).median().item()

    with use_backend("eager"):
        of_twin = error()
    assert error() < 1.3 * of_twin  # which rounds more often: the ratio is 0.6 to 1.05


@pytest.fixture
def small() -> EfficientNet:
    return evaluated_model(Scaling(width=0.25))


def test_the_compiled_pass_runs_where_the_model_is_fused(small: EfficientNet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also without torch.no_grad(): the parameters are frozen."""
    blocks = []
    monkeypatch.setattr(ops.inference, "mbconv_folded_eager", lambda *args, **kwargs: blocks.append(args))
    assert small.fuse()(torch.randn(1, 3, 32, 32)).grad_fn is None
    assert not blocks


@pytest.mark.parametrize("change", ["in place", "loaded", "dtype", "new parameter", "copied"])
def test_packed_weights_follow_the_weights(small: EfficientNet, change: str) -> None:
    """The CPU packs weights once, and again when they change."""
    images = torch.randn(2, 3, 32, 32)
    small.fuse()
    small(images)
    other = evaluated_model(Scaling(width=0.25)).fuse()
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(1.25)
    if change == "in place":
        with torch.no_grad():
            for p in small.parameters():
                p.mul_(1.25)
    elif change == "loaded":
        small.load_state_dict(other.state_dict())
    elif change == "new parameter":
        small.load_state_dict(other.state_dict(), assign=True)
    elif change == "copied":
        small = copy.deepcopy(small)
        small.load_state_dict(other.state_dict())
    else:
        small, other, images = small.bfloat16(), other.bfloat16(), images.bfloat16()
        small.load_state_dict(other.state_dict())
    assert torch.equal(small(images), other(images))


def test_packed_weights_go_with_the_weights(small: EfficientNet) -> None:
    gc.collect()
    before = len(ops.inference._PREPARED)
    small.fuse()(torch.randn(1, 3, 32, 32))
    assert len(ops.inference._PREPARED) == before + 18  # stem, 16 blocks, head
    for module in small.modules():
        module._parameters.clear()
    gc.collect()
    assert len(ops.inference._PREPARED) == before


def test_weights_of_inference_mode_may_change_unseen(small: EfficientNet) -> None:
    images = torch.randn(2, 3, 32, 32)
    with torch.inference_mode():
        fused = copy.deepcopy(small).fuse()
        before = fused(images)
        for p in fused.parameters():
            p.mul_(1.25)
        assert not torch.equal(fused(images), before)


def test_fuse_returns_the_model_and_may_be_repeated(small: EfficientNet) -> None:
    images = torch.randn(2, 3, 32, 32)
    fused = small.fuse()
    assert fused is small
    logits = fused(images)
    assert torch.equal(fused.fuse()(images), logits)
    assert not any(p.requires_grad for p in fused.parameters())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in fused.modules())


def test_state_dict(small: EfficientNet) -> None:
    before = small.state_dict()
    expected = {key for key in before if ".bn." not in key}
    expected |= {key.replace(".bn.bias", ".conv.bias") for key in before if key.endswith(".bn.bias")}
    state = copy.deepcopy(small).fuse().state_dict()
    assert set(state) == expected
    again = create_model(Scaling(width=0.25)).eval().fuse()
    again.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    assert torch.equal(again(images), small.fuse()(images))
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: \"stem.conv.bias\""):
        again.load_state_dict(before)


def test_training_a_fused_model_is_an_error(small: EfficientNet) -> None:
    with pytest.raises(RuntimeError, match=r"^fuse: the model is in training mode, call eval\(\) first$"):
        copy.deepcopy(small).train().fuse()
    frozen = copy.deepcopy(small)
    frozen.stages[3].train()
    with pytest.raises(RuntimeError, match=r"^fuse: "):
        frozen.fuse()
    fused = small.fuse()
    with pytest.raises(RuntimeError, match=r"^train: the model is fused, .+$"):
        fused.train()
    assert not any(module.training for module in fused.eval().modules())


def test_gradients_of_the_images(small: EfficientNet) -> None:
    images = torch.randn(2, 3, 32, 32)
    gradients = []
    for model in (copy.deepcopy(small).double(), small.fuse()):
        leaf = images.to(model.classifier.weight.dtype).requires_grad_()
        model(leaf)[:, 0].sum().backward()
        gradients.append(leaf.grad)
    assert relative_error(gradients[1], gradients[0]) < MODEL_TOLERANCE


@pytest.mark.parametrize("backend", ["auto", "eager"])
@torch.no_grad()
def test_compiles_without_graph_breaks(small: EfficientNet, backend: str) -> None:
    fused, images = small.fuse(), torch.randn(2, 3, 32, 32)
    torch.compiler.reset()
    with use_backend(backend):
        logits = torch.compile(fused, fullgraph=True, backend="aot_eager")(images)
        # the [C] algebra may be reordered
        torch.testing.assert_close(logits, fused(images), rtol=1e-5, atol=1e-5 * logits.abs().max().item())


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("fuse", [False, True])
@torch.no_grad()
def test_export(fuse: bool, backend: str) -> None:
    """B0 in eval mode, exported with any batch size, saved, loaded again."""
    model = evaluated_model("b0", family="paper")
    if fuse:
        model.fuse()
    images = torch.randn(3, 3, 40, 48).contiguous(memory_format=torch.channels_last)
    batch = torch.export.Dim("batch", min=1, max=64)
    with use_backend(backend):
        exported = torch.export.export(model, (images,), dynamic_shapes=({0: batch},))
        expected = {n: model(images[:n]) for n in (1, 3)}
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for n, logits in expected.items():
        # the [C] algebra may be reordered
        torch.testing.assert_close(loaded(images[:n]), logits, rtol=0, atol=1e-5 * logits.abs().max().item())
    passes = {node.target for node in exported.graph.nodes if "effnet_fast" in str(node.target)}
    assert bool(passes) == (backend == "auto")


def folded(
    c_in: int, c_out: int, expanded: int
) -> tuple[Tensor, ops.Convolution, ops.Convolution, ops.SqueezeExcite, ops.Convolution]:
    def convolution(*shape: int) -> ops.Convolution:
        return ops.Convolution(torch.randn(shape), torch.randn(shape[0]))

    reduce, expand = convolution(2, expanded, 1, 1), convolution(expanded, 2, 1, 1)
    x = torch.randn(2, c_in, 4, 4)
    se = ops.SqueezeExcite(*reduce, *expand)
    return x, convolution(expanded, c_in, 1, 1), convolution(expanded, 1, 3, 3), se, convolution(c_out, expanded, 1, 1)


def test_wrong_arguments_are_named() -> None:
    x, expand, depthwise, se, project = folded(8, 16, 24)
    other = folded(8, 16, 32)
    cases = [
        ((x[0], expand, depthwise, se, project), "^x: got shape"),
        ((x[:, :4], expand, depthwise, se, project), "^x: got 4 channels, expand takes 8$"),
        ((x, None, depthwise, se, project), "^x: got 8 channels, depthwise takes 24$"),
        ((x, other[1], depthwise, se, project), "^expand: gives 32 channels, depthwise takes 24$"),
        ((x, expand, depthwise, other[3], project), "^se.w_reduce: takes 32 channels, depthwise gives 24$"),
        ((x, expand, depthwise, se, other[4]), "^project: takes 32 channels, depthwise gives 24$"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            ops.mbconv_folded(*arguments)
    with pytest.raises(ValueError, match=r"^residual: needs stride 1 and 8 output channels$"):
        ops.mbconv_folded(x, expand, depthwise, se, project, residual=True)
    wide = [type(operand)(*(t.double() for t in operand)) for operand in (expand, depthwise, se, project)]
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' can't run this call: dtype is torch\.float64"):
        ops.mbconv_folded(x.double(), *wide)
