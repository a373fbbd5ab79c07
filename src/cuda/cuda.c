/* The CUDA backend: which machine a plan is for, modules that plans share, and launches.
 * A plan belongs to the context that was current when it was made; run() makes it current for the launch if need be. */
#define _POSIX_C_SOURCE 200809L
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "cuda/cuda.h"

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct CUctx_st *primary; /* of device 0, retained at first need and kept; under lock */
static struct nbhd_cuda_module *modules; /* under lock */
static _Thread_local int target;

/* ---- the machine ---- */
static void name_arch(struct nbhd_cuda_machine *machine)
{
    snprintf(machine->arch, sizeof machine->arch, "sm_%d%s", machine->cc, machine->cc >= 90 ? "a" : "");
}

/* What matters for compiling, for chips that are not here: typical numbers of multiprocessors, exact shared memory. */
static const struct {
    int cc, multiprocessors, shared_kilobytes, l2_megabytes;
} chips[] = {
    {75, 40, 64, 4},    {80, 108, 163, 40}, {86, 84, 99, 6},      {87, 16, 163, 4},
    {89, 128, 99, 72},  {90, 132, 227, 50}, {100, 148, 227, 126}, {103, 160, 227, 126},
    {110, 20, 227, 32}, {120, 170, 99, 96}, {121, 48, 99, 24},
};

static nbhd_status absent_machine(struct nbhd_cuda_machine *machine, int cc)
{
    memset(machine, 0, sizeof *machine);
    for (size_t i = 0; i < sizeof chips / sizeof *chips; i++)
        if (chips[i].cc == cc) {
            machine->cc = cc;
            machine->multiprocessors = chips[i].multiprocessors;
            machine->shared_max = chips[i].shared_kilobytes * 1024;
            machine->l2_bytes = chips[i].l2_megabytes << 20;
            name_arch(machine);
            return NBHD_OK;
        }
    return nbhd_fail(NBHD_ERROR_INVALID,
                     "the architecture sm_%d is not known; sm_75, 80, 86, 87, 89, 90, 100, 103, 110, 120 "
                     "and 121 are",
                     cc);
}

nbhd_status nbhd_cuda_set_target(int cc)
{
    struct nbhd_cuda_machine machine;
    nbhd_status status = cc ? absent_machine(&machine, cc) : NBHD_OK;
    if (!status)
        target = cc;
    return status;
}

static nbhd_status find_context(struct nbhd_cuda_machine *machine)
{
    nbhd_status status = nbhd_driver_check(nbhd_cu.cuCtxGetCurrent(&machine->context), "the current context");
    if (status)
        return status;
    if (machine->context) {
        status = nbhd_driver_check(nbhd_cu.cuCtxGetDevice(&machine->device), "the current device");
        return status;
    }
    int count = 0;
    status = nbhd_driver_check(nbhd_cu.cuDeviceGetCount(&count), "the number of GPUs");
    if (!status && count == 0)
        return nbhd_fail(NBHD_ERROR_DEVICE, "the CUDA driver finds no GPU on this machine");
    if (!status)
        status = nbhd_driver_check(nbhd_cu.cuDeviceGet(&machine->device, 0), "GPU 0");
    if (status)
        return status;
    pthread_mutex_lock(&lock);
    if (!primary)
        status = nbhd_driver_check(nbhd_cu.cuDevicePrimaryCtxRetain(&primary, machine->device), "a context on GPU 0");
    machine->context = primary;
    pthread_mutex_unlock(&lock);
    return status;
}

nbhd_status nbhd_cuda_machine(struct nbhd_cuda_machine *machine)
{
    if (target)
        return absent_machine(machine, target);
    memset(machine, 0, sizeof *machine);
    char why[NBHD_TEXT];
    if (!nbhd_driver_open(why))
        return nbhd_fail(NBHD_ERROR_DEVICE, "%s", why);
    nbhd_status status = find_context(machine);
    int major = 0, minor = 0;
    const struct {
        int *value;
        unsigned attribute;
    } list[] = {
        {&major, NBHD_CU_COMPUTE_CAPABILITY_MAJOR},
        {&minor, NBHD_CU_COMPUTE_CAPABILITY_MINOR},
        {&machine->multiprocessors, NBHD_CU_MULTIPROCESSOR_COUNT},
        {&machine->shared_max, NBHD_CU_SHARED_MEMORY_PER_BLOCK_OPTIN},
        {&machine->l2_bytes, NBHD_CU_L2_CACHE_SIZE},
    };
    for (size_t i = 0; i < sizeof list / sizeof *list && !status; i++)
        status = nbhd_driver_check(nbhd_cu.cuDeviceGetAttribute(list[i].value, list[i].attribute, machine->device),
                                   "an attribute of the GPU");
    machine->cc = 10 * major + minor;
    name_arch(machine);
    return status;
}

