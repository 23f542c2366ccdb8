// What one query of an NSA trace selects, drawn. The notebook (anywidget) calls `render`, a page
// of its own calls `openPage`; both hand over the same facts and the same typed arrays, once.
// No library and no network. t is a query, j a selection block, i a compressed block.

const KINDS = ["unseen", "unused", "selected", "forced"];
const CHOICES = ["query", "checkpoint", "layer", "group", "n"]; // what Python can read and set
const INK = "#222222", LINE = "#767676";

// A colour and a hatch for each thing a block can be (Okabe-Ito, as in the notebooks' figures).
const LOOKS = {
  unseen: ["#FFFFFF"],
  unused: ["#F2F2F2"],
  selected: ["#0072B2", "#8CC4E8", (x, y) => (x + y) % 8 === 0],
  forced: ["#E69F00", "#6B4A00", (x, y) => (x + y) % 8 === 0 || (x - y) % 8 === 0],
  window: ["#009E73", "#FFFFFF", (x, y) => x % 4 === 1 && y % 4 === 1],
  compressed: ["#56B4E9"],
};

// --- the trace: numbers out of the arrays ---

async function openTrace(facts, bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const buffer = await new Response(stream).arrayBuffer();
  const types = { uint8: Uint8Array, int32: Int32Array, float32: Float32Array };
  const arrays = {};
  for (const [name, { type, shape, begins }] of Object.entries(facts.arrays)) {
    const count = shape.reduce((a, b) => a * b, 1);
    arrays[name] = type === "uint16" ? joinBytes(new Uint8Array(buffer, begins, 2 * count))
      : new types[type](buffer, begins, count);
  }
  return new Trace(facts, arrays);
}

function joinBytes(bytes) { // all low bytes, then all high ones
  const count = bytes.length / 2, joined = new Uint16Array(count);
  for (let k = 0; k < count; k++) joined[k] = bytes[k] | (bytes[count + k] << 8);
  return joined;
}

class Trace {
  constructor(facts, arrays) {
    Object.assign(this, { facts, arrays, ...facts.sizes });
    this.first = facts.start;
    this.length = facts.start + facts.queries; // tokens
    this.layers = facts.by_score[0].length;
    this.group_size = this.heads / this.kv_heads; // R
    this.tokens = facts.tokens.map(visible);
    this.longest = Math.max(1, ...this.tokens.map((token) => token.length));
    this.chosenBytes = facts.arrays.chosen.shape.at(-1);
    [this.parts, , this.compressed] = facts.arrays.p?.shape.slice(-3) ?? [0, 0, 0]; // R or 1, T, N
    this.asked = [...arrays.answer_at.keys()].filter((q) => arrays.answer_at[q] >= 0)
      .map((q) => q + this.first); // the queries that look for an answer
  }

  layer(view) {
    return view.checkpoint * this.layers + view.layer;
  }

  row(view, t) {
    const group = this.layer(view) * this.kv_heads + view.group;
    return group * this.facts.queries + t - this.first;
  }

  byScore(view) {
    return this.facts.by_score[view.checkpoint][view.layer];
  }

  begun(t) { // selection blocks that start at or before t
    return Math.floor(t / this.select_block_size) + 1;
  }

  visible(t) { // compressed blocks that end at or before t
    return Math.max(0, Math.floor((t + 1 - this.block_size) / this.stride) + 1);
  }

  windowStart(t) {
    return Math.max(0, t - this.window + 1);
  }

  level(view, t, j) {
    return this.arrays.scores[this.row(view, t) * this.facts.blocks + j];
  }

  score(view, t, j) { // the importance of block j (Eq. 9 and 10)
    const level = this.level(view, t, j);
    if (level === this.facts.nan) return NaN;
    return (level / this.facts.score_levels) * this.arrays.score_scale[this.row(view, t)];
  }

  probability(view, t, part, i) { // of compressed block i (Eq. 8): one head's, or the heads' sum
    const group = this.layer(view) * this.kv_heads + view.group;
    const row = (group * this.parts + part) * this.facts.queries + t - this.first;
    return (this.arrays.p[row * this.compressed + i] / 255) * this.arrays.p_scale[row];
  }

