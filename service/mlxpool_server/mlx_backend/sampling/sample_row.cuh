// Samples one row of logits with one block, all of whose threads call these functions.
//
// `cuda.py` puts in front of it: `block.cuh`, COIN, SMALLEST_WEIGHT and `Facts`. Thresholds are
// found digit by digit of the weights' bits (radix select), which order as the weights do; nothing
// is sorted.

namespace mlxpool {

// The mass of a weight of 1, the likeliest word's: 2**40.
constexpr float WHOLE = 1099511627776.0f;

// Splitmix64 of a place in the sequence of `seed`, as `sampling/row.py` has it.
__device__ inline float uniform(Mass seed, unsigned position) {
  Mass mixed = seed + (position + 1ull) * 0x9E3779B97F4A7C15ull;
  mixed = (mixed ^ mixed >> 30) * 0xBF58476D1CE4E5B9ull;
  mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EBull;
  mixed ^= mixed >> 31;
  return (static_cast<float>(mixed >> 41) + 0.5f) / 8388608.0f;
}

// ---------------------------------------------------------------- logits and weights

// Bits that order as the numbers do: zeros are equal, and what is no number is above all.
__device__ inline unsigned ordered(float value) {
  const unsigned bits = __float_as_uint(value + 0.0f);
  if (value != value) {
    return 0xffffffffu;
  }
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}

// A word's place among others: the likelier is greater, of equal ones the first.
__device__ inline Mass rank_of(float logit, int word) {
  return static_cast<Mass>(ordered(logit)) << 32 | static_cast<unsigned>(~word);
}

__device__ inline int likeliest(Mass own_best, Shared& shared) {
  return ~static_cast<int>(static_cast<unsigned>(block_reduce(own_best, shared, Max())));
}

__device__ inline int likeliest(const float* logits, int size, Shared& shared) {
  Mass best = 0;
  EACH_WORD(word, size) {
    best = max(best, rank_of(logits[word], word));
  }
  return likeliest(best, shared);
}

__device__ inline Mass mass_of(float weight) {
  // What a filter took has a weight below 0, and no mass.
  return weight > 0.0f ? static_cast<Mass>(weight * WHOLE) : 0;
}

// Probabilities over the likeliest word's; below 0 where a filter took the word.
struct Weights {
  float* logits;
  int size;
  float top;

  __device__ float operator()(int word) const {
    return logits[word] == -INFINITY ? -1.0f : expf(logits[word] - top);
  }

  __device__ void take(int word) const { logits[word] = -INFINITY; }
};

// ---------------------------------------------------------------- bias and penalties

// What is added to the logits of some words.
struct Bias {
  const int* words;
  const float* values;
  int count;
};

// Tokens that penalties look at, the last ones of `tokens`; an id behind the vocabulary is none.
struct Context {
  const int* tokens;
  int begin;
  int end;
};

__device__ inline void add_bias(float* logits, Bias bias) {
  for (int place = threadIdx.x; place < bias.count; place += THREADS) {
    logits[bias.words[place]] += bias.values[place];
  }
  __syncthreads();
}

// `times`: a number for each word, of which only those in the context are looked at.
__device__ inline void penalize(
    float* logits, int size, const Facts& facts, Context context, int* times) {
  for (int place = context.begin + threadIdx.x; place < context.end; place += THREADS) {
    if (context.tokens[place] < size) {
      times[context.tokens[place]] = 0;
    }
  }
  __syncthreads();
  for (int place = context.begin + threadIdx.x; place < context.end; place += THREADS) {
    if (context.tokens[place] < size) {
      atomicAdd(&times[context.tokens[place]], 1);
    }
  }
  __syncthreads();
  for (int place = context.begin + threadIdx.x; place < context.end; place += THREADS) {
    const int word = context.tokens[place];
    // Whoever finds the count takes it: each word once.
    const int count = word < size ? atomicExch(&times[word], 0) : 0;
    if (count) {
      const float logit = logits[word];
      logits[word] = (logit < 0.0f ? logit * facts.repetition : logit / facts.repetition)
          - facts.presence - facts.frequency * count;
    }
  }
  __syncthreads();
}

// ---------------------------------------------------------------- borders

// Digits of a weight's bits, the highest first.
constexpr int DIGITS = 3;
__device__ inline int shift_of(int digit) { return digit == 0 ? 19 : digit == 1 ? 8 : 0; }
__device__ inline unsigned width_of(int digit) { return digit == 2 ? 255 : 2047; }

// The smallest weight that all greater ones leave below a limit: its bits, as far as they are
// known, how much the greater ones are, and how many words have it.
struct Border {
  unsigned bits;
  Mass above;
  int count;

