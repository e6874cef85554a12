# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The table of scans that go wrong, and of odd ones that must not, for every entry point.

Each maker fills an empty folder from a phantom: a NIfTI file ``a.nii.gz``, or a DICOM series in ``dicom``.
"""

from __future__ import annotations

import gzip
import os
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import nibabel as nib
import numpy as np
from pydicom.uid import JPEG2000Lossless, JPEGLSLossless, RLELossless, generate_uid

from custom.data.dicom_writer import write_dicom_series
from custom.data.phantom import Phantom, make_phantom
from tests import dicom_faults, lossless_jpeg

__all__ = ["ODD", "REFUSED", "BadScan", "make_table", "scan_of", "table_phantom"]

AFFINE = np.diag([-5.0, -5.0, 12.0, 1.0])


@dataclass(frozen=True)
class BadScan:
    """A row of the table.

    Args:
        make: fills a folder.
        message: regular expression that the reason must match; "" for odd scans, which must be taken.
    """

    make: Callable[[Path, Phantom], object]
    message: str = ""

    @property
    def name(self) -> str:
        return self.make.__name__

    def __str__(self) -> str:
        return self.name


def table_phantom() -> Phantom:
    """The chest that the table is made from."""
    return make_phantom(shape=(64, 64, 16), spacing=(5.4, 5.4, 17.0), seed=2)


def make_table(folder: Path, phantom: Phantom) -> Path:
    """A folder for each row of the table, in one whose name has spaces and letters that are not ASCII."""
    table = folder / "a table with ä, ß and 肺"
    for row in REFUSED + ODD:
        (table / row.name).mkdir(parents=True)
        row.make(table / row.name, phantom)
    return table


def scan_of(folder: Path) -> Path:
    """What a maker made: the NIfTI file, or the folder of the DICOM series."""
    return folder / "dicom" if (folder / "dicom").is_dir() else folder / "a.nii.gz"


def nifti(path: Path, array: np.ndarray, affine: np.ndarray = AFFINE) -> None:
    nib.save(nib.Nifti1Image(array, affine), path)


def series(folder: Path, phantom: Phantom, name: str = "dicom", **options) -> list[Path]:
    """A series whose UIDs are those of no other row."""
    options = {"seed": zlib.crc32(folder.name.encode()), **options}
    return write_dicom_series(folder / name, phantom.image, phantom.affine, **options)


def truncated_gzip(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", phantom.image)
    dicom_faults.truncate(folder / "a.nii.gz", 0.5)


def wrong_checksum(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", phantom.image)
    content = bytearray((folder / "a.nii.gz").read_bytes())
    content[-6] ^= 1
    (folder / "a.nii.gz").write_bytes(content)


def text(folder: Path, phantom: Phantom) -> None:
    (folder / "a.nii.gz").write_text("this is a report, not a scan")


def zipped_text(folder: Path, phantom: Phantom) -> None:
    (folder / "a.nii.gz").write_bytes(gzip.compress(b"this is a report, not a scan"))


def zero_bytes(folder: Path, phantom: Phantom) -> None:
    (folder / "a.nii.gz").touch()


def unreadable(folder: Path, phantom: Phantom) -> None:
    # Not by its permissions, which the superuser does not care for.
    (folder / "a.nii.gz").symlink_to("a.nii.gz")


def with_nan(folder: Path, phantom: Phantom) -> None:
    image = phantom.image.astype(np.float32)
    image[3, 4, 5] = np.nan
    nifti(folder / "a.nii.gz", image, phantom.affine)


def with_infinity(folder: Path, phantom: Phantom) -> None:
    image = phantom.image.astype(np.float32)
    image[3, 4, 5] = -np.inf
    nifti(folder / "a.nii.gz", image, phantom.affine)


def four_dimensional(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", np.stack([phantom.image] * 2, axis=-1))


def two_dimensional(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", phantom.image[:, :, 8])


def rgb(folder: Path, phantom: Phantom) -> None:
    colour = np.zeros(phantom.image.shape, dtype=[("R", "u1"), ("G", "u1"), ("B", "u1")])
    nifti(folder / "a.nii.gz", colour)


def rgb_slice(folder: Path, phantom: Phantom) -> None:
    dicom_faults.colour_slice(series(folder, phantom)[7])


def eight_bit(folder: Path, phantom: Phantom) -> None:
    grey = np.clip((phantom.image + 1000) / 1400 * 255, 0, 255).astype(np.uint8)
    nifti(folder / "a.nii.gz", grey, phantom.affine)


def uint16_without_rescale_slope(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", (phantom.image + 1024).astype(np.uint16), phantom.affine)


def constant(folder: Path, phantom: Phantom) -> None:
    nifti(folder / "a.nii.gz", np.full_like(phantom.image, 40), phantom.affine)


def all_air(folder: Path, phantom: Phantom) -> None:
    air = np.random.default_rng(0).integers(-1020, -980, phantom.image.shape)
    nifti(folder / "a.nii.gz", air.astype(np.int16), phantom.affine)


def no_lungs(folder: Path, phantom: Phantom) -> None:
    """An abdomen: a body of soft tissue in air."""
    sides = (np.linspace(-1, 1, n) ** 2 for n in phantom.image.shape[:2])
    body = np.where(np.add.outer(*sides) < 0.5, 50, -1000)[..., None] * np.ones(phantom.image.shape[2])
    noisy = body + np.random.default_rng(0).normal(0, 10, body.shape)
    nifti(folder / "a.nii.gz", noisy.astype(np.int16), phantom.affine)


def missing_slice(folder: Path, phantom: Phantom) -> None:
    series(folder, phantom)[7].unlink()


def duplicate_slice(folder: Path, phantom: Phantom) -> None:
    files = series(folder, phantom)
    dicom_faults.copy_slice(files[7], folder / "dicom" / "again.dcm")


def same_file_twice(folder: Path, phantom: Phantom) -> None:
    files = series(folder, phantom)
    dicom_faults.copy_slice(files[7], folder / "dicom" / "again.dcm", new_uid=False)


def mixed_spacings(folder: Path, phantom: Phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom)[7], PixelSpacing=[9.0, 9.0])


def mixed_sizes(folder: Path, phantom: Phantom) -> None:
    dicom_faults.halve_matrix(series(folder, phantom)[7])


def two_series_under_one_uid(folder: Path, phantom: Phantom) -> None:
    files = series(folder, phantom)
    for number, file in enumerate(files):
        dicom_faults.copy_slice(file, folder / "dicom" / f"other_{number}.dcm", SeriesNumber=2)


def uneven_slices(folder: Path, phantom: Phantom) -> None:
    dicom_faults.move_slice(series(folder, phantom)[7], (0, 0, 6.0))


def tilted_gantry(folder: Path, phantom: Phantom) -> None:
    dicom_faults.tilt_gantry(series(folder, phantom), 12)


def magnetic_resonance(folder: Path, phantom: Phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom), Modality="MR")


def positron_emission(folder: Path, phantom: Phantom) -> None:
    dicom_faults.set_tags(
        series(folder, phantom), Modality="PT", SOPClassUID="1.2.840.10008.5.1.4.1.1.128", Units="BQML"
    )


def dicom_without_rescale(folder: Path, phantom: Phantom) -> None:
    dicom_faults.set_tags(series(folder, phantom), RescaleIntercept=None, RescaleSlope=None)


def torn_slice(folder: Path, phantom: Phantom) -> None:
    dicom_faults.truncate(series(folder, phantom)[7], 0.6)


def empty_slice(folder: Path, phantom: Phantom) -> None:
    dicom_faults.truncate(series(folder, phantom)[7], 0)


def dangling_link(folder: Path, phantom: Phantom) -> None:
    file = series(folder, phantom)[7]
    file.unlink()
    file.symlink_to(folder / "gone.dcm")


def one_slice(folder: Path, phantom: Phantom) -> None:
    affine = phantom.affine.copy()
    affine[:3, 3] += 8 * affine[:3, 2]
    nifti(folder / "a.nii.gz", phantom.image[:, :, 8:9], affine)


def thousand_slices(folder: Path, phantom: Phantom) -> None:
    small = make_phantom(shape=(36, 36, 50), spacing=(9.6, 9.6, 5.4), seed=2)
    affine = small.affine.copy()
    affine[:3, 2] /= 20
    nifti(folder / "a.nii.gz", np.repeat(small.image, 20, axis=2), affine)


def shuffled_slices(folder: Path, phantom: Phantom) -> None:
    series(folder, phantom, shuffle=True)


def several_series(folder: Path, phantom: Phantom) -> None:
    """A thick series, a scout and a screenshot beside the one to take."""
    files = series(folder, phantom)
    affine = phantom.affine.copy()
    affine[:3, 2] *= 4
    seed = zlib.crc32(folder.name.encode())
    write_dicom_series(folder / "dicom" / "b", phantom.image[:, :, ::4], affine, seed=seed, series_number=7)
    dicom_faults.add_localizer(files[0], folder / "dicom" / "scout.dcm", generate_uid(entropy_srcs=["scout"]))
    dicom_faults.add_secondary_capture(files[0], folder / "dicom" / "screen.dcm")


def jpeg_ls(folder: Path, phantom: Phantom) -> None:
    series(folder, phantom, transfer_syntax=JPEGLSLossless)


def jpeg_2000(folder: Path, phantom: Phantom) -> None:
    series(folder, phantom, transfer_syntax=JPEG2000Lossless)


def run_length(folder: Path, phantom: Phantom) -> None:
    series(folder, phantom, transfer_syntax=RLELossless)


def jpeg_lossless(folder: Path, phantom: Phantom) -> None:
    for file in series(folder, phantom):
        lossless_jpeg.compress_slice(file)


def pipe_beside_the_slices(folder: Path, phantom: Phantom) -> None:
    """Whoever opens it waits for ever."""
    os.mkfifo(series(folder, phantom)[0].parent / "pipe")


REFUSED = [
    BadScan(truncated_gzip, "damaged or cut off"),
    BadScan(wrong_checksum, "damaged or cut off"),
    BadScan(text, "not a NIfTI file"),
    BadScan(zipped_text, "not a NIfTI file"),
    BadScan(zero_bytes, "0 bytes"),
    BadScan(unreadable, "symbolic links"),
    BadScan(with_nan, "NaN"),
    BadScan(with_infinity, "infinit|inf"),
    BadScan(four_dimensional, "4 dimensions"),
    BadScan(two_dimensional, "2 dimensions"),
    BadScan(rgb, "colour"),
    BadScan(eight_bit, "Hounsfield|HU"),
    BadScan(uint16_without_rescale_slope, "Hounsfield|HU|rescale"),
    BadScan(constant, "all voxels are 40"),
    BadScan(all_air, "Hounsfield|HU|tissue"),
    BadScan(no_lungs, "lung"),
    BadScan(rgb_slice, "not one grey-level frame"),
    BadScan(missing_slice, "slices are missing"),
    BadScan(duplicate_slice, "share their position"),
    BadScan(same_file_twice, "more than once"),
    BadScan(mixed_spacings, "pixel spacings"),
    BadScan(mixed_sizes, "image sizes"),
    BadScan(two_series_under_one_uid, "share their position"),
    BadScan(uneven_slices, "uneven"),
    BadScan(tilted_gantry, "tilt"),
    BadScan(magnetic_resonance, "modality MR|modality is MR"),
    BadScan(positron_emission, "modality PT|modality is PT"),
    BadScan(dicom_without_rescale, "Rescale"),
    BadScan(torn_slice, "cannot be decoded|do not fill"),
    BadScan(empty_slice, "broken or empty"),
    BadScan(dangling_link, "broken or empty"),
]

ODD = [
    BadScan(make)
    for make in (
        one_slice,
        thousand_slices,
        shuffled_slices,
        several_series,
        jpeg_ls,
        jpeg_2000,
        run_length,
        jpeg_lossless,
        pipe_beside_the_slices,
    )
]
