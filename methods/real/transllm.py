"""TransLLM on your own chat model, texts and translations, one stage at a time. The method is methods/transllm.py.

Run     every stage reads files and writes one folder; here from the chat model CHAT to `model`, which transformers loads:
        python methods/real/transllm.py --stage extend --checkpoint CHAT --data th.txt --protect en.txt --out x
        python methods/real/transllm.py --stage mono --checkpoint x --data th.txt --out m
        python methods/real/transllm.py --stage translate --checkpoint x --adapter m --pairs th.txt en.txt --data en.txt --out t
        python methods/real/transllm.py --stage make-rkd --checkpoint CHAT --data queries.jsonl --out r
        python methods/real/transllm.py --stage make-tcot --checkpoint x --adapter t --data r/rkd.json --out c
        python methods/real/transllm.py --stage transfer --checkpoint x --adapter t --data r/rkd.json c/tcot.json --out f
        python methods/real/transllm.py --stage merge --checkpoint x --adapter f --out model
        python methods/real/transllm.py --stage eval --checkpoint model --data questions.jsonl --out e
        The paper: LLaMA-2-chat-7B, stages 1 and 2 with 1024 blocks of 512 tokens a step; one 80 GB GPU with --dtype bfloat16 (estimate).
Files   Text: UTF-8, one document a line. --pairs: two line-aligned files (target, source), or one whose lines hold exactly one tag,
        "TARGET <EN> SOURCE" or "SOURCE <TH> TARGET". Queries: JSON Lines {"query"}, or Alpaca's list {"instruction", "input"}. rkd.json,
        tcot.json: [{"id", "conversations": [{"from": "human", "value"}, {"from": "gpt", "value": "<EN> .. <RESPONSE> .. <TH> .."}]}].
        --translations: JSON Lines {"id", "query", "response"} from any translator (what is missing the model of stage 2 translates).
        Questions: JSON Lines {"query", "query2"}. answers.jsonl is for a judge, who adds "score" to its lines for --scores A.jsonl B.jsonl.
Shown   results/transllm_real.json: commands, settings and numbers of all eight stages on real text, with 0.24M parameters of train.py,
        which read 5,000 questions of GSM8K, each with "The answer is N." (a template "User: ..\\nAssistant:"), turned to German by
        QAlign's parallel questions. It shows the path and tests no claim: in stage 3 the held-out loss of 600 self-generated answers falls
        from 4.71 to 0.12, in stage 1 that of German text from 7.25 to 4.35. To translate, seconds of training are too little: in stage 3
        the loss of translation on request rises from 4.35 to 4.50, and every chain needed a forced tag.
Honest  Not published: the amounts of text, the steps, the mixture (--mix is our choice). Refusals are counted by keywords, a proxy that
        over-counts ("illegal", "Hello!"). A chain costs about three times the tokens of a direct answer.
"""

import json
import random
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from methods.experiments.transllm import PAPER, Tags, make_rkd, parse_chain, respond, response_loss
from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.data import batches, generator, pack, read_json, read_text, write_atomically, write_json
from minilm.generate import stop_ids
from minilm.lora import TARGETS, add_lora, extend_vocabulary, load_adapter, lora_layers, merge_lora, save_adapter
from minilm.results import cli, commit, hardware, progress
from minilm.tokenizer import extend_tokenizer
from minilm.training import autocast, make_optimizers, pick_device, schedule, set_lr, take_step
from minilm.weights import load_pretrained, save_pretrained

KNOWN = read_json(Path(__file__).with_suffix(".json"))  # the paper's template, ChatML, and the usual AdvBench keywords


