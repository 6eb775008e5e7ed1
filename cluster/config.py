"""The one configuration file: every field, its default and its meaning.

Owns: the pydantic models, loading from YAML, and printing.
Knows nothing of what the fields do to Ray, the engine or HTTP.
"""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from phi_cluster.cluster.config_values import Bytes, HeaderName, HttpUrl, IPAddress, Origin, RedisUrl, Seconds
from phi_cluster.cluster.errors import StartError


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class SpeculationConfig(_Section):
    """Several tokens of a reply in one step, where it repeats what was there before. The reply stays the same."""

    num_tokens: int = Field(
        0, ge=0, le=16, description="tokens guessed ahead in a step, from what followed the same tokens before; 0: off"
    )
    min_match: int = Field(2, ge=1, le=16, description="a guess wants so many last tokens to have occurred before")
    max_match: int = Field(4, ge=1, le=16, description="so many last tokens are looked up first, then fewer")

    @model_validator(mode="after")
    def _ordered(self) -> SpeculationConfig:
        if self.min_match > self.max_match:
            raise ValueError(f"min_match {self.min_match} is more than max_match {self.max_match}")
        return self


class EngineConfig(_Section):
    """One engine: how much it does in a step, and what replaces it."""

    num_threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of an engine; unset: the cores this machine (cgroup) allows"
    )
    max_num_seqs: int = Field(64, ge=1, le=4096, description="sequences that may run at once in one engine")
    max_num_batched_tokens: int = Field(
        256, ge=1, le=65536, description="tokens computed in one step, over all sequences (prefill is chunked to it)"
    )
    max_waiting: int = Field(
        256, ge=1, le=100_000, description="turns that may wait in one replica; more get 429 with Retry-After"
    )
    standby_engines: int | None = Field(
        None,
        ge=0,
        le=8,
        description="engines that each replica keeps ready to take over, about 400 MB each: a stream whose engine dies "
        "pauses for a moment, else for seconds; unset: 1 where memory is left after weights and KV budget, else 0",
    )
    hang_timeout: Seconds = Field(
        3.0,
        ge=1.0,
        description="an engine that shows no life, or computes no layer although it is busy, for so long is "
        "replaced; contexts beyond some 30k tokens on a CPU may take longer for a layer: raise it there",
    )
    max_age: Seconds | None = Field(12 * 3600.0, description="an engine that has served for so long is renewed")
    max_steps: int | None = Field(None, ge=1, description="an engine that has computed so many steps is renewed")
    max_private_growth: Bytes | None = Field(
        10**9, description="an engine whose private memory grew by more than this is renewed"
    )
    # A section whose fields are all commented out is null to YAML.
    speculation: Annotated[SpeculationConfig, BeforeValidator(lambda value: {} if value is None else value)] = Field(
        default_factory=SpeculationConfig, description="n-gram speculation: quick where replies quote or repeat"
    )


class SessionsConfig(_Section):
    """Sessions, their actors and when these are renewed."""

    max_actors: int = Field(64, ge=0, le=10_000, description="session actors alive at once on a node")
    warm_actors: int = Field(1, ge=0, le=64, description="session actors kept ready for the next session")
    spawn_interval: Seconds = Field(1.0, description="least time between two spawned session actors")
    turn_wait: Seconds = Field(30.0, description="how long a second turn of a session waits before it gets 409")
    hang_timeout: Seconds = Field(
        8.0, ge=2.0, description="a session actor that answers nothing for so long is ended; its session goes on"
    )
    idle_timeout: Seconds | None = Field(
        600.0, description="a session idle for so long gives its actor back; its cache stays with the keeper"
    )
    max_age: Seconds | None = Field(6 * 3600.0, description="a session actor older than this is renewed")
    max_turns: int | None = Field(1000, ge=1, description="a session actor that served so many turns is renewed")
    max_private_growth: Bytes | None = Field(
        64 * 10**6, description="a session actor whose private memory grew by more than this is renewed"
    )
    hibernate_after: Seconds | None = Field(
        3600.0, description="a session idle for so long leaves memory; its cache goes to the disk; unset: never"
    )
    retention: Seconds | None = Field(
        None, description="a session unused for so long is deleted, journal and all (for example 30d); unset: never"
    )
    max_ephemeral: int = Field(256, ge=0, le=100_000, description="unnamed conversations kept for continuation")


