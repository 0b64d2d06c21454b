/* SPDX-License-Identifier: Apache-2.0 */
/* From a network to the kernels' steps over one block of images, as kernels/plan.py makes them:
 * a sum and a ReLU go into the step before them, and maps of one geometry share memory. */
#include "../../kernels/native/blocks.h"
#include "harprune.h"
#include "network.h"
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

const struct kernels *harprune_kernels(const char *name);

#define NUMBER ((int64_t)sizeof(float))
#define QUAD 4
#define NEARLY_DENSE 0.6  /* as in kernels/lists.py */
#define CACHE (1280 * 1024) /* as in kernels/runtime.py */
#define COPY (-1)

/* A node, or a copy of `source`, with the sum and the ReLU that follow it. */
struct fused {
    int64_t main, source, other, out; /* `other` is -1 for none */
    int rectify, alive;
};

struct buffer {
    struct shape shape;
    int64_t border[2], lanes, last, slot; /* `last` is the step that views it last */
};

/* Part of a buffer: from a channel on, in steps of `skip`. With `map`, a vector's memory read as the
 * map that it was flattened from. */
struct view {
    struct buffer *buffer;
    int64_t channel, skip[2];
    const struct shape *map;
};

struct planned {
    enum kind kind;
    struct shape shape;
    struct view in, out, other;
    int64_t external;
    int rectify;
    const struct node *node;
};

struct slot {
    struct buffer like; /* its geometry, and its channels the most */
    int64_t at;
    int free;
};

struct hpn {
    struct work work;
    struct network network;
    const struct kernels *kernels;
    unsigned char *file; /* while it is read */
    struct step *steps;
    char *arena, *winners;
    const char **classes;
    /* While it is planned. */
    struct buffer *buffers;
    struct planned *planned;
    struct slot *slots;
    int64_t count, slot_count, winner_bytes;
};

/* Steps -------------------------------------------------------------------------------------- */

static struct fused *open_step(struct fused *steps, const int64_t *made, const int64_t *readers,
                               const struct network *n, int64_t value) {
    struct fused *s = made[value] < 0 ? 0 : steps + made[value];
    if (!s || s->rectify || value == n->output || readers[value] > 1) return 0;
    const enum op op = s->main == COPY ? SUM : n->nodes[s->main].op;
    return op == CONVOLUTION || op == AFFINE || s->main == COPY ? s : 0;
}

/* One entry for each node; those that went into a later one are not alive. */
static struct fused *fuse(struct hpn *h) {
    const struct network *n = &h->network;
    struct fused *steps = hpn_take(&h->work, n->count + 1, sizeof *steps);
    int64_t *made = hpn_take(&h->work, n->count + 1, sizeof *made);
    int64_t *readers = hpn_take(&h->work, n->count + 1, sizeof *readers);
    made[0] = -1;
    for (int64_t i = 0; i < n->count; i++)
        for (int64_t j = 0; j < n->nodes[i].reads; j++) readers[n->nodes[i].from[j]]++;
    for (int64_t i = 0; i < n->count; i++) {
        const struct node *node = n->nodes + i;
        const int64_t *from = node->from;
        struct fused s = {i, from[0], -1, i + 1, 0, 1}, *before = 0;
        if (node->op == SUM) {
            /* Into the later of the two steps: what it adds is then there when it runs. */
            const int later = made[from[1]] > made[from[0]];
            before = open_step(steps, made, readers, n, from[later]);
            if (before && before->other >= 0) before = 0;
            s.other = from[before ? !later : 1];
        } else if (node->op == RELU) {
            before = open_step(steps, made, readers, n, from[0]);
            s.other = before ? before->other : -1;
            s.rectify = 1;
        }
        if (node->op == SUM || node->op == RELU) s.main = COPY;
        if (before) s.main = before->main, s.source = before->source, before->alive = 0;
        steps[i] = s;
        made[i + 1] = i;
    }
    return steps;
}

static struct view whole(struct hpn *h, int64_t value) {
    return (struct view){h->buffers + value, 0, {1, 1}, 0};
}

static struct planned *add(struct hpn *h, enum kind kind, struct shape shape) {
    struct planned *p = h->planned + h->count++;
    p->kind = kind, p->shape = shape, p->external = -1;
    return p;
}

