# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""A MONAI Label server: start it, wait until it answers, stop it with all it has started."""

from __future__ import annotations

import errno
import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

__all__ = ["LabelServer", "check_port", "check_studies"]

PACKAGE = Path(__file__).resolve().parent.parent
START_SECONDS = 180.0
STOP_SECONDS = 5.0
MAIN = "from custom.deployment.label_app import OpacityApp  # noqa: F401 - found by its base class\n"


def check_port(host: str, port: int) -> None:
    """Make sure that a server can listen here.

    Args:
        host: address.
        port: number.

    Raises:
        OSError: In one line, when it cannot.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OverflowError:
            raise ValueError(f"port {port} is not a number from 0 to 65535") from None
        except OSError as error:
            wrong_host = isinstance(error, socket.gaierror) or error.errno == errno.EADDRNOTAVAIL
            option = "--host" if wrong_host else "--port"
            raise OSError(
                f"cannot listen on {host}:{port}: {str(error.strerror).lower()}; give another {option}"
            ) from None


def check_studies(studies: str) -> str:
    """Make sure that there is something to annotate.

    Args:
        studies: folder of NIfTI files, or the address of a DICOMweb server.

    Returns:
        The address, or the folder's whole path.

    Raises:
        OSError: In one line, when the folder or the server is not there.
        ValueError: When the server does not speak DICOMweb.
    """
    if re.match(r"https?://", studies):
        url = studies.rstrip("/")
        if not _is_address(url):
            raise ValueError(f"{url} is not a valid address; give one like http://127.0.0.1:8042/dicom-web")
        request = urllib.request.Request(
            f"{url}/studies?limit=1", headers={"Accept": "application/dicom+json"}
        )
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                content = answer.read()
                if content:
                    json.loads(content)
        except urllib.error.HTTPError as error:
            if error.code not in (401, 403):  # MONAI Label has the user's name and password
                raise OSError(f"{url} is no DICOMweb root: /studies answers {error.code}") from None
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            reason = getattr(error, "reason", error)
            raise OSError(f"the DICOMweb server {url} does not answer: {reason}; is it running?") from None
        except http.client.HTTPException:
            raise ValueError(f"{url} is no DICOMweb root: what answers there does not speak HTTP") from None
        except ValueError:
            raise ValueError(f"{url} is no DICOMweb root: its /studies is not JSON") from None
        return url
    folder = Path(studies).expanduser().resolve()
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder} is no folder; give one with NIfTI files, or a DICOMweb URL")
    if not any(path.name.lower().endswith((".nii", ".nii.gz")) for path in folder.iterdir()):
        raise FileNotFoundError(
            f"no NIfTI file (.nii, .nii.gz) in {folder}; for DICOM give a DICOMweb server, such as Orthanc"
        )
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{folder} cannot be written to; MONAI Label saves labels in it")
    return str(folder)


def _is_address(url: str) -> bool:
    try:
        parts = urllib.parse.urlsplit(url)
        return bool(parts.hostname) and parts.port != 0 and not re.search(r"\s", url)
    except ValueError:  # of a port that is no number, among others
        return False


class LabelServer:
    """One server process in the environment that :func:`build_environment` makes.

    Args:
        python: the environment's interpreter.
        folder: the app: models, logs, what is fetched from DICOMweb.
        models: names of the deployed bundles.
        studies: as :func:`check_studies` returns it.
        host: address to listen on.
        port: number to listen on.
    """

    def __init__(
        self,
        python: Path,
        folder: str | os.PathLike,
        models: Sequence[str],
        studies: str,
        host: str = "127.0.0.1",
        port: int = 8000,
    ) -> None:
        self.python = python
        self.folder = Path(folder).resolve()
        self.models = list(models)
        self.studies = studies
        self.host, self.port = host, port
        self.log = self.folder / "logs" / "server.log"
        self.process: subprocess.Popen | None = None

    @property
    def url(self) -> str:
        shown = "127.0.0.1" if self.host in ("0.0.0.0", "::") else self.host
        return f"http://{shown}:{self.port}"

    def start(self) -> dict[str, Any]:
        """Start, and wait until the server answers with all models.

        Returns:
            The server's answer to ``/info/``.

        Raises:
            OSError: In one line, when it cannot start.
        """
        check_port(self.host, self.port)
        self._prepare()
        command = [str(self.python), "-m", "monailabel.main", "start_server"]
        command += ["--app", str(self.folder), "--studies", self.studies]
        command += ["--host", self.host, "--port", str(self.port)]
        command += ["--conf", "models", ",".join(self.models)]
        with open(self.log, "w", encoding="utf-8") as log:
            self.process = subprocess.Popen(
                command,
                cwd=self.folder,
                env=self._environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # so that a training it has started is stopped with it
            )
        try:
            return self._wait_until_up()
        except BaseException:
            self.stop()
            raise

    def wait(self) -> int:
        """Wait until the server ends; returns its exit code."""
        if self.process is None:
            raise ValueError("the server has not been started")
        return self.process.wait()

    def stop(self) -> None:
        """Stop the server and what it has started."""
        process, self.process = self.process, None
        if process is None:
            return
        for kind in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(process.pid, kind)
            except ProcessLookupError:
                break
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                continue

    def _prepare(self) -> None:
        """The app's file, and a copy of this package, which goes on serving while the repository changes."""
        self.log.parent.mkdir(parents=True, exist_ok=True)
        (self.folder / "main.py").write_text(MAIN, encoding="utf-8")
        copy = self.folder / "python" / PACKAGE.name
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))

    def _environment(self) -> dict[str, str]:
        inherited = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
        return {
            **inherited,
            "PYTHONPATH": str(self.folder / "python"),
            "PATH": f"{self.python.parent}{os.pathsep}{os.environ.get('PATH', '')}",  # dcmqi's programs
            "MONAI_LABEL_DATASTORE_FILE_EXT": '["*.nii.gz", "*.nii"]',
            "MONAI_LABEL_DICOMWEB_CACHE_PATH": str(self.folder / "dicom"),
            "MONAI_LABEL_TRACKING_ENABLED": "false",
        }

    def _wait_until_up(self) -> dict[str, Any]:
        assert self.process is not None  # start() has set it
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # this machine needs none
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise OSError(f"MONAI Label did not start: {self._last_error()}; all of it is in {self.log}")
            try:
                with direct.open(f"{self.url}/info/", timeout=10) as answer:
                    info = dict(json.loads(answer.read()))
            except (OSError, ValueError):
                time.sleep(0.3)
                continue
            absent = sorted(set(self.models) - set(info["models"]))
            if absent:
                raise OSError(f"MONAI Label has not loaded {', '.join(absent)}; {self.log} says why")
            return info
        raise OSError(f"MONAI Label did not answer within {START_SECONDS:.0f} s; its log is {self.log}")

    def _last_error(self) -> str:
        lines = [line.strip() for line in self.log.read_text("utf-8", "replace").splitlines() if line.strip()]
        errors = [line for line in lines if re.match(r"^[\w.]*(Error|Exception)\b", line)]
        return (errors or lines or ["no message"])[-1][:300]
