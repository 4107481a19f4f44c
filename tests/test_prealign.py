"""PreAlign: its loss by hand, its code-switching by hand, the conditions that keep the experiment honest, and the whole script."""

import math
import random
from dataclasses import replace

import pytest
import torch

from methods.experiments import prealign
from methods.experiments.prealign import ARMS, Arm, Config, Exam, alignment_loss, claims, code_switch, make_table, retrieval, word_vectors
from methods.worlds.prealign import BOS, EOS, HALF, SHARED, TopicWorld, clone, is_start, make_documents, show, split_dictionary
from minilm.claims import held
from minilm import InputError
from minilm.data import IGNORE, generator, pad
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer


def tiny(vocab_size=SHARED + 2 * HALF, layers=2):
    config = ModelConfig(vocab_size=vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=layers, num_attention_heads=2,
                         initializer_range=0.05, model_type="llama")
    return Transformer(config, generator(0, "init"))


# --- the alignment loss

def test_the_loss_of_two_perfectly_aligned_orthogonal_pairs_by_hand():
    # x1 = y1 = (1, 0), x2 = y2 = (0, 1), tau = 1: every anchor sees its positive at score 1 and two negatives at score 0,
    # so each term is -log(e / (e + 1 + 1)) = log(1 + 2/e)
    z = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [0, 1]]])
    loss = alignment_loss(z, torch.tensor([0, 0, 1, 1]), torch.arange(4), tau=1.0)
    assert loss.item() == pytest.approx(math.log(1 + 2 / math.e), abs=1e-6)


def test_the_loss_goes_to_zero_because_a_word_is_no_candidate_for_itself():
    # with exp(self) left in the denominator the floor would be log 2 = 0.693, whatever the model does
    z = torch.eye(4).repeat_interleave(2, 0)[None]
    assert alignment_loss(z, torch.arange(4).repeat_interleave(2), torch.arange(8), tau=0.05).item() < 1e-6


def test_the_loss_equals_the_equation_written_as_loops_also_with_three_words_in_an_entry():
    z = torch.nn.functional.normalize(torch.randn(2, 7, 5, generator=generator(1, "z")), dim=-1)
    group, tau = torch.tensor([0, 0, 0, 1, 1, 2, 2]), 0.1
    terms = []
    for layer in z:
        for i in range(7):
            total = sum(torch.exp(layer[i] @ layer[k] / tau) for k in range(7) if k != i)
            terms += [-torch.log(torch.exp(layer[i] @ layer[j] / tau) / total) for j in range(7) if j != i and group[j] == group[i]]
    torch.testing.assert_close(alignment_loss(z, group, torch.arange(7), tau), torch.stack(terms).mean())


def test_the_same_word_in_another_entry_is_not_a_negative():
    # "bank" stands in two entries (word number 0): the second is no negative of the first, so removing it changes nothing for it
    z = torch.nn.functional.normalize(torch.randn(1, 4, 5, generator=generator(2, "z")), dim=-1)
    loss = alignment_loss(z, torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 2]), tau=1.0)
    s = z[0] @ z[0].T
    ordinary = lambda i, j: -s[i, j] + torch.logsumexp(torch.stack([s[i, k] for k in range(4) if k != i]), 0)
    without = lambda i, j, k: -s[i, j] + torch.logsumexp(torch.stack([s[i, j], s[i, k]]), 0)
    torch.testing.assert_close(loss, (without(0, 1, 3) + ordinary(1, 0) + without(2, 3, 1) + ordinary(3, 2)) / 4)


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
    for vector, layer in zip(word_vectors(model, ids, torch.ones(1, 2, dtype=torch.bool)), expected):
        torch.testing.assert_close(vector[0], torch.nn.functional.normalize(layer[0].sum(0), dim=0))


# --- code-switching

def test_code_switching_by_hand():
    # words: (10) (20 21) with 21 word-internal; the table knows (20 21) -> (50 51 52)
    starts, table = lambda i: i != 21 and i < 51, {(20, 21): [(50, 51, 52)]}
    ids = [10, 20, 21, 30]
    assert code_switch(ids, table, 1.0, "input", random.Random(0), starts) == ([10, 50, 51, 52, 30], [10, 20, IGNORE, IGNORE, 30])
    assert code_switch(ids, table, 1.0, "vanilla", random.Random(0), starts) == ([10, 50, 51, 52, 30], [10, 50, 51, 52, 30])
    assert code_switch(ids, table, 0.0, "input", random.Random(0), starts) == (ids, ids)


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


