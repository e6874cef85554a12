# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Measures the peak memory of inference and training by the length of a scan and the size of a cohort.

    python benchmarks/memory.py long --slices 100 300 1000
    python benchmarks/memory.py many --cases 5 50 500

``long`` segments one synthetic 512x512 study of each length, ``many`` segments and trains on cohorts of small
ones. Each row is a run of the bundle's own command, ``python -m monai.bundle run``, in a process of its own,
and the peak is the resident memory (RSS) that the system reports at its end, Python and PyTorch included.
The network is the bundle's with fewer channels, given by ``--channels``: memory for the scan is the same with
any, that for a batch of slices is not. Everything is made in a temporary folder and removed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch

from custom.data import write_datalist, write_dicom_series
from custom.data.phantom import make_phantom
from custom.networks import SCOATNet

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = ROOT / "bundles" / "covid_ct_scoatnet_segmentation"
SMALL = (64, 64, 16)


def run_bundle(configs: list[str], overrides: dict[str, Any], log: Path) -> tuple[float, float]:
    """Run a bundle's command; returns the peak of its RSS in GB and the seconds it took.

    Raises:
        RuntimeError: When it fails.
    """
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in configs]
    words = [sys.executable, "-m", "monai.bundle", "run", "--config_file", str(files)]
    for key, value in {"bundle_root": str(BUNDLE), **overrides}.items():
        words += [f"--{key}", value if isinstance(value, str) else repr(value)]
    started = time.monotonic()
    with open(log, "w", encoding="utf-8") as file:
        process = subprocess.Popen(words, stdout=file, stderr=subprocess.STDOUT, cwd=BUNDLE)
        _, status, usage = os.wait4(process.pid, 0)
    if code := os.waitstatus_to_exitcode(status):
        raise RuntimeError(f"exit code {code}:\n{log.read_text(encoding='utf-8')[-3000:]}")
    return usage.ru_maxrss * 1024 / 1e9, time.monotonic() - started


def apart(function: Callable[..., None], *args: Any) -> None:
    """Call a function in a process of its own.

    Linux counts the memory that a program's parent had at its peak as the program's, so this process must
    stay small.
    """
    process = get_context("spawn").Process(target=function, args=args)
    process.start()
    process.join()
    if process.exitcode:
        raise RuntimeError(f"{function.__name__} ended with exit code {process.exitcode}")


def save_weights(folder: Path, channels: list[int]) -> Path:
    torch.manual_seed(0)
    path = folder / "model.pt"
    torch.save(SCOATNet(spatial_dims=2, in_channels=1, out_channels=1, channels=channels).state_dict(), path)
    return path


