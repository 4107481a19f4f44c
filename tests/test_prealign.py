"""PreAlign: its loss by hand, its code-switching by hand, what makes an arm what it is called, the
conditions that keep the experiment honest, and the whole scripts."""

import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from methods import prealign as paper
from methods.experiments import prealign as experiment
from methods.experiments.prealign import ARMS, Arm, Config, Exam, choose_dictionary, choose_text
from methods.prealign import (
    align,
    alignment_loss,
    code_switch,
    cut_words,
    knowledge,
    make_table,
    nearest,
    place_scores,
    retrieval,
    show_fact,
    show_neighbours,
    word_batches,
    word_vectors,
)
from methods.worlds.prealign import (
    BOS,
    EOS,
    HALF,
    PAD,
    SHARED,
    VOCABULARY,
    TopicWorld,
    clone,
    english,
    fold,
    is_start,
    make_documents,
    show,
    split_dictionary,
)
from minilm import InputError
from minilm.data import IGNORE, generator, pad
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer

SHORT = Config(align_steps=2, steps=3, eval_every=3, quick=True)  # a run of seconds


def tiny(vocab_size=VOCABULARY, layers=2):
    config = ModelConfig(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=2,
        initializer_range=0.05,
        model_type="llama",
    )
    return Transformer(config, generator(0, "init"))


def unit_vectors(*shape, seed):
    return F.normalize(torch.randn(*shape, generator=generator(seed, "z")), dim=-1)


# --- the alignment loss


def test_the_loss_of_two_perfectly_aligned_orthogonal_pairs_by_hand():
    # x1 = y1 = (1, 0), x2 = y2 = (0, 1), tau = 1: every anchor sees its positive at score 1 and two
    # negatives at score 0, so each term is -log(e / (e + 1 + 1)) = log(1 + 2/e)
    z = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    loss = alignment_loss(z, torch.tensor([0, 0, 1, 1]), torch.arange(4), tau=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)


def test_the_loss_goes_to_zero_because_a_word_is_no_candidate_for_itself():
    # with exp(self) left in the denominator the floor would be log 2 = 0.693, whatever one does
    z = torch.eye(4).repeat_interleave(2, 0)[None]
    group = torch.arange(4).repeat_interleave(2)
    assert alignment_loss(z, group, torch.arange(8), tau=0.05).item() < 1e-6


def test_the_loss_equals_the_equation_written_as_loops_also_with_three_words_in_an_entry():
    z, tau = unit_vectors(2, 7, 5, seed=1), 0.1
    group = torch.tensor([0, 0, 0, 1, 1, 2, 2])
    terms = []
    for layer in z:
        for i in range(7):
            total = sum(torch.exp(layer[i] @ layer[k] / tau) for k in range(7) if k != i)
            for j in range(7):
                if j != i and group[j] == group[i]:
                    terms.append(-torch.log(torch.exp(layer[i] @ layer[j] / tau) / total))
    loss = alignment_loss(z, group, torch.arange(7), tau)
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_a_words_translations_are_not_its_negatives_in_whatever_entry_they_stand():
    # The docstring's example: bank Bank bank Ufer dog Hund, "bank" is word 0 at places 0 and 2
    z = unit_vectors(1, 6, 5, seed=2)
    group, word = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 2, 3, 4])
    loss = alignment_loss(z, group, word, tau=1.0)
    s = z[0] @ z[0].T

    def term(anchor, positive, negatives):
        return torch.logsumexp(s[anchor, [positive, *negatives]], 0) - s[anchor, positive]

    terms = [
        term(0, 1, [4, 5]),
        term(1, 0, [3, 4, 5]),
        term(2, 3, [4, 5]),
        term(3, 2, [1, 4, 5]),
        term(4, 5, [0, 1, 2, 3]),
        term(5, 4, [0, 1, 2, 3]),
    ]
    torch.testing.assert_close(loss, torch.stack(terms).mean())


def test_a_word_with_two_translations_does_not_keep_the_loss_up():
    # all three perfectly aligned: with the other "bank" among the negatives log 2 would be left
    x, dog = torch.eye(2)
    z = torch.stack([x, x, x, x, dog, dog])[None]
    group, word = torch.tensor([0, 0, 1, 1, 2, 2]), torch.tensor([0, 1, 0, 1, 3, 4])
    assert alignment_loss(z, group, word, tau=0.05).item() < 1e-6


