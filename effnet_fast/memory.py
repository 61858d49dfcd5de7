"""Memory: how this process holds that of its tensors, how much there is, and how amounts are written."""

import logging
import os
import re
import resource
from pathlib import Path

import torch

from effnet_fast import _host
from effnet_fast.ops.memory_policy import POLICIES, Memory

_LOG = logging.getLogger("effnet_fast")


def keep_freed_memory() -> None:
    """Reuse the memory of freed CPU tensors, in huge pages: for this whole process, before its first tensor is made.

    A large tensor is otherwise mapped anew each time it is allocated, and writing it costs page faults: 54,000 of them
    and a tenth of the time in a training step of B0 (224 px, batch 16), against 12. The process then keeps its peak
    memory until it ends. The commands call this; a program that embeds the model may.
    """
    if not _host.keep_freed_memory():
        _LOG.warning("this C library can't keep freed memory: large tensors cost page faults at every step")
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read by torch's allocator at its first use


# Address space that threads yet to start take for their stacks and heaps.
_OF_THREADS = 160_000_000

_UNITS = {
    f"{prefix}{end}": base**power for power, prefix in enumerate("KMGT", 1) for end, base in (("B", 1000), ("iB", 1024))
}


def parse_memory(memory: str | int) -> Memory | int:
    """A policy as it is, or bytes: an int, or "8GB" (8 * 10^9), "7.5GiB" (7.5 * 2^30), "512MB".

    Raises ValueError naming the choices for anything else.
    """
    if isinstance(memory, int) and memory > 0:
        return memory
    for policy in POLICIES:
        if memory == policy:
            return policy
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]i?B)", str(memory))
    if match is None:
        raise ValueError(f"memory: got {memory!r}, choose from {', '.join(POLICIES)}, or an amount as 8GB or 7.5GiB")
    return int(float(match[1]) * _UNITS[match[2]])


def format_bytes(count: int) -> str:
    """An amount for people, as "7.62 GB" (10^9) or "15.3 MB" (10^6)."""
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def available_bytes(device: torch.device) -> int:
    """What this process could still allocate on a device: the least that machine, container and limits leave."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    meminfo = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    left = [int(meminfo["MemAvailable"].split()[0]) * 1024]
    address_space, _ = resource.getrlimit(resource.RLIMIT_AS)
    if address_space != resource.RLIM_INFINITY:
        used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        left.append(address_space - used - _OF_THREADS)
    group = Path("/sys/fs/cgroup")  # of a container, version 2
    try:
        limit = (group / "memory.max").read_text().strip()
        if limit != "max":
            left.append(int(limit) - int((group / "memory.current").read_text()))
    except OSError:
        pass  # no limit
    return max(0, min(left))


def ran_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: of torch on any device, of Python, or of a thread's stack."""
    # torch has no class of its own for the CPU's, nor Python for threads'
    known = ("DefaultCPUAllocator", "bad_alloc", "Cannot allocate memory", "can't start new thread")
    return isinstance(error, MemoryError | torch.OutOfMemoryError) or any(text in str(error) for text in known)
