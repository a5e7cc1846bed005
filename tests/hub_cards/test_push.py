# SPDX-License-Identifier: Apache-2.0
"""Pushing a model: what arrives is what loads everywhere, or nothing changes and the error says why."""

from __future__ import annotations

import io
import json
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset
from huggingface_hub import CommitOperationAdd, ModelCard, SpaceCard
from peft import LoraConfig
from PIL import Image
from rich.console import Console
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer

import cocoa.app.space
import hub_cards.push
from cocoa.app.space import push_space
from hub_cards.loading_checks import SCRIPT, find_loading_problems
from hub_cards.push import FolderError, PushError, push_model
from hub_cards.training_record import read_records, write_records
from tests.trainers.conftest import ROOT
from trainers import CocoaContrastiveConfig, CocoaContrastiveTrainer

CHECKPOINT = ROOT / "checkpoints" / "cocoa-tiny"
NAME = "org/cocoa-tiny"


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny checkpoint."""
    return shutil.copytree(CHECKPOINT, tmp_path / "model")


@pytest.fixture
def without_loading(monkeypatch):
    """No fresh process: for what comes before and after it."""
    monkeypatch.setattr(hub_cards.push, "find_loading_problems", lambda folder: [])


def contents(folder) -> dict[str, bytes]:
    """Names and bytes of a folder's files."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def push(folder, **options) -> str:
    """Push, and give what was printed."""
    console = Console(file=io.StringIO(), width=120)
    push_model(folder, NAME, console=console, **options)
    return " ".join(console.file.getvalue().split())  # lines are broken anywhere


def run(environment, *command) -> subprocess.CompletedProcess:
    """A command in a process of its own."""
    environment = {**environment, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def test_what_is_pushed_loads_without_this_package_through_both_loaders(hub, hub_environment, folder, tmp_path):
    pushed = run(hub_environment, "-m", "cocoa", "push", folder, NAME)
    assert pushed.returncode == 0, pushed.stderr[-3000:]
    assert f"{len(contents(folder))} files" in pushed.stdout and "Published: " in pushed.stdout
    remote = hub.repository(NAME).head().files
    assert remote["model.safetensors"] == (folder / "model.safetensors").read_bytes()
    assert b'SentenceTransformer("org/cocoa-tiny")' in remote["README.md"], "the card names the model"
    loaded = run(hub_environment, SCRIPT, NAME, "stock", "remote_code")
    assert loaded.returncode == 0, loaded.stderr[-3000:]
    vectors = json.loads(loaded.stdout.splitlines()[-1])
    image = Image.linear_gradient("L").resize((96, 64)).convert("RGB")
    model = SentenceTransformer(str(CHECKPOINT), device="cpu")
    expected = [
        model.encode([item])[0]
        for item in ("a photo of a dog", image, {"image": image, "text": "from dark to light"}, "rain " * 40)
    ]
    for loader in ("stock", "remote_code"):
        np.testing.assert_allclose(vectors[loader], expected, atol=1e-5, rtol=0)
    assert hub.unknown == []


def spoil_weights(folder) -> None:
    """A weight that is no number."""
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})


def cut_weights(folder) -> None:
    """The end of the weights is missing."""
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def break_head(folder) -> None:
    """The card's metadata is not YAML."""
    card = folder / "README.md"
    card.write_text(card.read_text().replace("tags:", "tags: [", 1))


def other_weights(folder) -> None:
    """Results that are of another model."""
    path = next((folder / "evaluation").glob("*.json"))
    scores = json.loads(path.read_text())
    scores["settings"]["weights"] = "0" * 64
    path.write_text(json.dumps(scores))


def write(name: str, content: str):
    """A file with a content."""
    return lambda folder: (folder / name).write_text(content)


def add_to(name: str, content: str):
    """More at the end of a file."""
    return lambda folder: (folder / name).write_text((folder / name).read_text() + content)


