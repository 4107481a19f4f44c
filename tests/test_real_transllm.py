"""TransLLM's real path: every stage on a tiny chat model, the files it reads and writes, what it
refuses, and the study of several seeds."""

import json
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
import transformers
import tyro

from methods.real import transllm
from methods.real.transllm import KNOWN, Config, Format, main, read_conversations
from minilm import InputError
from minilm.chat import render_text
from minilm.data import generator
from minilm.lora import load_adapter
from minilm.results import ROOT
from minilm.tokenizer import load_tokenizer, train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

ENGLISH = ["the cat sat on the mat", "a dog ran home", "she saw the red house", "we eat bread and fish"] * 6
GERMAN = ["die Katze saß auf der Matte", "ein Hund lief nach Hause", "sie sah das rote Haus", "wir essen Brot und Fisch"] * 6
TAGS = ("<EN>", "<RESPONSE>", "<TH>")


def chat_model(folder, tokenizer, seed=0):
    model = Transformer(ModelConfig(vocab_size=tokenizer.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                                    num_attention_heads=2, model_type="llama", initializer_range=0.05), generator(seed, "init"))
    save_pretrained(model, folder, tokenizer)


def conversation(id, query, answer):
    return {"id": id, "conversations": [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]}


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """All stages, one after the other, in one folder."""
    folder = tmp_path_factory.mktemp("transllm")
    chat_model(folder / "chat", train_bpe(ENGLISH, 300, special=("<s>", "</s>"), bos="<s>", eos="</s>"))
    for name, lines in (("de.txt", GERMAN), ("en.txt", ENGLISH)):
        (folder / name).write_text("\n".join(lines), encoding="utf-8")
    rows = [{"query": e} for e in ENGLISH[:4]]
    (folder / "q.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    rows = [conversation(str(i), e, f"<RESPONSE> {ENGLISH[i + 1]}") for i, e in enumerate(ENGLISH[:4])]
    (folder / "rkd.json").write_text(json.dumps(rows))
    rows = [{"id": str(i), "query": GERMAN[i], "response": GERMAN[i + 1]} for i in range(3)]  # the fourth is left to the model
    (folder / "translations.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    (folder / "questions.jsonl").write_text(json.dumps({"query": GERMAN[0], "query2": GERMAN[1]}), encoding="utf-8")
    path = lambda *names: tuple(str(folder / name) for name in names)
    numbers = {}

    def go(stage, out, checkpoint="x", **changes):
        cfg = Config(stage=stage, checkpoint=str(folder / checkpoint), out=str(folder / out), template="llama2", block=96, batch=8,
                     micro_batch=4, steps=4, lr=3e-3, max_new_tokens=6, device="cpu", log=str(folder / "log.json"))
        numbers[out] = main(replace(cfg, **changes))

    go("extend", "x", "chat", data=path("de.txt"), protect=path("en.txt"), new_tokens=30)
    go("mono", "m", data=path("de.txt"), lora_rank=4, block=32)
    go("translate", "t", adapter=str(folder / "m"), pairs=path("de.txt", "en.txt"), data=path("en.txt"))
    go("make-rkd", "r", "chat", data=path("q.jsonl"))
    go("make-tcot", "c", adapter=str(folder / "t"), data=path("rkd.json"), translations=str(folder / "translations.jsonl"))
    go("transfer", "f", adapter=str(folder / "t"), data=path("rkd.json", "c/tcot.json"), pairs=path("de.txt", "en.txt"),
       block=256)
    go("merge", "model", adapter=str(folder / "f"))
    go("eval", "e", "model", data=path("questions.jsonl"))
    return folder, numbers, go


def test_every_stage_ran_and_wrote_its_files(work):
    folder, numbers, _ = work
    for out, file in (("x", "model.safetensors"), ("m", "adapter_model.safetensors"), ("t", "adapter_config.json"), ("r", "rkd.json"),
                      ("c", "tcot.json"), ("f", "adapter_model.safetensors"), ("model", "tokenizer.json"), ("e", "answers.jsonl")):
        assert (folder / out / file).exists() and json.loads((folder / out / "numbers.json").read_text())["stage"]
    assert [record["stage"] for record in json.loads((folder / "log.json").read_text())["stages"][:8]] == list(transllm.STAGES)
    assert numbers["x"]["protected lines that kept their ids"] == len(ENGLISH)
    assert numbers["x"]["after"] < 0.8 * numbers["x"]["tokens per character before"]
    falls = [value for out in ("m", "t", "f") for name, value in numbers[out].items() if name.startswith("held-out loss")]
    assert len(falls) == 5 and all(after < before for before, after in falls)


def test_the_merged_model_is_the_extended_one_with_its_adapter_also_for_transformers(work):
    folder, _, _ = work
    model, tokenizer = load_pretrained(folder / "x")
    assert all(tokenizer.special[tag] == tokenizer.vocab_size - 3 + i for i, tag in enumerate(TAGS))
    load_adapter(model, folder / "f")
    ids = torch.tensor([[5, 200, tokenizer.vocab_size - 1, tokenizer.vocab_size - 20, 7]])
    merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "model")
    assert merged.config.vocab_size == tokenizer.vocab_size == model.config.vocab_size
    torch.testing.assert_close(merged(ids).logits, model(ids).logits, atol=1e-4, rtol=0)


def test_the_chains_are_made_of_rkd_and_of_translations_and_both_files_have_the_published_format(work):
    folder, numbers, _ = work
    chains = json.loads((folder / "c" / "tcot.json").read_text(encoding="utf-8"))
    assert chains[0] == conversation("0", GERMAN[0], f"<EN> {ENGLISH[0]} <RESPONSE> {ENGLISH[1]} <TH> {GERMAN[1]}")
    assert len(chains) in (3, 4) and len(read_conversations(folder / "c" / "tcot.json")) == numbers["c"]["chains"]
    assert numbers["c"]["texts translated by the model"] == 2


def test_new_rows_alone_learn_with_embed_new(work, tmp_path):
    folder, _, go = work
    go("mono", tmp_path, data=(str(folder / "de.txt"),), lora_rank=2, block=32, embed="new")
    base, _ = load_pretrained(folder / "x")
    model, _ = load_pretrained(folder / "x")
    load_adapter(model, tmp_path)
    first = json.loads((folder / "x" / "transllm.json").read_text())["first_new_token"]
    for a, b in ((model.embed.weight, base.embed.weight), (model.lm_head.weight, base.lm_head.weight)):
        assert torch.equal(a[:first], b[:first]) and not torch.equal(a[first:], b[first:])


def test_the_papers_template_by_the_letter():
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "c"}]
    one = "<s>[INST] <<SYS>>\nYou are a helpful assistant.\n<</SYS>>\n\n{} [/INST]"
    text = render_text(KNOWN["templates"]["llama2"], turns, bos_token="<s>", eos_token="</s>")
    assert text == one.format("a") + " b</s>" + one.format("c")
    assert render_text(KNOWN["templates"]["chatml"], turns[:1]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"


def test_a_tag_in_an_answer_is_one_id_and_the_same_text_from_a_user_is_none(work):
    folder, _, _ = work
    cfg = Config(stage="eval", checkpoint=str(folder / "x"), out="", template="llama2")
    form = Format(cfg, load_tokenizer(folder / "x"))
    assert [i for i in form.tagged("<EN> a cat <RESPONSE> a dog <TH> ein Hund") if i in form.tags] == list(form.tags)
    assert form.text(form.tagged("<EN> a cat")) == "a cat"
    assert not set(form.prompt("ignore this <TH> and <EN> that")) & set(form.tags)


def test_refusals_are_counted_by_keyword_in_the_english_part_and_scores_are_compared_by_hand(work, tmp_path, monkeypatch):
    folder, _, go = work
    said = iter(["I cannot help", "a cake", "illegal"])
    ids = lambda model, prompts, eos, needed, limit: ([form.tagged(f"<EN> a <RESPONSE> {next(said)} <TH> b")], 0.0)
    form = Format(Config(stage="eval", checkpoint=str(folder / "x"), out="", template="llama2"), load_tokenizer(folder / "x"))
    monkeypatch.setattr(transllm, "respond", ids)
    (tmp_path / "q.jsonl").write_text('{"query": "eins", "query2": "zwei"}\n{"query": "drei"}')
    go("eval", tmp_path / "e", data=(str(tmp_path / "q.jsonl"),))
    rows = [json.loads(line) for line in (tmp_path / "e" / "answers.jsonl").read_text().splitlines()]
    assert [row["refusal"] for row in rows] == [True, False, True] and [row["turn"] for row in rows] == [1, 2, 1]
    (tmp_path / "a").write_text('{"score": 7}\n{"score": 5}\n{"score": 3}')
    (tmp_path / "b").write_text('{"score": 6}\n{"score": 5}\n{"score": 9}')
    go("eval", tmp_path / "s", scores=(str(tmp_path / "a"), str(tmp_path / "b")))
    numbers = json.loads((tmp_path / "s" / "numbers.json").read_text())["numbers"]
    assert (numbers["win"], numbers["tie"], numbers["loss"], numbers[f"mean score {tmp_path / 'a'}"]) == (1, 1, 1, 5.0)


def test_a_judges_scores_give_a_mean_per_turn_by_hand_and_two_files_must_score_the_same_turns(work, tmp_path):
    _, _, go = work
    put = lambda name, *rows: (tmp_path / name).write_text("[" + ", ".join(map(json.dumps, rows)) + "]")
    put("a", {"turn": 1, "score": 8}, {"turn": 2, "score": "3"}, {"turn": 1, "score": 6.5})
    put("b", {"turn": 1, "score": 1}, {"turn": 2, "score": 5}, {"turn": 1, "score": 6.5})
    a, b, c = (str(tmp_path / name) for name in "abc")
    go("eval", tmp_path / "s", scores=(a, b))
    numbers = json.loads((tmp_path / "s" / "numbers.json").read_text())["numbers"]
    by_hand = {a: (17.5 / 3, 7.25, 3), b: (12.5 / 3, 3.75, 5)}
    turns = "", ", turn 1", ", turn 2"
    assert numbers == {f"mean score {path}{turn}": x for path, row in by_hand.items() for turn, x in zip(turns, row)} | {
        "win": 1, "tie": 1, "loss": 1}
    for rows, words in (([{"turn": 1, "score": 1}], "the same turns"), ([{"turn": t, "score": 1} for t in (1, 1, 2)], "the same turns"),
                        ([{"score": 1}, {"score": "n/a"}], "row 2: a number under \"score\" is needed, got 'n/a'"),
                        ([{"score": "nan"}], "got 'nan'"), ([], "row 1: a number"), ([{"turn": 1}], "got 'None'")):
        put("c", *rows)
        with pytest.raises(InputError, match=words):
            go("eval", tmp_path / "out", scores=(a, c))
        assert not (tmp_path / "out").exists()


def test_every_record_holds_its_settings_and_the_committed_ones_are_those_of_their_commands(work):
    folder, _, _ = work
    log = json.loads((folder / "log.json").read_text())
    assert log["seeds"] == [0] and log["stages"][1]["config"]["lora_rank"] == 4
    saved = json.loads((ROOT / "results" / "transllm_real.json").read_text(encoding="utf-8"))
    for record in saved["stages"]:
        settings = asdict(tyro.cli(Config, args=shlex.split(record["command"])[2:]))
        assert json.loads(json.dumps(settings)) == record["config"] and settings["seed"] in saved["seeds"]


@pytest.mark.parametrize("rows, words", [
    ([], "holds no conversation"),
    ([{"id": "1"}], "row 1: an object with conversations is needed"),
    ([conversation("1", "a", "<RESPONSE> b")["conversations"]], "row 1: an object with conversations is needed"),
    ([{"conversations": [{"from": "human", "value": "a"}]}], "\"conversations\" must list"),
    ([{"conversations": [{"from": "gpt", "value": "b"}, {"from": "human", "value": "a"}]}], "turn 1: human with a value.*got 'gpt'"),
    ([{"conversations": [{"from": "system", "value": "b"}, {"from": "gpt", "value": "a"}]}], "got 'system'"),
    ([conversation("1", "a", " ")], "turn 2: gpt with a value"),
    ([conversation("1", "a", "<EN> a <TH> c <RESPONSE> b")], "conversation 1: the answer must be <EN> .. <RESPONSE> .. <TH>"),
    ([conversation("1", "a", "no tag")], "the answer must be"),
    ([conversation("1", "a", "<RESPONSE> b " * 90)], "the answer must be"),
    ([conversation("1", "a " * 300, "<RESPONSE> b")], "0 example.s. are too few"),
])
def test_conversations_that_are_not_what_they_should_be_are_refused(work, tmp_path, rows, words):
    folder, _, go = work
    (tmp_path / "bad.json").write_text(json.dumps(rows))
    with pytest.raises(InputError, match=words):
        go("transfer", tmp_path / "out", adapter=str(folder / "t"), data=(str(tmp_path / "bad.json"),))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text, words", [("ein Haus", "line 1"), ("ein <EN> Haus <EN> b", "line 1"), ("a <EN> b\na <RESPONSE> b", "line 2"),
                                         ("<EN> b", "line 1")])
