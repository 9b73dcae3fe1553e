"""Public perplexity of a base, with or without an adapter, under any prompt.

python ray_jobs/evaluate.py --adapter models:/quickstart@champion --data data/sample/public_test.json --output results/champion.json
"""

import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ray_jobs.cli import CommandParser, add_base_options, prompt_name, served_base, show_progress
from workflows.model_choice import local_adapter
from workflows.session import run


def main() -> None:
    """Parse, validate, measure, write."""
    parser = CommandParser(__doc__)
    add_base_options(parser)
    parser.add_argument(
        "--data", metavar="FILE", required=True, help="JSON list of rows with id, instruction and output"
    )
    parser.add_argument("--output", metavar="FILE", required=True, help="where to write the JSON result")
    arguments = parser.parse_args()

    from qlora.data.examples import examples_digest, load_examples
    from qlora.data.prompts import encode_examples, load_prompt

    examples = load_examples(arguments.data, need_output=True)
    prompt = load_prompt(prompt_name(arguments), arguments.shots, arguments.shots_from)
    adapter, adapter_base, registered = local_adapter(arguments.adapter)
    settings = served_base(arguments.base_model, adapter_base, arguments)
    from qlora.base.model import load_config, load_tokenizer

    load_config(settings.name)
    encoded = encode_examples(load_tokenizer(settings.name), prompt, examples, arguments.data)

    from qlora.base.model import default_token_budget
    from qlora.files import write_json
    from qlora.packed.attention import use_packed_attention
    from qlora.perplexity import example_perplexities, mean_perplexity
    from qlora.served import load_served

    model = load_served(settings, adapter)
    use_packed_attention(model)
    progress = partial(show_progress, time.monotonic(), unit="examples")
    values = example_perplexities(model, encoded, default_token_budget(), progress)
    write_json(
        Path(arguments.output),
        {
            "mean_perplexity": mean_perplexity(values),
            "count": len(values),
            "perplexities": {example.id: value for example, value in zip(examples, values, strict=True)},
            "settings": {
                "base_model": settings.name,
                "adapter": arguments.adapter,
                "quantization": settings.quantization,
                "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
                "data": arguments.data,
                "data_digest": examples_digest(examples),
                "prompt": prompt.name,
                "shots": arguments.shots,
                "shots_from": arguments.shots_from,
            },
        },
    )
    if registered:
        from tracking.registry import note_use

        note_use(
            registered,
            "evaluation",
            {
                "data": arguments.data,
                "data_digest": examples_digest(examples),
                "prompt": prompt.name,
                "shots": arguments.shots,
            },
            {"mean_perplexity": mean_perplexity(values), "count": len(values)},
            [Path(arguments.output)],
        )
    print(f"mean perplexity {mean_perplexity(values):.4f} over {len(values)} examples -> {arguments.output}")


if __name__ == "__main__":
    run(main)