def test_a_words_vector_does_not_depend_on_the_padding_beside_it():
    model = tiny()
    alone = word_vectors(model, *pad([[5]]))
    beside = word_vectors(model, *pad([[5], [7, 80, 81]]))
    torch.testing.assert_close(alone[:, 0], beside[:, 0])
    assert alone.shape == (4, 1, 32)  # embeddings, block 1, block 2 after the norm, head rows
    torch.testing.assert_close(alone.norm(dim=-1), torch.ones(4, 1))


def test_the_layers_of_a_word_are_embedding_blocks_final_norm_and_head():
    model, ids = tiny(), torch.tensor([[7, 80]])
    states = model(ids, output_hidden_states=True).hidden_states
    expected = [model.embed(ids), states[1], model.norm(states[2]), model.lm_head.weight[ids]]
    vectors = word_vectors(model, ids, torch.ones(1, 2, dtype=torch.bool))
    for vector, layer in zip(vectors, expected, strict=True):
        torch.testing.assert_close(vector[0], F.normalize(layer[0].sum(0), dim=0))


def test_a_batch_holds_whole_entries_and_numbers_equal_words_equally():
    dictionary = [((5,), (6,)), ((7,), (8,), (9, 10)), ((5,), (11,))]
    ids, mask, group, word = next(word_batches(dictionary, 3, generator(0, "pairs")))
    spelled = [tuple(row[real].tolist()) for row, real in zip(ids, mask)]
    for i, entry in enumerate(dictionary):
        assert [w for w, g in zip(spelled, group) if g == i] == list(entry)
    for a in range(7):
        for b in range(7):
            assert (word[a] == word[b]) == (spelled[a] == spelled[b])


# --- code-switching


def test_words_are_cut_where_a_token_starts_one():
    assert list(cut_words([1, 2, 12, 3], lambda i: i < 10)) == [(1,), (2, 12), (3,)]
    assert list(cut_words([12, 12, 1], lambda i: i < 10)) == [(12, 12), (1,)]  # a text may be cut
    assert list(cut_words([], is_start)) == []


def test_code_switching_by_hand():
    # words: (10) (20 21) with 21 word-internal; the table knows (20 21) -> (50 51 52)
    def starts(i):
        return i != 21 and i < 51

    def switched(rho, mode):
        table = {(20, 21): [(50, 51, 52)]}
        return code_switch([10, 20, 21, 30], table, rho, mode, random.Random(0), starts)

    assert switched(1.0, "input") == ([10, 50, 51, 52, 30], [10, 20, IGNORE, IGNORE, 30])
    assert switched(1.0, "vanilla") == ([10, 50, 51, 52, 30], [10, 50, 51, 52, 30])
    assert switched(0.0, "input") == ([10, 20, 21, 30], [10, 20, 21, 30])


def test_switched_words_are_a_share_rho_and_input_only_labels_are_always_the_source_language():
    world, rng = TopicWorld(0), random.Random(0)
    table, switched, words = make_table(world.dictionary), 0, 0
    for _ in range(300):
        inputs, labels = code_switch(world.document(rng, world.persons), table, 0.05, "input", rng)
        assert len(inputs) == len(labels)
        assert all(y < SHARED + HALF for y in labels)
        assert inputs[0] == BOS and inputs[-1] == EOS
        words += sum(map(is_start, inputs)) - 2
        switched += sum(i >= SHARED + HALF and is_start(i) for i in inputs)
    assert 0.04 < switched / words < 0.06


def test_an_entry_that_reads_the_same_is_never_switched_and_many_translations_are_all_used():
    table = make_table([((5,), (5,)), ((6,), (7,), (8,)), ((6,), (9,))])
    assert table == {(6,): [(7,), (8,), (9,)]}


# --- the two stages


