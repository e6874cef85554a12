# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Times every inference backend on whole volumes, and shows that their masks are the same.

    python benchmarks/inference_backends.py [--bundles NAME ...] [--scans SCAN ...]

Each bundle's network has the weights that the bundle comes with, or those of --weights, and the width and
size that they were trained with. Its own inference.json prepares each scan and inverts the result; each slice
goes through the network once, without its mirror image. The backends take turns, --repeats times, after one
run that builds them; medians are shown. Whole: the preparation, the network and the way back to the scan's
grid, without reports. A backend whose mask has a Dice below 0.999 with eager PyTorch's, or that does not run,
has failed and gets no times. With CT_DATA in the environment its ct_lung_dicom is a scan, too. Load: that of
the machine while the scan was timed, so more than the threads used here means that other programs made the
times longer.
"""

from __future__ import annotations

import argparse
import logging
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from monai.bundle import ConfigParser
from monai.data import decollate_batch, list_data_collate
from monai.inferers import Inferer

from custom.console import command, require_file
from custom.data.files import atomic_path, file_sha256
from custom.data.phantom import make_phantom
from custom.inferers import BACKENDS, BackendSliceInferer

ROOT = Path(__file__).resolve().parent.parent
GATE = 0.999
LESIONS = ("ground_glass", "consolidation")
FLAGS = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_int8")
HEADER = (
    "bundle",
    "scan",
    "backend",
    "mask Dice",
    "network s",
    "ratio",
    "whole s",
    "ratio",
    "build s",
    "load",
)


def read_bundle(
    bundle: Path, weights: Path, image_size: int | None
) -> tuple[ConfigParser, torch.nn.Module, list[int]]:
    """The parsed inference.json on the CPU, its network with the weights, and the size of the slices."""
    parser = ConfigParser()
    parser.read_config(bundle / "configs" / "inference.json")
    parser["bundle_root"] = str(bundle)
    parser["ckpt_path"] = str(weights)  # beside it lies model.json, with the network's width and more
    parser["device"] = torch.device("cpu")
    if image_size is not None:
        parser["image_size"] = [image_size, image_size]
    network = parser.get_parsed_content("network_def")
    try:
        network.load_state_dict(torch.load(weights, map_location="cpu", weights_only=True))
    except RuntimeError as error:
        raise ValueError(f"{weights} does not hold weights of {bundle.name}'s network") from error
    return parser, network.eval(), parser.get_parsed_content("image_size")


def clock(function: Callable[[], Any]) -> tuple[float, Any]:
    begin = time.perf_counter()
    result = function()
    return time.perf_counter() - begin, result


def dice(a: torch.Tensor, b: torch.Tensor) -> float:
    total = float(a.sum() + b.sum())
    return 2 * float((a & b).sum()) / total if total else 1.0


class Pipeline:
    """Preparation, network and way back of one scan; every call times them all with one backend."""

    def __init__(self, parser: ConfigParser, network: torch.nn.Module, scan: Path) -> None:
        self.network = network
        self.preprocessing = parser.get_parsed_content("preprocessing")
        self.postprocessing = parser.get_parsed_content("postprocessing")
        self.scan = scan
        self.batch: dict[str, Any] = {}

    def prepare(self) -> float:
        seconds, item = clock(lambda: self.preprocessing({"image": str(self.scan)}))
        self.batch = list_data_collate([item])
        return seconds

    def run(self, inferer: Inferer) -> tuple[float, float, torch.Tensor]:
        """Seconds in the network, seconds after it, and the mask on the scan's grid."""
        with torch.no_grad():
            network_s, logits = clock(lambda: inferer(self.batch["image"], self.network))
        # Inversion needs the prepared image's history; the scan and the lungs would only be copied.
        (item,) = decollate_batch({"image": self.batch["image"], "pred": logits})
        after_s, item = clock(lambda: self.postprocessing(item))
        return network_s, after_s, item["pred"].as_tensor() > 0


def compare(pipeline: Pipeline, inferers: dict[str, Inferer], repeats: int) -> list[list[str]]:
    """Rows of the table from ``backend`` on."""
    pipeline.prepare()
    built: dict[str, float] = {}
    scores: dict[str, float] = {}
    failed: dict[str, str] = {}
    reference = torch.empty(0)
    for name, inferer in inferers.items():
        try:
            built[name], (_, _, mask) = clock(lambda inferer=inferer: pipeline.run(inferer))
        except Exception as error:  # a backend's failure is a result; without the reference there is none
            if name == "torch":
                raise
            failed[name] = " ".join(str(error).split())[:80]
            continue
        if name == "torch":
            reference = mask
            share = mask.float().mean().item()
            if not 1e-4 < share < 0.5:
                reason = f"{share:.2%} of the scan is in the mask, which shows nothing; take another scan"
                return [_failed(name, "-", reason) for name in inferers]
            print(f"  mask: {int(mask.sum())} of {mask.numel()} voxels ({share:.2%})", flush=True)
        scores[name] = dice(mask, reference)
        if scores[name] < GATE:
            failed[name] = f"below {GATE}"
        print(f"  {name}: Dice {scores[name]:.6f}, first run {built[name]:.1f} s", flush=True)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in inferers if name not in failed}
    for turn in range(repeats):
        before_s = pipeline.prepare()
        order = list(times)
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            network_s, after_s, mask = pipeline.run(inferers[name])
            if dice(mask, reference) < GATE:
                raise ValueError(f"backend {name} gave another mask in a later run")
            times[name].append((network_s, before_s + network_s + after_s))
    median = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)]
        for name, rows in times.items()
    }
    rows, load = [], _load()
    for name in inferers:
        score = f"{scores[name]:.5f}" if name in scores else "-"
        if name in failed:
            rows.append(_failed(name, score, failed[name]))
            continue
        (network_s, whole_s), (network_0, whole_0) = median[name], median["torch"]
        build = max(0.0, built[name] - network_s)
        row = [
            f"{network_s:.2f}",
            f"{network_0 / network_s:.2f}",
            f"{whole_s:.2f}",
            f"{whole_0 / whole_s:.2f}",
        ]
        rows.append([name, score, *row, f"{build:.1f}", load])
    return rows


