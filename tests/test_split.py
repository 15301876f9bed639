"""The split topology: on a real Ray Serve it answers as one process does, also after a kill and a swap."""

import json
import pickle
import subprocess
import threading
import urllib.error
import urllib.request
from dataclasses import asdict, fields, replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from serving_world import LATER, PATIENT, PATIENT_SEARCH, WAIT, eventually, free_port
from starlette.testclient import TestClient
from text_world import catalogue, item_passages, snapshot, tiny_encoder

from ranking.bundle import Bundle, write_bundle
from ranking.bundle_models import NamedModel
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.search_part import SearchContents
from ranking.searched import Searched
from recsys.config import parse
from recsys.errors import ConfigError, PartError
from serving.app import Limits, create_app
from serving.host import ServeConfig, node_settings, start
from serving.lineup import BundlePlace, Plan
from serving.settings import gpu_share, load_into, load_plan, open_service
from serving.split import FOUND, PARTS, Elsewhere, PartHost, Refusal
from worlds import PROVENANCE

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray's own

DEPLOYED = Path(__file__).parent.parent / "serving/deploy/serve.yaml"
ASKED = [
    ("/v1/recommend", {"user_id": "user-1", "k": 20, "at": LATER}),
    ("/v1/recommend", {"user_id": "user-1", "k": 60, "at": LATER, "exclude_seen": True}),
    ("/v1/recommend", {"user_id": "nobody", "k": 5, "at": LATER}),
    ("/v1/recommend", {"user_id": "user-2", "k": 5, "at": LATER, "query": "red tea"}),
    ("/v1/rank", {"user_id": "user-3", "item_ids": ["item-5", "?", "item-1"], "at": LATER}),
    ("/v1/search", {"query": "green bread", "k": 5}),
    ("/v1/search", {"query": "green bread", "k": 5, "user_id": "user-2", "at": LATER, "mode": "dense"}),
    ("/v1/rerank", {"query": "black soap", "documents": ["white rice", "black soap and tea"]}),
    ("/v1/items/item-3/similar?k=5", None),
]


def publish(directory: Path, seed: int) -> Path:
    """Write a bundle with a ranker, a retriever and text."""
    table, contents = catalogue()
    torch.manual_seed(seed)
    provenance = PROVENANCE.model_copy(update={"data_digest": f"digest {seed}"})  # so that versions differ
    config = MqsaTedConfig(width=8)
    text = SearchContents(item_passages(contents), tiny_encoder())
    retriever = NamedModel("mqsa_ted", config, MqsaTed(config, table))
    ranker = NamedModel("mqsa_ted", config, MqsaTed(config, table))
    write_bundle(directory, replace(contents, ranker=ranker, retriever=retriever, text=text), provenance)
    return directory


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> ServeConfig:
    place = tmp_path_factory.mktemp("split")
    return ServeConfig(
        publish(place / "bundle", 1),
        snapshot(place / "snapshot"),
        place / "state",
        durability="os",
        limits=Limits(deadlines=PATIENT),
        topology="split",
        search=PATIENT_SEARCH,
    )


def told(content: bytes) -> dict:
    """Return an answer without what differs from one asking to the next."""
    answer = json.loads(content)
    answer.get("meta", {}).pop("timings", None)
    return {key: value for key, value in answer.items() if key not in ("timings", "id", "request_id")}


def fused(world: ServeConfig, bundle: Path, state: Path) -> list[dict]:
    service = open_service(replace(world, state=state))
    load_into(service, bundle)
    with TestClient(create_app(service, world.limits)) as client:
        answers = [client.get(path) if body is None else client.post(path, json=body) for path, body in ASKED]
    service.close()
    assert {answer.status_code for answer in answers} == {200}
    return [told(answer.content) for answer in answers]


def over_http(address: str) -> list[dict]:
    answers = []
    for path, body in ASKED:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(address + path, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=WAIT) as response:
            answers.append(told(response.read()))
    return answers


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.timeout(1200)  # a minute on a quiet machine
def test_it_answers_as_fused_also_after_a_killed_model_and_a_swap(world, tmp_path):
    other = publish(tmp_path / "other", 2)
    before, after = fused(world, world.bundle, tmp_path / "a"), fused(world, other, tmp_path / "b")
    assert before != after
    with start(replace(world, port=free_port())) as running:
        assert over_http(running.address) == before
        wrong = urllib.request.Request(
            running.address + "/v1/search", b'{"query": "tea", "mode": "?"}', {"Content-Type": "application/json"}
        )
        with pytest.raises(urllib.error.HTTPError, match="422"):
            urllib.request.urlopen(wrong, timeout=WAIT)
        models = [
            process
            for process in psutil.Process().children(recursive=True)
            if any("ServeReplica:recsys:ranker" in word for word in process.cmdline())
        ]
        assert len(models) == 1
        models[0].kill()
        running.swap(other)
        assert over_http(running.address) == after
        deploy_as_shipped(world, tmp_path)
        assert over_http(running.address) == before


