// Reads {"formula", "display"} a line, answers {"html"} or {"error"} a line.
import { createInterface } from "node:readline";
import katex from "../.venv/katex/node_modules/katex/dist/katex.mjs";

for await (const line of createInterface({ input: process.stdin })) {
  const { formula, display } = JSON.parse(line);
  let answer;
  try {
    answer = { html: katex.renderToString(formula, { displayMode: display, strict: "error" }) };
  } catch (error) {
    answer = { error: error.message };
  }
  console.log(JSON.stringify(answer));
}
