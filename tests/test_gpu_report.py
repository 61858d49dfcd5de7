"""What the compiler made of the CUDA passes, and what the traffic model says."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_cuda, gpu_report, gpu_traffic
from benchmarks.machine_code import Kernel, occupancy
from effnet_fast.passes.backend import why_unavailable

needs_extension = pytest.mark.skipif(why_unavailable("cuda") is not None, reason=str(why_unavailable("cuda")))


@pytest.fixture(scope="module")
def compiled() -> list[Kernel]:
    return gpu_cuda.kernels(gpu_cuda.built_extension())


@needs_extension
def test_nothing_spills_or_lives_in_local_memory(compiled: list[Kernel]) -> None:
    assert [k for k in compiled if k.stack or k.spills] == []


@needs_extension
def test_every_kernel_is_there_for_every_architecture(compiled: list[Kernel]) -> None:
    for architecture in {k.architecture for k in compiled}:
        depthwise = {
            (k.name, k.dtype, k.case) for k in compiled if "depthwise" in k.name and k.architecture == architecture
        }
        # three kernels, three dtypes, kernel sizes 3, 5, 7, strides 1, 2, with vectors and without
        assert len(depthwise) == 3 * 3 * 3 * 2 * 2


@needs_extension
def test_vectors_move_16_bytes(compiled: list[Kernel]) -> None:
    assert [k for k in compiled if k.case.endswith("vectors") and 16 not in k.loads] == []
    stores = [k for k in compiled if k.name in ("apply", "backward_apply") and k.case.endswith("vectors")]
    assert stores
    assert all(16 in k.stores for k in stores)


@needs_extension
def test_memory_bound_kernels_fill_half_of_the_multiprocessor(compiled: list[Kernel]) -> None:
    bound = [k for k in compiled if k.name in gpu_cuda.MEMORY_BOUND and k.name not in gpu_cuda.FEWER_WARPS]
    assert {k.name for k in bound} == set(gpu_cuda.MEMORY_BOUND)
    assert [k for k in bound if k.occupancy < 0.5] == []


@needs_extension
def test_the_report_is_written(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gpu_report.main(["--json", str(tmp_path / "report.json")])
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["backend"] == "cuda"
    printed = capsys.readouterr().out
    assert printed.count("| depthwise_backward |") == sum(k["name"] == "depthwise_backward" for k in report["kernels"])
    assert all(printed.count(f"| depthwise_backward {k}x{k} |") == 1 for k in (3, 5, 7))
    assert [step["variant"] for step in report["model"]] == [v for v in ("b0", "b7") for _ in gpu_traffic.DEVICES]
    # five passes without a window, three with six; each in 32 and 16 bits on every device
    assert len(report["bytes per element"]) == (5 + 3 * 6) * 2 * len(gpu_traffic.DEVICES)


def test_occupancy_is_that_of_nvidias_calculator() -> None:
    # registers, shared bytes, threads, and the calculator's answer for sm_80 and sm_90
    for registers, shared_bytes, threads, a100, h100 in (
        (32, 0, 256, 1.0, 1.0),
        (64, 0, 256, 0.5, 0.5),
        (65, 0, 256, 0.375, 0.375),
        (128, 0, 448, 0.21875, 0.21875),
        (32, 49152, 256, 0.375, 0.5),
        (32, 102400, 128, 0.0625, 0.125),
        (255, 0, 1024, 0.0, 0.0),
    ):
        assert occupancy(80, registers, shared_bytes, threads) == a100
        assert occupancy(90, registers, shared_bytes, threads) == h100


@pytest.mark.parametrize("backend", ["cuda", "triton"])
def test_a_pass_moves_its_activations_and_little_more(backend: str) -> None:
    """By hand: the activations that each pass reads and writes."""
    activations = {"channel_stats": 1, "pool": 1, "apply": 2, "backward_sums": 2, "backward_apply": 3}
    activations |= {"dwconv_stats": 2, "dwconv_affine": 2, "backward_dwconv": 4}
    section = gpu_traffic.Section(64, 144, 56, 56, 3, 1, True, 24, 24)
    for size in (2, 4):
        kernels = gpu_report.kernels_of(backend, gpu_traffic.DEVICES[0], size)
        moved = gpu_traffic.bytes_per_element(section, kernels)
        assert moved.keys() == activations.keys()
        for name, bytes_moved in moved.items():
            assert 1 <= bytes_moved / (size * activations[name]) < 1.15, name


@pytest.mark.parametrize("backend", ["cuda", "triton"])
@pytest.mark.parametrize("variant", ["b0", "b7"])
@pytest.mark.parametrize("device", gpu_traffic.DEVICES, ids=lambda device: device.name)
def test_modelled_traffic_is_about_a_third_of_eager(backend: str, variant: str, device: gpu_traffic.Device) -> None:
    """It was 2.8 and 3 times less when no gradient before BatchNorm went through memory: small ones are sooner so."""
    step = gpu_traffic.step_model(variant, 64, gpu_report.kernels_of(backend, device), device)
    assert step["section traffic, eager / fused"] >= 2.65
    assert step["section traffic, eager, in-place SiLU / fused"] >= 2.9


def test_a_tile_reads_its_halo_once_more() -> None:
    """By hand: 56 columns in strips of 28, or of 12 backward, 3x3: each reads one column of each neighbour's."""
    kernels = gpu_traffic.CudaKernels(2, 132)
    section = gpu_traffic.Section(64, 64, 56, 56, 3, 1, True, 16, 24)
    read, _ = kernels.depthwise(section, "dwconv_stats")
    assert read in (section.x, section.x * 58 // 56)
    read, _ = kernels.depthwise(section, "backward_dwconv")
    assert read == section.x * 64 // 56


def test_eager_pytorch_moves_what_its_ops_read_and_write() -> None:
    """By hand, in activations: BatchNorm 3, SiLU 2, convolution 2, BatchNorm 3, SiLU 2, mean 1, gate 2; backward gate
    2 + 3 + 1, mean 1, their sum 3, SiLU 3, BatchNorm 5, convolution 4, SiLU 3, BatchNorm 5. In-place SiLU copies first.
    """
    section = gpu_traffic.Section(2, 64, 56, 56, 3, 1, True, 16, 24)
    for inplace, activations in ((False, 45), (True, 49)):
        moved = sum(work.bytes for work in gpu_traffic.eager_section(section, torch.bfloat16, inplace))
        assert moved / (2 * section.x) == pytest.approx(activations, abs=0.2)


def test_a_step_is_its_sections_and_what_is_around_them() -> None:
    """By hand, B0: of stem and head, BatchNorm and SiLU take 13 activations in eager mode and 8 fused."""
    blocks = gpu_traffic.sections("b0", 2)
    eager, fused = (sum(w.bytes for w in gpu_traffic.stem_and_head("b0", blocks, 2, fused)) for fused in (False, True))
    assert eager - fused == 5 * 2 * 2 * (32 * 112**2 + 1280 * 7**2)
    device = gpu_traffic.DEVICES[0]
    step = gpu_traffic.step_model("b0", 2, gpu_report.kernels_of("cuda", device), device)
    for kind in ("fused", "eager"):
        assert step[f"{kind}: section GB"] < step[f"{kind}: step GB"] < 2 * step[f"{kind}: section GB"]
