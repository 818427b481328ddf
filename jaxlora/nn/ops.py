"""The operations of a transformer layer: pure functions, most with a custom derivative.

JAX's own derivatives would keep more residuals for the backward pass, which costs memory and, on
CPU, time. Sums are float32. Matmul inputs have the requested dtype, and every matmul states its
precision, so that float32 is full float32 on accelerators, too (see `precision_of`).

The custom derivatives are reverse-mode (`jax.custom_vjp`): `jax.jvp`, `jax.jacfwd` and functions
based on them (`jax.hessian`, `jax.linearize`) raise a TypeError. For second derivatives use reverse
mode twice, as in `jax.jacrev(jax.jacrev(f))`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def precision_of(dtype: Any) -> jax.lax.Precision:
    """Return the precision of matmuls whose inputs have this dtype.

    By default GPUs round float32 inputs to TF32 and TPUs to bfloat16 (10 and 7 bits of mantissa
    instead of 23). To get that speed, use bfloat16 inputs.

    >>> precision_of(jnp.float32).name, precision_of(jnp.bfloat16).name
    ('HIGHEST', 'DEFAULT')
    """
    wide = jnp.dtype(dtype) == jnp.float32
    return jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """Compute `x Φ(x)` (Hendrycks & Gimpel 2016) with `erf`, which is cheaper on CPU than `erfc`.

    >>> round(gelu(jnp.array(1.0)).item(), 4)
    0.8413
    """
    return x * _normal_cdf(x)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * jnp.float32(0.5**0.5)))


def _gelu_backward(x: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # 1 − Φ(−x) instead of Φ(x), so that XLA does not keep the forward pass's erf as a residual.
    slope = (1 - _normal_cdf(-x)) + x * jnp.exp(-0.5 * x * x) * jnp.float32((2 * jnp.pi) ** -0.5)
    return (slope * grad,)


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def keep(shape: tuple[int, ...], rate: float, key: jax.Array) -> tuple[jax.Array, float]:
    """Return the mask of elements that dropout keeps, and the scale that preserves the mean.

    Random bits are a large part of a step on CPU, so each element gets only 8 bits: the rate is
    rounded to a multiple of 1/256 (0.1 becomes 26/256), and the scale matches the rounded rate.

    Args:
      shape: shape of the mask.
      rate: dropout rate; below 1/512 nothing is dropped, and rates above 255/256 count as 255/256.
      key: PRNG key.

    Returns:
      `bool[*shape]`, and the scale.

    >>> kept, scale = keep((400, 400), 0.1, jax.random.key(0))
    >>> bool(abs(kept.mean() - 230 / 256) < 0.01), round(scale, 4)
    (True, 1.113)
    """
    size = math.prod(shape)
    words = jax.random.bits(key, (-(-size // 4),), jnp.uint32)
    bits = jax.lax.bitcast_convert_type(words, jnp.uint8).reshape(-1)[:size].reshape(shape)
    dropped = min(round(rate * 256), 255)
    return bits >= dropped, 256 / (256 - dropped)


def dropout(x: jax.Array, rate: float, key: jax.Array) -> jax.Array:
    """Zero elements with probability `rate` and scale up the rest; see `keep`.

    >>> sorted(set(dropout(jnp.ones(64), 0.5, jax.random.key(0)).tolist()))
    [0.0, 2.0]
    """
    kept, scale = keep(x.shape, rate, key)
    return _thin_out(x, kept, scale)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, dtype: Any) -> jax.Array:
    """Compute `x w` with inputs in `dtype` and sums in float32, also in the backward pass.

    JAX's own derivative would multiply the float32 cotangent by the `dtype` kernel, at the speed of
    float32.

    Args:
      x: `[..., in]`.
      w: `[in, out]`.
      dtype: of the inputs of all three matmuls.

    Returns:
      `f32[..., out]`.
    """
    return jnp.matmul(
        x.astype(dtype),
        w.astype(dtype),
        precision=precision_of(dtype),
        preferred_element_type=jnp.float32,
    )


def _matmul_forward(x: jax.Array, w: jax.Array, dtype: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    # The backward pass reads the cast inputs; the empty arrays carry the original dtypes.
    kept = (x.astype(dtype), w.astype(dtype), jnp.zeros(0, x.dtype), jnp.zeros(0, w.dtype))
    return matmul(x, w, dtype), kept


def _matmul_backward(
    dtype: Any, kept: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, w, like_x, like_w = kept
    grad = grad.astype(dtype)
    lead = tuple(range(x.ndim - 1))
    exact: Any = {"precision": precision_of(dtype), "preferred_element_type": jnp.float32}
    dx = jnp.matmul(grad, w.T, **exact)
    dw = jnp.tensordot(x, grad, (lead, lead), **exact)
    return dx.astype(like_x.dtype), dw.astype(like_w.dtype)


matmul.defvjp(_matmul_forward, _matmul_backward)


def for_own_copy(compute: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Return `(shared, own, *args) → compute(shared, *args)`; the gradient of `shared` is `own`'s.

    `own` stands for one user's copy of `shared`, and its values are never read. Under `jax.vmap`,
    with an `own` for each task, all tasks use the same `shared` in both passes, and still get a
    gradient each. One of `args` must be mapped as well: else the tasks share even the result.

    >>> product = for_own_copy(jnp.multiply)
    >>> x = jnp.array([1.0, 2.0])
    >>> loss = lambda own: jax.vmap(product, (None, 0, 0))(jnp.float32(3), own, x).sum()
    >>> jax.grad(loss)(jnp.zeros(2)).tolist()
    [1.0, 2.0]
    """

    @jax.custom_vjp
    def call(shared: jax.Array, own: jax.Array, *args: jax.Array) -> jax.Array:
        del own
        return compute(shared, *args)

    def forward(shared: jax.Array, own: jax.Array, *args: jax.Array) -> tuple[jax.Array, Any]:
        del own
        return jax.vjp(compute, shared, *args)

    def backward(pull: Any, grad: jax.Array) -> tuple[jax.Array | None, ...]:
        of_shared, *of_args = pull(grad)
        return None, of_shared, *(None if g.dtype == jax.dtypes.float0 else g for g in of_args)

    call.defvjp(forward, backward)
    return call


