# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Serve bundles to annotators with MONAI Label 0.8.5: on a folder of NIfTI files, or a DICOMweb server.

    python scripts/serve_label.py --studies SCANS
    python scripts/serve_label.py --studies http://127.0.0.1:8042/dicom-web --bundles DIR --weights model.pt

The first start builds an environment for MONAI Label, in a few minutes; then a start takes seconds. The
bundles are copied, so training in the server never touches their weights. A bundle whose configs run what is
not known to be harmless is refused (see verify_bundle.py). The server needs no network. Ctrl-C stops it.
"""

from __future__ import annotations

import argparse
import signal
import sys
from pathlib import Path
from typing import Any

from custom.bundle.standards import Standards
from custom.bundle.verification import code_findings
from custom.console import command
from custom.deployment.label_bundle import deploy_bundle, parse_setting
from custom.deployment.label_environment import MONAI_LABEL_VERSION, build_environment, read_versions
from custom.deployment.label_server import LabelServer, check_port, check_studies

ROOT = Path(__file__).resolve().parent.parent


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    task = parser.add_mutually_exclusive_group(required=True)
    task.add_argument("--studies", help="folder of NIfTI files (labels are saved in it), or DICOMweb URL")
    task.add_argument(
        "--prepare", action="store_true", help="build MONAI Label's environment where it is missing, and end"
    )
    parser.add_argument(
        "--bundles",
        nargs="+",
        type=Path,
        default=sorted((ROOT / "bundles").glob("*_segmentation")),
        help="folders of bundles, from this repository or unpacked (default: all of this repository)",
    )
    parser.add_argument(
        "--weights",
        nargs="+",
        type=Path,
        help="weights files, one a bundle in the same order (default: models/model.pt of each)",
    )
    parser.add_argument(
        "--allow",
        type=Path,
        nargs="+",
        default=[],
        help="files with expressions and targets that bundles of yours run besides, as for verify_bundle.py",
    )
    parser.add_argument(
        "--app-dir",
        type=Path,
        default=Path.home() / "covid-ct-label",
        help="folder of the server: bundles' copies, weights trained there, logs (default: ~/covid-ct-label)",
    )
    parser.add_argument(
        "--set",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="change keys of the copies' configs, as image_size=[256,256] for a small machine",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="take the bundles' own weights, though others were trained here"
    )
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 opens the server to the network")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--environment", type=Path, help="folder of MONAI Label's environment")
    return parser.parse_args(argv)


def refuse_unknown_code(source: Path, standards: Standards) -> None:
    """Make sure that a bundle's configs run nothing that is not known; nothing of them runs here.

    Raises:
        ValueError: In one line, when they do, or the bundle is no folder.
    """
    if source.is_file():
        raise ValueError(
            f"{source} is no folder; check a zip by scripts/verify_bundle.py, unpack it, and name its folder"
        )
    found = code_findings(source, standards)
    if found:
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        raise ValueError(
            f"{source} is not served: {found[0]}{more}; read what scripts/verify_bundle.py says of it, and "
            "name by --allow a file with what you agree to"
        )


def deploy_all(args: argparse.Namespace) -> list[str]:
    """Deploy the bundles and say what was taken; returns their names."""
    weights: list[Path | None] = args.weights or [None] * len(args.bundles)
    if len(weights) != len(args.bundles):
        raise ValueError(f"{len(args.bundles)} bundles and {len(weights)} weights files: give one for each")
    names = [source.resolve().name for source in args.bundles]
    if len(set(names)) < len(names):
        raise ValueError(f"two bundles have the same name: {', '.join(sorted(names))}")
    standards = Standards.of_repository(ROOT, args.allow)
    for source in args.bundles:
        refuse_unknown_code(source, standards)
    settings = dict(parse_setting(text) for text in args.set)
    known: set[str] = set()
    for source, file in zip(args.bundles, weights, strict=True):
        deployed = deploy_bundle(source, args.app_dir / "model", file, settings, args.fresh)
        known |= deployed.settings
        print(f"{deployed.folder.name}: {deployed.weights}", flush=True)
    unknown = sorted(settings.keys() - known)
    if unknown:
        raise ValueError(f"--set {unknown[0]}: no config of these bundles has that key")
    return names


def stop_on(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


@command
def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    if args.prepare:
        print(f"MONAI Label {MONAI_LABEL_VERSION}: {build_environment(args.environment).parent.parent}")
        return 0
    check_port(args.host, args.port)
    studies = check_studies(args.studies)
    names = deploy_all(args)
    python = build_environment(args.environment)
    versions = read_versions(args.environment)
    print(", ".join(f"{name} {version}" for name, version in versions.items()), flush=True)
    server = LabelServer(python, args.app_dir, names, studies, args.host, args.port)
    for kind in (signal.SIGINT, signal.SIGTERM):
        signal.signal(kind, stop_on)
    try:
        print(f"Starting on {studies} ...", flush=True)
        info = server.start()
        print(f"MONAI Label {MONAI_LABEL_VERSION} is up: {server.url}", flush=True)
        print(f"  models: {', '.join(sorted(info['models']))}")
        if studies.startswith("http"):
            print(f"  OHIF: {server.url}/ohif/ (Server in its MONAI Label panel: {server.url}/)")
        print(f"  log: {server.log}\nCtrl-C stops it.", flush=True)
        code = server.wait()
        raise OSError(f"MONAI Label ended with exit code {code}; its log is {server.log}")
    except KeyboardInterrupt:
        print("\nstopping ...", flush=True)
        return 0
    finally:
        server.stop()


if __name__ == "__main__":
    sys.exit(main())
