/* SPDX-License-Identifier: Apache-2.0 */
/* Sparse weights times dense activations: the steps that a plan is made of.
 *
 * Activations lie in blocks of as many images as a vector holds, the image innermost: a map is
 * [channel][row][column][image] with a border of zeros as wide as its readers reach. A kept weight
 * then costs one broadcast, and one multiply-add a position, all loads are aligned, and no position
 * needs a bounds check. A plan is an array of steps over two memories: the arena, with the maps, and
 * what the forward steps of a block keep for its backward steps: signs and slopes of activations and
 * the winners of poolings. Every place in them is a byte offset, every stride is counted in numbers.
 */
#ifndef HARPRUNE_BLOCKS_H
#define HARPRUNE_BLOCKS_H

#include <stdint.h>

#include "small.h"
#include "team.h"

enum kind {
    PACK,          /* images [n][c][h][w] -> map */
    UNPACK,        /* map -> images */
    CONVOLVE,      /* sparse convolution, or its gradient to the input on the transposed list */
    SCALE,         /* scale[c] x + shift[c], or a copy without both */
    MOMENTS,       /* per channel: sum of x, and of x y; y = x gives the sum of squares */
    COMBINE,       /* scale[c] x + shift[c] + slope[c] y, in the lanes that hold images */
    MAX_POOL,      /* largest of a window, and which it was */
    MAX_POOL_BACK,
    MEAN_POOL,     /* mean of a window over what lies inside the map, or over its full area */
    MEAN_POOL_BACK,
    SWISH,         /* x / (1 + exp(-x)), and its slopes */
    RELU6,         /* min(max(x, 0), 6), and its slopes */
    TIMES_SLOPES   /* x times what one of these left */
};

/* A map in the arena: the byte offset of channel 0, row 0, column 0, and strides in numbers. */
struct map {
    int64_t at, plane, row, column;
};

/* Filters of a layer and their kept weights: filter o owns entries starts[o] .. starts[o + 1]; with
 * `reaches`, REACHES such ranges, see below.
 * An entry is an int32 offset from the position's input, in numbers, and `width` values, one for
 * each of `width` filters that walk the list together (1, or 4 for layers that are nearly dense). */
struct list {
    const int64_t *starts;
    const int32_t *offsets;
    const void *values;
    int64_t width, reaches;
};

/* What a weight reaches of a small map: of its rows all but the first, all, or all but the last, and
 * the same of its columns. Where all of a layer's weights do, each filter's stand in that order. */
#define REACHES 9

struct step {
    int64_t kind;
    struct map in, second, out, other; /* `other` is added to the result */
    int64_t has_other;
    int64_t channels, height, width; /* of the output */
    int64_t rectify;      /* the result is clipped at zero, and its signs kept at `signs_out` */
    int64_t signs_out;    /* byte offsets, -1 for none */
    int64_t signs_in;     /* the result is set to zero where these signs say so */
    int64_t signs_plane, signs_row, signs_column; /* in positions, for both */
    struct list list;
    const void *scale, *shift, *slope; /* per output channel, or NULL */
    int64_t external;     /* which of the caller's arrays a step reads or writes */
    int64_t band;         /* rows of the output done for all channels before the next rows */
    int64_t in_height, in_width;          /* pooling: the map that the windows slide over */
    int64_t size_y, size_x, stride_y, stride_x, pad_y, pad_x, full_area;
    int64_t index;        /* max pooling: byte offset of the winners, one byte a number; of slopes, or
                             -1 for none */
};

/* One layer's gradient to its weights, summed over blocks `arena_stride` bytes apart. */
struct gradient {
    struct map in, out;
    int64_t height, width;
    const int64_t *starts; /* kept weights: the list of the forward step */
    const int32_t *offsets;
    int64_t band;          /* rows that all filters pass over before the next rows */
    int64_t per_group, window; /* all weights: filters, and offsets, of one group */
};

struct kernels {
    const char *name;
    int64_t number_bytes, sign_bytes; /* of a number; of the signs of one position */
    int64_t lanes, tile;              /* images of a block; vectors of sums at once */
    void (*run)(const struct step *steps, int64_t count, char *arena, char *kept,
                char *const *external, int64_t images);
    void (*kept_gradient)(const struct gradient *task, const char *arena, int64_t arena_stride,
                          int64_t blocks, int64_t first, int64_t last, void *result);
    void (*full_gradient)(const struct gradient *task, const char *arena, int64_t arena_stride,
                          int64_t blocks, int64_t first, int64_t last, void *result);
    void (*full_gradient_bf16)(const struct gradient *task, const char *arena,
                               int64_t arena_stride, int64_t blocks, int64_t first, int64_t last,
                               void *result);
    void (*run_rows)(const struct row_step *steps, int64_t count, char *arena,
                     char *const *external, int64_t images, struct team *team);
};

#endif
