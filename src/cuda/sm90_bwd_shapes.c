/* More shapes of query boxes for a plan of bwd_sm90: each tile of keys takes the one that covers its union with the
 * fewest boxes, so that those at clamped borders need not do with what fits the others. */
#include <math.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/sm90_bwd_search.h"

enum { MOST_COMBINATIONS = 2048 };

/* Every combination of the axes' classes, and the boxes that it needs with the shapes so far. */
struct combinations {
    int count;
    struct {
        struct nbhd_bwd_class axis[3];
        double tiles, boxes;
    } list[MOST_COMBINATIONS];
};

static bool find_combinations(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *p,
                              struct combinations *c)
{
    const struct nbhd_bwd_tiles *t[3];
    c->count = 1;
    for (int a = 0; a < 3; a++) {
        t[a] = s->memo[a].tiles[p->k_box[a]];
        c->count *= t[a]->classes;
        if (t[a]->classes > NBHD_SM90_BWD_CLASSES || c->count > MOST_COMBINATIONS)
            return false;
    }
    for (int i = 0; i < c->count; i++) {
        const int at[3] = {i % t[0]->classes, i / t[0]->classes % t[1]->classes, i / t[0]->classes / t[1]->classes};
        c->list[i].tiles = 1;
        c->list[i].boxes = INFINITY;
        for (int a = 0; a < 3; a++) {
            c->list[i].axis[a] = t[a]->class[at[a]];
            c->list[i].tiles *= t[a]->class[at[a]].tiles;
        }
    }
    return true;
}

static double boxes_of(const struct nbhd_bwd_class axis[3], const int q_box[3])
{
    double boxes = 1;
    for (int a = 0; a < 3; a++)
        boxes *= nbhd_sm90_bwd_visited(&axis[a], q_box[a]);
    return boxes;
}

/* Of these, need no mask. */
static double full_of(const struct nbhd_bwd_class axis[3], const int q_box[3])
{
    double full = 1;
    for (int a = 0; a < 3; a++)
        full *= nbhd_sm90_bwd_full(&axis[a], q_box[a]);
    return full;
}

/* Lets tiles take the plan's last shape where it is better. Returns the boxes of all tiles. */
static double take_shape(struct combinations *c, const int q_box[3])
{
    double sum = 0;
    for (int i = 0; i < c->count; i++) {
        c->list[i].boxes = fmin(c->list[i].boxes, boxes_of(c->list[i].axis, q_box));
        sum += c->list[i].tiles * c->list[i].boxes;
    }
    return sum;
}

/* Counts of a plan with several shapes: a tile takes the first of those with the fewest boxes. */
static void count_shapes(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p, const struct combinations *c)
{
    p->boxes = p->full_boxes = 0;
    for (int i = 0; i < c->count; i++) {
        int best = 0;
        for (int k = 1; k < p->shapes; k++)
            if (boxes_of(c->list[i].axis, p->q_box[k]) < boxes_of(c->list[i].axis, p->q_box[best]))
                best = k;
        p->boxes += c->list[i].tiles * boxes_of(c->list[i].axis, p->q_box[best]);
        p->full_boxes += c->list[i].tiles * full_of(c->list[i].axis, p->q_box[best]);
    }
    if (p->k_box[0] * p->k_box[1] * p->k_box[2] < 64 * p->blocks)
        p->full_boxes *= (p->blocks - 1) / (double)p->blocks;
    p->seen = p->boxes;
    p->ms = nbhd_sm90_bwd_ms(s, p);
}

/* Boxes of all tiles, each with q_box where it is better, or some number that is not below `enough`. */
static double boxes_with(const struct combinations *c, const struct nbhd_bwd_tiles *const t[3], const int q_box[3],
                         double enough)
{
    double on_axis[3][NBHD_SM90_BWD_CLASSES], sum = 0;
    for (int a = 0; a < 3; a++)
        for (int i = 0; i < t[a]->classes; i++)
            on_axis[a][i] = nbhd_sm90_bwd_visited(&t[a]->class[i], q_box[a]);
    for (int i = 0, at = 0; i < t[2]->classes; i++)
        for (int j = 0; j < t[1]->classes && sum < enough; j++)
            for (int k = 0; k < t[0]->classes; k++, at++) {
                const double boxes = on_axis[2][i] * on_axis[1][j] * on_axis[0][k];
                sum += c->list[at].tiles * (boxes < c->list[at].boxes ? boxes : c->list[at].boxes);
            }
    return sum;
}

/* The box that saves most beside the plan's shapes, and needs no more mask columns; false if none has so few. */
static bool find_next_shape(const struct nbhd_bwd_search *s, const struct nbhd_sm90_bwd_plan *p,
                            const struct combinations *c, int (*boxes)[3], int count, int best[3])
{
    const struct nbhd_bwd_tiles *t[3];
    double least = INFINITY;
    for (int a = 0; a < 3; a++)
        t[a] = s->memo[a].tiles[p->k_box[a]];
    for (int j = 0; j < count; j++) {
        if (boxes[j][0] + boxes[j][1] + boxes[j][2] > 16 * p->mask_steps)
            continue;
        const double sum = boxes_with(c, t, boxes[j], least);
        if (sum < least) {
            least = sum;
            memcpy(best, boxes[j], sizeof *boxes);
        }
    }
    return isfinite(least);
}

void nbhd_sm90_bwd_add_shapes(const struct nbhd_bwd_search *s, struct nbhd_sm90_bwd_plan *p)
{
    int queries[3];
    for (int a = 0; a < 3; a++)
        queries[a] = s->memo[a].queries;
    const int count = nbhd_sm90_bwd_list(s, queries, p->n, NULL);
    int(*boxes)[3] = malloc((size_t)count * sizeof *boxes + 1);
    struct combinations *c = malloc(sizeof *c);
    if (boxes && c && p->adds_dq && !p->sliced && !s->one_axis && find_combinations(s, p, c)) {
        const struct nbhd_sm90_bwd_plan one = *p;
        nbhd_sm90_bwd_list(s, queries, p->n, boxes);
        take_shape(c, p->q_box[0]);
        while (p->shapes < NBHD_BWD_SM90_SHAPES) {
            struct nbhd_sm90_bwd_plan more = *p;
            if (!find_next_shape(s, p, c, boxes, count, more.q_box[more.shapes++]) || !nbhd_sm90_bwd_fits(s, &more))
                break;
            count_shapes(s, &more, c);
            if (more.ms > 0.995 * p->ms)
                break;
            take_shape(c, more.q_box[more.shapes - 1]);
            *p = more;
        }
        if (p->ms > 0.97 * one.ms)
            *p = one;
    }
    free(boxes);
    free(c);
}
