# SPDX-License-Identifier: Apache-2.0
"""A recipe's data: sources, entries, texts made of columns, variants, streams."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset, IterableDataset

from trainers.data.datasets import ReconstructionDataset
from trainers.recipes.recipe_data import (
    assemble,
    column_texts,
    contrastive_data,
    read_source,
    reconstruction_data,
    select_rows,
)

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Twelve rows, of which `read` makes a recipe's source."""
    return Dataset.from_parquet(str(ROOT / "data" / "emoji.parquet")).select(range(12))


@pytest.fixture(scope="module")
def read(source, tmp_path_factory):
    """What a section's entries become, of the twelve rows."""
    path = tmp_path_factory.mktemp("rows") / "rows.parquet"
    source.to_parquet(str(path))

    def read(section, entries, seed=0, evaluation=False, **options):
        data = {"sources": {"rows": {"path": "parquet", "data_files": "rows", **options}}, section: entries}
        make = {"reconstruction": reconstruction_data, "contrastive": contrastive_data}[section]
        return make(data, lambda name: path, seed, evaluation=evaluation)

    return read


def test_rows_are_chosen_by_columns(source):
    chosen = select_rows(source, {"split": "train", "name": [source["name"][0], source["name"][2]]})
    assert chosen["name"] == [source["name"][0]]
    with pytest.raises(ValueError, match="no column .'colour'.*'keywords'"):
        select_rows(source, {"colour": "red"})
    with pytest.raises(ValueError, match="No row of the data has"):
        select_rows(source, {"split": "nowhere"})


def test_texts_are_columns_or_made_of_columns(source):
    assert column_texts(source, "name") == list(source["name"])
    first = source[4]
    assert column_texts(source, "{name}: {keywords}")[4] == f"{first['name']}: {', '.join(first['keywords'])}"
    with pytest.raises(ValueError, match="no column .'caption'"):
        column_texts(source, "{caption}")


def test_a_text_that_lacks_a_column_is_no_text():
    rows = Dataset.from_dict({"name": ["cat", None], "words": [None, ["a"]]})
    assert column_texts(rows, "name") == ["cat", None]
    assert column_texts(rows, "{name}: {words}") == [None, None]


def test_samples_of_words_are_drawn_anew_for_every_variant_and_the_same_in_every_run(source, read):
    words = {"words": {"query": "{keywords:sample}", "positive": "noto", "variants": 4}}
    pairs = read("contrastive", words, seed=1)
    assert list(pairs) == ["words", "words_2", "words_3", "words_4"]
    assert pairs["words_3"][5]["positive"].tobytes() == source[5]["noto"].tobytes()
    for row, keywords in enumerate(source["keywords"]):
        samples = [pairs[name][row]["query"].split(", ") for name in pairs]
        assert all(len(set(sample)) == len(sample) and set(sample) <= set(keywords) for sample in samples)
    queries = {name: list(part["query"]) for name, part in pairs.items()}
    assert len(set(map(tuple, queries.values()))) == 4
    assert {name: list(part["query"]) for name, part in read("contrastive", words, seed=1).items()} == queries
    assert list(read("contrastive", words, seed=2)["words"]["query"]) != queries["words"]
    entry = {"image": "noto", "text": "{name}: {keywords:sample}", "variants": 3}
    rows = read("reconstruction", {"all": entry})["all"]
    assert len(rows) == 36 and rows[13]["text"].startswith(f"{source[1]['name']}: ")
    assert rows[13]["image"].tobytes() == source[1]["noto"].tobytes()
    assert list(read("contrastive", words, evaluation=True, eval={})) == ["words"]
    with pytest.raises(ValueError, match="{column:sample}; got {column:first}"):
        column_texts(source, "{keywords:first}")


def test_augmented_variants_change_pictures_and_nothing_else(source, read):
    entry = {"query": "noto", "positive": "name", "variants": 3, "augment": True}
    pairs = read("contrastive", {"pairs": entry}, seed=1)
    pictures = [[row["query"].convert("RGB").tobytes() for row in part] for part in pairs.values()]
    assert pictures[0] == [picture.convert("RGB").tobytes() for picture in source["noto"]]
    assert all(len(set(versions)) == 3 for versions in zip(*pictures, strict=True))
    assert all(list(part["positive"]) == list(source["name"]) for part in pairs.values())
    assert all(row["query"].size == (64, 64) for row in pairs["pairs_3"])
    again = read("contrastive", {"pairs": entry}, seed=1)["pairs_2"]
    assert [row["query"].convert("RGB").tobytes() for row in again] == pictures[1]


def test_datasets_keep_pictures_and_rows_together(source, read):
    rows = read("reconstruction", {"both": {"image": "noto", "text": "name"}, "other": {"image": "twemoji"}})
    assert rows["both"][3]["text"] == source[3]["name"] and rows["other"].column_names == ["image"]
    assert rows["other"][3]["image"].tobytes() == source[3]["twemoji"].tobytes()
    pairs = read("contrastive", {"pairs": {"query": "name", "positive": "noto"}})["pairs"]
    assert pairs.column_names == ["query", "positive"]
    assert pairs[5]["positive"].tobytes() == source[5]["noto"].tobytes()
    assert assemble(source, {"text": "name"}).column_names == ["text"]


