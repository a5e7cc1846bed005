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

from cocoa.app.space import write_space
from tests.cocoa.app_server import CALLED_OUT, running_app
from tests.trainers.conftest import ROOT

if sys.version_info >= (3, 11):
    import tomllib

SPACE = ROOT / "cocoa" / "app"


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    """A Space with the tiny checkpoint."""
    folder = tmp_path_factory.mktemp("space") / "space"
    write_space(folder)
    return folder


def test_all_is_in_it_and_nothing_else(written):
    names = {path.relative_to(written).as_posix() for path in written.rglob("*") if path.is_file()}
    assert names >= {"README.md", "app.py", "cocoa/__init__.py", "requirements.txt", "LICENSE", "data/NOTICE"}
    assert names >= {"data/emoji.parquet", "checkpoints/cocoa-tiny/model.safetensors", "cocoa/app/app.py"}
    assert names >= {
        "trainers/recipes/tiny.yaml",
        "hub_cards/model_card.md",
        "checkpoints/cocoa-tiny/1_Pooling/config.json",
    }
    assert "checkpoints/cocoa-tiny-bridge/reconstruction.safetensors" in names
    code = {path.relative_to(ROOT).as_posix() for path in (ROOT / "modeling_cocoa").glob("*.py")}
    assert code <= names
    assert not [
        name for name in names if re.search(r"pycache|\.pyc|/\.|^\.|_assets|^tests|^runs|cocoa/app/(README|req)", name)
    ]


def test_the_card_is_one_that_the_hub_reads(written):
    data = SpaceCard.load(written / "README.md").data
    assert (data.sdk, data.app_file, data.license, data.models) == ("gradio", "app.py", "apache-2.0", None)
    assert len(data.short_description) <= 60 and re.fullmatch(r"\d+\.\d+\.\d+", data.sdk_version)
    colors = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}
    assert {data.colorFrom, data.colorTo} <= colors


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib, of Python 3.11")
def test_the_requirements_are_the_projects(written):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    lines = (written / "requirements.txt").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == project["dependencies"]
    (gradio,) = [line for line in project["optional-dependencies"]["app"] if line.startswith("gradio")]
    version = SpaceCard.load(written / "README.md").data.sdk_version
    assert version in SpecifierSet(gradio.removeprefix("gradio"))


def test_models_of_the_hub_are_named_in_the_app_and_the_card(tmp_path):
    write_space(tmp_path / "space", model="org/cocoa", rebuild_model="org/cocoa-bridge")
    assert not (tmp_path / "space" / "checkpoints").exists()
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


def test_it_runs_alone(written, tmp_path):
    """The page is served from the folder's own code, nothing else of this project being read, and guards its files."""
    folder = written
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
        assert "reconstruct" in names, "the checkpoint of the bridge stage has come along"
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
