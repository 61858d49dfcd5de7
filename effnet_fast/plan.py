"""What fits into memory: ``python -m effnet_fast.plan --variant b7 --memory 8GB`` says how a variant trains in it.

Nothing is allocated or trained: the figures are foreseen, for the tensors of training steps with the study's optimizer
and a moving average. The process, its libraries and the images that wait for their turn come on top.
"""

import json
from argparse import ArgumentTypeError
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from effnet_fast.amp import AMP_DTYPES
from effnet_fast.cli import ArgumentParser, at_least, devices
from effnet_fast.memory import format_bytes, parse_memory
from effnet_fast.model import create_model
from effnet_fast.ops.memory_policy import POLICIES
from effnet_fast.passes.backend import BACKENDS, use_backend
from effnet_fast.planning import DoesNotFit, Plan, Planner
from effnet_fast.plots import plot_memory
from effnet_fast.recipe import OPTIMIZERS
from effnet_fast.scaling import BASE_RESOLUTION, FAMILIES, VARIANTS, get_family, get_variant
from effnet_fast.summary import NUM_CLASSES

BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256)

# Of the plot: budgets from the least that fits to what "fast" takes.
_BUDGETS = 24


def _amount(text: str) -> int:
    with suppress(ValueError):
        amount = parse_memory(text)
        if isinstance(amount, int):
            return amount
    raise ArgumentTypeError(f"got {text!r}, must be an amount as 8GB or 7.5GiB")


def _parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m effnet_fast.plan", description=__doc__)
    parser.add_argument("--variant", choices=VARIANTS, help="default: all, in a table")
    parser.add_argument("--family", choices=FAMILIES, default="reference", help="default: reference")
    parser.add_argument("--memory", type=_amount, metavar="AMOUNT", help="as 8GB or 7.5GiB; default: no limit")
    parser.add_argument(
        "--batch-size", type=at_least(1), help="default: the largest that fits --memory, without it 128"
    )
    parser.add_argument(
        "--resolution",
        type=at_least(1),
        default=BASE_RESOLUTION,
        help="baseline's input size in pixels, which the variant's multiplier scales; default: 224",
    )
    parser.add_argument("--dtype", choices=AMP_DTYPES, default="bf16", help="mixed precision; default: bf16")
    parser.add_argument("--optimizer", choices=OPTIMIZERS, default="rmsprop", help="default: rmsprop")
    parser.add_argument("--num-classes", type=at_least(1), help="default: 10 for reference, 1000 for paper")
    parser.add_argument("--device", choices=devices(), help="default: cuda if there is one, else cpu")
    parser.add_argument("--backend", choices=BACKENDS, default="auto", help="of the fused ops; default: auto")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--plot", type=Path, help="draw memory against time into an image file; needs --variant")
    return parser


def make_planner(args: Any, variant: str) -> Planner:
    classes = NUM_CLASSES[args.family] if args.num_classes is None else args.num_classes
    with torch.device("meta"):
        model = create_model(variant, classes, family=args.family)
    size = get_family(args.family).input_size(get_variant(variant, args.family).scaling, args.resolution)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return Planner(model, size, amp=args.dtype, device=device, optimizer=args.optimizer)


def explain(variant: str, planner: Planner, plan: Plan, budget: int | None) -> str:
    """A plan for people, part by part, beside the policies for all parts alike."""
    n = plan.batch_size
    of = "" if budget is None else f" of {format_bytes(budget)}"
    lines = [
        f"{variant}, batch {n} at {plan.input_size} px, {plan.amp}, {plan.device}: needs {format_bytes(plan.peak)}{of}",
        f"  all the time: weights, optimizer, average  {format_bytes(plan.fixed):>9}",
        f"  kept for the backward pass  {format_bytes(plan.kept):>24}, {format_bytes(plan.kept // n)} an image",
        "",
        f"{'what each part keeps':24}{'memory':>10}{'time':>7}" + ("" if budget is None else f"{'largest batch':>16}"),
    ]
    rows = [(policy, planner.uniform(policy, n), policy) for policy in POLICIES]
    for name, row, policy in (*rows, ("as below", plan, None)):
        largest = "" if budget is None else f"{planner.largest_batch(budget, policy):>16}"
        lines.append(f"  {name:22}{format_bytes(row.peak):>10}{row.extra_time:>+7.0%}{largest}")
    return "\n".join(
        [*lines, "", *_assignment(plan), "", "time: an estimate, from the bytes that a step reads and writes"]
    )


