import numpy as np
import pytest
from gguf import GGUFWriter
from tokenizers import Tokenizer, models, normalizers, processors
from transformers import PreTrainedTokenizerFast

from utils.llm import LLMLoadError
from utils.llm.conversion import adds_bos, check_tokenizer

WORDS = ("an", "so", "to", "in")


def tokenizer_of(merged, begins=True, space="\u2581"):
    """Letters, and words whose two merges are known for those in ``merged`` only."""
    letters = sorted({space, "a", *"".join(WORDS)})
    vocab = {
        token: index
        for index, token in enumerate(["<bos>", *letters, *(space + w[0] for w in WORDS), *(space + w for w in WORDS)])
    }
    merges = [pair for w in merged for pair in ((space, w[0]), (space + w[0], w[1]))]
    backend = Tokenizer(models.BPE(vocab, merges))
    backend.normalizer = normalizers.Replace(" ", space)
    if begins:
        backend.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<bos>")


@pytest.mark.parametrize("space", ["\u2581", "\u0120"])
def test_a_sound_tokenizer_passes(space):
    check_tokenizer(tokenizer_of(WORDS, space=space), begins=True)
    check_tokenizer(tokenizer_of(WORDS, begins=False, space=space), begins=False)


def test_lost_merges_are_refused():
    with pytest.raises(LLMLoadError, match=r"splits words of its own vocabulary \(2 of 8, such as 't'\): install"):
        check_tokenizer(tokenizer_of(("an", "so", "in")), begins=True)


def test_a_lost_beginning_is_refused():
    with pytest.raises(LLMLoadError, match="leaves out <bos>, with which texts begin: install transformers>="):
        check_tokenizer(tokenizer_of(WORDS, begins=False), begins=True)


@pytest.mark.parametrize("said", [True, False, None])
def test_what_the_file_says_about_the_beginning(tmp_path, said):
    path = tmp_path / "some.gguf"
    writer = GGUFWriter(path, "llama")
    if said is not None:
        writer.add_add_bos_token(said)
    writer.add_tensor("output.weight", np.zeros((2, 2), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert adds_bos(path) is bool(said)
