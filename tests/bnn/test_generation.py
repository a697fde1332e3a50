"""``generate`` with the posterior mean and with draws held, greedy, with the key-value cache."""

import pytest
import torch
from torch import Tensor

import bnn

NEW = 6


@torch.no_grad()
def generate(model, ids: Tensor, **kwargs) -> Tensor:
    mask = torch.ones_like(ids)
    return model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False, **kwargs)


@torch.no_grad()
def greedy_without_cache(model, ids: Tensor) -> Tensor:
    for _ in range(NEW):
        next_id = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1)
        ids = torch.cat([ids, next_id[:, None]], dim=1)
    return ids


def test_mean(make_adapted, ids):
    model = make_adapted()
    assert torch.equal(generate(model, ids), greedy_without_cache(model, ids))


@pytest.mark.parametrize("n", [1, 2])
def test_draws(n, make_adapted, ids):
    """Tiled generation equals that of each draw alone, and draws differ from the mean."""
    model = make_adapted(lambda_init=0.9, prior_sd=2.0)
    with bnn.sample(model, n, torch.Generator().manual_seed(0)):
        got = generate(model, ids.repeat(n, 1))
        assert torch.equal(got, greedy_without_cache(model, ids.repeat(n, 1)))
    generator = torch.Generator().manual_seed(0)
    for rows in got.split(len(ids)):
        with bnn.sample(model, 1, generator):
            assert torch.equal(rows, generate(model, ids))
    assert not torch.equal(got[: len(ids)], generate(model, ids))


def test_draws_survive_beam_search(make_adapted, ids):
    """Beams multiply each row in place, so the rows of one draw stay together."""
    model = make_adapted(lambda_init=0.9, prior_sd=2.0)
    with bnn.sample(model, 2, torch.Generator().manual_seed(0)):
        got = generate(model, ids.repeat(2, 1), num_beams=2)
    generator = torch.Generator().manual_seed(0)
    for rows in got.split(len(ids)):
        with bnn.sample(model, 1, generator):
            assert torch.equal(rows, generate(model, ids, num_beams=2))
