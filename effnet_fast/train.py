"""Train a variant: ``python -m effnet_fast.train --variant compound`` is the study's run on CIFAR-10."""

import os
import random
import resource
import sys
import threading
import time
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from datetime import datetime, timedelta
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.profiler import profile, schedule
from torch.utils import deterministic
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from effnet_fast import distributed
from effnet_fast.amp import AMP_DTYPES
from effnet_fast.augment import AUGMENTS, AUTOAUGMENTS, ERASE, Batch, Loader, train_loader, val_loader
from effnet_fast.cli import ArgumentParser, at_least, devices, integers
from effnet_fast.config import Config, fixed_difference, stored_options
from effnet_fast.data import CROP_PCT, DATASETS, check_crop_pct, load_dataset
from effnet_fast.evaluate import evaluate
from effnet_fast.memory import available_bytes, format_bytes, keep_freed_memory, parse_memory, ran_out_of_memory
from effnet_fast.model import STRIDES, check_strides
from effnet_fast.passes.backend import BACKENDS, current, use_backend
from effnet_fast.planning import Planner, describe
from effnet_fast.plots import plot_curves
from effnet_fast.recipe import EMA_DECAY, LABEL_SMOOTHING, OPTIMIZERS, SCHEDULES, WARMUP_EPOCHS, default_lr
from effnet_fast.run_folder import RunError, RunFolder, read_checkpoint
from effnet_fast.scaling import BASE_RESOLUTION, FAMILIES, VARIANTS
from effnet_fast.signals import Stopped, StopSignals
from effnet_fast.summary import Counts, count
from effnet_fast.trainer import Trainer, make_planner
from effnet_fast.weights import load_weights

# What --batch-size auto takes a dataset to have, which is not read yet: the classifier's weights are few anyway.
MANY_CLASSES = 1000

# Of the memory that a process takes, its tensors' share: the heap has gaps, of a fifth in the steps tried.
FILLED = 0.8


