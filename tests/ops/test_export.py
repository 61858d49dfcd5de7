"""Every op in eval mode under torch.export, with any batch size."""

import io

import pytest
import torch
from torch import Tensor, nn

from tests.ops.test_errors import CALLS
from tests.ops.test_ops import CASES, sample


class Call(nn.Module):
    """An op with its parameters, as a module."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.op, self.call, uses_input = CALLS[name]
        self.block, self.x = sample(CASES[0], uses_input)
        self.block.train(False)
        self.norms, self.weights = self.block.norms, self.block.weights

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.op, self.block, x)


# bn_act's and mbconv's sample calls hold factors for a batch of three
FIXED_BATCH = ("mbconv", "mbconv_stem", "bn_act")


@pytest.mark.parametrize("name", CALLS)
@torch.no_grad()
def test_export(name: str) -> None:
    call = Call(name)
    batch = None if name in FIXED_BATCH else {0: torch.export.Dim("batch", min=1, max=64)}
    exported = torch.export.export(call, (call.x,), dynamic_shapes=(batch,))
    assert any("effnet_fast" in str(node.target) for node in exported.graph.nodes)
    file = io.BytesIO()
    torch.export.save(exported, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for x in [call.x] if batch is None else [call.x, call.x[:1], torch.cat([call.x] * 3)]:
        # the [C] algebra may be reordered
        torch.testing.assert_close(loaded(x), call(x), rtol=1e-5, atol=1e-5)
