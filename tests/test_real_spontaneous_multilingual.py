"""Spontaneous multilingual learners on the published files: their defects, the label scorer by
hand, prompts, training step by step, a whole run, what one checkpoint can say, bad input."""

import json
from dataclasses import replace

import pytest
import torch

from methods.real import spontaneous_multilingual as real
from methods.real.spontaneous_multilingual import (
    WORDS,
    Config,
    Measured,
    leads,
    measure,
    prompt_ids,
    question,
    read_tests,
    scorer_labels,
    token_set,
    token_sets,
    translation_texts,
)
from minilm import InputError
from minilm.claims import HOLDS, NOT_TESTED, UNDECIDED, Cell, as_metrics
from minilm.data import generator
from minilm.lora import load_adapter, lora_layers
from minilm.tokenizer import SentencePieceBPE, load_tokenizer, train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

REVIEWS = {
    "en": ("a lovely song", "a dull book"),
    "zh": ("一首好歌", "一本坏书"),
    "de": ("ein schönes Lied", "ein ödes Buch"),
}


def write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


@pytest.fixture
def files(tmp_path):
    """A tiny byte-level checkpoint and published-looking emotion files: 10 questions in three
    languages, 40 translations."""
    folder = tmp_path / "ap_emotion"
    for language, reviews in REVIEWS.items():
        labels = WORDS[language]["emotion"]["labels"]
        write(
            folder / f"emotion_{language}500_test.json",
            [{"input": f"{reviews[i % 2]} {i}", "answer": labels[i % 2]} for i in range(10)],
        )
    for language in ("zh", "de"):
        ask = f"\nTranslate the input from {WORDS[language]['name']} to English:\n"
        write(
            folder / f"emotion_{language}10k_question.json",
            [
                {
                    "input": question("emotion", language, [f"{REVIEWS[language][i % 2]} {i}"])
                    + ask,
                    "answer": question("emotion", "en", [f"{REVIEWS['en'][i % 2]} {i}"]),
                }
                for i in range(40)
            ],
        )
    texts = [*(text for pair in REVIEWS.values() for text in pair), "positive negative"]
    tokenizer = train_bpe(texts * 2, 300, special=("</s>",), eos="</s>")
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=400,
            model_type="llama",
        ),
        generator(0, "init"),
    )
    save_pretrained(model, tmp_path / "base", tokenizer)
    return tmp_path


@pytest.fixture
def cfg(files):
    return Config(
        checkpoint=str(files / "base"),
        data=str(files),
        train_langs=("zh",),
        epochs=2,
        lr=1e-2,
        eval_every=2,
        device="cpu",
        out=str(files / "out"),
        save=str(files / "adapters"),
    )


# --- the published files


@pytest.mark.parametrize(
    "language, score",
    [("ja", 2 / 3), ("bn", 2 / 3), ("no", 1 / 3), ("zh", 1), ("de", 1), ("sw", 1), ("bg", 1)],
)
def test_a_reader_who_knows_the_english_answer_gets_the_score_that_the_released_scorer_gives(
    shared, language, score, capsys
):
    cfg = Config(
        "unused", str(shared / "data/spontaneous"), "snli", eval_langs=(language,), num_shots=0
    )
    oracle, official = (
        read_tests(replace(cfg, gold=gold)).gold[language] for gold in ("english", "local")
    )
    assert len(oracle) == 600
    assert sum(a == b for a, b in zip(oracle, official)) / 600 == pytest.approx(score)
    warned = "contradict the English file" in capsys.readouterr().out
    assert warned == (score < 1)


@pytest.mark.parametrize("task, count", [("emotion", 500), ("paws", 500)])
def test_the_labels_of_the_other_tasks_are_consistent_in_every_language(
    shared, task, count, capsys
):
    cfg = Config("unused", str(shared / "data/spontaneous"), task, num_shots=0)
    tests = read_tests(cfg)
    assert list(tests.rows) == ["en", "zh", "de", "bg", "sw"]
    assert all(
        gold == tests.gold["en"] and len(gold) == count and gold.count(0) == count / 2
        for gold in tests.gold.values()
    )
    assert read_tests(replace(cfg, gold="local")).gold == tests.gold
    assert "warning" not in capsys.readouterr().out


