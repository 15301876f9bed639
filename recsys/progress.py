"""How long work tells how far it is: to a progress bar, or to who may stop it by raising."""

from typing import Protocol


class Progress(Protocol):
    """What is called as work goes on; an exception it raises ends the work there."""

    def __call__(self, done: int, total: int, words: str = "") -> None:
        """Take how much is done, of how much, and a few words for what is being done."""


def silent(done: int, total: int, words: str = "") -> None:
    """Tell nobody."""


def titled(progress: Progress, title: str) -> Progress:
    """Return what tells `progress` under a title, which stands before the words there are."""

    def told(done: int, total: int, words: str = "") -> None:
        progress(done, total, f"{title}: {words}" if words else title)

    return told
