# SPDX-License-Identifier: Apache-2.0
"""A card says what the folder holds, what its author said, and nothing else."""

from __future__ import annotations

import json
import shutil

import huggingface_hub
import pytest
from datasets import load_dataset
from huggingface_hub import DatasetCard, ModelCard
from packaging.version import Version
from sentence_transformers import SentenceTransformer

from evaluation.digests import weights_digest
from evaluation.mmeb.scores import Scores, TaskScore
from evaluation.mmeb.tasks import EMOJI_TASKS
from hub_cards import CocoaModelCardData, write_card
from hub_cards.card_data import model_index, stage_datasets, stage_table
from hub_cards.loading_checks import find_loading_problems
from hub_cards.results import add_result, read_results
from hub_cards.training_record import StageRecord, write_records
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.trainers.conftest import ROOT

CHECKPOINT = ROOT / "checkpoints" / "cocoa-tiny"
MADE = ("README.md", "card.yaml", "evaluation", "reconstruction.png", "training.json")
EMISSIONS = {"emissions": 10.0, "energy_consumed": 0.02, "source": "codecarbon", "hardware_used": "a GPU"}


@pytest.fixture
def folder(tmp_path):
    """A copy of the tiny checkpoint without a card."""
    copy = shutil.copytree(CHECKPOINT, tmp_path / "model", ignore=shutil.ignore_patterns(*MADE))
    return copy


def card_of(folder) -> ModelCard:
    """The card, read as the Hub's client reads it."""
    return ModelCard.load(folder / "README.md")


def scores_of(folder, path, **settings):
    """Scores of all emoji tasks, made up, as a file."""
    tasks = [
        TaskScore(
            task.name, task.kind, task.in_domain, 50.0 + place, 50.0 + place, 0, 60, 70, 55, 58, 100, 200, 300, 0
        )
        for place, task in enumerate(EMOJI_TASKS)
    ]
    settings = {"weights": weights_digest(folder), **settings}
    scores = Scores("Emoji in MMEB-V1's layout", "cocoa-tiny", len(tasks), settings, tasks)
    path.write_text(json.dumps(scores.to_dict()))
    return scores


def test_nothing_is_said_that_is_not_known(folder):
    write_card(folder)
    card = card_of(folder)
    head = {name: value for name, value in card.data.to_dict().items() if value is not None}
    assert set(head) == {"library_name", "pipeline_tag", "tags"} and "qwen2_vl" in head["tags"]
    assert "2,779,776, float32" in card.text and "192 dimensions" in card.text and "1,280 tokens" in card.text
    for absent in ("## Training", "## Results", "## Reconstructions", "None", "codecarbon"):
        assert absent not in card.text
    assert "No evaluation is recorded here" in card.text


def test_what_the_author_said_is_kept_when_the_card_is_written_again(folder):
    data = CocoaModelCardData(
        license="apache-2.0",
        language=["en", "de"],
        model_name="Birds",
        base_model="Qwen/Qwen2-VL-2B-Instruct",
        train_datasets=[{"name": "Birds of Europe", "id": "org/birds", "license": "cc-by-4.0"}],
        notes="## What it is not for\n\nBats.",
    )
    write_card(folder, data)
    first = card_of(folder)
    assert first.data.license == "apache-2.0" and first.data.language == ["en", "de"]
    assert first.data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and first.data.datasets == ["org/birds"]
    assert "- Birds of Europe: cc-by-4.0" in first.text and "made from `Qwen/Qwen2-VL-2B-Instruct`" in first.text
    write_card(folder)
    again = card_of(folder)
    assert again.data.to_dict() == first.data.to_dict()
    assert again.text.count("Bats.") == 1 and "# Birds\n" in again.text
    write_card(folder, CocoaModelCardData(license="mit"))
    changed = card_of(folder)
    assert changed.data.license == "mit" and changed.data.language == ["en", "de"] and "Bats." in changed.text


def test_the_author_s_list_of_data_with_licences_is_kept(folder):
    data = CocoaModelCardData(
        train_datasets=[{"name": "Drawings", "license": "CC-BY 4.0", "url": "https://example.org"}]
    )
    write_card(folder, data)
    text = card_of(folder).text
    assert "- [Drawings](https://example.org): CC-BY 4.0" in text
    write_card(folder)
    assert "- [Drawings](https://example.org): CC-BY 4.0" in card_of(folder).text


def test_what_somebody_wrote_is_not_lost(folder):
    (folder / "README.md").write_text("# My own words\n")
    with pytest.raises(ValueError, match="would be lost: move its text into the `notes` of card.yaml"):
        write_card(folder)
    assert (folder / "README.md").read_text() == "# My own words\n"
    (folder / "README.md").unlink()
    (folder / "card.yaml").write_text("licence: apache-2.0\n")
    with pytest.raises(ValueError, match=r"card\.yaml does not hold the fields .*'license'"):
        write_card(folder)


