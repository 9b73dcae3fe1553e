"""Owns the errors of a tracking server: that it gives no answer, and what it refuses.

Refuses to load MLflow, so that it loads at once.
"""

import sys


class TrackingAwayError(Exception):
    """The tracking server gives no answer; the text is one line that says which server and why."""


def refusal(error: BaseException) -> str | None:
    """Say in a line what a tracking server refused, if that is what an error tells; None for any other."""
    mlflow = sys.modules.get("mlflow.exceptions")
    if mlflow is None or not isinstance(error, mlflow.MlflowException):
        return None
    return " ".join(str(error).split())
