"""What every command of the package shares: errors in one line, and checked option values."""

import argparse
import math
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

import torch

from effnet_fast import __version__

Number = TypeVar("Number", int, float)


class ArgumentParser(argparse.ArgumentParser):
    """argparse with --version; wrong options end in one line on stderr (exit status 2), without the usage text."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_argument("--version", action="version", version=f"effnet_fast {__version__}")

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {' '.join(message.split())}\n")


def at_least(minimum: Number) -> Callable[[str], Number]:
    """An option's type: a finite number of `minimum`'s type that is not below it."""
    kind = type(minimum)

    def parse(text: str) -> Number:
        try:
            value = kind(text)
        except ValueError:
            value = kind(minimum) - 1
        if not (math.isfinite(value) and value >= minimum):
            noun = "an integer" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}, must be {noun} of at least {minimum}")
        return value

    return parse


def integers(text: str) -> list[int]:
    """An option's type: integers with commas between."""
    try:
        return [int(number) for number in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"got {text!r}, must be integers with commas between") from None


def devices() -> list[str]:
    """The names that --device may have here."""
    gpus = [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    return ["cpu", "cuda", *gpus] if gpus else ["cpu"]
