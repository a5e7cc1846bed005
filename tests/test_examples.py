# SPDX-License-Identifier: Apache-2.0
"""The examples run as they stand, on real pictures, and so does the code of docs/serving.md."""

from __future__ import annotations

import io
import json
import os
import re
import runpy
import shutil
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image
from safetensors.torch import load_file
from sentence_transformers import SentenceTransformer
from transformers import Qwen2_5_VLModel, Qwen2VLModel

from modeling_cocoa import CocoaTransformer
from tests.trainers.conftest import EMOJI, ROOT, run_python

EXAMPLES = ROOT / "examples"
TINY = ROOT / "checkpoints" / "cocoa-tiny"


def write_pictures(folder: Path, split: str, count: int) -> list[str]:
    """Emoji as a folder of pictures and captions."""
    folder.mkdir()
    rows = Dataset.from_parquet(str(EMOJI)).filter(lambda value: value == split, input_columns="split")
    rows = rows.select(range(count))
    lines = ["file_name,text"]
    for place, row in enumerate(rows):
        row["noto"].convert("RGB").save(folder / f"{place}.png")
        lines.append(f'{place}.png,"{row["name"]}"')
    (folder / "metadata.csv").write_text("\n".join(lines), encoding="utf-8")
    return list(rows["name"])


def test_finetuning_on_a_folder_of_pictures(tmp_path):
    """Concepts that the tiny model has never seen become findable; a second call has nothing left to train."""
    names = write_pictures(tmp_path / "pictures", "test", 120)
    script = ROOT / "examples" / "finetune_on_your_images.py"
    options = ["--model", "tiny", "--output", tmp_path / "model", "--epochs", 4, "--query", names[0]]
    printed = run_python(script, tmp_path / "pictures", *options)
    before, after = (int(number) for number in re.search(r"(\d+)% before, (\d+)% after", printed).groups())
    assert 0 <= before <= 100 and after >= before, "the checkpoint that did best is kept"
    found = [line.split("  ")[-1] for line in printed.splitlines() if re.match(r"  -?0\.\d\d  ", line)]
    model = SentenceTransformer(str(tmp_path / "model" / "final"), device="cpu")
    pictures = [Image.open(tmp_path / "pictures" / f"{place}.png") for place in range(len(names))]
    scores = model.encode(pictures) @ model.encode(names[0])
    assert found == [names[place] for place in np.argsort(-scores)[:3]]
    assert run_python(script, tmp_path / "pictures", *options).splitlines()[-3:] == printed.splitlines()[-3:]


def test_finetuning_needs_captions(tmp_path, capsys):
    with pytest.raises(SystemExit):
        run_here(EXAMPLES / "finetune_on_your_images.py", tmp_path, "--model", "tiny")
    assert f"there is no {tmp_path / 'metadata.csv'}: write one" in capsys.readouterr().err


def test_a_checkpoint_is_scored_by_mteb(tmp_path):
    """Recall@10 and nDCG@10 are those of the vectors; the result says who the model is."""
    pytest.importorskip("mteb")
    names = write_pictures(tmp_path / "pictures", "train", 60)
    folder = ROOT / "checkpoints" / "cocoa-tiny"
    options = ["--model", folder, "--pictures", tmp_path / "pictures", "--output", tmp_path / "results"]
    printed = run_python(ROOT / "examples" / "evaluate_with_mteb.py", *options, "--name", "org/cocoa-tiny")
    score = float(re.search(r"PicturesByText-\w+: ndcg_at_10 (\d+\.\d+)", printed).group(1))
    model = SentenceTransformer(str(folder), device="cpu")
    pictures = [Image.open(tmp_path / "pictures" / f"{place}.png") for place in range(60)]
    similarity = model.encode_query(names) @ model.encode_document(pictures).T
    ranks = (similarity >= similarity.diagonal()[:, None]).sum(1)
    expected = 100 * sum(1 / np.log2(rank + 1) for rank in ranks if rank <= 10) / 60
    assert score == pytest.approx(expected, abs=0.02) and score > 50
    (file,) = (tmp_path / "results").rglob("PicturesByText-*.json")
    found = json.loads(file.read_text())["scores"]["test"][0]
    assert found["recall_at_10"] == pytest.approx((ranks <= 10).mean(), abs=1e-4)
    assert "org__cocoa-tiny" in str(file)

    def measured():
        """The score now, and how many results are kept."""
        printed = run_python(ROOT / "examples" / "evaluate_with_mteb.py", *options, "--name", "org/cocoa-tiny")
        kept = list((tmp_path / "results").rglob("PicturesByText-*.json"))
        return float(re.search(r"PicturesByText-\w+: ndcg_at_10 (\d+\.\d+)", printed).group(1)), len(kept)

    table = tmp_path / "pictures" / "metadata.csv"
    captions = table.read_text(encoding="utf-8")
    texts = [line.split(",", 1)[1] for line in captions.splitlines()[1:]]
    moved = [f"{place}.png,{text}" for place, text in enumerate(texts[1:] + texts[:1])]
    table.write_text("\n".join(["file_name,text", *moved]), encoding="utf-8")
    other, kept = measured()
    assert other < score / 2 and kept == 2, "not the score of the folder as it was"
    table.write_text(captions, encoding="utf-8")
    shutil.copytree(folder, tmp_path / "model")
    settings = tmp_path / "model" / "sentence_bert_config.json"
    changed = {**json.loads(settings.read_text()), "processing_kwargs": {"image": {"do_normalize": False}}}
    settings.write_text(json.dumps(changed))
    options[1] = tmp_path / "model"
    other, kept = measured()
    assert other != score and kept == 3, "not the score of another model of the same name"


