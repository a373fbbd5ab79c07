/* nbhd denoise: non-local means on a photograph. */
#include <math.h>
#include <stdio.h>
#include <string.h>
#include <strings.h>
#include <time.h>

#include "args.h"
#include "device.h"
#include "image.h"
#include "json.h"
#include "nlm.h"
#include "noise.h"
#include "parallel.h"
#include "timing.h"
#include "tool.h"

/* Strength that is best on photographs for noise of deviation 1: docs/performance.md. */
static const double strength_per_sigma = 0.9, strength_min = 1;

struct options {
    const char *in, *out, *clean, *save_noisy, *kernel;
    struct extents window, patch;
    double strength, noise, memory;
    int device, threads, seed;
    bool json;
};

/* What was done, for the report. PSNR is NAN where there is nothing to compare with. The files are opened before the
 * work, which may take minutes, so that what cannot be written is told at once. */
struct outcome {
    struct image image;
    struct outfile *out, *save_noisy;
    int window[2];
    double sigma, before, after, ms, cpu_ms;
    struct nlm nlm;
    struct nlm_report report;
};

static int parse(int argc, char **argv, struct options *o)
{
    const struct option table[] = {
        opt_text("out", 'o', &o->out, "FILE", "where the denoised photograph goes, a PNG of the same kind"),
        opt_extents("window", 'w', &o->window, "21x21", "rows x columns of pixels that are averaged (21x21)"),
        opt_extents("patch", 'p', &o->patch, "7x7", "rows x columns that are compared, odd (7x7)"),
        opt_real("strength", 's', &o->strength, 0.01, 10000, "H",
                 "weights exp(-distance^2 / H^2), in grey levels of 0 to 255 (by the noise)"),
        opt_real("noise", 'n', &o->noise, 0, 1000, "SIGMA", "first add Gaussian noise of this deviation, of 0 to 255"),
        opt_int("seed", 0, &o->seed, 0, 0x7fffffff, "N", "of the noise (1)"),
        opt_text("save-noisy", 0, &o->save_noisy, "FILE", "also write the photograph with the noise"),
        opt_text("clean", 0, &o->clean, "FILE", "a clean photograph of the same size to compare with"),
        opt_real("memory", 'm', &o->memory, 1, 1e6, "MIB",
                 "for features; larger photographs are done in parts of 4 windows at least (512)"),
        opt_choice("device", 'd', &o->device, device_choices, "NAME", "cpu or cuda (cpu)"),
        opt_text("kernel", 'k', &o->kernel, "NAME", "this kernel, as `nbhd list` names it, and no other"),
        opt_int("threads", 't', &o->threads, 1, 4096, "N", "CPU threads (all)"),
        opt_flag("json", 0, &o->json, "print the outcome as a line of JSON"),
        opt_end(),
    };
    const struct usage usage = {
        .synopsis = "nbhd denoise PHOTO.png -o OUT.png [OPTIONS]",
        .about = "Removes noise from a photograph by non-local means: each pixel becomes the average of the pixels\n"
                 "in a window around it, weighted by how alike the patches about them are. Grey, RGB, palette and\n"
                 "alpha, 8 and 16 bits; alpha is kept. Without --strength it follows the noise that is found in the\n"
                 "photograph (or was added).\n"
                 "With --noise or --clean it reports the peak signal-to-noise ratio (PSNR) before and after.\n\n"
                 "  nbhd denoise photo.png -o out.png\n"
                 "  nbhd denoise data/chelsea.png -o out.png --noise 25 --window 31x31",
        .options = table,
        .operands_min = 1,
        .operands_max = 1,
        .operands_name = "one photograph",
    };
    int count;
    int status = args_parse(&usage, argc, argv, &count);
    o->in = status == ARGS_GO_ON ? argv[0] : NULL;
    return status;
}

/* "7x7", or "7" for a square. */
static int square(const char *name, const struct extents *e, int usual, bool odd, int value[2])
{
    if (e->count == 3)
        return tool_fail(TOOL_USAGE, "--%s: a photograph has two axes, rows x columns, and three numbers were given",
                         name);
    value[0] = e->count ? e->at[0] : usual;
    value[1] = e->count == 2 ? e->at[1] : value[0];
    for (int i = 0; odd && i < 2; i++)
        if (value[i] % 2 == 0)
            return tool_fail(TOOL_USAGE, "--%s: %d is even; a patch has a pixel in its middle, so both must be odd",
                             name, value[i]);
    return TOOL_DONE;
}

