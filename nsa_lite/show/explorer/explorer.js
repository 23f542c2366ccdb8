// What one query of an NSA trace selects, drawn. The notebook (anywidget) calls `render`, a page
// of its own calls `openPage`; both hand over the same facts and the same typed arrays, once.
// Python has worked out everything that follows from the paper's rules: here it is only drawn.
// No library and no network. t is a query, j a selection block, i a compressed block.

// --- state: what is looked at, and what a block can be ---

const CHOICES = ["query", "checkpoint", "layer", "group", "n"]; // what Python can read and set
const KINDS = ["unseen", "unused", "selected", "forced"];

// A colour and a hatch for each thing a block can be (Okabe-Ito, as in the notebooks' figures).
const LOOKS = {
  unseen: ["#FFFFFF"],
  unused: ["#F2F2F2"],
  selected: ["#0072B2", "#8CC4E8", (x, y) => (x + y) % 8 === 0],
  forced: ["#E69F00", "#6B4A00", (x, y) => (x + y) % 8 === 0 || (x - y) % 8 === 0],
  window: ["#009E73", "#FFFFFF", (x, y) => x % 4 === 1 && y % 4 === 1],
  compressed: ["#56B4E9"],
};
const INK = "#222222";
const LINE = "#767676";

// --- decode: numbers out of the bytes ---

const TYPES = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };

async function openTrace(facts, bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const arrays = {};
  for (const [name, place] of Object.entries(facts.arrays)) arrays[name] = arrayAt(buffer, place);
  return new Trace(facts, arrays);
}

function arrayAt(buffer, { type, shape, begins }) {
  const count = shape.reduce((a, b) => a * b, 1);
  if (type === "uint16") return joinBytes(new Uint8Array(buffer, begins, 2 * count));
  return new TYPES[type](buffer, begins, count);
}

function joinBytes(bytes) { // all low bytes, then all high ones
  const count = bytes.length / 2;
  return Uint16Array.from({ length: count }, (_, k) => bytes[k] | (bytes[count + k] << 8));
}

// Each row's scores by block id: they were sent best first, each as a step down from the last.
function scoresById({ order, steps, score_scale: scale }, { blocks, levels, nan }) {
  const scores = new Float32Array(steps.length);
  let level = 0;
  for (let at = 0; at < steps.length; at++) {
    const row = Math.floor(at / blocks);
    level = (level - steps[at]) & 0xffff;
    const score = (level / levels.scores) * scale[row];
    scores[row * blocks + order[at]] = level === nan.scores ? NaN : score;
  }
  return scores;
}

// The questions that a drawing asks; a view is one choice of everything in CHOICES.
class Trace {
  constructor(facts, arrays) {
    Object.assign(this, { facts, arrays, first: facts.start });
    this.length = facts.start + facts.queries; // tokens
    this.selectBlockSize = facts.select_block_size;
    this.scores = scoresById(arrays, facts);
    [, this.layers, this.groups, this.heads] = facts.arrays.gates.shape; // heads of a group
    [this.parts, , this.compressed] = facts.arrays.p?.shape.slice(-3) ?? [0, 0, 0];
    this.tokens = facts.tokens.map(visible);
    this.longest = Math.max(1, ...this.tokens.map((token) => token.length));
    this.asked = [...arrays.answer_block.keys()].map((q) => q + this.first)
      .filter((t) => this.answerBlock(t) >= 0); // the queries that look for an answer
  }

  begun(t) { return this.arrays.begun[t - this.first]; } // selection blocks, the last its own
  own(t) { return this.begun(t) - 1; }
  seen(t) { return this.arrays.seen[t - this.first]; } // compressed blocks
  windowFirst(t) { return this.arrays.window_first[t - this.first]; }
  answerBlock(t) { return this.arrays.answer_block[t - this.first]; } // -1 if nothing is asked

  group(view) { return (view.checkpoint * this.layers + view.layer) * this.groups + view.group; }
  row(view, t) { return this.group(view) * this.facts.queries + t - this.first; }
  byScore(view) { return this.facts.by_score[view.checkpoint][view.layer]; }
  forced(view, t) { return this.arrays.forced[this.row(view, t)]; } // how many of the taken

