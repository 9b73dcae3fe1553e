"""The registered model as MLflow loads it: base + adapter; instructions go in, outputs come out.

    model = mlflow.pyfunc.load_model("models:/NAME@champion")
    model.predict([{"instruction": "翻譯成文言文：你好"}], params={"num_beams": 3, "max_new_tokens": 64})

MLflow keeps a copy of this file and of the packages that it imports beside the adapter, and runs the file when a model is loaded.
"""

from typing import Any

import pandas
from mlflow.models import set_model
from mlflow.pyfunc import PythonModel

from inference.engine import Engine, make_engine
from qlora.base.model import load_tokenizer
from qlora.config import BaseModelSettings, DecodingSettings
from qlora.data.prompts import encode_prompt, load_prompt
from qlora.served import load_merged


class AdapterModel(PythonModel):
    """Generation with a base and an adapter; beams and lengths are parameters of a prediction."""

    def load_context(self, context: Any) -> None:
        """Load the base that `model_config` names and the adapter, the prompt being the one that the adapter was trained with."""
        config = context.model_config
        base = BaseModelSettings(name=config["base_model"], quantization=config["quantization"])
        self._tokenizer = load_tokenizer(base.name)
        self._prompt = load_prompt(context.artifacts["prompt"])
        self._model = load_merged(base, context.artifacts["adapter"])
        self._engines: dict[DecodingSettings, Engine] = {}

    def predict(
        self, context: Any, model_input: pandas.DataFrame, params: dict[str, Any] | None = None
    ) -> pandas.DataFrame:
        """A column `instruction` -> a column `output`, row by row."""
        decoding = DecodingSettings(**(params or {}))
        if decoding not in self._engines:
            self._engines[decoding] = make_engine(self._model, self._tokenizer, decoding)
        prompts = [
            encode_prompt(self._tokenizer, self._prompt.render(text)) for text in model_input["instruction"]
        ]
        texts = {index: text for index, text, _ in self._engines[decoding].generate(prompts)}
        return pandas.DataFrame({"output": [texts[index] for index in range(len(prompts))]})


set_model(AdapterModel())
