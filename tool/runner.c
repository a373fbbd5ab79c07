/* Runs a plan on host tensors, on either device. */
#include "runner.h"

#include <string.h>

#include "device.h"
#include "timing.h"
#include "tool.h"

int runner_open(struct runner *r, const nbhd_desc *desc, nbhd_device device, const char *kernel)
{
    const struct problem problem = {.desc = *desc};
    return runner_open_problem(r, &problem, desc->pass, device, kernel);
}

int runner_open_problem(struct runner *r, const struct problem *problem, int pass, nbhd_device device,
                        const char *kernel)
{
    memset(r, 0, sizeof *r);
    r->desc = problem_tensors(problem);
    r->desc.pass = pass;
    r->device = device;
    int status = device_open(device);
    if (status)
        return status;
    double begun = now_ms();
    nbhd_status result = problem_plan(&r->plan, problem, pass, device, kernel);
    r->plan_ms = now_ms() - begun;
    if (result != NBHD_OK)
        return tool_fail_library(result);
    status = device_alloc(device, nbhd_plan_workspace(r->plan), &r->workspace);
    if (status)
        runner_close(r);
    return status;
}

/* Brings what the pass reads to the device; args then has device pointers. On the CPU nothing moves. */
static int send_inputs(struct runner *r, nbhd_args *args)
{
    int status = TOOL_DONE;
    for (int slot = 0; r->device != NBHD_DEVICE_CPU && !status && slot < SLOT_COUNT; slot++) {
        nbhd_tensor *tensor = slot_tensor(args, slot);
        enum slot_use use = slot_use(&r->desc, slot);
        if (!tensor->data || use == SLOT_UNUSED)
            continue;
        size_t bytes = slot_bytes(&r->desc, slot);
        if (!r->copy[slot])
            status = device_alloc(r->device, bytes, &r->copy[slot]);
        if (!status && use == SLOT_READ)
            status = device_upload(r->device, r->copy[slot], tensor->data, bytes);
        tensor->data = r->copy[slot];
    }
    return status;
}

int runner_execute(struct runner *r, const nbhd_args *args)
{
    nbhd_status status = nbhd_execute(r->plan, args, r->workspace, NULL);
    return status == NBHD_OK ? TOOL_DONE : tool_fail_library(status);
}

/* Waits, and brings what the pass wrote back to where host points. */
static int fetch_outputs(struct runner *r, const nbhd_args *host)
{
    nbhd_args args = *host;
    int status = device_wait(r->device);
    for (int slot = 0; r->device != NBHD_DEVICE_CPU && !status && slot < SLOT_COUNT; slot++)
        if (r->copy[slot] && slot_tensor(&args, slot)->data && slot_use(&r->desc, slot) == SLOT_WRITTEN)
            status = device_download(r->device, slot_tensor(&args, slot)->data, r->copy[slot],
                                     slot_bytes(&r->desc, slot));
    return status;
}

int runner_run(struct runner *r, const nbhd_args *host)
{
    nbhd_args args = *host;
    int status = send_inputs(r, &args);
    if (!status)
        status = runner_execute(r, &args);
    return status ? status : fetch_outputs(r, host);
}

void runner_close(struct runner *r)
{
    for (int slot = 0; slot < SLOT_COUNT; slot++)
        device_free(r->device, r->copy[slot]);
    device_free(r->device, r->workspace);
    nbhd_plan_destroy(&r->plan);
    memset(r, 0, sizeof *r);
}
