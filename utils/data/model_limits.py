"""Whether a model can run packed batches, and how many positions it can take."""

import inspect
from typing import Any

from utils.data.example import DataError

_PLAIN_LAYERS = {"full_attention", "sliding_attention"}


def position_limit(model: Any) -> int | None:
    """Check that a model supports packed batches; return how long a sequence may be.

    A packed batch brings its own attention mask, which replaces a sliding window. Prompt and choice must
    therefore fit in the window, where the mask and the window agree, and in the position table.

    Args:
        model: A Hugging Face causal language model, before or after PEFT has wrapped it.

    Returns:
        The smaller of sliding window (if any layer slides) and position table, in tokens; None for no limit.

    Raises:
        DataError: If the attention implementation would ignore or misread the mask, a layer is neither
            full nor sliding attention, or the model does not take position ids or uses ALiBi instead.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    config = base.config.get_text_config()
    name = type(base).__name__
    if config._attn_implementation != "sdpa":
        raise DataError(
            f"{name} uses attn_implementation={config._attn_implementation!r}; packed choices need 'sdpa' "
            "(load the model with attn_implementation='sdpa')"
        )
    missing = {"position_ids", "logits_to_keep"} - set(inspect.signature(base.forward).parameters)
    if missing:
        raise DataError(f"{name}.forward does not take {' or '.join(sorted(missing))}; use another model")
    if getattr(config, "alibi", False):
        raise DataError(
            f"{name} has alibi=True; packed choices need position ids, which that ignores: use another model"
        )
    layers = set(getattr(config, "layer_types", None) or ())
    if layers - _PLAIN_LAYERS:
        odd = ", ".join(sorted(layers - _PLAIN_LAYERS))
        raise DataError(f"{name} has layers of type {odd}; packed choices need full or sliding attention")
    window = getattr(config, "sliding_window", None)
    slides = "sliding_attention" in layers if layers else window is not None
    table = getattr(config, "max_position_embeddings", None)
    limits = [limit for limit in (window if slides else None, table) if limit is not None]
    return min(limits) if limits else None
