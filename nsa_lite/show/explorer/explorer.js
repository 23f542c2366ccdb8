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

// Each row's scores by block id: they were sent best first, each as a step down from the last. Of
// blocks behind the first `ranks` none was sent.
function scoresById({ order, steps, score_scale: scale }, { blocks, ranks, levels, nan }) {
  const scores = new Float32Array((steps.length / ranks) * blocks);
  let level = 0;
  for (let at = 0; at < steps.length; at++) {
    const row = Math.floor(at / ranks);
    level = (level - steps[at]) & 0xffff;
    const score = (level / levels.scores) * scale[row];
    scores[row * blocks + order[at]] = level === nan.scores ? NaN : score;
  }
  return scores;
}

// What a drawing asks for; a view holds one value of everything in CHOICES.
class Trace {
  constructor(facts, arrays) {
    Object.assign(this, { facts, arrays, first: facts.start, positions: arrays.positions });
    this.length = facts.length; // tokens
    this.index = new Map([...this.positions].map((t, q) => [t, q])); // where a query is stored
    this.selectBlockSize = facts.select_block_size;
    this.scores = scoresById(arrays, facts);
    [, this.layers, this.groups, this.heads] = facts.arrays.gates.shape; // heads of a group
    [this.parts, , this.compressed] = facts.arrays.p?.shape.slice(-3) ?? [0, 0, 0];
    this.tokens = facts.tokens.map(visible);
    this.longest = Math.max(1, ...this.tokens.map((token) => token.length));
    this.asked = [...arrays.answer_block].map((block, q) => ({ t: this.positions[q], block }))
      .filter(({ block }) => block >= 0); // the queries that look for an answer, and where it is
  }

  byScore(view) { return this.facts.by_score[view.checkpoint][view.layer]; }
  own(t) { return this.arrays.begun[this.index.get(t)] - 1; } // the block that t is in

  nearest(t) { // the traced query that is nearest to position t
    return this.positions.reduce((a, b) => (Math.abs(b - t) < Math.abs(a - t) ? b : a));
  }

  stepped(t, by) { // so many traced queries further
    return this.positions[clamp(this.index.get(t) + by, 0, this.facts.queries - 1)];
  }

  at(view, t) { // one query, as the layer and group that are looked at treat it
    const { arrays, facts: { queries, blocks, ranks } } = this;
    const q = this.index.get(t);
    const group = (view.checkpoint * this.layers + view.layer) * this.groups + view.group;
    const row = group * queries + q;
    const begun = arrays.begun[q]; // blocks, the last of them the query's own
    const ranked = arrays.order.subarray(row * ranks, row * ranks + Math.min(begun, ranks));
    const count = this.byScore(view) ? view.n : arrays.taken[row];
    return {
      t, row, begun, ranked, byScore: this.byScore(view),
      taken: ranked.subarray(0, count), // the forced ones in front,
      forced: arrays.forced[row], // so many
      scores: this.scores.subarray(row * blocks, row * blocks + begun), // by id (Eq. 9 and 10)
      seen: arrays.seen[q], // compressed blocks
      windowFirst: arrays.window_first[q],
      answer: arrays.answer_block[q], // the block that holds it, or -1
      rowOf: (r, heads) => (group * heads + r) * queries + q, // where an array has heads
    };
  }

  kinds({ begun, taken, forced }) { // one of KINDS, by number, for each block
    const kinds = new Uint8Array(this.facts.blocks).fill(1, 0, begun);
    taken.forEach((j, rank) => { kinds[j] = rank < forced ? 3 : 2; });
    return kinds;
  }

  probabilities(now, part) { // of the compressed blocks (Eq. 8): one head's, or the heads' sum
    const row = now.rowOf(part, this.parts);
    const levels = this.arrays.p.subarray(row * this.compressed, row * this.compressed + now.seen);
    return Array.from(levels, (level) => (level / 255) * this.arrays.p_scale[row]);
  }

  gate(now, branch, r) { // of one head of the group; nothing is drawn for NaN
    const level = this.arrays.gates[now.rowOf(r, this.heads) * 3 + branch];
    return level === this.facts.nan.gates ? 0 : level / this.facts.levels.gates;
  }

  gateWords(now, branch) { // the mean over the group's heads: ".41"
    const hundredths = this.arrays.gate_hundredths[now.row * 3 + branch];
    if (hundredths === this.facts.nan.gates) return "NaN";
    return (hundredths / 100).toFixed(2).replace(/^0/, "");
  }

