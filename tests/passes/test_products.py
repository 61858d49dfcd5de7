"""The products composed of passes, against autograd in float64."""

from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from effnet_fast.passes import products, reference
from effnet_fast.passes.algebra import batch_norm_grad, batch_norm_stats
from tests.passes.samples import activation


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()


# float32: some hundred roundings of 6e-8 in the sums. Of 16 bits the storage's rounding, 2^-9 and 2^-12: dx takes two.
LIMIT = {torch.float64: 1e-12, torch.float32: 3e-5, torch.bfloat16: 1e-2, torch.float16: 1e-3}


@pytest.mark.parametrize("with_residual", [False, True])
@pytest.mark.parametrize("without_dy", [False, True])
@pytest.mark.parametrize(("x_mean", "along_hat"), [(0, 0), (5, 0), (0, 3)])
@pytest.mark.parametrize("dtype", LIMIT, ids=str)
def test_backward_of_convolution_and_norm(
    dtype: torch.dtype,
    x_mean: float,
    along_hat: float,
    without_dy: bool,
    with_residual: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """More outputs than inputs, and both ways: without_dy, no pass may touch the convolution's output or its gradient.

    x_mean: of x, in standard deviations. along_hat: of grad, the part that BatchNorm's backward removes.
    """
    g = torch.Generator().manual_seed(0)
    n, c, size, outputs, eps = 3, 8, (13, 9), 48, 1e-3
    count = n * size[0] * size[1]
    x = (activation(g, (n, c, *size), torch.float32) + x_mean).to(dtype)
    weight = (torch.randn(outputs, c, 1, 1, generator=g) / c**0.5).to(dtype)
    gamma, beta = torch.rand(outputs, generator=g).double() + 0.5, torch.randn(outputs, generator=g).double()
    y = F.conv2d(x.double(), weight.double())
    hat = F.batch_norm(y, None, None, training=True, eps=eps)
    grad = (activation(g, tuple(y.shape), torch.float64) + along_hat * hat).to(dtype)
    grad = grad.contiguous(memory_format=torch.channels_last)
    residual = activation(g, tuple(x.shape), dtype) if with_residual else None

    leaves = [t.double().requires_grad_() for t in (x, weight)]
    out = F.batch_norm(F.conv2d(*leaves), None, None, gamma, beta, training=True, eps=eps)
    dx, dweight = torch.autograd.grad(out, leaves, grad.double())
    if residual is not None:
        dx = dx + residual.double()

    moments = (y.mean((0, 2, 3)), y.var((0, 2, 3), unbiased=False) * count)
    stats = batch_norm_stats(*moments, gamma, beta, eps, count)
    sums = torch.stack([grad.double().sum((0, 2, 3)), (grad * hat).sum((0, 2, 3))])
    grads = batch_norm_grad(stats, sums[:, None], None, None, count)
    floats = torch.promote_types(dtype, torch.float32)
    scale, shift, mean, a, b = (t.to(floats) for t in (*stats[:3], *grads[2:]))
    monkeypatch.setattr(products, "WITHOUT_DY", 0 if without_dy else grad.numel() + 1)
    only = reference.channel_stats if without_dy else reference.backward_apply
    passes = SimpleNamespace(**{only.__name__: only})
    got_dx, got_dweight, none = products.backward_pointwise(
        passes, grad, y.to(dtype), x, weight, scale, shift, mean, False, None, a, b, *(None,) * 5, residual, True
    )
    assert got_dx.dtype == dtype
    assert got_dx.is_contiguous(memory_format=torch.channels_last)
    assert got_dweight.dtype == floats
    assert none.shape == (0, n, 0)
    # What the BatchNorm removes was rounded as well. dy is too, so that its sum, which x's mean multiplies, is not 0.
    limit = LIMIT[dtype] * (1 + 2 * along_hat + (0 if without_dy else x_mean / 5))
    assert relative_error(got_dweight, dweight) < limit
    assert relative_error(got_dx, dx) < limit
