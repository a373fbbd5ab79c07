/* Tensors in files: maps inputs, and lays out outputs in files mapped for writing. */
#include "array.h"

#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>

#include "infile.h"
#include "json.h"
#include "outfile.h"
#include "tool.h"

size_t dtype_size(int dtype)
{
    static const size_t size[] = {[NBHD_F32] = 4, [NBHD_F16] = 2, [NBHD_BF16] = 2, [NBHD_F64] = 8};
    return size[dtype];
}

const char *dtype_name(int dtype)
{
    static const char *const name[] = {
        [NBHD_F32] = "f32", [NBHD_F16] = "f16", [NBHD_BF16] = "bf16", [NBHD_F64] = "f64"};
    return name[dtype];
}

const char *shape_text(const long long *shape, int rank, char text[ARRAY_RANK * 21])
{
    size_t n = 0;
    text[0] = 0;
    for (int i = 0; i < rank; i++)
        n += (size_t)snprintf(text + n, (size_t)ARRAY_RANK * 21 - n, "%s%lld", i ? "x" : "", shape[i]);
    return text;
}

/* Splits "dir/x.safetensors:name" and "x.npy"; name is "" where none is given. false: neither kind. */
struct spec {
    char *path;
    const char *name;
    bool npy;
};

static bool ends_with(const char *text, const char *end)
{
    size_t n = strlen(text), m = strlen(end);
    return n >= m && !strcmp(text + n - m, end);
}

static int spec_split(const char *text, struct spec *spec)
{
    static const char mark[] = ".safetensors:";
    const char *colon = strstr(text, mark);
    size_t length = colon ? (size_t)(colon - text) + sizeof mark - 2 : strlen(text);
    spec->npy = ends_with(text, ".npy") && !colon;
    if (!*text)
        return tool_fail(TOOL_USAGE, "a tensor's name is empty; a tensor is FILE.npy or FILE.safetensors:NAME");
    if (!spec->npy && !colon && !ends_with(text, ".safetensors"))
        return tool_fail(TOOL_USAGE, "%s: a tensor is FILE.npy or FILE.safetensors:NAME", text);
    spec->name = colon ? text + length + 1 : "";
    spec->path = malloc(length + 1);
    if (!spec->path)
        return tool_fail(TOOL_FAILED, "out of memory");
    memcpy(spec->path, text, length);
    spec->path[length] = 0;
    return TOOL_DONE;
}

/* Kernels want aligned elements in C's order; a header of odd length puts them anywhere. */
static int put_in_order(struct array *array)
{
    const struct array_info *info = &array->info;
    array->data = (char *)array->map + info->offset;
    if ((size_t)array->data % dtype_size(info->dtype) == 0 && !info->fortran && !info->big_endian)
        return TOOL_DONE;
    array->copy = malloc(info->bytes ? info->bytes : 1);
    if (!array->copy)
        return tool_fail(TOOL_FAILED, "out of memory for a copy of %zu bytes in another order", info->bytes);
    array_reorder(array->copy, array->data, info);
    array->data = array->copy;
    return TOOL_DONE;
}

int array_open(struct array *array, const char *text)
{
    struct spec spec;
    char why[NBHD_TEXT];
    memset(array, 0, sizeof *array);
    int status = spec_split(text, &spec);
    if (status)
        return status;
    status = infile_map(&array->map, &array->map_bytes, spec.path);
    if (!status && !(spec.npy ? npy_parse(array->map, array->map_bytes, &array->info, why)
                              : safetensors_find(array->map, array->map_bytes, spec.name, &array->info, why)))
        status = tool_fail(TOOL_USAGE, "%s: %s", spec.path, why);
    if (!status)
        status = put_in_order(array);
    free(spec.path);
    if (status)
        array_close(array);
    return status;
}

void array_close(struct array *array)
{
    if (array->map)
        munmap(array->map, array->map_bytes);
    free(array->copy);
    memset(array, 0, sizeof *array);
}

/* ---- outputs ---- */

struct outputs {
    int count;
    struct {
        struct outfile *file;
        void *map;
        size_t bytes;
        char *path;
    } at[16];
};

enum { OUTPUTS = sizeof((struct outputs *)0)->at / sizeof *((struct outputs *)0)->at, NPY_ALIGN = 64 };

static bool output_bytes(struct output *o)
{
    o->bytes = dtype_size(o->dtype);
    for (int i = 0; i < o->rank; i++)
        if (o->shape[i] < 0 || __builtin_mul_overflow(o->bytes, (size_t)o->shape[i], &o->bytes))
            return false;
    return true;
}

