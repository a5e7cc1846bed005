# SPDX-License-Identifier: Apache-2.0
"""OpenAI's embeddings API over a model: what requests may hold, their limits, and the answers."""

from __future__ import annotations

import asyncio
import base64
import binascii
import hmac
import io
import time
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from torch import Tensor, nn

from modeling_cocoa import CocoaInputError, CocoaTransformer
from modeling_cocoa.media import MAX_IMAGE_PIXELS

from .batching import Batcher, QueueFull

RETRY_AFTER = "1"
"""Seconds after which a client that was refused may come again."""
CLIENT_GONE = 499
"""Status of an answer that nobody reads."""


@dataclass
class Limits:
    """
    What the server takes.

    Args:
        batch_num_tokens (`int`): Tokens of a batch.
        max_items (`int`): Inputs of a request.
        max_queue (`int`): Inputs that may wait; requests beyond are answered with 429.
        max_body_bytes (`int`): Bytes of a request.
    """

    batch_num_tokens: int = 2048
    max_items: int = 256
    max_queue: int = 1024
    max_body_bytes: int = 32 * 2**20


class Strict(BaseModel):
    """A part of a request; what it does not know is an error."""

    model_config = ConfigDict(extra="forbid")


class TextPart(Strict):
    """A text in a message."""

    type: Literal["text"]
    text: str


class ImageUrl(Strict):
    """The image itself, as a `data:` URL; no other URL is fetched."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(Strict):
    """An image in a message."""

    type: Literal["image_url"]
    image_url: ImageUrl


class Message(Strict):
    """What to embed (`user`), or the instruction in front of it (`system`)."""

    role: Literal["system", "user"]
    content: str | list[Annotated[TextPart | ImagePart, Field(discriminator="type")]]


class EmbeddingRequest(Strict):
    """
    The body of a request: `input`, a text or several, or `messages`, one input of texts and images.

    Args:
        model (`str`, *optional*): The served name.
        dimensions (`int`, *optional*): Leading dimensions to keep; the vector is normalized again.
        encoding_format (`str`): `"float"`, or `"base64"` of little-endian float32.
        prompt_name (`str`, *optional*): One of the model's prompts (`"query"`, `"document"`), as an instruction.
        add_special_tokens (`bool`): True, as vLLM has to be told: the vector is that of the last one, the EOS.
        user (`str`, *optional*): OpenAI's; not used.
    """

    model: str | None = None
    input: str | list[str] | None = None
    messages: list[Message] | None = None
    dimensions: Annotated[int, Field(ge=1)] | None = None
    encoding_format: Literal["float", "base64"] = "float"
    prompt_name: str | None = None
    add_special_tokens: Literal[True] = True
    user: str | None = None


class RequestError(HTTPException):
    """An answer that says what is wrong with a request, in OpenAI's form."""

    def __init__(self, status: int, message: str, **headers: str) -> None:
        super().__init__(status, message, headers=headers or None)


def create_app(
    module: CocoaTransformer,
    *,
    name: str,
    prompts: Mapping[str, str] | None = None,
    limits: Limits | None = None,
    api_key: str | None = None,
) -> FastAPI:
    """
    The application, to be run by any ASGI server.

    Args:
        module ([`CocoaTransformer`]): The model, on its device.
        name (`str`): Its name in requests and answers.
        prompts (`Mapping[str, str]`, *optional*): By name, as `config_sentence_transformers.json` keeps them.
        limits ([`Limits`], *optional*).
        api_key (`str`, *optional*): What clients must send as `Authorization: Bearer ...`.
    """
    limits, prompts = limits or Limits(), {key: text for key, text in (prompts or {}).items() if text}
    batcher = Batcher(module, batch_num_tokens=limits.batch_num_tokens, max_queue=limits.max_queue)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with batcher:
            yield

    app = FastAPI(title="CoCoA embeddings", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)

    @app.exception_handler(HTTPException)
    async def answer_error(request: Request, error: HTTPException) -> JSONResponse:
        return error_response(error.status_code, str(error.detail), "invalid_request_error", error.headers)

    @app.exception_handler(Exception)
    async def answer_failure(request: Request, error: Exception) -> JSONResponse:
        return error_response(500, f"The model failed ({type(error).__name__}); the log says more.", "server_error")

    @app.exception_handler(ClientDisconnect)
    async def answer_nobody(request: Request, error: ClientDisconnect) -> Response:
        return Response(status_code=CLIENT_GONE)

    def check_key(request: Request) -> None:
        sent = request.headers.get("authorization", "").encode()
        if api_key is not None and not hmac.compare_digest(sent, f"Bearer {api_key}".encode()):
            raise RequestError(401, "The API key is missing or wrong: send 'Authorization: Bearer KEY'.")

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    async def models(request: Request) -> dict[str, Any]:
        check_key(request)
        return {"object": "list", "data": [{"id": name, "object": "model", "created": started, "owned_by": "cocoa"}]}

    @app.post("/v1/embeddings")
    async def embeddings(http_request: Request) -> Any:
        check_key(http_request)
        request = parse(await read_body(http_request, limits.max_body_bytes))
        if request.model not in (None, name):
            raise RequestError(404, f"The model {request.model!r} is not served here; this is {name!r}.")
        if request.prompt_name is not None and request.prompt_name not in prompts:
            raise RequestError(400, f"prompt_name {request.prompt_name!r} is none of the model's: {sorted(prompts)}.")
        width = module.get_embedding_dimension()
        if request.dimensions is not None and request.dimensions > width:
            raise RequestError(400, f"dimensions is {request.dimensions}, but the model's vectors have {width}.")
        inputs = inputs_of(request, limits.max_items)
        work = asyncio.ensure_future(batcher.embed(inputs, prompts.get(request.prompt_name)))
        gone = asyncio.ensure_future(wait_for_disconnect(http_request))
        await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
        gone.cancel()
        if not work.done():
            work.cancel()
            return Response(status_code=CLIENT_GONE)
        try:
            vectors, tokens = work.result()
        except QueueFull as error:
            message = f"{limits.max_queue} inputs wait already; try again later, or send fewer at a time."
            raise RequestError(429, message, **{"Retry-After": RETRY_AFTER}) from error
        except CocoaInputError as error:
            raise RequestError(400, str(error)) from error
        if request.dimensions is not None:
            vectors = nn.functional.normalize(vectors[:, : request.dimensions], dim=-1)
        data = [
            {"object": "embedding", "index": index, "embedding": encode_vector(vector, request.encoding_format)}
            for index, vector in enumerate(vectors)
        ]
        usage = {"prompt_tokens": tokens, "total_tokens": tokens}
        return {"object": "list", "data": data, "model": name, "usage": usage}

    started = int(time.time())
    return app


