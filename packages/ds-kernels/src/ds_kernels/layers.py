"""A transformer layer out of fused ops, for bidirectional (BERT) and causal (GPT) models."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .ops import bias_gelu

__all__ = ["TransformerConfig", "TransformerLayer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class TransformerConfig:
    """Settings of :class:`TransformerLayer`; those that DeepSpeed has, too, have its names.

    Example:
        >>> TransformerConfig(hidden_size=64, heads=4).inner_size
        256
    """

    hidden_size: int
    """Features of a token."""
    heads: int
    """Attention heads; they share ``hidden_size`` equally."""
    intermediate_size: int | None = None
    """Features between the two maps of the feed-forward part; None: 4 times ``hidden_size``."""
    attn_dropout_ratio: float = 0.0
    """Probability that an attention weight is dropped."""
    hidden_dropout_ratio: float = 0.0
    """Probability that an output of attention or feed-forward is dropped before it joins the residual."""
    num_hidden_layers: int = 1
    """Layers of the model, for ``adjust_init_range``."""
    initializer_range: float = 0.02
    """Standard deviation of the weights' initial values."""
    adjust_init_range: bool = True
    """Whether the maps into the residual begin smaller, by the root of twice ``num_hidden_layers``."""
    layer_norm_eps: float = 1e-12
    """Added to the variance in norms."""
    pre_layer_norm: bool = True
    """True: norms stand before attention and feed-forward (GPT-2); False: after each residual (BERT)."""
    gelu_checkpoint: bool = False
    """Whether the activation is computed again in the backward pass: one tensor of ``intermediate_size`` less is kept
    for each token, for one more pass over memory. Results are the same to the bit."""
    stochastic_mode: bool = False
    """True is refused: no kernel here is faster for giving up that results repeat."""
    causal: bool = False
    """Whether a token attends only to itself and those before it."""
    activation: str = "gelu"
    """``gelu``, ``gelu_tanh`` or ``swiglu``; the latter has two maps in, gate and value."""

    def __post_init__(self) -> None:
        if self.hidden_size % self.heads:
            raise ValueError(f"heads must divide hidden_size={self.hidden_size}; got {self.heads}")
        if self.activation not in ("gelu", "gelu_tanh", "swiglu"):
            raise ValueError(f"activation must be 'gelu', 'gelu_tanh' or 'swiglu'; got {self.activation!r}")
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.stochastic_mode:
            raise NotImplementedError(
                "stochastic_mode=True asks for kernels that are faster and whose results vary from run to run; no "
                "kernel here has such a variant, so it would change nothing; leave it out"
            )

    @property
    def inner_size(self) -> int:
        """Features between the two maps of the feed-forward part."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a norm, dropout and a residual.

    The activation with its bias is an op of this package; attention is torch's ``scaled_dot_product_attention``, and
    maps and norms are torch's. Parameters have the names, shapes and places of
    DeepSpeed's transformer layer, so that its weights load; with ``swiglu``, ``inter_w`` has the gate's rows first,
    then the value's.

    Args:
        config: Settings.

    Raises:
        NotImplementedError: For ``stochastic_mode``.

    Example:
        >>> layer = TransformerLayer(TransformerConfig(hidden_size=16, heads=2, causal=True))
        >>> layer(torch.zeros(3, 5, 16)).shape
        torch.Size([3, 5, 16])

    Reference:
        Ashish Vaswani and others, Attention Is All You Need, 2017. Ruibin Xiong and others, On Layer Normalization in
        the Transformer Architecture, 2020 (norms before). Noam Shazeer, GLU Variants Improve Transformer, 2020.
    """

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        hidden, inner = config.hidden_size, config.inner_size
        entries = 2 * inner if config.activation == "swiglu" else inner
        self.attn_qkvw, self.attn_qkvb = _map(hidden, 3 * hidden)
        self.attn_ow, self.attn_ob = _map(hidden, hidden)
        self.attn_nw, self.attn_nb = _norm(hidden)  # after attention
        self.inter_w, self.inter_b = _map(hidden, entries)
        self.output_w, self.output_b = _map(inner, hidden)
        self.norm_w, self.norm_b = _norm(hidden)  # before attention, or after feed-forward
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights anew: normal ones; biases 0, norms 1."""
        deviation = self.config.initializer_range
        into_residual = deviation
        if self.config.adjust_init_range:
            into_residual = deviation / math.sqrt(2 * self.config.num_hidden_layers)
        for weight in (self.attn_qkvw, self.inter_w):
            nn.init.normal_(weight, std=deviation)
        for weight in (self.attn_ow, self.output_w):
            nn.init.normal_(weight, std=into_residual)
        for scale in (self.attn_nw, self.norm_w):
            nn.init.ones_(scale)
        for bias in (self.attn_qkvb, self.attn_ob, self.attn_nb, self.inter_b, self.output_b, self.norm_b):
            nn.init.zeros_(bias)

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the next layer's hidden states.

        Args:
            hidden_states: ``[batch, tokens, hidden_size]``.
            attention_mask: Broadcastable to ``[batch, heads, tokens, tokens]``: bool, True where a token (row) sees
                another, or numbers to add to the scores, 0 or minus infinity; as BERT's ``[batch, 1, 1, tokens]``. With
                ``causal``, on top of that.

        Returns:
            Like ``hidden_states``.
        """
        x = hidden_states
        if self.config.pre_layer_norm:
            attended = self._attention(self._normalized(x, self.norm_w, self.norm_b), attention_mask)
            x = self._joined(attended, self.attn_ob, x)
            return self._joined(self._feed_forward(self._normalized(x, self.attn_nw, self.attn_nb)), self.output_b, x)
        x = self._joined(self._attention(x, attention_mask), self.attn_ob, x)
        x = self._normalized(x, self.attn_nw, self.attn_nb)
        x = self._joined(self._feed_forward(x), self.output_b, x)
        return self._normalized(x, self.norm_w, self.norm_b)

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the tokens see, mapped, without the map's bias."""
        config, (batch, tokens, hidden) = self.config, x.shape
        together = functional.linear(x, self.attn_qkvw, self.attn_qkvb)
        query, key, value = together.view(batch, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(
            query,
            key,
            value,
            _causal(mask, tokens) if config.causal and mask is not None else mask,
            dropout_p=config.attn_dropout_ratio if self.training else 0.0,
            is_causal=config.causal and mask is None,
        )
        return functional.linear(seen.transpose(1, 2).reshape(batch, tokens, hidden), self.attn_ow)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Return both maps, without the second one's bias."""
        inner = functional.linear(x, self.inter_w)
        if self.config.gelu_checkpoint and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._second_map, inner, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._second_map(inner)

    def _second_map(self, inner: Tensor) -> Tensor:
        if self.config.activation == "swiglu":
            gate, value = (inner + self.inter_b).chunk(2, dim=-1)
            return functional.linear(functional.silu(gate) * value, self.output_w)
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        return functional.linear(bias_gelu(inner, self.inter_b, approximate=approximate), self.output_w)

    def _joined(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        return residual + functional.dropout(x + bias, self.config.hidden_dropout_ratio, self.training)

    def _normalized(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.layer_norm(x, weight.shape, weight, bias, self.config.layer_norm_eps)


def _map(entries: int, exits: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(exits, entries)), nn.Parameter(torch.empty(exits))


def _norm(features: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(features)), nn.Parameter(torch.empty(features))


def _causal(mask: Tensor, tokens: int) -> Tensor:
    """Return ``mask`` less what lies ahead."""
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
