# SPDX-License-Identifier: Apache-2.0
"""The folder that is pushed as a Space: whole, true, and able to run alone."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import httpx
import pytest
from datasets import Dataset
from huggingface_hub import SpaceCard
from packaging.specifiers import SpecifierSet

from hub_cards import space_folder
from hub_cards.space_folder import write_space
from tests.hub_cards.app_server import CALLED_OUT, running_app
from tests.trainers.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib

SPACE = ROOT / "hub_cards" / "space"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> tuple[Path, list[Path]]:
    """A Space with the tiny checkpoint, and its files."""
    folder = tmp_path_factory.mktemp("space") / "space"
    return folder, write_space(folder)


def test_all_is_in_it_and_nothing_else(written):
    folder, files = written
    names = {path.as_posix() for path in files}
    assert {path for path in folder.rglob("*") if path.is_file()} == {folder / path for path in files}
    assert names >= {"README.md", "app.py", "cocoa.py", "requirements.txt", "LICENSE", "data/NOTICE"}
    assert names >= {"data/emoji.parquet", "checkpoints/cocoa-tiny/model.safetensors", "hub_cards/space/app.py"}
    assert names >= {
        "trainers/recipes/tiny.yaml",
        "hub_cards/model_card.md",
        "checkpoints/cocoa-tiny/1_Pooling/config.json",
    }
    assert "checkpoints/cocoa-tiny-bridge/reconstruction.safetensors" in names
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_cocoa").glob("*.py")}
    assert code <= names
    assert not [
        name
        for name in names
        if re.search(r"pycache|\.pyc|/\.|^\.|_assets|^tests|^runs|hub_cards/space/(README|req)", name)
    ]
    assert not list(folder.parent.glob(".*")), "nothing is left beside it"


def test_the_card_is_one_that_the_hub_reads(written):
    data = SpaceCard.load(written[0] / "README.md").data
    assert (data.sdk, data.app_file, data.license, data.models) == ("gradio", "app.py", "apache-2.0", None)
    assert len(data.short_description) <= 60 and re.fullmatch(r"\d+\.\d+\.\d+", data.sdk_version)
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data.colorFrom, data.colorTo} <= colors


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib, of Python 3.11")
def test_the_requirements_are_the_projects(written):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (written[0] / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    (gradio,) = [line for line in project["optional-dependencies"]["app"] if line.startswith("gradio")]
    version = SpaceCard.load(written[0] / "README.md").data.sdk_version
    assert version in SpecifierSet(gradio.removeprefix("gradio"))


def test_models_of_the_hub_are_named_in_the_app_and_the_card(tmp_path):
    files = write_space(tmp_path / "space", model="org/cocoa", rebuild_model="org/cocoa-bridge")
    assert not [path for path in files if path.parts[0] == "checkpoints"]
    app = (tmp_path / "space" / "app.py").read_text(encoding="utf-8")
    compile(app, "app.py", "exec")
    assert 'os.environ.setdefault("COCOA_MODEL", "org/cocoa")\n' in app
    assert 'os.environ.setdefault("COCOA_REBUILD_MODEL", "org/cocoa-bridge")\n' in app
    card, own = SpaceCard.load(tmp_path / "space" / "README.md"), SpaceCard.load(SPACE / "README.md")
    assert card.data.models == ["org/cocoa", "org/cocoa-bridge"] and card.text == own.text
    assert {**card.data.to_dict(), "models": None} == {**own.data.to_dict(), "models": None}


def test_a_name_that_a_space_cannot_load_is_refused(tmp_path):
    with pytest.raises(ValueError, match="is on this machine, where a Space cannot read it: push it"):
        write_space(tmp_path / "space", model=str(ROOT / "checkpoints" / "cocoa-tiny"))
    with pytest.raises(ValueError, match="Repo id"):
        write_space(tmp_path / "space", rebuild_model='org/"quoted"')
    assert not list(tmp_path.iterdir())


def test_it_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("kept")
    with pytest.raises(FileExistsError, match="is not empty; name a new folder"):
        write_space(tmp_path / "full")
    assert [path.name for path in (tmp_path / "full").iterdir()] == ["mine.txt"]

    def fail():
        raise OSError("no space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(space_folder, "licence_file", fail)
        with pytest.raises(OSError, match="no space left"):
            write_space(tmp_path / "space")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]
    (tmp_path / "space").mkdir()  # an empty one will do
    assert write_space(tmp_path / "space", model="org/cocoa")


def test_it_runs_alone(written, tmp_path):
    """The page is served from the folder's own code, nothing else of this project being read, and guards its files."""
    folder = written[0]
    rows = Dataset.from_parquet(str(folder / "data" / "emoji.parquet")).select(range(16))
    rows.to_parquet(str(folder / "data" / "emoji.parquet"))  # few, for the time it takes
    code = f"""
import os, runpy

def own(event, arguments):
    if event == "open" and isinstance(arguments[0], str):
        path = os.path.realpath(arguments[0])
        if path.startswith({str(ROOT)!r} + os.sep) and not path.startswith(sys.prefix + os.sep):
            if os.path.isfile(path):
                print("NOT ITS OWN", path, file=sys.stderr, flush=True)

sys.addaudithook(own)
sys.path[0] = os.getcwd()
runpy.run_path("app.py", run_name="__main__")
"""
    with running_app(code, folder, tmp_path / "stderr") as app:
        page = httpx.get(app.url, trust_env=False)
        assert page.status_code == 200 and '<meta property="og:title" content="CoCoA" />' in page.text
        config = httpx.get(f"{app.url}config", trust_env=False)
        assert "16 emoji" in config.text
        names = [part["props"].get("elem_id") for part in config.json()["components"]]
        assert "rebuild" in names, "the checkpoint that rebuilds has come along"
        for path in (folder / "README.md", folder / "app.py", Path("/etc/passwd")):
            answer = httpx.get(f"{app.url}gradio_api/file={path}", trust_env=False)
            assert answer.status_code in (403, 404) and "root:" not in answer.text, path
        large = {"files": ("large.png", b"0" * (21 * 2**20))}
        assert httpx.post(f"{app.url}gradio_api/upload", files=large, trust_env=False, timeout=60).status_code == 413
        box = {"text": "", "files": [{"path": str(folder / "README.md"), "meta": {"_type": "gradio.FileData"}}]}
        event = httpx.post(f"{app.url}gradio_api/call/search", json={"data": [box]}, trust_env=False).json()
        with httpx.stream("GET", f"{app.url}gradio_api/call/search/{event['event_id']}", trust_env=False) as stream:
            said = stream.read().decode()
        assert "event: error" in said and "CoCoA" not in said
        errors = app.errors.read_text(encoding="utf-8")
        assert "NOT ITS OWN" not in errors and CALLED_OUT not in errors
