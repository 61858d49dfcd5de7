"""The study: the command as a user starts, kills and repeats it; its tables and figures from made-up results."""

import json
import signal
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev

import pytest

from effnet_fast import study, study_report
from effnet_fast.run_folder import RunError, RunFolder
from effnet_fast.summary import count
from tests.tiny import results as run_results
from tests.tiny import wait_for

SMALL = ["--variants", "baseline", "--seeds", "2", "--dataset", "digits", "--resolution", "32", "--augment", "fast"]
SMALL += ["--batch-size", "8", "--limit-train", "32", "--limit-val", "40", "--epochs", "2", "--checkpoint-minutes", "0"]


def start(output: Path, *options: str) -> subprocess.Popen[bytes]:
    output.mkdir(exist_ok=True)
    with open(output / "log", "wb") as log:
        command = [sys.executable, "-m", "effnet_fast.study", *SMALL, "--output", str(output), *options]
        return subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT)


def log_of(output: Path) -> str:
    return (output / "log").read_text()


def descendants(pid: int) -> set[int]:
    """Processes that were started by a process, or by those that it started."""
    lists = (path.read_text().split() for path in Path(f"/proc/{pid}/task").glob("*/children"))
    children = {int(child) for pids in lists for child in pids}
    return children.union(*map(descendants, children))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("study") / "results"
    assert start(output, "--measure-eager").wait(300) == 0, log_of(output)
    return output


def test_writes_its_files(uninterrupted: Path) -> None:
    names = {path.name for path in uninterrupted.iterdir()}
    assert names == {"results.json", "results.md", "figure.png", "curves.png", "cam.png", "runs", "log"}
    results = study_report.read(uninterrupted)
    assert [(run["variant"], run["seed"], len(run["metrics"])) for run in results["runs"]] == [
        ("baseline", 0, 2),
        ("baseline", 1, 2),
    ]
    metrics = RunFolder(uninterrupted / "runs" / "reference-baseline-1").metrics()
    assert results["runs"][1]["metrics"] == metrics
    figures = results["eager"]["reference"]["baseline"]
    assert figures.keys() == {"off", "bf16"}
    assert all(rate > 0 for rate in figures.values())
    assert "4 of 4 epochs, about 0:00:00 left" in log_of(uninterrupted)
    last = [run["metrics"][-1]["val_top1"] for run in results["runs"]]
    assert (
        f"| baseline | 2 | 0, 1 | {mean(last):.2f} ± {stdev(last):.2f} |" in (uninterrupted / "results.md").read_text()
    )


def test_killed_and_stopped_it_goes_on_where_it_was(uninterrupted: Path, tmp_path: Path) -> None:
    output = tmp_path / "results"
    runs = [output / "runs" / f"reference-baseline-{seed}" for seed in (0, 1)]
    process = start(output)
    # In the first run, which has a checkpoint after its first step.
    wait_for(lambda: (runs[0] / "checkpoint.pt").exists() or process.poll() is not None, 120)
    started = descendants(process.pid)
    assert len(started) >= 2
    process.kill()
    assert process.wait() == -signal.SIGKILL
    # What it had started ends with it, or two processes would train the same run.
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in started), 20)

    process = start(output)
    wait_for(lambda: (runs[1] / "checkpoint.pt").exists() or process.poll() is not None, 120)
    for pid in (process.pid, *descendants(process.pid)):  # as a supervisor does
        subprocess.run(["kill", "-TERM", str(pid)])
    assert process.wait(60) == 128 + signal.SIGTERM
    assert log_of(output).splitlines()[-1] == (
        "python -m effnet_fast.study: stopped by SIGTERM; go on with the same command"
    )
    checkpoint = RunFolder(runs[1]).load_checkpoint("latest")
    assert (checkpoint["epoch"], checkpoint["step"]) != (2, 0)

    assert start(output).wait(300) == 0, log_of(output)
    assert "run 1 of 2 (baseline, recipe reference, seed 0) is finished" in log_of(output)
    assert f"Going on after {checkpoint['epoch']} epochs and {checkpoint['step']} steps" in log_of(output)
    for run in runs:
        assert run_results(run)[1] == run_results(uninterrupted / "runs" / run.name)[1]


