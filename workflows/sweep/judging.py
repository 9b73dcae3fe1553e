"""Owns judging adapters by their texts: chrF, BLEU, exact matches, or a function of people's own.

A function is sent to hosts by value, so that no node needs its file; what it imports has to be there.
"""

import copy
import hashlib
import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora.config import DecodingSettings, InputError, first_line
from qlora.data.row_shapes import Example
from qlora.data.split import as_row
from qlora.home import RESULTS, home_folder
from tuning.objective import JudgingStoppedError, Objective, UnjudgedError

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
    people's own, if the objective names one; digest: the SHA-256 of its module's file.
    """

    objective: Objective
    base: str
    rows: Sequence[Mapping[str, Any]]
    references: Sequence[str]
    function: Function | None = None
    digest: str = ""
    _generator: "BankedGenerator | None" = field(default=None, repr=False)

    def values(
        self,
        bank: "AdapterBank",
        requests: Sequence[tuple["Adapter | None", "PromptedExamples"]],
        is_over: Callable[[], bool] = lambda: False,
    ) -> list[float | UnjudgedError]:
        """Return the objective's value of each adapter (None: the bare base), as Judge says.

        Raises JudgingStoppedError once `is_over` says so, and what writing texts raises.
        """
        from inference.banked import Asked, BankedGenerator, TextsStoppedError
        from qlora.base.model import load_tokenizer

        if self._generator is None:
            decoding = DecodingSettings(num_beams=1, max_new_tokens=self.objective.max_new_tokens)
            self._generator = BankedGenerator(bank, load_tokenizer(self.base), decoding)
        asked = [Asked(adapter, one.asked, one.ends) for adapter, one in requests]
        try:
            written = self._generator.texts(asked, is_over)
        except TextsStoppedError as error:
            raise JudgingStoppedError(str(error)) from error
        return [self._judged(texts) for texts in written]

    def _judged(self, texts: Sequence[str]) -> float | UnjudgedError:
        try:
            return self.value(texts)
        except UnjudgedError as error:
            return error.with_traceback(None)

    def value(self, texts: Sequence[str]) -> float:
        """Return the objective's value of texts, one for each example. Raises UnjudgedError."""
        if self.function is not None:
            return self._own_value(self.function, texts)
        from inference.scores import Scores

        scores = Scores([self.objective.name])
        for text, reference in zip(texts, self.references, strict=True):
            scores.add(text, reference)
        return float(scores.summary()[self.objective.name])

    def _own_value(self, function: Function, texts: Sequence[str]) -> float:
        """Return what a function of people's own gives, which may change what it is handed."""
        try:
            value = function(copy.deepcopy(list(self.rows)), list(texts))
        except Exception as error:  # whatever people's own code raises
            raise UnjudgedError(f"{self.objective.name} failed on the texts: {first_line(error)}") from error
        if isinstance(value, bool) or not isinstance(value, Real) or not math.isfinite(value):
            raise UnjudgedError(f"{self.objective.name} gave {value!r}, which is no finite number")
        return float(value)


def make_judge(objective: Objective, base: str, public: Sequence[Example], where: str) -> TextJudge | None:
    """Return the judge of an objective, tried on the examples' own answers; None for public perplexity.

    Raises InputError for a function that can't be had, sent to nodes or fails, and, naming `where` the
    examples are from, for plain text, which asks for no answer.
    """
    if objective.is_perplexity:
        return None
    if not all(example.turns for example in public):
        raise InputError(where, f"is plain text, which asks for nothing; {objective.name} needs answers")
    rows, references = [as_row(example) for example in public], [example.output or "" for example in public]
    judge = TextJudge(objective, base, rows, references)
    if objective.is_function:
        judge.function, judge.digest = _load_function(objective.name)
    try:
        judge.value(references)
    except UnjudgedError as error:
        raise InputError(_WHERE, f"{error}, which were the answers of {where}") from error
    if objective.is_function:
        _check_can_be_sent(judge)
    return judge


def _load_function(name: str) -> tuple[Function, str]:
    """Import MODULE:FUNCTION, also from the current folder; returns it with the digest of its file.

    Raises InputError, also for a module among results, which others may write.
    """
    module_name, _, function_name = name.partition(":")
    if _is_among_results(module_name):
        raise InputError(_WHERE, f"{module_name} lies among results, from which no code is run")
    try:
        with _current_folder_first():
            module = importlib.import_module(module_name)
        file = Path(module.__file__).read_bytes() if module.__file__ else b""
    except Exception as error:  # whatever a module of people's own raises
        raise InputError(_WHERE, f"{module_name} can't be imported: {first_line(error)}") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise InputError(_WHERE, f"{module_name} has no function {function_name}")
    return function, hashlib.sha256(file).hexdigest()


def _is_among_results(module_name: str) -> bool:
    """Tell whether a module would be imported from a folder of results; nothing is imported for that."""
    first, *rest = module_name.split(".")
    with _current_folder_first():
        found = importlib.util.find_spec(first)
    if found is None:
        return False
    places = [*(found.submodule_search_locations or []), *([found.origin] if found.origin else [])]
    paths = [Path(place).resolve().joinpath(*rest) for place in places]
    homes = [Path.cwd(), *([home] if (home := home_folder()) is not None else [])]
    folders = [(one / RESULTS).resolve() for one in homes]
    return any(path.is_relative_to(folder) for path in paths for folder in folders)


def _check_can_be_sent(judge: TextJudge) -> None:
    """Raise InputError if a function of people's own can't be sent to hosts."""
    from ray import cloudpickle

    cloudpickle.register_pickle_by_value(sys.modules[judge.objective.name.partition(":")[0]])
    try:
        cloudpickle.dumps(judge)
    except Exception as error:  # whatever people's own objects raise
        problem = f"{judge.objective.name} can't be sent to other processes: {first_line(error)}"
        raise InputError(_WHERE, problem) from error


@contextmanager
def _current_folder_first() -> Iterator[None]:
    folder = str(Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