/* Header of a .npy in text[]; its length, a multiple of NPY_ALIGN. */
static size_t npy_header(const struct output *o, char text[1024])
{
    static const char *const descr[] = {[NBHD_F32] = "<f4", [NBHD_F16] = "<f2", [NBHD_F64] = "<f8"};
    int n = snprintf(text + 10, 900, "{'descr': '%s', 'fortran_order': False, 'shape': (", descr[o->dtype]);
    for (int i = 0; i < o->rank; i++)
        n += snprintf(text + 10 + n, 900 - (size_t)n, "%lld,%s", o->shape[i], i + 1 < o->rank ? " " : "");
    n += snprintf(text + 10 + n, 900 - (size_t)n, "), }");
    size_t total = ((size_t)n + 11 + NPY_ALIGN - 1) / NPY_ALIGN * NPY_ALIGN;
    memset(text + 10 + n, ' ', total - 11 - (size_t)n);
    text[total - 1] = '\n';
    size_t length = total - 10;
    memcpy(text, "\x93NUMPY\x01\x00", 8);
    text[8] = (char)(length & 255);
    text[9] = (char)(length >> 8);
    return total;
}

/* A JSON string of name, escaped. */
static void put_name(FILE *out, const char *name)
{
    fputc('"', out);
    for (; *name; name++) {
        if (*name == '"' || *name == '\\')
            fputc('\\', out);
        if ((unsigned char)*name < 32)
            fprintf(out, "\\u%04x", (unsigned)*name);
        else
            fputc(*name, out);
    }
    fputc('"', out);
}

/* Header of a .safetensors with the listed outputs; malloc'ed, *length a multiple of 8 so that data is aligned. */
static char *safetensors_header(struct output *const *list, const char *const *names, int count, size_t *length)
{
    static const char *const type[] = {
        [NBHD_F32] = "F32", [NBHD_F16] = "F16", [NBHD_BF16] = "BF16", [NBHD_F64] = "F64"};
    char *text = NULL;
    size_t offset = 0;
    FILE *out = open_memstream(&text, length);
    if (!out)
        return NULL;
    fwrite("\0\0\0\0\0\0\0", 1, 8, out);
    for (int i = 0; i < count; i++) {
        fputc(i ? ',' : '{', out);
        put_name(out, names[i]);
        fprintf(out, ":{\"dtype\":\"%s\",\"shape\":[", type[list[i]->dtype]);
        for (int k = 0; k < list[i]->rank; k++)
            fprintf(out, "%s%lld", k ? "," : "", list[i]->shape[k]);
        fprintf(out, "],\"data_offsets\":[%zu,%zu]}", offset, offset + list[i]->bytes);
        offset += list[i]->bytes;
    }
    fputc('}', out);
    for (long n = ftell(out); n % 8; n++)
        fputc(' ', out);
    if (fclose(out)) {
        free(text);
        return NULL;
    }
    for (int i = 0; i < 8; i++)
        text[i] = (char)((*length - 8) >> 8 * i & 255);
    return text;
}

/* Creates the next file of the list, `header` then room for the tensors in order, and points them into it. */
static int lay_out(struct outputs *files, const char *path, const char *header, size_t header_bytes,
                   struct output *const *list, int count)
{
    size_t total = header_bytes;
    for (int i = 0; i < count; i++)
        if (__builtin_add_overflow(total, list[i]->bytes, &total))
            return tool_fail(TOOL_USAGE, "%s: it would have more bytes than can be addressed", path);
    int at = files->count;
    int status = outfile_open(&files->at[at].file, path);
    if (status)
        return status;
    files->count++;
    files->at[at].bytes = total;
    files->at[at].path = strdup(path);
    files->at[at].map = outfile_map(files->at[at].file, total);
    if (!files->at[at].map || !files->at[at].path)
        return TOOL_FAILED;
    char *data = files->at[at].map;
    memcpy(data, header, header_bytes);
    data += header_bytes;
    for (int i = 0; i < count; data += list[i++]->bytes)
        list[i]->data = data;
    return TOOL_DONE;
}

static int open_npy(struct outputs *files, const char *path, struct output *o)
{
    char header[1024];
    if (o->dtype == NBHD_BF16)
        return tool_fail(TOOL_USAGE, "%s: a .npy cannot hold bfloat16; name a FILE.safetensors:NAME instead", path);
    return lay_out(files, path, header, npy_header(o, header), &o, 1);
}