def test_results_are_those_of_these_weights(folder, tmp_path):
    scores = scores_of(folder, tmp_path / "scores.json")
    add_result(folder, tmp_path / "scores.json")
    write_card(folder)
    card = card_of(folder)
    results = {result.metric_name: result.metric_value for result in card.data.eval_results}
    assert results["Precision@1, Overall"] == pytest.approx(scores.means()["overall"], abs=0.005)
    assert len(results) == 7 and card.data.model_name
    assert f"| {EMOJI_TASKS[0].name} |" in card.text and "](evaluation/emoji-in-mmeb-v1-s-layout.png)" in card.text
    assert (folder / "evaluation" / "emoji-in-mmeb-v1-s-layout.png").read_bytes().startswith(b"\x89PNG")
    assert read_results(folder) == [scores] and "No evaluation" not in card.text
    scores_of(folder, tmp_path / "other.json", weights="0" * 64)
    with pytest.raises(ValueError, match="measured with other weights"):
        add_result(folder, tmp_path / "other.json")
    with pytest.raises(FileNotFoundError, match="nowhere.json"):
        add_result(folder, tmp_path / "nowhere.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no scores of `cocoa eval`"):
        add_result(folder, tmp_path / "other.json")
    assert read_results(folder) == [scores]


def test_a_card_has_no_results_of_other_weights(folder, tmp_path):
    scores_of(folder, tmp_path / "scores.json")
    add_result(folder, tmp_path / "scores.json")
    write_card(folder)
    before = card_of(folder).content
    model = CocoaTransformer(folder)
    model.model.language_model.norm.weight.data += 1
    save_cocoa(model.model, model.processor, folder)
    with pytest.raises(ValueError, match=r"layout\.json was measured with other weights than those in the folder"):
        write_card(folder)
    assert card_of(folder).content == before


def test_a_result_names_the_data_that_it_is_of(folder, tmp_path):
    tasks = [TaskScore("VOC2007", "classification", True, 50.0, 50.0, 0, 60, 70, 55, 58, 100, 200, 300, 0)]
    for source, named in (
        ("ziyjiang/MMEB_Test_Instruct", "ziyjiang/MMEB_Test_Instruct"),
        ("data/mmeb", "TIGER-Lab/MMEB-eval"),
    ):
        ((result,),) = (
            index["results"]
            for index in model_index("m", [Scores("MMEB-V1", "m", 1, {"data": {"source": source}}, tasks)])
        )
        assert result["dataset"]["type"] == named


def test_vectors_that_the_folder_shortens_are_said(folder):
    assert "192 dimensions, normalized; compared" in write_card(folder).read_text()
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"truncate_dim": 64}))
    assert (
        "64 dimensions, the first of 192, normalized with `normalize_embeddings=True`"
        in write_card(folder).read_text()
    )
    assert find_loading_problems(folder) == []


def test_a_part_of_a_benchmark_is_no_score_of_it(folder, tmp_path):
    scores_of(folder, tmp_path / "scores.json", limit=10)
    add_result(folder, tmp_path / "scores.json")
    write_card(folder)
    card = card_of(folder)
    assert not card.data.eval_results and "partial" in card.text


def test_emissions_are_of_all_stages_or_left_out(folder):
    measured = StageRecord("bridge", emissions=EMISSIONS)
    write_records(folder, [measured, StageRecord("contrastive")])
    write_card(folder)
    assert "codecarbon" not in card_of(folder).content
    write_records(folder, [measured, StageRecord("contrastive", emissions=EMISSIONS)])
    write_card(folder)
    card = card_of(folder)
    assert card.data.co2_eq_emissions["emissions"] == 20 and "0.04 kWh, 0.02 kg of CO2" in card.text


def test_the_model_that_training_began_with_is_the_first_stage_s(folder):
    write_records(folder, [StageRecord("warmup", base_model="Qwen/Qwen2-VL-2B-Instruct", base_revision="a" * 40)])
    write_card(folder)
    card = card_of(folder)
    assert card.data.base_model == "Qwen/Qwen2-VL-2B-Instruct" and "(at `aaaaaaaaaa`)" in card.text


def test_tables_stay_whole_whatever_is_in_them():
    table = stage_table(
        [StageRecord("bridge", {"prompts": {"query": "a | b"}, "prompt": "a\nb"}), StageRecord("contrastive")]
    )
    assert all(line.replace("\\|", "").count("|") == 4 for line in table.splitlines())


