/* How the vector forward cuts a problem into tiles and which of its two algorithms runs: decided once, when planning,
 * by fwd_plan*.c; obeyed by fwd_broadcast.inc.h and fwd_permute.inc.h. */
#ifndef NBHD_CPU_FWD_PLAN_H
#define NBHD_CPU_FWD_PLAN_H

#include <stdint.h>
#include "core/kernel.h"
#include "cpu/ahead.h"
#include "cpu/grid.h"

#define FWD_LANES 64 /* queries in a broadcast tile: one bit each */
#define FWD_BLOCK 96 /* keys whose scores are held at once, a multiple of 6: 24 KiB */
#define FWD_MOST_BLOCK 256 /* the same, of rows that ask for another number: struct nbhd_fwd_machine */
#define FWD_GROUPS 32 /* groups of 32 keys whose probabilities are held at once where keys go by units */
#define FWD_MOST_UNITS 4096 /* of 32 keys, of a sequence whose keys go by them */
#define FWD_MOST_KEPT 1024 /* of those, in the scratch of a thread */
#define FWD_TILES 8 /* most broadcast tiles that go through the same keys together */
#define FWD_STRETCH 125 /* a band's box: its keys at most, percent of any of the tiles' */
#define FWD_COPY_TILES 4 /* so many tiles are worth a copy of keys that lie far apart */
#define FWD_ROWS  4  /* query rows of a permuted tile, a vector each */

/* One broadcast block: keys of a tile, in place. */
struct key_block {
    int count, extra; /* keys; the first of these are extra ones */
    bool masked; /* some key is not seen by all lanes */
    uint64_t seen; /* lanes that see some key */
    const float *k[FWD_MOST_BLOCK], *v[FWD_MOST_BLOCK];
    const float *bias[FWD_MOST_BLOCK]; /* NULL: none */
    uint64_t bits[FWD_MOST_BLOCK];     /* lanes that see the key */
    int token[FWD_MOST_BLOCK][3];      /* {0, 0, e} of extra key e */
};

/* A run of keys that rows [begin, end) of a tile see: one key row, or some of the extra keys. */
struct key_run {
    const float *line; /* NULL: extra keys */
    const char *k, *v; /* extra keys' first; v: what lies at lane_block.key 0 */
    long long bias;    /* element of the head's table for query row 0 and column 0 */
    int begin, end;
    int columns, entry; /* keys; index of the first one's scores */
    struct { /* of the rows whose outputs are made together: those that see the run */
        int rows;  /* 8 begin + end, 0 if none */
        int alike; /* runs from this one on, of scores held at once, that the same rows see */
    } seen[FWD_ROWS / 2];
};

enum { NBHD_FWD_BROADCAST = 0, NBHD_FWD_PERMUTE = 1 };

/* Neighbouring tokens of a much dilated axis belong to different groups, and see neighbouring keys. Where axis 0 is
 * idle such a problem is permuted as one of two axes, [elements of a group][groups], the second with windows of 1:
 * vectors are of neighbours. Groups come in two lengths, so these are two problems. */
struct nbhd_fold {
    int dilation; /* 0: not folded */
    int first, groups, members; /* groups [first, first + groups) of so many elements */
};

/* Tiles [begin, end) in tasks of `run`, the last one maybe shorter. */
struct nbhd_fwd_part {
    long long begin, end, tasks;
    int run;
};

/* Pairs: keys in units, boxes of 32 keys that begin at multiples of `shape`, where every tile's queries see the same
 * ones, and all of each. */
struct nbhd_fwd_units {
    int shape[3];
    int slots; /* units that a thread keeps, at least FWD_GROUPS or all of a sequence; 0: keys do not go by units */
    int size;  /* bfloat16 values of a unit's keys and values */
};

/* Keys that a dilation group of `size` queries has along an axis: with keys of their own, dilation is 1. */
static inline int nbhd_keys_of_group(struct nbhd_axis a, int size) { return a.keys == a.length ? size : a.keys; }

