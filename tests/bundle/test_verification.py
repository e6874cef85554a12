# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Every way a bundle can be wrong or hostile: one line each, and nothing of it runs."""

from __future__ import annotations

import json
import re
import shutil
import stat
import struct
import warnings
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import custom
from custom.bundle import archive, verification
from custom.bundle.config_code import code_in
from custom.bundle.network_check import build_network
from custom.bundle.packing import CODE_PATH, IMPORTS, pack_bundle
from custom.bundle.standards import Standards, package_name
from custom.bundle.verification import verify_bundle

ROOT = Path(__file__).resolve().parent.parent.parent
BUNDLES = sorted(path for path in (ROOT / "bundles").iterdir() if (path / "configs").is_dir())
NAME = "covid_ct_scoatnet_segmentation"
STANDARDS = Standards.of_repository(ROOT)
LEAVE = shutil.ignore_patterns("models", "eval", "cache", "output", "data", "transfer", "__pycache__")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    shutil.copytree(ROOT / "bundles" / NAME, tmp_path / NAME, ignore=LEAVE)
    return tmp_path / NAME


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("packed")
    shutil.copytree(ROOT / "bundles" / NAME, folder / NAME, ignore=LEAVE)
    return pack_bundle(folder / NAME, folder / "bundle.zip", STANDARDS.requirements).path


@pytest.fixture
def unpacked(packed: Path, tmp_path: Path) -> Path:
    return archive.extract_archive(packed, tmp_path / "unpacked")


def findings(path: Path, standards: Standards = STANDARDS) -> list[str]:
    found = verify_bundle(path, standards).findings
    assert not [line for line in found if "\n" in line]
    return found


def change(path: Path, **changes: Any) -> None:
    """Set keys of a JSON file; ``__`` leads into an object, None removes."""
    content = json.loads(path.read_text())
    for key, value in changes.items():
        *way, last = key.split("__")
        place = content
        for step in way:
            place = place[step]
        if value is None:
            del place[last]
        else:
            place[last] = value
    path.write_text(json.dumps(content))


def numbered(table: list) -> list[str]:
    return [f"{number}-{message[:40]}" for number, (_, message) in enumerate(table)]


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spares a test that is not about it the building of the network."""
    monkeypatch.setattr(verification, "check_network", lambda *_: [])


@pytest.fixture
def nothing_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Fails a test in which a target is imported or a network built."""

    def never(*_: Any) -> None:
        raise AssertionError("code of a bundle ran that is not known")

    monkeypatch.setattr(verification, "check_network", never)
    monkeypatch.setattr(verification, "check_targets", never)
    monkeypatch.chdir(tmp_path)


# --- what is right


@pytest.mark.parametrize("folder", BUNDLES, ids=lambda path: path.name)
def test_the_repositorys_bundles_are_right(folder):
    result = verify_bundle(folder, STANDARDS)
    assert result.findings == [] and result.unknown == set()


def test_a_zip_and_what_it_unpacks_to_are_right(packed, unpacked):
    for path in (packed, unpacked):
        result = verify_bundle(path, STANDARDS)
        assert result.findings == []
        assert result.summary == f"{NAME} 0.1.0, custom {custom.__version__}, without weights"


def test_known_code_is_what_the_bundles_run_and_no_more():
    used = set()
    for path in (ROOT / "bundles").glob("*/configs/*.json"):
        used |= {text for _, _, text in code_in(json.loads(path.read_text(encoding="utf-8")))}
    listed = (ROOT / "scripts" / "known_code.txt").read_text(encoding="utf-8").splitlines()
    lines = [line for line in listed if not line.startswith("#")]
    assert sorted(used - set(lines)) == [], "add these to scripts/known_code.txt, if they are harmless"
    assert sorted(set(lines) - used) == [], "remove these from scripts/known_code.txt, nothing uses them"
    assert lines == sorted(lines)
    assert STANDARDS.known == used | {CODE_PATH, *IMPORTS}


def test_ones_own_code_can_be_allowed(bundle, tmp_path):
    config = bundle / "configs" / "train.json"
    change(config, optimizer___target_="torch.optim.SGD", learning_rate="$1 / 100")
    result = verify_bundle(bundle, STANDARDS)
    assert result.unknown == {"torch.optim.SGD", "$1 / 100"} and len(result.findings) == 2
    (tmp_path / "mine.txt").write_text("# mine\n" + "\n".join(result.unknown) + "\n")
    assert findings(bundle, Standards.of_repository(ROOT, [tmp_path / "mine.txt"])) == []


