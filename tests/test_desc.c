/* The problem: its line of text both ways, each illegal field's sentence, sizes of older and newer callers. */
#include <locale.h>
#include "core/kernel.h"
#include "nbhd.h"
#include "case.h"
#include "test.h"

/* Canonical lines come back as they are. */
static const char *const canonical[] = {
    "fwd f32 d64 56x56 w13x13",
    "fwd bf16 b2 h24/8 d128/64 30x48x80 w18x24x24 s16x8x8 r1x1x2 enct extra=512 scale=0.0885",
    "bwd f16 h4 d72 100 w7 ec",
    "qk f64 d12 30000 w5 r1024 bias",
    "bwd f32 h2 d64 40x40 w7x7 bias tf32",
    "av f32 h2 d32 9x9 w3x3",
    "qk_bwd f32 d8 7 w3",
    "av_bwd bf16 d8 7 w3",
    "fwd f32 h2 d32 50 kv=77 w77",
    "fwd f32 d8 9 w3 scale=0.124706954", /* no shorter number is this float */
};

static const struct {
    const char *text, *canonical;
} read_as[] = {
    {"d64 56x56", "fwd f32 d64 56x56 w56x56"},
    {"  w3x3\td8 fwd  9x9 h2 ", "fwd f32 h2 d8 9x9 w3x3"},
    {"d8 h6/6 12 w3 s1 r1 en", "fwd f32 h6 d8 12 w3"},
    {"d8/8 12 r3", "fwd f32 d8 12 w4 r3"},
    {"d64 12 w3 scale=0.125", "fwd f32 d64 12 w3"},
    {"d16 5x5 kv=5x9 w5x9 b1", "fwd f32 d16 5x5 kv=5x9 w5x9"},
};

/* Wrong lines, and a word that the sentence must contain. */
static const struct {
    const char *text, *says;
} wrong[] = {
    {"", "lengths"}, {"d64", "lengths"}, {"56x56", "head_dim"}, {"d64 56x56x2x2", "56x56x2x2"}, {"d64 0", "'0'"},
    {"d64 8 w9", "window[0]"}, {"d64 8x8 w3", "w (window)"}, {"d64 8 w3 s4", "stride[0]"},
    {"d64 8 w3 r3", "window[0]"}, {"d64 8 r9", "dilation[0]"}, {"d64 8 eq", "'eq'"}, {"d64 8 encn", "e (edge)"},
    {"d513 8", "head_dim"}, {"d8/513 8", "head_dim_v"}, {"h3/2 d8 8", "kv_heads"}, {"h0 d8 8", "'h0'"},
    {"b0 d8 8", "'b0'"}, {"d8 8 8", "twice"}, {"d8 d8 8", "twice"}, {"d8 8 extra=", "extra="},
    {"d8 8 extra=-1", "extra"}, {"d8 8 scale=nan", "scale"}, {"d8 8 scale=0", "scale"},
    {"d8 99999999999", "99999999999"}, {"d8 2000000000", "length[0]"}, {"d8 8x w3", "'8x'"}, {"d8 8 w", "'w'"},
    {"d8 8 hello", "'hello' is no field"}, {"d8 8 \033[2J\x7f", "'?[2J?' is no field"},
    {"d8 8 w3 w3", "'w3': w (window) is given twice"}, {"d8 8 bf16 f32", "the dtype is given twice"},
    {"d0 8", "'d0': d (head_dim) must be"}, {"d8 8 w3x0", "'w3x0': w (window) must be"},
    {"d8 8 s-1", "'s-1': s (stride) must be"}, {"D8 8", "'D8' is no field"},
    {"d8 8 bias=1", "'bias=1': bias must be"}, {"d8 8 scale=0x1p3", "'scale=0x1p3': scale must be"},
    {"d8 8 scale=1e400", "scale is inf"}, {"d8 8 kv", "'kv': kv (key tokens) must be"},
    {"d8 8 extra", "'extra': extra must be"}, {"d8 8 scale", "'scale': scale must be"},
    {"d8 8 window=3", "'window=3' is no field"}, {"d8 10000000000000000000", "lengths must be"},
    {"d8 300000000 w3 ep", "periodic"}, {"d8 9 kv=8 ep", "kv_length[0]"}, {"qk d8 8 w3 extra=4", "extra"},
    {"d8 5 kv=9 w3", "kv_length[0]"}, {"d8 5 kv=9 bias", "bias"},
    {"b2000000000 h1000000 d512 1000000000x1000000000 w1x1", "too large"}, {"bf32 d8 8", "bf32"},
    {"d8 1x1x1 w1x1", "w (window)"},
};

