"""The errors of model loading, and how a want of memory is told from other errors."""

import torch

LESS_MEMORY = (
    "set quantization=nf4, llm.gradient_checkpointing=true, a smaller train.batch_size (with train.grad_accum) or "
    "eval.max_tokens_per_forward, or choose a smaller model"
)
"""What a user can do about a want of memory."""


class LLMLoadError(RuntimeError):
    """A model or tokenizer cannot be loaded; the message is one line that ends with the remedy."""


class TooLittleMemoryError(LLMLoadError):
    """A run would need more memory than is free."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or one that it was raised from, says that a device or the machine had too little memory.

    CUDA has two ways to say so: torch's own error from its allocator, and a plain one from calls besides it.
    """
    cause = error.__cause__
    if isinstance(error, torch.OutOfMemoryError | TooLittleMemoryError | MemoryError):
        return True
    is_plain = isinstance(error, RuntimeError) and "out of memory" in str(error)
    return is_plain or (cause is not None and lacks_memory(cause))
