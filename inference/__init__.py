"""Batch inference on Ray Data. The only room that imports ray.data."""
