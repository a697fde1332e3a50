"""A trained LoRA made Bayesian around its own weights."""

import warnings

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor

import bnn
from bnn import SGPLoraConfig
from bnn.layers import InducingFactor

INDUCING = {"inducing_rows": 5, "inducing_cols": 5}


@pytest.fixture
def make_lora(make_llama):
    """Plain LoRA with A and B off their start."""

    def make(adapter_name: str = "default", **settings) -> PeftModel:
        config = LoraConfig(
            **{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | settings
        )
        with torch.random.fork_rng():
            torch.manual_seed(2)
            model = get_peft_model(make_llama(), config, adapter_name)
        noise = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=noise))
        return model.eval()

    return make


@torch.no_grad()
def logits_of(model, ids: Tensor) -> Tensor:
    return model(input_ids=ids).logits


def factors_of(model) -> list[InducingFactor]:
    return [m for m in model.modules() if isinstance(m, InducingFactor)]


@pytest.mark.parametrize(
    "posterior",
    [
        {},
        {"family": "full"},
        {"family": "ensemble", "members": 3},
        {"family": "ensemble", "members": 3, "flow_depth": 1},  # the identity at first
        {"whitened": False},
    ],
    ids=str,
)
def test_mean_is_the_lora_model(posterior, make_lora, make_llama, ids):
    lora = make_lora()
    expected = logits_of(lora, ids)
    assert (expected - logits_of(make_llama(), ids)).abs().max() > 1e-2
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="an inducing matrix")
        model = bnn.bayesianize_(lora, **INDUCING, **posterior)
    assert isinstance(model, PeftModel)
    assert len(factors_of(model)) == 8
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-4)


def test_accepts_a_configuration(make_lora, ids):
    expected = logits_of(make_lora(), ids)
    model = bnn.bayesianize_(make_lora(), SGPLoraConfig(family="full", q_sd=0.2, **INDUCING))
    assert {f.spec.family for f in factors_of(model)} == {"full"}
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-4)
    config = model.peft_config["default"]
    assert (config.r, config.lora_alpha, set(config.target_modules)) == (4, 8, {"q_proj", "v_proj"})


def test_adapter_is_chosen_by_name(make_lora, ids):
    lora = make_lora("mine")
    expected = logits_of(lora, ids)
    model = bnn.bayesianize_(lora, adapter_name="mine", **INDUCING)
    assert isinstance(model.peft_config["mine"], SGPLoraConfig)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-4)


def test_scaling_variants_are_kept(make_lora, ids):
    lora = make_lora(use_rslora=True, rank_pattern={"v_proj": 2}, alpha_pattern={"q_proj": 3})
    expected = logits_of(lora, ids)
    torch.testing.assert_close(logits_of(bnn.bayesianize_(lora, **INDUCING), ids), expected, rtol=0, atol=1e-4)


def test_result_samples_and_trains(make_lora, ids):
    model = bnn.bayesianize_(make_lora(), **INDUCING).train()
    with bnn.sample(model, 2, torch.Generator().manual_seed(0)) as live:
        loss = model(input_ids=ids.repeat(2, 1), labels=ids.repeat(2, 1)).loss
        (loss + 1e-4 * live.kl()).backward()
    parameters = [p for f in factors_of(model) for p in f.parameters()]
    assert all(p.requires_grad and p.grad is not None for p in parameters)
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in parameters}


def test_result_is_saved_and_loaded(make_lora, make_llama, ids, tmp_path):
    model = bnn.bayesianize_(make_lora(), **INDUCING, family="matrix_normal")
    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(make_llama(), tmp_path).eval()
    assert isinstance(loaded.peft_config["default"], SGPLoraConfig)
    assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))
    for m in (model, loaded):
        m.generator = torch.Generator().manual_seed(1)
    with bnn.sample(model, 1, model.generator), bnn.sample(loaded, 1, loaded.generator):
        assert torch.equal(logits_of(loaded, ids), logits_of(model, ids))