def test_stage_1_aligns_a_random_model_unless_the_dictionary_is_shuffled():
    world = TopicWorld(0)
    translations = [target for _, target in world.content]
    model = tiny()
    assert max(retrieval(model, world.content, translations)) < 0.1
    losses = align(model, world.dictionary, None, generator(0, "pairs"), steps=60, lm="none")
    assert losses[-1] < 0.25 * losses[0]
    assert min(retrieval(model, world.content, translations)) > 0.9
    sources, targets = zip(*world.dictionary)
    shuffled = list(zip(sources, targets[1:] + targets[:1]))
    model = tiny()
    align(model, shuffled, None, generator(0, "pairs"), steps=60, lm="none")
    assert max(retrieval(model, world.content, translations)) < 0.1


@pytest.mark.parametrize("lm, texts_read", [("text", 3), ("words", 3), ("none", 0)])
def test_stage_1_reads_text_in_every_step_or_the_words_or_nothing(lm, texts_read, monkeypatch):
    world = TopicWorld(0)
    texts = iter([make_documents(world, 0, 2, 30, 5) for _ in range(3)])
    read = []
    plain = paper.lm_loss
    monkeypatch.setattr(paper, "lm_loss", lambda *given: read.append(given[1]) or plain(*given))
    align(tiny(), world.dictionary, texts, generator(0, "pairs"), steps=3, lm=lm)
    assert len(read) == texts_read
    documents = [ids for ids in read if (ids[:, 0] == BOS).all()]
    assert len(documents) == (3 if lm == "text" else 0)


def test_only_the_layers_that_are_asked_for_are_aligned():
    world = TopicWorld(0)
    translations = [target for _, target in world.content]
    found = {}
    for layers in ("embed", "top"):
        model, gen = tiny(), generator(0, "pairs")
        align(model, world.dictionary, None, gen, steps=60, lm="none", layers=layers)
        found[layers] = retrieval(model, world.content, translations)
    assert min(found["embed"][0], found["embed"][-1]) > 0.9
    assert found["top"][2] > 0.9 and found["top"][3] < 0.1  # the head's rows stay random


def test_pretraining_switches_source_documents_alone_and_reports_its_steps(monkeypatch):
    world = TopicWorld(0)
    corpus = [make_documents(world, 0, 8, 1, 5)] * 3
    seen = []
    plain = paper.code_switch
    monkeypatch.setattr(paper, "code_switch", lambda *given: seen.append(given[0]) or plain(*given))
    steps = paper.pretrain(tiny(), corpus, make_table(world.dictionary), random.Random(0))
    assert list(steps) == [0, 1, 2, 3]
    assert seen == 3 * [document.ids for document in corpus[0] if document.is_source]
    assert 0 < len(seen) < 24
    seen.clear()
    list(paper.pretrain(tiny(), corpus, {}, random.Random(0), mode=None))
    assert not seen


# --- the exam


def test_a_clone_question_and_its_eight_answers_are_in_clone_tokens_alone(monkeypatch):
    world, asked = TopicWorld(0), []
    plain = paper.continuation_logprobs

    def spy(model, pairs, batch):
        asked.extend(pairs)
        return plain(model, pairs, batch=batch)

    monkeypatch.setattr(paper, "continuation_logprobs", spy)
    scores = place_scores(tiny(), world, world.tested[:2], clone)
    assert scores.shape == (2, 3, 8) and len(asked) == 48
    for question, answer in asked:
        assert question[0] == BOS and all(i >= SHARED + HALF for i in (*question[1:], *answer))
    asked.clear()
    place_scores(tiny(), world, world.tested[:2], english)
    assert all(i < SHARED + HALF for question, answer in asked for i in (*question, *answer))


def test_a_model_that_answers_right_knows_everything_and_a_constant_answer_scores_chance(
    monkeypatch,
):
    world = TopicWorld(5)
    right = torch.zeros(24, 3, 8)
    for i, person in enumerate(world.tested):
        right[i, :, world.places.index(world.home[person])] = 1
    monkeypatch.setattr(paper, "place_scores", lambda *_: right)
    assert knowledge(None, world, clone) == 1
    monkeypatch.setattr(paper, "place_scores", lambda *_: torch.eye(8)[3].expand(24, 3, 8))
    assert knowledge(None, world, clone) == 1 / 8


def test_folding_undoes_the_clone_and_makes_its_exam_the_english_exam():
    world, model = TopicWorld(0), tiny()
    text = [BOS, 7, 150, EOS]
    assert fold(clone(text)) == fold(text) == english(text) == text

    def folded(ids):
        return fold(clone(ids))

    assert torch.equal(
        place_scores(model, world, world.tested[:3], folded),
        place_scores(model, world, world.tested[:3], english),
    )


