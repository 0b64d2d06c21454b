/* SPDX-License-Identifier: Apache-2.0 */
#include "work.h"
#include "harprune.h"
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>

#define LINE 64
#define SMALL 65536

struct block {
    struct block *next;
};

void hpn_fail(struct work *w, const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(w->error, HPN_ERROR, format, arguments);
    va_end(arguments);
    longjmp(w->failed, 1);
}

static char *block(struct work *w, int64_t size) {
    /* calloc, for large zeroed memory costs nothing until it is touched. */
    struct block *b = (uint64_t)size < SIZE_MAX / 2 ? calloc(1, (size_t)size + 2 * LINE) : 0;
    if (!b) hpn_fail(w, "not enough memory for %lld bytes", (long long)size);
    b->next = w->held;
    w->held = b;
    return (char *)b + LINE + (LINE - (uintptr_t)b % LINE) % LINE;
}

void *hpn_take(struct work *w, int64_t count, int64_t size) {
    if (count < 0 || count > INT64_MAX / 4 / size) hpn_fail(w, "not enough memory");
    size = (count * size + LINE - 1) / LINE * LINE;
    if (size > SMALL / 4) return block(w, size);
    if (size > w->spare_size) w->spare = block(w, SMALL), w->spare_size = SMALL;
    char *found = w->spare;
    w->spare += size, w->spare_size -= size;
    return found;
}

void hpn_give_back(struct work *w) {
    while (w->held) {
        struct block *next = w->held->next;
        free(w->held);
        w->held = next;
    }
    w->spare_size = 0;
}
