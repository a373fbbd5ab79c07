/* See case.h. Plans and runs a case in buffers of the kernel's dtype and layout; case_tensors.c makes them,
 * case_oracle.c judges. */
#define _GNU_SOURCE
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>
#include "case_run.h"

/* ---- host memory that ends at an inaccessible page ---- */

struct guard {
    size_t mapped;
    char *base;
};

static void *guarded_alloc(size_t bytes)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (bytes + sizeof(struct guard) + page - 1) / page * page;
    char *base = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED)
        return NULL;
    mprotect(base + whole, page, PROT_NONE);
    char *user = base + whole - bytes;
    const struct guard guard = {whole + page, base};
    memcpy(base, &guard, sizeof guard); /* first in the mapping: user - base >= sizeof guard */
    return user;
}

static void guarded_release(void *user)
{
    const uintptr_t page = (uintptr_t)sysconf(_SC_PAGESIZE);
    struct guard guard;
    /* The header lies at the start of the mapping; walk down to the page that holds it. */
    uintptr_t at = (uintptr_t)user / page * page;
    for (;; at -= page) {
        memcpy(&guard, (void *)at, sizeof guard);
        if (guard.base == (char *)at)
            break;
    }
    munmap(guard.base, guard.mapped);
}

static bool host_copy(void *to, const void *from, size_t bytes)
{
    memcpy(to, from, bytes);
    return true;
}

/* ---- the kernel's side ---- */

/* Packed: of [token, heads]; padded: of [batch, axes, heads]. */
static void set_ragged_strides(struct tensor *t, int rank, bool padded)
{
    long long *stride = t->arg->stride, step = t->stride[3];
    stride[0] = step;
    stride[1] = t->stride[4];
    for (int i = 0; padded && i <= rank; i++) {
        stride[rank - i] = step;
        step *= t->tokens->largest[i < rank ? 2 - i : 0];
        stride[1 + rank] = t->stride[4];
    }
}

static bool make_buffer(struct run *r, struct tensor *t)
{
    const size_t bytes = (size_t)t->elements * case_size_of(t->dtype);
    if (t->owner) {
        t->host = malloc(bytes);
        t->device = r->memory.alloc(bytes);
    } else {
        t->host = r->tensors[Q].host;
        t->device = r->tensors[Q].device;
    }
    if (!t->host || !t->device)
        return false;
    for (long long i = 0; t->owner && i < t->elements; i++)
        case_put(t->host + (size_t)i * case_size_of(t->dtype), t->dtype, (double)NAN);
    for (long long i = 0; !t->output && i < t->count; i++) {
        const double value = t->dtype == NBHD_F64 ? t->exact[i] : oracle_round(case_precision(t->dtype), t->exact[i]);
        case_put(t->host + (size_t)case_place(t, i) * case_size_of(t->dtype), t->dtype, value);
    }
    t->arg->data = (char *)t->device + (size_t)t->offset * case_size_of(t->dtype);
    if (r->options->layout == CASE_CONTIGUOUS)
        return true;
    const int rank = case_of_extra((int)(t - r->tensors)) ? 1 : r->desc.rank;
    if (t->tokens) {
        set_ragged_strides(t, rank, r->options->placement == CASE_PADDED);
        return true;
    }
    t->arg->stride[0] = t->stride[0];
    for (int i = 0; i <= rank; i++)
        t->arg->stride[1 + i] = t->stride[4 - rank + i];
    return true;
}

static bool upload_all(struct run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        struct tensor *t = &r->tensors[i];
        if (t->name && t->owner &&
            !r->memory.upload(t->device, t->host, (size_t)t->elements * case_size_of(t->dtype)))
            return false;
    }
    return true;
}

/* Whether the row says that this output may differ in its last bits from run to run. */
static bool in_any_order(const struct run *r, const char *kernel, int tensor)
{
    return tensor == DQ && !strcmp(kernel, "cuda.bwd_sm90") && !(r->options->flags & NBHD_PLAN_DETERMINISTIC);
}

static unsigned long long hash_outputs(const struct run *r, char *const copies[TENSORS], const char *kernel)
{
    unsigned long long hash = 1469598103934665603u; /* FNV-1a */
    for (int i = 0; i < TENSORS; i++)
        if (copies[i] && !in_any_order(r, kernel, i))
            for (size_t at = 0; at < (size_t)r->tensors[i].elements * case_size_of(r->tensors[i].dtype); at++)
                hash = (hash ^ (unsigned char)copies[i][at]) * 1099511628211u;
    return hash;
}

static bool execute(struct run *r, const nbhd_plan *plan, void *workspace, struct case_result *result)
{
    if (!upload_all(r)) /* outputs and gaps are NaN again */
        return snprintf(result->why, sizeof result->why, "upload failed"), false;
    const nbhd_status status = nbhd_execute(plan, &r->args, workspace, NULL);
    if (status) {
        snprintf(result->why, sizeof result->why, "execute: %s", nbhd_last_error());
        return false;
    }
    return true;
}

/* A fresh host copy of the outputs; the NaN-filled originals stay for the next upload. */
static bool fetch_outputs(struct run *r, char *copies[TENSORS])
{
    bool ok = true;
    for (int i = 0; i < TENSORS; i++) {
        const struct tensor *t = &r->tensors[i];
        copies[i] = NULL;
        if (!t->output || !t->arg->data)
            continue;
        const size_t bytes = (size_t)t->elements * case_size_of(t->dtype);
        copies[i] = malloc(bytes);
        ok = ok && copies[i] && r->memory.download(copies[i], t->device, bytes);
    }
    return ok;
}

