# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The public COVID-19 CT data sets as they are downloaded, turned into data lists."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from custom.data.covid_checks import GREY, HU, LabelRule
from custom.data.covid_files import (
    covid_ct_seg_name,
    covid_ct_seg_role,
    find_nifti,
    index_files,
    match_name,
    medseg_name,
)
from custom.data.covid_lists import (
    CovidSummary,
    check_folds,
    list_slices,
    list_volumes,
    slice_entry,
    with_folds,
    write_lists,
)
from custom.data.covid_slices import SliceOptions, write_stack
from custom.data.covid_volumes import CovidVolume, VolumeOptions, check_volumes
from custom.data.work import LeftOut

__all__ = ["prepare_covid_ct_seg", "prepare_medseg", "prepare_mosmed"]

MEDSEG_CLASSES = {1: "ground-glass opacity", 2: "consolidation", 3: "pleural effusion"}
EFFUSION = 3


def prepare_mosmed(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    n_testing: int = 10,
    n_folds: int = 5,
    seed: int = 0,
    num_workers: int = 0,
) -> CovidSummary:
    """Put the 50 scans of MosMedData COVID19_1110 that have a lesion mask on a data list.

    ``study_NNNN_mask.nii.gz`` goes with ``study_NNNN.nii.gz``, wherever they are below ``source``; every
    study is a patient. nCoVSegNet was trained on 40 of the 50 and tested on 10 that are not named: here they
    are drawn at random, from all studies with a mask, so that one that cannot be read does not change them.

    Args:
        source: folder with ``studies/`` and ``masks/``.
        output_dir: gets ``datalist.json``, ``skipped.json`` and ``cases/``.
        n_testing: studies in the section ``testing``.
        n_folds: folds of the section ``training``; fewer where there are fewer patients.
        seed: seed of testing studies and folds.
        num_workers: processes; each holds one scan in memory.

    Raises:
        FileNotFoundError: When the folder does not exist.
        ValueError: When an option is out of range, a study is there twice, or none can be used.
        OSError: When the output cannot be written.

    Reference:
        Morozov et al., MosMedData: Chest CT Scans with COVID-19 Related Findings, arXiv 2005.06465, 2020.
        Liu et al., Medical Image Analysis 74:102205, 2021 (40 studies to train, 10 to test).
    """
    source, output = Path(source), Path(output_dir)
    check_folds(n_folds)
    files = find_nifti(source, output)
    masks = index_files(files, lambda path: match_name(r"(study_\d+)_mask", path))
    images = index_files(files, lambda path: match_name(r"(study_\d+)", path))
    left_out = [
        LeftOut(name, "failed", f"its mask is there, and no {name}.nii.gz below {source}", True)
        for name in sorted(set(masks) - set(images))
    ]
    if without := len(set(images) - set(masks)):
        left_out.append(LeftOut(f"{without} studies", "studies without a mask", "they have no mask", False))
    volumes = [
        CovidVolume(name, name, images[name], masks[name]) for name in sorted(set(images) & set(masks))
    ]
    if volumes and not 0 <= n_testing < len(volumes):
        allowed = f"0 to {len(volumes) - 1} of the {len(volumes)} with a mask"
        raise ValueError(f"{n_testing} studies are asked for testing, it can be {allowed}")
    held_out = set(np.random.default_rng(seed).permutation([v.name for v in volumes])[:n_testing].tolist())
    cases, failed = check_volumes(volumes, output, VolumeOptions(), num_workers, "MosMedData")
    entries = list_volumes(volumes, cases, output)
    return write_lists(
        output,
        source,
        "MosMedData COVID19_1110",
        "Chest CT with COVID-19 related findings, CT-1, lesions drawn. Research and Practical Clinical "
        "Center for Diagnostics and Telemedicine Technologies, Moscow, CC BY-NC-ND 3.0. arXiv 2005.06465",
        {
            "training": with_folds([e for e in entries if e["patient_id"] not in held_out], n_folds, seed),
            "testing": [e for e in entries if e["patient_id"] in held_out],
        },
        (),
        cases,
        left_out + failed,
        protocol="nCoVSegNet's numbers of studies; which ones it tested on is not published, these are drawn "
        f"with seed {seed}",
    )