def test_a_translation_row_of_the_published_file_is_what_we_would_have_written(shared):
    cfg = Config("unused", str(shared / "data/spontaneous"), "snli", train_langs=("zh",))
    published = json.loads(
        (shared / "data/spontaneous/snli/snli_zh10k_train_question.json").read_text()
    )
    rows = translation_texts(cfg, "qt")
    assert len(rows) == 10_000
    assert rows == [(row["input"], row["answer"]) for row in published]
    english = json.loads((shared / "data/spontaneous/snli/snli_en10k_train.json").read_text())
    assert [a for _, a in rows] == [
        question("snli", "en", [row["premise"], row["hypothesis"]]) for row in english
    ]
    assert (
        sum("answer" not in row for row in english) == 15
    )  # rows without a label: no translation needs one
    mono, shuffled = translation_texts(cfg, "mono"), translation_texts(cfg, "shuffled")
    assert mono[0] == (rows[0][1] + "\nTranslate the input from English to English:\n", rows[0][1])
    assert shuffled[0] == (rows[0][0], rows[1][1])
    assert (
        sum(a == b for a, b in zip(shuffled, rows)) < 50
    )  # (a premise is often told twice, a whole question seldom)


def test_the_whole_path_runs_on_the_published_tests_and_a_real_checkpoint(shared, tmp_path, capsys):
    results = real.main(
        Config(
            str(shared / "checkpoints/stories260K"),
            str(shared / "data/spontaneous"),
            "snli",
            arms=("base",),
            limit=4,
            num_shots=1,
            train_langs=("zh",),
            analysis="lens",
            out=str(tmp_path),
            device="cpu",
        )
    )
    row = results["metrics"]["base"]
    assert {name[4:] for name in row if name.startswith("acc ")} >= {
        *"en zh de ja bg no sw bn seen unseen all".split()
    }
    assert all(0 <= row[f"mass {language}"]["mean"] <= 1 for language in ("en", "zh", "bn"))
    assert len(results["series"]["base"]["lens zh"]["x"]) == 6
    assert {c["verdict"] for c in results["claims"]} == {NOT_TESTED}
    printed = capsys.readouterr().out
    assert 'Answer: "' in printed
    assert "warning: base: all labels together have less than 0.05" in printed


# --- the label scorer


