"""The typed client against the application: every operation of the document, errors, and what it sends again."""

import inspect

import httpx
import pytest
from serving_world import LATER, make_service, patient_app, publish_world
from starlette.testclient import TestClient

from recsys.errors import RequestError
from recsys.messages import EventIn, ItemFilter
from serving.client import Client
from serving.problems import unexpected
from serving.security import ApiKeys

KEY = "0123456789abcdef"
OPERATIONS = {
    "/v1/recommend": "recommend",
    "/v1/rank": "rank",
    "/v1/events": "events",
    "/v1/users": "users",
    "/v1/users/{user_id}": "forget",
    "/v1/users/{user_id}/history": "history",
    "/v1/items": "items",
    "/v1/items/{item_id}/similar": "similar",
    "/v1/models": "models",
    "/v1/search": "search",
    "/v1/rerank": "rerank",
}
BY_OTHERS = {"/v1/availability", "/livez", "/readyz", "/metrics"}
"""Operations the client leaves out: operators use their own tools."""


class Fragile(httpx.BaseTransport):
    """A way to the application that fails as often as it is told to, counting the requests that got through."""

    def __init__(self, app: TestClient) -> None:
        self.app = app
        self.faults: list[Exception | httpx.Response] = []
        self.bodies: list[bytes] = []

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        self.bodies.append(request.read())
        if self.faults:
            fault = self.faults.pop(0)
            if isinstance(fault, Exception):
                raise fault
            return fault
        path, body = request.url.raw_path.decode(), self.bodies[-1]
        answer = self.app.request(request.method, path, content=body, headers=dict(request.headers))
        return httpx.Response(answer.status_code, headers=dict(answer.headers), content=answer.content)


@pytest.fixture(scope="module")
def app(tmp_path_factory):
    service = make_service(publish_world(tmp_path_factory.mktemp("world")), tmp_path_factory.mktemp("state"))
    with TestClient(patient_app(service, keys=ApiKeys([KEY]))) as client:
        yield client
    service.close()


@pytest.fixture
def way(app):
    return Fragile(app)


@pytest.fixture
def client(way):
    with Client("http://testserver", KEY, transport=way) as client:
        yield client


def test_every_operation_has_a_method_that_takes_its_parameters(app):
    for path, operations in app.get("/openapi.json").json()["paths"].items():
        if path in BY_OTHERS:
            continue
        taken = set(inspect.signature(getattr(Client, OPERATIONS[path])).parameters)
        for operation in operations.values():
            named = {parameter["name"] for parameter in operation.get("parameters", [])}
            assert named <= taken, path


def test_each_method_gives_its_message(client):
    known, unknown = (EventIn(user_id="ana/é", item_id=item) for item in ("item-1", "?"))
    assert client.events(known, unknown).accepted == 2
    assert client.history("ana/é").total == 2
    assert [item.item_id for item in client.recommend("user-1", 3, at=LATER, exclude_seen=True).items]
    assert client.rank("user-1", ["item-2", "item-1"], at=LATER).ranked
    assert "ana/é" in client.users()
    assert client.items("number 1").items
    assert len(client.similar("item-1", k=3).items) == 3
    alone = client.similar("item-1", filters=[ItemFilter("item_id", allow=("item-2", "item-1"))])
    assert [item.item_id for item in alone.items] == ["item-2"]
    assert client.models().lineup["champion"] == client.models().version
    assert client.forget("ana/é").posted_events == 2


def test_refusals_carry_status_and_code(client, way):
    with pytest.raises(RequestError) as refused:
        client.history("nobody")
    assert (refused.value.status, refused.value.code) == (404, "unknown_user")
    with Client("http://testserver", transport=way) as stranger, pytest.raises(RequestError) as refused:
        stranger.models()
    assert (refused.value.status, refused.value.code) == (401, "unauthorized")
    way.faults = [httpx.Response(418, text="a proxy")]
    with pytest.raises(RequestError, match="a proxy"):
        client.models()
    way.faults = [httpx.Response(200, json={"from": "another service"})]
    with pytest.raises(RequestError, match="not a ModelsResponse"):
        client.models()


SOON = {"retry-after": "0"}


@pytest.mark.parametrize(
    "fault",
    [
        httpx.ConnectError("gone"),
        httpx.ReadError("cut"),
        httpx.Response(503, headers=SOON),
        httpx.Response(500, headers=SOON, text="Internal Server Error"),
    ],
    ids=["no connection", "cut", "no replica", "a proxy's"],
)
def test_what_breaks_once_is_sent_again_and_recorded_once(client, way, fault):
    way.faults = [fault]
    sent = client.events(EventIn(user_id="again", item_id="item-1"))
    assert sent.accepted == 1
    assert way.bodies[0] == way.bodies[1]  # the very same event id
    assert client.events(EventIn.model_validate({"user_id": "again", "item_id": "item-1"} | _id(sent))).accepted == 0


def test_an_error_of_the_service_is_told_at_once(client, way):
    own = unexpected()
    way.faults = [httpx.Response(500, headers=dict(own.headers), content=own.body)]
    with pytest.raises(RequestError) as refused:
        client.models()
    assert (refused.value.status, refused.value.code, len(way.bodies)) == (500, "internal", 1)


def test_what_is_late_is_not_asked_for_twice(client, way):
    way.faults = [httpx.ReadTimeout("late")]
    with pytest.raises(httpx.ReadTimeout):
        client.models()
    assert len(way.bodies) == 1


def test_a_gateway_may_name_a_date_to_come_back_at(client, way, monkeypatch):
    slept: list[float] = []
    monkeypatch.setattr("serving.client.time.sleep", slept.append)
    way.faults = [httpx.Response(503, headers={"retry-after": "Wed, 21 Oct 2026 07:28:00 GMT"})]
    assert client.models().items
    assert slept == [1.0]


@pytest.mark.parametrize("name", ["", ".", ".."])
def test_an_id_that_no_address_can_hold_names_nobody_else(client, way, name):
    for ask in (client.forget, client.history, client.similar):
        with pytest.raises(RequestError, match="cannot be named"):
            ask(name)
    assert not way.bodies


def test_what_breaks_twice_is_told(client, way):
    way.faults = [httpx.ConnectError("gone"), httpx.ConnectError("gone")]
    with pytest.raises(httpx.ConnectError):
        client.models()


def _id(answer) -> dict[str, str]:
    return {"event_id": answer.verdicts[0].event_id}
