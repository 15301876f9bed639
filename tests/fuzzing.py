"""Requests made from the OpenAPI document by schemathesis, good and bad, and what the service answers them."""

import contextlib
import json
from collections import Counter
from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.errors import Unsatisfiable
from schemathesis import GenerationMode
from schemathesis.core import NOT_SET
from starlette.testclient import TestClient

COME_BACK = 503
"""The one status from 500 on that is no defect, with `Retry-After`."""


def try_requests(client: TestClient, examples: int) -> Counter[tuple[str, int]]:
    """Send about `examples` requests to every operation, half of them against the schema; count the statuses.

    Raises:
        AssertionError: a defect was found; the message has the smallest request that shows it.
    """
    schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
    found: Counter[tuple[str, int]] = Counter()
    for result in schema.get_all_operations():
        operation = result.ok()
        for mode in GenerationMode.POSITIVE, GenerationMode.NEGATIVE:
            _try(client, operation.label, operation.as_strategy(generation_mode=mode), max(examples // 2, 1), found)
    return found


def _try(
    client: TestClient, label: str, cases: st.SearchStrategy[Any], examples: int, found: Counter[tuple[str, int]]
) -> None:
    @settings(max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(case=cases)
    def attempt(case: Any) -> None:
        raw = isinstance(case.body, bytes)
        body = {} if case.body is NOT_SET else {"content": case.body} if raw else {"content": json.dumps(case.body)}
        sent = {"content-type": "application/json", **(case.headers or {})}.items()
        headers = {name: value for name, value in sent if value.isascii() and value.isprintable()}
        response = client.request(case.method, case.formatted_path, params=case.query, headers=headers, **body)
        found[label, response.status_code] += 1
        defect = f"{case.method} {case.formatted_path} {case.query} {body}\n{response.status_code} {response.text}"
        assert response.status_code < 500 or response.status_code == COME_BACK, defect
        assert response.status_code != COME_BACK or "retry-after" in response.headers, defect

    with contextlib.suppress(Unsatisfiable):  # an operation without parameters cannot be asked wrongly
        attempt()
