/* Tensor cores and asynchronous copies as every GPU since compute capability 8.0 has them. One function per
 * instruction. Addresses in shared memory are 32-bit (shared_address).
 *
 * Fragments of a warp, lane = 4 g + q. D and C of 16 x 8 floats: d[2 i + c] is row g + 8 i, column 2 q + c.
 * A of 16 x 16: a[i + 2 h] is row g + 8 i, columns 8 h + 2 q and the next. B of 16 x 8: b_h is rows 8 h + 2 q and
 * the next, column g. So two neighbouring D, packed, are the A of a following product. */
#ifndef NBHD_DEVICE_MMA_SM80_CUH
#define NBHD_DEVICE_MMA_SM80_CUH

NBHD_FN unsigned shared_address(const void *p) { return (unsigned)__cvta_generic_to_shared(p); }

/* threadIdx.x, read anew: what is made of it is made anew too, and takes no register meanwhile. */
NBHD_FN unsigned fresh_thread(void)
{
    unsigned x;
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(x));
    return x;
}

/* ---- d += a b ---- */
NBHD_FN void mma_m16n8k16_bf16(float *d, const unsigned *a, unsigned b0, unsigned b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

NBHD_FN void mma_m16n8k16_f16(float *d, const unsigned *a, unsigned b0, unsigned b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* float32 operands, of which only sign, exponent and the 10 highest bits of the fraction count: A is 16 x 8, a[i + 2 h]
 * is row g + 8 i, column q + 4 h; B is 8 x 8, b_h is row q + 4 h, column g. */
NBHD_FN void mma_m16n8k8_tf32(float *d, const unsigned *a, unsigned b0, unsigned b1)
{
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

/* ---- four 8 x 8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l / 8 ---- */
NBHD_FN void ldmatrix_x4(unsigned *r, unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

NBHD_FN void ldmatrix_x4_trans(unsigned *r, unsigned address)
{
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address)
                 : "memory");
}

NBHD_FN void st_shared_v4(unsigned address, uint4 x)
{
    asm volatile("st.shared.v4.b32 [%0], {%1,%2,%3,%4};" ::"r"(address), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
                 : "memory");
}

/* ---- copies from global to shared memory, behind the thread's back; the rest of the destination becomes 0 ---- */
NBHD_FN void cp_async_16(unsigned to, const void *from, int bytes)
{
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

NBHD_FN void cp_async_8(unsigned to, const void *from, int bytes)
{
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
}

/* Until this thread's copies have arrived; a barrier then tells the others. */
NBHD_FN void cp_async_wait_all(void) { asm volatile("cp.async.wait_all;" ::: "memory"); }

/* ---- two floats to two 16-bit elements, low first in memory ---- */
NBHD_FN unsigned cvt_rn_bf16x2_f32(float high, float low)
{
    unsigned r;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

NBHD_FN unsigned cvt_rn_f16x2_f32(float high, float low)
{
    unsigned r;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(r) : "f"(high), "f"(low));
    return r;
}

#endif
