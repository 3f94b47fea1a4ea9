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

// A place, and the sum of the amounts before it.
struct Place {
  int number;
  Mass before;
};

// The place from 0 to `size` that brings the running sum of `amount(place)` to a target, which is
// at least 1 and at most the whole sum: `target_of` that. `otherwise` where nothing does.
template <typename Amount, typename Target>
__device__ Place place_at(
    int size, int otherwise, Mass* scratch, Place* found, Amount amount, Target target_of) {
  const int warp = threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  int begin = 0;
  int end = size;
  Mass before = 0;
  Mass target = 0;
  // A warp adds up a part of them, then a part of the part in which the place is.
  for (int level = 0; level < 2; ++level) {
    const int length = (end - begin + WARPS * 32 - 1) / (WARPS * 32) * 32;
    const int stop = min(end, begin + (warp + 1) * length);
    Mass own = 0;
    for (int place = begin + warp * length + lane; place < stop; place += 32) {
      own += amount(place);
    }
    for (int distance = 16; distance > 0; distance /= 2) {
      own += __shfl_xor_sync(0xffffffffu, own, distance);
    }
    __syncthreads();
    if (lane == 0) {
      scratch[warp] = own;
    }
    __syncthreads();
    if (level == 0) {
      Mass total = 0;
      for (int other = 0; other < WARPS; ++other) {
        total += scratch[other];
      }
      target = target_of(total);
    }
    int part = 0;
    while (part < WARPS - 1 && before + scratch[part] < target) {
      before += scratch[part];
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
        *found = {place, before + reached - own};
      }
      before += __shfl_sync(0xffffffffu, reached, 31);
    }
    if (!there && lane == 0) {
      *found = {otherwise, 0};
    }
  }
  __syncthreads();
  const Place place = *found;
  __syncthreads();
  return place;
}

// Digits of a weight's bits, the highest first.
__device__ inline int shift_of(int digit) { return digit == 0 ? 19 : digit == 1 ? 8 : 0; }
__device__ inline unsigned width_of(int digit) { return digit == 2 ? 255 : 2047; }

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

  // Of all words whose higher digits are those of `prefix`, but of none with a weight below 0.
  template <typename Weight>
  __device__ void count(int size, int digit, unsigned prefix, Weight weight_of) {
    const int shift = shift_of(digit);
    const int higher = digit == 0 ? 31 : shift_of(digit - 1);
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += WARPS * 32) {
      low[bin] = 0;
      high[bin] = 0;
      counts[bin] = 0;
    }
    __syncthreads();
    EACH_WORD(word) {
      const float weight = weight_of(word);
      const unsigned bits = __float_as_uint(weight);
      if (weight >= 0.0f && (digit == 0 || bits >> higher == prefix >> higher)) {
        add(bits >> shift & width_of(digit), mass_of(weight));
      }
    }
    __syncthreads();
  }
};

// The smallest weight that all greater ones leave below a limit: its bits, as far as they are
// known, how much the greater ones are, and how many words have it.
struct Border {
  unsigned bits;
  Mass above;
  int count;
};

