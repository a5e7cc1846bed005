# SPDX-License-Identifier: Apache-2.0
"""The loopback Hub for these tests."""

from tests.hub_fixtures import api, hub, hub_environment  # noqa: F401