def prepare_covid_ct_seg(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    testing: bool = False,
    volumes_as_slices: bool = False,
    slices: SliceOptions | None = None,
    n_folds: int = 5,
    seed: int = 0,
    num_workers: int = 0,
) -> CovidSummary:
    """Put the COVID-19-CT-Seg volumes of Ma et al. on data lists, with their lung masks.

    The ten volumes of coronacases.org are in HU. The ten of Radiopaedia were windowed from -1250 to 250 HU to
    8-bit grey values, and their headers turn them upside down. They are recognised by their values and left
    out, or written as plain slices with a data list of their own.

    Files are told apart by their folders, which have the names of the archives: COVID-19-CT-Seg_20cases,
    Infection_Mask, Lung_Mask. In the lung masks 1 is the left and 2 the right lung; one that contradicts the
    header is left out, with a note. A Radiopaedia case with two series is one patient.

    Args:
        source: folder with these folders.
        output_dir: gets ``datalist.json``, ``slices/`` with its own list, ``skipped.json`` and ``cases/``.
        testing: put the volumes in HU into the section ``testing``, as nCoVSegNet does with the coronacases.
        volumes_as_slices: write slices with a lesion of the windowed volumes as plain slices.
        slices: how slices become pictures.
        n_folds: folds of a section ``training``; fewer where there are fewer patients.
        seed: seed of the folds.
        num_workers: processes; each holds one scan in memory.

    Raises:
        FileNotFoundError: When the folder does not exist.
        ValueError: When an option is out of range, a case is there twice, or none can be used.
        OSError: When the output cannot be written.

    Reference:
        Ma et al., Toward data-efficient learning: a benchmark for COVID-19 CT lung and infection
        segmentation, Medical Physics 48:1197-1210, 2021, doi:10.5281/zenodo.3757476.
    """
    source, output = Path(source), Path(output_dir)
    check_folds(n_folds)
    files = find_nifti(source, output)
    by_role = [
        [file for file in files if covid_ct_seg_role(file, source) == role]
        for role in ("image", "mask", "lung")
    ]
    images, masks, lungs = (index_files(found, covid_ct_seg_name) for found in by_role)
    left_out = [
        LeftOut(str(file.relative_to(source)), "files of unknown names", "it is named like no case", False)
        for found in by_role
        for file in found
        if covid_ct_seg_name(file) is None
    ]
    volumes = []
    for name in sorted(set(images) | set(masks)):
        needed = {"CT": images, "infection mask": masks} | ({"lung mask": lungs} if lungs else {})
        missing = [what for what, there in needed.items() if name not in there]
        if missing:
            reason = f"there is no {' and no '.join(missing)} of it below {source}"
            left_out.append(LeftOut(name, "failed", reason, True))
        else:
            patient = "_".join(name.split("_")[:2])  # radiopaedia_10_85902_1 and _3 are one patient's
            volumes.append(CovidVolume(name, patient, images[name], masks[name], lungs.get(name)))
    options = VolumeOptions(slices=slices or SliceOptions(), slices_of=(GREY,) if volumes_as_slices else ())
    cases, failed = check_volumes(volumes, output, options, num_workers, "COVID-19-CT-Seg")
    entries = list_volumes(volumes, cases, output)
    return write_lists(
        output,
        source,
        "COVID-19-CT-Seg",
        "Infection and lungs drawn on CT of coronacases.org and Radiopaedia, doi:10.5281/zenodo.3757476. "
        "Masks CC BY 4.0; the CT volumes under the terms of their sources, CC BY-NC-SA",
        {"testing": entries} if testing else {"training": with_folds(entries, n_folds, seed)},
        with_folds(list_slices(cases), n_folds, seed),
        cases,
        left_out + failed,
        protocol="volumes in HU; of windowed volumes the slices with a lesion",
    )


