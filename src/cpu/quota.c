/* The CPU time that control groups grant this process. A container with a quota (docker --cpus, a Kubernetes limit)
 * sees all CPUs of its machine, and threads beyond the quota would only be stopped in turn. Linux, version 2 of the
 * groups. */
#include <limits.h>
#include <math.h>
#include <stdbool.h>
#include <stdio.h>
#include <string.h>
#include "cpu/threads.h"

enum { LONGEST_PATH = 4096 };

/* This process's group, "/a/b", of the lines of /proc/self/cgroup: the one that begins with "0::". */
static bool read_group(const char *groups, char *path, int room)
{
    FILE *file = fopen(groups, "r");
    bool found = false;
    while (file && !found && fgets(path, room, file))
        found = !strncmp(path, "0::/", 4) && strchr(path, '\n');
    if (file)
        fclose(file);
    if (found) {
        path[strcspn(path, "\n")] = 0;
        memmove(path, path + 3, strlen(path + 3) + 1);
    }
    return found;
}

/* Whole CPUs, rounded up, that a group's cpu.max ("200000 100000", or "max 100000") grants; INT_MAX: as many as there
 * are. */
static int granted(const char *mount, const char *group)
{
    char name[LONGEST_PATH + 256];
    double quota = 0, period = 0;
    const int length = snprintf(name, sizeof name, "%s%s/cpu.max", mount, group);
    FILE *file = length < (int)sizeof name ? fopen(name, "r") : NULL;
    const bool limited = file && fscanf(file, "%lf %lf", &quota, &period) == 2 && quota > 0 && period > 0;
    if (file)
        fclose(file);
    return limited && quota / period < INT_MAX / 2 ? (int)ceil(quota / period) : INT_MAX;
}

int nbhd_threads_quota(const char *groups, const char *mount)
{
    char path[LONGEST_PATH];
    int least = INT_MAX;
    if (!read_group(groups, path, sizeof path))
        return least;
    for (;;) { /* a group has no more than those that it is in */
        const int here = granted(mount, path);
        least = here < least ? here : least;
        char *end = strrchr(path, '/');
        if (!end)
            return least;
        *end = 0;
    }
}
