"""A kernel that moves many small pieces at once, reading and writing pinned host memory directly.

One launch moves a whole part, where a copy engine pays for each piece. Each block of threads takes
pieces in turn; a thread has UNROLL loads under way before it stores any, because what limits a read
over PCIe is how much of it is under way (55 GB/s x 2 us are 110 kB; these are 512 KiB). Few blocks,
so that the model keeps its multiprocessors. No shared memory, no atomics; nothing is read that the
same launch writes.
"""

BLOCKS = 16  # multiprocessors that it takes from the model at most, of 132 of an H200
THREADS = 512
UNROLL = 4
KERNEL = "kvray_gather"

SOURCE = r"""
template <typename Word>
__device__ __forceinline__ void move_words(const unsigned long long source,
    const unsigned long long target, const unsigned long long bytes)
{
    const Word* __restrict__ from = reinterpret_cast<const Word*>(source);
    Word* __restrict__ to = reinterpret_cast<Word*>(target);
    const unsigned long long count = bytes / sizeof(Word);
    const unsigned long long step = blockDim.x;
    unsigned long long i = threadIdx.x;
    for (; i + (UNROLL - 1) * step < count; i += UNROLL * step) {
        Word words[UNROLL];
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            words[k] = __ldcs(from + i + k * step);
        }
#pragma unroll
        for (int k = 0; k < UNROLL; ++k) {
            __stcs(to + i + k * step, words[k]);
        }
    }
    for (; i < count; i += step) {
        __stcs(to + i, __ldcs(from + i));
    }
}

// pieces: count sources, then as many targets from `row` on, then as many sizes from 2 * row on.
extern "C" __global__ void __launch_bounds__(THREADS) kvray_gather(
    const unsigned long long* __restrict__ pieces, const unsigned int row, const unsigned int count)
{
    for (unsigned int piece = blockIdx.x; piece < count; piece += gridDim.x) {
        const unsigned long long source = pieces[piece];
        const unsigned long long target = pieces[row + piece];
        const unsigned long long bytes = pieces[2ull * row + piece];
        const unsigned long long odd = source | target | bytes;
        if ((odd & 15) == 0) {
            move_words<uint4>(source, target, bytes);
        } else if ((odd & 7) == 0) {
            move_words<unsigned long long>(source, target, bytes);
        } else if ((odd & 3) == 0) {
            move_words<unsigned int>(source, target, bytes);
        } else {
            move_words<unsigned char>(source, target, bytes);
        }
    }
}
"""


def compile_options() -> tuple[str, ...]:
    return (f"-DTHREADS={THREADS}", f"-DUNROLL={UNROLL}")


def grid_blocks(piece_count: int) -> int:
    return max(1, min(BLOCKS, piece_count))
