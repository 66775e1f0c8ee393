/* A port that does what the first value of x says: the tests write behind its back. */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include "nsq.h"

/* Of every part for 5 tokens of 4 channels, blocks of 2, one sink, one outlier channel, float16. */
static const int64_t SIZES[7] = {8, 16, 8, 16, 8, 8, 16};

int nsq_encode(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, nsq_parts *out) {
  uint8_t *parts[7];
  int what = (int)((const float *)x)[0];
  if (dtype != NSQ_FLOAT32) { /* tells what it was given */
    int64_t told[4] = {dtype, sequences, tokens, head_dim};
    for (int i = 0; i < 4; i++) out->packed[i] = (uint8_t)told[i];
    return NSQ_DONE;
  }
  memcpy(parts, out, sizeof parts);
  for (int i = 0; i < 7; i++)
    if ((uintptr_t)parts[i] % 64 || (uintptr_t)x % 64) return 64;
  for (int i = 0; i < 7; i++) memset(parts[i], i, SIZES[i]);
  if (what >= 1 && what <= 7) parts[what - 1][-4] = 0;
  if (what >= 11 && what <= 17) parts[what - 11][SIZES[what - 11] + 12] = 0;
  switch (what) {
    case 21: ((float *)x)[1] = 5; break;
    case 22: ((nsq_scheme *)scheme)->bits = 3; break;
    case 23: out->norm = NULL; break;
    case 24: *(volatile int *)8 = 1; break;
    case 25: return 7;
    case 26: for (volatile int i = 0;; i++) {}
    case 27: return NSQ_REFUSED;
    case 28: return NSQ_NOT_IMPLEMENTED;
    case 29: printf("to standard output\n"); fflush(stdout); break;
    case 30: exit(3);
  }
  return NSQ_DONE;
}

/* D1 of symmetric 4 bits without norms, scales in float32. */
int nsq_decode(const nsq_scheme *scheme, const nsq_parts *parts, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, float *x_hat) {
  int64_t row = (head_dim + 1) / 2;
  if (scheme->bits != 4 || scheme->separate_norm || scheme->axis || scheme->scale_dtype ||
      !scheme->symmetric || parts->norm || parts->zero || parts->sinks || dtype)
    return NSQ_NOT_IMPLEMENTED;
  for (int64_t n = 0; n < sequences; n++)
    for (int64_t t = 0; t < tokens; t++)
      for (int64_t j = 0; j < head_dim; j++) {
        uint8_t pair = parts->packed[(n * tokens + t) * row + j / 2];
        float scale = ((const float *)parts->scale)[n * head_dim + j];
        x_hat[(n * tokens + t) * head_dim + j] = (float)((j % 2 ? pair >> 4 : pair & 15) - 8) * scale;
      }
  return NSQ_DONE;
}

/* Tells what it was given. */
int nsq_attend(const nsq_attention *how, const float *query, const nsq_scheme *key_scheme,
               const nsq_parts *keys, const nsq_scheme *value_scheme, const nsq_parts *values,
               float *output) {
  float told[16] = {
      how->heads, how->query_tokens, how->kv_heads, how->tokens, how->head_dim, how->value_head_dim,
      how->scale, how->causal, how->softcap, how->sliding_window, query[0], key_scheme->bits,
      keys->packed[0], value_scheme->bits, values->packed[0], keys->sinks == NULL};
  memcpy(output, told, sizeof told);
  return NSQ_DONE;
}

/* Fills the parts with their number, and the tail with the row's last tokens. */
int nsq_stream(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t rows, int64_t tokens,
               int64_t head_dim, const int32_t *steps_of, int64_t steps, int64_t row, nsq_parts *out,
               void *tail) {
  int64_t length = 0;
  for (int64_t s = 0; s < steps; s++) {
    if (steps_of[s * (1 + rows)]) return NSQ_NOT_IMPLEMENTED;
    length += steps_of[s * (1 + rows) + 1 + row];
  }
  int64_t sinks = length < scheme->sink_tokens ? length : scheme->sink_tokens;
  int64_t sealed = (length - sinks) / scheme->block_size * scheme->block_size;
  int64_t size = head_dim * (dtype == NSQ_FLOAT32 ? 4 : 2);
  const char *from = (const char *)x + row * tokens * size;
  memcpy(out->sinks, from, sinks * size);
  memcpy(tail, from + (sinks + sealed) * size, (length - sinks - sealed) * size);
  memset(out->packed, 0x88, sealed * ((head_dim + 1) / 2));
  return NSQ_DONE;
}

/* Does the same, and tells in the first bytes of what is packed what it was given. */
int nsq_stream_feedback(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t rows,
                        int64_t tokens, int64_t head_dim, const int32_t *steps_of, int64_t steps,
                        int64_t row, const int32_t *order, const float *factor, int64_t kv_heads,
                        nsq_parts *out, void *tail) {
  int status = nsq_stream(scheme, x, dtype, rows, tokens, head_dim, steps_of, steps, row, out, tail);
  if (status == NSQ_DONE) {
    out->packed[0] = (uint8_t)kv_heads;
    out->packed[1] = (uint8_t)order[kv_heads * head_dim - 1];
    out->packed[2] = (uint8_t)factor[1];
  }
  return status;
}
