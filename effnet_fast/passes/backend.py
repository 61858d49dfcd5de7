"""Which implementation runs a call, and why.

``use_backend("cpu")`` or ``EFFNET_FAST_BACKEND=cpu`` insists on one; "auto", the default, takes the best that can run
the call and falls back to PyTorch. `python -m effnet_fast.doctor` prints what can run here.
"""

import contextlib
import importlib
import logging
import os
from collections.abc import Iterator
from functools import cache, partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from effnet_fast import _host
from effnet_fast.passes import products, reference, schema

BACKENDS = ("auto", "eager", "cpu")

_LOG = logging.getLogger("effnet_fast")

# Read once, so that a compiler can trace the choice.
_chosen = os.environ.get("EFFNET_FAST_BACKEND") or "auto"


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


def why_not(backend: str, x: Tensor, kernel: int = 3, stride: int = 1) -> str | None:
    """The reason why a native backend can't run passes over x with such a convolution; None if it can."""
    if backend != x.device.type:
        return f"x is on {x.device.type}"
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"dtype is {x.dtype}, must be float32, bfloat16 or float16"
    if x.shape[1] % 8:
        return f"{x.shape[1]} channels are not a multiple of 8"
    if kernel not in (3, 5, 7):
        return f"the kernel is {kernel}, must be 3, 5 or 7"
    if stride not in (1, 2):
        return f"the stride is {stride}, must be 1 or 2"
    return None


def current() -> str:
    """The backend asked for: by `use_backend`, else by ``EFFNET_FAST_BACKEND``, else "auto"."""
    return _checked(_chosen, "EFFNET_FAST_BACKEND")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Choose the backend inside a ``with`` block: "auto", "eager" (plain PyTorch) or "cpu" (compiled, or an error).

    Raises ValueError naming the choices.
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
    """ "cpu" or "eager": what runs an op on x. Raises RuntimeError if a backend was insisted on and can't."""
    name = current()
    if name == "eager":
        return "eager"
    reason = why_not("cpu", x, kernel, stride)
    if reason is None:
        cpu_isa()
        return "cpu"
    if name == "auto":
        _log_fallback(reason)
        return "eager"
    raise RuntimeError(f"backend: {name!r} can't run this call: {reason}")


@cache
def _log_fallback(reason: str) -> None:
    _LOG.warning("falling back to eager PyTorch: %s", reason)


def _with_products(passes: Any) -> SimpleNamespace:
    """A backend's passes, and the products composed of them."""
    own = {name: getattr(passes, name) for name in schema.PASSES}
    return SimpleNamespace(**own, **{name: partial(getattr(products, name), passes) for name in schema.PRODUCTS})


_CPU = SimpleNamespace(
    **{name: getattr(torch.ops.effnet_fast, name).default for name in schema.PASSES + schema.PRODUCTS}
)
_REFERENCE = _with_products(reference)


def passes_for(x: Tensor, kernel: int = 3, stride: int = 1) -> Any:
    """The passes to run on x: compiled ones, or `reference` where there are none (float64, for one)."""
    return _CPU if why_not("cpu", x, kernel, stride) is None else _REFERENCE
