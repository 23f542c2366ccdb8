// --- the map: queries down, blocks across; a pixel shows all the queries that fall in it ---

const MAP = { left: 48, top: 36, right: 8, bottom: 8 }; // margins, in pixels

// Where the map's rows and columns lie; `area` is the part that is zoomed to, or null.
function mapPlace(trace, area, width, height) {
  const { queries, blocks } = trace.facts;
  const [q0, q1] = area?.queries ?? [0, queries];
  const [j0, j1] = area?.blocks ?? [0, blocks];
  const wide = Math.max(1, width - MAP.left - MAP.right);
  const tall = Math.max(1, height - MAP.top - MAP.bottom);
  return {
    q0,
    q1,
    j0,
    j1,
    wide,
    tall,
    x: (j) => MAP.left + ((j + 0.5 - j0) * wide) / (j1 - j0),
    y: (q) => MAP.top + ((q + 0.5 - q0) * tall) / (q1 - q0),
    block: (x) => clamp(Math.floor(j0 + ((x - MAP.left) / wide) * (j1 - j0)), j0, j1 - 1),
    query: (y) => clamp(Math.floor(q0 + ((y - MAP.top) / tall) * (q1 - q0)), q0, q1 - 1),
    holds: (q, j) => q >= q0 && q < q1 && j >= j0 && j < j1,
  };
}

const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

// For each cell of rows x columns: the share of its queries that select one of its blocks, as forced
// and by score; and of all its pairs of a query and a block the share that is not begun.
function census(trace, place, { q0, q1, j0, j1 }, rows, columns) {
  const [queries, blocks] = [q1 - q0, j1 - j0];
  const column = Int32Array.from({ length: blocks }, (_, j) => Math.floor((j * columns) / blocks));
  const wide = new Float32Array(columns);
  column.forEach((c) => {
    wide[c] += 1;
  });
  const forced = new Float32Array(rows * columns);
  const selected = new Float32Array(rows * columns);
  const unseen = new Float32Array(rows * columns);
  const ends = new Float32Array(blocks + 1); // of one row: how many queries see so many blocks
  for (let row = 0, q = q0; row < rows; row++) {
    const at = row * columns;
    const last = q0 + Math.ceil(((row + 1) * queries) / rows);
    const first = q;
    ends.fill(0);
    for (; q < last && q < q1; q++) {
      const from = trace.rowOf(place, q) * trace.ranks;
      const count = trace.countAt(place, q);
      const free = trace.arrays.forced[trace.rowOf(place, q)];
      for (let rank = 0; rank < count; rank++) {
        const j = trace.arrays.order[from + rank] - j0;
        if (j >= 0 && j < blocks) (rank < free ? forced : selected)[at + column[j]] += 1;
      }
      ends[clamp(trace.arrays.begun[q] - j0, 0, blocks)] += 1;
    }
    let blind = 0; // queries that do not see block j yet
    for (let j = 0; j < blocks; j++) unseen[at + column[j]] += blind += ends[j];
    for (let c = 0; c < columns; c++) {
      const cell = at + c;
      forced[cell] = Math.min(1, forced[cell] / (q - first));
      selected[cell] = Math.min(1 - forced[cell], selected[cell] / (q - first));
      unseen[cell] /= (q - first) * wide[c];
    }
  }
  return { forced, selected, unseen };
}

// One pixel's colours, mixed: the share that is selected counts by its square root, so that a
// choice of one query in a hundred is seen; a pixel of a single query keeps its tile's colours.
function mixed(tiles, k, forced, selected, unseen) {
  const chosen = forced + selected;
  if (chosen === 0)
    return unseen === 1 ? tiles.unseen[k] : blend(tiles.unused[k], tiles.unseen[k], unseen);
  const ground =
    chosen < 1 ? blend(tiles.unused[k], tiles.unseen[k], unseen / (1 - chosen)) : tiles.unused[k];
  const mark = blend(tiles.selected[k], tiles.forced[k], forced / chosen);
  return blend(ground, mark, Math.sqrt(chosen));
}

function blend(from, to, share) {
  if (share <= 0) return from;
  if (share >= 1) return to;
  let pixel = 0xff000000;
  for (let shift = 0; shift < 24; shift += 8) {
    const low = (from >>> shift) & 255;
    pixel |= Math.round(low + (((to >>> shift) & 255) - low) * share) << shift;
  }
  return pixel >>> 0;
}

