/* Drawings as SVG text, or as pixels for PNG: see canvas.h. */
#include "canvas.h"

#include <math.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "image.h"
#include "outfile.h"
#include "tool.h"

enum kind { BOX, LINE, DISC, WORDS };

struct shape {
    enum kind kind;
    enum canvas_anchor anchor;
    bool dashed;
    int fill, stroke;
    double x, y, a, b, thickness; /* a, b: size of a box, end of a line; a: a disc's radius, words' height */
    char text[160];
};

void canvas_begin(struct canvas *c, double width, double height)
{
    memset(c, 0, sizeof *c);
    c->width = width;
    c->height = height;
}

void canvas_end(struct canvas *c)
{
    free(c->shapes);
    memset(c, 0, sizeof *c);
}

static struct shape *add(struct canvas *c, enum kind kind)
{
    static struct shape nowhere; /* after memory ran out */
    if (c->count == c->room && !c->full) {
        const int room = c->room ? 2 * c->room : 256;
        struct shape *grown = realloc(c->shapes, (size_t)room * sizeof *grown);
        c->full = !grown;
        if (grown) {
            c->shapes = grown;
            c->room = room;
        }
    }
    struct shape *s = c->full ? &nowhere : &c->shapes[c->count++];
    *s = (struct shape){.kind = kind, .fill = CANVAS_NONE, .stroke = CANVAS_NONE};
    return s;
}

void canvas_box(struct canvas *c, double x, double y, double width, double height, int fill, int stroke,
                double thickness)
{
    struct shape *s = add(c, BOX);
    s->x = x, s->y = y, s->a = width, s->b = height;
    s->fill = fill, s->stroke = stroke, s->thickness = thickness;
}

void canvas_line(struct canvas *c, double x0, double y0, double x1, double y1, int stroke, double thickness,
                 bool dashed)
{
    struct shape *s = add(c, LINE);
    s->x = x0, s->y = y0, s->a = x1, s->b = y1;
    s->stroke = stroke, s->thickness = thickness, s->dashed = dashed;
}

void canvas_disc(struct canvas *c, double x, double y, double radius, int fill, int stroke)
{
    struct shape *s = add(c, DISC);
    s->x = x, s->y = y, s->a = radius;
    s->fill = fill, s->stroke = stroke, s->thickness = 1;
}

void canvas_words(struct canvas *c, double x, double y, double size, int colour, enum canvas_anchor anchor,
                  const char *format, ...)
{
    struct shape *s = add(c, WORDS);
    s->x = x, s->y = y, s->a = size;
    s->fill = colour, s->anchor = anchor;
    va_list list;
    va_start(list, format);
    vsnprintf(s->text, sizeof s->text, format, list);
    va_end(list);
}

/* ---- SVG ---- */

static void put_paint(FILE *f, const char *what, int colour)
{
    if (colour != CANVAS_NONE)
        fprintf(f, " %s='#%06x'", what, (unsigned)colour);
    else if (!strcmp(what, "fill"))
        fprintf(f, " fill='none'");
}

static void put_text(FILE *f, const struct shape *s)
{
    static const char *const anchors[] = {"start", "middle", "end"};
    fprintf(f, "<text x='%.4g' y='%.4g' font-size='%.3g' text-anchor='%s'", s->x, s->y, s->a, anchors[s->anchor]);
    put_paint(f, "fill", s->fill);
    fputc('>', f);
    for (const char *p = s->text; *p; p++)
        *p == '<' ? fputs("&lt;", f) : *p == '&' ? fputs("&amp;", f) : fputc(*p, f);
    fputs("</text>\n", f);
}

static void put_shape(FILE *f, const struct shape *s)
{
    switch (s->kind) {
    case WORDS: put_text(f, s); return;
    case BOX: fprintf(f, "<rect x='%.5g' y='%.5g' width='%.5g' height='%.5g'", s->x, s->y, s->a, s->b); break;
    case LINE: fprintf(f, "<line x1='%.5g' y1='%.5g' x2='%.5g' y2='%.5g'", s->x, s->y, s->a, s->b); break;
    case DISC: fprintf(f, "<circle cx='%.5g' cy='%.5g' r='%.3g'", s->x, s->y, s->a); break;
    }
    put_paint(f, "fill", s->fill);
    put_paint(f, "stroke", s->stroke);
    if (s->stroke != CANVAS_NONE && fabs(s->thickness - 1) > 1e-9)
        fprintf(f, " stroke-width='%.3g'", s->thickness);
    if (s->dashed)
        fputs(" stroke-dasharray='6 4'", f);
    fputs("/>\n", f);
}

static int write_svg(const struct canvas *c, const char *path)
{
    char *text = NULL;
    size_t size = 0;
    FILE *f = open_memstream(&text, &size);
    if (!f)
        return tool_fail(TOOL_FAILED, "%s: out of memory", path);
    fprintf(f, "<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 %.5g %.5g' width='%.5g' height='%.5g' "
               "font-family='sans-serif'>\n<rect width='100%%' height='100%%' fill='#ffffff'/>\n",
            c->width, c->height, c->width, c->height);
    for (int i = 0; i < c->count; i++)
        put_shape(f, &c->shapes[i]);
    fputs("</svg>\n", f);
    if (fclose(f)) {
        free(text);
        return tool_fail(TOOL_FAILED, "%s: out of memory", path);
    }
    struct outfile *file;
    int status = outfile_open(&file, path);
    if (!status) {
        status = outfile_write(file, text, size);
        if (status)
            outfile_abandon(&file);
        else
            status = outfile_commit(&file);
    }
    free(text);
    return status;
}

