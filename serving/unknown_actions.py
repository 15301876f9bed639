"""What a post is told of actions that the bundle does not know."""

from collections.abc import Sequence
from difflib import get_close_matches

TOLD = 5
"""Most unknown actions of a post that are named."""
KNOWN = 10
"""Most known actions that are named beside one that is not."""


def unknown_actions(actions: Sequence[str], known: Sequence[str]) -> list[str]:
    """Return a sentence for each action that is not among `known`, for the first few of many."""
    more = [f"{len(actions) - TOLD:,} more unknown actions"] * (len(actions) > TOLD)
    return [_told(action, known) for action in actions[:TOLD]] + more


def _told(action: str, known: Sequence[str]) -> str:
    """Return what is said of an action that the bundle does not know: the likest, and the first of those it knows."""
    known = [name for name in known if name]
    lower = {name.lower(): name for name in known}
    near = "".join(f", but {lower[one]!r}" for one in get_close_matches(action.lower(), lower, 1))
    names = ", ".join(map(repr, known[:KNOWN])) + ", ..." * (len(known) > KNOWN)
    return f"action {action!r} is not known{near}; its events count as of no action. Known: {names}"
