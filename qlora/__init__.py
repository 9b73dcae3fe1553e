"""The learning core: data, prompts, packing, attention, adapters, training and the metric. Knows neither Ray nor MLflow."""
