"""The training and evaluation commands: in processes of their own, some of them started as a user does."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from effnet_fast import evaluate
from tests.tiny import assert_same_bits, finish, results, start, tiny_variant

SMALL = ["--dataset", "digits", "--resolution", "32", "--augment", "fast", "--batch-size", "16"]
SMALL += ["--limit-train", "48", "--limit-val", "40"]


def run(command: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", f"effnet_fast.{command}", *arguments], capture_output=True, text=True, timeout=300
    )


def train(output: Path, *arguments: str) -> None:
    log = output.with_suffix(".log")
    assert finish(start(*SMALL, "--output", str(output), *arguments, log=log)) == 0, log.read_text()


@pytest.fixture(scope="module")
def two_epochs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("runs") / "two_epochs"
    train(output, "--variant", "baseline", "--epochs", "2")
    return output


def test_writes_every_file_of_a_run(two_epochs: Path) -> None:
    metrics = [json.loads(line) for line in (two_epochs / "metrics.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in metrics] == [0, 1]
    assert set(metrics[0]) == {
        "epoch", "lr", "train_loss", "val_loss", "val_top1", "val_top5", "ema_top1", "images_per_second", "seconds",
        "peak_memory_bytes",
    }  # fmt: skip
    assert [row["lr"] for row in metrics] == pytest.approx([0.0016, 0.0032])  # 0.256 * 16 / 256, tenths of warm-up
    assert all(0 <= row["val_top1"] <= row["val_top5"] <= 100 for row in metrics)
    config = json.loads((two_epochs / "config.json").read_text())
    assert (config["variant"], config["input_size"], config["seed"]) == ("baseline", 32, 0)
    for name in ("checkpoint.pt", "best.pt", "curves.png"):
        assert (two_epochs / name).stat().st_size > 0
    assert list((two_epochs / "tensorboard").glob("events.out.*"))
    assert not list(two_epochs.glob(".*"))  # no temporary files left


def test_the_moving_average_is_updated(two_epochs: Path) -> None:
    state = torch.load(two_epochs / "checkpoint.pt", weights_only=True)
    weight, average = (state[key]["stem.conv.weight"] for key in ("model", "ema"))
    assert not torch.equal(weight, average)
    torch.manual_seed(0)
    from effnet_fast import create_model

    assert not torch.equal(average, create_model("baseline").stem.conv.weight)


def test_same_seed_same_bits(two_epochs: Path, tmp_path: Path) -> None:
    train(tmp_path / "again", "--variant", "baseline", "--epochs", "2")
    train(tmp_path / "other", "--variant", "baseline", "--epochs", "2", "--seed", "1")
    (first, metrics), (again, metrics_again), (other, _) = (
        results(path) for path in (two_epochs, tmp_path / "again", tmp_path / "other")
    )
    assert metrics == metrics_again
    assert_same_bits(first, again)
    assert not torch.equal(first["model"]["head.conv.weight"], other["model"]["head.conv.weight"])


def test_evaluate_repeats_the_metrics_of_the_run(two_epochs: Path) -> None:
    done = run("evaluate", str(two_epochs), "--checkpoint", "latest")
    assert done.returncode == 0, done.stderr
    metrics = json.loads((two_epochs / "metrics.jsonl").read_text().splitlines()[-1])
    lines = [line.split() for line in done.stdout.splitlines()]
    top1 = next(line for line in lines if line[:2] == ["top-1", "%"])
    assert [float(value) for value in top1[-2:]] == pytest.approx([metrics["val_top1"], metrics["ema_top1"]], abs=1e-4)
    classes = [line for line in lines if line[0] in list("0123456789")]
    assert sum(int(line[1]) for line in classes) == 40


def test_other_strides_and_crops_are_the_runs_from_then_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--variant", "tiny", "--strides", "1,1,2,2,1,1,2,1", "--augment", "crop", "--crop-pct", "1"]
    schedule = ["--optimizer", "sgd", "--lr", "0.1", "--schedule", "cosine", "--warmup-epochs", "0"]
    # Enough epochs that the classes' scores differ.
    train(tmp_path / "run", *options, *schedule, "--epochs", "8")
    with tiny_variant():
        evaluate.main([str(tmp_path / "run"), "--checkpoint", "latest"])
    row = json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    loss = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("loss"))
    assert float(loss.split()[2]) == pytest.approx(row["val_loss"], abs=1e-4)
    log = tmp_path / "log"
    options = ["--output", str(tmp_path / "run"), "--resume", "auto", "--strides", "2,1,2,2,1,1,2,1"]
    assert finish(start(*options, log=log)) == 2
    assert "--strides: got [2, 1, 2, 2, 1, 1, 2, 1], the run in" in log.read_text()


def test_first_line_says_what_is_trained(tmp_path: Path) -> None:
    done = run(
        "train", *SMALL, "--variant", "compound", "--epochs", "1", "--limit-train", "16", "--output", str(tmp_path)
    )
    first = done.stdout.splitlines()[0]
    for fact in ("compound", "reference", "20,014,738 parameters", "M MACs at 40 px", "1 x 1 steps of 16", "cpu"):
        assert fact in first


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--variant", "b9"], "choose from 'baseline', 'depth'"),
        (["--family", "vit"], "choose from 'reference', 'paper'"),
        (["--dataset", "mnist"], "choose from 'cifar10', 'digits', 'folder'"),
        (["--augment", "none"], "choose from 'reference', 'fast', 'crop'"),
        (["--strides", "1,1"], "strides: got 1,1, must be eight of 1 or 2"),
        (["--crop-pct", "0"], "crop_pct: got 0.0, must be more than 0 and at most 1"),
        (["--erase", "1.5"], "--erase: got 1.5, must be from 0 to 1"),
        (["--drop-rate", "1"], "--drop-rate: got 1.0, must be from 0 to less than 1"),
        (["--drop-path-rate", "1"], "--drop-path-rate: got 1.0, must be from 0 to less than 1"),
        (["--backend", "tpu"], "choose from 'auto', 'eager', 'cpu'"),
        (["--amp", "fp8"], "choose from 'off', 'bf16', 'fp16'"),
        (["--device", "tpu"], "got 'tpu', choose from cpu"),
        (["--epochs", "0"], "got '0', must be an integer of at least 1"),
        (["--batch-size", "many"], "got 'many', must be an integer of at least 1"),
        (["--memory", "8"], "--memory: got '8', choose from fast, lean, min, or an amount as 8GB or 7.5GiB"),
        (["--memory", "1MB", "--batch-size", "auto"], "--batch-size auto: a batch of one needs"),
        (["--lr", "nan"], "got 'nan', must be a number of at least 0.0"),
        (["--dataset", "folder"], "--data-dir"),
        (["--dataset", "folder", "--data-dir", "/nowhere"], "/nowhere"),
        (["--data-dir", "/nowhere"], "/nowhere"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_options_get_one_line(arguments: list[str], expected: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert finish(start(*arguments, "--output", str(tmp_path / "run"), log=log)) == 2
    assert len(log.read_text().splitlines()) == 1
    assert expected in log.read_text()
    assert not (tmp_path / "run").exists()


def test_a_run_is_not_overwritten(two_epochs: Path, tmp_path: Path) -> None:
    before = (two_epochs / "checkpoint.pt").read_bytes()
    log = tmp_path / "log"
    assert finish(start(*SMALL, "--epochs", "1", "--output", str(two_epochs), log=log)) == 2
    assert "already holds a run" in log.read_text()
    assert (two_epochs / "checkpoint.pt").read_bytes() == before


def assert_evaluate_refuses(folder: Path, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        evaluate.main([str(folder)])
    assert ended.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert len(error.splitlines()) == 1
    assert expected in error


def test_evaluate_of_something_else_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert_evaluate_refuses(tmp_path, "config.json", capsys)


@pytest.mark.parametrize(
    ("content", "expected"),
    [({"variant": "b0"}, "config.json: lacks 'device'"), ({"seed": "0"}, "seed is '0', not a run's configuration")],
)
def test_evaluate_of_a_foreign_configuration_gets_one_line(
    two_epochs: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    content: dict[str, object],
    expected: str,
) -> None:
    (tmp_path / "best.pt").write_bytes((two_epochs / "best.pt").read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert_evaluate_refuses(tmp_path, expected, capsys)


@pytest.fixture(scope="module")
def plain_step(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("steps") / "plain"
    train_a_step(folder)
    return folder


def train_a_step(folder: Path, *options: str) -> None:
    """Of one group of two batches."""
    train(folder, "--variant", "tiny", "--limit-train", "32", "--epochs", "1", "--keep-checkpoints", "1", *options)


@pytest.mark.parametrize(
    "options",
    [
        *("--optimizer rmsprop-tf", "--optimizer sgd", "--optimizer adamw", "--optimizer muon"),
        *("--weight-decay 0.1", "--lr 0.1"),
        *("--label-smoothing 0.3", "--ema-decay 0.05", "--no-ema-warmup", "--accumulate 2", "--clip-grad 0.01"),
        *("--mixup 0.2", "--cutmix 1", "--mixup 0.2 --cutmix 1", "--randaugment 9", "--augment reference"),
        *("--autoaugment cifar10", "--autoaugment imagenet", "--augment reference --autoaugment svhn"),
        *("--freeze stem,stages.0", "--amp bf16", "--amp fp16", "--seed 1"),
    ],
)
def test_every_option_of_the_recipe_trains_another_model(plain_step: Path, tmp_path: Path, options: str) -> None:
    folder = tmp_path / "run"
    train_a_step(folder, *options.split())
    (state, metrics), (plain, _) = results(folder), results(plain_step)
    assert math.isfinite(metrics[0]["train_loss"])
    assert all(tensor.isfinite().all() for tensor in state["ema"].values())
    assert any(not torch.equal(tensor, state["ema"][name]) for name, tensor in plain["ema"].items())


@pytest.mark.parametrize(
    "options",
    [
        *("--memory lean", "--memory min", "--profile", "--sync-bn", "--checkpoint-minutes 0", "--num-workers 0"),
        "--schedule cosine",  # the warm-up is the same
    ],
)
def test_other_options_train_the_same_model(plain_step: Path, tmp_path: Path, options: str) -> None:
    train_a_step(tmp_path / "run", *options.split())
    assert_same_bits(results(tmp_path / "run")[0]["ema"], results(plain_step)[0]["ema"])
    assert (tmp_path / "run" / "trace.json").exists() == (options == "--profile")
