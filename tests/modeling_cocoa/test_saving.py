# SPDX-License-Identifier: Apache-2.0
"""One folder, two loaders: the same vectors, also after saving again, and nothing half-written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Dense, Normalize, Pooling
from transformers import AutoModel, AutoProcessor

from modeling_cocoa.auto import load_backbone
from modeling_cocoa.processing_cocoa import CocoaProcessor
from modeling_cocoa.saving import mend_cocoa, repair_cocoa, save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.conftest import CLASSES, VISION, sharpen
from trainers.recipes.from_scratch import build_model
from trainers.recipes.tiny_processor import processor_around

TEXT_CONFIG = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION_CONFIGS = {kind: {"depth": 2, "num_heads": 2, **config} for kind, config in VISION.items()}
PROMPTS = {"query": "Find the picture: ", "document": "", "sort": "Put in a drawer"}
LONG = "nerd face with glasses and a very long story about apples " * 20


def random_model(processor, model_type):
    return sharpen(build_model(processor, TEXT_CONFIG, VISION_CONFIGS[model_type], model_type=model_type, seed=2))


@pytest.fixture
def processor(processor, model_type):
    """Of the backbone's own kind."""
    return of_kind(processor, model_type)


def of_kind(processor, model_type):
    sizes = processor.image_processor.size
    return processor_around(
        processor.tokenizer,
        patch_size=processor.image_processor.patch_size,
        min_pixels=sizes["shortest_edge"],
        max_pixels=sizes["longest_edge"],
        max_length=processor.max_length,
        model_type=model_type,
    )


@pytest.fixture
def cocoa(processor, model_type):
    return random_model(processor, model_type)


@pytest.fixture
def folder(cocoa, processor, tmp_path) -> Path:
    save_cocoa(cocoa, processor, tmp_path / "cocoa", prompts=PROMPTS)
    return tmp_path / "cocoa"


@pytest.fixture
def inputs(image):
    """What both loaders take in one call."""
    return [
        "a red apple",
        image,
        {"text": "a red apple", "image": image},
        {"image": image, "text": "a red apple"},
        {"image": [image, image], "text": "twice"},
        LONG,
        "<|im_end|> is not the end, <|image_pad|> is no picture",
        {"video": np.stack([np.asarray(image)] * 4), "text": "moving"},
    ]


def loaders(folder):
    """Stock, with remote code, and our own module."""
    return {
        "stock": SentenceTransformer(str(folder), device="cpu"),
        "remote": SentenceTransformer(str(folder), device="cpu", trust_remote_code=True),
        "ours": SentenceTransformer(modules=[CocoaTransformer(folder)], prompts=PROMPTS, device="cpu"),
    }


def remote(folder, **kwargs):
    return SentenceTransformer(str(folder), device="cpu", trust_remote_code=True, **kwargs)


def assert_close(actual, expected, name=""):
    np.testing.assert_allclose(actual, expected, atol=1e-5, rtol=0, err_msg=name)


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_all_loaders_give_the_vectors_of_the_model(cocoa, processor, tmp_path, inputs, model_type, padding_side):
    processor.tokenizer.padding_side = padding_side
    save_cocoa(cocoa, processor, tmp_path / "cocoa", prompts=PROMPTS)
    opened = loaders(tmp_path / "cocoa")
    assert type(opened["stock"][0].model) is CLASSES[model_type][2]
    remote = type(opened["remote"][0].model)
    assert remote.__name__ == CLASSES[model_type][1].__name__ and remote.__module__.startswith("transformers_modules.")
    with torch.no_grad():
        alone = [processor([item]) for item in inputs]
        expected = torch.cat(
            [cocoa(**{k: v for k, v in one.items() if k[:4] != "num_"}).pooler_output for one in alone]
        ).numpy()
    for name, model in opened.items():
        vectors = model.encode(inputs)
        assert_close(vectors, expected, name)
        for index in (0, 1, 3, 5, 7):
            assert_close(model.encode([inputs[index]])[0], expected[index], name)
    assert_close(np.linalg.norm(expected, axis=-1), np.ones(len(inputs)))
    assert np.abs(expected[2] - expected[3]).max() < 1e-6, "the order of a dict's keys says nothing"
    assert np.abs(expected[0] - expected[1]).max() > 1e-2, "and yet the inputs differ"


