# Copyright The covid-ct-bundles contributors. SPDX-License-Identifier: Apache-2.0
"""Bundles where annotators work: a MONAI Label server with an environment of its own.

``label_environment`` builds the environment, ``label_bundle`` puts checked copies of bundles where the server
finds them, ``label_server`` starts and stops it. ``label_app``, ``label_datastore`` and ``label_shims`` run
inside that environment and are not imported from here.
"""

from custom.deployment.label_bundle import deploy_bundle
from custom.deployment.label_environment import build_environment
from custom.deployment.label_server import LabelServer

__all__ = ["LabelServer", "build_environment", "deploy_bundle"]