@dataclass(frozen=True)
class Config:
    stage: Literal["extend", "mono", "translate", "make-rkd", "make-tcot", "transfer", "merge", "eval"]  # what to do
    checkpoint: str  # Hugging Face folder: the chat model, or what `extend` or `merge` wrote
    out: str  # folder to write
    data: tuple[str, ...] = ()  # files (or folders of .txt) that the stage reads, see above
    adapter: str | None = None  # folder of the stage before
    pairs: tuple[str, ...] = ()  # parallel text
    protect: tuple[str, ...] = ()  # extend: text that must keep its token ids
    translations: str | None = None  # make-tcot: a translator's output; without it the model of stage 2 translates
    scores: tuple[str, ...] = ()  # eval: a judge's scores of one or two systems
    new_tokens: int = 2000  # extend: tokens of the new language
    source_tag: str = "<EN>"  # opens the query in English
    response_tag: str = "<RESPONSE>"  # opens the answer in English
    target_tag: str = "<TH>"  # opens the answer in the target language
    template: Literal["own", "llama2", "chatml"] = "own"  # chat template: the checkpoint's, the paper's, or ChatML
    keywords: str | None = None  # eval: file of refusals in the target language, one a line (default: English ones, for the English part)
    lora_rank: int | None = None  # default 64, or the adapter's; alpha is twice the rank
    lora_dropout: float = 0.05  # on the adapters' input
    embed: Literal["new", "all"] = "all"  # rows of embedding and head that learn: those of `extend`, or all as in the paper
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # transfer: shares of the first file, the second, and translation of --pairs
    block: int = 512  # tokens per block; longer conversations are dropped
    batch: int = 32  # blocks or conversations per step
    micro_batch: int = 8  # of them at a time
    steps: int = 1000  # optimizer steps
    lr: float = 2e-4  # peak, cosine (the paper: 1e-4 for transfer)
    warmup: float = 0.01  # share of the steps
    max_new_tokens: int = 512  # when the model answers; in a chain, after each tag
    log: str | None = None  # JSON file to which the stage adds its command and its numbers
    limit: int | None = None  # read only so many lines, queries or questions
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products; weights stay float32
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    device: str = "auto"  # cuda, cpu, mps
    seed: int = 0  # adapters, order, held-out part


# --- files

def read_lines(cfg: Config, paths: tuple[str, ...], what: str) -> list[str]:
    """The lines of all files, empty ones left out. A folder stands for its .txt files."""
    files = [f for path in paths for f in (sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [path])]
    if not files:
        raise InputError(f"{what} {' '.join(paths) or 'is not given'}: there is no text; give files, or folders that hold .txt files")
    return [line.strip() for file in files for line in read_text(file).split("\n") if line.strip()][: cfg.limit]


