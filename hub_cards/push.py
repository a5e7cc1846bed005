# SPDX-License-Identifier: Apache-2.0
"""Pushing a model's folder to the Hub: checked first, then uploaded as one commit, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.filesize import decimal
from rich.table import Table

from modeling_cocoa.model_folder import WEIGHT_FILES
from modeling_cocoa.saving import repair_cocoa

from .folder_checks import find_problems, uploaded_files
from .loading_checks import find_loading_problems
from .training_record import read_records

NO_NAME = "path/or/name"
"""In cards of models that have no name on the Hub yet."""


class FolderError(ValueError):
    """
    A folder that failed the checks before a push.

    Args:
        folder (`Path`): The folder.
        problems (`list[str]`): A sentence each.
    """

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = problems
        listed = "\n".join(f"- {problem}" for problem in problems)
        super().__init__(f"{folder} was not pushed; nothing was uploaded.\n{listed}")


class PushError(OSError):
    """A push that the Hub did not accept; says why, and what happened to the repository."""


def push_model(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    revision: str | None = None,
    token: str | None = None,
    commit_message: str = "Upload a CoCoA model",
    dry_run: bool = False,
    console: Console | None = None,
) -> str | None:
    """
    Check the login and a model's folder, load it in a fresh process through both loaders, and upload it as one commit.

    Code files that were lost when the folder was saved again through the stock loader are added to the upload. The
    commit deletes weight files on the Hub that the folder no longer has; other files there stay.

    Args:
        folder (`str` or `os.PathLike`): Of a model, as `save_model` of a trainer or [`save_cocoa`] wrote it.
        repo_id (`str`): `organization/name`; created if it does not exist.
        private (`bool`, *optional*): Create it as a private repository.
        revision (`str`, *optional*): Branch, created if it does not exist; the main branch by default.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*): Title of the commit.
        dry_run (`bool`, defaults to `False`): Check and list the files, and upload nothing.
        console ([`~rich.console.Console`], *optional*): Where to print what is uploaded.

    Returns:
        `str`: URL of the commit; None for a dry run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: `repo_id` is not a valid name.
        FolderError: the folder failed the checks; lists all problems.
        PushError: there is no valid login, or the Hub did not accept the push. A dry run only prints that there is no
            login, or that it failed.
    """
    folder, console = Path(folder), console or Console()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    validate_repo_id(repo_id)
    check_login(token, console, dry_run)
    with staged(folder) as staging:
        console.print("Checking the files, and loading them in a fresh process.")
        problems, repaired = find_problems(staging), []
        if not problems:
            repaired = repair_cocoa(staging)
            card = staging / "README.md"  # its code is to load the model by its name on the Hub
            card.write_text(card.read_text(encoding="utf-8").replace(f'"{NO_NAME}"', f'"{repo_id}"'), encoding="utf-8")
            problems = find_loading_problems(staging)
        if problems:
            raise FolderError(folder, problems)
        if repaired:
            console.print(f"Added, since a later save had lost them: {', '.join(repaired)} ({folder} is unchanged).")
        stages = read_records(folder)
        if stages and stages[-1].stage != "contrastive":
            console.print(
                f"{folder} was last trained in the stage {stages[-1].stage!r}: it is a base for contrastive training, "
                "and not yet an embedding model.",
                style="yellow",
            )
        console.print(list_files(staging, repo_id, revision))
        if dry_run:
            console.print("Nothing was uploaded: this was a dry run.")
            return None
        return upload(staging, repo_id, private, revision, token, commit_message)


def check_login(token: str | None, console: Console, dry_run: bool) -> None:
    """Check the token before the checks that take long: a `PushError`, or, in a dry run, a warning."""
    try:
        console.print(f"Logged in as {HfApi(token=token).whoami()['name']}.")
    except Exception as error:  # of huggingface_hub or its HTTP library, which differs by version
        if not dry_run:
            raise PushError(f"The login failed, so nothing was uploaded: {error}") from error
        if token is None and get_token() is None:
            console.print("Not logged in: a dry run needs no login, the push does (`hf auth login`, or HF_TOKEN).")
        else:
            console.print(f"The login failed, and a push would fail: {error}", style="yellow", markup=False)


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A temporary copy of a folder without hidden files, in which weights (and broken links) are links."""

    def link_weights(source: str, target: str) -> None:
        if source.endswith(".safetensors") or not os.path.exists(source):
            os.symlink(os.path.realpath(source), target)
        else:
            shutil.copyfile(source, target)

    with tempfile.TemporaryDirectory(prefix="cocoa-push-") as scratch:
        staging = Path(scratch) / "model"
        shutil.copytree(folder, staging, ignore=shutil.ignore_patterns(".*"), copy_function=link_weights)
        yield staging


def list_files(folder: Path, repo_id: str, revision: str | None = None) -> Table:
    """A table of the files to upload, with sizes."""
    table = Table(title=f"To {repo_id}{f' at {revision}' if revision else ''}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in uploaded_files(folder)}
    for name, size in sizes.items():
        table.add_row(name, decimal(size))
    table.add_section()
    table.add_row(f"{len(sizes)} files", decimal(sum(sizes.values())))
    return table


def upload(
    staging: Path,
    repo_id: str,
    private: bool | None,
    revision: str | None,
    token: str | None,
    commit_message: str,
    repo_type: str = "model",
    **options: str,
) -> str:
    """
    Upload a folder as one commit, and return the commit's URL.

    `HfApi.upload_folder` splits large folders into several commits, and so may leave half a model; `create_commit`
    does not. The arguments are those of [`push_model`] and of `HfApi.create_repo`.

    Raises:
        PushError: it failed; says what happened to the repository.
    """
    api = HfApi(token=token)
    head = None
    try:
        repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True, **options).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
        if private and not info.private:
            raise ValueError(f"{repo_id} exists and is public; make it private on its page, or choose another name.")
        head = info.sha
        files = {path.relative_to(staging).as_posix(): str(path) for path in uploaded_files(staging)}
        stale = [
            file.rfilename
            for file in info.siblings or []
            if any(fnmatch(file.rfilename, pattern) for pattern in WEIGHT_FILES) and file.rfilename not in files
        ]
        commit = api.create_commit(
            repo_id,
            [*(CommitOperationAdd(*file) for file in files.items()), *map(CommitOperationDelete, stale)],
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
            parent_commit=head,  # fails rather than overwrites what somebody pushes meanwhile
        )
        return str(commit.commit_url)
    except Exception as error:  # of huggingface_hub or its HTTP library, which differs by version
        outcome = describe_outcome(api, repo_id, revision, repo_type, head)
        raise PushError(f"The push failed: {error}\n{outcome}") from error


def describe_outcome(api: HfApi, repo_id: str, revision: str | None, repo_type: str, head: str | None) -> str:
    """What a failed push has left in the repository, whose last commit was `head`."""
    if head is None:
        return "Nothing was uploaded."
    try:
        now = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    except Exception:  # the push's own error is the one to report
        return f"Whether {repo_id} has changed is unknown: it holds either all of this push, or nothing of it."
    if now == head:
        return f"{repo_id} is unchanged. Push again: files that have arrived are not sent twice."
    return f"{repo_id} is now at {now}: another push, or all of this one."
