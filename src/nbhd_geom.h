/* The mask: which keys a query sees on one axis. The only place in shipped code that knows it.
 * Compiled by the C compiler and by NVRTC, so: int only, no #include, nothing that is not both C99 and C++.
 *
 * One axis at a time: an N-D neighborhood is the product of its axes. Dilation disappears first: token x is element
 * x / dilation of group x % dilation, and all that follows works inside one group of n elements.
 * A query's keys are an interval whose two ends never decrease with the query. So the union and the intersection over a
 * tile of queries are read off its first and last query, and the queries that see a key are an interval too.
 * A periodic axis is unwrapped: element x, of any sign, is an image of element x mod n (nbhd_wrap), queries and keys
 * alike, and whatever holds of elements x and y holds of x + n and y + n. Intervals of a query or key of [0, n), and of
 * tiles of them, lie in [-n, 2n); a query's window holds no key twice, though the union over a tile may.
 * Definitions: docs/mask.md. Tested against membership by definition in tests/test_geom.c. */
#ifndef NBHD_GEOM_H
#define NBHD_GEOM_H

#ifdef __CUDACC__
#define NBHD_FN static __device__ __forceinline__
#define NBHD_STATIC_ASSERT(condition, message) static_assert(condition, message)
#else
#define NBHD_FN static inline
#define NBHD_STATIC_ASSERT(condition, message) _Static_assert(condition, message)
#endif

#define NBHD_EDGE_NEAREST 0
#define NBHD_EDGE_CAUSAL 1
#define NBHD_EDGE_TRUNCATED 2
#define NBHD_EDGE_PERIODIC 3

/* keys: key tokens on this axis; equals length but for cross attention, where every query sees them all. */
struct nbhd_axis {
    int length, keys, window, stride, dilation, edge;
};

/* Half open: begin <= x < end. */
struct nbhd_range {
    int begin, end;
};

NBHD_FN int nbhd_min(int a, int b) { return a < b ? a : b; }
NBHD_FN int nbhd_max(int a, int b) { return a > b ? a : b; }

NBHD_FN struct nbhd_range nbhd_range_of(int begin, int end)
{
    struct nbhd_range r;
    r.begin = begin;
    r.end = end;
    return r;
}

/* Elements in dilation group g, 0 <= g < dilation. */
NBHD_FN int nbhd_group_size(struct nbhd_axis a, int g) { return (a.length - g + a.dilation - 1) / a.dilation; }

/* The query whose window all queries of q's stride group share. */
NBHD_FN int nbhd_leader(struct nbhd_axis a, int n, int q)
{
    int offset = a.edge == NBHD_EDGE_CAUSAL ? a.stride - 1 : a.stride / 2;
    return nbhd_min(q / a.stride * a.stride + offset, n - 1);
}

/* Where the image of [0, n) begins that x lies in: of the multiples of n, the last that is not after x. */
NBHD_FN int nbhd_image(int n, int x) { return x >= 0 ? x / n * n : -((n - 1 - x) / n) * n; }

/* The element of a group of n that x is an image of; x itself where the axis does not wrap. */
NBHD_FN int nbhd_wrap(struct nbhd_axis a, int n, int x)
{
    return a.edge != NBHD_EDGE_PERIODIC ? x : x < 0 ? x + n : x >= n ? x - n : x;
}

/* Elements from x on, up to `end`, that lie one after the other: to the end of x's image where the axis wraps. */
NBHD_FN int nbhd_together(struct nbhd_axis a, int n, int x, int end)
{
    return (a.edge == NBHD_EDGE_PERIODIC ? nbhd_min(nbhd_image(n, x) + n, end) : end) - x;
}

