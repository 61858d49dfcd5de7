"""Show where runs look in images, by Grad-CAM: ``python -m effnet_fast.cam RUN image... --out FILE``."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

from effnet_fast.augment import MEAN, STD
from effnet_fast.cli import ArgumentParser, devices
from effnet_fast.memory import keep_freed_memory
from effnet_fast.run_folder import write_atomic
from effnet_fast.run_model import Images, RunModel, add_run_arguments


def heat_map(run: RunModel, image: Tensor) -> tuple[np.ndarray, Tensor]:
    """Grad-CAM (Selvaraju et al. 2017) of the last block for the most probable class, and all probabilities.

    image: [1, 3, size, size] of `RunModel.prepare`. Returns float32 [size, size] from 0 to 1, and [classes].
    """
    from pytorch_grad_cam import GradCAM

    *_, last_block = run.model.stages[-1].children()
    with GradCAM(model=run.model, target_layers=[last_block]) as cam:
        heat = cam(input_tensor=image, targets=None)[0]
        return heat, cam.outputs[0].detach().softmax(0).cpu()


def overlay(image: Tensor, heat: np.ndarray) -> np.ndarray:
    """The image under its heat map: uint8 [size, size, 3]."""
    from pytorch_grad_cam.utils.image import show_cam_on_image

    return show_cam_on_image(visible(image), heat, use_rgb=True)


def visible(image: Tensor) -> np.ndarray:
    """The pixels of a normalized image [1, 3, size, size]: float32 [size, size, 3] from 0 to 1."""
    pixels = image[0].permute(1, 2, 0) * torch.tensor(STD) + torch.tensor(MEAN)
    return pixels.clamp(0, 1).numpy()


def draw(runs: Sequence[tuple[str, RunModel]], images: Sequence[tuple[Path, Sequence[Tensor]]]) -> Figure:
    """A row for each image: itself, and beside it what each run looks at.

    runs: with the names that stand above their columns. images: files, and their images as each run takes them.
    """
    figure = Figure(figsize=(2.5 * (1 + len(runs)), 2.8 * len(images)), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(len(images), 1 + len(runs), squeeze=False)
    for axes in grid.flat:
        axes.axis("off")
    for row, (file, prepared) in zip(grid, images, strict=True):
        row[0].imshow(visible(prepared[0]))
        row[0].set_title(_plain(file.name), fontsize="small")
        for axes, (name, run), image in zip(row[1:], runs, prepared, strict=True):
            heat, probabilities = heat_map(run, image)
            best = int(probabilities.argmax())
            axes.imshow(overlay(image, heat))
            axes.set_title(
                f"{_plain(name)}\n{_plain(run.classes[best])}, {100 * probabilities[best]:.1f} %", fontsize="small"
            )
    return figure


def _plain(text: str) -> str:
    """Names come from outside: no markup, nothing that can't be drawn."""
    return text.encode(errors="replace").decode().replace("$", r"\$")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.cam", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--device", choices=devices(), default="cpu", help="default: cpu")
    parser.add_argument("images", nargs="+", type=Path, metavar="image", help="files, or folders of them")
    parser.add_argument(
        "--beside", type=Path, action="append", default=[], metavar="RUN", help="another run's column; may be repeated"
    )
    parser.add_argument("--out", type=Path, required=True, help="file to write: .png, .jpg, .pdf, .svg")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    args = parser.parse_args(argv)
    if args.out.suffix[1:] not in FigureCanvasAgg.filetypes:
        parser.error(f"argument --out: got {str(args.out)!r}, must end with .png, .jpg, .pdf or .svg")
    try:
        runs = [(path.resolve().name, RunModel.load(path, args.checkpoint)) for path in (args.run, *args.beside)]
        for _, run in runs:
            run.model.to(args.device)
        images = Images(args.images, parser.prog)
        rows = [(file, [run.prepare(pixels) for _, run in runs]) for file, pixels in images]
        if not rows:
            parser.error("no image can be read")
        figure = draw(runs, rows)
        write_atomic(args.out, lambda file: figure.savefig(file, format=args.out.suffix[1:], dpi=150))
    except ImportError as error:
        parser.error(f"{error.name} is not installed, run `pip install effnet_fast[cam]`")
    except OSError as error:
        parser.error(f"argument --out: can't write {args.out}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    sys.exit(1 if images.failed else 0)


if __name__ == "__main__":
    main()
