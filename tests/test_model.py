import math
from collections.abc import Iterator
from decimal import ROUND_CEILING, Decimal
from functools import partial

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.models.efficientnet import MBConvConfig

from effnet_fast import VARIANTS, EfficientNet, Scaling, create_model
from effnet_fast.scaling import get_variant
from tests.test_interop import randomize_batch_norm

REFERENCE_PARAMETERS = {  # 10 classes
    "baseline": 7_155_658,
    "depth": 35_962_486,
    "width": 28_124_810,
    "resolution": 7_155_658,
    "compound": 20_014_738,
    "b0": 7_155_658,
    "b1": 14_283_594,
    "b2": 20_014_738,
    "b3": 27_556_466,
    "b4": 45_857_698,
    "b5": 60_621_930,
    "b6": 83_038_108,
    "b7": 128_187_310,
}
PAPER_PARAMETERS = {  # 1000 classes
    "b0": 5_288_548,
    "b1": 7_794_184,
    "b2": 9_109_994,
    "b3": 12_233_232,
    "b4": 19_341_616,
    "b5": 30_389_784,
    "b6": 43_040_704,
    "b7": 66_347_960,
}
# Multipliers of width and depth
PAPER_STUDY = {"baseline": (1.0, 1.0), "depth": (1.0, 4.0), "width": (2.0, 1.0), "compound": (1.2, 1.4)}
# Decimals, because 1.2 has no exact binary fraction
REFERENCE_DEPTH = {
    **{"baseline": Decimal(1), "depth": Decimal(4), "width": Decimal(1), "resolution": Decimal(1)},
    **{"compound": Decimal("1.44")},
    **{f"b{phi}": Decimal("1.2") ** phi for phi in range(8)},
}
BASELINE_REPEATS = (1, 2, 2, 3, 3, 4, 1)


def on_meta(variant: str | Scaling, num_classes: int, family: str) -> EfficientNet:
    with torch.device("meta"):
        return create_model(variant, num_classes, family=family)


def torchvision_model(width: float, depth: float) -> nn.Module:
    """torchvision's EfficientNet at any width and depth (it offers b0 to b7 by name only)."""
    row = partial(MBConvConfig, width_mult=width, depth_mult=depth)
    rows = [
        row(1, 3, 1, 32, 16, 1),
        row(6, 3, 2, 16, 24, 2),
        row(6, 5, 2, 24, 40, 2),
        row(6, 3, 2, 40, 80, 3),
        row(6, 5, 1, 80, 112, 3),
        row(6, 5, 2, 112, 192, 4),
        row(6, 3, 1, 192, 320, 1),
    ]
    with torch.device("meta"):
        return torchvision.models.EfficientNet(rows, dropout=0.2)