// The map's picture: made anew only when what it shows has changed.
function bakeMap(trace, place, shown, width, height, skin) {
  const rows = Math.min(height, shown.q1 - shown.q0);
  const columns = Math.min(width, shown.j1 - shown.j0);
  const { forced, selected, unseen } = trace.census(place, shown, rows, columns);
  const tiles = Object.fromEntries(KINDS.map((kind) => [kind, tileOf(skin, kind)]));
  const image = new ImageData(width, height);
  const pixels = new Uint32Array(image.data.buffer);
  const column = Int32Array.from({ length: width }, (_, x) => Math.floor((x * columns) / width));
  for (let y = 0; y < height; y++) {
    const at = Math.floor((y * rows) / height) * columns;
    for (let x = 0; x < width; x++) {
      const cell = at + column[x];
      const k = ((y & 7) << 3) | (x & 7);
      pixels[y * width + x] = mixed(tiles, k, forced[cell], selected[cell], unseen[cell]);
    }
  }
  return canvasOf(image);
}

// cache: {key, image} of this map's picture; brush: a rectangle that is being drawn, or null.
function drawMap(sheet, trace, place, { t, focus, area, brush }, cache) {
  const { skin, scale } = sheet;
  const shown = mapPlace(trace, area, sheet.width, sheet.height);
  const { wide, tall, x, y } = shown;
  const size = [Math.round(wide * scale), Math.round(tall * scale)];
  const key = [
    Object.values(place),
    shown.q0,
    shown.q1,
    shown.j0,
    shown.j1,
    size,
    skin === DARK,
  ].join();
  if (cache.key !== key) {
    Object.assign(cache, { key, image: bakeMap(trace, place, shown, ...size, skin) });
  }
  sheet.image(cache.image, MAP.left, MAP.top, wide, tall);
  sheet.outline(MAP.left, MAP.top, wide, tall, skin.line, 1);
  drawAxes(sheet, trace, shown, t, focus);
  const q = trace.places[t];
  for (const [colour, thick] of [
    ["#FFFFFF", 4],
    ["#000000", 1.5],
  ]) {
    // a crosshair with a halo
    if (shown.holds(q, shown.j0))
      sheet.line(MAP.left - 4, y(q), MAP.left + wide, y(q), colour, thick);
    if (!shown.holds(shown.q0, focus)) continue;
    sheet.line(x(focus), MAP.top - 4, x(focus), MAP.top + tall, colour, thick);
  }
  for (const asked of trace.asked) {
    if (shown.holds(asked.q, asked.block)) sheet.ring(x(asked.block), y(asked.q), 3);
  }
  if (brush) sheet.outline(brush.x, brush.y, brush.width, brush.height, skin.missed, 2);
}

function drawAxes(sheet, trace, { q0, q1, j0, j1, x, y, wide, tall }, t, focus) {
  const each =
    q1 - q0 > tall ? `; a row of pixels shows ${Math.ceil((q1 - q0) / tall)} queries` : "";
  const words = ["queries down, blocks across", "queries and blocks"];
  sheet.text(fitting([words[0] + each, ...words], sheet.width - 4), 2, 9);
  const { positions } = trace;
  const here = trace.places[t];
  const across = 16 + widthOf(String(j1));
  for (const q of ticks(q0, q1, tall / 24)) {
    sheet.line(MAP.left - 4, y(q), MAP.left, y(q), sheet.skin.line, 1);
    if (Math.abs(y(q) - y(here)) > 14 && y(q) > MAP.top + 4 && y(q) < MAP.top + tall - 4) {
      sheet.text(positions[q], MAP.left - 7, y(q), "right");
    }
  }
  const id = (j) => {
    const half = widthOf(String(j)) / 2;
    sheet.text(j, Math.min(x(j), sheet.width - half), MAP.top - 12, "center");
  };
  for (const j of ticks(j0, j1, wide / across)) {
    sheet.line(x(j), MAP.top - 4, x(j), MAP.top, sheet.skin.line, 1);
    if (Math.abs(x(j) - x(focus)) > across) id(j);
  }
  if (here >= q0 && here < q1) sheet.text(t, MAP.left - 7, y(here), "right");
  if (focus >= j0 && focus < j1) id(focus);
}

// Round numbers from `first` on, below `end`: at most about `count` of them.
function ticks(first, end, count) {
  const least = (end - first) / Math.max(1, count);
  const power = 10 ** Math.floor(Math.log10(Math.max(1, least)));
  const step = Math.max(
    1,
    [1, 2, 5, 10].map((k) => k * power).find((k) => k >= least),
  );
  const start = Math.ceil(first / step) * step;
  return Array.from(
    { length: Math.max(0, Math.ceil((end - start) / step)) },
    (_, k) => start + k * step,
  );
}
