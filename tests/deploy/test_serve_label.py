# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""What is checked before MONAI Label starts; these tests need neither its environment nor a network."""

from __future__ import annotations

import contextlib
import http.server
import importlib.util
import json
import shutil
import socket
import socketserver
import threading
import zipfile
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from monai.bundle import ConfigParser

import custom
from custom.bundle.settings import read_settings, write_settings
from custom.deployment.label_bundle import deploy_bundle, parse_setting
from custom.deployment.label_environment import build_environment, default_folder
from custom.deployment.segment_codes import complete_label_info

ROOT = Path(__file__).resolve().parent.parent.parent
NAME = "covid_ct_attention_unet_segmentation"
SMALL = ["image_size=[32,32]", "network_def::channels=[4,4,4,4,4]"]
SETTINGS = dict(parse_setting(text) for text in SMALL)


def load_script():
    spec = importlib.util.spec_from_file_location("serve_label", ROOT / "scripts" / "serve_label.py")
    script = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(script)
    return script


@pytest.fixture(scope="module")
def serve_label():
    return load_script()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """A copy of a bundle with random weights of a small network."""
    folder = tmp_path_factory.mktemp("bundles") / NAME
    shutil.copytree(ROOT / "bundles" / NAME / "configs", folder / "configs")
    (folder / "models").mkdir()
    torch.save(network(folder, **SETTINGS).state_dict(), folder / "models" / "model.pt")
    return folder


def network(folder: Path, **settings) -> torch.nn.Module:
    parser = ConfigParser()
    parser.read_config(folder / "configs" / "inference.json")
    parser.update(settings)
    return parser.get_parsed_content("network_def")


