"""What lies between experts' projections must be known: their own code is run with small weights, and compared."""

from __future__ import annotations

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from .between import CANNOT_RUN, first_problem
from .experts import Experts, hidden_activations
from .experts_run import after_projection, is_routed
from .experts_weights import experts_like
from .find import function_name
from .stubs import shell_of

TOKENS = 6
NEURONS = 8  # what grouped matrix products can take
SPREAD = 5.0  # of what in-projections put out: wide enough for clamps at 7 or 10 to show
MOVED = 11.0  # what is put in the place of one neuron's value


def check_experts(found: Iterable[Experts]) -> None:
    """Refuses experts whose code does more than their layout says; of those alike, one is tried.

    No weight is read, and nothing of the model, nor torch's global random state, is changed.

    Args:
        found: the experts.

    Raises:
        ValueError: naming the first such experts, what they do, and what to do.
    """
    tried = first_problem(found, _kind, _problem)
    if tried is not None:
        first, more, problem = tried
        raise ValueError(
            f"The experts {first.name!r}{more}, a {type(first.module).__name__}, cannot be fused: {problem}. Leave "
            "them out with `exclude_modules`."
        )


def _kind(experts: Experts) -> tuple[object, ...]:
    """What experts have in common that behave alike."""
    scalars = ((k, v) for k, v in vars(experts.module).items() if isinstance(v, (bool, int, float, str, type(None))))
    return type(experts.module), experts.layout, function_name(experts.activation), tuple(scalars)


def _problem(experts: Experts) -> str | None:
    """What makes it wrong to merge experts' neurons, or None."""
    if getattr(experts.module, "_is_expert_parallel", False):
        return "they are distributed over processes (expert parallelism). Load the model without it"
    if experts.activation is None and not hasattr(experts.module, "_apply_gate"):
        return "their activation was not found"
    try:
        with torch.no_grad(), torch.random.fork_rng([]):
            return _crossing(experts) or _otherwise(experts)
    except torch.OutOfMemoryError:
        raise
    except CANNOT_RUN as error:
        return f"their code cannot be tried by itself ({type(error).__name__}: {error})"


def _crossing(experts: Experts) -> str | None:
    """Whether some hidden activation depends on another neuron than its own."""
    pieces = _draw(experts, 2 if experts.layout.gated else 1, 1, NEURONS)
    hidden = hidden_activations(experts, experts.layout.join(list(pieces)))
    if hidden.shape != (1, NEURONS):
        return f"{2 * NEURONS} outputs of the in-projection give hidden activations of shape {tuple(hidden.shape)}"
    for piece in pieces:
        piece[:, NEURONS // 2] = MOVED
    moved = hidden_activations(experts, experts.layout.join(list(pieces)))
    others = torch.arange(NEURONS, device=hidden.device) != NEURONS // 2
    if not torch.equal(moved[:, others], hidden[:, others]):
        return "what goes into an out-projection is computed across neurons"
    return None


def _otherwise(experts: Experts) -> str | None:
    """Whether the code gives something else than the sum over the chosen experts, each by its layout."""
    layout, dim, out_dim = experts.layout, experts.in_dim, experts.out_dim
    shapes = layout.shapes(1, dim, NEURONS, out_dim)
    tensors = {
        name: _draw(experts, *shape) / (dim**0.5 if name == layout.in_projection else SPREAD)
        for name, shape in shapes.items()
    }
    module = _trial(experts, tensors)
    several = is_routed(module)
    tokens = TOKENS if several else experts.count * TOKENS
    x = _draw(experts, tokens, dim) / SPREAD
    expected = _by_layout(experts, tensors, x)
    if several:
        chosen = min(2, experts.count)
        index = torch.stack([torch.arange(chosen, device=x.device)] * tokens)
        weights = _draw(experts, tokens, chosen).abs() / SPREAD
        returned = module(x, index, weights)
        expected = expected * weights.sum(1, keepdim=True)
    else:
        returned = module(x)
    if not isinstance(returned, Tensor) or returned.shape != expected.shape:
        return f"they return {type(returned).__name__} {tuple(getattr(returned, 'shape', ()))}, not what is expected"
    if not torch.allclose(returned, expected, rtol=1e-3, atol=1e-3 * float(expected.abs().mean())):
        return "their code is not the sum over the chosen experts of what their projections and activation give"
    return None


def _trial(experts: Experts, tensors: dict[str, Tensor]) -> nn.Module:
    """The experts' own code with the same small weights for each, which take no more memory than those of one."""
    shell = shell_of(experts_like(experts.module, {}, NEURONS), {})
    every = {name: tensor.expand(experts.count, *tensor.shape[1:]) for name, tensor in tensors.items()}
    shell._parameters.update({name: nn.Parameter(tensor, requires_grad=False) for name, tensor in every.items()})
    config = getattr(shell, "config", None)
    if config is not None:
        shell.config = copy.copy(config)
        vars(shell.config)["_experts_implementation_internal"] = "eager"  # its setter changes configs below it, too
    return shell


def _by_layout(experts: Experts, tensors: dict[str, Tensor], x: Tensor) -> Tensor:
    """What one expert puts out, (tokens, out_dim)."""
    layout = experts.layout
    ins, outs = (
        tensors[name][0] if layout.transposed else tensors[name][0].T
        for name in (layout.in_projection, layout.out_projection)
    )
    in_bias, out_bias = (tensors[name][0] for name in layout.bias_names) if layout.biased else (0.0, 0.0)
    found = hidden_activations(experts, x @ ins + in_bias) @ outs + out_bias
    return after_projection(experts.module, found)


def _draw(experts: Experts, *shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    device = experts.like.device
    return SPREAD * torch.randn(*shape, generator=generator).to("cpu" if device.type == "meta" else device)
