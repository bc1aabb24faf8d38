"""Pictures: an ECG on its paper, and curves in small panels. The same data give the same bytes.

Colours are those of Okabe and Ito, told apart with every kind of colour vision; line styles differ as well.
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import matplotlib as mpl
import numpy as np
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator

from ecgfm.ecg import LEADS

MM_PER_S, MM_PER_MV = 25.0, 10.0
"""Paper speed and gain of a standard ECG."""

LONG_LAYOUT = (("I", "aVR", "V1", "V4"), ("II", "aVL", "V2", "V5"), ("III", "aVF", "V3", "V6"))
"""Rows and columns where there are 10 s: each lead its 2.5 s, and lead II once more over the whole time below."""

SHORT_LAYOUT = tuple(zip(LEADS[:6], LEADS[6:], strict=True))
"""Rows and columns where there is less: each lead its first 5 s."""

RHYTHM_LEAD = "II"
LONG_SECONDS, SHORT_SECONDS = 10.0, 5.0
_NEARLY_LONG_SECONDS = 9.9  # devices that say 10 s store some samples less

MAX_SINGLE_LEAD_ROWS = 6

AGAINST_AND_FOR = ("speaks against the label", "for it")
"""What a saliency below and above 0 means, unless it is said otherwise."""

_MARGIN_MM, _PULSE_MM, _TITLE_MM, _FOOT_MM = 5.0, 10.0, 10.0, 10.0
_PAPER, _FINE, _COARSE, _INK, _QUIET = "#fffdfc", "#f7dfdd", "#ecb3ae", "#111111", "#555555"
_FOR, _AGAINST = (0.0, 0.45, 0.70), (0.84, 0.37, 0.0)
_SALIENCY = LinearSegmentedColormap.from_list("saliency", [(*_FOR, 0.0), (*_FOR, 0.42)])
_SIGNED = LinearSegmentedColormap.from_list(
    "signed", [(0.0, (*_AGAINST, 0.6)), (0.5, (*_AGAINST, 0.0)), (0.5, (*_FOR, 0.0)), (1.0, (*_FOR, 0.6))]
)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKERS = (("#0072B2", "o"), ("#D55E00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#56B4E9", "P"),
           ("#000000", "X"), ("#B8A800", "*"))  # fmt: skip
"""Of groups of points: shapes differ as well, and the yellow is one that shows on white."""
_REST_MARKERS = (("#8a949e", "x"), ("#c3cad0", "."))
_DASHES = ("solid", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)), (0, (3, 1)), (0, (1, 3)))
_FONTS = "system-ui, -apple-system, Segoe UI, Roboto, Helvetica, Arial, sans-serif"

_STYLE: Any = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],  # comes with matplotlib: text is measured alike on every machine
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.titlelocation": "left",
    "axes.linewidth": 0.6,
    "axes.edgecolor": "#999999",
    "axes.labelcolor": _QUIET,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e8e8e8",
    "grid.linewidth": 0.5,
    "xtick.color": _QUIET,
    "ytick.color": _QUIET,
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "ecgfm",
}


@dataclass(frozen=True)
class Series:
    """One line of a panel. Lines of one name look alike in all panels of a figure and share a legend entry.

    x, y: (point,); a y of NaN leaves a gap
    steps: the line goes flat to the left of each point, as a precision-recall curve does
    points: no line but a mark at each point
    """

    name: str
    x: np.ndarray
    y: np.ndarray
    steps: bool = False
    points: bool = False


@dataclass(frozen=True)
class Panel:
    """One small plot.

    unit_square: both axes from 0 to 1, drawn square
    diagonal: the line of chance from (0, 0) to (1, 1); level: the height of a line of chance
    x_names: what stands at 0, 1, ... of the x axis, where these are no numbers
    """

    title: str
    x_label: str
    y_label: str
    series: tuple[Series, ...]
    unit_square: bool = False
    diagonal: bool = False
    level: float | None = None
    x_names: tuple[str, ...] = ()


@dataclass(frozen=True)
class Cloud:
    """Points on two axes, in groups.

    points: (point, 2); groups: (point,) names
    order: the names in the order of the legend; from `rest` on they are drawn pale, behind the others
    """

    title: str
    x_label: str
    y_label: str
    points: np.ndarray
    groups: Sequence[str]
    order: Sequence[str]
    rest: int


@dataclass(frozen=True)
class _Strip:
    """A stretch of one lead on the paper.

    lead: its row in the signal; first_s, seconds: the stretch of the recording
    row, at_s: where it lies on the paper: rows from the top, seconds from the left
    """

    lead: int
    first_s: float
    seconds: float
    row: int
    at_s: float

    def samples(self, signal: np.ndarray, sampling_rate_hz: float) -> np.ndarray:
        """(time,) of the stretch, from (lead, time)."""
        first, count = round(self.first_s * sampling_rate_hz), round(self.seconds * sampling_rate_hz)
        return signal[self.lead, first : first + count]


def draw_ecg(
    signal_mv: np.ndarray,
    sampling_rate_hz: float,
    saliency: np.ndarray | None = None,
    title: str = "",
    dpi: int = 127,
    leads: Sequence[str] = LEADS,
    picture_format: Literal["png", "svg"] = "png",
    signs: tuple[str, str] = AGAINST_AND_FOR,
) -> bytes:
    """A PNG or SVG of one ECG; see `ecg_figure`. At 127 dots per inch a millimetre is five dots, and the grid is
    even; an SVG has no dots and prints true to scale."""
    no_metadata = {"Software": None} if picture_format == "png" else {"Date": None, "Creator": None}
    out = io.BytesIO()
    with mpl.rc_context(_STYLE):
        figure = ecg_figure(signal_mv, sampling_rate_hz, saliency, title, leads, signs)
        options: dict[str, Any] = {"dpi": dpi, "pil_kwargs": {"optimize": True}} if picture_format == "png" else {}
        figure.savefig(out, format=picture_format, metadata=no_metadata, **options)
    return out.getvalue() if picture_format == "png" else _with_fonts(out.getvalue().decode()).encode()


def ecg_figure(
    signal_mv: np.ndarray,
    sampling_rate_hz: float,
    saliency: np.ndarray | None = None,
    title: str = "",
    leads: Sequence[str] = LEADS,
    signs: tuple[str, str] = AGAINST_AND_FOR,
) -> Figure:
    """An ECG at 25 mm/s and 10 mm/mV on paper with lines every 1 and 5 mm, true to scale.

    All twelve leads and 10 s (or nearly) or more: three rows of four leads, 2.5 s each and all in one time, above a
    rhythm strip of lead II. Twelve leads and less time: six rows of two leads, their first 5 s. A single lead: rows of
    10 s, up to a minute. Any other leads: a row each, their first 10 s. Each lead is drawn about its median, as a
    recorder without direct current draws it. An invalid sample is a gap.

    signal_mv: (lead, time), millivolt; NaN where invalid
    saliency: (time,) 0 to 1, shaded behind all leads; (lead, time) -1 to 1, behind each its own, in one colour what is
        below 0 and in another what is above; None for none
    signs: what a saliency (lead, time) below and above 0 means, in words
    leads: the names of the rows; all twelve standard leads may come in any order and with others, not drawn then
    """
    shapes = (signal_mv.shape[1:], signal_mv.shape)
    if signal_mv.shape[0] != len(leads) or (saliency is not None and saliency.shape not in shapes):
        raise ValueError(
            f"expected a signal ({len(leads)}, time) and a saliency (time,) or ({len(leads)}, time), found "
            f"{signal_mv.shape} and {None if saliency is None else saliency.shape}"
        )
    of_leads = saliency is not None and saliency.ndim == 2
    shading: dict[str, Any] = {"cmap": _SIGNED if of_leads else _SALIENCY, "vmin": -1 if of_leads else 0, "vmax": 1}
    total_s = signal_mv.shape[1] / sampling_rate_hz
    strips = _strips(leads, total_s)
    n_rows = 1 + max(strip.row for strip in strips)
    row_mm = 28.0 if n_rows <= 4 else 24.0
    left, bottom = _MARGIN_MM + _PULSE_MM, _FOOT_MM
    paper_s = max(strip.at_s + strip.seconds for strip in strips)
    width = left + paper_s * MM_PER_S + _MARGIN_MM
    above = _overhang_mm([strip for strip in strips if strip.row == 0], signal_mv, sampling_rate_hz, row_mm)
    below = _overhang_mm([strip for strip in strips if strip.row == n_rows - 1], -signal_mv, sampling_rate_hz, row_mm)
    height = bottom + below + n_rows * row_mm + above + _TITLE_MM

    figure = Figure(figsize=(width / 25.4, height / 25.4), facecolor="white")
    axes: Any = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # one unit is one millimetre
    axes.axis("off")
    paper = _paper(axes, (0, width), (bottom, height - _TITLE_MM))
    for strip in strips:
        samples_mv = strip.samples(signal_mv, sampling_rate_hz)
        at, middle = left + strip.at_s * MM_PER_S, height - _TITLE_MM - above - (strip.row + 0.5) * row_mm
        if saliency is not None:
            shown = strip.samples(np.broadcast_to(saliency, signal_mv.shape), sampling_rate_hz)[None]
            extent = (at, at + shown.shape[1] / sampling_rate_hz * MM_PER_S, middle - row_mm / 2, middle + row_mm / 2)
            axes.imshow(shown, extent=extent, **shading, aspect="auto", zorder=0.5)
        name = leads[strip.lead]
        note = f"  from {strip.first_s:g} s" if strip.first_s and strip.at_s == 0 else ""
        _lead(axes, name, note, samples_mv, sampling_rate_hz, (at, middle))
        if strip.at_s == 0:
            _calibration_pulse(axes, _MARGIN_MM, middle)
    for line in axes.lines:
        line.set_clip_path(paper)  # tall complexes may cross other leads, as on paper, but not the title
    axes.text(_MARGIN_MM, height - _TITLE_MM / 2, title, va="center", size=10, color=_INK, parse_math=False)
    scale = f"{MM_PER_S:g} mm/s   {MM_PER_MV:g} mm/mV   {sampling_rate_hz:g} Hz"
    axes.text(width - _MARGIN_MM, bottom / 2, scale, va="center", ha="right", size=9, color=_QUIET)
    drawn_s = max(strip.first_s + strip.seconds for strip in strips)
    if saliency is not None:
        low, high = signs if of_leads else ("attention of the model: low", "high")
        axes.text(_MARGIN_MM, bottom / 2, low, va="center", size=9, color=_QUIET)
        extent = (52, 77, bottom / 2 - 1.5, bottom / 2 + 1.5)
        axes.imshow(np.linspace(shading["vmin"], 1, 64)[None], extent=extent, **shading, aspect="auto")
        axes.text(79, bottom / 2, high, va="center", size=9, color=_QUIET)
    elif total_s > drawn_s + 0.05:
        shown_s = f"the first {drawn_s:g} s of {total_s:.5g} s"
        axes.text(_MARGIN_MM, bottom / 2, shown_s, va="center", size=9, color=_QUIET)
    axes.set(xlim=(0, width), ylim=(0, height))  # imshow moves them
    return figure


def _overhang_mm(strips: Sequence[_Strip], signal_mv: np.ndarray, sampling_rate_hz: float, row_mm: float) -> float:
    """By how much the tallest complex of a row leaves it upwards, in whole coarse squares; 4 mV and more are cut."""
    heights = [0.0]
    for strip in strips:
        samples_mv = strip.samples(signal_mv, sampling_rate_hz)
        if not np.isnan(samples_mv).all():
            heights.append(float(np.nanmax(samples_mv) - np.nanmedian(samples_mv)))
    over_mm = min(max(heights), 4.0) * MM_PER_MV + 1 - row_mm / 2
    return max(math.ceil(over_mm / 5), 0) * 5.0


def drawn_seconds(total_s: float) -> float:
    """How much of a twelve-lead recording is drawn."""
    return min(total_s, LONG_SECONDS if total_s >= _NEARLY_LONG_SECONDS else SHORT_SECONDS)


def _strips(leads: Sequence[str], total_s: float) -> list[_Strip]:
    """Which stretch of which lead lies where."""
    if set(LEADS) <= set(leads):
        is_long = drawn_seconds(total_s) > SHORT_SECONDS
        layout = LONG_LAYOUT if is_long else SHORT_LAYOUT
        seconds = LONG_SECONDS / len(layout[0]) if is_long else SHORT_SECONDS
        strips = [
            _Strip(leads.index(lead), column * seconds if is_long else 0.0, seconds, row, column * seconds)
            for row, names in enumerate(layout)
            for column, lead in enumerate(names)
        ]
        rhythm = _Strip(leads.index(RHYTHM_LEAD), 0.0, LONG_SECONDS, len(layout), 0.0)
        return [*strips, rhythm] if is_long else strips
    seconds = LONG_SECONDS if total_s > SHORT_SECONDS else SHORT_SECONDS
    if len(leads) == 1:
        n_rows = min(max(math.ceil(total_s / seconds - 1e-9), 1), MAX_SINGLE_LEAD_ROWS)
        return [_Strip(0, row * seconds, seconds, row, 0.0) for row in range(n_rows)]
    return [_Strip(lead, 0.0, seconds, lead, 0.0) for lead in range(len(leads))]


def line_names(panels: Sequence[Panel]) -> list[str]:
    """The names of the lines of some panels, in the order of their looks."""
    return list(dict.fromkeys(series.name for panel in panels for series in panel.series))


def line_look(number: int) -> tuple[str, str]:
    """Colour and dashes of a line by its place among the names, as SVG has them (stroke, stroke-dasharray)."""
    dashes = _DASHES[number % 6]
    return COLOURS[number % 6], "none" if isinstance(dashes, str) else " ".join(f"{1.3 * one:g}" for one in dashes[1])


def draw_panels(
    panels: Sequence[Panel],
    n_columns: int = 4,
    panel_inches: tuple[float, float] = (2.2, 2.2),
    names: Sequence[str] | None = None,
) -> str:
    """An SVG of small plots, `n_columns` side by side, with one legend for all.

    names: of the lines of this picture and others, which shall look alike; the legend is then elsewhere (`line_look`)
    """
    n_columns = min(n_columns, len(panels))
    n_rows = math.ceil(len(panels) / n_columns)
    looks = {
        name: {"color": COLOURS[i % 6], "linestyle": _DASHES[i % 6]}
        for i, name in enumerate(line_names(panels) if names is None else names)
    }
    with mpl.rc_context(_STYLE):
        legend_inches = 0.35 if names is None else 0.0
        size = (panel_inches[0] * n_columns, panel_inches[1] * n_rows + legend_inches)
        layout = ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06, rect=(0, 0, 1, 1 - legend_inches / size[1]))
        figure = Figure(figsize=size, layout=layout, facecolor="white")
        grid = figure.subplots(n_rows, n_columns, squeeze=False)
        handles: dict[str, Any] = {}
        for place, axes in enumerate(grid.flat):
            if place < len(panels):
                _panel(axes, panels[place], looks, handles)
                below = place + n_columns
                if place % n_columns and panels[place].y_label == panels[place - 1].y_label:
                    axes.set_ylabel("")
                if below < len(panels) and panels[place].x_label == panels[below].x_label:
                    axes.set_xlabel("")
            else:
                axes.axis("off")
        if names is None:
            columns = {"ncols": len(handles), "handlelength": 2.4, "borderaxespad": 0.3}
            figure.legend(handles.values(), handles.keys(), loc="upper left", **columns)
        figure.draw_without_rendering()  # the layout settles at its second turn: squares first have to shrink
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _with_fonts(out.getvalue())


def draw_cloud(cloud: Cloud, inches: tuple[float, float] = (5.0, 5.2)) -> str:
    """An SVG of points, their groups told apart by colour and shape, with a legend below that counts each."""
    with mpl.rc_context(_STYLE):
        figure = Figure(figsize=inches, layout=ConstrainedLayoutEngine(w_pad=0.06, h_pad=0.06), facecolor="white")
        axes = figure.subplots()
        groups = np.array(cloud.groups)
        size = 5.5 if len(groups) <= 500 else 4.0
        handles = {}
        for place, name in enumerate(cloud.order):
            mine = cloud.points[groups == name]
            pale = place - cloud.rest
            colour, marker = MARKERS[place % len(MARKERS)] if pale < 0 else _REST_MARKERS[pale % len(_REST_MARKERS)]
            (handle,) = axes.plot(
                *mine.T,
                color=colour,
                marker=marker,
                linestyle="none",
                markersize=size + 1.5 if marker in ".*" else size,
                markeredgewidth=0.3 if pale < 0 else 0.8,
                markeredgecolor="white" if pale < 0 else colour,
                zorder=2 + (place + 1) / (1 + len(cloud.order)) * (1 if pale < 0 else -1),  # rare ones lie on top
            )
            handles[f"{name} ({len(mine):,})"] = handle
        axes.set_title(cloud.title, color=_INK)
        axes.set(xlabel=cloud.x_label, ylabel=cloud.y_label)
        axes.set_aspect("equal", adjustable="datalim")
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        legend = {"ncols": 2, "fontsize": 8, "handletextpad": 0.2, "borderaxespad": 0.0, "markerscale": 1.4}
        figure.legend(handles.values(), handles.keys(), loc="outside lower left", **legend)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None, "Creator": None})
    return _with_fonts(out.getvalue())


def _with_fonts(svg: str) -> str:
    """The drawing with the reader's own fonts in place of the one that it was measured with."""
    return svg.replace("'DejaVu Sans', sans-serif", _FONTS).replace("'DejaVu Sans'", _FONTS)


