"""Owns whether nodes can do the work: each is asked before a base loads, and named if it can't.

Those that are there are asked before a sweep starts (`check_nodes`), those that join later when a host of
theirs is to load its base (`Joining`).

Code and libraries are to be this process's, or results would depend on the node. A base that is a folder of
this machine is not on another one; the embedded base is sent to where it is missing. A place of checkpoints
that a node can't reach would cost its trials what they trained up to their first report.

Refuses to know what is kept there.
"""

import hashlib
import platform
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from itertools import groupby
from operator import itemgetter
from typing import Any

import ray

from qlora.base.reference import (
    base_files_digest,
    base_weights_digest,
    embedded_base_folder,
    has_embedded_base,
    resolve_base,
    split_revision,
    write_embedded_base,
)
from qlora.config import DEFAULT_BASE, InputError, first_line
from qlora.home import PROJECT_ROOT
from tuning.checkpoints import Storage
from tuning.placement import nodes_for, on_node
from tuning.plan_memory import gib

_NAME = ".reach"  # of files that tell whether nodes see the same place; they are no results
_PACKAGES = ("ray", "torch", "transformers", "peft", "bitsandbytes", "safetensors", "pyarrow", "sacrebleu")
_ROOMS = ("qlora", "tuning", "inference", "tracking", "workflows")
_FEW_AHEAD = {"_generator_backpressure_num_objects": 4}  # parts of a base on their way
_SECONDS_TO_ANSWER, _SECONDS_OF_HUB, _PART_BYTES = 180, 10, 16 << 20


@dataclass(frozen=True)
class Needs:
    """The things that a node must have to do its part.

    base: the name of a base. base_files, base_weights: the digests of a local one, see qlora.base.reference.
    storage: a path or URI that it can read and write at. temporary_bytes: free space in its temporary folder.
    """

    base: str
    base_files: str | None = None
    base_weights: str | None = None
    storage: str | None = None
    temporary_bytes: int = 0


@dataclass(frozen=True)
class NodeFacts:
    """The facts that a node tells of itself.

    versions: of Python, packages and this project's code, "" for what it lacks. lacks_embedded: whether it
    has nothing to make the embedded base from. problems: what else is wrong, with what is to blame, "" for
    the node itself.
    """

    versions: Mapping[str, str]
    lacks_embedded: bool = False
    problems: Sequence[tuple[str, str]] = field(default_factory=tuple)


def check_nodes(shares: Mapping[str, float], needs: Needs) -> set[str]:
    """Ask all nodes but this one that could hold what asks for `shares`; send the embedded base if need be.

    Returns the ids of nodes that can do their part, this one among them. Raises InputError naming the first
    that can't, and what to do about it.
    """
    mine = ray.get_runtime_context().get_node_id()
    others = {node["NodeID"]: str(node["NodeManagerAddress"]) for node in nodes_for(shares)}
    others.pop(mine, None)
    if not others:
        return {mine}
    if needs.storage is not None:
        storage = Storage.at(needs.storage)
        storage.filesystem.create_dir(storage.path)
    found, here = _ask(others, needs, mine), versions_here()
    for node, facts in found.items():
        if problem := _problem(others[node], facts, here):
            raise InputError(*problem)
    lacking = {node: others[node] for node, facts in found.items() if facts.lacks_embedded}
    if lacking:
        print(f"sending the embedded base to {', '.join(lacking.values())}", flush=True)
        _send_embedded_base(lacking, mine)
    return {mine, *found}


@dataclass(frozen=True)
class Joining:
    """A question to this process's node: what `check_nodes` asks, in case that it has joined since.

    versions: of the driver. driver: the id of its node, which has what others may lack. asked: the ids of
    nodes that `check_nodes` has asked.
    """

    needs: Needs
    versions: Mapping[str, str]
    driver: str
    asked: frozenset[str]

    def __call__(self) -> tuple[str, str] | None:
        """Return what is to blame and why this node can't do its part, or None; bring the embedded base."""
        node = ray.get_runtime_context().get_node_id()
        if node in self.asked:
            return None
        address = next(
            (str(one["NodeManagerAddress"]) for one in nodes_for({}) if one["NodeID"] == node), node
        )
        try:
            facts = _facts_here(self.needs, node, self.driver)
            problem = _problem(address, facts, self.versions)
            if problem is None and facts.lacks_embedded:
                _bring_embedded_base(self.driver)
        except Exception as error:  # whatever it is, the node can't do its part
            return f"node {address}", f"can't do its part ({_last_line(error)})"
        return problem


