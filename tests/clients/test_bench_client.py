"""A bench client from PyPI against a real server: `vllm bench serve`-style load, random and in the shape of ShareGPT.

The client is SGLang's `bench_serving`, which descends from vLLM's and sends what that sends. Pinned with its hash in
bench_client.txt; fetched once a run.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from phi_cluster.cluster.config import Config
from phi_cluster.model.hub import resolve_model

pytestmark = [pytest.mark.clients, pytest.mark.cluster, pytest.mark.slow]

CONFIG = {"max_model_len": 1024, "engine": {"standby_engines": 0}}
# It takes every line that comes for JSON.
PLAIN = {"stream_options": {"data_only": True}}
NUM = 12
OFFLINE = {"HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def server(launch):
    server = launch(CONFIG)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def bench(server, tmp_path_factory):
    """`bench(*arguments)`: the client's summary of one load."""
    folder = tmp_path_factory.mktemp("bench")
    wanted = Path(__file__).with_name("bench_client.txt")
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", "--require-hashes"]
    fetched = subprocess.run([*install, "--target", folder, "-r", wanted], capture_output=True, text=True, timeout=120)
    assert fetched.returncode == 0, f"the bench client could not be fetched: {fetched.stderr}"
    # Alone: beside its package's other modules these would be found in the place of others of their names.
    script = shutil.copy(folder / "sglang" / "bench_serving.py", folder / "bench.py")
    model = resolve_model("smollm2", Config().cache_path, lambda event: None, None)

    def run(*arguments):
        told = folder / f"told-{len(list(folder.glob('told-*')))}.jsonl"
        command = [sys.executable, script, "--base-url", server.url, "--tokenizer", model]
        command += ["--model", "SmolLM2-135M-Instruct", "--extra-request-body", json.dumps(PLAIN)]
        command += ["--disable-tqdm", "--output-details", "--output-file", told, *arguments]
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=300, env={**os.environ, **OFFLINE}
        )
        assert done.returncode == 0, done.stderr[-2000:]
        [line] = told.read_text().splitlines()
        return json.loads(line)

    return run


def sharegpt(path):
    """A small file in ShareGPT's form: conversations of people and an assistant, of which the client takes the first
    two messages."""
    asked = [
        "Can you explain to me, step by step, how a letter finds its way from my street to another country?",
        "Write a function in Python that counts the words of a text, and tell me how it works.",
        "I have flour, two eggs, some milk and an apple. What could I cook for four people tonight?",
        "Summarize in three sentences: The lighthouse stood on the rock for two hundred years before anyone asked why.",
    ]
    answers = ["Of course! " + "Here is what I would do first, and why it matters to you. " * (1 + i) for i in range(3)]
    conversations = [
        {
            "id": f"made-{i}",
            "conversations": [
                {"from": "human", "value": f"{asked[i % 4]} ({i})"},
                {"from": "gpt", "value": answers[i % 3]},
                {"from": "human", "value": "And then?"},
                {"from": "gpt", "value": "Then you are done."},
            ],
        }
        for i in range(NUM)
    ]
    path.write_text(json.dumps(conversations))
    return path


def check(told, num_output):
    assert told["errors"] == [""] * NUM
    assert told["completed"] == NUM
    assert told["output_lens"] == num_output
    assert all(told["generated_texts"])
    # It saw them come one by one.
    assert all(ttft > 0 for ttft in told["ttfts"])
    assert all(len(gaps) > 1 for gaps in told["itls"])
    assert told["output_throughput"] > 0


def test_random_load(bench):
    told = bench(
        *("--backend", "vllm", "--dataset-name", "random-ids", "--num-prompts", NUM, "--max-concurrency", 4),
        *("--random-input-len", 96, "--random-output-len", 16, "--random-range-ratio", 1.0),
    )
    check(told, [16] * NUM)
    assert told["total_input_tokens"] == 96 * NUM


def test_load_in_the_shape_of_sharegpt(bench, tmp_path):
    path = sharegpt(tmp_path / "sharegpt.json")
    for backend in ("vllm", "vllm-chat"):
        told = bench(
            *("--backend", backend, "--dataset-name", "sharegpt", "--dataset-path", path, "--num-prompts", NUM),
            *("--request-rate", 8, "--sharegpt-output-len", 12),
        )
        check(told, [12] * NUM)
