# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Score a folder of predictions against a folder of truths.

python scripts/score.py --predictions PREDICTIONS --truths TRUTHS --output scores

Both hold NIfTI files or 8-bit pictures (PNG, JPG, BMP, TIFF), also in sub-folders; a prediction may be a mask
or a map of probabilities. They are paired by file name without its suffix, never by order, and every one must
have its partner. Printed are means over slices and cases, and pooled values; OUTPUT.csv has a row for each
case, OUTPUT.json the same and the summary with the protocol of each mean.

A bundle with weights can be given in place of predictions. It segments IMAGES first, slices or volumes:

    python scripts/score.py --bundle bundles/covid_ct_ncovsegnet_segmentation --images IMAGES \\
        --truths MASKS --output scores

Its results are kept in OUTPUT_predictions. Slices are scored by their maps of probabilities, so that MAE is
the mean of |probability - truth|; volumes by their masks. Slices that are not stored upright need
--stored-orientation (transposed, rotated-90, ...); masks come back as the slices are stored.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from custom.bundle import trained_with
from custom.console import CohortError, bar_interval, command, describe_error
from custom.data.pictures import PICTURES, read_grey
from custom.data.scans import is_nifti, read_scan
from custom.metrics import ScoredCase, score_cases, summarize_scores
from custom.reporting.scores import format_summary, grid_geometry, write_scores
from custom.transforms.invert import check_threshold

SHIFT_MM = 0.05  # farther apart than rounding in a header can put two copies of one grid
ROUNDING = 1e-5  # a map stored as bytes with a scale of 1/255 comes back as 1.0000001


class MaskFolder:
    """The masks of a folder by name.

    Args:
        folder: searched with its sub-folders; hidden files are left aside.
        kind: "prediction" or "truth", for messages.
        suffix: end of the file names that belong, before ``.nii.gz`` or ``.png``; not part of the name.
        maximum: value that stands for 1; None: 255 in pictures, 1 in NIfTI files.
    """

    def __init__(self, folder: Path, kind: str, suffix: str = "", maximum: float | None = None) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"folder of {kind}s not found: {folder}")
        if maximum is not None and maximum <= 0:
            raise ValueError(f"--{kind}-max must be above 0, got {maximum}")
        self.folder, self.kind, self.maximum = folder, kind, maximum
        self.greatest_in_pictures = 0.0
        self.files: dict[str, Path] = {}
        for path in sorted(folder.rglob("*")):
            stem = _stem(path)
            if stem is None or any(part.startswith(".") for part in path.relative_to(folder).parts):
                continue
            if not stem.endswith(suffix) or not (path.is_file() or path.is_symlink()):
                continue
            name = stem[: len(stem) - len(suffix)]
            if name in self.files:
                raise ValueError(f"two {kind}s have the name '{name}': {self.files[name]} and {path}")
            self.files[name] = path
        if not self.files:
            ending = f" whose name ends in '{suffix}'" if suffix else ""
            raise FileNotFoundError(f"no {kind} in {folder}: neither a NIfTI file nor a picture{ending}")

    def read(self, name: str) -> tuple[np.ndarray, np.ndarray | None]:
        """Values from 0 to 1, (H, W) or (I, J, K), and the affine of a NIfTI file."""
        path = self.files[name]
        affine = None
        if is_nifti(path):
            scan = read_scan(path)
            values, affine = scan.voxels, scan.affine
        else:
            values = read_grey(path).astype(np.float32)
        least, greatest = float(values.min()), float(values.max())
        maximum = self.maximum or (255.0 if affine is None else 1.0)
        slack = ROUNDING * maximum
        if not (least >= -slack and greatest <= maximum + slack):
            raise ValueError(
                f"{self.kind} {path} holds values from {least:g} to {greatest:g}, not from 0 to {maximum:g}; "
                f"if another value stands for 1, say --{self.kind}-max"
            )
        if affine is None:
            self.greatest_in_pictures = max(self.greatest_in_pictures, greatest)
        return np.clip(values / np.float32(maximum), 0, 1), affine

    def check_values(self) -> None:
        """Refuse pictures of 0 and 1, in which nothing at all would come out as foreground.

        Only all pictures together tell: a single map of probabilities may well be this dark.
        """
        if self.greatest_in_pictures == 1 and self.maximum is None:
            raise ValueError(
                f"the pictures in {self.folder} hold 0 and 1 only, where 255 is taken to stand for 1; "
                f"if 1 does, say --{self.kind}-max 1"
            )


