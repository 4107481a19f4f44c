"""SkipLayerCD: every decoder against two plain forward passes, its rules by hand, the choice of the
span, the look inside, and the whole experiment."""

import copy
import math
import random
from dataclasses import replace

import pytest
import torch

from methods import skip_layer_cd as paper
from methods.experiments import skip_layer_cd as experiment
from methods.experiments.skip_layer_cd import (
    ARMS,
    DEFAULT,
    JUDGED,
    MORE_SEEDS,
    Config,
    answer,
    at_the_verbs,
    choose_spans,
    look,
    places,
    problems_of,
    spans_to_look_at,
)
from methods.experiments.skip_layer_cd_claims import (
    CLAIMS,
    LOWER,
    OURS,
    SPANS,
    SWEEP,
    english_is_solved,
    figure,
)
from methods.skip_layer_cd import (
    EVENT,
    LANGUAGES,
    TEXT,
    WORLD,
    Models,
    SkipLayers,
    blocks_per_token,
    contrast,
    entropy_curve,
    entropy_span,
    exercise,
    find_entropy_span,
    heuristic_span,
    lm_loss,
    pretrain,
    span_sizes,
    views,
    walk_through,
)
from methods.skip_layer_cd_baselines import ContrastModels, DoLa, RepetitionPenalty, divergence
from methods.worlds.clones import ANSWER, EOS, document, new_model
from minilm import InputError
from minilm.claims import Cell, View, as_metrics, decide, true_table
from minilm.data import generator, pad
from minilm.generate import generate
from minilm.results import collect
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

V = 40
PROMPTS = [
    [1, 2, 3, 4, 5],
    [7],
    [9, 8, 9],
]  # of different lengths: every decoder is tested with padding on the left


def tiny(layers=5, seed=0, width=32, vocab_size=V, **changes):
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        initializer_range=0.25,
        num_key_value_heads=2,
        max_position_embeddings=64,
        **changes,
    )
    return Transformer(config, generator(seed, "init")).eval()


def without(model, m, n):
    """The amateur as a model of its own: blocks m to n-1 are cut out; positions, norm and head are
    the expert's."""
    short = copy.deepcopy(model)
    del short.layers[m:n]
    return short


def slow(score, prompts, steps):
    """Greedy decoding without cache, batch or padding; score(ids [1, T]) -> [V], of the last."""
    rows = [list(p) for p in prompts]
    with torch.no_grad():
        for row in rows:
            for _ in range(steps):
                row.append(int(score(torch.tensor([row])).argmax()))
    return rows


def plain_contrast(expert, amateur, alpha, beta):
    """Written as loops over tokens, with probabilities, to be compared with `contrast`."""
    p, scores = expert.softmax(-1), []
    for v in range(len(p)):
        plausible = p[v] >= alpha * p.max()
        scores.append(
            (1 + beta) * expert[v] - beta * amateur[v] if plausible else torch.tensor(-torch.inf)
        )
    return torch.stack(scores)


# --- the combination rule


def test_the_rule_by_hand():
    # p_E = .6 .3 .1 0; alpha = .25 keeps tokens above .15: 0 and 1. s = 1.5 log p_E - .5 log p_A
    p_e, p_a = torch.tensor([0.6, 0.3, 0.1, 0.0]), torch.tensor([0.9, 0.05, 0.0, 0.05])
    scores = contrast(p_e.log(), p_a.log(), alpha=0.25, beta=0.5)
    expected = [
        1.5 * math.log(0.6) - 0.5 * math.log(0.9),
        1.5 * math.log(0.3) - 0.5 * math.log(0.05),
        -math.inf,
        -math.inf,
    ]
    torch.testing.assert_close(scores, torch.tensor(expected))
    assert (
        scores.argmax() == 1
    )  # the expert alone would say 0; the amateur says it as well, so it is discounted
    assert contrast(p_e.log(), p_a.log(), 0.25, beta=None).tolist()[:2] == pytest.approx(
        [math.log(0.6 / 0.9), math.log(0.3 / 0.05)]
    )


def test_the_rule_equals_loops_over_tokens_and_logits_do_as_well_as_log_probabilities():
    expert, amateur = torch.randn(2, 50, V, generator=generator(0, "logits")) * 2
    scores = contrast(expert, amateur, 0.1, 0.5)
    torch.testing.assert_close(
        scores, torch.stack([plain_contrast(e, a, 0.1, 0.5) for e, a in zip(expert, amateur)])
    )
    other = contrast(expert.log_softmax(-1), amateur.log_softmax(-1), 0.1, 0.5)
    assert (other.isinf() == scores.isinf()).all()
    torch.testing.assert_close(other.softmax(-1), scores.softmax(-1))


