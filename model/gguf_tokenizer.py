"""The vocabulary of a GGUF file as a tokenizer.json and tokenizer_config.json.

Owns: byte-level BPE (`gpt2`) with the pre-tokenizers we know, SentencePiece BPE (`llama`), special tokens and
the chat template. Knows nothing of weights, and does not encode anything itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from phi_cluster.model.byte_level import BYTE_OF_CHAR
from phi_cluster.model.config import UnsupportedModel
from phi_cluster.model.gguf_file import GGUFFile

# tokenizer.ggml.token_type
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
# Control tokens that end a reply whatever the metadata says (llama.cpp has the same list, and more).
_END_OF_REPLY = ("<|im_end|>", "<|end|>", "<|eot_id|>", "<|endoftext|>", "<|end_of_text|>")

# The regular expressions are those of the models' own tokenizer.json files, by llama.cpp's name for them.
_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_QWEN2 = _CL100K.replace(r"\p{N}{1,3}", r"\p{N}")
_O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"
_SPLITS: dict[str, str | None] = {
    # None: GPT-2's own expression, which ByteLevel has built in.
    "gpt-2": None,
    "phi-2": None,
    "smollm": _DIGITS,
    "starcoder": _DIGITS,
    "llama-bpe": _CL100K,
    "llama3": _CL100K,
    "llama-v3": _CL100K,
    "dbrx": _CL100K,  # Phi-4
    "qwen2": _QWEN2,
    "gpt-4o": _O200K,  # Phi-4-mini
}
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3")


@dataclass(frozen=True)
class TokenizerFiles:
    """Contents of tokenizer.json and tokenizer_config.json, and the ids that the other files repeat."""

    tokenizer: dict[str, Any]
    tokenizer_config: dict[str, Any]
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


def gguf_tokenizer(file: GGUFFile, vocab_size: int) -> TokenizerFiles:
    """Raises UnsupportedModel for a tokenizer or pre-tokenizer that is not known, naming it."""
    metadata = file.metadata
    tokens = _strings(file, "tokenizer.ggml.tokens")
    if tokens is None:
        raise UnsupportedModel(f"{file.path}: the metadata has no tokenizer.ggml.tokens")
    if len(tokens) > vocab_size:
        raise UnsupportedModel(
            f"{file.path}: tokenizer.ggml.tokens has {len(tokens)} entries, the embedding only {vocab_size}"
        )
    kinds = metadata.get("tokenizer.ggml.token_type") or [_NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise UnsupportedModel(f"{file.path}: tokenizer.ggml.token_type has {len(kinds)} entries, not {len(tokens)}")
    model_name = metadata.get("tokenizer.ggml.model")
    ids = {role: _token_id(file, role, len(tokens)) for role in ("bos", "eos", "eot", "eom", "unknown", "padding")}
    if model_name == "gpt2":
        parts = _byte_level_bpe(file, tokens, kinds)
        default_bos = metadata.get("tokenizer.ggml.pre") in _LLAMA3
    elif model_name == "llama":
        parts = _sentencepiece_bpe(file, tokens, kinds, ids["unknown"])
        default_bos = True
    else:
        raise UnsupportedModel(f"{file.path}: tokenizer.ggml.model is {model_name!r}, supported are gpt2 and llama")
    bos = ids["bos"] if metadata.get("tokenizer.ggml.add_bos_token", default_bos) else None
    tokenizer = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": _added_tokens(file, tokens, kinds),
        "post_processor": None if bos is None else _begin_with(tokens[bos], bos),
        **parts,
    }
    ends = [ids["eos"], ids["eot"], ids["eom"]]
    ends += [i for i, token in enumerate(tokens) if kinds[i] == _CONTROL and token in _END_OF_REPLY]
    config: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": metadata.get(f"{metadata['general.architecture']}.context_length"),
    }
    for name, role in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := ids[role]) is not None:
            config[f"{name}_token"] = tokens[token_id]
    if (template := _chat_template(file)) is not None:
        config["chat_template"] = template
    return TokenizerFiles(
        tokenizer, config, ids["bos"], tuple(dict.fromkeys(i for i in ends if i is not None)), ids["padding"]
    )


def _byte_level_bpe(file: GGUFFile, tokens: list[str], kinds: list[int]) -> dict[str, Any]:
    pre = file.metadata.get("tokenizer.ggml.pre")
    if pre not in _SPLITS:
        raise UnsupportedModel(
            f"{file.path}: tokenizer.ggml.pre is {pre!r}, supported are {', '.join(sorted(_SPLITS))}"
        )
    merges = _strings(file, "tokenizer.ggml.merges")
    if merges is None:
        raise UnsupportedModel(f"{file.path}: the metadata has no tokenizer.ggml.merges")
    # No byte is spelled with a space, so the one space in an entry parts its two pieces.
    pairs = [merge.split(" ", 1) for merge in merges]
    for i, token in enumerate(tokens):
        if kinds[i] == _NORMAL and not BYTE_OF_CHAR.keys() >= set(token):
            raise UnsupportedModel(f"{file.path}: tokenizer.ggml.tokens entry {i} is {token!r}, not spelled in bytes")
    split = _SPLITS[pre]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    if split is None:
        pre_tokenizer: dict[str, Any] = byte_level
    elif split == _DIGITS:
        digits = {"type": "Digits", "individual_digits": True}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [digits, byte_level]}
    else:
        regex = {"type": "Split", "pattern": {"Regex": split}, "behavior": "Isolated", "invert": False}
        pre_tokenizer = {"type": "Sequence", "pretokenizers": [regex, byte_level | {"use_regex": False}]}
    return {
        "normalizer": {"type": "NFC"} if pre == "qwen2" else None,
        "pre_tokenizer": pre_tokenizer,
        "decoder": byte_level | {"add_prefix_space": True},
        "model": _bpe(tokens, pairs, ignore_merges=pre in _LLAMA3),
    }


def _sentencepiece_bpe(file: GGUFFile, tokens: list[str], kinds: list[int], unknown_id: int | None) -> dict[str, Any]:
    scores = file.metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens):
        raise UnsupportedModel(f"{file.path}: the metadata has no tokenizer.ggml.scores for each token")
    adds_space = file.metadata.get("tokenizer.ggml.add_space_prefix", True)
    to_block: dict[str, Any] = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
    to_space = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
    decoders: list[dict[str, Any]] = [to_space, {"type": "ByteFallback"}, {"type": "Fuse"}]
    normalizer = to_block
    if adds_space:
        # As llama.cpp does for every SentencePiece model, and Phi-3's own tokenizer.json: one more space at
        # the start of the text and after each special token.
        normalizer = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "\u2581"}, to_block]}
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    model = _bpe(tokens, _merges_from_scores(tokens, kinds, scores), byte_fallback=True, fuse_unk=True)
    model["unk_token"] = None if unknown_id is None else tokens[unknown_id]
    return {
        "normalizer": normalizer,
        "pre_tokenizer": None,
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def _merges_from_scores(tokens: list[str], kinds: list[int], scores: list[float]) -> list[list[str]]:
    """Every way to make a token of two others, best score first (transformers' `generate_merges`).

    Only ordinary tokens take part: no merge may produce a control token out of a user's text.
    """
    vocab = {token: i for i, token in enumerate(tokens) if kinds[i] == _NORMAL}
    merges: list[tuple[float, str, str]] = []
    for token, i in vocab.items():
        pairs = ((token[:at], token[at:]) for at in range(1, len(token)))
        known = [(left, right) for left, right in pairs if left in vocab and right in vocab]
        known.sort(key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
        merges.extend((scores[i], left, right) for left, right in known)
    merges.sort(key=lambda merge: (merge[0], len(merge[1]), len(merge[2])), reverse=True)
    return [[left, right] for _, left, right in merges]


def _bpe(tokens: list[str], merges: list[list[str]], **options: bool) -> dict[str, Any]:
    return {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": False,
        **options,
        "vocab": {token: i for i, token in enumerate(tokens)},
        "merges": merges,
    }


def _added_tokens(file: GGUFFile, tokens: list[str], kinds: list[int]) -> list[dict[str, Any]]:
    # A GGUF does not say which special tokens swallow the whitespace behind them; llama.cpp knows Phi-3's by
    # name, and these are the ones with `rstrip` in its tokenizer.json.
    name = str(file.metadata.get("general.name", "")).lower()
    strips = ("phi-3" in name or "phi3" in name) and file.metadata.get("tokenizer.ggml.model") == "llama"
    keeps_space = ("<unk>", "<s>", "<|endoftext|>")
    return [
        {
            "id": i,
            "content": token,
            "single_word": False,
            "lstrip": False,
            "rstrip": strips and token not in keeps_space,
            "normalized": False,
            "special": kinds[i] != _USER_DEFINED,
        }
        for i, token in enumerate(tokens)
        if kinds[i] in (_UNKNOWN, _CONTROL, _USER_DEFINED) and token
    ]


def _begin_with(token: str, token_id: int) -> dict[str, Any]:
    special = {"SpecialToken": {"id": token, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": 0}} for name in "AB")
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, second],
        "special_tokens": {token: {"id": token, "ids": [token_id], "tokens": [token]}},
    }


def _chat_template(file: GGUFFile) -> str | list[dict[str, str]] | None:
    default = file.metadata.get("tokenizer.chat_template")
    prefix = "tokenizer.chat_template."
    named = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
    if default is None or not named:
        return default
    return [{"name": name, "template": template} for name, template in ({"default": default} | named).items()]


def _strings(file: GGUFFile, key: str) -> list[str] | None:
    value = file.metadata.get(key)
    return value if isinstance(value, list) and all(isinstance(item, str) for item in value) else None


def _token_id(file: GGUFFile, role: str, num_tokens: int) -> int | None:
    key = f"tokenizer.ggml.{role}_token_id"
    value = file.metadata.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or not 0 <= value < num_tokens:
        # What llama.cpp writes for "none" in old files.
        if value == 0xFFFFFFFF:
            return None
        raise UnsupportedModel(f"{file.path}: {key} is {value!r}, outside the vocabulary of {num_tokens}")
    return value
