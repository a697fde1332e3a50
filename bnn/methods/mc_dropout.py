"""Monte-Carlo dropout on the adapter's input (Gal & Ghahramani, ICML 2016)."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import nn

from bnn.lora import plain_layers
from bnn.methods.base import PointEstimate, of_type
from bnn.methods.mle import MLE


class MCDropout(MLE):
    """Delta W x = (alpha/r) B A (m * x), m_i ~ Bernoulli(1 - p) / (1 - p), in training and at prediction.

    The predictive distribution is the mean of the probabilities of S passes with masks m (Gal & Ghahramani, 2016,
    Eq. 6; the equation averages outputs). Training minimises their objective (Eq. 1), whose L2 term is
    ``opt.weight_decay``. Masks are drawn anew for every row and token, so a draw is a stochastic pass rather than one
    function, and results depend on how samples are split over forwards (never their distribution).

    Args:
        dropout: p, probability that an input of the adapter is set to 0, in (0, 1).

    Raises:
        ValueError: for p outside (0, 1).
    """

    stochastic = True

    def __init__(self, dropout: float) -> None:
        if not 0 < dropout < 1:
            raise ValueError(f"method=mc_dropout needs 0 < dropout < 1, got {dropout}: use method=mle for none")
        self.dropout = dropout

    def adapt(self, model: nn.Module, lora: dict[str, Any]) -> PeftModel:
        """See ``Method.adapt``; the method's ``dropout`` is LoRA's.

        Raises:
            ValueError: for another ``lora_dropout``, or a target without dropout: an embedding, a variant of LoRA.
        """
        given = lora.get("lora_dropout", 0.0)
        if given not in (0.0, self.dropout):
            raise ValueError(f"method=mc_dropout has dropout={self.dropout}: leave peft.lora_dropout={given} at 0")
        return _plain(super().adapt(model, lora | {"lora_dropout": self.dropout}))

    def load(self, model: nn.Module, folder: str | Path) -> PeftModel:
        """See ``Method.load``; the method's ``dropout`` replaces the saved one."""
        config = PeftConfig.from_pretrained(str(folder))
        config.lora_dropout = self.dropout
        loaded = PeftModel.from_pretrained(model, str(folder), is_trainable=True, config=config)  # type: ignore[arg-type]
        return _plain(of_type(loaded, self.peft_type, folder))

    @contextmanager
    def sample(self, model: nn.Module, n: int, generator: torch.Generator | None) -> Iterator[PointEstimate]:
        """Context in which the adapter's dropout is active and nothing else changes; every row has its own masks.

        Dropout draws from the global generators. In training mode, where it is active anyway, they are used as they
        are; else they are seeded from ``generator``, if there is one, on entry and put back on exit.

        Raises:
            ValueError: if the adapter has no dropout.
        """
        layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
        dropouts = [d for layer in layers for d in layer.lora_dropout.values() if isinstance(d, nn.Dropout)]
        if not dropouts:
            raise ValueError("the adapter has no dropout to draw: make or load it with method=mc_dropout")
        if model.training:
            yield PointEstimate()
            return
        before = [dropout.training for dropout in dropouts]
        devices = range(torch.cuda.device_count())  # a model may lie on several
        with torch.random.fork_rng(devices, enabled=generator is not None):
            if generator is not None:
                seed = torch.randint(2**63 - 1, (), generator=generator, device=generator.device)
                torch.manual_seed(int(seed))
            try:
                for dropout in dropouts:
                    dropout.train()
                yield PointEstimate()
            finally:
                for dropout, mode in zip(dropouts, before, strict=True):
                    dropout.train(mode)


def _plain(model: PeftModel) -> PeftModel:
    """The model, or ValueError for embeddings and variants of LoRA (DoRA, ...): there PEFT applies no dropout, or none
    at prediction.
    """
    plain_layers(model, "method=mc_dropout")
    return model
