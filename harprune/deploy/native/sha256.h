/* SPDX-License-Identifier: Apache-2.0 */
#ifndef HARPRUNE_SHA256_H
#define HARPRUNE_SHA256_H

#include <stddef.h>

/* SHA-256 (FIPS 180-4) of two pieces of memory one after the other. */
void hpn_sha256(const unsigned char *first, size_t first_size, const unsigned char *second,
            size_t second_size, unsigned char digest[32]);

#endif
