"""Where a model's config states the width of its FFNs."""

from __future__ import annotations

import warnings

import pytest
import torch
import transformers as tf
from architectures import ARCHITECTURES, BY_NAME
from model_types.build import tiny_config
from torch import nn

from peft_fusion import FusionConfig, fuse
from peft_fusion.ffn import config_widths, find_ffns, stock


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
def test_every_architectures_attribute_is_found(architecture):
    model = architecture.make()
    ffns = find_ffns(model)
    places = config_widths(model, ffns, {ffn.name: 16 for ffn in ffns})
    assert {place.attribute for place in places.values()} == {architecture.attribute}
    assert {place.width for place in places.values()} == {16}
    assert all(place.configs[-1] is model.config for place in places.values())


def test_the_same_question_is_answered_once(monkeypatch):
    built = []

    def counted(kind, config):
        built.append(config.intermediate_size)
        return on_meta(kind, config)

    on_meta = stock.on_meta
    monkeypatch.setattr(stock, "on_meta", counted)
    stock._outline.cache_clear()
    for width in (16, 16, 24):
        llama = BY_NAME["llama"].make()
        config_widths(llama, (ffns := find_ffns(llama)), {ffn.name: width for ffn in ffns})
    assert built == [64, 16, 24]


def bart() -> tf.BartForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 99,
        "d_model": 32,
        "max_position_embeddings": 64,
        "encoder_layers": 2,
        "decoder_layers": 2,
    }
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return tf.BartForConditionalGeneration(
        tf.BartConfig(**sizes, **heads, encoder_ffn_dim=64, decoder_ffn_dim=64, pad_token_id=0)
    ).eval()


def test_encoder_and_decoder_have_attributes_of_their_own(tmp_path):
    config = FusionConfig(width_pattern={"decoder.*": 16, "encoder.*": 32})
    model = fuse(bart(), config)
    assert (model.config.encoder_ffn_dim, model.config.decoder_ffn_dim) == (32, 16)
    model.save_pretrained(tmp_path)
    stock = tf.BartForConditionalGeneration.from_pretrained(tmp_path).eval()
    ids = torch.arange(3, 9).unsqueeze(0)
    torch.testing.assert_close(stock(input_ids=ids).logits, model(input_ids=ids).logits)


def test_model_whose_config_states_no_width():
    sizes = {"vocab_size": 99, "hidden_size": 32, "n_layer": 2, "n_head": 4}
    model = tf.BloomForCausalLM(tf.BloomConfig(**sizes))
    with pytest.warns(UserWarning, match="no attribute for the width"):
        fuse(model, FusionConfig(ratio=0.5))


def test_part_of_the_layers_cannot_be_stated():
    llama = BY_NAME["llama"].make()
    ffns = find_ffns(llama)
    place = config_widths(llama, ffns, {ffns[0].name: 16})[ffns[0].name]
    with pytest.warns(UserWarning, match="`config.intermediate_size` now have different widths"):
        place.apply()
    assert llama.config.intermediate_size == 64


def gemma3n() -> tf.Gemma3nForCausalLM:
    config = tiny_config(tf.Gemma3nTextConfig)
    return tf.Gemma3nForCausalLM(config)


def test_lists_state_the_width_of_each_layer(tmp_path):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*could not be exported.*|.*stock transformers cannot.*")
        model = fuse(gemma3n(), FusionConfig(ratio=0.5, layers_to_transform=[1]))
    assert model.config.intermediate_size == [80, 40]
    model.save_pretrained(tmp_path)
    stock = tf.Gemma3nForCausalLM.from_pretrained(tmp_path)
    assert [ffn.width for ffn in find_ffns(stock)] == [80, 40]


def test_a_config_that_adjusts_its_width_is_taken_at_its_word():
    model = tf.Lfm2ForCausalLM(tiny_config(tf.Lfm2Config))
    (place,) = {id(one): one for one in config_widths(model, find_ffns(model), halves(model)).values()}.values()
    assert (place.attribute, place.also) == ("intermediate_size", (("block_auto_adjust_ff_dim", False),))
    place.apply()
    assert [ffn.width for ffn in find_ffns(tf.Lfm2ForCausalLM(model.config))] == list(halves(model).values())


def test_an_attribute_that_says_more_than_the_width_is_not_changed():
    """GLM-ASR's projector is as wide as its audio encoder's FFNs."""
    model = tf.GlmAsrForConditionalGeneration(tiny_config(tf.GlmAsrConfig))
    places = config_widths(model, find_ffns(model), halves(model))
    bad = {name for name, place in places.items() if not place.states_it}
    assert bad and all("audio_tower" in name for name in bad) and len(bad) < len(places)
    assert all("multi_modal_projector" in places[name].problem for name in bad)


def halves(model: nn.Module) -> dict[str, int]:
    return {ffn.name: ffn.width // 2 for ffn in find_ffns(model)}