def low_rank(x: jax.Array, a: jax.Array, b: jax.Array, dtype: Any) -> jax.Array:
    """Compute `x A B`, with matmul inputs in `dtype`.

    Args:
      x: `[..., in]`.
      a: `[in, r]`.
      b: `[r, out]`.
      dtype: dtype of the matmul inputs.

    Returns:
      `f32[..., out]`.
    """
    return matmul(matmul(x, a, dtype), b, dtype)


@partial(jax.custom_vjp, nondiff_argnums=(4,))
def low_rank_by_block(
    x: jax.Array, a: jax.Array, b: jax.Array, owner: jax.Array, dtype: Any
) -> jax.Array:
    """Compute `x A_t B_t`, where each block of tokens uses one of T adapters, at a cost without T.

    The factors of each block are gathered, and all blocks are multiplied in one batched matmul, as
    Punica's BGMV does for each token (Chen et al. 2023, "Punica", section 4). An adapter's gradient
    is summed over its blocks.

    Args:
      x: `[R, S, in]`.
      a: `[T, in, r]`.
      b: `[T, r, out]`.
      owner: `i32[R, S / block]`, the index of the adapter of each block of consecutive tokens.
      dtype: dtype of the matmul inputs.

    Returns:
      `f32[R, S, out]`.

    >>> a, b = jnp.ones((2, 3, 1)), jnp.array([[[1.0]], [[2.0]]])
    >>> low_rank_by_block(jnp.ones((1, 4, 3)), a, b, jnp.array([[0, 1]]), jnp.float32)[0, :, 0]
    Array([3., 3., 6., 6.], dtype=float32)
    """
    return _by_block_forward(x, a, b, owner, dtype)[0]


def _by_block_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, owner: jax.Array, dtype: Any
) -> tuple[jax.Array, tuple[Any, ...]]:
    blocks, flat = x.reshape(owner.size, -1, x.shape[-1]).astype(dtype), owner.ravel()
    own_a, own_b = a[flat].astype(dtype), b[flat].astype(dtype)
    inner = _product("bsi,bir->bsr", blocks, own_a).astype(dtype)
    outer = _product("bsr,bro->bso", inner, own_b)
    kept = (blocks, own_a, own_b, inner, flat, jnp.zeros(0, x.dtype), a, b)
    return outer.reshape(*x.shape[:-1], -1), kept


