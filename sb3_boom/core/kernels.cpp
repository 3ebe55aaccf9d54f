// A whole multi-layer perceptron, and its gradient, as one operation on a CPU: every thread takes some of the rows through
// all layers, so that what one layer writes is still in the cache when the next one reads it.
// kernels.py compiles and loads this; torch_layers.py has the same in torch and says what it means.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <algorithm>
#include <cstring>
#include <memory>
#include <tuple>
#include <vector>

// of the BLAS that torch itself is linked to; one thread's share when called inside of a parallel region
extern "C" void sgemm_(
    const char* transa, const char* transb, const int* m, const int* n, const int* k, const float* alpha, const float* a,
    const int* lda, const float* b, const int* ldb, const float* beta, float* c, const int* ldc);

// loops whose body is a lambda: as a function it would read its pointers anew in every round
#define INLINE inline __attribute__((always_inline))

namespace {

using at::Tensor;
using at::TensorList;
using Vec = at::vec::Vectorized<float>;
using OptionalTensor = const std::optional<Tensor>&;

constexpr float EPS = 1e-5f;       // of the LayerNorm
constexpr int64_t MIN_ROWS = 16;   // of a task: fewer would waste the matrix product
constexpr int64_t MAX_ROWS = 256;  // of a task: more would leave the cache
constexpr int64_t BLOCK_ROWS = 8;  // whose sums are made together

// ------------------------------------------------------------------------------------------------------------ vectors

// f(first feature, number of features) for every vector of a row
template <typename F>
INLINE void for_each_vec(int64_t n, const F& f) {
  int64_t j = 0;
  for (; j + Vec::size() <= n; j += Vec::size()) f(j, int64_t(Vec::size()));
  if (j < n) f(j, n - j);
}

inline Vec load(const float* p, int64_t count) {
  return count == Vec::size() ? Vec::loadu(p) : Vec::loadu(p, count);
}

inline void store(const Vec& v, float* p, int64_t count) {
  if (count == Vec::size())
    v.store(p);
  else
    v.store(p, count);
}

inline void add_to(float* p, const Vec& v, int64_t count) {
  store(load(p, count) + v, p, count);
}

inline Vec padded(const Vec& v, float padding, int64_t count) {
  return count == Vec::size() ? v : Vec::set(Vec(padding), v, count);
}

inline float sum(const Vec& v) {
  return at::vec::vec_reduce_all<float>([](const Vec& a, const Vec& b) { return a + b; }, v);
}

// sum of f(first feature, number of features), in four parts: one would wait for every addition's end
template <typename F>
INLINE float sum_over(int64_t n, const F& f) {
  Vec a(0.0f), b(0.0f), c(0.0f), d(0.0f);
  int64_t j = 0;
  for (; j + 4 * Vec::size() <= n; j += 4 * Vec::size()) {
    a = a + f(j, int64_t(Vec::size()));
    b = b + f(j + Vec::size(), int64_t(Vec::size()));
    c = c + f(j + 2 * Vec::size(), int64_t(Vec::size()));
    d = d + f(j + 3 * Vec::size(), int64_t(Vec::size()));
  }
  for (; j + Vec::size() <= n; j += Vec::size()) a = a + f(j, int64_t(Vec::size()));
  if (j < n) b = b + padded(f(j, n - j), 0.0f, n - j);
  return sum((a + b) + (c + d));
}

// zero where mask is false; one byte for each feature, and most of them true
inline void drop(float* h, const bool* mask, int64_t features) {
  for (int64_t first = 0; first < features; first += 8) {
    const int64_t end = std::min(first + 8, features);
    uint64_t eight = 0;
    std::memcpy(&eight, mask + first, end - first);
    if (eight == 0x0101010101010101) continue;
    for (int64_t j = first; j < end; ++j)
      if (!mask[j]) h[j] = 0.0f;
  }
}

// c [rows, out] = a [rows, in] b [out, in]^T
void product(const float* a, const float* b, float* c, int64_t rows, int64_t out, int64_t in) {
  const int m = out, n = rows, k = in;
  const float one = 1.0f, zero = 0.0f;
  sgemm_("T", "N", &m, &n, &k, &one, b, &k, a, &k, &zero, c, &m);
}

// c [rows, in] = a [rows, out] b [out, in], added to what is there if so asked
void product_of_gradient(const float* a, const float* b, float* c, int64_t rows, int64_t out, int64_t in, bool add) {
  const int m = in, n = rows, k = out;
  const float one = 1.0f, beta = add ? 1.0f : 0.0f;
  sgemm_("N", "N", &m, &n, &k, &one, b, &m, a, &k, &beta, c, &m);
}

// columns [first, first + count) of c [out, in] = a [rows, out]^T b [rows, in]
void product_of_weight(
    const float* a, const float* b, float* c, int64_t rows, int64_t out, int64_t in, int64_t first, int64_t count) {
  const int m = in, n = count, k = rows, lda = out;
  const float one = 1.0f, zero = 0.0f;
  sgemm_("N", "T", &m, &n, &k, &one, b, &m, a + first, &lda, &zero, c + first * in, &m);
}

// -------------------------------------------------------------------------------------------------- one row of a layer

// softmax over groups of neighbours, in place. The groups' loops are plain ones: a group may be shorter than a vector.
INLINE void softmax_groups(float* u, int64_t features, int64_t group) {
  for (float* p = u; p < u + features; p += group) {
    float highest = p[0];
    for (int64_t j = 1; j < group; ++j) highest = std::max(highest, p[j]);
    for (int64_t j = 0; j < group; ++j) p[j] -= highest;
  }
  for_each_vec(features, [&](int64_t j, int64_t count) { store(load(u + j, count).exp_u20(), u + j, count); });
  for (float* p = u; p < u + features; p += group) {
    float total = p[0];
    for (int64_t j = 1; j < group; ++j) total += p[j];
    const float scale = 1.0f / total;
    for (int64_t j = 0; j < group; ++j) p[j] *= scale;
  }
}

// g <- y (g - sum over the group of g y): through that softmax
void softmax_groups_backward(const float* y, float* g, int64_t features, int64_t group) {
  for (int64_t first = 0; first < features; first += group) {
    float along = 0.0f;
    for (int64_t j = first; j < first + group; ++j) along += y[j] * g[j];
    for (int64_t j = first; j < first + group; ++j) g[j] = y[j] * (g[j] - along);
  }
}

struct Moments {
  float mean, inverse;  // 1 / std
};

// Bias and dropout, and what LayerNorm needs to know of the row.
Moments moments(float* h, const float* bias, const bool* mask, int64_t features) {
  for_each_vec(features, [&](int64_t j, int64_t count) { add_to(h + j, load(bias + j, count), count); });
  if (mask) drop(h, mask, features);
  const float mean = sum_over(features, [&](int64_t j, int64_t count) { return load(h + j, count); }) / features;
  const float variance = sum_over(features, [&](int64_t j, int64_t count) {
    const Vec v = load(h + j, count) - Vec(mean);
    return v * v;
  }) / features;
  return {mean, 1.0f / std::sqrt(variance + EPS)};
}

// LayerNorm, then Mish if so asked; h becomes the normalised row, and `slope` Mish's, where there is a place for it.
void norm(
    float* h, float* y, float* slope, const Moments& of_row, const float* weight, const float* shift, int64_t features,
    bool mish) {
  const Vec mean(of_row.mean), inverse(of_row.inverse);
  for_each_vec(features, [&](int64_t j, int64_t count) {
    const Vec unit = (load(h + j, count) - mean) * inverse;
    const Vec u = at::vec::fmadd(unit, load(weight + j, count), load(shift + j, count));
    if (!mish) {
      store(unit, h + j, count);
      store(u, y + j, count);
      return;
    }
    const Vec ex = at::vec::clamp_max(u, Vec(20.0f)).exp_u20();  // minimum() is slow with AVX-512
    const Vec n = at::vec::fmadd(ex, ex, ex + ex);
    const Vec q = Vec(1.0f) / (n + Vec(2.0f));
    store(u * n * q, y + j, count);
    if (slope) {
      store(unit, h + j, count);
      store(q * at::vec::fmadd(Vec(4.0f) * u * q, at::vec::fmadd(ex, ex, ex), n), slope + j, count);
    }
  });
}

// g, the gradient of what norm() returned, becomes that of h; the parameters' are added to theirs.
void norm_backward(
    float* g, const float* unit, const float* slope, float inverse, const float* weight, const bool* mask,
    float* of_bias, float* of_weight, float* of_shift, int64_t features) {
  Vec total(0.0f), along(0.0f);
  for_each_vec(features, [&](int64_t j, int64_t count) {
    Vec of_u = load(g + j, count);
    if (slope) of_u = of_u * load(slope + j, count);
    const Vec unit_j = load(unit + j, count), scaled = of_u * load(weight + j, count);
    if (of_bias) {
      add_to(of_shift + j, of_u, count);
      add_to(of_weight + j, of_u * unit_j, count);
    }
    store(scaled, g + j, count);
    total = total + scaled;
    along = along + scaled * unit_j;
  });
  const Vec mean(sum(total) / features), slant(sum(along) / features), inverse_std(inverse);
  for_each_vec(features, [&](int64_t j, int64_t count) {
    store(inverse_std * (load(g + j, count) - mean - load(unit + j, count) * slant), g + j, count);
  });
  if (mask) drop(g, mask, features);
  if (of_bias) for_each_vec(features, [&](int64_t j, int64_t count) { add_to(of_bias + j, load(g + j, count), count); });
}

// --------------------------------------------------------------------------------------------------------- the network

std::vector<const float*> pointers(TensorList tensors) {
  std::vector<const float*> result;
  for (const Tensor& t : tensors) {
    TORCH_CHECK(t.is_contiguous(), "parameters must be contiguous");
    result.push_back(t.const_data_ptr<float>());
  }
  return result;
}

// Shapes, and where each layer's share of the tensor `saved` begins: its output (the last one's is y itself), the
// normalised rows, Mish's slope, 1 / std.
struct Shape {
  int64_t members, rows, layers, normed;
  bool shared;  // one input for all members
  std::vector<int64_t> in, out, output, unit, slope, inverse;
  int64_t saved = 0, vectors = 0, chunk, tasks;
  std::vector<int64_t> selected;  // which of the parameters' members

