"""`transfusion_hf.evaluation` against loops in float64."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from transfusion_hf import TransfusionForCausalLMAndDiffusion
from transfusion_hf.evaluation import perplexity
from transfusion_hf.evaluation.perplexity import rolling_windows

TINY = Path(__file__).parent / "fixtures" / "tiny-transfusion"
TEXTS = ["the quick brown fox jumps over the lazy dog", "", "a", "noch ein Satz mit Ümläuten, länger als ein Fenster"]


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(TINY)


@pytest.fixture(scope="module")
def language_model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=262, initializer_range=0.3, **sizes)).eval()


@pytest.fixture(scope="module")
def converted(language_model):
    ids = {"image_start_token_id": 260, "image_token_id": 259, "image_end_token_id": 261}
    return TransfusionForCausalLMAndDiffusion.from_causal_lm(language_model, latent_channels=3, **ids)


@torch.no_grad()
def by_a_loop(language_model, tokenizer, texts, max_length: int, stride: int) -> float:
    """Token by token in float64: each sees what the window in which it is scored holds before it."""
    model, total = LlamaForCausalLM(language_model.config).double().eval(), 0.0
    model.load_state_dict(language_model.state_dict())
    for text in texts:
        ids = [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]
        for i in range(1, len(ids)):
            window_end = min(((i - 1) // stride + 1) * stride, len(ids) - 1)
            seen = ids[max(0, window_end - max_length) : i]
            total -= model(torch.tensor([seen])).logits[0, -1].log_softmax(-1)[ids[i]].item()
    return total


@pytest.mark.parametrize(("max_length", "stride"), [(None, None), (16, None), (16, 5), (16, 1)])
def test_perplexity_is_that_of_a_loop_over_the_language_model(
    language_model, converted, tokenizer, max_length, stride
):
    expected = by_a_loop(language_model, tokenizer, TEXTS, max_length or 2048, stride or max_length or 2048)
    for model in (language_model, converted):
        for batch_size in (1, 3):
            score = perplexity(model, tokenizer, iter(TEXTS), max_length, stride, batch_size=batch_size)
            assert score.nll == pytest.approx(expected, rel=1e-5)
    num_tokens = sum(len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in TEXTS)
    num_bytes, num_words = sum(len(text.encode()) for text in TEXTS), sum(len(text.split()) for text in TEXTS)
    assert (score.num_tokens, score.num_bytes, score.num_words, score.num_texts) == (
        num_tokens,
        num_bytes,
        num_words,
        3,
    )
    assert score.perplexity == pytest.approx(math.exp(expected / num_tokens), rel=1e-5)
    assert score.word_perplexity == pytest.approx(math.exp(expected / num_words), rel=1e-4)
    assert score.bits_per_byte == pytest.approx(expected / math.log(2) / num_bytes, rel=1e-5)


@pytest.mark.parametrize("length", [1, 4, 5, 8, 9, 23])
@pytest.mark.parametrize(("max_length", "stride"), [(4, 4), (8, 3), (8, 1)])
def test_each_token_is_scored_once_with_what_stands_before_it(length, max_length, stride):
    ids, scored = list(range(100, 100 + length)), []
    for inputs, targets in rolling_windows(ids, 0, max_length, stride):
        assert len(inputs) <= max_length
        successors = [0, *ids]
        first = successors.index(inputs[0])
        assert inputs == successors[first : first + len(inputs)]
        assert targets == ids[first : first + len(inputs)][-len(targets) :]
        scored += targets
    assert scored == ids


def test_a_limit_ends_with_the_text_that_reaches_it(language_model, tokenizer):
    endless = (text for _ in iter(int, 1) for text in TEXTS)
    limit = len(tokenizer(TEXTS[0], add_special_tokens=False)["input_ids"]) + 1
    score = perplexity(language_model, tokenizer, endless, max_tokens=limit)
    assert score.num_texts == 2 and score.num_tokens == limit


def test_what_gives_no_perplexity_is_refused(language_model, tokenizer):
    with pytest.raises(ValueError, match="`texts` holds no text"):
        perplexity(language_model, tokenizer, ["", ""])
    with pytest.raises(ValueError, match="`max_length` must be 1 to 2048, the model's positions; got 4096"):
        perplexity(language_model, tokenizer, TEXTS, 4096)
    for stride in (0, 17):
        with pytest.raises(ValueError, match=f"`stride` must be 1 to `max_length`, 16; got {stride}"):
            perplexity(language_model, tokenizer, TEXTS, 16, stride)
