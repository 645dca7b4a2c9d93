// The kernels against plain loops in double precision: for processors other than this one.
//
// A program of its own, without Python or torch, so that it can be built for any processor and run
// in emulation. Rules: the shapes and tolerances of test_kernels.py and test_cpu.py of attention;
// every case runs in one thread and in a team of three, and both must leave the same bytes everywhere.
// Where there are AMX's tiles, all that can be is computed in them.
// Prints a line for each kernel and dtype; exits with 1 where one is wrong.

#include <cstdio>
#include <functional>
#include <random>
#include <thread>
#include <vector>

#include "kernels.cpp"

namespace {

std::mt19937 generator(0);
constexpr double EPS = 1e-5;
int64_t tile_rows = 0;  // of the kernels that may use tiles

template <typename T>
struct Dtype;
template <>
struct Dtype<float> {
  static constexpr const char* NAME = "float32";
  static constexpr double TOLERANCE = 2e-5;
};
template <>
struct Dtype<BFloat16> {
  static constexpr const char* NAME = "bfloat16";
  static constexpr double TOLERANCE = 2e-2;
};

// Numbers of very different sizes, row by row.
template <typename T>
std::vector<T> draw(int64_t rows, int64_t width, float factor = 1, bool is_even = false) {
  std::normal_distribution<float> normal;
  std::vector<T> drawn(rows * width);
  for (int64_t row = 0; row < rows; row++) {
    const float size = is_even ? factor : factor * std::exp(normal(generator));
    for (int64_t i = 0; i < width; i++) set(drawn[row * width + i], normal(generator) * size);
  }
  return drawn;
}

struct Count {
  const char* kernel;
  const char* dtype;
  int cases = 0, wrong = 0;
  double worst = 0;  // error over what is allowed

