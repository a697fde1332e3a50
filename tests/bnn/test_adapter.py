"""SGP-LoRA as a PEFT method: its start, what it refuses, several adapters, merging."""

import pytest
import torch
from bnn_cases import gap, logits_of, seeded
from peft import LoraConfig, get_peft_model

import bnn
from bnn import SGPLoraConfig
from bnn.adapter import replace_factors
from bnn.layers import InducingFactor
from bnn.sampler import active_factors


@pytest.mark.parametrize(
    "config",
    [{}, {"whitened": False}, {"family": "full"}, {"family": "ensemble", "members": 3}, {"flow_depth": 1}],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_starts_exactly_at_the_base_model(dtype, config, make_llama, make_adapted, ids):
    model = make_adapted(make_llama(dtype), start=True, **config)
    assert torch.equal(logits_of(model, ids), logits_of(make_llama(dtype), ids))


@pytest.mark.parametrize("sampled", [False, True])
def test_starts_with_the_gradient_of_lora(sampled, make_llama, make_adapted, ids):
    """A point mass without conditional noise: Z_r of B gets LoRA's gradient for B times the gain, and A none."""
    model = make_adapted(start=True, family="ensemble", conditional_noise=False, mean_gain=3.0)
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    with torch.random.fork_rng():
        lora = get_peft_model(make_llama(), config).eval()
    factors = {name: m for name, m in model.named_modules() if isinstance(m, InducingFactor)}
    with torch.no_grad():
        for name, factor in factors.items():
            lora.get_submodule(name).weight.copy_(factor.mean_weight())
    lora(input_ids=ids, labels=ids).loss.backward()
    if sampled:
        with bnn.sample(model, 1, seeded()):
            model(input_ids=ids, labels=ids).loss.backward()
    else:
        model(input_ids=ids, labels=ids).loss.backward()
    for name, factor in factors.items():
        expected = lora.get_submodule(name).weight.grad
        if ".lora_B." in name:
            assert expected.abs().max() > 1e-3
            # 4 = r: the columns of B; factors are float32
            torch.testing.assert_close(factor.Z_r.grad[:4].mT, 3 * expected.float(), rtol=1e-4, atol=3e-6)
        else:
            assert not expected.any()
            assert not any(p.grad.any() for p in factor.parameters() if p.grad is not None)


def test_first_factor_starts_at_the_scale_of_lora(make_adapted):
    """PEFT's A is uniform with sd 0.58 / sqrt(d_in); 4 matrices of 64 entries give it within 20 %."""
    A = [f.mean_weight() for f in active_factors(make_adapted(start=True)) if f.spec.d_out == 4]
    assert torch.stack(A).std().item() == pytest.approx(0.577 / 16**0.5, rel=0.2)


def test_initialisation_is_reproducible(make_adapted):
    one, two = make_adapted(start=True), make_adapted(start=True)
    other = make_adapted(start=True, init_seed=1)
    for (name, a), b, c in zip(one.named_parameters(), two.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b), name
        if name.endswith("Z_r") and ".lora_A." in name:
            assert not torch.equal(a, c), name


def test_every_structural_setting_reaches_the_factors():
    settings = {
        "family": "ensemble",
        "members": 3,
        "flow_depth": 2,
        "flow_hidden": 7,
        "whitened": False,
        "lambda_max": 1.5,
        "conditional_noise": False,
        "jitter": 1e-4,
    }
    spec = SGPLoraConfig(inducing_rows=2, inducing_cols=3, **settings).factor_spec(6, 5)
    assert (spec.d_out, spec.d_in, spec.m_r, spec.m_c) == (6, 5, 2, 3)
    assert {name: getattr(spec, name) for name in settings} == settings


@pytest.mark.parametrize(
    "setting",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [[0, 2], [0, 2]]},
    ],
    ids=lambda setting: next(iter(setting)),
)
def test_unsupported_settings_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=f"SGP-LoRA does not support {next(iter(setting))}") as error:
        SGPLoraConfig(target_modules=["q_proj"], **setting)
    assert "\n" not in str(error.value)


def test_other_variants_of_lora_are_refused(make_adapted):
    """They compute with A and B in ways of their own, which draws do not follow."""
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.self_attn\.q_proj' is a ALoraLinearVariant"):
        make_adapted(alora_invocation_tokens=[1, 2])


def test_an_embedding_target_is_refused(make_adapted):
    with pytest.raises(ValueError, match=r"target 'model.embed_tokens' is Embedding: remove it") as error:
        make_adapted(target_modules=["q_proj", "embed_tokens"])
    assert "\n" not in str(error.value)


def test_disabled_adapter_is_the_base_model_sampled_or_not(make_llama, make_adapted, ids):
    model, base = make_adapted(), logits_of(make_llama(), ids)
    with model.disable_adapter():
        assert torch.equal(logits_of(model, ids), base)
    with bnn.sample(model, 1, seeded()), model.disable_adapter():
        assert torch.equal(logits_of(model, ids), base)
    assert gap(logits_of(model, ids), base) > 1e-3


