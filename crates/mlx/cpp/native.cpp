// CPU operations that MLX runs one element at a time on x86-64, written so that compilers vectorize them, each in one
// pass where MLX takes several. Called from native.rs, which says what each computes; f32 only, inputs row-contiguous
// unless said otherwise. Primitives in MLX's sense: lazy, scheduled on the stream's own thread.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <stdexcept>
#include <vector>

#include "mlx/allocator.h"
#include "mlx/array.h"
#include "mlx/backend/cpu/encoder.h"
#include "mlx/primitives.h"
#include "mlx/stream.h"

#include "mlx/c/array.h"
#include "mlx/c/stream.h"

#include "attention.h"
#include "parallel.h"
#include "product.h"
#include "sample.h"
#include "vectors.h"

namespace {

namespace mx = mlx::core;

WIDE void swiglu(const float* x, float* out, int64_t rows, int64_t width) {
  for (int64_t row = 0; row < rows; row++) {
    const float* gate = x + row * 2 * width;
    const float* up = gate + width;
    float* to = out + row * width;
    for (int64_t i = 0; i < width; i++) {
      to[i] = gate[i] / (1.0f + exponential(-gate[i])) * up[i];
    }
  }
}

WIDE void rms_norm(const float* x, const float* weight, float* out, int64_t rows, int64_t width, float eps) {
  for (int64_t row = 0; row < rows; row++) {
    const float* from = x + row * width;
    float* to = out + row * width;
    float lanes[LANES] = {};
    int64_t i = 0;
    for (; i + LANES <= width; i += LANES) {
      for (int lane = 0; lane < LANES; lane++) {
        lanes[lane] += from[i + lane] * from[i + lane];
      }
    }
    float sum = 0.0f;
    for (; i < width; i++) {
      sum += from[i] * from[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
      sum += lanes[lane];
    }
    const float factor = 1.0f / std::sqrt(sum / static_cast<float>(width) + eps);
    for (i = 0; i < width; i++) {
      to[i] = from[i] * factor * weight[i];
    }
  }
}

// x [tokens, heads, dim], heads of a token adjacent and tokens `stride` elements apart; cos and sin [tokens, half].
WIDE void rope(
    const float* x, const float* cos, const float* sin, float* out, int64_t tokens, int64_t heads, int64_t dim,
    int64_t half, int64_t stride) {
  for (int64_t token = 0; token < tokens; token++) {
    const float* c = cos + token * half;
    const float* s = sin + token * half;
    for (int64_t head = 0; head < heads; head++) {
      const float* from = x + token * stride + head * dim;
      float* to = out + (token * heads + head) * dim;
      for (int64_t i = 0; i < half; i++) {
        to[i] = from[i] * c[i] - from[half + i] * s[i];
      }
      for (int64_t i = 0; i < half; i++) {
        to[half + i] = from[half + i] * c[i] + from[i] * s[i];
      }
      for (int64_t i = 2 * half; i < dim; i++) {
        to[i] = from[i];
      }
    }
  }
}

enum class Kind { SwiGlu, RmsNorm, Product, Rope, AttendRows, AttendRun, Sample, Reserve };

class Native : public mx::UnaryPrimitive {
 public:
  Native(mx::Stream stream, Kind kind, float number, int64_t step, Bounds bounds)
      : mx::UnaryPrimitive(stream), kind_(kind), number_(number), step_(step), bounds_(bounds) {}

  const char* name() const override {
    return "MlxNodeNative";
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("a CPU operation was given to a GPU stream");
  }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    // Pages that are never touched take no memory, so that a large pool costs what is used of it.
    out.set_data(mx::allocator::malloc(out.nbytes()));
    if (kind_ == Kind::Reserve) {
      return;
    }
    const auto& x = inputs[0];
    for (size_t i = by_token(); i < inputs.size(); i++) {
      if (!inputs[i].flags().row_contiguous) {
        throw std::runtime_error("an input is not row-contiguous");
      }
    }
    for (size_t i = 0; i < by_token(); i++) {
      if (inputs[i].strides(2) != 1 || inputs[i].strides(1) != inputs[i].shape(2)) {
        throw std::runtime_error("the heads of a token must be adjacent");
      }
    }
    auto& encoder = mx::cpu::get_command_encoder(stream());
    for (const auto& input : inputs) {
      encoder.set_input_array(input);
    }
    encoder.set_output_array(out);
    const float* from = x.data<float>();
    float* to = out.data<float>();
    const int64_t width = out.shape(-1);
    const int64_t rows = static_cast<int64_t>(out.size()) / std::max<int64_t>(width, 1);
    switch (kind_) {
      case Kind::SwiGlu:
        encoder.dispatch([=] { swiglu(from, to, rows, width); });
        break;
      case Kind::RmsNorm: {
        const float* weight = inputs[1].data<float>();
        encoder.dispatch([=, eps = number_] { rms_norm(from, weight, to, rows, width, eps); });
        break;
      }
      case Kind::Product: {
        const float* weight = inputs[1].data<float>();
        encoder.dispatch([=, inner = x.shape(1)] { product(from, weight, to, rows, width, inner); });
        break;
      }
      case Kind::Rope: {
        const float* cos = inputs[1].data<float>();
        const float* sin = inputs[2].data<float>();
        const int64_t tokens = x.shape(0), heads = x.shape(1), half = inputs[1].shape(-1), stride = x.strides(0);
        encoder.dispatch([=] { rope(from, cos, sin, to, tokens, heads, width, half, stride); });
        break;
      }
      case Kind::AttendRows:
      case Kind::AttendRun: {
        const auto &k = inputs[1], &v = inputs[2], &rows = inputs[5];
        const Attention attention = {
            from, k.data<float>(), v.data<float>(), x.strides(0), k.strides(0), v.strides(0), pool(inputs[3], k),
            pool(inputs[4], k), rows.data<int32_t>(), x.shape(0), rows.shape(-1), x.shape(1), number_, bounds_,
            inputs.size() > 6 && inputs[6].size() > 0 ? inputs[6].data<float>() : nullptr, step_ ? to : nullptr};
        encoder.dispatch([=, is_run = kind_ == Kind::AttendRun] {
          is_run ? attend_run(attention) : attend_rows(attention);
        });
        break;
      }
      case Kind::Sample: {
        const auto* draws = reinterpret_cast<const Draw*>(inputs[1].data<int32_t>());
        const auto* changes = reinterpret_cast<const Change*>(inputs[2].data<int32_t>());
        const int64_t vocabulary = x.shape(1), each = inputs[2].shape(1) / 4;
        const int32_t* late = inputs[3].data<int32_t>();
        int32_t* tokens = out.data<int32_t>();
        encoder.dispatch([=, count = x.shape(0)] {
          parallel(count, count * vocabulary * LANES, [&](int64_t row) {
            Draw draw = draws[row];
            draw.late = draw.late >= 0 ? late[draw.late] : -1;
            tokens[row] = draw_token(from + row * vocabulary, vocabulary, draw, changes + row * each, each);
          });
        });
        break;
      }
      case Kind::Reserve:
        break;
    }
  }

 private:
  // Leading inputs [tokens, heads, dim] whose tokens need not be adjacent, only the heads of one.
  size_t by_token() const {
    switch (kind_) {
      case Kind::Rope:
        return 1;
      case Kind::AttendRows:
      case Kind::AttendRun:
        return 3;
      default:
        return 0;
    }
  }

  // The pool is written in place: it is an input, and nothing but these operations reads it, in the stream's order.
  static Pool pool(const mx::array& pool, const mx::array& rows) {
    return {const_cast<float*>(pool.data<float>()), rows.shape(1), rows.shape(2)};
  }

  Kind kind_;
  float number_;
  int64_t step_;
  Bounds bounds_;
};

mx::array& get(mlx_array handle) {
  return *static_cast<mx::array*>(handle.ctx);
}

int make(mlx_array* res, mx::Shape shape, mlx_stream stream, Kind kind, float number, int64_t step,
         std::vector<mx::array> inputs, mx::Dtype dtype = mx::float32, Bounds bounds = {}) {
  try {
    for (const auto& input : inputs) {
      if (input.dtype() != mx::float32 && input.dtype() != mx::int32) {
        return 1;
      }
    }
    auto primitive = std::make_shared<Native>(*static_cast<mx::Stream*>(stream.ctx), kind, number, step, bounds);
    auto result = mx::array(std::move(shape), dtype, std::move(primitive), std::move(inputs));
    if (res->ctx) {
      get(*res) = std::move(result);
    } else {
      res->ctx = new mx::array(std::move(result));
    }
    return 0;
  } catch (const std::exception&) {
    return 1;
  }
}

} // namespace

