import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers
from transformers import PreTrainedTokenizerFast

from utils.data.encode import Encoder
from utils.data.example import Choice, DataError, Example
from utils.data.order import length_sorted, nth_batch


def labelled(*labels: str, id: str = "x", prompt: str = "the cat") -> Example:
    return Example(id, prompt, tuple(Choice(label) for label in labels), 0)


def test_choice_tokens_are_what_they_add_to_the_prompt(tokenizer, bos_tokenizer, examples):
    plain, with_bos = (Encoder(t, "choice_sum", 99).encode(examples[1]) for t in (tokenizer, bos_tokenizer))
    whole = "the dog and the cat it was tired."
    assert tokenizer.decode(plain.prompt + plain.choices[0]) == whole
    assert tokenizer.decode(plain.choices[0][plain.unscored[0] :]) == " was tired."
    assert with_bos.prompt == [bos_tokenizer.bos_token_id, *plain.prompt]
    assert with_bos.choices == plain.choices


def test_choices_of_which_one_merges_with_the_prompt_are_scored_from_the_same_tokens(tokenizer):
    """In the tokens of the whole texts: ` cat` is one, ` cas` is not."""
    encoded = Encoder(tokenizer, "choice_sum", 99).encode(labelled("t", "s", prompt="the ca"))
    assert [tokenizer.decode(ids) for ids in (encoded.prompt, *encoded.choices)] == ["the", " cat", " cas"]
    for choice, text in zip(encoded.choices, ("the cat", "the cas"), strict=True):
        assert encoded.prompt + choice == tokenizer(text)["input_ids"]
    assert encoded.unscored == [0, 0]


def test_contexts_that_merge_with_the_prompt_are_not_scored(tokenizer):
    """The seam before the text is clean: what is scored is the text alone, as of the other examples."""
    tired = (Choice(" it was tired.", "t"), Choice(" it was tired.", "s"))
    encoded = Encoder(tokenizer, "choice_sum", 99).encode(Example("x", "the ca", tired, 0))
    assert tokenizer.decode(encoded.prompt) == "the"
    for ids, unscored, context in zip(encoded.choices, encoded.unscored, (" cat", " cas"), strict=True):
        assert tokenizer.decode(ids[:unscored]) == context
        assert tokenizer.decode(ids[unscored:]) == " it was tired."


def sentencepiece_tokenizer(*words: str) -> PreTrainedTokenizerFast:
    """As Llama-2's: a text begins with a blank, which is part of a word's token."""
    merges = list(dict.fromkeys((word[:i], word[i]) for word in words for i in range(1, len(word))))
    tokens = dict.fromkeys(["<unk>", *"".join(words), *(left + right for left, right in merges)])
    core = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges, unk_token="<unk>"))
    core.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return PreTrainedTokenizerFast(tokenizer_object=core, pad_token="<unk>")


def test_cloze_of_which_an_option_merges_with_its_suffix_is_scored_in_the_tokens_of_the_text():
    tokenizer = sentencepiece_tokenizer("▁the", "▁cats", "▁trophy", "▁are", "▁nice")
    merged = Example("x", "the", (Choice("s are nice", " cat"), Choice("s are nice", " trophy")), 0)
    encoded = Encoder(tokenizer, "choice_sum", 99).encode(merged)
    texts = [tokenizer.convert_ids_to_tokens(ids) for ids in (encoded.prompt, *encoded.choices)]
    assert texts == [["▁the"], ["▁cats", "▁are", "▁nice"], ["▁trophy", "s", "▁are", "▁nice"]]
    assert encoded.unscored == [0, 0]
    clean = Example("x", "the", (Choice(" are nice", " cat"), Choice(" are nice", " trophy")), 0)
    encoded = Encoder(tokenizer, "choice_sum", 99).encode(clean)
    assert encoded.unscored == [1, 1]
    assert [tokenizer.decode(ids) for ids in encoded.choices] == ["▁cat ▁are ▁nice", "▁trophy ▁are ▁nice"]


def test_a_choice_that_adds_no_token_is_an_error():
    tokenizer = sentencepiece_tokenizer("▁the", "▁cat")
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace(" !", "")
    with pytest.raises(DataError, match=r"'x': choice ' !' has no tokens"):
        Encoder(tokenizer, "choice_sum", 99).encode(labelled("cat", " !"))