def test_an_entry_whose_two_sides_are_equal_is_never_switched_and_many_translations_are_all_used():
    table = make_table([((5,), (5,)), ((6,), (7,), (8,)), ((6,), (9,))])
    assert table == {(6,): [(7,), (8,), (9,)]}


# --- what keeps the experiment honest (sheet: "trivially true if ...")

def test_no_clone_document_speaks_of_a_tested_person_and_no_document_is_said_twice_in_two_languages():
    cfg, world = Config(), TopicWorld(3)
    documents = make_documents(cfg, world, 3, 50)
    english = {tuple(d) for d, source in documents if source}
    foreign = {tuple(d) for d, source in documents if not source}
    text = " ".join(show(d) for d in foreign).lower().split()
    assert foreign
    assert not {show(p) for p in world.tested} & set(text)
    assert {show(p) for p in world.support} & set(text)
    assert not {tuple(clone(d)) for d in english} & foreign
    assert all(i >= SHARED + HALF for d in foreign for i in d[1:-1])
    assert all(i < SHARED + HALF for d in english for i in d)
    assert 0.01 < sum(not source for _, source in documents) / len(documents) < 0.06  # 30 : 1


def test_how_many_sentences_of_the_transfer_exam_were_labelled_in_english_is_what_the_docstring_says():
    shares = []
    for seed in range(4):
        exam = Exam(Config(), TopicWorld(seed), seed)
        labelled = {tuple(sentence) for sentence, _ in exam.labelled}
        shares.append(sum(tuple(sentence) in labelled for sentence, _ in exam.test) / len(exam.test))
    assert shares == [0.535, 0.495, 0.43, 0.485] and "53.5, 49.5, 43, 48.5% (seeds 0 to 3)" in prealign.__doc__


def test_a_constant_answer_scores_exactly_chance():
    world = TopicWorld(5)
    assert [sum(world.home[p] == place for p in world.tested) for place in world.places] == [3] * 8


def test_words_are_distinct_and_the_world_is_the_same_for_the_same_seed():
    world = TopicWorld(7)
    words = [source for source, _ in world.content]
    assert len(set(words)) == len(words) == 6 * 21 + 8 + 32
    assert TopicWorld(7).home == world.home != TopicWorld(8).home
    assert all(is_start(w[0]) and not any(map(is_start, w[1:])) for w in words)


def test_held_out_tokens_occur_in_no_training_entry():
    cfg, world = Config(dict_frac=0.5, hold_out="tokens"), TopicWorld(0)
    kept, held = split_dictionary(cfg, world, 0)
    assert held and not {i for source, _ in kept for i in source} & {i for source, _ in held for i in source}
    kept, held = split_dictionary(replace(cfg, hold_out="words"), world, 0)
    assert len(held) == len(world.content) // 2 and not set(held) & set(kept)


def test_the_untrained_model_is_not_aligned_and_stage_1_aligns_it_unless_the_dictionary_is_shuffled():
    world, cfg = TopicWorld(0), Config(align_steps=60, pairs=96, align_lm="none")
    translations = [t for _, t in world.content]
    model = tiny()
    assert max(retrieval(model, world.content, translations)) < 0.1
    losses = prealign.align(cfg, model, world.dictionary, iter(()), generator(0, "pairs"))
    assert losses[-1] < 0.25 * losses[0]
    assert min(retrieval(model, world.content, translations)) > 0.9
    shuffled = list(zip([s for s, _ in world.dictionary], [t for _, t in world.dictionary[1:] + world.dictionary[:1]]))
    model = tiny()
    prealign.align(cfg, model, shuffled, iter(()), generator(0, "pairs"))
    assert max(retrieval(model, world.content, translations)) < 0.1