def test_the_expert_decides_what_is_plausible_and_its_best_token_always_is():
    expert, amateur = torch.randn(2, 200, V, generator=generator(1, "logits")) * 3
    best = expert.argmax(-1, keepdim=True)
    for beta in (0.0, 0.5, 100.0, None):
        scores = contrast(expert, amateur, 0.1, beta)
        assert scores.gather(-1, best).isfinite().all()
        assert (
            scores.isinf() == contrast(expert, torch.zeros_like(amateur), 0.1, beta).isinf()
        ).all()
    assert (
        contrast(expert, amateur, 1.0, 5.0).argmax(-1) == best[:, 0]
    ).all()  # alpha = 1 leaves nothing else
    assert torch.equal(contrast(expert, amateur, 1e-30, 0.0), expert)


def test_padding_rows_of_a_vocabulary_give_no_nan():
    expert = torch.tensor([1.0, 0.5, -math.inf])
    assert contrast(expert, torch.tensor([0.0, 1.0, -math.inf]), 0.1, 0.5).tolist() == [
        1.5,
        0.25,
        -math.inf,
    ]


# --- skipping blocks

ANY_SPANS = [(0, 1), (1, 2), (2, 4), (4, 5), (0, 5)]


@pytest.mark.parametrize("span", ANY_SPANS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"model_type": "mistral", "sliding_window": 3},
        {"tie_word_embeddings": True},
        {"model_type": "mixtral", "num_experts": 3},
    ],
)
def test_the_shared_prefix_equals_two_separate_forwards_at_every_step_batched_and_padded(
    span, changes
):
    model = tiny(**changes)
    short = without(model, *span)
    ids, mask = pad(PROMPTS, left=True)
    more = torch.randint(V, (3, 6), generator=generator(0, "more"))
    full, seen = torch.cat((ids, more), 1), torch.cat((mask, torch.ones(3, 6, dtype=torch.bool)), 1)
    with torch.no_grad():
        expected = contrast(
            model(full, attention_mask=seen).logits,
            short(full, attention_mask=seen).logits,
            0.3,
            0.7,
        )
        for share in (True, False):
            decoder = SkipLayers(model, span, 0.3, 0.7, share=share)
            torch.testing.assert_close(
                decoder(full, attention_mask=seen).logits[seen],
                expected[seen],
                atol=1e-5,
                rtol=1e-5,
            )
            cache, T = decoder.new_cache(3), ids.shape[1]
            parts = [decoder(ids, cache=cache, attention_mask=mask).logits]
            for t in range(T, T + 6):
                parts.append(
                    decoder(full[:, t : t + 1], cache=cache, attention_mask=seen[:, : t + 1]).logits
                )
            torch.testing.assert_close(
                torch.cat(parts, 1)[seen], expected[seen], atol=1e-5, rtol=1e-5
            )


def test_generation_by_skipping_equals_the_slow_way():
    model = tiny()
    short = without(model, 1, 3)
    score = lambda ids: plain_contrast(model(ids).logits[0, -1], short(ids).logits[0, -1], 0.1, 0.5)
    assert generate(SkipLayers(model, (1, 3)), PROMPTS, 12) == slow(score, PROMPTS, 12)
    assert generate(SkipLayers(model, (1, 3)), PROMPTS, 12) != generate(model, PROMPTS, 12)


def test_the_amateur_skips_in_the_prompt_too():
    # filling the prompt's cache by the full model and skipping from the first new token on is
    # another method: its scores differ
    model, ids = tiny(), torch.tensor([[1, 2, 3, 4, 5, 6]])
    decoder = SkipLayers(model, (1, 3))
    with torch.no_grad():
        right = decoder(ids).logits[0, -1]
        cache = decoder.new_cache(1)
        model(ids[:, :5], cache=cache[0])
        model(ids[:, :5], cache=cache[1])
        wrong = decoder(ids[:, 5:], cache=cache).logits[0, -1]
    assert not torch.allclose(right, wrong, atol=1e-2)


def test_beta_0_and_alpha_1_are_greedy_decoding_token_by_token():
    model, other = tiny(), tiny(2, seed=1, width=16)
    greedy = generate(model, PROMPTS, 20)
    for alpha, beta in ((0.1, 0.0), (1.0, 2.0)):
        for decoder in (
            SkipLayers(model, (1, 3), alpha, beta),
            ContrastModels(model, other, alpha, beta),
            DoLa(model, alpha=alpha, beta=beta),
        ):
            assert generate(decoder, PROMPTS, 20) == greedy


