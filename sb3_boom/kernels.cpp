// Bias, dropout, LayerNorm and Mish in one pass over memory, and its gradient in one more.
// sb3_boom/kernels.py compiles and loads this; sb3_boom/torch_layers.py has the same in torch and says what it means.

#include <torch/csrc/inductor/cpp_prefix.h>

#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <torch/library.h>

#include <array>
#include <tuple>
#include <vector>

namespace {

using at::Tensor;
using Vec = at::vec::Vectorized<float>;
using OptionalTensor = const std::optional<Tensor>&;

constexpr float EPS = 1e-5f;          // of the LayerNorm
constexpr int64_t ROWS_PER_TASK = 32;  // fixed, so that sums do not depend on the number of threads

// f(first feature, number of features) for every vector of a row
template <typename F>
inline void for_each_vec(int64_t n, const F& f) {
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

inline float sum(const Vec& v) {
  float parts[Vec::size()];
  v.store(parts);
  float total = 0;
  for (float part : parts) total += part;
  return total;
}

inline const float* data_or_null(OptionalTensor t) {
  return t.has_value() ? t->const_data_ptr<float>() : nullptr;
}

// h [n, M, F] with contiguous rows; all else contiguous. Returns y; for the gradient also the normalised rows and Mish's
// slope, both laid out as h, and 1 / std [n, M].
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    const Tensor& h, const Tensor& bias, const Tensor& weight, const Tensor& shift, OptionalTensor mask, bool keep) {
  const int64_t members = h.size(0), rows = h.size(1), features = h.size(2);
  TORCH_CHECK(h.stride(2) == 1 && bias.is_contiguous() && weight.is_contiguous() && shift.is_contiguous());
  TORCH_CHECK(!mask.has_value() || mask->is_contiguous());
  Tensor y = at::empty({members, rows, features}, h.options());
  Tensor inv_std = at::empty({keep ? members : 0, rows}, h.options());
  Tensor normalised = keep ? at::empty_like(h) : at::empty({0, rows}, h.options());
  Tensor slope = keep ? at::empty_like(h) : at::empty({0, rows}, h.options());
  TORCH_CHECK(!keep || normalised.strides() == h.strides(), "h must be dense");
  const float *h_ = h.const_data_ptr<float>(), *bias_ = bias.const_data_ptr<float>();
  const float *weight_ = weight.const_data_ptr<float>(), *shift_ = shift.const_data_ptr<float>();
  const float* mask_ = data_or_null(mask);
  float *y_ = y.data_ptr<float>(), *inv_std_ = inv_std.data_ptr<float>();
  float *normalised_ = normalised.data_ptr<float>(), *slope_ = slope.data_ptr<float>();
  const int64_t member_stride = h.stride(0), row_stride = h.stride(1);

  at::parallel_for(0, members * rows, ROWS_PER_TASK, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(features);
    for (int64_t r = begin; r < end; ++r) {
      const int64_t e = r / rows;
      const int64_t row = e * member_stride + (r % rows) * row_stride;
      const float *b = bias_ + e * features, *w = weight_ + e * features, *s = shift_ + e * features;
      float* x = keep ? normalised_ + row : scratch.data();
      Vec total(0.0f);
      for_each_vec(features, [&](int64_t j, int64_t count) {
        Vec v = load(h_ + row + j, count) + load(b + j, count);
        if (mask_) v = v * load(mask_ + r * features + j, count);
        store(v, x + j, count);
        total = total + v;
      });
      const float mean = sum(total) / features;
      Vec squares(0.0f);
      for_each_vec(features, [&](int64_t j, int64_t count) {
        Vec v = load(x + j, count) - Vec(mean);
        if (count < Vec::size()) v = Vec::set(Vec(0.0f), v, count);
        squares = squares + v * v;
      });
      const float inverse = 1.0f / std::sqrt(sum(squares) / features + EPS);
      if (keep) inv_std_[r] = inverse;
      for_each_vec(features, [&](int64_t j, int64_t count) {
        const Vec unit = (load(x + j, count) - Vec(mean)) * Vec(inverse);
        const Vec u = unit * load(w + j, count) + load(s + j, count);
        const Vec ex = at::vec::minimum(u, Vec(20.0f)).exp_u20();
        const Vec n = ex * (ex + Vec(2.0f));
        const Vec q = Vec(1.0f) / (n + Vec(2.0f));
        store(u * n * q, y_ + r * features + j, count);
        if (keep) {
          store(unit, x + j, count);
          store(q * (n + Vec(4.0f) * u * ex * (ex + Vec(1.0f)) * q), slope_ + row + j, count);
        }
      });
    }
  });
  return {y, normalised, slope, inv_std};
}

