# SPDX-License-Identifier: Apache-2.0
"""`from cocoa import ...`: every public name, nothing loaded before it is asked for, and no package hidden."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
import sysconfig
from importlib import import_module
from pathlib import Path

import pytest

import cocoa

ROOT = Path(__file__).parents[2]
SCRIPT = Path(sysconfig.get_path("scripts")) / "cocoa"
LIBRARIES = "{'torch', 'transformers', 'sentence_transformers', 'datasets', 'numpy', 'typer'}"


def run(*command: object, cwd: Path, path: str = "") -> subprocess.CompletedProcess:
    """A process elsewhere, with this checkout behind what is installed and the folders of `path` before it."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [path, str(ROOT)]))}
    return subprocess.run([*map(str, command)], cwd=cwd, env=environment, capture_output=True, text=True)


def test_every_public_name_can_be_imported_and_is_the_one_of_its_old_path():
    found = {name: getattr(cocoa, name) for name in cocoa.__all__}
    for package in ("modeling_cocoa", "trainers", "hub_cards"):
        for name in import_module(package).__all__:
            assert found[name] is getattr(import_module(package), name)
    assert cocoa.__all__ == sorted(set(cocoa.__all__)) and set(cocoa.__all__) <= set(dir(cocoa))
    assert set(cocoa.HOMES) <= set(cocoa.__all__)
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        _ = cocoa.Nothing


@pytest.mark.parametrize("package", ["cocoa", "modeling_cocoa"])
def test_a_former_name_warns_and_is_the_same(package):
    with pytest.warns(FutureWarning, match="CocoaConfig is now called CocoaSettings"):
        assert import_module(package).CocoaConfig is cocoa.CocoaSettings


def test_type_checkers_see_every_name_where_it_is_found():
    block = next(node for node in ast.parse(Path(cocoa.__file__).read_text()).body if isinstance(node, ast.If))
    seen = {alias.name: node.module for node in block.body for alias in node.names}
    assert seen == {name: cocoa.HOMES.get(name, "modeling_cocoa") for name in cocoa.__all__}


def test_importing_loads_no_library_and_changes_no_setting(tmp_path):
    code = f"""
import logging, os, sys
before = dict(os.environ)
import cocoa, cocoa.cli
assert dir(cocoa) and os.environ == before
assert logging.getLogger("bitsandbytes").level == logging.NOTSET
print(sorted({LIBRARIES} & {{*sys.modules}}), len(sys.modules))
"""
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout.startswith("['typer'] ")
    code = f"import sys, cocoa; print(sorted({LIBRARIES} & {{*sys.modules}}))"
    assert run(sys.executable, "-c", code, cwd=tmp_path).stdout == "[]\n"


def test_what_the_examples_and_pages_import_is_public():
    texts = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    names = [node for text in texts for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ImportFrom)]
    assert {node.module for node in names}.isdisjoint({"modeling_cocoa", "trainers", "evaluation", "hub_cards"})
    public = {alias.name for node in names if node.module == "cocoa" for alias in node.names}
    assert public <= set(cocoa.__all__) and "CocoaContrastiveTrainer" in public
    for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md")):
        for line in re.findall(r"^from cocoa import (\w[\w, ]*)$", page.read_text(encoding="utf-8"), re.MULTILINE):
            assert set(line.split(", ")) <= set(cocoa.__all__), page


@pytest.mark.parametrize("hidden", ["trainers", "evaluation", "modeling_cocoa", "modeling_cocoa.py"])
@pytest.mark.parametrize("way", ["script", "-c"])
def test_what_hides_a_package_of_ours_is_named(tmp_path, hidden, way):
    """As a folder or a file of the user's, by whichever way Python starts; old paths are Python's own to look up."""
    other = tmp_path / hidden if hidden.endswith(".py") else tmp_path / hidden / "__init__.py"
    other.parent.mkdir(exist_ok=True)
    other.write_text("")
    (tmp_path / "script.py").write_text("from cocoa import CocoaContrastiveTrainer\n")
    arguments = ["-c", "from cocoa import CocoaContrastiveTrainer"] if way == "-c" else ["script.py"]
    result = run(sys.executable, *arguments, cwd=tmp_path)
    last = result.stderr.strip().splitlines()[-1]
    package = hidden.removesuffix(".py")
    assert result.returncode == 1 and last.startswith(f"ImportError: {tmp_path / hidden} hides the {package!r}")
    assert f"which is {ROOT / package}: rename {hidden}, or run elsewhere " in last


def test_what_hides_nothing_that_is_needed_is_left_alone(tmp_path):
    """A folder without code, and one of a package that the name does not use."""
    (tmp_path / "modeling_cocoa").mkdir()
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "__init__.py").write_text("raise SystemExit('theirs')")
    code = "from cocoa import asset_path; print(asset_path('data/emoji.parquet'))"
    result = run(sys.executable, "-c", code, cwd=tmp_path)
    assert result.stdout.strip() == str(ROOT / "data" / "emoji.parquet"), result.stderr


def test_the_command_says_what_hides_a_package(tmp_path):
    """`-m` and PYTHONPATH put a user's folders first, and the console script does not."""
    (tmp_path / "trainers").mkdir()
    (tmp_path / "trainers" / "__init__.py").write_text("")
    command = ["card", "nofolder"]
    ways = [run(sys.executable, "-m", "cocoa", *command, cwd=tmp_path)]
    if SCRIPT.exists():
        ways.append(run(SCRIPT, *command, cwd=tmp_path, path="."))
        assert "no checkpoint folder" in run(SCRIPT, *command, cwd=tmp_path).stderr
    for result in ways:
        assert result.returncode == 1 and result.stderr.startswith(f"cocoa card: {tmp_path / 'trainers'} hides the ")
        assert len(result.stderr.strip().splitlines()) == 1
    assert run(sys.executable, "-m", "cocoa", "--help", cwd=tmp_path).returncode == 0


@pytest.mark.skipif(sys.version_info < (3, 11), reason="reads pyproject.toml with tomllib, of Python 3.11")
def test_a_wheel_has_every_module():
    import tomllib

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert set(settings["targets"]["wheel"]["only-include"]) == {"cocoa", *cocoa.PACKAGES, "data", "checkpoints"}


def test_a_command_quiets_what_would_report_or_warn(monkeypatch):
    """For its own process, and only where the user has not chosen."""
    from typer.testing import CliRunner

    from cocoa.cli import app

    monkeypatch.setenv("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    monkeypatch.delenv("HF_UPDATE_DOWNLOAD_COUNTS")
    assert CliRunner().invoke(app, ["card", "nofolder"]).exit_code == 1
    assert os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] == "0"
