/* The shared library as a plugin has it: opened by dlopen, used with workers, and closed while they are still awake. */
#define _DEFAULT_SOURCE /* usleep */
#include <dlfcn.h>
#include <unistd.h>
#include "nbhd.h"
#include "test.h"

/* ISO C has no conversion from dlsym's pointer to one to a function. */
static void find(void *library, const char *name, void *function)
{
    void *const symbol = dlsym(library, name);
    CHECK(symbol, "no %s", name);
    memcpy(function, &symbol, sizeof symbol);
}

static void open_use_and_close(int turn)
{
    enum { TOKENS = 2048, HEADS = 8, DIM = 16, ELEMENTS = TOKENS * HEADS * DIM };
    static float tokens[ELEMENTS], out[ELEMENTS];
    static _Alignas(64) char workspace[1 << 24];
    nbhd_status (*parse)(nbhd_desc *, const char *);
    nbhd_status (*create)(nbhd_plan **, const nbhd_desc *, nbhd_device, unsigned);
    nbhd_status (*execute)(const nbhd_plan *, const nbhd_args *, void *, void *);
    size_t (*size)(const nbhd_plan *);
    void (*destroy)(nbhd_plan **);
    void *library = dlopen(TEST_LIBRARY, RTLD_NOW | RTLD_LOCAL);
    if (!CHECK(library, "%s", dlerror()))
        return;
    find(library, "nbhd_desc_parse", &parse);
    find(library, "nbhd_plan_create", &create);
    find(library, "nbhd_execute", &execute);
    find(library, "nbhd_plan_workspace", &size);
    find(library, "nbhd_plan_destroy", &destroy);
    for (int i = 0; i < ELEMENTS; i++) {
        tokens[i] = 1;
        out[i] = 0;
    }
    nbhd_desc desc = NBHD_DESC_INIT;
    nbhd_args args = NBHD_ARGS_INIT;
    nbhd_plan *plan = NULL;
    CHECK(!parse(&desc, "fwd f32 h8 d16 2048 w64"), "the line");
    desc.threads = 4;
    CHECK(!create(&plan, &desc, NBHD_DEVICE_CPU, 0), "no plan");
    args.q.data = args.k.data = args.v.data = tokens;
    args.o.data = out;
    const bool fits = CHECK(plan && size(plan) <= sizeof workspace, "a workspace of %zu bytes", plan ? size(plan) : 0);
    if (fits && turn % 2) /* else the workers have just begun */
        CHECK(!execute(plan, &args, workspace, NULL) && out[ELEMENTS - 1] == 1, "turn %d: %g", turn,
              (double)out[ELEMENTS - 1]);
    destroy(&plan);
    dlclose(library);
}

int main(void)
{
    for (int turn = 0; turn < 5; turn++) {
        open_use_and_close(turn);
        usleep(200u * (unsigned)turn); /* the workers look for work a while before they sleep */
    }
    return test_done();
}
