/* See arch.h. */
#include "arch.h"

#include <stdbool.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "tool.h"

struct option opt_arch(const char **value, const char *help) { return opt_text("arch", 'a', value, "LIST", help); }

#ifdef NBHD_HAVE_CUDA
#include "cuda/cuda.h"

enum { MOST = 32 };

/* "sm_90", "sm_90a" or "90" at *text, up to a comma or the end, which it is moved behind. 0: it is none. */
static int read_arch(const char **text)
{
    const char *at = *text + (strncmp(*text, "sm_", 3) ? 0 : 3);
    const size_t digits = strspn(at, "0123456789");
    const int cc = digits > 0 && digits < 5 ? atoi(at) : 0;
    at += digits;
    at += *at == 'a';
    if (*at && (*at != ',' || !at[1]))
        return 0;
    *text = at + (*at == ',');
    return cc;
}

/* The list's numbers, all of which can be planned for. Returns how many; 0: they are not, which has been told. */
static int read_archs(const char *list, int cc[MOST])
{
    int count = 0;
    for (const char *at = list; *at; count++) {
        cc[count] = count < MOST - 1 ? read_arch(&at) : 0;
        if (!cc[count])
            return tool_fail(0, "--arch: '%s' is not a list of architectures such as sm_80,sm_90", list);
        const nbhd_status unknown = nbhd_cuda_set_target(cc[count]);
        nbhd_cuda_set_target(0);
        if (unknown)
            return tool_fail(0, "--arch: '%s': %s", list, nbhd_last_error());
    }
    return count;
}

int arch_each(const char *list, int (*each)(const char *arch, void *context), void *context)
{
    int cc[MOST], status = TOOL_DONE;
    const int count = read_archs(list, cc);
    for (int i = 0; i < count && status != TOOL_USAGE; i++) {
        char name[16];
        snprintf(name, sizeof name, "sm_%d", cc[i]);
        nbhd_cuda_set_target(cc[i]);
        const int one = each(name, context);
        status = one ? one : status;
    }
    nbhd_cuda_set_target(0);
    return count ? status : TOOL_USAGE;
}

#else

int arch_each(const char *list, int (*each)(const char *arch, void *context), void *context)
{
    (void)list, (void)each, (void)context;
    return tool_fail(TOOL_FAILED, "this build has no CUDA backend");
}

#endif
