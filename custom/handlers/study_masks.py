# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What a batch holds of a study: its origin, and masks that may or may not lie on its grid."""

from __future__ import annotations

from typing import Any

import numpy as np

from custom.transforms.load import study_info

__all__ = ["as_volume", "describe_scan", "given_mask", "off_grid"]

AFFINE_TOLERANCE_MM = 1e-2


def describe_scan(scan: Any) -> dict[str, Any]:
    """What :class:`custom.data.Scan` says of the scan that an image was loaded from; {} where it was not.

    Args:
        scan: image of a batch.
    """
    return study_info(scan) if "study" in scan.meta else {}


def as_volume(mask: Any) -> Any:
    """A mask or scan as (H, W, D), also a plain slice; None stays None.

    Args:
        mask: (H, W), (H, W, D) or None.
    """
    return mask if mask is None or mask.ndim == 3 else mask[..., None]


def given_mask(study: dict[str, Any], key: str, what: str) -> tuple[np.ndarray | None, str]:
    """A mask of the batch on the scan's grid, or None and why there is none that can be used.

    Args:
        study: item of the batch, with ``scan``.
        key: of the mask.
        what: it is, for the reason.
    """
    if key not in study:
        return None, f"no {what} was given" if key == "lobes" else f"no {what} was made"
    if reason := off_grid(study["scan"], study[key], what):
        return None, reason
    return np.asarray(study[key].cpu())[0].astype(np.uint8), ""


def off_grid(scan: Any, mask: Any, what: str) -> str:
    """Why a mask does not lie on the scan's grid, or "".

    Args:
        scan: (1, H, W, D) with an affine.
        mask: the same.
        what: it is, for the reason.
    """
    if scan.shape[1:] != mask.shape[1:]:
        shapes = f"{tuple(mask.shape[1:])} voxels and the scan {tuple(scan.shape[1:])}"
        return f"the {what} is not one of this scan: it has {shapes}"
    there, here = (np.asarray(image.affine.cpu(), dtype=float) for image in (scan, mask))
    if not np.allclose(there, here, atol=AFFINE_TOLERANCE_MM):
        return f"the {what} is not one of this scan: they lie in different places, their affines differ"
    return ""
