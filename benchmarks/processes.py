# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Compares evaluation and inference by one process with the same by two, of one thread each, on the CPU.

    python benchmarks/processes.py --cases 100

Each row is a run of the bundle's own command on a synthetic cohort, from its start to its end, Python's and
PyTorch's start included; a few cases take no longer than that. Scores and masks must be the same, else it
fails. Everything is made in a temporary folder and removed. 100 cases take about seven minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import monai
import nibabel as nib
import numpy as np
import torch
from memory import BUNDLE, save_weights

from custom.data import make_phantom, write_datalist

CHANNELS = [8, 8, 8, 8, 8]
SHAPE, SPACING = (128, 128, 40), (2.7, 2.7, 6.8)


def run(configs: list[str], overrides: dict[str, Any], processes: int) -> tuple[float, float]:
    """Run a bundle's command; returns the seconds it took, by the clock and of the processors.

    Raises:
        RuntimeError: When it fails.
    """
    files = [str(BUNDLE / "configs" / f"{name}.json") for name in configs]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    words = [sys.executable, *(launcher if processes > 1 else []), "-m", "monai.bundle", "run"]
    words += ["--config_file", str(files)]
    for key, value in {"bundle_root": str(BUNDLE), **overrides}.items():
        words += [f"--{key}", value if isinstance(value, str) else repr(value)]
    started, used = time.monotonic(), children_seconds()
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(words, cwd=BUNDLE, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"exit code {done.returncode}:\n{done.stderr[-3000:]}")
    return time.monotonic() - started, children_seconds() - used


def children_seconds() -> float:
    """Processor time of the processes that have ended, which others on the machine hardly change."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def write_cohort(folder: Path, cases: int) -> None:
    entries = []
    for number in range(cases):
        chest = make_phantom(SHAPE, SPACING, seed=number)
        name = f"{number:03d}"
        (folder / "scans").mkdir(parents=True, exist_ok=True)
        nib.save(nib.Nifti1Image(chest.image, chest.affine), folder / "scans" / f"{name}.nii.gz")
        mask = nib.Nifti1Image((chest.label > 0).astype(np.uint8), chest.affine)
        nib.save(mask, folder / f"{name}_mask.nii.gz")
        entry = {
            "image": f"scans/{name}.nii.gz",
            "label": f"{name}_mask.nii.gz",
            "patient_id": name,
            "fold": 0,
        }
        entries.append(entry)
    write_datalist(folder / "datalist.json", "chests", "synthetic", training=entries)


def result(folder: Path) -> dict[str, Any]:
    """Scores, or the masks' voxels, that a run has written."""
    if (folder / "scores.json").is_file():
        return dict(json.loads((folder / "scores.json").read_text(encoding="utf-8")))
    return {
        file.name: np.asarray(nib.load(file).dataobj).tobytes() for file in folder.glob("*/*_opacity.nii.gz")
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100)
    args = parser.parse_args()
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg())
    print(f"{os.cpu_count()} cores, load {load}, torch {torch.__version__}, MONAI {monai.__version__}")
    print(
        f"| run | processes | time (s) | times as fast | CPU time (s) | result |\n|{'---|' * 6}", flush=True
    )
    with tempfile.TemporaryDirectory(prefix="processes-") as name:
        folder = Path(name)
        write_cohort(folder, args.cases)
        weights = str(save_weights(folder, CHANNELS))
        shared = {"ckpt_path": weights, "network_def::channels": CHANNELS, "image_size": SHAPE[:2]}
        for what, configs, more, dataset in (
            ("evaluation", ["train", "evaluate"], "multi_gpu_evaluate", folder),
            ("inference", ["inference"], "multi_gpu_inference", folder / "scans"),
        ):
            seconds: dict[int, float] = {}
            found: dict[int, dict[str, Any]] = {}
            for processes in (1, 2):
                output = folder / f"{what}_{processes}"
                overrides = {**shared, "dataset_dir": str(dataset), "output_dir": str(output)}
                if what == "evaluation":
                    overrides |= {"cache_dir": str(folder / f"cache_{processes}"), "num_workers": 0}
                used = [*configs, more] if processes > 1 else configs
                seconds[processes], cpu = run(used, overrides, processes)
                found[processes] = result(output)
                if not found[1] or found[processes] != found[1]:
                    raise RuntimeError(f"{what} by {processes} processes gives another result than by one")
                ratio = seconds[1] / seconds[processes]
                said = f"{args.cases} cases" if processes == 1 else "the same"
                row = (what, processes, f"{seconds[processes]:.0f}", f"{ratio:.2f}", f"{cpu:.0f}", said)
                print("| " + " | ".join(map(str, row)) + " |", flush=True)


if __name__ == "__main__":
    main()
