// --- the strip: one query's scores, blocks, window and tokens, one above the other ---

const WIDEST = 12; // letters of a token that are drawn; the text and the reader show all

// The tokens that the strip shows: all of them, or fewer around the block in focus.
function stretch(trace, { focus, zoom }, width) {
  const letters = Math.min(trace.longest, WIDEST);
  const fewest = Math.min(trace.length, Math.max(4, width / (8 * letters + 6)));
  const count = trace.length * (fewest / trace.length) ** (zoom / 100);
  const middle = (focus + 0.5) * trace.size;
  const first = clamp(middle - count / 2, 0, trace.length - count);
  return {
    first,
    count,
    width,
    letters,
    readable: width / count >= 7.5 * letters,
    x: (token) => ((token - first) / count) * width,
    wide: (tokens) => (tokens / count) * width,
    shows: (token, tokens) => token + tokens > first && token < first + count,
  };
}

// Where the rows of the strip begin, and their heights, in pixels.
const ROWS = {
  p: [18, 50],
  importance: [88, 60],
  blocks: [154, 24],
  window: [181, 12],
  tokens: [196, 20],
  ids: [218, 14],
  height: 234,
};

// other: what a second pane shows for the same query, or null.
function drawStrip(sheet, trace, now, other, view) {
  const place = stretch(trace, view, sheet.width);
  const { size } = trace;
  sheet.rect(place.x(view.focus * size), 14, place.wide(size), ROWS.height - 14, sheet.skin.focus);
  drawCompressed(sheet, trace, now, place);
  drawImportance(sheet, trace, now, place);
  drawBlocks(sheet, trace, now, other, place);
  drawQuery(sheet, trace, now, place);
  drawTokens(sheet, trace, place);
}

// A bar for each compressed block, the heads' shares one above the other.
function drawCompressed(sheet, trace, now, { x, wide, shows, width }) {
  const [top, height] = ROWS.p;
  const {
    parts,
    facts: {
      bars: { first, step },
    },
  } = trace;
  if (!parts) {
    const words = "compressed scores (Eq. 8): left out, to keep the file small";
    return sheet.text(fitting([words, "Eq. 8: left out, the file is small"], width - 4), 2, 8);
  }
  const heads = parts > 1 ? `the ${parts} heads stacked` : "summed over the group's heads";
  const words = [
    `score of each compressed block (Eq. 8), ${heads}`,
    "score of each compressed block (Eq. 8)",
    "compressed scores (Eq. 8)",
  ];
  sheet.text(fitting(words, width - 4), 2, 8);
  const p = Array.from({ length: parts }, (_, part) => trace.probabilities(now, part));
  const whole = p[0].map((_, i) => p.reduce((sum, head) => sum + head[i], 0));
  const most = whole.reduce((a, b) => Math.max(a, b), 1e-9);
  for (let i = 0; i < now.seen; i++) {
    const token = first + i * step;
    if (!shows(token, step)) continue;
    let bottom = top + height;
    p.forEach((head, part) => {
      const tall = (head[i] / most) * height;
      bottom -= tall;
      sheet.rect(x(token), bottom, Math.max(1, wide(step) - 1), tall, sheet.skin.heads[part % 2]);
    });
  }
}

// A bar for each selection block, and the line that a block must pass to be chosen.
function drawImportance(sheet, trace, now, { x, wide, shows, width }) {
  const [top, height] = ROWS.importance;
  const { scores, kinds, byScore, missed } = now;
  const { size } = trace;
  const most = scores.reduce((a, b) => (b > a ? b : a), 1e-9); // NaN is not larger
  const words = `importance of each selection block (Eq. 9 and 10)`;
  const largest = `, largest ${most > 1e-9 ? most.toPrecision(3) : 0}`;
  const lost = missed ? "; thin: missed" : "";
  sheet.text(
    fitting([words + largest + lost, words + largest, `importance${largest}`], width - 4),
    2,
    78,
  );
  scores.forEach((score, j) => {
    if (score === NOT_SENT || !shows(j * size, size)) return;
    if (Number.isNaN(score)) return sheet.text("NaN", x((j + 0.5) * size), top + 50, "center");
    const tall = (score / most) * height;
    const broad = Math.max(1, wide(size) - 2);
    sheet.box(KINDS[kinds[j]], x(j * size) + 1, top + height - tall, broad, tall);
  });
  drawMissed(sheet, trace, now, { x, wide, shows });
  const chosen = scores.filter((score, j) => kinds[j] === 2 && score >= 0);
  if (!chosen.length || !byScore) return;
  const y = top + height * (1 - chosen.reduce((a, b) => Math.min(a, b)) / most);
  sheet.line(0, y, width, y, sheet.skin.ink, 1, [5, 4]);
}

