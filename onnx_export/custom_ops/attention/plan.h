// How the work of one call is cut, and what a task works in.
#pragma once

#include "attention/read.h"

namespace nsq {

// A3: the most tokens in one sum. What is longer is added up tile by tile.
constexpr int64_t kTile = 512;
// Rows of scores must not be a multiple of a cache's period apart.
constexpr int64_t kStride = kTile + 16;

// Sums over some of the tokens, for all rows of some queries.
struct Partial {
  float* most;    // [rows], the maximum that exponentials are taken from; -infinity: none is seen
  float* total;   // [rows], the sum of exponentials
  float* output;  // [rows, value_dim]
  Roundings* roundings;  // [rows]

  Partial from(int64_t row, int64_t value_dim) const {
    return {most + row, total + row, output + row * value_dim, roundings + row};
  }
};

// By sizes alone. A task is for some queries of the heads that share a key/value head, and for a
// segment of the tokens.
struct Plan {
  bool decode_keys, decode_values;  // or codes are read
  int64_t task_queries;             // query tokens of a task
  int64_t pass_queries;             // of them, those whose scores are held at a time
  int64_t tiles;                    // tasks of a row and head, by queries
  int64_t segments;                 // and by tokens
  int64_t segment_tokens;

  int64_t task_rows, pass_rows;  // the same for all heads that share keys
  int64_t partial_size;          // floats of sums over a segment

  explicit Plan(const Work& work);
  Partial partial_at(float* memory) const;
};

// Query tokens of one row, for all query heads that share one key/value head.
struct Queries {
  int64_t row, head;     // `head` counts through rows and key/value heads
  int64_t first, count;  // query tokens
  int64_t position;      // of the first
  const float* rows;     // [count, group, head_dim]
};

Queries queries_of(const Work& work, const Plan& plan, int64_t tile);

// What a task needs; all are parts of one allocation.
struct Workspace {
  Scratch<float> memory;
  float* scores;   // [pass rows, kStride]
  float* factors;  // [pass rows]: what earlier weights must be multiplied with
  float* sums;     // [pass rows, value_dim]: the output of one tile of tokens
  Room room;       // for kTile tokens
  float* bias;     // [kTile]
  float* keys;     // [kTile, head_dim], where they are decoded
  float* values;
  float* partial;  // what `Plan::partial_at` takes, unless segments have theirs

  bool allocate(const Work& work, const Plan& plan);
};

}  // namespace nsq
