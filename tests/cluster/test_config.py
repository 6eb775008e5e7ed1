"""What a configuration file may say, and in which words it is refused."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from pydantic import BaseModel

import phi_cluster.configs
from phi_cluster.cluster.config import Config, describe_config, load_config
from phi_cluster.cluster.engine.settings import Speculation
from phi_cluster.cluster.errors import StartError


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text)
    return path


def refusal(folder: Path, text: str) -> str:
    path = write(folder, text)
    with pytest.raises(StartError) as caught:
        load_config(path, {})
    message = caught.value.message
    assert str(path) in message
    assert "\n" not in message
    return message.replace(str(path), "FILE")


def leaves(config: BaseModel, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Every field's dotted name and description."""
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", field.description or ""


@pytest.mark.parametrize(
    ("written", "seconds"),
    [("90", 90.0), ("1.5", 1.5), ("2s", 2.0), ("250ms", 0.25), ("10m", 600.0), ("6h", 21600.0), ("30d", 2592000.0)],
)
def test_durations(tmp_path: Path, written: str, seconds: float) -> None:
    assert load_config(write(tmp_path, f"sessions: {{idle_timeout: {written}}}"), {}).sessions.idle_timeout == seconds


@pytest.mark.parametrize(
    ("written", "nbytes"),
    [("1000", 1000), ("'1000'", 1000), ("64MB", 64 * 10**6), ("2GiB", 2 * 2**30), ("1.5 KiB", 1536), ("7B", 7)],
)
def test_sizes(tmp_path: Path, written: str, nbytes: int) -> None:
    assert load_config(write(tmp_path, f"kv: {{budget: {written}}}"), {}).kv.budget == nbytes


@pytest.mark.parametrize("written", ["5 years", "-3s", "", "1.2.3s", ".s", ".inf", ".nan", "0", "true-ish"])
def test_wrong_durations_name_the_field(tmp_path: Path, written: str) -> None:
    assert refusal(tmp_path, f"kv: {{reserve_wait: {written or '~'}}}").startswith("FILE: kv.reserve_wait: ")


@pytest.mark.parametrize("written", ["1TB", "-5", "1.2.3MB", "many", ".MB", "1MB2"])
def test_wrong_sizes_name_the_field(tmp_path: Path, written: str) -> None:
    assert refusal(tmp_path, f"server: {{max_body: {written}}}").startswith("FILE: server.max_body: ")


def test_a_wrong_duration_is_told_how_to_write_one(tmp_path: Path) -> None:
    assert "write for example 30s, 10m or 6h" in refusal(tmp_path, "kv: {reserve_wait: soon}")
    assert "write for example 64MB or 2GiB" in refusal(tmp_path, "kv: {budget: lots}")


def test_unknown_fields_name_the_nearest(tmp_path: Path) -> None:
    assert refusal(tmp_path, "modle: x") == "FILE: unknown field modle; did you mean model?"
    told = refusal(tmp_path, "engine: {max_num_seq: 3}")
    assert told == "FILE: unknown field engine.max_num_seq; did you mean max_num_seqs?"
    told = refusal(tmp_path, "kv: {zzz: 3}")
    assert told == "FILE: unknown field kv.zzz; known fields: budget, hibernate_quota, hibernate_key_file, reserve_wait"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("engine: 5", "engine: "),
        ("server: {port: 70000}", "server.port: "),
        ("device: tpu", "device: "),
        ("dtype: int3", "dtype: Input should be 'auto', 'float32', 'bfloat16', 'int8' or 'int4'"),
        ("kv_cache_dtype: float32", "kv_cache_dtype: Input should be 'auto', 'bfloat16' or 'int8'"),
        ("{replicas: 3, autoscaling: {max_replicas: 2}}", "FILE: autoscaling.max_replicas: 2 is less than replicas: 3"),
        ("replicas: 0", "FILE: replicas: 0 would never serve; set autoscaling.max_replicas, or 1"),
        (
            "tracing: {endpoint: 'localhost:4318'}",
            "tracing.endpoint: 'localhost:4318' is not the address of a collector",
        ),
        ("tracing: {endpoint: 'http://u:p@host/v1/traces'}", "tracing.endpoint: "),
        ("tracing: {sample_ratio: 1.5}", "tracing.sample_ratio: "),
        ("- model", "must hold fields"),
        ("just words", "must hold fields"),
        ("{", "is not valid YAML"),
        ("model: [1", "is not valid YAML"),
        ("1: 2", "1"),
    ],
)
def test_wrong_files_are_refused_in_one_sentence(tmp_path: Path, text: str, told: str) -> None:
    assert told in refusal(tmp_path, text)