def _failed(backend: str, score: str, reason: str) -> list[str]:
    return [backend, score, f"failed: {reason}", *[""] * (len(HEADER) - 5)]


def _load() -> str:
    """Programs that compute, by the mean of the last minute."""
    return f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"


def machine() -> list[str]:
    """Versions, threads, processor and load."""
    words = [f"Python {platform.python_version()}"]
    for name in ("torch", "monai", "onnx", "onnxscript", "onnxruntime", "openvino"):
        try:
            words.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            words.append(f"{name} not installed")
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.is_file() else ""
    pairs = [line.split(":", 1) for line in text.splitlines() if ":" in line]
    processor = {key.strip(): value.strip() for key, value in reversed(pairs)}
    flags = [flag for flag in FLAGS if flag in processor.get("flags", "").split()]
    load = ", ".join(f"{value:.1f}" for value in os.getloadavg()) if hasattr(os, "getloadavg") else "unknown"
    name = processor.get("model name", platform.processor())
    return [
        ", ".join(words),
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; "
        f"{' '.join(flags) or 'flags unknown'}; load of the last 1, 5, 15 minutes {load}",
    ]


def write_table(path: Path, rows: list[list[str]], lines: list[str]) -> str:
    """Write the table so far; returns it."""
    table = [HEADER, ["---"] * len(HEADER), *rows]
    text = "\n".join([*(f"{line}  " for line in lines), "", *(f"| {' | '.join(row)} |" for row in table)])
    with atomic_path(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")
    return text


@command
def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = sorted(path.name for path in (ROOT / "bundles").iterdir() if (path / "configs").is_dir())
    parser.add_argument("--bundles", nargs="+", default=names, choices=names, metavar="NAME")
    parser.add_argument(
        "--scans", nargs="*", type=Path, default=[], help="NIfTI files or folders of one series"
    )
    parser.add_argument("--backends", nargs="+", default=list(BACKENDS), choices=list(BACKENDS))
    parser.add_argument("--image-size", type=int, help="side of the slices in the network; default: trained")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--weights", type=Path, help="model.pt of the one bundle that is named")
    parser.add_argument("--table", type=Path, default=Path("inference_backends.md"), help="Markdown to write")
    options = parser.parse_args(argv)
    if options.weights is not None and len(options.bundles) != 1:
        raise ValueError("--weights are those of one bundle; name it with --bundles")
    backends = ["torch", *(name for name in options.backends if name != "torch")]
    logging.disable(logging.WARNING)
    about = [
        *machine(),
        f"batches of {options.batch_size} slices, medians of {options.repeats} interleaved runs",
    ]
    print("\n".join(about), flush=True)
    rows: list[list[str]] = []
    text = ""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        chest = make_phantom((192, 192, 12), (1.9, 1.9, 22.0), seed=7, lesions=LESIONS, burden=0.6)
        chest.save(work / "scans", "phantom")
        scans = {"phantom": work / "scans" / "phantom_ct.nii.gz"}
        if os.environ.get("CT_DATA"):
            scans["ct_lung_dicom"] = Path(os.environ["CT_DATA"]) / "ct_lung_dicom"
        scans |= {scan.name: scan for scan in options.scans}
        for name in options.bundles:
            bundle = ROOT / "bundles" / name
            weights = options.weights or bundle / "models" / "model.pt"
            require_file(weights, "the network's weights")
            config, network, size = read_bundle(bundle, weights, options.image_size)
            count = sum(parameter.numel() for parameter in network.parameters())
            about.append(
                f"{name}: weights {file_sha256(weights)[:12]}, {count / 1e6:.2f} M parameters, "
                f"slices of {size[0]} x {size[1]}"
            )
            print(about[-1], flush=True)
            inferers: dict[str, Inferer] = {}
            missing = []
            for backend in backends:
                try:
                    inferers[backend] = BackendSliceInferer(options.batch_size, backend=backend)
                except ModuleNotFoundError as error:
                    missing.append(_failed(backend, "-", str(error)))
            for scan, path in scans.items():
                print(f" {scan}", flush=True)
                results = compare(Pipeline(config, network, path), inferers, options.repeats)
                rows += [[name, scan, *row] for row in results + missing]
                for row in results + missing:
                    print("  " + "  ".join(row), flush=True)
                text = write_table(options.table, rows, about)
    print(f"\n{text}\n\nwritten: {options.table}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
