"""How the scores of recommended items lie at publish: what the service compares its own with."""

from collections.abc import Callable

import numpy as np

from pipelines.prepared import PreparedSet
from ranking.bundle import Bundle
from ranking.drift import TOP, ScoreReference
from ranking.recommender import Recommender
from recsys.history import Events
from recsys.messages import RecommendRequest
from recsys.randomness import generator

USERS = 200


def score_reference(prepared: PreparedSet) -> Callable[[Bundle], ScoreReference]:
    """Return what asks a bundle for recommendations of some users at the end of the log, and tells how scores lie."""
    histories = prepared.histories
    count = min(USERS, len(histories))
    users = generator(0, 0, "score reference").choice(len(histories), count, replace=False).tolist()

    class ByRow:
        def read(self, user_id: str) -> Events | None:
            """Return a history by its row."""
            return histories.of(int(user_id))

    def told(bundle: Bundle) -> ScoreReference:
        recommender = Recommender(bundle, ByRow())
        end = int(histories.events.time.max(initial=0)) + 1
        scores: list[float] = []
        for user in users:
            answer = recommender.recommend(RecommendRequest(user_id=str(user), k=TOP), end)
            if answer.user_known:
                scores += [item.score for item in answer.items]
        return ScoreReference.of(np.array(scores))

    return told
