"""A transformers causal language model over a comb: hidden states by tree attention, log-probs of the comb's edges only.

Everything happens inside one forward, so that FSDP has the output layer's weight gathered when `linear_logprob` needs it. The
model's own code is untouched: attention is reached through transformers' attention interface, which hands the packing's extra
arguments through to every layer.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedConfig, PreTrainedModel

from swirl_fast.comb.flops import ModelSize
from swirl_fast.comb.tree import Comb
from swirl_fast.config import ConfigError
from swirl_fast.models.exact import (
    CHUNKED,
    WITHOUT_ATTENTION,
    attention_chunk,
    layer_kinds,
    logit_scale,
    longest_exact_path,
    refuse_inexact,
)
from swirl_fast.models.routing import EXPERTS, Routing
from swirl_fast.models.windows import layer_windows, refuse_lost_window
from swirl_kernels.linear_logprob import linear_logprob
from swirl_kernels.tree_attention import TreePlan, tree_attention, tree_plan

ATTENTION = "swirl_tree"

# what models hand through to their attention without meaning anything by it here
_WITHOUT_EFFECT = (
    "position_ids",
    "cache_position",
    "use_cache",
    "output_attentions",
    "output_hidden_states",
    "return_dict",
)


_SOFTCAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")  # one thing, by model type


class DeviceComb:
    """A comb on a device. tokens_1T, depth_1T int64 [1, T]; subtree_end_T int32; rows_E, targets_E, edge_N int64; longest_path: tokens
    of the longest path from the root. row_ends: int32 [R + 1], `cu_seqlens` of a forest of R rows for flash-attn; None: tree attention.
    told: layer -> the sliding window that its attention was told in the last forward; compiled: some layer was, which tells nothing.

    What tree attention derives from the packing is made once for each window (or chunk) and kept for all layers. No dataclass: FSDP copies
    those before every layer, and the copies would keep it for themselves.
    """

    def __init__(
        self,
        tokens_1T: Tensor,
        depth_1T: Tensor,
        subtree_end_T: Tensor,
        rows_E: Tensor,
        targets_E: Tensor,
        edge_N: Tensor,
        longest_path: int,
        row_ends: Tensor | None = None,
    ) -> None:
        self.tokens_1T, self.depth_1T, self.subtree_end_T = tokens_1T, depth_1T, subtree_end_T
        self.rows_E, self.targets_E, self.edge_N = rows_E, targets_E, edge_N
        self.longest_path, self.row_ends = longest_path, row_ends
        self.told: dict[int, int | None] = {}
        self.compiled = False
        self.routing: Routing | None = None  # by the rollout engine
        self._plans: dict[tuple[int | None, int | None], TreePlan] = {}  # by sliding window and chunk

    @classmethod
    def of(
        cls, comb: Comb, device: torch.device | str = "cpu", windows: Iterable[int | None] = (), flash: bool = False
    ) -> DeviceComb:
        """windows: of the model's layers. Their plans are made here, that of any other window when a layer first asks, and none waits for
        the device: the comb is checked here, on the CPU. flash: use flash-attn where nothing branches.

        Raises ValueError for a comb that is no preorder walk."""
        ends = comb.row_ends() if flash else None
        tree_plan(torch.from_numpy(comb.subtree_end_T), depth=torch.from_numpy(comb.depth_T), window=1)
        row = cls(
            tokens_1T=torch.from_numpy(comb.tokens_T).long().to(device)[None],
            depth_1T=torch.from_numpy(comb.depth_T).long().to(device)[None],
            subtree_end_T=torch.from_numpy(comb.subtree_end_T).to(device),
            rows_E=torch.from_numpy(comb.rows_E).long().to(device),
            targets_E=torch.from_numpy(comb.targets_E).long().to(device),
            edge_N=torch.from_numpy(comb.edge_N).long().to(device),
            longest_path=int(comb.depth_T.max(initial=-1)) + 1,
            row_ends=None if ends is None else torch.from_numpy(ends).to(device),
        )
        for window in windows if ends is None else ():
            row.plan(window)
        return row

    def plan(self, window: int | None, chunk: int | None = None) -> TreePlan:
        if (window, chunk) not in self._plans:
            self._plans[window, chunk] = tree_plan(
                self.subtree_end_T,
                depth=self.depth_1T[0],
                window=window,
                chunk=chunk,
                trusted=True,
                longest_path=self.longest_path,
            )
        return self._plans[window, chunk]


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    packed: DeviceComb | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: query [1, Hq, T, D], key [1, Hkv, T, D], value [1, Hkv, T, V] -> [1, T, Hq, V]. s_aux: one
    attention sink a query head [Hq].

    Raises ConfigError for an argument that would change the attention in a way not known here.
    """
    assert packed is not None, "the model was called without a packed row; call Policy.forward"
    assert dropout == 0.0, "attention dropout cannot be exact over shared prefixes"
    others |= {"attention_mask": attention_mask, "is_causal": None if others.get("is_causal", True) else False}
    unknown = [name for name, value in others.items() if value is not None and name not in _WITHOUT_EFFECT]
    if unknown:
        raise ConfigError(
            f"{type(module).__name__} hands {', '.join(unknown)} to its attention, which tree attention does not know: training over "
            "shared prefixes would not be exact; use another model"
        )
    if (
        torch.compiler.is_compiling()
    ):  # a graph that knew the number of its layer would be the graph of that layer alone
        packed.compiled = True
    else:
        packed.told[getattr(module, "layer_idx", len(packed.told))] = sliding_window
    chunk = attention_chunk(module)
    if packed.row_ends is not None:
        assert s_aux is None and chunk is None, "flash-attn has neither sinks nor chunks"
        return _flash_attention(query[0], key[0], value[0], packed, scaling, softcap, sliding_window)[None], None
    plan = packed.plan(sliding_window, chunk)
    options: dict[str, Any] = {"scale": scaling, "softcap": softcap, "sinks": s_aux}
    out = tree_attention(query[0], key[0], value[0], None, window=sliding_window, chunk=chunk, plan=plan, **options)
    return out.transpose(0, 1).contiguous()[None], None


