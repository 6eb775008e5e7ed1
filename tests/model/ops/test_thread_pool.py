"""The network's threads: thousands of small jobs, awake and asleep, for several networks that come and go. No job
hangs, none is lost, and no thread is left."""

from __future__ import annotations

import gc
import random
import runpy
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from phi_cluster.model.ops import library
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.quantized_phi3 import QuantizedPhi3ForCausalLM
from phi_cluster.model.sampler import SamplingRequest, sample
from phi_cluster.model.sampling_params import SamplingParams

tiny = SimpleNamespace(**runpy.run_path(str(Path(__file__).parents[1] / "random_network.py")))

pytestmark = pytest.mark.skipif(library.problem() is not None, reason=f"no kernels: {library.problem()}")

# A job of a step takes a microsecond: as many of them as possible.
CONFIG = tiny.config(hidden_size=16, intermediate_size=16, num_hidden_layers=4, num_attention_heads=2)
WEIGHTS = tiny.weights(CONFIG, "int8")
NUM_TOKENS = 9
# Longer than a helper stays awake for the next job, in seconds.
ASLEEP = 400e-6
# Far more than anything here takes on a busy machine.
HANGS = 120.0


def network(num_threads: int) -> QuantizedPhi3ForCausalLM:
    made: QuantizedPhi3ForCausalLM = tiny.network(CONFIG, WEIGHTS, max_model_len=16, num_threads=num_threads)
    # Were it to hang, its end would too, and with it the end of this process.
    made._finalizer.atexit = False
    return made


class Caller:
    """Computes the same two sequences again and again, and looks at the result."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self._chunks = [
            SequenceChunk(
                torch.randint(CONFIG.vocab_size, (NUM_TOKENS,), generator=generator),
                0,
                tiny.new_cache(CONFIG, max_model_len=16),
                num_logits=NUM_TOKENS,
            )
            for _ in range(2)
        ]
        alone = network(1)
        self._expected = alone.forward(self._chunks).clone()
        alone.close()

    def __call__(self, subject: QuantizedPhi3ForCausalLM) -> None:
        assert torch.equal(subject.forward(self._chunks), self._expected)


def in_time(*works: Callable[[], None]) -> None:
    """Each in a thread of its own, all at once; a hang is a failure here and not the end of the tests."""
    errors: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=guarded, args=(work,), daemon=True) for work in works]
    deadline = time.monotonic() + HANGS
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
        assert not thread.is_alive(), "a step hangs"
    for error in errors:
        raise error


def num_threads_now() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def assert_threads(expected: int) -> None:
    """Soon: the kernel forgets a thread a moment after its end."""
    deadline = time.monotonic() + 10
    while num_threads_now() != expected:
        assert time.monotonic() < deadline, f"{num_threads_now()} threads, {expected} expected"
        time.sleep(0.001)


def test_thousands_of_steps_of_networks_that_come_and_go():
    def work() -> None:
        rng, call = random.Random(0), Caller()
        alive = [network(num_threads) for num_threads in (1, 2, 3, 4)]
        for i in range(3000):
            call(rng.choice(alive))
            if i % 20 == 0:
                alive.pop(rng.randrange(len(alive))).close()
                alive.append(network(rng.randint(1, 4)))
        for one in alive:
            one.close()

    in_time(work)


def test_helpers_that_sleep_are_woken():
    """Also at the very moment in which they fall asleep."""

    def work() -> None:
        rng, call = random.Random(1), Caller()
        subjects = [network(2), network(3)]
        for _ in range(400):
            call(rng.choice(subjects))
            until = time.perf_counter() + rng.choice([0.0, 0.3, 0.4, 0.5, 1.0]) * ASLEEP * rng.random()
            while time.perf_counter() < until:
                pass
            if rng.random() < 0.05:
                time.sleep(2 * ASLEEP)
        for one in subjects:
            one.close()

    in_time(work)


def test_networks_of_several_callers_at_once():
    """Each has threads of its own, more in all than there are cores."""

    def work() -> None:
        call = Caller()
        for _ in range(4):
            subjects = [network(2), network(3)]
            for _ in range(40):
                for one in subjects:
                    call(one)
            for one in subjects:
                one.close()

    in_time(work, work, work)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no Linux")
def test_no_thread_is_left():
    def work() -> None:
        call = Caller()
        before = num_threads_now()
        for num_threads in (1, 2, 5):
            for steps in (0, 1, 3):
                one = network(num_threads)
                assert_threads(before + num_threads - 1)
                for _ in range(steps):
                    call(one)
                if steps == 3:
                    time.sleep(2 * ASLEEP)
                one.close()
                assert_threads(before)
                # Twice is as good as once.
                one.close()

    gc.collect()
    in_time(work)


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="no Linux")
def test_a_network_that_nobody_holds_ends_its_threads():
    def work() -> None:
        call = Caller()
        before = num_threads_now()
        one = network(4)
        call(one)
        del one
        gc.collect()
        assert_threads(before)

    gc.collect()
    in_time(work)


def test_the_sampler_uses_the_same_threads():
    def work() -> None:
        logits = torch.randn(7, CONFIG.vocab_size, generator=torch.Generator().manual_seed(3))
        requests = [SamplingRequest(SamplingParams(seed=i, max_tokens=9), position=i) for i in range(7)]
        expected = sample(logits, requests)
        call = Caller()
        for num_threads in (1, 2, 3):
            one = network(num_threads)
            for _ in range(100):
                call(one)
                assert sample(logits, requests, one.draw) == expected
            one.close()

    in_time(work)
