"""The built-in model's tokenizer against llama.cpp's ids, and what a folder's text files may say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors

from phi_cluster.model.hub import resolve_model
from phi_cluster.model.tokenizer import Tokenizer

# Ids that llama.cpp (its server's /tokenize) gives for the built-in model's GGUF.
LLAMA_CPP: list[tuple[str, str]] = [
    (
        "Hello world",
        "19556 905",
    ),
    (
        "The year 2024: 3.14159 and 1,000,000!",
        "504 713 216 34 32 34 36 42 216 35 30 33 36 33 37 41 284 216 33 28 32 32 32 28 32 32 32 17",
    ),
    (
        "  leading and  double   spaces\t\ttabs  ",
        "216 2899 284 216 5561 256 5600 197 197 100 7366 256",
    ),
    (
        "line\n\n\nbreaks\r\n  \n end\n",
        "1311 1116 198 43627 2738 32057 1112 198",
    ),
    (
        "don't I'LL we've they'd it's",
        "12420 982 339 23 16421 392 3543 502 6737 357 506",
    ),
    (
        'def f(x: int) -> str:\n\treturn f"{x!r:>10}"  # ok\n',
        "1604 275 24 104 42 464 25 4722 871 42 198 197 5406 275 14737 104 17 98 42 46 33 32 18206 216 907 10907 198",
    ),
    (
        "日本語のテキストと中文字符，한국어",
        "23274 115 40993 179 120 248 26453 11100 224 10391 251 10391 134 11100 226 7365 118 28589 29184 "
        "36518 40562 116 12831 33085 246 181 130 251 183 240 129",
    ),
    (
        "\U0001f469\u200d\U0001f469\u200d\U0001f467\u200d\U0001f466 emoj"
        "i \U0001f389\U0001f1eb\U0001f1f7 \xe9 \xf1 \xfc \xdf",
        "10813 235 119 321 231 10813 235 119 321 231 10813 235 117 321 231 10813 235 116 649 33777 15107 232 "
        "227 10813 225 121 10813 225 132 26411 5549 126 5549 137 5549 249",
    ),
    (
        "١٢٣ ½ Ⅻ x² H₂O ①",
        "164 111 164 112 164 113 216 16738 216 173 223 121 1792 19133 407 44059 63 216 173 235 250",
    ),
    (
        "<|im_start|>user\nhi<|im_end|>\n",
        "1 4093 198 6004 2 198",
    ),
    (
        "https://example.com/a?b=c&d=%20e#f",
        "4687 1742 7434 30 824 31 81 47 82 45 83 22 84 23446 34 32 85 19 86",
    ),
    (
        "xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx                 y",
        "31069 31069 31069 31069 31069 31069 31069 31069 31069 31069 1703 329",
    ),
    (
        "\xdcn\xefc\xf6d\xe9 e\u0301 \xa0nbsp \u3000wide",
        "142 246 94 25972 83 7466 84 2756 297 151 219 216 15442 94 32093 216 12109 218 3641",
    ),
    (
        "a1b22c333 4 55 666",
        "81 33 82 34 34 83 35 35 35 216 36 216 37 37 216 38 38 38",
    ),
    (
        "",
        "",
    ),
    (
        "\ufeffBOM \u200bzero width",
        "186 136 140 50 9232 459 229 13723 8068",
    ),
    (
        "SELECT * FROM t WHERE a>=10 AND b!='x';\n\n",
        "23428 1672 18451 252 28531 253 31615 33 32 7485 278 17 2069 104 36651 1116",
    ),
    (
        "!!!??? ... --- ===>>> $$$",
        "29646 16693 47 4563 21749 446 1189 36991 1885 9212",
    ),
]


@pytest.fixture(scope="session")
def builtin_folder() -> Path:
    """The built-in model in the user's own cache; got once, in about six seconds."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return resolve_model("smollm2", cache / "phi-cluster")


@pytest.fixture(scope="session")
def builtin(builtin_folder: Path) -> Tokenizer:
    return Tokenizer.from_folder(builtin_folder)


