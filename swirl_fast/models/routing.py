"""Models with experts: which of them a token is routed to, read from the routers, and replayed in them.

A router scores all experts, picks the best k with `torch.topk`, and weighs these by their scores. Rollout engine and trainer round
differently, so that in bfloat16 some tokens go to other experts in the trainer than where their log-probs came from. With
training.replay_routing the trainer takes the engine's choice in place of its own, and weighs it by its own scores: gradients reach the
router as ever. Where both choose the same experts, in whatever order, nothing changes.

The routers are transformers' own; what is replaced is the result of the one `torch.topk` in them. Legend: T packed tokens, N predicted
tokens, L decoder layers, K experts that a token visits.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig, PreTrainedModel

from swirl_fast.config import Config, ConfigError

EXPERTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")  # one thing, by model type
_VISITED = ("num_experts_per_tok", "moe_k", "top_k_experts")  # the same


def experts_of(model_config: PreTrainedConfig) -> tuple[int, int] | None:
    """(experts of a layer, how many of them a token visits); None for a model without."""
    text = model_config.get_text_config()
    total = next((n for key in EXPERTS if (n := getattr(text, key, None))), 1)
    visited = next((n for key in _VISITED if (n := getattr(text, key, None))), total)
    return (total, visited) if total > 1 else None


def routed_shape(model_config: PreTrainedConfig) -> tuple[int, int]:
    """(layers, experts that a token visits): the last two dimensions of Completion.routed_experts."""
    experts = experts_of(model_config)
    assert experts is not None, "asked of a model with experts only"
    return model_config.get_text_config().num_hidden_layers, experts[1]


def why_not_replayed(model_config: PreTrainedConfig) -> str | None:
    """Why the routing cannot be read and replayed, as half a sentence that follows the model type; None where it can. Reads no weights."""
    if experts_of(model_config) is None:
        return "has no experts"
    mappings: tuple[Any, ...] = (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING)
    if _router_class(*(classes[type(model_config)] for classes in mappings if type(model_config) in classes)) is None:
        return "chooses its experts outside of a router with one torch.topk, where the choice cannot be replaced"
    return None


def refuse_routing(model_config: PreTrainedConfig, key: str) -> None:
    """Raises ConfigError for a model whose routing cannot be replayed. key: the setting that asks for it."""
    if (reason := why_not_replayed(model_config)) is not None:
        raise ConfigError(f"{key}=true: model type {model_config.model_type} {reason}; leave it false")


def about_experts(model_config: PreTrainedConfig, config: Config) -> str:
    """What to say at the start of a training of a model with experts; empty for any other."""
    experts = experts_of(model_config)
    if experts is None:
        return ""
    said = (
        f"{model_config.model_type} sends each token to {experts[1]} of {experts[0]} experts. Every rank computes all of them: parameters "
        "are sharded, there is no expert parallelism"
    )
    if config.algorithm.name == "sft":
        return said
    if config.training.replay_routing:
        return f"{said}. Tokens of actions go where the engine sent them; routing_gap is how many would not have"
    said += (
        ". Engine and trainer may choose different ones for a token, above all in bfloat16: engine_gap_mean shows what that does to its "
        "log-prob"
    )
    if config.engine.return_routed_experts:
        return f"{said}, routing_gap how often it happens; training.replay_routing=true takes the engine's choice"
    if config.algorithm.reward == "outcome" or why_not_replayed(model_config) is not None:
        return said
    return f"{said}; engine.return_routed_experts=true measures how often, training.replay_routing=true takes the engine's choice"


class Routing:
    """The engine's choice for the tokens of a packed row, and what came of it.

    experts_TLK: integers; -1 where nothing was recorded: these tokens are routed by the trainer.
    """

    def __init__(self, experts_TLK: Tensor) -> None:
        self.experts_TLK = experts_TLK
        # by layer, so that a layer that runs again counts once; numbers on the device
        self._different: dict[int, Tensor] = {}

    def count(self, layer: int, different: Tensor) -> None:
        self._different[layer] = different

    def compared(self) -> tuple[float, float]:
        """How many recorded choices were not the trainer's own, and how many there are: one a token and layer that has experts."""
        recorded = (self.experts_TLK[:, 0, 0] >= 0).sum()
        if not self._different:
            return 0.0, 0.0
        return float(torch.stack(list(self._different.values())).sum()), float(recorded) * len(self._different)


