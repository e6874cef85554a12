# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""An Orthanc of our own with its DICOMweb plugin."""

from __future__ import annotations

import contextlib
import json
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pydicom
import requests
from label_tester import TALKED_TO, free_port

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_SECONDS = 60


class Orthanc:
    """A client of one running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.dicomweb = f"{self.url}/dicom-web"

    def get(self, path: str) -> Any:
        answer = requests.get(f"{self.url}{path}", timeout=30)
        assert answer.ok, answer.text
        return answer.json()

    def upload(self, files: Iterable[Path]) -> None:
        for file in files:
            answer = requests.post(f"{self.url}/instances", data=Path(file).read_bytes(), timeout=30)
            assert answer.ok, answer.text

    def segmentations(self) -> list[pydicom.Dataset]:
        found = requests.post(
            f"{self.url}/tools/find", json={"Level": "Instance", "Query": {"Modality": "SEG"}}, timeout=30
        ).json()
        contents = (requests.get(f"{self.url}/instances/{i}/file", timeout=30).content for i in found)
        return [pydicom.dcmread(BytesIO(content)) for content in contents]


@contextlib.contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    program = shutil.which("Orthanc")
    assert program and PLUGIN.is_file(), "install the packages orthanc and orthanc-dicomweb"
    port = free_port()
    configuration = {
        "Name": "tests",
        "StorageDirectory": str(folder / "storage"),
        "IndexDirectory": str(folder / "storage"),
        "Plugins": [str(PLUGIN)],
        "HttpPort": port,
        "DicomServerEnabled": False,
        "RemoteAccessAllowed": False,
        "AuthenticationEnabled": False,
        "DicomWeb": {"Enable": True, "Root": "/dicom-web/"},
    }
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "orthanc.json").write_text(json.dumps(configuration))
    with open(folder / "orthanc.log", "w", encoding="utf-8") as log:
        process = subprocess.Popen(
            [program, str(folder / "orthanc.json")], stdout=log, stderr=subprocess.STDOUT
        )
    try:
        yield _wait(process, Orthanc(port), folder / "orthanc.log")
    finally:
        process.terminate()
        process.wait(30)


def _wait(process: subprocess.Popen, orthanc: Orthanc, log: Path) -> Orthanc:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            system = orthanc.get("/system")
            plugin = orthanc.get("/plugins/dicom-web")["Version"]
            TALKED_TO.append(f"Orthanc {system['Version']}, DICOMweb {plugin}: {orthanc.dicomweb}")
            return orthanc
        except requests.ConnectionError:
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])
