"""What a method offers to the training script."""

import pytest
import torch

from bnn.layers import InducingFactor
from bnn.methods import MLE, SGP
from bnn.methods.base import check_targets, trainable
from bnn.methods.sgp import SCALES
from bnn.sampler import active_factors

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
POSTERIORS = [
    {},
    {"family": "matrix_normal"},
    {"family": "full", "whitened": False},
    {"family": "ensemble", "members": 2},
    {"flow_depth": 2, "flow_hidden": 8},
    {"learn_lambda": False, "learn_prior_sd": False},
    {"conditional_noise": False},
]


def sgp(scale_lr_factor: float = 3.0, **posterior) -> SGP:
    return SGP(scale_lr_factor, 0.5, True, True, {"inducing_rows": 5, "inducing_cols": 5, **posterior})


@pytest.mark.parametrize("posterior", POSTERIORS, ids=str)
def test_sgp_groups_hold_every_trainable_parameter_once(posterior, make_llama):
    method = sgp(**posterior)
    model = method.adapt(make_llama(), LORA)
    groups = method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    updated = [p for group in groups for p in group["params"]]
    assert len({id(p) for p in updated}) == len(updated)
    assert sum(p.numel() for p in updated) == sum(p.numel() for _, p in trainable(model))
    before = {name: p.clone() for name, p in trainable(model)}
    for p in updated:
        p.grad = torch.ones_like(p)
    torch.optim.SGD(groups).step()
    assert all((before[name] - p).abs().min() > 1e-3 for name, p in trainable(model))


def test_sgp_groups_separate_scales_from_locations(make_llama):
    method = sgp()
    model = method.adapt(make_llama(), LORA)
    others, scales = method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    names = {id(leaf): n for f in active_factors(model) for n, leaf in f._leaves().items()}
    assert {names[id(p)] for p in others["params"]} == {"Z_r", "Z_c", "raw_loc"}
    assert {names[id(p)] for p in scales["params"]} == {"raw_D_r", "raw_D_c", "raw_sd", "raw_lambda", "raw_prior_sd"}
    assert (others["lr"], scales["lr"]) == (0.01, pytest.approx(0.03))
    assert others["weight_decay"] == scales["weight_decay"] == 0.0


@pytest.mark.parametrize("antithetic", [True, False])
def test_the_second_half_of_the_draws_of_a_step_mirrors_the_first(make_llama, antithetic):
    method = SGP(5.0, 0.5, antithetic, True, {"inducing_rows": 5, "inducing_cols": 5})
    model = method.adapt(make_llama(), LORA)
    factor = active_factors(model)[0]

    def gaps(n: int) -> list[float]:
        with torch.no_grad(), method.sample(model, n, torch.Generator().manual_seed(0)):
            odd = factor.weight.reshape(n, *factor.weight.shape[-2:]) - factor.mean_weight()
        return [float((odd[i] + odd[i + n // 2]).abs().max() / odd.abs().max()) for i in range(n // 2)]

    assert all((gap < 1e-4) == antithetic for gap in gaps(4))
    assert gaps(3)[0] > 0.1


def test_sgp_groups_separate_the_flow(make_llama):
    method = sgp(flow_depth=1, flow_hidden=8)
    model = method.adapt(make_llama(), LORA)
    others, _, flow = method.parameter_groups(model, lr=0.01, weight_decay=0.0)
    assert flow["lr"] == pytest.approx(0.005)
    networks = sum(p.numel() for name, p in trainable(model) if ".flow." in name)
    assert sum(p.numel() for p in flow["params"]) == networks > sum(p.numel() for p in others["params"])


def test_every_raw_parameter_is_a_scale_or_a_location(make_llama):
    """A family with a new parameter must say at which learning rate it goes."""
    names = set()
    for posterior in POSTERIORS:
        model = sgp(**posterior).adapt(make_llama(), LORA)
        factors = [m for m in model.modules() if isinstance(m, InducingFactor)]
        names |= {name for factor in factors for name, _ in factor.named_parameters(recurse=False)}
    assert names == {*SCALES, "Z_r", "Z_c", "raw_loc", "raw_members"}


def test_sgp_refuses_weight_decay(make_llama):
    method = sgp()
    with pytest.raises(ValueError, match=r"weight_decay=0.1 would be a second"):
        method.parameter_groups(method.adapt(make_llama(), LORA), lr=0.01, weight_decay=0.1)


def test_sgp_samples_and_learns(make_llama, ids):
    """Fifteen steps on one batch with one draw each must lower the loss of the mean."""
    method = sgp(scale_lr_factor=1.0)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = method.adapt(make_llama(), LORA)
    assert method.stochastic
    optimizer = torch.optim.AdamW(method.parameter_groups(model, lr=0.02, weight_decay=0.0), foreach=False)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        before = model(input_ids=ids, labels=ids).loss
    for _ in range(15):
        optimizer.zero_grad()
        with method.sample(model, 1, generator) as live:
            (model(input_ids=ids, labels=ids).loss + 1e-6 * live.kl()).backward()
        optimizer.step()
    with torch.no_grad():
        assert model(input_ids=ids, labels=ids).loss < 0.9 * before


def test_mle_is_one_deterministic_adapter_without_kl(make_llama, ids):
    method = MLE()
    model = method.adapt(make_llama(), LORA).eval()
    assert not method.stochastic
    with torch.no_grad():
        outside = model(input_ids=ids).logits
        with method.sample(model, 1, None) as live:
            assert torch.equal(model(input_ids=ids).logits, outside)
    assert live.kl().item() == 0
    (group,) = method.parameter_groups(model, lr=0.01, weight_decay=0.1)
    assert {id(p) for p in group["params"]} == {id(p) for _, p in trainable(model)}
    assert (group["lr"], group["weight_decay"]) == (0.01, 0.1)


@pytest.mark.parametrize("method", [MLE(), sgp()], ids=["mle", "sgp"])
def test_an_unknown_target_is_refused_with_near_matches(method, make_llama):
    with pytest.raises(
        ValueError, match=r"'q_prj' matches no linear layer of the model: did you mean .*q_proj"
    ) as error:
        method.adapt(make_llama(), {**LORA, "target_modules": ["v_proj", "q_prj"]})
    assert "\n" not in str(error.value)


def test_a_target_unlike_any_is_refused_with_the_list(make_llama):
    with pytest.raises(ValueError, match=r"'c_attn'.*the model has .*down_proj, .*k_proj"):
        check_targets(make_llama(), ["c_attn"])


@pytest.mark.parametrize("method", [MLE(), sgp()], ids=["mle", "sgp"])
def test_all_linear_layers_but_the_output_embedding(method, make_llama):
    base = make_llama()
    linear = {name for name, m in base.named_modules() if isinstance(m, torch.nn.Linear) and name != "lm_head"}
    model = method.adapt(base, {**LORA, "target_modules": "all-linear"})
    assert {name.partition(".lora_")[0].removeprefix("base_model.model.") for name, _ in trainable(model)} == linear


def test_full_paths_are_targets_too(make_llama):
    model = make_llama()
    model.model.norm = torch.nn.RMSNorm(16, elementwise_affine=False)  # its weight is None
    check_targets(model, ["q_proj", "model.layers.0.mlp.up_proj", "lm_head"])
    with pytest.raises(ValueError, match=r"'proj' matches no"):
        check_targets(make_llama(), ["proj"])
