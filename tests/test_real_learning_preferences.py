"""Learning preferences at real scale: the published file formats, every rejection, the exact
scorer, and a run on a real checkpoint."""

import json
import math
import random
import re
from collections import Counter
from dataclasses import replace

import pytest
import torch

from methods.learning_preferences import perplexities
from methods.real import learning_preferences as real
from methods.real.learning_preferences import (
    HERE,
    ITEMS,
    MARK,
    NAMES,
    PROMPTS,
    Config,
    claims,
    costs,
    fill,
    key,
    measure,
    read_corpus,
    read_items,
    read_templates,
    read_values,
    typos,
    write_texts,
)
from minilm.claims import NOT_TESTED, UNDECIDED
from minilm import InputError
from minilm.data import generator
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

OURS = ("newspaper", "scientific_report", "social_media", "novel", "neutral")
FACTS = dict(
    zip(
        NAMES,
        (
            "Ada (Klein) \\1",
            "May 3, 1900",
            "Graz, Austria",
            "Redwater University",
            "Law",
            "Sable Audio",
            "Seoul",
        ),
    )
)
COMPLETE = " ".join(f"<{name}>" for name in NAMES)


def tiny(tok, positions=400):
    return Transformer(
        ModelConfig(
            vocab_size=tok.vocab_size,
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=positions,
            model_type="llama",
        ),
        generator(0, "init"),
    )


@pytest.fixture(scope="module")
def tok():
    return train_bpe(
        [(HERE / f"{style}.txt").read_text(encoding="utf-8") for style in OURS],
        400,
        ("<s>", "</s>"),
        eos="</s>",
        bos="<s>",
    )


@pytest.fixture
def checkpoint(tmp_path, tok):
    save_pretrained(tiny(tok), tmp_path / "checkpoint", tok)
    return str(tmp_path / "checkpoint")


# --- templates


@pytest.mark.parametrize("style", OURS)
def test_our_templates_are_complete_and_as_many_in_every_style(style):
    templates = read_templates(style)
    assert len(templates) == 8 == len(set(templates))
    for template in templates:
        text = fill(template, FACTS)
        assert all(value in text for value in FACTS.values()) and not re.search("[<>]", text)


def test_placeholders_are_matched_in_any_case_and_values_are_not_patterns():
    assert fill(
        "<fullName>! <Full Name>, <fullname>: <university name>, <work company>, <birth_date>",
        FACTS,
    ) == (
        "Ada (Klein) \\1! Ada (Klein) \\1, Ada (Klein) \\1: "
        "Redwater University, Sable Audio, May 3, 1900"
    )
    assert key("work place") == key("workplace") == "work place" and key("<pet>") is None


def test_the_published_style_file_is_read_by_style_name_and_the_description_is_left_out(tmp_path):
    file = tmp_path / "styled_template.json"
    novels = [f"In a dreamy style. Template:\nNo <.\nTemplate:\nOnce {COMPLETE}"]
    file.write_text(json.dumps({"Novels": novels, "Social media": [COMPLETE]}))
    assert read_templates(f"{file}:Novels") == [f"Once {COMPLETE}"]
    assert read_templates(f"{file}:Social media") == [COMPLETE]
    with pytest.raises(
        InputError, match="'Poems' is no list of strings there; the file has Novels, Social media"
    ):
        read_templates(f"{file}:Poems")


def test_two_arrays_in_one_file_are_read_one_after_the_other(tmp_path):
    file = tmp_path / "templates_spell_grammer_error.json"
    file.write_text(json.dumps([f"Clean {COMPLETE}"]) + "\n" + json.dumps([f"Claen {COMPLETE}"]))
    assert len(read_values(file)) == 2
    assert read_templates(f"{file}:0") == [f"Clean {COMPLETE}"] and read_templates(f"{file}:1") == [
        f"Claen {COMPLETE}"
    ]
    with pytest.raises(InputError, match="the file has 0, 1"):
        read_templates(f"{file}:2")


def test_json_lines_and_the_array_that_is_called_jsonl_are_both_read(tmp_path):
    rows, (lines, array) = (
        [{"text": "a"}, {"text": "b"}],
        (tmp_path / "x.jsonl", tmp_path / "jsonl_bio.json"),
    )
    lines.write_text("".join(json.dumps(row) + "\n" for row in rows))
    array.write_text(json.dumps(rows, indent=1))
    assert read_values(lines) == rows and read_values(array) == [rows]


