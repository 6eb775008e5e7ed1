"""The rooms of the design and who may enter whom, read from the imports."""

from __future__ import annotations

import ast
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("cluster", "model", "monitoring", "configs")
FILES = sorted(
    path for package in PACKAGES for path in (ROOT / package).rglob("*.py") if "__pycache__" not in str(path)
)

# The order of the design: what stands later never imports what stands before. A name that ends in a dot is a room.
ORDER = [
    ["cluster.cli", "cluster.terminal"],
    ["cluster.app", "cluster.serve_app"],
    ["cluster.replica"],
    ["cluster.http."],
    ["cluster.responses."],
    ["cluster.traced_turns", "cluster.open_telemetry"],
    ["cluster.forwarding"],
    ["cluster.admission"],
    ["cluster.turn"],
    ["cluster.choices"],
    ["cluster.turn_attempt"],
    ["cluster.engine_client"],
    ["cluster.sequence_stream"],
    ["cluster.standby"],
    ["cluster.engine_link"],
    ["cluster.frames"],
    ["cluster.controller"],
    ["cluster.session."],
    ["cluster.events"],
    [
        "cluster.messages",
        "cluster.errors",
        "cluster.span",
        "cluster.turn_api",
        "cluster.session_api",
        "cluster.watch_api",
        "cluster.response_api",
        "cluster.response_items",
    ],
]
MAY_IMPORT_RAY = {
    "cluster.engine.actor",
    "cluster.session.actor",
    "cluster.session.actor_pool",
    "cluster.session.keeper",
    "cluster.session.keeper_actor",
    "cluster.session.tenure",
    "cluster.session.directory",
    "cluster.session.keeper_calls",
    "cluster.session.hand_over",
    "cluster.session.custody",
    "cluster.session.hibernation",
    "cluster.session.moving",
    "cluster.session.evacuation",
    "cluster.session.administration",
    "cluster.session.elsewhere",
    "cluster.session.node_processes",
    "cluster.weight_store",
    "cluster.actors",
    "cluster.cluster_record",
    "cluster.node_driver",
    "cluster.head",
    "cluster.head_start",
    "cluster.draining_nodes",
    "cluster.node_keepers",
    "cluster.node_drain",
    "cluster.node_starts",
    "cluster.node_tasks",
    "cluster.controller",
    "cluster.watch",
    "cluster.replica",
    "cluster.replica_reporter",
    "cluster.ray_engine",
    "cluster.app",
    "cluster.ray_cluster",
    "cluster.serve_cluster",
    "cluster.serve_app",
}
# What runs in processes that must stay small, or that must not crash with the model.
NO_TORCH = [
    "cluster.admission",
    "cluster.keys",
    "cluster.turn",
    "cluster.engine_client",
    "cluster.engine_link",
    "cluster.standby",
    "cluster.ray_engine",
    "cluster.http.",
    "cluster.session.",
    "cluster.responses.",
    "cluster.replica",
    "cluster.controller",
    "cluster.client",
    "cluster.cli",
    "cluster.app",
    "cluster.serve_app",
    "monitoring.",
]
NOT_A_CONCEPT = {"utils", "util", "common", "helpers", "manager", "misc", "base"}


@dataclass(frozen=True)
class Import:
    """`module` as in our tree ("cluster.turn"), or outside it ("torch"). `lazy`: within a function."""

    module: str
    lazy: bool
    typing_only: bool


def name_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in FILES}


@functools.cache
def imports_of(module: str) -> tuple[Import, ...]:
    tree = ast.parse(MODULES[module].read_text())
    return tuple(dict.fromkeys(_imports(tree, lazy=False, typing_only=False)))


def _imports(node: ast.AST, lazy: bool, typing_only: bool) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield Import(_ours(alias.name), lazy, typing_only)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports are absolute"
            base = _ours(child.module or "")
            for alias in child.names:
                # `from package import module` is an import of the module.
                inner = _ours(f"{child.module}.{alias.name}")
                yield Import(inner if inner in MODULES else base, lazy, typing_only)
        else:
            inside = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            guard = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from _imports(child, lazy or inside, typing_only or guard)


