# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch

import custom
from custom.bundle import packing
from custom.bundle.archive import extract_archive
from custom.bundle.loading import WeightsLoader, describe_misfit, load_safely, read_weights
from custom.bundle.packing import CODE_PATH, pack_bundle, with_code_path
from custom.bundle.vendored import code_sha256, code_version

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "covid_ct_scoatnet_segmentation"
REQUIREMENTS = ("monai>=1.6.1,<1.7", "torch>=2.8,<2.14")
PACKAGE = Path(custom.__file__).parent
EXPORTED = ("models/model.onnx", "models/model.ts")
LEFT = ("models/checkpoint_latest.pt", *EXPORTED, "eval/scores.json", "cache/slices/a/image.npy")


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    """A copy of a bundle with weights and what training leaves beside it."""
    folder = tmp_path / NAME
    shutil.copytree(ROOT / "bundles" / NAME, folder, ignore=shutil.ignore_patterns("models", "eval", "cache"))
    (folder / "models").mkdir(exist_ok=True)
    torch.save({"weight": torch.arange(3.0)}, folder / "models" / "model.pt")
    for name in LEFT:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("left by a training")
    return folder


def unpacked(path: Path, folder: Path) -> Path:
    return extract_archive(path, folder)


def test_a_zip_holds_bundle_code_and_manifest(bundle, tmp_path):
    packed = pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS)
    with zipfile.ZipFile(packed.path) as archive:
        entries = {entry.filename.removeprefix(f"{NAME}/"): entry for entry in archive.infolist()}
        content = {name: archive.read(entry) for name, entry in entries.items()}
    assert packed.sha256 == hashlib.sha256(packed.path.read_bytes()).hexdigest()
    sources = [path for path in PACKAGE.rglob("*.py") if "__pycache__" not in path.parts]
    assert {f"custom/{path.relative_to(PACKAGE).as_posix()}" for path in sources} <= set(content)
    assert content["custom/__init__.py"] == (PACKAGE / "__init__.py").read_bytes()
    assert content["models/model.pt"] == (bundle / "models" / "model.pt").read_bytes()
    assert content["requirements.txt"].decode().split() == list(REQUIREMENTS)
    assert {"README.md", "LICENSE", "docs/README.md", "configs/logging.conf"} <= set(content)
    assert not [name for name in content if name.startswith(("eval", "cache")) or "checkpoint_" in name]
    assert not set(EXPORTED) & set(content)
    assert set(packed.left_out) == set(LEFT)
    manifest = json.loads(content.pop("manifest.json"))
    assert manifest["files"] == {name: hashlib.sha256(b).hexdigest() for name, b in content.items()}
    assert manifest["custom"] == {"version": custom.__version__, "sha256": code_sha256(PACKAGE)}
    assert manifest["weights"]["sha256"] == packed.weights_sha256 == manifest["files"]["models/model.pt"]


def test_a_bundle_without_weights_says_so(bundle, tmp_path):
    (bundle / "models" / "model.pt").unlink()
    packed = pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS)
    folder = unpacked(packed.path, tmp_path / "out")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert packed.weights_sha256 is None and manifest["weights"] is None and manifest["weights_reason"]
    assert "It has no weights" in (folder / "README.md").read_text()


def test_equal_input_gives_equal_bytes(bundle, tmp_path):
    first = pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS).sha256
    again = tmp_path / "elsewhere" / NAME
    for path in sorted(
        bundle.rglob("*"), reverse=True
    ):  # made in another order, at another time, other rights
        if path.is_file():
            copy = again / path.relative_to(bundle)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
            os.utime(copy, (1_000_000_000, 1_000_000_000))
            copy.chmod(0o600)
    assert pack_bundle(again, tmp_path / "b.zip", REQUIREMENTS).sha256 == first
    (again / "docs" / "README.md").write_text("another page")
    assert pack_bundle(again, tmp_path / "b.zip", REQUIREMENTS).sha256 != first


def test_an_unpacked_bundle_packs_to_the_same_bytes(bundle, tmp_path):
    first = pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS)
    folder = unpacked(first.path, tmp_path / "out")
    assert pack_bundle(folder, tmp_path / "b.zip", REQUIREMENTS).sha256 == first.sha256


def test_configs_change_only_where_the_code_is_found(bundle, tmp_path):
    folder = unpacked(pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS).path, tmp_path / "out")
    for path in sorted((bundle / "configs").glob("*.json")):
        before = json.loads(path.read_text())
        after = json.loads((folder / "configs" / path.name).read_text())
        if "imports" in before:
            assert after.pop("code_path") == CODE_PATH, path.name
            assert after["imports"][: len(before["imports"])] == before["imports"]
            after["imports"] = before["imports"]
            if "network_def" in before:
                assert after["network_def"].pop("_requires_") == "@code_path"
        if "initialize" in before:
            assert after["initialize"][:2] == ["@code_path", "$import custom"]
            after["initialize"] = after["initialize"][2:]
        assert after == before and list(after) == list(before), path.name


