/* SPDX-License-Identifier: Apache-2.0 */
#include "network.h"
#include "sha256.h"
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "files are little-endian, and are read as they are"
#endif

#define LARGEST_HEADER (1 << 22)
#define LARGEST_MAP (1 << 26)
#define LARGEST_LAYER INT32_MAX
#define LARGEST_EXTENT (1 << 16)
#define LARGEST_WINNER 256
#define LEAST_EXPONENT (-170) /* of halves */
#define LARGEST_EXPONENT 120

enum coding { FLOAT32, FLOAT16, INT8 };
static const int64_t BYTES[] = {4, 2, 1};

struct reader {
    struct work *work;
    struct network *network;
    enum coding coding;
    const unsigned char *payload;
    int64_t size, end; /* of the payload, and of the sections so far */
    char what[40];     /* the node that is read, for messages */
};

struct section {
    const unsigned char *bytes;
    int64_t size;
};

/* Fields ------------------------------------------------------------------------------------- */

static struct json *field(struct reader *r, struct json *object, const char *name, enum type type) {
    const int64_t length = (int64_t)strlen(name);
    for (struct json *v = object->first; v; v = v->next)
        if (v->key_length == length && !memcmp(v->key, name, (size_t)length)) {
            if (v->type != type) hpn_fail(r->work, "field '%s' of %s has a wrong type", name, r->what);
            v->used = 1;
            return v;
        }
    return 0;
}

static struct json *needed(struct reader *r, struct json *object, const char *name,
                           enum type type) {
    struct json *v = field(r, object, name, type);
    if (!v) hpn_fail(r->work, "field '%s' of %s is missing", name, r->what);
    return v;
}

static int64_t within(struct reader *r, const struct json *v, int64_t least, int64_t most) {
    if (v->type != INTEGER || v->integer < least || v->integer > most)
        hpn_fail(r->work, "a number of %s must be whole and from %lld to %lld", r->what,
             (long long)least, (long long)most);
    return v->integer;
}

static int64_t integer(struct reader *r, struct json *object, const char *name, int64_t least,
                       int64_t most) {
    return within(r, needed(r, object, name, INTEGER), least, most);
}

/* `count` whole numbers; they stay what they were where the field is left out. */
static void integers(struct reader *r, struct json *v, int64_t count, int64_t least, int64_t most,
                     int64_t *numbers) {
    if (!v) return;
    if (v->length != count) hpn_fail(r->work, "a list of %s has a wrong length", r->what);
    for (v = v->first; v; v = v->next) *numbers++ = within(r, v, least, most);
}

static void finish(struct reader *r, const struct json *object) {
    for (const struct json *v = object->first; v; v = v->next)
        if (!v->used) hpn_fail(r->work, "unknown field '%.40s' in %s", v->key, r->what);
}

/* Sections ----------------------------------------------------------------------------------- */

static struct section placed(struct reader *r, const char *name, const int64_t place[2],
                             int64_t item) {
    const int64_t gap = -r->end & 7;
    if (gap > r->size - r->end || place[0] != r->end + gap || place[1] > r->size - place[0] ||
        place[1] % item)
        hpn_fail(r->work, "section '%s' of %s is out of place", name, r->what);
    for (; r->end < place[0]; r->end++)
        if (r->payload[r->end]) hpn_fail(r->work, "bytes between sections are not zero");
    r->end = place[0] + place[1];
    return (struct section){r->payload + place[0], place[1]};
}

static struct section section(struct reader *r, struct json *object, const char *name,
                              int64_t item) {
    int64_t place[2];
    integers(r, needed(r, object, name, ARRAY), 2, 0, INT64_MAX, place);
    return placed(r, name, place, item);
}

static float half(uint16_t bits) {
    const int exponent = bits >> 10 & 31, fraction = bits & 1023;
    const float size = exponent == 31 ? (fraction ? NAN : INFINITY)
                       : exponent     ? ldexpf((float)(fraction | 1024), exponent - 25)
                                      : ldexpf((float)fraction, -24);
    return bits >> 15 ? -size : size;
}

/* `count` finite numbers. */
static float *floats(struct reader *r, struct json *object, const char *name, int64_t count) {
    const struct section s = section(r, object, name, 4);
    if (s.size / 4 != count) hpn_fail(r->work, "'%s' of %s has a wrong length", name, r->what);
    float *numbers = hpn_take(r->work, count, sizeof *numbers);
    memcpy(numbers, s.bytes, (size_t)s.size);
    for (int64_t i = 0; i < count; i++)
        if (!isfinite(numbers[i])) hpn_fail(r->work, "'%s' of %s is not finite", name, r->what);
    return numbers;
}

