"""MoE-LPR on a user's files: reading them, the whole run on a tiny checkpoint, what is saved, the
multiple-choice scorer, bad input."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from methods.real import moe_lpr
from methods.moe_lpr import changed_tensors
from methods.real.moe_lpr import (
    Config,
    Texts,
    load_added,
    multiple_choice,
    read_documents,
    relabelled,
)
from minilm import InputError
from minilm.data import generator
from minilm.moe import MoE
from minilm.tokenizer import train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained

WORDS = {
    "en": "the cat sat on a mat and saw her dog run home".split(),
    "es": "el gato vio un perro en la casa y una mesa".split(),
    "fr": "le chat dort sous une chaise avec mon chien noir".split(),
    "ru": "кот сидел на окне и видел белый снег дома".split(),
}


def lines(language, n):
    gen = generator(0, language)
    return [
        " ".join(
            WORDS[language][i] for i in torch.randint(len(WORDS[language]), (12,), generator=gen)
        )
        for _ in range(n)
    ]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A tiny checkpoint with its tokenizer, two text files, one JSON Lines file, and an exam."""
    folder = tmp_path_factory.mktemp("real")
    tokenizer = train_bpe(
        [*lines("en", 80), *lines("ru", 10)], 400, special=("<|endoftext|>",), eos="<|endoftext|>"
    )
    model = Transformer(
        ModelConfig(
            vocab_size=tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            model_type="qwen3",
            tie_word_embeddings=True,
        ),
        generator(0, "init"),
    )
    save_pretrained(model, folder / "base", tokenizer)
    for language in ("en", "fr"):
        (folder / f"{language}.txt").write_text("\n".join(lines(language, 400)), encoding="utf-8")
    (folder / "train.ru").write_text(
        "\n".join(json.dumps({"text": line}) for line in lines("ru", 400)), encoding="utf-8"
    )
    (folder / "exam.jsonl").write_text(
        "\n".join(
            json.dumps({"context": "the cat", "choices": ["sat on", "снег"], "gold": i % 2})
            for i in range(4)
        ),
        encoding="utf-8",
    )
    return folder


@pytest.fixture
def cfg(files, tmp_path):
    new, old, ood = ((str(files / name),) for name in ("train.ru", "en.txt", "fr.txt"))
    return Config(
        checkpoint=str(files / "base"),
        new=new,
        old=old,
        ood=ood,
        block=32,
        batch=8,
        lr=1e-2,
        limit=200,
        num_experts=3,
        review_docs_old=5,
        review_docs_new=10,
        review_batch=2,
        review_lr=1e-2,
        micro_batch=4,
        eval_blocks=4,
        workers=1,
        out=str(tmp_path),
        save=str(tmp_path / "models"),
    )


def test_json_lines_and_plain_lines_are_read_alike_and_empty_lines_skipped(tmp_path):
    plain, rows = tmp_path / "a.txt", tmp_path / "a.jsonl"
    plain.write_text("one\n\n  two \nthree", encoding="utf-8")
    rows.write_text(
        '{"text": "one"}\n{"text": " "}\n{"text": "two", "id": 7}\n\n{"text": "three"}\n',
        encoding="utf-8",
    )
    assert (
        list(read_documents(str(plain)))
        == list(read_documents(str(rows)))
        == ["one", "two", "three"]
    )


def test_texts_hold_out_the_last_twentieth_and_pack_each_documents_tokens_with_its_label(
    cfg, files
):
    _, tokenizer = load_pretrained(files / "base")
    texts = Texts(cfg, tokenizer, 0)
    assert [(c.name, c.group, c.read, c.held_out) for c in texts.corpora] == [
        ("en", "old", 200, range(380, 400)),
        ("fr", "ood", 200, range(380, 400)),
        ("ru", "new", 200, range(380, 400)),
    ]
    documents = np.array([(0, 3), (2, 5), (0, 390)])
    ids, old = (torch.cat(x) for x in zip(*texts.blocks(documents)))
    stream = [
        i
        for name, n in (("en", 3), ("ru", 5), ("en", 390))
        for i in (*tokenizer.encode(lines(name, 400)[n]), tokenizer.eos_id)
    ]
    labels = [
        label
        for name, n, label in (("en", 3, True), ("ru", 5, False), ("en", 390, True))
        for label in [label] * (len(tokenizer.encode(lines(name, 400)[n])) + 1)
    ]
    assert ids.tolist() == stream[: len(ids)] and old.tolist() == labels[: len(ids)]
    assert texts.tokens(documents) == len(stream)


