/* wgmma: the warpgroup matrix instruction of sm_90a, one function per shape and operand layout, and its fences.
 * D[64][N] (fp32, registers) = A[64][16] * B[16][N] (+ D where keep is not 0). All 128 threads of a warpgroup call it
 * with the same descriptors. The operands' type is NBHD_MMA_TYPE, "bf16" or "f16".
 *
 * Accumulator: lane l = 4g + q of warp w holds in d[4j + 2r + c] row 16w + g + 8r, column 8j + 2q + c.
 * A in registers: a0, a1 = rows g, g + 8 at k = 2q, 2q + 1; a2, a3 = the same rows at k + 8. So a packed accumulator is
 * an A operand as it stands: k-step t takes the pairs 4t .. 4t + 3.
 * The kernel names the functions it wants; the host half passes N, which is why there is one function per N. */
#ifndef NBHD_DEVICE_WGMMA_SM90_CUH
#define NBHD_DEVICE_WGMMA_SM90_CUH

#ifndef NBHD_MMA_TYPE
#error "NBHD_MMA_TYPE: \"bf16\" or \"f16\""
#endif

/* Matrix descriptors of a tile stored as [64-column chunk][row][128 bytes], 128-byte swizzle, 1024-byte aligned: what a
 * TMA box of tokens is. address: in shared memory. Advance by adding to the low word (units of 16 bytes):
 * k-major (the columns are k): + 2 per k-step of 16, + rows * 8 per chunk;
 * mn-major (the rows are k, columns run over all chunks by themselves): + 128 per k-step of 16.
 * First the lower words alone, and the descriptor that one belongs to. */
NBHD_FN unsigned wgmma_k_low(unsigned address) { return (address & 0x3ffff) >> 4 | 1u << 16; }

NBHD_FN unsigned wgmma_mn_low(unsigned address, int rows)
{
    return (address & 0x3ffff) >> 4 | (unsigned)rows * 8 << 16;
}

NBHD_FN unsigned long long wgmma_descriptor(unsigned low) { return low | 0x40000040ull << 32; }
NBHD_FN unsigned long long wgmma_k_major(unsigned address) { return wgmma_descriptor(wgmma_k_low(address)); }

NBHD_FN unsigned long long wgmma_mn_major(unsigned address, int rows)
{
    return wgmma_descriptor(wgmma_mn_low(address, rows));
}

/* K-major tile of 16 columns, 32 bytes a row, 32-byte swizzle (address bit 4 ^= bit 7): one k-step. */
NBHD_FN unsigned long long wgmma_k_major_32(unsigned address)
{
    return (unsigned long long)((address & 0x3ffff) >> 4 | 1u << 16) | 0xc0000010ull << 32;
}

/* The same descriptor, `units` of 16 bytes further. */
NBHD_FN unsigned long long wgmma_advance(unsigned long long descriptor, int units)
{
    return (descriptor & 0xffffffff00000000ull) | ((unsigned)descriptor + (unsigned)units);
}

