#!/usr/bin/env node
// All schemes of NSQ-1 in JavaScript, without packages. Ids such as N1 are rules of NSQ-1.
//
//     nsq check ./nsq_port.mjs --all        it answers (encode, decode, attend, stream); key feedback,
//                                           too, with --feedback and --stream-feedback ./nsq_port.mjs
//     node nsq_port.mjs FOLDER              it judges itself, by what `nsq vectors -o FOLDER` wrote
//
// Numbers are float64. For single operations on float32, rounding the float64 result to float32, by
// Math.fround or by storing it in a Float32Array, is the same as rounding once.
import { createHash } from "node:crypto";
import { readFileSync, readSync, writeSync } from "node:fs";

const { abs, ceil, fround, max, min } = Math;
class Refusal extends Error {}

// --- arrays and frames ---------------------------------------------------------------------------

const DTYPES = ["float32", "float16", "bfloat16", "uint8", "int32"];
const SIZES = [4, 2, 2, 1, 4];
const [FLOAT32, FLOAT16, BFLOAT16, UINT8, INT32] = DTYPES.keys();
const product = (shape) => shape.reduce((a, b) => a * b, 1);
const word = new DataView(new ArrayBuffer(4));
const bitsOf = (value) => (word.setFloat32(0, value), word.getUint32(0));
const fromBits = (bits) => (word.setUint32(0, bits), word.getFloat32(0));

function readExactly(size) {
  const buffer = Buffer.alloc(size);
  for (let at = 0, count; at < size; at += count) {
    count = readSync(0, buffer, at, size - at, null);
    if (count === 0 && at === 0) return null;
    if (count === 0) throw Error("the input ends within a frame");
  }
  return buffer;
}

/** The next frame of the standard input, a mapping of names to arrays; null at its end. */
function readFrame() {
  const head = readExactly(8), frame = {};
  for (let count = head?.readUint32LE(4); count > 0; count--) {
    const entry = readExactly(56), [name] = entry.toString("latin1", 0, 32).split("\0");
    const dtype = entry.readUint32LE(32), axes = entry.readUint32LE(36);
    const shape = Array.from({ length: axes }, (_, i) => entry.readUint32LE(40 + 4 * i));
    frame[name] = { dtype, shape, data: readExactly(product(shape) * SIZES[dtype]) };
  }
  return head && frame;
}

function writeFrame(frame) {
  const head = Buffer.from("NSQ1\0\0\0\0"), pieces = [head];
  head.writeUint32LE(Object.keys(frame).length, 4);
  for (const [name, { dtype, shape, data }] of Object.entries(frame)) {
    const entry = Buffer.alloc(56);
    entry.write(name);
    const numbers = [dtype, shape.length, ...shape, 1, 1, 1, 1].slice(0, 6);
    numbers.forEach((number, i) => entry.writeUint32LE(number, 32 + 4 * i));
    pieces.push(entry, data);
  }
  const buffer = Buffer.concat(pieces);
  for (let at = 0; at < buffer.length; ) at += writeSync(1, buffer, at);
}

function ints({ data }) {
  return Array.from({ length: data.length / 4 }, (_, i) => data.readInt32LE(4 * i));
}

function intArray(values, shape = [values.length]) {
  const data = Buffer.alloc(4 * values.length);
  values.forEach((value, i) => data.writeInt32LE(value, 4 * i));
  return { dtype: INT32, shape, data };
}

function widenHalf(bits) {
  const exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = bits >> 15 ? -1 : 1;
  if (exponent === 31) return sign * Infinity; // NaN too: both are refused
  return sign * (exponent ? (1024 + mantissa) * 2 ** (exponent - 25) : mantissa * 2 ** -24);
}

/** The elements as float32 (I1). */
function floats(array) {
  if (!array) return new Float32Array(0);
  const { dtype, data } = array, values = new Float32Array(data.length / SIZES[dtype]);
  for (let i = 0; i < values.length; i++) {
    if (dtype === FLOAT32) values[i] = data.readFloatLE(4 * i);
    else if (dtype === FLOAT16) values[i] = widenHalf(data.readUint16LE(2 * i));
    else values[i] = fromBits(data.readUint16LE(2 * i) * 2 ** 16);
  }
  return values;
}

