/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that share the steps of one image, or of a few.
 *
 * A turn is one step on images that go through it together. Whoever is there takes parts of it; the
 * thread that calls waits for parts that are taken, never for a helper who may not be awake yet. A
 * helper who comes late joins in the present turn.
 */
#ifndef HARPRUNE_TEAM_H
#define HARPRUNE_TEAM_H

#include "rows.h"
#include "small.h"

#define TEAM_PARTS 128 /* more than a turn has */

typedef void (*team_run)(const struct row_step *step, char *arena, char *const *external,
                         int64_t image, int64_t images, int64_t part, int64_t parts);

struct team {
    int64_t ticket; /* TEAM_PARTS * number of the turn + how many of its parts nobody has taken */
    int64_t done;   /* parts of the turn that are finished */
    int64_t parts;  /* of each turn */
    int64_t processor; /* on which the caller began, or -1 */
    /* The turn: */
    int64_t image, images;
    const struct row_step *step;
    char *arena;
    char *const *external;
    team_run run;
};

/* What the turns that follow run on. */
void harprune_team_begin(struct team *t, char *arena, char *const *external, team_run run);
/* Take a part of the present turn and do it; 0 where none is left. */
int harprune_team_take(struct team *t);
/* Give the team a turn and come back when it is done. */
void harprune_team_turn(struct team *t, const struct row_step *step, int64_t image, int64_t images);

#endif
