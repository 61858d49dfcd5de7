"""Write a run's model for other programs: ``python -m effnet_fast.export RUN --format onnx``."""

import json
import logging
import shutil
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from effnet_fast.augment import MEAN, STD
from effnet_fast.cli import ArgumentParser
from effnet_fast.interop import to_timm, to_torchvision
from effnet_fast.memory import keep_freed_memory
from effnet_fast.passes.backend import use_backend
from effnet_fast.run_folder import write_atomic
from effnet_fast.run_model import RunModel, add_run_arguments

# Between what a file computes and what the model does, relative to the largest logit.
TOLERANCE = 1e-4


class ExportError(ValueError):
    """A program that does not compute what the model does; the message is one line."""


Forward = Callable[[Tensor], Tensor]
Write = Callable[[nn.Module, Tensor, Path, dict[str, str]], Forward]


def _onnx(model: nn.Module, images: Tensor, file: Path, description: dict[str, str]) -> Forward:
    import onnxruntime

    program = torch.onnx.export(
        model,
        (images,),
        dynamo=True,
        dynamic_shapes=_any_batch(),
        input_names=["images"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props.update(description)
    program.save(str(file))
    session = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"images": x.numpy()})[0])


def _torchscript(model: nn.Module, images: Tensor, file: Path, description: dict[str, str]) -> Forward:
    torch.jit.save(torch.jit.trace(model, images), file, description)
    return torch.jit.load(file)


def _pt2(model: nn.Module, images: Tensor, file: Path, description: dict[str, str]) -> Forward:
    program = torch.export.export(model, (images,), dynamic_shapes=_any_batch())
    torch.export.save(program, file, extra_files=description)
    return torch.export.load(file).module()


def _aoti(model: nn.Module, images: Tensor, file: Path, description: dict[str, str]) -> Forward:
    program = torch.export.export(model, (images,), dynamic_shapes=_any_batch())
    options = {"aot_inductor.metadata": description}
    torch._inductor.aoti_compile_and_package(program, package_path=str(file), inductor_configs=options)
    return torch._inductor.aoti_load_package(str(file))


def _any_batch() -> tuple[dict[int, Any]]:
    return ({0: torch.export.Dim("batch", min=1)},)


# How to write a program and load what was written, and the file's name by default.
PROGRAMS: dict[str, tuple[Write, str]] = {
    "onnx": (_onnx, "model.onnx"),
    "torchscript": (_torchscript, "model.pt"),
    "pt2": (_pt2, "model.pt2"),
    "aoti": (_aoti, "model-aoti.pt2"),
}
# Other libraries' names of the weights.
NAMES: dict[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]] = {"torchvision": to_torchvision, "timm": to_timm}


def export_program(run: RunModel, output: Path, kind: str) -> None:
    """Write the model in plain PyTorch's operators, BatchNorms folded: float32 [N, 3, size, size] to logits, any N.

    The file is loaded again and must compute what the model does before it takes `output`'s place.
    Raises ExportError, ImportError or OSError.
    """
    write, name = PROGRAMS[kind]
    size = run.input_size
    batches = [torch.randn(n, 3, size, size, generator=torch.Generator().manual_seed(n)) for n in (1, 2, 5)]
    facts = {"classes": run.classes, "input_size": size, "crop_pct": run.crop_pct, "mean": MEAN, "std": STD}
    with torch.no_grad(), tempfile.TemporaryDirectory() as folder:
        expected = [run.model(images) for images in batches]
        run.model.fuse()
        file = Path(folder, name)
        with use_backend("eager"), warnings.catch_warnings():
            # That TorchScript is deprecated, and what its tracer does not follow: it is compared below.
            warnings.simplefilter("ignore")
            forward = write(run.model, batches[1], file, {"effnet_fast": json.dumps(facts)})
            results = [forward(images) for images in batches]
        for logits, wanted in zip(results, expected, strict=True):
            difference, largest = (logits - wanted).abs().max().item(), wanted.abs().max().item()
            if not difference <= TOLERANCE * largest:
                raise ExportError(f"{kind}: its logits differ by {difference:.1e} of {largest:.1e} from the model's")
        with open(file, "rb") as source:
            write_atomic(output, lambda target: shutil.copyfileobj(source, target))


def export_weights(run: RunModel, output: Path, names: str) -> None:
    """Write the weights to a safetensors file under effnet_fast's own names or those of NAMES. Raises OSError."""
    if names == "effnet_fast":
        run.model.save_pretrained(output)
        return
    state = {name: tensor.contiguous() for name, tensor in NAMES[names](run.model.state_dict()).items()}
    content = safetensors.torch.save(state)
    write_atomic(output, lambda target: target.write(content))


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.export", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument(
        "--format",
        required=True,
        choices=(*PROGRAMS, "safetensors"),
        help="onnx; torchscript, which torch has deprecated; pt2, for torch.export.load; aoti, compiled for this kind "
        "of processor by AOTInductor; or safetensors, the weights alone",
    )
    parser.add_argument(
        "--names",
        choices=("effnet_fast", *NAMES),
        default="effnet_fast",
        help="of the weights; default: ours",
    )
    parser.add_argument("--output", type=Path, help="file to write; default: model.onnx and so on in the run's folder")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    args = parser.parse_args(argv)
    default = args.run / ("model.safetensors" if args.format == "safetensors" else PROGRAMS[args.format][1])
    output = args.output or default
    if args.names != "effnet_fast" and args.format != "safetensors":
        parser.error(f"argument --names: got {args.names!r}, goes with --format safetensors only")
    if output.suffix != default.suffix:
        parser.error(f"argument --output: got {str(output)!r}, must end with {default.suffix}")
    logging.getLogger("torch").setLevel(logging.ERROR)
    try:
        run = RunModel.load(args.run, args.checkpoint)
        if args.format == "safetensors":
            export_weights(run, output, args.names)
        else:
            export_program(run, output, args.format)
    except ImportError as error:
        parser.error(f"--format {args.format}: {error.name} is not installed, run `pip install effnet_fast[export]`")
    except OSError as error:
        parser.error(f"argument --output: can't write {output}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    print(f"{output}: {output.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
