"""Owns the sets of a sweep or a study, train, public and holdout: read, split if need be, described.

Loads nothing heavy.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.config import DataPlaces, InputError
from qlora.data.chat import ChatPrompt
from qlora.data.examples import examples_digest, found_shape, load_examples
from qlora.data.prompts import AnyPrompt, for_chat, load_prompt
from qlora.data.row_shapes import Example
from qlora.data.sources import joined
from qlora.data.split import as_row, asked_keys, count_asked, hold_out
from qlora.files import write_text
from tuning.space import DataSettings, TrainingShare

PUBLIC_FILE = "public.jsonl"


@dataclass(frozen=True)
class DataSets:
    """The examples of a sweep or a study.

    words: what the rows of each set hold, by its name, and how many examples ask what others ask, for people.
    holds_conversations: training rows are messages. holdout: empty if there is none.
    """

    train: Sequence[Example]
    public: Sequence[Example]
    words: Mapping[str, str]
    holds_conversations: bool
    holdout: Sequence[Example] = ()

    @property
    def digests(self) -> dict[str, str]:
        """Return the digest of each set that there is."""
        sets = {"train": self.train, "public": self.public, "holdout": self.holdout}
        return {name: examples_digest(examples) for name, examples in sets.items() if examples}

    def keep_public(self, folder: Path) -> None:
        """Write the public examples as a data file, so that other commands can measure on them."""
        rows = (json.dumps(as_row(example), ensure_ascii=False) + "\n" for example in self.public)
        write_text(folder / PUBLIC_FILE, "".join(rows))


def read_data(data: DataSettings) -> DataSets:
    """Read the sets that settings name. Raises InputError for data that can't be had."""
    train = load_examples(data.train, data.shape, need_output=True)
    total = len(train)
    train, public, public_words = _measured_on(data, data.public, train, total)
    holdout: list[Example] = []
    if data.holdout is not None:
        train, holdout, holdout_words = _measured_on(data, data.holdout, train, total)
    shape = found_shape(data.train, data.shape)
    train, public = train[: data.train_examples], public[: data.public_examples]
    words = {
        "train": shape.words + _fewer(train, data.train_examples, "train_examples"),
        "public": public_words
        + _fewer(public, data.public_examples, "public_examples")
        + _overlap(public, train, "a training example"),
    }
    if holdout:
        others = [*train, *public]
        overlap = _overlap(holdout, others, "a training or public example")
        words["holdout"] = f"{len(holdout)} examples, {holdout_words}{overlap}"
    return DataSets(train, public, words, shape.holds_conversations, holdout)


def _measured_on(
    data: DataSettings, places: TrainingShare | DataPlaces, train: list[Example], total: int
) -> tuple[list[Example], list[Example], str]:
    """Return what is left to train on, the examples to measure on, and what their rows hold.

    A share is one of `total` examples, of which `train` are left.
    """
    if not isinstance(places, TrainingShare):
        examples = load_examples(places, data.shape, need_output=True)
        return train, examples, found_shape(places, data.shape).words
    fraction = places.fraction * total / len(train)
    if fraction >= 1:
        raise InputError(joined(data.train), "shares for public and holdout leave nothing to train on")
    try:
        left, examples = hold_out(train, fraction, places.seed)
    except ValueError as error:
        raise InputError(joined(data.train), str(error)) from None
    return left, examples, found_shape(data.train, data.shape).words


def _fewer(examples: Sequence[Example], asked: int | None, setting: str) -> str:
    """Say that there are fewer examples than a setting asks for; nothing if there are as many."""
    return f"; {setting} asks for {asked}" if asked is not None and len(examples) < asked else ""


def _overlap(examples: Sequence[Example], others: Sequence[Example], one_of_them: str) -> str:
    """Say how many examples ask what others ask; nothing if none does."""
    count = count_asked(examples, asked_keys(others))
    return f"; {count} of them ask what {one_of_them} asks" if count else ""


def own_prompts(
    names: Sequence[str | None], sets: DataSets, *, loss: str | None, thinking: bool | None
) -> list[AnyPrompt]:
    """Load the prompts that settings name. Of several, `loss` and `thinking` are for those that are chats.

    Raises InputError as `own_prompt` does, and if none of them is one.
    """
    if len(names) == 1:
        return [own_prompt(names[0], sets, loss, thinking)]
    prompts = [own_prompt(name, sets, None, None) for name in names]
    are_chats = any(isinstance(prompt, ChatPrompt) for prompt in prompts)
    return [
        for_chat(prompt, "search.prompt", loss, thinking)
        if isinstance(prompt, ChatPrompt) or not are_chats
        else prompt
        for prompt in prompts
    ]


def own_prompt(name: str | None, sets: DataSets, loss: str | None, thinking: bool | None) -> AnyPrompt:
    """Load the prompt that settings name or, where they name none, that fits the data.

    Raises InputError for one that can't be had, and for settings that it has no use for.
    """
    fitting = "chat" if sets.holds_conversations else "default"
    return for_chat(load_prompt(name or fitting), "prompt", loss, thinking)