/** An array of values that dtype holds exactly. */
function floatArray(values, dtype, shape) {
  const data = Buffer.alloc(values.length * SIZES[dtype]);
  values.forEach((value, i) => {
    const bits = bitsOf(value), sign = bits >>> 31 << 15;
    if (dtype === FLOAT32) data.writeFloatLE(value, 4 * i);
    else if (dtype === BFLOAT16) data.writeUint16LE(bits >>> 16, 2 * i);
    else if (abs(value) < 2 ** -14) data.writeUint16LE(sign | abs(value) * 2 ** 24, 2 * i); // subnormal
    else data.writeUint16LE(sign | (bits & 0x7fffffff) - (112 << 23) >>> 13, 2 * i); // bias 127 to 15
  });
  return { dtype, shape, data };
}

// --- rounding ------------------------------------------------------------------------------------

const MAGIC = 1.5 * 2 ** 52; // what lies below 2^51 loses its fraction when this is added
const roundHalfEven = (value) => value + MAGIC - MAGIC;

/** What is divided by 0 becomes 0 in the rules N2, Q1, M2 and D1. */
const orInfinity = (divisor) => divisor || Infinity;

const LARGEST = [fround(3.4028235e38), 65504, fromBits(0x7f7f0000)];

/** One rounding to dtype: half to even, subnormals kept, infinity beyond the range. */
function narrow(value, dtype) {
  if (dtype === FLOAT32 || !isFinite(value)) return value;
  const [bits, lowest] = dtype === FLOAT16 ? [10, -14] : [7, -126];
  const exponent = max((bitsOf(value) >>> 23 & 255) - 127, lowest), step = 2 ** (exponent - bits);
  const size = roundHalfEven(abs(value) / step) * step, sign = bitsOf(value) >>> 31 ? -1 : 1;
  return sign * (size > LARGEST[dtype] ? Infinity : size);
}

/** What is stored is never -0 (Z1). */
const stored = (value, dtype) => narrow(value, dtype) + 0;

/** A float32, or a middle of two, as an integer. */
const units = (value) => BigInt(value * 2 ** 150);

function exactDot(x, y) {
  let sum = 0n;
  for (let j = 0; j < x.length; j++) sum += units(x[j]) * units(y[j]);
  return sum;
}

/** The square root of the exact sum of squares, correctly rounded (N1). */
function norm(row) {
  let sum = 0;
  for (let j = 0; j < row.length; j++) sum += row[j] * row[j]; // the square is exact, the sum is not
  const root = Math.sqrt(sum), slack = (row.length + 8) * 2 ** -53;
  const lower = fround(root * (1 - slack)), upper = fround(root * (1 + slack));
  if (lower === upper) return lower;
  // Rare: the exact sum is compared with the square of the middle of the two.
  const middle = (lower + min(upper, 2 ** 128)) / 2;
  const square = units(middle) ** 2n, exact = exactDot(row, row);
  return exact < square ? lower : exact > square ? upper : fround(middle); // half to even
}

/** The exact <x, y> / <y, y>, correctly rounded (M3). */
function leastSquares(x, y) {
  let dot = 0, sizes = 0, square = 0;
  for (let j = 0; j < y.length; j++) {
    dot += x[j] * y[j];
    sizes += abs(x[j] * y[j]);
    square += y[j] * y[j];
  }
  if (square === 0) return 0;
  const gain = dot / square, slack = (y.length + 8) * 2 ** -53 * 2 * sizes / square;
  const lower = fround(gain - slack), upper = fround(gain + slack);
  return Object.is(lower, upper) ? lower : exactQuotient(exactDot(x, y), exactDot(y, y));
}

/** The float32 nearest to a / b, ties to even. */
function exactQuotient(a, b) {
  const [sign, size] = a < 0n ? [-1, -a] : [1, a], bits = (value) => value.toString(2).length;
  const divided = (e) => [size << BigInt(max(-e, 0)), b << BigInt(max(e, 0))];
  let exponent = max(bits(size) - bits(b) - 24, -149), [top, bottom] = divided(exponent);
  if (top / bottom >= 2n ** 24n) [top, bottom] = divided(++exponent);
  const quotient = top / bottom, twice = 2n * (top - quotient * bottom);
  const up = twice > bottom || twice === bottom && quotient % 2n === 1n;
  return fround(sign * Number(quotient + BigInt(up)) * 2 ** exponent);
}