def sentencepiece(*pieces):
    """A tokenizer of Llama 2's kind with these pieces and no merges."""
    normalizers = [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ]
    decoders = [
        {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
        {"type": "Strip", "content": " ", "start": 1, "stop": 0},
    ]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    return SentencePieceBPE(
        {
            "model": {"type": "BPE", "vocab": vocab, "merges": [], "byte_fallback": True},
            "normalizer": {"type": "Sequence", "normalizers": normalizers},
            "decoder": {"type": "Sequence", "decoders": decoders},
        }
    )


def test_the_tokens_of_a_label_by_hand():
    # SentencePiece's kind: every prefix counts with and without the space mark; upper case and
    # inner pieces do not
    tok = sentencepiece(
        "p", "▁p", "pos", "▁positive", "Pos", "os", "▁", "positives", "<0xE7>", "<0x70>", "积"
    )
    assert token_set(tok, "positive") == {0, 1, 2, 3}
    assert token_set(tok, "积极") == {
        8,
        10,
    }  # the first byte of a word that begins outside ASCII counts too


def test_byte_level_vocabularies_add_the_first_token_of_every_prefix(shared):
    tok = load_tokenizer(shared / "tokenizers/minimind")
    assert token_set(tok, "negative") == {
        tok.vocab[u] for u in ("n", "ne", "neg", "negative") if u in tok.vocab
    } | {tok.encode("negative"[:n])[0] for n in range(1, 9)}
    assert {tok.encode("积极")[0]} <= token_set(tok, "积极")


def test_a_byte_that_begins_two_labels_counts_for_neither_and_a_letter_that_does_is_refused(shared):
    words = WORDS["ru"]["emotion"]["labels"]  # п and о begin with the same byte, D0
    assert token_sets(sentencepiece("<0xD0>", "п", "▁от"), words) == [{1}, {2}]
    with pytest.raises(
        InputError, match="no token of the vocabulary begins the label 'позитивный' alone"
    ):
        token_sets(load_tokenizer(shared / "checkpoints/stories260K"), words)
    with pytest.raises(InputError, match="medföring.*' ?m'.*--labels english"):
        token_sets(
            load_tokenizer(shared / "checkpoints/stories260K"), WORDS["sv"]["snli"]["labels"]
        )


def test_english_labels_of_every_task_have_disjoint_tokens(shared):
    for folder in ("checkpoints/stories260K", "tokenizers/minimind"):
        tok = load_tokenizer(shared / folder)
        for task in ("emotion", "snli", "paws"):
            sets = token_sets(tok, WORDS["en"][task]["labels"])
            assert all(sets) and not set.intersection(*sets)


def test_the_winner_is_the_label_whose_first_tokens_have_most_probability_by_hand(files, cfg):
    model, tok = load_pretrained(cfg.checkpoint)
    tests = read_tests(replace(cfg, eval_langs=("de",)))
    prompts, _ = prompt_ids(cfg, tok, tests, "de", ["positive", "negative"], 400)
    p = torch.stack(
        [model(torch.tensor([prompt])).logits[0, -1].softmax(-1) for prompt in prompts]
    )  # one at a time, no padding
    masses = torch.stack(
        [p[:, sorted(s)].sum(1) for s in token_sets(tok, ["positive", "negative"])], 1
    )
    metrics = measure(cfg, model, tok, tests).metrics
    assert metrics["acc", "de"] == pytest.approx(
        (masses.argmax(1) == torch.tensor(tests.gold["de"])).float().mean().item()
    )
    assert metrics["mass", "de"] == pytest.approx(masses.sum(1).mean().item(), rel=1e-4)


# --- prompts


def test_a_prompt_by_hand_and_shots_are_never_asked(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    text = tok.decode(prompt_ids(cfg, tok, tests, "zh", ["positive", "negative"], 400).ids[0])
    assert text == '一首好歌 0\n情感: "positive"\n一本坏书 1\n情感: "negative"\n一首好歌 2\n情感: "'
    assert [row["input"][-1] for row in tests.rows["en"]] == list("23456789")
    assert question("snli", "zh", ["a", "b"]) == '前提: a\n假设: b\n答案: "'
    assert question("paws", "de", ["a", "b"]) == 'Satz 1: a\nSatz 2: b\nAntwort: "'


def test_a_common_beginning_of_the_labels_stands_in_the_prompt(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    words = WORDS["th"]["emotion"]["labels"]
    text = tok.decode(
        prompt_ids(
            replace(cfg, num_shots=0), tok, tests._replace(shot_classes=[]), "en", words, 400, "เชิง"
        ).ids[0]
    )
    assert text == 'a lovely song 2\nEmotion: "เชิง'
    assert token_sets(sentencepiece("เ", "บ", "ล", "ก"), words) == [{1}, {2}]


def test_a_long_review_is_cut_in_the_review_and_counted(files, cfg):
    tok, tests = load_tokenizer(files / "base"), read_tests(cfg)
    tests.rows["en"][0]["input"] = "word " * 500
    prompts, cut = prompt_ids(cfg, tok, tests, "en", ["positive", "negative"], 200)
    assert cut == 1 and 195 <= len(prompts[0]) <= 200
    assert tok.decode(prompts[0]).endswith('\nEmotion: "')
    with pytest.raises(InputError, match="lower --num-shots"):
        prompt_ids(cfg, tok, tests, "en", ["positive", "negative"], 20)


def test_chinese_as_the_target_combines_the_aligned_files(files, cfg):
    rows = translation_texts(replace(cfg, train_langs=("de", "en"), target="zh"), "qt")
    assert rows[0] == (
        'ein schönes Lied 0\nEmotion: "\nTranslate the input from German to Chinese:\n',
        '一首好歌 0\n情感: "',
    )
    assert rows[40] == (
        'a lovely song 0\nEmotion: "\nTranslate the input from English to Chinese:\n',
        '一首好歌 0\n情感: "',
    )


# --- the run


def test_every_arm_starts_from_the_checkpoint_and_only_the_adapter_learns(files, cfg, capsys):
    results = real.main(replace(cfg, arms=("base", "qt", "shuffled", "mono"), analysis="pca"))
    printed = capsys.readouterr().out
    assert '[a lovely song 0\nEmotion: "]' in printed and all(
        f"\n{c['id']} " in printed for c in results["claims"]
    )
    assert (files / "out/spontaneous_multilingual_real.png").stat().st_size > 5000
    losses = results["series"]["qt"]["validation loss"]["values"][0]
    assert losses[-1] < losses[0]
    assert -1 <= results["metrics"]["qt"]["partial r zh"]["mean"] <= 1
    model, _ = load_pretrained(files / "base")
    load_adapter(model, files / "adapters/qt-seed-0")
    assert {name.split(".")[-1] for name in lora_layers(model)} == {"q_proj", "v_proj"}
    alone = real.main(replace(cfg, arms=("qt",), out=str(files / "alone")))
    assert alone["metrics"]["qt"]["acc all"] == results["metrics"]["qt"]["acc all"]


def table(**changes):
    """qt's leads over the other arms, and a base that answers in English."""
    english = {
        "questions": 500.0,
        "acc en": 0.7,
        "mass en": 0.9,
        "largest en": 0.5,
        "recall en positive": 0.8,
        "recall en negative": 0.6,
    }
    cells = {Cell("base", name): [value] for name, value in (english | changes).items()}
    for arm in ("qt", "shuffled", "mono"):
        cells[Cell(arm, "questions")] = [500.0]
    for arm in ("base", "shuffled", "mono"):
        for group in ("seen", "unseen", "en"):
            for at, value in (("mean", 0.1), ("low", 0.02), ("high", 0.18)):
                cells[Cell("qt", f"lead {arm} {group} {at}")] = [value]
    return cells


def verdicts(cells):
    return {c["id"]: (c["verdict"], c["measured"]) for c in real.claims(as_metrics(cells))}


def test_one_checkpoint_is_undecided_at_best_and_shows_its_intervals_over_questions():
    for verdict, measured in verdicts(table()).values():
        assert verdict == UNDECIDED != HOLDS
        assert measured.count("+0.100 [+0.020, +0.180], above 0") == 3


def test_nothing_is_asked_without_the_controls():
    alone = {cell: x for cell, x in table().items() if cell.arm in ("base", "qt")}
    for verdict, measured in verdicts(alone).values():
        assert verdict == NOT_TESTED and measured.startswith("not in this run: shuffled")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"acc en": 0.53}, "base is at chance in English: 0.530"),  # of 500: at least .486
        ({"largest en": 0.68}, "base is at chance in English"),
        ({"mass en": 0.001}, "base does not answer: in English all labels have 0.001"),
        ({"recall en negative": 0.0}, "base never gives a label: recall en negative 0"),
    ],
)
def test_a_base_that_does_not_answer_in_english_has_nothing_to_carry_over(change, words):
    for verdict, measured in verdicts(table(**change)).values():
        assert verdict == NOT_TESTED and measured.startswith(words)


