"""Filters and availability over HTTP: what is said of stock holds for the next request, in every replica."""

import dataclasses

import pytest
from serving_world import (
    LATER,
    PATIENT_SEARCH,
    make_service,
    patient_app,
    publish_described,
    publish_priced,
    publish_world,
)
from starlette.testclient import TestClient
from text_world import WordCount, publish_search, snapshot

from ranking.availability import AvailabilityFile
from ranking.recommender_config import Cap, RecommenderConfig
from recsys.errors import BundleError
from recsys.messages import ItemFilter
from serving.settings import ServeConfig, load_into, open_service


def test_what_cannot_be_had_is_not_recommended_by_any_replica(place, tmp_path):
    state = tmp_path / "state"
    first, second = make_service(place, state), make_service(place, tmp_path / "other")
    # A replica is another process over the same file; here it has a state of its own, which LMDB opens once.
    second.path = dataclasses.replace(second.path, availability=AvailabilityFile(state / "availability.json"))
    load_into(second, place.bundle)
    with TestClient(patient_app(first)) as client, TestClient(patient_app(second)) as other:
        asked = {"user_id": "user-3", "k": 3}
        best = [item["item_id"] for item in other.post("/v1/recommend", json=asked).json()["items"]]
        change = {"available": {best[0]: False, best[2]: False, "item-61": True}}
        answer = client.put("/v1/availability", json=change)
        assert answer.json() == {"unavailable": 2, "item_ids": []}
        assert client.get("/v1/availability").json() == {"unavailable": 2, "item_ids": sorted([best[0], best[2]])}
        for replica in (client, other):
            items = [item["item_id"] for item in replica.post("/v1/recommend", json=asked).json()["items"]]
            assert items[0] == best[1]
            assert len(items) == 3
            assert not {best[0], best[2]} & set(items)
        told = other.post("/v1/recommend", json={**asked, "explain": True}).json()
        assert {entry["reason"] for entry in told["explanation"]["dropped"] if entry["stage"] == "filter"} == {
            "unavailable"
        }
        assert client.put("/v1/availability", json={"available": {}}).status_code == 422
        assert client.put("/v1/availability", json={"available": {"a": "perhaps"}}).status_code == 422
        (state / "availability.json").write_text("{")
        refused = client.put("/v1/availability", json=change)
        assert (refused.status_code, refused.json()["code"]) == (409, "damaged_table")
        assert best[0] not in other.post("/v1/recommend", json=asked).text  # the table before it stays in force
    first.close()
    second.close()


def test_a_search_finds_no_item_that_cannot_be_had_or_is_denied(tmp_path):
    bundle = publish_search(tmp_path / "bundle", reranker=WordCount())
    denied = RecommenderConfig(filters=(ItemFilter("item_id", deny=("item-1", "item-31", "item-61")),))  # all green tea
    config = ServeConfig(
        bundle, snapshot(tmp_path / "snapshot"), tmp_path / "state", recommender=denied, search=PATIENT_SEARCH
    )
    service = open_service(config)
    load_into(service, bundle)
    with TestClient(patient_app(service)) as client:

        def hits(**asked):
            return client.post("/v1/search", json={"query": "red tea", **asked}).json()["hits"]

        before = hits(k=29)
        assert "green tea" not in {hit["text"] for hit in before}
        assert len(before) == 29
        first = before[0]
        assert (first["text"], first["documents"]) == ("red tea", 3)
        gone = {first["document_id"]: False, "item-2": False, "item-32": False}  # all blue tea
        assert client.put("/v1/availability", json={"available": gone}).status_code == 200
        for asked in ({}, {"rerank": True}, {"mode": "bm25"}, {"user_id": "user-3", "at": LATER}):
            after = hits(k=5, **asked)
            assert len(after) == 5
            assert not {"green tea", "blue tea"} & {hit["text"] for hit in after}
            [red] = [hit for hit in after if hit["text"] == "red tea"]
            assert red["documents"] == 2
            assert {red["document_id"], *red["also"]} == {"item-0", "item-30", "item-60"} - set(gone)
    service.close()


@pytest.mark.parametrize("by", ["vectors", "content"])
def test_neighbours_are_items_that_may_be_recommended(tmp_path, by):
    publish_described(tmp_path / "described", retrieves=by == "vectors")
    place = publish_world(tmp_path)
    denied = RecommenderConfig(filters=(ItemFilter("item_id", deny=("item-2", "item-4")),))
    config = ServeConfig(
        tmp_path / "described", place.snapshot, tmp_path / "state", durability="os", recommender=denied
    )
    service = open_service(config)
    load_into(service, config.bundle)
    with TestClient(patient_app(service)) as client:

        def found(k, *filters):
            path = "/v1/items/item-1/similar"
            body = {"k": k, "filters": list(filters)}
            answer = client.post(path, json=body) if filters else client.get(f"{path}?k={k}")
            assert answer.status_code == 200, answer.text
            assert answer.json()["by"] == by
            return [item["item_id"] for item in answer.json()["items"]]

        every = found(1000)
        assert not {"item-1", "item-2", "item-4"} & set(every)
        gone = every[:5]
        client.put("/v1/availability", json={"available": dict.fromkeys([*gone, "item-1"], False)})
        assert found(5) == every[5:10]  # of an item out of stock too
        assert found(3, {"column": "item_id", "deny": every[5:7]}) == every[7:10]
        assert found(3, {"column": "item_id", "allow": [*every[:6], every[-1], "item-2"]}) == [every[5], every[-1]]
        refused = client.post("/v1/items/item-1/similar", json={"filters": [{"column": "?", "deny": ["x"]}]})
        assert (refused.status_code, refused.json()["code"]) == (422, "unknown_column")
    service.close()