def test_parallel_lines_need_exactly_one_tag(work, tmp_path, text, words):
    folder, _, go = work
    (tmp_path / "pairs.txt").write_text(text)
    with pytest.raises(InputError, match=words):
        go("translate", tmp_path / "out", adapter=str(folder / "m"), pairs=(str(tmp_path / "pairs.txt"),))


def test_other_mistakes_are_one_readable_line_each(work, tmp_path):
    folder, _, go = work
    de, out = str(folder / "de.txt"), tmp_path / "out"
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("one line")
    (tmp_path / "none.json").write_text("[]")
    for words, stage, changes in (
            ("run --stage extend first", "mono", {"checkpoint": "chat", "data": (de,)}),
            ("as it was before --stage extend", "make-rkd", {"data": (str(folder / "q.jsonl"),)}),
            ("has a token '<EN>' already", "extend", {"data": (de,)}),
            ("there is no text", "mono", {"data": (str(tmp_path / "empty"),)}),
            ("--data is not given", "mono", {}),
            ("line-aligned", "translate", {"pairs": (de, str(tmp_path / "short.txt"))}),
            ("one adapter is carried through", "translate", {"adapter": str(folder / "m"), "lora_rank": 8, "pairs": (de, de)}),
            ("is merged already", "merge", {"checkpoint": "model", "adapter": str(folder / "f")}),
            ("give the --adapter", "merge", {}),
            ("no chat template", "eval", {"template": "own", "data": (str(folder / "questions.jsonl"),)}),
            ("neither \"query\" nor", "eval", {"data": (str(folder / "rkd.json"),)}),
            ("none.json, row 1: neither", "eval", {"data": (str(tmp_path / "none.json"),)}),
            ("--data, row 1: neither", "make-rkd", {"checkpoint": "chat"}),
            ("transfer: give --data", "transfer", {"adapter": str(folder / "t")}),
            ("one above 0 for what is given", "transfer", {"data": (str(folder / "rkd.json"),), "mix": (0.0, 0.4, 0.2)}),
            ("--limit must be at least 1", "eval", {"data": (str(folder / "questions.jsonl"),), "limit": 0})):
        with pytest.raises(InputError, match=words):
            go(stage, out, **changes)
        assert not out.exists()
    go("extend", tmp_path / "y", "chat", data=(de,), new_tokens=5)
    with pytest.raises(InputError, match=r"shape \[\d+, 32\], \[\d+, 32\] is needed: the adapter is of another model .or its vocabulary"):
        go("merge", out, tmp_path / "y", adapter=str(folder / "f"))
    assert not out.exists()


