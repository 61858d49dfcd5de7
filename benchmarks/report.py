"""Run the benchmarks and write what they measured: ``python -m benchmarks.report --output DIR``.

DIR gets benchmarks.json (as pytest-benchmark writes it), benchmarks.md (tables) and benchmarks.png (a bar chart of the
whole models). It takes up to ten minutes; measure with nothing else running. torch.compile first compiles for longer
than that; torch keeps the results on disk, so that a second run starts from there.

With ``--memory``, which takes hours, variants are measured one by one, small ones first, each in a process of its own.
Those that DIR's benchmarks.json holds already are not measured again: stop it, and go on with the same command.
"""

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import harness
from benchmarks.harness import CONTESTANTS, OURS, TORCHVISION
from effnet_fast.cli import ArgumentParser
from effnet_fast.run_folder import write_atomic

MEMORY_FILE = "bench_memory.py"
FILES = ("bench_model.py", "bench_ops.py", "bench_passes.py")
Row = dict[str, Any]


def run(results: Path, names: Iterable[str], options: list[str]) -> None:
    """Run the benchmarks in these files in a process of their own. Raises ValueError if one of them fails."""
    files = [str(Path(__file__).with_name(name)) for name in names]
    always = ["-q", "--benchmark-quiet", f"--benchmark-json={results}", "-p", "no:cacheprovider"]
    if subprocess.run([sys.executable, "-m", "pytest", *files, *always, *options]).returncode:
        raise ValueError("a benchmark failed, see above")


def run_memory(results: Path, options: list[str], words: str, quick: bool) -> None:
    """Add the variants whose names hold all the words, and that it doesn't hold, to the results.

    Raises ValueError if the results are of another machine; or, in the end, if variants failed.
    """
    from benchmarks.bench_memory import SHAPES

    measured = json.loads(results.read_text()) if results.exists() else None
    if measured is not None and measured["machine_info"]["effnet_fast"] != harness.machine():
        raise ValueError(f"--output: {results} is of another machine ({machine(measured)}), give another folder")
    shapes = [" ".join(shape) for shape in (SHAPES[-1:] if quick else reversed(SHAPES))]
    chosen = [name for name in shapes if all(word in name for word in words.split())]
    if not chosen:
        raise ValueError(f"--only: got {words!r}, choose from the words of {', '.join(shapes)}")
    part = results.with_suffix(".part")
    failed = []
    for name in chosen:
        test = f"test_memory[{name}]"
        done = [] if measured is None else measured["benchmarks"]
        if any(row["name"] == test for row in done):
            continue
        try:
            run(part, [f"{MEMORY_FILE}::{test}"], options)
        except ValueError:
            failed.append(name)
            continue
        measured = json.loads(part.read_text())
        measured["benchmarks"] = done + measured["benchmarks"]
        write_atomic(results, partial(_write_json, measured))
    part.unlink(missing_ok=True)
    if failed:
        raise ValueError(f"{', '.join(failed)} failed, see above")


def _write_json(results: dict[str, Any], file: BinaryIO) -> None:
    file.write(json.dumps(results, indent=1).encode())


def tables(results: dict[str, Any]) -> dict[str, list[Row]]:
    """The rows of each table, in the order they ran."""
    grouped: dict[str, list[Row]] = {}
    for benchmark in results["benchmarks"]:
        row = benchmark["extra_info"]
        grouped.setdefault(row["table"], []).append(row)
    return grouped


def machine(results: dict[str, Any]) -> str:
    """Processor, threads, instruction set and torch of a run."""
    facts = results["machine_info"]["effnet_fast"]
    return f"{facts['processor']}, {facts['threads']} threads, {facts['instruction set']}, torch {facts['torch']}"


def speedup(rows: list[Row], name: str) -> float:
    """How many times longer an implementation takes than ours for an example of each row."""

    def per_example(contestant: str) -> float:
        timed = [row["contestants"][contestant] for row in rows]
        return sum(times["seconds"] / times["examples"] for times in timed)

    return per_example(name) / per_example(OURS)


