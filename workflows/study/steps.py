"""Owns the steps of a study and what they found: each result is a file, so that nothing is done twice.

results/studies/NAME/study.json       id, settings, digests of data and prompts that the steps belong to
results/studies/NAME/steps/KEY.json   what a step found
results/studies/NAME/adapters/STAGES/ PEFT folders
"""

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from inference.scores import Scores
from qlora.base.model import base_revision, length_reason, longest_example
from qlora.base.reference import base_files_digest, base_weights_digest
from qlora.config import DecodingSettings, InputError
from qlora.data.prompts import AnyPrompt, EncodedExample, Prompt, check_chat, encode_examples, load_prompt
from qlora.failpoints import durable
from qlora.files import read_json, write_json
from qlora.lora.peft_folder import AdapterFiles, check_adapter
from qlora.perplexity import mean_perplexity
from workflows.checked_base import load_facts, trainable_size
from workflows.data_sets import DataSets, own_prompt, read_data
from workflows.session import FailedError
from workflows.study.settings import Study, name_of
from workflows.worker import Worker, generate_texts, measure_perplexities, train_stage

ZERO_SHOT, FEW_SHOT, ADAPTER = "zero-shot", "few-shot", "adapter"
_TRAIN = "train"
_TOLD = ("mean", "training_loss", "chrf", "bleu")
_HELD = {  # by the first word of a step's key, what its file holds at least
    "train": ("training_loss", "seconds"),
    "perplexity": ("mean", "values"),
    "text": ("texts", "rows_per_second", "engine", "chrf", "bleu", "exact_match", "decoding"),
}


@dataclass(frozen=True)
class PreparedStudy:
    """The data that a study works on, made once.

    encoded: public examples as token ids by kind of prompt, and the training examples. asked: token ids that
    ask for their answers, by kind of prompt. end_tokens: see load_engine. digests: of data and prompts.
    """

    study: Study
    sets: DataSets
    encoded: Mapping[str, Sequence[EncodedExample]]
    asked: Mapping[str, Sequence[Sequence[int]]]
    end_tokens: tuple[int, ...]
    digests: Mapping[str, str]


def prepare_study(study: Study) -> PreparedStudy:
    """Read and tokenise a study's data. Raises InputError for a base, a prompt or data that can't be had."""
    data = study.data
    config, tokenizer = load_facts(study.base_model, is_packed=True)
    trainable_size(config, study.base_model.name)
    cut = (longest_example(config, study.max_length), length_reason(config, study.max_length))
    sets = read_data(data)
    train, public = sets.train, sets.public
    if len(public) < study.num_predictions:
        problem = f"holds {len(public)} examples, fewer than num_predictions {study.num_predictions}"
        raise InputError(data.public_name, problem)
    own = own_prompt(study.prompt, sets, study.loss, study.thinking)
    check_chat(own, tokenizer, study.base_model.name)
    is_template = isinstance(own, Prompt)
    few_shot = load_prompt("few-shot", study.shots, data.train, data.shape) if is_template else own
    shown = replace(few_shot, shots=tuple(train[-study.shots :]))
    prompts: dict[str, AnyPrompt] = {ZERO_SHOT: own, FEW_SHOT: shown, ADAPTER: own}
    encoded = {
        kind: encode_examples(tokenizer, prompt, public, data.public_name, *cut)
        for kind, prompt in prompts.items()
    }
    encoded[_TRAIN] = encode_examples(tokenizer, own, train, data.train, *cut)
    digests = {**sets.digests, "prompt": own.digest, "few_shot_prompt": shown.digest}
    if base := base_revision(study.base_model.name) or base_files_digest(study.base_model.name):
        digests["base"] = base
    if weights := base_weights_digest(study.base_model.name):
        digests["base_weights"] = weights
    asked = {
        kind: [prompt.ids(tokenizer, example.turns) for example in public] for kind, prompt in prompts.items()
    }
    return PreparedStudy(study, sets, encoded, asked, own.end_ids(tokenizer), digests)


