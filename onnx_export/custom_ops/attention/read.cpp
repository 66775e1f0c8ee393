#include "attention/read.h"

namespace nsq {

Tokens tokens_of(const Work& work, const Side& side, int64_t row, int64_t head) {
  return {&side, cut(side.scheme, work.rows[row].length), work.rows[row].past, head,
          work.staged(side, head)};
}

Piece piece_at(const Work& work, const Tokens& tokens, int64_t first, int64_t last,
               const Room& room) {
  const Side& side = *tokens.side;
  const Scheme& scheme = side.scheme;
  const int64_t sinks = tokens.now.sinks, tail = tokens.now.tail_start();
  if (first < sinks || first >= tail) {
    if (first < sinks) last = std::min(last, sinks);
    if (first >= tokens.past) {
      return {last - first, tokens.fresh + (first - tokens.past) * side.head_dim, {}};
    }
    last = std::min(last, tokens.past);
    const Places from = places(side, tokens.head, 0);
    const int64_t place = first < sinks ? from.sinks + first * side.head_dim
                                        : from.tail + (first - tail) * side.head_dim;
    const void* part = first < sinks ? side.present.sinks : side.present.tail;
    return {last - first,
            work.widened(at(part, place, work.call.dtype), (last - first) * side.head_dim,
                         room.stored),
            {}};
  }
  const int64_t sealed = first - sinks;
  const int64_t block_end = (sealed / scheme.block_size + 1) * scheme.block_size;
  const int64_t count = std::min(last - sinks, block_end) - sealed;
  const int64_t scales = scheme.per_token ? count : side.head_dim;
  const Places from = places(side, tokens.head, sealed);
  Block block = {};
  block.packed = side.present.packed + from.packed;
  const auto widen = [&](const void* part, int64_t place, int64_t number, Dtype dtype,
                         float* out) -> float* {
    if (part == nullptr) return nullptr;
    work.kernels.widen(at(part, place, dtype), dtype, number, out);
    const auto* next = at(part, place + number, dtype);
    for (int64_t i = 0; i < number * size_of(dtype); i += 64) __builtin_prefetch(next + i);
    return out;
  };
  block.scale = widen(side.present.scale, from.scale, scales, scheme.scale_dtype, room.scale);
  block.zero = widen(side.present.zero, from.scale, scales, scheme.scale_dtype, room.zero);
  block.norm = widen(side.present.norm, from.norm, count, scheme.norm_dtype, room.norm);
  return {count, nullptr, block};
}

void load(const Work& work, const Tokens& tokens, int64_t first, int64_t last, const Room& room,
          float* out) {
  const int64_t head_dim = tokens.side->head_dim;
  while (first < last) {
    const Piece piece = piece_at(work, tokens, first, last, room);
    if (piece.floats != nullptr) {
      std::copy(piece.floats, piece.floats + piece.tokens * head_dim, out);
    } else {
      work.kernels.decode_block(tokens.side->scheme, piece.block, piece.tokens, head_dim, out);
    }
    first += piece.tokens;
    out += piece.tokens * head_dim;
  }
}

}  // namespace nsq
