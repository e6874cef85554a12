# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Folders of plain 8-bit slices and masks, turned upright and put on a data list."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError
from skimage.transform import resize
from tqdm import tqdm

from custom.console import CohortError, bar_interval
from custom.data.datalist import assign_folds, write_datalist
from custom.data.files import atomic_path
from custom.data.slice_pose import SIDEWAYS_ORIENTATIONS, SIDEWAYS_WARNING, lie_sideways, measure_pose

__all__ = [
    "ORIENTATIONS",
    "SAME_PATIENT_CORRELATION",
    "SUFFIXES",
    "group_similar",
    "prepare_slices",
    "read_picture",
    "thumbnails",
    "turn",
    "turn_back",
]

logger = logging.getLogger(__name__)

ORIENTATIONS = ("upright", "transposed", "rotated-90", "rotated-180", "rotated-270")
"""How stored slices lie; the numbers are counter-clockwise degrees that make them upright."""

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff")
SAME_PATIENT_CORRELATION = 0.9
"""Correlation of :func:`thumbnails` from which two slices count as one patient's."""


def turn(pixels: np.ndarray, orientation: str) -> np.ndarray:
    """Make a stored slice upright: rows grow to posterior, columns to the patient's left.

    Args:
        pixels: (H, W).
        orientation: one of :data:`ORIENTATIONS`, how the slice is stored.

    Raises:
        ValueError: When the orientation is unknown.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"unknown orientation '{orientation}'; choose from {', '.join(ORIENTATIONS)}")
    if orientation == "transposed":
        return pixels.T
    return np.rot90(pixels, ORIENTATIONS.index(orientation) - 1 if orientation != "upright" else 0)


def turn_back(pixels: np.ndarray, orientation: str) -> np.ndarray:
    """The inverse of :func:`turn`: an upright result in the orientation the slice is stored in.

    Args:
        pixels: (H, W), upright.
        orientation: one of :data:`ORIENTATIONS`.

    Raises:
        ValueError: When the orientation is unknown.
    """
    if orientation in ("rotated-90", "rotated-270"):
        orientation = "rotated-270" if orientation == "rotated-90" else "rotated-90"
    return turn(pixels, orientation)


def read_picture(path: Path) -> np.ndarray:
    """Grey values of an 8-bit picture, (H, W) uint8.

    Args:
        path: PNG, JPG or any other format that Pillow reads; colours become grey.

    Raises:
        FileNotFoundError: When there is no such file.
        ValueError: When it cannot be read, or has more than 8 bits.
    """
    try:
        with Image.open(path) as picture:
            if picture.mode not in ("L", "RGB", "RGBA", "P", "1"):
                raise ValueError(f"{path} is a picture of mode {picture.mode}; 8-bit grey values are needed")
            return np.asarray(picture.convert("L"))
    except (UnidentifiedImageError, OSError) as error:
        if isinstance(error, FileNotFoundError):
            raise
        raise ValueError(f"{path} cannot be read as a picture: {error}") from None


def _read_pair(image_file: Path, mask_file: Path) -> tuple[np.ndarray, np.ndarray]:
    image, mask = read_picture(image_file), read_picture(mask_file)
    if image.shape != mask.shape:
        raise ValueError(f"{image_file} has {image.shape} pixels and its mask {mask.shape}; they must agree")
    return image, mask


def _by_stem(folder: Path) -> dict[str, Path]:
    if not folder.is_dir():
        raise FileNotFoundError(f"folder {folder} not found")
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in SUFFIXES and not path.name.startswith("."):
            if path.stem in found:
                raise ValueError(
                    f"{found[path.stem]} and {path} have the same name; which one belongs to '{path.stem}'?"
                )
            found[path.stem] = path
    if not found:
        raise FileNotFoundError(f"no pictures ({', '.join(SUFFIXES)}) in {folder}")
    return found


def _natural(name: str) -> tuple:
    return tuple(int(part) if part.isdigit() else part for part in _split_digits(name))


def _split_digits(name: str) -> list[str]:
    parts, current = [], ""
    for character in name:
        if current and character.isdigit() != current[-1].isdigit():
            parts.append(current)
            current = ""
        current += character
    return ["", *parts, current] if not name[:1].isdigit() else [*parts, current]


def group_similar(pictures: Iterable[np.ndarray], threshold: float = SAME_PATIENT_CORRELATION) -> list[int]:
    """Group slices that look like the same patient's, so that they can be kept in one fold.

    Slices are compared at 32x32 by the correlation of their grey values; groups are the connected
    components of "correlates at least as much as ``threshold``".

    Args:
        pictures: slices (H, W), of which only one at a time is held.
        threshold: correlation from which two slices count as one patient's.

    Returns:
        For each slice the position of the first of its group.
    """
    small = thumbnails(pictures)
    alike = small @ small.T >= threshold
    group = list(range(len(small)))
    for first in range(len(small)):
        for second in np.flatnonzero(alike[first, :first]):
            old, new = max(group[first], group[second]), min(group[first], group[second])
            group = [new if g == old else g for g in group]
    return group


def thumbnails(pictures: Iterable[np.ndarray]) -> np.ndarray:
    """Slices at 32x32 with mean 0 and norm 1: their products are the correlations of their grey values.

    Args:
        pictures: slices (H, W), of which only one at a time is held.

    Returns:
        (N, 1024).
    """
    small = [resize(p.astype(float), (32, 32), anti_aliasing=True).ravel() for p in pictures]
    flat = np.asarray(small).reshape(-1, 32 * 32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / (np.linalg.norm(flat, axis=1, keepdims=True) + 1e-12)


def prepare_slices(
    images: str | os.PathLike,
    masks: str | os.PathLike,
    output_dir: str | os.PathLike,
    orientation: str = "upright",
    n_folds: int = 5,
    seed: int = 0,
    name: str = "plain slices",
    description: str = "",
) -> Path:
    """Turn slices and masks upright, write them as PNG and put them on a data list.

    Images and masks are paired by file name, never by their order. A mask is foreground where it is not
    zero and is written as 0/255. Each slice counts as a patient of its own, except slices that look alike
    (the same slice twice, neighbours): they share a patient and so a fold. Slices that seem to lie on their
    side, with the orientation that is given, are warned of.

    Args:
        images: folder of 8-bit slices.
        masks: folder of masks with the images' names.
        output_dir: gets ``images/``, ``masks/`` and ``datalist.json``.
        orientation: how the slices are stored, one of :data:`ORIENTATIONS`; it is recorded in the list as
            ``stored_orientation``, so that :func:`turn_back` can return results to it.
        n_folds: number of folds.
        seed: seed of the folds.
        name: name of the data set.
        description: where it comes from, its licence.

    Returns:
        The data list.

    Raises:
        FileNotFoundError: When a folder, or the mask of an image, is missing.
        CohortError: When pictures cannot be read, or differ in size from their masks; the others are written
            and on the list.
    """
    if orientation not in ORIENTATIONS:
        raise ValueError(f"unknown orientation '{orientation}'; choose from {', '.join(ORIENTATIONS)}")
    image_files, mask_files = _by_stem(Path(images)), _by_stem(Path(masks))
    missing = sorted(set(image_files) - set(mask_files), key=_natural)
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} images have no mask in {masks}, the first is {image_files[missing[0]]}"
        )
    stems = sorted(image_files, key=_natural)
    output = Path(output_dir)
    done: list[str] = []
    failures: list[dict[str, str]] = []
    poses: list[float | None] = []

    def turned() -> Iterator[np.ndarray]:
        for stem in tqdm(stems, desc="slices", unit="slice", dynamic_ncols=True, mininterval=bar_interval()):
            try:
                image, mask = _read_pair(image_files[stem], mask_files[stem])
            except ValueError as error:
                failures.append({"name": stem, "reason": str(error)})
                continue
            for folder, pixels in (
                ("images", image),
                ("masks", np.where(mask > 0, 255, 0).astype(np.uint8)),
            ):
                with atomic_path(output / folder / f"{stem}.png") as temporary:
                    upright = Image.fromarray(np.ascontiguousarray(turn(pixels, orientation)))
                    upright.save(temporary, format="PNG")
            done.append(stem)
            poses.append(measure_pose(np.ascontiguousarray(turn(image, orientation))))
            yield image

    groups = group_similar(turned())
    failed = CohortError(failures, len(stems), "slices")
    if not done:
        raise failed
    if lie_sideways(poses):
        logger.warning(f"{SIDEWAYS_WARNING}: --orientation {' or '.join(SIDEWAYS_ORIENTATIONS)}")
    patients = [f"slice_{done[g]}" for g in groups]
    try:
        folds = assign_folds(patients, n_folds, seed)
    except ValueError as error:  # too few are left, perhaps because the others failed
        raise (ValueError(f"{error}; {failed}") if failures else error) from None
    entries = [
        {"image": f"images/{s}.png", "label": f"masks/{s}.png", "patient_id": p, "fold": f}
        for s, p, f in zip(done, patients, folds, strict=True)
    ]
    datalist = output / "datalist.json"
    write_datalist(
        datalist,
        name,
        description,
        protocol="each slice is taken as its own patient; slices that look alike share one",
        stored_orientation=orientation,
        training=entries,
    )
    if failures:
        raise failed
    return datalist