def _stem(path: Path) -> str | None:
    """File name without the suffix, None where it is neither NIfTI nor picture."""
    if is_nifti(path):
        return path.name[: path.name.lower().rindex(".nii")]
    return path.stem if path.suffix.lower() in PICTURES else None


def pair_names(predictions: MaskFolder, truths: MaskFolder) -> list[str]:
    """Names that both folders have, which must be all.

    Raises:
        FileNotFoundError: When a prediction has no truth or a truth no prediction.
    """
    for one, other in ((truths, predictions), (predictions, truths)):
        alone = sorted(set(one.files) - set(other.files))
        if alone:
            named = ", ".join(f"'{name}'" for name in alone[:5]) + (", ..." if len(alone) > 5 else "")
            raise FileNotFoundError(
                f"{len(alone)} of {len(one.files)} {one.kind}s have no {other.kind} of the same name in "
                f"{other.folder}: {named}; for ends of names that differ see --truth-suffix and "
                "--prediction-suffix"
            )
    return sorted(truths.files)


def read_cases(
    predictions: MaskFolder, truths: MaskFolder, names: Iterable[str], failures: list[dict[str, str]]
) -> Iterator[ScoredCase]:
    """Read one pair after the other.

    Args:
        predictions: what is scored.
        truths: against what.
        names: of the pairs.
        failures: gets name and reason of each pair that cannot be read, differs in size or place, or holds
            values that are neither mask nor map.
    """
    for name in names:
        try:
            case = _read_pair(predictions, truths, name)
        except (OSError, ValueError) as error:
            failures.append({"name": name, "reason": describe_error(error) or str(error)})
            continue
        yield case


def _read_pair(predictions: MaskFolder, truths: MaskFolder, name: str) -> ScoredCase:
    soft, place = predictions.read(name)
    truth, affine = truths.read(name)
    files = f"{predictions.files[name]} and {truths.files[name]}"
    if soft.shape != truth.shape:
        raise ValueError(f"{files} differ in size: {soft.shape} and {truth.shape} pixels")
    return ScoredCase(name, soft, truth >= 0.5, **_geometry(place, affine, soft.shape, files))


def _geometry(
    place: np.ndarray | None, affine: np.ndarray | None, shape: tuple[int, ...], files: str
) -> dict[str, Any]:
    if affine is None or place is None:
        return {}
    corners = np.stack(np.meshgrid(*((0, n - 1) for n in shape), 1, indexing="ij")).reshape(4, -1)
    shift = float(np.linalg.norm(((place - affine) @ corners)[:3], axis=0).max())
    if shift > SHIFT_MM:
        raise ValueError(
            f"{files} lie in different places, up to {shift:.3g} mm apart: their affines differ; "
            "resample one onto the other"
        )
    return grid_geometry(affine)


def own_threshold(bundle: Path, settings: Iterable[str]) -> float:
    """The probability from which on a bundle's inference puts a voxel into the mask.

    Args:
        bundle: its folder.
        settings: ``KEY=VALUE`` for the configs, of which the last of a key holds.

    Raises:
        ValueError: When it is no probability, or the file of settings cannot be read.
    """
    given = dict(setting.split("=", 1) for setting in settings if "=" in setting)
    if "threshold" in given:
        try:
            return check_threshold(float(given["threshold"]))
        except ValueError:
            raise ValueError(
                f"--set threshold={given['threshold']}: it must be a probability above 0 and below 1"
            ) from None
    return float(trained_with(bundle / given.get("ckpt_path", "models/model.pt"), "threshold", 0.5))


