"""What lies between an FFN's projections: known, or refused by name; and how the code is tried."""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType

import pytest
import torch
import transformers as tf
from accelerate import cpu_offload
from architectures import ARCHITECTURES, BY_NAME
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.models.bitnet.modeling_bitnet import BitNetMLP
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4MLP
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nTextMLP
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2TextFFN
from transformers.models.lightglue.modeling_lightglue import LightGlueMLP
from transformers.models.minimax_m3_vl.modeling_minimax_m3_vl import MiniMaxM3VLDenseMLP
from transformers.models.phi4_multimodal.modeling_phi4_multimodal import Phi4MultimodalAudioMLP
from transformers.models.segformer.modeling_segformer import SegformerMixMLP
from transformers.models.vitpose_backbone.modeling_vitpose_backbone import VitPoseBackboneMoeMLP
from transformers.models.zamba2.modeling_zamba2 import Zamba2MLP

from peft_fusion import FusionConfig
from peft_fusion.ffn import check_between, find_ffns

SIZES = {"hidden_size": 16, "intermediate_size": 24}


def config(kind: type, **settings: object) -> tf.PretrainedConfig:
    made = kind()
    for name, value in settings.items():
        setattr(made, name, value)
    return made


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "BitNet": (
        lambda: BitNetMLP(config(tf.BitNetConfig, **SIZES)),
        r"what reaches `down_proj` is not ReLUSquaredActivation of `gate_proj` times `up_proj`; beside them it has "
        r"`ffn_sub_norm` \(BitNetRMSNorm\)",
    ),
    "Segformer": (lambda: SegformerMixMLP(tf.SegformerConfig(), 16, 24), r"`dwconv` \(SegformerDepthWiseConv\)"),
    "LightGlue": (lambda: LightGlueMLP(config(tf.LightGlueConfig, **SIZES)), r"`layer_norm` \(LayerNorm\)"),
    "Zamba2": (
        lambda: Zamba2MLP(config(tf.Zamba2Config, **SIZES, adapter_rank=4), num_fwd_mem_blocks=2, block_id=0),
        r"`gate_up_proj_adapter_list` \(ModuleList\)",
    ),
    "ViTPose with experts": (
        lambda: VitPoseBackboneMoeMLP(
            config(tf.VitPoseBackboneConfig, hidden_size=16, mlp_ratio=2, num_experts=3, part_features=4)
        ),
        r"`experts` \(VitPoseNaiveMoe\)",
    ),
    "Phi-4 multimodal's audio": (
        lambda: Phi4MultimodalAudioMLP(config(tf.Phi4MultimodalAudioConfig, **SIZES)),
        "what reaches `down_proj` is not SiLU of the first half of `gate_up_proj` times the second",
    ),
    "MiniMax-M3": (
        lambda: MiniMaxM3VLDenseMLP(config(tf.MiniMaxM3VLTextConfig, **SIZES)),
        "not an activation of the first half of `gate_up_proj` times the second; beside them it has .*`swiglu_limit`",
    ),
    "DeepSeek-V4's clamps": (
        lambda: DeepseekV4MLP(config(tf.DeepseekV4Config, **SIZES, moe_intermediate_size=24)),
        "what reaches `down_proj` is not SiLUActivation of `gate_proj` times `up_proj`; beside them it has `limit`",
    ),
    "Kosmos-2": (
        lambda: Kosmos2TextFFN(config(tf.Kosmos2TextConfig, embed_dim=16, ffn_dim=24)),
        "`ffn_layernorm` computes across its neurons",
    ),
    "Gemma 3n's sparse layers": (
        lambda: Gemma3nTextMLP(
            config(tf.Gemma3nTextConfig, hidden_size=16, intermediate_size=[24], activation_sparsity_pattern=[0.9])
        ),
        "`activation_sparsity` computes across its neurons",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_ffns_that_do_more_than_their_layout_says_are_refused_by_name(name, device):
    make, message = REFUSED[name]
    holder = make().to(device)
    with pytest.raises(ValueError, match=message) as refused:
        check_between(find_ffns(nn.ModuleDict({"mlp": holder})))
    assert str(refused.value).startswith(f"The FFN 'mlp', of a {type(holder).__name__}, cannot be fused: ")
    assert "with `exclude_modules`" in str(refused.value) and "`register_layout`" in str(refused.value)


def test_refused_before_anything_changes_and_accepted_where_left_out(unchanged):
    model = BY_NAME["llama"].make()
    model.model.layers[1].mlp = BitNetMLP(config(tf.BitNetConfig, hidden_size=32, intermediate_size=64))
    check = unchanged(model)
    with pytest.raises(ValueError, match=r"'model.layers.1.mlp', of a BitNetMLP.*`ffn_sub_norm`"):
        get_peft_model(model, FusionConfig(ratio=0.5))
    check()
    get_peft_model(model, FusionConfig(ratio=0.5, exclude_modules=["layers.1.mlp"]))


class Gated(nn.Module):
    """A gated FFN with one in-projection; `combine` is what it does with what that puts out."""

    def __init__(self, combine: Callable[[Tensor], Tensor], known: bool = False) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj, self.combine = nn.Linear(8, 48), nn.Linear(24, 8), combine
        if known:
            self.act_fn = nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(self.combine(self.gate_up_proj(x)))


def halves(z: Tensor) -> tuple[Tensor, ...]:
    return z.chunk(2, dim=-1)


COMBINED: dict[str, tuple[Callable[[Tensor], Tensor], bool]] = {
    "as in the layout": (lambda z: nn.functional.silu(halves(z)[0]) * halves(z)[1], True),
    "halves swapped": (lambda z: nn.functional.silu(halves(z)[1]) * halves(z)[0], False),
    "interleaved": (lambda z: nn.functional.silu(z[..., ::2]) * z[..., 1::2], False),
    "one added": (lambda z: nn.functional.silu(halves(z)[0]) * (halves(z)[1] + 1), False),
    "clamped": (lambda z: nn.functional.silu(halves(z)[0]) * halves(z)[1].clamp(-10, 10), False),
    "normed": (lambda z: nn.functional.layer_norm(nn.functional.silu(halves(z)[0]) * halves(z)[1], (24,)), False),
    "gate normed": (lambda z: nn.functional.softmax(halves(z)[0], -1) * halves(z)[1], False),
    "rolled": (lambda z: (nn.functional.silu(halves(z)[0]) * halves(z)[1]).roll(1, -1), False),
    "tokens mixed": (lambda z: (nn.functional.silu(halves(z)[0]) * halves(z)[1]).cumsum(1), False),
    "narrowed": (lambda z: (nn.functional.silu(halves(z)[0]) * halves(z)[1])[..., :5], False),
}


@pytest.mark.parametrize("case", COMBINED)
@pytest.mark.parametrize("known", [True, False], ids=["activation known", "unknown"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_what_reaches_the_out_projection_is_compared(case, known, dtype):
    combine, sound = COMBINED[case]
    ffns = find_ffns(Gated(combine, known).to(dtype))
    if sound:
        check_between(ffns)
    else:
        with pytest.raises(ValueError, match="what reaches `down_proj` is not .* of the first half of `gate_up_proj`"):
            check_between(ffns)


class Plain(nn.Module):
    """An FFN whose `extra` does what it likes with its hidden activations or its input."""

    def __init__(self, extra: Callable[[Plain, Tensor, Tensor], Tensor] | None = None, act: object = "relu") -> None:
        super().__init__()
        self.fc1, self.fc2, self.extra = nn.Linear(8, 24), nn.Linear(24, 8), extra
        self.act = ACT2FN[act] if isinstance(act, str) else act
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.dropout(self.act(self.fc1(x)))
        extra = 0 if self.extra is None else self.extra(self, x, hidden)
        return self.fc2(hidden) + extra


def test_hidden_activations_that_go_elsewhere_too():
    with pytest.raises(ValueError, match="goes elsewhere than through `fc2`, too"):
        check_between(find_ffns(Plain(lambda module, x, hidden: hidden.sum(-1, keepdim=True))))


def test_weights_that_are_read_without_a_call():
    reads = Plain()
    reads.forward = MethodType(lambda self, x: self.act(self.fc1(x)) @ self.fc2.weight.T, reads)
    with pytest.raises(ValueError, match="its projections are not all called"):
        check_between(find_ffns(reads))


def test_in_projections_that_are_given_different_inputs():
    llama = find_ffns(BY_NAME["llama"].make())[0].holder
    llama.forward = MethodType(
        lambda self, x: self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(2 * x)), llama
    )
    with pytest.raises(ValueError, match="its in-projections are not given the same"):
        check_between(find_ffns(llama))


@pytest.mark.parametrize("act", ["gelu", "silu", "quick_gelu", "relu2", nn.ReLU(inplace=True), torch.tanh])
def test_any_activation_and_dropout_are_fine(act):
    check_between(find_ffns(Plain(act=act).train()))


@pytest.mark.parametrize("architecture", ARCHITECTURES, ids=lambda a: a.name)
@pytest.mark.parametrize("state", ["plain", "bfloat16", "meta", "nan", "training", "fused"])
def test_every_known_architecture_is_accepted_in_any_state(architecture, state):
    model = architecture.make()
    if state == "bfloat16":
        model.to(torch.bfloat16)
    elif state == "meta":
        model.to("meta")
    elif state == "nan":
        for parameter in model.parameters():
            parameter.data.fill_(torch.nan)
    elif state == "training":
        model.train()
    elif state == "fused":
        model = get_peft_model(model, FusionConfig(ratio=0.5, base_weights="offload"))
    check_between(find_ffns(model))


def test_the_model_and_the_random_state_are_left_as_they_are(unchanged):
    def extra(module: nn.Module, x: Tensor, hidden: Tensor) -> Tensor:
        module.calls.append(x)
        module.count += 1
        module.seen = x
        return 0 * torch.rand(1)

    holder = Plain(extra).train()
    holder.calls, holder.fc1.weight.grad = [], torch.ones(24, 8)
    holder.register_buffer("count", torch.zeros(1))
    holder.register_forward_hook(lambda *args: pytest.fail("a hook was run"))
    holder.act.register_forward_hook(lambda *args: pytest.fail("a hook was run"))
    check, state = unchanged(holder), torch.get_rng_state()
    check_between(find_ffns(holder))
    check()
    assert torch.equal(torch.get_rng_state(), state)
    assert holder.calls == [] and not hasattr(holder, "seen") and holder.act.training
    assert torch.equal(holder.fc1.weight.grad, torch.ones(24, 8))


def test_ffns_alike_are_tried_once():
    calls = []
    model = nn.ModuleList(Plain(lambda module, x, hidden: calls.append(1) or 0) for _ in range(5))
    model.append(Plain(lambda module, x, hidden: calls.append(1) or 0, act="gelu"))
    model[2].scale = 1.0
    check_between(find_ffns(model))
    assert len(calls) == 6  # two runs for each kind


def test_one_of_a_kind_is_named_with_the_number_of_the_others():
    model = nn.ModuleList([Plain(), *(Plain(lambda module, x, hidden: hidden.mean(), act="gelu") for _ in range(3))])
    with pytest.raises(ValueError, match=r"The FFN '1' \(and 2 more like it\), of a Plain, cannot be fused"):
        check_between(find_ffns(model))


class Needy(Plain):
    """Its code needs what nobody can guess."""

    def forward(self, x: Tensor, sizes: tuple[int, int]) -> Tensor:
        height, width = sizes
        return super().forward(x.view(height, width, -1))


def attention() -> nn.Module:
    return nn.MultiheadAttention(8, 2)


BESIDE: dict[str, tuple[dict[str, nn.Module], str | None]] = {
    "nothing": ({}, None),
    "a norm of the inputs": ({"norm": nn.LayerNorm(8)}, None),
    "attention": ({"self_attn": attention(), "norm": nn.LayerNorm(8)}, None),
    "another activation": ({"other": nn.GELU()}, None),
    "a norm of the neurons": ({"norm": nn.LayerNorm(24)}, r"`norm` \(LayerNorm\)"),
    "the same beside attention": ({"self_attn": attention(), "norm": nn.LayerNorm(24)}, r"`norm` \(LayerNorm\)"),
    "a convolution": ({"conv": nn.Conv1d(24, 24, 3, groups=24)}, r"`conv` \(Conv1d\)"),
    "what has no sizes": (
        {"mix": nn.Softmax(-1), "pool": nn.AvgPool1d(1)},
        r"`mix` \(Softmax\), `pool` \(AvgPool1d\)",
    ),
}


@pytest.mark.parametrize("case", BESIDE)
def test_code_that_cannot_be_tried_is_judged_by_what_is_beside_the_projections(case):
    modules, refused = BESIDE[case]
    holder = Needy()
    for name, module in modules.items():
        holder.add_module(name, module)
    if refused is None:
        check_between(find_ffns(holder))
    else:
        with pytest.raises(ValueError, match=f"{refused} may compute across its neurons, and its code cannot be tried"):
            check_between(find_ffns(holder))


def test_code_that_does_not_get_to_the_projections_is_judged_so_too():
    holder = Plain()
    holder.forward = MethodType(lambda self, x: x, holder)
    check_between(find_ffns(holder))
    holder.norm = nn.LayerNorm(24)
    with pytest.raises(ValueError, match=r"`norm` \(LayerNorm\) may compute across its neurons"):
        check_between(find_ffns(holder))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, MemoryError, KeyboardInterrupt, ZeroDivisionError])
