// Products of up to 64 rows with a large kernel, and the attention between them, on Hopper; what
// they compute, `rows.py` and `attention.py` say.
//
// Such a product takes as long as its kernel takes to arrive from memory. So a block asks for all
// of its weights at once, straight into the registers from which the tensor cores read them, and
// for nothing else before: where launches may overlap, they come while the launch before still
// runs. The rows are the other operand, in shared memory, where bulk copies put them as they lie.
// A product is of 64 outputs and N rows: outputs x rows, not rows x outputs.
//
// Packed rows are in the order in which the tensor cores read them, [K / 32, 4, N, 8]: element k of
// a row is at (k / 32, k % 8 / 2, row, k % 32 / 8 * 2 + k % 2). A thread's 16 bytes of weights are
// 8 inputs of one output. As the operand of two steps of 16 inputs each they stand for those inputs
// in an order of their own; the rows are in that order too.
//
// Attention is such a product, too: of keys with queries, which are packed in tiles of 16.
//
// Compiled with ROWS and SHARED (bytes of shared memory), after `multiply`.

typedef unsigned char byte;
typedef unsigned short bf16;
typedef unsigned int u32;
typedef unsigned long long u64;

constexpr int N = (ROWS + 7) / 8 * 8, TILES = N / 8;  // of 8 rows
constexpr int GROUPS = 2, COMPUTING = 128 * GROUPS, THREADS = COMPUTING + 128;
constexpr int CHUNK = 64 * GROUPS, CHUNK_BYTES = CHUNK * N * 2;  // inputs that arrive together
constexpr int HALF_TILES = (TILES + 1) / 2;  // what the first warpgroup finishes
constexpr int BLOCKS = 4, BLOCK_TILES = (TILES + BLOCKS - 1) / BLOCKS;  // of a cluster
constexpr int QUERIES = 16;  // (token, head) pairs of a tile
constexpr float EPSILON = 1e-6f, LOG2_E = 1.4426950408889634f;
constexpr float MASKED_VALUE = -2.3819763e38f;  // of a logit, that of `attention.py`

extern __shared__ __align__(128) byte shared[];

// ------------------------------------------------------------------------------ instructions

__device__ __forceinline__ u32 address(const void *p) { return (u32)__cvta_generic_to_shared(p); }
__device__ __forceinline__ void after_last_launch() {
    asm volatile("griddepcontrol.wait;" ::: "memory");
}
__device__ __forceinline__ void let_next_launch() {
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
}
__device__ __forceinline__ uint4 load_once(const void *from) {
    uint4 v;
    asm volatile("ld.global.L1::no_allocate.L2::256B.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from) : "memory");
    return v;
}
__device__ __forceinline__ void start(u64 &barrier, u32 arrivals) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(address(&barrier)), "r"(arrivals));
}
__device__ __forceinline__ void started() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and has the barrier wait for so many bytes more.
__device__ __forceinline__ void expect(u64 &barrier, u32 bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;"
                 ::"r"(address(&barrier)), "r"(bytes) : "memory");
}
#define WAIT(scope) \
    asm volatile("{ .reg .pred done; again:\n" \
                 "mbarrier.try_wait.parity.acquire." scope ".shared::cta.b64 done, [%0], 0;\n" \
                 "@!done bra again; }" ::"r"(address(&barrier)) : "memory")
__device__ __forceinline__ void wait(u64 &barrier) { WAIT("cta"); }
__device__ __forceinline__ void wait_for_cluster(u64 &barrier) { WAIT("cluster"); }
__device__ __forceinline__ void arrive_in_cluster() {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void wait_for_all_of_cluster() {
    asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// A whole number of 16 bytes, aligned to them.
__device__ __forceinline__ void copy(void *to, const void *from, u32 bytes, u64 &barrier) {
    asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];"
                 ::"r"(address(to)), "l"(__cvta_generic_to_global(from)), "r"(bytes),
                   "r"(address(&barrier)) : "memory");
}
__device__ __forceinline__ u32 of_block(u32 place, int block) {
    u32 there;
    asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(there) : "r"(place), "r"(block));
    return there;
}
__device__ __forceinline__ void send(u32 to, const float *v, u32 barrier) {
    asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];"
                 ::"r"(to), "f"(v[0]), "f"(v[1]), "f"(v[2]), "f"(v[3]), "r"(barrier) : "memory");
}
__device__ __forceinline__ float low(u32 both) { return __uint_as_float(both << 16); }
__device__ __forceinline__ float high(u32 both) { return __uint_as_float(both & 0xffff0000u); }
__device__ __forceinline__ u32 pack(float low, float high) {
    u32 both;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));
    return both;
}
__device__ __forceinline__ bf16 rounded(float x) { return (bf16)pack(x, 0); }
__device__ __forceinline__ float all_lanes(float sum) {
#pragma unroll
    for (int lanes = 1; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    return sum;
}

// ------------------------------------------------------------------------------ parts of a launch

__device__ __forceinline__ int packed(int row, int k) {
    return ((k / 32 * 4 + k % 8 / 2) * N + row) * 8 + k % 32 / 8 * 2 + k % 2;
}

// Two warpgroups compute. The one after them brings everything but the weights, and leaves them its
// registers; the compiler does not know how many it keeps, parity_tests/test_packed_rows.py does.
constexpr int BRINGING_REGISTERS = 72, COMPUTING_REGISTERS = 216;
struct Thread {
    int group = __shfl_sync(~0u, threadIdx.x / 128, 0);
    int warp = __shfl_sync(~0u, threadIdx.x % 128 / 32, 0);
    int lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;

    __device__ __forceinline__ bool brings() const {
        if (group == GROUPS) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(BRINGING_REGISTERS));
        else asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(COMPUTING_REGISTERS));
        return group == GROUPS;
    }
};
__device__ __forceinline__ void all_that_compute() {
    asm volatile("bar.sync 2, %0;" ::"n"(COMPUTING) : "memory");
}

