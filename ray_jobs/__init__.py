"""Entry points: parse, validate, call, report. The only place that wires the rooms together."""
