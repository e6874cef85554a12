# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""DICOMweb studies for a MONAI Label server; only its environment can import this.

MONAI Label converts a series with SimpleITK, which takes whatever it is given: with slices missing, doubled
or not in HU. Here the series goes through the project's own reader, and a doubtful one is refused.
"""

from __future__ import annotations

import functools
import logging
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import highdicom
import nibabel as nib
import numpy as np
from dicomweb_client.session_utils import create_session_from_user_pass
from fastapi import HTTPException
from monailabel.config import settings
from monailabel.datastore import dicom as dicom_module
from monailabel.datastore.dicom import DICOMwebClientX, DICOMWebDatastore
from monailabel.datastore.local import LocalDatastore
from monailabel.datastore.utils.convert import nifti_to_dicom_seg
from monailabel.datastore.utils.dicom import dicom_web_download_series
from monailabel.interfaces.datastore import DefaultLabelTag

import custom
from custom.data.files import write_nifti
from custom.data.scans import read_scan
from custom.deployment.segment_codes import complete_label_info

__all__ = ["CheckedDicomDatastore", "read_segmentation", "write_segmentation"]

LPS = np.diag([-1.0, -1.0, 1.0, 1.0])  # from RAS, and back


class CheckedDicomDatastore(DICOMWebDatastore):
    """The CT series of a DICOMweb server, and the segmentations that refer to them.

    Args:
        url: the server.
    """

    def __init__(self, url: str) -> None:
        # It logs all that it knows of a label it stores, the patient's ID included.
        logging.getLogger("monailabel.datastore.local").setLevel(logging.WARNING)
        # The datastore calls this by name when it uploads a label that a person has saved.
        dicom_module.nifti_to_dicom_seg = functools.partial(write_segmentation, by_hand=True)
        user, password = settings.MONAI_LABEL_DICOMWEB_USERNAME, settings.MONAI_LABEL_DICOMWEB_PASSWORD
        client = DICOMwebClientX(
            url=url,
            session=create_session_from_user_pass(user, password) if user and password else None,
            qido_url_prefix=settings.MONAI_LABEL_QIDO_PREFIX,
            wado_url_prefix=settings.MONAI_LABEL_WADO_PREFIX,
            stow_url_prefix=settings.MONAI_LABEL_STOW_PREFIX,
        )
        super().__init__(
            client=client,
            search_filter=settings.MONAI_LABEL_DICOMWEB_SEARCH_FILTER,
            cache_path=settings.MONAI_LABEL_DICOMWEB_CACHE_PATH or None,
            fetch_by_frame=settings.MONAI_LABEL_DICOMWEB_FETCH_BY_FRAME,
        )

    def get_image_uri(self, image_id: str) -> str:
        """The series as a NIfTI file, its voxels in the order of the DICOM pixels: column, row, slice.

        Args:
            image_id: Series Instance UID.

        Raises:
            ValueError: In one line, when the series cannot be trusted.
        """
        folder = self._download(image_id, Path(self._datastore.image_path()))
        file = folder.with_name(f"{folder.name}.nii.gz")
        if not file.is_file():
            scan = read_scan(folder, series_uid=image_id)
            with tempfile.TemporaryDirectory() as temporary:
                written = Path(temporary) / file.name
                write_nifti(written, scan.voxels, scan.affine)
                LocalDatastore.add_image(self, image_id, str(written), self._dicom_info(image_id))
        return str(file)

    def get_label_uri(self, label_id: str, label_tag: str, image_id: str = "") -> str:
        """The label as a NIfTI file; a final one comes from the server's DICOM SEG.

        Args:
            label_id: Series Instance UID of the segmentation, or the image's for a label kept here only.
            label_tag: "final" or another.
            image_id: Series Instance UID of the image.

        Raises:
            ValueError: When the segmentation does not lie on the image's grid.
        """
        if label_tag != DefaultLabelTag.FINAL or not image_id:
            return LocalDatastore.get_label_uri(self, label_id, label_tag)
        labels = Path(self._datastore.label_path(label_tag))
        file = (labels / f"{image_id}.nii.gz").resolve()
        if not file.is_file():
            (segmentation,) = self._download(label_id, labels).iterdir()
            image = self.get_image_uri(image_id)
            grid: Any = nib.load(image)
            with tempfile.TemporaryDirectory() as temporary:
                written = Path(temporary) / file.name
                write_nifti(written, read_segmentation(segmentation, image), grid.affine)
                LocalDatastore.save_label(self, image_id, str(written), label_tag, self._dicom_info(label_id))
        return str(file)

    def _download(self, series_uid: str, folder: Path) -> Path:
        target = (folder / series_uid).resolve()
        if not target.is_dir() or not any(target.iterdir()):
            dicom_web_download_series(None, series_uid, str(target), self._client, self._fetch_by_frame)
        return target


def write_segmentation(
    series_dir: str,
    label: str,
    label_info: Sequence[Mapping[str, Any]] | None,
    file_ext: str = "*",
    use_itk: bool = True,
    by_hand: bool = False,
) -> str:
    """MONAI Label's conversion to DICOM SEG, with the codes of what is segmented.

    Args:
        series_dir: folder of the DICOM series.
        label: the mask, NIfTI or NRRD.
        label_info: what the client says of the segments, see :func:`complete_label_info`.
        file_ext: handed on.
        use_itk: handed on.
        by_hand: whether a person has edited the mask.

    Returns:
        The DICOM file.

    Raises:
        HTTPException: 422 where the mask is empty or a segment's codes are not known, 500 where dcmqi fails.
    """
    values = [int(value) for value in _values(label) if value != 0]
    if not values:
        raise HTTPException(422, "the mask is empty: a DICOM SEG needs at least one segment")
    try:
        info = complete_label_info(label_info, values, f"covid-ct-bundles {custom.__version__}", by_hand)
    except ValueError as error:
        raise HTTPException(422, str(error)) from error
    file = nifti_to_dicom_seg(series_dir, label, info, file_ext, use_itk)
    if not file or not os.path.isfile(file):
        raise HTTPException(500, "dcmqi's itkimage2segimage wrote no DICOM SEG; the server's log says why")
    return str(file)


def _values(label: str) -> np.ndarray:
    from monai.transforms import LoadImage

    return np.unique(np.asarray(LoadImage(image_only=True)(label)))


def read_segmentation(file: str | os.PathLike, image: str | os.PathLike) -> np.ndarray:
    """Read a DICOM SEG onto an image's grid.

    Args:
        file: binary DICOM SEG; all its segments count as opacity, since that is what is trained.
        image: NIfTI file of the series it refers to.

    Returns:
        (I, J, K) mask, 0 and 1.

    Raises:
        ValueError: When it does not lie on the image's grid.
    """
    grid: Any = nib.load(image)
    segmentation = highdicom.seg.segread(file)
    try:
        volume = segmentation.get_volume(
            combine_segments=False, allow_missing_positions=True, rescale_fractional=False
        )
        geometry = highdicom.VolumeGeometry(
            LPS @ grid.affine, grid.shape, coordinate_system=highdicom.CoordinateSystemNames.PATIENT
        )
        volume = volume.match_geometry(geometry, tol=0.01)
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{file} does not lie on the grid of its CT series: {error}") from None
    return np.asarray((volume.array > 0).any(axis=-1), dtype=np.uint8)
