import copy
import math

import pytest
import torch
from torch import nn

from effnet_fast.recipe import default_lr, ema_decay, lr_factor, make_ema, make_loss, make_optimizer


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


def test_ema_warms_up_and_ends_at_the_study_decay() -> None:
    assert ema_decay(0) == 0.1
    assert ema_decay(90) == 0.91
    assert ema_decay(10**6) == 0.9999
    decays = [ema_decay(n) for n in range(100_000)]
    assert decays == sorted(decays)


def test_ema_equals_the_recursion_for_parameters_and_running_statistics() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).double()
    ema = make_ema(model)
    expected: dict[str, torch.Tensor] = {}
    for step in range(6):
        with torch.no_grad():
            for tensor in [*model.parameters(), *model.buffers()]:
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor))
                else:
                    tensor += 1
        state = copy.deepcopy(model.state_dict())
        ema.update_parameters(model)
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
    soft = torch.tensor([[0.25, 0.0, 0.75]], dtype=torch.float64)
    expected = -((0.9 * soft[0] + 0.1 / 3) * log_p).sum()
    torch.testing.assert_close(make_loss()(logits, soft), expected)
