"""Figures of runs, studies and plans, drawn without a display."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from effnet_fast.run_folder import write_atomic
from effnet_fast.scaling import VARIANTS


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


def plot_scaling(panels: Mapping[str, Mapping[str, tuple[float, float, float]]], path: Path) -> None:
    """Draw top-1 against multiply-adds, as the paper's figure 8: in a panel, a line from the baseline to each variant.

    panels: by title, of each variant (MACs, top-1 in percent, its standard deviation).
    """
    figure = Figure(figsize=(4.2 * len(panels), 3.8), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, points) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for variant, (macs, top1, spread) in points.items():
            color = _color(variant)
            if "baseline" in points and variant != "baseline":
                axes.plot([points["baseline"][0] / 1e6, macs / 1e6], [points["baseline"][1], top1], color=color)
            axes.errorbar(macs / 1e6, top1, spread or None, fmt="o", capsize=3, color=color, label=variant)
        axes.set_title(title, fontsize="medium")
        axes.set_xlabel("multiply-adds, M")
        axes.set_ylabel("top-1, %")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=120))


def plot_training(panels: Mapping[str, Mapping[str, list[list[dict[str, float]]]]], path: Path) -> None:
    """Draw top-1 over the epochs of all runs; dashed: of the moving average.

    panels: by title, of each variant the metrics of its runs.
    """
    figure = Figure(figsize=(7 * len(panels), 4.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, variants) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for variant, runs in variants.items():
            for i, metrics in enumerate(runs):
                epochs = [row["epoch"] + 1 for row in metrics]
                label = variant if i == 0 else None
                axes.plot(epochs, [row["val_top1"] for row in metrics], color=_color(variant), label=label)
                axes.plot(epochs, [row["ema_top1"] for row in metrics], color=_color(variant), ls="--", lw=1)
        axes.set_title(f"{title}; dashed: moving average", fontsize="medium")
        axes.set_xlabel("epochs")
        axes.set_ylabel("top-1, %")
        axes.grid(alpha=0.3)
        axes.legend()
    write_atomic(path, lambda file: figure.savefig(file, format=path.suffix[1:], dpi=120))


def _color(variant: str) -> str:
    """The same in every figure."""
    return f"C{VARIANTS.index(variant)}"


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
