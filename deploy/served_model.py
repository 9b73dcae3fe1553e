"""The registered model as MLflow loads it: base + adapter; instructions go in, outputs come out.

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([{"instruction": "翻譯成文言文：你好"}], params={"num_beams": 3, "max_new_tokens": 64})

MLflow keeps a copy of this file and of the packages that it imports beside the adapter, and runs the file
when a model is loaded.
"""

import threading
from collections import OrderedDict
from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from inference.engine import Engine, make_engine
from qlora.base.model import context_tokens, load_tokenizer
from qlora.config import MAX_LENGTH_TOKENS, BaseModelSettings, DecodingSettings
from qlora.data.prompts import load_prompt, too_long_problem
from qlora.data.row_shapes import Turn
from qlora.served import load_merged

_MOST_ENGINES = 4  # each keeps a cache of keys and values for its settings


class AdapterModel(PythonModel):
    """Generation with a base and an adapter; beams and lengths are parameters of a prediction.

    Calls from several threads wait for each other: there is one model.
    """

    def load_context(self, context: Any) -> None:
        """Load the base that `model_config` names, the adapter, and the prompt it was trained with."""
        config = context.model_config
        base = BaseModelSettings(name=config["base_model"], quantization=config["quantization"])
        self._tokenizer = load_tokenizer(base.name)
        self._prompt = load_prompt(context.artifacts["prompt"])
        self._model = load_merged(base, context.artifacts["adapter"])
        self._attention = self._model.config._attn_implementation
        self._engines: OrderedDict[DecodingSettings, Engine] = OrderedDict()
        self._lock = threading.Lock()

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """Turn a column `instruction` into a column `output`, row by row.

        Raises ValueError, naming the row, for a prompt that leaves no room for the new tokens.
        """
        decoding = DecodingSettings(**(params or {}))
        asked = [[Turn("user", text)] for text in model_input["instruction"]]
        prompts = [self._prompt.ids(self._tokenizer, turns) for turns in asked]
        room = (context_tokens(self._model.config) or MAX_LENGTH_TOKENS) - decoding.max_new_tokens
        for row, prompt in enumerate(prompts):
            if problem := too_long_problem(len(prompt), room):
                raise ValueError(f"row {row}: {problem}")
        with self._lock:
            found = {index: text for index, text, _ in self._engine(decoding).generate(prompts)}
        return pandas.DataFrame({"output": [found[index] for index in range(len(prompts))]})

    def _engine(self, decoding: DecodingSettings) -> Engine:
        engine = self._engines.pop(decoding, None)
        engine = engine or make_engine(
            self._model, self._tokenizer, decoding, self._attention, self._prompt.end_ids(self._tokenizer)
        )
        self._engines[decoding] = engine  # last in order: the first is the one not used for longest
        if len(self._engines) > _MOST_ENGINES:
            self._engines.popitem(last=False)
        return engine


set_model(AdapterModel())
