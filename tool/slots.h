/* The tensors of a problem by number: which there are, their shapes and types, and whether a pass reads or writes them.
 * One table for run, check, bench and denoise. */
#ifndef NBHD_TOOL_SLOTS_H
#define NBHD_TOOL_SLOTS_H

#include <stdbool.h>
#include <stddef.h>

#include "nbhd.h"

enum slot {
    SLOT_Q, SLOT_K, SLOT_V, SLOT_O, SLOT_LSE, SLOT_EXTRA_K, SLOT_EXTRA_V, SLOT_DOUT, SLOT_DLSE, SLOT_DQ, SLOT_DK,
    SLOT_DV, SLOT_DEXTRA_K, SLOT_DEXTRA_V, SLOT_BIAS, SLOT_DBIAS, SLOT_SCORES, SLOT_DSCORES, SLOT_COUNT
};

enum slot_use { SLOT_UNUSED, SLOT_READ, SLOT_WRITTEN };

nbhd_tensor *slot_tensor(nbhd_args *args, int slot);
/* What desc's pass does with it. lse and dlse, which may be left out, count as used. */
enum slot_use slot_use(const nbhd_desc *desc, int slot);
bool slot_is_extra(int slot); /* [batch, extra, heads, dim] */
int slot_dtype(const nbhd_desc *desc, int slot);
int slot_shape(const nbhd_desc *desc, int slot, long long shape[6]); /* returns the rank */
/* SIZE_MAX where the true number is larger. */
size_t slot_elements(const nbhd_desc *desc, int slot);
size_t slot_bytes(const nbhd_desc *desc, int slot);
/* desc with the defaults of nbhd.h filled in. */
nbhd_desc desc_whole(const nbhd_desc *desc);

#endif
