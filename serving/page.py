"""The page at `/`, to try the service by hand: one HTML file without anything from elsewhere, and its headers."""

import base64
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources


@dataclass(frozen=True)
class Page:
    """The bytes of the page and the headers it is sent with."""

    html: bytes
    headers: Mapping[str, str]


def read_page() -> Page:
    """Return the page, read from the package.

    Its policy lets the browser run the page's own script and style, told by their digests, and talk to the service it
    came from: nothing that data could smuggle into the page would run, and nothing could be sent elsewhere.
    """
    html = resources.files("serving").joinpath("static/page.html").read_bytes()
    policy = {
        "default-src": "'none'",
        "script-src": _digest(html, b"script"),
        "style-src": _digest(html, b"style"),
        "connect-src": "'self'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "Cache-Control": "no-cache",
        "Referrer-Policy": "no-referrer",
        "X-Content-Type-Options": "nosniff",
    }
    return Page(html, headers)


def _digest(html: bytes, tag: bytes) -> str:
    """Return the source expression that allows the text of the page's one element `tag`."""
    text = html.partition(b"<%s>" % tag)[2].partition(b"</%s>" % tag)[0]
    return f"'sha256-{base64.b64encode(hashlib.sha256(text).digest()).decode()}'"
