import sys

import pytest

from benchmarks import servers
from benchmarks.servers import STOCK, TRIMTAB, Kind, ServerError, command_line, running

LISTENER = """
import http.server, sys
port = int(sys.argv[-1].removeprefix("--port="))
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
    def log_message(self, *args):
        pass
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def script(code):
    return Kind("script", (sys.executable, "-c", code), {})


def test_both_kinds_of_server_get_the_same_flags(tmp_path):
    stock = command_line(STOCK, tmp_path, "bfloat16", 1)
    trimtab = command_line(TRIMTAB, tmp_path, "bfloat16", 1)

    assert stock[len(STOCK.command) :] == trimtab[len(TRIMTAB.command) :]
    assert "--dtype=bfloat16" in stock


def test_the_stock_server_loads_no_plugin():
    assert STOCK.environment == {"VLLM_PLUGINS": ""}


def test_a_server_is_stopped_when_the_block_is_left(tmp_path):
    import httpx

    with running(script(LISTENER), tmp_path, "float32") as address:
        assert httpx.get(f"{address}/health", trust_env=False).status_code == 200

    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{address}/health", trust_env=False)


def test_a_server_that_ends_is_reported_with_its_log(tmp_path):
    with (
        pytest.raises(ServerError, match="no such model"),
        running(script("raise SystemExit('no such model')"), tmp_path, "float32"),
    ):
        pass


def test_a_server_that_stays_silent_is_given_up(tmp_path, monkeypatch):
    monkeypatch.setattr(servers, "START_SECONDS", 1.0)

    with (
        pytest.raises(ServerError, match="did not start"),
        running(script("import time; time.sleep(60)"), tmp_path, "float32"),
    ):
        pass
