"""What a study found: its results as JSON, as tables, and as figures."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from effnet_fast.doctor import processor
from effnet_fast.plots import plot_scaling, plot_training
from effnet_fast.run_folder import RunError, RunFolder, read_json, write_atomic
from effnet_fast.summary import PUBLISHED, count

RESULTS = "results.json"

# Top-1 in percent. The reference study's own claims, on CIFAR-10, of one seed; and the paper's figure 8, on ImageNet.
STUDY_TOP1 = {"baseline": 89.45, "depth": 86.31, "width": 88.40, "resolution": 88.80, "compound": 85.21}
PAPER_TOP1 = {"baseline": 77.3, "depth": 79.0, "width": 78.9, "resolution": 79.1, "compound": 81.1}

# Of a run's configuration: what tells the runs of a comparison apart, and what decides nothing about their results.
APART = ("variant", "seed", "input_size")
IRRELEVANT = (
    *("data_dir", "verify", "num_workers", "memory", "profile"),
    *("max_bad_steps", "checkpoint_minutes", "keep_checkpoints"),
)

counts = cache(count)

Results = dict[str, Any]
Run = dict[str, Any]


def run_name(recipe: str, variant: str, seed: int) -> str:
    """Of a run's folder in the study's folder of runs."""
    return f"{recipe}-{variant}-{seed}"


def settings(config: dict[str, Any]) -> dict[str, Any]:
    """The part of a run's configuration that all runs of a comparison have in common."""
    return {name: value for name, value in config.items() if name not in (*APART, *IRRELEVANT, "classes")}


def collect(output: Path) -> Results:
    """The results of the runs in a study's folder as they are now, and what else results.json knows.

    That is eager PyTorch's images/s, and finished runs whose folders are gone: a study goes on from its results.json.
    Raises RunError for files that are damaged, or runs of one recipe whose configurations differ.
    """
    known = read(output) if (output / RESULTS).exists() else {"settings": {}, "runs": [], "eager": {}}
    where = {_run_name(run): run["processor"] for run in known["runs"]}
    runs: list[Run] = []
    shared: dict[str, Any] = {}
    for path in sorted((output / "runs").glob("*-*-*/config.json")):
        recipe, variant, seed = path.parent.name.split("-")
        folder = RunFolder(path.parent)
        config = folder.config()
        common = shared.setdefault(recipe, settings(config))
        for name, value in settings(config).items():
            if common.get(name, value) != value:
                raise RunError(f"{path}: {name} is {value}, other runs of recipe {recipe} have {common[name]}")
        size = counts(
            config["variant"],
            config["family"],
            len(config["classes"]),
            config["resolution"],
            tuple(config["strides"]),
        )
        runs.append(
            {
                "recipe": recipe,
                "variant": variant,
                "seed": int(seed),
                "input_size": config["input_size"],
                "parameters": size.params,
                "macs": size.macs,
                "flops": size.flops,
                "processor": where.get(path.parent.name) or _machine(),
                "metrics": folder.metrics(),
            }
        )
    there = {_run_name(run) for run in runs}
    for run in known["runs"]:
        common = known["settings"][run["recipe"]]
        if _run_name(run) not in there and len(run["metrics"]) >= common["epochs"]:
            own = shared.setdefault(run["recipe"], common)
            if any(common.get(name, value) != value for name, value in own.items()):
                raise RunError(f"{output / RESULTS}: runs of recipe {run['recipe']} have other options than those here")
            runs.append(run)
    return {"settings": shared, "runs": runs, "eager": known["eager"]}


def finished(output: Path) -> dict[str, list[dict[str, Any]]]:
    """The metrics of a study's finished runs, by `run_name`. Raises RunError as `collect`."""
    results = collect(output)
    return {
        _run_name(run): run["metrics"]
        for run in results["runs"]
        if len(run["metrics"]) >= results["settings"][run["recipe"]]["epochs"]
    }


def _run_name(run: Run) -> str:
    return run_name(run["recipe"], run["variant"], run["seed"])


def _machine() -> str:
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def read(output: Path) -> Results:
    """results.json of a study's folder. Raises RunError."""
    path = output / RESULTS
    results = read_json(path, "study")
    if not isinstance(results, dict) or not {"settings", "runs", "eager"} <= results.keys():
        raise RunError(f"{path}: not the results of a study")
    return results


def write(results: Results, output: Path) -> None:
    """results.json, and what `draw` draws."""
    write_atomic(output / RESULTS, lambda file: file.write(json.dumps(results, indent=1).encode()))
    draw(results, output)


def draw(results: Results, output: Path) -> None:
    """results.md, figure.png and curves.png, for the runs that have finished an epoch."""
    text = "\n".join(_markdown(results)) + "\n"
    write_atomic(output / "results.md", lambda file: file.write(text.encode()))
    panels: dict[str, dict[str, tuple[float, float, float]]] = {}
    for recipe, rows in by_recipe(results).items():
        dataset = results["settings"][recipe]["dataset"]
        panels[f"effnet_fast, recipe {recipe}, {dataset}"] = {
            row.variant: (float(row.macs), *_mean_std(row.of("val_top1", -1))) for row in rows
        }
    panels["the reference study, cifar10"] = {
        variant: (float(counts(variant, "reference", 10).macs), top1, 0.0) for variant, top1 in STUDY_TOP1.items()
    }
    panels["the paper, ImageNet"] = {
        variant: (1e9 * PUBLISHED["paper"][variant], top1, 0.0) for variant, top1 in PAPER_TOP1.items()
    }
    plot_scaling(panels, output / "figure.png")
    curves = {
        f"recipe {recipe}": {row.variant: [run["metrics"] for run in row.runs] for row in rows}
        for recipe, rows in by_recipe(results).items()
    }
    if curves:
        plot_training(curves, output / "curves.png")