static void add_concatenation(struct hpn *h, const struct node *node, int64_t out) {
    int64_t channel = 0;
    for (int64_t i = 0; i < node->reads; i++) {
        struct planned *p = add(h, SCALE, h->network.shapes[node->from[i]]);
        p->in = whole(h, node->from[i]);
        p->out = whole(h, out);
        p->out.channel = channel;
        channel += p->shape.channels;
    }
}

static void add_fused(struct hpn *h, const struct fused *s) {
    static const struct node NONE;
    const struct node *node = s->main == COPY ? &NONE : h->network.nodes + s->main;
    const enum op op = s->main == COPY ? RELU : node->op;
    if (op == CONCATENATION) {
        add_concatenation(h, node, s->out);
        return;
    }
    struct planned *p = add(h, SCALE, h->network.shapes[s->out]);
    p->in = whole(h, s->source);
    p->out = whole(h, s->out);
    p->node = node;
    p->rectify = s->rectify;
    if (s->other >= 0) p->other = whole(h, s->other);
    if (op == CONVOLUTION) {
        p->kind = CONVOLVE;
        memcpy(p->in.skip, node->window.stride, sizeof p->in.skip);
    } else if (op == LARGEST || op == MEAN) {
        p->kind = op == LARGEST ? MAX_POOL : MEAN_POOL;
    } else if (op == SILU || op == CLIPPED) {
        p->kind = op == SILU ? SWISH : RELU6;
    } else if (op == FLATTEN) {
        p->shape = h->network.shapes[s->source];
        p->out.map = h->network.shapes + s->source;
    }
}

static void plan(struct hpn *h) {
    const struct network *n = &h->network;
    const struct fused *steps = fuse(h);
    int64_t most = n->count + 2;
    for (int64_t i = 0; i < n->count; i++) most += n->nodes[i].reads;
    h->planned = hpn_take(&h->work, most, sizeof *h->planned);
    h->buffers = hpn_take(&h->work, n->count + 1, sizeof *h->buffers);
    for (int64_t i = 0; i <= n->count; i++)
        h->buffers[i] = (struct buffer){
            n->shapes[i], {n->borders[i][0], n->borders[i][1]}, h->kernels->lanes, 0, -1};
    struct planned *p = add(h, PACK, n->shapes[0]);
    p->out = whole(h, 0), p->external = 0;
    for (int64_t i = 0; i < n->count; i++)
        if (steps[i].alive) add_fused(h, steps + i);
    p = add(h, UNPACK, n->shapes[n->output]);
    p->in = whole(h, n->output), p->external = 1;
}

/* Memory ------------------------------------------------------------------------------------- */

static int64_t row_of(const struct buffer *b) {
    return (b->shape.width + 2 * b->border[1]) * b->lanes;
}

static int64_t plane_of(const struct buffer *b) {
    return (b->shape.height + 2 * b->border[0]) * row_of(b);
}

static int same_geometry(const struct buffer *a, const struct buffer *b) {
    return a->shape.height == b->shape.height && a->shape.width == b->shape.width &&
           !memcmp(a->border, b->border, sizeof a->border);
}

/* A slot that is free and of the same geometry, whose borders are zero already, or a new one. */
static int64_t slot_for(struct hpn *h, const struct buffer *b) {
    int64_t i = 0;
    while (i < h->slot_count && !(h->slots[i].free && same_geometry(&h->slots[i].like, b))) i++;
    if (i == h->slot_count) h->slots[h->slot_count++].like = *b;
    if (h->slots[i].like.shape.channels < b->shape.channels)
        h->slots[i].like.shape.channels = b->shape.channels;
    h->slots[i].free = 0;
    return i;
}

