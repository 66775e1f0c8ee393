// Checks the files of a folder of vectors, and decodes every case anew: node read_vectors.mjs FOLDER
import { createHash } from "node:crypto";
import { readFileSync } from "node:fs";
const read = (name) => readFileSync(`${process.argv[2] ?? "."}/${name}`), round = Math.fround;
const word = new DataView(new ArrayBuffer(4)), float = (bits) => (word.setUint32(0, bits), word.getFloat32(0));
const half = (bits) => float((bits & 0x8000) << 16 | (bits & 0x7fff) << 13) * 2 ** 112; // if it is finite
const kinds = { float32: [4, "readFloatLE"], float16: [2, "readUInt16LE", half], int32: [4, "readInt32LE"], int8: [1, "readInt8"],
  uint8: [1, "readUInt8"], bfloat16: [2, "readUInt16LE", (bits) => float(bits << 16)] };
function array([name, { dtype, shape, data }]) {
  const bytes = Buffer.from(data, "hex"), [size, get, convert = (value) => value] = kinds[dtype];
  if (bytes.length !== shape.reduce((a, b) => a * b, size)) throw Error(`${name}: the data do not fit the shape`);
  return [name, Array.from({ length: bytes.length / size }, (_, i) => convert(bytes[get](size * i)))];
}
const field = (row, first, bits, j) => row[first + (j * bits >> 3)] >> (j * bits & 7) & (1 << bits) - 1;
function agrees({ bits, symmetric, axis, magnitude, ...scheme }, [tokens, D], parts, stage, x_hat) {
  const coded = Math.max(tokens - scheme.sink_tokens, 0), size = scheme.block_size ?? coded;
  const bytes = parts.packed.length * D / stage.codes.length, k = Math.min(scheme.outlier_channels, D);
  return stage.codes.every((code, i) => {
    const j = i % D, at = (i - j) / D, t = at % coded, n = (at - t) / coded; // channel j, token t of sequence n
    const row = parts.packed.slice(at * bytes, (at + 1) * bytes); // P1
    const v = bits === 3 ? field(row, 0, 2, j) + 4 * field(row, Math.ceil(D / 4), 1, j) : field(row, 0, bits, j);
    const block = n * Math.ceil(coded / size) + Math.floor(t / size), s = axis === "token" ? at : block * D + j;
    const kept = k ? parts.outlier_index.slice(block * k, (block + 1) * k).indexOf(j) : -1; // O1
    let y = kept < 0 ? round(round(code * parts.scale[s]) + (parts.zero?.[s] ?? 0)) : parts.outliers[at * k + kept]; // D1
    if (parts.norm && magnitude === "norm") y = stage.length[at] && round(y / stage.length[at]);
    const value = parts.norm ? round(parts.norm[at] * y) : y, wanted = x_hat[((n + 1) * tokens - coded + t) * D + j];
    return code === v - (symmetric ? 2 ** (bits - 1) : 0) && Object.is(value, wanted);
  });
}
const outcomes = Object.entries(JSON.parse(read("manifest.json")).files).flatMap(([name, { sha256 }]) => {
  const whole = createHash("sha256").update(read(name)).digest("hex") === sha256;
  const { scheme, cases } = /^(encode|decode|feedback)-/.test(name) && whole ? JSON.parse(read(name)) : { cases: [] };
  if (!cases.length) console.log(`${name}: its cases are not read`);
  return [whole, ...cases.filter(({ result }) => result === "done").map(({ inputs, expected, intermediates: stages }) => {
    const { shape, x_hat, ...all } = Object.fromEntries(Object.entries({ ...stages, ...inputs, ...expected }).map(array));
    return agrees(scheme, (inputs.x?.shape ?? shape).slice(-2), all, all, x_hat);
  })];
});
console.log(`${outcomes.filter((good) => good).length} passed, ${outcomes.filter((good) => !good).length} failed`);
process.exitCode = outcomes.every((good) => good) ? 0 : 1;