def error_response(status: int, message: str, kind: str, headers: Mapping[str, str] | None = None) -> JSONResponse:
    """An error in OpenAI's form."""
    content = {"error": {"message": message, "type": kind, "param": None, "code": status}}
    return JSONResponse(content, status, headers=headers)


async def wait_for_disconnect(request: Request) -> None:
    """Until the client of a request, whose body was read, has gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def read_body(request: Request, limit: int) -> bytes:
    """The bytes of a request; refused as soon as they are too many."""
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > limit:
            raise RequestError(413, f"The request is larger than {limit // 2**20} MiB: send fewer or smaller inputs.")
    return bytes(body)


def parse(body: bytes) -> EmbeddingRequest:
    """The request of a body; what is wrong with it is said in a line."""
    try:
        return EmbeddingRequest.model_validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False, include_context=False)[0]
        place = ".".join(map(str, first["loc"]))
        raise RequestError(400, f"{f'{place}: ' if place else ''}{' '.join(first['msg'].split())}") from error


def inputs_of(request: EmbeddingRequest, most: int) -> list[Any]:
    """The inputs of a request as [`CocoaProcessor`] takes them; a text is never read as the name of a file."""
    if (request.input is None) == (request.messages is None):
        raise RequestError(400, "Give either 'input', a text or a list of texts, or 'messages', one input.")
    if request.messages is not None:
        if request.prompt_name is not None:
            raise RequestError(400, "prompt_name goes with 'input'; in 'messages', give a system message.")
        conversation = [{"role": message.role, "content": content_of(message)} for message in request.messages]
        images = [part["image"] for message in conversation for part in message["content"] if part["type"] == "image"]
        if (pixels := sum(map(count_pixels, images))) > MAX_IMAGE_PIXELS:
            raise RequestError(
                400, f"The images have {pixels:,} pixels together, more than the limit of {MAX_IMAGE_PIXELS:,}."
            )
        return [conversation]
    texts = [request.input] if isinstance(request.input, str) else request.input
    if not 1 <= len(texts) <= most:
        raise RequestError(400, f"'input' has {len(texts)} texts; give 1 to {most}.")
    return [{"text": text} for text in texts]


def content_of(message: Message) -> list[dict[str, Any]]:
    """A message's content as parts."""
    if isinstance(message.content, str):
        return [{"type": "text", "text": message.content}]
    return [
        {"type": "text", "text": part.text}
        if isinstance(part, TextPart)
        else {"type": "image", "image": image_bytes(part.image_url.url)}
        for part in message.content
    ]


def image_bytes(url: str) -> bytes:
    """The bytes of a `data:` URL."""
    head, comma, data = url.partition(",")
    if not (head.startswith("data:image/") and head.endswith(";base64") and comma):
        raise RequestError(400, "An image must be a URL of the form 'data:image/png;base64,...'; no URL is fetched.")
    try:
        return base64.b64decode(data, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(400, f"An image's data is not base64: {error}.") from error


def count_pixels(data: bytes) -> int:
    """The pixels of an image by its header; 0 where it has none that can be read, which loading it says."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            return image.width * image.height
    except Exception:  # of any type
        return 0


def encode_vector(vector: Tensor, encoding_format: str) -> list[float] | str:
    """A vector as an answer holds it."""
    if encoding_format == "float":
        return vector.tolist()
    return base64.b64encode(vector.numpy().astype("<f4").tobytes()).decode()