WRONG = {
    "optimizer.pt": (write("optimizer.pt", "state"), r"optimizer\.pt: only .* are pushed"),
    "bin": (write("pytorch_model.bin", "weights"), r"pytorch_model\.bin: only"),
    "pickle": (write("data.pkl", "x"), r"data\.pkl: only .*run code"),
    "pickle by another name": (
        lambda folder: (folder / "a.json").write_bytes(b"\x80\x04\0"),
        r"a\.json is not a text file in UTF-8",
    ),
    "no image": (write("a.png", "no image"), r"a\.png is not a PNG or JPEG image"),
    "configuration": (write("config.json", '{"model_type": '), r"config\.json is not valid JSON"),
    "index": (write("model.safetensors.index.json", "{"), r"index\.json is not valid JSON"),
    "half a tokenizer": (write("tokenizer.json", '{"model": '), r"tokenizer\.json is not valid JSON"),
    "tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), r"There is no tokenizer\.json"),
    "no card": (lambda folder: (folder / "README.md").unlink(), r"There is no README\.md, .*cocoa card"),
    "weights": (lambda folder: (folder / "model.safetensors").unlink(), r"There is no model\.safetensors"),
    "NaN": (spoil_weights, r"1 weights hold NaN or infinity, the first is model\.norm\.weight"),
    "cut off": (cut_weights, r"model\.safetensors cannot be read"),
    "other shards": (
        lambda folder: shutil.copyfile(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors"),
        r"model-00001-of-00002\.safetensors is not part of the model",
    ),
    "metadata": (break_head, r"README\.md: its metadata is not valid"),
    "missing image": (add_to("README.md", "\n![chart](chart.png)\n"), r"shows the image chart\.png"),
    "code": (
        add_to("attention.py", "\n# mine\n"),
        r"attention\.py differs from the code of the inst",
    ),
    "more code": (write("helper.py", "import os\n"), r"helper\.py is not part of a model's code"),
    "path": (
        add_to("README.md", "\nTrained in /home/someone/runs.\n"),
        r"line \d+: '/home/someone' looks like a path",
    ),
    "Windows path": (add_to("README.md", "\nC:\\Users\\me\\runs\n"), r"looks like a path of this machine"),
    "token": (add_to("README.md", "\nhf_" + "a1B2" * 9), r"line \d+: looks like a Hub token"),
    "path in an address": (
        add_to("README.md", "\nSee file:///home/someone/runs\n"),
        r"'/home/someone' looks like a path",
    ),
    "link": (lambda folder: (folder / "a.json").symlink_to("nowhere.json"), r"a\.json is a link to nothing"),
    "results": (other_weights, r"evaluation/.*\.json was measured with other weights .*: remove it and its chart"),
    "record": (write("training.json", "{}"), r"training\.json does not hold the stages"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_dry_run_rejects_what_is_not_fit(folder, case):
    spoil, message = WRONG[case]
    spoil(folder)
    before = contents(folder)
    with pytest.raises(FolderError, match=message) as found:
        push(folder, dry_run=True)
    assert "nothing was uploaded" in str(found.value) and contents(folder) == before
    assert len(found.value.problems) == 1, "and nothing else is amiss"


def test_a_dry_run_lists_what_would_be_uploaded(hub, folder, without_loading):
    (folder / "LICENSE").write_text("Apache License")
    count = len(contents(folder))
    (folder / ".partial-model.safetensors").write_text("left by a killed process")
    printed = push(folder, dry_run=True)
    assert "model.safetensors" in printed and "11.1 MB" in printed and f"{count} files" in printed
    assert ".partial" not in printed and "Nothing was uploaded" in printed
    assert "Not logged in: a dry run needs no login" in printed and "fail" not in printed
    assert hub.requests == []


@pytest.mark.parametrize("dry_run", [True, False])
@pytest.mark.parametrize("name", ["my/bad/name", "org/", "org/a--b", "org/na me", "org/x.git"])
def test_a_name_that_the_hub_refuses_is_refused_before_anything_else(hub, folder, monkeypatch, name, dry_run):
    monkeypatch.setattr(hub_cards.push, "find_problems", lambda staging: pytest.fail("checked the files first"))
    with pytest.raises(ValueError, match="(?i)repo.id"):
        push_model(folder, name, dry_run=dry_run, console=Console(file=io.StringIO()))
    with pytest.raises(ValueError, match="(?i)repo.id"):
        push_space(name, dry_run=dry_run, console=Console(file=io.StringIO()))
    assert hub.requests == []


def test_a_login_is_checked_before_the_files(api, hub, folder, monkeypatch, without_loading):
    assert "Logged in as " in push(folder, dry_run=True)
    hub.revoke()
    assert "The login failed, and a push would fail: " in push(folder, dry_run=True)
    monkeypatch.setattr(hub_cards.push, "find_problems", lambda staging: pytest.fail("checked the files first"))
    with pytest.raises(PushError, match="The login failed, so nothing was uploaded: "):
        push(folder)


def test_a_model_that_was_only_pre_trained_is_said_to_be(folder, without_loading):
    note = "was last trained in the stage 'bridge': it is a base for contrastive training"
    assert note not in push(folder, dry_run=True)
    write_records(folder, read_records(folder)[:-1])
    assert note in push(folder, dry_run=True)


def test_a_user_s_own_token_is_found_whatever_its_form(api, hub, folder):
    hub.token = "not-in-any-known-form"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", hub.token)
        (folder / "README.md").write_text((folder / "README.md").read_text() + f"\nlogin with {hub.token}\n")
        with pytest.raises(FolderError, match="contains your Hub token"):
            push(folder, dry_run=True)


def test_code_that_a_re_save_has_lost_is_put_back(api, hub, tmp_path, without_loading):
    SentenceTransformer(str(CHECKPOINT), device="cpu").save_pretrained(str(tmp_path / "again"))
    again = tmp_path / "again"
    assert not (again / "attention.py").exists()
    with pytest.raises(FolderError, match=r"shows the image evaluation/\S+\.png, which is missing: copy it"):
        push(again)
    for name in ("evaluation", "training.json", "card.yaml"):
        copy = shutil.copytree if (CHECKPOINT / name).is_dir() else shutil.copyfile
        copy(CHECKPOINT / name, again / name)
    before = contents(again)
    printed = push(again)
    assert "Added, since a later save had lost them: " in printed and "attention.py" in printed
    assert contents(again) == before
    remote = hub.repository(NAME).head().files
    assert remote["attention.py"] == (ROOT / "modeling_cocoa" / "attention.py").read_bytes()
    assert b'"requirements"' in remote["config_sentence_transformers.json"]


def test_loaders_that_disagree_are_found(folder):
    """A weight that is missing is only warned of by the stock loader, which makes one up."""
    assert find_loading_problems(folder) == []
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.3.mlp.down_proj.weight"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (problem,) = find_loading_problems(folder)
    assert "down_proj" in problem or "different vectors" in problem


SERVER_ERROR = r"The push failed: .*500(.|\n)*is unchanged\. Push again"
FAULTS = {
    "the Hub fails": (
        lambda hub: hub.fail("POST", "*/commit/*", 500),
        SERVER_ERROR,
    ),
    "it fails at first": (
        lambda hub: hub.fail("POST", "*/preupload/*", 500, times=9),
        SERVER_ERROR,
    ),
    "the connection is cut": (
        lambda hub: hub.cut("/storage/*", after_bytes=20_000, times=99),
        r"The push failed: (.|\n)*is unchanged",
    ),
    "the token has expired": (lambda hub: hub.revoke(), r"The login failed, so nothing was uploaded: "),
    "the branch has moved": (
        lambda hub: hub.before("*/commit/*", lambda: hub.repository(NAME).push({"note.md": b"theirs"})),
        r"A commit has happened since",
    ),
}


@pytest.mark.parametrize("case", FAULTS)
def test_a_push_that_fails_changes_nothing_and_can_be_repeated(api, hub, folder, without_loading, case):
    api.create_repo(NAME)
    api.create_commit(NAME, [CommitOperationAdd("README.md", b"# Before\n")], commit_message="before")
    before = hub.repository(NAME).head().files
    spoil, message = FAULTS[case]
    spoil(hub)
    with pytest.raises(PushError, match=message):
        push(folder)
    after = hub.repository(NAME).head().files
    after.pop("note.md", None)  # of the other writer
    assert after == before
    hub.heal()
    push(folder)
    remote = hub.repository(NAME).head().files
    expected = {name: value for name, value in contents(folder).items() if name != "README.md"}
    assert {name: remote[name] for name in expected} == expected
    assert len(hub.repository(NAME).branches["main"]) == (4 if case == "the branch has moved" else 3), "one commit"


def test_weights_that_the_folder_no_longer_has_go_and_other_files_stay(api, hub, folder, without_loading):
    api.create_repo(NAME)
    old = [("model-00001-of-00002.safetensors", b"old"), ("samples/cat.png", b"\x89PNG")]
    api.create_commit(NAME, [CommitOperationAdd(*file) for file in old], commit_message="before")
    push(folder)
    remote = hub.repository(NAME).head().files
    assert "model-00001-of-00002.safetensors" not in remote and remote["samples/cat.png"] == b"\x89PNG"


def test_branches_and_privacy_are_as_asked(api, hub, folder, without_loading):
    push(folder, revision="trial", private=True)
    repository = hub.repository(NAME)
    assert repository.private and "model.safetensors" in repository.head("trial").files
    assert "model.safetensors" not in repository.head().files
    api.create_repo("org/public")
    with pytest.raises(PushError, match="exists and is public"):
        push_model(folder, "org/public", private=True, console=Console(file=io.StringIO()))
    assert "model.safetensors" not in hub.repository("org/public").head().files


def test_offline_and_refused(api, hub, folder, without_loading, monkeypatch):
    hub.fail("POST", "*/repos/create", 403, times=9)
    with pytest.raises(PushError, match=r"The push failed: .*403(.|\n)*Nothing was uploaded"):
        push(folder)


def test_a_trainer_pushes_what_it_trained(api, hub, tmp_path, without_loading):
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(8))
    pairs = rows.select_columns(["name", "noto"]).rename_columns({"name": "query", "noto": "positive"})
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    for wrong, message in (
        ({}, "needs the model's name: hub_model_id"),
        ({"hub_model_id": NAME, "save_adapters": "adapter"}, "checks a whole model"),
        ({"hub_model_id": NAME, "hub_strategy": "checkpoint"}, "would upload checkpoints unchecked"),
    ):
        with pytest.raises(ValueError, match=message):
            CocoaContrastiveConfig(str(tmp_path), push_to_hub=True, use_cpu=True, **wrong)
    trainer = CocoaContrastiveTrainer(
        str(CHECKPOINT), CocoaContrastiveConfig(str(tmp_path / "run"), **options), train_dataset=pairs
    )
    trainer.train()
    with pytest.raises(ValueError, match="Say where to"):
        trainer.push_to_hub()
    address = trainer.push_to_hub(repo_id=NAME, private=True)
    remote = hub.repository(NAME).head().files
    assert hub.repository(NAME).private and address.startswith(hub.endpoint)
    *_, stage = json.loads(remote["training.json"])["stages"]
    assert stage["steps"] == 1 and "optimizer.pt" not in remote
    assert ModelCard(remote["README.md"].decode()).data.library_name == "sentence-transformers"


def test_push_to_hub_pushes_the_checked_model_once_at_the_end(api, hub, tmp_path, without_loading):
    rows = Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(8))
    pairs = rows.select_columns(["name", "noto"]).rename_columns({"name": "query", "noto": "positive"})
    options = {"max_steps": 2, "save_steps": 1, "per_device_train_batch_size": 4, "report_to": "none", "use_cpu": True}
    options = {**options, "push_to_hub": True, "hub_model_id": NAME}
    args = CocoaContrastiveConfig(str(tmp_path / "run"), **options)
    lora = LoraConfig(r=2, target_modules=["q_proj"])
    trainer = CocoaContrastiveTrainer(str(CHECKPOINT), args, train_dataset=pairs, peft_config=lora)
    assert not hub.requests
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    commits = [path for method, path in hub.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 1
    remote = hub.repository(NAME).head().files
    assert json.loads(remote["training.json"])["stages"][-1]["steps"] == 2
    assert "model.safetensors" in remote and "optimizer.pt" not in remote


def test_a_space_is_pushed_whole_with_the_names_of_its_models(api, hub):
    push_space("org/search", model=NAME, private=True, console=Console(file=io.StringIO()))
    space = hub.repository("org/search", "space")
    files = space.head().files
    assert space.private and {"app.py", "requirements.txt", "data/NOTICE", "modeling_cocoa/saving.py"} <= set(files)
    assert b'setdefault("COCOA_MODEL", "org/cocoa-tiny")' in files["app.py"]
    head = SpaceCard(files["README.md"].decode()).data
    assert (head.sdk, head.app_file, head.models) == ("gradio", "app.py", [NAME])
    assert not [name for name in files if "__pycache__" in name or name.endswith((".pyc", ".safetensors"))]


def test_a_space_that_leaks_a_path_is_not_pushed(hub, monkeypatch):
    written = cocoa.app.space.write_space

    def write_and_add(folder, **options):
        written(folder, **options)
        (folder / "trainers" / "recipes" / "mine.yaml").write_text("image_dir: /home/someone/pictures\n")

    monkeypatch.setattr(cocoa.app.space, "write_space", write_and_add)
    with pytest.raises(FolderError, match=r"mine\.yaml, line 1: '/home/someone' looks like a path"):
        push_space("org/search", model=NAME, console=Console(file=io.StringIO()))
    assert hub.requests == []


def test_a_folder_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        push_model(tmp_path / "nowhere", NAME)
    (tmp_path / "other").mkdir()
    with pytest.raises(FolderError, match=r"There is no config\.json"):
        push(tmp_path / "other", dry_run=True)