def deploy_as_shipped(world: ServeConfig, directory: Path) -> None:
    """Do what `serve deploy` does with the shipped YAML, its paths and the node's resource replaced."""
    from ray import serve
    from ray.serve.context import _get_global_client
    from ray.serve.schema import ServeDeploySchema

    text = DEPLOYED.read_text()
    for shipped, here in (("/srv/recsys/bundle", world.bundle), ("/srv/recsys/snapshot", world.snapshot)):
        text = text.replace(shipped, str(here))
    table = yaml.safe_load(text.replace("/var/lib/recsys", str(directory)))
    (directory / "metrics").mkdir()
    [application] = table["applications"]
    assert application["deployments"][0]["ray_actor_options"].pop("resources") == {"recsys": 0.01}
    application["args"] |= {"limits": {"deadlines": asdict(PATIENT)}, "search": asdict(PATIENT_SEARCH)}
    _get_global_client().deploy_apps(ServeDeploySchema.model_validate(table))

    def deployed() -> bool:
        application = serve.status().applications["recsys"]
        return application.status == "RUNNING" and application.deployments["ranker"].replica_states == {"RUNNING": 2}

    assert eventually(deployed)


class Local:
    """An `Ask` within this process; `out` do not answer."""

    def __init__(self, config: ServeConfig) -> None:
        self.hosts = {part: PartHost(part, "cpu", config.search) for part in PARTS}
        self.out: set[str] = set()
        self.message_bytes = 4 * 2**20  # Ray Serve's bound

    def __call__(self, part, stage, place, *arguments):
        if part in self.out:
            raise PartError(f"{part} is out")
        answer = self.hosts[part].answer(stage, place, arguments)
        assert not isinstance(answer, Refusal)
        assert len(pickle.dumps(answer)) < self.message_bytes
        return answer


def test_a_part_that_is_out_is_a_step_down_or_a_503(world, tmp_path):
    expected = fused(world, world.bundle, tmp_path / "a")
    service, ask = open_service(replace(world, state=tmp_path / "b", recall_share=1.0)), Local(world)
    load_plan(service, Plan(BundlePlace(world.bundle, "")), Elsewhere(ask))
    with TestClient(create_app(service, world.limits)) as client:

        def post(number: int):
            path, body = ASKED[number]
            return client.post(path, json=body)

        assert told(post(0).content) == expected[0]
        while "recsys_index_recall_searches_total 1.0" not in client.get("/metrics").text:
            pass  # the exact search beside it is the retriever's, too
        for part, stage in (("retriever", "retrieval"), ("ranker", "rank")):
            ask.out = {part}
            answer = post(0).json()
            assert (answer["degraded"], len(answer["items"])) == ([stage], 20)
            assert told(post(2).content) == expected[2]  # a user nothing is known of needs neither
        ask.out = {"ranker"}
        assert post(4).json()["degraded"] == ["rank"]
        ask.out = {"text", "retriever"}
        for answer in (post(5), post(3), client.get(ASKED[8][0])):
            assert (answer.status_code, answer.json()["code"]) == (503, "part_unavailable")
            assert "retry-after" in answer.headers
        ask.out = set()
        assert told(post(3).content) == expected[3]
    service.close()


def test_parts_of_their_own_find_what_may_be_shown(world, tmp_path):
    gone = {"available": {f"item-{number}": False for number in (0, 1, 31, 61)}}
    answers, neighbours = [], []
    for name, elsewhere in (("fused", None), ("split", Elsewhere(Local(world)))):
        service = open_service(replace(world, state=tmp_path / name))
        load_plan(service, Plan(BundlePlace(world.bundle, "")), elsewhere)
        with TestClient(create_app(service, world.limits)) as client:
            assert client.put("/v1/availability", json=gone).status_code == 200
            asked = ({}, {"user_id": "user-2", "at": LATER})
            posted = [client.post("/v1/search", json={"query": "red tea", "k": 30, **one}) for one in asked]
            similar = client.get("/v1/items/item-3/similar?k=1000").json()["items"]
        service.close()
        answers.append([told(answer.content) for answer in posted])
        neighbours.append([item["item_id"] for item in similar])
    assert answers[0] == answers[1]
    assert neighbours[0] == neighbours[1] != []
    assert not set(neighbours[1]) & set(gone["available"])
    for answer in answers[1]:
        assert len(answer["hits"]) == 29  # no green tea
        named = {document for hit in answer["hits"] for document in (hit["document_id"], *hit["also"])}
        assert not named & set(gone["available"])


