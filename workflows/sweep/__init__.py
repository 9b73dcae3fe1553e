"""A sweep from its space file to its registered adapter.

In reading order: folder, prepared, start, run, registration, facts, closing.
"""
