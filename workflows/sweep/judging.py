"""Owns judging adapters by their texts: chrF, BLEU, exact matches, or a function of people's own.

A function is sent to hosts by value, so that no node needs its file; what it imports has to be there.
"""

import importlib
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config import DecodingSettings, InputError, first_line
from qlora.data.row_shapes import Example
from qlora.data.split import as_row
from tuning.objective import Objective

if TYPE_CHECKING:
    from inference.banked import BankedGenerator
    from qlora.lora.bank import Adapter, AdapterBank
    from tuning.examples import PromptedExamples

Function = Callable[[Sequence[Mapping[str, Any]], Sequence[str]], float]
_WHERE = "objective"


@dataclass
class TextJudge:
    """Judges adapters by greedy texts for the public examples.

    base: the name of the base, for its tokenizer. rows: the examples, as rows of a data file. function: of
    people's own, if the objective names one.
    """

    objective: Objective
    base: str
    rows: Sequence[Mapping[str, Any]]
    references: Sequence[str]
    function: Function | None = None
    _generator: "BankedGenerator | None" = field(default=None, repr=False)

    def values(
        self, bank: "AdapterBank", requests: Sequence[tuple["Adapter | None", "PromptedExamples"]]
    ) -> list[float]:
        """Return the objective's value of each adapter (None: the bare base).

        Raises what a function of people's own raises, and ValueError where it gives no finite number.
        """
        from inference.banked import BankedGenerator
        from qlora.base.model import load_tokenizer

        if self._generator is None:
            decoding = DecodingSettings(num_beams=1, max_new_tokens=self.objective.max_new_tokens)
            self._generator = BankedGenerator(bank, load_tokenizer(self.base), decoding)
        generator = self._generator
        return [
            self.value(generator.texts(adapter, examples.asked, examples.ends))
            for adapter, examples in requests
        ]

    def value(self, texts: Sequence[str]) -> float:
        """Return the objective's value of texts, one for each example."""
        if self.function is not None:
            value = self.function(self.rows, list(texts))
            if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"{self.objective.name} gave {value!r}, which is no finite number")
            return float(value)
        from inference.scores import Scores

        scores = Scores()
        for text, reference in zip(texts, self.references, strict=True):
            scores.add(text, reference)
        return float(scores.summary()[self.objective.name])


def make_judge(objective: Objective, base: str, public: Sequence[Example], where: str) -> TextJudge | None:
    """Return the judge of an objective, tried on the examples' own answers; None for public perplexity.

    Raises InputError for a function that can't be had or fails, and, naming `where` the examples are from,
    for plain text, which asks for no answer.
    """
    if objective.is_perplexity:
        return None
    if not all(example.turns for example in public):
        raise InputError(where, f"is plain text, which asks for nothing; {objective.name} needs answers")
    function = _load_function(objective.name) if objective.is_function else None
    rows, references = [as_row(example) for example in public], [example.output or "" for example in public]
    judge = TextJudge(objective, base, rows, references, function)
    try:
        judge.value(references)
    except Exception as error:  # whatever people's own code raises
        raise InputError(
            _WHERE, f"{objective.name} fails on the answers of {where}: {first_line(error)}"
        ) from error
    return judge


def _load_function(name: str) -> Function:
    """Import MODULE:FUNCTION, also from the current folder. Raises InputError."""
    from ray import cloudpickle

    module_name, _, function_name = name.partition(":")
    try:
        with _current_folder_first():
            module = importlib.import_module(module_name)
    except Exception as error:  # whatever a module of people's own raises
        raise InputError(_WHERE, f"{module_name} can't be imported: {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(_WHERE, f"{module_name} has no function {function_name}")
    cloudpickle.register_pickle_by_value(module)
    return function  # type: ignore[no-any-return]


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