def test_other_errors_go_through(error):
    def extra(*args: object) -> Tensor:
        raise error("here")

    with pytest.raises(error, match="here"):
        check_between(find_ffns(Plain(extra)))


@pytest.mark.parametrize("why", ["packed", "adapter"])
def test_layer_that_running_might_change_is_not_run(why, monkeypatch):
    """A quantised linear may be packed for good when it first runs, and an adapter may unmerge itself."""
    opt = BY_NAME["opt"].make()
    if why == "adapter":
        opt.add_adapter(LoraConfig(target_modules=["q_proj"]))
    ffns = find_ffns(opt)
    attention = ffns[0].holder.self_attn
    if why == "packed":
        attention.q_proj.weight = nn.Parameter(torch.zeros(32, 32, dtype=torch.int8), requires_grad=False)
    monkeypatch.setattr(type(attention), "forward", lambda *args, **kwargs: pytest.fail("attention was run"))
    check_between(ffns[:1])


def test_code_that_was_patched_in_place_is_the_one_that_is_tried():
    holder = Plain()
    holder.forward = MethodType(lambda self, x: self.fc2(self.fc1(x).softmax(-1)), holder)
    with pytest.raises(ValueError, match="what reaches `fc2` is not ReLU of `fc1`"):
        check_between(find_ffns(holder))


def test_hooks_that_bring_weights_from_elsewhere_are_not_needed():
    model = BY_NAME["bert"].make()
    cpu_offload(model, execution_device="cpu")  # its weights are on the meta device from here on
    check_between(find_ffns(model))
    model.bert.encoder.layer[1].intermediate.intermediate_act_fn = nn.Softmax(-1)
    model.bert.encoder.layer[1].intermediate.forward = MethodType(
        lambda self, x: self.intermediate_act_fn(self.dense(x)).cumsum(-1), model.bert.encoder.layer[1].intermediate
    )
    with pytest.raises(ValueError, match=r"'bert.encoder.layer.1', of a BertLayer.*what reaches `output.dense` is not"):
        check_between(find_ffns(model))
