"""What a machine that joins must know of the cluster before it has a Ray of its own, as the head has left it with Ray.

Owns: the record, where it is, and reading it in a process of its own: Ray's settings count when Ray is imported, and
here they are not known before. Knows nothing of how a machine joins.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version

from phi_cluster.cluster.config import Config
from phi_cluster.cluster.errors import StartError
from phi_cluster.cluster.session.redis_server import PASSWORD_VARIABLE

_NAMESPACE = b"phi-cluster"
_KEY = b"cluster"
_READ_SECONDS = 30.0


@dataclass(frozen=True)
class ClusterRecord:
    """`config` as JSON; `num_threads`: CPU threads of an engine; `versions` of what must be the same everywhere;
    `password`: of the journals' Redis, if it is not in its address."""

    config: str
    num_threads: int
    weights_nbytes: int
    versions: dict[str, str]
    password: str | None

    @classmethod
    def of(cls, config: Config, num_threads: int, weights_nbytes: int) -> ClusterRecord:
        return cls(
            config.model_dump_json(), num_threads, weights_nbytes, _versions(), os.environ.get(PASSWORD_VARIABLE)
        )

    def loaded_config(self) -> Config:
        return Config.model_validate_json(self.config)

    def check_versions(self) -> None:
        """Raises StartError."""
        for name, here in _versions().items():
            if (there := self.versions.get(name)) != here:
                raise StartError(f"this machine has {name} {here}, the head has {there}: install the same on both")


def _versions() -> dict[str, str]:
    major, minor, _ = platform.python_version_tuple()
    return {"phi-cluster": version("phi-cluster"), "ray": version("ray"), "Python": f"{major}.{minor}"}


def publish(record: ClusterRecord) -> None:
    """For machines that will join; this process is connected to Ray."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_put(_KEY, json.dumps(asdict(record)).encode(), overwrite=True, namespace=_NAMESPACE)


def published() -> ClusterRecord | None:
    """What was published last, if anything was; this process is connected to Ray."""
    from ray.experimental import internal_kv

    data = internal_kv._internal_kv_get(_KEY, namespace=_NAMESPACE)
    return None if data is None else ClusterRecord(**json.loads(data))


def withdraw() -> None:
    """The cluster is no more; this process is connected to Ray."""
    from ray.experimental import internal_kv

    internal_kv._internal_kv_del(_KEY, namespace=_NAMESPACE)


def read(head: str, token: str) -> ClusterRecord:
    """Of the cluster whose head is at HOST:PORT. Raises StartError."""
    command = [sys.executable, "-P", "-m", __name__, head]
    environment = os.environ | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=_READ_SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise StartError(f"nobody answers at {head}: is the head up, and its nodes.port reachable?") from None
    if done.returncode:
        last = " ".join(done.stderr.split())[-300:]
        if "nauthenticated" in last or "token" in last.lower():
            raise StartError(f"{head} does not know this machine's token: use the head's nodes.token_file")
        raise StartError(f"{head} is no phi-cluster that machines can join: {last}")
    return ClusterRecord(**json.loads(done.stdout))


def _main(head: str) -> None:
    from ray._raylet import GcsClient  # type: ignore[attr-defined]

    data = GcsClient(address=head).internal_kv_get(_KEY, namespace=_NAMESPACE, timeout=_READ_SECONDS / 2)
    if data is None:
        sys.exit("it has no record of a cluster")
    sys.stdout.write(data.decode())


if __name__ == "__main__":
    _main(sys.argv[1])
