"""Monte-Carlo prediction by the sampler's draws."""

import math

import pytest
import torch
from bnn_cases import Rows, logits_of, score, seeded
from torch import Tensor

import bnn
from bnn.predictive import predict


def predicted(model, batches: list[Rows], n: int | None, tokens: int = 10**6) -> Tensor:
    settings = {"sample": bnn.sample, "generator": seeded(), "max_tokens_per_forward": tokens}
    return predict(model, score, batches, n=n, **settings)


@pytest.mark.parametrize("tokens", [1, 21, 42, 70, 10**6])
def test_every_draw_is_one_function_of_all_batches_however_they_are_split(tokens, make_adapted, ids):
    """Alone, one draw a forward: the same generator gives the same draws."""
    model, generator = make_adapted(), seeded()
    got = predicted(model, [Rows(ids), Rows(ids[:1, :4], choices=2)], 5, tokens)
    assert got.shape == (5, 4, 4)
    assert got.dtype == torch.float32
    for i in range(5):
        with torch.no_grad(), bnn.sample(model, 1, generator):
            alone = logits_of(model, ids)[:, -1, :4], logits_of(model, ids[:1, :4])[:, -1, :2]
        torch.testing.assert_close(got[i, :3], alone[0].float(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(got[i, 3:, :2], alone[1].float(), rtol=1e-4, atol=1e-5)
    assert (got[:, 3, 2:] == -math.inf).all()
    assert (got[0] - got[1])[:3].abs().max() > 1e-3


def test_without_draws_it_is_the_posterior_mean(make_adapted, ids):
    model = make_adapted()
    got = predicted(model, [Rows(ids)], None)
    assert got.shape == (1, 3, 4)
    torch.testing.assert_close(got[0], logits_of(model, ids)[:, -1, :4].float())
    assert not got.requires_grad


def test_a_single_draw_is_the_first_of_the_generator(make_adapted, ids):
    model = make_adapted()
    got = predicted(model, [Rows(ids)], 1)
    with torch.no_grad(), bnn.sample(model, 1, seeded()):
        torch.testing.assert_close(got, logits_of(model, ids)[None, :, -1, :4].float())


@pytest.mark.parametrize("n", [None, 2])
def test_what_is_refused(n, make_adapted, ids):
    model = make_adapted()
    with pytest.raises(ValueError, match="there are no batches"):
        predicted(model, [], n)
    with pytest.raises(ValueError, match=r"would apply dropout: call model\.eval\(\)"):
        predicted(model.train(), [Rows(ids)], n)
    with pytest.raises(ValueError, match="must be at least 1, got 0"):
        predicted(model.eval(), [Rows(ids)], 0)
