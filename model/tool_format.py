"""How a checkpoint's prompts tell of tools and how its replies spell calls, as its chat template shows.

Owns: the formats that are known, and which of them a template has. Knows nothing of requests, messages, grammars and of
how a reply is read.

A reply is text, or text (perhaps none) and then calls: `opening`, calls with `between` between them, `closing`. A call
is `{"name": "NAME", "arguments": ARGUMENTS}`, spaced as json.dumps does, which is what these models were trained on.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

CALL_OPENING = '{"name": "'
CALL_MIDDLE = '", "arguments": '
CALL_CLOSING = "}"

# Phi-4-mini's: the system message has the tools, as text, in a field of their own.
_TOOLS_IN_MESSAGE = re.compile(r"message(?:s\[0\])?(?:\.tools\b|\[(['\"])tools\1\])")
_MARK = re.compile(r"<[^<>\s]+>")
_TOOLS_VARIABLE = re.compile(r"{%-?\s*(?:if|elif|for)\b[^%]*\btools\b")


@dataclass(frozen=True)
class ToolFormat:
    """`told`: who writes the tools into the prompt: the template, which gets them as its variable `tools` or as the
    system message's field `tools` (text), or, as a part of the system message's text, we. `result_role`: whose message
    a call's result is; a user's is marked as a result in its text. `tokens`: the marks in all these that are tokens of
    their own."""

    opening: str
    between: str
    closing: str
    told: Literal["variable", "field", "text"]
    result_role: Literal["tool", "tool_response", "user"]
    tokens: tuple[str, ...] = ()


def _hermes(told: Literal["variable", "text"], result_role: Literal["tool", "user"]) -> ToolFormat:
    return ToolFormat("<tool_call>\n", "\n</tool_call>\n<tool_call>\n", "\n</tool_call>", told, result_role)


# Qwen's, Hermes' and many others'.
HERMES = _hermes("variable", "tool")
PHI4 = ToolFormat("<|tool_call|>[", ", ", "]<|/tool_call|>", "field", "tool_response")
# Of models that were not trained for tools, or spell calls in another way: Hermes' form is the one seen most.
OURS = _hermes("text", "user")


def tool_format_of(template: str | None, added_tokens: Collection[str] = ()) -> ToolFormat:
    """By the source of a chat template. `added_tokens` of the tokenizer, as far as replies show them."""
    found = _by_template(template)
    marks = _MARK.findall(found.opening + found.between + found.closing)
    return replace(found, tokens=tuple(dict.fromkeys(mark for mark in marks if mark in added_tokens)))


def _by_template(template: str | None) -> ToolFormat:
    if template is None:
        return OURS
    if "<|tool|>" in template and _TOOLS_IN_MESSAGE.search(template):
        return PHI4
    # Some (Qwen3-Coder) have XML within the same marks.
    if "<tool_call>" in template and "<function=" not in template and _TOOLS_VARIABLE.search(template):
        return HERMES
    return OURS