def test_an_arm_gives_the_same_numbers_alone_and_beside_other_arms():
    cfg = Config(align_steps=2, steps=3, eval_every=3, quick=True)
    together = prealign.run(replace(cfg, methods=("joint", "prealign")), 100)
    alone = prealign.run(replace(cfg, methods=("prealign",)), 100)
    assert together.metrics["prealign"] == alone.metrics["prealign"]
    assert prealign.run(replace(cfg, methods=("prealign",)), 101).metrics != alone.metrics


def test_folding_makes_the_clone_exam_the_english_exam():
    cfg, world = Config(quick=True), TopicWorld(0)
    exam, model = Exam(cfg, world, 0), tiny()
    fold = lambda ids: [i - HALF if i >= SHARED + HALF else i for i in ids]
    assert fold(clone([BOS, 7, 150, EOS])) == [BOS, 7, 150, EOS]
    assert exam.knowledge(model, fold, clone) == exam.knowledge(model, fold, list)


# --- the script

def test_the_claims_fail_on_made_up_numbers_that_contradict_the_paper_and_hold_on_those_that_agree():
    cell = lambda mean: {"mean": mean, "sd": 0.0, "values": [mean] * 4}
    good = {"ppl en": 2.0, "ppl clone": 2.5, "zs-clt en": 1.0, "zs-clt clone": 0.9, "clka en": 1.0, "clka clone": 0.9, "leak": 0.001,
            "retrieval": 0.9, "retrieval unseen": 0.5}
    poor = good | {"ppl clone": 5.0, "zs-clt clone": 0.2, "clka clone": 0.125, "leak": 0.01, "retrieval": 0.02}
    middling = good | {"clka clone": 0.6, "retrieval": 0.5}
    arms = dict.fromkeys(ARMS, good) | {"joint": poor, "joint d32": poor, "joint d128": poor, "shuffled": poor, "vanilla-cs": poor,
                                        "late": middling, "cs-only": middling, "align-only": middling}
    cells = lambda table: {arm: {name: cell(value) for name, value in row.items()} for arm, row in table.items()}
    verdicts = lambda table: {c["id"]: held(c) for c in claims(cells(table))}
    ids = [*(f"C{i}" for i in (1, 2, 3, 4, 5, 6, 8, 9, 11)), "C7a", "C7b", "R1"]
    assert verdicts(arms) == dict.fromkeys(ids, True) | {"C10": None}
    upside_down = dict.fromkeys(ARMS, poor) | {"joint": good, "joint d32": good, "joint d128": good, "shuffled": good, "late": good,
                                               "cs-only": good, "full": poor | {"ppl clone": 9.0}}
    upside_down["half-words"] = upside_down["half-tokens"] = poor | {"retrieval unseen": 0.0}
    assert verdicts(upside_down) == dict.fromkeys(ids, False) | {"C10": None}
    assert verdicts({"joint": poor, "prealign": good})["C6"] is None
    one_word_of_fifty = arms | {"half-tokens": good | {"retrieval unseen": 0.04}}  # above joint's .02, by less than .05
    assert verdicts(one_word_of_fifty) == verdicts(arms) | {"C7b": False}


def test_the_whole_script_runs_writes_its_files_and_prints_every_claim(tmp_path, capsys):
    results = prealign.main(Config(quick=True, workers=1, out=str(tmp_path)))
    printed = capsys.readouterr().out
    assert (tmp_path / "prealign.json").exists() and (tmp_path / "prealign.png").stat().st_size > 10_000
    for c in results["claims"]:
        assert f"\n{c['id']} " in printed
    assert results["quick"] and set(results["metrics"]) == set(Config().methods)


@pytest.mark.parametrize("change, words", [({"methods": ("prealigned",)}, "prealigned"), ({"rho": 1.0}, "--rho"),
                                           ({"dict_frac": 0.0}, "--dict-frac")])
def test_wrong_settings_are_refused_in_one_line(change, words, tmp_path):
    with pytest.raises(InputError, match=words):
        prealign.main(replace(Config(quick=True, workers=1, out=str(tmp_path)), **change))
    assert not list(tmp_path.iterdir())


def test_every_arm_differs_from_another_in_one_thing():
    assert Arm() == ARMS["joint"]
    assert ARMS["prealign"] == ARMS["align-only"]._replace(switch="input") == ARMS["cs-only"]._replace(align="start")
    assert ARMS["shuffled"] == ARMS["prealign"]._replace(shuffled=True)
