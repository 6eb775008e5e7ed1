"""Renders a checkpoint's chat template in a sandbox.

Owns: the Jinja environment that chat templates expect (as transformers sets it up), and limits on what a
template may do. Knows nothing of tokens, and nothing of special tokens except their names.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from jinja2 import TemplateError as JinjaError
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError

# Behind the text to be continued, so that it can be found again in what the template made of it.
_CONTINUE_HERE = "CONTINUE_FINAL_MESSAGE_TAG "
_MAX_STEPS = 1_000_000
_MAX_REPEATED = 1_000_000


class TemplateError(ValueError):
    """The template cannot be used, or it refuses these messages; the message is one sentence."""


class ChatTemplate:
    """One compiled template. `special_tokens` (bos_token, eos_token, ...) are visible to it as variables."""

    def __init__(
        self,
        source: str,
        special_tokens: Mapping[str, str],
        now: Callable[[], datetime] = datetime.now,
        max_steps: int = _MAX_STEPS,
    ) -> None:
        self.source = source
        self._special_tokens = dict(special_tokens)
        self._environment = _Environment(now, max_steps)
        try:
            self._template = self._environment.from_string(source)
        except JinjaError as error:
            raise TemplateError(f"the chat template cannot be read: {error}") from error

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """What transformers' `apply_chat_template(tokenize=False)` gives. All values must be plain data,
        because the template can reach into them. With `continue_final_message` the text ends where the last
        message's does. Raises TemplateError."""
        if continue_final_message:
            if add_generation_prompt:
                raise TemplateError("add_generation_prompt and continue_final_message exclude each other")
            messages, content = _tagged(messages)
        self._environment.begin()
        try:
            rendered = self._template.render(
                **self._special_tokens,
                **{"documents": None, **variables},
                messages=list(messages),
                tools=tools,
                add_generation_prompt=add_generation_prompt,
            )
        except _Refused as error:
            raise TemplateError(f"the chat template refuses these messages: {error}") from error
        except RecursionError as error:
            raise TemplateError("the chat template nests too deeply") from error
        except Exception as error:  # it is a stranger's program: whatever it runs into, the server lives
            raise TemplateError(f"the chat template fails on these messages: {error}") from error
        return _cut(rendered, content) if continue_final_message else rendered


def _tagged(messages: Sequence[Mapping[str, Any]]) -> tuple[list[Mapping[str, Any]], str]:
    """The messages with a tag behind the last one's text, and that text."""
    content = messages[-1].get("content") if messages else None
    tagged: Any
    if isinstance(content, str):
        text, tagged = content, content + _CONTINUE_HERE
    elif isinstance(content, list) and content and isinstance(content[-1], dict) and "text" in content[-1]:
        text = content[-1]["text"]
        tagged = [*content[:-1], content[-1] | {"text": text + _CONTINUE_HERE}]
    else:
        raise TemplateError("there is no final message with text to continue")
    return [*messages[:-1], {**messages[-1], "content": tagged}], text


def _cut(rendered: str, content: str) -> str:
    at = rendered.rfind(_CONTINUE_HERE.strip())
    if at < 0 or content.strip() not in rendered:
        raise TemplateError("the chat template changes the final message, so it cannot be continued")
    # A template that trims messages has trimmed the tag's space as well.
    keeps_space = rendered.startswith(_CONTINUE_HERE, at)
    return rendered[:at] if keeps_space else rendered[:at].rstrip()


class _Refused(JinjaError):
    """The template called `raise_exception`."""


class _Generation(Extension):
    """`{% generation %}...{% endgeneration %}`, which marks replies for training: just its body."""

    tags = {"generation"}  # noqa: RUF012 (Jinja's own declaration)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    """No access to Python's internals (the sandbox), and every loop turn and macro call counts against a
    limit."""

    intercepted_binops = frozenset({"*", "**"})

    def __init__(self, now: Callable[[], datetime], max_steps: int) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
        self._max_steps = max_steps
        self._steps = threading.local()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _refuse
        self.globals["strftime_now"] = lambda format: now().strftime(format)

    def begin(self) -> None:
        """A new rendering, in this thread, begins to count."""
        self._steps.left = self._max_steps

    def count_step(self) -> None:
        """Called by the compiled template."""
        self._steps.left -= 1
        if self._steps.left < 0:
            raise SecurityError(f"it takes more than {self._max_steps} steps")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(side) if isinstance(side, (str, list, tuple)) else side for side in (left, right)]
        numbers = all(isinstance(size, (int, float)) for size in sizes)
        if numbers and (abs(sizes[1]) > 64 if operator == "**" else abs(sizes[0] * sizes[1]) > _MAX_REPEATED):
            raise SecurityError(f"operator {operator} would make something too big")
        return super().call_binop(context, operator, left, right)

    def _generate(self, source: nodes.Template, *args: Any, **kwargs: Any) -> str:
        # Jinja's hook between parser and compiler.
        for node in source.find_all((nodes.For, nodes.Macro, nodes.CallBlock)):
            call = nodes.Call(nodes.EnvironmentAttribute("count_step"), [], [], None, None)
            node.body.insert(0, nodes.ExprStmt(call, lineno=node.lineno))  # type: ignore[attr-defined]
        source.set_environment(self)
        return super()._generate(source, *args, **kwargs)


def _refuse(message: str) -> None:
    raise _Refused(message)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