def test_prompts_and_truncation_are_the_same_through_every_loader(folder, inputs):
    opened = loaders(folder)
    stock = opened.pop("stock")
    assert np.abs(stock.encode_query(inputs) - stock.encode(inputs)).max() > 1e-3
    for model in opened.values():
        assert model.prompts == stock.prompts
        assert_close(model.encode_query(inputs), stock.encode_query(inputs))
        assert_close(model.encode_document(inputs), stock.encode_document(inputs))
        assert_close(model.encode(inputs, prompt_name="sort"), stock.encode(inputs, prompt_name="sort"))
        for normalize in (False, True):
            options = {"truncate_dim": 16, "normalize_embeddings": normalize}
            assert_close(model.encode(inputs, **options), stock.encode(inputs, **options))
    texts = ["a red apple", LONG]
    for model in (stock, *opened.values()):
        model.max_seq_length = 12
    for model in opened.values():
        assert_close(model.encode(texts), stock.encode(texts))


def test_a_trained_model_is_what_is_saved(folder, processor, tmp_path, inputs):
    model = SentenceTransformer(modules=[CocoaTransformer(folder)], prompts=PROMPTS, device="cpu")
    before = model.encode(inputs)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    features = model.preprocess(["a red apple", "a nerd face"])
    vectors = model(features)["sentence_embedding"]
    (vectors[0] @ vectors[1]).backward()
    optimizer.step()
    save_cocoa(model, None, tmp_path / "trained")
    trained = model.encode(inputs)
    assert np.abs(trained - before).max() > 1e-3
    for name, opened in loaders(tmp_path / "trained").items():
        assert_close(opened.encode(inputs), trained, name)
        assert opened.prompts == PROMPTS


