# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""An Orthanc of our own with its DICOMweb plugin, and a client of both that needs no library."""

from __future__ import annotations

import contextlib
import json
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterable, Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from pydicom import Dataset, dcmread

PLUGIN = Path("/usr/share/orthanc/plugins/libOrthancDicomWeb.so")
START_SECONDS = 60


def is_installed() -> bool:
    return shutil.which("Orthanc") is not None and PLUGIN.is_file()


class Orthanc:
    """A client of one running server."""

    def __init__(self, port: int) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.dicomweb = f"{self.url}/dicom-web"

    def ask(self, url: str, data: bytes | None = None, **headers: str) -> bytes:
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        request = urllib.request.Request(url, data, named)
        try:
            with urllib.request.urlopen(request, timeout=60) as answer:
                return bytes(answer.read())
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{url}: {error.code} {error.read()[:500]!r}") from error

    def get(self, path: str) -> Any:
        return json.loads(self.ask(f"{self.url}{path}"))

    def upload(self, files: Iterable[Path]) -> None:
        for file in files:
            self.ask(f"{self.url}/instances", Path(file).read_bytes())

    def segmentations(self) -> list[Dataset]:
        query = json.dumps({"Level": "Instance", "Query": {"Modality": "SEG"}}).encode()
        found = json.loads(self.ask(f"{self.url}/tools/find", query))
        return [dcmread(BytesIO(self.ask(f"{self.url}/instances/{i}/file"))) for i in found]

    def store(self, files: Iterable[Path]) -> list[str]:
        """DICOMweb's STOW-RS; returns the SOP Instance UIDs that the server says it has stored."""
        boundary = uuid.uuid4().hex
        parts = [
            b"--%s\r\nContent-Type: application/dicom\r\n\r\n%s\r\n" % (boundary.encode(), file.read_bytes())
            for file in files
        ]
        content_type = f'multipart/related; type="application/dicom"; boundary={boundary}'
        answer = json.loads(
            self.ask(
                f"{self.dicomweb}/studies",
                b"".join(parts) + b"--%s--\r\n" % boundary.encode(),
                Content_Type=content_type,
                Accept="application/dicom+json",
            )
        )
        assert not answer.get("00081198", {}).get("Value"), f"failed: {answer['00081198']}"
        return [item["00081155"]["Value"][0] for item in answer["00081199"]["Value"]]

    def query(self, path: str, **matching: str) -> list[dict[str, Any]]:
        """DICOMweb's QIDO-RS."""
        words = "&".join(f"{name}={value}" for name, value in matching.items())
        return list(json.loads(self.ask(f"{self.dicomweb}/{path}?{words}", Accept="application/dicom+json")))

    def retrieve(self, path: str) -> list[Dataset]:
        """DICOMweb's WADO-RS: the instances as they are stored."""
        wanted = 'multipart/related; type="application/dicom"; transfer-syntax=*'
        body = self.ask(f"{self.dicomweb}/{path}", Accept=wanted)
        boundary = body[: body.index(b"\r\n")]
        parts = [part for part in body.split(boundary) if part not in (b"", b"--", b"--\r\n")]
        contents = [part.split(b"\r\n\r\n", 1)[1].removesuffix(b"\r\n") for part in parts]
        return [dcmread(BytesIO(content)) for content in contents]


@contextlib.contextmanager
def running_orthanc(folder: Path) -> Iterator[Orthanc]:
    program = shutil.which("Orthanc")
    assert program and is_installed(), "install the packages orthanc and orthanc-dicomweb"
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
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
            orthanc.get("/system")
            return orthanc
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise AssertionError(log.read_text()[-2000:])
