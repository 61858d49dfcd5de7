"""The memory of a training step, foreseen: what fits, and what each block should keep to be as fast as fits.

The parts of a model (stem with first block, blocks, head with loss) run on fake tensors, one by one, under each memory
policy. That gives the live bytes of their forward and backward passes without allocating any. What an assignment of
policies to parts needs follows from these, and the fastest one that fits a budget by dynamic programming.
"""

import copy
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F

from effnet_fast.amp import autocast
from effnet_fast.layers import ConvBN, MBConv, StemBlock
from effnet_fast.live_bytes import LiveBytes
from effnet_fast.memory import format_bytes
from effnet_fast.ops.memory_policy import POLICIES, Memory
from effnet_fast.recipe import make_optimizer

if TYPE_CHECKING:  # a model plans itself when it is given a budget, so this is below it
    from effnet_fast.model import EfficientNet

# Of a budget, left alone: for what the compiled passes allocate inside, which no fake tensor shows.
_RESERVE = 0.02

# The search for the fastest assignment tells apart so many amounts of kept bytes, and the least.
_LEVELS = 400
_LEAST = -1


class DoesNotFit(ValueError):
    """No assignment of policies fits the budget."""


@dataclass(frozen=True)
class Plan:
    """What each part of a model keeps in a training step, and what the step then needs.

    policies, segments: as `EfficientNet.set_memory` takes them.
    peak: bytes alive at once, at most: of the tensors of parameters, gradients, optimizer, moving average, a batch and
        its step. The process and its libraries come on top.
    fixed: of these, parameters, optimizer and moving average, which are there all the time.
    kept: bytes that the forward pass leaves for the backward.
    extra_time: estimated; relative to a step that keeps everything, 0.1 for a tenth more. From the bytes that the
        operations read and write.
    """

    batch_size: int
    input_size: int
    amp: str
    device: str
    policies: tuple[Memory, ...]
    segments: tuple[tuple[int, int], ...]
    peak: int
    fixed: int
    kept: int
    extra_time: float


def describe(plan: Plan) -> str:
    """A plan in one line."""
    parts = [f"{plan.policies.count(policy)} {policy}" for policy in POLICIES if policy in plan.policies]
    text = f"{format_bytes(plan.peak)} at most; of {len(plan.policies)} parts {', '.join(parts)}"
    if plan.segments:
        again = sum(end - begin for begin, end in plan.segments)
        text += f"; {again} of them in {len(plan.segments)} segments that run again"
    return f"{text}; {plan.extra_time:.0%} longer than keeping everything, by estimate"


class _Run(NamedTuple):
    """One part's step for a batch of some size: bytes alive beside its input, after each new tensor."""

    forward: np.ndarray
    kept: np.ndarray  # in the end, the output included
    output: np.ndarray
    backward: np.ndarray  # beside the output's gradient as well
    moved_forward: np.ndarray
    moved: np.ndarray  # forward and backward

    def extrapolate(self, more: "_Run", images: int) -> "_Run":
        """To a batch of so many images more than this one's; `more` is of one image more. All is linear in it."""
        return _Run(*(a + (b - a) * images for a, b in zip(self, more, strict=True)))


