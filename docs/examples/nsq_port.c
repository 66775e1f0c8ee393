/* The paper's scheme nsep+pchan4, whole or in blocks, in C99. Ids such as N1 are rules of NSQ-1.
 *
 *     cc -std=c99 -O2 -ffp-contract=off -shared -fPIC -o libport.so nsq_port.c -lm
 *
 * -ffp-contract=off, because the rules name every rounding and a fused multiply-add skips one.
 */
#include "nsq.h"

#include <math.h>
#include <stdlib.h>
#include <string.h>

enum { QMAX = 7, OFFSET = 8, HALF_INFINITY = 0x7c00 };

/* --- dtypes -------------------------------------------------------------------------------- */

static float from_bits(uint32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static float widen(uint16_t half)
{
    int exponent = half >> 10 & 31, mantissa = half & 1023;
    float magnitude = exponent == 31  ? INFINITY /* NaN too: both are refused */
                      : exponent == 0 ? ldexpf((float)mantissa, -24)
                                      : ldexpf((float)(1024 + mantissa), exponent - 25);
    return half >> 15 ? -magnitude : magnitude;
}

/* One rounding to float16, half to even, subnormals kept, infinity beyond the range. */
static uint16_t narrow(float value)
{
    uint32_t bits, shift = 13;
    memcpy(&bits, &value, sizeof bits);
    uint32_t sign = bits >> 16 & 0x8000;
    bits &= 0x7fffffff;
    if (bits >= 0x47800000) /* 2^16 */
        return (uint16_t)(sign | HALF_INFINITY);
    if (bits >= 0x38800000) { /* 2^-14: normal, and the bias of the exponent goes from 127 to 15 */
        bits -= 112u << 23;
    } else { /* subnormal: a multiple of 2^-24 */
        shift = 126 - (bits >> 23);
        bits = (bits & 0x7fffff) | 0x800000;
    }
    if (shift > 24) /* less than half of 2^-24 */
        return 0;
    uint32_t half = bits >> shift, rest = bits << (32 - shift);
    half += rest > 0x80000000 || (rest == 0x80000000 && (half & 1));
    return (uint16_t)(half ? sign | half : 0); /* Z1 */
}

static float element(const void *x, int32_t dtype, int64_t i) /* I1 */
{
    if (dtype == NSQ_FLOAT32)
        return ((const float *)x)[i];
    uint16_t bits = ((const uint16_t *)x)[i];
    return dtype == NSQ_FLOAT16 ? widen(bits) : from_bits((uint32_t)bits << 16);
}

/* --- N1: the norm, correctly rounded ------------------------------------------------------- */

/* Add sign * value^2, exactly, to a number of 32 bits a limb. `value` has at most 25 bits. */
static void add_square(int64_t number[20], double value, int sign)
{
    int exponent;
    uint64_t root = (uint64_t)ldexp(frexp(fabs(value), &exponent), 25);
    int position = 2 * exponent + 300; /* of the lowest bit; exponent is -149 at least */
    uint64_t low = (root * root & 0xffffffff) << position % 32;
    uint64_t high = (root * root >> 32) << position % 32;
    number += position / 32;
    number[0] += sign * (int64_t)(low & 0xffffffff);
    number[1] += sign * (int64_t)((low >> 32) + (high & 0xffffffff));
    number[2] += sign * (int64_t)(high >> 32);
}

static float norm(const float *row, int64_t head_dim)
{
    double sum = 0;
    for (int64_t j = 0; j < head_dim; j++)
        sum += (double)row[j] * row[j]; /* the square is exact, the sum is not */
    double root = sqrt(sum), slack = (double)(head_dim + 8) * 0x1p-53;
    float lower = (float)(root * (1 - slack)), upper = (float)(root * (1 + slack));
    if (!(lower < upper))
        return lower;
    /* Rare: what remains of the exact sum less the square of the middle of the two decides. */
    double middle = (lower + (isinf(upper) ? 0x1p128 : (double)upper)) / 2;
    int64_t exact[20] = {0}, carry = 0, any = 0;
    for (int64_t j = 0; j < head_dim; j++)
        add_square(exact, row[j], 1);
    add_square(exact, middle, -1);
    for (int k = 0; k < 20; k++) {
        int64_t limb = exact[k] + carry, digit = limb & 0xffffffff;
        carry = (limb - digit) / 0x100000000;
        any |= digit;
    }
    return carry < 0 ? lower : any ? upper : (float)middle; /* (float): half to even */
}

/* --- encode and decode --------------------------------------------------------------------- */

static int is_supported(const nsq_scheme *s)
{
    return s->bits == 4 && s->separate_norm && s->axis == 0 && s->symmetric && s->scale_rule == 0
           && s->norm_rule == 0 && s->magnitude == 0 && s->block_size >= 0 && s->sink_tokens == 0
           && s->outlier_channels == 0 && s->scale_dtype == NSQ_FLOAT16
           && s->norm_dtype == NSQ_FLOAT16;
}

static int64_t tokens_per_block(const nsq_scheme *s, int64_t tokens) /* B1 */
{
    return s->block_size && s->block_size < tokens ? s->block_size : tokens;
}

static float or_infinity(float divisor) /* what is divided by a norm or a scale of 0 becomes 0 */
{
    return divisor == 0 ? INFINITY : divisor;
}

static int code(float direction, uint16_t scale) /* S3, Q1: round, and then Q2: clamp */
{
    return (int)fminf(fmaxf(rintf(direction / or_infinity(widen(scale))), -QMAX), QMAX);
}

/* S1: the scale of a channel, of its directions or of what is coded in their place. */
static uint16_t scale_of(const float *channel, int64_t tokens, int64_t head_dim)
{
    float peak = 0;
    for (int64_t t = 0; t < tokens; t++)
        peak = fmaxf(peak, fabsf(channel[t * head_dim]));
    return narrow(peak / (float)QMAX);
}

/* F1: what is coded in place of the directions of a block, and its scales. Channel by channel, the
 * scale is made of what the errors of the channels before have left. */
static void feed_back(const float *direction, int64_t tokens, int64_t head_dim,
                      const int32_t *order, const float *share, float *w, uint16_t *scale)
{
    memcpy(w, direction, (size_t)(tokens * head_dim) * sizeof *w);
    for (int64_t p = 0; p < head_dim; p++, share += head_dim) {
        int32_t j = order[p];
        for (int64_t i = j; i < tokens * head_dim; i += head_dim)
            if (!isfinite(w[i]))
                w[i] = direction[i];
        scale[j] = scale_of(w + j, tokens, head_dim);
        for (float *row = w; row < w + tokens * head_dim; row += head_dim) {
            float error = row[j] - (float)code(row[j], scale[j]) * widen(scale[j]);
            for (int64_t r = p + 1; r < head_dim; r++)
                row[order[r]] -= error * share[r]; /* the product rounds, then the difference */
        }
    }
}

/* Encode the block x[first ...]. `direction` and `w` are working memory for tokens * head_dim;
 * without feedback, `order` is NULL. */
static int encode_block(const void *x, int32_t dtype, int64_t first, int64_t tokens,
                        int64_t head_dim, const int32_t *order, const float *share,
                        float *direction, float *w, uint8_t *packed, uint16_t *scale,
                        uint16_t *factor)
{
    for (int64_t t = 0; t < tokens; t++) {
        float *row = direction + t * head_dim;
        for (int64_t j = 0; j < head_dim; j++) {
            row[j] = element(x, dtype, first + t * head_dim + j);
            if (!isfinite(row[j])) /* I2 */
                return NSQ_REFUSED;
        }
        float length = norm(row, head_dim);
        factor[t] = narrow(length); /* M1 */
        if (factor[t] == HALF_INFINITY) /* M4, and N1, as float32 reaches further than float16 */
            return NSQ_REFUSED;
        for (int64_t j = 0; j < head_dim; j++)
            row[j] /= or_infinity(length); /* N2 */
    }
    if (order)
        feed_back(direction, tokens, head_dim, order, share, w, scale);
    else
        for (int64_t j = 0; j < head_dim; j++)
            scale[j] = scale_of(direction + j, tokens, head_dim);
    for (int64_t j = 0; j < head_dim; j++)
        if (scale[j] == HALF_INFINITY) /* S5: errors may add up to so much */
            return NSQ_REFUSED;
    const float *row = order ? w : direction;
    for (int64_t t = 0; t < tokens; t++, row += head_dim)
        for (int64_t j = 0; j < head_dim; j += 2) { /* P1: an odd row is padded with code 0 */
            int even = code(row[j], scale[j]);
            int odd = j + 1 < head_dim ? code(row[j + 1], scale[j + 1]) : 0;
            *packed++ = (uint8_t)((even + OFFSET) | (odd + OFFSET) << 4);
        }
    return NSQ_DONE;
}

int nsq_feedback(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t sequences,
                 int64_t tokens, int64_t head_dim, const int32_t *order, const float *share,
                 int64_t kv_heads, nsq_parts *out)
{
    if (!is_supported(scheme))
        return NSQ_NOT_IMPLEMENTED;
    if (sequences < 0 || tokens < 1 || head_dim < 1 || dtype < NSQ_FLOAT32 || dtype > NSQ_BFLOAT16)
        return NSQ_REFUSED;
    int64_t block = tokens_per_block(scheme, tokens);
    float *direction = malloc((size_t)(2 * block * head_dim) * sizeof *direction);
    int status = direction ? NSQ_DONE : NSQ_REFUSED;
    uint8_t *packed = out->packed;
    uint16_t *scale = out->scale, *factor = out->norm;
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t t = 0; t < tokens && status == NSQ_DONE; t += block) {
            int64_t count = block < tokens - t ? block : tokens - t, head = s % kv_heads;
            status = encode_block(x, dtype, (s * tokens + t) * head_dim, count, head_dim,
                                  order ? order + head * head_dim : NULL,
                                  order ? share + head * head_dim * head_dim : NULL, direction,
                                  direction + block * head_dim, packed, scale, factor);
            packed += count * ((head_dim + 1) / 2);
            scale += head_dim;
            factor += count;
        }
    free(direction);
    return status;
}

