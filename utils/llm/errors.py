"""The errors of model loading, and how a want of memory is told from other errors."""

import re

import torch

LESS_MEMORY = (
    "set quantization=nf4, llm.gradient_checkpointing=true, a smaller train.batch_size (with train.grad_accum), "
    "eval.batch_size or eval.max_tokens_per_forward, or choose a smaller model"
)
"""What a user can do about a want of memory."""
SAID = re.compile(r"out of memory|can't allocate memory|CU\w+_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)")
"""How plain errors tell it."""


class LLMLoadError(RuntimeError):
    """A model or tokenizer cannot be loaded; the message is one line that ends with the remedy."""


class TooLittleMemoryError(LLMLoadError):
    """A run would need more memory than is free."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error says that a device or the machine had too little memory (``want_of_memory``)."""
    return want_of_memory(error) is not None


def want_of_memory(error: BaseException) -> BaseException | None:
    """What says that a device or the machine had too little memory: the error, or the nearest that led to it.

    There are more ways to say so than torch's own error: calls besides its allocator, libraries that find no room for
    their handles, the allocator for the processor. While a CUDA graph is recorded the error proper is but the context
    of another: that the recording could not be ended.
    """
    if isinstance(error, torch.OutOfMemoryError | TooLittleMemoryError | MemoryError):
        return error
    if isinstance(error, RuntimeError) and SAID.search(str(error)):
        return error
    cause = error.__cause__ if error.__suppress_context__ else error.__context__
    return None if cause is None else want_of_memory(cause)
