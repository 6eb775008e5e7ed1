"""Text to token ids and back, as the checkpoint's own tokenizer does it, with users' text kept harmless.

Owns: `Tokenizer`, what the edge needs of a checkpoint's text files. Knows nothing of torch, of the network,
of HTTP, or of sessions. Rendering is chat_template's, breaking up special tokens special_text's, decoding
detokenizer's.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tokenizers

from phi_cluster.model.chat_template import ChatTemplate, TemplateError
from phi_cluster.model.detokenizer import Decoding, Detokenizer
from phi_cluster.model.special_text import BREAK, SpecialText
from phi_cluster.model.stop_strings import StopStrings
from phi_cluster.model.tool_format import tool_format_of

__all__ = ["BREAK", "Detokenizer", "StopStrings", "TemplateError", "Tokenizer"]

# A template puts a role beside its own text, as in '<|' + role + '|>': free text there could form a special
# token.
_ROLES = ("system", "developer", "user", "assistant", "tool", "tool_response", "function", "ipython")
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """A checkpoint's tokenizer. `vocab_size` is one more than the highest id that has a text. "Rendered" text
    is text that may hold BREAKs: all but its users' parts is trusted."""

    def __init__(
        self,
        description: Mapping[str, Any],
        config: Mapping[str, Any],
        chat_template: str | None = None,
        eos_token_ids: Sequence[int] = (),
    ) -> None:
        """From the contents of tokenizer.json and tokenizer_config.json. Raises ValueError for a decoder that
        is not supported and for a broken description, and TemplateError for a template that cannot be
        compiled."""
        self._tokenizer = _build({**description, "truncation": None, "padding": None})
        middle = {**description, "truncation": None, "padding": None}
        middle["normalizer"] = _without_prefix(description.get("normalizer"))
        middle["pre_tokenizer"] = _without_prefix(description.get("pre_tokenizer"))
        has_prefix = any(middle[name] != description.get(name) for name in ("normalizer", "pre_tokenizer"))
        # For text that goes on in the middle; None where that makes no difference.
        self._middle = _build(middle) if has_prefix else None
        self._added = self._tokenizer.get_added_tokens_decoder()
        # Not the number of tokens: there may be gaps below the added ones (Phi-4-mini).
        self.vocab_size = 1 + max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
        self._specials = frozenset(i for i, token in self._added.items() if token.special)
        self._decoding = Decoding(description.get("decoder"), self._plain_piece)

        named = {name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None}
        self.bos_token_id = self._id_of(named.get("bos_token"))
        own_eos = self._id_of(named.get("eos_token"))
        ends = [*([] if own_eos is None else [own_eos]), *eos_token_ids]
        self.eos_token_ids: tuple[int, ...] = tuple(dict.fromkeys(i for i in ends if i < self.vocab_size))

        special = {self._added[i].content for i in self._specials}
        # Phi-4-mini's tool marks are added tokens that are not called special but are as good as.
        special |= {t.content for t in self._added.values() if t.content[:2] == "<|" and t.content[-2:] == "|>"}
        self._special_text = SpecialText(special)
        self._template = None if chat_template is None else ChatTemplate(chat_template, named)
        # How its prompts and replies spell tools and calls.
        shown = {token.content for i, token in self._added.items() if i not in self._specials}
        self.tool_format = tool_format_of(chat_template, shown)
        # So are those that the template writes itself. Only replies may hold them: a template takes such a
        # reply apart.
        spoken = {t.content for t in self._added.values() if t.content in (chat_template or "")}
        self._guarded_text = SpecialText(special | {text for text in spoken if not text.isspace()})
        self._before, self._after = self._surroundings()

    @classmethod
    def from_folder(cls, folder: str | Path) -> Tokenizer:
        """Reads tokenizer.json, tokenizer_config.json, chat_template.jinja and the end tokens of
        generation_config.json (else config.json). Raises ValueError naming a file that is missing or
        broken."""
        folder = Path(folder)
        config = _read_json(folder / "tokenizer_config.json", optional=True)
        names = _read_json(folder / "special_tokens_map.json", optional=True)
        generation = _read_json(folder / "generation_config.json", optional=True)
        network = _read_json(folder / "config.json", optional=True)
        ends = generation.get("eos_token_id", network.get("eos_token_id"))
        if not isinstance(ends, list):
            ends = [] if ends is None else [ends]
        return cls(_read_json(folder / "tokenizer.json"), {**names, **config}, _read_template(folder, config), ends)

    @property
    def has_chat_template(self) -> bool:
        """Whether `render_chat` is possible."""
        return self._template is not None

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Any] | None = None,
        **variables: Any,
    ) -> str:
        """The conversation as the checkpoint's template writes it, with users' special tokens broken up.
        Messages, tools and variables are plain JSON data. Raises TemplateError, also for a role that is
        none."""
        if self._template is None:
            raise TemplateError("this model has no chat template, so it can only complete plain prompts")
        for message in messages:
            if message.get("role") not in _ROLES:
                raise TemplateError(f"role is {message.get('role')!r}, expected is one of {', '.join(_ROLES)}")
        try:
            marked = [
                (self._special_text if message["role"] == "assistant" else self._guarded_text).mark(dict(message))
                for message in messages
            ]
            marked_tools = self._guarded_text.mark(tools)
            marked_variables = {name: self._guarded_text.mark(value) for name, value in variables.items()}
        except TypeError as error:
            raise TemplateError(f"messages, tools and template variables: {error}") from error
        rendered = self._template.render(
            marked,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            tools=marked_tools,
            **marked_variables,
        )
        return self._guarded_text.settle(rendered)

    def sanitize(self, text: str) -> str:
        """Free text (a reply, a raw prompt) as rendered text, in which it never holds a special token."""
        return self._special_text.sanitize(text)

    def encode(self, rendered: str, previous_id: int | None = None) -> list[int]:
        """The ids of rendered text; nothing is put in front of it or behind it.

        `previous_id` is the id that it follows: after a special token it may lose whitespace or gain a space,
        after any other it goes on in the middle of a text; None means the text begins here. Without BREAKs
        and `previous_id` this is `tokenizers`' `encode(..., add_special_tokens=False)`.
        """
        ids: list[int] = []
        for part in rendered.split(BREAK):
            if part:
                ids += self._encode_part(part, ids[-1] if ids else previous_id)
        return ids

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a raw prompt with what the tokenizer puts around a text (a begin token), as Hugging
        Face's `tokenizer(text)` does, except that special tokens in it stay text."""
        return self.surrounded(self.encode(self.sanitize(text)))

    def surrounded(self, ids: Sequence[int]) -> list[int]:
        """The ids of a text with what the tokenizer puts around any."""
        return [*self._before, *ids, *self._after]

    def detokenizer(self, previous_id: int | None = None) -> Detokenizer:
        """A new one, for the ids of one reply. Its text is that of `decode(ids)`. If the reply goes on in the
        middle of a text (`previous_id`, the id it follows, is no special token) a leading space is kept."""
        middle = previous_id is not None and previous_id not in self._added
        return self._decoding.detokenizer(middle)

    def decode(self, ids: Sequence[int], *, with_special: bool = False) -> str:
        """The text of ids, special tokens left out or (`with_special`) by their names."""
        return self._tokenizer.decode(list(ids), skip_special_tokens=not with_special)

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes that a token stands for (a part of a character, maybe); a special token's are its
        name's."""
        if token_id in self._specials:
            return self._added[token_id].content.encode()
        return self._decoding.token_bytes(token_id)

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text, parts of characters as U+FFFD."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_name(self, token_id: int) -> str:
        """The token as tokenizer.json writes it (a space may be U+0120 or U+2581); "" for an id without a token."""
        return self._tokenizer.id_to_token(token_id) or ""

    def is_special(self, token_id: int) -> bool:
        """Whether the token is left out of decoded text."""
        return token_id in self._specials

    def _encode_part(self, part: str, previous_id: int | None) -> list[int]:
        if previous_id in self._added:
            # Behind the token's own text, so that its rules apply.
            ids = self._ids(self._added[previous_id].content + part)
            if ids[:1] == [previous_id]:
                return ids[1:]
        if self._middle is None or previous_id is None:
            return self._ids(part)
        # A prefix space must not come in front of the text's continuation, but must in front of what follows
        # the next special token.
        encoding = self._tokenizer.encode(part, add_special_tokens=False)
        starts = (start for i, (start, _) in zip(encoding.ids, encoding.offsets, strict=True) if i in self._added)
        at = next(starts, len(part))
        head = self._middle.encode(part[:at], add_special_tokens=False).ids
        return head + (self._ids(part[at:]) if at < len(part) else [])

    def _ids(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def _id_of(self, text: str | None) -> int | None:
        return None if text is None else self._tokenizer.token_to_id(text)

    def _plain_piece(self, token_id: int) -> str | None:
        return None if token_id in self._specials else self._tokenizer.id_to_token(token_id)

    def _surroundings(self) -> tuple[list[int], list[int]]:
        """What the post-processor puts in front of any text and behind it."""
        encoding = self._tokenizer.encode("a", add_special_tokens=True)
        plain = [i for i, mask in enumerate(encoding.special_tokens_mask) if not mask]
        if not plain:
            return [], []
        return encoding.ids[: plain[0]], encoding.ids[plain[-1] + 1 :]


def _build(description: Mapping[str, Any]) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_str(json.dumps(description))
    except Exception as error:  # the library raises bare Exception
        raise ValueError(f"tokenizer.json cannot be used: {error}") from error


def _without_prefix(part: Any) -> Any:
    """A normalizer's or pre-tokenizer's description without anything that adds a space in front of a text."""
    if not isinstance(part, Mapping):
        return part
    kind = part.get("type")
    if kind == "Prepend":
        return None
    if kind == "Metaspace":
        return {**part, "prepend_scheme": "never"}
    if kind == "ByteLevel":
        return {**part, "add_prefix_space": False}
    for name in ("normalizers", "pretokenizers"):
        if name in part:
            return {**part, name: [step for step in map(_without_prefix, part[name]) if step is not None]}
    return part


def _token_text(value: Any) -> str | None:
    """A named token in tokenizer_config.json: its text, or an object that has it as content."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _read_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else what tokenizer_config.json holds: one template, or several of which we take
    "default"; else the older chat_template.json."""
    path = folder / "chat_template.jinja"
    if path.is_file():
        return path.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None:
        template = _read_json(folder / "chat_template.json", optional=True).get("chat_template")
    if isinstance(template, list):
        template = {item["name"]: item["template"] for item in template}.get("default")
    return template


def _read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if optional:
            return {}
        raise ValueError(f"{path} is missing: the checkpoint needs a fast tokenizer's file") from error
    except ValueError as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if not isinstance(fields, dict):
        raise ValueError(f"{path} is broken: an object is expected")
    return fields