/* The same where they may be halves, with an exponent behind their place. */
static float *vector(struct reader *r, struct json *object, const char *name, int64_t count) {
    int64_t place[3];
    if (r->coding != FLOAT16) return floats(r, object, name, count);
    integers(r, needed(r, object, name, ARRAY), 3, INT64_MIN, INT64_MAX, place);
    if (place[0] < 0 || place[1] < 0 || place[2] < LEAST_EXPONENT || place[2] > LARGEST_EXPONENT)
        hpn_fail(r->work, "'%s' of %s lies nowhere, or has a wrong exponent", name, r->what);
    const struct section s = placed(r, name, place, 2);
    if (s.size / 2 != count) hpn_fail(r->work, "'%s' of %s has a wrong length", name, r->what);
    float *numbers = hpn_take(r->work, count, sizeof *numbers);
    for (int64_t i = 0; i < count; i++) {
        uint16_t bits;
        memcpy(&bits, s.bytes + 2 * i, sizeof bits);
        numbers[i] = ldexpf(half(bits), (int)place[2]);
        if (!isfinite(numbers[i])) hpn_fail(r->work, "'%s' of %s is not finite", name, r->what);
    }
    return numbers;
}

/* Shapes ------------------------------------------------------------------------------------- */

static void require_map(struct reader *r, struct shape s) {
    if (s.channels > LARGEST_MAP || s.height > LARGEST_MAP || s.width > LARGEST_MAP ||
        s.channels * s.height > LARGEST_MAP || s.channels * s.height * s.width > LARGEST_MAP)
        hpn_fail(r->work, "a map of %s exceeds %d numbers", r->what, LARGEST_MAP);
}

static int same(struct shape a, struct shape b) {
    return a.channels == b.channels && a.height == b.height && a.width == b.width;
}

static struct shape slid(struct reader *r, const struct window *w, struct shape s) {
    int64_t sides[2] = {s.height, s.width};
    for (int i = 0; i < 2; i++) {
        const int64_t room = sides[i] + 2 * w->padding[i] + w->extra[i] -
                             w->dilation[i] * (w->size[i] - 1) - 1;
        if (w->stride[i] < 1 || w->dilation[i] < 1 || w->padding[i] + w->extra[i] < 0 || room < 0)
            hpn_fail(r->work, "the window of %s does not fit its map", r->what);
        sides[i] = room / w->stride[i] + 1;
    }
    return (struct shape){s.channels, sides[0], sides[1]};
}

static void require_pool(struct reader *r, const struct node *n, struct shape s, int adaptive) {
    const struct window *w = &n->window;
    const int64_t sides[2] = {s.height, s.width};
    int sound = n->op == MEAN || w->size[0] * w->size[1] <= LARGEST_WINNER;
    for (int i = 0; i < 2; i++) {
        sound &= w->dilation[i] == 1 && 2 * w->padding[i] <= w->size[i] && !w->extra[i];
        if (adaptive)
            sound &= w->stride[i] == w->size[i] && !w->padding[i] && sides[i] % w->size[i] == 0;
    }
    if (!sound) hpn_fail(r->work, "the window of %s is none of a pool", r->what);
}

static struct shape made(struct reader *r, const struct node *n, int adaptive) {
    const struct shape *shapes = r->network->shapes, first = shapes[n->from[0]];
    switch (n->op) {
        case CONVOLUTION:
            if (first.channels % n->groups || n->filters % n->groups)
                hpn_fail(r->work, "groups of %s do not divide its channels and filters", r->what);
            return (struct shape){n->filters, slid(r, &n->window, first).height,
                                  slid(r, &n->window, first).width};
        case LARGEST:
        case MEAN:
            require_pool(r, n, first, adaptive);
            return slid(r, &n->window, first);
        case FLATTEN:
            return (struct shape){first.channels * first.height * first.width, 1, 1};
        case CONCATENATION: {
            struct shape s = {0, first.height, first.width};
            for (int64_t i = 0; i < n->reads; i++) {
                const struct shape part = shapes[n->from[i]];
                if (part.height != s.height || part.width != s.width)
                    hpn_fail(r->work, "maps of %s cannot be concatenated", r->what);
                s.channels += part.channels;
            }
            return s;
        }
        case SUM:
            if (!same(first, shapes[n->from[1]]))
                hpn_fail(r->work, "maps of %s cannot be added", r->what);
            return first;
        default:
            return first;
    }
}

/* Weights ------------------------------------------------------------------------------------ */

struct bits {
    const unsigned char *bytes;
    int64_t at, count;
};

