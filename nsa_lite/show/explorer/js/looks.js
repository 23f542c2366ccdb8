// What one query of an NSA trace selects, drawn. The notebook (anywidget) calls `render`, a page
// of its own calls `openPage`; both hand over the same facts and the same typed arrays, once.
// Python has worked out everything that follows from the paper's rules: here it is only drawn.
// No library and no network. These files are one module, joined by script.py in this order.
// t is a position, q its place among the traced queries, j a selection block, i a compressed one.

// --- looks: a colour and a hatch for each thing a block or a token can be ---

const CHOICES = ["query", "checkpoint", "layer", "group", "n"]; // what Python can read and set
const KINDS = ["unseen", "unused", "selected", "forced"]; // of blocks
const READ = {
  // of tokens: how the query reads them
  forced: "forced",
  selected: "selected",
  window: "in the window",
  compressed: "compressed only",
  unread: "not read",
  unseen: "not yet seen",
};

const crossed = (x, y) => (x + y) % 8 === 0 || (x - y) % 8 === 0;
const slanted = (x, y) => (x + y) % 8 === 0;
const dotted = (x, y) => x % 4 === 1 && y % 4 === 1;
const upright = (x) => x % 4 === 0;

// Okabe-Ito, as in the notebooks' figures: ground, mark, and where the mark stands on a tile.
const LIGHT = {
  ink: "#222222",
  paper: "#FFFFFF",
  line: "#767676",
  faint: "#DDDDDD",
  focus: "#FFF3C4",
  missed: "#A0307A",
  heads: ["#56B4E9", "#1F78A8"],
  found: "#FFE08A",
  unseen: ["#FFFFFF"],
  unused: ["#F2F2F2"],
  selected: ["#0072B2", "#8CC4E8", slanted],
  forced: ["#E69F00", "#6B4A00", crossed],
  window: ["#009E73", "#FFFFFF", dotted],
  compressed: ["#56B4E9", "#C9E6F8", upright],
};
const DARK = {
  ...LIGHT,
  ink: "#ECECEC",
  paper: "#1B1B1D",
  line: "#9A9A9A",
  faint: "#4A4A4E",
  focus: "#4D4420",
  missed: "#F09CD0",
  heads: ["#56B4E9", "#A5D8F5"],
  found: "#6B5A10",
  unseen: ["#1B1B1D"],
  unused: ["#3A3A3E"],
  selected: ["#3395D4", "#0B3654", slanted],
  forced: ["#E69F00", "#4A3200", crossed],
};

// Notebooks say whether their theme is light; a page of its own asks the system.
function skinNow() {
  const lab = document.body.dataset.jpThemeLight;
  const dark = lab ? lab === "false" : matchMedia("(prefers-color-scheme: dark)").matches;
  return dark ? DARK : LIGHT;
}

// An 8 x 8 tile of a kind as 32-bit pixels: the map mixes them, boxes use them as a pattern.
const tileCache = new Map();
function tileOf(skin, kind) {
  const key = `${skin === DARK} ${kind}`;
  if (!tileCache.has(key)) {
    const [ground, mark, marked] = skin[kind];
    const at = (k) => pixel(marked?.(k & 7, k >> 3) ? mark : ground);
    tileCache.set(
      key,
      Uint32Array.from({ length: 64 }, (_, k) => at(k)),
    );
  }
  return tileCache.get(key);
}

const channels = (colour) => [1, 3, 5].map((at) => parseInt(colour.slice(at, at + 2), 16));

function pixel(colour) {
  return new Uint32Array(new Uint8Array([...channels(colour), 255]).buffer)[0];
}

// --- tokens as one can see them ---

const PICTURES = { "\n": "\u23CE", "\t": "\u21E5", " ": "\u00B7", "\r": "\u240D" };
// Signs that have no width or turn the direction of writing: shown by their number.
const HIDDEN =
  /[\u00AD\u061C\u115F\u180E\u200B-\u200F\u202A-\u202E\u2060-\u206F\uFEFF\uFFF9-\uFFFB]/g;

function visible(token) {
  return token
    .replace(/[\n\t \r]/g, (sign) => PICTURES[sign])
    .replace(/[\u0000-\u001F\u007F-\u009F]/g, "\u25A1")
    .replace(HIDDEN, (sign) => `\u2039${sign.charCodeAt(0).toString(16).toUpperCase()}\u203A`)
    .replace(/^\p{M}/u, "\u25CC$&"); // an accent alone stands on a dotted circle
}

const WIDE =
  /[\u1100-\u115F\u2E80-\uA4CF\uAC00-\uD7A3\uF900-\uFAFF\uFE30-\uFE6F\uFF00-\uFF60]|[\u{1F300}-\u{1FAFF}]/u;

function cellsOf(words) {
  // columns of a font in which all letters are equally wide
  let cells = 0;
  for (const sign of words) cells += WIDE.test(sign) ? 2 : 1;
  return cells;
}

const clipped = (words, most) =>
  words.length > most ? `${[...words].slice(0, most - 1).join("")}\u2026` : words;
