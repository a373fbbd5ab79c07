/* What the host halves of the sm80 kernels share: which variant, in what time, what it needs; what a launch needs of the
 * arguments. Boxes: sm80_boxes.c. */
#include "cuda/sm80.h"
#include <limits.h>
#include <math.h>
#include <stdint.h>
#include <stdlib.h>

int nbhd_sm80_tables(const struct nbhd_sm80_variant *v, int streams)
{
    return 256 + (8 * streams + 4) * v->n + 4 * v->rows + 40 * (v->rows + 2) + 16 * (v->n + 5) + 128 * v->warps;
}

int nbhd_sm80_pitch(const nbhd_desc *desc, int dim)
{
    return (int)nbhd_dtype_size(desc->dtype) * nbhd_sm80_padded(dim) + 16;
}

int nbhd_sm80_biases(const struct nbhd_sm80_variant *v, const nbhd_desc *desc)
{
    return desc->bias ? 4 * (v->rows + v->n) : 0;
}

void nbhd_sm80_options(struct nbhd_options *options, const nbhd_desc *desc, const struct nbhd_sm80_choice *choice)
{
    const struct nbhd_sm80_variant *v = choice->variant;
    nbhd_options_problem(options, desc);
    nbhd_option(options, "-DNBHD_ROWS=%d -DNBHD_WARPS=%d -DNBHD_N=%d -DNBHD_CTAS=%d", v->rows, v->warps, v->n,
                choice->resident);
    nbhd_options_wraps(options, desc);
}

double nbhd_sm80_blocks(const struct nbhd_problem *problem, const struct nbhd_boxes_sm80 *boxes, int heads)
{
    double blocks = (double)problem->desc.batch * (heads / boxes->pack);
    for (int i = 0; i < 3; i++)
        blocks *= (double)boxes->tiles[i] * problem->axis[i].dilation;
    return blocks;
}

double nbhd_sm80_many(const struct nbhd_problem *problem, const struct nbhd_boxes_sm80 *boxes, bool inverse, int heads,
                      struct nbhd_parts *parts)
{
    double blocks = 0;
    for (int s = 0; s < parts->count; s++) {
        struct nbhd_part *part = &parts->part[s];
        double here = heads / boxes->pack;
        for (int i = 0; i < 3; i++) {
            const int dilation = problem->axis[i].dilation, keys = part->keys[i], length = part->length[i];
            const int group = inverse && keys != length ? keys : (length + dilation - 1) / dilation;
            here *= (double)((group + boxes->row_box[i] - 1) / boxes->row_box[i]) * dilation;
        }
        part->block = (int)fmin(blocks, INT_MAX);
        blocks += here;
    }
    return blocks;
}

/* CTAs that fit a multiprocessor; 0 if the kernel would spill or does not fit. */
static int resident(const struct nbhd_sm80_kernel *k, const struct nbhd_sm80_variant *v, const nbhd_desc *d,
                    const struct nbhd_cuda_machine *machine)
{
    const int accumulators = k->accumulators(v, d);
    if (accumulators > k->most_accumulators)
        return 0;
    const int by_registers = 65536 / (32 * v->warps * nbhd_min(255, accumulators + k->others));
    const int by_memory = (machine->shared_max + 1024) / (k->shared(v, d) + k->fixed + 1024);
    return nbhd_min(nbhd_min(by_registers, by_memory), 6);
}

/* Microseconds that a multiprocessor takes for a step of a CTA, where `fit` CTAs share it; measured on an H200
 * (docs/notes/sm80.md). Products and, less, the work on every score. 16 rows a warp read shared memory twice as often
 * as 32, which tells where rows are long; short boxes have more barriers; few warps hide little. Tensor cores take
 * twice as long for TF32. */
static double step_time(const struct nbhd_sm80_kernel *k, const struct nbhd_sm80_variant *v, const nbhd_desc *d,
                        int fit)
{
    const bool wide = d->head_dim > 96 || d->head_dim_v > 96;
    const double rows = v->rows / v->warps >= 32 ? 1 : wide ? 0.7 : 0.88, n = v->n >= 64 ? 1 : v->n >= 32 ? 0.88 : 0.6;
    const double speed = rows * n * (v->stages == 1 ? 0.96 : 1) * (0.46 + 0.0675 * nbhd_min(8, fit * v->warps));
    const double width = d->dtype == NBHD_F32 ? 2 * k->width : k->width;
    return (0.36 + 0.00447 * width) * v->rows * v->n / (128 * 64) / speed;
}

