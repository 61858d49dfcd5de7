"""Which implementation runs a call, and why.

``use_backend("cpu")`` or ``EFFNET_FAST_BACKEND=cpu`` insists on one; "auto", the default, takes the best that can run
the call and falls back to PyTorch. `python -m effnet_fast.doctor` prints what can run here.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Callable, Iterator
from functools import cache, partial
from importlib.util import find_spec
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor

from effnet_fast import _host
from effnet_fast.passes import algebra, products, reference, schema, sweeps

BACKENDS = ("auto", "eager", "cpu", "cuda", "triton")

# Native backends of a device, best first.
_OF_DEVICE = {"cpu": ("cpu",), "cuda": ("cuda", "triton"), "xpu": ("triton",)}

_F = TypeVar("_F", bound=Callable[..., Any])

_LOG = logging.getLogger("effnet_fast")

# Read once, so that a compiler can trace the choice.
_chosen = os.environ.get("EFFNET_FAST_BACKEND") or "auto"
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


def assumed_constant(function: _F) -> _F:
    """A decorator: compilers call the function and take its result for a constant.

    What `torch.compiler.assume_constant_result` does, without its import of the compiler, which takes a second.
    """
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _load() -> str | ValueError:
    supported = _host.supported_isas()
    isa = os.environ.get("EFFNET_FAST_ISA") or supported[0]
    if isa not in supported:
        return ValueError(f"EFFNET_FAST_ISA: got {isa!r}, this processor runs {', '.join(supported)}")
    importlib.import_module(f"effnet_fast._cpu_{isa}")
    return isa


_loaded = _load()


def cpu_isa() -> str:
    """The instruction set of the compiled passes in use: the best of this processor, or ``EFFNET_FAST_ISA``.

    Raises ValueError naming the choices if that one can't run here.
    """
    if isinstance(_loaded, ValueError):
        raise _loaded
    return _loaded


def with_products(passes: Any) -> SimpleNamespace:
    """A backend's passes, products and sweeps composed of them, and its algebra or PyTorch's; no blocks."""
    own = {name: getattr(passes, name) for name in schema.PASSES}
    between = {name: getattr(passes, name, getattr(algebra, name)) for name in schema.ALGEBRA}
    composed = SimpleNamespace(**own, **between, **dict.fromkeys(schema.BLOCKS))
    for name in schema.PRODUCTS:
        setattr(composed, name, partial(getattr(products, name), passes))
    for name in schema.SWEEPS:
        setattr(composed, name, partial(getattr(sweeps, name), composed))
    return composed


def _dispatched(names: tuple[str, ...]) -> SimpleNamespace:
    """Passes in C++, of which the dispatcher takes those for the tensor's device."""
    return SimpleNamespace(**{name: getattr(torch.ops.effnet_fast, name).default for name in names})


# By backend; `why_unavailable` adds Triton's. Not a dict: a compiler takes all of it at once, perhaps before that.
_PASSES = SimpleNamespace(
    cpu=_dispatched(schema.PASSES + schema.PRODUCTS + schema.SWEEPS + schema.ALGEBRA + schema.BLOCKS),
    cuda=with_products(_dispatched(schema.PASSES + schema.ALGEBRA)),
    reference=with_products(reference),
)


@cache
def why_unavailable(backend: str) -> str | None:
    """Loads a native backend of the GPU, "cuda" or "triton"; the reason if it isn't there or doesn't load."""
    if backend == "cuda" and find_spec("effnet_fast._cuda") is None:
        return "the CUDA passes were not built"
    name = {"cuda": "effnet_fast._cuda", "triton": "effnet_fast.passes.triton"}[backend]
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        return f"{name} does not load: {error}"
    if backend == "triton":
        _PASSES.triton = with_products(module)
    return None


@assumed_constant
def _unavailable_on(backend: str, index: int) -> str | None:
    """The same, and the reason if the backend's code is not for that GPU."""
    reason = why_unavailable(backend)
    if reason is not None or backend != "cuda":
        return reason
    lowest = importlib.import_module("effnet_fast._cuda").lowest_capability
    major, minor = torch.cuda.get_device_capability(index)
    if 10 * major + minor < lowest:
        return f"the GPU has compute capability {major}.{minor}, the CUDA passes were built for {lowest / 10} and up"
    return None


def why_not(backend: str, x: Tensor, kernel: int = 3, stride: int = 1) -> str | None:
    """The reason why a native backend can't run passes over x with such a convolution; None if it can."""
    device = x.device.type
    interpreted = backend == "triton" and device == "cpu" and _INTERPRETED
    if backend not in _OF_DEVICE.get(device, ()) and not interpreted:
        return f"x is on {device}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {x.dtype}, must be float32, bfloat16 or float16"
    if backend == "cpu" and x.shape[1] % 8:
        return f"{x.shape[1]} channels are not a multiple of 8"
    if kernel not in (3, 5, 7):
        return f"the kernel is {kernel}, must be 3, 5 or 7"
    if stride not in (1, 2):
        return f"the stride is {stride}, must be 1 or 2"
    return None if backend == "cpu" else _unavailable_on(backend, x.device.index or 0)


def current() -> str:
    """The backend asked for: by `use_backend`, else by ``EFFNET_FAST_BACKEND``, else "auto"."""
    return _checked(_chosen, "EFFNET_FAST_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block: "auto", "eager" (plain PyTorch), or a native one or an error.

    Native are "cpu" (C++), "cuda" (CUDA C++) and "triton". Raises ValueError naming the choices.
    """
    global _chosen
    before, _chosen = _chosen, _checked(name, "backend")
    try:
        yield
    finally:
        _chosen = before


def _checked(name: str, argument: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{argument}: got {name!r}, choose from {', '.join(BACKENDS)}")
    return name


def resolve(x: Tensor, kernel: int = 3, stride: int = 1) -> str:
    """The backend that runs an op on x, never "auto". Raises RuntimeError if one was insisted on and can't."""
    name = current()
    if name == "eager":
        return name
    device = x.device.type
    candidates = _OF_DEVICE.get(device, ()) if name == "auto" else (name,)
    reasons = [] if candidates else [f"x is on {device}"]
    for candidate in candidates:
        reason = why_not(candidate, x, kernel, stride)
        if reason is None:
            if candidate == "cpu":
                cpu_isa()
            if reasons:
                _log_fallback(candidate, reasons[0])
            return candidate
        if reason not in reasons:
            reasons.append(reason)
    if name == "auto":
        _log_fallback("eager PyTorch", "; ".join(reasons))
        return "eager"
    raise RuntimeError(f"backend: {name!r} can't run this call: {reasons[0]}")


_warn_once = cache(_LOG.warning)


@assumed_constant  # a compiler can't trace it
def _log_fallback(to: str, reason: str) -> None:
    _warn_once("falling back to %s: %s", to, reason)


def passes_for(x: Tensor, kernel: int = 3, stride: int = 1) -> Any:
    """The passes to run on x: those of the backend asked for if it can, else the best native ones.

    `reference` where there are none (float64, for one).
    """
    candidates = _OF_DEVICE.get(x.device.type, ())
    if _chosen == "triton":
        candidates = ("triton", *candidates)
    for name in candidates:
        if why_not(name, x, kernel, stride) is None:
            return getattr(_PASSES, name)
    return _PASSES.reference
