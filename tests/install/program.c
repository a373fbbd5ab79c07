/* A user's first program, built against the installed library: blocked attention over 8 tokens of one head. */
#include <math.h>
#include <nbhd.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

int main(void)
{
    float tokens[8 * 4], out[8 * 4];
    char *memory = NULL, *workspace;
    nbhd_desc desc = NBHD_DESC_INIT;
    nbhd_args args = NBHD_ARGS_INIT;
    nbhd_plan *plan;
    int i;
    for (i = 0; i < 32; i++)
        tokens[i] = (float)(i % 4);
    if (nbhd_desc_parse(&desc, "fwd f32 d4 8 w4 s4") || nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0))
        return fprintf(stderr, "%s\n", nbhd_last_error()), 1;
    memory = malloc(nbhd_plan_workspace(plan) + 64);
    if (!memory)
        return fprintf(stderr, "no memory\n"), 1;
    workspace = memory + (64 - (uintptr_t)memory % 64); /* aligned to 64 bytes */
    args.q.data = args.k.data = args.v.data = tokens;
    args.o.data = out;
    if (nbhd_execute(plan, &args, workspace, NULL))
        return fprintf(stderr, "%s\n", nbhd_last_error()), 1;
    for (i = 0; i < 32; i++) /* all values of a window are equal, so is their mean */
        if (fabsf(out[i] - tokens[i]) > 1e-6f)
            return fprintf(stderr, "out[%d] is %g\n", i, (double)out[i]), 1;
    printf("nbhd %d: %s\n", nbhd_version(), nbhd_plan_kernel(plan));
    nbhd_plan_destroy(&plan);
    free(memory);
    return 0;
}