def test_the_nearest_word_is_the_one_of_largest_cosine_in_each_layer():
    model = tiny()
    words, candidates = [(5,), (9, 80)], [(160,), (170, 240), (180,)]
    found = nearest(model, words, candidates)
    for row, z, others in zip(
        found, word_vectors(model, *pad(words)), word_vectors(model, *pad(candidates)), strict=True
    ):
        cosines = [[F.cosine_similarity(a, b, 0).item() for b in others] for a in z]
        assert row.tolist() == [c.index(max(c)) for c in cosines]


def test_how_many_sentences_of_the_transfer_exam_were_labelled_is_what_the_docstring_says():
    shares = []
    for seed in range(50, 54):
        exam = Exam(TopicWorld(seed), seed)
        labelled = {tuple(sentence) for sentence, _ in exam.labelled}
        shares.append(sum(tuple(sentence) in labelled for sentence, _ in exam.test) / 200)
    shown = ", ".join(f"{100 * share:g}" for share in shares)
    assert f"{shown}% (seeds 50 to 53)" in " ".join(experiment.__doc__.split())


# --- what makes an arm what it is called


def spy_on_an_arm(name, monkeypatch, changes=()):
    """Runs an arm of a few steps -> what was called with what, in order."""
    cfg, world = replace(SHORT, **dict(changes)), TopicWorld(0)
    calls = []

    def spy(function):
        plain = getattr(experiment, function)

        def spied(*given, **named):
            calls.append((function, given, named))
            return plain(*given, **named)

        monkeypatch.setattr(experiment, function, spied)

    for function in ("align", "pretrain", "knowledge", "perplexity"):
        spy(function)
    experiment.run_arm(cfg, ARMS[name], world, Exam(world, 0, 4), 0)
    return calls


@pytest.mark.parametrize("name", ["joint", "prealign", "full"])
def test_without_folding_an_arm_reads_clone_tokens_and_with_it_none(name, monkeypatch):
    calls = spy_on_an_arm(name, monkeypatch)
    asked = {given[2]((7,))[0] for function, given, _ in calls if function == "knowledge"}
    read = [given[1] for function, given, _ in calls if function == "perplexity"]
    has_clone = [any(i >= SHARED + HALF for row in rows for i in row) for rows in read]
    corpus = next(given[1] for function, given, _ in calls if function == "pretrain")
    tokens = {i for step in corpus for document in step for i in document.ids}
    assert asked == ({7} if name == "full" else {7, 7 + HALF})  # in English, in the clone
    *during, in_english, in_clone = has_clone
    assert set(during) == {in_clone} == {name != "full"} and not in_english
    assert any(i >= SHARED + HALF for i in tokens) == (name != "full")


def test_the_shuffled_arm_is_aligned_and_switched_by_wrong_pairs_and_prealign_by_right_ones(
    monkeypatch,
):
    for name, most in (("shuffled", 0.05), ("prealign", None)):
        calls = spy_on_an_arm(name, monkeypatch)
        dictionary = next(given[1] for function, given, _ in calls if function == "align")
        table = next(given[2] for function, given, _ in calls if function == "pretrain")
        right = sum(target == tuple(clone(source)) for source, target in dictionary)
        switched = sum(targets == [tuple(clone(source))] for source, targets in table.items())
        assert len(dictionary) == 176 and len({target for _, target in dictionary}) == 176
        if most is None:
            assert right == switched == 176
        else:
            assert right < most * 176 and switched < most * 176


def test_stage_1_comes_first_last_or_never_and_switching_as_the_arm_says(monkeypatch):
    order = {}
    for name in ("joint", "cs-only", "align-only", "prealign", "vanilla-cs", "late"):
        calls = spy_on_an_arm(name, monkeypatch)
        stages = [(f, named.get("mode")) for f, _, named in calls if f in ("align", "pretrain")]
        order[name] = stages
    align_, joint = ("align", None), ("pretrain", None)
    switched, vanilla = ("pretrain", "input"), ("pretrain", "vanilla")
    assert order == {
        "joint": [joint],
        "cs-only": [switched],
        "align-only": [align_, joint],
        "prealign": [align_, switched],
        "vanilla-cs": [align_, vanilla],
        "late": [switched, align_],
    }