// Thin bars beside the others: where dense attention looks and this query read nothing; as shares
// of all its mass, so that half the height is one half.
function drawMissed(sheet, trace, { missed }, { x, wide, shows }) {
  const [top, height] = ROWS.importance;
  missed?.forEach((mass, j) => {
    if (mass < 0.002 || !shows(j * trace.size, trace.size)) return;
    const thick = clamp(wide(trace.size) / 5, 1, 5);
    const right = x((j + 1) * trace.size) - 1;
    sheet.rect(right - thick, top + height * (1 - mass), thick, height * mass, sheet.skin.missed);
  });
}

// Chosen blocks come last and are a pixel wide at least: among thousands they are still seen.
function drawBlocks(sheet, trace, { kinds, taken }, other, { x, wide, shows }) {
  const [top, height] = ROWS.blocks;
  const { size, length } = trace;
  const tokens = (j) => Math.min(size, length - j * size); // the last block may be cut short
  const draw = (j, least) => {
    if (!shows(j * size, tokens(j))) return;
    sheet.box(KINDS[kinds[j]], x(j * size), top, Math.max(least, wide(tokens(j))), height);
  };
  kinds.forEach((kind, j) => {
    if (kind < 2) draw(j, 0);
  });
  for (const j of taken) {
    draw(j, 1);
    if (!other || other.kinds[j] > 1) continue; // else only this pane reads it
    sheet.rect(x(j * size), top - 5, Math.max(1, wide(tokens(j))), 4, sheet.skin.ink);
  }
  drawIds(sheet, kinds.length, (j) => x((j + 0.5) * size), wide(size));
}

function drawIds(sheet, blocks, x, wide) {
  const every = Math.ceil((widthOf(String(blocks)) + 8) / wide); // they stand apart
  for (let j = 0; j < blocks; j += every) {
    const half = widthOf(String(j)) / 2;
    const middle = Math.max(half, x(j));
    if (x(j) > 0 && middle + half <= sheet.width) sheet.text(j, middle, ROWS.ids[0] + 7, "center");
  }
}

// The window, the query's own block, the query in it, and the block that holds its answer.
function drawQuery(sheet, trace, { t, windowFirst, answer }, { x, wide }) {
  const [top, height] = ROWS.blocks;
  const { skin } = sheet;
  const [windowTop, windowHeight] = ROWS.window;
  sheet.box("window", x(windowFirst), windowTop, wide(t + 1 - windowFirst), windowHeight);
  sheet.outline(x(trace.own(t) * trace.size), top, wide(trace.size), height, skin.ink, 2);
  sheet.line(x(t + 0.5), top - 3, x(t + 0.5), ROWS.tokens[0] + 2, skin.ink, 2);
  if (answer >= 0) sheet.ring(x((answer + 0.5) * trace.size), top + 12, 5);
}

function drawTokens(sheet, trace, { first, count, readable, letters, x, wide, width }) {
  const [top, height] = ROWS.tokens;
  if (!readable)
    return sheet.text(fitting(["zoom in to read the tokens here", "zoom in"], width), 2, top + 11);
  for (let s = Math.floor(first); s < Math.min(trace.length, first + count); s++) {
    sheet.outline(x(s), top, wide(1), height, sheet.skin.faint, 1);
    sheet.text(clipped(trace.tokens[s], letters), x(s + 0.5), top + 11, "center");
  }
}

// Below the strip: a bar for each head and branch.
function drawGates(sheet, trace, now) {
  const third = sheet.width / 3;
  const top = 18;
  const full = sheet.height - top - 2; // a gate of 1
  const wide = Math.min(26, (third - 10) / trace.heads);
  ["compressed", "selected", "window"].forEach((branch, b) => {
    const left = b * third + 2;
    const words = trace.gateWords(now, b);
    const names = [
      `${branch} gate ${words}`,
      `${branch} ${words}`,
      `${branch.slice(0, 4)}. ${words}`,
      words,
    ];
    sheet.text(fitting(names, third - 8), left, 8);
    for (let r = 0; r < trace.heads; r++) {
      const tall = trace.gate(now, b, r) * full;
      const broad = Math.max(1, wide - 3);
      sheet.outline(left + r * wide, top, broad, full, sheet.skin.line, 0.5);
      sheet.box(branch, left + r * wide, sheet.height - 2 - tall, broad, tall);
    }
  });
}
