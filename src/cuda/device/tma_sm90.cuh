/* The Hopper copy engine and what goes with it: tensor maps, mbarriers, named barriers, bulk stores, setmaxnreg.
 * One function per instruction. Addresses in shared memory are 32-bit (smem_address). No multicast, no clusters. */
#ifndef NBHD_DEVICE_TMA_SM90_CUH
#define NBHD_DEVICE_TMA_SM90_CUH

/* CUtensorMap: made by the host, passed as a __grid_constant__ argument. */
struct __align__(64) nbhd_tensor_map {
    unsigned long long opaque[16];
};

NBHD_FN unsigned smem_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* ---- ordinary accesses by 32-bit address ---- */

NBHD_FN unsigned ld_shared_b32(unsigned address)
{
    unsigned x;
    asm volatile("ld.shared.b32 %0, [%1];" : "=r"(x) : "r"(address) : "memory");
    return x;
}

NBHD_FN uint4 ld_shared_v4(unsigned address)
{
    uint4 x;
    asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(x.x), "=r"(x.y), "=r"(x.z), "=r"(x.w)
                 : "r"(address)
                 : "memory");
    return x;
}

NBHD_FN void st_shared_b32(unsigned address, unsigned x)
{
    asm volatile("st.shared.b32 [%0], %1;" ::"r"(address), "r"(x) : "memory");
}

NBHD_FN void st_shared_b16(unsigned address, unsigned short x)
{
    asm volatile("st.shared.b16 [%0], %1;" ::"r"(address), "h"(x) : "memory");
}

NBHD_FN void st_shared_v4(unsigned address, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* Four 8x8 matrices of 16-bit elements, each transposed: lane l gives the place of row l % 8 of matrix l / 8. */
NBHD_FN void stmatrix_x4_trans(unsigned address, const unsigned *x)
{
    asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(x[0]),
                 "r"(x[1]), "r"(x[2]), "r"(x[3])
                 : "memory");
}

/* Shifts by 32 (64) or more give 0, unlike C's. */
NBHD_FN unsigned shl_b32(unsigned x, unsigned n)
{
    unsigned y;
    asm("shl.b32 %0, %1, %2;" : "=r"(y) : "r"(x), "r"(n));
    return y;
}

NBHD_FN unsigned long long shl_b64(unsigned long long x, unsigned n)
{
    unsigned long long y;
    asm("shl.b64 %0, %1, %2;" : "=l"(y) : "l"(x), "r"(n));
    return y;
}

/* A test's copy of these files defines NBHD_AMPLIFY (scripts/gpu-check): each warp then sleeps, up to a microsecond,
 * before it waits or arrives. What is right only as long as one side is the faster goes wrong. */
NBHD_FN void amplify(void)
{
#ifdef NBHD_AMPLIFY
    unsigned clock, warp = threadIdx.x >> 5;
    asm volatile("mov.u32 %0, %%clock;" : "=r"(clock)::"memory");
    asm volatile("nanosleep.u32 %0;" ::"r"((clock ^ warp * 0x9e3779b9u) * 0x85ebca6bu >> 22) : "memory");
#endif
}

/* ---- mbarriers: 8 bytes, 8-byte aligned. The phase bit of the n-th use of a ring of stages is n / stages & 1. ---- */

NBHD_FN void mbar_init(unsigned bar, int count)
{
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(bar), "r"(count) : "memory");
}

/* After the inits, before the __syncthreads that publishes them. */
NBHD_FN void mbar_fence_init(void) { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

NBHD_FN void mbar_arrive(unsigned bar)
{
    amplify();
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(bar) : "memory");
}

/* Arrives, and lets the phase end only after `bytes` more have been copied. Before the copies are issued. */
NBHD_FN void mbar_arrive_expect(unsigned bar, int bytes)
{
    amplify();
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(bar), "r"(bytes) : "memory");
}

/* Whether the phase with this parity has ended: "try_wait" may wait a while for it, "test_wait" never does. */
#define NBHD_MBAR_ASK(how, done, bar, phase) \
    asm volatile("{ .reg .pred p; mbarrier." how ".parity.shared::cta.b64 p, [%1], %2; selp.b32 %0, 1, 0, p; }" \
                 : "=r"(done) \
                 : "r"(bar), "r"(phase) \
                 : "memory")

NBHD_FN int mbar_try_wait(unsigned bar, int phase)
{
    int done;
    NBHD_MBAR_ASK("try_wait", done, bar, phase);
    return done;
}

NBHD_FN int mbar_test_wait(unsigned bar, int phase)
{
    int done;
    NBHD_MBAR_ASK("test_wait", done, bar, phase);
    return done;
}

/* Until the phase with this parity has ended. A fresh barrier counts as past phase 1. With NBHD_SPIN_LIMIT (debugging)
 * it gives up after so many tries: wrong results instead of a hang. No trap in here: it makes ptxas spill. */