// Learns a border's next digit; `amount` is what a bin adds to what is limited.
template <typename Amount>
__device__ Border with_digit(
    Border border, int digit, Mass limit, const Histogram& bins, Mass* scratch, Place* found,
    Amount amount) {
  const Place place = place_at(
      BINS, BINS - 1, scratch, found, [&](int place) { return amount(BINS - 1 - place); },
      // Fewer words than the limit are left to their last one.
      [&](Mass total) { return max(min(limit - border.above, total), Mass(1)); });
  const unsigned bin = BINS - 1 - place.number;
  return {
      border.bits | bin << shift_of(digit), border.above + place.before, bins.counts[bin]};
}

} // namespace mlx::core::cu
"""

SOURCE = """
  __shared__ Histogram bins;
  __shared__ Mass scratch[WARPS];
  __shared__ Place found;

  const int row = blockIdx.x;
  const Mass seed = static_cast<Mass>(draws[row * 3 + 2]) << 32 | draws[row * 3 + 1];
  const unsigned position = draws[row * 3];
  const int size = logits_shape[1];
  const float* fact = facts + row * NUM_FACTS;
  float* own = adjusted + static_cast<long long>(row) * size;
  const T* given = logits + static_cast<long long>(row) * size;
  constexpr int THREADS = WARPS * 32;

  // ---- the likeliest, of equal ones the first: its bits in order, and its place from behind
  Mass best = 0;
  const auto consider = [&](int word) {
    best = max(best, static_cast<Mass>(ordered(own[word])) << 32 | static_cast<unsigned>(~word));
  };
  EACH_WORD(word) {
    own[word] = static_cast<float>(given[word]);
    consider(word);
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
  if (fact[NUM_BIASES] != 0.0f || fact[CONTEXT_SIZE] != 0.0f) {
    best = 0;
    EACH_WORD(word) {
      consider(word);
    }
  }
  best = block_reduce(best, scratch, [](Mass a, Mass b) { return a > b ? a : b; });
  const int likeliest = ~static_cast<int>(static_cast<unsigned>(best));
  int chosen = likeliest;

  // Beside a logit that is no number, or infinite, nothing has a probability.
  const float top = own[likeliest];
  if (fact[IS_GREEDY] == 0.0f && fabsf(top) < INFINITY) {
    // The probability over the likeliest word's; below 0 where a filter took the word.
    const auto weight_of = [&](int word) {
      return own[word] == -INFINITY ? -1.0f : expf(own[word] - top);
    };
    const auto mass_in = [&](int bin) { return bins.mass(bin); };
    const auto count_in = [&](int bin) { return static_cast<Mass>(bins.counts[bin]); };
    // What stays: weights that reach `floor`, and of those equal to `least` the words up to `last`.
    const bool is_filtered = fact[IS_FILTERED] != 0.0f;
    float floor = fact[MIN_P];
    float least = 0.0f;
    int last = size;
    float highest = top;
    if (is_filtered) {
      const bool has_top_p = fact[TOP_P] < 1.0f;
      const Mass top_k = fact[TOP_K];
      const bool has_top_k = top_k > 0;
      const bool strikes = uniform(seed ^ COIN, position) < fact[XTC_PROBABILITY];
      Border by_mass = {0, 0, 0};
      Border by_count = {0, 0, 0};
      if (has_top_p || (has_top_k && !strikes)) {
        bins.count(size, 0, 0, weight_of);
      }
      Mass limit = 0;
      if (has_top_p) {
        Mass mass = 0;
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
          mass += bins.mass(bin);
        }
        mass = block_reduce(mass, scratch, add_mass);
        // Some word always stays, though the product may underflow.
        const double top_p = fact[TOP_P];
        limit = max(static_cast<Mass>(ceil(top_p * static_cast<double>(mass))), Mass(1));
        by_mass = with_digit(by_mass, 0, limit, bins, scratch, &found, mass_in);
      }
      if (has_top_k && !strikes) {
        // Of the largest weights that stay the largest few are those of all.
        by_count = with_digit(by_count, 0, top_k, bins, scratch, &found, count_in);
      }
      if (has_top_p) {
        for (int digit = 1; digit < 3; ++digit) {
          bins.count(size, digit, by_mass.bits, weight_of);
          by_mass = with_digit(by_mass, digit, limit, bins, scratch, &found, mass_in);
        }
        floor = fmaxf(floor, __uint_as_float(by_mass.bits));
      }
      if (strikes) {
        EACH_WORD(word) {
          own[word] = weight_of(word) >= floor ? own[word] : -INFINITY;
        }
        Mass left = 0;
        EACH_WORD(word) {
          left += mass_of(weight_of(word));
        }
        left = block_reduce(left, scratch, add_mass);
        // At least the smallest normal number: what is below may be 0 elsewhere.
        const float threshold = fmaxf(
            fact[XTC_THRESHOLD] * (static_cast<float>(left) / 1099511627776.0f), 1.17549435e-38f);
        // Of positive floats the bits order as they do.
        Mass lowest_bits = __float_as_uint(INFINITY);
        EACH_WORD(word) {
          if (weight_of(word) > threshold) {
            lowest_bits = min(
                lowest_bits, static_cast<Mass>(__float_as_uint(weight_of(word))));
          }
        }
        lowest_bits = block_reduce(
            lowest_bits, scratch, [](Mass a, Mass b) { return a < b ? a : b; });
        const float most = __uint_as_float(static_cast<unsigned>(lowest_bits));
        EACH_WORD(word) {
          own[word] = weight_of(word) > most ? -INFINITY : own[word];
        }
        // It may have taken the likeliest.
        Mass peak = 0;
        EACH_WORD(word) {
          peak = max(peak, static_cast<Mass>(ordered(own[word])));
        }
        peak = block_reduce(peak, scratch, [](Mass a, Mass b) { return a > b ? a : b; });
        highest = unordered(static_cast<unsigned>(peak));
        if (has_top_k) {
          bins.count(size, 0, 0, weight_of);
          by_count = with_digit(by_count, 0, top_k, bins, scratch, &found, count_in);
        }
      }
      if (has_top_k) {
        for (int digit = 1; digit < 3; ++digit) {
          bins.count(size, digit, by_count.bits, weight_of);
          by_count = with_digit(by_count, digit, top_k, bins, scratch, &found, count_in);
        }
        least = __uint_as_float(by_count.bits);
        // Of equal ones the first stay.
        if (by_count.above + by_count.count > top_k) {
          const auto is_equal = [&](int word) -> Mass { return weight_of(word) == least; };
          const auto quota = [&](Mass) { return top_k - by_count.above; };
          last = place_at(size, size, scratch, &found, is_equal, quota).number;
        }
      }
    }

    // ---- draw at the row's own temperature
    const float coldness = 1.0f / fact[TEMPERATURE];
    const auto is_kept = [&](int word) {
      const float weight = weight_of(word);
      return weight >= floor && (weight > least || (weight == least && word <= last));
    };
    const auto heated = [&](int word) -> Mass {
      const bool counts = !is_filtered || is_kept(word);
      return counts ? mass_of(expf((own[word] - highest) * coldness)) : 0;
    };
    const double number = uniform(seed, position);
    const auto share = [&](Mass total) {
      return max(static_cast<Mass>(ceil(number * static_cast<double>(total))), Mass(1));
    };
    chosen = place_at(size, likeliest, scratch, &found, heated, share).number;
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