class Replay:
    """Has the routers of a model follow the `routing` of the packed row that the model is called with, or only compares with it.

    replay: False only compares. Raises ConfigError for a model without routers that can be replayed.
    """

    def __init__(self, model: PreTrainedModel, replay: bool) -> None:
        self._replay = replay
        self._routing: Routing | None = None
        for number, layer, router in routers_of(model):
            # Called again with the layer where it is checkpointed: then the row is not the model's any more.
            layer.register_forward_pre_hook(self._look, with_kwargs=True)
            router.forward = functools.partial(self._route, number, router.forward)

    def _look(self, layer: nn.Module, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        packed = named.get("packed")  # rows of the model's own attention have none
        self._routing = None if packed is None else packed.routing

    def _route(self, number: int, forward: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        routing = self._routing
        if routing is None:
            return forward(*arguments, **named)
        with _Choice(routing.experts_TLK[:, number].long(), self._replay) as choice:
            out = forward(*arguments, **named)
        routing.count(number, choice.different)
        return out


class RoutingReader:
    """What the routers of a model chose in its last forward."""

    def __init__(self, model: PreTrainedModel) -> None:
        model_config = model.config
        self._layers, self._visited = routed_shape(model_config)
        experts = experts_of(model_config)
        assert experts is not None
        self._dtype = torch.uint8 if experts[0] <= 256 else torch.int16
        self._chosen: dict[int, Tensor] = {}
        for number, _, router in routers_of(model):
            router.register_forward_hook(functools.partial(self._note, number))

    def _note(self, number: int, router: nn.Module, arguments: tuple[Any, ...], out: tuple[Tensor, ...]) -> None:
        self._chosen[number] = next(part for part in out if not part.is_floating_point())

    def last(self) -> Tensor:
        """[T, L, K], uint8 or int16 where there are more than 256 experts, on the CPU; 0 in layers without experts."""
        some = next(iter(self._chosen.values()))
        found = torch.zeros(len(some), self._layers, self._visited, dtype=self._dtype, device=some.device)
        for number, chosen in self._chosen.items():
            found[:, number] = chosen.to(self._dtype)
        return found.cpu()


def routers_of(model: PreTrainedModel) -> list[tuple[int, nn.Module, nn.Module]]:
    """(number of its decoder layer, that layer, router), in order. Raises ConfigError where there are none that can be replayed."""
    refuse_routing(model.config, "training.replay_routing or engine.return_routed_experts")
    kind, base = _router_class(type(model), type(model.base_model)), model.base_model
    assert kind is not None
    found = []
    for name, module in base.named_modules():
        if isinstance(module, kind) and (place := re.match(r"(?:.*?\.)?(\d+)(?=\.)", name)):
            found.append((int(place[1]), base.get_submodule(place[0]), module))
    return found


def _router_class(*architectures: type[nn.Module]) -> type[nn.Module] | None:
    """Of the modules that transformers itself reads router logits from, if they return what they chose, by one torch.topk. architectures:
    the causal language model, and the model in it."""
    for architecture in architectures:
        recorder = (getattr(architecture, "_can_record_outputs", None) or {}).get("router_logits")
        kind = getattr(recorder, "target_class", None)
        if kind is not None and "Router" in kind.__name__:
            return kind if inspect.getsource(inspect.unwrap(kind.forward)).count("topk(") == 1 else None
    return None


class _Choice(TorchFunctionMode):
    """Replaces the result of `torch.topk`: where experts are recorded and are not the same ones, they and their scores.

    recorded_TK: int64, -1: nothing is. different: how many tokens had others, once it has run.
    """

    def __init__(self, recorded_TK: Tensor, replay: bool) -> None:
        super().__init__()
        self._recorded_TK, self._replay = recorded_TK, replay
        self.different = torch.zeros((), device=recorded_TK.device)

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: tuple[Any, ...] = (), named: Any = None
    ) -> Any:
        out = function(*arguments, **(named or {}))
        if function not in (torch.topk, Tensor.topk):
            return out
        own_TK, recorded_TK = out.indices, self._recorded_TK
        same = (own_TK.sort(-1).values == recorded_TK.sort(-1).values).all(-1)
        replaced = (recorded_TK[:, 0] >= 0) & ~same
        self.different = replaced.sum()
        if not self._replay:
            return out
        chosen_TK = torch.where(replaced[:, None], recorded_TK, own_TK)
        scores = arguments[0] if arguments else named["input"]
        return torch.return_types.topk((scores.gather(-1, chosen_TK), chosen_TK))