@torch.compiler.disable  # a compiled layer breaks its graph here
def _flash_attention(
    q: Tensor, k: Tensor, v: Tensor, packed: DeviceComb, scale: float | None, softcap: float | None, window: int | None
) -> Tensor:
    """q [Hq, T, D], k [Hkv, T, D], v [Hkv, T, V] -> [T, Hq, V], of rows that lie one after the other (training.flash_attention).

    Values narrower than keys are filled up with zeros, as transformers does for flash-attn, which wants them alike.
    """
    from flash_attn import flash_attn_varlen_func

    dtype = torch.get_autocast_dtype(q.device.type) if torch.is_autocast_enabled(q.device.type) else q.dtype
    q, k, v = (x.to(dtype).transpose(0, 1).contiguous() for x in (q, k, v))
    width, values = q.shape[2], v.shape[2]
    v = v if values == width else F.pad(v, (0, width - values))
    ends, longest = packed.row_ends, packed.longest_path
    before = -1 if window is None else window - 1
    out: Tensor = flash_attn_varlen_func(
        q, k, v, ends, ends, longest, longest,
        softmax_scale=scale, causal=True, window_size=(before, 0), softcap=softcap or 0.0,
    )  # fmt: skip
    return out if values == width else out[..., :values]


AttentionInterface.register(ATTENTION, _attention)


class Policy(nn.Module):
    """model: a causal language model whose layers are all attention. temperature: of the log-probs.

    autocast: compute type of matrix products, None for the weights' own. sharing: whether combs will branch. Raises ConfigError, naming
    the model type, for architectures that would not be exact.
    """

    padded = False  # which kind of rows it takes where nothing is shared (comb/rows.py)

    def __init__(
        self,
        model: PreTrainedModel,
        temperature: float = 1.0,
        autocast: torch.dtype | None = None,
        sharing: bool = True,
    ) -> None:
        super().__init__()
        refuse_inexact(model.config, sharing)
        text = model.config.get_text_config()
        for name, module in model.named_modules():
            if getattr(module, "is_causal", True) is False:
                raise ConfigError(
                    f"model type {text.model_type}: {name} is not causal: tokens would see what follows them"
                )
            if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
                raise ConfigError(
                    f"model type {text.model_type}: {name} drops some of its input at random in training; set its rate to 0"
                )
        known = {id(p) for part in (decoder_of(model), model.get_output_embeddings()) for p in part.parameters()}
        unknown = [name for name, parameter in model.named_parameters() if id(parameter) not in known]
        if unknown:
            raise ConfigError(
                f"model type {text.model_type}: {', '.join(unknown[:3])} are between the hidden states and the output layer, or beside "
                "it; the fused log-probs know only the output layer"
            )
        self.model = model
        self.attention = self._attention()
        model.set_attn_implementation(self.attention)
        self.temperature = temperature
        self.autocast = autocast
        self.logit_scale = logit_scale(model.config)
        self.softcap = next((cap for key in _SOFTCAPS if (cap := getattr(text, key, None))), None)
        self.longest_path = longest_exact_path(model.config)
        self._reaches = attention_reaches(text)

    def forward(self, packed: DeviceComb) -> Tensor:
        """Log-probs [N] float32 of the comb's predicted tokens, action after action; float64 for a float64 model.

        Raises ValueError for a path so long that the rotary embedding would turn the others differently too, ConfigError for one that is
        longer than a window which a layer's attention is not told.
        """
        if self.longest_path is not None and packed.longest_path > self.longest_path:
            raise ValueError(
                f"model type {self.model.config.model_type}: the longest path has {packed.longest_path} tokens; from "
                f"{self.longest_path + 1} on its rotary embedding turns all tokens of a row differently, so that shorter paths beside it "
                f"would get wrong log-probs. Set training.max_path_tokens to at most {self.longest_path}, or use a model whose "
                "rope_type is neither dynamic nor longrope"
            )
        with self._autocast(packed.tokens_1T):
            hidden_TH = self._hidden(packed)
            head = self.model.get_output_embeddings()
            logp_E = linear_logprob(
                _take(hidden_TH, packed.rows_E),
                head.weight,
                packed.targets_E,
                bias=head.bias,
                temperature=self.temperature,
                softcap=self.softcap,
                logit_scale=self.logit_scale,
            )
            return _take(logp_E, packed.edge_N)

    def _attention(self) -> str:
        """The implementation that the model's attention layers call."""
        return ATTENTION

    def _hidden(self, packed: DeviceComb) -> Tensor:
        """[T, H], of the last layer, normed."""
        packed.told.clear()
        packed.compiled = False
        if packed.row_ends is None:
            for window, chunk in self._reaches:  # not inside of a compiled layer, which they would break
                packed.plan(window, chunk)
        hidden_1TH = decoder_of(self.model)(
            input_ids=packed.tokens_1T,
            position_ids=packed.depth_1T,
            use_cache=False,
            packed=packed,
        ).last_hidden_state
        if not packed.compiled:
            refuse_lost_window(self.model.config, packed.told, packed.longest_path)
        return hidden_1TH[0]

    def plain(self, tokens_RT: Tensor) -> Tensor:
        """Log-probs [R, T - 1] of all tokens but the first of R rows, by the model's own masks, attention and logits, in the type that
        `forward` has: what it is checked against. The caller has chosen an attention of transformers (models/check.py)."""
        with self._autocast(tokens_RT):
            logits_RTV = self.model(input_ids=tokens_RT, use_cache=False).logits[:, :-1]
        logits_RTV = logits_RTV.to(torch.promote_types(logits_RTV.dtype, torch.float32)) / self.temperature
        return logits_RTV.log_softmax(-1).gather(2, tokens_RT[:, 1:, None])[:, :, 0]

    def _autocast(self, tokens: Tensor) -> torch.autocast:
        return torch.autocast(
            tokens.device.type, dtype=self.autocast or torch.bfloat16, enabled=self.autocast is not None
        )