def test_the_replay_is_the_same_text_in_every_method_and_the_reviews_new_text_is_part_of_stage_1s(
    cfg, files
):
    texts = Texts(cfg, load_pretrained(files / "base")[1], 0)
    few, all_ = texts.choose("new", 10).tolist(), texts.choose("new").tolist()
    assert few == all_[:10] and len({tuple(x) for x in all_}) == 200
    assert (
        texts.choose("old", 5).tolist() == texts.choose("old", 5).tolist()
        and max(d for _, d in all_) < 200
    )


def test_the_whole_run_saves_folders_that_transformers_loads_with_the_same_logits(
    cfg, files, capsys
):
    results = moe_lpr.main(
        replace(cfg, methods=("stage 1", "lpr", "ft 1e-3"), eval=(str(files / "exam.jsonl"),))
    )
    printed = capsys.readouterr().out
    assert "trained in stage 1" in printed and "active" in printed
    assert (
        results["metrics"]["stage 1"]["changed"]["mean"]
        == results["metrics"]["lpr"]["changed"]["mean"]
        == 0
    )
    assert results["metrics"]["stage 1"]["new"]["mean"] < results["metrics"]["base"]["new"]["mean"]
    assert {"recovery", "new cost", "acc exam", "acc_norm exam", "en", "fr", "ru", "G0 ood"} <= set(
        results["metrics"]["lpr"]
    )
    assert (moe_lpr.Path(cfg.out) / "moe_lpr_real_text.png").stat().st_size > 10_000
    import transformers

    folder = moe_lpr.Path(cfg.save) / "lpr"
    ids = torch.tensor([[5, 9, 300, 7]])
    with torch.no_grad():
        ours, theirs = (
            load_pretrained(folder)[0](ids).logits,
            transformers.AutoModelForCausalLM.from_pretrained(folder)(ids).logits,
        )
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
    assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_moe"


def test_the_review_alone_on_stage_1s_folder_gives_the_model_of_the_run_in_one_go(cfg):
    moe_lpr.main(replace(cfg, methods=("stage 1", "lpr")))
    models = moe_lpr.Path(cfg.save)
    moe_lpr.main(
        replace(
            cfg,
            stage="2",
            methods=("lpr",),
            checkpoint=str(models / "stage-1"),
            save=str(models / "later"),
        )
    )
    together, alone = (
        load_pretrained(folder)[0] for folder in (models / "lpr", models / "later" / "lpr")
    )
    assert all(
        torch.equal(a, b)
        for a, b in zip(together.state_dict().values(), alone.state_dict().values())
    )


def test_in_bfloat16_trained_weights_are_float32_until_saved_and_stage_1_can_stand_alone(
    cfg, files
):
    results = moe_lpr.main(
        replace(cfg, stage="1", methods=("lpr",), dtype="bfloat16", old=(str(files / "en.txt"),))
    )
    model, _ = load_pretrained(moe_lpr.Path(cfg.save) / "lpr", dtype=torch.bfloat16)
    base, _ = load_pretrained(files / "base", dtype=torch.bfloat16)
    assert changed_tensors(model, base) == 0
    assert results["metrics"]["lpr"]["recovery"]["mean"] is None  # there was no review
    assert results["metrics"]["lpr"]["changed"]["mean"] == 0


def test_only_the_layers_asked_for_become_mixtures(cfg):
    moe_lpr.main(replace(cfg, methods=("stage 1",), moe_layers=(1,)))
    model, _ = load_pretrained(moe_lpr.Path(cfg.save) / "stage-1")
    assert [isinstance(block.mlp, MoE) for block in model.layers] == [False, True]