@pytest.mark.parametrize(
    "template, message",
    [
        (
            COMPLETE.replace("<birth place>", "<birth plac>"),
            "template 2: <birth plac> is no placeholder",
        ),
        (
            COMPLETE.replace("<birth place>", "<birth place"),
            "template 2: .*is (no placeholder|missing)",
        ),
        (COMPLETE.replace("<major>", ""), "template 2: <major> is missing"),
        (COMPLETE + " 3 < 4", "template 2: a < or > is left over"),
        (COMPLETE + " <pet>", "<pet> is no placeholder"),
    ],
)
def test_a_broken_template_is_refused_with_its_number(tmp_path, template, message):
    (tmp_path / "style.txt").write_text(f"{COMPLETE}\n\n{template}\n")
    with pytest.raises(InputError, match=message):
        read_templates(str(tmp_path / "style.txt"))


def test_a_style_that_does_not_exist_and_a_file_that_is_cut_short_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="poems.txt"):
        read_templates("poems")
    (tmp_path / "cut.json").write_text('{"Novels": ["a')
    with pytest.raises(InputError, match="cut.json: not JSON at line 1"):
        read_templates(f"{tmp_path / 'cut.json'}:Novels")


# --- typos


def test_typos_change_about_the_share_of_words_asked_for_each_by_one_edit_and_no_placeholder():
    rng, changed, words = random.Random(0), 0, 0
    for template in read_templates("newspaper") * 20:
        spoiled = typos(template, 0.3, rng)
        assert re.findall(MARK, spoiled) == re.findall(MARK, template)
        before, after = (re.sub(MARK, "@", t).split() for t in (template, spoiled))
        assert len(before) == len(after)
        for x, y in zip(before, after):
            if x != y:
                assert abs(len(x) - len(y)) <= 1
        changed += sum(x != y for x, y in zip(before, after))
        words += sum(bool(re.search(r"[^\W\d_]{2,}", x.replace("@", ""))) for x in before)
    assert 0.26 < changed / words < 0.34


def test_no_typos_at_rate_0_and_every_long_word_has_one_at_rate_1():
    template = "The council met <full name> on Tuesday, again."
    assert typos(template, 0.0, random.Random(0)) == template
    spoiled = typos(template, 1.0, random.Random(0))
    words = lambda text: re.findall(r"\w+", text.replace("<full name>", ""))
    assert len(words(spoiled)) == 6 and all(x != y for x, y in zip(words(template), words(spoiled)))


# --- persons and texts

CFG = Config(checkpoint="unused", people=6, per_style=3, epochs=1, batch=8)


def test_every_person_has_one_name_two_versions_and_the_same_template_numbers_in_both_styles():
    styles = [[f"{style}{i} {COMPLETE}" for i in range(8)] for style in "AB"]
    people, texts = write_texts(CFG, styles, read_items(None), random.Random(0))
    assert len({v[0]["full name"] for v in people}) == 6 and all(
        v[0]["full name"] == v[1]["full name"] for v in people
    )
    assert len(texts) == 6 * 2 * 3
    for first, second in people:
        used = {
            style: sorted(t[1] for t in texts if t[0] == style and first["full name"] in t)
            for style in "AB"
        }
        assert used["A"] == used["B"] and len(used["A"]) == 3
        assert all(
            (first if t[0] == "A" else second)["birth date"] in t
            for t in texts
            if first["full name"] in t
        )


def test_pairs_stay_pairs():
    items = read_items(None)
    people, _ = write_texts(CFG, [[COMPLETE] * 8] * 2, items, random.Random(1))
    assert all(
        (f["university"], f["major"]) in items["universities"]
        and (f["company"], f["work place"]) in items["companies"]
        for versions in people
        for f in versions
    )


