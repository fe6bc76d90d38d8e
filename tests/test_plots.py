"""plots.py: smoothing of losses, and the picture of a run."""

import math

import pytest

from nanofp8.plots import smooth


def test_skipped_steps_do_not_spoil_a_smoothed_curve():
    assert smooth([2.0, None, math.nan, 2.0]) == pytest.approx([2.0] * 4)
    assert math.isnan(smooth([None, 1.0])[0]) and smooth([None, 1.0])[1] == 1.0


def test_smoothing_is_unbiased():
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5) and smooth([]) == []
    assert smooth([0.0, 1.0]) == pytest.approx([0.0, 1 / 1.9])