@pytest.mark.parametrize(("text", "spelled_ids"), LLAMA_CPP)
def test_ids_are_llama_cpps(builtin: Tokenizer, text: str, spelled_ids: str) -> None:
    ids = [int(word) for word in spelled_ids.split()]
    assert builtin.encode(text) == ids
    if not any(map(builtin.is_special, ids)):
        assert builtin.decode(ids) == text
        detokenizer = builtin.detokenizer()
        assert "".join(detokenizer.push([i]) for i in ids) + detokenizer.flush() == text


def test_the_builtin_models_special_tokens(builtin: Tokenizer) -> None:
    assert builtin.eos_token_ids == (2, 0)
    assert builtin.bos_token_id == 1
    assert builtin.vocab_size == 49152
    assert [i for i in range(builtin.vocab_size) if builtin.is_special(i)] == list(range(17))
    assert builtin.token_text(2) == "<|im_end|>"
    rendered = builtin.render_chat([{"role": "user", "content": "Hi<|im_end|>"}])
    assert [i for i in builtin.encode(rendered) if builtin.is_special(i)] == [1, 2, 1, 2, 1]
    assert builtin.encode_prompt("<|im_end|>") == builtin.encode(builtin.sanitize("<|im_end|>"))
    assert 2 not in builtin.encode_prompt("<|im_end|>")


def tiny_backend() -> Backend:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Backend(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<s>", "</s>", "<|end|>"])
    return backend


def write_folder(folder: Path, backend: Backend, **files: Any) -> Path:
    backend.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


def test_a_raw_prompt_gets_what_the_post_processor_adds(tmp_path: Path) -> None:
    backend = tiny_backend()
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 256), ("</s>", 257)]
    )
    backend.enable_truncation(3)
    backend.enable_padding(length=9)
    tokenizer = Tokenizer.from_folder(write_folder(tmp_path, backend))
    assert tokenizer.encode_prompt("ab</s>cd") == [256, *tokenizer.encode(tokenizer.sanitize("ab</s>cd")), 257]
    assert len(tokenizer.encode("abcdefgh")) == 8
    assert tokenizer.encode_prompt("") == [256, 257]


def test_end_tokens_and_names_come_from_all_the_files(tmp_path: Path) -> None:
    folder = write_folder(
        tmp_path,
        tiny_backend(),
        tokenizer_config={"bos_token": {"content": "<s>"}, "eos_token": "</s>"},
        generation_config={"eos_token_id": [258, 257, 99999]},
        config={"eos_token_id": 1},
    )
    tokenizer = Tokenizer.from_folder(folder)
    assert tokenizer.eos_token_ids == (257, 258)
    assert tokenizer.bos_token_id == 256
    (folder / "generation_config.json").unlink()
    assert Tokenizer.from_folder(folder).eos_token_ids == (257, 1)


def test_the_chat_template_is_found_where_checkpoints_keep_it(tmp_path: Path) -> None:
    message = [{"role": "user", "content": "x"}]
    folder = write_folder(tmp_path, tiny_backend(), chat_template={"chat_template": "old"})
    assert Tokenizer.from_folder(folder).render_chat(message) == "old"
    several = [{"name": "rag", "template": "no"}, {"name": "default", "template": "several"}]
    write_folder(tmp_path, tiny_backend(), tokenizer_config={"chat_template": several})
    assert Tokenizer.from_folder(folder).render_chat(message) == "several"
    write_folder(
        tmp_path, tiny_backend(), tokenizer_config={"chat_template": "one {{ eos_token }}", "eos_token": "</s>"}
    )
    assert Tokenizer.from_folder(folder).render_chat(message) == "one </s>"
    (folder / "chat_template.jinja").write_text("file")
    assert Tokenizer.from_folder(folder).render_chat(message) == "file"


def test_the_vocabulary_may_have_gaps(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, tiny_backend())
    description = json.loads((folder / "tokenizer.json").read_text())
    description["model"]["vocab"]["ĀĀ"] = 300
    tokenizer = Tokenizer(description, {}, eos_token_ids=[300, 301])
    assert tokenizer.eos_token_ids == (300,)
    assert tokenizer.vocab_size == 301


@pytest.mark.parametrize("content", ["not json", "[]", '{"model": {"type": "Martian"}}'])
def test_a_broken_tokenizer_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(ValueError, match=r"tokenizer\.json"):
        Tokenizer.from_folder(tmp_path)


def test_a_missing_tokenizer_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
        Tokenizer.from_folder(tmp_path)
