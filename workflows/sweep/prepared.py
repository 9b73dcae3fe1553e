"""Owns what a sweep works on, made once and handed on: its files as they were read, then as token ids.

Importing it loads nothing heavy; `prepare` does.
"""

import hashlib
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from qlora.base.reference import base_files_digest, base_weights_digest, check_has_weights, resolve_base
from qlora.config import MAX_LENGTH_TOKENS, InputError
from qlora.data.chat import ChatPrompt
from qlora.data.prompts import AnyPrompt, EncodedExample, prompt_file, prompt_text
from tuning.examples import PromptedExamples, SweepExamples
from tuning.space import Space
from workflows.data_sets import DataSets, own_prompts, read_data
from workflows.sweep.folder import SweepFolder
from workflows.sweep.judging import TextJudge, make_judge

if TYPE_CHECKING:
    from qlora.lora.peft_folder import AdapterFiles
    from tuning.model_size import ModelSize
    from tuning.sweep_data import SweepData


@dataclass(frozen=True)
class SweepInputs:
    """A sweep's files, read once.

    prompts: those that trials may have, by name. digests: of train and public examples, of prompts and, if it
    is local, of the base without its weights' values, by role. judge: of texts, if the objective is of such.
    """

    sets: DataSets
    prompts: Mapping[str, AnyPrompt]
    digests: Mapping[str, str]
    judge: TextJudge | None = None

    @property
    def prompt_text(self) -> str | None:
        """Return what the prompt of all trials is loaded from again; None if they have several."""
        texts = [prompt_text(prompt) for prompt in self.prompts.values()]
        return texts[0] if len(texts) == 1 else None


@dataclass(frozen=True)
class BaseFacts:
    """The facts of a base that are known without its weights.

    revision: a hub commit. template_digest: of the chat template that prompts are in, if any is in one.
    max_length: tokens where examples are cut for it.
    """

    size: "ModelSize"
    revision: str | None
    tokenizer_digest: str
    template_digest: str | None
    max_length: int


