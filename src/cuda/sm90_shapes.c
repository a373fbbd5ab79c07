/* The key boxes of a plan in the search for boxes (sm90_plan.c): whether they fit the machine, what the query tiles
 * visit of them, and a second to fourth shape of them, for tiles whose union the first fits badly. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_search.h"

enum { MOST_COMBINATIONS = 1024 };

/* ---- what fits ---- */

/* Of many sequences other lengths come than the problem's. */
static int has_axis(const struct nbhd_sm90_search *s, int a)
{
    const struct nbhd_axis axis = s->problem->axis[a];
    return s->many ? a >= 3 - s->problem->desc.rank : axis.length > 1 || axis.keys > 1;
}

/* Whether some tile's boxes of extent k need a mask on the axis. */
static int needs_mask(struct nbhd_sm90_search *s, int a, int q, int k)
{
    return s->many ? has_axis(s, a) : nbhd_sm90_visits(nbhd_sm90_tiles(&s->memo[a], q), k).masked;
}

/* Moves the columns of a shape with two steps of them so that each axis's are in one, if they can be: fwd_sm90 masks a
 * box only in the steps of axes on which it needs a mask. */
static void keep_in_steps(int at[4], const int extent[3])
{
    int used[2] = {0, 0}, moved[3];
    for (int a = 0; a < 3; a++) {
        if ((moved[a] = at[a]) < 0)
            continue;
        const int step = used[0] + extent[a] > 16;
        if (used[step] + extent[a] > 16)
            return;
        moved[a] = 16 * step + used[step];
        used[step] += extent[a];
    }
    memcpy(at, moved, sizeof moved);
}

/* Lays out the mask columns of a plan's shapes; 0 if they are too many. A problem of one axis is masked by bits: it has
 * too many coordinates, and few boxes that need a mask. */
static int lay_out_masks(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p)
{
    const int one_axis = !has_axis(s, 0) && !has_axis(s, 1);
    p->mask_bits = s->problem->desc.extra % p->variant.n != 0;
    p->mask_steps = p->pad = 0;
    for (int i = 0; i < p->shapes; i++) {
        const int *k = p->k_box[i];
        int columns = 0, past = p->variant.n - k[0] * k[1] * k[2];
        p->mask_bits |= one_axis && (needs_mask(s, 2, p->q_box[2], k[2]) || (past && s->kernel->pad_columns));
        p->pad = nbhd_max(p->pad, ceil_div(past, 8));
        for (int a = 0; a < 4; a++) {
            int needed =
                !one_axis && (a < 3 ? needs_mask(s, a, p->q_box[a], k[a]) : past && s->kernel->pad_columns);
            if (needed && a < 3 && s->problem->axis[a].keys > NBHD_SM90_MASKED)
                return 0;
            p->mask_at[i][a] = needed ? columns : -1;
            columns += needed ? a < 3 ? k[a] : 1 : 0;
        }
        if (columns > NBHD_SM90_MASK)
            return 0;
        if (columns > 16 && !s->kernel->pad_columns)
            keep_in_steps(p->mask_at[i], k);
        p->mask_steps = nbhd_max(p->mask_steps, ceil_div(columns, 16));
    }
    return 1;
}

int nbhd_sm90_fits(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p)
{
    if (!lay_out_masks(s, p) || !s->kernel->has_registers(&s->problem->desc, p))
        return 0;
    const int slots = s->problem->desc.head_dim_v > 128 ? 2 : 4; /* more would take registers that are not there */
    for (p->q_stages = 2; p->q_stages > 0; p->q_stages--)
        for (p->slots = slots; p->slots > 0; p->slots -= 2) /* the system keeps 1 KB of each CTA's share */
            if (s->kernel->shared(s->problem, p) <= (s->shared_max + 1024) / p->variant.ctas - 1024)
                return 1;
    return 0;
}

/* ---- what the tiles visit ---- */

/* Whether every box of the shape needs a mask, for the keys past it. */
static int needs_pad(const struct nbhd_sm90_search *s, const struct nbhd_sm90_plan *p, const int *k)
{
    return s->kernel->pad_columns && k[0] * k[1] * k[2] < p->variant.n;
}

