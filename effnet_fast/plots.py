"""Figures of a run, drawn without a display."""

from pathlib import Path

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
