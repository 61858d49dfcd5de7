"""B0: training steps and inference, against torchvision's, and for inference OpenVINO and ONNX Runtime.

A training step is forward, cross-entropy and backward, in bfloat16 under autocast; a model for inference is converted
to bfloat16. Dropout and drop path are off, so that every implementation computes the same function. All models are
channels_last; OpenVINO and ONNX Runtime choose their own layout.
"""

import copy
import importlib.util
from collections.abc import Callable
from functools import cache, partial

import pytest
import torch
import torchvision
from pytest_benchmark.fixture import BenchmarkFixture
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.harness import (
    COMPILED,
    DTYPES,
    ONNXRUNTIME,
    OPENVINO,
    OURS,
    TORCHVISION,
    TWIN,
    Call,
    Make,
    dtype_name,
    images,
)
from effnet_fast import create_model
from effnet_fast.interop import to_torchvision
from effnet_fast.passes.backend import use_backend
from tests.test_interop import randomize_batch_norm

SECONDS = 20.0
# Of the loss's or the logits' norm. bfloat16: B0's 16 blocks round their activations (2^-9) a hundred times.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.2}


@cache
def models() -> tuple[nn.Module, nn.Module]:
    """B0 as this package and as torchvision build it, of the same weights, in evaluation."""
    torch.manual_seed(0)
    ours = create_model("b0", 1000, family="paper", drop_rate=0.0, drop_path_rate=0.0)
    with torch.no_grad():
        randomize_batch_norm(ours, images(4, 224))
    theirs = torchvision.models.efficientnet_b0(dropout=0.0, stochastic_depth_prob=0.0).eval()
    theirs.load_state_dict(to_torchvision(ours.state_dict()))
    return tuple(model.to(memory_format=torch.channels_last) for model in (ours, theirs))


def compiled(model: nn.Module) -> nn.Module:
    torch.compiler.reset()  # what other rows compiled is not needed any more
    return torch.compile(model)


def train_step(model: nn.Module, backend: str, size: int, dtype: torch.dtype, n: int) -> Call:
    model = copy.deepcopy(model).train()
    batch, labels = images(n, size), torch.arange(n) % 1000

    def step() -> list[Tensor]:
        with use_backend(backend), torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        model.zero_grad()
        return [loss.detach()]

    return step


