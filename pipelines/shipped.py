"""The configuration files that come with the package: one TOML per model, and those of the other verbs."""

from pathlib import Path

from recsys.config import nearest_first
from recsys.errors import ConfigError

CONFIGS = Path(__file__).parent / "configs"
LIKE = 5
"""Names that are told to whoever misspelled one."""


def find_config(name: str) -> Path:
    """Return the path of a config: a shipped one by its bare name, else the file of that path.

    Raises:
        ConfigError: a bare name that is neither.
    """
    shipped, path = CONFIGS / f"{name}.toml", Path(name)
    if shipped.exists() or path.exists() or path.suffix or path.parent != Path():
        return shipped if shipped.exists() else path
    known = nearest_first(name, [one.stem for one in CONFIGS.glob("*.toml")])
    like = ", ".join(known[:LIKE])
    raise ConfigError(
        f"no config {name!r} and no file of that name; the likest there are: {like}; all lie in {CONFIGS}"
    )
