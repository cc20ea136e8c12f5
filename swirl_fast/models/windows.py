"""The sliding windows that a model's configuration names, against those that its layers hand to their attention.

Several model types of transformers keep a window in the mask only, which tree attention does not see. No list of them is needed: what
the attention of every layer was really told is known after one forward.
"""

from __future__ import annotations

from collections.abc import Mapping

from transformers import PreTrainedConfig

from swirl_fast.config import ConfigError


def layer_windows(model_config: PreTrainedConfig) -> list[int | None]:
    """Of each layer how many tokens it sees, itself included, by the configuration; None: all before it."""
    text = model_config.get_text_config()
    used = getattr(text, "use_sliding_window", True)
    window = (getattr(text, "sliding_window", None) or None) if used else None
    kinds = getattr(text, "layer_types", None) or ["sliding_attention"] * text.num_hidden_layers
    return [window if kind == "sliding_attention" else None for kind in kinds]


def lost_window(model_config: PreTrainedConfig, told: Mapping[int, int | None], longest_path: int) -> str | None:
    """Which layer called no attention although its kind is one, or called it without the window that the configuration gives it where
    paths of `longest_path` tokens are longer than that, as half a sentence; None: no layer.

    told: layer -> the window that its attention was told in a forward. A window that only the attention knows of is no error: the model
    has it from elsewhere.
    """
    kinds = getattr(model_config.get_text_config(), "layer_types", None) or ()
    for layer, kind in enumerate(kinds):
        if layer not in told:
            return f"layer {layer}, of kind {kind}, calls no attention that can be replaced"
    for layer, window in enumerate(layer_windows(model_config)):
        if window is not None and window < longest_path and told.get(layer, window) is None:
            return (
                f"layer {layer} has a sliding window of {window} tokens, which its attention is not told, and paths may have "
                f"{longest_path} tokens"
            )
    return None


def refuse_lost_window(model_config: PreTrainedConfig, told: Mapping[int, int | None], longest_path: int) -> None:
    """Raises ConfigError where `lost_window` finds one."""
    reason = lost_window(model_config, told, longest_path)
    if reason is not None:
        raise ConfigError(
            f"model type {model_config.model_type}: {reason}: training over shared prefixes would not be exact. Set "
            "training.sharing=false (or, for a window, training.max_path_tokens to at most its length)"
        )