  ranked(view, t) { // the blocks that have begun, in the order in which they are taken
    const begins = this.row(view, t) * this.facts.blocks;
    return this.arrays.order.subarray(begins, begins + this.begun(t));
  }

  taken(view, t, n = view.n) { // the forced ones first
    const count = this.byScore(view) ? n : this.arrays.taken[this.row(view, t)];
    return this.ranked(view, t).subarray(0, count);
  }

  kinds(view, t) { // one of KINDS, by number, for each block
    const kinds = new Uint8Array(this.facts.blocks).fill(1, 0, this.begun(t));
    const forced = this.forced(view, t);
    this.taken(view, t).forEach((j, rank) => { kinds[j] = rank < forced ? 3 : 2; });
    return kinds;
  }

  score(view, t, j) { // the importance of block j (Eq. 9 and 10)
    return this.scores[this.row(view, t) * this.facts.blocks + j];
  }

  probability(view, t, part, i) { // of compressed block i (Eq. 8): one head's, or the heads' sum
    const head = this.group(view) * this.parts + part;
    const row = head * this.facts.queries + t - this.first;
    return (this.arrays.p[row * this.compressed + i] / 255) * this.arrays.p_scale[row];
  }

  gate(view, t, branch, r) { // of one head of the group
    const row = (this.group(view) * this.heads + r) * this.facts.queries + t - this.first;
    const level = this.arrays.gates[row * 3 + branch];
    return level === this.facts.nan.gates ? NaN : level / this.facts.levels.gates;
  }

  gateWords(view, t, branch) { // the mean over the group's heads: ".41"
    const hundredths = this.arrays.gate_hundredths[this.row(view, t) * 3 + branch];
    if (hundredths === this.facts.nan.gates) return "NaN";
    return (hundredths / 100).toFixed(2).replace(/^0/, "");
  }

  describe(view, t) { return sentence(this, view, t); }
}

// A token as one can see it: spaces, line ends and other signs that print nothing get a picture.
function visible(token) {
  return token.replace(/\n/g, "\u23CE").replace(/\t/g, "\u21E5").replace(/ /g, "\u00B7")
    .replace(/[\u0000-\u001F\u007F]/g, "\u25A1");
}

// --- draw: what the map and the strip share ---

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// An 8 x 8 tile of a kind, as 32-bit pixels: the map copies them, boxes use them as a pattern.
const TILES = Object.fromEntries(Object.entries(LOOKS).map(([kind, [ground, mark, marked]]) => {
  const at = (k) => pixel(marked?.(k & 7, k >> 3) ? mark : ground);
  return [kind, Uint32Array.from({ length: 64 }, (_, k) => at(k))];
}));
const patterns = {};

function pixel(colour) {
  const bytes = [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).concat(255);
  return new Uint32Array(new Uint8Array(bytes).buffer)[0];
}

function canvasOf(image) {
  const canvas = new OffscreenCanvas(image.width, image.height);
  canvas.getContext("2d").putImageData(image, 0, 0);
  return canvas;
}

function box(ctx, kind, x, y, width, height) {
  if (!patterns[kind]) {
    const tile = new ImageData(new Uint8ClampedArray(TILES[kind].buffer), 8, 8);
    patterns[kind] = ctx.createPattern(canvasOf(tile), "repeat");
  }
  ctx.fillStyle = patterns[kind];
  ctx.fillRect(x, y, width, height);
  ctx.strokeStyle = LINE;
  ctx.lineWidth = 0.5;
  if (width > 3 && height > 3) ctx.strokeRect(x, y, width, height);
}

function text(ctx, words, x, y, align = "left") {
  ctx.fillStyle = INK;
  ctx.textAlign = align;
  ctx.fillText(words, x, y);
}

function line(ctx, x0, y0, x1, y1, colour, thick) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = thick;
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