class OutOfMemory(RuntimeError):
    """An allocation failed in training. advice: options that would fit, if it was foreseen."""

    def __init__(self, classes: int, available: int, advice: str | None) -> None:
        super().__init__("out of memory")
        self.facts = classes, available, advice


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.train", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="baseline", help="default: baseline")
    parser.add_argument("--family", choices=FAMILIES, default="reference", help="default: reference")
    parser.add_argument(
        "--strides",
        type=integers,
        default=list(STRIDES),
        help="of the stem and the seven stages, with commas, 1 or 2: fewer twos suit images of 32 pixels; "
        f"default: {','.join(map(str, STRIDES))}",
    )
    parser.add_argument("--dataset", choices=DATASETS, default="cifar10", help="default: cifar10")
    parser.add_argument("--data-dir", help="where the images are; cifar10 without it downloads to ./data")
    parser.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="accept CIFAR-10 files whose MD5 is not the official one",
    )
    parser.add_argument(
        "--resolution",
        type=at_least(1),
        default=BASE_RESOLUTION,
        help="baseline's input size in pixels, which the variant's multiplier scales; default: 224",
    )
    parser.add_argument("--epochs", type=at_least(1), default=35, help="default: 35")
    parser.add_argument(
        "--batch-size",
        type=_batch_size,
        default=128,
        metavar="N|auto",
        help="auto: the largest that fits --memory, or the machine's free memory; default: 128",
    )
    parser.add_argument("--lr", type=at_least(0.0), help="peak learning rate; default: 0.256 * batch size / 256")
    parser.add_argument("--augment", choices=AUGMENTS, default="reference", help="default: reference")
    parser.add_argument(
        "--crop-pct",
        type=at_least(0.0),
        default=CROP_PCT,
        help="share of an image's side that validation sees, and the scale of --augment crop; default: 0.875",
    )
    parser.add_argument(
        "--erase",
        type=at_least(0.0),
        metavar="SHARE",
        help="of the images, of which random erasing hides a part; default: 0.5, 0 with --augment crop",
    )
    parser.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision; default: fp16 on CUDA, else off")
    parser.add_argument(
        "--memory",
        type=_memory,
        default="fast",
        metavar="fast|lean|min|AMOUNT",
        help="what is kept for the backward pass; less takes longer, results are the same. An amount, as 8GB, is for "
        "the tensors of a step: each part then keeps what is fastest within it, see effnet_fast.plan; default: fast",
    )
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/VARIANT-DATASET-TIME")
    parser.add_argument(
        "--resume",
        metavar="auto|CHECKPOINT",
        help="go on with the run in --output from its newest good checkpoint (auto; a new run if there is none), "
        "or from the checkpoint named; the run's own options are the defaults then",
    )
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="rmsprop", help="default: rmsprop")
    parser.add_argument("--weight-decay", type=at_least(0.0), help="default: the optimizer's, 1e-5 for rmsprop")
    parser.add_argument(
        "--schedule", choices=SCHEDULES, default="exponential", help="after the warm-up; default: exponential"
    )
    parser.add_argument(
        "--warmup-epochs",
        type=at_least(0),
        default=WARMUP_EPOCHS,
        help="in which the learning rate grows to its peak; default: 10",
    )
    parser.add_argument("--label-smoothing", type=at_least(0.0), default=LABEL_SMOOTHING, help="default: 0.1")
    parser.add_argument(
        "--drop-rate", type=at_least(0.0), help="dropout before the classifier; default: the variant's, 0.2 or more"
    )
    parser.add_argument(
        "--drop-path-rate", type=at_least(0.0), help="of the last block, those before have less; default: 0.2"
    )
    parser.add_argument("--ema-decay", type=at_least(0.0), default=EMA_DECAY, help="default: 0.9999")
    parser.add_argument(
        "--no-ema-warmup", dest="ema_warmup", action="store_false", help="use the decay from the first step on"
    )
    parser.add_argument("--accumulate", type=at_least(1), default=1, help="batches that make a step; default: 1")
    parser.add_argument("--mixup", type=at_least(0.0), default=0.0, help="alpha of mixup; default: 0, off")
    parser.add_argument(
        "--cutmix", type=at_least(0.0), default=0.0, help="alpha of CutMix, by turns with mixup; default: 0, off"
    )
    parser.add_argument(
        "--autoaugment", choices=AUTOAUGMENTS, help="AutoAugment policy; default: cifar10 in reference, none in fast"
    )
    parser.add_argument(
        "--randaugment", type=at_least(0), metavar="MAGNITUDE", help="RandAugment in place of AutoAugment, 0 to 30"
    )
    parser.add_argument(
        "--freeze", metavar="MODULES", help="names with commas, as stem,stages.0,stages.1: these stay as they are"
    )
    parser.add_argument(
        "--weights", help="start from the weights in a file: of this package, torchvision or timm; .pt or .safetensors"
    )
    parser.add_argument(
        "--sync-bn", action="store_true", help="normalize over the batches of all processes instead of each one's own"
    )
    parser.add_argument("--compile", action="store_true", help="train through torch.compile")
    parser.add_argument("--profile", action="store_true", help="write trace.json of three steps to the run folder")
    parser.add_argument("--clip-grad", type=at_least(0.0), help="scale gradients down to this norm; default: off")
    parser.add_argument(
        "--max-bad-steps",
        type=at_least(1),
        default=10,
        help="stop after so many steps in a row whose loss or gradient was not finite; such steps are skipped; "
        "default: 10",
    )
    parser.add_argument(
        "--checkpoint-minutes",
        type=at_least(0.0),
        default=15.0,
        help="write a checkpoint when the last is so old, besides after each epoch; default: 15",
    )
    parser.add_argument(
        "--keep-checkpoints", type=at_least(1), default=2, help="of the latest, besides the best; default: 2"
    )
    parser.add_argument("--limit-train", type=at_least(1), help="train on so many images only")
    parser.add_argument("--limit-val", type=at_least(1), help="validate on so many images only")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that augment; default: 2")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--backend", choices=BACKENDS, help="of the fused ops; default: auto")
    return parser


def _batch_size(text: str) -> int | str:
    return text if text == "auto" else at_least(1)(text)


def _memory(text: str) -> str:
    try:
        parse_memory(text)
    except ValueError as error:
        raise ArgumentTypeError(str(error).removeprefix("memory: ")) from None
    return text


def configuration(argv: list[str]) -> Config:
    """What the command would train, in a new run, with these options. Ends the process where they are wrong."""
    parser = _parser()
    args = vars(parser.parse_args(argv))
    del args["output"], args["resume"]
    try:
        return _config(args)
    except ValueError as error:
        parser.error(str(error))


