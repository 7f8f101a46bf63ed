"""Axes of losses."""

import pytest

from diffbuf_lib.figures import scale_of


@pytest.mark.parametrize(
    ("losses", "scale"),
    [
        ([3.0, 0.1], "log"),
        ([3.0, float("nan"), None, 0.1], "log"),
        ([0.3, -0.1], "linear"),
        ([0.3, 0.0], "linear"),
        ([], "linear"),
    ],
)
def test_an_axis_is_logarithmic_where_all_losses_are_positive(losses, scale):
    assert scale_of(losses) == scale