function ring(ctx, x, y, radius) {
  ctx.beginPath();
  ctx.arc(x, y, radius, 0, 2 * Math.PI);
  ctx.fillStyle = "#FFFFFF";
  ctx.fill();
  ctx.strokeStyle = "#000000";
  ctx.lineWidth = 1.2;
  ctx.stroke();
}

// Size a canvas to its place on the page, in the screen's own pixels; clear it.
function begin(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, canvas.clientWidth);
  const height = Math.max(1, canvas.clientHeight);
  const pixels = { width: Math.round(width * scale), height: Math.round(height * scale) };
  if (canvas.width !== pixels.width || canvas.height !== pixels.height) {
    Object.assign(canvas, pixels);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.fillStyle = "#FFFFFF";
  ctx.fillRect(0, 0, width, height);
  ctx.font = "12px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  return { ctx, width, height, scale };
}

// --- draw the map: queries down, blocks across ---

const MAP = { left: 40, top: 22, right: 6, bottom: 6 }; // margins, in pixels

function mapPlace(canvas) {
  const width = Math.max(1, canvas.clientWidth - MAP.left - MAP.right);
  return { width, height: Math.max(1, canvas.clientHeight - MAP.top - MAP.bottom) };
}

// Every query's kinds, a row of pixels at a time: drawn anew only when `key` changes.
function bakeMap(trace, view, width, height) {
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const { queries, blocks } = trace.facts;
  let row = -1;
  let kinds;
  for (let y = 0; y < height; y++) {
    const next = Math.floor((y * queries) / height);
    if (next !== row) kinds = trace.kinds(view, trace.first + next);
    row = next;
    for (let x = 0; x < width; x++) {
      const kind = KINDS[kinds[Math.floor((x * blocks) / width)]];
      pixels[y * width + x] = TILES[kind][((y & 7) << 3) | (x & 7)];
    }
  }
  return canvasOf(image);
}

function drawMap(canvas, trace, view, t, cache) {
  const { ctx, scale } = begin(canvas);
  const { queries, blocks } = trace.facts;
  const { left, top } = MAP;
  const { width, height } = mapPlace(canvas);
  const size = [Math.round(width * scale), Math.round(height * scale)];
  const key = [view.checkpoint, view.layer, view.group, view.n, ...size].join();
  if (cache.key !== key) Object.assign(cache, { key, image: bakeMap(trace, view, ...size) });
  ctx.drawImage(cache.image, left, top, width, height);
  ctx.strokeStyle = LINE;
  ctx.lineWidth = 1;
  ctx.strokeRect(left, top, width, height);
  const x = (j) => left + ((j + 0.5) * width) / blocks;
  const y = (q) => top + ((q - trace.first + 0.5) * height) / queries;
  text(ctx, "queries down, blocks across", left, 10);
  for (const q of [trace.first, trace.length - 1]) {
    text(ctx, q, left - 4, clamp(y(q), top + 6, top + height - 6), "right");
  }
  for (const [colour, thick] of [["#FFFFFF", 4], ["#000000", 1.5]]) { // a crosshair with a halo
    line(ctx, left - 4, y(t), left + width, y(t), colour, thick);
    line(ctx, x(view.focus), top - 4, x(view.focus), top + height, colour, thick);
  }
  for (const q of trace.asked) ring(ctx, x(trace.answerBlock(q)), y(q), 3);
}

// --- draw the strip: one query's scores, blocks, window and tokens, one above the other ---

// The tokens that the strip shows: all of them, or fewer around the block in focus.
function stretch(trace, view, width) {
  const fewest = Math.min(trace.length, Math.max(4, width / (8 * trace.longest + 6)));
  const count = trace.length * (fewest / trace.length) ** (view.zoom / 100);
  const middle = (view.focus + 0.5) * trace.selectBlockSize;
  const first = clamp(middle - count / 2, 0, trace.length - count);
  return {
    first,
    count,
    width,
    readable: width / count >= 7.5 * trace.longest,
    x: (token) => ((token - first) / count) * width,
    wide: (tokens) => (tokens / count) * width,
    shows: (token, tokens) => token + tokens > first && token < first + count,
  };
}

