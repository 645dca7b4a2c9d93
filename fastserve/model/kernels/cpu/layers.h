// The layers of a decoder with a norm before attention and one before a gated MLP, as one program.
//
// Every stage is that of a kernel which can also be run by itself: the bits are the same.

#pragma once

#include <vector>

#include "attention.h"
#include "projection.h"
#include "row_kernels.h"
#include "team.h"

namespace {

// A weight in panels, as `Project` reads it.
struct Panels {
  const void* panels;
  const void* bias;     // may be null
  const float* scales;  // null: of the kernels' dtype
  int64_t depth, width, panel_stride, columns;
};

struct Layer {
  const void *attention_norm, *mlp_norm;
  const void* head_norm;  // [heads + kv_heads, head_dim]; may be null
  void* kv;               // keys in block 0
  Panels qkv, output, gate_up, down;
};

// What a step brings; the memory between stages is the caller's.
struct LayersArgs {
  const Layer* layers;
  int64_t num_layers;
  void* hidden;           // [rows, hidden]; overwritten
  const int64_t* scored;  // [num_scored] rows that go through the end of the last layer; null: all
  void* scored_hidden;    // [num_scored, hidden]; what is returned if rows are scored
  void *normed, *mixed, *scored_mixed, *qkv, *gate_up, *gated;
  int64_t rows, num_scored;
  int64_t tile_rows;  // of projections
  double attention_eps, mlp_eps, head_eps;
  WriteArgs write;    // without qkv and kv
  AttendArgs attend;  // without qkv, kv and out
};

struct GatherArgs {
  const void* x;
  const int64_t* picked;  // [rows]
  void* out;              // [rows, width]
  int64_t rows, width;

  int64_t chunks() const { return chunks_of(rows, width); }
};

template <typename T>
void gather(const GatherArgs& args, Chunks chunks, int64_t) {
  for_rows(chunks, args.rows, args.width, [&](int64_t row) {
    std::memcpy((T*)args.out + row * args.width, (const T*)args.x + args.picked[row] * args.width,
                args.width * sizeof(T));
  });
}

// The stages of a layer, whose arguments have to stay where they are while it runs.
template <typename T>
struct LayerStages {
  GatherArgs pick_hidden, pick_mixed;
  NormArgs attention_norm, mlp_norm;
  HeadNormArgs head_norm;
  WriteArgs write;
  AttendArgs attend;
  SiluArgs silu;
  ProjectArgs qkv, output, gate_up, down;

  void add_to(std::vector<Stage>& program, const LayersArgs& args, const Layer& layer,
              bool is_last) {
    auto add = [&](const Stage& stage) {
      if (stage.chunks > 0) program.push_back(stage);
    };
    auto projection = [&](const Panels& weight, const void* x, void* out, int64_t rows, bool adds) {
      return ProjectArgs{x,    weight.panels, weight.bias,  weight.scales,       out,
                         rows, weight.depth,  weight.width, weight.panel_stride, weight.columns,
                         adds, args.tile_rows};
    };
    const int64_t width = layer.output.width;
    void *hidden = args.hidden, *mixed = args.mixed;
    int64_t rows = args.rows;
    attention_norm =
        NormArgs{hidden, layer.attention_norm, nullptr, args.normed, rows, width, args.attention_eps};
    add(stage_of<NormArgs, rms_norm<T>>(attention_norm));
    qkv = projection(layer.qkv, args.normed, args.qkv, rows, false);
    add(stage_of<ProjectArgs, project<T>>(qkv));
    if (layer.head_norm) {
      const int64_t heads = args.write.heads + args.write.kv_heads;
      head_norm = HeadNormArgs{args.qkv, layer.head_norm, rows, layer.qkv.width, heads,
                               args.write.head_dim, args.head_eps};
      add(stage_of<HeadNormArgs, head_rms_norm<T>>(head_norm));
    }
    write = args.write;
    write.qkv = args.qkv;
    write.kv = layer.kv;
    add(stage_of<WriteArgs, rotate_and_write<T>>(write));
    attend = args.attend;
    attend.qkv = args.qkv;
    attend.kv = layer.kv;
    attend.out = mixed;
    add(stage_of<AttendArgs, ::attend<T>>(attend));
    if (is_last && args.scored) {
      rows = args.num_scored;
      pick_hidden = GatherArgs{hidden, args.scored, args.scored_hidden, rows, width};
      add(stage_of<GatherArgs, gather<T>>(pick_hidden));
      pick_mixed = GatherArgs{mixed, args.scored, args.scored_mixed, rows, layer.output.depth};
      add(stage_of<GatherArgs, gather<T>>(pick_mixed));
      hidden = args.scored_hidden;
      mixed = args.scored_mixed;
    }
    output = projection(layer.output, mixed, hidden, rows, true);
    add(stage_of<ProjectArgs, project<T>>(output));
    mlp_norm = NormArgs{hidden, layer.mlp_norm, nullptr, args.normed, rows, width, args.mlp_eps};
    add(stage_of<NormArgs, rms_norm<T>>(mlp_norm));
    gate_up = projection(layer.gate_up, args.normed, args.gate_up, rows, false);
    add(stage_of<ProjectArgs, project<T>>(gate_up));
    silu = SiluArgs{args.gate_up, args.gated, rows, layer.down.depth};
    add(stage_of<SiluArgs, silu_mul<T>>(silu));
    down = projection(layer.down, args.gated, hidden, rows, true);
    add(stage_of<ProjectArgs, project<T>>(down));
  }
};

template <typename T>
void run_layers(Threads& threads, const LayersArgs& args) {
  std::vector<LayerStages<T>> layers(args.num_layers);
  std::vector<Stage> program;
  for (int64_t i = 0; i < args.num_layers; i++)
    layers[i].add_to(program, args, args.layers[i], i == args.num_layers - 1);
  threads.run(program.data(), program.data() + program.size());
}

}  // namespace