bool nbhd_cuda_refuses(unsigned cc, char why[NBHD_TEXT])
{
    struct nbhd_cuda_machine machine;
    if (nbhd_cuda_machine(&machine))
        return nbhd_refuse(why, "%s", nbhd_last_error());
    if ((unsigned)machine.cc < cc)
        return nbhd_refuse(why, "the GPU has compute capability %d.%d; it needs %u.%u or later", machine.cc / 10,
                           machine.cc % 10, cc / 10, cc % 10);
    return false;
}

/* ---- options ---- */
void nbhd_option(struct nbhd_options *options, const char *format, ...)
{
    size_t room = sizeof options->text - options->used;
    va_list list;
    va_start(list, format);
    if (options->used && room > 1) {
        options->text[options->used++] = ' ';
        room--;
    }
    int length = vsnprintf(options->text + options->used, room, format, list);
    va_end(list);
    options->used += length < 0 || (size_t)length >= room ? room - 1 : (size_t)length;
}

void nbhd_options_problem(struct nbhd_options *options, const nbhd_desc *desc)
{
    nbhd_option(options, "-DNBHD_DTYPE=%d -DNBHD_HEAD_DIM=%d -DNBHD_HEAD_DIM_V=%d -DNBHD_BIAS=%d", desc->dtype,
                desc->head_dim, desc->head_dim_v, desc->bias != 0);
}

void nbhd_options_wraps(struct nbhd_options *options, const nbhd_desc *desc)
{
    bool wraps = false;
    for (int i = 0; i < desc->rank; i++)
        wraps |= desc->edge[i] == NBHD_PERIODIC;
    if (wraps)
        nbhd_option(options, "-DNBHD_WRAPS=1");
}

struct nbhd_problem nbhd_cuda_extra_problem(const struct nbhd_problem *problem)
{
    struct nbhd_problem p = *problem;
    for (int i = 0; i < 3; i++) {
        const int keys = i == 2 ? problem->desc.extra : 1;
        p.axis[i] = (struct nbhd_axis){problem->axis[i].length, keys, keys, 1, 1, NBHD_EDGE_NEAREST};
    }
    p.desc.extra = 0;
    return p;
}

/* ---- modules ---- */
static nbhd_status enter(struct CUctx_st *context, bool *pushed)
{
    struct CUctx_st *current = NULL;
    *pushed = false;
    nbhd_cu.cuCtxGetCurrent(&current);
    if (current == context)
        return NBHD_OK;
    nbhd_status status = nbhd_driver_check(nbhd_cu.cuCtxPushCurrent_v2(context), "the plan's context");
    *pushed = !status;
    return status;
}

static void leave(bool pushed)
{
    struct CUctx_st *context;
    if (pushed)
        nbhd_cu.cuCtxPopCurrent_v2(&context);
}

/* Of code that is being compiled: of no use but to be released. */
static nbhd_status empty_module(struct nbhd_cuda_module **module, const struct nbhd_cuda_machine *machine)
{
    *module = calloc(1, sizeof **module);
    if (!*module)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a module's record could not be allocated");
    **module = (struct nbhd_cuda_module){.machine = *machine, .users = 1};
    return NBHD_OK;
}

/* Under lock. */
static nbhd_status load(struct nbhd_cuda_module **out, const struct nbhd_jit *code,
                        const struct nbhd_cuda_machine *machine)
{
    unsigned long long id = 0;
    if (machine->context && nbhd_cu.cuCtxGetId(machine->context, &id))
        return nbhd_fail(NBHD_ERROR_DEVICE, "the current context is not valid");
    for (struct nbhd_cuda_module *m = modules; m; m = m->next)
        if (m->code == code && m->machine.context == machine->context && m->context_id == id) {
            m->users++;
            *out = m;
            return NBHD_OK;
        }
    struct nbhd_cuda_module *module = calloc(1, sizeof *module);
    if (!module)
        return nbhd_fail(NBHD_ERROR_MEMORY, "a module's record could not be allocated");
    *module = (struct nbhd_cuda_module){.code = code, .machine = *machine, .context_id = id, .users = 1};
    nbhd_status status = NBHD_OK;
    if (machine->context) {
        bool pushed;
        status = enter(machine->context, &pushed);
        if (!status)
            status = nbhd_driver_check(nbhd_cu.cuModuleLoadData(&module->handle, code->cubin), code->name);
        leave(pushed);
    }
    if (status) {
        free(module);
        return status;
    }
    module->next = modules;
    modules = module;
    *out = module;
    return NBHD_OK;
}

