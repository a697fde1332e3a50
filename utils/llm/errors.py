"""The errors of model loading."""


class LLMLoadError(RuntimeError):
    """A model or tokenizer cannot be loaded; the message is one line that ends with the remedy."""


class TooLittleMemoryError(LLMLoadError):
    """A run would need more memory than is free."""