def parameters(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(("variant", "expected"), REFERENCE_PARAMETERS.items())
def test_parameters_of_the_reference_family(variant: str, expected: int) -> None:
    assert parameters(on_meta(variant, 10, "reference")) == expected


@pytest.mark.parametrize(("variant", "expected"), PAPER_PARAMETERS.items())
def test_parameters_of_the_paper_family(variant: str, expected: int) -> None:
    assert parameters(on_meta(variant, 1000, "paper")) == expected


@pytest.mark.parametrize(("variant", "multipliers"), PAPER_STUDY.items())
def test_parameters_of_the_papers_one_axis_models(variant: str, multipliers: tuple[float, float]) -> None:
    theirs = torchvision_model(*multipliers)
    assert parameters(on_meta(variant, 1000, "paper")) == parameters(theirs)


def test_every_variant_has_an_expected_size() -> None:
    assert set(REFERENCE_PARAMETERS) == set(REFERENCE_DEPTH) == set(VARIANTS)
    # Resolution adds no parameters.
    assert {*PAPER_PARAMETERS, *PAPER_STUDY, "resolution"} == set(VARIANTS)
    assert parameters(on_meta("resolution", 1000, "paper")) == PAPER_PARAMETERS["b0"]


@pytest.mark.parametrize(("variant", "depth"), REFERENCE_DEPTH.items())
def test_blocks_per_stage(variant: str, depth: Decimal) -> None:
    expected = [int((n * depth).to_integral_value(ROUND_CEILING)) for n in BASELINE_REPEATS]
    assert [len(stage) for stage in on_meta(variant, 10, "reference").stages] == expected


@pytest.mark.parametrize(
    ("variant", "blocks"), [("baseline", 16), ("depth", 64), ("width", 16), ("resolution", 16), ("compound", 26)]
)
def test_blocks_of_the_study(variant: str, blocks: int) -> None:
    assert len(list(mbconvs(on_meta(variant, 10, "reference")))) == blocks


def mbconvs(model: EfficientNet) -> Iterator[nn.Module]:
    for stage in model.stages:
        yield from stage


@pytest.mark.parametrize("variant", ["b0", "b3", "b7"])
def test_drop_path_rates_are_torchvisions(variant: str) -> None:
    with torch.device("meta"):
        theirs = getattr(torchvision.models, f"efficientnet_{variant}")()
    rates = [m.p for m in theirs.modules() if isinstance(m, torchvision.ops.StochasticDepth)]
    ours = on_meta(variant, 1000, "paper")
    assert [block.drop_path_rate for block in mbconvs(ours)] == pytest.approx(rates, rel=1e-12)
    assert ours.dropout.p == theirs.classifier[0].p


@pytest.mark.parametrize("variant", VARIANTS)
def test_drop_path_rate_grows_linearly_from_zero(variant: str) -> None:
    model = on_meta(variant, 10, "reference")
    rates = [block.drop_path_rate for block in mbconvs(model)]
    preset = get_variant(variant, "reference")
    assert rates == pytest.approx([preset.drop_path_rate * i / len(rates) for i in range(len(rates))])
    assert rates[0] == 0
    assert model.dropout.p == preset.drop_rate


def test_rates_can_be_given() -> None:
    model = create_model(Scaling(width=0.25), drop_rate=0.1, drop_path_rate=0.8)
    assert model.dropout.p == 0.1
    assert [block.drop_path_rate for block in mbconvs(model)] == pytest.approx([0.05 * i for i in range(16)])


@torch.no_grad()
def test_drop_path_drops_examples_in_training_only() -> None:
    torch.manual_seed(0)
    # The 15th of 16 blocks, with a residual: its rate is 0.8 * 14 / 16.
    rate = 0.7
    dropping = create_model(Scaling(width=0.25), drop_path_rate=0.8)
    keeping = create_model(Scaling(width=0.25), drop_path_rate=0.0)
    keeping.load_state_dict(dropping.state_dict())
    block, full = dropping.stages[5][3], keeping.stages[5][3]
    n = 10000
    x = torch.randn(n, block.project.conv.weight.shape[0], 2, 1)

    branch = full(x) - x
    dropped = block(x) - x
    kept = dropped.flatten(1).abs().amax(1) > 0
    # The difference out - x is rounded at the scale of out, about 1e1, before the branch is compared.
    torch.testing.assert_close(dropped[kept], branch[kept] / (1 - rate), rtol=0, atol=1e-5)
    # Six standard deviations of a binomial count
    assert abs(int(kept.sum()) - n * (1 - rate)) < 6 * math.sqrt(n * rate * (1 - rate))
    assert not torch.equal(block(x) - x, dropped)

    keeping.load_state_dict(dropping.state_dict())
    torch.testing.assert_close(block.eval()(x), full.eval()(x), rtol=0, atol=0)


@torch.no_grad()
def test_first_block_is_never_dropped() -> None:
    torch.manual_seed(0)
    model = create_model(Scaling(width=0.5, depth=2), drop_path_rate=0.99)
    first, x = model.stages[0][0], torch.randn(64, 16, 4, 4)
    torch.testing.assert_close(first(x), first(x), rtol=0, atol=0)


def test_fan_out_init_is_torchvisions() -> None:
    torch.manual_seed(0)
    ours = create_model("b0", 1000, family="paper").state_dict()
    theirs = torchvision.models.efficientnet_b0().state_dict()
    for mine, other in zip(ours.values(), theirs.values(), strict=True):
        assert mine.shape == other.shape
        if mine.dim() < 2:  # biases and BatchNorms start as constants
            torch.testing.assert_close(mine, other, rtol=0, atol=0)
        elif mine.numel() >= 1000:
            # Six standard deviations of the difference of two means, and of two normal standard deviations
            n, std = mine.numel(), other.std().item()
            assert mine.mean().item() == pytest.approx(other.mean().item(), abs=6 * std * math.sqrt(2 / n))
            assert mine.std().item() == pytest.approx(std, rel=6 / math.sqrt(n))


def test_torch_init_is_torchs_default() -> None:
    torch.manual_seed(0)
    model = create_model("b0", 1000)
    layers = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear) and m.weight.numel() >= 1000]
    assert layers
    for layer in layers:
        # Uniform within +-1/sqrt(fan in), biases too
        bound = layer.weight[0].numel() ** -0.5
        assert 0.99 * bound < layer.weight.abs().max() <= bound
        # Six standard deviations of a uniform distribution's standard deviation, which is 1/sqrt(5n) of it
        tolerance = 6 / math.sqrt(5 * layer.weight.numel())
        assert layer.weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=tolerance)
        if layer.bias is not None:
            assert 0 < layer.bias.abs().max() <= bound


