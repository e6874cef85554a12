# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Small models, a server started as a user starts it, and a client of its REST calls."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import requests

from custom.bundle.packing import pack_bundle
from custom.bundle.standards import Standards
from custom.data.phantom_cohort import write_cohort

ROOT = Path(__file__).resolve().parent.parent.parent
SCOATNET = "covid_ct_scoatnet_segmentation"
ATTENTION = "covid_ct_attention_unet_segmentation"
NCOVSEGNET = "covid_ct_ncovsegnet_segmentation"
NAMES = (SCOATNET, ATTENTION, NCOVSEGNET)

# What makes the networks small, as settings of the server; each bundle takes the keys that it has.
SMALL: dict[str, Any] = {"image_size": [64, 64], "network_def::channels": [8] * 5, "width": 0.02}
TRAINING = {SCOATNET: (8, 0.002), ATTENTION: (12, 0.002), NCOVSEGNET: (5, 0.002)}  # epochs, learning rate
TALKED_TO: list[str] = []
START_SECONDS, INFER_SECONDS, TRAIN_SECONDS = 300, 300, 600


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def settings_of(name: str) -> dict[str, Any]:
    """The small settings that a bundle has."""
    config = json.loads((ROOT / "bundles" / name / "configs" / "inference.json").read_text())
    known = {
        "image_size": True,
        "network_def::channels": "channels" in config["network_def"],
        "width": "width" in config,
    }
    return {key: value for key, value in SMALL.items() if known[key]}


def bundle_command(name: str, config: str, **overrides: Any) -> list[str]:
    """``python -m monai.bundle run`` with the small settings."""
    words = [sys.executable, "-m", "monai.bundle", "run"]
    words += ["--config_file", str(ROOT / "bundles" / name / "configs" / f"{config}.json")]
    words += ["--bundle_root", str(ROOT / "bundles" / name)]
    for key, value in {**settings_of(name), **overrides}.items():
        words += [f"--{key}", value if isinstance(value, str) else repr(value)]
    return words


def train_models(folder: Path) -> dict[str, Path]:
    """Train the three bundles for a moment; returns their weights files."""
    shape = {"shape": (64, 64, 8), "spacing": (5.4, 5.4, 34.0), "burden": 0.6}
    write_cohort(folder / "cohort", 8, seed=1, n_folds=4, lesions=("ground_glass", "consolidation"), **shape)
    running = {}
    for name, (epochs, learning_rate) in TRAINING.items():
        command = bundle_command(
            name,
            "train",
            dataset_dir=str(folder / "cohort"),
            ckpt_dir=str(folder / name),
            output_dir=str(folder / "eval" / name),
            cache_dir=str(folder / "cache" / name),
            num_workers=0,
            batch_size=8,
            epochs=epochs,
            val_interval=epochs,
            learning_rate=learning_rate,
        )
        log = folder / f"{name}.log"
        with open(log, "w", encoding="utf-8") as file:
            running[name] = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    for name, process in running.items():
        assert process.wait(TRAIN_SECONDS) == 0, (folder / f"{name}.log").read_text()[-2000:]
    return {name: folder / name / "model.pt" for name in NAMES}


