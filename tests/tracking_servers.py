"""A plain MLflow server, and a door in front of it: open or shut, quick or slow; requests are counted."""

import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from servers import free_port, wait_for


@contextmanager
def sqlite_server(folder: Path) -> Iterator[int]:
    """Within: the port of a server that keeps its runs in SQLite and its files in the folder."""
    port = free_port()
    command = [Path(sys.executable).with_name("mlflow"), "server", "--workers", "1"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    command += ["--backend-store-uri", f"sqlite:///{folder}/server.db"]
    command += ["--artifacts-destination", f"{folder}/artifacts"]
    environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    with open(folder / "server.log", "w") as log:
        server = subprocess.Popen(command, env=environment, cwd=folder, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(f"http://127.0.0.1:{port}", server, folder)
            yield port
        finally:
            server.terminate()
            server.wait(30)


class Door:
    """Passes bytes on to a server while it is open; connections to a door that is shut are refused."""

    def __init__(self, port: int):
        self.server_port, self.port = port, free_port()
        self.delay_seconds = 0.0
        self.requests: list[str] = []
        self._sockets: list[socket.socket] = []
        self._listener: socket.socket | None = None
        self.open()

    @property
    def uri(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def open(self) -> None:
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen()
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def shut(self) -> None:
        assert self._listener is not None
        for one in [self._listener, *self._sockets]:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        self._sockets.clear()

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                client, _ = listener.accept()
                server = socket.create_connection(("127.0.0.1", self.server_port))
            except OSError:
                return
            self._sockets += [client, server]
            threading.Thread(target=self._pass_on, args=(client, server, True), daemon=True).start()
            threading.Thread(target=self._pass_on, args=(server, client, False), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, are_requests: bool) -> None:
        try:
            while data := source.recv(1 << 16):
                first = data.partition(b"\r\n")[0]
                if are_requests and first.endswith(b"HTTP/1.1"):
                    self.requests.append(first.decode())
                elif not are_requests:
                    time.sleep(self.delay_seconds)
                target.sendall(data)
        except OSError:
            pass
        finally:
            for one in (source, target):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)