  Shape(const Tensor& x, TensorList weights, size_t norms, OptionalTensor members_) {
    layers = weights.size();
    normed = norms;
    const bool ensemble = weights[0].dim() == 3;
    if (members_.has_value()) {
      const int64_t* m = members_->const_data_ptr<int64_t>();
      selected.assign(m, m + members_->numel());
    } else {
      for (int64_t e = 0; e < (ensemble ? weights[0].size(0) : 1); ++e) selected.push_back(e);
    }
    for (int64_t e : selected) TORCH_CHECK(e >= 0 && e < (ensemble ? weights[0].size(0) : 1), "no such member");
    members = selected.size();
    shared = x.dim() == 2;
    TORCH_CHECK(x.is_contiguous() && (shared || x.size(0) == members));
    rows = x.size(-2);
    for (const Tensor& w : weights) {
      out.push_back(w.size(-2));
      in.push_back(w.size(-1));
    }
    TORCH_CHECK(x.size(-1) == in[0]);
    const auto take = [&](int64_t n) { return (saved += n) - n; };
    for (int64_t l = 0; l < layers; ++l) {
      const int64_t n = members * rows * out[l];
      const bool has_norm = l < normed, last = l + 1 == layers;
      output.push_back(last ? 0 : take(n));
      unit.push_back(has_norm ? take(n) : 0);
      slope.push_back(has_norm && !last ? take(n) : 0);
      inverse.push_back(has_norm ? take(members * rows) : 0);
      vectors += out[l] * (has_norm ? 3 : 1);
    }
    tasks = std::max<int64_t>(std::min<int64_t>(at::get_num_threads(), rows / MIN_ROWS), 1);
    while ((rows + tasks - 1) / tasks > MAX_ROWS) tasks += at::get_num_threads();
    chunk = std::max<int64_t>((rows + tasks - 1) / tasks, 1);
    tasks = (rows + chunk - 1) / chunk;
  }