def test_init_can_be_given() -> None:
    torch.manual_seed(0)
    assert create_model("b0", 1000, init="fan_out").classifier.bias.abs().max() == 0
    assert create_model("b0", 1000, family="paper", init="torch").classifier.bias.abs().max() > 0


@torch.no_grad()
def small_model(*, in_chans: int = 3, **arguments: object) -> EfficientNet:
    """A narrow model in evaluation, with the BatchNorm statistics of random images: the signal would die out else."""
    torch.manual_seed(0)
    model = create_model(Scaling(width=0.25), in_chans=in_chans, bn_momentum=1.0, **arguments)
    model(torch.randn(8, in_chans, 64, 64))
    return model.eval()


@pytest.mark.parametrize("pad_type", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(33, 33), (1, 1), (64, 32), (47, 130), (2, 95)])
@torch.no_grad()
def test_features_shape_on_odd_inputs(size: tuple[int, int], pad_type: str) -> None:
    model = small_model(pad_type=pad_type)
    features = model.forward_features(torch.randn(2, 3, *size))
    height, width = size
    for _ in range(5):
        height, width = math.ceil(height / 2), math.ceil(width / 2)
    assert features.shape == (2, model.num_features, height, width)
    assert model.num_features == 320
    assert features.isfinite().all()


@torch.no_grad()
def test_logits_are_the_classifier_of_the_mean_features() -> None:
    model = small_model(num_classes=4)
    x = torch.randn(3, 3, 70, 45)
    pooled = F.adaptive_avg_pool2d(model.forward_features(x), 1).flatten(1)
    expected = pooled @ model.classifier.weight.T + model.classifier.bias
    # one rounding order against another, in float32 at a scale of 1
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_example_does_not_depend_on_its_batch_in_eval() -> None:
    model = small_model()
    x = torch.randn(3, 3, 33, 40)
    one_by_one = torch.cat([model(image[None]) for image in x])
    # a kernel may sum in another order at another batch size
    torch.testing.assert_close(model(x), one_by_one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("num_classes", "in_chans"), [(1, 3), (3, 1), (5, 7)])