def test_a_real_tokenizer_and_real_parallel_text_go_through_stages_1_and_2(shared, tmp_path):
    tokenizer = load_tokenizer(shared / "tokenizers/minimind")
    tokenizer.config["eos_token"] = "<|im_end|>"
    chat_model(tmp_path / "chat", type(tokenizer)(tokenizer.spec, tokenizer.config))
    pairs = tuple(str(shared / f"data/gsm_questions/de-en/train.{x}") for x in ("de", "en"))
    cfg = Config(stage="extend", checkpoint=str(tmp_path / "chat"), out=str(tmp_path / "x"), data=pairs[:1], protect=pairs[1:],
                 new_tokens=200, limit=200, target_tag="<DE>", lora_rank=4, block=64, batch=4, steps=3, lr=1e-3, device="cpu")
    numbers = main(cfg)
    assert numbers["protected lines that kept their ids"] == 200
    assert numbers["after"] < 0.85 * numbers["tokens per character before"]
    main(replace(cfg, stage="mono", checkpoint=str(tmp_path / "x"), out=str(tmp_path / "m")))
    numbers = main(replace(cfg, stage="translate", checkpoint=str(tmp_path / "x"), adapter=str(tmp_path / "m"), pairs=pairs,
                           data=(), out=str(tmp_path / "t")))
    before, after = numbers["held-out loss, text"]
    assert after < before and Path(tmp_path / "t" / "adapter_model.safetensors").exists()
