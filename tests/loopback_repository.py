# SPDX-License-Identifier: Apache-2.0
"""A repository as the Hugging Face Hub keeps it, in memory: branches of commits, git's and LFS's names of contents."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from huggingface_hub import RepoCard

REGULAR_LIMIT = 10 * 1024**2
"""Bytes of the largest file that git itself may hold; the Hub asks for LFS above it."""

GITATTRIBUTES = "".join(
    f"{pattern} filter=lfs diff=lfs merge=lfs -text\n"
    for pattern in (
        "*.7z *.arrow *.bin *.bz2 *.ckpt *.ftz *.gz *.h5 *.joblib *.lfs.* *.mlmodel *.model *.msgpack *.npy *.npz "
        "*.onnx *.ot *.parquet *.pb *.pickle *.pkl *.pt *.pth *.rar *.safetensors saved_model/**/* *.tar.* *.tar "
        "*.tflite *.tgz *.wasm *.xz *.zip *.zst *tfevents*"
    ).split()
)
"""What a new repository has in its only file."""


class HubError(Exception):
    """
    A request that the Hub refuses.

    Args:
        status (`int`): The HTTP status.
        message (`str`): What the Hub says.
        code (`str`, *optional*): The header `X-Error-Code`, by which the client knows which exception to raise.
        commit (`str`, *optional*): The commit in which something was looked for, for the header `X-Repo-Commit`.
        details (`dict`, *optional*): Further fields of the JSON answer.
    """

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        commit: str | None = None,
        details: dict[str, Any] | None = None,
    ):
        super().__init__(message)
        self.status, self.message, self.code, self.commit = status, message, code, commit
        self.details = details or {}


@dataclass(frozen=True)
class Blob:
    """The content of a file, and whether git holds it or only a pointer to it in the large file storage."""

    content: bytes
    lfs: bool = False

    @cached_property
    def sha256(self) -> str:
        """LFS's name of the content."""
        return hashlib.sha256(self.content).hexdigest()

    @cached_property
    def in_git(self) -> bytes:
        """What git holds: the content, or LFS's pointer to it."""
        if not self.lfs:
            return self.content
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.content)}\n"
        return pointer.encode()

    @cached_property
    def oid(self) -> str:
        """Git's name of what it holds."""
        return hashlib.sha1(b"blob %d\0" % len(self.in_git) + self.in_git).hexdigest()

    @property
    def etag(self) -> str:
        """The name by which the client caches the file and sees that it has not changed."""
        return self.sha256 if self.lfs else self.oid

    def entry(self, path: str) -> dict[str, Any]:
        """The file as a tree lists it."""
        entry: dict[str, Any] = {"type": "file", "oid": self.oid, "size": len(self.content), "path": path}
        if self.lfs:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return entry

    def sibling(self, path: str) -> dict[str, Any]:
        """The file as a repository's information lists it with `files_metadata=True`."""
        sibling: dict[str, Any] = {"rfilename": path, "size": len(self.content), "blobId": self.oid}
        if self.lfs:
            sibling["lfs"] = {"sha256": self.sha256, "size": len(self.content), "pointerSize": len(self.in_git)}
        return sibling


