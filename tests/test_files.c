/* Tensors in files: .npy and .safetensors, good ones and hostile ones. Every hostile file must give its sentence. With
 * a directory as argument it also writes every file there: seeds for the fuzzers (scripts/fuzz). */
#include <sys/mman.h>
#include <unistd.h>

#include "array.h"
#include "files.h"

/* ---- .npy ---- */

struct bytes {
    unsigned char at[1024];
    size_t size;
};

/* A file with this header text, padded as numpy does, and so many zero bytes of data. */
static struct bytes npy(int version, const char *header, size_t data)
{
    struct bytes b = {{0}, 0};
    size_t start = version == 1 ? 10 : 12, length = strlen(header) + 1;
    length += (64 - (start + length) % 64) % 64;
    memcpy(b.at, "\x93NUMPY", 6);
    b.at[6] = (unsigned char)version;
    b.at[8] = (unsigned char)(length & 255);
    b.at[9] = (unsigned char)(length >> 8);
    memset(b.at + start, ' ', length);
    memcpy(b.at + start, header, strlen(header));
    b.at[start + length - 1] = '\n';
    b.size = start + length + data;
    return b;
}

/* A copy that ends where no memory is: a read past its end crashes. */
static unsigned char *exact_copy(const void *bytes, size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    char *map = mmap(NULL, whole + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (!CHECK(map != MAP_FAILED && !mprotect(map + whole, page, PROT_NONE), "%s", strerror(errno)))
        exit(1);
    return memcpy(map + whole - size, bytes, size);
}

static void exact_free(unsigned char *copy, size_t size)
{
    const size_t page = (size_t)sysconf(_SC_PAGESIZE), whole = (size + page - 1) / page * page;
    munmap(copy + size - whole, whole + page);
}

static void expect_npy(struct bytes b, const char *sentence)
{
    struct array_info info;
    char why[NBHD_TEXT] = "";
    unsigned char *exact = exact_copy(b.at, b.size);
    bool good = npy_parse(exact, b.size, &info, why);
    CHECK(good == !sentence && (good || strstr(why, sentence)), "said '%s', expected '%s'", why,
          sentence ? sentence : "success");
    if (good)
        CHECK(info.offset + info.bytes <= b.size, "%zu + %zu of %zu bytes", info.offset, info.bytes, b.size);
    seed("npy", b.at, b.size);
    exact_free(exact, b.size);
}

static void test_npy(void)
{
    static const char good[] = "{'descr': '<f4', 'fortran_order': False, 'shape': (1, 2, 3, 4), }";
    expect_npy(npy(1, good, 96), NULL);
    expect_npy(npy(2, good, 96), NULL);
    expect_npy(npy(3, good, 100), NULL);
    expect_npy(npy(1, "{\"shape\":(2,2,2,3),\"fortran_order\":False,\"descr\":\"<f2\"}", 48), NULL);
    expect_npy(npy(1, "{'descr': '<f8', 'fortran_order': False, 'shape': (3L,)}", 24), NULL);
    expect_npy(npy(1, "{'descr': '<f8', 'fortran_order': False, 'shape': ()}", 8), NULL);
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (0, 5)}", 0), NULL);
    expect_npy(npy(1, good, 95), "needs 96 bytes of data and the file holds 95");
    expect_npy(npy(4, good, 96), "format version is 4.0");
    expect_npy(npy(0, good, 96), "format version is 0.0");
    expect_npy(npy(1, "{'descr': '>f4', 'fortran_order': False, 'shape': (4,)}", 16), NULL);
    expect_npy(npy(1, "{'descr': '|f4', 'fortran_order': False, 'shape': (4,)}", 16), "dtype is '|f4'");
    expect_npy(npy(1, "{'descr': '<i8', 'fortran_order': False, 'shape': (4,)}", 32), "dtype is '<i8'");
    expect_npy(npy(1, "{'descr': [('a', '<f4')], 'fortran_order': False, 'shape': (4,)}", 16), "entry 'descr'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': True, 'shape': (4, 4)}", 64), NULL);
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (-4,)}", 16), "entry 'shape'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (4000000000, 4000000000, 4)}", 16),
               "more bytes than can be addressed");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (99999999999999999999,)}", 16),
               "entry 'shape'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (1,1,1,1,1,1,1,1,1)}", 16), "entry 'shape'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False}", 16), "lacks descr, fortran_order or shape");
    expect_npy(npy(1, "{'descr': '<f4', 'descr': '<f8', 'fortran_order': False, 'shape': (1,)}", 16), "entry 'descr'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': True, 'fortran_order': False, 'shape': (4,)}", 16),
               "entry 'fortran_order'");
    expect_npy(npy(1, "{'descr': '<f4', 'shape': (1,), 'fortran_order': False, 'shape': (4,)}", 16), "entry 'shape'");
    expect_npy(npy(1, "{'descr': '<f4', 'fortran_order': False, 'shape': (4,", 16), "entry 'shape'");
    expect_npy(npy(1, "{'descr': '<f4", 16), "entry 'descr'");
    expect_npy(npy(1, "hello", 16), "not a dict");
    struct bytes b = npy(1, good, 96);
    for (size_t size = 0; size < b.size; size++) { /* cut off anywhere */
        struct array_info info;
        char why[NBHD_TEXT];
        unsigned char *exact = exact_copy(b.at, size);
        CHECK(!npy_parse(exact, size, &info, why), "cut to %zu of %zu bytes it was still good", size, b.size);
        exact_free(exact, size);
    }
    b.at[8] = b.at[9] = 255;
    expect_npy(b, "header claims 65535 bytes");
}

