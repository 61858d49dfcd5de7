"""Throughput and peak memory of training and inference on one device: ``python -m benchmarks.gpu_train_step``.

B0 to B7 at their own resolutions with 1000 classes, bfloat16 autocast, channels_last, effnet_fast against torchvision's
model in eager mode, compiled, and with every block checkpointed; the former three also as a replayed CUDA graph, which
is how `effnet_fast.train` runs. Medians, with the ratio to the best of torchvision's.
Prints a Markdown table; --json writes every number.
"""

import argparse
import gc
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import nn
from torch.utils.checkpoint import checkpoint

from effnet_fast import create_model
from effnet_fast.passes.backend import use_backend
from effnet_fast.scaling import get_family, get_variant

VARIANTS = tuple(f"b{i}" for i in range(8))
KINDS = ("effnet_fast", "effnet_fast-graph", "eager", "eager-graph", "compiled", "compiled-graph", "checkpointed")


class Checkpointed(nn.Module):
    """torchvision's EfficientNet with every block run again in the backward pass."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for stage in self.model.features:
            for block in stage if isinstance(stage[0], torchvision.models.efficientnet.MBConv) else [stage]:
                x = checkpoint(block, x, use_reentrant=False)
        return self.model.classifier(self.model.avgpool(x).flatten(1))


def build(kind: str, variant: str) -> nn.Module:
    """The model of a row."""
    if kind.startswith("effnet_fast"):
        return create_model(variant, 1000, family="paper")
    model = getattr(torchvision.models, f"efficientnet_{variant}")()
    if kind.startswith("compiled"):
        return torch.compile(model)
    return Checkpointed(model) if kind == "checkpointed" else model


def make_run(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, training: bool) -> Callable[[], None]:
    model.train(training)
    device = images.device.type

    def run() -> None:
        with torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, cache_enabled=False):
            logits = model(images)
            loss = nn.functional.cross_entropy(logits, labels)
        if training:
            loss.backward()
            model.zero_grad()

    return run


def captured(run: Callable[[], None]) -> Callable[[], None]:
    """Replays of a CUDA graph of the run."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronized_seconds(run: Callable[[], None], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


def measure(variant: str, kind: str, training: bool, args: argparse.Namespace) -> dict[str, Any]:
    """One row: images/s (median, slowest, fastest) and peak memory in MiB, or why there are none."""
    device = torch.device(args.device)
    size = args.size or get_family("paper").input_size(get_variant(variant, "paper").scaling)
    row: dict[str, Any] = {"variant": variant, "kind": kind, "mode": "train" if training else "infer", "size": size}
    row["batch"] = args.batch_size
    gc.collect()
    try:
        model = build(kind, variant).to(device, memory_format=torch.channels_last)
        images = torch.randn(args.batch_size, 3, size, size, device=device)
        labels = torch.randint(1000, (args.batch_size,), device=device)
        run = make_run(model, images.contiguous(memory_format=torch.channels_last), labels, training)
        with use_backend(args.backend if kind.startswith("effnet_fast") else "auto"):
            for _ in range(args.warmup):
                synchronized_seconds(run, device)
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)
            if kind.endswith("-graph"):  # its capture allocates what its replays use
                run = captured(run)
            seconds = [synchronized_seconds(run, device) for _ in range(args.rounds)]
    except torch.OutOfMemoryError:
        return row | {"error": "out of memory"}
    low, middle, high = (args.batch_size / t for t in (max(seconds), statistics.median(seconds), min(seconds)))
    peak = torch.cuda.max_memory_allocated(device) / 2**20 if device.type == "cuda" else None
    return row | {"images_per_second": middle, "slowest": low, "fastest": high, "peak_mib": peak}


HEADER = "| variant | mode | kind | images/s | against the best other | peak MiB |\n|---|---|---|---|---|---|"


def markdown(row: dict[str, Any], group: list[dict[str, Any]]) -> str:
    """The row of a table, with the ratio to the fastest of torchvision's among those of the same variant and mode."""
    begin = f"| {row['variant']}, {row['size']} px, batch {row['batch']} | {row['mode']} | {row['kind']} |"
    if "error" in row:
        return f"{begin} {row['error']} | | |"
    others = [r["images_per_second"] for r in group if not r["kind"].startswith("effnet_fast") and "error" not in r]
    ratio = f"{row['images_per_second'] / max(others):.2f}" if others else ""
    peak = "" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    speed = f"{row['images_per_second']:.1f} ({row['slowest']:.1f} to {row['fastest']:.1f})"
    return f"{begin} {speed} | {ratio} | {peak} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_train_step", description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--backend", default="cuda", help="effnet_fast's (default: %(default)s)")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=VARIANTS)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--size", type=int, help="pixels; default: the variant's own")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = []
    print(HEADER)
    for variant in args.variants:
        for training in (True, False):
            kinds = [kind for kind in args.kinds if training or kind != "checkpointed"]
            group = [measure(variant, kind, training, args) for kind in kinds]
            print(*(markdown(row, group) for row in group), sep="\n", flush=True)
            rows += group
    if args.json:
        partial = args.json.with_suffix(".partial")
        partial.write_text(json.dumps({"torch": torch.__version__, "device": args.device, "rows": rows}, indent=1))
        os.replace(partial, args.json)


if __name__ == "__main__":
    main()
