"""OpenAI's endpoints that are not here, each with its reason.

Owns: their names. Knows nothing of the endpoints that are here.
"""

from __future__ import annotations

_NO_FILES = "nothing is stored here but conversations"
_TEXT_ONLY = "this model reads and writes text only"
_NO_TRAINING = "models are served here, not trained"
_REASONS = {
    "assistants": "OpenAI has replaced it by the Responses API",
    "audio": _TEXT_ONLY,
    "batch": _NO_FILES,
    "batches": _NO_FILES,
    "containers": "nothing is executed here",
    "edits": "OpenAI has replaced it by chat completions",
    "embeddings": "this model makes text, not embeddings",
    "engines": "OpenAI has replaced it by /v1/models",
    "evals": _NO_TRAINING,
    "files": _NO_FILES,
    "fine-tunes": _NO_TRAINING,
    "fine_tuning": _NO_TRAINING,
    "images": _TEXT_ONLY,
    "moderations": "this model does not classify text",
    "organization": "keys are in the file that server.keys names",
    "organizations": "keys are in the file that server.keys names",
    "projects": "keys are in the file that server.keys names",
    "realtime": _TEXT_ONLY,
    "rerank": "this model makes text, not rankings",
    "score": "this model makes text, not rankings",
    "threads": "OpenAI has replaced it by the Responses API",
    "uploads": _NO_FILES,
    "vector_stores": _NO_FILES,
    "videos": _TEXT_ONLY,
}


def reason_for_absence(path: str) -> str | None:
    """Why there is nothing at this path, if it is one of OpenAI's (or of those that go by OpenAI's names)."""
    version, _, rest = path.removeprefix("/").partition("/")
    return _REASONS.get(rest.partition("/")[0]) if version == "v1" else None
