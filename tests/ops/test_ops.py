"""Every op against its eager twin in float64: values, all gradients, running statistics; compilers; errors."""

import copy
import functools
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from effnet_fast import ops
from effnet_fast.passes import backend
from effnet_fast.passes.backend import cpu_isa, use_backend

# Relative to the norm of the float64 result. float32: some hundred roundings of 6e-8. bfloat16: activations are rounded
# (2^-9) some six times on the way to a gradient, and BatchNorm's bias gradients are sums that nearly cancel.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


@dataclass
class Block:
    """A random MBConv block's parameters, and the ops called with them."""

    norms: nn.ModuleList
    weights: nn.ParameterDict
    stride: int
    same: bool

    @classmethod
    def make(cls, c_in: int, c_out: int, expanded: int, kernel: int, stride: int, same: bool) -> "Block":
        torch.manual_seed(c_in + kernel + stride)
        norms = nn.ModuleList(nn.BatchNorm2d(c, eps=1e-3) for c in (expanded, expanded, c_out))
        for bn in norms:
            nn.init.uniform_(bn.weight, 0.5, 1.5)
            nn.init.normal_(bn.bias, std=0.3)
            bn.running_mean.normal_()
            bn.running_var.uniform_(0.5, 2)
        shapes = {
            "expand": (expanded, c_in, 1, 1),
            "depthwise": (expanded, 1, kernel, kernel),
            "se_reduce": (5, expanded, 1, 1),
            "se_reduce_bias": (5,),
            "se_expand": (expanded, 5, 1, 1),
            "se_expand_bias": (expanded,),
            "project": (c_out, expanded, 1, 1),
            "dense": (c_out, c_in, kernel, kernel),
            "stem": (expanded, 3, 3, 3),
        }
        weights = nn.ParameterDict({name: nn.Parameter(0.4 * torch.randn(s)) for name, s in shapes.items()})
        return cls(norms, weights, stride, same)

    def double(self) -> "Block":
        return Block(copy.deepcopy(self.norms).double(), copy.deepcopy(self.weights).double(), self.stride, self.same)

    def train(self, mode: bool) -> None:
        self.norms.train(mode)

    def se(self) -> ops.SqueezeExcite:
        w = self.weights
        return ops.SqueezeExcite(w["se_reduce"], w["se_reduce_bias"], w["se_expand"], w["se_expand_bias"])

    def bn(self, i: int) -> ops.BatchNorm:
        return ops.BatchNorm.of(self.norms[i])

    def window(self) -> dict[str, int | bool]:
        return {"stride": self.stride, "same": self.same}


