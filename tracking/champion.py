"""Owns the champion of a registered model: who takes the alias, and the champions before, for the way back.

A change is several writes: alias, history, descriptions. A process may end between any two of them, so the
change is first written down as a whole, in one tag; whoever writes next completes what is open:

    champion_change   the change that is going on: kind, from, to, history, reason; gone when it is complete
    champions         versions in the order in which they were champion, the present one last

Refuses to know where versions come from.
"""

import json
import math
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

from mlflow import MlflowClient
from mlflow.entities.model_registry import ModelVersion

from qlora.config import InputError
from qlora.failpoints import durable

CHAMPION = "champion"
_HISTORY, _OPEN = "champions", "champion_change"
_NUM_REMEMBERED = 200
_OBJECTIVE = "objective"  # of a version that was not chosen by public perplexity
_VERDICT = "Champion: "
_FIRST_MAX_LENGTH = "2048"  # of versions from before they said so


@dataclass(frozen=True)
class Registration:
    """The outcome of a registration: its URI and, in words, whether it is the champion and why."""

    model_uri: str
    is_champion: bool
    reason: str


@dataclass(frozen=True)
class _Change:
    """A change of champion. start: the champion before; None if there was none. history: afterwards."""

    kind: Literal["crown", "roll back"]
    start: str | None
    to: str
    history: list[str]
    reason: str


def champion(client: MlflowClient, name: str) -> ModelVersion | None:
    """Return the version that has the alias."""
    number = client.get_registered_model(name).aliases.get(CHAMPION)
    return client.get_model_version(name, str(number)) if number else None


def crown_if_better(client: MlflowClient, name: str, version: ModelVersion) -> Registration:
    """Make a version champion if it is better than the present one; says so in its description."""
    own = str(version.version)
    completed = _complete(client, name)
    if completed is not None and (completed.kind, completed.to) == ("crown", own):
        return _outcome(name, completed)  # this very command, which was ended halfway
    present = champion(client, name)
    is_champion, reason = judge(present, version)
    result = Registration(f"models:/{name}/{own}", is_champion, reason)
    if is_champion and (present is None or str(present.version) != own):
        start = str(present.version) if present else None
        history = _history(client, name, present)
        if history is None:  # damaged
            history = [start] if start else []
        if history[-3:] == [start, own, start]:  # ended halfway before changes were written down as a whole
            history = history[:-2]
        _carry_out(client, name, _Change("crown", start, own, [*history, own], reason))
    elif is_champion and (told := _told_reason(version)) is not None:
        return replace(result, reason=told)  # the reason of its own time: asking again changes nothing
    else:
        _describe(client, name, version, result)
    return result


def roll_back(client: MlflowClient, name: str) -> Registration:
    """Give the alias back to the champion before the present one. Raises InputError if there was none."""
    completed = _complete(client, name)
    if completed is not None and completed.kind == "roll back":
        return _outcome(name, completed)  # this very command, which was ended halfway
    present = champion(client, name)
    history = _history(client, name, present)
    if history is None:
        problem = (
            f"has a damaged tag {_HISTORY}, so the champion before is not known; promote one by --version"
        )
        raise InputError(f"models:/{name}", problem)
    there = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    history = _without_repeats([number for number in history if number in there])
    if len(history) < 2:
        raise InputError(f"models:/{name}", "had no champion before the present one")
    start = str(present.version) if present else None
    reason = f"rolled back from version {history[-1]}"
    change = _Change("roll back", start, history[-2], history[:-1], reason)
    _carry_out(client, name, change)
    return _outcome(name, change)


