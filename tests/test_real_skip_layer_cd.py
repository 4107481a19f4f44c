"""SkipLayerCD on real files: prompts to the letter, answers read by hand, every decoder on a real
checkpoint, what every layer says, every refusal."""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from methods.real import skip_layer_cd
from methods.real.skip_layer_cd import (
    MGSM,
    Config,
    Item,
    Loaded,
    Restricted,
    amateur_spans,
    answer,
    choices,
    claims,
    complete,
    exemplars,
    is_right,
    make_decoder,
    own_tokens,
    read_task,
    score,
)
from methods.skip_layer_cd import SkipLayers
from methods.skip_layer_cd_baselines import DoLa
from minilm.claims import Cell, as_metrics
from minilm import InputError
from minilm.data import generator
from minilm.evaluate import last_number
from minilm.generate import generate
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Output, Transformer
from minilm.weights import load_pretrained, save_pretrained

SHOTS = {
    "en": [{"q": "Question: Two and two?", "a": "Step-by-Step Answer: 2 + 2 = 4. The answer is 4."}]
    * 9,
    "th": [{"q": "โจทย์: 1", "a": "คำตอบทีละขั้นตอน: 1"}] * 8,
    "aqua": [
        {
            "q": "How many?",
            "options": ["A)21", "B) 21.5"],
            "a": "Half of 43 is 21.5.",
            "correct": "B",
        }
    ],
}


@pytest.fixture(autouse=True)
def files(tmp_path, monkeypatch):
    """A tiny checkpoint that reads any text, a smaller amateur, and the four tasks' files."""
    monkeypatch.chdir(tmp_path)
    tok = train_bpe(
        ["Question: 12 and 3? The answer is 15.\n\n"],
        300,
        special=("<s>", "</s>"),
        bos="<s>",
        eos="</s>",
    )
    for name, layers in (("model", 4), ("small", 1)):
        config = ModelConfig(
            vocab_size=tok.vocab_size,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=layers,
            num_attention_heads=2,
            initializer_range=0.3,
            max_position_embeddings=700,
            model_type="llama",
        )
        save_pretrained(Transformer(config, generator(0, name)), name, tok)
    Path("shots.json").write_text(json.dumps(SHOTS))
    Path("mgsm_en.tsv").write_text("One and two?\t3\nMany?\t1,234\n")
    Path("mgsm_th.tsv").write_text("หนึ่ง\t1\n")
    Path("gsm8k.jsonl").write_text(
        json.dumps({"question": "One and two?", "answer": "1 + 2 = <<1+2=3>>3\n#### 1,003"}) + "\n"
    )
    Path("plus.jsonl").write_text(
        "".join(
            json.dumps({"question": f"Q{a}", "answer": a, "perturbation_type": "x"}) + "\n"
            for a in ("3", "2.5", "None", "14")
        )
    )
    Path("aqua.jsonl").write_text(
        json.dumps(
            {"question": "How many?", "options": ["A)1", "B)2"], "rationale": "", "correct": "B"}
        )
        + "\n"
    )


BASE = Config(
    checkpoint="model",
    data=".",
    shots="shots.json",
    num_shots=1,
    max_new_tokens=6,
    device="cpu",
    seed=100,
)


# --- prompts and answers


def test_an_mgsm_prompt_to_the_letter():
    first, second = read_task(replace(BASE, num_shots=None))
    shot = "Question: Two and two?\nStep-by-Step Answer: 2 + 2 = 4. The answer is 4.\n\n"
    assert first.prompt == 8 * shot + "Question: One and two?\nStep-by-Step Answer:"
    assert (first.gold, second.gold) == ("3", "1234")
    (thai,) = read_task(replace(BASE, langs=("th",), num_shots=None))
    assert thai.prompt.count("\n\n") == 4 and thai.prompt.endswith("\n\nโจทย์: หนึ่ง\nคำตอบทีละขั้นตอน:")
    assert (
        read_task(replace(BASE, num_shots=0))[0].prompt
        == "Question: One and two?\nStep-by-Step Answer:"
    )