class _Signature(NamedTuple):
    """What an activation is, but for the batch."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    @classmethod
    def of(cls, x: Tensor) -> "_Signature":
        return cls(tuple(x.shape[1:]), x.dtype, x.requires_grad)


class _Need(NamedTuple):
    """One part under one policy, for a batch: the maxima of `_Run`."""

    forward: int
    kept: int
    output: int
    backward: int
    moved_forward: int
    moved: int


class _Step(NamedTuple):
    """A way through the parts [begin, end): on its own (a policy), or checkpointed with the policy inside.

    need: the bytes of its worst moment, beside those kept by the parts before it and the fixed ones.
    extra: bytes moved beyond those of "fast".
    """

    begin: int
    end: int
    policy: Memory
    checkpointed: bool
    need: int
    kept: int
    extra: int


class _Way(NamedTuple):
    """How the search got to a part: bytes moved in addition, bytes kept, the last step, and the way before it."""

    extra: int
    kept: int
    step: _Step | None
    before: int


class Planner:
    """Of training steps of a model with images of input_size x input_size pixels.

    The model's parameters may be of any device, also "meta"; `device` is where it will train. Its modules train or not
    as they are, and what of it is frozen keeps no gradients. Policies that it has already play no part.
    amp: "off", "bf16" or "fp16"; optimizer: of `recipe.OPTIMIZERS`; accumulate: batches that make a step; processes:
    that train together. The backend is the one in force.

    Right to some percent for the compiled passes. PyTorch's own convolutions ("eager") take workspaces that are not
    foreseen, and what frozen parts hand on is taken to be kept.
    """

    def __init__(
        self,
        model: "EfficientNet",
        input_size: int,
        *,
        amp: str = "bf16",
        device: str = "cpu",
        optimizer: str = "rmsprop",
        accumulate: int = 1,
        processes: int = 1,
    ) -> None:
        self.input_size = input_size
        self.amp = amp
        self.device = torch.device(device)
        self.accumulate = accumulate
        first, *blocks = model.blocks
        self._parts: list[nn.Module] = [StemBlock(model.stem, first), *blocks, _Tail(model)]
        self._channels = model.stem.conv.in_channels
        trained = [p for p in model.parameters() if p.requires_grad]
        self._grads = np.array([sum(p.nbytes for p in part.parameters() if p.requires_grad) for part in self._parts])
        total, buffers = sum(p.nbytes for p in model.parameters()), sum(b.nbytes for b in model.buffers())
        # model and average; the buffers a third time, to undo a step; DistributedDataParallel's copies of gradients
        self.fixed = 2 * total + 3 * buffers + int(self._grads.sum() * (_optimizer_state(optimizer) + (processes > 1)))
        # an update has two temporaries: of one parameter at a time on the CPU, of all at once on a GPU
        largest = max(p.nbytes for p in trained)
        self._update = int(self._grads.sum()) + 2 * (largest if self.device.type == "cpu" else int(self._grads.sum()))
        self._runs = cache(self._runs_of)
        self._needs = cache(self._needs_of)
        self._steps = cache(self._steps_of)

    def uniform(self, policy: Memory, batch_size: int) -> Plan:
        """Every part keeps what one policy says."""
        return self._plan(batch_size, [next(self._from(part, policy, batch_size)) for part in range(len(self._parts))])

    def fastest(self, batch_size: int, budget: int) -> Plan:
        """The assignment that fits the budget with the least extra time; checkpointed segments only if need be.

        Raises DoesNotFit, whose line says what would fit.
        """
        for segments in (False, True):
            path = self._search(batch_size, budget, segments)
            if path is not None:
                return self._plan(batch_size, path)
        largest = self.largest_batch(budget)
        advice = f"the largest batch that fits is {largest}" if largest else "no batch fits"
        raise DoesNotFit(
            f"memory: got {format_bytes(budget)}, a step of batch {batch_size} at {self.input_size} px needs at least "
            f"{format_bytes(self.least(batch_size))}; {advice}"
        )

    def least(self, batch_size: int) -> int:
        """The least bytes that a step can be made to fit in, whatever the time."""
        low, high = 0, 2 * self.uniform("fast", batch_size).peak
        while high - low > 1 << 16:
            middle = (low + high) // 2
            low, high = (low, middle) if self._fits(batch_size, middle) else (middle, high)
        return high

    def largest_batch(self, budget: int, policy: Memory | None = None) -> int:
        """The most images a step can take in a budget: with one policy for all parts, or any assignment. 0 if none."""

        def fits(batch_size: int) -> bool:
            if policy is None:
                return self._fits(batch_size, budget)
            return self.uniform(policy, batch_size).peak <= (1 - _RESERVE) * budget

        high = 1
        while fits(high):
            high *= 2
        return bisect_right(range(1, high), False, key=lambda batch_size: not fits(batch_size))

    def _plan(self, batch_size: int, path: list[_Step]) -> Plan:
        kept, peak = 0, self._update
        for step in path:
            peak = max(peak, kept + step.need)
            kept += step.kept
        base = sum(part.moved for part in self._needs("fast", batch_size))
        return Plan(
            batch_size,
            self.input_size,
            self.amp,
            str(self.device),
            policies=tuple(step.policy for step in path for _ in range(step.begin, step.end)),
            segments=tuple((step.begin, step.end) for step in path if step.checkpointed),
            peak=self.fixed + self._images(batch_size) + peak,
            fixed=self.fixed,
            kept=kept,
            extra_time=sum(step.extra for step in path) / base,
        )

    def _images(self, batch_size: int) -> int:
        """Bytes of float32 images and their labels."""
        return batch_size * self.accumulate * (self._channels * self.input_size**2 * 4 + 8)

    def _room(self, batch_size: int, budget: int) -> int:
        """What of a budget is left for gradients and activations."""
        return int((1 - _RESERVE) * budget) - self.fixed - self._images(batch_size)

    def _fits(self, batch_size: int, budget: int) -> bool:
        """Whether any assignment does. Of the ways to a part, that which keeps least is best for what follows."""
        room = self._room(batch_size, budget)
        least: list[float] = [0, *(float("inf") for _ in self._parts)]
        for step in self._steps(batch_size):
            if least[step.begin] + step.need <= room:
                least[step.end] = min(least[step.end], least[step.begin] + step.kept)
        return self._update <= room and least[-1] < float("inf")

    def _search(self, batch_size: int, budget: int, segments: bool) -> list[_Step] | None:
        """The path of least extra through all parts; None if none fits.

        The ways to get to a part differ in what they keep and what they cost. Of those that keep about the same, only
        the cheapest goes on, and besides the one that keeps least of all, so that a path is found if there is any.
        """
        room = self._room(batch_size, budget)
        if self._update > room:
            return None
        ways: list[dict[int, _Way]] = [{} for _ in range(len(self._parts) + 1)]
        ways[0][_LEAST] = _Way(0, 0, None, 0)
        for step in self._steps(batch_size):  # in the order of where they begin
            if step.checkpointed and not segments:
                continue
            reached = ways[step.end]
            for before, way in ways[step.begin].items():
                if way.kept + step.need > room:
                    continue
                new = _Way(way.extra + step.extra, way.kept + step.kept, step, before)
                level = new.kept * _LEVELS // room
                if level not in reached or new[:2] < reached[level][:2]:
                    reached[level] = new
                if _LEAST not in reached or new[1::-1] < reached[_LEAST][1::-1]:
                    reached[_LEAST] = new
        if not ways[-1]:
            return None
        path = []
        way = min(ways[-1].values(), key=lambda way: way[:2])
        while way.step is not None:
            path.append(way.step)
            way = ways[way.step.begin][way.before]
        return path[::-1]

    def _steps_of(self, batch_size: int) -> list[_Step]:
        """Every way through consecutive parts, ordered by where it begins."""
        return [
            step
            for begin in range(len(self._parts))
            for policy in POLICIES
            for step in self._from(begin, policy, batch_size)
        ]

    def _from(self, begin: int, policy: Memory, batch_size: int) -> Iterator[_Step]:
        needs, fast = self._needs(policy, batch_size), self._needs("fast", batch_size)
        # gradients of the parts behind a part, at its backward pass; all of them if they are accumulated
        total = int(self._grads.sum())
        behind = [total if self.accumulate > 1 else total - int(done) for done in np.cumsum(self._grads)]
        there = total if self.accumulate > 1 else 0  # at the forward pass
        own = needs[begin]
        need = max(there + own.forward, behind[begin] + own.output + own.backward)
        yield _Step(begin, begin + 1, policy, False, need, own.kept, own.moved - fast[begin].moved)
        # The first forward pass of a segment needs less than the second, which is beside gradients.
        inside = first = backward = extra = 0
        for end in range(begin + 1, len(self._parts)):  # the head and the loss are never in a segment
            part = needs[end - 1]
            first = max(first, inside + part.forward)
            backward = max(backward, behind[end - 1] + inside + part.output + part.backward)
            extra += part.moved_forward + part.moved - fast[end - 1].moved
            need = max(behind[end - 1] + part.output + first, backward)
            yield _Step(begin, end, policy, True, need, part.output, extra)
            inside += part.kept

    def _needs_of(self, policy: Memory, batch_size: int) -> list[_Need]:
        runs = (two.extrapolate(three, batch_size - 2) for two, three in self._runs(policy))
        return [_Need(*(int(field.max()) for field in run)) for run in runs]

    def _runs_of(self, policy: Memory) -> list[tuple[_Run, _Run]]:
        """Of each part, for batches of two and of three images. Parts that are alike run once."""
        known: dict[Any, tuple[tuple[_Run, _Run], _Signature]] = {}
        result = []
        x = _Signature((self._channels, self.input_size, self.input_size), torch.float32, False)
        for part in self._parts:
            key = _structure(part), x
            if key not in known:
                two, _ = self._run(part, policy, 2, x)
                three, out = self._run(part, policy, 3, x)
                known[key] = (two, three), out
            runs, x = known[key]
            result.append(runs)
        return result

    def _run(self, part: nn.Module, policy: Memory, n: int, signature: _Signature) -> tuple[_Run, _Signature]:
        """One part's step for n images on fake tensors, and what comes out of it."""
        part = copy.deepcopy(part).to("meta")
        for module in part.modules():
            if isinstance(module, ConvBN | MBConv):
                module.memory = policy
        with FakeTensorMode(allow_non_fake_inputs=True):
            part.to_empty(device=self.device)
            x = torch.empty(n, *signature.shape, dtype=signature.dtype, device=self.device)
            x = x.to(memory_format=torch.channels_last).requires_grad_(signature.requires_grad)
            x = x.view_as(x)  # not a leaf, as it is none within a model
            with LiveBytes() as live, autocast(self.device, self.amp):
                out = part(x)
            forward, kept, moved_forward = live.history, live.live, live.moved
            live.history = [kept]
            result, output, grad = _Signature.of(out), out.nbytes, torch.empty_like(out)
            if out.requires_grad:
                edge = get_gradient_edge(out)
                del out  # by now freed, unless the part keeps it itself
                with live:
                    torch.autograd.backward([edge], [grad])
        fields = (forward, kept, output, live.history, moved_forward, live.moved)
        return _Run(*map(np.array, fields)), result


