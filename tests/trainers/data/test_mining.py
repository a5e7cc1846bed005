# SPDX-License-Identifier: Apache-2.0
"""Hard negatives: those a plain ranking finds, of pictures as of texts; nothing embedded twice, nothing mixed up."""

import numpy as np
import pytest
import yaml
from datasets import Dataset, load_dataset
from sentence_transformers import SentenceTransformer
from typer.testing import CliRunner

from cocoa.cli import app as cocoa_app
from evaluation.vectors import VectorStore
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from trainers.data.content import digest
from trainers.data.mining import embed_cells, mine_negatives
from trainers.data.rows import without_image_decoding


@pytest.fixture
def encoder(model, processor):
    return SentenceTransformer(modules=[CocoaTransformer(model, processor)])


@pytest.fixture
def pairs(emoji):
    """Names and pictures; the last two rows ask for the first picture in the same words as the first."""
    rows = emoji.select([*range(20), 0, 0])
    return rows.select_columns(["text", "image"]).rename_columns({"text": "query", "image": "positive"})


def bytes_of(dataset, column):
    return [cell["bytes"] for cell in dataset.cast(without_image_decoding(dataset.features))[column]]


@pytest.mark.parametrize(
    "options", [{}, {"range_min": 2}, {"absolute_margin": 0.01}, {"max_score": "median"}], ids=str
)
def test_negatives_are_the_closest_that_a_plain_ranking_finds(tmp_path, encoder, pairs, options):
    unique = pairs.select(range(20))
    scores = encoder.encode(list(unique["query"])) @ encoder.encode(list(unique["positive"])).T
    if "max_score" in options:
        options = {"max_score": float(np.median(scores))}
    found = mine_negatives(encoder, pairs, tmp_path, num_negatives=3, **options)
    assert found.column_names == ["query", "positive", "negative_1", "negative_2", "negative_3"]
    assert found.features["negative_3"] == pairs.features["positive"]
    own = scores.diagonal().copy()
    np.fill_diagonal(scores, -np.inf)
    if "absolute_margin" in options:
        scores[scores > own[:, None] - 0.01] = -np.inf
    scores[scores > options.get("max_score", np.inf)] = -np.inf
    skip = options.get("range_min", 0)
    expected = {}
    for row, line in enumerate(scores):
        order = [int(place) for place in np.argsort(-line, kind="stable") if line[place] > -np.inf][skip : skip + 3]
        if len(order) == 3:
            expected[unique[row]["query"]] = order
    assert list(found["query"]) == list(expected)
    pictures = bytes_of(unique, "positive")
    columns = [bytes_of(found, f"negative_{number}") for number in (1, 2, 3)]
    for place, order in enumerate(expected.values()):
        assert [column[place] for column in columns] == [pictures[index] for index in order]


def test_a_query_is_never_given_one_of_its_positives(tmp_path, encoder, emoji):
    rows = {"query": ["a", "a", "b", "c"], "positive": [str(i) for i in range(4)]}
    found = mine_negatives(encoder, Dataset.from_dict(rows), tmp_path, num_negatives=2)
    for row in found:
        if row["query"] == "a":
            assert {row["negative_1"], row["negative_2"]} == {"2", "3"}


def test_conditions_that_nothing_meets_are_an_error(tmp_path, encoder, pairs):
    with pytest.raises(ValueError, match="No pair has 2 negatives"):
        mine_negatives(encoder, pairs, tmp_path, max_score=-0.999)
    with pytest.raises(ValueError, match=r"\['query'\] are not in"):
        mine_negatives(encoder, pairs.rename_column("query", "text"), tmp_path)


def test_vectors_are_kept_and_not_taken_for_those_of_another_prompt_or_size(tmp_path, encoder, pairs, monkeypatch):
    cells = list(pairs["query"])[:20]
    calls = []
    encode = type(encoder).encode

    def counted(self, inputs, **options):
        calls.append(len(inputs))
        return encode(self, inputs, **options)

    monkeypatch.setattr(type(encoder), "encode", counted)

    def embed(cells, **options):
        options = {"title": "texts", "prompt": None, "batch_size": 8, **options}
        return embed_cells(encoder, {digest(cell): cell for cell in cells}, VectorStore(tmp_path), **options)

    vectors = embed(cells)
    np.testing.assert_allclose(vectors, encode(encoder, cells), atol=1e-5)
    np.testing.assert_array_equal(embed(cells[::-1]), vectors[::-1])
    assert calls == [20]
    embed(cells, prompt="Find.")
    embed(cells, image_size=(64, 64))
    assert calls == [20, 20, 20]
    with pytest.raises(CocoaInputError, match="^the text is empty"):
        embed(["a", " "])


def test_the_command_writes_what_a_recipe_trains_on(tmp_path, model, processor, pairs, monkeypatch):
    seen, lengths = [], set()
    encode = SentenceTransformer.encode

    def watched(self, inputs, **options):
        if isinstance(self[0], CocoaTransformer):
            seen.append((inputs, options))
            lengths.clear()
            lengths.add(self.max_seq_length)
        return encode(self, inputs, **options)

    monkeypatch.setattr(SentenceTransformer, "encode", watched)
    save_cocoa(model, processor, tmp_path / "start")
    pairs.to_parquet(str(tmp_path / "pairs.parquet"))
    recipe = {
        "output_dir": str(tmp_path / "run"),
        "model": {"model_name_or_path": str(tmp_path / "start")},
        "data": {
            "sources": {"pairs": {"path": "parquet", "data_files": str(tmp_path / "pairs.parquet")}},
            "contrastive": {"names": {}},
        },
        "stages": {"contrastive": {"max_steps": 1, "use_cpu": True, "per_device_train_batch_size": 4}},
    }
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    command = ["mine-negatives", str(tmp_path / "start"), str(path), str(tmp_path / "hard")]
    result = CliRunner().invoke(cocoa_app, command)
    assert result.exit_code == 0, result.output
    seen.clear()
    recipe["stages"]["contrastive"].update(query_prompt={"names": "Find it."}, max_length=7, image_resolution="low")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    prompted = CliRunner().invoke(cocoa_app, command)
    assert prompted.exit_code == 0, prompted.output
    assert {options["prompt"] for _, options in seen} == {"Find it.", ""}
    pictures = [cell for cells, options in seen for cell in cells if not options["prompt"]]
    assert pictures[0][0]["content"][0]["image"].size == (128, 128)
    assert lengths == {7}
    for option in ("query_prompt", "max_length", "image_resolution"):
        del recipe["stages"]["contrastive"][option]
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = CliRunner().invoke(cocoa_app, command)
    assert "names: 20 of 22 pairs now have 2 negatives." in result.output
    hard = load_dataset("parquet", data_files=str(tmp_path / "hard" / "names.parquet"), split="train")
    assert hard.column_names == ["query", "positive", "negative_1", "negative_2"]
    recipe["data"]["sources"]["pairs"]["data_files"] = str(tmp_path / "hard" / "names.parquet")
    path.write_text(yaml.safe_dump(recipe, sort_keys=False))
    result = CliRunner().invoke(cocoa_app, ["train", str(path)])
    assert result.exit_code == 0 and "The trained model is in" in result.output
    result = CliRunner().invoke(cocoa_app, ["mine-negatives", str(tmp_path / "nothing"), *command[2:]])
    assert result.exit_code == 1 and "There is no checkpoint folder" in result.output
