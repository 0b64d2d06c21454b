/* SPDX-License-Identifier: Apache-2.0 */
/* Run the file of a pruned network (docs/artifact.md) from C, on the sparse kernels.
 *
 *     char error[HPN_ERROR];
 *     struct hpn *network = hpn_open("resnet18.hpn", error);
 *     if (network) hpn_run(network, images, 100, logits);
 *     hpn_close(network);
 *
 * C11 as GCC and Clang have it, for little-endian machines, without dependencies; compile it with the
 * kernels (a program in C++ may include this header):
 *
 *     cc -O3 program.c harprune/deploy/native/<all>.c harprune/kernels/native/<all>.c -lm
 *
 * A network belongs to one thread at a time; several may run side by side.
 */
#ifndef HARPRUNE_H
#define HARPRUNE_H

#include <stdint.h>

#define HPN_ERROR 256 /* bytes of a message */

#ifdef __cplusplus
extern "C" {
#endif

struct hpn;

/* The network of a file, or NULL and one line in `error`. Everything in the file is checked. */
struct hpn *hpn_open(const char *path, char error[HPN_ERROR]);

void hpn_close(struct hpn *network);

/* Channels, height and width of one image. */
void hpn_image(const struct hpn *network, int64_t shape[3]);

/* How many logits an image has. */
int64_t hpn_classes(const struct hpn *network);

/* What a logit stands for, UTF-8; NULL where the file does not say. */
const char *hpn_class_name(const struct hpn *network, int64_t number);

/* The logits [count][classes] of images [count][channels][height][width] in [0, 1]. */
void hpn_run(struct hpn *network, const float *images, int64_t count, float *logits);

#ifdef __cplusplus
}
#endif

#endif
