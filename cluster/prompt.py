"""What a request asks for, as an engine needs it: its prompt as text and ids, and complete sampling parameters.

Owns: rendering, encoding what is new of a prompt, and the limits of a reply's length. Knows nothing of sessions'
whereabouts, engines or Ray.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from typing import Any

from phi_cluster.cluster.errors import ContextOverflow, InvalidRequest
from phi_cluster.cluster.messages import TurnGrant
from phi_cluster.cluster.tool_prompt import template_input
from phi_cluster.cluster.truncation import fewest_to_remove, num_removable, without_oldest
from phi_cluster.cluster.turn_api import TurnRequest
from phi_cluster.model.tokenizer import TemplateError, Tokenizer

# Prompts given as ids are "rendered" as digits behind this noncharacter, so that they match only their like.
_IDS_MARK = "\ufdd1"
# Room for a reply whose length nobody limits, in tokens: where the oldest turns are left out, one of a single token
# would fit too early. At most a quarter of the context.
_REPLY_ROOM = 512
# Each is computed anew, and told in one message.
_MAX_ECHO_LOGPROBS = 8192


class PromptReader:
    """For any thread."""

    def __init__(self, tokenizer: Tokenizer, max_model_len: int):
        self._tokenizer = tokenizer
        self._max_model_len = max_model_len

    def render(self, request: TurnRequest) -> str:
        """The whole prompt as text. Raises InvalidRequest if the template refuses it."""
        if request.messages is not None:
            tokenizer = self._tokenizer
            given = template_input(request.messages, request.tool_use, tokenizer.tool_format, tokenizer.sanitize)
            try:
                return tokenizer.render_chat(
                    given.messages,
                    add_generation_prompt=request.add_generation_prompt,
                    continue_final_message=request.continue_final_message,
                    tools=given.tools,
                )
            except TemplateError as error:
                raise InvalidRequest(str(error), param="messages") from None
        assert request.prompt is not None
        if isinstance(request.prompt, str):
            return self._tokenizer.sanitize(request.prompt)
        return _IDS_MARK + "".join(f"{token_id} " for token_id in request.prompt)

    def echoed(self, request: TurnRequest, token_ids: list[int]) -> str:
        """The prompt as it is told: a text as it came, ids as what they say, special tokens by their names."""
        assert request.messages is None
        if isinstance(request.prompt, str):
            return request.prompt
        return self._tokenizer.decode(token_ids, with_special=True)

    def truncated(self, request: TurnRequest) -> TurnRequest:
        """The request without the oldest turns that do not fit with a reply. Takes milliseconds per thousand tokens;
        raises InvalidRequest as `render` does."""
        assert request.messages is not None
        wanted: int | None = request.sampling["max_tokens"]
        room = self._max_model_len - (min(_REPLY_ROOM, self._max_model_len // 4) if wanted is None else wanted)

        def fits(messages: list[dict[str, Any]]) -> bool:
            text = self.render(replace(request, messages=messages))
            # No token is shorter than a byte.
            return len(text.encode("utf-8", "replace")) <= room or len(self._tokenizer.encode(text)) <= room

        return self.without_oldest(request, fewest_to_remove(request.messages, fits))

    def without_oldest(self, request: TurnRequest, num_turns: int = 1) -> TurnRequest:
        """The request without so many turns, or without fewer if there are not so many to leave out."""
        assert request.messages is not None
        num_turns = min(num_turns, num_removable(request.messages))
        return replace(request, messages=without_oldest(request.messages, num_turns))

    def encode(self, request: TurnRequest, grant: TurnGrant, text: str) -> tuple[int, int, list[int]]:
        """Returns (num_kept_tokens, num_kept_chars, new ids). Takes milliseconds per thousand tokens.

        Only chats are spliced at what is stored: their boundaries are whole messages. A raw prompt is encoded
        anew, since BPE may merge across a boundary; the engine still finds the ids that agree.
        """
        if request.messages is not None:
            tail = self._tokenizer.encode(text[grant.num_kept_chars :], previous_id=grant.last_kept_id)
            return grant.num_kept_tokens, grant.num_kept_chars, tail
        if isinstance(request.prompt, str):
            return 0, 0, self._tokenizer.encode_prompt(request.prompt)
        assert request.prompt is not None
        return 0, 0, list(request.prompt)

    def max_tokens(self, request: TurnRequest, num_prompt: int) -> int:
        """How long the reply may become. Raises ContextOverflow, and InvalidRequest for an empty prompt."""
        max_tokens: int | None = request.sampling["max_tokens"]
        room = self._max_model_len - num_prompt
        too_many = (1 if max_tokens is None else max(max_tokens, 1)) - room
        if too_many > 0:
            raise ContextOverflow(
                f"the model's context holds {self._max_model_len} tokens; the prompt has {num_prompt} and "
                f"{'at least 1' if max_tokens is None else max_tokens} more were asked for: {too_many} too many. "
                "Shorten the messages or lower max_tokens.",
                param="messages" if request.messages is not None else "prompt",
            )
        if request.echo and request.sampling.get("logprobs") is not None and num_prompt > _MAX_ECHO_LOGPROBS:
            raise InvalidRequest(
                f"echo with logprobs tells at most {_MAX_ECHO_LOGPROBS} tokens of a prompt, this one has {num_prompt}: "
                "send it in parts",
                param="echo",
            )
        if num_prompt == 0:
            raise InvalidRequest("the prompt is empty; give at least one token", param="prompt")
        return room if max_tokens is None else max_tokens

    def sampling(self, request: TurnRequest, max_tokens: int) -> dict[str, Any]:
        """The sampling parameters as model/sampling_params.py reads them, with a seed for sure: always the same one for
        a request, so that its reply can come out the same again."""
        seed = request.sampling["seed"]
        # The engine knows one list of stop ids: with ignore_eos the model's own end tokens are not on it.
        ends = () if request.sampling["ignore_eos"] else self._tokenizer.eos_token_ids
        stops = (*request.sampling["stop_token_ids"], *ends)
        grammar = {} if request.sampling.get("grammar") is None else {"grammar_end_ids": list(ends)}
        wants_prompt = request.echo and request.sampling.get("logprobs") is not None
        return (
            request.sampling
            | grammar
            | ({"prompt_logprobs": True} if wants_prompt else {})
            | {
                "seed": seed_of(request.request_id) if seed is None else seed,
                # No reply at all: the engine draws one token, which is nobody's.
                "max_tokens": max(max_tokens, 1),
                "ignore_eos": False,
                "stop_token_ids": list(dict.fromkeys(stops)),
                "logit_bias": [[token_id, bias] for token_id, bias in request.sampling["logit_bias"].items()],
            }
        )


def seed_of(name: str) -> int:
    """63 bits that nobody guesses who does not know the name: of a request, its id, which is random."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "big") >> 1
