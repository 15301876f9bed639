"""A minute of the soak (`make soak` is the longer one): only counts are asserted, never times."""

import pytest
from benchmarks.soak import soak
from serving_world import publish_world

pytestmark = pytest.mark.filterwarnings("ignore::pydantic.PydanticDeprecatedSince20")  # Ray's own


@pytest.mark.slow
@pytest.mark.serve
@pytest.mark.timeout(1200)  # two minutes on a quiet machine
def test_load_with_swaps_and_kills_loses_no_request_and_no_event_not_even_when_all_is_killed(tmp_path):
    report = soak(publish_world(tmp_path / "world"), tmp_path / "state", seconds=60)
    assert report.errors == []
    assert (report.lost, report.lost_after_sigkill) == (0, 0)
    assert (report.kills, report.swaps >= 4) == (2, True)
    assert report.killed_at_once > 5  # Ray's own processes and two replicas
    assert min(report.requests[kind] for kind in ("recommend", "rank", "events", "history")) > 10
    assert report.acknowledged == report.requests["events"]
