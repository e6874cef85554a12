# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""LIDC-IDRI as it is downloaded, turned into NIfTI scans, nodule masks and data lists."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from custom.data.datalist import assign_folds, write_datalist
from custom.data.dicom_series import CTVolume
from custom.data.files import write_json, write_nifti
from custom.data.lidc_consensus import LidcNodule, draw_nodules, find_nodules
from custom.data.lidc_source import LidcSeries, LidcXml, find_readings, find_series
from custom.data.work import LeftOut, describe_left_out, part, work_through, write_left_out

__all__ = ["LidcSummary", "prepare_lidc"]

VERSION = 1  # raise it when prepared cases would come out differently
DESCRIPTION = (
    "Lung nodules of 3 mm or more. The Cancer Imaging Archive, doi:10.7937/K9/TCIA.2015.LO9QL9SX, CC BY 3.0. "
    "Armato et al., Medical Physics 38:915-931, 2011"
)


@dataclass(frozen=True)
class LidcSummary:
    """What :func:`prepare_lidc` did.

    Args:
        datalist: data list with the sections training and validation.
        cases: one dictionary a case, as in its file ``cases/<name>.json``.
        reused: how many of them an earlier run had finished.
        left_out: everything else; also in ``skipped.json``.
        n_validation: patients in the section validation.
        n_folds: folds of the section training.
    """

    datalist: Path
    cases: tuple[dict[str, Any], ...]
    reused: int
    left_out: tuple[LeftOut, ...]
    n_validation: int
    n_folds: int

    @property
    def failed(self) -> tuple[LeftOut, ...]:
        """What should have become a case and did not."""
        return tuple(one for one in self.left_out if one.failed)

    def __str__(self) -> str:
        patients = len({case["patient_id"] for case in self.cases})
        slices = sum(case["nodule_slices"] for case in self.cases)
        nodules = sum(nodule["voxels"] > 0 for case in self.cases for nodule in case["nodules"])
        lines = [
            f"{len(self.cases)} scans of {patients} patients ({self.reused} from an earlier run), "
            f"{nodules} nodules on {slices} slices",
            f"{self.datalist}: {self.n_validation} patients for validation, {patients - self.n_validation} "
            f"for training in {self.n_folds} folds; datalist_all.json beside it has all for training",
            *describe_left_out(self.left_out),
        ]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Job:
    """All that a worker needs to make one case."""

    xml: LidcXml
    series: LidcSeries
    output: Path
    four_readers: bool

    @property
    def name(self) -> str:
        return f"{self.series.patient}_{_hash(self.series.uid)[:8]}"  # some patients have two scans

    @property
    def key(self) -> str:
        """Changes when the case would come out differently."""
        files = sorted((os.path.basename(file), os.path.getsize(file)) for file in self.series.files)
        return _hash(json.dumps([VERSION, self.four_readers, self.xml.digest, files]))


