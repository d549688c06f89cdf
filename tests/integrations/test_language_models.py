"""The curvature of language models by replay and by double backward."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
)

from cdat_torch import measure

VOCABULARY, WIDTH, LENGTH = 50, 16, 12


def gpt2(attention: str) -> PreTrainedModel:
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=LENGTH, n_embd=WIDTH, n_layer=2, n_head=2,
        bos_token_id=0, eos_token_id=1, attn_implementation=attention,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def bert(attention: str) -> PreTrainedModel:
    config = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, max_position_embeddings=LENGTH, attn_implementation=attention,
    )  # fmt: skip
    return BertForMaskedLM(config)


def llama(attention: str) -> PreTrainedModel:
    """With two query heads for each head of keys."""
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, intermediate_size=32, max_position_embeddings=LENGTH,
        attn_implementation=attention,
    )  # fmt: skip
    return LlamaForCausalLM(config)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_of", [gpt2, bert, llama])
def test_replay_agrees_with_double_backward(
    model_of: Callable[[str], PreTrainedModel], attention: str
) -> None:
    torch.manual_seed(0)
    model = model_of(attention).double().eval()
    tokens = torch.arange(2 * LENGTH).view(2, LENGTH) * 7 % VOCABULARY
    params = list(model.parameters())
    u = [torch.randn_like(p) for p in params]

    def loss() -> torch.Tensor:
        return model(input_ids=tokens, labels=tokens).loss

    found = measure(loss, params, u, curvature="replay")
    expected = measure(loss, params, u, curvature="hvp")
    # the models themselves compute norms and losses in single precision
    torch.testing.assert_close(found.slope, expected.slope, rtol=1e-5, atol=0)
    torch.testing.assert_close(found.curvature, expected.curvature, rtol=1e-5, atol=0)