  int64_t widest() const { return *std::max_element(out.begin(), out.end()); }
};

// x [M, K] or [m, M, K]; weights [n, out, in] or, of a single network, [out, in]. The last layer has no LayerNorm, or one
// followed by a softmax over groups (none for group 0); the others have LayerNorm and Mish. `mask` is the first layer's
// dropout. `members` selects m of the n networks. Returns y [m, M, out] and, if so asked, what the gradient needs.
std::tuple<Tensor, Tensor> mlp(
    const Tensor& x, TensorList weights, TensorList biases, TensorList norm_weights, TensorList norm_shifts,
    OptionalTensor mask, OptionalTensor members, int64_t group, bool keep) {
  const Shape s(x, weights, norm_weights.size(), members);
  Tensor y = at::empty({s.members, s.rows, s.out.back()}, x.options());
  Tensor saved = at::empty({keep ? s.saved : 0}, x.options());
  const auto w = pointers(weights), b = pointers(biases), nw = pointers(norm_weights), ns = pointers(norm_shifts);
  TORCH_CHECK(!mask.has_value() || mask->is_contiguous());
  const float* x_ = x.const_data_ptr<float>();
  const bool* mask_ = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  float *y_ = y.data_ptr<float>(), *saved_ = saved.data_ptr<float>();

  at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t size = keep ? 0 : s.chunk * s.widest();
    const std::unique_ptr<float[]> scratch(new float[2 * size]);
    for (int64_t first = begin * s.chunk; first < std::min(end * s.chunk, s.rows); first += s.chunk) {
      const int64_t count = std::min(s.chunk, s.rows - first);
      for (int64_t i = 0; i < s.members; ++i) {
        const int64_t e = s.selected[i], row = i * s.rows + first;
        const float* input = x_ + (s.shared ? first : row) * s.in[0];
        for (int64_t l = 0; l < s.layers; ++l) {
          const int64_t out = s.out[l];
          const bool last = l + 1 == s.layers, has_norm = l < s.normed;
          float* y_l = last ? y_ + row * out : keep ? saved_ + s.output[l] + row * out : scratch.get();
          float* h = !has_norm ? y_l : keep ? saved_ + s.unit[l] + row * out : scratch.get() + size;
          const float* bias = b[l] + e * out;
          product(input, w[l] + e * out * s.in[l], h, count, out, s.in[l]);
          if (!has_norm) {
            for (int64_t r = 0; r < count; ++r)
              for_each_vec(out, [&](int64_t j, int64_t n) { add_to(h + r * out + j, load(bias + j, n), n); });
          } else {
            // a few rows' sums before their norms: the processor does not wait for each sum's end
            for (int64_t block = 0; block < count; block += BLOCK_ROWS) {
              Moments of_row[BLOCK_ROWS];
              const int64_t block_end = std::min(block + BLOCK_ROWS, count);
              for (int64_t r = block; r < block_end; ++r)
                of_row[r - block] = moments(
                    h + r * out, bias, mask_ && l == 0 ? mask_ + (row + r) * out : nullptr, out);
              for (int64_t r = block; r < block_end; ++r) {
                float* slope = keep && !last ? saved_ + s.slope[l] + (row + r) * out : nullptr;
                norm(h + r * out, y_l + r * out, slope, of_row[r - block], nw[l] + e * out, ns[l] + e * out, out, !last);
                if (keep) saved_[s.inverse[l] + row + r] = of_row[r - block].inverse;
                if (!last) continue;
                if (group == 8)  // BOOM's, as a constant: its loops are unrolled
                  softmax_groups(y_l + r * out, out, 8);
                else if (group > 0)
                  softmax_groups(y_l + r * out, out, group);
              }
            }
          }
          input = y_l;
        }
      }
    }
  });
  return {y, saved};
}

