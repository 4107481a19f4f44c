"""train.py: what the loop hands to the loss and to the optimizers, what it reports, what it keeps
and what it refuses."""

import contextlib
import json
import math
import os
import re
import subprocess
import sys
import typing
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers

import sample
import train
from minilm import InputError
from minilm.data import random_blocks, temporary_name
from minilm.moe import load_balancing_loss
from minilm.training import Processes
from minilm.weights import load_pretrained
from train import Config

ROOT = Path(train.__file__).parent
ANIMALS = ("cat", "dog", "cow")
VERBS = ("sees", "likes")
TEXT = "".join(f"the {a} {b} the {c}.\n" for a in ANIMALS for b in VERBS for c in ANIMALS) * 12
TINY = Config(data="text.txt", level="char", layers=2, width=32, heads=2, block=32, batch=4,
              steps=12, eval_every=4, eval_batches=2, lr=1e-2)


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """Every test works in a folder of its own that holds text.txt, and is shown a short sample."""
    monkeypatch.chdir(tmp_path)
    generate = train.generate

    def briefly(*model, max_new_tokens, **settings):
        return generate(*model, max_new_tokens=2, **settings)
    monkeypatch.setattr(train, "generate", briefly)
    Path("text.txt").write_text(TEXT, encoding="utf-8")
    return tmp_path


def state(out="out"):
    return torch.load(Path(out) / "training.pt", weights_only=True)


# --- what passes through the loop

class Record:
    """A run under observation. Of every call of the loss: the batch, whether it trains, in which
    precision. Of every optimizer step: the weights and gradients that it finds, and each parameter
    group's rate and decay."""

    def __init__(self, monkeypatch, cfg: Config):
        self.calls, self.steps, self.block_calls = [], [], 0
        record = self

        class Loss(train.Loss):
            def __init__(self, model):
                super().__init__(model)
                model.layers[0].register_forward_pre_hook(record.count)

            def forward(self, ids, labels):
                mixed = torch.is_autocast_enabled("cpu")
                dtype = torch.get_autocast_dtype("cpu") if mixed else torch.float32
                record.calls.append({"training": self.training, "ids": ids, "labels": labels,
                                     "dtype": dtype})
                return super().forward(ids, labels)

        def make_optimizers(model, *arguments):
            optimizers = train_optimizers(model, *arguments)
            optimizers[0].register_step_pre_hook(lambda *_: self.note(model, optimizers))
            return optimizers

        train_optimizers = train.make_optimizers
        with monkeypatch.context() as patch:
            patch.setattr(train, "Loss", Loss)
            patch.setattr(train, "make_optimizers", make_optimizers)
            self.summary = train.main(cfg)
        self.vocab = sorted(set(Path(cfg.data).read_text(encoding="utf-8")))

    def count(self, *_):
        self.block_calls += torch.is_grad_enabled()  # in training only

    def note(self, model, optimizers):  # right before the first of the optimizers takes its step
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        self.steps.append({
            "model": model,
            "weights": {name: w.detach().clone() for name, w in model.state_dict().items()},
            "gradients": {name: p.grad.clone() for name, p in model.named_parameters()},
            "optimizers": [type(optimizer).__name__ for optimizer in optimizers],
            "rates": {group["lr"] for group in groups},
            "decays": {group["weight_decay"] for group in groups}})

    def batches(self, training: bool) -> list[dict]:
        return [call for call in self.calls if call["training"] is training]

    def text(self, row) -> str:
        return "".join(self.vocab[i] for i in row)


def plain_loss(model, ids, labels):
    """-log p of each next token, averaged; for a mixture with its balancing loss: the long way,
    over all logits."""
    out = model(ids, output_router_logits=bool(model.config.num_experts))
    loss = F.cross_entropy(out.logits.flatten(0, 1), labels.flatten())
    if model.config.num_experts:
        balance = load_balancing_loss(out.router_logits, model.config.num_experts_per_tok)
        assert 0.001 < model.config.router_aux_loss_coef * balance
        loss = loss + model.config.router_aux_loss_coef * balance
    return loss


@pytest.mark.parametrize("change", [{}, {"micro_batch": 1}, {"num_experts": 4},
                                    {"optimizer": "adamw", "kv_heads": 1}])
