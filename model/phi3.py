"""The Phi-3 network in plain torch: from token ids and KV caches to logits.

Owns: the arithmetic of the layers, under Hugging Face's parameter names. Knows nothing of sessions,
scheduling, sampling or text: a caller hands it chunks of sequences, each with the cache its keys and values
belong in.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_cache import KVCache
from phi_cluster.model.rope import Rope

# From this many rows on, widening a bfloat16 weight to float32 pays on a CPU without bfloat16 instructions
# (measured on AVX2: 5 times as fast at 128 rows, equal at 8), in blocks of 2 MiB, which stay in its cache.
_WIDEN_MIN_ROWS = 8
_WIDEN_NUMBERS = 1 << 19


@dataclass
class SequenceChunk:
    """Consecutive tokens of one sequence, for one step.

    `token_ids` is int64 [n], n >= 1; the first stands at absolute position `start`, and the cache holds the
    rows of all positions before it. `long_rope` says which of LongRoPE's regimes the WHOLE sequence is
    computed in. A sequence may have one chunk in a step. Logits are wanted after each of the last `num_logits`
    tokens, 0 to n.
    """

    token_ids: Tensor
    start: int
    kv_cache: KVCache
    long_rope: bool = False
    num_logits: int = 1


@dataclass
class _Attention:
    """What one chunk's attention needs in every layer, prepared once a step."""

    # Its rows among the step's tokens.
    rows: slice
    num_rows: int
    # For each layer: where this chunk's K and V go, [2, n, kv_heads, head_dim], and the keys and values
    # it attends to, each [1, kv_heads, keys, head_dim].
    writes: tuple[Tensor, ...]
    keys: tuple[Tensor, ...]
    values: tuple[Tensor, ...]
    # [n, keys], 0 where a query may look and -inf elsewhere; None where it may look everywhere.
    mask: Tensor | None


@dataclass
class _Layer:
    input_layernorm: Tensor
    qkv_proj: Tensor
    o_proj: Tensor
    post_attention_layernorm: Tensor
    gate_up_proj: Tensor
    down_proj: Tensor