class KVConfig(_Section):
    """Memory for keys and values."""

    budget: Bytes | None = Field(
        None, description="bytes of KV cache on a node; unset: half of what the cgroup allows after the weights"
    )
    hibernate_quota: Bytes = Field(
        16 * 2**30, description="disk for hibernated caches, the oldest ones make room; 0: nothing hibernates"
    )
    hibernate_key_file: Path | None = Field(
        None, description="a file with 64 hexadecimal digits: hibernated caches are encrypted with this key (AES-GCM)"
    )
    reserve_wait: Seconds = Field(20.0, description="how long a turn waits for KV memory before it gets 429")


class ServerConfig(_Section):
    """HTTP."""

    host: str = Field("127.0.0.1", description="address to listen on; without keys only loopback is allowed")
    port: int = Field(8000, ge=1, le=65535, description="port of the OpenAI-compatible API")
    keys: Path | None = Field(
        None,
        description="file of API keys (phi-cluster keys new); read again when it changes; unset: whoever reaches the "
        "server may use it",
    )
    metrics_host: str = Field("127.0.0.1", description="address to listen on for /metrics, which asks for no key")
    metrics_port: int = Field(9481, ge=1, le=65535, description="port of /metrics (Prometheus)")
    internal_ports: int = Field(
        30000, ge=1024, le=64000, description="first of the loopback ports that replicas listen on behind the ingress"
    )
    max_body: Bytes = Field(8 * 2**20, ge=1, description="largest request body")
    max_import: Bytes = Field(
        2 * 2**30,
        ge=1,
        description="largest session that is imported or exported with its KV cache (its turns alone: max_body)",
    )
    body_timeout: Seconds = Field(30.0, description="a request's body must have come within this time")
    write_timeout: Seconds = Field(
        60.0, ge=1.0, description="a client that takes nothing of its reply for so long is taken for gone"
    )
    session_headers: tuple[HeaderName, ...] = Field(
        ("x-session-id",),
        min_length=1,
        max_length=8,
        description="headers that may name a session, for clients that have one of their own (x-correlation-id, ...)",
    )
    first_choice: Literal["auto", "session", "least_connections"] = Field(
        "auto",
        description="the replica that a request reaches first: that of its session's name (by the first of "
        "session_headers), or the one with the fewest connections; auto is session where there may be several nodes",
    )
    cors_origins: tuple[Origin, ...] = Field(
        (), max_length=256, description="origins whose pages may ask, such as https://app.example.com; * is any"
    )
    allowed_hosts: tuple[str, ...] = Field(
        (),
        max_length=256,
        description="without keys: names, besides this machine's own, by which clients may call the server (a proxy's)",
    )
    stream_interval: int = Field(
        1,
        ge=1,
        le=1024,
        description="tokens in each event of a stream, behind the first one: more are less smooth and cost less CPU",
    )
    keep_alive: Seconds = Field(10.0, description="an SSE comment is sent after so much silence")
    drain: Seconds = Field(30.0, description="how long running streams may go on after Ctrl-C")


class ResponsesConfig(_Section):
    """Stored responses and conversations (/v1/responses, /v1/conversations)."""

    retention: Seconds = Field(
        30 * 86400.0,
        description="a response is kept for so long after it, or one that goes on from it, was made; a conversation "
        "after its last use",
    )
    max_background: int = Field(
        16, ge=1, le=4096, description="responses in the background that run at once in one replica"
    )
    max_queued: int = Field(
        1000, ge=0, le=100_000, description="more of them that may wait in one replica; beyond that there is 429"
    )


class LoggingConfig(_Section):
    """What the processes log, into Ray's files (`ray/session_latest/logs` in the runtime folder)."""

    format: Literal["pretty", "json"] = Field("pretty", description="lines to read, or one JSON object a line")
    level: Literal["debug", "info", "warning", "error"] = Field(
        "warning", description="info has a line for each request in each process that it goes through"
    )