@pytest.fixture
def scans(tmp_path):
    folder = tmp_path / "scans"
    folder.mkdir()
    nib.save(nib.Nifti1Image(np.zeros((4, 4, 4), np.int16), np.eye(4)), folder / "a.nii.gz")
    return folder


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def line_of(serve_label, capsys, *words: str) -> str:
    """The one line that a mistake ends in."""
    assert serve_label.main([*words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    return line


def words_for(bundle: Path, scans: Path, tmp_path: Path) -> list[str]:
    words = ["--studies", str(scans), "--bundles", str(bundle), "--app-dir", str(tmp_path / "app")]
    return [*words, "--port", str(free_port()), "--set", *SMALL]


def test_the_copy_has_what_the_server_needs_and_the_bundle_is_left_alone(bundle, tmp_path):
    (bundle / "models" / "a.pt").write_bytes(b"MONAI Label would take this one: its name is shorter")
    before = {path: path.read_bytes() for path in bundle.rglob("*") if path.is_file()}
    deployed = deploy_bundle(bundle, tmp_path, settings={**SETTINGS, "width": 0.5})
    assert deployed.settings == set(SETTINGS), "the bundle has no width"
    assert [path.name for path in (deployed.folder / "models").iterdir()] == ["model.pt"]
    for name in ("inference", "train"):
        config = json.loads((deployed.folder / "configs" / f"{name}.json").read_text())
        assert config["image_size"] == [32, 32] and config["network_def"]["channels"] == [4] * 5
        assert "displayable_configs" not in config
    assert config["resume"] is False
    (bundle / "models" / "a.pt").unlink()
    assert {p: p.read_bytes() for p in before if p.name != "a.pt"} == {
        p: content for p, content in before.items() if p.name != "a.pt"
    }


def test_settings_beside_the_weights_go_with_them_into_both_configs(bundle, tmp_path):
    told = {"hu_window": [-1100, 300], "image_size": [64, 64], "channels": [4] * 5, "attention": True}
    write_settings(tmp_path / "mine.pt", told)
    shutil.copy(bundle / "models" / "model.pt", tmp_path / "mine.pt")
    deployed = deploy_bundle(bundle, tmp_path / "app", tmp_path / "mine.pt", {"image_size": [32, 32]})
    assert deployed.settings == {"image_size"}, "only what was asked for"
    assert read_settings(deployed.folder / "models" / "model.pt") == told
    for name in ("inference", "train"):
        config = json.loads((deployed.folder / "configs" / f"{name}.json").read_text())
        assert config["hu_window"] == [-1100, 300] and config["channels"] == [4] * 5
        assert config["image_size"] == [32, 32], "what is asked for wins"
    # Weights trained in the copy have settings of their own.
    write_settings(deployed.folder / "models" / "model.pt", {**told, "hu_window": [-900, 200]})
    torch.manual_seed(2)
    torch.save(network(bundle, **SETTINGS).state_dict(), deployed.folder / "models" / "model.pt")
    deploy_bundle(bundle, tmp_path / "app", tmp_path / "mine.pt")
    config = json.loads((deployed.folder / "configs" / "train.json").read_text())
    assert config["hu_window"] == [-900, 200] and config["image_size"] == [64, 64]
    (tmp_path / "mine.json").write_text("{")
    with pytest.raises(ValueError, match=r"mine.json: is not JSON"):
        deploy_bundle(bundle, tmp_path / "app", tmp_path / "mine.pt")


def test_weights_trained_in_the_copy_stay_until_fresh_ones_are_asked_for(bundle, tmp_path):
    copy = deploy_bundle(bundle, tmp_path, settings=SETTINGS).folder / "models" / "model.pt"
    own = copy.read_bytes()
    torch.manual_seed(1)
    torch.save(network(bundle, **SETTINGS).state_dict(), copy)
    trained = copy.read_bytes()
    assert trained != own
    kept = deploy_bundle(bundle, tmp_path, settings=SETTINGS)
    assert copy.read_bytes() == trained and "trained here" in kept.weights
    with pytest.raises(ValueError, match="does not fit"):  # trained at another size: said, not thrown away
        deploy_bundle(bundle, tmp_path, other_weights(bundle, tmp_path), {"network_def::channels": [8] * 5})
    assert copy.read_bytes() == trained
    fresh = deploy_bundle(bundle, tmp_path, settings=SETTINGS, fresh=True)
    assert copy.read_bytes() == own and "trained here" not in fresh.weights


def other_weights(bundle: Path, folder: Path) -> Path:
    torch.save(network(bundle, **{"network_def::channels": [8] * 5}).state_dict(), folder / "other.pt")
    return folder / "other.pt"


def test_weights_that_do_not_fit_are_refused(serve_label, bundle, scans, tmp_path, capsys):
    words = words_for(bundle, scans, tmp_path)
    line = line_of(serve_label, capsys, *words, "--weights", str(other_weights(bundle, tmp_path)))
    assert "does not fit this DilatedAttentionUNet" in line and "of another shape" in line
    (tmp_path / "text.pt").write_text("no weights")
    line = line_of(serve_label, capsys, *words, "--weights", str(tmp_path / "text.pt"))
    assert "text.pt is not a file of torch.save" in line
    assert not (tmp_path / "app" / "model" / NAME).exists(), "nothing half-deployed"


def test_a_bundle_without_weights_is_refused(serve_label, scans, tmp_path, capsys):
    empty = tmp_path / "bundle_segmentation"
    shutil.copytree(ROOT / "bundles" / NAME / "configs", empty / "configs")
    line = line_of(serve_label, capsys, *words_for(empty, scans, tmp_path))
    assert "bundle_segmentation has no weights" in line and "--weights" in line


def test_a_folder_that_is_no_bundle_and_components_of_another_version(
    serve_label, bundle, scans, tmp_path, capsys
):
    assert "is no bundle to serve" in line_of(serve_label, capsys, *words_for(scans, scans, tmp_path))
    packed = tmp_path / "packed"
    shutil.copytree(bundle, packed)
    (packed / "custom").mkdir()
    (packed / "custom" / "__init__.py").write_text('__version__ = "0.0.1"\n')
    line = line_of(serve_label, capsys, *words_for(packed, scans, tmp_path))
    assert "brings custom 0.0.1" in line and f"this server has custom {custom.__version__}" in line
    # The same version in name with other code is another version too.
    (packed / "custom" / "__init__.py").write_text(f'__version__ = "{custom.__version__}"\n')
    assert "take the bundle of this release" in line_of(
        serve_label, capsys, *words_for(packed, scans, tmp_path)
    )
    shutil.rmtree(packed / "custom")
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(Path(custom.__file__).parent, packed / "custom", ignore=ignored)
    deploy_bundle(packed, tmp_path / "models", settings=SETTINGS)


class Payload:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return (Path.touch, (self.path,))


def hostile_expression(bundle: Path, trace: Path) -> str:
    change(bundle, "inference", network_def=f"$__import__('pathlib').Path({str(trace)!r}).touch()")
    return "configs/inference.json: network_def: expression that is not known"


def hostile_target(bundle: Path, trace: Path) -> str:
    change(bundle, "train", network_def={"_target_": "os.system", "command": f"touch {trace}"})
    return 'configs/train.json: network_def::_target_: target that is not known: "os.system"'


def hostile_metadata(bundle: Path, trace: Path) -> str:
    change(bundle, "metadata", description=f"$open({str(trace)!r}, 'w')")
    return "configs/metadata.json: description: expression that is not known"


def hostile_logging(bundle: Path, trace: Path) -> str:
    content = f"[handlers]\nkeys=a\n[handler_a]\nclass=FileHandler\nargs=({str(trace)!r}, 'w')\n"
    (bundle / "configs" / "logging.conf").write_text(content)
    return 'configs/logging.conf: [handler_a] has class "FileHandler"'


def a_link_in_place_of_a_config(bundle: Path, trace: Path) -> str:
    config = bundle / "configs" / "inference.json"
    config.rename(trace.with_name("elsewhere.json"))
    config.symlink_to(trace.with_name("elsewhere.json"))
    return "configs/inference.json: is not a plain file"


def a_link_in_place_of_the_configs(bundle: Path, trace: Path) -> str:
    shutil.move(bundle / "configs", trace.with_name("elsewhere"))
    (bundle / "configs").symlink_to(trace.with_name("elsewhere"))
    return "configs: is not a plain file"


def change(bundle: Path, config: str, **keys) -> None:
    file = bundle / "configs" / f"{config}.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **keys}))


HOSTILE = [
    hostile_expression,
    hostile_target,
    hostile_metadata,
    hostile_logging,
    a_link_in_place_of_a_config,
    a_link_in_place_of_the_configs,
]


@pytest.mark.parametrize("make", HOSTILE)
def test_a_bundle_that_runs_something_else_is_refused_and_nothing_runs(
    make, serve_label, bundle, scans, tmp_path, capsys
):
    copy, trace = tmp_path / NAME, tmp_path / "pwned"
    shutil.copytree(bundle, copy)
    message = make(copy, trace)
    line = line_of(serve_label, capsys, *words_for(copy, scans, tmp_path))
    assert line.startswith(f"error: {copy} is not served: ") and message in line and "--allow" in line
    assert not trace.exists() and not (tmp_path / "app").exists()


def test_what_the_owner_agrees_to_is_served(serve_label, bundle, scans, tmp_path, capsys):
    copy = tmp_path / NAME
    shutil.copytree(bundle, copy)
    change(copy, "train", learning_rate="$1 / 1000")
    (tmp_path / "mine.txt").write_text("$1 / 1000\n")
    words = words_for(copy, scans, tmp_path)
    assert 'learning_rate: expression that is not known: "$1 / 1000"' in line_of(serve_label, capsys, *words)
    words += ["--allow", str(tmp_path / "mine.txt")]
    assert serve_label.deploy_all(serve_label.parse_arguments(words)) == [NAME]


def test_hostile_weights_are_refused_and_not_run(serve_label, bundle, scans, tmp_path, capsys):
    torch.save({"a": Payload(tmp_path / "pwned")}, tmp_path / "mine.pt")
    words = [*words_for(bundle, scans, tmp_path), "--weights", str(tmp_path / "mine.pt")]
    line = line_of(serve_label, capsys, *words)
    assert "mine.pt holds more than tensors; such a file could run code and is not loaded" in line
    assert not (tmp_path / "pwned").exists() and not (tmp_path / "app").exists()


@pytest.mark.parametrize("name", ["../pwned", f"{NAME}/../../pwned", "/tmp/pwned"])
def test_a_zip_is_not_unpacked_by_the_server(name, serve_label, scans, tmp_path, capsys):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(name, "")
    line = line_of(serve_label, capsys, *words_for(tmp_path / "a.zip", scans, tmp_path))
    assert "a.zip is no folder; check a zip by scripts/verify_bundle.py" in line
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.zip", "scans"]


def test_a_port_in_use(serve_label, bundle, scans, tmp_path, capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        words = [*words_for(bundle, scans, tmp_path), "--port", str(port)]
        assert f"127.0.0.1:{port}: address already in use" in line_of(serve_label, capsys, *words)


def test_a_host_that_is_not_this_machine(serve_label, bundle, scans, tmp_path, capsys):
    line = line_of(serve_label, capsys, *words_for(bundle, scans, tmp_path), "--host", "192.0.2.1")
    assert line.endswith("cannot assign requested address; give another --host")


def test_a_dicomweb_server_that_is_down(serve_label, bundle, scans, tmp_path, capsys):
    url = f"http://127.0.0.1:{free_port()}/dicom-web"
    words = [*words_for(bundle, scans, tmp_path), "--studies", url]
    line = line_of(serve_label, capsys, *words)
    assert f"{url} does not answer" in line and "refused" in line


def test_an_address_that_is_no_dicomweb_server(serve_label, bundle, scans, tmp_path, capsys):
    with web_server(tmp_path) as url:
        words = [*words_for(bundle, scans, tmp_path), "--studies"]
        assert "is no DICOMweb root: /studies answers 404" in line_of(serve_label, capsys, *words, url)
        (tmp_path / "studies").write_text("<html>a welcome page</html>")
        assert "its /studies is not JSON" in line_of(serve_label, capsys, *words, url)


def test_an_address_where_no_web_server_answers(serve_label, bundle, scans, tmp_path, capsys):
    with ssh_server() as url:
        words = [*words_for(bundle, scans, tmp_path), "--studies", url]
        line = line_of(serve_label, capsys, *words)
    assert line == f"error: {url} is no DICOMweb root: what answers there does not speak HTTP"


@pytest.mark.parametrize("host", ["127.0.0.1:abc", "127.0.0.1:99999", "[::1", "a b", ""])
def test_an_address_that_is_none(host, serve_label, bundle, scans, tmp_path, capsys):
    words = [*words_for(bundle, scans, tmp_path), "--studies", f"http://{host}/dicom-web"]
    assert f"http://{host}/dicom-web is not a valid address" in line_of(serve_label, capsys, *words)


@contextlib.contextmanager
def ssh_server():
    class Greeting(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            self.rfile.readline()
            self.wfile.write(b"SSH-2.0-OpenSSH\r\n")

    with socketserver.TCPServer(("127.0.0.1", 0), Greeting) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


@contextlib.contextmanager
def web_server(folder: Path):
    class Quiet(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args, **kwargs) -> None:
            super().__init__(*args, directory=str(folder), **kwargs)

        def log_message(self, *args) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Quiet)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_folders_without_scans(serve_label, bundle, scans, tmp_path, capsys):
    words = words_for(bundle, scans, tmp_path)
    line = line_of(serve_label, capsys, *words, "--studies", str(tmp_path / "none"))
    assert "is no folder" in line
    (tmp_path / "empty").mkdir()
    line = line_of(serve_label, capsys, *words, "--studies", str(tmp_path / "empty"))
    assert "no NIfTI file" in line and "Orthanc" in line


def test_settings_that_nothing_knows(serve_label, bundle, scans, tmp_path, capsys):
    words = words_for(bundle, scans, tmp_path)
    assert "image_sizes: no config" in line_of(serve_label, capsys, *words, "image_sizes=[64,64]")
    assert "--set needs KEY=VALUE" in line_of(serve_label, capsys, *words, "image_size")
    assert parse_setting("select_slices=all") == ("select_slices", "all")


def test_an_environment_that_cannot_be_built_says_why(tmp_path, monkeypatch):
    (tmp_path / "environment").mkdir()
    (tmp_path / "environment" / "thesis.txt").touch()
    with pytest.raises(ValueError, match="is in the way"):
        build_environment(tmp_path / "environment")
    assert (tmp_path / "environment" / "thesis.txt").exists()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(OSError, match=r"cannot be built: ERROR: .*; all of it is in .*other\.log"):
        build_environment(tmp_path / "other")
    monkeypatch.setenv("COVID_CT_CACHE", str(tmp_path))
    assert default_folder() == tmp_path / "monailabel-0.8.5"


def test_codes_of_segments():
    (entry,) = complete_label_info(None, [1], "some model")
    attribute = entry["segmentAttribute"]
    kind, category = (attribute[f"SegmentedProperty{word}CodeSequence"] for word in ("Type", "Category"))
    assert (kind["CodeValue"], kind["CodingSchemeDesignator"], kind["CodeMeaning"]) == (
        *("112001", "DCM"),
        "Opacity",
    )
    assert (
        category["CodeValue"] == "49755003" and attribute["AnatomicRegionSequence"]["CodeValue"] == "39607008"
    )
    assert attribute["labelID"] == 1 and attribute["SegmentAlgorithmType"] == "AUTOMATIC"
    assert entry["model_name"] == "some model"
    given = {"name": "tumour", "segmentAttribute": {"labelID": 2}}
    first, second = complete_label_info(
        [{"name": "Opacity", "color": [1, 2, 3, 255]}, given], [1, 2], "m", True
    )
    assert first["segmentAttribute"]["recommendedDisplayRGBValue"] == [1, 2, 3]
    assert first["segmentAttribute"]["SegmentAlgorithmType"] == "SEMIAUTOMATIC"
    assert second["segmentAttribute"] == {"labelID": 2}
    with pytest.raises(ValueError, match="no DICOM codes are known for the segment 'spleen'"):
        complete_label_info([{"name": "spleen"}], [1], "m")