def test_a_folder_in_work_may_hold_what_a_training_left(bundle, no_network):
    for name in ("eval/scores.json", "cache/slices/a/image.npy", "models/imagenet.json", "custom.egg"):
        (bundle / name).parent.mkdir(parents=True, exist_ok=True)
        (bundle / name).write_text("{}")
    torch.save({"epoch": 3, "network": {"a": torch.zeros(1)}}, bundle / "models" / "checkpoint_latest.pt")
    assert findings(bundle) == ["custom.egg: does not belong in a bundle"]


def test_nothing_there():
    with pytest.raises(FileNotFoundError, match="should be a bundle"):
        verify_bundle("/nowhere/at/all", STANDARDS)


# --- files and configs that are wrong


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


def write(name: str, text: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

    return act


def config(name: str, **changes: Any) -> Callable[[Path], None]:
    return lambda folder: change(folder / "configs" / f"{name}.json", **changes)


def add(name: str, **keys: Any) -> Callable[[Path], None]:
    """Add top-level keys; ``::`` cannot be written in a keyword, so ``__`` stands for it."""

    def act(folder: Path) -> None:
        path = folder / "configs" / f"{name}.json"
        content = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps(content | {k.replace("__", "::"): v for k, v in keys.items()}))

    return act


def rename(name: str, old: str, new: str) -> Callable[[Path], None]:
    def act(folder: Path) -> None:
        path = folder / "configs" / f"{name}.json"
        content = json.loads(path.read_text())
        path.write_text(json.dumps({new if k == old else k: v for k, v in content.items()}))

    return act


WRONG = [
    (remove("LICENSE"), "LICENSE: is missing"),
    (remove("docs/README.md"), "docs/README.md: is missing"),
    (remove("configs/inference.json"), "configs/inference.json: is missing"),
    (write("configs/train.json", "{"), "configs/train.json: is not JSON"),
    (write("configs/train.json", "[]"), "configs/train.json: is no object"),
    (write("configs/more.json", '{"a": 1, "a": 2}'), 'configs/more.json: has the key "a" twice'),
    (write("configs/more.json", "[" * 60 + "1" + "]" * 60), "configs/more.json: is nested too deeply"),
    (write("configs/more.json", "[" * 100_000), "configs/more.json: is n"),
    (
        write("configs/more.json", '"' + "a" * (3 << 20) + '"'),
        "configs/more.json: has more than 2097152 bytes",
    ),
    (write("configs/more.yaml", "a: 1"), "configs/more.yaml: does not belong in a bundle"),
    (write("models/best.pt", ""), "models/best.pt: does not belong in a bundle"),
    (write("torch.py", ""), "torch.py: does not belong in a bundle"),
    (lambda folder: (folder / "docs" / "x.md").symlink_to("/etc/hostname"), "docs/x.md: is not a plain file"),
    (rename("train", "epochs", "epoches"), 'unknown key "epoches": nothing refers to it'),
    (
        rename("train", "epochs", "epoches"),
        'train::trainer::max_epochs refers to "epochs", which does not exist',
    ),
    (
        rename("inference", "evaluator", "evaluater"),
        "inference.json: evaluator is missing, which MONAI requires",
    ),
    (
        rename("inference", "inferring", "infering"),
        'unknown key "infering": nothing refers to it, and MONAI does not know it; did you mean inferring?',
    ),
    (rename("evaluate", "section", "sektion"), 'evaluate.json: unknown key "sektion"'),
    (
        add("mine", epochz=3),
        'mine.json: unknown key "epochz": nothing refers to it, and MONAI does not know it; '
        "did you mean epochs?",
    ),
    (add("mine", train__augmant=[]), 'mine.json: unknown key "train::augmant"'),
    (add("mine", trian__augment=[]), '"trian::augment" changes a part of "trian", which does not exist'),
    (
        add("mine", optimizer__lr="@learningrate"),
        'optimizer::lr refers to "learningrate", which does not exist',
    ),
    (config("metadata", task=None), "configs/metadata.json: 'task' is a required property"),
    (config("metadata", version="0.2.0"), 'changelog does not name version "0.2.0"'),
    (config("metadata", version=["0.1.0"]), "configs/metadata.json: version: "),
    (add("metadata", discription="x"), 'configs/metadata.json: unknown key "discription"'),
    (
        config("metadata", required_packages_version__scipy=None),
        "configs/metadata.json: required_packages_version does not name scipy",
    ),
]