  void compare(double actual, double expected, double tolerance) {
    const double error = std::abs(actual - expected) / (tolerance + tolerance * std::abs(expected));
    if (!(error <= worst)) worst = error;
  }
  int report() {
    if (!(worst <= 1)) wrong++;
    std::printf("%s %s: %d cases, error %.2f of what is allowed, %s\n", kernel, dtype, cases, worst,
                wrong ? "WRONG" : "right");
    return wrong ? 1 : 0;
  }
};

template <typename Args>
using Entry = void (*)(Threads*, const Args*);

// Runs a kernel on `memory`, which it changes, in a team and then in one thread.
template <typename Args, typename T>
void run(Count& count, Entry<Args> entry, std::vector<T>& memory,
         const std::function<Args(T*)>& arguments) {
  static Team team(3);
  static Alone alone;
  std::vector<T> beside = memory;
  const Args shared = arguments(beside.data()), own = arguments(memory.data());
  entry(&team, &shared);
  entry(&alone, &own);
  count.cases++;
  if (std::memcmp(beside.data(), memory.data(), memory.size() * sizeof(T))) count.wrong++;
}

template <typename T>
std::vector<double> rms(const T* x, const T* weight, int64_t width) {
  double squares = 0;
  for (int64_t i = 0; i < width; i++) squares += double(to_float(x[i])) * to_float(x[i]);
  std::vector<double> out(width);
  for (int64_t i = 0; i < width; i++)
    out[i] = to_float(x[i]) / std::sqrt(squares / width + EPS) * to_float(weight[i]);
  return out;
}

template <typename T>
std::vector<double> standardized(const T* x, const T* weight, const T* bias, int64_t width) {
  double mean = 0, squares = 0;
  for (int64_t i = 0; i < width; i++) mean += to_float(x[i]) / double(width);
  for (int64_t i = 0; i < width; i++) squares += (to_float(x[i]) - mean) * (to_float(x[i]) - mean);
  std::vector<double> out(width);
  for (int64_t i = 0; i < width; i++)
    out[i] = (to_float(x[i]) - mean) / std::sqrt(squares / width + EPS) * to_float(weight[i]) +
             to_float(bias[i]);
  return out;
}

constexpr int64_t ROWS[] = {1, 3, 70}, WIDTHS[] = {1, 4, 15, 16, 17, 31, 32, 64, 100, 768};

template <typename T>
int check_norms(Entry<NormArgs> rms_entry, Entry<NormArgs> layer_entry) {
  Count norm{"rms_norm", Dtype<T>::NAME}, layer{"layer_norm", Dtype<T>::NAME};
  for (int64_t rows : ROWS)
    for (int64_t width : WIDTHS) {
      const auto x = draw<T>(rows, width), weight = draw<T>(1, width), bias = draw<T>(1, width);
      for (Count* count : {&norm, &layer}) {
        const bool is_rms = count == &norm;
        std::vector<T> out(rows * width);
        run<NormArgs, T>(*count, is_rms ? rms_entry : layer_entry, out, [&](T* to) {
          return NormArgs{.x = x.data(), .weight = weight.data(), .bias = bias.data(), .out = to,
                          .rows = rows, .width = width, .eps = EPS};
        });
        for (int64_t row = 0; row < rows; row++) {
          const T* from = x.data() + row * width;
          const auto expected = is_rms
                                    ? rms(from, weight.data(), width)
                                    : standardized(from, weight.data(), bias.data(), width);
          for (int64_t i = 0; i < width; i++)
            count->compare(to_float(out[row * width + i]), expected[i], Dtype<T>::TOLERANCE);
        }
      }
    }
  return norm.report() + layer.report();
}

template <typename T>
int check_silu(Entry<SiluArgs> entry) {
  Count count{"silu_mul", Dtype<T>::NAME};
  for (int64_t rows : ROWS)
    for (int64_t width : WIDTHS) {
      const auto both = draw<T>(rows, 2 * width, 20);
      std::vector<T> out(rows * width);
      run<SiluArgs, T>(count, entry, out, [&](T* to) {
        return SiluArgs{.gate_up = both.data(), .out = to, .rows = rows, .width = width};
      });
      for (int64_t row = 0; row < rows; row++)
        for (int64_t i = 0; i < width; i++) {
          const T* pair = both.data() + row * 2 * width + i;
          const double gate = to_float(pair[0]), up = to_float(pair[width]);
          count.compare(to_float(out[row * width + i]), gate / (1 + std::exp(-gate)) * up,
                        Dtype<T>::TOLERANCE);
        }
    }
  return count.report();
}

// A weight [width, depth] in panels for products of T, as panels.py lays it out.
template <typename T, typename W>
std::vector<W> pack(const std::vector<W>& weight, int64_t width, int64_t depth) {
  constexpr int64_t LANE = ProductOf<T>::Kind::PER_LANE;
  std::vector<W> panels((width + PANEL - 1) / PANEL * PANEL * depth);
  for (int64_t row = 0; row < width; row++)
    for (int64_t i = 0; i < depth; i++) {
      const int64_t step = i / LANE * PANEL + row % PANEL;
      panels[row / PANEL * PANEL * depth + step * LANE + i % LANE] = weight[row * depth + i];
    }
  return panels;
}

template <typename T>
int check_project(Entry<ProjectArgs> entry) {
  Count count{"project", Dtype<T>::NAME};
  for (int64_t rows : {1, 7, 70, 100})
    for (int64_t width : {16, 64, 97, 130})
      for (int64_t depth : {2, 34, 96, 200})
        for (int64_t columns : {16, 32, 64})
          for (bool adds : {false, true}) {
            const float size = 1 / std::sqrt(float(depth));
            const auto x = draw<T>(rows, depth, 1, true), bias = draw<T>(1, width);
            const auto weight = draw<T>(width, depth, size, true), before = draw<T>(rows, width);
            const auto panels = pack<T>(weight, width, depth);
            auto out = before;
            run<ProjectArgs, T>(count, entry, out, [&](T* to) {
              return ProjectArgs{.x = x.data(), .panels = panels.data(), .bias = bias.data(),
                                 .out = to, .rows = rows, .depth = depth, .width = width,
                                 .panel_stride = PANEL * depth, .columns = columns,
                                 .adds = adds, .tile_rows = tile_rows};
            });
            for (int64_t i = 0; i < rows * width; i++) {
              double sum = to_float(bias[i % width]) + (adds ? to_float(before[i]) : 0);
              for (int64_t k = 0; k < depth; k++)
                sum += double(to_float(x[i / width * depth + k])) *
                       to_float(weight[i % width * depth + k]);
              count.compare(to_float(out[i]), sum, Dtype<T>::TOLERANCE);
            }
          }
  return count.report();
}

template <typename T>
int check_project_int8(Entry<ProjectArgs> entry) {
  Count count{"project_int8", Dtype<T>::NAME};
  std::uniform_int_distribution<int> numbers(-127, 127);
  for (int64_t rows : {1, 7, 12, 13, 100})
    for (int64_t width : {16, 97, 130})
      for (int64_t depth : {2, 34, 96, 200})
        for (int64_t columns : {16, 32, 64})
          for (bool adds : {false, true}) {
            const auto x = draw<T>(rows, depth, 1, true), bias = draw<T>(1, width);
            const auto scales = draw<float>(width, 1, 1 / std::sqrt(float(depth)) / 70);
            const auto before = draw<T>(rows, width);
            std::vector<int8_t> weight(width * depth);
            for (int8_t& number : weight) number = numbers(generator);
            const auto panels = pack<T>(weight, width, depth);
            auto out = before;
            run<ProjectArgs, T>(count, entry, out, [&](T* to) {
              return ProjectArgs{.x = x.data(), .panels = panels.data(), .bias = bias.data(),
                                 .scales = scales.data(), .out = to, .rows = rows,
                                 .depth = depth, .width = width, .panel_stride = PANEL * depth,
                                 .columns = columns, .adds = adds, .tile_rows = tile_rows};
            });
            for (int64_t i = 0; i < rows * width; i++) {
              double sum = 0;
              for (int64_t k = 0; k < depth; k++)
                sum += double(to_float(x[i / width * depth + k])) * weight[i % width * depth + k];
              sum = sum * scales[i % width] + to_float(bias[i % width]);
              count.compare(to_float(out[i]), sum + (adds ? to_float(before[i]) : 0),
                            Dtype<T>::TOLERANCE);
            }
          }
  return count.report();
}

template <typename T>
int check_head_norm(Entry<HeadNormArgs> entry) {
  Count count{"head_rms_norm", Dtype<T>::NAME};
  for (int64_t tokens : {1, 20})
    for (int64_t heads : {1, 6})
      for (int64_t kv_heads : {1, 3})
        for (int64_t dim : {4, 16, 20, 64, 128}) {
          const int64_t normed = heads + kv_heads, width = (normed + kv_heads) * dim;
          const auto weight = draw<T>(normed, dim), before = draw<T>(tokens, width);
          auto qkv = before;
          run<HeadNormArgs, T>(count, entry, qkv, [&](T* to) {
            return HeadNormArgs{.qkv = to, .weight = weight.data(), .tokens = tokens,
                                .token_stride = width, .heads = normed, .head_dim = dim,
                                .eps = EPS};
          });
          for (int64_t i = 0; i < tokens * width; i += dim) {
            const int64_t head = i % width / dim;
            std::vector<double> expected(dim);
            for (int64_t k = 0; k < dim; k++) expected[k] = to_float(before[i + k]);
            if (head < normed) expected = rms(before.data() + i, weight.data() + head * dim, dim);
            for (int64_t k = 0; k < dim; k++)
              count.compare(to_float(qkv[i + k]), expected[k], Dtype<T>::TOLERANCE);
          }
        }
  return count.report();
}

template <typename T>
int check_write(Entry<WriteArgs> entry) {
  Count count{"rotate_and_write", Dtype<T>::NAME};
  for (int64_t tokens : {1, 20})
    for (int64_t heads : {1, 6})
      for (int64_t kv_heads : {1, 3})
        for (int64_t dim : {4, 16, 20, 64, 128})
          for (int64_t size : {1, 4, 16}) {
            const int64_t kv_width = kv_heads * dim, rotated = heads * dim + kv_width;
            const int64_t width = rotated + kv_width, value_offset = size * kv_width;
            const int64_t block_stride = 2 * value_offset, pool = (tokens + 1) * block_stride;
            const auto before = draw<T>(tokens, width), slots = draw<T>(1, pool);
            const auto rotations = draw<float>(tokens, dim, 1, true);
            std::vector<int64_t> blocks(tokens), offsets(tokens);
            for (int64_t token = 0; token < tokens; token++)
              blocks[token] = tokens - token, offsets[token] = token % size;
            auto memory = before;  // queries, keys and values, and behind them the pool
            memory.insert(memory.end(), slots.begin(), slots.end());
            run<WriteArgs, T>(count, entry, memory, [&](T* to) {
              return WriteArgs{.qkv = to, .rotations = rotations.data(), .kv = to + tokens * width,
                               .blocks = blocks.data(), .offsets = offsets.data(),
                               .tokens = tokens, .heads = heads, .kv_heads = kv_heads,
                               .head_dim = dim, .block_stride = block_stride,
                               .value_offset = value_offset};
            });
            for (int64_t token = 0; token < tokens; token++)
              for (int64_t i = 0; i < width; i += 2) {
                const T* pair = before.data() + token * width + i;
                const double x = to_float(pair[0]), y = to_float(pair[1]);
                const float* turn = rotations.data() + token * dim + i % dim;
                const bool turns = i < rotated;
                const T* actual = memory.data() + token * width + i;
                count.compare(to_float(actual[0]), turns ? x * turn[0] - y * turn[1] : x,
                              Dtype<T>::TOLERANCE);
                count.compare(to_float(actual[1]), turns ? x * turn[1] + y * turn[0] : y,
                              Dtype<T>::TOLERANCE);
              }
            auto expected = slots;
            for (int64_t token = 0; token < tokens; token++) {
              const T* keys = memory.data() + token * width + heads * dim;
              T* slot = expected.data() + blocks[token] * block_stride + offsets[token] * kv_width;
              std::memcpy(slot, keys, kv_width * sizeof(T));
              std::memcpy(slot + value_offset, keys + kv_width, kv_width * sizeof(T));
            }
            if (std::memcmp(expected.data(), memory.data() + tokens * width, pool * sizeof(T)))
              count.wrong++;
          }
  return count.report();
}

// A step of attention: rows of a batch, each some tokens of a sequence from a position on.
template <typename T>
struct AttentionCase {
  int64_t heads, kv_heads, dim, size;
  std::vector<int64_t> pieces, tables;  // as AttendArgs wants them
  int64_t tokens = 0, num_blocks = 0, most_blocks;
  std::vector<T> qkv, kv;

