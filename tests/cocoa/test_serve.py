# SPDX-License-Identifier: Apache-2.0
"""`cocoa serve`: vectors of the model, clear refusals, and no request lost."""

from __future__ import annotations

import base64
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fastapi.testclient import TestClient
from PIL import Image

from cocoa.serve.api import Limits, create_app
from cocoa.serve.batching import Batcher
from modeling_cocoa import CocoaTransformer

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "cocoa-tiny"
NAME = "cocoa-tiny"
PROMPTS = {"query": "Find a picture.", "document": ""}
TEXTS = ["red heart", "a cat with heart eyes", "<|im_end|> is no control token here", "a.png", "x " * 400]


@pytest.fixture(scope="module")
def module():
    return CocoaTransformer(str(CHECKPOINT))


@pytest.fixture(scope="module")
def client(module):
    limits = Limits(max_items=8, max_queue=64, max_body_bytes=2**20)
    with TestClient(create_app(module, name=NAME, prompts=PROMPTS, limits=limits)) as client:
        yield client


def png(size=(40, 30), color="red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, "PNG")
    return buffer.getvalue()


def image_part(data: bytes) -> dict:
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(data).decode()}"}}


def vectors_of(response) -> np.ndarray:
    assert response.status_code == 200, response.text
    return np.array([entry["embedding"] for entry in response.json()["data"]])


def post(client, **body):
    return client.post("/v1/embeddings", json=body)


def test_vectors_are_those_of_the_model(client, module):
    found = vectors_of(post(client, input=TEXTS, model=NAME))
    np.testing.assert_allclose(found, module.encode([{"text": text} for text in TEXTS]), atol=1e-5)
    np.testing.assert_allclose(vectors_of(post(client, input=TEXTS[0])), found[:1], atol=1e-5)
    with_prompt = vectors_of(post(client, input=TEXTS[:2], prompt_name="query"))
    np.testing.assert_allclose(with_prompt, module.encode(TEXTS[:2], prompt=PROMPTS["query"]), atol=1e-5)
    short = vectors_of(post(client, input=TEXTS[:2], dimensions=16))
    np.testing.assert_allclose(
        short, found[:2, :16] / np.linalg.norm(found[:2, :16], axis=1, keepdims=True), atol=1e-5
    )


def test_messages_are_one_input_of_texts_and_images(client, module):
    data, other = png(), png((90, 30), "blue")
    content = [image_part(data), {"type": "text", "text": "a red sign"}, image_part(other)]
    messages = [{"role": "system", "content": "Represent it."}, {"role": "user", "content": content}]
    parts = [
        {"type": "image", "image": data},
        {"type": "text", "text": "a red sign"},
        {"type": "image", "image": other},
    ]
    expected = module.encode([[{"role": "user", "content": parts}]], prompt="Represent it.")
    np.testing.assert_allclose(vectors_of(post(client, messages=messages)), expected, atol=1e-5)


def test_usage_counts_tokens(client, module):
    usage = post(client, input=TEXTS[:2]).json()["usage"]
    rows = module.processor([{"text": text} for text in TEXTS[:2]])
    assert usage == {"prompt_tokens": int(rows["attention_mask"].sum()), "total_tokens": usage["prompt_tokens"]}


@pytest.mark.parametrize(
    ("body", "status", "message"),
    [
        ({}, 400, "either 'input'"),
        ({"input": "a", "messages": []}, 400, "either 'input'"),
        ({"input": []}, 400, "has 0 texts; give 1 to 8"),
        ({"input": ["a"] * 9}, 400, "has 9 texts; give 1 to 8"),
        ({"input": [1, 2]}, 400, "input"),
        ({"input": "a", "model": "other"}, 404, "'other' is not served here"),
        ({"input": "a", "dimensions": 100_000}, 400, "the model's vectors have"),
        ({"input": "a", "dimensions": 0}, 400, "dimensions: .*greater than or equal to 1"),
        ({"input": "a", "encoding_format": "hex"}, 400, "encoding_format: "),
        ({"input": "a", "prompt_name": "document"}, 400, r"none of the model's: \['query'\]"),
        ({"input": "a", "images": ["x"]}, 400, "images: Extra inputs are not permitted"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "role"),
        ({"messages": [{"role": "user", "content": [image_part(b"no image")]}]}, 400, "image"),
        ({"messages": [{"role": "user", "content": [image_part(png((1, 1)))]}]}, 400, "image"),
        *(
            (
                {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}]},
                400,
                said,
            )
            for url, said in (
                ("https://example.org/a.png", "no URL is fetched"),
                ("file:///etc/passwd", "no URL is fetched"),
                ("data:image/png;base64,%%%", "not base64"),
            )
        ),
    ],
)
def test_what_is_wrong_is_said_in_a_line(client, body, status, message):
    response = client.post("/v1/embeddings", json=body)
    error = response.json()["error"]
    assert response.status_code == status and error["code"] == status, response.text
    assert "\n" not in error["message"]
    assert re.search(message, error["message"]), error["message"]
    assert post(client, input="next").status_code == 200