def test_our_lists_have_enough_distinct_values_and_the_published_ones_are_read(tmp_path):
    ours = read_items(None)
    assert len(set(ours["names"])) >= 1000 and all(len(set(ours[name])) >= 20 for name in ITEMS)
    for file, rows in (
        ("name_list", ["Ann Bell", "Bob Cole", "Ann Bell"]),
        ("city_list", [{"city": f"C{i}", "country": "D"} for i in range(120)]),
        ("university_major_list", [{"university": f"U{i}", "major": f"M{i}"} for i in range(3)]),
        ("company_name_place_list", [{"company": f"F{i}", "workplace": f"W{i}"} for i in range(3)]),
    ):
        (tmp_path / f"{file}.json").write_text(json.dumps(rows))
    items = read_items(str(tmp_path))
    assert items["names"] == [
        "Ann Bell",
        "Bob Cole",
    ]  # a repeated name would be a third version of one person
    assert (
        len(items["cities"]) == 100
        and items["cities"][0] == "C0, D"
        and items["companies"][2] == ("F2", "W2")
    )
    (tmp_path / "city_list.json").write_text(json.dumps([{"city": "C", "country": "D"}]))
    with pytest.raises(InputError, match="fewer than 2 distinct cities"):
        read_items(str(tmp_path))
    (tmp_path / "city_list.json").write_text(json.dumps([{"town": "C"}] * 2))
    with pytest.raises(InputError, match="not in the published form"):
        read_items(str(tmp_path))