class StudySteps:
    """The steps of one study in one folder."""

    def __init__(self, prepared: PreparedStudy, folder: Path, say: Callable[[str], None]):
        """Begin in a folder. `say` shows a line of progress."""
        self._prepared, self._study, self._folder, self._say = prepared, prepared.study, folder, say
        self._shares = {"CPU": 1.0, "GPU": 0.0}
        self._made_worker: Worker | None = None

    def claim(self) -> str | None:
        """Write what the steps belong to; returns the study's id, None for one from before studies had ids.

        Raises InputError if the folder's steps belong to something else, and for a damaged file.
        """
        path = self._folder / "study.json"
        mine: dict[str, Any] = {"study": self._study.model_dump(mode="json"), **self._prepared.digests}
        if not path.exists():
            if any((self._folder / "steps").glob("*.json")):
                problem = "holds steps of a study whose study.json is gone"
                raise InputError(self._folder, f"{problem}; choose another --name, or remove the folder")
            study_id = uuid.uuid4().hex
            self._prepared.sets.keep_public(self._folder)
            write_json(path, {"study_id": study_id, **mine})
            return study_id
        mend = "choose another --name, or remove the folder"
        kept = read_json(path, mend)
        if not isinstance(kept.get("study"), dict) or not isinstance(kept.get("study_id") or "", str):
            raise InputError(path, f"is damaged (it lacks what a study has); {mend}")
        if _compared(kept["study"]) != _compared(mine["study"]) or any(
            kept[key] != digest for key, digest in self._prepared.digests.items() if key in kept
        ):
            raise InputError(self._folder, "holds a study with other settings or data; choose another --name")
        for step in sorted((self._folder / "steps").glob("*.json")):
            _read_step(step)
        for stages in self._study.nodes():
            if self._step_path(f"train {name_of(stages)}").exists():
                check_adapter(self._adapter_folder(stages))
        return kept.get("study_id")  # type: ignore[no-any-return]

    def run(self, shares: dict[str, float]) -> dict[str, Any]:
        """Do what is not done yet; returns all that was found, by step.

        `shares`: what a step asks Ray for.
        """
        self._shares = shares
        study, greedy = self._study, self._decoding(num_beams=1)
        nodes = study.nodes()
        found: dict[str, Any] = {}
        for stages in nodes:
            name = name_of(stages)
            found[f"train {name}"] = self._step(f"train {name}", partial(self._train, stages))
            found[f"perplexity {name}"] = self._perplexity(name, ADAPTER, self._adapter(stages))
            found[f"text {name}"] = self._text(name, ADAPTER, self._adapter(stages), greedy)
        best = min(nodes, key=lambda stages: found[f"perplexity {name_of(stages)}"]["mean"])
        adapter = self._adapter(best)
        for kind in (ZERO_SHOT, FEW_SHOT):
            found[f"perplexity {kind}"] = self._perplexity(kind, kind, None)
            found[f"text {kind}"] = self._text(kind, kind, None, greedy)
        for beams in study.beams:
            searched = self._decoding(num_beams=beams)
            found[f"text beams {beams}"] = self._text(f"beams {beams}", ADAPTER, adapter, searched)
        drawn = study.sampling.model_dump(exclude_none=True)
        sampling = self._decoding(num_beams=1, do_sample=True, seed=study.seed, **drawn)
        found["text sampling"] = self._text("sampling", ADAPTER, adapter, sampling)
        return {**found, "best": name_of(best)}

    @property
    def _worker(self) -> Worker:
        if self._made_worker is None:
            self._made_worker = Worker(self._shares)
        return self._made_worker

    def _decoding(self, **settings: Any) -> DecodingSettings:
        return DecodingSettings(max_new_tokens=self._study.max_new_tokens, **settings)

    def _train(self, stages: tuple[int, ...]) -> dict[str, Any]:
        start = self._adapter(stages[:-1]) if len(stages) > 1 else None
        base, examples = self._study.base_model, self._prepared.encoded[_TRAIN]
        settings = self._study.settings_of(stages)
        adapter, loss, seconds = self._worker.do(train_stage, base, start, examples, settings)
        with durable("study adapter"):
            adapter.write(self._adapter_folder(stages))
        return {"training_loss": loss, "seconds": seconds}

    def _perplexity(self, name: str, kind: str, adapter: AdapterFiles | None) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            examples = self._prepared.encoded[kind]
            values, _ = self._worker.do(measure_perplexities, self._study.base_model, adapter, examples)
            mean = mean_perplexity(values)
            if not math.isfinite(mean):
                raise FailedError(
                    f"{name} has public perplexity {mean}: its training diverged, or its base did"
                )
            return {"mean": mean, "values": values}

        return self._step(f"perplexity {name}", measure)

    def _text(
        self, name: str, kind: str, adapter: AdapterFiles | None, decoding: DecodingSettings
    ) -> dict[str, Any]:
        def generate() -> dict[str, Any]:
            prompts, end_tokens = self._prepared.asked[kind], self._prepared.end_tokens
            base = self._study.base_model
            found = self._worker.do(generate_texts, base, adapter, prompts, decoding, end_tokens)
            scores = Scores()
            for text, example in zip(found["texts"], self._prepared.sets.public, strict=True):
                scores.add(text, example.output or "")
            return {
                **found,
                **scores.summary(),
                "rows_per_second": len(prompts) / found["seconds"],
                "asks_another_question": sum("USER:" in text for text in found["texts"]),
                "decoding": decoding.model_dump(exclude_none=True),
            }

        return self._step(f"text {name}", generate)

    def _step(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self._step_path(key)
        if not path.exists():
            started = time.monotonic()
            result = work()
            write_json(path, result, "study step")
            told = ", ".join(f"{name} {result[name]:.4g}" for name in _TOLD if name in result)
            self._say(f"{key:<28} {time.monotonic() - started:6.1f} s  {told}")
        return _read_step(path)

    def _step_path(self, key: str) -> Path:
        return self._folder / "steps" / f"{key.replace(' ', '-')}.json"

    def _adapter_folder(self, stages: tuple[int, ...]) -> Path:
        return self._folder / "adapters" / name_of(stages)

    def _adapter(self, stages: tuple[int, ...]) -> AdapterFiles:
        return AdapterFiles.read(self._adapter_folder(stages))


def _compared(study: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what tells a study's settings from another's, of one from before some of them, too.

    The prompt is told by its digest, whether it was named or fits the data; how long a node is waited for
    changes nothing.
    """
    try:
        content = Study.model_validate(study).model_dump(mode="json")
    except ValidationError:
        content = dict(study)
    return {key: value for key, value in content.items() if key not in ("prompt", "start_timeout")}


def _read_step(path: Path) -> dict[str, Any]:
    """Read what a step found. Raises InputError if the file is damaged."""
    mend = "remove it, and the same command does this step again"
    content = read_json(path, mend)
    if not set(_HELD.get(path.name.partition("-")[0], ())) <= set(content):
        raise InputError(path, f"is damaged (it lacks what such a step holds); {mend}")
    figures = [content[key] for key in (*_TOLD, "seconds") if key in content]
    if not all(isinstance(one, int | float) and math.isfinite(one) for one in figures):
        raise InputError(path, f"is damaged (a figure of it is no finite number); {mend}")
    return content
