/* A drawing: rectangles, lines, discs and words, kept as a list and written as SVG or, where libpng is there, as
 * PNG. */
#ifndef NBHD_TOOL_CANVAS_H
#define NBHD_TOOL_CANVAS_H

#include <stdbool.h>

/* 0xRRGGBB, or no colour at all. */
enum { CANVAS_NONE = -1 };
enum canvas_anchor { CANVAS_LEFT, CANVAS_MIDDLE, CANVAS_RIGHT };

struct shape;
struct canvas {
    double width, height; /* of the picture; y points down */
    struct shape *shapes;
    int count, room;
    bool full; /* memory ran out: canvas_write tells */
};

void canvas_begin(struct canvas *c, double width, double height);
void canvas_box(struct canvas *c, double x, double y, double width, double height, int fill, int stroke,
                double thickness);
void canvas_line(struct canvas *c, double x0, double y0, double x1, double y1, int stroke, double thickness,
                 bool dashed);
void canvas_disc(struct canvas *c, double x, double y, double radius, int fill, int stroke);
/* (x, y): the foot of the words' first, middle or last letter. size: height of a line in pixels. Printable ASCII. */
void canvas_words(struct canvas *c, double x, double y, double size, int colour, enum canvas_anchor anchor,
                  const char *format, ...) __attribute__((format(printf, 7, 8)));
/* By path's ending, .svg or .png. Exit status; the sentence of a failure has been told. */
int canvas_write(const struct canvas *c, const char *path);
void canvas_end(struct canvas *c);

/* font.c: a letter as rows of 5 bits, the leftmost highest, 7 above the line; a box where there is no such letter. */
enum { FONT_ROWS = 9 };
const unsigned char *font_rows(char letter);

#endif