def test_a_config_that_knows_its_code_is_left_alone():
    config = {"imports": ["$import os"], "bundle_root": ".", "initialize": ["$1"], "network_def": {"a": 1}}
    once = with_code_path(config)
    assert with_code_path(once) == once and "code_path" not in config
    with pytest.raises(ValueError, match="needs bundle_root"):
        with_code_path({"imports": []})


def stray(folder: Path) -> str:
    (folder / "torch.py").write_text("")
    return r"torch\.py does not belong in a bundle"


def second_weights(folder: Path) -> str:
    shutil.copy(folder / "models" / "model.pt", folder / "models" / "best.pt")
    return r"best\.pt does not belong in a bundle"


def link(folder: Path) -> str:
    (folder / "docs" / "notes.md").symlink_to("/etc/hostname")
    return r"notes\.md does not belong in a bundle"


def linked_folder(folder: Path) -> str:
    (folder / "docs" / "more").symlink_to(folder / "configs", target_is_directory=True)
    return r"more does not belong in a bundle"


def other_code(folder: Path) -> str:
    (folder / "custom").mkdir()
    (folder / "custom" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    return "code of another version"


def no_version(folder: Path) -> str:
    (folder / "configs" / "metadata.json").write_text('{"version": "../1"}')
    return "has no version"


def broken_config(folder: Path) -> str:
    (folder / "configs" / "train.json").write_text("{")
    return r"train\.json: is not JSON"


def no_bundle(folder: Path) -> str:
    shutil.rmtree(folder / "configs")
    return "is no bundle"


FAULTS = [stray, second_weights, link, linked_folder, other_code, no_version, broken_config, no_bundle]


@pytest.mark.parametrize("fault", FAULTS)
def test_what_cannot_be_packed_leaves_nothing(fault, bundle, tmp_path):
    message = fault(bundle)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS)
    assert not (tmp_path / "a.zip").exists()


def test_a_file_that_changes_meanwhile_is_noticed(bundle, tmp_path, monkeypatch):
    real = packing.file_sha256

    def then_changed(path):
        digest = real(path)
        if Path(path).name == "LICENSE":
            Path(path).write_text("another licence")
        return digest

    monkeypatch.setattr(packing, "file_sha256", then_changed)
    with pytest.raises(ValueError, match="LICENSE changed while it was packed"):
        pack_bundle(bundle, tmp_path / "a.zip", REQUIREMENTS)
    assert not (tmp_path / "a.zip").exists()


def test_the_code_hash_sees_names_and_contents_and_nothing_else(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("1")
    first = code_sha256(tmp_path / "a")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "x.cpython-311.pyc").write_text("compiled")
    (tmp_path / "a" / ".hidden").write_text("")
    assert code_sha256(tmp_path / "a") == first
    (tmp_path / "a" / "x.py").rename(tmp_path / "a" / "y.py")
    assert code_sha256(tmp_path / "a") != first
    (tmp_path / "a" / "y.py").rename(tmp_path / "a" / "x.py")
    (tmp_path / "a" / "x.py").write_text("2")
    assert code_sha256(tmp_path / "a") != first
    assert code_version(PACKAGE) == custom.__version__ and code_version(tmp_path) == "of unknown version"


