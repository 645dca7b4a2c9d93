// The kernels that work row by row: norms, the gated activation, rotation and the write of KV.

#pragma once

#include "stage.h"
#include "vectors.h"

namespace {

// ---- Norms --------------------------------------------------------------------------------------

struct NormArgs {
  const void* x;
  const void* weight;
  const void* bias;  // layer_norm
  void* out;
  int64_t rows, width;
  double eps;

  int64_t chunks() const { return chunks_of(rows, width); }
};

template <typename T>
INLINE void rms_norm_row(const T* x, const T* weight, T* out, int64_t width, float eps) {
  F16 even{}, odd{};
  int64_t i = 0;
  for (; i + 32 <= width; i += 32) {
    F16 a = load(x + i), b = load(x + i + 16);
    even += a * a;
    odd += b * b;
  }
  for (; i < width; i += 16) {
    F16 a = load_some(x + i, width - i);
    even += a * a;
  }
  const float scale = 1.0f / std::sqrt(sum(even + odd) / float(width) + eps);
  sixteens(width, [&](int64_t i, int64_t count) {
    F16 a = load_some(x + i, count) * scale * load_some(weight + i, count);
    store_some(out + i, a, count);
  });
}

template <typename T>
void rms_norm(const NormArgs& args, Chunks chunks, int64_t) {
  const int64_t width = args.width;
  for_rows(chunks, args.rows, width, [&](int64_t row) {
    const T* x = (const T*)args.x + row * width;
    T* out = (T*)args.out + row * width;
    rms_norm_row(x, (const T*)args.weight, out, width, float(args.eps));
  });
}

template <typename T>
void layer_norm(const NormArgs& args, Chunks chunks, int64_t) {
  const int64_t width = args.width;
  const T *weight = (const T*)args.weight, *bias = (const T*)args.bias;
  for_rows(chunks, args.rows, width, [&](int64_t row) {
    const T* x = (const T*)args.x + row * width;
    T* out = (T*)args.out + row * width;
    F16 total{};
    sixteens(width, [&](int64_t i, int64_t count) {
      total += load_some(x + i, count);
    });
    const float mean = sum(total) / float(width);
    F16 squares{};
    sixteens(width, [&](int64_t i, int64_t count) {
      F16 a = load_some(x + i, count) - mean;
      if (count < 16)  // the padding is no part of the row
        for (int64_t k = count; k < 16; k++) a[k] = 0;
      squares += a * a;
    });
    const float scale = 1.0f / std::sqrt(sum(squares) / float(width) + float(args.eps));
    sixteens(width, [&](int64_t i, int64_t count) {
      F16 a = (load_some(x + i, count) - mean) * scale;
      a = a * load_some(weight + i, count) + load_some(bias + i, count);
      store_some(out + i, a, count);
    });
  });
}

struct HeadNormArgs {
  void* qkv;
  const void* weight;
  int64_t tokens, token_stride, heads, head_dim;
  double eps;

  int64_t chunks() const { return chunks_of(tokens, token_stride); }
};

template <typename T>
void head_rms_norm(const HeadNormArgs& args, Chunks chunks, int64_t) {
  const int64_t dim = args.head_dim;
  for_rows(chunks, args.tokens, args.token_stride, [&](int64_t token) {
    T* qkv = (T*)args.qkv + token * args.token_stride;
    const T* weight = (const T*)args.weight;
    for (int64_t i = 0; i < args.heads * dim; i += dim)
      rms_norm_row(qkv + i, weight + i, qkv + i, dim, float(args.eps));
  });
}

// ---- The gated activation -----------------------------------------------------------------------

struct SiluArgs {
  const void* gate_up;
  void* out;
  int64_t rows, width;

  int64_t chunks() const { return chunks_of(rows, width); }
};

template <typename T>
void silu_mul(const SiluArgs& args, Chunks chunks, int64_t) {
  const int64_t width = args.width;
  for_rows(chunks, args.rows, width, [&](int64_t row) {
    const T* gate = (const T*)args.gate_up + row * 2 * width;
    T* out = (T*)args.out + row * width;
    sixteens(width, [&](int64_t i, int64_t count) {
      F16 x = load_some(gate + i, count);
      F16 silu = x / (1.0f + exp2(x * -LOG2_E));
      store_some(out + i, silu * load_some(gate + width + i, count), count);
    });
  });
}

// ---- Rotation and the write of new keys and values ----------------------------------------------

struct WriteArgs {
  void* qkv;
  const float* rotations;  // [tokens, head_dim / 2] pairs of cos and sin; may be null
  void* kv;                // keys of the layer in block 0
  const int64_t *blocks, *offsets;  // [tokens]
  int64_t tokens, heads, kv_heads, head_dim;
  int64_t block_stride, value_offset;  // elements

  int64_t width() const { return (heads + 2 * kv_heads) * head_dim; }
  int64_t chunks() const { return chunks_of(tokens, width()); }
};

// `rotation` [dim / 2] is pairs of cos and sin.
template <typename T>
INLINE void rotate(T* head, const float* rotation, int64_t dim) {
  int64_t i = 0;
  for (; i + 32 <= dim; i += 32) {
    F16 x, y, cosine, sine;
    load_pairs(head + i, x, y);
    load_pairs(rotation + i, cosine, sine);
    store_pairs(head + i, x * cosine - y * sine, x * sine + y * cosine);
  }
  for (; i < dim; i += 2) {
    const float x = to_float(head[i]), y = to_float(head[i + 1]);
    const float cosine = rotation[i], sine = rotation[i + 1];
    set(head[i], x * cosine - y * sine);
    set(head[i + 1], x * sine + y * cosine);
  }
}

template <typename T>
void rotate_and_write(const WriteArgs& args, Chunks chunks, int64_t) {
  const int64_t dim = args.head_dim, kv_width = args.kv_heads * dim;
  const int64_t rotated = args.heads * dim + kv_width, stride = rotated + kv_width;
  auto slot_of = [&](int64_t token) {
    return (T*)args.kv + args.blocks[token] * args.block_stride + args.offsets[token] * kv_width;
  };
  for_rows(chunks, args.tokens, stride, [&](int64_t token) {
    // Slots lie anywhere, and none has been near for a step: the next one is called for now.
    if (token + 1 < args.tokens) {
      const T* next = slot_of(token + 1);
      for (int64_t i = 0; i < kv_width; i += 64 / int64_t(sizeof(T))) {
        __builtin_prefetch(next + i, 1);
        __builtin_prefetch(next + i + args.value_offset, 1);
      }
    }
    T* qkv = (T*)args.qkv + token * stride;
    if (args.rotations) {
      const float* rotation = args.rotations + token * dim;
      for (T* head = qkv; head < qkv + rotated; head += dim) rotate(head, rotation, dim);
    }
    T* keys = slot_of(token);
    std::memcpy(keys, qkv + rotated - kv_width, kv_width * sizeof(T));
    std::memcpy(keys + args.value_offset, qkv + rotated, kv_width * sizeof(T));
  });
}

}  // namespace
