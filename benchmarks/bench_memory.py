"""Memory of training steps: every variant under every policy, against plain PyTorch and what it offers to keep less.

A row is a variant at its own size, in bfloat16 under autocast: images a second, bytes kept for the backward pass and
allocated at the worst moment for each image, and the largest batches that the planner fits into 8 to 80 GB. Beside it
the eager twin, as it is and with torch.utils.checkpoint around every block, torch.compile, as it is and with a budget
of half the activations; and of the paper's family timm, as it is and with its own checkpointing.
All of them, or one: ``python -m benchmarks.report --memory [--only "reference b3"] --output DIR``.
"""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import timm
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.bench_model import compiled, train_step
from benchmarks.harness import (
    COMPILED,
    COMPILED_BUDGET,
    LEAN,
    MIN,
    OURS,
    TIMM,
    TIMM_CHECKPOINTS,
    TWIN,
    TWIN_CHECKPOINTS,
    Call,
    allocated,
    images,
)
from effnet_fast import VARIANTS, EfficientNet, create_model
from effnet_fast.interop import to_timm
from effnet_fast.ops.memory_policy import POLICIES, Memory
from effnet_fast.passes.backend import use_backend
from effnet_fast.planning import Planner
from effnet_fast.scaling import get_family, get_variant

SECONDS = 60.0
BATCH = 4
LARGE = 500  # pixels
TOLERANCE = 0.2  # of the loss's norm, as in bench_model
BUDGETS_GB = (8, 16, 24, 80)
PAPER = [name for name in VARIANTS if name.startswith("b") and name != "baseline"]
# From large to small. B0 of the study's family is its baseline, and B2 its compound.
SHAPES = [
    ("reference", name) for name in ("b7", "b6", "b5", "b4", "b3", "b1", "compound", "resolution", "width", "depth")
]
SHAPES = [*(("paper", name) for name in reversed(PAPER)), *SHAPES, ("reference", "baseline")]


def loss_of(model: nn.Module, backend: str, batch: Tensor) -> Tensor:
    with use_backend(backend), torch.autocast("cpu", torch.bfloat16):
        return F.cross_entropy(model(batch), torch.arange(len(batch)) % 10)


def bytes_an_image(model: nn.Module, backend: str, size: int) -> tuple[float, float]:
    """What is allocated after the forward pass, and at most in a step, for each image more."""

    def measure(n: int) -> tuple[int, int]:
        trained, batch = copy.deepcopy(model).train(), images(n, size)
        held = []
        kept = allocated(lambda: held.append(loss_of(trained, backend, batch)))[-1]
        return kept, max(allocated(lambda: loss_of(trained, backend, batch).backward()))

    # With fewer images the worst moment is another one, when all gradients are there; but not of large ones, of which
    # the eager twin keeps gigabytes each.
    few, more = (2, 3) if size > LARGE else (BATCH, BATCH + 2)
    (kept, peak), (more_kept, more_peak) = measure(few), measure(more)
    return (more_kept - kept) / (more - few), (more_peak - peak) / (more - few)


def with_policy(model: EfficientNet, policy: Memory, segments: bool = False) -> EfficientNet:
    model = copy.deepcopy(model)
    blocks = range(len(model.blocks))
    model.set_memory([policy] * (len(blocks) + 1), [(block, block + 1) for block in blocks] if segments else ())
    return model


def compiled_step(model: nn.Module, budget: float, size: int, n: int) -> Call:
    torch._functorch.config.activation_memory_budget = budget
    return train_step(compiled(model), "eager", size, torch.bfloat16, n)


def timm_model(model: EfficientNet, name: str, checkpoints: bool) -> nn.Module:
    theirs = timm.create_model(f"efficientnet_{name}", drop_rate=0.0, drop_path_rate=0.0)
    theirs.load_state_dict(to_timm(model.state_dict()))
    theirs.set_grad_checkpointing(checkpoints)
    return theirs.to(memory_format=torch.channels_last)


@pytest.mark.parametrize("shape", SHAPES, ids=" ".join)
def test_memory(race: Callable[..., None], benchmark: BenchmarkFixture, shape: tuple[str, str]) -> None:
    family, name = shape
    torch.manual_seed(0)
    classes = 1000 if family == "paper" else 10
    model = create_model(name, classes, family=family, drop_rate=0.0, drop_path_rate=0.0)
    model.to(memory_format=torch.channels_last)
    size = get_family(family).input_size(get_variant(name, family).scaling)
    contestants: dict[str, tuple[nn.Module, str]] = {
        OURS: (model, "auto"),
        LEAN: (with_policy(model, "lean"), "auto"),
        MIN: (with_policy(model, "min"), "auto"),
        TWIN: (model, "eager"),
        TWIN_CHECKPOINTS: (with_policy(model, "fast", segments=True), "eager"),
    }
    if family == "paper":
        contestants[TIMM] = timm_model(model, name, False), "auto"
        contestants[TIMM_CHECKPOINTS] = timm_model(model, name, True), "auto"
    race(
        {
            **{key: partial(train_step, *contestant, size, torch.bfloat16) for key, contestant in contestants.items()},
            COMPILED: partial(compiled_step, model, 1.0, size),
            COMPILED_BUDGET: partial(compiled_step, model, 0.5, size),
        },
        examples=BATCH,
        seconds=SECONDS,
        tolerance=TOLERANCE,
        table="Memory of a training step",
        row={"family": family, "variant": name, "input": f"{size} px"},
        unit="images/s",
    )
    measured = {key: bytes_an_image(*contestant, size) for key, contestant in contestants.items()}
    benchmark.extra_info["kept"] = {key: kept for key, (kept, _) in measured.items()}
    benchmark.extra_info["peak"] = {key: peak for key, (_, peak) in measured.items()}
    planner = Planner(model, size)
    benchmark.extra_info["largest batch"] = {
        f"{policy or 'planned'}": {f"{gb} GB": planner.largest_batch(gb * 10**9, policy) for gb in BUDGETS_GB}
        for policy in (*POLICIES, None)
    }
