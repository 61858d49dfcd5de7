compiler: str
torch_version: str

def supported_isas() -> list[str]:
    """Instruction sets of the CPU passes that this processor runs, best first."""