@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_each_step_gets_the_clipped_gradient_of_its_batch_s_mean_loss(monkeypatch, change, clip):
    cfg = replace(TINY, steps=3, eval_every=3, clip=clip, **change)
    record = Record(monkeypatch, cfg)
    calls = record.batches(training=True)
    parts = cfg.batch // (cfg.micro_batch or cfg.batch)
    assert len(record.steps) == 3 and len(calls) == 3 * parts
    losses = []
    for at, step in enumerate(record.steps):
        batch = calls[at * parts : (at + 1) * parts]
        assert sum(len(call["ids"]) for call in batch) == cfg.batch
        model = step["model"]
        model.load_state_dict(step["weights"])
        loss = sum(plain_loss(model, call["ids"], call["labels"]) for call in batch) / parts
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        gradients = dict(zip(step["gradients"], gradients, strict=True))
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        losses.append(loss.item())
        for name, gradient in gradients.items():
            expected = gradient * min(1.0, clip / norm.item())
            atol = 2e-5 * min(1.0, clip)
            torch.testing.assert_close(step["gradients"][name], expected, atol=atol, rtol=2e-3)
    assert record.summary["log"]["train"] == pytest.approx([sum(losses) / 3], abs=1e-5)


def test_training_reads_windows_of_the_first_nine_tenths_and_validation_of_the_last(monkeypatch):
    text = "".join(f"{n} in words, " for n in range(800))  # in which no window occurs twice
    Path("text.txt").write_text(text)
    record = Record(monkeypatch, TINY)
    cut = int(0.9 * len(text))
    for training, part in ((True, text[:cut]), (False, text[cut:])):
        for call in record.batches(training):
            assert call["ids"].shape == call["labels"].shape == (TINY.batch, TINY.block)
            for row, following in zip(call["ids"], call["labels"]):
                window = record.text(row) + record.text(following)[-1]
                assert window in part and record.text(following) == window[1:]
    evaluations = torch.stack([call["ids"] for call in record.batches(training=False)])
    first, second, _ = evaluations.split(TINY.eval_batches)
    assert torch.equal(first, second)  # the same batches every time
    drawn = {record.text(call["ids"][0]) for call in record.batches(training=True)}
    assert len(drawn) == TINY.steps  # others at every step


@pytest.mark.parametrize("num_experts", [0, 4])  # of a mixture, too, without the balancing loss
def test_the_validation_loss_is_the_saved_model_s_mean_over_its_batches(monkeypatch, num_experts):
    record = Record(monkeypatch, replace(TINY, eval_batches=3, num_experts=num_experts))
    model = load_pretrained("out")[0]
    losses = []
    for call in record.batches(training=False)[-3:]:
        logits = model(call["ids"]).logits
        losses.append(F.cross_entropy(logits.flatten(0, 1), call["labels"].flatten()).item())
    assert record.summary["log"]["val"][-1] == pytest.approx(sum(losses) / 3, abs=1e-5)


@pytest.mark.parametrize("schedule, factors", [
    ("constant", [1, 1, 1, 1]), ("linear", [1, 0.7, 0.4, 0.1]), ("cosine", [1, 0.775, 0.325, 0.1]),
    ("wsd", [1, 1, 1, 0.1])])
def test_every_group_takes_the_rate_of_the_schedule_by_hand(monkeypatch, schedule, factors):
    # five steps, one of warm-up at half the rate; the other four at 0, 1/3, 2/3 and 1 of the way:
    # by the cosine 0.1 + 0.45 (1 + cos(pi / 3)) = 0.775 at a third of it
    record = Record(monkeypatch, replace(TINY, steps=5, warmup=1, schedule=schedule, lr=0.02))
    for step, factor in zip(record.steps, [0.5, *factors], strict=True):
        assert sorted(step["rates"]) == pytest.approx([0.02 * factor])


def test_the_optimizer_is_the_flag_s_and_matrices_decay_by_theirs_and_norms_do_not(monkeypatch):
    for optimizer, made in (("muon", ["AdamW", "Muon"]), ("adamw", ["AdamW"])):
        cfg = replace(TINY, steps=1, weight_decay=0.3, optimizer=optimizer, out=optimizer)
        record = Record(monkeypatch, cfg)
        assert record.steps[0]["optimizers"] == made
        assert record.steps[0]["decays"] == {0.3, 0.0}


def test_the_seed_decides_the_weights_and_what_is_read_in_training_and_in_validation(monkeypatch):
    def first(seed, out):
        record = Record(monkeypatch, replace(TINY, steps=1, seed=seed, out=out))
        read = [record.batches(training)[0]["ids"] for training in (True, False)]
        return record.steps[0]["weights"]["embed.weight"], *read

    one, again, other = first(1, "a"), first(1, "b"), first(2, "c")
    assert all(torch.equal(x, y) for x, y in zip(one, again))
    assert not any(torch.equal(x, y) for x, y in zip(one, other))


