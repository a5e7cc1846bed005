# SPDX-License-Identifier: Apache-2.0
"""`cocoa check-server`: right servers pass, and each fault is named."""

from __future__ import annotations

import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from cocoa.cli import app
from cocoa.serve import check
from cocoa.serve.api import inputs_of, parse
from cocoa.serve.check import Faults, check_server
from modeling_cocoa import CocoaTransformer

FOLDER = str(Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny")


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(FOLDER)


@contextmanager
def serving(embed):
    """A server with OpenAI's API that gives `embed(inputs)`, or refuses where that raises."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self, content, status=200):
            self.send_response(status)
            self.end_headers()
            self.wfile.write(json.dumps(content).encode())

        def do_GET(self):
            self.answer({"data": [{"id": "served"}]})

        def do_POST(self):
            request = parse(self.rfile.read(int(self.headers["Content-Length"])))
            assert request.model == "served"
            try:
                vector = np.asarray(embed(inputs_of(request, 1)))[0]
            except ValueError as error:
                return self.answer({"error": str(error)}, 400)
            self.answer({"data": [{"embedding": vector.tolist()}]})

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def simple(items):
    """Messages of one user as the dicts that faults take."""
    found = []
    for item in items:
        if isinstance(item, dict):
            found.append(item)
            continue
        (message,) = item
        found.append({part["type"]: part[part["type"]] for part in message["content"]})
    return found


def test_a_right_server_is_right(module):
    with serving(module.encode) as url:
        findings = check_server(f"{url}/v1/", FOLDER)
        result = CliRunner().invoke(app, ["check-server", url, "--model", FOLDER])
    assert [finding.says for finding in findings] == ["right."] * 4
    assert min(finding.lowest for finding in findings) > 0.99999
    assert result.exit_code == 0 and "1.0000  images as messages: right." in result.output


@pytest.mark.parametrize(
    "fault", ["a causal attention mask", "no <EOS>", "a causal mask and no", "no chat template", "the prompt 'query'"]
)
def test_each_fault_is_named(module, fault, monkeypatch):
    monkeypatch.setattr(check, "read_settings", lambda folder: {"prompts": {"query": "Find it.", "document": ""}})
    faults = Faults(FOLDER, module.processor)
    name, embed = next((name, embed) for name, embed in faults.ways.items() if name.startswith(fault))

    def wrong(items):
        items = simple(items)
        return module.encode(items) if "template" in fault and "image" in items[0] else embed(items)

    with serving(wrong) as url:
        findings = check_server(url, FOLDER, name="served")
        result = CliRunner().invoke(app, ["check-server", url, "--model", FOLDER])
    assert findings[0].says == f"WRONG: {name}."
    assert [finding.says for finding in findings[2:]] == (
        ["right."] * 2 if "template" in fault else [f"WRONG: {name}."] * 2
    )
    assert result.exit_code == 1 and name in result.output


def test_what_is_wrong_otherwise_is_said_too(module):
    def odd(items):
        (item,) = simple(items)
        if "image" in item:
            raise ValueError("no images here")
        vectors = module.encode([item])
        return 3 * vectors if len(item["text"]) % 2 else vectors

    with serving(odd) as url:
        first, _, images, _ = check_server(url, FOLDER)
    assert first.is_right and "not normalized" in first.says
    assert not images.is_right and images.says == 'refused with 400: {"error": "no images here"}'
    with serving(lambda items: np.ones((1, 5))) as url:
        assert check_server(url, FOLDER)[0].says.startswith("vectors of 5 dimensions")
    with serving(lambda items: np.full((1, 192), np.nan)) as url:
        findings = check_server(url, FOLDER)
        assert not any(finding.is_right for finding in findings) and "none of the known" in findings[0].says
    with serving(lambda items: np.eye(192)[:1]) as url:
        assert "none of the known faults" in check_server(url, FOLDER)[0].says
    result = CliRunner().invoke(app, ["check-server", "http://127.0.0.1:9", "--model", FOLDER])
    assert result.exit_code == 1 and "No server with OpenAI's API answers at http://127.0.0.1:9 (" in result.output