def test_a_token_costs_2L_minus_n_block_evaluations_when_the_prefix_is_shared():
    L = 5
    model, ids = tiny(L), torch.tensor([[1, 2, 3]])
    for m, n in ANY_SPANS:
        for share, blocks in ((True, 2 * L - n), (False, 2 * L - (n - m))):
            decoder = SkipLayers(model, (m, n), share=share)
            cache = decoder.new_cache(1)
            decoder(ids, cache=cache)
            decoder(ids[:, :1], cache=cache)
            assert blocks_per_token(cache) == blocks


# --- the other decoders


def test_vanilla_contrastive_decoding_equals_two_models_run_in_full():
    expert, amateur = tiny(), tiny(2, seed=1, width=16)
    score = lambda ids: plain_contrast(
        expert(ids).logits[0, -1], amateur(ids).logits[0, -1], 0.1, 0.5
    )
    assert generate(ContrastModels(expert, amateur), PROMPTS, 12) == slow(score, PROMPTS, 12)


def test_vocabularies_must_agree_or_be_cut_to_the_shorter_one_on_request():
    expert, amateur = tiny(vocab_size=V + 3), tiny(2, seed=1)
    with pytest.raises(InputError, match="43 tokens, the amateur 40.*--truncate-vocab"):
        ContrastModels(expert, amateur)
    assert ContrastModels(expert, amateur, truncate_vocab=True)(
        torch.tensor([[1, 2]])
    ).logits.shape == (1, 2, V)


def test_the_two_divergences_by_hand():
    # p = (1/2, 1/2), q = (1/4, 3/4), M = (3/8, 5/8)
    p, q, m = (0.5, 0.5), (0.25, 0.75), (0.375, 0.625)
    kl = lambda a, b: sum(x * math.log(x / y) for x, y in zip(a, b))
    log = lambda x: torch.tensor(x).log()
    assert divergence(log(p), log(q)).item() == pytest.approx((kl(p, m) + kl(q, m)) / 2)
    assert divergence(log(p), log(q), "official").item() == pytest.approx((kl(m, p) + kl(m, q)) / 2)
    assert divergence(log((1.0, 0.0)), log((0.0, 1.0))).item() == pytest.approx(
        math.log(2)
    )  # the largest value, without NaN
    assert divergence(log(p), log(p)).item() == pytest.approx(0, abs=1e-7)


def test_the_two_divergences_can_choose_different_layers():
    # the second exit is far from p on the whole; the first nearly rules out a token of medium
    # probability, where KL(M || q) explodes
    p = torch.tensor([0.45, 0.45, 0.10]).log()
    exits = torch.tensor([[0.5, 0.5, 1e-12], [0.05, 0.85, 0.10]]).log()
    assert divergence(p, exits).argmax() == 1
    assert divergence(p, exits, "official").argmax() == 0


@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("jsd", ["standard", "official"])
@pytest.mark.parametrize("layers, theta", [(None, 1.0), ((0, 2, 3), 1.2), ((1,), 1.2)])
def test_dola_equals_its_definition_run_in_full_at_every_step(norm, jsd, layers, theta):
    model = tiny(6)
    candidates = layers or (0, 1, 2)

    def score(ids):
        states = model(ids, output_hidden_states=True).hidden_states
        final = model.lm_head(model.norm(states[-1]))[0, -1].softmax(-1)
        exits = [
            model.lm_head(model.norm(states[j]) if norm else states[j])[0, -1].softmax(-1)
            for j in candidates
        ]
        kl = lambda a, b: (a * (a / b).log()).sum()
        jsds = []
        for q in exits:
            m = (final + q) / 2
            jsds.append(kl(final, m) + kl(q, m) if jsd == "standard" else kl(m, final) + kl(m, q))
        q = exits[int(torch.stack(jsds).argmax())]
        scores = torch.where(final >= 0.1 * final.max(), final.log() - q.log(), -torch.inf)
        for v in set(ids[0].tolist()):
            scores[v] = scores[v] / theta if scores[v] > 0 else scores[v] * theta
        return scores

    decoder = DoLa(model, layers, norm=norm, jsd=jsd)
    decoder = RepetitionPenalty(decoder, theta) if theta > 1 else decoder
    assert generate(decoder, PROMPTS, 10) == slow(score, PROMPTS, 10)


def test_dola_takes_the_lower_half_and_a_tied_head_does_not_read_the_embedding():
    assert DoLa(tiny(8)).layers == (0, 1, 2, 3)
    assert DoLa(tiny(8, tie_word_embeddings=True)).layers == (1, 2, 3)
    assert DoLa(tiny(2, tie_word_embeddings=True)).layers == (1,)


