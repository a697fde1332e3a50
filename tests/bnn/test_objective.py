"""The objective and its schedules."""

import math
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F

from bnn.objective import beta_at, learning_rate_at, negative_elbo


@pytest.fixture
def batch(generator):
    scores = torch.randn(6, 4, generator=generator, dtype=torch.float64)
    answer = torch.randint(4, (6,), generator=generator)
    return scores, answer, torch.tensor(37.0, dtype=torch.float64)


@pytest.mark.parametrize("beta", [0.0, 0.3, 1.0])
def test_is_the_mean_nll_plus_the_scaled_kl(batch, beta):
    scores, answer, kl = batch
    got = negative_elbo(scores, answer, kl, n_train=50, beta=beta)
    nll = -sum(torch.log_softmax(scores, -1)[i, a] for i, a in enumerate(answer)) / 6
    torch.testing.assert_close(got.nll, nll)
    torch.testing.assert_close(got.loss, nll + beta * 37.0 / 50)
    assert got.kl is kl


def test_an_epoch_of_micro_batches_adds_up_to_the_elbo(batch):
    """Averaged over equal micro-batches of all N examples, N times the loss is -ELBO: the KL counts once."""
    scores, answer, kl = batch
    parts = [
        negative_elbo(s, a, kl, n_train=6, beta=1.0).loss for s, a in zip(scores.split(2), answer.split(2), strict=True)
    ]
    negative = F.cross_entropy(scores, answer, reduction="sum") + kl
    torch.testing.assert_close(6 * torch.stack(parts).mean(), negative)


def test_gradient_of_the_kl_is_beta_over_n():
    kl = torch.tensor(5.0, requires_grad=True)
    negative_elbo(torch.zeros(2, 3), torch.tensor([0, 1]), kl, n_train=8, beta=0.5).loss.backward()
    assert kl.grad.item() == pytest.approx(0.5 / 8)


def test_an_absent_choice_has_no_probability_and_no_gradient():
    scores = torch.tensor([[1.0, 2.0, -torch.inf], [0.0, 1.0, 3.0]], requires_grad=True)
    got = negative_elbo(scores, torch.tensor([0, 2]), torch.zeros(()), n_train=2, beta=1.0)
    got.loss.backward()
    first = math.log(1 + math.e)
    second = math.log(1 + math.exp(-2) + math.exp(-3))
    assert got.nll.item() == pytest.approx((first + second) / 2, rel=1e-6)
    assert scores.grad.isfinite().all()
    assert scores.grad[0, 2] == 0


@pytest.mark.parametrize(("n_train", "beta"), [(0, 1.0), (4, -0.1)])
def test_refuses_impossible_values(batch, n_train, beta):
    with pytest.raises(ValueError, match=f"got n_train={n_train}, beta={beta}"):
        negative_elbo(*batch, n_train=n_train, beta=beta)


def test_beta_warms_up_linearly_and_stays():
    assert [beta_at(step, 0.8, 4) for step in (0, 1, 2, 4, 100)] == pytest.approx([0.0, 0.2, 0.4, 0.8, 0.8])
    assert [beta_at(step, 0.8, 1) for step in (0, 1, 100)] == [0.0, 0.8, 0.8]
    assert [beta_at(step, 0.8, 0) for step in (0, 1, 100)] == [0.8, 0.8, 0.8]


def test_learning_rate_warms_up_to_one():
    assert [learning_rate_at(s, 20, 3, "constant") for s in range(6)] == pytest.approx([0.25, 0.5, 0.75, 1, 1, 1])


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("warmup", [0, 3])
def test_learning_rate_decays_from_one_to_zero(schedule, warmup):
    values = [learning_rate_at(s, 13, warmup, schedule) for s in range(warmup, 14)]
    assert values[0] == pytest.approx(1.0)
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in pairwise(values))
    assert learning_rate_at(99, 13, warmup, schedule) == pytest.approx(0.0, abs=1e-12)


def test_learning_rate_half_way():
    assert learning_rate_at(5, 20, 0, "linear") == pytest.approx(0.75)
    assert learning_rate_at(5, 20, 0, "cosine") == pytest.approx(0.5 * (1 + math.cos(math.pi / 4)))


@pytest.mark.parametrize("step", [0, 5])
def test_unknown_schedule_is_refused(step):
    with pytest.raises(ValueError, match=r"'polynomial': choose linear, cosine or constant"):
        learning_rate_at(step, 10, 2, "polynomial")