// --- schemes -------------------------------------------------------------------------------------

class Scheme {
  /** The twelve numbers are those of the protocol. */
  constructor(numbers) {
    const [bits, separate, axis, symmetric, search, balanced, magnitude, block, sinks, outliers, scale, factor] = numbers;
    this.bits = bits;
    this.separateNorm = separate === 1;
    this.perToken = axis === 1;
    this.symmetric = symmetric === 1;
    this.search = search === 1;
    this.balanced = balanced === 1;
    this.magnitude = ["norm", "gain", "lsq"][magnitude];
    this.blockSize = block || Infinity;
    this.sinkTokens = sinks;
    this.outlierChannels = outliers;
    this.scaleType = scale;
    this.normType = factor;
    this.offset = this.symmetric ? 2 ** (bits - 1) : 0; // added to a code before it is packed (P1)
    this.most = 2 ** bits - 1 - this.offset; // the largest code, and the least (Q2)
    this.least = this.symmetric ? -this.most : 0;
  }

  rowBytes(D) {
    return this.bits === 3 ? ceil(D / 4) + ceil(D / 8) : ceil(D * this.bits / 8);
  }

  /** The index of the scale that element i of a block uses. */
  scaleIndex(i, D) {
    return this.perToken ? (i - i % D) / D : i % D;
  }

  scaleOf(lowest, highest) {
    if (this.symmetric) return [stored(fround(max(abs(lowest), abs(highest)) / this.most), this.scaleType), 0]; // S1
    const zero = stored(lowest, this.scaleType); // S2
    return [stored(fround(fround(highest - zero) / this.most), this.scaleType), zero];
  }

  code(direction, scale, zero) {
    const quotient = fround(fround(direction - zero) / orInfinity(scale)); // Q1
    return max(this.least, min(this.most, roundHalfEven(quotient))) + 0; // Q2
  }

  /** What a code stands for (D1). */
  level(code, scale, zero) {
    const y = fround(code * scale);
    return this.symmetric ? y : fround(y + zero);
  }

  /** The scale and zero of directions that share them (S4), or of what is coded in their place, of which fourth
   * powers of errors count (F1). */
  fit(directions, fourth = false) {
    if (!directions.length) return [0, 0];
    const lowest = directions.reduce((a, b) => min(a, b)), highest = directions.reduce((a, b) => max(a, b));
    let best = this.scaleOf(lowest, highest);
    if (!this.search || !best.every(isFinite)) return best;
    const error = ([scale, zero]) => directions.reduce((sum, v) => {
      const e = fround(v - this.level(this.code(v, scale, zero), scale, zero));
      return sum + (fourth ? e * e * (e * e) : e * e); // e * e is exact
    }, 0);
    let least = error(best);
    const middle = fround(fround(0.5 * highest) + fround(0.5 * lowest));
    const radius = fround(fround(0.5 * highest) - fround(0.5 * lowest));
    for (const f of [0.95, 0.9, 0.85, 0.8, 0.7].map(fround)) {
      const shrunk = this.symmetric
        ? this.scaleOf(fround(f * lowest), fround(f * highest))
        : this.scaleOf(fround(middle - fround(f * radius)), fround(middle + fround(f * radius)));
      const sum = error(shrunk); // not a number where the scale is infinite
      if (shrunk.every(isFinite) && sum < least) [least, best] = [sum, shrunk];
    }
    return best;
  }
}

// --- one block -----------------------------------------------------------------------------------

/** The ascending indices of the outlier channels (O1). */
function chooseOutliers(direction, D, count) {
  const peak = new Float32Array(D);
  direction.forEach((v, i) => (peak[i % D] = max(peak[i % D], abs(v))));
  const ranked = [...peak.keys()].sort((a, b) => peak[b] - peak[a] || a - b);
  return ranked.slice(0, count).sort((a, b) => a - b);
}