def test_an_item_without_a_price_is_in_no_range_of_prices(tmp_path):
    place = publish_world(tmp_path)
    publish_priced(tmp_path / "priced")
    service = make_service(place, tmp_path / "state", tmp_path / "priced")
    with TestClient(patient_app(service)) as client:
        for bounds, wanted in (
            ({"at_most": 9}, [1, 2, 4, 5, 7, 8]),
            ({"at_least": 0, "at_most": 2}, [1, 2]),
            ({"at_least": 58}, [58, 59, 61]),
        ):
            asked = {"user_id": "user-3", "k": 50, "filters": [{"column": "price", **bounds}]}
            answer = client.post("/v1/recommend", json=asked).json()
            assert {item["item_id"] for item in answer["items"]} == {f"item-{number}" for number in wanted}
            near = client.post("/v1/items/item-1/similar", json={"k": 50, "filters": asked["filters"]}).json()
            assert {item["item_id"] for item in near["items"]} <= {f"item-{number}" for number in wanted}
    service.close()


def test_what_nobody_knows_is_named(place, tmp_path):
    service = make_service(place, tmp_path / "state")
    with TestClient(patient_app(service)) as client:
        change = {"available": {"nope": False, "item-1": False, "gone": True}}
        answer = client.put("/v1/availability", json=change)
        assert answer.json() == {"unavailable": 2, "item_ids": [], "unknown_item_ids": ["nope", "gone"]}
        assert client.get("/v1/availability").json() == {"unavailable": 2, "item_ids": ["item-1", "nope"]}
        allowed = [{"column": "item_id", "allow": ["Item-3"]}]
        told = ["filters[0] of item_id allows what no item has: 'Item-3' (but 'item-3')"]
        for path, body in (("/v1/recommend", {"user_id": "user-3"}), ("/v1/items/item-5/similar", {})):
            found = client.post(path, json=body | {"filters": allowed}).json()
            assert (found["items"], found["warnings"]) == ([], told)
            assert "warnings" not in client.post(path, json=body).json()
    service.close()


def test_what_was_viewed_is_recommended_where_only_purchases_count_as_seen(place, tmp_path):
    bought = RecommenderConfig(exclude_seen_actions=("purchase",))
    config = ServeConfig(place.bundle, place.snapshot, tmp_path / "state", durability="os", recommender=bought)
    service = open_service(config)
    load_into(service, place.bundle)
    with TestClient(patient_app(service)) as client:
        events = [{"user_id": "u", "item_id": "item-1", "action": "purchase"}, {"user_id": "u", "item_id": "item-2"}]
        assert client.post("/v1/events", json={"events": events}).json()["accepted"] == 2

        def items(**asked):
            answer = client.post("/v1/recommend", json={"user_id": "u", "k": 100, "exclude_seen": True, **asked})
            return {item["item_id"] for item in answer.json()["items"]} & {"item-1", "item-2"}

        assert items() == {"item-2"}
        assert items(exclude_seen_actions=[]) == set()
    lacking = dataclasses.replace(config, recommender=RecommenderConfig(exclude_seen_actions=("buy",)))
    with pytest.raises(BundleError, match="no action 'buy' in the bundle; there are 'purchase'"):
        load_into(open_service(dataclasses.replace(lacking, state=tmp_path / "other")), place.bundle)
    service.close()


def test_before_there_is_a_bundle_every_id_may_be_known(place, tmp_path):
    service = open_service(ServeConfig(place.bundle, place.snapshot, tmp_path / "state", durability="os"))
    with TestClient(patient_app(service)) as client:
        answer = client.put("/v1/availability", json={"available": {"nope": False}})
        assert answer.json() == {"unavailable": 1, "item_ids": []}
    service.close()


def test_filters_of_requests_and_of_the_config(place, tmp_path):
    rules = RecommenderConfig(filters=(ItemFilter("item_id", deny=("item-1",)),), rules=(Cap("category", 1),))
    config = ServeConfig(place.bundle, place.snapshot, tmp_path / "state", durability="os", recommender=rules)
    service = open_service(config)
    load_into(service, place.bundle)
    with TestClient(patient_app(service)) as client:
        asked = {"user_id": "user-3", "k": 10, "filters": [{"column": "item_id", "deny": ["item-2", "item-3"]}]}
        answer = client.post("/v1/recommend", json=asked).json()
        assert not {"item-1", "item-2", "item-3"} & {item["item_id"] for item in answer["items"]}
        assert (len(answer["items"]), answer["shortfall"]) == (6, 4)  # one of each of the six categories
        for wrong, code in (
            ([{"column": "no such", "deny": ["x"]}], "unknown_column"),
            ([{"column": "category"}], "validation"),
            ([{"column": "category", "deny": ["x"], "denied": []}], "validation"),
            ([{"column": "category", "deny": ["x"]}] * 17, "validation"),
        ):
            refused = client.post("/v1/recommend", json={"user_id": "user-3", "filters": wrong})
            assert (refused.status_code, refused.json()["code"]) == (422, code), refused.text
    lacking = dataclasses.replace(config, recommender=RecommenderConfig(rules=(Cap("colour", 1),)))
    with pytest.raises(BundleError, match="no item column of values 'colour'"):
        load_into(open_service(dataclasses.replace(lacking, state=tmp_path / "other")), place.bundle)
    service.close()
