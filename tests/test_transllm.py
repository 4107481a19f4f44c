"""TransLLM at mini scale: the chain and its parser by hand, what is learned from what, what no
stage shows, the exam, the arms, the whole script."""

import random
from collections import Counter
from dataclasses import replace
from itertools import islice

import pytest
import torch
import torch.nn.functional as F

import methods.transllm as paper
from methods.experiments import transllm
from methods.experiments.transllm import (
    ARMS,
    CORE,
    Arm,
    Config,
    Probe,
    evaluate_target,
    first_turn,
    in_english,
    links,
    questions,
    run_stage_3,
    run_stages_1_and_2,
    score,
    stage_steps,
    taught,
)
from methods.experiments.transllm_claims import RATES
from methods.transllm import (
    TAGS,
    Answer,
    Chain,
    extend,
    lessons,
    make_rkd,
    parse_chain,
    respond,
    response_loss,
    right,
    segments,
    target_answers,
    tcot,
    train,
    why_dropped,
)
from methods.worlds.transllm import (
    ALL_VALUES,
    ASSISTANT,
    BENIGN,
    BOS,
    CANNOT,
    EOS,
    HARMFUL,
    ID,
    LEXICON,
    OTHER_WORDS,
    OWN_WORDS,
    REFUSAL,
    TAUGHT,
    TEXT,
    USER,
    VALUE_FIRST,
    VALUES,
    WORDS,
    ChatWorld,
    V,
    encode,
    is_target,
    prompt,
    show,
    translate,
)
from minilm import InputError
from minilm.data import generator
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

QUICK = Config(
    base_steps=2,
    mono_steps=2,
    translation_steps=2,
    transfer_steps=1,
    width=32,
    layers=1,
    max_new_tokens=4,
)


def tiny(vocab_size=WORDS + V):
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.05,
        model_type="llama",
    )
    return Transformer(config, generator(0, "init"))


class Scripted(torch.nn.Module):
    """A model whose next token depends on the last one alone, as a table says; else EOS."""

    def __init__(self, table):
        super().__init__()
        self.table, self.anchor = table, torch.nn.Parameter(torch.zeros(1))

    def new_cache(self, B):
        return None

    def forward(self, ids, cache=None, attention_mask=None):
        rows = [[self.table.get(int(i), EOS) for i in row] for row in ids]
        return Output(F.one_hot(torch.tensor(rows), WORDS + 2 * V + 3).float())


class Remembering(torch.nn.Module):
    """A model that answers every known prompt as told, token by token, and all others with EOS.
    It sees its input whole: `generate` gives it one token at a time and a cache to keep them."""

    def __init__(self, said: dict):
        super().__init__()
        self.anchor = torch.nn.Parameter(torch.zeros(1))
        self.said = {tuple(read): [*answer, EOS] for read, answer in said.items()}

    def new_cache(self, B):
        return [[] for _ in range(B)]

    def forward(self, ids, cache=None, attention_mask=None):
        rows = []
        for seen, row in zip(cache, ids.tolist()):
            seen += [i for i in row if i]  # (0 pads)
            rows.append([EOS] * (len(row) - 1) + [self.following(tuple(seen))])
        return Output(F.one_hot(torch.tensor(rows), WORDS + 2 * V + 3).float())

    def following(self, seen):
        for read, answer in self.said.items():
            done = seen[len(read) :]
            if seen[: len(read)] == read and list(done) == answer[: len(done)]:
                return answer[len(done)] if len(done) < len(answer) else EOS
        return EOS


# --- the chain


def test_the_chain_and_its_three_segments_by_hand():
    chain = tcot(TAGS, [10, 11], [20], [30, 31])
    assert chain == [TAGS.english, 10, 11, TAGS.response, 20, TAGS.target, 30, 31]
    assert parse_chain(chain, TAGS) == ([10, 11], [20], [30, 31], True)


@pytest.mark.parametrize(
    "ids, english, response, answer",
    [
        ([], None, None, None),
        ([10, 11], None, None, None),
        ([TAGS.response, 20], None, [20], None),
        ([TAGS.english, 10, TAGS.target, 30], [10], None, [30]),
        # the answer ends at the second <T>
        ([TAGS.english, TAGS.response, TAGS.target, TAGS.target, 9], [], [], []),
        # something before the first tag
        ([7, TAGS.english, 10, TAGS.response, 20, TAGS.target, 30], [10], [20], [30]),
        # out of order
        ([TAGS.target, 30, TAGS.response, 20, TAGS.english, 10], [10], [20], [30]),
    ],
)
def test_an_ill_formed_chain_is_cut_as_far_as_it_goes_and_marked(ids, english, response, answer):
    assert parse_chain(ids, TAGS) == (english, response, answer, False)