def test_the_repetition_penalty_by_hand_and_padding_is_not_a_token_that_was_said():
    class Fixed(torch.nn.Linear):  # a decoder that always gives the same scores
        config = ModelConfig(vocab_size=4, hidden_size=8)
        new_cache = lambda self, B: None
        forward = lambda self, ids, cache, attention_mask: Output(
            torch.tensor([2.0, 3.0, -1.0, -2.0]).expand(*ids.shape, 4)
        )

    decoder = RepetitionPenalty(Fixed(1, 1), 2.0)
    cache = decoder.new_cache(2)
    ids, mask = pad([[1, 2], [3]], left=True)  # the second row is padded with token 0
    first = decoder(ids, cache=cache, attention_mask=mask).logits
    assert first[:, 0].tolist() == [[2.0, 1.5, -2.0, -2.0], [2.0, 3.0, -1.0, -4.0]]
    again = decoder(torch.tensor([[0], [0]]), cache=cache).logits
    assert again[:, 0].tolist() == [[1.0, 1.5, -2.0, -2.0], [1.0, 3.0, -1.0, -4.0]]


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda m: SkipLayers(m, (-1, 2)), "span -1,2"),
        (lambda m: SkipLayers(m, (4, 6)), "span 4,6.*n <= 5"),
        (lambda m: SkipLayers(m, (3, 3)), "m < n"),
        (lambda m: SkipLayers(m, (1, 2), alpha=0.0), "--alpha 0.0"),
        (lambda m: SkipLayers(m, (1, 2), alpha=1.5), "--alpha 1.5"),
        (lambda m: SkipLayers(m, (1, 2), beta=-1.0), "--beta -1.0"),
        (lambda m: DoLa(m, (5,)), "exits 0 .embedding. to 4"),
        (lambda m: DoLa(m, ()), "at least one"),
        (lambda m: RepetitionPenalty(m, 0.5), "--repetition-penalty 0.5"),
    ],
)
def test_settings_that_mean_nothing_are_refused(make, words):
    with pytest.raises(InputError, match=words):
        make(tiny())


def test_a_prompt_longer_than_the_context_is_refused_by_every_decoder():
    model = tiny()
    for decoder in (
        SkipLayers(model, (1, 2)),
        DoLa(model),
        ContrastModels(model, model),
        RepetitionPenalty(DoLa(model), 1.2),
    ):
        with pytest.raises(InputError, match="the prompt has 64 tokens, the model reads 64"):
            generate(decoder, [[1] * 64])


# --- which blocks


def test_an_eighth_of_the_blocks_is_skipped_rounded_to_even_and_at_least_one():
    assert {L: span_sizes(L)[0] for L in (2, 4, 8, 24, 28, 30, 32, 36, 40)} == {
        2: 1,
        4: 1,
        8: 1,
        24: 3,
        28: 4,
        30: 4,
        32: 4,
        36: 4,
        40: 5,
    }
    assert span_sizes(32)[1] == 4 and span_sizes(8)[1] == 1 and span_sizes(32, 7)[1] == 7


def test_the_heuristic_draws_its_start_from_4_to_half_the_depth():
    rng = random.Random(2023)
    assert {heuristic_span(32, rng) for _ in range(300)} == {(m, m + 4) for m in range(4, 16)}
    assert {heuristic_span(8, rng) for _ in range(50)} == {(1, 2), (2, 3), (3, 4)}
    assert heuristic_span(4, rng) == (1, 2)
    assert heuristic_span(9, rng, min_start=8) == (8, 9)  # clipped at L
    with pytest.raises(InputError, match="blocks 0 to 3"):
        heuristic_span(4, rng, min_start=9)


def test_the_entropy_rule_by_hand(capsys):
    # L = 16: n_skip = 2, so i begins at 6. The entropy has a hump at 9 and falls from there.
    H = [3.0] * 8 + [3.1, 3.2, 2.95, 2.5, 2.0, 1.5, 1.0, 0.5]
    # e_6 = (3.0 - 3.1)/2 and e_7 = (3.0 - 3.2)/2 are negative; e_8 = (3.1 - 2.95)/2 = .075;
    # e_9 = (3.2 - 2.5)/2 = .35, so n = 11
    assert entropy_span(H) == (9, 11)
    assert entropy_span(H, threshold=0.05) == (8, 10)
    assert entropy_span(H, min_start=10) == (12, 14)  # i begins at 12
    assert capsys.readouterr().out == ""
    assert entropy_span([1.0] * 16) == (6, 8)  # nothing falls: m = (4 + 8)/2
    assert "warning: SL-D finds no lasting fall above 0.1" in capsys.readouterr().out


