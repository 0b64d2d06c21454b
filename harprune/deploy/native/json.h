/* SPDX-License-Identifier: Apache-2.0 */
/* JSON as RFC 8259 has it; no field may stand twice in an object. */
#ifndef HARPRUNE_JSON_H
#define HARPRUNE_JSON_H

#include "work.h"

enum type { NOTHING, BOOLEAN, INTEGER, REAL, STRING, ARRAY, OBJECT };

struct json {
    enum type type;
    int64_t integer;          /* of a BOOLEAN or INTEGER */
    const char *text;         /* of a STRING, UTF-8, followed by a zero */
    int64_t length;           /* bytes of `text`, or how many an ARRAY or OBJECT holds */
    const char *key;          /* in an OBJECT */
    int64_t key_length;
    struct json *first, *next;
    int used;                 /* for the reader */
};

struct json *hpn_parse_json(struct work *w, const char *text, int64_t length);

#endif