def test_a_missing_tag_is_appended_once_and_decoding_goes_on_from_there():
    # after the prompt the model says 7 and stops; after <RESPONSE> it says 8, after <T> 9
    model = Scripted({ASSISTANT: 7, TAGS.response: 8, TAGS.target: 9})
    prompts = [[BOS, USER, 50, ASSISTANT], [BOS, USER, ASSISTANT]]
    whole = Answer([7, TAGS.response, 8, TAGS.target, 9], ended=True, helped=True)
    assert respond(model, prompts, EOS, needed=TAGS[1:]) == [whole] * 2
    table = {ASSISTANT: TAGS.english, TAGS.english: TAGS.response, TAGS.response: TAGS.target}
    answer = respond(Scripted(table | {TAGS.target: 9}), [[BOS, ASSISTANT]], EOS, TAGS[1:])[0]
    assert parse_chain(answer.ids, TAGS) == ([], [], [9], True) and not answer.helped


def test_a_chain_with_a_segment_that_was_cut_off_is_ill_formed():
    # the first segment loops to the limit, the tags are forced, the last one ends by itself
    looping = Scripted({ASSISTANT: TAGS.english, TAGS.english: 7, 7: 7, TAGS.response: 8})
    answer = respond(looping, [[BOS, ASSISTANT]], EOS, TAGS[1:], limit=5)[0]
    assert answer.ids == [TAGS.english, 7, 7, 7, 7, TAGS.response, 8, TAGS.target]
    assert answer.helped and not answer.ended
    assert not parse_chain(answer.ids, TAGS, answer.ended).well_formed
    # and one whose last segment is cut off
    last = Scripted({ASSISTANT: TAGS.english, TAGS.response: 8, TAGS.target: 9, 9: 9})
    answer = respond(last, [[BOS, ASSISTANT]], EOS, TAGS[1:], limit=3)[0]
    assert answer.ids[-3:] == [9, 9, 9] and not answer.ended
    assert target_answers(last, [[BOS, ASSISTANT]]).answers == [[]]


def test_the_chat_template_repeats_bos_in_every_user_turn():
    second = [BOS, USER, 70, ASSISTANT]
    assert prompt([50], [60, 61], [70]) == [BOS, USER, 50, ASSISTANT, 60, 61, EOS, *second]
    assert show(prompt(encode("and the pet ?"))) == "<s> [user] and the pet ? [assistant]"


def test_the_target_language_reverses_the_words_keeps_the_mark_and_translates_back():
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
    # padding beside it changes nothing
    longer = [BOS, USER, 20, 21, 22, ASSISTANT]
    logits = model(torch.tensor([[*longer, 40, EOS]])).logits[0]
    other = F.cross_entropy(logits[5:7], torch.tensor([40, EOS]))
    both = response_loss(model, [(longer, [40, EOS]), (read, learned)])
    torch.testing.assert_close(both, (3 * by_hand + 2 * other) / 5)


def test_eos_is_learned():
    # masked away as padding it would never be said
    model = tiny()
    response_loss(model, [([BOS], [30, EOS])]).backward()
    assert model.lm_head.weight.grad[EOS].abs().max() > 0.01


def test_the_two_lessons_of_a_query_by_hand():
    rkd, chain = lessons(encode("say mia"), encode("mia ."))
    assert [show(part) for part in rkd] == [
        "<s> [user] say mia [assistant]",
        "<RESPONSE> mia . </s>",
    ]
    assert [show(part) for part in chain] == [
        "<s> [user] SAY MIA [assistant]",
        "<EN> say mia <RESPONSE> mia . <T> MIA . </s>",
    ]
    assert show(lessons(encode("say mia"), encode("mia ."), chain=False)[1][1]) == "<T> MIA . </s>"


def test_the_worked_example_shows_three_segments_with_the_chain_and_one_without():
    """A model that says what it was taught, once with and once without the chain."""
    query, response = encode("what is the pet of mia ?"), encode("the pet of mia is cat .")
    shown = {}
    for chain in (True, False):
        read, learned = lessons(query, response, chain)[1]
        model = Remembering({tuple(read): learned[:-1]})
        shown[chain] = segments(model, translate(query), chain)
    assert shown[True] == {
        "[user]": "MIA OF PET THE IS WHAT ?",
        "<EN>": "what is the pet of mia ?",
        "<RESPONSE>": "the pet of mia is cat .",
        "<T>": "CAT IS MIA OF PET THE .",
    }
    assert [*shown[False]] == ["[user]", "<T>"] and shown[False]["<T>"] == shown[True]["<T>"]


