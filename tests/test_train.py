"""train.py and sample.py, the two front doors: a model learns, goes on after an interruption bit for bit, and talks."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

import sample
import train
from minilm import InputError
from minilm.weights import load_pretrained
from train import Config

ROOT = Path(train.__file__).parent
TEXT = "".join(f"the {a} {b} the {c}.\n" for a in ("cat", "dog", "cow") for b in ("sees", "likes") for c in ("cat", "dog", "cow")) * 12
TINY = Config(data="text.txt", level="char", layers=2, width=32, heads=2, block=32, batch=4, steps=12, eval_every=4, eval_batches=2,
              lr=1e-2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own that holds text.txt."""
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def state(out="out"):
    return torch.load(Path(out) / "training.pt", weights_only=True)


def test_a_model_learns_and_leaves_a_checkpoint_a_curve_and_a_log():
    summary = train.main(replace(TINY, steps=60, eval_every=20))
    assert summary["log"]["val"][-1] < 0.6 * summary["log"]["val"][0] < 3
    assert json.loads(Path("out/log.json").read_text())["log"] == summary["log"]
    assert Path("out/loss.png").stat().st_size > 10_000
    model, tokenizer = load_pretrained("out")
    ids = torch.tensor([tokenizer.encode("the cat")])
    theirs = transformers.AutoModelForCausalLM.from_pretrained("out")
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, atol=1e-4, rtol=0)
    assert transformers.AutoTokenizer.from_pretrained("out").encode("the cat") == ids[0].tolist()


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_an_interrupted_run_goes_on_to_the_same_losses_bit_for_bit(monkeypatch, optimizer):
    cfg = replace(TINY, optimizer=optimizer)
    whole = train.main(replace(cfg, out="whole"))
    save = train.save_state

    def save_then_stop(path, saved):
        save(path, saved)
        raise KeyboardInterrupt

    monkeypatch.setattr(train, "save_state", save_then_stop)
    with pytest.raises(KeyboardInterrupt):
        train.main(cfg)
    assert state()["step"] == 4
    monkeypatch.setattr(train, "save_state", save)
    resumed = train.main(replace(cfg, resume=True))
    assert resumed["log"] == whole["log"]
    assert all(torch.equal(a, b) for a, b in zip(state()["model"].values(), state("whole")["model"].values()))


def test_resuming_with_other_flags_or_without_a_run_is_refused():
    with pytest.raises(FileNotFoundError, match=r"training.pt.*no run to resume"):
        train.main(replace(TINY, resume=True))
    train.main(replace(TINY, steps=4))
    with pytest.raises(InputError, match="other flags"):
        train.main(replace(TINY, steps=4, lr=1e-3, resume=True))


def test_a_run_is_not_resumed_on_other_data_or_from_another_kind_of_file():
    train.main(replace(TINY, steps=4))
    Path("other.txt").write_text(TEXT.upper(), encoding="utf-8")  # as long, and as many characters
    with pytest.raises(InputError, match="other data"):
        train.main(replace(TINY, steps=4, data="other.txt", resume=True))
    Path("moved.txt").write_text(TEXT, encoding="utf-8")  # the same text under another name
    train.main(replace(TINY, steps=4, data="moved.txt", resume=True))
    torch.save({"weights": torch.zeros(1)}, "out/training.pt")
    with pytest.raises(InputError, match="training.pt was made with other flags"):
        train.main(replace(TINY, steps=4, resume=True))


def test_the_token_cache_belongs_to_a_tokenizer_and_not_to_a_path():
    cfg = replace(TINY, checkpoint="out")  # two checkpoints, one after the other, in one folder
    for corpus in (["the cat the cat"], ["sees the cow"]):
        tokenizer = train.train_bpe(corpus, 262)
        tokens = train.make_data(cfg, tokenizer)[1]
        assert TEXT.startswith(tokenizer.decode(tokens[:40].tolist()))


def test_a_block_longer_than_the_checkpoints_context_is_refused():
    train.main(replace(TINY, steps=4))  # its model reads 1,024 tokens
    with pytest.raises(InputError, match="--block 2000: out reads 1024 tokens"):
        train.main(replace(TINY, checkpoint="out", block=2000))


def test_gradient_accumulation_gives_the_losses_of_the_whole_batch():
    whole = train.main(replace(TINY, steps=4, out="whole"))
    parts = train.main(replace(TINY, steps=4, micro_batch=4 // 2, out="parts"))
    assert parts["log"]["val"] == pytest.approx(whole["log"]["val"], abs=2e-3)


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"activation_checkpointing": True}, {"schedule": "cosine", "kv_heads": 1},
                                    {"num_experts": 4, "experts_per_token": 2}])
def test_every_option_trains(change):
    summary = train.main(replace(TINY, steps=8, **change))
    assert summary["log"]["val"][-1] < summary["log"]["val"][0]
    sample.main(sample.Config(prompt="the ", max_new_tokens=3))


