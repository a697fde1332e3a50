"""The loss of a step, as the log has it."""

import pytest

from pipeline.run import CONFIGS, prepare
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
