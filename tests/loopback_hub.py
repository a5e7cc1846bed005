# SPDX-License-Identifier: Apache-2.0
"""
A server on 127.0.0.1 that speaks the Hugging Face Hub's API, for the unmodified client to publish to and load from.

What it answers was read from the sources of huggingface_hub 1.3 to 2.4 and from answers of the Hub that users report.
It has no Xet storage, tags, pull requests, discussions or search. What it does not know it answers with 501 and keeps
in `LoopbackHub.unknown`.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import json
import re
import secrets
from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any
from urllib.parse import parse_qs, unquote

from tests.loopback_card import validate_card
from tests.loopback_repository import Blob, HubError, Repository
from tests.loopback_server import LoopbackServer, Reply, Request, content_reply

ANONYMOUS = "Invalid username or password."
BAD_TOKEN = "Invalid credentials in Authorization header"
SIGNED = re.compile(r"/storage/|/api/complete_multipart/")
"""Paths that ask for a signature in the URL instead of a token."""

ROUTES: list[tuple[str, re.Pattern, Callable[..., Reply]]] = []
PARTS = {
    "plural": "models|datasets|spaces",
    "prefix": "|datasets/|spaces/",
    "repo": "[^/]+/[^/]+?",
    "revision": "[^/]+",
    "oid": "[0-9a-f]{64}",
    "part": "[0-9]+",
    "path": ".+",
}


def route(methods: str, template: str) -> Callable[[Callable[..., Reply]], Callable[..., Reply]]:
    """Have a method of [`LoopbackHub`] answer paths like the template; its `{parts}` become arguments."""
    pattern = re.compile(re.sub(r"\{(\w+)\}", lambda part: f"(?P<{part[1]}>{PARTS[part[1]]})", template))

    def register(answer: Callable[..., Reply]) -> Callable[..., Reply]:
        ROUTES.extend((method, pattern, answer) for method in methods.split())
        return answer

    return register


class LoopbackHub(LoopbackServer):
    """
    A Hub with one user, `someone`, who may create repositories in the own name and in that of `org`.

    Like the real one it has two hosts, here two ports: the Hub itself, and the storage of large files, which knows no
    tokens, only signed addresses. Files of more than `chunk_size` bytes are uploaded in parts of that size.
    """

    def __init__(self):
        super().__init__(ports=2)
        self.endpoint, storage = self.endpoints
        self.storage = storage.replace("127.0.0.1", "localhost")  # clients tell hosts apart by name, not by port
        self.token = f"hf_{secrets.token_hex(17)}"
        self.namespaces = ("someone", "org")
        self.chunk_size = 5_000_000
        self.unknown: list[tuple[str, str]] = []
        """Method and path of what was asked in vain."""
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._parts: dict[str, dict[int, bytes]] = {}
        self._expired = False
        self._secret = secrets.token_bytes()

    def repository(self, repo_id: str, repo_type: str = "model") -> Repository:
        """A repository that was created. Raises `KeyError` where it was not."""
        return self._repositories[f"{repo_type}s", repo_id]

    def revoke(self) -> None:
        """From now on the token has expired."""
        self._expired = True

    def heal(self) -> None:
        """From now on nothing goes wrong, and the token is good again."""
        super().heal()
        self._expired = False

    def answer(self, request: Request) -> Reply:
        """Find the route and follow it; an error becomes the Hub's own kind of answer."""
        try:
            with self.lock:
                self._check_credentials(request)
                return self._follow(request)
        except HubError as error:
            headers = {"X-Error-Message": error.message}
            if error.code or _seems_missing(error, request.path):
                headers["X-Error-Code"] = error.code or "RepoNotFound"
            if error.commit:
                headers["X-Repo-Commit"] = error.commit
            return Reply({"error": error.message, **error.details}, error.status, headers)

    def _follow(self, request: Request) -> Reply:
        """What the first fitting route answers."""
        for method, pattern, answer in ROUTES:
            match = method == request.method and pattern.fullmatch(request.path)
            if match and not request.flag("create_pr"):
                parts = {name: unquote(part) for name, part in match.groupdict().items()}
                if "prefix" in parts:  # where one would look at it, a model has none
                    parts["plural"] = parts.pop("prefix").rstrip("/") or "models"
                return answer(self, request, **parts)
        self.unknown.append((request.method, request.path))
        raise HubError(501, f"The loopback hub does not know {request.method} {request.path}")

    def _check_credentials(self, request: Request) -> None:
        """Raise [`HubError`] for a wrong token, also where none is needed, and for a wrong signature."""
        credentials = request.headers.get("Authorization")
        if SIGNED.match(request.path):
            if credentials:
                raise HubError(400, "Only one auth mechanism allowed")
            if request.query.get("signature") != [self._signature(request.path)]:
                raise HubError(403, "Access Denied")
        elif credentials == f"Bearer {self.token}":
            if self._expired:
                raise HubError(401, 'User Access Token "loopback" is expired')
        elif credentials:
            raise HubError(401, BAD_TOKEN)

    def _signature(self, path: str) -> str:
        return hmac.new(self._secret, path.encode(), "sha256").hexdigest()

    def _signed(self, host: str, path: str) -> str:
        return f"{host}{path}?signature={self._signature(path)}"

    def _find(self, request: Request, plural: str, repo: str, write: bool = False) -> Repository:
        """The repository, if whoever asks may know of it."""
        repository = self._repositories.get((plural, repo))
        if "Authorization" not in request.headers and (repository is None or repository.private or write):
            raise HubError(401, ANONYMOUS)
        if repository is None:
            raise HubError(404, "Repository not found", "RepoNotFound")
        return repository

    def _page(self, repository: Repository) -> str:
        """The address at which one would look at a repository."""
        prefix = "" if repository.repo_type == "model" else f"{repository.repo_type}s/"
        return f"{self.endpoint}/{prefix}{repository.repo_id}"

    # The API, in the order in which publishing asks it.

    @route("GET", "/api/agent-harnesses")
    def _agent_harnesses(self, request: Request) -> Reply:
        return Reply({"standardEnvVars": [], "harnesses": {}})

    @route("GET", "/api/whoami-v2")
    def _whoami(self, request: Request) -> Reply:
        if "Authorization" not in request.headers:
            raise HubError(401, ANONYMOUS)
        user, *organizations = self.namespaces
        orgs = [{"type": "org", "name": name, "roleInOrg": "admin"} for name in organizations]
        token = {"type": "access_token", "accessToken": {"displayName": "loopback", "role": "write"}}
        return Reply({"type": "user", "name": user, "orgs": orgs, "auth": token})

    @route("POST", "/api/repos/create")
    def _create(self, request: Request) -> Reply:
        if "Authorization" not in request.headers:
            raise HubError(401, ANONYMOUS)
        asked = request.json()
        repo_type = asked.get("type") or "model"
        namespace = asked.get("organization") or self.namespaces[0]
        if namespace not in self.namespaces:
            message = f'You don\'t have the rights to create a {repo_type} under the namespace "{namespace}"'
            raise HubError(403, message)
        # `private` until huggingface_hub 1.x, `visibility` since.
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        repository = Repository(f"{namespace}/{asked['name']}", repo_type, private, asked.get("sdk"))
        page = {"url": self._page(repository), "name": repository.repo_id}
        if (f"{repo_type}s", repository.repo_id) in self._repositories:
            raise HubError(409, f"You already created this {repo_type} repo", details=page)
        self._repositories[f"{repo_type}s", repository.repo_id] = repository
        return Reply(page)

    @route("POST", "/api/validate-yaml")
    def _validate_yaml(self, request: Request) -> Reply:
        errors, warnings = validate_card(request.json()["content"], request.json()["repoType"])
        lists = {"errors": errors, "warnings": warnings}
        messages = {name: [{"message": message} for message in found] for name, found in lists.items()}
        return Reply(messages, 400 if errors else 200)

    @route("POST", "/api/{plural}/{repo}/branch/{revision}")
    def _create_branch(self, request: Request, plural: str, repo: str, revision: str) -> Reply:
        start = request.json().get("startingPoint", "main")
        self._find(request, plural, repo, write=True).create_branch(revision, start)
        return Reply({})

    @route("POST", "/api/{plural}/{repo}/preupload/{revision}")
    def _preupload(self, request: Request, plural: str, repo: str, revision: str) -> Reply:
        repository = self._find(request, plural, repo, write=True)
        there = repository.head(revision).blobs
        ignored = request.json().get("gitIgnore", there.get(".gitignore", Blob(b"")).content.decode()).split()
        files = []
        for file in request.json()["files"]:
            path, sample = file["path"], base64.b64decode(file["sample"])
            entry = {
                "path": path,
                "uploadMode": "lfs" if repository.wants_lfs(revision, path, sample, file["size"]) else "regular",
                # Plain patterns only; the real Hub knows all of git's.
                "shouldIgnore": any(fnmatchcase(path, pattern) for pattern in ignored),
            }
            files.append({**entry, "oid": there[path].etag} if path in there else entry)
        return Reply({"files": files})

    @route("POST", "/{prefix}{repo}.git/info/lfs/objects/batch")
    def _lfs_batch(self, request: Request, plural: str, repo: str) -> Reply:
        repository = self._find(request, plural, repo, write=True)
        verify = {"href": f"{self._page(repository)}.git/info/lfs/objects/verify"}
        objects, transfer = [], "basic"
        for wanted in request.json()["objects"]:
            oid, size = wanted["oid"], wanted["size"]
            if oid in repository.objects:
                objects.append({"oid": oid, "size": size})
                continue
            path = f"/storage/{plural}/{repo}/{oid}"
            upload: dict[str, Any] = {"href": self._signed(self.storage, path)}
            if size > self.chunk_size:
                transfer = "multipart"
                parts = range(1, -(-size // self.chunk_size) + 1)
                urls = {f"{part:05}": self._signed(self.storage, f"{path}/{part}") for part in parts}
                upload["href"] = self._signed(self.endpoint, f"/api/complete_multipart/{plural}/{repo}/{oid}")
                upload["header"] = {"chunk_size": str(self.chunk_size), **urls}
            objects.append({"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}})
        return Reply({"transfer": transfer, "objects": objects})

    @route("PUT", "/storage/{plural}/{repo}/{oid}")
    def _put(self, request: Request, plural: str, repo: str, oid: str) -> Reply:
        self._store(plural, repo, oid, request.body)
        return Reply()

    @route("PUT", "/storage/{plural}/{repo}/{oid}/{part}")
    def _put_part(self, request: Request, plural: str, repo: str, oid: str, part: str) -> Reply:
        self._parts.setdefault(f"{plural}/{repo}/{oid}", {})[int(part)] = request.body
        return Reply(headers={"ETag": _part_etag(request.body)})

    @route("POST", "/api/complete_multipart/{plural}/{repo}/{oid}")
    def _complete(self, request: Request, plural: str, repo: str, oid: str) -> Reply:
        there = self._parts.get(f"{plural}/{repo}/{oid}", {})
        parts = [there.get(part["partNumber"], b"") for part in request.json()["parts"]]
        if [_part_etag(part) for part in parts] != [part["etag"] for part in request.json()["parts"]]:
            raise HubError(400, "One or more of the specified parts could not be found.")
        self._store(plural, repo, oid, b"".join(parts))
        return Reply({})

    def _store(self, plural: str, repo: str, oid: str, content: bytes) -> None:
        """Keep a content under its name, if it is its name."""
        if hashlib.sha256(content).hexdigest() != oid:
            raise HubError(400, "The provided checksum does not match what was received.")
        self._repositories[plural, repo].objects[oid] = content

    @route("POST", "/{prefix}{repo}.git/info/lfs/objects/verify")
    def _lfs_verify(self, request: Request, plural: str, repo: str) -> Reply:
        repository = self._find(request, plural, repo, write=True)
        content = repository.objects.get(request.json()["oid"])
        if content is None or len(content) != request.json()["size"]:
            raise HubError(404, "Object not found")
        return Reply({})

    @route("POST", "/api/{plural}/{repo}/commit/{revision}")
    def _commit(self, request: Request, plural: str, repo: str, revision: str) -> Reply:
        repository = self._find(request, plural, repo, write=True)
        commit = repository.apply(revision, [json.loads(line) for line in request.body.splitlines()])
        url = f"{self._page(repository)}/commit/{commit.oid}"
        return Reply({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # The API that loading asks.

    @route("GET", "/api/{plural}/{repo}")
    @route("GET", "/api/{plural}/{repo}/revision/{revision}")
    def _info(self, request: Request, plural: str, repo: str, revision: str = "main") -> Reply:
        return Reply(self._find(request, plural, repo).info(revision, request.flag("blobs")))

    @route("GET", "/api/{plural}/{repo}/refs")
    def _refs(self, request: Request, plural: str, repo: str) -> Reply:
        return Reply(self._find(request, plural, repo).refs())

    @route("GET", "/api/{plural}/{repo}/tree/{revision}")
    @route("GET", "/api/{plural}/{repo}/tree/{revision}/{path}")
    def _tree(self, request: Request, plural: str, repo: str, revision: str, path: str = "") -> Reply:
        return Reply(self._find(request, plural, repo).tree(revision, path, request.flag("recursive")))

    @route("POST", "/api/{plural}/{repo}/paths-info/{revision}")
    def _paths_info(self, request: Request, plural: str, repo: str, revision: str) -> Reply:
        paths = parse_qs(request.body.decode())["paths"]
        return Reply(self._find(request, plural, repo).paths_info(revision, paths))

    @route("GET HEAD", "/{prefix}{repo}/resolve/{revision}/{path}")
    def _resolve(self, request: Request, plural: str, repo: str, revision: str, path: str) -> Reply:
        repository = self._find(request, plural, repo)
        blob = repository.blob(revision, path)
        headers = {"X-Repo-Commit": repository.find(revision).oid, "ETag": f'"{blob.etag}"'}
        if not blob.lfs:
            # The real Hub first redirects to a cache of its own, which answers the same.
            return content_reply(request, blob.content, headers)
        headers.update({"X-Linked-Size": str(len(blob.content)), "X-Linked-ETag": f'"{blob.etag}"'})
        headers["Location"] = self._signed(self.storage, f"/storage/{plural}/{repo}/{blob.sha256}")
        return Reply(status=302, headers=headers)

    @route("GET HEAD", "/storage/{plural}/{repo}/{oid}")
    def _get(self, request: Request, plural: str, repo: str, oid: str) -> Reply:
        return content_reply(request, self._repositories[plural, repo].objects[oid], {"ETag": f'"{oid}"'})


def _part_etag(part: bytes) -> str:
    return f'"{hashlib.md5(part).hexdigest()}"'


def _seems_missing(error: HubError, path: str) -> bool:
    """
    Whether the client takes an error for a repository that does not exist.

    The Hub sends no code with a 401. Of https addresses the client then guesses this by itself; for the same exception
    from http, the header has to say it.
    """
    of_repository = re.match(r"/api/(models|datasets|spaces)/.|/.+/resolve/.", path)
    return error.status == 401 and error.message != BAD_TOKEN and of_repository is not None
