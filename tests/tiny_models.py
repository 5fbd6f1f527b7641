"""Small random models, and SharedMLPs that compute what a dense MLP computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fips_ext.init import SliceProblem
from fips_ext.layout import BlockSparse, Encoding
from fips_ext.nn import SharedBase, SharedMLP, SparseFactor
from fips_ext.surgery import DenseMLP, find_mlps
from fips_ext.train import observe as observe_into

VOCABULARY, LAYERS, WIDTH, HIDDEN = 64, 3, 32, 64


class Seen(NamedTuple):
    """What ``observe`` finds about an MLP."""

    targets: Tensor
    weights: Tensor
    power: float
    problems: dict[str, SliceProblem]


def observe(mlp: DenseMLP, x: Tensor, dtype: torch.dtype, held_out: int = 0) -> Seen:
    targets = torch.empty_like(x)
    seen = observe_into(mlp, x, targets, dtype, held_out)
    return Seen(targets, seen.weights, seen.power, seen.problems(mlp))


class Case(NamedTuple):
    """A model of transformers and what find_mlps should say about it."""

    build: Callable[[], nn.Module]
    inputs: str  # "ids" or "pixels"
    first: str
    count: int
    gated: bool
    activation: str


_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": HIDDEN,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 2,
}


def _llm(name: str, config: str | None = None, **options) -> nn.Module:
    import transformers

    sizes = {**_SIZES, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": True, **options}
    made = getattr(transformers, config or f"{name}Config")(**sizes)
    return getattr(transformers, f"{name}ForCausalLM")(made)


def vision_transformer(name: str, head: str, **options) -> nn.Module:
    """A tiny ``name`` of transformers with a ``head``, for images of 32×32."""
    import transformers

    config = getattr(transformers, f"{name}Config")(
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
        **options,
    )
    return getattr(transformers, f"{name}{head}")(config)


def _swin() -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 2], num_heads=[1, 2], window_size=4
    )
    return transformers.SwinForImageClassification(config)


def _bert() -> nn.Module:
    import transformers

    return transformers.BertForMaskedLM(transformers.BertConfig(**_SIZES, max_position_embeddings=32))


def _gpt2() -> nn.Module:
    import transformers

    config = transformers.GPT2Config(
        n_embd=WIDTH,
        n_inner=HIDDEN,
        n_layer=LAYERS,
        n_head=2,
        n_positions=32,
        vocab_size=VOCABULARY,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def _phi() -> nn.Module:
    import transformers

    return transformers.PhiForCausalLM(transformers.PhiConfig(**_SIZES, pad_token_id=0))


def _opt() -> nn.Module:
    import transformers

    config = transformers.OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        ffn_dim=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=2,
        max_position_embeddings=32,
        word_embed_proj_dim=WIDTH,
        bos_token_id=0,
        pad_token_id=1,
        eos_token_id=0,
    )
    return transformers.OPTForCausalLM(config)


CASES = {
    "llama": Case(lambda: _llm("Llama"), "ids", "model.layers.0.mlp", 3, True, "silu"),
    "qwen2": Case(lambda: _llm("Qwen2"), "ids", "model.layers.0.mlp", 3, True, "silu"),
    "gemma2": Case(lambda: _llm("Gemma2"), "ids", "model.layers.0.mlp", 3, True, "gelu_tanh"),
    "mistral": Case(lambda: _llm("Mistral"), "ids", "model.layers.0.mlp", 3, True, "silu"),
    "qwen3": Case(lambda: _llm("Qwen3"), "ids", "model.layers.0.mlp", 3, True, "silu"),
    "gemma3": Case(
        lambda: _llm("Gemma3", "Gemma3TextConfig"), "ids", "model.layers.0.mlp", 3, True, "gelu_tanh"
    ),
    "phi": Case(_phi, "ids", "model.layers.0.mlp", 3, False, "gelu_tanh"),
    "phi3": Case(
        lambda: _llm("Phi3", pad_token_id=0, eos_token_id=1), "ids", "model.layers.0.mlp", 3, True, "silu"
    ),
    "opt": Case(_opt, "ids", "model.decoder.layers.0.fc1", 3, False, "relu"),
    "gpt2": Case(_gpt2, "ids", "transformer.h.0.mlp", 3, False, "gelu_tanh"),
    "vit": Case(
        lambda: vision_transformer("ViT", "ForImageClassification"),
        "pixels",
        "vit.layers.0.mlp",
        3,
        False,
        "gelu",
    ),
    "deit": Case(
        lambda: vision_transformer("DeiT", "ForImageClassification"),
        "pixels",
        "deit.layers.0.mlp",
        3,
        False,
        "gelu",
    ),
    "dinov2": Case(
        lambda: vision_transformer("Dinov2", "Model"), "pixels", "encoder.layer.0.mlp", 3, False, "gelu"
    ),
    "dinov2-swiglu": Case(
        lambda: vision_transformer("Dinov2", "Model", use_swiglu_ffn=True),
        "pixels",
        "encoder.layer.0.mlp",
        3,
        True,
        "silu",
    ),
    "swin": Case(_swin, "pixels", "swin.encoder.layers.0.blocks.0.mlp", 3, False, "gelu"),
    "bert": Case(_bert, "ids", "bert.encoder.layer.0.intermediate", 3, False, "gelu"),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    """The model of a case in eval mode, its weights drawn anew, and an input."""
    case = CASES[name]
    model = case.build().eval()
    with torch.no_grad():
        # transformers draws with a deviation of 0.02 and zero biases: too tame to tell models apart.
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    ids = torch.randint(0, VOCABULARY, (2, 12))
    return model, ids if case.inputs == "ids" else torch.randn(2, 3, 32, 32)


def shared_from_dense(
    dense: DenseMLP,
    owner: SharedMLP | None = None,
    rank: int = 0,
    per_role: bool = False,
    encoding: Encoding = "block",
) -> SharedMLP:
    """A SharedMLP over the base ``[U, I]`` that equals ``dense`` whatever the random ``U [d, rank]`` is."""
    dtype = dense.up.weight.dtype

    def random_base() -> SharedBase:
        return SharedBase(torch.randn(dense.width, rank, dtype=dtype) / dense.width**0.5, identity=True)

    base = owner.base if owner else random_base()
    base_out = (owner.base_out if owner else random_base()) if per_role else None

    def factor(weight: Tensor, over: SharedBase) -> SparseFactor:
        on_base = torch.randn(rank, weight.shape[1], dtype=dtype) * 0.1
        rest = weight.detach() - over.weight.detach() @ on_base
        return SparseFactor(BlockSparse.from_dense(torch.cat([on_base, rest]), (16, 32), encoding))

    def bias(linear: nn.Linear | None) -> Tensor | None:
        return None if linear is None or linear.bias is None else linear.bias.detach().clone()

    return SharedMLP(
        base,
        base_out=base_out,
        up=factor(dense.up.weight.t(), base),
        gate=None if dense.gate is None else factor(dense.gate.weight.t(), base),
        down=factor(dense.down.weight, base_out or base),
        up_bias=bias(dense.up),
        gate_bias=bias(dense.gate),
        down_bias=bias(dense.down),
        activation=dense.activation,
        owns_base=owner is None,
    )


def share(model: nn.Module, rank: int = 0, per_role: bool = False, encoding: Encoding = "block") -> None:
    """Replace every MLP of ``model``; those of equal width share their bases."""
    owners: dict[int, SharedMLP] = {}
    for dense in find_mlps(model):
        mlp = shared_from_dense(dense, owners.get(dense.width), rank, per_role, encoding)
        owners.setdefault(dense.width, mlp)
        dense.install(mlp)


class PlainMLP(nn.Module):
    """``fc2(act(fc1(x)))`` with dropout, in the manner of timm."""

    def __init__(
        self,
        width: int = WIDTH,
        hidden: int = HIDDEN,
        act: nn.Module | Callable[[Tensor], Tensor] | None = None,
        bias: bool = True,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias)
        self.act = act or nn.GELU()
        self.drop1 = nn.Dropout(dropout)
        self.norm = nn.Identity()
        self.fc2 = nn.Linear(hidden, width, bias)
        self.drop2 = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.drop2(self.fc2(self.norm(self.drop1(self.act(self.fc1(x))))))


class GatedMLP(nn.Module):
    """``w2(act(w1(x)) * w3(x))``: registered as gate, down, up."""

    def __init__(self, width: int = WIDTH, hidden: int = HIDDEN, act: nn.Module | None = None) -> None:
        super().__init__()
        self.w1 = nn.Linear(width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, width, bias=False)
        self.w3 = nn.Linear(width, hidden, bias=False)
        self.act = act or nn.SiLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.w2(self.act(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    """A residual block around one MLP, with a linear map that is none of it."""

    def __init__(self, mlp: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, width)
        self.mlp = mlp

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(x)
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    """Blocks one after the other: a model that transformers does not know."""

    def __init__(self, *mlps: nn.Module, width: int = WIDTH) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(mlp, width) for mlp in mlps)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x