@pytest.fixture
def two_adapters(make_adapted, make_llama):
    """Adapters ``first`` and ``second``, with those models on their own for reference."""
    first = make_adapted(adapter_name="first")
    second = make_adapted(adapter_name="second", family="full", init_seed=3)
    both = make_adapted(adapter_name="first")
    both.add_adapter("second", second.peft_config["second"])
    both.load_state_dict({k: v for k, v in second.state_dict().items() if ".second." in k}, strict=False)
    return both.eval(), first, second


def test_adapters_are_not_switched_under_draws(two_adapters):
    """Neither inside a context nor between two of one Sampler, whose factors are those of before."""
    both, *_ = two_adapters
    names = list(both.peft_config)
    both.set_adapter(names[0])
    sampler = bnn.Sampler(both)
    with sampler.draw(1), pytest.raises(ValueError, match=r"leave bnn\.sample before making another adapter active"):
        both.set_adapter(names[1])
    both.set_adapter(names[1])
    with (
        pytest.raises(ValueError, match="another adapter was made active after this Sampler was made"),
        sampler.draw(1),
    ):
        pass
    both.set_adapter(names[0])
    with sampler.draw(1):
        pass


def test_adapters_are_neither_added_nor_deleted_under_draws(two_adapters):
    """Nothing of one that was refused stays behind; a Sampler does not outlive its adapter, whatever has its name."""
    both, *_ = two_adapters
    with bnn.sample(both, 2):
        with pytest.raises(ValueError, match=r"leave bnn\.sample before adding an adapter"):
            both.add_adapter("third", SGPLoraConfig(r=2, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match=r"leave bnn\.sample before deleting an adapter"):
            both.delete_adapter("second")
    both.set_adapter("second")
    sampler = bnn.Sampler(both)
    both.add_adapter("third", SGPLoraConfig(r=3, target_modules=["v_proj"]))
    both.set_adapter("third")
    both.delete_adapter("second")
    both.add_adapter("second", both.peft_config["first"])
    both.set_adapter("second")
    with pytest.raises(ValueError, match="an adapter was replaced after this Sampler was made"), sampler.draw(1):
        pass
    both.set_adapter("third")
    assert {min(f.spec.d_out, f.spec.d_in) for f in active_factors(both)} == {3}
    both.delete_adapter("second")


def test_without_initialisation_b_starts_at_random_as_lora_s_does(make_llama, ids):
    models = []
    for kind in (SGPLoraConfig, LoraConfig):
        torch.manual_seed(0)
        config = kind(r=4, target_modules=["q_proj"], init_lora_weights=False)
        models.append(get_peft_model(make_llama(), config).eval())
    started, lora = (logits_of(model, ids) for model in models)
    assert gap(lora, logits_of(make_llama(), ids)) > 1e-3
    torch.testing.assert_close(started, lora, rtol=0, atol=1e-4)


def test_set_adapter_switches_mean_and_draws(two_adapters, ids):
    both, *singles = two_adapters
    for name, single in zip(("first", "second"), singles, strict=True):
        both.set_adapter(name)
        assert {id(f) for f in active_factors(both)} == {
            id(m) for path, m in both.named_modules() if isinstance(m, InducingFactor) and path.endswith(name)
        }
        torch.testing.assert_close(logits_of(both, ids), logits_of(single, ids), rtol=0, atol=1e-6)
        with bnn.sample(both, 2, seeded()), bnn.sample(single, 2, seeded()):
            tiled = ids.repeat(2, 1)
            torch.testing.assert_close(logits_of(both, tiled), logits_of(single, tiled), rtol=0, atol=1e-6)
    assert gap(logits_of(singles[0], ids), logits_of(singles[1], ids)) > 1e-3


def test_delete_adapter_leaves_the_other(two_adapters, ids):
    both, first, _ = two_adapters
    both.delete_adapter("second")
    torch.testing.assert_close(logits_of(both, ids), logits_of(first, ids), rtol=0, atol=1e-6)
    assert not any(".second." in name for name, _ in both.named_parameters())


def test_mixed_batch_uses_each_row_s_own_mean(two_adapters, make_llama, ids):
    both, first, second = two_adapters
    got = logits_of(both, ids, adapter_names=["second", "__base__", "first"])
    for row, model in enumerate((second, make_llama(), first)):
        torch.testing.assert_close(got[row], logits_of(model, ids)[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize("n", [1, 2])
def test_mixed_batch_inside_a_sample_is_refused(n, two_adapters, ids):
    """Draws belong to rows of the whole batch; PEFT's sub-batches would pair them with the wrong ones, or the mean."""
    both, tiled = two_adapters[0], ids[:2].repeat(2, 1)
    with bnn.sample(both, n, seeded()), pytest.raises(ValueError, match="adapter_names"):
        logits_of(both, tiled, adapter_names=["first", "first", "second", "__base__"])


def test_combining_adapters_is_refused(two_adapters):
    with pytest.raises(NotImplementedError, match="posteriors"):
        two_adapters[0].add_weighted_adapter(["first", "second"], [0.5, 0.5], "third")


class OneByte(torch.nn.Linear):
    """Stores its weight in a byte an entry and computes in bfloat16."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.weight = torch.nn.Parameter(like.weight.detach().to(torch.float8_e4m3fn), requires_grad=False)

    def forward(self, x):
        return torch.nn.functional.linear(x, self.weight.to(x.dtype))


class NoWeight(torch.nn.Linear):
    """Keeps what it computes with under another name, as some quantised layers do."""

    def __init__(self, like: torch.nn.Linear) -> None:
        super().__init__(like.in_features, like.out_features, bias=False)
        self.W_q, self.compute_dtype = like.weight.detach().clone(), like.weight.dtype
        del self.weight

    def forward(self, x):
        return torch.nn.functional.linear(x, self.W_q)


@torch.no_grad()
def test_draws_over_a_weight_of_one_byte_have_the_models_dtype(make_llama, make_adapted, ids):
    model = make_llama(torch.bfloat16)
    for layer in model.model.layers:
        layer.self_attn.q_proj = OneByte(layer.self_attn.q_proj)
    adapted = make_adapted(model)
    assert {f.compute_dtype for f in active_factors(adapted)} == {torch.bfloat16}
    active_factors(adapted)[0].to(torch.float8_e4m3fn)
    with bnn.sample(adapted, 1, seeded()):
        assert adapted(input_ids=ids).logits.isfinite().all()
        assert {f.weight.dtype for f in active_factors(adapted)} == {torch.bfloat16}


@torch.no_grad()
def test_a_layer_without_a_weight_says_what_it_computes_in(make_llama, ids):
    model = make_llama(torch.float32)
    expected = logits_of(model, ids)
    adapted = get_peft_model(model, SGPLoraConfig(r=4, lora_alpha=8, target_modules=["v_proj"]))
    for layer in adapted.base_model.model.model.layers:
        v_proj = layer.self_attn.v_proj
        v_proj.base_layer = NoWeight(v_proj.base_layer)
        replace_factors(v_proj, "default", SGPLoraConfig(), torch.nn.Identity())
    assert {f.compute_dtype for f in active_factors(adapted)} == {torch.float32}
    torch.testing.assert_close(logits_of(adapted, ids), expected)
    with bnn.sample(adapted, 2, seeded()):
        assert logits_of(adapted, ids.repeat(2, 1)).isfinite().all()


@pytest.mark.parametrize("config", [{}, {"flow_depth": 1}, {"family": "full"}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_default_dtype_is_not_that_of_the_posterior(dtype, config, make_llama, make_adapted, ids):
    base, expected = make_llama(torch.float32), make_adapted(make_llama(torch.float32), start=True, **config)
    torch.set_default_dtype(dtype)
    try:
        model = make_adapted(base, start=True, **config)
        assert torch.get_default_dtype() == dtype
    finally:
        torch.set_default_dtype(torch.float32)
    for name, own in expected.named_parameters():
        assert model.get_parameter(name).dtype == own.dtype, name
    assert torch.equal(logits_of(model, ids), logits_of(expected, ids))


def test_a_default_device_is_not_where_a_posterior_is_computed(make_llama):
    config = SGPLoraConfig(r=4, target_modules=["q_proj"], flow_depth=1)
    model = make_llama()
    with torch.device("meta"):
        adapted = get_peft_model(model, config)
    assert {p.device.type for n, p in adapted.named_parameters() if ".lora_" in n} <= {"cpu", "meta"}
    assert active_factors(adapted)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lambda_max": float("inf")}, "lambda_max=inf: expected a finite number above 0"),
        ({"q_sd": float("inf")}, "q_sd=inf: expected a finite number above 0"),
        ({"mean_gain": float("nan")}, "mean_gain=nan: expected a finite number above 0"),
        ({"jitter": -1e-6}, "jitter=-1e-06: expected a finite number, at least 0"),
        ({"jitter": float("inf")}, "jitter=inf: expected a finite number, at least 0"),
        ({"prior_sd": float("inf")}, "prior_sd=inf: expected a finite number above 0"),
        ({"lambda_init": 1.5}, "lambda_init must lie in"),
        ({"lambda_init": 0.0}, "lambda_init must lie in"),
        ({"lambda_init": 0.5, "lambda_max": 0.5}, "lambda_init must lie in"),
    ],
    ids=str,
)
def test_a_posterior_that_cannot_be_is_refused_before_a_model_is_touched(setting, message):
    with pytest.raises(ValueError, match=message):
        SGPLoraConfig(**setting)