def test_a_stream_gives_the_same_rows_as_it_is_read(source, read):
    entries = {"rows": {"image": "noto", "text": "{name}: {keywords}"}}
    where = {"split": ["train", "test"]}
    whole = read("reconstruction", entries, where=where)["rows"]
    stream = read("reconstruction", entries, where=where, streaming=True)["rows"]
    assert isinstance(stream, IterableDataset) and stream.column_names == whole.column_names
    for row, expected in zip(stream, whole, strict=True):
        assert row["text"] == expected["text"] and row["image"].tobytes() == expected["image"].tobytes()
    with pytest.raises(ValueError, match="contrastive pairs is streamed"):
        read("contrastive", {"pairs": {"query": "name", "positive": "noto"}}, streaming=True)


def test_a_source_without_rows_to_evaluate_on_gives_none(source, read):
    entries = {"rows": {"image": "noto"}}
    assert read("reconstruction", entries, evaluation=True) == {}
    chosen = read("reconstruction", entries, evaluation=True, eval={"where": {"name": source["name"][7]}})["rows"]
    assert len(chosen) == 1 and chosen[0]["image"].tobytes() == source[7]["noto"].tobytes()


def test_conversations_documents_and_paths_stay_as_they_are(tmp_path):
    rows = {
        "turns": [[{"role": "user", "content": "a cat"}]],
        "words": [["a", None]],
        "files": [[None, "cat.png"]],
        "file": ["dog.png"],
    }
    kept = assemble(
        Dataset.from_dict(rows), {"messages": "turns", "texts": "words", "images": "files", "image": "file"}
    )
    expected = {"messages": rows["turns"][0], "texts": ["a", None], "images": [None, "cat.png"], "image": "dog.png"}
    assert kept[0] == expected


@pytest.mark.parametrize(
    ("section", "entries", "options", "message"),
    [
        ("contrastive", {"a": {"query": "name", "variants": 0}}, {}, "variants must be a whole number.*a has 0"),
        ("contrastive", {"a": {"query": "noto", "augment": True}}, {}, "augment leaves the first variant.*give a"),
        (
            "contrastive",
            {"a": {"query": "name", "positive": "name_de", "variants": 2, "augment": True}},
            {},
            "augment changes columns of images, and there is none among",
        ),
        ("contrastive", {"a": {"query": "noto", "positive": "name"}}, {"name": []}, "lists no subset"),
        ("contrastive", {"a": {"source": "other", "query": "name"}}, {}, "'other'; the sources are .'rows'"),
        ("contrastive", {"a": {"query": "caption"}}, {}, "no column .'caption'"),
        ("reconstruction", {"a": {"caption": "name"}}, {}, "reconstruction a: unknown column 'caption'.*'messages'"),
        ("reconstruction", [{"image": "noto"}], {}, "must give its entries by name"),
        ("reconstruction", {}, {}, "must give its entries by name"),
        ("reconstruction", {"a": {"image": "noto"}}, {"layout": "laion"}, "one of .'mmeb_train'.*'laion'"),
        ("reconstruction", {"a": {"image": "noto"}}, {"layout": "mmeb_train"}, "needs image_dir"),
        ("reconstruction", {"a": {"image": "noto"}}, {"data_file": "x"}, "the source .*cannot be read: .*data_file"),
        ("reconstruction", {"a": {"image": "noto", "variants": 2}}, {"streaming": True}, "streamed.*no variants"),
    ],
)
def test_what_is_wrong_with_the_data_is_said(read, section, entries, options, message):
    with pytest.raises(ValueError, match=message):
        read(section, entries, **options)


def test_pre_training_reads_the_pairs_of_contrastive_training(tmp_path):
    """Without entries of its own, or by an entry without columns; negatives come along and are not read."""
    row = {"query": "a", "positive": "b", "negative_1": "c"}
    Dataset.from_list([row] * 4).to_parquet(str(tmp_path / "pairs.parquet"))
    source = {"pairs": {"path": "parquet", "data_files": "pairs.parquet"}}
    for sections in ({"contrastive": {"x": {}}}, {"reconstruction": {"x": {}}}):
        data = {"sources": source, **sections}
        (name,), (rows,) = zip(*reconstruction_data(data, lambda name: tmp_path / name).items(), strict=True)
        assert name == "x" and rows[0] == row
        assert set(ReconstructionDataset(rows, 0)[0]) == {"query", "positive", "index", "seed"}


def test_a_folder_that_is_not_there_is_named_with_the_nearest(tmp_path):
    (tmp_path / "my_pictures").mkdir()
    source = {"path": "imagefolder", "data_dir": str(tmp_path / "my_picture")}
    with pytest.raises(FileNotFoundError, match=r"the source .*imagefolder.* \(did you mean my_pictures\?\)"):
        read_source(source, Path)
