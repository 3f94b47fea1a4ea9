// What the threads of one block find together. THREADS, 32 for each of its warps, is `cuda.py`'s.
//
// Masses are added up as integers, so that the order in which threads come says nothing about the
// sum: the same numbers give the same word whatever else the device does.

namespace mlxpool {

using Mass = unsigned long long;
constexpr int WARPS = THREADS / 32;
constexpr int BINS = 2048;

// Four words of a thread are on their way at once.
#define EACH_WORD(word, size) \
  _Pragma("unroll 4") for (int word = threadIdx.x; word < size; word += THREADS)

// A place, and the sum of the amounts before it.
struct Place {
  int number;
  Mass before;
};

// Of the words with one value of a digit: how many, and their mass in two halves, since shared
// memory adds up 32 bits by itself and 64 in a loop.
struct Histogram {
  unsigned low[BINS];
  unsigned high[BINS];
  int counts[BINS];

  __device__ Mass mass(int bin) const { return static_cast<Mass>(high[bin]) << 32 | low[bin]; }

  __device__ void add(unsigned bin, Mass mass) {
    const unsigned addend = static_cast<unsigned>(mass);
    const unsigned before = atomicAdd(&low[bin], addend);
    const unsigned carried = static_cast<unsigned>(mass >> 32) + (before + addend < before);
    if (carried) {
      atomicAdd(&high[bin], carried);
    }
    atomicAdd(&counts[bin], 1);
  }
};

// The block's own memory.
struct Shared {
  Histogram bins;
  Mass of_warps[WARPS];
  Place found;
};

struct Sum {
  __device__ Mass operator()(Mass one, Mass other) const { return one + other; }
};
struct Max {
  __device__ Mass operator()(Mass one, Mass other) const { return max(one, other); }
};
struct Min {
  __device__ Mass operator()(Mass one, Mass other) const { return min(one, other); }
};

template <typename Combine>
__device__ Mass warp_reduce(Mass value, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// Of a value of each thread of the block; the same for all of them.
template <typename Combine>
__device__ Mass block_reduce(Mass value, Shared& shared, Combine combine) {
  value = warp_reduce(value, combine);
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    shared.of_warps[threadIdx.x / 32] = value;
  }
  __syncthreads();
  return warp_reduce(shared.of_warps[threadIdx.x % 32], combine);
}

// The place from 0 to `size` that brings the running sum of `amount(place)` to a target, which is
// at least 1 and at most the whole sum: `target_of` that. `otherwise` where nothing does.
template <typename Amount, typename Target>
__device__ Place place_at(
    int size, int otherwise, Shared& shared, Amount amount, Target target_of) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int begin = 0;
  int end = size;
  Mass before = 0;
  Mass target = 0;
  // A warp adds up a part of them, then a part of the part in which the place is.
  for (int level = 0; level < 2; ++level) {
    const int length = (end - begin + THREADS - 1) / THREADS * 32;
    const int stop = min(end, begin + (warp + 1) * length);
    Mass own = 0;
    for (int place = begin + warp * length + lane; place < stop; place += 32) {
      own += amount(place);
    }
    own = warp_reduce(own, Sum());
    __syncthreads();
    if (lane == 0) {
      shared.of_warps[warp] = own;
    }
    __syncthreads();
    if (level == 0) {
      Mass total = 0;
      for (int other = 0; other < WARPS; ++other) {
        total += shared.of_warps[other];
      }
      target = target_of(total);
    }
    int part = 0;
    while (part < WARPS - 1 && before + shared.of_warps[part] < target) {
      before += shared.of_warps[part];
      ++part;
    }
    begin += part * length;
    end = min(end, begin + length);
  }
  if (warp == 0) {
    unsigned there = 0;
    for (int first = begin; first < end && !there; first += 32) {
      const int place = first + lane;
      const Mass own = place < end ? amount(place) : 0;
      Mass reached = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const Mass left = __shfl_up_sync(0xffffffffu, reached, distance);
        reached += lane >= distance ? left : 0;
      }
      there = __ballot_sync(0xffffffffu, before + reached >= target);
      if (there && lane == __ffs(there) - 1) {
        shared.found = {place, before + reached - own};
      }
      before += __shfl_sync(0xffffffffu, reached, 31);
    }
    if (!there && lane == 0) {
      shared.found = {otherwise, 0};
    }
  }
  __syncthreads();
  const Place place = shared.found;
  __syncthreads();
  return place;
}

} // namespace mlxpool
