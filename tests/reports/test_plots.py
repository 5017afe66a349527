"""Plots: every look differs, the SVG has a dark theme of its own, heat maps fit."""

from bamoe.reports.heat_maps import HeatMap, heat_maps_svg
from bamoe.reports.plots import Curve, Panel, curve_looks, panel_svg


def test_many_names_all_look_different():
    looks = curve_looks(f"row {index}" for index in range(40))
    assert len({str(look) for look in looks.values()}) == 40


def test_an_svg_recolours_itself_on_a_dark_page_and_names_the_range():
    curve = Curve("_one $x$", [1.0, 2.0], [2.0, 3.0], low=[1.5, 2.5], high=[2.5, 3.5])
    drawn = panel_svg(Panel("a", "x", "y", [curve]), curve_looks(["_one $x$"])).decode()
    assert "prefers-color-scheme: dark" in drawn
    assert '[style*="stroke: #0072b2"]{stroke:#3D8FE8 !important}' in drawn
    assert "<!--  _one $x$ -->" in drawn  # neither hidden nor read as mathematics
    assert "opacity: 0.15" in drawn
    alone = panel_svg(Panel("a", "x", "y", [Curve("b", [1.0], [2.0])]), curve_looks(["b"])).decode()
    assert "opacity: 0.15" not in alone


def test_heat_maps_write_percentages_while_there_is_room():
    shares = [[0.123, 0.877], [0.5, 0.5]]
    drawn = heat_maps_svg([("row", [HeatMap("code", shares), HeatMap("law", shares[::-1])])]).decode()
    assert drawn.count("<!-- 88 -->") == 2
    wide = heat_maps_svg([("row", [HeatMap("code", [[1 / 16] * 16] * 12)])]).decode()
    assert "<!-- 6 -->" in wide  # the sixth expert's or layer's own number
    assert wide.count("<!-- 6 -->") < 12


def test_more_maps_than_fit_side_by_side_take_another_line():
    def height(count):
        drawn = heat_maps_svg([("row", [HeatMap(str(index), [[0.5, 0.5]]) for index in range(count)])]).decode()
        return float(drawn.split('height="')[1].split("pt")[0])

    assert height(4) == height(1)
    assert height(5) == height(8) == 2 * height(4)