def prepare_lidc(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    xml_dir: str | os.PathLike | None = None,
    four_readers: bool = False,
    validation_fraction: float = 0.25,
    n_folds: int = 5,
    seed: int = 0,
    num_workers: int = 0,
) -> LidcSummary:
    """Turn a download of LIDC-IDRI into scans and nodule masks to train on.

    Series and XML files are matched by Series Instance UID, whatever their names and folders. Scans are
    written whole, in HU. Scans without a nodule of 3 mm or more are left out: training draws slices with a
    nodule alone. The cases go one by one through memory (one a worker), each file appears whole or not at
    all, and a case that an earlier run finished with the same options is not done again.

    ``datalist.json`` has the sections ``validation``, a random part of the patients to choose
    hyper-parameters on, and ``training``, the others, in folds. ``datalist_all.json`` has all cases under
    ``training``, in folds, for the final training with the hyper-parameters chosen.

    Args:
        source: folder with the DICOM files, in whatever sub-folders.
        output_dir: gets ``images/``, ``labels/``, ``cases/`` (one JSON a case), ``skipped.json`` and the data
            lists.
        xml_dir: folder with the XML files, defaults to ``source``.
        four_readers: ask for two of all four radiologists, see
            :func:`custom.data.lidc_consensus.find_nodules`.
        validation_fraction: part of the patients for validation, 0 to less than 1.
        n_folds: folds of the training patients, at least 2; fewer where there are fewer patients.
        seed: seed of validation patients and folds.
        num_workers: processes; 0 and 1 use none besides this one.

    Raises:
        FileNotFoundError: When a folder does not exist or has no XML file.
        ValueError: When an option is out of range, or not one case could be prepared.
        OSError: When the output cannot be written.

    Reference:
        Liu et al., COVID-19 lung infection segmentation with a novel two-stage cross-domain transfer learning
        framework, Medical Image Analysis 74:102205, 2021 (LIDC: 875 patients, 13,916 slices).
    """
    if not 0 <= validation_fraction < 1:
        raise ValueError(f"validation_fraction must be from 0 to less than 1, got {validation_fraction:g}")
    if n_folds < 2:
        raise ValueError(f"n_folds must be at least 2, got {n_folds}")
    output = Path(output_dir)
    readings, left_out = find_readings(source if xml_dir is None else xml_dir)
    series = find_series(source, num_workers)
    jobs, unmatched = _match(readings, series, output, four_readers)
    cases, failed = part(work_through(_prepare_case, jobs, num_workers, "LIDC-IDRI", "scan"))
    cases.sort(key=lambda case: case["name"])
    left_out = write_left_out(output, [*left_out, *unmatched, *failed])
    if not cases:
        first = f", the first is {left_out[0].what}: {left_out[0].reason}" if left_out else ""
        raise ValueError(f"no scan under {source} could be prepared; left out: {len(left_out)}{first}")
    reused = sum(case.pop("reused") for case in cases)
    n_validation, folds = _write_lists(output, cases, four_readers, validation_fraction, n_folds, seed)
    return LidcSummary(output / "datalist.json", tuple(cases), reused, tuple(left_out), n_validation, folds)


def _match(
    readings: dict[str, LidcXml], series: dict[str, LidcSeries], output: Path, four_readers: bool
) -> tuple[list[_Job], list[LeftOut]]:
    jobs, left_out = [], []
    for uid, one in sorted(series.items()):
        if one.modality != "CT":
            reason = f"its modality is {one.modality or 'missing'}"
            left_out.append(LeftOut(uid, "series that is no CT", reason, False))
        elif uid not in readings:
            left_out.append(LeftOut(uid, "CT without XML", "no XML file that can be used reads it", False))
        elif not readings[uid].readings.annotations:
            reason = "no radiologist outlined a nodule of 3 mm or more"
            left_out.append(LeftOut(uid, "CT without a nodule of 3 mm or more", reason, False))
        else:
            jobs.append(_Job(readings[uid], one, output, four_readers))
    for uid in sorted(set(readings) - set(series)):
        reason = "an XML file reads it, and it is not in the source"
        left_out.append(LeftOut(uid, "XML without CT", reason, False))
    return jobs, left_out


def _prepare_case(job: _Job) -> dict[str, Any] | LeftOut:
    record, image, label = (
        job.output / folder / f"{job.name}{suffix}"
        for folder, suffix in (("cases", ".json"), ("images", ".nii.gz"), ("labels", ".nii.gz"))
    )
    try:
        key = job.key
        if (finished := _finished(record, image, label, key)) is not None:
            return finished
        volume = job.series.read()
        nodules = find_nodules(job.xml.readings.annotations, volume, job.four_readers)
    except (ValueError, FileNotFoundError) as error:
        return LeftOut(job.series.uid, "failed", " ".join(str(error).split()), True)
    mask = draw_nodules(nodules, volume.hu.shape)
    if not mask.any():
        reason = "the radiologists do not agree on a single voxel"
        return LeftOut(job.series.uid, "CT without an agreed nodule", reason, False)
    record.unlink(missing_ok=True)  # until it is back, the other two may be of different runs
    write_nifti(image, volume.hu, volume.affine)
    write_nifti(label, mask, volume.affine)
    case = _describe(job, volume, nodules, mask)
    case |= {"key": key, "bytes": [image.stat().st_size, label.stat().st_size]}
    write_json(record, case)
    return case | {"reused": False}


