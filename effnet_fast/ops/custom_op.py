"""How the ops are made: as `torch.library.custom_op`, their bodies at hand for those who look inside."""

from collections.abc import Callable
from typing import Any

import torch
from torch._library.custom_ops import CustomOpDef

# By op: the function of passes and [C] algebra that it runs. A fake tensor's op only says what comes out.
BODIES: dict[torch._ops.OpOverload, Callable[..., Any]] = {}


def custom_op(name: str) -> Callable[[Callable[..., Any]], CustomOpDef]:
    """Decorator: a function as the op ``effnet_fast::<name>``, which changes none of its arguments."""

    def register(body: Callable[..., Any]) -> CustomOpDef:
        op = torch.library.custom_op(f"effnet_fast::{name}", body, mutates_args=())
        BODIES[getattr(torch.ops.effnet_fast, name).default] = body
        return op

    return register
