"""Flower beside covey: its server and clients as processes on this machine, from an environment of their own.

`install` makes the environment in build/flower (some 300 MB from the package index) or says why it cannot.
The app that is played has clients that train nothing: they move every parameter and answer.
"""

import contextlib
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

VERSION = "1.41.0"
ENVIRONMENT = Path(__file__).resolve().parents[1] / "build" / "flower"

_PROJECT = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "peer"
version = "1.0.0"
description = "moves parameters"
license = "Apache-2.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "benchmark"
[tool.flwr.app.components]
serverapp = "peer.server:app"
clientapp = "peer.client:app"
"""

_CLIENT = """
from flwr.client import ClientApp, NumPyClient

class Client(NumPyClient):
    def fit(self, parameters, config):
        return [array + 1e-3 for array in parameters], 10, {}

app = ClientApp(client_fn=lambda context: Client().to_client())
"""

_SERVER = """
import numpy as np
from flwr.common import ndarrays_to_parameters
from flwr.server import ServerApp, ServerAppComponents, ServerConfig
from flwr.server.strategy import FedAvg

def components(context):
    strategy = FedAvg(
        initial_parameters=ndarrays_to_parameters([np.zeros({parameters}, np.float32)]),
        fraction_evaluate=0.0, min_available_clients={clients},
    )
    return ServerAppComponents(strategy=strategy, config=ServerConfig(num_rounds={rounds}))

app = ServerApp(server_fn=components)
"""

_CONNECTION = """
[superlink]
default = "fleet"
[superlink.fleet]
address = "127.0.0.1:{port}"
insecure = true
"""


def install() -> str:
    """Make the environment, once. Empty if it is there; otherwise why it is not."""
    if (ENVIRONMENT / "bin" / "flwr").exists():
        return ""
    pip = [str(ENVIRONMENT / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    for arguments in (
        [sys.executable, "-m", "venv", str(ENVIRONMENT)],
        [*pip, f"flwr=={VERSION}", "numpy", "hatchling"],
    ):
        done = subprocess.run(arguments, capture_output=True, text=True)
        if done.returncode != 0:
            return (done.stderr.strip() or "no reason given").splitlines()[-1]
    return ""


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


class Peer:
    """A server and its clients. ``with`` has them running; `client` is the first client's process id."""

    def __init__(self, directory: Path, *, clients: int = 2) -> None:
        self._directory, self._clients = directory, clients
        self._stack = contextlib.ExitStack()
        directory.mkdir(parents=True)
        self.port = _free_port()
        home = directory / "home"
        home.mkdir()
        (home / "config.toml").write_text(_CONNECTION.format(port=self.port))
        bin_ = ENVIRONMENT / "bin"
        self._environment = os.environ | {
            "PATH": os.pathsep.join([str(bin_), os.environ.get("PATH", "")]),
            "FLWR_HOME": str(home),
            "FLWR_TELEMETRY_ENABLED": "0",
        }
        self.client = 0

    def __enter__(self) -> "Peer":
        address = f"127.0.0.1:{self.port}"
        with contextlib.ExitStack() as stack:
            stack.enter_context(
                self._process(
                    "flower-superlink", "--disable-runtime-dependency-installation",
                    "--host", "127.0.0.1", "--port", str(self.port),
                )
            )  # fmt: skip
            self._await(self.port)
            for _ in range(self._clients):
                port = _free_port()
                process = stack.enter_context(
                    self._process("flower-supernode", "--superlink", address, "--port", str(port))
                )
                self.client = self.client or process.pid
                self._await(port)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    @contextlib.contextmanager
    def _process(self, name: str, *arguments: str) -> Iterator["subprocess.Popen[bytes]"]:
        with (self._directory / f"{name}.log").open("ab") as log:
            process = subprocess.Popen(
                [name, "--insecure", *arguments], env=self._environment, stdout=log, stderr=log
            )
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()

    @staticmethod
    def _await(port: int) -> None:
        ends = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), 1).close()
                return
            except OSError:
                if time.monotonic() > ends:
                    raise
                time.sleep(0.1)

    def play(self, *, parameters: int, rounds: int) -> None:
        """Federated averaging without training. Raises CalledProcessError if it fails."""
        app = self._directory / "app"
        package = app / "peer"
        package.mkdir(parents=True, exist_ok=True)
        (app / "pyproject.toml").write_text(_PROJECT)
        (package / "__init__.py").write_text("")
        (package / "client.py").write_text(_CLIENT)
        (package / "server.py").write_text(
            _SERVER.format(parameters=parameters, clients=self._clients, rounds=rounds)
        )
        done = subprocess.run(
            ["flwr", "run", str(app), "fleet", "--stream"],
            env=self._environment, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode != 0 or f"finished {rounds} round" not in done.stdout + done.stderr:
            raise subprocess.CalledProcessError(
                done.returncode, "flwr run", done.stdout, done.stderr
            )
