"""Which models may share the keys and values of a prefix: in training over a tree of prefixes, and in the embedded engine's cache."""

from __future__ import annotations

from typing import Any, NoReturn

import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from swirl_fast.config import ConfigError

_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")  # one thing, by model type
CHUNKED = "chunked_attention"
_ATTENTION = {"full_attention", "sliding_attention", CHUNKED, "attention"}
WITHOUT_ATTENTION = {"linear_attention", "mamba", "conv", "recurrent", "mlp", "moe"}
_LOGIT_SCALES = ("logit_scale", "logits_scaling")  # one thing, by model type
_MULTIPLIED_BY = {
    "cohere": "logit_scale",
    "cohere2": "logit_scale",
    "cohere2_moe": "logit_scale",
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
_DIVIDED_BY = dict.fromkeys(("granite", "granitemoe", "granitemoehybrid", "granitemoeshared"), "logits_scaling")


def why_not_causal(model_config: PreTrainedConfig) -> str | None:
    """Why a token sees more than what came before it, as half a sentence; None when it does not."""
    text = model_config.get_text_config()
    if model_config.is_encoder_decoder:
        return "it is an encoder-decoder, whose encoder reads in both directions"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all") or getattr(text, "is_causal", True) is False:
        return "its attention is not causal: tokens would see what follows them"
    return None


def why_not_shared(model_config: PreTrainedConfig, architecture: type[PreTrainedModel] | None = None) -> str | None:
    """Why the keys and values of a prefix cannot be shared by what follows it, as half a sentence; None when they can.

    architecture: the model's class; None: the one that AutoModelForCausalLM builds.
    """
    text = model_config.get_text_config()
    architecture = architecture or _architecture(model_config)
    reason = why_not_causal(model_config)
    if reason is not None:
        return reason
    named = {kind for key in _LAYER_KINDS for kind in getattr(text, key, None) or ()}
    kinds = named - _ATTENTION
    if kinds:
        return (
            f"it has layers of kind {', '.join(sorted(kinds))} (recurrent, linear, convolutional and sparse layers need more than "
            "the keys and values of single tokens)"
        )
    # a hybrid's class says so of all its models, those that have attention alone included
    if not named and architecture is not None and getattr(architecture, "_is_stateful", False):
        return "its layers carry a state from token to token"
    if architecture is not None and not architecture._supports_attention_backend:
        return "transformers offers no way to replace its attention, which does not go through the attention interface"
    if getattr(text, "attn_temperature_tuning", False) and not all(getattr(text, "no_rope_layers", None) or [False]):
        return (
            "with attn_temperature_tuning=true its layers without rotary embedding scale a query by its place in the row, whatever its "
            "place on the path; set it to false in config.json, which changes nothing for paths of fewer than floor_scale="
            f"{getattr(text, 'floor_scale', None)} tokens"
        )
    return None


def layer_kinds(text: PreTrainedConfig) -> list[str]:
    """Of each layer; where the configuration names none they all have attention, with a window if there is one."""
    named = next((kinds for key in _LAYER_KINDS if (kinds := getattr(text, key, None))), None)
    return list(named or ["sliding_attention"] * text.num_hidden_layers)


def attention_chunk(attention: nn.Module) -> int | None:
    """Tokens of the chunks in which this attention sees only each other (Llama 4); None for no chunks. transformers tells it by a mask
    alone, so it is read from the configuration."""
    layer: Any = attention
    kinds = getattr(getattr(layer, "config", None), "layer_types", None) or ()
    if CHUNKED not in kinds or kinds[layer.layer_idx] != CHUNKED:
        return None
    return int(layer.config.attention_chunk_size)


def why_not_flash(model_config: PreTrainedConfig) -> str | None:
    """What flash-attn lacks for this model, as half a sentence; None when it has all."""
    if CHUNKED in (getattr(model_config.get_text_config(), "layer_types", None) or ()):
        return "flash-attn has no chunks"
    return "flash-attn has no attention sinks" if model_config.model_type == "gpt_oss" else None


def ropes_by_length(model_config: PreTrainedConfig) -> dict[str, int]:
    """Rotary embeddings that turn every token of a row differently once the row is longer than a limit: rope_type -> limit in tokens.

    Only dynamic NTK and longrope do.
    """
    text = model_config.get_text_config()
    limits = {}
    for rope in _ropes(text):
        kind = rope.get("rope_type")
        if kind == "dynamic":
            limits[kind] = text.max_position_embeddings
        elif kind == "longrope":
            limits[kind] = rope.get("original_max_position_embeddings") or text.max_position_embeddings
    return limits


def longest_exact_path(model_config: PreTrainedConfig) -> int | None:
    """Tokens of the longest path that a row may hold: beyond it the rotary embedding turns every token of the row differently, those of
    shorter paths too. None: no limit."""
    return min(ropes_by_length(model_config).values(), default=None)


def logit_scale(model_config: PreTrainedConfig) -> float:
    """What the output layer's result is multiplied by, before any soft-cap.

    Raises ConfigError for a model type that has such a number and is not known to use it so.
    """
    text = model_config.get_text_config()
    name = text.model_type
    if name in _MULTIPLIED_BY:
        return float(getattr(text, _MULTIPLIED_BY[name]) or 1.0)
    if name in _DIVIDED_BY:
        return 1.0 / float(getattr(text, _DIVIDED_BY[name]) or 1.0)
    for key in _LOGIT_SCALES:
        if getattr(text, key, 1.0) not in (None, 1.0):
            raise ConfigError(
                f"model type {name}: {key}={getattr(text, key)}: it is not known how this model type scales its logits; use another model"
            )
    return 1.0


def refuse_inexact(model_config: PreTrainedConfig, sharing: bool = True) -> None:
    """Raises ConfigError, naming the model type and what is wrong with it, for architectures that cannot be trained, and with `sharing`
    for those whose training over a prefix tree would not equal separate rows."""
    model_config = _of_causal_model(model_config)
    text = model_config.get_text_config()
    name = model_config.model_type

    def refuse(why: str) -> NoReturn:
        raise ConfigError(f"model type {name}: {why}")

    reason = why_not_causal(model_config)
    if reason is not None:
        refuse(f"{reason}; use a decoder-only model")
    reason = why_not_shared(model_config) if sharing else None
    if reason is not None:
        refuse(
            f"{reason}; training over shared prefixes would not be exact. Set training.sharing=false to train it over separate rows"
        )
    if text is not model_config or {"vision_config", "audio_config"} & set(model_config.sub_configs):
        refuse("it reads more than text, and images in both directions; give a folder that holds only its text model")
    for key, value in text.to_dict().items():
        random = any(part in key for part in ("dropout", "pdrop", "layerdrop", "jitter"))
        # the heads of classifiers and of summaries are no part of a causal language model
        if (
            random
            and "classif" not in key
            and not key.startswith("summary_")
            and isinstance(value, int | float)
            and value > 0
        ):
            refuse(
                f"{key}={value} makes log-probs random, unlike those of the engine and of a resumed run; set it to 0 in the model's "
                "config.json"
            )
    if getattr(text, "output_router_logits", False):
        refuse(
            "the router's auxiliary loss is no part of the objective; set output_router_logits=false in config.json to leave it out"
        )
    if (getattr(text, "num_nextn_predict_layers", 0) or 0) > 0:
        refuse(
            f"num_nextn_predict_layers={text.num_nextn_predict_layers}: heads that predict several tokens are not trained; set it to 0 "
            "in config.json to leave them out"
        )
    short = ropes_by_length(model_config).get("longrope")
    if short is not None and short < text.max_position_embeddings:
        refuse(
            f"its longrope turns all tokens of a row differently once one lies beyond position {short}; set "
            f"max_position_embeddings to {short} in config.json"
        )


def _of_causal_model(model_config: PreTrainedConfig) -> PreTrainedConfig:
    """That of the model which AutoModelForCausalLM builds: of some that read images too it takes the text model alone."""
    text, built = model_config.get_text_config(), _architecture(model_config)
    return text if built is not None and built.config_class is type(text) else model_config


def own_attention(model: PreTrainedModel) -> str:
    """The attention by which a model computes what it means: what transformers has chosen, but "sdpa" would leave a soft-cap out."""
    capped = getattr(model.config.get_text_config(), "attn_logit_softcapping", None)
    return "eager" if capped else model.config._attn_implementation


def context_of(model_config: PreTrainedConfig) -> int:
    """The longest row that a model takes, in tokens; for one that keeps nothing but a state no limit that matters."""
    return int(getattr(model_config.get_text_config(), "max_position_embeddings", None) or 2**31 - 1)


def _architecture(model_config: PreTrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM builds; None for one that transformers does not ship."""
    classes: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING
    return classes[type(model_config)] if type(model_config) in classes else None


def _ropes(text: PreTrainedConfig) -> list[dict[str, Any]]:
    """The rotary settings: one, or one for each kind of layer."""
    rope = getattr(text, "rope_parameters", None) or {}
    return [rope] if "rope_type" in rope else [entry for entry in rope.values() if isinstance(entry, dict)]
