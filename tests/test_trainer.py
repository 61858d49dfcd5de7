"""Steps of training: those that are not finite, clipped ones."""

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from effnet_fast.divergence import Diverged, first_not_finite
from effnet_fast.layers import MBConv
from effnet_fast.run_folder import read_checkpoint
from effnet_fast.trainer import Trainer
from tests.tiny import SMALL, assert_same_bits, config_of, finish, start, tiny_variant


@pytest.fixture(autouse=True)
def _tiny() -> Iterator[None]:
    with tiny_variant():
        yield


def trainer(**options: Any) -> Trainer:
    torch.manual_seed(0)
    return Trainer(config_of(**options), 10)


def test_drop_rates_are_the_options_or_else_the_variants() -> None:
    own = trainer().model
    assert own.dropout.p == 0.2
    assert [block.drop_path_rate for stage in own.stages for block in stage][-1] > 0.1
    changed = trainer(drop_rate=0.0, drop_path_rate=0.0).model
    assert changed.dropout.p == 0.0
    assert {block.drop_path_rate for stage in changed.stages for block in stage} == {0.0}


def batch(seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(8, 3, 32, 32, generator=generator), torch.randint(10, (8,), generator=generator)


def step(trained: Trainer, seed: int) -> None:
    torch.manual_seed(seed)  # for dropout and drop path
    trained.train_step([batch(seed)])


def tensors(trained: Trainer) -> dict[str, Any]:
    return {key: value for key, value in trained.state_dict().items() if key in ("model", "ema", "optimizer")}


@pytest.mark.parametrize("poison", ["images", "loss", "gradient"])
def test_a_bad_step_leaves_no_trace(poison: str) -> None:
    trained, expected = trainer(), trainer()
    for good in (trained, expected):
        step(good, 1)
    before = copy.deepcopy(tensors(trained))
    images, labels = batch(2)
    if poison == "images":
        images[3, 1, 5, 5] = torch.nan
        trained.train_step([(images, labels)])
    elif poison == "loss":
        criterion = trained.criterion
        trained.criterion = lambda logits, labels: criterion(logits, labels) * torch.inf
        trained.train_step([(images, labels)])
        trained.criterion = criterion
    else:
        handle = trained.model.head.conv.weight.register_hook(lambda gradient: gradient * torch.inf)
        trained.train_step([(images, labels)])
        handle.remove()
    assert trained.bad_steps == 1
    assert_same_bits(tensors(trained), before)
    step(trained, 3)
    step(expected, 3)
    assert trained.bad_steps == 0
    assert_same_bits(tensors(trained), tensors(expected))
    assert trained.mean_loss == expected.mean_loss
    assert (trained.step, expected.step) == (3, 2)


def test_too_many_bad_steps_in_a_row_end_the_run() -> None:
    trained = trainer(max_bad_steps=2)
    bad = batch(1)[0].fill_(torch.inf)
    trained.train_step([(bad, batch(1)[1])])
    step(trained, 2)
    trained.train_step([(bad, batch(1)[1])])
    with pytest.raises(Diverged, match=r"^diverged: not finite first: the images; .* 2 such .*epoch 1, step 4\)"):
        trained.train_step([(bad, batch(1)[1])])


@pytest.mark.parametrize(
    ("poisoned", "culprit"),
    [
        ("stem.conv", "the output of stem"),  # convolution, BatchNorm and SiLU are one op
        ("stages.3.0.project.conv", "the output of stages.3.0"),  # a block is one op
        ("classifier", "the output of classifier"),
    ],
)
def test_the_first_module_that_is_not_finite_is_named(poisoned: str, culprit: str) -> None:
    model = trainer().model
    with torch.no_grad():
        model.get_submodule(poisoned).weight[0] = torch.nan
    assert first_not_finite(model, batch(0)[0]) == culprit
    assert not model.stem._forward_hooks


def test_the_first_gradient_that_is_not_finite_is_named() -> None:
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    images = torch.ones(2, 3)
    model(images).sum().backward()
    assert first_not_finite(model, images) == "the loss"
    model[0].bias.grad[1] = torch.inf
    assert first_not_finite(model, images) == "the gradient of 0.bias"
    model[1].weight.grad[0, 0] = torch.nan
    assert first_not_finite(model, images) == "the gradient of 1.weight"


def test_fp16_overflow_lowers_the_scale_as_torchs_scaler_does() -> None:
    trained = trainer(amp="fp16")
    before = copy.deepcopy(trained.model.state_dict())
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 2.0**100})
    step(trained, 1)
    assert trained.scaler.get_scale() == 2.0**99
    assert_same_bits(trained.model.state_dict(), before)
    trained.scaler.load_state_dict(trained.scaler.state_dict() | {"scale": 1.0})
    step(trained, 1)
    assert trained.bad_steps == 0
    assert not torch.equal(trained.model.stem.conv.weight, before["stem.conv.weight"])