def _panel(axes: Any, panel: Panel, looks: dict[str, dict[str, Any]], handles: dict[str, Any]) -> None:
    if panel.diagonal:
        axes.plot([0, 1], [0, 1], color="#bbbbbb", linewidth=0.7)
    if panel.level is not None:
        axes.axhline(panel.level, color="#bbbbbb", linewidth=0.7)
    for series in panel.series:
        few = len(series.x) <= 12 and not panel.unit_square
        look = {**looks[series.name], **({"linestyle": "none", "alpha": 0.45} if series.points else {})}
        (handles[series.name],) = axes.plot(
            series.x,
            series.y,
            drawstyle="steps-pre" if series.steps else "default",
            linewidth=1.3,
            marker="o" if few or series.points else None,
            markersize=3,
            markeredgewidth=0.0 if series.points else None,
            **look,
        )
    axes.set_title(panel.title, color=_INK)
    axes.set(xlabel=panel.x_label, ylabel=panel.y_label)
    if panel.unit_square:
        axes.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=(0, 0.5, 1), yticks=(0, 0.5, 1), box_aspect=1)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        axes.ticklabel_format(axis="y", useOffset=False)
        if panel.x_names:
            axes.set_xticks(range(len(panel.x_names)), panel.x_names)


def _paper(axes: Any, across: tuple[float, float], up: tuple[float, float]) -> Any:
    """Paper with a line every millimetre and a stronger one every five."""
    paper = axes.axhspan(*up, color=_PAPER, zorder=0)
    for every, colour, line_width in ((1, _FINE, 0.35), (5, _COARSE, 0.6)):
        x, y = np.arange(across[0], across[1] + 0.01, every), np.arange(up[0], up[1] + 0.01, every)
        axes.vlines(x, *up, color=colour, linewidth=line_width, zorder=1)
        axes.hlines(y, *across, color=colour, linewidth=line_width, zorder=1)
    return paper


