"""Train a variant: ``python -m effnet_fast.train --variant compound`` is the study's run on CIFAR-10."""

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel
from torch.utils import deterministic
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from effnet_fast.amp import AMP_DTYPES, autocast
from effnet_fast.augment import AUGMENTS, Loader, train_loader, val_loader
from effnet_fast.cli import ArgumentParser, at_least
from effnet_fast.data import DATASETS, load_dataset
from effnet_fast.evaluate import evaluate
from effnet_fast.memory import keep_freed_memory
from effnet_fast.model import create_model
from effnet_fast.passes.backend import BACKENDS, current, use_backend
from effnet_fast.plots import plot_curves
from effnet_fast.recipe import default_lr, lr_factor, make_ema, make_loss, make_optimizer
from effnet_fast.run_folder import RunFolder
from effnet_fast.scaling import BASE_RESOLUTION, FAMILIES, VARIANTS, get_family, get_variant
from effnet_fast.summary import count_macs


@dataclass(frozen=True)
class Config:
    """Everything that decides a run's result; config.json holds it, with what follows from it."""

    variant: str
    family: str
    dataset: str
    data_dir: str | None
    verify: bool
    resolution: int
    epochs: int
    batch_size: int
    lr: float
    augment: str
    amp: str
    seed: int
    limit_train: int | None
    limit_val: int | None
    num_workers: int
    device: str
    backend: str

    @property
    def input_size(self) -> int:
        """Height and width of the network's input in pixels."""
        return get_family(self.family).input_size(get_variant(self.variant, self.family).scaling, self.resolution)


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.train", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, default="baseline", help="default: baseline")
    parser.add_argument("--family", choices=FAMILIES, default="reference", help="default: reference")
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
    parser.add_argument("--batch-size", type=at_least(1), default=128, help="default: 128")
    parser.add_argument("--lr", type=at_least(0.0), help="peak learning rate; default: 0.256 * batch size / 256")
    parser.add_argument("--augment", choices=AUGMENTS, default="reference", help="default: reference")
    parser.add_argument("--amp", choices=AMP_DTYPES, help="mixed precision; default: fp16 on CUDA, else off")
    parser.add_argument("--seed", type=at_least(0), default=0, help="default: 0")
    parser.add_argument("--output", type=Path, help="run folder; default: runs/VARIANT-DATASET-TIME")
    parser.add_argument("--limit-train", type=at_least(1), help="train on so many images only")
    parser.add_argument("--limit-val", type=at_least(1), help="validate on so many images only")
    parser.add_argument("--num-workers", type=at_least(0), default=2, help="processes that augment; default: 2")
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    parser.add_argument("--backend", choices=BACKENDS, help="of the fused ops; default: auto")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    args = vars(parser.parse_args(argv))
    output = args.pop("output")
    try:
        device = _device(args["device"])
        args["device"] = str(device)
        if args["amp"] is None:
            args["amp"] = "fp16" if device.type == "cuda" else "off"
        if args["backend"] is None:
            args["backend"] = current()
        if args["lr"] is None:
            args["lr"] = default_lr(args["batch_size"])
        config = Config(**args)
        if output is None:
            output = Path("runs") / f"{config.variant}-{config.dataset}-{datetime.now():%Y%m%d-%H%M%S}"
        with use_backend(config.backend):
            train(config, output)
    except (ValueError, OSError) as error:
        parser.error(str(error))


def _device(name: str | None) -> torch.device:
    if name is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    usable = ["cpu"] + [f"cuda:{i}" for i in range(torch.cuda.device_count())]
    if name not in usable and not (name == "cuda" and len(usable) > 1):
        raise ValueError(f"--device: got {name!r}, choose from {', '.join(usable)}")
    return torch.device(name)


