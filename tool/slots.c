/* The tensors of a problem: one row each. */
#include "slots.h"

#include <stdint.h>

#include "array.h"

enum kind { LIKE_Q, LIKE_K, LIKE_V, LIKE_O, ROWS, EXTRA_K, EXTRA_V, BIAS, SCORES };
enum { FWD = 1 << NBHD_FORWARD, BWD = 1 << NBHD_BACKWARD, QK = 1 << NBHD_QK, AV = 1 << NBHD_AV,
       QKB = 1 << NBHD_QK_BACKWARD, AVB = 1 << NBHD_AV_BACKWARD };

static const struct {
    size_t offset;
    enum kind kind;
    bool f32;           /* whatever the problem's dtype */
    int read, written; /* the passes that do */
} slots[SLOT_COUNT] = {
    [SLOT_Q] = {offsetof(nbhd_args, q), LIKE_Q, false, FWD | BWD | QK | QKB, 0},
    [SLOT_K] = {offsetof(nbhd_args, k), LIKE_K, false, FWD | BWD | QK | QKB, 0},
    [SLOT_V] = {offsetof(nbhd_args, v), LIKE_V, false, FWD | BWD | AV | AVB, 0},
    [SLOT_O] = {offsetof(nbhd_args, o), LIKE_O, false, BWD, FWD | AV},
    [SLOT_LSE] = {offsetof(nbhd_args, lse), ROWS, true, BWD, FWD},
    [SLOT_EXTRA_K] = {offsetof(nbhd_args, extra_k), EXTRA_K, false, FWD | BWD | QK | QKB, 0},
    [SLOT_EXTRA_V] = {offsetof(nbhd_args, extra_v), EXTRA_V, false, FWD | BWD | AV | AVB, 0},
    [SLOT_DOUT] = {offsetof(nbhd_args, dout), LIKE_O, false, BWD | AVB, 0},
    [SLOT_DLSE] = {offsetof(nbhd_args, dlse), ROWS, true, BWD, 0},
    [SLOT_DQ] = {offsetof(nbhd_args, dq), LIKE_Q, false, 0, BWD | QKB},
    [SLOT_DK] = {offsetof(nbhd_args, dk), LIKE_K, false, 0, BWD | QKB},
    [SLOT_DV] = {offsetof(nbhd_args, dv), LIKE_V, false, 0, BWD | AVB},
    [SLOT_DEXTRA_K] = {offsetof(nbhd_args, dextra_k), EXTRA_K, false, 0, BWD | QKB},
    [SLOT_DEXTRA_V] = {offsetof(nbhd_args, dextra_v), EXTRA_V, false, 0, BWD | AVB},
    [SLOT_BIAS] = {offsetof(nbhd_args, bias), BIAS, true, FWD | BWD | QK | QKB, 0},
    [SLOT_DBIAS] = {offsetof(nbhd_args, dbias), BIAS, true, 0, BWD | QKB},
    [SLOT_SCORES] = {offsetof(nbhd_args, scores), SCORES, false, AV | AVB, QK},
    [SLOT_DSCORES] = {offsetof(nbhd_args, dscores), SCORES, false, QKB, AVB},
};

nbhd_tensor *slot_tensor(nbhd_args *args, int slot) { return (nbhd_tensor *)((char *)args + slots[slot].offset); }

enum slot_use slot_use(const nbhd_desc *desc, int slot)
{
    enum kind kind = slots[slot].kind;
    if (((kind == EXTRA_K || kind == EXTRA_V) && !desc->extra) || (kind == BIAS && !desc->bias))
        return SLOT_UNUSED;
    int pass = 1 << desc->pass;
    return slots[slot].read & pass ? SLOT_READ : slots[slot].written & pass ? SLOT_WRITTEN : SLOT_UNUSED;
}

bool slot_is_extra(int slot) { return slots[slot].kind == EXTRA_K || slots[slot].kind == EXTRA_V; }

int slot_dtype(const nbhd_desc *desc, int slot) { return slots[slot].f32 ? NBHD_F32 : desc->dtype; }

nbhd_desc desc_whole(const nbhd_desc *desc)
{
    nbhd_desc d = *desc;
    d.batch = d.batch ? d.batch : 1;
    d.heads = d.heads ? d.heads : 1;
    d.kv_heads = d.kv_heads ? d.kv_heads : d.heads;
    d.head_dim_v = d.head_dim_v ? d.head_dim_v : d.head_dim;
    for (int i = 0; i < d.rank; i++) {
        d.kv_length[i] = d.kv_length[i] ? d.kv_length[i] : d.length[i];
        d.dilation[i] = d.dilation[i] ? d.dilation[i] : 1;
        if (!d.window[i])
            d.window[i] = d.kv_length[i] == d.length[i] ? d.length[i] / d.dilation[i] : d.kv_length[i];
    }
    return d;
}

int slot_shape(const nbhd_desc *desc, int slot, long long shape[6])
{
    nbhd_desc d = desc_whole(desc);
    enum kind kind = slots[slot].kind;
    int n = 0;
    long long window = 1;
    if (kind == BIAS) {
        shape[n++] = d.heads;
        for (int i = 0; i < d.rank; i++)
            shape[n++] = 2LL * d.window[i] - 1;
        return n;
    }
    shape[n++] = d.batch;
    if (kind == EXTRA_K || kind == EXTRA_V) {
        shape[n++] = d.extra;
    } else {
        for (int i = 0; i < d.rank; i++) {
            shape[n++] = kind == LIKE_K || kind == LIKE_V ? d.kv_length[i] : d.length[i];
            window *= d.window[i];
        }
    }
    bool kv = kind == LIKE_K || kind == LIKE_V || kind == EXTRA_K || kind == EXTRA_V;
    shape[n++] = kv ? d.kv_heads : d.heads;
    if (kind == SCORES)
        shape[n++] = window;
    else if (kind != ROWS)
        shape[n++] = kind == LIKE_Q || kind == LIKE_K || kind == EXTRA_K ? d.head_dim : d.head_dim_v;
    return n;
}

size_t slot_elements(const nbhd_desc *desc, int slot)
{
    long long shape[6];
    int rank = slot_shape(desc, slot, shape);
    size_t n = 1;
    for (int i = 0; i < rank; i++)
        if (__builtin_mul_overflow(n, (size_t)shape[i], &n))
            return SIZE_MAX;
    return n;
}

size_t slot_bytes(const nbhd_desc *desc, int slot)
{
    size_t bytes;
    bool over = __builtin_mul_overflow(slot_elements(desc, slot), dtype_size(slot_dtype(desc, slot)), &bytes);
    return over ? SIZE_MAX : bytes;
}