/* What is written is a PNG whatever it is called. */
static int check_name(const char *option, const char *path)
{
    const size_t length = path ? strlen(path) : 0;
    if (path && (length < 5 || strcasecmp(path + length - 4, ".png")))
        return tool_fail(TOOL_USAGE, "--%s: %s: a PNG is written, and its name must end with .png", option, path);
    return TOOL_DONE;
}

static int check_options(const struct options *o, struct nlm *nlm)
{
    if (!o->out)
        return tool_fail(TOOL_USAGE, "where should the result go? -o OUT.png");
    int status = check_name("out", o->out);
    if (status || (status = check_name("save-noisy", o->save_noisy)))
        return status;
    if (o->clean && o->noise > 0)
        return tool_fail(TOOL_USAGE, "--noise compares with the photograph itself and --clean with another; give one");
    if (o->save_noisy && o->noise <= 0)
        return tool_fail(TOOL_USAGE, "--save-noisy needs --noise, the noise to add");
    *nlm = (struct nlm){.device = o->device, .threads = o->threads, .kernel = o->kernel, .memory_mib = o->memory};
    status = square("window", &o->window, 21, false, nlm->window);
    return status ? status : square("patch", &o->patch, 7, true, nlm->patch);
}

static const char *kind(const struct image *image)
{
    static const char *const names[] = {"", "grey", "grey with alpha", "RGB", "RGB with alpha"};
    return names[image->channels];
}

/* The photograph that PSNR is measured against: a copy from before the noise, --clean's, or none. */
static int read_clean(const struct options *o, const struct image *image, struct image *clean)
{
    if (o->noise > 0)
        return image_copy(clean, image) ? TOOL_DONE : tool_fail(TOOL_FAILED, "out of memory");
    if (!o->clean)
        return TOOL_DONE;
    int status = image_read(clean, o->clean);
    if (!status && (clean->width != image->width || clean->height != image->height ||
                    image_colours(clean) != image_colours(image)))
        status = tool_fail(TOOL_USAGE, "%s is %dx%d %s and %s is %dx%d %s; they must agree to be compared", o->clean,
                           clean->width, clean->height, kind(clean), o->in, image->width, image->height, kind(image));
    return status;
}

/* Limits that depend on the photograph. */
static int fit(const struct image *image, struct outcome *out)
{
    const int extent[2] = {image->height, image->width};
    int features = out->nlm.patch[0] * out->nlm.patch[1] * image_colours(image);
    if (out->nlm.patch[0] > 511 || out->nlm.patch[1] > 511 || features > 511)
        return tool_fail(TOOL_USAGE, "--patch: %dx%d of %d %s is too large; the product must be at most 511",
                         out->nlm.patch[0], out->nlm.patch[1], image_colours(image),
                         image_colours(image) == 1 ? "colour" : "colours");
    for (int i = 0; i < 2; i++)
        out->window[i] = out->nlm.window[i] < extent[i] ? out->nlm.window[i] : extent[i];
    if (out->window[0] < out->nlm.window[0] || out->window[1] < out->nlm.window[1])
        tool_note("the window, %dx%d, is larger than the photograph; it is cut to %dx%d", out->nlm.window[0],
                  out->nlm.window[1], out->window[0], out->window[1]);
    return TOOL_DONE;
}

static void decibels(const char *what, double psnr, const char *remark)
{
    if (isinf(psnr))
        printf("%s: no difference\n", what);
    else
        printf("%s: PSNR %.2f dB%s\n", what, psnr, remark);
}

