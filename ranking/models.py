"""Every model by name. Adding one takes its file, one line here, one TOML and its facts in the paper tests."""

from typing import Any

from ranking.dare import Dare, DareConfig
from ranking.din import Din, DinConfig
from ranking.mean_pooling import MeanPooling, MeanPoolingConfig
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.popularity import Popularity, PopularityConfig
from ranking.ranker import Ranker

RANKERS: dict[str, tuple[type[Any], type[Ranker[Any]]]] = {
    "popularity": (PopularityConfig, Popularity),
    "personal_frequency": (PersonalFrequencyConfig, PersonalFrequency),
    "mean_pooling": (MeanPoolingConfig, MeanPooling),
    "din": (DinConfig, Din),
    "dare": (DareConfig, Dare),
    "mqsa_ted": (MqsaTedConfig, MqsaTed),
}
"""name -> (config dataclass, model class)"""