def test_the_changes_of_an_arm_reach_the_method(monkeypatch):
    def arguments(name, function):
        calls = spy_on_an_arm(name, monkeypatch)
        return next((given, named) for f, given, named in calls if f == function)

    assert arguments("embed layers", "align")[1]["layers"] == "embed"
    assert arguments("top layer", "align")[1]["layers"] == "top"
    assert arguments("no text", "align")[1]["lm"] == "none"
    assert arguments("prealign d32", "align")[0][0].config.hidden_size == 32
    assert len(arguments("half-words", "align")[0][1]) == 176 - 83


def test_the_leak_is_the_probability_of_clone_tokens_after_real_tokens_alone(monkeypatch):
    exam = Exam(TopicWorld(0), 0, size=4)

    def model(ids):
        """Says all tokens alike after a word, and clone tokens alone after padding."""
        logits = torch.zeros(*ids.shape, VOCABULARY)
        logits[..., SHARED + HALF :] += 50.0 * (ids == PAD)[..., None]
        return Output(logits)

    assert len({len(document) for document in exam.english}) > 1  # (so that there is padding)
    assert exam.leak(model) == pytest.approx(HALF / VOCABULARY)


def test_the_clone_has_as_many_documents_as_stage_2_reads_of_it_each_about_once(monkeypatch):
    asked = []
    real = experiment.make_documents

    def make(world, seed, count, ratio, clone_documents):
        asked.append(clone_documents)
        return real(world, seed, count, ratio, clone_documents)

    monkeypatch.setattr(experiment, "make_documents", make)
    cfg = Config(steps=100, batch=8, ratio=3, align_steps=1)
    corpus, _ = choose_text(cfg, ARMS["prealign"], TopicWorld(0), 0)
    read = [d for step in corpus for d in step if not d.is_source]
    assert asked == [200]  # of 800 documents one in four
    assert 150 < len(read) < 250


def test_every_arm_reads_as_many_tokens_as_prealign_does():
    world, cfg = TopicWorld(0), Config(align_steps=60, steps=32)

    def tokens(arm):
        corpus, texts = choose_text(cfg, arm, world, 0)
        count = sum(len(d.ids) for step in corpus for d in step)
        if arm.align is None:
            return count
        words = word_batches(world.dictionary, cfg.pairs, generator(0, "pairs"))
        for _ in range(cfg.align_steps):
            count += sum(len(d.ids) for d in next(texts)) + next(words)[1].sum().item()
        return count

    ours = tokens(ARMS["prealign"])
    for name in ("joint", "cs-only", "full", "align-only", "late"):
        assert tokens(ARMS[name]) == pytest.approx(ours, rel=0.02)


def test_every_arm_differs_from_another_in_one_thing():
    assert Arm() == ARMS["joint"]
    prealign = ARMS["prealign"]
    assert prealign == ARMS["align-only"]._replace(switch="input")
    assert prealign == ARMS["cs-only"]._replace(align="start")
    assert ARMS["late"] == prealign._replace(align="end")
    assert ARMS["vanilla-cs"] == prealign._replace(switch="vanilla")
    assert ARMS["shuffled"] == prealign._replace(shuffled=True)
    assert ARMS["full"] == Arm(fold=True)
    for name in ("half-words", "half-tokens", "prealign d32", "embed layers", "no text"):
        assert ARMS[name]._replace(changes={}) == prealign


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms():
    together = experiment.run(replace(SHORT, methods=("joint", "prealign")), 100)
    alone = experiment.run(replace(SHORT, methods=("prealign",)), 100)
    assert together.metrics["prealign"] == alone.metrics["prealign"]
    assert experiment.run(replace(SHORT, methods=("prealign",)), 101).metrics != alone.metrics


# --- what keeps the experiment honest


