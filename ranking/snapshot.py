"""The published user snapshot: packed histories of all users, the read-only base under the live store.

    snapshot.json             format, counts, data digest, and what it contains of event logs (`recsys.stores.LogMark`)
    users.safetensors         user ids, and their xxh64 in ascending order with the history row of each
    histories/                recsys.history.Histories over item keys

Everything is memory-mapped: processes of one machine share the pages, and opening costs the same for a thousand users
as for a million. A look-up is one binary search and one comparison of bytes.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
import xxhash
from safetensors.torch import load_file, save_file

from ranking.strings import StringTable
from recsys.errors import DataError
from recsys.files import read_json, sha256_json, whole_directory, write_json
from recsys.history import Events, Histories
from recsys.stores import LogMark

FORMAT = 2


def write_snapshot(
    directory: Path, user_ids: Sequence[str], histories: Histories, data_digest: str, logs: Sequence[LogMark] = ()
) -> None:
    """Write a snapshot, whole or not at all.

    Args:
        directory: replaced if it exists.
        user_ids: id of each history row.
        histories: over item keys, one row per user.
        data_digest: digest of the prepared set the histories come from.
        logs: what they contain of event logs; the live store adds the rest.

    Raises:
        DataError: not one id per history.
    """
    if len(user_ids) != len(histories):
        raise DataError(f"{directory}: {len(user_ids)} user ids, but {len(histories)} histories; expected one for one")
    hashes = np.fromiter((_hash(user.encode()) for user in user_ids), np.uint64, len(user_ids))
    order = np.argsort(hashes, kind="stable")
    with whole_directory(directory) as temporary:
        (temporary / "histories").mkdir()
        histories.save(temporary / "histories")
        tensors = StringTable.of(user_ids).tensors("user_id")
        tensors["hash"] = torch.from_numpy(hashes[order])
        tensors["row"] = torch.from_numpy(order.astype(np.int64))
        save_file(tensors, temporary / "users.safetensors")
        counts = {"users": len(user_ids), "events": len(histories.events)}
        manifest = {
            "format": FORMAT,
            "data_digest": data_digest,
            "counts": counts,
            "logs": [asdict(mark) for mark in logs],
            "newest": _newest(histories.events),
        }
        write_json(temporary / "snapshot.json", manifest)


class SnapshotReader:
    """Reads histories of a snapshot by outside user id; a `recsys.stores.HistoryReader`.

    Args:
        directory: what `write_snapshot` wrote.

    Attributes:
        id: tells it from every other snapshot.
        data_digest: of the prepared set the histories come from.
        newest: time of the newest event, None without any.

    Raises:
        DataError: the directory is no snapshot, or one of another format.
    """

    def __init__(self, directory: Path) -> None:
        manifest = read_json(directory / "snapshot.json")
        if manifest.get("format") != FORMAT:
            raise DataError(
                f"{directory}: snapshot of format {manifest.get('format')}, this version reads {FORMAT}; publish again"
            )
        tensors = load_file(directory / "users.safetensors")
        self.id = sha256_json(manifest)[:16]
        self.data_digest = str(manifest["data_digest"])
        self._marks = {
            mark["log"]: LogMark(mark["log"], int(mark["position"]), tuple(mark["left_out"]))
            for mark in manifest["logs"]
        }
        self._ids = StringTable.from_tensors(tensors, "user_id", str(directory / "users.safetensors"))
        self._hash = tensors["hash"].numpy()
        self._row = tensors["row"].numpy()
        histories = Histories.load(directory / "histories")
        if len(histories) != len(self._ids):
            raise DataError(
                f"{directory}: {len(self._ids)} user ids, but {len(histories)} histories; publish the snapshot again"
            )
        # Plain arrays over the same mapped pages: slicing a numpy.memmap costs several microseconds each time.
        mapped = histories.events
        events = Events(np.asarray(mapped.item), np.asarray(mapped.action), np.asarray(mapped.time))
        self._histories = Histories(events, np.asarray(histories.offsets))
        self.newest: int | None = manifest["newest"] if "newest" in manifest else _newest(events)

    def __len__(self) -> int:
        return len(self._ids)

    def read(self, user_id: str) -> Events | None:
        """Return the user's history, oldest first, as views; None if the user is unknown."""
        wanted = user_id.encode()
        key = np.uint64(_hash(wanted))
        at = int(self._hash.searchsorted(key))
        while at < len(self._hash) and self._hash[at] == key:
            row = int(self._row[at])
            if self._ids.raw(row) == wanted:
                return self._histories.of(row)
            at += 1
        return None

    def mark(self, log: str) -> LogMark:
        """Say what it contains of an event log: nothing of one it does not name."""
        return self._marks.get(log, LogMark(log))

    def users(self, limit: int) -> list[str]:
        """Return the ids of the first `limit` users."""
        return [self._ids[row] for row in range(min(limit, len(self._ids)))]


def _newest(events: Events) -> int | None:
    return int(np.max(events.time)) if len(events) else None


def _hash(user_id: bytes) -> int:
    return xxhash.xxh64_intdigest(user_id)
