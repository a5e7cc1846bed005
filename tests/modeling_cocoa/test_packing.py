# SPDX-License-Identifier: Apache-2.0
"""Packed rows against plain references: the dense mask, the padded batch, the gradients of both."""

import copy
import pickle
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from modeling_cocoa import modeling_cocoa
from modeling_cocoa.attention import EOS, PADDING, SOURCE, TARGET, collaborative_mask
from modeling_cocoa.packed_attention import FLEX_ATTENTION, attend
from modeling_cocoa.packing import Spans, pack
from modeling_cocoa.pooling import last_token_indices
from tests.conftest import CLASSES, EOS_ID
from tests.modeling_cocoa.test_modeling import batch_of, rows, with_backend

SHAPE = st.lists(st.tuples(st.integers(0, 5), st.integers(0, 4), st.integers(0, 3)), min_size=1, max_size=6)


def segments_of(shapes, left):
    """A batch of rows with so many source tokens, an EOS, so many target tokens; padded on the left or right."""
    width = max(source + 1 + target + gap for source, target, gap in shapes)
    segment_ids = torch.full((len(shapes), width), PADDING)
    for row, (source, target, _) in enumerate(shapes):
        values = torch.tensor([SOURCE] * source + [EOS] + [TARGET] * target)
        start = width - len(values) if left else 0
        segment_ids[row, start : start + len(values)] = values
    return segment_ids


class Attention(torch.nn.Module):
    """What the kernels ask of an attention module."""

    num_key_value_groups = 2
    is_causal = False


@given(SHAPE, st.booleans(), st.booleans(), st.booleans())
def test_packed_attention_is_attention_under_the_dense_mask(shapes, left, flex, eos_sees_target):
    segment_ids = segments_of(shapes, left)
    generator = torch.Generator().manual_seed(len(shapes))
    query = torch.randn(*segment_ids.shape, 4, 8, generator=generator)
    key, value = (torch.randn(*segment_ids.shape, 2, 8, generator=generator) for _ in range(2))
    packing = pack(segment_ids, eos_sees_target)
    packed = (part.flatten(0, 1)[packing.index] for part in (query, key, value))
    implementation = FLEX_ATTENTION if flex else "sdpa"
    output = attend(Attention(), *packed, packing, implementation=implementation, scaling=0.5)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query.transpose(1, 2),
        key.transpose(1, 2),
        value.transpose(1, 2),
        attn_mask=collaborative_mask(segment_ids, eos_sees_target=eos_sees_target),
        scale=0.5,
        enable_gqa=True,
    )
    real = segment_ids != PADDING
    torch.testing.assert_close(
        packing.unpack(output, segment_ids.shape)[real], expected.transpose(1, 2).flatten(2)[real], atol=1e-5, rtol=0
    )


def by_boundaries(module, query, key, value, mask, **options):
    """What variable-length flash attention computes by its contract, sample after sample, in float32 on a CPU."""
    assert mask is None and options["is_causal"] is False and options["dropout"] == 0.0
    starts = {name: options[f"cu_seq_lens_{name}"].tolist() for name in "qk"}
    assert options["cu_seq_lens_q"].dtype == options["cu_seq_lens_k"].dtype == torch.int32
    assert (starts["q"][-1], starts["k"][-1]) == (query.shape[2], key.shape[2])
    spans = {name: list(pairwise(places)) for name, places in starts.items()}
    for name in "qk":
        assert options[f"max_length_{name}"] == max(end - start for start, end in spans[name])
    outputs = [
        torch.nn.functional.scaled_dot_product_attention(
            query[:, :, a:b], key[:, :, c:d], value[:, :, c:d], scale=options["scaling"], enable_gqa=True
        )
        for (a, b), (c, d) in zip(spans["q"], spans["k"], strict=True)
    ]
    return torch.cat(outputs, dim=2).transpose(1, 2), None


@given(SHAPE, st.booleans(), st.booleans())
def test_flash_attention_is_called_by_its_contract(shapes, left, eos_sees_target):
    """The kernel itself needs a GPU; a plain one takes its place."""
    segment_ids = segments_of(shapes, left)
    packing = pack(segment_ids, eos_sees_target)
    generator = torch.Generator().manual_seed(len(shapes))
    query = torch.randn(len(packing.index), 4, 8, generator=generator)
    key, value = (torch.randn(len(packing.index), 2, 8, generator=generator) for _ in range(2))
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ALL_ATTENTION_FUNCTIONS, "flash_attention_plain", by_boundaries)
        outputs = [
            attend(Attention(), query, key, value, packing, implementation=name, scaling=0.5)
            for name in ("flash_attention_plain", "sdpa")
        ]
    torch.testing.assert_close(*outputs, atol=1e-5, rtol=0)