def test_no_clone_document_speaks_of_a_tested_person_and_none_is_said_in_two_languages():
    world = TopicWorld(3)
    documents = make_documents(world, 3, 1600, ratio=30, clone_documents=330)
    source = {tuple(d.ids) for d in documents if d.is_source}
    foreign = {tuple(d.ids) for d in documents if not d.is_source}
    text = " ".join(show(d) for d in foreign).lower().split()
    assert foreign
    assert not {show(p) for p in world.tested} & set(text)
    assert {show(p) for p in world.support} & set(text)
    assert not {tuple(clone(d)) for d in source} & foreign
    assert all(i >= SHARED + HALF for d in foreign for i in d[1:-1])
    assert all(i < SHARED + HALF for d in source for i in d)
    share = sum(not d.is_source for d in documents) / len(documents)
    assert 0.01 < share < 0.06  # 30 : 1


def test_a_place_is_home_to_three_tested_persons_so_that_a_constant_answer_is_chance():
    world = TopicWorld(5)
    homes = [world.home[person] for person in world.tested]
    assert [homes.count(place) for place in world.places] == [3] * 8


def test_words_are_distinct_and_the_world_is_the_same_for_the_same_seed():
    world = TopicWorld(7)
    words = [source for source, _ in world.content]
    assert len(set(words)) == len(words) == 6 * 21 + 8 + 32
    assert TopicWorld(7).home == world.home != TopicWorld(8).home
    assert all(is_start(w[0]) and not any(map(is_start, w[1:])) for w in words)


def test_held_out_tokens_occur_in_no_training_entry():
    world = TopicWorld(0)
    kept, held = split_dictionary(world, 0, 0.5, "tokens")
    seen = {i for source, _ in kept for i in source}
    assert held and not seen & {i for source, _ in held for i in source}
    kept, held = split_dictionary(world, 0, 0.5, "words")
    assert len(held) == len(world.content) // 2 and not set(held) & set(kept)
    assert choose_dictionary(Config(), Arm(), world, 0) == (world.dictionary, [])


# --- look inside


def test_the_worked_example_shows_translations_only_after_stage_1(capsys):
    world, model = TopicWorld(0), tiny()

    def rows():
        show_neighbours(model, world, "title")
        return [line.split() for line in capsys.readouterr().out.splitlines()[3:]]

    before = rows()
    assert len(before) == 5 and not any(word.upper() in found for word, *found in before)
    align(model, world.dictionary, None, generator(0, "pairs"), steps=60, lm="none")
    after = rows()
    right = sum(found == [word.upper()] * 4 for word, *found in after)
    assert right >= 4, after


def test_the_fact_that_is_shown_is_asked_in_both_languages_and_its_chances_add_up(capsys):
    world = TopicWorld(0)
    show_fact({"a model": tiny()}, world)
    printed = capsys.readouterr().out.splitlines()
    asked = show(world.spell("{p} LIVES IN", p=world.tested[0]))
    assert asked in printed[-2] and asked.upper() in printed[-1]
    for line in printed[-2:]:
        assert sum(map(float, line.split()[-8:])) == pytest.approx(1, abs=0.04)


# --- the scripts


def test_the_paper_shows_its_worked_example_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    paper.main(paper.Config(quick=True))
    printed = capsys.readouterr().out
    for words in ("reads ", "learns ", "nearest clone word", "lives in", "chance", "proves"):
        assert words in printed
    assert not list(tmp_path.iterdir())


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = experiment.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "prealign.json").exists()
    assert (tmp_path / "prealign.png").stat().st_size > 10_000
    for row in results["claims"]:
        assert f"\n{row['id']} " in printed
    assert "NOT REPRODUCED" not in printed
    assert results["quick"] and set(results["metrics"]) == set(Config().methods)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"methods": ("prealigned",)}, "prealigned"),
        ({"methods": ()}, "--methods"),
        ({"seeds": ()}, "--seeds"),
        ({"rho": 1.0}, "--rho"),
        ({"rho": -0.1}, "--rho"),
        ({"dict_frac": 0.0}, "--dict-frac"),
        ({"tau": 0.0}, "--tau"),
        ({"batch": 0}, "--batch"),
        ({"pairs": 1}, "--pairs"),
        ({"align_documents": 0}, "--align-documents"),
        ({"steps": 0}, "--steps"),
        ({"ratio": 0}, "--ratio"),
        ({"width": 30}, "--width"),
        ({"eval_every": 0}, "--eval-every"),
        ({"lr": 0.0}, "--lr"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words) as error:
        experiment.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())