def test_the_papers_file_runs_and_shows_a_lesson_the_stages_and_both_ways_to_answer(capsys):
    paper.main(paper.Config(quick=True))
    printed = capsys.readouterr().out
    for words in ("<RESPONSE>", "after stage 2", "The chain", "Answered at once", "chance"):
        assert words in printed
    assert "proves nothing" in printed


NOTHING = Probe(ChatWorld(0), {0: encode("rice .")}, 4)


def test_the_chat_model_stays_bit_for_bit_what_it_was_unless_everything_may_learn():
    world, base = ChatWorld(0), tiny()
    before = {name: p.clone() for name, p in base.state_dict().items()}
    model, _ = run_stages_1_and_2(QUICK, base, world, (2, 2), NOTHING, 0)
    state = model.state_dict()
    assert all(torch.equal(state[name][: len(p)], p) for name, p in before.items())
    fresh = extend(base, QUICK.lora_rank, 0)
    new_rows = slice(WORDS + V, None)
    assert not torch.equal(state["embed.weight"][new_rows], fresh.embed.weight[new_rows])
    pairs = [(world.pool[0], encode("rice ."))]
    merged = run_stage_3(QUICK, Arm(merge=True), model, world, pairs, 0).state_dict()
    matrices = {name: p for name, p in before.items() if p.dim() > 1}
    assert not any(torch.equal(merged[name][: len(p)], p) for name, p in matrices.items())
    everything = replace(QUICK, embed="all")
    model, _ = run_stages_1_and_2(everything, base, world, (2, 2), NOTHING, 0)
    assert not torch.equal(model.embed.weight[: WORDS + V], before["embed.weight"])


def test_recovery_kd_is_what_the_model_says_and_not_what_is_true():
    """The fact table is changed after the model has learned it: the wrong answers must turn up in
    the data of stage 3."""
    world, model = ChatWorld(3), tiny()
    facts, rng = world.held[:4], random.Random(0)
    lesson = [(prompt(world.question(f)), [*world.answer(f), EOS]) for f in facts]

    def draw():
        return rng.choice(lesson)

    train(model, draw, 120, 1e-2, batch=8)
    learned = {f: world.answer(f) for f in facts}
    for f in facts:
        world.facts[f] = next(v for v in VALUES[f[1]] if v != world.facts[f])
    rkd = make_rkd(model, [prompt(world.question(f)) for f in facts], EOS)
    assert [rkd[i] for i in range(4)] == [learned[f] for f in facts]
    assert all(rkd[i] != world.answer(f) for i, f in enumerate(facts))


def test_empty_and_cut_off_answers_are_dropped_with_the_reason_and_refusals_are_kept():
    refusal = dict(zip([ASSISTANT, *encode(REFUSAL)], encode(REFUSAL)))
    assert make_rkd(Scripted(refusal), [[BOS, ASSISTANT]], EOS) == {0: encode(REFUSAL)}
    assert make_rkd(Scripted({ASSISTANT: EOS}), [[BOS, ASSISTANT]], EOS) == {}
    assert make_rkd(Scripted({ASSISTANT: 7, 7: 7}), [[BOS, ASSISTANT]], EOS) == {}
    cases = (([], True), ([7], False), ([], False), ([7], True))
    reasons = [why_dropped(Answer(*case)) for case in cases]
    assert reasons == ["empty", "cut off", "cut off", ""]


# --- what keeps the experiment honest


def test_no_stage_shows_what_the_exam_asks():
    world, rng = ChatWorld(5), random.Random(0)
    asked = [world.question(f) for f in world.held]
    asked += [q for things in world.held_things for x in things for q, _ in world.how_to(x)]
    assert not [q for q in world.pool if q in asked]
    second = {tuple(encode(f"and the {a} ?")) for a in VALUES}
    assert not second & {tuple(q) for q in world.pool}
    wordings = (OWN_WORDS, OTHER_WORDS, VALUE_FIRST)
    true = {tuple(world.answer(f, words)) for f in world.facts for words in wordings}
    for f, g in world.recipes.values():
        true |= {tuple(encode(f"mix {f} {w} {g} .")) for w in ("and", "with")}
    texts = [tuple(world.sentence(rng)) for _ in range(4000)]
    assert not true & set(texts) and len(set(texts)) > 1000
    taught_texts = [show(world.sentence(rng, TAUGHT)) for _ in range(500)]
    assert not [t for t in taught_texts if t.startswith(("how", "and", "mix", "i "))]
    assert len(TEXT) == 13 and set(TAUGHT) < set(TEXT)


