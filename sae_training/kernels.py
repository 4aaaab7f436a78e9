"""CPU kernels of the sparse SAE step, compiled by Numba: only k of m features are read or written at a position.

Every kernel works on a range of rows or of features and releases the GIL, so that threads share a step; a result
does not depend on how many. Matrices are float32 and row-major, one feature a row: W_enc and W_dec are both [m, d].
Sparse activations are CSR: row i owns entries ptr[i] … ptr[i + 1] of `idx` (features) and `z` (activations).

Selection compares floats as integers of the same width: positive floats have the order of their bits, and negative
ones are negative integers, so one kernel serves float32 and bfloat16 (which NumPy does not know).
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np

exact: Any = numba.njit(nogil=True, cache=True, error_model="numpy")
# Sums may be reordered, which is what vectorisation needs; NaN and infinity keep their meaning.
summing: Any = numba.njit(nogil=True, cache=True, error_model="numpy", fastmath={"reassoc", "contract", "nsz"})

GROUP = 16  # strided pre-activations that share one maximum
ROOM = 160  # candidates beyond k that a row may have before they are thinned out
DROP = 12 / 128  # of an octave: how far below the last row's k-th value the next row's candidates begin


@exact
def _kth_largest(v, n, k):
    """Value of the k-th largest of v[:n], which is reordered (quickselect)."""
    low, high, wanted = 0, n - 1, k - 1
    while low < high:
        pivot, i, j = v[(low + high) >> 1], low, high
        while i <= j:
            while v[i] > pivot:
                i += 1
            while v[j] < pivot:
                j -= 1
            if i <= j:
                v[i], v[j] = v[j], v[i]
                i += 1
                j -= 1
        if wanted <= j:
            high = j
        elif wanted >= i:
            low = i
        else:
            break
    return v[wanted]


@exact
def _keep_largest(value, place, n, k, work):
    """Move the k largest of the first n candidates to the front, ties in their order; the k-th value."""
    for q in range(n):
        work[q] = value[q]
    kth = _kth_largest(work, n, k)
    ties = k
    for q in range(n):
        ties -= value[q] > kth
    kept = 0
    for q in range(n):
        if value[q] > kth or (value[q] == kth and ties > 0):
            ties -= value[q] == kth
            value[kept], place[kept] = value[q], place[q]
            kept += 1
    return kth


@exact
def _peaks(row, peak):
    """The largest of each GROUP of strided entries; reading in order lets all groups advance at once."""
    groups = len(row) // GROUP
    for b in range(groups):
        peak[b] = row[b]
    for q in range(1, GROUP):
        part = row[q * groups : (q + 1) * groups]
        for b in range(groups):
            peak[b] = max(peak[b], part[b])
    return groups


@exact
def _candidates(row, floor, k, value, place, work, peak):
    """Collect entries above `floor`, at least the k largest of them; how many."""
    groups = _peaks(row, peak)
    n = 0
    for b in range(groups):
        if peak[b] > floor:
            for q in range(GROUP):
                at = q * groups + b
                value[n], place[n] = row[at], at
                n += row[at] > floor
            if n + GROUP > len(value):
                floor = _keep_largest(value, place, n, k, work)
                n = k
    for at in range(groups * GROUP, len(row)):
        value[n], place[n] = row[at], at
        n += row[at] > floor
    return n


@exact
def top_k(pre, k, drop, idx, counts, value, place, work, peak):
    """The k largest positive entries of each row of `pre` (integers), written to `idx` back to back; how many.

    `drop` is DROP in units of the last place. `value`, `place`, `work` hold k + ROOM entries, `peak` m / GROUP + 1.
    """
    zero = value.dtype.type(0)
    floor = zero
    written = 0
    for r in range(pre.shape[0]):
        n = _candidates(pre[r], floor, k, value, place, work, peak)
        if n < k and floor > zero:  # the guess was too high
            n = _candidates(pre[r], zero, k, value, place, work, peak)
        floor = zero
        if n > k:
            floor = value.dtype.type(max(_keep_largest(value, place, n, k, work) - drop, 0))
            n = k
        for q in range(n):
            idx[written + q] = place[q]
        counts[r] = n
        written += n
    return written


@exact
def all_above(pre, floor, idx, counts, peak):
    """The entries of each row above `floor` (an integer ≥ 0), back to back; how many, or −1 if `idx` is too short."""
    written = 0
    for r in range(pre.shape[0]):
        row = pre[r]
        groups = _peaks(row, peak)
        if written + len(row) > len(idx):
            return -1
        n = written
        for b in range(groups):
            if peak[b] > floor:
                for q in range(GROUP):
                    at = q * groups + b
                    idx[n] = at
                    n += row[at] > floor
        for at in range(groups * GROUP, len(row)):
            idx[n] = at
            n += row[at] > floor
        counts[r] = n - written
        written = n
    return written


@summing
def activations(x, counts, idx, w_enc, b_enc, z):
    """z = ReLU(w_enc[j] · x + b_enc[j]) of every entry, in float32 whatever chose the entries."""
    at = 0
    for i in range(x.shape[0]):
        for _ in range(counts[i]):
            j = idx[at]
            dot = np.float32(0)
            for c in range(x.shape[1]):
                dot += x[i, c] * w_enc[j, c]
            z[at] = max(dot + b_enc[j], np.float32(0))
            at += 1


@summing
def reconstruct(target, ptr, idx, z, w_dec, b_dec, bounds, scale, first, last, r, dz, sse):
    """For rows first … last: gradients of scale/2 · Σ_s ‖x̂_s − target‖², and the squared errors, into `sse` [levels].

    x̂_s = b_dec + Σ z_j w_dec[j] over features below bounds[s]. r[s] [n, d] becomes the sum of the gradients at levels
    s and above, which is what a feature of level s sees; dz that of every activation (0 where z is 0).
    """
    levels, d = len(bounds), target.shape[1]
    for i in range(first, last):
        for s in range(levels):
            out = r[s, i]
            for c in range(d):
                out[c] = r[s - 1, i, c] if s > 0 else b_dec[c] - target[i, c]
            for p in range(ptr[i], ptr[i + 1]):
                j = idx[p]
                if j < bounds[s] and (s == 0 or j >= bounds[s - 1]):
                    for c in range(d):
                        out[c] += z[p] * w_dec[j, c]
            square = np.float32(0)
            for c in range(d):
                square += out[c] * out[c]
            sse[s] += square
        for s in range(levels - 1, -1, -1):
            out = r[s, i]
            for c in range(d):
                out[c] = scale * out[c]
            if s < levels - 1:
                for c in range(d):
                    out[c] += r[s + 1, i, c]
        for p in range(ptr[i], ptr[i + 1]):
            j = idx[p]
            s = 0
            while j >= bounds[s]:
                s += 1
            dot = np.float32(0)
            for c in range(d):
                dot += r[s, i, c] * w_dec[j, c]
            dz[p] = dot if z[p] != 0 else np.float32(0)


@exact
def _by_feature(rows, ptr, idx, first, last, start, row, entry):
    """Entries of features first … last, sorted by feature, then by row (counting sort)."""
    start[: last - first + 1] = 0
    for p in range(ptr[rows]):
        if first <= idx[p] < last:
            start[idx[p] - first + 1] += 1
    for j in range(last - first):
        start[j + 1] += start[j]
    for i in range(rows):
        for p in range(ptr[i], ptr[i + 1]):
            j = idx[p] - first
            if 0 <= j < last - first:
                row[start[j]], entry[start[j]] = i, p
                start[j] += 1
    for j in range(last - first, 0, -1):
        start[j] = start[j - 1]
    start[0] = 0


@summing
def _accumulate(x, r, z, dz, row, entry, begin, end, g_enc, g_dec):
    """Gradients of one feature's rows of W_enc and W_dec, and of its encoder bias."""
    bias = np.float32(0)
    for q in range(begin, end):
        i, p = row[q], entry[q]
        bias += dz[p]
        for c in range(x.shape[1]):
            g_dec[c] += z[p] * r[i, c]
        for c in range(x.shape[1]):
            g_enc[c] += dz[p] * x[i, c]
    return bias


