"""The CUDA kernel of `cuda.py`: one block of 32 warps samples one row.

Masses are added up as integers, 2**40 to the likeliest word's, so that the order in which threads
come says nothing about the sum: the same numbers give the same word whatever else the device does.
Thresholds are found digit by digit of the weights' bits (radix select), which order as the weights
do; nothing is sorted.
"""

# Places in a row of `facts`.
FACTS = (
    "temperature", "top_p", "min_p", "top_k", "is_filtered", "is_greedy", "num_biases",
    "context_size", "longest_context", "repetition", "presence", "frequency", "xtc_threshold",
    "xtc_probability",
)  # fmt: skip

HEADER = """
namespace mlx::core::cu {

using Mass = unsigned long long;
constexpr int WARPS = 32;
constexpr int BINS = 2048;

// Four words of a thread are on their way at once.
#define EACH_WORD(word) \\
  _Pragma("unroll 4") for (int word = threadIdx.x; word < size; word += WARPS * 32)

// Splitmix64 of a place in the sequence of `seed`, as `sampling/row.py` has it.
__device__ inline float uniform(Mass seed, unsigned position) {
  Mass mixed = seed + (position + 1ull) * 0x9E3779B97F4A7C15ull;
  mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9ull;
  mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBull;
  mixed ^= mixed >> 31;
  return (static_cast<float>(mixed >> 41) + 0.5f) / 8388608.0f;
}

// Of a value of each thread of the block; the same for all of them.
template <typename V, typename Combine>
__device__ V block_reduce(V value, V* scratch, Combine combine) {
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  __syncthreads();
  if (threadIdx.x % 32 == 0) {
    scratch[threadIdx.x / 32] = value;
  }
  __syncthreads();
  value = scratch[threadIdx.x % 32];
  for (int distance = 16; distance > 0; distance /= 2) {
    value = combine(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

__device__ inline Mass add_mass(Mass one, Mass other) { return one + other; }

__device__ inline Mass mass_of(float weight) {
  // What a filter took has a weight below 0, and no mass.
  return weight > 0.0f ? static_cast<Mass>(weight * 1099511627776.0f) : 0;
}

// Bits that order as the numbers do, negative ones too.
__device__ inline unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

__device__ inline float unordered(unsigned bits) {
  return __uint_as_float(bits & 0x80000000u ? bits & 0x7fffffffu : ~bits);
}

// Which of the words in their order brings the running sum of `amount(word)` to `target`, which is
// at least 1 and at most the whole sum.
template <typename Amount>
__device__ int word_at(int size, Mass target, Mass* scratch, int* answer, Amount amount) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  const int length = (size + WARPS * 32 - 1) / (WARPS * 32) * 32;
  const int begin = warp * length;
  const int end = min(size, begin + length);
  Mass own = 0;
  for (int word = begin + lane; word < end; word += 32) {
    own += amount(word);
  }
  for (int distance = 16; distance > 0; distance /= 2) {
    own += __shfl_xor_sync(0xffffffffu, own, distance);
  }
  __syncthreads();
  if (lane == 0) {
    scratch[warp] = own;
  }
  __syncthreads();
  Mass before = 0;
  for (int other = 0; other < warp; ++other) {
    before += scratch[other];
  }
  if (before < target && before + own >= target) {
    for (int first = begin; first < begin + length; first += 32) {
      const int word = first + lane;
      Mass reached = word < end ? amount(word) : 0;
      for (int distance = 1; distance < 32; distance *= 2) {
        const Mass left = __shfl_up_sync(0xffffffffu, reached, distance);
        reached += lane >= distance ? left : 0;
      }
      const unsigned there = __ballot_sync(0xffffffffu, before + reached >= target);
      if (there) {
        if (lane == 0) {
          *answer = first + __ffs(there) - 1;
        }
        break;
      }
      before += __shfl_sync(0xffffffffu, reached, 31);
    }
  }
  __syncthreads();
  return *answer;
}

// The smallest weight of which the `amount` of all greater ones is below `limit`, as bits. Of no
// word with a weight below 0 it takes notice.
template <typename Weight, typename Amount>
__device__ unsigned smallest_above(
    int size, double limit, Mass* sums, int* counts, unsigned* found, Mass* found_sum,
    Weight weight_of, Amount amount_of) {
  const int shifts[] = {19, 8, 0};
  const unsigned widths[] = {2047, 2047, 255};
  unsigned prefix = 0;
  Mass above = 0;
  for (int digit = 0; digit < 3; ++digit) {
    const int shift = shifts[digit];
    const int higher = digit == 0 ? 31 : shifts[digit - 1];
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += WARPS * 32) {
      sums[bin] = 0;
      counts[bin] = 0;
    }
    __syncthreads();
    EACH_WORD(word) {
      const float weight = weight_of(word);
      const unsigned bits = __float_as_uint(weight);
      if (weight >= 0.0f && (digit == 0 || bits >> higher == prefix >> higher)) {
        const unsigned bin = bits >> shift & widths[digit];
        atomicAdd(&sums[bin], amount_of(weight));
        atomicAdd(&counts[bin], 1);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {
      // A lane has 64 bins; lane 0 the highest ones.
      const int top = BINS - 1 - static_cast<int>(threadIdx.x) * 64;
      Mass own = 0;
      for (int bin = top; bin > top - 64; --bin) {
        own += sums[bin];
      }
      Mass before = own;
      for (int distance = 1; distance < 32; distance *= 2) {
        const Mass left = __shfl_up_sync(0xffffffffu, before, distance);
        before += threadIdx.x >= distance ? left : 0;
      }
      before = above + before - own;
      int lowest = -1;
      Mass before_lowest = 0;
      for (int bin = top; bin > top - 64; --bin) {
        if (counts[bin] && static_cast<double>(before) < limit) {
          lowest = bin;
          before_lowest = before;
        }
        before += sums[bin];
      }
      const unsigned there = __ballot_sync(0xffffffffu, lowest >= 0);
      if (there && threadIdx.x == 31 - __clz(there)) {
        *found = lowest;
        *found_sum = before_lowest;
      }
    }
    __syncthreads();
    prefix |= *found << shift;
    above = *found_sum;
  }
  return prefix;
}

} // namespace mlx::core::cu
"""

