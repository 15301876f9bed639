"""What `publish` does for text search."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from recsys.errors import ConfigError
from recsys.terminal import Terminal

if TYPE_CHECKING:
    from pipelines.workspace import Workspace
    from ranking.search_part import SearchContents


def search_parts(
    encoder: str | None, reranker: str | None, corpus: Path | None, fusion: str, place: "Workspace", items: bool
) -> "SearchContents | None":
    """Return what search needs, or None if it was not asked for."""
    from pipelines import text_publish

    if encoder is None:
        if reranker or corpus or not items or fusion != text_publish.BY_QUERY:
            why = "without --ranker, or with --reranker, --corpus or --fusion"
            raise ConfigError(f"{why}, name a --text-encoder (none: words)")
        return None
    if corpus is not None:
        rows = text_publish.item_rows(place.prepared) if items else None
        tuned = encoder != text_publish.WORDS_ALONE and fusion == text_publish.BY_QUERY
        passages, blank = text_publish.corpus_passages(corpus, rows, tuned)
        if blank:
            Terminal().say(f"{blank:,} documents have no text and are left out.")
    elif items:
        passages = text_publish.item_passages(place.prepared)
    else:
        raise ConfigError("without --ranker there are no items to search; name a --corpus")
    runs = place.root / "runs"
    order = text_publish.find_reranker(reranker, runs) if reranker else None
    model, mix = text_publish.find_encoder(encoder, runs), text_publish.mix_of(fusion)
    with Terminal().bar("encode passages") as bar:
        contents = text_publish.search_contents(passages, model, order, mix, place.text_vectors, bar)
    if corpus is None or model is None or fusion != text_publish.BY_QUERY:
        return contents
    learned = text_publish.split_learned_from(encoder, runs, corpus)
    mix = text_publish.chosen_mix(corpus, model, place.text_vectors, but=learned)
    why = f"; the encoder learned from {learned}'s queries, so they do not choose it" if learned else ""
    Terminal().say(
        f"Words weigh {mix.weight:g} (or more, where a passage covers the query){why}; --fusion sets it by hand."
    )
    return replace(contents, mix=mix)


def publish_search(
    text: "SearchContents | None", corpus: Path | None, place: "Workspace", uri: str, alias: str
) -> None:
    """Publish a bundle that only searches text."""
    from pipelines import tracking
    from pipelines.publish import register
    from pipelines.text_publish import publish_text

    assert text is not None, "refused before if neither ranker nor text was named"
    assert corpus is not None
    bundle_version = publish_text(corpus, text, place.bundle, place.snapshot)
    with tracking.run(uri, f"search {corpus.name}") as run:
        version = register(place.bundle, run.run_id, uri, alias=alias)
    typer.echo(f"{place.bundle}: bundle {bundle_version}, MLflow version {version}, alias {alias}")