// What is brought: the rows of SPAN inputs, by chunks; `others` is whatever else a launch needs.
template <int SPAN> struct Incoming {
    static constexpr int CHUNKS = SPAN / CHUNK;
    bf16 rows[SPAN * N];
    u64 arrived[CHUNKS], others;

    // By the first warp that brings; so many threads then arrive at `others`, each once.
    __device__ __forceinline__ void start_barriers(u32 bringing) {
        if (threadIdx.x == COMPUTING) {
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) start(arrived[c], 1);
            start(others, bringing);
            started();
        }
        __syncwarp();
        asm volatile("bar.arrive 1, %0;" ::"n"(COMPUTING + 32) : "memory");
    }
    // By those that compute.
    __device__ __forceinline__ void wait_for_barriers() {
        asm volatile("bar.sync 1, %0;" ::"n"(COMPUTING + 32) : "memory");
    }
    // `from` is packed, and of the span's first input.
    __device__ __forceinline__ void bring_rows(const bf16 *from) {
        if (threadIdx.x % 32 == 0)
#pragma unroll
            for (int c = 0; c < CHUNKS; ++c) {
                expect(arrived[c], CHUNK_BYTES);
                copy(rows + c * CHUNK * N, from + c * CHUNK * N, CHUNK_BYTES, arrived[c]);
            }
    }
};

// 64 outputs x N rows over SPAN inputs, of which a warpgroup has every other 64.
template <int SPAN> struct Product {
    static constexpr int CHUNKS = SPAN / CHUNK;
    uint4 first[2 * CHUNKS], second[2 * CHUNKS];

    // `from` and `other` are a thread's two outputs' weights, of the span's first input.
    __device__ __forceinline__ Product(const Thread &at, const bf16 *from, const bf16 *other) {
        from += 64 * at.group + 8 * at.quad, other += 64 * at.group + 8 * at.quad;
#pragma unroll
        for (int i = 0; i < 2 * CHUNKS; ++i) {
            int k = i / 2 * CHUNK + i % 2 * 32;
            first[i] = load_once(from + k), second[i] = load_once(other + k);
        }
    }
    // In `d`, of tile j of 8 rows: two rows of one output, and of the other, at 4 j and on.
    __device__ __forceinline__ void compute(const Thread &at, Incoming<SPAN> &incoming, float (&d)[N / 2]) {
#pragma unroll
        for (int c = 0; c < CHUNKS; ++c) {
            wait(incoming.arrived[c]);
            asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const uint4 &a = first[2 * c + i / 2], &b = second[2 * c + i / 2];
                u32 place = address(incoming.rows + c * CHUNK * N) + (8 * at.group + 2 * i) * N * 16;
                // 8 rows follow each other at 128 bytes, 8 inputs at N * 16.
                u64 tile = (u64)((place & 0x3ffff) >> 4) | (u64)N << 16 | (u64)8 << 32;
                if (i % 2 == 0) multiply(d, a.x, b.x, a.y, b.y, tile, c + i > 0);
                else multiply(d, a.z, b.z, a.w, b.w, tile, 1);
            }
            asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
        }
        asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
    }
};

// The sum of both warpgroups' parts: of the first HALF_TILES tiles in the first, of the others in
// the second, there too from d[0] on.
struct Exchange {
    float4 parts[GROUPS][4][HALF_TILES][32];

    __device__ __forceinline__ void operator()(const Thread &at, float (&d)[N / 2]) {
        auto &mine = parts[at.group][at.warp], &theirs = parts[1 - at.group][at.warp];
        if (at.group == 0) {
#pragma unroll
            for (int j = HALF_TILES; j < TILES; ++j) mine[j - HALF_TILES][at.lane] = tile(d, j);
        } else {
#pragma unroll
            for (int j = 0; j < HALF_TILES; ++j) {
                mine[j][at.lane] = tile(d, j);
                if (j + HALF_TILES < TILES)
#pragma unroll
                    for (int i = 0; i < 4; ++i) d[4 * j + i] = d[4 * (j + HALF_TILES) + i];
            }
        }
        all_that_compute();
#pragma unroll
        for (int j = 0; j < HALF_TILES; ++j) {
            float4 y = theirs[j][at.lane];
            d[4 * j] += y.x, d[4 * j + 1] += y.y, d[4 * j + 2] += y.z, d[4 * j + 3] += y.w;
        }
    }
    static __device__ __forceinline__ float4 tile(const float (&d)[N / 2], int j) {
        return {d[4 * j], d[4 * j + 1], d[4 * j + 2], d[4 * j + 3]};
    }
};

