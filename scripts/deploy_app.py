# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Run an unpacked bundle as a MONAI Deploy App SDK 4.0.0 application: DICOM in, DICOM SEG and SR out.

python scripts/deploy_app.py --bundle covid_ct_scoatnet_segmentation --input DICOM --output RESULTS

It runs in an environment of its own, and needs nothing of this repository but this file: the code comes with
the bundle, as scripts/pack_bundle.py packs it. A bundle is a program: run those you trust.

The application is one operator that runs the bundle's inference.json as it stands. The SDK's own operators
would hand on a volume in memory, made by a loader that leaves out images without a position or at a position
that it has seen, and lays the others at equal distances, whatever is missing between them; and they would run
the preprocessing, inferer and postprocessing alone. Here a series goes through the bundle's reader, so a
doubtful one is refused, and through its report, so SEG and SR have the right codes.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("HOLOSCAN_LOG_LEVEL", "ERROR")  # read when it is imported; else it tells of every step

try:
    import highdicom  # noqa: F401  the bundle writes no DICOM objects without it
    from monai.bundle import ConfigWorkflow
    from monai.deploy.conditions import CountCondition
    from monai.deploy.core import (
        Application,
        ConditionType,
        Fragment,
        Operator,
        OperatorSpec,
        RuntimeEnv,
    )
except ImportError as error:
    print(
        f"error: {error}; its environment is described in docs/deploy_with_monai_deploy.md", file=sys.stderr
    )
    raise SystemExit(2) from None

__all__ = ["BundleApplication", "BundleOperator", "find_bundle", "main", "parse_setting"]

CONFIG = Path("configs", "inference.json")


class BundleOperator(Operator):
    """Segments all DICOM studies in a folder with a bundle.

    Named output:
        dicom_files: list of paths, the DICOM SEG and SR of all studies; a receiver is optional.

    Args:
        fragment: the application.
        bundle: folder of the bundle.
        input_folder: folder with DICOM studies, in any sub-folders.
        output_folder: where each study gets a folder.
        settings: keys of the bundle's inference.json that are changed.
    """

    def __init__(
        self,
        fragment: Fragment,
        *args: Any,
        bundle: Path,
        input_folder: Path,
        output_folder: Path,
        settings: dict[str, Any],
        **kwargs: Any,
    ) -> None:
        self.bundle = bundle
        self.overrides = {
            **settings,
            "bundle_root": str(bundle),
            "dataset_dir": str(input_folder),
            "output_dir": str(output_folder),
        }
        self.output_folder = output_folder
        self.files: list[Path] = []
        self.error: Exception | None = None
        super().__init__(fragment, *args, **kwargs)

    def setup(self, spec: OperatorSpec) -> None:
        spec.output("dicom_files").condition(ConditionType.NONE)

    def compute(self, op_input: Any, op_output: Any, context: Any) -> None:
        """Run the bundle; what it raises is kept in ``error``, lest the graph prints all of its own state."""
        try:
            self._run()
        except Exception as error:
            self.error = error
        op_output.emit(self.files, "dicom_files")

    def _run(self) -> None:
        config = str(self.bundle / CONFIG)
        workflow = ConfigWorkflow(config_file=config, workflow_type="infer", **self.overrides)
        workflow.initialize()
        names = [item["name"] for item in workflow.parser.get_parsed_content("dataset").data]
        before = {name: self._written_at(name) for name in names}
        try:
            workflow.run()
        finally:
            # A study whose turn did not come may have the report of an earlier run.
            without = self._collect([name for name in names if self._written_at(name) != before[name]])
        workflow.finalize()
        if without:
            from custom.console import CohortError  # the bundle's own

            raise CohortError(without, len(names))

    def _collect(self, names: Sequence[str]) -> list[dict[str, str]]:
        """Find what was written; returns the studies that have been segmented and have no DICOM objects."""
        without = []
        for name in names:
            content = json.loads(self._report(name).read_text(encoding="utf-8"))
            if content["status"] != "segmented":
                continue
            written = [content["files"][kind] for kind in ("seg", "sr")]
            self.files += [self._report(name).with_name(file) for file in written if file]
            if not written[1]:  # a SEG has at least one segment, so there may be none; there always is an SR
                without.append({"name": name, "reason": content["reasons"]["files.sr"]})
        return without

    def _report(self, name: str) -> Path:
        return self.output_folder / name / f"{name}_report.json"

    def _written_at(self, name: str) -> int | None:
        report = self._report(name)
        return report.stat().st_mtime_ns if report.is_file() else None