/** Order and factor of each key/value head; one that has none, where the request brings none (F1). */
function headsOf({ order, factor }) {
  if (!order) return [null];
  const [count, D] = order.shape, channels = ints(order), shares = floats(factor);
  return Array.from({ length: count }, (_, h) =>
    ({ order: channels.slice(h * D, h * D + D), factor: shares.subarray(h * D * D, (h + 1) * D * D) }));
}

/** What is coded in place of the directions, w, and, as the weights see them, the directions before and what is left
 * of them after it. Channel by channel, each error is taken from the channels that follow, and scales of axis channel
 * are made of what is coded (F1). */
function feedBack(s, { D, scale, zero }, direction, norms, isOutlier, { order, factor }) {
  const w = direction.slice(), seen = direction.slice(), before = new Float32Array(w.length), after = before.slice();
  order.forEach((j, p) => {
    for (let i = j; i < w.length; i += D) for (const moved of [w, seen]) if (!isFinite(moved[i])) moved[i] = direction[i];
    if (!s.perToken && !isOutlier[j]) [scale[j], zero[j]] = s.fit(w.filter((_, i) => i % D === j), true);
    for (let t = 0; t < norms.length; t++) {
      if (norms[t] === 0) continue;
      const i = t * D + j, g = s.scaleIndex(i, D), weight = factor[p * D + p];
      const y = isOutlier[j] ? narrow(w[i], FLOAT16) : s.level(s.code(w[i], scale[g], zero[g]), scale[g], zero[g]);
      const error = fround(w[i] - y);
      for (let r = p + 1; r < D; r++) {
        w[t * D + order[r]] -= fround(error * factor[p * D + r]);
        seen[t * D + order[r]] -= fround(seen[i] * factor[p * D + r]);
      }
      before[i] = weight * seen[i];
      after[i] = weight * fround(seen[i] - error);
    }
  });
  return { w, before, after };
}

/** How much longer the direction of a token is than what is left of it in its codes (M2). */
function lengthKept({ before, after }, from, to) {
  const length = norm(after.subarray(from, to));
  return length === Infinity ? length : fround(norm(before.subarray(from, to)) / orInfinity(length));
}

/** Rows of D values, each divided by the size of its channel. */
const divided = (x, sizes) => Float32Array.from(x, (v, i) => v / sizes[i % sizes.length]);

/** Tokens over their norms (N2). */
const directions = (x, norms, D) => Float32Array.from(x, (v, i) => v / orInfinity(norms[(i - i % D) / D]));

const rowNorms = (x, D) => Float32Array.from({ length: x.length / D }, (_, t) => norm(x.subarray(t * D, t * D + D)));

/** The largest less the least value of each channel. */
function ranges(x, D) {
  const low = x.slice(0, D), high = x.slice(0, D);
  x.forEach((v, i) => ([low[i % D], high[i % D]] = [min(low[i % D], v), max(high[i % D], v)]));
  return high.map((v, j) => v - low[j]);
}

/** By how much norms spread the directions of a block (N3). */
function spread(x, norms, D) {
  const before = ranges(x, D), growths = ranges(directions(x, norms, D), D).map((v, j) => v && v / before[j]);
  const [one, other] = [norms, growths].map((values) => values.reduce((sum, v) => sum + v * v, 0));
  return one * other;
}

/** The norm of each token (N1), and the size by which each channel counts in it (N3). */
function normsAndSizes(s, x, D) {
  const ones = new Float32Array(D).fill(1), sizes = new Float32Array(D);
  if (!s.separateNorm) return [new Float32Array(x.length / D).fill(1), ones];
  const plain = rowNorms(x, D);
  if (!s.balanced) return [plain, ones];
  x.forEach((v, i) => (sizes[i % D] = max(sizes[i % D], abs(v))));
  const most = orInfinity(sizes.reduce((a, b) => max(a, b)));
  sizes.forEach((peak, j) => (sizes[j] = max(peak / most, 2 ** -12)));
  const balanced = rowNorms(divided(x, sizes), D);
  const gains = spread(x, balanced, D) < spread(x, plain, D); // never so where a balanced norm is infinite
  return gains ? [balanced, sizes] : [plain, ones];
}