def test_replicas_come_and_go_only_where_it_is_asked_for(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "replicas: 3"), {}).max_replicas == 3
    assert load_config(write(tmp_path, "{replicas: 3, autoscaling: {target_turns: 4}}"), {}).max_replicas == 3
    assert load_config(write(tmp_path, "autoscaling: {max_replicas: 4}"), {}).max_replicas == 4
    assert load_config(write(tmp_path, "{replicas: 0, autoscaling: {max_replicas: 2}}"), {}).max_replicas == 2


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(StartError, match="No such file"):
        load_config(tmp_path / "none.yaml", {})
    with pytest.raises(StartError, match="Is a directory"):
        load_config(tmp_path, {})
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(StartError, match="is not valid YAML"):
        load_config(tmp_path / "binary.yaml", {})


def test_empty_files_and_no_file_are_all_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, ""), {}) == load_config(None, {}) == Config()
    assert load_config(write(tmp_path, "# nothing\n"), {}) == Config()


def test_a_section_whose_fields_are_all_commented_out_is_its_defaults(tmp_path: Path) -> None:
    path = write(tmp_path, "server:\n  # port: 8001\nmodel: x\n")
    assert load_config(path, {}) == Config(model="x")
    assert load_config(path, {"server": {"port": 8002}}).server.port == 8002


@pytest.mark.parametrize("text", ["engine: {speculation: }", "engine: {speculation: {}}", "engine:"])
def test_speculation_is_off_by_default(tmp_path: Path, text: str) -> None:
    speculation = load_config(write(tmp_path, text), {}).engine.speculation
    assert speculation.model_dump() == {"num_tokens": 0, "min_match": 2, "max_match": 4}
    # What the engine reads has the same fields and defaults.
    assert Speculation(**speculation.model_dump()) == Speculation()


@pytest.mark.parametrize("text", ["num_tokens: 17", "num_tokens: -1", "min_match: 0", "min_match: 5", "max_match: 1"])
def test_speculation_that_cannot_be_is_refused(tmp_path: Path, text: str) -> None:
    assert refusal(tmp_path, f"engine: {{speculation: {{{text}}}}}").startswith("FILE: engine.speculation")
    name, _, value = text.partition(": ")
    with pytest.raises(ValueError, match="must be between"):
        Speculation(**{name: int(value)})


def test_unknown_fields_of_speculation_name_the_nearest(tmp_path: Path) -> None:
    told = refusal(tmp_path, "engine: {speculation: {num_token: 3}}")
    assert told == "FILE: unknown field engine.speculation.num_token; did you mean num_tokens?"


def test_overrides_lie_over_the_file_and_none_is_not_given(tmp_path: Path) -> None:
    path = write(tmp_path, "model: a\nserver: {port: 8001, host: 127.0.0.1}")
    config = load_config(path, {"model": None, "server": {"port": 9000, "host": None}})
    assert (config.model, config.server.port, config.server.host) == ("a", 9000, "127.0.0.1")
    assert load_config(None, {"server": {"port": 9000}}).server.port == 9000
    with pytest.raises(StartError, match=r"the configuration: server\.port"):
        load_config(None, {"server": {"port": 0}})


def test_a_printed_configuration_shows_and_explains_every_field() -> None:
    printed = describe_config(Config())
    for name, description in leaves(Config()):
        assert description, name
        line = f"{name.rpartition('.')[2]}: "
        assert any(
            one.strip().startswith(line) and one.endswith(f"  # {description}") for one in printed.splitlines()
        ), name