def test_a_folder_of_files_with_a_byte_pair_tokenizer_and_a_second_run_from_the_cache(monkeypatch):
    Path("corpus").mkdir()
    for i in range(4):
        Path(f"corpus/{i}.txt").write_text(TEXT[i:], encoding="utf-8")
    cfg = replace(TINY, data="corpus", level="bpe", vocab_size=300, steps=4)
    first = train.main(cfg)
    monkeypatch.setattr(train, "train_bpe", lambda *_, **__: pytest.fail("the tokenizer was trained again"))
    assert train.main(cfg)["log"] == first["log"]
    continued = train.main(replace(cfg, checkpoint="out", out="more"))
    assert continued["log"]["val"][0] < first["log"]["val"][-1]


def test_the_default_corpus_is_python_s_own_library_split_by_file():
    training, validation = train.standard_library()
    length = lambda documents: sum(map(len, documents))
    assert 2e6 < length(training) + length(validation) < 2e7
    assert 0.01 < length(validation) / length(training) < 0.15
    assert (training, validation) == train.standard_library()
    assert all(text.startswith("# ") for text in training)
    assert not set(training) & set(validation)


def test_a_user_s_text_is_split_by_position_and_the_end_marker_in_it_stays_text():
    Path("corpus").mkdir()
    for name, text in (("a", "x" * 60), ("b", f"y{train.END}y" * 3 + "z")):  # 60 + 46 characters: the cut is at 95
        Path(f"corpus/{name}.txt").write_text(text)
    training, validation = train.load_documents(Config(data="corpus"))
    assert [len(d) for d in training] == [60, 35]
    assert "".join(training + validation) == "x" * 60 + f"y{train.END}y" * 3 + "z"
    tokenizer = train.train_bpe(training, 300, special=(train.END,), eos=train.END)
    assert train.encode(tokenizer, training).count(tokenizer.eos_id) == 2  # one per document


def test_validation_loss_in_bits_per_byte_by_hand():
    # 2 nats per token, 4 bytes per token: 2 / ln 2 = 2.885 bits per token, 0.721 bits per byte
    figure = train.loss_figure({"step": [1, 2], "train": [3.0, 2.0], "val": [3.0, 2.0]}, bytes_per_token=4.0)
    right = figure.axes[0].child_axes[0]
    assert right._functions[0](2.0) == pytest.approx(0.7213, abs=1e-4)


@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b" \n", "empty.txt is empty"), ("latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8.*byte 3 is 0xe9"),
    ("short.txt", b"hello world", r"train text has \d tokens, one block needs 33"), ("missing.txt", None, "missing.txt: no such file")])
def test_a_text_that_cannot_be_used_is_named_and_nothing_is_written(name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises((InputError, FileNotFoundError), match=words):
        train.main(replace(TINY, data=name))
    assert not Path("out").exists()


def test_a_folder_without_text_and_wrong_settings_are_named():
    Path("nothing").mkdir()
    for change, words in (({"data": "nothing"}, "nothing holds no text"), ({"level": "word"}, "--level word"),
                          ({"micro_batch": 3}, "multiple of --micro-batch 3"),
                          ({"dtype": "int8"}, "int8"), ({"schedule": "step"}, "'step'"),
                          ({"optimizer": "sgd"}, "'sgd'"), ({"checkpoint": "nothing"}, "config.json is missing"),
                          ({"heads": 3}, "hidden_size 32 is not divisible")):
        with pytest.raises((InputError, FileNotFoundError), match=words):
            train.main(replace(TINY, **change))
        assert not Path("out").exists()


@pytest.mark.parametrize("flag, value", [
    *dict.fromkeys(("batch", "eval_every", "eval_batches", "heads", "width", "layers", "block", "micro_batch", "clip"), 0).items(),
    ("micro_batch", -1), ("lr", float("nan")), ("lr", 0.0), ("steps", -5), ("warmup", -3), ("device", "foo")])
def test_a_number_that_no_run_can_be_made_of_is_refused_by_its_flag(flag, value):
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} {value}: "):
        train.main(replace(TINY, **{flag: value}))
    assert not Path("out").exists()


def test_a_run_that_diverges_says_so_and_leaves_the_last_state_as_it_was():
    train.main(replace(TINY, steps=4))
    before = Path("out/training.pt").read_bytes(), Path("out/model.safetensors").read_bytes()
    with pytest.raises(InputError, match="the loss is nan at step 4: use a smaller --lr"):
        train.main(replace(TINY, steps=4, lr=1e30))
    assert (Path("out/training.pt").read_bytes(), Path("out/model.safetensors").read_bytes()) == before


def test_a_file_in_the_place_of_the_output_folder_is_refused_before_training(capsys):
    Path("out").write_text("mine")
    with pytest.raises(FileExistsError):
        train.main(TINY)
    assert "step" not in capsys.readouterr().out and Path("out").read_text() == "mine"


