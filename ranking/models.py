"""Every model by name. Adding one takes its file, one line here, one TOML and its facts in the paper tests."""

from typing import Any

from ranking.aw_moe import AwMoe, AwMoeConfig
from ranking.dare import Dare, DareConfig
from ranking.din import Din, DinConfig
from ranking.eta import Eta, EtaConfig
from ranking.gradient_boosting import GradientBoosting, GradientBoostingConfig
from ranking.mean_pooling import MeanPooling, MeanPoolingConfig
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig
from ranking.personal_frequency import PersonalFrequency, PersonalFrequencyConfig
from ranking.popularity import Popularity, PopularityConfig
from ranking.ranker import Ranker
from ranking.sdim import Sdim, SdimConfig
from ranking.sim_hard import SimHard, SimHardConfig
from ranking.transitions_ranker import TransitionsConfig, TransitionsRanker

RANKERS: dict[str, tuple[type[Any], type[Ranker[Any]]]] = {
    "popularity": (PopularityConfig, Popularity),
    "personal_frequency": (PersonalFrequencyConfig, PersonalFrequency),
    "transitions": (TransitionsConfig, TransitionsRanker),
    "lightgbm": (GradientBoostingConfig, GradientBoosting),
    "mean_pooling": (MeanPoolingConfig, MeanPooling),
    "din": (DinConfig, Din),
    "sim_hard": (SimHardConfig, SimHard),
    "eta": (EtaConfig, Eta),
    "dare": (DareConfig, Dare),
    "sdim": (SdimConfig, Sdim),
    "aw_moe": (AwMoeConfig, AwMoe),
    "mqsa_ted": (MqsaTedConfig, MqsaTed),
}
"""name -> (config dataclass, model class)"""
