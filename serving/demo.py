"""Real requests against a live endpoint, told in item names: the last step of the quickstart.

The log of the quickstart ends years ago, so every request states its moment: an hour after the user's last event.
"""

import time
from collections.abc import Callable
from typing import Any

import httpx

SHOWN = 5  # items of a list that are printed
USERS = 3
LONG_LIST = 50
HOUR = 3_600_000_000  # microseconds


def show_requests(address: str, say: Callable[[str], None]) -> None:
    """Ask for some users' recommendations, post an event, and show that the very next answer has changed.

    Args:
        address: of the endpoint, e.g. `http://127.0.0.1:8000`.
        say: takes one line at a time.

    Raises:
        httpx.HTTPStatusError: the endpoint refused a request.
    """
    with httpx.Client(base_url=address, timeout=30) as client:
        model = _get(client, "/v1/models")
        roles = ", ".join(f"{entry['name']} as {entry['role']}" for entry in model["models"])
        say(f"The endpoint serves bundle {model['version']}: {roles}, {model['items']:,} items.")
        users = _get(client, f"/v1/users?limit={USERS}")["users"]
        for user in users:
            _show_user(client, user, say)
        _show_event(client, users[0], say)
        _show_search(client, users[0], say)
        answer = _recommend(client, "nobody has this id", SHOWN, time.time_ns() // 1000)
        known = "known" if answer["user_known"] else "unknown, so by popularity"
        say(f"A user without events ({known}): {_names(answer['items'])}")


def _show_user(client: httpx.Client, user: str, say: Callable[[str], None]) -> None:
    history = _get(client, f"/v1/users/{user}/history?limit={SHOWN}")
    started = time.perf_counter()
    answer = _recommend(client, user, SHOWN, _moment(history))
    milliseconds = (time.perf_counter() - started) * 1e3
    say(f"User {user}, {history['total']} events, the newest: {_names(history['events'])}")
    say(f"  recommended in {milliseconds:.0f} ms: {_names(answer['items'])}")


def _show_event(client: httpx.Client, user: str, say: Callable[[str], None]) -> None:
    moment = _moment(_get(client, f"/v1/users/{user}/history?limit=1"))
    bought = _recommend(client, user, LONG_LIST, moment)["items"][-1]
    event = {"user_id": user, "item_id": bought["item_id"], "timestamp": moment, "action": "purchase"}
    client.post("/v1/events", json={"events": [event]}).raise_for_status()
    after = [item["item_id"] for item in _recommend(client, user, LONG_LIST, moment + HOUR)["items"]]
    place = f"place {after.index(bought['item_id']) + 1}" if bought["item_id"] in after else "no place"
    say(f"Posted the event that user {user} bought {bought['name']}, place {LONG_LIST} of the list until then.")
    say(f"  The next answer, an hour later, has it at {place} and begins: {_names_of(client, user, moment)}")


def _show_search(client: httpx.Client, user: str, say: Callable[[str], None]) -> None:
    """Look for the first word of the name of what the user bought last, if the bundle searches text."""
    history = _get(client, f"/v1/users/{user}/history?limit=1")
    words = (history["events"][0]["name"] or "").split()
    if not words:
        return
    asked = {"query": words[0], "k": SHOWN, "user_id": user, "at": _moment(history)}
    answer = client.post("/v1/search", json=asked)
    if answer.status_code == httpx.codes.CONFLICT:
        return
    hits = answer.raise_for_status().json()["hits"]
    say(f"Searched for {words[0]!r} as user {user}: {'; '.join(hit['text'] for hit in hits)}")


def _names_of(client: httpx.Client, user: str, moment: int) -> str:
    return _names(_recommend(client, user, SHOWN, moment + HOUR)["items"])


def _moment(history: dict[str, Any]) -> int:
    """Return an hour after the newest event of a history, microseconds UTC."""
    return int(history["events"][0]["timestamp"]) + HOUR


def _names(entries: list[dict[str, Any]]) -> str:
    return "; ".join(entry["name"] or "(an item the bundle does not know)" for entry in entries[:SHOWN])


def _recommend(client: httpx.Client, user: str, k: int, at: int) -> Any:
    return client.post("/v1/recommend", json={"user_id": user, "k": k, "at": at}).raise_for_status().json()


def _get(client: httpx.Client, path: str) -> Any:
    return client.get(path).raise_for_status().json()
