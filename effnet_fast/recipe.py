"""The study's training recipe as pure functions of a few numbers: optimizer, schedule, loss, EMA."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

WARMUP_EPOCHS = 10
EMA_DECAY = 0.9999
LABEL_SMOOTHING = 0.1


def default_lr(batch_size: int) -> float:
    """Peak learning rate: 0.256 for a batch of 256, in proportion to the batch (paper, section 5.2)."""
    return 0.256 * batch_size / 256


def lr_factor(epoch: int) -> float:
    """The learning rate of an epoch (from 0) over its peak: ten epochs of linear warm-up, then 0.97 every 2.4."""
    if epoch < WARMUP_EPOCHS:
        return (epoch + 1) / WARMUP_EPOCHS
    return 0.97 ** ((epoch - WARMUP_EPOCHS) / 2.4)


def make_optimizer(parameters: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """RMSprop as the study has it: alpha .9, momentum .9, eps .1, weight decay 1e-5 on all parameters."""
    return torch.optim.RMSprop(parameters, lr=lr, alpha=0.9, momentum=0.9, eps=0.1, weight_decay=1e-5)


def make_loss() -> nn.Module:
    """Cross-entropy with label smoothing .1; takes class indices or soft targets."""
    return nn.CrossEntropyLoss(label_smoothing=LABEL_SMOOTHING)


def ema_decay(updates: int) -> float:
    """Decay of the next EMA update: (1 + n) / (10 + n) after n updates, at most .9999.

    Without the warm-up, an average with decay .9999 still holds mostly the initial weights after 10,000 steps.
    """
    return min(EMA_DECAY, (1 + updates) / (10 + updates))


def make_ema(model: nn.Module) -> AveragedModel:
    """An exponential moving average of a model's parameters and running statistics; update it after every step."""

    def update(averaged: Any, current: Any, updates: Tensor | int) -> None:
        decay = ema_decay(int(updates))
        if averaged[0].is_floating_point():
            torch._foreach_lerp_(averaged, current, 1 - decay)
        else:
            torch._foreach_copy_(averaged, current)

    return AveragedModel(model, multi_avg_fn=update, use_buffers=True)