// Where the rows of the strip begin, and their heights, in pixels.
const ROWS = { p: [20, 58], importance: [100, 64], blocks: [168, 24], window: [196, 14],
  tokens: [214, 20], ids: [238, 12] };

function drawStrip(canvas, trace, view, t) {
  const { ctx, width } = begin(canvas);
  const place = stretch(trace, view, width);
  const kinds = trace.kinds(view, t);
  const size = trace.selectBlockSize;
  ctx.fillStyle = "#FFF3C4"; // the block in focus, behind everything
  ctx.fillRect(place.x(view.focus * size), 14, place.wide(size), 238);
  drawCompressed(ctx, trace, view, t, place);
  drawImportance(ctx, trace, view, t, kinds, place);
  drawBlocks(ctx, trace, kinds, place);
  drawQuery(ctx, trace, t, place);
  drawTokens(ctx, trace, place);
}

// A bar for each compressed block, the heads' shares one above the other.
function drawCompressed(ctx, trace, view, t, { x, wide, shows }) {
  const [top, height] = ROWS.p;
  const { parts, facts: { bars: { first, step } } } = trace;
  if (!parts) {
    text(ctx, "compressed scores (Eq. 8): left out, to keep the file small", 2, 8);
    return;
  }
  const heads = parts > 1 ? `the ${parts} heads stacked` : "summed over the group's heads";
  text(ctx, `score of each compressed block (Eq. 8), ${heads}`, 2, 8);
  const bars = Array.from({ length: trace.seen(t) }, (_, i) =>
    Array.from({ length: parts }, (_, part) => trace.probability(view, t, part, i)));
  const most = Math.max(1e-9, ...bars.map((bar) => bar.reduce((a, b) => a + b)));
  bars.forEach((bar, i) => {
    const token = first + i * step;
    if (!shows(token, step)) return;
    let bottom = top + height;
    bar.forEach((p, part) => {
      const tall = (p / most) * height;
      bottom -= tall;
      ctx.fillStyle = part % 2 ? "#1F78A8" : "#56B4E9";
      ctx.fillRect(x(token), bottom, Math.max(1, wide(step) - 1), tall);
    });
  });
}

// A bar for each selection block, and the line that a block must pass to be chosen.
function drawImportance(ctx, trace, view, t, kinds, { x, wide, shows, width }) {
  const [top, height] = ROWS.importance;
  const size = trace.selectBlockSize;
  const scores = Array.from({ length: trace.begun(t) }, (_, j) => trace.score(view, t, j));
  const most = Math.max(1e-9, ...scores.filter((score) => !Number.isNaN(score)));
  const largest = most > 1e-9 ? most.toPrecision(3) : 0;
  text(ctx, `importance of each selection block (Eq. 9 and 10), largest ${largest}`, 2, 88);
  scores.forEach((score, j) => {
    if (!shows(j * size, size)) return;
    if (Number.isNaN(score)) {
      text(ctx, "NaN", x((j + 0.5) * size), top + height - 8, "center");
      return;
    }
    const tall = (score / most) * height;
    const broad = Math.max(1, wide(size) - 2);
    box(ctx, KINDS[kinds[j]], x(j * size) + 1, top + height - tall, broad, tall);
  });
  const chosen = scores.filter((score, j) => kinds[j] === 2 && !Number.isNaN(score));
  if (!chosen.length || !trace.byScore(view)) return;
  const y = top + height * (1 - Math.min(...chosen) / most);
  ctx.setLineDash([5, 4]);
  line(ctx, 0, y, width, y, "#000000", 1);
  ctx.setLineDash([]);
}

function drawBlocks(ctx, trace, kinds, { x, wide, shows }) {
  const [top, height] = ROWS.blocks;
  const size = trace.selectBlockSize;
  const every = Math.ceil(20 / wide(size)); // ids need 20 pixels
  kinds.forEach((kind, j) => {
    const tokens = Math.min(size, trace.length - j * size); // the last block may be cut short
    if (!shows(j * size, tokens)) return;
    box(ctx, KINDS[kind], x(j * size), top, wide(tokens), height);
    if (j % every === 0) text(ctx, j, x((j + 0.5) * size), ROWS.ids[0] + 6, "center");
  });
}

