"""Users who asked the service to be forgotten: the tombstone list that every later step of the pipeline honours.

    {workspace}/forgotten.json     {user id: parts}: in that many first parts the user's events no longer count
    {part}/forgotten.json          [user ids]: whom this part gives none of; made from the list, read by `open_part`
    {prepared}/forgotten.json      [[user ids] of each part]: whom the set was prepared without

A part that is ingested anew gets its list again. The bytes in a part's files stay: a raw log is its owner's to clean.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from recsys.errors import DataError
from recsys.files import read_json, write_json

NAME = "forgotten.json"


def read_list(workspace: Path) -> dict[str, int]:
    """Return the tombstone list of a workspace: user -> number of the first parts that forget the user."""
    path = workspace / NAME
    return {str(user): int(parts) for user, parts in read_json(path).items()} if path.exists() else {}


def add_to_list(workspace: Path, users: Sequence[str], parts: int) -> None:
    """Forget users in the first `parts` parts of the log."""
    if users:
        write_json(workspace / NAME, {**read_list(workspace), **dict.fromkeys(users, parts)})


def mark_parts(workspace: Path, parts: Sequence[Path]) -> None:
    """Write each part's list, as the workspace's list says; parts oldest first."""
    listed = read_list(workspace)
    for number, part in enumerate(parts):
        if not part.exists():
            continue
        users = sorted(user for user, forgetting in listed.items() if number < forgetting)
        if users:
            write_json(part / NAME, users)
        else:
            (part / NAME).unlink(missing_ok=True)


def hidden_users(part: Path) -> tuple[str, ...]:
    """Return the users whom a part gives none of."""
    path = part / NAME
    return tuple(read_json(path)) if path.exists() else ()


def record_in(prepared: Path, hidden: Sequence[Sequence[str]]) -> None:
    """Note in a prepared set whom each of its parts gave none of; nothing if that is nobody."""
    if any(hidden):
        write_json(prepared / NAME, [list(users) for users in hidden])


def refuse_if_forgotten_since(prepared: Path, parts: Sequence[Path]) -> None:
    """Raise `DataError` if a prepared set still holds users whom its parts forget."""
    known: Sequence[Sequence[str]] = read_json(prepared / NAME) if (prepared / NAME).exists() else []
    since: Mapping[str, None] = {
        user: None
        for number, part in enumerate(parts)
        for user in hidden_users(part)
        if number >= len(known) or user not in known[number]
    }
    if since:
        raise DataError(
            f"{prepared}: {len(since)} users asked to be forgotten since it was prepared; a part can't be added to it: "
            "prepare all parts anew (`recsys prepare` without --add)"
        )