/* ---- .safetensors ---- */

static struct bytes safetensors(const char *header, size_t data)
{
    struct bytes b = {{0}, 0};
    size_t length = strlen(header);
    for (int i = 0; i < 8; i++)
        b.at[i] = (unsigned char)(length >> 8 * i & 255);
    memcpy(b.at + 8, header, length);
    b.size = 8 + length + data;
    return b;
}

static void expect_safetensors(struct bytes b, const char *name, const char *sentence)
{
    struct array_info info;
    char why[NBHD_TEXT] = "";
    unsigned char *exact = exact_copy(b.at, b.size);
    bool good = safetensors_find(exact, b.size, name, &info, why);
    CHECK(good == !sentence && (good || strstr(why, sentence)), "said '%s', expected '%s'", why,
          sentence ? sentence : "success");
    if (good)
        CHECK(info.offset + info.bytes <= b.size, "%zu + %zu of %zu bytes", info.offset, info.bytes, b.size);
    seed("safetensors", b.at, b.size);
    exact_free(exact, b.size);
}

#define Q "{\"q\":{\"dtype\":\"F32\",\"shape\":[1,2,2],\"data_offsets\":[0,16]}"

static void test_safetensors_tensors(void)
{
    expect_safetensors(safetensors(Q "}", 16), "q", NULL);
    expect_safetensors(safetensors(Q "}", 16), "", NULL);
    expect_safetensors(safetensors(Q " , \"__metadata__\" : {\"a\":\"{[\\\"\"}}   ", 16), "", NULL);
    expect_safetensors(
        safetensors("{\"\\u0071\\n\\ud83d\\ude00\":{\"shape\":[],\"dtype\":\"BF16\",\"data_offsets\":[1,3]}}", 3),
        "q\n\xf0\x9f\x98\x80", NULL);
    expect_safetensors(safetensors("{\"e\":{\"dtype\":\"F64\",\"shape\":[0,7],\"data_offsets\":[0,0]}}", 0), "e", NULL);
    expect_safetensors(safetensors(Q "}", 15), "q", "[0, 16] are not within the file's 15 bytes");
    expect_safetensors(safetensors(Q "}", 16), "k", "holds no tensor 'k' (it holds q)");
    expect_safetensors(safetensors("{}", 0), "k", "holds no tensor");
    expect_safetensors(safetensors(Q ",\"k\":{}}", 16), "", "holds 2 tensors");
    expect_safetensors(safetensors(Q ",\"q\":{\"dtype\":\"F32\",\"shape\":[1,2,2],\"data_offsets\":[0,16]}}", 16), "q",
                       "2 times");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"I64\",\"shape\":[2],\"data_offsets\":[0,16]}}", 16), "q",
                       "dtype is I64");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[3],\"data_offsets\":[0,16]}}", 16), "q",
                       "needs 12 bytes");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[16,0]}}", 16), "q",
                       "[16, 0]");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[4],\"data_offsets\":[-16,0]}}", 16), "q",
                       "not two numbers");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[4.5],\"data_offsets\":[0,16]}}", 16), "q",
                       "shape is not a list");
    expect_safetensors(
        safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[4000000000,4000000000,4],\"data_offsets\":[0,16]}}", 16), "q",
        "more bytes than can be addressed");
    expect_safetensors(
        safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[1,1,1,1,1,1,1,1,4],\"data_offsets\":[0,16]}}", 16), "q",
        "at most 8");
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\"}}", 16), "q", "lacks dtype, shape or data_offsets");
    expect_safetensors(safetensors("{\"q\":[]}", 16), "q", "not a JSON object");
}

