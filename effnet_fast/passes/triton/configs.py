"""Tile sizes per shape class: a table, and on a GPU on which `tune` has run, what was fastest there."""

import json
import logging
import os
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

_LOG = logging.getLogger("effnet_fast")


class Config(NamedTuple):
    """A tile of lanes x channels, the columns of a lane's strip, and warps. A thread has tile / (32 * warps) values."""

    lanes: int
    channels: int
    columns: int = 1
    warps: int = 4

    def fit(self, channels: int) -> "Config":
        """The same number of values with fewer channels and more lanes, where there are only so many channels."""
        width = min(self.channels, triton.next_power_of_2(channels))
        return self._replace(lanes=self.lanes * self.channels // width, channels=width)

    def tile(self) -> dict[str, int]:
        """Keyword arguments of the kernels."""
        return {"BLOCK_P": self.lanes, "BLOCK_C": self.channels, "num_warps": self.warps}


# By bytes of a value. Two 16-byte loads a thread.
POINTWISE = {2: Config(32, 64), 4: Config(32, 32)}

# Forward, a thread takes 16 bytes of channels, 128 bytes a lane. Wider strips activate fewer pixels twice, but need
# KERNEL / STRIDE * columns sums a channel in registers.
FORWARD = {
    (3, 1, 2): Config(16, 64, 3),
    (3, 2, 2): Config(16, 64, 2),
    (5, 1, 2): Config(16, 64, 2),
    (5, 2, 2): Config(16, 64, 1),
    (7, 1, 2): Config(16, 64, 1),
    (7, 2, 2): Config(16, 64, 1),
    (3, 1, 4): Config(16, 32, 4),
    (3, 2, 4): Config(16, 32, 2),
    (5, 1, 4): Config(16, 32, 2),
    (5, 2, 4): Config(16, 32, 2),
    (7, 1, 4): Config(16, 32, 2),
    (7, 2, 4): Config(16, 32, 1),
}

# Backward, a thread holds KERNEL^2 sums of the weight's gradient and two windows for each of its channels: it can
# afford four channels at 3x3, which are 16 bytes of float32, two at 5x5, and one at 7x7. Eight, 16 bytes of 16-bit
# values, are 8 * (25 + 2 * 5) = 280 registers at 5x5, of which there are 255, and spill at 3x3 as well, by 44
# instructions on sm_90. Wide tiles read fewer columns twice.
BACKWARD = {
    (kernel, stride, size): Config(lanes, 32, warps=8)
    for kernel, lanes in ((3, 32), (5, 16), (7, 8))
    for stride in (1, 2)
    for size in (2, 4)
}

# By kernel, stride and bytes of a value.
Table = dict[tuple[int, int, int], Config]

# Chosen for Triton 3.8. With 3.6 a few spill, by up to 107 instructions (dwconv_stats at 5x5 / 2 on sm_90).
TABLES: dict[str, Table] = {
    # dwconv_affine spills with these
    "dwconv_stats": {**FORWARD, (5, 2, 2): Config(16, 64, 2), (7, 2, 4): Config(16, 32, 2)},
    # two columns of 64 channels spill on sm_80, one on sm_90
    "dwconv_affine": {**FORWARD, (3, 2, 2): Config(32, 32, 3)},
    "backward_dwconv": BACKWARD,
}


def pointwise_config(x: Tensor) -> Config:
    """Of a pass without a convolution."""
    return POINTWISE[x.element_size()].fit(x.shape[1])


def depthwise_config(name: str, kernel: int, stride: int, x: Tensor) -> Config:
    """Of a pass with a depthwise convolution: as tuned for x's GPU, else as in the table."""
    tables = TABLES if x.device.type not in ("cuda", "xpu") else tables_of(device_name(x.device))
    return tables[name][kernel, stride, x.element_size()].fit(x.shape[1])


@cache
def device_name(device: torch.device) -> str:
    return torch.get_device_module(device.type).get_device_name(device)


@cache
def tables_of(device: str) -> dict[str, Table]:
    """The tables for a GPU of that name."""
    tables = {name: dict(table) for name, table in TABLES.items()}
    for name, table in read_tuned(tuned_file(), device).items():
        tables[name].update(table)
    return tables


def tuned_file() -> Path:
    """Where `tune` leaves its results."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "effnet_fast" / "triton.json"


def read_tuned(path: Path, device: str) -> dict[str, Table]:
    """The configurations that `write_tuned` wrote for a GPU of that name and this version of Triton.

    Those of others, and a damaged file, are left alone, with a line in the log; without a file there are none.
    """
    try:
        found = json.loads(path.read_text())
        made_for, version = found["device"], found["triton"]
        tuned: dict[str, Table] = {}
        for name, *key, config in found["configurations"]:
            if tuple(key) not in TABLES[name] or not _is_config(config):
                raise ValueError(f"{name} {key}: {config}")
            tuned.setdefault(name, {})[key[0], key[1], key[2]] = Config(*config)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, TypeError, LookupError, RecursionError) as error:
        _LOG.warning("%s: damaged, not used: %r", path, error)
        return {}
    if (made_for, version) != (device, triton.__version__):
        _LOG.warning(
            "%s: for %s and Triton %s, not used for %s and Triton %s",
            path, made_for, version, device, triton.__version__,
        )  # fmt: skip
        return {}
    return tuned


def _is_config(values: Any) -> bool:
    """Lanes, channels, columns and warps that a kernel can be compiled for."""
    if not isinstance(values, list) or len(values) != 4 or not all(type(value) is int for value in values):
        return False
    lanes, channels, columns, warps = values
    powers_of_2 = all(0 < value <= 1024 and value & (value - 1) == 0 for value in (lanes, channels, warps))
    return powers_of_2 and 0 < columns <= 8 and warps <= 16


def write_tuned(path: Path, device: str, tuned: dict[str, Table]) -> None:
    """Replaces the file with configurations that were tuned on a GPU of that name."""
    rows = [[name, *key, list(config)] for name, table in tuned.items() for key, config in table.items()]
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(f".{os.getpid()}")
    partial.write_text(json.dumps({"device": device, "triton": triton.__version__, "configurations": rows}, indent=1))
    os.replace(partial, path)
