"""Weights from files, to start a run from."""

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from effnet_fast.interop import from_timm, from_torchvision
from effnet_fast.model import EfficientNet
from effnet_fast.run_folder import check_archive


def load_weights(model: EfficientNet, path: Path) -> list[str]:
    """Copy the weights in a file of this package (a run's checkpoint: its average), torchvision or timm into the model.

    A classifier for another number of classes is left out. Nothing in the file is executed.

    Returns lines that say what was read and what was left out.
    Raises ValueError whose line names the file: unreadable, of other names, or of another model.
    """
    state = _read(path)
    try:
        if "features.0.0.weight" in state:
            source, weights = "torchvision", from_torchvision(state)
        elif "conv_stem.weight" in state:
            source, weights = "timm", from_timm(state)
        else:
            source, weights = "effnet_fast", dict(state)
    except ValueError as error:
        raise ValueError(f"--weights: {path}: {error}") from None
    lines = [f"Weights of {source} from {path}"]
    expected = model.state_dict()
    classifier = weights.get("classifier.weight")
    if classifier is not None and classifier.shape[:1] != expected["classifier.weight"].shape[:1]:
        weights |= {name: expected[name] for name in ("classifier.weight", "classifier.bias")}
        lines.append(f"Left out: the classifier of {len(classifier)} classes; ours starts anew")
    different = [name for name in expected if name not in weights or weights[name].shape != expected[name].shape]
    different += [name for name in weights if name not in expected]
    if different:
        raise ValueError(
            f"--weights: {path} is of another model: {len(different)} tensors differ, {different[0]} first; "
            "check --variant and --family (torchvision's and timm's are paper)"
        )
    model.load_state_dict(weights)
    return lines


def _read(path: Path) -> Mapping[str, Tensor]:
    try:
        content: Any
        if path.suffix == ".safetensors":
            content = safetensors.torch.load_file(path)
        else:
            with open(path, "rb") as file:
                # torch before 1.6 wrote no zip files.
                if zipfile.is_zipfile(file):
                    check_archive(file)
                file.seek(0)
                content = torch.load(file, map_location="cpu", weights_only=True)
    except OSError as error:
        raise ValueError(f"--weights: {path}: {error.strerror or error}") from None
    # Damaged files raise nearly every built-in exception.
    except Exception:
        raise ValueError(f"--weights: {path}: damaged, or not a file of weights") from None
    for wrapper in ("ema", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(wrapper), dict):
            content = content[wrapper]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ValueError(f"--weights: {path}: not a file of weights")
    return content