def test_groups_leave_english_out_and_count_the_target_as_seen(cfg):
    tested = ("en", "zh", "de", "it")
    groups = real.groups_of(replace(cfg, train_langs=("it",)), tested)
    assert groups["seen"] == ["it"] and groups["unseen"] == ["zh", "de"]
    groups = real.groups_of(replace(cfg, train_langs=("it",), target="zh"), tested)
    assert groups["seen"] == ["zh", "it"] and groups["unseen"] == ["de"]
    assert groups["all"] == list(tested)


def test_a_lead_is_paired_over_questions_and_a_mean_over_languages(cfg):
    ours = Measured({}, {}, {"en": [True, False], "zh": [True, True], "de": [True, False]})
    other = Measured({}, {}, {"en": [True, True], "zh": [False, True], "de": [False, False]})
    found = leads(replace(cfg, train_langs=("zh",)), ours, other, ("en", "zh", "de"), "mono")
    assert found["lead", "mono", "seen", "mean"] == found["lead", "mono", "unseen", "mean"] == 0.5
    assert found["lead", "mono", "en", "mean"] == -0.5
    assert found["lead", "mono", "seen", "low"] == 0.0 and found["lead", "mono", "en", "high"] == 0


def test_recall_is_over_the_questions_of_a_label_alone(cfg):
    found = Measured({}, {}, {})
    m = torch.tensor([[0.3, 0.1], [0.3, 0.3], [0.1, 0.2], [0.2, 0.1]])
    real.score(cfg, m, [0, 1, 1, 1], "de", found)  # answers 0, 0 (a tie), 1, 0
    metrics = found.metrics
    assert metrics["acc", "de"] == 0.5 and metrics["ties", "de"] == 1
    assert metrics["recall", "de", "positive"] == 1.0
    assert metrics["recall", "de", "negative"] == pytest.approx(1 / 3)
    assert metrics["largest", "de"] == 0.75 and metrics["mass", "de"] == pytest.approx(0.4)


