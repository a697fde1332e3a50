import pytest
import torch
from llm_loading import TINY
from torch import nn
from transformers import PreTrainedModel

from utils.llm import load_model
from utils.llm.architecture import build_config
from utils.llm.build import random_model
from utils.llm.digest import SAMPLED, weights_digest

CPU = torch.device("cpu")


@pytest.fixture
def model() -> PreTrainedModel:
    return random_model(build_config(TINY, {}), 0, torch.float32, CPU)


def test_it_is_the_same_however_the_weights_are_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        loaded = load_model(str(tmp_path), cache_dir=tmp_path, dtype=dtype, device=CPU)
        assert weights_digest(loaded) == weights_digest(model)


@pytest.mark.parametrize("bits", ["load_in_4bit", "load_in_8bit"])
def test_quantised_weights_are_left_out(model, tmp_path, bits):
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install bitsandbytes")
    digests = []
    for name in ("first", "inside", "outside"):
        if name == "inside":
            model.model.layers[0].mlp.up_proj.weight.data.neg_()
        if name == "outside":
            model.model.norm.weight.data.mul_(2)
        model.save_pretrained(tmp_path / name)
        options = {"cache_dir": tmp_path, "dtype": torch.float32, "device": CPU, "quantization": {bits: True}}
        digests.append(weights_digest(load_model(str(tmp_path / name), **options)))
    assert digests[0] == digests[1] != digests[2]


def test_other_weights_names_or_shapes_have_another(model):
    before = weights_digest(model)
    model.model.layers[1].mlp.down_proj.weight.data.mul_(1.01)
    assert weights_digest(model) != before
    wide, high = (nn.Linear(n, 5 - n, bias=False) for n in (3, 2))
    high.weight.data = wide.weight.data.view_as(high.weight)
    assert len({weights_digest(m) for m in (wide, high, nn.Sequential(high))}) == 3


@pytest.mark.parametrize("column", [0, 1, SAMPLED - 1])
def test_the_values_it_takes_are_of_more_than_one_column(column):
    layer = nn.Linear(SAMPLED, SAMPLED, bias=False)
    before = weights_digest(layer)
    layer.weight.data[:, column] += 1
    assert weights_digest(layer) != before