def test_gradients_are_clipped_to_the_norm() -> None:
    free, clipped, wide = trainer(), trainer(clip_grad=0.01), trainer(clip_grad=1e6)
    for trained in (free, clipped, wide):
        step(trained, 1)
    gradients = [[p.grad for p in trained.model.parameters()] for trained in (free, clipped, wide)]
    norm = torch.cat([g.flatten() for g in gradients[0]]).double().norm()
    assert norm > 0.01
    for exact, scaled, same in zip(*gradients, strict=True):
        # torch adds 1e-6 to the norm; the rest is float32 rounding
        torch.testing.assert_close(scaled, exact * (0.01 / norm).float(), rtol=1e-4, atol=1e-9)
        assert torch.equal(same, exact)


def test_accumulated_gradients_are_the_mean_over_the_images() -> None:
    trained = trainer(accumulate=2)
    twin = copy.deepcopy(trained.model).train()
    small, large = (tensor[:2] for tensor in batch(1)), batch(2)
    group = [tuple(small), large]
    torch.manual_seed(3)
    trained.train_step(group)
    torch.manual_seed(3)
    # Two backward passes by hand; the loss of each is a mean over its own images.
    for images, labels in group:
        loss = nn.functional.cross_entropy(twin(images), labels, label_smoothing=0.1, reduction="sum") / 10
        loss.backward()
    for (name, parameter), ours in zip(twin.named_parameters(), trained.model.parameters(), strict=True):
        # float32: a mean times a share against a sum divided once
        torch.testing.assert_close(ours.grad, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)
    assert (trained.step, trained.images) == (2, 10)


def test_frozen_modules_stay_as_they_are() -> None:
    trained = trainer(freeze="stem,stages.0, stages.2.0.se")
    before = copy.deepcopy(trained.model.state_dict())
    step(trained, 1)
    frozen = ("stem.", "stages.0.", "stages.2.0.se.")
    for name, tensor in trained.model.state_dict().items():
        assert torch.equal(tensor, before[name]) == name.startswith(frozen), name
    with pytest.raises(ValueError, match="--freeze: got 'neck', must be a module"):
        trainer(freeze="stem,neck")
    with pytest.raises(ValueError, match="leaves nothing to train"):
        trainer(freeze="stem,stages,head,classifier")


@pytest.mark.slow
def test_a_compiled_step_equals_an_eager_one() -> None:
    plain, compiled = trainer(), trainer(compile=True)
    for trained in (plain, compiled):
        for module in trained.model.modules():
            # A compiled model draws other random numbers.
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            elif isinstance(module, MBConv):
                module.drop_path_rate = 0.0
        step(trained, 1)
    for (name, one), other in zip(plain.model.named_parameters(), compiled.model.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5, msg=name)  # fused float32 sums


def test_profile_writes_a_trace(tmp_path: Path) -> None:
    options = [*SMALL, "--epochs", "1", "--profile", "--output", str(tmp_path / "run")]
    assert finish(start(*options, log=tmp_path / "log")) == 0
    events = json.loads((tmp_path / "run" / "trace.json").read_text())["traceEvents"]
    names = {event["name"] for event in events if "name" in event}
    assert "effnet_fast::backward_dwconv" in names
    assert len({name for name in names if name.startswith("ProfilerStep#")}) == 3


def test_a_diverging_run_ends_in_one_line_and_keeps_its_checkpoint(tmp_path: Path) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    options = [*SMALL, "--output", str(folder), "--epochs", "1"]
    assert finish(start(*options, log=log)) == 0
    good = read_checkpoint(folder / "checkpoint.pt")
    more = ["--resume", "auto", "--output", str(folder), "--epochs", "9", "--lr", "1e30", "--max-bad-steps", "3"]
    assert finish(start(*more, log=log)) == 2
    line = log.read_text().splitlines()[-1].rpartition("\r")[2]
    assert "error: diverged: not finite first: the output of " in line
    assert "the last of 3 such steps in a row" in line
    assert "Traceback" not in log.read_text()
    assert_same_bits(read_checkpoint(folder / "checkpoint.pt"), good)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_steps_by_cuda_graphs_are_those_without() -> None:
    """Dropout, running statistics and a validation in between included.

    In 16 bits it would show that matrix products run by other kernels while a graph is captured.
    """
    graphs, plain = (trainer(device="cuda", amp="off") for _ in range(2))
    plain._captures = False
    for trained in (graphs, plain):
        torch.cuda.manual_seed(1)
        for seed in range(4):
            trained.train_step([tuple(t.cuda() for t in batch(seed))])
            trained.model.eval()
            trained.model(batch(seed)[0][:3].cuda())
    assert type(graphs._forward) is nn.Sequential
    for key in ("model", "ema"):
        for name, value in graphs.state_dict()[key].items():
            expected = plain.state_dict()[key][name]
            torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
