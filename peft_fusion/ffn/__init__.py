"""What an FFN is: layouts as data, finding and selecting FFNs, reading and writing their weights."""

from .between import check_between
from .capture import Listener, capture, watch
from .find import FFN, across_neurons, base_of, features, find_ffns, places, unreadable_projections
from .layouts import LAYOUTS, FFNLayout, register_layout
from .originals import is_away, offload, require_originals, restore
from .run import find_activation, run_ffn
from .select import Selection, select_ffns, target_widths
from .storage import blank_like, check_can_leave, device_of, is_quantised
from .weights import check_finite, projection_tensors, read_ffn
from .width import ConfigWidth, config_widths

__all__ = [
    "FFN",
    "LAYOUTS",
    "ConfigWidth",
    "FFNLayout",
    "Listener",
    "Selection",
    "across_neurons",
    "base_of",
    "restore",
    "check_between",
    "check_can_leave",
    "check_finite",
    "config_widths",
    "device_of",
    "features",
    "find_activation",
    "find_ffns",
    "is_away",
    "is_quantised",
    "blank_like",
    "capture",
    "projection_tensors",
    "read_ffn",
    "register_layout",
    "require_originals",
    "run_ffn",
    "select_ffns",
    "offload",
    "places",
    "target_widths",
    "unreadable_projections",
    "watch",
]
