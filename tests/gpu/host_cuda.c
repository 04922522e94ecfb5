/* CUDA's driver API as far as kvray calls it (kvray/engine/cuda_driver.py), on the host's memory.
 *
 * For machines without a GPU: kvray's own code runs against it to the last call, with every pointer,
 * structure and size that a driver would get, and the bytes really move. It is stricter than a driver
 * where a mistake would go unnoticed: a context has to be current, a copy must not reach over the end
 * of a registration, attributes must be what kvray means. It says nothing about streams and time: a
 * copy is done when its call returns.
 *
 * Where cuda.h is there, it is included, and the compiler compares every signature with it.
 * HOST_CUDA_VERSION (default 13000) and HOST_CUDA_LOCKABLE (bytes that may be registered) are read
 * from the environment by cuInit.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#if __has_include(<cuda.h>)
#define __CUDA_API_VERSION_INTERNAL /* declares all versions of a call, each under its own name */
#include <cuda.h>
#pragma GCC diagnostic ignored "-Wenum-conversion" /* numbers of our own, also without cuda.h */
#pragma GCC diagnostic ignored "-Wenum-compare"
#else
typedef int CUresult;
typedef int CUdevice;
typedef unsigned long long CUdeviceptr;
typedef struct CUctx_st *CUcontext;
typedef struct CUstream_st *CUstream;
typedef struct CUevent_st *CUevent;
typedef int CUdevice_attribute;
typedef int CUstreamCaptureMode;
typedef struct {
    int type, id;
} CUmemLocation;
typedef struct {
    int srcAccessOrder;
    CUmemLocation srcLocHint, dstLocHint;
    unsigned int flags;
} CUmemcpyAttributes;
#endif
#ifndef CUDAAPI
#define CUDAAPI
#endif

enum { OK = 0, INVALID = 1, NO_MEMORY = 2, NO_CONTEXT = 201, KNOWN = 712, UNKNOWN = 713 };
enum { MAX_RANGES = 4096, PAGE = 4096, ORDER_STREAM = 1, ORDER_ANY = 3 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct {
    uintptr_t begin, end;
} ranges[MAX_RANGES];
static int range_count, version = 13000;
static size_t lockable = SIZE_MAX, locked;
/* streams, events, host allocations, device allocations, registrations, retained contexts */
static long alive[6];
static long long batches, pieces;
static char the_context;
static __thread int depth;
static __thread CUstreamCaptureMode capture_mode;

void host_cuda_counts(long long *out)
{
    for (int i = 0; i < 6; ++i)
        out[i] = alive[i];
    out[6] = batches;
    out[7] = pieces;
}

static void count(int what, int more)
{
    pthread_mutex_lock(&lock);
    alive[what] += more;
    pthread_mutex_unlock(&lock);
}

/* Whether a piece lies in one registration, or touches none. */
static int is_whole(uintptr_t begin, size_t bytes)
{
    for (int i = 0; i < range_count; ++i) {
        if (begin >= ranges[i].begin && begin + bytes <= ranges[i].end)
            return 1;
        if (begin < ranges[i].end && begin + bytes > ranges[i].begin)
            return 0;
    }
    return 1;
}

static int is_registered(uintptr_t begin, size_t bytes)
{
    for (int i = 0; i < range_count; ++i)
        if (begin >= ranges[i].begin && begin + bytes <= ranges[i].end)
            return 1;
    return 0;
}

CUresult CUDAAPI cuInit(unsigned int flags)
{
    const char *text = getenv("HOST_CUDA_VERSION");
    version = text ? atoi(text) : 13000;
    text = getenv("HOST_CUDA_LOCKABLE");
    lockable = text ? (size_t)atoll(text) : SIZE_MAX;
    return flags ? INVALID : OK;
}

CUresult CUDAAPI cuDriverGetVersion(int *found)
{
    *found = version;
    return OK;
}

CUresult CUDAAPI cuGetErrorName(CUresult error, const char **text)
{
    *text = error == NO_MEMORY    ? "CUDA_ERROR_OUT_OF_MEMORY"
            : error == NO_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
            : error == KNOWN      ? "CUDA_ERROR_HOST_MEMORY_ALREADY_REGISTERED"
            : error == UNKNOWN    ? "CUDA_ERROR_HOST_MEMORY_NOT_REGISTERED"
                                  : "CUDA_ERROR_INVALID_VALUE";
    return OK;
}

CUresult CUDAAPI cuDeviceGetCount(int *found)
{
    *found = 1;
    return OK;
}

CUresult CUDAAPI cuDeviceGet(CUdevice *device, int ordinal)
{
    *device = ordinal;
    return ordinal ? INVALID : OK;
}

CUresult CUDAAPI cuDeviceGetName(char *name, int length, CUdevice device)
{
    strncpy(name, "host memory", (size_t)length);
    return device ? INVALID : OK;
}

CUresult CUDAAPI cuDeviceGetAttribute(int *found, CUdevice_attribute which, CUdevice device)
{
    (void)which;
    *found = 0; /* no kernels here */
    return device ? INVALID : OK;
}

CUresult CUDAAPI cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device)
{
    count(5, 1);
    *context = (CUcontext)&the_context;
    return device ? INVALID : OK;
}

