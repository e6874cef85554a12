# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Pictures and curves as inline SVG: sharp on a screen and on paper, and read aloud by their label."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from custom.reporting.picture_codes import data_uri, encode_image, encode_outline, encode_overlay
from custom.reporting.pictures import Plane
from custom.reporting.wording import escape, format_ml

__all__ = ["CurvePoint", "draw_bands", "draw_curve", "draw_picture", "draw_strip"]

_SCALE_MM = 50
_SERIES = {"total": "both lungs", "right": "right", "left": "left"}


@dataclass(frozen=True)
class CurvePoint:
    """One study in a curve.

    Args:
        days: since the first study.
        label: its date.
        values: by side; None where unknown.
        comparable: whether the step from the study before is one between like scans.
    """

    days: float
    label: str
    values: Mapping[str, float | None]
    comparable: bool = True


def draw_picture(
    plane: Plane, label: str, lines: Sequence[str] = (), frame_mm: tuple[float, float] | None = None
) -> str:
    """A picture in true proportions with masks that can be switched off, letters and a scale of 5 cm.

    Args:
        plane: what to show.
        label: for those who do not see it.
        lines: printed on it, the first one larger.
        frame_mm: width and height of the frame, in the middle of which the picture lies; None: its own.
    """
    width, height = frame_mm or (plane.width_mm, plane.height_mm)
    x, y = (width - plane.width_mm) / 2, (height - plane.height_mm) / 2
    place = (
        f'x="{x:.2f}" y="{y:.2f}" width="{plane.width_mm:.2f}" height="{plane.height_mm:.2f}" '
        'preserveAspectRatio="none"'
    )
    layers = (
        ("scan", encode_image(plane.image)),
        ("lungs", encode_outline(plane.lungs)),
        ("mask", encode_overlay(plane.opacity)),
    )
    size = 0.05 * height
    parts = [f'<rect width="{width:.2f}" height="{height:.2f}" class="ground"/>']
    parts += [f'<image class="{kind}" {place} href="{data_uri(code)}"/>' for kind, code in layers if code]
    left, right, top, bottom = plane.letters
    for letter, at_x, at_y, anchor in (
        (left, 0.35 * size, height / 2, "start"),
        (right, width - 0.35 * size, height / 2, "end"),
        (top if not lines else "", width / 2, 1.1 * size, "middle"),
        (bottom, width / 2, height - 0.5 * size, "middle"),
    ):
        if letter:
            parts.append(_text(letter, at_x, at_y, size, anchor, "letter"))
    for number, line in enumerate(lines):
        parts.append(
            _text(line, 0.5 * size, (1.3 + 1.35 * number) * size * 1.12, size * 1.12, "start", "stamp")
        )
    if width > 2.5 * _SCALE_MM:
        parts.append(_scale_bar(width, height, size))
    return (
        f'<svg class="picture" viewBox="0 0 {width:.2f} {height:.2f}" role="img" '
        f'aria-label="{escape(label)}">{"".join(parts)}</svg>'
    )


def _text(text: str, x: float, y: float, size: float, anchor: str, kind: str) -> str:
    return (
        f'<text class="{kind}" x="{x:.2f}" y="{y:.2f}" font-size="{size:.2f}" '
        f'text-anchor="{anchor}">{escape(text)}</text>'
    )


def _scale_bar(width: float, height: float, size: float) -> str:
    x, y = width - 0.6 * size, height - 0.7 * size
    line = f'd="M{x - _SCALE_MM:.2f} {y:.2f}h{_SCALE_MM}"/>'
    return f'<path class="bar under" {line}<path class="bar" {line}' + _text(
        "5 cm", x, y - 0.4 * size, 0.8 * size, "end", "letter"
    )


def draw_strip(values: Sequence[float]) -> str:
    """One bar for each slice, from the head down, as long as there is opacity on it.

    Args:
        values: mL of opacity on each slice.
    """
    most = max([*values, 1e-9])
    bars = "".join(
        f'<rect y="{n + 0.05:.2f}" width="{max(100 * value / most, 1.5):.1f}" height="0.9"/>'
        for n, value in enumerate(values)
        if value > 0
    )
    return f'<svg viewBox="0 0 100 {len(values)}" preserveAspectRatio="none" aria-hidden="true">{bars}</svg>'


def draw_bands(value: float, bounds: Sequence[float], top: float, label: str) -> str:
    """A value on a scale that is divided into bands.

    Args:
        value: to mark.
        bounds: where one band ends and the next begins.
        top: end of the scale, which starts at 0.
        label: for those who do not see it.
    """
    edges = [0.0, *bounds, top]
    bands = "".join(
        f'<rect class="band band{n + 1}" x="{200 * low / top:.2f}" y="7" height="5" '
        f'width="{200 * (high - low) / top - 0.6:.2f}"/>'
        for n, (low, high) in enumerate(zip(edges, edges[1:], strict=False))
    )
    at = 200 * min(max(value / top, 0), 1)
    marks = "".join(
        f'<text x="{200 * edge / top:.1f}" y="20" text-anchor="'
        f'{"start" if edge == 0 else "end" if edge == top else "middle"}">{edge:g}</text>'
        for edge in edges
    )
    return (
        f'<svg class="bands" viewBox="-4 0 208 22" role="img" aria-label="{escape(label)}">{bands}'
        f'<path class="marker" d="M{at:.2f} 6.4l-3.2 -5.4h6.4z"/>{marks}</svg>'
    )