void nbhd_sm90_count(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p)
{
    struct axis_tiles *t[3];
    p->boxes = p->full_boxes = p->longest = 0;
    p->tiles = 1;
    for (int a = 0; a < 3; a++) {
        t[a] = nbhd_sm90_tiles(&s->memo[a], p->q_box[a]);
        p->tiles *= t[a]->tiles;
    }
    if (p->shapes == 1) { /* separable */
        p->boxes = p->full_boxes = p->longest = 1;
        for (int a = 0; a < 3; a++) {
            const struct axis_visits v = nbhd_sm90_visits(t[a], p->k_box[0][a]);
            p->boxes *= v.boxes;
            p->full_boxes *= v.full;
            p->longest *= v.longest;
        }
        if (needs_pad(s, p, p->k_box[0]))
            p->full_boxes = 0;
        return;
    }
    for (int i = 0; i < t[0]->classes; i++)
        for (int j = 0; j < t[1]->classes; j++)
            for (int l = 0; l < t[2]->classes; l++) {
                const struct tile_class *c[3] = {&t[0]->class[i], &t[1]->class[j], &t[2]->class[l]};
                double weight = c[0]->count * c[1]->count * c[2]->count, best = 0, best_full = 0;
                for (int k = 0; k < p->shapes; k++) {
                    const int *e = p->k_box[k];
                    double boxes = (double)visited(c[0], e[0]) * visited(c[1], e[1]) * visited(c[2], e[2]);
                    if (k && boxes >= best)
                        continue;
                    best = boxes;
                    best_full =
                        needs_pad(s, p, e) ? 0 : (double)full(c[0], e[0]) * full(c[1], e[1]) * full(c[2], e[2]);
                }
                p->longest = fmax(p->longest, best);
                p->boxes += weight * best;
                p->full_boxes += weight * best_full;
            }
}

int nbhd_sm90_least_keys(struct nbhd_sm90_search *s, const int q_box[3], int n, int most[3])
{
    int total = 1;
    for (int a = 0; a < 3; a++) {
        const struct axis_tiles *t = nbhd_sm90_tiles(&s->memo[a], q_box[a]);
        most[a] = nbhd_min(nbhd_max(t->longest, 1), s->memo[a].most);
        total = nbhd_min(total * nbhd_min(most[a], NBHD_SM90_KEYS), NBHD_SM90_KEYS);
    }
    return nbhd_min(total, n * s->eighths / 8);
}

void nbhd_sm90_each_row(struct nbhd_sm90_search *s, const int q_box[3], int n, nbhd_sm90_row_visitor *visit,
                        void *closure)
{
    int most[3];
    const int least = nbhd_sm90_least_keys(s, q_box, n, most);
    for (int k0 = 1; k0 <= nbhd_min(most[0], n); k0++)
        for (int k1 = 1; k1 <= nbhd_min(most[1], n / k0); k1++)
            visit(s, closure, (int[3]){k0, k1}, nbhd_max(1, ceil_div(least, k0 * k1)),
                  nbhd_min(most[2], n / (k0 * k1)));
}

/* ---- more shapes ---- */

/* The lengths of unions on each axis, and of each combination of them the tiles that have it, and the boxes that these
 * need with the shapes so far. */
struct combinations {
    int lengths[3], length[3][NBHD_SM90_CLASSES];
    double tiles[MOST_COMBINATIONS], boxes[MOST_COMBINATIONS];
    double best; /* boxes of all tiles with k_box besides */
    int k_box[3];
};

/* Boxes of all tiles, each with k_box where it is better, or some number that is not below `enough`. */
static double boxes_with(const struct combinations *c, const int k_box[3], double enough)
{
    double on_axis[3][NBHD_SM90_CLASSES], sum = 0;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < c->lengths[a]; i++)
            on_axis[a][i] = ceil_div(c->length[a][i], k_box[a]);
    for (int i = 0, at = 0; i < c->lengths[0]; i++)
        for (int j = 0; j < c->lengths[1] && sum < enough; j++)
            for (int k = 0; k < c->lengths[2]; k++, at++) {
                const double boxes = on_axis[0][i] * on_axis[1][j] * on_axis[2][k];
                sum += c->tiles[at] * (boxes < c->boxes[at] ? boxes : c->boxes[at]);
            }
    return sum;
}

