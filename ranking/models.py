"""Every model by name. Adding one takes its file, one line here, one TOML and its facts in the paper tests."""

from typing import Any

from ranking.ranker import Ranker

RANKERS: dict[str, tuple[type[Any], type[Ranker[Any]]]] = {}
"""name -> (config dataclass, model class)"""