def _lead(
    axes: Any, lead: str, note: str, samples: np.ndarray, sampling_rate_hz: float, at: tuple[float, float]
) -> None:
    """One lead's trace from `at`: where it begins, and the height of its median; in millimetres."""
    left, middle = at
    valid = ~np.isnan(samples)
    note += "" if valid.any() else "  no signal"
    axes.text(left + 1.5, middle + 8.2, lead + note, weight="bold", size=9, color=_INK, zorder=4, parse_math=False)
    axes.vlines(left, middle - 4, middle + 4, color=_QUIET, linewidth=0.8, zorder=2)
    if valid.any():
        x = left + np.arange(len(samples)) / sampling_rate_hz * MM_PER_S
        y = middle + (samples - np.median(samples[valid])) * MM_PER_MV
        axes.plot(x, y, color=_INK, linewidth=0.8, solid_joinstyle="round", label=lead, zorder=3)


def _calibration_pulse(axes: Any, left: float, middle: float) -> None:
    """1 mV for 0.2 s."""
    x = left + np.array([0, 2, 2, 7, 7, 9])
    y = middle + np.array([0, 0, 1, 1, 0, 0]) * MM_PER_MV
    axes.plot(x, y, color=_INK, linewidth=0.8, label="calibration", zorder=3)