class TracingConfig(_Section):
    """OpenTelemetry traces of requests (pip install 'phi-cluster[otel]'): times and counts, never what was said."""

    endpoint: HttpUrl | None = Field(
        None,
        description="where spans are sent, OTLP over HTTP, such as http://127.0.0.1:4318/v1/traces; unset: no traces. "
        "Headers for it come from OTEL_EXPORTER_OTLP_HEADERS",
    )
    sample_ratio: float = Field(1.0, ge=0.0, le=1.0, description="share of the traces that begin here that is sent")
    follow_clients: bool = Field(
        True,
        description="a request whose traceparent says whether it is recorded is followed in that; false: only "
        "sample_ratio decides",
    )
    service_name: str = Field("phi-cluster", min_length=1, max_length=255, description="the resource's service.name")
    queue_size: int = Field(
        2048, ge=1, le=2**20, description="spans that wait for the collector in a replica; more are dropped"
    )
    timeout: Seconds = Field(5.0, ge=0.1, description="how long the collector may take for a batch")


class AutoscalingConfig(_Section):
    """More replicas while there is more to do."""

    max_replicas: int | None = Field(
        None,
        ge=1,
        le=256,
        description="so many replicas at most, and `replicas` at least; CPU threads and memory are divided among "
        "all of them from the beginning; unset: always as many as `replicas`",
    )
    target_turns: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="turns, running and waiting, that a replica is to have; unset: half of engine.max_num_seqs",
    )
    max_wait: Seconds = Field(2.0, description="a turn that waits longer for its first token wants one replica more")
    kv_target: float = Field(
        0.8,
        gt=0,
        le=1,
        allow_inf_nan=False,
        description="with several machines: share of the KV budget that conversations in use may need before one "
        "replica more is wanted, whose machine brings its own",
    )
    up_delay: Seconds = Field(3.0, description="a replica is added when more have been wanted for so long")
    down_delay: Seconds = Field(
        120.0, description="a replica is drained when fewer have been wanted for so long; its streams end first"
    )


class NodesConfig(_Section):
    """Several machines, one cluster: the first one serves, others join it (phi-cluster join)."""

    address: IPAddress | None = Field(
        None,
        description="address of the first machine (the head) in the network that the machines share; unset: this "
        "machine alone, on loopback",
    )
    port: int = Field(9480, ge=1, le=65535, description="Ray's port at the head, which the others join")
    ray_address: str | None = Field(
        None,
        description="a running Ray to serve on (auto, or HOST:PORT), whose nodes have the settings that phi-cluster "
        "environment prints; unset: a Ray of our own",
    )
    token_file: Path | None = Field(
        None,
        description="a file with the token that the machines share (openssl rand -hex 32, mode 0600); whoever has it "
        "can run anything on them; unset: the RAY_AUTH_TOKEN variable",
    )
    replicas_per_node: int | None = Field(
        None,
        ge=1,
        le=256,
        description="replicas that a machine has room for, which share its CPU threads and memory; unset: all that "
        "there may be on one machine, and one on each of several",
    )
    idle_timeout: Seconds | None = Field(
        None,
        description="a machine, but the head, that has had no replica for so long gives its keeper and weights back, "
        "and the memory of its sessions, so that an autoscaler of machines may take it away; unset: never",
    )
    drain: Seconds = Field(
        60.0, description="how long a machine that leaves may take to move its sessions and to end its streams"
    )


class RecyclerConfig(_Section):
    """The controller's rhythm, and when it and the keeper are renewed."""

    interval: Seconds = Field(1.0, description="how often the controller collects and decides")
    max_per_round: int = Field(4, ge=1, le=1000, description="session actors renewed in one round at most")
    max_keeper_growth: Bytes | None = Field(
        256 * 10**6,
        description="a keeper whose private memory grew by more than this is renewed, between turns; Ray leaves some "
        "8 KB in it for each session actor that there ever was",
    )
    max_controller_growth: Bytes | None = Field(
        256 * 10**6, description="a controller whose private memory grew by more than this is renewed"
    )


