/* Non-local means as 2-D neighborhood attention. The weight of pixel j for pixel i is exp(-|f_i - f_j|^2 / 2) with f
 * the pixels of a patch, weighted and scaled. As |f_i|^2 is the same for all j, softmax needs f_i.f_j - |f_j|^2 / 2
 * only: Q = (f, 1), K = (f, -|f|^2 / 2), scale 1, and V the colours.
 * A large photograph is cut into parts; each is computed with the margin that its windows reach into. */
#include "nlm.h"

#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include "parallel.h"
#include "runner.h"
#include "timing.h"
#include "tool.h"

struct span {
    int begin, end;
};

/* One part at work. Arrays are of the grid, [rows][columns][...]; rows and columns include the margin. */
struct part {
    const struct nlm *nlm;
    const struct image *in;
    nbhd_desc desc; /* of the grid */
    struct span row[2], column[2]; /* [0] wanted, [1] with the margin */
    int colours, features;
    float *weight; /* [patch rows][patch columns * colours]: factor on a pixel of the patch */
    float *padded; /* [rows + patch - 1][columns + patch - 1][colours] */
    float *q, *k, *v, *o;
};

static int size_of(struct span s) { return s.end - s.begin; }

/* Mirrors about the border pixels, as often as it takes: -1 is 1, n is n-2. */
static int reflect(int x, int n)
{
    int period = n > 1 ? 2 * n - 2 : 1;
    x = abs(x) % period;
    return x < n ? x : period - x;
}

/* Gaussian weights of the patch's pixels, summing to 1, a quarter of its side wide; as square roots, over strength. */
static void make_weights(struct part *p)
{
    int rows = p->nlm->patch[0], columns = p->nlm->patch[1];
    double sum = 0;
    for (int pass = 0; pass < 2; pass++)
        for (int y = 0; y < rows; y++)
            for (int x = 0; x < columns; x++) {
                double sy = rows > 1 ? (y - rows / 2) / ((rows - 1) / 4.0) : 0;
                double sx = columns > 1 ? (x - columns / 2) / ((columns - 1) / 4.0) : 0;
                double w = exp(-0.5 * (sx * sx + sy * sy));
                sum += pass ? 0 : w;
                for (int c = 0; c < p->colours; c++)
                    p->weight[(y * columns + x) * p->colours + c] =
                        (float)(sqrt(2 * w / (sum * p->colours)) / p->nlm->strength);
            }
}

static void pad_rows(void *context, int begin, int end)
{
    struct part *p = context;
    const struct image *in = p->in;
    double to_grey = 255.0 / ((1 << in->bits) - 1);
    int columns = size_of(p->column[1]) + p->nlm->patch[1] - 1;
    for (int y = begin; y < end; y++) {
        size_t row = (size_t)reflect(p->row[1].begin + y - p->nlm->patch[0] / 2, in->height) * (size_t)in->width;
        float *to = p->padded + (size_t)y * (size_t)columns * (size_t)p->colours;
        for (int x = 0; x < columns; x++) {
            size_t at = row + (size_t)reflect(p->column[1].begin + x - p->nlm->patch[1] / 2, in->width);
            for (int c = 0; c < p->colours; c++) /* about 0, so that products round less */
                *to++ = (float)(to_grey * image_get(in, at * (size_t)in->channels + (size_t)c) - 128);
        }
    }
}

/* Q, K and V of the grid's rows. */
static void feature_rows(void *context, int begin, int end)
{
    struct part *p = context;
    int columns = size_of(p->column[1]), run = p->nlm->patch[1] * p->colours, n = p->features;
    size_t padded_row = (size_t)(columns + p->nlm->patch[1] - 1) * (size_t)p->colours;
    for (int y = begin; y < end; y++)
        for (int x = 0; x < columns; x++) {
            size_t token = (size_t)y * (size_t)columns + (size_t)x;
            const float *from = p->padded + (size_t)y * padded_row + (size_t)(x * p->colours);
            float *q = p->q + token * (size_t)(n + 1), *k = p->k + token * (size_t)(n + 1), square = 0;
            for (int i = 0; i < p->nlm->patch[0]; i++)
                for (int j = 0; j < run; j++)
                    q[i * run + j] = from[(size_t)i * padded_row + (size_t)j] * p->weight[i * run + j];
            float part[8] = {0}; /* so that the sum is not one long chain */
            for (int i = 0; i + 8 <= n; i += 8)
                for (int j = 0; j < 8; j++)
                    part[j] += q[i + j] * q[i + j];
            for (int i = n / 8 * 8; i < n; i++)
                square += q[i] * q[i];
            for (int j = 0; j < 8; j++)
                square += part[j];
            memcpy(k, q, (size_t)n * sizeof *k);
            q[n] = 1;
            k[n] = -0.5f * square;
            const float *centre =
                from + (size_t)(p->nlm->patch[0] / 2) * padded_row + run / 2 / p->colours * p->colours;
            memcpy(p->v + token * (size_t)p->colours, centre, (size_t)p->colours * sizeof *centre);
        }
}

