"""Figures of runs and plans, drawn without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from effnet_fast.run_folder import write_atomic


def plot_curves(metrics: list[dict[str, float]], title: str, path: Path) -> None:
    """Draw top-1 (raw and EMA weights) and losses over the epochs of one run into an image file."""
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    FigureCanvasAgg(figure)
    accuracy, loss = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in metrics]
    for axes, keys in ((accuracy, ("val_top1", "ema_top1")), (loss, ("train_loss", "val_loss"))):
        for key in keys:
            axes.plot(epochs, [row[key] for row in metrics], marker=".", label=key)
        axes.set_xlabel("epoch")
        axes.legend()
        axes.grid(alpha=0.3)
    accuracy.set_ylabel("top-1, %")
    loss.set_ylabel("cross-entropy")
    figure.suptitle(title)
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=120))


def plot_memory(curve: list[tuple[int, float]], named: Mapping[Any, tuple[int, float]], title: str, path: Path) -> None:
    """Draw the extra time of training steps over their memory into an image file. Pairs: bytes, 0.1 for 10 % more."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    axes.plot([peak / 1e9 for peak, _ in curve], [100 * time for _, time in curve], marker=".", label="fastest plan")
    for name, (peak, time) in named.items():
        axes.plot(peak / 1e9, 100 * time, "o", label=name)
    axes.set_xlabel("memory of a training step, GB")
    axes.set_ylabel("extra time, %")
    axes.set_title(title)
    axes.legend()
    axes.grid(alpha=0.3)
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=120))
