# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import os
import re
import resource
import socket
import subprocess
import sys

import pytest
import typer
from typer.core import TyperGroup
from typer.testing import CliRunner

from cocoa import cli, quiet
from evaluation.assets import asset_path
from evaluation.folder import read_images
from modeling_cocoa.media import load_image

ROOT = asset_path("checkpoints").parent


@pytest.fixture
def invoke(monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setenv("NO_COLOR", "1")
    return lambda *arguments: CliRunner().invoke(cli.app, arguments)


def test_help_names_the_commands_and_their_options(invoke):
    result = invoke("--help")
    assert result.exit_code == 0 and "demo" in result.output
    result = invoke("demo", "--help")
    assert result.exit_code == 0
    for option in ("--model", "--query", "--output-dir"):
        assert option in result.output


WRONG = [
    ["no-such-command"],
    ["demo", "--model", "nofolder"],
    ["demo", "--model", "docs"],
    ["demo", "--output-dir", "README.md"],
    ["train", "no-such-recipe"],
    ["mine-negatives", "nofolder", "tiny", "out"],
    ["mine-negatives", "checkpoints/cocoa-tiny", "tiny", "out", "--range-min", "5", "--range-max", "3"],
    ["eval", "emoji", "--model", "nofolder"],
    ["eval", "emoji", "--tasks", "Emoji-Shet"],
    ["eval", "mmeb", "--data", "x", "--images", "nofolder"],
    ["eval", "mmeb", "--data", "x", "--images", "docs", "--model", "checkpoints/cocoa-tiny"],
    ["eval", "mmeb", "--data", "docs", "--images", "docs", "--model", "checkpoints/cocoa-tiny"],
    ["eval", "mmeb", "--data", "org/data", "--images", "docs"],
    ["eval", "folder", "nofolder"],
    ["eval", "folder", "docs"],
    ["search", "nofolder", "a heart"],
    ["search", "docs", "a heart"],
    ["card", "nofolder"],
    ["card", "docs"],
    ["push", "nofolder", "org/model"],
    ["push", "checkpoints/cocoa-tiny", "my/bad/name"],
    ["app", "--images", "nofolder"],
    ["app", "--rebuild-model", "no/such/folder"],
    ["push-space", "org/space", "--model", "checkpoints"],
    ["serve", "nofolder"],
    ["check-server", "http://localhost:8000", "--model", "nofolder"],
]
"""Arguments that can be seen to be wrong without a library."""

RIGHT = [
    ["embed", "docs/images", "--model", "checkpoints/cocoa-tiny", "--output-dir", "{tmp}"],
    ["search", "{tmp}", "a red bicycle"],
    ["serve", "checkpoints/cocoa-tiny"],
    ["check-server", "http://localhost:8000", "--model", "checkpoints/cocoa-tiny"],
    ["demo", "--output-dir", "{tmp}"],
    ["train", "tiny"],
    ["mine-negatives", "checkpoints/cocoa-tiny", "tiny", "{tmp}"],
    ["eval", "mmeb", "--data", "org/data", "--images", "docs", "--baseline", "clip", "--output-dir", "{tmp}"],
    ["eval", "emoji", "--output-dir", "{tmp}"],
    ["eval", "folder", "{tmp}", "--output-dir", "{tmp}"],
    ["card", "checkpoints/cocoa-tiny"],
    ["push", "checkpoints/cocoa-tiny", "org/model"],
    ["app"],
    ["push-space", "org/space"],
    ["doctor"],
]
"""Each command, with arguments that nothing is wrong with."""

CALLS = """
import json, sys, time
from cocoa import cli
first_line = cli.announce
cli.announce = lambda what: sys.exit(first_line(what))
for command in json.loads(sys.argv[1]):
    started = time.process_time()
    try:
        cli.app(command)
    except SystemExit as end:
        print("ENDED", end.code or 0, time.process_time() - started)
libraries = {"torch", "transformers", "sentence_transformers", "datasets", "sklearn", "gradio", "numpy"}
print("LOADED", *sorted(libraries & set(sys.modules)))
"""


def call(commands, cwd=ROOT):
    """The exit codes and CPU seconds of commands that end after their first line, and that line."""
    code = [sys.executable, "-c", CALLS, json.dumps(commands)]
    run = subprocess.run(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True, cwd=cwd)
    *lines, last = run.stdout.splitlines()
    assert last == "LOADED", "a library is loaded too early"
    ends = [line.split()[1:] for line in lines if line.startswith("ENDED")]
    assert len(ends) == len(commands), run.stdout
    return [int(code) for code, _ in ends], [float(seconds) for _, seconds in ends], run.stdout


def test_wrong_arguments_wait_for_no_library():
    codes, seconds, printed = call(WRONG)
    assert all(codes) and max(seconds) < 1, list(zip(codes, seconds, WRONG, strict=True))
    assert "loading libraries" not in printed


def test_the_first_line_of_each_command_waits_for_no_library(tmp_path):
    (tmp_path / "metadata.csv").touch()
    (tmp_path / "manifest.json").touch()
    codes, seconds, printed = call([[part.format(tmp=tmp_path) for part in command] for command in RIGHT])
    assert not any(codes) and max(seconds) < 1, list(zip(codes, seconds, RIGHT, strict=True))
    assert printed.count("(loading libraries takes a few seconds)") == len(RIGHT)
    assert {tuple(names) for names, _ in all_commands()} == {
        tuple(names[: 1 + (names[0] == "eval")]) for names in RIGHT
    }


@pytest.mark.parametrize("command", [("app",), ("serve", "checkpoints/cocoa-tiny")], ids=" ".join)
def test_a_port_in_use_is_said_at_once(invoke, command):
    with socket.create_server(("127.0.0.1", 0)) as server:
        result = invoke(*command, "--port", str(server.getsockname()[1]))
    assert result.exit_code == 1 and "choose another with --port" in result.output and result.output.count("\n") == 1


def all_commands():
    """Each command with its names, such as `["eval", "emoji"]`."""
    waiting = [([], typer.main.get_command(cli.app))]
    for names, command in waiting:
        if isinstance(command, TyperGroup):
            waiting += [([*names, name], inner) for name, inner in command.commands.items()]
        else:
            yield names, command


@pytest.mark.parametrize("arguments", [["--help"], [], ["train", "--help"], ["card", "nofolder"], ["train", "none"]])
def test_help_and_errors_take_little_time(arguments):
    """CPU seconds of a new process, imports of Python itself among them."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, "-m", "cocoa", *arguments], cwd=ROOT, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.5


@pytest.mark.parametrize(("typed", "completed"), [("cocoa doc", "doctor"), ("cocoa demo --qu", "--query")])
def test_a_shell_completes_commands_and_options(typed, completed):
    words = {"COMP_WORDS": typed, "COMP_CWORD": str(len(typed.split()) - 1), "_COCOA_COMPLETE": "complete_bash"}
    command = [sys.executable, "-m", "cocoa"]
    run = subprocess.run(command, env={**os.environ, **words}, capture_output=True, text=True, check=True, cwd=ROOT)
    assert run.stdout.split() == [completed]


def test_cocoa_alone_shows_the_life_of_a_model(invoke):
    result = invoke()
    assert result.exit_code == 0
    named = re.findall(r"^  cocoa ([\w-]+)", result.output, flags=re.MULTILINE)
    assert len(named) == 6 and set(named) <= {names[0] for names, _ in all_commands()}


@pytest.mark.parametrize(
    ("names", "command"), list(all_commands()), ids=lambda value: " ".join(value) if isinstance(value, list) else ""
)
def test_help_has_an_example_and_what_comes_next(names, command):
    """The options of each command that a help names are known to it."""
    text = command.help
    assert f"Example: `cocoa {' '.join(names)}" in text and "\nNext: " in text
    known = {
        " ".join(other): {flag for option in each.params for flag in option.opts} for other, each in all_commands()
    }
    for line in re.findall(r"`cocoa ([^`]+)`", " ".join(text.split())):
        words = line.split()
        other = next(name for name in (" ".join(words[:2]), words[0]) if name in known or name == "eval")
        flags = {word for word in words if word.startswith("--")}
        assert other == "eval" or flags <= known[other], line


def test_what_other_libraries_say_at_each_start_is_left_out_by_the_command_line_alone():
    """The messages themselves, by the loggers that they go through; others of these loggers are shown."""
    code = """
import logging, sys, warnings
import cocoa
from cocoa import cli, quiet
cli.app(["--version"], standalone_mode=False) if sys.argv[1] == "cli" else None
cli.app([], standalone_mode=False) if sys.argv[1] == "cli" else None
from modeling_cocoa import CocoaTransformer
CocoaTransformer("checkpoints/cocoa-tiny")
for name, text in quiet.LINES.items():
    logging.getLogger(name).warning(f"%s {text} %s", 1, 2)
    logging.getLogger(name).warning("another")
for kind, text in quiet.WARNINGS:
    warnings.warn(f"{text} ...", kind)
"""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_LOGS"}
    options = {"capture_output": True, "text": True, "check": True, "cwd": ROOT, "env": environment}
    shown = {way: subprocess.run([sys.executable, "-c", code, way], **options).stderr for way in ("cli", "library")}
    assert "another" in shown["cli"]
    assert shown["cli"].count("another") == shown["library"].count("another")
    for text in (*quiet.LINES.values(), *(text for _, text in quiet.WARNINGS)):
        assert text not in shown["cli"] and text in shown["library"]


def test_loading_weights_shows_no_bar_in_a_command_and_does_in_a_library(capfd):
    hidden = subprocess.run([sys.executable, "-c", LOAD.format("quiet.hide_bars()")], capture_output=True, text=True)
    shown = subprocess.run([sys.executable, "-c", LOAD.format("")], capture_output=True, text=True)
    assert "Loading weights" not in hidden.stderr and "further" in hidden.stderr
    assert "Loading weights" in shown.stderr


LOAD = """
from cocoa import quiet
{}
from transformers.utils import logging
for title in ("Loading weights", "further"):
    list(logging.tqdm(range(3), desc=title))
"""


def test_version_is_that_of_the_installed_distribution(invoke, monkeypatch):
    monkeypatch.setattr(cli, "version", {"cocoa-embed": "1.2.3"}.__getitem__)
    result = invoke("--version")
    assert result.exit_code == 0 and result.output.strip() == "1.2.3"


def test_demo_hands_its_options_over(invoke, monkeypatch, tmp_path):
    calls = []
    monkeypatch.setattr("cocoa.demo.demo.run_demo", lambda *args, **kwargs: calls.append((args, kwargs)))
    assert invoke("demo", "--query", "a", "--query", "b", "--output-dir", str(tmp_path)).exit_code == 0
    assert calls == [((None, tmp_path), {"queries": ["a", "b"]})]


def test_demo_writes_images_with_captions_into_a_new_folder(invoke, tmp_path):
    folder = tmp_path / "my_pictures"
    result = invoke("demo", "--write-images", str(folder))
    assert result.exit_code == 0 and "318 images and metadata.csv" in result.output
    rows = read_images(folder)
    assert len(rows) == len(list(folder.glob("*.png"))) == 318 and all(rows["text"])
    load_image(rows["image"][-1]["path"])
    result = invoke("demo", "--write-images", str(folder))
    assert result.exit_code == 1 and "name a new folder" in result.output


def test_a_missing_checkpoint_is_one_clear_line(invoke, tmp_path):
    result = invoke("demo", "--model", str(tmp_path / "none"))
    assert result.exit_code == 1 and "There is no checkpoint folder" in result.output
    result = invoke("demo", "--model", str(tmp_path))
    assert result.exit_code == 1 and result.output.startswith("cocoa demo: ") and "holds no model" in result.output
    assert result.output.count("\n") == 1
    (tmp_path / "cocoa-tiny").mkdir()
    assert "(did you mean cocoa-tiny?)" in invoke("card", str(tmp_path / "cocoa-tyni")).output


def test_an_app_of_no_folder_is_one_clear_line(invoke, tmp_path):
    (tmp_path / "pictures").mkdir()
    for option in ("--images", "--pictures"):
        for name, said in (("nowhere", "check the path"), ("picutres", "(did you mean pictures?)")):
            result = invoke("app", option, str(tmp_path / name))
            assert result.exit_code == 1 and result.output.count("\n") == 1
            assert f"There is no folder {tmp_path / name}" in result.output and said in result.output


def test_a_space_is_listed_and_not_uploaded(invoke):
    result = invoke("push-space", "org/space", "--model", "org/model", "--dry-run")
    assert result.exit_code == 0, result.output
    assert (
        "app.py" in result.output and "data/emoji.parquet" in result.output and "this was a dry run" in result.output
    )
    result = invoke("push-space", "org/space", "--model", "checkpoints", "--dry-run")
    assert result.exit_code == 2 and "push it, and give its Hub name" in " ".join(
        result.output.replace("│", "").split()
    )


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


@pytest.mark.parametrize("given", [None, "ACTIVE"])
def test_commands_have_threads_wait_without_spinning_unless_told_otherwise(given):
    """Before torch is imported; importing the package changes nothing."""
    code = (
        "import os, sys, modeling_cocoa.checkpoint_files; from cocoa import cli\n"
        "print(os.environ.get('OMP_WAIT_POLICY'))\n"
        "@cli.app.command()\ndef look(): print(os.environ['OMP_WAIT_POLICY'])\n"
        "cli.app(['look'])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    if given:
        environment["OMP_WAIT_POLICY"] = given
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == [str(given), given or "PASSIVE"]