def test_a_process_whose_models_run_elsewhere_needs_no_device_of_its_own(world, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    service = open_service(replace(world, state=tmp_path, device="cuda"))
    load_plan(service, Plan(BundlePlace(world.bundle, "")), Elsewhere(Local(world)))
    assert service.served.bundle.items.count.device.type == "cpu"
    service.close()


def test_item_vectors_travel_in_pieces_that_fit_a_message(world, tmp_path, monkeypatch):
    monkeypatch.setattr("serving.split.VECTOR_BYTES", 400)
    service, ask = open_service(replace(world, state=tmp_path / "state")), Local(world)
    load_plan(service, Plan(BundlePlace(world.bundle, "")), Elsewhere(ask))
    ask.message_bytes = 1_000
    own = Bundle.load(world.bundle).retriever.item_vectors().numpy()
    assert own.nbytes > ask.message_bytes
    np.testing.assert_array_equal(service.served.item_vectors, own)
    service.close()


def test_a_part_keeps_only_its_models_and_the_plan_before(world, tmp_path):
    host = PartHost("ranker", "cpu", world.search)
    first, second = BundlePlace(world.bundle, ""), BundlePlace(publish(tmp_path / "other", 2), "")
    third = BundlePlace(publish(tmp_path / "third", 3), "")
    versions = []
    for place in (first, second, third):
        for _ in range(2):  # sent again
            host.follow(Plan(place))
        versions.append(host.answer("holds", place, ()))
    assert set(host._held) == set(versions[1:])
    held = host._held[versions[2]].bundle
    assert (held.retriever, held.index, held.text) == (None, None, None)


def test_a_part_answers_while_it_loads_the_next_plan(world, tmp_path, monkeypatch):
    host, begun, go = PartHost("ranker", "cpu", world.search), threading.Event(), threading.Event()
    assert host.version == ""
    host.follow(Plan(BundlePlace(world.bundle, "")))
    first, load = BundlePlace(world.bundle, host.version), Bundle.load

    def slowly(*arguments):
        begun.set()
        assert go.wait(60)
        return load(*arguments)

    monkeypatch.setattr(Bundle, "load", slowly)
    second = BundlePlace(publish(tmp_path / "other", 2), "")
    following = threading.Thread(target=host.follow, args=(Plan(second),))
    following.start()
    assert begun.wait(60)
    assert host.holds(first)
    assert host.answer("holds", first, ()) == first.version
    go.set()
    following.join(60)
    assert len(host._held) == 2


def test_the_serve_yaml_serves_one_plan_everywhere():
    application = yaml.safe_load(DEPLOYED.read_text())["applications"][0]
    config = parse(ServeConfig, application["args"], "[serve]")
    plans = [Plan.of(each["user_config"]) for each in application["deployments"]]
    assert config.topology == "split"
    assert {each["name"] for each in application["deployments"]} == {"recsys", *PARTS}
    assert plans == [Plan(BundlePlace(config.bundle, ""))] * 4


def test_a_shell_reads_the_environment_of_a_node_as_the_service_does():
    script = f"env -i bash -c 'set -a; . {DEPLOYED.with_name('ray.env')}; env'"
    told = dict(line.split("=", 1) for line in subprocess.check_output(script, shell=True, text=True).splitlines())
    assert node_settings().items() <= told.items()
    assert node_settings()["RAY_SERVE_HAPROXY_RETRY_ON"] == "conn-failure empty-response"


@pytest.mark.parametrize(("key", "value"), [("rankers", 0), ("texts", 0), ("retrievers", 0)])
def test_a_size_out_of_range_is_named(world, key, value):
    with pytest.raises(ConfigError, match=key):
        parse(ServeConfig, {"bundle": "b", "snapshot": "s", "state": "t", "split": {key: value}}, "[serve]")


@pytest.mark.parametrize(
    ("table", "available", "share"),
    [
        ({}, 0.0, 0.0),
        ({}, 1.0, 0.25),
        ({"replicas": 8}, 1.0, 0.125),  # a quarter each would leave four of them waiting for ever
        ({"topology": "split", "split": {"rankers": 3}}, 1.0, 0.2),
        ({"gpus": 2.0, "replicas": 2}, 3.0, 1.0),
        ({"gpus": 0.0}, 4.0, 0.0),
        ({"replicas": 9}, 2.0, 0.2),  # of 2/9 each only four fit on a GPU, and the ninth waits for ever
        ({"gpus": 0.7, "replicas": 3}, 2.0, 0.5),
        ({"replicas": 6}, 1.0, 0.1666),  # Ray would take a sixth for .1667, and six of them for more than one
    ],
)
def test_every_process_gets_a_share_of_the_gpus(table, available, share):
    config = parse(ServeConfig, {"bundle": "b", "snapshot": "s", "state": "t"} | table, "[serve]")
    assert gpu_share(config, available) == pytest.approx(share, abs=1e-9)


def test_all_of_a_search_travels():
    assert {*FOUND, "query", "part", "config", "allowed"} == {each.name for each in fields(Searched)}
