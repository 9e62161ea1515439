"""Partials of one pool, and the combination of all, compiled.

Untyped, because numba compiles each function per argument types; shapes are those of
`server.kernels.partials`. Log-sum-exps and logits are in base 2.
"""

import numpy as np
from numba import njit, prange

from server.kernels.cpu_elements import FASTMATH, INNER, all_finite, power, store, widen
from server.kernels.cpu_tiles import dot, load_key


@njit(inline="always")
def shape(score, soft_cap, slope, distance):
    """A logit from its product, soft cap and ALiBi slope applied."""
    if soft_cap > 0:
        score = soft_cap * np.tanh(score / soft_cap)
    return score + slope * distance


@njit(inline="always")
def found_in(limit, head_dim):
    """Buffers for pools: `(log-sum-exp, mass, value sum)` of each query, a key and its value."""
    return (
        np.empty(limit, np.float32),
        np.empty(limit, np.float32),
        np.empty((limit, head_dim), np.float32),
        np.empty(head_dim, np.float32),
        np.empty(head_dim, np.float32),
    )


@njit(inline="always")
def measure(queries, seen, count, pages, table, kv, keys, numbers, found, weigh):
    """Mass of `keys` for each query, their bias included, and their value sum if `weigh`."""
    positions, first, slopes, _, bias = seen[2:7]
    lse, mass, value, k, v = found
    scale, cap, _ = numbers
    head_dim = v.shape[0]
    block = pages.shape[3] // head_dim
    for i in range(count):
        mass[i] = 0
        if weigh:
            for d in range(head_dim):
                value[i, d] = 0
    for key in keys:
        if key > positions[count - 1]:
            break
        page, j = table[key // block], key % block
        load_key(queries, pages[page, kv, 0], j, block, k)
        if weigh:
            for d in range(head_dim):
                v[d] = widen(pages[page, kv, 1, j * head_dim + d])
        for i in range(count):
            if key < first[i] or key > positions[i]:
                continue
            distance = np.float32(key - positions[i])
            x = shape(dot(queries, i, k) * scale, cap, slopes[i], distance) + bias[i] - lse[i]
            p = power(np.float32(0) if x > 0 else x)
            mass[i] += p
            if weigh:
                for d in range(head_dim):
                    value[i, d] += p * v[d]


@njit(inline="always")
def neutral(factors, pools):
    """Whether every pool and the rest keep what they have, and weights add nothing."""
    rest = factors.shape[0] - 1
    for column in range(rest + 1):
        if factors[column] != (np.float32(0) if pools <= column < rest else np.float32(1)):
            return False
    return True


@njit(fastmath=FASTMATH, error_model="numpy", cache=True)
def combine_serial(task, tasks, output, token, heads, value, factors, pools, computed, finite):
    """Every `tasks`-th row from `task` on; see `combine_parallel`."""
    x = np.empty(output.shape[2], np.float32)
    of = token, heads, value, factors, pools, computed
    _combine_rows(task, tasks, of, output, finite, x)


@njit(**INNER)
def _combine_rows(task, tasks, of, output, finite, x):
    token, heads, value, factors, pools, computed = of
    for r in range(task, token.shape[0], tasks):
        whole = computed.shape[0] > 0 and computed[r]
        for h in range(output.shape[1]):
            changes = heads[r, h] and not neutral(factors[r, h], pools)
            if not changes and not whole:
                continue
            row, columns = output[token[r], h], value.shape[2]
            for d in range(row.shape[0]):
                x[d] = np.float32(0) if columns else factors[r, h, 0] * widen(row[d])
            for column in range(columns):
                plain = np.float32(0 if pools <= column < columns - 1 else 1)
                factor = factors[r, h, column] if changes else plain
                for d in range(row.shape[0]):
                    x[d] += factor * value[r, h, column, d]
            if not all_finite(x):
                finite[r] = False
                if not whole:
                    continue
                x[:] = 0
            store(row, x)


@njit(parallel=True, cache=True)
def combine_parallel(threads, output, token, heads, value, factors, pools, computed, finite):
    """Sum the columns of the selected heads into `output`; without any, scale what is there.

    Columns from `pools` up to the last are weighted. Where the factors change nothing `output`
    keeps every bit: the sum would be rounded otherwise. Rows in bool `computed` `[rows]`, or empty,
    have no stock output: all heads are written. A result that is not finite is not written, there
    zero is, and clears the row's flag in `finite`.
    """
    for thread in prange(threads):
        given = token, heads, value, factors, pools, computed, finite
        combine_serial(np.int64(thread), threads, output, *given)
