"""A run's model and what it needs to look at images, for the commands that use one."""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from effnet_fast.augment import validation_images
from effnet_fast.cli import ArgumentParser, devices
from effnet_fast.data import IMAGE_EXTENSIONS, DataError, read_image
from effnet_fast.model import EfficientNet
from effnet_fast.run_folder import CHECKPOINTS, RunError, RunFolder


class RunModel(NamedTuple):
    """The moving average of a run's model in eval mode, the names of its classes, and its input size in pixels."""

    model: EfficientNet
    classes: tuple[str, ...]
    input_size: int

    @classmethod
    def load(cls, path: Path, checkpoint: str = "best") -> "RunModel":
        """Of the "best" or the "latest" checkpoint. Raises RunError or ValueError whose line names the file."""
        run = RunFolder(path)
        config = run.config()
        classes, size = config.get("classes"), config.get("input_size")
        strings = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
        if not strings or not isinstance(size, int) or size < 1:
            raise RunError(f"{path / 'config.json'}: lacks classes or input_size; give the folder of a training run")
        model = EfficientNet.from_pretrained(path / CHECKPOINTS[checkpoint])
        if model.classifier.out_features != len(classes):
            raise RunError(f"{path}: the {checkpoint} checkpoint does not fit the run's configuration")
        model.to(memory_format=torch.channels_last)
        return cls(model, tuple(classes), size)

    def read(self, path: Path) -> Tensor:
        """An image file as the model takes it: [1, 3, size, size], prepared as for validation. Raises DataError."""
        return validation_images([read_image(path)], self.input_size)


def add_run_arguments(parser: ArgumentParser) -> None:
    """RUN, --checkpoint and --device."""
    parser.add_argument("run", type=Path, help="folder that effnet_fast.train wrote")
    parser.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="default: best")
    parser.add_argument("--device", choices=devices(), default="cpu", help="default: cpu")


def image_files(path: Path) -> list[Path]:
    """The file itself; of a folder, the images in it and below, sorted. Raises DataError if there are none."""
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.rglob("*") if file.suffix.lower() in IMAGE_EXTENSIONS)
    if not files:
        raise DataError(f"{path}: no images ({', '.join(sorted(IMAGE_EXTENSIONS))})")
    return files
