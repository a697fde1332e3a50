import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    FalconConfig,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PhiConfig,
    Qwen3Config,
)

from utils.data.batch import Moved, TokenLogProbs, choice_scores
from utils.data.encode import Encoder
from utils.data.example import Choice, DataError, Example
from utils.data.model_limits import position_limit

SIZE = {
    "vocab_size": 512,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 1,
}
GROUPED = {**SIZE, "num_key_value_heads": 2, "head_dim": 8}
CONFIGS = {
    "llama": LlamaConfig(**GROUPED),
    "gpt2": GPT2Config(
        vocab_size=512, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=1
    ),
    "qwen3": Qwen3Config(**GROUPED),
    "gemma3": Gemma3TextConfig(
        **GROUPED, sliding_window=40, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=8
    ),
    "phi": PhiConfig(**SIZE),
}


def make_model(config):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa").eval()
        for parameter in model.parameters():  # larger than the usual start, so that the scores differ clearly
            parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


def separate_score(model, prompt, choice, unscored, mean):
    """One plain unpadded sequence: log p of each scored token given all before it."""
    ids = torch.tensor([prompt + choice])
    log_prob = model(ids).logits[0].log_softmax(-1)
    positions = range(len(prompt) + unscored, ids.shape[1])
    values = torch.stack([log_prob[p - 1, ids[0, p]] for p in positions])
    return values.mean() if mean else values.sum()


