"""Plots: the PNG is drawn, with what was given."""

import numpy as np
from matplotlib.image import imread

from bamoe.reports.plots import Curve, Panel, training_curves


def colours(path):
    pixels = (imread(path)[..., :3] * 255).round().astype(int).reshape(-1, 3)
    return {"#{:02X}{:02X}{:02X}".format(*pixel) for pixel in np.unique(pixels, axis=0)}


def test_training_curves_draws_every_panel_and_curve(tmp_path):
    x = [0.0, 1.0, 2.0]
    first = Panel("first", "x", "y", [Curve("context", x, [9, 8, 7], faint=True), Curve("one", x, [9, 5, 3])])
    second = Panel("second", "x", "y", [Curve("two", x, [2, 2, 2]), Curve("one", x, [1, 4, 9])], log_scale=True)
    both = training_curves([first, second], tmp_path / "both.png")
    alone = training_curves([first], tmp_path / "alone.png")
    assert imread(both).shape[1] == 2 * imread(alone).shape[1]
    # On a white page: the faint curve in grey, "one" in the palette's first colour, "two" only where it is drawn.
    assert {"#FFFFFF", "#A6A6A6", "#0072B2"} <= colours(alone)
    assert "#D55E00" not in colours(alone)
    assert "#D55E00" in colours(both)


def test_one_point_is_enough(tmp_path):
    panel = Panel("one", "x", "y", [Curve("a", [1.0], [2.0]), Curve("b", [1.0], [2.0], faint=True)], log_scale=True)
    assert training_curves([panel], tmp_path / "point.png").stat().st_size > 1000