static void place_maps(struct hpn *h) {
    h->slots = hpn_take(&h->work, h->network.count + 1, sizeof *h->slots);
    for (int pass = 0; pass < 2; pass++)
        for (int64_t i = 0; i < h->count; i++) {
            struct planned *p = h->planned + i;
            struct buffer *viewed[] = {p->in.buffer, p->out.buffer, p->other.buffer};
            for (int j = 0; j < 3; j++)
                if (viewed[j] && !pass)
                    viewed[j]->last = i;
                else if (viewed[j] && viewed[j]->slot < 0)
                    viewed[j]->slot = slot_for(h, viewed[j]);
            for (int j = 0; j < 3 && pass; j++)
                if (viewed[j] && viewed[j]->last == i) h->slots[viewed[j]->slot].free = 1;
        }
    int64_t bytes = 0;
    for (int64_t i = 0; i < h->slot_count; i++) {
        const struct buffer *b = &h->slots[i].like;
        h->slots[i].at = bytes;
        bytes += b->shape.channels * plane_of(b) * NUMBER;
    }
    h->arena = hpn_take(&h->work, bytes, 1);
    h->winners = hpn_take(&h->work, h->winner_bytes, 1);
}

static struct map place_of(const struct hpn *h, const struct view *v) {
    struct map m = {0};
    if (!v->buffer) return m;
    const struct buffer *b = v->buffer;
    const int64_t origin = b->border[0] * row_of(b) + b->border[1] * b->lanes;
    m.plane = plane_of(b), m.row = row_of(b), m.column = b->lanes;
    if (v->map) {
        /* A position of the map is a channel of the vector, which has a border of its own. */
        m.column = m.plane;
        m.row = v->map->width * m.column;
        m.plane = v->map->height * m.row;
    }
    m.at = h->slots[b->slot].at + (origin + v->channel * m.plane) * NUMBER;
    m.row *= v->skip[0];
    m.column *= v->skip[1];
    return m;
}

/* Lists of kept weights ---------------------------------------------------------------------- */

/* For each place of a filter, its offset from the output position's input. */
static int32_t *window_offsets(struct hpn *h, const struct node *n, const struct buffer *read) {
    const struct window *w = &n->window;
    int32_t *offsets = hpn_take(&h->work, n->per_filter, sizeof *offsets);
    for (int64_t i = 0; i < n->per_filter; i++) {
        const int64_t k = i % w->size[1], l = i / w->size[1] % w->size[0];
        const int64_t channel = i / (w->size[0] * w->size[1]);
        offsets[i] = (int32_t)(channel * plane_of(read) +
                               (l * w->dilation[0] - w->padding[0]) * row_of(read) +
                               (k * w->dilation[1] - w->padding[1]) * read->lanes);
    }
    return offsets;
}

/* Four filters walk one list together, zeros included. */
static struct list quads(struct hpn *h, const struct node *n, const int32_t *offsets) {
    const int64_t groups = n->filters / QUAD, window = n->per_filter;
    int64_t *starts = hpn_take(&h->work, groups + 1, sizeof *starts);
    int32_t *all = hpn_take(&h->work, groups * window, sizeof *all);
    float *values = hpn_take(&h->work, n->filters * window, sizeof *values);
    for (int64_t g = 0; g <= groups; g++) starts[g] = g * window;
    for (int64_t g = 0; g < groups; g++)
        memcpy(all + g * window, offsets, (size_t)window * sizeof *all);
    for (int64_t i = 0; i < n->kept; i++) {
        const int64_t position = n->index ? n->index[i] : i;
        const int64_t filter = position / window, place = position % window;
        values[(filter / QUAD * window + place) * QUAD + filter % QUAD] = n->weights[i];
    }
    return (struct list){starts, all, values, QUAD, 0};
}

/* What a tap along an axis reaches of `made` positions: 0 all but the first, 1 all, 2 all but the last,
 * -1 something else. `first` is what position 0 reads of `read` positions. */
static int side_reached(int64_t first, int64_t stride, int64_t read, int64_t made) {
    const int64_t low = first < 0 ? (stride - 1 - first) / stride : 0;
    int64_t high = read > first ? (read - 1 - first) / stride + 1 : 0;
    if (high > made) high = made;
    if (low == 1 && high == made) return 0;
    if (low == 0 && high == made) return 1;
    return low == 0 && high == made - 1 ? 2 : -1;
}

/* For each place of a filter, what it reaches of an output that is one tile; NULL where that is not
 * for REACHES, as kernels/lists.py has it. */
