"""`backward_dwconv` and whole blocks in Triton's interpreter against float64. Run by test_interpreted.py."""

import pytest
import torch
from torch import Tensor

from effnet_fast import ops
from effnet_fast.passes import triton as passes
from effnet_fast.passes.backend import use_backend
from effnet_fast.passes.schema import PASSES
from effnet_fast.passes.triton import depthwise_backward
from tests.ops.test_ops import Block, call_mbconv, relative_error, sample
from tests.passes.samples import depthwise_calls, elementwise_calls
from tests.triton.interpreter import DTYPES, LAUNCHERS, check, fix_interpreter
from tests.triton.samples import WINDOWS, call_of, samples

fix_interpreter()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("kernel", "stride"), WINDOWS)
@pytest.mark.parametrize("shape", samples(), ids=str)
def test_backward(
    shape: tuple[int, int, int, int], kernel: int, stride: int, dtype: torch.dtype, wide_tiles: None
) -> None:
    check(call_of("backward_dwconv", shape, dtype, kernel, stride), dtype)


@pytest.mark.parametrize(("kernel", "stride"), WINDOWS[:4])
def test_backward_with_the_launched_tiles(kernel: int, stride: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, so that each one sums over several tiles."""
    monkeypatch.setattr(depthwise_backward, "PROGRAMS", 4)
    check(call_of("backward_dwconv", (2, 72, 5, 11), torch.float32, kernel, stride), torch.float32)


@pytest.mark.parametrize("same", [False, True])
def test_backward_with_every_kind_of_operands(same: bool, wide_tiles: None) -> None:
    for call in depthwise_calls((2, 24, 6, 5), torch.float32, 3, 2, same):
        if call.name == "backward_dwconv":
            check(call, torch.float32)


# c_in, c_out, expanded, kernel, stride, SAME, H, W, N
BLOCKS = ((16, 16, 48, 3, 1, False, 6, 7, 3), (8, 16, 40, 5, 2, True, 7, 5, 2))
# As the ops' own tests: relative to the norm of the float64 result.
LIMIT = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


@pytest.mark.parametrize("dtype", LIMIT, ids=str)
@pytest.mark.parametrize("case", BLOCKS, ids=str)
def test_a_whole_block_trains_as_its_twin(case: tuple[int, ...], dtype: torch.dtype, wide_tiles: None) -> None:
    block, x = sample(case, True)
    wide = block.double()
    x = x.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    x64 = x.detach().double().requires_grad_()
    out64 = call_mbconv(ops.mbconv_eager, wide, x64)
    grad = torch.randn_like(out64).to(dtype)
    with use_backend("triton"):
        out = call_mbconv(ops.mbconv, block, x)
        out.backward(grad)
    out64.backward(grad.double())
    assert relative_error(out, out64) < LIMIT[dtype]
    assert relative_error(x.grad, x64.grad) < LIMIT[dtype]
    for (key, parameter), expected in zip(block.weights.items(), wide.weights.values(), strict=True):
        if expected.grad is not None:  # of the block's parameters, not of the stem's
            assert relative_error(parameter.grad, expected.grad) < LIMIT[dtype], key
    for bn, expected_bn in zip(block.norms, wide.norms, strict=True):
        assert relative_error(bn.weight.grad, expected_bn.weight.grad) < LIMIT[dtype]
        assert relative_error(bn.bias.grad, expected_bn.bias.grad) < 2 * LIMIT[dtype]
        assert relative_error(bn.running_var, expected_bn.running_var) < LIMIT[dtype]


def test_a_whole_block_infers_as_its_twin(wide_tiles: None) -> None:
    block, x = sample(BLOCKS[0], True)
    block.train(False)
    expected = call_mbconv(ops.mbconv_eager, block.double(), x.double())
    with torch.no_grad(), use_backend("triton"):
        assert relative_error(call_mbconv(ops.mbconv, block, x), expected) < LIMIT[torch.float32]


@pytest.mark.parametrize("training", [True, False])
def test_a_block_compiles_without_graph_breaks(training: bool, wide_tiles: None) -> None:
    block, x = sample((8, 8, 16, 3, 1, False, 3, 4, 2), True)
    block.train(training)
    x = x.contiguous(memory_format=torch.channels_last)

    def forward(x: Tensor, block: Block = block) -> Tensor:
        return call_mbconv(ops.mbconv, block, x)

    torch.compiler.reset()
    with use_backend("triton"), torch.set_grad_enabled(training):
        leaves = [x.clone().requires_grad_(training) for _ in range(2)]
        expected = forward(leaves[0])
        out = torch.compile(forward, fullgraph=True, backend="aot_eager")(leaves[1])
        torch.testing.assert_close(out, expected, rtol=1e-6, atol=1e-6)  # the [C] algebra may be reordered
        if training:
            expected.sum().backward()
            out.sum().backward()
            torch.testing.assert_close(leaves[1].grad, leaves[0].grad, rtol=1e-4, atol=1e-5)


def test_every_pass_is_an_op_that_passes_opcheck(wide_tiles: None) -> None:
    calls = [
        *elementwise_calls((2, 24, 4, 3), torch.bfloat16),
        *depthwise_calls((2, 24, 4, 3), torch.bfloat16, 3, 2, True),
    ]
    seen = {}
    for call in calls:
        seen.setdefault(call.name, call)
    assert set(seen) == set(LAUNCHERS) <= set(PASSES)
    for name, call in seen.items():
        torch.library.opcheck(getattr(passes, name), call.args)
