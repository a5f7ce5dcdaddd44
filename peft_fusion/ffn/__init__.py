"""What an FFN is: layouts as data, finding and selecting FFNs, reading and writing their weights."""

from .between import check_between
from .capture import Listener, capture, watch
from .find import FFN, across_neurons, base_of, features, find_ffns, places, unreadable_projections
from .layers import LayerList
from .layouts import LAYOUTS, FFNLayout, register_layout
from .linear import by_projection, check_finite, find_activation, projection_tensors, read_ffn, run_ffn
from .originals import is_away, offload, require_originals, restore
from .select import Selection, select_ffns, target_widths, with_own_width
from .stated import MARK, StatedWidths, on_meta, state_widths, stock_class, stock_config
from .storage import blank_like, check_can_leave, device_of, fetching_hook, is_quantised, keep_away
from .width import ConfigWidth, config_widths

__all__ = [
    "FFN",
    "LAYOUTS",
    "ConfigWidth",
    "FFNLayout",
    "MARK",
    "LayerList",
    "Listener",
    "Selection",
    "StatedWidths",
    "across_neurons",
    "base_of",
    "blank_like",
    "by_projection",
    "capture",
    "check_between",
    "check_can_leave",
    "check_finite",
    "config_widths",
    "device_of",
    "features",
    "fetching_hook",
    "find_activation",
    "find_ffns",
    "is_away",
    "is_quantised",
    "keep_away",
    "offload",
    "on_meta",
    "places",
    "projection_tensors",
    "read_ffn",
    "register_layout",
    "require_originals",
    "restore",
    "run_ffn",
    "select_ffns",
    "state_widths",
    "stock_class",
    "stock_config",
    "target_widths",
    "unreadable_projections",
    "watch",
    "with_own_width",
]