static uint8_t *small_reach(struct hpn *h, const struct node *n, struct shape in, struct shape out) {
    const struct window *w = &n->window;
    const int64_t area = w->size[0] * w->size[1];
    if (out.height != out.width || (out.height != 2 && out.height != 4)) return 0;
    if (out.height * out.width > h->kernels->tile) return 0;
    uint8_t *reach = hpn_take(&h->work, n->per_filter, sizeof *reach);
    for (int64_t i = 0; i < n->per_filter; i++) {
        const int64_t row = i % area / w->size[1], column = i % w->size[1];
        const int rows = side_reached(row * w->dilation[0] - w->padding[0], w->stride[0], in.height,
                                      out.height);
        const int columns = side_reached(column * w->dilation[1] - w->padding[1], w->stride[1],
                                         in.width, out.width);
        if (rows < 0 || columns < 0) return 0;
        reach[i] = (uint8_t)(3 * rows + columns);
    }
    return reach;
}

static struct list list_of(struct hpn *h, const struct node *n, const struct buffer *read,
                           struct shape out) {
    const int64_t window = n->per_filter, size = n->filters * window;
    const int32_t *offsets = window_offsets(h, n, read);
    const int dense = !n->index || (double)n->kept > NEARLY_DENSE * (double)size;
    if (dense && n->groups == 1 && n->filters % QUAD == 0) return quads(h, n, offsets);
    const uint8_t *reach = small_reach(h, n, read->shape, out);
    const int64_t ranges = reach ? REACHES : 1, many = n->filters * ranges;
    int64_t *starts = hpn_take(&h->work, many + 1, sizeof *starts);
    int64_t *next = hpn_take(&h->work, many, sizeof *next);
    int32_t *all = hpn_take(&h->work, n->kept, sizeof *all);
    float *values = hpn_take(&h->work, n->kept, sizeof *values);
    const int64_t per_group = n->filters / n->groups;
    const int64_t channels = n->window.size[0] * n->window.size[1];
    /* Counted, and then put where their range goes on. */
    for (int64_t i = 0; i < n->kept; i++) {
        const int64_t position = n->index ? n->index[i] : i;
        const int64_t range = position / window * ranges;
        starts[range + (reach ? reach[position % window] : 0) + 1]++;
    }
    for (int64_t r = 0; r < many; r++) next[r] = starts[r], starts[r + 1] += starts[r];
    for (int64_t i = 0; i < n->kept; i++) {
        const int64_t position = n->index ? n->index[i] : i;
        const int64_t filter = position / window, place = position % window;
        const int64_t group = filter / per_group * (window / channels);
        const int64_t at = next[filter * ranges + (reach ? reach[place] : 0)]++;
        all[at] = offsets[place] + (int32_t)(group * plane_of(read));
        values[at] = n->weights[i];
    }
    return (struct list){starts, all, values, 1, reach != 0};
}

static int64_t band_of(const struct buffer *read, int64_t stride) {
    const int64_t bytes = read->shape.channels * row_of(read) * NUMBER;
    const int64_t rows = (int64_t)((double)CACHE / (double)bytes - 2);
    return rows / stride > 1 ? rows / stride : 1;
}

static void link_step(struct hpn *h, const struct planned *p, struct step *s) {
    const struct node *n = p->node;
    s->kind = p->kind;
    s->in = place_of(h, &p->in), s->out = place_of(h, &p->out), s->other = place_of(h, &p->other);
    s->has_other = p->other.buffer != 0;
    s->channels = p->shape.channels, s->height = p->shape.height, s->width = p->shape.width;
    s->rectify = p->rectify;
    s->signs_out = s->signs_in = -1;
    if (p->kind == SWISH || p->kind == RELU6) s->index = -1; /* nobody asks for slopes */
    s->external = p->external;
    if (!n) return;
    s->scale = n->scale, s->shift = n->shift;
    if (p->kind == CONVOLVE) {
        s->list = list_of(h, n, p->in.buffer, p->shape);
        s->band = band_of(p->in.buffer, n->window.stride[0]);
    }
    if (p->kind == MAX_POOL || p->kind == MEAN_POOL) {
        const struct window *w = &n->window;
        s->in_height = p->in.buffer->shape.height, s->in_width = p->in.buffer->shape.width;
        s->size_y = w->size[0], s->size_x = w->size[1];
        s->stride_y = w->stride[0], s->stride_x = w->stride[1];
        s->pad_y = w->padding[0], s->pad_x = w->padding[1];
        s->full_area = n->full_area;
    }
}