# --- training, step by step


class Steps:
    """Notes what `train` does: the rows of every loss, whether it is a validation, each rate, and
    the norm of the gradient that the optimizer sees."""

    def __init__(self, monkeypatch):
        self.learned, self.checked, self.rates, self.norms = [], [], [], []
        loss, set_lr = real.translation_loss, real.set_lr
        clip = torch.nn.utils.clip_grad_norm_

        def noted(model, rows):
            (self.learned if torch.is_grad_enabled() else self.checked).append(rows)
            return loss(model, rows)

        def rate(optimizers, factor):
            self.rates.append(factor)
            set_lr(optimizers, factor)

        def clipped(parameters, most):
            parameters = list(parameters)
            before = clip(parameters, most)
            grads = [p.grad.flatten() for p in parameters if p.grad is not None]
            self.norms.append((before.item(), torch.cat(grads).norm().item()))

        monkeypatch.setattr(real, "translation_loss", noted)
        monkeypatch.setattr(real, "set_lr", rate)
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)


def trained(cfg, monkeypatch):
    model, tok = load_pretrained(cfg.checkpoint)
    with monkeypatch.context() as patch:
        steps = Steps(patch)
        history = real.train(cfg, model, tok, translation_texts(cfg, "qt"), 0)
    return model, tok, steps, history


def test_the_rows_held_out_are_never_learned_and_every_epoch_reads_the_rest(cfg, monkeypatch):
    cfg = replace(cfg, epochs=2, batch=10, micro_batch=4, eval_every=3, lora_alpha=1e3)
    _, _, steps, history = trained(cfg, monkeypatch)
    held = {str(row) for part in steps.checked for row in part}
    learned = [str(row) for part in steps.learned for row in part]
    assert len(held) == 2 and not held & set(learned)
    assert len(set(learned)) == 38 and len(learned) == 2 * 38  # 4 batches an epoch
    assert [step for step, _ in history] == [3, 6, 8]
    assert len(steps.rates) == 8 and steps.rates[0] == 1.0 and steps.rates[-1] == 0.0
    assert max(before for before, _ in steps.norms) > 1.0  # and so clipped
    assert max(after for _, after in steps.norms) <= 1.0 + 1e-4


def test_rows_can_be_limited(cfg):
    assert len(translation_texts(replace(cfg, rows=30), "qt")) == 30


