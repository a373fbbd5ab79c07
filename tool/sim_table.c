/* Measurements and prices: see sim_table.h. */
#include "sim_table.h"

#include <errno.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

enum { MOST_BYTES = 1 << 24, MOST_SAMPLES = 4096 };

static int read_file(const char *path, char **text)
{
    FILE *file = fopen(path, "rb");
    if (!file)
        return tool_fail(TOOL_USAGE, "%s: %s", path, strerror(errno));
    *text = malloc(MOST_BYTES + 1);
    size_t length = *text ? fread(*text, 1, MOST_BYTES + 1, file) : 0;
    const bool failed = ferror(file);
    fclose(file);
    if (!*text)
        return tool_fail(TOOL_FAILED, "%s: out of memory", path);
    if (failed || length > MOST_BYTES || memchr(*text, 0, length)) {
        free(*text);
        return tool_fail(TOOL_USAGE, "%s: %s", path,
                         failed ? "it cannot be read" : "it is no table: too large, or with bytes of zero");
    }
    (*text)[length] = '\0';
    return TOOL_DONE;
}

int sim_table_read(const char *path, nbhd_sim_sample **samples, int *count)
{
    char *text = NULL;
    int status = read_file(path, &text);
    if (status)
        return status;
    *samples = malloc(MOST_SAMPLES * sizeof **samples);
    if (!*samples)
        status = tool_fail(TOOL_FAILED, "%s: out of memory", path);
    else if (nbhd_sim_samples_parse(text, *samples, MOST_SAMPLES, count)) {
        status = tool_fail(TOOL_USAGE, "%s: %s", path, nbhd_last_error());
        free(*samples);
        *samples = NULL;
    }
    free(text);
    return status;
}

/* ---- prices ---- */

enum { PRICES = 9 };
static const char *const price_names[PRICES] = {"matrix", "softmax", "mask", "step",  "tile",
                                                "launch", "l2",      "memory", "peak"};

static double *price(nbhd_sim_device *d, int i)
{
    double *const prices[PRICES] = {&d->matrix, &d->softmax, &d->mask,   &d->step, &d->tile,
                                    &d->launch, &d->l2,      &d->memory, &d->peak};
    return prices[i];
}

static int read_price(const char *word, nbhd_sim_device *device)
{
    const char *equal = strchr(word, '=');
    char *end;
    const double value = strtod(equal + 1, &end);
    if (end == equal + 1 || *end || !isfinite(value) || value < 0)
        return tool_fail(TOOL_USAGE, "--model: '%s' has no number that is 0 or more", word);
    if (!strncmp(word, "processors=", 11)) {
        device->processors = value < 1e6 ? (int)value : 0;
        return TOOL_DONE;
    }
    if (!strncmp(word, "element=", 8)) {
        device->element = value < 64 ? (int)value : 64;
        return TOOL_DONE;
    }
    for (int i = 0; i < PRICES; i++)
        if (strlen(price_names[i]) == (size_t)(equal - word) &&
            !strncmp(word, price_names[i], (size_t)(equal - word))) {
            *price(device, i) = value;
            return TOOL_DONE;
        }
    return tool_fail(TOOL_USAGE,
                     "--model: '%s' is none of processors, element, matrix, softmax, mask, step, tile, launch, l2, "
                     "memory, peak",
                     word);
}

int sim_model_read(const char *text, nbhd_sim_device *device)
{
    *device = (nbhd_sim_device)NBHD_SIM_DEVICE_INIT;
    for (const char *p = text + strspn(text, " ,"); *p; p += strspn(p, " ,")) {
        char word[64];
        const size_t length = strcspn(p, " ,");
        snprintf(word, sizeof word, "%.*s", length < 63 ? (int)length : 63, p);
        p += length;
        if (strchr(word, '=')) {
            int status = read_price(word, device);
            if (status)
                return status;
        } else if (nbhd_sim_device_get(device, word)) {
            return tool_fail(TOOL_USAGE, "--model: %s", nbhd_last_error());
        }
    }
    return TOOL_DONE;
}

void sim_model_print(const nbhd_sim_device *device)
{
    nbhd_sim_device d = *device;
    printf("processors=%d element=%d", d.processors, d.element);
    for (int i = 0; i < PRICES; i++)
        printf(" %s=%.4g", price_names[i], *price(&d, i));
    putchar('\n');
}
