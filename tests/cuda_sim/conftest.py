import ctypes
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch

from effnet_fast.passes import schema
from effnet_fast.passes.schema import ALGEBRA, PASSES
from tests.cuda_sim import build

# how the threads of a block take turns between barriers
FORWARD, REVERSE, RANDOM = ORDERS = (0, 1, 2)

Simulate = Callable[..., None]

_LIBRARY = torch.library.Library("effnet_fast_simulated", "DEF")


@pytest.fixture(scope="session")
def simulator() -> ctypes.CDLL:
    """The library behind the simulated passes; `passes` has them as Python functions."""
    if build.cuda_include() is None:
        pytest.skip("no CUDA toolkit: its headers are needed, in CUDA_HOME or /usr/local/cuda")
    for definition in (*schema._SCHEMAS, *schema._ALGEBRA_SCHEMAS):
        _LIBRARY.define(definition)
    return build.load(build.library())


@pytest.fixture(scope="session")
def passes(simulator: ctypes.CDLL) -> SimpleNamespace:
    ops = torch.ops.effnet_fast_simulated
    return SimpleNamespace(**{name: getattr(ops, name).default for name in PASSES + ALGEBRA})


@pytest.fixture
def simulate(simulator: ctypes.CDLL) -> Simulate:
    """simulate(order, multiprocessors) chooses how kernels run."""
    return simulator.simulate


@pytest.fixture(autouse=True)
def poisoned_outputs() -> Iterator[None]:
    """Every new tensor, partial results among them, is full of NaN until a kernel writes it."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)
