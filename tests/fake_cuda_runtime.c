/* A CUDA runtime and driver for a card that is not there, so that PyTorch's own caching allocator can be watched.

   LD_PRELOAD puts these functions before those of libcudart, and a link named libcuda.so.1 stands for the driver. Memory
   of the card is address space of this process that nobody reserved; of each allocation only its size counts. Kernels
   are "launched" without effect, events are always over. FAKE_CARD_BYTES is the size of the card, FAKE_CARD_CONTEXT
   what a context takes of it. Everything is compiled from this file, which needs no header of CUDA's. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

enum { OK = 0, INVALID = 1, OUT_OF_MEMORY = 2, PAGE = 2 << 20, MOST = 65536 };

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static struct { char *start; size_t bytes; } held[MOST];
static int count, mallocs, frees;
static size_t total, used;
static __thread int last;

static void begin(void) {
    const char *size = getenv("FAKE_CARD_BYTES"), *context = getenv("FAKE_CARD_CONTEXT");
    if (total) return;
    total = size ? strtoull(size, 0, 10) : (size_t)12 << 30;
    used = context ? strtoull(context, 0, 10) : 0;
}

/* -- what tests ask -- */
void fake_counts(int *into) { into[0] = mallocs; into[1] = frees; }
void fake_others(size_t bytes) { begin(); used += bytes; }

/* -- memory -- */
int cudaMalloc(void **out, size_t bytes) {
    size_t room = (bytes + PAGE - 1) / PAGE * PAGE;
    char *start;
    pthread_mutex_lock(&lock);
    begin();
    *out = 0;
    if (used + room > total || count == MOST) {
        last = OUT_OF_MEMORY;
        pthread_mutex_unlock(&lock);
        return OUT_OF_MEMORY;
    }
    start = mmap(0, room + PAGE, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    *out = (void *)(((uintptr_t)start + PAGE - 1) / PAGE * PAGE);
    held[count].start = *out;
    held[count++].bytes = room;
    used += room;
    mallocs++;
    pthread_mutex_unlock(&lock);
    return OK;
}
int cudaFree(void *start) {
    int at, found = start ? INVALID : OK;
    pthread_mutex_lock(&lock);
    for (at = 0; at < count && found; at++)
        if (held[at].start == start) {
            munmap(start, held[at].bytes);
            used -= held[at].bytes;
            held[at] = held[--count];
            frees++;
            found = OK;
        }
    pthread_mutex_unlock(&lock);
    return found;
}
int cudaMemGetInfo(size_t *free, size_t *all) { begin(); *free = total - used; *all = total; return OK; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) { memcpy(to, from, n); return OK; }
int cudaMemsetAsync(void *to, int value, size_t n, void *s) { memset(to, value, n); return OK; }
int cudaPointerGetAttributes(int *into, void *p) { memset(into, 0, 32); *into = 2; return OK; }

/* -- the card -- */
static int describe(char *into) { /* the offsets of cudaDeviceProp, from CUDA 12 on */
    begin();
    memset(into, 0, 700);
    strcpy(into, "a card that is not there");
    *(size_t *)(into + 288) = total;
    *(size_t *)(into + 296) = 48 << 10;
    *(int *)(into + 308) = 32;
    *(int *)(into + 320) = 1024;
    *(int *)(into + 360) = 8; /* compute capability 8.9 */
    *(int *)(into + 364) = 9;
    *(int *)(into + 384) = *(int *)(into + 388) = 64;
    return OK;
}
int cudaGetDeviceProperties(void *into, int d) { return describe(into); }
int cudaGetDeviceProperties_v2(void *into, int d) { return describe(into); }
int cudaGetDeviceCount(int *n) { *n = 1; return OK; }
int cudaGetDevice(int *d) { *d = 0; return OK; }
int cudaDriverGetVersion(int *v) { *v = 13020; return OK; }
int cudaRuntimeGetVersion(int *v) { *v = 13000; return OK; }
int cudaDeviceGetStreamPriorityRange(int *a, int *b) { if (a) *a = 0; if (b) *b = -5; return OK; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 9 : a == 16 ? 64 : 0; return OK; }
int cudaDeviceCanAccessPeer(int *can, int a, int b) { *can = 0; return OK; }
int cudaGetLastError(void) { int error = last; last = OK; return error; }
int cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(int e) { return e == OUT_OF_MEMORY ? "out of memory" : "an error of the fake card"; }
const char *cudaGetErrorName(int e) { return "fake"; }

/* -- streams and events -- */
static int handle(void **out) { static uintptr_t next = 4096; *out = (void *)(next += 16); return OK; }
int cudaStreamCreateWithPriority(void **s, unsigned f, int p) { return handle(s); }
int cudaEventCreateWithFlags(void **e, unsigned f) { return handle(e); }
static int idle(int *status, unsigned long long *id) { *status = 0; if (id) *id = 0; return OK; }
int cudaStreamIsCapturing(void *s, int *status) { return idle(status, 0); }
int cudaStreamGetCaptureInfo(void *s, int *status, unsigned long long *id) { return idle(status, id); }
int cudaStreamGetCaptureInfo_v2(void *s, int *status, unsigned long long *id) { return idle(status, id); }
int cudaStreamGetCaptureInfo_v3(void *s, int *status, unsigned long long *id) { return idle(status, id); }

/* -- what is done at once, or never -- */
#define DONE(name) int name() { return OK; }
DONE(cudaSetDevice) DONE(cudaDeviceSynchronize) DONE(cudaStreamDestroy) DONE(cudaStreamQuery)
DONE(cudaStreamSynchronize) DONE(cudaStreamWaitEvent) DONE(cudaEventDestroy) DONE(cudaEventRecord)
DONE(cudaEventRecordWithFlags) DONE(cudaEventQuery) DONE(cudaEventSynchronize)
DONE(cudaThreadExchangeStreamCaptureMode) DONE(cudaLaunchKernel) DONE(cudaLaunchKernelExC)
DONE(cudaFuncSetAttribute) DONE(cuCtxSetCurrent) DONE(cuFuncGetAttribute) DONE(cuFuncSetAttribute)
DONE(cuFuncSetCacheConfig) DONE(cuLaunchCooperativeKernel) DONE(cuLaunchKernel) DONE(cuLinkAddData_v2)
DONE(cuLinkComplete) DONE(cuLinkCreate_v2) DONE(cuModuleGetFunction) DONE(cuModuleLoad) DONE(cuModuleLoadData)
DONE(cuModuleLoadDataEx) DONE(cuModuleUnload) DONE(cuOccupancyMaxActiveBlocksPerMultiprocessor)
DONE(cuPointerGetAttribute) DONE(cuTensorMapEncodeTiled)

/* -- the driver -- */
int cuCtxGetCurrent(void **context) { *context = (void *)1; return OK; }
int cuDeviceGet(int *d, int i) { *d = 0; return OK; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = 0; return OK; }
int cuDevicePrimaryCtxGetState(int d, unsigned *flags, int *active) { if (flags) *flags = 0; *active = 1; return OK; }
int cuGetErrorString(int e, const char **text) { *text = "an error of the fake card"; return OK; }
int cudaGetDriverEntryPointByVersion(const char *n, void **f, unsigned v, unsigned long long g, int *found) {
    *f = 0;
    if (found) *found = 1;
    return OK;
}
