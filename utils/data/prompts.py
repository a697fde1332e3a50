"""From a parsed question to an example: the prompt template and what is scored."""

from collections.abc import Sequence

from utils.data.example import Choice, DataError, Example, Question


def render(question: Question, scoring: str, template: str, labels: Sequence[str]) -> Example:
    """Apply a prompt template to a question whose answer is known.

    Label scoring of a question with options scores one label per option (the template's `{choices}` lists
    them as `label. option`), choice scoring scores the options' own texts, and a question without options
    (a classification) is scored by the labels either way.

    Args:
        question: The question; its answer must not be None.
        scoring: `label`, `choice_sum` or `choice_mean`.
        template: Format string over the question's fields and `{choices}`.
        labels: Label words, in class order or in order of the options.

    Raises:
        DataError: If the template names an unknown field or there are fewer labels than needed.
    """
    assert question.answer is not None
    options = question.options
    if scoring == "label" and len(options) > len(labels):
        raise DataError(f"{len(options)} choices but only {len(labels)} dset.labels ({', '.join(labels)}); add labels")
    listed = "\n".join(f"{label}. {option}" for label, option in zip(labels, options, strict=False))
    values = {**question.fields, "choices": listed}
    try:
        prompt = template.format(**values)
    except (KeyError, IndexError, ValueError, AttributeError) as error:
        raise DataError(
            f"prompt template {template!r} does not fit: {error}; it may name {', '.join(sorted(values))}"
        ) from error
    if scoring == "label" or not options:
        words = labels[: len(options)] if options else labels
        choices = tuple(Choice(" " + word) for word in words)
    elif question.suffix:
        choices = tuple(Choice(question.suffix, context=question.lead + option) for option in options)
    else:
        choices = tuple(Choice(question.lead + option) for option in options)
    return Example(question.id, prompt, choices, question.answer)
