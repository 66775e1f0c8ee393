// Reading the cache: tokens that lie together, as they are stored.
#pragma once

#include "attention/work.h"

namespace nsq {

// The keys, or the values, of one key/value head of a row, sealed but not yet written to the tail.
struct Tokens {
  const Side* side;
  Cut now;
  int64_t past;
  int64_t head;        // through rows and heads
  const float* fresh;  // of position `past` and on
};

// Tokens that lie together: floats, or of one block.
struct Piece {
  int64_t tokens;
  const float* floats;  // null if it is of a block
  Block block;
};

// Room for what is widened of a piece.
struct Room {
  float *scale, *zero, *norm;  // of one block
  float* stored;               // tokens of sinks or tail
};

Tokens tokens_of(const Work& work, const Side& side, int64_t row, int64_t head);
// The tokens from position `first` on, at least one and none from `last` on.
Piece piece_at(const Work& work, const Tokens& tokens, int64_t first, int64_t last,
               const Room& room);
// All of them as float32.
void load(const Work& work, const Tokens& tokens, int64_t first, int64_t last, const Room& room,
          float* out);

}  // namespace nsq
