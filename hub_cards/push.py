# SPDX-License-Identifier: Apache-2.0
"""A model's folder to the Hub: checked first, as one commit, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import validate_repo_id
from rich.console import Console
from rich.table import Table

from modeling_cocoa.auto import BACKBONES
from modeling_cocoa.saving import WEIGHT_FILES, code_files, repair_cocoa

from .folder_checks import find_problems, is_json, told_too_much, uploaded_files
from .folder_facts import read_json
from .loading_checks import find_loading_problems
from .space_folder import write_space
from .training_record import RECORD_FILE, read_records

NO_NAME = "path/or/name"
"""In cards of models that have no name on the Hub yet."""


class FolderError(ValueError):
    """
    A folder that is not fit for the Hub.

    Args:
        folder (`Path`).
        problems (`list[str]`): Each in a sentence.
    """

    def __init__(self, folder: Path, problems: list[str]) -> None:
        self.problems = problems
        listed = "\n".join(f"- {problem}" for problem in problems)
        super().__init__(f"{folder} was not pushed; nothing was uploaded.\n{listed}")


class PushError(OSError):
    """The Hub did not take a push; says what became of the repository."""


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
    Check name and login, then a model's folder, also in a fresh process by both ways to load it, and upload it as one
    commit.

    Code that a re-save through the stock loader has lost is put back in what is uploaded. Weights on the Hub that the
    folder no longer has are removed by the same commit; other files there stay.

    Args:
        folder (`str` or `os.PathLike`): Of a model, as `save_model` of a trainer or [`save_cocoa`] wrote it.
        repo_id (`str`): `organization/name`; created if there is none.
        private (`bool`, *optional*): Create it for those with access only.
        revision (`str`, *optional*): Branch; created if there is none. By default the main one.
        token (`str`, *optional*): By default that of `hf auth login` or `HF_TOKEN`.
        commit_message (`str`, *optional*).
        dry_run (`bool`, defaults to `False`): Check and list, and upload nothing.
        console ([`~rich.console.Console`], *optional*): Where to print what is uploaded.

    Returns:
        `str`: Address of the commit; none of a dry run.

    Raises:
        FileNotFoundError: there is no such folder.
        ValueError: the Hub has no such names.
        FolderError: it is not fit for the Hub; lists all that is wrong.
        PushError: there is no login, or the Hub did not take it; says what became of the repository. A dry run only
            prints that there is no login.
    """
    folder, console = Path(folder), console or Console()
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    check_name(repo_id)
    check_login(token, repo_id, console, dry_run)
    with staged(folder) as staging:
        repaired = put_code_back(staging)
        name_in_card(staging, repo_id)
        console.print("Checking the files, and loading them in a fresh process.")
        problems = find_problems(staging) or find_loading_problems(staging)
        if problems:
            raise FolderError(folder, problems)
        if note := pretraining_note(folder):
            console.print(note, style="yellow")
        if repaired:
            console.print(f"Put back, as a re-save had lost them: {', '.join(repaired)} ({folder} is as it was).")
        console.print(list_files(staging, repo_id, revision))
        if dry_run:
            console.print("Nothing was uploaded: this was a dry run.")
            return None
        return upload(staging, repo_id, private, revision, token, commit_message)


def push_space(
    repo_id: str,
    *,
    model: str | None = None,
    rebuild_model: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    dry_run: bool = False,
    console: Console | None = None,
) -> str | None:
    """
    Upload the app as a Space, as one commit; see [`~space_folder.write_space`].

    Args:
        repo_id (`str`): `organization/name`; created if there is none.
        model, rebuild_model (`str`, *optional*): Hub names.
        private, token, dry_run, console (*optional*): As in [`push_model`].

    Returns:
        `str`: Address of the commit; none of a dry run.

    Raises:
        ValueError: a model, or the Space, is not named as on the Hub.
        FolderError: a file of the package names a path of this machine or holds a secret.
        PushError: the Hub did not take it; says what became of the repository.
    """
    console = console or Console()
    check_name(repo_id)
    with tempfile.TemporaryDirectory(prefix="cocoa-space-") as scratch:
        folder = Path(scratch) / "space"
        write_space(folder, model=model, rebuild_model=rebuild_model)
        if problems := [*told_too_much(folder)]:
            raise FolderError(Path("the Space"), problems)
        console.print(list_files(folder, repo_id, None))
        if dry_run:
            console.print("Nothing was uploaded: this was a dry run.")
            return None
        return upload(folder, repo_id, private, None, token, "Upload the app", repo_type="space", space_sdk="gradio")