// 1 / rms of each row, of the sums of their squares in up to 16 parts.
template <int PARTS> struct Norm {
    float squares[PARTS * ROWS + 3 & ~3], factors[64];

    // By the warp that brings; how many bytes a thread's copies have.
    __device__ __forceinline__ int bring(const float *from, u64 &barrier) {
        constexpr int BYTES = PARTS * ROWS * 4;
        int lane = threadIdx.x % 32;
        if (BYTES % 16 == 0) {
            if (lane == 0) copy(squares, from, BYTES, barrier);
            return lane == 0 ? BYTES : 0;
        }
#pragma unroll 1
        for (int i = lane; i < PARTS * ROWS; i += 32) squares[i] = __ldcg(from + i);
        return 0;
    }
    // By all that compute; to be read after their next barrier.
    __device__ __forceinline__ void compute(float inputs) {
        int row = threadIdx.x / 4;
        float sum = 0;
#pragma unroll
        for (int part = threadIdx.x % 4; part < PARTS; part += 4)
            if (row < ROWS) sum += squares[part * ROWS + row];
        sum += __shfl_xor_sync(~0u, sum, 1);
        sum += __shfl_xor_sync(~0u, sum, 2);
        if (threadIdx.x % 4 == 0) factors[row] = rsqrtf(sum / inputs + EPSILON);
    }
};

#define KERNEL __global__ void __launch_bounds__(THREADS, 1)

// ------------------------------------------------------------------------------ launches

// gelu(gate) * up, packed: x of WIDTH, kernel [2 * PLACES, WIDTH], added [2 * PLACES]; 32 places a
// block. A thread's two outputs are a gate and its up.
template <int WIDTH, int PARTS> struct Gated {
    Incoming<WIDTH> incoming;
    alignas(16) Norm<PARTS> norm;
    alignas(16) float added[2][32];
    alignas(16) Exchange exchange;
};
template <int WIDTH, int PARTS, int PLACES>
KERNEL gated(const bf16 *x, const float *squares, const bf16 *kernel, const float *added, bf16 *out) {
    using Here = Gated<WIDTH, PARTS>;
    static_assert(sizeof(Here) == SHARED, "");
    Here &here = *(Here *)shared;
    Thread at;
    if (at.brings()) {
        if (at.warp) return;
        here.incoming.start_barriers(32);
        int bytes = at.lane < 2 ? 128 : 0;
        if (bytes) copy(here.added[at.lane], added + PLACES * at.lane + 32 * blockIdx.x, bytes, here.incoming.others);
        let_next_launch();
        after_last_launch();
        here.incoming.bring_rows(x);
        bytes += here.norm.bring(squares, here.incoming.others);
        expect(here.incoming.others, bytes);
        return;
    }
    int column = 8 * at.warp + at.row, place = 32 * blockIdx.x + column;
    Product<WIDTH> product(at, kernel + (size_t)place * WIDTH, kernel + (size_t)(place + PLACES) * WIDTH);
    here.incoming.wait_for_barriers();
    float d[N / 2];
    product.compute(at, here.incoming, d);
    wait(here.incoming.others);
    here.norm.compute(WIDTH);
    here.exchange(at, d);
    bf16 *result = here.incoming.rows;  // whose rows have been read
    float gate_added = here.added[0][column], up_added = here.added[1][column];
#pragma unroll
    for (int j = 0; j < HALF_TILES; ++j) {
        int row = 8 * (at.group * HALF_TILES + j) + 2 * at.quad;
        if (row >= N) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float factor = here.norm.factors[row + e];
            float gate = d[4 * j + e] * factor + gate_added, up = d[4 * j + 2 + e] * factor + up_added;
            float u = 0.7978845608028654f * gate * (1 + 0.044715f * gate * gate);
            result[packed(row + e, column)] = rounded(__fdividef(gate, 1 + __expf(-2 * u)) * up);
        }
    }
    all_that_compute();
    // 32 places are adjacent in memory, packed.
    if (threadIdx.x < 4 * N) ((uint4 *)(out + 32 * N * blockIdx.x))[threadIdx.x] = ((uint4 *)result)[threadIdx.x];
}

