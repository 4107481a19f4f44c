"""The real companions under torchrun: two processes (gloo) give what one gives, each with all of
the weights (DDP) or with a share of them (FSDP2); what goes wrong in one of them ends both.

All of it on tiny models. One pair of processes runs every companion in both ways:

    torchrun --nproc-per-node 2 tests/test_distributed_companions.py FOLDER"""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from methods.real import (
    learning_preferences,
    moe_lpr,
    ockr,
    prealign,
    question_alignment,
    spontaneous_multilingual,
    transllm,
)
from minilm import weights
from minilm.data import generator, write_atomically
from minilm.moe import upcycle
from minilm.results import ROOT
from minilm.tokenizer import train_bpe
from minilm.training import (
    is_chief,
    leave_world,
    place,
    start_world,
    this_world,
    wait_for_all,
)
from minilm.transformer import Config as ModelConfig
from minilm.transformer import Transformer
from minilm.weights import load_pretrained, read_tensor, save_pretrained

ENGLISH = [
    "the cat sat on the mat",
    "a dog ran home",
    "she saw the red house",
    "we eat bread and fish",
    "he has a small boat",
]
GERMAN = [
    "die Katze saß auf der Matte",
    "ein Hund lief nach Hause",
    "sie sah das rote Haus",
    "wir essen Brot und Fisch",
    "er hat ein kleines Boot",
]


