# SPDX-License-Identifier: Apache-2.0
"""What each segment can know, the losses against plain references, and the heads' way to disk and back."""

from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedModel

from modeling_cocoa.attention import EOS, PADDING, SOURCE, TARGET
from modeling_cocoa.auto import load_backbone
from modeling_cocoa.losses import masked_token_loss, normalize_patches
from modeling_cocoa.packed_attention import FLEX_ATTENTION
from modeling_cocoa.packing import pack
from modeling_cocoa.reconstruction import HEADS_FILE, CocoaForReconstruction, count_losses, read_lm_head
from modeling_cocoa.special_tokens import attach_mask_token
from tests.conftest import (
    CLASSES,
    EOS_ID,
    IMAGE_ID,
    MASK_ID,
    PAD_ID,
    VISION_END_ID,
    VISION_START_ID,
    sharpen,
    tiny_config,
)

PATCH_VALUES = 3 * 2 * 8 * 8
GRID = (1, 4, 4)
IMAGE = [VISION_START_ID, *[IMAGE_ID] * 4, VISION_END_ID]
PARTS = {
    "image_to_text": (IMAGE, [11, MASK_ID, MASK_ID, 14]),
    "text_to_image": ([21, 22, MASK_ID], IMAGE),
    "text_to_text": ([21, 22, MASK_ID], [MASK_ID, MASK_ID, 22]),
    "image_to_image": (IMAGE, IMAGE),
    "both_to_both": ([*IMAGE, 21, MASK_ID], [*IMAGE, MASK_ID, 22]),
}
LABEL = 30


def bridge_batch(direction, *, source_shift=0, target_shift=0, seed=0):
    """Two rows of a direction, the second with one more source token; shifts change the content of a segment."""
    generator = torch.Generator().manual_seed(seed)
    source, target = PARTS[direction]

    def change(ids, shift):
        return [token + shift if token < 100 else token for token in ids]

    first = change(source, source_shift)
    second = [*change([25], source_shift), *first]
    rows = [(ids, change(target, target_shift)) for ids in (first, second)]
    width = max(len(a) + 1 + len(b) for a, b in rows)
    ids = torch.full((2, width), PAD_ID)
    segments = torch.zeros_like(ids)
    grids, image_is_target = [], []
    for row, (a, b) in enumerate(rows):
        ids[row, : len(a) + 1 + len(b)] = torch.tensor([*a, EOS_ID, *b])
        segments[row, : len(a)] = SOURCE
        segments[row, len(a)] = EOS
        segments[row, len(a) + 1 : len(a) + 1 + len(b)] = TARGET
        for part, is_target in ((a, False), (b, True)):
            if IMAGE_ID in part:
                grids.append(GRID)
                image_is_target.append(is_target)
    labels = torch.where(ids == MASK_ID, LABEL, -100)
    batch = {
        "input_ids": ids,
        "attention_mask": (segments != PADDING).long(),
        "segment_ids": segments,
        "labels": labels,
    }
    if grids:
        is_target = torch.tensor(image_is_target)
        pixels = torch.randn(16 * len(grids), PATCH_VALUES, generator=generator)
        patches_of_target = is_target.repeat_interleave(16)
        pixels[patches_of_target] += target_shift
        pixels[~patches_of_target] += source_shift
        batch |= {
            "pixel_values": pixels,
            "pixel_labels": pixels.clone(),
            "image_grid_thw": torch.tensor(grids),
            "image_is_target": is_target,
            "unit_mask": is_target.repeat_interleave(4),
        }
    return batch


def reconstruction(model_type, bridge="layerwise", implementation="sdpa", eos_sees_target=None):
    """Packed rows with sdpa, the padded batch with eager."""
    torch.manual_seed(0)
    backbone = CLASSES[model_type][1]._from_config(tiny_config(model_type), attn_implementation=implementation)
    return CocoaForReconstruction(sharpen(backbone), bridge=bridge, eos_sees_target=eos_sees_target).eval()


def hidden_states(model, batch):
    """Final hidden states, as the heads get them."""
    seen, read = [], model._read

    def keep(*args):
        seen.append(read(*args))
        return seen[-1]

    model._read = keep
    try:
        with torch.no_grad():
            return seen, model(**batch)
    finally:
        del model._read


BACKENDS = pytest.mark.parametrize("implementation", ["sdpa", "eager", FLEX_ATTENTION])


