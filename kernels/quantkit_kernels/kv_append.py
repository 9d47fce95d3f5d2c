"""New keys and values into a cache, quantized on the way; the caches are those of kv_layout.py.

`kv_append` is the torch operator `quantkit::kv_append`: one kernel for keys and values on a GPU, plain torch elsewhere.
"""

from __future__ import annotations

import torch

from quantkit_kernels.kv_layout import (
    BLOCK,
    Layout,
    MaybeTensor,
    check_sequences,
    layout,
    named,
    pack_keys,
    pack_values,
    quantize,
    scale_strides,
    unpack_values,
)


def kv_append_reference(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    starts: torch.Tensor,
    block_table: MaybeTensor = None,
    counts: MaybeTensor = None,
) -> None:
    """Plain torch, one sequence after the other; arguments as of `kv_append`."""
    form = _check_append(k, v, k_cache, v_cache, k_scale, v_scale, starts, block_table, counts)
    capacity = form.length * (block_table.shape[1] if block_table is not None else 1)
    for b in range(k.shape[0]):
        start = int(starts[b])
        count = min(k.shape[2], capacity - start, int(counts[b]) if counts is not None else k.shape[2])
        if count <= 0:
            continue
        n = torch.arange(start, start + count, device=k.device)
        block = torch.arange(start // BLOCK, (start + count - 1) // BLOCK + 1, device=k.device)
        pages, block_pages = torch.full_like(n, b), torch.full_like(block, b)
        if block_table is not None:
            pages, block_pages = (
                block_table[b, n // form.length].long(),
                block_table[b, block * BLOCK // form.length].long(),
            )
        slot, row = n % form.length, block * BLOCK % form.length // BLOCK
        found = []
        for new, scale in ((k, k_scale), (v, v_scale)):
            x = new[b, :, :count].transpose(0, 1)  # (count, H, D)
            if form.number == "none":
                found.append(x.to(k_cache.dtype))
                continue
            fixed = scale[:, None] if scale is not None and form.scales == 1 else None
            codes, sizes, zeros = quantize(x, form.number, fixed=fixed, groups=form.groups)
            if scale is not None and sizes is not None:
                if zeros is not None:
                    sizes = sizes.view(torch.int32) | zeros.view(torch.int32) >> 16 & 0xFFFF
                scale[pages, :, slot] = sizes if zeros is not None else sizes[..., 0]
            found.append(codes)
        if form.number == "none":
            k_cache[pages, :, slot], v_cache[pages, :, slot] = found
            continue
        keys = pack_keys(found[0]) if form.number == "int4" else found[0]
        bytes_of = torch.int32 if form.number == "int4" else torch.uint8
        k_cache.view(bytes_of)[pages, :, slot] = keys.view(bytes_of)
        rows = unpack_values(
            v_cache.view(bytes_of)[block_pages, :, row].view(v_cache.dtype)[:, :, None]
        )  # (n, H, 16, D)
        tokens = rows.transpose(1, 2).flatten(0, 1).view(bytes_of).clone()
        tokens[start % BLOCK : start % BLOCK + count] = found[1].view(bytes_of)
        rows = tokens.view(v_cache.dtype).unflatten(0, (-1, BLOCK)).transpose(1, 2)
        v_cache.view(bytes_of)[block_pages, :, row] = pack_values(rows)[:, :, 0].view(bytes_of)


def _check_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    starts: torch.Tensor,
    block_table: MaybeTensor,
    counts: MaybeTensor,
) -> Layout:
    """What the cache is. Raises ValueError for shapes and dtypes that do not belong together."""
    form = layout(k_cache, v_cache, k_scale, v_scale)
    if k.dim() != 4 or k.shape != v.shape or k.dtype != v.dtype or not k.is_floating_point():
        raise ValueError(f"new keys are {named(k)}, values {named(v)}; expected float (B, H, L, D) of both")
    if k.shape[1] != form.heads or k.shape[3] != form.head_dim:
        raise ValueError(f"new keys are {named(k)}; the cache has {form.heads} heads of {form.head_dim} channels")
    check_sequences(k.shape[0], form, block_table, starts=starts, counts=counts)
    return form


@torch.library.custom_op("quantkit::kv_append", mutates_args=("k_cache", "v_cache", "k_scale", "v_scale"))
def kv_append(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: torch.Tensor | None,
    v_scale: torch.Tensor | None,
    starts: torch.Tensor,
    block_table: torch.Tensor | None = None,
    counts: torch.Tensor | None = None,
) -> None:
    """Writes new keys and values, quantized, into a cache: sequence b's tokens starts[b], starts[b] + 1, ...

    k, v          (B, H, L, D) float, the new ones; caches and scales as in the module's docstring
    starts        (B,) int32, tokens that each sequence has; what does not fit into the cache is left out
    block_table   (B, pages) int32, or None where the cache is dense. A page may come more than once (a ring), but
                  of what a call writes no two blocks of BLOCK tokens may be in one place
    counts        (B,) int32, how many of the L tokens each sequence has, or None for all of them
    """
    kv_append_reference(k, v, k_cache, v_cache, k_scale, v_scale, starts, block_table, counts)


@kv_append.register_fake
def _append_fake(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    starts: torch.Tensor,
    block_table: MaybeTensor = None,
    counts: MaybeTensor = None,
) -> None:
    _check_append(k, v, k_cache, v_cache, k_scale, v_scale, starts, block_table, counts)


@kv_append.register_kernel("cuda")
def append_kernel(
    k: torch.Tensor,
    v: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    k_scale: MaybeTensor,
    v_scale: MaybeTensor,
    starts: torch.Tensor,
    block_table: MaybeTensor = None,
    counts: MaybeTensor = None,
) -> None:
    """One launch for keys and values, a program a block of 16 tokens and a head."""
    form = _check_append(k, v, k_cache, v_cache, k_scale, v_scale, starts, block_table, counts)
    if k.numel() == 0:
        return
    from quantkit_kernels import _kv_layout as kernels

    k, v = (t if t.stride(3) == 1 else t.contiguous() for t in (k, v))
    keys = k_cache.view(torch.int8) if form.number == "fp8" else k_cache
    words = v_cache if form.number == "none" else v_cache.view(torch.int32)
    sizes = [keys if t is None else t for t in (k_scale, v_scale)]
    sizes_at = [scale_strides(form, t) for t in (k_scale, v_scale)]
    table = starts if block_table is None else block_table
    pages = 0 if block_table is None else block_table.shape[1]
    with torch.cuda.device_of(k):
        kernels.append[((k.shape[2] + BLOCK - 2) // BLOCK + 1, k.shape[1], k.shape[0])](
            k,
            v,
            keys,
            words,
            *sizes,
            table,
            starts,
            starts if counts is None else counts,
            k.shape[2],
            form.length * max(pages, 1),
            *k.stride()[:3],
            *v.stride()[:3],
            *keys.stride()[:3],
            *words.stride()[:3],
            *sizes_at[0],
            *sizes_at[1],
            table.stride(0),
            FORMAT=form.number,
            SCALES=form.scales,
            GROUPS=form.groups,
            PAGE=form.length if pages else 0,
            COUNTS=counts is not None,
            D=form.head_dim,
            BD=max(64, 1 << (form.head_dim - 1).bit_length()),
            num_warps=4,
            enable_fp_fusion=False,
        )