/* And to begin and end a CTA. */
static double setup_time(const struct nbhd_sm80_variant *v) { return 2.0 * v->rows / 64; }

static bool price(struct nbhd_sm80_choice *c, const struct nbhd_problem *problem, const struct nbhd_sm80_kernel *k,
                  const struct nbhd_sm80_variant *v, const struct nbhd_cuda_machine *machine)
{
    const int fit = resident(k, v, &problem->desc, machine);
    if (fit < 1)
        return false;
    const double step = step_time(k, v, &problem->desc, fit);
    const struct nbhd_sm80_shape shape = {v->rows, v->warps, v->n, k->inverse, k->packs, setup_time(v) / step};
    *c = (struct nbhd_sm80_choice){.variant = v, .resident = fit};
    const struct nbhd_sm80_work work = nbhd_sm80_boxes(problem, &shape, &c->boxes);
    const double waves = work.ctas / (machine->multiprocessors * fit);
    c->ms = 1e-3 * step * work.cost / v->warps / machine->multiprocessors * (ceil(waves) / waves);
    for (int i = 0; i < 3; i++)
        c->boxes.reverse |= problem->axis[i].edge == NBHD_EDGE_CAUSAL && !k->inverse;
    return true;
}

static int by_time(const void *a, const void *b)
{
    const struct nbhd_sm80_choice *x = a, *y = b;
    if (x->ms != y->ms)
        return x->ms < y->ms ? -1 : 1;
    return (x->variant > y->variant) - (x->variant < y->variant); /* of one table */
}

int nbhd_sm80_choose(struct nbhd_sm80_choice *choices, int room, const struct nbhd_problem *problem,
                     const struct nbhd_sm80_kernel *k, const struct nbhd_cuda_machine *machine)
{
    struct nbhd_sm80_choice all[NBHD_SM80_VARIANTS];
    int count = 0;
    for (int i = 0; i < k->count; i++)
        count += price(&all[count], problem, k, &k->variants[i], machine);
    qsort(all, (size_t)count, sizeof *all, by_time);
    for (int i = 0; i < count && i < room; i++)
        choices[i] = all[i];
    return nbhd_min(count, room);
}

bool nbhd_sm80_wide(const nbhd_desc *desc, const struct nbhd_view *const *views, int count)
{
    uintptr_t odd = (uintptr_t)nbhd_dtype_size(desc->dtype) * (uintptr_t)(desc->head_dim | desc->head_dim_v);
    for (int i = 0; i < count; i++) {
        const struct nbhd_view *v = views[i];
        if (v->data)
            odd |= (uintptr_t)v->data | (uintptr_t)(v->batch | v->head | v->axis[0] | v->axis[1] | v->axis[2]);
    }
    return odd % 16 == 0;
}

bool nbhd_sm80_refuses(const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    const nbhd_desc *d = &problem->desc;
    if (d->dtype == NBHD_F64)
        return nbhd_refuse(why, "dtype is f64; it must be bf16, f16, or f32 with tf32=1");
    if (d->dtype == NBHD_F32 && !d->tf32)
        return nbhd_refuse(why, "dtype is f32 and tf32 is 0; tensor cores round float32 to TF32, which tf32=1 allows");
    if (d->head_dim > 256)
        return nbhd_refuse(why, "head_dim is %d; it must be 1 to 256", d->head_dim);
    if (d->head_dim_v > 256)
        return nbhd_refuse(why, "head_dim_v is %d; it must be 1 to 256", d->head_dim_v);
    double biases = d->heads;
    for (int i = 0; i < 3; i++) {
        biases *= 2.0 * problem->axis[i].window - 1;
    }
    if (d->bias && biases > INT_MAX / 2)
        return nbhd_refuse(why, "the table of biases has %.0f entries; it may have %d", biases, INT_MAX / 2);
    return false;
}