def kept_bytes(model: nn.Module, backend: str, size: int, dtype: torch.dtype) -> float:
    """Bytes that the forward pass keeps for the backward for each image more, beside the parameters."""

    def kept(n: int) -> int:
        trained = copy.deepcopy(model).train()
        known = {p.untyped_storage().data_ptr() for p in trained.parameters()}
        storages: dict[int, tuple[int, Tensor]] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                storages[storage.data_ptr()] = storage.nbytes(), tensor  # held, so that no address is used again
            return tensor

        with (
            torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
            torch.autocast("cpu", dtype, enabled=dtype != torch.float32),
            use_backend(backend),
        ):
            trained(images(n, size))
        return sum(nbytes for nbytes, _ in storages.values())

    return (kept(4) - kept(2)) / 2


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(224, 16), (64, 64)], ids=str)
def test_train_step(
    race: Callable[..., None], benchmark: BenchmarkFixture, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    size, batch = shape
    ours, theirs = models()
    race(
        {
            OURS: partial(train_step, ours, "auto", size, dtype),
            TWIN: partial(train_step, ours, "eager", size, dtype),
            TORCHVISION: partial(train_step, theirs, "auto", size, dtype),
            COMPILED: lambda n: train_step(compiled(theirs), "auto", size, dtype, n),
        },
        examples=batch,
        seconds=SECONDS,
        tolerance=TOLERANCE[dtype],
        table="B0, training step",
        row={"input": f"{size} px, batch {batch}", "dtype": dtype_name(dtype)},
        unit="images/s",
    )
    rows = {OURS: (ours, "auto"), TWIN: (ours, "eager"), TORCHVISION: (theirs, "auto")}
    benchmark.extra_info["kept"] = {name: kept_bytes(*row, size, dtype) for name, row in rows.items()}


def forward(model: nn.Module, backend: str, size: int, dtype: torch.dtype, n: int) -> Call:
    batch = images(n, size).to(dtype)

    def call() -> list[Tensor]:
        with torch.inference_mode(), use_backend(backend):
            return [model(batch)]

    return call


@cache
def onnx_bytes() -> bytes:
    """torchvision's model as ONNX, for any batch and size."""
    any_size = torch.export.Dim.AUTO
    shapes = ({0: torch.export.Dim("batch", min=1), 2: any_size, 3: any_size},)
    with torch.no_grad():
        program = torch.onnx.export(
            models()[1], (images(2, 64).contiguous(),), dynamo=True, dynamic_shapes=shapes, verbose=False
        )
    return program.model_proto.SerializeToString()


def openvino_forward(size: int, dtype: torch.dtype, n: int) -> Call:
    import openvino

    batch = images(n, size).contiguous().numpy()
    options = {
        "INFERENCE_PRECISION_HINT": "f32" if dtype == torch.float32 else "bf16",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    core = openvino.Core()
    model = core.read_model(onnx_bytes())
    model.reshape(list(batch.shape))
    request = core.compile_model(model, "CPU", options).create_infer_request()
    return lambda: [torch.from_numpy(request.infer([batch])[0])]


def onnxruntime_forward(size: int, n: int) -> Call:
    import onnxruntime

    batch = images(n, size).contiguous().numpy()
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow down whoever comes next
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(onnx_bytes(), options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: batch}
    return lambda: [torch.from_numpy(session.run(None, feed)[0])]


def other_runtimes(size: int, dtype: torch.dtype) -> tuple[dict[str, Make], dict[str, str]]:
    """OpenVINO and ONNX Runtime, and why one of them is left out."""
    makes: dict[str, Make] = {}
    reasons = {}
    if not _installed("openvino"):
        reasons[OPENVINO] = "not installed"
    elif dtype != torch.float32 and not _openvino_has_bfloat16():
        reasons[OPENVINO] = "computes in float32 on this processor"
    else:
        makes[OPENVINO] = partial(openvino_forward, size, dtype)
    if not _installed("onnxruntime"):
        reasons[ONNXRUNTIME] = "not installed"
    elif dtype != torch.float32:
        reasons[ONNXRUNTIME] = "has no bfloat16 convolutions on CPUs"
    else:
        makes[ONNXRUNTIME] = partial(onnxruntime_forward, size)
    return makes, reasons


def _installed(runtime: str) -> bool:
    return all(importlib.util.find_spec(module) for module in (runtime, "onnxscript"))


def _openvino_has_bfloat16() -> bool:
    import openvino

    return "BF16" in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_name)
@pytest.mark.parametrize("shape", [(224, 16), (224, 1), (64, 64)], ids=str)
def test_inference(
    race: Callable[..., None], benchmark: BenchmarkFixture, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    size, batch = shape
    ours, theirs = (copy.deepcopy(model) for model in models())
    ours, theirs = ours.fuse().to(dtype), theirs.to(dtype)
    others, reasons = other_runtimes(size, dtype)
    benchmark.extra_info["left out"] = reasons
    race(
        {
            OURS: partial(forward, ours, "auto", size, dtype),
            TWIN: partial(forward, ours, "eager", size, dtype),
            TORCHVISION: partial(forward, theirs, "auto", size, dtype),
            COMPILED: lambda n: forward(compiled(theirs), "auto", size, dtype, n),
            **others,
        },
        examples=batch,
        seconds=SECONDS,
        tolerance=TOLERANCE[dtype],
        table="B0, inference",
        row={"input": f"{size} px, batch {batch}", "dtype": dtype_name(dtype)},
        unit="images/s",
    )