nbhd_status nbhd_cuda_acquire(struct nbhd_cuda_module **module, const char *source, const struct nbhd_options *options,
                              unsigned flags)
{
    struct nbhd_cuda_machine machine;
    const struct nbhd_jit *code;
    *module = NULL;
    nbhd_status status = nbhd_cuda_machine(&machine);
    if (!status && options->used + 1 >= sizeof options->text)
        status =
            nbhd_fail(NBHD_ERROR_COMPILE, "the options of %s are longer than %zu bytes", source, sizeof options->text);
    if (!status && nbhd_ahead(source, options->text, machine.arch, flags))
        return empty_module(module, &machine);
    if (!status)
        status = nbhd_jit_compile(&code, source, options->text, machine.arch, flags);
    if (status)
        return status;
    pthread_mutex_lock(&lock);
    status = load(module, code, &machine);
    pthread_mutex_unlock(&lock);
    return status;
}

void nbhd_cuda_release(struct nbhd_cuda_module *module)
{
    if (!module)
        return;
    pthread_mutex_lock(&lock);
    bool last = --module->users == 0;
    for (struct nbhd_cuda_module **at = &modules; last && *at; at = &(*at)->next)
        if (*at == module) {
            *at = module->next;
            break;
        }
    pthread_mutex_unlock(&lock);
    if (!last)
        return;
    bool pushed;
    /* A context that is gone took its modules with it. */
    if (module->handle && !enter(module->machine.context, &pushed)) {
        nbhd_cu.cuModuleUnload(module->handle);
        leave(pushed);
    }
    free(module);
}

nbhd_status nbhd_cuda_function(struct CUfunc_st **function, const struct nbhd_cuda_module *module, const char *name)
{
    *function = NULL;
    if (!module->handle)
        return NBHD_OK;
    bool pushed;
    int fixed = 0;
    nbhd_status status = enter(module->machine.context, &pushed);
    if (status)
        return status;
    status = nbhd_driver_check(nbhd_cu.cuModuleGetFunction(function, module->handle, name), name);
    if (!status)
        status = nbhd_driver_check(nbhd_cu.cuFuncGetAttribute(&fixed, NBHD_CU_FUNC_SHARED_SIZE_BYTES, *function), name);
    if (!status)
        status = nbhd_driver_check(nbhd_cu.cuFuncSetAttribute(*function, NBHD_CU_FUNC_MAX_DYNAMIC_SHARED_SIZE_BYTES,
                                                              module->machine.shared_max - fixed),
                                   name);
    leave(pushed);
    return status;
}

/* ---- execution ---- */
nbhd_status nbhd_cuda_launch(const struct nbhd_cuda_module *module, struct CUfunc_st *function,
                             const struct nbhd_cuda_grid *grid, void *stream, void **arguments)
{
    if (!function)
        return nbhd_fail(NBHD_ERROR_DEVICE, "this plan was only compiled, for %s, and cannot be executed",
                         module->machine.arch);
    struct nbhd_launch_config config = {.shared = grid->shared, .stream = stream};
    for (int i = 0; i < 3; i++) {
        config.grid[i] = grid->blocks[i];
        config.block[i] = grid->threads[i];
    }
    bool pushed;
    nbhd_status status = enter(module->machine.context, &pushed);
    if (!status)
        status = nbhd_driver_check(nbhd_cu.cuLaunchKernelEx(&config, function, arguments, NULL), module->code->name);
    leave(pushed);
    return status;
}

nbhd_status nbhd_cuda_tensor_map(struct nbhd_tensor_map *map, const struct nbhd_cuda_box *box)
{
    static const unsigned types[] = {NBHD_CU_TENSOR_FLOAT32, NBHD_CU_TENSOR_FLOAT16, NBHD_CU_TENSOR_BFLOAT16,
                                     NBHD_CU_TENSOR_FLOAT64, NBHD_CU_TENSOR_INT32};
    const unsigned swizzle = box->swizzle == 128   ? NBHD_CU_TENSOR_SWIZZLE_128B
                             : box->swizzle == 64 ? NBHD_CU_TENSOR_SWIZZLE_64B
                             : box->swizzle == 32 ? NBHD_CU_TENSOR_SWIZZLE_32B
                                                  : NBHD_CU_TENSOR_SWIZZLE_NONE;
    uint32_t step[5];
    for (int i = 0; i < 5; i++)
        step[i] = box->step[i] ? box->step[i] : 1;
    if (!nbhd_cu.cuTensorMapEncodeTiled)
        return nbhd_fail(NBHD_ERROR_DEVICE,
                         "this plan was only compiled and cannot be executed: there is no CUDA driver here");
    const unsigned result = nbhd_cu.cuTensorMapEncodeTiled(
        map, types[box->dtype], (uint32_t)box->rank, box->data, box->size, box->stride + 1, box->box, step,
        NBHD_CU_TENSOR_INTERLEAVE_NONE, swizzle, NBHD_CU_TENSOR_L2_256B, NBHD_CU_TENSOR_FILL_ZERO);
    return result ? nbhd_driver_check(result, "a tensor map (its box, strides or alignment)") : NBHD_OK;
}
