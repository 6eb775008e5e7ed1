"""The Phi-3 network with int8 or int4 weights, computed by the compiled kernels: same calls as phi3.py's.

Owns: the description of the network for the kernels, and the checks that keep them from reading or writing where they
must not. Knows nothing of sessions, scheduling or sampling; the arithmetic is in ops/.
"""

from __future__ import annotations

import ctypes
import weakref
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from phi_cluster.model.config import Phi3Config
from phi_cluster.model.kv_layout import KVCacheLayout
from phi_cluster.model.ops.library import CHUNK, KV_KINDS, LINEAR_KINDS, LinearC, NetworkC, Ops
from phi_cluster.model.phi3 import SequenceChunk
from phi_cluster.model.rope import Rope

_LINEARS = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


class QuantizedPhi3ForCausalLM:
    """The network, its threads and its workspace: for one caller at a time.

    A sequence's logits are the same bits whatever else is in the step, however its tokens are cut into chunks, and on
    any number of threads.
    """

    def __init__(
        self,
        config: Phi3Config,
        weights: Mapping[str, Tensor],
        kv_layout: KVCacheLayout,
        kv_cache_dtype: str,
        activation_dtype: str,
        ops: Ops,
        num_threads: int,
    ):
        """`weights` as packed by quantize.py (views on read-only memory, kept alive here); all chunks' KV caches must
        have `kv_layout`, with numbers of `kv_cache_dtype` (bfloat16 or int8). Rows that meet int8 weights are rounded
        to `activation_dtype`: int16, or int8 in groups; rows that meet int4 weights always are int8. Raises ValueError
        if these do not fit each other or the network, and MemoryError.
        """
        numbers = {"bfloat16": (2, 0), "int8": (1, 4)}.get(kv_cache_dtype, (0, 0))
        if (kv_layout.itemsize, kv_layout.scale_nbytes) != numbers:
            raise ValueError(f"the KV layout is not for {kv_cache_dtype}")
        if kv_layout != KVCacheLayout.for_config(config, kv_layout.max_model_len, *numbers):
            raise ValueError("the KV layout is not the network's")
        if activation_dtype not in ("int16", "int8"):
            raise ValueError(f"activations of {activation_dtype} do not meet int8 weights")
        self.config = config
        self.rope = Rope(config)
        self._kv_layout = kv_layout
        self._ops = ops
        # Whatever the description points to.
        self._kept: list[object] = [weights]
        description = self._describe(config, weights, kv_layout, kv_cache_dtype, activation_dtype)
        self._handle: int | None = ops.c.phi_network_create(ctypes.byref(description), ops.isa.encode(), num_threads)
        if self._handle is None:
            raise MemoryError("no memory for the network's workspace")
        self._finalizer = weakref.finalize(self, ops.c.phi_network_destroy, self._handle)
        self._logits: NDArray[np.float32] = np.empty((0, config.vocab_size), np.float32)

    def close(self) -> None:
        """Ends the threads. Whoever uses the network after that gets RuntimeError. Idempotent."""
        self._finalizer()
        self._handle = None

    @property
    def _network(self) -> int:
        """The kernels' network; its memory is gone once it is closed."""
        if self._handle is None:
            raise RuntimeError("the network is closed")
        return self._handle

    @property
    def progress(self) -> int:
        """Grows with every layer computed; another thread may look at it during a step."""
        return int(self._ops.c.phi_network_progress(self._network))

    def forward(self, chunks: Sequence[SequenceChunk]) -> Tensor:
        """float32 [sum of num_logits, vocab_size]: the logits after each chunk's last `num_logits` tokens, in memory
        that the next call overwrites.

        Writes the chunks' rows into their caches first and then attends to the stored rows. Raises ValueError for an
        empty chunk, one that its cache has no room for, or a token id that is not the network's.
        """
        table = np.zeros(len(chunks), CHUNK)
        for row, chunk in zip(table, chunks, strict=True):
            n = len(chunk.token_ids)
            if n == 0 or chunk.start < 0 or chunk.start + n > self._kv_layout.max_model_len:
                raise ValueError(
                    f"a chunk of {n} tokens at {chunk.start} does not fit a KV cache of "
                    f"{self._kv_layout.max_model_len} tokens"
                )
            if not 0 <= chunk.num_logits <= n:
                raise ValueError(f"{chunk.num_logits} logits are asked of a chunk of {n} tokens")
            if chunk.kv_cache.layout != self._kv_layout:
                raise ValueError("a chunk's KV cache has another layout than the network's")
            row["kv"] = chunk.kv_cache.address
            row["start"], row["num_tokens"] = chunk.start, n
            row["num_logits"], row["long_rope"] = chunk.num_logits, chunk.long_rope
        token_ids = torch.cat([chunk.token_ids for chunk in chunks]).numpy()
        if token_ids.min() < 0 or token_ids.max() >= self.config.vocab_size:
            raise ValueError(f"token ids from {token_ids.min()} to {token_ids.max()} are not all the network's")
        token_ids = token_ids.astype(np.int32)
        num_rows = int(table["num_logits"].sum())
        if len(self._logits) < num_rows:
            self._logits = np.empty((num_rows, self.config.vocab_size), np.float32)
        failed = self._ops.c.phi_network_forward(
            self._network, table.ctypes.data, len(table), token_ids.ctypes.data, self._logits.ctypes.data
        )
        if failed:
            raise MemoryError(f"no memory for a step of {len(token_ids)} tokens")
        return torch.from_numpy(self._logits[:num_rows])

    def forward_all(self, chunk: SequenceChunk) -> Tensor:
        """float32 [n, vocab_size]: the logits after each token of one chunk; otherwise as `forward`."""
        whole = SequenceChunk(chunk.token_ids, chunk.start, chunk.kv_cache, chunk.long_rope, len(chunk.token_ids))
        return self.forward([whole])

    def draw(self, rows: NDArray[np.void]) -> None:
        """The sampler's draws on the network's threads (sampler.DrawRows)."""
        self._ops.c.phi_network_sample(self._network, rows.ctypes.data, len(rows))

    def _describe(
        self,
        config: Phi3Config,
        weights: Mapping[str, Tensor],
        layout: KVCacheLayout,
        kv_cache_dtype: str,
        activation_dtype: str,
    ) -> NetworkC:
        layers = [f"model.layers.{i}" for i in range(config.num_hidden_layers)]
        norm_names = [
            f"{layer}.{name}" for layer in layers for name in ("input_layernorm", "post_attention_layernorm")
        ] + ["model.norm"]
        norms = (ctypes.c_void_p * len(norm_names))(*(weights[f"{name}.weight"].data_ptr() for name in norm_names))
        linear_names = [f"{layer}.{name}" for layer in layers for name in _LINEARS] + ["lm_head"]
        attention = config.num_attention_heads * config.head_dim
        key_values = 2 * config.num_key_value_heads * config.head_dim
        shapes = [
            (attention + key_values, config.hidden_size),
            (config.hidden_size, attention),
            (2 * config.intermediate_size, config.hidden_size),
            (config.hidden_size, config.intermediate_size),
        ] * len(layers) + [(config.vocab_size, config.hidden_size)]
        linears = (LinearC * len(linear_names))()
        int8_kind = LINEAR_KINDS["int8", activation_dtype]
        for linear, name, (n, k) in zip(linears, linear_names, shapes, strict=True):
            weight = weights[f"{name}.weight"]
            linear.weight, linear.scale = weight.data_ptr(), weights[f"{name}.scale"].data_ptr()
            linear.n, linear.k = n, k
            linear.kind = LINEAR_KINDS["uint8", "int8"] if weight.dtype == torch.uint8 else int8_kind
        frequencies = [self.rope.inv_freq[regime].contiguous() for regime in ("short", "long")]
        self._kept += [norms, linears, frequencies]
        return NetworkC(
            embed_tokens=weights["model.embed_tokens.weight"].data_ptr(),
            short_inv_freq=frequencies[0].data_ptr(),
            long_inv_freq=frequencies[1].data_ptr(),
            norms=norms,
            linears=linears,
            kv_region_nbytes=layout.region_nbytes,
            kv_row_nbytes=layout.row_nbytes,
            kv_kind=KV_KINDS[kv_cache_dtype],
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_hidden_layers,
            num_heads=config.num_attention_heads,
            num_kv_heads=config.num_key_value_heads,
            head_dim=config.head_dim,
            rotary_dim=config.rotary_dim,
            sliding_window=config.sliding_window or 0,
            rms_norm_eps=config.rms_norm_eps,
            attention_factor=self.rope.attention_factor,
        )