class TestWhichCodeRuns:
    """Processes of their own, isolated from the environment that the tests run in (-S: no site-packages)."""

    @pytest.fixture
    def carried(self, tmp_path: Path) -> Path:
        shutil.copytree(PACKAGE, tmp_path / "b" / "custom", ignore=shutil.ignore_patterns("__pycache__"))
        return tmp_path / "b"

    def use(self, bundle: Path, before: str = "", argv: str = "-c", path: str = "") -> tuple[int, str, str]:
        code = (
            f"import sys; sys.argv = [{argv!r}]\n{before}\nimport runpy\n"
            f"runpy.run_path({str(bundle / 'custom/bundle/vendored.py')!r})['use_vendored']()\n"
            "import custom; print(custom.__file__)"
        )
        done = subprocess.run(
            [sys.executable, "-S", "-c", code],
            env={"PYTHONPATH": path},
            cwd=bundle.parent,
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode, done.stdout.strip(), done.stderr.strip()

    def test_the_carried_code_is_found(self, carried):
        assert self.use(carried, "import importlib.util as u; assert u.find_spec('custom') is None") == (
            0,
            str(carried / "custom" / "__init__.py"),
            "",
        )

    def test_a_folder_without_code_is_passed_over(self, carried):
        (carried.parent / "custom").mkdir()
        code, out, _ = self.use(carried, "import custom; assert custom.__file__ is None")
        assert (code, out) == (0, str(carried / "custom" / "__init__.py"))

    def test_the_same_code_elsewhere_is_as_good(self, carried):
        code, out, _ = self.use(carried, "import custom", path=str(ROOT))
        assert (code, out) == (0, str(PACKAGE / "__init__.py"))

    def test_another_version_is_named_with_both_versions(self, carried):
        file = carried / "custom" / "__init__.py"
        file.write_text(file.read_text().replace(f'"{custom.__version__}"', '"99.0"'))
        code, _, err = self.use(carried, "import custom", path=str(ROOT))
        said = err.splitlines()[-1]
        assert code == 1 and said.startswith("ImportError: the bundle b brings custom 99.0 (SHA-256 "), err
        assert f"custom {custom.__version__} (SHA-256 {code_sha256(PACKAGE)[:12]}) is already loaded" in said
        code, _, err = self.use(carried, "import custom", "/x/monai/bundle/__main__.py", path=str(ROOT))
        assert code == 2 and err.startswith("error: the bundle b brings custom 99.0") and "\n" not in err

    def test_same_version_and_other_files_are_another_version(self, carried):
        (carried / "custom" / "console.py").write_text("")
        code, _, err = self.use(carried, "import custom", path=str(ROOT))
        assert code == 1 and "is already loaded" in err.splitlines()[-1]

    def test_a_stranger_named_custom(self, carried):
        (carried.parent / "custom.py").write_text("")
        code, _, err = self.use(carried, "import custom")
        assert code == 1 and "another package named custom is already loaded" in err.splitlines()[-1]


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def compressed(path: Path) -> None:
    torch.save({"a": torch.zeros(1000)}, path)
    with zipfile.ZipFile(path) as archive:
        content = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in content.items():
            archive.writestr(name, data)


def with_code(path: Path, **options) -> None:
    torch.save({"a": Payload(path.with_name("pwned"))}, path, **options)


def with_code_the_old_way(path: Path) -> None:
    with_code(path, _use_new_zipfile_serialization=False)


BAD_WEIGHTS = [
    (with_code, "could run code"),
    (with_code_the_old_way, "not a file of torch.save"),
    (lambda path: path.write_text("a report"), "not a file of torch.save, or a damaged one"),
    (lambda path: path.write_bytes(b""), "not a file of torch.save, or a damaged one"),
    (lambda path: torch.save([torch.zeros(1)], path), "no state_dict"),
    (lambda path: torch.save({"a": 1.0}, path), "no state_dict"),
    (lambda path: torch.save(torch.nn.Linear(1, 1), path), "could run code"),
    (compressed, "compressed inside"),
]


@pytest.mark.parametrize(("make", "message"), BAD_WEIGHTS)
def test_what_is_no_weights_file_is_refused_and_not_run(make, message, tmp_path):
    make(tmp_path / "model.pt")
    with pytest.raises(ValueError, match=message) as raised:
        read_weights(tmp_path / "model.pt")
    assert "\n" not in str(raised.value) and not (tmp_path / "pwned").exists()


def test_half_a_file_is_refused(tmp_path):
    torch.save({"a": torch.zeros(100)}, tmp_path / "model.pt")
    content = (tmp_path / "model.pt").read_bytes()
    (tmp_path / "model.pt").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_safely(tmp_path / "model.pt")
    with pytest.raises(FileNotFoundError, match="should hold weights"):
        load_safely(tmp_path / "none.pt")


def test_misfit_by_hand():
    network = torch.nn.Linear(2, 3)  # weight (3, 2), bias (3)
    assert describe_misfit(network.state_dict(), network) == ""
    wrong = {"weight": torch.zeros(3, 3), "scale": torch.zeros(1)}
    assert describe_misfit(wrong, network) == (
        "of 2 tensors 1 missing (first 'bias'), 1 unexpected (first 'scale'), "
        "1 of another shape (first 'weight')"
    )


@pytest.mark.parametrize("nested", [False, True])
def test_the_loader_loads_or_says_why_not(nested, tmp_path):
    source, target = torch.nn.Linear(2, 3), torch.nn.Linear(2, 3)
    state = source.state_dict()
    torch.save({"model": state} if nested else state, tmp_path / "model.pt")
    engine = torch.nn.Module()  # anything with a state
    engine.state = type("State", (), {"max_epochs": None, "epoch": 0})()
    WeightsLoader(str(tmp_path / "model.pt"), {"model": target}, name="test")(engine)
    assert torch.equal(target.weight, source.weight)
    with pytest.raises(ValueError, match=r"model\.pt does not fit this Conv2d: of 2 tensors 2 of another"):
        WeightsLoader(str(tmp_path / "model.pt"), {"model": torch.nn.Conv2d(1, 1, 1)}, name="test")(engine)