  AttentionCase(int64_t heads, int64_t kv_heads, int64_t dim, int64_t size,
                const std::vector<std::pair<int64_t, int64_t>>& rows)
      : heads(heads), kv_heads(kv_heads), dim(dim), size(size) {
    int64_t last = 0;
    for (const auto& row : rows) last = std::max(last, row.second + row.first);
    most_blocks = (last + size - 1) / size;
    for (const auto& row : rows) {
      tokens += row.first;
      for (int64_t block = 0; block < most_blocks; block++) tables.push_back(num_blocks++);
    }
    cut(rows, 64);
    std::shuffle(tables.begin(), tables.end(), generator);
    qkv = draw<T>(tokens, (heads + 2 * kv_heads) * dim, 1, true);
    kv = draw<T>(num_blocks, 2 * size * kv_heads * dim, 1, true);
  }

  void cut(const std::vector<std::pair<int64_t, int64_t>>& rows, int64_t size) {
    pieces.clear();
    int64_t token = 0;
    for (size_t row = 0; row < rows.size(); row++) {
      const auto [length, start] = rows[row];
      for (int64_t first = 0; first < length; first += size) {
        const int64_t taken = std::min(size, length - first);
        pieces.insert(pieces.end(), {token + first, taken, int64_t(row), start + first});
      }
      token += length;
    }
  }

