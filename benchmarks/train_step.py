"""Training steps of EfficientNet-B0, against torchvision's in the same process: ``python -m benchmarks.train_step``.

Prints, as a Markdown table, images/s (median over interleaved rounds, in brackets the slowest and the fastest), the
ratio of medians to the best eager row, and what the forward pass keeps for the backward. A step is forward,
cross-entropy, backward; both models are channels_last, and both enjoy memory that is kept and in huge pages. Measure
with nothing else running.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torchvision
from torch import nn

from effnet_fast import create_model
from effnet_fast.amp import autocast
from effnet_fast.doctor import processor
from effnet_fast.memory import keep_freed_memory
from effnet_fast.passes.backend import cpu_isa

CPU = torch.device("cpu")


def make_step(model: nn.Module, amp: str, size: int, batch: int) -> Callable[[], None]:
    model.to(memory_format=torch.channels_last).train()
    images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(10, (batch,))

    def step() -> None:
        with autocast(CPU, amp):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        model.zero_grad()

    return step


def kept_bytes(build: Callable[[], nn.Module], amp: str, size: int) -> float:
    """Bytes that the forward pass keeps for the backward for each image more, beside the parameters."""

    def kept(batch: int) -> int:
        model = build().to(memory_format=torch.channels_last)
        known = {p.untyped_storage().data_ptr() for p in model.parameters()}
        storages: dict[int, tuple[int, torch.Tensor]] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used again
            return tensor

        images = torch.randn(batch, 3, size, size).contiguous(memory_format=torch.channels_last)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast(CPU, amp):
            model(images)
        return sum(nbytes for nbytes, _ in storages.values())

    return (kept(4) - kept(2)) / 2


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    models: dict[str, Callable[[], nn.Module]] = {
        "torchvision eager": lambda: torchvision.models.efficientnet_b0(num_classes=10),
        "effnet_fast": lambda: create_model("b0", family="paper"),
    }
    rows = {
        f"{name}, {'float32' if amp == 'off' else 'bfloat16'}": (build, amp)
        for name, build in models.items()
        for amp in ("off", "bf16")
    }
    steps = {name: make_step(build(), amp, args.size, args.batch_size) for name, (build, amp) in rows.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for round_number in range(args.rounds + 2):
        for name, step in steps.items():
            start = time.perf_counter()
            step()
            if round_number >= 2:  # two rounds to warm up the allocator
                seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    best_eager = min(median for name, median in medians.items() if name.startswith("torchvision"))
    print(f"{processor()}, {torch.get_num_threads()} threads, {cpu_isa()}, torch {torch.__version__}\n")
    print(f"| B0, {args.size} px, batch {args.batch_size} | images/s | against the best eager | kept, MiB an image |")
    print("|---|---|---|---|")
    for name, times in seconds.items():
        low, middle, high = (args.batch_size / t for t in (max(times), medians[name], min(times)))
        kept = kept_bytes(*rows[name], args.size) / 2**20
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {best_eager / medians[name]:.2f} | {kept:.1f} |")


if __name__ == "__main__":
    main()