// Queries, keys and values, queries and keys turned: 32 columns of a head's first half a block, and
// those that they are turned with. Of LENGTH tokens a sample the first is at PLACE of ROOM keys.
// Queries are [R, HEADS, HEAD_DIM]; or PACKED, in tiles of a sample's (token, head) pairs.
template <int WIDTH, int PARTS> struct Project {
    static constexpr int PITCH = 36;  // so that a warp reads from 32 banks
    Incoming<WIDTH> incoming;
    alignas(16) Norm<PARTS> norm;
    alignas(16) float added[2][32], turns[2][N][PITCH];
    alignas(16) Exchange exchange;
};
template <int WIDTH, int PARTS, int HEADS, int HEAD_DIM, int LENGTH, int ROOM, int PLACE, bool PACKED>
KERNEL project(const bf16 *x, const float *squares, const bf16 *kernel, const float *added,
               const float *cos, const float *sin, bf16 *query, bf16 *key, bf16 *value) {
    using Here = Project<WIDTH, PARTS>;
    static_assert(sizeof(Here) == SHARED, "");
    constexpr int HALF = HEAD_DIM / 2;
    Here &here = *(Here *)shared;
    Thread at;
    int head = blockIdx.x / (HALF / 32), begin = blockIdx.x % (HALF / 32) * 32;
    bool turned = head <= HEADS;
    if (at.brings()) {
        if (at.warp == 0) here.incoming.start_barriers(128);
        asm volatile("bar.sync 3, 128;" ::: "memory");
        int bytes = 0;
        if (at.warp == 0) {
            bytes = at.lane < 2 ? 128 : 0;
            const float *from = added + head * HEAD_DIM + HALF * at.lane + begin;
            if (bytes) copy(here.added[at.lane], from, bytes, here.incoming.others);
            let_next_launch();
            after_last_launch();
            here.incoming.bring_rows(x);
            bytes += here.norm.bring(squares, here.incoming.others);
        } else if (turned) {
#pragma unroll 4  // of what more would take, these threads have no registers
            for (int i = threadIdx.x - COMPUTING - 32; i < ROWS * 16; i += 96) {
                int row = i / 16, table = i / 8 % 2, column = i % 8 * 4;
                const float *from = (table ? sin : cos) + row * HALF + begin + column;
                *(float4 *)&here.turns[table][row][column] = __ldg((const float4 *)from);
            }
        }
        expect(here.incoming.others, bytes);
        return;
    }
    int column = 8 * at.warp + at.row;
    const bf16 *from = kernel + (size_t)(head * HEAD_DIM + begin + column) * WIDTH;
    Product<WIDTH> product(at, from, from + (size_t)HALF * WIDTH);
    here.incoming.wait_for_barriers();
    float d[N / 2];
    product.compute(at, here.incoming, d);
    wait(here.incoming.others);
    here.norm.compute(WIDTH);
    here.exchange(at, d);
    bool packs = PACKED && head < HEADS;
    int place = packs ? column % 8 / 2 * 8 + column / 8 * 2 + column % 2 : column;
    bf16 *result = here.incoming.rows;  // [2][N][40]; a pitch of 40 keeps 16 bytes together
    float first_added = here.added[0][column], second_added = here.added[1][column];
#pragma unroll
    for (int j = 0; j < HALF_TILES; ++j) {
        int row = 8 * (at.group * HALF_TILES + j) + 2 * at.quad;
        if (row >= N) break;
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            float factor = here.norm.factors[row + e];
            float a = d[4 * j + e] * factor + first_added, b = d[4 * j + 2 + e] * factor + second_added;
            float c = turned ? here.turns[0][row + e][column] : 1, s = turned ? here.turns[1][row + e][column] : 0;
            result[(row + e) * 40 + place] = rounded(a * c - b * s);
            result[(N + row + e) * 40 + place] = rounded(b * c + a * s);
        }
    }
    all_that_compute();
#pragma unroll
    for (int i = threadIdx.x; i < ROWS * 8; i += COMPUTING) {
        int row = i / 8, half = i / 4 % 2, eight = i % 4, sample = row / LENGTH, token = row % LENGTH;
        int first = half * HALF + begin;
        bf16 *to;
        if (packs) {
            int pair = token * HEADS + head;
            int tile = sample * ((LENGTH * HEADS + QUERIES - 1) / QUERIES) + pair / QUERIES;
            to = query + tile * QUERIES * HEAD_DIM + ((first / 32 * 4 + eight) * QUERIES + pair % QUERIES) * 8;
        } else if (head < HEADS) {
            to = query + (row * HEADS + head) * HEAD_DIM + first + 8 * eight;
        } else {
            size_t place = ((size_t)sample * ROOM + PLACE + token) * HEAD_DIM;
            to = (head == HEADS ? key : value) + place + first + 8 * eight;
        }
        *(uint4 *)to = *(const uint4 *)(result + (half * N + row) * 40 + 8 * eight);
    }
}

