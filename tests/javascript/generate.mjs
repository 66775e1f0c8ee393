// Print the tokens that a model gives, as JSON: node generate.mjs RUNTIME MODEL DECODER PROMPT LIMIT CAPACITY

import { readFile } from "node:fs/promises";
import { pathToFileURL } from "node:url";

const [runtime, model, module, prompt, limit, capacity] = process.argv.slice(2);
// onnxruntime-node 1.30 finds no bytes in a Float16Array, which Node has from 24 on.
if (runtime === "onnxruntime-node") delete globalThis.Float16Array;
const ort = await import(runtime);
const { Decoder } = await import(pathToFileURL(module));
if (runtime === "onnxruntime-web") ort.env.wasm.numThreads = 1; // ends with the process
const decoder = await Decoder.open(ort, new Uint8Array(await readFile(model)), {
  executionProviders: [runtime === "onnxruntime-web" ? "wasm" : "cpu"], capacity: Number(capacity),
});
const tokens = [];
for await (const token of decoder.generate(JSON.parse(prompt), Number(limit))) tokens.push(token);
const { length, cacheBytes: bytes } = decoder;
const again = [];
decoder.reset();
for await (const token of decoder.generate(JSON.parse(prompt), 3)) again.push(token);
console.log(JSON.stringify({ tokens, again, length, bytes }));