def segment(bundle: Path, images: Path, output: Path, orientation: str, settings: Iterable[str]) -> Path:
    """Run a bundle's inference on slices or volumes.

    Args:
        bundle: its folder.
        images: folder of pictures or of scans.
        output: folder for the results; what an earlier run left there is removed.
        orientation: how slices are stored.
        settings: further ``KEY=VALUE`` for the configs.

    Returns:
        The folder of the predictions.
    """
    configs = [bundle / "configs" / f"{name}.json" for name in ("inference", "inference_slices")]
    if not configs[0].is_file():
        raise FileNotFoundError(f"{bundle} is no bundle: it has no configs/inference.json")
    if not images.is_dir():
        raise FileNotFoundError(f"folder of images not found: {images}")
    slices = any(path.suffix.lower() in PICTURES for path in images.rglob("*"))
    words = ["--config_file", str([str(config.resolve()) for config in configs[: 1 + slices]])]
    words += ["--logging_file", str(configs[0].with_name("logging.conf").resolve()), "--bundle_root", "."]
    words += ["--dataset_dir", str(images.resolve()), "--output_dir", str(output.resolve())]
    words += ["--probabilities", "True", "--stored_orientation", orientation] if slices else []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not key or not equals:
            raise ValueError(f"--set '{setting}' is no KEY=VALUE")
        words += [f"--{key}", value]
    shutil.rmtree(output, ignore_errors=True)
    code = subprocess.run([sys.executable, "-m", "monai.bundle", "run", *words], cwd=bundle).returncode
    if code:
        raise ValueError(f"the bundle ended with exit code {code}; its last line above says why")
    return output / "probabilities" if slices else output


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    given = parser.add_mutually_exclusive_group(required=True)
    given.add_argument("--predictions", type=Path, help="folder of the predictions")
    given.add_argument("--bundle", type=Path, help="folder of a bundle with weights, to predict with")
    parser.add_argument("--images", type=Path, help="folder of slices or scans for the bundle")
    parser.add_argument(
        "--stored-orientation", default="upright", help="of the slices for the bundle (default: upright)"
    )
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="for the bundle's configs"
    )
    parser.add_argument("--truths", type=Path, required=True, help="folder of the truths")
    parser.add_argument(
        "--output", type=Path, required=True, help="where to write: OUTPUT.csv and OUTPUT.json"
    )
    parser.add_argument(
        "--threshold",
        type=float,
        help="probability that counts as predicted (default: the bundle's own, and 0.5 without a bundle)",
    )
    for kind, example in (("prediction", "_opacity"), ("truth", "_mask")):
        parser.add_argument(
            f"--{kind}-suffix",
            default="",
            help=f"take only {kind}s whose names end in this, as {example}, which is not part of the name",
        )
        parser.add_argument(
            f"--{kind}-max",
            type=float,
            help=f"value that stands for 1 in {kind}s (default: 255 in pictures, 1 in NIfTI files)",
        )
    parser.add_argument(
        "--surface-tolerance",
        type=float,
        default=3.0,
        help="distance in mm up to which a surface counts as met in the surface Dice (default: 3)",
    )
    args = parser.parse_args(argv)
    output = args.output.with_suffix("") if args.output.suffix in (".csv", ".json") else args.output
    if (args.bundle is None) != (args.images is None):
        raise ValueError("--bundle and --images go together: the bundle segments the images")
    suffix = args.prediction_suffix
    if args.bundle is not None:
        if args.threshold is not None:
            args.set.append(f"threshold={args.threshold}")
        args.threshold = own_threshold(args.bundle, args.set)
        kept = output.with_name(f"{output.name}_predictions")
        args.predictions = segment(args.bundle, args.images, kept, args.stored_orientation, args.set)
        suffix = suffix or ("_opacity" if args.predictions == kept else "")
    threshold = 0.5 if args.threshold is None else args.threshold
    predictions = MaskFolder(args.predictions, "prediction", suffix, args.prediction_max)
    truths = MaskFolder(args.truths, "truth", args.truth_suffix, args.truth_max)
    names = pair_names(predictions, truths)
    bar = tqdm(names, desc="scoring", unit="case", dynamic_ncols=True, mininterval=bar_interval())
    failures: list[dict[str, str]] = []
    cases = read_cases(predictions, truths, bar, failures)
    scores = list(score_cases(cases, threshold, args.surface_tolerance))
    for folder in (predictions, truths):
        folder.check_values()
    if not scores:
        raise CohortError(failures, len(names), "cases")
    summary = summarize_scores(scores)
    settings = {"threshold": threshold, "surface_tolerance_mm": args.surface_tolerance}
    written = write_scores(output, scores, summary, settings, failures)
    print(format_summary(summary))
    print("written: " + ", ".join(os.fspath(path) for path in written))
    if failures:
        raise CohortError(failures, len(names), "cases")


if __name__ == "__main__":
    sys.exit(main())