NBHD_FN void mbar_wait(unsigned bar, int phase)
{
    amplify();
#ifdef NBHD_SPIN_LIMIT
    for (int i = 0; i < NBHD_SPIN_LIMIT && !mbar_try_wait(bar, phase); i++)
        ;
#else
    while (!mbar_try_wait(bar, phase))
        ;
#endif
}

/* ---- named barriers 1..15: id should be a literal, or ptxas reserves all 16. threads: a multiple of 32 ---- */

NBHD_FN void named_barrier_sync(int id, int threads)
{
    amplify();
    asm volatile("barrier.cta.sync.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

NBHD_FN void named_barrier_arrive(int id, int threads)
{
    amplify();
    asm volatile("barrier.cta.arrive.aligned %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

/* ---- counts in global memory, by which CTAs tell each other that they are done with something ---- */

/* The count before, one more after. */
NBHD_FN unsigned take_number(unsigned *count)
{
    unsigned x;
    asm volatile("atom.relaxed.gpu.global.add.u32 %0, [%1], 1;" : "=r"(x) : "l"(count) : "memory");
    return x;
}

/* What this thread has seen written, by the copy engine too, is seen by all who wait for the count. */
NBHD_FN void count_up(unsigned *count)
{
    amplify();
    asm volatile("fence.proxy.async;\n\tred.release.gpu.global.add.u32 [%0], 1;" ::"l"(count) : "memory");
}

NBHD_FN int has_come(const unsigned *count, unsigned all)
{
    unsigned x;
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(x) : "l"(count) : "memory");
    return x >= all;
}

NBHD_FN void await_count(const unsigned *count, unsigned all)
{
    amplify();
    while (!has_come(count, all))
        asm volatile("nanosleep.u32 500;");
    asm volatile("fence.proxy.async;" ::: "memory");
}

/* ---- copies. Coordinates are in elements, fastest first, and may be out of bounds: loads give zeros there and count
 * the whole box's bytes, sums are clipped (their origin must not be negative). Destinations: 1024-byte aligned. */

NBHD_FN void tma_load_5d(unsigned dst, const struct nbhd_tensor_map *map, unsigned bar, int c0, int c1, int c2, int c3,
                         int c4)
{
    asm volatile("cp.async.bulk.tensor.5d.shared::cluster.global.tile.mbarrier::complete_tx::bytes "
                 "[%0], [%1, {%3, %4, %5, %6, %7}], [%2];" ::"r"(dst),
                 "l"(map), "r"(bar), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* global[i] += shared[i], fp32, in the L2. */
NBHD_FN void tma_add_5d(const struct nbhd_tensor_map *map, unsigned src, int c0, int c1, int c2, int c3, int c4)
{
    asm volatile("cp.reduce.async.bulk.tensor.5d.global.shared::cta.add.tile.bulk_group "
                 "[%0, {%2, %3, %4, %5, %6}], [%1];" ::"l"(map),
                 "r"(src), "r"(c0), "r"(c1), "r"(c2), "r"(c3), "r"(c4)
                 : "memory");
}

/* 4 bytes by this thread; zeros instead where inside is 0. */
NBHD_FN void cp_async_4(unsigned dst, const void *src, int inside)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(dst), "l"(src), "r"(inside ? 4 : 0) : "memory");
}

/* Arrives when this thread's cp_async so far are done; counts among the barrier's arrivals. */
NBHD_FN void cp_async_mbar_arrive(unsigned bar)
{
    amplify();
    asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(bar) : "memory");
}

/* bytes: a multiple of 16; both addresses 16-byte aligned. */
NBHD_FN void bulk_load(unsigned dst, const void *src, int bytes, unsigned bar)
{
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(dst),
                 "l"(src), "r"(bytes), "r"(bar)
                 : "memory");
}

NBHD_FN void bulk_store(void *dst, unsigned src, int bytes)
{
    asm volatile("cp.async.bulk.global.shared::cta.bulk_group [%0], [%1], %2;" ::"l"(dst), "r"(src), "r"(bytes)
                 : "memory");
}

NBHD_FN void bulk_commit(void) { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
/* Until the sources of all groups have been read, so may be overwritten. */
NBHD_FN void bulk_wait_read_0(void) { asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory"); }
/* Until all groups are complete, their writes visible. */
NBHD_FN void bulk_wait_0(void) { asm volatile("cp.async.bulk.wait_group 0;" ::: "memory"); }

/* Between ordinary stores to shared memory and a wgmma or bulk copy that reads them: in each writing thread, then a
 * barrier; or after the barrier, in each thread that issues the reader. */
NBHD_FN void fence_proxy_async(void) { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

/* Registers per thread of this warpgroup from here on: a literal, 24..256, a multiple of 8; the kernel needs
 * __launch_bounds__(threads, blocks). Macros because the operand is an immediate. */
#define NBHD_SET_REGISTERS_UP(count) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count))
#define NBHD_SET_REGISTERS_DOWN(count) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count))

#endif