def test_in_a_32_block_model_the_rule_never_starts_below_block_6():
    assert entropy_span([32.0 - i for i in range(32)]) == (6, 10)  # i = n_skip + 4 = 8, n = 10


def test_a_fall_that_is_undone_later_does_not_count():
    # e_6 = (3.0 - 1.4)/2, but H_8 = 1.4 is below H_13 = 1.5; e_12 = (1.0 - .5)/2 = .25, and .5
    # stays above .2
    assert entropy_span([3.0] * 8 + [1.4, 1.0, 1.0, 1.0, 1.0, 1.5, 0.5, 0.2]) == (12, 14)


def test_the_entropy_curve_equals_one_position_at_a_time_without_the_last():
    model = tiny()
    ids, mask = pad([[1, 2, 3, 4], [5, 6]])
    with torch.no_grad():
        expected = []
        for i in range(5):
            values = []
            for row in ([1, 2, 3, 4], [5, 6]):
                h = model(torch.tensor([row]), output_hidden_states=True).hidden_states[i][0]
                p = model.lm_head(model.norm(h)).softmax(-1)
                values += [-(q * q.log()).sum().item() for q in p[:-1]]
            expected.append(sum(values) / 4)
    assert entropy_curve(model, ids, mask) == pytest.approx(expected, abs=1e-5)


# --- the small model, and a look inside


def test_an_exercise_is_told_in_one_language_and_its_answer_has_nine_tokens_per_event():
    world = replace(WORLD, seed=5)
    p = world.sample(random.Random(0), "test")
    prompt, solution = exercise(world, p, "c")
    assert {world.language_of[i] for i in prompt + solution} == {None, "c"}
    assert prompt[-1] == ANSWER and solution[-1] == EOS and len(solution) == 3 * EVENT + 3
    assert world.final_number(solution) == p.final
    words = world.gloss(solution)
    for at, e in zip(range(0, 27, 9), p.events):  # AT says where
        assert [words[at], words[at + 2], words[at + 4], words[at + 7]] == [
            e.verb,
            "so",
            "-+"[e.sign > 0],
            str(e.after),
        ]
    assert words[27] == "answer"


def test_a_clone_is_not_read_before_the_english_start_is_over_and_never_a_test_problem():
    world, rng = replace(WORLD, seed=5), random.Random(0)
    languages = lambda progress: {
        world.language_of[i] for _ in range(80) for i in document(world, TEXT, rng, progress)
    }
    assert languages(0.39) <= {None, "en"}
    assert languages(0.4) == {None, *LANGUAGES}
    assert all(
        world.split(world.sample(rng, "train", TEXT.gain, TEXT.zipf)) == "train" for _ in range(50)
    )


def test_the_loss_of_all_blocks_is_the_ordinary_loss_and_a_dropped_block_is_as_good_as_cut_out():
    model = tiny()
    ids, real = pad([[1, 2, 3, 4], [5, 6, 7]])

    def plain(model):
        losses = [
            -model(row[None]).logits[0, t].log_softmax(-1)[row[t + 1]]
            for row, n in zip(ids, (4, 3))
            for t in range(n - 1)
        ]
        return torch.stack(losses).mean()

    torch.testing.assert_close(lm_loss(model, ids, real, range(5)), plain(model))
    torch.testing.assert_close(lm_loss(model, ids, real, [0, 1, 3, 4]), plain(without(model, 2, 3)))


def test_the_views_are_the_lens_of_every_layer_and_every_cut_model():
    model, ids = tiny(), torch.tensor([[1, 2, 3, 4]])
    seen = dict(views(model, ids, [(1, 2), (2, 5)]))
    assert list(seen) == ["h0", "h1", "h2", "h3", "h4", "expert", "[1,2)", "[2,5)"]
    with torch.no_grad():
        # (an early exit skips all later blocks)
        for name, m, n in (
            ("h0", 0, 5),
            ("h3", 3, 5),
            ("expert", 5, 5),
            ("[1,2)", 1, 2),
            ("[2,5)", 2, 5),
        ):
            torch.testing.assert_close(
                seen[name], without(model, m, n)(ids).logits, atol=1e-5, rtol=1e-5
            )


