"""Conversations: the folder's own chat template, rendered to token ids.

A template is a small program that comes with a checkpoint, so it runs in jinja2's sandbox: it can read the messages and nothing else. Its
own text may hold special tokens; what a user wrote never becomes one, whatever it looks like."""

import json
import re
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilm import InputError
from minilm.data import read_json, read_text, reading
from minilm.weights import find_checkpoint


def load_chat_template(folder: str | Path) -> str | None:
    """The template of chat_template.jinja or tokenizer_config.json ("default", if there are several); None if the folder has none."""
    folder = find_checkpoint(folder)
    if folder.suffix == ".gguf":
        from minilm.gguf import open_gguf  # needs the extra `gguf`

        return open_gguf(folder)[1].get("tokenizer.chat_template")
    file, config = Path(folder) / "chat_template.jinja", Path(folder) / "tokenizer_config.json"
    if file.exists():
        return read_text(file)
    template = read_json(config).get("chat_template") if config.exists() else None
    with reading(config):
        if isinstance(template, list):
            template = {t["name"]: t["template"] for t in template}.get("default")
        if not isinstance(template, str | None):
            raise InputError(f"chat_template {template!r} must be a text")
    return template


def render_text(template: str, messages: list[dict], answer: bool = True, **variables) -> str:
    """The template's text for messages [{"role", "content"}]; `answer` opens the assistant's turn. Its own complaint is an InputError."""
    def complain(message):
        raise InputError(f"the chat template refuses these messages: {message}")
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=complain, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=answer, **variables)
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError) as error:  # broken, or leaves the sandbox
        raise InputError(f"the chat template cannot be rendered ({error})") from None


def render_chat(template: str, messages: list[dict], tokenizer, answer: bool = True) -> list[int]:
    """Messages [{"role", "content"}] -> ids, as transformers' apply_chat_template gives them, but for special tokens inside contents:
    there, stand-ins that occur nowhere else take the place of one character each until the template's own tokens are found."""
    used = "".join((template, *tokenizer.special, *(m["content"] for m in messages)))
    free = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)
    stand_in = dict(zip(sorted(set("".join(tokenizer.special))), free))
    safe = [{**m, "content": _hide(m["content"], tokenizer.special, stand_in)} for m in messages]
    names = {token: next((text for text, i in tokenizer.special.items() if i == id_), "")
             for token, id_ in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))}
    return tokenizer.encode_template(render_text(template, safe, answer, **names), {ord(s): c for c, s in stand_in.items()})


def _hide(content: str, special: Iterable[str], stand_in: dict[str, str]) -> str:
    """Replaces the first character of every special token in a content, and of every part of one that the template's words might complete:
    the "<|im_" of "see <|im_", the "|>" of "|> x", all of "INST" between a template's "[" and "]"."""
    core = content.strip()  # what a template's `trim` leaves
    hidden, n, blank = list(content), len(core), content.find(core)
    for token in special if core else ():
        k = len(token)  # it may start before the content, inside (also twice, overlapping), or so late that it goes on behind it
        starts = [*range(1 - k, 0), *(m.start() for m in re.finditer(f"(?={re.escape(token)})", core)), *range(max(0, n - k + 1), n)]
        for at in starts:
            if core[max(0, at) : at + k] == token[max(0, -at) : n - at]:
                hidden[blank + max(0, at)] = stand_in[core[max(0, at)]]
    return "".join(hidden)