static int bit(struct reader *r, struct bits *b) {
    if (b->at >= b->count) hpn_fail(r->work, "positions of %s end too early", r->what);
    const int found = b->bytes[b->at / 8] >> b->at % 8 & 1;
    b->at++;
    return found;
}

/* Whether nothing is left but zeros up to a whole byte. */
static int ended(const struct bits *b) {
    const int64_t left = b->count - b->at;
    return left < 8 && (left == 0 || b->bytes[b->at / 8] >> b->at % 8 == 0);
}

/* The ascending positions of `kept` weights among `size`, from their Rice codes. */
static int64_t *positions(struct reader *r, struct json *fields, int64_t kept, int64_t size) {
    const int64_t block = integer(r, fields, "block", 1, LARGEST_LAYER);
    const struct section parameters = section(r, fields, "parameters", 1);
    const struct section high = section(r, fields, "quotients", 1);
    const struct section low = section(r, fields, "remainders", 1);
    struct bits quotients = {high.bytes, 0, 8 * high.size};
    struct bits remainders = {low.bytes, 0, 8 * low.size};
    if (parameters.size != (kept + block - 1) / block || kept > quotients.count)
        hpn_fail(r->work, "%lld positions of %s need other streams", (long long)kept, r->what);
    int64_t *found = hpn_take(r->work, kept, sizeof *found), last = -1;
    for (int64_t i = 0; i < kept; i++) {
        const int width = parameters.bytes[i / block];
        int64_t gap = 0;
        if (width > 31) hpn_fail(r->work, "a parameter of %s exceeds 31", r->what);
        while (!bit(r, &quotients))
            /* Before it is shifted: what is too large could lose its high bits there. */
            if (++gap > size >> width) hpn_fail(r->work, "a gap of %s is too large", r->what);
        gap <<= width;
        for (int j = 0; j < width; j++) gap |= (int64_t)bit(r, &remainders) << j;
        last += gap + 1;
        if (last >= size) hpn_fail(r->work, "a position of %s is too large", r->what);
        found[i] = last;
    }
    if (!ended(&quotients) || !ended(&remainders))
        hpn_fail(r->work, "positions of %s do not end with their streams", r->what);
    return found;
}

static float stored(const struct reader *r, const unsigned char *bytes, int64_t i) {
    float number;
    uint16_t bits;
    if (r->coding == INT8) return (float)(signed char)bytes[i];
    if (r->coding == FLOAT16) return memcpy(&bits, bytes + 2 * i, 2), half(bits);
    return memcpy(&number, bytes + 4 * i, 4), number;
}

static void read_weights(struct reader *r, struct node *n, struct json *fields) {
    const struct window *w = &n->window;
    const int64_t channels = r->network->shapes[n->from[0]].channels / n->groups;
    n->per_filter = channels * w->size[0] * w->size[1];
    if (n->per_filter > LARGEST_LAYER || n->filters > LARGEST_LAYER / n->per_filter)
        hpn_fail(r->work, "%s has more than %d weights", r->what, LARGEST_LAYER);
    const int64_t size = n->filters * n->per_filter;
    n->kept = integer(r, fields, "kept", 0, size);
    const int whole = !field(r, fields, "block", INTEGER);
    if (!whole) n->index = positions(r, fields, n->kept, size);
    int exponent = 0;
    const float *steps = 0;
    if (r->coding == FLOAT16)
        exponent = (int)integer(r, fields, "exponent", LEAST_EXPONENT, LARGEST_EXPONENT);
    if (r->coding == INT8) steps = floats(r, fields, "steps", n->filters);
    for (int64_t i = 0; steps && i < n->filters; i++)
        if (steps[i] < 0) hpn_fail(r->work, "a step of %s is negative", r->what);
    const struct section values = section(r, fields, "values", BYTES[r->coding]);
    const int64_t count = values.size / BYTES[r->coding];
    finish(r, fields);
    if (count != (whole ? size : n->kept))
        hpn_fail(r->work, "%s has %lld values for %lld kept weights", r->what, (long long)count,
             (long long)n->kept);
    if (whole) n->index = hpn_take(r->work, n->kept, sizeof *n->index);
    n->weights = hpn_take(r->work, n->kept, sizeof *n->weights);
    int64_t found = 0;
    for (int64_t i = 0; i < count; i++) {
        float number = stored(r, values.bytes, i);
        if (whole && number == 0) continue;
        if (found == n->kept) hpn_fail(r->work, "%s keeps more weights than it says", r->what);
        if (whole) n->index[found] = i;
        number = r->coding == FLOAT16 ? ldexpf(number, exponent)
                 : steps              ? number * steps[n->index[found] / n->per_filter]
                                      : number;
        if (number == 0 || !isfinite(number))
            hpn_fail(r->work, "a kept weight of %s is zero or not finite", r->what);
        n->weights[found++] = number;
    }
    if (found != n->kept) hpn_fail(r->work, "%s keeps fewer weights than it says", r->what);
    if (n->kept == size) n->index = 0;
}

