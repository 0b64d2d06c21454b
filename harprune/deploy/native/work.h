/* SPDX-License-Identifier: Apache-2.0 */
/* Memory that is given back together, and one way out of any depth when a file is wrong. */
#ifndef HARPRUNE_WORK_H
#define HARPRUNE_WORK_H

#include <setjmp.h>
#include <stdint.h>

struct work {
    jmp_buf failed; /* where `hpn_fail` goes */
    char *error;    /* HPN_ERROR bytes */
    struct block *held;
    char *spare; /* what is left of the last block for small things */
    int64_t spare_size;
};

/* Write one line to `error` and leave through `failed`. */
_Noreturn void hpn_fail(struct work *w, const char *format, ...)
    __attribute__((format(printf, 2, 3)));

/* Zeroed memory on a cache line for `count` things of `size` bytes; fails where there is none. */
void *hpn_take(struct work *w, int64_t count, int64_t size);

void hpn_give_back(struct work *w);

#endif