def test_goes_on_from_results_json_alone(uninterrupted: Path, tmp_path: Path) -> None:
    """As committed: without the runs. What is finished there is not trained again, what was not is."""
    output = tmp_path / "results"
    output.mkdir()
    results = study_report.read(uninterrupted)
    results["runs"][0]["processor"] = "an abacus"
    del results["runs"][1]["metrics"][1]
    del results["settings"]["reference"]["drop_rate"]  # as of before there was that option
    (output / "results.json").write_text(json.dumps(results))
    assert start(output).wait(300) == 0, log_of(output)
    assert "run 1 of 2 (baseline, recipe reference, seed 0) is finished" in log_of(output)
    assert [path.name for path in (output / "runs").iterdir()] == ["reference-baseline-1"]
    assert results["runs"][0] in study_report.read(output)["runs"]
    assert (
        run_results(output / "runs" / "reference-baseline-1")[1]
        == run_results(uninterrupted / "runs" / "reference-baseline-1")[1]
    )
    assert (output / "results.md").read_text().startswith("On ")
    assert "; an abacus." in (output / "results.md").read_text()
    assert (output / "cam.png").exists()
    results["settings"]["reference"]["epochs"] = 1
    (output / "results.json").write_text(json.dumps(results))
    with pytest.raises(RunError, match="runs of recipe reference have other options than those here"):
        study_report.collect(output)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--variant", "b1"], "--variant: got b1, give --variants instead"),
        (["--seed", "3"], "--seed: got 3, give --seeds instead"),
        (["--epochs", "3"], "--epochs: got 3, the runs of recipe reference in"),
        (["--augment", "reference"], "--augment: got reference, the runs of recipe reference in"),
        (["--variants", "b9"], "invalid choice: 'b9'"),
        (["--recipe", "secret"], "invalid choice: 'secret'"),
        (["--augment", "strong"], "invalid choice: 'strong'"),
        (["--lr", "-1"], "got '-1', must be a number of at least 0"),
        (["--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_options_get_one_line(
    uninterrupted: Path, options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before = (uninterrupted / "results.json").read_bytes()
    with pytest.raises(SystemExit) as ended:
        study.main([*SMALL, "--output", str(uninterrupted), *options])
    assert ended.value.code == 2
    output, error = capsys.readouterr()
    assert output == ""
    assert len(error.splitlines()) == 1
    assert message in error
    assert (uninterrupted / "results.json").read_bytes() == before


def test_where_no_run_can_begin_the_first_reason_is_the_only_one(tmp_path: Path) -> None:
    process = start(tmp_path / "results", "--dataset", "cifar10", "--data-dir", "/nowhere")
    assert process.wait(120) == 2
    assert log_of(tmp_path / "results").count("error") == 1
    assert "/nowhere" in log_of(tmp_path / "results")


def epoch(number: int, **changed: float) -> dict[str, float]:
    keys = ("lr", "train_loss", "val_loss", "val_top5")
    row = {"epoch": number, "val_top1": 50.0 + number, "ema_top1": 40.0 + number, "images_per_second": 100.0}
    return row | {"seconds": 10.0, "peak_memory_bytes": 2**30} | dict.fromkeys(keys, 0.1) | changed


def made_up(*runs: tuple[str, str, int, list[dict[str, float]]]) -> study_report.Results:
    """Of runs of three epochs."""
    counts = {variant: count(variant, "reference", 10, 32) for _, variant, _, _ in runs}
    return {
        "settings": {recipe: {"dataset": "cifar10", "epochs": 3, "amp": "bf16", "freeze": None} for recipe, *_ in runs},
        "eager": {},
        "runs": [
            {
                "recipe": recipe,
                "variant": variant,
                "seed": seed,
                "input_size": counts[variant].input_size,
                "parameters": counts[variant].params,
                "macs": counts[variant].macs,
                "flops": counts[variant].flops,
                "processor": "an abacus, 1 threads, torch 2.11",
                "metrics": metrics,
            }
            for recipe, variant, seed, metrics in runs
        ],
    }


def cells(text: str, head: str, variant: str) -> dict[str, str]:
    """The row of a variant in the first table after `head`, by the names of its columns."""
    names, _, *rows = (
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text[text.index(head) :].splitlines()
    )
    return dict(zip(names, next(row for row in rows if row[:1] == [variant]), strict=True))


def test_tables(tmp_path: Path) -> None:
    finished = [[epoch(0), epoch(1, val_top1=72.0, seconds=20.0), epoch(2, val_top1=last)] for last in (70.0, 71.0)]
    results = made_up(
        ("reference", "compound", 0, [epoch(0)]),
        ("reference", "baseline", 0, finished[0]),
        ("reference", "baseline", 1, finished[1]),
        ("reference", "baseline", 2, [epoch(0)]),
    )
    results["eager"] = {"reference": {"baseline": {"off": 25.0, "bf16": 20.0}, "compound": {"off": 5.0, "bf16": 10.0}}}
    study_report.write(results, tmp_path)
    assert study_report.read(tmp_path) == results
    text = (tmp_path / "results.md").read_text()
    assert "an abacus, 1 threads, torch 2.11" in text
    assert "`dataset cifar10, epochs 3, amp bf16`" in text
    accuracy = cells(text, "| variant | epochs", "baseline")
    assert accuracy == {
        "variant": "baseline",
        "epochs": "3",
        "seeds": "0, 1",  # the third has not ended
        "last, %": "70.50 ± 0.71",
        "best, %": "72.00 ± 0.00",
        "EMA, last, %": "42.00 ± 0.00",
        "the reference study, %": "89.45",
        "the paper, ImageNet, %": "77.3",
    }
    partial = cells(text, "| variant | epochs", "compound")
    assert (partial["epochs"], partial["last, %"]) == ("1 of 3, partial", "50.00")
    costs = cells(text, "| variant | input, px", "baseline")
    assert costs == {
        "variant": "baseline",
        "input, px": "32",
        "parameters": "7,155,658",
        "MACs, M": "11.61",
        "FLOPs, M": "23.22",
        "images/s": "100",
        "peak memory, MiB": "1,024",
        "a run's time": "0:00:30",
        "eager fp32, images/s": "25",
        "eager bf16, images/s": "20",
        "eager, a run's time": "0:02:00",  # 100 / 25 times as long
        "the reference study, FLOPs, B": "0.82",
        "the paper, MACs, B": "0.39",
    }
    # 30 s each; compound takes eager PyTorch 100 / 10 times as long.
    assert "a seed each: 0:01:00; in eager PyTorch" in text
    assert "0:07:00: 7.00 times as long" in text
    assert text.index("| baseline |") < text.index("| compound |")


def test_recipes_have_tables_of_their_own(tmp_path: Path) -> None:
    study_report.write(made_up(("reference", "b1", 0, [epoch(0)]), ("tuned", "b1", 0, [epoch(0)] * 3)), tmp_path)
    text = (tmp_path / "results.md").read_text()
    reference, tuned = text.split("### Recipe tuned")
    assert "1 of 3, partial" in reference
    assert cells(tuned, "| variant | epochs", "b1")["epochs"] == "3"
    assert "eager" not in text


def test_plot_only_draws_what_results_json_holds(uninterrupted: Path, tmp_path: Path) -> None:
    (tmp_path / "results.json").write_bytes((uninterrupted / "results.json").read_bytes())
    study.main(["--plot-only", "--output", str(tmp_path)])
    for name in ("results.md", "figure.png", "curves.png"):
        assert (tmp_path / name).read_bytes() == (uninterrupted / name).read_bytes()
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": []}'])
def test_plot_only_without_results_gets_one_line(
    tmp_path: Path, content: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(SystemExit) as ended:
        study.main(["--plot-only", "--output", str(tmp_path)])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1
    assert f"{tmp_path / 'results.json'}: " in error


def test_runs_of_different_settings_are_not_compared(uninterrupted: Path, tmp_path: Path) -> None:
    config = json.loads((uninterrupted / "runs" / "reference-baseline-0" / "config.json").read_text())
    RunFolder.create(tmp_path / "runs" / "reference-baseline-0", config)
    RunFolder.create(tmp_path / "runs" / "reference-b1-0", config | {"variant": "b1", "num_workers": 9})
    RunFolder.create(tmp_path / "runs" / "tuned-b1-0", config | {"variant": "b1", "epochs": 9})
    assert len(study_report.collect(tmp_path)["runs"]) == 3
    RunFolder.create(tmp_path / "runs" / "reference-b1-1", config | {"variant": "b1", "epochs": 9})
    with pytest.raises(RunError, match=r"epochs is 9, other runs of recipe reference have 2|epochs is 2, .* have 9"):
        study_report.collect(tmp_path)


def test_a_run_that_was_cut_off_in_a_line_counts_its_whole_lines(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)
    assert folder.metrics() == []
    folder.append_metrics(epoch(0))
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"epoch": 1, "lr"')
    assert folder.metrics() == [epoch(0)]


def test_time_left(tmp_path: Path) -> None:
    """A variant that has not started takes as long as its multiply-adds say, by those that have."""
    options = [*SMALL[4:], "--seeds", "1"]
    args, rest = study._parser().parse_known_args(options)
    runs = study._plan("reference", ["baseline", "width"], args.seeds, rest, tmp_path)
    assert [str(run) for run in runs] == ["baseline, recipe reference, seed 0", "width, recipe reference, seed 0"]
    assert study._progress(runs, {}) == "0 of 4 epochs"
    folder = RunFolder.create(runs[0].path, {})
    folder.append_metrics(epoch(0, seconds=1000.0))
    baseline, width = (count(variant, "reference", 10, 32).macs for variant in ("baseline", "width"))
    left = round(1000 + 2 * 1000 * width / baseline)
    expected = f"{left // 3600}:{left // 60 % 60:02}:{left % 60:02}"
    assert study._progress(runs, {}) == f"1 of 4 epochs, about {expected} left"
    gone = {"reference-width-0": [epoch(0, seconds=7.0)] * 2}
    assert study._progress(runs, gone) == "3 of 4 epochs, about 0:16:40 left"
