"""Streams without padding: what one is (stream), how examples become one (packing), and how a model attends over it."""
