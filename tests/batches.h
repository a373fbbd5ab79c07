/* Ragged batches that tests of every device run: by hand, and random ones. */
#ifndef NBHD_TESTS_BATCHES_H
#define NBHD_TESTS_BATCHES_H

#include "case.h"

struct batch {
    const char *line; /* its lengths are not used but must be legal */
    int sequences;    /* 0: past the last of batches[] */
    int lengths[9][3], kv_lengths[9][3]; /* kv: used where the first is not 0 */
};

extern const struct batch batches[];

/* Whether an unfused pass takes it: scores have one shape for all sequences. */
bool batch_unfused(const struct batch *batch, const nbhd_desc *desc);
/* desc: the problem of line, of any pass. text: names line and grids, for a message. */
nbhd_status batch_run(const struct batch *batch, const nbhd_desc *desc, const struct case_options *options,
                      struct case_result *result, char text[NBHD_TEXT]);
/* One to nine sequences of a random problem, which desc becomes; dtype and, where it can, pass are kept. */
struct batch batch_random(unsigned seed, nbhd_desc *desc);

#endif
