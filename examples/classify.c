/* SPDX-License-Identifier: Apache-2.0 */
/* Classify images with the file of a pruned network, without Python.
 *
 *     cc -O3 -o classify examples/classify.c harprune/deploy/native/<all>.c \
 *         harprune/kernels/native/<all>.c -lm
 *     ./classify mine.hpn images.raw
 *
 * (write *.c for <all>.c). images.raw holds float32 numbers in [0, 1], little-endian: image by image,
 * channel by channel, row by row, as NumPy's `images.astype("float32").tofile("images.raw")` writes
 * them. One line for each image: its class, and all its logits.
 */
#include "../harprune/deploy/native/harprune.h"
#include <stdio.h>
#include <stdlib.h>

#define TOGETHER 64

int main(int arguments, char **argument) {
    char error[HPN_ERROR];
    if (arguments != 3) {
        fprintf(stderr, "usage: %s NETWORK IMAGES\n", argument[0]);
        return 2;
    }
    struct hpn *network = hpn_open(argument[1], error);
    if (!network) {
        fprintf(stderr, "%s\n", error);
        return 2;
    }
    int64_t shape[3];
    hpn_image(network, shape);
    const size_t bytes = (size_t)(shape[0] * shape[1] * shape[2]) * sizeof(float);
    const int64_t classes = hpn_classes(network);
    float *images = malloc(TOGETHER * bytes);
    float *logits = malloc((size_t)(TOGETHER * classes) * sizeof *logits);
    FILE *file = fopen(argument[2], "rb");
    if (!images || !logits || !file) {
        fprintf(stderr, "%s cannot be read\n", argument[2]);
        return 2;
    }
    size_t read = 0, rest = 0;
    while (!rest && (read = fread(images, 1, TOGETHER * bytes, file)) > 0) {
        const size_t count = read / bytes;
        rest = read % bytes;
        hpn_run(network, images, (int64_t)count, logits);
        for (size_t i = 0; i < count; i++) {
            const float *own = logits + (int64_t)i * classes;
            int64_t best = 0;
            for (int64_t c = 1; c < classes; c++)
                if (own[c] > own[best]) best = c;
            const char *name = hpn_class_name(network, best);
            name ? printf("%s", name) : printf("%lld", (long long)best);
            for (int64_t c = 0; c < classes; c++) printf(" %.9g", (double)own[c]);
            printf("\n");
        }
    }
    const int unreadable = ferror(file); /* a folder opens, but reads nothing */
    if (unreadable) fprintf(stderr, "%s cannot be read\n", argument[2]);
    else if (rest) fprintf(stderr, "%s ends within an image of %zu bytes\n", argument[2], bytes);
    fclose(file);
    free(images);
    free(logits);
    hpn_close(network);
    return unreadable || rest ? 2 : 0;
}
