# SPDX-License-Identifier: Apache-2.0
"""Fixtures of other folders that these tests use."""

from tests.evaluation.conftest import emoji, stub, stub_class  # noqa: F401
from tests.hub_fixtures import api, hub, hub_environment  # noqa: F401