def test_classes_and_channels(num_classes: int, in_chans: int) -> None:
    model = small_model(num_classes=num_classes, in_chans=in_chans)
    logits = model(torch.randn(2, in_chans, 32, 32))
    assert logits.shape == (2, num_classes)
    logits.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def convolve(x: Tensor, weight: Tensor, stride: int, same: bool) -> Tensor:
    """A depthwise convolution as sums over windows, padded by the definition of SAME or by half the kernel."""
    kernel = weight.shape[-1]
    pads = []
    for size in (x.shape[3], x.shape[2]):
        if same:
            outputs = math.ceil(size / stride)
            total = max(0, (outputs - 1) * stride + kernel - size)
            pads += [total // 2, total - total // 2]
        else:
            pads += [kernel // 2, kernel // 2]
    windows = F.pad(x, pads).unfold(2, kernel, stride).unfold(3, kernel, stride)
    return torch.einsum("nchwij,cij->nchw", windows, weight[:, 0])


def mbconv(x: Tensor, state: dict[str, Tensor], stride: int, same: bool, eps: float) -> Tensor:
    """An MBConv block in evaluation, from its state dict, in float64."""

    def norm(y: Tensor, part: str) -> Tensor:
        mean, var, weight, bias = (
            state[f"{part}.bn.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        return (y - mean) / (var + eps).sqrt() * weight + bias

    def pointwise(y: Tensor, name: str) -> Tensor:
        return torch.einsum("nchw,oc->nohw", y, state[name][:, :, 0, 0])

    def silu(y: Tensor) -> Tensor:
        return y / (1 + (-y).exp())

    y = x
    if "expand.conv.weight" in state:
        y = silu(norm(pointwise(y, "expand.conv.weight"), "expand"))
    y = silu(norm(convolve(y, state["depthwise.conv.weight"], stride, same), "depthwise"))
    squeezed = silu(
        pointwise(y.mean((2, 3), keepdim=True), "se.reduce.weight") + state["se.reduce.bias"][:, None, None]
    )
    y = y * (pointwise(squeezed, "se.expand.weight") + state["se.expand.bias"][:, None, None]).sigmoid()
    y = norm(pointwise(y, "project.conv.weight"), "project")
    return x + y if x.shape == y.shape and stride == 1 else y


@pytest.mark.parametrize("pad_type", ["symmetric", "same"])
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (1, 1), (5, 2)])
@pytest.mark.parametrize(
    ("stage", "block", "stride"),
    [(0, 0, 1), (1, 0, 2), (1, 1, 1), (2, 0, 2), (2, 1, 1), (6, 0, 1)],
    ids=["k3_no_expand", "k3_stride2", "k3_residual", "k5_stride2", "k5_residual", "k3_widening"],
)
@torch.no_grad()
def test_block_matches_its_definition(
    stage: int, block: int, stride: int, size: tuple[int, int], pad_type: str
) -> None:
    model = small_model(pad_type=pad_type, bn_eps=0.01)
    for name, tensor in model.state_dict().items():
        if name.endswith(("running_mean", "bn.bias")):
            tensor.normal_(0, 0.5)
        elif name.endswith(("running_var", "bn.weight")):
            tensor.uniform_(0.3, 2)
    module = model.stages[stage][block]
    state = {key: tensor.double() for key, tensor in module.state_dict().items()}
    first = state.get("expand.conv.weight", state["depthwise.conv.weight"])
    channels = first.shape[1] if "expand.conv.weight" in state else first.shape[0]
    x = torch.randn(3, channels, *size)
    expected = mbconv(x.double(), state, stride, pad_type == "same", eps=0.01)
    # float32 against float64 at a scale of 1: sums of at most 300 terms
    torch.testing.assert_close(module(x).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "b8"}, r"^variant: got 'b8', choose from baseline, [\w, ]+$"),
        ({"family": "ours"}, r"^family: got 'ours', choose from reference, paper$"),
        ({"num_classes": 0}, r"^num_classes: got 0, must be at least 1$"),
        ({"in_chans": 0}, r"^in_chans: got 0, must be at least 1$"),
        ({"strides": (2, 1, 2)}, r"^strides: got 2,1,2, must be eight of 1 or 2, of the stem and the seven stages$"),
        ({"strides": (2, 1, 2, 2, 3, 1, 2, 1)}, r"^strides: got 2,1,2,2,3,1,2,1, must be eight of 1 or 2"),
        ({"drop_rate": 1.0}, r"^drop_rate: got 1.0, must be in \[0, 1\)$"),
        ({"drop_rate": -0.1}, r"^drop_rate: got -0.1, must be in \[0, 1\)$"),
        ({"drop_path_rate": math.nan}, r"^drop_path_rate: got nan, must be in \[0, 1\)$"),
        ({"bn_eps": 0}, r"^bn_eps: got 0, must be positive$"),
        ({"bn_momentum": 1.5}, r"^bn_momentum: got 1.5, must be in \(0, 1\]$"),
        ({"pad_type": "valid"}, r"^pad_type: got 'valid', choose from symmetric, same$"),
        ({"init": "xavier"}, r"^init: got 'xavier', choose from torch, fan_out$"),
    ],
)
def test_wrong_arguments(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model(**{"variant": "b0", **arguments})


def test_memory_policies_keep_less_and_change_nothing() -> None:
    """B0 at 64 px in bfloat16: bytes kept for backward and gradients, all parts together."""
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    kept, gradients = {}, {}
    for memory in ("fast", "lean", "min"):
        torch.manual_seed(0)
        model = create_model("b0", family="paper", drop_rate=0, memory=memory)  # drop path stays on
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        saved: dict[int, Tensor] = {}

        def pack(tensor: Tensor, known: set[int] = known, saved: dict[int, Tensor] = saved) -> Tensor:
            if tensor.untyped_storage().data_ptr() not in known:
                saved[tensor.untyped_storage().data_ptr()] = tensor
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t), torch.autocast("cpu", torch.bfloat16):
            loss = model(images).square().sum()
        kept[memory] = sum(tensor.untyped_storage().nbytes() for tensor in saved.values())
        loss.backward()
        gradients[memory] = [p.grad for p in model.parameters()]
    assert kept["lean"] < 0.7 * kept["fast"]  # without the expanded tensors
    assert kept["min"] < 0.5 * kept["lean"]  # inputs of the parts, and statistics
    for memory in ("lean", "min"):
        assert all(torch.equal(a, b) for a, b in zip(gradients["fast"], gradients[memory], strict=True))


