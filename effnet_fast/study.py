"""Train the variants by one recipe and compare them: ``python -m effnet_fast.study --data-dir D --resolution 32``.

Every other option is the training command's, for all runs. One run trains at a time, each in a folder of --output/runs;
whatever ends the command, the same command goes on where it was. What has finished stands in results.json, and is not
trained again even if its folder is gone.
"""

import importlib.util
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import torch

from effnet_fast import cam, study_report, train
from effnet_fast.cli import ArgumentParser, at_least
from effnet_fast.config import Config
from effnet_fast.data import load_dataset
from effnet_fast.memory import keep_freed_memory
from effnet_fast.passes.backend import use_backend
from effnet_fast.run_folder import RunFolder, write_atomic
from effnet_fast.run_model import RunModel
from effnet_fast.scaling import VARIANTS
from effnet_fast.signals import SIGNALS, Stopped, StopSignals
from effnet_fast.study_report import run_name
from effnet_fast.trainer import Trainer

# Options of the training command.
RECIPES = {
    "reference": [],
    # For images of 32 pixels, seen whole, whose last map is 1 x 1 in the reference recipe and 4 x 4 here, and for 35
    # epochs. In 6 epochs of 20,000 images, learning rates of 0.04 and 0.1 ended alike (78.4 and 78.7 %), a last
    # BatchNorm of each block that starts at 0 a point lower, and torchvision's initialization 30 points (its
    # projections' weights are six times as large, so that a step turns them less). In 8 epochs of 10,000 a weight decay
    # of 1e-4 ended 5 points lower, and so did AdamW (2e-3). 35 epochs ended as high (89.4 %) with random erasing and
    # 87.5 % of each side seen, and with erasing and a learning rate of 0.02, whose average of the weights was 3 points
    # ahead in epoch 15. CutMix by turns with mixup (0.2) was no better (0.03: 89.1 % in epoch 32; 0.1: 75 % in epoch
    # 14). Muon (4e-3, weight decay 0.1) ends 8 epochs of 10,000 at 79 %, SGD at 71; it has not been run for 35.
    "tuned": [
        *("--strides", "1,1,1,2,2,1,2,1", "--augment", "crop", "--crop-pct", "1"),
        *("--drop-rate", "0", "--drop-path-rate", "0", "--optimizer", "sgd", "--lr", "0.05", "--weight-decay", "5e-4"),
        *("--schedule", "cosine", "--warmup-epochs", "2", "--ema-decay", "0.999"),
    ],
}

# Those that tell most come first.
ORDER = ("baseline", "compound", "depth", "width", "resolution")

# Where they are not known before the data is read, and hardly matter: CIFAR-10's.
CLASSES = 10

CAM_IMAGES = 6
EAGER_STEPS = 7

Metrics = list[dict[str, Any]]  # of a run, an epoch each


class Run(NamedTuple):
    """One to be trained: the training command's options and what follows from them."""

    recipe: str
    path: Path
    options: list[str]
    config: Config

    def __str__(self) -> str:
        return f"{self.config.variant}, recipe {self.recipe}, seed {self.config.seed}"


def _parser() -> ArgumentParser:
    parser = ArgumentParser(
        prog="python -m effnet_fast.study",
        description=__doc__.partition("\n")[0].partition(": ``")[0] + ".",
        epilog="All other options are those of `python -m effnet_fast.train`, and hold for all runs.",
        allow_abbrev=False,
    )
    parser.add_argument("--recipe", choices=RECIPES, default="reference", help="default: reference")
    parser.add_argument(
        "--variants", nargs="+", choices=VARIANTS, default=ORDER, metavar="VARIANT", help=f"default: {' '.join(ORDER)}"
    )
    parser.add_argument(
        "--seeds",
        type=at_least(1),
        default=1,
        metavar="COUNT",
        help="runs of each variant: seeds 0, 1, ...; default: 1",
    )
    parser.add_argument("--output", type=Path, default=Path("results"), help="folder of the study; default: results")
    parser.add_argument(
        "--measure-eager",
        action="store_true",
        help="first time training steps in eager PyTorch, where that is not known",
    )
    parser.add_argument(
        "--plot-only", action="store_true", help="only draw tables and figures anew, from the results.json in --output"
    )
    return parser


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args, options = parser.parse_known_args(argv)
    try:
        if args.plot_only:
            study_report.draw(study_report.read(args.output), args.output)
            return
        runs = _plan(args.recipe, args.variants, args.seeds, options, args.output)
        with StopSignals() as signals:
            failed = _train_all(runs, args.output, args.measure_eager, signals)
    except Stopped as stopped:
        parser.exit(stopped.status, f"{parser.prog}: {stopped}; go on with the same command\n")
    except OSError as error:
        parser.error(f"argument --output: can't write to {args.output}: {error.strerror}")
    except ValueError as error:
        parser.error(str(error))
    if failed:
        parser.exit(1, f"{parser.prog}: not trained, see above: {'; '.join(map(str, failed))}\n")


