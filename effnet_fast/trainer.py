"""The state of a training run: what one step changes, and what a checkpoint holds."""

import math
import random
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from effnet_fast import __version__, distributed
from effnet_fast.amp import autocast
from effnet_fast.augment import Batch, derive_seed
from effnet_fast.config import Config
from effnet_fast.divergence import Diverged, first_not_finite
from effnet_fast.memory import parse_memory
from effnet_fast.model import EfficientNet, create_model
from effnet_fast.ops.memory_policy import Memory
from effnet_fast.planning import Plan, Planner
from effnet_fast.recipe import MovingAverage, lr_factor, make_loss, make_optimizer


class Trainer:
    """A run's model, moving average, optimizer and scaler, and how far it has come.

    Attributes:
        epoch: epochs that are finished and evaluated.
        step: batches of the next epoch that are done.
        images: examples in them, of all processes.
        best: the best top-1 so far, in percent.
        plan: what each part keeps, if `config.memory` is a budget.
        bad_steps: how many steps in a row, up to now, were skipped because loss or gradient were not finite.
    """

    def __init__(self, config: Config, classes: int) -> None:
        self.config = config
        self.device = torch.device(config.device)
        memory = parse_memory(config.memory)
        policy = "fast" if isinstance(memory, int) else memory
        self.model = _make_model(config, classes, policy)
        self.plan: Plan | None = None
        if isinstance(memory, int):
            self.plan = make_planner(config, classes).fastest(config.batch_size, memory)
            self.model.set_memory(self.plan.policies, self.plan.segments)
        self.model.to(self.device).to(memory_format=torch.channels_last)
        self._frozen = _freeze(self.model, config.freeze)
        self._replica: nn.Module = self.model
        if config.processes > 1:
            self._replica = DistributedDataParallel(self.model)
            # It compares the strides of dimensions of size 1 too, where they mean nothing; others do match.
            warnings.filterwarnings("ignore", message="Grad strides do not match bucket view strides")
            # All processes have the same weights now; from here on each draws its own random numbers.
            if distributed.rank() > 0:
                torch.manual_seed(derive_seed(config.seed, "process", distributed.rank()))
        if config.sync_bn:
            # In place, and after DistributedDataParallel, which takes it for a thing of GPUs; ours runs anywhere.
            nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        self._forward = torch.compile(self._replica) if config.compile else self._replica
        # A graph's gradients lie where its next replay writes, and can't be added up; segments that run again set
        # random states, which can't be captured.
        alone = config.processes == 1 and not config.sync_bn and config.accumulate == 1
        whole = not config.compile and (self.plan is None or not self.plan.segments)
        self._captures = self.device.type == "cuda" and alone and whole
        self.ema = MovingAverage(self.model, config.ema_decay, config.ema_warmup)
        self._parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = make_optimizer(self._parameters, config.lr, config.optimizer, config.weight_decay)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=config.amp == "fp16")
        self.criterion = make_loss(config.label_smoothing)
        self._buffers = list(self.model.buffers())
        self._buffers_before = [torch.empty_like(buffer) for buffer in self._buffers]
        if config.processes > 1:
            self._settle_buckets()
        self._set_modes()
        self.best = -1.0
        self.bad_steps = 0
        self.epoch = -1
        self._start_epoch()

    def _set_modes(self) -> None:
        """All of the model trains but what is frozen."""
        self.model.train()
        for module in self._frozen:
            module.eval()

    def _settle_buckets(self) -> None:
        """A backward pass that changes nothing, after which gradients are always added up in the same order.

        DistributedDataParallel arranges them anew after its first one. With more than two processes that changes the
        last bits: without this, a resumed run would differ from one that was left alone.
        """
        torch._foreach_copy_(self._buffers_before, self._buffers)
        size = self.config.input_size
        self._replica(torch.zeros(2, 3, size, size, device=self.device)).sum().backward()
        self.model.zero_grad()
        torch._foreach_copy_(self._buffers, self._buffers_before)

    def _start_epoch(self) -> None:
        self.epoch += 1
        self.step = 0
        self.images = 0
        self._loss_sum = torch.zeros((), device=self.device)

    @property
    def lr(self) -> float:
        """The learning rate of the epoch at hand."""
        config = self.config
        return config.lr * lr_factor(self.epoch, config.schedule, config.epochs, config.warmup_epochs)

    @property
    def mean_loss(self) -> float:
        """Over the images of the epoch at hand that were learned from. Waits for the device."""
        return self._loss_sum.item() / self.images if self.images else math.nan

    def train_step(self, group: Sequence[Batch]) -> None:
        """One update of the weights and of their moving average; none if loss or gradient are not finite.

        group: the batches whose gradients are accumulated, each weighed by its images.

        Raises Diverged after `max_bad_steps` of the latter in a row. No such step leaves a trace in model or average.
        """
        if not self.model.training:
            self._set_modes()
        for settings in self.optimizer.param_groups:
            settings["lr"] = self.lr
        torch._foreach_copy_(self._buffers_before, self._buffers)
        if self._captures:
            self._capture(group[0][0])
        self.optimizer.zero_grad()
        count = sum(len(images) for images, _ in group)
        losses = torch.zeros((), device=self.device)
        for number, (images, labels) in enumerate(group, 1):
            with self._all_reduce_if(number == len(group)):
                with autocast(self.device, self.config.amp):
                    loss = self.criterion(self._forward(images), labels)
                self.scaler.scale(loss * (len(images) / count)).backward()
            losses += loss.detach() * len(images)
        self.scaler.unscale_(self.optimizer)
        norm = nn.utils.get_total_norm([p.grad for p in self._parameters if p.grad is not None])
        # Every process has the same gradients, but a loss of its own.
        distributed.add_up(losses)
        # Reading the answer waits for the device; a GradScaler does so too.
        if bool(losses.isfinite() & norm.isfinite()):
            if self.config.clip_grad is not None:
                nn.utils.clip_grads_with_norm_(self._parameters, self.config.clip_grad, norm)
            self.scaler.step(self.optimizer)
            self.ema.update()
            self._loss_sum += losses
            self.images += count * self.config.processes
            self.bad_steps = 0
        else:
            torch._foreach_copy_(self._buffers, self._buffers_before)
            self.bad_steps += 1
            if self.bad_steps >= self.config.max_bad_steps:
                self._raise_diverged(torch.cat([images for images, _ in group]))
        self.scaler.update()
        self.step += len(group)

    def _capture(self, images: Tensor) -> None:
        """Make CUDA graphs of the model's forward and backward pass over such batches; all of a run are of one shape.

        Python launches a step's kernels in more time than they run: 54 ms instead of 16 (B0, 224 px, batch 128, H100).
        """
        rng = torch.cuda.get_rng_state(self.device)
        graphed = nn.Sequential(self.model)  # whose forward is replaced, while the model keeps its own
        with autocast(self.device, self.config.amp):
            self._forward = torch.cuda.make_graphed_callables(graphed, (images.clone(),))
        torch.cuda.set_rng_state(rng, self.device)
        torch._foreach_copy_(self._buffers, self._buffers_before)  # of which it took some steps to warm up
        self._captures = False

    def _all_reduce_if(self, last: bool) -> AbstractContextManager[None]:
        """Gradients that are accumulated are added up over the processes once, with the last batch's."""
        if last or not isinstance(self._replica, DistributedDataParallel):
            return nullcontext()
        return self._replica.no_sync()

    def _raise_diverged(self, images: Tensor) -> NoReturn:
        with autocast(self.device, self.config.amp):
            culprit = first_not_finite(self.model, images)
        raise Diverged(
            f"diverged: not finite first: {culprit}; this was the last of {self.bad_steps} such steps in a row "
            f"(epoch {self.epoch + 1}, step {self.step + 1}); a lower --lr or --clip-grad may help"
        )

    def share_statistics(self) -> None:
        """Give all processes the same running statistics, before the model is evaluated."""
        distributed.share_buffers(self.model)
        distributed.share_buffers(self.ema.module)

    def finish_epoch(self, score: float) -> bool:
        """Count the epoch as done. Returns whether its top-1 is the best so far."""
        improved = score > self.best
        self.best = max(self.best, score)
        self._start_epoch()
        return improved

    def state_dict(self) -> dict[str, Any]:
        """Everything that the rest of the run depends on. The schedule is a function of config and epoch.

        To be called in all processes.
        """
        return {
            "version": __version__,
            "config": asdict(self.config),
            "epoch": self.epoch,
            "step": self.step,
            "images": self.images,
            "loss_sum": self._loss_sum.cpu(),
            "best": self.best,
            "bad_steps": self.bad_steps,
            "model": self.model.state_dict(),
            "ema": self.ema.module.state_dict(),
            "ema_updates": self.ema.updates,
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "rng": _rng_state(self.device),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go back to where a state was taken. Raises ValueError if it is not one of such a run."""
        try:
            self.model.load_state_dict(state["model"])
            self.ema.module.load_state_dict(state["ema"])
            self.ema.updates = state["ema_updates"]
            self.optimizer.load_state_dict(state["optimizer"])
            self.scaler.load_state_dict(state["scaler"])
            self.epoch, self.step, self.images = state["epoch"], state["step"], state["images"]
            self._loss_sum = state["loss_sum"].to(self.device)
            self.best, self.bad_steps = state["best"], state["bad_steps"]
            _set_rng_state(state["rng"], self.device)
        except (RuntimeError, LookupError, TypeError, ValueError, AttributeError):
            raise ValueError("checkpoint: does not fit the run's configuration") from None


def _make_model(config: Config, classes: int, memory: Memory = "fast") -> EfficientNet:
    return create_model(
        config.variant,
        classes,
        family=config.family,
        strides=config.strides,
        drop_rate=config.drop_rate,
        drop_path_rate=config.drop_path_rate,
        memory=memory,
    )


def make_planner(config: Config, classes: int) -> Planner:
    """Of the memory of a run's steps. Allocates none for its model."""
    with torch.device("meta"):
        model = _make_model(config, classes)
    for module in _freeze(model, config.freeze):
        module.eval()
    return Planner(
        model,
        config.input_size,
        amp=config.amp,
        device=config.device,
        optimizer=config.optimizer,
        accumulate=config.accumulate,
        processes=config.processes,
    )


def _freeze(model: nn.Module, names: str | None) -> list[nn.Module]:
    """Keep the modules named (with commas between) as they are; returns them. Raises ValueError for an unknown name."""
    frozen = []
    for name in names.split(",") if names else ():
        try:
            module = model.get_submodule(name.strip())
        except AttributeError:
            raise ValueError(f"--freeze: got {name!r}, must be a module, as stem, stages.0 or head") from None
        frozen.append(module.requires_grad_(False))
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(f"--freeze: got {names!r}, which leaves nothing to train")
    return frozen


def _rng_state(device: torch.device) -> dict[str, Any]:
    """Of every generator that the processes may draw from, in types that torch.load reads without executing.

    torch's generators are every process's own, the other two are in the same state in all.
    """
    name, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)
    cuda = device.type == "cuda"
    return {
        "torch": distributed.gather(torch.get_rng_state(), device),
        "cuda": distributed.gather(torch.cuda.get_rng_state(device), device) if cuda else None,
        "numpy": (name, keys.tolist(), *rest),
        "python": random.getstate(),
    }


def _set_rng_state(state: dict[str, Any], device: torch.device) -> None:
    torch.set_rng_state(state["torch"][distributed.rank()])
    # A run may go on on another kind of device.
    if state["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(state["cuda"][distributed.rank()], device)
    np.random.set_state(state["numpy"])
    random.setstate(state["python"])
