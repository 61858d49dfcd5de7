"""Classify images with a run's model: ``python -m effnet_fast.predict RUN image...``."""

import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from io import TextIOWrapper
from itertools import islice
from pathlib import Path

import torch

from effnet_fast.cli import ArgumentParser, devices
from effnet_fast.memory import keep_freed_memory
from effnet_fast.run_model import Images, RunModel, add_run_arguments

TOP = 5
BATCH_SIZE = 16


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m effnet_fast.predict",
        description=__doc__,
        epilog="An image that can't be read gets one line on stderr; the others are classified, and the status is 1.",
    )
    add_run_arguments(parser)
    parser.add_argument("--device", choices=devices(), default="cpu", help="default: cpu")
    parser.add_argument(
        "images", nargs="+", metavar="image", help="files, or folders of them; - reads names from stdin, one a line"
    )
    parser.add_argument("--json", action="store_true", help="print one object a line instead of tables")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        run = RunModel.load(args.run, args.checkpoint)
    except ValueError as error:
        parser.error(str(error))
    run.model.fuse().to(args.device)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # names of files may be any bytes
    images = Images(_paths(args.images), parser.prog)
    prepared = ((file, run.prepare(pixels)) for file, pixels in images)
    while batch := list(islice(prepared, BATCH_SIZE)):
        files, tensors = zip(*batch, strict=True)
        with torch.inference_mode():
            probabilities = run.model(torch.cat(tensors).to(args.device)).softmax(1)
        values, indices = (t.tolist() for t in probabilities.topk(min(TOP, len(run.classes))))
        for file, *top in zip(files, values, indices, strict=True):
            _show(file, list(zip(*top, strict=True)), run.classes, args.json)
    sys.exit(1 if images.failed else 0)


def _paths(arguments: Iterable[str]) -> Iterator[Path]:
    for argument in arguments:
        if argument == "-":
            lines = (line.rstrip(b"\r\n") for line in sys.stdin.buffer)
            yield from (Path(os.fsdecode(line)) for line in lines if line)
        else:
            yield Path(argument)


def _show(file: Path, top: list[tuple[float, int]], classes: tuple[str, ...], as_json: bool) -> None:
    if as_json:
        rows = [{"class": classes[index], "index": index, "probability": value} for value, index in top]
        print(json.dumps({"image": str(file), "predictions": rows}), flush=True)
        return
    print(file)
    for value, index in top:
        print(f"  {100 * value:6.2f} %  {classes[index]}", flush=True)


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # ends quietly when `head` has seen enough
    main()
