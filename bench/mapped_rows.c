// mapped_rows.c - what a lookup of table rows costs, mapped or read past the page cache; see mapped_rows.py.
//
// usage: mapped_rows FILE map|read ROW_BYTES CACHE_BYTES IO_THREADS < batches
// A batch on stdin is a count (uint32) and that many row numbers (uint32). For each, nanoseconds to stdout.
// map:  as llama.cpp does it: MADV_RANDOM, the batch's pages asked for by MADV_WILLNEED, then copied.
// read: a set-associative cache of rows; those that miss are read with O_DIRECT, IO_THREADS at once.

#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdatomic.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum { BLOCK = 4096, WAYS = 8 };

static void die(const char * what) {
    perror(what);
    exit(1);
}

static uint64_t now_ns(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (uint64_t) t.tv_sec*1000000000u + (uint64_t) t.tv_nsec;
}

static size_t    g_row_bytes;
static int       g_fd;
static uint64_t  g_file_bytes;
static uint8_t * g_out; // the batch's rows, as get_rows would leave them

//
// map
//

static int by_number(const void * a, const void * b) {
    const uint32_t x = *(const uint32_t *) a, y = *(const uint32_t *) b;
    return x < y ? -1 : x > y;
}

static void look_up_mapped(const uint8_t * base, const uint32_t * rows, uint32_t n) {
    uint32_t * sorted = malloc(n*sizeof(*sorted));
    memcpy(sorted, rows, n*sizeof(*sorted));
    qsort(sorted, n, sizeof(*sorted), by_number);
    uint64_t done = 0;
    for (uint32_t i = 0; i < n; ++i) {
        uint64_t first = sorted[i]*(uint64_t) g_row_bytes/BLOCK*BLOCK;
        uint64_t last  = (sorted[i]*(uint64_t) g_row_bytes + g_row_bytes + BLOCK - 1)/BLOCK*BLOCK;
        first = first < done ? done : first;
        if (last > first) {
            madvise((void *) (base + first), last - first, MADV_WILLNEED);
            done = last;
        }
    }
    free(sorted);
    for (uint32_t i = 0; i < n; ++i) {
        memcpy(g_out + i*g_row_bytes, base + rows[i]*(uint64_t) g_row_bytes, g_row_bytes);
    }
}

//
// read
//

struct way {
    uint32_t row; // number + 1; 0: empty
    uint32_t used;
};

static struct way * g_ways;
static uint8_t *    g_data;
static uint64_t     g_n_sets;
static uint32_t     g_clock;

struct miss {
    uint32_t  row;
    uint8_t * to;
};

static struct miss *   g_misses;
static uint32_t        g_n_misses;
static atomic_uint     g_next, g_n_busy;
static uint32_t        g_round;
static pthread_mutex_t g_lock = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t  g_work = PTHREAD_COND_INITIALIZER;
static pthread_cond_t  g_idle = PTHREAD_COND_INITIALIZER;

static void read_misses(uint8_t * buffer) {
    for (;;) {
        const uint32_t i = atomic_fetch_add(&g_next, 1);
        if (i >= g_n_misses) {
            return;
        }
        const uint64_t at    = g_misses[i].row*(uint64_t) g_row_bytes;
        const uint64_t first = at/BLOCK*BLOCK;
        const uint64_t n     = (at + g_row_bytes - first + BLOCK - 1)/BLOCK*BLOCK;
        if (pread(g_fd, buffer, n, (off_t) first) < (ssize_t) (at - first + g_row_bytes)) {
            die("read");
        }
        memcpy(g_misses[i].to, buffer + (at - first), g_row_bytes);
    }
}

static void * read_forever(void * unused) {
    uint8_t * buffer = aligned_alloc(BLOCK, 4*BLOCK);
    uint32_t  seen   = 0;
    pthread_mutex_lock(&g_lock);
    for (;;) {
        while (g_round == seen) {
            pthread_cond_wait(&g_work, &g_lock);
        }
        seen = g_round;
        pthread_mutex_unlock(&g_lock);
        read_misses(buffer);
        pthread_mutex_lock(&g_lock);
        if (atomic_fetch_sub(&g_n_busy, 1) == 1) {
            pthread_cond_signal(&g_idle);
        }
    }
    return unused;
}