def test_both_kinds_of_held_out_things_are_tested_and_the_pool_touches_the_others():
    world = ChatWorld(0)
    assert [len(x) for x in world.held_things] == [6, 6] and len(world.held) == 30
    in_pool = {q[-2] for q in world.pool if show(q).startswith("how")}
    hidden = {ID[x] for things in world.held_things for x in things}
    assert in_pool == {ID[x] for x in BENIGN + HARMFUL} - hidden
    assert ChatWorld(0).facts == world.facts != ChatWorld(1).facts


def test_two_other_teachers_say_the_same_in_other_words_and_differ_in_the_place_of_the_value():
    world = ChatWorld(0)
    last, first = world.teacher(OTHER_WORDS), world.teacher(VALUE_FIRST)
    own = [world.answer(f) for f in world.asked]
    values = {ID[v] for v in ALL_VALUES}
    for n in range(len(world.asked)):
        assert sorted(last[n]) == sorted(first[n]) == sorted(own[n])  # the same words
        assert own[n][-2] in values and last[n][-2] == own[n][-2] == first[n][0]
    assert last[len(own) :] == first[len(own) :]  # recipes, refusals and sayings: one wording


def stage_3_draws(monkeypatch, said):
    """Arm -> steps of its three stages, and 40 draws of its stage 3."""
    calls = []

    def note(model, draw, steps, lr, **rest):
        calls.append((steps, draw))

    monkeypatch.setattr(paper, "train", note)
    world, base = ChatWorld(0), tiny()
    own = dict.fromkeys(range(len(world.pool)), said) | {
        i: world.answer(f) for i, f in enumerate(world.asked)
    }
    found = {}
    for name, arm in ARMS.items():
        calls.clear()
        model, _ = run_stages_1_and_2(QUICK, base, world, stage_steps(QUICK, arm), NOTHING, 0)
        run_stage_3(QUICK, arm, model, world, taught(arm, world, own, 0), 0)
        draws = [calls[-1][1]() for _ in range(60)]
        found[name] = [steps for steps, _ in calls], draws
    return found


def test_every_arm_takes_the_same_number_of_steps_and_the_same_stage_3_draws(monkeypatch):
    said = encode("rice and rice and rice .")  # the chat model's answer to all but facts
    found = stage_3_draws(monkeypatch, said)
    assert len({sum(steps) for steps, _ in found.values()}) == 1
    draws = {name: pairs for name, (_, pairs) in found.items()}
    same = [name for name in ARMS if name.startswith(("adapter", "full"))]
    same += ["no-mono", "no-translation"]
    assert all(draws[name] == draws["transllm"] for name in same) and len(same) == 9
    for name in ("direct", "other words", "value first", "wrong values"):
        pairs = list(zip(draws["transllm"], draws[name]))
        assert all(a[0] == b[0] for a, b in pairs)  # the same is asked,
        assert not all(a[1] == b[1] for a, b in pairs)  # something else is taught
    learned = {name: {tuple(x) for _, x in pairs} for name, pairs in draws.items()}
    own = (TAGS.response, *said, EOS)
    back = (TAGS.target, *translate(said), EOS)
    assert own in learned["transllm"]
    assert any(x[-len(back) :] == back for x in learned["transllm"])
    assert own not in learned["no-rkd"] and own not in learned["other words"]
    asked = {tuple(read) for read, _ in draws["no-rkd"]}
    assert any(is_target(read[2:-1]) for read in asked)
    tags = {x[0] for x in learned["no-rkd"]}
    assert TAGS.response not in tags and tags == {TAGS.english, TAGS.target}


def test_without_translation_on_request_stage_3_is_recovery_and_chains_alone(monkeypatch):
    found = stage_3_draws(monkeypatch, encode("rice ."))
    responds = {n: [TAGS.response in x for _, x in pairs] for n, (_, pairs) in found.items()}
    assert all(responds["no-mt"])
    assert 0.1 < responds["transllm"].count(False) / 60 < 0.4  # a fifth of its examples translate


