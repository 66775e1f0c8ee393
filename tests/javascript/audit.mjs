// Open the page of an audit in a headless browser, light and dark, without a network: node audit.mjs PAGE
// With SCREENSHOT=FOLDER pictures of the page, light.png and dark.png, and of its first figures, main.png.

import { join } from "node:path";
import { pathToFileURL } from "node:url";
import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

const [file] = process.argv.slice(2);
const browser = await puppeteer.launch({
  args: [...chromium.args, "--no-sandbox"], executablePath: await chromium.executablePath(), headless: "shell",
});
const found = { errors: [], requests: [], schemes: {} };
try {
  const page = await browser.newPage();
  await page.setViewport({ width: 1240, height: 900 });
  page.on("console", (message) => found.errors.push(message.text()));
  page.on("pageerror", (error) => found.errors.push(error.message));
  page.on("request", (request) => {
    if (!request.url().startsWith("data:")) found.requests.push(request.url());
  });
  for (const scheme of ["light", "dark"]) {
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: scheme }]);
    await page.goto(pathToFileURL(file).href);
    // What a person sees: colours, and whether anything sticks out to the right.
    found.schemes[scheme] = await page.evaluate(() => {
      const style = getComputedStyle(document.body);
      return {
        paper: style.backgroundColor, ink: style.color,
        wide: document.documentElement.scrollWidth - document.documentElement.clientWidth,
      };
    });
    if (process.env.SCREENSHOT) {
      await page.screenshot({ path: join(process.env.SCREENSHOT, `${scheme}.png`), fullPage: true });
    }
  }
  Object.assign(found, await page.evaluate(() => ({
    title: document.querySelector("h1").textContent,
    advice: document.querySelector("#advice strong").textContent,
    policy: JSON.parse(document.getElementById("policy").textContent),
    figures: [...document.querySelectorAll("figure")].map((figure) => figure.id),
    captions: [...document.querySelectorAll("figcaption")].map((caption) => caption.textContent),
    drawn: [...document.querySelectorAll("figure svg")].every((svg) => svg.getBoundingClientRect().height > 60),
    marks: [...document.querySelectorAll("circle.measured title")].map((title) => title.textContent),
    over: document.querySelectorAll("td.over").length,
  })));
  // Each picture of a map must have come, of the size that its values have.
  found.pictures = await page.evaluate(() => Promise.all(
    [...document.querySelectorAll("figure.map")].map(async (figure) => {
      const { values } = JSON.parse(figure.querySelector("script").textContent);
      const image = new Image();
      image.src = figure.querySelector("image").getAttribute("href");
      await image.decode();
      return [image.naturalHeight, image.naturalWidth, values.length, values[0].length];
    })));
  // Point at the first row and the last column of the first map.
  const box = await (await page.$("figure.map svg rect.frame")).boundingBox();
  await page.mouse.move(box.x + box.width - 2, box.y + 2);
  found.tip = await page.$eval("#tip", (tip) => [getComputedStyle(tip).display, tip.textContent]);
  if (process.env.SCREENSHOT) {
    await page.mouse.move(0, 0);
    await page.emulateMediaFeatures([{ name: "prefers-color-scheme", value: "light" }]);
    await (await page.$("#main")).screenshot({ path: join(process.env.SCREENSHOT, "main.png") });
  }
  await page.setViewport({ width: 390, height: 800 });
  found.narrow = await page.evaluate(() => document.documentElement.scrollWidth - document.documentElement.clientWidth);
} finally {
  await browser.close();
}
console.log(JSON.stringify(found));