  forced(t, j) {
    const own = this.begun(t) - 1;
    return j <= own && (j < this.num_initial || j > own - this.num_local);
  }

  ranking(view, t) { // the blocks that may be chosen, best first, ties to the lower id
    const free = [];
    for (let j = 0; j < this.begun(t); j++) if (!this.forced(t, j)) free.push(j);
    const rank = (j) => {
      const level = this.level(view, t, j);
      return level === this.facts.nan ? 0 : level; // the layer counts NaN as 0, too
    };
    return free.sort((a, b) => rank(b) - rank(a) || a - b);
  }

  selected(view, t, n = view.n) { // ascending ids
    const ids = [];
    if (n === this.num_selected || !this.byScore(view)) {
      const bits = this.arrays.chosen, at = this.row(view, t) * this.chosenBytes;
      for (let j = 0; j < this.facts.blocks; j++) if (bits[at + (j >> 3)] >> (j & 7) & 1) ids.push(j);
      return ids;
    }
    for (let j = 0; j < this.begun(t); j++) if (this.forced(t, j)) ids.push(j);
    return ids.concat(this.ranking(view, t).slice(0, n - ids.length)).sort((a, b) => a - b);
  }

  kinds(view, t) { // one of KINDS, by number, for each block
    const kinds = new Uint8Array(this.facts.blocks).fill(1, 0, this.begun(t));
    for (const j of this.selected(view, t)) kinds[j] = this.forced(t, j) ? 3 : 2;
    return kinds;
  }

  gateLevels(view, t, branch) { // one for each head of the group
    const head = this.layer(view) * this.heads + view.group * this.group_size;
    return Array.from({ length: this.group_size }, (_, r) =>
      this.arrays.gates[((head + r) * this.facts.queries + t - this.first) * 3 + branch]);
  }

  gate(view, t, branch) { // the mean over the group's heads, rounded as Python does: ".41"
    const levels = this.gateLevels(view, t, branch), full = 65534 * levels.length;
    if (levels.includes(this.facts.nan)) return "NaN";
    const sum = levels.reduce((a, b) => a + b, 0);
    return (Math.floor((200 * sum + full) / (2 * full)) / 100).toFixed(2).replace(/^0/, "");
  }

  describe(view, t) {
    const ids = this.selected(view, t), free = ids.filter((j) => !this.forced(t, j));
    const how = this.byScore(view) ? "by score" : "not by score";
    const selected = ids.length ? `${list(ids)} (${list(free)} ${how})` : "none";
    const gates = [0, 1, 2].map((branch) => this.gate(view, t, branch)).join(" ");
    return `query ${t}: compressed blocks ${range(0, this.visible(t) - 1)}, selected ${selected}, ` +
      `window ${range(this.windowStart(t), t)}, gates ${gates}`;
  }

  answerBlock(t) { // -1 where nothing is asked
    return Math.floor(this.arrays.answer_at[t - this.first] / this.select_block_size);
  }

  answersFound(view) {
    return this.asked.filter((t) => this.selected(view, t).includes(this.answerBlock(t))).length;
  }
}

const range = (first, last) => (last < first ? "none" : last === first ? `${first}` : `${first}-${last}`);
const clamp = (value, low, high) => Math.min(high, Math.max(low, value));
const list = (ids) => ids.join(" ") || "none";

