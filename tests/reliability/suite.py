# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What is killed, starved and fed rubbish; run.py starts it."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from bundle_tester import ROOT, Bundle, bundle_command
from killing import Account, Command, kill_at_random
from lidc_phantom import write_case
from monai.networks.nets import resnet50
from threshold_model import BUNDLE as THRESHOLD
from threshold_model import inference_overrides

from custom.data import make_phantom, read_datalist, write_json
from custom.data.phantom_cohort import write_cohort

__all__ = ["main"]

BUNDLES = [
    Bundle(
        "covid_ct_scoatnet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [8] * 5, "batch_size": 4},
    ),
    Bundle(
        "covid_ct_attention_unet_segmentation",
        reduced={"image_size": [32, 32], "network_def::channels": [4, 4, 8, 8, 8], "batch_size": 4},
    ),
    Bundle(
        "covid_ct_ncovsegnet_segmentation",
        reduced={"image_size": [64, 64], "width": 0.02, "batch_size": 4, "scales": [0.5, 1.0]},
    ),
]
EPOCHS = 8
FUZZ_FACTOR = 25
TABLES = [
    "tests/bundles/test_bad_inputs.py",
    "tests/scripts/test_bad_input_table.py",
    "tests/bundles/test_full_disk.py",
    "tests/data/test_files.py",
    "tests/handlers/test_checkpoint.py",
]
PROPERTIES = [
    "tests/data/test_datalist_properties.py",
    "tests/data/test_dicom_properties.py",
    "tests/data/test_lidc_properties.py",
    "tests/data/test_scan_fuzz.py",
    "tests/transforms/test_lung_properties.py",
]


class Kills:
    """Every command that takes long, killed at random.

    Args:
        folder: for data and results.
        kills: of each command.
        seed: of the moments.
    """

    def __init__(self, folder: Path, kills: int, seed: int) -> None:
        self.folder, self.kills = folder, kills
        self.chance = random.Random(seed)
        self.cohort = folder / "cohort"
        write_cohort(self.cohort, 6, seed=3, shape=(48, 48, 6), spacing=(7.2, 7.2, 45.0), n_folds=3)

    def commands(self) -> dict[str, tuple[Callable[[Path], Command], bool]]:
        """Makers of commands, and whether they write checkpoints."""
        made: dict[str, tuple[Callable[[Path], Command], bool]] = {}
        for bundle in BUNDLES:
            made[f"training of {bundle.name}"] = (lambda out, b=bundle: self.training(b, out), True)
        made["training with two workers"] = (lambda out: self.training(BUNDLES[2], out, num_workers=2), True)
        for bundle in BUNDLES:
            made[f"transfer of {bundle.name}"] = (lambda out, b=bundle: self.transfer(b, out), True)
        made["inference"] = (self.inference, False)
        made["prepare_covid"] = (self.prepare_covid, False)
        made["prepare_lidc"] = (self.prepare_lidc, False)
        made["make_phantoms"] = (self.make_phantoms, False)
        return made

    def run(self) -> list[Account]:
        accounts = []
        for number, (name, (make, checkpoints)) in enumerate(self.commands().items()):
            place = self.folder / f"kills_{number}"
            accounts.append(
                kill_at_random(name, make, place, self.kills, self.chance, checkpoints, progress=say)
            )
            if not accounts[-1].lost:
                shutil.rmtree(place)
        return accounts

    def training(self, bundle: Bundle, out: Path, **more: int) -> Command:
        paths = {**bundle.training_paths(out, self.cohort), "epochs": EPOCHS, **more}
        return Command("monai.bundle", bundle_command(bundle, ("train",), paths)[3:])

    def transfer(self, bundle: Bundle, out: Path) -> Command:
        """All stages the bundle has: for nCoVSegNet from ImageNet's weights too, made up here."""
        nodules, weights = self.folder / "nodules", self.folder / "resnet50.pth"
        if not nodules.is_dir():
            shutil.copytree(self.cohort, nodules)
            content = read_datalist(nodules / "datalist.json")
            content["validation"] = [content["training"].pop()]
            write_json(nodules / "datalist.json", content)
            torch.manual_seed(7)
            options = {"num_classes": 1000, "conv1_t_stride": 2, "bias_downsample": False}
            torch.save(resnet50(spatial_dims=2, n_input_channels=3, **options).state_dict(), weights)
        from_imagenet = "ncovsegnet" in bundle.name
        small = {**bundle.reduced, "num_workers": 0, "epochs": 3}
        overrides = {
            "bundle_root": str(bundle.folder),
            "output_dir": str(out),
            "covid_dir": str(self.cohort),
            "nodules_dir": str(nodules),
            "modes": ["none", *(["imagenet"] if from_imagenet else []), "two-stage"],
            "overrides": small,
            **({"imagenet_weights": str(weights)} if from_imagenet else {}),
        }
        plain = Bundle(bundle.name)
        return Command("monai.bundle", bundle_command(plain, ("transfer",), overrides)[3:])

    def inference(self, out: Path) -> Command:
        scans = self.folder / "scans"
        if not scans.is_dir():
            scans.mkdir()
            for number in range(4):
                phantom = make_phantom((64, 64, 16), (5.4, 5.4, 17.0), seed=number)
                nib.save(nib.Nifti1Image(phantom.image, phantom.affine), scans / f"{number}.nii.gz")
        overrides = inference_overrides(self.folder / "weights", scans, size=64) | {"output_dir": str(out)}
        return Command("monai.bundle", bundle_command(THRESHOLD, ("inference",), overrides)[3:])

    def prepare_covid(self, out: Path) -> Command:
        source = self.folder / "mosmed"
        if not source.is_dir():
            phantom = make_phantom((48, 48, 8), (7.2, 7.2, 34.0), seed=1, burden=0.6)
            for number in range(8):
                for kind, end, array in (
                    ("studies", "", phantom.image + np.int16(number)),
                    ("masks", "_mask", 2 * (phantom.label > 0).astype(np.uint8)),
                ):
                    (source / kind).mkdir(parents=True, exist_ok=True)
                    name = f"study_{number:04d}{end}.nii.gz"
                    nib.save(nib.Nifti1Image(array, phantom.affine), source / kind / name)
            for kind, file in (("rp_im", "studies/study_0000"), ("rp_msk", "masks/study_0000_mask")):
                for number in range(1, 7):
                    (source / "medseg" / kind).mkdir(parents=True, exist_ok=True)
                    shutil.copy(source / f"{file}.nii.gz", source / "medseg" / kind / f"{number}.nii.gz")
        words = ["medseg", "--source", source / "medseg", "--output-dir", out, "--volumes-as-slices"]
        return script("prepare_covid", *words)

    def make_phantoms(self, out: Path) -> Command:
        return script("make_phantoms", "--output-dir", out, "--cases", 4, "--shape", 48, 48, 8)

    def prepare_lidc(self, out: Path) -> Command:
        source = self.folder / "lidc"
        if not source.is_dir():
            for number in range(1, 5):
                write_case(source, number)
        return script("prepare_lidc", "--source", source, "--output-dir", out)