def test_a_card_names_an_entry_once_and_leaves_out_measures_by_direction():
    entries = [{"name": name, "rows": 3} for name in ("names", "names_2", "names_3", "words")]
    record = StageRecord("contrastive", datasets=[*entries, {"name": "words_2", "rows": 4}])
    expected = "names (3 rows, 3 variants), words (3 rows), words_2 (4 rows)"
    assert stage_datasets([record]) == [("contrastive", expected)]
    table = stage_table(
        [StageRecord("bridge", losses={"loss": 2.0, "text_image_to_text": 3.0}, evaluation={"loss": 4})]
    )
    assert "| loss, last logged | 2 |" in table and "| loss, evaluated | 4 |" in table and "_to_" not in table


def test_of_measures_of_retrieval_a_card_has_the_one_that_chose_the_checkpoint():
    evaluation = {"loss": 1.0, "birds_cosine_recall@1": 0.5, "birds_cosine_ndcg@10": 0.6, "sequential_score": 0.6}
    record = StageRecord("contrastive", evaluation=evaluation)
    assert "sequential_score, evaluated" in stage_table([record]) and "cosine_" not in stage_table([record])
    record.settings["metric_for_best_model"] = "eval_birds_cosine_recall@1"
    table = stage_table([record])
    assert "| birds_cosine_recall@1, evaluated | 0.5 |" in table and "ndcg" not in table


def test_stages_of_the_base_model_are_told_from_those_of_the_model():
    data = [{"name": "birds"}]
    stages = {name: StageRecord(name, datasets=data) for name in ("warmup", "bridge", "contrastive")}
    for own, header in (
        (("contrastive",), "base model's warm-up | base model's EOS bridge | base model's contrastive | contrastive"),
        (("bridge",), "base model's warm-up | base model's EOS bridge | base model's contrastive | EOS bridge"),
        ((), "warm-up | EOS bridge | contrastive"),
    ):
        records = [*stages.values(), *(stages[name] for name in own)]
        assert stage_table(records).splitlines()[0] == f"|  | {header} |"
        assert [title for title, _ in stage_datasets(records)] == header.split(" | ")


def test_notes_have_a_heading(folder):
    for notes, text in (("Only birds.", "\n## Notes\n\nOnly birds.\n"), ("# Birds\n\nOnly.", "\n# Birds\n\nOnly.\n")):
        write_card(folder, CocoaModelCardData(notes=notes))
        card = card_of(folder).text
        assert text in card and card.count("## Notes") == text.count("## Notes")


def test_a_model_with_prompts_is_used_with_them(folder):
    assert "prompt_name" not in write_card(folder).read_text()
    path = folder / "config_sentence_transformers.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"prompts": {"query": "Find.", "document": "Read."}}))
    assert 'model.encode(["cat.png", {"image": "dog.png", "text": "a dog"}, "rain"], prompt_name="document")' in (
        write_card(folder).read_text()
    )


def test_sentence_transformers_writes_it_at_every_save(folder, tmp_path):
    data = CocoaModelCardData(license="apache-2.0", model_name="Birds")
    model = SentenceTransformer(modules=[CocoaTransformer(folder)], model_card_data=data, device="cpu")
    model.save_pretrained(str(tmp_path / "theirs"))
    save_cocoa(model, None, tmp_path / "ours")
    for saved in ("theirs", "ours"):
        card = card_of(tmp_path / saved)
        assert card.data.license == "apache-2.0" and "# Birds\n" in card.text, saved
    assert "trust_remote_code=True)\nqueries" in card_of(tmp_path / "theirs").text, "which names our module"


# Older ones ask the Hub itself, wherever they are told that it is.
validates_on_loopback = pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2.2"), reason="needs huggingface_hub 2.2 or newer"
)


@validates_on_loopback
def test_the_emoji_set_s_card_is_valid_and_true(api):
    card = DatasetCard.load(ROOT / "data" / "README.md")
    card.validate()
    (config,) = card.data.configs
    rows = load_dataset(str(ROOT / "data"), config["config_name"], split=config["data_files"][0]["split"])
    assert f"{len(rows):,} emoji" in card.text and (ROOT / "data" / card.data.license_link).is_file()
    named = {
        name for line in card.text.splitlines() if line.startswith("| ") for name in line.split("|")[1].split(",")
    }
    assert set(rows.column_names) <= {name.strip() for name in named}


@validates_on_loopback
def test_the_hub_s_validator_takes_the_card_of_the_tiny_checkpoint(api, hub):
    card = ModelCard.load(CHECKPOINT / "README.md")
    card.validate()
    assert ("POST", "/api/validate-yaml") in hub.requests
