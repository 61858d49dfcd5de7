"""A whole EfficientNet with one block of every stage, trained one step through the simulated CUDA passes."""

import copy
import importlib
import pkgutil
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import effnet_fast.ops
from effnet_fast import Scaling, model
from effnet_fast.passes.backend import use_backend, with_products
from tests.cuda_sim.conftest import FORWARD, Simulate


def gradients(net: nn.Module, images: Tensor) -> dict[str, Tensor]:
    logits = net(images)
    (logits * torch.linspace(-1, 1, logits.numel(), dtype=logits.dtype).view_as(logits)).sum().backward()
    return {"logits": logits.detach().double()} | {name: p.grad.double() for name, p in net.named_parameters()}


@pytest.mark.parametrize("pad_type", ["symmetric", "same"])
def test_gradients_of_every_stage_equal_eager(
    passes: SimpleNamespace, simulate: Simulate, monkeypatch: pytest.MonkeyPatch, pad_type: str
) -> None:
    simulate(FORWARD, 2)
    monkeypatch.setattr(model, "STAGES", [stage._replace(repeats=1) for stage in model.STAGES])
    torch.manual_seed(0)
    net = model.EfficientNet(Scaling(1.0, 1.0, 64), drop_rate=0, drop_path_rate=0, pad_type=pad_type).train()
    images = torch.randn(2, 3, 64, 64)
    with use_backend("eager"):
        expected = gradients(copy.deepcopy(net).double(), images.double())
        eager = gradients(copy.deepcopy(net), images)

    used: list[tuple[int, ...]] = []

    def simulated(x: Tensor, kernel: int = 3, stride: int = 1) -> SimpleNamespace:
        used.append((kernel, stride))
        return with_products(passes)

    for module in pkgutil.iter_modules(effnet_fast.ops.__path__, "effnet_fast.ops."):
        monkeypatch.setattr(importlib.import_module(module.name), "passes_for", simulated, raising=False)
    actual = gradients(net, images)
    assert set(used) >= {(stage.kernel, stage.stride) for stage in model.STAGES}

    def error(given: dict[str, Tensor], name: str) -> float:
        return ((given[name] - expected[name]).norm() / (expected[name].norm() + 1e-6)).item()

    for name in expected:
        # as close to float64 as PyTorch's own float32, up to the luck of its rounding in a deep network
        assert error(actual, name) < 4 * error(eager, name) + 1e-5, name
