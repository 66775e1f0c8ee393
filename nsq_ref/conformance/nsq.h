/* nsq.h: what `nsq check ./libmine.so` calls. Implement nsq_encode, nsq_decode, or any of the others.
 *
 * Arrays are C-contiguous and aligned to 64 bytes; their shapes and dtypes follow from the scheme by the
 * table "Parts" of the specification, with `sequences` as the leading axis. The caller allocates all of
 * them and frees them; a part that the scheme does not store is NULL. Nothing but the outputs may be
 * written. Spec: NSQ-1.
 */
#ifndef NSQ_H
#define NSQ_H
#include <stdint.h>
#ifdef __cplusplus
extern "C" {
#endif

enum nsq_status { NSQ_DONE, NSQ_REFUSED, NSQ_NOT_IMPLEMENTED };
enum nsq_dtype { NSQ_FLOAT32, NSQ_FLOAT16, NSQ_BFLOAT16 };

typedef struct {
    int32_t bits;             /* 2, 3, 4, 8 */
    int32_t separate_norm;    /* 0, 1 */
    int32_t axis;             /* 0 channel, 1 token */
    int32_t symmetric;        /* 0, 1 */
    int32_t scale_rule;       /* 0 range, 1 search */
    int32_t norm_rule;        /* 0 plain, 1 balanced */
    int32_t magnitude;        /* 0 norm, 1 gain, 2 lsq */
    int32_t block_size;       /* 0 for one block of all tokens */
    int32_t sink_tokens;
    int32_t outlier_channels;
    int32_t scale_dtype;      /* enum nsq_dtype */
    int32_t norm_dtype;       /* enum nsq_dtype */
} nsq_scheme;

typedef struct {
    uint8_t *packed;
    void *scale;              /* of scale_dtype */
    void *norm;               /* of norm_dtype */
    void *zero;               /* of scale_dtype */
    int32_t *outlier_index;
    uint16_t *outliers;       /* float16 */
    void *sinks;              /* of the dtype of x */
} nsq_parts;

/* x: [sequences, tokens, head_dim] of `dtype`. Return an enum nsq_status. */
int nsq_encode(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, nsq_parts *out);

/* nsq_encode for keys under feedback (F1), asked only with --feedback. Sequence s is of the head
 * s % kv_heads. order: [kv_heads, head_dim]; factor: [kv_heads, head_dim, head_dim], rows and columns
 * in that order, weights above 0 and at most 1 on the diagonal, and 0 below it. */
int nsq_feedback(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t sequences,
                 int64_t tokens, int64_t head_dim, const int32_t *order, const float *factor,
                 int64_t kv_heads, nsq_parts *out);

/* x_hat: [sequences, tokens, head_dim]; `dtype` is that of the sinks. */
int nsq_decode(const nsq_scheme *scheme, const nsq_parts *parts, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, float *x_hat);

/* query: [heads, query_tokens, head_dim]; output: [heads, query_tokens, value_head_dim]; keys and
 * values have kv_heads sequences, their sinks in float32. softcap and sliding_window: 0 for none. */
typedef struct {
    int64_t heads, query_tokens, kv_heads, tokens, head_dim, value_head_dim;
    float scale;
    int32_t causal;
    float softcap;
    int32_t sliding_window;
} nsq_attention;

int nsq_attend(const nsq_attention *how, const float *query, const nsq_scheme *key_scheme,
               const nsq_parts *keys, const nsq_scheme *value_scheme, const nsq_parts *values,
               float *output);

/* A cache of `rows` sequences lives through `steps` steps. steps_of: [steps, 1 + rows], a step being
 * its kind, 0 append or 1 crop, and a number for each row: how many of its next tokens of x, [rows,
 * tokens, head_dim], are appended, or to what length it is cropped. Return what is stored for `row`
 * at the end: the sealed blocks, the sinks, and the tail [tail_tokens, head_dim] of `dtype`. */
int nsq_stream(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t rows, int64_t tokens,
               int64_t head_dim, const int32_t *steps_of, int64_t steps, int64_t row, nsq_parts *out,
               void *tail);

/* The same of keys that are sealed with feedback (F1): order and factor as in nsq_feedback, kv_heads
 * being 1, or rows. */
int nsq_stream_feedback(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t rows,
                        int64_t tokens, int64_t head_dim, const int32_t *steps_of, int64_t steps,
                        int64_t row, const int32_t *order, const float *factor, int64_t kv_heads,
                        nsq_parts *out, void *tail);

#ifdef __cplusplus
}
#endif
#endif
