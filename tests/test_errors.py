import copy

from recsys.errors import RequestError


def test_a_refusal_crosses_processes_whole():
    refused = RequestError(413, "too_many_candidates", "20000 items to rank")
    other = copy.copy(refused)  # by __reduce__, as Ray sends it
    assert (other.status, other.code, str(other)) == (413, "too_many_candidates", "20000 items to rank")
