import math
from decimal import ROUND_CEILING, ROUND_HALF_EVEN, Decimal
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from effnet_fast.scaling import ALPHA, BETA, FAMILIES, GAMMA, VARIANTS, Scaling, get_family, get_variant

# Multiples of 1/8: their products with integers are exact in binary floating point, so that exact arithmetic
# must agree to the last unit.
eighths = st.integers(1, 64).map(lambda n: n / 8)
multipliers = st.floats(0.05, 8)
counts = st.integers(1, 2048)

INPUT_SIZES = {
    "reference": {
        **{"baseline": 224, "depth": 224, "width": 224, "resolution": 448, "compound": 296},
        **{"b0": 224, "b1": 256, "b2": 296, "b3": 344, "b4": 392, "b5": 448, "b6": 520, "b7": 592},
    },
    "paper": {
        **{"baseline": 224, "depth": 224, "width": 224, "resolution": 448, "compound": 291},
        **{"b0": 224, "b1": 240, "b2": 260, "b3": 300, "b4": 380, "b5": 456, "b6": 528, "b7": 600},
    },
}


@given(counts, eighths)
def test_channels_are_the_nearest_multiple_of_8_unless_that_loses_a_tenth(baseline: int, width: float) -> None:
    exact = baseline * Fraction(width)
    nearest = max(8, 8 * math.floor(exact / 8 + Fraction(1, 2)))
    assert Scaling(width=width).channels(baseline) == (nearest if nearest >= exact * 9 / 10 else nearest + 8)


@given(counts, multipliers)
def test_channels_bounds(baseline: int, width: float) -> None:
    channels = Scaling(width=width).channels(baseline)
    assert channels % 8 == 0
    assert channels >= 0.9 * baseline * width
    assert 8 <= channels <= max(8, baseline * width + 8)


@given(counts, counts, multipliers, multipliers)
def test_channels_and_repeats_grow_with_baseline_and_multiplier(a: int, b: int, s: float, t: float) -> None:
    (a, b), (s, t) = sorted((a, b)), sorted((s, t))
    assert Scaling(width=s).channels(a) <= Scaling(width=t).channels(b)
    assert Scaling(depth=s).repeats(a) <= Scaling(depth=t).repeats(b)


@given(counts, eighths)
def test_repeats_round_up(baseline: int, depth: float) -> None:
    expected = (baseline * Decimal(depth)).to_integral_value(ROUND_CEILING)
    assert Scaling(depth=depth).repeats(baseline) == expected


@given(st.integers(32, 1024), eighths, st.sampled_from(sorted(FAMILIES)))
def test_input_size_is_the_nearest_multiple_and_ties_go_to_even(base: int, resolution: float, name: str) -> None:
    multiple = {"reference": 8, "paper": 1}[name]
    units = (base * Decimal(resolution) / multiple).to_integral_value(ROUND_HALF_EVEN)
    assert get_family(name).input_size(Scaling(resolution=resolution), base) == max(1, units) * multiple


@pytest.mark.parametrize("family", INPUT_SIZES)
def test_input_sizes(family: str) -> None:
    variants = get_family(family).variants
    sizes = {name: get_family(family).input_size(variant.scaling) for name, variant in variants.items()}
    assert sizes == INPUT_SIZES[family]
    assert tuple(sizes) == VARIANTS


def test_compound_is_a_power_of_each_base() -> None:
    for phi, name in enumerate(("b0", "b1", "b2", "b3", "b4", "b5", "b6", "b7")):
        scaling = get_variant(name, "reference").scaling
        expected = [float(Decimal(base) ** phi) for base in ("1.2", "1.1", "1.15")]
        # a few roundings of repeated multiplication in double precision
        assert [scaling.depth, scaling.width, scaling.resolution] == pytest.approx(expected, rel=1e-14)
    assert Scaling.compound(0.5).depth ** 2 == pytest.approx(ALPHA)


def test_one_step_of_compound_scaling_about_doubles_the_cost() -> None:
    # The paper's constraint (equation 3) is "about 2"; its own constants give 1.92.
    cost = ALPHA * BETA**2 * GAMMA**2
    assert cost == pytest.approx(2, rel=0.05)


def test_study_variants_scale_one_axis() -> None:
    for family in FAMILIES:
        assert get_variant("baseline", family).scaling == Scaling()
        assert get_variant("depth", family).scaling == Scaling(depth=4)
        assert get_variant("width", family).scaling == Scaling(width=2)
        assert get_variant("resolution", family).scaling == Scaling(resolution=2)


def test_rates_follow_the_variant() -> None:
    rates = [get_variant(f"b{phi}", "reference").drop_rate for phi in range(8)]
    assert rates == [0.2, 0.2, 0.3, 0.3, 0.4, 0.4, 0.5, 0.5]
    assert [get_variant(f"b{phi}", "reference").drop_path_rate for phi in range(8)] == rates


def test_a_free_scaling_takes_the_baselines_rates() -> None:
    variant = get_variant(Scaling(1.5, 1.25, 1.1), "reference")
    assert variant.scaling == Scaling(1.5, 1.25, 1.1)
    assert (variant.drop_rate, variant.drop_path_rate) == (0.2, 0.2)


@pytest.mark.parametrize("axis", ["depth", "width", "resolution"])
@pytest.mark.parametrize("value", [0, -1.0, math.nan, math.inf, -math.inf])
def test_a_multiplier_must_be_finite_and_positive(axis: str, value: float) -> None:
    with pytest.raises(ValueError, match=f"^{axis}: got {value}, must be finite and positive$"):
        Scaling(**{axis: value})


def test_unknown_names_list_the_choices() -> None:
    with pytest.raises(ValueError, match=r"^family: got 'papers', choose from reference, paper$"):
        get_family("papers")
    with pytest.raises(ValueError, match=r"^family: got 'papers'"):
        get_variant("b0", "papers")
    with pytest.raises(ValueError, match=r"^variant: got 'b8', choose from baseline, .*, b7$"):
        get_variant("b8", "reference")
