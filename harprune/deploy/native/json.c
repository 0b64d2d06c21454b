/* SPDX-License-Identifier: Apache-2.0 */
#include "json.h"
#include <stdlib.h>
#include <string.h>

#define DEEPEST 100
#define LARGEST_ORDER 308 /* of a number; no number of a header has it */
#define FAR (INT64_C(1) << 40) /* an exponent that no number of digits makes up for */

struct parser {
    struct work *work;
    const char *at, *end;
    int depth;
};

_Noreturn static void bad(struct parser *p) { hpn_fail(p->work, "its header is no JSON"); }

static int peek(struct parser *p) { return p->at < p->end ? (unsigned char)*p->at : -1; }

static int next(struct parser *p) {
    const int c = peek(p);
    if (c < 0) bad(p);
    p->at++;
    return c;
}

static void space(struct parser *p) {
    while (p->at < p->end && strchr(" \t\n\r", *p->at) && *p->at) p->at++;
}

static void word(struct parser *p, const char *expected) {
    for (; *expected; expected++)
        if (next(p) != *expected) bad(p);
}

static int is_digit(int c) { return c >= '0' && c <= '9'; }

/* `order` becomes the power of ten of the first digit that is not zero. */
static void number(struct parser *p, struct json *v) {
    const int negative = peek(p) == '-';
    uint64_t size = 0;
    int64_t order = -1, exponent = 0, zeros = 0;
    int too_large = 0, nonzero = 0;
    if (negative) p->at++;
    if (!is_digit(peek(p))) bad(p);
    const int zero = peek(p) == '0';
    for (int digits = 0; is_digit(peek(p)); digits++) {
        if (zero && digits) bad(p);
        const uint64_t digit = (uint64_t)(next(p) - '0');
        too_large |= size > (INT64_MAX - digit) / 10;
        size = too_large ? 0 : 10 * size + digit;
        nonzero |= digit > 0;
        order++;
    }
    v->type = INTEGER;
    v->integer = negative ? -(int64_t)size : (int64_t)size;
    if (peek(p) == '.') {
        v->type = REAL, p->at++;
        if (!is_digit(peek(p))) bad(p);
        if (!nonzero) order = -1;
        while (is_digit(peek(p))) {
            nonzero |= next(p) > '0';
            if (!nonzero) zeros++;
        }
    }
    if (peek(p) == 'e' || peek(p) == 'E') {
        v->type = REAL, p->at++;
        const int below = peek(p) == '-';
        if (peek(p) == '+' || peek(p) == '-') p->at++;
        if (!is_digit(peek(p))) bad(p);
        while (is_digit(peek(p))) {
            const int digit = next(p) - '0';
            if (exponent < FAR) exponent = 10 * exponent + digit;
        }
        if (below) exponent = -exponent;
    }
    if (v->type == INTEGER ? too_large : nonzero && order - zeros + exponent >= LARGEST_ORDER)
        hpn_fail(p->work, "a number of its header is too large");
}

static uint32_t four_digits(struct parser *p) {
    uint32_t code = 0;
    for (int i = 0; i < 4; i++) {
        const int c = next(p);
        const int letter = c | 32;
        if (!is_digit(c) && !(letter >= 'a' && letter <= 'f')) bad(p);
        code = code << 4 | (uint32_t)(is_digit(c) ? c - '0' : letter - 'a' + 10);
    }
    return code;
}

static char *put_utf8(char *to, uint32_t code) {
    if (code < 0x80) {
        *to++ = (char)code;
    } else if (code < 0x800) {
        *to++ = (char)(0xC0 | code >> 6);
        *to++ = (char)(0x80 | (code & 63));
    } else if (code < 0x10000) {
        *to++ = (char)(0xE0 | code >> 12);
        *to++ = (char)(0x80 | (code >> 6 & 63));
        *to++ = (char)(0x80 | (code & 63));
    } else {
        *to++ = (char)(0xF0 | code >> 18);
        *to++ = (char)(0x80 | (code >> 12 & 63));
        *to++ = (char)(0x80 | (code >> 6 & 63));
        *to++ = (char)(0x80 | (code & 63));
    }
    return to;
}