@given(SHAPE, st.booleans())
def test_every_token_has_one_place(shapes, left):
    segment_ids = segments_of(shapes, left)
    packing = pack(segment_ids)
    places = (segment_ids.flatten() != PADDING).nonzero()[:, 0]
    assert packing.index.sort().values.tolist() == places.tolist()
    assert (segment_ids.flatten()[packing.index[packing.eos]] == EOS).all()
    assert (packing.index[packing.eos] // segment_ids.shape[1]).tolist() == list(range(len(shapes)))
    assert packing.order.sort().values.tolist() == list(range(len(shapes)))
    tokens = torch.arange(1.0, len(places) + 1)[:, None]
    back = packing.unpack(tokens, segment_ids.shape)
    assert back.flatten()[packing.index].tolist() == tokens.flatten().tolist()
    assert (back[segment_ids == PADDING] == 0).all()


def test_samples_of_one_length_attend_together():
    spans = Spans([2, 2, 5, 7, 7, 7])
    assert spans.counts == [2, 1, 3]
    assert spans.boundaries(torch.device("cpu")).tolist() == [0, 2, 4, 9, 16, 23, 30]


def test_a_row_of_padding_is_named():
    with pytest.raises(ValueError, match="Row 1 of the batch is padding only"):
        pack(torch.tensor([[SOURCE, EOS], [PADDING, PADDING]]))


@torch.no_grad()
@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("implementation", ["sdpa", FLEX_ATTENTION])
def test_the_eos_alone_is_the_eos_of_all(model_type, implementation, padding_side):
    model = with_backend(model_type, implementation)
    batch = batch_of(rows(model_type), padding_side)
    alone = model(**batch, eos_only=True)
    assert alone.last_hidden_state is None
    expected = with_backend(model_type, "eager")(**batch)
    torch.testing.assert_close(alone.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)
    whole = model(**batch)
    real = batch["attention_mask"].bool()
    torch.testing.assert_close(whole.last_hidden_state[real], expected.last_hidden_state[real], atol=1e-4, rtol=1e-4)
    assert (whole.last_hidden_state[~real] == 0).all()


def stock_gradients(model_type, batch, weights):
    """Of the stock class, made two-sided by its configuration, on the padded batch, with the last token's vector."""
    ours = with_backend(model_type, "sdpa")
    stock = CLASSES[model_type][2]._from_config(ours.config, attn_implementation="sdpa").train()
    stock.load_state_dict(ours.state_dict())
    hidden = stock(**batch, mm_token_type_ids=ours.media_types(batch["input_ids"])).last_hidden_state
    ends = last_token_indices(batch["attention_mask"])
    vectors = torch.nn.functional.normalize(hidden[torch.arange(len(ends)), ends], dim=-1)
    (vectors @ weights).sum().backward()
    return {name: p.grad for name, p in stock.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("padding_side", ["right", "left"])
@pytest.mark.parametrize("eos_only", [False, True])
@pytest.mark.parametrize("checkpointing", [None, False, True])
def test_gradients_are_those_of_the_stock_class(model_type, eos_only, checkpointing, padding_side):
    """`checkpointing`: none, or gradient checkpointing of either kind (reentrant or not)."""
    batch = batch_of(rows(model_type), padding_side)
    model = with_backend(model_type, "sdpa").train()
    weights = torch.randn(model.config.text_config.hidden_size, generator=torch.Generator().manual_seed(1))
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    (model(**batch, eos_only=eos_only).pooler_output @ weights).sum().backward()
    packed = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    expected = stock_gradients(model_type, batch, weights)
    assert packed.keys() == expected.keys()
    for name, gradient in expected.items():
        scale = gradient.abs().max()
        torch.testing.assert_close(packed[name], gradient, atol=float(1e-4 * scale) + 1e-7, rtol=0)


@pytest.mark.parametrize("patches", [1, 40])
def test_images_in_parts_are_images_together(model_type, patches, monkeypatch):
    """On a CPU the vision tower takes a few images at a time; in training too."""
    batch = batch_of(rows(model_type))

    def run():
        model = with_backend(model_type, "sdpa").train()
        vectors = model(**batch).pooler_output
        vectors[:, :8].sum().backward()
        return vectors, model.visual.patch_embed.proj.weight.grad

    together = run()
    monkeypatch.setattr(modeling_cocoa, "CPU_VISION_PATCHES", patches)
    for part, whole in zip(run(), together, strict=True):
        torch.testing.assert_close(part, whole, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_images_and_tokens_that_do_not_match_are_named(backbone):
    batch = batch_of(rows()[1:2])
    batch["input_ids"][0, 1] = 5
    with pytest.raises(ValueError, match="5 image tokens.*ask for 6"):
        backbone(**batch)


@torch.no_grad()
def test_a_copied_and_a_pickled_model_are_the_model(backbone):
    ids = torch.tensor([[3, 4, EOS_ID]])
    expected = backbone(input_ids=ids).pooler_output
    for again in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        assert torch.equal(again(input_ids=ids).pooler_output, expected)
        assert type(again.language_model.layers[0]) is type(backbone.language_model.layers[0])


def test_sharding_finds_the_layers_by_name(backbone):
    names = {type(module).__name__ for module in (*backbone.language_model.layers, *backbone.visual.blocks)}
    assert names == set(backbone._no_split_modules)


@pytest.mark.parametrize("eos_sees_target", [True, False])
def test_the_block_mask_of_a_packed_row_is_its_dense_mask(eos_sees_target):
    """Over several blocks, of which it holds those that have something to see, and no others."""
    segment_ids = segments_of([(300, 0, 0), (5, 150, 0), (0, 1, 0), (200, 40, 0)], left=False)
    packing = pack(segment_ids, eos_sees_target)
    dense = collaborative_mask(packing.segment_ids[None], packing.sample_ids[None], eos_sees_target)[0, 0]
    block_mask = packing.block_mask
    tokens = torch.arange(len(dense))
    visible = block_mask.mask_mod(0, 0, tokens[:, None], tokens[None])
    assert torch.equal(visible, dense)
    blocks = block_mask.to_dense()[0, 0].bool()
    padded = torch.zeros(blocks.shape[0] * 128, blocks.shape[1] * 128, dtype=torch.bool)
    padded[: len(dense), : len(dense)] = dense
    assert torch.equal(blocks, padded.unfold(0, 128, 128).unfold(1, 128, 128).any(-1).any(-1))
    assert not blocks.all()


def test_another_attention_is_named_not_replaced(model_type):
    model = with_backend(model_type, "sdpa")
    model.language_model.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="'paged.sdpa' is not known on packed rows.*'flash_attention_2'"):
        model(input_ids=torch.tensor([[3, 4, EOS_ID]]))


@torch.no_grad()
def test_attention_that_is_set_later_is_heeded(model_type):
    """On the model, or on one of its parts; and a padded batch that goes to the text model by itself is two-sided."""
    batch = batch_of(rows(model_type))
    model = with_backend(model_type, "sdpa")
    expected = model(**batch).pooler_output
    for name in ("eager", "sdpa", FLEX_ATTENTION, "eager", "sdpa"):
        model.set_attn_implementation(name)
        assert model.attention == name
        torch.testing.assert_close(model(**batch).pooler_output, expected, atol=1e-5, rtol=0)
    for part in (model.language_model, model.visual):
        part.set_attn_implementation("sdpa")
    torch.testing.assert_close(model(**batch).pooler_output, expected, atol=1e-5, rtol=0)
    model.set_attn_implementation({"text_config": "eager"})  # and the tower attends as before
    torch.testing.assert_close(model(**batch).pooler_output, expected, atol=1e-5, rtol=0)
    model.set_attn_implementation("sdpa")
    ids = torch.tensor([[3, 4, 5, EOS_ID]])
    embeds = model.get_input_embeddings()(ids)
    found = model.language_model(inputs_embeds=embeds, position_ids=torch.arange(4).expand(3, 1, -1))
    torch.testing.assert_close(found.last_hidden_state, model(input_ids=ids).last_hidden_state, atol=1e-5, rtol=0)


@torch.no_grad()
def test_positions_may_be_one_for_all_directions(backbone):
    ids = torch.tensor([[3, 4, 5, EOS_ID], [6, 7, 8, EOS_ID]])
    positions = torch.arange(4).expand(2, -1)
    given = backbone(input_ids=ids, position_ids=positions).pooler_output
    torch.testing.assert_close(given, backbone(input_ids=ids).pooler_output)


@torch.no_grad()
def test_what_cannot_be_heeded_is_refused(backbone):
    ids = torch.tensor([[3, 4, EOS_ID]])
    with pytest.raises(TypeError, match="mm_encoder_outputs"):
        backbone(input_ids=ids, mm_encoder_outputs={})
    batch = batch_of(rows()[1:2])
    del batch["pixel_values"]
    with pytest.raises(ValueError, match="images' pixels .or features. and their grids"):
        backbone(**batch)


def test_a_packing_moves_whole():
    """Where a model is spread over devices, each layer gets it on its own."""
    packing = pack(segments_of([(3, 2, 0), (1, 0, 0)], left=False))
    assert packing.to(torch.device("cpu")) is packing
    moved = packing.to(torch.device("meta"))
    assert all(value.is_meta for value in vars(moved).values() if isinstance(value, torch.Tensor))
    assert moved.sources == packing.sources


def test_an_adapter_of_the_patch_embedding_is_heeded(model_type):
    model = with_backend(model_type, "sdpa")
    batch = batch_of(rows(model_type))
    before = model(**batch).pooler_output
    adapted = get_peft_model(model, LoraConfig(target_modules=["patch_embed.proj"], init_lora_weights=False))
    assert (adapted(**batch).pooler_output - before).abs().max() > 1e-4