def test_a_printed_configuration_loads_again(tmp_path: Path) -> None:
    long_name = " ".join(["a name with spaces"] * 20)
    config = Config.model_validate(
        {
            "model": "yes",
            "served_model_name": [long_name, "b: c # d", "null"],
            "state_dir": f"/{long_name}",
            "max_model_len": 4096,
            "sessions": {"idle_timeout": "2h", "max_age": None},
            "kv": {"budget": "1GiB"},
        }
    )
    assert load_config(write(tmp_path, describe_config(config)), {}) == config
    assert load_config(write(tmp_path, describe_config(Config())), {}) == Config()


def test_a_token_is_not_shown() -> None:
    config = Config(hub_token="hf_secret")
    assert "secret" not in describe_config(config)
    assert "secret" not in repr(config)
    assert "hub_token: null" in describe_config(Config())


def test_paths_follow_xdg(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Config().state_path == tmp_path / "state" / "phi-cluster"
    assert Config().cache_path == tmp_path / ".cache" / "phi-cluster"
    assert Config(state_dir=Path("~/x")).state_path == tmp_path / "x"
    assert Config(cache_dir=Path("relative")).cache_path.is_absolute()


def test_shipped_configurations_load() -> None:
    shipped = sorted(Path(next(iter(phi_cluster.configs.__path__))).glob("*.yaml"))
    assert "smollm2.yaml" in [path.name for path in shipped]
    for path in shipped:
        config = load_config(path, {})
        # Nothing in it is there without effect or against the documented names.
        assert set(yaml.safe_load(path.read_text())) <= set(type(config).model_fields)


@pytest.mark.parametrize(
    ("field", "written", "told"),
    [
        ("session_headers", "[]", "at least 1"),
        ("session_headers", "[a b]", "a header's name is expected"),
        ("session_headers", "[Authorization]", "authorization means something else already"),
        ("session_headers", "[x-request-id]", "means something else already"),
        ("cors_origins", "[app.example.com]", "'app.example.com' is not an origin"),
        ("cors_origins", "['https://app.example.com/']", "is not an origin"),
        ("body_timeout", "0", "greater than 0"),
        ("write_timeout", "10ms", "greater than or equal to 1"),
        ("max_body", "0", "greater than or equal to 1"),
    ],
)
def test_the_edge_of_the_server(tmp_path: Path, field: str, written: str, told: str) -> None:
    assert told in refusal(tmp_path, f"server: {{{field}: {written}}}")


def test_headers_are_lower_case(tmp_path: Path) -> None:
    config = load_config(
        write(tmp_path, "server: {session_headers: [X-Session-Id, Session-ID], cors_origins: ['*']}"), {}
    )
    assert config.server.session_headers == ("x-session-id", "session-id")
    assert config.keys_path is None


# Several machines.


def test_several_machines_want_one_journal(tmp_path: Path) -> None:
    told = refusal(tmp_path, "nodes: {address: 10.0.0.5}")
    assert "several machines want one record" in told
    assert told.endswith("set journal: redis://HOST:6379/0")
    text = "{journal: 'redis://10.0.0.9/0', nodes: {address: 10.0.0.5}}"
    config = load_config(write(tmp_path, text), {})
    assert config.has_nodes
    # One on each machine, unless it is said otherwise.
    assert load_config(write(tmp_path, f"{text[:-1]}, replicas: 3}}"), {}).replicas_per_node == 1
    assert load_config(write(tmp_path, "replicas: 3"), {}).replicas_per_node == 3
    assert not load_config(write(tmp_path, "replicas: 3"), {}).has_nodes


@pytest.mark.parametrize("address", ["127.0.0.1", "0.0.0.0", "host", "10.0.0.5:80", "::1"])
def test_an_address_that_no_other_machine_reaches(tmp_path: Path, address: str) -> None:
    told = refusal(tmp_path, f"nodes: {{address: '{address}'}}")
    assert "nodes.address: " in told
    assert address in told
