import copy
import math

import pytest
import torch
from torch import nn

from effnet_fast.recipe import OPTIMIZERS, MovingAverage, default_lr, ema_decay, lr_factor, make_loss, make_optimizer


@pytest.mark.parametrize(
    ("epoch", "printed"),
    [(0, 0.1), (5, 0.6), (9, 1.0), (10, 1.0), (50, 0.6019), (100, 0.3191), (200, 0.0897), (349, 0.0135)],
)
def test_schedule_equals_the_factors_that_the_study_printed(epoch: int, printed: float) -> None:
    assert lr_factor(epoch) == pytest.approx(printed, abs=5e-5)  # printed to four decimals


def test_learning_rate_is_proportional_to_the_batch() -> None:
    assert default_lr(256) == 0.256
    assert default_lr(128) == 0.128


def test_optimizer_follows_rmsprop_with_momentum_in_float64() -> None:
    """The update rule written out by hand (Hinton's RMSprop, torch's placement of eps and momentum)."""
    weight = torch.tensor([0.3, -2.0], dtype=torch.float64)
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer([parameter], lr=0.05)
    square, velocity = torch.zeros_like(weight), torch.zeros_like(weight)
    for step in range(5):
        gradient = torch.tensor([math.sin(step), 3.0 - step], dtype=torch.float64)
        parameter.grad = gradient.clone()
        optimizer.step()
        gradient = gradient + 1e-5 * weight
        square = 0.9 * square + 0.1 * gradient**2
        velocity = 0.9 * velocity + gradient / (square.sqrt() + 0.1)
        weight = weight - 0.05 * velocity
    torch.testing.assert_close(parameter.detach(), weight, rtol=1e-12, atol=0)  # float64 rounding


def test_cosine_schedule_is_torchs_after_the_warmup() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=25)
    for epoch in range(35):
        if epoch < 10:
            assert lr_factor(epoch, "cosine", 35) == (epoch + 1) / 10
            continue
        # torch computes it step by step, in float64
        assert lr_factor(epoch, "cosine", 35) == pytest.approx(scheduler.get_last_lr()[0], abs=1e-12)
        optimizer.step()
        scheduler.step()
    assert lr_factor(3, "cosine", 5) == 0.4


def test_warmups_of_other_lengths() -> None:
    assert [lr_factor(epoch, "cosine", 6, warmup=2) for epoch in range(6)] == pytest.approx(
        [0.5, 1, 1, (1 + math.sqrt(0.5)) / 2, 0.5, (1 - math.sqrt(0.5)) / 2]
    )
    assert [lr_factor(epoch, "cosine", 2, warmup=0) for epoch in range(2)] == pytest.approx([1, 0.5])
    assert lr_factor(24, warmup=0) == pytest.approx(0.97**10)
    assert lr_factor(26, warmup=2) == pytest.approx(0.97**10)


def run_optimizer(name: str, weight_decay: float) -> tuple[torch.Tensor, list[torch.Tensor], torch.Tensor]:
    """The start, the gradients of five steps, and the result."""
    start = torch.tensor([0.3, -2.0], dtype=torch.float64)
    parameter = nn.Parameter(start.clone())
    optimizer = make_optimizer([parameter], 0.05, name, weight_decay)
    gradients = [torch.tensor([math.sin(step), 3.0 - step], dtype=torch.float64) for step in range(5)]
    for gradient in gradients:
        parameter.grad = gradient.clone()
        optimizer.step()
    return start, gradients, parameter.detach()


def test_rmsprop_tf_follows_tensorflows_rule() -> None:
    weight, gradients, result = run_optimizer("rmsprop-tf", 0.01)
    square, velocity = torch.ones_like(weight), torch.zeros_like(weight)
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        square = 0.9 * square + 0.1 * gradient**2
        velocity = 0.9 * velocity + 0.05 * gradient / (square + 1e-3).sqrt()
        weight = weight - velocity
    torch.testing.assert_close(result, weight, rtol=1e-12, atol=0)  # float64 rounding


def test_sgd_has_nesterov_momentum() -> None:
    weight, gradients, result = run_optimizer("sgd", 0.01)
    velocity = torch.zeros_like(weight)
    for gradient in gradients:
        gradient = gradient + 0.01 * weight
        velocity = 0.9 * velocity + gradient
        weight = weight - 0.05 * (gradient + 0.9 * velocity)
    torch.testing.assert_close(result, weight, rtol=1e-12, atol=0)  # float64 rounding