static void check_lines(void)
{
    char text[NBHD_TEXT];
    nbhd_desc desc;
    for (size_t i = 0; i < sizeof canonical / sizeof *canonical; i++) {
        CHECK(!nbhd_desc_parse(&desc, canonical[i]), "'%s': %s", canonical[i], nbhd_last_error());
        CHECK(!nbhd_desc_format(&desc, text, sizeof text) && !strcmp(text, canonical[i]), "'%s' came back as '%s'",
              canonical[i], text);
    }
    for (size_t i = 0; i < sizeof read_as / sizeof *read_as; i++) {
        CHECK(!nbhd_desc_parse(&desc, read_as[i].text), "'%s': %s", read_as[i].text, nbhd_last_error());
        CHECK(!nbhd_desc_format(&desc, text, sizeof text) && !strcmp(text, read_as[i].canonical), "'%s' read as '%s'",
              read_as[i].text, text);
    }
    for (size_t i = 0; i < sizeof wrong / sizeof *wrong; i++) {
        const nbhd_status status = nbhd_desc_parse(&desc, wrong[i].text);
        CHECK(status == NBHD_ERROR_INVALID || status == NBHD_ERROR_UNSUPPORTED, "'%s': status %d", wrong[i].text,
              status);
        CHECK(strstr(nbhd_last_error(), wrong[i].says) != NULL, "'%s': '%s' does not say %s", wrong[i].text,
              nbhd_last_error(), wrong[i].says);
    }
    CHECK(nbhd_desc_parse(&desc, "d64 56x56") == NBHD_OK, "%s", nbhd_last_error());
    const char *const whole = "fwd f32 d64 56x56 w56x56";
    for (size_t room = 0; room <= strlen(whole); room++)
        CHECK(nbhd_desc_format(&desc, text, room) == NBHD_ERROR_INVALID, "a line of %zu bytes went into %zu",
              strlen(whole) + 1, room);
    CHECK(!nbhd_desc_format(&desc, text, strlen(whole) + 1) && !strcmp(text, whole), "%s", nbhd_last_error());
    char word[100] = "d8 8 w";
    memset(word + 6, '3', 80);
    CHECK(nbhd_desc_parse(&desc, word) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(), "81 characters"), "%s",
          nbhd_last_error());
}

/* Random problems survive the way through text, every field of them. */
static void check_round_trip(void)
{
    for (unsigned seed = 0; seed < 2000; seed++) {
        nbhd_desc desc = case_random(seed, 1e9), again;
        char first[NBHD_TEXT], second[NBHD_TEXT];
        const bool ok = !nbhd_desc_format(&desc, first, sizeof first) && !nbhd_desc_parse(&again, first) &&
                        !nbhd_desc_format(&again, second, sizeof second);
        struct nbhd_problem given, read;
        CHECK(ok && !strcmp(first, second), "seed %u: '%s', then '%s' (%s)", seed, first, second, nbhd_last_error());
        CHECK(!nbhd_problem_init(&given, &desc) && !nbhd_problem_init(&read, &again) &&
                  !memcmp(&given, &read, sizeof given),
              "seed %u: '%s' is read as another problem", seed, first);
    }
}