def test_every_process_reads_batches_of_its_own(monkeypatch):
    def first_batch(rank):
        monkeypatch.setattr(train, "start_world", lambda device: Processes(rank, 2))
        monkeypatch.setattr(train, "distribute", lambda module, *_: module)
        monkeypatch.setattr(train, "chief_first", lambda world: contextlib.nullcontext())
        run = train.prepare(TINY)
        assert run.micro_batch * 2 == TINY.batch and run.accumulate == 1
        return random_blocks(run.data.train, TINY.block, run.micro_batch, run.order)[0]

    assert not torch.equal(first_batch(0), first_batch(1))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_training_and_validation_multiply_in_the_precision_of_the_flag(monkeypatch, dtype):
    record = Record(monkeypatch, replace(TINY, steps=2, eval_every=2, dtype=dtype))
    assert {call["dtype"] for call in record.calls} == {getattr(torch, dtype)}
    weights = record.steps[-1]["weights"].values()
    assert {w.dtype for w in weights} == {torch.float32}  # small updates are not rounded away


def test_activation_checkpointing_runs_each_block_twice_and_gives_the_same_losses(monkeypatch):
    cfg = replace(TINY, steps=4)
    plain = Record(monkeypatch, cfg)
    twice = Record(monkeypatch, replace(cfg, activation_checkpointing=True, out="twice"))
    assert (plain.block_calls, twice.block_calls) == (4, 2 * 4)
    assert twice.summary["log"]["val"] == pytest.approx(plain.summary["log"]["val"], abs=1e-5)


def test_with_compile_the_training_steps_go_through_torch_compile(monkeypatch):
    compiled = []

    def fake(module):
        def call(*batch):
            compiled.append(batch)
            return module(*batch)
        return call

    monkeypatch.setattr(torch, "compile", fake)
    train.main(replace(TINY, steps=4, compile=True))
    assert len(compiled) == 4


def test_the_run_is_evaluated_and_saved_every_so_many_steps_and_at_the_end(monkeypatch):
    record = Record(monkeypatch, replace(TINY, steps=5, eval_every=2, eval_batches=3))
    assert record.summary["log"]["step"] == [2, 4, 5] and state()["step"] == 5
    assert len(record.batches(training=False)) == 3 * 3


def test_the_flags_of_the_model_reach_its_config():
    train.main(replace(TINY, layers=3, width=48, heads=4, kv_heads=2, num_experts=3,
                       experts_per_token=1, steps=0))
    saved = json.loads(Path("out/config.json").read_text())
    expected = {
        "num_hidden_layers": 3, "hidden_size": 48, "moe_intermediate_size": 128,  # 8/3 of 48
        "num_attention_heads": 4, "num_key_value_heads": 2,
        "num_experts": 3, "num_experts_per_tok": 1,
        "tie_word_embeddings": False, "vocab_size": len(set(TEXT)), "max_position_embeddings": 1024}
    assert {name: saved[name] for name in expected} == expected
    Path("text.txt").write_text("".join(f"{n} " for n in range(5000)))
    train.main(replace(TINY, level="bpe", vocab_size=270, block=1100, batch=1, steps=0, out="long"))
    saved = json.loads(Path("long/config.json").read_text())
    assert saved["vocab_size"] == 270 and saved["tie_word_embeddings"]
    assert saved["max_position_embeddings"] == 1100


# --- what is reported

def test_bits_per_byte_by_hand(capsys):
    # 2 nats are 2 / ln 2 = 2.885 bits, for a token of 4 bytes
    assert train.bits_per_byte(2.0, 4.0) == pytest.approx(0.7213, abs=1e-4)
    Path("text.txt").write_text("äöü" * 300, encoding="utf-8")  # every character is two bytes
    summary = train.main(replace(TINY, steps=4))
    nats = summary["log"]["val"][-1]
    assert summary["bytes_per_token"] == 2.0
    assert summary["val_bits_per_byte"] == pytest.approx(nats / 2 / math.log(2))
    printed = capsys.readouterr().out
    line = re.search("step +4: train (.+), val (.+) nats/token = (.+) bits/byte", printed)
    shown = [float(number) for number in line.groups()]
    expected = [summary["log"]["train"][-1], nats, nats / 2 / math.log(2)]
    assert shown == pytest.approx(expected, abs=1e-4)


