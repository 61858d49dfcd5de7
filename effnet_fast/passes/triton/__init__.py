"""The passes as Triton kernels: for GPUs where the CUDA passes are not built, and the readable twin of those.

Each pass is an op ``effnet_fast_triton::<pass>`` with the schema and the fake of ``effnet_fast::<pass>``, so that
compilers see one node. Importing this needs the triton package, but no device and no driver.
"""

from typing import Any

import torch

from effnet_fast.passes import schema  # noqa: F401 defines the ops whose schemas these have
from effnet_fast.passes.triton import depthwise, depthwise_backward
from effnet_fast.passes.triton import pointwise as _pointwise

_LIBRARY = torch.library.Library("effnet_fast_triton", "DEF")


def _op(launcher: Any) -> Any:
    """The launcher as an op; it runs with the device of its first argument as the current one."""
    name = launcher.__name__
    like = getattr(torch.ops.effnet_fast, name).default

    def run(x, *args):
        with torch.accelerator.device_index(x.device.index):
            return launcher(x, *args)

    _LIBRARY.define(str(like._schema).removeprefix("effnet_fast::"))
    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"effnet_fast_triton::{name}", like, lib=_LIBRARY)
    return getattr(torch.ops.effnet_fast_triton, name).default


channel_stats = _op(_pointwise.channel_stats)
dwconv_stats = _op(depthwise.dwconv_stats)
pool = _op(_pointwise.pool)
apply = _op(_pointwise.apply)
backward_sums = _op(_pointwise.backward_sums)
backward_dwconv = _op(depthwise_backward.backward_dwconv)
backward_apply = _op(_pointwise.backward_apply)
dwconv_affine = _op(depthwise.dwconv_affine)
