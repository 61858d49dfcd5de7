"""What an op keeps for its backward pass, by name."""

from typing import Literal, get_args

# fast: every convolution's output. lean: not the expanded tensor. min: only the op's input.
Memory = Literal["fast", "lean", "min"]
POLICIES: tuple[Memory, ...] = get_args(Memory)


def check_memory(memory: str) -> None:
    """Raises ValueError naming the choices unless it is a policy."""
    if memory not in POLICIES:
        raise ValueError(f"memory: got {memory!r}, choose from {', '.join(POLICIES)}")