/** The parts of one block x [tokens, D] (K1 aside), before codes are packed; floats as stored. */
function encodeBlock(s, x, D, head) {
  const tokens = x.length / D, [norms, sizes] = normsAndSizes(s, x, D), direction = directions(x, norms, D);
  if (!norms.every(isFinite)) throw new Refusal("N1: a norm is beyond float32");
  const index = chooseOutliers(direction, D, s.outlierChannels), isOutlier = new Uint8Array(D);
  for (const j of index) isOutlier[j] = 1;
  const block = { D, index, codes: new Int32Array(x.length), outliers: [], factor: [] };
  const groups = Array.from({ length: s.perToken ? tokens : D }, () => []); // what shares a scale
  direction.forEach((v, i) => {
    if (!isOutlier[i % D]) groups[s.scaleIndex(i, D)].push(v);
  });
  const fitted = groups.map((group) => s.fit(group));
  block.scale = fitted.map(([scale]) => scale);
  block.zero = fitted.map(([, zero]) => zero);
  const fed = head ? feedBack(s, block, direction, norms, isOutlier, head) : { w: direction };
  fed.w.forEach((v, i) => {
    const g = s.scaleIndex(i, D);
    if (isOutlier[i % D]) block.outliers.push(stored(v, FLOAT16));
    else if (norms[(i - i % D) / D] > 0) block.codes[i] = s.code(v, block.scale[g], block.zero[g]);
  });
  const y = dequantize(s, block); // finite if scales, zeros and outliers are
  if (!y.every(isFinite)) throw new Refusal("S5 or O1: beyond its dtype");
  for (let t = 0; t < tokens && s.separateNorm; t++) {
    const from = t * D, to = from + D, part = y.subarray(from, to);
    let factor = norms[t]; // M1
    if (s.magnitude === "gain" && head) factor = fround(factor * lengthKept(fed, from, to)); // M2
    else if (s.magnitude === "gain") factor = fround(factor / orInfinity(norm(divided(part, sizes))));
    else if (s.magnitude === "lsq") factor = leastSquares(x.subarray(from, to), part);
    block.factor.push(stored(factor, s.normType));
  }
  const all = [block.factor, decodeBlock(s, block)];
  if (!all.every((values) => values.every(isFinite))) throw new Refusal("M4 or D3: beyond its dtype");
  return block;
}

/** y of D1. */
function dequantize(s, { D, codes, scale, zero, index, outliers }) {
  const y = Float32Array.from(codes, (code, i) => {
    const g = s.scaleIndex(i, D);
    return s.level(code, scale[g], zero[g]);
  });
  const k = index.length;
  outliers.forEach((v, i) => (y[(i - i % k) / k * D + index[i % k]] = v));
  return y;
}

/** x_hat of D1. */
function decodeBlock(s, block) {
  const y = dequantize(s, block), { D, factor } = block;
  for (let t = 0; t < factor.length; t++) {
    const length = s.magnitude === "norm" ? orInfinity(norm(y.subarray(t * D, t * D + D))) : 1;
    for (let i = t * D; i < t * D + D; i++) y[i] = factor[t] * fround(y[i] / length);
  }
  return y;
}

// --- bytes (P1) ----------------------------------------------------------------------------------

/** Write some low bits of each value of a row, the first in the lowest bits of a byte. */
function pack(row, values, bits, padding) {
  for (let j = 0; j < row.length * 8 / bits; j++) {
    const v = (j < values.length ? values[j] : padding) & (1 << bits) - 1;
    row[j * bits >> 3] |= v << (j * bits & 7);
  }
}

function packRow(s, row, codes) {
  const values = codes.map((code) => code + s.offset), low = ceil(codes.length / 4);
  if (s.bits !== 3) return pack(row, values, s.bits, s.offset);
  pack(row.subarray(0, low), values, 2, s.offset);
  pack(row.subarray(low), values.map((v) => v >> 2), 1, s.offset >> 2);
}

function unpackRow(s, row, D) {
  const field = (first, bits, j) => row[first + (j * bits >> 3)] >> (j * bits & 7) & (1 << bits) - 1;
  return Array.from({ length: D }, (_, j) =>
    (s.bits === 3 ? field(0, 2, j) | field(ceil(D / 4), 1, j) << 2 : field(0, s.bits, j)) - s.offset);
}