// residual + (x . kernel) * gate, and that times a scale, packed, and the sums of its squares: 64
// outputs a cluster of 4 blocks, each with a quarter of the INPUTS. Block b finishes the rows of
// tiles BLOCK_TILES * b and on. A thread's two outputs are neighbours.
template <int INPUTS> struct Merge {
    Incoming<INPUTS / BLOCKS> incoming;
    alignas(16) float4 parts[BLOCKS][4][BLOCK_TILES][32];
    Exchange exchange;
    float scale[64], sums[4][8 * BLOCK_TILES];
    alignas(16) bf16 gate[64], residual[8 * BLOCK_TILES][64 + 8];
    u64 all_parts;
};
template <int INPUTS, int WIDTH>
__cluster_dims__(BLOCKS, 1, 1)
KERNEL merge(const bf16 *x, const bf16 *kernel, const bf16 *residual, const bf16 *gate, const float *scale,
             bf16 *out, bf16 *scaled, float *squares) {
    using Here = Merge<INPUTS>;
    static_assert(sizeof(Here) == SHARED, "");
    constexpr int SPAN = INPUTS / BLOCKS;
    Here &here = *(Here *)shared;
    Thread at;
    int cluster = blockIdx.x / BLOCKS, block = blockIdx.x % BLOCKS;
    if (at.brings()) {
        if (threadIdx.x == COMPUTING) {
            int tiles = max(min(BLOCK_TILES, TILES - block * BLOCK_TILES), 0);
            start(here.all_parts, 1);
            started();
            expect(here.all_parts, tiles * sizeof(here.parts) / BLOCK_TILES);
        }
        __syncwarp();
        arrive_in_cluster();
        if (at.warp == 0) {
            here.incoming.start_barriers(32);
            int bytes = 0, row = 8 * block * BLOCK_TILES + at.lane;
            u64 &others = here.incoming.others;
            if (at.lane == 30) copy(here.scale, scale + 64 * cluster, bytes = 256, others);
            if (at.lane == 31) copy(here.gate, gate + 64 * cluster, bytes = 128, others);
            let_next_launch();
            after_last_launch();
            here.incoming.bring_rows(x + block * SPAN * N);
            if (at.lane < 8 * BLOCK_TILES && row < ROWS)
                copy(here.residual[at.lane], residual + row * WIDTH + 64 * cluster, bytes = 128, others);
            expect(others, bytes);
            __syncwarp();
        }
        wait_for_all_of_cluster();
        return;
    }
    const bf16 *from = kernel + (size_t)(64 * cluster + 16 * at.warp + 2 * at.row) * INPUTS + block * SPAN;
    Product<SPAN> product(at, from, from + INPUTS);
    here.incoming.wait_for_barriers();
    arrive_in_cluster();
    float d[N / 2];
    product.compute(at, here.incoming, d);
    here.exchange(at, d);
    wait_for_all_of_cluster();
#pragma unroll
    for (int i = 0; i < HALF_TILES; ++i) {
        int j = at.group * HALF_TILES + i, there = j / BLOCK_TILES;
        if (j >= TILES) break;
        u32 to = address(&here.parts[block][at.warp][j % BLOCK_TILES][at.lane]);
        send(of_block(to, there), d + 4 * i, of_block(address(&here.all_parts), there));
    }
    wait(here.incoming.others);
    wait_for_cluster(here.all_parts);
    int tile = threadIdx.x / 32 % BLOCK_TILES, quarter = threadIdx.x / 32 / BLOCK_TILES;
    if (quarter < 4 && block * BLOCK_TILES + tile < TILES) {
        float4 y = here.parts[0][quarter][tile][at.lane];
#pragma unroll
        for (int p = 1; p < BLOCKS; ++p) {
            float4 z = here.parts[p][quarter][tile][at.lane];
            y.x += z.x, y.y += z.y, y.z += z.z, y.w += z.w;
        }
        int column = 16 * quarter + 2 * at.row;
        float first[2] = {y.x, y.y}, second[2] = {y.z, y.w};
        u32 g = *(const u32 *)(here.gate + column);
        float2 s = *(const float2 *)(here.scale + column);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
            int local = 8 * tile + 2 * at.quad + e, row = 8 * block * BLOCK_TILES + local;
            u32 before = *(const u32 *)(here.residual[local] + column);
            u32 both = pack(low(before) + first[e] * low(g), high(before) + second[e] * high(g));
            // What is normalised later is what is written, rounded.
            float a = low(both), b = high(both), sum = a * a + b * b;
            if (row < ROWS) {
                *(u32 *)(out + row * WIDTH + 64 * cluster + column) = both;
                *(u32 *)(scaled + packed(row, 64 * cluster + column)) = pack(a * s.x, b * s.y);
            }
#pragma unroll
            for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
            if (at.row == 0) here.sums[quarter][local] = sum;
        }
    }
    all_that_compute();
    int local = threadIdx.x, row = 8 * block * BLOCK_TILES + local;
    if (local < 8 * BLOCK_TILES && row < ROWS)
        squares[cluster * ROWS + row] =
            (here.sums[0][local] + here.sums[1][local]) + (here.sums[2][local] + here.sums[3][local]);
}

