"""A sweep from its space file to its registered adapter: folder, prepared, start, run, registration, closing."""