// --- encode and decode ---------------------------------------------------------------------------

/** What is stored for sequences of this many tokens, sinks included. */
function partsOf(s, blocks, sinks, lead, tokens, D, dtype) {
  const coded = max(0, tokens - s.sinkTokens), sequences = product(lead), bytes = s.rowBytes(D); // K1
  const count = coded && ceil(coded / min(s.blockSize, coded)), k = min(s.outlierChannels, D); // B1
  const packed = Buffer.alloc(sequences * coded * bytes);
  let at = 0;
  for (const { codes } of blocks)
    for (let i = 0; i < codes.length; i += D) packRow(s, packed.subarray(at, at += bytes), codes.subarray(i, i + D));
  const all = (name) => blocks.flatMap((block) => block[name]);
  const scales = s.perToken ? [...lead, coded, 1] : [...lead, count, D];
  const frame = {
    packed: { dtype: UINT8, shape: [...lead, coded, bytes], data: packed },
    scale: floatArray(all("scale"), s.scaleType, scales),
  };
  if (s.separateNorm) frame.norm = floatArray(all("factor"), s.normType, [...lead, coded]);
  if (!s.symmetric) frame.zero = floatArray(all("zero"), s.scaleType, scales);
  if (k) {
    frame.outlier_index = intArray(all("index"), [...lead, count, k]);
    frame.outliers = floatArray(all("outliers"), FLOAT16, [...lead, coded, k]);
  }
  if (s.sinkTokens) frame.sinks = floatArray(sinks, dtype, [...lead, tokens - coded, D]);
  return frame;
}

function readInput({ dtype, shape, ...array }) {
  if (dtype > BFLOAT16 || shape.length < 2 || !product(shape.slice(-2)))
    throw new Refusal("I1: not an array x[..., T, D] of floats with tokens and channels");
  const values = floats({ dtype, ...array });
  if (!values.every(isFinite)) throw new Refusal("I2: not finite");
  return values;
}

function encode({ scheme, x, ...feedback }) {
  const s = new Scheme(ints(scheme)), values = readInput(x), heads = headsOf(feedback);
  const [tokens, D] = x.shape.slice(-2), lead = x.shape.slice(0, -2), blocks = [], sinks = [];
  for (let n = 0; n * tokens * D < values.length; n++) {
    const sequence = values.subarray(n * tokens * D, (n + 1) * tokens * D), first = min(s.sinkTokens, tokens) * D;
    sinks.push(...sequence.subarray(0, first));
    const size = min(s.blockSize, tokens) * D;
    const head = heads[n % heads.length];
    for (let i = first; i < tokens * D; i += size) blocks.push(encodeBlock(s, sequence.subarray(i, i + size), D, head));
  }
  return partsOf(s, blocks, sinks, lead, tokens, D, x.dtype);
}

/** Decode the parts of which the names have this prefix. */
function decodeParts(request, prefix, s) {
  const shape = ints(request[`${prefix}shape`]), [tokens, D] = shape.slice(-2);
  const taker = (values) => {
    let at = 0;
    return (count) => values.slice(at, at += count);
  };
  const part = (name) => taker(floats(request[prefix + name])), indices = request[`${prefix}outlier_index`];
  const scale = part("scale"), zero = part("zero"), factor = part("norm"), outliers = part("outliers");
  const sinks = part("sinks"), index = taker(indices ? ints(indices) : []);
  const packed = taker(request[`${prefix}packed`]?.data ?? Buffer.alloc(0));
  const xHat = new Float32Array(product(shape)), k = min(s.outlierChannels, D), bytes = s.rowBytes(D);
  const coded = max(0, tokens - s.sinkTokens);
  for (let at = 0; at < xHat.length; ) {
    xHat.set(sinks((tokens - coded) * D), at);
    at += (tokens - coded) * D;
    for (let rest = coded, n; rest > 0; rest -= n) {
      n = min(rest, s.blockSize);
      const scales = s.perToken ? n : D;
      const block = {
        D, scale: scale(scales), zero: zero(s.symmetric ? 0 : scales),
        factor: factor(s.separateNorm ? n : 0), index: index(k), outliers: outliers(n * k),
        codes: Array.from({ length: n }, () => unpackRow(s, packed(bytes), D)).flat(),
      };
      xHat.set(decodeBlock(s, block), at);
      at += n * D;
    }
  }
  return { xHat, shape };
}