def test_a_step_in_parts_is_a_step_at_once_whatever_the_rows_lengths(files, cfg, monkeypatch):
    path = files / "ap_emotion" / "emotion_zh10k_question.json"
    rows = json.loads(path.read_text())
    for i in range(0, 40, 3):  # some answers are much longer
        rows[i]["answer"] = "a very lovely song " * 4 + rows[i]["answer"]
    write(path, rows)
    cfg = replace(cfg, epochs=1, batch=10, eval_every=100)
    one, *_ = trained(replace(cfg, micro_batch=10), monkeypatch)
    parts, *_ = trained(replace(cfg, micro_batch=3), monkeypatch)
    for a, b in zip(one.parameters(), parts.parameters()):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_the_adapter_with_the_least_validation_loss_is_kept(cfg, monkeypatch):
    losses = iter([3.0, 1.0, 2.0, 2.5])
    kept = []

    def loss_on(cfg, model, rows):
        kept.append([p.detach().clone() for p in model.parameters() if p.requires_grad])
        return next(losses)

    monkeypatch.setattr(real, "loss_on", loss_on)
    cfg = replace(cfg, epochs=1, batch=10, eval_every=1)
    model, _, _, history = trained(cfg, monkeypatch)
    assert [loss for _, loss in history] == [3.0, 1.0, 2.0, 2.5]
    final = [p for p in model.parameters() if p.requires_grad]
    assert all(torch.equal(a, b) for a, b in zip(final, kept[1]))
    assert not all(torch.equal(a, b) for a, b in zip(final, kept[3]))


# --- bad input


def lose_key(rows):
    del rows[3]["input"]
    return rows


@pytest.mark.parametrize(
    "file, change, words",
    [
        ("emotion_zh500_test", lose_key, "emotion_zh500_test.json, row 3: no text under 'input'"),
        ("emotion_zh500_test", lambda rows: rows[:-1], "has 9 rows, the English file 10"),
        (
            "emotion_en500_test",
            lambda rows: [*rows[:-1], rows[-1] | {"answer": "meh"}],
            "row 9: label 'meh' is none of positive, negative",
        ),
        ("emotion_zh500_test", lambda rows: {"rows": rows}, "must hold a JSON array"),
        (
            "emotion_en500_test",
            lambda rows: rows[::2],
            "emotion_zh500_test.json has 10 rows, the English file 5",
        ),
        (
            "emotion_zh10k_question",
            lambda rows: [{**rows[0], "answer": rows[0]["answer"] + 'positive"'}, *rows[1:]],
            "row 0.*would leak",
        ),
        ("emotion_zh10k_question", lambda rows: rows[:15], "only 15 of 15 rows fit"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_in_one_line(files, cfg, file, change, words):
    path = files / "ap_emotion" / f"{file}.json"
    write(path, change(json.loads(path.read_text())))
    with pytest.raises(InputError, match=words) as error:
        real.main(cfg)
    assert "\n" not in str(error.value)
    assert not (files / "out").exists()


@pytest.mark.parametrize(
    "change, words",
    [
        ({"train_langs": ("it",)}, "emotion_it10k_train_question.json"),
        ({"train_langs": ("en",)}, "--train-langs en"),
        ({"eval_langs": ("xx",)}, "--eval-langs xx"),
        ({"shots": "shots.json"}, "fewer than 2 examples for zh"),
        ({"shots": "empty.json"}, "fewer than 2 examples for en"),
        ({"num_shots": 3}, "--num-shots 3"),
        ({"layer": 7, "analysis": "pca"}, "--layer 7"),
        ({"data": "nowhere"}, "nowhere"),
        ({"checkpoint": "nowhere"}, "nowhere"),
        ({"epochs": 0}, "--epochs"),
        ({"arms": ()}, "--arms"),
        ({"eval_langs": ()}, "--eval-langs"),
        ({"train_task": "poetry"}, "--train-task poetry"),
    ],
)
def test_wrong_settings_are_refused(files, cfg, change, words):
    write(files / "empty.json", [])
    write(
        files / "shots.json",
        {"en": [{"input": "fine", "answer": "positive"}, {"input": "poor", "answer": "negative"}]},
    )
    change = {k: str(files / v) if k == "shots" else v for k, v in change.items()}
    with pytest.raises((InputError, FileNotFoundError), match=words):
        real.main(replace(cfg, **change))
    assert not (files / "out").exists()


def test_three_labels_have_no_irrelevant_words(cfg):
    assert real.competing(replace(cfg, labels="irrelevant"), "zh") == ["ox", "horse"]
    assert real.competing(replace(cfg, labels="local"), "zh") == scorer_labels("emotion", "zh")
    with pytest.raises(InputError, match="snli has 3 labels"):
        real.competing(replace(cfg, task="snli", labels="irrelevant"), "zh")