def _ours(module: str) -> str:
    return module.removeprefix("phi_cluster.")


def is_in(module: str, places: list[str]) -> bool:
    return any(module.startswith(place) if place.endswith(".") else module == place for place in places)


def reaches(module: str, wanted: set[str], seen: dict[str, str] | None = None) -> str | None:
    """The way from a module to one of `wanted` through what importing it imports; None if there is none."""
    for one in imports_of(module):
        if one.lazy or one.typing_only:
            continue
        if one.module.partition(".")[0] in wanted:
            return f"{module} -> {one.module}"
        seen = {} if seen is None else seen
        if one.module in MODULES and one.module not in seen:
            seen[one.module] = module
            way = reaches(one.module, wanted, seen)
            if way is not None:
                return f"{module} -> {way}"
    return None


def test_all_rooms_were_found() -> None:
    assert {"cluster.turn", "cluster.http.server", "cluster.session.actor", "model.phi3", "cluster"} <= set(MODULES)
    assert Import("cluster.errors", False, False) in imports_of("cluster.config")
    assert Import("cluster.app", True, False) in imports_of("cluster.cli")


def test_every_import_of_ours_exists() -> None:
    for module in MODULES:
        for one in imports_of(module):
            if one.module.partition(".")[0] in PACKAGES:
                assert one.module in MODULES, (module, one.module)


def test_imports_point_down_the_page() -> None:
    for above, names in enumerate(ORDER):
        for below in ORDER[above + 1 :]:
            for module in MODULES:
                if is_in(module, below):
                    wrong = [one.module for one in imports_of(module) if is_in(one.module, names)]
                    assert not wrong, f"{module} imports {wrong}, which stands above it"


def test_there_are_no_circles() -> None:
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, " -> ".join([*way, module])
        if module in done:
            return
        for one in imports_of(module):
            if one.module in MODULES and one.module != module and not one.typing_only:
                visit(one.module, (*way, module))
        done.add(module)

    for module in MODULES:
        visit(module, ())


def test_nobody_imports_the_wiring() -> None:
    allowed = {("cluster.cli", "cluster.app"), ("cluster.cli", "cluster.terminal")}
    allowed |= {("cluster.node_commands", "cluster.terminal")}
    for module in MODULES:
        for one in imports_of(module):
            if one.module in ("cluster.app", "cluster.cli", "cluster.terminal"):
                assert (module, one.module) in allowed


def test_sessions_know_neither_the_engine_nor_torch() -> None:
    for module in MODULES:
        if is_in(module, ["cluster.session."]):
            assert not [one.module for one in imports_of(module) if is_in(one.module, ["cluster.engine."])], module
            assert not [one.module for one in imports_of(module) if one.module.partition(".")[0] == "torch"], module


@pytest.mark.parametrize("module", [module for module in MODULES if is_in(module, NO_TORCH)])
def test_rooms_of_small_processes_do_not_load_torch(module: str) -> None:
    assert reaches(module, {"torch", "transformers"}) is None


@pytest.mark.parametrize(
    "module",
    ["cluster.turn", "cluster.http.server", "cluster.session.session", "cluster.session.directory", "cluster.cli"],
)
def test_importing_them_really_does_not_load_torch(module: str) -> None:
    """What our imports import in turn is beyond this file's sight."""
    code = f"import sys, phi_cluster.{module}; sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], timeout=60, check=False)
    assert done.returncode == 0


def test_the_command_line_starts_without_ray() -> None:
    """Ray reads its environment when it is imported, so that must be set before."""
    for module in ("cluster.cli", "cluster.config", "cluster.ray_environment", "cluster.client"):
        assert reaches(module, {"ray"}) is None