def test_the_curve_s_second_axis_is_in_bits_per_byte():
    log = {"step": [1, 2], "train": [3.0, 2.0], "val": [3.0, 2.0]}
    figure = train.loss_figure(log, bytes_per_token=4.0)
    to_bits, to_nats = figure.axes[0].child_axes[0]._functions
    assert to_bits(2.0) == pytest.approx(0.7213, abs=1e-4)
    assert to_nats(to_bits(2.0)) == pytest.approx(2.0)


def test_the_speed_by_hand(monkeypatch):
    # 10 steps of 4 sequences of 32 tokens in 4 seconds: 320 tokens a second
    class Bar:
        set_postfix_str = staticmethod(lambda text: shown.append(text))

    shown, run = [], train.prepare(TINY)
    run.bar, run.started = Bar, 100.0
    monkeypatch.setattr(train.time, "time", lambda: 104.0)
    for step in range(10):
        train.show_speed(run, step, torch.tensor(1.5))
    assert shown == ["loss 1.500, 320 tokens/s"]


def test_the_sample_at_the_end_goes_on_from_how_the_held_out_text_begins(capsys):
    train.main(replace(TINY, steps=4))
    held_out = TEXT[int(0.9 * len(TEXT)) :]
    assert f"--- a sample ---\n{held_out[:8]}" in capsys.readouterr().out


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


@pytest.mark.parametrize("change", [
    {"dtype": "bfloat16"}, {"schedule": "cosine", "kv_heads": 1}, {"num_experts": 4}])
def test_every_option_trains(change):
    summary = train.main(replace(TINY, steps=8, **change))
    assert summary["log"]["val"][-1] < summary["log"]["val"][0]
    sample.main(sample.Config(prompt="the ", max_new_tokens=3))


# --- what is kept

def stop_after(monkeypatch, part: str, error: BaseException, calls: int = 1):
    """The next run ends with `error` right after call number `calls` of train.PART."""
    real, made = getattr(train, part), []

    def call(*arguments):
        result = real(*arguments)
        made.append(part)
        if len(made) == calls:
            monkeypatch.setattr(train, part, real)
            raise error
        return result
    monkeypatch.setattr(train, part, call)


