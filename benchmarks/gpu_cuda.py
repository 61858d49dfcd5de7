"""What nvcc made of the CUDA passes."""

import re
import subprocess
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from benchmarks.gpu_traffic import depthwise_block
from benchmarks.machine_code import INSTRUCTION, Kernel, count, occupancy, resources, run_tool, widths

STORAGE = {"float": "float32", "__nv_bfloat16": "bfloat16", "__half": "float16"}
MEMORY_BOUND = ("channel_stats", "pool", "apply", "backward_sums", "backward_apply")
# Kernels of which fewer than half of the warps that fit run at once; the reason stands beside each in csrc/cuda.
FEWER_WARPS = ("backward_sums, silu", "backward_apply, silu", "depthwise", "depthwise_backward")


def launch_of(name: str, kernel_size: int, stride: int, value_bytes: int) -> tuple[int, int]:
    """(threads, bytes of shared memory) of a block at its largest: the limits of csrc/cuda/plans.h and launchers."""
    if name.startswith("depthwise"):
        return depthwise_block(name == "depthwise_backward", kernel_size, stride, value_bytes)
    others = {
        "merge_moments": (512, 12288),
        "multiply_columns": (1024, 4096),
        "multiply_rows": (256, 4608),
        "squeeze_weights_grad": (1024, 16384),
        "sum_parts": (1024, 4096),
    }
    shared = {"channel_stats": 9216, "pool": 8192, "backward_sums": 16384, "backward_sums, silu": 40960}
    return others.get(name, (256, shared.get(name, 2048 if name == "batch_norm_grad" else 0)))


def described(symbol: str) -> tuple[str, str, int, int, int]:
    """(name, storage type, kernel size, stride, channels that a thread loads at once) of a demangled kernel."""
    found = re.match(r"(?:void )?effnet_fast::(\w+?)_kernel(?:<(.*)>\()?", symbol)
    assert found is not None, symbol
    name, arguments = found[1], [re.sub(r"\(\w+\)", "", a.strip()) for a in (found[2] or "").split(",")]
    if name.startswith("depthwise"):
        if len(arguments) > 4:
            name = "depthwise" if "Statistics" in arguments[4] else "depthwise, affine"
        return name, arguments[0], int(arguments[1]), int(arguments[2]), int(arguments[3])
    if name.startswith("multiply"):  # of squeeze-excite: lanes, and what is done with the products
        return name, "float", 0, 0, 1
    if len(arguments) > 2 and arguments[2] in ("1", "true"):
        name += ", silu"
    return name, arguments[0] or "float", 0, 0, int(arguments[1]) if len(arguments) > 1 else 1


def demangled(symbols: list[str]) -> dict[str, str]:
    done = subprocess.run(["c++filt"], input="\n".join(symbols), capture_output=True, text=True, check=True)
    return dict(zip(symbols, done.stdout.splitlines(), strict=True))


def instruction_counts(binary: Path) -> dict[tuple[int, str], Counter[str]]:
    """Instructions of every kernel in a binary, by (architecture, symbol)."""
    counts: dict[tuple[int, str], Counter[str]] = {}
    architecture, current = 0, Counter[str]()
    for line in run_tool("cuobjdump", "-sass", binary).splitlines():
        if found := re.match(r"\s*code for sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function : (\S+)", line):
            current = counts[architecture, found[1]] = Counter()
        elif found := INSTRUCTION.match(line):
            current[found[1]] += 1
    return counts


def kernels(binary: Path) -> list[Kernel]:
    """Every kernel of a binary that nvcc made, for every architecture in it."""
    usages: dict[tuple[int, str], dict[str, int]] = {}
    architecture, symbol = 0, ""
    for line in run_tool("cuobjdump", "--dump-resource-usage", binary).splitlines():
        if found := re.search(r"arch = sm_(\d+)", line):
            architecture = int(found[1])
        elif found := re.match(r"\s*Function ([^:]+):", line):
            symbol = found[1]
        elif "REG:" in line:
            usages[architecture, symbol] = resources(line)
    names = demangled(sorted({symbol for _, symbol in usages}))
    counts = instruction_counts(binary)
    found_kernels = []
    for (architecture, symbol), usage in usages.items():
        name, storage, kernel_size, stride, vector = described(names[symbol])
        threads, shared = launch_of(name, kernel_size, stride, 4 if storage == "float" else 2)
        mix = counts[architecture, symbol]
        window = f"{kernel_size}x{kernel_size} / {stride}, " if kernel_size else ""
        found_kernels.append(
            Kernel(
                name=name,
                case=window + ("vectors" if vector > 1 else "scalars"),
                dtype=STORAGE[storage],
                architecture=architecture,
                registers=usage["REG"],
                stack=usage["STACK"] + usage["LOCAL"],
                spills=count(mix, "LDL", "STL"),
                shared=shared,
                threads=threads,
                occupancy=occupancy(architecture, usage["REG"], shared, threads),
                loads=widths(mix, "LDG", "LDGSTS"),
                stores=widths(mix, "STG"),
                ffma=count(mix, "FFMA"),
                seconds=None,
            )
        )
    return sorted(found_kernels, key=lambda k: (k.name, k.dtype, k.case, k.architecture))


def built_extension() -> Path:
    """The CUDA extension of this installation. Raises FileNotFoundError if there is none."""
    spec = find_spec("effnet_fast._cuda")
    if spec is None or spec.origin is None:
        raise FileNotFoundError("effnet_fast._cuda: not built; install with nvcc, or EFFNET_FAST_CUDA=1 to see why not")
    return Path(spec.origin)
