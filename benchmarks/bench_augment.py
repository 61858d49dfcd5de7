"""Images per second that both recipes make of CIFAR-sized images, on the CPU and on a GPU if any."""

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture

from effnet_fast.augment import AUGMENTS, train_loader
from effnet_fast.data import TensorSplit

BATCH = 128
BATCHES = 8
DEVICES = ["cpu"] + ["cuda"] * torch.cuda.is_available()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("augment", AUGMENTS)
def test_train_epoch(benchmark: BenchmarkFixture, augment: str, size: int, device: str) -> None:
    count = BATCH * BATCHES
    images = torch.randint(0, 256, (count, 3, 32, 32), dtype=torch.uint8)
    split = TensorSplit(images, torch.zeros(count, dtype=torch.int64))
    loader = train_loader(split, augment=augment, size=size, batch_size=BATCH, seed=0, device=device)

    def epoch() -> None:
        for _ in loader.epoch(0):
            pass
        if device == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(epoch, rounds=5, warmup_rounds=1)
    benchmark.extra_info["images/s"] = round(count / benchmark.stats["median"])