/* Behind the opening quote; what is escaped never gets longer. */
static const char *string(struct parser *p, int64_t *length) {
    const char *end = p->at;
    while (end < p->end && *end != '"') end += *end == '\\' ? 2 : 1;
    if (end >= p->end) bad(p);
    char *text = hpn_take(p->work, end - p->at + 1, 1), *to = text;
    for (int c; (c = next(p)) != '"';) {
        if (c < 32) bad(p);
        if (c != '\\') {
            *to++ = (char)c;
            continue;
        }
        static const char NAMES[] = "\"\\/bfnrt", MEANT[] = "\"\\/\b\f\n\r\t";
        const int escape = next(p);
        const char *found = escape ? strchr(NAMES, escape) : 0;
        if (found) {
            *to++ = MEANT[found - NAMES];
        } else if (escape == 'u') {
            uint32_t code = four_digits(p);
            if (code >> 10 == 0x36 && p->end - p->at > 6 && p->at[0] == '\\' && p->at[1] == 'u') {
                const char *before = p->at;
                p->at += 2;
                const uint32_t low = four_digits(p);
                if (low >> 10 == 0x37)
                    code = 0x10000 + ((code & 0x3FF) << 10) + (low & 0x3FF);
                else
                    p->at = before;
            }
            to = put_utf8(to, code);
        } else {
            bad(p);
        }
    }
    *length = to - text;
    return text;
}

static int by_key(const void *a, const void *b) {
    const struct json *x = *(struct json *const *)a, *y = *(struct json *const *)b;
    if (x->key_length != y->key_length) return x->key_length < y->key_length ? -1 : 1;
    return memcmp(x->key, y->key, (size_t)x->key_length);
}

static void require_once(struct parser *p, const struct json *object) {
    if (object->length < 2) return;
    struct json **fields = hpn_take(p->work, object->length, sizeof *fields);
    int64_t count = 0;
    for (struct json *v = object->first; v; v = v->next) fields[count++] = v;
    qsort(fields, (size_t)count, sizeof *fields, by_key);
    for (int64_t i = 1; i < count; i++)
        if (!by_key(fields + i - 1, fields + i))
            hpn_fail(p->work, "a field stands twice in one object of its header");
}

static struct json *value(struct parser *p);

static void members(struct parser *p, struct json *v, const int close) {
    struct json **last = &v->first;
    p->at++;
    if (++p->depth > DEEPEST) hpn_fail(p->work, "its header is nested too deep");
    for (space(p); peek(p) != close; space(p)) {
        const char *key = 0;
        int64_t length = 0;
        if (v->first && next(p) != ',') bad(p);
        space(p);
        if (close == '}') {
            if (next(p) != '"') bad(p);
            key = string(p, &length);
            space(p);
            if (next(p) != ':') bad(p);
            space(p);
        }
        *last = value(p);
        (*last)->key = key, (*last)->key_length = length;
        last = &(*last)->next;
        v->length++;
    }
    p->at++, p->depth--;
    if (close == '}') require_once(p, v);
}

static struct json *value(struct parser *p) {
    struct json *v = hpn_take(p->work, 1, sizeof *v);
    switch (peek(p)) {
        case '{': v->type = OBJECT; members(p, v, '}'); break;
        case '[': v->type = ARRAY; members(p, v, ']'); break;
        case '"': v->type = STRING; p->at++; v->text = string(p, &v->length); break;
        case 't': v->type = BOOLEAN; v->integer = 1; word(p, "true"); break;
        case 'f': v->type = BOOLEAN; word(p, "false"); break;
        case 'n': word(p, "null"); break;
        default: number(p, v);
    }
    return v;
}

/* Whether bytes are UTF-8: no byte too many, none too few, no code twice. */
static int is_utf8(const unsigned char *p, const unsigned char *end) {
    while (p < end) {
        const int more = *p < 0x80 ? 0 : *p >> 5 == 6 ? 1 : *p >> 4 == 14 ? 2 : *p >> 3 == 30 ? 3 : -1;
        static const uint32_t LEAST[4] = {0, 0x80, 0x800, 0x10000};
        if (more < 0 || end - p <= more) return 0;
        uint32_t code = more ? *p & (63u >> more) : *p;
        for (int i = 1; i <= more; i++) {
            if (p[i] >> 6 != 2) return 0;
            code = code << 6 | (p[i] & 63);
        }
        if (code < LEAST[more] || code > 0x10FFFF || code >> 11 == 27) return 0;
        p += more + 1;
    }
    return 1;
}

struct json *hpn_parse_json(struct work *w, const char *text, int64_t length) {
    struct parser p = {w, text, text + length, 0};
    if (!is_utf8((const unsigned char *)text, (const unsigned char *)text + length)) bad(&p);
    space(&p);
    struct json *found = value(&p);
    space(&p);
    if (p.at != p.end) bad(&p);
    return found;
}