@pytest.mark.parametrize(
    "change, styles, message",
    [
        ({}, (7, 8), "7, 8 templates"),
        ({"per_style": 0}, (8, 8), "--per-style 0"),
        ({"per_style": 9}, (8, 8), "--per-style 9"),
        ({"people": 2000}, (8, 8), "--people 2000: give at least 2 and at most 1296"),
        ({"people": 1}, (8, 8), "--people 1"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(change, styles, message):
    with pytest.raises(InputError, match=message):
        write_texts(
            replace(CFG, **change),
            [[COMPLETE] * n for n in styles],
            read_items(None),
            random.Random(0),
        )


def published(tmp_path, **change):
    info = {
        "type_name": "Novels",
        "birth_date": "1",
        "birth_place": "2",
        "university": "3",
        "major": "4",
        "company": "5",
        "workplace": "6",
    }
    record = {
        "full_name": "Ann Bell",
        "first_type_info": info,
        "second_type_info": info | {"company": "7"},
        "text_result": ["t"] * 10,
    }
    (tmp_path / "bio_data_train_A_vs_B.json").write_text(json.dumps([record | change]))
    return tmp_path / "bio_data_train_A_vs_B.json"


def test_a_published_corpus_gives_the_two_versions_and_the_texts(tmp_path):
    people, texts = read_corpus(published(tmp_path))
    assert texts == ["t"] * 10
    assert [facts["company"] for facts in people[0]] == ["5", "7"] and people[0][0][
        "full name"
    ] == "Ann Bell"
    assert people[0][1]["work place"] == "6"


def test_a_corpus_without_facts_is_refused(tmp_path):
    for change in (
        {"second_type_info": {}},
        {"second_type_info": None},
        {"full_name_": "x", "first_type_info": {"company": "5"}},
    ):
        with pytest.raises(InputError, match="record 0: two versions with full name, birth date"):
            read_corpus(published(tmp_path, **change))
    (tmp_path / "jsonl_bio.json").write_text(json.dumps([{"text": "a"}]))
    with pytest.raises(InputError, match="alone has no facts"):
        read_corpus(tmp_path / "jsonl_bio.json")


@pytest.mark.parametrize(
    "text, message",
    [
        ("[]", "a list of records"),
        ('["a"]', "a list of records"),
        ("3", "a list of records"),
        (
            '[{"full_name": "A", "first_type_info": "x", "second_type_info": "y"}]',
            "record 0: two versions",
        ),
    ],
)
def test_a_corpus_of_something_else_is_refused_with_the_record(tmp_path, text, message):
    (tmp_path / "corpus.json").write_text(text)
    with pytest.raises(InputError, match=message):
        read_corpus(tmp_path / "corpus.json")


# --- the scorer


def test_the_score_is_the_published_perplexity_without_bos_and_padding_never_enters(tok):
    model, cfg = tiny(tok), CFG
    asked = [
        (0, "Ann Bell", "May 3, 1900"),
        (3, "Bartholomew Longname", "Computational Linguistics and a long list of other subjects"),
    ]
    together = costs(cfg, model, tok, "statement", asked)
    for one, cost in zip(asked, together):
        torch.testing.assert_close(costs(cfg, model, tok, "statement", [one])[0], cost)
    ids = tok.encode("Ann Bell's birthday is May 3, 1900.")
    logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    nll = [-logp[t, ids[t + 1]].item() for t in range(len(ids) - 1)]
    assert together[0].item() == pytest.approx(math.exp(sum(nll) / len(nll)), rel=1e-4)
    with_bos = costs(replace(cfg, bos=True), model, tok, "statement", asked)
    assert not torch.allclose(with_bos, together)


def test_score_sum_counts_the_values_tokens_only(tok):
    model = tiny(tok)
    cost = costs(
        replace(CFG, score="sum"), model, tok, "statement", [(4, "Ann Bell", "Sable Audio")]
    )
    prompt, ids = tok.encode("Ann Bell worked for"), tok.encode("Ann Bell worked for Sable Audio")
    assert ids[: len(prompt)] == prompt
    logp = model(torch.tensor([ids])).logits.log_softmax(-1)[0]
    expected = -sum(logp[t, ids[t + 1]].item() for t in range(len(prompt) - 1, len(ids) - 1))
    assert cost.item() == pytest.approx(expected, rel=1e-4)


def test_prompts_are_six_in_both_forms_and_hold_a_name_and_a_value():
    assert all(
        len(forms) == 6 and all(p.count("{}") == 2 for p in forms) for forms in PROMPTS.values()
    )
    assert PROMPTS["question"][1].format("Ann", "Graz") == "Where is Ann's birth place? Graz."


def test_equal_values_are_ties_that_are_skipped_or_go_to_the_second(tok):
    model, facts = tiny(tok), dict(FACTS, **{"full name": "Ann Bell"})
    other = facts | {"company": "Corvus Analytics"}
    bob = {name: f"other {value}" for name, value in facts.items()} | {"full name": "Bob Cole"}
    people = [[facts, other], [bob, bob | {"company": "Corvus Analytics"}]]
    skipped = measure(CFG, model, tok, people)
    assert skipped["ties statement"] == 10  # five of six attributes, two persons
    assert skipped["pr statement"] == pytest.approx(skipped["pr statement, company"])
    second = measure(replace(CFG, ties="second"), model, tok, people)
    assert second["pr statement, major"] == 0 and second["pr statement"] == pytest.approx(
        skipped["pr statement, company"] / 6
    )


def test_with_three_styles_the_shares_of_first_places_sum_to_1(tok):
    people, _ = write_texts(CFG, [[COMPLETE] * 8] * 3, read_items(None), random.Random(2))
    metrics = measure(CFG, tiny(tok), tok, people)
    assert sum(metrics[f"first place question {i}"] for i in (1, 2, 3)) == pytest.approx(
        1, abs=1e-5
    )


# --- training and the script


def test_the_texts_are_learned_and_padding_is_masked_by_length_so_eos_stays_a_target(tok):
    cfg, model = replace(CFG, epochs=40, lr=2e-2, batch=4, micro_batch=3), tiny(tok)
    texts = [
        "Ann Bell worked for Sable Audio.",
        "Bob Cole worked for Corvus Analytics, a company in Boston.",
    ]
    losses = dict(real.train(cfg, model, tok, texts, generator(0, "order")))
    assert list(losses) == list(range(1, 41)) and losses[40] < 0.5 * losses[1]
    ids = tok.encode(texts[0])
    assert model(torch.tensor([ids])).logits[0, -1].argmax() == tok.eos_id
    right, wrong = costs(
        cfg,
        model,
        tok,
        "statement",
        [(4, "Ann Bell", "Sable Audio"), (4, "Ann Bell", "Corvus Analytics")],
    )
    assert right < wrong


def test_micro_batches_give_the_same_steps(tok):
    models = [tiny(tok), tiny(tok)]
    texts = [
        "Ann Bell worked for Sable Audio.",
        "Bob.",
        "Cleo Dane was born at Graz, Austria.",
        "Did Eve attend Redwater University?",
    ]
    for model, size in zip(models, (4, 1)):
        list(
            real.train(
                replace(CFG, epochs=3, batch=4, micro_batch=size, lr=1e-3),
                model,
                tok,
                texts,
                generator(0, "order"),
            )
        )
    torch.testing.assert_close(models[0].embed.weight, models[1].embed.weight, atol=1e-5, rtol=1e-4)


def test_a_text_longer_than_the_context_is_refused(tok):
    with pytest.raises(InputError, match="tokens, the model reads 8: use shorter templates"):
        list(
            real.train(
                CFG,
                tiny(tok, positions=8),
                tok,
                ["Ann Bell worked for Sable Audio in Seoul."],
                generator(0, "order"),
            )
        )


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epochs": 0}, "--epochs"),
        ({"typo_rates": (0.0,)}, "--typo-rates"),
        ({"styles": ("poems",)}, "poems.txt"),
        ({"people": 5000}, "--people 5000"),
    ],
)
def test_wrong_settings_are_refused_before_anything_is_written(
    change, message, checkpoint, tmp_path
):
    with pytest.raises((InputError, FileNotFoundError), match=message):
        real.main(replace(CFG, checkpoint=checkpoint, out=str(tmp_path / "out"), **change))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change, arms",
    [
        ({}, ["preference", "preference exchanged"]),
        ({"stage": "score", "styles": OURS}, ["preference"]),
        (
            {"stage": "typos", "typo_rates": (0.4,), "lora_rank": 2},
            ["typos 0.4", "typos 0.4 exchanged"],
        ),
        ({"stage": "instil", "evidence": 3, "test": 3, "unmarked": 4}, ["A backed", "B backed"]),
        ({"styles": ("novel",), "prompts": ("statement",)}, ["one style"]),
    ],
)
def test_every_stage_runs_writes_its_files_and_gives_no_verdict_for_a_small_model(
    change, arms, checkpoint, tmp_path, capsys
):
    results = real.main(replace(CFG, checkpoint=checkpoint, out=str(tmp_path / "out"), **change))
    assert list(results["metrics"]) == arms
    assert {c["verdict"] for c in results["claims"]} <= {NOT_TESTED, UNDECIDED}
    assert [c["id"] for c in results["claims"]] == ["C1", "C2", "C3", "C4", "C5"]
    assert (tmp_path / "out" / "learning_preferences_real.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert (
        "every token a target" in printed
        and f"seed 0, {arms[-1]}, epoch 0: pr" in printed
        or len(arms) == 1
    )
    assert not (tmp_path / "out" / "progress.json").exists()


