"""TransLLM at mini scale: the chain and its parser by hand, what is learned from what, what no stage shows, the exam, the whole script."""

import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods.experiments import transllm
from methods.experiments.transllm import (ARMS, TAGS, Arm, Config, claims, exam, extend, make_rkd, parse_chain, pretrain, respond, response_loss, tcot,
                              train, transfer)
from methods.worlds.transllm import (ASSISTANT, BENIGN, BOS, CANNOT, EOS, HARMFUL, ID, LEXICON, REFUSAL, TAUGHT, TEXT, USER, VALUES, WORDS,
                                    V, ChatWorld, encode, is_target, prompt, show, translate)
from minilm.claims import held
from minilm import InputError
from minilm.data import generator
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

QUICK = Config(quick=True, base_steps=2, mono_steps=2, translation_steps=2, transfer_steps=2, width=32, layers=1)


def tiny(vocab_size=WORDS + V):
    return Transformer(ModelConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2,
                                   max_position_embeddings=256, initializer_range=0.05, model_type="llama"), generator(0, "init"))


class Scripted(torch.nn.Module):
    """A model whose next token depends on the last one alone, as a table says."""

    def __init__(self, table):
        super().__init__()
        self.table, self.anchor = table, torch.nn.Parameter(torch.zeros(1))

    def new_cache(self, B):
        return None

    def forward(self, ids, cache=None, attention_mask=None):
        following = torch.tensor([[self.table.get(int(i), EOS) for i in row] for row in ids])
        return Output(F.one_hot(following, WORDS + 2 * V + 3).float())


# --- the chain

def test_the_chain_and_its_three_segments_by_hand():
    chain = tcot(TAGS, [10, 11], [20], [30, 31])
    assert chain == [TAGS.english, 10, 11, TAGS.response, 20, TAGS.target, 30, 31]
    assert parse_chain(chain, TAGS) == ([10, 11], [20], [30, 31], True)


@pytest.mark.parametrize("ids, english, response, answer", [
    ([], None, None, None),
    ([10, 11], None, None, None),
    ([TAGS.response, 20], None, [20], None),
    ([TAGS.english, 10, TAGS.target, 30], [10], None, [30]),
    ([TAGS.english, TAGS.response, TAGS.target, TAGS.target, 9], [], [], []),  # the answer ends at the second <T>
    ([7, TAGS.english, 10, TAGS.response, 20, TAGS.target, 30], [10], [20], [30]),  # something before the first tag
    ([TAGS.target, 30, TAGS.response, 20, TAGS.english, 10], [10], [20], [30]),  # out of order
])
def test_an_ill_formed_chain_is_cut_as_far_as_it_goes_and_marked(ids, english, response, answer):
    assert parse_chain(ids, TAGS) == (english, response, answer, False)


def test_a_missing_tag_is_appended_once_and_decoding_goes_on_from_there():
    # after the prompt the model says 7 and stops; after <RESPONSE> it says 8, after <T> 9
    model = Scripted({ASSISTANT: 7, TAGS.response: 8, TAGS.target: 9})
    answers, helped = respond(model, [[BOS, USER, 50, ASSISTANT], [BOS, USER, ASSISTANT]], EOS, needed=TAGS[1:])
    assert answers == [[7, TAGS.response, 8, TAGS.target, 9]] * 2 and helped == 1.0
    complete = Scripted({ASSISTANT: TAGS.english, TAGS.english: TAGS.response, TAGS.response: TAGS.target, TAGS.target: 9})
    answers, helped = respond(complete, [[BOS, ASSISTANT]], EOS, needed=TAGS[1:])
    assert parse_chain(answers[0], TAGS) == ([], [], [9], True) and helped == 0


def test_the_chat_template_repeats_bos_in_every_user_turn():
    assert prompt([50], [60, 61], [70]) == [BOS, USER, 50, ASSISTANT, 60, 61, EOS, BOS, USER, 70, ASSISTANT]
    assert show(prompt(encode("and the pet ?"))) == "<s> [user] and the pet ? [assistant]"


def test_the_target_language_reverses_the_words_keeps_the_mark_shares_no_token_and_translates_back():
    english = encode("what is the pet of mia ?")
    assert show(translate(english)) == "MIA OF PET THE IS WHAT ?"
    assert translate(translate(english)) == english
    assert is_target(translate(english)) and not set(translate(english)) & set(english)
    assert translate([]) == [] and len(set(LEXICON)) == V <= 125


