# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Loading a CT scan, DICOM or NIfTI, as MONAI's transforms expect it."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from monai.config import DtypeLike, KeysCollection
from monai.data import ImageReader, MetaTensor
from monai.transforms import LoadImaged
from monai.utils import MetaKeys, SpaceKeys

from custom.data.scans import Scan, read_scan

__all__ = [
    "STUDY_KEY",
    "LoadCTD",
    "LoadCTDict",
    "LoadCTd",
    "describe_origin",
    "format_output_name",
    "study_info",
]

STUDY_KEY = "study"
"""Key in a loaded image's meta data under which the scan's origin is kept."""

logger = logging.getLogger(__name__)


def study_info(image: MetaTensor) -> dict[str, Any]:
    """Return what is known of the scan that an image was loaded from.

    Args:
        image: from :class:`LoadCTd`, or computed from such an image.

    Returns:
        The dictionary that :class:`custom.data.Scan` describes.

    Raises:
        ValueError: When the image was not loaded by :class:`LoadCTd`.
    """
    return _decode(image.meta if isinstance(image, MetaTensor) else {})


def describe_origin(image: Any, key: Hashable) -> str:
    """Name a NIfTI file by its path, a DICOM series by its UID: its files may be named after patients."""
    try:
        study = study_info(image)
    except ValueError:
        return f"'{key!s}'"
    return f"series {study['series_uid']}" if study["source"] == "dicom" else study["files"][0]


def _decode(meta: Mapping[str, Any]) -> dict[str, Any]:
    text = meta.get(STUDY_KEY)
    if not isinstance(text, str):
        raise ValueError(f"the image has no '{STUDY_KEY}' in its meta data; load it with LoadCTd")
    return json.loads(text)


def format_output_name(meta: Mapping[str, Any], saver: Any = None) -> dict[str, Any]:
    """Name output files after the scan, for SaveImaged's ``output_name_formatter``.

    MONAI would take the name of the first file: ``IM0001`` for a DICOM series, or a patient's name.

    Args:
        meta: meta data of an image loaded by :class:`LoadCTd`.
        saver: the transform that saves, unused.

    Raises:
        ValueError: When the image was not loaded by :class:`LoadCTd`.
    """
    return {"subject": _decode(meta)["name"], "idx": None}


class _ScanReader(ImageReader):
    """Presents :func:`custom.data.read_scan` as a reader of MONAI."""

    def __init__(self, series_uid: str | None, compact: bool) -> None:
        super().__init__()
        self.series_uid = series_uid
        self.compact = compact

    def verify_suffix(self, filename: Sequence[str | os.PathLike] | str | os.PathLike) -> bool:
        return True  # DICOM files have any suffix or none

    def read(self, data: Sequence[str | os.PathLike] | str | os.PathLike, **kwargs: Any) -> Scan:
        return read_scan(data, self.series_uid)

    def get_data(self, img: Scan) -> tuple[np.ndarray, dict[str, Any]]:
        meta = {
            MetaKeys.AFFINE: img.affine.copy(),
            MetaKeys.ORIGINAL_AFFINE: img.affine.copy(),
            MetaKeys.SPATIAL_SHAPE: np.array(img.voxels.shape),
            MetaKeys.ORIGINAL_CHANNEL_DIM: float("nan"),  # what MONAI's readers write for "no channel"
            MetaKeys.SPACE: SpaceKeys.RAS,
            # JSON text, since collating a batch breaks lists of unequal length and None, and since a text is
            # not copied with every transform as a list of a thousand files would be.
            STUDY_KEY: json.dumps(img.study),
        }
        return _compact(img.voxels) if self.compact else img.voxels, meta


def _compact(voxels: np.ndarray) -> np.ndarray:
    """Whole numbers as int16, in half the memory; anything else as it is."""
    if voxels.dtype == np.int16:
        return voxels
    limits = np.iinfo(np.int16)
    small = np.empty(voxels.shape, np.int16, order="F" if voxels.flags.f_contiguous else "C")
    # By slices, since what is compared along the way is as large as what is saved.
    for k in range(voxels.shape[-1]):
        values = voxels[..., k]
        if not (values.min() >= limits.min and values.max() <= limits.max):  # nor is NaN
            return voxels
        small[..., k] = values
        if not np.array_equal(small[..., k], values):
            return voxels
    return small


class LoadCTd(LoadImaged):
    """Load CT scans from NIfTI files, DICOM folders or the files of a DICOM series; refuse doubtful ones.

    It takes the place of :class:`monai.transforms.LoadImaged`, which falls back to another reader when a
    given one fails, and so loads a series that has been refused. Here the reader is handed over at call time,
    which has no fall-back, and errors reach the user. Labels in NIfTI are loaded by it as well.

    The image keeps the scan's own grid and affine. Its meta data has MONAI's usual entries and, under
    ``"study"``, where the scan comes from as JSON text, which :func:`study_info` decodes. The entries
    ``name`` and ``series_choice`` of an item of :func:`custom.data.list_scans` are taken over into it.

    Args:
        keys: keys of the paths to load.
        dtype: type of the loaded values.
        ensure_channel_first: add the channel: (1, I, J, K) in place of (I, J, K).
        series_uid: Series Instance UID to load from a DICOM study instead of the axial CT series with the
            most slices.
        compact: where the values are whole numbers within int16, as HU are, load them as such and not as
            ``dtype``: half the memory, which is half a gigabyte for a thousand slices of 512x512.
        allow_missing_keys: do not raise when a key is missing.

    Raises:
        ValueError: When called, in one line, for what cannot be loaded with certainty; see
            :func:`custom.data.read_scan`.
        FileNotFoundError: When called, for a path that does not exist.
    """

    def __init__(
        self,
        keys: KeysCollection,
        dtype: DtypeLike = np.float32,
        ensure_channel_first: bool = False,
        series_uid: str | None = None,
        compact: bool = False,
        allow_missing_keys: bool = False,
    ) -> None:
        # MONAI sets up all its readers, and one of them warns twice about a library that is of no use here.
        chatter = logging.getLogger("monai.data.nvimgcodec_pydicom_plugin")
        silenced, chatter.disabled = chatter.disabled, True
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="NvImgCodec")
                super().__init__(
                    keys,
                    dtype=None if compact else dtype,
                    ensure_channel_first=ensure_channel_first,
                    allow_missing_keys=allow_missing_keys,
                )
        finally:
            chatter.disabled = silenced
        self.reader = _ScanReader(series_uid, compact)

    def __call__(
        self, data: Mapping[Hashable, Any], reader: ImageReader | None = None
    ) -> dict[Hashable, Any]:
        """Load the scans of one item.

        Args:
            data: item with paths under ``keys``.
            reader: another reader, which replaces the one of this class.
        """
        loaded = super().__call__(data, reader=reader or self.reader)
        for key in self.key_iterator(loaded):
            image = loaded[key]
            if isinstance(image, MetaTensor) and STUDY_KEY in image.meta:
                study = study_info(image)
                if isinstance(data.get("name"), str):
                    study["name"] = data["name"]
                if study["source"] == "dicom" and isinstance(data.get("series_choice"), str):
                    study["series_choice"] = data["series_choice"]
                image.meta[STUDY_KEY] = json.dumps(study)
                if study["series_choice"]:
                    logger.info("%s", study["series_choice"])
                for note in study["notes"]:
                    logger.warning("%s: %s", study["name"], note)
        return loaded


LoadCTD = LoadCTDict = LoadCTd