@pytest.mark.parametrize("scoring", ["choice_sum", "choice_mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_packed_scores_equal_separate_sequences(name, scoring, tokenizer, examples):
    model = make_model(CONFIGS[name])
    encoder = Encoder(tokenizer, scoring, 64)
    encoder.check(examples, position_limit(model))
    batch = encoder.collate(examples)
    with torch.no_grad():
        scores = choice_scores(model(**batch.model_inputs()).logits, batch)
        assert scores.shape == (3, 4)
        for i, example in enumerate(examples):
            e = encoder.encode(example)
            for j, (ids, unscored) in enumerate(zip(e.choices, e.unscored, strict=True)):
                expected = separate_score(model, e.prompt, ids, unscored, scoring == "choice_mean")
                torch.testing.assert_close(scores[i, j], expected, atol=1e-5, rtol=1e-5)
            assert torch.isneginf(scores[i, len(e.choices) :]).all()


def test_single_token_choices_need_one_kept_position(tokenizer):
    example = Example("x", "the cat was", (Choice(" A"), Choice(" B"), Choice(" C")), 2)
    batch = Encoder(tokenizer, "label", 16).collate([example])
    assert batch.keep == 1
    assert batch.input_ids.shape == (1, 3)
    logits = torch.randn(1, 1, 512, generator=torch.Generator().manual_seed(0))
    expected = logits[0, 0].log_softmax(-1)[batch.choice_token[0, :, 0]]
    torch.testing.assert_close(choice_scores(logits, batch)[0], expected)


def test_gradients_are_finite_and_padding_rows_do_not_matter(tokenizer, examples):
    model = make_model(CONFIGS["llama"])
    batch = Encoder(tokenizer, "choice_mean", 64).collate(examples, num_choices=5)
    logits = model(**batch.model_inputs()).logits
    torch.nn.functional.cross_entropy(choice_scores(logits, batch), batch.answer).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    alone = Encoder(tokenizer, "choice_mean", 64).collate(examples[2:])
    with torch.no_grad():
        expected = choice_scores(model(**alone.model_inputs()).logits, alone)
    torch.testing.assert_close(choice_scores(logits, batch)[2, :4], expected[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("scoring", ["choice_sum", "choice_mean"])
@pytest.mark.parametrize("name", CONFIGS)
def test_batches_of_few_shapes_have_the_same_scores(name, scoring, tokenizer, examples):
    model = make_model(CONFIGS[name])
    encoder = Encoder(tokenizer, scoring, 64)
    tight, padded = encoder.collate(examples), encoder.collate(examples, num_choices=5, multiple=8)
    assert padded.choice_token.shape == (3, 5, 8)
    assert padded.input_ids.shape[1] % 8 == 0
    assert padded.keep % 8 == 1
    with torch.no_grad():
        expected, scores = (choice_scores(model(**b.model_inputs()).logits, b) for b in (tight, padded))
    torch.testing.assert_close(scores[:, :4], expected, atol=1e-5, rtol=1e-5)
    assert torch.isneginf(scores[:, 4:]).all()


def test_bfloat16_is_finite(tokenizer, examples):
    model = make_model(CONFIGS["llama"]).bfloat16()
    batch = Encoder(tokenizer, "choice_sum", 64).collate(examples)
    scores = choice_scores(model(**batch.model_inputs()).logits, batch)
    assert scores.dtype == torch.float32
    assert torch.isfinite(scores[batch.choice_exists]).all()


@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_token_log_probabilities_and_their_gradient_are_those_of_log_softmax(rows, dtype, monkeypatch):
    """However many rows go at once, and where tokens share a position."""
    monkeypatch.setattr("utils.data.batch.AT_ONCE", rows * 33)
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 3, 11, generator=generator).to(dtype).requires_grad_()
    source = torch.randint(3, (5, 2, 4), generator=generator)
    token = torch.randint(11, (5, 2, 4), generator=generator)
    weight = torch.randn(5, 2, 4, generator=generator)
    found = TokenLogProbs.apply(logits, source, token)
    (gradient,) = torch.autograd.grad((weight * found).sum(), logits)

    exact = logits.detach().double().requires_grad_()
    expected = exact.log_softmax(-1)[torch.arange(5)[:, None, None], source, token]
    (wanted,) = torch.autograd.grad((weight * expected).sum(), exact)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-6)
    assert gradient.dtype == dtype
    torch.testing.assert_close(gradient, wanted.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    with torch.no_grad():
        assert not TokenLogProbs.apply(logits, source, token).requires_grad


def test_scoring_keeps_no_copy_of_the_logits(tokenizer, examples):
    """What autograd holds on to between forward and backward: the logits themselves, and nothing else of their size."""
    batch = Encoder(tokenizer, "choice_sum", 64).collate(examples)
    logits = torch.randn(3, batch.keep, 512, dtype=torch.bfloat16).requires_grad_()
    kept: dict[int, int] = {}

    def keep(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.numel()
        return t

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t):
        choice_scores(logits, batch)
    assert kept[logits.untyped_storage().data_ptr()] == logits.numel()
    assert sum(kept.values()) < 1.1 * logits.numel()


def test_moved_batches_are_moved_when_they_are_asked_for(tokenizer, examples):
    encoder = Encoder(tokenizer, "choice_sum", 64)
    moved = Moved([encoder.collate(examples[:1]), encoder.collate(examples)], "meta")
    assert len(moved) == 2
    assert [batch.ids for batch in moved] == [("long",), ("long", "cloze", "four")]
    assert moved[1].input_ids.is_meta
    assert torch.equal(Moved([encoder.collate(examples)], "cpu")[-1].input_ids, encoder.collate(examples).input_ids)


def test_a_batch_holds_nothing_of_the_size_of_its_mask(tokenizer):
    long = Example("x", "the cat " * 50, (Choice(" sat"), Choice(" ran")), 0)
    batch = Encoder(tokenizer, "choice_sum", 999).collate([long] * 3)
    rows, tokens = batch.input_ids.shape
    assert batch.model_inputs()["attention_mask"].shape == (rows, 1, tokens, tokens)
    tensors = [t for t in vars(batch).values() if isinstance(t, torch.Tensor)]
    assert max(t.numel() for t in tensors) == rows * tokens


def test_tile_repeats_the_batch_below_itself(tokenizer, examples):
    batch = Encoder(tokenizer, "choice_sum", 64).collate(examples)
    tiled = batch.tile(3).to("cpu")
    assert tiled.ids == batch.ids * 3
    assert tiled.keep == batch.keep
    for i in range(3):
        assert torch.equal(tiled.input_ids[3 * i : 3 * i + 3], batch.input_ids)
        assert torch.equal(tiled.segment[3 * i : 3 * i + 3], batch.segment)
        assert torch.equal(tiled.choice_source[3 * i : 3 * i + 3], batch.choice_source)


def test_logits_of_the_wrong_shape_are_rejected(tokenizer, examples):
    batch = Encoder(tokenizer, "choice_sum", 64).collate(examples)
    with pytest.raises(ValueError, match="expected"):
        choice_scores(torch.zeros(3, batch.keep + 1, 8), batch)


def test_sliding_window_limits_the_sequence(tokenizer, examples):
    config = MistralConfig(**GROUPED, sliding_window=6)
    model = make_model(config)
    assert position_limit(model) == 6
    with pytest.raises(DataError, match=r"'long'.*positions.*window.* 6"):
        Encoder(tokenizer, "choice_sum", 64).check(examples, position_limit(model))
    assert position_limit(make_model(MistralConfig(**GROUPED, sliding_window=None))) == 64
    assert position_limit(make_model(CONFIGS["gemma3"])) == 40
    assert position_limit(make_model(CONFIGS["gpt2"])) == 64
    unused_window = Qwen3Config(**GROUPED, sliding_window=8, use_sliding_window=False)
    assert position_limit(make_model(unused_window)) == 64


def test_other_attention_implementations_are_rejected():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"], attn_implementation="eager")
    with pytest.raises(DataError, match=r"attn_implementation='eager'.*sdpa"):
        position_limit(model)


def test_alibi_instead_of_position_ids_is_rejected():
    config = FalconConfig(vocab_size=512, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, alibi=True)
    with pytest.raises(DataError, match=r"Falcon.* has alibi=True.*use another model"):
        position_limit(AutoModelForCausalLM.from_config(config, attn_implementation="sdpa"))