// where the row lies, and whether it has to be read
static uint8_t * find(uint32_t row, bool * missed) {
    const uint64_t set  = (row*UINT64_C(0x9E3779B97F4A7C15) >> 32)%g_n_sets;
    struct way *   ways = g_ways + set*WAYS;
    int            old  = 0;
    for (int w = 0; w < WAYS; ++w) {
        if (ways[w].row == row + 1) {
            ways[w].used = ++g_clock;
            *missed = false;
            return g_data + (set*WAYS + w)*g_row_bytes;
        }
        if (ways[w].used < ways[old].used) {
            old = w;
        }
    }
    ways[old] = (struct way) { row + 1, ++g_clock };
    *missed = true;
    return g_data + (set*WAYS + old)*g_row_bytes;
}

static void look_up_read(const uint32_t * rows, uint32_t n, uint32_t n_threads, uint8_t * buffer) {
    g_n_misses = 0;
    uint8_t ** from = malloc(n*sizeof(*from));
    for (uint32_t i = 0; i < n; ++i) {
        bool missed;
        from[i] = find(rows[i], &missed);
        if (missed) {
            g_misses[g_n_misses++] = (struct miss) { rows[i], from[i] };
        }
    }
    if (g_n_misses > 0) {
        atomic_store(&g_next, 0);
        atomic_store(&g_n_busy, n_threads);
        pthread_mutex_lock(&g_lock);
        g_round++;
        pthread_cond_broadcast(&g_work);
        pthread_mutex_unlock(&g_lock);
        read_misses(buffer);
        pthread_mutex_lock(&g_lock);
        while (atomic_load(&g_n_busy) > 0) {
            pthread_cond_wait(&g_idle, &g_lock);
        }
        pthread_mutex_unlock(&g_lock);
    }
    for (uint32_t i = 0; i < n; ++i) {
        memcpy(g_out + i*g_row_bytes, from[i], g_row_bytes);
    }
    free(from);
}

int main(int argc, char ** argv) {
    if (argc != 6) {
        fprintf(stderr, "usage: mapped_rows FILE map|read ROW_BYTES CACHE_BYTES IO_THREADS\n");
        return 2;
    }
    const bool     mapped    = strcmp(argv[2], "map") == 0;
    const uint32_t n_threads = (uint32_t) atoi(argv[5]);
    g_row_bytes = strtoull(argv[3], NULL, 10);
    g_fd = open(argv[1], O_RDONLY | (mapped ? 0 : O_DIRECT));
    struct stat st;
    if (g_fd < 0 || fstat(g_fd, &st) != 0) {
        die(argv[1]);
    }
    g_file_bytes = (uint64_t) st.st_size;

    const uint8_t * base   = NULL;
    uint8_t *       buffer = aligned_alloc(BLOCK, 4*BLOCK);
    if (mapped) {
        base = mmap(NULL, g_file_bytes, PROT_READ, MAP_SHARED, g_fd, 0);
        if (base == MAP_FAILED) {
            die("mmap");
        }
        madvise((void *) base, g_file_bytes, MADV_RANDOM);
    } else {
        g_n_sets = strtoull(argv[4], NULL, 10)/(WAYS*(g_row_bytes + sizeof(struct way)));
        g_ways   = calloc(g_n_sets*WAYS, sizeof(*g_ways));
        g_data   = calloc(g_n_sets*WAYS, g_row_bytes);
        for (uint32_t i = 0; i < n_threads; ++i) {
            pthread_t thread;
            pthread_create(&thread, NULL, read_forever, NULL);
        }
    }

    uint32_t   n, capacity = 0;
    uint32_t * rows = NULL;
    while (fread(&n, sizeof(n), 1, stdin) == 1) {
        if (n > capacity) {
            capacity = n;
            rows     = realloc(rows, n*sizeof(*rows));
            g_out    = realloc(g_out, n*g_row_bytes);
            g_misses = realloc(g_misses, n*sizeof(*g_misses));
        }
        if (fread(rows, sizeof(*rows), n, stdin) != n) {
            die("stdin");
        }
        const uint64_t started = now_ns();
        if (mapped) {
            look_up_mapped(base, rows, n);
        } else {
            look_up_read(rows, n, n_threads, buffer);
        }
        printf("%llu\n", (unsigned long long) (now_ns() - started));
    }
    return 0;
}
