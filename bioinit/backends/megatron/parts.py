"""Parts that megatron-core 0.16 lacks where Transformer Engine is not installed.

Its own norms refuse a zero-centered weight, and its attention, rotary embedding and router ask for
the current CUDA device, so that not even a small model runs on a CPU. Each class here is the
original but for that; on a GPU the attention and the router are the original. Importing this module
imports megatron-core.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from bioinit.backends.megatron.world import imported

_transformer = "megatron.core.transformer"
DotProductAttention: Any = imported(f"{_transformer}.dot_product_attention").DotProductAttention
TopKRouter: Any = imported(f"{_transformer}.moe.router").TopKRouter
CAUSAL = imported(f"{_transformer}.enums").AttnMaskType.causal
RotaryEmbedding: Any = imported(
    "megatron.core.models.common.embeddings.rotary_pos_embedding"
).RotaryEmbedding

_Gpt: Any = imported("megatron.core.models.gpt").GPTModel
_Bert: Any = imported("megatron.core.models.bert.bert_model").BertModel

_MASKED = -10000.0
"""What Megatron puts in the place of a masked score: a row that is masked whole becomes even."""


class ZeroCenteredRMSNorm(nn.RMSNorm):
    """The weight is stored as its distance from one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self._scale(), self.eps).type_as(x)

    def _scale(self) -> torch.Tensor:
        return self.weight.float() + 1


class ZeroCenteredLayerNorm(nn.LayerNorm):
    """The weight is stored as its distance from one."""

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        scale = self.weight.float() + 1
        return F.layer_norm(x.float(), self.normalized_shape, scale, bias, self.eps).type_as(x)


class Norm:
    """The norm that a config asks for, as Megatron's specs construct one."""

    def __new__(cls, config: Any, hidden_size: int, eps: float = 1e-5, **_: Any) -> Any:
        """A LayerNorm or RMSNorm over ``hidden_size``."""
        kinds = {
            ("LayerNorm", False): nn.LayerNorm,
            ("LayerNorm", True): ZeroCenteredLayerNorm,
            ("RMSNorm", False): nn.RMSNorm,
            ("RMSNorm", True): ZeroCenteredRMSNorm,
        }
        kind = kinds[config.normalization, config.layernorm_zero_centered_gamma]
        return kind(hidden_size, eps=eps)


class Attention(DotProductAttention):  # type: ignore[misc]
    """Megatron's attention of plain torch operations, with a way for the CPU."""

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: torch.Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> torch.Tensor:
        if query.is_cuda or packed_seq_params is not None or attention_bias is not None:
            original: torch.Tensor = super().forward(
                query, key, value, attention_mask, attn_mask_type, attention_bias, packed_seq_params
            )
            return original
        shared = query.size(2) // key.size(2)
        q_BNSD = query.permute(1, 2, 0, 3)
        k_BNSD, v_BNSD = (
            t.repeat_interleave(shared, dim=2).permute(1, 2, 0, 3) for t in (key, value)
        )
        masked = self._masked(attention_mask, query.size(0), key.size(0), query.device)
        # Layer scaling divides the scores by the layer's number and multiplies them again.
        scale = self.softmax_scale * (self.scale_mask_softmax.scale or 1)
        bias = None
        if masked is not None:
            bias = torch.zeros((), dtype=query.dtype, device=query.device).where(~masked, _MASKED)
        dropout = self.attention_dropout.p if self.training else 0.0
        out_BNSD = F.scaled_dot_product_attention(
            q_BNSD, k_BNSD, v_BNSD, bias, dropout, scale=scale
        )
        return out_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _masked(
        self, given: torch.Tensor | None, queries: int, keys: int, device: torch.device
    ) -> torch.Tensor | None:
        """What a query must not see: a window comes before a mask, and that before the default."""
        ahead = (
            torch.arange(keys, device=device)
            - torch.arange(keys - queries, keys, device=device)[:, None]
        )
        window = self.scale_mask_softmax.window_size
        if window is not None:
            before, after = (keys if side == -1 else side for side in window)
            return (ahead < -before) | (ahead > after)
        if given is None and self.attn_mask_type == CAUSAL:
            return ahead > 0
        return given


class Rotary(RotaryEmbedding):  # type: ignore[misc]
    """Megatron's rotary embedding, computed where the hidden states are."""

    inv_freq: torch.Tensor

    def get_rotary_seq_len(self, *args: Any, **kwargs: Any) -> int:
        hidden = kwargs.get("transformer_input", args[2] if len(args) > 2 else None)
        if hidden is not None and hidden.device != self.inv_freq.device:
            self.inv_freq = self.inv_freq.to(hidden.device)
            type(self).forward.cache_clear()
        length: int = super().get_rotary_seq_len(*args, **kwargs)
        return length

    def get_emb(self, max_seq_len: int, offset: int = 0) -> torch.Tensor:
        freqs: torch.Tensor = self.get_freqs_non_repeated(max_seq_len, offset)
        if self.rotary_interleaved:
            return freqs.repeat_interleave(2, dim=-1)[:, None, None, :]
        return torch.cat((freqs, freqs), dim=-1)[:, None, None, :]


class Router(TopKRouter):  # type: ignore[misc]
    """Megatron's router, which leaves its weight where it is."""

    def gating(self, input: torch.Tensor) -> torch.Tensor:
        if input.is_cuda:
            logits: torch.Tensor = super().gating(input)
            return logits
        chosen = {"fp32": torch.float32, "fp64": torch.float64}
        dtype = chosen.get(self.config.moe_router_dtype, input.dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        return F.linear(input.to(dtype), self.weight.to(dtype), bias)


class _Stage:
    """Where two stages of a pipeline have the embedding, and neither has memory to send yet."""

    def setup_embeddings_and_output_layer(self) -> None:
        model: Any = self
        is_tied = model.share_embeddings_and_output_weights
        if not is_tied or model.config.pipeline_model_parallel_size == 1:
            super().setup_embeddings_and_output_layer()  # type: ignore[misc]
            return
        weight = model.shared_embedding_or_output_weight()
        if weight is not None:
            weight.is_embedding_or_output_parameter = True
            weight.shared_embedding = True
            if not model.pre_process:
                weight.shared = True


class GPTModel(_Stage, _Gpt):  # type: ignore[misc]
    """Megatron's, while it is constructed."""


class BertModel(_Stage, _Bert):  # type: ignore[misc]
    """Megatron's, while it is constructed."""


_INSTEAD: dict[type, type[nn.Module]] = {
    GPTModel: _Gpt,
    BertModel: _Bert,
    DotProductAttention: Attention,
    RotaryEmbedding: Rotary,
    TopKRouter: Router,
}


def adopt(model: nn.Module) -> None:
    """Let the parts of ``model`` be of the classes here.

    Megatron names most of them in its code and not in a spec, and its BERT compares the one in the
    spec with the original. So they are exchanged once they are constructed; they add no state.
    """
    for module in model.modules():
        instead = _INSTEAD.get(type(module))
        if instead is not None:
            module.__class__ = instead
