"""A model in one file: its weights as safetensors, and its configuration as JSON in their header."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
from torch import Tensor

from effnet_fast.run_folder import write_atomic

FILE_NAME = "model.safetensors"


class PretrainedError(ValueError):
    """A file that holds no such model; the message is one line that names it."""


def write_pretrained(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> Path:
    """Write a state dict and what its model is built with, atomically; returns the file's path.

    path: a file named ``*.safetensors``, or a folder for ``model.safetensors``; folders are made where there are none.
    Raises OSError.
    """
    file = _file(path)
    file.parent.mkdir(parents=True, exist_ok=True)
    # safetensors has no memory formats.
    tensors = {name: tensor.contiguous() for name, tensor in state.items()}
    content = safetensors.torch.save(tensors, metadata={"config": json.dumps(config)})
    write_atomic(file, lambda handle: handle.write(content))
    return file


def read_pretrained(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """What `write_pretrained` wrote: state dict and configuration. Raises PretrainedError."""
    file = _file(path)
    try:
        with safetensors.safe_open(file, framework="pt") as handle:
            metadata = handle.metadata() or {}
            state = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118 not a dict
    except OSError as error:
        raise PretrainedError(f"{file}: {error.strerror or error}") from None
    # Damaged files raise nearly every built-in exception.
    except Exception:
        raise PretrainedError(f"{file}: damaged, or not a safetensors file") from None
    try:
        config = json.loads(metadata["config"])
    except (LookupError, ValueError, RecursionError):
        raise PretrainedError(f"{file}: has no configuration of a model, save_pretrained did not write it") from None
    return state, config


def _file(path: Path) -> Path:
    return path if path.suffix == ".safetensors" else path / FILE_NAME