@BACKENDS
@pytest.mark.parametrize("bridge, eos_sees_target", [("layerwise", True), ("layerwise", False), ("embedding", False)])
@pytest.mark.parametrize("direction", PARTS)
def test_source_and_eos_see_the_target_if_the_eos_does(model_type, bridge, eos_sees_target, direction, implementation):
    model = reconstruction(model_type, bridge, implementation, eos_sees_target)
    before, _ = hidden_states(model, batch := bridge_batch(direction))
    after, _ = hidden_states(model, bridge_batch(direction, target_shift=3))
    if direction in ("text_to_image", "image_to_image"):
        # Only the rebuilt image differs, and nobody sees it: its tokens carry the mask embedding.
        eos_sees_target = False
    for segment in (SOURCE, EOS):
        own = batch["segment_ids"] == segment
        if eos_sees_target:
            assert (before[0][own] - after[0][own]).abs().max() > 1e-3
        else:
            torch.testing.assert_close(before[0][own], after[0][own], atol=1e-5, rtol=0)


@pytest.mark.parametrize("bridge", ["layerwise", "embedding"])
@pytest.mark.parametrize("direction", PARTS)
def test_with_an_eos_that_does_not_see_the_target_source_and_eos_are_those_of_inference(model_type, bridge, direction):
    """The source alone, given to the embedding model, has the EOS that the training row has."""
    model = reconstruction(model_type, bridge, eos_sees_target=False)
    batch = bridge_batch(direction)
    states, _ = hidden_states(model, batch)
    eos = torch.nn.functional.normalize(states[0][batch["segment_ids"] == EOS], dim=-1)
    with torch.no_grad():
        own = (batch["segment_ids"] == SOURCE) | (batch["segment_ids"] == EOS)
        inputs = {"input_ids": batch["input_ids"].masked_fill(~own, PAD_ID), "attention_mask": own.long()}
        if IMAGE_ID in PARTS[direction][0]:
            seen = ~batch["image_is_target"]
            inputs["pixel_values"] = batch["pixel_values"][seen.repeat_interleave(16)]
            inputs["image_grid_thw"] = batch["image_grid_thw"][seen]
        expected = model.model(**inputs).pooler_output
    torch.testing.assert_close(eos, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])  # flex has no backward pass on a CPU
@pytest.mark.parametrize("eos_sees_target", [True, False])
def test_the_gradient_of_the_target_to_the_source_passes_through_the_eos_alone(
    model_type, implementation, eos_sees_target
):
    """With keys and values of the EOS detached in every layer, it is exactly zero."""
    model = reconstruction(model_type, "layerwise", implementation, eos_sees_target)
    backbone, batch = model.model, bridge_batch("text_to_text")
    segments = batch["segment_ids"]
    is_packed = implementation != "eager"
    is_eos = segments == EOS
    if is_packed:
        packing = pack(segments, eos_sees_target)
        is_eos = packing.segment_ids == EOS

    def gradient(detach):
        """Of the target's hidden states, summed, to each place of the batch."""
        embeds = backbone.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        handles = []
        if detach:
            for layer in backbone.language_model.layers:
                for projection in (layer.self_attn.k_proj, layer.self_attn.v_proj):
                    handles.append(
                        projection.register_forward_hook(
                            lambda module, args, output: torch.where(is_eos[..., None], output.detach(), output)
                        )
                    )
        positions = backbone.mrope_positions(batch["input_ids"], batch["attention_mask"])
        hidden = model._read(embeds, positions, model._attention(segments, embeds.dtype), {})
        for handle in handles:
            handle.remove()
        weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
        (hidden * weights)[segments == TARGET].sum().backward()
        return embeds.grad

    own = segments == SOURCE
    assert gradient(detach=False)[own].abs().max() > 1e-3, "the source reaches the target through the EOS"
    assert (gradient(detach=True)[own] == 0).all()