CUresult CUDAAPI cuDevicePrimaryCtxRelease_v2(CUdevice device)
{
    count(5, -1);
    return device ? INVALID : OK;
}

CUresult CUDAAPI cuDevicePrimaryCtxGetState(CUdevice device, unsigned int *flags, int *active)
{
    *flags = 0;
    *active = alive[5] > 0;
    return device ? INVALID : OK;
}

CUresult CUDAAPI cuCtxPushCurrent_v2(CUcontext context)
{
    if (context != (CUcontext)&the_context)
        return NO_CONTEXT;
    ++depth;
    return OK;
}

CUresult CUDAAPI cuCtxPopCurrent_v2(CUcontext *context)
{
    if (!depth)
        return NO_CONTEXT;
    --depth;
    *context = (CUcontext)&the_context;
    return OK;
}

CUresult CUDAAPI cuThreadExchangeStreamCaptureMode(CUstreamCaptureMode *mode)
{
    CUstreamCaptureMode before = capture_mode;
    capture_mode = *mode;
    *mode = before;
    return OK;
}

CUresult CUDAAPI cuStreamCreateWithPriority(CUstream *stream, unsigned int flags, int priority)
{
    if (!depth)
        return NO_CONTEXT;
    if (flags != 1 || priority != 0)
        return INVALID;
    count(0, 1);
    *stream = malloc(1);
    return OK;
}

CUresult CUDAAPI cuStreamSynchronize(CUstream stream)
{
    return stream ? OK : INVALID;
}

CUresult CUDAAPI cuStreamDestroy_v2(CUstream stream)
{
    count(0, -1);
    free(stream);
    return OK;
}

struct event {
    int has_time, is_recorded;
    double at_ms;
};

CUresult CUDAAPI cuEventCreate(CUevent *event, unsigned int flags)
{
    if (!depth)
        return NO_CONTEXT;
    struct event *made = calloc(1, sizeof *made);
    made->has_time = flags == 0;
    count(1, 1);
    *event = (CUevent)made;
    return flags == 0 || flags == 2 ? OK : INVALID;
}

CUresult CUDAAPI cuEventRecord(CUevent event, CUstream stream)
{
    struct event *recorded = (struct event *)event;
    struct timespec now;
    (void)stream; /* 0 is the default stream: an engine may compute there */
    clock_gettime(CLOCK_MONOTONIC, &now);
    recorded->is_recorded = 1;
    recorded->at_ms = (double)now.tv_sec * 1e3 + (double)now.tv_nsec / 1e6;
    return OK;
}

CUresult CUDAAPI cuEventQuery(CUevent event)
{
    return ((struct event *)event)->is_recorded ? OK : INVALID;
}

CUresult CUDAAPI cuEventElapsedTime(float *ms, CUevent begin, CUevent end)
{
    struct event *first = (struct event *)begin, *last = (struct event *)end;
    if (!first->has_time || !last->has_time || !first->is_recorded || !last->is_recorded)
        return INVALID;
    *ms = (float)(last->at_ms - first->at_ms);
    return OK;
}

CUresult CUDAAPI cuEventDestroy_v2(CUevent event)
{
    count(1, -1);
    free(event);
    return OK;
}

CUresult CUDAAPI cuStreamWaitEvent(CUstream stream, CUevent event, unsigned int flags)
{
    return stream && ((struct event *)event)->is_recorded && !flags ? OK : INVALID;
}

