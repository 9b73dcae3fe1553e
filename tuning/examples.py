"""Owns a sweep's examples as token ids: under each prompt that its trials may have, and those of one trial.

Trials may differ in their prompts and in how many examples they train on. Their perplexities compare as long
as the answers that are measured are the same tokens, which is checked here.

Refuses to know how examples are read and tokenised.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from qlora.config import InputError
from qlora.data.prompts import EncodedExample


@dataclass(frozen=True)
class PromptedExamples:
    """Examples under one prompt. holdout: empty if there is none.

    asked: for texts, the token ids that ask for the answer of each public example. ends: tokens that end one.
    """

    train: Sequence[EncodedExample]
    public: Sequence[EncodedExample]
    holdout: Sequence[EncodedExample] = ()
    asked: Sequence[tuple[int, ...]] = ()
    ends: tuple[int, ...] = ()

    @property
    def train_tokens(self) -> int:
        """Count the tokens of an epoch."""
        return sum(example.num_tokens for example in self.train)

    @property
    def public_tokens(self) -> int:
        """Count the tokens of an evaluation."""
        return sum(example.num_tokens for example in self.public)


@dataclass(frozen=True)
class SweepExamples:
    """The examples of a sweep under each of its prompts, by the prompt's name.

    The first is that of trials whose configuration names none.
    """

    by_prompt: Mapping[str, PromptedExamples]

    def of(self, config: Mapping[str, Any]) -> PromptedExamples:
        """Return what a trial of a configuration trains and is measured on."""
        found, count = self.by_prompt[self.prompt_of(config)], config.get("train_examples")
        return found if count is None else replace(found, train=found.train[: int(count)])

    def prompt_of(self, config: Mapping[str, Any]) -> str:
        """Return the name of a trial's prompt."""
        return config.get("prompt") or next(iter(self.by_prompt))

    def longest(self) -> PromptedExamples:
        """Return the examples under the prompt that takes most tokens, which plans count with."""
        return max(self.by_prompt.values(), key=lambda one: one.train_tokens)

    def check_compare(self) -> None:
        """Raise InputError if perplexities under one prompt don't compare with those under another.

        They do where the same tokens are scored; what ends an answer may be another token.
        """
        (first, one), *others = self.by_prompt.items()
        for name, other in others:
            pairs = list(zip(one.public, other.public, strict=True))
            pairs += zip(one.holdout, other.holdout, strict=True)
            unlike = [pair for pair in pairs if _scored(pair[0])[:-1] != _scored(pair[1])[:-1]]
            if unlike:
                are_cut = any(each.is_cut for pair in unlike for each in pair)
                mend = "raise max_length" if are_cut else "search them in sweeps of their own"
                raise InputError(
                    "search.prompt",
                    f"{name} scores other tokens than {first} in {len(unlike)} of {len(pairs)} examples, so "
                    f"that their perplexities don't compare; {mend}",
                )


def _scored(example: EncodedExample) -> list[int]:
    places = range(len(example.answer)) if example.scored is None else example.scored
    return [example.answer[place] for place in places]
