// Pairs of half-precision numbers in registers, for the matrix units of CUDA.
#define UNROLL_TWICE _Pragma("unroll 2")

template <int COUNT>
struct alignas(4 * COUNT) Words {
  unsigned of[COUNT];
};

template <typename T>
struct Half;

// multiply: sums [16, 8] += weights [16, 16] times x [16, 8]. A lane holds, of the weights, rows `lane / 4` (`one`) and 8
// below (`two`), of x column `lane / 4`; of both the same four of the sixteen that are summed over (PTX: m16n8k16).
#define HALF(TYPE, NAME, LOW, HIGH)                                                                                 \
  template <>                                                                                                       \
  struct Half<TYPE> {                                                                                               \
    static FUNCTION unsigned pack(float low, float high) {                                                          \
      unsigned both;                                                                                                \
      asm("cvt.rn." NAME "x2.f32 %0, %1, %2;" : "=r"(both) : "f"(high), "f"(low));                                  \
      return both;                                                                                                  \
    }                                                                                                               \
    static FUNCTION float low(unsigned both) {                                                                      \
      return LOW;                                                                                                   \
    }                                                                                                               \
    static FUNCTION float high(unsigned both) {                                                                     \
      return HIGH;                                                                                                  \
    }                                                                                                               \
    static FUNCTION void multiply(                                                                                  \
        float* sums, unsigned one, unsigned two, unsigned one_next, unsigned two_next, unsigned x, unsigned x_next) { \
      asm("mma.sync.aligned.m16n8k16.row.col.f32." NAME "." NAME ".f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, "     \
          "{%0,%1,%2,%3};"                                                                                          \
          : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])                                              \
          : "r"(one), "r"(two), "r"(one_next), "r"(two_next), "r"(x), "r"(x_next));                                 \
    }                                                                                                               \
  };
HALF(__nv_bfloat16, "bf16", __uint_as_float(both << 16), __uint_as_float(both & 0xffff0000u))
HALF(__half, "f16", __half2float(__ushort_as_half(both & 0xffffu)), __half2float(__ushort_as_half(both >> 16)))

// Numbers 2 `index` and 2 `index` + 1 of a word of 4-bit ones. 2^23 plus a small integer has it as its last bits.
template <typename T>
FUNCTION unsigned four_bits(unsigned word, int index, float scale, float bias) {
  const float low = __uint_as_float(word >> 8 * index & 15u | 0x4b000000u) - 8388608.0f;
  const float high = __uint_as_float(word >> (8 * index + 4) & 15u | 0x4b000000u) - 8388608.0f;
  return Half<T>::pack(low * scale + bias, high * scale + bias);
}