def test_a_llama_of_mixtures_and_dense_layers_is_kept_as_what_was_added_and_can_be_reviewed_again(
    cfg, files, tmp_path
):
    base, tokenizer = load_pretrained(files / "base")
    config = replace(base.config, model_type="llama")
    llama = Transformer(config, generator(0, "init"))
    save_pretrained(llama, tmp_path / "llama", tokenizer)
    cfg = replace(cfg, checkpoint=str(tmp_path / "llama"), moe_layers=(1,))
    together = moe_lpr.main(replace(cfg, methods=("stage 1", "lpr")))
    models = moe_lpr.Path(cfg.save)
    assert sorted(f.name for f in (models / "lpr").iterdir()) == ["added.json", "added.safetensors"]
    model = load_added(load_pretrained(cfg.checkpoint)[0], models / "lpr")
    assert [isinstance(block.mlp, MoE) for block in model.layers] == [False, True]
    assert changed_tensors(model, llama) == 0
    again = moe_lpr.main(
        replace(cfg, stage="2", methods=("lpr",), added=str(models / "stage-1"), save=None)
    )
    for metric in ("old", "new"):
        assert again["metrics"]["lpr"][metric] == together["metrics"]["lpr"][metric]
    with pytest.raises(FileNotFoundError, match="added.json"):
        moe_lpr.main(replace(cfg, stage="eval", added=str(tmp_path / "nowhere")))


def test_upcycling_is_checked_on_the_checkpoint_itself_and_nothing_holds_of_one(cfg):
    results = moe_lpr.main(
        replace(cfg, ood=(), methods=("stage 1", "review ntp", "lpr"), save=None)
    )
    assert results["metrics"]["upcycled"]["logit difference"]["mean"] < 1e-4
    rows = {row["id"]: row for row in results["claims"]}
    assert "holds" not in {row["verdict"] for row in results["claims"]}
    assert rows["C1"]["verdict"] == "undecided"
    # what is missing is named: here an arm, there a metric, or that there was nothing to recover
    assert rows["C6"]["measured"] == "not in this run: moe all"
    assert rows["C11"]["measured"] == "lpr ood was not measured in every seed"
    assert (
        results["metrics"]["lpr"]["forgotten"]["mean"] > 0.05
        or "did not forget" in rows["C3"]["measured"]
    )


def test_the_labels_of_a_control_are_drawn_with_the_old_texts_share_or_inverted():
    old = torch.tensor([[True, False, False]])
    assert relabelled(old, "true", 0.3, None) is old
    assert torch.equal(relabelled(old, "inverted", 0.3, None), ~old)
    drawn = relabelled(torch.zeros(100, 100, dtype=torch.bool), "shuffled", 0.3, generator(0, "x"))
    assert drawn.float().mean() == pytest.approx(0.3, abs=0.02)


def test_the_multiple_choice_scores_by_hand(tmp_path, files):
    # A model of uniform logits: every token costs log V, so of "a" (1 token) and "a a a" (3 tokens)
    # the sum prefers the shorter; per character both costs are log V / 1 and 3 log V / 5: acc_norm
    # prefers the longer. Equal choices: the first wins.
    model, tokenizer = load_pretrained(files / "base")
    with torch.no_grad():
        model.lm_head.weight.zero_()
    path = tmp_path / "exam.jsonl"
    score = lambda *rows: (
        path.write_text("\n".join(map(json.dumps, rows))),
        multiple_choice(model, tokenizer, str(path)),
    )[1]
    item = {"context": "the", "choices": ["a", "a a a"], "gold": 0}
    assert len(tokenizer.encode(" a")) == 1 and len(tokenizer.encode(" a a a")) == 3
    assert score(item) == {"acc exam": 1.0, "acc_norm exam": 0.0}
    assert score(item, item | {"gold": 1}) == {"acc exam": 0.5, "acc_norm exam": 0.5}
    assert score({"context": "the", "choices": ["cat", "dog"], "gold": 0}) in (
        {"acc exam": 1.0, "acc_norm exam": 1.0},
        {"acc exam": 0.0, "acc_norm exam": 0.0},
    )