// Softmax attention of a tile of packed queries, all heads to the same KEYS of ROOM in memory, the
// last LENGTH of which a launch before this one has written; the result is packed. SHARING blocks, a
// cluster, take turns at 16 keys, which a warp of theirs has straight in registers; weights and
// values are multiplied by mma. A block finishes its share of the elements: it is sent everyone's
// sums of exponentials, and of values times them, over their own largest logit.
template <int DIM, int KEYS, int SHARING> struct Attend {
    static constexpr int PARTS = ((KEYS + 15) / 16 + SHARING - 1) / SHARING;  // of 16 keys, a block
    static constexpr int WARPS = (PARTS + 3) / 4 * 4, ELEMENTS = DIM / 32 / SHARING;  // 32 each
    bf16 query[QUERIES * DIM];
    alignas(16) bf16 value[16 * PARTS][DIM + 8], weights[QUERIES][16 * PARTS + 8];
    alignas(16) float4 totals[SHARING][ELEMENTS][2][2][32], extremes[SHARING][QUERIES];
    float tops[WARPS][QUERIES], sums[WARPS][QUERIES];
    u64 query_arrived, all_parts;
};
__device__ __forceinline__ float exp2_(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
// Four 8 x 8 matrices, a row of one at each lane's place.
#define LOAD_MATRICES(m, kind, place) \
    asm volatile("ldmatrix.sync.aligned.m8n8.x4" kind ".shared.b16 {%0, %1, %2, %3}, [%4];" \
                 : "=r"(m[0]), "=r"(m[1]), "=r"(m[2]), "=r"(m[3]) : "r"(address(place)) : "memory")
// Of 16 rows and 8 columns, the n-th of such: two rows' two columns a thread.
__device__ __forceinline__ void multiply_few(float (&d)[2][8], int n, const u32 (&a)[4], u32 b0, u32 b1) {
    asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
                 "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
                 : "+f"(d[0][2 * n]), "+f"(d[0][2 * n + 1]), "+f"(d[1][2 * n]), "+f"(d[1][2 * n + 1])
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
template <int HEADS, int DIM, int LENGTH, int KEYS, int ROOM, bool MASKED, int SHARING>
__cluster_dims__(SHARING, 1, 1)
__global__ void __launch_bounds__(32 * Attend<DIM, KEYS, SHARING>::WARPS, 1)
attend(const bf16 *query, const bf16 *key, const bf16 *value, const byte *mask, bf16 *out) {
    using Here = Attend<DIM, KEYS, SHARING>;
    static_assert(sizeof(Here) == SHARED, "");
    constexpr int PARTS = Here::PARTS, WARPS = Here::WARPS, ELEMENTS = Here::ELEMENTS;
    Here &here = *(Here *)shared;
    int warp = __shfl_sync(~0u, threadIdx.x / 32, 0), lane = threadIdx.x % 32, row = lane / 4, quad = lane % 4;
    int sample = blockIdx.y, tile = blockIdx.x / SHARING, block = blockIdx.x % SHARING;
    if (threadIdx.x == 0) {
        start(here.query_arrived, 1);
        start(here.all_parts, 1);
        started();
        expect(here.all_parts, sizeof(here.totals) + sizeof(here.extremes));
    }
    __syncthreads();
    arrive_in_cluster();
    key += (size_t)sample * ROOM * DIM, value += (size_t)sample * ROOM * DIM;

    // A thread has two of its warp's keys; and a row's share of their values, where registers are
    // left for that.
    constexpr bool AT_ONCE = WARPS <= 12;
    constexpr int SHARE = DIM / 8 / 32;  // 16 bytes of a row, a thread
    int begin = 16 * (block + SHARING * warp), keys[2] = {begin + row, begin + row + 8};
    uint4 first[DIM / 32] = {}, second[DIM / 32] = {}, values[16][SHARE];
    auto ask_values = [&] {
#pragma unroll
        for (int i = 0; i < 16; ++i)
#pragma unroll
            for (int j = 0; j < SHARE; ++j) {
                values[i][j] = {0, 0, 0, 0};
                if (begin + i < KEYS) values[i][j] = load_once(value + (begin + i) * DIM + 256 * j + 8 * lane);
            }
    };
    auto ask = [&] {
        const bf16 *from = key + min(keys[0], KEYS - 1) * DIM + 8 * quad;
        const bf16 *other = key + min(keys[1], KEYS - 1) * DIM + 8 * quad;
        if (begin < KEYS)
#pragma unroll
            for (int i = 0; i < DIM / 32; ++i) first[i] = load_once(from + 32 * i), second[i] = load_once(other + 32 * i);
        if (AT_ONCE) ask_values();
    };
    bool was_there = begin + 16 <= KEYS - LENGTH;
    if (was_there) ask();
    let_next_launch();
    after_last_launch();
    if (threadIdx.x == 0) {
        expect(here.query_arrived, sizeof(here.query));
        const bf16 *from = query + ((size_t)sample * (gridDim.x / SHARING) + tile) * QUERIES * DIM;
        copy(here.query, from, sizeof(here.query), here.query_arrived);
    }
    if (!was_there) ask();
    bool visible[2] = {true, true};
    if (MASKED)
        for (int i = 0; i < 2; ++i) visible[i] = mask[sample * KEYS + min(keys[i], KEYS - 1)];

    // Logits of two keys and four queries a thread: [2 tiles][2 keys][2 queries].
    float d[8];
    wait(here.query_arrived);
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
#pragma unroll
    for (int i = 0; i < DIM / 16; ++i) {
        const uint4 &a = first[i / 2], &b = second[i / 2];
        u32 place = address(here.query) + 2 * i * QUERIES * 16;
        u64 tile = (u64)((place & 0x3ffff) >> 4) | (u64)QUERIES << 16 | (u64)8 << 32;
        if (i % 2 == 0) multiply(d, a.x, b.x, a.y, b.y, tile, i > 0);
        else multiply(d, a.z, b.z, a.w, b.w, tile, 1);
    }
    asm volatile("wgmma.commit_group.sync.aligned;\nwgmma.wait_group.sync.aligned 0;" ::: "memory");
    if (!AT_ONCE) ask_values();
#pragma unroll
    for (int i = 0; i < 8; ++i) {
        int which = i / 2 % 2;
        d[i] = keys[which] >= KEYS ? -__int_as_float(0x7f800000) : !visible[which] ? MASKED_VALUE : d[i] * LOG2_E;
    }
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        float top = fmaxf(d[i / 2 * 4 + i % 2], d[i / 2 * 4 + 2 + i % 2]);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, lanes));
        if (row == 0) here.tops[warp][i / 2 * 8 + 2 * quad + i % 2] = top;
    }
    __syncthreads();
    // Of a block without any key the largest logit is below all that there are, its sums are 0.
    auto largest = [&](int column) {
        float top = 1.4f * MASKED_VALUE;
#pragma unroll
        for (int w = 0; w < WARPS; ++w) top = fmaxf(top, here.tops[w][column]);
        return top;
    };
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        int column = i / 2 * 8 + 2 * quad + i % 2;
        float top = largest(column), sum = 0;