def _finished(record: Path, image: Path, label: Path, key: str) -> dict[str, Any] | None:
    """The record of a case that an earlier run finished."""
    try:
        case = json.loads(record.read_text(encoding="utf-8"))
        same = case["key"] == key and case["bytes"] == [image.stat().st_size, label.stat().st_size]
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return case | {"reused": True} if same else None


def _describe(job: _Job, volume: CTVolume, nodules: Sequence[LidcNodule], mask: np.ndarray) -> dict[str, Any]:
    voxel_ml = float(np.prod(volume.spacing)) / 1000
    return {
        "name": job.name,
        "patient_id": job.series.patient,
        "series_uid": job.series.uid,
        "study_uid": volume.series.study_uid,
        "shape": list(volume.hu.shape),
        "spacing_mm": [round(value, 6) for value in volume.spacing],
        "slice_thickness_mm": volume.series.thickness,
        "consensus": _consensus_name(job.four_readers),
        "readers": len(job.xml.readings.readers),
        "nodules": [
            {
                "voxels": nodule.voxels,
                "volume_ml": round(nodule.voxels * voxel_ml, 4),
                "slices": list(nodule.slices),
                "annotations": len(nodule.annotations),
                "readers": len(nodule.readers),
            }
            for nodule in nodules
        ],
        "nodule_slices": int(mask.any(axis=(0, 1)).sum()),
        "notes": list(volume.notes),
    }


def _consensus_name(four_readers: bool) -> str:
    return "at least 2 of 4 readers" if four_readers else "at least half of a nodule's annotations"


def _write_lists(
    output: Path, cases: Sequence[dict], four_readers: bool, fraction: float, n_folds: int, seed: int
) -> tuple[int, int]:
    """Write both data lists; returns the validation patients and the folds there are."""
    patients = sorted({case["patient_id"] for case in cases})
    count = min(max(round(fraction * len(patients)), int(fraction > 0)), len(patients) - 1)
    held_out = set(np.random.default_rng(seed).permutation(patients)[:count].tolist())
    validation = [case for case in cases if case["patient_id"] in held_out]
    training = _with_folds([case for case in cases if case["patient_id"] not in held_out], n_folds, seed)
    more = {
        "labels": {"0": "background", "1": "nodule"},
        "protocol": f"voxels that {_consensus_name(four_readers)} have",
    }
    for file, sections in (
        ("datalist_all.json", {"training": _with_folds(cases, n_folds, seed)}),
        ("datalist.json", {"training": training, "validation": [_entry(case) for case in validation]}),
    ):
        write_datalist(output / file, "LIDC-IDRI", DESCRIPTION, **more, **sections)
    return count, len({entry["fold"] for entry in training})


def _with_folds(cases: Sequence[dict], n_folds: int, seed: int) -> list[dict]:
    ids = [case["patient_id"] for case in cases]
    n_folds = min(n_folds, len(set(ids)))
    folds = assign_folds(ids, n_folds, seed) if n_folds > 1 else [0] * len(ids)
    return [_entry(case) | {"fold": fold} for case, fold in zip(cases, folds, strict=True)]


def _entry(case: dict) -> dict[str, str]:
    name = f"{case['name']}.nii.gz"
    return {"image": f"images/{name}", "label": f"labels/{name}", "patient_id": case["patient_id"]}


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