@BACKENDS
@pytest.mark.parametrize("direction", PARTS)
def test_layerwise_target_sees_its_source_through_the_eos_alone(model_type, direction, implementation):
    """With the EOS's keys and values of every layer held, another source changes nothing of the target."""
    model = reconstruction(model_type, implementation=implementation)
    batch, other = bridge_batch(direction), bridge_batch(direction, source_shift=5)
    eos = batch["segment_ids"] == EOS
    target = batch["segment_ids"] == TARGET

    def run(batch, held=None):
        handles, inputs = [], []
        for index, layer in enumerate(model.model.language_model.layers):

            def hold(module, args, kwargs, index=index):
                states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
                # On a packed row, the EOS of each batch row is where the packing says.
                is_eos = eos
                if "packed_attention" in kwargs:
                    is_eos = torch.zeros(states.shape[:2], dtype=torch.bool)
                    is_eos[0, kwargs["packed_attention"].keywords["packing"].eos] = True
                inputs.append(states.detach().clone())
                if held is not None:
                    states = torch.where(is_eos[..., None], held[index], states)
                if "hidden_states" in kwargs:
                    return args, {**kwargs, "hidden_states": states}
                return (states, *args[1:]), kwargs

            handles.append(layer.register_forward_pre_hook(hold, with_kwargs=True))
        states, result = hidden_states(model, batch)
        for handle in handles:
            handle.remove()
        return states[0], result, inputs

    states, result, inputs = run(batch)
    free_states, free, _ = run(other)
    held_states, held, _ = run(other, inputs)
    assert (free_states[target] - states[target]).abs().max() > 1e-3, "the source reaches the target through the EOS"
    torch.testing.assert_close(held_states[target], states[target], atol=1e-5, rtol=0)
    if result.pixels is not None:
        assert (free.pixels - result.pixels).abs().max() > 1e-4


@pytest.mark.parametrize("direction", PARTS)
def test_embedding_bridge_carries_the_embedding_and_nothing_else(model_type, direction):
    """The second pass sees of the source its embedding only: held, another source changes nothing of the target."""
    model = reconstruction(model_type, "embedding")
    batch, other = bridge_batch(direction), bridge_batch(direction, source_shift=5)
    target = batch["segment_ids"] == TARGET

    def run(batch, held=None):
        tokens = []

        def hold(module, args, output):
            tokens.append(output)
            return held

        handle = model.bridge_projection.register_forward_hook(hold)
        states, result = hidden_states(model, batch)
        handle.remove()
        return states[1][target], result, tokens[0]

    states, result, token = run(batch)
    free, _, _ = run(other)
    held, held_result, _ = run(other, token)
    assert (free - states).abs().max() > 1e-3
    torch.testing.assert_close(held, states, atol=1e-5, rtol=0)
    if result.pixels is not None:
        torch.testing.assert_close(held_result.pixels, result.pixels, atol=1e-5, rtol=0)


@BACKENDS
def test_losses_are_the_plain_ones(model_type, implementation):
    """Against full logits and a loop over units."""
    model = reconstruction(model_type, implementation=implementation)
    batch = bridge_batch("both_to_both")
    states, output = hidden_states(model, batch)
    logits = states[0] @ model.model.get_input_embeddings().weight.T
    expected = {"text_source": [], "text_target": []}
    for row, column in (batch["labels"] != -100).nonzero().tolist():
        loss = F.cross_entropy(logits[row, column - 1], torch.tensor(LABEL))
        expected["text_source" if batch["segment_ids"][row, column] == SOURCE else "text_target"].append(loss)
    for name, values in expected.items():
        torch.testing.assert_close(output.losses[name], torch.stack(values).mean())
    patches = batch["pixel_labels"].view(-1, 4, PATCH_VALUES)[batch["unit_mask"]]
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True, correction=0) + 1e-6).sqrt()
    torch.testing.assert_close(output.losses["image"], ((output.pixels - target) ** 2).mean())
    total = output.losses["text_source"] + output.losses["text_target"] + 0.5 * output.losses["image"]
    torch.testing.assert_close(output.loss, total)


def test_the_first_target_token_is_predicted_from_the_eos(model_type):
    model = reconstruction(model_type)
    batch = bridge_batch("text_to_text")
    batch["labels"][:] = -100
    eos = (batch["segment_ids"] == EOS).nonzero()
    for row, column in eos.tolist():
        assert batch["input_ids"][row, column + 1] == MASK_ID
        batch["labels"][row, column + 1] = LABEL
    states, output = hidden_states(model, batch)
    logits = states[0][batch["segment_ids"] == EOS] @ model.model.get_input_embeddings().weight.T
    torch.testing.assert_close(output.token_losses, F.cross_entropy(logits, torch.full((2,), LABEL), reduction="none"))


