"""Speed, measured beside a baseline in the same process. Each command prints one JSON line last."""
