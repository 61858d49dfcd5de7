"""BatchNorm over the batches of several processes: as one process would compute it with all of them."""

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F

from effnet_fast import layers
from effnet_fast.passes.backend import use_backend
from tests.ops.test_ops import OPS, Block, relative_error
from tests.test_distributed import start_group
from tests.tiny import SMALL, finish, results

# All that normalize; with stride 2, no case has factors for single examples.
NAMES = ("mbconv", "mbconv_unexpanded", "mbconv_section", "dwconv_bn_silu", "conv_bn_act", "bn")
# Of nine images; unequal.
PARTS = (slice(0, 5), slice(5, 7), slice(7, 9))


def sample(name: str) -> tuple[Block, Tensor, Tensor]:
    """A block, its input, and the gradient of its output, in float64."""
    block = Block.make(16, 24, 48, 3, 2, False).double()
    x = torch.randn(9, 16 if OPS[name][3] else 48, 10, 7, dtype=torch.float64) + 3
    with torch.no_grad():
        out = OPS[name][2](OPS[name][1], block, x)
    dout = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    return Block.make(16, 24, 48, 3, 2, False), x, dout


def compute(op: Callable[..., Tensor], name: str, block: Block, x: Tensor, dout: Tensor) -> dict[str, Tensor]:
    """Output, gradients and running statistics after one step."""
    x = x.clone().requires_grad_()
    out = OPS[name][2](op, block, x)
    out.backward(dout)
    parameters = {**dict(block.norms.named_parameters()), **dict(block.weights.items())}
    found = {f"d {key}": p.grad for key, p in parameters.items() if p.grad is not None}
    return {"out": out.detach(), "dx": x.grad, **found, **dict(block.norms.named_buffers())}


def work(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=len(PARTS))
    found: dict[str, Any] = {}
    for name in NAMES:
        block, x, dout = sample(name)
        nn.SyncBatchNorm.convert_sync_batchnorm(block.norms)
        x, dout = x[PARTS[rank]], dout[PARTS[rank]]
        wide = block.double()
        found[name, "float64"] = compute(OPS[name][0], name, wide, x, dout)
        with use_backend("cpu"):
            found[name, "float32"] = compute(OPS[name][0], name, block, x.float(), dout.float())
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each process computed."""
    folder = tmp_path_factory.mktemp("parts")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.tiny"])
    group = [context.Process(target=work, args=(rank, folder)) for rank in range(len(PARTS))]
    for process in group:
        process.start()
    assert [finish(process) for process in group] == [0] * len(PARTS)
    return [torch.load(folder / f"{rank}.pt") for rank in range(len(PARTS))]


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("name", NAMES)
def test_ops_over_unequal_parts(parts: list[dict[str, Any]], name: str, dtype: str) -> None:
    block, x, dout = sample(name)
    expected = compute(OPS[name][1], name, block.double(), x, dout)
    found = [part[name, dtype] for part in parts]
    # float64 takes the twin, float32 the passes; both roundings as in one process.
    limit = 1e-12 if dtype == "float64" else 2e-5
    for key, value in expected.items():
        if key in ("out", "dx"):
            result = torch.cat([part[key] for part in found])
        elif key.startswith("d "):
            result = sum(part[key] for part in found)
        else:
            result = found[0][key]
            assert all(torch.equal(part[key], result) for part in found)  # running statistics
        if key.endswith("num_batches_tracked"):
            assert result == value
        elif value.norm() > 0:
            assert relative_error(result, value) < limit, key


def without_randomness() -> None:
    """Dropout and drop path draw numbers of each process's own."""
    F.dropout = lambda x, *_, **__: x
    layers.drop_path_scale = lambda *_, **__: None


def train(folder: Path, count: int, *options: str) -> Any:
    """The weights of a run of four steps of 32 images in so many processes."""
    options = (*SMALL, "--batch-size", str(32 // count), "--optimizer", "sgd", "--output", str(folder), *options)
    group = start_group(count, Path(f"{folder}.log"), *options, prepare=without_randomness)
    assert [finish(process) for process in group] == [0] * count, Path(f"{folder}.log.0").read_text()
    return results(folder)[0]["model"]


@pytest.mark.parametrize("backend", ["auto", "eager"])
def test_two_processes_train_as_one(tmp_path: Path, backend: str) -> None:
    one = train(tmp_path / "one", 1, "--backend", backend)
    two = train(tmp_path / "two", 2, "--backend", backend, "--sync-bn")
    apart = train(tmp_path / "apart", 2, "--backend", backend)

    def distance(state: Any) -> float:
        """The largest of any tensor, relative to it, or to 1e-2: means of what has mean zero are 1e-7, not zero."""
        tensors = {name: tensor.double() for name, tensor in one.items() if tensor.is_floating_point()}
        return max((state[name] - tensor).norm() / tensor.norm().clamp_min(1e-2) for name, tensor in tensors.items())

    # Float32's rounding after four steps (1e-5), and what the statistics of halves make of it.
    assert distance(two) < 2e-5
    assert distance(apart) > 5e-2
