"""`calibrate`: narrow FFNs that do on real inputs what the original ones do.

    gradients -> the metric;  then group of FFNs by group: statistics -> narrow FFNs, and the statistics are freed;
    then, with all narrow FFNs in place: gradients -> scales

What stays is the narrow FFNs alone. They wait on the model for `get_peft_model`, or take the place of an adapter's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..ffn import require_originals, width_steps, with_own_width
from ..fusing.settle import check_calibratable
from ..observe.batches import Batch
from ..observe.networks import Network, fusion_layers
from ..observe.own_inputs import OWN_LENGTH, check_unused
from ..observe.sampling import prefix_of
from ..observe.unwrap import unwrapped
from ..tuner.config import FusionConfig
from ..tuner.handover import Calibrated, Fingerprint, hand_over
from ..tuner.plan import AnyPlanned, plan_ffns
from ..tuner.recipe import asked_recipe
from .in_place import Adapter, adapter_of
from .inputs import Inputs
from .memory import most_at_once
from .narrowing import Narrowing

__all__ = ["calibrate"]


def calibrate(
    model: nn.Module,
    config: FusionConfig | None = None,
    dataloader: Iterable[Batch] | None = None,
    *,
    sequences: int | None = None,
    length: int | None = None,
    ffns_per_pass: int | None = None,
    memory: int | None = None,
    own_text: str | Path | None = None,
    tokenizer: Any = None,
) -> None:
    """Makes narrow FFNs from what goes through the original ones; no labels are needed.

    With `allocation="fisher"` it first decides how wide each is to be: one elimination per FFN tells how its error
    grows as neurons go, and one backward pass a sequence how much that counts once all FFNs are narrow. That takes the
    same statistics once more where FFNs are worked on in groups.

    With a configuration they wait on the model until `get_peft_model(model, config)` installs them. Without one the
    model must have a fusion adapter, whose narrow weights are made anew in place: for trainers that make the adapter
    themselves. An optimizer keeps its references, but what the adapter had learnt is gone.

    The best inputs are those that the model will be fine-tuned on, then text that resembles them, then what a causal LM
    samples itself, then random tokens. 128 sequences suffice. Padding is left out where `attention_mask` says so.

    Neurons are compared by what the model's predictions would show of them, and scales are fitted to its tangent
    kernel; both take some backward passes over short sequences. A model that has no gradients is fused without them.

    Beyond the model and its narrow FFNs it takes, for each FFN of a group, 4 * width ** 2 bytes, 2048 inputs in the
    model's dtype, 4 * out_dim ** 2 bytes, and later 1024 inputs and gradients; for the one that is being made 3.5 times
    4 * width ** 2 bytes and its weights in float32. `memory` bounds all of that. On top come the activations of a
    forward pass over a batch, and of a backward pass over 64 tokens (over more where that takes less than a sixteenth
    of what the weights take), layer by layer, with their logits. The batches are kept in memory. All of it is freed at
    the end.

    With `refit="sequential"` out-projections are then fitted once more, layer after layer, to make up for what the
    narrow FFNs before them have changed: one more pass of the original over all inputs and two of the narrow model, and
    memory for what goes into one layer, of all inputs and both models.

    Of routed experts each is an FFN by itself, which sees only the tokens that are routed to it, by the square of the
    router's weight; all of a layer get one width, a multiple of 8. An expert with too few tokens takes the metric of
    all experts of its layer, or is fused by its weights; a warning, and what is recorded of the calibration, say which.

    Where torch.distributed is initialised, every rank gives its share of the data (its own `dataloader`), statistics
    and gradients are added up, and all ranks end with the same narrow FFNs.

    Args:
        model: the model to be fused, with or without adapters, wrapped or not.
        config: the configuration it will be fused with; None: renew the active fusion adapter in place.
        dataloader: batches as `Trainer` gives them to the model: mappings of tensors. None: the model makes its own
            inputs, a causal LM by sampling text, another by random tokens.
        sequences: how many sequences to use at most, on all ranks together; every fourth is held out to choose by.
            None: 128 of the data loader's, or 512 of the model's own.
        length: tokens in each of the model's own sequences. None: 64.
        ffns_per_pass: how many FFNs to work on at once, all experts of a layer as one: less memory, more passes. None:
            all of them.
        memory: bytes that all of this may take, on device and host together, instead of `ffns_per_pass`; the
            activations of the passes come on top (see `calibrate.memory`).
        own_text: a `.safetensors` file that the model's own inputs are written to, or read from if it exists.
        tokenizer: the model's; own text then begins as its texts do. None: half of it with the start token that the
            model's config names, half without.

    Raises:
        ValueError: if the configuration does not fit the model or cannot be calibrated, there is no adapter to renew,
            `memory` does not suffice, a setting is not of what is given, each process holds a part of the weights,
            there are too few batches, the model cannot take one, or activations are not finite.
        RuntimeError: if the original weights were dropped.
        TypeError: if `config` is no `FusionConfig`.
    """
    _check_numbers(sequences=sequences, length=length, ffns_per_pass=ffns_per_pass, memory=memory)
    if ffns_per_pass is not None and memory is not None:
        raise ValueError("`memory` says how many FFNs are worked on at once, and so does `ffns_per_pass`; give one.")
    check_unused({"own_text": own_text, "length": length, "tokenizer": tokenizer}, dataloader, "dataloader")
    prefix = prefix_of(tokenizer)
    host = unwrapped(model)
    adapter = None if config is not None else adapter_of(host)
    plan, config = _plan(host, config, adapter)
    network = Network(host, [p.ffn for p in plan], fused=False)
    size = ffns_per_pass or len(plan) if memory is None else most_at_once((p.ffn for p in plan), memory)
    fingerprints = {p.ffn.name: Fingerprint.of(p) for p in plan}
    with network.running():
        inputs = Inputs.of(network, dataloader, sequences, length or OWN_LENGTH, config.seed, own_text, prefix)
        narrowing = Narrowing(network, plan, inputs, asked_recipe(config), size)
        if config.allocation == "fisher" and adapter is None:
            fixed = with_own_width((p.ffn for p in plan), config.width_pattern)
            multiple_of = math.lcm(*width_steps(host, [p.ffn for p in plan], config.multiple_of).values())
            narrowing.allocate(lambda widths: plan_ffns(host, config, widths), multiple_of, fixed)
        narrow = narrowing.narrow_ffns()
    if adapter is None:
        budget = {p.ffn.name: p.width for p in plan} if config.allocation == "fisher" else None
        hand_over(host, Calibrated(narrow, fingerprints, asked_recipe(config), narrowing.recipe, budget))
    else:
        adapter.renew(plan, narrow, narrowing.recipe)


def _plan(
    host: nn.Module, config: FusionConfig | None, adapter: Adapter | None
) -> tuple[list[AnyPlanned], FusionConfig]:
    """What to narrow, by which settings; refuses what cannot be, before any work."""
    if adapter is not None:
        plan, config = adapter.plan(host), adapter.config
    elif isinstance(config, FusionConfig):
        plan = plan_ffns(host, config)
    else:
        raise TypeError(
            f"`config` must be a `FusionConfig`, but got {type(config).__name__}. Batches go in `dataloader=`; "
            "without a configuration, `calibrate(model, dataloader=batches)` renews the model's fusion adapter."
        )
    check_calibratable(asked_recipe(config))
    for module in (module for p in plan for module in p.ffn.base_projections):
        require_originals(module)
    for layer in fusion_layers(host):
        require_originals(layer.original_layer)
    return plan, config


def _check_numbers(**numbers: Any) -> None:
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
            raise ValueError(f"`{name}` must be an integer of at least 1, but got {value!r}.")