class Phi3ForCausalLM:
    """The network. Holds weights and nothing else: any number of sequences may share it, also from several
    threads.

    `weights` maps Hugging Face's names (see checkpoint.expected_tensors) to tensors, which may be views on
    read-only shared memory. They are copied only if `device` or `dtype` (float32 or bfloat16) differ from
    theirs: upload once.
    """

    def __init__(
        self,
        config: Phi3Config,
        weights: Mapping[str, Tensor],
        dtype: torch.dtype,
        device: torch.device | str = "cpu",
    ):
        if dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"dtype is {dtype}: torch.float32 or torch.bfloat16 are expected")
        self.config = config
        self.dtype = dtype
        self.device = torch.device(device)
        # Grows with every layer computed; another thread may look at it during a step.
        self.progress = 0
        self.rope = Rope(config, self.device)
        self._widen = (
            self.device.type == "cpu" and dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported()
        )
        self._tall = self.device.type == "cpu" and dtype == torch.float32

        def weight(name: str) -> Tensor:
            return weights[f"{name}.weight"].to(device=self.device, dtype=dtype)

        self.embed_tokens = weight("model.embed_tokens")
        self.layers = []
        for i in range(config.num_hidden_layers):
            prefix = f"model.layers.{i}"
            self.layers.append(
                _Layer(
                    input_layernorm=weight(f"{prefix}.input_layernorm"),
                    qkv_proj=weight(f"{prefix}.self_attn.qkv_proj"),
                    o_proj=weight(f"{prefix}.self_attn.o_proj"),
                    post_attention_layernorm=weight(f"{prefix}.post_attention_layernorm"),
                    gate_up_proj=weight(f"{prefix}.mlp.gate_up_proj"),
                    down_proj=weight(f"{prefix}.mlp.down_proj"),
                )
            )
        self.norm = weight("model.norm")
        self.lm_head = self.embed_tokens if config.tie_word_embeddings else weight("lm_head")

    @torch.inference_mode()
    def forward(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """float32 [sum of num_logits, vocab_size]: the logits after the last `num_logits` tokens of each chunk, in
        order (an inference tensor: clone it to change it outside `torch.inference_mode`).

        Writes the chunks' rows into their caches first and then attends to the stored rows. Raises ValueError
        for an empty chunk, one that its cache has no room for, or one that has fewer tokens than `num_logits`.
        """
        hidden = self._hidden_states(chunks)
        wanted = _wanted_rows(chunks)
        if len(wanted) != hidden.shape[0]:
            hidden = hidden[torch.tensor(wanted, dtype=torch.int64, device=self.device)]
        return self._logits(hidden)

    @torch.inference_mode()
    def forward_all(self, chunk: SequenceChunk) -> Tensor:
        """float32 [n, vocab_size]: the logits after each token of one chunk, whatever its `num_logits`; otherwise as
        `forward`."""
        return self._logits(self._hidden_states([chunk]))

    def _hidden_states(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """[all chunks' tokens, hidden_size], before the last norm."""
        eps = self.config.rms_norm_eps
        attentions = self._prepare(chunks)
        cos, sin = self._cos_sin(chunks)
        hidden = F.embedding(torch.cat([chunk.token_ids for chunk in chunks]).to(self.device), self.embed_tokens)
        for i, layer in enumerate(self.layers):
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.input_layernorm, eps)
            qkv = self._linear(normed, layer.qkv_proj).contiguous()
            hidden += self._linear(self._attend(i, qkv, cos, sin, attentions), layer.o_proj)
            normed = F.rms_norm(hidden, hidden.shape[-1:], layer.post_attention_layernorm, eps)
            gate, up = self._linear(normed, layer.gate_up_proj).chunk(2, dim=-1)
            hidden += self._linear(F.silu(gate).mul_(up), layer.down_proj)
            # Several threads may count at once and lose some: it grows all the same.
            self.progress += 1
        return hidden

    def _attend(self, i: int, qkv: Tensor, cos: Tensor, sin: Tensor, attentions: list[_Attention]) -> Tensor:
        """Layer i's attention output [tokens, heads * head_dim] for `qkv` [tokens, (heads + 2 kv_heads) *
        head_dim], which is overwritten.
        """
        config = self.config
        num_heads, num_kv_heads, head_dim = (
            config.num_attention_heads,
            config.num_key_value_heads,
            config.head_dim,
        )
        qkv = qkv.view(-1, num_heads + 2 * num_kv_heads, head_dim)
        rotated = qkv[:, : num_heads + num_kv_heads, : config.rotary_dim]
        # x * cos + rotate_half(x) * sin, with the sign of rotate_half moved into sin (see _cos_sin).
        half_turned = rotated.roll(config.rotary_dim // 2, -1)
        rotated.mul_(cos).addcmul_(half_turned, sin)

        query = qkv[:, :num_heads]
        key_value = qkv[:, num_heads:].unflatten(1, (2, num_kv_heads)).transpose(0, 1)
        # Query heads that share a K/V head stand side by side.
        grouped = query.unflatten(1, (num_kv_heads, -1))
        outputs = []
        for attention in attentions:
            attention.writes[i].copy_(key_value[:, attention.rows])
            keys, values = attention.keys[i], attention.values[i]
            if attention.num_rows == 1:
                # A group's heads as if they were queries of one head: nothing is repeated, nothing is masked.
                output = F.scaled_dot_product_attention(grouped[attention.rows], keys, values)
                outputs.append(output.view(1, -1))
            else:
                output = F.scaled_dot_product_attention(
                    query[attention.rows].transpose(0, 1)[None],
                    keys,
                    values,
                    attn_mask=attention.mask,
                    enable_gqa=num_heads != num_kv_heads,
                )
                outputs.append(output[0].transpose(0, 1).flatten(1))
        return torch.cat(outputs) if len(outputs) > 1 else outputs[0]

    def _prepare(self, chunks: Sequence[SequenceChunk]) -> list[_Attention]:
        window = self.config.sliding_window
        attentions = []
        row = 0
        for chunk in chunks:
            n, start = len(chunk.token_ids), chunk.start
            end = start + n
            if n == 0 or start < 0 or end > chunk.kv_cache.layout.max_model_len:
                raise ValueError(
                    f"a chunk of {n} tokens at {start} does not fit a KV cache of "
                    f"{chunk.kv_cache.layout.max_model_len} tokens"
                )
            if not 0 <= chunk.num_logits <= n:
                raise ValueError(f"num_logits is {chunk.num_logits} for a chunk of {n} tokens")
            # Keys that no query of the chunk may see any more are not read.
            first = 0 if window is None else max(0, start - window + 1)
            rows = chunk.kv_cache.rows
            # [2 * layers, 1, kv_heads, keys, head_dim]
            stored = rows[:, first:end].transpose(1, 2).unsqueeze(1)
            attentions.append(
                _Attention(
                    rows=slice(row, row + n),
                    num_rows=n,
                    writes=rows[:, start:end].unflatten(0, (-1, 2)).unbind(0),
                    keys=stored[0::2].unbind(0),
                    values=stored[1::2].unbind(0),
                    mask=None if n == 1 else self._mask(start, end, first),
                )
            )
            row += n
        return attentions

    def _mask(self, start: int, end: int, first: int) -> Tensor:
        """[end - start, end - first]: 0 where the query at a position may see a key (its own and earlier
        ones, at most `sliding_window` in all), -inf elsewhere.
        """
        queries = torch.arange(start, end, device=self.device)[:, None]
        keys = torch.arange(first, end, device=self.device)
        hidden = keys > queries
        if self.config.sliding_window is not None:
            hidden |= keys <= queries - self.config.sliding_window
        return torch.zeros(hidden.shape, dtype=self.dtype, device=self.device).masked_fill_(hidden, float("-inf"))

    def _cos_sin(self, chunks: Sequence[SequenceChunk]) -> tuple[Tensor, Tensor]:
        """cos and sin [tokens, 1, rotary_dim] in the network's dtype; the first half of sin is negated."""
        positions = [torch.arange(chunk.start, chunk.start + len(chunk.token_ids)) for chunk in chunks]
        if len({chunk.long_rope for chunk in chunks}) == 1:
            groups = [(torch.cat(positions), chunks[0].long_rope)]
        else:
            groups = [(p, chunk.long_rope) for p, chunk in zip(positions, chunks, strict=True)]
        pairs = [self.rope.cos_sin(p.to(self.device), "long" if long else "short") for p, long in groups]
        cos = torch.cat([pair[0] for pair in pairs])[:, None].to(self.dtype)
        sin = torch.cat([pair[1] for pair in pairs])[:, None].to(self.dtype)
        sin[..., : self.config.rotary_dim // 2].neg_()
        return cos, sin

    def _logits(self, hidden: Tensor) -> Tensor:
        if not len(hidden):
            # Chunks of unfinished prefills only: the head is the largest matrix of a small network.
            return torch.empty((0, len(self.lm_head)), dtype=torch.float32, device=self.device)
        hidden = F.rms_norm(hidden, hidden.shape[-1:], self.norm, self.config.rms_norm_eps)
        return self._linear(hidden, self.lm_head).contiguous().float()

    def _linear(self, x: Tensor, weight: Tensor) -> Tensor:
        """x [n, in] times weight [out, in] transposed: [n, out], summed in float32. May be transposed in
        memory: a tall weight times a few columns is up to 3 times as fast as a few rows times a wide one
        (MKL, float32).
        """
        if self._widen and x.shape[0] >= _WIDEN_MIN_ROWS:
            columns = x.float().t()
            blocks = weight.split(max(1, _WIDEN_NUMBERS // weight.shape[1]))
            return torch.cat([torch.mm(block.float(), columns) for block in blocks]).to(x.dtype).t()
        if self._tall:
            return torch.mm(weight, x.t()).t()
        return F.linear(x, weight)


def _wanted_rows(chunks: Sequence[SequenceChunk]) -> list[int]:
    """Which of all chunks' tokens logits are wanted after."""
    wanted: list[int] = []
    end = 0
    for chunk in chunks:
        end += len(chunk.token_ids)
        wanted += range(end - chunk.num_logits, end)
    return wanted