def joining(needs: Needs, asked: Iterable[str]) -> Joining:
    """Return the question to nodes that join later, as this process, the driver, would ask it.

    `asked`: as `check_nodes` returns it.
    """
    return Joining(needs, versions_here(), ray.get_runtime_context().get_node_id(), frozenset(asked))


def versions_here() -> dict[str, str]:
    """Return the versions of Python, of what is computed with, and of this project's code in this process."""
    found = {"Python": platform.python_version(), "this project's code": _code_digest()}
    for name in _PACKAGES:
        try:
            found[name] = version(name).partition("+")[0]  # a build's own part tells its GPU
        except PackageNotFoundError:
            found[name] = ""
    return found


def _problem(address: str, facts: NodeFacts, here: Mapping[str, str]) -> tuple[str, str] | None:
    """Return what is to blame and why the node of an address can't do its part; None if it can."""
    for name, own in here.items():
        there = facts.versions.get(name, "")
        if not own or there == own:
            continue
        if not there:
            return f"node {address}", f"has no {name}; install {name}=={own} there"
        mend = "use one version on all nodes"
        if name not in (*_PACKAGES, "Python"):
            mend = "run the command as a job with --working-dir, which brings its own"
        return f"node {address}", f"has {name} {there}, but here it is {own}; {mend}"
    for where, problem in facts.problems:
        return (where, f"the node {address} {problem}") if where else (f"node {address}", problem)
    return None


