"""Small plots as the report's pages hold them: below one legend, in pictures of two plots that stand side by side as
far as the page is wide, so that their words stay readable on a narrow one and in print.
"""

from __future__ import annotations

from collections.abc import Sequence, Set

from markupsafe import Markup

from ecgfm.drawing import Cloud, Panel, draw_cloud, draw_panels, line_look, line_names
from ecgfm.pages.template import svg_image


def panel_pictures(
    panels: Sequence[Panel], description: str, inches: tuple[float, float] = (2.5, 2.5), in_picture: int = 2
) -> Markup:
    """Some panels below one legend; in words that there are none.

    description: in words, of all of them; inches: of each; in_picture: how many there are in half the page's width
    """
    if not panels:
        return Markup("<p>No finding could be scored.</p>")
    names = line_names(panels)
    pictures = []
    for first in range(0, len(panels), in_picture):
        some = panels[first : first + in_picture]
        titles = " and ".join(panel.title.partition("\n")[0] for panel in some)
        image = svg_image(draw_panels(some, in_picture, inches, names), f"{description}: {titles}")
        pictures.append(Markup('<div class="half">{}</div>').format(image) if len(some) < in_picture else image)
    points = {series.name for panel in panels for series in panel.series if series.points}
    return _legend(names, points) + Markup('<div class="panels">{}</div>').format(Markup("").join(pictures))


def cloud_pictures(clouds: Sequence[Cloud]) -> Markup:
    """Some clouds side by side, each with its own legend."""
    images = Markup("").join(svg_image(draw_cloud(cloud), cloud.title) for cloud in clouds)
    return Markup('<div class="panels clouds">{}</div>').format(images)


def _legend(names: Sequence[str], points: Set[str]) -> Markup:
    """The lines, or of `points` the marks, with their names; nothing where there is one, which the caption names."""
    if len(names) < 2:
        return Markup("")
    entries = []
    for number, name in enumerate(names):
        colour, dashes = line_look(number)
        line = Markup('<line x1="0" y1="4" x2="30" y2="4" stroke="{}" stroke-width="2" stroke-dasharray="{}"></line>')
        if name in points:
            line = Markup('<circle cx="15" cy="4" r="3" fill="{}"></circle>')
        entries.append(
            Markup('<span><svg viewBox="0 0 30 8" aria-hidden="true">{}</svg>{}</span>').format(
                line.format(colour, dashes), name
            )
        )
    return Markup('<div class="legend">{}</div>').format(Markup("").join(entries))
