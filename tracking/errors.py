"""Owns the error for a tracking server that gives no answer.

Refuses to know MLflow, so that it loads at once.
"""


class TrackingAwayError(Exception):
    """The tracking server gives no answer; the text is one line that says which server and why."""
