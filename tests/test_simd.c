/* The SIMD vocabularies, each compiled for its instruction set (simd_<isa>.c; the scalar one here) and checked by
 * simd.inc.h; and the yardstick built on them. */
#define _DEFAULT_SOURCE /* MAP_ANONYMOUS */
#include <sys/mman.h>
#include <unistd.h>
#include "cpu/isa.h"
#include "cpu/peak.h"
#include "cpu/simd_scalar.h"
#include "simd.inc.h"
#include "test.h"

static const char *set;

static void check_one(bool ok, const char *operation, int lane, double in, double out)
{
    CHECK(ok, "%s %s, lane %d: %.9g gives %.9g", set, operation, lane, in, out);
}

static void check_rate(unsigned isa)
{
    const double rate = nbhd_cpu_peak_gflops(isa, 1);
    CHECK(nbhd_isa_available() & isa ? rate > 0.1 && rate < 1e5 : rate == 0, "%s: %g GFLOP/s", nbhd_isa_name(isa),
          rate);
}

static void check_set(unsigned isa, void (*body)(const struct simd_test *), const struct simd_test *test)
{
    set = nbhd_isa_name(isa);
    if (!(nbhd_isa_available() & isa)) {
        test_skip(set);
        return;
    }
    body(test);
    check_rate(isa);
}

int main(void)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE);
    char *memory = mmap(NULL, 2 * page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory + page, page, PROT_NONE)) {
        perror("mmap");
        return 1;
    }
    struct simd_test test = {check_one, memory + page, false};
    check_set(NBHD_ISA_SCALAR, check_vocabulary, &test);
    test.fused = true;
#if defined(__x86_64__)
    check_set(NBHD_ISA_AVX2, test_simd_avx2, &test);
    check_set(NBHD_ISA_AVX512, test_simd_avx512, &test);
    check_set(NBHD_ISA_AVX512BF16, test_simd_avx512bf16, &test);
    check_rate(NBHD_ISA_AMX);
    const double dots = nbhd_cpu_dots_speed();
    CHECK(nbhd_isa_available() & NBHD_ISA_AVX512BF16 ? dots > 0.1 && dots < 10 : dots == 0, "dot products: %g times",
          dots);
#elif defined(__aarch64__)
    check_set(NBHD_ISA_NEON, test_simd_neon, &test);
#endif
    CHECK(nbhd_cpu_peak_gflops(0, 1) == 0, "a rate without an instruction set");
    munmap(memory, 2 * page);
    return test_done();
}