/* A host program's locale, where numbers have a comma, changes nothing. */
static void check_locale(void)
{
    static const char *const commas[] = {"de_DE.UTF-8", "fr_FR.UTF-8", "es_ES.UTF-8", "pt_BR.UTF-8", "ru_RU.UTF-8"};
    char text[NBHD_TEXT];
    nbhd_desc desc;
    const char *found = NULL;
    for (size_t i = 0; !found && i < sizeof commas / sizeof *commas; i++)
        found = setlocale(LC_NUMERIC, commas[i]);
    if (!found) {
        test_skip("no locale that writes numbers with a comma is installed");
        return;
    }
    const char *const line = "fwd f32 d8 9 w3 scale=0.0885";
    CHECK(!nbhd_desc_parse(&desc, line) && desc.scale == 0.0885f, "%s: %s, scale %g", found, nbhd_last_error(),
          (double)desc.scale);
    CHECK(!nbhd_desc_format(&desc, text, sizeof text) && !strcmp(text, line), "%s: '%s'", found, text);
    CHECK(nbhd_desc_parse(&desc, "d8 9 scale=0,5") == NBHD_ERROR_INVALID, "%s: a comma passed", found);
    check_round_trip();
    setlocale(LC_NUMERIC, "C");
}

static void check_fields(void)
{
    static const struct {
        size_t offset;
        int value;
        const char *says;
    } bad[] = {
        {offsetof(nbhd_desc, pass), 9, "pass is 9"},          {offsetof(nbhd_desc, dtype), -1, "dtype is -1"},
        {offsetof(nbhd_desc, rank), 4, "rank is 4"},          {offsetof(nbhd_desc, rank), 0, "rank is 0"},
        {offsetof(nbhd_desc, batch), -3, "batch is -3"},      {offsetof(nbhd_desc, heads), -1, "heads is -1"},
        {offsetof(nbhd_desc, kv_heads), 3, "kv_heads is 3"},  {offsetof(nbhd_desc, head_dim), 0, "head_dim is 0"},
        {offsetof(nbhd_desc, head_dim_v), -8, "head_dim_v is -8"}, {offsetof(nbhd_desc, length) + 4, -1,
        "length[1] is -1"},
        {offsetof(nbhd_desc, window), -1, "window[0] is -1"}, {offsetof(nbhd_desc, stride), -1, "stride[0] is -1"},
        {offsetof(nbhd_desc, dilation), -1, "dilation[0] is -1"}, {offsetof(nbhd_desc, edge), 7, "edge[0] is 7"},
        {offsetof(nbhd_desc, kv_length), -2, "kv_length[0] is -2"}, {offsetof(nbhd_desc, extra), -1, "extra is -1"},
        {offsetof(nbhd_desc, bias), 2, "bias is 2"},          {offsetof(nbhd_desc, threads), -1, "threads is -1"},
        {offsetof(nbhd_desc, tf32), 2, "tf32 is 2"},
    };
    for (size_t i = 0; i < sizeof bad / sizeof *bad; i++) {
        nbhd_desc desc;
        nbhd_plan *plan;
        nbhd_desc_parse(&desc, "h2 d16 8x8 w3x3");
        memcpy((char *)&desc + bad[i].offset, &bad[i].value, sizeof(int));
        CHECK(nbhd_plan_create(&plan, &desc, NBHD_DEVICE_CPU, 0) == NBHD_ERROR_INVALID && !plan, "%s passed",
              bad[i].says);
        CHECK(strstr(nbhd_last_error(), bad[i].says) != NULL, "'%s' does not say %s", nbhd_last_error(), bad[i].says);
    }
}

static void check_sizes(void)
{
    nbhd_desc desc;
    char text[NBHD_TEXT];
    nbhd_desc_parse(&desc, "h2 d16 8x8 w3x3 scale=2");
    desc.size = offsetof(nbhd_desc, scale); /* a caller from before `scale` existed */
    CHECK(!nbhd_desc_format(&desc, text, sizeof text) && !strcmp(text, "fwd f32 h2 d16 8x8 w3x3"), "%s", text);
    struct {
        nbhd_desc desc;
        int future[4];
    } longer = {.desc = desc};
    longer.desc.size = sizeof longer;
    CHECK(!nbhd_desc_format(&longer.desc, text, sizeof text), "%s", nbhd_last_error());
    for (int i = 0; i < 4; i++) {
        longer.future[i] = 1;
        CHECK(nbhd_desc_format(&longer.desc, text, sizeof text) == NBHD_ERROR_UNSUPPORTED,
              "the unknown field %d was ignored", i);
        longer.future[i] = 0;
    }
    longer.desc.size = 1 << 20; /* no struct: its bytes are not looked at */
    CHECK(nbhd_desc_format(&longer.desc, text, sizeof text) == NBHD_ERROR_INVALID && strstr(nbhd_last_error(),
          "nbhd_desc.size"),
          "%s", nbhd_last_error());
    desc.size = 0;
    CHECK(nbhd_desc_format(&desc, text, sizeof text) == NBHD_ERROR_INVALID, "size 0 passed");
}

