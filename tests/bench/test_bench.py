"""That the benchmarks run: their arithmetic, and our network and a fake peer under the peers' protocol."""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest
import torch

from phi_cluster.cluster.processes import private_bytes

BENCH = Path(__file__).parent

FAKE_PEER = """
import os

from peers.peer import MissingPeer, run_peer

class Fake:
    description = "a fake"
    def decode(self, streams, context, tokens):
        print("engines talk on stdout")
        return [0.5 * streams] * tokens
    def prefill(self, tokens):
        raise ValueError("too\\nlong")
    def log_likelihood(self, token_ids):
        return -1.0 * len(token_ids)
    def die(self):
        os.kill(os.getpid(), 9)

def make(parsed):
    if parsed.model != "there":
        raise MissingPeer("not there")
    return Fake()

run_peer(make, lambda parser: parser.add_argument("--model"))
"""


@pytest.fixture
def bench(monkeypatch: pytest.MonkeyPatch):
    """Imports a module of the folder as the scripts do, which have it on their path."""
    monkeypatch.syspath_prepend(str(BENCH))
    before = set(sys.modules)

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in set(sys.modules) - before:
        if str(BENCH) in (getattr(sys.modules[name], "__file__", None) or ""):
            del sys.modules[name]


@pytest.fixture
def fake_peer(bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Starts the fake with `--model` and an argument; its module lies in a folder of its own."""
    process = bench("peers.process")
    (tmp_path / "fake_peer.py").write_text(FAKE_PEER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    started = []

    def start(model: str):
        peer = process.PeerProcess("fake", sys.executable, "fake_peer", ["--model", model], tmp_path / "log")
        started.append(peer)
        return peer

    yield start
    for peer in started:
        peer.close()


def test_a_peer_answers_and_says_what_is_wrong(fake_peer, tmp_path) -> None:
    peer = fake_peer("there")
    assert peer.description == "a fake"
    answer = peer.ask("decode", streams=2, context=3, tokens=4)
    assert answer.result == [1.0] * 4
    assert answer.others >= 0
    with pytest.raises(RuntimeError, match="fake: ValueError: too long"):
        peer.ask("prefill", tokens=1)
    assert peer.ask("log_likelihood", token_ids=[1, 2]).result == -2.0
    assert "engines talk on stdout" in (tmp_path / "log").read_text()


def test_a_peer_that_died_says_so_whenever_it_is_asked(fake_peer) -> None:
    peer = fake_peer("there")
    with pytest.raises(RuntimeError, match="fake's process ended with -9"):
        peer.ask("die")
    with pytest.raises(RuntimeError, match="fake's process has ended with -9"):
        peer.ask("decode", streams=1, context=1, tokens=1)


def test_a_missing_peer_is_one_line(fake_peer, bench, tmp_path) -> None:
    with pytest.raises(RuntimeError, match=r"^not there$"):
        fake_peer("elsewhere")
    with pytest.raises(RuntimeError, match="No such file"):
        bench("peers.process").PeerProcess("fake", "/no/python", "fake_peer", [], tmp_path / "log")
    with pytest.raises(RuntimeError, match="fake's process ended with 1"):
        bench("peers.process").PeerProcess("fake", sys.executable, "no_such_module", [], tmp_path / "log")


def test_prompts_differ_from_the_first_token_on(bench) -> None:
    prompt_ids = bench("peers.peer").prompt_ids
    prompts = [prompt_ids(stream, 5, 32000) for stream in range(64)]
    assert len({prompt[0] for prompt in prompts}) == 64
    assert all(100 <= id_ < 31900 for prompt in prompts for id_ in prompt)
    assert prompt_ids(3, 9, 32000)[:5] == prompts[3]


def test_disturbed_samples_are_taken_again(bench) -> None:
    engine, Answer = bench("engine"), bench("peers.process").Answer
    calm = iter([Answer(10.0, 0.0), Answer(12.0, 0.0)])
    busy = iter([Answer(5.0, 1.0), Answer(9.0, 0.0), Answer(1.0, 1.5), Answer(11.0, 0.1), Answer(2.0, 2.0)])
    never = iter([Answer(float(i), 1.0 + i) for i in range(6)])

    def broken():
        raise RuntimeError("it fell over")

    notes: list[str] = []
    asks = {"calm": lambda: next(calm), "busy": lambda: next(busy), "never": lambda: next(never), "broken": broken}
    rates = engine.measure(asks, 2, 0.2, lambda: None, notes.append)
    assert notes == ["it fell over"]
    assert list(rates) == ["calm", "busy", "never"]
    assert (rates["calm"].rate, rates["calm"].quiet) == (11.0, True)
    assert (rates["busy"].rate, rates["busy"].num) == (10.0, 2)
    assert (rates["never"].rate, rates["never"].quiet) == (0.5, False)


def test_limits_count_what_a_step_reads_and_computes(bench) -> None:
    engine, machine = bench("engine"), bench("machine").Machine(2, 1e9, {"int16": 1e12, "int8": 2e12})
    sizes = {"weight_bytes": 10**8, "kv_bytes_per_token": 10**4, "ops_per_token": 2 * 10**8, "ops_per_logits": 10**8}
    costs = sizes | {"products": "int16", "products_of_head": "int16"}
    # 0.1 s of weights, and 2 * 100 tokens of context: 0.002 s.
    assert engine.Case(2, 90, 20).limit(costs, machine) == pytest.approx(2 / 0.102)
    # 1,000 tokens, but logits after the last one only.
    assert engine.Case(0, 1000, 1).limit(costs, machine) == pytest.approx(1000 / 0.2001)
    costs = sizes | {"products": "int8", "products_of_head": "int16"}
    assert engine.Case(0, 1000, 1).limit(costs, machine) == pytest.approx(1000 / 0.1001)
    # Of these it is not known how many there can be.
    costs = sizes | {"products": "float32", "products_of_head": "float32"}
    assert engine.Case(0, 1000, 1).limit(costs, machine) == pytest.approx(1000 / 0.1)


def test_the_steady_rate_counts_only_while_all_generate(bench) -> None:
    multi_turn, Turn = bench("multi_turn"), bench("chat_load").Turn
    early = Turn(0.0, times=[1.0, 2.0, 3.0, 4.0], tokens=4)
    # Two tokens in each piece of text.
    late = Turn(0.0, times=[2.5, 3.5, 4.5, 5.5], tokens=8)
    assert multi_turn.steady_rate([early, late]) == pytest.approx((2 + 2) / 1.5)
    assert multi_turn.steady_rate([early, Turn(0.0, times=[9.0], tokens=1)]) == 0.0
    assert multi_turn.percentile([3, 1, 2], 50) == 2
    assert multi_turn.percentile(list(range(1, 101)), 99) == 99
    assert multi_turn.percentile([7], 99) == 7


def test_processes_are_named_by_what_they_do(bench) -> None:
    processes = bench("server_processes")
    assert processes.kind_of("ray::EngineActor.run") == "engine"
    assert processes.kind_of("/x/haproxy -db -f y") == "haproxy"
    assert processes.kind_of("gcs_server --port 1") == "ray"
    seconds = {"engine": 10.0, "replica": 1.0, "ray": 0.5, "client": 3.0, "driver": 0.0}
    assert processes.overhead(seconds) == pytest.approx(0.15)
    assert list(processes.per_thousand_tokens(seconds, 1000)) == ["engine", "client", "replica", "ray"]


def test_our_network_runs_under_the_protocol(bench, tmp_path) -> None:
    shape = bench("make_phi3_shape")
    config = shape.CONFIG | {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1, "ab": 319, "abb": 320}, "merges": [["a", "b"], ["ab", "b"]]}}
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer.json").write_text(json.dumps(tokenizer))
    (source / "tokenizer_config.json").write_text("{}")
    folder = tmp_path / "tiny"
    shape.write_folder(folder, config, source)
    cut = json.loads((folder / "tokenizer.json").read_text())["model"]
    assert cut == {"vocab": {"a": 0, "b": 1, "ab": 319}, "merges": [["a", "b"]]}

    own_engine = bench("own_engine")
    parser = own_engine.argparse.ArgumentParser()
    own_engine.add_arguments(parser)
    threads = torch.get_num_threads()
    arguments = ["--model", str(folder), "--dtype", "bfloat16", "--cache-dir", str(tmp_path), "--chunk", "16"]
    parsed = parser.parse_args([*arguments, "--max-model-len", "128"])
    parsed.threads = threads
    own = own_engine.make(parsed)
    assert len(own.decode(streams=3, context=20, tokens=4)) == 4
    assert own.prefill(40) > 0
    # One of 320 ids each time, all about equally likely.
    assert own.log_likelihood(list(range(100, 150))) / 49 == pytest.approx(-5.77, abs=0.2)
    costs = own.costs()
    layer = 64 * (4 + 2 + 2) * 16 + 64 * 64 + 3 * 64 * 96
    assert costs["ops_per_token"] == 2 * 2 * layer
    assert costs["weight_bytes"] == 2 * (2 * layer + 320 * 64 + 5 * 64)
    assert costs["kv_bytes_per_token"] == 2 * 2 * 2 * 16 * 2


def test_the_shape_is_written_for_llama_cpp_too(bench, tmp_path) -> None:
    from gguf import GGUFReader

    shape = bench("make_phi3_shape")
    config = shape.CONFIG | {
        "vocab_size": 320,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
    }
    for type_name in ("Q8_0", "Q4_0"):
        shape.write_gguf(tmp_path / "tiny.gguf", config, type_name)
        tensors = {tensor.name: tensor for tensor in GGUFReader(tmp_path / "tiny.gguf").tensors}
        assert tensors["blk.0.ffn_up.weight"].tensor_type.name == type_name
        assert list(tensors["blk.0.ffn_up.weight"].shape) == [64, 192]
        assert list(tensors["output_norm.weight"].data) == [1.0] * 64
        assert len(tensors) == 9


def test_hibernation_is_measured_at_a_small_size(bench, tmp_path) -> None:
    hibernation = bench("hibernation")
    if hibernation.runpy.run_path(str(BENCH.parent / "model" / "random_network.py"))["library"].problem() is not None:
        pytest.skip("no kernels")
    network = hibernation.Network(1, {}, max_model_len=128)
    store = hibernation.FileHibernationStore(tmp_path, 2**30, reserve_nbytes=0)
    one = hibernation.measure(network, store, tmp_path, 100)
    assert one["tokens"] == 100
    assert list(tmp_path.rglob("*.kv")) == []


def test_what_time_tells_is_judged(bench) -> None:
    timing = bench("tenant_timing")
    assert timing.area_under_curve([1.0, 1.0], [2.0, 3.0]) == 1.0
    assert timing.area_under_curve([1.0, 4.0], [2.0, 3.0]) == 0.5
    assert timing.area_under_curve([2.0], [2.0]) == 0.5
    good = {"auc_another_key": 0.53, "auc_same_key": 0.99}
    assert timing.complaints(good, 0.05) == []
    assert "tells of another key's prompts" in timing.complaints({**good, "auc_another_key": 0.44}, 0.05)[0]
    assert "says nothing" in timing.complaints({**good, "auc_same_key": 0.9}, 0.05)[0]


def test_percentiles_of_a_flood(bench) -> None:
    overload = bench("overload")
    assert overload.percentile([0.004, 0.001, 0.002, 0.003], 0.5) == 3.0
    assert overload.percentile([0.001], 0.99) == 1.0
    assert overload.percentile([], 0.5) is None


def test_a_scrape_is_of_the_same_size_whatever_the_number_of_sessions(bench) -> None:
    scrape_alone = bench("scraping").scrape_alone
    few, many = scrape_alone(5, 2, rounds=1), scrape_alone(500, 2, rounds=1)
    assert few["series"] == many["series"] > 200


def test_rules_in_less_time(bench) -> None:
    """All periods are found, thresholds stay."""
    faster = bench("alert_timeline").faster
    text = (BENCH.parent.parent / "monitoring" / "rules" / "alerts.yml").read_text()
    quick = faster(text, 30)
    assert "increase(phi_recoveries_total[20s])) > 2.5" in quick
    assert "offset 720s" in quick
    assert "for: 10s" in quick
    assert not re.search(r"\[\d+[mh]\]|offset \d+[mh]|for: \d+[mh]", quick)
    assert faster(text, 1) == faster(faster(text, 1), 1)
    assert [line for line in text.splitlines() if "summary" in line] == [
        line for line in quick.splitlines() if "summary" in line
    ]


def test_an_engine_that_leaks_on_purpose(tmp_path: Path) -> None:
    leak = tmp_path / "leak"
    code = "import time\nwhile True: time.sleep(1)"
    environment = {**os.environ, "PYTHONPATH": str(BENCH / "leaking_engine"), "PHI_BENCH_LEAK": str(leak)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment) as process:
        try:
            leak.write_text(f"{process.pid + 1} 40000000")
            time.sleep(0.6)
            before = private_bytes(process.pid)
            assert before < 40_000_000
            leak.write_text(f"{process.pid} 40000000")
            deadline = time.monotonic() + 20
            while private_bytes(process.pid) < before + 10_000_000:
                assert time.monotonic() < deadline
                time.sleep(0.05)
        finally:
            process.kill()


def test_turns_inside_a_renewal_and_the_first_ones_behind_it(bench) -> None:
    renewals, turn = bench("keeper_renewals"), bench("chat_load").Turn
    # (begin, first token) of one user: a new conversation at 0 and one at 40, renewals at 10 and 50.
    moments = [(0, 1), (5, 6), (9, 13), (14, 15), (40, 41), (45, 46), (49, 49.5), (53, 55), (56, 57)]
    numbers = [0, 1, 2, 3, 0, 1, 2, 3, 4]
    turns = [(number, turn(begin, [first])) for number, (begin, first) in zip(numbers, moments, strict=True)]
    places = renewals.sort_turns([turns], [(10, 12), (50, 52)])
    assert places == {"inside": [4], "first_after": [2], "outside": [1, 1, 1, 1, 1, 0.5, 1]}
    # One that had no turn since before: its first turn counts, unless its conversation is a new one.
    assert renewals.sort_turns([[(1, turn(0, [1])), (2, turn(60, [63]))]], [(10, 12)])["first_after"] == [3]
    assert renewals.sort_turns([[(1, turn(0, [1])), (0, turn(60, [63]))]], [(10, 12)])["first_after"] == []
    assert renewals.summary([]) == {"turns": 0}
    assert renewals.summary([0.1, 0.2, 0.3]) == {"turns": 3, "ttft_ms_p50": 200, "ttft_ms_p99": 300, "ttft_ms_max": 300}
