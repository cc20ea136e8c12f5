"""head_of over families, and refusals where logits are something else."""

from types import MethodType
from typing import Any

import pytest
import torch
from support.small_models import SHAPE
from torch import Tensor, nn

transformers = pytest.importorskip("transformers")

from swirl_kernels.integrations import head_of  # noqa: E402

PLAIN = {k: v for k, v in SHAPE.items() if k != "head_dim"}
FAMILIES: dict[str, tuple[dict[str, Any], float, float | None]] = {  # settings, scale, soft-cap
    "Llama": ({}, 1.0, None),
    "Gemma2": ({"final_logit_softcapping": 4.0}, 1.0, 4.0),
    "Gemma3Text": ({"final_logit_softcapping": 30.0}, 1.0, 30.0),
    "Granite": ({"logits_scaling": 8.0}, 0.125, None),
    "Cohere": ({"logit_scale": 0.0625}, 0.0625, None),
    "HyperCLOVAX": ({"logits_scaling": 0.25}, 0.25, None),
    "Phi": (PLAIN, 1.0, None),
    "NanoChat": ({"final_logit_softcapping": 15.0}, 1.0, 15.0),
    "RecurrentGemma": ({"logits_soft_cap": 7.0, "block_types": ["attention"], "lru_width": 32}, 1.0, 7.0),
    "GPTNeoX": (PLAIN, 1.0, None),
}


def build(name: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    torch.manual_seed(0)
    settings = {**SHAPE, **FAMILIES[name][0], **more}
    config = getattr(transformers, f"{name}Config")(**settings)
    model = getattr(transformers, f"{name.removesuffix('Text')}ForCausalLM")(config)
    for parameter in model.parameters():
        if parameter.dim() == 1:  # biases that do something
            nn.init.normal_(parameter, 0.5, 0.3)
    return model.to(dtype)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
def test_head_is_found_and_gives_the_models_own_log_probabilities(name: str, dtype: torch.dtype) -> None:
    model = build(name, dtype).train()
    head = head_of(model)
    assert (head.logit_scale, head.softcap) == FAMILIES[name][1:]
    assert (head.bias is not None) == (name == "Phi")
    assert head.weight is model.get_output_embeddings().weight
    assert all(module.training for module in model.modules())
    model.eval()
    tokens = torch.randint(1, 97, (2, 9))
    with torch.no_grad():
        hidden = model.base_model(tokens).last_hidden_state[:, :-1].flatten(0, 1)
        logits = model(tokens).logits[:, :-1].flatten(0, 1).double()
        got = head.logprob(hidden, tokens[:, 1:].flatten(), temperature=0.7)
    expected = (logits / 0.7).log_softmax(-1).gather(1, tokens[:, 1:].flatten()[:, None])[:, 0]
    tolerance = 1e-5 if dtype == torch.float32 else 3e-2
    torch.testing.assert_close(got.double(), expected, rtol=tolerance, atol=tolerance)


def patched(change: Any, name: str = "Llama") -> Any:
    """A model whose logits pass through `change`, as a family that nobody knows yet would have it."""
    model = build(name)
    original = type(model).forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        out = original(self, *args, **kwargs)
        out.logits = change(out.logits)
        return out

    model.forward = MethodType(forward, model)
    return model


def soft(x: Tensor) -> Tensor:
    return 50 * torch.tanh(x / 50)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda x: 0.3 * x,
            r"small logits are 0\.3 times the product\)\. Use the model's own logits with selective_logprob",
        ),
        (soft, "off by .* of the largest logit"),
        (lambda x: x - x.amax(-1, keepdim=True), "its logits are not scale"),
        (lambda x: x[..., :-1], r"logits of shape \(3, 96\) from a weight of shape \(97, 32\)"),
        (lambda x: x.index_fill(-1, torch.tensor([5]), -float("inf")), "off by inf"),
    ],
)
def test_logits_of_an_unknown_form_are_refused(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        head_of(patched(change))


@pytest.mark.filterwarnings("ignore")
def test_models_without_a_plain_output_layer_are_refused() -> None:
    model = build("Llama")
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"]))
    assert head_of(adapted).weight is model.lm_head.weight
    on_head = peft.get_peft_model(build("Llama"), peft.LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match="LlamaForCausalLM has Linear as its output layer; head_of needs a plain"):
        head_of(on_head)
    with pytest.raises(ValueError, match="LlamaModel has no output layer"):
        head_of(model.model)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(model.config)
    with pytest.raises(ValueError, match="on meta; call head_of before"):
        head_of(empty)
    nn.init.zeros_(model.lm_head.weight)
    with pytest.raises(ValueError, match="weight is zero or not finite"):
        head_of(model)
