"""Owns the training and public sets of a sweep or a study: read, split if need be, described.

Loads nothing heavy.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from qlora.config import InputError
from qlora.data.examples import examples_digest, found_shape, load_examples
from qlora.data.prompts import AnyPrompt, for_chat, load_prompt
from qlora.data.row_shapes import Example
from qlora.data.sources import joined
from qlora.data.split import as_row, asked_keys, count_asked, hold_out
from qlora.files import write_text
from tuning.space import DataSettings, PublicShare

PUBLIC_FILE = "public.jsonl"


@dataclass(frozen=True)
class DataSets:
    """The examples of a sweep or a study.

    words: what the rows of train and public hold, and how many public examples ask what is trained on, for
    people. holds_conversations: training rows are messages.
    """

    train: Sequence[Example]
    public: Sequence[Example]
    words: Mapping[str, str]
    holds_conversations: bool

    @property
    def digests(self) -> dict[str, str]:
        """Return the digests of both sets."""
        return {"train": examples_digest(self.train), "public": examples_digest(self.public)}

    def keep_public(self, folder: Path) -> None:
        """Write the public examples as a data file, so that other commands can measure on them."""
        rows = (json.dumps(as_row(example), ensure_ascii=False) + "\n" for example in self.public)
        write_text(folder / PUBLIC_FILE, "".join(rows))


def read_data(data: DataSettings) -> DataSets:
    """Read the sets that settings name. Raises InputError for data that can't be had."""
    train = load_examples(data.train, data.shape, need_output=True)
    shape = found_shape(data.train, data.shape)
    if isinstance(data.public, PublicShare):
        try:
            train, public = hold_out(train, data.public.fraction, data.public.seed)
        except ValueError as error:
            raise InputError(joined(data.train), str(error)) from None
        public_shape = shape
    else:
        public = load_examples(data.public, data.shape, need_output=True)
        public_shape = found_shape(data.public, data.shape)
    train, public = train[: data.train_examples], public[: data.public_examples]
    leaked = count_asked(public, asked_keys(train))
    told = f"; {leaked} of them ask what a training example asks" if leaked else ""
    words = {"train": shape.words, "public": public_shape.words + told}
    return DataSets(train, public, words, shape.holds_conversations)


def own_prompt(name: str | None, sets: DataSets, loss: str | None, thinking: bool | None) -> AnyPrompt:
    """Load the prompt that settings name or, where they name none, that fits the data.

    Raises InputError for one that can't be had, and for settings that it has no use for.
    """
    fitting = "chat" if sets.holds_conversations else "default"
    return for_chat(load_prompt(name or fitting), "prompt", loss, thinking)
