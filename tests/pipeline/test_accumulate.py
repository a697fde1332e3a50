"""The loss of a step, as the log has it."""

import math

import pytest
import torch

from pipeline.run import CONFIGS, prepare, score
from pipeline.training import accumulate
from utils.settings import compose


def test_the_loss_of_an_ensemble_is_the_mean_of_its_members(command):
    """Every member starts with B = 0, so each has the loss of the base model."""
    losses = {}
    for method in ("mle", "ensemble"):
        run = prepare(compose(CONFIGS, command(f"method={method}", "train.grad_accum=2", folder=method)))
        run.model.train()
        losses[method] = accumulate(run, run.data.train[:8], 0.1)
    assert float(losses["ensemble"].loss) == pytest.approx(float(losses["mle"].loss), rel=1e-5)
    assert float(losses["ensemble"].nll) == pytest.approx(float(losses["mle"].nll), rel=1e-5)


@pytest.mark.parametrize(("rows", "n_mc", "shared"), [(8, 1, 4), (6, 2, 3), (7, 1, 4), (1, 1, 4)])
def test_the_rows_of_a_batch_are_shared_out_among_the_draws(command, rows, n_mc, shared):
    """Loss and gradient are the mean over the draws, each with the rows that are its own."""
    keys = (f"train.n_mc={n_mc}", f"train.draws_per_batch={shared}", f"train.batch_size={rows}")
    run = prepare(compose(CONFIGS, command("method=sgp", *keys)))
    examples = run.data.train[:rows]
    parameters = [p for group in run.optimizer.param_groups for p in group["params"]]
    run.generator.manual_seed(5)
    loss = accumulate(run, examples, 0.0)
    gradients = [p.grad for p in parameters]

    each = math.gcd(rows, shared)
    run.generator.manual_seed(5)
    for p in parameters:
        p.grad = None
    with run.method.sample(run.model, n_mc * each, run.generator):
        batch = run.encoder.collate(examples).tile(n_mc * each)
        scores = score(run.model, batch).unflatten(0, (n_mc, each, each, rows // each))
        own = scores.diagonal(dim1=1, dim2=2).movedim(-1, 1).flatten(0, 2)
        nll = torch.nn.functional.cross_entropy(own, batch.answer[:rows].repeat(n_mc))
        nll.backward()
    assert float(loss.nll) == pytest.approx(float(nll), rel=1e-5)
    for p, gradient in zip(parameters, gradients, strict=True):
        torch.testing.assert_close(gradient, p.grad, rtol=1e-3, atol=1e-6)