static void print(const struct options *o, const struct outcome *r)
{
    printf("%s: %dx%d, %s, %d bits\n", o->in, r->image.width, r->image.height, kind(&r->image), r->image.bits);
    if (o->noise > 0)
        printf("added noise of deviation %g (seed %d)\n", o->noise, o->seed);
    else if (!(o->strength > 0))
        printf("found noise of deviation %.1f\n", r->sigma);
    if (!isnan(r->before))
        decibels("before", r->before, "");
    printf("denoised in %.2f s: window %dx%d, patch %dx%d, strength %.3g; %s", r->ms * 1e-3, r->window[0], r->window[1],
           r->nlm.patch[0], r->nlm.patch[1], r->nlm.strength, r->report.kernel);
    const int threads = threads_of(o->threads);
    if (o->device == NBHD_DEVICE_CPU)
        printf(", %d %s", threads, threads == 1 ? "thread" : "threads");
    printf(", %.3g GFLOP/s\n", r->report.flops / r->report.attention_ms * 1e-6);
    if (!isnan(r->after))
        decibels("after", r->after, " (higher is nearer to the clean photograph)");
    printf("wrote %s\n", o->out);
}

static void print_json(const struct options *o, const struct outcome *r)
{
    struct json j = json_begin();
    json_text(&j, "photo", o->in);
    json_text(&j, "out", o->out);
    json_real(&j, "width", r->image.width);
    json_real(&j, "height", r->image.height);
    json_real(&j, "channels", r->image.channels);
    json_real(&j, "bits", r->image.bits);
    json_real(&j, "noise", o->noise);
    json_real(&j, "noise_found", r->sigma);
    json_real(&j, "strength", r->nlm.strength);
    json_real(&j, "psnr_before", r->before);
    json_real(&j, "psnr_after", r->after);
    json_text(&j, "kernel", r->report.kernel);
    json_text(&j, "device", device_choices[o->device]);
    json_real(&j, "ms", r->ms);
    json_real(&j, "cpu_ms", r->cpu_ms);
    json_real(&j, "features_ms", r->report.features_ms);
    json_real(&j, "attention_ms", r->report.attention_ms);
    json_real(&j, "parts", r->report.parts);
    json_real(&j, "gflop", r->report.flops * 1e-9);
    json_end(&j);
}

/* From the photograph as read to the one to be written, in place of it. */
static int denoise(const struct options *o, struct outcome *r, const struct image *clean)
{
    struct image noisy = {0};
    if (o->noise > 0)
        noise_add(&r->image, o->noise, (unsigned)o->seed);
    int status = r->save_noisy ? image_save(&r->image, &r->save_noisy) : TOOL_DONE;
    if (status)
        return status;
    r->sigma = noise_estimate(&r->image);
    r->nlm.strength = o->strength > 0 ? o->strength
                                      : fmax(strength_min, strength_per_sigma * (o->noise > 0 ? o->noise : r->sigma));
    if (!image_copy(&noisy, &r->image))
        return tool_fail(TOOL_FAILED, "out of memory");
    double begun = now_ms();
    clock_t cpu = clock();
    status = nlm_denoise(&r->nlm, &noisy, &r->image, &r->report);
    r->ms = now_ms() - begun;
    r->cpu_ms = (double)(clock() - cpu) * 1e3 / CLOCKS_PER_SEC;
    if (!status && clean->sample) {
        r->before = image_psnr(&noisy, clean);
        r->after = image_psnr(&r->image, clean);
    }
    image_free(&noisy);
    return status;
}

static int run(int argc, char **argv)
{
    struct options o = {.seed = 1, .memory = 512};
    struct outcome r = {.before = NAN, .after = NAN};
    struct image clean = {0};
    int status = parse(argc, argv, &o);
    if (status != ARGS_GO_ON)
        return status;
    status = check_options(&o, &r.nlm);
    if (!status)
        status = image_read(&r.image, o.in);
    if (!status)
        status = read_clean(&o, &r.image, &clean);
    if (!status)
        status = fit(&r.image, &r);
    if (!status)
        status = outfile_open(&r.out, o.out);
    if (!status && o.save_noisy)
        status = outfile_open(&r.save_noisy, o.save_noisy);
    if (!status)
        status = denoise(&o, &r, &clean);
    if (!status)
        status = image_save(&r.image, &r.out);
    if (!status)
        (o.json ? print_json : print)(&o, &r);
    outfile_abandon(&r.out);
    outfile_abandon(&r.save_noisy);
    image_free(&r.image);
    image_free(&clean);
    return status;
}

const struct command cmd_denoise = {"denoise", "removes noise from a photograph (PNG)", run};
