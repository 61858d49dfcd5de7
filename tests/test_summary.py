import contextlib
import io
import json
import re
import warnings
from typing import Any

import pytest
import torch

from effnet_fast import VARIANTS, create_model
from effnet_fast.passes.backend import use_backend
from effnet_fast.summary import count, count_operations, main

with warnings.catch_warnings():
    warnings.simplefilter("ignore", FutureWarning)  # importing fvcore uses torch.jit.script
    from fvcore.nn import ActivationCountAnalysis, FlopCountAnalysis

MACS_OF_STUDY = {  # in millions
    "baseline": 387.68,
    "depth": 1591.00,
    "width": 1459.96,
    "resolution": 1539.40,
    "compound": 1818.28,
}
MACS_OF_REFERENCE = (388, 865, 1818, 3264, 6340, 10468, 20138, 38821)  # b0 to b7, in millions
MULTIPLY_ADDS_OF_PAPER = (0.39, 0.70, 1.0, 1.8, 4.2, 9.9, 19, 37)  # b0 to b7 (table 2), in billions


Row = dict[str, Any]


@pytest.fixture(scope="module")
def rows() -> dict[tuple[str, str], Row]:
    """What --json prints by default, by family and variant."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        main(["--json"])
    return {(row["family"], row["variant"]): row for row in json.loads(output.getvalue())}


def test_every_variant_of_both_families_by_default(rows: dict[tuple[str, str], Row]) -> None:
    assert list(rows) == [(family, variant) for family in ("reference", "paper") for variant in VARIANTS]
    assert {family: row["num_classes"] for (family, _), row in rows.items()} == {"reference": 10, "paper": 1000}


@pytest.mark.parametrize(("variant", "millions"), MACS_OF_STUDY.items())
def test_macs_of_the_study(rows: dict[tuple[str, str], Row], variant: str, millions: float) -> None:
    assert round(rows["reference", variant]["macs"] / 1e6, 2) == millions


def test_macs_of_the_reference_family(rows: dict[tuple[str, str], Row]) -> None:
    assert tuple(round(rows["reference", f"b{phi}"]["macs"] / 1e6) for phi in range(8)) == MACS_OF_REFERENCE


def test_macs_of_the_paper_family(rows: dict[tuple[str, str], Row]) -> None:
    macs = [rows["paper", f"b{i}"]["macs"] / 1e9 for i in range(8)]
    # The paper prints two digits, and its figure for B4 is 4.5 % under what its own architecture takes.
    assert macs == pytest.approx(MULTIPLY_ADDS_OF_PAPER, rel=0.05)


@pytest.mark.parametrize("pad_type", ["symmetric", "same"])
@pytest.mark.parametrize("family", ["reference", "paper"])
def test_fvcore_counts_the_same(family: str, pad_type: str) -> None:
    model = create_model("compound", 7, family=family, in_chans=2, pad_type=pad_type).eval()
    image = torch.randn(1, 2, 65, 65)
    with use_backend("eager"):
        macs = FlopCountAnalysis(model, image).unsupported_ops_warnings(False).by_operator()
    assert count_operations(model, 65)[0] == macs["conv"] + macs["linear"]


def test_fvcore_counts_the_same_with_other_strides() -> None:
    strides = (1, 1, 2, 2, 1, 1, 2, 1)
    model = create_model("baseline", 10, strides=strides).eval()
    with use_backend("eager"):
        macs = FlopCountAnalysis(model, torch.randn(1, 3, 32, 32)).unsupported_ops_warnings(False).by_operator()
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        options = [
            "--family",
            "reference",
            "--variant",
            "baseline",
            "--resolution",
            "32",
            "--strides",
            "1,1,2,2,1,1,2,1",
        ]
        main([*options, "--json"])
    (row,) = json.loads(output.getvalue())
    assert row["macs"] == macs["conv"] + macs["linear"]


@pytest.mark.parametrize("strides", ["1", "1,1,2,2,1,1,2,0", "1,1,2,2,1,1,2,x", ""])
def test_other_strides_than_eight_of_1_or_2_get_a_line(strides: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--strides", strides])
    assert "strides: got" in capsys.readouterr().err


@pytest.mark.parametrize("family", ["reference", "paper"])
def test_fvcore_counts_the_same_activations(family: str) -> None:
    counts = count("b1", family, 7, resolution=60)
    image = torch.randn(1, 3, counts.input_size, counts.input_size)
    analysis = ActivationCountAnalysis(create_model("b1", 7, family=family).eval(), image)
    with use_backend("eager"):
        assert counts.activations == analysis.unsupported_ops_warnings(False).total()


def test_counting_leaves_the_model_as_it_is() -> None:
    model = create_model("b0", 3)
    model.stages[2].eval()
    modes = [module.training for module in model.modules()]
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    count_operations(model, 32)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_the_chosen_backend_does_not_matter(caplog: pytest.LogCaptureFixture) -> None:
    with use_backend("cpu"):
        assert count("b0", "reference", 10).macs == 387_680_992
    assert not caplog.records


def test_counts_of_a_variant() -> None:
    counts = count("compound", "reference", 10, resolution=32)
    assert (counts.input_size, counts.blocks, counts.params) == (40, 26, 20_014_738)
    assert counts.flops == 2 * counts.macs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"variant": "b9"}, r"^variant: got 'b9', choose from baseline, [\w, ]+$"),
        ({"family": "ours"}, r"^family: got 'ours', choose from reference, paper$"),
        ({"num_classes": 0}, r"^num_classes: got 0, must be at least 1$"),
        ({"resolution": 0}, r"^resolution: got 0, must be at least 1$"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str | int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        count(**{"variant": "b0", "family": "paper", "num_classes": 10, **arguments})


def table(lines: list[str]) -> list[list[str]]:
    """The cells of a table's lines: columns are at least two spaces apart."""
    return [re.split(r"\s{2,}", line.strip()) for line in lines]