/* Nodes -------------------------------------------------------------------------------------- */

static const struct {
    const char *name;
    int windowed, named;
} OPS[] = {{"convolution", 1, 1}, {"affine", 0, 1},        {"relu", 0, 0},
           {"swish", 0, 0},       {"relu6", 0, 0},         {"sum", 0, 0},
           {"concatenation", 0, 0}, {"max_pool", 1, 0},    {"mean_pool", 1, 0},
           {"flatten", 0, 0}};

/* Whether a string is just `word`, with no zero byte in it and more behind. */
static int is_word(const struct json *v, const char *word) {
    return (int64_t)strlen(word) == v->length && !memcmp(v->text, word, (size_t)v->length);
}

static enum op op_of(struct reader *r, const struct json *word) {
    for (int i = 0; i < (int)(sizeof OPS / sizeof *OPS); i++)
        if (is_word(word, OPS[i].name)) return (enum op)i;
    hpn_fail(r->work, "%s is of an unknown kind", r->what);
}

static void read_node(struct reader *r, int64_t number, struct json *fields) {
    struct network *net = r->network;
    struct node *n = net->nodes + number;
    struct window *w = &n->window;
    if (fields->type != OBJECT) hpn_fail(r->work, "%s is no object", r->what);
    n->op = op_of(r, needed(r, fields, "op", STRING));
    struct json *from = needed(r, fields, "from", ARRAY);
    n->reads = from->length;
    n->from = hpn_take(r->work, n->reads, sizeof *n->from);
    integers(r, from, n->reads, 0, number, n->from);
    if (n->op == CONCATENATION ? n->reads < 1 : n->reads != (n->op == SUM ? 2 : 1))
        hpn_fail(r->work, "%s reads %lld values", r->what, (long long)n->reads);
    if (OPS[n->op].named) n->name = needed(r, fields, "name", STRING);
    *w = (struct window){{1, 1}, {1, 1}, {0, 0}, {1, 1}, {0, 0}};
    if (OPS[n->op].windowed) {
        integers(r, needed(r, fields, "size", ARRAY), 2, 1, LARGEST_EXTENT, w->size);
        integers(r, field(r, fields, "stride", ARRAY), 2, 1, LARGEST_EXTENT, w->stride);
        integers(r, field(r, fields, "padding", ARRAY), 2, 0, LARGEST_EXTENT, w->padding);
        integers(r, field(r, fields, "dilation", ARRAY), 2, 1, LARGEST_EXTENT, w->dilation);
        integers(r, field(r, fields, "extra", ARRAY), 2, -LARGEST_EXTENT, LARGEST_EXTENT, w->extra);
    }
    n->groups = n->full_area = 1;
    int adaptive = 0;
    if (n->op == MEAN) {
        struct json *area = field(r, fields, "full_area", BOOLEAN);
        struct json *parts = field(r, fields, "adaptive", BOOLEAN);
        n->full_area = area ? area->integer : 1;
        adaptive = parts && parts->integer;
    }
    if (n->op == CONVOLUTION) {
        if (field(r, fields, "groups", INTEGER))
            n->groups = integer(r, fields, "groups", 1, LARGEST_LAYER);
        n->filters = integer(r, fields, "filters", 1, LARGEST_LAYER);
    }
    const struct shape shape = made(r, n, adaptive);
    require_map(r, shape);
    net->shapes[number + 1] = shape;
    if (n->op == CONVOLUTION) {
        read_weights(r, n, needed(r, fields, "weights", OBJECT));
        if (field(r, fields, "bias", ARRAY)) n->shift = vector(r, fields, "bias", n->filters);
        int64_t *border = net->borders[n->from[0]];
        for (int i = 0; i < 2; i++) {
            const int64_t most = w->padding[i] + (w->extra[i] > 0 ? w->extra[i] : 0);
            if (most > border[i]) border[i] = most;
        }
    }
    if (n->op == AFFINE) {
        n->scale = vector(r, fields, "scale", shape.channels);
        n->shift = vector(r, fields, "shift", shape.channels);
    }
    finish(r, fields);
}

static int by_name(const void *a, const void *b) {
    const struct json *x = *(struct json *const *)a, *y = *(struct json *const *)b;
    if (x->length != y->length) return x->length < y->length ? -1 : 1;
    return memcmp(x->text, y->text, (size_t)x->length);
}