def segment(name: str, weights: Path, scans: Path, output: Path) -> dict[str, nib.Nifti1Image]:
    """What ``monai.bundle run`` writes: the masks by name of the study."""
    command = bundle_command(
        name, "inference", dataset_dir=str(scans), output_dir=str(output), ckpt_path=str(weights)
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    masks = sorted(output.rglob("*_opacity.nii.gz"))
    return {mask.name.removesuffix("_opacity.nii.gz"): nib.load(mask) for mask in masks}


def pack_and_unpack(name: str, folder: Path) -> Path:
    """A bundle without weights, as who gets its zip has it."""
    source = folder / "source" / name
    leave = shutil.ignore_patterns("models", "eval", "cache")
    shutil.copytree(ROOT / "bundles" / name, source, ignore=leave)
    packed = pack_bundle(source, folder / f"{name}.zip", Standards.of_repository(ROOT).requirements)
    with zipfile.ZipFile(packed.path) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked" / name


class Server:
    """``scripts/serve_label.py`` on bundles of the repository or unpacked zips, and a client of it."""

    def __init__(
        self, folder: Path, models: dict[str, Path], studies: str, unpacked: dict[str, Path] | None = None
    ) -> None:
        self.folder = folder
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.output = folder / "serve_label.txt"
        bundles = [str((unpacked or {}).get(name, ROOT / "bundles" / name)) for name in models]
        known = {key for name in models for key in settings_of(name)}
        settings = [f"{key}={json.dumps(value)}" for key, value in SMALL.items() if key in known]
        command = [sys.executable, str(ROOT / "scripts" / "serve_label.py"), "--studies", studies]
        command += ["--app-dir", str(folder / "app"), "--port", str(self.port), "--set", *settings]
        command += ["--bundles", *bundles, "--weights", *(str(file) for file in models.values())]
        with open(self.output, "w", encoding="utf-8") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        self._wait()

    def _wait(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while "Ctrl-C stops it." not in self.said():
            assert self.process.poll() is None and time.monotonic() < deadline, self.said()
            time.sleep(0.2)
        TALKED_TO.extend(line for line in self.said().splitlines() if re.search(r"^python|is up|OHIF", line))

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8")

    def log(self) -> str:
        return (self.folder / "app" / "logs" / "server.log").read_text(encoding="utf-8", errors="replace")

    def weights(self, name: str) -> Path:
        return self.folder / "app" / "model" / name / "models" / "model.pt"

    def stop(self, kind: signal.Signals = signal.SIGTERM) -> int:
        self.process.send_signal(kind)
        return self.process.wait(30)

    def get(self, path: str, **query: Any) -> Any:
        answer = requests.get(f"{self.url}{path}", params=query, timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def next_sample(self, strategy: str) -> dict[str, Any]:
        answer = requests.post(f"{self.url}/activelearning/{strategy}", json={}, timeout=INFER_SECONDS)
        assert answer.ok, answer.text
        return dict(answer.json())

    def infer(self, name: str, image: str, output: str = "image", **params: Any) -> requests.Response:
        return requests.post(
            f"{self.url}/infer/{name}",
            params={"image": image, "output": output},
            data={"params": json.dumps(params)},
            timeout=INFER_SECONDS,
        )

    def mask(self, name: str, image: str, file: Path) -> nib.Nifti1Image:
        answer = self.infer(name, image)
        assert answer.status_code == 200, answer.text
        file.write_bytes(answer.content)
        return nib.load(file)

    def save_label(self, image: str, label: Path, **params: Any) -> requests.Response:
        with open(label, "rb") as file:
            return requests.put(
                f"{self.url}/datastore/label",
                params={"image": image, "tag": "final"},
                data={"params": json.dumps(params)},
                files={"label": (label.name, file)},
                timeout=60,
            )

    def train(self, name: str, **params: Any) -> list[str]:
        """Train in the background, as viewers ask for it; returns the last lines that training wrote."""
        sent = {"run_id": "", "tracking": ["None"], "tracking_uri": "", "max_epochs": 1, **params}
        answer = requests.post(f"{self.url}/train/{name}", json=sent, timeout=60)
        assert answer.ok, answer.text
        deadline = time.monotonic() + TRAIN_SECONDS
        while True:
            time.sleep(1)
            status = self.get("/train/")
            if status["status"] not in ("SUBMITTED", "RUNNING"):
                break
            assert time.monotonic() < deadline, status
        assert status["status"] == "DONE", status
        return list(status["details"])


@contextlib.contextmanager
def serving(
    folder: Path, models: dict[str, Path], studies: str, unpacked: dict[str, Path] | None = None
) -> Iterator[Server]:
    folder.mkdir(parents=True, exist_ok=True)
    server = Server(folder, models, studies, unpacked)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


def check_same(mask: nib.Nifti1Image, expected: nib.Nifti1Image, affine: np.ndarray) -> None:
    """Same voxels, in the source's place, and not a mask that would be the same whatever one did."""
    found, wanted = np.asarray(mask.dataobj), np.asarray(expected.dataobj)
    assert 0 < np.count_nonzero(wanted) < wanted.size / 2
    assert found.shape == wanted.shape and np.array_equal(found > 0, wanted > 0)
    assert np.array_equal(mask.affine.astype(np.float32), affine.astype(np.float32)), "as NIfTI stores it"


def centroid(mask: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Centre of mass in patient space, RAS mm."""
    return nib.affines.apply_affine(affine, np.argwhere(mask).mean(axis=0))


def listening_addresses(port: int) -> set[str]:
    """Addresses that some process listens on with this port, from the kernel's own table."""
    found = set()
    for line in Path("/proc/net/tcp").read_text().splitlines()[1:]:
        address, state = line.split()[1], line.split()[3]
        host, number = address.split(":")
        if state == "0A" and int(number, 16) == port:
            found.add(socket.inet_ntoa(bytes.fromhex(host)[::-1]))
    return found
