/* The sequences of a ragged batch: where they lie, and whether they may. See ragged.h. */
#include <stdlib.h>
#include "core/plan.h"
#include "core/ragged.h"

enum { MOST_TOKENS = 1 << 30 };

static nbhd_status check_padding(const struct nbhd_request *r, const struct nbhd_sequence *s)
{
    for (int i = 0; i < r->desc.rank; i++) {
        const int length = r->desc.length[i], kv = r->desc.kv_length[i] ? r->desc.kv_length[i] : length;
        if (s->lengths[i] > length)
            return nbhd_fail(NBHD_ERROR_INVALID, "sequence %d: its length[%d] is %d, and the padded tensors' is %d",
                             s->index, i, s->lengths[i], length);
        if (s->lengths[3 + i] > kv)
            return nbhd_fail(NBHD_ERROR_INVALID, "sequence %d: its kv_length[%d] is %d, and the padded tensors' is %d",
                             s->index, i, s->lengths[3 + i], kv);
    }
    return NBHD_OK;
}

/* Where the next tokens begin: at *end, or where the caller says; *end becomes the extent so far. */
static nbhd_status place_tokens(const struct nbhd_sequence *s, int rank, bool keys, const long long *offsets,
                                long long *at, long long *end)
{
    long long tokens = 1;
    for (int i = 0; i < rank && tokens <= MOST_TOKENS; i++)
        tokens *= s->lengths[3 * keys + i];
    *at = offsets ? offsets[s->index] : *end;
    if (*at < 0 || *at > MOST_TOKENS || *at + tokens > MOST_TOKENS)
        return nbhd_fail(NBHD_ERROR_INVALID, "sequence %d: its %s begin at %lld; they must lie between 0 and %d",
                         s->index, keys ? "keys" : "tokens", *at, MOST_TOKENS);
    *end = *at + tokens > *end ? *at + tokens : *end;
    return NBHD_OK;
}

static nbhd_status read_sequence(struct nbhd_request *r, struct nbhd_sequence *s, int index)
{
    const int rank = r->desc.rank;
    *s = (struct nbhd_sequence){.index = index};
    for (int i = 0; i < rank; i++) {
        s->lengths[i] = r->ragged.lengths[(size_t)index * (size_t)rank + (size_t)i];
        s->lengths[3 + i] =
            r->ragged.kv_lengths ? r->ragged.kv_lengths[(size_t)index * (size_t)rank + (size_t)i] : s->lengths[i];
        if (s->lengths[i] < 1 || s->lengths[3 + i] < 1)
            return nbhd_fail(NBHD_ERROR_INVALID, "sequence %d: its %s[%d] is %d; it must be 1 or more", index,
                             s->lengths[i] < 1 ? "length" : "kv_length", i,
                             s->lengths[i] < 1 ? s->lengths[i] : s->lengths[3 + i]);
    }
    if (r->padded)
        return check_padding(r, s);
    const long long *kv_offsets =
        r->ragged.kv_offsets || r->ragged.kv_lengths ? r->ragged.kv_offsets : r->ragged.offsets;
    const nbhd_status status = place_tokens(s, rank, false, r->ragged.offsets, &s->token, &r->tokens);
    return status ? status : place_tokens(s, rank, true, kv_offsets, &s->kv_token, &r->kv_tokens);
}

nbhd_status nbhd_sequences_check(struct nbhd_request *r)
{
    nbhd_desc *d = &r->desc;
    int set = 0;
    if (!r->ragged.lengths)
        return nbhd_fail(NBHD_ERROR_INVALID, "ragged.lengths is NULL; it must be [sequences][rank] lengths");
    if (r->ragged.sequences < 1)
        return nbhd_fail(NBHD_ERROR_INVALID, "ragged.sequences is %d; it must be 1 or more", r->ragged.sequences);
    if (d->rank < 1 || d->rank > 3)
        return nbhd_fail(NBHD_ERROR_INVALID, "rank is %d; it must be 1 to 3", d->rank);
    if (d->pass < NBHD_FORWARD || d->pass > NBHD_AV_BACKWARD)
        return nbhd_fail(NBHD_ERROR_INVALID, "pass is %d; it must be %d to %d", d->pass, NBHD_FORWARD,
                         NBHD_AV_BACKWARD);
    if (d->batch && d->batch != r->ragged.sequences)
        return nbhd_fail(NBHD_ERROR_INVALID, "batch is %d where ragged.sequences is %d; it must be that, or 0",
                         d->batch, r->ragged.sequences);
    for (int i = 0; i < d->rank; i++)
        set += d->length[i] > 0;
    for (int i = 0; i < d->rank; i++)
        if (d->length[i] < 0 || d->kv_length[i] < 0 || (set && !d->length[i]) || (!set && d->kv_length[i]))
            return nbhd_fail(NBHD_ERROR_INVALID,
                             "length[%d] is %d and kv_length[%d] is %d; of packed tensors all must be 0, of "
                             "padded ones they are their axes",
                             i, d->length[i], i, d->kv_length[i]);
    r->padded = set > 0;
    if (r->padded && (r->ragged.offsets || r->ragged.kv_offsets))
        return nbhd_fail(NBHD_ERROR_INVALID,
                         "ragged.offsets is given, and length[0] is %d; padded tensors have no offsets", d->length[0]);
    return NBHD_OK;
}

static int by_token(const void *a, const void *b)
{
    const struct nbhd_sequence *x = a, *y = b;
    return x->token < y->token ? -1 : x->token > y->token;
}

static int by_kv_token(const void *a, const void *b)
{
    const struct nbhd_sequence *x = a, *y = b;
    return x->kv_token < y->kv_token ? -1 : x->kv_token > y->kv_token;
}

static long long tokens_of(const struct nbhd_sequence *s, int rank, bool keys)
{
    long long tokens = 1;
    for (int i = 0; i < rank; i++)
        tokens *= s->lengths[3 * keys + i];
    return tokens;
}

/* No token may be written twice. Sequences may share keys as long as no gradient is written to them. */
static nbhd_status check_overlap(const struct nbhd_request *r, struct nbhd_sequence *list)
{
    const int pass = r->desc.pass;
    const bool writes_keys = pass == NBHD_BACKWARD || pass == NBHD_QK_BACKWARD || pass == NBHD_AV_BACKWARD;
    for (int keys = 0; keys <= writes_keys; keys++) {
        if (!r->ragged.offsets && !r->ragged.kv_offsets)
            continue;
        qsort(list, (size_t)r->ragged.sequences, sizeof *list, keys ? by_kv_token : by_token);
        for (int i = 1; i < r->ragged.sequences; i++) {
            const struct nbhd_sequence *x = &list[i - 1], *y = &list[i];
            const long long begin = keys ? x->kv_token : x->token, next = keys ? y->kv_token : y->token;
            if (next < begin + tokens_of(x, r->desc.rank, keys))
                return nbhd_fail(NBHD_ERROR_INVALID,
                                 "sequences %d and %d share %s from %lld on, which the pass %s writes", x->index,
                                 y->index, keys ? "keys" : "tokens", next, nbhd_pass_name(pass));
        }
    }
    return NBHD_OK;
}

nbhd_status nbhd_sequences_read(struct nbhd_request *r, struct nbhd_sequence *list)
{
    nbhd_status status = NBHD_OK;
    for (int i = 0; i < r->ragged.sequences && !status; i++)
        status = read_sequence(r, &list[i], i);
    return status ? status : check_overlap(r, list);
}