static void require_names(struct reader *r) {
    struct network *net = r->network;
    struct json **names = hpn_take(r->work, net->count + 1, sizeof *names);
    int64_t count = 0;
    for (int64_t i = 0; i < net->count; i++)
        if (net->nodes[i].name) names[count++] = net->nodes[i].name;
    qsort(names, (size_t)count, sizeof *names, by_name);
    for (int64_t i = 0; i < count; i++)
        if (!names[i]->length || (i && !by_name(names + i - 1, names + i)))
            hpn_fail(r->work, "names of layers must differ and not be empty");
}

static void require_borders(struct reader *r) {
    for (int64_t i = 0; i <= r->network->count; i++) {
        struct shape s = r->network->shapes[i];
        s.height += 2 * r->network->borders[i][0];
        s.width += 2 * r->network->borders[i][1];
        require_map(r, s);
    }
}

static void read_header(struct reader *r, struct json *header) {
    static const char *CODINGS[] = {"float32", "float16", "int8"};
    struct network *net = r->network;
    if (header->type != OBJECT) hpn_fail(r->work, "the header is no object");
    const struct json *values = needed(r, header, "values", STRING);
    int coding = 0;
    while (coding < 3 && !is_word(values, CODINGS[coding])) coding++;
    if (coding == 3) hpn_fail(r->work, "values of an unknown type");
    r->coding = (enum coding)coding;
    struct json *nodes = needed(r, header, "nodes", ARRAY);
    net->count = nodes->length;
    net->nodes = hpn_take(r->work, net->count + 1, sizeof *net->nodes);
    net->shapes = hpn_take(r->work, net->count + 1, sizeof *net->shapes);
    net->borders = hpn_take(r->work, net->count + 1, sizeof *net->borders);
    int64_t input[3];
    integers(r, needed(r, header, "input", ARRAY), 3, 1, LARGEST_LAYER, input);
    net->shapes[0] = (struct shape){input[0], input[1], input[2]};
    require_map(r, net->shapes[0]);
    int64_t number = 0;
    for (struct json *v = nodes->first; v; v = v->next, number++) {
        snprintf(r->what, sizeof r->what, "node %lld", (long long)number);
        read_node(r, number, v);
    }
    strcpy(r->what, "the header");
    net->output = integer(r, header, "output", 0, net->count);
    net->classes = needed(r, header, "classes", ARRAY);
    needed(r, header, "metadata", OBJECT);
    finish(r, header);
    if (r->end != r->size) hpn_fail(r->work, "bytes after the last section");
    if (net->classes->length && net->classes->length != net->shapes[net->output].channels)
        hpn_fail(r->work, "there are other class names than outputs");
    for (struct json *v = net->classes->first; v; v = v->next)
        if (v->type != STRING) hpn_fail(r->work, "class names must be strings");
    require_names(r);
    require_borders(r);
}

static uint64_t number_at(const unsigned char *p, int bytes) {
    uint64_t found = 0;
    for (int i = bytes; i--;) found = found << 8 | p[i];
    return found;
}

#define PREAMBLE 88
#define UNSIGNED 56 /* bytes of it that the header's checksum covers */

void hpn_read_network(struct work *w, const unsigned char *file, int64_t size, struct network *n) {
    static const unsigned char MAGIC[8] = {0x89, 'H', 'P', 'N', '\r', '\n', 0x1A, '\n'};
    unsigned char digest[32];
    if (size < PREAMBLE || memcmp(file, MAGIC, 8)) hpn_fail(w, "it does not start as a network does");
    if (number_at(file + 8, 4) != 1)
        hpn_fail(w, "format version %llu, not 1", (unsigned long long)number_at(file + 8, 4));
    const int64_t header = (int64_t)number_at(file + 12, 4), start = PREAMBLE + header;
    if (header > LARGEST_HEADER || start % 8 || start > size ||
        number_at(file + 16, 8) != (uint64_t)(size - start))
        hpn_fail(w, "it is cut off or altered");
    hpn_sha256(file, UNSIGNED, file + PREAMBLE, (size_t)header, digest);
    if (memcmp(digest, file + UNSIGNED, 32)) hpn_fail(w, "the header's checksum does not match");
    hpn_sha256(file + start, (size_t)(size - start), file, 0, digest);
    if (memcmp(digest, file + 24, 32)) hpn_fail(w, "the payload's checksum does not match");
    struct reader r = {w, n, FLOAT32, file + start, size - start, 0, "the header"};
    read_header(&r, hpn_parse_json(w, (const char *)file + PREAMBLE, header));
}