class Config(_Section):
    """phi-cluster's configuration."""

    model: str = Field(
        "smollm2", description="a folder with config.json, a .gguf file, a hub id, or smollm2 (built in)"
    )
    served_model_name: tuple[str, ...] = Field(
        (), description="names under which clients ask for the model; unset: the model's own name"
    )
    hub_token: str | None = Field(None, description="token for gated models; unset: the HF_TOKEN variable", repr=False)
    device: Literal["cpu", "cuda"] = Field("cpu", description="cpu, or cuda (has not run on a GPU yet)")
    dtype: Literal["auto", "float32", "bfloat16", "int8", "int4"] = Field(
        "auto", description="of the weights; auto is int8 on a CPU whose kernels were compiled, else bfloat16"
    )
    kv_cache_dtype: Literal["auto", "bfloat16", "int8"] = Field(
        "auto", description="of keys and values; auto is bfloat16 (float32 with dtype float32), int8 is half of that"
    )
    activation_dtype: Literal["int16", "int8"] = Field(
        "int16",
        description="what meets int8 weights is rounded to int16, or to int8 with a scale for each 32 numbers, which "
        "is less exact, and quicker on CPUs with AVX-512 VNNI and no AMX",
    )
    max_model_len: int | None = Field(
        None, ge=16, le=2**20, description="longest conversation in tokens; unset: what the model was trained for"
    )
    replicas: int = Field(
        1,
        ge=0,
        le=256,
        description="replicas on all machines, each with an engine of its own; one without room waits; 0, with "
        "autoscaling.max_replicas: none while nobody asks, and the first request waits until one is up",
    )
    nodes: NodesConfig = Field(default_factory=NodesConfig, description="several machines, one cluster")
    autoscaling: AutoscalingConfig = Field(
        default_factory=AutoscalingConfig, description="more replicas while there is more to do"
    )
    state_dir: Path | None = Field(
        None, description="journals, and caches that hibernate; unset: $XDG_STATE_HOME/phi-cluster"
    )
    journal: RedisUrl | None = Field(
        None,
        description="redis://, rediss:// or unix:// of a Redis that keeps the sessions' journals: servers that name it "
        "have the same sessions, and a lost machine takes none with it (pip install 'phi-cluster[redis]'; a password "
        "may be in PHI_CLUSTER_JOURNAL_PASSWORD); unset: files in state_dir",
        repr=False,
    )
    cache_dir: Path | None = Field(None, description="converted models; unset: $XDG_CACHE_HOME/phi-cluster")
    engine: EngineConfig = Field(default_factory=EngineConfig, description="the engine")
    sessions: SessionsConfig = Field(default_factory=SessionsConfig, description="sessions and their actors")
    kv: KVConfig = Field(default_factory=KVConfig, description="KV memory")
    responses: ResponsesConfig = Field(
        default_factory=ResponsesConfig, description="stored responses and conversations"
    )
    server: ServerConfig = Field(default_factory=ServerConfig, description="HTTP")
    recycler: RecyclerConfig = Field(default_factory=RecyclerConfig, description="the controller")
    logging: LoggingConfig = Field(default_factory=LoggingConfig, description="logs")
    tracing: TracingConfig = Field(default_factory=TracingConfig, description="traces")

    @model_validator(mode="after")
    def _room_to_scale(self) -> Config:
        most = self.autoscaling.max_replicas
        if most is not None and most < self.replicas:
            raise ValueError(f"autoscaling.max_replicas: {most} is less than replicas: {self.replicas}")
        if most is None and not self.replicas:
            raise ValueError("replicas: 0 would never serve; set autoscaling.max_replicas, or 1")
        return self

    @model_validator(mode="after")
    def _shared_journal(self) -> Config:
        if self.has_nodes and self.journal is None:
            raise ValueError(
                "nodes: several machines want one record of the sessions that all of them reach; set "
                "journal: redis://HOST:6379/0"
            )
        return self

    @property
    def max_replicas(self) -> int:
        """As many there may be at once."""
        return self.autoscaling.max_replicas or self.replicas

    @property
    def replicas_per_node(self) -> int:
        """As many there may be at once on one machine."""
        if self.nodes.replicas_per_node is not None:
            return self.nodes.replicas_per_node
        return 1 if self.has_nodes else self.max_replicas

    @property
    def has_nodes(self) -> bool:
        """Whether there may be other machines."""
        return self.nodes.address is not None or self.nodes.ray_address is not None

    @property
    def token_path(self) -> Path | None:
        return None if self.nodes.token_file is None else self.nodes.token_file.expanduser().absolute()

    @property
    def session_header(self) -> str | None:
        """The one by which HAProxy chooses a replica; None: by who has least to do."""
        first = self.server.first_choice
        by_session = self.has_nodes if first == "auto" else first == "session"
        return self.server.session_headers[0] if by_session else None

    @property
    def keys_path(self) -> Path | None:
        return None if self.server.keys is None else self.server.keys.expanduser().absolute()

    @property
    def state_path(self) -> Path:
        return (self.state_dir or _xdg("XDG_STATE_HOME", ".local/state")).expanduser().absolute()

    @property
    def cache_path(self) -> Path:
        return (self.cache_dir or _xdg("XDG_CACHE_HOME", ".cache")).expanduser().absolute()