// The window, the query's own block, the query in it, and the block that holds its answer.
function drawQuery(ctx, trace, t, { x, wide }) {
  const [top, height] = ROWS.blocks;
  const size = trace.selectBlockSize;
  const first = trace.windowFirst(t);
  box(ctx, "window", x(first), ROWS.window[0], wide(t + 1 - first), ROWS.window[1]);
  ctx.strokeStyle = "#000000";
  ctx.lineWidth = 2;
  ctx.strokeRect(x(trace.own(t) * size), top, wide(size), height);
  line(ctx, x(t + 0.5), top - 3, x(t + 0.5), ROWS.tokens[0] + 2, "#000000", 2);
  const answer = trace.answerBlock(t);
  if (answer >= 0) ring(ctx, x((answer + 0.5) * size), top + 12, 5);
}

function drawTokens(ctx, trace, { first, count, readable, x, wide }) {
  const [top, height] = ROWS.tokens;
  if (!readable) {
    text(ctx, "zoom in to read the tokens", 2, top + 11);
    return;
  }
  ctx.strokeStyle = "#DDDDDD";
  ctx.lineWidth = 1;
  for (let s = Math.floor(first); s < Math.min(trace.length, first + count); s++) {
    ctx.strokeRect(x(s), top, wide(1), height);
    text(ctx, trace.tokens[s], x(s + 0.5), top + 11, "center");
  }
}

// Below the strip: a bar for each head and branch.
function drawGates(canvas, trace, view, t) {
  const { ctx, width, height } = begin(canvas);
  const third = width / 3;
  const top = 20;
  const full = height - top - 2; // a gate of 1
  const wide = Math.min(26, (third - 16) / trace.heads);
  ["compressed", "selected", "window"].forEach((branch, b) => {
    const left = b * third + 2;
    text(ctx, `${branch} gate ${trace.gateWords(view, t, b)}`, left, 8);
    for (let r = 0; r < trace.heads; r++) {
      const tall = (trace.gate(view, t, b, r) || 0) * full; // none for NaN
      ctx.strokeStyle = LINE;
      ctx.strokeRect(left + r * wide, top, wide - 3, full);
      box(ctx, branch, left + r * wide, height - 2 - tall, wide - 3, tall);
    }
  });
}

// --- the sentence, and what else the numbers of one query say ---

const list = (ids) => [...ids].sort((a, b) => a - b).join(" ") || "none";

function range(first, last) {
  if (last < first) return "none";
  return last === first ? `${first}` : `${first}-${last}`;
}

function sentence(trace, view, t) { // the words of TracedSequence.describe
  const taken = trace.taken(view, t);
  const free = taken.subarray(trace.forced(view, t));
  const how = trace.byScore(view) ? "by score" : "not by score";
  const selected = taken.length ? `${list(taken)} (${list(free)} ${how})` : "none";
  const gates = [0, 1, 2].map((branch) => trace.gateWords(view, t, branch)).join(" ");
  return `query ${t}: compressed blocks ${range(0, trace.seen(t) - 1)}, selected ${selected}, ` +
    `window ${range(trace.windowFirst(t), t)}, gates ${gates}`;
}

function remarks(trace, view, t) { // a line each
  const lines = [margin(trace, view, t)];
  const now = trace.taken(view, t);
  if (t > trace.first && now.length) {
    const before = trace.taken(view, t - 1);
    const shared = now.filter((j) => before.includes(j));
    const percent = Math.round((100 * shared.length) / now.length);
    lines.push(`overlap with query ${t - 1}: ${percent} % of the blocks`);
  }
  const traced = trace.facts.traced_n;
  if (view.n !== traced && trace.byScore(view)) {
    const then = trace.taken(view, t, traced);
    const out = list(then.subarray(now.length));
    const into = list(now.subarray(then.length));
    lines.push(`n = ${view.n} for ${traced}: blocks ${out} drop out, ${into} come in`);
  }
  const answer = trace.answerBlock(t);
  const found = now.includes(answer) ? "selected" : "not selected";
  if (answer >= 0) lines.push(`answer in block ${answer}: ${found}`);
  const bad = trace.ranked(view, t).filter((j) => Number.isNaN(trace.score(view, t, j)));
  if (bad.length) lines.push(`scores of blocks ${list(bad)} are NaN; the layer counts them as 0`);
  return lines;
}