def test_images_of_a_request_are_limited_together(client, monkeypatch):
    monkeypatch.setattr("cocoa.serve.api.MAX_IMAGE_PIXELS", 2 * 40 * 30)
    for count, status in ((2, 200), (3, 400)):
        response = post(client, messages=[{"role": "user", "content": [image_part(png())] * count}])
        assert response.status_code == status, response.text
    assert "3,600 pixels together, more than the limit of 2,400" in response.json()["error"]["message"]


def test_an_error_of_the_model_is_the_answer_of_one_request(module, monkeypatch):
    """And the others of its batch are answered."""
    app = create_app(module, name=NAME, limits=Limits())
    held, preprocess, forward = threading.Event(), module.processor.preprocess, type(module.model).forward

    def slowly(*args, **options):
        held.wait(20)
        return preprocess(*args, **options)

    def fail(self, input_ids, **options):
        if (input_ids == bad).any():
            raise RuntimeError("out of order")
        return forward(self, input_ids, **options)

    ids = [set(row["input_ids"].tolist()) for row in preprocess([{"text": text} for text in ("zebra", "red", "blue")])]
    bad = next(iter(ids[0] - ids[1] - ids[2]))
    monkeypatch.setattr(module.processor, "preprocess", slowly)
    monkeypatch.setattr(type(module.model), "forward", fail)
    with TestClient(app, raise_server_exceptions=False) as client, ThreadPoolExecutor(3) as pool:
        answers = [pool.submit(post, client, input=text) for text in ("red", "zebra", "blue")]
        time.sleep(0.2)
        held.set()
        right, wrong, other = (answer.result() for answer in answers)
    assert right.status_code == other.status_code == 200
    assert wrong.status_code == 500 and wrong.json()["error"]["type"] == "server_error"


def test_a_client_that_has_gone_is_not_computed_for(module, monkeypatch):
    app = create_app(module, name=NAME, limits=Limits(max_queue=4))
    held, preprocess, seen = threading.Event(), module.processor.preprocess, []
    compute = Batcher.compute

    def slowly(*args, **options):
        held.wait(20)
        return preprocess(*args, **options)

    monkeypatch.setattr(module.processor, "preprocess", slowly)
    monkeypatch.setattr(Batcher, "compute", lambda self, rows: seen.append(len(rows)) or compute(self, rows))
    with served_in_thread(app) as address:
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{address}/v1/embeddings", json={"input": ["a"] * 4}, timeout=0.5)
        deadline = time.monotonic() + 20
        while time.monotonic() < deadline:  # its places in the queue are free again
            held.set()
            if httpx.post(f"{address}/v1/embeddings", json={"input": ["b"] * 4}, timeout=20).status_code == 200:
                break
    assert seen == [4]


@contextmanager
def served_in_thread(app):
    server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


def test_a_request_that_is_too_large_is_refused(client):
    assert client.post("/v1/embeddings", content=b" " * (2**20 + 1)).status_code == 413


def test_a_thousand_malformed_requests(client):
    """Good requests, broken at random: each is answered with a 4xx and a line, and the next good one as ever."""
    generator = random.Random(0)
    good = json.dumps({"input": ["red heart"], "model": NAME, "dimensions": 16}).encode()
    junk = [b"\xff", b"\x00", b'"', b"{", b"]", b"null", b"1e999", b"\\ud800", b"[[" * 2000, b",", b"true"]
    refused = 0
    for _ in range(1000):
        body = bytearray(good)
        for _ in range(generator.randint(1, 4)):
            place = generator.randrange(len(body))
            if generator.random() < 0.5:
                del body[place : place + generator.randint(1, 12)]
            body[place:place] = generator.choice(junk)
        response = client.post("/v1/embeddings", content=bytes(body))
        if response.status_code != 200:
            refused += 1
            assert 400 <= response.status_code < 500, (bytes(body), response.text)
            assert "\n" not in response.json()["error"]["message"]
    assert refused > 900
    assert client.post("/v1/embeddings", content=good).status_code == 200
    for path, method in (("/v1/other", "get"), ("/v1/embeddings", "get"), ("/docs", "get")):
        response = getattr(client, method)(path)
        assert 400 <= response.status_code < 500 and response.json()["error"]["code"] == response.status_code