def train(config: Config, output: Path) -> None:
    """Train from scratch and write the run folder (see the README).

    Raises DataError, RunError or ValueError, whose message is one line, before anything is written.
    """
    _make_deterministic(config.seed)
    device = torch.device(config.device)
    data = load_dataset(config.dataset, config.data_dir, verify=config.verify)
    train_split = data.train if config.limit_train is None else data.train.first(config.limit_train)
    val_split = data.val if config.limit_val is None else data.val.first(config.limit_val)
    shared: dict[str, Any] = {
        "augment": config.augment,
        "size": config.input_size,
        "batch_size": config.batch_size,
        "num_workers": config.num_workers,
        "device": device,
    }
    batches = train_loader(train_split, seed=config.seed, **shared)
    val_batches = val_loader(val_split, **shared)
    classes = len(data.classes)

    model = create_model(config.variant, classes, family=config.family)
    parameters = sum(p.numel() for p in model.parameters())
    macs = count_macs(model, config.input_size)
    model.to(device).to(memory_format=torch.channels_last)
    ema = make_ema(model)
    optimizer = make_optimizer(model.parameters(), config.lr)
    scaler = torch.amp.GradScaler(device.type, enabled=config.amp == "fp16")
    run = RunFolder.create(output, asdict(config) | {"input_size": config.input_size, "classes": data.classes})
    print(
        f"Training {config.variant} ({config.family} family) on {config.dataset}: {parameters:,} parameters, "
        f"{macs / 1e6:,.1f} M MACs at {config.input_size} px, {classes} classes; {len(train_split):,} images, "
        f"{config.epochs} x {len(batches)} steps of {config.batch_size}; {device}, amp {config.amp}, "
        f"backend {config.backend}; {output}",
        flush=True,
    )

    best = -1.0
    start = time.perf_counter()
    with SummaryWriter(output / "tensorboard") as board:
        for epoch in range(config.epochs):
            epoch_start = time.perf_counter()
            lr = config.lr * lr_factor(epoch)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss, images_per_second = _train_epoch(model, ema, optimizer, scaler, batches, epoch, config, start)
            raw = evaluate(model, val_batches.epoch(0), classes, device, config.amp)
            averaged = evaluate(ema.module, val_batches.epoch(0), classes, device, config.amp)
            metrics = {
                "epoch": epoch,
                "lr": lr,
                "train_loss": loss,
                "val_loss": raw.loss,
                "val_top1": raw.top1,
                "val_top5": raw.top5,
                "ema_top1": averaged.top1,
                "images_per_second": images_per_second,
                "seconds": time.perf_counter() - epoch_start,
                "peak_memory_bytes": _peak_memory(device),
            }
            run.append_metrics(metrics)
            for name in ("val_loss", "val_top1", "val_top5", "ema_top1", "lr"):
                board.add_scalar(name, metrics[name], epoch)
            score = max(raw.top1, averaged.top1)
            run.save_checkpoint(
                {
                    "epoch": epoch,
                    "model": model.state_dict(),
                    "ema": ema.module.state_dict(),
                    "optimizer": optimizer.state_dict(),
                },
                best=score > best,
            )
            best = max(best, score)
            plot_curves(run.metrics(), f"{config.variant} on {config.dataset}", output / "curves.png")
            tqdm.write(
                f"epoch {epoch + 1}/{config.epochs}: loss {loss:.3f}, top-1 {raw.top1:.2f} %, "
                f"EMA {averaged.top1:.2f} %, {metrics['images_per_second']:.0f} images/s, {metrics['seconds']:.0f} s"
            )
    print(f"Best top-1 {best:.2f} %, {timedelta(seconds=round(time.perf_counter() - start))}; {output}")


def _train_epoch(
    model: nn.Module,
    ema: AveragedModel,
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Loader,
    epoch: int,
    config: Config,
    run_start: float,
) -> tuple[float, float]:
    """One pass over the training data. Returns the mean loss and the images per second."""
    device = torch.device(config.device)
    criterion = make_loss()
    model.train()
    total_loss = torch.zeros((), device=device)
    images_seen = 0
    start = time.perf_counter()
    description = f"epoch {epoch + 1}/{config.epochs}"
    with tqdm(total=len(batches), desc=description, unit="step", leave=False, dynamic_ncols=True) as bar:
        for images, labels in batches.epoch(epoch):
            with autocast(device, config.amp):
                loss = criterion(model(images), labels)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            ema.update_parameters(model)
            total_loss += loss.detach() * len(images)
            images_seen += len(images)
            done = (epoch + (bar.n + 1) / len(batches)) / config.epochs
            now = time.perf_counter()
            left = timedelta(seconds=round((now - run_start) * (1 - done) / done))
            bar.set_postfix_str(f"{images_seen / (now - start):.0f} images/s, run ends in {left}", refresh=False)
            bar.update()
    mean_loss = total_loss.item() / images_seen  # waits for the device, so the clock is read after it
    return mean_loss, images_seen / (time.perf_counter() - start)


def _make_deterministic(seed: int) -> None:
    """Same seed, same machine, same number of threads: the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    # A debugging aid that deterministic algorithms bring along, at the cost of a pass over every new tensor.
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    torch.manual_seed(seed)


def _peak_memory(device: torch.device) -> int:
    """Bytes: torch's peak on a GPU, the process's peak resident set on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return kilobytes * (1 if sys.platform == "darwin" else 1024)


if __name__ == "__main__":
    main()