  __device__ float weight() const { return __uint_as_float(bits); }
};

// Counts all words whose higher digits are the border's, but none with a weight below 0.
__device__ inline void count_digit(
    Histogram& bins, const Weights& weights, const Border& border, int digit) {
  const int shift = shift_of(digit);
  const int higher = digit == 0 ? 31 : shift_of(digit - 1);
  __syncthreads();
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
    bins.low[bin] = 0;
    bins.high[bin] = 0;
    bins.counts[bin] = 0;
  }
  __syncthreads();
  EACH_WORD(word, weights.size) {
    const float weight = weights(word);
    const unsigned bits = __float_as_uint(weight);
    if (weight >= 0.0f && (digit == 0 || bits >> higher == border.bits >> higher)) {
      bins.add(bits >> shift & width_of(digit), mass_of(weight));
    }
  }
  __syncthreads();
}

// Learns a border's next digit from what was counted; `amount(bin)` is what is limited.
template <typename Amount>
__device__ void learn_digit(
    Border& border, int digit, Mass limit, Shared& shared, Amount amount) {
  const Place place = place_at(
      BINS, BINS - 1, shared, [&](int place) { return amount(BINS - 1 - place); },
      // Fewer words than the limit are left to their last one.
      [&](Mass total) { return max(min(limit - border.above, total), Mass(1)); });
  const unsigned bin = BINS - 1 - place.number;
  border.bits |= bin << shift_of(digit);
  border.above += place.before;
  border.count = shared.bins.counts[bin];
}

template <typename Amount>
__device__ void learn_other_digits(
    Border& border, const Weights& weights, Mass limit, Shared& shared, Amount amount) {
  for (int digit = 1; digit < DIGITS; ++digit) {
    count_digit(shared.bins, weights, border, digit);
    learn_digit(border, digit, limit, shared, amount);
  }
}

// ---------------------------------------------------------------- filters

// What they leave: weights that reach `floor`, and of those equal to `least` the words up to `last`.
struct Kept {
  float floor;
  float least;
  int last;

  __device__ bool operator()(float weight, int word) const {
    return weight >= floor && (weight > least || (weight == least && word <= last));
  }
};

// How much the words that top_p keeps have to have together; the first digit has been counted.
__device__ inline Mass top_p_mass(double top_p, Shared& shared) {
  Mass mass = 0;
  for (int bin = threadIdx.x; bin < BINS; bin += THREADS) {
    mass += shared.bins.mass(bin);
  }
  mass = block_reduce(mass, shared, Sum());
  // Some word always stays, though the product may underflow.
  return max(static_cast<Mass>(ceil(top_p * static_cast<double>(mass))), Mass(1));
}

// Takes all words below the floor, and the top choices but the least likely of them.
__device__ inline void take_top_choices(
    const Weights& weights, float floor, float threshold, Shared& shared) {
  Mass left = 0;
  EACH_WORD(word, weights.size) {
    const float weight = weights(word);
    if (weight < floor) {
      weights.take(word);
    } else {
      left += mass_of(weight);
    }
  }
  left = block_reduce(left, shared, Sum());
  const float limit = fmaxf(threshold * (static_cast<float>(left) / WHOLE), SMALLEST_WEIGHT);
  // Of positive floats the bits order as they do.
  Mass bits = __float_as_uint(INFINITY);
  EACH_WORD(word, weights.size) {
    const float weight = weights(word);
    if (weight > limit) {
      bits = min(bits, static_cast<Mass>(__float_as_uint(weight)));
    }
  }
  bits = block_reduce(bits, shared, Min());
  const float least_choice = __uint_as_float(static_cast<unsigned>(bits));
  EACH_WORD(word, weights.size) {
    if (weights(word) > least_choice) {
      weights.take(word);
    }
  }
}

