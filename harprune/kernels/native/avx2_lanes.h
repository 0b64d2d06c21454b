/* SPDX-License-Identifier: Apache-2.0 */
INLINE signs signs_of(vec v) {
    return (signs)_mm256_movemask_ps(_mm256_cmp_ps((__m256)v, _mm256_setzero_ps(), _CMP_GT_OQ));
}
INLINE vec keep(vec v, signs bits) {
    const __m256i one = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(bits), one);
    return (vec)_mm256_and_ps((__m256)v, _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, one)));
}
INLINE vec larger(vec a, vec b) { /* of two that differ in kind the instruction takes b */
    const __m256 nan = _mm256_cmp_ps((__m256)a, (__m256)a, _CMP_UNORD_Q);
    return (vec)_mm256_blendv_ps(_mm256_max_ps((__m256)a, (__m256)b), (__m256)a, nan);
}
INLINE vec rectified(vec v) { return (vec)_mm256_max_ps(_mm256_setzero_ps(), (__m256)v); }
INLINE vec joined(vec a, vec b, int64_t k) {
    const __m256i lanes = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    const __m256i from = _mm256_add_epi32(lanes, _mm256_set1_epi32((int)k));
    const __m256 of_a = _mm256_permutevar8x32_ps((__m256)a, from);
    const __m256 of_b = _mm256_permutevar8x32_ps((__m256)b, from);
    const __m256i beyond = _mm256_cmpgt_epi32(from, _mm256_set1_epi32(7));
    return (vec)_mm256_blendv_ps(of_a, of_b, _mm256_castsi256_ps(beyond));
}
INLINE vec every_second(vec a, vec b, int first) {
    const __m256 pairs = first ? _mm256_shuffle_ps((__m256)a, (__m256)b, 0xdd)
                               : _mm256_shuffle_ps((__m256)a, (__m256)b, 0x88);
    return (vec)_mm256_permute4x64_pd(_mm256_castps_pd(pairs), 0xd8);
}
INLINE vec every_second_group(vec a, vec b, int first, const int P) {
    if (P == 1) return every_second(a, b, first);
    if (P == 2) {
        const __m256d pairs = first ? _mm256_shuffle_pd((__m256d)a, (__m256d)b, 0xf)
                                    : _mm256_shuffle_pd((__m256d)a, (__m256d)b, 0);
        return (vec)_mm256_permute4x64_pd(pairs, 0xd8);
    }
    return first ? (vec)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x31)
                 : (vec)_mm256_permute2f128_ps((__m256)a, (__m256)b, 0x20);
}
INLINE vec interleaved(vec a, vec b, int half, const int P) {
    __m256 low = (__m256)a, high = (__m256)b; /* P == 4: whole halves */
    if (P == 1) {
        low = _mm256_unpacklo_ps((__m256)a, (__m256)b);
        high = _mm256_unpackhi_ps((__m256)a, (__m256)b);
    } else if (P == 2) {
        low = _mm256_castpd_ps(_mm256_unpacklo_pd((__m256d)a, (__m256d)b));
        high = _mm256_castpd_ps(_mm256_unpackhi_pd((__m256d)a, (__m256d)b));
    }
    return half ? (vec)_mm256_permute2f128_ps(low, high, 0x31)
                : (vec)_mm256_permute2f128_ps(low, high, 0x20);
}
INLINE vec all_from(const real *p) { return all(*p); }
