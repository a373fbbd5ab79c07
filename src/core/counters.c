/* See counters.h. */
#include <stddef.h>
#include "core/counters.h"

struct nbhd_counters *nbhd_counters = NULL;