def test_the_command_line_refuses_in_one_message_with_status_2():
    for arguments, words in ((["train.py", "--stepps", "3"], "stepps"), (["train.py", "--data", "nowhere"], "error: nowhere: no such file"),
                             (["sample.py", "--checkpoint", "nowhere"], "error: nowhere: no such folder")):
        done = subprocess.run([sys.executable, ROOT / arguments[0], *arguments[1:]], capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


# --- sample.py

def test_a_real_checkpoint_tells_its_story_token_by_token(shared, capsys):
    folder = str(shared / "checkpoints/stories260K")
    expected = json.loads(Path(folder, "expected.json").read_text())
    count = len(expected["greedy_ids"]) - len(expected["prompt_ids"])
    sample.main(sample.Config(checkpoint=folder, prompt=expected["prompt"], temperature=0, max_new_tokens=count))
    printed = capsys.readouterr()
    tokenizer = load_pretrained(folder)[1]
    assert printed.out.split("\n---")[0] == tokenizer.decode(expected["greedy_ids"], skip_special=True).rstrip("\n")
    assert "tokens/s" in printed.err


def test_samples_differ_between_each_other_and_repeat_with_the_seed(capsys):
    train.main(replace(TINY, steps=4))
    texts = []
    for seed in (0, 0, 5):
        capsys.readouterr()
        sample.main(sample.Config(prompt="the ", num_samples=2, max_new_tokens=20, temperature=1.5, seed=seed))
        texts.append(capsys.readouterr().out)
    assert texts[0] == texts[1] != texts[2]
    one, two = texts[0].split("-" * 40)[:2]
    assert one.strip() != two.strip()


@pytest.mark.parametrize("change, words", [
    ({"temperature": -1.0}, "temperature -1.0"), ({"top_p": 1.5}, "top_p 1.5"), ({"top_k": 0}, "top_k 0"),
    ({"prompt": "a\udcff"}, "--prompt or --system is not UTF-8"), ({"dtype": "int4"}, "int4"),
    ({"prompt": "x" * 3}, "character 'x' at position 0"), ({"prompt": ""}, "empty"), ({"prompt": "the " * 300}, "1,?200 tokens.*1,?024"),
    ({"chat": True}, "no chat template"), ({"max_new_tokens": 0}, "--max-new-tokens 0")])
def test_what_cannot_be_sampled_is_said_in_one_line(change, words):
    train.main(replace(TINY, steps=4))
    with pytest.raises(InputError, match=words):
        sample.main(replace(sample.Config(), **change))


def test_a_message_in_another_encoding_is_said_in_one_line(monkeypatch):
    train.main(replace(TINY, steps=4))
    Path("out/chat_template.jinja").write_text("{{ messages[0]['content'] }}")

    def latin_1(_):
        raise UnicodeDecodeError("utf-8", b"\xe9", 0, 1, "invalid continuation byte")

    monkeypatch.setattr("builtins.input", latin_1)
    with pytest.raises(InputError, match="the message is not UTF-8 text"):
        sample.main(sample.Config(chat=True))


# --- several processes

DRIVER = """
import dataclasses, json, sys, train
cfg = train.Config(**json.loads(sys.argv[1]))
def run(**change):
    return train.main(dataclasses.replace(cfg, **change))["log"]["val"]
logs = {"ddp": run(out="ddp"), "fsdp": run(out="fsdp", fsdp=True)}
save = train.save_training
def save_then_stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt
for name in ("ddp", "fsdp"):
    train.save_training = save_then_stop
    try:
        run(out=name + "2", fsdp=name == "fsdp")
    except KeyboardInterrupt:
        train.save_training = save
    logs[name + " resumed"] = run(out=name + "2", fsdp=name == "fsdp", resume=True)
rank = train.start_world(train.pick_device("cpu")).rank
open(f"logs{rank}.json", "w").write(json.dumps(logs))
train.leave_world()
"""


def test_two_processes_train_one_model_whole_or_sharded_and_go_on_bit_for_bit():
    Path("driver.py").write_text(DRIVER)
    cfg = {"data": "text.txt", "level": "char", "layers": 2, "width": 32, "heads": 2, "block": 32, "batch": 4, "steps": 6, "eval_every": 3,
           "eval_batches": 2, "optimizer": "adamw", "device": "cpu"}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "driver.py", json.dumps(cfg)],
                          capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads(Path("logs0.json").read_text())
    assert logs["ddp resumed"] == logs["ddp"]
    assert logs["fsdp resumed"] == logs["fsdp"]
    assert logs["fsdp"] == pytest.approx(logs["ddp"], abs=1e-4)
    for name in ("ddp", "fsdp"):
        sample.main(sample.Config(checkpoint=name, prompt="the ", max_new_tokens=3))
    assert [p.name for p in Path("fsdp").glob("shards-*")] == ["shards-6"]


def test_sharding_one_process_or_muon_is_refused():
    with pytest.raises(InputError, match="torchrun"):
        train.main(replace(TINY, fsdp=True))