  const T* slot(int64_t row, int64_t position, int64_t kv_head, bool is_value) const {
    const int64_t block = tables[row * most_blocks + position / size];
    return kv.data() + ((block * 2 + is_value) * size + position % size) * kv_heads * dim +
           kv_head * dim;
  }

  std::vector<double> expected(int64_t row, int64_t token, int64_t position, int64_t head) const {
    const T* query = qkv.data() + (token * (heads + 2 * kv_heads) + head) * dim;
    const int64_t kv_head = head / (heads / kv_heads);
    std::vector<double> scores(position + 1), out(dim);
    double peak = -INFINITY, total = 0;
    for (int64_t p = 0; p <= position; p++) {
      for (int64_t i = 0; i < dim; i++)
        scores[p] += double(to_float(query[i])) * to_float(slot(row, p, kv_head, false)[i]);
      peak = std::max(peak, scores[p] /= std::sqrt(double(dim)));
    }
    for (double& score : scores) total += score = std::exp(score - peak);
    for (int64_t p = 0; p <= position; p++)
      for (int64_t i = 0; i < dim; i++)
        out[i] += scores[p] / total * to_float(slot(row, p, kv_head, true)[i]);
    return out;
  }
};

template <typename T>
std::vector<T> run_attention_case(Count& count, Entry<AttendArgs> entry,
                                  const AttentionCase<T>& test, int64_t parts) {
  constexpr int64_t SCRATCH = 1 << 18;  // floats: more than any case needs
  std::vector<float> scratch(3 * SCRATCH);
  std::vector<T> out(test.tokens * test.heads * test.dim);
  const int64_t value_offset = test.size * test.kv_heads * test.dim;
  run<AttendArgs, T>(count, entry, out, [&](T* to) {
    return AttendArgs{.qkv = test.qkv.data(), .out = to, .kv = test.kv.data(),
                      .pieces = test.pieces.data(), .tables = test.tables.data(),
                      .scratch = scratch.data(), .scratch_stride = SCRATCH,
                      .num_pieces = int64_t(test.pieces.size() / 4), .parts = parts,
                      .table_stride = test.most_blocks, .block_size = test.size,
                      .block_stride = 2 * value_offset, .value_offset = value_offset,
                      .heads = test.heads, .kv_heads = test.kv_heads, .head_dim = test.dim,
                      .tile_rows = tile_rows, .scale = 1 / std::sqrt(double(test.dim))};
  });
  return out;
}

template <typename T>
std::vector<T> check_attention_case(Count& count, Entry<AttendArgs> entry,
                                    const AttentionCase<T>& test, int64_t parts) {
  const std::vector<T> out = run_attention_case(count, entry, test, parts);
  for (size_t piece = 0; piece < test.pieces.size(); piece += 4)
    for (int64_t token = 0; token < test.pieces[piece + 1]; token++)
      for (int64_t head = 0; head < test.heads; head++) {
        const int64_t row = test.pieces[piece + 2], at = test.pieces[piece] + token;
        const auto expected = test.expected(row, at, test.pieces[piece + 3] + token, head);
        for (int64_t i = 0; i < test.dim; i++)
          count.compare(to_float(out[(at * test.heads + head) * test.dim + i]), expected[i],
                        Dtype<T>::TOLERANCE);
      }
  return out;
}

template <typename T>
int check_attention(Entry<AttendArgs> entry) {
  Count count{"attend", Dtype<T>::NAME};
  for (int64_t dim : {4, 20, 64, 96, 128})
    for (int64_t group : {1, 3, 4})
      for (int64_t kv_heads : {1, 2})
        for (int64_t size : {1, 16}) {
          // Tiles may be emulated, which takes its time.
          if (tile_rows > 0 && (size == 1 || dim == 64 || dim == 96)) continue;
          // Tokens and first positions: decodes at the edges of tiles, chunks that begin anywhere.
          const AttentionCase<T> decodes(group * kv_heads, kv_heads, dim, size,
                                         {{1, 0}, {1, 5}, {1, 31}, {1, 32}, {1, 63}, {1, 100}});
          const std::vector<std::pair<int64_t, int64_t>> rows = {{40, 0}, {17, 37}, {1, 70}};
          AttentionCase<T> chunks(group * kv_heads, kv_heads, dim, size, rows);
          for (int64_t parts : {int64_t(1), kv_heads}) {
            check_attention_case(count, entry, decodes, parts);
            const auto whole = check_attention_case(count, entry, chunks, parts);
            // However few tokens share what is read, their bytes are the same.
            for (int64_t few : {1, 2}) {
              chunks.cut(rows, few);
              const auto cut = run_attention_case(count, entry, chunks, parts);
              if (std::memcmp(cut.data(), whole.data(), whole.size() * sizeof(T))) count.wrong++;
            }
            chunks.cut(rows, 64);
          }
        }
  return count.report();
}

}  // namespace

#define CHECK(suffix, T)                                                                       \
  check_norms<T>(rms_norm_##suffix, layer_norm_##suffix) + check_silu<T>(silu_mul_##suffix) +  \
      check_head_norm<T>(head_rms_norm_##suffix) + check_write<T>(rotate_and_write_##suffix) + \
      check_attention<T>(attend_##suffix) + check_project<T>(project_##suffix) + \
      check_project_int8<T>(project_##suffix)

int main() {
  int wrong = 0;
  if (HAS_TILES && has_tiles()) {
    std::printf("in tiles\n");
    tile_rows = 9;
    wrong += check_project<BFloat16>(project_bfloat16);
    tile_rows = 1;
  }
  wrong += CHECK(float32, float) + CHECK(bfloat16, BFloat16);
  return wrong ? 1 : 0;
}
