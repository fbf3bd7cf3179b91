"""Intervals, steps to a loss and the tables against values known from elsewhere."""

import math

import pytest

from hf_precond.bench.report import interval, steps_to, student_t

# Two-sided 95 % points of Student's distribution, from printed tables.
POINTS = {1: 12.7062, 2: 4.30265, 3: 3.18245, 4: 2.77645, 5: 2.57058, 9: 2.26216, 30: 2.04227}


@pytest.mark.parametrize(("degrees", "point"), POINTS.items())
def test_quantiles_are_those_of_the_tables(degrees, point):
    assert student_t(degrees) == pytest.approx(point, rel=1e-5)


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.999])
def test_quantiles_with_a_closed_form(confidence):
    assert student_t(1, confidence) == pytest.approx(math.tan(math.pi * confidence / 2))
    exact = confidence * math.sqrt(2 / (1 - confidence**2))
    assert student_t(2, confidence) == pytest.approx(exact)


def test_the_interval_of_three_values():
    mean, half = interval([1.0, 2.0, 3.0])
    assert (mean, half) == pytest.approx((2.0, 4.30265 / math.sqrt(3)), rel=1e-5)
    assert interval([1.5]) == (1.5, None)
    assert interval([1.0, math.inf]) == (math.inf, None)


def points(*pairs):
    return [{"step": step, "loss": loss} for step, loss in pairs]


def test_steps_to_a_loss_are_interpolated():
    course = points((20, 3.0), (40, 2.0), (45, 2.2), (50, 1.0))
    assert steps_to(2.5, course) == 30
    assert steps_to(2.0, course) == 40
    assert steps_to(1.6, course) == 47.5
    assert steps_to(3.5, course) == 20  # there already at the first evaluation
    assert steps_to(0.5, course) is None
