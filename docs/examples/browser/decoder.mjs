// A decoder with a quantized cache in onnxruntime for JavaScript: in a page (onnxruntime-web), and
// in Node (onnxruntime-web or onnxruntime-node). Which of them is given by whoever opens it.
//
// All that the loop knows of a model is in its metadata "nsq.cache", which `nsq onnx rewrite` and
// `nsq onnx build` write: the roles of inputs and outputs, and the tensors of the cache.

const ARRAYS = {
  uint8: Uint8Array, int32: Int32Array, int64: BigInt64Array, float32: Float32Array,
  float16: Uint16Array,
};

// TensorScatter warns of every cache that is not bound in place, which JavaScript cannot.
const QUIET = { logSeverityLevel: 3 };

// The entries of "metadata_props" (14) of a ModelProto, the message that a model's file is.
// onnxruntime for JavaScript does not tell them.
export function metadataOf(model) {
  const found = {};
  for (const entry of fields(model, 14)) {
    const [key, value] = [1, 2].map((number) => new TextDecoder().decode(fields(entry, number).next().value));
    found[key] = value;
  }
  return found;
}

// Yield the bytes of a field of a message, as often as it has it; others are passed over.
function* fields(message, wanted) {
  let at = 0;
  const integer = () => {
    let value = 0;
    for (let unit = 1; ; unit *= 128) {
      const byte = message[at++];
      if (byte === undefined) throw new Error("the file is cut short, or no ONNX model");
      value += (byte & 127) * unit;
      if (byte < 128) return value;
    }
  };
  while (at < message.length) {
    const tag = integer();
    const [number, kind] = [Math.floor(tag / 8), tag % 8];
    if (kind === 0) integer();
    else if (kind === 1) at += 8;
    else if (kind === 5) at += 4;
    else if (kind === 2) {
      const size = integer();
      if (number === wanted) yield message.subarray(at, at + size);
      at += size;
    } else throw new Error("the file is no ONNX model");
  }
}

export class Decoder {
  // model is the file's bytes. Options are those of a session, and
  //   capacity: the tokens that the cache has room for,
  //   source: what the session is made of, if not of these bytes: in Node a path, so that weights
  //     in other files are found. In a page these are given as externalData.
  static async open(ort, model, { capacity = 2048, source = model, ...options } = {}) {
    const text = metadataOf(model)["nsq.cache"];
    if (!text) throw new Error("the model has no metadata nsq.cache; rewrite it with `nsq onnx rewrite`");
    const layout = JSON.parse(text);
    if (layout.version !== 1) throw new Error(`nsq.cache is of version ${layout.version}, not 1`);
    const session = await ort.InferenceSession.create(source, { ...QUIET, ...options });
    return new Decoder(ort, session, layout, capacity);
  }

  constructor(ort, session, layout, capacity) {
    const multiple = layout.capacity_multiple;
    const most = Math.min(capacity, layout.context_length ?? capacity);
    Object.assign(this, { ort, session, layout, capacity: most, room: Math.ceil(most / multiple) * multiple });
    this.types = Object.fromEntries(session.inputMetadata.map(({ name, type }) => [name, type]));
    this.reset();
  }

  // Begin anew: no tokens, and a cache of zeros.
  reset() {
    this.cache = {}; // by the names of the past
    this.length = 0; // tokens in it
    this.unread = []; // tokens that were yielded, and are not in the cache yet
    const known = { batch: 1, past: 0, capacity: this.room };
    for (const { past, dtype, shape } of this.layout.tensors) {
      if (!(dtype in ARRAYS)) throw new Error(`${past} is ${dtype}, which JavaScript has not`);
      const sizes = shape.map((size) => known[size] ?? // or a number, or "capacity/32"
        (typeof size === "number" ? size : this.room / Number(size.split("/")[1])));
      this.cache[past] = this.tensor(dtype, sizes, new ARRAYS[dtype](sizes.reduce((a, b) => a * b, 1)));
    }
  }

  tensor(type, shape, data) {
    return new this.ort.Tensor(type, data, shape);
  }

  // What is fed for so many new tokens, by roles.
  inputs(tokens) {
    const [past, count] = [this.length, tokens.length];
    const values = {
      input_ids: [[1, count], tokens],
      attention_mask: [[1, past + count], Array(past + count).fill(1)],
      position_ids: [[1, count], tokens.map((_, i) => past + i)],
      past_lengths: [[1], [past]],
      new_lengths: [[1], [count]],
      total_lengths: [[1], [past + count]],
      num_logits: [[], [1]],
    };
    const feeds = {};
    for (const [role, name] of Object.entries(this.layout.roles)) {
      if (!(role in values)) continue;
      const [[shape, numbers], type] = [values[role], this.types[name]];
      const data = ARRAYS[type].from(numbers, type === "int64" ? BigInt : Number);
      feeds[name] = this.tensor(type, shape, data);
    }
    return feeds;
  }

  // Append tokens, and return the logits of the last one.
  async step(tokens) {
    if (tokens.length === 0) throw new Error("there are no tokens; give at least one");
    if (this.length + tokens.length > this.capacity)
      throw new Error(`${this.length} and ${tokens.length} tokens are more than ${this.capacity}, which the cache has room for`);
    const results = await this.session.run({ ...this.inputs(tokens), ...this.cache }, QUIET);
    for (const { past, present } of this.layout.tensors) this.cache[past] = results[present];
    this.length += tokens.length;
    const { data, dims, type } = results[this.layout.roles.logits];
    const last = data.slice(data.length - dims.at(-1));
    return type === "float16" && last instanceof Uint16Array ? Float32Array.from(last, float16) : last;
  }

  // Yield the likeliest tokens, one by one, until so many or one of `stops` came, or no room is left.
  async *generate(prompt, limit, stops = []) {
    let next = Array.from(prompt);
    for (let i = 0; i < limit; i++) {
      if (i > 0 && this.length === this.capacity) return;
      const logits = await this.step([...this.unread, ...next]);
      const token = logits.indexOf(logits.reduce((a, b) => Math.max(a, b)));
      this.unread = [token];
      next = [];
      yield token;
      if (stops.includes(token)) return;
    }
  }

  // Bytes of the whole cache.
  get cacheBytes() {
    return Object.values(this.cache).reduce((sum, { data }) => sum + data.byteLength, 0);
  }
}

// The number of 16 bits.
function float16(bits) {
  const [sign, exponent, fraction] = [bits >> 15 ? -1 : 1, (bits >> 10) & 31, bits & 1023];
  if (exponent === 31) return fraction ? NaN : sign * Infinity;
  return sign * (exponent ? 2 ** (exponent - 15) * (1 + fraction / 1024) : 2 ** -14 * (fraction / 1024));
}
