"""Proxy-tuning: its identities, three caches in step, and the look inside."""

from dataclasses import replace

import pytest
import torch

from methods import proxy_tuning
from methods.proxy_tuning import ProxyTuned, exercise, proxy, tune, walk_through
from methods.question_alignment_tasks import prompt
from methods.worlds.clones import ANSWER, BOS, SOLVE, CloneWorld, Event, Problem, new_model
from minilm import InputError
from minilm.data import generator
from minilm.generate import generate
from minilm.transformer import Transformer

WORLD = CloneWorld()
EVE = Problem("Eve", "coins", 7, (Event(1, "finds", 4, 7, 11), Event(-1, "sells", 2, 11, 9)))
IDS = torch.tensor([[BOS, 9, 30, 12]])


def tiny(name, width=32, layers=2, world=WORLD):
    return new_model(world, width, layers, generator(0, name)).eval()


def three():
    return tiny("large"), tiny("expert", 16, 1), tiny("base", 16, 1)


def same(a, b):
    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_the_arithmetic_by_hand():
    # tuning raised token 1 by 3 and lowered token 0 by 1; M prefers token 0 by 2
    z = proxy(torch.tensor([4.0, 2.0]), torch.tensor([0.0, 5.0]), torch.tensor([1.0, 2.0]))
    assert z.tolist() == [3.0, 5.0]
    z = proxy(torch.tensor([4.0, 2.0]), torch.tensor([0.0, 5.0]), torch.tensor([1.0, 2.0]), 0.25)
    assert z.tolist() == [3.75, 2.75]


def test_a_model_that_is_its_own_anti_expert_becomes_the_expert_and_no_difference_changes_nothing():
    large, expert, base = three()
    same(ProxyTuned(base, expert, base)(IDS).logits, expert(IDS).logits)
    same(ProxyTuned(large, expert, base, alpha=0.0)(IDS).logits, large(IDS).logits)
    same(ProxyTuned(large, expert, expert, alpha=1.5)(IDS).logits, large(IDS).logits)
    moved = 0.5 * (expert(IDS).logits - base(IDS).logits)
    same(ProxyTuned(large, expert, base, 0.5)(IDS).logits, large(IDS).logits + moved)


def test_log_probabilities_give_the_same_choice_as_raw_logits():
    models = three()
    z = ProxyTuned(*models)(IDS).logits
    p = [m(IDS).logits.log_softmax(-1) for m in models]
    same(z.softmax(-1), (p[0] + p[1] - p[2]).softmax(-1))


def test_three_caches_read_the_chosen_tokens_and_padding_changes_nothing():
    model = ProxyTuned(*three()).eval()
    prompts = [prompt(WORLD, "cot", EVE, "a"), [BOS, SOLVE, 20, ANSWER]]
    together = generate(model, prompts, max_new_tokens=8)
    for ask, out in zip(prompts, together):
        row = list(ask)
        for _ in range(8):  # without any cache
            row.append(model(torch.tensor([row])).logits[0, -1].argmax().item())
        assert out == row


def test_ids_that_one_of_the_models_lacks_are_never_chosen():
    long = tiny("long", 16, 1, CloneWorld(languages=("en", *"abcde")))
    logits = ProxyTuned(tiny("large"), long, tiny("base", 16, 1))(IDS).logits
    assert logits.shape[-1] == len(WORLD.tokens)


def test_half_precision_is_subtracted_in_single_precision():
    z = proxy(*(torch.tensor([x], dtype=torch.bfloat16) for x in (1.0, 300.0, 298.0)))
    assert z.dtype == torch.float32 and z.item() == 3.0


def test_no_text_may_outgrow_the_shortest_of_the_three():
    large, expert, base = three()
    config = replace(base.config, max_position_embeddings=12)
    short = Transformer(config, generator(0, "short")).eval()
    model = ProxyTuned(large, expert, short)
    assert len(generate(model, [[BOS, 9, 30]], 40)[0]) == 12
    with pytest.raises(InputError, match="reads 12"):
        generate(model, [[BOS] * 12], 4)


def test_the_look_inside_is_the_sum_and_without_a_difference_it_is_the_large_model():
    large, expert, base = three()
    ask, answer = exercise(WORLD, EVE)
    z = walk_through(ProxyTuned(large, expert, base), ask, answer)
    assert {logits.shape for logits in z.values()} == {(len(answer), len(WORLD.tokens))}
    same(z["sum"], z["M"] + z["S+"] - z["S-"])
    ids = torch.tensor([ask + answer])
    same(z["M"][0], large(ids).logits[0, len(ask) - 1])  # before the answer's first token
    off = walk_through(ProxyTuned(large, base, base), ask, answer)
    same(off["sum"], off["M"])
    assert not torch.equal(z["sum"].argmax(-1), off["sum"].argmax(-1))


def test_tuning_moves_the_small_model_and_leaves_its_start():
    small = tiny("small", 16, 1)
    before = small.embed.weight.clone()
    tuned = tune(small, WORLD, 0, 3)
    assert torch.equal(small.embed.weight, before)
    assert not torch.equal(tuned.embed.weight, before)


def test_the_papers_file_shows_the_look_inside_and_the_result(capsys):
    proxy_tuning.main(proxy_tuning.Config(quick=True))
    printed = capsys.readouterr().out
    for words in ("due", "z_M  +  z_S+  -  z_S-", "M + 1 (S+ - S-)", "M, tuned itself"):
        assert words in printed
    with pytest.raises(InputError, match="--alpha -1.0"):
        proxy_tuning.main(proxy_tuning.Config(alpha=(-1.0,)))
