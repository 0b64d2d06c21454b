/* SPDX-License-Identifier: Apache-2.0 */
#define _GNU_SOURCE
#include "team.h"
#include <time.h>
#ifndef _WIN32
#include <sched.h>
#endif

#define READ(x) __atomic_load_n(&(x), __ATOMIC_RELAXED)
#define WRITE(x, value) __atomic_store_n(&(x), value, __ATOMIC_RELAXED)

static void pause(int64_t turns) {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
#ifndef _WIN32
    if (turns > 4096) sched_yield();
#else
    (void)turns;
#endif
}

static int64_t processor(void) {
#ifdef __linux__
    return sched_getcpu();
#else
    return -1;
#endif
}

void harprune_team_begin(struct team *t, char *arena, char *const *external, team_run run) {
    WRITE(t->arena, arena), WRITE(t->external, external), WRITE(t->run, run);
    WRITE(t->processor, processor());
}

int harprune_team_take(struct team *t) {
    int64_t ticket = __atomic_load_n(&t->ticket, __ATOMIC_ACQUIRE);
    const int64_t left = ticket % TEAM_PARTS, parts = READ(t->parts);
    if (!left) return 0;
    /* What is read here belongs to the turn of the ticket if that has not changed meanwhile. */
    const struct row_step *step = READ(t->step);
    char *arena = READ(t->arena);
    char *const *external = READ(t->external);
    const int64_t image = READ(t->image), images = READ(t->images);
    const team_run run = READ(t->run);
    if (__atomic_compare_exchange_n(&t->ticket, &ticket, ticket - 1, 0, __ATOMIC_ACQ_REL,
                                    __ATOMIC_RELAXED)) {
        run(step, arena, external, image, images, left - 1, parts);
        __atomic_add_fetch(&t->done, 1, __ATOMIC_RELEASE);
    }
    return 1;
}

void harprune_team_turn(struct team *t, const struct row_step *step, int64_t image, int64_t images) {
    WRITE(t->done, 0);
    WRITE(t->step, step), WRITE(t->image, image), WRITE(t->images, images);
    const int64_t turn = READ(t->ticket) / TEAM_PARTS + 1;
    __atomic_store_n(&t->ticket, turn * TEAM_PARTS + t->parts, __ATOMIC_RELEASE);
    while (harprune_team_take(t));
    for (int64_t turns = 0; __atomic_load_n(&t->done, __ATOMIC_ACQUIRE) < t->parts; turns++)
        pause(turns);
}

static int64_t nanoseconds(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return now.tv_sec * INT64_C(1000000000) + now.tv_nsec;
}

/* Help until there was nothing to do for `patience` nanoseconds. Schedulers leave two busy threads on
 * one processor for long, where they would only wait for each other; who sleeps wakes on a free one. */
void harprune_help(struct team *t, int64_t patience) {
    const struct timespec nap = {0, 50000};
    const unsigned mode = flush_small();
    int64_t last = nanoseconds();
    for (int64_t turns = 1; turns % 64 || nanoseconds() - last < patience; turns++) {
        const int64_t here = processor();
        if (here >= 0 && here == READ(t->processor)) {
            nanosleep(&nap, 0);
            turns |= 63; /* look at the time */
        } else if (harprune_team_take(t)) {
            while (harprune_team_take(t));
            last = nanoseconds();
        }
        pause(0);
    }
    restore_small(mode);
}

int64_t harprune_team_bytes(void) { return sizeof(struct team); }