// grad [n, M, F] with contiguous rows. Returns the gradients of h (laid out as it), bias, weight and shift; the last three
// are empty without `parameters`.
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(
    const Tensor& grad, const Tensor& normalised, const Tensor& slope, const Tensor& inv_std, const Tensor& weight,
    OptionalTensor mask, bool parameters) {
  const int64_t members = normalised.size(0), rows = normalised.size(1), features = normalised.size(2);
  TORCH_CHECK(grad.stride(2) == 1 && weight.is_contiguous() && slope.strides() == normalised.strides());
  const int64_t chunks = (rows + ROWS_PER_TASK - 1) / ROWS_PER_TASK;
  Tensor grad_h = at::empty_like(normalised);
  Tensor partial = at::empty({parameters ? 3 : 0, members, chunks, features}, grad.options());
  const auto new_sums = [&] { return at::empty({parameters ? members : 0, features}, grad.options()); };
  const std::array<Tensor, 3> sums = {new_sums(), new_sums(), new_sums()};
  const float *grad_ = grad.const_data_ptr<float>(), *normalised_ = normalised.const_data_ptr<float>();
  const float *slope_ = slope.const_data_ptr<float>(), *inv_std_ = inv_std.const_data_ptr<float>();
  const float *weight_ = weight.const_data_ptr<float>(), *mask_ = data_or_null(mask);
  float *grad_h_ = grad_h.data_ptr<float>(), *partial_ = partial.data_ptr<float>();
  const int64_t grad_member_stride = grad.stride(0), grad_row_stride = grad.stride(1);
  const int64_t member_stride = normalised.stride(0), row_stride = normalised.stride(1);
  const int64_t kind = members * chunks * features;  // between the three partial sums

  at::parallel_for(0, members * chunks, 1, [&](int64_t begin, int64_t end) {
    std::vector<float> scratch(3 * features);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t e = task / chunks, first = (task % chunks) * ROWS_PER_TASK;
      const float* w = weight_ + e * features;
      float *of_bias = scratch.data(), *of_weight = of_bias + features, *of_shift = of_weight + features;
      if (parameters) {
        of_bias = partial_ + task * features;
        of_weight = of_bias + kind;
        of_shift = of_weight + kind;
      }
      for (float* p : {of_bias, of_weight, of_shift}) std::fill(p, p + features, 0.0f);
      for (int64_t i = first; i < std::min(first + ROWS_PER_TASK, rows); ++i) {
        const int64_t r = e * rows + i, row = e * member_stride + i * row_stride;
        const float *g_row = grad_ + e * grad_member_stride + i * grad_row_stride, *unit = normalised_ + row;
        float* out = grad_h_ + row;
        Vec total(0.0f), along(0.0f);
        for_each_vec(features, [&](int64_t j, int64_t count) {
          const Vec g = load(g_row + j, count) * load(slope_ + row + j, count);
          const Vec unit_j = load(unit + j, count), scaled = g * load(w + j, count);
          store(load(of_shift + j, count) + g, of_shift + j, count);
          store(load(of_weight + j, count) + g * unit_j, of_weight + j, count);
          store(scaled, out + j, count);
          total = total + scaled;
          along = along + scaled * unit_j;
        });
        const Vec mean(sum(total) / features), slant(sum(along) / features), inverse(inv_std_[r]);
        for_each_vec(features, [&](int64_t j, int64_t count) {
          Vec v = inverse * (load(out + j, count) - mean - load(unit + j, count) * slant);
          if (mask_) v = v * load(mask_ + r * features + j, count);
          store(v, out + j, count);
          store(load(of_bias + j, count) + v, of_bias + j, count);
        });
      }
    }
  });
  for (int64_t k = 0; k < (parameters ? 3 : 0); ++k) {
    for (int64_t e = 0; e < members; ++e) {
      float* out = sums[k].data_ptr<float>() + e * features;
      std::fill(out, out + features, 0.0f);
      for (int64_t c = 0; c < chunks; ++c) {
        const float* part = partial_ + k * kind + (e * chunks + c) * features;
        for_each_vec(features, [&](int64_t j, int64_t count) {
          store(load(out + j, count) + load(part + j, count), out + j, count);
        });
      }
    }
  }
  return {grad_h, sums[0], sums[1], sums[2]};
}

}  // namespace

TORCH_LIBRARY(sb3_boom, m) {
  m.def(
      "norm_mish(Tensor h, Tensor bias, Tensor weight, Tensor shift, Tensor? mask, bool keep)"
      " -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "norm_mish_backward(Tensor grad, Tensor normalised, Tensor slope, Tensor inv_std, Tensor weight, Tensor? mask,"
      " bool parameters) -> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(sb3_boom, CPU, m) {
  m.impl("norm_mish", &forward);
  m.impl("norm_mish_backward", &backward);
}