def _code_digest() -> str:
    digest = hashlib.sha256()
    for path in sorted(path for room in _ROOMS for path in (PROJECT_ROOT / room).rglob("*.py")):
        digest.update(str(path.relative_to(PROJECT_ROOT)).encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def _ask(nodes: Mapping[str, str], needs: Needs, driver: str) -> dict[str, NodeFacts]:
    """Ask nodes (addresses by id), all at once, and return what they say."""
    asked = {_on(node, _facts_here).remote(needs, node, driver): node for node in nodes}
    ended, silent = ray.wait(list(asked), num_returns=len(asked), timeout=_SECONDS_TO_ANSWER)
    found, problems = dict[str, NodeFacts](), dict[str, str]()
    for reply in ended:
        try:
            found[asked[reply]] = ray.get(reply)
        except ray.exceptions.RayError as error:
            problems[asked[reply]] = f"can't run this project ({_last_line(error)})"
    for reply in silent:
        ray.cancel(reply)
        problems[asked[reply]] = f"took no work within {_SECONDS_TO_ANSWER} s; end it, or wait for it"
    _blame_the_living(nodes, problems)
    return found


def _blame_the_living(nodes: Mapping[str, str], problems: Mapping[str, str]) -> None:
    """Raise InputError for the first node (addresses, problems by id) that is still there.

    One that went away meanwhile has no part in the work.
    """
    for node in nodes_for({}):
        if problem := problems.get(node["NodeID"]):
            raise InputError(f"node {nodes[node['NodeID']]}", problem)


def _on(node: str, work: Any, **more: Any) -> Any:
    """Return a task of Ray's that does a piece of work on a node, whatever else is done there.

    `more`: options of the task.
    """
    return ray.remote(num_cpus=0, max_retries=0)(work).options(scheduling_strategy=on_node(node), **more)


def _facts_here(needs: Needs, node: str, driver: str) -> NodeFacts:
    """Look at what this node has. `node`, `driver`: the ids of this one and the driver's."""
    problems = list[tuple[str, str]]()
    free = shutil.disk_usage(tempfile.gettempdir()).free
    if free < needs.temporary_bytes:
        words = (
            f"has {gib(free)} free in {tempfile.gettempdir()}, but {gib(needs.temporary_bytes)} are needed "
        )
        problems.append(("", words + "there for checkpoints on their way; free some"))
    is_embedded = needs.base == DEFAULT_BASE
    if not is_embedded and (problem := _base_problem(needs)):
        problems.append((needs.base, problem))
    if needs.storage is not None and (problem := _storage_problem(needs.storage, node, driver)):
        problems.append(("storage", problem))
    return NodeFacts(versions_here(), is_embedded and not has_embedded_base(), problems)


def _base_problem(needs: Needs) -> str:
    """Say why this node can't load a base that is not the embedded one; nothing if it can."""
    name, revision = split_revision(needs.base)
    if needs.base_files is not None:
        try:
            is_same = base_files_digest(needs.base) == needs.base_files
            if is_same and needs.base_weights in (None, base_weights_digest(needs.base)):
                return ""
        except InputError:
            return "has no such folder; put the base there, or give a hub id"
        return "has another model in this folder"
    from huggingface_hub import HfApi, try_to_load_from_cache

    try:
        resolve_base(needs.base)
        if not isinstance(try_to_load_from_cache(name, "config.json", revision=revision), str):
            HfApi().model_info(name, revision=revision, timeout=_SECONDS_OF_HUB)
    except Exception as error:  # whatever the hub's library raises
        return f"neither has it in its cache nor gets it from the hub ({first_line(error)})"
    return ""


def _storage_problem(place: str, node: str, driver: str) -> str:
    """Say why this node can't read and write at a place, as the driver's does; nothing if it can."""
    name = f"{_NAME}-{node}-{secrets.token_hex(4)}"  # two hosts of a node may ask at once
    try:
        storage = Storage.at(place)
        own = f"{storage.path}/{name}"
        with storage.filesystem.open_output_stream(own) as file:
            file.write(b"here")
        try:
            why = "" if _sees(driver, place, name) else "what it writes is not seen from the driver's node"
        finally:
            storage.filesystem.delete_file(own)
    except Exception as error:  # whatever a store's library raises
        why = first_line(error)
    if not why:
        return ""
    return (
        f"can't read and write at {place} ({why}), where its trials would keep their "
        "checkpoints; give a place that all nodes reach, such as --set storage=s3://BUCKET/PATH"
    )


def _sees(driver: str, place: str, name: str) -> bool:
    """Tell whether the driver's node sees a file at a place; one that can't look doesn't speak against it."""
    try:
        return bool(ray.get(_on(driver, _is_seen).remote(place, name)))
    except ray.exceptions.RayError:
        return True


def _is_seen(place: str, name: str) -> bool:
    """Tell whether this node sees a file at a place."""
    storage = Storage.at(place)
    return bool(storage.filesystem.get_file_info(f"{storage.path}/{name}").is_file)


def _send_embedded_base(nodes: Mapping[str, str], driver: str) -> None:
    """Have nodes (addresses by id) bring the embedded base from the driver's."""
    replies = {node: _on(node, _bring_embedded_base).remote(driver) for node in nodes}
    problems = dict[str, str]()
    for node, reply in replies.items():
        try:
            ray.get(reply)
        except ray.exceptions.RayError as error:
            problems[node] = f"can't take the embedded base ({_last_line(error)})"
    _blame_the_living(nodes, problems)


def _bring_embedded_base(driver: str) -> None:
    """Bring the embedded base here from the driver's node, part by part, through Ray's object stores."""
    stream = _on(driver, _embedded_parts, num_returns="streaming", **_FEW_AHEAD).remote()
    parts = (ray.get(reference) for reference in stream)
    files = groupby(parts, itemgetter(0))
    write_embedded_base((name, (part for _, part in of_file)) for name, of_file in files)


def _embedded_parts() -> Iterator[tuple[str, bytes]]:
    """Yield the parts of this node's embedded base, with the names of their files."""
    for path in sorted(embedded_base_folder().iterdir()):
        with open(path, "rb") as file:
            for part in iter(partial(file.read, _PART_BYTES), b""):
                yield path.name, part


def _last_line(error: BaseException) -> str:
    """Return the last line of what Ray says of a task's end: the error itself."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    return lines[-1] if lines else repr(error)