def _by_block_backward(
    dtype: Any, kept: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    blocks, own_a, own_b, inner, owner, like_x, a, b = kept
    lead, grad = grad.shape[:-1], grad.reshape(*blocks.shape[:2], -1).astype(dtype)
    dinner = _product("bso,bro->bsr", grad, own_b).astype(dtype)
    dx = _product("bsr,bir->bsi", dinner, own_a).reshape(*lead, -1)
    da = jax.ops.segment_sum(_product("bsi,bsr->bir", blocks, dinner), owner, len(a))
    db = jax.ops.segment_sum(_product("bsr,bso->bro", inner, grad), owner, len(b))
    return dx.astype(like_x.dtype), da.astype(a.dtype), db.astype(b.dtype), None


low_rank_by_block.defvjp(_by_block_forward, _by_block_backward)


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def low_rank_per_task(
    x: jax.Array,
    a: jax.Array,
    b: jax.Array,
    task: jax.Array,
    adapter_of_task: tuple[int, ...],
    dtype: Any,
) -> jax.Array:
    """Compute `x A_k B_k` with the adapter of each token's task; gradients are split by task.

    The K adapters of rank r are computed side by side, as one adapter of rank K·r of which a token
    uses r columns. Each task has its own copy of its adapter, even if tasks share one, and the
    gradient of a copy comes from its task's tokens only.

    Args:
      x: `[..., in]`.
      a: `[T, in, r]`; equal for tasks that share an adapter.
      b: `[T, r, out]`, likewise.
      task: `bool[..., T]`, one-hot task of each token; all False for padding.
      adapter_of_task: index of each task's adapter, from 0 to K - 1 in ascending order.
      dtype: dtype of the inputs of all matmuls.

    Returns:
      `f32[..., out]`.

    >>> a, b, task = jnp.ones((2, 3, 1)), jnp.array([[[1.0]], [[2.0]]]), jnp.eye(2, dtype=bool)
    >>> low_rank_per_task(jnp.ones((2, 3)), a, b, task, (0, 1), jnp.float32).tolist()
    [[3.0], [6.0]]
    """
    return _per_task_forward(x, a, b, task, adapter_of_task, dtype)[0]


def _per_task_forward(
    x: jax.Array, a: jax.Array, b: jax.Array, task: jax.Array,
    adapter_of_task: tuple[int, ...], dtype: Any,
) -> tuple[jax.Array, tuple[Any, ...]]:  # fmt: skip
    first = np.array([adapter_of_task.index(k) for k in dict.fromkeys(adapter_of_task)])
    wide_a = jnp.concatenate([a[t] for t in first], -1).astype(dtype)
    wide_b = jnp.concatenate([b[t] for t in first], -2).astype(dtype)
    inner = _only_own(matmul(x, wide_a, dtype), task, adapter_of_task).astype(dtype)
    likes = tuple(jnp.zeros(0, one.dtype) for one in (x, a, b))
    kept = (x.astype(dtype), wide_a, wide_b, inner, task, likes)
    return matmul(inner, wide_b, dtype), kept


def _only_own(side: jax.Array, task: jax.Array, adapter_of_task: tuple[int, ...]) -> jax.Array:
    """Zero all columns of `[..., K·r]` that do not belong to the token's adapter."""
    count = adapter_of_task[-1] + 1
    if count == 1:
        return side
    of_adapter = np.arange(count)[:, None] == np.array(adapter_of_task)
    own = jnp.stack([task[..., row].any(-1) for row in of_adapter], -1)
    parts = side.reshape(*side.shape[:-1], count, -1)
    return jnp.where(own[..., None], parts, 0).reshape(side.shape)


def _per_task_backward(
    adapter_of_task: tuple[int, ...], dtype: Any, kept: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    x, wide_a, wide_b, inner, task, (like_x, like_a, like_b) = kept
    grad, count = grad.astype(dtype), adapter_of_task[-1] + 1
    exact: Any = {"precision": precision_of(dtype), "preferred_element_type": jnp.float32}
    dinner = _only_own(jnp.matmul(grad, wide_b.T, **exact), task, adapter_of_task).astype(dtype)

    def per_task(thin: jax.Array, wide: jax.Array) -> jax.Array:
        """Return `[T, r, wide]` by one matmul for all tasks, with the thin side split by task."""
        thin = thin.reshape(*thin.shape[:-1], count, -1).sum(-2, dtype=dtype)
        parts = jnp.where(task[..., None], thin[..., None, :], jnp.zeros((), dtype))
        lead = tuple(range(wide.ndim - 1))
        return jnp.tensordot(parts, wide, (lead, lead), **exact)

    dx = jnp.matmul(dinner, wide_a.T, **exact).astype(like_x.dtype)
    da = per_task(dinner, x).swapaxes(1, 2).astype(like_a.dtype)
    return dx, da, per_task(inner, grad).astype(like_b.dtype), None


low_rank_per_task.defvjp(_per_task_forward, _per_task_backward)


@partial(jax.custom_vjp, nondiff_argnums=(5,))
def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array,
    kept: jax.Array | None = None,
    scale: float = 1.0,
    bias: jax.Array | None = None,
) -> jax.Array:
    """Compute `dropout(softmax(Q Kᵀ / √d + bias)) V` (Vaswani et al. 2017, section 3.2.1).

    Args:
      query: `[R, S, heads, d]`; its dtype is that of all matmul inputs.
      key: like `query`.
      value: like `query`.
      mask: `bool[R, 1, S, S]`, which tokens (last axis) a token attends to: at least one.
      kept: `bool[R, heads, S, S]`, which weights dropout keeps; None: all.
      scale: factor of the kept weights; see `keep`.
      bias: `f32[1, heads, S, S]`, added to the scores of every row; None: no bias.

    Returns:
      `f32[R, S, heads, d]`.

    >>> x = jnp.ones((1, 3, 2, 4))
    >>> attend(x, x, x, jnp.ones((1, 1, 3, 3), bool)).shape
    (1, 3, 2, 4)
    """
    return _attend_forward(query, key, value, mask, kept, scale, bias)[0]


def _attend_forward(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array,
    kept: jax.Array | None, scale: float, bias: jax.Array | None,
) -> tuple[jax.Array, tuple[Any, ...]]:  # fmt: skip
    scores = _product("rqhd,rkhd->rhqk", query, key) * query.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    weights = jax.nn.softmax(jnp.where(mask, scores, jnp.finfo(jnp.float32).min))
    used = _thin_out(weights, kept, scale).astype(value.dtype)
    y = _product("rhqk,rkhd->rhqd", used, value).swapaxes(1, 2)
    like_bias = None if bias is None else jnp.zeros(0, bias.dtype)
    return y, (query, key, value, weights.astype(value.dtype), kept, like_bias)


def _attend_backward(
    scale: float, saved: tuple[Any, ...], grad: jax.Array
) -> tuple[jax.Array | None, ...]:
    # Masked weights are 0, and so are the gradients of their scores.
    query, key, value, weights, kept, like_bias = saved
    dtype = query.dtype
    grad = grad.astype(dtype)
    dvalue = _product("rqhd,rhqk->rhdk", grad, _thin_out(weights, kept, 1.0)) * scale
    weights = weights.astype(jnp.float32)
    dweights = _thin_out(_product("rqhd,rkhd->rhqk", grad, value), kept, scale)
    dscores = weights * (dweights - jnp.sum(dweights * weights, -1, keepdims=True))
    dbias = None if like_bias is None else jnp.sum(dscores, 0, keepdims=True)
    dscores = (dscores * query.shape[-1] ** -0.5).astype(dtype)
    dquery = _product("rhqk,rkhd->rhqd", dscores, key).swapaxes(1, 2)
    dkey = _product("rqhd,rhqk->rhdk", query, dscores)
    back = tuple(jnp.moveaxis(x, -1, 1).astype(dtype) for x in (dkey, dvalue))
    return dquery.astype(dtype), *back, None, None, dbias


attend.defvjp(_attend_forward, _attend_backward)


def positions_after(tokens: jax.Array, positions: jax.Array, padding_idx: int) -> jax.Array:
    """Compute positions as RoBERTa does: from `padding_idx + 1`, without counting padding tokens.

    A padding token inside a sentence (if the text contains it literally) has the position
    `padding_idx`, and the tokens after it are numbered as if it were not there.

    Args:
      tokens: `i32[R, S]`, packed sentences.
      positions: `i32[R, S]`, counted from 0 within each sentence.
      padding_idx: the padding token's id, at least 0.

    Returns:
      `i32[R, S]`.

    >>> tokens, positions = jnp.array([[0, 7, 2, 0, 1, 2]]), jnp.array([[0, 1, 2, 0, 1, 2]])
    >>> positions_after(tokens, positions, 1).tolist()
    [[2, 3, 4, 2, 1, 3]]
    """
    padding = (tokens == padding_idx).astype(positions.dtype)
    before = jnp.cumsum(padding, -1, dtype=positions.dtype) - padding
    start = jnp.arange(tokens.shape[-1], dtype=positions.dtype)[None] - positions
    inside = before - jnp.take_along_axis(before, start, -1)
    return jnp.where(padding == 1, padding_idx, positions - inside + padding_idx + 1)


_FURTHEST = 128


def relative_buckets(length: int, count: int = 32) -> np.ndarray:
    """Assign the distances between a row's tokens to buckets (T5; Raffel et al. 2020, section 2.1).

    Half of the buckets are for tokens that follow. In each half, every short distance has its own
    bucket, distances up to 128 share the other buckets logarithmically, and the last of these also
    holds all larger ones.

    Args:
      length: S.
      count: number of buckets.

    Returns:
      `i64[S, S]`: bucket of the distance from the first axis's token to the second axis's.

    >>> relative_buckets(3).tolist()
    [[0, 17, 18], [1, 0, 17], [2, 1, 0]]
    """
    ahead = np.arange(length)[None] - np.arange(length)[:, None]
    half, exact = count // 2, count // 4
    distance = np.abs(ahead)
    ratio = np.log(np.maximum(distance, exact).astype(np.float32) / np.float32(exact))
    far = exact + (ratio / math.log(_FURTHEST / exact) * (half - exact)).astype(np.int64)
    near = np.where(distance < exact, distance, np.minimum(far, half - 1))
    return near + half * (ahead > 0)


def rotations(positions: jax.Array, size: int, theta: float) -> tuple[jax.Array, jax.Array]:
    """Compute the cosines and sines of rotary positions (Su et al. 2021, "RoFormer", section 3.2).

    Args:
      positions: `i32[R, S]`.
      size: d, the size of a head; even.
      theta: the base of the frequencies `theta^(-2i/d)`.

    Returns:
      Cosines and sines, `f32[R, S, 1, d]` each, for `rotate`.

    >>> rotations(jnp.zeros((2, 3), jnp.int32), 4, 1e4)[0].shape
    (2, 3, 1, 4)
    """
    exponents = np.arange(0, size, 2, dtype=np.float32) / np.float32(size)
    frequencies = np.tile(1 / np.float32(theta) ** exponents, 2)[None, None, None]
    angles = positions[..., None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: jax.Array, cosines: jax.Array, sines: jax.Array) -> jax.Array:
    """Rotate each pair `(x[i], x[i + d/2])` of a query or key `[R, S, heads, d]` by its angle.

    >>> x = jnp.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> [round(v, 2) for v in rotate(x, *rotations(jnp.array([[1]]), 2, 1e4)).ravel().tolist()]
    [0.54, 0.84]
    """
    first, second = jnp.split(x, 2, -1)
    return x * cosines + jnp.concatenate([-second, first], -1) * sines


def _product(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
    """Compute an einsum of two arrays of the same dtype, with float32 sums."""
    return jnp.einsum(
        spec, x, y, precision=precision_of(x.dtype), preferred_element_type=jnp.float32
    )


def _thin_out(x: jax.Array, kept: jax.Array | None, scale: float) -> jax.Array:
    return x if kept is None else jnp.where(kept, x * scale, jnp.zeros((), x.dtype))