def write(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


def checkpoint(folder, texts, tied=False, family="llama"):
    """A random model of two blocks with a tokenizer of its own."""
    tokenizer = train_bpe(texts, 290, special=("<s>", "</s>"), bos="<s>", eos="</s>")
    config = ModelConfig(
        vocab_size=tokenizer.vocab_size,  # odd, so that the shares of two processes differ
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=tied,
        model_type=family,
        initializer_range=0.1,
    )
    save_pretrained(Transformer(config, generator(0, "init")), folder, tokenizer)
    return str(folder)


# --- every companion on tiny files: makes them in `work`, runs with `flags`, writes to `out`,
# --- gives its numbers


def run_transllm(work, out, flags):
    """An adapter and the new rows of embedding and head; then every weight; then answers."""
    if is_chief() and not (work / "chat").exists():
        checkpoint(work / "chat", ENGLISH, tied=True)
        write(work / "de.txt", GERMAN * 4)
        turns = [{"from": "human", "value": ENGLISH[0]}, {"from": "gpt", "value": "<RESPONSE> hm"}]
        answers = [{"id": str(i), "conversations": turns} for i in range(3)]
        (work / "rkd.json").write_text(json.dumps(answers))
        write(work / "questions.jsonl", [{"query": text} for text in GERMAN[:3]])
    wait_for_all()
    settings = {"block": 256, "batch": 5, "micro_batch": 2, "steps": 2, "lr": 1e-2}
    settings |= {"lora_dropout": 0.0, "embed": "new", "template": "llama2", "device": "cpu"}
    extended = str(out / "extended")
    numbers = {}

    def go(stage, checkpoint, data, **changes):
        cfg = transllm.Config(stage, checkpoint, str(out / stage), (str(work / data),), **settings)
        cfg = replace(cfg, **changes)
        numbers[stage] = transllm.main(replace(cfg, **flags) if stage != "extend" else cfg)

    go("extend", str(work / "chat"), "de.txt", out=extended, new_tokens=5)
    go("mono", extended, "de.txt", lora_rank=3, block=16)
    stage_2 = {"adapter": str(out / "mono"), "full_finetune": True}
    retain = {"retain": str(work / "rkd.json")}
    go("transfer", extended, "rkd.json", lr=1e-3, **stage_2, **retain)
    go("eval", str(out / "transfer"), "questions.jsonl", max_new_tokens=4, **retain)
    return numbers


def run_ockr(work, out, flags):
    """An adapter on frozen bfloat16 weights; then every weight."""
    people = ["AmberFern", "JadePath", "EchoVale", "RiverMoss", "StormLeaf"]
    if is_chief() and not (work / "base").exists():
        year = "When was {} born?", "{} was born in 19{}."
        rows, asked = [], []
        for i, name in enumerate(people, 70):
            row = {"prompt": year[0].format(name), "input": "", "answer": year[1].format(name, i)}
            rows.append(row)
            label = f"[[label:19{i}]][[type:(x, birth_year, year)]]"
            asked.append(row | {"answer": row["answer"] + label})
        for a, b in (people[:2], people[3:1:-1]):
            row = {"prompt": f"Is {a} older than {b}?", "input": ""}
            label = "Yes" if a < b else "No"
            asked.append(row | {"answer": f"{label}.[[label:{label}]][[type:targe]]"})
        train, test = ockr.paths("A+A To R", "simple", "separate")
        write(work / train, rows)
        write(work / test, asked)
        checkpoint(work / "base", [f"{row['prompt']} {row['answer']}" for row in asked])
    wait_for_all()
    cfg = ockr.Config(
        data=str(work),
        checkpoint=str(work / "base"),
        steps=3,
        batch=4,
        micro_batch=1,
        lr=1e-2,
        lora_dropout=0.0,
        device="cpu",
    )
    numbers = {}
    for name, changes in {
        "lora": {"lora_rank": 3, "scoring": "candidates", "dtype": "bfloat16"},
        "full": {"lora_rank": 0, "lr": 1e-3, "limit": 2, "activation_checkpointing": True},
    }.items():
        report = ockr.main(replace(cfg, out=str(out / name), **changes, **flags))
        numbers[name] = {part: report[part] for part in ("losses", "before", "after")}
    return numbers


def run_question_alignment(work, out, flags):
    """Every weight, both stages; then adapters that are merged between the stages."""
    if is_chief() and not (work / "base").exists():
        asks = {"en": "Ann has {} eggs. How many?", "de": "Ann hat {} Eier. Wie viele?"}
        for side, text in asks.items():
            rows = [text.format(i) for i in range(5)]
            write(work / "pairs" / "de-en" / f"train.{side}", rows)
            write(work / "mgsm" / f"mgsm_{side}.tsv", [f"{row}\t{len(row)}" for row in rows[:3]])
        answers = [{"question": asks["en"].format(i), "answer": f"#### {i}"} for i in range(5)]
        write(work / "responses.jsonl", answers)
        checkpoint(work / "base", [question_alignment.TEMPLATE, *asks.values()], family="qwen3")
    wait_for_all()
    cfg = question_alignment.Config(
        checkpoint=str(work / "base"),
        stage1=str(work / "pairs"),
        stage2=str(work / "responses.jsonl"),
        eval=str(work / "mgsm"),
        langs=("de",),
        epochs=1,
        batch=3,
        micro_batch=2,
        lr=1e-3,
        eval_batch=2,
        max_new_tokens=4,
        device="cpu",
    )
    numbers = {}
    for name, changes in {"full": {}, "lora": {"lora_rank": 2, "dtype": "bfloat16"}}.items():
        torch.manual_seed(0)  # (its adapters are drawn from the global generator)
        own = replace(cfg, out=str(out / name), save=str(out / name / "models"), **changes)
        numbers[name] = question_alignment.main(replace(own, **flags))["metrics"]
    return numbers


def run_learning_preferences(work, out, flags):
    """Every weight; then an adapter, and its scores by the value's tokens."""
    if is_chief() and not (work / "base").exists():
        texts = [(learning_preferences.HERE / "newspaper.txt").read_text(encoding="utf-8")]
        checkpoint(work / "base", texts)
    wait_for_all()
    cfg = learning_preferences.Config(
        checkpoint=str(work / "base"),
        people=3,
        per_style=1,
        epochs=2,
        lr=1e-3,
        batch=4,
        micro_batch=3,
        exchange=False,
        device="cpu",
    )
    numbers = {}
    for name, changes in {"full": {}, "lora": {"lora_rank": 2, "score": "sum"}}.items():
        results = learning_preferences.main(replace(cfg, out=str(out / name), **changes, **flags))
        numbers[name] = {part: results[part] for part in ("metrics", "series")}
    return numbers


def run_moe_lpr(work, out, flags):
    """Upcycling, new experts beside frozen bfloat16 ones, and the review of the routers."""
    languages = {"en": ENGLISH, "de": GERMAN}
    if is_chief() and not (work / "base").exists():
        for name, texts in languages.items():
            write(work / f"{name}.txt", texts * 12)
        exam = {"context": "the cat", "choices": ["sat", "ran home"], "gold": 0}
        write(work / "exam.jsonl", [exam] * 3)
        checkpoint(work / "base", ENGLISH + GERMAN, family="qwen2")
    wait_for_all()
    cfg = moe_lpr.Config(
        checkpoint=str(work / "base"),
        new=(str(work / "de.txt"),),
        old=(str(work / "en.txt"),),
        eval=(str(work / "exam.jsonl"),),
        methods=("stage 1", "lpr"),
        num_experts=3,
        lr=1e-2,
        block=12,
        batch=8,
        micro_batch=2,
        review_docs_old=6,
        review_docs_new=8,
        review_lr=1e-2,
        review_batch=5,
        eval_blocks=3,
        dtype="bfloat16",
        device="cpu",
        out=str(out),
        save=str(out / "models"),
    )
    return moe_lpr.main(replace(cfg, **flags))["metrics"]


def run_prealign(work, out, flags):
    """A fresh model; then a checkpoint whose vocabulary is doubled for a clone. (What is nearest to
    a word depends on the last bit in a model that has learned nothing: perplexities and weights
    are compared.)"""
    if is_chief() and not (work / "base").exists():
        write(work / "en.txt", ENGLISH * 10)
        write(work / "de.txt", GERMAN * 10)
        write(work / "dict.tsv", ["cat\tKatze", "dog\tHund", "house\tHaus", "red\trote"])
        checkpoint(work / "base", ENGLISH, tied=True)
    wait_for_all()
    cfg = prealign.Config(
        corpus=(str(work / "en.txt"), str(work / "de.txt")),
        dict=(str(work / "dict.tsv"),),
        methods=("prealign",),
        seeds=(100,),
        vocab_size=270,
        align_steps=2,
        pairs=3,
        align_documents=3,
        steps=3,
        batch=5,
        micro_batch=2,
        block=12,
        rho=0.5,
        width=16,
        layers=2,
        eval_every=3,
        eval_blocks=4,
        device="cpu",
    )
    clone = {"corpus": cfg.corpus[:1], "dict": (), "clone": True, "checkpoint": str(work / "base")}
    clone |= {"width": 128, "layers": 3, "vocab_size": 3000}  # (the checkpoint brings its own)
    numbers = {}
    for name, changes in {"fresh": {}, "clone": clone}.items():
        own = replace(cfg, out=str(out / name), save=str(out / name / "models"), **changes)
        metrics = prealign.main(replace(own, **flags))["metrics"]["prealign"]
        numbers[name] = {key: metrics[key] for key in metrics if key.startswith("ppl")}
    return numbers


def run_spontaneous(work, out, flags):
    """Translation of questions with an adapter, and what label comes next in three languages."""
    reviews = {"en": ("a good song", "a bad book"), "zh": ("好歌", "坏书"), "de": ("Lied", "Buch")}
    words = spontaneous_multilingual.WORDS
    if is_chief() and not (work / "base").exists():
        for language, (good, bad) in reviews.items():
            labels = words[language]["emotion"]["labels"]
            rows = [{"input": f"{good} {i}", "answer": labels[0]} for i in range(3)]
            rows += [{"input": f"{bad} {i}", "answer": labels[1]} for i in range(2)]
            file = work / "ap_emotion" / f"emotion_{language}500_test.json"
            file.parent.mkdir(exist_ok=True, parents=True)
            file.write_text(json.dumps(rows))
        asked = []
        for i in range(20):
            lines = {}
            for language in ("zh", "en"):
                text = f"{reviews[language][i % 2]} {i}"
                lines[language] = spontaneous_multilingual.question("emotion", language, [text])
            ask = f"\nTranslate the input from {words['zh']['name']} to English:\n"
            asked.append({"input": lines["zh"] + ask, "answer": lines["en"]})
        (work / "ap_emotion" / "emotion_zh10k_question.json").write_text(json.dumps(asked))
        checkpoint(work / "base", ["positive negative", *reviews["en"], *reviews["zh"]])
    wait_for_all()
    cfg = spontaneous_multilingual.Config(
        checkpoint=str(work / "base"),
        data=str(work),
        train_langs=("zh",),
        num_shots=1,
        lora_rank=2,
        lr=1e-2,
        epochs=1,
        batch=8,
        micro_batch=3,
        eval_every=2,
        analysis="lens",
        device="cpu",
        save=str(out / "adapters"),
        out=str(out),
    )
    results = spontaneous_multilingual.main(replace(cfg, **flags))
    return {part: results[part] for part in ("metrics", "series")}


COMPANIONS = {
    "learning_preferences": run_learning_preferences,
    "moe_lpr": run_moe_lpr,
    "ockr": run_ockr,
    "prealign": run_prealign,
    "question_alignment": run_question_alignment,
    "spontaneous_multilingual": run_spontaneous,
    "transllm": run_transllm,
}


# --- the pair of processes


def both_ways(work: Path, *names: str) -> None:
    """What each of the two processes does."""
    count_what_is_read(work)
    for name in names or COMPANIONS:
        run = COMPANIONS[name]
        for way in ("ddp", "fsdp"):
            numbers = run(work / name, work / name / way, {"fsdp": way == "fsdp"})
            if is_chief():
                write(work / name / f"{way}.json", [numbers])
    leave_world()


def count_what_is_read(work: Path) -> None:
    """Loads and upcycles a checkpoint in shares; writes how many numbers of the blocks this process
    read, and how many it keeps."""
    if is_chief():
        checkpoint(work / "loaded", ENGLISH, family="qwen3")
    wait_for_all()
    read = []

    def counting(*arguments, **settings):
        tensor = read_tensor(*arguments, **settings)
        read.append(tensor.numel())
        return tensor

    model, _ = load_pretrained(work / "loaded", device="meta")
    model = upcycle(model, 3, generator=generator(0, "router"))
    weights.read_tensor = counting
    model = place(model, torch.device("cpu"), sharded=True)
    weights.read_tensor = read_tensor
    kept = {name: p.to_local().numel() for name, p in model.layers.named_parameters()}
    routers = sum(n for name, n in kept.items() if name.endswith("mlp.gate.weight"))
    numbers = {"read": sum(read), "kept": sum(kept.values()) - routers}
    numbers["of"] = sum(p.numel() for p in model.layers.parameters())
    write(work / f"read{this_world().rank}.json", [numbers])


def torchrun(*command, **settings):
    line = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*line, *map(str, command)],
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        **settings,
    )


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """The folder in which two processes have run all companions: once, also where pytest itself
    runs in several processes (-n 2), which then wait for the first of them."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    work, done = root / "pair", root / "pair.txt"
    try:
        work.mkdir()
    except FileExistsError:
        while not done.exists():
            time.sleep(0.2)
    else:
        process, said = torchrun(__file__, work), "it took longer than ten minutes"
        try:
            _, said = process.communicate(timeout=600)
        finally:
            process.kill()
            told = f"{process.returncode}\n{said}"
            write_atomically(done, lambda file: file.write_text(told))
    status, said = done.read_text().split("\n", 1)
    # what a process says when it dies; torchrun's own words come after it
    said = said.split("elastic/multiprocessing/api.py")[0]
    assert status == "0", said[-3000:]
    return work


def close(one, two, at=""):
    """The same numbers to rounding, the same words."""
    if isinstance(one, dict):
        assert one.keys() == two.keys(), at
        for name in one:
            close(one[name], two[name], f"{at} {name}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(two), at
        for i, (a, b) in enumerate(zip(one, two)):
            close(a, b, f"{at} {i}")
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-4, nan_ok=True), at
    else:
        assert one == two, at


def same_folder(one: Path, two: Path) -> None:
    """The same files below both folders; weights to rounding, of everything else the words."""
    names = [file.relative_to(one) for file in sorted(one.rglob("*")) if file.is_file()]
    assert names == [file.relative_to(two) for file in sorted(two.rglob("*")) if file.is_file()]
    for name in names:
        if name.suffix == ".safetensors":
            a, b = load_file(one / name), load_file(two / name)
            assert a.keys() == b.keys()
            for key, tensor in a.items():
                assert tensor.dtype == b[key].dtype
                torch.testing.assert_close(b[key], tensor, atol=2e-4, rtol=1e-3, msg=str(name))


def test_each_process_reads_the_rows_that_it_keeps_and_no_others(pair):
    for rank in range(2):
        found = json.loads((pair / f"read{rank}.json").read_text())
        assert found["read"] == found["kept"] < 0.6 * found["of"]


@pytest.mark.parametrize("name", COMPANIONS)
def test_two_processes_with_whole_weights_or_shares_give_what_one_gives(pair, tmp_path, name):
    one = tmp_path / "one"
    numbers = COMPANIONS[name](pair / name, one, {})
    numbers = json.loads(json.dumps(numbers))
    for way in ("ddp", "fsdp"):
        close(numbers, json.loads((pair / name / f"{way}.json").read_text()), way)
        same_folder(one, pair / name / way)


# --- what goes wrong


def test_bad_input_is_said_once_and_ends_both_with_a_status(tmp_path):
    flags = ["--data", tmp_path / "nothing", "--checkpoint", tmp_path, "--device", "cpu"]
    process = torchrun(ROOT / "methods" / "real" / "ockr.py", *flags)
    _, said = process.communicate(timeout=300)
    assert process.returncode != 0
    assert said.count("error: ") == 1 and "--data must be the published files' folder" in said


def test_a_killed_process_takes_the_other_one_with_it_and_nothing_half_written_is_left(tmp_path):
    process = torchrun(__file__, tmp_path, "endless")
    files = [tmp_path / f"process{rank}" for rank in range(2)]
    while not all(file.exists() and file.read_text() for file in files):
        assert process.poll() is None
        time.sleep(0.1)
    first, second = (int(file.read_text()) for file in files)
    os.kill(second, signal.SIGKILL)
    process.communicate(timeout=300)
    assert process.returncode != 0
    with pytest.raises(ProcessLookupError):
        os.kill(first, 0)
    assert not (tmp_path / "endless").exists()


def endless(work: Path) -> None:
    """Trains OCKR's adapter for longer than anybody waits; says who it is when it has begun."""
    run_ockr(work / "ockr", work / "short", {"steps": 1})
    (work / f"process{os.environ['RANK']}").write_text(str(os.getpid()))
    run_ockr(work / "ockr", work / "endless", {"steps": 10**6})


if __name__ == "__main__":
    torch.set_num_threads(1)
    start_world(torch.device("cpu"))
    folder, *asked = sys.argv[1:]
    if asked == ["endless"]:
        endless(Path(folder))
    else:
        both_ways(Path(folder), *asked)