def test_a_multiple_choice_item_ends_at_a_line_feed_alone(tmp_path, files):
    """JSON may hold U+2028 as it is, which str.splitlines takes for the end of a line."""
    model, tokenizer = load_pretrained(files / "base")
    item = {"context": "the\u2028", "choices": ["a", "cat"], "gold": 0}
    path = tmp_path / "exam.jsonl"
    path.write_text(json.dumps(item, ensure_ascii=False) + "\n", encoding="utf-8")
    escaped = tmp_path / "escaped" / "exam.jsonl"
    escaped.parent.mkdir()
    escaped.write_text(json.dumps(item) + "\n")
    scores = [multiple_choice(model, tokenizer, str(file)) for file in (path, escaped)]
    assert scores[0] == scores[1]


@pytest.mark.parametrize(
    "change",
    [
        {"gold": -1},
        {"gold": 2},
        {"gold": 0.5},
        {"gold": "0"},
        {"choices": ["a"]},
        {"choices": "ab"},
    ],
)
def test_a_multiple_choice_item_whose_gold_is_no_choice_is_refused_with_its_line(
    tmp_path, files, change
):
    model, tokenizer = load_pretrained(files / "base")
    item = {"context": "the", "choices": ["a", "cat"], "gold": 0}
    (tmp_path / "exam.jsonl").write_text(json.dumps(item) + "\n" + json.dumps(item | change))
    with pytest.raises(
        InputError, match="exam.jsonl, line 2: .* two choices or more and gold counted from 0"
    ):
        multiple_choice(model, tokenizer, str(tmp_path / "exam.jsonl"))


@pytest.mark.parametrize(
    "change, words",
    [
        ({"num_experts": 1}, "at least 2"),
        ({"experts_per_token": 5}, "1 to all"),
        ({"moe_layers": (7,)}, "from 0 to 1"),
        ({"moe_layers": (1, 1)}, "once"),
        ({"stage": "2"}, "give stage 1's folder"),
        ({"block": 4096}, "block"),
        ({"batch": 4096}, "do not fill"),
        ({"batch": 0}, "--batch"),
        ({"review_batch": 0}, "--review-batch"),
        ({"micro_batch": 0}, "--micro-batch"),
        ({"lr": float("nan")}, "--lr"),
        ({"limit": 0}, "--limit"),
        ({"review_docs_old": 0}, "--review-docs-old"),
        ({"block": 1}, "--block"),
        ({"eval_blocks": 0}, "--eval-blocks"),
        ({"methods": ()}, "--methods"),
        ({"stage": "2", "methods": ("stage 1",)}, "none of these has a review"),
        ({"added": "x"}, "--added"),
    ],
)
def test_wrong_settings_are_refused_in_one_line(cfg, change, words):
    with pytest.raises(InputError, match=words):
        moe_lpr.main(replace(cfg, **change))
    assert not moe_lpr.Path(cfg.save).exists()


@pytest.mark.parametrize(
    "content, words",
    [
        (b'{"text": "one"}\n{"txt": "two"}', "line 2"),
        (b'{"text": "one"}\n{"text": 5}', "line 2"),
        (b'{"text": "one"}\nplain', "line 2"),
        (b"fine\n\xff\xfe", "line 2"),
        (b'{"text": "one"}\n{"text": "\\ud800"}', "line 2"),
        (b"", "0 documents"),
        (b"a\nb\n", "2 documents"),
    ],
)
def test_files_that_are_not_what_they_should_be_are_named_with_the_line(
    cfg, tmp_path, content, words
):
    (tmp_path / "bad.txt").write_bytes(content)
    with pytest.raises(InputError, match=words):
        moe_lpr.main(replace(cfg, old=(str(tmp_path / "bad.txt"),)))


def test_a_missing_file_a_doubled_name_and_a_checkpoint_that_is_a_mixture_already_are_refused(
    cfg, files, tmp_path
):
    with pytest.raises(FileNotFoundError, match=r"nowhere.txt: no such file"):
        moe_lpr.main(replace(cfg, old=("nowhere.txt",)))
    with pytest.raises(InputError, match="two languages have one name"):
        moe_lpr.main(replace(cfg, ood=(str(files / "en.txt"),)))
    moe_lpr.main(replace(cfg, methods=("stage 1",)))
    with pytest.raises(InputError, match="already"):
        moe_lpr.main(replace(cfg, checkpoint=str(moe_lpr.Path(cfg.save) / "stage-1")))
