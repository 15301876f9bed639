"""The product that picks its library, and the one whose digits do not show the shape of a batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import ranking.products
from ranking.layers import AttentionNetwork, ScoringHead, search
from ranking.products import FEWEST_ROWS, fast_linear, product, steady


@pytest.mark.parametrize("shape", [(3, 5, 7), (130, 64, 33), (1, 1, 1), (0, 4, 3), (4, 0, 3), (4, 3, 0)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("strided", [False, True])
def test_a_product_is_the_product(shape, dtype, strided):
    m, k, n = shape
    x, w = torch.randn(m, k, dtype=dtype), torch.randn(n, k, dtype=dtype)
    if strided:
        w = w.T.contiguous().T
    found = product(x, w)
    torch.testing.assert_close(found.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
    assert found.dtype == dtype
    assert torch.equal(found, product(x, w))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 130), st.integers(1, 40), st.integers(1, 40), st.booleans())
def test_a_number_is_the_same_to_the_last_digit_in_any_company(seed, k, m, n, onednn):
    draws = torch.Generator().manual_seed(seed)
    x, w = torch.randn(60, k, generator=draws), torch.randn(60, k, generator=draws)
    with pytest.MonkeyPatch.context() as patch:
        if not onednn:
            patch.setattr(ranking.products, "_is_steady", lambda: False)
        whole = steady(x, w)
        torch.testing.assert_close(whole.double(), x.double() @ w.double().T, rtol=1e-5, atol=1e-5)
        assert torch.equal(steady(x[7 : 7 + m], w[60 - n :]), whole[7 : 7 + m, 60 - n :])


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 80), st.integers(2, 40), st.integers(2, 40))
def test_a_number_does_not_depend_on_how_its_factors_lie_in_memory(seed, k, m, n):
    draws = torch.Generator().manual_seed(seed)
    x, w = torch.randn(m, k, generator=draws), torch.randn(n, k, generator=draws)
    apart = [torch.randn(2 * len(one), k + 5, generator=draws) for one in (x, w)]
    for place, one in zip(apart, (x, w), strict=True):
        place[::2, :k] = one
    ours, theirs = (place[::2, :k] for place in apart)
    assert torch.equal(product(ours, theirs), product(x, w))
    assert torch.equal(product(ours.T.contiguous().T, theirs.T.contiguous().T), product(x, w))


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=0, max_size=3),
    st.integers(1, 70),
    st.integers(1, 70),
    st.booleans(),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
)
def test_a_linear_layer_gives_through_onednn_what_it_gives_by_itself(shape, k, n, bias, dtype):
    layer = torch.nn.Linear(k, n, bias, dtype=dtype)
    for x in (torch.randn(*shape, k, dtype=dtype), torch.randn(*shape, 2 * k, dtype=dtype)[..., ::2]):
        with torch.inference_mode():
            expected = layer(x)
            with fast_linear(FEWEST_ROWS):
                found = layer(x)
        assert found.shape == expected.shape
        assert found.dtype == dtype
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_linear_layers_of_any_module_are_asked_of_onednn_and_only_within(monkeypatch):
    asked = []
    onednn = ranking.products._ONEDNN
    monkeypatch.setattr(ranking.products, "_ONEDNN", lambda *given: asked.append(1) or onednn(*given))
    module = torch.nn.TransformerEncoderLayer(8, 2, batch_first=True, dropout=0.0).train()  # no fast path of its own
    x = torch.randn(2, 30, 8)
    with torch.no_grad():
        with fast_linear(60):
            torch.testing.assert_close(module(x), module(x), rtol=0, atol=0)
        inside = len(asked)
        with fast_linear(FEWEST_ROWS - 1):
            module(x)
        module(x)
    assert inside >= 4
    assert len(asked) == inside


def test_a_head_and_an_attention_score_a_row_alone_as_among_others():
    torch.manual_seed(0)
    head, network = ScoringHead(40).eval(), AttentionNetwork(40, 36).eval()
    head.norm.running_mean = torch.randn(40)
    head.norm.running_var = torch.rand(40) + 0.5
    rows, events = torch.randn(2, 90, 40), torch.randn(2, 70, 40)
    logits, weights = head(rows[0]), network(rows, events)
    for c in (0, 41, 89):
        assert torch.equal(head(rows[0, c : c + 1]), logits[c : c + 1])
        assert torch.equal(network(rows[:, c : c + 1], events), weights[:, c : c + 1])
    for more in (1, 9, 58, 64, 200):
        longer = torch.cat([torch.zeros(2, more, 40), events], 1)
        assert torch.equal(network(rows[1:], longer[1:])[..., more:], weights[1:])
    torch.testing.assert_close(head.layers(head.norm(rows[0])).squeeze(-1), logits, rtol=1e-5, atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 12), st.integers(1, 30), st.integers(0, 4))
def test_a_search_in_single_precision_finds_what_one_in_double_does(seed, k, length, distinct):
    draws = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, length, generator=draws)
    if distinct:
        scores = (scores * distinct).round() * 0.5  # ties, and zeros of both signs
    mask = torch.arange(length) >= torch.randint(0, length + 1, (2, 1), generator=draws)
    found = [
        {(b, c, int(s)) for b in range(2) for c in range(3) for s in index[b, c][real[b, c]]}
        for index, real in (search(scores, mask, k), search(scores.double(), mask, k))
    ]
    assert found[0] == found[1]
