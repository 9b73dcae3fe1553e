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
import urllib.request
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tracking.address import tracking_uri
from tracking.links import run_link
from workflows.sweep.closing import summary_links

_ROOT = Path(__file__).resolve().parent.parent
_FLAGS = (
    "--use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader --ignore-gpu-blocklist "
    "--force-color-profile=srgb"
)
_SETTLE_SECONDS = 8
_CLOSE_ASSISTANT = "document.querySelectorAll('aside button, [aria-label=\"Close\"]').forEach(b => b.click())"


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
    parser.add_argument(
        "--results", type=Path, default=_ROOT / "results", help="where sweeps and studies are"
    )
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
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
        pages = _pages(f"http://127.0.0.1:{port}/", arguments.results / arguments.sweep)
        if arguments.study:
            pages["study"] = ((arguments.results / "studies" / arguments.study / "study.html").as_uri(), 1990)
        print(json.dumps(look(pages, arguments.out), ensure_ascii=False))
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def _pages(root: str, sweep: Path) -> dict[str, tuple[str, int]]:
    """Return for each picture its address, as a sweep prints it, and its height."""
    summary = json.loads((sweep / "summary.json").read_text(encoding="utf-8"))
    links = summary_links(summary, root)
    best = run_link(summary["mlflow_experiment_id"], summary["best"]["mlflow_run_id"], root)
    return {
        "trials": (links["trials"], 1000),
        "compare": (links["compare"], 1000),
        "sweep": (links["sweep"], 1000),
        "trial": (best.replace("?", "/model-metrics?"), 1000),
        "model": (links["version"], 1000),
        "report": ((sweep / "report.html").as_uri(), 1900),
    }


def look(pages: dict[str, tuple[str, int]], out: Path) -> dict[str, str]:
    """Open pages one after another, save each as out/NAME.png; returns the text that each shows.

    The browser has no stored settings: it shows what a newcomer sees.
    """
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
    for name, (address, height) in pages.items():
        view.resize(1500, height)
        view.show()
        view.load(QUrl("about:blank"))
        pause(0.5)
        view.load(QUrl(address))
        pause(_SETTLE_SECONDS)
        texts[name] = evaluate("document.body.innerText")
        evaluate(_CLOSE_ASSISTANT)
        pause(4)
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
