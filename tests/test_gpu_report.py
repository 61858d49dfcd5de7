"""What the compiler made of the CUDA passes, and what their traffic model says."""

import pytest

from benchmarks import gpu_report, gpu_traffic
from effnet_fast.passes.backend import why_unavailable

needs_extension = pytest.mark.skipif(why_unavailable("cuda") is not None, reason=str(why_unavailable("cuda")))


@pytest.fixture(scope="module")
def compiled() -> list[gpu_report.Kernel]:
    return gpu_report.kernels(gpu_report.built_extension())


@needs_extension
def test_nothing_spills_or_lives_in_local_memory(compiled) -> None:
    wrong = [k for k in compiled if k.stack or k.local or k.loads_local]
    assert not wrong


@needs_extension
def test_every_kernel_is_there_for_every_architecture(compiled) -> None:
    for architecture in {k.architecture for k in compiled}:
        depthwise = {
            (k.name, k.dtype, k.kernel_size, k.stride, k.vector > 1)
            for k in compiled
            if k.kernel_size and k.architecture == architecture
        }
        # three kernels, three dtypes, kernel sizes 3, 5, 7, strides 1, 2, with vectors and without
        assert len(depthwise) == 3 * 3 * 3 * 2 * 2


@needs_extension
def test_vectors_move_16_bytes(compiled) -> None:
    narrow = [
        k
        for k in compiled
        if k.vector > 1
        and not k.loads_16_bytes
        # 5x5 and 7x7 backward in 16 bits: bound by arithmetic, four channels a load, see plans.h
        and not (k.name == "depthwise_backward" and k.kernel_size > 3 and k.dtype != "float32")
    ]
    assert not narrow
    stores = [k for k in compiled if k.name in ("apply", "backward_apply") and k.vector > 1]
    assert stores
    assert all(k.stores_16_bytes for k in stores)


@needs_extension
def test_memory_bound_kernels_fill_half_of_the_multiprocessor(compiled) -> None:
    bound = [k for k in compiled if k.name in gpu_report.MEMORY_BOUND and k.name not in gpu_report.FEWER_WARPS]
    assert {k.name for k in bound} >= {"channel_stats", "pool", "apply", "backward_apply", "backward_sums"}
    assert [k for k in bound if k.occupancy < 0.5] == []


def test_occupancy_is_that_of_nvidias_calculator() -> None:
    # registers, shared bytes, threads, and the calculator's answer for sm_80 and sm_90
    for registers, shared_bytes, threads, a100, h100 in (
        (32, 0, 256, 1.0, 1.0),
        (64, 0, 256, 0.5, 0.5),
        (65, 0, 256, 0.375, 0.375),
        (128, 0, 448, 0.21875, 0.21875),
        (32, 49152, 256, 0.375, 0.5),
        (255, 0, 1024, 0.0, 0.0),
    ):
        assert gpu_report.occupancy(80, registers, shared_bytes, threads) == a100
        assert gpu_report.occupancy(90, registers, shared_bytes, threads) == h100


@pytest.mark.parametrize("variant", ["b0", "b7"])
@pytest.mark.parametrize("device", gpu_traffic.DEVICES, ids=lambda device: device.name)
def test_modelled_traffic_is_a_third_of_eager(variant: str, device: gpu_traffic.Device) -> None:
    step = gpu_traffic.step_model(variant, 64, 2, device)
    assert step["section traffic, eager, in-place SiLU / fused"] >= 2.8
    assert step["section traffic, eager / fused"] >= 2.6


def test_a_tile_reads_its_halo_once_more() -> None:
    """By hand: 56 columns in strips of 28, 3x3: each strip reads one column of the other's."""
    device = gpu_traffic.DEVICES[1]
    section = gpu_traffic.Section(64, 64, 56, 56, 3, 1, True, 16, 24)
    read, _ = gpu_traffic.depthwise_bytes(section, False, 2, device)
    whole = section.x * 2
    assert read in (whole, whole * 58 // 56)
    read, _ = gpu_traffic.depthwise_bytes(section, True, 2, device)
    assert read == whole * 58 // 56