def test_the_folder_is_complete_and_holds_nothing_else(folder, model_type):
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    code = {f"modeling_cocoa_{kind}.py" for kind in CLASSES} & names
    assert code == {f"modeling_cocoa_{model_type}.py"}
    assert {"modeling_cocoa.py", "attention.py", "pooling.py", "configuration_cocoa.py"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt", ".pth", ".pkl", ".pickle", ".tmp"))]
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == PROMPTS
    assert set(settings["requirements"]) == {"transformers", "sentence-transformers"}
    pooling = json.loads((folder / "1_Pooling" / "config.json").read_text())
    assert pooling["embedding_dimension"] == 64, pooling
    text = "".join(path.read_text() for path in folder.rglob("*") if path.suffix in (".json", ".jinja", ".md", ".py"))
    assert str(folder.parent) not in text and "/tmp" not in text, "no path of the machine that saved it"


def names_in(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("saves_processor", ["with the model", "itself"])
def test_a_backbone_saves_the_folder_that_save_cocoa_does(cocoa, processor, folder, tmp_path, inputs, saves_processor):
    own = tmp_path / "own"
    if saves_processor == "itself":
        cocoa.save_pretrained(own)
        processor.save_pretrained(own)
    else:
        cocoa.save_pretrained(own, processor=processor)
    assert names_in(own) == names_in(folder) - {"README.md"} and repair_cocoa(own) == []
    expected = SentenceTransformer(str(folder), device="cpu").encode(inputs)
    auto = AutoModel.from_pretrained(own, trust_remote_code=True)
    for name, value in cocoa.state_dict().items():
        assert torch.equal(auto.state_dict()[name], value), name
    for name, model in loaders(own).items():
        assert_close(model.encode(inputs), expected, name)


def test_a_backbone_saved_again_keeps_the_prompts(cocoa, processor, folder, tmp_path):
    before = {name: (folder / name).read_bytes() for name in names_in(folder)}
    cocoa.save_pretrained(folder)
    assert names_in(folder) == set(before)
    settings = json.loads((folder / "config_sentence_transformers.json").read_text())
    assert settings["prompts"] == PROMPTS and (folder / "README.md").read_bytes() == before["README.md"]
    model_type = cocoa.config.model_type
    wider = build_model(
        processor, {**TEXT_CONFIG, "hidden_size": 32}, VISION_CONFIGS[model_type], model_type=model_type
    )
    wider.save_pretrained(folder)
    assert SentenceTransformer(str(folder), device="cpu").get_embedding_dimension() == 32


def test_the_files_around_the_model_are_those_of_sentence_transformers(folder, tmp_path):
    """Those that a model has which it loaded, saved again by sentence-transformers itself."""
    SentenceTransformer(str(folder), device="cpu").save_pretrained(str(tmp_path / "theirs"))
    for name in ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json", "2_Normalize/config.json"):
        assert json.loads((tmp_path / "theirs" / name).read_text()) == json.loads((folder / name).read_text()), name
    ours, theirs = (
        json.loads((place / "config_sentence_transformers.json").read_text())
        for place in (folder, tmp_path / "theirs")
    )
    for settings in (ours, theirs):
        settings.pop("__version__")
    assert ours == {**theirs, "requirements": ours["requirements"]}


def test_a_processor_of_another_model_is_refused(cocoa, processor, tmp_path):
    stock = AutoProcessor.from_pretrained(save_unprepared(processor, tmp_path / "stock"))
    with pytest.raises(ValueError, match=r"closes inputs with \[\], and the model pools EOS token"):
        cocoa.save_pretrained(tmp_path / "x", processor=stock)
    assert not (tmp_path / "x").exists()


def save_unprepared(processor, folder) -> Path:
    """The files of a processor whose tokenizer closes no input, as a generative checkpoint has it."""
    processor.save_pretrained(folder)
    file = folder / "tokenizer.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "post_processor": None}))
    return folder


NAME, OTHERS = "org/cocoa-small", {"notes.txt", ".gitattributes"}


@pytest.mark.parametrize("size", ["1GB", "50KB"], ids=["whole", "sharded"])
def test_what_save_pretrained_pushes_is_the_folder_that_it_writes(
    api, hub, cocoa, processor, tmp_path, inputs, size, model_type
):
    if model_type == "qwen2_vl":
        api.create_repo(NAME)
        api.upload_file(path_or_fileobj=b"old", path_in_repo="model.safetensors", repo_id=NAME)
        api.upload_file(path_or_fileobj=b"theirs", path_in_repo="notes.txt", repo_id=NAME)
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "optimizer.pt").write_bytes(b"state")
    options = {"push_to_hub": True, "repo_id": NAME, "private": True, "commit_message": "small"}
    cocoa.save_pretrained(tmp_path / "own", processor=processor, max_shard_size=size, **options)
    remote = {name: value for name, value in hub.repository(NAME).head().files.items() if name not in OTHERS}
    written = names_in(tmp_path / "own") - {"optimizer.pt"}
    assert remote == {name: (tmp_path / "own" / name).read_bytes() for name in written}
    assert json.loads(remote["config.json"])["architectures"] == [CLASSES[model_type][3].__name__]
    expected = SentenceTransformer(modules=[CocoaTransformer(cocoa, processor)], device="cpu").encode(inputs)
    for name, model in loaders(NAME).items():
        assert_close(model.encode(inputs), expected, name)
    assert type(AutoModel.from_pretrained(NAME, trust_remote_code=True)).__name__ == type(cocoa).__name__
    assert hub.unknown == []


@pytest.mark.parametrize(("name", "value"), [("image_mean", [0.1, 0.1, 0.1]), ("patch_size", 16)])
def test_a_processor_that_reads_images_otherwise_is_refused(folder, cocoa, processor, tmp_path, name, value):
    """Stock Qwen2-VL's defaults in a folder of Qwen3-VL, say: vectors of another image, without a word."""
    path = folder / "processor_config.json"
    settings = json.loads(path.read_text())
    settings["image_processor"][name] = value
    path.write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=f"has {name}=.*{type(cocoa).__name__} needs"):
        CocoaTransformer(folder)
    setattr(processor.image_processor, name, value)
    with pytest.raises(ValueError, match=f"has {name}=.*{type(cocoa).__name__} needs"):
        save_cocoa(cocoa, processor, tmp_path / "again")