def _plan(recipe: str, variants: list[str], seeds: int, options: list[str], output: Path) -> list[Run]:
    """The study's runs in order. Raises ValueError for options that can't be, or not those of the runs there."""
    common = [*RECIPES[recipe], *options]
    default, given = train.configuration([]), train.configuration(common)
    for name, instead in (("variant", "--variants"), ("seed", "--seeds")):
        if getattr(given, name) != getattr(default, name):
            raise ValueError(f"--{name}: got {getattr(given, name)}, give {instead} instead")
    if importlib.util.find_spec("pytorch_grad_cam") is None:
        raise ValueError("grad-cam is not installed, run `pip install effnet_fast[cam]`")
    runs = []
    for seed in range(seeds):
        for variant in variants:
            path = output / "runs" / run_name(recipe, variant, seed)
            own = ["--variant", variant, "--seed", str(seed), "--output", str(path), "--resume", "auto"]
            runs.append(Run(recipe, path, [*common, *own], train.configuration([*common, *own])))
    there = study_report.collect(output)["settings"].get(recipe, {})
    for name, value in study_report.settings(vars(runs[0].config)).items():
        if there.get(name, value) != value:
            raise ValueError(
                f"--{name.replace('_', '-')}: got {value}, the runs of recipe {recipe} in {output} have {there[name]}"
            )
    return runs


def _train_all(runs: list[Run], output: Path, measure_eager: bool, signals: StopSignals) -> list[Run]:
    """Train what is not trained yet, and write the results after each run. Returns the runs that failed.

    Raises Stopped after a signal. Ends the process if not even the first run can begin.
    """
    failed = []
    output.mkdir(parents=True, exist_ok=True)
    if measure_eager:
        _measure_eager(runs, output, signals)
    finished = study_report.finished(output)
    for number, run in enumerate(runs, 1):
        if run.path.name in finished:
            print(f"study: run {number} of {len(runs)} ({run}) is finished", flush=True)
            continue
        print(f"study: run {number} of {len(runs)} ({run}), {_progress(runs, finished)}", flush=True)
        status = _in_child(train.main, run.options, partial(_print_progress, runs, finished), signals=signals)
        if not RunFolder(run.path).has_run():
            signals.check()
            sys.exit(status)  # its reason is printed, and would be the others' too
        study_report.write(study_report.collect(output), output)
        signals.check()
        if status != 0:
            failed.append(run)
        elif _in_child(_draw_cam, run.config, output, signals=signals) != 0:
            print(f"study: {output / 'cam.png'} could not be drawn, see above", file=sys.stderr)
        signals.check()
    study_report.write(study_report.collect(output), output)
    print(f"Tables and figures: {output}", flush=True)
    return failed


# A run has a process of its own so that its peak memory is its own. It is forked from one that has imported what trains
# and does nothing else: that takes no time, and what trains does not change under a study that lasts for hours.


