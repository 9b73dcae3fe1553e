"""From rows of a file to token ids: json_rows, examples, prompts."""