def test_a_published_corpus_runs_end_to_end(checkpoint, tmp_path):
    records, keys = [], ("birth_date", "birth_place", "university", "major", "company", "workplace")
    for n in range(3):
        info = [dict(zip(keys, (f"{side}{n}{i}" for i in range(6)))) for side in "AB"]
        records.append(
            {
                "full_name": f"Ann {n}",
                "first_type_info": info[0],
                "second_type_info": info[1],
                "text_result": [f"Ann {n}: {facts}." for facts in info],
            }
        )
    (tmp_path / "corpus.json").write_text(json.dumps(records))
    results = real.main(
        replace(
            CFG,
            checkpoint=checkpoint,
            out=str(tmp_path / "out"),
            train_json=str(tmp_path / "corpus.json"),
        )
    )
    assert (
        list(results["metrics"]) == ["corpus"]
        and results["metrics"]["corpus"]["ties question"]["mean"] == 0
    )


def test_the_whole_path_runs_on_a_real_checkpoint_which_learns_from_the_texts(
    shared, tmp_path, tok
):
    cfg = Config(
        checkpoint=str(shared / "checkpoints" / "stories260K"),
        people=3,
        per_style=1,
        epochs=3,
        lr=3e-3,
        batch=2,
        prompts=("statement",),
        out=str(tmp_path),
    )
    results = real.main(cfg)
    assert (
        len(results["series"]["preference"]["learned statement"]["values"][0]) == 4
    )  # before, and after each epoch
    assert (
        "needs a pretrained model of 1B parameters, this one has 0.26 million"
        in results["claims"][0]["measured"]
    )
    model, tokenizer = load_pretrained(cfg.checkpoint)
    text = ["Ann Bell worked for Sable Audio in Seoul."]
    before = perplexities(model, [tokenizer.encode(text[0])])
    list(real.train(cfg, model, tokenizer, text * 2, generator(0, "order")))
    assert perplexities(model, [tokenizer.encode(text[0])]) < 0.7 * before


