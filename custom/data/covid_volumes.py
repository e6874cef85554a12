# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""CT volumes with lesion masks, checked one by one."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

from custom.data.covid_checks import HU, LabelRule, check_same_grid, find_value_kind, sides_agree
from custom.data.covid_slices import SliceOptions, write_volume_slices
from custom.data.files import write_json, write_nifti
from custom.data.scans import Scan, read_scan
from custom.data.work import LeftOut, part, work_through

__all__ = ["CovidVolume", "VolumeOptions", "check_volumes"]

VERSION = 1  # raise it when checked cases would come out differently
LUNGS = LabelRule((1, 2), merge=False)


@dataclass(frozen=True)
class CovidVolume:
    """The files of one case.

    Args:
        name: for output files.
        patient_id: cases of one patient share it.
        image: the CT, NIfTI.
        mask: its lesions, NIfTI.
        lung: its lungs, 1 left and 2 right, NIfTI.
    """

    name: str
    patient_id: str
    image: Path
    mask: Path
    lung: Path | None = None


@dataclass(frozen=True)
class VolumeOptions:
    """What is done with all volumes of a data set.

    Args:
        rule: what the masks hold.
        slices: how slices become pictures.
        slices_of: kinds of volumes that become pictures, as
            :func:`custom.data.covid_checks.find_value_kind` names them.
    """

    rule: LabelRule = LabelRule()
    slices: SliceOptions = SliceOptions()
    slices_of: tuple[str, ...] = ()


@dataclass(frozen=True)
class _Job:
    volume: CovidVolume
    options: VolumeOptions
    output: Path

    @property
    def key(self) -> str:
        """Changes when the case would come out differently."""
        files = []
        for file in (self.volume.image, self.volume.mask, self.volume.lung):
            if file is not None:
                status = file.stat()
                files.append((file.name, status.st_size, status.st_mtime_ns))
        text = json.dumps([VERSION, self.volume.patient_id, asdict(self.options), files])
        return hashlib.sha256(text.encode()).hexdigest()


def check_volumes(
    volumes: Sequence[CovidVolume], output: Path, options: VolumeOptions, num_workers: int, desc: str
) -> tuple[list[dict[str, Any]], list[LeftOut]]:
    """Check volumes one by one, and write what cannot be used in place.

    Image, mask and lung mask must lie on the same voxels, the image must be in HU and the masks must have
    the values expected. A mask that is stored with exactly the labels wanted stays where it is, any other is
    written as uint8 to ``labels/`` or ``lungs/``. A volume that an earlier run finished with the same options
    is not read again.

    Args:
        volumes: the cases; their names differ.
        output: gets ``cases/`` (one JSON a volume), ``labels/``, ``lungs/`` and ``slices/`` as needed.
        options: what is expected and wanted.
        num_workers: processes; 0 and 1 use none besides this one.
        desc: name of the progress bar.

    Returns:
        Records of the volumes in their order, and what was left out.

    Raises:
        OSError: When the output cannot be written.
    """
    jobs = [_Job(volume, options, output) for volume in volumes]
    order = {volume.name: position for position, volume in enumerate(volumes)}
    cases, left_out = part(work_through(_check, jobs, num_workers, desc, "scan") if jobs else ())
    cases.sort(key=lambda case: order[case["name"]])
    left_out.sort(key=lambda one: order[one.what])
    return cases, left_out


def _check(job: _Job) -> dict[str, Any] | LeftOut:
    record = job.output / "cases" / f"{job.volume.name}.json"
    try:
        key = job.key
    except OSError as error:
        return LeftOut(job.volume.name, "failed", f"{error.strerror}: {error.filename}", True)
    try:
        if (finished := _finished(record, job.output, key)) is not None:
            return finished
        record.unlink(missing_ok=True)
        case = _examine(job)
    except (ValueError, FileNotFoundError) as error:
        return LeftOut(job.volume.name, "failed", " ".join(str(error).split()), True)
    if isinstance(case, LeftOut):
        return case
    case["key"] = key
    case["written"] = {file: (job.output / file).stat().st_size for file in case["written"]}
    write_json(record, case)
    return case | {"reused": False}


def _finished(record: Path, output: Path, key: str) -> dict[str, Any] | None:
    """The record of a volume that an earlier run finished."""
    try:
        case = json.loads(record.read_text(encoding="utf-8"))
        written = case["written"].items()
        same = case["key"] == key and all((output / file).stat().st_size == size for file, size in written)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return case | {"reused": True} if same else None


def _examine(job: _Job) -> dict[str, Any] | LeftOut:
    volume, options = job.volume, job.options
    scan = read_scan(volume.image)
    kind = find_value_kind(scan)
    if kind != HU and kind not in options.slices_of:
        reason = "it was windowed to 8-bit grey values, which are no HU; --volumes-as-slices writes pictures"
        return LeftOut(volume.name, "windowed volume", reason, False)
    drawn = read_scan(volume.mask)
    check_same_grid(scan, drawn)
    labels, in_place = options.rule.read(drawn)
    del drawn  # a quarter of a gigabyte
    spacing = nib.affines.voxel_sizes(scan.affine)
    voxels = int(np.count_nonzero(labels))
    case: dict[str, Any] = {
        "name": volume.name,
        "patient_id": volume.patient_id,
        "values": kind,
        "shape": list(scan.voxels.shape),
        "spacing_mm": [round(float(size), 6) for size in spacing],
        "lesion_voxels": voxels,
        "lesion_ml": round(voxels * float(np.prod(spacing)) / 1000, 4),
        "lesion_slices": int(labels.any(axis=(0, 1)).sum()),
        "label_in_place": in_place,
        "lung_in_place": False,
        "slices": [],
        "notes": list(scan.study["notes"]) + ([] if voxels else ["its mask has no lesion"]),
        "written": [],
    }
    to_write = [] if in_place or kind != HU else [("labels", labels)]
    if kind == HU and volume.lung is not None:
        lungs = _read_lungs(volume.lung, scan, case)
        to_write += [] if lungs is None else [("lungs", lungs)]
    for folder, array in to_write:
        case["written"].append(f"{folder}/{volume.name}.nii.gz")
        write_nifti(job.output / case["written"][-1], array, scan.affine)
    if kind in options.slices_of:
        stems = write_volume_slices(job.output / "slices", volume.name, scan, kind, labels, options.slices)
        case["slices"] = stems
        case["written"] += [f"slices/{part}/{stem}.png" for stem in stems for part in ("images", "masks")]
    return case


def _read_lungs(file: Path, scan: Scan, case: dict[str, Any]) -> np.ndarray | None:
    """The lung mask if it has to be written; what was found goes into the case's record."""
    drawn = read_scan(file)
    check_same_grid(scan, drawn)
    lungs, in_place = LUNGS.read(drawn)
    if not sides_agree(lungs, scan.affine):
        note = "its lung mask was left out: by the header, label 1 does not lie to the left of label 2"
        case["notes"].append(note)
        return None
    case["lung_in_place"] = in_place
    return None if in_place else lungs