WRONG_NETWORK = [
    (
        config("metadata", network_data_format__outputs__pred__num_channels=2),
        "configs/train.json: the network turns (1, 1, 512, 512) into (1, 1, 512, 512) torch.float32; "
        "metadata.json promises (1, 2, 512, 512) torch.float32",
    ),
    (
        config("metadata", network_data_format__inputs__image__num_channels=3),
        "configs/inference.json: the network does not take (1, 3, 512, 512) as metadata.json says",
    ),
    (
        config("metadata", network_data_format__inputs__image__spatial_shape=["8*n", "8*n"]),
        "must give spatial_shape and num_channels as plain numbers",
    ),
    (
        config("metadata", network_data_format__outputs__pred=None),
        "metadata.json does not say what goes into the network",
    ),
    (config("train", channels=[4] * 5), "configs/train.json: network_def cannot be built"),
    (
        config("inference", channels=[16, 64, 128, 256, 512]),
        "configs/inference.json: what train.json trains does not fit its network: of 455 tensors",
    ),
    (
        config(
            "train", network_def={"_target_": "Compose", "transforms": ["@deep_supervision", "@channels"]}
        ),
        "configs/train.json: network_def depends on Compose, which is no network; it was not built",
    ),
    (
        config("train", channels="$@train#trainer.run()"),
        'configs/train.json: network_def depends on a call, "$@train#trainer.run()"; it was not built',
    ),
    (
        config("train", channels="@image_size", image_size="%early_stop"),
        "configs/train.json: network_def depends on EarlyStopHandler, which is no network",
    ),
]


@pytest.mark.parametrize(("make", "message"), WRONG, ids=numbered(WRONG))
def test_what_is_wrong_is_found(make, message, bundle, no_network):
    make(bundle)
    found = findings(bundle)
    assert [line for line in found if message in line], found


@pytest.mark.parametrize(("make", "message"), WRONG_NETWORK, ids=numbered(WRONG_NETWORK))
def test_a_network_that_is_wrong_is_found(make, message, bundle):
    make(bundle)
    found = findings(bundle)
    assert [line for line in found if message in line], found


def test_a_target_that_is_known_and_missing_is_found(bundle, no_network):
    change(bundle / "configs" / "train.json", optimizer___target_="torch.optim.NotThere")
    standards = replace(STANDARDS, known=STANDARDS.known | {"torch.optim.NotThere"})
    assert findings(bundle, standards) == [
        "configs/train.json: optimizer::_target_: target torch.optim.NotThere does not exist in custom, "
        "MONAI or another package"
    ]


# --- weights


def test_weights_that_fit_are_right_and_others_are_not(bundle):
    (bundle / "models").mkdir(exist_ok=True)
    path = bundle / "models" / "model.pt"
    for name in ("train", "inference"):
        change(bundle / "configs" / f"{name}.json", channels=[8] * 5)
    network = build_network(json.loads((bundle / "configs" / "inference.json").read_text()))
    state = {key: torch.zeros(value.shape, dtype=value.dtype) for key, value in network.state_dict().items()}
    torch.save(state, path)
    result = verify_bundle(bundle, STANDARDS)
    assert result.findings == [] and re.search(r"weights [0-9a-f]{12}$", result.summary)
    key = next(iter(state))
    torch.save({**state, key: torch.full_like(state[key], torch.nan)}, path)
    assert findings(bundle) == [f"models/model.pt: '{key}' has values that are not finite"]
    torch.save({**state, key: torch.zeros(1).expand(1 << 40)}, path)
    assert findings(bundle)[0] == f"models/model.pt: '{key}' is no plain tensor"
    torch.save({**state, "more": torch.zeros(1)}, path)
    assert findings(bundle) == [
        "models/model.pt: does not fit the network of configs/inference.json: of 455 tensors 1 unexpected "
        "(first 'more')"
    ]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


