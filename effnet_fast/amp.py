"""Mixed precision by name."""

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """torch.autocast for a name in AMP_DTYPES; "off" gives a context that does nothing.

    Without its cache of cast weights: each is cast once a step anyway, and no CUDA graph could hold them.
    """
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "off", cache_enabled=False)
