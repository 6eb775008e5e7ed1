"""A session's keys and values as tensors, or as an address: views on memory that somebody else owns.

Owns: nothing but the views (and, without a buffer, private memory). Knows nothing of sessions, of segments'
headers, or of how many rows are valid: whoever runs a sequence keeps `num_computed_tokens`.
"""

from __future__ import annotations

import mmap

import torch

from phi_cluster.model.kv_layout import KVCacheLayout


class KVCache:
    """Keys and values of one sequence.

    `rows` is [2 * num_layers, max_model_len, num_kv_heads, head_dim] (K of layer 0, V of layer 0, K of
    layer 1, ...); `keys[i]` and `values[i]` are its [max_model_len, num_kv_heads, head_dim] views. int8 numbers
    have scales between them, so their `rows` are bytes, uint8 [2 * num_layers, max_model_len, row_nbytes], and
    there are no `keys` and `values`. A row that was never written may hold anything. The views keep `buffer`
    exported: drop the cache before the buffer is closed.
    """

    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]

    def __init__(
        self,
        layout: KVCacheLayout,
        dtype: torch.dtype,
        buffer: memoryview | mmap.mmap | bytearray | None = None,
        device: torch.device | str = "cpu",
    ):
        """Views on `buffer`, the KV area (writable; see KVCacheLayout), or on private memory that starts as
        zeros.

        On a `device` other than the CPU only private memory is possible. Raises ValueError if the buffer is
        read-only or smaller than the layout, if the sizes of dtype and layout differ, or if only one of them is
        for numbers with scales (int8 is).
        """
        if dtype.itemsize != layout.itemsize:
            raise ValueError(f"{dtype} has {dtype.itemsize} bytes, but the KV layout is for {layout.itemsize}")
        if (dtype == torch.int8) != (layout.scale_nbytes > 0):
            raise ValueError(f"the KV layout has scales of {layout.scale_nbytes} bytes, which does not fit {dtype}")
        self.layout = layout
        self.dtype = dtype
        self.device = torch.device(device)
        if self.device.type != "cpu":
            if buffer is not None:
                raise ValueError(f"a KV cache on {self.device} cannot lie in a buffer of the host")
            area = torch.zeros(layout.nbytes // dtype.itemsize, dtype=dtype, device=self.device)
        else:
            if buffer is None:
                # Unlike torch.zeros, this touches no page before a row is written.
                buffer = mmap.mmap(-1, layout.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            with memoryview(buffer) as view:
                if view.readonly:
                    raise ValueError("the KV buffer is read-only")
                if view.nbytes < layout.nbytes:
                    raise ValueError(f"the KV buffer has {view.nbytes} bytes, but the layout needs {layout.nbytes}")
            area = torch.frombuffer(buffer, dtype=dtype, count=layout.nbytes // dtype.itemsize)
        if layout.scale_nbytes:
            self.rows = area.view(torch.uint8).as_strided(
                (layout.num_regions, layout.max_model_len, layout.row_nbytes),
                (layout.region_nbytes, layout.row_nbytes, 1),
            )
            return
        row = layout.num_kv_heads * layout.head_dim
        self.rows = area.as_strided(
            (layout.num_regions, layout.max_model_len, layout.num_kv_heads, layout.head_dim),
            (layout.region_nbytes // dtype.itemsize, row, layout.head_dim, 1),
        )
        self.keys = self.rows[0::2].unbind(0)
        self.values = self.rows[1::2].unbind(0)

    @property
    def address(self) -> int:
        """Where the KV area begins in this process's (or the device's) memory, for as long as the cache lives."""
        return self.rows.data_ptr()

    def clear(self) -> None:
        """Overwrite every row with zeros. This touches all pages: an owner of shared memory punches them
        instead.
        """
        self.rows.zero_()