SOURCE = """
  __shared__ Mass sums[BINS];
  __shared__ int counts[BINS];
  __shared__ Mass scratch[WARPS];
  __shared__ Mass found_sum;
  __shared__ unsigned found;
  __shared__ int answer;

  const int row = blockIdx.x;
  const Mass seed = static_cast<Mass>(draws[row * 3 + 2]) << 32 | draws[row * 3 + 1];
  const unsigned position = draws[row * 3];
  const int size = logits_shape[1];
  const float* fact = facts + row * NUM_FACTS;
  float* own = adjusted + static_cast<long long>(row) * size;
  const T* given = logits + static_cast<long long>(row) * size;
  constexpr int THREADS = WARPS * 32;

  EACH_WORD(word) {
    own[word] = static_cast<float>(given[word]);
  }
  __syncthreads();

  // ---- bias, penalties
  const int num_biases = bias_words_shape[1];
  for (int place = threadIdx.x; place < static_cast<int>(fact[NUM_BIASES]); place += THREADS) {
    own[bias_words[row * num_biases + place]] += bias_values[row * num_biases + place];
  }
  const int held = context_shape[1];
  const int* seen = context + static_cast<long long>(row) * held;
  int* times = seen_times + static_cast<long long>(row) * size;
  const int start = max(0, held - static_cast<int>(fact[CONTEXT_SIZE]));
  for (int place = start + threadIdx.x; place < held; place += THREADS) {
    if (seen[place] < size) {
      times[seen[place]] = 0;
    }
  }
  __syncthreads();
  for (int place = start + threadIdx.x; place < held; place += THREADS) {
    if (seen[place] < size) {
      atomicAdd(&times[seen[place]], 1);
    }
  }
  __syncthreads();
  for (int place = start + threadIdx.x; place < held; place += THREADS) {
    const int word = seen[place];
    // Whoever finds the count takes it: each word once.
    const int count = word < size ? atomicExch(&times[word], 0) : 0;
    if (count) {
      const float value = own[word];
      own[word] = (value < 0.0f ? value * fact[REPETITION] : value / fact[REPETITION])
          - fact[PRESENCE] - fact[FREQUENCY] * count;
    }
  }
  __syncthreads();

  // ---- the likeliest, of equal ones the first: its bits in order, and its place from behind
  Mass best = 0;
  EACH_WORD(word) {
    best = max(best, static_cast<Mass>(ordered(own[word])) << 32 | static_cast<unsigned>(~word));
  }
  best = block_reduce(best, scratch, [](Mass a, Mass b) { return a > b ? a : b; });
  const int likeliest = ~static_cast<int>(static_cast<unsigned>(best));
  int chosen = likeliest;

  if (fact[IS_GREEDY] == 0.0f) {
    const float top = own[likeliest];
    // The probability over the likeliest word's; below 0 where a filter took the word.
    const auto weight_of = [&](int word) {
      return own[word] == -INFINITY ? -1.0f : expf(own[word] - top);
    };
    if (threadIdx.x == 0) {
      answer = likeliest;
      found = 0;
      found_sum = 0;
    }
    if (fact[IS_FILTERED] != 0.0f) {
      float floor = fact[MIN_P];
      if (fact[TOP_P] < 1.0f) {
        Mass mass = 0;
        EACH_WORD(word) {
          mass += mass_of(weight_of(word));
        }
        mass = block_reduce(mass, scratch, add_mass);
        // Some word always stays, though the product may underflow.
        const double limit =
            fmax(static_cast<double>(fact[TOP_P]) * static_cast<double>(mass), 0.5);
        floor = fmaxf(floor, __uint_as_float(smallest_above(
            size, limit, sums, counts, &found, &found_sum, weight_of, mass_of)));
      }
      EACH_WORD(word) {
        own[word] = weight_of(word) >= floor ? own[word] : -INFINITY;
      }
      if (uniform(seed ^ COIN, position) < fact[XTC_PROBABILITY]) {
        Mass left = 0;
        EACH_WORD(word) {
          left += mass_of(weight_of(word));
        }
        left = block_reduce(left, scratch, add_mass);
        // At least the smallest normal number: what is below may be 0 elsewhere.
        const float limit = fmaxf(
            fact[XTC_THRESHOLD] * (static_cast<float>(left) / 1099511627776.0f), 1.17549435e-38f);
        // Of positive floats the bits order as they do.
        Mass least = __float_as_uint(INFINITY);
        EACH_WORD(word) {
          if (weight_of(word) > limit) {
            least = min(least, static_cast<Mass>(__float_as_uint(weight_of(word))));
          }
        }
        least = block_reduce(least, scratch, [](Mass a, Mass b) { return a < b ? a : b; });
        const float most = __uint_as_float(static_cast<unsigned>(least));
        EACH_WORD(word) {
          own[word] = weight_of(word) > most ? -INFINITY : own[word];
        }
      }
      const int top_k = static_cast<int>(fact[TOP_K]);
      if (top_k > 0) {
        __syncthreads();
        const float kth = __uint_as_float(smallest_above(
            size, top_k, sums, counts, &found, &found_sum, weight_of,
            [](float) { return static_cast<Mass>(1); }));
        Mass equal = 0;
        Mass greater = 0;
        EACH_WORD(word) {
          equal += weight_of(word) == kth;
          greater += weight_of(word) > kth;
        }
        equal = block_reduce(equal, scratch, add_mass);
        greater = block_reduce(greater, scratch, add_mass);
        // Of equal ones the first stay.
        int last = size;
        if (greater + equal > top_k) {
          last = word_at(size, top_k - greater, scratch, &answer,
              [&](int word) { return static_cast<Mass>(weight_of(word) == kth); });
        }
        __syncthreads();
        EACH_WORD(word) {
          const float weight = weight_of(word);
          const bool is_kept = weight > kth || (weight == kth && word <= last);
          own[word] = is_kept ? own[word] : -INFINITY;
        }
        if (threadIdx.x == 0) {
          answer = likeliest;
        }
      }
    }

    // ---- draw at the row's own temperature
    __syncthreads();
    Mass peak = 0;
    EACH_WORD(word) {
      peak = max(peak, static_cast<Mass>(ordered(own[word])));
    }
    peak = block_reduce(peak, scratch, [](Mass a, Mass b) { return a > b ? a : b; });
    // xtc may have taken the likeliest.
    const float highest = unordered(static_cast<unsigned>(peak));
    const auto heated = [&](int word) {
      return mass_of(expf((own[word] - highest) / fact[TEMPERATURE]));
    };
    Mass total = 0;
    EACH_WORD(word) {
      total += heated(word);
    }
    total = block_reduce(total, scratch, add_mass);
    const double number = uniform(seed, position);
    const double target = ceil(number * static_cast<double>(total));
    chosen = word_at(size, target > 1.0 ? static_cast<Mass>(target) : 1, scratch, &answer, heated);
  }

  if (threadIdx.x == 0) {
    tokens[row] = chosen;
    next_draws[row * 3] = position + 1;
    next_draws[row * 3 + 1] = draws[row * 3 + 1];
    next_draws[row * 3 + 2] = draws[row * 3 + 2];
  }
  // ---- what the next step's penalties look at: the end of it
  const int next_size = min(held + 1, static_cast<int>(fact[LONGEST_CONTEXT]));
  for (int place = threadIdx.x; place < next_size; place += THREADS) {
    const int from = held + 1 - next_size + place;
    next_context[static_cast<long long>(row) * next_size + place] =
        from == held ? chosen : seen[from];
  }
"""