function margin(trace, view, t) { // between the last block that was taken and the next
  if (!trace.byScore(view)) {
    return "these blocks were not chosen by their score, so n cannot be changed";
  }
  const count = trace.taken(view, t).length;
  const [last, next] = trace.ranked(view, t).subarray(count - 1, count + 1);
  if (next === undefined) return "no block is left out";
  if (count === trace.forced(view, t)) return "only forced blocks are selected";
  const lowest = trace.score(view, t, last);
  const highest = trace.score(view, t, next);
  return `lowest score selected: ${lowest.toPrecision(3)} (block ${last}); ` +
    `next: ${highest.toPrecision(3)} (block ${next}); margin ${(lowest - highest).toPrecision(2)}`;
}

function blockWords(trace, j) {
  const from = j * trace.selectBlockSize;
  const to = Math.min(trace.length, from + trace.selectBlockSize);
  const tokens = trace.tokens.slice(from, to).join(trace.longest > 1 ? " " : "");
  return `block ${j}, tokens ${range(from, to - 1)}: ${tokens}`;
}

function checkpointWords(trace, view) {
  const words = trace.facts.checkpoints[view.checkpoint];
  if (!trace.asked.length) return words;
  const found = trace.asked.filter((t) => trace.taken(view, t).includes(trace.answerBlock(t)));
  return `${words}: ${found.length} of ${trace.asked.length} answers' blocks selected`;
}

// --- the page around the drawings, and its keys ---

const LAYOUT = `
  <div class="nsa-controls"></div>
  <p class="nsa-sentence"></p>
  <p class="nsa-spoken" role="status" aria-live="polite"></p>
  <div class="nsa-panels">
    <canvas class="nsa-map" tabindex="0" role="slider" aria-orientation="vertical"
      aria-label="Block map: which query is looked at"></canvas>
    <div>
      <canvas class="nsa-strip" tabindex="0" role="slider"
        aria-label="Sequence as a strip: which block is in focus"></canvas>
      <canvas class="nsa-gates" role="img"
        aria-label="Gates of each head; the sentence gives their means"></canvas>
      <ul class="nsa-remarks"></ul>
    </div>
  </div>
  <p class="nsa-reader"></p>
  <div class="nsa-legend"></div>
  <p class="nsa-keys">Keys on the map: arrows, Page Up and Page Down, Home, End. On the strip:
    arrows move the block in focus, comma and full stop go to the next selected one, plus and minus
    zoom.</p>`;

function element(tag, inside = "", attributes = {}) {
  const made = document.createElement(tag);
  made.textContent = inside;
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
}

// A labelled range; its number stands beside it.
function slider(parent, name, [low, high], changed) {
  const label = element("label", `${name} `), output = element("output");
  const input = element("input", "", { type: "range", min: low, max: high, "aria-label": name });
  input.disabled = low === high;
  input.addEventListener("input", () => changed(Number(input.value)));
  label.append(input, output);
  parent.append(label);
  return {
    input,
    show(value, words = value) {
      input.value = value;
      input.setAttribute("aria-valuetext", words);
      output.textContent = words;
    },
  };
}

