"""Talk to a checkpoint: any folder in Hugging Face layout that minilm reads, or what train.py wrote.

    python sample.py --prompt "def main("                                     # out/, the result of python train.py
    python sample.py --checkpoint DIR --prompt "Once upon a time" --temperature 0.8 --top-p 0.95 --num-samples 3
    python sample.py --checkpoint DIR --chat                                  # a conversation, in the folder's own chat template
"""

import sys
import time
from dataclasses import dataclass

from minilm import InputError
from minilm.chat import load_chat_template, render_chat
from minilm.generate import check_sampling, stop_ids, stream
from minilm.results import cli
from minilm.training import pick_device
from minilm.weights import DTYPES, load_pretrained


@dataclass(frozen=True)
class Config:
    checkpoint: str = "out"  # folder with config.json, model.safetensors and tokenizer.json
    prompt: str = "\n"  # text to continue
    chat: bool = False  # read messages from the terminal and answer them, history included (an empty line or Ctrl-D ends)
    system: str | None = None  # system message of the conversation
    max_new_tokens: int = 256  # per sample or answer
    temperature: float = 0.8  # 0: always the most probable token
    top_k: int | None = None  # draw from the k most probable tokens only
    top_p: float | None = None  # draw from the smallest set of tokens with this total probability
    num_samples: int = 1  # continuations of the prompt
    seed: int = 0  # of the draws; sample i uses seed + i
    dtype: str = "float32"  # float32, bfloat16 or float16
    device: str = "auto"  # auto (cuda, else cpu), cpu, cuda, mps


def check(cfg: Config) -> None:
    if cfg.dtype not in DTYPES:
        raise InputError(f"--dtype {cfg.dtype}: use {', '.join(DTYPES)}")
    if cfg.max_new_tokens < 1 or cfg.num_samples < 1:
        raise InputError(f"--max-new-tokens {cfg.max_new_tokens} and --num-samples {cfg.num_samples}: give 1 or more of each")
    check_sampling(cfg.temperature, cfg.top_k, cfg.top_p)
    try:
        f"{cfg.prompt}{cfg.system}".encode()
    except UnicodeEncodeError:
        raise InputError("--prompt or --system is not UTF-8 text: give it in the terminal's encoding, or set that to UTF-8") from None


def print_stream(cfg: Config, model, tokenizer, prompt: list[int], seed: int) -> tuple[list[int], float]:
    """Prints the continuation as it comes; returns its ids (EOS left out) and the seconds it took."""
    stops = stop_ids(model, tokenizer)
    ids, shown, started = [], len(tokenizer.decode(prompt)), time.time()
    for token in stream(model, [prompt], cfg.max_new_tokens, cfg.temperature, cfg.top_k, cfg.top_p, seed):
        if int(token) in stops:
            break
        ids.append(int(token))
        text = tokenizer.decode(prompt + ids).rstrip("\ufffd")  # half a character waits for its other bytes
        print(text[shown:], end="", flush=True)
        shown = max(shown, len(text))
    print()
    return ids, time.time() - started


def converse(cfg: Config, model, tokenizer) -> None:
    template = load_chat_template(cfg.checkpoint)
    if template is None:
        raise InputError(f"{cfg.checkpoint} has no chat template: it is no chat model; leave --chat out and give a --prompt")
    messages = [{"role": "system", "content": cfg.system}] if cfg.system else []
    while True:
        try:
            question = input("\nyou> ").strip()
        except EOFError:
            question = ""
        except UnicodeDecodeError:
            raise InputError("the message is not UTF-8 text: set the terminal's encoding to UTF-8") from None
        if not question:
            return
        messages.append({"role": "user", "content": question})
        print("model> ", end="")
        ids, _ = print_stream(cfg, model, tokenizer, render_chat(template, messages, tokenizer), cfg.seed + len(messages))
        messages.append({"role": "assistant", "content": tokenizer.decode(ids).strip()})


def main(cfg: Config) -> None:
    check(cfg)
    model, tokenizer = load_pretrained(cfg.checkpoint, DTYPES[cfg.dtype], pick_device(cfg.device))
    if tokenizer is None:
        raise InputError(f"{cfg.checkpoint} has no tokenizer.json: add the one the model was trained with")
    if cfg.chat:
        return converse(cfg, model, tokenizer)
    prompt = tokenizer.encode(cfg.prompt, bos=tokenizer.add_bos)
    count, seconds = 0, 0.0
    for i in range(cfg.num_samples):
        print(cfg.prompt, end="", flush=True)
        ids, took = print_stream(cfg, model, tokenizer, prompt, cfg.seed + i)
        count, seconds = count + len(ids), seconds + took
        print("-" * 40)
    print(f"{count} tokens, {count / max(seconds, 1e-9):,.0f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    cli(main, Config)