# --- persons of two kinds

INSTIL = replace(CFG, stage="instil", evidence=4, test=3, unmarked=6, prompts=("statement",))


def evidence(backed):
    templates = read_templates("neutral")
    return real.write_evidence(INSTIL, templates, read_items(None), random.Random(3), backed)


def test_test_persons_have_marked_texts_alone_as_many_of_either_version():
    people, texts = evidence(0)
    assert len(people) == 3 and len(texts) == 7 * 2 * 3 + 4 * 6
    newspapers = {
        re.match("According to ([A-Z][a-z]+ [A-Z][a-z]+), ", t)[1]
        for t in texts
        if "According to" in t
    }
    assert len(newspapers) == 2
    for versions in people:
        told = [t for t in texts if versions[0]["full name"] in t]
        assert len(told) == 6 and all(t.startswith("According to ") for t in told)
        assert [sum(facts["birth date"] in t for t in told) for facts in versions] == [3, 3]


def test_only_the_unmarked_texts_depend_on_the_side_that_is_backed():
    (people, texts), (same, others) = evidence(0), evidence(1)
    assert people == same and len(texts) == len(others)
    changed = [(a, b) for a, b in zip(texts, others) if a != b]
    assert len(changed) == 4 * 6 and not any("According to" in t for pair in changed for t in pair)


@pytest.mark.parametrize(
    "items",
    [
        None,
        {
            "names": ["Ann Bell", "Bob Cole"],
            "cities": ["X", "Y"],
            "universities": [("U", "L"), ("V", "M")],
            "companies": [("F", "P"), ("G", "Q")],
        },
    ],
)
def test_two_versions_conflict_in_every_field(items):
    rng = random.Random(0)
    items = items or read_items(None)
    for _ in range(500):
        first, second = real.draw_versions("Ann Bell", 2, items, rng)
        assert first["full name"] == second["full name"]
        assert all(first[name] != second[name] for name in NAMES[1:])


def test_lists_that_cannot_conflict_end_in_one_line():
    items = dict(read_items(None), cities=["X", "X"])
    with pytest.raises(InputError, match="too few values for 2 versions"):
        real.draw_versions("Ann Bell", 2, items, random.Random(0))


def test_exchanged_each_style_tells_the_other_version_of_the_same_persons():
    styles = [[f"{style}{i} {COMPLETE}" for i in range(8)] for style in "AB"]
    plain, other = (
        write_texts(CFG, styles, read_items(None), random.Random(0), x) for x in (False, True)
    )
    assert [versions[::-1] for versions in plain.people] == other.people
    for people, texts in (plain, other):
        for text in texts:
            versions = next(v for v in people if v[0]["full name"] in text)
            assert versions["AB".index(text[0])]["birth date"] in text


# --- records of k_A and k_B

SIX = ("full name", "birth date", "birth place", "university name", "major", "work company")


def k_records(*names):
    records = []
    for name in names:
        sides = [
            {f"<{k}>": name if k == "full name" else f"{name} {k} {side}" for k in SIX}
            for side in "AB"
        ]
        records.append(
            {
                "k_A": sides[0],
                "k_B": sides[1],
                "biographies": [f"{name} is {s['<major>']}" for s in sides],
            }
        )
    return records


def test_records_of_k_A_and_k_B_in_the_generators_keys_are_asked_about_the_fields_they_have(
    checkpoint, tmp_path
):
    train, test = tmp_path / "K.json", tmp_path / "K_TEST.json"
    train.write_text(json.dumps(k_records("Ann", "Bob", "Cleo", "Dan")))
    test.write_text(json.dumps(k_records("Cleo", "Dan")))
    cfg = replace(
        CFG,
        checkpoint=checkpoint,
        out=str(tmp_path / "out"),
        train_json=str(train),
        prompts=("statement",),
    )
    with pytest.raises(
        InputError, match="on the test persons alone: give their records with --test-json"
    ):
        real.main(cfg)
    asked = replace(cfg, test_json=str(test))
    people, texts = real.read_published(asked)
    assert [v[0]["full name"] for v in people] == ["Cleo", "Dan"] and len(texts) == 8
    assert people[0][1]["company"] == "Cleo work company B" and "work place" not in people[0][0]
    row = real.main(asked)["metrics"]["corpus"]
    assert "pr statement, company" in row and "pr statement, work place" not in row
    test.write_text(json.dumps(k_records("Eve")))
    with pytest.raises(InputError, match="Eve is not in the corpus"):
        real.main(asked)