def test_blocks_are_dropped_in_training_each_with_its_chance_but_never_the_first_or_the_last(
    monkeypatch,
):
    kept = []

    def recorded(model, ids, real, blocks):
        kept.append(list(blocks))
        return lm_loss(model, ids, real, blocks)

    monkeypatch.setattr(paper, "lm_loss", recorded)
    pretrain(replace(WORLD, seed=3), 3, steps=40, batch=1, drop=0.5, layers=6, width=16)
    assert len(kept) == 40
    for block in range(6):
        share = sum(block in blocks for blocks in kept) / 40
        assert share == 1 if block in (0, 5) else 0.25 < share < 0.75
    kept.clear()
    pretrain(replace(WORLD, seed=3), 3, steps=5, batch=1, drop=0.0, layers=6, width=16)
    assert kept == [list(range(6))] * 5


def test_the_early_model_is_the_same_one_at_an_earlier_step():
    settings = {"batch": 2, "layers": 3, "width": 16}
    models = pretrain(WORLD, 3, steps=4, early=0.5, **settings)
    first, second = (m.lm_head.weight for m in (models.early, models.base))
    assert not torch.equal(first, second)
    assert torch.equal(
        pretrain(WORLD, 3, steps=4, early=1.0, **settings).early.lm_head.weight, second
    )


def small_model(layers=4, seed=0):
    world = replace(WORLD, seed=3)
    return world, new_model(world, 32, layers, generator(seed, "init")).eval()


def test_the_walk_through_shows_what_each_view_says_at_each_place_and_the_contrast_of_two():
    world, model = small_model()
    p = world.sample(random.Random(0), "test")
    prompt, solution = exercise(world, p, "c")
    said = walk_through(model, world, p, "c", (1, 2))
    assert list(said) == ["due", "h0", "h1", "h2", "h3", "expert", "amateur", "SL"]
    assert said["due"] == solution and {len(ids) for ids in said.values()} == {len(solution)}
    ids = torch.tensor([prompt + solution])[:, :-1]
    with torch.no_grad():
        decoder = SkipLayers(model, (1, 2))(ids).logits[0, len(prompt) - 1 :]
        amateur = without(model, 1, 2)(ids).logits[0, len(prompt) - 1 :]
    assert said["SL"] == decoder.argmax(-1).tolist()
    assert said["amateur"] == amateur.argmax(-1).tolist() != said["expert"]


def test_with_the_method_switched_off_the_walk_through_shows_the_expert_in_its_place():
    world, model = small_model()
    p = world.sample(random.Random(0), "test")
    on, off = (walk_through(model, world, p, "a", (1, 3), beta=beta) for beta in (2.0, 0.0))
    assert off["SL"] == off["expert"] == on["expert"] != on["SL"]
    assert walk_through(model, world, p, "a", (1, 3), alpha=1.0, beta=2.0)["SL"] == on["expert"]


def test_an_early_exit_is_the_amateur_that_skips_all_later_blocks():
    world, model = small_model()
    ids = torch.tensor([exercise(world, world.sample(random.Random(0)), "a")[0]])
    seen = dict(views(model, ids, [(2, 4)]))
    torch.testing.assert_close(seen["h2"], seen["[2,4)"])


def test_the_papers_file_shows_its_example_and_its_table_within_seconds(capsys):
    paper.main(paper.Config(quick=True))
    printed = capsys.readouterr().out
    for words in ("A training text", "due", "amateur", "SL", "greedy", "skipped block", "no verbs"):
        assert words in printed
    with pytest.raises(InputError, match="--beta -1"):
        paper.main(paper.Config(quick=True, beta=-1.0))


# --- the experiment


def test_the_places_of_an_answer():
    world = replace(WORLD, seed=5)
    p = world.sample(random.Random(0), "test")
    words = [world.tokens[i] for i in exercise(world, p, "en")[1]]
    at = places()
    assert [words[i] for i in at["verb"]] == [e.verb for e in p.events]
    assert [words[i] for i in at["sign"]] == ["-+"[e.sign > 0] for e in p.events]
    assert [words[i] for i in at["result"]] == [str(e.after) for e in p.events]
    assert [words[i] for i in at["function"]] == ["so", "so", "so", "answer"]


class Parrot:
    """Knows the answers by heart, but says each word in its own way: every lens shows it."""

    def __init__(self, world, rows, translate):
        target = [row[1:] for row in rows]
        said = torch.tensor([[translate(int(i)) for i in row] for row in target])
        self.logits = torch.nn.functional.one_hot(said, len(world.tokens)).float() * 50

    def views(self, model, ids, spans):
        yield "expert", self.logits


