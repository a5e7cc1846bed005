# SPDX-License-Identifier: Apache-2.0
"""Our module inside sentence-transformers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from sentence_transformers import SentenceTransformer
from sentence_transformers.base.losses.gradcache import _create_minibatch
from transformers import Qwen2VLForConditionalGeneration

from evaluation.assets import asset_path
from modeling_cocoa.inputs import CocoaInputError
from modeling_cocoa.saving import save_cocoa
from modeling_cocoa.sentence_transformer import CocoaTransformer
from tests.modeling_cocoa.test_saving import of_kind, random_model


def module_of(processor, model_type):
    processor = of_kind(processor, model_type)
    module = CocoaTransformer(random_model(processor, model_type), processor)
    return SentenceTransformer(modules=[module], device="cpu")


@pytest.fixture
def model(processor):
    return module_of(processor, "qwen2_vl")


def conversation(image):
    return [
        {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what is this?"}]},
        {"role": "assistant", "content": "a red apple"},
    ]


def mixture(image, tmp_path):
    path = tmp_path / "picture.png"
    image.save(path)
    frames = np.stack([np.asarray(image)] * 4)
    return [
        "a nerd face",
        conversation(image),
        image,
        str(path),
        path,
        {"text": "apple", "image": image, "video": None},
        {"images": [image, image]},
        {"video": frames, "text": "moving"},
        {"role": "user", "content": "one message"},
    ]


def test_anything_in_one_call_is_each_alone(model, image, tmp_path):
    items = mixture(image, tmp_path)
    together = model.encode(items, batch_size=4)
    for item, vector in zip(items, together, strict=True):
        # A list of one message is one conversation, of which there is one vector.
        np.testing.assert_allclose(model.encode([item]).reshape(-1), vector, atol=1e-5, rtol=0)
    np.testing.assert_allclose(together[3], together[4], atol=1e-6, err_msg="a path is a path")


def test_a_conversation_keeps_its_content_beside_other_inputs(model, image):
    """sentence-transformers 6.2's own module loses it."""
    other = conversation(image)
    other[1]["content"] = "a nerd face"
    first, second = (model.encode(["text", talk])[1] for talk in (conversation(image), other))
    assert np.abs(first - second).max() > 1e-3


def test_the_bad_item_is_named(model, image):
    with pytest.raises(CocoaInputError, match="Item 0.*empty"):
        model.encode([" "])
    with pytest.raises(CocoaInputError, match="Item 0 within its batch .*sorts inputs.*empty"):
        model.encode(["a red apple", " ", "a nerd face"], batch_size=1)
    with pytest.raises(CocoaInputError, match="Item 0.*colour"):
        model.encode([{"text": "a", "colour": "red"}])


def test_options_of_one_call_are_refused_or_obeyed(model):
    with pytest.raises(ValueError, match="no processing_kwargs.*max_seq_length"):
        model.encode(["a cat"], processing_kwargs={"text": {"max_length": 4}})
    assert model.preprocess(["a red apple on a table"], max_length=5)["input_ids"].shape == (1, 5)


def test_what_sentence_transformers_asks_of_a_module(model):
    assert model.get_embedding_dimension() == 64
    assert model.max_seq_length == 96
    model.max_seq_length = 10
    assert model[0].processor.max_length == 10
    assert model.tokenizer is model[0].processor.tokenizer
    assert model.transformers_model is model[0].model
    assert model.supports("image") and model.supports(("image", "text")) and model.supports("message")
    tokens = model.encode("a nerd face", output_value="token_embeddings")
    assert tokens.shape[1] == 64
    assert "CocoaQwen2VLModel" in repr(model)


def test_token_embeddings_end_in_the_vector_and_are_no_part_of_a_copy(model):
    """The vector alone is computed at once; the tokens when they are asked for."""
    output = model[0](model.preprocess(["a nerd face", "a cat"]))
    assert "token_embeddings" not in output
    ends = output["token_embeddings"][torch.arange(2), output["attention_mask"].sum(1) - 1]
    expected = torch.nn.functional.normalize(ends, dim=-1)
    torch.testing.assert_close(output["sentence_embedding"], expected, atol=1e-5, rtol=0)
    with pytest.raises(KeyError, match="a copy"):
        type(output)(dict(model[0](model.preprocess(["a cat"]))))["token_embeddings"]


def test_a_generative_checkpoint_becomes_a_module(tmp_path, processor, model):
    folder = tmp_path / "generative"
    Qwen2VLForConditionalGeneration(model[0].model.config).save_pretrained(folder)
    processor.save_pretrained(folder)
    loaded = SentenceTransformer(modules=[CocoaTransformer(folder, max_length=20)], device="cpu")
    assert loaded.max_seq_length == 20
    vectors = loaded.encode(["a nerd face", "a red apple"])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=-1), 1.0, rtol=1e-5)