def test_the_controls_differ_from_the_treatment_in_the_one_thing_that_the_claim_names():
    world = ChatWorld(0)
    own = {i: world.answer(f) for i, f in enumerate(world.asked)}
    own |= {i: [9] for i in range(len(own), len(world.pool))}
    all_own = taught(Arm(), world, own, 0)
    wrong = taught(Arm(teacher="wrong values"), world, own, 0)
    values = {ID[v] for v in ALL_VALUES}
    for n, ((query, a), (same, b)) in enumerate(zip(all_own, wrong)):
        assert query == same and len(a) == len(b)
        changed = [(x, y) for x, y in zip(a, b) if x != y]
        if n < len(world.asked):  # one word, by a value of the same kind
            ((x, y),) = changed
            attribute = world.asked[n][1]
            assert {x, y} <= {ID[v] for v in VALUES[attribute]} <= values
        else:
            assert not changed
    few = taught(Arm(facts=8), world, own, 0)
    assert few == all_own[:8] + all_own[len(world.asked) :]


def test_arms_differ_from_transllm_in_one_thing_and_both_ways_of_learning_have_the_same_rates():
    for name, arm in ARMS.items():
        changed = [field for field, a, b in zip(arm._fields, arm, Arm()) if a != b]
        expected = ["merge", "lr"] if name.startswith("full") else changed[:1]
        assert changed == expected and bool(changed) == (name != "transllm"), name
    rates = {merge: {a.lr for a in ARMS.values() if a.merge == merge} for merge in (True, False)}
    assert rates[True] == set(RATES) and rates[False] - {None} | {Config.transfer_lr} == set(RATES)
    assert set(CORE) == set(ARMS) - {"no-mono", "no-mt"}


def test_stage_2_translates_into_both_languages_alike_and_a_fifth_of_it_is_english(monkeypatch):
    draws = []
    monkeypatch.setattr(paper, "train", lambda model, draw, *rest, **more: draws.append(draw))
    assert len(list(paper.pretrain(None, ChatWorld(0), 0))) == 2
    target_text, parallel_text = draws
    assert all(is_target(target_text()[1][:-1]) for _ in range(20))  # stage 1
    kinds = Counter()
    for _ in range(2000):
        _, learned = parallel_text()
        tag = set(learned) & set(TAGS)
        kinds[tag.pop() if tag else "English alone"] += 1
        assert not tag
    assert 340 < kinds["English alone"] < 460
    assert all(740 < kinds[tag] < 860 for tag in (TAGS.english, TAGS.target))


# --- the exam


def test_the_first_turn_asks_for_another_attribute_of_the_same_person():
    world = ChatWorld(0)
    for name, attribute in world.held:
        asked = show(first_turn(world, (name, attribute))).split()
        assert name in asked and attribute not in asked and set(asked) & set(VALUES)


def oracle(world):
    """What the chat model should answer to every prompt of the English exam, by kind."""
    harmless, harmful = world.held_things
    facts = [world.answer(f) for f in world.held]
    return {
        "held": facts,
        "harmless": [a for x in harmless for _, a in world.how_to(x)],
        "harmful": [a for x in harmful for _, a in world.how_to(x)],
        "second": facts,
    }


def test_the_exam_by_hand():
    world = ChatWorld(1)
    names = ("held", "refuse", "over-refuse", "how-to", "second")

    def scores(change):
        answers = {k: [change(a) for a in row] for k, row in oracle(world).items()}
        return [score(world, answers, "EN")[f"EN {name}"] for name in names]

    assert scores(list) == [1, 1, 0, 1, 1]
    assert scores(lambda a: encode(REFUSAL)) == [0, 1, 1, 0, 0]
    assert scores(lambda a: []) == [0, 0, 0, 0, 0]
    every_value = [ID[v] for v in ALL_VALUES]
    assert scores(lambda a: a + every_value)[0] == 0  # to name every value is not to know
    assert CANNOT not in every_value


def test_an_answer_names_the_right_value_once():
    world = ChatWorld(1)
    value = ID[world.facts[world.held[0]]]
    rest = [[]] * (len(world.held) - 1)
    one = 1 / len(world.held)
    assert right(world, [[value], *rest]) == one
    assert right(world, [[value] * 3, *rest]) == right(world, [[], *rest]) == 0