struct nbhd_fwd {
    int variant, threads, dtype;
    struct nbhd_fold fold;
    struct nbhd_axis axis[3]; /* as folded */
    struct nbhd_fwd *rest;    /* the shorter groups, or NULL */
    struct nbhd_grid grid[3];
    int head_tile, head_tiles; /* query heads of one kv head that share a tile; such tiles per kv head */
    long long tiles, tasks;    /* broadcast: tiles, permute: cells of the grid; tasks are runs of them */
    int run;                   /* tiles in a task */
    struct nbhd_fwd_part part[3]; /* pairs: tasks of `run` tiles, then of a half, then of a quarter */
    int together;              /* broadcast: tiles whose Q and O have room in the scratch */
    int band;                  /* broadcast: tiles that may go through the box around their keys together; 1: none */
    size_t q_size, o_size;     /* bytes of a broadcast tile */
    struct nbhd_fwd_units units;
    int key_step;              /* broadcast: floats from a copied key, with its value, to the next */
    /* Permute. */
    int group;        /* kv heads of a task */
    int chunk;        /* queries of axis 1 that go along axis 0 together */
    int ring[2];      /* slots of lines, per element of axis 0 and 1 */
    int columns;      /* window columns that a microkernel takes at once */
    int entries;      /* scores held per query at once */
    int line_step;    /* floats from one d of a line to the next */
    int value_width;  /* floats of a row of V and O, padded to vectors */
    bool stream;      /* tensors that outgrow the caches: O is written past them, but float16 */
    bool pack_values; /* V's rows are copied: see packs_values */
    size_t line_size, values_size; /* floats of a row's keys and values */
    /* Offsets into a thread's scratch. */
    size_t at_q, at_o, at_s, at_lanes, at_block, at_zeros, at_token, at_runs, at_lines, at_values, at_extra, at_tags;
    size_t at_keys, at_ahead, at_units, at_unit_state;
    size_t scratch; /* bytes a thread */
};

/* Cycles of broadcast tiles: a vector of lanes times a dimension of a key; a vector of scores; a key; a dimension of a
 * key; a tile, beyond what all kernels need for its rows. */
struct nbhd_fwd_price {
    double product, score, key, key_dim, tile;
};

/* What the planner must know of an instruction set. */
struct nbhd_fwd_machine {
    int vf, columns;   /* VF, V_COLUMNS */
    int block;         /* keys of a block of pairs; else FWD_BLOCK */
    size_t sums;       /* of a tile of pairs, beside its outputs: bytes */
    size_t scores;     /* held at once, and probabilities: bytes; 0: scores of a block */
    size_t unit_state; /* sizeof(struct unit_cache); 0: run knows no units */
    size_t lane_block; /* sizeof(struct lane_block) */
    struct nbhd_fwd_price price; /* of fwd_pairs.inc.h, bfloat16 only; product 0: of fwd_broadcast.inc.h, in float32 */
    bool unfolded; /* run knows no struct nbhd_fold */
};

/* Of the forward and of the backward rows: what their vectors cannot take is the same. */
bool nbhd_fwd_refuse(const struct nbhd_problem *problem, char why[NBHD_TEXT]);
int nbhd_fwd_configs(const struct nbhd_problem *problem, struct nbhd_config *configs, int room,
                     const struct nbhd_fwd_machine *machine);
/* Rows of pairs take bfloat16, and leave to fwd_avx512 or bwd_avx512 what that has faster with permuted keys in
 * float32. */
bool nbhd_fwd_refuse_pairs(const struct nbhd_problem *problem, const struct nbhd_fwd_machine *machine,
                           char why[NBHD_TEXT]);
nbhd_status nbhd_fwd_build(struct nbhd_plan *plan, const struct nbhd_fwd_machine *machine);
/* For tests: the variant to prefer wherever it can run, permute with outputs past the caches; -1: by cost. */
void nbhd_fwd_force(int variant);
void nbhd_fwd_drop(struct nbhd_plan *plan);

#endif