@dataclass(frozen=True)
class Commit:
    """A commit: its name of 40 hexadecimal digits (not the one git would give it) and all files of that time."""

    oid: str
    message: str
    blobs: Mapping[str, Blob]
    date: str = field(default_factory=lambda: datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.000Z"))

    @property
    def files(self) -> dict[str, bytes]:
        """The contents by path."""
        return {path: blob.content for path, blob in self.blobs.items()}


class Repository:
    """
    A model, dataset or space.

    Args:
        repo_id (`str`): Namespace and name.
        repo_type (`str`, defaults to `"model"`): `"model"`, `"dataset"` or `"space"`.
        private (`bool`, defaults to `False`): Whether those without a token are told that it does not exist.
        sdk (`str`, *optional*): What a space runs on; its README begins with it.
    """

    def __init__(self, repo_id: str, repo_type: str = "model", private: bool = False, sdk: str | None = None):
        self.repo_id, self.repo_type, self.private = repo_id, repo_type, private
        self.objects: dict[str, bytes] = {}
        """What was uploaded to the large file storage, by SHA-256."""
        self.branches: dict[str, list[Commit]] = {"main": []}
        files = {".gitattributes": GITATTRIBUTES.encode()}
        if sdk:
            files["README.md"] = f"---\ntitle: {repo_id.partition('/')[2]}\nsdk: {sdk}\n---\n".encode()
        self._append("main", {path: Blob(content) for path, content in files.items()}, "initial commit")

    def head(self, branch: str = "main") -> Commit:
        """The last commit of a branch. Raises [`HubError`] where there is no such branch."""
        if branch not in self.branches:
            raise HubError(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        return self.branches[branch][-1]

    def find(self, revision: str) -> Commit:
        """The commit that a branch's or a commit's name stands for. Raises [`HubError`] where there is none."""
        for commits in self.branches.values():
            for commit in commits:
                if commit.oid == revision:
                    return commit
        return self.head(revision)

    def blob(self, revision: str, path: str) -> Blob:
        """A file. Raises [`HubError`] where there is none."""
        commit = self.find(revision)
        if path not in commit.blobs:
            raise HubError(404, "Entry not found", "EntryNotFound", commit.oid)
        return commit.blobs[path]

    def create_branch(self, branch: str, start: str = "main") -> None:
        """Begin a branch at a revision. Raises [`HubError`] where it exists or its name is not a branch's."""
        if branch.startswith("refs/"):
            raise HubError(400, f"Invalid reference for a branch: {branch}")
        if branch in self.branches:
            raise HubError(409, "Reference already exists")
        commit = self.find(start)
        history = next(commits for commits in self.branches.values() if commit in commits)
        self.branches[branch] = history[: history.index(commit) + 1]

    def push(self, files: Mapping[str, bytes], branch: str = "main", message: str = "pushed by another") -> Commit:
        """Commit files as somebody else would, past the HTTP server."""
        blobs = {path: Blob(data, self.wants_lfs(branch, path, data, len(data))) for path, data in files.items()}
        self.objects.update({blob.sha256: blob.content for blob in blobs.values() if blob.lfs})
        return self._append(branch, {**self.head(branch).blobs, **blobs}, message)

    def apply(self, branch: str, lines: Sequence[Mapping[str, Any]]) -> Commit:
        """
        Make the commit that the lines of a request describe, whole or not at all.

        Args:
            branch (`str`): Where to.
            lines (`Sequence[Mapping]`): Each with a `key` and a `value`; the one with the key `header` first.

        Raises:
            HubError: the branch does not exist or has moved on from the header's `parentCommit`; an LFS file was never
                uploaded; what is to be deleted is not there.
        """
        head, header = self.head(branch), lines[0]["value"]
        if not head.oid.startswith(header.get("parentCommit", "")):
            raise HubError(412, "A commit has happened since. Please refresh and try again.")
        blobs = dict(head.blobs)
        for line in lines[1:]:
            path = line["value"]["path"]
            match line["key"]:
                case "file":
                    blobs[path] = Blob(base64.b64decode(line["value"]["content"]))
                case "lfsFile":
                    blobs[path] = Blob(self._uploaded(line["value"]["oid"], path), lfs=True)
                    _track(blobs, path)
                case "deletedFile" | "deletedFolder":
                    gone = [name for name in blobs if name == path or name.startswith(f"{path.rstrip('/')}/")]
                    if not gone or (line["key"] == "deletedFile" and path not in blobs):
                        raise HubError(404, "A file with this name doesn't exist", "EntryNotFound", head.oid)
                    for name in gone:
                        del blobs[name]
                case key:
                    raise HubError(400, f"Unknown operation: {key}")
        return self._append(branch, blobs, header["summary"])

    def wants_lfs(self, revision: str, path: str, sample: bytes, size: int) -> bool:
        """Whether the Hub wants a file in LFS: by its name, its size, or a beginning that is no text."""
        return _tracked(self.find(revision).blobs, path) or size > REGULAR_LIMIT or b"\0" in sample[:512]

    def tree(self, revision: str, folder: str = "", recursive: bool = False) -> list[dict[str, Any]]:
        """What is in a folder, with `recursive` in those below as well. Raises [`HubError`] where there is none."""
        commit = self.find(revision)
        prefix = f"{folder}/" if folder else ""
        entries = {}
        for path, blob in sorted(commit.blobs.items()):
            if path.startswith(prefix):
                *folders, _ = path.removeprefix(prefix).split("/")
                for depth in range(1, len(folders) + 1 if recursive else min(len(folders), 1) + 1):
                    parent = prefix + "/".join(folders[:depth])
                    entries[parent] = _folder_entry(commit, parent)
                if recursive or not folders:
                    entries[path] = blob.entry(path)
        if folder and not entries:
            raise HubError(404, f'{folder} does not exist on "{revision}"', "EntryNotFound", commit.oid)
        return list(entries.values())

    def paths_info(self, revision: str, paths: Iterable[str]) -> list[dict[str, Any]]:
        """Those of the paths that exist, as a tree lists them."""
        commit = self.find(revision)
        entries = []
        for path in paths:
            if path in commit.blobs:
                entries.append(commit.blobs[path].entry(path))
            elif any(name.startswith(f"{path}/") for name in commit.blobs):
                entries.append(_folder_entry(commit, path))
        return entries

    def info(self, revision: str, with_blobs: bool = False) -> dict[str, Any]:
        """The repository's information at a revision. Of the card it has what the README's head says."""
        commit = self.find(revision)
        card = {}
        if "README.md" in commit.blobs:
            readme = commit.blobs["README.md"].content.decode(errors="replace")
            card = RepoCard(readme, ignore_metadata_errors=True).data.to_dict()
        return {
            "_id": hashlib.sha1(self.repo_id.encode()).hexdigest()[:24],
            "id": self.repo_id,
            "author": self.repo_id.partition("/")[0],
            "sha": commit.oid,
            "private": self.private,
            "gated": False,
            "disabled": False,
            "createdAt": self.branches["main"][0].date,
            "lastModified": commit.date,
            "downloads": 0,
            "likes": 0,
            "tags": list(card.get("tags") or []),
            "cardData": card,
            **{name: card[name] for name in ("library_name", "pipeline_tag", "sdk") if name in card},
            "siblings": [
                blob.sibling(path) if with_blobs else {"rfilename": path}
                for path, blob in sorted(commit.blobs.items())
            ],
        }

    def refs(self) -> dict[str, Any]:
        """The branches; there are no tags and no pull requests."""
        branches = [
            {"name": name, "ref": f"refs/heads/{name}", "targetCommit": commits[-1].oid}
            for name, commits in self.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": [], "pullRequests": []}

    def _uploaded(self, oid: str, path: str) -> bytes:
        """The content of a name in the large file storage."""
        if oid not in self.objects:
            raise HubError(
                400,
                "Your push was rejected because an LFS pointer pointed to a file that does not exist. "
                f"Offending file: - {path}",
            )
        return self.objects[oid]

    def _append(self, branch: str, blobs: Mapping[str, Blob], message: str) -> Commit:
        """Put a commit at the end of a branch."""
        commits = self.branches[branch]
        names = "".join(f"{path} {blob.oid}\n" for path, blob in sorted(blobs.items()))
        description = f"{self.repo_type} {self.repo_id}\n{commits[-1].oid if commits else ''}\n{message}\n{names}"
        commit = Commit(hashlib.sha1(description.encode()).hexdigest(), message, dict(blobs))
        commits.append(commit)
        return commit


def _tracked(blobs: Mapping[str, Blob], path: str) -> bool:
    """Whether `.gitattributes` asks for LFS for a path."""
    lines = blobs[".gitattributes"].content.decode().splitlines() if ".gitattributes" in blobs else []
    patterns = [line.split()[0] for line in lines if "filter=lfs" in line]
    return any(fnmatchcase(name, pattern) for name in (path, path.rpartition("/")[2]) for pattern in patterns)


def _track(blobs: dict[str, Blob], path: str) -> None:
    """Name an LFS file in `.gitattributes`, as the Hub does where no pattern there fits it."""
    if not _tracked(blobs, path):
        lines = blobs[".gitattributes"].content if ".gitattributes" in blobs else b""
        blobs[".gitattributes"] = Blob(lines + f"{path} filter=lfs diff=lfs merge=lfs -text\n".encode())


def _folder_entry(commit: Commit, path: str) -> dict[str, Any]:
    """A folder as a tree lists it; its name is not the one git would give it."""
    names = sorted(f"{name} {blob.oid}" for name, blob in commit.blobs.items() if name.startswith(f"{path}/"))
    return {"type": "directory", "oid": hashlib.sha1("\n".join(names).encode()).hexdigest(), "size": 0, "path": path}