static void prepare(struct hpn *h) {
    const struct network *n = &h->network;
    const struct shape out = n->shapes[n->output];
    if (out.height != 1 || out.width != 1) hpn_fail(&h->work, "the network makes a map, not logits");
    h->kernels = harprune_kernels("");
    plan(h);
    /* Nobody asks which of a window was the largest: all pools note it in the same place. */
    for (int64_t i = 0; i < h->count; i++) {
        const struct shape s = h->planned[i].shape;
        const int64_t bytes = s.channels * s.height * s.width * h->kernels->lanes;
        if (h->planned[i].kind == MAX_POOL && bytes > h->winner_bytes) h->winner_bytes = bytes;
    }
    place_maps(h);
    h->steps = hpn_take(&h->work, h->count, sizeof *h->steps);
    for (int64_t i = 0; i < h->count; i++) link_step(h, h->planned + i, h->steps + i);
    h->classes = hpn_take(&h->work, out.channels, sizeof *h->classes);
    int64_t number = 0;
    for (const struct json *v = n->classes->first; v; v = v->next) h->classes[number++] = v->text;
}

/* For the caller ----------------------------------------------------------------------------- */

static int64_t read_file(struct hpn *h, const char *path) {
    FILE *file = fopen(path, "rb");
    int64_t size = -1;
    if (file && !fseek(file, 0, SEEK_END)) size = ftell(file);
    if (size >= 0 && size < INT64_MAX / 2) h->file = malloc((size_t)size + 1);
    if (h->file && (fseek(file, 0, SEEK_SET) || fread(h->file, 1, (size_t)size, file) != (size_t)size))
        size = -1;
    if (file) fclose(file);
    if (!h->file || size < 0) hpn_fail(&h->work, "it cannot be read");
    return size;
}

/* Leaves through `failed`; what it wrote is found in `h`. */
static void open_into(struct hpn *h, const char *path) {
    const int64_t size = read_file(h, path);
    hpn_read_network(&h->work, h->file, size, &h->network);
    free(h->file); /* what is needed of it was copied */
    h->file = 0;
    prepare(h);
}

static int opened(struct hpn *h, const char *path) {
    if (setjmp(h->work.failed)) return 0;
    open_into(h, path);
    return 1;
}

struct hpn *hpn_open(const char *path, char error[HPN_ERROR]) {
    struct hpn *h = calloc(1, sizeof *h);
    char reason[HPN_ERROR] = "not enough memory";
    if (h) {
        h->work.error = reason;
        if (opened(h, path)) return h;
    }
    snprintf(error, HPN_ERROR, "%.120s: %.120s", path, reason);
    hpn_close(h);
    return 0;
}

void hpn_close(struct hpn *h) {
    if (!h) return;
    free(h->file);
    hpn_give_back(&h->work);
    free(h);
}

void hpn_image(const struct hpn *h, int64_t shape[3]) {
    const struct shape s = h->network.shapes[0];
    shape[0] = s.channels, shape[1] = s.height, shape[2] = s.width;
}

int64_t hpn_classes(const struct hpn *h) { return h->network.shapes[h->network.output].channels; }

const char *hpn_class_name(const struct hpn *h, int64_t number) {
    return number >= 0 && number < hpn_classes(h) ? h->classes[number] : 0;
}

void hpn_run(struct hpn *h, const float *images, int64_t count, float *logits) {
    const struct shape s = h->network.shapes[0];
    const int64_t image = s.channels * s.height * s.width, classes = hpn_classes(h);
    const int64_t block = h->kernels->lanes;
    for (int64_t first = 0; first < count; first += block) {
        char *const external[2] = {(char *)(uintptr_t)(images + first * image),
                                   (char *)(logits + first * classes)};
        h->kernels->run(h->steps, h->count, h->arena, h->winners, external,
                        count - first < block ? count - first : block);
    }
}