static void store(const struct part *p, struct image *out)
{
    double from_grey = ((1 << out->bits) - 1) / 255.0;
    for (int y = p->row[0].begin; y < p->row[0].end; y++)
        for (int x = p->column[0].begin; x < p->column[0].end; x++) {
            size_t token =
                (size_t)(y - p->row[1].begin) * (size_t)size_of(p->column[1]) + (size_t)(x - p->column[1].begin);
            size_t pixel = (size_t)y * (size_t)out->width + (size_t)x;
            for (int c = 0; c < p->colours; c++)
                image_put(out, pixel * (size_t)out->channels + (size_t)c,
                          from_grey * ((double)p->o[token * (size_t)p->colours + (size_t)c] + 128));
        }
}

/* The keys that the queries of a span see: the span and its margin. */
static struct span with_margin(const nbhd_desc *whole, int axis, struct span s)
{
    int first = 0, last = 0, count = 0;
    nbhd_desc_keys(whole, axis, s.begin, &first, &count);
    nbhd_desc_keys(whole, axis, s.end - 1, &last, &count);
    return (struct span){first, last + count};
}

static int part_run(struct part *p, struct runner *runner, struct image *out, struct nlm_report *report)
{
    double begun = now_ms();
    parallel_rows(p->nlm->threads, size_of(p->row[1]) + p->nlm->patch[0] - 1, pad_rows, p);
    parallel_rows(p->nlm->threads, size_of(p->row[1]), feature_rows, p);
    report->features_ms += now_ms() - begun;
    p->desc.length[0] = size_of(p->row[1]);
    p->desc.length[1] = size_of(p->column[1]);
    int status = TOOL_DONE;
    if (!runner->plan || memcmp(runner->desc.length, p->desc.length, sizeof p->desc.length)) {
        runner_close(runner);
        status = runner_open(runner, &p->desc, (nbhd_device)p->nlm->device, p->nlm->kernel);
    }
    nbhd_args args = NBHD_ARGS_INIT;
    args.q.data = p->q, args.k.data = p->k, args.v.data = p->v, args.o.data = p->o;
    begun = now_ms();
    if (!status)
        status = runner_run(runner, &args);
    report->attention_ms += now_ms() - begun;
    report->flops += nbhd_desc_flops(&p->desc);
    if (!status)
        store(p, out);
    return status;
}


/* Into how many rows and columns of parts the image is cut, so that a part with its margin has at most `room` pixels
 * (or is one pixel and its margin), and the margins together are least. */
static void cut(const struct image *image, const nbhd_desc *whole, double room, int parts[2])
{
    double best = INFINITY;
    parts[0] = image->height, parts[1] = image->width;
    for (int across = 1; across <= image->width; across++) {
        double width = fmin(image->width, ceil((double)image->width / across) + whole->window[1] - 1);
        double height = width * image->height <= room ? image->height : floor(room / width) - whole->window[0] + 1;
        if (height < 1)
            continue;
        int down = (int)ceil(image->height / height);
        double tall = fmin(image->height, ceil((double)image->height / down) + whole->window[0] - 1);
        if (tall * width * across * down < best) {
            best = tall * width * across * down;
            parts[0] = down, parts[1] = across;
        }
    }
}

static struct span share(int length, int parts, int i)
{
    return (struct span){(int)((long long)length * i / parts), (int)((long long)length * (i + 1) / parts)};
}

static void place(struct part *p, const nbhd_desc *whole, const int parts[2], int i)
{
    p->row[0] = share(p->in->height, parts[0], i / parts[1]);
    p->column[0] = share(p->in->width, parts[1], i % parts[1]);
    p->row[1] = with_margin(whole, 0, p->row[0]);
    p->column[1] = with_margin(whole, 1, p->column[0]);
}