function legend(parent) {
  const kinds = { forced: "forced", selected: "selected", unused: "not selected",
    unseen: "not begun", window: "window", compressed: "compressed" };
  const marks = ["thick border: own block", "ring: the answer's block", "yellow: block in focus",
    "dashes: the last score that was chosen"];
  for (const [kind, name] of Object.entries(kinds)) {
    const item = element("span");
    const swatch = element("canvas", "", { width: 22, height: 16, "aria-hidden": "true" });
    box(swatch.getContext("2d"), kind, 0.5, 0.5, 21, 15);
    item.append(swatch, ` ${name}`);
    parent.append(item);
  }
  parent.append(...marks.map((mark) => element("span", mark)));
}

class Explorer {
  constructor(root, trace, model) {
    root.className = "nsa-explorer";
    root.innerHTML = LAYOUT;
    Object.assign(this, { root, trace, model, drawnMap: {}, timer: null });
    for (const name of ["map", "strip", "gates", "sentence", "spoken", "remarks", "reader"]) {
      this[name] = root.querySelector(`.nsa-${name}`);
    }
    legend(root.querySelector(".nsa-legend"));
    this.makeControls(root.querySelector(".nsa-controls"));
    for (const part of root.querySelectorAll("canvas, input, button")) {
      part.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves its keys to it
    }
    const query = model.get("query");
    this.view = { query, focus: trace.own(query), zoom: 0, hovered: null };
    this.listen();
    this.follow();
  }

  makeControls(parent) {
    const { ranges, checkpoints } = this.trace.facts;
    this.play = element("button", "Play", { type: "button" });
    parent.append(this.play);
    this.controls = {};
    for (const name of CHOICES) {
      if (name === "checkpoint" && checkpoints.length === 1) continue;
      this.controls[name] = slider(parent, name, ranges[name], (value) => this.choose(name, value));
    }
    this.zoom = slider(parent, "zoom", [0, 100], (value) => this.look({ zoom: value }));
  }

  choose(name, value) { // a choice that Python sees
    if (name === "query") this.view.hovered = null;
    this.model.set(name, clamp(value, ...this.trace.facts.ranges[name]));
    this.model.save_changes();
  }