def judge(present: ModelVersion | None, version: ModelVersion) -> tuple[bool, str]:
    """Decide whether a version becomes (or stays) champion; returns that and why."""
    if present is not None and present.version == version.version:
        return True, "it is the champion already"
    if "public_perplexity" not in version.tags:
        return False, "no public perplexity is known of it; register adapters with ray_jobs/tune.py"
    ours = _perplexity(version, "public_perplexity")
    zero_shot = _perplexity(version, "zero_shot_public_perplexity")
    if not math.isfinite(ours):
        return False, f"its public perplexity, {version.tags['public_perplexity']}, is no finite number"
    if _OBJECTIVE not in version.tags and not ours < zero_shot:
        return (
            False,
            f"public perplexity {ours:.4g} is no better than the base alone, which has {zero_shot:.4g}",
        )
    if _OBJECTIVE in version.tags and not _score(version) < _score(version, "zero_shot_objective_value"):
        words = " is no better than the base alone, which has ".join(
            version.tags.get(tag, "none") for tag in ("objective_value", "zero_shot_objective_value")
        )
        return False, f"{version.tags[_OBJECTIVE]} {words}"
    if present is None:
        return True, "the first champion of this model"
    if present.tags.get("public_digest") != version.tags.get("public_digest"):
        return False, (
            f"champion version {present.version} was measured on other public examples; "
            "measure both on one file with ray_jobs/evaluate.py"
        )
    if _objective(version) != _objective(present):
        return False, (
            f"it was chosen by {_objective_in_words(version)}, champion version {present.version} by "
            f"{_objective_in_words(present)}; compare their texts with ray_jobs/batch_infer.py"
        )
    if _OBJECTIVE in version.tags:  # of texts, which compare across tokenizers and lengths
        return _judge_texts(present, version)
    lengths = [one.tags.get("max_length", _FIRST_MAX_LENGTH) for one in (present, version)]
    if lengths[0] != lengths[1]:
        return False, (
            f"champion version {present.version} was measured on examples cut at {lengths[0]} tokens, "
            f"this at {lengths[1]}; measure both alike with ray_jobs/evaluate.py --max-length"
        )
    if not _same_tokenizer(present, version):
        return False, (
            f"champion version {present.version} has another tokenizer, and a perplexity per token means "
            "nothing across tokenizers; compare texts, with ray_jobs/batch_infer.py"
        )
    theirs = _perplexity(present, "public_perplexity")
    return ours < theirs, f"public perplexity {ours:.4g} against {theirs:.4g} of version {present.version}"


def _objective(version: ModelVersion) -> tuple[str, ...]:
    """Return what a version was chosen by, which way, of texts of how many tokens, by whose function."""
    parts = ((_OBJECTIVE, "public_perplexity"), (f"{_OBJECTIVE}_mode", "min"))
    of_texts = ((f"{_OBJECTIVE}_max_new_tokens", ""), (f"{_OBJECTIVE}_digest", ""))
    return tuple(version.tags.get(tag, default) for tag, default in (*parts, *of_texts))


def _objective_in_words(version: ModelVersion) -> str:
    name, _, tokens, digest = _objective(version)
    words = f"{name} of texts of {tokens} tokens" if tokens else name
    return f"{words}, function {digest[:12]}" if digest else words


def _score(version: ModelVersion, tag: str = "objective_value") -> float:
    """Return a version's figure of its objective, with its sign turned if more is better."""
    found = _perplexity(version, tag)
    return -found if math.isfinite(found) and _objective(version)[1] == "max" else found


def _judge_texts(present: ModelVersion, version: ModelVersion) -> tuple[bool, str]:
    """Compare two versions by the objective that both were chosen by."""
    ours, theirs = (_perplexity(one, "objective_value") for one in (version, present))
    words = f"{version.tags[_OBJECTIVE]} {ours:.4g} against {theirs:.4g} of version {present.version}"
    return _score(version) < _score(present), words


def _perplexity(version: ModelVersion, tag: str) -> float:
    """Return a figure that a version was given; infinity, which others are below, if it is no finite one."""
    try:
        found = float(version.tags.get(tag, "inf"))
    except ValueError:
        return math.inf
    return found if math.isfinite(found) else math.inf


def _carry_out(client: MlflowClient, name: str, change: _Change) -> None:
    """Write down a change, then make it."""
    with durable("champion change"):
        client.set_registered_model_tag(name, _OPEN, json.dumps(asdict(change)))
    _finish(client, name, change)


def _finish(client: MlflowClient, name: str, change: _Change) -> None:
    """Do all writes of a change that is written down; doing them twice changes nothing."""
    with durable("alias champion"):
        client.set_registered_model_alias(name, CHAMPION, change.to)
    with durable("champion history"):
        remembered = json.dumps(change.history[-_NUM_REMEMBERED:])
        client.set_registered_model_tag(name, _HISTORY, remembered)
    if change.start is not None and change.start != change.to:
        dethroned = client.get_model_version(name, change.start)
        reason = f"version {change.to} took its place"
        _describe(client, name, dethroned, Registration(f"models:/{name}/{change.start}", False, reason))
    _describe(client, name, client.get_model_version(name, change.to), _outcome(name, change))
    with durable("champion change done"):
        client.delete_registered_model_tag(name, _OPEN)