def script(name: str, *words: object) -> Command:
    return Command(str(ROOT / "scripts" / f"{name}.py"), [str(word) for word in words])


def run_tests(name: str, files: list[str], what: str, **environment: str) -> Account:
    """Run tests as one row of the account."""
    started = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", "addopts=-q", "-p", "no:cacheprovider", *files],
        cwd=ROOT,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    lost = re.findall(r"^(?:FAILED|ERROR) (.+)$", done.stdout, re.MULTILINE)
    if done.returncode and not lost:
        lost = [f"pytest ended with exit code {done.returncode}: {done.stdout[-500:]}"]
    if lost:
        print(done.stdout[-5000:])
    passed = (re.findall(r"(\d+) passed", done.stdout) or ["0"])[-1]
    return Account(name, f"{passed} {what}", lost, time.monotonic() - started)


def say(line: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {line}", flush=True)


def main(description: str) -> int:
    """Run what the command line asks for.

    Args:
        description: for its help.

    Returns:
        0 when nothing was lost, else 1.
    """
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20, help="of each command (default: 20)")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    parser.add_argument("--only", nargs="+", choices=["kills", "inputs", "fuzz"], help="these parts")
    parser.add_argument("--commands", default="", help="kill only commands whose name has this in it")
    options = parser.parse_args()
    parts = options.only or ["kills", "inputs", "fuzz"]
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    say(f"seed {seed}; one thread; Python {sys.version.split()[0]}, torch {torch.__version__}")
    torch.set_num_threads(1)
    started, accounts = time.monotonic(), []
    folder = Path(tempfile.mkdtemp(prefix="reliability-"))
    if "kills" in parts:
        kills = Kills(folder, options.kills, seed)
        wanted = {name: made for name, made in kills.commands().items() if options.commands in name}
        kills.commands = lambda: wanted  # type: ignore[method-assign]
        accounts += kills.run()
    if "inputs" in parts:
        say("bad inputs, full disk, Ctrl-C")
        accounts.append(run_tests("bad inputs, full disk, Ctrl-C", TABLES, "tests of every entry point"))
    if "fuzz" in parts:
        say(f"properties and fuzzing, {FUZZ_FACTOR} times as often as in the tests")
        factor = {"FUZZ_FACTOR": str(FUZZ_FACTOR)}
        accounts.append(run_tests("properties and fuzzing", PROPERTIES, "properties", **factor))
    print(f"\n{'what':52}{'tried':75}{'lost':10}time")
    for account in accounts:
        lost = f"{len(account.lost)} !" if account.lost else "nothing"
        print(f"{account.name:52}{account.tried:75}{lost:10}{account.seconds:.0f} s")
    lost = [f"{account.name}: {line}" for account in accounts for line in account.lost]
    print(f"\nlost: {json.dumps(lost, indent=2, ensure_ascii=False) if lost else 'nothing'}")
    print(f"seed {seed}, {time.monotonic() - started:.0f} s", f"; see {folder}" if lost else "")
    if not lost:
        shutil.rmtree(folder)
    return 1 if lost else 0