/* list[first] and every later output with the same path. Widest elements first keeps all of them aligned. */
static int open_safetensors(struct outputs *files, const struct spec *specs, struct output *list, int count, int first)
{
    struct output *of[OUTPUTS];
    const char *names[OUTPUTS];
    int n = 0;
    for (size_t size = 8; size; size /= 2)
        for (int i = first; i < count; i++) {
            if (specs[i].npy || strcmp(specs[i].path, specs[first].path) || dtype_size(list[i].dtype) != size)
                continue;
            names[n] = *specs[i].name ? specs[i].name : "o";
            for (int k = 0; k < n; k++)
                if (!strcmp(names[k], names[n]))
                    return tool_fail(TOOL_USAGE, "%s: two outputs have the name '%s'%s", specs[i].path, names[n],
                                     *specs[i].name ? "" : "; FILE.safetensors:NAME gives each its own");
            of[n++] = &list[i];
        }
    size_t length = 0;
    char *header = safetensors_header(of, names, n, &length);
    if (!header)
        return tool_fail(TOOL_FAILED, "out of memory");
    int status = lay_out(files, specs[first].path, header, length, of, n);
    free(header);
    return status;
}

static int open_one(struct outputs *files, const struct spec *specs, struct output *list, int count, int i)
{
    for (int k = 0; k < i && !specs[i].npy; k++)
        if (!strcmp(specs[k].path, specs[i].path))
            return TOOL_DONE; /* laid out with the first of them */
    return specs[i].npy ? open_npy(files, specs[i].path, &list[i]) : open_safetensors(files, specs, list, count, i);
}

static bool same_file(const char *one, const char *other)
{
    struct stat a, b;
    return !stat(one, &a) && !stat(other, &b) && a.st_dev == b.st_dev && a.st_ino == b.st_ino;
}

/* Of a tensor in a .safetensors file, which nothing could read under some names. */
static int check_name(const struct spec *spec)
{
    if (!strcmp(spec->name, "__metadata__"))
        return tool_fail(TOOL_USAGE, "%s: no tensor can have the name __metadata__, which stands for a file's notes",
                         spec->path);
    if (!json_can_hold(spec->name))
        return tool_fail(TOOL_USAGE, "%s: a tensor's name must be UTF-8, and '%s' is not", spec->path, spec->name);
    return TOOL_DONE;
}

int outputs_spare(const char *input, const struct output *list, int count)
{
    struct spec in, out;
    bool replaced = false, kept = false;
    int status = spec_split(input, &in);
    if (status)
        return status;
    for (int i = 0; !status && i < count && !in.npy && *in.name; i++) {
        status = spec_split(list[i].spec, &out);
        if (status)
            break;
        if (same_file(in.path, out.path)) {
            replaced = true;
            kept |= !strcmp(in.name, *out.name ? out.name : "o");
        }
        free(out.path);
    }
    free(in.path);
    if (!status && replaced && !kept)
        return tool_fail(TOOL_USAGE, "%s: the outputs would replace its file, and it is not among them; name another "
                         "file", input);
    return status;
}

int outputs_open(struct outputs **result, struct output *list, int count)
{
    struct spec specs[OUTPUTS] = {0};
    struct outputs *files = calloc(1, sizeof *files);
    int status = files ? TOOL_DONE : tool_fail(TOOL_FAILED, "out of memory");
    for (int i = 0; !status && i < count; i++) {
        status = spec_split(list[i].spec, &specs[i]);
        if (!status)
            status = check_name(&specs[i]);
        if (!status && !output_bytes(&list[i]))
            status = tool_fail(TOOL_USAGE, "%s: it would have more bytes than can be addressed", list[i].spec);
    }
    for (int i = 0; !status && i < count; i++)
        status = open_one(files, specs, list, count, i);
    for (int i = 0; i < count; i++)
        free(specs[i].path);
    if (status)
        outputs_abandon(&files);
    *result = files;
    return status;
}

static int close_all(struct outputs **files, bool keep)
{
    int status = TOOL_DONE;
    for (int i = 0; *files && i < (*files)->count; i++) {
        if ((*files)->at[i].map)
            munmap((*files)->at[i].map, (*files)->at[i].bytes);
        if (keep && !status)
            status = outfile_commit(&(*files)->at[i].file);
        else
            outfile_abandon(&(*files)->at[i].file);
        free((*files)->at[i].path);
    }
    free(*files);
    *files = NULL;
    return status;
}

int outputs_commit(struct outputs **files) { return close_all(files, true); }
void outputs_abandon(struct outputs **files) { close_all(files, false); }