def test_target_images_never_pass_the_vision_tower(model_type):
    """What a target image shows must not reach the model except as the answer."""
    model = reconstruction(model_type)
    batch = bridge_batch("image_to_image")
    _, first = hidden_states(model, batch)
    batch["pixel_values"][batch["image_is_target"].repeat_interleave(16)] = 100.0
    _, second = hidden_states(model, batch)
    assert torch.equal(first.pixels, second.pixels)
    batch["pixel_values"][:16] += 1.0
    _, third = hidden_states(model, batch)
    assert not torch.allclose(first.pixels[:4], third.pixels[:4], atol=1e-5)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("bridge", ["layerwise", "embedding"])
@pytest.mark.parametrize("direction", PARTS)
def test_losses_and_gradients_are_those_of_the_padded_batch(model_type, bridge, direction, checkpointing):
    """Under the dense mask, to 1e-4 of each gradient's size."""
    batch = bridge_batch(direction)

    def step(implementation):
        model = reconstruction(model_type, bridge, implementation).train()
        if checkpointing and implementation != "eager":
            model.gradient_checkpointing_enable()
        output = model(**batch)
        output.loss.backward()
        return output, {name: p.grad for name, p in model.named_parameters() if p.grad is not None}

    (expected, plain), (output, packed) = step("eager"), step("sdpa")
    torch.testing.assert_close(output.losses, expected.losses, rtol=1e-4, atol=1e-6)
    assert packed.keys() == plain.keys()
    for name, gradient in plain.items():
        scale = float(gradient.abs().max())
        torch.testing.assert_close(packed[name], gradient, atol=1e-4 * scale + 1e-7, rtol=0)


def plain_bridge_loss(stock, batch, eos_sees_target):
    """
    A bridge step of text targets written straight down: the stock base model's layers on the padded batch, the mask of
    the method's table cell by cell, logits of every token.
    """
    ids, segments = batch["input_ids"], batch["segment_ids"]
    embeds = stock.get_input_embeddings()(ids)
    is_image, deepstack = ids == IMAGE_ID, {}
    if bool(is_image.any()):
        features = stock.get_image_features(batch["pixel_values"], batch["image_grid_thw"], return_dict=True)
        embeds = embeds.masked_scatter(is_image[..., None], torch.cat(list(features.pooler_output)))
        if "deepstack_features" in features:
            layers = [torch.cat(list(layer)) for layer in features.deepstack_features]
            deepstack = {"visual_pos_masks": is_image, "deepstack_visual_embeds": layers}
    positions, _ = stock.get_rope_index(
        ids,
        mm_token_type_ids=is_image.long(),
        image_grid_thw=batch.get("image_grid_thw"),
        attention_mask=batch["attention_mask"],
    )
    sees = {
        SOURCE: (SOURCE, EOS),
        EOS: (SOURCE, EOS, TARGET) if eos_sees_target else (SOURCE, EOS),
        TARGET: (EOS, TARGET),
        PADDING: (PADDING,),  # a softmax over nothing is NaN
    }
    mask = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row, places in enumerate(segments.tolist()):
        for query, segment in enumerate(places):
            for key, other in enumerate(places):
                mask[row, 0, query, key] = other in sees[segment]
    text = stock.language_model
    hidden = text(
        inputs_embeds=embeds,
        position_ids=positions,
        attention_mask=mask,
        use_cache=False,
        **deepstack,
    ).last_hidden_state
    logits = hidden @ stock.get_input_embeddings().weight.T
    losses = []
    for segment in (SOURCE, TARGET):
        chosen = (batch["labels"] != -100) & (segments == segment)
        if bool(chosen.any()):
            losses.append(F.cross_entropy(logits[:, :-1][chosen[:, 1:]], batch["labels"][chosen]))
    return torch.stack(losses).sum()


@pytest.mark.parametrize("eos_sees_target", [True, False])
@pytest.mark.parametrize("direction", ["image_to_text", "text_to_text"])
def test_a_bridge_step_is_that_of_stock_layers_under_the_mask_of_the_table(model_type, direction, eos_sees_target):
    """Loss and every gradient, to 1e-5, with an image of another size and padding in the batch."""
    batch = bridge_batch(direction)
    ours = reconstruction(model_type, eos_sees_target=eos_sees_target).double().train()
    stock = CLASSES[model_type][2]._from_config(ours.config, attn_implementation="sdpa").double().train()
    stock.load_state_dict(ours.model.state_dict())
    if "pixel_values" in batch:
        for name in ("pixel_values", "pixel_labels"):
            batch[name] = batch[name].double()
    output = ours(**{name: value for name, value in batch.items() if name != "unit_mask"})
    output.loss.backward()
    expected = plain_bridge_loss(stock, batch, eos_sees_target)
    expected.backward()
    torch.testing.assert_close(output.loss.double(), expected, atol=1e-5, rtol=0)
    wanted = {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}
    found = {name: p.grad for name, p in ours.model.named_parameters() if p.grad is not None}
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-5, rtol=1e-5, msg=name)


