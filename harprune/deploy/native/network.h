/* SPDX-License-Identifier: Apache-2.0 */
/* A network as docs/artifact.md describes it. One that was read is sound: the planner and the
 * kernels check nothing again. */
#ifndef HARPRUNE_NETWORK_H
#define HARPRUNE_NETWORK_H

#include "json.h"
#include "work.h"

enum op { CONVOLUTION, AFFINE, RELU, SILU, CLIPPED, SUM, CONCATENATION, LARGEST, MEAN, FLATTEN };

struct shape {
    int64_t channels, height, width;
};

struct window {
    int64_t size[2], stride[2], padding[2], dilation[2], extra[2];
};

struct node {
    enum op op;
    int64_t *from, reads; /* the values it reads, and how many */
    struct window window;
    int64_t groups, full_area;
    struct json *name;
    int64_t filters, per_filter; /* of a convolution: and the weights of one */
    int64_t kept;
    int64_t *index;      /* where they are, ascending; NULL where none is zero */
    float *weights;
    float *scale, *shift; /* one for each channel it makes, or NULL; a bias is a shift */
};

struct network {
    int64_t count;        /* of nodes; node i makes value i + 1 */
    struct node *nodes;
    struct shape *shapes; /* of the values */
    int64_t (*borders)[2]; /* rows and columns of zeros around each that its readers see */
    int64_t output;
    struct json *classes;
};

/* The network in the `size` bytes of a file. Fails where anything in them is wrong. */
void hpn_read_network(struct work *w, const unsigned char *file, int64_t size, struct network *n);

#endif
