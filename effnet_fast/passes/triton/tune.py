"""Finds the fastest tiles of the depthwise kernels on this GPU: ``python -m effnet_fast.passes.triton.tune``.

Takes some minutes. The results are used from then on, by every process on a GPU of the same name with the same version
of Triton; sums are then added up in another order than without them.
"""

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from triton.runtime.errors import OutOfResources
from triton.testing import do_bench

from effnet_fast.passes.triton import configs
from effnet_fast.passes.triton.configs import TABLES, Config, Table
from effnet_fast.passes.triton.depthwise import dwconv_affine, dwconv_stats
from effnet_fast.passes.triton.depthwise_backward import backward_dwconv

# (pass, kernel, stride, bytes of a value, configuration) -> milliseconds
Measure = Callable[[str, int, int, int, Config], float]


def candidates(name: str, given: Config) -> Iterator[Config]:
    """The given configuration, and others with as many values a thread or half."""
    values = given.lanes * given.channels // (32 * given.warps)
    yield given
    for warps in (4, 8):
        for channels in (32, 64):
            for columns in (1,) if name == "backward_dwconv" else (1, 2, 3, 4):
                for of_thread in {values, max(1, values // 2)}:
                    config = Config(of_thread * 32 * warps // channels, channels, columns, warps)
                    if config != given:
                        yield config


def tune(measure: Measure, progress: Callable[[list[Any]], Iterable[Any]] = iter) -> dict[str, Table]:
    """The fastest candidate of every entry of the tables; measure raises OutOfResources for those that can't run.

    progress: wraps the entries as they are gone through.
    """
    tuned: dict[str, Table] = {name: {} for name in TABLES}
    for name, kernel, stride, size in progress([(name, *key) for name, table in TABLES.items() for key in table]):
        best = None
        for config in candidates(name, TABLES[name][kernel, stride, size]):
            try:
                milliseconds = measure(name, kernel, stride, size, config)
            except OutOfResources:
                continue
            if best is None or milliseconds < best[0]:
                best = milliseconds, config
        if best is not None:
            tuned[name][kernel, stride, size] = best[1]
    return tuned


def measure_on(device: torch.device) -> Measure:
    """On activations of a B0's middle."""
    tables = configs.tables_of(configs.device_name(device))

    def measure(name: str, kernel: int, stride: int, size: int, config: Config) -> float:
        tables[name][kernel, stride, size] = config
        return do_bench(sample_call(name, kernel, stride, size, device), return_mode="median")

    return measure


def sample_call(name: str, kernel: int, stride: int, size: int, device: torch.device) -> Callable[[], object]:
    """A call of the pass with all of its operands."""
    n, c, h = 64, 192, 56

    def activation(height: int) -> Tensor:
        x = torch.randn(n, c, height, height, device=device, dtype={2: torch.bfloat16, 4: torch.float32}[size])
        return x.contiguous(memory_format=torch.channels_last)

    v, gate, weight = (torch.rand(shape, device=device) for shape in ((c,), (n, c), (c, 1, kernel, kernel)))
    if name == "dwconv_stats":
        return partial(dwconv_stats, activation(h), weight, v, v, stride, False)
    if name == "dwconv_affine":
        return partial(dwconv_affine, activation(h), weight, None, None, v, v, stride, False)
    y, operands = activation(h // stride), (v, v, v, gate, gate, v, v, v, v, v, v)
    return partial(backward_dwconv, y, y, activation(h), weight, *operands, stride, False)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m effnet_fast.passes.triton.tune", description=__doc__)
    parser.parse_args()
    if not (torch.cuda.is_available() or torch.xpu.is_available()):
        sys.exit("no GPU to tune on")
    device = torch.device("cuda" if torch.cuda.is_available() else "xpu", 0)
    tuned = tune(measure_on(device), tqdm)
    path = configs.tuned_file()
    configs.write_tuned(path, configs.device_name(device), tuned)
    for name, table in tuned.items():
        for (kernel, stride, size), config in table.items():
            print(f"{name} {kernel}x{kernel} / {stride}, {size} bytes: {config}")
    print(path)


if __name__ == "__main__":
    main()
