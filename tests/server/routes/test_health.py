import vllm
from fastapi.testclient import TestClient

from server import __version__


def test_ready(app):
    response = TestClient(app).get("/ready")
    assert (response.status_code, response.json()) == (200, {"status": "ready"})


def test_not_ready_while_draining(app):
    app.state.trimtab.gate.close(0)
    response = TestClient(app).get("/ready")
    assert (response.status_code, response.json()) == (503, {"status": "draining"})


def test_not_ready_once_the_engine_is_dead(app):
    app.state.engine_client.errored = True
    response = TestClient(app).get("/ready")
    assert (response.status_code, response.json()) == (503, {"status": "dead"})


def test_version(app):
    response = TestClient(app).get("/version")
    assert response.json() == {"version": __version__, "vllm_version": vllm.__version__}