  describe(view, t) { return sentence(this, this.at(view, t)); }
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
  if (width > 3 && height > 3) outline(ctx, x, y, width, height, LINE, 0.5);
}

function outline(ctx, x, y, width, height, colour, thick) {
  ctx.strokeStyle = colour;
  ctx.lineWidth = thick;
  ctx.strokeRect(x, y, width, height);
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
  const [across, down] = [width, height].map((side) => Math.round(side * scale));
  if (canvas.width !== across) canvas.width = across; // setting it anew would be slow
  if (canvas.height !== down) canvas.height = down;
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
  for (let y = 0; y < height; y++) {
    const t = trace.positions[Math.floor((y * queries) / height)];
    const kinds = trace.kinds(trace.at(view, t));
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
  outline(ctx, left, top, width, height, LINE, 1);
  const x = (j) => left + ((j + 0.5) * width) / blocks;
  const y = (t) => top + ((trace.index.get(t) + 0.5) * height) / queries;
  text(ctx, "queries down, blocks across", left, 10);
  for (const q of [trace.positions[0], trace.positions.at(-1)]) {
    text(ctx, q, left - 4, clamp(y(q), top + 6, top + height - 6), "right");
  }
  for (const [colour, thick] of [["#FFFFFF", 4], ["#000000", 1.5]]) { // a crosshair with a halo
    line(ctx, left - 4, y(t), left + width, y(t), colour, thick);
    line(ctx, x(view.focus), top - 4, x(view.focus), top + height, colour, thick);
  }
  for (const asked of trace.asked) ring(ctx, x(asked.block), y(asked.t), 3);
}

// --- draw the strip: one query's scores, blocks, window and tokens, one above the other ---

// The tokens that the strip shows: all of them, or fewer around the block in focus.
function stretch(trace, view, width) {
  const fewest = Math.min(trace.length, Math.max(4, width / (8 * trace.longest + 6)));
  const count = trace.length * (fewest / trace.length) ** (view.zoom / 100);
  const middle = (view.focus + 0.5) * trace.selectBlockSize;
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

function drawStrip(canvas, trace, view, now) {
  const { ctx, width } = begin(canvas);
  const place = stretch(trace, view, width);
  const kinds = trace.kinds(now);
  const size = trace.selectBlockSize;
  ctx.fillStyle = "#FFF3C4"; // the block in focus, behind everything
  ctx.fillRect(place.x(view.focus * size), 14, place.wide(size), 238);
  drawCompressed(ctx, trace, now, place);
  drawImportance(ctx, trace, now, kinds, place);
  drawBlocks(ctx, trace, kinds, place);
  drawQuery(ctx, trace, now, place);
  drawTokens(ctx, trace, place);
}

// A bar for each compressed block, the heads' shares one above the other.
function drawCompressed(ctx, trace, now, { x, wide, shows }) {
  const [top, height] = ROWS.p;
  const { parts, facts: { bars: { first, step } } } = trace;
  if (!parts) return text(ctx, "compressed scores (Eq. 8): left out, to keep the file small", 2, 8);
  const heads = parts > 1 ? `the ${parts} heads stacked` : "summed over the group's heads";
  text(ctx, `score of each compressed block (Eq. 8), ${heads}`, 2, 8);
  const p = Array.from({ length: parts }, (_, part) => trace.probabilities(now, part));
  const most = Math.max(1e-9, ...p[0].map((_, i) => p.reduce((sum, head) => sum + head[i], 0)));
  for (let i = 0; i < now.seen; i++) {
    const token = first + i * step;
    if (!shows(token, step)) continue;
    let bottom = top + height;
    p.forEach((head, part) => {
      const tall = (head[i] / most) * height;
      bottom -= tall;
      ctx.fillStyle = part % 2 ? "#1F78A8" : "#56B4E9";
      ctx.fillRect(x(token), bottom, Math.max(1, wide(step) - 1), tall);
    });
  }
}

// A bar for each selection block, and the line that a block must pass to be chosen.
function drawImportance(ctx, trace, { scores, byScore }, kinds, { x, wide, shows, width }) {
  const [top, height] = ROWS.importance;
  const size = trace.selectBlockSize;
  const most = Math.max(1e-9, ...scores.filter((score) => !Number.isNaN(score)));
  const largest = most > 1e-9 ? most.toPrecision(3) : 0;
  text(ctx, `importance of each selection block (Eq. 9 and 10), largest ${largest}`, 2, 88);
  scores.forEach((score, j) => {
    if (!shows(j * size, size)) return;
    if (Number.isNaN(score)) return text(ctx, "NaN", x((j + 0.5) * size), top + 56, "center");
    const tall = (score / most) * height;
    const broad = Math.max(1, wide(size) - 2);
    box(ctx, KINDS[kinds[j]], x(j * size) + 1, top + height - tall, broad, tall);
  });
  const chosen = scores.filter((score, j) => kinds[j] === 2 && !Number.isNaN(score));
  if (!chosen.length || !byScore) return;
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
function drawQuery(ctx, trace, { t, windowFirst, answer }, { x, wide }) {
  const [top, height] = ROWS.blocks;
  const size = trace.selectBlockSize;
  const [windowTop, windowHeight] = ROWS.window;
  box(ctx, "window", x(windowFirst), windowTop, wide(t + 1 - windowFirst), windowHeight);
  outline(ctx, x(trace.own(t) * size), top, wide(size), height, "#000000", 2);
  line(ctx, x(t + 0.5), top - 3, x(t + 0.5), ROWS.tokens[0] + 2, "#000000", 2);
  if (answer >= 0) ring(ctx, x((answer + 0.5) * size), top + 12, 5);
}

function drawTokens(ctx, trace, { first, count, readable, x, wide }) {
  const [top, height] = ROWS.tokens;
  if (!readable) return text(ctx, "zoom in to read the tokens", 2, top + 11);
  for (let s = Math.floor(first); s < Math.min(trace.length, first + count); s++) {
    outline(ctx, x(s), top, wide(1), height, "#DDDDDD", 1);
    text(ctx, trace.tokens[s], x(s + 0.5), top + 11, "center");
  }
}

// Below the strip: a bar for each head and branch.
function drawGates(canvas, trace, now) {
  const { ctx, width, height } = begin(canvas);
  const third = width / 3;
  const top = 20;
  const full = height - top - 2; // a gate of 1
  const wide = Math.min(26, (third - 16) / trace.heads);
  ["compressed", "selected", "window"].forEach((branch, b) => {
    const left = b * third + 2;
    text(ctx, `${branch} gate ${trace.gateWords(now, b)}`, left, 8);
    for (let r = 0; r < trace.heads; r++) {
      const tall = trace.gate(now, b, r) * full;
      outline(ctx, left + r * wide, top, wide - 3, full, LINE, 0.5);
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

function sentence(trace, now) { // the words of TracedSequence.describe
  const { t, taken, forced, byScore, seen, windowFirst } = now;
  const how = byScore ? "by score" : "not by score";
  const free = list(taken.subarray(forced));
  const selected = taken.length ? `${list(taken)} (${free} ${how})` : "none";
  const gates = [0, 1, 2].map((branch) => trace.gateWords(now, branch)).join(" ");
  return `query ${t}: compressed blocks ${range(0, seen - 1)}, selected ${selected}, ` +
    `window ${range(windowFirst, t)}, gates ${gates}`;
}

function remarks(trace, view, now) { // a line each
  const { t, taken, byScore, scores, ranked, answer } = now;
  const lines = [margin(now)];
  if (t > trace.first && taken.length) {
    const earlier = trace.stepped(t, -1);
    const before = trace.at(view, earlier).taken;
    const shared = taken.filter((j) => before.includes(j));
    const percent = Math.round((100 * shared.length) / taken.length);
    lines.push(`overlap with query ${earlier}: ${percent} % of the blocks`);
  }
  const traced = trace.facts.traced_n;
  if (view.n !== traced && byScore) {
    const then = trace.at({ ...view, n: traced }, t).taken;
    const out = list(then.subarray(taken.length));
    const into = list(taken.subarray(then.length));
    lines.push(`n = ${view.n} for ${traced}: blocks ${out} drop out, ${into} come in`);
  }
  const found = taken.includes(answer) ? "selected" : "not selected";
  if (answer >= 0) lines.push(`answer in block ${answer}: ${found}`);
  const bad = ranked.filter((j) => Number.isNaN(scores[j]));
  if (bad.length) lines.push(`scores of blocks ${list(bad)} are NaN; the layer counts them as 0`);
  return lines;
}

function margin({ byScore, begun, ranked, taken, forced, scores }) { // of the last taken over the next
  if (!byScore) return "these blocks were not chosen by their score, so n cannot be changed";
  const [last, next] = ranked.subarray(taken.length - 1, taken.length + 1);
  if (next === undefined) {
    return begun > ranked.length ? "scores of the blocks left out were not sent" :
      "no block is left out";
  }
  if (taken.length === forced) return "only forced blocks are selected";
  const score = (j) => scores[j].toPrecision(3);
  return `lowest score selected: ${score(last)} (block ${last}); next: ${score(next)} ` +
    `(block ${next}); margin ${(scores[last] - scores[next]).toPrecision(2)}`;
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
  const found = trace.asked.filter(({ t, block }) => trace.at(view, t).taken.includes(block));
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
  const label = element("label", `${name} `);
  const output = element("output");
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
    this.controls.zoom = slider(parent, "zoom", [0, 100], (zoom) => this.look({ zoom }));
  }

  choose(name, value) { // a choice that Python sees
    if (name === "query") this.view.hovered = null;
    const near = name === "query" ? this.trace.nearest(value) : value;
    this.model.set(name, clamp(near, ...this.trace.facts.ranges[name]));
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
      const last = trace.facts.queries - 1;
      return trace.positions[clamp(Math.floor(down * trace.facts.queries), 0, last)];
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

  mapKeys() { // what each key does
    const { query } = this.view;
    const [low, high] = this.trace.facts.ranges.query;
    const page = Math.ceil(this.trace.facts.queries / 10);
    const to = (t) => () => this.choose("query", t);
    const by = (count) => to(this.trace.stepped(query, count));
    return { ArrowDown: by(1), ArrowRight: by(1), ArrowUp: by(-1), ArrowLeft: by(-1),
      PageDown: by(page), PageUp: by(-page), Home: to(low), End: to(high) };
  }

  stripKeys() {
    const { focus, zoom, query } = this.view;
    const chosen = this.trace.at(this.view, query).taken.slice().sort();
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
    const { queries, ranges: { query: [low, high] } } = this.trace.facts;
    const step = () => {
      if (this.view.query >= high) this.setPlaying(false);
      else this.choose("query", this.trace.stepped(this.view.query, Math.ceil(queries / 256)));
    };
    if (on && this.view.query >= high) this.choose("query", low); // once more from the top
    clearInterval(this.timer);
    this.play.textContent = on ? "Pause" : "Play";
    this.timer = on ? setInterval(step, 120) : null;
  }

  redraw() {
    this.waiting ??= requestAnimationFrame(() => {
      this.waiting = undefined;
      if (this.map.clientWidth) this.draw();
    });
  }

  draw() {
    const { trace, view, controls } = this;
    const now = trace.at(view, view.hovered ?? view.query);
    drawMap(this.map, trace, view, now.t, this.drawnMap);
    drawStrip(this.strip, trace, view, now);
    drawGates(this.gates, trace, now);
    this.sentence.textContent = sentence(trace, now);
    this.remarks.replaceChildren(...remarks(trace, view, now).map((line) => element("li", line)));
    this.reader.textContent = blockWords(trace, view.focus);
    for (const name in controls) controls[name].show(view[name]);
    controls.checkpoint?.show(view.checkpoint, checkpointWords(trace, view));
    controls.n.input.disabled = !trace.byScore(view);
    controls.zoom.show(view.zoom, `${view.zoom} %`);
    aria(this.map, trace.facts.ranges.query, view.query, trace.describe(view, view.query));
    aria(this.strip, [0, trace.facts.blocks - 1], view.focus, this.reader.textContent);
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
  const news = new EventTarget();
  return {
    get: (name) => values[name],
    set(name, value) {
      values[name] = value;
      news.dispatchEvent(new Event(`change:${name}`));
    },
    on: (event, listener) => news.addEventListener(event, listener),
    off: (event, listener) => news.removeEventListener(event, listener),
    save_changes() {},
  };
}

function openPage() {
  const read = (id) => document.getElementById(id).textContent;
  const data = Uint8Array.from(atob(read("data")), (letter) => letter.charCodeAt(0));
  const model = pageModel({ facts: JSON.parse(read("facts")), data, ...JSON.parse(read("state")) });
  return render({ model, el: document.getElementById("explorer") });
}

export default { render };