# Weights and activations are rounded (2^-9, 2^-12) in each of 49 convolutions.
@pytest.mark.parametrize(("dtype", "limit"), [(torch.bfloat16, 0.2), (torch.float16, 0.03)], ids=str)
def test_a_model_of_16_bit_parameters(dtype: torch.dtype, limit: float) -> None:
    """Converted as a whole rather than under autocast: BatchNorm's statistics too."""
    torch.manual_seed(0)
    model = create_model("b0", family="paper").eval()
    images = torch.randn(4, 3, 64, 64)
    with torch.no_grad():
        randomize_batch_norm(model, images)
        expected = model(images)
        logits = model.to(dtype)(images.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - expected).norm() < limit * expected.norm()


@pytest.mark.parametrize(
    ("policies", "segments", "message"),
    [
        (18, (), "^policies: got 18, must be 17"),
        (17, [(0, 3), (2, 5)], r"^segments: got \[\(0, 3\), \(2, 5\)\], must be \[begin, end\) in ascending order"),
        (17, [(0, 17)], "^segments: got"),
        (17, [(3, 3)], "^segments: got"),
        (17, [(-1, 3)], "^segments: got"),
    ],
)
def test_wrong_assignments_of_memory(policies: int, segments: list[tuple[int, int]], message: str) -> None:
    model = create_model("b0")
    with pytest.raises(ValueError, match=message):
        model.set_memory(["min"] * policies, segments)
    assert model.stem.memory == "fast"  # as it was


def test_unknown_memory_policy() -> None:
    with pytest.raises(ValueError, match="memory: got 'most', choose from fast, lean, min"):
        create_model("b0", memory="most")
