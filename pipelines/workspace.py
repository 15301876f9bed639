"""Where things lie in a workspace: one directory for one log and all that is made from it."""

from dataclasses import dataclass
from pathlib import Path

from pipelines.parts import open_part
from pipelines.prepared import PreparedSet
from pipelines.tracking import default_uri
from recsys.config import nearest_first
from recsys.errors import DataError


@dataclass(frozen=True)
class Workspace:
    """A workspace directory; nothing is created before it is written to."""

    root: Path

    @property
    def log(self) -> Path:
        """The canonical log: events, items and users as Parquet."""
        return self.root / "log"

    @property
    def items(self) -> Path:
        """The catalogue of the canonical log."""
        return self.log / "items.parquet"

    @property
    def parts(self) -> list[Path]:
        """The canonical log and the later parts that were added to it, oldest first."""
        return [self.log, *sorted(self.later_parts.glob("[0-9]*"))]

    @property
    def later_parts(self) -> Path:
        """Where later parts of the log lie, one numbered directory each."""
        return self.root / "later"

    @property
    def prepared(self) -> PreparedSet:
        """The prepared set."""
        return PreparedSet(self.root / "prepared")

    @property
    def left_out(self) -> list[Path]:
        """Parts of the log that the prepared set lacks: an addition was interrupted, or they were ingested since."""
        known = {record["digest"] for record in self.prepared.manifest.get("parts", ())}
        there = [part for part in self.parts if part.exists()] if known else []
        return [part for part in there if open_part(part).record.digest not in known]

    @property
    def audit(self) -> Path:
        """What the last audit of the prepared set said."""
        return self.root / "audit.json"

    def run(self, name: str) -> Path:
        """Directory of a training run."""
        return self.root / "runs" / name

    @property
    def evaluation(self) -> Path:
        """Directory of the last evaluation: metrics.json, report.html, report.md and the scores."""
        return self.root / "evaluation"

    @property
    def comparison(self) -> Path:
        """Directory of the last comparison: compare.json, compare.html, compare.md."""
        return self.root / "comparison"

    @property
    def bundle(self) -> Path:
        """The bundle published last."""
        return self.root / "bundle"

    @property
    def snapshot(self) -> Path:
        """Packed histories of all users at the last publish: the base under the live store."""
        return self.root / "snapshot"

    @property
    def text_vectors(self) -> Path:
        """Vectors of texts by model and content, for training, evaluation and publishing alike."""
        return self.root / "text-vectors"

    @property
    def state(self) -> Path:
        """What the service writes: event log and live histories."""
        return self.root / "state"

    @property
    def tracking_uri(self) -> str:
        """MLflow's sqlite file of this workspace."""
        return default_uri(self.root)

    def require(self, path: Path, verb: str) -> Path:
        """Return `path` if it exists, else say which verb makes it, and which runs there are if it is one."""
        if not path.exists():
            runs = sorted(one.name for one in path.parent.glob("*/")) if path.parent == self.root / "runs" else []
            there = f"; there are: {', '.join(nearest_first(path.name, runs))}" if runs else ""
            raise DataError(f"{path}: not there yet; run `recsys {verb} --workspace {self.root}` first{there}")
        return path
