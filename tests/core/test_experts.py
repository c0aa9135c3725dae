"""Mixtures of experts as data: what is refused, how files hold them, how they are counted, and what roles mesh axes have for them."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from partinf.foundation.errors import InvalidInput
from partinf.hardware.slices import parse_slice
from partinf.layout import ExpertRole
from partinf.layout.files import layout_from_toml, layout_to_toml, make_layout
from partinf.model.config import Activation, ModelConfig
from partinf.model.kinds import Experts, FeedForward, Kind, Router, Score
from partinf.model.load import config_from_toml, config_to_toml, load_model_config
from partinf.model.weights import active_params, declare_layers, num_params
from partinf.plans import Plan

EACH = FeedForward(width=8, gated=True, activation=Activation.SILU, biases=())
ROUTERS = {
    "plain": Router(),
    "not renormalised": Router(renormalised=False),
    "of the chosen": Router(Score.SOFTMAX_OF_CHOSEN, bias=True),
    "in groups": Router(Score.SIGMOID, scale=2.5, correction=True, groups=4, chosen_groups=2),
    "by the greatest": Router(renormalised=False, scale=16.0, groups=4, chosen_groups=2, group_by_greatest=True),
}
KINDS = (Kind("dense", experts=False), Kind("mixed"))


def model_with(experts: Experts, **other: Any) -> ModelConfig:
    return ModelConfig("mixed", 2, 16, other.pop("ffn_dim", 0), 2, 2, 8, 256, experts=experts, **other)


@pytest.mark.parametrize("router", ROUTERS.values(), ids=ROUTERS)
def test_a_file_holds_what_it_was_written_from(router: Router) -> None:
    each = FeedForward(8, True, Activation.GELU_SIGMOID, ("w_in", "w_out"), clamp=7.0, up_offset=1.0)
    experts = Experts(8, 2, each, router, shared=12, shared_gate=True)
    model = model_with(experts, kinds=KINDS, prefix=("dense",), pattern=("mixed",), ffn_dim=24)
    assert config_from_toml(config_to_toml(model), "mixed") == model


def test_all_that_is_wrong_with_experts_is_named() -> None:
    with pytest.raises(InvalidInput) as caught:
        model_with(Experts(8, 9, EACH, shared_gate=True))
    assert "per_token = 9 of 8 experts" in str(caught.value)
    assert "shared_gate needs a shared feed-forward" in str(caught.value)
    for router, message in (
        (Router(groups=3), "8 experts do not fall into 3 groups"),
        (Router(groups=4, chosen_groups=5), "chosen_groups = 5 of 4"),
        (Router(groups=8, chosen_groups=1), "hold 1 experts; 2 are chosen"),
        (Router(Score.SOFTMAX_OF_CHOSEN, correction=True), "goes with neither"),
    ):
        with pytest.raises(InvalidInput, match=message):
            model_with(Experts(8, 2, EACH, router))
    with pytest.raises(InvalidInput, match="ffn_dim = 0, but layers of kind dense have no experts"):
        model_with(Experts(8, 2, EACH), kinds=KINDS, prefix=("dense",), pattern=("mixed",))


def test_counts_tell_active_from_all() -> None:
    model = model_with(Experts(8, 2, EACH, shared=4, shared_gate=True))
    (group,) = declare_layers(model)
    assert group.weights["wx_in"].shape == (8, 2, 8, 16)
    assert group.weights["wx_out"].shape == (8, 16, 8)
    assert num_params(model) - active_params(model) == 2 * 6 * 3 * 8 * 16


def test_layers_of_different_weights_are_counted_apart() -> None:
    model = model_with(Experts(8, 2, EACH), kinds=KINDS, prefix=("dense",), pattern=("mixed",), ffn_dim=24)
    groups = declare_layers(dataclasses.replace(model, num_layers=5))
    assert [(group.count, group.kinds, "wx_in" in group.weights) for group in groups] == [(1, (0,), False), (4, (1,), True)]


def test_roles_for_experts_are_read_and_written() -> None:
    layout = make_layout(
        {"x": "replica", "y": "ffn"},
        {"x": "batch", "y": "heads"},
        prefill_gather_experts=("x",),
        decode_dispatch="exchange",
        experts={"x": "expert", "y": "replica"},
    )
    assert layout_from_toml(layout_to_toml(layout), "file")[0] == layout
    assert layout.expert_token_axes(layout.decode) == ("y",)
    assert layout.expert_token_axes(layout.prefill) == ("x", "y")
    assert make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}).expert_axes(ExpertRole.FFN) == ("y",)


def test_wrong_roles_for_experts_are_named() -> None:
    experts = {"x": "expert", "y": "ffn"}
    with pytest.raises(InvalidInput) as caught:
        make_layout({"x": "stage", "y": "ffn"}, {"x": "none", "y": "heads"}, decode_gather_experts=("y",), experts=experts)
    assert "axis 'x' has role expert, and stage for other weights" in str(caught.value)
    assert "gathers experts over 'y'; axes that split both tokens and experts' matrices: none" in str(caught.value)
    with pytest.raises(InvalidInput, match="axis 'y' has no role"):
        make_layout({"x": "replica", "y": "ffn"}, {"x": "batch", "y": "heads"}, experts={"x": "expert"})


def test_a_layout_for_experts_is_refused_for_a_model_without_them() -> None:
    model = load_model_config("llama-125m")
    roles = {"x": "replica", "y": "ffn"}
    attention = {"x": "batch", "y": "heads"}
    layout = make_layout(roles, attention, decode_dispatch="exchange", experts={"x": "expert", "y": "ffn"})
    with pytest.raises(InvalidInput, match=r"layout: \[experts\], decode.dispatch: model llama-125m has no experts; leave this out"):
        Plan(model, parse_slice("cpu:2x2"), layout)
    assert Plan(model, parse_slice("cpu:2x2"), make_layout(roles, attention)).layout.experts == ()