# --- learning

def test_only_the_answer_is_learned_and_the_loss_is_the_mean_over_its_tokens():
    model, read, learned = tiny(), [BOS, USER, 20, ASSISTANT], [30, 31, EOS]
    logits = model(torch.tensor([[*read, *learned]])).logits[0]
    by_hand = F.cross_entropy(logits[3:6], torch.tensor(learned))
    torch.testing.assert_close(response_loss(model, [(read, learned)]), by_hand)
    longer = [([BOS, USER, 20, 21, 22, ASSISTANT], [40, EOS]), (read, learned)]  # padding beside it changes nothing
    other = F.cross_entropy(model(torch.tensor([[*longer[0][0], 40, EOS]])).logits[0][5:7], torch.tensor([40, EOS]))
    torch.testing.assert_close(response_loss(model, longer), (3 * by_hand + 2 * other) / 5)


def test_eos_is_learned():
    # masked away as padding it would never be said
    model = tiny()
    response_loss(model, [([BOS], [30, EOS])]).backward()
    assert model.lm_head.weight.grad[EOS].abs().max() > 0.01


def test_the_chat_model_stays_bit_for_bit_what_it_was_unless_everything_may_learn():
    world, base = ChatWorld(0), tiny()
    before = {n: p.clone() for n, p in base.state_dict().items()}
    _, model = pretrain(QUICK, Arm(), extend(QUICK, base, 0), world, 0)
    state = model.state_dict()
    assert all(torch.equal(state[n][: len(p)], p) for n, p in before.items())
    assert not torch.equal(state["embed.weight"][WORDS + V :], extend(QUICK, base, 0).embed.weight[WORDS + V :])
    rkd = {0: world.pool[0][1]}
    merged = transfer(QUICK, Arm(merge=True), model, world, rkd, 0).state_dict()
    assert not any(torch.equal(merged[n][: len(p)], p) for n, p in before.items() if p.dim() > 1)
    _, model = pretrain(replace(QUICK, embed="all"), Arm(), extend(QUICK, base, 0), world, 0)
    assert not torch.equal(model.embed.weight[: WORDS + V], before["embed.weight"])


def test_recovery_kd_is_what_the_model_says_and_not_what_is_true():
    """The fact table is changed after the model has learned it: the wrong answers must turn up in the data of stage 3."""
    world, model = ChatWorld(3), tiny()
    facts, rng = world.held[:4], random.Random(0)
    lessons = [(prompt(world.question(f)), [*world.answer(f), EOS]) for f in facts]
    train(replace(QUICK, batch=8), model, lambda: rng.choice(lessons), 120, 1e-2, "four facts")
    learned = {f: world.answer(f) for f in facts}
    for f in facts:
        world.facts[f] = next(v for v in VALUES[f[1]] if v != world.facts[f])
    rkd = make_rkd(model, [prompt(world.question(f)) for f in facts], EOS)
    assert [rkd[i] for i in range(4)] == [learned[f] for f in facts]
    assert all(rkd[i] != world.answer(f) for i, f in enumerate(facts))


def test_empty_and_cut_off_answers_are_dropped_and_refusals_are_kept():
    refusal = dict(zip([ASSISTANT, *encode(REFUSAL)], encode(REFUSAL)))
    assert make_rkd(Scripted(refusal), [[BOS, ASSISTANT]], EOS) == {0: encode(REFUSAL)}
    assert make_rkd(Scripted({ASSISTANT: EOS}), [[BOS, ASSISTANT]], EOS) == {}
    assert make_rkd(Scripted({ASSISTANT: 7, 7: 7}), [[BOS, ASSISTANT]], EOS) == {}


# --- what keeps the experiment honest

def test_no_stage_shows_what_the_exam_asks():
    world, rng = ChatWorld(5), random.Random(0)
    asked = [world.question(f) for f in world.held] + [q for x in sum(world.held_things, []) for q, _ in world.how_to(x)]
    assert not [q for q, _ in world.pool if q in asked]
    assert not {tuple(encode(f"and the {a} ?")) for a in VALUES} & {tuple(q) for q, _ in world.pool}
    true = {tuple(world.answer(f, w)) for f in world.facts for w in ("the {a} of {n} is {v} .", "{v} is the {a} of {n} .")}
    true |= {tuple(encode(f"mix {f} {w} {g} .")) for f, g in world.recipes.values() for w in ("and", "with")}
    texts = [tuple(world.sentence(rng)) for _ in range(4000)]
    assert not true & set(texts) and len(set(texts)) > 1000
    taught = [show(world.sentence(rng, TAUGHT)) for _ in range(500)]
    assert not [t for t in taught if t.startswith(("how", "and", "mix", "i "))]


