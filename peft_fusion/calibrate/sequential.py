"""The sequential refit: layer after layer, a narrow FFN makes up for what those before it have changed.

A narrow FFN is first fitted to what the original puts out on the original's inputs. In the narrow model others reach
it, and what the FFNs before it have changed is passed on beside it. With h what a layer passes on in the original, h'
in the narrow model, g the narrow hidden activations there and B the out-projection, of which the layer adds m times
B^T g,

    minimise over the change of B:   E |h - h' - m (change of B)^T g|^2 / |h|^2

for what comes next is a norm. Where a layer adds up in front of a norm and ends with that (BERT), h is the sum. B is
shrunk towards the fit there was, by the ridge and the held-out tokens of `fusing.refit`. FFNs take turns in their
order, each with those before it as they have become. Both models run layer by layer: what goes into a layer is kept, so
that all of it takes one pass of the original and two of the narrow model, whatever the number of layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..ffn import activation_of, capture, device_of, networks_of
from ..fusing.activations import Activation, hidden_activations, in_chunks
from ..fusing.held_out import HeldOut
from ..fusing.moments import MomentSums
from ..fusing.precision import exact_products
from ..fusing.refit import Problem, refit, with_fit
from ..fusing.statistics import SAMPLE_TOKENS
from ..fusing.weights import NarrowFFN
from ..observe import ranks
from ..observe.batches import Batch, Positions, batch_size, unlabelled
from ..observe.networks import Network, UnusableActivations
from ..observe.shared_layers import in_one_list
from ..observe.stretches import Stretches
from ..observe.sums import added_up
from ..progress import progress
from .collect import add_up_moments
from .inputs import HELD_OUT, Inputs
from .sequence_steps import Step, steps_of
from .stand_ins import standing_in

__all__ = ["Step", "refit_in_sequence", "steps_of"]


def refit_in_sequence(network: Network, steps: Sequence[Step], narrow: dict[str, NarrowFFN], inputs: Inputs) -> None:
    """Refits narrow FFNs to what the others in the narrow model leave to them; see above.

    Memory: what goes into one layer, of all inputs and both models, in the model's dtype, and the original's sums where
    a norm follows; of one FFN 16 * width ** 2 bytes of the narrow width.

    Args:
        network: the original model, running, and all planned FFNs.
        steps: the dense FFNs among them that become narrower, as `steps_of` found them.
        narrow: name of a dense FFN or of an expert -> its narrow one; the refitted ones take their places.
        inputs: what the model is calibrated on.

    Raises:
        UnusableActivations: if activations of the narrow model are not finite.
    """
    models = _BothModels(network, steps, inputs)
    for step in progress(steps, "Refitting in sequence"):
        seen = _Seen(step, narrow[step.ffn.name])
        ranks.together(partial(models.look_at, step, narrow, seen))
        narrow[step.ffn.name] = seen.refitted()


class _BothModels:
    """The original and the narrow model, each stopped in front of the next layer."""

    def __init__(self, network: Network, steps: Sequence[Step], inputs: Inputs) -> None:
        self.network = network
        self.batches = [unlabelled(batch, network.is_encoder_decoder) for batch in inputs.batches]
        layers, numbers = in_one_list(network.model, [ffn.projection_names[-1] for ffn in network.ffns])
        self.stretches, self.layers_of = Stretches(layers), list(zip(network.ffns, numbers, strict=True))
        nothing: list[Any] = [None] * len(self.batches)
        self.original, self.original_start = [*nothing], 0  # of each batch what the layer before the start puts out
        self.sums: list[Any] = [*nothing]  # and what it has added up
        self.narrow, self.narrow_start = [*nothing], 0

    def look_at(self, step: Step, narrow: Mapping[str, NarrowFFN], seen: _Seen) -> None:
        """Runs both models over the inputs to the end of an FFN's layer, and tells of it there."""
        between = [f for f, layer in self.layers_of if self.narrow_start <= layer <= step.layer]
        replaced = self.network.of([f for f in between if narrow[networks_of(f)[0].name].weights.width < f.width])
        first = 0
        for number, batch in enumerate(self.batches):
            wanted = self._run_original(number, batch, step)
            inputs, found = self._run_narrow(number, batch, step, replaced, narrow)
            valid, sequence = Positions(batch, self.network.is_encoder_decoder).of(step.ffn.name, inputs)
            held_out = (first + sequence) % HELD_OUT == HELD_OUT - 1
            seen.add(inputs, wanted.float(), found.float(), valid & ~held_out, valid & held_out)
            first += batch_size(batch)
        self.original_start = max(self.original_start, step.layer + 1)
        self.narrow_start = step.layer

    def _run_original(self, number: int, batch: Batch, step: Step) -> Tensor:
        """What a layer adds up; that of a second FFN in the same layer is known."""
        if self.original_start <= step.layer:
            with (
                torch.no_grad(),
                added_up(step.norm) as sums,
                self.stretches.running(self.original_start, step.layer + 1, self.original[number]) as noted,
            ):
                self.network(batch, logits=False)
            self.original[number] = noted[step.layer]
            self.sums[number] = sums(noted[step.layer])
        found: Tensor = self.sums[number]
        return found

    def _run_narrow(
        self, number: int, batch: Batch, step: Step, replaced: Network, narrow: Mapping[str, NarrowFFN]
    ) -> tuple[Tensor, Tensor]:
        """What goes into an FFN, and what its layer adds up; in front of the layer the next pass will start."""
        inputs: list[Tensor] = []
        with (
            torch.no_grad(),
            standing_in(replaced, narrow),
            capture([step.ffn], inputs=lambda name, x: inputs.append(x)),
            added_up(step.norm) as sums,
            self.stretches.running(self.narrow_start, step.layer + 1, self.narrow[number], [step.layer - 1]) as noted,
        ):
            self.network(batch, logits=False)
        if step.layer > self.narrow_start:
            self.narrow[number] = noted[step.layer - 1]
        return inputs[0], sums(noted[step.layer])


