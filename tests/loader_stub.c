/* Stands for NVRTC and for a driver in test_loader. The environment says how it behaves:
 * STUB_VERSION (13.0), STUB_ARCHS (how many it compiles for, from sm_80 on: 1), STUB_RESULT (of a compilation: 0),
 * STUB_TOGETHER (compilations fail unless so many have begun: 1); of the driver STUB_INIT (what cuInit answers: 0) and
 * STUB_DRIVER (its version: 13000). */
#define _POSIX_C_SOURCE 200809L
#include <stdatomic.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

struct _nvrtcProgram;

static int number(const char *name, int otherwise)
{
    const char *text = getenv(name);
    return text ? atoi(text) : otherwise;
}

int nvrtcVersion(int *major, int *minor);
int nvrtcGetNumSupportedArchs(int *count);
int nvrtcGetSupportedArchs(int *archs);
int nvrtcCreateProgram(struct _nvrtcProgram **program, const char *text, const char *name, int count,
                       const char *const *headers, const char *const *names);
int nvrtcCompileProgram(struct _nvrtcProgram *program, int count, const char *const *options);
int nvrtcDestroyProgram(struct _nvrtcProgram **program);
int nvrtcGetCUBINSize(struct _nvrtcProgram *program, size_t *bytes);
int nvrtcGetCUBIN(struct _nvrtcProgram *program, char *cubin);
int nvrtcGetPTXSize(struct _nvrtcProgram *program, size_t *bytes);
int nvrtcGetPTX(struct _nvrtcProgram *program, char *ptx);
int nvrtcGetProgramLogSize(struct _nvrtcProgram *program, size_t *bytes);
int nvrtcGetProgramLog(struct _nvrtcProgram *program, char *log);
unsigned cuInit(unsigned flags);
unsigned cuDriverGetVersion(int *version);
unsigned cuGetErrorString(unsigned error, const char **text);

int nvrtcVersion(int *major, int *minor)
{
    const char *text = getenv("STUB_VERSION");
    return text ? sscanf(text, "%d.%d", major, minor) != 2 : (*major = 13, *minor = 0);
}

int nvrtcGetNumSupportedArchs(int *count)
{
    *count = number("STUB_ARCHS", 1);
    return 0;
}

int nvrtcGetSupportedArchs(int *archs)
{
    for (int i = 0; i < number("STUB_ARCHS", 1); i++)
        archs[i] = 80 + i;
    return 0;
}

int nvrtcCreateProgram(struct _nvrtcProgram **program, const char *text, const char *name, int count,
                       const char *const *headers, const char *const *names)
{
    (void)text, (void)name, (void)count, (void)headers, (void)names;
    *program = NULL;
    return 0;
}

int nvrtcCompileProgram(struct _nvrtcProgram *program, int count, const char *const *options)
{
    static atomic_int begun;
    const struct timespec pause = {0, 5000000};
    const int together = number("STUB_TOGETHER", 1);
    (void)program, (void)count, (void)options;
    atomic_fetch_add(&begun, 1);
    for (int i = 0; i < 2000 && atomic_load(&begun) < together; i++)
        nanosleep(&pause, NULL);
    return atomic_load(&begun) < together ? 7 : number("STUB_RESULT", 0);
}

int nvrtcDestroyProgram(struct _nvrtcProgram **program)
{
    (void)program;
    return 0;
}

int nvrtcGetCUBINSize(struct _nvrtcProgram *program, size_t *bytes)
{
    (void)program;
    *bytes = 4;
    return 0;
}

int nvrtcGetCUBIN(struct _nvrtcProgram *program, char *cubin)
{
    (void)program;
    memcpy(cubin, "code", 4);
    return 0;
}

int nvrtcGetPTXSize(struct _nvrtcProgram *program, size_t *bytes) { return nvrtcGetCUBINSize(program, bytes); }
int nvrtcGetPTX(struct _nvrtcProgram *program, char *ptx) { return nvrtcGetCUBIN(program, ptx); }

/* A compiler that has nothing to say. */
int nvrtcGetProgramLogSize(struct _nvrtcProgram *program, size_t *bytes)
{
    (void)program;
    *bytes = 0;
    return 0;
}

int nvrtcGetProgramLog(struct _nvrtcProgram *program, char *log)
{
    (void)program, (void)log;
    return 1;
}

unsigned cuInit(unsigned flags)
{
    (void)flags;
    return (unsigned)number("STUB_INIT", 0);
}

unsigned cuDriverGetVersion(int *version)
{
    *version = number("STUB_DRIVER", 13000);
    return 0;
}

/* Of no error that it knows. */
unsigned cuGetErrorString(unsigned error, const char **text)
{
    (void)error;
    *text = NULL;
    return 1;
}
