"""sample.py: a checkpoint tells its story token by token, holds a conversation that may outgrow its
context, and is not ended by a bad byte."""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import sample
from minilm import InputError
from minilm.data import generator
from minilm.tokenizer import CharLevel, train_bpe
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, save_pretrained
from sample import Config

ROOT = Path(sample.__file__).parent
TEMPLATE = "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}a:"
LETTERS = "abcdefghijklmnopqrstuvwxyz ?:\n\ufffd"


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own, where out/ holds a tiny chat model of single letters
    that reads 80 of them."""
    monkeypatch.chdir(tmp_path)
    save_pretrained(tiny_model(len(LETTERS), 80), "out", CharLevel.train(LETTERS))
    Path("out/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return tmp_path


def tiny_model(vocab_size, context=1024):
    config = ModelConfig(vocab_size=vocab_size, hidden_size=16, intermediate_size=32,
                         num_hidden_layers=1, num_attention_heads=2,
                         max_position_embeddings=context)
    return Transformer(config, generator(0, "init"))


def say(monkeypatch, *lines):
    """The user types these lines, then Ctrl-D."""
    typed = iter(lines)

    def read(prompt):
        try:
            return next(typed)
        except StopIteration:
            raise EOFError from None
    monkeypatch.setattr("builtins.input", read)


def follow(monkeypatch, tokens):
    """The model says these ids, whatever it is asked -> the list of prompts that it gets."""
    prompts = []

    def stream(model, rows, max_new_tokens, *_):
        prompts.append(rows[0])
        yield from (torch.tensor([token]) for token in tokens[:max_new_tokens])
    monkeypatch.setattr(sample, "stream", stream)
    return prompts


# --- continuations

def test_a_real_checkpoint_tells_its_story_token_by_token(shared, capsys):
    folder = str(shared / "checkpoints/stories260K")
    expected = json.loads(Path(folder, "expected.json").read_text())
    count = len(expected["greedy_ids"]) - len(expected["prompt_ids"])
    prompt = expected["prompt"]
    sample.main(Config(checkpoint=folder, prompt=prompt, temperature=0, max_new_tokens=count))
    printed = capsys.readouterr()
    story = load_pretrained(folder)[1].decode(expected["greedy_ids"], skip_special=True)
    assert printed.out.split("\n---")[0] == story.rstrip("\n")
    assert "tokens/s" in printed.err


def test_samples_differ_between_each_other_and_repeat_with_the_seed(capsys):
    texts = []
    for seed in (0, 0, 5):
        hot = Config(prompt="the ", num_samples=2, max_new_tokens=20, temperature=1.5, seed=seed)
        sample.main(hot)
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    one, two = texts[0].split("-" * 40)[:2]
    assert one.strip() != two.strip()


def test_half_a_character_waits_for_its_rest_or_is_shown_as_such(monkeypatch, capsys):
    tokenizer = train_bpe(["x"], 256)  # every token is a byte
    save_pretrained(tiny_model(256), "bytes", tokenizer)
    emoji, letter = tokenizer.encode("\U0001f642"), tokenizer.encode("y")
    sign = tokenizer.encode("\ufffd")  # the model may also mean the replacement sign itself
    for ids, shown in ((emoji, "\U0001f642"), (emoji[:3], "\ufffd"), (sign, "\ufffd"),
                       (emoji[:2] + letter, "\ufffdy")):
        follow(monkeypatch, ids)
        sample.main(Config(checkpoint="bytes", prompt="x"))
        assert capsys.readouterr().out.split("\n")[0] == f"x{shown}"


# --- conversations

def test_with_chat_a_prompt_is_answered_and_that_is_all(monkeypatch, capsys):
    prompts = follow(monkeypatch, CharLevel.train(LETTERS).encode("fine"))
    monkeypatch.setattr("builtins.input", lambda _: pytest.fail("it asks the terminal"))
    sample.main(Config(chat=True, prompt="how?", system="be kind"))
    tokenizer = load_pretrained("out")[1]
    assert capsys.readouterr().out == "fine\n"
    assert [tokenizer.decode(p) for p in prompts] == ["s:be kind\nu:how?\na:"]


def test_a_conversation_remembers_what_was_said(monkeypatch):
    prompts = follow(monkeypatch, CharLevel.train(LETTERS).encode("no "))
    say(monkeypatch, " hi ", "why?", "", "never read")
    sample.main(Config(chat=True))
    tokenizer = load_pretrained("out")[1]
    assert [tokenizer.decode(p) for p in prompts] == ["u:hi\na:", "u:hi\na:no\nu:why?\na:"]


def test_a_long_conversation_forgets_its_oldest_turns_and_says_so_once(monkeypatch, capsys):
    prompts = follow(monkeypatch, CharLevel.train(LETTERS).encode("answer"))
    say(monkeypatch, *(f"question {c}" for c in "abcdefg"))
    sample.main(Config(chat=True, system="be kind", max_new_tokens=10))
    texts = [load_pretrained("out")[1].decode(p) for p in prompts]
    assert len(texts) == 7 and capsys.readouterr().out.count("forgotten") == 1
    for text, c in zip(texts, "abcdefg"):
        assert len(text) + 10 <= 80  # room for the answer
        assert re.fullmatch(rf"s:be kind\n(u:question \w\na:answer\n)*u:question {c}\na:", text)
    # 10 letters, 20 for a turn and its answer, 13 for the last, and 10 for what is to come
    assert [text.count("question") for text in texts] == [1, 2, 3, 3, 3, 3, 3]
    assert "question e" in texts[5] and "question c" not in texts[5]


def test_what_rope_scaling_lets_the_model_read_is_not_forgotten(monkeypatch, capsys):
    model = tiny_model(len(LETTERS), 80)
    model.config.rope_scaling = {"rope_type": "linear", "factor": 4.0}  # 320 tokens
    save_pretrained(model, "out", CharLevel.train(LETTERS))
    Path("out/chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    prompts = follow(monkeypatch, CharLevel.train(LETTERS).encode("answer"))
    say(monkeypatch, *(f"question {c}" for c in "abcdefg"))
    sample.main(Config(chat=True, max_new_tokens=10))
    texts = [load_pretrained("out")[1].decode(p) for p in prompts]
    assert [text.count("question") for text in texts] == [1, 2, 3, 4, 5, 6, 7]
    assert "forgotten" not in capsys.readouterr().out


def test_a_message_that_is_too_long_is_refused_and_the_conversation_goes_on(monkeypatch, capsys):
    say(monkeypatch, "x" * 100, "fine?")
    sample.main(Config(chat=True, max_new_tokens=5))
    printed = capsys.readouterr().out
    assert re.search(r"the prompt has 10\d tokens, the model reads 80", printed)
    assert printed.count("model> ") == 2


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_one_bad_byte_in_the_terminal_does_not_end_a_conversation(encoding):
    """As in a container without a locale, where Python lets such bytes through as surrogates."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    environment["PYTHONIOENCODING"] = f"{encoding}:surrogateescape"
    command = [sys.executable, ROOT / "sample.py", "--chat", "--max-new-tokens", "3"]
    done = subprocess.run(command, input=b"caf\xe9\nhi\n", capture_output=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(b"model> ") == 2


# --- what is refused

@pytest.mark.parametrize("change, words", [
    ({"temperature": -1.0}, "--temperature -1.0: give a number of at least 0"),
    ({"temperature": 1e-9}, "temperature 1e-09: give 0"),
    ({"top_p": 1.5}, "--top-p 1.5: give a number above 0 and of at most 1"),
    ({"top_k": 0}, "--top-k 0"),
    ({"max_new_tokens": 0}, "--max-new-tokens 0"), ({"dtype": "int3"}, "--dtype int3"),
    ({"prompt": "a\udcff"}, "--prompt or --system is not UTF-8"),
    ({"system": "be kind"}, "--system be kind has no effect without --chat"),
    ({"chat": True, "num_samples": 2}, "--num-samples 2 has no effect with --chat"),
    ({"temperature": 0.0, "top_k": 5}, "--top-k 5 has no effect at --temperature 0"),
    ({"temperature": 0.0, "top_p": 0.9}, "--top-p 0.9 has no effect at --temperature 0"),
    ({"temperature": 0.0, "num_samples": 3}, "--num-samples 3 has no effect at --temperature 0"),
    ({"temperature": 0.0, "seed": 1}, "--seed 1 has no effect at --temperature 0")])
def test_a_flag_out_of_its_range_or_without_effect_is_named_before_anything_is_read(change, words):
    with pytest.raises(InputError, match=words):
        sample.main(replace(Config(checkpoint="nowhere"), **change))


@pytest.mark.parametrize("change, words", [
    ({"prompt": "x\u00e9"}, "character '\u00e9' at position 1"), ({"prompt": ""}, "empty"),
    ({"prompt": "the " * 30}, "120 tokens.*80"),
    ({"chat": True, "prompt": "x" * 99}, "10. tokens.*80")])
def test_what_cannot_be_sampled_is_said_in_one_line(change, words):
    with pytest.raises(InputError, match=words):
        sample.main(replace(Config(), **change))


def test_a_folder_without_chat_template_or_tokenizer_is_named():
    Path("out/chat_template.jinja").unlink()
    with pytest.raises(InputError, match="out has no chat template: .* leave --chat out"):
        sample.main(Config(chat=True))
    Path("out/tokenizer.json").unlink()
    with pytest.raises(InputError, match="out has no tokenizer.json"):
        sample.main(Config())


@pytest.mark.parametrize("dtype", ["float32", "int8", "int4"])
def test_a_gguf_file_answers_one_question_and_ends(dtype, monkeypatch, capsys):
    """With weights of 8 and 4 bits as well."""
    from tests.test_gguf import chat_file

    file = chat_file(Path(), "smollm", "{{ messages[0]['content'] }}", eos_token_id=3)
    sample.main(Config(checkpoint=str(file), dtype=dtype, chat=True, prompt="the cat",
                       max_new_tokens=4, temperature=0))
    assert capsys.readouterr().out.endswith("\n")


def test_before_any_training_two_ways_to_a_model_are_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path.parent)
    with pytest.raises(FileNotFoundError, match="train one with `python train.py`, or .* `make"):
        sample.main(Config())
