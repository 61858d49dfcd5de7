"""What the planner foresees, against what the allocator sees, and against the same model without a plan."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.harness import allocated
from effnet_fast import VARIANTS, create_model
from effnet_fast.config import Config
from effnet_fast.model import EfficientNet
from effnet_fast.ops.memory_policy import POLICIES, Memory
from effnet_fast.passes.backend import use_backend
from effnet_fast.planning import DoesNotFit, Plan, Planner
from effnet_fast.scaling import Scaling
from effnet_fast.trainer import Trainer, make_planner
from tests.tiny import config_of, tiny_variant

# Beside what is counted: packed weights, and sums of each thread, inside the compiled passes.
ERROR = 0.05


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_variant():
        yield


def train(config: Config, plan: Plan, batches: int = 1) -> None:
    """Two steps as the command makes them: from the second on, the optimizer has its state."""
    trainer = Trainer(config, 10)
    trainer.model.set_memory(plan.policies, plan.segments)
    shape = config.batch_size, 3, config.input_size, config.input_size
    images = [torch.randn(shape).to(memory_format=torch.channels_last) for _ in range(batches)]
    labels = torch.zeros(config.batch_size, dtype=torch.int64)
    for _ in range(2):
        trainer.train_step([(batch, labels) for batch in images])


def assert_foreseen(config: Config, plan: Plan) -> None:
    """To 5 %: the peak, and what of it is beside weights, optimizer and average, which outweigh it in small runs."""
    peak = max(allocated(lambda: train(config, plan, config.accumulate)))
    assert plan.peak == pytest.approx(peak, rel=ERROR)
    assert plan.peak - plan.fixed == pytest.approx(peak - plan.fixed, rel=ERROR)


@pytest.mark.parametrize(
    ("memory", "variant", "resolution", "batch_size", "amp"),
    [
        ("fast", "b0", 96, 24, "bf16"),
        ("lean", "b0", 96, 24, "bf16"),
        ("min", "b0", 96, 24, "bf16"),
        ("lean", "b0", 63, 16, "off"),
        ("min", "compound", 72, 8, "bf16"),
    ],
)
def test_peak_of_a_policy(memory: Memory, variant: str, resolution: int, batch_size: int, amp: str) -> None:
    config = config_of(variant=variant, resolution=resolution, batch_size=batch_size, amp=amp)
    assert_foreseen(config, make_planner(config, 10).uniform(memory, batch_size))


@pytest.mark.slow
@pytest.mark.parametrize("memory", POLICIES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_peak_of_every_variant(variant: str, memory: Memory) -> None:
    config = config_of(variant=variant, resolution=128, batch_size=8, amp="bf16")
    assert_foreseen(config, make_planner(config, 10).uniform(memory, 8))


@pytest.mark.slow
@pytest.mark.parametrize(("variant", "batch_size"), [("compound", 128), ("b7", 16)])
def test_a_step_at_full_size_in_8_gb(variant: str, batch_size: int) -> None:
    """The study's own batch of its largest variant, 296 px, and the largest of its family, 592 px."""
    config = config_of(variant=variant, resolution=224, batch_size=batch_size, amp="bf16")
    budget = 8 * 10**9
    plan = make_planner(config, 10).fastest(batch_size, budget)
    peak = max(allocated(lambda: train(config, plan)))
    assert peak <= budget
    assert plan.peak == pytest.approx(peak, rel=ERROR)


@pytest.mark.usefixtures("stored")
@pytest.mark.parametrize("segments", [False, True])
def test_peak_of_the_fastest_assignment(segments: bool) -> None:
    """Between the least and "min" parts have to run again in segments; between "min" and "fast" policies are mixed."""
    config = config_of(variant="b0", resolution=128, batch_size=32, amp="bf16")
    planner = make_planner(config, 10)
    least, less, most = planner.least(32), planner.uniform("min", 32).peak, planner.uniform("fast", 32).peak
    fits = less / 0.98  # 2 % of a budget are left alone, also of `least`
    budget = int((least + fits) / 2 if segments else (fits + most) / 2)
    plan = planner.fastest(32, budget)
    assert bool(plan.segments) == segments
    assert len(set(plan.policies)) > 1
    assert plan.peak <= budget
    assert_foreseen(config, plan)


