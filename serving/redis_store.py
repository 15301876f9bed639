"""Live histories in Redis, for several machines: one view that each machine's event log feeds.

    recsys:{snapshot}:u:{user}    13 bytes an event, oldest first: time (64 bits, sign flipped), item key (32), action
                                  (8), big-endian, so that a script compares times exactly
    recsys:{snapshot}:x:{user}    events whose item was unknown, each with its item id: a new bundle may know it
    recsys:{snapshot}:at          hash: id of a log -> position up to which it is applied
    recsys:{snapshot}:users, :forgotten, :unknown, :applied     sets: users with events, users whose snapshot is hidden,
                                  users with unknown items, tombstones that were applied
    recsys:views                  sorted set: prefixes of the views that exist, by when each was last applied to
    recsys:tombstones             list: what every machine's log takes over, so that each is whole by itself
    recsys:copied                 hash: id of a log -> how many tombstones of that list it has taken over
    recsys:tombstoned             set: ids of tombstones that were put on that list

Every change is one Lua script that also moves the log's position: an entry counts once, whoever was killed when. Redis
may lose everything: the view is then filled again from the snapshot and the logs, each machine's at its next request,
and until then nothing is read from it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import numpy as np
import redis
from numpy.typing import NDArray
from redis.backoff import NoBackoff
from redis.retry import Retry

from recsys.errors import ConfigError, DataError, StoreError
from recsys.history import UNKNOWN_KEY, Events
from recsys.log_format import Record
from recsys.stores import Encoder, Event, Tombstone
from serving import view
from serving.redis_scripts import APPLY, COUNT_UNKNOWN, LEARN
from serving.view import HISTORY_EVENTS, MAX_USER_BYTES, Observed, ReplayableLog, Snapshot, batches, by_user, joined

RECORD = np.dtype([("time", ">u8"), ("item", ">u4"), ("action", "u1")])
TOMBSTONES = "recsys:tombstones"
COPIED = "recsys:copied"
VIEWS = "recsys:views"
KEPT_SECONDS = 7 * 86_400
"""Since anything was applied to the view of an earlier snapshot: other machines may serve over it until then."""

APPLY_EVENTS = 2_000
"""Entries of one script: nothing else is answered while it runs, and it has to end before `TIMEOUT_SECONDS`."""

TIMEOUT_SECONDS = 0.5
PAUSE_SECONDS = 1.0
"""How long a server that was gone is not asked again: requests meanwhile are answered without it, at once."""

logger = logging.getLogger(__name__)

T = TypeVar("T")


class RedisHistoryStore:
    """Snapshot plus applied events of all machines that share a server.

    Args:
        url: redis://[user:password@]host:port/db, or rediss:// with TLS; never logged.
        base: the published snapshot; every machine has a copy of the same.
        bound: newest posted events kept of a user.
    """

    kind = "redis"

    def __init__(self, url: str, base: Snapshot, bound: int = HISTORY_EVENTS) -> None:
        self._base = base
        self._bound = bound
        self._prefix = f"recsys:{base.id}:"
        self._log = ""
        self._down_until = 0.0
        self._client: Any = redis.Redis.from_url(
            url,
            socket_timeout=TIMEOUT_SECONDS,
            socket_connect_timeout=TIMEOUT_SECONDS,
            retry=Retry(NoBackoff(), 1),  # a connection that the server closed while it was idle
        )
        self._refuse_eviction(url)
        self._apply_script = self._client.register_script(APPLY)
        self._learn_script = self._client.register_script(LEARN)
        self._count_script = self._client.register_script(COUNT_UNKNOWN)

    def _refuse_eviction(self, url: str) -> None:
        """Refuse a server that would drop keys by itself: with the set of the forgotten their histories come back."""
        try:
            about = self._client.info("memory")
        except redis.exceptions.RedisError:  # away, or nobody may ask: the view is put off, or runs on trust
            return
        policy = str(about.get("maxmemory_policy", "noeviction"))
        if policy.startswith("allkeys") and int(about.get("maxmemory", 0)):
            where = url.rpartition("@")[2]
            raise ConfigError(
                f"redis at {where}: maxmemory-policy is {policy}, by which users who were forgotten come back; "
                "set it to noeviction"
            )

    def read(self, user_id: str) -> Events | None:
        """Return the user's history, oldest first, or None if neither the snapshot nor a log knows the user."""
        return self.observe(user_id).events

    def observe(self, user_id: str) -> Observed:
        """Return the user's history with what it was read from; position -1 where several logs feed the view."""
        base, posted, position = self._asked(lambda: self._look_up(user_id))
        return Observed(joined(base, posted), position, self._base.id)

    def parts(self, user_id: str) -> tuple[Events | None, Events | None]:
        """Return what the snapshot and what the logs know of a user, None each for nothing."""
        base, posted, _ = self._asked(lambda: self._look_up(user_id))
        return base, posted

    def users(self, limit: int) -> list[str]:
        """Return up to `limit` user ids: those with posted events first, then users of the snapshot."""
        return self._asked(lambda: self._users(limit))

    def follow(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Apply what this machine's log holds beyond the view; gives the number of entries applied."""
        self._log = log.id
        return self._asked(lambda: self._follow(log, encoder))

    def rebuild(self, log: ReplayableLog, encoder: Encoder) -> int:
        """Empty the view and apply this machine's log; the logs of other machines follow at their next post."""
        self._asked(self._empty)
        return self.follow(log, encoder)

    def learn(self, log: ReplayableLog, encoder: Encoder) -> None:
        """Apply the log, then give the events of items that were unknown the keys they have now."""
        self.follow(log, encoder)
        self._asked(lambda: self._learn(encoder))

    def before_append(self, log: ReplayableLog) -> None:
        """Take over other machines' tombstones, so that they stand before what is posted after them."""
        self._asked(lambda: self._copy_tombstones(log))

    @property
    def position(self) -> int:
        """Position of this machine's log up to which events have been applied."""
        return int(self._asked(lambda: self._client.hget(f"{self._prefix}at", self._log)) or 0)

    @property
    def unknown_events(self) -> int:
        """Number of events, of all machines, whose item is unknown."""
        return int(self._asked(lambda: self._count_script(args=[self._prefix])))

    def close(self) -> None:
        """Close the connections; the object can't be used afterwards."""
        self._client.close()

    def _empty(self) -> None:
        self._delete(self._prefix)

    def _drop_old_views(self) -> None:
        """Remove the views of earlier snapshots to which nothing has been applied for long, but whom they forgot.

        A machine that serves over one still fills it again at its next post, and hides the forgotten until then.
        """
        now = int(self._client.time()[0])
        for name in self._client.zrangebyscore(VIEWS, 0, now - KEPT_SECONDS):
            if name.decode() != self._prefix:
                self._delete(name.decode(), but=(name + b"forgotten", name + b"applied"))
                self._client.zrem(VIEWS, name)

    def _delete(self, prefix: str, but: Sequence[bytes] = ()) -> None:
        for keys in _some(self._client.scan_iter(f"{prefix}*", count=1_000)):
            if gone := [key for key in keys if key not in but]:
                self._client.delete(*gone)

    def _asked(self, work: Callable[[], T]) -> T:
        if time.monotonic() < self._down_until:
            raise StoreError("the redis history store was gone a moment ago; it is asked again soon")
        try:
            return work()
        except redis.exceptions.RedisError as error:
            if isinstance(error, redis.exceptions.ConnectionError | redis.exceptions.TimeoutError):
                self._down_until = time.monotonic() + PAUSE_SECONDS
            raise view.unavailable(self.kind, error) from error

    def _look_up(self, user_id: str) -> tuple[Events | None, Events | None, int]:
        before, raw, forgotten, positions = self._at_once(user_id, transaction=False)
        if before != positions:  # events were applied in between
            _, raw, forgotten, positions = self._at_once(user_id, transaction=True)
        self._require(self._log.encode() in positions)
        base = None if forgotten else self._base.read(user_id)
        position = int(positions.get(self._log.encode(), 0)) if len(positions) <= 1 else -1
        return base, _decode(raw) if raw else None, position

    def _at_once(self, user_id: str, transaction: bool) -> list[Any]:
        """Return the logs' positions, a user's records, whether the user is forgotten, and the positions again.

        In one round trip. A transaction takes 0.07 ms longer; without one, equal positions say that nothing changed.
        """
        with self._client.pipeline(transaction=transaction) as pipe:
            pipe.hgetall(f"{self._prefix}at")
            pipe.getrange(f"{self._prefix}u:{user_id}", -self._bound * RECORD.itemsize, -1)
            pipe.sismember(f"{self._prefix}forgotten", user_id)
            pipe.hgetall(f"{self._prefix}at")
            found: list[Any] = pipe.execute()
            return found

    def _require(self, applied: bool) -> None:
        """Raise `StoreError` for a view without this machine's log: whom it forgot would be there again."""
        if self._log and not applied:
            raise StoreError("the redis history store has lost its view; it is filled again from the log")

    def _users(self, limit: int) -> list[str]:
        self._require(self._client.hexists(f"{self._prefix}at", self._log))
        users: dict[str, None] = {}
        for user in self._client.sscan_iter(f"{self._prefix}users", count=max(limit, 10)):
            if len(users) >= limit:
                break
            users[user.decode()] = None
        hidden = self._client.smembers(f"{self._prefix}forgotten")
        for user_id in self._base.users(limit + len(hidden)):
            if len(users) >= limit:
                break
            if user_id.encode() not in hidden:
                users[user_id] = None
        return list(users)

    def _follow(self, log: ReplayableLog, encoder: Encoder) -> int:
        found = self._client.hget(f"{self._prefix}at", log.id)
        if found is not None:
            position = int(found)
            if position == log.end or position == log.refresh():
                return 0
            if position < log.end:
                try:
                    return self._apply(batches(log, position, None, APPLY_EVENTS), log, position, encoder, {})
                except DataError as error:  # a log that lost its end and has grown again has no entry there
                    logger.warning("%s; the view is filled anew", error)
            for _ in log.replay(self._base.mark(log.id).position):  # a damaged log must not cost others their view
                pass
            self._empty()  # what the log lost was in the view; other machines' logs follow at their next post
        self._copy_tombstones(log)
        self._drop_old_views()
        log.refresh()
        mark = self._base.mark(log.id)
        # Tombstones of a log that is applied from its start stand among other machines' newer events: they may only
        # take away events of their own log, so these are left out beforehand.
        last = {
            record.event.user_id: record.end
            for record in log.replay(mark.position)
            if isinstance(record.event, Tombstone)
        }
        return self._apply(batches(log, mark.position, mark, APPLY_EVENTS), log, mark.position, encoder, last)

    def _apply(
        self,
        some: Iterator[list[Record]],
        log: ReplayableLog,
        position: int,
        encoder: Encoder,
        last: dict[str, int],
    ) -> int:
        first = self._client.hget(f"{self._prefix}at", log.id) is None
        expected, applied = "" if first else str(position), 0
        for batch in some:
            kept = [r for r in batch if isinstance(r.event, Tombstone) or r.end > last.get(r.event.user_id, -1)]
            operations = _operations(kept, encoder, first)
            end = str(batch[-1].end)
            if not self._apply_script(args=[self._prefix, log.id, expected, end, self._bound, *operations]):
                return applied  # another process of this machine was faster; it applies the rest
            expected, applied = end, applied + len(batch)
        if first and not applied:
            self._client.hsetnx(f"{self._prefix}at", log.id, position)
        return applied

    def _learn(self, encoder: Encoder) -> None:
        for user in self._client.smembers(f"{self._prefix}unknown"):
            entries = self._client.lrange(self._prefix.encode() + b"x:" + user, 0, -1)
            known: list[bytes] = []
            for entry in entries:
                key = encoder.key_of(entry[RECORD.itemsize :].decode())
                if key != UNKNOWN_KEY:
                    known += [entry, key.to_bytes(4, "big")]
            if known:
                self._learn_script(args=[self._prefix, user, *known])

    def _copy_tombstones(self, log: ReplayableLog) -> None:
        copied = int(self._client.hget(COPIED, log.id) or 0)
        waiting = self._client.lrange(TOMBSTONES, copied, -1)
        for entry in waiting:
            event_id, _, user_id = entry.decode().partition("\0")
            log.copy_tombstone(Tombstone(event_id, user_id))
        if waiting:
            self._client.hset(COPIED, log.id, copied + len(waiting))


def _operations(batch: Sequence[Record], encoder: Encoder, first: bool) -> list[Any]:
    """Return triples of the script's operations: forget, append, note an unknown item."""
    operations: list[Any] = []
    for record in batch:
        if isinstance(record.event, Tombstone):
            operations += ["hide" if first else "forget", record.event.user_id, record.event.event_id]
    _, posted = by_user(batch)
    for user_id, events in posted.items():
        if len(user_id.encode()) > MAX_USER_BYTES:
            raise DataError(f"user id of {len(user_id.encode())} bytes; the history store takes up to {MAX_USER_BYTES}")
        rows, ordered = _encode(events, encoder)
        for place in np.flatnonzero(rows["item"] == UNKNOWN_KEY).tolist():
            operations += ["unknown", user_id, rows[place].tobytes() + ordered[place].item_id.encode()]
        operations += ["append", user_id, rows.tobytes()]
    return operations


def _encode(events: Sequence[Event], encoder: Encoder) -> tuple[NDArray[np.void], list[Event]]:
    """Return records in order of time, and the events in that order."""
    ordered = sorted(events, key=lambda event: event.time)
    packed = encoder.events(ordered)
    rows = np.empty(len(packed), RECORD)
    rows["time"] = packed.time.view(np.uint64) ^ np.uint64(1 << 63)
    rows["item"], rows["action"] = packed.item, packed.action
    return rows, ordered


def _decode(raw: bytes) -> Events:
    rows = np.frombuffer(raw, RECORD)
    time_ = (rows["time"].astype(np.uint64) ^ np.uint64(1 << 63)).view(np.int64)
    return Events(rows["item"].astype(np.uint32), np.ascontiguousarray(rows["action"]), time_)


def _some(keys: Iterator[bytes]) -> Iterator[list[bytes]]:
    part: list[bytes] = []
    for key in keys:
        part.append(key)
        if len(part) == 1_000:
            yield part
            part = []
    if part:
        yield part