def _assignment(plan: Plan) -> list[str]:
    """Neighbours that keep the same, on a line together."""
    names = ["stem and block 1", *(f"block {i}" for i in range(2, len(plan.policies))), "head"]
    again = {part: names[begin] for begin, end in plan.segments for part in range(begin, end)}
    keeps = [
        f"only the input of {again[part]}; run again, {policy}" if part in again else policy
        for part, policy in enumerate(plan.policies)
    ]
    lines = []
    for kept, group in groupby(range(len(names)), key=keeps.__getitem__):
        first, *others = (names[part] for part in group)
        lines.append(f"  {f'{first} to {others[-1]}' if others else first:30}{kept}")
    return lines


def survey(variant: str, planner: Planner, budget: int | None) -> Iterator[dict[str, Any]]:
    """A record of each batch size: what a step needs, its time if it fits the budget, and the least it could need."""
    for n in BATCHES:
        plan = None
        with suppress(DoesNotFit):
            plan = planner.uniform("fast", n) if budget is None else planner.fastest(n, budget)
        yield {
            "variant": variant,
            "input_size": planner.input_size,
            "batch_size": n,
            "peak": None if plan is None else plan.peak,
            "extra_time": None if plan is None else plan.extra_time,
            "least": planner.least(n),
        }


def table(records: list[dict[str, Any]], budget: int | None) -> str:
    """The records of `survey`, a variant a line."""
    if budget is None:
        title = "GB that a training step needs if all is kept (fast), and at least"
    else:
        title = f"in {format_bytes(budget)}: how much longer a training step takes than with all kept; - does not fit"
    lines = [title, f"{'variant':10}{'px':>4}" + "".join(f"{f'batch {n}':>14}" for n in BATCHES)]
    for variant, group in groupby(records, key=itemgetter("variant")):
        cells = []
        for record in group:
            if budget is None:
                cells.append(f"{record['peak'] / 1e9:.2f} {record['least'] / 1e9:.2f}")
            else:
                cells.append("-" if record["extra_time"] is None else f"{record['extra_time']:+.0%}")
        lines.append(f"{variant:10}{record['input_size']:>4}" + "".join(f"{cell:>14}" for cell in cells))
    return "\n".join(lines)


def frontier(planner: Planner, batch_size: int) -> list[Plan]:
    """The fastest plans between the least memory and that of "fast"."""
    least, most = planner.least(batch_size), planner.uniform("fast", batch_size).peak
    step = (1.05 * most - least) / _BUDGETS  # beyond what "fast" takes, as a plan leaves some of its budget
    return [planner.fastest(batch_size, int(least + i * step) + 1) for i in range(_BUDGETS + 1)]


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    args = parser.parse_args(argv)
    if args.plot is not None and args.variant is None:
        parser.error("--plot: needs --variant")
    with use_backend(args.backend):
        if args.variant is None:
            _survey_all(args)
        else:
            _plan_one(parser, args)


def _survey_all(args: Any) -> None:
    variants = tqdm(VARIANTS, leave=False, dynamic_ncols=True)
    records = [record for variant in variants for record in survey(variant, make_planner(args, variant), args.memory)]
    print(json.dumps(records, indent=2) if args.json else table(records, args.memory))


def _plan_one(parser: ArgumentParser, args: Any) -> None:
    planner, budget = make_planner(args, args.variant), args.memory
    largest = None if budget is None else planner.largest_batch(budget)
    batch_size = args.batch_size or (128 if largest is None else max(1, largest))
    try:
        plan = planner.uniform("fast", batch_size) if budget is None else planner.fastest(batch_size, budget)
    except DoesNotFit as error:
        parser.error(f"--{error}")
    if args.json:
        print(json.dumps({"variant": args.variant, **asdict(plan), "largest_batch": largest}, indent=2))
    else:
        print(explain(args.variant, planner, plan, budget))
    if args.plot is not None:
        policies = {policy: planner.uniform(policy, batch_size) for policy in POLICIES}
        curve = [(plan.peak, plan.extra_time) for plan in frontier(planner, batch_size)]
        named = {policy: (plan.peak, plan.extra_time) for policy, plan in policies.items()}
        plot_memory(curve, named, f"{args.variant}, batch {batch_size} at {planner.input_size} px", args.plot)


if __name__ == "__main__":
    main()