def test_the_prompts_of_the_other_tasks_to_the_letter():
    (gsm,) = read_task(replace(BASE, task="gsm8k", data="gsm8k.jsonl"))
    assert (
        gsm.prompt
        == "Problem: Two and two?\nSolution: 2 + 2 = 4.\nFinal Answer: 4\n\n"
        "Problem: One and two?\nSolution:"
    )
    assert gsm.gold == "1003"
    assert [
        (i.prompt[-12:], i.gold)
        for i in read_task(replace(BASE, task="gsm-plus", data="plus.jsonl"))
    ] == [("Q3\nSolution:", "3"), ("14\nSolution:", "14")]  # only answers that are all digits
    (aqua,) = read_task(replace(BASE, task="aqua", data="aqua.jsonl"))
    assert (
        aqua.prompt
        == (
            "Problem: How many?\nChoices: (a) 21 (b)  21.5\nSolution: Half of 43 is 21.5.\n"
            "Final Answer: (b)\n\n"
            "Problem: How many?\nChoices: (a) 1 (b) 2\nSolution:"
        )
        and aqua.gold == "b"
    )
    assert (
        choices(["A)21", "B) 21.5"]) == "Choices: (a) 21 (b)  21.5"
    )  # as the published code has it


def test_gsm8k_compares_whole_numbers_as_text():
    gold = lambda text: (
        Path("one.jsonl").write_text(json.dumps({"question": "Q", "answer": f"so\n#### {text}"})),
        read_task(replace(BASE, task="gsm8k", data="one.jsonl"))[0].gold,
    )[1]
    assert [gold("5.0"), gold("1,200"), gold("-3")] == ["5", "1200", "-3"] and is_right(
        "gsm8k", "5", gold("5.0")
    )
    assert not is_right("gsm8k", "3", gold("-3"))  # the second call can write digits only
    with pytest.raises(InputError, match="line 1: the gold answer '5.5' is not a whole number"):
        gold("5.5")


@pytest.mark.parametrize(
    "change",
    [
        {"options": ["A)1", ""]},
        {"options": ["A)1", "21"]},
        {"options": "A)1"},
        {"options": []},
        {"correct": "Z"},
        {"correct": ""},
        {"correct": "C"},
        {"options": [1, 2]},
    ],
)
def test_an_aqua_row_needs_lettered_options_and_the_letter_of_one_of_them(change):
    Path("bad.jsonl").write_text(
        json.dumps({"question": "Q", "options": ["A)1", "B)2"], "correct": "A"} | change)
    )
    with pytest.raises(InputError, match="bad.jsonl, line 1: options such as .A.21. are needed"):
        read_task(replace(BASE, task="aqua", data="bad.jsonl"))