// What the numbers of one query say, a line each.
function remarks(trace, view, t) {
  const lines = [], now = trace.selected(view, t), ranking = trace.ranking(view, t);
  const last = ranking.findLast((j) => now.includes(j)), next = ranking.find((j) => !now.includes(j));
  const score = (j) => trace.score(view, t, j).toPrecision(3);
  if (trace.byScore(view) && last !== undefined && next !== undefined) {
    const margin = (trace.score(view, t, last) - trace.score(view, t, next)).toPrecision(2);
    lines.push(`lowest score selected: ${score(last)} (block ${last}); ` +
      `next: ${score(next)} (block ${next}); margin ${margin}`);
  } else if (trace.byScore(view)) {
    lines.push(next === undefined ? "no block is left out" : "only forced blocks are selected");
  } else {
    lines.push("these blocks were not chosen by their score, so n cannot be changed");
  }
  if (t > trace.first && now.length) {
    const before = trace.selected(view, t - 1), shared = now.filter((j) => before.includes(j));
    const percent = Math.round((100 * shared.length) / now.length);
    lines.push(`overlap with query ${t - 1}: ${percent} % of the blocks`);
  }
  if (view.n !== trace.num_selected && trace.byScore(view)) {
    const own = trace.selected(view, t, trace.num_selected);
    const out = list(own.filter((j) => !now.includes(j))), into = list(now.filter((j) => !own.includes(j)));
    lines.push(`n = ${view.n} for ${trace.num_selected}: blocks ${out} drop out, ${into} come in`);
  }
  const answer = trace.answerBlock(t);
  const found = now.includes(answer) ? "selected" : "not selected";
  if (answer >= 0) lines.push(`answer in block ${answer}: ${found}`);
  const begun = [...Array(trace.begun(t)).keys()];
  const bad = begun.filter((j) => Number.isNaN(trace.score(view, t, j)));
  if (bad.length) lines.push(`scores of blocks ${list(bad)} are NaN; the layer counts them as 0`);
  return lines;
}

// --- drawing ---

// An 8 x 8 tile of a kind, as 32-bit pixels: the map copies them, boxes use them as a pattern.
const TILES = Object.fromEntries(Object.entries(LOOKS).map(([kind, [ground, mark, marked]]) => {
  const pixel = (colour) => new Uint32Array(new Uint8Array(
    [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16)).concat(255)).buffer)[0];
  const at = (k) => (marked?.(k & 7, k >> 3) ? pixel(mark) : pixel(ground));
  return [kind, Uint32Array.from({ length: 64 }, (_, k) => at(k))];
}));
const patterns = {};

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

// Size a canvas to its place on the page, in the screen's own pixels; clear it.
function begin(canvas) {
  const scale = window.devicePixelRatio || 1;
  const width = Math.max(1, canvas.clientWidth), height = Math.max(1, canvas.clientHeight);
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
  }
  const ctx = canvas.getContext("2d");
  ctx.setTransform(scale, 0, 0, scale, 0, 0);
  ctx.fillStyle = "#FFFFFF";
  ctx.fillRect(0, 0, width, height);
  ctx.font = "12px system-ui, sans-serif";
  ctx.textBaseline = "middle";
  return { ctx, width, height, scale };
}

const MAP = { left: 40, top: 22, right: 6, bottom: 6 }; // margins, in pixels

function mapPlace(canvas) {
  return { width: Math.max(1, canvas.clientWidth - MAP.left - MAP.right),
    height: Math.max(1, canvas.clientHeight - MAP.top - MAP.bottom) };
}