def prepare_medseg(
    source: str | os.PathLike,
    output_dir: str | os.PathLike,
    keep_classes: bool = False,
    without_effusion: bool = False,
    volumes_as_slices: bool = False,
    slices: SliceOptions | None = None,
    n_folds: int = 5,
    seed: int = 0,
    num_workers: int = 0,
) -> CovidSummary:
    """Put MedSeg's COVID-19 CT segmentation data sets on data lists.

    Data set 1 is ``tr_im.nii.gz`` with ``tr_mask.nii.gz``, 100 slices of some 60 patients in one file: they
    are written as plain slices, and those that look alike count as one patient. Data set 2 is nine volumes,
    ``rp_im/N.nii.gz`` with ``rp_msk/N.nii.gz``. Either may be missing. MedSeg made all images from 8-bit
    pictures and scaled them back to HU by the values of air and fat, so their HU are approximate.

    The masks have 1 ground-glass, 2 consolidation and 3 pleural effusion. They are made one class, as the
    bundles' training does in any case, or kept for other uses.

    Zhou et al. train on the slices of data set 1 and those with a lesion of data set 2: ask for
    ``volumes_as_slices``. COVID-SemiSeg's training and test slices are the same 100 slices of data set 1, and
    data set 2 may share patients with the Radiopaedia volumes of COVID-19-CT-Seg: do not train on the one and
    test on the other.

    Args:
        source: folder with the files.
        output_dir: gets ``datalist.json``, ``slices/`` with its own list, ``labels/``, ``skipped.json`` and
            ``cases/``.
        keep_classes: keep the three labels.
        without_effusion: make pleural effusion background.
        volumes_as_slices: write slices with a lesion of the volumes as plain slices as well.
        slices: how slices become pictures.
        n_folds: folds of the sections ``training``; fewer where there are fewer patients.
        seed: seed of the folds.
        num_workers: processes; each holds one scan in memory.

    Raises:
        FileNotFoundError: When the folder does not exist.
        ValueError: When an option is out of range, a file is there twice, or none can be used.
        OSError: When the output cannot be written.

    Reference:
        medicalsegmentation.com/covid19. Zhou, Canu and Ruan, International Journal of Imaging Systems and
        Technology 31(1):16-27, 2021 (100 + 373 slices).
    """
    source, output = Path(source), Path(output_dir)
    check_folds(n_folds)
    files = find_nifti(source, output)
    stack = index_files(files, lambda path: match_name(r"(tr_im|tr_mask)", path))
    images, masks = (
        index_files((f for f in files if folder in f.relative_to(source).parts[:-1]), medseg_name)
        for folder in ("rp_im", "rp_msk")
    )
    rule = LabelRule(tuple(MEDSEG_CLASSES), (EFFUSION,) if without_effusion else (), merge=not keep_classes)
    given = slices or SliceOptions()
    drawing = SliceOptions(given.window, given.orientation, merged=not keep_classes)
    left_out, volumes = [], []
    for name in sorted(set(images) | set(masks)):
        if name in images and name in masks:
            volumes.append(CovidVolume(name, f"medseg_{name}", images[name], masks[name]))
        else:
            reason = f"there is no {'mask' if name in images else 'CT'} of it below {source}"
            left_out.append(LeftOut(name, "failed", reason, True))
    options = VolumeOptions(rule, drawing, (HU, GREY) if volumes_as_slices else ())
    cases, failed = check_volumes(volumes, output, options, num_workers, "MedSeg")
    pictures = list_slices(cases)
    if stack:
        try:
            if len(stack) < 2:
                raise ValueError(f"tr_im.nii.gz and tr_mask.nii.gz are needed, {source} has only one of them")
            found = write_stack(output / "slices", "tr", stack["tr_im"], stack["tr_mask"], rule, drawing)
            pictures += [slice_entry(stem, f"medseg_{patient}") for stem, patient in found]
        except (ValueError, FileNotFoundError) as error:
            left_out.append(LeftOut("tr_im", "failed", " ".join(str(error).split()), True))
    return write_lists(
        output,
        source,
        "MedSeg COVID-19 CT",
        "CT of the Italian Society of Medical and Interventional Radiology and of Radiopaedia, lesions "
        "drawn; HU scaled back from 8-bit pictures. MedSeg, medicalsegmentation.com/covid19",
        {"training": with_folds(list_volumes(volumes, cases, output), n_folds, seed)},
        with_folds(pictures, n_folds, seed),
        cases,
        left_out + failed,
        labels=_label_names(rule),
        protocol="of volumes the slices with a lesion; slices of data set 1 that look alike share a patient",
    )


def _label_names(rule: LabelRule) -> dict[str, str]:
    names = {label: name for label, name in MEDSEG_CLASSES.items() if label not in rule.drop}
    if rule.merge:
        names = {1: " or ".join(names.values())}
    return {"0": "background"} | {str(label): name for label, name in names.items()}
