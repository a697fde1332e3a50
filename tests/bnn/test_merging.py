"""Merging the posterior mean into the base weights."""

import pytest
import torch
from bnn_cases import gap, logits_of, seeded
from peft import get_peft_model
from torch import nn
from transformers import (
    BertConfig,
    BertLMHeadModel,
    BertModel,
    EncoderDecoderModel,
    GPT2Config,
    GPT2LMHeadModel,
    ViTConfig,
    ViTModel,
)

import bnn
from bnn.layers import InducingFactor
from bnn.sampler import active_factors


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merging_gives_the_mean_model(safe_merge, make_adapted, ids):
    model = make_adapted()
    mean = logits_of(model, ids)
    merged = model.merge_and_unload(safe_merge=safe_merge)
    assert not any(isinstance(m, InducingFactor) for m in merged.modules())
    assert gap(logits_of(merged, ids), mean) < 1e-5


def test_unmerging_restores_base_and_draws(make_adapted, make_llama, ids):
    model = make_adapted()
    mean = logits_of(model, ids)
    with bnn.sample(model, 1, seeded()):
        drawn = logits_of(model, ids)
    model.merge_adapter()
    assert gap(logits_of(model, ids), mean) < 1e-5
    model.unmerge_adapter()
    with model.disable_adapter():
        assert gap(logits_of(model, ids), logits_of(make_llama(), ids)) < 1e-6
    with bnn.sample(model, 1, seeded()):
        assert gap(logits_of(model, ids), drawn) < 1e-6


def test_merging_inside_a_sample_is_refused(make_adapted, ids):
    model = make_adapted()
    with bnn.sample(model, 1, seeded()):
        before = logits_of(model, ids)
        for merge in (model.merge_adapter, model.merge_and_unload, model.unload):
            with pytest.raises(ValueError, match="samples are live"):
                merge()
        assert torch.equal(logits_of(model, ids), before)


def test_sampling_a_merged_model_is_refused(make_adapted):
    """PEFT skips the factors of a merged layer, so every draw would silently be the mean."""
    model = make_adapted()
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"), bnn.sample(model, 1, seeded()):
        pass


@pytest.mark.parametrize("tied", [False, True])
def test_output_head_leaves_the_embedding_alone(tied, make_llama, make_adapted, ids):
    base = make_llama(tied=tied)
    embedding = base.get_input_embeddings().weight.detach().clone()
    model = make_adapted(base, target_modules=["lm_head", "q_proj"])
    mean = logits_of(model, ids)
    merged = model.merge_and_unload()
    assert gap(logits_of(merged, ids), mean) < 1e-5
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    assert gap(merged.get_output_embeddings().weight, make_llama(tied=tied).get_output_embeddings().weight) > 1e-3


def test_a_tied_head_of_any_name_leaves_the_embedding_alone(ids):
    config = BertConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, is_decoder=True
    )
    base = BertLMHeadModel(config).eval()
    assert base.cls.predictions.decoder.weight is base.get_input_embeddings().weight
    model = get_peft_model(base, bnn.SGPLoraConfig(r=4, target_modules=["decoder"], init_lora_weights=False)).eval()
    before, table = logits_of(model, ids), base.get_input_embeddings().weight.clone()
    model.merge_adapter()
    assert torch.equal(base.get_input_embeddings().weight, table)
    assert gap(logits_of(model, ids), before) < 1e-4


def test_a_tied_head_of_a_model_that_is_no_transformer(ids):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.lm_head = nn.Embedding(61, 16), nn.Linear(16, 61, bias=False)
            self.lm_head.weight = self.table.weight

        def forward(self, x):
            return self.lm_head(self.table(x))

    model = get_peft_model(Model(), bnn.SGPLoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        before = model(ids)
        model.merge_adapter()
        assert gap(model(ids), before) < 1e-4


def test_two_layers_of_one_weight():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16, bias=False), nn.Linear(16, 16, bias=False)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).tanh())

    model = get_peft_model(Model(), bnn.SGPLoraConfig(r=4, target_modules=["b"], init_lora_weights=False))
    x = torch.eye(16)
    with torch.no_grad():
        before = model(x)
        model.merge_adapter()
        assert gap(model(x), before) < 1e-5


def test_a_decoder_s_head_tied_to_its_own_embedding(ids):
    """Not to the one that an encoder-decoder model names its input embedding."""
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = BertModel(BertConfig(vocab_size=61, **small))
    decoder = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=16, n_layer=1, n_head=2, add_cross_attention=True))
    base = EncoderDecoderModel(encoder=encoder, decoder=decoder).eval()
    model = get_peft_model(base, bnn.SGPLoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False)).eval()
    with torch.no_grad():
        before = model(input_ids=ids, decoder_input_ids=ids).logits
        merged = model.merge_and_unload()
        assert gap(merged(input_ids=ids, decoder_input_ids=ids).logits, before) < 1e-5


def test_a_model_whose_input_embedding_has_no_weight_of_that_name():
    """Patches of an image are embedded by a convolution inside."""
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=8, patch_size=4
    )
    adapter = bnn.SGPLoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    model, pixels = get_peft_model(ViTModel(config).eval(), adapter).eval(), torch.ones(1, 3, 8, 8)
    with torch.no_grad():
        before = model(pixel_values=pixels).last_hidden_state
        assert gap(model.merge_and_unload()(pixel_values=pixels).last_hidden_state, before) < 1e-5


def test_untying_is_this_model_s_alone(make_llama):
    """Another may have been made from the same configuration, which goes on being shared within each."""
    base = make_llama(tied=True)
    other = type(base)(base.config)
    model = get_peft_model(base, bnn.SGPLoraConfig(r=4, target_modules=["lm_head"]))
    assert other.config.tie_word_embeddings
    assert not model.config.tie_word_embeddings
    assert base.model.config is base.config
    assert base.model.layers[0].self_attn.config is base.config


def test_conv1d_target_of_gpt2(make_adapted, ids):
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=16, n_layer=2, n_head=2, initializer_range=0.3)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        base = GPT2LMHeadModel(config).double().eval()
    expected = logits_of(base, ids)
    settings = {"target_modules": ["c_attn"], "fan_in_fan_out": True}
    assert torch.equal(logits_of(make_adapted(base, start=True, **settings).unload(), ids), expected)
    model = make_adapted(base, **settings)
    assert {(f.spec.d_out, f.spec.d_in) for f in active_factors(model)} == {(4, 16), (48, 4)}
    with bnn.sample(model, 2, seeded()):
        tiled = logits_of(model, ids.repeat(2, 1))
    with bnn.sample(model, 1, seeded()):
        assert gap(tiled[: len(ids)], logits_of(model, ids)) < 1e-6
    mean = logits_of(model, ids)
    assert gap(mean, expected) > 1e-3
    assert gap(logits_of(model.merge_and_unload(), ids), mean) < 1e-5


def test_rank_pattern_and_rslora_reach_the_factors(make_adapted, ids):
    model = make_adapted(rank_pattern={"v_proj": 2}, use_rslora=True)
    assert {min(f.spec.d_out, f.spec.d_in) for f in active_factors(model)} == {2, 4}
    mean = logits_of(model, ids)
    assert gap(logits_of(model.merge_and_unload(), ids), mean) < 1e-5
