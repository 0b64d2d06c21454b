/* SPDX-License-Identifier: Apache-2.0 */
/* No instruction set named: the compiler maps vectors of 16 bytes to SSE2, NEON or scalars. */
INLINE signs signs_of(vec v) {
    signs bits = 0;
    for (int i = 0; i < V; i++) bits |= (signs)((v[i] > 0) << i);
    return bits;
}
INLINE vec keep(vec v, signs bits) {
    for (int i = 0; i < V; i++) v[i] = bits >> i & 1 ? v[i] : 0;
    return v;
}
INLINE vec larger(vec a, vec b) {
    for (int i = 0; i < V; i++) a[i] = a[i] > b[i] || a[i] != a[i] ? a[i] : b[i];
    return a;
}
INLINE vec rectified(vec v) {
    for (int i = 0; i < V; i++) v[i] = v[i] < 0 ? 0 : v[i];
    return v;
}
INLINE vec joined(vec a, vec b, int64_t k) {
    real both[2 * V];
    memcpy(both, &a, sizeof a);
    memcpy(both + V, &b, sizeof b);
    memcpy(&a, both + k, sizeof a);
    return a;
}
INLINE vec every_second(vec a, vec b, int first) {
    vec found;
    for (int i = 0; i < V; i++) {
        const int from = 2 * i + first;
        found[i] = from < V ? a[from] : b[from - V];
    }
    return found;
}
INLINE vec every_second_group(vec a, vec b, int first, const int P) {
    vec found;
    for (int i = 0; i < V; i++) {
        const int from = (2 * (i / P) + first) * P + i % P;
        found[i] = from < V ? a[from] : b[from - V];
    }
    return found;
}
INLINE vec interleaved(vec a, vec b, int half, const int P) {
    vec found;
    for (int i = 0; i < V; i++) {
        const int from = i / (2 * P) * P + i % P + half * (V / 2);
        found[i] = i / P % 2 ? b[from] : a[from];
    }
    return found;
}
INLINE vec all_from(const real *p) { return all(*p); }