def test_who_answers_in_english_has_no_word_right_and_who_stutters_only_the_rest(monkeypatch):
    world = replace(WORLD, seed=3)
    rng = random.Random(1)
    problems = [world.sample(rng, "test") for _ in range(6)]
    rows = [prompt + solution for prompt, solution in (exercise(world, p, "a") for p in problems)]
    verbs = {world.id[f"{e.verb}_a"] for p in problems for e in p.events}

    def in_english(i):
        return world.encode([world.tokens[i].partition("_")[0]])[0]

    def so_for_verbs(i):
        return world.id["so_a"] if i in verbs else i

    for translate, expected in (
        (in_english, {"own": 0, "base": 1, "function": 0, "verb": 0, "sign": 1, "result": 1}),
        (so_for_verbs, {"own": 1, "base": 0, "function": 1, "verb": 0, "sign": 1, "result": 1}),
        (int, {"own": 1, "base": 0, "function": 1, "verb": 1, "sign": 1, "result": 1}),
    ):
        monkeypatch.setattr(experiment, "views", Parrot(world, rows, translate).views)
        seen = look(world, None, problems, "a", [])["expert"]
        assert seen.pop(("entropy", "a")) == pytest.approx(0, abs=1e-5)
        assert seen == {(name, "a"): value for name, value in expected.items()}


def test_what_the_contrast_favours_by_hand():
    # three places, four words; the right one is 0. Place 0: the expert is right. 1: it says 1, and
    # the amateur says 1 even more: z_E - z_A is 1 - 0 for the right word, 2 - 3 for the other, so
    # the contrast 1.5 * z_E - .5 * z_A turns 1 < 2 into 1.5 = 1.5, and a little more would help.
    # 2: it says 2, the amateur has the right word higher: the contrast makes it worse.
    expert = torch.tensor([[[3.0, 0, 0, 0], [1.1, 2, 0, 0], [1.9, 0, 2, 0]]])
    amateur = torch.tensor([[[0.0, 3, 0, 0], [0.0, 3, 0, 0], [2.5, 0, 1, 0]]])
    found = at_the_verbs(expert, amateur, torch.zeros(1, 3, dtype=torch.int64))
    assert float(found["gap"]) == 0.5  # of two errors the contrast prefers the right word in one
    assert float(found["subtracted"]) == pytest.approx(2 / 3)  # 0 right, 1 put right, 2 wrong
    assert float(found["averaged"]) == pytest.approx(
        2 / 3
    )  # 2 put right: (2 * 1.9 + 2.5) / 3 > 5 / 3


def test_sl_d_looks_at_training_problems_and_sl_h_draws_a_span_for_each_question(monkeypatch):
    looked_at, skipped = [], {}

    def record_curve(model, ids, mask):
        looked_at.append(ids)
        return entropy_curve(model, ids, mask)

    def record_spans(cfg, arm, models, prompts, spans):
        skipped.setdefault(arm.span, []).append(list(spans))
        return [[]] * len(prompts)

    monkeypatch.setattr(experiment, "entropy_curve", record_curve)
    monkeypatch.setattr(experiment, "answer", record_spans)
    cfg = Config(
        methods=("greedy", "sl-h", "sl-d"),
        steps=1,
        batch=1,
        width=16,
        problems=40,
        exemplars=5,
        quick=True,
    )
    experiment.run(cfg, 3)
    world = replace(WORLD, seed=3)
    shown, test = problems_of(cfg, world, 3)
    assert {world.split(p) for p in shown} == {"train"} and {world.split(p) for p in test} == {
        "test"
    }
    for ids, language in zip(looked_at, LANGUAGES, strict=True):
        rows = [prompt + answer for prompt, answer in (exercise(world, p, language) for p in shown)]
        assert torch.equal(ids, pad(rows)[0])
    for one_for_all, draws in zip(skipped["sl-d"], skipped["sl-h"], strict=True):
        assert len(set(one_for_all)) == 1 and len(one_for_all) == len(draws) == 40
        assert set(draws) == {(1, 2), (2, 3), (3, 4)}
    assert skipped["sl-h"][0] != skipped["sl-h"][1]  # drawn anew in every language
    model = new_model(world, 16, 8, generator(3, "init"))
    spans = [choose_spans(cfg, world, model, shown, seed, "a")["sl-h"] for seed in (3, 4)]
    assert spans[0] != spans[1]


def test_questions_with_the_same_span_are_one_batch_and_the_answers_keep_their_order():
    world, model = small_model()
    models = Models(model, model)
    rng = random.Random(0)
    prompts = [exercise(world, world.sample(rng), "a")[0] for _ in range(6)]
    spans = [(1, 2), (2, 3), (1, 2), (3, 4), (2, 3), (1, 2)]
    answers = answer(Config(layers=4, width=32), ARMS["sl-h"], models, prompts, spans)
    for prompt, span, given in zip(prompts, spans, answers):
        assert prompt + given == generate(SkipLayers(model, span), [prompt], 30, eos_id=EOS)[0]


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms_and_seeds_differ():
    cfg = Config(steps=2, problems=3, exemplars=3, layers=4, width=32, quick=True)
    together = experiment.run(replace(cfg, methods=("greedy", "sl-h", "dola")), 100).metrics
    alone = experiment.run(replace(cfg, methods=("sl-h",)), 100).metrics
    assert alone["sl-h"] == together["sl-h"] and alone["[1,2)"] == together["[1,2)"]
    assert experiment.run(replace(cfg, methods=("sl-h",)), 101).metrics["h1"] != alone["h1"]


