# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The pictures of a study's page: planes, the scroll through slices, attention maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from matplotlib import colormaps
from PIL import Image

from custom.reporting.figures import AttentionView, shown_voxel
from custom.reporting.page_frame import colour_key, layer_tools, say_window, section
from custom.reporting.picture_codes import data_uri, encode_image
from custom.reporting.pictures import MARGIN_MM, StudyPictures
from custom.reporting.svg import draw_picture, draw_strip
from custom.reporting.wording import escape

__all__ = ["show_attention", "show_planes", "show_slices"]

_ATTENTION_SIDE = 320  # pixels; the maps have fewer
_NO_SCRIPT = '<noscript><p class="note">To scroll through slices, allow JavaScript.</p></noscript>'


def show_planes(pictures: StudyPictures) -> str:
    """The three planes through most opacity.

    Args:
        pictures: of the study.
    """
    rows, columns, _ = shown_voxel(pictures.opacity, pictures.lungs)
    number = pictures.slices.index(pictures.busiest)
    named = {
        f"axial, slice {pictures.slices[number] + 1} of {pictures.total} from below": pictures.axial(number)
    }
    if len(pictures.slices) > 1:
        named |= {"coronal": pictures.coronal(rows), "sagittal": pictures.sagittal(columns)}
    figures = []
    for name, plane in named.items():
        shape = plane.width_mm / plane.height_mm
        picture = f"{draw_picture(plane, name)}<figcaption>{name}</figcaption>"
        figures.append(f'<figure style="flex: {shape:.3f} 1 0">{picture}</figure>')
    planes = f'<div class="planes" style="max-width: {_widest(named)}">{"".join(figures)}</div>'
    found = (
        "The planes with most opacity" if pictures.opacity.any() else "The middle planes: there is no opacity"
    )
    return section(
        "overview",
        "Overview",
        f"{layer_tools(colour_key())}{planes}",
        f"{found}. Lung window, {say_window()}.",
    )


def _widest(planes: Mapping[str, Any]) -> str:
    return "100%" if len(planes) > 1 else "640px"


def show_slices(pictures: StudyPictures) -> str:
    """The scroll through the slices; "" where there is but one.

    Args:
        pictures: of the study.
    """
    if len(pictures.slices) < 2:
        return ""
    rows, columns = pictures.image.shape[:2]
    levels = [sum(ml[k] for ml in pictures.levels.opacity_ml.values()) for k in reversed(pictures.slices)]
    go = '<button type="button" data-go="most">Most opacity</button>' if any(levels) else ""
    step = pictures.slices[1] - pictures.slices[0]
    first, last = pictures.slices[0] + 1, pictures.slices[-1] + 1
    which = f"Slices {first} to {last} of {pictures.total}, counted from below"
    which += "" if step == 1 else f", every {_ordinal(step)}"
    cut = bool((pictures.lungs == 1).any() and (pictures.lungs == 2).any())
    said = (
        f"{which}{': those that show lung or opacity' if cut else ''}. Turn the wheel over the picture, "
        "press ← →, drag, or click on the bars, which show how much opacity each slice holds."
    )
    reduced = (
        f"Slices are shown with {columns} × {rows} pixels of {pictures.pixel_mm:.2f} mm, 256 grey levels of "
        f"the lung window, compressed with loss{_cut_said() if cut else ''}; masks have the same pixels. The "
        "numbers come from the scan and the masks as they are."
    )
    stage = (
        f'<div class="stage" tabindex="0" style="aspect-ratio: {columns} / {rows}">'
        '<img class="scan" alt="slice"><img class="lungs" alt="" hidden><img class="mask" alt="" hidden>'
        '<span class="where"></span><span class="side-right">R</span><span class="side-left">L</span></div>'
    )
    strip = (
        '<div class="strip" role="slider" tabindex="0" aria-label="slice" aria-orientation="vertical" '
        f'aria-valuemin="0" aria-valuemax="{len(levels) - 1}">{draw_strip(levels)}<div class="cursor"></div>'
        '<span class="head">H</span><span class="feet">F</span></div>'
    )
    return section(
        "slices",
        "Slices",
        f"{layer_tools(go + colour_key())}{_NO_SCRIPT}"
        f'<div class="viewer">{stage}{strip}</div><div class="sheet"></div><p class="note">{reduced}</p>',
        f'<span class="screen">{said}</span>',
    )


def _cut_said() -> str:
    return f", cut to the lungs and {MARGIN_MM:g} mm around"


def _ordinal(number: int) -> str:
    return {2: "second", 3: "third"}.get(number, f"{number}th")


def show_attention(view: AttentionView | None) -> str:
    """Where the network looked; "" where it has no attention maps.

    Args:
        view: the slice as the network saw it and its maps.
    """
    if view is None or not view.maps:
        return ""
    ramp = colormaps["inferno"]
    height = _ATTENTION_SIDE
    width = max(round(height * view.aspect), 1)
    slice_ = Image.fromarray(np.clip(np.rint(view.image * 255), 0, 255).astype(np.uint8)).resize(
        (width, height)
    )
    grey = np.asarray(slice_, dtype=float)[..., None]
    figures = [_figure(np.repeat(grey, 3, axis=2), "the slice as the network sees it")]
    for name, values in view.maps.items():
        smooth = Image.fromarray(values.astype(np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        colour = ramp(np.clip(np.asarray(smooth), 0, 1))[..., :3] * 255
        label = f"{name}: {values.min():.2f} to {values.max():.2f}"
        figures.append(_figure(0.45 * grey + 0.55 * colour, label))
    stops = ", ".join(
        f"rgb({' '.join(str(round(255 * part)) for part in ramp(n / 6)[:3])}) {100 * n / 6:.0f}%"
        for n in range(7)
    )
    ramp_ = f"background: linear-gradient(90deg, {stops})"
    scale = f'<p class="note">0<span class="ramp" style="{ramp_}"></span>1</p>'
    return section(
        "attention",
        "Attention maps",
        f'<div class="maps">{"".join(figures)}</div>{scale}',
        "What the network's attention gates let through on the axial slice of the overview. They show where "
        "the network looked, not why it decided as it did.",
    )


def _figure(pixels: np.ndarray, label: str) -> str:
    code = data_uri(encode_image(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)))
    return (
        f'<figure><img src="{code}" alt="{escape(label)}"><figcaption>{escape(label)}</figcaption></figure>'
    )
