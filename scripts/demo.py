# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Train a small SCOAT-Net on synthetic chest CTs, score it on held-out ones and segment a new one.

The shipped nCoVSegNet, trained on slices of real patients, then segments the new one as well.
"""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from custom.console import command
from custom.data import write_dicom_series
from custom.data.phantom import make_phantom
from custom.data.phantom_cohort import write_cohort

ROOT = Path(__file__).resolve().parent.parent
BUNDLE = "covid_ct_scoatnet_segmentation"
SHIPPED = "covid_ct_ncovsegnet_segmentation"
SHAPE, SPACING = (128, 128, 20), (2.7, 2.7, 14.0)
PATIENTS: dict[str, Any] = {"lesions": ("ground_glass", "consolidation"), "burden": 0.6}
EXPECTED_DICE = 0.8


def run_bundle(config: str, *overrides: str, bundle: str = BUNDLE) -> None:
    """Run a bundle as a user would, and show the command."""
    words = [
        *("-m", "monai.bundle", "run", "--config_file", config),
        *("--logging_file", "configs/logging.conf", "--bundle_root", ".", *overrides),
    ]
    print(f"\n$ cd bundles/{bundle} && python {shlex.join(words)}\n", flush=True)
    subprocess.run([sys.executable, *words], cwd=ROOT / "bundles" / bundle, check=True)


def read_report(folder: Path) -> dict[str, Any]:
    (file,) = folder.rglob("*_report.json")
    report: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    return report


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, default=ROOT / "demo")
    parser.add_argument("--cases", type=int, default=24, help="synthetic patients; a quarter is held out")
    parser.add_argument("--epochs", type=int, default=20)
    options = parser.parse_args(argv)
    started = time.monotonic()
    folder = options.output_dir.resolve()

    for made_again in ("new_patient", "results", "results_of_shipped_weights"):
        shutil.rmtree(folder / made_again, ignore_errors=True)
    print(f"Making {options.cases} synthetic chest CTs in {folder / 'phantoms'} ...", flush=True)
    write_cohort(
        folder / "phantoms", options.cases, seed=1, shape=SHAPE, spacing=SPACING, n_folds=4, **PATIENTS
    )
    reduced = [
        *("--ckpt_dir", str(folder / "models"), "--cache_dir", str(folder / "cache")),
        *("--image_size", "[96,96]", "--network_def::channels", "[8,16,32,64,128]", "--num_workers", "0"),
        *("--batch_size", "8"),
    ]
    data = ["--dataset_dir", str(folder / "phantoms"), "--output_dir", str(folder / "scores")]
    epochs = [
        *("--epochs", str(options.epochs), "--decay_epochs", str(max(1, options.epochs // 2))),
        *("--val_interval", str(max(1, options.epochs // 4))),
    ]
    run_bundle("configs/train.json", *data, *reduced, *epochs)
    run_bundle("['configs/train.json','configs/evaluate.json']", *data, *reduced)

    scan = make_phantom(shape=SHAPE, spacing=SPACING, seed=1000, **PATIENTS)
    write_dicom_series(folder / "new_patient", scan.image, scan.affine, seed=1000)
    run_bundle(
        "configs/inference.json",
        *("--dataset_dir", str(folder / "new_patient"), "--output_dir", str(folder / "results")),
        *("--ckpt_path", str(folder / "models" / "model.pt"), *reduced[4:8]),
    )
    shipped = folder / "results_of_shipped_weights"
    run_bundle(
        "configs/inference.json",
        *("--dataset_dir", str(folder / "new_patient"), "--output_dir", str(shipped)),
        bundle=SHIPPED,
    )

    summary = json.loads((folder / "scores" / "scores.json").read_text(encoding="utf-8"))["summary"]
    dice, sensitivity, ppv = (  # PPV is unknown where nothing was found
        summary["per_case"]["metrics"][metric]["mean"] or 0.0 for metric in ("dice", "sensitivity", "ppv")
    )
    report, real = read_report(folder / "results"), read_report(shipped)
    truth = float((scan.label > 0).sum()) * SPACING[0] * SPACING[1] * SPACING[2] / 1000
    print(f"\nHeld-out synthetic patients (seed 0, {options.epochs} epochs at 96x96), mean over cases:")
    print(f"  Dice {dice:.3f}, sensitivity {sensitivity:.3f}, PPV {ppv:.3f}")
    found, percent = report["opacity_volume_ml"]["total"], report["opacity_percent_of_lung"]["total"]
    print(f"New patient (DICOM): opacity {found:.0f} mL, truth {truth:.0f} mL; {percent:.1f} % of the lungs")
    found, percent = real["opacity_volume_ml"]["total"], real["opacity_percent_of_lung"]["total"]
    print(f"The same, by the shipped nCoVSegNet: opacity {found:.0f} mL, {percent:.1f} % of the lungs")
    print("  (trained on slices of real patients; a synthetic one does not look like them)")
    print(f"Pictures, masks and reports: {folder / 'results'}, {shipped}")
    for picture in sorted([*(folder / "results").rglob("*.png"), *shipped.rglob("*.png")]):
        print(f"  {picture}")
    print(f"Done in {time.monotonic() - started:.0f} s.")
    if dice < EXPECTED_DICE:
        print(f"error: Dice is below {EXPECTED_DICE}; the installation is not right", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