static void test_safetensors_json(void)
{
    expect_safetensors(safetensors("{\"q\":{\"dtype\":\"F32\",\"x\":[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[[", 16), "q",
                       "deeper");
    expect_safetensors(safetensors("{\"q", 16), "q", "breaks off within a string");
    expect_safetensors(safetensors("{\"\\x\":1}", 16), "q", "unknown escape");
    expect_safetensors(safetensors("{\"\\ud800\":1}", 16), "q", "unknown escape");
    expect_safetensors(safetensors("[1]", 16), "q", "not the JSON");
    expect_safetensors(safetensors(Q, 16), "q", "breaks off");
    expect_safetensors(safetensors(Q "} x", 16), "q", "goes on after the JSON object");
}

/* Cut short anywhere, and with a header that claims more than there is. */
static void test_safetensors_cut(void)
{
    struct bytes b = safetensors(Q "}", 16);
    const size_t claimed = b.at[0];
    for (size_t size = 0; size < b.size; size++)
        for (int honest = 0; honest < 2; honest++) { /* the header's length: of the whole, or of what is left of it */
            struct array_info info;
            char why[NBHD_TEXT];
            b.at[0] = (unsigned char)(honest && size >= 8 && size - 8 < claimed ? size - 8 : claimed);
            unsigned char *exact = exact_copy(b.at, size);
            CHECK(!safetensors_find(exact, size, "q", &info, why), "cut to %zu of %zu bytes it was still good", size,
                  b.size);
            exact_free(exact, size);
        }
    b.at[0] = (unsigned char)(b.size - 4); /* its end is within the file, counted from its own beginning */
    expect_safetensors(b, "q", "header claims");
    b.at[7] = 255;
    expect_safetensors(b, "q", "header claims");
}
#undef Q

/* ---- outputs, and inputs from the disk ---- */

