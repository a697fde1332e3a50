"""The one error of model loading."""


class LLMLoadError(RuntimeError):
    """A model or tokenizer cannot be loaded; the message is one line that ends with the remedy."""
