"""Options, the fixture `race`, and the machine's name in the JSON."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from benchmarks import harness
from effnet_fast.memory import keep_freed_memory

keep_freed_memory()  # for every implementation of this process
torch._dynamo.config.recompile_limit = 64  # a function is compiled for each of its convolutions


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("effnet_fast")
    group.addoption("--quick", action="store_true", help="only the smallest shapes, one round: checks the benchmarks")
    group.addoption("--no-compile", action="store_true", help="leave out torch.compile, which first compiles for long")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Quick: of each benchmark's shapes, which go from the largest to the smallest, only the last."""
    if config.getoption("quick"):

        def benchmarked(item: Any) -> tuple[Any, Any]:
            return item.function, item.callspec.params.get("name")

        last = {benchmarked(item): item.callspec.params.get("shape") for item in items}
        items[:] = [item for item in items if item.callspec.params.get("shape") == last[benchmarked(item)]]


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    machine_info["effnet_fast"] = harness.machine()


@pytest.fixture
def race(benchmark: BenchmarkFixture, request: pytest.FixtureRequest) -> Callable[..., None]:
    """`harness.race` of this test, as the options have it."""
    config = request.config

    def run(makes: dict[str, harness.Make], **kwargs: Any) -> None:
        without = harness.COMPILING if config.getoption("no_compile") else ()
        chosen = {name: make for name, make in makes.items() if name not in without}
        harness.race(benchmark, chosen, quick=config.getoption("quick"), **kwargs)

    return run