def check_name(repo_id: str) -> None:
    """Raise `ValueError` where the Hub would refuse a repository's name."""
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"{repo_id!r} is no name on the Hub; give ORGANIZATION/NAME. {error}") from error


def check_login(token: str | None, repo_id: str, console: Console, dry_run: bool) -> None:
    """
    Ask the Hub whose token it is, before the checks that take long.

    Raises:
        PushError: it is nobody's, or the Hub cannot be asked; a dry run prints that instead.
    """
    try:
        console.print(f"Logged in as {HfApi(token=token).whoami()['name']}.")
    except Exception as error:  # of huggingface_hub and the HTTP library that it is built on, which has changed
        reason = reason_of(error, repo_id)
        if not dry_run:
            raise PushError(f"{reason} Nothing was uploaded.") from error
        console.print(f"The login was not checked, or a push would fail: {reason}", style="yellow")


def pretraining_note(folder: Path) -> str | None:
    """What to know of a folder that reconstruction pre-training saved last; none of an embedding model."""
    stages = read_records(folder) if (folder / RECORD_FILE).is_file() else []
    if not stages or stages[-1].stage == "contrastive":
        return None
    return (
        f"{folder} was last trained in the stage {stages[-1].stage!r}: it is a start for contrastive training, "
        "and not yet an embedding model."
    )


