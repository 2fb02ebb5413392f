"""A transformer layer out of fused ops, for bidirectional (BERT) and causal (GPT) models."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from .ops import bias_dropout_residual, bias_gelu, bias_swiglu, layer_norm, masked_softmax_dropout, rms_norm

__all__ = ["TransformerConfig", "TransformerLayer"]

_logger = logging.getLogger(__package__)


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
    """Whether attention with dropout, too, is torch's ``scaled_dot_product_attention``, whose fused GPU kernels never
    hold the scores. Given up for it: which attention weights are dropped then depends on device, data type and shape,
    and no longer on the seed alone; and those kernels may add up gradients in an order that changes from run to run.
    Nothing else changes; without attention dropout, nothing at all. On a CPU nothing is won."""
    causal: bool = False
    """Whether a token attends only to itself and those before it."""
    activation: str = "gelu"
    """``gelu``, ``gelu_tanh`` or ``swiglu``; the latter has two maps in, gate and value."""
    norm: str = "layer_norm"
    """``layer_norm`` or ``rms_norm``; the latter has no biases."""

    def __post_init__(self) -> None:
        for name, size in (("hidden_size", self.hidden_size), ("heads", self.heads)):
            if size < 1:
                raise ValueError(f"{name} must be positive; got {size!r}")
        if self.hidden_size % self.heads:
            raise ValueError(f"heads must divide hidden_size={self.hidden_size}; got {self.heads}")
        if self.activation not in ("gelu", "gelu_tanh", "swiglu"):
            raise ValueError(f"activation must be 'gelu', 'gelu_tanh' or 'swiglu'; got {self.activation!r}")
        for name in ("attn_dropout_ratio", "hidden_dropout_ratio"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 0 and below 1; got {getattr(self, name)}")
        if self.norm not in ("layer_norm", "rms_norm"):
            raise ValueError(f"norm must be 'layer_norm' or 'rms_norm'; got {self.norm!r}")
        if self.stochastic_mode and self.attn_dropout_ratio == 0:
            _logger.warning("stochastic_mode=True has no effect with attn_dropout_ratio=0")

    @property
    def inner_size(self) -> int:
        """Features between the two maps of the feed-forward part."""
        return 4 * self.hidden_size if self.intermediate_size is None else self.intermediate_size


class TransformerLayer(nn.Module):
    """Attention and feed-forward, each with a norm, dropout and a residual.

    Everything but the maps and attention without dropout is ops of this package: norms, which take in the addition of
    the residual where nothing is dropped, biases with activations, and biases with dropout and residual. Attention is
    torch's ``scaled_dot_product_attention``; with dropout it is two products around ``masked_softmax_dropout``, which
    hold ``2 * heads * tokens**2`` numbers for each sequence until the backward pass, so that all masks follow from the
    seeds, which come from torch's generator (see ``ops/seeds.py``): ``stochastic_mode`` gives that up. Parameters have
    the names, shapes and places of DeepSpeed's transformer layer, so that its weights load; with ``swiglu``,
    ``inter_w`` has the gate's rows first, then the value's.

    Args:
        config: Settings.

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
        self.attn_nw, self.attn_nb = _norm(hidden, config.norm)  # after attention
        self.inter_w, self.inter_b = _map(hidden, entries)
        self.output_w, self.output_b = _map(inner, hidden)
        self.norm_w, self.norm_b = _norm(hidden, config.norm)  # before attention, or after feed-forward
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
            if bias is not None:
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

        Raises:
            ValueError: An argument is of another shape or kind.
        """
        self._check(hidden_states, attention_mask)
        x, mask, last_norm = hidden_states, attention_mask, (self.norm_w, self.norm_b)
        if self.config.pre_layer_norm:
            attended = self._attention(self._normalized(x, *last_norm)[0], mask)
            normalized, x = self._joined(attended, self.attn_ob, x, self.attn_nw, self.attn_nb)
            return self._added(self._feed_forward(normalized), self.output_b, x)
        x, _ = self._joined(self._attention(x, mask), self.attn_ob, x, self.attn_nw, self.attn_nb)
        return self._joined(self._feed_forward(x), self.output_b, x, *last_norm)[0]

    def _check(self, x: Tensor, mask: Tensor | None) -> None:
        if x.dim() != 3 or x.shape[-1] != self.config.hidden_size or not x.numel():
            raise ValueError(
                f"hidden_states must be [batch, tokens, {self.config.hidden_size}], none of them 0; got {list(x.shape)}"
            )
        if mask is None:
            return
        wanted = [x.shape[0], self.config.heads, x.shape[1], x.shape[1]]
        sizes = [1] * (len(wanted) - mask.dim()) + list(mask.shape)
        if mask.dim() > len(wanted) or any(size not in (1, want) for size, want in zip(sizes, wanted)):
            raise ValueError(
                f"attention_mask must be broadcastable to [batch, heads, tokens, tokens], {wanted}; got "
                f"{list(mask.shape)}; a mask [batch, tokens] of the tokens that are seen goes in as mask[:, None, None]"
            )
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"attention_mask must be bool, or of numbers to be added to the scores; got {mask.dtype}; where 1 "
                "stands for a token that is seen, pass mask.bool()"
            )

    def _attention(self, x: Tensor, mask: Tensor | None) -> Tensor:
        """Return what the tokens see, mapped into the residual."""
        config, (batch, tokens, hidden) = self.config, x.shape
        together = functional.linear(x, self.attn_qkvw, self.attn_qkvb)
        query, key, value = together.view(batch, tokens, 3, config.heads, -1).permute(2, 0, 3, 1, 4)
        p = config.attn_dropout_ratio if self.training else 0.0
        if p > 0 and not config.stochastic_mode:
            scale = 1 / math.sqrt(query.shape[-1])
            scores = query @ key.transpose(-2, -1)
            seen = masked_softmax_dropout(scores, mask, p=p, scale=scale, causal=config.causal) @ value
        else:
            joined = _causal(mask, tokens) if config.causal and mask is not None else mask
            is_causal = config.causal and mask is None
            seen = functional.scaled_dot_product_attention(query, key, value, joined, dropout_p=p, is_causal=is_causal)
        return self._mapped(seen.transpose(1, 2).reshape(batch, tokens, hidden), self.attn_ow, self.attn_ob)

    def _feed_forward(self, x: Tensor) -> Tensor:
        """Return both maps, the second one into the residual."""
        inner = functional.linear(x, self.inter_w)
        if self.config.gelu_checkpoint and torch.is_grad_enabled():
            again: Tensor = checkpoint(self._second_map, inner, use_reentrant=False, preserve_rng_state=False)
            return again
        return self._second_map(inner)

    def _second_map(self, inner: Tensor) -> Tensor:
        if self.config.activation == "swiglu":
            return self._mapped(bias_swiglu(inner, self.inter_b), self.output_w, self.output_b)
        approximate = "tanh" if self.config.activation == "gelu_tanh" else "none"
        activated = bias_gelu(inner, self.inter_b, approximate=approximate)
        return self._mapped(activated, self.output_w, self.output_b)

    # Into the residual. Where nothing is dropped, the map adds its bias and the norm adds the residual, for free; else
    # all three go together.

    def _drops(self) -> bool:
        return self.training and self.config.hidden_dropout_ratio > 0

    def _mapped(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return functional.linear(x, weight, None if self._drops() else bias)

    def _added(self, x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
        if self._drops():
            return bias_dropout_residual(x, bias, residual, self.config.hidden_dropout_ratio)
        return bias_dropout_residual(x, None, residual, 0.0)

    def _joined(
        self, x: Tensor, bias: Tensor, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the normalized sum of the map ``x`` and ``residual``, and that sum."""
        if self._drops():
            return self._normalized(self._added(x, bias, residual), norm_weight, norm_bias)
        return self._normalized(x, norm_weight, norm_bias, residual)

    def _normalized(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        eps = self.config.layer_norm_eps
        if self.config.norm == "rms_norm":
            return rms_norm(x, weight, residual=residual, eps=eps)
        return layer_norm(x, weight, bias, residual=residual, eps=eps)


def _map(entries: int, exits: int) -> tuple[nn.Parameter, nn.Parameter]:
    return nn.Parameter(torch.empty(exits, entries)), nn.Parameter(torch.empty(exits))


def _norm(features: int, kind: str) -> tuple[nn.Parameter, nn.Parameter | None]:
    return nn.Parameter(torch.empty(features)), nn.Parameter(torch.empty(features)) if kind == "layer_norm" else None


def _causal(mask: Tensor, tokens: int) -> Tensor:
    """Return ``mask`` less what lies ahead."""
    past = torch.ones(tokens, tokens, dtype=torch.bool, device=mask.device).tril()
    return mask & past if mask.dtype == torch.bool else mask.masked_fill(~past, -torch.inf)