def main(argv: list[str] | None = None, after_epoch: Callable[[], None] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    shortage: tuple[int, int, str | None] | None = None
    try:
        with distributed.process_group():
            config, output, resume, state = _plan(parser, argv)
            # No process may write before all have seen what is there.
            distributed.largest(0, device=torch.device(config.device))
            with use_backend(config.backend):
                train(config, output, resume=resume, state=state, after_epoch=after_epoch)
        return
    except Stopped as stopped:
        status, message = stopped.status, f"{stopped}; go on with --resume auto --output {output}"
    except KeyboardInterrupt:
        status, message = 130, "stopped by SIGINT before it could save"
    except OutOfMemory as error:
        status, message, shortage = 1, "error: out of memory", error.facts
    except ValueError as error:
        status, message = 2, f"error: {error}"
    except OSError as error:
        # Those of TensorBoard's writer name no file: it writes to the run's folder.
        status, message = 2, f"error: {error.filename or output}: {error.strerror or error}"
    except RuntimeError as error:
        if not distributed.lost_process(error):
            raise
        status, message = 1, "error: another process of this run ended; go on with --resume auto"
    # Only now, without the exception and the frames that it refers to: they hold the loaders, whose workers have to end
    # before this process does, and the tensors that filled the memory.
    if shortage is not None:
        classes, available, advice = shortage
        with use_backend(config.backend):
            advice = advice or _what_would_fit(config, make_planner(config, classes), available)
        message += f": {advice}"
        if any(RunFolder(output).checkpoints()):
            message += f"; the last checkpoint in {output} is intact"
    parser.exit(status, f"{parser.prog}: {' '.join(message.split())}\n")


def _plan(parser: ArgumentParser, argv: list[str] | None) -> tuple[Config, Path, bool, dict[str, Any] | None]:
    """What to train and where, whether a run is there already, and the state that it goes on from."""
    args = vars(parser.parse_args(argv))
    output, resume = args.pop("output"), args.pop("resume")
    if resume is None or (resume == "auto" and output is not None and not RunFolder(output).has_run()):
        config = _config(args)
        if output is None:
            output = Path("runs") / f"{config.variant}-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
        return config, output, False, None
    if resume == "auto":
        if output is None:
            raise ValueError("--resume auto: needs --output, the folder of the run")
        stored = stored_options(RunFolder(output).config())
        state = _newest_state(RunFolder(output), stored)
    else:
        path = Path(resume)
        if output not in (None, path.parent):
            raise ValueError(f"--output: got {output}, a run goes on in the checkpoint's folder, {path.parent}")
        output = path.parent
        state = read_checkpoint(path)
        stored = stored_options(state.get("config"))
    # The run's own options are the defaults now.
    parser.set_defaults(**stored)
    args = vars(parser.parse_args(argv))
    if args["batch_size"] == "auto":
        args["batch_size"] = stored["batch_size"]
    del args["output"], args["resume"]
    config = _config(args)
    difference = fixed_difference(stored, asdict(config))
    if difference is not None:
        name = difference.replace("_", "-")
        raise ValueError(f"--{name}: got {args[difference]}, the run in {output} has {stored.get(difference)}")
    return config, output, True, state


def _newest_state(run: RunFolder, stored: dict[str, Any]) -> dict[str, Any] | None:
    """Of the newest good checkpoint; None if the run was ended before it had one.

    Raises RunError if there are checkpoints but no good one.
    """
    path = None
    for path in run.checkpoints():
        try:
            state = read_checkpoint(path)
            if fixed_difference(stored, stored_options(state.get("config"))) is not None:
                raise RunError(f"{path}: not a checkpoint of this run")
            return state
        except ValueError as error:
            print(f"{error}; left out", file=sys.stderr)
    if path is not None:
        raise RunError(f"{run.path}: no checkpoint in it is good; delete them to train from the beginning")
    return None


def _config(args: dict[str, Any]) -> Config:
    check_strides(args["strides"])
    check_crop_pct(args["crop_pct"])
    for name in ("drop_rate", "drop_path_rate"):
        if args[name] is not None and args[name] >= 1:
            raise ValueError(f"--{name.replace('_', '-')}: got {args[name]}, must be from 0 to less than 1")
    if args["erase"] is None:
        args["erase"] = ERASE[args["augment"]]
    if args["erase"] > 1:
        raise ValueError(f"--erase: got {args['erase']}, must be from 0 to 1")
    device = _device(args["device"])
    args["device"] = str(device)
    if args["amp"] is None:
        args["amp"] = "fp16" if device.type == "cuda" else "off"
    if args["backend"] is None:
        args["backend"] = current()
    args["processes"] = distributed.processes()
    if args["weight_decay"] is None:
        args["weight_decay"] = OPTIMIZERS[args["optimizer"]].weight_decay
    if args["batch_size"] == "auto":
        args["batch_size"] = _largest_batch(Config(**args | {"batch_size": 1}))
    if args["lr"] is None:
        batch_size = args["batch_size"] * args["accumulate"] * distributed.processes()
        args["lr"] = default_lr(batch_size, args["optimizer"])
    return Config(**args)


def _largest_batch(config: Config) -> int:
    """For --batch-size auto, the same in all processes."""
    device = torch.device(config.device)
    memory = parse_memory(config.memory)
    budget, policy = (memory, None) if isinstance(memory, int) else (_available(device, config.processes), memory)
    with use_backend(config.backend):
        planner = make_planner(config, MANY_CLASSES)
        largest = -distributed.largest(-planner.largest_batch(budget, policy), device=device)[0]
    if largest < 1:
        needed = planner.least(1) if policy is None else planner.uniform(policy, 1).peak
        raise ValueError(
            f"--batch-size auto: a batch of one needs {format_bytes(needed)} with --memory {config.memory}, "
            f"there are {format_bytes(budget)}"
        )
    return largest


def _available(device: torch.device, processes: int) -> int:
    """Bytes for each of the processes; those on the CPU share it."""
    return available_bytes(device) // (processes if device.type == "cpu" else 1)


def _foresee(config: Config, classes: int, activations: int, available: int) -> str | None:
    """What would fit, if a step needs more than there is. activations: of one image, for a first guess."""
    if 4 * (4 if config.amp == "off" else 2) * activations * config.batch_size < available:
        return None  # the planner takes seconds
    planner = make_planner(config, classes)
    return None if _needed(config, planner) < available else _what_would_fit(config, planner, available)


def _needed(config: Config, planner: Planner) -> int:
    """Bytes of the run's step."""
    memory = parse_memory(config.memory)
    if isinstance(memory, int):
        return planner.fastest(config.batch_size, memory).peak
    return planner.uniform(memory, config.batch_size).peak


def _what_would_fit(config: Config, planner: Planner, available: int) -> str:
    """What the run's step needs, what there is, and the options that would do with it."""
    needed = _needed(config, planner)
    # if it should have fitted, something else took of it
    amount = f"{int(FILLED * min(available, needed) / 1e6)}MB"
    budget = parse_memory(amount)
    assert isinstance(budget, int)
    smaller = planner.largest_batch(budget)
    if smaller >= config.batch_size:
        plan = planner.fastest(config.batch_size, budget)
        advice = f"--memory {amount} would fit, {plan.extra_time:.0%} slower than --memory fast by estimate"
    elif smaller:
        advice = f"--memory {amount} --batch-size {smaller} would fit"
    else:
        advice = f"no batch fits {amount}; a smaller --resolution or --variant would"
    return (
        f"a step of batch {config.batch_size} at {config.input_size} px needs {format_bytes(needed)} with --memory "
        f"{config.memory}, there are {format_bytes(available)}; {advice}"
    )


def _device(name: str | None) -> torch.device:
    if distributed.processes() > 1 and torch.cuda.is_available() and (name is None or name.startswith("cuda")):
        return torch.device("cuda", distributed.local_rank())
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name not in devices():
        raise ValueError(f"--device: got {name!r}, choose from {', '.join(devices())}")
    return torch.device(name)


def train(
    config: Config,
    output: Path,
    *,
    resume: bool = False,
    state: dict[str, Any] | None = None,
    after_epoch: Callable[[], None] | None = None,
) -> None:
    """Train and write the run folder (see the README).

    resume: go on with the run that is in `output`, from `state` (of a checkpoint) or from its beginning.
    after_epoch: called, in process 0, when an epoch's metrics and checkpoint are written.

    Raises DataError, RunError or ValueError, whose message is one line, Stopped after SIGTERM and SIGINT, and
    OutOfMemory.
    """
    _make_deterministic(config.seed)
    data = load_dataset(config.dataset, config.data_dir, verify=config.verify)
    train_split = data.train if config.limit_train is None else data.train.first(config.limit_train)
    val_split = data.val if config.limit_val is None else data.val.first(config.limit_val)
    shared: dict[str, Any] = {
        "augment": config.augment,
        "size": config.input_size,
        "crop_pct": config.crop_pct,
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "device": torch.device(config.device),
        "shard": (distributed.rank(), distributed.processes()),
    }
    batches = train_loader(
        train_split,
        seed=config.seed,
        mixup=config.mixup,
        cutmix=config.cutmix,
        num_classes=len(data.classes),
        autoaugment=config.autoaugment,
        randaugment=config.randaugment,
        erase=config.erase,
        **shared,
    )
    val_batches = val_loader(val_split, **shared)

    counts = count(config.variant, config.family, len(data.classes), config.resolution, config.strides)
    available = _available(torch.device(config.device), config.processes)
    advice = _foresee(config, len(data.classes), counts.activations, available)
    if advice is not None and distributed.rank() == 0:
        print(f"warning: memory may run out: {advice}", file=sys.stderr, flush=True)
    try:
        _train(config, output, data.classes, counts, batches, val_batches, len(train_split), resume, state, after_epoch)
    except (MemoryError, RuntimeError) as error:
        if not ran_out_of_memory(error):
            raise
        raise OutOfMemory(len(data.classes), available, advice) from None


def _train(
    config: Config,
    output: Path,
    classes: Sequence[str],
    counts: Counts,
    batches: Loader,
    val_batches: Loader,
    images: int,
    resume: bool,
    state: dict[str, Any] | None,
    after_epoch: Callable[[], None] | None,
) -> None:
    trainer = Trainer(config, len(classes))
    if state is not None:
        trainer.load_state_dict(state)
    elif config.weights is not None:
        for line in load_weights(trainer.model, Path(config.weights)):
            if distributed.rank() == 0:
                print(line, flush=True)
    stored = asdict(config) | {"input_size": config.input_size, "classes": classes}
    main_process = distributed.rank() == 0
    run = RunFolder(output)
    if main_process:
        if resume:
            run.reopen(stored, trainer.epoch)
        else:
            RunFolder.create(output, stored)
        print(
            f"Training {config.variant} ({config.family} family) on {config.dataset}: {counts.params:,} parameters, "
            f"{counts.macs / 1e6:,.1f} M MACs at {config.input_size} px, {len(classes)} classes; "
            f"{images:,} images, {config.epochs} x {len(batches)} steps of {config.batch_size}"
            f"{f' in each of {config.processes} processes' if config.processes > 1 else ''}; "
            f"{config.device}, amp {config.amp}, backend {config.backend}; {output}",
            flush=True,
        )
        if trainer.plan is not None:
            print(f"Memory: {describe(trainer.plan)}", flush=True)
        if resume:
            print(f"Going on after {trainer.epoch} epochs and {trainer.step} steps", flush=True)
    checkpoints = _Checkpoints(run, trainer)
    threading.excepthook = _report_thread
    start, first = time.perf_counter(), trainer.epoch + trainer.step / len(batches)
    with (
        SummaryWriter(output / "tensorboard", purge_step=trainer.epoch) if main_process else nullcontext() as board,
        StopSignals() as signals,
        _profiler(config, output) if main_process else nullcontext() as profiler,
    ):
        try:
            while trainer.epoch < config.epochs:
                epoch_start, epoch, lr = time.perf_counter(), trainer.epoch, trainer.lr
                images_per_second = _train_epoch(trainer, batches, checkpoints, signals, profiler, start, first)
                trainer.share_statistics()
                raw, averaged = (
                    evaluate(model, _val_batches(val_batches, signals), len(classes), trainer.device, config.amp)
                    for model in (trainer.model, trainer.ema.module)
                )
                metrics = {
                    "epoch": epoch,
                    "lr": lr,
                    "train_loss": trainer.mean_loss,
                    "val_loss": raw.loss,
                    "val_top1": raw.top1,
                    "val_top5": raw.top5,
                    "ema_top1": averaged.top1,
                    "images_per_second": images_per_second,
                    "seconds": time.perf_counter() - epoch_start,
                    "peak_memory_bytes": _peak_memory(trainer.device),
                }
                if main_process:
                    run.append_metrics(metrics)
                    for name in ("val_loss", "val_top1", "val_top5", "ema_top1", "lr"):
                        board.add_scalar(name, metrics[name], epoch)
                improved = trainer.finish_epoch(max(raw.top1, averaged.top1))
                checkpoints.save(best=improved)
                if main_process:
                    plot_curves(run.metrics(), f"{config.variant} on {config.dataset}", output / "curves.png")
                    tqdm.write(
                        f"epoch {trainer.epoch}/{config.epochs}: loss {metrics['train_loss']:.3f}, "
                        f"top-1 {raw.top1:.2f} %, EMA {averaged.top1:.2f} %, {images_per_second:.0f} images/s, "
                        f"{metrics['seconds']:.0f} s"
                    )
                    if after_epoch is not None:
                        after_epoch()
        except Stopped:
            checkpoints.save()
            raise
    if main_process:
        print(f"Best top-1 {trainer.best:.2f} %, {timedelta(seconds=round(time.perf_counter() - start))}; {output}")


def _report_thread(failed: threading.ExceptHookArgs) -> None:
    """TensorBoard writes in a thread. Its OSError is raised again by the next call, which ends the run in one line."""
    if not issubclass(failed.exc_type, OSError):
        threading.__excepthook__(failed)


def _val_batches(batches: Loader, signals: StopSignals) -> Iterable[Batch]:
    """A process on its own may stop between batches; several have unequal numbers of them and stop together later."""
    return signals.between(batches.epoch(0)) if distributed.processes() == 1 else batches.epoch(0)


class _Checkpoints:
    """Writes a run's checkpoints, in process 0, and knows when the next one is due."""

    def __init__(self, run: RunFolder, trainer: Trainer) -> None:
        self.run = run
        self.trainer = trainer
        self._written = time.monotonic()

    def save(self, *, best: bool = False) -> None:
        state = self.trainer.state_dict()
        if distributed.rank() == 0:
            self.run.save_checkpoint(state, best=best, keep=self.trainer.config.keep_checkpoints)
        self._written = time.monotonic()

    @property
    def due(self) -> bool:
        return time.monotonic() - self._written >= 60 * self.trainer.config.checkpoint_minutes


def _profiler(config: Config, output: Path) -> AbstractContextManager[profile | None]:
    """Of three steps after two that warm up."""
    if not config.profile:
        return nullcontext()
    return profile(
        schedule=schedule(wait=1, warmup=1, active=3, repeat=1),
        on_trace_ready=lambda profiler: profiler.export_chrome_trace(str(output / "trace.json")),
        record_shapes=True,
    )


def _train_epoch(
    trainer: Trainer,
    batches: Loader,
    checkpoints: _Checkpoints,
    signals: StopSignals,
    profiler: profile | None,
    run_start: float,
    first: float,
) -> float:
    """What is left of the epoch at hand. Returns the images per second.

    run_start, first: when this command started to train, and the epochs (with a fraction) that were done then.
    """
    start, images_before = time.perf_counter(), trainer.images
    description = f"epoch {trainer.epoch + 1}/{trainer.config.epochs}"
    total = len(batches)
    with tqdm(
        total=total,
        initial=trainer.step,
        desc=description,
        unit="step",
        leave=False,
        dynamic_ncols=True,
        mininterval=0.1 if sys.stderr.isatty() else 10,  # seconds; a log file keeps every line of a weekend
        disable=distributed.rank() > 0,
    ) as bar:
        remaining = batches.epoch(trainer.epoch, trainer.step)
        while group := list(islice(remaining, trainer.config.accumulate)):
            trainer.train_step(group)
            done = trainer.epoch + trainer.step / total
            now = time.perf_counter()
            left = timedelta(seconds=round((now - run_start) * (trainer.config.epochs - done) / (done - first)))
            rate = (trainer.images - images_before) / (now - start)
            bar.set_postfix_str(f"{rate:.0f} images/s, run ends in {left}", refresh=False)
            bar.update(len(group))
            if profiler is not None:
                profiler.step()
            # All processes save, or stop, after the same step.
            due, signal = distributed.largest(checkpoints.due, signals.received or 0, device=trainer.device)
            if due:
                checkpoints.save()
            if signal:
                raise Stopped(signal)
    _ = trainer.mean_loss  # waits for the device, so that the clock is read after it
    return (trainer.images - images_before) / (time.perf_counter() - start)


def _make_deterministic(seed: int) -> None:
    """Same seed, same machine, same number of threads: the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that deterministic algorithms bring along, at the cost of a pass over every new tensor.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)
    # Nothing here draws from these two, but a checkpoint holds their state.
    random.seed(seed)
    np.random.seed(seed % 2**32)


def _peak_memory(device: torch.device) -> int:
    """Bytes: torch's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
