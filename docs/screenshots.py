"""Look at a finished sweep in MLflow's UI with a real browser, and keep pictures.

The browser is Chromium, in Qt's WebEngine, without a screen.

    pip install '.[browser]'
    python docs/screenshots.py quickstart [--study report] [--out docs/images]

Starts an MLflow server for the store of $MLFLOW_TRACKING_URI (default: mlruns/) on loopback, opens the pages
that people decide from, saves each as a PNG, and prints one JSON line with the text that each page shows.
"""

import argparse
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(_ROOT))

_FLAGS = (
    "--use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist "
    "--force-color-profile=srgb"
)
_SETTLE_SECONDS = 8
_LEAVE_ASSISTANT = "document.querySelectorAll('aside button, [aria-label=\"Close\"]').forEach(b => b.click())"
# The comparison opens with some of the parameters that differ and the first metric; people compare all five with perplexity.
_CHOOSE_AXES = """
(async () => {
  const wait = ms => new Promise(done => setTimeout(done, ms));
  const field = name => [...document.querySelectorAll('div')].find(
    e => e.childElementCount == 0 && e.textContent.trim() == name).nextElementSibling;
  const add = async (name, wanted) => {
    field(name).querySelector('[class*=select-selector]').dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
    await wait(1000);
    for (const option of [...document.querySelectorAll('.du-bois-light-select-item-option')])
      if (option.offsetParent && wanted.includes(option.textContent) && !option.className.includes('option-selected')) {
        option.click();
        await wait(300);
      }
    document.querySelector('h1, h2').dispatchEvent(new MouseEvent('mousedown', {bubbles: true}));
    await wait(1000);
  };
  field('Metrics:').querySelector('[class*=select-selection-item-remove]').click();
  await wait(500);
  await add('Metrics:', ['best_public_perplexity']);
  await add('Parameters:', ['learning_rate', 'lora_r', 'lora_alpha', 'lora_dropout', 'epochs']);
})()"""


def main() -> None:
    """Serve the store, look at the pages, save them."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", help="name of a finished sweep")
    parser.add_argument(
        "--study", help="name of a finished study, whose page is shown too, down to its predictions"
    )
    parser.add_argument("--out", type=Path, default=_ROOT / "docs/images")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    from tracking.runs import tracking_uri

    port = _free_port()
    server = subprocess.Popen(
        [
            Path(sys.executable).with_name("mlflow"),
            "server",
            "--host",
            "127.0.0.1",
            "--port",
            str(port),
            "--workers",
            "1",
            "--backend-store-uri",
            tracking_uri(),
        ],
        env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        _wait_for(f"http://127.0.0.1:{port}/health")
        pages = _pages(f"http://127.0.0.1:{port}", arguments.sweep)
        if arguments.study:
            pages["study"] = ((_ROOT / "results/studies" / arguments.study / "study.html").as_uri(), "", 1990)
        print(json.dumps(look(pages, arguments.out), ensure_ascii=False))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _pages(root: str, sweep: str) -> dict[str, tuple[str, str, int]]:
    """Return for each picture: its address, what is done there first, its height."""
    from mlflow import MlflowClient

    from tracking.runs import connect

    client: MlflowClient = connect()
    experiments = [experiment.experiment_id for experiment in client.search_experiments()]
    parent = client.search_runs(experiments, f"tags.sweep = '{sweep}' and tags.kind = 'sweep'")[0]
    experiment, run = parent.info.experiment_id, parent.info.run_id
    children = client.search_runs([experiment], f"tags.`mlflow.parentRunId` = '{run}'")
    name, _, version = parent.data.tags["model_uri"].removeprefix("models:/").partition("/")
    runs = urllib.parse.quote(json.dumps([child.info.run_id for child in children]))
    only, curve = (
        urllib.parse.quote(json.dumps([experiment])),
        urllib.parse.quote(json.dumps("public_perplexity")),
    )
    best = parent.data.tags["best_trial"]
    child = next(child for child in children if child.data.tags["trial_id"] == best)
    return {
        "sweep": (f"{root}/#/experiments/{experiment}/runs/{run}", "", 1300),
        "compare": (f"{root}/#/compare-runs?runs={runs}&experiments={only}", _CHOOSE_AXES, 900),
        "curves": (
            f"{root}/#/metric?runs={runs}&experiments={only}&metric={curve}&plot_metric_keys={urllib.parse.quote('[')}{curve}"
            f"{urllib.parse.quote(']')}&x_axis=step",
            "",
            800,
        ),
        "trial": (f"{root}/#/experiments/{experiment}/runs/{child.info.run_id}/model-metrics", "", 1200),
        "model": (f"{root}/#/models/{name}/versions/{version}", "", 1000),
        "report": (Path(client.download_artifacts(run, "report.html")).as_uri(), "", 1900),
    }


def look(pages: dict[str, tuple[str, str, int]], out: Path) -> dict[str, str]:
    """Open pages one after another, save each as out/NAME.png; returns the text that each shows."""
    sandbox = " --no-sandbox" if os.geteuid() == 0 else ""
    os.environ.update(
        QT_QPA_PLATFORM="offscreen", QTWEBENGINE_CHROMIUM_FLAGS=_FLAGS + sandbox, QT_LOGGING_RULES="*=false"
    )
    from PySide6.QtCore import QEventLoop, QTimer, QUrl
    from PySide6.QtWebEngineWidgets import QWebEngineView
    from PySide6.QtWidgets import QApplication

    application = QApplication.instance() or QApplication(["screenshots"])
    view = QWebEngineView()

    def pause(seconds: float) -> None:
        loop = QEventLoop()
        QTimer.singleShot(int(1000 * seconds), loop.quit)
        loop.exec()

    def evaluate(script: str) -> str:
        loop, found = QEventLoop(), [""]

        def answer(value: object) -> None:
            found[0] = str(value)
            loop.quit()

        view.page().runJavaScript(script, 0, answer)
        QTimer.singleShot(10_000, loop.quit)
        loop.exec()
        return found[0]

    texts = {}
    for name, (address, script, height) in pages.items():
        view.resize(1500, height)
        view.show()
        view.load(QUrl("about:blank"))
        pause(0.5)
        view.load(QUrl(address))
        pause(_SETTLE_SECONDS)
        evaluate(_LEAVE_ASSISTANT)
        if script:
            evaluate(script)
        pause(8 if script else 4)
        texts[name] = evaluate("document.body.innerText")
        view.grab().save(str(out / f"{name}.png"))
    view.close()
    application.processEvents()
    return texts


def _free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


def _wait_for(address: str) -> None:
    deadline = time.monotonic() + 120
    while True:
        try:
            urllib.request.urlopen(address, timeout=2)
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.5)


if __name__ == "__main__":
    main()
