/* From the text of a kernel file to machine code, once: NVRTC, a cache in memory, a cache on disk.
 *
 * The .cu files are embedded in the library (cmake/embed.cmake); NBHD_KERNEL_DIR=src/cuda reads them from disk instead.
 * What is compiled is identified by all embedded text, the file, options, architecture, NBHD_VERSION and NVRTC's
 * version. The disk cache is $NBHD_CACHE_DIR, else $XDG_CACHE_HOME/nbhd, else ~/.cache/nbhd. It is never needed: where
 * it cannot be read or written, kernels are compiled in every process. */
#ifndef NBHD_CUDA_JIT_H
#define NBHD_CUDA_JIT_H

#include "core/kernel.h"

/* A file of kernel text. */
struct nbhd_source {
    const char *name; /* "fwd_simt.cu", "device/ptx.cuh", "nbhd_geom.h" */
    const char *text; /* ends with a 0 */
    size_t size;
};
extern const struct nbhd_source nbhd_embedded[]; /* ends with name == NULL */

/* Compiled code; immutable, and kept until the process ends. */
struct nbhd_jit {
    char name[128];   /* of its file in the disk cache */
    char *identity;   /* lines of "field value": everything that the code depends on */
    char *log;        /* what NVRTC and ptxas said */
    void *cubin;
    size_t cubin_bytes;
    double compile_ms; /* 0: it came from the disk */
    const struct nbhd_jit *next;
};

/* source: a file's name. options: "-DNAME=VALUE ...", separated by single spaces. arch: "sm_90a".
 * flags: of the plan; NBHD_PLAN_NO_JIT takes only what is in a cache, there of any NVRTC version. */
nbhd_status nbhd_jit_compile(const struct nbhd_jit **code, const char *source, const char *options, const char *arch,
                             unsigned flags);

/* Whether nbhd_jit_compile would find it in a cache, compiled by the NVRTC at hand. */
bool nbhd_jit_is_there(const char *source, const char *options, const char *arch);

/* The same code as PTX, compiled anew; *ptx is to be freed. */
nbhd_status nbhd_jit_ptx(char **ptx, const char *source, const char *options, const char *arch);

/* What ptxas says of one kernel in the log. Bytes but for registers. */
struct nbhd_jit_entry {
    char name[64];
    int registers, shared, stack, spills;
};
/* Up to room entries; returns how many there are. */
int nbhd_jit_entries(const char *log, struct nbhd_jit_entry *entries, int room);
/* The first line of the log that tells of bad code: a warning, a wgmma that ptxas serialized. NULL: none. */
const char *nbhd_jit_complaint(const char *log);

/* Called in this thread for each nbhd_jit_compile that succeeds, found or compiled; NULL: nobody. */
typedef void nbhd_jit_observer(const struct nbhd_jit *code, void *context);
void nbhd_jit_observe(nbhd_jit_observer *observer, void *context);

/* ---- ahead.c: kernels of a plan side by side ---- */
/* From here on this thread gathers: what it asks for is only begun. */
void nbhd_ahead_begin(void);
/* True: this thread gathers, and a thread compiles the code or has done so. False: call nbhd_jit_compile. */
bool nbhd_ahead(const char *source, const char *options, const char *arch, unsigned flags);
/* Waits for all that was begun; true if anything was. */
bool nbhd_ahead_end(void);

/* Forgets the cache in memory, for tests. No plan may exist. */
void nbhd_jit_forget(void);

/* ---- cache.c: the directory ---- */
/* The cache's directory, whether it exists or not; false if the environment names none. */
bool nbhd_cache_directory(char *path, size_t capacity);
/* Reads and verifies name: false if it is absent, damaged, or of another identity. A name that ends with '*' stands for
 * any that begins so. identity: the first lines that it must have, or NULL to take any. On success the code's identity,
 * log and cubin are allocated. */
bool nbhd_cache_load(const char *name, const char *identity, struct nbhd_jit *code);
/* Writes a file; true if it is there now. A failure is logged and else of no consequence. */
bool nbhd_cache_store(const struct nbhd_jit *code);
/* Calls visit for each file of the cache, verified (code) or not (code NULL); returns their number. */
int nbhd_cache_list(void (*visit)(const char *name, const struct nbhd_jit *code, void *context), void *context);
/* Removes every file of the cache, also what a killed process left; returns their number, -1 if some stayed. */
int nbhd_cache_clear(void);

#endif
