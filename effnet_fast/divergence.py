"""Steps whose loss or gradients are not finite: where it began."""

from collections.abc import Callable

import torch
from torch import Tensor, nn


class Diverged(ValueError):
    """Training that can't go on; the message is one line that names what was not finite."""


@torch.no_grad()
def first_not_finite(model: nn.Module, images: Tensor) -> str:
    """What is not finite first: the images, a module's output in the order of computation, or else a gradient.

    model: with the weights and gradients of a bad step. It is run once more, which updates running statistics.
    """
    # The model runs even so: other processes may wait for this one's share of the statistics.
    found = [] if images.isfinite().all() else ["the images"]

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: object, output: object) -> None:
            if not found and isinstance(output, Tensor) and not output.isfinite().all():
                found.append(f"the output of {name}")

        return hook

    handles = [module.register_forward_hook(look(name)) for name, module in model.named_modules() if name]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    # Gradients come into being from the last parameter to the first.
    for name, parameter in reversed(list(model.named_parameters())):
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            found.append(f"the gradient of {name}")
            break
    return found[0] if found else "the loss"