def test_options_reach_model_and_processor(tmp_path, processor, model):
    save_cocoa(model, None, tmp_path / "cocoa")
    module = CocoaTransformer(
        tmp_path / "cocoa",
        min_pixels=256,
        max_pixels=1024,
        model_kwargs={"dtype": torch.bfloat16, "attn_implementation": "eager"},
    )
    assert module.model.dtype == torch.bfloat16
    assert module.model.config._attn_implementation == "eager"
    assert module.processor.image_processor.size["longest_edge"] == 1024


def test_a_backbone_in_memory_needs_its_processor(model):
    with pytest.raises(ValueError, match="processor"):
        CocoaTransformer(model[0].model)


def test_half_precision_keeps_the_vectors(tmp_path, model, image):
    """bfloat16 has 8 bits: cosines stay within 0.01 of float32."""
    save_cocoa(model, None, tmp_path / "cocoa")
    module = CocoaTransformer(tmp_path / "cocoa", model_kwargs={"dtype": torch.bfloat16})
    half = SentenceTransformer(modules=[module], device="cpu")
    items = ["a nerd face", image]
    cosines = (half.encode(items, convert_to_tensor=True).float().numpy() * model.encode(items)).sum(-1)
    assert (cosines > 0.99).all(), cosines


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_cached_loss_can_cut_any_batch(processor, model_type, image, tmp_path, size):
    """sentence-transformers cuts features by samples, with their images, videos and timings."""
    model = module_of(processor, model_type)
    slow = {"video": np.stack([np.asarray(image)] * 8), "text": "two of them"}
    features = model.preprocess([*mixture(image, tmp_path), slow, "a cat"])
    assert ("second_per_grid_ts" in features) == (model_type == "qwen2_5_vl")
    with torch.no_grad():
        whole = model(dict(features))["sentence_embedding"]
        parts = [_create_minibatch(features, start, start + size) for start in range(0, len(whole), size)]
        vectors = torch.cat([model(part)["sentence_embedding"] for part in parts])
    torch.testing.assert_close(vectors, whole, atol=1e-5, rtol=0)


def test_the_timing_of_a_video_reaches_its_own_sample(processor, image):
    """Qwen2.5-VL places frames by it."""
    model = module_of(processor, "qwen2_5_vl")
    film = {"video": np.stack([np.asarray(image)] * 8)}
    features = model.preprocess(["a cat", film, "a dog", film])
    assert features["second_per_grid_ts"].shape == (4, 1)
    features["second_per_grid_ts"][3] *= 5
    vectors = model(features)["sentence_embedding"]
    assert (vectors[1] - vectors[3]).abs().max() > 1e-3
    assert (vectors[1] - torch.tensor(model.encode(film))).abs().max() < 1e-5


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_and_gradient_checkpointing_train(model, image, checkpointing):
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"]), model[0].model)
    if checkpointing:
        model.gradient_checkpointing_enable()
        assert model[0].model.language_model.gradient_checkpointing
    first, second = model.train()(model.preprocess(["a nerd face", image]))["sentence_embedding"]
    (first @ second).backward()
    gradients = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert gradients and all("lora_" in name for name in gradients)


def test_sizes_beside_a_processor_are_refused(model):
    with pytest.raises(ValueError, match=r"\['max_length'\] would change a processor .*from_pretrained"):
        CocoaTransformer(model[0].model, model[0].processor, max_length=64)
    with pytest.raises(ValueError, match=r"\['min_pixels'\] would change"):
        CocoaTransformer(model[0].model, model[0].processor, processor_kwargs={"min_pixels": 64})


def test_a_prompt_of_the_checkpoint_is_chosen_by_name(tmp_path, model):
    folder = shutil.copytree(asset_path("checkpoints/cocoa-tiny"), tmp_path / "model")
    file = folder / "config_sentence_transformers.json"
    prompts = {"query": "Find the image.", "document": ""}
    file.write_text(json.dumps({**json.loads(file.read_text()), "prompts": prompts}))
    module, stock = CocoaTransformer(folder), SentenceTransformer(str(folder), device="cpu")
    assert module.prompts == stock.prompts == prompts
    plain = module.encode(["a red apple"])
    assert np.abs(module.encode(["a red apple"], prompt_name="query") - plain).max() > 1e-3
    for name in prompts:
        expected = stock.encode(["a red apple"], prompt_name=name)
        np.testing.assert_allclose(module.encode(["a red apple"], prompt_name=name), expected, atol=1e-5, rtol=0)
    with pytest.raises(ValueError, match=r"no prompt 'passage'; this model's prompts are \['document', 'query'\]"):
        module.encode(["a red apple"], prompt_name="passage")
    with pytest.raises(ValueError, match="either prompt or prompt_name"):
        module.encode(["a red apple"], prompt="Find.", prompt_name="query")
    with pytest.raises(ValueError, match="no prompt 'query'"):
        model[0].encode(["a red apple"], prompt_name="query")
