"""Steps that are not repeated: each leaves a stamp with the digest of its inputs, and is skipped while that holds."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recsys.errors import DataError
from recsys.files import read_json, sha256_json, write_json


@dataclass(frozen=True)
class Step:
    """One step of a job.

    Args:
        name: of the stamp file.
        sentence: what it does, for a person.
        inputs: plain values that decide its result: configuration, digests of what it reads, format numbers.
        outputs: paths that must exist for the step to count as done.
        run: does the work; whatever it writes must be whole or absent.
    """

    name: str
    sentence: str
    inputs: Any
    outputs: tuple[Path, ...]
    run: Callable[[], None]


def run_step(step: Step, stamps: Path, say: Callable[[str], None]) -> bool:
    """Run a step unless its stamp says that it ran with the same inputs; gives whether it ran."""
    stamp = stamps / f"{step.name}.json"
    inputs = sha256_json(step.inputs)
    if all(path.exists() for path in step.outputs) and _stamped(stamp) == inputs:
        say(f"{step.sentence} Already done.")
        return False
    say(step.sentence)
    stamp.unlink(missing_ok=True)
    step.run()
    write_json(stamp, {"inputs": inputs})
    return True


def forget_step(name: str, stamps: Path) -> None:
    """Let a step run again whatever its stamp says."""
    (stamps / f"{name}.json").unlink(missing_ok=True)


def _stamped(stamp: Path) -> str | None:
    try:
        return str(read_json(stamp)["inputs"])
    except (DataError, KeyError):
        return None