def test_the_seconds_of_a_run_are_those_of_all_its_parts(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr(train.time, "time", lambda: now[0])
    real = train.set_lr

    def slowly(*arguments):  # every step takes a second
        now[0] += 1
        real(*arguments)

    monkeypatch.setattr(train, "set_lr", slowly)
    stop_after(monkeypatch, "show_speed", KeyboardInterrupt(), calls=6)
    with pytest.raises(KeyboardInterrupt):
        train.main(TINY)
    now[0] += 10**6  # the night
    assert train.main(replace(TINY, resume=True))["seconds"] == 12.0


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("part", ["save_state", "save"])  # before the checkpoint is written; after
def test_an_interrupted_run_goes_on_to_the_same_losses_bit_for_bit(monkeypatch, optimizer, part):
    cfg = replace(TINY, optimizer=optimizer)
    whole = train.main(replace(cfg, out="whole"))
    stop_after(monkeypatch, part, KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train.main(cfg)
    assert state()["step"] == 4
    resumed = train.main(replace(cfg, resume=True))
    assert resumed["log"] == whole["log"]
    for name, weights in state("whole")["model"].items():
        assert torch.equal(state()["model"][name], weights)


def test_after_ctrl_c_one_is_told_what_is_saved_and_can_sample_from_it(monkeypatch, capsys):
    stop_after(monkeypatch, "show_speed", KeyboardInterrupt(), calls=3)
    with pytest.raises(KeyboardInterrupt, match="Nothing is saved yet: .* at step 4"):
        train.main(TINY)
    stop_after(monkeypatch, "show_speed", KeyboardInterrupt(), calls=7)
    words = "out/ holds step 4 of 12: go on with .*--resume, or .*sample.py --checkpoint out"
    with pytest.raises(KeyboardInterrupt, match=words):
        train.main(TINY)
    model = load_pretrained("out")[0]
    assert all(torch.equal(w, state()["model"][name]) for name, w in model.state_dict().items())
    sample.main(sample.Config(prompt="the ", max_new_tokens=3))
    with pytest.raises(InputError, match="holds this run up to step 4 of 12: go on with --resume"):
        train.main(TINY)  # what was learned is not thrown away unasked


def test_on_a_full_disk_one_is_told_what_is_kept_and_can_go_on_once_there_is_room(monkeypatch):
    whole = train.main(replace(TINY, out="whole"))
    full = OSError(28, "No space left on device", "out/training.pt")
    stop_after(monkeypatch, "report", full, calls=2)
    with pytest.raises(InputError, match="No space left on device: .* step 4 of 12: .*--resume"):
        train.main(TINY)
    assert train.main(replace(TINY, resume=True))["log"] == whole["log"]


def test_a_refusal_to_resume_names_the_flags_that_differ_and_what_can_be_done():
    with pytest.raises(FileNotFoundError, match=r"training.pt.*no run to resume"):
        train.main(replace(TINY, resume=True))
    train.main(replace(TINY, steps=4))
    Path("other.txt").write_text(TEXT.upper())  # as long, and as many characters
    for change, words in (
            ({"lr": 1e-3, "kv_heads": 1}, r"--kv-heads None \(now 1\), --lr 0.01 \(now 0.001\):"),
            ({"steps": 8}, r"--steps 4 \(now 8\).*neither lengthened.*--checkpoint out --out NEW"),
            ({"data": "other.txt"}, "made with other data")):
        with pytest.raises(InputError, match=words):
            train.main(replace(TINY, **{"steps": 4, "resume": True, **change}))
    Path("moved.txt").write_text(TEXT, encoding="utf-8")  # the same text under another name
    train.main(replace(TINY, steps=4, data="moved.txt", resume=True))
    incomplete = state()
    del incomplete["seconds"]
    torch.save(incomplete, "out/training.pt")
    with pytest.raises(InputError, match="out/training.pt holds a value of a kind .*seconds"):
        train.main(replace(TINY, steps=4, resume=True))
    torch.save({"weights": torch.zeros(1)}, "out/training.pt")
    for resume in (True, False):
        with pytest.raises(InputError, match="training.pt is not a training state of train.py"):
            train.main(replace(TINY, steps=4, resume=resume))


def test_nothing_that_was_saved_is_overwritten_but_by_the_very_same_run():
    first = train.main(replace(TINY, steps=8))
    before = {path.name: path.read_bytes() for path in Path("out").iterdir()}
    for cfg, words in ((replace(TINY, steps=2), r"--steps 8 \(now 2\)"),
                       (replace(TINY, steps=8, seed=5), r"--seed 1337 \(now 5\)")):
        with pytest.raises(InputError, match=f"another run, made with {words}: give another --out"):
            train.main(cfg)
    with pytest.raises(InputError, match="out/ holds another run"):  # the folder it starts from
        train.main(Config(data="text.txt", checkpoint="out", block=32, batch=4, steps=4))
    assert {path.name: path.read_bytes() for path in Path("out").iterdir()} == before
    assert train.main(replace(TINY, steps=8))["log"] == first["log"]
    Path("out/training.pt").unlink()  # a checkpoint from anywhere
    with pytest.raises(InputError, match="out/ holds a checkpoint, which is not overwritten"):
        train.main(replace(TINY, steps=8))


def test_a_run_that_diverges_says_so_and_leaves_the_last_state_as_it_was(monkeypatch):
    cfg = replace(TINY, steps=8)
    stop_after(monkeypatch, "save", KeyboardInterrupt())
    with pytest.raises(KeyboardInterrupt):
        train.main(cfg)
    files = [Path("out/training.pt"), Path("out/model.safetensors")]
    before = [file.read_bytes() for file in files]
    with monkeypatch.context() as patch:
        patch.setattr(train, "evaluate", lambda *_: math.nan)
        with pytest.raises(InputError, match="the loss is nan at step 8: use a smaller --lr"):
            train.main(replace(cfg, resume=True))
    assert [file.read_bytes() for file in files] == before
    with pytest.raises(InputError, match="the loss is nan at step 4"):
        train.main(replace(cfg, lr=1e30, out="diverged"))


# --- the cache

def cached(cfg=TINY):
    [entry] = Path(".cache").iterdir()
    return entry


BPE = replace(TINY, level="bpe", vocab_size=300)


def test_a_second_run_on_the_same_text_reads_the_cache(monkeypatch):
    first = train.make_data(BPE)
    monkeypatch.delattr(train, "make_tokenizer")  # it is not trained again
    second = train.make_data(BPE)
    assert isinstance(second.train, np.memmap) and second.train.tolist() == first.train.tolist()
    assert second.tokenizer.eos_id == first.tokenizer.eos_id is not None


def test_two_runs_that_start_at_once_both_make_the_entry_and_use_the_first(monkeypatch):
    make, results = train.make_tokenizer, []

    def slow(*arguments):  # while it works, another run comes, makes the whole entry and leaves
        monkeypatch.setattr(train, "make_tokenizer", make)
        results.append(train.make_data(BPE))
        [entry] = (path for path in Path(".cache").iterdir() if path.suffix != ".tmp")
        results.append(entry.stat().st_ino)
        return make(*arguments)

    monkeypatch.setattr(train, "make_tokenizer", slow)
    mine = train.make_data(BPE)
    assert mine.train.tolist() == results[0].train.tolist()
    assert cached().stat().st_ino == results[1]  # the first one's folder, with none beside it


@pytest.mark.parametrize("file", ["tokenizer_config.json", "train.npy", "val.npy"])
def test_a_run_stopped_between_two_files_of_the_cache_leaves_nothing_half_made(monkeypatch, file):
    import minilm.data
    whole = train.make_data(BPE)
    cached().rename("good")
    real = os.replace

    def stop(source, target):
        if Path(target).name == file:
            raise KeyboardInterrupt
        real(source, target)

    monkeypatch.setattr(minilm.data.os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        train.make_data(BPE)
    assert list(Path(".cache").iterdir()) == []
    monkeypatch.setattr(minilm.data.os, "replace", real)
    again = train.make_data(BPE)
    assert again.train.tolist() == whole.train.tolist()
    assert again.tokenizer.eos_id == whole.tokenizer.eos_id


def test_what_a_killed_run_left_of_an_entry_is_removed_when_the_entry_is_made():
    train.make_data(TINY)
    entry = cached()
    entry.rename("good")
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    left = temporary_name(entry)
    left = left.with_name(left.name.replace(f"{os.getpid()}@", f"{gone.pid}@"))
    left.mkdir()
    (left / "tokenizer.json").touch()
    busy = temporary_name(entry)  # of a process that still runs
    busy.mkdir()
    train.make_data(TINY)
    assert sorted(Path(".cache").iterdir()) == sorted([entry, busy])


@pytest.mark.parametrize("file", [
    "tokenizer.json", "tokenizer_config.json", "train.npy", "val.npy"])
@pytest.mark.parametrize("damage", ["missing", "empty", "cut"])
def test_a_damaged_entry_of_the_cache_is_made_again(file, damage):
    whole = train.make_data(BPE)
    tokens = whole.train.tolist()
    path = cached() / file
    content = path.read_bytes()
    path.unlink()  # (what is mapped may not be cut)
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2 if damage == "cut" else 0])
    again = train.make_data(BPE)
    assert path.read_bytes() == content and cached()
    assert again.train.tolist() == tokens and again.tokenizer.eos_id == whole.tokenizer.eos_id


def test_the_token_cache_belongs_to_a_tokenizer_and_not_to_a_path():
    for corpus in (["the cat the cat"], ["sees the cow"]):  # two checkpoints in one folder, in turn
        tokenizer = train.train_bpe(corpus, 262)
        tokens = train.make_data(replace(TINY, checkpoint="out"), tokenizer).train
        assert TEXT.startswith(tokenizer.decode(tokens[:40].tolist()))


def test_a_folder_of_files_with_a_byte_pair_tokenizer_and_a_run_that_starts_from_its_checkpoint():
    Path("corpus").mkdir()
    for i in range(4):
        Path(f"corpus/{i}.txt").write_text(TEXT[i:], encoding="utf-8")
    cfg = replace(TINY, data="corpus", level="bpe", vocab_size=300, steps=4)
    first = train.main(cfg)
    more = Config(data="corpus", checkpoint="out", block=32, batch=4, steps=4, eval_every=4,
                  eval_batches=2, out="more")
    assert train.main(more)["log"]["val"][0] < first["log"]["val"][-1]


# --- the text

def test_the_default_corpus_is_python_s_own_library_split_by_file():
    training, validation = train.standard_library()
    length = sum(map(len, training)), sum(map(len, validation))
    assert 2e6 < sum(length) < 2e7
    assert 0.01 < length[1] / length[0] < 0.15
    assert (training, validation) == train.standard_library()
    assert all(text.startswith("# ") for text in training)
    assert not set(training) & set(validation)


def test_a_user_s_text_is_split_by_position_and_the_end_marker_in_it_stays_text():
    Path("corpus").mkdir()
    # 60 + 46 characters: the cut is at 95
    for name, text in (("a", "x" * 60), ("b", f"y{train.END}y" * 3 + "z")):
        Path(f"corpus/{name}.txt").write_text(text)
    training, validation = train.load_documents(Config(data="corpus"))
    assert [len(d) for d in training] == [60, 35]
    assert "".join(training + validation) == "x" * 60 + f"y{train.END}y" * 3 + "z"
    tokenizer = train.train_bpe(training, 300, special=(train.END,), eos=train.END)
    assert train.encode(tokenizer, training).count(tokenizer.eos_id) == 2  # one per document


# --- what is refused

@pytest.mark.parametrize("name, content, words", [
    ("empty.txt", b" \n", "empty.txt is empty"),
    ("latin.txt", b"caf\xe9 au lait", "latin.txt is not UTF-8.*byte 3 is 0xe9"),
    ("short.txt", b"hello world", r"short.txt: its training part has \d tokens, .* needs 33"),
    ("missing.txt", None, "missing.txt: no such file")])
def test_a_text_that_cannot_be_used_is_named_and_nothing_is_written(name, content, words):
    if content is not None:
        Path(name).write_bytes(content)
    with pytest.raises((InputError, FileNotFoundError), match=words):
        train.main(replace(TINY, data=name))
    assert not Path("out").exists()


def test_a_folder_without_text_and_wrong_settings_are_named():
    Path("nothing").mkdir()
    for cfg, words in (
            (replace(TINY, data="nothing"), "nothing holds no text"),
            (replace(TINY, level="word"), "--level word"),
            (replace(TINY, micro_batch=3), "multiple of --micro-batch 3"),
            (replace(TINY, dtype="int8"), "int8"),
            (replace(TINY, schedule="step"), "'step'"),
            (replace(TINY, optimizer="sgd"), "'sgd'"),
            (replace(TINY, heads=3), "hidden_size 32 is not divisible"),
            (replace(TINY, device="foo"), "--device foo"),
            (replace(TINY, fsdp=True), "torchrun"),
            (Config(data="text.txt", checkpoint="nothing"), "config.json is missing")):
        with pytest.raises((InputError, FileNotFoundError), match=words):
            train.main(cfg)
        assert not Path("out").exists()


def test_a_checkpoint_without_tokenizer_or_with_a_shorter_context_is_refused():
    train.main(replace(TINY, steps=0))  # its model reads 1,024 tokens
    with pytest.raises(InputError, match="--block 2000: out reads 1024 tokens"):
        train.main(Config(data="text.txt", checkpoint="out", block=2000))
    Path("out/tokenizer.json").unlink()
    with pytest.raises(InputError, match="out has no tokenizer.json"):
        train.main(Config(data="text.txt", checkpoint="out"))


def numbers(Config) -> list:
    """Every flag of a script that takes a number, with one that lies outside any sensible range."""
    found = []
    for name, kind in typing.get_type_hints(Config).items():
        kinds = {kind, *typing.get_args(kind)}
        if kinds & {int, float}:
            found.append((Config, name, -7))
        if float in kinds:
            found += [(Config, name, math.nan), (Config, name, math.inf)]
    return found


@pytest.mark.parametrize("Config, name, value", numbers(train.Config) + numbers(sample.Config))
def test_every_number_flag_has_a_range_and_it_is_checked_first(Config, name, value):
    main = train.main if Config is train.Config else sample.main
    source = {"data": "nowhere.txt"} if Config is train.Config else {"checkpoint": "nowhere"}
    with pytest.raises(InputError, match=f"--{name.replace('_', '-')} {value}: give a number"):
        main(Config(**source, **{name: value}))


@pytest.mark.parametrize("flag", [
    "batch", "eval_every", "eval_batches", "heads", "width", "layers", "block", "micro_batch",
    "clip", "lr", "experts_per_token", "kv_heads", "vocab_size"])
def test_none_of_what_a_run_needs_may_be_0(flag):
    with pytest.raises(InputError, match=f"--{flag.replace('_', '-')} 0: "):
        train.main(replace(TINY, **{flag: 0}))


@pytest.mark.parametrize("change, words", [
    ({"checkpoint": "x", "layers": 7}, "--layers 7 has no effect with --checkpoint"),
    ({"checkpoint": "x", "width": 64}, "--width 64 has no effect with --checkpoint"),
    ({"checkpoint": "x", "heads": 1}, "--heads 1 has no effect with --checkpoint"),
    ({"checkpoint": "x", "kv_heads": 1}, "--kv-heads 1 has no effect with --checkpoint"),
    ({"checkpoint": "x", "num_experts": 4}, "--num-experts 4 has no effect with --checkpoint"),
    ({"checkpoint": "x", "experts_per_token": 1}, "--experts-per-token 1 has no effect with"),
    ({"checkpoint": "x", "level": "char"}, "--level char has no effect with --checkpoint"),
    ({"checkpoint": "x", "vocab_size": 999}, "--vocab-size 999 has no effect with --checkpoint"),
    ({"experts_per_token": 1}, "--experts-per-token 1 has no effect without --num-experts"),
    ({"level": "char", "vocab_size": 999}, "--vocab-size 999 has no effect with --level char"),
    ({"warmup": 50, "steps": 10}, "--warmup 50 is longer than --steps 10")])
def test_a_flag_that_would_be_ignored_is_refused_by_its_name(change, words):
    with pytest.raises(InputError, match=words):
        train.main(Config(data="nowhere.txt", **change))


def test_the_usual_warm_up_may_be_longer_than_a_short_run_but_this_is_said(capsys):
    train.main(replace(TINY, steps=4))
    assert "4 steps end within the warm-up of 20" in capsys.readouterr().out


def test_a_file_in_the_place_of_the_output_folder_is_refused_before_training(capsys):
    Path("out").write_text("mine")
    with pytest.raises((FileExistsError, NotADirectoryError)):
        train.main(TINY)
    assert "nats" not in capsys.readouterr().out and Path("out").read_text() == "mine"


def test_the_command_line_refuses_in_one_message_with_status_2():
    for words, script, *flags in (
            ("stepps", "train.py", "--stepps", "3"),
            ("error: nowhere: no such file", "train.py", "--data", "nowhere"),
            ("error: nowhere: no such folder", "sample.py", "--checkpoint", "nowhere")):
        command = [sys.executable, ROOT / script, *flags]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2
        assert words in done.stderr
        assert "Traceback" not in done.stderr


# --- other people's machines

UNIX_ONLY = (
    "fchmod", "fchown", "chown", "lchown", "fork", "forkpty", "geteuid", "getuid", "getgid",
    "getpgid", "getloadavg", "killpg", "mkfifo", "nice", "openpty", "posix_fallocate", "pread",
    "pwrite", "sched_getaffinity", "sched_setaffinity", "sendfile", "setsid", "statvfs", "fstatvfs",
    "sync", "sysconf", "uname", "wait4", "waitid")


def test_a_run_saves_and_talks_without_anything_that_only_unix_has(monkeypatch):
    for name in UNIX_ONLY:
        monkeypatch.delattr(os, name, raising=False)
    train.main(replace(TINY, steps=4))
    sample.main(sample.Config(prompt="the ", max_new_tokens=3))


# --- several processes

DRIVER = """
import dataclasses, json, sys, train
cfg = train.Config(**json.loads(sys.argv[1]))
def run(**change):
    return train.main(dataclasses.replace(cfg, **change))["log"]
logs = {"ddp": run(out="ddp"), "fsdp": run(out="fsdp", fsdp=True)}
save = train.save
def save_then_stop(*arguments):
    save(*arguments)
    raise KeyboardInterrupt
for name in ("ddp", "fsdp"):
    train.save = save_then_stop
    try:
        run(out=name + "2", fsdp=name == "fsdp")
    except KeyboardInterrupt:
        train.save = save
    logs[name + " resumed"] = run(out=name + "2", fsdp=name == "fsdp", resume=True)
rank = train.start_world(train.pick_device("cpu")).rank
open(f"logs{rank}.json", "w").write(json.dumps(logs))
train.leave_world()
"""


def test_two_processes_train_one_model_whole_or_sharded_and_go_on_bit_for_bit():
    Path("driver.py").write_text(DRIVER)
    cfg = replace(TINY, steps=6, eval_every=3, optimizer="adamw", device="cpu")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    done = subprocess.run([*torchrun, "driver.py", json.dumps(asdict(cfg))],
                          capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr[-2000:]
    logs = json.loads(Path("logs0.json").read_text())
    assert logs["ddp resumed"] == logs["ddp"]
    assert logs["fsdp resumed"] == logs["fsdp"]
    assert json.loads(Path("logs1.json").read_text()) == logs  # also the training loss: of both
    for part in ("train", "val"):
        assert logs["fsdp"][part] == pytest.approx(logs["ddp"][part], abs=1e-4)
    for name in ("ddp", "fsdp"):
        sample.main(sample.Config(checkpoint=name, prompt="the ", max_new_tokens=3))
    assert [p.name for p in Path("fsdp").glob("shards-*")] == ["shards-6"]
