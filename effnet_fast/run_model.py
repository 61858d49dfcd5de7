"""A run's model and what it needs to look at images, for the commands that use one."""

import sys
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_fast.augment import validation_images
from effnet_fast.cli import ArgumentParser
from effnet_fast.data import IMAGE_EXTENSIONS, DataError, check_crop_pct, read_image
from effnet_fast.model import EfficientNet
from effnet_fast.run_folder import CHECKPOINTS, RunError, RunFolder


class RunModel(NamedTuple):
    """The moving average of a run's model in eval mode, the names of its classes, and how it takes images.

    input_size: in pixels. crop_pct: share of an image's side that it sees.
    """

    model: EfficientNet
    classes: tuple[str, ...]
    input_size: int
    crop_pct: float

    @classmethod
    def load(cls, path: Path, checkpoint: str = "best") -> "RunModel":
        """Of the "best" or the "latest" checkpoint. Raises RunError or ValueError whose line names the file."""
        run = RunFolder(path)
        config = run.config()
        classes, size = config.get("classes"), config.get("input_size")
        strings = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not strings or not isinstance(size, int) or size < 1:
            raise RunError(f"{path / 'config.json'}: lacks classes or input_size; give the folder of a training run")
        crop_pct = config.get("crop_pct")
        try:
            check_crop_pct(crop_pct)
        except (TypeError, ValueError):
            raise RunError(f"{path / 'config.json'}: crop_pct is {crop_pct!r}, not a run's configuration") from None
        model = EfficientNet.from_pretrained(path / CHECKPOINTS[checkpoint])
        if model.classifier.out_features != len(classes):
            raise RunError(f"{path}: the {checkpoint} checkpoint does not fit the run's configuration")
        model.to(memory_format=torch.channels_last)
        return cls(model, tuple(classes), size, crop_pct)

    def prepare(self, image: Tensor) -> Tensor:
        """An image, uint8 [3, h, w], as the model takes it: [1, 3, size, size], as in validation."""
        return validation_images([image], self.input_size, self.crop_pct)


def add_run_arguments(parser: ArgumentParser) -> None:
    """RUN and --checkpoint."""
    parser.add_argument("run", type=Path, help="folder that effnet_fast.train wrote")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="default: best")


class Images:
    """The image files among paths and in folders: their names, and their pixels, uint8 [3, h, w].

    What can't be read gets one line on stderr, and `failed` is true from then on.
    """

    def __init__(self, paths: Iterable[Path], program: str) -> None:
        self.failed = False
        self._paths = paths
        self._program = program
        # Pillow's, of what is odd about a file that can be read.
        warnings.filterwarnings("ignore", module="PIL")

    def __iter__(self) -> Iterator[tuple[Path, Tensor]]:
        for path in self._paths:
            files = [path]
            if path.is_dir():
                files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS)
            if not files:
                self._report(f"{path}: no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
            for file in files:
                try:
                    pixels = read_image(file)
                except DataError as error:
                    self._report(str(error))
                else:
                    yield file, pixels

    def _report(self, message: str) -> None:
        self.failed = True
        print(f"{self._program}: {' '.join(message.split())}", file=sys.stderr)