def test_adamw_decays_apart_from_the_gradient() -> None:
    weight, gradients, result = run_optimizer("adamw", 0.01)
    mean, square = torch.zeros_like(weight), torch.zeros_like(weight)
    for step, gradient in enumerate(gradients, 1):
        weight = weight * (1 - 0.05 * 0.01)
        mean = 0.9 * mean + 0.1 * gradient
        square = 0.999 * square + 0.001 * gradient**2
        weight = weight - 0.05 * (mean / (1 - 0.9**step)) / ((square / (1 - 0.999**step)).sqrt() + 1e-8)
    torch.testing.assert_close(result, weight, rtol=1e-12, atol=0)  # float64 rounding


def test_muon_makes_the_step_of_a_matrix_orthogonal() -> None:
    weight = torch.randn(24, 16, 1, 1, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weight.clone())
    optimizer = make_optimizer([parameter], 0.05, "muon", 0.01)
    parameter.grad = torch.randn(weight.shape, generator=torch.Generator().manual_seed(1))
    optimizer.step()
    step = (weight * (1 - 0.05 * 0.01) - parameter.detach()).flatten(1).double()
    u, s, v = torch.linalg.svd(parameter.grad.flatten(1).double(), full_matrices=False)
    turned = u.T @ step @ v.T / (0.05 * 0.2 * 24**0.5)  # as large as AdamW's, by Liu et al. 2025
    assert s.max() > 4 * s.min()
    # three iterations in bf16, which end with singular values from 0.6 to 1.2
    torch.testing.assert_close(turned, torch.eye(16, dtype=torch.float64), rtol=0, atol=0.4)


def test_each_optimizer_has_its_own_defaults() -> None:
    assert default_lr(512, "sgd") == 0.2
    assert default_lr(256, "adamw") == 2.5e-4
    parameter = nn.Parameter(torch.zeros(1))
    for name, preset in OPTIMIZERS.items():
        assert make_optimizer([parameter], 1.0, name).param_groups[0]["weight_decay"] == preset.weight_decay


def test_ema_without_warmup_and_with_another_decay() -> None:
    assert ema_decay(0, 0.5, warmup=False) == 0.5
    assert ema_decay(90, 0.5) == 0.5
    assert ema_decay(0, 0.5) == 0.1
    model = nn.Linear(1, 1, bias=False)
    ema = MovingAverage(model, 0.75, warmup=False)
    for value in (1.0, 2.0, 3.0):
        nn.init.constant_(model.weight, value)
        ema.update()
    assert ema.module.weight.item() == 0.75 * (0.75 * 1 + 0.25 * 2) + 0.25 * 3  # exact in binary


def test_shares_are_from_0_to_1() -> None:
    with pytest.raises(ValueError, match=r"label_smoothing: got 1\.5, must be from 0 to 1"):
        make_loss(1.5)
    with pytest.raises(ValueError, match=r"ema_decay: got 1\.5, must be from 0 to 1"):
        MovingAverage(nn.Linear(1, 1), 1.5)


def test_ema_warms_up_and_ends_at_the_study_decay() -> None:
    assert ema_decay(0) == 0.1
    assert ema_decay(90) == 0.91
    assert ema_decay(10**6) == 0.9999
    decays = [ema_decay(n) for n in range(100_000)]
    assert decays == sorted(decays)


def test_ema_equals_the_recursion_for_parameters_and_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    ema = MovingAverage(model)
    expected: dict[str, torch.Tensor] = {}
    for step in range(6):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
                else:
                    tensor += 1
        state = copy.deepcopy(model.state_dict())
        ema.update()
        for name, value in state.items():
            if step == 0 or not value.is_floating_point():
                expected[name] = value  # the first update copies; counters follow the model
            else:
                decay = (1 + step) / (10 + step)
                expected[name] = decay * expected[name] + (1 - decay) * value
        for name, value in ema.module.state_dict().items():
            torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12)  # float64 rounding


def test_loss_smooths_labels_and_takes_soft_targets() -> None:
    logits = torch.tensor([[2.0, -1.0, 0.5]], dtype=torch.float64)
    log_p = logits.log_softmax(1)[0]
    smoothed = -(0.9 * log_p[0] + 0.1 * log_p.mean())
    torch.testing.assert_close(make_loss()(logits, torch.tensor([0])), smoothed)
    torch.testing.assert_close(make_loss(0.0)(logits, torch.tensor([0])), -log_p[0])
    soft = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    expected = -((0.9 * soft[0] + 0.1 / 3) * log_p).sum()
    torch.testing.assert_close(make_loss()(logits, soft), expected)