def test_versions_that_would_give_other_vectors_are_refused(folder):
    settings = folder / "config_sentence_transformers.json"
    content = json.loads(settings.read_text())
    assert content["requirements"]["transformers"]["specifier"].startswith(">=5.21")
    content["requirements"]["transformers"]["specifier"] = ">=99"
    settings.write_text(json.dumps(content))
    with pytest.raises(ImportError, match=r"transformers>=99.*lying on their side"):
        SentenceTransformer(str(folder), device="cpu")


ISOLATED = """
import sys
import numpy as np
try:
    import modeling_cocoa
except ImportError:
    pass
else:
    raise SystemExit("the package is there: this process shows nothing")
from sentence_transformers import SentenceTransformer
from transformers import AutoModel

items = ["a red apple", {"text": "a nerd face", "image": sys.argv[1]}]
for folder in sys.argv[2:]:
    model = SentenceTransformer(folder, device="cpu", trust_remote_code=True)
    for again in ("second", "third"):
        model.save_pretrained(f"{folder}-{again}")
        model = SentenceTransformer(f"{folder}-{again}", device="cpu", trust_remote_code=True)
    assert type(model[0]).__name__ == ("CocoaTransformer" if "cocoa" in folder else "Transformer"), model
    auto = AutoModel.from_pretrained(folder, trust_remote_code=True)
    assert type(auto).__name__ == type(model.transformers_model).__name__, (auto, model)
    assert type(auto).__name__.startswith("Cocoa"), auto
    np.save(f"{folder}.npy", model.encode(items))
"""