static void test_outputs(void)
{
    char both[256], one[256], name[300];
    snprintf(both, sizeof both, "%s/both.safetensors:o", root);
    snprintf(name, sizeof name, "%s/both.safetensors:l\"se", root);
    snprintf(one, sizeof one, "%s/one.npy", root);
    struct output list[] = {{.spec = both, .dtype = NBHD_BF16, .rank = 2, .shape = {3, 1}},
                            {.spec = name, .dtype = NBHD_F32, .rank = 1, .shape = {2}},
                            {.spec = one, .dtype = NBHD_F64, .rank = 3, .shape = {1, 2, 3}}};
    struct outputs *files;
    CHECK(!outputs_open(&files, list, 3), "%s", told);
    CHECK(access(one, F_OK) != 0, "%s is there before it is whole", one);
    for (int i = 0; i < 3; i++) {
        CHECK((size_t)list[i].data % dtype_size(list[i].dtype) == 0, "output %d is not aligned", i);
        memset(list[i].data, 17 + i, list[i].bytes);
    }
    CHECK(!outputs_commit(&files), "%s", told);
    for (int i = 0; i < 3; i++) {
        struct array a;
        if (!CHECK(!array_open(&a, list[i].spec), "%s", told))
            continue;
        CHECK(a.info.dtype == list[i].dtype && a.info.rank == list[i].rank && a.info.bytes == list[i].bytes,
              "output %d", i);
        CHECK(!memcmp(a.info.shape, list[i].shape, sizeof a.info.shape), "output %d: shape", i);
        CHECK(((char *)a.data)[0] == 17 + i && ((char *)a.data)[a.info.bytes - 1] == 17 + i, "output %d: data", i);
        array_close(&a);
    }
    struct output again = {.spec = one, .dtype = NBHD_F32, .rank = 1, .shape = {1}};
    CHECK(!outputs_open(&files, &again, 1), "%s", told);
    outputs_abandon(&files);
    struct array a;
    CHECK(!array_open(&a, one) && a.info.dtype == NBHD_F64, "an abandoned output touched the file of its name");
    array_close(&a);
    again.dtype = NBHD_BF16;
    CHECK(outputs_open(&files, &again, 1) == TOOL_USAGE && strstr(told, "bfloat16"), "%s", told);
    again.spec = root;
    CHECK(outputs_open(&files, &again, 1) == TOOL_USAGE && strstr(told, "a tensor is FILE.npy"), "%s", told);
}

/* A header of odd length puts the data anywhere: it must arrive aligned all the same. */
static void test_unaligned(void)
{
    char path[256], spec[300];
    struct bytes b = safetensors("{\"q\":{\"dtype\":\"F32\",\"shape\":[2],\"data_offsets\":[1,9]}} ", 9);
    const float value[2] = {1.5f, -2};
    memcpy(b.at + b.size - 8, value, 8);
    snprintf(path, sizeof path, "%s/odd.safetensors", root);
    snprintf(spec, sizeof spec, "%s:q", path);
    write_file(path, b.at, b.size);
    struct array a;
    if (!CHECK(!array_open(&a, spec), "%s", told))
        return;
    CHECK((size_t)a.data % 4 == 0 && !memcmp(a.data, value, 8), "unaligned data");
    array_close(&a);
}

/* One array as numpy may save it, in either order of axes and of bytes: 0, 1, ... 23 of shape 2x3x4 in C's order. */
static void test_orders(void)
{
    char path[256], header[128];
    snprintf(path, sizeof path, "%s/order.npy", root);
    for (int fortran = 0; fortran < 2; fortran++)
        for (int big = 0; big < 2; big++) {
            snprintf(header, sizeof header, "{'descr': '%cf8', 'fortran_order': %s, 'shape': (2, 1, 3, 4)}",
                     big ? '>' : '<', fortran ? "True" : "False");
            struct bytes b = npy(1, header, 192);
            for (int i = 0; i < 24; i++) {
                const double value = fortran ? i % 2 * 12 + i / 2 % 3 * 4 + i / 6 : i;
                unsigned char byte[8];
                memcpy(byte, &value, 8);
                for (int k = 0; k < 8; k++)
                    b.at[b.size - 192 + (size_t)(8 * i + (big ? 7 - k : k))] = byte[k];
            }
            write_file(path, b.at, b.size);
            struct array a;
            if (!CHECK(!array_open(&a, path), "%s", told))
                return;
            CHECK(!a.copy == (!fortran && !big), "%s: %s", header, a.copy ? "copied in vain" : "not put in order");
            for (int i = 0; i < 24; i++)
                CHECK(((double *)a.data)[i] == i, "%s: element %d is %g", header, i, ((double *)a.data)[i]);
            array_close(&a);
        }
}

int main(int argc, char **argv)
{
    seeds = argc > 1 ? argv[1] : NULL;
    if (folder_begin()) {
        test_npy();
        test_safetensors_tensors();
        test_safetensors_json();
        test_safetensors_cut();
        test_outputs();
        test_unaligned();
        test_orders();
    }
    return folder_end();
}