extern "C" {

int mlx_node_swiglu(mlx_array* res, mlx_array x, mlx_stream stream) {
  auto shape = get(x).shape();
  shape.back() /= 2;
  return make(res, std::move(shape), stream, Kind::SwiGlu, 0, 0, {get(x)});
}

int mlx_node_rms_norm(mlx_array* res, mlx_array x, mlx_array weight, float eps, mlx_stream stream) {
  if (get(weight).ndim() != 1 || get(weight).shape(0) != get(x).shape(-1)) {
    return 1;
  }
  return make(res, get(x).shape(), stream, Kind::RmsNorm, eps, 0, {get(x), get(weight)});
}

// Up to how many rows mlx_node_product is worth it; 0 where it does not work.
int mlx_node_product_rows() {
  return product_tiles() ? static_cast<int>(product_tiles()->rows_worth) : 0;
}

// x [rows, width], weight [outputs, width] to [rows, outputs].
int mlx_node_product(mlx_array* res, mlx_array x, mlx_array weight, mlx_stream stream) {
  const auto &rows = get(x).shape(), &outputs = get(weight).shape();
  const auto* tiles = product_tiles();
  if (!tiles || rows.size() != 2 || outputs.size() != 2 || rows[1] != outputs[1] || rows[1] % tiles->lanes != 0) {
    return 1;
  }
  return make(res, {rows[0], outputs[0]}, stream, Kind::Product, 0, 0, {get(x), get(weight)});
}

int mlx_node_rope(mlx_array* res, mlx_array x, mlx_array cos, mlx_array sin, mlx_stream stream) {
  return make(res, get(x).shape(), stream, Kind::Rope, 0, 0, {get(x), get(cos), get(sin)});
}

// q [rows, heads, dim], k and v [rows, kv_heads, dim], rows [rows, 1 + blocks]: position and block table; sinks [heads]
// or [0], cap and window 0 for none.
int mlx_node_attend_rows(
    mlx_array* res, mlx_array q, mlx_array k, mlx_array v, mlx_array keys, mlx_array values, mlx_array rows,
    mlx_array sinks, float scale, float cap, int window, mlx_stream stream) {
  const auto& shape = get(q).shape();
  if (get(sinks).size() > 0 && (get(sinks).ndim() != 1 || get(sinks).shape(0) != shape[1])) {
    return 1;
  }
  return make(res, {shape[0], shape[1] * shape[2]}, stream, Kind::AttendRows, scale, 1,
              {get(q), get(k), get(v), get(keys), get(values), get(rows), get(sinks)}, mx::float32, {window, cap});
}

// A run of one sequence: q [count, heads, dim], k and v [count, kv_heads, dim], table [1 + blocks]: start and block table.
int mlx_node_attend_run(
    mlx_array* res, mlx_array q, mlx_array k, mlx_array v, mlx_array keys, mlx_array values, mlx_array table,
    mlx_array sinks, float scale, float cap, int window, mlx_stream stream) {
  const auto& shape = get(q).shape();
  if (get(sinks).size() > 0 && (get(sinks).ndim() != 1 || get(sinks).shape(0) != shape[1])) {
    return 1;
  }
  return make(res, {shape[0], shape[1] * shape[2]}, stream, Kind::AttendRun, scale, 1,
              {get(q), get(k), get(v), get(keys), get(values), get(table), get(sinks)}, mx::float32, {window, cap});
}

// Only writes such a run; gives [1] of no meaning.
int mlx_node_append_run(
    mlx_array* res, mlx_array k, mlx_array v, mlx_array keys, mlx_array values, mlx_array table, mlx_stream stream) {
  return make(res, {1}, stream, Kind::AttendRun, 0, 0,
              {get(k), get(k), get(v), get(keys), get(values), get(table)});
}

// logits [rows, vocabulary], draws [rows, 9], changes [rows, 4 * n], late [m]: tokens that `draws` names by index.
int mlx_node_sample(
    mlx_array* res, mlx_array logits, mlx_array draws, mlx_array changes, mlx_array late, mlx_stream stream) {
  return make(res, {get(logits).shape(0)}, stream, Kind::Sample, 0, 0,
              {get(logits), get(draws), get(changes), get(late)}, mx::int32);
}

// Memory that is not written until it is used.
int mlx_node_reserve(mlx_array* res, const int* shape, size_t rank, mlx_stream stream) {
  return make(res, mx::Shape(shape, shape + rank), stream, Kind::Reserve, 0, 0, {});
}
}
