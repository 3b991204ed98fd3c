// CPU operations that MLX runs one element at a time on x86-64, written so that compilers vectorize them, each in one
// pass where MLX takes several. Called from native.rs, which says what each computes; f32 only, inputs row-contiguous
// unless said otherwise. Primitives in MLX's sense: lazy, scheduled on the stream's own thread.

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
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

// One copy of each loop for each instruction set, chosen when the library is loaded.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__)
#define WIDE __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define WIDE
#endif

namespace {

namespace mx = mlx::core;

constexpr int LANES = 16;

// Cody and Waite's reduction and a Taylor polynomial: relative error below 3e-7 from -87 to 88, clamped outside.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.0f), 88.0f);
  const float shifted = x * 1.44269504f + 12582912.0f; // adding 1.5 * 2^23 rounds to an integer
  const float n = shifted - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.0f / 720.0f;
  p = p * r + 1.0f / 120.0f;
  p = p * r + 1.0f / 24.0f;
  p = p * r + 1.0f / 6.0f;
  p = p * r + 0.5f;
  p = p * r + 1.0f;
  p = p * r + 1.0f;
  const int32_t exponent = std::bit_cast<int32_t>(shifted) << 23;
  return std::bit_cast<float>(std::bit_cast<int32_t>(p) + exponent);
}

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

// Row r of [batch, heads, queries, length] sees visible[batch] + step * query positions; the others become 0.
WIDE void masked_softmax(
    const float* x, float* out, const int32_t* visible, int64_t batch, int64_t heads, int64_t queries, int64_t length,
    float scale, int64_t step) {
  for (int64_t row = 0; row < batch * heads * queries; row++) {
    const int64_t seen = std::min<int64_t>(visible[row / (heads * queries)] + step * (row % queries), length);
    const float* from = x + row * length;
    float* to = out + row * length;
    float lanes[LANES];
    std::fill(lanes, lanes + LANES, from[0]);
    int64_t i = 0;
    for (; i + LANES <= seen; i += LANES) {
      for (int lane = 0; lane < LANES; lane++) {
        lanes[lane] = lanes[lane] > from[i + lane] ? lanes[lane] : from[i + lane];
      }
    }
    for (; i < seen; i++) {
      lanes[0] = std::max(lanes[0], from[i]);
    }
    const float largest = *std::max_element(lanes, lanes + LANES);
    for (i = 0; i < seen; i++) {
      to[i] = exponential((from[i] - largest) * scale);
    }
    std::fill(lanes, lanes + LANES, 0.0f);
    for (i = 0; i + LANES <= seen; i += LANES) {
      for (int lane = 0; lane < LANES; lane++) {
        lanes[lane] += to[i + lane];
      }
    }
    float sum = 0.0f;
    for (; i < seen; i++) {
      sum += to[i];
    }
    for (int lane = 0; lane < LANES; lane++) {
      sum += lanes[lane];
    }
    const float inverse = 1.0f / sum;
    for (i = 0; i < seen; i++) {
      to[i] *= inverse;
    }
    std::fill(to + seen, to + length, 0.0f);
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

enum class Kind { SwiGlu, MaskedSoftmax, RmsNorm, Rope };

class Native : public mx::UnaryPrimitive {
 public:
  Native(mx::Stream stream, Kind kind, float number, int64_t step)
      : mx::UnaryPrimitive(stream), kind_(kind), number_(number), step_(step) {}

  const char* name() const override {
    return "MlxNodeNative";
  }

  void eval_gpu(const std::vector<mx::array>&, mx::array&) override {
    throw std::runtime_error("a CPU operation was given to a GPU stream");
  }

  void eval_cpu(const std::vector<mx::array>& inputs, mx::array& out) override {
    const auto& x = inputs[0];
    for (size_t i = kind_ == Kind::Rope ? 1 : 0; i < inputs.size(); i++) {
      if (!inputs[i].flags().row_contiguous) {
        throw std::runtime_error("an input is not row-contiguous");
      }
    }
    out.set_data(mx::allocator::malloc(out.nbytes()));
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
      case Kind::MaskedSoftmax: {
        const int32_t* visible = inputs[1].data<int32_t>();
        const int64_t batch = x.shape(0), heads = x.shape(1), queries = x.shape(2);
        encoder.dispatch([=, scale = number_, step = step_] {
          masked_softmax(from, to, visible, batch, heads, queries, width, scale, step);
        });
        break;
      }
      case Kind::RmsNorm: {
        const float* weight = inputs[1].data<float>();
        encoder.dispatch([=, eps = number_] { rms_norm(from, weight, to, rows, width, eps); });
        break;
      }
      case Kind::Rope: {
        if (x.strides(2) != 1 || x.strides(1) != x.shape(2)) {
          throw std::runtime_error("the heads of a token must be adjacent");
        }
        const float* cos = inputs[1].data<float>();
        const float* sin = inputs[2].data<float>();
        const int64_t tokens = x.shape(0), heads = x.shape(1), half = inputs[1].shape(-1), stride = x.strides(0);
        encoder.dispatch([=] { rope(from, cos, sin, to, tokens, heads, width, half, stride); });
        break;
      }
    }
  }

 private:
  Kind kind_;
  float number_;
  int64_t step_;
};

mx::array& get(mlx_array handle) {
  return *static_cast<mx::array*>(handle.ctx);
}

int make(mlx_array* res, mx::Shape shape, mlx_stream stream, Kind kind, float number, int64_t step,
         std::vector<mx::array> inputs) {
  try {
    for (const auto& input : inputs) {
      if (input.dtype() != mx::float32 && input.dtype() != mx::int32) {
        return 1;
      }
    }
    auto primitive = std::make_shared<Native>(*static_cast<mx::Stream*>(stream.ctx), kind, number, step);
    auto result = mx::array(std::move(shape), mx::float32, std::move(primitive), std::move(inputs));
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

int mlx_node_masked_softmax(
    mlx_array* res, mlx_array x, mlx_array visible, float scale, int64_t step, mlx_stream stream) {
  return make(res, get(x).shape(), stream, Kind::MaskedSoftmax, scale, step, {get(x), get(visible)});
}

int mlx_node_rms_norm(mlx_array* res, mlx_array x, mlx_array weight, float eps, mlx_stream stream) {
  if (get(weight).ndim() != 1 || get(weight).shape(0) != get(x).shape(-1)) {
    return 1;
  }
  return make(res, get(x).shape(), stream, Kind::RmsNorm, eps, 0, {get(x), get(weight)});
}

int mlx_node_rope(mlx_array* res, mlx_array x, mlx_array cos, mlx_array sin, mlx_stream stream) {
  return make(res, get(x).shape(), stream, Kind::Rope, 0, 0, {get(x), get(cos), get(sin)});
}
}