def read_rows(path: str | Path, *fields: str) -> list[dict]:
    """JSON Lines, or one JSON list, of objects that have these fields."""
    text = read_text(path)
    try:
        rows = json.loads(text) if text.lstrip().startswith("[") else [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is neither JSON Lines nor a JSON list ({error})") from None
    if bad := [i for i, row in enumerate(rows, 1) if not isinstance(row, dict) or any(row.get(f) is None for f in fields)]:
        raise InputError(f"{path}, row {bad[0]}: an object with {', '.join(fields) or 'named fields'} is needed")
    return rows


def read_queries(cfg: Config) -> list[dict]:
    """[{"query", ...}]; Alpaca's instruction and input become one query."""
    rows = [row for path in cfg.data for row in read_rows(path)]
    for row in rows:
        if "instruction" in row:
            row["query"] = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
    if bad := [i for i, row in enumerate(rows or [{}], 1) if not str(row.get("query") or "").strip()]:
        raise InputError(f"{' '.join(cfg.data) or '--data'}, row {bad[0]}: neither \"query\" nor \"instruction\" is given")
    return rows[: cfg.limit]


def read_conversations(path: str) -> list[tuple[str, list[str], str]]:
    """(id, turns before the last answer, that answer) of every conversation."""
    found = []
    for number, row in enumerate(read_rows(path, "conversations"), 1):
        turns = row["conversations"]
        if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
            raise InputError(f"{path}, conversation {number}: \"conversations\" must list human and gpt turns, in pairs")
        for i, turn in enumerate(turns):
            if turn.get("from") != ("human", "gpt")[i % 2] or not str(turn.get("value") or "").strip():
                raise InputError(f"{path}, conversation {number}, turn {i + 1}: {'human' if i % 2 == 0 else 'gpt'} with a value is needed, "
                                 f"got {turn.get('from')!r} with {str(turn.get('value'))[:20]!r}")
        found.append((str(row.get("id", number)), [turn["value"] for turn in turns[:-1]], turns[-1]["value"]))
    if not found:
        raise InputError(f"{path} holds no conversation: did --stage make-rkd drop every answer, as cut off by --max-new-tokens?")
    return found


def write_conversations(path: Path, rows: list[tuple[str, str, str]]) -> None:
    turns = lambda query, answer: [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]
    write_json(path, [{"id": id, "conversations": turns(query, answer)} for id, query, answer in rows])


# --- tokens

class Format:
    """One run's tokenizer, chat template and tags. Texts are encoded as texts: a tag that a user writes never becomes one."""

    def __init__(self, cfg: Config, tokenizer, tagged: bool = True):
        if tokenizer is None or tokenizer.eos_id is None:
            raise InputError(f"{cfg.checkpoint} has no tokenizer.json with an end-of-text token: answers could not end")
        self.tok, self.eos = tokenizer, tokenizer.eos_id
        self.template = load_chat_template(cfg.checkpoint) if cfg.template == "own" else KNOWN["templates"][cfg.template]
        self.names = (cfg.source_tag, cfg.response_tag, cfg.target_tag)
        missing = [name for name in self.names if name not in tokenizer.special]
        if missing and tagged:
            raise InputError(f"{missing[0]!r} is not one token of {cfg.checkpoint}: run --stage extend first, with the same tags")
        self.tags = None if missing else Tags(*(tokenizer.special[name] for name in self.names))
        self.space = "" if tokenizer.encode("a") == tokenizer.encode(" a")[-1:] else " "  # (some put a space in front themselves)
        self.cut = re.compile("(" + "|".join(map(re.escape, self.names)) + ")")

    def prompt(self, *turns: str) -> list[int]:
        """Turns of user, assistant, user, ... as the template has them."""
        if self.template is None:
            raise InputError("the checkpoint has no chat template: give --template llama2 or chatml")
        roles = [{"role": "assistant" if i % 2 else "user", "content": turn} for i, turn in enumerate(turns)]
        return render_chat(self.template, roles, self.tok)

    def tagged(self, value: str) -> list[int]:
        """"<EN> a query <RESPONSE> an answer" -> ids, tags as tags."""
        return [i for part in self.cut.split(value) if part.strip()
                for i in ([self.tok.special[part]] if part in self.names else self.tok.encode(self.space + part.strip()))]

    def text(self, ids) -> str:
        return self.tok.decode(ids or [], skip_special=True).strip()


def pair_rows(cfg: Config, form: Format) -> list[tuple[str, str]]:
    """[(target, source)]"""
    if len(cfg.pairs) == 2:
        target, source = (read_text(path).rstrip("\n").split("\n") for path in cfg.pairs)
        if len(target) != len(source):
            raise InputError(f"--pairs: {cfg.pairs[0]} has {len(target)} lines, {cfg.pairs[1]} {len(source)}: give line-aligned files")
        return [(t, s) for t, s in zip(target, source) if t.strip() and s.strip()][: cfg.limit]
    rows = []
    for number, line in enumerate(read_lines(cfg, cfg.pairs, "--pairs"), 1):
        parts = [part.strip() for part in form.cut.split(line)]
        if len(parts) != 3 or parts[1] == form.names[1] or not parts[0] or not parts[2]:
            raise InputError(f"{' '.join(cfg.pairs)}, line {number}: one {form.names[0]} or {form.names[2]} between two texts is needed")
        rows.append((parts[0], parts[2]) if parts[1] == form.names[0] else (parts[2], parts[0]))
    return rows


# --- models

def start(cfg: Config, tagged: bool = True):
    """-> (model with the adapter of the stage before if there is one, Format, id of the first new token)"""
    device = pick_device(cfg.device)
    model, tokenizer = load_pretrained(cfg.checkpoint, device=device)
    form, note = Format(cfg, tokenizer, tagged), Path(cfg.checkpoint) / "transllm.json"
    note = read_json(note) if note.exists() else {}
    if cfg.adapter:
        if note.get("merged"):
            raise InputError(f"{cfg.checkpoint} is merged already: an adapter belongs to the folder that --stage extend wrote")
        load_adapter(model, cfg.adapter)
        rank = next(iter(lora_layers(model).values())).rank
        if cfg.lora_rank not in (None, rank):
            raise InputError(f"--lora-rank {cfg.lora_rank}: {cfg.adapter} has rank {rank}; one adapter is carried through all stages")
    model.activation_checkpointing = cfg.activation_checkpointing
    return model.to(device), form, note.get("first_new_token", 0)


def fit(cfg: Config, model, kinds: dict[str, list], shares: Sequence[float], first: int) -> dict:
    """Trains adapter, embedding and head on (read, learned) pairs, a twentieth of each kind held out; writes the adapter."""
    held, rest = {}, {}
    for name, pairs in kinds.items():
        few = max(1, min(200, len(pairs) // 20))
        order = torch.randperm(len(pairs), generator=generator(cfg.seed, f"held out {name}")).tolist()
        held[name], rest[name] = [pairs[i] for i in order[:few]], [pairs[i] for i in order[few:]]
        if not rest[name]:
            raise InputError(f"{name}: {len(pairs)} example(s) are too few: one is held out, one more is needed (--block {cfg.block})")
    if not lora_layers(model):
        rank = cfg.lora_rank or 64
        add_lora(model, rank, 2 * rank, TARGETS, cfg.lora_dropout, generator=generator(cfg.seed, "lora"))
    rows = first if cfg.embed == "new" else 0
    for module in (model.embed, model.lm_head):
        module.weight.requires_grad_(True)
        module.weight.register_hook(lambda grad: torch.cat((torch.zeros_like(grad[:rows]), grad[rows:])))
    optimizers, before = make_optimizers(model, "adamw", cfg.lr, weight_decay=0.0), losses(cfg, model, held)
    streams = {name: batches(len(pairs), 1, generator(cfg.seed, f"order {name}")) for name, pairs in rest.items()}
    rng = random.Random(f"{cfg.seed}/kinds")
    model.train()
    for step in progress(range(cfg.steps), cfg.stage):
        set_lr(optimizers, schedule(step, cfg.steps, warmup=round(cfg.warmup * cfg.steps)))
        chosen = [rest[name][int(next(streams[name]))] for name in rng.choices(list(rest), shares, k=cfg.batch)]
        total = sum(len(learned) for _, learned in chosen)
        for at in range(0, cfg.batch, cfg.micro_batch):
            part = chosen[at : at + cfg.micro_batch]
            with autocast(model.embed.weight.device, cfg.dtype):
                loss = response_loss(model, part) * (sum(len(learned) for _, learned in part) / total)
            if at + cfg.micro_batch < cfg.batch:
                loss.backward()
        take_step(loss, model, optimizers)
    after = losses(cfg, model.eval(), held)
    save_adapter(model, cfg.out)
    return {f"held-out loss, {name}": [before[name], after[name]] for name in kinds}


@torch.no_grad()
def losses(cfg: Config, model, kinds: dict[str, list]) -> dict[str, float]:
    """Mean loss per learned token of each kind."""
    found = {}
    for name, pairs in kinds.items():
        with autocast(model.embed.weight.device, cfg.dtype):
            parts = [pairs[at : at + cfg.micro_batch] for at in range(0, len(pairs), cfg.micro_batch)]
            sums = [response_loss(model, part).item() * sum(len(learned) for _, learned in part) for part in parts]
        found[name] = sum(sums) / sum(len(learned) for _, learned in pairs)
    return found


# --- stages

def extend(cfg: Config) -> dict:
    model, tokenizer = load_pretrained(cfg.checkpoint)
    Format(cfg, tokenizer, tagged=False)
    texts = read_lines(cfg, cfg.data, "--data")
    kept = read_lines(cfg, cfg.protect, "--protect") if cfg.protect else []
    longer, pieces = extend_tokenizer(tokenizer, texts, cfg.new_tokens, (cfg.source_tag, cfg.response_tag, cfg.target_tag), kept)
    extend_vocabulary(model, pieces, tokenizer.vocab_size)
    save_pretrained(model, cfg.out, longer)
    write_json(Path(cfg.out) / "transllm.json", {"first_new_token": tokenizer.vocab_size})
    length = lambda tok: sum(len(tok.encode(text)) for text in texts) / sum(map(len, texts))
    return {"new tokens": len(pieces), "vocabulary": model.config.vocab_size, "tokens per character before": length(tokenizer),
            "after": length(longer), "protected lines that kept their ids": sum(longer.encode(t) == tokenizer.encode(t) for t in kept)}


def pretrain(cfg: Config) -> dict:
    """mono: text in the target language. translate: pairs in both directions, and text in the source language. Every line is BOS ... EOS;
    lines are packed into blocks, whose first token is read and the others learned."""
    model, form, first = start(cfg)
    tok, texts = form.tok, read_lines(cfg, cfg.data, "--data") if cfg.data or cfg.stage == "mono" else []
    lines = [tok.encode(text) for text in texts]
    for target, source in pair_rows(cfg, form) if cfg.stage == "translate" else ():
        lines += [[*tok.encode(target), form.tags.english, *tok.encode(form.space + source)],
                  [*tok.encode(source), form.tags.target, *tok.encode(form.space + target)]]
    random.Random(f"{cfg.seed}/lines").shuffle(lines)
    blocks = pack([tok.encode("", bos=tok.add_bos) + line for line in lines], cfg.block, form.eos).tolist()
    return fit(cfg, model, {"text": [(block[:1], block[1:]) for block in blocks]}, [1], first)


def in_batches(cfg: Config, items: list, answer) -> list:
    return [x for at in progress(range(0, len(items), cfg.batch), cfg.stage) for x in answer(items[at : at + cfg.batch])]


def rkd(cfg: Config) -> dict:
    """The untouched chat model answers the queries, greedily; answers without an end are dropped, refusals are kept."""
    model, form, _ = start(cfg, tagged=False)
    if form.tags or cfg.adapter:
        raise InputError(f"make-rkd: {cfg.checkpoint} has the tags already: RKD is made by the chat model as it was before --stage extend")
    queries = [(str(row.get("id", i)), row["query"]) for i, row in enumerate(read_queries(cfg), 1)]

    def answer(part):
        found = make_rkd(model, [form.prompt(query) for _, query in part], stop_ids(model, form.tok), cfg.max_new_tokens)
        return [(*part[i], f"{cfg.response_tag} {form.text(ids)}") for i, ids in found.items() if form.text(ids)]

    rows = in_batches(cfg, queries, answer)
    write_conversations(Path(cfg.out) / "rkd.json", rows)
    return {"queries": len(queries), "answers": len(rows)}


def make_tcot(cfg: Config) -> dict:
    """Chains from RKD: both sides translated by the file of --translations or, where that has none, by the model of stage 2."""
    rows = [row for path in cfg.data for row in read_conversations(path)][: cfg.limit]
    turns = [(id, query[0], answer.removeprefix(cfg.response_tag).strip()) for id, query, answer in rows]
    known = {str(row.get("id")): row for row in read_rows(cfg.translations)} if cfg.translations else {}
    sides = [(id, side, text) for id, *texts in turns for side, text in zip(("query", "response"), texts)]
    found = {(id, side): known[id][side] for id, side, _ in sides if known.get(id, {}).get(side)}
    missing = [(id, side, text) for id, side, text in sides if (id, side) not in found]
    if missing:
        model, form, _ = start(cfg)

        def translate(part):
            prompts = [[*form.tok.encode(text, bos=form.tok.add_bos), form.tags.target] for _, _, text in part]
            answers, _ = respond(model, prompts, stop_ids(model, form.tok), limit=cfg.max_new_tokens)
            return [((id, side), form.text(ids)) for (id, side, _), ids in zip(part, answers) if form.text(ids)]

        found |= dict(in_batches(cfg, missing, translate))
    chains = [(id, found[id, "query"], f"{cfg.source_tag} {query} {cfg.response_tag} {response} {cfg.target_tag} {found[id, 'response']}")
              for id, query, response in turns if (id, "query") in found and (id, "response") in found]
    write_conversations(Path(cfg.out) / "tcot.json", chains)
    return {"chains": len(chains), "of": len(turns), "texts translated by the model": len(missing)}


def transfer(cfg: Config) -> dict:
    """Stage 3: the files of --data, RKD and chains, and translation of --pairs on request, in the shares of --mix."""
    if len(cfg.data) > 2:
        raise InputError(f"transfer: --data has {len(cfg.data)} files; give rkd.json, tcot.json, whose shares are the first two of --mix")
    model, form, first = start(cfg)
    kinds: dict[str, list] = {}
    for path in cfg.data:
        for number, (_, turns, answer) in enumerate(read_conversations(path), 1):
            learned = [*form.tagged(answer), form.eos]
            used = [i for i in learned if i in form.tags]
            if learned[0] not in form.tags or used != list(form.tags) and len(used) != 1:
                raise InputError(f"{path}, conversation {number}: the answer must be {' .. '.join(form.names)} .., or one of these alone")
            kinds.setdefault(path, []).append((form.prompt(*turns), learned))
    for pair in pair_rows(cfg, form) if cfg.pairs else ():
        for read, tag, said in ((pair[0], form.tags.english, pair[1]), (pair[1], form.tags.target, pair[0])):
            kinds.setdefault("translation", []).append((form.prompt(read), [tag, *form.tok.encode(form.space + said), form.eos]))
    fitting = {name: [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= cfg.block] for name, pairs in kinds.items()}
    shares = [share for share, used in zip(cfg.mix, (len(cfg.data) > 0, len(cfg.data) > 1, bool(cfg.pairs))) if used]
    if min(cfg.mix) < 0 or sum(shares) <= 0:
        raise InputError(f"transfer: give --data, and in --mix (now {cfg.mix}) no share below 0 and one above 0 for what is given")
    numbers = fit(cfg, model, fitting, shares, first)
    return numbers | {"longer than --block, dropped": sum(map(len, kinds.values())) - sum(map(len, fitting.values())),
                      "learned tokens": {name: sum(len(learned) for _, learned in pairs) for name, pairs in fitting.items()}}


def merge(cfg: Config) -> dict:
    if not cfg.adapter:
        raise InputError("merge: give the --adapter to merge into --checkpoint")
    model, form, first = start(cfg)
    merge_lora(model, keep=False)
    save_pretrained(model, cfg.out, form.tok)
    write_json(Path(cfg.out) / "transllm.json", {"first_new_token": first, "merged": True})
    return {"vocabulary": model.config.vocab_size}


def compare(paths: Sequence[str]) -> dict:
    """A judge's scores: the mean of a file, and of its turns where its lines name them; of two files, how often the first one wins."""
    systems, numbers = [], {}
    for path in paths:
        rows = read_rows(path)
        for number, row in enumerate(rows or [{}], 1):
            if not re.fullmatch(r"-?\d+(\.\d+)?", str(row.get("score")).strip()):
                raise InputError(f"{path}, row {number}: a number under \"score\" is needed, got {str(row.get('score'))[:20]!r}")
        systems.append([(str(row.get("turn", "")), float(row["score"])) for row in rows])
        for turn in dict.fromkeys(("", *(turn for turn, _ in systems[-1]))):
            chosen = [score for t, score in systems[-1] if turn in ("", t)]
            numbers[f"mean score {path}" + (turn and f", turn {turn}")] = sum(chosen) / len(chosen)
    if len(paths) > 2 or [turn for turn, _ in systems[0]] != [turn for turn, _ in systems[-1]]:
        raise InputError(f"--scores {' '.join(paths)}: give one file, or two that score the same turns in the same order")
    wins = [(a > b, a == b, a < b) for (_, a), (_, b) in zip(*systems)] if len(systems) == 2 else []
    return numbers | dict(zip(("win", "tie", "loss"), map(sum, zip(*wins))))


def evaluate(cfg: Config) -> dict:
    """answers.jsonl for a judge, one line a turn; rates over all turns. The second turn follows the first one's English."""
    if cfg.scores:
        return compare(cfg.scores)
    model, form, _ = start(cfg, tagged=False)
    needed, rows, answers = form.tags[1:] if form.tags else (), read_queries(cfg), []
    words, forced = read_lines(cfg, (cfg.keywords,), "--keywords") if cfg.keywords else KNOWN["refusals"], 0.0
    for row in progress(rows, "eval"):
        history: list[str] = []
        for turn, key in enumerate(("query", "query2"), 1):
            if not row.get(key):
                continue
            (ids,), helped = respond(model, [form.prompt(*history, row[key])], stop_ids(model, form.tok), needed, cfg.max_new_tokens)
            chain = parse_chain(ids, form.tags) if form.tags else None
            parts = [form.text(x) for x in chain[:3]] if chain else [row[key], form.text(ids), form.text(ids)]
            history += parts[:2] if all(parts[:2]) else [row[key], form.text(ids) or "-"]
            forced += helped
            judged = parts[2] if cfg.keywords else parts[1]
            answers.append(dict(zip(("question", "english", "response", "answer"), (row[key], *parts))) | {
                "turn": turn, "tokens": len(ids), "well_formed": chain is None or chain.well_formed, "empty": not judged,
                "refusal": any(word in judged for word in words), "needs_reference": bool(row.get("needs_reference"))})
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(a, ensure_ascii=False) + "\n" for a in answers)
    write_atomically(Path(cfg.out) / "answers.jsonl", lambda path: path.write_text(lines, encoding="utf-8"))
    rate = lambda key: sum(a[key] for a in answers) / len(answers)
    return {"answers": len(answers), "well formed": rate("well_formed"), "forced": forced / len(answers), "empty": rate("empty"),
            "refusals (by keywords, a proxy)": rate("refusal"), "tokens per answer": rate("tokens")}


STAGES = {"extend": extend, "mono": pretrain, "translate": pretrain, "make-rkd": rkd, "make-tcot": make_tcot, "transfer": transfer,
          "merge": merge, "eval": evaluate}


def main(cfg: Config) -> dict:
    if min(cfg.steps, cfg.batch, cfg.micro_batch, cfg.max_new_tokens, 1 if cfg.limit is None else cfg.limit) < 1:
        raise InputError("--steps, --batch, --micro-batch, --max-new-tokens and --limit must be at least 1")
    numbers = STAGES[cfg.stage](cfg)
    record = {"stage": cfg.stage, "command": " ".join(["python", *sys.argv]), "config": asdict(cfg), "numbers": numbers, "commit": commit()}
    write_json(Path(cfg.out) / "numbers.json", record)
    if cfg.log:
        log = read_json(Path(cfg.log)) if Path(cfg.log).exists() else {"script": "methods/real/transllm.py", "paper": PAPER, "stages": []}
        seeds = sorted({*log.get("seeds", []), cfg.seed})
        write_json(Path(cfg.log), log | {"seeds": seeds, "stages": [*log["stages"], record], "hardware": hardware()})
    for name, value in numbers.items():
        print(f"{name:36} {value}")
    return numbers


if __name__ == "__main__":
    cli(main, Config)