class _Seen:
    """What is seen of an FFN in the narrow model, on one rank."""

    def __init__(self, step: Step, narrow: NarrowFFN) -> None:
        self.step, self.narrow = step, narrow
        self.activation: Activation = activation_of(step.ffn)
        out_weight = narrow.weights.out_weight
        self.sums = MomentSums(narrow.weights.width, out_weight.shape[1], device_of(step.ffn))
        self.held_out: list[tuple[Tensor, Tensor, Tensor]] = []
        self.room = -(-SAMPLE_TOKENS // ranks.world())

    def add(self, inputs: Tensor, wanted: Tensor, found: Tensor, to_fit: Tensor, held_out: Tensor) -> None:
        """Adds the tokens of a batch.

        Args:
            inputs: what goes into the FFN, shape (..., in_dim).
            wanted: what its layer adds up in the original, shape (..., out_dim), float32.
            found: what it adds up in the narrow model.
            to_fit: which of the tokens are to be fitted to, in CPU memory.
            held_out: which are held out.
        """
        tokens = [values.reshape(-1, values.shape[-1]).to(inputs.device) for values in (inputs, wanted, found)]
        numbers = [chosen.nonzero().squeeze(1).to(inputs.device, non_blocking=True) for chosen in (to_fit, held_out)]
        with exact_products(inputs.device):
            for chunk in in_chunks(*(values[numbers[0]] for values in tokens)):
                self.sums.add(*self._problem(*chunk))
            kept = numbers[1][: self.room]
            if len(kept):
                self.held_out.append(self._problem(*(values[kept] for values in tokens)))
                self.room -= len(kept)

    def _problem(self, inputs: Tensor, wanted: Tensor, found: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """What goes into the out-projection, what it should make of it (no bias), and how much a token counts."""
        hidden = hidden_activations(self.narrow, self.activation, inputs)
        outputs = hidden @ self.narrow.weights.out_weight.to(hidden)
        size = wanted.square().mean(1).clamp(min=1e-30)
        return hidden, outputs + (wanted - found) / self.step.factor, 1 / size

    def refitted(self) -> NarrowFFN:
        """The narrow FFN, fitted to what all ranks have seen."""
        add_up_moments(self.sums)
        held_out = [ranks.joined_over_ranks(torch.cat(parts)) for parts in zip(*self.held_out, strict=True)]
        if not bool(torch.isfinite(self.sums.gram).all() & torch.isfinite(self.sums.cross).all()):
            raise UnusableActivations(
                f"At the FFN {self.step.ffn.name!r} activations of the narrow model hold NaN or infinite values. Check "
                'the model in this dtype, or leave `refit` at "ridge".'
            )
        weights, moments = self.narrow.weights, self.sums.moments()
        moments = moments if weights.out_bias is not None else moments.about_zero()
        with exact_products(self.sums.gram.device):
            fit = refit(Problem(moments, weights.out_weight.float(), HeldOut.of(*held_out)))
        fitted = with_fit(weights, fit, None)
        shared = ranks.from_rank(0, [t for t in (fitted.out_weight, fitted.out_bias) if t is not None])
        out_weight, *bias = (tensor.to(weights.out_weight.dtype) for tensor in shared)
        return replace(self.narrow, weights=replace(fitted, out_weight=out_weight, out_bias=bias[0] if bias else None))
