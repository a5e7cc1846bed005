# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import os
import subprocess
import sys

import pytest
from typer.testing import CliRunner

import cocoa_cli


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(cocoa_cli.app, arguments)


def test_help_names_the_commands_and_their_options(invoke):
    result = invoke("--help")
    assert result.exit_code == 0 and "demo" in result.output
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for option in ("--model", "--query", "--output-dir"):
        assert option in result.output


def test_help_waits_for_no_library():
    code = (
        "import sys, cocoa_cli\n"
        "try: cocoa_cli.app(['--help'])\n"
        "except SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'sentence_transformers', 'datasets', 'sklearn'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip().endswith("[]")


def test_version_is_that_of_the_installed_distribution(invoke, monkeypatch):
    monkeypatch.setattr(cocoa_cli, "version", {"cocoa-embed": "1.2.3"}.__getitem__)
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.strip() == "1.2.3"


def test_demo_hands_its_options_over(invoke, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("evaluation.demo.run_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert invoke("demo", "--query", "a", "--query", "b", "--output-dir", str(tmp_path)).exit_code == 0
    assert calls == [((None, tmp_path), {"queries": ["a", "b"]})]


def test_a_missing_checkpoint_is_one_clear_line(invoke, tmp_path):
    result = invoke("demo", "--model", str(tmp_path / "none"))
    assert result.exit_code == 1
    assert result.output.startswith("cocoa demo: ") and "holds no sentence-transformers checkpoint" in result.output
    assert "Traceback" not in result.output


def test_an_app_of_no_folder_is_one_clear_line(invoke, tmp_path):
    result = invoke("app", "--pictures", str(tmp_path / "nowhere"))
    assert result.exit_code == 1 and result.output.startswith("cocoa app: There is no folder of pictures")


def test_a_space_is_listed_and_not_uploaded(invoke):
    result = invoke("push-space", "org/space", "--model", "org/model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        "app.py" in result.output and "data/emoji.parquet" in result.output and "this was a dry run" in result.output
    )
    result = invoke("push-space", "org/space", "--model", "checkpoints", "--dry-run")
    assert result.exit_code == 1 and "push it, and give its Hub name" in result.output


@pytest.mark.parametrize(
    "command",
    [
        ("app", "--model"),
        ("app", "--rebuild-model"),
        ("eval", "emoji", "--model"),
        ("eval", "mmeb", "--data", "x", "--images", ".", "--model"),
        ("eval", "emoji", "--baseline"),
        ("mine-negatives",),
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("name", ["nofolder", "./nofolder", "checkpoints/nofolder", "no/such/folder"])
def test_a_folder_that_is_not_there_is_one_line_at_once(invoke, monkeypatch, command, name):
    """Without asking the Hub."""
    if command[-1] == "--baseline" and name == "nofolder":
        pytest.skip("other models have names without an owner")
    monkeypatch.setattr("socket.getaddrinfo", lambda *args, **kwargs: pytest.fail("asked the Hub"))
    rest = ("tiny", "out") if command == ("mine-negatives",) else ()
    result = invoke(*command, name, *rest)
    (line,) = [line for line in result.output.splitlines() if line]
    assert result.exit_code == 1 and f"There is no checkpoint folder {name}" in line


def test_a_card_of_no_folder_is_one_line(invoke):
    result = invoke("card", "nofolder")
    assert result.exit_code == 1 and result.output.strip() == "cocoa card: There is no folder nofolder."


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_commands_have_threads_wait_without_spinning_unless_told_otherwise(given):
    """Before torch is imported; importing the package changes nothing."""
    code = (
        "import os, sys, cocoa_cli, modeling_cocoa.checkpoint_files; print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "@cocoa_cli.app.command()\ndef look(): print(os.environ['OMP_WAIT_POLICY'])\n"
        "cocoa_cli.app(['look'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(given), given or "PASSIVE"]