def test_the_network_knows_nothing_of_serving() -> None:
    for module in MODULES:
        if is_in(module, ["model."]):
            others = {one.module.partition(".")[0] for one in imports_of(module)}
            assert not others & {"cluster", "monitoring", "configs", "ray", "fastapi", "starlette"}, module


def test_metrics_know_nothing_of_the_cluster() -> None:
    for module in MODULES:
        if is_in(module, ["monitoring."]):
            assert not {one.module.partition(".")[0] for one in imports_of(module)} & {"cluster", "model", "ray"}


def test_only_these_files_know_ray() -> None:
    knowing = {m for m in MODULES for one in imports_of(m) if one.module.partition(".")[0] == "ray"}
    assert knowing <= MAY_IMPORT_RAY


def test_the_edge_knows_only_its_protocols() -> None:
    protocols = ["cluster.turn_api", "cluster.session_api", "cluster.watch_api", "cluster.response_api"]
    protocols += ["cluster.response_items", "cluster.told_logprobs", "cluster.observation", "cluster.merging"]
    allowed = ["cluster.http.", *protocols, "cluster.errors", "cluster.http", "model.sampling_params"]
    for module in MODULES:
        if is_in(module, ["cluster.http."]):
            ours = [one.module for one in imports_of(module) if one.module.partition(".")[0] in PACKAGES]
            assert not [one for one in ours if not is_in(one, allowed)], module


def test_responses_know_turns_by_their_protocol_only() -> None:
    """And of sessions only how a file of SQLite's is made."""
    allowed = ["cluster.responses.", "cluster.turn_api", "cluster.response_api", "cluster.messages", "cluster.errors"]
    allowed += ["cluster.observation", "cluster.session.sqlite_file", "cluster.responses"]
    for module in MODULES:
        if is_in(module, ["cluster.responses."]):
            ours = [one.module for one in imports_of(module) if one.module.partition(".")[0] in PACKAGES]
            assert not [one for one in ours if not is_in(one, allowed)], module


def test_a_leaf_imports_nothing_of_ours() -> None:
    for module in (
        "cluster.messages",
        "cluster.errors",
        "cluster.span",
        "cluster.turn_api",
        "cluster.session_api",
        "cluster.watch_api",
    ):
        ours = {one.module for one in imports_of(module) if one.module.partition(".")[0] in PACKAGES}
        # Where a turn's parts are measured is part of what is asked.
        assert ours <= ({"cluster.span"} if module == "cluster.turn_api" else set()), module


def test_only_the_exporter_knows_open_telemetry() -> None:
    """And it is loaded only where spans are sent."""
    knowing = {m for m in MODULES for one in imports_of(m) if one.module.partition(".")[0] == "opentelemetry"}
    assert knowing == {"cluster.open_telemetry"}
    importing = {(m, one.lazy or one.typing_only) for m in MODULES for one in imports_of(m) if one.module in knowing}
    assert importing == {("cluster.replica", True)}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_every_file_says_what_it_is(path: Path) -> None:
    if path.name == "__init__.py":
        assert path.read_text() == ""
        return
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree) or ""
    assert len(docstring.splitlines()[0]) > 20
    words = " ".join(docstring.split())
    assert "Owns" in words
    assert "nows nothing" in words
    assert path.stem not in NOT_A_CONCEPT
    assert not any(path.stem.endswith(f"_{word}") for word in NOT_A_CONCEPT)
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.Global)], "module-level state"


def test_long_files_are_named(record_property: Callable[[str, object], None]) -> None:
    """Not a failure: files that pass 300 lines want splitting."""
    lengths = {name_of(path): len(path.read_text().splitlines()) for path in FILES}
    long = {name: length for name, length in lengths.items() if length > 300}
    record_property("long_files", long)
    for name, length in sorted(long.items(), key=lambda item: -item[1]):
        print(f"{name} has {length} lines")