/* In large pages where the system has them: half of what the features take was page faults. NULL: out of memory. */
static float *huge_alloc(size_t count)
{
    enum { PAGE = 2 << 20 };
    size_t bytes = (count * sizeof(float) + PAGE - 1) / PAGE * PAGE;
    if (bytes == PAGE)
        return aligned_alloc(64, (count * sizeof(float) + 63) / 64 * 64);
    float *memory = aligned_alloc(PAGE, bytes);
    if (memory)
        madvise(memory, bytes, MADV_HUGEPAGE);
    return memory;
}

/* Room for the largest of the parts. */
static int part_alloc(struct part *p, const nbhd_desc *whole, const int parts[2])
{
    size_t pixels = 0, padded = 0, dim = (size_t)p->features + 1, colours = (size_t)p->colours;
    for (int i = 0; i < parts[0] * parts[1]; i++) {
        place(p, whole, parts, i);
        size_t rows = (size_t)size_of(p->row[1]), columns = (size_t)size_of(p->column[1]);
        size_t more = (rows + (size_t)p->nlm->patch[0] - 1) * (columns + (size_t)p->nlm->patch[1] - 1);
        pixels = rows * columns > pixels ? rows * columns : pixels;
        padded = more > padded ? more : padded;
    }
    const struct {
        float **array;
        size_t count;
    } arrays[] = {{&p->weight, dim}, {&p->padded, padded * colours}, {&p->q, pixels * dim}, {&p->k, pixels * dim},
                  {&p->v, pixels * colours}, {&p->o, pixels * colours}};
    int status = TOOL_DONE;
    for (size_t i = 0; !status && i < sizeof arrays / sizeof *arrays; i++) {
        *arrays[i].array = huge_alloc(arrays[i].count);
        if (!*arrays[i].array)
            status = tool_fail(TOOL_FAILED, "out of memory: %zu numbers", arrays[i].count);
    }
    return status;
}

static void part_free(struct part *p)
{
    float *const arrays[] = {p->weight, p->padded, p->q, p->k, p->v, p->o};
    for (size_t i = 0; i < sizeof arrays / sizeof *arrays; i++)
        free(arrays[i]);
}

/* The attention over the whole image: rows, columns, window; lengths are set for each part. */
static nbhd_desc describe(const struct nlm *nlm, const struct part *p)
{
    nbhd_desc d = NBHD_DESC_INIT;
    d.rank = 2;
    d.head_dim = p->features + 1;
    d.head_dim_v = p->colours;
    d.scale = 1;
    d.threads = nlm->threads;
    d.length[0] = p->in->height, d.length[1] = p->in->width;
    for (int i = 0; i < 2; i++)
        d.window[i] = nlm->window[i] < d.length[i] ? nlm->window[i] : d.length[i];
    return d;
}

int nlm_denoise(const struct nlm *nlm, const struct image *in, struct image *out, struct nlm_report *report)
{
    struct part p = {.nlm = nlm, .in = in, .colours = image_colours(in)};
    p.features = nlm->patch[0] * nlm->patch[1] * p.colours;
    p.desc = describe(nlm, &p);
    const nbhd_desc whole = p.desc;
    double per_pixel = sizeof(float) * (2.0 * (p.features + 1) + 3.0 * p.colours);
    int parts[2];
    double least = 4.0 * whole.window[0] * whole.window[1]; /* smaller parts would be margin for the most part */
    cut(in, &whole, fmax(nlm->memory_mib * 1048576 / per_pixel, least), parts);
    report->parts = parts[0] * parts[1];
    struct runner runner = {0};
    struct progress bar = progress_begin("denoise");
    int status = part_alloc(&p, &whole, parts);
    if (!status)
        make_weights(&p);
    for (int i = 0; !status && i < report->parts; i++) {
        progress_at(&bar, (double)i / report->parts);
        place(&p, &whole, parts, i);
        status = part_run(&p, &runner, out, report);
    }
    progress_end(&bar);
    if (!status)
        snprintf(report->kernel, sizeof report->kernel, "%s", nbhd_plan_kernel(runner.plan));
    runner_close(&runner);
    part_free(&p);
    return status;
}