def write_long_scan(folder: Path, slices: int, kind: str) -> None:
    """A chest of 512x512 voxels a slice, 330 mm high, with noise, so that it packs like a scan."""
    chest = make_phantom((128, 128, 50), (2.8, 2.8, 330 / 50), seed=1, noise_hu=0.0)
    planes = np.minimum(np.arange(slices) * 50 // slices, 49)
    hu = np.empty((512, 512, slices), np.int16, order="F")
    noise = np.random.default_rng(0).integers(-20, 21, (512, 512), dtype=np.int16)
    for k, plane in enumerate(planes):
        hu[:, :, k] = np.kron(chest.image[:, :, plane], np.ones((4, 4), np.int16)) + np.roll(noise, 7 * k, 0)
    affine = chest.affine.copy()
    affine[:3, :2] /= 4
    affine[:3, 2] *= 50 / slices
    if kind == "dicom":
        write_dicom_series(folder / "scan", hu, affine, signed=True, rescale_intercept=0)
    else:
        nib.save(nib.Nifti1Image(hu, affine), folder / "scan.nii.gz")


def write_cohort(folder: Path, cases: int) -> None:
    """Small chests that all differ, with masks and a data list whose first five are held out."""
    chests = [make_phantom(SMALL, (5.4, 5.4, 17.0), seed=seed) for seed in range(5)]
    entries = []
    for number in range(cases):
        chest = chests[number % 5]
        hu = chest.image + np.random.default_rng(number).integers(-5, 6, SMALL, dtype=np.int16)
        for name, array in (("ct", hu), ("mask", (chest.label > 0).astype(np.uint8))):
            nib.save(nib.Nifti1Image(array, chest.affine), folder / f"{number:04d}_{name}.nii.gz")
        entry = {"image": f"{number:04d}_ct.nii.gz", "label": f"{number:04d}_mask.nii.gz"}
        entries.append(entry | {"patient_id": f"{number}", "fold": int(number >= 2)})
    write_datalist(folder / "datalist.json", "small chests", "synthetic", training=entries)


def measure_long(folder: Path, args: argparse.Namespace) -> None:
    print(f"| input | slices | peak RSS (GB) | time (s) |\n|{'---|' * 4}")
    weights = save_weights(folder, args.channels)
    for kind in args.kinds:
        for slices in args.slices:
            scans = folder / f"{kind}_{slices}"
            scans.mkdir()
            apart(write_long_scan, scans, slices, kind)
            overrides = {
                "dataset_dir": str(scans),
                "output_dir": str(folder / "output"),
                "ckpt_path": str(weights),
                "network_def::channels": args.channels,
            }
            peak, seconds = run_bundle(["inference"], overrides, folder / "log.txt")
            print(f"| {kind} | {slices} | {peak:.2f} | {seconds:.0f} |", flush=True)
            shutil.rmtree(scans)
            shutil.rmtree(folder / "output")


def measure_many(folder: Path, args: argparse.Namespace) -> None:
    print(f"| run | cases | peak RSS (GB) | time (s) |\n|{'---|' * 4}")
    weights = save_weights(folder, args.channels)
    small = {"network_def::channels": args.channels, "image_size": SMALL[:2]}
    for cases in args.cases:
        data = folder / f"cohort_{cases}"
        data.mkdir()
        apart(write_cohort, data, cases)
        scans = folder / f"scans_{cases}"
        scans.mkdir()
        for file in sorted(data.glob("*_ct.nii.gz")):
            file.with_name(file.name).rename(scans / file.name)
        inference = {"dataset_dir": str(scans), "output_dir": str(folder / "output"), **small}
        peak, seconds = run_bundle(["inference"], inference | {"ckpt_path": str(weights)}, folder / "log.txt")
        print(f"| inference | {cases} | {peak:.2f} | {seconds:.0f} |", flush=True)
        for file in scans.iterdir():
            file.rename(data / file.name)
        training = {
            "dataset_dir": str(data),
            "output_dir": str(folder / "eval"),
            "ckpt_dir": str(folder / "models"),
            "cache_dir": str(folder / "cache"),
            "num_workers": 0,
            "epochs": 1,
            **small,
        }
        peak, seconds = run_bundle(["train"], training, folder / "log.txt")
        print(f"| training | {cases} | {peak:.2f} | {seconds:.0f} |", flush=True)
        for made in ("output", "eval", "models", "cache", data.name, scans.name):
            shutil.rmtree(folder / made)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")
    long = kinds.add_parser("long", help="inference on one study of 512x512 voxels a slice")
    long.add_argument("--slices", type=int, nargs="+", default=[100, 300, 1000])
    long.add_argument("--kinds", nargs="+", choices=["nifti", "dicom"], default=["nifti", "dicom"])
    long.set_defaults(measure=measure_long)
    many = kinds.add_parser("many", help=f"inference and training on cohorts of {SMALL} voxels")
    many.add_argument("--cases", type=int, nargs="+", default=[5, 50, 500])
    many.set_defaults(measure=measure_many)
    for one in (long, many):
        one.add_argument("--channels", type=int, nargs="+", default=[8, 8, 8, 8, 8])
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="memory-") as folder:
        args.measure(Path(folder), args)


if __name__ == "__main__":
    main()
