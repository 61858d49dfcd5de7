"""What the benchmarks share: several implementations of one function, checked against each other and timed in turn."""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import accumulate
from statistics import median
from typing import Any

import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from effnet_fast import EfficientNet, create_model
from effnet_fast.doctor import processor
from effnet_fast.layers import MBConv
from effnet_fast.passes.backend import cpu_isa

OURS, TWIN, TORCHVISION, COMPILED, OPENVINO, ONNXRUNTIME = _CONTESTANTS = (
    "effnet_fast",
    "eager twin",
    "torchvision",
    "torch.compile",
    "OpenVINO",
    "ONNX Runtime",
)
LEAN, MIN, TWIN_CHECKPOINTS, TIMM, TIMM_CHECKPOINTS, COMPILED_BUDGET = _KEEPING_LESS = (
    "effnet_fast, lean",
    "effnet_fast, min",
    "eager twin, checkpointed blocks",
    "timm",
    "timm, set_grad_checkpointing",
    "torch.compile, half the activations",
)
CONTESTANTS = _CONTESTANTS + _KEEPING_LESS
# They compile, which is not to be done twice.
COMPILING = (COMPILED, COMPILED_BUDGET)
DTYPES = (torch.float32, torch.bfloat16)
BATCH = 16
# Every implementation first runs on so many examples: for the check, and to see how many fit into its time.
PROBE = 2
MIN_ROUNDS, MAX_ROUNDS = 3, 25

Call = Callable[[], Sequence[Tensor]]
Make = Callable[[int], Call]  # from a number of examples to a call that returns what it computed from them


def dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def race(
    benchmark: BenchmarkFixture,
    makes: Mapping[str, Make],
    *,
    examples: int,
    seconds: float,
    tolerance: float,
    table: str,
    row: Mapping[str, str],
    unit: str,
    work: float = 1.0,
    quick: bool = False,
) -> None:
    """Time implementations round-robin, ours by pytest-benchmark, the others in its set-up before each round.

    makes must hold OURS and TWIN. Before that, every implementation's results on a few examples must be those of the
    twin, to `tolerance` of their norm. All together they get about `seconds`, beside compilation; one that is too slow
    for its share runs on fewer examples. work: what an example counts in `unit`, of which rates per second are given.
    quick: one round, of a few examples.
    Stores, as pytest-benchmark's extra information, each implementation's median seconds, fastest and slowest, examples
    and rate, for a row of a table of the report. row: what its first columns are called and hold.
    """
    few = min(PROBE, examples)
    share = 0 if quick else seconds / len(makes) / (MIN_ROUNDS + 2)  # a warm-up and a trial come before the rounds
    expected = makes[TWIN](few)()
    fitting = {}
    for name, make in makes.items():
        if name not in COMPILING:
            call = make(few)
            check(name, call(), expected, tolerance)
            fitting[name] = min(examples, max(few, int(share / timed(call) * few)))
    fitting |= {name: fitting[TWIN] for name in COMPILING if name in makes}
    calls = {name: make(fitting[name]) for name, make in makes.items()}
    warm = {name: call() for name, call in calls.items()}
    for name in COMPILING:
        if name in makes:
            check(name, warm[name], warm[TWIN], tolerance)
    del warm
    trial = sum(timed(call) for call in calls.values())
    rounds = 1 if quick else max(MIN_ROUNDS, min(MAX_ROUNDS, int(seconds / trial)))
    times: dict[str, list[float]] = {name: [] for name in calls if name != OURS}

    def others() -> None:
        for name, samples in times.items():
            samples.append(timed(calls[name]))

    benchmark.pedantic(calls[OURS], setup=others, rounds=rounds)
    times = {OURS: benchmark.stats.stats.data, **times}
    results = {}
    for name, samples in times.items():
        middle, n = median(samples), fitting[name]
        results[name] = {
            **{"seconds": middle, "fastest": min(samples), "slowest": max(samples)},
            **{"examples": n, "rate": work * n / middle},
        }
    benchmark.extra_info.update(table=table, row=dict(row), unit=unit, batch=examples, contestants=results)


def timed(call: Call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def check(name: str, actual: Sequence[Tensor], expected: Sequence[Tensor], tolerance: float) -> None:
    """Raises AssertionError unless each tensor is the expected one, to `tolerance` of its norm."""
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        wide = e.double()
        error = (a.double() - wide).norm().item()
        # not (error <= limit), so that NaN fails
        assert error <= tolerance * wide.norm().item(), f"{name}: result {i} differs from the twin's by {error:.2e}"


def allocated(run: Callable[[], object]) -> list[int]:
    """Bytes that torch's CPU allocator had given out since `run` began, after each of its events: inside ops too."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return list(accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))


@cache
def b0() -> EfficientNet:
    """B0 with 1000 classes, without drop path."""
    torch.manual_seed(0)
    return create_model("b0", 1000, family="paper", drop_path_rate=0.0)


def blocks() -> Iterator[tuple[MBConv, int]]:
    """The distinct blocks of B0 at 224 pixels, each with the size of its input."""
    size, seen = 112, set()
    for stage in b0().stages:
        for block in stage:
            conv = block.depthwise.conv
            kind = conv.weight.shape, conv.stride, size
            if kind not in seen:
                seen.add(kind)
                yield block, size
            size //= conv.stride[0]


def describe(block: MBConv, size: int) -> str:
    conv = block.depthwise.conv
    return f"{conv.out_channels}x{size}x{size} k{conv.kernel_size[0]} s{conv.stride[0]}"


def images(n: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, size, size, generator=generator).contiguous(memory_format=torch.channels_last)


def machine() -> dict[str, Any]:
    """What the figures depend on."""
    facts = {"processor": processor(), "threads": torch.get_num_threads(), "instruction set": cpu_isa()}
    return {**facts, "torch": torch.__version__}
