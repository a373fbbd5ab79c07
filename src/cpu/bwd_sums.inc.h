/* The float32 sums of a vector backward: where they lie, zeros before the first task, 16-bit results after the last. Both
 * in pieces of consecutive tokens, so that threads share them however long each axis is. Included by kernels after
 * bwd_common.inc.h. */

enum { OF_QUERIES, OF_KEYS, PIECE_BYTES = 256 << 10 };

struct piece {
    int batch;
    long long begin, end; /* tokens, the last axis fastest */
};

static int extent(const struct nbhd_params *p, int of, int axis)
{
    return of == OF_KEYS ? p->axis[axis].keys : p->axis[axis].length;
}

static long long count_tokens(const struct nbhd_params *p, int of)
{
    return (long long)extent(p, of, 0) * extent(p, of, 1) * extent(p, of, 2);
}

static long long piece_tokens(const struct nbhd_params *p, int of)
{
    const int floats = of == OF_KEYS ? p->kv_heads * (p->head_dim + p->head_dim_v) : p->heads * p->head_dim;
    return PIECE_BYTES / (floats * (int)sizeof(float)) + 1;
}

static long long pieces_of_batch(const struct nbhd_params *p, int of)
{
    return (count_tokens(p, of) - 1) / piece_tokens(p, of) + 1;
}

static long long pieces(const struct nbhd_params *p, int of) { return p->batch * pieces_of_batch(p, of); }

static struct piece piece_at(const struct nbhd_params *p, int of, long long number)
{
    const long long many = pieces_of_batch(p, of), tokens = piece_tokens(p, of), begin = number % many * tokens;
    const long long rest = count_tokens(p, of) - begin;
    return (struct piece){(int)(number / many), begin, begin + (tokens < rest ? tokens : rest)};
}

/* The piece's first token, and how many follow one another along axis 2 from there on, itself included. */
static int row_of_piece(const struct nbhd_params *p, int of, const struct piece *piece, int token[3])
{
    long long i = piece->begin;
    for (int a = 2; a >= 0; a--) {
        token[a] = (int)(i % extent(p, of, a));
        i /= extent(p, of, a);
    }
    const long long left = piece->end - piece->begin;
    const int row = extent(p, of, 2) - token[2];
    return left < row ? (int)left : row;
}

/* ---- zeros ---- */

static void zero_rows(const struct bwd_call *c, const struct nbhd_view *view, int width, struct piece piece)
{
    const struct nbhd_params *p = c->p;
    const int bytes = width * (int)sizeof(float);
    const int heads = view->head == bytes ? p->kv_heads : 1; /* in one piece */
    const bool adjacent = view->axis[2] == (long long)bytes * heads;
    int token[3];
    for (int tokens; piece.begin < piece.end; piece.begin += tokens) {
        tokens = row_of_piece(p, OF_KEYS, &piece, token);
        const int step = adjacent ? tokens : 1;
        for (int end = token[2] + tokens; token[2] < end; token[2] += step)
            for (int h = 0; h < p->kv_heads; h += heads)
                memset(nbhd_view_at(view, piece.batch, token, h), 0, (size_t)bytes * (size_t)heads * (size_t)step);
    }
}

static void zero_share(float *array, size_t count, long long task, long long tasks)
{
    const size_t begin = count / (size_t)tasks * (size_t)task;
    const size_t end = task + 1 == tasks ? count : begin + count / (size_t)tasks;
    memset(array + begin, 0, (end - begin) * sizeof *array);
}

/* A piece, and a share of the sums that slots have. */
static void zero_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_params *p = c->p;
    const struct piece piece = piece_at(p, OF_KEYS, task);
    const size_t slots = (size_t)p->batch * (size_t)c->b->slots;
    const size_t width = (size_t)(p->head_dim + p->head_dim_v);
    (void)thread;
    zero_rows(c, &c->dk, p->head_dim, piece);
    zero_rows(c, &c->dv, p->head_dim_v, piece);
    zero_share(c->extra, slots * (size_t)p->kv_heads * (size_t)p->extra * width, task, pieces(p, OF_KEYS));
    zero_share(c->bias, slots * (size_t)p->heads * (size_t)c->b->table, task, pieces(p, OF_KEYS));
}

/* ---- results ---- */

static void round_rows(const struct bwd_call *c, const struct nbhd_view *from, const struct nbhd_view *to, int of,
                       int heads, int width, struct piece piece)
{
    int token[3];
    for (int tokens; piece.begin < piece.end; piece.begin += tokens) {
        tokens = row_of_piece(c->p, of, &piece, token);
        for (int end = token[2] + tokens; token[2] < end; token[2]++)
            for (int h = 0; h < heads; h++) {
                const float *sums = (const float *)(const void *)nbhd_view_at(from, piece.batch, token, h);
                char *row = nbhd_view_at(to, piece.batch, token, h);
                for (int i = 0; i < width; i += VF) {
                    const int n = nbhd_min(VF, width - i);
                    v_store_as(row, c->dtype, i, v_load_part(sums + i, n), n);
                }
            }
    }
}

/* 16-bit gradients from their float32 sums: first the pieces of keys, then those of queries. */
static void round_off_task(void *context, long long task, int thread)
{
    const struct bwd_call *c = context;
    const struct nbhd_params *p = c->p;
    const long long of_keys = pieces(p, OF_KEYS);
    (void)thread;
    if (task >= of_keys) {
        round_rows(c, &c->dq, &p->dq, OF_QUERIES, p->heads, p->head_dim, piece_at(p, OF_QUERIES, task - of_keys));
        return;
    }
    const struct piece piece = piece_at(p, OF_KEYS, task);
    round_rows(c, &c->dk, &p->dk, OF_KEYS, p->kv_heads, p->head_dim, piece);
    round_rows(c, &c->dv, &p->dv, OF_KEYS, p->kv_heads, p->head_dim_v, piece);
}

/* ---- where they lie ---- */

/* Contiguous; where tiles are of one head, a head's rows together: each of them would be in a page of its own else. */
static struct nbhd_view sums_view(char *data, const struct bwd_call *c, int of, int heads, int width)
{
    const bool by_head = c->b->variant != NBHD_FWD_PERMUTE;
    struct nbhd_view v = {.data = data};
    long long step = (long long)width * (long long)sizeof(float);
    v.head = step;
    if (!by_head)
        step *= heads;
    for (int i = 2; i >= 0; i--) {
        v.axis[i] = step;
        step *= extent(c->p, of, i);
    }
    if (by_head) {
        v.head = step;
        step *= heads;
    }
    v.batch = step;
    return v;
}

/* In the workspace, but float32 gradients, which are their own sums. */
static void place_sums(struct bwd_call *c, char *workspace)
{
    const struct nbhd_params *p = c->p;
    const struct nbhd_bwd *b = c->b;
    if (c->dtype != NBHD_F32) {
        c->dk = sums_view(workspace + b->at_dk, c, OF_KEYS, p->kv_heads, p->head_dim);
        c->dv = sums_view(workspace + b->at_dv, c, OF_KEYS, p->kv_heads, p->head_dim_v);
        if (b->sum_dq)
            c->dq = sums_view(workspace + b->at_dq, c, OF_QUERIES, p->heads, p->head_dim);
    }
    if (b->sum_dq)
        c->delta = sums_view(workspace + b->at_delta, c, OF_QUERIES, p->heads, 1);
}