/* ---- pixels ---- */

enum { SCALE = 2 }; /* pixels to a unit of the drawing */

static void dot(struct image *m, int x, int y, int colour)
{
    if (x < 0 || y < 0 || x >= m->width || y >= m->height || colour == CANVAS_NONE)
        return;
    unsigned char *p = (unsigned char *)m->sample + ((size_t)y * (size_t)m->width + (size_t)x) * 3;
    p[0] = (unsigned char)(colour >> 16 & 255);
    p[1] = (unsigned char)(colour >> 8 & 255);
    p[2] = (unsigned char)(colour & 255);
}

static int pixel(double x) { return (int)floor(x * SCALE + 0.5); }

static void fill(struct image *m, double x0, double y0, double x1, double y1, int colour)
{
    for (int y = pixel(y0); y < pixel(y1); y++)
        for (int x = pixel(x0); x < pixel(x1); x++)
            dot(m, x, y, colour);
}

static void fill_box(struct image *m, const struct shape *s)
{
    const double h = s->thickness / 2, x1 = s->x + s->a, y1 = s->y + s->b;
    if (s->fill != CANVAS_NONE)
        fill(m, s->x, s->y, x1, y1, s->fill);
    if (s->stroke == CANVAS_NONE)
        return;
    fill(m, s->x - h, s->y - h, x1 + h, s->y + h, s->stroke);
    fill(m, s->x - h, y1 - h, x1 + h, y1 + h, s->stroke);
    fill(m, s->x - h, s->y - h, s->x + h, y1 + h, s->stroke);
    fill(m, x1 - h, s->y - h, x1 + h, y1 + h, s->stroke);
}

static void fill_line(struct image *m, const struct shape *s)
{
    const double length = hypot(s->a - s->x, s->b - s->y), h = fmax(s->thickness, 1.0 / SCALE) / 2;
    const int steps = (int)(length * SCALE) + 1;
    for (int i = 0; i <= steps; i++) {
        const double t = (double)i / steps, x = s->x + t * (s->a - s->x), y = s->y + t * (s->b - s->y);
        if (!s->dashed || fmod(t * length, 10) < 6)
            fill(m, x - h, y - h, x + h, y + h, s->stroke);
    }
}

static void fill_disc(struct image *m, const struct shape *s)
{
    for (int y = pixel(s->y - s->a - 1); y <= pixel(s->y + s->a + 1); y++)
        for (int x = pixel(s->x - s->a - 1); x <= pixel(s->x + s->a + 1); x++) {
            const double r = hypot((x + 0.5) / SCALE - s->x, (y + 0.5) / SCALE - s->y);
            dot(m, x, y, r <= s->a - 0.5 ? s->fill : r <= s->a + 0.5 ? s->stroke != CANVAS_NONE ? s->stroke : s->fill
                                                                     : CANVAS_NONE);
        }
}

static void fill_words(struct image *m, const struct shape *s)
{
    const int bit = (int)fmax(1, floor(s->a * SCALE / 10 + 0.3));
    const int width = (int)strlen(s->text) * 6 * bit;
    const int left = pixel(s->x) - (s->anchor == CANVAS_LEFT ? 0 : s->anchor == CANVAS_MIDDLE ? width / 2 : width);
    const int top = pixel(s->y) - 7 * bit;
    for (int i = 0; s->text[i]; i++) {
        const unsigned char *rows = font_rows(s->text[i]);
        for (int y = 0; y < FONT_ROWS * bit; y++)
            for (int x = 0; x < 5 * bit; x++)
                if (rows[y / bit] >> (4 - x / bit) & 1)
                    dot(m, left + i * 6 * bit + x, top + y, s->fill);
    }
}

static int write_png(const struct canvas *c, const char *path)
{
    struct image m = {.width = pixel(c->width), .height = pixel(c->height), .channels = 3, .bits = 8};
    const size_t bytes = image_count(&m);
    m.sample = malloc(bytes);
    if (!m.sample)
        return tool_fail(TOOL_FAILED, "%s: no memory for %d x %d pixels", path, m.width, m.height);
    memset(m.sample, 255, bytes);
    for (int i = 0; i < c->count; i++) {
        static void (*const draw[])(struct image *, const struct shape *) = {fill_box, fill_line, fill_disc,
                                                                             fill_words};
        draw[c->shapes[i].kind](&m, &c->shapes[i]);
    }
    int status = image_write(&m, path);
    image_free(&m);
    return status;
}

int canvas_write(const struct canvas *c, const char *path)
{
    const size_t length = strlen(path);
    if (c->full)
        return tool_fail(TOOL_FAILED, "%s: no memory for a drawing of so many parts", path);
    if (length > 4 && !strcmp(path + length - 4, ".svg"))
        return write_svg(c, path);
    if (length > 4 && !strcmp(path + length - 4, ".png"))
        return write_png(c, path);
    return tool_fail(TOOL_USAGE, "%s: a picture's name ends with .svg or .png", path);
}
