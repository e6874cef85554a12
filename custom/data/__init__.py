# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Files and formats: data lists, slices, scans and the synthetic phantom. Imports no network."""

from custom.data.cases import CaseDataset
from custom.data.cohort import CohortLoader
from custom.data.content import ContentHasher, transform_key
from custom.data.datalist import assign_folds, load_cases, read_datalist, write_datalist
from custom.data.dicom import find_studies
from custom.data.dicom_series import choose_series, read_series
from custom.data.dicom_writer import write_dicom_series
from custom.data.files import atomic_path, write_json, write_nifti
from custom.data.lidc_prepare import prepare_lidc
from custom.data.multiscale import MultiScaleBatch
from custom.data.phantom import make_phantom
from custom.data.pictures import list_pictures
from custom.data.plain_slices import prepare_slices
from custom.data.scans import list_scans, read_scan
from custom.data.slices import EpochSampler, SliceDataset

__all__ = [
    "CaseDataset",
    "CohortLoader",
    "ContentHasher",
    "EpochSampler",
    "MultiScaleBatch",
    "SliceDataset",
    "assign_folds",
    "atomic_path",
    "choose_series",
    "find_studies",
    "list_pictures",
    "list_scans",
    "load_cases",
    "make_phantom",
    "prepare_lidc",
    "prepare_slices",
    "read_datalist",
    "read_scan",
    "read_series",
    "transform_key",
    "write_datalist",
    "write_dicom_series",
    "write_json",
    "write_nifti",
]