int nsq_encode(const nsq_scheme *scheme, const void *x, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, nsq_parts *out)
{
    return nsq_feedback(scheme, x, dtype, sequences, tokens, head_dim, NULL, NULL, 1, out);
}

int nsq_decode(const nsq_scheme *scheme, const nsq_parts *parts, int32_t dtype, int64_t sequences,
               int64_t tokens, int64_t head_dim, float *x_hat)
{
    if (!is_supported(scheme))
        return NSQ_NOT_IMPLEMENTED;
    (void)dtype; /* of sinks, which this scheme has not */
    int64_t block = tokens_per_block(scheme, tokens);
    const uint8_t *packed = parts->packed;
    const uint16_t *scale = parts->scale, *factor = parts->norm;
    for (int64_t s = 0; s < sequences; s++)
        for (int64_t t = 0; t < tokens; t++) { /* D1 */
            for (int64_t j = 0; j < head_dim; j++)
                x_hat[j] = (float)((packed[j / 2] >> 4 * (j % 2) & 15) - OFFSET) * widen(scale[j]);
            float length = norm(x_hat, head_dim), stored = widen(*factor++);
            for (int64_t j = 0; j < head_dim; j++)
                x_hat[j] = stored * (x_hat[j] / or_infinity(length));
            packed += (head_dim + 1) / 2;
            x_hat += head_dim;
            if ((t + 1) % block == 0 || t + 1 == tokens)
                scale += head_dim;
        }
    return NSQ_DONE;
}