// Every query's kinds, a row of pixels at a time: drawn anew only when `key` changes.
function bakeMap(trace, view, width, height) {
  const image = new ImageData(width, height), pixels = new Uint32Array(image.data.buffer);
  const { queries, blocks } = trace.facts;
  for (let y = 0, row = -1, kinds; y < height; y++) {
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
  const { ctx, scale } = begin(canvas), { queries, blocks } = trace.facts;
  const place = mapPlace(canvas), { left, top } = MAP;
  const size = [Math.round(place.width * scale), Math.round(place.height * scale)];
  const key = [view.checkpoint, view.layer, view.group, view.n, ...size].join();
  if (cache.key !== key) Object.assign(cache, { key, image: bakeMap(trace, view, ...size) });
  ctx.drawImage(cache.image, left, top, place.width, place.height);
  ctx.strokeStyle = LINE;
  ctx.lineWidth = 1;
  ctx.strokeRect(left, top, place.width, place.height);
  const x = (j) => left + ((j + 0.5) * place.width) / blocks;
  const y = (q) => top + ((q - trace.first + 0.5) * place.height) / queries;
  text(ctx, "queries down, blocks across", left, 10);
  for (const q of [trace.first, trace.length - 1]) {
    text(ctx, q, left - 4, clamp(y(q), top + 6, top + place.height - 6), "right");
  }
  for (const [colour, thick] of [["#FFFFFF", 4], ["#000000", 1.5]]) { // a crosshair with a halo
    ctx.strokeStyle = colour;
    ctx.lineWidth = thick;
    line(ctx, left - 4, y(t), left + place.width, y(t));
    line(ctx, x(view.focus), top - 4, x(view.focus), top + place.height);
  }
  for (const q of trace.asked) ring(ctx, x(trace.answerBlock(q)), y(q), 3);
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

// The tokens that the strip shows: all of them, or fewer around the block in focus.
function stretch(trace, view, width) {
  const fewest = Math.min(trace.length, Math.max(4, width / (8 * trace.longest + 6)));
  const count = trace.length * (fewest / trace.length) ** (view.zoom / 100);
  const middle = (view.focus + 0.5) * trace.select_block_size;
  const first = clamp(middle - count / 2, 0, trace.length - count);
  return {
    first, count, width,
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
  const { ctx, width } = begin(canvas), size = trace.select_block_size;
  const place = stretch(trace, view, width), { x, wide } = place;
  const kinds = trace.kinds(view, t), own = trace.begun(t) - 1, answer = trace.answerBlock(t);
  ctx.fillStyle = "#FFF3C4"; // the block in focus, behind everything
  ctx.fillRect(x(view.focus * size), 14, wide(size), 238);
  drawCompressed(ctx, trace, view, t, place);
  drawImportance(ctx, trace, view, t, kinds, place);
  drawBlocks(ctx, trace, kinds, place);
  const begins = trace.windowStart(t);
  box(ctx, "window", x(begins), ROWS.window[0], wide(t + 1 - begins), ROWS.window[1]);
  ctx.strokeStyle = "#000000";
  ctx.lineWidth = 2;
  ctx.strokeRect(x(own * size), ROWS.blocks[0], wide(size), ROWS.blocks[1]); // the query's own block
  line(ctx, x(t + 0.5), ROWS.blocks[0] - 3, x(t + 0.5), ROWS.tokens[0] + 2); // the query
  if (answer >= 0) ring(ctx, x((answer + 0.5) * size), ROWS.blocks[0] + 12, 5);
  drawTokens(ctx, trace, place);
}

function line(ctx, x0, y0, x1, y1) {
  ctx.beginPath();
  ctx.moveTo(x0, y0);
  ctx.lineTo(x1, y1);
  ctx.stroke();
}

function drawBlocks(ctx, trace, kinds, { x, wide, shows }) {
  const size = trace.select_block_size, every = Math.ceil(20 / wide(size)); // ids need 20 pixels
  for (let j = 0; j < trace.facts.blocks; j++) {
    const tokens = Math.min(size, trace.length - j * size); // the last block may be cut short
    if (!shows(j * size, tokens)) continue;
    box(ctx, KINDS[kinds[j]], x(j * size), ROWS.blocks[0], wide(tokens), ROWS.blocks[1]);
    if (j % every === 0) text(ctx, j, x((j + 0.5) * size), ROWS.ids[0] + 6, "center");
  }
}

function drawTokens(ctx, trace, { first, count, readable, x, wide }) {
  const [top, height] = ROWS.tokens;
  if (!readable) return text(ctx, "zoom in to read the tokens", 2, top + 11);
  ctx.strokeStyle = "#DDDDDD";
  ctx.lineWidth = 1;
  for (let s = Math.floor(first); s < Math.min(trace.length, first + count); s++) {
    ctx.strokeRect(x(s), top, wide(1), height);
    text(ctx, trace.tokens[s], x(s + 0.5), top + 11, "center");
  }
}

// A bar for each compressed block, the heads' shares one above the other.
function drawCompressed(ctx, trace, view, t, { x, wide, shows }) {
  const [top, height] = ROWS.p, { stride, parts } = trace;
  if (!parts) return text(ctx, "compressed scores (Eq. 8): left out, to keep the file small", 2, 8);
  const heads = parts > 1 ? `the ${parts} heads stacked` : "summed over the group's heads";
  text(ctx, `score of each compressed block (Eq. 8), ${heads}`, 2, 8);
  const bars = Array.from({ length: trace.visible(t) }, (_, i) =>
    Array.from({ length: parts }, (_, part) => trace.probability(view, t, part, i)));
  const most = Math.max(1e-9, ...bars.map((bar) => bar.reduce((a, b) => a + b)));
  bars.forEach((bar, i) => {
    const token = i * stride + (trace.block_size - stride) / 2; // the middle of the block
    if (!shows(token, stride)) return;
    let bottom = top + height;
    bar.forEach((p, part) => {
      const tall = (p / most) * height;
      bottom -= tall;
      ctx.fillStyle = part % 2 ? "#1F78A8" : "#56B4E9";
      ctx.fillRect(x(token), bottom, Math.max(1, wide(stride) - 1), tall);
    });
  });
}

// A bar for each selection block, and the line that a block must pass to be chosen.
function drawImportance(ctx, trace, view, t, kinds, { x, wide, shows, width }) {
  const [top, height] = ROWS.importance, size = trace.select_block_size;
  const scores = Array.from({ length: trace.begun(t) }, (_, j) => trace.score(view, t, j));
  const most = Math.max(1e-9, ...scores.filter((score) => !Number.isNaN(score)));
  const largest = most > 1e-9 ? most.toPrecision(3) : 0;
  text(ctx, `importance of each selection block (Eq. 9 and 10), largest ${largest}`, 2, 88);
  scores.forEach((score, j) => {
    if (!shows(j * size, size)) return;
    if (Number.isNaN(score)) return text(ctx, "NaN", x((j + 0.5) * size), top + height - 8, "center");
    const tall = (score / most) * height;
    box(ctx, KINDS[kinds[j]], x(j * size) + 1, top + height - tall, Math.max(1, wide(size) - 2), tall);
  });
  const chosen = scores.filter((score, j) => kinds[j] === 2 && !Number.isNaN(score));
  if (!chosen.length || !trace.byScore(view)) return;
  const y = top + height * (1 - Math.min(...chosen) / most);
  ctx.setLineDash([5, 4]);
  ctx.strokeStyle = "#000000";
  ctx.lineWidth = 1;
  line(ctx, 0, y, width, y);
  ctx.setLineDash([]);
}

function drawGates(canvas, trace, view, t) {
  const { ctx, width, height } = begin(canvas), third = width / 3, top = 20;
  ["compressed", "selected", "window"].forEach((branch, b) => {
    text(ctx, `${branch} gate ${trace.gate(view, t, b)}`, b * third + 2, 8);
    const levels = trace.gateLevels(view, t, b), wide = Math.min(26, (third - 16) / levels.length);
    levels.forEach((level, r) => {
      const tall = level === trace.facts.nan ? 0 : (level / 65534) * (height - top - 2);
      ctx.strokeStyle = LINE;
      ctx.strokeRect(b * third + 2 + r * wide, top, wide - 3, height - top - 2); // a full gate, 1
      box(ctx, branch, b * third + 2 + r * wide, height - 2 - tall, wide - 3, tall);
    });
  });
}

// A token as one can see it: spaces, line ends and other signs that print nothing get a picture.
function visible(token) {
  return token.replace(/\n/g, "\u23CE").replace(/\t/g, "\u21E5").replace(/ /g, "\u00B7")
    .replace(/[\u0000-\u001F\u007F]/g, "\u25A1");
}

// --- the page around the drawings ---

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
      <canvas class="nsa-gates" role="img" aria-label="Gates of each head; the sentence gives their means"></canvas>
      <ul class="nsa-remarks"></ul>
    </div>
  </div>
  <p class="nsa-reader"></p>
  <div class="nsa-legend"></div>
  <p class="nsa-keys">Keys on the map: arrows, Page Up and Page Down, Home, End. On the strip: arrows
    move the block in focus, comma and full stop go to the next selected one, plus and minus zoom.</p>`;

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
  const names = { forced: "forced", selected: "selected", unused: "not selected",
    unseen: "not begun", window: "window", compressed: "compressed" };
  for (const [kind, name] of Object.entries(names)) {
    const item = element("span");
    const swatch = element("canvas", "", { width: 22, height: 16, "aria-hidden": "true" });
    box(swatch.getContext("2d"), kind, 0.5, 0.5, 21, 15);
    item.append(swatch, ` ${name}`);
    parent.append(item);
  }
  parent.append(element("span", "thick border: own block"), element("span", "ring: the answer's block"),
    element("span", "yellow: block in focus"), element("span", "dashes: the last score that was chosen"));
}

class Explorer {
  constructor(root, trace, model) {
    Object.assign(this, { root, trace, model, cache: {}, hovered: null, timer: null });
    this.view = { zoom: 0, focus: 0 };
    root.className = "nsa-explorer";
    root.innerHTML = LAYOUT;
    const find = (name) => root.querySelector(`.nsa-${name}`);
    Object.assign(this, { map: find("map"), strip: find("strip"), gates: find("gates") });
    this.parts = { sentence: find("sentence"), spoken: find("spoken"), remarks: find("remarks"),
      reader: find("reader") };
    legend(find("legend"));
    this.makeControls(find("controls"));
    for (const part of root.querySelectorAll("canvas, input, button")) {
      part.setAttribute("data-lm-suppress-shortcuts", "true"); // JupyterLab leaves its keys to it
    }
    this.listen();
    for (const name of CHOICES) this.view[name] = model.get(name);
    this.view.focus = trace.begun(this.view.query) - 1;
    this.changed();
  }

  makeControls(parent) {
    const { ranges, checkpoints } = this.trace.facts;
    this.play = element("button", "Play", { type: "button" });
    this.play.addEventListener("click", () => this.setPlaying(!this.timer));
    parent.append(this.play);
    this.controls = {};
    for (const name of CHOICES) {
      if (name === "checkpoint" && checkpoints.length === 1) continue;
      this.controls[name] = slider(parent, name, ranges[name], (value) => this.choose(name, value));
    }
    this.zoom = slider(parent, "zoom", [0, 100], (value) => this.look({ zoom: value }));
  }

  listen() {
    const { queries, blocks, ranges } = this.trace.facts;
    const query = (event) => {
      const y = (event.offsetY - MAP.top) / mapPlace(this.map).height;
      return clamp(this.trace.first + Math.floor(y * queries), ...ranges.query);
    };
    const block = (x) => clamp(Math.floor(x), 0, blocks - 1);
    const across = (event) =>
      block(((event.offsetX - MAP.left) / mapPlace(this.map).width) * blocks);
    this.map.addEventListener("mousemove", (event) => this.look({ hovered: query(event) }));
    this.map.addEventListener("mouseleave", () => this.look({ hovered: null }));
    this.map.addEventListener("click", (event) => {
      this.look({ focus: across(event) });
      this.choose("query", query(event));
    });
    this.map.addEventListener("keydown", (event) => this.key(event, this.mapKeys()));
    this.strip.addEventListener("click", (event) => {
      const { first, count } = stretch(this.trace, this.view, this.strip.clientWidth);
      const token = first + (event.offsetX / this.strip.clientWidth) * count;
      this.look({ focus: block(token / this.trace.select_block_size) });
    });
    this.strip.addEventListener("keydown", (event) => this.key(event, this.stripKeys()));
    this.resized = new ResizeObserver(() => this.redraw());
    this.resized.observe(this.root);
    this.follow = () => {
      const follows = this.view.focus === this.trace.begun(this.view.query) - 1; // on the own block
      for (const name of CHOICES) this.view[name] = this.model.get(name);
      if (follows) this.view.focus = this.trace.begun(this.view.query) - 1;
      this.changed();
    };
    for (const name of CHOICES) this.model.on(`change:${name}`, this.follow);
  }

  mapKeys() { // what each key makes of the query
    const { query } = this.view, [low, high] = this.trace.facts.ranges.query;
    const page = Math.ceil((high - low) / 10);
    const go = { ArrowDown: query + 1, ArrowRight: query + 1, ArrowUp: query - 1,
      ArrowLeft: query - 1, PageDown: query + page, PageUp: query - page, Home: low, End: high };
    return (key) => {
      if (key in go) this.choose("query", clamp(go[key], low, high));
      return key in go;
    };
  }

  stripKeys() { // what each key does to the focus and the zoom
    const { focus, zoom, query } = this.view, last = this.trace.facts.blocks - 1;
    const chosen = this.trace.selected(this.view, query);
    const go = { ArrowRight: focus + 1, ArrowLeft: focus - 1, Home: 0, End: last,
      ".": chosen.find((j) => j > focus) ?? focus, ",": chosen.findLast((j) => j < focus) ?? focus };
    const sizes = { "+": zoom + 10, "=": zoom + 10, "-": zoom - 10 };
    return (key) => {
      if (key in go) this.look({ focus: clamp(go[key], 0, last) });
      else if (key in sizes) this.look({ zoom: clamp(sizes[key], 0, 100) });
      else return false;
      return true;
    };
  }

  key(event, act) {
    if (event.ctrlKey || event.altKey || event.metaKey || !act(event.key)) return;
    event.preventDefault();
    event.stopPropagation();
  }

  choose(name, value) { // a choice that Python sees
    if (name === "query") this.hovered = null;
    this.model.set(name, value);
    this.model.save_changes();
  }

  look({ hovered = this.hovered, ...rest }) { // a choice that only this page knows
    this.hovered = hovered;
    Object.assign(this.view, rest);
    this.redraw();
  }

  setPlaying(on) {
    const [low, high] = this.trace.facts.ranges.query;
    if (on && this.view.query >= high) this.choose("query", low); // once more from the top
    clearInterval(this.timer);
    this.play.textContent = on ? "Pause" : "Play";
    this.timer = on ? setInterval(() => this.step(), 120) : null;
  }

  step() {
    const { queries, ranges: { query: [low, high] } } = this.trace.facts, step = Math.ceil(queries / 256);
    if (this.view.query >= high) this.setPlaying(false);
    else this.choose("query", clamp(this.view.query + step, low, high));
  }

  changed() { // speak, once the choice rests
    clearTimeout(this.speaking);
    this.speaking = setTimeout(() => {
      this.parts.spoken.textContent = this.trace.describe(this.view, this.view.query);
    }, 250);
    this.redraw();
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.map.clientWidth) this.draw();
    });
  }

  draw() {
    const { trace, view } = this, t = this.hovered ?? view.query;
    drawMap(this.map, trace, view, t, this.cache);
    drawStrip(this.strip, trace, view, t);
    drawGates(this.gates, trace, view, t);
    this.write(t);
  }

  write(t) { // everything that is text
    const { trace, view, parts, controls } = this;
    parts.sentence.textContent = trace.describe(view, t);
    parts.remarks.replaceChildren(...remarks(trace, view, t).map((line) => element("li", line)));
    const size = trace.select_block_size, from = view.focus * size;
    const to = Math.min(trace.length, from + size);
    const tokens = trace.tokens.slice(from, to);
    parts.reader.textContent = `block ${view.focus}, tokens ${range(from, to - 1)}: ` +
      tokens.join(trace.longest > 1 ? " " : "");
    for (const name in controls) controls[name].show(view[name]);
    if (controls.checkpoint) controls.checkpoint.show(view.checkpoint, this.checkpointWords());
    controls.n.input.disabled = !trace.byScore(view);
    this.zoom.show(view.zoom, `${view.zoom} %`);
    const [low, high] = trace.facts.ranges.query;
    aria(this.map, low, high, view.query, trace.describe(view, view.query));
    aria(this.strip, 0, trace.facts.blocks - 1, view.focus, parts.reader.textContent);
  }

  checkpointWords() {
    const { trace, view } = this, words = trace.facts.checkpoints[view.checkpoint];
    if (!trace.asked.length) return words;
    return `${words}: ${trace.answersFound(view)} of ${trace.asked.length} answers' blocks selected`;
  }

  close() {
    this.setPlaying(false);
    this.resized.disconnect();
    for (const name of CHOICES) this.model.off(`change:${name}`, this.follow);
  }
}

function aria(canvas, low, high, now, words) {
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