@pytest.mark.parametrize("name", ["model.pt", "checkpoint_latest.pt"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(name, bundle, tmp_path, no_network):
    (bundle / "models").mkdir(exist_ok=True)
    torch.save({"a": Payload(tmp_path / "pwned")}, bundle / "models" / name)
    assert findings(bundle) == [
        f"models/{name}: holds more than tensors; such a file could run code and is not loaded"
    ]
    assert not (tmp_path / "pwned").exists()


# --- configs that run something else

TOUCH = "__import__('pathlib').Path({!r}).touch()"
HOSTILE: list[tuple[Callable[[str], Callable[[Path], None]], str]] = [
    (lambda p: config("train", learning_rate=f"${p}"), "learning_rate: expression that is not known"),
    (lambda p: config("train", **{"_desc_": f"${p}"}), "expression that is not known"),
    (lambda p: config("train", imports=["$import antigravity"]), "imports::0: expression that is not known"),
    (
        lambda p: config("metadata", description="$import antigravity"),
        "description: expression that is not known",
    ),
    (lambda p: add("evaluate", initialize=[f"${p}"]), "initialize::0: expression that is not known"),
    (lambda p: add("evaluate", initialize=["$custom.console.start() "]), "expression that is not known"),
    (
        lambda p: config("train", network_def={"_target_": "os.system", "command": "touch pwned"}),
        'network_def::_target_: target that is not known: "os.system"',
    ),
    (
        lambda p: config("train", network_def={"_target_": "run_cmd", "cmd_list": ["touch", "pwned"]}),
        'target that is not known: "run_cmd"',
    ),
    (lambda p: add("evaluate", network_def___target_="os.system"), 'target that is not known: "os.system"'),
    (
        lambda p: add("evaluate", **{"network_def#_target_": "os.system"}),
        'target that is not known: "os.system"',
    ),
    (
        lambda p: add("evaluate", section="os.system", network_def={"_target_": "@section"}),
        'target that is not known: "@section"',
    ),
    (
        lambda p: add("evaluate", network_def={"_target_": f"${p}"}),
        "network_def::_target_: target that is not known",
    ),
    (
        lambda p: add("evaluate", network_def={"_target_": "Compose", "_requires_": f"${p}"}),
        "network_def::_requires_: expression that is not known",
    ),
    (
        lambda p: add("evaluate", network_def={"_target_": "Compose", "_mode_": "debug"}),
        'mode "debug" is neither',
    ),
    (
        lambda p: add("evaluate", reader={"_target_": "LoadImaged", "keys": "a", "reader": "os.system"}),
        'reader::reader: a name that MONAI may look up and call that is not known: "os.system"',
    ),
    (
        lambda p: add("evaluate", reader={"_target_": "LoadImaged", "keys": "a", "reader": "open"}),
        'a name that MONAI may look up and call that is not known: "open"',
    ),
    (
        lambda p: add("evaluate", network_def="%../docs/net.json::a"),
        "takes in another file, which is not checked",
    ),
    (lambda p: config("train", output_dir="/etc"), 'output_dir: "/etc" is a path outside the bundle'),
    (lambda p: config("train", output_dir="C:\\Windows"), "is a path outside the bundle"),
    (lambda p: config("transfer", overlays=["../docs/over"]), '"../docs/over" is a path outside the bundle'),
    (lambda p: config("train", bundle_root="../other"), 'bundle_root must be "."'),
]


HOSTILE_FILES: list[tuple[Callable[[str], Callable[[Path], None]], str]] = [
    (
        lambda p: write(
            "configs/logging.conf",
            "[handlers]\nkeys=a\n[handler_a]\nclass=FileHandler\nargs=('notes', 'w')\n",
        ),
        'configs/logging.conf: [handler_a] has class "FileHandler", not one of StreamHandler',
    ),
    (
        lambda p: write("configs/logging.conf", f"[handler_a]\nclass=StreamHandler\nargs=({p},)\n"),
        "configs/logging.conf: [handler_a] has args",
    ),
    (lambda p: write("docs/over.json", "{}"), "docs/over.json: does not belong in a bundle"),
    (lambda p: write("scripts/__init__.py", p), "scripts/__init__.py: does not belong in a bundle"),
]


@pytest.mark.parametrize(("make", "message"), HOSTILE, ids=numbered(HOSTILE))
def test_a_config_that_runs_something_else_is_found_and_nothing_runs(
    make, message, bundle, tmp_path, nothing_runs
):
    check_hostile(make, message, bundle, tmp_path)


@pytest.mark.parametrize(("make", "message"), HOSTILE_FILES, ids=numbered(HOSTILE_FILES))
def test_a_file_that_runs_something_else_is_found(make, message, bundle, tmp_path, no_network):
    check_hostile(make, message, bundle, tmp_path)


def check_hostile(make: Callable, message: str, bundle: Path, tmp_path: Path) -> None:
    make(TOUCH.format(str(tmp_path / "pwned")))(bundle)
    found = findings(bundle)
    assert [line for line in found if message in line], found
    assert not (tmp_path / "pwned").exists()


def test_strange_text_is_shown_without_its_control_characters(bundle):
    change(bundle / "configs" / "train.json", learning_rate="$1\n\x1b[2Jall is right")
    (line,) = findings(bundle)
    assert line.isprintable() and "\\u001b" in line


# --- packed bundles that were changed


def set_custom_version(folder: Path) -> None:
    file = folder / "custom" / "__init__.py"
    file.write_text(file.read_text().replace('__version__ = "', '__version__ = "9'))


def compiled(folder: Path) -> None:
    (folder / "custom" / "__pycache__").mkdir()
    (folder / "custom" / "__pycache__" / "console.cpython-311.pyc").write_bytes(b"")


CHANGED = [
    (write("docs/README.md", "another"), "docs/README.md: is not what was packed: SHA-256 "),
    (remove("docs/data_license.txt"), "docs/data_license.txt: is missing, the manifest lists it"),
    (write("docs/more.md", ""), "docs/more.md: is not in the manifest"),
    (write("configs/more.json", "{}"), "configs/more.json: is not in the manifest"),
    (write("manifest.json", "{}"), "manifest.json: lists no files"),
    (remove("manifest.json"), "manifest.json: is missing"),
    (
        lambda folder: change(folder / "manifest.json", custom__version="0.0.9"),
        "manifest.json: names other code than 0.1.0, which is in custom/",
    ),
    (set_custom_version, "custom/: is version 90.1.0 ("),
    (write("custom/more.py", "x = 1"), "custom/: is version 0.1.0 ("),
    (remove("custom/console.py"), "custom/: is version 0.1.0 ("),
    (compiled, "custom/: has 1 compiled files, which cannot be checked"),
    (
        write("requirements.txt", "monai @ https://example.org/monai.whl\n"),
        'requirements.txt: "monai @ https://example.org/monai.whl" is no requirement of this release',
    ),
    (write("requirements.txt", "--index-url https://example.org\n"), 'requirements.txt: "--index-url'),
]


@pytest.mark.parametrize(("make", "message"), CHANGED, ids=numbered(CHANGED))
def test_a_packed_bundle_that_was_changed_is_found(make, message, unpacked, no_network):
    make(unpacked)
    found = findings(unpacked)
    assert [line for line in found if message in line], found


def test_the_code_of_another_release_is_not_run(unpacked, nothing_runs):
    write("custom/more.py", "x = 1")(unpacked)
    assert "which cannot judge it" in " ".join(findings(unpacked))


# --- zips


def entry(name: str, mode: int = stat.S_IFREG | 0o644, flags: int = 0) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name)
    info.external_attr = mode << 16
    info.flag_bits |= flags
    return info


ENTRIES = [
    ("../evil.txt", "'../evil.txt': would be written outside the bundle's folder"),
    ("b/../../evil.txt", "would be written outside"),
    ("/etc/evil.txt", "'/etc/evil.txt': would be written outside"),
    ("C:/evil.txt", "'C:/evil.txt': would be written outside"),
    ("b\\..\\..\\evil.txt", "would be written outside"),
    ("b/.hidden", "hidden or not safe"),
    ("b/a\nb.txt", "'b/a\\nb.txt': has a name that is hidden or not safe"),
    ("b/con:stream", "hidden or not safe"),
    ("b/dot.", "hidden or not safe"),
    ("c/two.txt", "the zip must hold one folder"),
    ("beside.txt", "the zip must hold one folder"),
    ("b/LICENSE", "'b/license': 2 entries have this name"),
    ("b/license", "'b/license': 2 entries have this name"),
    ("b/LICENSE/more.txt", "'b/LICENSE': is a file and a folder"),
    (entry("b/link", stat.S_IFLNK | 0o777), "'b/link': is a symbolic link"),
    (entry("b/pipe", stat.S_IFIFO | 0o644), "'b/pipe': is neither a file nor a folder"),
]


@pytest.mark.parametrize(("name", "message"), ENTRIES, ids=numbered(ENTRIES))
def test_a_zip_with_such_an_entry_is_refused_before_anything_is_written(name, message, tmp_path, monkeypatch):
    monkeypatch.setattr(verification, "extract_archive", lambda *_: pytest.fail("it was unpacked"))
    with warnings.catch_warnings(), zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        warnings.simplefilter("ignore")  # about the name that comes twice
        file.writestr("b/LICENSE", "free")
        file.writestr(name, "/etc/passwd")
    found = findings(tmp_path / "a.zip")
    assert [line for line in found if message in line], found


def patched(path: Path, offset: int, value: bytes) -> None:
    """Change bytes of the directory's first entry."""
    content = bytearray(path.read_bytes())
    at = content.index(b"PK\1\2") + offset
    content[at : at + len(value)] = value
    path.write_bytes(bytes(content))


def test_encrypted_and_uncommon_entries_are_refused(tmp_path):
    for offset, value, message in (
        (8, struct.pack("<H", 1), "is encrypted"),
        (10, struct.pack("<H", 12), "is compressed by an uncommon method"),
    ):
        with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
            file.writestr("b/LICENSE", "free")
        patched(tmp_path / "a.zip", offset, value)
        assert findings(tmp_path / "a.zip") == [f"'b/LICENSE': {message}"]


def test_bombs_are_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("b/zeros.txt", bytes(5_000_000))
    (line,) = findings(tmp_path / "a.zip")
    assert re.fullmatch(r"'b/zeros.txt': grows from \d+ to 5000000 bytes when unpacked: a zip bomb", line)
    monkeypatch.setattr(archive, "MAX_BYTES", 1_000_000)
    assert "unpacked it would have 5000000 bytes, more than 1000000: a zip bomb" in findings(
        tmp_path / "a.zip"
    )
    monkeypatch.setattr(archive, "MAX_BYTES", 100)
    assert findings(tmp_path / "a.zip") == ["the zip has more than 100 bytes"]
    monkeypatch.undo()
    monkeypatch.setattr(archive, "MAX_ENTRIES", 3)
    with zipfile.ZipFile(tmp_path / "b.zip", "w") as file:
        for number in range(4):
            file.writestr(f"b/{number}.txt", "")
    assert findings(tmp_path / "b.zip") == ["the zip holds 4 files, more than 3"]


def test_an_entry_that_says_it_is_smaller_than_it_is_stays_small(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("b/LICENSE", bytes(5_000_000))
    patched(tmp_path / "a.zip", 24, struct.pack("<I", 1000))
    (line,) = findings(tmp_path / "a.zip")
    assert line.startswith("'b/LICENSE' ") and "CRC" in line


def test_damaged_zips_are_refused(packed, tmp_path):
    content = packed.read_bytes()
    at = content.index(b"Apache License")
    for name, changed, message in (
        ("half", content[: len(content) // 2], "not a zip, or a damaged one"),
        ("text", b"a report", "not a zip, or a damaged one"),
        ("empty", b"", "not a zip, or a damaged one"),
        ("flipped", content[:at] + b"@" + content[at + 1 :], "LICENSE' cannot be unpacked: Bad CRC-32"),
    ):
        (tmp_path / f"{name}.zip").write_bytes(changed)
        (line,) = findings(tmp_path / f"{name}.zip")
        assert message in line
    with zipfile.ZipFile(tmp_path / "none.zip", "w"):
        pass
    assert findings(tmp_path / "none.zip") == [
        "the zip must hold one folder, the bundle, and nothing beside it"
    ]


def test_a_zip_that_is_no_bundle_is_told_what_it_lacks(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr("b/LICENSE", "free")
    found = findings(tmp_path / "a.zip")
    assert "configs/train.json: is missing" in found and "manifest.json: is missing" in found


# --- requirements


def test_requirements_are_names_and_versions():
    assert package_name("monai>=1.6.1,<1.7") == "monai" and package_name("Scikit_Image") == "scikit-image"
    for line in (
        "-r other.txt",
        "monai @ git+https://example.org",
        "monai; os_name",
        "../here",
        "a==1 --hash=x",
    ):
        with pytest.raises(ValueError, match="is not the name of a package"):
            package_name(line)