def run_here(script: Path, *options: object) -> str:
    """What an example prints that is run in this process, which has the libraries loaded."""
    printed = io.StringIO()
    with patch.object(sys, "argv", [str(script), *map(str, options)]), redirect_stdout(printed):
        runpy.run_path(str(script), run_name="__main__")
    return printed.getvalue()


def cosines(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Of unit vectors, row by row."""
    return (left * right).sum(axis=1)


def test_every_kind_of_input_is_embedded(tmp_path):
    """What is printed are the cosines of the model's own vectors; all loaders agree."""
    name = write_pictures(tmp_path / "pictures", "train", 60)[59]
    picture = tmp_path / "pictures" / "59.png"
    printed = run_python(EXAMPLES / "encode.py", picture, name)
    found = dict(re.findall(r"^(\w.*?): +(-?\d\.\d\d)$", printed, flags=re.MULTILINE))
    model = SentenceTransformer(str(TINY), device="cpu")
    text, image, both = (
        model.encode([value]) for value in (name, str(picture), {"image": str(picture), "text": name})
    )
    told = model.encode([name], prompt="Find the picture that the text describes.")
    assert found == {
        "text and picture": f"{cosines(text, image)[0]:.2f}",
        "text and both together": f"{cosines(text, both)[0]:.2f}",
        "picture and both together": f"{cosines(image, both)[0]:.2f}",
        "dict and conversation": "1.00",
        "text without and with an instruction": f"{cosines(text, told)[0]:.2f}",
        "query and document": f"{cosines(text, image)[0]:.2f}",
    }
    assert cosines(text, image)[0] > 0.3, "an emoji that the model knows is near its name"
    differences = [float(number) for number in re.findall(r"differs by (\S+) at most", printed)]
    assert len(differences) == 2 and max(differences) < 1e-5


def test_three_stages_train_and_go_on(tmp_path):
    """Each stage starts from the last one's model, and the result embeds; a second call has nothing left to train."""
    write_pictures(tmp_path / "pictures", "test", 60)
    output = tmp_path / "model"
    script = [EXAMPLES / "train_three_stages.py", tmp_path / "pictures", "--model", "tiny", "--output", output]
    printed = run_python(*script, "--max-steps", 2)
    stages = re.findall(r"^(\w+): (\d+) steps", printed, flags=re.MULTILINE)
    assert stages == [("warmup", "2"), ("bridge", "2"), ("contrastive", "2")]
    before, after = (int(number) for number in re.search(r"(\d+)% before, (\d+)% after", printed).groups())
    assert 0 <= before <= 100 and 0 <= after <= 100 and "the first ten of 6:" in printed
    folders = [TINY, output / "warmup" / "final", output / "bridge" / "final", output / "final"]
    models = [load_file(folder / "model.safetensors") for folder in folders]

    def distance(left: int, right: int) -> float:
        return sum(float((value - models[right][name]).square().sum()) for name, value in models[left].items())

    assert distance(1, 0) > 0
    assert distance(2, 1) < distance(2, 0) and distance(3, 2) < distance(3, 1), "each starts where the last one ended"
    assert SentenceTransformer(str(output / "final"), device="cpu").encode(["a cat"]).shape == (1, 192)
    written = list(output.rglob("checkpoint-2/*.safetensors"))
    times = [path.stat().st_mtime_ns for path in written]
    again, first = (
        [line for line in text.splitlines() if not line.startswith("{")]  # the trainer's own log, if it is on
        for text in (run_here(*script, "--max-steps", 2), printed)
    )
    assert again == first
    assert len(written) >= 3 and [path.stat().st_mtime_ns for path in written] == times, "nothing is trained again"
    for name, value in load_file(output / "final" / "model.safetensors").items():
        assert torch.equal(value, models[3][name])


def test_a_folder_is_searched_with_faiss(tmp_path):
    """The emoji asked for is found; later calls embed only what is new or was changed, and forget what is gone."""
    pytest.importorskip("faiss")
    names = write_pictures(tmp_path / "pictures", "train", 40)
    folder, index = tmp_path / "pictures", tmp_path / "index"
    script = EXAMPLES / "search_folder_with_faiss.py"
    wanted = names.index(next(name for name in names if "keycap" not in name))

    def search(query: object, top: int, run: Callable[..., str] = run_here) -> tuple[str, list[str]]:
        printed = run(script, folder, query, "--index", index, "--top", top)
        return printed.splitlines()[0], re.findall(r"^  -?\d\.\d\d  (.*)$", printed, flags=re.MULTILINE)

    counted, found = search(names[wanted], 3, run_python)
    assert counted == "Embedded 40 of 40 pictures; 0 were in the index."
    assert f"{wanted}.png" in found and len(found) == 3
    (folder / f"{wanted}.png").rename(folder / "moved.png")
    os.utime(folder / "0.png", (1, 1))
    (folder / "1.png").unlink()
    counted, found = search(folder / "moved.png", 100)
    assert counted == "Embedded 2 of 39 pictures; 37 were in the index."
    assert found[0] == "moved.png" and len(found) == 39
    assert set(found) == {path.name for path in folder.glob("*.png")}
    assert search(names[wanted], 100)[0] == "Embedded 0 of 39 pictures; 39 were in the index."
    assert sorted(path.name for path in index.iterdir()) == ["files.json", "vectors.faiss"]


def test_one_bad_picture_neither_stops_a_folder_nor_loses_what_was_embedded(tmp_path, capsys):
    """Every ending that Pillow opens is searched; what is left out is counted; vectors are kept as they come."""
    pytest.importorskip("faiss")
    folder, index = tmp_path / "pictures", tmp_path / "index"
    write_pictures(folder, "train", 6)
    for place, ending in enumerate(("tif", "jfif", "avif", "bmp", "webp")):
        Image.open(folder / f"{place}.png").save(folder / f"{place}.{ending}")
        (folder / f"{place}.png").unlink()
    (folder / "cut.png").write_bytes((folder / "5.png").read_bytes()[:80])
    (folder / "notes.txt").write_text("no picture")
    script = EXAMPLES / "search_folder_with_faiss.py"
    printed = run_here(script, folder, "cat", "--index", index, "--top", 10)
    assert "Left out, since Pillow does not open them as images: 1 .csv, 1 .txt." in printed
    assert "Embedded 6 of 7 pictures; 0 were in the index." in printed
    assert re.search(r"cannot be read: 1\. \S+cut\.png cannot be read as an image", printed)
    assert len(re.findall(r"^  -?\d\.\d\d  ", printed, flags=re.MULTILINE)) == 6
    with patch("modeling_cocoa.folders.CHUNK", 2), pytest.raises(KeyboardInterrupt):
        for place in range(6, 12):
            Image.new("RGB", (64, 64), (20 * place, 0, 0)).save(folder / f"{place}.png")
        run_interrupted(script, folder, "cat", "--index", index)
    kept = json.loads((index / "files.json").read_text())["files"]
    assert len(kept) == 10, "two chunks of two, beside the six"
    assert "Embedded 2 of 13 pictures; 10 were in the index." in run_here(script, folder, "cat", "--index", index)
    with pytest.raises(SystemExit):
        run_here(script, folder, "nope.png", "--index", index)
    assert "there is no image file nope.png" in capsys.readouterr().err


def run_interrupted(script: Path, *options: object) -> None:
    """An example that is stopped by Ctrl-C while it embeds its third chunk."""
    encode, calls = CocoaTransformer.encode, []

    def stopped(*arguments: Any, **options: Any) -> np.ndarray:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    with patch.object(CocoaTransformer, "encode", stopped):
        run_here(script, *options)


def test_an_index_of_another_model_is_refused(tmp_path, capsys):
    """Its vectors cannot be compared; nothing is overwritten."""
    pytest.importorskip("faiss")
    write_pictures(tmp_path / "pictures", "train", 2)
    (tmp_path / "files.json").write_text('{"model": "another", "files": []}')
    with pytest.raises(SystemExit):
        run_here(EXAMPLES / "search_folder_with_faiss.py", tmp_path / "pictures", "cat", "--index", tmp_path)
    assert "made by another model" in capsys.readouterr().err
    assert (tmp_path / "files.json").read_text() == '{"model": "another", "files": []}'


def test_several_processes_give_the_vectors_of_one(tmp_path):
    """In the order of the names, to 1e-6."""
    write_pictures(tmp_path / "pictures", "train", 30)
    output = tmp_path / "vectors.npy"
    options = ["--devices", "cpu", "cpu", "--output", output]
    printed = run_python(EXAMPLES / "encode_on_several_devices.py", tmp_path / "pictures", *options)
    assert "30 vectors by 2 processes (cpu, cpu)" in printed
    assert float(re.search(r"gives the same to (\S+)\.", printed).group(1)) < 1e-6
    names = json.loads(output.with_suffix(".json").read_text())
    expected = CocoaTransformer(TINY).encode([tmp_path / "pictures" / name for name in names])
    np.testing.assert_allclose(np.load(output, allow_pickle=False), expected, rtol=0, atol=1e-6)
    assert "1 .csv" in printed
    assert sorted(names) == sorted(path.name for path in (tmp_path / "pictures").glob("*.png"))


def test_small_vectors_find_nearly_as_much(tmp_path):
    """8 bits find what floats find; one bit finds less, and most of it again with rescoring."""
    pytest.importorskip("faiss")
    names = write_pictures(tmp_path / "pictures", "test", 120)
    printed = run_python(EXAMPLES / "small_vectors.py", tmp_path / "pictures")
    rows = re.findall(r"^(\d+ \S+(?: \w+)?) +(\d+) +(\d+) MiB +(\d+\.\d)%$", printed, flags=re.MULTILINE)
    sizes = {form: int(size) for form, size, _, _ in rows}
    recall = {form: float(share) / 100 for form, _, _, share in rows}
    assert sizes == {
        "192 float32": 768,
        "96 float32": 384,
        "192 int8": 192,
        "192 binary": 24,
        "192 binary, rescored": 24,
    }
    model = SentenceTransformer(str(TINY), device="cpu")
    pictures = model.encode([str(tmp_path / "pictures" / f"{place}.png") for place in range(120)])
    similarity = model.encode(names) @ pictures.T
    ranks = (similarity >= similarity.diagonal()[:, None]).sum(axis=1)
    assert recall["192 float32"] == pytest.approx((ranks <= 10).mean(), abs=6e-4)
    assert abs(recall["192 int8"] - recall["192 float32"]) <= 0.02
    assert 0.2 < recall["192 binary"] <= recall["192 float32"] + 0.02  # of 120 queries, two or three more by chance
    assert abs(recall["192 binary, rescored"] - recall["192 float32"]) <= 0.04
    assert 0.2 < recall["96 float32"] <= recall["192 float32"]


def causal_copy(folder: Path) -> SentenceTransformer:
    """The tiny checkpoint, read in one direction."""
    shutil.copytree(TINY, folder)
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["is_causal"] = True
    (folder / "config.json").write_text(json.dumps(config))
    return SentenceTransformer(str(folder), device="cpu")


def test_what_the_serving_page_says_of_the_folder(tmp_path):
    """The facts by which engines refuse it or get it wrong."""
    config, pooling, layout = (
        json.loads((TINY / name).read_text())
        for name in ("config.json", "1_Pooling/config.json", "sentence_bert_config.json")
    )
    assert config["text_config"]["is_causal"] is False and config["is_causal"] is False
    assert config["architectures"] == ["Qwen2VLForConditionalGeneration"] and "vision_config" in config
    assert "pooling_mode_cls_token" not in pooling and "max_seq_length" not in layout
    assert not hasattr(Qwen2VLModel, "get_text_features") and not hasattr(Qwen2_5_VLModel, "get_text_features")
    model = SentenceTransformer(str(TINY), device="cpu")
    messages = [{"role": "user", "content": [{"type": "text", "text": "a cat"}]}]
    template = model[0].processor.apply_chat_template(messages)
    assert template == "<|im_start|>user\na cat"
    assert model.tokenizer.decode(model.tokenizer(template).input_ids) == f"{template}<|im_end|>"
    names = Dataset.from_parquet(str(EMOJI))["name"][:200]
    found = cosines(model.encode(names), causal_copy(tmp_path / "causal").encode(names))
    assert f"{found.min():.2f}, {np.median(found):.2f}" == "-0.08, 0.61"