def test_a_blank_choice_is_an_error():
    with pytest.raises(DataError, match="example 'x': a choice has no text to score"):
        Example("x", "the", (Choice(" "), Choice(" cat")), 0)


def test_empty_prompt_still_has_a_position_to_predict_from(tokenizer, bos_tokenizer):
    example = Example("x", "", (Choice(" sat", "the cat"), Choice(" sat", "the dog")), 0)
    assert len(Encoder(tokenizer, "choice_sum", 99).encode(example).prompt) == 1
    assert Encoder(bos_tokenizer, "choice_sum", 99).encode(example).prompt == [bos_tokenizer.bos_token_id]


def test_multi_token_label_is_an_error_in_label_scoring_only(tokenizer):
    example = labelled(" yes", " perhaps", id="row-7")
    with pytest.raises(DataError, match=r"'row-7': label ' perhaps' is \d+ tokens.*dset.labels"):
        Encoder(tokenizer, "label", 99).check([example])
    assert Encoder(tokenizer, "choice_sum", 99).check([example]) == [example]


def test_labels_that_share_a_token_are_an_error(tokenizer):
    with pytest.raises(DataError, match="same token"):
        Encoder(tokenizer, "label", 99).check([labelled(" yes", " no", " yes")])


def test_too_long_names_example_length_limit_and_remedy(tokenizer, caplog):
    short, long = labelled(" yes", " no"), labelled(" yes", " no", id="big", prompt="the cat" * 9)
    length = Encoder(tokenizer, "label", 99).length(long)
    with pytest.raises(DataError, match=rf"'big' is too long: {length} tokens, limit 5; raise dset.max_length"):
        Encoder(tokenizer, "label", 5).check([short, long])
    assert Encoder(tokenizer, "label", 5, too_long="drop").check([short, long]) == [short]
    assert "dropped 1 of 2" in caplog.text
    assert Encoder(tokenizer, "label", length).check([short, long]) == [short, long]


def test_wrong_settings_are_errors(tokenizer):
    with pytest.raises(DataError, match="did you mean choice_mean"):
        Encoder(tokenizer, "choice_means", 9)
    with pytest.raises(DataError, match="error or drop"):
        Encoder(tokenizer, "label", 9, too_long="cut")
    with pytest.raises(DataError, match="max_length is 0"):
        Encoder(tokenizer, "label", 0)


def test_example_rejects_answers_out_of_range_and_empty_choices():
    with pytest.raises(DataError, match="answer 2"):
        Example("x", "p", (Choice("a"), Choice("b")), 2)
    with pytest.raises(DataError, match="no text"):
        Example("x", "p", (Choice("a"), Choice("")), 0)
    with pytest.raises(DataError, match="at least 2"):
        Example("x", "p", (Choice("a"),), 0)


def test_order_of_an_epoch_depends_on_seed_and_epoch_only():
    examples = [labelled(" yes", " no", id=str(i)) for i in range(20)]

    def visit(seed: int, epoch: int) -> list[list[str]]:
        return [[e.id for e in nth_batch(examples, 6, seed, epoch, index)] for index in range(4)]

    assert visit(0, 3) == visit(0, 3)
    assert visit(0, 3) != visit(0, 4)
    assert visit(0, 3) != visit(1, 3)
    assert [len(batch) for batch in visit(0, 0)] == [6, 6, 6, 2]
    assert sorted(i for batch in visit(5, 1) for i in batch) == sorted(str(i) for i in range(20))
    assert visit(0, 3)[2] == [e.id for e in nth_batch(examples, 6, 0, 3, 2)], "a step alone"


def test_length_sorted_restores_the_original_order():
    examples = [labelled(" yes", " no", id=str(i)) for i in range(7)]
    lengths = [3, 9, 1, 9, 4, 2, 8]
    results, seen = np.full(7, -1), []
    for indices, batch in length_sorted(examples, lengths, 3):
        results[indices] = [int(e.id) for e in batch]
        seen += [lengths[i] for i in indices]
    assert results.tolist() == list(range(7))
    assert seen == sorted(lengths, reverse=True)
