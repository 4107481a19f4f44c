"""Conversations: the folder's own chat template, rendered to token ids.

A template is a small program that comes with a checkpoint, so it runs in jinja2's sandbox: it can read the messages and nothing else. Its
own text may hold special tokens; what a user wrote never becomes one, whatever it looks like.
"""

import json
from datetime import datetime
from pathlib import Path

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilm import InputError
from minilm.data import read_json


def load_chat_template(folder: str | Path) -> str | None:
    """The template of chat_template.jinja or tokenizer_config.json ("default", if there are several); None if the folder has none."""
    folder = Path(folder)
    if (folder / "chat_template.jinja").exists():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    if not (folder / "tokenizer_config.json").exists():
        return None
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    if isinstance(template, list):
        template = next((t["template"] for t in template if t["name"] == "default"), None)
    return template


def render_text(template: str, messages: list[dict], answer: bool = True, **variables) -> str:
    """The template's text for messages [{"role", "content"}]; `answer` opens the assistant's turn. Raises InputError with the template's
    own complaint (roles out of order, say)."""
    def complain(message):
        raise InputError(f"the chat template refuses these messages: {message}")

    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"])
    environment.filters["tojson"] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
    environment.globals.update(raise_exception=complain, strftime_now=lambda form: datetime.now().strftime(form))
    try:
        return environment.from_string(template).render(messages=messages, add_generation_prompt=answer, **variables)
    except jinja2.TemplateError as error:  # broken syntax, or an attempt to leave the sandbox
        raise InputError(f"the chat template cannot be rendered ({error})") from None


def render_chat(template: str, messages: list[dict], tokenizer, answer: bool = True) -> list[int]:
    """Messages [{"role", "content"}] -> ids, as transformers' apply_chat_template gives them, but for special tokens inside contents:
    these are broken up by a mark that no content holds, and the mark is taken out again once the template's own tokens are found."""
    mark = next(c for c in map(chr, range(0xE000, 0xF8FF)) if not any(c in m["content"] for m in messages))
    safe = [{**m, "content": _break_up(m["content"], tokenizer.special, mark)} for m in messages]
    names = {token: next((text for text, i in tokenizer.special.items() if i == id_), "")
             for token, id_ in (("bos_token", tokenizer.bos_id), ("eos_token", tokenizer.eos_id))}
    return tokenizer.encode_template(render_text(template, safe, answer, **names), mark)


def _break_up(content: str, special: dict[str, int], mark: str) -> str:
    """Puts `mark` behind the first character of every special token in the content, and of the beginning of one at its end, which the
    template's next words might complete."""
    for token in special:
        content = content.replace(token, token[0] + mark + token[1:])
        tail = max((k for k in range(1, len(token)) if content.endswith(token[:k])), default=0)
        if tail:
            content = content[: len(content) - tail + 1] + mark + content[len(content) - tail + 1 :]
    return content
