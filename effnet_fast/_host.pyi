compiler: str
torch_version: str

def supported_isas() -> list[str]:
    """Instruction sets of the CPU passes that this processor runs, best first."""

def keep_freed_memory() -> bool:
    """Keep freed memory in the process's heap; False where the C library has no such setting."""