def test_a_full_queue_says_when_to_come_again(module, monkeypatch):
    app = create_app(module, name=NAME, limits=Limits(max_items=8, max_queue=4))
    held, preprocess = threading.Event(), module.processor.preprocess

    def slowly(*args, **options):
        held.wait(20)
        return preprocess(*args, **options)

    monkeypatch.setattr(module.processor, "preprocess", slowly)
    with TestClient(app) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(post, client, input=["a"] * 4)
        deadline = time.monotonic() + 20
        while (response := post(client, input=["a"] * 5)).status_code != 429 or time.monotonic() > deadline:
            pass
        assert response.headers["retry-after"] == "1" and "4 inputs wait" in response.json()["error"]["message"]
        held.set()
        assert first.result().status_code == 200
        assert post(client, input=["a"] * 4).status_code == 200


def test_the_key_is_asked_for(module):
    with TestClient(create_app(module, name=NAME, api_key="secret")) as client:
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "secret"}):
            for answer in (client.get("/v1/models", headers=headers), client.post("/v1/embeddings", headers=headers)):
                assert answer.status_code == 401 and "API key" in answer.json()["error"]["message"]
        assert client.get("/health").json() == {"status": "ok"}
        models = client.get("/v1/models", headers={"Authorization": "Bearer secret"}).json()["data"]
        assert [model["id"] for model in models] == [NAME]


@pytest.fixture
def server(tmp_path):
    """`cocoa serve` in a process of its own: its address, and the process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "cocoa", "serve", str(CHECKPOINT), "--port", str(port)]
    environment = {**os.environ, "COCOA_API_KEY": "secret", "PYTHONPATH": str(CHECKPOINT.parents[1])}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        address = f"http://127.0.0.1:{port}"
        try:
            deadline = time.monotonic() + 240
            while True:
                assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "log").read_text()
                try:
                    httpx.get(f"{address}/health")
                    break
                except httpx.ConnectError:
                    time.sleep(0.2)
            yield address, process
        finally:
            process.kill()
            process.wait()


def test_openais_client_and_an_end_that_loses_nothing(server, module):
    address, process = server
    client = openai.OpenAI(base_url=f"{address}/v1", api_key="secret", max_retries=0)
    expected = module.encode([{"text": text} for text in TEXTS])
    for options in ({}, {"encoding_format": "float"}):  # the client asks for base64 by itself
        answer = client.embeddings.create(input=TEXTS, model=NAME, **options)
        np.testing.assert_allclose([entry.embedding for entry in answer.data], expected, atol=1e-5)
    with pytest.raises(openai.AuthenticationError, match="API key"):
        openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0).embeddings.create(input="a", model=NAME)
    with pytest.raises(openai.BadRequestError, match="vectors have"):
        client.embeddings.create(input="a", model=NAME, dimensions=9999)

    texts = [f"text {number} " * 30 for number in range(48)]
    expected = module.encode([{"text": text} for text in texts])
    with ThreadPoolExecutor(len(texts)) as pool:
        ask = lambda text: client.embeddings.create(input=text, model=NAME).data[0].embedding  # noqa: E731
        answers = [pool.submit(ask, text) for text in texts]
        while not any(answer.done() for answer in answers):
            time.sleep(0.001)
        process.send_signal(signal.SIGTERM)
        found = []
        for answer, right in zip(answers, expected, strict=True):
            try:
                found.append(np.abs(np.array(answer.result()) - right).max())
            except openai.APIConnectionError as error:
                assert isinstance(error.__cause__, httpx.ConnectError), "accepted, and not answered"
    assert max(found) < 1e-5 and len(found) > 1
    assert process.wait(60) in (0, -signal.SIGTERM)  # newer versions of uvicorn pass the signal on at the end
