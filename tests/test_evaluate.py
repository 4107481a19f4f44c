"""What several papers measure, on examples worked out by hand, with ties, padding and
empty input."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from minilm import InputError
from minilm.data import generator
from minilm.evaluate import (
    continuation_logprobs,
    last_number,
    masked_mean,
    pca,
    perplexity,
    token_logprobs,
)
from minilm.transformer import Config, Transformer


class Bigram(nn.Module):
    """p(next | token) is a table: a model whose every score can be read off."""

    def __init__(self, table):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(table).log())

    def forward(self, ids, attention_mask=None):
        return SimpleNamespace(logits=self.logits[ids])


BIGRAM = Bigram([[0.5, 0.25, 0.25], [0.1, 0.1, 0.8], [1 / 3, 1 / 3, 1 / 3]])
tiny = lambda: Transformer(
    Config(50, 32, 48, 2, 2, initializer_range=0.3), generator(0, "init")
).eval()


def test_token_logprobs_by_hand():
    # 0 -> 1 has p 0.25, 1 -> 2 has p 0.8
    torch.testing.assert_close(
        token_logprobs(BIGRAM, torch.tensor([[0, 1, 2]])), torch.tensor([[0.25, 0.8]]).log()
    )


def test_logits_made_in_chunks_give_the_same_as_all_at_once():
    model, ids = tiny(), torch.randint(50, (3, 7), generator=generator(0, "ids"))
    expected = model(ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    for chunk_bytes in (1, 5 * 4 * 50, 2**28):  # one row, five rows, everything
        torch.testing.assert_close(
            token_logprobs(model, ids, chunk_bytes=chunk_bytes), expected, atol=1e-5, rtol=1e-5
        )


def test_continuation_logprobs_by_hand():
    scores = continuation_logprobs(BIGRAM, [([0], [1, 2]), ([2, 0], [0])], characters=[4, 1])
    expected = torch.tensor([math.log(0.25 * 0.8), math.log(0.5)])
    torch.testing.assert_close(scores.sum, expected)
    torch.testing.assert_close(scores.mean, expected / torch.tensor([2.0, 1.0]))
    torch.testing.assert_close(scores.per_character, expected / torch.tensor([4.0, 1.0]))
    assert continuation_logprobs(BIGRAM, [([0], [1])]).per_character is None


def test_continuation_scores_come_back_in_order_and_do_not_depend_on_the_batch():
    model, gen = tiny(), generator(1, "lengths")
    row = lambda: torch.randint(
        50, (int(torch.randint(1, 9, (1,), generator=gen)),), generator=gen
    ).tolist()
    pairs = [(row(), row()) for _ in range(11)]
    together = continuation_logprobs(model, pairs, batch=4)
    alone = torch.cat([continuation_logprobs(model, [pair]).sum for pair in pairs])
    torch.testing.assert_close(together.sum, alone, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("pair", [([], [1]), ([1], [])])
def test_a_score_needs_a_prompt_and_a_continuation(pair):
    with pytest.raises(InputError, match="put BOS before an empty prompt"):
        continuation_logprobs(BIGRAM, [pair])


def test_a_row_longer_than_the_context_is_refused_and_one_that_fills_it_is_scored():
    model = Transformer(Config(50, 32, 48, 1, 2, max_position_embeddings=8))
    assert perplexity(model, [[1] * 8]) > 0
    for call in (
        lambda: perplexity(model, [[1] * 9]),
        lambda: continuation_logprobs(model, [([1] * 5, [2] * 4)]),
    ):
        with pytest.raises(
            InputError, match="has 9 tokens, the model reads 8: shorten the prompt to at most 8"
        ):
            call()


def test_perplexity_by_hand():
    # three scored tokens, p = 0.25, 0.8, 0.5: the geometric mean of 1/p, over tokens, not rows
    assert perplexity(BIGRAM, [[0, 1, 2], [0, 0]], batch=1) == pytest.approx(
        (4 * 1.25 * 2) ** (1 / 3)
    )
    assert perplexity(BIGRAM, [[2, 0, 1, 0, 2]][:1]) == pytest.approx((3 * 4 * 10 * 4) ** 0.25)


def test_logits_that_overflow_are_an_error_and_no_score():
    model = tiny()
    model.lm_head.weight.data[3] = float("nan")
    for call in (
        lambda: perplexity(model, [[1, 2, 3]]),
        lambda: continuation_logprobs(model, [([1], [2, 3])]),
    ):
        with pytest.raises(
            InputError, match="log-probabilities hold NaN: .* use --dtype bfloat16 or float32"
        ):
            call()


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary():
    assert perplexity(Bigram([[0.25] * 4] * 4), [[0, 1, 2, 3], [3, 3]]) == pytest.approx(4)


@pytest.mark.parametrize("rows", [[], [[]], [[1]], [[1], []]])
@pytest.mark.parametrize("model", [BIGRAM, tiny()], ids=["bigram", "transformer"])
def test_perplexity_of_nothing_is_refused(model, rows):
    with pytest.raises(InputError, match="at least two tokens"):
        perplexity(model, rows)


@pytest.mark.parametrize("text, number", [
    ("so 1,200 + 34 = $1,234.", "1234"),
    ("it is -3.50", "3.50"),  # signs are lost
    ("#### 1,000,000", "1000000"),
    ("1,2,3", "3"),  # one pass: "1,2" becomes 12, and the comma behind it has lost its left digit
    ("2.5e3", "3"),
    ("1 000", "000"),
    ("costs $.75", "75"),
    ("from 3 to 4, 5", "5"),
    ("pi is 3.14159...", "3.14159"),
    ("50%", "50"),
    ("12.", "12"),
    ("答案是 42。", "42"),
    ("উত্তর ৪২", "৪২"),
    ("9" * 40, "9" * 40),  # no digit is rounded away
    ("no number here", None),
    ("", None)])
def test_the_last_number_of_a_text_as_the_published_scorers_read_it(text, number):
    assert last_number(text) == number


def test_masked_mean_by_hand():
    h = torch.tensor(
        [[[1.0, 0], [3, 2], [9, 9]], [[5, 5], [0, 0], [0, 0]], [[1, 1], [1, 1], [1, 1]]]
    )
    mask = torch.tensor([[True, True, False], [True, False, False], [False, False, False]])
    assert masked_mean(h, mask).tolist() == [[2, 1], [5, 5], [0, 0]]


def test_pca_by_hand():
    # points on the line y = 2x: one direction (1, 2)/sqrt(5), which explains everything
    projected, share = pca(torch.tensor([[0.0, 0], [1, 2], [2, 4]]), k=2)
    torch.testing.assert_close(projected[:, 0], torch.tensor([-1.0, 0, 1]) * math.sqrt(5))
    torch.testing.assert_close(share, torch.tensor([1.0, 0.0]))


def test_pca_projections_carry_the_variance_and_ignore_a_shift():
    x = torch.randn(40, 6, generator=generator(0, "x")) * torch.tensor([5.0, 3, 1, 1, 0.5, 0.1])
    projected, share = pca(x, k=6)
    # a rotation about the centre
    torch.testing.assert_close(projected.norm(dim=1), (x - x.mean(0)).norm(dim=1))
    variance = projected.var(0)
    torch.testing.assert_close(share, variance / variance.sum())
    assert (variance.diff() < 0).all()
    torch.testing.assert_close(pca(x + 100, k=2)[0], projected[:, :2], atol=1e-3, rtol=1e-3)
