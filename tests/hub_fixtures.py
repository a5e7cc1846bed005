# SPDX-License-Identifier: Apache-2.0
"""A Hub on loopback, and the client let out to it: in another process, or in this one."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest
from huggingface_hub import HfApi, close_session, constants

from tests.loopback_hub import LoopbackHub


@pytest.fixture
def hub() -> Iterator[LoopbackHub]:
    """A server that runs, with no repositories."""
    hub = LoopbackHub()
    with hub:
        yield hub


@pytest.fixture
def hub_environment(hub, tmp_path) -> dict[str, str]:
    """The whole environment of a process that knows no other Hub, and keeps what it loads in `tmp_path`."""
    settings = ("HF_", "HUGGING", "TRANSFORMERS_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(settings)}
    return {
        **kept,
        "HF_ENDPOINT": hub.endpoint,
        "HF_TOKEN": hub.token,
        "HF_HOME": str(tmp_path / "huggingface"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "NO_PROXY": "*",
        "no_proxy": "*",
    }


@pytest.fixture
def api(hub, tmp_path, monkeypatch) -> Iterator[HfApi]:
    """
    The client in this process, which for the time of a test knows no other Hub, whoever uses it.

    It is not offline, whatever the environment said when it was imported. It has the valid token and a cache of its
    own in `tmp_path`, and hardly waits between attempts.
    """
    for name, value in {
        "ENDPOINT": hub.endpoint,
        "HUGGINGFACE_CO_URL_TEMPLATE": hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub"),
        "HF_TOKEN_PATH": str(tmp_path / "token"),
    }.items():
        monkeypatch.setattr(constants, name, value)
    # Newer clients ask the Hub for a list of agents once, and keep it here.
    monkeypatch.setattr(constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses.json"), raising=False)
    # transformers keeps one client, which remembers where the Hub is.
    monkeypatch.setattr("transformers.utils.hub._hf_api", None, raising=False)
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.setenv("NO_PROXY", "*")
    monkeypatch.setenv("no_proxy", "*")
    sleep = time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: sleep(min(seconds, 0.01)))
    close_session()  # a new one reads the proxies anew
    yield HfApi()
    close_session()
