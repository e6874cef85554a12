# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""The app that a MONAI Label server runs; only its environment can import this.

MONAI Label has an app for bundles, which contacts the model zoo, loads weights that do not fit, stretches a
mask that was not inverted and answers an error with a traceback. This one does none of it.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from fastapi import HTTPException
from monailabel.endpoints import infer as infer_endpoint
from monailabel.interfaces.app import MONAILabelApp
from monailabel.interfaces.datastore import Datastore
from monailabel.interfaces.tasks.infer_v2 import InferTask
from monailabel.interfaces.tasks.strategy import Strategy
from monailabel.interfaces.tasks.train import TrainTask
from monailabel.tasks.activelearning.first import First
from monailabel.tasks.activelearning.random import Random
from monailabel.tasks.infer.bundle import BundleInferTask
from monailabel.tasks.train.bundle import BundleTrainTask

import custom
from custom.console import describe_error
from custom.data.files import write_nifti
from custom.deployment.label_datastore import CheckedDicomDatastore, write_segmentation

__all__ = ["OpacityApp"]

logger = logging.getLogger(__name__)

AFFINE_TOLERANCE_MM = 1e-2


class OpacityApp(MONAILabelApp):
    """Serves the bundles in ``<app>/model`` that ``conf["models"]`` names, separated by commas."""

    def __init__(self, app_dir: str, studies: str, conf: dict[str, str]) -> None:
        self.bundles = {name: os.path.join(app_dir, "model", name) for name in conf["models"].split(",")}
        # The endpoint calls this by name; the codes are not in its reach.
        infer_endpoint.nifti_to_dicom_seg = write_segmentation
        super().__init__(
            app_dir=app_dir,
            studies=studies,
            conf=conf,
            name=f"covid-ct-bundles {custom.__version__}",
            description="Lung opacities in chest CT. Research use only. Not a medical device.",
            version=custom.__version__,
        )

    def init_infers(self) -> dict[str, InferTask]:
        return {n: OpacityInference(path, self.conf) for n, path in self.bundles.items()}

    def init_trainers(self) -> dict[str, TrainTask]:
        return {
            name: OpacityTraining(path, self.conf, load_strict=True) for name, path in self.bundles.items()
        }

    def init_strategies(self) -> dict[str, Strategy]:
        return {"random": Random(), "first": First()}

    def _init_dicomweb_datastore(self) -> Datastore:
        self._download_dcmqi_tools()  # which are in the environment: nothing is downloaded
        return CheckedDicomDatastore(self.studies)

    def infer(self, request: Any, datastore: Any = None) -> Any:
        return _explained(super().infer, request, datastore)

    def next_sample(self, request: Any) -> Any:
        return _explained(super().next_sample, request)

    def train(self, request: Any) -> Any:
        return _explained(super().train, request)


def _explained(function: Callable[..., Any], *args: Any) -> Any:
    """Answer what is wrong with a scan in one line."""
    try:
        return function(*args)
    except HTTPException:
        raise
    except Exception as error:
        line = describe_error(error)
        if line is None:
            raise
        logger.error(line)
        raise HTTPException(status_code=422, detail=line) from error


class OpacityInference(BundleInferTask):
    """Runs a bundle's inference and writes its mask on the scan's own grid."""

    def __init__(self, path: str, conf: dict[str, str]) -> None:
        # Restoring by resizing would hide a mask that has not come back to the scan's grid.
        super().__init__(path, conf, type="segmentation", add_post_restore=False, load_strict=True)
        if not self.valid:
            raise FileNotFoundError(f"{path} has no weights")
        # One sigmoid channel: channel 0 becomes the value 1 in the mask.
        self.labels: dict[str, int] = {name: value for value, name in enumerate(self.labels, start=1)}

    def writer(
        self, data: dict[str, Any], extension: str | None = None, dtype: Any = None
    ) -> tuple[Any, Any]:
        """
        Args:
            data: holds ``pred`` (1, I, J, K) after inversion and ``scan``, the image as loaded.

        Raises:
            ValueError: When the mask is not on the scan's grid.
        """
        scan, mask = data["scan"], data["pred"]
        affine = np.asarray(scan.affine.cpu(), dtype=float)
        back = np.asarray(mask.affine.cpu(), dtype=float)
        if scan.shape[1:] != mask.shape[1:] or not np.allclose(affine, back, atol=AFFINE_TOLERANCE_MM):
            raise ValueError(
                "the mask is not on the scan's grid; postprocessing must invert every spatial step"
            )
        voxels = (np.asarray(mask.cpu())[0] > 0).astype(np.uint8)
        suffix = extension or data.get("result_extension") or ".nii.gz"
        if suffix not in (".nii", ".nii.gz"):
            data["pred"] = (mask[0] > 0).byte()  # MONAI Label's own writer, for viewers that want NRRD
            return super().writer(data, extension, dtype)
        handle, file = tempfile.mkstemp(suffix=suffix)
        os.close(handle)
        write_nifti(file, voxels, affine)
        return file, {}


class OpacityTraining(BundleTrainTask):
    """One round of training on the labels saved so far, starting from the served weights."""

    def __call__(self, request: dict[str, Any], datastore: Datastore) -> Any:
        """
        Args:
            request: what the client asks for. Viewers send an empty run id, which MONAI takes for the whole
                config, and would train twice.
            datastore: images and labels.
        """
        return super().__call__({key: value for key, value in request.items() if value != ""}, datastore)

    def _fetch_datalist(self, request: dict[str, Any], datastore: Datastore) -> list[dict[str, Any]]:
        cases = []
        for item in super()._fetch_datalist(request, datastore):
            name = Path(item["image"]).name.removesuffix(".gz").removesuffix(".nii")
            cases.append({**item, "name": name, "patient_id": name})
        if not cases:
            raise ValueError("no label has been saved yet: there is nothing to train on")
        return cases

    def _update_overrides(self, overrides: dict[str, Any]) -> None:
        overrides["device"] = f"$torch.device('{overrides['device']}')"
        if overrides.get("validate#dataset#data") == []:
            logger.warning("too few labels to keep one for validation: the last epoch's weights are kept")
            handlers: Sequence[Any] = overrides["train#handlers"]
            overrides["train#handlers"] = [h for h in handlers if h.get("_target_") != "ValidationHandler"]
