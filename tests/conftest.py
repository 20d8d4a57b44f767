import os
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import chosen_device
import pytest
import torch
from reports import filled
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from auto_mmround import cli
from auto_mmround.model.loading import load

# The tests' models are tiny: one thread each is faster than two that wait for each other, also
# under `pytest -n 2`.
torch.set_num_threads(1)


def pytest_addoption(parser):
    parser.addoption(
        "--whisper", help="folder of Whisper base, for its rows in the table of engines"
    )
    parser.addoption(
        "--accelerator", default=chosen_device.NAME, help="a real one instead of the stand-in: cuda"
    )


def pytest_configure(config):
    chosen_device.NAME = config.getoption("--accelerator")


@pytest.fixture(autouse=True)
def _plain_rope():
    """auto_round, once imported, names a "default" here. Transformers then takes it for all
    classes, also for Ernie 4.5 VL, whose frequencies have another order."""
    ROPE_INIT_FUNCTIONS.pop("default", None)


@pytest.fixture(scope="session")
def demo():
    """The bundled model. Tests read it only."""
    return load("demo")


@pytest.fixture(scope="session")
def exact_demo():
    """The bundled model in float32. Tests read it only."""
    return load("demo", dtype="float32")


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    """A checkpoint of the bundled model, rounded to nearest. Tests change copies of it only."""
    out = tmp_path_factory.mktemp("demo")
    command = ["--model", "demo", "--iters", "0", "--device", "cpu", "--output_dir", str(out)]
    assert cli.main(command) == 0
    return out / "demo-w4g128-auto_round"


@pytest.fixture(scope="module")
def full(demo_folder, tmp_path_factory):
    """The same with everything that a report shows, see `reports.filled`."""
    return filled(demo_folder, tmp_path_factory.mktemp("full") / "model-w4g128-auto_round")


@pytest.fixture
def fast_disk():
    """Nothing waits for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture
def web():
    """web(pages) starts a site on this machine: its address, and the list of what it was asked for.
    A page is its content, or a function that writes the whole answer on the connection."""
    servers = []

    def start(pages):
        asked = []

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                asked.append(self.path)
                page = pages.get(self.path)
                if callable(page):
                    page(self)
                elif page is None:
                    self.send_error(404)
                else:
                    self.send_response(200)
                    self.end_headers()
                    self.wfile.write(page)

            def log_message(self, *_):
                pass

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        threading.Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def pytest_terminal_summary(terminalreporter):
    rows = [r for r in terminalreporter.stats.get("passed", []) if "test_families.py" in r.nodeid]
    journeys = sum("::test_journey[" in r.nodeid for r in rows)
    if journeys:
        terminalreporter.write_line(
            f"families: {journeys} went the whole journey, {len(rows)} rows passed"
        )
