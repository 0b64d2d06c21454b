/* SPDX-License-Identifier: Apache-2.0 */
/* What Python calls: the table of the best instruction set, and the lists of kept weights. */
#include "blocks.h"
#include <string.h>

extern const struct kernels harprune_plain, harprune_float64;
#if defined(__x86_64__)
extern const struct kernels harprune_avx2, harprune_avx512, harprune_avx512_bf16;
#endif

/* The table called `name`, or the best this processor runs where `name` is empty; NULL if none. */
const struct kernels *harprune_kernels(const char *name) {
    const struct kernels *known[5];
    int count = 0;
#if defined(__x86_64__)
    __builtin_cpu_init();
    int wide = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    if (wide && __builtin_cpu_supports("avx512bf16")) known[count++] = &harprune_avx512_bf16;
    if (wide) known[count++] = &harprune_avx512;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
        known[count++] = &harprune_avx2;
#endif
    known[count++] = &harprune_plain;
    known[count++] = &harprune_float64;
    for (int i = 0; i < count; i++)
        if (!*name || !strcmp(known[i]->name, name)) return known[i];
    return 0;
}

void harprune_run(const struct kernels *k, const struct step *steps, int64_t count, char *arena,
                  char *kept, char *const *external, int64_t images) {
    k->run(steps, count, arena, kept, external, images);
}

/* `team` may be NULL; else the caller is one of it. */
void harprune_run_rows(const struct kernels *k, const struct row_step *steps, int64_t count,
                       char *arena, char *const *external, int64_t images, struct team *team) {
    k->run_rows(steps, count, arena, external, images, team);
}

/* `which`: 0 kept weights, 1 all weights, 2 all weights in bf16. */
void harprune_gradient(const struct kernels *k, int64_t which, const struct gradient *task,
                       const char *arena, int64_t arena_stride, int64_t blocks, int64_t first,
                       int64_t last, void *result) {
    (which == 0 ? k->kept_gradient : which == 1 ? k->full_gradient : k->full_gradient_bf16)(
        task, arena, arena_stride, blocks, first, last, result);
}

int64_t harprune_step_bytes(void) { return sizeof(struct step); }
int64_t harprune_gradient_bytes(void) { return sizeof(struct gradient); }
int64_t harprune_row_step_bytes(void) { return sizeof(struct row_step); }
