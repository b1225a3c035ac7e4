"""The line of each phase, against curves whose truth is known."""

import pytest
from batching.curves import GB, Node, affine, bent, stepped, true_maximum
from hypothesis import given, settings
from hypothesis import strategies as st

from elip_ds.batching import PHASES, Outcome, Peaks
from elip_ds.batching.fit import fit_peaks

CASES = settings(deadline=None, derandomize=True, max_examples=100)
PER_SAMPLE = st.floats(0.5e6, 50e6)


def points(curve, sizes, **scatter) -> list[Outcome]:
    return Node(curve, budget_bytes=10**15, **scatter).measure(sizes)


def test_a_phase_that_takes_over_later_is_foreseen() -> None:
    """Measured on an ALBEF: 377.8, 420.7, 514.0 MB at 1, 2, 4 and 2349.2 at 32, where a line
    through the overall peak is 24 % low.
    """
    curve = affine(backward=42.9e6, forward=65.54e6, states=252e6)
    assert curve(1).highest == curve(1).backward and curve(32).highest == curve(32).forward
    fit = fit_peaks(points(curve, [1, 2, 4]))
    assert fit.trusted
    assert fit.predict(32).highest == pytest.approx(curve(32).highest, rel=1e-6)
    overall = [curve(b).highest for b in (1, 2, 4)]
    assert overall[2] + (overall[2] - overall[0]) / 3 * 28 < 0.9 * curve(32).highest


@CASES
@given(PER_SAMPLE, PER_SAMPLE, st.integers(1, 40))
def test_lines_are_found_exactly(backward: float, forward: float, first: int) -> None:
    curve = affine(backward, forward)
    fit = fit_peaks(points(curve, [first, 2 * first, 4 * first]))
    assert fit.trusted
    for phase in PHASES:
        assert getattr(fit.predict(64 * first), phase) == pytest.approx(
            getattr(curve(64 * first), phase), rel=1e-4
        )


@CASES
@given(PER_SAMPLE, PER_SAMPLE, st.integers(1, 10**10))
def test_the_largest_is_the_last_that_is_predicted_to_fit(
    backward: float, forward: float, budget: int
) -> None:
    fit = fit_peaks(points(affine(backward, forward), [1, 2, 4]))
    largest = fit.largest(budget, at_most=300)
    assert 0 <= largest <= 300
    assert largest == 0 or fit.predict(largest).highest <= budget
    assert largest == 300 or fit.predict(largest + 1).highest > budget


@CASES
@given(st.floats(0.92, 1.2), st.floats(0, GB), st.integers(60, 400))
def test_a_plan_gives_the_shape(factor: float, uncounted: float, at_double: int) -> None:
    """What a plan leaves out is found, even where its curve bends."""
    planned = bent(10e6, at_double)

    def real(b: int) -> Peaks:
        return Peaks(*[round(uncounted + factor * planned(b).forward)] * 3)

    fit = fit_peaks(points(real, [4, 8, 16]), planned)
    assert fit.trusted
    assert fit.predict(64).highest == pytest.approx(real(64).highest, rel=1e-4)


def test_a_plan_for_another_curve_is_not_trusted() -> None:
    fit = fit_peaks(points(affine(10e6, 20e6), [4, 8, 16]), affine(10e6, 10e6))
    assert not fit.trusted
    assert "forward grows 2.00 times as fast as planned" in fit.doubt


def test_sizes_that_hardly_differ_do_not_let_noise_decide_the_plan_s_growth() -> None:
    """Of 4 GB that grow by 3 MB, 0.3 % of noise would make anything."""
    curve = affine(1e6, 1e6, states=4 * GB)
    fit = fit_peaks(points(curve, [1, 2, 4], noise=0.003, seed=3), curve)
    assert {line.slope for line in fit.lines.values()} == {1.0}
    assert fit.predict(400).highest == pytest.approx(curve(400).highest, rel=0.004)


def test_memory_never_falls() -> None:
    falling = [Outcome(b, Peaks(*[GB - 10**6 * b] * 3)) for b in (1, 2, 4)]
    assert fit_peaks(falling).predict(1000).highest == pytest.approx(GB, rel=0.01)


@CASES
@given(st.integers(20, 200))
def test_a_bend_is_noticed_once_it_matters(at_double: int) -> None:
    curve = bent(20e6, at_double)
    sizes = [at_double // 4, at_double // 2, at_double, 2 * at_double]
    fit = fit_peaks(points(curve, sizes))
    assert not fit.trusted
    assert "off a line" in fit.doubt


@CASES
@given(
    st.sampled_from([4, 8, 16]),
    st.one_of(st.floats(1.15, 1.6), st.floats(0.6, 0.85)),
    st.integers(0, 1000),
)
def test_one_point_far_off_is_left_out_but_not_forgotten(
    size: int, factor: float, seed: int
) -> None:
    curve = affine(10e6, 20e6)
    node = Node(curve, 10**15, noise=0.001, seed=seed, outliers={size: factor})
    fit = fit_peaks(node.measure([4, 8, 16, 32, 64]))
    assert fit.doubt == "one peak of forward is far off the line of the others"
    assert fit.predict(128).highest == pytest.approx(curve(128).highest, rel=0.01)


def test_the_largest_size_is_never_the_one_left_out() -> None:
    """It is where a bend shows: without it the others lie on a line that promises too much."""
    curve = bent(1e6, at_double=100)
    known = points(curve, [4, 8, 16, 32, 128])
    assert fit_peaks(known[:4]).trusted
    assert "off a line" in fit_peaks(known).doubt


def test_the_steps_of_an_allocator_are_no_bend() -> None:
    curve = stepped(affine(10e6, 20e6), 2 * 2**20)
    fit = fit_peaks(points(curve, [8, 16, 32]))
    assert fit.trusted
    budget = 6 * GB
    truth = true_maximum(curve, budget)
    assert abs(fit.largest(budget, 1000) - truth) <= 0.01 * truth


def test_one_size_gives_the_steepest_line_that_it_allows() -> None:
    curve = affine(10e6, 20e6)
    fit = fit_peaks(points(curve, [8]))
    assert not fit.trusted
    assert fit.predict(8).highest == curve(8).highest
    assert fit.predict(80).highest > curve(80).highest


def test_two_sizes_check_nothing() -> None:
    assert "too few" in fit_peaks(points(affine(10e6, 20e6), [8, 16])).doubt


def test_outcomes_without_memory_say_nothing() -> None:
    known = points(affine(10e6, 20e6), [1, 2, 4])
    assert fit_peaks([*known, Outcome(8, None, "no memory")]) == fit_peaks(known)
    with pytest.raises(ValueError, match="no micro-batch was measured"):
        fit_peaks([Outcome(1, None, "no memory")])