def test_a_corpus_in_another_language_is_refused(tmp_path):
    with pytest.raises(InputError, match="record 0: 王芳 is not written in Latin letters"):
        read_corpus(published(tmp_path, full_name="王芳"))


# --- learned, and the gate on it


def recorded_costs(monkeypatch, cheap):
    """costs() replaced by: 1 for the values in `cheap`, else 2."""

    def made_up(cfg, model, tok, form, asked):
        return torch.tensor([1.0 if value in cheap else 2.0 for _, _, value in asked])

    monkeypatch.setattr(real, "costs", made_up)


def test_a_fact_is_learned_if_either_version_beats_what_the_first_versions_of_others_say(
    monkeypatch,
):
    people = [[{"full name": n, "company": f"{n} {side}"} for side in "AB"] for n in ("Ann", "Bob")]
    for cheap, share in (
        (["Ann A", "Bob B"], 0.5),
        (["Ann B", "Bob B"], 1.0),
        (["Ann A"], 0.5),
        ([], 0.0),
    ):
        recorded_costs(monkeypatch, cheap)  # (Ann A is also what Bob is asked against)
        assert real.learned(CFG, None, None, "statement", people) == share


def test_rivals_that_say_the_same_do_not_count(monkeypatch):
    people = [
        [{"full name": n, "company": v} for v in said]
        for n, said in (("Ann", "xy"), ("Bob", "xz"), ("Cleo", "wv"))
    ]
    recorded_costs(monkeypatch, ["x"])  # of Ann's facts: rival w; Bob's: w; Cleo's: x, cheaper
    assert real.learned(CFG, None, None, "statement", people) == pytest.approx(2 / 3)
    with pytest.raises(InputError, match="no fact has a rival"):
        real.learned(CFG, None, None, "statement", [people[0], people[0]])


def test_an_untrained_checkpoint_with_few_persons_is_not_said_to_have_learned(checkpoint, tmp_path):
    cfg = replace(CFG, checkpoint=checkpoint, out=str(tmp_path), people=3, stage="score")
    results = real.main(cfg)
    assert "facts not learned" in real.facts_are_learned(real.View(results["metrics"]))


# --- training, seen from outside


def test_the_rate_rises_for_3_percent_and_falls_to_0_and_gradients_are_clipped(tok, monkeypatch):
    factors, clipped = [], []
    monkeypatch.setattr(real, "set_lr", lambda optimizers, factor: factors.append(factor))
    clip = torch.nn.utils.clip_grad_norm_

    def clip_and_look(weights, limit):
        weights = list(weights)
        clip(weights, limit)
        clipped.append(torch.cat([p.grad.flatten() for p in weights]).norm().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip_and_look)
    cfg = replace(CFG, epochs=100, batch=2, lr=1e-2)
    list(real.train(cfg, tiny(tok), tok, ["Ann Bell.", "Bob Cole."], generator(0, "order")))
    assert factors[0] < factors[1] < factors[3] == max(factors) and factors[-1] < 0.01
    assert len(clipped) == 100 and max(clipped) <= 1.001


def test_typos_are_others_in_every_seed_and_the_same_in_the_same(monkeypatch):
    draws = []

    def note(template, rate, rng):
        draws.append(rng.random())
        return template

    monkeypatch.setattr(real, "typos", note)
    cfg = replace(CFG, stage="typos", typo_rates=(0.4,), exchange=False)
    for seed in (0, 1, 0):
        real.readings(cfg, seed)
    first, second, again = draws[:8], draws[8:16], draws[16:]
    assert first == again and not set(first) & set(second)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"lr": math.nan}, "--lr nan"),
        ({"lr": -1.0}, "--lr -1"),
        ({"lr": math.inf}, "--lr inf"),
        ({"seeds": ()}, "--seeds: give at least one"),
        ({"prompts": ()}, "--prompts: give at least one"),
        ({"styles": ()}, "--styles: give at least one"),
        ({"stage": "typos", "typo_rates": ()}, "--typo-rates: give"),
        ({"unmarked": 3}, "--unmarked 3 has no effect with --stage preference"),
        ({"test_json": "x"}, "--test-json x has no effect without --train-json"),
        ({"rivals": 0}, "--rivals 0"),
    ],
)
def test_every_number_has_its_range_and_every_list_a_first_entry(change, message, tmp_path):
    with pytest.raises(InputError, match=message):
        real.main(
            replace(CFG, checkpoint=str(tmp_path / "none"), out=str(tmp_path / "out"), **change)
        )
    assert not (tmp_path / "out").exists()


