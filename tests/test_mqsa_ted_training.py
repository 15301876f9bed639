"""MQSA-TED in training: where it drops numbers out, what it starts from, and what its paper's config says."""

import math
from dataclasses import asdict

import pytest
import torch
from test_mqsa_ted import item_table, make_batch, make_model
from torch import nn

import ranking.mqsa_ted
from pipelines.shipped import CONFIGS
from pipelines.train_config import load_config
from ranking.mqsa_ted import MqsaTed, MqsaTedConfig

USERS = [[[2], [5, 3], [2], [3]], [[2], [9, 2]]]
FOLLOWING = [[4], [6]]


@pytest.mark.parametrize("heads", [1, 2])
def test_inputs_attention_both_layers_of_the_network_and_the_heads_of_ted_are_dropped_out(heads, monkeypatch):
    drawn, inner = [], ranking.mqsa_ted.dropout
    monkeypatch.setattr(
        ranking.mqsa_ted,
        "dropout",
        lambda x, p, generator: (drawn.append((tuple(x.shape), p)), inner(x, p, generator))[1],
    )
    model = make_model(dropout=0.25, heads=heads)
    batch = make_batch(USERS[:1], FOLLOWING[:1])
    model.loss(batch, torch.Generator())
    assert {p for _, p in drawn} == {0.0}  # none unless it is training
    drawn.clear()
    model.train().loss(batch, torch.Generator())
    T, G, D = 5, 4, 6  # five events in four baskets
    assert [shape for shape, _ in drawn] == [
        (1, T, D),  # the input
        *[(1, heads, G, T), (1, G, D), (1, G, D)] * 2,  # attention, inside the network, after it; two branches
        (sum(model.items.transitions.offsets.diff()[[2, 3, 5, 2, 3]] > 0), D),  # TED's heads
    ]
    assert {p for _, p in drawn} == {0.25}


def test_dropped_numbers_change_the_loss_and_its_two_parts_draw_apart():
    batch = make_batch(USERS, FOLLOWING)
    plain, dropped = make_model().train(), make_model(dropout=0.5).train()
    expected, found = (model.loss(batch, torch.Generator().manual_seed(1)).parts for model in (plain, dropped))
    again = dropped.loss(batch, torch.Generator().manual_seed(1)).parts
    for name in ("rec", "kd"):
        assert found[name] == again[name] != expected[name]


def test_a_fresh_model_starts_small_and_within_glorots_bound():
    torch.manual_seed(0)
    model = MqsaTed(MqsaTedConfig(width=32, window=200, blocks=2), item_table(400))
    assert model.item[:2].abs().sum() == 0
    assert float(model.item[2:].detach().std()) == pytest.approx(0.01, rel=0.05)  # 12,800 and 6,400 draws
    assert float(model.position.detach().std()) == pytest.approx(0.01, rel=0.05)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    assert len(layers) == 2 * 2 * 5
    bound = math.sqrt(6 / (32 + 32))
    for layer in layers:
        assert 0.98 * bound < float(layer.weight.detach().abs().max()) <= bound
        assert float(layer.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.1)
        assert layer.bias.abs().sum() == 0


def test_the_papers_config_has_the_settings_its_authors_published():
    """Section 7 of the specification: the authors' code on Beauty."""
    config = load_config(CONFIGS / "mqsa_ted_paper.toml")
    published = {
        "width": 64, "window": 50, "averaged": 3, "alpha": 0.5, "lambda_kd": 0.1, "tau": 0.1, "blocks": 1, "heads": 1,
        "dropout": 0.5, "kd_heads": 0, "unknown_rate": 0.0, "objective": "sequence",
    }  # fmt: skip
    options = asdict(config.model)
    assert {name: options[name] for name in published} == published
    assert options["softmax"] != "sampled"  # all items
    step = config.optimiser
    assert config.seed == 2023
    assert (step.kind, step.learning_rate, step.weight_decay) == ("adam", 1e-3, 1e-4)
    assert (config.batches.rows, config.batches.max_positives, config.batches.sequence_end) == (256, 1, "newest")
    assert (config.stop.epochs, config.stop.protocol, config.stop.metric) == (200, "leave_one_out", "ndcg_at_20")
