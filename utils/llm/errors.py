"""The errors of model loading, and how a want of memory is told from other errors."""

import re

import torch

LESS_MEMORY = (
    "set quantization=nf4, llm.gradient_checkpointing=true, a smaller train.batch_size (with train.grad_accum) or "
    "eval.max_tokens_per_forward, or choose a smaller model"
)
"""What a user can do about a want of memory."""
SAID = re.compile(r"out of memory|can't allocate memory|CU\w+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)")
"""How plain errors tell it."""


class LLMLoadError(RuntimeError):
    """A model or tokenizer cannot be loaded; the message is one line that ends with the remedy."""


class TooLittleMemoryError(LLMLoadError):
    """A run would need more memory than is free."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error, or one that led to it, says that a device or the machine had too little memory.

    There are more ways to say so than torch's own error: calls besides its allocator, libraries that find no room for
    their handles, the allocator for the processor. While a CUDA graph is recorded the error proper is but the context
    of another: that the recording could not be ended.
    """
    cause = error.__cause__ if error.__suppress_context__ else error.__context__
    if isinstance(error, torch.OutOfMemoryError | TooLittleMemoryError | MemoryError):
        return True
    is_plain = isinstance(error, RuntimeError) and SAID.search(str(error)) is not None
    return is_plain or (cause is not None and lacks_memory(cause))
