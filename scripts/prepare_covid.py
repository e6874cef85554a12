# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Turn a COVID-19 CT data set into a data list that the bundles train on.

python scripts/prepare_covid.py mosmed --source COVID19_1110 --output-dir mosmed

Volumes stay where they are: the list names them by paths relative to --output-dir, which is the dataset_dir
to train with. Run again, it continues where it stopped. Exit code: 0 when every case could be used, 1 when
some failed (they are listed at the end and in skipped.json), 2 when none could be or an option is wrong.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from custom.console import command
from custom.data.covid_lists import CovidSummary
from custom.data.covid_sets import prepare_covid_ct_seg, prepare_medseg, prepare_mosmed
from custom.data.covid_slices import SliceOptions
from custom.data.datalist import ANY_FOLD, read_datalist
from custom.data.join_lists import join_datalists, parse_fold
from custom.data.lung_negatives import NegativeSummary, prepare_negatives
from custom.data.plain_slices import ORIENTATIONS, prepare_slices
from custom.data.unlabelled import UnlabelledSummary, prepare_unlabelled


def slices(options: argparse.Namespace) -> int:
    datalist = prepare_slices(
        options.images,
        options.masks,
        options.output_dir,
        orientation=options.orientation,
        n_folds=options.folds,
        seed=options.seed,
        name=options.name,
        description=options.description,
    )
    entries = read_datalist(datalist)["training"]
    patients = len({entry["patient_id"] for entry in entries})
    print(f"{len(entries)} slices of {patients} patients in {options.folds} folds: {datalist}")
    return 0


def mosmed(options: argparse.Namespace) -> int:
    return report(prepare_mosmed(n_testing=options.testing, **common(options)))


def covid_ct_seg(options: argparse.Namespace) -> int:
    return report(prepare_covid_ct_seg(testing=options.testing, **common(options), **pictures(options)))


def medseg(options: argparse.Namespace) -> int:
    return report(
        prepare_medseg(
            keep_classes=options.keep_classes,
            without_effusion=options.without_effusion,
            **common(options),
            **pictures(options),
        )
    )


def unlabelled(options: argparse.Namespace) -> int:
    return report(
        prepare_unlabelled(
            options.source,
            options.output_dir,
            orientation=options.orientation,
            orientations=dict(options.orientation_of),
            per_volume=options.per_volume,
        )
    )


def negatives(options: argparse.Namespace) -> int:
    return report(
        prepare_negatives(
            options.source,
            options.output_dir,
            xml_dir=options.xml_dir,
            per_series=options.per_series,
            window=tuple(options.window),
            num_workers=options.workers,
        )
    )


def join(options: argparse.Namespace) -> int:
    fold = ANY_FOLD if options.held_out_fold == ANY_FOLD else parse_fold(options.held_out_fold)
    print(join_datalists(options.labelled, options.add, options.output_dir, fold))
    return 0


def common(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "source": options.source,
        "output_dir": options.output_dir,
        "n_folds": options.folds,
        "seed": options.seed,
        "num_workers": options.workers,
    }


def pictures(options: argparse.Namespace) -> dict[str, Any]:
    return {
        "volumes_as_slices": options.volumes_as_slices,
        "slices": SliceOptions(tuple(options.window), options.orientation),
    }


def report(summary: CovidSummary | UnlabelledSummary | NegativeSummary) -> int:
    print(summary)
    return 1 if summary.failed else 0


