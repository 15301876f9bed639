"""What the endpoint does, free of HTTP: answer, record, look up, and change the bundle under way."""

import math
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ranking.batch import UNKNOWN, rows_of
from ranking.bundle import Bundle
from ranking.devices import Device
from ranking.ladder import Budget
from ranking.manifest import Manifest
from ranking.request_path import RequestPath
from ranking.searched import SearchConfig, Searched
from recsys.errors import RequestError, StoreError
from recsys.history import UNKNOWN_KEY, Events
from recsys.messages import (
    EventsRequest,
    EventsResponse,
    EventVerdict,
    RankRequest,
    RankResponse,
    RecommendRequest,
    RecommendResponse,
    SimilarRequest,
)
from recsys.stores import Encoder
from serving.event_log import SegmentLog
from serving.lineup import Lineup, Role, Served
from serving.pairs import Listed, Pair, PairLog
from serving.replies import (
    ForgottenResponse,
    FoundItem,
    HistoryEvent,
    HistoryResponse,
    ItemsResponse,
    ModelInfo,
    ModelsResponse,
    SimilarResponse,
    UsersResponse,
)
from serving.request_log import RequestLog, logged
from serving.similar import similar
from serving.state import MAX_FUTURE, State, machine_clock
from serving.telemetry import Telemetry
from serving.unknown_actions import unknown_actions
from serving.view import LiveHistories, Observed
from serving.watched import Reading, Watched

T = TypeVar("T")

WHOLE_PATH = RequestPath()
"""Without filters and rules, everything available."""