@pytest.mark.parametrize(
    "options",
    [
        {"optimizer": "sgd", "accumulate": 2},
        {"optimizer": "adamw", "freeze": "stages.5,stages.6,head"},
        {"optimizer": "muon"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_peak_of_other_runs(options: dict[str, Any]) -> None:
    config = config_of(**{"variant": "b0", "resolution": 96, "batch_size": 16, "amp": "bf16", **options})
    assert_foreseen(config, make_planner(config, 10).uniform("min", 16))


def gradients(model: EfficientNet, images: Tensor, **forward: Any) -> list[Tensor]:
    """Of all parameters, then all buffers after the step."""
    torch.manual_seed(1)  # of drop path and dropout
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images).square().mean()
    loss.backward()
    return [*(p.grad for p in model.parameters()), *model.buffers()]


@pytest.mark.parametrize("backend", ["auto", "eager"])
@pytest.mark.parametrize("segments", [((0, 3), (4, 9)), ((2, 16),)])
def test_segments_change_nothing(backend: str, segments: tuple[tuple[int, int], ...]) -> None:
    """Gradients and running statistics, bit for bit, with the random numbers of drop path."""
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    model = create_model("b0")
    again = create_model("b0")
    again.load_state_dict(model.state_dict())
    again.set_memory(["min"] * 17, segments)
    with use_backend(backend):
        expected, actual = gradients(model, images), gradients(again, images)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)


def test_segments_of_a_compiled_model() -> None:
    torch.manual_seed(0)
    images = torch.randn(4, 3, 64, 64)
    model = create_model("b0")
    expected = gradients(copy.deepcopy(model), images)
    model.set_memory(["min"] * 17, [(0, 3), (5, 9)])
    for a, b in zip(gradients(torch.compile(model, backend="eager"), images), expected, strict=True):
        assert torch.equal(a, b)


@pytest.fixture(scope="module")
def planner() -> Planner:
    """Of a small model with few blocks, so that all assignments can be tried."""
    with torch.device("meta"):
        return Planner(create_model(Scaling(0.1, 0.5)), 64)


def test_fastest_is_the_fastest_of_all_assignments(planner: Planner) -> None:
    """Against the peaks and times of all 3^9 assignments, at budgets all over the range."""
    batch = 64
    needs = {policy: planner._needs(policy, batch) for policy in POLICIES}
    fixed, grads = planner.fixed + planner._images(batch), planner._grads

    def peak_and_extra(policies: tuple[Memory, ...]) -> tuple[int, int]:
        kept = extra = 0
        peak = planner._update
        for i, policy in enumerate(policies):
            need = needs[policy][i]
            peak = max(peak, kept + need.forward, kept + int(grads[i + 1 :].sum()) + need.output + need.backward)
            kept += need.kept
            extra += need.moved - needs["fast"][i].moved
        return fixed + peak, extra

    every = [peak_and_extra(policies) for policies in itertools.product(POLICIES, repeat=len(grads))]
    base = sum(need.moved for need in needs["fast"])
    peaks = sorted(peak for peak, _ in every)
    for budget in peaks[:: len(peaks) // 12]:
        best = min(extra for peak, extra in every if peak <= budget)
        plan = planner.fastest(batch, int(budget / 0.98) + 1)
        assert plan.peak <= budget
        # ways that keep the same but for a 400th of the room are taken for one
        assert plan.extra_time <= best / base + 0.01


def test_the_least_that_fits(planner: Planner) -> None:
    least = planner.least(64)
    assert planner.fastest(64, least).peak <= least
    with pytest.raises(
        DoesNotFit, match=r"^memory: got .* MB, a step of batch 64 at 64 px needs at least .* MB; the la"
    ):
        planner.fastest(64, least - (1 << 17))


@pytest.mark.parametrize("memory", [None, *POLICIES])
def test_the_largest_batch(planner: Planner, memory: Memory | None) -> None:
    budget = 300_000_000
    largest = planner.largest_batch(budget, memory)
    assert largest > 100

    def fits(batch_size: int) -> bool:
        if memory is None:
            return planner.least(batch_size) <= budget
        return planner.uniform(memory, batch_size).peak <= 0.98 * budget

    assert fits(largest)
    assert not fits(largest + 1)


def test_no_batch_fits(planner: Planner) -> None:
    assert planner.largest_batch(planner.fixed) == 0
    with pytest.raises(DoesNotFit, match=r"no batch fits$"):
        planner.fastest(1, planner.fixed)


@pytest.mark.usefixtures("stored")
def test_a_model_within_a_budget() -> None:
    images = torch.randn(16, 3, 64, 64)
    torch.manual_seed(0)
    free = create_model(Scaling(0.1, 0.5))
    torch.manual_seed(0)
    tight = create_model(Scaling(0.1, 0.5), memory="20MB", batch_size=16, input_size=64)
    assert {block.memory for block in tight.blocks} != {"fast"}
    for a, b in zip(gradients(free, images), gradients(tight, images), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"memory": "8 G"}, "^memory: got '8 G', choose from fast, lean, min, or an amount as 8GB or 7.5GiB$"),
        ({"memory": 0}, "^memory: got 0, choose from fast, lean, min, or an amount"),
        ({"memory": "1GB"}, "^batch_size: must be given, as memory is a budget"),
    ],
)
def test_budgets_that_are_none(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_model("b0", **arguments)
