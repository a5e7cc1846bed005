# SPDX-License-Identifier: Apache-2.0
"""
The code of README and docs runs as it stands, on small models and real pictures; what does not run says why.

A block after `<!-- not run: REASON -->` is left alone. The Python blocks of a page run one after the other, as for a
reader. Of shell blocks, each `cocoa` command is called up to its first line, which checks its arguments.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from transformers import Qwen2VLForConditionalGeneration

import cocoa
from tests.cocoa.test_cli import call
from tests.trainers.conftest import TEXT_CONFIG, VISION_CONFIG
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import build_tiny_processor

ROOT = Path(__file__).parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\w*)\n(?P<code>.*?)^```", re.DOTALL | re.MULTILINE
)
LANGUAGES = ("python", "bash", "yaml", "")
"""Blocks without a language are what a command prints."""

SMALLER = {  # what a page says for a GPU, for the tiny model that the test puts in the place of the real one
    "256 * 28 * 28": "1 * 28 * 28",
    "1024 * 28 * 28": "4 * 28 * 28",
    '"bf16": True': '"bf16": True, "use_cpu": True',
}


def blocks(page: Path, *languages: str) -> list[str]:
    """The code of a page's blocks that are run, of some languages."""
    found = BLOCK.finditer(page.read_text(encoding="utf-8"))
    return [block["code"] for block in found if not block["reason"] and block["language"] in languages]


def named(page: Path) -> str:
    """A page's path from the root on."""
    return str(page.relative_to(ROOT))


@pytest.fixture
def reader(tmp_path, monkeypatch):
    """Where a reader is: a folder of pictures beside the checkpoints."""
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(16))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    (tmp_path / "evaluation").mkdir()
    (tmp_path / "evaluation" / "ranking_metrics.py").symlink_to(ROOT / "evaluation" / "ranking_metrics.py")
    pictures = tmp_path / "my_pictures"
    pictures.mkdir()
    lines = ["file_name,text"]
    for index, row in enumerate(rows):
        row["noto"].convert("RGB").save(pictures / f"{index}.png")
        lines.append(f'{index}.png,"{row["name"]}"')
    (pictures / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


@pytest.fixture
def generative(reader):
    """A tiny generative Qwen2-VL checkpoint under the name that the pages use."""
    names = (reader / "my_pictures" / "metadata.csv").read_text(encoding="utf-8").splitlines()
    processor = build_tiny_processor(names, vocab_size=300, patch_size=14, max_length=64)
    folder = reader / "Qwen" / "Qwen2-VL-2B-Instruct"
    Qwen2VLForConditionalGeneration(build_model(processor, TEXT_CONFIG, VISION_CONFIG).config).save_pretrained(folder)
    processor.save_pretrained(folder)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_is_run_or_says_why_not(page):
    for block in BLOCK.finditer(page.read_text(encoding="utf-8")):
        if not block["reason"]:
            assert block["language"] in LANGUAGES, f"mark it: <!-- not run: why -->\n{block['code']}"


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]


@pytest.mark.parametrize("page", WITH_PYTHON, ids=named)
def test_python_runs(page, generative, reader, capsys):
    code = "\n".join(blocks(page, "python"))
    for large, small in SMALLER.items():
        code = code.replace(large, small)
    values: dict = {"__name__": "__main__"}
    exec(compile(code, named(page), "exec"), values)
    if "CocoaContrastiveTrainer(" in code:
        model = SentenceTransformer(str(reader / "runs" / "contrastive" / "final"), device="cpu")
        assert model.encode(["a cat"]).shape[0] == 1


def shell_commands(page: Path) -> list[list[str]]:
    """The commands of a page's shell blocks, without comments."""
    lines = "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


def test_shell_commands_are_taken(reader):
    """`cocoa` by its command line; `make` by its targets; scripts by their path. Others are the system's."""
    (reader / "mmeb_images").mkdir()
    for folder in ("my-model", "runs/contrastive/final", "runs/my_images/contrastive/final"):
        shutil.copytree(ROOT / "checkpoints" / "cocoa-tiny", reader / folder)
    (reader / "my_images.yaml").touch()
    (reader / "vectors").mkdir()
    (reader / "vectors" / "manifest.json").touch()
    scores = reader / "results" / "runs-my_images-contrastive-final-*" / "scores.json"  # no shell is there to find it
    scores.parent.mkdir(parents=True)
    scores.touch()
    commands = [command for page in PAGES for command in shell_commands(page)]
    ours = [words[1:] for words in commands if words[0] == "cocoa"]
    codes, _, printed = call([words for words in ours if words], cwd=reader)
    assert len(ours) > 15 and not any(codes), printed
    targets = re.findall(r"^([\w-]+):.*##", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
    for words in commands:
        assert words[0] != "make" or set(words[1:]) - {word for word in words if "=" in word} <= set(targets), words
        assert words[0] != "python" or words[1].startswith("-") or (ROOT / words[1]).is_file(), words


def test_a_folder_of_images_is_trained_on_and_evaluated_without_code(reader):
    """The tutorial's recipe and its two commands, and the recipe that trains on all images."""
    page = ROOT / "docs" / "tutorials" / "finetune.md"
    recipe, all_images = blocks(page, "yaml")
    values = yaml.safe_load(recipe)
    values["stages"]["contrastive"].update(use_cpu=True, num_train_epochs=1)
    (reader / "my_images.yaml").write_text(yaml.safe_dump(values))
    for words in shell_commands(page):
        subprocess.run([sys.executable, "-m", *words], check=True, env=None, cwd=reader)
    (reader / "all_images.yaml").write_text(all_images)
    run = subprocess.run([sys.executable, "-m", "cocoa", "train", "all_images.yaml"], cwd=reader, capture_output=True)
    assert run.returncode == 0 and (reader / "runs" / "all_images" / "contrastive" / "final").is_dir(), run.stderr
    report = (reader / "results" / "report.md").read_text()
    assert len(re.findall(r"^\| (?:\S+/cocoa-tiny|runs/my_images/contrastive/final) \| \d", report, re.MULTILINE)) == 4


def test_every_public_name_is_in_the_reference():
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    assert not [name for name in cocoa.__all__ if not re.search(rf"^::: [\w.]+\.{name}$", pages, flags=re.MULTILINE)]


def test_readme_fits_on_a_few_screens():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 200


class Requests(HTMLParser):
    """What a page makes a browser fetch by itself."""

    def __init__(self):
        super().__init__()
        self.found = []

    def handle_starttag(self, tag, attrs):
        values = dict(attrs)
        if tag in ("script", "img", "iframe", "source", "video"):
            self.found.append(values.get("src") or "")
        elif tag == "link" and values.get("rel") not in ("canonical", "next", "prev"):
            self.found.append(values.get("href") or "")


@pytest.mark.slow
def test_the_site_is_built_strictly_and_asks_for_nothing_from_elsewhere(tmp_path):
    """Links and docstrings are checked by the build itself, whose warnings are errors."""
    pytest.importorskip("mkdocs")
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", tmp_path / "site"]
    build = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert build.returncode == 0, build.stderr
    pages = list((tmp_path / "site").rglob("*.html"))
    assert len(pages) > 25
    for page in pages:
        parser = Requests()
        parser.feed(page.read_text(encoding="utf-8"))
        assert parser.found and not [found for found in parser.found if re.match(r"(https?:)?//", found)], page
    for sheet in (tmp_path / "site").rglob("*.css"):
        assert not re.search(r"url\(['\"]?(https?:)?//|@import", sheet.read_text(encoding="utf-8")), sheet
