"""`fidelity`: how close a fused model is to its original, in its outputs and in how it would train."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from ..ffn import FFN, AnyFFN
from ..observe.batches import Batch, check_batch, single_sequences, unlabelled
from ..observe.networks import Network, active_narrow, shown
from ..observe.pair import pair
from ..observe.projection import Function, random_projection
from ..progress import progress
from ..tuner.experts import NarrowExperts
from ..tuner.layer import FusionLayer
from ..tuner.narrow import NarrowOutProjection
from .errors import NOT_FORMED, FFNFidelity, KernelError, NTKError, OutputError
from .ntk import Kernels, tangent_kernels
from .outputs import OutputErrors
from .report import Fidelity

__all__ = ["FFNFidelity", "Fidelity", "KernelError", "NTKError", "OutputError", "fidelity"]


def fidelity(
    model: nn.Module,
    dataloader: Iterable[Batch],
    *,
    reference: nn.Module | None = None,
    max_batches: int | None = None,
    sequences: int = 128,
    function: Function | None = None,
    memory: int = 2**28,
    seed: int = 0,
) -> Fidelity:
    """Compares a fused model with its original: outputs, tangent kernels, parameters, FLOPs (paper, section 4).

    The original is the same model with its original FFNs; everything else, a trained head say, is left as it is,
    so that what differs is the FFNs. Their outputs are compared on the original's inputs to each of them.

    The kernels are those of f, one number a sequence, over the weights and biases of the FFNs: of the fused model
    over its narrow ones, with the standalone scale in the forward; of the original over its wide ones. By default f
    is a fixed random projection of what the model puts out, averaged over a sequence's tokens: of the logits, in a
    direction that softmax can see (it sums to 0; of two classes it is the difference), or of a feature model's last
    hidden states. The sum of the logits would be what no cross-entropy depends on.

    No gradient is ever held whole: beyond the models and one sequence's backward it takes about `memory`, 200 MB of
    work space, and four (sequences, sequences) float64 kernels a projection. The inputs and outputs of the FFNs for
    one batch come on top during the output errors.

    Args:
        model: a model with an active fusion adapter, or one that is narrow for good (then with a `reference`).
        dataloader: batches as the model takes them, mappings of tensors whose first dimension counts the sequences.
        reference: the original model; None: `model` with its original FFNs.
        max_batches: how many batches to take; None for all.
        sequences: how many sequences (the first ones) the kernels are over.
        function: f: maps the model's output and a batch of one sequence to a tensor of one element, differentiably.
        memory: bytes for the activations and gradients kept for the kernels. Less memory means more passes, down to
            one FFN a pass: for that, 4 bytes * tokens of all sequences * (sizes in and out of its projections).
        seed: of the random projection.

    Returns:
        The report. Of routed experts it has widths and output errors, of those of a layer together. Model, reference,
        their gradients and adapters are left as they were, after an error as well.

    Raises:
        ValueError: if there is no original to compare with, the dataloader yields nothing, or a batch is not what
            the model takes.
    """
    for name, value in (("max_batches", max_batches), ("sequences", sequences)):
        if value is not None and value < 1:
            raise ValueError(f"`{name}` must be at least 1, but got {value}.")
    original, fused = pair(model, reference)
    errors, singles, first, count = OutputErrors(original, fused), list[Batch](), None, 0
    for batch in progress(_batches(dataloader, max_batches, fused), "Outputs"):
        first, count = first or batch, count + 1
        errors.add(batch)
        singles += islice(single_sequences(batch), sequences - len(singles))
    if first is None:
        raise ValueError("The dataloader yields no batch: give one that can be iterated anew, with at least one batch.")
    function = function or random_projection(fused, seed)
    kernels = [tangent_kernels(network, singles, function, memory) for network in (original, fused)]
    ffns = [_ffn_fidelity(*ffns, errors, *kernels) for ffns in zip(original.ffns, fused.ffns, strict=True)]
    whole = [_added_up(of_network, len(singles)) for of_network in kernels]
    return Fidelity(
        ffns=ffns,
        hidden_states=errors.hidden_states.error(),
        outputs=errors.outputs.error(),
        divergence=errors.predictions.mean(),
        ntk=_ntk_error(*whole),
        batches=count,
        sequences=len(singles),
        parameters=(_parameters(original), _parameters(fused)),
        flops=(_flops(original, first), _flops(fused, first)),
        kernels={"adam": (whole[0].adam, whole[1].adam), "sgd": (whole[0].sgd, whole[1].sgd)},
    )


def _batches(dataloader: Iterable[Batch], limit: int | None, network: Network) -> Iterator[Batch]:
    """So many batches, or all, without labels that nothing needs."""
    for batch in islice(dataloader, limit):
        check_batch(batch)
        yield unlabelled(batch, network.is_encoder_decoder)


def _added_up(kernels: Mapping[tuple[str, str], Kernels], sequences: int) -> Kernels:
    """The kernels over all weights; NaN where there are none, for only routed experts were compared."""
    if not kernels:
        nothing = torch.full((sequences, sequences), torch.nan, dtype=torch.float64)
        return Kernels(nothing, nothing)
    first, *others = kernels.values()
    return sum(others, first)


def _ffn_fidelity(original: AnyFFN, fused: AnyFFN, errors: OutputErrors, before: Any, after: Any) -> FFNFidelity:
    """The figures of one FFN."""
    output = errors.ffns[fused.name].error()
    if not isinstance(fused, FFN):
        return FFNFidelity(fused.name, original.width, _narrow_width(fused), output, NOT_FORMED, {})
    paths = [path for name, path in after if name == fused.name]
    pairs = {path: (before[original.name, path], after[fused.name, path]) for path in paths}
    totals: Sequence[Kernels] = [sum(parts[1:], parts[0]) for parts in zip(*pairs.values(), strict=True)]
    matrices = {path: _ntk_error(*kernels) for path, kernels in pairs.items()}
    return FFNFidelity(fused.name, original.width, _narrow_width(fused), output, _ntk_error(*totals), matrices)


def _narrow_width(fused: AnyFFN) -> int:
    """An FFN's neurons now."""
    out = fused.projections[-1]
    narrow = active_narrow(out) if isinstance(out, FusionLayer) else None
    if isinstance(narrow, NarrowExperts):
        return narrow.width
    return narrow.weight.shape[1] if isinstance(narrow, NarrowOutProjection) else fused.width


def _ntk_error(original: Kernels, fused: Kernels) -> NTKError:
    return NTKError(KernelError.between(fused.adam, original.adam), KernelError.between(fused.sgd, original.sgd))


def _parameters(network: Network) -> int:
    """The model's parameters as it would be without an adapter: its FFNs narrow or not, its scale folded in."""
    with network.running():  # what is offloaded counts where it is in place
        count = sum(
            parameter.numel()
            for name, parameter in network.model.named_parameters()
            if ".mlp_fusion_narrow." not in name and ".modules_to_save." not in name
        )
        for projection in {p for ffn in network.ffns for p in ffn.projections} if network.fused else ():
            count += sum(p.numel() for p in shown(projection, True).parameters())
            count -= sum(p.numel() for p in shown(projection, False).parameters())
    return count


def _flops(network: Network, batch: Batch) -> float:
    """Of a forward over a batch, a token; attention in its plain form, whose products can be counted."""
    mask = batch.get("attention_mask")
    tokens = mask.numel() if isinstance(mask, Tensor) else next(iter(batch.values())).shape[:2].numel()
    with network.running(), torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(batch)
    return counter.get_total_flops() / tokens
