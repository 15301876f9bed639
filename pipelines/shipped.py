"""The configuration files that come with the package: one TOML per model, and those of the other verbs."""

from pathlib import Path

CONFIGS = Path(__file__).parent / "configs"


def find_config(name: str) -> Path:
    """Return the path of a config: a shipped one by its bare name, else the file of that path."""
    shipped = CONFIGS / f"{name}.toml"
    return shipped if shipped.exists() else Path(name)
