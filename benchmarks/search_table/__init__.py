"""A table of configurations that were trained whole, for searchers and schedulers to be played against."""