def draw_curve(points: Sequence[CurvePoint], unit: str, label: str) -> str:
    """Values over time, days to scale; total as a line with numbers, the lungs as thinner lines.

    Args:
        points: in the order of time.
        unit: of the values.
        label: heading.
    """
    width, height, left, right, top, bottom = 520.0, 244.0, 46.0, 74.0, 42.0, 40.0
    known = [v for point in points for v in point.values.values() if v is not None]
    ceiling, step = _ticks(max([*known, 0.0]))
    span = max(points[-1].days - points[0].days, 1e-9)

    def at(days: float, value: float) -> tuple[float, float]:
        share = 0.5 if len(points) == 1 or span <= 1e-9 else (days - points[0].days) / span
        return left + 20 + share * (width - left - right - 20), top + (1 - value / ceiling) * (
            height - top - bottom
        )

    parts = [_text(f"{label} ({unit})", 0, 14, 13, "start", "heading")]
    for n in range(round(ceiling / step) + 1):
        y = at(0, n * step)[1]
        parts.append(f'<path class="grid" d="M{left:.1f} {y:.1f}H{width - right:.1f}"/>')
        parts.append(_text(f"{n * step:g}", left - 8, y + 4, 11, "end", "tick"))
    last_label = -math.inf
    for point in points:
        x = at(point.days, 0)[0]
        parts.append(f'<path class="grid" d="M{x:.1f} {height - bottom:.1f}v5"/>')
        if x - last_label >= 68:  # dates that are too close would run into each other
            parts.append(_text(point.label, x, height - bottom + 19, 11, "middle", "tick"))
            last_label = x
        if point.values.get("total") is None:
            parts.append(_text("no number", x, height - bottom - 7, 10, "middle", "tick"))
    ends: list[tuple[float, str]] = []
    for side in ("left", "right", "total"):
        shown = [p for p in points if p.values.get(side) is not None]
        places = [at(p.days, float(p.values[side] or 0)) for p in shown]
        for before, after, point in zip(places, places[1:], shown[1:], strict=False):
            kind = "" if point.comparable else " loose"
            parts.append(
                f'<path class="line {side}{kind}" d="M{before[0]:.1f} {before[1]:.1f}'
                f'L{after[0]:.1f} {after[1]:.1f}"/>'
            )
        parts += [_marker(side, x, y) for x, y in places]
        if side == "total":
            for point, (x, y) in zip(shown, places, strict=True):
                above = min(at(point.days, v)[1] for v in point.values.values() if v is not None)
                said = format_ml(float(point.values[side] or 0))
                parts.append(_text(said, x, min(above, y) - 9, 12, "middle", "value"))
        if places:
            ends.append((places[-1][1], side))
    x = width - right + 10
    for y, side in _spread(ends, 14.0, height - bottom):
        parts.append(_text(_SERIES[side], x, y + 4, 11, "start", f"name {side}"))
    told = "; ".join(
        f"{p.label}: "
        + (format_ml(v) + f" {unit}" if (v := p.values.get("total")) is not None else "no number")
        for p in points
    )
    return (
        f'<svg class="curve" viewBox="0 0 {width:g} {height:g}" role="img" '
        f'aria-label="{escape(f"{label}. {told}")}">{"".join(parts)}</svg>'
    )


def _marker(side: str, x: float, y: float) -> str:
    shapes = {
        "total": f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4"',
        "right": f'<rect x="{x - 3:.1f}" y="{y - 3:.1f}" width="6" height="6"',
        "left": f'<path d="M{x:.1f} {y - 4:.1f}l4 7h-8z"',
    }
    return f'{shapes[side]} class="point {side}"/>'


def _spread(ends: list[tuple[float, str]], gap: float, lowest: float) -> list[tuple[float, str]]:
    """Move names at the ends of lines apart, so that each can be read."""
    placed: list[tuple[float, str]] = []
    for y, side in sorted(ends):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, side))
    over = max(placed[-1][0] - lowest, 0) if placed else 0
    return [(y - over, side) for y, side in placed]


def _ticks(most: float) -> tuple[float, float]:
    """End of an axis from 0 and the distance of its ticks."""
    rough = max(most, 1e-9) / 4
    power = 10.0 ** math.floor(math.log10(rough)) if most > 0 else 0.25
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough)
    return max(math.ceil(most / step - 1e-9), 1) * step, step