def add_common(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--output-dir", type=Path, required=True, help="gets the data lists and new files")
    parser.add_argument("--folds", type=int, default=5, help="folds of the training patients (default: 5)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the split (default: 0)")


def add_volumes(parser: argparse.ArgumentParser, layout: str) -> None:
    parser.add_argument("--source", type=Path, required=True, help=f"folder with {layout}")
    add_common(parser)
    parser.add_argument("--workers", type=int, default=0, help="processes; each holds one scan in memory")


def add_pictures(parser: argparse.ArgumentParser, which: str) -> None:
    parser.add_argument(
        "--volumes-as-slices",
        action="store_true",
        help=f"write the slices with a lesion of {which} to slices/, with a data list of their own",
    )
    parser.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=SliceOptions.window,
        help="HU that become 0 and 255 in slices/ (default: -1000 400)",
    )
    parser.add_argument(
        "--orientation",
        choices=ORIENTATIONS,
        default=SliceOptions.orientation,
        help="how slices are stored where headers are not to be trusted (default: transposed)",
    )


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = parser.add_subparsers(required=True, metavar="KIND")

    plain = kinds.add_parser(
        "slices", help="plain 8-bit slices and masks, e.g. COVID-SemiSeg (stored transposed)"
    )
    plain.add_argument("--images", type=Path, required=True, help="folder of PNG or JPG slices")
    plain.add_argument("--masks", type=Path, required=True, help="folder of masks with the same names")
    add_common(plain)
    plain.add_argument(
        "--orientation", choices=ORIENTATIONS, default="upright", help="how the slices are stored"
    )
    plain.add_argument("--name", default="plain slices")
    plain.add_argument("--description", default="", help="source and licence, kept in the data list")
    plain.set_defaults(run=slices)

    studies = kinds.add_parser("mosmed", help="MosMedData COVID19_1110: the 50 studies with masks")
    add_volumes(studies, "studies/ and masks/")
    studies.add_argument(
        "--testing",
        type=int,
        default=10,
        help="studies to test on, drawn at random (default: 10, nCoVSegNet's number)",
    )
    studies.set_defaults(run=mosmed)

    benchmark = kinds.add_parser("covid-ct-seg", help="COVID-19-CT-Seg of Ma et al., Zenodo 3757476")
    add_volumes(benchmark, "COVID-19-CT-Seg_20cases/, Infection_Mask/ and Lung_Mask/")
    benchmark.add_argument(
        "--testing",
        action="store_true",
        help="list the volumes in HU (coronacases) for testing, as nCoVSegNet does, not in training folds",
    )
    add_pictures(benchmark, "the windowed volumes (Radiopaedia), which are left out else,")
    benchmark.set_defaults(run=covid_ct_seg)

    radiology = kinds.add_parser("medseg", help="MedSeg: 100 slices and nine volumes with three classes")
    add_volumes(radiology, "tr_im.nii.gz and tr_mask.nii.gz, rp_im/ and rp_msk/, or one of the pairs")
    radiology.add_argument(
        "--keep-classes",
        action="store_true",
        help="keep ground-glass, consolidation and effusion apart; the bundles' training makes them one",
    )
    radiology.add_argument("--without-effusion", action="store_true", help="make effusion background")
    add_pictures(radiology, "the nine volumes, as Zhou et al. train on them,")
    radiology.set_defaults(run=medseg)

    bare = kinds.add_parser(
        "unlabelled", help="8-bit slices without masks, named VOLUME_NUMBER: grey values matched by volume"
    )
    bare.add_argument("source", type=Path, metavar="FOLDER", help="folder of PNG or JPG slices")
    bare.add_argument(
        "output_dir", type=Path, metavar="OUT", help="gets images/, unlabelled.json and overview.png"
    )
    bare.add_argument(
        "--orientation", choices=ORIENTATIONS, default="upright", help="how the slices are stored"
    )
    bare.add_argument(
        "--orientation-of",
        nargs=2,
        action="append",
        default=[],
        metavar=("PATTERN", "ORIENTATION"),
        help="another orientation for the volumes named like PATTERN; may be repeated. In COVID-SemiSeg's "
        "unlabelled slices '*coronacases*' are rotated-90, the others transposed",
    )
    bare.add_argument(
        "--per-volume", type=int, metavar="N", help="slices of each volume, evenly spaced (default: all)"
    )
    bare.set_defaults(run=unlabelled)

    healthy = kinds.add_parser(
        "lidc-negatives", help="slices of LIDC-IDRI without a nodule, windowed and cropped, with empty masks"
    )
    healthy.add_argument("source", type=Path, metavar="FOLDER", help="folder of the DICOM files")
    healthy.add_argument("output_dir", type=Path, metavar="OUT", help="gets images/, masks/, datalist.json")
    healthy.add_argument("--xml-dir", type=Path, help="folder of the XML files, if not in FOLDER")
    healthy.add_argument(
        "--per-series", type=int, default=20, metavar="N", help="slices, evenly spaced (default: 20)"
    )
    healthy.add_argument(
        "--window",
        type=float,
        nargs=2,
        metavar=("LOW", "HIGH"),
        default=(-1100.0, 300.0),
        help="HU that become 0 and 255 (default: -1100 300, about that of COVID-SemiSeg's slices)",
    )
    healthy.add_argument("--workers", type=int, default=0, help="processes; each holds one scan in memory")
    healthy.set_defaults(run=negatives)

    joined = kinds.add_parser(
        "join", help="one data list of labelled slices, pseudo-labels (scripts/pseudo_label.py) and negatives"
    )
    joined.add_argument("--labelled", type=Path, required=True, help="data list of slices in folds")
    joined.add_argument(
        "--add", type=Path, nargs="+", required=True, help="data lists that are trained on only"
    )
    joined.add_argument(
        "--output-dir", type=Path, required=True, help="gets datalist.json; nothing is copied"
    )
    joined.add_argument(
        "--held-out-fold",
        required=True,
        metavar="FOLD",
        help="the fold that will be held out, which the networks behind pseudo-labels must not have seen; "
        "'any' where no pseudo-labels are added; 'none' for the final training, after which nothing can "
        "be scored",
    )
    joined.set_defaults(run=join)

    options = parser.parse_args(argv)
    return options.run(options)


if __name__ == "__main__":
    sys.exit(main())