  follow() { // what was chosen, here or in Python; speak once it rests
    const { view, trace, model } = this;
    const onOwn = view.focus === trace.own(view.query);
    for (const name of CHOICES) view[name] = model.get(name);
    if (onOwn) view.focus = trace.own(view.query);
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      this.spoken.textContent = trace.describe(view, view.query);
    }, 250);
    this.redraw();
  }

  look(change) { // a choice that only this page knows
    const view = Object.assign(this.view, change);
    view.focus = clamp(view.focus, 0, this.trace.facts.blocks - 1);
    view.zoom = clamp(view.zoom, 0, 100);
    this.redraw();
  }

  listen() {
    const { map, strip, trace } = this;
    const query = (event) => { // under the mouse
      const down = (event.offsetY - MAP.top) / mapPlace(map).height;
      const at = trace.first + Math.floor(down * trace.facts.queries);
      return clamp(at, ...trace.facts.ranges.query);
    };
    map.addEventListener("mousemove", (event) => this.look({ hovered: query(event) }));
    map.addEventListener("mouseleave", () => this.look({ hovered: null }));
    map.addEventListener("click", (event) => {
      const across = (event.offsetX - MAP.left) / mapPlace(map).width;
      this.look({ focus: Math.floor(across * trace.facts.blocks) });
      this.choose("query", query(event));
    });
    strip.addEventListener("click", (event) => {
      const { first, count } = stretch(trace, this.view, strip.clientWidth);
      const token = first + (event.offsetX / strip.clientWidth) * count;
      this.look({ focus: Math.floor(token / trace.selectBlockSize) });
    });
    map.addEventListener("keydown", (event) => this.key(event, this.mapKeys()));
    strip.addEventListener("keydown", (event) => this.key(event, this.stripKeys()));
    this.play.addEventListener("click", () => this.setPlaying(!this.timer));
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.root);
    this.followed = () => this.follow();
    for (const name of CHOICES) this.model.on(`change:${name}`, this.followed);
  }

  mapKeys() {
    const { query } = this.view;
    const [low, high] = this.trace.facts.ranges.query;
    const page = Math.ceil((high - low) / 10);
    const to = (t) => () => this.choose("query", t);
    return { ArrowDown: to(query + 1), ArrowRight: to(query + 1), ArrowUp: to(query - 1),
      ArrowLeft: to(query - 1), PageDown: to(query + page), PageUp: to(query - page),
      Home: to(low), End: to(high) };
  }

  stripKeys() {
    const { focus, zoom, query } = this.view;
    const chosen = this.trace.taken(this.view, query).slice().sort();
    const to = (j) => () => this.look({ focus: j });
    const wider = (percent) => () => this.look({ zoom: zoom + percent });
    return { ArrowRight: to(focus + 1), ArrowLeft: to(focus - 1), Home: to(0), End: to(Infinity),
      ".": to(chosen.find((j) => j > focus) ?? focus),
      ",": to(chosen.findLast((j) => j < focus) ?? focus),
      "+": wider(10), "=": wider(10), "-": wider(-10) };
  }

  key(event, actions) {
    if (event.ctrlKey || event.altKey || event.metaKey || !(event.key in actions)) return;
    actions[event.key]();
    event.preventDefault();
    event.stopPropagation();
  }

  setPlaying(on) {
    const [low, high] = this.trace.facts.ranges.query;
    if (on && this.view.query >= high) this.choose("query", low); // once more from the top
    clearInterval(this.timer);
    this.play.textContent = on ? "Pause" : "Play";
    this.timer = on ? setInterval(() => this.step(), 120) : null;
  }

  step() {
    const { queries, ranges } = this.trace.facts;
    if (this.view.query >= ranges.query[1]) this.setPlaying(false);
    else this.choose("query", this.view.query + Math.ceil(queries / 256));
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.map.clientWidth) this.draw();
    });
  }

  draw() {
    const { trace, view } = this;
    const t = view.hovered ?? view.query;
    drawMap(this.map, trace, view, t, this.drawnMap);
    drawStrip(this.strip, trace, view, t);
    drawGates(this.gates, trace, view, t);
    this.sentence.textContent = trace.describe(view, t);
    this.remarks.replaceChildren(...remarks(trace, view, t).map((line) => element("li", line)));
    this.reader.textContent = blockWords(trace, view.focus);
    this.showControls();
    aria(this.map, trace.facts.ranges.query, view.query, trace.describe(view, view.query));
    aria(this.strip, [0, trace.facts.blocks - 1], view.focus, this.reader.textContent);
  }

  showControls() {
    const { trace, view, controls } = this;
    for (const name in controls) controls[name].show(view[name]);
    controls.checkpoint?.show(view.checkpoint, checkpointWords(trace, view));
    controls.n.input.disabled = !trace.byScore(view);
    this.zoom.show(view.zoom, `${view.zoom} %`);
  }

  close() {
    this.setPlaying(false);
    this.resized.disconnect();
    for (const name of CHOICES) this.model.off(`change:${name}`, this.followed);
  }
}

function aria(canvas, [low, high], now, words) {
  const values = { valuemin: low, valuemax: high, valuenow: now, valuetext: words };
  for (const [name, value] of Object.entries(values)) canvas.setAttribute(`aria-${name}`, value);
}

async function render({ model, el }) {
  const trace = await openTrace(model.get("facts"), model.get("data"));
  const root = el.appendChild(document.createElement("div"));
  root.explorer = new Explorer(root, trace, model);
  return () => root.explorer.close();
}

// Stands in for the notebook's model on a page of its own.
function pageModel(values) {
  const listeners = {};
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      for (const listener of listeners[`change:${name}`] ?? []) listener();
    },
    on: (event, listener) => (listeners[event] ??= []).push(listener),
    off: () => {},
    save_changes: () => {},
  };
}

function openPage() {
  const read = (id) => document.getElementById(id).textContent;
  const data = Uint8Array.from(atob(read("data")), (letter) => letter.charCodeAt(0));
  const model = pageModel({ facts: JSON.parse(read("facts")), data, ...JSON.parse(read("state")) });
  return render({ model, el: document.getElementById("explorer") });
}

export default { render };
