"""The training recipe as functions of a few numbers: optimizer, schedule, loss, EMA. The defaults are the study's."""

import copy
import math
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from effnet_fast.passes.backend import current
from effnet_fast.rmsprop import FusedRMSprop

WARMUP_EPOCHS = 10
EMA_DECAY = 0.9999
LABEL_SMOOTHING = 0.1

SCHEDULES = ("exponential", "cosine")


class Preset(NamedTuple):
    """An optimizer's defaults: the peak learning rate for a batch of 256, and the weight decay."""

    lr: float
    weight_decay: float


# RMSprop: paper, section 5.2. SGD: Goyal et al. 2017. AdamW: Touvron et al. 2021. Muon: ours, 4e-3 for
# CIFAR-10 in batches of 128.
OPTIMIZERS = {
    "rmsprop": Preset(0.256, 1e-5),
    "rmsprop-tf": Preset(0.256, 1e-5),
    "sgd": Preset(0.1, 1e-4),
    "adamw": Preset(2.5e-4, 0.05),
    "muon": Preset(8e-3, 0.1),
}


def default_lr(batch_size: int, optimizer: str = "rmsprop") -> float:
    """Peak learning rate: the optimizer's for a batch of 256, in proportion to the batch."""
    return OPTIMIZERS[optimizer].lr * batch_size / 256


def lr_factor(epoch: int, schedule: str = "exponential", epochs: int = 0, warmup: int = WARMUP_EPOCHS) -> float:
    """The learning rate of an epoch (from 0) over its peak: `warmup` epochs of linear warm-up, then the schedule.

    schedule: "exponential", 0.97 every 2.4 epochs; or "cosine", half a cosine down to 0 at the end of `epochs`
        (Loshchilov & Hutter 2017).
    """
    if epoch < warmup:
        return (epoch + 1) / warmup
    if schedule == "cosine":
        return (1 + math.cos(math.pi * (epoch - warmup) / (epochs - warmup))) / 2
    return 0.97 ** ((epoch - warmup) / 2.4)


def make_optimizer(
    parameters: Iterable[nn.Parameter], lr: float, name: str = "rmsprop", weight_decay: float | None = None
) -> torch.optim.Optimizer:
    """An optimizer of OPTIMIZERS; weight decay on all parameters.

    "rmsprop": as the study has it, alpha .9, momentum .9, eps .1. "rmsprop-tf": TensorFlow's rule, by timm (eps .001
    under the root, squares start at 1, learning rate inside the momentum). "sgd": Nesterov momentum .9. "muon": by
    timm; steps of matrices, 1x1 convolutions among them, are made orthogonal (Jordan et al. 2024), Nesterov momentum
    .95, and what remains goes by NAdamW. All are fused where there is such a one: "rmsprop" on the CPU, in float32 and
    unless the backend is "eager".
    Raises ValueError if timm is needed and missing, or too old.
    """
    if weight_decay is None:
        weight_decay = OPTIMIZERS[name].weight_decay
    if name == "sgd":
        return torch.optim.SGD(parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay, fused=True)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay, fused=True)
    if name in ("rmsprop-tf", "muon"):
        try:
            from timm.optim import Muon, RMSpropTF
        except ImportError:
            raise ValueError(f"--optimizer {name}: needs timm 1.0.21 or newer, run `pip install -U timm`") from None
        if name == "muon":
            # Three iterations, as Jordan has them for CIFAR-10: 8 epochs of 10,000 images end as with timm's five (79.1
            # and 79.3 %), and a step of the study's baseline takes 88 ms of 480, not 129 (Emerald Rapids, two cores).
            return Muon(
                parameters,
                lr=lr,
                momentum=0.95,
                nesterov=True,
                weight_decay=weight_decay,
                ns_steps=3,
                ns_coefficients="original",
            )
        return RMSpropTF(parameters, lr=lr, alpha=0.9, momentum=0.9, eps=1e-3, weight_decay=weight_decay)
    parameters = list(parameters)
    plain = current() == "eager" or any(p.device.type != "cpu" or p.dtype != torch.float32 for p in parameters)
    rmsprop = torch.optim.RMSprop if plain else FusedRMSprop
    return rmsprop(parameters, lr=lr, alpha=0.9, momentum=0.9, eps=0.1, weight_decay=weight_decay)


def make_loss(label_smoothing: float = LABEL_SMOOTHING) -> nn.Module:
    """Cross-entropy with label smoothing (ValueError outside 0..1); takes class indices or soft targets."""
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing: got {label_smoothing}, must be from 0 to 1")
    return nn.CrossEntropyLoss(label_smoothing=label_smoothing)


def ema_decay(updates: int, decay: float = EMA_DECAY, warmup: bool = True) -> float:
    """Decay of the next EMA update: (1 + n) / (10 + n) after n updates, at most `decay`; always that without warm-up.

    Without the warm-up, an average with decay .9999 still holds mostly the initial weights after 10,000 steps.
    """
    return min(decay, (1 + updates) / (10 + updates)) if warmup else decay


class MovingAverage:
    """An exponential moving average of a model's parameters and running statistics; update it after every step.

    module: a copy of the model that holds the average. updates: how many there were; the first one copies.
    PyTorch's AveragedModel is the same, but looks all tensors up at every update, for 13 ms of a step of 307 ms (the
    study's depth variant at 32 px, Zen 5).
    Raises ValueError unless the decay is in 0..1.
    """

    def __init__(self, model: nn.Module, decay: float = EMA_DECAY, warmup: bool = True) -> None:
        if not 0 <= decay <= 1:
            raise ValueError(f"ema_decay: got {decay}, must be from 0 to 1")
        self.module = copy.deepcopy(model)
        self.updates = 0
        self._decay = decay
        self._warmup = warmup
        self._averages, self._counters = _tensors(self.module)
        self._values, self._counts = _tensors(model)

    def update(self) -> None:
        """Take in the model's present state."""
        decay = ema_decay(self.updates, self._decay, self._warmup) if self.updates else 0.0
        torch._foreach_lerp_(self._averages, self._values, 1 - decay)
        if self._counters:
            torch._foreach_copy_(self._counters, self._counts)
        self.updates += 1


def _tensors(model: nn.Module) -> tuple[list[Tensor], list[Tensor]]:
    """Parameters and running statistics; and counters."""
    tensors = [tensor.detach() for tensor in (*model.parameters(), *model.buffers())]
    return [t for t in tensors if t.is_floating_point()], [t for t in tensors if not t.is_floating_point()]