/* Before the first wgmma that reads or writes registers which other code has touched. */
NBHD_FN void wgmma_fence(void) { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
NBHD_FN void wgmma_commit(void) { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
/* Until at most the last group, or none, is pending. */
NBHD_FN void wgmma_wait_1(void) { asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory"); }
NBHD_FN void wgmma_wait_0(void) { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

/* wait_0 that cannot start before value is known. ptxas moves a plain wait up to the last branch merge before it, which
 * ends the overlap of matrix and other work; it does look at registers. value must not be negative; scratch: 4 bytes of
 * shared memory that nobody reads. */
NBHD_FN void wgmma_wait_0_after(float value, unsigned scratch)
{
    asm volatile("{ .reg .pred p; setp.lt.f32 p, %0, 0f00000000; @p st.shared.f32 [%1], %0;\n"
                 "wgmma.wait_group.sync.aligned 0; }" ::"f"(value),
                 "r"(scratch)
                 : "memory");
}

/* The same for a word whose upper bit is clear. */
NBHD_FN void wgmma_wait_0_after_bits(unsigned bits, unsigned scratch)
{
    asm volatile("{ .reg .pred p; setp.lt.s32 p, %0, 0; @p st.shared.b32 [%1], %0;\n"
                 "wgmma.wait_group.sync.aligned 0; }" ::"r"(bits),
                 "r"(scratch)
                 : "memory");
}

/* The compiler believes a wgmma to be done when issued. Pin registers after each wait and before each fence, which
 * order memory: told of it again for each register, NVVM took 5 % longer. */
#define NBHD_PIN_F(d, count)                                                                                          \
    _Pragma("unroll") for (int pin = 0; pin < (count); pin++) asm volatile("" : "+f"((d)[pin]))
#define NBHD_PIN_R(a, count)                                                                                          \
    _Pragma("unroll") for (int pin = 0; pin < (count); pin++) asm volatile("" : "+r"((a)[pin]))

/* Registers that hold something, whatever it is. */
#define NBHD_ANY_F(d, count)                                                                                          \
    _Pragma("unroll") for (int pin = 0; pin < (count); pin++) asm volatile("" : "=f"((d)[pin]))
#define NBHD_ANY_R(a, count)                                                                                          \
    _Pragma("unroll") for (int pin = 0; pin < (count); pin++) asm volatile("" : "=r"((a)[pin]))

/* Pins A operands, `count` a multiple of 4, also before ptxas, after a wait in a later turn of the loop than their
 * wgmma: it has been seen to give their registers away at the loop's end, while the wgmma was reading them. So
 * something must read them after the wait: stores that are never executed, as no grid is empty. */
#define NBHD_KEEP_R(a, count)                                                                                         \
    _Pragma("unroll") for (int pin = 0; pin < (count); pin += 4)                                                      \
        asm volatile("{ .reg .pred p; .reg .b32 n; mov.u32 n, %%nctaid.x; setp.eq.u32 p, n, 0;\n"                     \
                     "@p st.shared.v4.b32 [n], {%0, %1, %2, %3}; }"                                                   \
                     : "+r"((a)[pin]), "+r"((a)[pin + 1]), "+r"((a)[pin + 2]), "+r"((a)[pin + 3])::"memory")

/* Picks bytes of b:a; bit 3 of a selector's digit takes the byte's sign, eight times. */
NBHD_FN unsigned prmt_b32(unsigned a, unsigned b, unsigned selector)
{
    unsigned y;
    asm("prmt.b32 %0, %1, %2, %3;" : "=r"(y) : "r"(a), "r"(b), "r"(selector));
    return y;
}

/* Two neighbouring columns of an operand in registers. */
NBHD_FN unsigned cvt_rn_bf16x2_f32(float low, float high)
{
    unsigned y;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

NBHD_FN unsigned cvt_rn_f16x2_f32(float low, float high)
{
    unsigned y;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(y) : "f"(high), "f"(low));
    return y;
}

/* Register lists of an accumulator of N columns: as text, and as operands. */
#define NBHD_R8 "%0, %1, %2, %3"
#define NBHD_R16 NBHD_R8 ", %4, %5, %6, %7"
#define NBHD_R24 NBHD_R16 ", %8, %9, %10, %11"
#define NBHD_R32 NBHD_R24 ", %12, %13, %14, %15"
#define NBHD_R40 NBHD_R32 ", %16, %17, %18, %19"
#define NBHD_R48 NBHD_R40 ", %20, %21, %22, %23"
#define NBHD_R56 NBHD_R48 ", %24, %25, %26, %27"
#define NBHD_R64 NBHD_R56 ", %28, %29, %30, %31"
#define NBHD_R72 NBHD_R64 ", %32, %33, %34, %35"
#define NBHD_R80 NBHD_R72 ", %36, %37, %38, %39"
#define NBHD_R88 NBHD_R80 ", %40, %41, %42, %43"
#define NBHD_R96 NBHD_R88 ", %44, %45, %46, %47"
#define NBHD_R104 NBHD_R96 ", %48, %49, %50, %51"
#define NBHD_R112 NBHD_R104 ", %52, %53, %54, %55"
#define NBHD_R120 NBHD_R112 ", %56, %57, %58, %59"
#define NBHD_R128 NBHD_R120 ", %60, %61, %62, %63"
#define NBHD_R136 NBHD_R128 ", %64, %65, %66, %67"
#define NBHD_R144 NBHD_R136 ", %68, %69, %70, %71"
#define NBHD_R152 NBHD_R144 ", %72, %73, %74, %75"
#define NBHD_R160 NBHD_R152 ", %76, %77, %78, %79"
#define NBHD_R168 NBHD_R160 ", %80, %81, %82, %83"
#define NBHD_R176 NBHD_R168 ", %84, %85, %86, %87"
#define NBHD_R184 NBHD_R176 ", %88, %89, %90, %91"
#define NBHD_R192 NBHD_R184 ", %92, %93, %94, %95"
#define NBHD_R200 NBHD_R192 ", %96, %97, %98, %99"
#define NBHD_R208 NBHD_R200 ", %100, %101, %102, %103"
#define NBHD_R216 NBHD_R208 ", %104, %105, %106, %107"
#define NBHD_R224 NBHD_R216 ", %108, %109, %110, %111"
#define NBHD_R232 NBHD_R224 ", %112, %113, %114, %115"
#define NBHD_R240 NBHD_R232 ", %116, %117, %118, %119"
#define NBHD_R248 NBHD_R240 ", %120, %121, %122, %123"
#define NBHD_R256 NBHD_R248 ", %124, %125, %126, %127"

#define NBHD_D8 "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
#define NBHD_D16 NBHD_D8, "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7])
#define NBHD_D24 NBHD_D16, "+f"(d[8]), "+f"(d[9]), "+f"(d[10]), "+f"(d[11])
#define NBHD_D32 NBHD_D24, "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15])
#define NBHD_D40 NBHD_D32, "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19])
#define NBHD_D48 NBHD_D40, "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23])
#define NBHD_D56 NBHD_D48, "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27])
#define NBHD_D64 NBHD_D56, "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
#define NBHD_D72 NBHD_D64, "+f"(d[32]), "+f"(d[33]), "+f"(d[34]), "+f"(d[35])
#define NBHD_D80 NBHD_D72, "+f"(d[36]), "+f"(d[37]), "+f"(d[38]), "+f"(d[39])
#define NBHD_D88 NBHD_D80, "+f"(d[40]), "+f"(d[41]), "+f"(d[42]), "+f"(d[43])
#define NBHD_D96 NBHD_D88, "+f"(d[44]), "+f"(d[45]), "+f"(d[46]), "+f"(d[47])
#define NBHD_D104 NBHD_D96, "+f"(d[48]), "+f"(d[49]), "+f"(d[50]), "+f"(d[51])
#define NBHD_D112 NBHD_D104, "+f"(d[52]), "+f"(d[53]), "+f"(d[54]), "+f"(d[55])
#define NBHD_D120 NBHD_D112, "+f"(d[56]), "+f"(d[57]), "+f"(d[58]), "+f"(d[59])
#define NBHD_D128 NBHD_D120, "+f"(d[60]), "+f"(d[61]), "+f"(d[62]), "+f"(d[63])
#define NBHD_D136 NBHD_D128, "+f"(d[64]), "+f"(d[65]), "+f"(d[66]), "+f"(d[67])
#define NBHD_D144 NBHD_D136, "+f"(d[68]), "+f"(d[69]), "+f"(d[70]), "+f"(d[71])
#define NBHD_D152 NBHD_D144, "+f"(d[72]), "+f"(d[73]), "+f"(d[74]), "+f"(d[75])
#define NBHD_D160 NBHD_D152, "+f"(d[76]), "+f"(d[77]), "+f"(d[78]), "+f"(d[79])
#define NBHD_D168 NBHD_D160, "+f"(d[80]), "+f"(d[81]), "+f"(d[82]), "+f"(d[83])
#define NBHD_D176 NBHD_D168, "+f"(d[84]), "+f"(d[85]), "+f"(d[86]), "+f"(d[87])
#define NBHD_D184 NBHD_D176, "+f"(d[88]), "+f"(d[89]), "+f"(d[90]), "+f"(d[91])
#define NBHD_D192 NBHD_D184, "+f"(d[92]), "+f"(d[93]), "+f"(d[94]), "+f"(d[95])
#define NBHD_D200 NBHD_D192, "+f"(d[96]), "+f"(d[97]), "+f"(d[98]), "+f"(d[99])
#define NBHD_D208 NBHD_D200, "+f"(d[100]), "+f"(d[101]), "+f"(d[102]), "+f"(d[103])
#define NBHD_D216 NBHD_D208, "+f"(d[104]), "+f"(d[105]), "+f"(d[106]), "+f"(d[107])
#define NBHD_D224 NBHD_D216, "+f"(d[108]), "+f"(d[109]), "+f"(d[110]), "+f"(d[111])
#define NBHD_D232 NBHD_D224, "+f"(d[112]), "+f"(d[113]), "+f"(d[114]), "+f"(d[115])
#define NBHD_D240 NBHD_D232, "+f"(d[116]), "+f"(d[117]), "+f"(d[118]), "+f"(d[119])
#define NBHD_D248 NBHD_D240, "+f"(d[120]), "+f"(d[121]), "+f"(d[122]), "+f"(d[123])
#define NBHD_D256 NBHD_D248, "+f"(d[124]), "+f"(d[125]), "+f"(d[126]), "+f"(d[127])

/* The same as outputs only, for a first k-step: the old sum is dead, and its registers are free until then. */
#define NBHD_E8 "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
#define NBHD_E16 NBHD_E8, "=f"(d[4]), "=f"(d[5]), "=f"(d[6]), "=f"(d[7])
#define NBHD_E24 NBHD_E16, "=f"(d[8]), "=f"(d[9]), "=f"(d[10]), "=f"(d[11])
#define NBHD_E32 NBHD_E24, "=f"(d[12]), "=f"(d[13]), "=f"(d[14]), "=f"(d[15])
#define NBHD_E40 NBHD_E32, "=f"(d[16]), "=f"(d[17]), "=f"(d[18]), "=f"(d[19])
#define NBHD_E48 NBHD_E40, "=f"(d[20]), "=f"(d[21]), "=f"(d[22]), "=f"(d[23])
#define NBHD_E56 NBHD_E48, "=f"(d[24]), "=f"(d[25]), "=f"(d[26]), "=f"(d[27])
#define NBHD_E64 NBHD_E56, "=f"(d[28]), "=f"(d[29]), "=f"(d[30]), "=f"(d[31])
#define NBHD_E72 NBHD_E64, "=f"(d[32]), "=f"(d[33]), "=f"(d[34]), "=f"(d[35])
#define NBHD_E80 NBHD_E72, "=f"(d[36]), "=f"(d[37]), "=f"(d[38]), "=f"(d[39])
#define NBHD_E88 NBHD_E80, "=f"(d[40]), "=f"(d[41]), "=f"(d[42]), "=f"(d[43])
#define NBHD_E96 NBHD_E88, "=f"(d[44]), "=f"(d[45]), "=f"(d[46]), "=f"(d[47])
#define NBHD_E104 NBHD_E96, "=f"(d[48]), "=f"(d[49]), "=f"(d[50]), "=f"(d[51])
#define NBHD_E112 NBHD_E104, "=f"(d[52]), "=f"(d[53]), "=f"(d[54]), "=f"(d[55])
#define NBHD_E120 NBHD_E112, "=f"(d[56]), "=f"(d[57]), "=f"(d[58]), "=f"(d[59])
#define NBHD_E128 NBHD_E120, "=f"(d[60]), "=f"(d[61]), "=f"(d[62]), "=f"(d[63])
#define NBHD_E136 NBHD_E128, "=f"(d[64]), "=f"(d[65]), "=f"(d[66]), "=f"(d[67])
#define NBHD_E144 NBHD_E136, "=f"(d[68]), "=f"(d[69]), "=f"(d[70]), "=f"(d[71])
#define NBHD_E152 NBHD_E144, "=f"(d[72]), "=f"(d[73]), "=f"(d[74]), "=f"(d[75])
#define NBHD_E160 NBHD_E152, "=f"(d[76]), "=f"(d[77]), "=f"(d[78]), "=f"(d[79])

/* ab: the text of A and B, keep: of the flag; ta, tb: "1" where A, B is mn-major. */
#define NBHD_WGMMA_SS(name, n, list, ab, flag, ta, tb, ...)                                                           \
    NBHD_FN void name(float *d, unsigned long long a, unsigned long long b, int keep)                                 \
    {                                                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " flag ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." NBHD_MMA_TYPE "." NBHD_MMA_TYPE " {" list "}, "  \
                     ab ", p, 1, 1, " ta ", " tb "; }"                                                                \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b), "r"(keep));                                                                    \
    }

#define NBHD_WGMMA_RS(name, n, list, ab, flag, tb, ...)                                                               \
    NBHD_FN void name(float *d, const unsigned *a, unsigned long long b, int keep)                                    \
    {                                                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " flag ", 0;\n"                                                  \
                     "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." NBHD_MMA_TYPE "." NBHD_MMA_TYPE " {" list "}, "  \
                     ab ", p, 1, 1, " tb "; }"                                                                        \
                     : __VA_ARGS__                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(keep));                                \
    }

#define NBHD_WGMMA_RS_IF(name, n, list, ab, flag, ...)                                                                \
    NBHD_FN void name(float *d, const unsigned *a, unsigned long long b, int masked)                                  \
    {                                                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, " flag ", 0;\n"                                                  \
                     "@p wgmma.fence.sync.aligned;\n"                                                                 \
                     "@p wgmma.mma_async.sync.aligned.m64n" n "k16.f32." NBHD_MMA_TYPE "." NBHD_MMA_TYPE " {" list     \
                     "}, " ab ", 1, 1, 1, 0; }"                                                                       \
                     : __VA_ARGS__                                                                                    \
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(masked));                              \
    }

#define NBHD_WGMMA_SS_FIRST(name, n, list, ab, ta, tb, ...)                                                           \
    NBHD_FN void name(float *d, unsigned long long a, unsigned long long b)                                           \
    {                                                                                                                 \
        asm volatile("{ .reg .pred p; setp.ne.b32 p, 0, 0;\n"                                                         \
                     "wgmma.mma_async.sync.aligned.m64n" n "k16.f32." NBHD_MMA_TYPE "." NBHD_MMA_TYPE " {" list "}, "  \
                     ab ", p, 1, 1, " ta ", " tb "; }"                                                                \
                     : __VA_ARGS__                                                                                    \
                     : "l"(a), "l"(b));                                                                               \
    }

/* A and B in shared memory, both k-major: Q K^T. */
NBHD_WGMMA_SS(wgmma_ss_n16, "16", NBHD_R16, "%8, %9", "%10", "0", "0", NBHD_D16)
NBHD_WGMMA_SS(wgmma_ss_n32, "32", NBHD_R32, "%16, %17", "%18", "0", "0", NBHD_D32)
NBHD_WGMMA_SS(wgmma_ss_n48, "48", NBHD_R48, "%24, %25", "%26", "0", "0", NBHD_D48)
NBHD_WGMMA_SS(wgmma_ss_n64, "64", NBHD_R64, "%32, %33", "%34", "0", "0", NBHD_D64)
NBHD_WGMMA_SS(wgmma_ss_n80, "80", NBHD_R80, "%40, %41", "%42", "0", "0", NBHD_D80)
NBHD_WGMMA_SS(wgmma_ss_n96, "96", NBHD_R96, "%48, %49", "%50", "0", "0", NBHD_D96)
NBHD_WGMMA_SS(wgmma_ss_n112, "112", NBHD_R112, "%56, %57", "%58", "0", "0", NBHD_D112)
NBHD_WGMMA_SS(wgmma_ss_n128, "128", NBHD_R128, "%64, %65", "%66", "0", "0", NBHD_D128)
NBHD_WGMMA_SS(wgmma_ss_n144, "144", NBHD_R144, "%72, %73", "%74", "0", "0", NBHD_D144)
NBHD_WGMMA_SS(wgmma_ss_n160, "160", NBHD_R160, "%80, %81", "%82", "0", "0", NBHD_D160)
NBHD_WGMMA_SS(wgmma_ss_n176, "176", NBHD_R176, "%88, %89", "%90", "0", "0", NBHD_D176)
NBHD_WGMMA_SS(wgmma_ss_n192, "192", NBHD_R192, "%96, %97", "%98", "0", "0", NBHD_D192)
NBHD_WGMMA_SS(wgmma_ss_n208, "208", NBHD_R208, "%104, %105", "%106", "0", "0", NBHD_D208)
NBHD_WGMMA_SS(wgmma_ss_n224, "224", NBHD_R224, "%112, %113", "%114", "0", "0", NBHD_D224)
NBHD_WGMMA_SS(wgmma_ss_n240, "240", NBHD_R240, "%120, %121", "%122", "0", "0", NBHD_D240)
NBHD_WGMMA_SS(wgmma_ss_n256, "256", NBHD_R256, "%128, %129", "%130", "0", "0", NBHD_D256)

/* A in registers, B k-major: Q K^T with Q kept in registers. */
NBHD_WGMMA_RS(wgmma_rs_n16, "16", NBHD_R16, "{%8, %9, %10, %11}, %12", "%13", "0", NBHD_D16)
NBHD_WGMMA_RS(wgmma_rs_n32, "32", NBHD_R32, "{%16, %17, %18, %19}, %20", "%21", "0", NBHD_D32)
NBHD_WGMMA_RS(wgmma_rs_n48, "48", NBHD_R48, "{%24, %25, %26, %27}, %28", "%29", "0", NBHD_D48)
NBHD_WGMMA_RS(wgmma_rs_n64, "64", NBHD_R64, "{%32, %33, %34, %35}, %36", "%37", "0", NBHD_D64)
NBHD_WGMMA_RS(wgmma_rs_n80, "80", NBHD_R80, "{%40, %41, %42, %43}, %44", "%45", "0", NBHD_D80)
NBHD_WGMMA_RS(wgmma_rs_n96, "96", NBHD_R96, "{%48, %49, %50, %51}, %52", "%53", "0", NBHD_D96)
NBHD_WGMMA_RS(wgmma_rs_n112, "112", NBHD_R112, "{%56, %57, %58, %59}, %60", "%61", "0", NBHD_D112)
NBHD_WGMMA_RS(wgmma_rs_n128, "128", NBHD_R128, "{%64, %65, %66, %67}, %68", "%69", "0", NBHD_D128)
NBHD_WGMMA_RS(wgmma_rs_n144, "144", NBHD_R144, "{%72, %73, %74, %75}, %76", "%77", "0", NBHD_D144)
NBHD_WGMMA_RS(wgmma_rs_n160, "160", NBHD_R160, "{%80, %81, %82, %83}, %84", "%85", "0", NBHD_D160)
NBHD_WGMMA_RS(wgmma_rs_n176, "176", NBHD_R176, "{%88, %89, %90, %91}, %92", "%93", "0", NBHD_D176)
NBHD_WGMMA_RS(wgmma_rs_n192, "192", NBHD_R192, "{%96, %97, %98, %99}, %100", "%101", "0", NBHD_D192)
NBHD_WGMMA_RS(wgmma_rs_n208, "208", NBHD_R208, "{%104, %105, %106, %107}, %108", "%109", "0", NBHD_D208)
NBHD_WGMMA_RS(wgmma_rs_n224, "224", NBHD_R224, "{%112, %113, %114, %115}, %116", "%117", "0", NBHD_D224)
NBHD_WGMMA_RS(wgmma_rs_n240, "240", NBHD_R240, "{%120, %121, %122, %123}, %124", "%125", "0", NBHD_D240)
NBHD_WGMMA_RS(wgmma_rs_n256, "256", NBHD_R256, "{%128, %129, %130, %131}, %132", "%133", "0", NBHD_D256)

/* The same, if `masked`: else nothing. A branch of ours around it would have ptxas serialize what is in flight. */
NBHD_WGMMA_RS_IF(wgmma_rs_if_n64, "64", NBHD_R64, "{%32, %33, %34, %35}, %36", "%37", NBHD_D64)
NBHD_WGMMA_RS_IF(wgmma_rs_if_n80, "80", NBHD_R80, "{%40, %41, %42, %43}, %44", "%45", NBHD_D80)
NBHD_WGMMA_RS_IF(wgmma_rs_if_n96, "96", NBHD_R96, "{%48, %49, %50, %51}, %52", "%53", NBHD_D96)
NBHD_WGMMA_RS_IF(wgmma_rs_if_n112, "112", NBHD_R112, "{%56, %57, %58, %59}, %60", "%61", NBHD_D112)
NBHD_WGMMA_RS_IF(wgmma_rs_if_n128, "128", NBHD_R128, "{%64, %65, %66, %67}, %68", "%69", NBHD_D128)

/* A in registers, B mn-major: P V. */
NBHD_WGMMA_RS(wgmma_rs_bt_n8, "8", NBHD_R8, "{%4, %5, %6, %7}, %8", "%9", "1", NBHD_D8)
NBHD_WGMMA_RS(wgmma_rs_bt_n16, "16", NBHD_R16, "{%8, %9, %10, %11}, %12", "%13", "1", NBHD_D16)
NBHD_WGMMA_RS(wgmma_rs_bt_n24, "24", NBHD_R24, "{%12, %13, %14, %15}, %16", "%17", "1", NBHD_D24)
NBHD_WGMMA_RS(wgmma_rs_bt_n32, "32", NBHD_R32, "{%16, %17, %18, %19}, %20", "%21", "1", NBHD_D32)
NBHD_WGMMA_RS(wgmma_rs_bt_n40, "40", NBHD_R40, "{%20, %21, %22, %23}, %24", "%25", "1", NBHD_D40)
NBHD_WGMMA_RS(wgmma_rs_bt_n48, "48", NBHD_R48, "{%24, %25, %26, %27}, %28", "%29", "1", NBHD_D48)
NBHD_WGMMA_RS(wgmma_rs_bt_n56, "56", NBHD_R56, "{%28, %29, %30, %31}, %32", "%33", "1", NBHD_D56)
NBHD_WGMMA_RS(wgmma_rs_bt_n64, "64", NBHD_R64, "{%32, %33, %34, %35}, %36", "%37", "1", NBHD_D64)
NBHD_WGMMA_RS(wgmma_rs_bt_n72, "72", NBHD_R72, "{%36, %37, %38, %39}, %40", "%41", "1", NBHD_D72)
NBHD_WGMMA_RS(wgmma_rs_bt_n80, "80", NBHD_R80, "{%40, %41, %42, %43}, %44", "%45", "1", NBHD_D80)
NBHD_WGMMA_RS(wgmma_rs_bt_n88, "88", NBHD_R88, "{%44, %45, %46, %47}, %48", "%49", "1", NBHD_D88)
NBHD_WGMMA_RS(wgmma_rs_bt_n96, "96", NBHD_R96, "{%48, %49, %50, %51}, %52", "%53", "1", NBHD_D96)
NBHD_WGMMA_RS(wgmma_rs_bt_n104, "104", NBHD_R104, "{%52, %53, %54, %55}, %56", "%57", "1", NBHD_D104)
NBHD_WGMMA_RS(wgmma_rs_bt_n112, "112", NBHD_R112, "{%56, %57, %58, %59}, %60", "%61", "1", NBHD_D112)
NBHD_WGMMA_RS(wgmma_rs_bt_n120, "120", NBHD_R120, "{%60, %61, %62, %63}, %64", "%65", "1", NBHD_D120)
NBHD_WGMMA_RS(wgmma_rs_bt_n128, "128", NBHD_R128, "{%64, %65, %66, %67}, %68", "%69", "1", NBHD_D128)
NBHD_WGMMA_RS(wgmma_rs_bt_n136, "136", NBHD_R136, "{%68, %69, %70, %71}, %72", "%73", "1", NBHD_D136)
NBHD_WGMMA_RS(wgmma_rs_bt_n144, "144", NBHD_R144, "{%72, %73, %74, %75}, %76", "%77", "1", NBHD_D144)
NBHD_WGMMA_RS(wgmma_rs_bt_n152, "152", NBHD_R152, "{%76, %77, %78, %79}, %80", "%81", "1", NBHD_D152)
NBHD_WGMMA_RS(wgmma_rs_bt_n160, "160", NBHD_R160, "{%80, %81, %82, %83}, %84", "%85", "1", NBHD_D160)
NBHD_WGMMA_RS(wgmma_rs_bt_n168, "168", NBHD_R168, "{%84, %85, %86, %87}, %88", "%89", "1", NBHD_D168)
NBHD_WGMMA_RS(wgmma_rs_bt_n176, "176", NBHD_R176, "{%88, %89, %90, %91}, %92", "%93", "1", NBHD_D176)
NBHD_WGMMA_RS(wgmma_rs_bt_n184, "184", NBHD_R184, "{%92, %93, %94, %95}, %96", "%97", "1", NBHD_D184)
NBHD_WGMMA_RS(wgmma_rs_bt_n192, "192", NBHD_R192, "{%96, %97, %98, %99}, %100", "%101", "1", NBHD_D192)
NBHD_WGMMA_RS(wgmma_rs_bt_n200, "200", NBHD_R200, "{%100, %101, %102, %103}, %104", "%105", "1", NBHD_D200)
NBHD_WGMMA_RS(wgmma_rs_bt_n208, "208", NBHD_R208, "{%104, %105, %106, %107}, %108", "%109", "1", NBHD_D208)
NBHD_WGMMA_RS(wgmma_rs_bt_n216, "216", NBHD_R216, "{%108, %109, %110, %111}, %112", "%113", "1", NBHD_D216)
NBHD_WGMMA_RS(wgmma_rs_bt_n224, "224", NBHD_R224, "{%112, %113, %114, %115}, %116", "%117", "1", NBHD_D224)
NBHD_WGMMA_RS(wgmma_rs_bt_n232, "232", NBHD_R232, "{%116, %117, %118, %119}, %120", "%121", "1", NBHD_D232)
NBHD_WGMMA_RS(wgmma_rs_bt_n240, "240", NBHD_R240, "{%120, %121, %122, %123}, %124", "%125", "1", NBHD_D240)
NBHD_WGMMA_RS(wgmma_rs_bt_n248, "248", NBHD_R248, "{%124, %125, %126, %127}, %128", "%129", "1", NBHD_D248)
NBHD_WGMMA_RS(wgmma_rs_bt_n256, "256", NBHD_R256, "{%128, %129, %130, %131}, %132", "%133", "1", NBHD_D256)

/* Both k-major, the first k-step of a sum. */
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n16, "16", NBHD_R16, "%8, %9", "0", "0", NBHD_E16)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n32, "32", NBHD_R32, "%16, %17", "0", "0", NBHD_E32)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n48, "48", NBHD_R48, "%24, %25", "0", "0", NBHD_E48)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n64, "64", NBHD_R64, "%32, %33", "0", "0", NBHD_E64)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n80, "80", NBHD_R80, "%40, %41", "0", "0", NBHD_E80)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n96, "96", NBHD_R96, "%48, %49", "0", "0", NBHD_E96)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n112, "112", NBHD_R112, "%56, %57", "0", "0", NBHD_E112)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n128, "128", NBHD_R128, "%64, %65", "0", "0", NBHD_E128)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n144, "144", NBHD_R144, "%72, %73", "0", "0", NBHD_E144)
NBHD_WGMMA_SS_FIRST(wgmma_ss_first_n160, "160", NBHD_R160, "%80, %81", "0", "0", NBHD_E160)

