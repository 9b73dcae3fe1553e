"""Owns what a sweep works on, made once and handed on: its files as they were read, then as token ids.

Importing it loads nothing heavy; `prepare` does.
"""

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from qlora.base.reference import base_files_digest, check_has_weights, resolve_base
from qlora.config import InputError
from qlora.data.chat import ChatPrompt
from qlora.data.prompts import AnyPrompt, EncodedExample, prompt_file, prompt_text
from tuning.space import Space
from workflows.data_sets import DataSets, own_prompt, read_data
from workflows.sweep.folder import SweepFolder

if TYPE_CHECKING:
    from qlora.lora.peft_folder import AdapterFiles
    from tuning.host import SweepData
    from tuning.model_size import ModelSize


@dataclass(frozen=True)
class SweepInputs:
    """A sweep's files, read once.

    prompt_text: what the prompt is loaded from again. digests: of train and public examples, of the
    prompt and, if it is local, of the base without its weights' values, by role.
    """

    sets: DataSets
    prompt: AnyPrompt
    prompt_text: str
    digests: Mapping[str, str]


@dataclass(frozen=True)
class BaseFacts:
    """The facts of a base that are known without its weights.

    revision: a hub commit. template_digest: of the chat template that prompts are in, if they are in one.
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

    start: the adapter that its trials go on from, if there is one. holdout: empty if there is none.
    """

    space: Space
    inputs: SweepInputs
    train: Sequence[EncodedExample]
    public: Sequence[EncodedExample]
    base: BaseFacts
    start: "AdapterFiles | None"
    holdout: Sequence[EncodedExample] = ()

    def host_data(self, budgets: Mapping[str, int]) -> "SweepData":
        """Return what hosts are given. `budgets`: tokens that a pass may hold, by the device's name."""
        from tuning.host import SweepData

        least = min(budgets.values())
        return SweepData(self.space, self.train, self.public, least, self.start, budgets)


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
    prompt = own_prompt(space.prompt, sets, space.loss, space.thinking)
    digests = {**sets.digests, "prompt": prompt.digest}
    if files := base_files_digest(space.base_model.name):
        digests["base_files"] = files
    places = {
        "base_files": space.base_model.name,
        "train": space.data.train_name,
        "public": space.data.public_name,
        "holdout": space.data.holdout_name,
        "prompt": str(prompt_file(prompt.name)),
    }
    for role, digest in sweep.digests.items():
        if digests.get(role) != digest:
            raise InputError(
                places[role], "changed since the sweep started; start a new sweep under another --name"
            )
    return SweepInputs(sets, prompt, prompt_text(prompt), digests)


def prepare(sweep: SweepFolder, inputs: SweepInputs, needs_weights: bool = True) -> PreparedSweep:
    """Tokenise a sweep's data and look at its base, whose name in the result has the hub commit.

    `needs_weights`: see `load_facts`. Raises InputError for bad data or a base that can't be had.
    """
    from qlora.base.model import (
        base_revision,
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
    check_chat(inputs.prompt, tokenizer, space.base_model.name)
    limit = longest_example(config, space.max_length)
    revision = base_revision(space.base_model.name)
    space = space.model_copy(update={"base_model": pinned(space.base_model)})
    template = template_digest(tokenizer) if isinstance(inputs.prompt, ChatPrompt) else None
    cut = (limit, length_reason(config, space.max_length))
    data, sets = space.data, inputs.sets
    return PreparedSweep(
        space,
        inputs,
        train=encode_examples(tokenizer, inputs.prompt, sets.train, data.train_name, *cut),
        public=encode_examples(tokenizer, inputs.prompt, sets.public, data.public_name, *cut),
        base=BaseFacts(size, revision, tokenizer_digest(tokenizer), template, limit),
        start=AdapterFiles.read(sweep.start[1]) if sweep.start else None,
        holdout=encode_examples(tokenizer, inputs.prompt, sets.holdout, data.holdout_name, *cut),
    )