@dataclass(frozen=True)
class Row:
    """A variant's runs by one recipe: those that have ended, or else the one that got furthest."""

    variant: str
    epochs: int
    runs: list[Run]

    @property
    def done(self) -> int:
        """Epochs."""
        return min(len(run["metrics"]) for run in self.runs)

    @property
    def macs(self) -> int:
        return self.runs[0]["macs"]

    def of(self, key: str, epoch: int) -> list[float]:
        """A metric of one epoch, seed by seed."""
        return [run["metrics"][epoch][key] for run in self.runs]

    def median_of(self, key: str) -> float:
        """Of a metric, over all epochs."""
        return median(row[key] for run in self.runs for row in run["metrics"])

    @property
    def seconds(self) -> float:
        """Of one whole run. An epoch that was interrupted counts as the others do."""
        return self.epochs * self.median_of("seconds")


def by_recipe(results: Results) -> dict[str, list[Row]]:
    """The rows of each recipe's table, in the order of the paper's figure."""
    tables: dict[str, list[Row]] = {}
    for recipe, shared in results["settings"].items():
        started = [run for run in results["runs"] if run["recipe"] == recipe and run["metrics"]]
        variants = {run["variant"]: None for run in started}
        order = [variant for variant in PAPER_TOP1 if variant in variants]
        for variant in (*order, *(variant for variant in variants if variant not in order)):
            runs = [run for run in started if run["variant"] == variant]
            ended = [run for run in runs if len(run["metrics"]) >= shared["epochs"]]
            furthest = max(runs, key=lambda run: len(run["metrics"]))
            tables.setdefault(recipe, []).append(Row(variant, shared["epochs"], ended or [furthest]))
    return tables


def _mean_std(values: list[float]) -> tuple[float, float]:
    return mean(values), stdev(values) if len(values) > 1 else 0.0


def _percent(values: list[float]) -> str:
    center, spread = _mean_std(values)
    return f"{center:.2f} ± {spread:.2f}" if len(values) > 1 else f"{center:.2f}"


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def _markdown(results: Results) -> Iterator[str]:
    if results["runs"]:
        yield f"On {'; '.join(dict.fromkeys(run['processor'] for run in results['runs']))}."
    yield "Top-1 on the whole validation split, mean ± standard deviation over the seeds; `best` is the best epoch of"
    yield "that split itself. A training run's time is the median epoch's, validation included, times the epochs."
    for recipe, rows in by_recipe(results).items():
        shared = results["settings"][recipe]
        eager = results["eager"].get(recipe, {})
        yield from ("", f"### Recipe {recipe}", "")
        yield f"`{', '.join(f'{name} {value}' for name, value in shared.items() if value is not None)}`"
        yield from ("", *_table(_accuracies(rows)), "", *_table(_costs(rows, eager)))
        if all(row.variant in eager for row in rows):
            ours = sum(row.seconds for row in rows)
            theirs = sum(row.seconds * _speedup(row, eager) for row in rows)
            yield from (
                "",
                f"All of these, a seed each: {_duration(ours)}; in eager PyTorch, by its images/s",
            )
            yield f"at the better precision, {_duration(theirs)}: {theirs / ours:.2f} times as long."


def _table(rows: list[list[str]]) -> Iterator[str]:
    head, *body = rows
    for cells in (head, ["---"] * len(head), *body):
        yield f"| {' | '.join(cells)} |"


def _accuracies(rows: list[Row]) -> list[list[str]]:
    head = ["variant", "epochs", "seeds", "last, %", "best, %", "EMA, last, %"]
    cells = [[*head, "the reference study, %", "the paper, ImageNet, %"]]
    for row in rows:
        best = [max(epoch["val_top1"] for epoch in run["metrics"]) for run in row.runs]
        cells.append(
            [
                row.variant,
                str(row.epochs) if row.done >= row.epochs else f"{row.done} of {row.epochs}, partial",
                ", ".join(str(run["seed"]) for run in row.runs),
                *(_percent(values) for values in (row.of("val_top1", -1), best, row.of("ema_top1", -1))),
                *(str(known.get(row.variant, "")) for known in (STUDY_TOP1, PAPER_TOP1)),
            ]
        )
    return cells


def _costs(rows: list[Row], eager: dict[str, dict[str, float]]) -> list[list[str]]:
    head = ["variant", "input, px", "parameters", "MACs, M", "FLOPs, M", "images/s", "peak memory, MiB", "a run's time"]
    if eager:
        head += ["eager fp32, images/s", "eager bf16, images/s", "eager, a run's time"]
    cells = [[*head, "the reference study, FLOPs, B", "the paper, MACs, B"]]
    for row in rows:
        run = row.runs[0]
        line = [row.variant, str(run["input_size"]), f"{run['parameters']:,}"]
        line += [f"{run[key] / 1e6:,.2f}" for key in ("macs", "flops")]
        line += [f"{row.median_of('images_per_second'):.0f}", f"{row.median_of('peak_memory_bytes') / 2**20:,.0f}"]
        line += [_duration(row.seconds)]
        if row.variant in eager:
            line += [f"{eager[row.variant][amp]:.0f}" for amp in ("off", "bf16")]
            line += [_duration(row.seconds * _speedup(row, eager))]
        elif eager:
            line += [""] * 3
        known = (PUBLISHED[family].get(row.variant) for family in ("reference", "paper"))
        cells.append(line + ["" if value is None else f"{value:.2f}" for value in known])
    return cells


def _speedup(row: Row, eager: dict[str, dict[str, float]]) -> float:
    return row.median_of("images_per_second") / max(eager[row.variant].values())
