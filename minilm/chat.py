"""Conversations: the folder's own chat template, rendered to token ids.

A template is a small program that comes with a checkpoint, so it runs in jinja2's sandbox: it can
read the messages, the names of the tokenizer's own tokens and the clock. Its own text may hold
control tokens; what stands in a message never becomes one, be it content, role or name: no token
flagged special, none that the tokenizer's configuration names, and none that the template's text
holds. (Those of the last kind only the assistant's own turns may hold, since a template may take
them apart: "</think>".) Not looked at are the usual roles, which are the program's own words, and
the keys inside a message. A template that searches a message for a control token does not find
it."""

import json
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import jinja2
import regex
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from minilm import InputError
from minilm.data import find_checkpoint, read_json, read_text, reading
from minilm.tokenizer_json import named

# What a program writes in these two fields; anything else there is a user's text.
WORDS = {
    "role": ("system", "user", "assistant", "tool", "function", "developer", "ipython", "model"),
    "type": ("text", "function", "image", "audio", "video"),
}


def load_chat_template(folder: str | Path) -> str | None:
    """The template of chat_template.jinja or tokenizer_config.json ("default", if there are
    several); None if the folder has none."""
    folder = find_checkpoint(folder)
    if folder.suffix == ".gguf":
        from minilm.gguf import open_gguf  # needs the extra `gguf`

        template = open_gguf(folder)[1].get("tokenizer.chat_template")
        with reading(folder):
            return _as_text(template)
    file, config = folder / "chat_template.jinja", folder / "tokenizer_config.json"
    if file.exists():
        return read_text(file)
    template = read_json(config).get("chat_template") if config.exists() else None
    with reading(config):
        if isinstance(template, list):
            several = {t["name"]: t["template"] for t in template}
            if several and "default" not in several:
                raise InputError(f"chat_template has {', '.join(map(str, several))}, but no "
                                 "'default': name one of them so")
            template = several.get("default")
        return _as_text(template)


def _as_text(template) -> str | None:
    if not isinstance(template, str | None):
        raise InputError(f"chat_template {template!r} must be a text")
    return template


class Generation(Extension):
    """{% generation %} ... {% endgeneration %} marks what an assistant says; it prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        # a block of its own: what is set inside stays inside
        return jinja2.nodes.CallBlock(self.call_method("_print"), [], [], body).set_lineno(line)

    def _print(self, caller):
        return caller()


def to_json(x, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    """The filter `tojson`: jinja2's own would escape HTML."""
    return json.dumps(x, ensure_ascii=ensure_ascii, indent=indent, separators=separators,
                      sort_keys=sort_keys)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def complain(message: str):
    raise InputError(f"the chat template refuses these messages: {message}")


def render_text(template: str, messages: list[dict], answer: bool = True, **variables) -> str:
    """The template's text for messages [{"role", "content"}]; `answer` opens the assistant's turn.
    It sees what transformers' renderer gives it. Its own complaint is an InputError."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[Generation, "jinja2.ext.loopcontrols"],
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = complain
    environment.globals["strftime_now"] = strftime_now
    given = {"tools": None, "documents": None, "add_generation_prompt": answer, **variables}
    try:
        return environment.from_string(template).render(messages=_seen(messages), **given)
    except InputError:
        raise
    except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, MemoryError,
            RuntimeError, SyntaxError, TypeError, ValueError) as error:
        # broken, or leaves the sandbox; SyntaxError: {% break %} outside a loop
        raise InputError(f"the chat template cannot be rendered ({error})") from None


REASONING = ("reasoning_content", "thinking", "reasoning")


def _seen(messages: list[dict]) -> list[dict]:
    """Messages as a template sees them: a field that is None is not there, and a reasoning, which
    goes by three names, is found under the first two."""
    seen = []
    for message in messages:
        message = {key: value for key, value in message.items() if value is not None}
        said = [message[key] for key in REASONING if key in message]
        if said:
            message = {"thinking": said[0], **message, "reasoning_content": said[0]}
        seen.append(message)
    return seen


def render_chat(template: str, messages: list[dict], tokenizer, answer: bool = True) -> list[int]:
    """Messages [{"role", "content"}] -> ids, as transformers' apply_chat_template gives them, but
    for control tokens inside messages: there, stand-ins that occur nowhere else take the place of
    one character each until the template's own tokens are found."""
    written = {t for t in tokenizer.added if t in template and not t.isspace()}
    control = tokenizer.special.keys() | written
    used = set("".join((template, *control, *_texts(messages))))
    free = (c for c in map(chr, range(0xE000, 0xF8FF)) if c not in used)
    stand_in = dict(zip(sorted(set("".join(control))), free))
    safe = []
    for message in messages:
        own = message.get("role") == "assistant"
        safe.append(_hidden(message, tokenizer.special if own else control, stand_in))
    text = render_text(template, safe, answer, **named(tokenizer.config))
    return tokenizer.encode_template(text, {ord(s): c for c, s in stand_in.items()})


def _texts(value) -> Iterable[str]:
    """Every text inside a message, whatever it is nested in."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list | tuple):
        for part in value.values() if isinstance(value, dict) else value:
            yield from _texts(part)


def _hidden(value, control: Iterable[str], stand_in: dict[str, str], key: str | None = None):
    """The same value, with the control tokens in all of its texts broken up."""
    if isinstance(value, str):
        return value if value in WORDS.get(key, ()) else _hide(value, control, stand_in)
    if isinstance(value, dict):
        return {k: _hidden(v, control, stand_in, k) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_hidden(v, control, stand_in) for v in value]
    return value


def _hide(text: str, control: Iterable[str], stand_in: dict[str, str]) -> str:
    """Replaces the first character of every control token in a text, and of every part of one that
    the template's words might complete: the "<|im_" of "see <|im_", the "|>" of "|> x", all of
    "INST" between a template's "[" and "]"."""
    core = text.strip()  # what a template's `trim` leaves
    hidden = list(text)
    n = len(core)
    blank = text.find(core)
    for token in control if core else ():
        k = len(token)
        before = range(1 - k, 0)  # it may start before the text,
        inside = (m.start() for m in regex.finditer(regex.escape(token), core, overlapped=True))
        late = range(max(0, n - k + 1), n)  # or so late that it goes on behind it
        for at in (*before, *inside, *late):
            if core[max(0, at) : at + k] == token[max(0, -at) : n - at]:
                hidden[blank + max(0, at)] = stand_in[core[max(0, at)]]
    return "".join(hidden)
