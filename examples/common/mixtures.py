"""Mixtures of experts: loaded by name, or made of a dense model by sparse upcycling; and experts removed by REAP."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    set_seed,
)

from peft_fusion.ffn import Experts, Routed, capture_experts, find_experts

from .errors import InputError
from .load_models import load_causal_lm, load_tokenizer

EXPERTS, CHOSEN = 4, 2


def load_mixture(
    name: str | None, layers: int, of: int | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A mixture of experts in fp32 and its tokenizer.

    Args:
        name: Hub id or local path of Mixtral, Qwen3-MoE, Switch, ...; None: SmolLM2-135M, upcycled.
        layers: of an upcycled one, how many of the last get experts.
        of: how many of its layers are there at all; None: every one.
    """
    if name is None:
        dense, tokenizer = load_causal_lm(None)
        dense.model.layers = dense.model.layers[:of]
        dense.config.num_hidden_layers = len(dense.model.layers)
        dense.config.layer_types = None
        return upcycled(dense, layers), tokenizer
    try:
        encodes = AutoConfig.from_pretrained(name).is_encoder_decoder
        auto_class: Any = AutoModelForSeq2SeqLM if encodes else AutoModelForCausalLM
        return auto_class.from_pretrained(name, dtype=torch.float32), load_tokenizer(name)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot load the model `{name}`: {error}") from error


def upcycled(dense: PreTrainedModel, layers: int, seed: int = 0) -> PreTrainedModel:
    """A Llama as a Mixtral that computes the same: every expert is a copy of its layer's MLP (2212.05055).

    Its router is random, and chooses two of four experts. The layers before the last ones keep their dense MLP, as no
    config of Mixtral's has it; so the model cannot be reloaded from a checkpoint, which it needs not here.

    Args:
        dense: a Llama.
        layers: how many of the last layers get experts.
        seed: of the router.
    """
    set_seed(seed)
    same = dense.config.to_dict()
    kept = {
        k: same[k]
        for k in same
        if hasattr(MixtralConfig(), k) and k not in ("architectures", "model_type", "layer_types")
    }
    moe = MixtralForCausalLM(MixtralConfig(**kept | {"num_local_experts": EXPERTS, "num_experts_per_tok": CHOSEN}))
    first = dense.config.num_hidden_layers - layers
    for index, (ours, theirs) in enumerate(zip(moe.model.layers, dense.model.layers, strict=True)):
        if index < first:
            ours.mlp = theirs.mlp
            continue
        up = torch.cat([theirs.mlp.gate_proj.weight.detach(), theirs.mlp.up_proj.weight.detach()])
        ours.mlp.experts.gate_up_proj.data = up.repeat(EXPERTS, 1, 1)
        ours.mlp.experts.down_proj.data = theirs.mlp.down_proj.weight.detach().repeat(EXPERTS, 1, 1)
    missing, unexpected = moe.load_state_dict(dense.state_dict(), strict=False)
    assert all(".mlp." in key for key in (*missing, *unexpected))
    moe.tie_weights()
    return moe.eval()


def train_experts_alone(model: PreTrainedModel, routers: bool) -> None:
    """Has routed experts, and on request their routers, train and nothing else."""
    model.requires_grad_(False)
    for experts in find_experts(model):
        (experts.holder if routers else experts.module).requires_grad_(True)


def difference(model: PreTrainedModel) -> float:
    """How far experts are from the mean of their layer, relative to it."""
    weights = [experts.module.get_parameter(experts.layout.out_projection).detach() for experts in find_experts(model)]
    return sum(float((w - w.mean(0)).norm() / w.mean(0).expand_as(w).norm()) for w in weights) / len(weights)


@torch.no_grad()
def remove_experts(model: PreTrainedModel, batches: Iterable[dict[str, Tensor]], share: float) -> PreTrainedModel:
    """Removes, in place, the experts of least saliency from every layer: REAP (2510.13999).

    An expert's saliency is the mean, over the tokens that are routed to it, of the router's weight times the norm of
    what it puts out.

    Args:
        model: with routed experts in 3-D parameters.
        batches: its inputs.
        share: of the experts, how many stay.
    """
    found = find_experts(model)
    sums: dict[str, list[float]] = {f"{e.name}.{i}": [0.0, 0.0] for e in found for i in range(e.count)}

    def note(routed: Routed, out: Tensor) -> None:
        sums[routed.name][0] += float((routed.weights * out.norm(dim=1)).sum())
        sums[routed.name][1] += len(out)

    with capture_experts(found, outputs=note):
        for batch in batches:
            model(**{name: tensor for name, tensor in batch.items() if name != "labels"})
    for experts in found:
        every = [sums[f"{experts.name}.{i}"] for i in range(experts.count)]
        saliency = torch.tensor([total / max(count, 1.0) for total, count in every])
        _keep(experts, saliency.topk(max(1, round(share * experts.count))).indices.sort().values)
    return model


def _keep(experts: Experts, kept: Tensor) -> None:
    """Leaves some experts of a layer, and the rows of its router that belong to them."""
    count, stay = experts.count, len(kept)
    routers = [m for m in experts.holder.children() if m is not experts.module and _rows(m) == count]
    if len(routers) != 1:
        raise InputError(f"the router of {experts.name} was not found, so that none of its experts can be removed")
    for module in (experts.module, routers[0]):
        for name, tensor in [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]:
            if tensor.dim() and len(tensor) == count:
                part = tensor.detach()[kept]
                setattr(module, name, nn.Parameter(part) if isinstance(tensor, nn.Parameter) else part)
    for module in (experts.module, routers[0], experts.holder):
        for name, value in vars(module).items():
            if name in ("num_experts", "top_k", "num_local_experts", "n_routed_experts") and isinstance(value, int):
                setattr(module, name, min(value, stay))


def _rows(module: nn.Module) -> int | None:
    weight = getattr(module, "weight", None)
    return len(weight) if isinstance(weight, Tensor) and weight.dim() == 2 else None
