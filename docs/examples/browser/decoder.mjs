// A decoder with a quantized cache in onnxruntime for JavaScript: in a page (onnxruntime-web), and
// in Node (onnxruntime-web or onnxruntime-node). Which of them is given by whoever opens it.

const ARRAYS = {
  uint8: Uint8Array, int32: Int32Array, int64: BigInt64Array, float32: Float32Array,
  float16: Uint16Array,
};

// TensorScatter warns of every cache that is not bound in place, which JavaScript cannot.
const QUIET = { logSeverityLevel: 3 };

export class Decoder {
  // model is a Uint8Array or, in Node, a path.
  static async open(ort, model, options = {}) {
    const quiet = { ...QUIET, ...options };
    return new Decoder(ort, await ort.InferenceSession.create(model, quiet));
  }

  constructor(ort, session) {
    this.ort = ort;
    this.session = session;
    this.reset();
  }

  // Begin anew: no tokens, and a cache of zeros, as the session tells its shapes.
  reset() {
    this.cache = {};
    this.unread = []; // tokens that were yielded, and are not in the cache yet
    for (const { name, type, shape } of this.session.inputMetadata) {
      if (!name.startsWith("past")) continue;
      if (shape.some((size) => typeof size !== "number"))
        throw new Error(`input ${name} is [${shape}]; export the model with a fixed batch and capacity`);
      if (!(type in ARRAYS)) throw new Error(`input ${name} is ${type}, which no cache is`);
      const size = shape.reduce((a, b) => a * b, 1);
      this.cache[name] = new this.ort.Tensor(type, new ARRAYS[type](size), shape);
    }
  }

  // Append tokens, and return the logits of the last one.
  async step(tokens) {
    if (tokens.length === 0) throw new Error("there are no tokens; give at least one");
    const ids = new this.ort.Tensor(
      "int64", BigInt64Array.from(tokens, BigInt), [1, tokens.length]);
    const results = await this.session.run({ input_ids: ids, ...this.cache }, QUIET);
    for (const name of Object.keys(this.cache))
      this.cache[name] = results[name.replace(/^past(_key_values)?/, "present")];
    const { data, dims } = results.logits;
    return data.slice(data.length - dims.at(-1));
  }

  // Yield the likeliest tokens, one by one, until so many or one of `stops` came.
  async *generate(prompt, limit, stops = []) {
    let next = prompt;
    for (let i = 0; i < limit; i++) {
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