#pragma unroll
        for (int which = 0; which < 2; ++which) {
            float weight = exp2_(d[i / 2 * 4 + 2 * which + i % 2] - top);
            sum += weight;
            if (warp < PARTS) here.weights[column][16 * warp + row + 8 * which] = rounded(weight);
        }
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
        if (row == 0) here.sums[warp][column] = sum;
    }
    if (warp < PARTS)
#pragma unroll
        for (int i = 0; i < 16; ++i)
#pragma unroll
            for (int j = 0; j < SHARE; ++j) *(uint4 *)&here.value[16 * warp + i][256 * j + 8 * lane] = values[i][j];
    wait_for_all_of_cluster();
    __syncthreads();

    u32 arrived = address(&here.all_parts);
    if (threadIdx.x < SHARING * QUERIES) {
        int column = threadIdx.x % QUERIES, there = threadIdx.x / QUERIES;
        float both[4] = {largest(column)};
#pragma unroll
        for (int w = 0; w < WARPS; ++w) both[1] += here.sums[w][column];
        send(of_block(address(&here.extremes[block][column]), there), both, of_block(arrived, there));
    }
    // 32 elements of the result a warp.
    for (int part = warp; part < ELEMENTS * SHARING; part += WARPS) {
        float total[2][8] = {};  // of two queries
#pragma unroll
        for (int k = 0; k < 16 * PARTS; k += 16) {
            u32 a[4], b[4];
            LOAD_MATRICES(a, "", &here.weights[lane % 16][k + lane / 16 * 8]);
#pragma unroll
            for (int n = 0; n < 4; n += 2) {
                LOAD_MATRICES(b, ".trans", &here.value[k + lane % 16][32 * part + 8 * n + lane / 16 * 8]);
                multiply_few(total, n, a, b[0], b[1]);
                multiply_few(total, n + 1, a, b[2], b[3]);
            }
        }
        int there = part / ELEMENTS;
        auto &to = here.totals[block][part % ELEMENTS];
#pragma unroll
        for (int i = 0; i < 4; ++i)
            send(of_block(address(&to[i / 2][i % 2][lane]), there), total[i / 2] + i % 2 * 4, of_block(arrived, there));
    }
    wait_for_cluster(here.all_parts);
    for (int i = warp; i < 2 * ELEMENTS; i += WARPS) {
        int which = i % 2, local = row + 8 * which, pair = QUERIES * tile + local;
        int token = pair / HEADS, head = pair % HEADS, part = ELEMENTS * block + i / 2;
        float top = here.extremes[0][local].x, sum = 0, total[8] = {};
#pragma unroll
        for (int p = 1; p < SHARING; ++p) top = fmaxf(top, here.extremes[p][local].x);
#pragma unroll
        for (int p = 0; p < SHARING; ++p) {
            float4 theirs = here.extremes[p][local];
            float factor = exp2_(theirs.x - top);
            sum += factor * theirs.y;
            float4 y = here.totals[p][i / 2][which][0][lane], z = here.totals[p][i / 2][which][1][lane];
            total[0] += factor * y.x, total[1] += factor * y.y, total[2] += factor * y.z, total[3] += factor * y.w;
            total[4] += factor * z.x, total[5] += factor * z.y, total[6] += factor * z.z, total[7] += factor * z.w;
        }
        // A thread's eight elements are adjacent in memory, packed.
        u32 both[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) both[n] = pack(total[2 * n] / sum, total[2 * n + 1] / sum);
        int place = (((head * DIM / 32 + part) * 4 + quad) * N + sample * LENGTH + token) * 8;
        if (token < LENGTH) *(uint4 *)(out + place) = {both[0], both[1], both[2], both[3]};
    }
}

