"""Line charts as SVG: one panel for each shape, one line for each arm, one legend."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

# Told apart without colour too: every line has its own marker, the compared system is heavier.
STYLES = {
    "A": ("#8c8c8c", "square"),
    "B": ("#b07d2b", "triangle"),
    "C": ("#0072b2", "circle"),
    "D": ("#009e73", "diamond"),
    "E": ("#cc79a7", "down"),
    "F": ("#56b4e9", "cross"),
    "G": ("#d55e00", "circle"),
    "H": ("#332288", "plus"),
    "I": ("#d55e00", "triangle"),
}
WIDTH, PANEL, GAP = 960, (400, 260), (70, 78)
ALONE = (820, 300)  # of a picture with one panel
LEFT, LEGEND_TOP, TITLE_HEIGHT = 62, 46, 32
LEGEND_ROW, LEGEND_COLUMN, LEGEND_COLUMNS = 20, 220, 4
TICKS = 5
Size = tuple[int, int]  # width and height of a panel
FONT = "font-family='Helvetica, Arial, DejaVu Sans, sans-serif'"


@dataclass(frozen=True, slots=True)
class Axis:
    """What x, from 0 to 1, stands for: so much of `widest`, in this unit."""

    label: str = "load, of what arm C sustains"
    widest: float = 100.0
    unit: str = " %"


@dataclass(frozen=True, slots=True)
class Panel:
    """`lines` by arm: (x, y) pairs, x from 0 to 1. Values above `highest` are cut off there."""

    title: str
    lines: Mapping[str, Sequence[tuple[float, float]]]
    highest: float
    across: Axis = Axis()


def draw(title: str, titles: Mapping[str, str], panels: Sequence[Panel], y_label: str) -> str:
    """The whole picture; `titles` names the arms, in the legend's order."""
    size = PANEL if len(panels) > 1 else ALONE
    top = LEGEND_TOP + math.ceil(len(titles) / LEGEND_COLUMNS) * LEGEND_ROW + TITLE_HEIGHT
    height = top + math.ceil(len(panels) / 2) * (size[1] + GAP[1])
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' width='{WIDTH}' height='{height}' "
        f"viewBox='0 0 {WIDTH} {height}' {FONT} font-size='12'>",
        f"<rect width='{WIDTH}' height='{height}' fill='#ffffff'/>",
        _text(LEFT, 24, title, "start", 15, "#111111", bold=True),
        *_legend(titles),
    ]
    for number, panel in enumerate(panels):
        x = LEFT + (number % 2) * (size[0] + GAP[0])
        y = top + (number // 2) * (size[1] + GAP[1])
        clip = f"panel{number}"
        parts += [
            f"<clipPath id='{clip}'><rect x='{x}' y='{y - 6}' width='{size[0] + 6}' "
            f"height='{size[1] + 12}'/></clipPath>",
            *_axes(x, y, size, panel, y_label),
            f"<g clip-path='url(#{clip})'>",
            *(part for arm in titles for part in _line(x, y, size, arm, panel)),
            "</g>",
        ]
    return "\n".join([*parts, "</svg>", ""])


def ceiling_for(values: Sequence[float]) -> float:
    """A round number above all values, of which a TICKS-th part is round as well."""
    wanted = max(values) / TICKS
    power = 10.0 ** math.floor(math.log10(wanted))
    step = (
        next(factor for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= wanted)
        * power
    )
    return step * TICKS


def _legend(titles: Mapping[str, str]) -> list[str]:
    parts = []
    for number, (arm, title) in enumerate(titles.items()):
        x = LEFT + (number % LEGEND_COLUMNS) * LEGEND_COLUMN
        y = LEGEND_TOP + (number // LEGEND_COLUMNS) * LEGEND_ROW
        parts += [_stroke([(x, y), (x + 26, y)], arm), _marker(x + 13, y, arm)]
        parts.append(_text(x + 34, y + 4, f"{arm}: {title}", "start"))
    return parts


def _axes(x: float, y: float, size: Size, panel: Panel, y_label: str) -> list[str]:
    width, height = size
    parts = [_text(x, y - 12, panel.title, "start", 13, "#111111", bold=True)]
    for tick in range(TICKS + 1):
        at = y + height - height * tick / TICKS
        parts.append(_rule(x, at, x + width, at, "#e4e4e4" if tick else "#555555"))
        parts.append(_text(x - 7, at + 4, f"{panel.highest * tick / TICKS:g}", "end"))
        across = x + width * tick / TICKS
        label = f"{panel.across.widest * tick / TICKS:.3g}{panel.across.unit}"
        parts.append(_rule(across, y + height, across, y + height + 4, "#555555"))
        parts.append(_text(across, y + height + 18, label, "middle"))
    middle = y + height / 2
    parts.append(_text(x + width / 2, y + height + 36, panel.across.label, "middle"))
    parts.append(
        f"<g transform='translate({x - 46} {middle}) rotate(-90)'>"
        f"{_text(0, 0, y_label, 'middle')}</g>"
    )
    return parts


def _line(x: float, y: float, size: Size, arm: str, panel: Panel) -> list[str]:
    width, height = size
    # A line may leave through the top, where it is cut, but not by so much that renderers mind.
    places = [
        (x + width * load, y + height * (1 - min(value, 10 * panel.highest) / panel.highest))
        for load, value in panel.lines.get(arm, ())
    ]
    return [_stroke(places, arm), *(_marker(*place, arm) for place in places)] if places else []


def _stroke(places: Sequence[tuple[float, float]], arm: str) -> str:
    points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    width = 3 if arm == "G" else 1.6
    return (
        f"<polyline points='{points}' fill='none' stroke='{STYLES[arm][0]}' "
        f"stroke-width='{width}' stroke-linejoin='round'/>"
    )


def _marker(x: float, y: float, arm: str) -> str:
    colour, shape = STYLES[arm]
    match shape:
        case "circle":
            return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='4' fill='{colour}'/>"
        case "square":
            corners = ((-3.5, -3.5), (3.5, -3.5), (3.5, 3.5), (-3.5, 3.5))
        case "triangle":
            corners = ((0, -4.5), (4.5, 3.5), (-4.5, 3.5), (0, -4.5))
        case "down":
            corners = ((0, 4.5), (4.5, -3.5), (-4.5, -3.5), (0, 4.5))
        case "diamond":
            corners = ((0, -5), (5, 0), (0, 5), (-5, 0))
        case _:
            strokes = "m-4,-4l8,8m-8,0l8,-8" if shape == "cross" else "m-5,0l10,0m-5,-5l0,10"
            return (
                f"<path d='M{x:.1f},{y:.1f}{strokes}' stroke='{colour}' "
                "stroke-width='2' fill='none'/>"
            )
    points = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in corners)
    return f"<polygon points='{points}' fill='{colour}'/>"


def _rule(x1: float, y1: float, x2: float, y2: float, colour: str) -> str:
    return (
        f"<line x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}' "
        f"stroke='{colour}' stroke-width='1'/>"
    )


def _text(
    x: float,
    y: float,
    text: str,
    anchor: str,
    size: int = 12,
    colour: str = "#444444",
    *,
    bold: bool = False,
) -> str:
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:.1f}' y='{y:.1f}' text-anchor='{anchor}' font-size='{size}' "
        f"fill='{colour}'{weight}>{escape(text)}</text>"
    )
