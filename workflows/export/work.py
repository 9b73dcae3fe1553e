"""Owns what an export works on: the model, the examples it is scored on, and how it was asked for.

Refuses to know formats.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from qlora.base.reference import resolve_base
from qlora.config import BaseModelSettings, InputError
from qlora.data.chat import ChatPrompt
from qlora.data.examples import examples_digest, found_shape, load_examples
from qlora.data.row_shapes import AS_FOUND, Example, RowShape
from qlora.data.sources import joined
from qlora.files import below
from qlora.home import in_results
from qlora.lora.peft_folder import CONFIG, check_adapter
from workflows.data_sets import PUBLIC_FILE
from workflows.results import open_results

if TYPE_CHECKING:
    from qlora.data.prompts import EncodedExample
    from tracking.registry import RegisteredAdapter
    from workflows.model_choice import ModelChoice

INSTRUCTION = "Hello"  # of examples of how an export is asked
Format = Literal["merged", "vllm", "gguf"]
# Settings of adapter_config.json under which an adapter is more than W + scale * B A.
_MORE_THAN_LORA = ("use_dora", "modules_to_save", "target_parameters", "trainable_token_indices")


@dataclass(frozen=True)
class ExportSettings:
    """How an export was asked for.

    dtype: of a merged folder's weights. gguf_type: of a GGUF file's matrices. rank: to reduce the adapter of
    a vLLM folder to. original_weights: the adapter goes onto the base's own weights, not onto NF4's values.
    """

    format: Format
    output: Path
    dtype: Literal["bfloat16", "float16"] = "bfloat16"
    gguf_type: Literal["f16", "q8_0"] = "f16"
    rank: int | None = None
    original_weights: bool = False


@dataclass(frozen=True)
class PublicSet:
    """The examples that champion and export are scored on; words: where they come from."""

    examples: Sequence[Example]
    words: str
    holds_conversations: bool

    @property
    def digest(self) -> str:
        """Return the digest of the examples, as versions have it."""
        return examples_digest(self.examples)


@dataclass(frozen=True)
class Work:
    """An adapter that is exported, with what it is scored on.

    config, tokenizer: the base's. encoded: the examples as the champion reads them, cut at `max_length`.
    """

    settings: ExportSettings
    choice: "ModelChoice"
    config: Any
    tokenizer: Any
    public: PublicSet
    encoded: "Sequence[EncodedExample]"
    max_length: int

    @property
    def adapter_folder(self) -> Path:
        """Return the adapter's PEFT folder."""
        assert self.choice.adapter is not None
        return self.choice.adapter.folder

    @property
    def base(self) -> BaseModelSettings:
        """Return the base that the adapter is put on: as it was tuned on, unless asked otherwise."""
        own = {"quantization": "none"} if self.settings.original_weights else {}
        return self.choice.base.model_copy(update=own)

    @property
    def name(self) -> str:
        """Return a name for what is exported that other programs take: NAME-VERSION, or the folder's."""
        version = self.choice.registered
        text = version.model_uri.removeprefix("models:/") if version else self.adapter_folder.name
        return "".join(one if one.isalnum() or one in "._-" else "-" for one in text)

    @property
    def is_chat(self) -> bool:
        """Tell whether the adapter answers under the base's chat template."""
        return isinstance(self.choice.prompt, ChatPrompt)

    @property
    def thinking(self) -> bool | None:
        """Return what a chat template is asked for as `enable_thinking`, if anything."""
        prompt = self.choice.prompt
        return prompt.settings.thinking if isinstance(prompt, ChatPrompt) else None

    @property
    def bos_text(self) -> str:
        """Return the text of the token that stands before a plain prompt, if there is one."""
        return "" if self.is_chat or self.tokenizer.bos_token is None else str(self.tokenizer.bos_token)

    @property
    def example_text(self) -> str:
        """Return the text of a prompt as it is tokenised, with BOS, for an instruction to fill in."""
        prompt = self.choice.prompt
        assert not isinstance(prompt, ChatPrompt)
        return self.bos_text + prompt.render(INSTRUCTION)

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Return the tokens that end answers: the prompt's, then the tokenizer's EOS."""
        ends = [*self.choice.prompt.end_ids(self.tokenizer), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(ends))


def base_location(base: BaseModelSettings) -> tuple[str, str | None]:
    """Return where other programs find a base: a folder or a hub id, and its revision."""
    reference = resolve_base(base.name)
    is_hub = reference.kind == "hub"
    return (reference.location if is_hub else str(Path(reference.location).resolve())), reference.revision


def read_public_set(
    places: Sequence[str] | None, version: "RegisteredAdapter | None", shape: RowShape = AS_FOUND
) -> PublicSet:
    """Read the files that are named or, without any, the public examples of the version's own sweep.

    Raises InputError if there are none, or others than the version was measured on.
    """
    if places:
        examples = load_examples(places, shape, need_output=True)
        return PublicSet(examples, joined(places), found_shape(places, shape).holds_conversations)
    sweep, digest = (version.tags.get(key, "") for key in ("sweep", "public_digest")) if version else ("", "")
    missing = InputError(
        "--data", f"is missing, and no sweep of this adapter is under {in_results()}/; give its public file"
    )
    if not sweep or Path(sweep).name != sweep:
        raise missing
    with open_results(sweep, only=(PUBLIC_FILE,)) as results:
        path = results.path / PUBLIC_FILE
        if not path.is_file():
            raise missing
        found = PublicSet(
            load_examples(str(path), need_output=True),
            below(results.place, PUBLIC_FILE),
            found_shape(str(path)).holds_conversations,
        )
    if found.digest != digest:
        raise InputError(
            found.words, "holds other examples than the version was measured on; give --data FILE"
        )
    return found


def check_plain_lora(folder: Path) -> dict[str, Any]:
    """Return an adapter's config.

    Raises InputError, naming the setting, for an adapter that adds more to a base than products of LoRA.
    """
    config = check_adapter(folder)
    more = [key for key in _MORE_THAN_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        more.append(f"bias {json.dumps(config['bias'])}")
    if more:
        raise InputError(
            folder / CONFIG,
            f"has {', '.join(more)}, which can't be exported; export an adapter of plain LoRA",
        )
    return config