// top_p, min_p, xtc and top_k, in this order; where xtc strikes it takes words for good.
__device__ inline Kept filtered(
    const Weights& weights, const Facts& facts, bool strikes, Shared& shared) {
  const auto mass_in = [&](int bin) { return shared.bins.mass(bin); };
  const auto count_in = [&](int bin) { return static_cast<Mass>(shared.bins.counts[bin]); };
  Kept kept = {facts.min_p, 0.0f, weights.size};
  const bool has_top_p = facts.top_p < 1.0f;
  const Mass top_k = facts.top_k;
  // Of the largest weights that top_p leaves the largest few are those of all, so that they share
  // the count of the first digit; unless xtc takes some between them.
  const bool shares_count = top_k > 0 && !strikes;
  Border by_mass = {0, 0, 0};
  Border by_count = {0, 0, 0};
  Mass mass = 0;
  if (has_top_p || shares_count) {
    count_digit(shared.bins, weights, by_mass, 0);
  }
  if (has_top_p) {
    mass = top_p_mass(facts.top_p, shared);
    learn_digit(by_mass, 0, mass, shared, mass_in);
  }
  if (shares_count) {
    learn_digit(by_count, 0, top_k, shared, count_in);
  }
  if (has_top_p) {
    learn_other_digits(by_mass, weights, mass, shared, mass_in);
    kept.floor = fmaxf(kept.floor, by_mass.weight());
  }
  if (strikes) {
    take_top_choices(weights, kept.floor, facts.xtc_threshold, shared);
  }
  if (top_k > 0) {
    if (strikes) {
      count_digit(shared.bins, weights, by_count, 0);
      learn_digit(by_count, 0, top_k, shared, count_in);
    }
    learn_other_digits(by_count, weights, top_k, shared, count_in);
    kept.least = by_count.weight();
    // Of equal ones the first stay.
    if (by_count.above + by_count.count > top_k) {
      const auto is_equal = [&](int word) -> Mass { return weights(word) == kept.least; };
      const auto quota = [&](Mass) { return top_k - by_count.above; };
      kept.last = place_at(weights.size, weights.size, shared, is_equal, quota).number;
    }
  }
  return kept;
}

// ---------------------------------------------------------------- the draw

// The word at which the running sum of `weight_of(word)` reaches `number` of the whole sum.
template <typename Weight>
__device__ int drawn(int size, int otherwise, double number, Shared& shared, Weight weight_of) {
  const auto mass_at = [&](int word) { return mass_of(weight_of(word)); };
  const auto share = [&](Mass total) {
    return max(static_cast<Mass>(ceil(number * static_cast<double>(total))), Mass(1));
  };
  return place_at(size, otherwise, shared, mass_at, share).number;
}

// One word of a row; `adjusted` and `times` are room for as many numbers as there are words.
template <typename T>
__device__ int sample_row(
    const T* logits, int size, const Facts& facts, Mass seed, unsigned position, Bias bias,
    Context context, float* adjusted, int* times) {
  __shared__ Shared shared;
  Mass own_best = 0;
  EACH_WORD(word, size) {
    adjusted[word] = static_cast<float>(logits[word]);
    own_best = max(own_best, rank_of(adjusted[word], word));
  }
  int best = likeliest(own_best, shared);
  if (bias.count > 0 || context.begin < context.end) {
    add_bias(adjusted, bias);
    penalize(adjusted, size, facts, context, times);
    best = likeliest(adjusted, size, shared);
  }
  // Beside a logit that is no number, or infinite, nothing has a probability.
  if (facts.is_greedy != 0.0f || !(fabsf(adjusted[best]) < INFINITY)) {
    return best;
  }
  const double number = uniform(seed, position);
  const float inverse_temperature = 1.0f / facts.temperature;
  if (facts.is_filtered == 0.0f) {
    const float top = adjusted[best];
    return drawn(size, best, number, shared, [&](int word) {
      return expf((adjusted[word] - top) * inverse_temperature);
    });
  }
  const Weights weights = {adjusted, size, adjusted[best]};
  const bool strikes = uniform(seed ^ COIN, position) < facts.xtc_probability;
  const Kept kept = filtered(weights, facts, strikes, shared);
  if (strikes) {
    // It may have taken the likeliest.
    best = likeliest(adjusted, size, shared);
  }
  const float top = adjusted[best];
  return drawn(size, best, number, shared, [&](int word) {
    return kept(weights(word), word) ? expf((adjusted[word] - top) * inverse_temperature) : 0.0f;
  });
}

// The tokens that the next step's penalties look at: the end of these and the one that was chosen.
__device__ inline void append(const int* tokens, int held, int chosen, int* next, int next_size) {
  for (int place = threadIdx.x; place < next_size; place += THREADS) {
    const int from = held + 1 - next_size + place;
    next[place] = from == held ? chosen : tokens[from];
  }
}

} // namespace mlxpool