def test_both_kinds_of_held_out_things_are_tested_and_the_pool_touches_the_others():
    world = ChatWorld(0)
    assert [len(x) for x in world.held_things] == [6, 6] and len(world.held) == 30
    in_pool = {q[-2] for q, _ in world.pool if show(q).startswith("how")}
    assert in_pool == {ID[x] for x in BENIGN + HARMFUL} - {ID[x] for x in sum(world.held_things, [])}
    assert ChatWorld(0).facts == world.facts != ChatWorld(1).facts


def test_every_arm_takes_the_same_number_of_steps_and_the_same_stage_3_draws(monkeypatch):
    taken, calls = {}, []
    monkeypatch.setattr(transllm, "train", lambda cfg, model, draw, steps, lr, desc, first=0: calls.append((steps, draw)))
    world, base, said = ChatWorld(0), tiny(), encode("rice and rice and rice .")  # what the chat model answers to everything
    for name, arm in ARMS.items():
        _, model = pretrain(Config(), arm, extend(QUICK, base, 0), world, 0)
        transfer(Config(), arm, model, world, dict.fromkeys(range(len(world.pool)), said), 0)
        taken[name], calls[:] = list(calls), []
    assert len({sum(steps for steps, _ in calls) for calls in taken.values()}) == 1
    stage_3 = {name: [calls[-1][1]() for _ in range(40)] for name, calls in taken.items()}
    assert stage_3["transllm"] == stage_3["merge-full-ft"] == stage_3["no-mono"] == stage_3["no-translation"]
    same_questions = [(a[0] == b[0], a[1] == b[1]) for a, b in zip(stage_3["transllm"], stage_3["direct"])]
    assert all(question for question, _ in same_questions) and not all(answer for _, answer in same_questions)
    taught = {name: {tuple(learned) for _, learned in pairs} for name, pairs in stage_3.items()}
    own = (TAGS.response, *said, EOS)
    back = (TAGS.target, *translate(said), EOS)
    assert own in taught["transllm"] and any(learned[-len(back) :] == back for learned in taught["transllm"])
    assert own not in taught["gpt4-kd"] and own not in taught["no-rkd"]
    assert not any({*said[:2]} <= {*learned} for learned in taught["gpt4-kd"])


def test_arms_differ_from_transllm_in_one_thing():
    for name, arm in ARMS.items():
        assert sum(a != b for a, b in zip(arm, Arm())) == (name != "transllm"), name


# --- the exam

def oracle(world, change=lambda answer: answer):
    """Answers every question of the exam as the chat model should."""
    known = {tuple(prompt(world.question(f))): world.answer(f) for f in world.facts}
    known |= {tuple(prompt(q)): a for x in BENIGN + HARMFUL for q, a in world.how_to(x)}
    histories = [([50], [60]) for _ in world.held]
    known |= {(*prompt([50], [60], encode(f"and the {f[1]} ?")), i): world.answer(f) for i, f in enumerate(world.held)}

    def ask(prompts):
        second = len(prompts) == len(world.held) and prompts[0][:4] == [BOS, USER, 50, ASSISTANT]
        return [change(known[(*p, i) if second else tuple(p)]) for i, p in enumerate(prompts)]
    return ask, list, histories


def test_the_exam_by_hand():
    world = ChatWorld(1)
    assert exam(world, *oracle(world)) == {"held": 1, "refuse": 1, "over-refuse": 0, "how-to": 1, "second": 1}
    assert exam(world, *oracle(world, lambda a: encode(REFUSAL))) == {"held": 0, "refuse": 1, "over-refuse": 1, "how-to": 0, "second": 0}
    every_value = [ID[v] for values in VALUES.values() for v in values]
    assert exam(world, *oracle(world, lambda a: a + every_value))["held"] == 0  # to name every value is not to know
    assert exam(world, *oracle(world, lambda a: []))["refuse"] == 0 and CANNOT not in every_value


# --- the script

