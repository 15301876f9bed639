"""Errors over HTTP: RFC 9457 problem documents with a code that never changes, and never a stack trace.

    code                      status   meaning
    malformed_json            400      the body is not JSON
    validation                422      a field is missing, unknown, or of the wrong type or range; `errors` names each
    unsupported_media_type    415      the body is not declared as application/json
    body_too_large            413      more bytes than the service takes
    too_many_candidates       413      more items in one `rank` than the service takes
    too_many_documents        413      more documents in one `rerank` than the service takes
    too_many_events           413      more events in one post than the service takes
    unauthorized              401      no accepted API key, where the service asks for one
    unknown_route             404
    unknown_user              404      nothing is known of the user asked about
    unknown_item              404      the bundle does not know the item asked about
    method_not_allowed        405
    not_supported             409      the bundle lacks a part that the route needs
    part_unavailable          503      a model in a deployment of its own is unavailable for now
    store_unavailable         503      the live histories are unavailable for now
    overloaded                503      too many requests wait; `Retry-After` says when to come back
    too_late                  503      the request waited for its turn beyond its deadline
    not_ready                 503      no bundle is loaded yet
    no_replica                503      the process that had the request died; said by the proxy in front of it
    table_unavailable         503      the table of unavailable items cannot be written: nothing of the change was taken
    log_unavailable           503      the event log cannot be written, so no event of the post was taken
    stuck                     503      a piece of work does not end; the process is to be replaced
    internal                  500      a defect; the log has the details under the request id

Other `recsys.errors.RequestError`s carry their own code and status.
"""

import logging
import re
from collections.abc import Mapping, Sequence
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.routing import Route

from recsys.errors import PartError, RequestError, StoreError
from serving.replies import PROBLEM

logger = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1

JSON_TYPE = re.compile(r"application/([^;\s]+\+)?json\s*(;|$)", re.IGNORECASE)
"""Of the bodies that are read."""


class FieldError(BaseModel):
    """One wrong field of a request."""

    field: str
    message: str


class Problem(BaseModel):
    """A problem document (RFC 9457)."""

    type: str
    title: str
    status: int
    code: str
    detail: str
    errors: list[FieldError] = []


def responses() -> dict[int | str, dict[str, Any]]:
    """Return the problem documents as OpenAPI responses."""
    schema = Problem.model_json_schema()
    schema["properties"]["errors"]["items"] = schema.pop("$defs")["FieldError"]
    content = {PROBLEM: {"schema": schema}}
    return {
        "4XX": {"description": "Refused; 409 if the bundle lacks a part that is asked for", "content": content},
        "503": {"description": "Overloaded, or no bundle yet", "content": content},
    }


def problem(
    status: int,
    code: str,
    detail: str,
    errors: Sequence[FieldError] = (),
    headers: Mapping[str, str] | None = None,
) -> Response:
    """Return the response that says what went wrong.

    Args:
        status: the HTTP status.
        code: the stable code, one of those above or a `RequestError`'s own.
        detail: what was found and what is wanted.
        errors: the wrong fields, if it is about fields.
        headers: further headers; 503 always gets `Retry-After`.
    """
    body = Problem(
        type=f"urn:recsys:problem:{code}",
        title=HTTPStatus(status).phrase,
        status=status,
        code=code,
        detail=detail,
        errors=list(errors),
    )
    all_headers = dict(headers or {})
    if status == HTTPStatus.SERVICE_UNAVAILABLE:
        all_headers["Retry-After"] = str(RETRY_AFTER_SECONDS)
    return Response(body.model_dump_json(), status, all_headers, PROBLEM)


def install(app: FastAPI) -> None:
    """Make every refusal of an application a problem document; the middleware sees to unexpected errors."""
    app.add_exception_handler(RequestError, _refused)
    app.add_exception_handler(StoreError, _gone)
    app.add_exception_handler(PartError, _out)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _http)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestError)
    return problem(error.status, error.code, str(error))


async def _gone(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    return problem(503, "store_unavailable", "the live histories are unavailable for now; come back in a moment")


async def _out(_: Request, error: Exception) -> Response:
    logger.warning("%s", error)
    return problem(503, "part_unavailable", "a model is unavailable for now; come back in a moment")


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    content_type = request.headers.get("content-type", "")
    if request.method in ("POST", "PUT") and not JSON_TYPE.match(content_type):
        found = repr(content_type) if content_type else "none"
        return problem(415, "unsupported_media_type", f"Content-Type is {found}; expected application/json")
    found_errors = error.errors()
    for found_error in found_errors:
        if found_error["type"] == "json_invalid":
            where, reason = found_error["loc"][-1], found_error.get("ctx", {}).get("error", "")
            return problem(400, "malformed_json", f"the body is not JSON: {reason} at character {where}")
    errors = [FieldError(field=_field(each["loc"]), message=_message(each)) for each in found_errors]
    detail = f"{errors[0].field}: {errors[0].message}" + (f" (and {len(errors) - 1} more)" if len(errors) > 1 else "")
    return problem(422, "validation", detail, errors)


def _field(location: Sequence[Any]) -> str:
    # The first part says where the value was sent: body, query or path.
    return ".".join(str(part) for part in location[1:]) or str(location[0])


def _message(error: Mapping[str, Any]) -> str:
    if error["type"] in ("missing", "extra_forbidden"):
        return str(error["msg"])
    found = repr(error.get("input"))
    return f"{error['msg']}, found {found if len(found) <= 100 else found[:100] + '...'}"


async def _http(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == HTTPStatus.NOT_FOUND:
        return problem(404, "unknown_route", f"no route {request.url.path}; /openapi.json lists them")
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        detail = f"{request.method} is not a method of {request.url.path}"
        return problem(405, "method_not_allowed", detail, headers={"Allow": ", ".join(_methods(request))})
    if error.status_code == HTTPStatus.REQUEST_ENTITY_TOO_LARGE:
        return problem(413, "body_too_large", error.detail)
    if error.status_code == HTTPStatus.BAD_REQUEST:
        return problem(400, "malformed_json", "the body cannot be read as JSON in UTF-8")
    return problem(error.status_code, "http", str(error.detail), headers=error.headers)


def _methods(request: Request) -> list[str]:
    """Return the methods of all routes that fit the address, of which the error knows the first alone."""
    routes = [route for route in request.app.routes if isinstance(route, Route)]
    fitting = [route for route in routes if route.path_regex.match(request.url.path)]
    return sorted({method for route in fitting for method in route.methods or ()})


def unexpected() -> Response:
    """Return the response to an error nobody foresaw; it tells nothing of it."""
    return problem(500, "internal", "an unexpected error; the service's log has it under the id in x-request-id")
