// Open the page in a headless browser, choose a model, send a prompt: node chat.mjs PAGE PROMPT FILE...
// With SCREENSHOT=FILE.png a picture of the page at the end, and what it says to stderr.

import { createServer } from "node:http";
import { readFile } from "node:fs/promises";
import { basename, dirname, join } from "node:path";
import { fileURLToPath } from "node:url";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [page_file, prompt, ...files] = process.argv.slice(2);
const TYPES = { html: "text/html", mjs: "text/javascript", wasm: "application/wasm" };
const send = (name) => ({ contentType: TYPES[name.split(".").at(-1)] });

const server = createServer(async ({ url }, response) => {
  try {
    const body = await readFile(join(dirname(page_file), basename(url)));
    response.writeHead(200, { "content-type": send(url).contentType }).end(body);
  } catch {
    response.writeHead(404).end();
  }
}).listen(0, "127.0.0.1");
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"], executablePath: await chromium.executablePath(), headless: "shell",
});
try {
  const page = await browser.newPage();
  page.on("console", (message) => console.error(message.text()));
  page.on("pageerror", (error) => console.error(error.message));
  // What the page asks a CDN for is the package that is installed here, of the same version.
  const folders = ["onnxruntime-web", "@huggingface/tokenizers"].map(
    (name) => [`/npm/${name}@`, dirname(fileURLToPath(import.meta.resolve(name)))]);
  await page.setRequestInterception(true);
  page.on("request", async (request) => {
    const url = new URL(request.url());
    if (url.hostname === "127.0.0.1" || url.protocol === "blob:" || url.protocol === "data:") return request.continue();
    const name = basename(url.pathname);
    const [, folder] = folders.find(([start]) => url.pathname.startsWith(start));
    const body = await readFile(join(folder, name));
    return request.respond({ status: 200, headers: { "access-control-allow-origin": "*" }, ...send(name), body });
  });
  await page.goto(`http://127.0.0.1:${server.address().port}/${basename(page_file)}`);
  const file = await page.$("#file");
  await file.uploadFile(...files);
  const limit = { timeout: 240_000 };
  await page.waitForFunction(() => !document.getElementById("send").disabled, limit);
  await page.type("#prompt", prompt);
  await page.click("#send");
  await page.waitForFunction(() => document.getElementById("state").textContent.endsWith("a second"), limit);
  if (process.env.SCREENSHOT) {
    await page.screenshot({ path: process.env.SCREENSHOT, fullPage: true });
    console.error(await page.$eval("#state", (element) => element.textContent));
  }
  console.log(JSON.stringify(await page.$eval("#text", (element) => element.textContent)));
} finally {
  await browser.close();
  server.close();
}
