"""Owns the Modelfile that Ollama makes a model of: the file, the prompt's template, what ends answers.

Ollama renders Go templates, and tokenizers carry Jinja ones. A chat template is asked for conversations with
marks for their texts; what stands between the marks is the Go template. llama.cpp puts BOS in front itself.

Refuses to know weights.

Source: https://docs.ollama.com/modelfile
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jinja2 import TemplateError

_SYSTEM, _USER, _ANSWER, _AGAIN = (f"\u241e{name}\u241e" for name in ("s", "u", "a", "v"))


@dataclass(frozen=True)
class TurnTexts:
    """The texts that a chat template puts around turns.

    start: before the first turn of the user. answer, after_answer: around what the assistant has said. ask:
    what asks for an answer. system, after_system: around what the system says, in place of `start`; None if
    the template takes no such turn there.
    """

    start: str
    answer: str
    after_answer: str
    ask: str
    system: str | None
    after_system: str | None

    def render(self, turns: list[tuple[str, str]]) -> str:
        """Render (role, content) of turns as the Go template does."""
        text = ""
        for place, (role, content) in enumerate(turns):
            if role == "system":
                text += f"{self.system}{content}{self.after_system}"
            elif role == "user":
                text += (self.start if place == 0 else "") + content
            else:
                text += self.answer + content + self.after_answer
        return text + self.ask


def turn_texts(tokenizer: Any, thinking: bool | None) -> TurnTexts | None:
    """Find the texts around turns in a tokenizer's chat template; None if it changes what turns say."""
    options = {} if thinking is None else {"enable_thinking": thinking}

    def render(*turns: tuple[str, str]) -> str:
        messages = [{"role": role, "content": content} for role, content in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True, **options)
        return str(text).removeprefix(tokenizer.bos_token or "")

    plain = (("user", _USER), ("assistant", _ANSWER), ("user", _AGAIN))
    found = _between(lambda: render(*plain), _USER, _ANSWER, _AGAIN)
    first = _between(lambda: render(("user", _USER)), _USER)
    if found is None or first is None or (found[0], found[3]) != (first[0], first[1]):
        return None
    start, answer, after_answer, ask = found
    led = _between(lambda: render(("system", _SYSTEM), *plain), _SYSTEM, _USER, _ANSWER, _AGAIN)
    system, after_system = (led[0], led[1]) if led is not None and led[2:] == found[1:] else (None, None)
    return TurnTexts(start, answer, after_answer, ask, system, after_system)


def modelfile(file: str, template: str | None, stops: list[str]) -> str:
    """Return a Modelfile's text; without a template, Ollama takes the one that the GGUF file carries."""
    lines = [f"FROM ./{file}"]
    if template is not None:
        lines.append(f'TEMPLATE """{template}"""')
    lines += [f"PARAMETER stop {_quoted(stop)}" for stop in stops]
    return "\n".join(lines) + "\n"


def template_of_text(before: str, behind: str) -> str:
    """Return the Go template of a plain prompt, of the texts before and behind the instruction."""
    return f"{_go(before)}{{{{ .Prompt }}}}{_go(behind)}"


def template_of_turns(texts: TurnTexts) -> str:
    """Return the Go template of a conversation."""
    said = "{{ $m.Content }}"
    system = f"{_go(texts.system or '')}{said}{_go(texts.after_system or '')}"
    user = f"{{{{ if eq $i 0 }}}}{_go(texts.start)}{{{{ end }}}}{said}"
    answer = f"{_go(texts.answer)}{said}{_go(texts.after_answer)}"
    return (
        f'{{{{ range $i, $m := .Messages }}}}{{{{ if eq $m.Role "system" }}}}{system}'
        f'{{{{ else if eq $m.Role "user" }}}}{user}{{{{ else }}}}{answer}{{{{ end }}}}{{{{ end }}}}'
        f"{_go(texts.ask)}"
    )


def _between(render: Callable[[], str], *marks: str) -> tuple[str, ...] | None:
    """Return the texts before, between and behind marks, if each stands once and in this order."""
    try:
        text = render()
    except (TemplateError, ValueError):
        return None
    parts = []
    for mark in marks:
        if text.count(mark) != 1:
            return None
        before, _, text = text.partition(mark)
        parts.append(before)
    return (*parts, text)


def _go(text: str) -> str:
    """Write a text for a Go template in a Modelfile: braces and quotes that would mean something apart."""
    marked = text.replace("{{", '{{ "{{" }}') if "{{" in text else text
    return marked.replace('"""', '{{ "\\"\\"\\"" }}')


def _quoted(text: str) -> str:
    """Quote a text as a Modelfile's parameter."""
    return '"' + text.replace('"', '\\"') + '"'
