"""Layouts of FFNs as data: how each family of models names and stores its projections.

Adding a family is one entry here and one tiny model in `tests/architectures.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class FFNLayout:
    """Where the projections of an FFN are, seen from the module that holds them.

    Args:
        in_projections: path of each in-projection, the one that goes through the activation first.
        out_projection: path of the out-projection.
        stacked: whether the one in-projection holds gate and up, one after the other (its output is chunked).
        gate_last: whether the second half of these is the one that goes through the activation.
        activations: paths under which the activation may be found.
        across_neurons: modules or attributes which, where present and true, compute across the neurons between
            activation and out-projection (a norm over the hidden activations, say). Merging neurons would change
            what they compute, so such an FFN is refused.
    """

    in_projections: tuple[str, ...]
    out_projection: str
    stacked: bool = False
    gate_last: bool = False
    activations: tuple[str, ...] = ("act_fn", "activation_fn", "act", "activation")
    across_neurons: tuple[str, ...] = ("ffn_layernorm", "activation_sparsity")

    @property
    def paths(self) -> tuple[str, ...]:
        """All of its paths, the out-projection's last."""
        return (*self.in_projections, self.out_projection)

    @cached_property
    def out_attribute(self) -> str:
        """What the holder has to hold for the out-projection to be there."""
        return self.out_projection.partition(".")[0]

    @property
    def gated(self) -> bool:
        """Whether two in-projections are multiplied."""
        return self.stacked or len(self.in_projections) == 2

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """The halves of what belongs to a stacked in-projection's outputs, the one that is activated first."""
        halves = rows.chunk(2, dim)
        return halves[::-1] if self.gate_last else halves

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """What `split` takes apart along the first dimension."""
        return torch.cat(list(pieces)[::-1] if self.gate_last else list(pieces))

    def __str__(self) -> str:
        return f"{', '.join(self.in_projections)} -> {self.out_projection}"


# Tried in this order; the gated ones first, because a gated FFN also has the names of a plain one.
LAYOUTS: list[FFNLayout] = [
    FFNLayout(("gate_proj", "up_proj"), "down_proj"),  # Llama, Mistral, Qwen, Gemma, ...
    FFNLayout(("wi_0", "wi_1"), "wo"),  # T5 v1.1, mT5, UMT5
    FFNLayout(("w1", "w3"), "w2"),  # LFM2
    FFNLayout(("gate_up_proj",), "down_proj", stacked=True),  # Phi-3, GLM
    FFNLayout(("Wi",), "Wo", stacked=True),  # ModernBERT
    FFNLayout(("input_linear",), "output_linear", stacked=True),  # shared experts of Granite
    FFNLayout(("gate_proj.linear", "up_proj.linear"), "down_proj.linear"),  # the vision tower of Gemma 4
    FFNLayout(("up_proj",), "down_proj"),  # MPT, Nemotron
    FFNLayout(("wi",), "wo"),  # T5, Switch
    FFNLayout(
        ("intermediate.dense",), "output.dense", activations=("intermediate.intermediate_act_fn",)
    ),  # BERT, RoBERTa, ELECTRA, DeBERTa
    FFNLayout(
        ("intermediate_query.dense",), "output_query.dense", activations=("intermediate_query.intermediate_act_fn",)
    ),  # the Q-Former of BLIP-2
    FFNLayout(("intermediate",), "output"),  # ProphetNet
    FFNLayout(("c_fc",), "c_proj"),  # GPT-2 (Conv1D), GPT-Neo, GPT-BigCode, StarCoder2
    FFNLayout(("dense_h_to_4h",), "dense_4h_to_h", activations=("act", "gelu_impl")),  # GPT-NeoX, BLOOM, Falcon
    FFNLayout(("fc_in",), "fc_out"),  # GPT-J, CodeGen
    FFNLayout(("fc1",), "fc2"),  # OPT, Phi, BART, Whisper, ViT, CLIP
    FFNLayout(("fc1",), "fc2", stacked=True, gate_last=True),  # the decoder of Moonshine
    FFNLayout(("fc1.proj",), "fc2", stacked=True, gate_last=True, activations=("fc1.activation_fn",)),  # CLVP
    FFNLayout(("linear_fc1",), "linear_fc2"),  # the vision towers of Qwen3-VL and Qwen3.5
    FFNLayout(("linear1",), "linear2"),  # FastConformer (Parakeet, Canary)
    FFNLayout(("lin1",), "lin2"),  # DistilBERT
    FFNLayout(("ffn",), "ffn_output"),  # ALBERT
    FFNLayout(("intermediate_dense",), "output_dense", activations=("intermediate_act_fn",)),  # wav2vec 2.0
]

# The names under which a config states the width of the FFNs. Where several do, the first that fits an FFN is meant.
WIDTH_ATTRIBUTES = (
    "intermediate_size_mlp",  # Llama 4, whose `intermediate_size` is that of experts
    "t2u_encoder_ffn_dim",
    "t2u_decoder_ffn_dim",
    "speech_encoder_intermediate_size",
    "encoder_ffn_dim",
    "decoder_ffn_dim",
    "decoder_intermediate_size",
    "encoder_feedforward_dim",
    "encoder_dim_feedforward",
    "decoder_dim_feedforward",
    "dense_intermediate_size",
    "intermediate_size",
    "n_inner",
    "d_ff",
    "d_inner",
    "ffn_dim",
    "ffn_hidden_size",
    "feed_forward_size",
    "dim_feedforward",
    "hidden_dim",
    "mlp_dim",
)

# Parts of a model: an attribute that names one is about FFNs in it, and about no others.
PARTS = ("encoder", "decoder", "t2u", "speech", "resampler")

# Of routed experts, and of the FFNs beside them that every token goes through.
EXPERTS_WIDTH_ATTRIBUTES = ("moe_intermediate_size", "expert_ffn_hidden_size", "intermediate_size")
SHARED_WIDTH_ATTRIBUTES = (
    "shared_expert_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "shared_intermediate_size",
    "moe_intermediate_size",  # these once, or as many times as there are shared experts (DeepSeek, Aria)
    "intermediate_size",
)

# Attributes that make a config's width another one than it says -> what they have to be for it to mean what it says.
TAKEN_AT_ITS_WORD = {"block_auto_adjust_ff_dim": False}  # LFM2

# How many shared experts there are, in one FFN that is so many times as wide as one of them.
SHARED_COUNTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")

# The names under which a config states the width as a multiple of the dimension of the FFN's inputs.
MULTIPLE_ATTRIBUTES = (
    "mlp_ratio",  # DINOv2, Swin
    "intermediate_multiple_size",  # GPT-NeoX-Japanese
    "feedforward_mult",  # Granite Speech
    "ff_mult",
    "resampler_ff_mult",  # Evolla
    "aligner_ffn_mult",
    "ffn_expansion",
)


def register_layout(layout: FFNLayout) -> None:
    """Makes FFNs of a further layout known, ahead of the built-in ones.

    Args:
        layout: the new layout; a path is relative to the module that holds the FFN.

    Raises:
        ValueError: if the layout names no projection, or states `stacked` for two in-projections.
    """
    if not layout.in_projections or not layout.out_projection:
        raise ValueError(f"A layout needs in-projections and an out-projection, but got {layout!r}.")
    if len(layout.in_projections) > 2 or (layout.stacked and len(layout.in_projections) != 1):
        raise ValueError(
            f"A layout has one in-projection (stacked or not) or two (the gate first), but got {layout!r}."
        )
    if layout not in LAYOUTS:
        LAYOUTS.insert(0, layout)