/* Gaps between elements must still hold the NaN that they were filled with. */
static bool gaps_untouched(const struct tensor *t, const char *got, struct case_result *result)
{
    bool *inside = calloc((size_t)t->elements, sizeof *inside);
    bool ok = inside != NULL;
    for (long long i = 0; ok && i < t->count; i++)
        inside[case_place(t, i)] = true;
    for (long long i = 0; ok && i < t->elements; i++)
        ok = inside[i] || isnan(case_get(got + (size_t)i * case_size_of(t->dtype), t->dtype));
    free(inside);
    if (!ok)
        snprintf(result->why, sizeof result->why, "%s was written between its elements", t->name);
    return ok;
}

static bool check_outputs(struct run *r, struct case_result *result)
{
    char *copies[TENSORS];
    bool ok = fetch_outputs(r, copies);
    if (!ok)
        snprintf(result->why, sizeof result->why, "download failed");
    for (int i = 0; ok && i < TENSORS; i++)
        if (copies[i])
            ok = case_compare(r, &r->tensors[i], copies[i], result) &&
                 gaps_untouched(&r->tensors[i], copies[i], result);
    if (ok)
        result->bits = hash_outputs(r, copies, result->kernel);
    for (int i = 0; i < TENSORS; i++)
        free(copies[i]);
    return ok;
}

static bool execute_and_check(struct run *r, const nbhd_plan *plan, void *workspace, struct case_result *result)
{
    if (!execute(r, plan, workspace, result) || !check_outputs(r, result))
        return false;
    const unsigned long long first = result->bits;
    for (int i = 0; i < r->options->repeats; i++) {
        if (r->options->before)
            r->options->before(r->options->state);
        if (!execute(r, plan, workspace, result) || !check_outputs(r, result))
            return false;
        if (result->bits != first) {
            snprintf(result->why, sizeof result->why, "repetition %d gave other bits than the first run", i + 1);
            return false;
        }
    }
    return true;
}

static void release(struct run *r)
{
    for (int i = 0; i < TENSORS; i++) {
        struct tensor *t = &r->tensors[i];
        free(t->exact);
        free(t->plain);
        if (t->owner && t->host)
            free(t->host);
        if (t->owner && t->device)
            r->memory.release(t->device);
    }
    case_release_place(&r->tokens);
    case_release_place(&r->keys);
}

static nbhd_status prepare(struct run *r, struct case_result *result)
{
    bool ok = case_describe(r);
    if (ok && r->options->layout == CASE_PACKED)
        case_pack(r);
    if (ok)
        case_fill(r);
    ok = ok && case_consult(r, false) && case_consult(r, true);
    for (int i = 0; ok && i < TENSORS; i++)
        ok = !r->tensors[i].name || make_buffer(r, &r->tensors[i]);
    if (r->options->no_lse && r->desc.pass == NBHD_FORWARD)
        r->args.lse.data = NULL;
    if (!ok)
        snprintf(result->why, sizeof result->why, "out of memory for the problem's tensors");
    return ok ? NBHD_OK : NBHD_ERROR_MEMORY;
}

static nbhd_status create_plan(struct run *r, nbhd_plan **plan)
{
    const struct case_options *o = r->options;
    if (!o->sequences)
        return nbhd_plan_create_with(plan, &r->given, o->device, o->flags, o->kernel);
    if (!case_place_sequences(r, &r->tokens, false) || !case_place_sequences(r, &r->keys, true))
        return NBHD_ERROR_MEMORY;
    nbhd_desc desc = r->given;
    nbhd_ragged ragged = NBHD_RAGGED_INIT;
    ragged.sequences = o->sequences;
    ragged.lengths = o->lengths;
    ragged.kv_lengths = o->kv_lengths;
    desc.batch = 0;
    for (int i = 0; i < 3; i++) {
        const bool set = o->placement == CASE_PADDED && i < desc.rank;
        desc.length[i] = set ? r->tokens.largest[3 - desc.rank + i] : 0;
        desc.kv_length[i] = set ? r->keys.largest[3 - desc.rank + i] : 0;
    }
    if (o->placement == CASE_OFFSETS) {
        ragged.offsets = r->tokens.offset;
        ragged.kv_offsets = o->kv_lengths ? r->keys.offset : NULL;
    }
    return nbhd_plan_create_ragged(plan, &desc, &ragged, o->device, o->flags, o->kernel);
}

nbhd_status case_run(const nbhd_desc *desc, const struct case_options *options, struct case_result *result)
{
    static const struct case_memory host = {guarded_alloc, guarded_release, host_copy, host_copy};
    struct run r = {.given = *desc, .options = options, .memory = options->memory.alloc ? options->memory : host,
                    .args = NBHD_ARGS_INIT, .random = options->seed * 2654435761u + 12345};
    memset(result, 0, sizeof *result);
    result->allowed_error = 1e-300;
    nbhd_plan *plan = NULL;
    r.given.threads = options->threads;
    nbhd_status status = create_plan(&r, &plan);
    if (status) {
        snprintf(result->why, sizeof result->why, "%s", nbhd_last_error());
        release(&r);
        return status;
    }
    snprintf(result->kernel, sizeof result->kernel, "%s", nbhd_plan_kernel(plan));
    r.desc = case_desc(&r, 0);
    const size_t bytes = (nbhd_plan_workspace(plan) + 63) / 64 * 64;
    void *workspace = bytes ? r.memory.alloc(bytes) : NULL;
    if (bytes && !workspace)
        status = NBHD_ERROR_MEMORY;
    if (!status && !(status = prepare(&r, result)))
        result->ok = execute_and_check(&r, plan, workspace, result);
    release(&r);
    if (workspace)
        r.memory.release(workspace);
    nbhd_plan_destroy(&plan);
    return status;
}