/* A mn-major, B k-major: K^T by dS as [query][key]. */
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n24, "24", NBHD_R24, "%12, %13", "1", "0", NBHD_E24)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n32, "32", NBHD_R32, "%16, %17", "1", "0", NBHD_E32)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n40, "40", NBHD_R40, "%20, %21", "1", "0", NBHD_E40)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n48, "48", NBHD_R48, "%24, %25", "1", "0", NBHD_E48)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n56, "56", NBHD_R56, "%28, %29", "1", "0", NBHD_E56)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n64, "64", NBHD_R64, "%32, %33", "1", "0", NBHD_E64)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n72, "72", NBHD_R72, "%36, %37", "1", "0", NBHD_E72)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n80, "80", NBHD_R80, "%40, %41", "1", "0", NBHD_E80)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n88, "88", NBHD_R88, "%44, %45", "1", "0", NBHD_E88)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n96, "96", NBHD_R96, "%48, %49", "1", "0", NBHD_E96)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n104, "104", NBHD_R104, "%52, %53", "1", "0", NBHD_E104)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n112, "112", NBHD_R112, "%56, %57", "1", "0", NBHD_E112)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n120, "120", NBHD_R120, "%60, %61", "1", "0", NBHD_E120)
NBHD_WGMMA_SS_FIRST(wgmma_ss_at_first_n128, "128", NBHD_R128, "%64, %65", "1", "0", NBHD_E128)
NBHD_WGMMA_SS(wgmma_ss_at_n24, "24", NBHD_R24, "%12, %13", "%14", "1", "0", NBHD_D24)
NBHD_WGMMA_SS(wgmma_ss_at_n32, "32", NBHD_R32, "%16, %17", "%18", "1", "0", NBHD_D32)
NBHD_WGMMA_SS(wgmma_ss_at_n40, "40", NBHD_R40, "%20, %21", "%22", "1", "0", NBHD_D40)
NBHD_WGMMA_SS(wgmma_ss_at_n48, "48", NBHD_R48, "%24, %25", "%26", "1", "0", NBHD_D48)
NBHD_WGMMA_SS(wgmma_ss_at_n56, "56", NBHD_R56, "%28, %29", "%30", "1", "0", NBHD_D56)
NBHD_WGMMA_SS(wgmma_ss_at_n64, "64", NBHD_R64, "%32, %33", "%34", "1", "0", NBHD_D64)
NBHD_WGMMA_SS(wgmma_ss_at_n72, "72", NBHD_R72, "%36, %37", "%38", "1", "0", NBHD_D72)
NBHD_WGMMA_SS(wgmma_ss_at_n80, "80", NBHD_R80, "%40, %41", "%42", "1", "0", NBHD_D80)
NBHD_WGMMA_SS(wgmma_ss_at_n88, "88", NBHD_R88, "%44, %45", "%46", "1", "0", NBHD_D88)
NBHD_WGMMA_SS(wgmma_ss_at_n96, "96", NBHD_R96, "%48, %49", "%50", "1", "0", NBHD_D96)
NBHD_WGMMA_SS(wgmma_ss_at_n104, "104", NBHD_R104, "%52, %53", "%54", "1", "0", NBHD_D104)
NBHD_WGMMA_SS(wgmma_ss_at_n112, "112", NBHD_R112, "%56, %57", "%58", "1", "0", NBHD_D112)
NBHD_WGMMA_SS(wgmma_ss_at_n120, "120", NBHD_R120, "%60, %61", "%62", "1", "0", NBHD_D120)
NBHD_WGMMA_SS(wgmma_ss_at_n128, "128", NBHD_R128, "%64, %65", "%66", "1", "0", NBHD_D128)

