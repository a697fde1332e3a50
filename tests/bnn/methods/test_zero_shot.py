"""The base model as a method."""

import pytest
import torch

from bnn.methods.mle import MLE
from bnn.methods.zero_shot import ZeroShot

LORA = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@torch.no_grad()
def test_predictions_are_the_base_models_also_after_saving(make_llama, ids, tmp_path):
    method = ZeroShot()
    expected = make_llama()(input_ids=ids).logits
    model = method.adapt(make_llama(), LORA).eval()
    assert torch.equal(model(input_ids=ids).logits, expected)
    method.save(model, tmp_path)
    assert torch.equal(method.load(make_llama(), tmp_path).eval()(input_ids=ids).logits, expected)


def test_it_is_one_deterministic_prediction_without_training():
    method = ZeroShot()
    assert (method.trains, method.stochastic, method.fitted_to) == (False, False, ())
    assert method.modes(10) == ["mean"]


def test_a_trained_adapter_is_refused(make_llama, tmp_path):
    model = MLE().adapt(make_llama(), LORA)
    (last,) = (p for n, p in model.named_parameters() if "layers.1.self_attn.v_proj.lora_B" in n)
    with torch.no_grad():
        last[0, 0] = 1e-3
    MLE().save(model, tmp_path)
    with pytest.raises(ValueError, match=r"B of .*layers.1.self_attn.v_proj is not 0: leave out train.init_adapter"):
        ZeroShot().load(make_llama(), tmp_path)


def test_a_start_off_zero_is_refused(make_llama):
    with pytest.raises(ValueError, match=r"method=zero_shot is the base model, but B of .*q_proj is not 0"):
        ZeroShot().adapt(make_llama(), {**LORA, "init_lora_weights": False})