def test_result_is_merged_and_disabled(make_lora, make_llama, ids):
    model = bnn.bayesianize_(make_lora(), **INDUCING)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), logits_of(make_llama(), ids))
    mean = logits_of(model, ids)
    torch.testing.assert_close(logits_of(model.merge_and_unload(), ids), mean, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sizes", [(3, 5), (5, 3)], ids=str)
def test_inducing_sizes_below_the_rank_warn(sizes, make_lora):
    with pytest.warns(UserWarning, match="cannot represent a weight of rank 4"):
        bnn.bayesianize_(make_lora(), inducing_rows=sizes[0], inducing_cols=sizes[1])


def test_refuses_what_it_cannot_replace(make_lora, make_llama, make_adapted):
    with pytest.raises(ValueError, match=r"'default' is SGPLoraConfig, not plain LoRA"):
        bnn.bayesianize_(make_adapted())
    with pytest.raises(ValueError, match="LlamaForCausalLM is no PeftModel: give it a LoRA adapter"):
        bnn.bayesianize_(make_llama())
    with pytest.raises(ValueError, match=r"\['default'\].*'other' was asked for"):
        bnn.bayesianize_(make_lora(), adapter_name="other")
    two = make_lora()
    two.add_adapter("second", LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ValueError, match=r"\['default', 'second'\]"):
        bnn.bayesianize_(two)
    with pytest.raises(ValueError, match=r"either config or the fields \['q_sd'\]"):
        bnn.bayesianize_(make_lora(), SGPLoraConfig(), q_sd=0.1)


@pytest.mark.parametrize("setting", [{"use_dora": True}, {"lora_bias": True}], ids=str)
def test_refuses_lora_variants_that_sgp_does_not_have(setting, make_lora):
    with pytest.raises(ValueError, match=f"does not support {next(iter(setting))}"):
        bnn.bayesianize_(make_lora(**setting), **INDUCING)


def test_refuses_before_anything_is_replaced(make_lora, ids):
    merged = make_lora()
    merged.merge_adapter()
    embedding = make_lora(target_modules=["q_proj", "embed_tokens"])
    invoked = make_lora(alora_invocation_tokens=[1, 2])
    for model, said in (
        (merged, "merged into .*q_proj.*: call unmerge_adapter first"),
        (embedding, "adapts linear layers, but target 'model.embed_tokens' is Embedding"),
        (invoked, "is a ALoraLinearVariant: remove its setting"),
    ):
        with pytest.raises(ValueError, match=said):
            bnn.bayesianize_(model, **INDUCING)
        assert not factors_of(model)
    diverged = make_lora()
    with torch.no_grad():
        diverged.get_parameter("base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight")[0, 0] = (
            torch.nan
        )
    with pytest.raises(ValueError, match=r"weights of model\.layers\.1\.self_attn\.q_proj are not all finite"):
        bnn.bayesianize_(diverged, **INDUCING)
    assert not factors_of(diverged)


def test_a_tied_head_leaves_the_embedding_alone(make_llama, ids):
    config = LoraConfig(r=4, target_modules=["q_proj", "lm_head"], init_lora_weights=False, task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        torch.manual_seed(2)
        model = bnn.bayesianize_(get_peft_model(make_llama(tied=True), config).eval(), **INDUCING)
    embedding, mean = model.get_input_embeddings().weight.detach().clone(), logits_of(model, ids)
    merged = model.merge_and_unload()
    assert torch.equal(merged.get_input_embeddings().weight, embedding)
    torch.testing.assert_close(logits_of(merged, ids), mean, rtol=0, atol=1e-5)


def test_further_adapters_join_the_result(make_lora, ids, tmp_path):
    model = bnn.bayesianize_(make_lora(), **INDUCING)
    mean = logits_of(model, ids)
    model.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "again")
    model.add_adapter("other", SGPLoraConfig(target_modules=["q_proj"], **INDUCING))
    model.set_adapter("again")
    assert torch.equal(logits_of(model, ids), mean)
    with pytest.raises(ValueError, match="Cannot combine adapters with different peft types"):
        model.add_adapter("plain", LoraConfig(target_modules=["q_proj"]))


def test_a_loaded_lora_becomes_a_posterior(make_lora, make_llama, ids, tmp_path):
    """As a user has it: trained elsewhere, loaded frozen or trainable."""
    expected = logits_of(make_lora(), ids)
    make_lora().save_pretrained(tmp_path)
    for trainable in (False, True):
        lora = PeftModel.from_pretrained(make_llama(), tmp_path, is_trainable=trainable).eval()
        model = bnn.bayesianize_(lora, **INDUCING)
        torch.testing.assert_close(logits_of(model, ids), expected, rtol=0, atol=1e-4)
        assert {p.requires_grad for f in factors_of(model) for p in f.parameters()} == {trainable}


@pytest.mark.parametrize("start", ["gaussian", "orthogonal"])
def test_how_the_lora_was_started_does_not_matter_where_the_base_was_kept(start, make_lora, ids):
    lora = make_lora(init_lora_weights=start)
    expected = logits_of(lora, ids)
    model = bnn.bayesianize_(lora, **INDUCING)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-3, atol=1e-3)


def test_layers_that_a_deleted_adapter_alone_had_do_not_matter(make_lora, ids):
    lora = make_lora()
    lora.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "v_proj", "o_proj"]))
    lora.delete_adapter("other")
    expected = logits_of(lora, ids)
    model = bnn.bayesianize_(lora, **INDUCING)
    torch.testing.assert_close(logits_of(model, ids), expected, rtol=1e-3, atol=1e-3)


def test_a_field_that_is_not_the_posteriors_is_named(make_lora):
    with pytest.raises(ValueError, match="lora_alpha is no field of the posterior: choose among conditional_noise"):
        bnn.bayesianize_(make_lora(), lora_alpha=32)