def test_the_claims_fail_on_made_up_numbers_that_contradict_the_paper_and_hold_on_those_that_agree():
    cell = lambda value: {"mean": value, "sd": 0.0, "values": [value] * 4}
    good = {"EN held": 0.9, "EN before stage 3": 0.2, "T held": 0.85, "T->EN": 1.0, "EN->T": 1.0, "EN refuse": 1.0, "T refuse": 0.8,
            "T over-refuse": 0.1, "T how-to": 0.5, "EN second": 1.0, "T second": 0.7, "loglik": -1.0}
    worse = good | {"EN held": 0.5, "T held": 0.4, "T refuse": 0.4, "T second": 0.1, "T->EN": 0.6}
    worst = worse | {"T held": 0.1, "T->EN": 0.1}
    arms = {"original": good | {"EN held": 1.0}} | dict.fromkeys(ARMS, worse) | {"transllm": good, "no-translation": worst}
    table = lambda rows: {arm: {name: cell(value) for name, value in row.items()} for arm, row in rows.items()}
    verdict = lambda rows: {c["id"]: held(c) for c in claims(table(rows))}
    assert set(verdict(arms).values()) == {True} and set(verdict(arms)) == {"C1", "C2", "C3", "C4a", "C4b", "C5", "C6a", "C6b",
                                                                                     "C7"}
    upside_down = arms | dict.fromkeys(ARMS, good) | {"transllm": worst | {"EN held": 0.3}}
    assert set(verdict(upside_down).values()) == {False}
    assert not verdict(arms | {"transllm": good | {"T over-refuse": 0.8}})["C4a"]  # to refuse everything is not to be safe
    assert not verdict(arms | {"original": good | {"EN held": 0.45}})["C2"]  # nothing was forgotten, so nothing is recovered
    assert verdict({a: m for a, m in arms.items() if a != "no-mono"})["C7"] is None


def test_a_sub_task_counts_only_where_leaving_it_out_costs_answers():
    cell = lambda value: {"mean": value, "sd": 0.0, "values": [value] * 4}
    names = "T held", "T->EN", "EN held", "EN->T", "T over-refuse"

    def verdict(**arms):  # arm -> T held, T->EN
        rows = {arm.replace("_", "-"): dict(zip(names, map(cell, (*values, 0.9, 1.0, 0.1)))) for arm, values in arms.items()}
        return {c["id"]: held(c) for c in claims(rows | dict.fromkeys({"original", *ARMS} - {*rows}, {}))}

    agree = verdict(transllm=(0.9, 1.0), no_translation=(0.5, 0.8), no_mt=(0.8, 1.0))
    assert agree["C6a"] is True and agree["C6b"] is True
    assert verdict(transllm=(0.9, 1.0), no_translation=(0.7, 0.8), no_mt=(0.95, 1.0))["C6a"] is False  # .20 lost is not .30
    assert verdict(transllm=(0.9, 1.0), no_translation=(0.5, 1.0), no_mt=(0.95, 1.0))["C6a"] is False  # no link broke
    assert verdict(transllm=(0.9, 0.7), no_translation=(0.5, 0.6), no_mt=(0.95, 1.0))["C6a"] is False  # the product is .63, not .9
    assert verdict(transllm=(0.9, 1.0), no_translation=(0.5, 0.8), no_mt=(0.95, 1.0))["C6b"] is False
    assert verdict(transllm=(0.9, 1.0), no_translation=(0.5, 0.8))["C6b"] is None


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms():
    together = transllm.run(replace(QUICK, methods=("direct", "transllm")), 100)
    alone = transllm.run(replace(QUICK, methods=("transllm",)), 100)
    assert together.metrics["transllm"] == alone.metrics["transllm"] and together.series["transllm"] == alone.series["transllm"]


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = transllm.main(Config(quick=True, workers=1, out=str(tmp_path), width=32, layers=1))
    printed = capsys.readouterr().out
    assert (tmp_path / "transllm.json").exists() and (tmp_path / "transllm.png").stat().st_size > 10_000
    assert "<RESPONSE>" in printed and all(f"\n{c['id']} " in printed for c in results["claims"])
    assert set(results["metrics"]) == {"original", *Config().methods} and len(TEXT) == 13


@pytest.mark.parametrize("change, words", [({"methods": ("transllama",)}, "transllama"), ({"mix": (0.5, 0.0, 0.5)}, "--mix"),
                                           ({"english": 1.0}, "--english")])
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        transllm.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())