def _take(x: Tensor, index: Tensor) -> Tensor:
    """x[index], with a backward that adds up repeated rows in a fixed order: on GPUs indexing sorts them (index_select is atomic), on CPUs
    index_select takes them one after another."""
    return x[index] if x.is_cuda else x.index_select(0, index)


def decoder_of(model: PreTrainedModel) -> nn.Module:
    """All but the output layer. Llama 4 names it otherwise than its class says."""
    return model.model if model.base_model is model else model.base_model


def attention_windows(text: PreTrainedConfig) -> list[int | None]:
    """Of each layer with attention the tokens that it sees, None for all; a chunk counts as a window of its size."""
    if not getattr(text, "num_attention_heads", None):
        return []
    layers = zip(layer_kinds(text), layer_windows(text), strict=True)
    return [
        text.attention_chunk_size if kind == CHUNKED else window
        for kind, window in layers
        if kind not in WITHOUT_ATTENTION
    ]


def attention_reaches(text: PreTrainedConfig) -> dict[tuple[int | None, int | None], None]:
    """The windows and chunks of the layers with attention, each once: what plans there must be."""
    layers = zip(layer_kinds(text), layer_windows(text), strict=True)
    return dict.fromkeys(
        (None, text.attention_chunk_size) if kind == CHUNKED else (window, None)
        for kind, window in layers
        if kind not in WITHOUT_ATTENTION
    )


def head_widths(text: PreTrainedConfig) -> tuple[int, int]:
    """Dimensions of a head's queries and keys, and of its values. Those with latent attention (DeepSeek) name three others."""
    latent = [getattr(text, key, None) for key in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    if all(latent):
        nope, rope, values = latent
        return nope + rope, values
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return width, width


def model_size(model: PreTrainedModel) -> ModelSize:
    """What `comb.flops` needs to know of a model, sharded or not. Of a layer's experts those count that a token visits; of a layer that
    keeps a state its matrices; of frozen weights beside adapters two thirds, for they have no gradient of their own."""
    text = model.config.get_text_config()
    decoder = decoder_of(model)
    tables = {id(module.weight) for module in decoder.modules() if isinstance(module, nn.Embedding)}
    total = next((n for key in EXPERTS if (n := getattr(text, key, None))), 1)
    visited = min(getattr(text, "num_experts_per_tok", None) or total, total) / total
    frozen = 2 / 3 if {parameter.requires_grad for parameter in model.parameters()} == {True, False} else 1.0
    linear = 0.0
    for name, parameter in decoder.named_parameters():
        if parameter.dim() > 1 and id(parameter) not in tables:
            work = 1.0 if parameter.requires_grad else frozen
            linear += parameter.numel() * work * (visited if ".experts." in name else 1.0)
    windows = attention_windows(text)
    width = text.num_attention_heads * sum(head_widths(text)) // 2 if windows else 0
    attention = tuple((width, window) for window in windows)
    head = model.get_output_embeddings().weight
    return ModelSize(linear, attention, round(head.shape[0] * head.shape[1] * (1.0 if head.requires_grad else frozen)))
