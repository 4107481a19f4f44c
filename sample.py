"""Talk to a checkpoint: a folder in Hugging Face layout (train.py's, say), a .gguf file, or the
name of a model in Hugging Face's cache.

    python sample.py --prompt "def main("           # out/, the result of python train.py
    python sample.py --checkpoint DIR --prompt "Once upon a time" --top-p 0.95 --num-samples 3
    python sample.py --checkpoint DIR --chat        # a conversation, in the folder's own template
    python sample.py --checkpoint DIR --chat --prompt "Why is the sky blue?"     # one answer
    python sample.py --checkpoint FILE.gguf --dtype int4 --chat     # with the file's own 4 bits
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.generate import check_context, check_sampling, context_length, stop_ids, stream
from minilm.quantize import load_quantized
from minilm.results import check_range, check_unused, cli
from minilm.training import pick_device
from minilm.weights import DTYPES, load_pretrained

BITS = {"int8": 8, "int4": 4}


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out"  # folder in Hugging Face layout, FILE.gguf, or a name in its cache
    prompt: str | None = None  # text to continue (default: a line break) or, with --chat, to answer
    chat: bool = False  # answer messages from the terminal (an empty line or Ctrl-D ends)
    system: str | None = None  # system message of the conversation
    max_new_tokens: int = 256  # per sample or answer
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int | None = None  # draw from the k most probable tokens only
    top_p: float | None = None  # draw from the smallest set of tokens with this total probability
    num_samples: int = 1  # continuations of the prompt
    seed: int = 0  # of the draws; sample i uses seed + i
    dtype: str = "float32"  # float32, bfloat16, float16; int8, int4: weights of so many bits
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps


def main(cfg: Config) -> None:
    check(cfg)
    device = pick_device(cfg.device)
    if cfg.dtype in BITS:
        model, tokenizer = load_quantized(cfg.checkpoint, BITS[cfg.dtype], device=device)
    else:
        model, tokenizer = load_pretrained(cfg.checkpoint, DTYPES[cfg.dtype], device)
    if tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: "
                         "add the one the model was trained with")
    if cfg.chat:
        return Conversation(cfg, model, tokenizer).hold()
    text = "\n" if cfg.prompt is None else cfg.prompt
    prompt = tokenizer.encode(text, bos=tokenizer.add_bos)
    count, seconds = 0, 0.0
    for i in range(cfg.num_samples):
        print(text, end="", flush=True)
        ids, took = print_stream(cfg, model, tokenizer, prompt, cfg.seed + i)
        count += len(ids)
        seconds += took
        print("-" * 40)
    print(f"{count} tokens, {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


def check(cfg: Config) -> None:
    if cfg.dtype not in {*DTYPES, *BITS}:
        raise InputError(f"--dtype {cfg.dtype}: use {', '.join([*DTYPES, *BITS])}")
    if cfg.checkpoint == Config.checkpoint and not Path(cfg.checkpoint).exists():
        raise FileNotFoundError(f"{cfg.checkpoint}: there is no model yet: train one with "
                                "`python train.py`, or talk to a ready one with `make chat`")
    check_range(cfg, "max_new_tokens num_samples top_k", least=1)
    check_range(cfg, "seed", least=0, most=2**62)
    check_range(cfg, "temperature", least=0)
    check_range(cfg, "top_p", above=0, most=1)
    check_sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    if cfg.chat:
        check_unused(cfg, "num_samples", "with --chat")
    else:
        check_unused(cfg, "system", "without --chat")
    if cfg.temperature == 0:
        check_unused(cfg, "top_k top_p num_samples seed", "at --temperature 0, which draws nothing")
    try:
        f"{cfg.prompt}{cfg.system}".encode()
    except UnicodeEncodeError:
        raise InputError("--prompt or --system is not UTF-8 text: give it in the terminal's "
                         "encoding, or set that to UTF-8") from None


def print_stream(cfg: Config, model, tokenizer, prompt: list[int], seed: int):
    """Prints the continuation as it comes -> its ids (EOS left out), and the seconds it took."""
    stops = stop_ids(model, tokenizer)
    ids = []
    text = tokenizer.decode(prompt)
    shown = len(text)
    started = time.time()
    choice = (cfg.temperature, cfg.top_k, cfg.top_p)
    for token in stream(model, [prompt], cfg.max_new_tokens, *choice, seed):
        if int(token) in stops:
            break
        ids.append(int(token))
        text = tokenizer.decode(prompt + ids)
        whole = text.rstrip("\ufffd")  # half a character waits for its other bytes
        print(whole[shown:], end="", flush=True)
        shown = max(shown, len(whole))
    print(text[shown:])  # half a character that no byte completes any more
    return ids, time.time() - started


class Conversation:
    """Messages in, answers out, history included. What no longer fits the model's context is
    forgotten, oldest first."""

    def __init__(self, cfg: Config, model, tokenizer):
        self.cfg = cfg
        self.model = model
        self.tokenizer = tokenizer
        self.template = load_chat_template(cfg.checkpoint)
        if self.template is None:
            raise InputError(f"{cfg.checkpoint} has no chat template: it is no chat model; "
                             "leave --chat out")
        self.system = [{"role": "system", "content": cfg.system}] if cfg.system else []
        self.turns = []  # user, assistant, user, ...
        self.answered = 0
        self.forgets = False

    def hold(self) -> None:
        if self.cfg.prompt is not None:
            self.answer(self.cfg.prompt)
            return
        while question := ask():
            print("model> ", end="")
            try:
                self.answer(question)
            except InputError as error:  # it alone is too long, or the template refuses it
                print(f"({error})")

    def answer(self, question: str) -> None:
        turns = [*self.turns, {"role": "user", "content": question}]
        kept, prompt = self.fit(turns)
        if len(kept) < len(turns) and not self.forgets:
            print("(longer than the model's context: the oldest turns are forgotten from now on)")
            self.forgets = True
        seed = self.cfg.seed + self.answered
        ids, _ = print_stream(self.cfg, self.model, self.tokenizer, prompt, seed)
        answer = {"role": "assistant", "content": self.tokenizer.decode(ids).strip()}
        self.turns = [*kept, answer]
        self.answered += 1

    def fit(self, turns: list[dict]) -> tuple[list[dict], list[int]]:
        """The latest turns that leave room for an answer, a question first, and their ids."""
        context = context_length(self.model)
        room = min(self.cfg.max_new_tokens, context // 2)
        while True:
            prompt = render_chat(self.template, self.system + turns, self.tokenizer)
            if len(prompt) + room <= context:
                return turns, prompt
            if len(turns) == 1:
                check_context(self.model, len(prompt))  # a shorter answer, or no room for any
                return turns, prompt
            turns = turns[2:]  # a question and its answer


def ask() -> str:
    """A line from the terminal; "" at its end."""
    try:
        return input("\nyou> ").strip()
    except EOFError:
        return ""


if __name__ == "__main__":
    cli(main, Config)
