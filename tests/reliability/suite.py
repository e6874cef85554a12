# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What is killed, starved and fed rubbish; run.py starts it."""

from __future__ import annotations

import argparse
import json
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import nibabel as nib
import numpy as np
import torch
from bundle_tester import ROOT, Bundle, bundle_command
from interrupting import interrupt_command, interruption_faults
from killing import Account, Command, kill_at_random, run_command
from lidc_phantom import write_case
from monai.networks.nets import resnet50
from rows import print_table, run_tests, say
from threshold_model import BUNDLE as THRESHOLD
from threshold_model import inference_overrides
from wholeness import differences

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
PARTS = ["kills", "interrupts", "inputs", "fuzz"]
EPOCHS = 8
FUZZ_FACTOR = 25
TABLES = [
    "tests/bundles/test_bad_inputs.py",
    "tests/scripts/test_bad_input_table.py",
    "tests/bundles/test_bundle_permissions.py",
    "tests/scripts/test_permissions.py",
    "tests/bundles/test_full_disk.py",
    "tests/data/test_files.py",
    "tests/bundles/test_interrupt.py",
    "tests/bundles/test_distributed_inference.py",
    "tests/data/test_work.py",
    "tests/handlers/test_checkpoint.py",
    "tests/handlers/test_shares.py",
    "tests/test_console.py",
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

    def commands(self) -> dict[str, tuple[Callable[[Path], Command], bool, int]]:
        """Makers of commands, whether they write checkpoints, and how many kills they get."""
        few = -(-self.kills // 3)
        made: dict[str, tuple[Callable[[Path], Command], bool, int]] = {}
        for bundle in BUNDLES:
            made[f"training of {bundle.name}"] = (
                lambda out, b=bundle: self.training(b, out),
                True,
                self.kills,
            )
        for bundle in BUNDLES:
            made[f"transfer of {bundle.name}"] = (lambda out, b=bundle: self.transfer(b, out), True, few)
        workers = {"num_workers": 2}
        made["training with two workers"] = (lambda out: self.training(BUNDLES[1], out, **workers), True, few)
        made["inference"] = (self.inference, False, few)
        made["prepare_covid"] = (self.prepare_covid, False, few)
        made["prepare_lidc"] = (self.prepare_lidc, False, few)
        made["make_phantoms"] = (self.make_phantoms, False, few)
        return made

    def run(self, wanted: str = "") -> list[Account]:
        """Kill the commands whose name has this in it."""
        accounts = []
        for number, (name, (make, checkpoints, kills)) in enumerate(self.commands().items()):
            if wanted not in name:
                continue
            place = self.folder / f"kills_{number}"
            accounts.append(kill_at_random(name, make, place, kills, self.chance, checkpoints, progress=say))
            shutil.rmtree(place)
        return accounts

    def interrupt(self) -> Account:
        """Ctrl-C at random moments after the first checkpoint of a training with workers; then to its end."""
        account, started = Account("Ctrl-C in a training with two workers"), time.monotonic()
        place = self.folder / "interrupts"
        place.mkdir()
        bundle, done = BUNDLES[1], 0

        def command(out: Path) -> Command:
            return self.training(bundle, out, num_workers=2)

        code, length = run_command(command(place / "whole"), place / "log.txt")
        if code:
            account.lost.append(f"it does not even run undisturbed: exit code {code}")
        for number in range(-(-self.kills // 3)):
            run = place / f"run_{number}"
            latest = run / "models" / "checkpoint_latest.pt"
            words = [sys.executable, "-m", "monai.bundle", *command(run).words]
            ended = interrupt_command(words, latest.is_file, self.chance.uniform(0, 0.6 * length))
            if ended[0] != 0:  # else it had ended before
                done += 1
                account.lost += interruption_faults(*ended)
            code, _ = run_command(command(run), place / "log.txt")
            account.lost += [f"started again it ends with exit code {code}"] if code else []
            account.lost += differences(place / "whole", run)
            say(f"{account.name}: {done}, run to its end, {'NOT EQUAL' if account.lost else 'equal'}")
        if not done:
            account.lost.append("no training was interrupted: each had ended before")
        account.tried = f"{done} times; one line, exit code 130, then run to its end"
        account.seconds = time.monotonic() - started
        shutil.rmtree(place)
        return account

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


def run_parts(parts: list[str], options: argparse.Namespace, seed: int, folder: Path) -> list[Account]:
    """Run some of the parts, one after the other."""
    accounts = []
    if "kills" in parts:
        accounts += Kills(folder, options.kills, seed).run(options.commands)
    if "interrupts" in parts:
        (folder / "ctrl_c").mkdir()
        accounts.append(Kills(folder / "ctrl_c", options.kills, seed).interrupt())
    if "inputs" in parts:
        say("bad inputs, full disk, Ctrl-C, several processes")
        accounts.append(run_tests("bad inputs, full disk, processes", TABLES, "tests of every entry point"))
    if "fuzz" in parts:
        say(f"properties and fuzzing, {FUZZ_FACTOR} times as often as in the tests")
        factor = {"FUZZ_FACTOR": str(FUZZ_FACTOR)}
        accounts.append(run_tests("properties and fuzzing", PROPERTIES, "properties", **factor))
    return accounts


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
    parser.add_argument("--kills", type=int, default=20, help="of each training; others get a third")
    parser.add_argument("--seed", type=int, default=None, help="of the moments (default: another each time)")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts, one after the other")
    parser.add_argument("--commands", default="", help="kill only commands whose name has this in it")
    parser.add_argument("--rows", type=Path, help="file for the rows of the table, instead of the table")
    options = parser.parse_args()
    seed = random.SystemRandom().randrange(2**31) if options.seed is None else options.seed
    torch.set_num_threads(1)
    started = time.monotonic()
    if not options.rows:
        say(f"seed {seed}; one thread; Python {sys.version.split()[0]}, torch {torch.__version__}")
    beside: subprocess.Popen | None = None
    # Whatever happens, nothing is left behind; what was lost is told with the last words of its log.
    with tempfile.TemporaryDirectory(prefix="reliability-") as name:
        folder = Path(name)
        try:
            if options.only:
                accounts = run_parts(options.only, options, seed, folder)
            else:
                # The kills take one core, and the rest another.
                words = [
                    sys.executable,
                    sys.argv[0],
                    "--only",
                    *PARTS[1:],
                    "--rows",
                    str(folder / "rows.json"),
                ]
                beside = subprocess.Popen([*words, "--seed", str(seed), "--kills", str(options.kills)])
                accounts = run_parts(PARTS[:1], options, seed, folder)
                if beside.wait() in (0, 1) and (folder / "rows.json").is_file():
                    rows = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
                    accounts += [Account(**row) for row in rows]
                else:
                    accounts.append(Account(", ".join(PARTS[1:]), lost=["it did not come to an end"]))
        finally:
            if beside is not None and beside.poll() is None:
                beside.send_signal(signal.SIGINT)
                beside.wait()
    if options.rows:
        write_json(options.rows, [asdict(account) for account in accounts])
    else:
        print_table(accounts)
        print(f"seed {seed}, {time.monotonic() - started:.0f} s")
    return int(any(account.lost for account in accounts))