_SECTIONS = frozenset(n for n, f in Config.model_fields.items() if isinstance(f.annotation, type(BaseModel)))


def _xdg(variable: str, fallback: str) -> Path:
    base = os.environ.get(variable)
    return (Path(base) if base else Path.home() / fallback) / "phi-cluster"


def load_config(path: Path | None, overrides: dict[str, Any]) -> Config:
    """Reads a YAML file (None: all defaults) and lays `overrides` over it (nested dicts, None = not given).

    Raises StartError in one sentence that names the file, the field and the nearest right name.
    """
    data: dict[str, Any] = {}
    if path is not None:
        try:
            loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
        except OSError as error:
            raise StartError(f"cannot read the configuration {path}: {error.strerror}") from None
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StartError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from None
        if loaded is not None and not isinstance(loaded, dict):
            raise StartError(f"{path} must hold fields such as 'model: smollm2', not a {type(loaded).__name__}")
            # A section whose fields are all commented out is null to YAML.
        data = {name: {} if value is None and name in _SECTIONS else value for name, value in (loaded or {}).items()}
    _overlay(data, overrides)
    try:
        return Config.model_validate(data)
    except ValidationError as error:
        raise StartError(f"{path or 'the configuration'}: {_explain(error)}") from None


def _overlay(data: dict[str, Any], overrides: dict[str, Any]) -> None:
    for name, value in overrides.items():
        if isinstance(value, dict):
            section = data.setdefault(name, {})
            if isinstance(section, dict):
                _overlay(section, value)
        elif value is not None:
            data[name] = value


def _explain(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] != "extra_forbidden":
        message = first["msg"].removeprefix("Value error, ")
        return f"{where}: {message}" if where else message
    model: type[BaseModel] = Config
    for part in first["loc"][:-1]:
        annotation = model.model_fields[str(part)].annotation
        assert isinstance(annotation, type)
        assert issubclass(annotation, BaseModel)
        model = annotation
    near = difflib.get_close_matches(str(first["loc"][-1]), model.model_fields, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known fields: {', '.join(model.model_fields)}"
    return f"unknown field {where}; {hint}"


def describe_config(config: BaseModel, indent: int = 0) -> str:
    """The configuration as commented YAML: each field's value and meaning. Secrets are not shown."""
    lines = []
    pad = "  " * indent
    for name, field in type(config).model_fields.items():
        value = getattr(config, name)
        if isinstance(value, BaseModel):
            lines += ["", f"{pad}# {field.description}", f"{pad}{name}:", describe_config(value, indent + 1)]
            continue
        if field.repr is False and value is not None:
            value = "<hidden>"
        elif isinstance(value, Path):
            value = str(value)
        elif isinstance(value, tuple):
            value = list(value)
        # On one line, whatever its length: the comment stands behind it.
        dumped = yaml.safe_dump(value, default_flow_style=True, width=float("inf"))
        shown = dumped.removesuffix("\n").removesuffix("\n...")
        lines.append(f"{pad}{name}: {shown}  # {field.description}")
    return "\n".join(lines)