# --- the claims and the script


def test_nothing_is_concluded_from_models_that_cannot_solve_english_problems():
    early_exits = next(claim for claim in CLAIMS if claim.id == "C1")
    table = true_table(early_exits)
    for worst_seed, verdict in ((0.9, "holds"), (0.5, "not tested")):
        table[Cell("greedy", "acc en")] = [0.95, 0.95, 0.95, worst_seed]
        assert decide(early_exits, View(as_metrics(table))).verdict == verdict
    assert english_is_solved(View(as_metrics(table))).startswith("gate failed: greedy solves 0.50")
    assert {claim.id for claim in CLAIMS if not claim.gate} == {"C7", "C7t", "R1", "R2"}


def test_the_claims_ask_for_what_the_runs_measure():
    """Spans, exits and arms are named in the claims and made in the experiment."""
    cfg = Config(steps=1, problems=2, exemplars=2, width=16, batch=1, quick=True, full=True)
    run = experiment.run(replace(cfg, methods=tuple(ARMS)), 100)
    metrics, _ = collect([run])
    view = View(metrics)
    for claim in CLAIMS:
        for cell in (*claim.method, *claim.baseline, *claim.controls, *claim.given):
            view(*cell)
    assert {*LOWER, *SPANS, *SWEEP, *OURS} <= set(metrics)
    assert set(JUDGED) <= set(DEFAULT) <= set(ARMS) and len(spans_to_look_at(8)) == 10


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = experiment.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "skip_layer_cd.json").exists()
    assert (tmp_path / "skip_layer_cd.png").stat().st_size > 10_000
    assert [c["verdict"] for c in results["claims"]] == ["smoke run"] * len(CLAIMS)
    for c in results["claims"]:
        assert f"\n{c['id']:4} smoke run" in printed
    assert set(DEFAULT) <= set(results["metrics"])
    assert results["metrics"]["beta 0"]["same a"]["mean"] == 1
    assert set(results["depends"]) == {"text", "exam", "weights"}


def test_more_seeds_runs_the_arms_that_are_compared_and_a_typed_list_of_seeds_is_obeyed(
    monkeypatch, tmp_path
):
    asked = []

    def recorded(run, cfg, seeds, workers):
        asked.append((cfg.methods, tuple(seeds)))
        raise InputError("enough")

    monkeypatch.setattr(experiment, "run_seeds", recorded)
    for changes, expected in (
        ({"more_seeds": True}, (JUDGED, MORE_SEEDS)),
        ({"more_seeds": True, "seeds": (7,)}, (JUDGED, (7,))),
        ({"full": True, "seeds": (7, 8)}, (tuple(ARMS), (7, 8))),
    ):
        with pytest.raises(InputError, match="enough"):
            experiment.main(Config(out=str(tmp_path), **changes))
        assert asked.pop() == expected


def test_any_choice_of_arms_gives_a_table_and_a_figure_that_shows_them(tmp_path):
    sweep = ("greedy", *SWEEP)
    for methods in (("sl-d",), ("greedy", "beta 2.0", "cd"), sweep):
        cfg = Config(methods=methods, width=16, quick=True, workers=1, out=str(tmp_path))
        results = experiment.main(cfg)
        assert set(methods) <= set(results["metrics"])
        drawn = [label.get_text() for label in figure(results).axes[4].get_yticklabels()]
        assert set(drawn) == set(methods) - {"beta 0", *SWEEP}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": ("sl-x",)}, "sl-x"),
        ({"alpha": 0.0}, "--alpha"),
        ({"beta": -1.0}, "--beta"),
        ({"full": True, "more_seeds": True}, "one of them"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_trained(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        experiment.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())


def test_sl_d_can_choose_another_span_than_the_first_it_may():
    falls_late = [3.0] * 12 + [2.5, 2.0, 1.0, 0.5]
    falls_at_once = [3.0 - 0.2 * i for i in range(16)]
    assert find_entropy_span(falls_at_once) == (6, 8)  # the first it may
    assert find_entropy_span(falls_late)[0] > 6
    assert find_entropy_span([1.0] * 16) is None