/* A and B mn-major: dS^T as [key][query] by K. */
NBHD_WGMMA_SS(wgmma_ss_at_bt_n8, "8", NBHD_R8, "%4, %5", "%6", "1", "1", NBHD_D8)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n16, "16", NBHD_R16, "%8, %9", "%10", "1", "1", NBHD_D16)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n24, "24", NBHD_R24, "%12, %13", "%14", "1", "1", NBHD_D24)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n32, "32", NBHD_R32, "%16, %17", "%18", "1", "1", NBHD_D32)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n40, "40", NBHD_R40, "%20, %21", "%22", "1", "1", NBHD_D40)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n48, "48", NBHD_R48, "%24, %25", "%26", "1", "1", NBHD_D48)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n56, "56", NBHD_R56, "%28, %29", "%30", "1", "1", NBHD_D56)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n64, "64", NBHD_R64, "%32, %33", "%34", "1", "1", NBHD_D64)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n72, "72", NBHD_R72, "%36, %37", "%38", "1", "1", NBHD_D72)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n80, "80", NBHD_R80, "%40, %41", "%42", "1", "1", NBHD_D80)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n88, "88", NBHD_R88, "%44, %45", "%46", "1", "1", NBHD_D88)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n96, "96", NBHD_R96, "%48, %49", "%50", "1", "1", NBHD_D96)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n104, "104", NBHD_R104, "%52, %53", "%54", "1", "1", NBHD_D104)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n112, "112", NBHD_R112, "%56, %57", "%58", "1", "1", NBHD_D112)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n120, "120", NBHD_R120, "%60, %61", "%62", "1", "1", NBHD_D120)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n128, "128", NBHD_R128, "%64, %65", "%66", "1", "1", NBHD_D128)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n136, "136", NBHD_R136, "%68, %69", "%70", "1", "1", NBHD_D136)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n144, "144", NBHD_R144, "%72, %73", "%74", "1", "1", NBHD_D144)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n152, "152", NBHD_R152, "%76, %77", "%78", "1", "1", NBHD_D152)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n160, "160", NBHD_R160, "%80, %81", "%82", "1", "1", NBHD_D160)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n168, "168", NBHD_R168, "%84, %85", "%86", "1", "1", NBHD_D168)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n176, "176", NBHD_R176, "%88, %89", "%90", "1", "1", NBHD_D176)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n184, "184", NBHD_R184, "%92, %93", "%94", "1", "1", NBHD_D184)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n192, "192", NBHD_R192, "%96, %97", "%98", "1", "1", NBHD_D192)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n200, "200", NBHD_R200, "%100, %101", "%102", "1", "1", NBHD_D200)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n208, "208", NBHD_R208, "%104, %105", "%106", "1", "1", NBHD_D208)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n216, "216", NBHD_R216, "%108, %109", "%110", "1", "1", NBHD_D216)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n224, "224", NBHD_R224, "%112, %113", "%114", "1", "1", NBHD_D224)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n232, "232", NBHD_R232, "%116, %117", "%118", "1", "1", NBHD_D232)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n240, "240", NBHD_R240, "%120, %121", "%122", "1", "1", NBHD_D240)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n248, "248", NBHD_R248, "%124, %125", "%126", "1", "1", NBHD_D248)
NBHD_WGMMA_SS(wgmma_ss_at_bt_n256, "256", NBHD_R256, "%128, %129", "%130", "1", "1", NBHD_D256)

#endif
