"""Small drawings as SVG text: the same bytes on every machine."""

from __future__ import annotations

from xml.sax.saxutils import escape

FONT = "font-family='Helvetica, Arial, sans-serif'"
INK, GREY, PALE, BLUE, ORANGE, GREEN = "#1f2933", "#8a94a0", "#eef1f4", "#2b6cb0", "#c05621", "#2f855a"


def text(
    x: float, y: float, content: str, size: int = 13, color: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    weight = " font-weight='bold'" if bold else ""
    return (
        f"<text x='{x:g}' y='{y:g}' font-size='{size}' fill='{color}' text-anchor='{anchor}'{weight} {FONT}>"
        f"{escape(content)}</text>"
    )


def box(
    x: float, y: float, width: float, height: float, fill: str, stroke: str = "none", stroke_width: float = 1
) -> str:
    return (
        f"<rect x='{x:g}' y='{y:g}' width='{width:g}' height='{height:g}' rx='4' fill='{fill}' stroke='{stroke}' "
        f"stroke-width='{stroke_width:g}'/>"
    )


def line(x1: float, y1: float, x2: float, y2: float, color: str, width: float = 1.5, dashes: str = "") -> str:
    dash = f" stroke-dasharray='{dashes}'" if dashes else ""
    ends = f"x1='{x1:.1f}' y1='{y1:.1f}' x2='{x2:.1f}' y2='{y2:.1f}'"
    return f"<line {ends} stroke='{color}' stroke-width='{width:g}'{dash}/>"


def circle(x: float, y: float, radius: float, fill: str) -> str:
    return f"<circle cx='{x:.1f}' cy='{y:.1f}' r='{radius:g}' fill='{fill}'/>"


def document(width: int, height: int, title: str, parts: list[str]) -> str:
    """On white, so that it can be read on a dark page too."""
    size = f"viewBox='0 0 {width} {height}' width='{width}' height='{height}'"
    return "\n".join(
        [
            f"<svg xmlns='http://www.w3.org/2000/svg' {size} role='img'>",
            f"<title>{escape(title)}</title>",
            f"<rect width='{width}' height='{height}' fill='#ffffff'/>",
            *parts,
            "</svg>\n",
        ]
    )