/* How far products of legal extents may go. */
static void check_products(void)
{
    nbhd_desc desc;
    CHECK(!nbhd_desc_parse(&desc, "d512 h100000 1000000x1000 w1x1"), "%s", nbhd_last_error()); /* 8e17 bytes */
    CHECK(nbhd_desc_parse(&desc, "d512 h1000000 1000000x1000 w1x1") == NBHD_ERROR_INVALID &&
              strstr(nbhd_last_error(), "too large"), "%s", nbhd_last_error()); /* 8e18 */
    CHECK(!nbhd_desc_parse(&desc, "d8 100000x100000 w46340x46340"), "%s", nbhd_last_error());
    CHECK(nbhd_desc_parse(&desc, "d8 100000x100000 w50000x50000") == NBHD_ERROR_INVALID &&
              strstr(nbhd_last_error(), "too large"), "%s", nbhd_last_error()); /* keys of a window fit an int */
}

static void check_numbers(void)
{
    static const struct {
        const char *text;
        double value;
        size_t used;
    } read[] = {{"1.5", 1.5, 3}, {"-2e-3,", -2e-3, 5}, {".5x", 0.5, 2}, {"5.", 5, 2}, {"x", 0, 0}, {"", 0, 0},
    {"1.2.3", 1.2, 3},
                {"0x1p3", 0, 1}, {"nan", 0, 0}};
    const char *end;
    for (size_t i = 0; i < sizeof read / sizeof *read; i++) {
        const double value = nbhd_read_number(read[i].text, &end);
        CHECK(value == read[i].value && (size_t)(end - read[i].text) == read[i].used, "'%s': %g, %zu characters",
              read[i].text, value,
              (size_t)(end - read[i].text));
    }
    char digits[200];
    memset(digits, '1', sizeof digits);
    digits[sizeof digits - 1] = '\0';
    CHECK(nbhd_read_number(digits, &end) == 0 && end == digits, "a number of 199 digits was read");
}

static void check_counts(void)
{
    nbhd_desc desc;
    int first, count;
    nbhd_desc_parse(&desc, "b2 h3 d10/6 8x12 w3x4 r1x3 extra=5");
    CHECK(nbhd_desc_pairs(&desc) == 2 * 3 * 96 * (12 + 5.0), "%g pairs", nbhd_desc_pairs(&desc));
    CHECK(nbhd_desc_flops(&desc) == 2 * 16 * nbhd_desc_pairs(&desc), "%g flops", nbhd_desc_flops(&desc));
    CHECK(!nbhd_desc_keys(&desc, 1, 11, &first, &count) && first == 2 && count == 4, "first %d count %d", first, count);
    CHECK(nbhd_desc_keys(&desc, 2, 0, &first, &count) == NBHD_ERROR_INVALID, "axis 2 of 2 axes passed");
    CHECK(nbhd_desc_keys(&desc, 0, 8, &first, &count) == NBHD_ERROR_INVALID, "query 8 of 8 passed");
    nbhd_desc_parse(&desc, "d1 5 w3 ec");
    CHECK(nbhd_desc_pairs(&desc) == 1 + 2 + 3 + 3 + 3, "%g pairs", nbhd_desc_pairs(&desc));
}

int main(void)
{
    check_lines();
    check_round_trip();
    check_locale();
    check_fields();
    check_sizes();
    check_products();
    check_numbers();
    check_counts();
    return test_done();
}