def _in_child(function: Callable[..., None], *args: Any, signals: StopSignals) -> int:
    """Call a function in a new process, which gets the first signal to this one and ends with it. Returns its status.

    A terminal or a supervisor may send signals to both: those from elsewhere the child does not see.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([train.__name__, cam.__name__, study_report.__name__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(receiver, function, *args))
    resource_tracker.ensure_running()  # starting it would end the blocking
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    receiver.close()
    told = False
    with sender:
        while not wait([process.sentinel], timeout=0.2):
            if signals.received is not None and not told:
                sender.send(signals.received)
                told = True
    process.join()
    return process.exitcode


def _child(parent: Connection, function: Callable[..., None], *args: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    multiprocessing.set_start_method(None, force=True)  # the system's default, which a forked process does not have
    threading.Thread(target=_obey, args=(parent,), daemon=True).start()
    function(*args)


def _obey(parent: Connection) -> None:
    try:
        while True:
            number = parent.recv()
            # All threads were started with both blocked. Those from elsewhere, which wait, are dropped first.
            while signal.sigtimedwait(SIGNALS, 0):
                pass
            signal.pthread_sigmask(signal.SIG_UNBLOCK, SIGNALS)
            signal.raise_signal(number)
            signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    except EOFError:  # the parent was killed
        os._exit(1)


def _print_progress(runs: list[Run], finished: dict[str, Metrics]) -> None:
    print(f"study: {_progress(runs, finished)}", flush=True)


def _progress(runs: list[Run], finished: dict[str, Metrics]) -> str:
    """How far the study is, and the time left as far as it can be told: by a variant's own epochs, else by its MACs.

    finished: metrics by names of folders, of runs whose folders may be gone.
    """
    done, seconds, per_mac = {}, {}, []
    for run in runs:
        metrics = finished.get(run.path.name) or RunFolder(run.path).metrics()
        done[run.path] = min(len(metrics), run.config.epochs)
        if metrics:
            seconds[run.config.variant] = median(row["seconds"] for row in metrics)
            per_mac.append(seconds[run.config.variant] / _macs(run.config))
    text = f"{sum(done.values())} of {sum(run.config.epochs for run in runs)} epochs"
    if not per_mac:
        return text
    left = 0.0
    for run in runs:
        known = seconds.get(run.config.variant)
        epoch = mean(per_mac) * _macs(run.config) if known is None else known
        left += (run.config.epochs - done[run.path]) * epoch
    return f"{text}, about {timedelta(seconds=round(left))} left"


def _macs(config: Config) -> int:
    counts = study_report.counts(config.variant, config.family, CLASSES, config.resolution, tuple(config.strides))
    return counts.macs


def _measure_eager(runs: list[Run], output: Path, signals: StopSignals) -> None:
    """Add to results.json the images/s of training steps in eager PyTorch, of variants where it has none."""
    for run in runs:
        results = study_report.collect(output)
        if run.config.variant in results["eager"].get(run.recipe, {}):
            continue
        print(f"study: eager PyTorch's training steps of {run.config.variant}", flush=True)
        status = _in_child(_store_eager, run, output, signals=signals)
        signals.check()
        if status != 0:
            raise ValueError(f"--measure-eager: failed for {run.config.variant}, see above")


def _store_eager(run: Run, output: Path) -> None:
    keep_freed_memory()
    figures = {amp: _eager_rate(replace(run.config, backend="eager", amp=amp)) for amp in ("off", "bf16")}
    results = study_report.collect(output)
    results["eager"].setdefault(run.recipe, {})[run.config.variant] = figures
    study_report.write(results, output)


def _eager_rate(config: Config) -> float:
    """Images per second of a training step of ready batches: the median of some, after two that warm up."""
    shape = (config.batch_size, 3, config.input_size, config.input_size)
    images = torch.randn(shape, device=config.device).contiguous(memory_format=torch.channels_last)
    labels = torch.arange(config.batch_size, device=config.device) % CLASSES
    times = []
    with use_backend(config.backend):
        trainer = Trainer(config, CLASSES)
        for _ in range(EAGER_STEPS):
            start = time.perf_counter()
            trainer.train_step([(images, labels)])  # waits for the device
            times.append(time.perf_counter() - start)
    return config.batch_size / median(times[2:])


def _draw_cam(config: Config, output: Path) -> None:
    """Grad-CAM of a finished run of each recipe and variant, on the first image of some classes of the data."""
    data = load_dataset(config.dataset, config.data_dir, verify=config.verify)
    models = []
    for recipe, rows in study_report.by_recipe(study_report.collect(output)).items():
        for row in rows:
            path = output / "runs" / run_name(recipe, row.variant, row.runs[0]["seed"])
            if row.done >= row.epochs and path.exists():
                models.append((f"{row.variant}, {recipe}", RunModel.load(path)))
    labels = data.val.labels.tolist()
    images = []
    for label, name in list(enumerate(data.classes))[:CAM_IMAGES]:
        pixels, _ = data.val[labels.index(label)]
        images.append((Path(name), [model.prepare(pixels) for _, model in models]))
    figure = cam.draw(models, images)
    write_atomic(output / "cam.png", lambda file: figure.savefig(file, format="png", dpi=100))


if __name__ == "__main__":
    main()