@pytest.mark.parametrize("bridge", ["layerwise", "embedding"])
def test_every_parameter_of_the_bridge_learns(model_type, bridge):
    model = reconstruction(model_type, bridge).train()
    model(**bridge_batch("both_to_both")).loss.backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


def test_chunked_loss_is_the_plain_one_with_its_gradients():
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(37, 16, generator=generator, requires_grad=True)
    weight = torch.randn(50, 16, generator=generator, requires_grad=True)
    labels = torch.randint(0, 50, (37,), generator=generator)
    losses, likeliest = masked_token_loss(hidden, weight, labels, chunk_size=8)
    logits = hidden @ weight.T
    expected = F.cross_entropy(logits, labels, reduction="none")
    torch.testing.assert_close(losses, expected)
    assert torch.equal(likeliest, logits.argmax(-1))
    for ours, plain in zip(
        torch.autograd.grad(losses.mean(), (hidden, weight)),
        torch.autograd.grad(expected.mean(), (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, plain)


def test_a_patch_of_one_colour_is_zeros():
    assert torch.equal(normalize_patches(torch.full((2, 5), 3.0)), torch.zeros(2, 5))


def test_nothing_masked_is_an_error(model_type):
    batch = bridge_batch("text_to_text")
    batch["labels"][:] = -100
    with pytest.raises(ValueError, match="Nothing is masked"):
        reconstruction(model_type)(**batch)


def test_the_eos_sees_the_target_by_default_in_the_layerwise_bridge_alone(backbone):
    assert CocoaForReconstruction(backbone).eos_sees_target
    assert not CocoaForReconstruction(backbone, bridge="embedding").eos_sees_target
    assert not CocoaForReconstruction(backbone, eos_sees_target=False).eos_sees_target
    with pytest.raises(ValueError, match="eos_sees_target=True needs bridge='layerwise'"):
        CocoaForReconstruction(backbone, bridge="embedding", eos_sees_target=True)


def test_an_unknown_bridge_is_an_error(backbone):
    with pytest.raises(ValueError, match="layerwise.*embedding.*'eos'"):
        CocoaForReconstruction(backbone, bridge="eos")


def test_heads_come_back(tmp_path, model_type):
    model = reconstruction(model_type, "embedding")
    model.model.save_pretrained(tmp_path)
    model.save_heads(tmp_path)
    again = CocoaForReconstruction.from_pretrained(tmp_path, bridge="embedding")
    for name, value in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    # Another bridge starts its projection anew, or has none.
    assert CocoaForReconstruction.from_pretrained(tmp_path).bridge_projection is None


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_model_comes_back_and_is_an_embedding_model_too(tmp_path, model_type, tied):
    model = reconstruction(model_type, "embedding")
    if not tied:
        model.config.tie_word_embeddings = False
        embeddings = model.model.get_input_embeddings().weight.detach()
        model = CocoaForReconstruction(model.model, lm_head=torch.randn_like(embeddings), bridge="embedding")
    assert isinstance(model, PreTrainedModel) and model.base_model is model.model
    model.save_pretrained(tmp_path / "one")
    again = CocoaForReconstruction.from_pretrained(tmp_path / "one", bridge="embedding")
    doubled = {name: 2 * value for name, value in model.state_dict().items()}
    again.save_pretrained(tmp_path / "two", state_dict=doubled)
    for folder, expected in (("one", model.state_dict()), ("two", doubled)):
        found = CocoaForReconstruction.from_pretrained(tmp_path / folder, bridge="embedding").state_dict()
        assert found.keys() == expected.keys()
        backbones = [
            load(tmp_path / folder).state_dict()
            for load in (load_backbone, partial(AutoModel.from_pretrained, trust_remote_code=True))
        ]
        for name, value in expected.items():
            assert torch.equal(found[name], value), name
            if name.startswith("model."):
                assert all(torch.equal(state[name.removeprefix("model.")], value) for state in backbones), name


@pytest.mark.parametrize("way", ["save_pretrained", "push_to_hub"])
def test_a_model_is_pushed_with_its_heads(api, hub, tmp_path, model_type, way):
    model = reconstruction(model_type)
    if way == "push_to_hub":
        model.push_to_hub("org/warmup", private=True)
    else:
        model.save_pretrained(tmp_path / "folder", push_to_hub=True, repo_id="org/warmup", private=True)
    repository = hub.repository("org/warmup")
    files = set(repository.head().files)
    assert repository.private and {HEADS_FILE, "model.safetensors", "modules.json", "modeling_cocoa.py"} <= files
    again = CocoaForReconstruction.from_pretrained("org/warmup").state_dict()
    for name, value in model.state_dict().items():
        assert torch.equal(again[name], value), name


def test_heads_do_not_change_the_backbone_that_they_are_made_for(backbone):
    """Neither its weights nor adapters in it, which transformers would take for weights that are missing."""
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False), backbone)
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    CocoaForReconstruction(backbone)
    for name, value in backbone.state_dict().items():
        assert torch.equal(before[name], value), name