CUresult CUDAAPI cuMemHostRegister_v2(void *address, size_t bytes, unsigned int flags)
{
    uintptr_t begin = (uintptr_t)address;
    if (!depth)
        return NO_CONTEXT;
    if (flags != 3 || begin % PAGE || bytes % PAGE || !bytes)
        return INVALID;
    pthread_mutex_lock(&lock);
    CUresult result = OK;
    for (int i = 0; i < range_count; ++i)
        if (begin < ranges[i].end && begin + bytes > ranges[i].begin)
            result = KNOWN;
    if (!result && (range_count == MAX_RANGES || locked + bytes > lockable))
        result = NO_MEMORY;
    if (!result) {
        ranges[range_count].begin = begin;
        ranges[range_count++].end = begin + bytes;
        locked += bytes;
        ++alive[4];
    }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult CUDAAPI cuMemHostUnregister(void *address)
{
    if (!depth)
        return NO_CONTEXT;
    pthread_mutex_lock(&lock);
    CUresult result = UNKNOWN;
    for (int i = 0; i < range_count && result; ++i)
        if (ranges[i].begin == (uintptr_t)address) {
            locked -= ranges[i].end - ranges[i].begin;
            ranges[i] = ranges[--range_count];
            --alive[4];
            result = OK;
        }
    pthread_mutex_unlock(&lock);
    return result;
}

CUresult CUDAAPI cuMemHostAlloc(void **address, size_t bytes, unsigned int flags)
{
    count(2, 1);
    *address = malloc(bytes);
    return flags == 1 ? OK : INVALID;
}

CUresult CUDAAPI cuMemFreeHost(void *address)
{
    count(2, -1);
    free(address);
    return OK;
}

CUresult CUDAAPI cuMemAlloc_v2(CUdeviceptr *address, size_t bytes)
{
    if (!depth)
        return NO_CONTEXT;
    count(3, 1);
    *address = (CUdeviceptr)(uintptr_t)malloc(bytes);
    return OK;
}

CUresult CUDAAPI cuMemFree_v2(CUdeviceptr address)
{
    count(3, -1);
    free((void *)(uintptr_t)address);
    return OK;
}

static CUresult copy(uintptr_t target, uintptr_t source, size_t bytes, CUstream stream)
{
    if (!depth)
        return NO_CONTEXT;
    if (!stream || !bytes || !is_whole(source, bytes) || !is_whole(target, bytes))
        return INVALID;
    memcpy((void *)target, (const void *)source, bytes);
    return OK;
}

CUresult CUDAAPI cuMemcpyHtoDAsync_v2(
    CUdeviceptr target, const void *source, size_t bytes, CUstream stream)
{
    return copy((uintptr_t)target, (uintptr_t)source, bytes, stream);
}

CUresult CUDAAPI cuMemcpyDtoHAsync_v2(
    void *target, CUdeviceptr source, size_t bytes, CUstream stream)
{
    return copy((uintptr_t)target, (uintptr_t)source, bytes, stream);
}

static CUresult copy_batch(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes, size_t total,
    CUmemcpyAttributes *attributes, size_t *indices, size_t attribute_count, CUstream stream)
{
    if (!total || attribute_count != 1 || indices[0] || attributes->flags)
        return INVALID;
    if (attributes->srcAccessOrder != ORDER_STREAM && attributes->srcAccessOrder != ORDER_ANY)
        return INVALID;
    for (size_t i = 0; i < total; ++i) {
        int is_load = is_registered((uintptr_t)sources[i], sizes[i]);
        if (is_load != (attributes->srcAccessOrder == ORDER_ANY))
            return INVALID; /* a store has to read in the order of its stream */
        CUresult result = copy((uintptr_t)targets[i], (uintptr_t)sources[i], sizes[i], stream);
        if (result)
            return result;
    }
    pthread_mutex_lock(&lock);
    ++batches;
    pieces += (long long)total;
    pthread_mutex_unlock(&lock);
    return OK;
}

CUresult CUDAAPI cuMemcpyBatchAsync(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes,
    size_t total, CUmemcpyAttributes *attributes, size_t *indices, size_t attribute_count,
    size_t *failed, CUstream stream)
{
    *failed = SIZE_MAX;
    return copy_batch(targets, sources, sizes, total, attributes, indices, attribute_count, stream);
}

CUresult CUDAAPI cuMemcpyBatchAsync_v2(CUdeviceptr *targets, CUdeviceptr *sources, size_t *sizes,
    size_t total, CUmemcpyAttributes *attributes, size_t *indices, size_t attribute_count,
    CUstream stream)
{
    return copy_batch(targets, sources, sizes, total, attributes, indices, attribute_count, stream);
}