def call_mbconv(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    residual = block.stride == 1 and block.weights["project"].shape[0] == x.shape[1]
    scale = torch.tensor([0.0, 2.0, 1.25][: len(x)]) if residual else None
    w = block.weights
    return op(
        x, w["expand"], block.bn(0), w["depthwise"], block.bn(1), block.se(), w["project"], block.bn(2),
        residual=residual, branch_scale=scale, **block.window(),
    )  # fmt: skip


def call_mbconv_unexpanded(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    w = block.weights
    residual = block.stride == 1 and w["project"].shape[0] == x.shape[1]
    return op(
        x, None, None, w["depthwise"], block.bn(1), block.se(), w["project"], block.bn(2), residual=residual,
        **block.window(),
    )  # fmt: skip


def call_mbconv_stem(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    w = block.weights
    return op(
        x[:, :3], w["stem"], block.bn(0), w["depthwise"], block.bn(1), block.se(), w["project"], block.bn(2),
        expand_stride=2, branch_scale=torch.tensor([0.5, 2.0, 0.0][: len(x)]), **block.window(),
    )  # fmt: skip


def mbconv_stem_eager(
    x: Tensor, w_stem: Tensor, bn1: ops.BatchNorm, *operands: object, expand_stride: int, same: bool, **others: object
) -> Tensor:
    e = ops.conv_bn_act_eager(x, w_stem, bn1, stride=expand_stride, same=same)
    return ops.mbconv_eager(e, None, None, *operands, same=same, **others)


def call_section(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.bn(0), block.weights["depthwise"], block.bn(1), block.se(), **block.window())


def call_dwconv(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.weights["depthwise"], block.bn(1), **block.window())


def call_conv(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.weights["dense"], block.bn(2), **block.window())


def call_pointwise(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.weights["expand"], block.bn(0), silu=False)


def call_bn_act(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.bn(0), residual=x.detach() * 0.5, branch_scale=torch.tensor([2.0, 0.0, 0.5][: len(x)]))


def call_bn(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, block.bn(0), silu=False)


def call_se(op: Callable[..., Tensor], block: Block, x: Tensor) -> Tensor:
    return op(x, *block.se())


# name, op, twin, call, whether x has the block's input channels rather than the expanded ones
OPS = {
    "mbconv": (ops.mbconv, ops.mbconv_eager, call_mbconv, True),
    "mbconv_unexpanded": (ops.mbconv, ops.mbconv_eager, call_mbconv_unexpanded, False),
    "mbconv_stem": (ops.mbconv, mbconv_stem_eager, call_mbconv_stem, True),
    "mbconv_section": (ops.mbconv_section, ops.mbconv_section_eager, call_section, False),
    "dwconv_bn_silu": (ops.dwconv_bn_silu, ops.dwconv_bn_silu_eager, call_dwconv, False),
    "conv_bn_act": (ops.conv_bn_act, ops.conv_bn_act_eager, call_conv, True),
    "conv_bn_act_pointwise": (ops.conv_bn_act, ops.conv_bn_act_eager, call_pointwise, True),
    "bn_act": (ops.bn_act, ops.bn_act_eager, call_bn_act, False),
    "bn": (ops.bn_act, ops.bn_act_eager, call_bn, False),
    "squeeze_excite": (ops.squeeze_excite, ops.squeeze_excite_eager, call_se, False),
}
# c_in, c_out, expanded, kernel, stride, SAME, H, W, N
CASES = (
    (16, 16, 48, 3, 1, False, 9, 7, 3),
    (24, 40, 144, 5, 2, False, 8, 11, 2),
    (8, 8, 40, 3, 2, True, 10, 6, 3),
    (8, 16, 8, 7, 1, True, 5, 5, 3),
    (16, 16, 24, 5, 1, False, 4, 4, 1),
)


_mbconv = sys.modules["effnet_fast.ops.mbconv"]  # whose name in the package is the function's
sweeps_where_faster = _mbconv._sweeps


def sample(case: Sequence[int], uses_input: bool) -> tuple[Block, Tensor]:
    c_in, c_out, expanded, kernel, stride, same, h, w, n = case
    block = Block.make(c_in, c_out, expanded, kernel, stride, bool(same))
    x = torch.randn(n, c_in if uses_input else expanded, h, w, generator=torch.Generator().manual_seed(1))
    return block, x


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm().clamp_min(1e-6)).item()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_training_equals_the_twin(name: str, case: Sequence[int], dtype: torch.dtype) -> None:
    op, twin, call, uses_input = OPS[name]
    block, x = sample(case, uses_input)
    wide = block.double()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out, out64 = call(op, block, x), call(twin, wide, x64)
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    grad = torch.randn_like(out64)
    out.backward(grad.to(dtype))
    out64.backward(grad.to(dtype).double())
    limit = TOLERANCE[dtype]
    assert relative_error(out, out64) < limit
    assert relative_error(x.grad, x64.grad) < limit
    for (key, parameter), expected in zip(block.weights.items(), wide.weights.values(), strict=True):
        if expected.grad is not None:
            assert relative_error(parameter.grad, expected.grad) < limit, key
    for i, (bn, expected_bn) in enumerate(zip(block.norms, wide.norms, strict=True)):
        if expected_bn.weight.grad is not None:
            assert relative_error(bn.weight.grad, expected_bn.weight.grad) < limit, f"bn{i + 1}.weight"
            assert relative_error(bn.bias.grad, expected_bn.bias.grad) < 2 * limit, f"bn{i + 1}.bias"
        assert relative_error(bn.running_mean, expected_bn.running_mean) < limit
        assert relative_error(bn.running_var, expected_bn.running_var) < limit
        assert bn.num_batches_tracked == expected_bn.num_batches_tracked


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(2, 4),
    channels=st.integers(1, 9).map(lambda i: 8 * i),
    height=st.integers(1, 12),
    width=st.integers(1, 40),
    kernel=st.sampled_from([3, 5, 7]),
    stride=st.sampled_from([1, 2]),
    same=st.booleans(),
)
def test_any_shape_in_training(
    n: int, channels: int, height: int, width: int, kernel: int, stride: int, same: bool
) -> None:
    block = Block.make(8, 8, channels, kernel, stride, same)
    wide = block.double()
    x = torch.randn(
        n, channels, height, width, generator=torch.Generator().manual_seed(height * width)
    ).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out = call_section(ops.mbconv_section, block, x)
    out64 = call_section(ops.mbconv_section_eager, wide, x64)
    # Two or three values a channel can lie close together: BatchNorm then divides rounding errors by their distance.
    limit = 1e-5 if out64.numel() // channels > 8 else 1e-3
    assert relative_error(out, out64) < limit
    grad = torch.randn_like(out64)
    out.backward(grad.float())
    out64.backward(grad.float().double())
    assert relative_error(x.grad, x64.grad) < 10 * limit
    assert relative_error(block.weights["depthwise"].grad, wide.weights["depthwise"].grad) < 10 * limit


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_inference_equals_the_twin(name: str, case: Sequence[int], dtype: torch.dtype, autocast: bool) -> None:
    op, twin, call, uses_input = OPS[name]
    block, x = sample(case, uses_input)
    block.train(False)
    expected = call(twin, block.double(), x.to(dtype).double())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        out = call(op, block, x.to(dtype))
    assert out.dtype == (torch.bfloat16 if autocast else dtype)
    assert relative_error(out, expected) < TOLERANCE[out.dtype]


@pytest.mark.parametrize("name", OPS)
def test_gradients_in_eval_mode(name: str) -> None:
    """Fine-tuning with frozen statistics: the twin runs, the result is the same as in float64."""
    op, twin, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    block.train(False)
    wide, x64 = block.double(), x.double().requires_grad_()
    x.requires_grad_()
    call(op, block, x).sum().backward()
    call(twin, wide, x64).sum().backward()
    assert relative_error(x.grad, x64.grad) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
def test_any_memory_format_of_input_and_gradient(name: str, layout: str) -> None:
    op, _, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    out = call(op, block, x)
    grad = torch.randn(out.shape)
    expected = torch.autograd.grad(out, x, grad.contiguous(memory_format=torch.channels_last))[0]
    if layout == "contiguous":
        other, other_grad = x.detach().contiguous(), grad.contiguous()
    elif layout == "sliced":
        other, other_grad = torch.stack([x.detach()] * 2, -1)[..., 1], torch.stack([grad] * 2, -1)[..., 0]
    else:
        other = x.detach().transpose(2, 3).contiguous().transpose(2, 3)
        other_grad = grad.transpose(0, 1).contiguous().transpose(0, 1)
    other.requires_grad_()
    again = call(op, block, other)
    torch.testing.assert_close(again, out, rtol=0, atol=0)
    actual = torch.autograd.grad(again, other, other_grad)[0]
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("memory", ["lean", "min"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("name", ["mbconv", "mbconv_unexpanded", "mbconv_stem", "conv_bn_act", "conv_bn_act_pointwise"])
def test_memory_policies_give_the_same_gradients(
    name: str, case: Sequence[int], dtype: torch.dtype, memory: str
) -> None:
    """Bit for bit, and the running statistics are moved once."""
    op, _, call, uses_input = OPS[name]

    def train(memory: str) -> tuple[list[Tensor], int]:
        block, x = sample(case, uses_input)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        kept: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t.nbytes), t)[1], lambda t: t):
            out = call(functools.partial(op, memory=memory), block, x)
        out.square().sum().backward()
        grads = [p.grad for p in (*block.weights.values(), *block.norms.parameters()) if p.grad is not None]
        return [out, x.grad, *grads, *block.norms.buffers()], sum(kept)

    (expected, all_bytes), (actual, fewer_bytes) = train("fast"), train(memory)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    saves = memory == "min" or (name.startswith("mbconv") and _mbconv._sweeps is sweeps_where_faster)
    assert fewer_bytes < all_bytes if saves else fewer_bytes == all_bytes


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("case", [*CASES, (16, 16, 16, 3, 1, False, 6, 5, 2)], ids=str)
@pytest.mark.parametrize("name", ["mbconv", "mbconv_unexpanded", "mbconv_stem"])
def test_a_block_in_one_call_equals_its_passes(
    name: str, case: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit: the CPU's whole block, and the same passes called one by one, as on other backends."""
    assert torch.ops.effnet_fast.block_forward.default is backend._PASSES.cpu.block_forward

    def train() -> list[Tensor]:
        op, _, call, uses_input = OPS[name]
        block, x = sample(case, uses_input)
        x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
        out = call(op, block, x)
        out.square().sum().backward()
        grads = [p.grad for p in (*block.weights.values(), *block.norms.parameters()) if p.grad is not None]
        return [out, x.grad, *grads, *block.norms.buffers()]

    whole = train()
    monkeypatch.setattr(backend._PASSES.cpu, "block_forward", None)
    assert all(torch.equal(a, b) for a, b in zip(whole, train(), strict=True))


def test_an_expanded_gradient() -> None:
    """The gradient of a mean is one number, expanded: it has to be laid out before a kernel reads it."""
    block, x = sample(CASES[0], False)
    x.requires_grad_()
    x64 = x.detach().double().requires_grad_()
    wide = block.double()
    call_section(ops.mbconv_section, block, x).mean().backward()
    call_section(ops.mbconv_section_eager, wide, x64).mean().backward()
    assert relative_error(x.grad, x64.grad) < 1e-4  # the gradient of a mean through a BatchNorm nearly cancels


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("channels", "kernel", "stride", "same"), [(3, 3, 2, False), (1, 3, 2, True), (5, 5, 1, True)])
def test_convolution_of_an_image(channels: int, kernel: int, stride: int, same: bool, dtype: torch.dtype) -> None:
    """Few channels, whose number is no multiple of 8, and a gradient of the image itself."""
    block = Block.make(channels, 24, 8, kernel, stride, same)
    wide = block.double()
    x = torch.randn(2, channels, 13, 10, generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out, out64 = call_conv(ops.conv_bn_act, block, x), call_conv(ops.conv_bn_act_eager, wide, x64)
    grad = torch.randn_like(out64)
    out.backward(grad.to(dtype))
    out64.backward(grad.to(dtype).double())
    for actual, expected in (
        (out, out64),
        (x.grad, x64.grad),
        (block.weights["dense"].grad, wide.weights["dense"].grad),
        (block.norms[2].running_var, wide.norms[2].running_var),
    ):
        assert relative_error(actual, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    "name", ["mbconv", "mbconv_stem", "mbconv_section", "dwconv_bn_silu", "conv_bn_act", "bn_act", "squeeze_excite"]
)
def test_gradcheck_of_the_algebra_in_float64(name: str) -> None:
    """The custom ops take float64 through the reference passes, so finite differences check the algebra itself."""
    uses_input = OPS[name][3]
    block, x = sample((8, 8, 8, 3, 1, 0, 3, 2, 2), uses_input)
    block = block.double()
    inner = {
        "mbconv": torch.ops.effnet_fast.mbconv,
        "mbconv_stem": torch.ops.effnet_fast.mbconv,
        "mbconv_section": torch.ops.effnet_fast.mbconv_section,
        "dwconv_bn_silu": torch.ops.effnet_fast.mbconv_section,
        "conv_bn_act": torch.ops.effnet_fast.conv_bn_act,
        "bn_act": torch.ops.effnet_fast.bn_act,
        "squeeze_excite": torch.ops.effnet_fast.squeeze_excite,
    }[name]
    w = {key: value.detach() for key, value in block.weights.items()}
    norms = [(bn.weight.detach(), bn.bias.detach(), bn.eps) for bn in block.norms]
    se = (w["se_reduce"], w["se_reduce_bias"], w["se_expand"], w["se_expand_bias"])
    scale = torch.tensor([0.5, 2.0], dtype=torch.float64)
    block_args = (*norms[0], w["depthwise"], *norms[1], *se, w["project"], *norms[2])
    args = {
        "mbconv": (w["expand"], *block_args, scale, 1, 1, False, True, "fast", ""),
        "mbconv_stem": (w["stem"], *block_args, None, 2, 1, False, False, "lean", ""),
        "mbconv_section": (*norms[0], w["depthwise"], *norms[1], *se, 1, False),
        "dwconv_bn_silu": (None, None, 0.0, w["depthwise"], *norms[1], None, None, None, None, 1, False),
        "conv_bn_act": (w["dense"], *norms[2], 2, False, True, "", "min"),
        "bn_act": (*norms[0], True, torch.randn(x.shape, dtype=torch.float64), scale, ""),
        "squeeze_excite": se,
    }[name]
    leaves = [x[:, : 3 if name == "mbconv_stem" else 8].double().requires_grad_()]
    leaves += [a.clone().requires_grad_() if isinstance(a, Tensor) and a is not scale else a for a in args]
    assert torch.autograd.gradcheck(lambda *a: inner(*a)[0], leaves, eps=1e-6, atol=1e-5, nondet_tol=0)


class TestSwept:
    """Blocks that never store the expanded tensor, whether they would here or not: the same tests."""

    @pytest.fixture(autouse=True)
    def _sweep(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(_mbconv, "_sweeps", lambda x, w_expand, group: _mbconv._is_pointwise(w_expand))

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_training_equals_the_twin(self, case: Sequence[int], dtype: torch.dtype) -> None:
        test_training_equals_the_twin("mbconv", case, dtype)

    @pytest.mark.parametrize("memory", ["lean", "min"])
    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_policies_give_the_same_gradients(self, case: Sequence[int], dtype: torch.dtype, memory: str) -> None:
        test_memory_policies_give_the_same_gradients("mbconv", case, dtype, memory)

    @pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
    @pytest.mark.parametrize("case", CASES, ids=str)
    def test_one_call_equals_the_passes(
        self, case: Sequence[int], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        test_a_block_in_one_call_equals_its_passes("mbconv", case, dtype, monkeypatch)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_opcheck(self, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
        test_opcheck("mbconv", dtype, monkeypatch)

    def test_gradcheck(self) -> None:
        test_gradcheck_of_the_algebra_in_float64("mbconv")


@pytest.mark.parametrize(
    ("dtype", "pixels", "images", "kernel", "group", "swept"),
    [
        (torch.bfloat16, 28, 64, 1, "", True),
        (torch.float32, 28, 64, 1, "", False),
        (torch.bfloat16, 27, 64, 1, "", False),
        (torch.bfloat16, 28, 0, 1, "", False),  # fewer than threads
        (torch.bfloat16, 28, 64, 3, "", False),
        (torch.bfloat16, 28, 64, 1, "0", False),
    ],
)
def test_which_blocks_are_swept(
    dtype: torch.dtype, pixels: int, images: int, kernel: int, group: str, swept: bool
) -> None:
    x = torch.empty(images, 8, pixels, pixels, dtype=dtype)
    assert _mbconv._sweeps(x, torch.empty(48, 8, kernel, kernel), group) == (swept and cpu_isa() == "amx")


@pytest.mark.parametrize("name", OPS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own checks of the custom op under each public function, with the arguments it really gets."""
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)  # so that the op is called, not its functions
    op, _, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    calls = []

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func.namespace == "effnet_fast":
                calls.append((func, args))
            return func(*args, **(kwargs or {}))

    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    with Record():
        call(op, block, x)
    func, args = calls[0]
    args = tuple(a.detach().requires_grad_(a.requires_grad) if isinstance(a, Tensor) else a for a in args)
    torch.library.opcheck(func, args)


def test_weight_gradients_lie_as_compilers_are_told() -> None:
    """Also where the weight is channels_last, as in a model that is."""
    weight = torch.randn(8, 3, 3, 3).contiguous(memory_format=torch.channels_last)
    x, dout = (torch.randn(2, c, 6, 6).contiguous(memory_format=torch.channels_last) for c in (3, 8))
    args = (dout, x, dout, torch.rand(5, 8), weight, 1, False, True, "", True)
    real = torch.ops.effnet_fast.conv_bn_act_backward(*args)
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
        fake = torch.ops.effnet_fast.conv_bn_act_backward(*fakes)
    assert [t.stride() for t in real] == [t.stride() for t in fake]


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("name", OPS)
def test_compiles_without_graph_breaks(name: str, training: bool) -> None:
    op, _, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    block.train(training)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward(x: Tensor) -> Tensor:
        return call(op, block, x)

    torch.compiler.reset()
    compiled = torch.compile(forward, fullgraph=True, backend="aot_eager")
    with torch.set_grad_enabled(training):
        expected = forward(x.clone().requires_grad_(training))
        out = compiled(x.clone().requires_grad_(training))
    torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the [C] algebra may be reordered
    if training:
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        for function, leaf in zip((forward, compiled), inputs, strict=True):
            function(leaf).square().sum().backward()
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPS)
def test_double_backward_is_refused(name: str) -> None:
    op, _, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    x.requires_grad_()
    (grad,) = torch.autograd.grad(call(op, block, x).sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward is not supported"):
        grad.sum().backward()


@pytest.mark.parametrize("name", OPS)
def test_no_examples(name: str) -> None:
    op, _, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    block.train(False)
    with torch.no_grad():
        assert call(op, block, x[:0]).shape[0] == 0


@pytest.mark.parametrize("name", OPS)
def test_backends_by_name(name: str) -> None:
    op, twin, call, uses_input = OPS[name]
    block, x = sample(CASES[0], uses_input)
    block.train(False)
    with torch.no_grad(), use_backend("eager"):
        assert torch.equal(call(op, block, x), call(twin, block, x.contiguous(memory_format=torch.channels_last)))
    with use_backend("cpu"), pytest.raises(RuntimeError, match=r"'cpu' can't run this call: dtype is torch\.float64"):
        call(op, block.double(), x.double())


WRONG: list[tuple[Callable[[Block, Tensor], Tensor], str]] = [
    (lambda b, x: ops.bn_act(x[0], b.bn(0)), "y: got shape"),
    (lambda b, x: ops.bn_act(x[:, :8], b.bn(0)), "bn: got 48 channels, must be for 8"),
    (lambda b, x: ops.bn_act(x, b.bn(0), residual=x[:1]), "residual: got shape"),
    (
        lambda b, x: ops.conv_bn_act(x, b.weights["dense"], b.bn(2)),
        r"weight: got shape .*, must be \[C_out, 48, k, k\]",
    ),
    (lambda b, x: ops.dwconv_bn_silu(x[:, :8], b.weights["depthwise"], b.bn(1)), "x: got 8 channels, weight takes 48"),
    (lambda b, x: ops.dwconv_bn_silu(x, b.weights["project"], b.bn(1)), "weight: got shape"),
    (lambda b, x: ops.mbconv_section(x[0], b.bn(0), b.weights["depthwise"], b.bn(1), b.se()), "e: got shape"),
    (lambda b, x: ops.squeeze_excite(x[:, :8], *b.se()), "x: got 8 channels, w_reduce takes 48"),
    (lambda b, x: call_mbconv(ops.mbconv, b, x[:, :40]), "x: got 40 channels, w_expand takes 16"),
    (lambda b, x: call_mbconv(functools.partial(ops.mbconv, memory="most"), b, x[:, :16]), "memory: got 'most'"),
    (lambda b, x: ops.BatchNorm.of(nn.BatchNorm2d(8, affine=False)), "bn: must have affine"),
    (lambda b, x: ops.bn_act(x, b.bn(0)._replace(eps=-1.0)), "bn.eps: got -1.0"),
]


@pytest.mark.parametrize(("call", "message"), WRONG)
def test_wrong_arguments_are_named(call: Callable[[Block, Tensor], Tensor], message: str) -> None:
    block, x = sample(CASES[0], False)
    with pytest.raises(ValueError, match=message) as error:
        call(block, x)
    assert "\n" not in str(error.value)
