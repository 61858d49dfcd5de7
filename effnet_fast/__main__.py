"""The commands of effnet_fast: ``python -m effnet_fast``."""

import ast
from pathlib import Path

from effnet_fast.cli import ArgumentParser


def commands() -> dict[str, str]:
    """The modules that have a `main`, and the first line of what each says of itself."""
    found = {}
    for path in sorted(Path(__file__).parent.glob("*.py")):
        # Read rather than imported: that would take seconds.
        module = ast.parse(path.read_text(encoding="utf-8"))
        has_main = any(isinstance(node, ast.FunctionDef) and node.name == "main" for node in module.body)
        if has_main and path.stem != "__main__":
            found[path.stem] = (ast.get_docstring(module) or "").partition("\n")[0].partition(": ``")[0]
    return found


def main(argv: list[str] | None = None) -> None:
    found = commands()
    width = max(map(len, found))
    lines = [f"  python -m effnet_fast.{name:{width}}  {text}" for name, text in found.items()]
    parser = ArgumentParser(prog="python -m effnet_fast", description="EfficientNets that train and run fast.")
    parser.parse_args(argv)
    print("\n".join(["Commands, each with --help:", *lines]))


if __name__ == "__main__":
    main()
