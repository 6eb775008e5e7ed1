"""Which of the JSON-Schema-Test-Suite's schemas can be followed, and whether what follows them is valid.

    python tests/bench/json_schema_suite.py SUITE/tests/draft2020-12 [--walks 3] [--list]

SUITE is https://github.com/json-schema-org/JSON-Schema-Test-Suite, or the folder `json` of jsonschema's source
distribution. Owns: the count. Each schema is followed or refused, and a refusal is a GrammarError; anything else is a
fault. Of those that are followed, each of the suite's documents (as compact JSON) is held against the grammar, and
random documents that the grammar allows are held against jsonschema. A document that the grammar allows and the schema
does not is a fault; the other way round the grammar is only narrower (as in the order of properties).
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np

from phi_cluster.cluster.config import Config
from phi_cluster.model.grammar import GrammarError, Grammars, Matcher, json_schema_grammar
from phi_cluster.model.hub import resolve_model
from phi_cluster.model.tokenizer import Tokenizer

# Of a random document, in tokens: what is not complete by then is not counted.
LONGEST_WALK = 120


@dataclass
class Count:
    """`refused`: how often, by the first words of why; `wrong`: what must not be, with its place."""

    schemas: int = 0
    followed: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    documents: Counter[str] = field(default_factory=Counter)
    walks: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


class Follower:
    """A model's tokens under a grammar."""

    def __init__(self, folder: Path):
        self.tokenizer = Tokenizer.from_folder(folder)
        self._grammars = Grammars(folder, self.tokenizer.vocab_size)
        self._end = self.tokenizer.eos_token_ids[0]
        token_ids = range(self.tokenizer.vocab_size)
        self._short = np.array([len(self.tokenizer.token_bytes(token_id)) == 1 for token_id in token_ids])

    def matcher(self, schema: Any) -> Matcher:
        """Raises GrammarError."""
        return self._grammars.matcher(json_schema_grammar(schema), [self._end])

    def allows(self, schema: Any, document: Any) -> bool:
        """Whether the document, as compact JSON, may be said and be the end."""
        matcher = self.matcher(schema)
        text = json.dumps(document, separators=(",", ":"), ensure_ascii=False)
        try:
            matcher.consume(self.tokenizer.encode(self.tokenizer.sanitize(text)))
            return self._may_end(matcher.masks()[0])
        except GrammarError:
            return False

    def walk(self, schema: Any, seed: int) -> str | None:
        """A random document; None if it does not come to an end."""
        matcher, draw, said = self.matcher(schema), random.Random(seed), list[int]()
        while len(said) < LONGEST_WALK:
            mask = matcher.masks()[0]
            if self._may_end(mask) and draw.random() < 0.5:
                return self.tokenizer.decode(said)
            may_come = np.unpackbits(mask.view(np.uint8), bitorder="little")[: len(self._short)].astype(bool)
            may_come[self._end] = False
            # Single characters end sooner than words.
            allowed = np.flatnonzero(may_come & self._short)
            if not len(allowed):
                allowed = np.flatnonzero(may_come)
            if not len(allowed):
                return self.tokenizer.decode(said)
            token_id = int(draw.choice(allowed))
            matcher.consume([token_id])
            said.append(token_id)
        return None

    def _may_end(self, mask: np.ndarray) -> bool:
        return bool(mask[self._end // 32] >> np.uint32(self._end % 32) & np.uint32(1))


def groups(folder: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """The suite's schemas with their documents; optional ones have a subfolder of their own and are left out."""
    for path in sorted(folder.glob("*.json")):
        for group in json.loads(path.read_text(encoding="utf-8")):
            yield path.stem, group


def count_suite(folder: Path, follower: Follower, num_walks: int) -> Count:
    """All of it."""
    count = Count()
    for name, group in groups(folder):
        schema, place = group["schema"], f"{name}: {group['description']}"
        count.schemas += 1
        try:
            follower.matcher(schema)
        except GrammarError as error:
            count.refused[" ".join(str(error).split()[:3])] += 1
            continue
        count.followed += 1
        for test in group["tests"]:
            is_allowed = follower.allows(schema, test["data"])
            verdict = ("invalid", "valid")[test["valid"]] + (" refused", " allowed")[is_allowed]
            count.documents[verdict] += 1
            if verdict == "invalid allowed":
                count.wrong.append(f"{place}: {test['description']}")
        for seed in range(num_walks):
            document = follower.walk(schema, seed)
            verdict = "unfinished" if document is None else _verdict(schema, document)
            count.walks[verdict] += 1
            if verdict not in ("unfinished", "valid"):
                count.wrong.append(f"{place}: random document {seed} is {verdict}: {document!r}")
    return count


def _verdict(schema: Any, document: str) -> str:
    try:
        given = json.loads(document)
    except ValueError:
        return "no JSON"
    return "valid" if jsonschema.Draft202012Validator(schema).is_valid(given) else "invalid"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--walks", type=int, default=3, help="random documents for each schema")
    parser.add_argument("--list", action="store_true", help="name all that is wrong")
    given = parser.parse_args()
    model = resolve_model("smollm2", Config().cache_path, lambda event: None, None)
    count = count_suite(given.folder, Follower(model), given.walks)
    print(f"{count.schemas} schemas, {count.followed} followed ({count.followed / count.schemas:.0%})")
    for why, times in count.refused.most_common():
        print(f"  refused {times:4d}  {why}")
    print("the suite's documents:", dict(count.documents))
    print("random documents:", dict(count.walks))
    print(f"wrong: {len(count.wrong)}")
    for one in count.wrong if given.list else ():
        print("  ", one)
    return 0


if __name__ == "__main__":
    sys.exit(main())