function decode(request) {
  const { xHat, shape } = decodeParts(request, "", new Scheme(ints(request.scheme)));
  return { x_hat: floatArray(xHat, FLOAT32, shape) };
}

// --- a cache of one sequence ---------------------------------------------------------------------

function stream({ scheme, x, steps, row, ...feedback }) {
  const s = new Scheme(ints(scheme)), [rows, tokens, D] = x.shape, [number] = ints(row);
  const values = readInput(x), kinds = ints(steps), size = s.blockSize * D;
  const heads = headsOf(feedback), head = heads[number % heads.length];
  const seal = (tokens) => encodeBlock(s, Float32Array.from(tokens), D, head);
  if (size === Infinity) throw new Refusal("B1: a cache needs a number for block_size");
  let sinks = [], sealed = [], tail = [], next = number * tokens * D; // B2: other rows do not matter
  for (let i = 0; i < kinds.length; i += 1 + rows) {
    const count = kinds[i + 1 + number] * D;
    if (kinds[i] === 0) {
      const added = [...values.subarray(next, next += count)];
      sinks.push(...added.splice(0, s.sinkTokens * D - sinks.length)); // K1
      for (tail.push(...added); tail.length >= size; ) sealed.push(seal(tail.splice(0, size)));
      continue;
    }
    const coded = count - sinks.length; // C1
    if (coded < 0) [sinks, sealed, tail] = [sinks.slice(0, count), [], []];
    else if (coded < sealed.length * size) {
      const whole = (coded - coded % size) / size, most = LARGEST[x.dtype];
      const kept = decodeBlock(s, sealed[whole]).subarray(0, coded % size);
      tail = Array.from(kept, (v) => max(-most, min(most, narrow(v, x.dtype))));
      sealed = sealed.slice(0, whole);
    } else tail = tail.slice(0, coded - sealed.length * size);
  }
  const kept = sinks.length / D + sealed.length * s.blockSize;
  const tailArray = floatArray(tail, x.dtype, [tail.length / D, D]);
  return { ...partsOf(s, sealed, sinks, [], kept, D, x.dtype), tail: tailArray };
}

// --- attention -----------------------------------------------------------------------------------

function attend(request) {
  const keys = decodeParts(request, "keys.", new Scheme(ints(request.scheme)));
  const values = decodeParts(request, "values.", new Scheme(ints(request.value_scheme)));
  const [scale, softcap] = [request.scale, request.softcap].map((one) => floats(one)[0]);
  const [causal, window] = [request.causal, request.sliding_window].map((one) => ints(one)[0]);
  const query = floats(request.query), [heads, queries, D] = request.query.shape;
  const [kvHeads, tokens] = keys.shape, width = values.shape[2], output = new Float32Array(heads * queries * width);
  for (let i = 0; i < heads * queries; i++) {
    const position = tokens - queries + i % queries, end = causal ? position + 1 : tokens; // A2
    const first = window ? max(0, position + 1 - window) : 0;
    const head = Math.floor(Math.floor(i / queries) / (heads / kvHeads)), scores = []; // A1
    for (let t = first; t < end; t++) {
      let score = 0;
      for (let j = 0; j < D; j++) score += query[i * D + j] * keys.xHat[(head * tokens + t) * D + j];
      score *= scale;
      scores.push(softcap ? softcap * Math.tanh(score / softcap) : score);
    }
    const highest = scores.reduce((a, b) => max(a, b), -Infinity);
    const weights = scores.map((score) => Math.exp(score - highest)), sum = weights.reduce((a, b) => a + b, 0);
    for (let j = 0; j < width; j++) {
      let total = 0;
      weights.forEach((weight, t) => (total += weight * values.xHat[(head * tokens + first + t) * width + j]));
      output[i * width + j] = total / max(sum, 1); // sum is 0, or at least 1
    }
  }
  return { output: floatArray(output, FLOAT32, [heads, queries, width]) };
}

// --- the program ---------------------------------------------------------------------------------