@exact
def gradients(x, r, ptr, idx, z, dz, bounds, first, last, g_enc, g_dec, g_b, start, row, entry):
    """Gradients of W_enc, W_dec and b_enc for features first … last; `x` [n, d] is what the encoder read."""
    _by_feature(x.shape[0], ptr, idx, first, last, start, row, entry)
    s = 0
    for j in range(first, last):
        while j >= bounds[s]:
            s += 1
        g_enc[j] = 0
        g_dec[j] = 0
        g_b[j] = _accumulate(x, r[s], z, dz, row, entry, start[j - first], start[j - first + 1], g_enc[j], g_dec[j])


@summing
def unit_form(w_enc, b_enc, w_dec, first, last, e, b, u):
    """Rows of the same SAE with unit decoder rows: u = w_dec/n, e = n w_enc, b = n b_enc with n = ‖w_dec‖."""
    for j in range(first, last):
        square = np.float32(0)
        for c in range(w_dec.shape[1]):
            square += w_dec[j, c] * w_dec[j, c]
        n = np.sqrt(square)
        b[j] = n * b_enc[j]
        for c in range(w_dec.shape[1]):
            e[j, c] = n * w_enc[j, c]
            u[j, c] = w_dec[j, c] / n


@summing
def chain(w_enc, b_enc, w_dec, first, last, g_enc, g_dec, g_b):
    """Gradients with respect to (e, u, b) of `unit_form` become those with respect to w_enc, w_dec and b_enc; the sum
    of their squares."""
    total = 0.0
    for j in range(first, last):
        square, along, radial = np.float32(0), np.float32(0), g_b[j] * b_enc[j]
        for c in range(w_dec.shape[1]):
            square += w_dec[j, c] * w_dec[j, c]
            along += g_dec[j, c] * w_dec[j, c]
            radial += g_enc[j, c] * w_enc[j, c]
        n = np.sqrt(square)
        g_b[j] *= n
        norm = g_b[j] * g_b[j]
        for c in range(w_dec.shape[1]):
            g_enc[j, c] *= n
            g_dec[j, c] = (g_dec[j, c] + (radial - along / square) * w_dec[j, c]) / n
            norm += g_enc[j, c] * g_enc[j, c] + g_dec[j, c] * g_dec[j, c]
        total += norm
    return total


@summing
def adam(p, g, m, v, scale, lr, b1, b2, root, eps, first, last):
    """Adam (arXiv 1412.6980) with gradients scale · g on rows first … last; lr and root hold the bias corrections."""
    one = np.float32(1)
    for j in range(first, last):
        for c in range(p.shape[1]):
            slope = scale * g[j, c]
            m[j, c] = b1 * m[j, c] + (one - b1) * slope
            v[j, c] = b2 * v[j, c] + (one - b2) * slope * slope
            p[j, c] -= lr * m[j, c] / (np.sqrt(v[j, c]) * root + eps)