// Gradients of mlp()'s x, and with `parameters` of its weights, biases, and the LayerNorms' weights and shifts.
std::vector<Tensor> mlp_backward(
    const Tensor& grad, const Tensor& x, const Tensor& y, const Tensor& saved, TensorList weights, TensorList biases,
    TensorList norm_weights, OptionalTensor mask, OptionalTensor members, int64_t group, bool of_input, bool parameters) {
  const Shape s(x, weights, norm_weights.size(), members);
  TORCH_CHECK(grad.is_contiguous() && s.rows > 0 && (!parameters || !members.has_value()));
  Tensor grad_x = at::empty(of_input ? x.sizes() : at::IntArrayRef{0}, x.options());
  std::vector<Tensor> results = {grad_x};
  for (TensorList group_of : {weights, biases, norm_weights, norm_weights})
    for (const Tensor& t : group_of)
      if (parameters) results.push_back(at::empty_like(t));
  const auto w = pointers(weights), nw = pointers(norm_weights);
  const float *grad_ = grad.const_data_ptr<float>(), *x_ = x.const_data_ptr<float>(), *y_ = y.const_data_ptr<float>();
  const float* saved_ = saved.const_data_ptr<float>();
  const bool* mask_ = mask.has_value() ? mask->const_data_ptr<bool>() : nullptr;
  float* grad_x_ = grad_x.data_ptr<float>();

  // Gradients of every layer's matrix product (the last one's, without a norm, is grad), and of the vectors by task
  std::vector<int64_t> of_h(s.layers);
  int64_t size = 0;
  const int64_t kept_rows = parameters ? s.members * s.rows : 0;
  for (int64_t l = 0; l < s.layers; ++l) of_h[l] = (size += kept_rows * s.out[l]) - kept_rows * s.out[l];
  const std::unique_ptr<float[]> workspace(new float[size]);
  const int64_t vectors = parameters ? s.members * s.vectors : 0;
  const std::unique_ptr<float[]> sums(new float[s.tasks * vectors]());

  at::parallel_for(0, s.tasks, 1, [&](int64_t begin, int64_t end) {
    const int64_t half = parameters ? 0 : s.chunk * s.widest();
    const std::unique_ptr<float[]> scratch(new float[2 * half]);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t first = task * s.chunk, count = std::min(s.chunk, s.rows - first);
      float* sum_of = sums.get() + task * vectors;
      for (int64_t i = 0; i < s.members; ++i) {
        const int64_t e = s.selected[i], row = i * s.rows + first;
        const float* above = nullptr;  // the gradient of the matrix product of the layer above
        for (int64_t l = s.layers - 1; l >= 0; --l) {
          const int64_t out = s.out[l];
          const bool last = l + 1 == s.layers, has_norm = l < s.normed;
          const float* g_in = grad_ + row * out;
          float* g = parameters ? workspace.get() + of_h[l] + row * out : scratch.get() + (l % 2) * half;
          if (!last)
            product_of_gradient(above, w[l + 1] + e * s.out[l + 1] * out, g, count, s.out[l + 1], out, false);
          else if (has_norm)
            std::copy(g_in, g_in + count * out, g);
          for (int64_t r = 0; r < count; ++r) {
            const int64_t at = (row + r) * out;
            if (!has_norm) {
              if (parameters)
                for_each_vec(out, [&](int64_t j, int64_t n) { add_to(sum_of + j, load(g_in + r * out + j, n), n); });
              continue;
            }
            if (last && group > 0) softmax_groups_backward(y_ + at, g + r * out, out, group);
            norm_backward(
                g + r * out, saved_ + s.unit[l] + at, last ? nullptr : saved_ + s.slope[l] + at,
                saved_[s.inverse[l] + row + r], nw[l] + e * out, mask_ && l == 0 ? mask_ + at : nullptr,
                parameters ? sum_of : nullptr, sum_of + out, sum_of + 2 * out, out);
          }
          if (parameters) sum_of += (has_norm ? 3 : 1) * out;
          above = has_norm ? g : g_in;
        }
        if (of_input) {
          float* into = grad_x_ + (s.shared ? first : row) * s.in[0];
          product_of_gradient(above, w[0] + e * s.out[0] * s.in[0], into, count, s.out[0], s.in[0], s.shared && i > 0);
        }
      }
    }
  });
  if (!parameters) return results;

  // the vectors: task after task, in the order in which the rows' loop went through members and layers
  int64_t at = 0;
  for (int64_t i = 0; i < s.members; ++i) {
    for (int64_t l = s.layers - 1; l >= 0; --l) {
      const int64_t places[] = {1 + s.layers + l, 1 + 2 * s.layers + l, 1 + 2 * s.layers + s.normed + l};
      for (int64_t k = 0; k < (l < s.normed ? 3 : 1); ++k, at += s.out[l]) {
        float* into = results[places[k]].data_ptr<float>() + i * s.out[l];
        std::copy(sums.get() + at, sums.get() + at + s.out[l], into);
        for (int64_t task = 1; task < s.tasks; ++task)
          for_each_vec(s.out[l], [&](int64_t j, int64_t n) {
            add_to(into + j, load(sums.get() + task * vectors + at + j, n), n);
          });
      }
    }
  }

  // the weights: some of the output features of some layer of some member at a time
  struct Part {
    int64_t i, l, number, first, count;
  };
  std::vector<Part> parts;
  for (int64_t i = 0; i < s.members; ++i)
    for (int64_t l = 0; l < s.layers; ++l) {
      const int64_t n = std::max<int64_t>(1, std::min<int64_t>(at::get_num_threads(), s.out[l] / MIN_ROWS));
      const int64_t count = (s.out[l] + n - 1) / n;
      for (int64_t f = 0; f < s.out[l]; f += count)
        parts.push_back({i, l, f / count, f, std::min(count, s.out[l] - f)});
    }
  // a thread gets neighbours of this order: its part of every layer, so all have the same amount of work
  std::stable_sort(parts.begin(), parts.end(), [](const Part& a, const Part& b) { return a.number < b.number; });
  at::parallel_for(0, parts.size(), 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) {
      const auto [i, l, number, first, count] = parts[p];
      const int64_t n = s.rows * s.out[l];
      const float* g = l < s.normed ? workspace.get() + of_h[l] + i * n : grad_ + i * n;
      const float* input = l > 0 ? saved_ + s.output[l - 1] + i * s.rows * s.in[l]
                                 : x_ + (s.shared ? 0 : i * s.rows * s.in[0]);
      float* into = results[1 + l].data_ptr<float>() + i * s.out[l] * s.in[l];
      product_of_weight(g, input, into, s.rows, s.out[l], s.in[l], first, count);
    }
  });
  return results;
}

}  // namespace

TORCH_LIBRARY(sb3_boom, m) {
  m.def(
      "mlp(Tensor x, Tensor[] weights, Tensor[] biases, Tensor[] norm_weights, Tensor[] norm_shifts, Tensor? mask,"
      " Tensor? members, int group, bool keep) -> (Tensor, Tensor)");
  m.def(
      "mlp_backward(Tensor grad, Tensor x, Tensor y, Tensor saved, Tensor[] weights, Tensor[] biases,"
      " Tensor[] norm_weights, Tensor? mask, Tensor? members, int group, bool of_input, bool parameters) -> Tensor[]");
}

TORCH_LIBRARY_IMPL(sb3_boom, CPU, m) {
  m.impl("mlp", &mlp);
  m.impl("mlp_backward", &mlp_backward);
}