// What lies between two steps: a block has an action, in float32 until its token is written. All of
// its weights are asked for before anything else.

// Tokens of noisy actions, as `rows.embed_actions`; what is scaled is packed. Two elements a thread.
template <int ACTIONS, int WIDTH>
__global__ void __launch_bounds__(WIDTH / 2)
embed_actions(const float *noisy, const float *kernel, const float *bias, const float *scale,
              bf16 *out, bf16 *scaled, float *squares) {
    int action = blockIdx.x, k = 2 * threadIdx.x;
    float2 weights[ACTIONS], y = *(const float2 *)(bias + k), s = *(const float2 *)(scale + k);
#pragma unroll
    for (int a = 0; a < ACTIONS; ++a) weights[a] = __ldg((const float2 *)(kernel + a * WIDTH + k));
    // In this order: what comes later may read what was written before the first of these launches.
    after_last_launch();
    let_next_launch();
    float given[ACTIONS];
#pragma unroll
    for (int a = 0; a < ACTIONS; a += 4) *(float4 *)(given + a) = __ldcg((const float4 *)(noisy + action * ACTIONS + a));
#pragma unroll
    for (int a = 0; a < ACTIONS; ++a) y.x += given[a] * weights[a].x, y.y += given[a] * weights[a].y;
    u32 both = pack(y.x, y.y);
    float first = low(both), second = high(both);
    *(u32 *)(out + action * WIDTH + k) = both;
    *(u32 *)(scaled + packed(action, k)) = pack(first * s.x, second * s.y);
    __shared__ float sums[WIDTH / 64];
    float sum = all_lanes(first * first + second * second);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
    __syncthreads();
    if (threadIdx.x) return;
#pragma unroll
    for (int w = 1; w < WIDTH / 64; ++w) sum += sums[w];
    squares[action] = sum;
}

// An Euler step, as `rows.euler_step`: a thread has four elements of the velocity, of ACTIONS / 2
// inputs. STEP is a float's bits.
template <int WIDTH, int PARTS, int ACTIONS, int STEP>
__global__ void __launch_bounds__(WIDTH / 2)
euler_step(const bf16 *x, const float *squares, const float *scale, const float *shift,
           const float *kernel, const float *bias, const float *noisy, float *out) {
    constexpr int COLUMNS = ACTIONS / 4, INPUTS = ACTIONS / 2;  // of threads; a thread's
    __shared__ __align__(16) float normed[WIDTH];
    __shared__ float sums[WIDTH / 64][ACTIONS];
    int action = blockIdx.x, k = 2 * threadIdx.x, lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int column = 4 * (threadIdx.x % COLUMNS), begin = threadIdx.x / COLUMNS * INPUTS;
    float2 scaled = *(const float2 *)(scale + k), shifted = *(const float2 *)(shift + k);
    float4 weights[INPUTS];
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) weights[i] = __ldg((const float4 *)(kernel + (begin + i) * ACTIONS + column));
    let_next_launch();
    after_last_launch();
    u32 both = __ldcg((const u32 *)(x + action * WIDTH + k));
    float factor = all_lanes(lane < PARTS ? __ldcg(squares + lane * ROWS + action) : 0);
    factor = rsqrtf(factor / WIDTH + EPSILON);
    // As the plain path rounds it.
    both = pack(low(both) * factor * scaled.x + shifted.x, high(both) * factor * scaled.y + shifted.y);
    *(float2 *)(normed + k) = {low(both), high(both)};
    __syncthreads();
    float4 y = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < INPUTS; ++i) {
        float each = normed[begin + i];
        y.x += each * weights[i].x, y.y += each * weights[i].y, y.z += each * weights[i].z, y.w += each * weights[i].w;
    }
#pragma unroll
    for (int lanes = COLUMNS; lanes < 32; lanes *= 2) {
        y.x += __shfl_xor_sync(~0u, y.x, lanes), y.y += __shfl_xor_sync(~0u, y.y, lanes);
        y.z += __shfl_xor_sync(~0u, y.z, lanes), y.w += __shfl_xor_sync(~0u, y.w, lanes);
    }
    if (lane < COLUMNS) *(float4 *)&sums[warp][column] = y;
    __syncthreads();
    int a = threadIdx.x, place = action * ACTIONS + a;
    if (a >= ACTIONS) return;
    float velocity = bias[a];
#pragma unroll
    for (int w = 0; w < WIDTH / 64; ++w) velocity += sums[w][a];
    out[place] = __ldcg(noisy + place) + __int_as_float(STEP) * velocity;
}
