"""Re-evaluate a run's checkpoint: ``python -m effnet_fast.evaluate RUN``."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from effnet_fast import distributed
from effnet_fast.amp import autocast
from effnet_fast.augment import val_loader
from effnet_fast.cli import ArgumentParser, devices
from effnet_fast.config import stored_options
from effnet_fast.data import load_dataset
from effnet_fast.memory import keep_freed_memory
from effnet_fast.model import create_model
from effnet_fast.passes.backend import use_backend
from effnet_fast.run_folder import RunError, RunFolder
from effnet_fast.run_model import add_run_arguments


@dataclass(frozen=True)
class Evaluation:
    """A model's figures over a split: mean cross-entropy, and per class how many examples, how many right."""

    loss: float
    top5: float
    class_total: Tensor
    class_right: Tensor

    @property
    def top1(self) -> float:
        """Percentage of examples whose best-scored class is right."""
        return 100 * self.class_right.sum().item() / self.class_total.sum().item()


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    num_classes: int,
    device: torch.device,
    amp: str,
) -> Evaluation:
    """Run a model in eval mode over batches of (images, class indices). top-5 of fewer than five classes is 100.

    Where several processes train, each gives its own batches and has the figures over all of them.
    """
    model.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    top5 = torch.zeros((), dtype=torch.long, device=device)
    total = torch.zeros(num_classes, dtype=torch.long, device=device)
    right = torch.zeros(num_classes, dtype=torch.long, device=device)
    for images, labels in batches:
        with autocast(device, amp):
            logits = model(images)
        logits = logits.float()
        loss += F.cross_entropy(logits, labels, reduction="sum")
        hits = logits.topk(min(5, num_classes)).indices == labels[:, None]
        top5 += hits.sum()
        total += labels.bincount(minlength=num_classes)
        right += labels[hits[:, 0]].bincount(minlength=num_classes)
    distributed.add_up(loss, top5, total, right)
    count = total.sum().item()
    return Evaluation(loss.item() / count, 100 * top5.item() / count, total.cpu(), right.cpu())


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.evaluate", description=__doc__)
    add_run_arguments(parser)
    parser.add_argument("--data-dir", help="where the images are now; default: where they were in training")
    parser.add_argument("--device", choices=devices(), help="default: the device of the training run")
    return parser


def main(argv: list[str] | None = None) -> None:
    keep_freed_memory()
    parser = _parser()
    args = parser.parse_args(argv)
    try:
        _report(args.run, args.checkpoint, args.data_dir, args.device)
    except KeyError as error:
        parser.error(f"{args.run / 'config.json'}: lacks {error}; give the folder of a training run")
    except ValueError as error:
        parser.error(str(error))


def _report(run_path: Path, checkpoint: str, data_dir: str | None, device_name: str | None) -> None:
    run = RunFolder(run_path)
    config = run.config()
    stored_options(config)
    state = run.load_checkpoint(checkpoint)
    device = torch.device(device_name or config["device"])
    data = load_dataset(config["dataset"], data_dir or config["data_dir"], verify=config["verify"])
    val = data.val if config["limit_val"] is None else data.val.first(config["limit_val"])
    loader = val_loader(
        val,
        augment=config["augment"],
        size=config["input_size"],
        crop_pct=config["crop_pct"],
        batch_size=config["batch_size"],
        num_workers=config["num_workers"],
        device=device,
    )
    classes = len(data.classes)
    model = create_model(config["variant"], classes, family=config["family"], strides=config["strides"])
    model.to(device).to(memory_format=torch.channels_last)
    results = {}
    for weights in ("model", "ema"):
        try:
            model.load_state_dict(state[weights])
        except (RuntimeError, TypeError, AttributeError):
            raise RunError(f"{run_path}: the {checkpoint} checkpoint does not fit the run's configuration") from None
        with use_backend(config["backend"]):
            results[weights] = evaluate(model, loader.epoch(0), classes, device, config["amp"])
    print(
        f"{run_path}: {checkpoint} checkpoint after {state['epoch']} epochs, {len(val)} images of {config['dataset']}"
    )
    print(f"{'':20} {'images':>7} {'weights':>9} {'EMA':>9}")
    columns = [results["model"], results["ema"]]
    rows = [("loss", [r.loss for r in columns]), ("top-1 %", [r.top1 for r in columns])]
    rows.append(("top-5 %", [r.top5 for r in columns]))
    for name, values in rows:
        print(f"{name:20} {len(val):7} {values[0]:9.4f} {values[1]:9.4f}")
    for i, name in enumerate(data.classes):
        total = int(columns[0].class_total[i])
        shares = [100 * int(r.class_right[i]) / total if total else float("nan") for r in columns]
        print(f"{name[:20]:20} {total:7} {shares[0]:9.2f} {shares[1]:9.2f}")


if __name__ == "__main__":
    main()
