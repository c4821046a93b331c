"""Curves as pictures, and numbers in words."""

from __future__ import annotations

import re
from xml.etree import ElementTree

import numpy as np
import pytest

from launchers.views.charts import Curve, Note, chart
from launchers.views.downsample import envelope
from launchers.views.units import compact, duration


def test_spikes_survive_the_fewest_points():
    step = np.arange(1, 1_000_001, dtype=float)
    loss = 2 + np.exp(-step / 1e5)
    loss[[123_456, 777_777]] = 50.0, 0.1
    loss[500_000] = np.nan
    drawn = envelope(step, loss, 300)
    assert len(drawn.x) <= 300
    assert (drawn.high.max(), drawn.low.min()) == (50.0, 0.1)
    assert np.all(np.diff(drawn.x) > 0)
    assert np.all((drawn.low <= drawn.mean) & (drawn.mean <= drawn.high))
    curve = Curve(
        title="Loss", unit="", step=step, value=loss, lost_step=np.zeros(0), lost_value=np.zeros(0)
    )  # fmt: skip
    assert curve.not_finite == 1
    picture = chart(curve)
    assert len(picture) < 20_000
    box = [float(number) for number in re.findall(r"[ ,ML](-?\d+\.\d),", re.sub(r"<title>.*?</title>", "", picture))]
    assert 0 <= min(box) <= max(box) <= 400
    assert ">1M</text>" in picture  # the last step has its place on the axis


def test_few_values_are_drawn_as_they_are():
    x, y = np.array([3.0, 1.0, 2.0]), np.array([30.0, 10.0, np.inf])
    drawn = envelope(x, y, 300)
    assert drawn.x.tolist() == [1.0, 3.0]
    assert drawn.low.tolist() == drawn.mean.tolist() == drawn.high.tolist() == [10.0, 30.0]


@pytest.mark.parametrize(
    "values", [[], [0.0], [1.0, 1.0], [float("nan")], [-3.0, 5.0], [1e-12, 1e12], [1e300, -1e300], [5e-324]]
)
@pytest.mark.parametrize("from_zero", [True, False])
def test_any_values_make_a_picture(values: list[float], from_zero: bool):
    step = np.arange(1, len(values) + 1, dtype=float)
    curve = Curve(
        title="a < b & c", unit="", from_zero=from_zero, step=step, value=np.array(values), lost_step=step,
        lost_value=np.array(values),
    )  # fmt: skip
    picture = chart(curve, starts=[Note(1, "<x>")], alerts=[Note(1, "&"), Note(9e9, "off the picture")])
    root = ElementTree.fromstring(picture)
    assert root.find("title").text == "a < b & c by step"
    assert "nan" not in picture and "inf" not in picture


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "0 s"), (0.0123, "12.3 ms"), (7.25, "7.25 s"), (59.99, "1 min"), (61, "1 min 1 s"), (3600, "1 h"),
     (7290, "2 h 1 min"), (90000, "1 d 1 h"), (86400 * 12, "12 d")],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds: float, words: str):
    assert duration(seconds) == words


@pytest.mark.parametrize(
    ("value", "words"),
    [(0, "0"), (0.0002, "2e-4"), (0.15, "0.15"), (999, "999"), (15360, "15.4k"), (2.5e6, "2.5M"), (-4e9, "-4G")],
)
def test_axis_numbers_are_short(value: float, words: str):
    assert compact(value) == words