def test_heads_that_are_missing_are_said(tmp_path, model_type, caplog):
    model = reconstruction(model_type, "layerwise")
    model.model.save_pretrained(tmp_path)
    CocoaForReconstruction.from_pretrained(tmp_path)
    assert not caplog.text, "it was not pre-trained"
    attach_mask_token(model.model, 5)
    model.model.save_pretrained(tmp_path)
    CocoaForReconstruction.from_pretrained(tmp_path)
    assert "The reconstruction heads are new" in caplog.text


def test_an_untied_head_is_read_from_the_generative_checkpoint(tmp_path, model_type):
    config = tiny_config(model_type)
    config.tie_word_embeddings = False
    generative = CLASSES[model_type][3](config)
    generative.save_pretrained(tmp_path, max_shard_size="100KB")
    assert torch.equal(read_lm_head(tmp_path), generative.lm_head.weight)
    model = CocoaForReconstruction.from_pretrained(tmp_path)
    assert torch.equal(model.lm_head.weight, generative.lm_head.weight)
    model.model.save_pretrained(tmp_path / "embedding")
    with pytest.raises(ValueError, match="no text head"):
        CocoaForReconstruction.from_pretrained(tmp_path / "embedding")


def test_the_mask_token_starts_as_the_mean_and_is_kept(model_type, backbone):
    weight = backbone.get_input_embeddings().weight
    mean = weight.detach().mean(0)
    attach_mask_token(backbone, MASK_ID)
    torch.testing.assert_close(weight[MASK_ID], mean)
    assert backbone.config.cocoa["mask_token_id"] == MASK_ID
    trained = weight.detach().clone()
    attach_mask_token(backbone, MASK_ID)
    assert torch.equal(weight, trained), "a trained mask token is not initialised again"
    with pytest.raises(ValueError, match=f"mask token {MASK_ID}.*{MASK_ID + 1}"):
        attach_mask_token(backbone, MASK_ID + 1)


def test_a_mask_token_without_a_row_is_an_error(backbone):
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        attach_mask_token(backbone, 5000)


def test_counts_of_a_whole_step_make_its_parts_add_up(model_type):
    """Two batches divided by the counts of both have the gradients of the two as one batch."""
    model = reconstruction(model_type).train()
    whole = bridge_batch("both_to_both")
    model(**whole).loss.backward()
    expected = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    counts = count_losses(whole["labels"], whole["segment_ids"], whole["unit_mask"])
    once = model(**whole, loss_counts=2 * counts)
    assert float(once.losses["image"]) == pytest.approx(float(model(**whole).losses["image"])), "means stay means"
    for _ in range(2):
        model(**whole, loss_counts=2 * counts).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("bridge", ["layerwise", "embedding"])
@pytest.mark.parametrize("attn_implementation", ["sdpa", "eager"])
def test_a_batch_of_texts_lets_every_weight_take_part(model_type, bridge, attn_implementation):
    model = reconstruction(model_type, bridge, attn_implementation).train()
    batch = bridge_batch("text_to_text")
    plain = model(**batch)
    plain.loss.backward()
    expected = {name: parameter.grad for name, parameter in model.named_parameters()}
    assert any(gradient is None for gradient in expected.values())
    model.zero_grad()
    output = model(**batch, use_all_parameters=True)
    assert float(output.loss.detach()) == float(plain.loss.detach())
    output.loss.backward()
    for name, parameter in model.named_parameters():
        wanted = torch.zeros_like(parameter) if expected[name] is None else expected[name]
        torch.testing.assert_close(parameter.grad, wanted, rtol=1e-5, atol=1e-7, msg=name)
