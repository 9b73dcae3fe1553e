"""Owns the steps of a study and what they found: each result is a file, so that a study that was stopped does nothing twice.

results/studies/NAME/study.json          the settings and data digests that the steps belong to
results/studies/NAME/steps/KEY.json      what a step found      results/studies/NAME/adapters/STAGES/     PEFT folders
"""

import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from inference.scores import Scores
from qlora.base.model import load_config, load_tokenizer
from qlora.config import DecodingSettings, InputError
from qlora.data.examples import examples_digest, load_examples
from qlora.data.prompts import EncodedExample, Prompt, encode_examples, load_prompt
from qlora.files import write_json
from qlora.perplexity import mean_perplexity
from workflows.study.settings import Study, name_of
from workflows.worker import Files, Worker, adapter_files, generate_texts, measure_perplexities, train_stage

ZERO_SHOT, FEW_SHOT, ADAPTER = "zero-shot", "few-shot", "adapter"


@dataclass
class StudySteps:
    """The steps of one study in one folder. `say`: shows a line of progress. `shares`: of CPUs and GPUs that a step asks Ray for."""

    study: Study
    folder: Path
    say: Callable[[str], None]
    shares: dict[str, float] = field(default_factory=lambda: {"CPU": 1.0, "GPU": 0.0})
    _encoded: dict[str, list[EncodedExample]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        data = self.study.data
        load_config(self.study.base_model.name)
        self.train = load_examples(data.train, need_output=True)[: data.train_examples]
        self.public = load_examples(data.public, need_output=True)[: data.public_examples]
        self.tokenizer = load_tokenizer(self.study.base_model.name)
        few_shot = load_prompt("few-shot", self.study.shots, data.train)
        shown = Prompt(few_shot.name, few_shot.template, tuple(self.train[-self.study.shots :]))
        self.prompts = {
            ZERO_SHOT: load_prompt(self.study.prompt),
            FEW_SHOT: shown,
            ADAPTER: load_prompt(self.study.prompt),
        }
        for kind, prompt in self.prompts.items():
            self._encoded[kind] = encode_examples(self.tokenizer, prompt, self.public, data.public)
        self._encoded["train"] = encode_examples(
            self.tokenizer, self.prompts[ADAPTER], self.train, data.train
        )
        if len(self.public) < self.study.num_predictions:
            raise InputError(
                data.public,
                f"holds {len(self.public)} examples, fewer than num_predictions {self.study.num_predictions}",
            )

    @cached_property
    def _worker(self) -> Worker:
        return Worker(self.shares)

    def claim(self) -> None:
        """Write what the steps belong to. Raises InputError if the folder's steps belong to something else."""
        mine = {
            "study": self.study.model_dump(mode="json"),
            "train": examples_digest(self.train),
            "public": examples_digest(self.public),
        }
        path = self.folder / "study.json"
        if path.exists() and json.loads(path.read_text(encoding="utf-8")) != mine:
            raise InputError(self.folder, "holds a study with other settings or data; choose another --name")
        write_json(path, mine)

    def run(self) -> dict[str, Any]:
        """Do what is not done yet; returns all that was found, by step."""
        nodes, decoding = (
            self.study.nodes(),
            DecodingSettings(num_beams=1, max_new_tokens=self.study.max_new_tokens),
        )
        found: dict[str, Any] = {}
        for stages in nodes:
            found[f"train {name_of(stages)}"] = self._step(
                f"train {name_of(stages)}", partial(self._train, stages)
            )
            found[f"perplexity {name_of(stages)}"] = self._perplexity(
                name_of(stages), ADAPTER, self._adapter(stages)
            )
            found[f"text {name_of(stages)}"] = self._text(
                name_of(stages), ADAPTER, self._adapter(stages), decoding
            )
        best = min(nodes, key=lambda stages: found[f"perplexity {name_of(stages)}"]["mean"])
        files = self._adapter(best)
        for kind in (ZERO_SHOT, FEW_SHOT):
            found[f"perplexity {kind}"] = self._perplexity(kind, kind, {})
            found[f"text {kind}"] = self._text(kind, kind, {}, decoding)
        for beams in self.study.beams:
            settings = DecodingSettings(num_beams=beams, max_new_tokens=self.study.max_new_tokens)
            found[f"text beams {beams}"] = self._text(f"beams {beams}", ADAPTER, files, settings)
        sampling = DecodingSettings(
            num_beams=1,
            max_new_tokens=self.study.max_new_tokens,
            do_sample=True,
            seed=self.study.seed,
            **self.study.sampling.model_dump(exclude_none=True),
        )
        found["text sampling"] = self._text("sampling", ADAPTER, files, sampling)
        return {**found, "best": name_of(best)}

    def _train(self, stages: tuple[int, ...]) -> dict[str, Any]:
        start = self._adapter(stages[:-1]) if len(stages) > 1 else {}
        files, loss, seconds = self._worker.do(
            train_stage, self.study.base_model, start, self._encoded["train"], self.study.settings_of(stages)
        )
        folder = self._adapter_folder(stages)
        folder.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            (folder / name).write_bytes(content)
        return {"training_loss": loss, "seconds": seconds}

    def _perplexity(self, name: str, kind: str, files: Files) -> dict[str, Any]:
        def measure() -> dict[str, Any]:
            values, _ = self._worker.do(
                measure_perplexities, self.study.base_model, files, self._encoded[kind]
            )
            return {"mean": mean_perplexity(values), "values": values}

        return self._step(f"perplexity {name}", measure)

    def _text(self, name: str, kind: str, files: Files, decoding: DecodingSettings) -> dict[str, Any]:
        def generate() -> dict[str, Any]:
            prompts = [example.prompt for example in self._encoded[kind]]
            found = self._worker.do(generate_texts, self.study.base_model, files, prompts, decoding)
            scores = Scores()
            for text, example in zip(found["texts"], self.public, strict=True):
                scores.add(text, example.output or "")
            goes_on = sum("USER:" in text for text in found["texts"])
            return {
                **found,
                **scores.summary(),
                "rows_per_second": len(prompts) / found["seconds"],
                "asks_another_question": goes_on,
                "decoding": decoding.model_dump(exclude_none=True),
            }

        return self._step(f"text {name}", generate)

    def _step(self, key: str, work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / "steps" / f"{key.replace(' ', '-')}.json"
        if not path.exists():
            started = time.monotonic()
            result = work()
            write_json(path, result)
            told = {
                name: result[name] for name in ("mean", "training_loss", "chrf", "bleu") if name in result
            }
            self.say(
                f"{key:<28} {time.monotonic() - started:6.1f} s  "
                + ", ".join(f"{name} {value:.4g}" for name, value in told.items())
            )
        return json.loads(path.read_text(encoding="utf-8"))  # type: ignore[no-any-return]

    def _adapter_folder(self, stages: tuple[int, ...]) -> Path:
        return self.folder / "adapters" / name_of(stages)

    def _adapter(self, stages: tuple[int, ...]) -> Files:
        return adapter_files(self._adapter_folder(stages))
