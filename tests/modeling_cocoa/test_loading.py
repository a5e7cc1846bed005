# SPDX-License-Identifier: Apache-2.0
"""Every layout in which Qwen2-VL weights exist, loaded, saved and loaded again, value by value."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, PretrainedConfig

from modeling_cocoa.auto import load_backbone
from modeling_cocoa.configuration_cocoa import CocoaSettings
from modeling_cocoa.modeling_cocoa import check_transformers_version
from tests.conftest import CLASSES, EOS_ID, TEXT, tiny_config

WEIGHTS = ("legacy", "generative", "base")


def generative_folder(folder, model_type, *, flat, weights):
    """A checkpoint as the Hub has them (`flat`, `legacy`), or as transformers 5 does; returns the base weights."""
    generative = CLASSES[model_type][3]
    torch.manual_seed(1)
    model = generative(tiny_config(model_type))
    base = {name: value.detach().clone() for name, value in model.model.state_dict().items()}
    names = {
        "legacy": lambda name: name if name.startswith("visual.") else name.replace("language_model.", "model.", 1),
        "generative": lambda name: f"model.{name}",
        "base": lambda name: name,
    }[weights]
    state = {names(name): value.contiguous() for name, value in base.items()}
    if weights != "base":
        state["lm_head.weight"] = model.lm_head.weight.detach().clone()
    config = model.config.to_dict()
    if flat:
        text = config.pop("text_config")
        for name in ("model_type", "rope_parameters", "dtype", "layer_types"):
            text.pop(name, None)
        config = {**text, **config, "rope_theta": 10_000.0}
        config["rope_scaling"] = {"type": "mrope", "mrope_section": [2, 3, 3]}
        config.pop("transformers_version", None)
    config["architectures"] = [generative.__name__]
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
    return base


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("flat", [True, False], ids=["flat", "nested"])
def test_every_layout_loads_and_saves_value_by_value(tmp_path, model_type, flat, weights):
    _, ours, stock, generative = CLASSES[model_type]
    if flat and model_type == "qwen3_vl":
        pytest.skip("published with a nested configuration alone")
    base = generative_folder(tmp_path / "source", model_type, flat=flat, weights=weights)
    model = ours.from_pretrained(tmp_path / "source")
    saved = tmp_path / "saved"
    model.save_pretrained(saved)
    # As in the Hub's own files, which every engine knows.
    if model_type == "qwen3_vl":
        names = {f"model.{name}" for name in base}
    else:
        names = {name.replace("language_model.", "model.") for name in base}
    assert set(load_file(saved / "model.safetensors")) == names
    whole, info = generative.from_pretrained(saved, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"], "the language head is the embeddings"
    for name, value in base.items():
        assert torch.equal(whole.model.state_dict()[name], value), name
    again = ours.from_pretrained(saved)
    twice = tmp_path / "twice"
    again.save_pretrained(twice)
    remote = AutoModel.from_pretrained(saved, trust_remote_code=True)
    assert type(remote) is not ours and type(remote).__name__ == ours.__name__
    stock_model, info = stock.from_pretrained(twice, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for loaded in (model, again, remote, stock_model):
        state = loaded.state_dict()
        assert set(state) == set(base)
        for name, value in base.items():
            assert torch.equal(state[name], value), name
        assert loaded.config.text_config.is_causal is False
        assert loaded.config.text_config.rope_parameters["mrope_section"] == [2, 3, 3]
        assert loaded.config.text_config.eos_token_id == EOS_ID
    config = json.loads((saved / "config.json").read_text())
    assert config["architectures"] == [generative.__name__] and config["is_causal"] is False
    assert config["model_type"] == model_type
    assert config["cocoa"]["eos_token_id"] == EOS_ID


def test_a_missing_weight_is_an_error(tmp_path, model_type):
    generative_folder(tmp_path / "source", model_type, flat=model_type != "qwen3_vl", weights="legacy")
    file = tmp_path / "source" / "model.safetensors"
    state = load_file(file)
    del state["model.layers.1.mlp.up_proj.weight"]
    save_file(state, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"lacks 1 weights.*language_model\.layers\.1\.mlp\.up_proj\.weight"):
        load_backbone(tmp_path / "source")


def test_an_unknown_weight_is_an_error(tmp_path, model_type):
    generative_folder(tmp_path / "source", model_type, flat=False, weights="base")
    file = tmp_path / "source" / "model.safetensors"
    save_file({**load_file(file), "score.weight": torch.zeros(1)}, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has unknown 1 weights.*score\.weight"):
        load_backbone(tmp_path / "source")


def test_another_kind_of_model_is_refused(tmp_path, model_type):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="'bert'"):
        load_backbone(tmp_path)
    with pytest.raises(ValueError, match=f"'bert'.*takes {model_type!r}"):
        CLASSES[model_type][1].from_pretrained(tmp_path)


def test_a_model_of_linear_attention_is_refused_with_the_reason(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3_5"}))
    with pytest.raises(ValueError, match="'qwen3_5'.*linear attention, which reads from left to right only"):
        load_backbone(tmp_path)


def test_key_mapping_is_ours(tmp_path, model_type):
    with pytest.raises(ValueError, match="key_mapping"):
        CLASSES[model_type][1].from_pretrained(tmp_path, key_mapping={"a": "b"})


def test_load_backbone_picks_the_class(tmp_path, model_type, backbone):
    backbone.save_pretrained(tmp_path)
    assert type(load_backbone(tmp_path)) is CLASSES[model_type][1]


@pytest.mark.parametrize("folder", ["/no/such/folder", "./no-such-folder", "no/such/folder"])
def test_a_missing_folder_is_not_taken_for_a_hub_name(folder, model_type):
    for load in (load_backbone, CLASSES[model_type][1].from_pretrained):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint folder {folder}"):
            load(folder)


def test_an_older_transformers_is_named():
    with pytest.raises(ImportError, match=r"5\.2 or newer, found 5\.1\.0"):
        check_transformers_version((5, 2), "5.1.0")
    check_transformers_version((5, 2), "5.2.0")
    check_transformers_version((5, 2), "5.23.0.dev0")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"image_decoder_layers": 0}, "image_decoder_layers"),
        ({"pooling": "mean"}, "unknown fields .'pooling'."),
    ],
)
def test_a_wrong_cocoa_field_is_named(values, message):
    config = PretrainedConfig()
    config.cocoa = values
    with pytest.raises(ValueError, match=message):
        CocoaSettings.from_model_config(config)


@pytest.mark.parametrize(
    "windows", [{"max_window_layers": 1}, {"layer_types": ["full_attention", "sliding_attention"]}]
)
def test_a_checkpoint_with_sliding_windows_is_refused(tmp_path, model_type, windows):
    """The packed layers know none: its vectors would be others than stock gives."""
    config_class, ours, stock, _ = CLASSES[model_type]
    if model_type == "qwen3_vl":
        pytest.skip("its layers have no windows")
    text = {**TEXT, "use_sliding_window": True, "sliding_window": 4, **windows}
    config = config_class(text_config=text, vision_config=tiny_config(model_type).vision_config.to_dict())
    assert "sliding_attention" in config.text_config.layer_types
    stock(config).save_pretrained(tmp_path)
    for load in (lambda: ours(config), lambda: load_backbone(tmp_path)):
        with pytest.raises(ValueError, match="sliding window of 4 tokens.*which CoCoA models do not support"):
            load()


@pytest.mark.parametrize("windows", [{"sliding_window": 4}, {"use_sliding_window": True, "max_window_layers": 2}])
def test_a_window_that_no_layer_has_is_no_window(model_type, windows):
    config_class, ours, _, _ = CLASSES[model_type]
    ours(config_class(text_config={**TEXT, **windows}, vision_config=tiny_config(model_type).vision_config.to_dict()))