class Service:
    """One recommender with its event log and live histories.

    It begins without a bundle, alive but not ready; `swap` gives it the first one like every later one.

    Args:
        log: the event log.
        store: the live histories, which follow the log.
        telemetry: where counts go.
        clock: gives now in microseconds UTC.
        share: of the users whom a challenger answers.
        pairs: where answers are kept beside a rival's; None keeps none.
        path: settings and live state of the request path, for every bundle.
        search: depths and time budgets of text search; the defaults if absent.
        requests: where a sample of the answers is kept for training and replay; None keeps none.
        device: where the models of its bundles run.

    Every method may be called from several threads at once.
    """

    def __init__(
        self,
        log: SegmentLog,
        store: LiveHistories,
        telemetry: Telemetry,
        clock: Callable[[], int] = machine_clock,
        share: float = 0.0,
        pairs: PairLog | None = None,
        path: RequestPath = WHOLE_PATH,
        search: SearchConfig | None = None,
        requests: RequestLog | None = None,
        device: Device = "cpu",
    ) -> None:
        self.path = path
        self.device = device
        self.telemetry = telemetry
        self.store = store
        self.histories = Watched(store)
        self.state = State(log, store, telemetry, clock)
        self.search_config = search or SearchConfig()
        self._share = share
        self._pairs = pairs
        self._requests = requests
        self._lineup: Lineup | None = None
        self._naming: Bundle | None = None
        self._encoder = Encoder(lambda item: self._names.key_of(item), lambda action: self._names.action_of(action))
        self._swapping = threading.Lock()

    @property
    def served(self) -> Served:
        """The champion; raises `RequestError` 503 before there is a bundle."""
        return self.lineup.champion

    @property
    def _names(self) -> Bundle:
        """What gives the keys of histories: the champion, or what is about to be it."""
        return self.served.bundle if self._naming is None else self._naming

    @property
    def lineup(self) -> Lineup:
        """What answers now; raises `RequestError` 503 before there is a bundle."""
        if self._lineup is None:
            raise RequestError(503, "not_ready", "no bundle is loaded yet; come back in a moment")
        return self._lineup

    @property
    def now(self) -> int:
        """The moment, microseconds UTC."""
        return self.state.now()

    @property
    def version(self) -> str:
        """Version of the champion, empty before there is one."""
        return "" if self._lineup is None else self._lineup.champion.bundle.version

    @contextmanager
    def reading(self) -> Iterator[Reading]:
        """Tell what this thread reads of histories inside; what the view has missed is brought into it first.

        A history read from a view that still lacks something counts as missed.
        """
        whole = self.state.catch_up(self._encoder)
        with self.histories.reading() as read:
            yield read
        if read.missed:
            self.state.missed()
        elif read.observed is not None and not whole:
            read.missed = True

    def recommend(
        self,
        request: RecommendRequest,
        now: int | None = None,
        budget: Budget | None = None,
        found: tuple[Served, Searched] | None = None,
    ) -> RecommendResponse:
        """Return the k best items for a user.

        Args:
            request: what is asked.
            now: the moment, microseconds UTC; that of the clock if absent.
            budget: the time there is; stages that fail or are late are then left out and named.
            found: what was found for the request's query, and by which bundle, which then ranks it too.
        """
        lineup, moment = self.lineup, self.state.now() if now is None else now
        with self.reading() as read:
            if found is None:
                response = lineup.answering(request.user_id).recommender.recommend(request, moment, budget)
            else:
                response = found[0].recommender.recommend(request, moment, budget, found[1])
        if read.missed:
            response = response.model_copy(update={"degraded": ["history", *response.degraded]})
        self.telemetry.answer(response.user_known, response.degraded)
        self.telemetry.recommended(request.k, len(response.items), response.candidates)
        if found is None:  # what a text search proposed can't be made again from the history
            self._log_answer(request, response, moment, lineup.champion, read.observed)
        return response

    def _log_answer(
        self,
        request: RecommendRequest,
        response: RecommendResponse,
        now: int,
        champion: Served,
        observed: Observed | None,
    ) -> None:
        """Offer an answer to the request log, if it was made whole from a stored history and is drawn."""
        log = self._requests
        if log is None or observed is None or request.user_id is None or response.degraded or not log.wanted():
            return
        at = now if request.at is None else request.at
        if at - self.state.now() > MAX_FUTURE:  # nobody lives to see what is done then
            return
        bundle, settings = champion.bundle, champion.recommender.settings_digest()
        known = bundle.version, len(bundle.key_to_row)
        taken = log.offer(logged(request, response, at, observed, self.state.log.id, *known, settings))
        self.telemetry.logged(taken)

    def rank(self, request: RankRequest, budget: Budget | None = None) -> RankResponse:
        """Return the scores of given items for a user."""
        with self.reading() as read:
            response = self.lineup.answering(request.user_id).recommender.rank(request, self.state.now(), budget)
        if read.missed:
            response = response.model_copy(update={"degraded": ["history", *response.degraded]})
        self.telemetry.answer(response.user_known, response.degraded)
        self.telemetry.candidates(len(request.item_ids), len(response.unknown_item_ids))
        return response

    def has_rival(self, user_id: str | None) -> bool:
        """Whether another bundle scores beside the one that answers a user."""
        return self._lineup is not None and self._lineup.rival(self._lineup.role_of(user_id)) is not None

    def compare(self, request: RecommendRequest, response: RecommendResponse, now: int) -> None:
        """Let the other bundle answer too, for nobody but the log of pairs; no pair has an answer that lacks a stage.

        Args:
            request: what was asked.
            response: what was answered.
            now: the moment it was answered at, microseconds UTC.
        """
        lineup = self.lineup
        role = lineup.role_of(request.user_id)
        rival, answering = lineup.rival(role), lineup.answering(request.user_id)
        if rival is None or response.degraded or answering.bundle.version != response.model_version:  # swapped since
            return
        with self.reading() as read:
            other = rival[1].recommender.recommend(request, now)
        if read.missed or other.degraded:
            return
        if self._pairs is not None and request.user_id is not None:
            moment = now if request.at is None else request.at
            self._pairs.append(Pair(moment, request.user_id, _listed(role, response), _listed(rival[0], other)))

    def record(self, request: EventsRequest) -> EventsResponse:
        """Write events durably and make them part of their users' histories before answering.

        Raises:
            RequestError: a user id too long, or a time out of range; nothing is written then.
        """
        bundle = self.served.bundle
        verdicts: list[EventVerdict] = []
        actions: dict[str, None] = {}
        for event, taken in self.state.record(request.events, self._encoder):
            verdict = str(taken)
            if verdict == "accepted":
                if not bundle.knows_action(event.action):
                    verdict, actions[event.action] = "accepted_unknown_action", None
                if bundle.key_of(event.item_id) == UNKNOWN_KEY:
                    verdict = "accepted_unknown_item"
            self.telemetry.verdict(verdict)
            verdicts.append(EventVerdict(event_id=event.event_id, verdict=verdict))
        accepted = sum(each.verdict.startswith("accepted") for each in verdicts)
        warnings = unknown_actions(list(actions), bundle.manifest.actions)
        return EventsResponse(verdicts=verdicts, accepted=accepted, warnings=warnings)

    def unknown_items(self, item_ids: Iterable[str]) -> list[str]:
        """Return those of the ids that the champion does not know; none before there is one."""
        return [] if self._lineup is None else [item for item in item_ids if item not in self.served.bundle.row_of]

    def history(self, user_id: str, limit: int) -> HistoryResponse:
        """Return the newest `limit` events of a user; raises `RequestError` 404 for a user nothing is known of."""
        events = self._stored(lambda: self.store.read(user_id))
        if events is None:
            raise RequestError(404, "unknown_user", f"nothing is known of user {user_id!r}")
        newest = events.slice(max(len(events) - limit, 0), len(events))
        return HistoryResponse(user_id=user_id, total=len(events), events=_describe(newest, self.served.bundle)[::-1])

    def forget(self, user_id: str) -> ForgottenResponse:
        """Forget a user, durably, before answering; whoever was forgotten before is forgotten again."""
        forgotten = self.state.forget(user_id, self._encoder)
        if self.path.states is not None:
            self.path.states.forget(user_id)
        self.telemetry.forget()
        return forgotten

    def users(self, limit: int) -> UsersResponse:
        """Return some user ids."""
        return UsersResponse(users=self._stored(lambda: self.store.users(limit)))

    def _stored(self, work: Callable[[], T]) -> T:
        """Return what the store says, once it has all that could be brought into it; raises `StoreError`."""
        self.state.catch_up(self._encoder)
        try:
            return work()
        except StoreError:
            self.state.missed()
            raise

    def items(self, query: str, limit: int) -> ItemsResponse:
        """Return the item with this very id, then those whose name holds the text, most frequent in training first."""
        served = self.served
        bundle, row = served.bundle, served.bundle.row_of.get(query)
        rows = served.names.find(query, limit)
        if row is not None:
            rows = [row, *(other for other in rows if other != row)][:limit]
        counts = bundle.items.count[rows].tolist()
        return ItemsResponse(
            items=[
                FoundItem(item_id=bundle.item_ids[row], name=bundle.names[row], events=count)
                for row, count in zip(rows, counts, strict=True)
            ]
        )

    def similar(self, item_id: str, request: SimilarRequest) -> SimilarResponse:
        """Return the k items nearest to an item, as `serving.similar` finds them."""
        return similar(self.served, item_id, request)

    def models(self) -> ModelsResponse:
        """Say what is being served."""
        lineup = self.lineup
        bundle, searcher = lineup.champion.bundle, lineup.champion.searcher
        manifest = bundle.manifest
        reranks = manifest.text is not None and manifest.text.reranker is not None
        depth = None
        if searcher is not None and reranks:
            depth = searcher.rerank_depth(searcher.deadline(None).seconds)
        return ModelsResponse(
            version=bundle.version,
            models=_models(manifest),
            items=manifest.counts["items"],
            passages=None if manifest.text is None else manifest.text.passages,
            rerank_depth=depth,
            created=manifest.provenance.created,
            commit=manifest.provenance.commit,
            data_digest=manifest.provenance.data_digest,
            metrics=manifest.provenance.metrics,
            lineup={role: served.bundle.version for role, served in lineup.members()},
            challenger_share=lineup.share if lineup.challenger is not None else 0.0,
            event_log=self.state.log_info(),
            history_store=self.state.store_info(),
        )

    def swap(self, served: Served, challenger: Served | None = None, shadow: Served | None = None) -> None:
        """Put bundles in place of those before; requests under way end with the one they began with.

        Events whose items were unknown get their keys first, if the new champion may know them; posts wait meanwhile
        (about a second for 150,000 events of the log), everything else goes on.
        """
        with self._swapping:
            before = self._lineup
            # First, so that whoever posts meanwhile gives the new champion's keys: nothing would correct them later.
            named, self._naming = self._naming, served.bundle
            try:
                self.state.follow(self._encoder, learn=before is not None and before.champion is not served)
            except BaseException:
                self._naming = named
                raise
            self._lineup = Lineup(served, challenger, shadow, self._share)
            if before is None or before.champion is not served:
                self._watch_recall(served.bundle)
            self.telemetry.swap()

    def _watch_recall(self, bundle: Bundle) -> None:
        """Watch the index of a new champion; until a search of it was looked at, what it had at publish is told."""
        if self.path.watch is not None:
            at_publish = bundle.manifest.index_recall
            self.telemetry.recall_at_publish(math.nan if at_publish is None else at_publish.value)
            self.path.watch.follow(bundle.index)

    def close(self) -> None:
        """Close log and store."""
        if self.path.watch is not None:
            self.path.watch.close()
        if self._requests is not None:
            self._requests.close()
        self.state.close()
        if self._pairs is not None:
            self._pairs.close()


def _listed(role: Role, response: RecommendResponse) -> Listed:
    items = [item.item_id for item in response.items]
    return Listed(role, response.model_version, items, response.timings.get("total", 0.0))


def _models(manifest: Manifest) -> list[ModelInfo]:
    models = [ModelInfo(role=role, name=entry.name) for role, entry in manifest.models.items()]
    if manifest.text is not None:
        kinds = {"text encoder": manifest.text.encoder, "text reranker": manifest.text.reranker}
        models += [ModelInfo(role=role, name=kind) for role, kind in kinds.items() if kind is not None]
    return models


def _describe(events: Events, bundle: Bundle) -> list[HistoryEvent]:
    described = []
    rows = rows_of(events.item, bundle.key_to_row)
    actions = bundle.manifest.actions
    for row, action, moment in zip(rows.tolist(), events.action.tolist(), events.time.tolist(), strict=True):
        known = row > UNKNOWN
        described.append(
            HistoryEvent(
                item_id=bundle.item_ids[row] if known else None,
                name=bundle.names[row] if known else None,
                timestamp=moment,
                action=actions[action] if action < len(actions) else "",
            )
        )
    return described
