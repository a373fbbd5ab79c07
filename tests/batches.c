/* See batches.h. */
#include "batches.h"
#include <stdio.h>
#include <string.h>

const struct batch batches[] = {
    {"h2 d16 9x33 w7x7", 3, {{13, 24}, {16, 16}, {9, 33}}, {{0}}},
    {"h2 d16 7x11 w3x5 s2x3", 1, {{7, 11}}, {{0}}},
    {"h4/2 d24/40 5 w4 ec", 6, {{17}, {4}, {61}, {4}, {5}, {128}}, {{0}}},
    {"d8 1", 5, {{1}, {37}, {1}, {2}, {64}}, {{0}}}, /* whole axes */
    {"h3/1 d20 6x7x5 w3x3x2 r1x2x1 entc", 4, {{6, 7, 5}, {3, 6, 9}, {4, 13, 2}, {6, 7, 5}}, {{0}}},
    {"h2 d12 9x10 w5x3 r1x3 extra=3", 4, {{9, 10}, {5, 9}, {12, 21}, {6, 11}}, {{0}}},
    {"h4/2 d16/8 9 kv=20", 5, {{9}, {1}, {33}, {7}, {12}}, {{20}, {5}, {33}, {1}, {70}}}, /* cross attention */
    {"h2 d16 4x6 kv=8x9 extra=2", 3, {{4, 6}, {10, 3}, {7, 7}}, {{8, 9}, {2, 5}, {7, 7}}},
    {"h2 d16 9x9 w9x3 ett", 2, {{9, 9}, {25, 14}}, {{0}}},
    {"h2 d16 8x9 w5x4 s2x1 bias", 4, {{8, 9}, {13, 4}, {5, 20}, {8, 9}}, {{0}}},
    {"h2 d16 3x4 ecn", 5, {{7, 1}, {1, 12}, {9, 8}, {1, 1}, {30, 1}}, {{0}}}, /* axes of one token */
    {"h4/2 d32 8 w7", 9, {{8}, {8}, {8}, {7}, {9}, {8}, {100}, {50}, {8}}, {{0}}},
    {NULL, 0, {{0}}, {{0}}},
};

bool batch_unfused(const struct batch *b, const nbhd_desc *desc)
{
    return !desc->extra && desc->window[0] && !b->kv_lengths[0][0];
}

static void flatten(const int (*from)[3], int sequences, int rank, int *to)
{
    for (int i = 0; i < sequences * rank; i++)
        to[i] = from[i / rank][i % rank];
}

nbhd_status batch_run(const struct batch *b, const nbhd_desc *desc, const struct case_options *given,
                      struct case_result *result, char text[NBHD_TEXT])
{
    int lengths[27], kv_lengths[27];
    struct case_options options = *given;
    flatten(b->lengths, b->sequences, desc->rank, lengths);
    flatten(b->kv_lengths, b->sequences, desc->rank, kv_lengths);
    options.sequences = b->sequences;
    options.lengths = lengths;
    options.kv_lengths = b->kv_lengths[0][0] ? kv_lengths : NULL;
    int n = snprintf(text, NBHD_TEXT, "'%.200s' ", b->line);
    for (int s = 0; s < b->sequences; s++)
        for (int i = 0; i < desc->rank && n < NBHD_TEXT; i++)
            n += snprintf(text + n, (size_t)(NBHD_TEXT - n), "%s%d", i ? "x" : s ? "+" : "", b->lengths[s][i]);
    if (n < NBHD_TEXT)
        snprintf(text + n, (size_t)(NBHD_TEXT - n), " pass %d, dtype %d, placement %d, layout %d", desc->pass,
                 desc->dtype, options.placement, options.layout);
    return case_run(desc, &options, result);
}

struct batch batch_random(unsigned seed, nbhd_desc *desc)
{
    const int pass = desc->pass, dtype = desc->dtype;
    struct batch b = {.line = "random", .sequences = 1 + (int)(seed * 2654435761u >> 13) % 9};
    bool cross = false;
    *desc = case_random(seed, 2e4);
    desc->dtype = dtype;
    for (int a = 0; a < desc->rank; a++)
        cross |= desc->kv_length[a] && desc->kv_length[a] != desc->length[a];
    for (int s = 0; s < b.sequences; s++)
        for (int a = 0; a < desc->rank; a++) {
            const unsigned r = (seed + 31u * (unsigned)s + 7u * (unsigned)a) * 2654435761u >> 20;
            const int window = desc->window[a] ? desc->window[a] : 1,
                      dilation = desc->dilation[a] ? desc->dilation[a] : 1;
            b.lengths[s][a] = (cross ? 1 : window * dilation) + (int)(r % 7);
            b.kv_lengths[s][a] = cross ? 1 + (int)(r / 7 % 9) : 0;
        }
    for (int a = 0; a < desc->rank; a++) {
        if (cross) /* seen whole */
            desc->window[a] = desc->stride[a] = desc->dilation[a] = desc->edge[a] = 0;
        if (!desc->window[a])
            desc->bias = 0;
    }
    desc->pass = pass;
    if (pass > NBHD_BACKWARD)
        desc->extra = 0;
    if (pass > NBHD_BACKWARD && !batch_unfused(&b, desc))
        desc->pass = NBHD_FORWARD;
    return b;
}