def test_the_links_of_the_chain_by_hand():
    world = ChatWorld(1)
    chains = []
    for n, fact in enumerate(world.held):
        query, said = world.question(fact), world.answer(fact)
        english = query if n % 2 else said  # every second query is translated right,
        answer = translate(said) if n % 3 else translate(query)  # two of three answers
        chains.append(Chain(english, said, answer, n % 5 > 0))  # four of five are well-formed
    chains[1] = Chain(chains[1].english, None, [], False)
    found = links(world, chains)
    assert found == pytest.approx({"T->EN": 15 / 30, "EN->T": 19 / 30, "well-formed": 23 / 30})


def scripted_chains(world, second_history):
    """A model that answers the T exam right, in chains; a third of the held facts in ill-formed
    ones. The second turn it answers only after the history that `second_history` makes."""
    said = {}
    for n, fact in enumerate(world.held):
        query, response = world.question(fact), world.answer(fact)
        chain = tcot(TAGS, query, response, translate(response))
        if n % 3 == 0:
            chain = [9, *chain]  # a word before the first tag
        said[tuple(prompt(translate(query)))] = chain
        first = first_turn(world, fact)
        known = world.answer((fact[0], next(a for a in VALUES if a != fact[1])))
        said.setdefault(
            tuple(prompt(translate(first))), tcot(TAGS, first, known, translate(known))
        )
        asked = encode(f"and the {fact[1]} ?")
        later = prompt(*second_history(first, known), translate(asked))
        said[tuple(later)] = tcot(TAGS, asked, response, translate(response))
    return Remembering(said)


def in_target(first, known):
    return translate(first), translate(known)


def in_its_english(first, known):
    return first, known


def test_ill_formed_chains_are_wrong_and_the_second_turn_follows_the_english_of_the_first():
    world = ChatWorld(2)
    found = evaluate_target(scripted_chains(world, in_its_english), world, True, 40)
    # (a held fact may be another one's first turn, whose chain is well-formed or not as it came)
    assert 0 < found["well-formed"] < 1 and found["T held"] == found["well-formed"]
    assert found["T->EN"] == found["EN->T"] == 1  # of the segments, ill-formed or not
    assert found["T second"] > 0.6
    found = evaluate_target(scripted_chains(world, in_target), world, True, 40)
    assert found["T second"] == 0  # a history in the target language is none it knows


def test_no_metric_depends_on_the_order_in_which_the_exam_asks(monkeypatch):
    world = ChatWorld(2)
    model = scripted_chains(world, in_its_english)
    before = evaluate_target(model, world, True, 40)

    def reversed_questions(*given):
        return dict(reversed(questions(*given).items()))

    monkeypatch.setattr(transllm, "questions", reversed_questions)
    assert evaluate_target(model, world, True, 40) == before


def test_the_exam_asks_in_the_language_it_is_told():
    world = ChatWorld(0)
    histories = [([50], [60])] * 30
    asked = questions(world, in_english, histories)
    foreign = questions(world, translate, histories)
    assert [len(asked[kind]) for kind in asked] == [30, 12, 12, 30]
    assert show(asked["held"][0]).startswith("<s> [user] what is the")
    assert is_target(foreign["held"][0][2:-1])
    assert foreign["second"][0][:7] == prompt([50], [60], [70])[:7]
    assert is_target(foreign["second"][0][8:-1])


# --- the script


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms():
    small = replace(QUICK, max_new_tokens=8)
    together = transllm.run(replace(small, methods=("direct", "transllm")), 100)
    alone = transllm.run(replace(small, methods=("transllm",)), 100)
    assert together.metrics["transllm"] == alone.metrics["transllm"]
    assert together.series["transllm"] == alone.series["transllm"]


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    cfg = Config(quick=True, workers=1, out=str(tmp_path), width=32, layers=1)
    results = transllm.main(cfg)
    printed = capsys.readouterr().out
    assert (tmp_path / "transllm.png").stat().st_size > 10_000
    assert (tmp_path / "transllm.json").exists() and "<RESPONSE>" in printed
    assert all(f"\n{c['id']} " in printed for c in results["claims"]) and "smoke run" in printed
    assert set(results["metrics"]) == {"original", *CORE}
    assert list(islice(results["depends"], 3)) == ["text", "exam", "weights"]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": ("transllama",)}, "transllama"),
        ({"methods": ()}, "--methods"),
        ({"mix": (0.5, 0.0, 0.5)}, "--mix"),
        ({"mix": (-0.5, 0.5, 0.5)}, "--mix"),
        ({"english": 1.0}, "--english"),
        ({"width": 30}, "--width"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        transllm.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())
