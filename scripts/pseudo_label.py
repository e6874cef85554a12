# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Let trained networks draw masks on unlabelled slices, and keep those that are certain, to train on.

python scripts/pseudo_label.py UNLABELLED --bundle bundles/covid_ct_ncovsegnet_segmentation \\
    --weights RUN/runs/ncovsegnet/fold_0/models/model.pt --unseen-fold 0 --output-dir PSEUDO

UNLABELLED is what "prepare_covid.py unlabelled" wrote. Several weights, of one bundle, are averaged, and each
sees every slice and its mirror image. The result's datalist.json is for training only, and goes with labelled
slices onto one list by "prepare_covid.py join". Predictions are kept: run again, it goes on where it stopped,
and other rules need no network. Exit code: 0 when every slice was predicted, 1 when some failed (the others
are on the list), 2 when none could be or an option is wrong.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any

from custom.bundle.pseudo_labels import write_pseudo_labels
from custom.bundle.teachers import Teachers
from custom.console import command
from custom.data.confidence import ConfidenceRules
from custom.data.join_lists import parse_fold


def parse_settings(settings: list[str]) -> dict[str, Any]:
    parsed = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals or not key:
            raise ValueError(f"'{setting}' is no KEY=VALUE")
        try:
            parsed[key] = json.loads(value)
        except json.JSONDecodeError:
            parsed[key] = value
    return parsed


@command
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("unlabelled", type=Path, help='folder that "prepare_covid.py unlabelled" wrote')
    parser.add_argument("--bundle", type=Path, required=True, help="folder of the bundle")
    parser.add_argument("--weights", type=Path, nargs="+", required=True, help="weights files, averaged")
    parser.add_argument(
        "--unseen-fold",
        required=True,
        metavar="FOLD",
        help="the fold that none of the weights was trained on; 'none' where they were trained on all",
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="gets masks/ and datalist.json")
    parser.add_argument(
        "--overlays",
        nargs="+",
        default=["train_slices"],
        help="configs of the bundle, or JSON files, laid over train.json (default: train_slices)",
    )
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a key of the configs as it was in training, e.g. image_size=[256,256]; may be repeated. "
        "Settings beside the weights (model.json) are taken over by themselves",
    )
    parser.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    for name, text in (
        ("min-area", "least predicted part of a slice"),
        ("min-certainty", "least mean of max(p, 1 - p) over the predicted region"),
        ("min-stability", "least intersection over union of the regions above 0.25 and 0.75"),
        ("empty-below", "highest probability of a slice that counts as certainly empty"),
        ("keep-empty", "share of the certainly empty slices that is kept, as negatives"),
        ("keep-positive", "share of the slices that pass with opacities, the most certain first"),
    ):
        default = getattr(ConfidenceRules, name.replace("-", "_"))
        parser.add_argument(f"--{name}", type=float, default=default, help=f"{text} (default: {default:g})")
    options = parser.parse_args(argv)
    # MONAI sets up all its readers, and one of them warns about a library that is of no use here.
    warnings.filterwarnings("ignore", message="NvImgCodec")
    logging.getLogger("monai.data.nvimgcodec_pydicom_plugin").setLevel(logging.ERROR)
    rules = ConfidenceRules(
        options.min_area,
        options.min_certainty,
        options.min_stability,
        options.empty_below,
        options.keep_empty,
        options.keep_positive,
    )
    teachers = Teachers(
        options.bundle,
        options.weights,
        options.overlays,
        parse_settings(options.set),
        parse_fold(options.unseen_fold),
        options.device,
    )
    print(write_pseudo_labels(options.unlabelled, teachers, options.output_dir, rules))


if __name__ == "__main__":
    sys.exit(main())
