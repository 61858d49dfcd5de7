"""Mixed precision by name."""

import torch

AMP_DTYPES = {"off": None, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, amp: str) -> torch.autocast:
    """torch.autocast for a name in AMP_DTYPES; "off" gives a context that does nothing."""
    return torch.autocast(device.type, dtype=AMP_DTYPES[amp], enabled=amp != "off")
