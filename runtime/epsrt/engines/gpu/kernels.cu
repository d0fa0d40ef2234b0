// What runs on the device beside the engine: a sample's beginning, each step's noise, the search for NaN.
//
// The same noise as epsrt.noise: Philox4x32-10 keyed by the seed, counter (element / 4, n, stream, index), and Box-Muller
// in float32 without fast-math. Lanes lie along x of the grid, the elements of a lane along y: a thread strides, since a
// grid has no more than 65,535 blocks there. Compiled by NVRTC; plain enough (no shared memory, no warp intrinsics) that
// the tests compile it as C++ and run it on a CPU.

typedef unsigned int uint32;
typedef unsigned long long uint64;

#define THREADS 256

struct Four {
    uint32 r[4];
};

// Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011
__device__ Four philox(uint32 c0, uint32 c1, uint32 c2, uint32 c3, uint64 key) {
    uint32 k0 = (uint32)key, k1 = (uint32)(key >> 32);
    for (int round = 0; round < 10; ++round) {
        uint32 high0 = __umulhi(0xD2511F53u, c0), low0 = 0xD2511F53u * c0;
        uint32 high1 = __umulhi(0xCD9E8D57u, c2), low1 = 0xCD9E8D57u * c2;
        c0 = high1 ^ c1 ^ k0;
        c1 = low1;
        c2 = high0 ^ c3 ^ k1;
        c3 = low0;
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return Four{{c0, c1, c2, c3}};
}

// u = ((r >> 9) + 1/2) / 2^23 is exact; the angle's word is read as signed, so that it lies in (-pi, pi): the same angle.
__device__ void box_muller(uint32 r0, uint32 r1, float* z0, float* z1) {
    float u0 = ((float)(r0 >> 9) + 0.5f) * 1.1920928955078125e-7f;
    float half_turns = ((float)((int)r1 >> 9) + 0.5f) * 2.384185791015625e-7f;
    float radius = sqrtf(-2.0f * logf(u0)), sine, cosine;
    sincospif(half_turns, &sine, &cosine);
    *z0 = radius * cosine;
    *z1 = radius * sine;
}

// The four normals of one counter
__device__ void normals(uint32 counter, uint32 n, uint32 stream, uint32 index, uint64 seed, float z[4]) {
    Four words = philox(counter, n, stream, index, seed);
    box_muller(words.r[0], words.r[1], &z[0], &z[1]);
    box_muller(words.r[2], words.r[3], &z[2], &z[3]);
}

// z [lanes, size] of a stream (epsrt.noise) for the lanes whose row has a coefficient of it that is not 0 in `column`;
// the others keep finite numbers, which a 0 drops.
extern "C" __global__ void __launch_bounds__(THREADS)
noise(float* z, const float* rows, const uint64* seeds, const uint32* indices, int size, int columns, int column,
      int column_n, uint32 stream) {
    int lane = blockIdx.x;
    const float* row = rows + (long long)lane * columns;
    if (row[column] == 0.0f) return;
    float* to = z + (long long)lane * size;
    for (uint32 counter = blockIdx.y * THREADS + threadIdx.x; 4ll * counter < size; counter += gridDim.y * THREADS) {
        float drawn[4];
        normals(counter, (uint32)row[column_n], stream, indices[lane], seeds[lane], drawn);
        for (int i = 0; i < 4; ++i)
            if (4ll * counter + i < size) to[4ll * counter + i] = drawn[i];
    }
}

// A sample that a lane begins with; epsrt.engines.gpu.arrivals fills it.
struct Begin {
    uint64 seed;
    long long label, target;
    uint32 index, stream;
    int lane;
    float signal, scale;  // x = signal * init + scale * z
    int init;             // which of images, or -1 for zeros
    int known;            // likewise; the mask follows it
    int unused;
};

// begins[blockIdx.x] into its lane: x, m = 0, x0 = 0, what else the graph takes, and what noise and check need to know.
// labels, targets, and known and mask together, are null where the graph takes none.
extern "C" __global__ void __launch_bounds__(THREADS)
begin(float* x, float* m, float* x0, uint64* seeds, uint32* indices, int* broken_step, long long* labels,
      long long* targets, float* known, float* mask, const Begin* begins, const float* images, int size) {
    Begin b = begins[blockIdx.x];
    uint32 first = blockIdx.y * THREADS + threadIdx.x;
    if (first == 0) {
        seeds[b.lane] = b.seed;
        indices[b.lane] = b.index;
        broken_step[b.lane] = 0;
        if (labels) labels[b.lane] = b.label;
        if (targets) targets[b.lane] = b.target;
    }
    for (uint32 counter = first; 4ll * counter < size; counter += gridDim.y * THREADS) {
        float drawn[4] = {0.0f, 0.0f, 0.0f, 0.0f};
        if (b.scale != 0.0f) normals(counter, 0, b.stream, b.index, b.seed, drawn);
        for (int i = 0; i < 4; ++i) {
            long long element = 4ll * counter + i;
            if (element >= size) return;
            float value = b.scale * drawn[i];
            if (b.init >= 0 && b.signal != 0.0f) value += b.signal * images[(long long)b.init * size + element];
            long long at = (long long)b.lane * size + element;
            x[at] = value;
            m[at] = 0.0f;
            x0[at] = 0.0f;
            if (mask) {
                known[at] = b.known >= 0 ? images[(long long)b.known * size + element] : 0.0f;
                mask[at] = b.known >= 0 ? images[(b.known + 1ll) * size + element] : 0.0f;
            }
        }
    }
}

// Note in broken_step and broken_t the first step (1, 2, ...) after which a lane's x holds NaN or infinity, and its t.
extern "C" __global__ void __launch_bounds__(THREADS)
check(const float* x, const float* rows, const int* steps, int* broken_step, float* broken_t, int size, int columns,
      int column_t) {
    int lane = blockIdx.x;
    bool finite = true;
    for (long long i = blockIdx.y * THREADS + threadIdx.x; i < size; i += (long long)gridDim.y * THREADS)
        finite = finite && isfinite(x[(long long)lane * size + i]);
    if (!finite && atomicCAS(&broken_step[lane], 0, steps[lane]) == 0)
        broken_t[lane] = rows[(long long)lane * columns + column_t];
}
