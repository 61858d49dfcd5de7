"""Training steps of EfficientNet-B0, against torchvision's in the same process: ``python -m benchmarks.train_step``.

Prints images/s (median over interleaved rounds, in brackets the slowest and the fastest) and the ratio of medians to the
best eager row, as a Markdown table. A step is forward, cross-entropy, backward; both models are channels_last, and
both enjoy memory that is kept and in huge pages. Measure with nothing else running.
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", type=int, default=224, help="pixels")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    keep_freed_memory()
    steps = {
        f"{name}, {'float32' if amp == 'off' else 'bfloat16'}": make_step(build(), amp, args.size, args.batch_size)
        for name, build in (
            ("torchvision eager", lambda: torchvision.models.efficientnet_b0(num_classes=10)),
            ("effnet_fast", lambda: create_model("b0", family="paper")),
        )
        for amp in ("off", "bf16")
    }
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
    print(f"| B0, {args.size} px, batch {args.batch_size} | images/s | against the best eager |\n|---|---|---|")
    for name, times in seconds.items():
        low, middle, high = (args.batch_size / t for t in (max(times), medians[name], min(times)))
        print(f"| {name} | {middle:.1f} ({low:.1f} to {high:.1f}) | {best_eager / medians[name]:.2f} |")


if __name__ == "__main__":
    main()