class BundleApplication(Application):
    """A MONAI Deploy application of one :class:`BundleOperator`.

    Args:
        options: its arguments.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        super().__init__([sys.executable, __file__])  # else it takes options of ours for its own
        self.operator_options = options
        self.bundle_operator: BundleOperator | None = None

    def compose(self) -> None:
        self.bundle_operator = BundleOperator(
            self, CountCondition(self, 1), name="bundle", **self.operator_options
        )
        self.add_operator(self.bundle_operator)


def find_bundle(path: Path) -> Path:
    """The bundle in a folder that is one or holds one, as a container's folder of models does.

    Args:
        path: the folder.

    Raises:
        FileNotFoundError: When there is none, or more than one.
    """
    if path.suffix == ".zip":
        raise FileNotFoundError(f"{path} is packed; unpack it by python -m zipfile -e {path} FOLDER")
    found = [folder for folder in (path, *sorted(path.glob("*"))) if (folder / CONFIG).is_file()]
    if len(found) != 1:
        raise FileNotFoundError(f"{path} holds {len(found) or 'no'} bundle(s); name the folder of one bundle")
    bundle = found[0].resolve()
    if not (bundle / "custom").is_dir() and importlib.util.find_spec("custom") is None:
        raise FileNotFoundError(f"{bundle} has no folder custom: pack it with scripts/pack_bundle.py first")
    return bundle


def parse_setting(text: str, config: Path) -> tuple[str, Any]:
    """Split ``KEY=VALUE``, the value being JSON or else a text.

    Args:
        text: the setting.
        config: the config that must have the key.

    Raises:
        ValueError: When it has not, or the text has no ``=``.
    """
    key, equals, value = text.partition("=")
    known = json.loads(config.read_text(encoding="utf-8"))
    if not equals or re.split("::|#", key)[0] not in known:
        raise ValueError(f"--set {text}: give KEY=VALUE, with a key of {config}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value


def main(argv: list[str] | None = None) -> int:
    defaults = RuntimeEnv()  # what a container says by HOLOSCAN_MODEL_PATH, _INPUT_PATH and _OUTPUT_PATH
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--bundle", type=Path, default=defaults.model, help="folder of the bundle (default: %(default)s)"
    )
    parser.add_argument(
        "--input", type=Path, default=defaults.input, help="folder of DICOM studies (default: %(default)s)"
    )
    parser.add_argument(
        "--output", type=Path, default=defaults.output, help="folder for results (default: %(default)s)"
    )
    parser.add_argument(
        "--set", nargs="+", default=[], metavar="KEY=VALUE", help="change keys of inference.json"
    )
    args = parser.parse_args(argv)
    try:
        bundle = find_bundle(args.bundle)
        settings = dict(parse_setting(text, bundle / CONFIG) for text in args.set)
        if not args.input.is_dir():
            raise FileNotFoundError(f"{args.input} is no folder; give one with DICOM files")
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    folders = {"input_folder": args.input.resolve(), "output_folder": args.output.resolve()}
    application = BundleApplication({"bundle": bundle, "settings": settings, **folders})
    application.run()
    operator = application.bundle_operator
    assert operator is not None  # compose has run
    for file in operator.files:
        print(f"written: {file}")
    if operator.error is not None:
        raise operator.error  # the bundle has seen to it that its errors end in one line and an exit code
    return 0


if __name__ == "__main__":
    sys.exit(main())