@contextmanager
def staged(folder: Path) -> Iterator[Path]:
    """A copy of a folder to work in, its large files as links; hidden files are left out."""
    with tempfile.TemporaryDirectory(prefix="cocoa-push-") as scratch:
        staging = Path(scratch) / "model"
        staging.mkdir()
        for path in uploaded_files(folder):
            target = staging / path.relative_to(folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            if path.suffix == ".safetensors" or not path.exists():  # a link to nothing stays one, to be found
                target.symlink_to(path.resolve())
            else:
                shutil.copyfile(path, target)
        yield staging


def put_code_back(staging: Path) -> list[str]:
    """Mend a folder whose code is missing; code that is there and differs is left, to be found, as all else is."""
    config = staging / "config.json"
    modules = staging / "modules.json"
    if not all(path.is_file() and is_json(path) for path in (config, modules)):
        return []
    content = read_json(config)
    if "cocoa" not in content or content.get("model_type") not in BACKBONES:
        return []
    present = [
        path for path in code_files(content["model_type"], read_json(modules)) if (staging / path.name).exists()
    ]
    if any(path.read_bytes() != (staging / path.name).read_bytes() for path in present):
        return []
    return repair_cocoa(staging)


def name_in_card(staging: Path, repo_id: str) -> None:
    """Have the card's lines of code load the model by the name that it gets."""
    card = staging / "README.md"
    if card.is_file():
        text = card.read_text(encoding="utf-8")
        card.write_text(text.replace(f'"{NO_NAME}"', f'"{repo_id}"'), encoding="utf-8")


def list_files(folder: Path, repo_id: str, revision: str | None) -> Table:
    """What is uploaded, with sizes."""
    table = Table(title=f"To {repo_id}{f' at {revision}' if revision else ''}", title_justify="left")
    table.add_column("file")
    table.add_column("size", justify="right")
    sizes = {str(path.relative_to(folder)): path.stat().st_size for path in uploaded_files(folder)}
    for name, size in sizes.items():
        table.add_row(name, readable(size))
    table.add_section()
    table.add_row(f"{len(sizes)} files", readable(sum(sizes.values())))
    return table


def readable(size: float) -> str:
    """A number of bytes as a person reads it."""
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"


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
    Upload a folder's files as one commit on what the repository holds.

    Args:
        staging (`Path`): The folder.
        repo_id (`str`), private (`bool`, *optional*), revision (`str`, *optional*), token (`str`, *optional*),
            commit_message (`str`): As in [`push_model`].
        repo_type (`str`, defaults to `"model"`): `"model"`, `"dataset"` or `"space"`.
        options: More arguments of `create_repo`, such as `space_sdk`.

    Returns:
        `str`: Address of the commit.

    Raises:
        PushError: it failed; says what became of the repository.
    """
    api = HfApi(token=token)
    head = None
    try:
        repo_id = api.create_repo(repo_id, private=private, repo_type=repo_type, exist_ok=True, **options).repo_id
        if revision is not None:
            api.create_branch(repo_id, branch=revision, repo_type=repo_type, exist_ok=True)
        info = api.repo_info(repo_id, revision=revision, repo_type=repo_type)
        head = info.sha
        if private and not info.private:
            raise PushError(f"{repo_id} exists and is public; make it private on its page, or choose another name.")
        files = uploaded_files(staging)
        names = {str(path.relative_to(staging)) for path in files}
        stale = [
            file.rfilename
            for file in info.siblings or []
            if any(fnmatch(file.rfilename, pattern) for pattern in WEIGHT_FILES) and file.rfilename not in names
        ]
        operations = [
            *(CommitOperationAdd(path.relative_to(staging).as_posix(), str(path)) for path in files),
            *(CommitOperationDelete(name) for name in stale),
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=commit_message,
            repo_type=repo_type,
            revision=revision,
            parent_commit=head,  # so that what others push meanwhile is not overwritten
        )
        return str(commit.commit_url)
    except PushError:
        raise
    except Exception as error:  # of huggingface_hub and the HTTP library that it is built on, which has changed
        fate = describe_failed_push(api, repo_id, revision, repo_type, head)
        raise PushError(f"{reason_of(error, repo_id)} {fate}") from error


def reason_of(error: Exception, repo_id: str) -> str:
    """Why the Hub did not take a push, and what to do, in a sentence or two."""
    status = (
        getattr(getattr(error, "response", None), "status_code", None) if isinstance(error, HfHubHTTPError) else None
    )
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, which keeps this process from the Hub: unset it."
    if isinstance(error, LocalTokenNotFoundError) or status == 401:
        return "The Hub does not accept the token, or there is none: call `hf auth login`, or set HF_TOKEN."
    if status == 403:
        return f"The token has no right to write to {repo_id}: ask for it, or choose another name."
    if status == 412:
        return f"{repo_id} has changed during the upload: look at what is there now, and push again."
    if status is not None and status >= 500:
        return f"The Hub had an error of its own ({status}): push again later; what has arrived is not sent twice."
    if status is not None or isinstance(error, ValueError):
        return f"The Hub refused: {error}"
    cause = error.__cause__ or error
    return f"The connection failed ({type(cause).__name__}: {cause}): push again; what has arrived is not sent twice."


def describe_failed_push(api: HfApi, repo_id: str, revision: str | None, repo_type: str, head: str | None) -> str:
    """What became of the repository after a push that failed."""
    if head is None:
        return "Nothing was uploaded."
    try:
        now = api.repo_info(repo_id, revision=revision, repo_type=repo_type).sha
    except Exception:  # of whichever HTTP library; the push's own error is the one that is told
        return f"Whether {repo_id} has changed could not be seen; it holds the whole of this push, or none of it."
    if now == head:
        return f"{repo_id} is as it was."
    return f"{repo_id} is at {now} now, which was not there before: it may be this push, whole, or another's."
