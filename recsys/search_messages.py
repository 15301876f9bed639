"""Requests and responses of text search and of reranking, the same objects for HTTP and offline evaluation.

Reranking takes and gives what version 2 of Cohere's API does, so that its clients work; what is ours alone is optional
and named as such.
"""

from typing import Annotated, Any, Literal, Self

from pydantic import ConfigDict, Discriminator, Field, Tag, model_validator

from recsys.messages import MAX_FILTERS, WHEN, Id, Inline, ItemFilter, Message, Moment, Query, Told

MAX_DOCUMENTS = 1000
"""Most documents of one `rerank` request; more is answered with 413. Cohere advises no more either."""

MAX_TEXT = 2**30
"""Longest document in characters, more than any body holds. As for an id, the bound makes half of a surrogate pair an
error of its field."""

MAX_BUDGET = 60_000
"""Longest time a request may ask for, milliseconds."""

Mode = Literal["hybrid", "bm25", "dense"]


class SearchRequest(Message):
    """Ask for the k best passages for a text, and for a user or an inline history if one is given."""

    query: Query = Field(description="what is looked for; not blank")
    k: int = Field(default=10, ge=1, le=100)
    mode: Mode | None = Field(
        default=None, description="first stage; absent: hybrid where the bundle has an encoder, else bm25"
    )
    rerank: bool | None = Field(
        default=None,
        description="whether the reranker orders the head of the first stage; absent: the query decides, and where one "
        "passage holds nearly all of its words (`covered`) the order stays that of the first stage",
    )
    budget_ms: int | None = Field(
        default=None, ge=0, le=MAX_BUDGET, description="time the request may take; stages that do not fit are skipped"
    )
    filters: list[ItemFilter] = Field(
        default=[],
        max_length=MAX_FILTERS,
        description="an item must pass all of them, and those of the config; documents that are no items stay",
    )
    user_id: Id | None = Field(default=None, description="blend the order with what the ranker says of this user")
    history: Inline | None = Field(default=None, description="used instead of the stored history")
    at: Moment | None = Field(default=None, description=f"moment of the request, {WHEN}; now if absent")


class SearchHit(Message):
    """A passage that was found. Documents with the very same text are one hit."""

    document_id: str = Field(
        description="the item or document; of several the one most frequent in training, or for a "
        "known user the one the ranker puts first"
    )
    text: str
    score: float = Field(description="of the stage in `placed_by`; scores of different stages cannot be compared")
    placed_by: str = Field(description="`hybrid`, `bm25`, `dense`, `rerank` or `personal`")
    first_stage_rank: int = Field(description="from 1")
    rerank_rank: int | None = Field(description="rank after reranking; null if nothing was reranked")
    personal_rank: int | None = Field(description="rank by the user's ranker alone; null without a known user")
    documents: int = Field(description="how many documents have this text, items that may not be shown aside")
    also: list[str] = Field(description="the next of them")
    truncated: bool = Field(description="the reranker read only the beginning of the text")


class SearchResponse(Message):
    """The k best passages, best first."""

    hits: list[SearchHit]
    mode: Mode = Field(description="first stage that was used")
    user_known: bool | None = Field(description="null if no user was given; false: the order is that of the search")
    model_version: str
    covered: bool = Field(
        description="the reranker was left out because one passage holds nearly all words of the query"
    )
    degraded: list[str] = Field(description="stages that were skipped: `dense`, `rerank`, `personal`, `history`")
    timings: dict[str, float] = Field(description="seconds by stage")
    warnings: Told = Field(default=[], description="values of the request's filters that no item has; absent if none")


DocumentText = Annotated[str, Field(max_length=MAX_TEXT)]


class RerankDocument(Message):
    """A document as an object. Only `text` and `title` are read, one is enough; a title stands before the text."""

    model_config = ConfigDict(extra="ignore")

    text: DocumentText | None = None
    title: DocumentText | None = None

    @model_validator(mode="after")
    def _has_words(self) -> Self:
        if self.text is None and self.title is None:
            raise ValueError("expected `text` or `title`")
        return self

    @property
    def words(self) -> str:
        """Title and text as the reranker reads them."""
        return f"{self.title or ''} {self.text or ''}".strip()


def _form(document: Any) -> str | None:
    """Tell the two forms of a document apart, so that what is wrong is told of the one that was sent."""
    if isinstance(document, str):
        return "string"
    return "object" if isinstance(document, dict | RerankDocument) else None


Document = Annotated[
    Annotated[DocumentText, Tag("string")] | Annotated[RerankDocument, Tag("object")],
    Discriminator(
        _form,
        custom_error_type="document",
        custom_error_message="expected a string, or an object with `text` or `title`",
    ),
]


class RerankRequest(Message):
    """Ask for the order of given documents for a query: the request of Cohere's `POST /v2/rerank`."""

    model: str | None = Field(default=None, max_length=512, description="taken and not used: a bundle has one reranker")
    query: Query
    documents: Annotated[list[Document], Field(fail_fast=True)] = Field(min_length=1)
    top_n: int | None = Field(default=None, ge=1, description="how many results; all if absent or above the list")
    max_tokens_per_doc: int = Field(
        default=4096, ge=1, description="a longer document is cut; so is one longer than the reranker reads"
    )
    return_documents: bool = Field(
        default=False,
        description="of version 1: give each result its document as one text; of an object, `title` before `text`",
    )
    priority: int = Field(default=0, ge=0, le=999, description="taken and not used")
    budget_ms: int | None = Field(default=None, ge=0, le=MAX_BUDGET, description="ours: time the request may take")


class RerankedText(Message):
    """A document that was sent along."""

    text: str


class RerankResult(Message):
    """A document by its place in the request."""

    index: int
    relevance_score: float = Field(description="0 to 1, comparable within this answer alone; 0 if nothing was reranked")
    document: RerankedText | None = Field(
        default=None, exclude_if=lambda document: document is None, description="only with `return_documents`"
    )


class ApiVersion(Message):
    """Which API an answer follows."""

    version: str = "2"


class BilledUnits(Message):
    """Nothing is billed; clients expect the field."""

    search_units: int = 0


class RerankMeta(Message):
    """What else there is to say."""

    api_version: ApiVersion = ApiVersion()
    billed_units: BilledUnits = BilledUnits()
    warnings: list[str] = Field(default=[], description="what was cut or skipped, in words")
    model: str = Field(description="ours: kind of the model that ordered, `first_stage` if none did")
    model_version: str = Field(description="ours: version of the bundle")
    degraded: list[str] = Field(description="ours: `rerank` if time ran out before all were scored")
    truncated: list[int] = Field(description="ours: indexes of documents of which only the beginning was read")
    timings: dict[str, float] = Field(description="ours: seconds by stage")


class RerankResponse(Message):
    """Documents by relevance, best first: the answer of Cohere's `POST /v2/rerank`."""

    id: str
    results: list[RerankResult]
    meta: RerankMeta
