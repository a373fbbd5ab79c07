/* Arrays as numpy may save them, in Fortran's order of axes or with each number's bytes reversed, into C's order. */
#include <string.h>

#include "array.h"

enum { RUN = 16 }; /* elements read side by side and written to rows of their own: whole cache lines both ways */

struct walk {
    const struct array_info *info;
    int fast; /* the axis whose elements lie side by side in the source */
    size_t in[ARRAY_RANK], out[ARRAY_RANK]; /* bytes from one element of an axis to the next */
    long long index[ARRAY_RANK];
};

static void set_steps(size_t step[ARRAY_RANK], const struct array_info *info, bool fortran)
{
    size_t bytes = dtype_size(info->dtype);
    for (int n = 0; n < info->rank; n++) {
        const int axis = fortran ? n : info->rank - 1 - n;
        step[axis] = bytes;
        bytes *= (size_t)info->shape[axis];
    }
}

/* Steps to the next element of all axes but the fast one; false, at the first one again, after the last. */
static bool next(struct walk *w, const char **from, char **to)
{
    for (int axis = w->info->rank - 1; axis >= 0; axis--) {
        if (axis == w->fast)
            continue;
        const size_t last = (size_t)w->info->shape[axis] - 1;
        if ((size_t)w->index[axis]++ < last) {
            *from += w->in[axis];
            *to += w->out[axis];
            return true;
        }
        w->index[axis] = 0;
        *from -= last * w->in[axis];
        *to -= last * w->out[axis];
    }
    return false;
}

void array_reorder(void *result, const void *source, const struct array_info *info)
{
    const size_t size = dtype_size(info->dtype), flip = info->big_endian ? size - 1 : 0;
    struct walk w = {.info = info, .fast = info->fortran || !info->rank ? 0 : info->rank - 1};
    if (!info->bytes)
        return;
    set_steps(w.in, info, info->fortran);
    set_steps(w.out, info, false);
    while (w.fast + 1 < info->rank && info->shape[w.fast] == 1)
        w.fast++;
    const size_t length = info->rank ? (size_t)info->shape[w.fast] : 1;
    for (size_t first = 0; first < length; first += RUN) {
        const size_t run = length - first < RUN ? length - first : RUN;
        const char *from = (const char *)source + first * size;
        char *to = (char *)result + first * w.out[w.fast];
        do
            for (size_t i = 0; i < run; i++)
                for (size_t byte = 0; byte < size; byte++)
                    to[i * w.out[w.fast] + byte] = from[i * size + (byte ^ flip)];
        while (next(&w, &from, &to));
    }
}
