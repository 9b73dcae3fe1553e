"""Owns MLflow's pages of the embedded store: says where to look, then serves them on loopback.

python -m tracking.ui [--port 5000]
"""

import argparse
import os
import sys
from pathlib import Path

from mlflow import MlflowClient

from tracking.address import artifacts_folder, tracking_uri
from tracking.links import pages_root, trials_link, version_link
from tracking.registry import CHAMPION
from tracking.store import connect


def main() -> None:
    """Print the pages that open on what counts, then become MLflow's server where there is none."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=5000, help="on 127.0.0.1 (default: 5000)")
    port = parser.parse_args().port
    has_server = tracking_uri().startswith(("http://", "https://"))
    lines = pages(connect(), pages_root() if has_server else f"http://127.0.0.1:{port}/")
    print("\n".join(lines or ["nothing is recorded yet; run make tune first"]), flush=True)
    if has_server:
        return
    arguments = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    arguments += ["--default-artifact-root", str(artifacts_folder())]
    # A store's address may have a password in it, and everybody can read a process's arguments.
    store = {"MLFLOW_BACKEND_STORE_URI": tracking_uri()}
    environment = {**os.environ, **store, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    server = str(Path(sys.executable).with_name("mlflow"))
    os.execve(server, [server, "server", *arguments], environment)


def pages(client: MlflowClient, root: str) -> list[str]:
    """List the pages of every experiment with runs, and of every registered model's champion, one a line."""
    lines = []
    for experiment in client.search_experiments():
        if client.search_runs([experiment.experiment_id], max_results=1):
            lines.append(f"{experiment.name:<20} trials    {trials_link(experiment.experiment_id, root)}")
    for model in client.search_registered_models():
        if number := model.aliases.get(CHAMPION):
            lines.append(f"{model.name:<20} champion  {version_link(f'models:/{model.name}/{number}', root)}")
    return lines


if __name__ == "__main__":
    main()
