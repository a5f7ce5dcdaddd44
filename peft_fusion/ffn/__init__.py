"""What an FFN is: layouts as data, finding and selecting FFNs, reading and writing their weights."""

from .between import check_between
from .capture import Listener, capture, watch
from .config_width import ConfigWidth, config_widths
from .every import AnyFFN, find_all, list_ffns, parameters_of, read_all
from .experts import Expert, Experts, find_experts
from .experts_layout import ExpertsLayout
from .experts_probe import check_experts
from .experts_run import ExpertListener, Routed, capture_experts, run_expert
from .experts_weights import (
    check_finite_experts,
    experts_like,
    experts_tensors,
    read_experts,
    scaled_tensors,
)
from .find import FFN, across_neurons, base_of, features, find_ffns, places, unreadable_projections
from .layers import LayerList
from .layouts import LAYOUTS, FFNLayout, register_layout
from .linear import by_projection, check_finite, find_activation, projection_tensors, read_ffn, run_ffn
from .one_by_one import OneFFN, activation_of, capture_each, device_of, like_of, networks_of, read_one
from .originals import is_away, offload, require_originals, restore
from .select import Selection, select_ffns, target_widths, with_own_width
from .stated import StatedWidths, state_widths
from .stock import MARK, on_meta, stock_class, stock_config
from .storage import blank_like, check_can_leave, dense_parameter, fetching_hook, is_quantised, keep_away
from .width import width_steps

__all__ = [
    "FFN",
    "LAYOUTS",
    "AnyFFN",
    "ConfigWidth",
    "Expert",
    "ExpertListener",
    "Experts",
    "ExpertsLayout",
    "FFNLayout",
    "MARK",
    "LayerList",
    "Listener",
    "OneFFN",
    "Routed",
    "Selection",
    "StatedWidths",
    "across_neurons",
    "activation_of",
    "base_of",
    "blank_like",
    "by_projection",
    "capture",
    "capture_each",
    "capture_experts",
    "check_between",
    "check_can_leave",
    "check_experts",
    "check_finite",
    "check_finite_experts",
    "config_widths",
    "dense_parameter",
    "device_of",
    "experts_like",
    "experts_tensors",
    "features",
    "fetching_hook",
    "find_activation",
    "find_activation",
    "find_all",
    "find_experts",
    "find_ffns",
    "is_away",
    "is_quantised",
    "keep_away",
    "like_of",
    "list_ffns",
    "networks_of",
    "offload",
    "on_meta",
    "parameters_of",
    "places",
    "projection_tensors",
    "read_all",
    "read_one",
    "read_experts",
    "read_ffn",
    "register_layout",
    "require_originals",
    "restore",
    "run_expert",
    "run_ffn",
    "scaled_tensors",
    "select_ffns",
    "state_widths",
    "stock_class",
    "stock_config",
    "target_widths",
    "unreadable_projections",
    "watch",
    "width_steps",
    "with_own_width",
]