/* Keys that query q of a group of n sees. */
NBHD_FN struct nbhd_range nbhd_keys(struct nbhd_axis a, int n, int q)
{
    if (a.keys != a.length)
        return nbhd_range_of(0, a.keys);
    int image = a.edge == NBHD_EDGE_PERIODIC ? nbhd_image(n, q) : 0;
    int leader = nbhd_leader(a, n, q - image) + image;
    if (a.edge == NBHD_EDGE_CAUSAL)
        return nbhd_range_of(nbhd_max(leader - a.window + 1, 0), nbhd_min(q + 1, n));
    int begin = leader - a.window / 2;
    if (a.edge == NBHD_EDGE_TRUNCATED)
        return nbhd_range_of(nbhd_max(begin, 0), nbhd_min(begin + a.window, n));
    if (a.edge == NBHD_EDGE_NEAREST)
        begin = nbhd_max(nbhd_min(begin, n - a.window), 0);
    return nbhd_range_of(begin, begin + a.window);
}

/* The same for a periodic axis, where low <= leader(q) <= high: each is solved for in the image that it lies in. */
NBHD_FN struct nbhd_range nbhd_queries_around(struct nbhd_axis a, int n, int low, int high)
{
    int offset = a.stride / 2;
    int image = nbhd_image(n, low);
    int group = nbhd_max(low - image - offset + a.stride - 1, 0) / a.stride;
    int first = image + nbhd_min(group * a.stride, n);
    image = nbhd_image(n, high);
    high -= image;
    if (high == n - 1)
        return nbhd_range_of(first, image + n);
    int groups = high < offset ? 0 : (high - offset) / a.stride + 1;
    return nbhd_range_of(first, image + nbhd_min(groups * a.stride, n));
}

/* Queries that see key k of a group of n: the inverse neighborhood, over which dK and dV are summed.
 * begin(q) <= k and end(q) > k are solved for the leader, then for the stride groups whose leader is in between. */
NBHD_FN struct nbhd_range nbhd_queries(struct nbhd_axis a, int n, int k)
{
    if (a.keys != a.length)
        return nbhd_range_of(0, n);
    int offset = a.edge == NBHD_EDGE_CAUSAL ? a.stride - 1 : a.stride / 2;
    int reach = a.edge == NBHD_EDGE_CAUSAL ? a.window - 1 : a.window / 2; /* leader - begin, away from borders */
    if (a.edge == NBHD_EDGE_PERIODIC)
        return nbhd_queries_around(a, n, k + reach - a.window + 1, k + reach);
    int first = k;
    if (a.edge != NBHD_EDGE_CAUSAL) {
        int low = k - a.window + 1 + reach - offset; /* the group's start must be at least this */
        first = low > 0 ? (low + a.stride - 1) / a.stride * a.stride : 0;
    }
    int last = n - 1;
    if (k + reach < n - 1)
        last = nbhd_min(last, ((k + reach - offset) / a.stride + 1) * a.stride - 1);
    if (a.edge == NBHD_EDGE_NEAREST) {
        if (k < a.window)
            first = 0;
        if (k >= n - a.window)
            last = n - 1;
    }
    return nbhd_range_of(first, last + 1);
}

/* Keys that some query of the tile q sees: outside them nothing need be loaded. */
NBHD_FN struct nbhd_range nbhd_tile_any(struct nbhd_axis a, int n, struct nbhd_range q)
{
    return nbhd_range_of(nbhd_keys(a, n, q.begin).begin, nbhd_keys(a, n, q.end - 1).end);
}

/* Keys that all queries of the tile q see: inside them no mask is needed. May be empty. */
NBHD_FN struct nbhd_range nbhd_tile_all(struct nbhd_axis a, int n, struct nbhd_range q)
{
    int begin = nbhd_keys(a, n, q.end - 1).begin;
    return nbhd_range_of(begin, nbhd_max(begin, nbhd_keys(a, n, q.begin).end));
}

/* The same two for a tile of keys: queries that see some, and that see all of them. */
NBHD_FN struct nbhd_range nbhd_tile_any_queries(struct nbhd_axis a, int n, struct nbhd_range k)
{
    return nbhd_range_of(nbhd_queries(a, n, k.begin).begin, nbhd_queries(a, n, k.end - 1).end);
}

NBHD_FN struct nbhd_range nbhd_tile_all_queries(struct nbhd_axis a, int n, struct nbhd_range k)
{
    int begin = nbhd_queries(a, n, k.end - 1).begin;
    return nbhd_range_of(begin, nbhd_max(begin, nbhd_queries(a, n, k.begin).end));
}

#endif