def test_table_has_published_figures_beside(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--family", "reference", "--variant", "resolution", "compound", "b1"])
    title, *lines, footnote = capsys.readouterr().out.splitlines()
    assert title == "family reference, 10 classes"
    # fmt: off
    assert table(lines) == [
        ["variant", "depth", "width", "resolution", "input (px)", "blocks", "params",
         "MACs (M)", "FLOPs (M)", "activations (M)", "claimed (B)"],
        ["resolution", "1", "1", "2", "448", "16", "7,155,658", "1539.40", "3078.81", "26.96", "3.27"],
        ["compound", "1.44", "1.21", "1.3225", "296", "26", "20,014,738", "1818.28", "3636.56", "23.35", "1.82"],
        ["b1", "1.2", "1.1", "1.15", "256", "23", "14,283,594", "865.03", "1730.05", "12.81", "-"],
    ]
    # fmt: on
    assert len({len(line) for line in lines}) == 1
    assert "mixed units" in footnote


def test_one_table_per_family(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--variant", "b0", "resolution", "--resolution", "32", "--num-classes", "7"])
    tables = [text.splitlines() for text in capsys.readouterr().out.split("\n\n")]
    assert [lines[0] for lines in tables] == ["family reference, 7 classes", "family paper, 7 classes"]
    columns = [[(row[0], row[4], row[-1]) for row in table(lines[2:-1])] for lines in tables]
    assert columns == [
        [("b0", "32", "-"), ("resolution", "64", "3.27")],
        [("b0", "32", "0.39"), ("resolution", "64", "1.90")],
    ]


def test_json_has_raw_integers(capsys: pytest.CaptureFixture[str]) -> None:
    main(["--json", "--family", "paper", "--variant", "width", "b1", "--num-classes", "100", "--resolution", "64"])
    rows = json.loads(capsys.readouterr().out)
    assert [row["variant"] for row in rows] == ["width", "b1"]
    for row in rows:
        counts = count(row["variant"], "paper", 100, 64)
        assert row["params"] == counts.params
        assert row["macs"] == counts.macs
        assert row["flops"] == 2 * counts.macs
        assert row["activations"] == counts.activations
    assert [(row["depth"], row["width"]) for row in rows] == [(1, 2), (1.1, 1)]
    assert [(row["input_size"], row["blocks"]) for row in rows] == [(64, 16), (69, 23)]


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--family", "ours"], "--family"),
        (["--variant", "b0", "b9"], "--variant"),
        (["--num-classes", "0"], "--num-classes: got '0'"),
        (["--num-classes", "ten"], "--num-classes"),
        (["--resolution", "-1"], "--resolution: got '-1'"),
        (["--csv"], "--csv"),
    ],
)
def test_a_wrong_option_is_one_line(option: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(option)
    assert stop.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert message in captured.err
