/* SPDX-License-Identifier: Apache-2.0 */
/* Steps on single images, forwards and backwards: rows of a map in vectors.
 *
 * A map is [channel][row][column]. A row takes whole vectors; where it is at most half a vector
 * wide, rows follow one another at a pitch of a power of two ("packed"), so a plane is a sequence
 * of full vectors either way. Zero rows part the planes, zero lanes fill up the rows. The kept
 * weights of a filter stand ordered by the horizontal displacement of their tap: the sum over one
 * displacement is formed on whole aligned columns of vectors, and moved sideways once. A weight
 * thus costs one broadcast and one multiply-add per vector.
 *
 * A strided layer reads a map that was split: channel c, rows y = i (mod stride) and columns
 * x = j (mod stride) form a plane of their own.
 *
 * A step is linear but for activations and the largest of a window. What these decide is kept in the
 * image's record: for a ReLU one bit a number, in vectors as the map's; for a window as many as it
 * has positions, by vector of the pooled map; for any other activation its slopes, in vectors as the
 * map's. Steps back read them, and give gradients to inputs.
 */
#ifndef HARPRUNE_ROWS_H
#define HARPRUNE_ROWS_H

#include <stdint.h>

#define ROW_LONGEST 4096 /* numbers of a row that is pooled */

enum row_kind {
    ROW_PACK,     /* images [n][c][h][w] -> map */
    ROW_UNPACK,   /* map -> images */
    ROW_CONVOLVE,
    ROW_SCALE,    /* scale[c] x + shift[c], or a copy without both */
    ROW_SPLIT,    /* into one plane for each phase of the strides, perhaps of another pitch */
    ROW_FLATTEN,  /* each number becomes a plane */
    ROW_MAX_POOL,
    ROW_MEAN_POOL,
    ROW_JOIN,     /* undoes a split */
    ROW_UNFLATTEN,
    ROW_MAX_SPREAD, /* each number to the position that won its window */
    ROW_MEAN_SPREAD, /* each number in equal parts to its window */
    ROW_SWISH,      /* x / (1 + exp(-x)), and its slopes */
    ROW_RELU6,      /* min(max(x, 0), 6), and its slopes */
    ROW_TIMES_SLOPES /* x times what one of these left */
};

/* How a convolution stores its sums: as they are, or as the step that alone would have read them,
 * where rows fill whole vectors: split for a stride of two, or pooled by windows of two by two. */
enum row_store { ROW_PLAIN, ROW_HALVED, ROW_POOLED };

/* A map in the arena: the byte offset of row 0 of channel 0, strides in numbers. Image i of those
 * that run together lies in copy i % copies. */
struct rows {
    int64_t at, plane, pitch, image, copies;
};

/* A horizontal displacement: whole vectors to the right (negative: to the left), lanes in [0, V)
 * on top of them, and in packed rows the lanes in which the result counts. */
struct displacement {
    int64_t vectors, lanes, mask;
};

struct row_step {
    int64_t kind;
    struct rows in, out, other; /* `other` is added to the result */
    int64_t has_other, rectify;
    int64_t channels, height, width; /* of the output; of the input where that is split, flattened */
    int64_t stored;                  /* enum row_store; unless plain, `lines` and `vectors` are those
                                        of the map that is not stored */
    int64_t together;                /* images that run through this step before the next step */
    int64_t lines, vectors;          /* of an output plane: rows, and vectors of each; packed: */
    int64_t packed;                  /* vectors, and one */
    const int64_t *masks;            /* lanes that hold numbers, per vector of a row (packed: of the
                                        plane); NULL where all do */
    /* Weights: filter group f, displacement d owns entries starts[f * displacements + d] on, of
     * `width` filters; see struct list. */
    const int64_t *starts;
    const int32_t *offsets;
    const void *values;
    int64_t list_width;
    const struct displacement *displacements;
    int64_t displaced;               /* how many; the displacement by nothing is the last */
    int64_t whole;                   /* rows of input and output are equally long, and short */
    int64_t in_vectors;              /* of a row of the input */
    const void *scale, *shift;       /* per output channel, or NULL */
    int64_t external;                /* which of the caller's arrays a step reads or writes */
    int64_t in_height, in_width;     /* pooling and spreading */
    int64_t size_y, size_x, stride_y, stride_x, pad_y, pad_x, full_area;
    int64_t record, record_bytes;    /* which array holds the images' records, bytes of one */
    int64_t signs_out, signs_in;     /* byte offsets in it, or -1: the result's signs are kept; the
                                        result is zero where these are not set */
    int64_t kept;                    /* the same of what won each window, or of slopes */
};

#endif
