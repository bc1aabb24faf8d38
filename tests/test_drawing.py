"""Pictures: the ECG is true to scale, and equal data give equal bytes."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from typing import Any

import numpy as np
import pytest

from ecgfm.drawing import (
    COLOURS,
    LONG_LAYOUT,
    MARKERS,
    SHORT_LAYOUT,
    Cloud,
    Panel,
    Series,
    draw_cloud,
    draw_ecg,
    draw_panels,
    drawn_seconds,
    ecg_figure,
    line_look,
    line_names,
)
from ecgfm.ecg import LEADS

RATE_HZ = 200.0
DPI = 254.0  # ten dots a millimetre


def steps_of_one_mv(seconds: float) -> np.ndarray:
    """(lead, time) millivolt: 0 but for 1 mV from 1.0 s to 1.2 s of each 2.5 s."""
    time_s = np.arange(round(seconds * RATE_HZ)) / RATE_HZ
    pulse = ((time_s % 2.5 >= 1.0) & (time_s % 2.5 < 1.2)).astype(float)
    return np.tile(pulse, (len(LEADS), 1))


def traces(figure: Any, name: str) -> list[np.ndarray]:
    """The drawn lines of that name as they lie on the finished picture: (point, 2) dots."""
    figure.set_dpi(DPI)
    figure.canvas.draw()
    (axes,) = figure.axes
    return [axes.transData.transform(line.get_xydata()) for line in axes.lines if line.get_label() == name]


@pytest.mark.parametrize("seconds", [10.0, 5.0])
def test_one_millivolt_is_10_mm_and_one_second_25_mm(seconds: float) -> None:
    for lead in LEADS:
        (dots, *_) = traces(ecg_figure(steps_of_one_mv(seconds), RATE_HZ), lead)
        mm = dots / 10
        assert np.ptp(mm[:, 1]) == pytest.approx(10, abs=0.01)
        assert mm[round(RATE_HZ), 0] - mm[0, 0] == pytest.approx(25, abs=0.01)


def test_the_calibration_pulse_is_1_mv_for_200_ms() -> None:
    pulses = traces(ecg_figure(steps_of_one_mv(10), RATE_HZ), "calibration")
    assert len(pulses) == 4  # one a row
    for dots in pulses:
        assert np.ptp(dots[:, 1]) == pytest.approx(100, abs=0.1)
        top = dots[dots[:, 1] > dots[:, 1].mean()]
        assert np.ptp(top[:, 0]) == pytest.approx(50, abs=0.1)


def test_ten_seconds_are_three_rows_of_four_in_one_time_and_a_rhythm_strip() -> None:
    signal_mv = np.tile(np.arange(2000) / 1000.0, (len(LEADS), 1))  # a ramp tells the time by its height
    figure = ecg_figure(signal_mv, RATE_HZ)
    assert sorted(lead for row in LONG_LAYOUT for lead in row) == sorted(LEADS)
    left = {lead: traces(figure, lead)[0][0, 0] for lead in LEADS}
    height = {lead: traces(figure, lead)[0][:, 1].mean() for lead in LEADS}
    for row in LONG_LAYOUT:
        assert [left[lead] - left[row[0]] for lead in row] == pytest.approx([0, 625, 1250, 1875], abs=0.1)
        assert np.ptp([height[lead] for lead in row]) < 0.5
    assert height["I"] > height["II"] > height["III"]
    first, rhythm = traces(figure, "II")
    assert (len(first), len(rhythm)) == (500, 2000)
    assert rhythm[:, 1].max() < height["III"]
    assert rhythm[0, 0] == pytest.approx(first[0, 0])


def test_less_than_ten_seconds_are_six_rows_of_two() -> None:
    figure = ecg_figure(steps_of_one_mv(7), RATE_HZ)
    assert SHORT_LAYOUT[0] == ("I", "V1")
    for lead in LEADS:
        (dots,) = traces(figure, lead)
        assert len(dots) == 1000
    assert traces(figure, "V1")[0][0, 0] - traces(figure, "I")[0][0, 0] == pytest.approx(1250, abs=0.1)


def test_a_recording_some_samples_short_of_ten_seconds_is_drawn_as_one_of_ten() -> None:
    assert len(traces(ecg_figure(steps_of_one_mv(9.95), RATE_HZ), "II")) == 2
    assert [drawn_seconds(seconds) for seconds in (60, 10, 9.95, 9, 4)] == [10, 10, 9.95, 5, 4]


@pytest.mark.parametrize("n_leads", range(2, 12))
def test_some_leads_have_a_row_each_in_their_order(n_leads: int) -> None:
    leads = tuple(reversed(LEADS))[:n_leads]
    figure = ecg_figure(steps_of_one_mv(12)[:n_leads], RATE_HZ, leads=leads)
    heights = []
    for lead in leads:
        (dots,) = traces(figure, lead)
        assert len(dots) == 2000  # the first 10 s
        assert np.ptp(dots[:, 1]) == pytest.approx(100, abs=0.1)
        assert dots[round(RATE_HZ), 0] - dots[0, 0] == pytest.approx(250, abs=0.1)
        heights.append(dots[:, 1].min())
    assert heights == sorted(heights, reverse=True)
    (axes,) = figure.axes
    assert "the first 10 s of 12 s" in [text.get_text() for text in axes.texts]


def test_a_single_lead_goes_on_in_rows_of_ten_seconds_up_to_a_minute() -> None:
    for seconds, rows in ((3, [600]), (10, [2000]), (25, [2000, 2000, 1000]), (90, [2000] * 6)):
        signal_mv = np.arange(round(seconds * RATE_HZ))[None] / 1e4  # a ramp tells the time by its height
        found = traces(ecg_figure(signal_mv, RATE_HZ, leads=["MLII"]), "MLII")
        assert [len(dots) for dots in found] == rows
        assert len({round(dots[0, 0]) for dots in found}) == 1
        below = [dots[:, 1].mean() for dots in found]
        assert below == sorted(below, reverse=True)


def test_the_twelve_leads_are_found_by_name_and_others_left_out() -> None:
    leads = ("V7", *reversed(LEADS))
    signal_mv = np.arange(13.0)[:, None] / 10 + steps_of_one_mv(10)[:1]
    figure = ecg_figure(signal_mv, RATE_HZ, leads=leads)
    assert not traces(figure, "V7")
    assert traces(figure, "I")[0][0, 0] < traces(figure, "aVR")[0][0, 0] < traces(figure, "V1")[0][0, 0]


def test_words_of_a_file_are_drawn_as_they_are() -> None:
    """Nothing between two dollar signs is a formula."""
    picture = draw_ecg(steps_of_one_mv(5)[:1], RATE_HZ, title="$\\frac$ a < b", leads=["$x^{$"], picture_format="svg")
    texts = [element.text for element in ET.fromstring(picture).iter("{http://www.w3.org/2000/svg}text")]
    assert "$\\frac$ a < b" in texts
    assert "$x^{$" in texts


def test_an_svg_is_true_to_scale() -> None:
    root = ET.fromstring(draw_ecg(steps_of_one_mv(10), RATE_HZ, picture_format="svg"))
    millimetres = float(root.attrib["width"].removesuffix("pt")) / 72 * 25.4
    assert millimetres == pytest.approx(5 + 10 + 10 * 25 + 5)  # margins, the pulse, ten seconds


def test_an_invalid_sample_is_a_gap_and_a_missing_lead_is_said() -> None:
    signal_mv = steps_of_one_mv(10)
    signal_mv[LEADS.index("I"), 100:110] = np.nan
    signal_mv[LEADS.index("V6")] = np.nan
    figure = ecg_figure(signal_mv, RATE_HZ)
    assert np.isnan(traces(figure, "I")[0][:, 1]).sum() == 10
    assert not traces(figure, "V6")
    (axes,) = figure.axes
    assert "V6  no signal" in [text.get_text() for text in axes.texts]


def test_saliency_is_shaded_where_it_is_high() -> None:
    """The picture with attention on the second quarter differs there, and nowhere else on the paper."""
    from io import BytesIO

    from PIL import Image

    signal_mv, saliency = steps_of_one_mv(10), np.zeros(2000)
    saliency[500:1000] = 1
    pictures = [
        np.asarray(Image.open(BytesIO(draw_ecg(signal_mv, RATE_HZ, values, dpi=127))).convert("RGB")).astype(int)
        for values in (np.zeros(2000), saliency)
    ]
    differs = np.abs(pictures[0] - pictures[1]).sum(axis=(0, 2)) > 0
    columns = np.flatnonzero(differs) / 5  # mm
    assert columns.min() == pytest.approx(15 + 62.5, abs=1)
    assert columns.max() == pytest.approx(15 + 125, abs=1)


def test_a_signal_and_a_saliency_of_other_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a signal \(12, time\)"):
        ecg_figure(np.zeros((8, 1000)), RATE_HZ)
    with pytest.raises(ValueError, match="saliency"):
        ecg_figure(np.zeros((12, 1000)), RATE_HZ, np.zeros(999))


def test_equal_data_give_equal_bytes() -> None:
    signal_mv = steps_of_one_mv(10)
    assert draw_ecg(signal_mv, RATE_HZ, title="a") == draw_ecg(signal_mv, RATE_HZ, title="a")
    x = np.linspace(0, 1, 20)
    panels = [Panel(f"p{i}", "x", "y", (Series("one", x, x**2),), diagonal=True) for i in range(3)]
    assert draw_panels(panels) == draw_panels(panels)
    svg = [draw_ecg(signal_mv, RATE_HZ, leads=LEADS, picture_format="svg") for _ in range(2)]
    assert svg[0] == svg[1]


def test_panels_share_one_legend_and_are_well_formed() -> None:
    x = np.linspace(0, 1, 20)
    panels = [
        Panel(f"finding <{i}>", "recall", "precision", (Series("model", x, x), Series("probe", x, x**2)), level=0.2)
        for i in range(5)
    ]
    root = ET.fromstring(draw_panels(panels, n_columns=3))
    texts = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert [texts.count(name) for name in ("model", "probe")] == [1, 1]
    assert all(f"finding <{i}>" in texts for i in range(5))
    assert texts.count("recall") == 3  # at the foot of each column
    assert texts.count("precision") == 2  # at the head of each row


@pytest.mark.parametrize("n_panels", [1, 4, 5, 26])
def test_no_text_of_the_panels_is_cut_off(n_panels: int) -> None:
    x = np.linspace(0, 1, 20)
    panels = [
        Panel("finding\n3 of 40", "1 - specificity", "sensitivity", (Series("model", x, x),), unit_square=True)
    ] * n_panels
    root = ET.fromstring(draw_panels(panels, panel_inches=(2.5, 2.5)))
    _, _, width, height = (float(number) for number in root.attrib["viewBox"].split())
    lowest = 0.0
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        moved = re.search(r"translate\(([\d.]+) ([\d.]+)\)", text.get("transform", ""))
        at = [float(text.attrib["x"]), float(text.attrib["y"])] if moved is None else [float(n) for n in moved.groups()]
        assert 0 < at[0] < width
        lowest = max(lowest, at[1])
    assert 0.8 * height < lowest < height - 3  # a baseline, with room for what hangs below it


def cloud(n: int = 30) -> Cloud:
    random = np.random.default_rng(0)
    groups = ["a <b>", "c", "other"] * (n // 3)
    return Cloud(
        "by finding", "component 1", "component 2", random.normal(size=(n, 2)), groups, ["a <b>", "c", "other"], 2
    )


def test_a_cloud_has_every_point_once_and_tells_groups_apart_by_colour_and_shape() -> None:
    svg = draw_cloud(cloud())
    assert draw_cloud(cloud()) == svg
    root = ET.fromstring(svg)
    points = [use for use in root.iter("{http://www.w3.org/2000/svg}use") if "stroke-width" in (use.get("style") or "")]
    styles = [re.sub(r"\s", "", use.get("style") or "") for use in points]
    for colour, _ in MARKERS[:2]:
        assert sum(f"fill:{colour.lower()}" in style for style in styles) >= 10
    for name in ("a &lt;b&gt; (10)", "c (10)", "other (10)", "component 1"):
        assert name in svg
    assert len({shape for _, shape in MARKERS}) == len({colour for colour, _ in MARKERS}) == len(MARKERS) == 8


def test_lines_look_alike_in_pictures_that_share_their_names() -> None:
    x = np.arange(3.0)
    both = Panel("both", "x", "y", (Series("one", x, x), Series("two", x, -x)))
    second = Panel("second", "x", "y", (Series("two", x, x),))
    names = line_names([both, second])
    assert names == ["one", "two"]
    alone, told = draw_panels([second]), draw_panels([second], names=names)
    assert COLOURS[0].lower() in alone
    assert COLOURS[1].lower() in told
    assert COLOURS[0].lower() not in told
    assert ">two<" in alone  # the legend
    assert ">two<" not in told
    assert line_look(0) == (COLOURS[0], "none")
    assert line_look(1)[0] == COLOURS[1]
    assert len({line_look(number) for number in range(6)}) == 6


def test_an_axis_may_have_names_in_place_of_numbers() -> None:
    shots = Panel(
        "few", "positives", "AUROC", (Series("a", np.arange(3.0), np.arange(3.0)),), x_names=("1", "5", "all")
    )
    svg = draw_panels([shots])
    assert ">all<" in svg