def selected(words: str) -> list[str]:
    """Options of pytest for the benchmarks whose names hold all the words."""
    return ["-k", " and ".join(words.split())]


def contestants(rows: list[Row]) -> list[str]:
    return [name for name in CONTESTANTS if any(name in row["contestants"] for row in rows)]


def markdown(results: dict[str, Any]) -> Iterator[str]:
    """The report, line by line: whole models, then the parts over all of B0's shapes, then shape by shape."""
    yield f"On {machine(results)}. Medians of interleaved rounds; in brackets how many times faster effnet_fast is."
    yield "A star marks what ran on fewer examples at once, to end in time; rates are by example."
    grouped = tables(results)
    for title, rows in grouped.items():
        if "shape" not in rows[0]["row"]:
            yield from ("", f"### {title}", "", *_table(rows))
    for title, rows in grouped.items():
        if "shape" in rows[0]["row"]:
            yield from ("", f"### {title}: times faster, all shapes together (slowest to fastest shape)", "")
            yield from _summary(rows)
    for title, rows in grouped.items():
        if "shape" in rows[0]["row"]:
            yield from ("", f"### {title}, by shape", "", *_table(rows))


def _line(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _table(rows: list[Row]) -> Iterator[str]:
    names = contestants(rows)
    kept = [] if "peak" in rows[0] else list(rows[0].get("kept", ()))
    header = [*rows[0]["row"], *(f"{name}, {rows[0]['unit']}" for name in names)]
    header += [f"{name} keeps, MiB an image" for name in kept]
    yield from (_line(header), "|" + "---|" * len(header))
    for row in rows:
        rates, keeps = (_cell(row, name) for name in names), (_mebibytes(row["kept"], name) for name in kept)
        yield _line([*row["row"].values(), *rates, *keeps])
    if "peak" in rows[0]:
        yield from ("", "Kept for the backward pass, MiB an image:", "", *_memory(rows, "kept"))
        yield from ("", "At the worst moment, MiB an image:", "", *_memory(rows, "peak"))
        yield from ("", "Largest batch by the planner:", "", *_largest(rows))
    reasons = {
        f"{name} {reason} ({row['row']['dtype']})" for row in rows for name, reason in row.get("left out", {}).items()
    }
    if reasons:
        yield from ("", "Left out: " + "; ".join(sorted(reasons)) + ".")


def _memory(rows: list[Row], what: str) -> Iterator[str]:
    names = [name for name in CONTESTANTS if any(name in row[what] for row in rows)]
    header = [*rows[0]["row"], *names]
    yield from (_line(header), "|" + "---|" * len(header))
    for row in rows:
        yield _line([*row["row"].values(), *(_mebibytes(row[what], name) for name in names)])


def _mebibytes(of: dict[str, float], name: str) -> str:
    return f"{of[name] / 2**20:.1f}" if name in of else ""


def _largest(rows: list[Row]) -> Iterator[str]:
    columns = [(policy, budget) for policy, of in rows[0]["largest batch"].items() for budget in of]
    header = [*rows[0]["row"], *(f"{policy}, {budget}" for policy, budget in columns)]
    yield from (_line(header), "|" + "---|" * len(header))
    for row in rows:
        yield _line([*row["row"].values(), *(str(row["largest batch"][policy][budget]) for policy, budget in columns)])


def _cell(row: Row, name: str) -> str:
    times = row["contestants"].get(name)
    if times is None:
        return ""
    star = "*" if times["examples"] < row["batch"] else ""
    rate = f"{times['rate']:.{1 if times['rate'] < 1000 else 0}f}{star}"
    return rate if name == OURS else f"{rate} ({speedup([row], name):.2f})"


def _summary(rows: list[Row]) -> Iterator[str]:
    names = [name for name in contestants(rows) if name != OURS]
    groups: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(value for key, value in row["row"].items() if key != "shape"), []).append(row)
    header = [*(key for key in rows[0]["row"] if key != "shape"), *(f"than {name}" for name in names)]
    yield from (_line(header), "|" + "---|" * len(header))
    for group, members in groups.items():
        cells = list(group)
        for name in names:
            each = [speedup([row], name) for row in members]
            cells.append(f"{speedup(members, name):.2f} ({min(each):.2f} to {max(each):.2f})")
        yield _line(cells)


