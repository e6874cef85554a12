# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What every bundle must do; a bundle's test joins with one :class:`Bundle`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
from monai.bundle import ConfigParser, ConfigWorkflow

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass(frozen=True)
class Bundle:
    """A bundle, and what makes it small enough for a test."""

    name: str
    reduced: dict = field(default_factory=dict)  # overrides of train, evaluate and inference
    overlays: tuple[str, ...] = ()  # laid over train.json

    @property
    def folder(self) -> Path:
        return ROOT / "bundles" / self.name

    def config(self, *names: str) -> list[str]:
        return [str(self.folder / "configs" / f"{name}.json") for name in names]

    def training_paths(self, work: Path, data: Path) -> dict:
        return {
            "bundle_root": str(self.folder),
            "dataset_dir": str(data),
            "output_dir": str(work / "eval"),
            "ckpt_dir": str(work / "models"),
            "cache_dir": str(work / "cache"),
            "num_workers": 0,
        }

    def workflow(
        self, kind: str, names: tuple[str, ...], overrides: dict, reduced: bool = True
    ) -> ConfigWorkflow:
        workflow = ConfigWorkflow(
            workflow_type=kind,
            config_file=self.config(*names),
            meta_file=str(self.folder / "configs" / "metadata.json"),
            logging_file=str(self.folder / "configs" / "logging.conf"),
            **{**(self.reduced if reduced else {}), **overrides},
        )
        workflow.initialize()
        return workflow


def run_bundle(
    bundle: Bundle, names: tuple[str, ...], overrides: dict, run_id: str = "run", cwd: Path = ROOT
) -> subprocess.CompletedProcess:
    """``python -m monai.bundle run`` in a process of its own."""
    return subprocess.run(
        bundle_command(bundle, names, overrides, run_id),
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def bundle_command(bundle: Bundle, names: tuple[str, ...], overrides: dict, run_id: str = "run") -> list[str]:
    config = str(bundle.config(*names))
    words = [sys.executable, "-m", "monai.bundle", "run", run_id, "--config_file", config]
    words += ["--logging_file", str(bundle.folder / "configs" / "logging.conf")]
    for key, value in {**bundle.reduced, **overrides}.items():
        words += [f"--{key}", value if isinstance(value, str) else repr(value)]
    return words


def train_evaluate_infer(bundle: Bundle, cohort: Path, work: Path) -> dict:
    """Run the three workflows in this process; returns the inference report of one phantom."""
    paths = bundle.training_paths(work, cohort)
    training = bundle.workflow("train", ("train",), {**paths, "epochs": 2})
    assert training.check_properties() == []
    training.run()
    training.finalize()
    for checkpoint in (work / "models").glob("checkpoint_*.pt"):
        checkpoint.unlink()  # nothing below needs them, and those of a ResNet-50 are large
    state = torch.load(work / "models" / "model.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())

    # Size and width of the network, window and size of its input come with the weights: nothing is said.
    evaluation = bundle.workflow("train", ("train", "evaluate"), paths, reduced=False)
    assert evaluation.check_properties() == []
    evaluation.run()
    check_scores(work / "eval", cases=2)

    (work / "scans").mkdir()
    source = sorted(cohort.glob("*_ct.nii.gz"))[0]
    (work / "scans" / source.name).symlink_to(source)
    inference = bundle.workflow(
        "infer",
        ("inference",),
        {
            "bundle_root": str(bundle.folder),
            "dataset_dir": str(work / "scans"),
            "output_dir": str(work / "output"),
            "ckpt_path": str(work / "models" / "model.pt"),
        },
        reduced=False,
    )
    assert inference.parser.get_parsed_content("image_size") == bundle.reduced["image_size"]
    assert inference.check_properties() == []
    inference.run()
    (report,) = (work / "output").rglob("*_report.json")
    return json.loads(report.read_text(encoding="utf-8"))


def check_scores(folder: Path, cases: int) -> None:
    """Every case has a row and the mask that was scored."""
    content = json.loads((folder / "scores.json").read_text(encoding="utf-8"))
    names = [row["name"] for row in content["cases"]]
    assert content["summary"]["cases"] == len(set(names)) == cases
    assert len((folder / "scores.csv").read_text(encoding="utf-8").splitlines()) == cases + 1
    assert {file.name.split(".")[0] for file in (folder / "predictions").iterdir()} == set(names)


def check_configs_agree(bundle: Bundle) -> None:
    """train defines what inference and evaluation take where nothing is beside the weights."""
    train, inference = ConfigParser(), ConfigParser()
    train.read_config(bundle.config("train"))
    inference.read_config(bundle.config("inference", "inference_slices"))
    assert train.get("network_def::_target_") == inference.get("network_def::_target_")
    evaluate = json.loads(Path(bundle.config("evaluate")[0]).read_text(encoding="utf-8"))
    told = set(train.get("weights_settings"))
    for key in told:
        taken = inference.get(key)
        assert taken["_target_"] == "custom.bundle.trained_with" and taken["key"] == key
        assert taken["default"] == train.get(key), key
        assert evaluate.get(key, taken) == taken, key
    around = {"image_size", "hu_window", "lung_margin_mm", "flip_inference", "match_greys", "threshold"}
    assert around <= told & set(evaluate)
    assert json.dumps(inference.get("network_def")).count("@") == len(told - around)