def test_a_file_of_answers_with_a_gold_that_is_no_number_is_refused_with_its_line():
    row = {
        "task": "mgsm",
        "lang": "en",
        "decoding": "greedy",
        "text": "so 3",
        "answer": "3",
        "gold": "3",
    }
    Path("answers.jsonl").write_text(json.dumps(row))
    assert score("answers.jsonl") == {"greedy": {"en": 1.0}}
    Path("answers.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"gold": "abc"}))
    with pytest.raises(InputError, match="line 2: the gold answer 'abc' is not a number"):
        score("answers.jsonl")


def test_the_public_files_are_read_whole_in_eleven_languages(shared):
    cfg = replace(
        BASE,
        data=str(shared / "data/mgsm"),
        shots=str(shared / "data/mgsm/exemplars.json"),
        langs=tuple(MGSM),
        num_shots=None,
    )
    items = read_task(cfg)
    assert len(items) == 11 * 250 and len(read_task(replace(cfg, limit=3))) == 33
    golds = {lang: [item.gold for item in items if item.lang == lang] for lang in MGSM}
    assert all(
        gold == golds["en"] for gold in golds.values()
    )  # the same questions in every language
    for lang, (
        question,
        word,
        count,
    ) in MGSM.items():  # an exemplar begins as the question that follows it does
        item = next(item for item in items if item.lang == lang)
        shots = item.prompt.split("\n\n")
        assert len(shots) == count + 1
        assert all(s.startswith(question.strip()) and f"\n{word.strip()}" in s for s in shots)
    english = exemplars(replace(cfg, task="gsm8k"), "en")
    assert [line.split()[-1] for line in english.split("\n") if line.startswith("Final")] == [
        "11",
        "29",
        "39",
        "9",
        "33",
        "8",
        "8",
        "5",
    ]
    assert "The answer is" not in english and english.count("Solution: ") == 8
    gsm = read_task(replace(cfg, task="gsm8k", data=str(shared / "data/gsm8k/test.jsonl")))
    assert len(gsm) == 1319 and gsm[0].gold == "18"


@pytest.mark.parametrize(
    "text, found",
    [
        ("5 + 6 = 11. The answer is 11.", "11"),
        ("$1,234.50 in all", "1234.50"),
        ("-5", "5"),
        ("1e3", "3"),
        ("none", None),
        ("", None),
        ("1,2,3", "3"),
        ("উত্তর হল ১১।", "১১"),
        ("at 3. Then 4.", "4"),
        (".5", "5"),
        ("12.0", "12.0"),
    ],
)
def test_the_last_number_is_read_as_the_paper_reads_it(text, found):
    assert last_number(text) == found


def test_a_right_answer_by_hand():
    assert (
        is_right("mgsm", "11.0", "11")
        and is_right("mgsm", "১১", "11")
        and not is_right("mgsm", "11.01", "11")
    )
    assert not is_right("mgsm", None, "11")
    assert (
        is_right("gsm8k", "11", "11")
        and not is_right("gsm8k", "11.0", "11")
        and is_right("aqua", "b", "b")
    )


class Scripted(nn.Module):
    """Says what it is told to, token by token, whatever stands before: for the stopping rules."""

    def __init__(self, loaded, text):
        super().__init__()
        self.loaded, self.config, self.said = (
            loaded,
            loaded.model.config,
            loaded.tokenizer.encode(text),
        )
        self.anchor = nn.Parameter(torch.zeros(1))

    def new_cache(self, B):
        return [0]

    def forward(self, ids, *, cache, attention_mask=None):
        scores = torch.full((1, ids.shape[1], self.config.vocab_size), 0.1).cumsum(-1) / 1e6
        scores[:, -1, self.said[min(cache[0], len(self.said) - 1)]] = 1.0
        cache[0] += 1
        return Output(scores)


def test_an_answer_ends_where_the_folder_says_though_the_tokenizer_has_another_end():
    model, tokenizer = load_pretrained("model")
    loaded = Loaded(model, tokenizer, None)
    scripted = Scripted(loaded, "12")
    scripted.said = [*tokenizer.encode("12"), tokenizer.bos_id, *tokenizer.encode("34")]
    assert complete(scripted, loaded, "Question:", 10).startswith("1234")
    scripted, model.generation_config = (
        Scripted(loaded, "12"),
        {"eos_token_id": [tokenizer.eos_id, tokenizer.bos_id]},
    )
    scripted.said = [*tokenizer.encode("12"), tokenizer.bos_id, *tokenizer.encode("34")]
    assert complete(scripted, loaded, "Question:", 10) == "12"


def test_text_is_cut_at_the_blank_line_or_the_new_line_and_a_second_call_reads_digits_or_a_letter():
    model, tokenizer = load_pretrained("model")
    loaded = Loaded(model, tokenizer, None)
    say = lambda text: Scripted(loaded, text)
    cfg = replace(BASE, max_new_tokens=80)
    item = Item("x", "en", "Question: 12 and 3?\nStep-by-Step Answer:", "15")
    said = say(" 12 + 3 = 15.\nThe answer is 15.\n\nQuestion: 99?")
    assert answer(cfg, item, said, said, loaded) == (" 12 + 3 = 15.\nThe answer is 15.", "15")
    gsm = replace(cfg, task="gsm8k")
    assert answer(gsm, item, say(" It is 15.\nProblem"), say("15\nand 7"), loaded) == (
        " It is 15.",
        "15",
    )
    # a decoder that would rather talk is held to digits and the new line: here the largest score
    # among those, 20 times
    text, answered = answer(gsm, item, say(" Hm.\n"), say("and so on"), loaded)
    assert text == " Hm." and answered.isdigit()
    aqua = replace(cfg, task="aqua")
    assert answer(aqua, item, say(" B.\n"), say("b)"), loaded) == (" B.", "b")
    assert answer(aqua, item, say(" B.\n"), say("x"), loaded)[1] in "abcde"


def test_the_restriction_is_dropped_where_every_allowed_token_is_implausible():
    class Fixed(nn.Linear):
        config, new_cache = ModelConfig(vocab_size=3, hidden_size=8), lambda self, B: None
        forward = lambda self, ids, cache, attention_mask: Output(
            torch.tensor([[[1.0, 2.0, -torch.inf]]])
        )

    scores = lambda allowed: Restricted(Fixed(1, 1), allowed)(
        torch.tensor([[0]]), cache=None
    ).logits.tolist()
    assert scores([0]) == [[[1.0, -torch.inf, -torch.inf]]]
    assert scores([2]) == [[[1.0, 2.0, -torch.inf]]]


# --- decoding a checkpoint


def test_every_decoding_of_a_real_checkpoint_goes_on_with_the_story(shared, capsys):
    cfg = Config(
        checkpoint=str(shared / "checkpoints/stories260K"),
        prompt="Once upon a time",
        max_new_tokens=12,
        skip=(3, 4),
        exits=(2,),
        decoding=("greedy", "cd", "dola", "dola-static", "sl-h", "sl-d", "skip"),
        amateur=str(shared / "checkpoints/stories260K"),
    )
    texts = skip_layer_cd.main(cfg)
    assert all(text.startswith(", there was a little girl") for text in texts.values())
    assert "sl-h skips [1,2): Once upon a time, there was" in capsys.readouterr().out
    assert texts["cd"] == texts["greedy"]  # an amateur that is the expert changes nothing
    expected = json.loads((shared / "checkpoints/stories260K/expected.json").read_text())
    assert expected  # (greedy decoding itself is compared with transformers in test_weights.py)
    again = skip_layer_cd.main(replace(cfg, beta=0.0, decoding=("sl-h", "sl-d", "skip")))
    assert set(again.values()) == {texts["greedy"]}


def test_skipping_and_dola_equal_the_same_run_in_full_with_transformers(shared):
    # (the installed transformers fetches DoLa from the hub and has no contrastive decoding; its
    # models give the forward passes)
    from transformers import AutoModelForCausalLM

    folder = shared / "checkpoints/stories260K"
    model, tokenizer = load_pretrained(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    short = copy.deepcopy(theirs)
    del short.model.layers[1:3]
    short.config.num_hidden_layers = 3
    prompt = tokenizer.encode("Once upon a time, there was a dog", bos=True)

    def slow(best, steps=24):
        ids = list(prompt)
        with torch.no_grad():
            for _ in range(steps):
                ids.append(int(best(torch.tensor([ids]))))
        return ids

    def skip(ids):
        expert, amateur = (m(ids, use_cache=False).logits[0, -1] for m in (theirs, short))
        return (
            (1.5 * expert - 0.5 * amateur)
            .masked_fill(expert.softmax(-1) < 0.1 * expert.softmax(-1).max(), -torch.inf)
            .argmax()
        )

    def static(ids):
        out = theirs(ids, use_cache=False, output_hidden_states=True)
        final, early = (
            out.logits[0, -1].log_softmax(-1),
            theirs.lm_head(out.hidden_states[2])[0, -1].log_softmax(-1),
        )
        return (
            (final - early).masked_fill(final.exp() < 0.1 * final.exp().max(), -torch.inf).argmax()
        )

    for decoder, best in ((SkipLayers(model, (1, 3)), skip), (DoLa(model, [2]), static)):
        assert generate(decoder, [prompt], 24)[0] == slow(best)


def test_a_run_answers_scores_measures_and_can_be_scored_again(tmp_path, capsys):
    cfg = replace(
        BASE,
        langs=("en", "th"),
        decoding=("greedy", "cd", "dola", "sl-h", "sl-d"),
        amateur="small",
        out=str(tmp_path / "out"),
        timing=True,
    )
    results = skip_layer_cd.main(cfg)
    rows = [
        json.loads(line)
        for line in (tmp_path / "out/skip_layer_cd_answers.jsonl").read_text().splitlines()
    ]
    assert len(rows) == 5 * 3 and {row["id"] for row in rows} == {"en-1", "en-2", "th-1"}
    assert {tuple(row["span"]) for row in rows if row["decoding"] == "sl-h"} == {(1, 2)}
    assert (
        results["metrics"]["sl-d"]["blocks"]["mean"]
        == results["metrics"]["sl-d"]["formula"]["mean"]
    )
    assert {"time", "ms for the prompt", "tokens per s"} <= set(results["metrics"]["dola"])
    assert (tmp_path / "out/skip_layer_cd_real.png").stat().st_size > 10_000
    again = score(str(tmp_path / "out/skip_layer_cd_answers.jsonl"))
    assert all(
        again[name][lang] == results["metrics"][name][f"acc {lang}"]["mean"]
        for name in again
        for lang in ("en", "th")
    )
    printed = capsys.readouterr().out
    assert all(f"\n{c['id']} " in printed for c in results["claims"])


def test_tasks_with_a_second_call_run_and_the_diagnostics_run_alone(tmp_path):
    for task, data in (("gsm8k", "gsm8k.jsonl"), ("aqua", "aqua.jsonl")):
        cfg = replace(
            BASE, task=task, data=data, decoding=("dola", "sl-h"), out=str(tmp_path / task)
        )
        assert 0 <= skip_layer_cd.main(cfg)["metrics"]["sl-h"]["acc"]["mean"] <= 1


def test_a_batch_of_one_decoder_is_the_module_that_the_paper_script_defines():
    model, tokenizer = load_pretrained("model")
    decoder = make_decoder(
        replace(BASE, skip=(1, 3)), "skip", Loaded(model, tokenizer, None), "", None
    )
    assert isinstance(decoder, SkipLayers) and decoder.span == (1, 3)
    assert generate(decoder, [[5, 6]], 8) == generate(SkipLayers(model, (1, 3)), [[5, 6]], 8)


# --- what every layer says

ANALYZE = replace(
    BASE, stage="analyze", shots=None, num_shots=None, langs=("en", "th"), max_new_tokens=800
)


def test_a_token_is_a_languages_if_it_is_twenty_times_as_frequent_there(tmp_path):
    model, tokenizer = load_pretrained("model")
    loaded = Loaded(model, tokenizer, None)
    x, y, z = (tokenizer.encode(letter)[0] for letter in "xyz")
    own = own_tokens(loaded, ["x" * 40 + "y" * 5 + "z" * 40], ["z" * 40 + "a" * 45])
    assert own[x] and not own[z]  # 40 of 85 where it never stands elsewhere; as often there
    assert not own[y]  # 5 times is too few to be sure: 10 are needed
    assert not own_tokens(loaded, [], ["x"]).any()


def test_an_eighth_of_the_blocks_at_a_time_from_the_lower_ones_to_the_last():
    assert amateur_spans(30) == [(2, 6), (6, 10), (10, 14), (14, 18), (18, 22), (22, 26), (26, 30)]
    assert amateur_spans(4) == [(0, 1), (1, 2), (2, 3), (3, 4)]


def test_the_layers_are_asked_at_every_place_where_a_token_of_the_language_is_next(
    tmp_path, capsys
):
    Path("mgsm_th.tsv").write_text("หนึ่งและสอง หนึ่งและสอง หนึ่งและสอง\t3\n" * 4)
    Path("mgsm_en.tsv").write_text("one and two, one and two, one and two\t3\n" * 8)
    results = skip_layer_cd.main(replace(ANALYZE, limit=2, out=str(tmp_path / "look")))
    metrics = results["metrics"]
    amateurs = [f"[{m},{m + 1})" for m in range(4)]
    assert {
        "h0",
        "h3",
        "expert",
        *amateurs,
        *(f"sl {x}" for x in amateurs),
        "dola",
        "mild exit",
    } <= set(metrics)
    assert metrics["text"]["places th"]["mean"] > 20
    assert (
        metrics["h3"]["own th"] == metrics["[3,4)"]["own th"]
    )  # skipping the last block is an early exit
    model, tokenizer = load_pretrained("model")  # one number by hand: the expert's right tokens
    loaded = Loaded(model, tokenizer, None)
    questions = {
        lang: [line.split("\t")[0] for line in Path(f"mgsm_{lang}.tsv").read_text().splitlines()]
        for lang in ("en", "th")
    }
    own = own_tokens(loaded, questions["th"], questions["en"])
    ids = tokenizer.encode(questions["th"][0], bos=tokenizer.add_bos)
    with torch.no_grad():
        said = model(torch.tensor([ids])).logits[0].argmax(-1).tolist()
    due = [(a, b) for a, b in zip(said, ids[1:]) if own[b]]
    assert metrics["expert"]["right th"]["mean"] == pytest.approx(
        sum(a == b for a, b in due) / len(due)
    )
    verdicts = {c["id"]: c["verdict"] for c in results["claims"]}
    assert verdicts == dict.fromkeys(("C1", "C2", "C3", "C4", "C5", "C6"), "undecided") | {
        "C4a": "not tested",
        "C7": "not tested",
    }
    assert "one seed decides nothing" in capsys.readouterr().out


def test_a_run_of_answers_judges_costs_and_answers_and_is_undecided_at_best():
    table = {
        Cell(arm, "acc"): [value] for arm, value in (("greedy", 0.5), ("dola", 0.3), ("sl-d", 0.6))
    }
    table |= {Cell("sl-d", "blocks"): [1.5], Cell("sl-d", "formula"): [1.5]}
    verdicts = {c["id"]: c["verdict"] for c in claims(as_metrics(table))}
    assert verdicts["C4a"] == verdicts["C7"] == "undecided" and verdicts["C1"] == "not tested"
    weak = table | {Cell("greedy", "acc"): [0.0]}
    assert {c["id"]: c["verdict"] for c in claims(as_metrics(weak))}["C4a"] == "not tested"


def test_sl_d_looks_at_each_languages_own_text_also_without_exemplars(monkeypatch, tmp_path):
    seen = []

    def recorded(model, ids):
        seen.append(ids)
        return [4.0, 3.0, 2.0, 1.0]

    monkeypatch.setattr(skip_layer_cd, "entropy_curve", recorded)
    cfg = replace(
        BASE, langs=("en", "th"), num_shots=0, decoding=("sl-d",), out=str(tmp_path / "out")
    )
    skip_layer_cd.main(cfg)
    tokenizer = load_pretrained("model")[1]
    texts = [tokenizer.decode(ids[0].tolist(), skip_special=True) for ids in seen]
    assert texts == ["Question: One and two?\nStep-by-Step Answer:", "โจทย์: หนึ่ง\nคำตอบทีละขั้นตอน:"]


# --- refusals


@pytest.mark.parametrize(
    "change, words",
    [
        ({"decoding": ("cd",)}, "--amateur"),
        ({"decoding": ("skip",)}, "--skip M N"),
        ({"decoding": ("dola-static",)}, "--exits"),
        ({"decoding": ("skip",), "skip": (3, 9)}, "span 3,9"),
        ({"decoding": ("dola",), "exits": (7,)}, "early exits .7."),
        ({"decoding": ("sl-h",), "alpha": 0.0}, "--alpha"),
        ({"decoding": ("sl-d",), "beta": -0.5}, "--beta"),
        ({"decoding": ("dola",), "repetition_penalty": 0.5}, "--repetition-penalty"),
        ({"min_start": 9}, "--min-start 9"),
        ({"langs": ("xx",)}, "--langs xx.*en, de"),
        ({"data": None}, "--data"),
        ({"data": "nowhere"}, "mgsm_en.tsv"),
        ({"shots": None}, "--shots"),
        ({"shots": "none.json"}, "none.json"),
        ({"langs": ("de",)}, "mgsm_de.tsv|exemplars for 'de'"),
        ({"data": "bad"}, "line 2.*2 tabs"),
        ({"data": "words"}, "line 1.*'three' is not a number"),
        ({"data": "empty"}, "is empty"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"checkpoint": "mute"}, "tokenizer.json"),
        ({"task": "gsm8k", "data": "bad.jsonl"}, "bad.jsonl, line 1.*question, answer"),
        ({"task": "aqua", "data": "gsm8k.jsonl"}, "options"),
        ({"num_shots": 9}, "the prompt has .* tokens, the model reads 700"),
        ({"stage": "score", "data": "gsm8k.jsonl"}, "task, lang, decoding"),
        ({"stage": "score", "data": None}, "--data is missing"),
        ({"prompt": "", "data": None, "shots": None, "num_shots": None}, "--prompt is empty"),
        ({"prompt": "x"}, "--data . has no effect with --prompt"),
        ({"stage": "analyze"}, "no effect with --stage analyze"),
        (
            {"stage": "analyze", "shots": None, "num_shots": None, "task": "aqua"},
            "questions of --task mgsm",
        ),
        ({"limit": 0}, "--limit 0"),
        ({"limit": -1}, "--limit -1"),
        ({"num_shots": -1}, "--num-shots -1.*at least 0"),
        ({"langs": ()}, "--langs"),
        ({"max_new_tokens": 0}, "--max-new-tokens 0"),
    ],
)
def test_what_cannot_be_used_is_named_in_one_line_and_nothing_is_written(tmp_path, change, words):
    for folder, text in (("bad", "a\t1\nb\tc\t2\n"), ("words", "a\tthree\n"), ("empty", "\n")):
        Path(folder).mkdir()
        Path(folder, "mgsm_en.tsv").write_text(text)
    Path("bad.jsonl").write_text('{"question": 1}\n')
    Path("shots.json").write_text(
        json.dumps(SHOTS | {"en": [{"q": "Question: " + "many words " * 20, "a": "1"}] * 9})
    )
    shutil.copytree("model", "mute")
    Path("mute/tokenizer.json").unlink()
    with pytest.raises((InputError, FileNotFoundError), match=words) as error:
        skip_layer_cd.main(replace(BASE, out=str(tmp_path / "out"), **change))
    assert "\n" not in str(error.value)
    assert not (tmp_path / "out").exists()


def test_two_vocabularies_are_refused_unless_one_is_cut(tmp_path):
    config = ModelConfig(
        vocab_size=310,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    save_pretrained(Transformer(config, generator(0, "other")), "other")
    cfg = replace(
        BASE,
        decoding=("cd",),
        amateur="other",
        prompt="Question:",
        data=None,
        shots=None,
        num_shots=None,
    )
    with pytest.raises(InputError, match="--truncate-vocab"):
        skip_layer_cd.main(cfg)
    assert skip_layer_cd.main(replace(cfg, truncate_vocab=True))["cd"]