def plot(results: dict[str, Any], file: BinaryIO) -> None:
    """Draw the whole models' speeds, relative to torchvision's in the same row, as a PNG image."""
    models = {title: rows for title, rows in tables(results).items() if TORCHVISION in rows[0]["contestants"]}
    figure = Figure(figsize=(11, 3.6 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, rows) in zip(figure.subplots(len(models), squeeze=False)[:, 0], models.items(), strict=True):
        names = contestants(rows)
        width = 0.8 / len(names)
        for i, name in enumerate(names):
            at = [place for place, row in enumerate(rows) if name in row["contestants"]]
            heights = [speedup([rows[p]], TORCHVISION) / speedup([rows[p]], name) for p in at]
            places = [p + (i - (len(names) - 1) / 2) * width for p in at]
            bars = axes.bar(places, heights, width, label=name, color=f"C{CONTESTANTS.index(name)}")
            axes.bar_label(bars, [f"{rows[p]['contestants'][name]['rate']:.0f}" for p in at], fontsize=7)
        axes.set_xticks(range(len(rows)), ["\n".join(row["row"].values()) for row in rows])
        axes.set_ylabel("speed, torchvision eager = 1")
        axes.set_title(f"{title} ({rows[0]['unit']} above the bars)")
        axes.legend(fontsize=8)
    figure.suptitle(machine(results))
    figure.savefig(file, dpi=120, format="png")


def plot_memory(results: dict[str, Any], file: BinaryIO) -> None:
    """Draw each row's speed over its memory for an image, as a PNG image: best is above and to the left."""
    rows = [row for rows in tables(results).values() for row in rows if "peak" in row]
    columns = min(3, len(rows))
    figure = Figure(figsize=(6 * columns, 4 * -(-len(rows) // columns)), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, row in zip(figure.subplots(-(-len(rows) // columns), columns, squeeze=False).flat, rows, strict=False):
        for name, peak in row["peak"].items():
            axes.plot(
                peak / 2**20, row["contestants"][name]["rate"], "o", label=name, color=f"C{CONTESTANTS.index(name)}"
            )
        axes.set_title(" ".join(row["row"].values()))
        axes.set_xlabel("peak, MiB an image")
        axes.set_ylabel(row["unit"])
        axes.set_xscale("log")
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7)
    figure.suptitle(machine(results))
    figure.savefig(file, dpi=120, format="png")


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the three files")
    parser.add_argument("--quick", action="store_true", help="the smallest shapes, one round: checks the benchmarks")
    parser.add_argument("--no-compile", action="store_true", help="leave out torch.compile, which first compiles long")
    parser.add_argument(
        "--memory", action="store_true", help="memory of training steps instead, of variants that DIR does not hold"
    )
    parser.add_argument("--only", help="of the benchmarks, those whose names hold these words, as b3")
    args = parser.parse_args(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    options = [f"--{name.replace('_', '-')}" for name in ("quick", "no_compile") if getattr(args, name)]
    path = args.output / "benchmarks.json"
    try:
        if args.memory:
            run_memory(path, options, args.only or "", args.quick)
        else:
            run(path, FILES, options + (selected(args.only) if args.only else []))
    except ValueError as error:
        parser.error(str(error))
    results = json.loads(path.read_text())
    text = "\n".join(markdown(results)) + "\n"
    write_atomic(path.with_suffix(".md"), lambda file: file.write(text.encode()))
    write_atomic(path.with_suffix(".png"), lambda file: (plot_memory if args.memory else plot)(results, file))
    print(text)


if __name__ == "__main__":
    main()
