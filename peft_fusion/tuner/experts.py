"""The layer that stands in for the routed experts of a layer, and the narrow experts that an adapter trains."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.func import functional_call

from ..ffn import ExpertsLayout, experts_like, is_away, scaled_tensors
from .layer import FusionLayer
from .narrow import Narrow


class NarrowExperts(Narrow):
    """The narrow versions of a layer's experts: trainable weights, and fixed scales of their neurons.

    The host's own code runs on them, whichever implementation of it the model's config chooses. That code multiplies
    by weights and leaves no place for a scale between them, so that it is given weights with the scales multiplied
    in, made anew in every call; what an optimizer moves are the weights without them.

    Args:
        tensors: a parameter's name -> its value, as the host stores it.
        layout: how it does.
        scale: of the hidden activations, (experts, neurons), or None for 1.
        in_scale: of what the in-projections put out, (experts, outputs), or None for 1.
        original: the wide experts, whose code and settings are shared.
        width: the neurons of each narrow expert.
    """

    in_scale: Tensor | None

    def __init__(
        self,
        tensors: Mapping[str, Tensor],
        layout: ExpertsLayout,
        scale: Tensor | None,
        in_scale: Tensor | None,
        original: nn.Module,
        width: int,
    ) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(tensor))
        self.register_buffer("scale", scale)
        self.register_buffer("in_scale", in_scale)
        self.layout, self.width = layout, width
        some = next(iter(tensors.values()))
        self.shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        self.shapes |= {"scale": (len(some), width), "in_scale": (len(some), layout.outputs(width))}
        blanks = {name: some.new_empty(0) for name in tensors}
        self._code = (experts_like(original, blanks, width),)  # in a tuple, for it is not a submodule

    def forward(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        """What the host's experts give for these arguments, in the input's dtype.

        Args:
            hidden: tensor of shape (tokens, in_dim).
            args: which experts each token goes to, and how they are weighted; see the host.
            kwargs: the same by name.
        """
        tensors = {name: tensor.to(hidden.dtype) for name, tensor in self.folded().items()}
        return functional_call(self._code[0], tensors, (hidden, *args), kwargs)

    def folded(self) -> dict[str, Tensor]:
        """The parameters of plain experts with the same outputs, the scales multiplied in."""
        return scaled_tensors(dict(self.named_parameters()), self.layout, self.scale, self.in_scale)

    @property
    def scaled(self) -> set[bool]:
        return {is_out for is_out, scale in ((True, self.scale), (False, self.in_scale)) if scale is not None}


class ExpertsLayer(FusionLayer):
    """The routed experts of a layer beneath any number of narrow versions of them, one an adapter."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the original experts or the active narrow ones give for these arguments."""
        hidden, *others = args or (kwargs.pop("hidden_states"),)
        narrow = self.computing_narrow()
        return (
            self.computing_original()(hidden, *others, **kwargs)
            if narrow is None
            else narrow(hidden, *others, **kwargs)
        )

    def follow(self) -> None:
        """Takes originals that are set aside to where, and into the precision in which, the model is by now."""
        if self.merged:
            now = next(self.base_layer.parameters())
            self._wide[-1].to(now.device, now.dtype)

    def _folded(self, adapter_name: str) -> list[Tensor]:
        return list(self._narrow_experts(adapter_name).folded().values())

    def plain(self, adapter_name: str) -> nn.Module:
        narrow, wide = self._narrow_experts(adapter_name), self.base_layer
        like = {name: parameter for name, parameter in wide.named_parameters(recurse=False)}
        tensors = {name: t.detach().to(like[name], copy=True).contiguous() for name, t in narrow.folded().items()}
        trains = any(parameter.requires_grad for parameter in like.values()) and not is_away(wide)
        return experts_like(wide, tensors, narrow.width, trains)

    def _narrow_experts(self, adapter_name: str) -> NarrowExperts:
        narrow = self.mlp_fusion_narrow[adapter_name]
        assert isinstance(narrow, NarrowExperts)
        return narrow