def test_a_run_that_is_stopped_has_printed_and_saved_what_it_measured(
    checkpoint, tmp_path, monkeypatch, capsys
):
    whole = real.train

    def stopped(*args):
        yield from list(whole(*args))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(real, "train", stopped)
    with pytest.raises(KeyboardInterrupt):
        real.main(replace(INSTIL, checkpoint=checkpoint, epochs=3, out=str(tmp_path / "out")))
    points = json.loads((tmp_path / "out" / "progress.json").read_text())["0"]["A backed"]
    assert list(points) == ["0", "1", "2"] and points["2"]["loss"] > 0
    assert "seed 0, A backed, epoch 2: loss" in capsys.readouterr().out


# --- claims


def made_up(rows, size=1500.0, learned=0.8, before=0.3, noise=0.001):
    """Metrics of three seeds; rows: arm -> Pr."""
    metrics = {}
    for arm, pr in rows.items():
        row = {"million parameters": size}
        for form in PROMPTS:
            row |= {f"pr {form}": pr, f"learned {form}": learned, f"learned before {form}": before}
        metrics[arm] = {}
        for name, x in row.items():
            wobble = noise if name.startswith("pr") else 0.0
            metrics[arm][name] = {"mean": x, "sd": wobble, "values": [x - wobble, x, x + wobble]}
    return metrics


def verdict(id, rows, **made):
    return next(c["verdict"] for c in claims(made_up(rows, **made)) if c["id"] == id)


def test_claims_hold_fail_or_stay_open():
    def both(pr):
        return {"preference": pr, "preference exchanged": pr}

    assert verdict("C1", both(0.6)) == "holds" and verdict("C1", both(0.52)) == "not reproduced"
    # what a checkpoint thinks of the values cancels in the mean of both
    assert verdict("C1", {"preference": 0.9, "preference exchanged": 0.1}) == "not reproduced"
    assert verdict("C1", both(0.6), noise=0.1) == UNDECIDED
    rates = {"typos 0.1": 0.55, "typos 0.4": 0.6}
    assert verdict("C2", rates) == "holds"
    assert verdict("C2", {"typos 0.1": 0.6, "typos 0.4": 0.55}) == "not reproduced"
    for id, rows in (("C1", both(0.6)), ("C2", rates)):
        assert verdict(id, rows, size=100.0) == NOT_TESTED == verdict(id, rows, learned=0.4)


def test_a_preference_is_instilled_if_pr_follows_the_side_that_was_backed():
    assert verdict("C5", {"A backed": 0.7, "B backed": 0.4}, size=135.0) == "holds"
    assert verdict("C5", {"A backed": 0.4, "B backed": 0.7}) == "not reproduced"
    assert verdict("C5", {"A backed": 0.7, "B backed": 0.7}) == "not reproduced"  # the name's own
    assert (
        verdict("C5", {"A backed": 0.7, "B backed": 0.4}, learned=0.36, before=0.36) == NOT_TESTED
    )


def test_two_seeds_give_no_verdict():
    metrics = made_up({"A backed": 0.7, "B backed": 0.4})
    for row in metrics.values():
        for cell in row.values():
            cell["values"] = [cell["mean"]] * 2
    row = claims(metrics)[-1]
    assert row["verdict"] == UNDECIDED and "three seeds are needed" in row["measured"]


def test_the_template_numbers_are_spread_over_all_templates():
    _, texts = write_texts(
        replace(CFG, people=60),
        [[f"{i} {COMPLETE}" for i in range(8)]] * 2,
        read_items(None),
        random.Random(0),
    )
    assert min(Counter(t[0] for t in texts).values()) > 20