@dataclass(frozen=True)
class PreparedSweep:
    """The data that a sweep works on, made once.

    start: the adapter that its trials go on from, if there is one.
    """

    space: Space
    inputs: SweepInputs
    examples: SweepExamples
    base: BaseFacts
    start: "AdapterFiles | None"

    @property
    def has_holdout(self) -> bool:
        """Tell whether there are examples that nothing is chosen on."""
        return bool(self.inputs.sets.holdout)

    def prompt_of(self, config: Mapping[str, Any]) -> AnyPrompt:
        """Return a trial's prompt."""
        return self.inputs.prompts[self.examples.prompt_of(config)]

    def planned(self) -> tuple[Sequence[EncodedExample], Sequence[EncodedExample]]:
        """Return the train and public examples that a plan counts with: under the longest prompt, and as many
        to train on as trials have on average.
        """
        found, counts = self.examples.longest(), [len(self.inputs.sets.train)]
        if "train_examples" in self.space.search:
            counts = [int(count) for count in self.space.values("train_examples")]
        return found.train[: sum(counts) // len(counts)], found.public

    def host_data(self, budgets: Mapping[str, int], recomputing: frozenset[str]) -> "SweepData":
        """Return what hosts are given, by devices' names.

        `budgets`: tokens that a pass may hold. `recomputing`: where layers are computed again.
        """
        from tuning.sweep_data import SweepData

        least = min(budgets.values())
        return SweepData(
            self.space, self.examples, least, self.start, budgets, self.inputs.judge, recomputing
        )


def read_inputs(sweep: SweepFolder, needs_weights: bool = True) -> SweepInputs:
    """Read a sweep's files; `needs_weights`: see `load_facts`.

    Raises InputError for a base, a prompt or data that can't be had, and for what changed since the sweep
    started.
    """
    space = sweep.space
    if space.searcher.type == "optuna" and importlib.util.find_spec("optuna") is None:
        raise InputError("searcher", "optuna is not installed; pip install '.[optuna]', or use random search")
    reference = resolve_base(space.base_model.name)
    if needs_weights:
        check_has_weights(reference)
    sets = read_data(space.data)
    prompts = {
        prompt.name: prompt
        for prompt in own_prompts(space.prompts, sets, loss=space.loss, thinking=space.thinking)
    }
    digests = {**sets.digests, "prompt": _digest(list(prompts.values()))}
    if files := base_files_digest(space.base_model.name):
        digests["base_files"] = files
    if weights := base_weights_digest(space.base_model.name):
        digests["base_weights"] = weights
    judge = make_judge(space.objective, space.base_model.name, sets.public, space.data.public_name)
    if judge is not None and judge.digest:
        digests["objective"] = judge.digest
    places = {
        "objective": space.objective.name,
        "base_files": space.base_model.name,
        "base_weights": f"{space.base_model.name}/*.safetensors",
        "train": space.data.train_name,
        "public": space.data.public_name,
        "holdout": space.data.holdout_name,
        "prompt": ", ".join(str(prompt_file(name)) for name in prompts),
    }
    for role, digest in sweep.digests.items():
        if digests.get(role) != digest:
            raise InputError(
                places[role], "changed since the sweep started; start a new sweep under another --name"
            )
    return SweepInputs(sets, prompts, digests, judge)


def _check_room(asked: Sequence[Sequence[int]], room: int, where: str) -> None:
    """Raise InputError if a prompt leaves no room for the tokens of a text."""
    for number, prompt in enumerate(asked):
        if len(prompt) > room:
            raise InputError(
                f"{where}:row {number}",
                f"the prompt has {len(prompt)} tokens, which leaves no room for a text; shorten it, or lower "
                "objective.max_new_tokens",
            )


def _digest(prompts: Sequence[AnyPrompt]) -> str:
    """Return one digest of all prompts: a single one's own."""
    digests = [prompt.digest for prompt in prompts]
    return digests[0] if len(digests) == 1 else hashlib.sha256("\n".join(digests).encode()).hexdigest()


def prepare(sweep: SweepFolder, inputs: SweepInputs, needs_weights: bool = True) -> PreparedSweep:
    """Tokenise a sweep's data and look at its base, whose name in the result has the hub commit.

    `needs_weights`: see `load_facts`. Raises InputError for bad data or a base that can't be had.
    """
    from qlora.base.model import (
        base_revision,
        context_tokens,
        length_reason,
        longest_example,
        pinned,
        template_digest,
        tokenizer_digest,
    )
    from qlora.data.prompts import check_chat, encode_examples
    from qlora.lora.peft_folder import AdapterFiles
    from workflows.checked_base import load_facts, trainable_size

    space = sweep.space
    config, tokenizer = load_facts(space.base_model, is_packed=True, needs_weights=needs_weights)
    size = trainable_size(config, space.base_model.name)
    prompts = inputs.prompts
    for prompt in prompts.values():
        check_chat(prompt, tokenizer, space.base_model.name)
    limit = longest_example(config, space.max_length)
    revision = base_revision(space.base_model.name)
    space = space.model_copy(update={"base_model": pinned(space.base_model)})
    is_chat = any(isinstance(prompt, ChatPrompt) for prompt in prompts.values())
    template = template_digest(tokenizer) if is_chat else None
    cut = (limit, length_reason(config, space.max_length))
    data, sets = space.data, inputs.sets

    def encoded(prompt: AnyPrompt) -> PromptedExamples:
        found = PromptedExamples(
            encode_examples(tokenizer, prompt, sets.train, data.train_name, *cut),
            encode_examples(tokenizer, prompt, sets.public, data.public_name, *cut),
            encode_examples(tokenizer, prompt, sets.holdout, data.holdout_name, *cut),
        )
        if inputs.judge is None:
            return found
        asked = [prompt.ids(tokenizer, example.turns) for example in sets.public]
        room = (context_tokens(config) or MAX_LENGTH_TOKENS) - space.objective.max_new_tokens
        _check_room(asked, room, data.public_name)
        return replace(found, asked=asked, ends=prompt.end_ids(tokenizer))

    asked_for = max(space.values("train_examples")) if "train_examples" in space.search else 0
    if asked_for > len(sets.train):
        problem = f"asks for {asked_for:g} examples, but {data.train_name} holds {len(sets.train)}"
        raise InputError("search.train_examples", problem)
    examples = SweepExamples({name: encoded(prompt) for name, prompt in prompts.items()})
    examples.check_compare()
    if sweep.start is not None:
        from workflows.sweep.starting_point import check_fits

        check_fits(sweep.start, space.trial_settings({}), size)
    return PreparedSweep(
        space,
        inputs,
        examples,
        base=BaseFacts(size, revision, tokenizer_digest(tokenizer), template, limit),
        start=AdapterFiles.read(sweep.start[1]) if sweep.start else None,
    )