def test_a_python_without_the_package_opens_the_remote_loader(processor_folder, image, tmp_path):
    expected = {}
    for model_type in CLASSES:
        processor = of_kind(CocoaProcessor.from_pretrained(processor_folder), model_type)
        cocoa = random_model(processor, model_type)
        for modules in ("stock", "cocoa"):
            save_cocoa(cocoa, processor, tmp_path / f"{model_type}-{modules}", modules=modules)
            here = SentenceTransformer(modules=[CocoaTransformer(cocoa, processor)], device="cpu")
            expected[f"{model_type}-{modules}"] = here.encode(["a red apple", {"text": "a nerd face", "image": image}])
    image.save(tmp_path / "picture.png")
    (tmp_path / "isolated.py").write_text(ISOLATED)
    # The libraries must be found, and the package not, though it may be installed beside them.
    block = tmp_path / "block"
    block.mkdir()
    (block / "sitecustomize.py").write_text(
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('modeling_cocoa', 'trainers', 'evaluation', 'cocoa'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
    )
    caches = {"HF_HOME": str(tmp_path / "hf"), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    result = subprocess.run(
        [sys.executable, "isolated.py", "picture.png", *expected],
        cwd=tmp_path,
        env={**os.environ, **caches, "PYTHONPATH": str(block)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for name, vectors in expected.items():
        assert_close(np.load(tmp_path / f"{name}.npy"), vectors, name)


@pytest.mark.parametrize("modules", ["stock", "cocoa"])
def test_our_module_can_be_what_the_folder_names(cocoa, processor, tmp_path, inputs, image, modules):
    save_cocoa(cocoa, processor, tmp_path / "cocoa", modules=modules, prompts=PROMPTS)
    model = SentenceTransformer(str(tmp_path / "cocoa"), device="cpu", trust_remote_code=True)
    expected = "CocoaTransformer" if modules == "cocoa" else "Transformer"
    assert type(model[0]).__name__ == expected
    ours = SentenceTransformer(modules=[CocoaTransformer(cocoa, processor)], device="cpu")
    assert_close(model.encode(inputs), ours.encode(inputs))
    if modules == "cocoa":
        with pytest.raises(ValueError, match="trust_remote_code"):
            SentenceTransformer(str(tmp_path / "cocoa"), device="cpu")


@pytest.mark.parametrize("modules", ["stock", "cocoa"])
def test_saved_again_through_the_remote_loader_both_loaders_stay_open(cocoa, processor, tmp_path, inputs, modules):
    save_cocoa(cocoa, processor, tmp_path / "one", modules=modules, prompts=PROMPTS)
    first = SentenceTransformer(str(tmp_path / "one"), device="cpu", trust_remote_code=True)
    expected = first.encode(inputs)
    for number in ("two", "three"):
        first.save_pretrained(str(tmp_path / number))
        first = SentenceTransformer(str(tmp_path / number), device="cpu", trust_remote_code=True)
        assert_close(first.encode(inputs), expected)
    if modules == "stock":
        assert_close(SentenceTransformer(str(tmp_path / "three"), device="cpu").encode(inputs), expected)
    assert repair_cocoa(tmp_path / "three") == [], "the requirements stay too"


def test_saved_again_through_the_stock_loader_the_folder_can_be_repaired(folder, tmp_path, inputs):
    stock = SentenceTransformer(str(folder), device="cpu")
    expected = stock.encode(inputs)
    again = tmp_path / "again"
    stock.save_pretrained(str(again))
    with pytest.raises(OSError, match="modeling_cocoa_qwen"):
        SentenceTransformer(str(again), device="cpu", trust_remote_code=True)
    repaired = repair_cocoa(again)
    assert "modeling_cocoa.py" in repaired and "config_sentence_transformers.json" in repaired
    for name, model in loaders(again).items():
        assert_close(model.encode(inputs), expected, name)
    # Or save through our function in the first place.
    save_cocoa(SentenceTransformer(str(folder), device="cpu", trust_remote_code=True), None, tmp_path / "well")
    assert repair_cocoa(tmp_path / "well") == []
    for model in loaders(tmp_path / "well").values():
        assert_close(model.encode(inputs), expected)


def test_a_folder_of_something_else_cannot_be_repaired(tmp_path):
    with pytest.raises(ValueError, match="no CoCoA model"):
        repair_cocoa(tmp_path)


def test_other_files_in_the_folder_stay(cocoa, processor, folder):
    for name in ("optimizer.pt", "pytorch_model_fsdp.bin", "adapter_state.safetensors"):
        (folder / name).write_bytes(b"state")
    (folder / "README.md").write_text("my card")
    save_cocoa(cocoa, processor, folder)
    for name in ("optimizer.pt", "pytorch_model_fsdp.bin", "adapter_state.safetensors"):
        assert (folder / name).read_bytes() == b"state"
    assert (folder / "README.md").read_text() == "my card"


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("writer", ["model_folder.write_json", "saving.repair_cocoa", "saving._card"])
def test_a_save_that_fails_leaves_what_was_there(cocoa, processor, tmp_path, monkeypatch, existing, writer):
    folder = tmp_path / "cocoa"
    if existing:
        save_cocoa(cocoa, processor, folder, prompts=PROMPTS)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}

    def fail(*args):
        raise RuntimeError("disk full")

    if existing:
        (folder / "README.md").unlink()  # so that a card is written
        before.pop(folder / "README.md")
    monkeypatch.setattr(f"modeling_cocoa.{writer}", fail)
    with pytest.raises(RuntimeError, match="disk full"):
        save_cocoa(cocoa, processor, folder, modules="cocoa", prompts={"query": "other"})
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    assert [path.name for path in tmp_path.iterdir()] == (["cocoa"] if existing else [])


def test_what_cannot_be_saved_is_said(folder, processor, cocoa, tmp_path):
    with pytest.raises(ValueError, match="'stock' or 'cocoa'"):
        save_cocoa(cocoa, processor, tmp_path / "x", modules="ours")
    with pytest.raises(ValueError, match="processor"):
        save_cocoa(cocoa, None, tmp_path / "x")
    with pytest.raises(ValueError, match=r"'sort', and the prompts are \['query'\]"):
        save_cocoa(cocoa, processor, tmp_path / "x", prompts={"query": "Find: "}, default_prompt_name="sort")
    with pytest.raises(ValueError, match="CoCoA models.*trust_remote_code"):
        save_cocoa(SentenceTransformer(str(folder), device="cpu"), None, tmp_path / "x")
    assert not (tmp_path / "x").exists()


def test_package_and_remote_copy_live_in_one_process(folder, inputs, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved)
    # Another revision of the code, as a later release would have it.
    file = moved / "pooling.py"
    file.write_text(file.read_text() + "\n# another revision\n")
    remote = AutoModel.from_pretrained(moved, trust_remote_code=True)
    ours = CocoaTransformer(folder)
    assert type(remote) is not type(ours.model)
    for name, value in ours.model.state_dict().items():
        assert torch.equal(remote.state_dict()[name], value)


@pytest.mark.parametrize("source", ["ours", "ours and Normalize", "remote cocoa", "remote stock"])
def test_a_sentence_transformer_is_saved_with_its_settings(cocoa, processor, tmp_path, inputs, source):
    save_cocoa(cocoa, processor, tmp_path / "one", modules="cocoa" if source == "remote cocoa" else "stock")
    settings = {"prompts": PROMPTS, "default_prompt_name": "sort", "truncate_dim": 16, "similarity_fn_name": "dot"}
    if source.startswith("remote"):
        model = remote(tmp_path / "one", **settings)
    else:
        modules = [CocoaTransformer(tmp_path / "one"), Normalize()]
        model = SentenceTransformer(modules=modules[: 1 + ("Normalize" in source)], device="cpu", **settings)
    model.max_seq_length = 80
    expected = model.encode(inputs)
    assert expected.shape == (len(inputs), 16)
    for modules in ("stock", "cocoa"):
        save_cocoa(model, None, tmp_path / modules, modules=modules)
        again = remote(tmp_path / modules)
        assert_close(again.encode(inputs), expected)
        assert {name: getattr(again, name) for name in settings} == settings
        assert again.max_seq_length == 80


def test_a_processor_prompt_becomes_the_default_prompt(cocoa, processor, folder, tmp_path, inputs):
    processor.prompt = "Put in a drawer"
    model = SentenceTransformer(modules=[CocoaTransformer(cocoa, processor)], device="cpu")
    save_cocoa(model, None, tmp_path / "prompted")
    stock = SentenceTransformer(str(tmp_path / "prompted"), device="cpu")
    assert np.abs(stock.encode(inputs) - SentenceTransformer(str(folder), device="cpu").encode(inputs)).max() > 1e-3
    assert_close(stock.encode(inputs), model.encode(inputs))
    assert_close(stock.encode_query(inputs), model.encode_query(inputs))


def test_a_module_that_names_the_package_can_be_repaired(folder, tmp_path, inputs):
    model = SentenceTransformer(modules=[CocoaTransformer(folder)], prompts=PROMPTS, device="cpu")
    model.save_pretrained(str(tmp_path / "own"))
    assert {"modules.json", "sentence_transformer.py", "processing_cocoa.py"} <= set(repair_cocoa(tmp_path / "own"))
    again = remote(tmp_path / "own")
    assert type(again[0]).__module__.startswith("transformers_modules.")
    assert_close(again.encode_query(inputs), model.encode_query(inputs))
    assert repair_cocoa(tmp_path / "own") == []


def test_a_reference_to_the_hub_is_repaired(folder, inputs):
    """What the stock class saves after it was loaded from the Hub."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    reference = config["auto_map"]["AutoModel"]
    config["auto_map"]["AutoModel"] = f"some.body/model--{reference}"
    path.write_text(json.dumps(config))
    (folder / f"{reference.split('.')[0]}.py").unlink()
    expected = SentenceTransformer(str(folder), device="cpu").encode(inputs)
    assert set(repair_cocoa(folder)) == {"config.json", f"{reference.split('.')[0]}.py"}
    assert json.loads(path.read_text())["auto_map"] == {"AutoModel": reference}
    assert_close(remote(folder).encode(inputs), expected)


def test_a_folder_without_modules_cannot_be_repaired(cocoa, tmp_path):
    cocoa.save_pretrained(tmp_path)
    (tmp_path / "modules.json").unlink()
    with pytest.raises(ValueError, match="no modules.json.*save_cocoa"):
        repair_cocoa(tmp_path)


@pytest.mark.parametrize("first", ["whole", "sharded"])
def test_older_weights_are_not_loaded_instead_of_newer_ones(cocoa, processor, tmp_path, first):
    sizes = {"whole": "1GB", "sharded": "50KB"}
    order = [sizes.pop(first), *sizes.values()]
    for size in order:
        with torch.no_grad():
            for parameter in cocoa.parameters():
                parameter.mul_(1.1)
        cocoa.save_pretrained(tmp_path / "cocoa", processor=processor, max_shard_size=size)
        shards = len(list((tmp_path / "cocoa").glob("model-*-of-*.safetensors")))
        assert (shards > 1) == (size == "50KB")
    for name, value in load_backbone(tmp_path / "cocoa").state_dict().items():
        assert torch.equal(value, cocoa.state_dict()[name]), name


def test_a_model_that_the_folder_cannot_hold_is_refused(cocoa, folder, processor, tmp_path):
    ours, stock = CocoaTransformer(folder), remote(folder)[0]
    mean, last = Pooling(64, "mean"), Pooling(64, "lasttoken")
    for modules in ([ours, Dense(64, 8)], [stock, last], [stock, mean, Normalize()]):
        with pytest.raises(ValueError, match="another one once saved"):
            save_cocoa(SentenceTransformer(modules=modules, device="cpu"), None, tmp_path / "x")
    model = SentenceTransformer(modules=[ours], device="cpu")
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), ours.model)
    for holder in (model, ours.model):
        with pytest.raises(ValueError, match="adapters.*merge_adapters"):
            save_cocoa(holder, processor, tmp_path / "x")
    with pytest.raises(ValueError, match="adapters.*merge_adapters"):
        ours.model.save_pretrained(tmp_path / "x", processor=processor)
    assert not (tmp_path / "x").exists()


def test_options_mean_the_same_through_every_loader(cocoa, processor, tmp_path, inputs):
    save_cocoa(cocoa, processor, tmp_path / "stock")
    save_cocoa(cocoa, processor, tmp_path / "cocoa", modules="cocoa")
    options = {
        "processor_kwargs": {"min_pixels": 256, "max_pixels": 512, "model_max_length": 64},
        "config_kwargs": {"attn_implementation": "eager"},
        "model_kwargs": {"dtype": torch.float64},
    }
    stock = SentenceTransformer(str(tmp_path / "stock"), device="cpu", **options)
    expected = stock.encode(inputs)
    assert np.abs(expected - SentenceTransformer(str(tmp_path / "stock"), device="cpu").encode(inputs)).max() > 1e-3
    for name in ("stock", "cocoa"):
        model = remote(tmp_path / name, **options)
        assert model.dtype == torch.float64 and model.config._attn_implementation == "eager"
        assert model.max_seq_length == 64
        assert_close(model.encode(inputs), expected, name)
    with pytest.raises(ValueError, match="torch only; got backend='onnx'"):
        remote(tmp_path / "cocoa", backend="onnx")


def test_the_module_list_is_put_in_place_last(cocoa, processor, folder, monkeypatch):
    moved, replace = [], os.replace

    def record(source, target):
        moved.append(Path(target))
        replace(source, target)

    monkeypatch.setattr(os, "replace", record)
    save_cocoa(cocoa, processor, folder)
    moved = [path for path in moved if path.is_relative_to(folder)]
    assert len(moved) > 10 and moved[-1] == folder / "modules.json"


def test_a_save_that_is_cut_off_leaves_no_folder_of_two_models(cocoa, processor, tmp_path, monkeypatch):
    save_cocoa(cocoa, processor, tmp_path / "cocoa")
    replaced = os.replace

    def cut_off(source, target):
        replaced(source, target)
        if Path(target) == tmp_path / "cocoa" / "model.safetensors":
            raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", cut_off)
    with pytest.raises(KeyboardInterrupt):
        save_cocoa(cocoa, processor, tmp_path / "cocoa")
    assert not (tmp_path / "cocoa" / "modules.json").exists(), "sentence-transformers would load it"
    monkeypatch.undo()
    save_cocoa(cocoa, processor, tmp_path / "cocoa")
    assert (tmp_path / "cocoa" / "modules.json").exists()


def test_the_former_name_warns_and_does_the_same(folder, tmp_path):
    with pytest.warns(FutureWarning, match="repair_cocoa"):
        assert mend_cocoa(shutil.copytree(folder, tmp_path / "copy")) == []
