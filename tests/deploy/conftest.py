# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Real servers, a real client, a real browser: ``make test-deploy`` runs these, ``make test`` the quick ones.

They need MONAI Label's environment, which is built where it is missing, and the Debian packages of
``install_debian.sh``.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

SERVERS = ["test_label_rest.py", "test_label_ohif.py", "test_deploy_app.py"]
collect_ignore = [] if os.environ.get("TEST_DEPLOY") == "1" else SERVERS


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Weights of small networks, trained for a moment on synthetic CTs, by name of the bundle."""
    from label_tester import train_models

    return train_models(tmp_path_factory.mktemp("models"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if collect_ignore:
        return
    from label_tester import TALKED_TO

    terminalreporter.section("what the tests talked to")
    for line in TALKED_TO:
        terminalreporter.write_line(line)