const OPERATIONS = { encode, decode, attend, stream, feedback: encode, stream_feedback: stream };

function answered(operation, request) {
  try {
    return { status: 0, result: operation(request) };
  } catch (error) {
    if (!(error instanceof Refusal)) throw error;
    return { status: 1, result: { message: { dtype: UINT8, shape: [error.message.length], data: Buffer.from(error.message) } } };
  }
}

function serve() {
  const header = readFrame();
  if (header) writeFrame(header);
  for (let request; header && (request = readFrame()); ) {
    const { status, result } = answered(Object.values(OPERATIONS)[ints(request.operation)[0]], request);
    writeFrame({ ...result, case: request.case, status: intArray([status]) });
  }
}

/** The twelve numbers of a scheme whose fields have names, as files of vectors have them. */
function numbersOf(scheme) {
  return intArray([
    scheme.bits, +scheme.separate_norm, +(scheme.axis === "token"), +scheme.symmetric, +(scheme.scale_rule === "search"),
    +(scheme.norm_rule === "balanced"), ["norm", "gain", "lsq"].indexOf(scheme.magnitude), scheme.block_size ?? 0,
    scheme.sink_tokens, scheme.outlier_channels, DTYPES.indexOf(scheme.scale_dtype), DTYPES.indexOf(scheme.norm_dtype),
  ]);
}

const arraysOf = (objects) => Object.fromEntries(Object.entries(objects).map(([name, { dtype, shape, data }]) =>
  [name, { dtype: DTYPES.indexOf(dtype), shape, data: Buffer.from(data, "hex") }]));

/** Whether what is returned has these bytes; attention may be off by its tolerance (A3). */
function agrees(result, { output, tolerance, ...expected }) {
  if (output) {
    const got = floats(result.output);
    return got.every((v, i) => abs(v - output.data.readDoubleLE(8 * i)) <= tolerance.data.readDoubleLE(8 * i));
  }
  return Object.entries(expected).every(([name, { data }]) => data.equals(result[name].data));
}

function judgeJson(name, file) {
  const { operation, scheme, cases } = JSON.parse(file);
  if (!(operation in OPERATIONS)) {
    console.log(`${name}: its cases are not asked, as ${operation} is not implemented here`);
    return [];
  }
  return cases.map((one) => {
    const request = { ...arraysOf(one.inputs), scheme: numbersOf(scheme) };
    const { status, result } = answered(OPERATIONS[operation], request);
    return status === +(one.result === "refused") && (status === 1 || agrees(result, arraysOf(one.expected)));
  });
}

/** A file of safetensors: the size of a header of JSON, the header, and the bytes of all arrays. */
function judgeLarge(file) {
  const start = 8 + Number(file.readBigUInt64LE(0)), header = JSON.parse(file.subarray(8, start));
  const names = { F32: FLOAT32, F16: FLOAT16, BF16: BFLOAT16, U8: UINT8, I32: INT32 };
  const { x, x_hat, ...parts } = Object.fromEntries(
    Object.entries(header).filter(([name]) => name !== "__metadata__").map(([name, { dtype, shape, data_offsets: [from, to] }]) =>
      [name, { dtype: names[dtype], shape, data: file.subarray(start + from, start + to) }]));
  const scheme = numbersOf(JSON.parse(header.__metadata__.nsq_vector).scheme);
  return [agrees(encode({ scheme, x }), parts), agrees(decode({ scheme, ...parts, shape: intArray(x.shape) }), { x_hat })];
}

function judge(folder) {
  const { files } = JSON.parse(readFileSync(`${folder}/manifest.json`));
  const outcomes = Object.entries(files).flatMap(([name, { sha256 }]) => {
    const file = readFileSync(`${folder}/${name}`);
    if (createHash("sha256").update(file).digest("hex") !== sha256) return [false];
    return name.endsWith(".json") ? judgeJson(name, file) : judgeLarge(file);
  });
  const passed = outcomes.filter((good) => good).length;
  console.log(`${passed} passed, ${outcomes.length - passed} failed`);
  process.exitCode = passed === outcomes.length ? 0 : 1;
}

if (process.argv.length > 2) judge(process.argv[2]);
else serve();