class _Tail(nn.Module):
    """All that follows the blocks, with the loss."""

    def __init__(self, model: "EfficientNet") -> None:
        super().__init__()
        self.head, self.dropout, self.classifier = model.head, model.dropout, model.classifier

    def forward(self, x: Tensor) -> Tensor:
        logits = self.classifier(self.dropout(self.head(x).mean((2, 3))))
        return F.cross_entropy(logits, torch.zeros(len(x), dtype=torch.int64, device=x.device))


def _structure(part: nn.Module) -> tuple[Any, ...]:
    """Equal for parts whose steps hold and move the same bytes."""
    modes = tuple(module.training for module in part.modules())
    gradients = tuple(parameter.requires_grad for parameter in part.parameters())
    return str(part), getattr(part, "drop_path_rate", 0.0) > 0, modes, gradients


def _optimizer_state(name: str) -> float:
    """Bytes that an optimizer remembers for each byte of the parameters, nearly all of which are matrices."""
    parameter = nn.Parameter(torch.zeros(32, 32))
    parameter.grad = torch.zeros(32, 32)
    optimizer = make_optimizer([parameter], 0.1, name)
    optimizer.step()
    state = optimizer.state[parameter].values()
    return sum(value.nbytes for value in state if isinstance(value, Tensor) and value.dim() > 0) / parameter.nbytes
