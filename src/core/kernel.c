/* The table of kernels, made from kernels.def. */
#include <string.h>
#include "core/kernel.h"
#include "core/plan.h"
#include "cpu/isa.h"
#ifdef NBHD_HAVE_CUDA
#include "cuda/cuda.h"
#endif

#define NBHD_CPU(name, needs, pass) extern const struct nbhd_kernel_ops nbhd_cpu_##name;
#ifdef NBHD_HAVE_CUDA
#define NBHD_CUDA(name, needs, pass) extern const struct nbhd_kernel_ops nbhd_cuda_##name;
#else
#define NBHD_CUDA(name, needs, pass)
#endif
#include "kernels.def"
#undef NBHD_CPU
#undef NBHD_CUDA

#define NBHD_CPU(name, needs, pass) {"cpu." #name, NBHD_DEVICE_CPU, needs, pass, &nbhd_cpu_##name},
#ifdef NBHD_HAVE_CUDA
#define NBHD_CUDA(name, needs, pass) {"cuda." #name, NBHD_DEVICE_CUDA, needs, pass, &nbhd_cuda_##name},
#else
#define NBHD_CUDA(name, needs, pass)
#endif
const struct nbhd_kernel nbhd_kernels[] = {
#include "kernels.def"
    {NULL, NBHD_DEVICE_CPU, 0, 0, NULL},
};

static const char *const device_names[] = {"cpu", "cuda"};

const struct nbhd_kernel *nbhd_kernel_named(const char *name)
{
    for (const struct nbhd_kernel *k = nbhd_kernels; k->name; k++)
        if (!strcmp(k->name, name))
            return k;
    return NULL;
}

bool nbhd_device_missing(nbhd_device device, char why[NBHD_TEXT])
{
#ifdef NBHD_HAVE_CUDA
    return device == NBHD_DEVICE_CUDA && nbhd_cuda_refuses(0, why);
#else
    return device == NBHD_DEVICE_CUDA && nbhd_refuse(why, "this build has no CUDA backend");
#endif
}

nbhd_status nbhd_plan_make(nbhd_plan **plan, nbhd_device device, nbhd_status (*make)(nbhd_plan **, const void *),
                           const void *order)
{
#ifdef NBHD_HAVE_CUDA
    if (device == NBHD_DEVICE_CUDA) {
        nbhd_ahead_begin();
        const nbhd_status begun = make(plan, order);
        const bool again = nbhd_ahead_end();
        if (begun || !again)
            return begun;
        nbhd_plan_destroy(plan);
    }
#else
    (void)device;
#endif
    return make(plan, order);
}

bool nbhd_kernel_refuses(const struct nbhd_kernel *kernel, const struct nbhd_problem *problem, char why[NBHD_TEXT])
{
    if (kernel->device != problem->device)
        return nbhd_refuse(why, "it runs on %s, not on %s", device_names[kernel->device],
                           device_names[problem->device]);
    if (kernel->pass != problem->desc.pass)
        return nbhd_refuse(why, "it computes the pass %s, not %s", nbhd_pass_name(kernel->pass),
                           nbhd_pass_name(problem->desc.pass));
    if (kernel->device == NBHD_DEVICE_CPU && nbhd_isa_refuses(kernel->needs, why))
        return true;
#ifdef NBHD_HAVE_CUDA
    if (kernel->device == NBHD_DEVICE_CUDA && nbhd_cuda_refuses(kernel->needs, why))
        return true;
#endif
    return kernel->ops->refuse(problem, why);
}