def _complete(client: MlflowClient, name: str) -> _Change | None:
    """Complete a change that a process left open; returns it.

    One whose alias was set by other means since, or whose versions are gone, is given up.
    """
    model = client.get_registered_model(name)
    text = model.tags.get(_OPEN)
    if text is None:
        return None
    change, present = _read_change(text), model.aliases.get(CHAMPION)
    there = {str(version.version) for version in client.search_model_versions(f"name = '{name}'")}
    is_open = (
        change is not None
        and (str(present) if present else None) in (change.start, change.to)
        and {change.to, change.start or change.to} <= there
    )
    if change is None or not is_open:
        with durable("champion change done"):
            client.delete_registered_model_tag(name, _OPEN)
        return None
    _finish(client, name, change)
    return change


def _read_change(text: str) -> _Change | None:
    """Read a change; None for a tag that is damaged."""
    content = _json(text)
    if not isinstance(content, dict) or set(content) != set(_Change.__dataclass_fields__):
        return None
    change = _Change(**content)
    texts = (change.kind, change.to, change.reason, change.start or "")
    is_sound = all(isinstance(one, str) for one in texts) and _is_history(change.history)
    return change if is_sound else None


def _history(client: MlflowClient, name: str, present: ModelVersion | None) -> list[str] | None:
    """Return the champions up to the present one; None if the tag is damaged.

    One whose alias was set by other means counts, too.
    """
    content = _json(client.get_registered_model(name).tags.get(_HISTORY, "[]"))
    if not _is_history(content):
        return None
    own = [str(present.version)] if present is not None else []
    return _without_repeats([*content, *own])


def _is_history(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(one, str) and one.isdecimal() for one in content)


def _without_repeats(numbers: list[str]) -> list[str]:
    """Leave out a version that directly follows itself."""
    return [one for one, before in zip(numbers, [None, *numbers], strict=False) if one != before]


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None


def _told_reason(version: ModelVersion) -> str | None:
    """Return why a version is champion, as its description has it; None if it says nothing of that."""
    first = (version.description or "").partition("\n")[0]
    return first.removeprefix(_VERDICT).removesuffix(".") if first.startswith(_VERDICT) else None


def _outcome(name: str, change: _Change) -> Registration:
    return Registration(f"models:/{name}/{change.to}", True, change.reason)


def _same_tokenizer(one: ModelVersion, other: ModelVersion) -> bool:
    """Tell whether two versions read text alike; versions that don't say have to have the same base."""
    digests = [version.tags.get("tokenizer_digest") for version in (one, other)]
    if None not in digests:
        return digests[0] == digests[1]
    return one.tags.get("base_model") == other.tags.get("base_model")


def _describe(client: MlflowClient, name: str, version: ModelVersion, result: Registration) -> None:
    """Write a version's description: verdict, figures, usage."""
    tags, uri = version.tags, result.model_uri
    verdict = f"{_VERDICT if result.is_champion else 'Not champion: '}{result.reason}."
    figures = f"Public perplexity **{_perplexity(version, 'public_perplexity'):.5g}**"
    if "zero_shot_public_perplexity" in tags:
        figures += f", the base alone {_perplexity(version, 'zero_shot_public_perplexity'):.5g}"
    if _OBJECTIVE in tags:
        chosen_by = f"{tags[_OBJECTIVE]} **{tags.get('objective_value', '-')}**"
        figures = f"{chosen_by}, the base alone {tags.get('zero_shot_objective_value', '-')}. {figures}"
    if "holdout_perplexity" in tags:
        held = _perplexity(version, "holdout_perplexity")
        figures += f"; on a holdout {held:.5g} (95 % interval {tags.get('holdout_interval', '-')})"
    usage = (
        f"```\npython ray_jobs/batch_infer.py --model {uri} --input FILE --output FILE\n"
        f"python ray_jobs/evaluate.py --adapter {uri} --data FILE --output FILE\n```"
    )
    base = tags.get("base_model", "-")
    trained = f"Base `{base}` in {tags.get('quantization', '-')}, prompt `{tags.get('prompt', '-')}`, "
    of_trial = tags.get("trial_id", "-")
    kind = "average of trials" if ", " in of_trial else "trial"
    trained += f"sweep `{tags.get('sweep', '-')}`, {kind} `{of_trial}`."
    description = "\n\n".join([verdict, f"{figures}.", trained, usage])
    with durable("description"):
        client.update_model_version(name, version.version, description)