static void try_next_shapes(struct nbhd_sm90_search *s, void *closure, int k_box[3], int least, int most)
{
    (void)s;
    struct combinations *c = closure;
    for (k_box[2] = least; k_box[2] <= most; k_box[2]++) {
        const double boxes = boxes_with(c, k_box, c->best);
        if (boxes < c->best) {
            c->best = boxes;
            memcpy(c->k_box, k_box, sizeof c->k_box);
        }
    }
}

/* Lets tiles have k_box where it is better. */
static void take_shape(struct combinations *c, const int k_box[3])
{
    for (int i = 0, at = 0; i < c->lengths[0]; i++)
        for (int j = 0; j < c->lengths[1]; j++)
            for (int k = 0; k < c->lengths[2]; k++, at++)
                c->boxes[at] = fmin(c->boxes[at], (double)ceil_div(c->length[0][i], k_box[0]) *
                                                      ceil_div(c->length[1][j], k_box[1]) *
                                                      ceil_div(c->length[2][k], k_box[2]));
}

/* Tiles by the length of their union; returns how many lengths there are. */
static int find_lengths(const struct axis_tiles *t, int length[NBHD_SM90_CLASSES], double tiles[NBHD_SM90_CLASSES])
{
    int count = 0;
    for (int i = 0; i < t->classes; i++) {
        int at = 0;
        while (at < count && length[at] != t->class[i].length)
            at++;
        if (at == count) {
            length[count] = t->class[i].length;
            tiles[count++] = 0;
        }
        tiles[at] += t->class[i].count;
    }
    return count;
}

static int find_combinations(struct nbhd_sm90_search *s, const struct nbhd_sm90_plan *p, struct combinations *c)
{
    double tiles[3][NBHD_SM90_CLASSES];
    int classes = 1, count = 0;
    for (int a = 0; a < 3; a++) {
        const struct axis_tiles *t = nbhd_sm90_tiles(&s->memo[a], p->q_box[a]);
        c->lengths[a] = find_lengths(t, c->length[a], tiles[a]);
        classes *= t->classes;
    }
    for (int i = 0; i < c->lengths[0] && classes <= MOST_COMBINATIONS; i++)
        for (int j = 0; j < c->lengths[1]; j++)
            for (int k = 0; k < c->lengths[2]; k++, count++) {
                c->tiles[count] = tiles[0][i] * tiles[1][j] * tiles[2][k];
                c->boxes[count] = INFINITY;
            }
    return count;
}

static void add_shapes(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *p, struct combinations *c)
{
    if (!find_combinations(s, p, c))
        return;
    while (p->shapes < NBHD_SM90_SHAPES) {
        struct nbhd_sm90_plan more = *p;
        take_shape(c, p->k_box[p->shapes - 1]);
        const double before = c->best = boxes_with(c, p->k_box[p->shapes - 1], INFINITY);
        nbhd_sm90_each_row(s, p->q_box, p->variant.n, try_next_shapes, c);
        memcpy(more.k_box[more.shapes++], c->k_box, sizeof c->k_box);
        if (c->best > 0.995 * before || !nbhd_sm90_fits(s, &more))
            return;
        nbhd_sm90_count(s, &more);
        more.ms = s->kernel->ms(s->problem, &more, s->multiprocessors);
        if (more.ms >= p->ms)
            return;
        *p = more;
    }
}

void nbhd_sm90_add_shapes(struct nbhd_sm90_search *s, struct nbhd_sm90_plan *plans, int count)
{
    struct combinations *c = malloc(sizeof *c);
    for (int i = 0; i < count && c; i++)
        add_shapes(s, &plans[i], c);
    free(c);
}
